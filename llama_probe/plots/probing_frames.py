"""What figures of probes read of a frame: texts, metrics' names, and where hooks stand."""

import re
from typing import Any, NamedTuple

import pandas as pd

from llama_probe.errors import InputError
from llama_probe.plots.frames import check, column, numbers, rows
from llama_probe.plots.labels import clip, escape

_TEXTS = ("hook", "at", "target", "probe", "kind", "metric", "note")
_NUMBERS = ("layer", "value", "ci_low", "ci_high", "n", "groups", "cells")
_NAMES = {
    "auroc": "AUROC",
    "r2": "R²",
    "ece": "calibration error",
    "brier": "Brier score",
    "recall_at_1pct_fpr": "recall at 1 % false positives",
    "fpr_at_1pct_threshold": "false positives at the 1 % threshold",
}


def metric_name(metric: str) -> str:
    """What a metric is called in a figure, as plain text.

    >>> metric_name("auroc"), metric_name("average_precision")
    ('AUROC', 'average precision')
    """
    return _NAMES.get(metric, metric.replace("_", " "))


def heading_of(metric: str) -> str:
    """The same where a title begins with it."""
    name = metric_name(metric)
    return name[0].upper() + name[1:]


def texts(frame: pd.DataFrame, name: str) -> list[str]:
    """A column as texts: of "-1" and "" a CSV file makes -1.0 and a gap."""
    return [
        "" if pd.isna(value) else f"{value:.0f}" if _is_whole(value) else str(value)
        for value in column(frame, name)
    ]


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def of_metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric.

    Raises:
        InputError: There are none.
    """
    own = rows(frame, column(frame, "metric").astype(str) == metric)
    if own.empty:
        there = ", ".join(map(str, column(frame, "metric").unique())) or "none"
        raise InputError(f"the frame has no metric {metric!r}; it has: {there}")
    return own


def tidied(frame: pd.DataFrame, by: str | None) -> pd.DataFrame:
    """A frame of `lp.probe` with texts as texts and numbers as numbers, whatever it went through.

    Returns:
        Its columns, `by` (the column of that name; else empty) and `site` (what hooks of one line
        have in common).

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a place, a kind and a
            metric.
    """
    check(frame, *_TEXTS, *_NUMBERS, *([] if by is None else [by]))
    columns: dict[str, Any] = {name: texts(frame, name) for name in _TEXTS}
    columns |= {name: numbers(frame, name) for name in _NUMBERS}
    columns["by"] = [""] * len(frame) if by is None else texts(frame, by)
    in_blocks = bool((columns["layer"] >= 0).any())
    columns["site"] = [site_of(hook, in_blocks) for hook in columns["hook"]]
    table = pd.DataFrame(columns)
    twice = table.duplicated(["hook", "at", "target", "probe", "kind", "metric", "by"])
    if twice.any():
        one = table[twice].iloc[0]
        raise InputError(
            f"two rows share a place, as {one['kind']!r} of {one['hook']!r} at {one['at']!r}, "
            f"metric {one['metric']!r}: choose rows, or say with by= what tells them apart"
        )
    return table


def site_of(hook: str, in_blocks: bool) -> str:
    """All of a hook's name but the layer; arrays with names of their own have no site."""
    found = re.match(r"blocks\.\d+\.(.+)", hook)
    return found[1] if found else hook if in_blocks else ""


class Places(NamedTuple):
    """Where hooks stand on the axis of layers, and what is written there."""

    of: dict[str, int]
    names: dict[int, str]
    title: str

    def span(self) -> list[int]:
        """All places from the first to the last."""
        there = self.of.values() or [0]
        return list(range(min(there), max(there) + 1))

    def hover(self) -> str:
        """How a hover says where it is."""
        return "layer %{x}" if self.title == "layer" else "%{x}"


def places_of(table: pd.DataFrame) -> Places:
    """Blocks at their number, the embedding before them, any other hook after them by its name.

    Args:
        table: As `tidied` gives it.
    """
    known = rows(table, table["kind"].isin(["probe", "control task", "random direction"]))
    of = dict(zip(known["hook"].tolist(), known["layer"].astype(int).tolist(), strict=True))
    in_blocks = max(of.values(), default=0) >= 0
    first = "hook_embed" if in_blocks else None
    others = [hook for hook, layer in of.items() if layer < 0 and hook != first]
    end = 1 + max(of.values(), default=-1)
    of |= {hook: end + index for index, hook in enumerate(others)}
    named = [hook for hook in of if not hook.startswith("blocks.")]
    names = {of[hook]: escape(clip(hook, 24)) or "the array" for hook in named}
    return Places(of, names, "layer" if in_blocks else "activations")
