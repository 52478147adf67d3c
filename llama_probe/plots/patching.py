"""The figure of activation patching."""

import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots.frames import SMALL, check, column, grid
from llama_probe.plots.heatmap import cell_figure, cell_trace, token_names

# Whichever of two comes first runs to the right.
_AXES = ("pos", "head", "site", "layer")


def patch(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How much of the clean run's prediction each patch restores.

    Args:
        frame: One row for each patch, as the analysis of the same name gives: `effect` (0: nothing
            changed; 1: all restored), two of `layer`, `pos`, `head` and `site` that vary, `token`
            (the text at `pos`) for the labels and `metric` (the patched run's) for the hover, if
            they are there.
        title: The figure's title, as plain text; None: the site.

    Raises:
        InputError: A column is missing, the frame is empty, not two columns can be the axes, or two
            rows share a cell.

    >>> frame = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "effect": 0.5})
    >>> patch(frame).data[0].zmid
    0
    """
    check(frame, "effect")
    x, y = _axes(frame)
    cells = grid(frame, x, y)
    trace = cell_trace(
        cells.numbers(frame, "effect"), cells, "effect (0: corrupted, 1: clean)", True
    )
    measured = ""
    if _has_metric(frame) and cells.size() <= SMALL:
        trace.customdata = cells.numbers(frame, "metric")
        measured = "<br>metric %{customdata:.3f}"
    names = {"pos": "position"}
    trace.hovertemplate = (
        f"{names.get(x, x)} %{{x}}<br>{names.get(y, y)} %{{y}}"
        f"<br>effect %{{z:.3f}}{measured}<extra></extra>"
    )
    tokens = "token" if x == "pos" and "token" in frame else None
    if title is None and "site" in frame and column(frame, "site").nunique() == 1:
        title = f"Effect of patching {frame['site'].iloc[0]}"
    return cell_figure(trace, cells, x, y, title, token_names(frame, cells, x, tokens))


def _axes(frame: pd.DataFrame) -> tuple[str, str]:
    """The two columns to lay the frame out by: those that vary, then any others."""
    present = [name for name in _AXES if name in frame and _given(frame, name).any()]
    vary = [name for name in present if column(frame, name).nunique(dropna=False) > 1]
    if len(vary) > 2:
        raise InputError(
            f"the columns {', '.join(vary)} all vary, but a heat map has two axes: "
            f"choose rows, such as frame[frame[{vary[0]!r}] == {frame[vary[0]].iloc[0]!r}]"
        )
    # A layer is what one expects on y, even if there is only one.
    still = [name for name in ("layer", "pos", "head", "site") if name in present]
    chosen = [*vary, *(name for name in still if name not in vary)][:2]
    if len(chosen) < 2:
        has = ", ".join(map(str, frame.columns))
        raise InputError(
            f"the frame needs two of the columns layer, pos, head and site; it has: {has}"
        )
    first, second = sorted(chosen, key=_AXES.index)
    return first, second


def _given(frame: pd.DataFrame, name: str) -> pd.Series:
    """Where a column has a value; a CSV read with keep_default_na=False has empty texts instead."""
    return column(frame, name).notna() & (column(frame, name).astype(str) != "")


def _has_metric(frame: pd.DataFrame) -> bool:
    return "metric" in frame and pd.api.types.is_numeric_dtype(frame["metric"])
