"""One direction or several: how many must go until no linear probe tells two classes apart.

A difference in means needs one round. Once it is projected out of the samples that it came from,
their class means coincide, and then no linear probe finds anything (Belrose et al. 2023, arXiv
2306.03819, theorem 3.1): a second round has nothing to fit. What is left on other samples is the
error of the estimate. A probe's weight is another matter: it avoids what varies for other reasons,
so that removing it leaves some of the difference, and rounds go on (iterative nullspace projection;
Ravfogel et al. 2020, arXiv 2004.07667). How many directions a behaviour needs is a third question,
which only interventions answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.probing.bootstrap import Interval, intervals
from llama_probe.probing.data import layer_of, source
from llama_probe.probing.design import Samples, held_out
from llama_probe.probing.direction import only
from llama_probe.probing.fit import choose_strength, solutions
from llama_probe.probing.folds import Split, grouped_folds
from llama_probe.probing.labels import coded
from llama_probe.probing.planning import units
from llama_probe.probing.scores import auroc

MEANS, LOGISTIC, RANDOM = (
    f"{what} removed" for what in ("difference of means", "logistic", "random")
)
COLUMNS = ["k", "kind", "metric", "value", "ci_low", "ci_high", "n", "note"]
_NOTHING = 1e-9  # of the first weight's length: a shorter one is rounding


@dataclass(frozen=True)
class Subspace:
    """Orthonormal directions at a place in a model, and what was measured of them.

    Attributes:
        basis: [k d] in float64, the most telling first; `basis[:2]` spans the first two.
        hook: The full name of the hook; empty: unknown.
        layer: Its block; -1 outside of them.
        position: Where in the prompt, as `acts.index["at"]` says it; empty: unknown.
        frame: One row for each k and kind.
    """

    basis: Float[Tensor, "k d"] = field(repr=False)
    hook: str
    layer: int
    position: str
    frame: pd.DataFrame = field(repr=False)

    @property
    def vector(self) -> Float[Tensor, "k d"]:
        """The basis, so that `lp.ablate` takes the subspace as it takes a direction."""
        return self.basis

    def rounds(self, kind: str = LOGISTIC, metric: str = "auroc") -> int | None:
        """After how many removals the classes are first at chance; None: after none of those tried.

        They are at chance where the AUROC's interval reaches 0.5.

        Args:
            kind: What is removed, as the frame says it.
            metric: "auroc" or "auroc refitted"; see `refusal_subspace`.

        Raises:
            InputError: The frame has no such rows.
        """
        rows = self.frame[(self.frame.kind == kind) & (self.frame.metric == metric)]
        if "auroc" not in metric or rows.empty:
            there = ", ".join(self.frame.kind.unique())
            raise InputError(f"there is no {metric!r} of kind {kind!r}; the frame has {there}")
        chance = rows.k[rows.ci_low <= 0.5]
        return int(chance.iloc[0]) if len(chance) else None


def refusal_subspace(
    acts: Any,
    labels: Any,
    *,
    groups: Any = None,
    hook: str | None = None,
    at: str | None = None,
    k_max: int = 5,
    n_random: int = 20,
    folds: int = 5,
    seed: int = 0,
) -> Subspace:
    """Remove direction after direction until two classes cannot be told apart.

    Directions come from one half of the prompts, and what they leave is measured on the other, in
    two ways: "auroc" is that of a logistic probe which the first half fits to what is left;
    "auroc refitted" of probes fitted anew on folds of the second half. The latter finds whatever
    the first half could not know, its errors too: the two agree only with many more prompts than
    dimensions.

    "logistic removed" takes out k weights of probes, each fitted on what the ones before leave;
    "difference of means removed" one difference, after which the first half has no second, and its
    probe is at chance by construction (see the module); "random removed" a random k-dimensional
    subspace.

    Args:
        acts: What `lp.probe` takes.
        labels: A column of the prompts, or a label for each prompt (or row); two classes.
        groups: Likewise; what must not be torn apart, such as twins. None: each prompt by itself.
        hook: Whose activations; None: the only ones there.
        at: At which position, as `acts.index["at"]` says it; None: the only one there.
        k_max: The most directions.
        n_random: How many random subspaces.
        folds: Of the half that is measured on.
        seed: Of halves, folds, subspaces and intervals.

    Returns:
        The subspace of the logistic weights, at most `k_max` of them. Its frame: `k kind metric
        value ci_low ci_high n note`, with the two metrics, `n` the prompts measured on, and the
        interval from drawing groups again; of random subspaces the mean and the 2.5 and 97.5
        percentiles.

    Raises:
        InputError: Labels, groups or a number cannot be used, an activation is not finite, or there
            are too few groups of a class for halves and folds.

    >>> random = np.random.default_rng(0)
    >>> y = np.arange(400) % 2
    >>> x = random.normal(size=(400, 6)) + 2 * y[:, None] * np.eye(6)[0]
    >>> found = refusal_subspace(x, y, k_max=2, n_random=2)
    >>> found.rounds("difference of means removed"), found.basis.shape
    (1, torch.Size([2, 6]))
    """
    import sklearn.linear_model  # noqa: F401 - only libraries that are loaded can be limited

    x, samples, hook, at = chosen(acts, labels, groups, hook, at)
    if not 1 <= k_max < x.shape[1]:
        raise InputError(
            f"k_max is {k_max}, but of {x.shape[1]} dimensions 1 to {x.shape[1] - 1} can go"
        )
    if n_random < 1:
        raise InputError(f"n_random is {n_random}, but should be at least 1")
    fit, report = grouped_folds(samples.labels, samples.groups, 2, seed, "half of the prompts")[0]
    own, other = samples[fit], samples[report]
    inner = grouped_folds(other.labels, other.groups, folds, seed, "the half that is measured on")
    again = [Split(report[train], report[test]) for train, test in inner]
    with threadpool_limits(1):  # the products are small: threads would wait for each other
        strength = choose_strength(
            "logistic", x[fit], own.labels.values, groups=own.groups, seed=seed
        )

        def left(basis: Float[np.ndarray, "k d"]) -> dict[str, Interval]:
            return _aurocs(_without(x, basis), samples, Split(fit, report), again, strength, seed)

        weights = np.array(list(_logistic_rounds(x[fit], own, k_max, strength)))
        drawn = [_random_basis(k_max, x.shape[1], seed, number) for number in range(n_random)]
        every = left(weights[:0])
        found = [(0, kind, every) for kind in (LOGISTIC, MEANS, RANDOM)]
        found += [(k, LOGISTIC, left(weights[:k])) for k in range(1, len(weights) + 1)]
        found.append((1, MEANS, left(_difference(x[fit], own)[None])))
        for k in range(1, k_max + 1):
            of_draws = [left(basis[:k]) for basis in drawn]
            found.append(
                (k, RANDOM, {m: spread([one[m].value for one in of_draws]) for m in every})
            )
    note = f"directions from {len(fit)} samples in {x.shape[1]} dimensions"
    rows = [
        (k, kind, metric, *interval, len(report), "" if kind == RANDOM else note)
        for k, kind, measured in found
        for metric, interval in measured.items()
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS).sort_values(["kind", "metric", "k"])
    frame = frame.reset_index(drop=True)
    return Subspace(torch.from_numpy(weights), hook, layer_of(hook), at, frame)


def chosen(
    acts: Any, labels: Any, groups: Any, hook: str | None, at: str | None
) -> tuple[Float[np.ndarray, "n d"], Samples, str, str]:
    """The activations of one hook at one position, with labels and groups.

    Raises:
        InputError: There is no such hook or position, the labels are not two classes, the groups do
            not fit, or an activation is not finite.
    """
    found = source(acts)
    hook, at = only("hook", hook, found.hooks), only("at", at, found.ats)
    rows = found.rows(at)
    samples = Samples(
        coded(found.per_row(labels, "labels")[rows], "classes"), units(found, groups)[rows]
    )
    if not samples.labels.two:
        raise InputError(f"two classes are needed, but there are {samples.labels.classes}")
    x = found.features(hook, at)
    if not np.isfinite(x).all():
        raise InputError(f"{hook or 'the array'}: an activation is not finite")
    return x, samples, hook, at


def _aurocs(
    x: Float[np.ndarray, "n d"],
    samples: Samples,
    once: Split,
    again: Sequence[Split],
    strength: float,
    seed: int,
) -> dict[str, Interval]:
    """By a probe of the first half, and by probes of folds of the second."""
    found = {}
    for metric, splits in (("auroc", [once]), ("auroc refitted", again)):
        held = held_out("logistic", x, samples, splits, [strength] * len(splits))
        # Log-odds that differ less are rounding: those of a probe that found nothing are ties.
        held = replace(held, scores=held.scores.round(6))
        found[metric] = intervals([held], {metric: auroc}, seed)[metric]
    return found


def _logistic_rounds(
    x: Float[np.ndarray, "n d"], samples: Samples, k_max: int, strength: float
) -> Iterator[Float[np.ndarray, " d"]]:
    """Orthonormal weights, each of a probe on what the ones before leave."""
    basis = np.empty((0, x.shape[1]))
    first = None
    for _ in range(k_max):
        left = _without(x, basis)
        weight = _without(solutions("logistic", left, samples.labels, (strength,))[0].weight, basis)
        length = np.linalg.norm(weight)
        first = first or length
        if length <= _NOTHING * first:
            break
        basis = np.concatenate([basis, weight / length])
        yield basis[-1]


def _difference(x: Float[np.ndarray, "n d"], samples: Samples) -> Float[np.ndarray, " d"]:
    means = [x[samples.labels.values == code].mean(axis=0) for code in (0, 1)]
    difference = means[1] - means[0]
    return difference / np.linalg.norm(difference)


def _without(
    x: Float[np.ndarray, "n d"], basis: Float[np.ndarray, "k d"]
) -> Float[np.ndarray, "n d"]:
    return x - x @ basis.T @ basis


def _random_basis(k: int, d: int, seed: int, number: int) -> Float[np.ndarray, "k d"]:
    return np.linalg.qr(np.random.default_rng([seed, number]).normal(size=(d, k)))[0].T


def spread(values: Sequence[float]) -> Interval:
    """The mean of draws with their 2.5 and 97.5 percentiles."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high))
