"""Prompts from the files of public sets, which the user has: none of them ships with this package.

All readers give the prompts as `text`, and a `label` where the set has one, before the columns of
the file, which stay as they are.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from llama_probe.errors import InputError
from llama_probe.prompts.tokens import listed


class _Format(NamedTuple):
    """What a file is known by: the column of the prompts, and others that it needs."""

    reader: str
    prompt: str
    others: tuple[str, ...]


_STATEMENTS = _Format("read_statements", "statement", ("label",))
_ADVBENCH = _Format("read_advbench", "goal", ("target",))
_HARMBENCH = _Format(
    "read_harmbench",
    "Behavior",
    ("FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"),
)
_JAILBREAKBENCH = _Format(
    "read_jailbreakbench", "Goal", ("Index", "Target", "Behavior", "Category", "Source")
)
_XSTEST = _Format("read_xstest", "prompt", ("type",))
_FORMATS = (_STATEMENTS, _ADVBENCH, _HARMBENCH, _JAILBREAKBENCH, _XSTEST)
_TRUTH = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0}


def read_statements(path: str | Path) -> pd.DataFrame:
    """True and false statements from a CSV file with the columns `statement` and `label`.

    The format of Marks and Tegmark 2023 (arXiv 2310.06824) and of Bürger et al. 2024
    (arXiv 2407.12831).

    Args:
        path: The file, in UTF-8.

    Returns:
        One row for each statement: `text`, `label` (1 true, 0 false), and the file's columns.

    Raises:
        InputError: The file cannot be read, has other columns or no rows, or a row has no
            statement or a label other than 0, 1, true and false.
    """
    frame = _read(path, _STATEMENTS)
    for row, label in enumerate(frame["label"]):
        if str(label).lower() not in _TRUTH:
            raise InputError(
                f"row {row} of {path} has the label {label!r}, but should have 0 or 1 (or true, "
                "false)"
            )
    return frame.assign(label=[_TRUTH[str(label).lower()] for label in frame["label"]])


def read_advbench(path: str | Path) -> pd.DataFrame:
    """The goals of AdvBench (Zou et al. 2023, arXiv 2307.15043), `harmful_behaviors.csv`.

    Args:
        path: The file, in UTF-8; as published it has 520 rows.

    Returns:
        One row for each goal: `text`, `goal` (the same), `target` (how compliance would begin). All
        of them are harmful requests, so there is no label.

    Raises:
        InputError: The file cannot be read, has other columns or no rows, or a row has no goal.
    """
    return _read(path, _ADVBENCH)


def read_harmbench(path: str | Path) -> pd.DataFrame:
    """The behaviours of HarmBench's text sets (Mazeika et al. 2024, arXiv 2402.04249).

    Args:
        path: The file, in UTF-8, such as `harmbench_behaviors_text_all.csv`.

    Returns:
        One row for each behaviour: `text`, `Behavior` (the same), and the file's other columns.
        Where `FunctionalCategory` is "contextual" the request is about `ContextString`, which
        `text` does not hold. All of them are harmful requests, so there is no label.

    Raises:
        InputError: The file cannot be read, has other columns or no rows, or a row has no
            behaviour.
    """
    return _read(path, _HARMBENCH)


def read_jailbreakbench(path: str | Path) -> pd.DataFrame:
    """The goals of JailbreakBench (Chao et al. 2024, arXiv 2404.01318).

    Args:
        path: The file, in UTF-8: `harmful-behaviors.csv` or `benign-behaviors.csv`; as published
            each has 100 rows, which correspond by `Index`.

    Returns:
        One row for each goal: `text`, `Goal` (the same), and the file's other columns. Which of the
        two files it is does not stand in it, so there is no label.

    Raises:
        InputError: The file cannot be read, has other columns or no rows, or a row has no goal.
    """
    return _read(path, _JAILBREAKBENCH)


def read_xstest(path: str | Path) -> pd.DataFrame:
    """The prompts of XSTest (Röttger et al. 2023, arXiv 2308.01263): safe ones, and contrasts.

    Args:
        path: The file, in UTF-8: `xstest_prompts.csv`, or an older one without the column `label`;
            as published it has 450 rows.

    Returns:
        One row for each prompt: `text`, `label` ("safe", "unsafe"; in files without it, "unsafe"
        where `type` begins with "contrast_"), and the file's columns.

    Raises:
        InputError: The file cannot be read, has other columns or no rows, or a row has no prompt or
            a label other than these two.
    """
    frame = _read(path, _XSTEST)
    if "label" not in frame:
        kinds = frame["type"].astype(str)
        labels = ["unsafe" if kind.startswith("contrast_") else "safe" for kind in kinds]
        frame.insert(1, "label", labels)
    for row, label in enumerate(frame["label"]):
        if label not in ("safe", "unsafe"):
            raise InputError(
                f"row {row} of {path} has the label {label!r}, but should have 'safe' or 'unsafe'"
            )
    return frame


def _read(path: str | Path, wanted: _Format) -> pd.DataFrame:
    """The rows of a file that has what the format needs, with `text`, and any `label`, first."""
    columns, rows = _csv(Path(path))
    if not {wanted.prompt, *wanted.others} <= set(columns):
        raise InputError(
            f"{path} has the columns {listed(columns)}, but {wanted.reader} needs "
            f"{', '.join([wanted.prompt, *wanted.others])}{_other_reader(columns)}"
        )
    if "text" in columns:
        raise InputError(f"{path} has a column 'text' beside {wanted.prompt!r}: rename one of them")
    if not rows:
        raise InputError(f"{path} has a header, but no rows")
    cells = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    texts = cells[wanted.prompt]
    for row, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"row {row} of {path} has no {wanted.prompt}")
    first = ["label"] if "label" in cells else []
    others = [column for column in columns if column not in first]
    known = {column: _numbers(cells[column]) for column in first + others}
    return pd.DataFrame({"text": texts, **known, wanted.prompt: texts})


def _csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file; rows with nothing in them are left out.

    Not by pandas, which lets pass what is wrong: lines of another length, a header twice.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8, which it should be: {error}") from error
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if not columns:
        raise InputError(f"{path} is empty, or its first line is: it should be a header")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} has a column twice: its header is {', '.join(columns)}")
    for line, row in lines:
        if len(row) != len(columns):
            raise InputError(
                f"line {line} of {path} has {len(row)} fields, but the header has "
                f"{len(columns)}: texts with commas need quotes"
            )
    return columns, [row for _, row in lines]


def _other_reader(columns: Sequence[str]) -> str:
    """Which reader such a file is for, as the end of a sentence; empty if there is none."""
    for other in _FORMATS:
        if {other.prompt, *other.others} <= set(columns):
            return f"; such a file is for {other.reader}"
    return ""


def _numbers(cells: list[str]) -> list[str] | list[int] | list[float]:
    """A column as whole numbers, or as numbers, if all of it are; else as it is."""
    for kind in (int, float):
        try:
            return [kind(cell) for cell in cells]
        except ValueError:
            continue
    return cells
