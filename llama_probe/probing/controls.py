"""What a probe's score is to be held against: labels that mean nothing, and directions at random.

- Shuffled labels: what the procedure gives where there is nothing to find.
- A control task (Hewitt and Liang 2019, arXiv 1909.03368): each type of input gets a label at
  random, the same wherever it recurs. A probe that learns it has room to memorise; selectivity is
  the accuracy on the real labels less that.
- Random directions: what a direction gives that was not fitted at all.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from llama_probe.probing.design import Samples
from llama_probe.probing.fit import mean_and_scale
from llama_probe.probing.folds import Split
from llama_probe.probing.labels import Labels

DIRECTIONS = 500
NONE_FOUND = (
    "not applicable: no labels at random were found that leave every training part all classes"
)
_TRIES = 100  # of one draw of labels
_SEEN = 0.5  # the share of held-out samples whose type the training part should have


def shuffled(samples: Samples, splits: Sequence[Split], n: int, seed: int) -> list[Labels]:
    """Labels that mean nothing: each group takes the labels of another one, in random order.

    Whole groups change places, as it is them that are exchangeable: labels that are the same all
    over a group stay so, and a group with one of each keeps one of each. The labels of a donor of
    another size are repeated or cut. Without groups, samples exchange their labels.

    Returns:
        As many as could be drawn so that each training part has all classes.
    """
    starts = np.unique(np.sort(samples.unit), return_index=True)[1]
    of_unit = np.split(np.argsort(samples.unit, kind="stable"), starts[1:])

    def draws(random: np.random.Generator) -> np.ndarray:
        values = np.empty_like(samples.labels.values)
        for taker, donor in enumerate(random.permutation(len(of_unit))):
            donated = random.permutation(samples.labels.values[of_unit[donor]])
            values[of_unit[taker]] = random.permutation(np.resize(donated, len(of_unit[taker])))
        return values

    random = np.random.default_rng(seed)
    return _usable((draws(random) for _ in range(_TRIES * n)), samples.labels, splits, n)


def control_labels(
    samples: Samples,
    types: Int[np.ndarray, " n"],
    splits: Sequence[Split],
    n: int,
    seed: int,
) -> list[Labels]:
    """Labels drawn for each type of input from those that there are.

    Returns:
        As many as could be drawn so that each training part has all classes.
    """
    random = np.random.default_rng(seed)
    draws = (
        random.choice(samples.labels.values, types.max() + 1)[types] for _ in range(_TRIES * n)
    )
    return _usable(draws, samples.labels, splits, n)


def why_no_control(types: Int[np.ndarray, " n"], splits: Sequence[Split]) -> str:
    """Why a control task would mean nothing here; empty if it means something."""
    if (types < 0).any():
        return "not applicable: what type of input a sample is, is not known; give control_by"
    if len(np.unique(types)) == 1:
        return "not applicable: all samples are one type of input"
    if len(np.unique(types)) == len(types):
        return "not applicable: each type of input occurs once"
    seen = np.concatenate([np.isin(types[test], types[train]) for train, test in splits]).mean()
    if seen < _SEEN:
        return (
            f"not applicable: the folds hold types of input out, {seen:.0%} of the samples have "
            "one that was trained on"
        )
    return ""


def random_directions(
    x: Float[np.ndarray, "n d"], samples: Samples, splits: Sequence[Split], seed: int
) -> Float[np.ndarray, " direction"]:
    """AUROC of two classes along 500 directions drawn at random on standardised features.

    Within folds and averaged. A direction may as well point the other way: the larger of a and 1-a.
    """
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], DIRECTIONS))
    parts = []
    for train, test in splits:
        mean, scale = mean_and_scale(x[train])
        z = (x[test] - mean) / scale
        parts.append(_auroc(z @ directions, samples.labels.values[test] == 1))
    found = np.mean(parts, axis=0)
    return np.maximum(found, 1 - found)


def _auroc(
    scores: Float[np.ndarray, "n direction"], positive: np.ndarray
) -> Float[np.ndarray, " direction"]:
    """From ranks (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    n = positive.sum()
    wins = rankdata(scores, axis=0)[positive].sum(axis=0) - n * (n + 1) / 2
    return wins / (n * (len(positive) - n))


def _usable(
    draws: Iterator[np.ndarray], labels: Labels, splits: Sequence[Split], n: int
) -> list[Labels]:
    found: list[Labels] = []
    for values in draws:
        if all(len(np.unique(values[train])) >= _needed(labels) for train, _ in splits):
            found.append(Labels(values, labels.classes))
        if len(found) == n:
            break
    return found


def _needed(labels: Labels) -> int:
    return 2 if labels.classes is None else len(labels.classes)
