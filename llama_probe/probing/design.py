"""Who is held out when: the folds of one target at one position, which all hooks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llama_probe.probing.fit import INNER_FOLDS, solutions, strength_on
from llama_probe.probing.folds import Split, grouped_folds, inner_splits
from llama_probe.probing.labels import Labels
from llama_probe.probing.scores import HeldOut


@dataclass(frozen=True)
class Samples:
    """Who is probed, and who belongs together.

    Attributes:
        labels: One for each.
        unit: What each is held out and drawn with: its group, or its prompt.
    """

    labels: Labels
    unit: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Int[np.ndarray, " m"]) -> "Samples":
        return Samples(self.labels[rows], self.unit[rows])

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return len(np.unique(self.unit))

    def relabelled(self, labels: Labels) -> "Samples":
        """The same with other labels."""
        return Samples(labels, self.unit)

    @property
    def groups(self) -> Int[np.ndarray, " n"] | None:
        """The units, unless each sample is one."""
        return self.unit if self.n_units < len(self) else None


@dataclass(frozen=True)
class Part:
    """A fold: what to fit on and what to score, and how to divide the former again.

    Attributes:
        split: Rows to fit on and rows to score.
        inner: Splits of the rows to fit on, counted among them: there a strength is chosen.
    """

    split: Split
    inner: Sequence[Split] = ()


class Scored(NamedTuple):
    """A fold's held-out scores, and what its probe's scores are measured by.

    Attributes:
        centre: The mean score of the training part.
        length: Of the weight, on standardised features.
    """

    scores: Float[np.ndarray, "m out"]
    centre: float
    length: float

    def level(self) -> Float[np.ndarray, " m"]:
        """See `HeldOut`."""
        return (self.scores[:, 0] - self.centre) / (self.length or 1.0)


def parts_of(samples: Samples, splits: Sequence[Split], seed: int, what: str) -> list[Part]:
    """Each split with inner splits of its training part.

    Raises:
        InputError: A training part has too few groups of a class.
    """
    parts = []
    for number, split in enumerate(splits, 1):
        train = samples[split.train]
        where = f"{what}, to choose a strength in the training part of fold {number}"
        inner = inner_splits(train.labels, train.groups, INNER_FOLDS, seed, where)
        parts.append(Part(split, inner))
    return parts


def strengths_on(
    kind: str,
    x: Float[np.ndarray, "n d"],
    samples: Samples,
    parts: Sequence[Part],
    fixed: int | float | None = None,
) -> list[float]:
    """The strength for each fold: a fixed one, or the one chosen in its training part."""
    if fixed is not None:
        return [fixed] * len(parts)
    return [
        strength_on(kind, x[part.split.train], samples.labels[part.split.train], part.inner)
        for part in parts
    ]


def held_out(
    kind: str,
    x: Float[np.ndarray, "n d"],
    samples: Samples,
    splits: Sequence[Split],
    strengths: Sequence[float],
) -> HeldOut:
    """Score each fold with a probe fitted on its training part at the strength given."""
    scored = []
    for (train, test), strength in zip(splits, strengths, strict=True):
        seen = x[train]
        solution = solutions(kind, seen, samples.labels[train], (strength,))[0]
        length = float(np.linalg.norm(solution.weight[0] * seen.std(axis=0)))
        centre = float(solution.scores(seen.mean(axis=0, keepdims=True))[0, 0])
        scored.append(Scored(solution.scores(x[test]), centre, length))
    return assembled(samples, splits, scored)


def assembled(
    samples: Samples,
    splits: Sequence[Split],
    scored: Sequence[Scored],
) -> HeldOut:
    """The held-out scores of all folds."""
    rows = np.concatenate([split.test for split in splits])
    sizes = [len(split.test) for split in splits]
    return HeldOut(
        scores=np.concatenate([part.scores for part in scored]),
        labels=samples.labels[rows],
        fold=np.repeat(np.arange(len(splits)), sizes),
        unit=samples.unit[rows],
        level=np.concatenate([part.level() for part in scored]),
    )


def halves(everyone: Samples, rows: Int[np.ndarray, " n"], seed: int, what: str) -> list[Part]:
    """Some rows in two halves, units whole, each to fit on once; the same units whatever the rows.

    Raises:
        InputError: A class has too few groups.
    """
    split = grouped_folds(everyone.labels, everyone.groups, 2, seed, what)[0]
    second = np.isin(rows, split.test)
    one, other = np.flatnonzero(~second), np.flatnonzero(second)
    return parts_of(everyone[rows], [Split(one, other), Split(other, one)], seed, what)
