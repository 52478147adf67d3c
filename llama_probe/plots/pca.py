"""Figure of prompts as points: where they lie on two principal components."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, column, numbers, rows
from llama_probe.plots.labels import clip, escape, token, visible

# A kind of points is told apart by colour and by shape, a line by its markers.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "triangle-down")
# Not the last two of the template's: yellow is faint on white, ink is another one on dark pages.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_MOST_TEXT = 120


def activation_pca(
    frame: pd.DataFrame, layer: int | None = None, title: str | None = None
) -> go.Figure:
    """Prompts as points on the two first principal components of one layer.

    All points are one trace in the order of the prompts; the legend's entries are traces of their
    own.

    Args:
        frame: One row for each layer and prompt, as the analysis of the same name gives: `layer`,
            `prompt`, `text`, `pc1`, `pc2`, `explained1`, `explained2`, `label`.
        layer: Which layer; None: the last one.
        title: The figure's title, as plain text; None: the layer.

    Raises:
        InputError: A column is missing, the frame is empty or has no such layer, or two rows share
            a layer and a prompt.
    """
    check(frame, "layer", "prompt", "text", "pc1", "pc2", "explained1", "explained2", "label")
    layers = numbers(frame, "layer")
    chosen = int(layers.max()) if layer is None else layer
    points = rows(frame, layers == chosen)
    if points.empty:
        there = ", ".join(f"{found:.0f}" for found in np.unique(layers))
        raise InputError(f"the frame has no layer {chosen}; it has: {there}")
    if points.duplicated("prompt").any():
        raise InputError("two rows share a layer and a prompt: choose the rows of one site")
    points = points.assign(prompt=numbers(points, "prompt")).sort_values("prompt")
    names = ["" if pd.isna(label) else str(label) for label in points["label"]]
    looks = _looks(names)
    figure = go.Figure(
        _points(points, names, looks), theme.chart(f"Layer {chosen}" if title is None else title)
    )
    if any(names):
        figure.add_traces([_entry(name, look) for name, look in looks.items()])
    figure.update_layout(showlegend=any(names), legend={"itemclick": False})
    for side, name in ((figure.update_xaxes, "1"), (figure.update_yaxes, "2")):
        share = float(numbers(points, f"explained{name}")[0])
        side(title_text=component(name, share), zeroline=True)
    return figure.update_layout(height=460)


def component(name: str, share: float) -> str:
    """What the axis of a component is called.

    >>> component("1", 0.25)
    'component 1 (25.0&#37; of the variance)'
    """
    return escape(f"component {name} ({100 * share:.1f}% of the variance)")


def _looks(names: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and shape of each kind, in the order of their names; 56 differ, then they repeat."""
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)]}
        for i, name in enumerate(sorted(set(names)))
    }


def _points(points: pd.DataFrame, names: list[str], looks: dict[str, dict[str, Any]]) -> go.Scatter:
    marker = {key: [looks[name][key] for name in names] for key in ("color", "symbol")}
    return go.Scatter(
        x=numbers(points, "pc1"),
        y=numbers(points, "pc2"),
        mode="markers",
        marker={"size": 9, "opacity": 0.85, "line": {"width": 1, "color": "#7b8794"}, **marker},
        text=[_hover(text) for text in column(points, "text")],
        customdata=[token(name, 40) if name else "" for name in names],
        hovertemplate="%{text}<br>%{customdata}<extra></extra>",
        unselected={"marker": {"opacity": 0.2}},
        showlegend=False,
    )


def _hover(text: Any) -> str:
    """A prompt's beginning, in lines; its blanks stay blanks."""
    shown = clip("".join(c if c == " " else visible(c) for c in str(text)), _MOST_TEXT)
    lines = [shown[start : start + 60] for start in range(0, len(shown), 60)]
    return "<br>".join(map(escape, lines))


def _entry(name: str, look: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={"size": 9, **look},
        name=token(name, 40) if name else "(none)",
        hovertemplate="<extra></extra>",
    )
