"""What the figures of refusal share: how sets look, what hovers say of an interval, bands."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.plots.frames import column, numbers
from llama_probe.plots.labels import escape
from llama_probe.plots.pca import SYMBOLS

GREY = "#7b8794"
_KNOWN = {"restricted": "#D55E00", "harmless": "#0072B2"}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
BELOW = {"x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"}
FAINT_GRID = {"showgrid": True, "gridcolor": "rgba(154, 165, 177, 0.25)"}


class Look(NamedTuple):
    """How a set is told apart: by colour, and by shape or dash."""

    colour: str
    symbol: str
    dash: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each name, in their order; restricted and harmless have the same everywhere.

    >>> looks(["twins", "harmless"])["harmless"].colour
    '#0072B2'
    """
    names = list(dict.fromkeys(names))
    others = [name for name in names if name not in _KNOWN]
    colours = _KNOWN | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return {
        name: Look(colours[name], SYMBOLS[i % len(SYMBOLS)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


def heading(title: str, said: str = "") -> dict[str, Any]:
    """The part of a layout that is the title, with what it rests on below; "": neither.

    Args:
        title: Plain text.
        said: Likewise.
    """
    if not title:
        return {"margin": {"t": 32}}
    text = {"text": escape(title), "subtitle": {"text": escape(said)}}
    return {"title": text, "margin": {"t": 84}}


def list_once(figure: go.Figure) -> None:
    """Let the legend name each thing once, whatever number of panels it is in."""
    listed: set[str] = set()
    for trace in cast(Any, figure.data):
        trace.showlegend = trace.showlegend is not False and trace.name not in listed
        listed |= {trace.name} if trace.showlegend else set()


def truths(frame: pd.DataFrame, name: str) -> np.ndarray:
    """Which are true, also of a CSV file's texts and numbers; what is missing is not."""
    return column(frame, name).astype(str).isin(["True", "1", "1.0"]).to_numpy(dtype=bool)


def said_bounds(
    frame: pd.DataFrame, low: str = "ci_low", high: str = "ci_high", n: str | None = "n"
) -> list[str]:
    """For each row what a hover says after its value: the interval, and what it rests on."""
    lows, highs = numbers(frame, low), numbers(frame, high)
    counts = numbers(frame, n) if n is not None and n in frame else np.full(len(frame), np.nan)
    texts = []
    for least, most, count in zip(lows, highs, counts, strict=True):
        parts = [f"95 &#37;: {least:.3f} to {most:.3f}"] if least == least else []
        parts += [f"n = {count:.0f}"] if count == count else []
        texts.append(f" ({', '.join(parts)})" if parts else "")
    return texts


def errors(
    frame: pd.DataFrame, value: str = "value", low: str = "ci_low", high: str = "ci_high"
) -> dict[str, Any]:
    """Error bars from the bounds of intervals."""
    at, least, most = (numbers(frame, name) for name in (value, low, high))
    return {"array": most - at, "arrayminus": at - least, "thickness": 1.4, "width": 4}


def band(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, opacity: float, **options: Any
) -> go.Scatter:
    """The area between two lines, where both are known."""
    known = np.isfinite(low) & np.isfinite(high)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return go.Scatter(
        x=np.concatenate([x[known], x[known][::-1]]),
        y=np.concatenate([low[known], high[known][::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"rgba({red}, {green}, {blue}, {opacity})",
        hoverinfo="skip",
        **options,
    )
