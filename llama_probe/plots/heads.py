"""Figure of attention summaries: one score of every head."""

import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots.frames import SMALL, check, column, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace

_UNITS = {"entropy": "nats"}


def head_scores(
    frame: pd.DataFrame, metric: str = "induction", title: str | None = None
) -> go.Figure:
    """One score of every head, as colour; weights run from 0 to 1 so that scores can be compared.

    Args:
        frame: One row for each head and metric, as the analysis of the same name gives: `layer`,
            `head`, `metric`, `value`, and `ci_low`, `ci_high`, `n` for the hover.
        metric: Which score: "entropy", "previous_token", "first_token", "duplicate_token" or
            "induction".
        title: The figure's title, as plain text; None: the metric.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows
            share a cell.
    """
    check(frame, "layer", "head", "metric", "value", "ci_low", "ci_high", "n")
    chosen = rows(frame, frame["metric"] == metric)
    if chosen.empty:
        there = ", ".join(map(str, column(frame, "metric").unique()))
        raise InputError(f"the frame has no metric {metric!r}; it has: {there}")
    cells = grid(chosen, "head", "layer")
    unit = _UNITS.get(metric, "fraction of attention")
    trace = cell_trace(cells.numbers(chosen, "value"), cells, f"{metric} ({unit})", False)
    if metric not in _UNITS:
        trace.update(zmin=0, zmax=1)
    interval = ""
    if cells.size() <= SMALL:
        trace.customdata = cells.texts(_intervals(chosen))
        interval = "%{customdata}"
    trace.hovertemplate = f"layer %{{y}}, head %{{x}}<br>%{{z:.3f}}{interval}<extra></extra>"
    title = metric.replace("_", " ").capitalize() if title is None else title
    return cell_figure(trace, cells, "head", "layer", title, {})


def _intervals(frame: pd.DataFrame) -> list[str]:
    """For each row, its interval and what it rests on; only the latter where there is none."""
    columns = (numbers(frame, name) for name in ("ci_low", "ci_high", "n"))
    return [
        f" ({low:.3f} to {high:.3f}, n = {n:.0f})" if low == low else f" (n = {n:.0f})"
        for low, high, n in zip(*columns, strict=True)
    ]
