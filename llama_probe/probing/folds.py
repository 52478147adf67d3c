"""Folds that keep groups together: what a probe is tested on shares no group with what it saw."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int

from llama_probe.errors import InputError
from llama_probe.probing.labels import Labels, as_array


class Split(NamedTuple):
    """Rows to fit on and rows to test on."""

    train: Int[np.ndarray, " a"]
    test: Int[np.ndarray, " b"]


def grouped_folds(
    labels: Labels,
    groups: Int[np.ndarray, " n"] | None,
    folds: int,
    seed: int,
    what: str = "label",
) -> list[Split]:
    """Divide samples into folds at random, groups whole and classes in about equal shares.

    Raises:
        InputError: There are fewer groups (or samples) than folds, or too few of a class for each
            fold to have one.

    >>> labels = Labels(np.array([0, 1] * 4), (0, 1))
    >>> splits = grouped_folds(labels, np.repeat(np.arange(4), 2), 4, seed=0)
    >>> sorted(split.test.tolist() for split in splits)
    [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    if folds < 2:
        raise InputError(f"folds is {folds}, but should be at least 2")
    _enough(labels, groups, folds, what)
    if labels.classes is None:
        kinds = KFold, GroupKFold
    else:
        kinds = StratifiedKFold, StratifiedGroupKFold
    folder = kinds[groups is not None](folds, shuffle=True, random_state=seed)
    splits = [Split(*split) for split in folder.split(labels.values, labels.values, groups)]
    for number, split in enumerate(splits, 1):
        _all_classes(labels, split, f"fold {number} of {folds}", what)
    return splits


def inner_splits(
    labels: Labels,
    groups: Int[np.ndarray, " n"] | None,
    folds: int,
    seed: int,
    what: str = "label",
) -> list[Split]:
    """Folds for choosing a strength: fewer than asked for where the groups of a class are few.

    Raises:
        InputError: A class has a single group (or sample), so that nothing can be held out.
    """
    fewest = min(_units(labels, groups).values())
    return grouped_folds(labels, groups, max(2, min(folds, fewest)), seed, what)


def _units(labels: Labels, groups: Int[np.ndarray, " n"] | None) -> dict[str, int]:
    """How many groups (or samples) have each class."""
    units = np.arange(len(labels)) if groups is None else groups
    if labels.classes is None:
        return {"": len(np.unique(units))}
    return {
        repr(name): len(np.unique(units[labels.values == code]))
        for code, name in enumerate(labels.classes)
    }


def _enough(labels: Labels, groups: Int[np.ndarray, " n"] | None, folds: int, what: str) -> None:
    units = _units(labels, groups)
    rarest = min(units, key=lambda name: units[name])
    if units[rarest] < folds:
        unit = "samples" if groups is None else "groups"
        of = f" with the label {rarest}" if rarest else ""
        raise InputError(
            f"{what}: {folds} folds need {folds} {unit}{of}, or one would have none, but there "
            f"are only {units[rarest]}; use more data, or fewer folds"
        )


def _all_classes(labels: Labels, split: Split, where: str, what: str) -> None:
    for rows, part in ((split.train, "to train on"), (split.test, "to test on")):
        for code, name in enumerate(labels.classes or ()):
            if not (labels.values[rows] == code).any():
                raise InputError(
                    f"{what}: {where} has no sample of {name!r} {part}, as its groups are few or "
                    "large; use fewer folds, smaller groups, or another seed"
                )


def group_codes(groups: Any, n: int) -> Int[np.ndarray, " n"]:
    """Groups of any type as numbers from 0.

    Raises:
        InputError: There is not one for each of n samples, or one is missing.

    >>> group_codes(["x", "y", "x"], 3).tolist()
    [0, 1, 0]
    """
    values = as_array(groups)
    if values.shape != (n,):
        raise InputError(f"there are groups of shape {list(values.shape)} for {n} samples")
    codes = pd.factorize(values)[0]
    if (codes < 0).any():
        raise InputError(f"group {np.flatnonzero(codes < 0)[0]} is missing")
    return codes
