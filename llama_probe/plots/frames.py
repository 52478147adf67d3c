"""From a tidy frame, one row a measurement, to the grid that a heat map draws."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from llama_probe.errors import InputError
from llama_probe.plots.labels import token

# Per-cell hover text only on grids up to this size: it is most of a figure's weight.
SMALL = 4096


class Side(NamedTuple):
    """One axis of a grid: its cells' places and names, and the cell of each row of the frame."""

    positions: list[int]
    names: dict[int, str]
    rank: np.ndarray

    def span(self) -> int:
        """How many cells it has."""
        return len(self.positions)


class Grid(NamedTuple):
    """A frame laid out by two of its columns."""

    x: Side
    y: Side

    def size(self) -> int:
        """How many cells it has."""
        return self.x.span() * self.y.span()

    def numbers(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        """The numbers of a column in their cells [y, x]; NaN where there is no row.

        float32, which plotly sends as bytes; float16 would go as text, ten times as long.

        Raises:
            InputError: The column holds something that is not a number.
        """
        cells = np.full((self.y.span(), self.x.span()), np.nan, dtype=np.float32)
        cells[self.y.rank, self.x.rank] = numbers(frame, name)
        return cells

    def texts(self, column: Sequence[str]) -> list[list[str]]:
        """The texts of a column in their cells [y, x]; empty where there is no row."""
        cells = [[""] * self.x.span() for _ in range(self.y.span())]
        for row, col, text in zip(self.y.rank, self.x.rank, column, strict=True):
            cells[row][col] = text
        return cells


def check(frame: pd.DataFrame, *columns: str) -> None:
    """See that a frame has rows and these columns.

    Raises:
        InputError: It has not.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        has = ", ".join(map(str, frame.columns)) or "none"
        raise InputError(f"the frame has no column {', '.join(map(repr, missing))}; it has: {has}")
    if frame.empty:
        raise InputError("the frame has no rows, so there is nothing to draw")


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column that is there once; pandas' own types allow for several of one name."""
    return cast(pd.Series, frame[name])


def rows(frame: pd.DataFrame, wanted: Any) -> pd.DataFrame:
    """The rows that a boolean column or array asks for."""
    return cast(pd.DataFrame, frame[wanted])


def numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float32, missing values as NaN.

    Raises:
        InputError: It holds something that is not a number.
    """
    try:
        # An empty text is a missing number in a CSV read with keep_default_na=False.
        values = pd.Series(pd.to_numeric(column(frame, name)), dtype="Float64")
        return values.to_numpy(dtype="float32", na_value=float("nan"))
    except (TypeError, ValueError) as error:
        raise InputError(f"column {name!r} should hold numbers: {error}") from error


def grid(frame: pd.DataFrame, x: str, y: str) -> Grid:
    """Lay a frame out by two columns.

    Raises:
        InputError: A column is missing or has gaps, or two rows fall into the same cell.
    """
    check(frame, x, y)
    twice = frame.duplicated([x, y])
    if twice.any():
        at = frame.loc[twice, [x, y]].iloc[0]
        raise InputError(
            f"{int(twice.sum()) + 1} or more rows share a cell, as at {x}={at[x]}, {y}={at[y]}: "
            "choose rows, or average them, so that there is one a cell"
        )
    return Grid(_side(column(frame, x)), _side(column(frame, y)))


def _side(keys: pd.Series) -> Side:
    values = _plain(keys)
    if values.isna().any():
        raise InputError(f"column {keys.name!r} has missing values, but is an axis of the figure")
    whole = pd.api.types.is_integer_dtype(values)
    found = values.unique().tolist()
    if pd.api.types.is_numeric_dtype(values):
        found.sort()
    places = list(range(len(found)))
    rank = pd.Index(found).get_indexer(pd.Index(values))
    if whole and found == list(range(found[0], found[0] + len(found))):
        return Side(found, {}, rank)
    # Anything but consecutive numbers stands at its rank, under its name.
    return Side(places, {place: token(_name(found[place])) for place in places}, rank)


def _plain(keys: pd.Series) -> pd.Series:
    """The column as whole numbers, as floats or as texts: whichever comes first of what it fits."""
    if pd.api.types.is_bool_dtype(keys):
        return keys.astype(str)
    try:
        values = pd.Series(pd.to_numeric(keys), dtype="Float64")
    except (TypeError, ValueError):
        return keys.map(str, na_action="ignore")
    if values.isna().any() or (values % 1 != 0).any():
        return values
    return values.astype("int64")


def _name(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
