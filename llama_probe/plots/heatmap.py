"""The heat map that the other figures are made of."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.plots import theme
from llama_probe.plots.frames import Grid, check, grid, numbers
from llama_probe.plots.labels import axis, escape, numbered

_TITLES = {
    "pos": "position",
    "ci_low": "lower bound",
    "ci_high": "upper bound",
    "prob": "probability",
}


def heatmap(
    frame: pd.DataFrame,
    x: str = "pos",
    y: str = "layer",
    color: str = "value",
    title: str | None = None,
    *,
    unit: str | None = None,
    tokens: str | None = None,
    diverging: bool | None = None,
) -> go.Figure:
    """One column of a frame as colour, laid out by two others.

    Args:
        frame: One row for each cell; cells without a row stay empty.
        x: The column that runs to the right.
        y: The column that runs upwards.
        color: The column of numbers to show.
        title: The figure's title, as plain text.
        unit: What the numbers are in, for the colour bar ("logits", "fraction").
        tokens: The column with the text of the token at each `x`.
        diverging: Whether the numbers are effects, coloured by how far they lie from 0 and on which
            side, or amounts; None: effects if any of them is negative.

    Raises:
        InputError: A column is missing, the frame is empty, two rows share a cell, or `color` does
            not hold numbers.

    >>> frame = pd.DataFrame({"layer": [0, 0], "pos": [0, 1], "value": [0.5, -1.0]})
    >>> heatmap(frame).data[0].z.shape
    (1, 2)
    """
    check(frame, x, y, color, *([tokens] if tokens else []))
    cells = grid(frame, x, y)
    z = cells.numbers(frame, color)
    if diverging is None:
        diverging = bool((z < 0).any())
    trace = cell_trace(z, cells, color_title(color, unit), diverging)
    trace.hovertemplate = (
        f"{escape(axis_title(x))} %{{x}}<br>{escape(axis_title(y))} %{{y}}"
        f"<br>{escape(axis_title(color))} %{{z:.4g}}<extra></extra>"
    )
    return cell_figure(trace, cells, x, y, title, token_names(frame, cells, x, tokens))


def cell_trace(z: np.ndarray, cells: Grid, bar: str, diverging: bool) -> go.Heatmap:
    """The heat map of a grid, without hover text.

    Args:
        z: The numbers [y, x], float32.
        cells: Where they lie.
        bar: The colour bar's title.
        diverging: Whether colours are centred on 0.
    """
    gap = theme.gap(*z.shape)
    return go.Heatmap(
        x=cells.x.positions,
        y=cells.y.positions,
        z=z,
        colorscale=theme.DIVERGING if diverging else theme.SEQUENTIAL,
        zmid=0 if diverging else None,
        xgap=gap,
        ygap=gap,
        colorbar={"title": {"text": escape(bar)}},
    )


def cell_figure(
    trace: go.Heatmap, cells: Grid, x: str, y: str, title: str | None, names: dict[int, str]
) -> go.Figure:
    """The figure around a grid's heat map.

    Args:
        trace: The heat map.
        cells: Where its cells lie.
        x: The column that runs to the right.
        y: The column that runs upwards.
        title: The figure's title, as plain text.
        names: Labels of positions on x, ready for plotly.
    """
    names = names or cells.x.names
    layout: dict[str, Any] = {
        "template": theme.LIGHT,
        "height": theme.height(cells.y.span()),
        "xaxis": axis(cells.x.positions, axis_title(x), names, x=True),
        "yaxis": axis(cells.y.positions, axis_title(y), cells.y.names, x=False),
    }
    return go.Figure(trace, layout | theme.heading(title))


def token_names(frame: pd.DataFrame, cells: Grid, x: str, tokens: str | None) -> dict[int, str]:
    """The labels of positions from the frame's column of token texts; none without one."""
    if tokens is None or cells.x.names:
        return {}
    texts = dict(zip(numbers(frame, x).astype(int).tolist(), frame[tokens], strict=True))
    return numbered(cells.x.positions, [texts[pos] for pos in cells.x.positions])


def axis_title(column: str) -> str:
    """What an axis that shows this column is called."""
    return _TITLES.get(column, column)


def color_title(column: str, unit: str | None) -> str:
    """What a colour bar that shows this column is called."""
    return f"{axis_title(column)} ({unit})" if unit else axis_title(column)
