"""Figures of rotary position embedding: how fast pairs turn, and what that does to scores."""

import math
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, grid, numbers
from llama_probe.plots.heatmap import cell_figure, cell_trace
from llama_probe.plots.labels import axis, escape

_LINE = ["layer", "head", "query", "key"]  # what one score, or one curve, is of
_SCORE = "attention score (before mask and softmax)"
_PAIR = "rotary pair (0 turns fastest)"
# Angles begin anew after a full turn, and so do these colours; red and blue, not red and green.
_CYCLIC = "twilight"


def rope_wavelengths(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How many tokens each rotary pair takes for a turn, with the context as a dashed line.

    Pairs above that line never complete a turn within the context.

    Args:
        frame: One row for each pair, as the analysis of the same name gives: `setting`, `pair`,
            `wavelength`, `context`; frames of several settings may be concatenated.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a setting and a pair.

    >>> columns = {"setting": "theirs", "pair": [0, 1], "wavelength": [6.3, 99.0], "context": 64}
    >>> [trace.name for trace in rope_wavelengths(pd.DataFrame(columns)).data]
    ['theirs', 'context: 64 tokens']
    """
    check(frame, "setting", "pair", "wavelength", "context")
    if frame.duplicated(["setting", "pair"]).any():
        raise InputError("two rows share a setting and a pair")
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    frame = frame.assign(pair=numbers(frame, "pair")).sort_values("pair")
    for place, (setting, part) in enumerate(frame.groupby("setting")):
        name = escape(str(setting))
        figure.add_scatter(
            x=numbers(part, "pair"),
            y=numbers(part, "wavelength"),
            mode="lines+markers",
            marker={"size": 5 if place else 9},  # where two agree, both are seen
            name=name,
            hovertemplate=f"{name}: pair %{{x}}<br>%{{y:.4g}} tokens a turn<extra></extra>",
        )
    pairs = sorted(set(numbers(frame, "pair").astype(int).tolist()))
    ends = [pairs[0] - 0.6, pairs[-1] + 0.6]
    for context in sorted(set(numbers(frame, "context").tolist())):
        figure.add_scatter(
            x=ends,
            y=[context, context],
            mode="lines",
            line={"dash": "dash", "color": "gray"},
            name=f"context: {context:.0f} tokens",
            hovertemplate=f"context: {context:.0f} tokens<extra></extra>",
        )
    figure.update_xaxes(axis(pairs, _PAIR, {}, x=True) | {"range": ends})
    figure.update_yaxes(
        title_text="wavelength (tokens a turn)", type="log", dtick=1, exponentformat="power"
    )
    return figure


def rope_angles(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """By which angle each rotary pair is turned at each position, in colours that are cyclic too.

    Args:
        frame: One row for each pair and position, as the analysis of the same name gives: `pair`,
            `pos`, `angle` (radians, full turns taken off).
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a pair and a
            position.

    >>> frame = pd.DataFrame({"pair": [0, 0], "pos": [0, 1], "angle": [0.0, 1.0]})
    >>> rope_angles(frame).data[0].z.tolist()
    [[0.0, 1.0]]
    """
    check(frame, "pair", "pos", "angle")
    cells = grid(frame, "pos", "pair")
    trace = cell_trace(cells.numbers(frame, "angle"), cells, "angle (radians)", False)
    quarters = {
        "tickvals": [quarter * math.pi / 2 for quarter in range(5)],
        "ticktext": ["0", "π/2", "π", "3π/2", "2π"],
    }
    trace.update(zmin=0, zmax=2 * math.pi, colorscale=_CYCLIC, colorbar=quarters)
    trace.hovertemplate = "pair %{y}, position %{x}<br>%{z:.3f} radians<extra></extra>"
    figure = cell_figure(trace, cells, "pos", "pair", title, {})
    figure.update_yaxes(title_text=_PAIR)
    return figure


def rope_contributions(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What each rotary pair adds to one score, as bars, with the most that it could add behind.

    Args:
        frame: One row for each pair, as the analysis of the same name gives: `layer`, `head`,
            `query`, `key`, `pair`, `wavelength`, `amplitude`, `value`.
        title: The figure's title, as plain text; None: what the pairs sum to.

    Raises:
        InputError: A column is missing, the frame is empty, or it holds more than one score.
    """
    check(frame, *_LINE, "pair", "wavelength", "amplitude", "value")
    if frame.duplicated("pair").any():
        raise InputError("two rows share a pair: choose the rows of one layer, head, query and key")
    frame = frame.sort_values("pair")
    pairs = numbers(frame, "pair").astype(int).tolist()
    value, amplitude = numbers(frame, "value"), numbers(frame, "amplitude")
    at_most = go.Bar(x=pairs, y=2 * amplitude, base=-amplitude, name="at its best angle")
    at_most.update(marker={"color": "rgba(128, 128, 128, 0.3)"})
    # To a hover, y is where the bar ends: at the amplitude.
    at_most.hovertemplate = "pair %{x}<br>at most ±%{y:.3f}<extra></extra>"
    share = go.Bar(x=pairs, y=value, name="in this run", customdata=numbers(frame, "wavelength"))
    share.hovertemplate = "pair %{x}, %{customdata:.4g} tokens a turn<br>%{y:.3f}<extra></extra>"
    if title is None:
        layer, head, query, key = (int(numbers(frame, name)[0]) for name in _LINE)
        where = f"L{layer} H{head}, position {query} looking at {key}"
        title = f"{where}: the pairs sum to {value.sum(dtype=float):.2f}"
    layout = {
        "barmode": "overlay",
        "xaxis": axis(pairs, _PAIR, {}, x=True),
        "yaxis": {"title": {"text": _SCORE}, "zeroline": True},
    }
    return go.Figure([at_most, share], theme.chart(title) | layout)


def rope_distance(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """A score against distance: one line for each head, query, key and setting of the frame.

    Args:
        frame: One row for each distance, as the analysis of the same name gives: `layer`, `head`,
            `query`, `key` (missing: the mean), `distance`, `value`; frames of several heads may be
            concatenated, and a column `setting` may say which RoPE a line is of. Where only
            settings differ, a line is called by its setting alone.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a line and a
            distance.
    """
    check(frame, *_LINE, "distance", "value")
    columns = [*_LINE, "distance"]
    frame = frame.assign(**{name: numbers(frame, name) for name in columns})
    frame = frame.assign(setting=frame["setting"].fillna("") if "setting" in frame else "")
    if frame.duplicated([*columns, "setting"]).any():
        raise InputError("two rows share a line (layer, head, query, key, setting) and a distance")
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    several = len(frame.drop_duplicates(_LINE)) > 1
    for line, part in frame.sort_values("distance").groupby([*_LINE, "setting"], dropna=False):
        *of, setting = cast(tuple[Any, ...], line)
        whose = _named(*of) if several or not setting else ""
        name = ", ".join(filter(None, [whose, escape(str(setting))]))
        figure.add_scatter(
            x=numbers(part, "distance"),
            y=numbers(part, "value"),
            mode="lines",
            name=name,
            hovertemplate=f"{name}<br>%{{x}} tokens apart: %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title_text="distance from query back to key (tokens)")
    figure.update_yaxes(title_text=_SCORE, zeroline=True)
    return figure


def _named(layer: float, head: float, query: float, key: float) -> str:
    """What a line is called: query and key only where they are not the mean, which is NaN."""
    of = [f", {name} {pos:.0f}" for name, pos in (("query", query), ("key", key)) if pos == pos]
    return f"L{layer:.0f} H{head:.0f}" + "".join(of)
