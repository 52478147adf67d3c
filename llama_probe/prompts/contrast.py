"""The shape that contrast sets share: texts that differ in what a probe is asked for, in groups.

A group holds everything that is about one thing, under every label equally often. Folds that keep
groups whole then say whether a probe finds the label in what it has never seen, and knowing what a
text is about does not help.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llama_probe.errors import InputError
from llama_probe.prompts.tokens import listed

_DATA = Path(__file__).resolve().parent / "data"
_FIRST = ["text", "label", "group"]


def contrast_set(rows: pd.DataFrame) -> pd.DataFrame:
    """See that a frame is a contrast set, and put its columns in order.

    Args:
        rows: One row for each text: `text`, `label`, `group`, and any other columns.

    Returns:
        The rows in their order, numbered from 0: first `text`, `label`, `group`, then the others.

    Raises:
        InputError: A column is missing, a text is empty or stands there twice, there are fewer than
            two labels, or a group does not have every label equally often.

    >>> rows = pd.DataFrame({"group": [0, 0], "label": ["hot", "cold"], "text": ["Fire.", "Ice."]})
    >>> contrast_set(rows).columns.tolist()
    ['text', 'label', 'group']
    """
    missing = [column for column in _FIRST if column not in rows]
    if missing:
        raise InputError(
            f"a contrast set needs the columns text, label and group, but lacks {listed(missing)}; "
            f"it has {listed(map(str, rows.columns))}"
        )
    for index, (text, label, group) in enumerate(rows[_FIRST].itertuples(index=False)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"row {index} of the contrast set has no text")
        if pd.isna(label) or pd.isna(group):
            raise InputError(f"row {index} of the contrast set has no label or no group")
    if twice := [text for text, times in Counter(rows["text"]).items() if times > 1]:
        raise InputError(f"each text of a contrast set stands there once, but not {listed(twice)}")
    counts = pd.crosstab(rows["group"], rows["label"])
    if counts.shape[1] < 2:
        raise InputError(f"a contrast set needs two labels or more, but has {counts.shape[1]}")
    if uneven := [str(group) for group, row in counts.iterrows() if row.nunique() > 1]:
        raise InputError(
            "each group of a contrast set has every label equally often, but not these: "
            f"{listed(uneven)}"
        )
    others = [column for column in rows if column not in _FIRST]
    return pd.DataFrame(rows, columns=_FIRST + others).reset_index(drop=True)


def table(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table that ships with the package, as texts."""
    frame = pd.read_csv(_DATA / f"{name}.csv", dtype=str, keep_default_na=False, encoding="utf-8")
    yield from frame.to_dict("records")


def by_column(name: str, labels: Sequence[str], group: str) -> pd.DataFrame:
    """The contrast set of a table with one line a group, and a column of texts for each label."""
    rows = []
    for line in table(name):
        others = {key: value for key, value in line.items() if key not in (*labels, group)}
        for label in labels:
            rows.append({"text": line[label], "label": label, "group": line[group], **others})
    return contrast_set(pd.DataFrame(rows))


def by_gap(name: str, labels: Sequence[str]) -> pd.DataFrame:
    """The contrast set of a table with one sentence a group, whose gap each label fills."""
    rows = []
    for line in table(name):
        for label in labels:
            text = line["sentence"].replace("___", line[label])
            own = {"group": line[labels[0]], "word": line[label], "form": line["form"]}
            rows.append({"text": text, "label": label, **own})
    return contrast_set(pd.DataFrame(rows))
