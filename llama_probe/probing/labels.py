"""Labels as probes need them: codes of classes, or numbers to predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from llama_probe.errors import InputError

TASKS = ("classes", "number")
# Whole numbers of more different values than this are numbers to predict.
MOST_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """One label for each sample.

    Attributes:
        values: Codes, places in `classes`; or numbers, in float64.
        classes: What the codes stand for, sorted; None: numbers.
    """

    values: Shaped[np.ndarray, " n"]
    classes: tuple[Any, ...] | None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> "Labels":
        return Labels(self.values[rows], self.classes)

    @property
    def two(self) -> bool:
        """Whether there are exactly two classes."""
        return self.classes is not None and len(self.classes) == 2

    def indicators(self) -> Float[np.ndarray, "n out"]:
        """What least squares predicts: -1 and 1 for each class but the first of two; or numbers."""
        if self.classes is None:
            return self.values[:, None]
        codes = [1] if self.two else range(len(self.classes))
        return np.where(self.values[:, None] == np.array(codes), 1.0, -1.0)


def as_array(values: Any) -> np.ndarray:
    """Labels or groups as an array, elements as they are: numbers beside texts stay numbers.

    >>> as_array([1, "a"]).tolist(), as_array(pd.Series([1, 2], dtype=object)).dtype.kind
    ([1, 'a'], 'i')
    """
    if hasattr(values, "cpu"):
        return values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind in "US":
        return np.asarray(values, dtype=object)
    if array.dtype.kind == "O" and array.ndim == 1:
        return pd.Series(array).infer_objects().to_numpy()
    return array


def coded(
    labels: Any, task: str | None = None, classes: Sequence[Any] | None = None, what: str = "label"
) -> Labels:
    """Labels as codes or as numbers.

    Args:
        labels: One for each sample.
        task: "classes", "number", or None: bools, texts and whole numbers of at most 20 different
            values are classes, other numbers are a number to predict.
        classes: All there are; None: those found.
        what: What the labels are called in errors.

    Raises:
        InputError: A label is missing or none of `classes`, all are the same, or they are to be a
            number and are none.

    >>> coded(["b", "a", "b"]).values.tolist(), coded([0.5, 1.5]).classes
    ([1, 0, 1], None)
    """
    values = as_array(labels)
    if values.ndim != 1:
        raise InputError(f"{what}: labels should be one row of them, but have shape {values.shape}")
    missing = np.flatnonzero(pd.isna(values))
    if len(missing):
        raise InputError(
            f"{what}: labels are missing, {len(missing)} of {len(values)}, first at {missing[0]}"
        )
    if task not in (None, *TASKS):
        raise InputError(f"task is {task!r}, but should be one of {', '.join(TASKS)}, or None")
    if classes is None and (task or _task_of(values)) == "number":
        return Labels(_numbers(values, what), None)
    return _classes(values, classes, what)


def _task_of(values: Shaped[np.ndarray, " n"]) -> str:
    if values.dtype.kind == "f":
        return "number"
    many = values.dtype.kind in "iu" and len(np.unique(values)) > MOST_CLASSES
    return "number" if many else "classes"


def _numbers(values: Shaped[np.ndarray, " n"], what: str) -> Float[np.ndarray, " n"]:
    try:
        numbers = values.astype(float)
    except (TypeError, ValueError):
        raise InputError(
            f"{what}: the labels are to be numbers, but the first is {values[0]!r}"
        ) from None
    if not np.isfinite(numbers).all():
        raise InputError(f"{what}: label {np.flatnonzero(~np.isfinite(numbers))[0]} is not finite")
    if len(np.unique(numbers)) < 2:
        raise InputError(f"{what}: all labels are {numbers[0]:g}, so there is nothing to predict")
    return numbers


def _classes(values: Shaped[np.ndarray, " n"], classes: Sequence[Any] | None, what: str) -> Labels:
    # Codes of labels that may be of any type; sorting those of several types fails by itself.
    found = pd.unique(values).tolist()
    try:
        known = tuple(sorted(found if classes is None else classes))
    except TypeError:
        raise InputError(f"{what}: labels of several types, {found[:3]}, have no order") from None
    if len(known) < 2:
        raise InputError(
            f"{what}: all {len(values)} labels are {found[0]!r}, but a probe needs two classes"
        )
    codes = pd.Index(list(known)).get_indexer(pd.Index(values))
    if (codes < 0).any():
        stray = values[codes < 0].tolist()[0]
        raise InputError(f"{what}: {stray!r} is none of the classes {list(known)}")
    return Labels(codes.astype(int), known)
