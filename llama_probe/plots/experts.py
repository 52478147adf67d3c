"""Figures of single experts: a router's scores, the labels that an expert serves, what edits do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, column, numbers
from llama_probe.plots.labels import axis, escape, numbered, token


def routing_scores(
    scores: Any,
    *,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> go.Figure:
    """A router's scores: of one layer for many tokens, or of one token in many layers.

    Args:
        scores: The scores [token expert] or [layer expert], from 0 to 1.
        tokens: The texts of the tokens; they run downwards.
        layers: The layers; they run upwards.
        title: The figure's title, as plain text.

    Raises:
        InputError: Neither or both of tokens and layers are given, or not one for each row.

    >>> routing_scores([[0.75, 0.25]], tokens=[" a"]).layout.yaxis.labelalias
    {'0': '0: ·a'}
    """
    values = np.asarray(scores, dtype=np.float32)
    rows = tokens if layers is None else layers
    if (tokens is None) == (layers is None) or rows is None or len(values) != len(rows):
        raise InputError(
            f"the scores are {list(values.shape)}; give the tokens of their rows, or the layers"
        )
    experts = list(range(values.shape[1]))
    places = list(range(len(rows))) if layers is None else list(layers)
    names = {} if tokens is None else numbered(places, tokens)
    gap = theme.gap(*values.shape)
    trace = go.Heatmap(
        x=experts,
        y=places,
        z=values,
        zmin=0,
        zmax=1,
        colorscale=theme.SEQUENTIAL,
        xgap=gap,
        ygap=gap,
        colorbar={"title": {"text": "router's score (fraction)"}},
        hovertemplate="%{y}<br>expert %{x}<br>score %{z:.4f}<extra></extra>",
    )
    yaxis = axis(places, "layer" if tokens is None else "token", names, x=False)
    if tokens is not None:
        yaxis["autorange"] = "reversed"
    layout = {
        "template": theme.LIGHT,
        "height": theme.height(len(places)),
        "xaxis": axis(experts, "expert", {}, x=True),
        "yaxis": yaxis,
    }
    return go.Figure(trace, layout | theme.heading(title))


def routing_by_label(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How much an expert is used by the texts of each label, with what equal use would give.

    Args:
        frame: The rows of one layer and expert of `lp.routing_report(…).by_label`: `label`,
            `value`, `ci_low`, `ci_high`, `uniform`.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a label.
    """
    check(frame, "label", "value", "ci_low", "ci_high", "uniform")
    if frame.duplicated("label").any():
        raise InputError("two rows share a label: choose the rows of one layer and expert")
    places = list(range(len(frame)))
    value, low, high = (numbers(frame, name) for name in ("value", "ci_low", "ci_high"))
    bars = go.Bar(
        x=places,
        y=value,
        error_y={"array": high - value, "arrayminus": value - low},
        name="load",
        hovertemplate="%{x}<br>%{y:.3f}<extra></extra>",
    )
    names = {i: escape(str(label)) for i, label in enumerate(column(frame, "label"))}
    figure = go.Figure(bars, {"showlegend": False, "height": 360, **theme.chart(title)})
    uniform = float(numbers(frame, "uniform")[0])
    figure.add_hline(y=uniform, line={"dash": "dot", "color": "#9aa5b1"})
    figure.update_xaxes(axis(places, "label", names, x=True))
    most = max(1.0, float(np.nanmax(value)))
    figure.update_yaxes(title_text="load (share of tokens; dots: equal use)", range=[0, most])
    return figure


def before_after(
    frame: pd.DataFrame, title: str | None = None, *, unit: str = "value"
) -> go.Figure:
    """Two numbers of each token, plain and edited, side by side.

    Args:
        frame: One row for each token: `token` (its text), `before`, `after`.
        title: The figure's title, as plain text.
        unit: What the numbers are.

    Raises:
        InputError: A column is missing or the frame is empty.

    >>> frame = pd.DataFrame({"token": [" a"], "before": [0.5], "after": [0.25]})
    >>> [bar.name for bar in before_after(frame).data]
    ['plain', 'edited']
    """
    check(frame, "token", "before", "after")
    places = list(range(len(frame)))
    names = {i: token(text) for i, text in enumerate(column(frame, "token"))}
    shapes = {"before": ("plain", ""), "after": ("edited", "/")}
    bars = [
        go.Bar(
            x=places,
            y=numbers(frame, name),
            name=said,
            marker={"pattern": {"shape": pattern}},
            hovertemplate=f"%{{x}}<br>{said} %{{y:.4f}}<extra></extra>",
        )
        for name, (said, pattern) in shapes.items()
    ]
    layout = {"barmode": "group", "showlegend": True, "height": 340}
    figure = go.Figure(bars, layout | theme.chart(title))
    figure.update_xaxes(axis(places, "next token", names, x=True))
    return figure.update_yaxes(title_text=escape(unit), zeroline=True)
