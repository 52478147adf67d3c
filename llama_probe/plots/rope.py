"""Figures of rotary position embedding: a score by frequency, and a score against distance."""

from typing import cast

import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, numbers
from llama_probe.plots.labels import axis

_LINE = ["layer", "head", "query", "key"]  # what one score, or one curve, is of
_SCORE = "attention score (before mask and softmax)"


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
    at_most.update(marker={"color": "rgba(128, 128, 128, 0.3)"}, customdata=amplitude)
    at_most.hovertemplate = "pair %{x}<br>at most ±%{customdata:.3f}<extra></extra>"
    share = go.Bar(x=pairs, y=value, name="in this run", customdata=numbers(frame, "wavelength"))
    share.hovertemplate = "pair %{x}, %{customdata:.4g} tokens a turn<br>%{y:.3f}<extra></extra>"
    if title is None:
        layer, head, query, key = (int(numbers(frame, name)[0]) for name in _LINE)
        where = f"L{layer} H{head}, position {query} looking at {key}"
        title = f"{where}: the pairs sum to {value.sum(dtype=float):.2f}"
    layout = {
        "barmode": "overlay",
        "xaxis": axis(pairs, "rotary pair (0 turns fastest)", {}, x=True),
        "yaxis": {"title": {"text": _SCORE}, "zeroline": True},
    }
    return go.Figure([at_most, share], theme.chart(title) | layout)


def rope_distance(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """A score against distance: one line for each head, query and key of the frame.

    Args:
        frame: One row for each distance, as the analysis of the same name gives: `layer`, `head`,
            `query`, `key` (missing: the mean), `distance`, `value`; frames of several heads may be
            concatenated.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a line and a
            distance.
    """
    check(frame, *_LINE, "distance", "value")
    columns = [*_LINE, "distance"]
    frame = frame.assign(**{name: numbers(frame, name) for name in columns})
    if frame.duplicated(columns).any():
        raise InputError("two rows share a line (layer, head, query, key) and a distance")
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    lines = frame.sort_values("distance").groupby(_LINE, dropna=False)
    for line, part in lines:
        name = _named(*cast(tuple[float, float, float, float], line))
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
