"""Two runs side by side: in what they were run differently, and where their tables differ."""

from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from llama_probe.runner.saved import SavedRun, read_run

_GROUPS = {
    "arguments": "argument",
    "source": "source",
    "inputs": "input",
    "models": "model",
    "versions": "version",
}
_SINGLE = ("experiment", "seed", "status", "git", "device", "threads", "platform")


def compare(a: str | Path, b: str | Path) -> pd.DataFrame:
    """Compare two runs.

    Args:
        a: The folder of a run.
        b: The folder of another.

    Returns:
        One row for each thing that differs in how they were run, and one for each table: `kind`
        ("argument", "version", "source", "model", "input", "table" …), `name`, `a`, `b` and
        `difference`: of a table, which columns differ, in how many rows and by how much at most;
        "the same" where none does.

    Raises:
        InputError: One of the folders is no run.
    """
    first, second = read_run(a), read_run(b)
    rows = [*_settings(first.record, second.record), *_tables(first, second)]
    return pd.DataFrame(rows, columns=["kind", "name", "a", "b", "difference"])


def _settings(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    pairs = [(key, "", a[key], b[key]) for key in _SINGLE]
    for group, kind in _GROUPS.items():
        names = dict.fromkeys([*a[group], *b[group]])
        pairs += [(kind, name, a[group].get(name, ""), b[group].get(name, "")) for name in names]
    return [
        (kind, name, _told(one), _told(other), "")
        for kind, name, one, other in pairs
        if one != other
    ]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(one)}" for key, one in value.items())
    text = str(value)
    is_hash = len(text) in (40, 64) and not set(text) - set("0123456789abcdef")
    return text[:16] if is_hash else text


def _tables(a: SavedRun, b: SavedRun) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name in dict.fromkeys([*a.tables, *b.tables]):
        one, other = (run.tables[name] if name in run.tables else None for run in (a, b))
        both = "" if one is None or other is None else _difference(one, other)
        rows.append(("table", name, _size(one), _size(other), both))
    return rows


def _size(frame: pd.DataFrame | None) -> str:
    return "" if frame is None else f"{len(frame)} rows, {len(frame.columns)} columns"


def _difference(a: pd.DataFrame, b: pd.DataFrame) -> str:
    """In what two tables differ, row by row."""
    lacking = [f"no {name} in b" for name in a.columns.difference(b.columns)]
    lacking += [f"no {name} in a" for name in b.columns.difference(a.columns)]
    if len(a) != len(b):
        return "; ".join([*lacking, "other rows"])
    columns = [_column(name, a[name], b[name]) for name in a.columns if name in b.columns]
    return "; ".join([*lacking, *filter(None, columns)]) or "the same"


def _column(name: str, a: Any, b: Any) -> str:
    """In how many rows a column differs, and by how much at most; empty if in none."""
    differ = (a != b) & ~(a.isna() & b.isna())
    if not differ.any():
        return ""
    told = f"{name} in {int(differ.sum())} of {len(a)} rows"
    if not all(is_numeric_dtype(kind) and not is_bool_dtype(kind) for kind in (a.dtype, b.dtype)):
        return told
    largest = (a - b).abs().max()
    return told if pd.isna(largest) else f"{told}, by at most {largest:.3g}"
