"""Whether two models tell two classes of prompts apart along the same direction."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from llama_probe.errors import InputError
from llama_probe.probing.bootstrap import RESAMPLES
from llama_probe.probing.data import Source, layer_of, source
from llama_probe.probing.design import Samples
from llama_probe.probing.direction import only
from llama_probe.probing.folds import grouped_folds
from llama_probe.probing.labels import Labels, coded
from llama_probe.probing.planning import units

_HALVINGS = 20


def direction_change(
    acts_a: Any,
    acts_b: Any,
    labels: Any,
    *,
    groups: Any = None,
    hooks: Any = None,
    at: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the difference in means of two models has turned, layer by layer.

    The directions are those of `lp.contrast_direction`. Cosines of estimates are smaller than those
    of what they estimate, so each is to be held against what one model reaches with itself: the
    split halves are directions of disjoint halves of the prompts (20 halvings, averaged), of one
    model or of both. If nothing turned, `halves` is as large as `halves_a` and `halves_b`. The
    `cosine` itself may be above all three, as its two directions come from the same prompts and
    share much of their noise.

    Resampling adds noise to the noise that there is, which turns both directions further. So the
    interval is the percentile bootstrap's (Efron 1979), moved to have its median at the value: it
    says how much other prompts would change the cosine, not how much noise there is in it.

    Args:
        acts_a: Activations of one model, as `lp.probe` takes them.
        acts_b: Of the other, on the same prompts.
        labels: A column of the prompts, or a label for each prompt (or row); two classes.
        groups: What is drawn, and halved, together, likewise; None: each prompt by itself.
        hooks: Names or globs; None: all.
        at: At which position, as `acts.index["at"]` says it; None: the only one there.
        seed: Of the 1,000 resamples and the halvings.

    Returns:
        One row for each hook: `hook layer at cosine ci_low ci_high halves halves_a halves_b norm_a
        norm_b n`, norms being the directions' lengths.

    Raises:
        InputError: Prompts, hooks or dimensions differ, an activation is not finite, or labels
            cannot be used.

    >>> x = np.random.default_rng(0).normal(size=(40, 3))
    >>> y = np.arange(40) % 2
    >>> x[:, 0] += 5 * y
    >>> frame = direction_change(x, -x, y)
    >>> frame[["cosine", "ci_low", "ci_high"]].round(3).values.tolist()
    [[-1.0, -1.0, -1.0]]
    """
    a, b = source(acts_a, hooks), source(acts_b, hooks)
    _check_same(a, b)
    at = only("at", at, a.ats)
    rows = a.rows(at)
    y, unit = coded(a.per_row(labels, "labels")[rows], "classes"), units(a, groups)[rows]
    if not y.two:
        raise InputError(
            f"a contrast needs two classes, but the labels have {len(y.classes or ())}"
        )
    every = _contrasts(y, np.ones((1, len(y))))
    resampled, halves = _contrasts(y, _resamples(unit, seed)), _halves(y, unit, seed)
    found = []
    for hook in a.hooks:
        xs = [one.features(hook, at) for one in (a, b)]
        if xs[0].shape != xs[1].shape:
            raise InputError(
                f"{hook or 'the array'}: activations {list(xs[0].shape)} and {list(xs[1].shape)} "
                "differ in shape, and have no directions to compare"
            )
        one, other = (every @ x for x in xs)
        cosine = _cosines(one, other).item()
        drawn = _cosines(*(resampled @ x for x in xs))
        low, middle, high = np.quantile(drawn, [0.025, 0.5, 0.975])
        bounds = np.clip([cosine + low - middle, cosine + high - middle], -1, 1)
        (a1, a2), (b1, b2) = ([half @ x for half in halves] for x in xs)
        across = (_cosines(a1, b2).mean() + _cosines(a2, b1).mean()) / 2
        within = _cosines(a1, a2).mean(), _cosines(b1, b2).mean()
        norms = np.linalg.norm(one), np.linalg.norm(other)
        where = (hook, layer_of(hook), at)
        found.append((*where, cosine, *bounds, across, *within, *norms, len(y)))
    columns = ["hook", "layer", "at", "cosine", "ci_low", "ci_high"]
    columns += ["halves", "halves_a", "halves_b", "norm_a", "norm_b", "n"]
    return pd.DataFrame(found, columns=columns)


def _check_same(a: Source, b: Source) -> None:
    a.check_finite()
    b.check_finite()
    if a.hooks != b.hooks:
        raise InputError(f"the hooks differ: {', '.join(a.hooks)} and {', '.join(b.hooks)}")
    if len(a.index) != len(b.index) or not a.index[["prompt", "at"]].equals(
        b.index[["prompt", "at"]]
    ):
        raise InputError(
            f"both models should have read the same prompts, but there are {len(a.index)} and "
            f"{len(b.index)} rows, or of other prompts and positions"
        )
    if a.has_texts and b.has_texts and list(a.prompts["text"]) != list(b.prompts["text"]):
        raise InputError("both models should have read the same prompts, but the texts differ")


def _contrasts(y: Labels, weights: Float[np.ndarray, "draw n"]) -> Float[np.ndarray, "draw n"]:
    """For each weighting what makes the difference of weighted means of activations."""
    parts = [weights * (y.values == code) for code in (0, 1)]
    sums = [part.sum(axis=1, keepdims=True) for part in parts]
    both = ((sums[0] > 0) & (sums[1] > 0))[:, 0]  # a resample may lack a class
    return parts[1][both] / sums[1][both] - parts[0][both] / sums[0][both]


def _resamples(unit: Int[np.ndarray, " n"], seed: int) -> Float[np.ndarray, "draw n"]:
    """How often each sample counts in each resample of the units."""
    found, code = np.unique(unit, return_inverse=True)
    n = len(found)
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    return draws[:, code].astype(float)


def _halves(
    y: Labels, unit: Int[np.ndarray, " n"], seed: int
) -> tuple[Float[np.ndarray, "draw n"], Float[np.ndarray, "draw n"]]:
    """Contrasts of halves of the units, and of the respective other halves."""
    groups = Samples(y, unit).groups
    first = np.zeros((_HALVINGS, len(y)))
    for number in range(_HALVINGS):
        split = grouped_folds(y, groups, 2, seed * _HALVINGS + number, "half of the prompts")[0]
        first[number, split.train] = 1
    return _contrasts(y, first), _contrasts(y, 1 - first)


def _cosines(
    a: Float[np.ndarray, "draw d"], b: Float[np.ndarray, "draw d"]
) -> Float[np.ndarray, " draw"]:
    """NaN where a direction is 0."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    known = lengths > 0
    return np.divide((a * b).sum(axis=1), lengths, out=np.full(len(a), np.nan), where=known)
