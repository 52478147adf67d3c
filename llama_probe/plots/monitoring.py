"""Figure of a text under a monitor: each token's score, and when it was flagged."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, column, numbers
from llama_probe.plots.labels import axis, numbered

_SCORE, _RUNNING, _FLAGGED = "#56B4E9", "#0072B2", "#D55E00"


def monitor(
    frame: pd.DataFrame, threshold: int | float | None = None, title: str | None = None
) -> go.Figure:
    """Each token's score under a monitor, the score of the text so far, and what was flagged.

    Args:
        frame: As `Monitor.tokens` gives it, or `pandas.DataFrame(monitor.watch(…))`: `pos`,
            `token`, `score`, `running`, `flagged`, and perhaps `new` (whether it was generated).
        threshold: The monitor's, for its line; None: no line.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a position.

    >>> frame = pd.DataFrame({"pos": [0, 1], "token": ["a", " b"], "score": [0.5, 2.0]})
    >>> frame = frame.assign(running=[0.5, 2.0], flagged=[False, True])
    >>> [(trace.name, len(trace.x)) for trace in monitor(frame, 1.0).data]
    [('of the token', 2), ('of the text so far', 2), ('flagged', 1), ('threshold', 2)]
    """
    check(frame, "pos", "token", "score", "running", "flagged")
    if frame.duplicated("pos").any():
        raise InputError("two rows share a position: choose the rows of one text")
    pos, running = numbers(frame, "pos").astype(int), numbers(frame, "running")
    flagged = _is_true(column(frame, "flagged"))
    figure = go.Figure(layout={"showlegend": True, "height": 380, **theme.chart(title)})
    figure.add_bar(
        x=pos, y=numbers(frame, "score"), name="of the token", marker={"color": _SCORE},
        hovertemplate="%{x}<br>score %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=pos, y=running, name="of the text so far", mode="lines+markers",
        line={"color": _RUNNING, "width": 2}, marker={"size": 5},
        hovertemplate="%{x}<br>the text so far %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=pos[flagged], y=running[flagged], name="flagged", mode="markers",
        marker={"color": _FLAGGED, "symbol": "diamond", "size": 10},
        hovertemplate="%{x}<br>flagged at %{y:.3f}<extra></extra>",
    )  # fmt: skip
    ends = [float(pos.min()) - 0.5, float(pos.max()) + 0.5]
    if threshold is not None:
        figure.add_scatter(
            x=ends, y=[threshold, threshold], name="threshold", mode="lines",
            line={"color": _FLAGGED, "dash": "dash", "width": 1.5},
            hovertemplate="threshold %{y:.3f}<extra></extra>",
        )  # fmt: skip
    if "new" in frame:
        _mark_generated(figure, pos[_is_true(column(frame, "new"))], ends)
    names = numbered(pos.tolist(), column(frame, "token").tolist())
    figure.update_xaxes(axis(pos.tolist(), "position", names, x=True), range=ends)
    return figure.update_yaxes(title_text="score", zeroline=True)


def _is_true(values: pd.Series) -> np.ndarray:
    """Which are true, also of a CSV file's texts; what is missing is not."""
    return (values.astype(str) == "True").to_numpy(dtype=bool)


def _mark_generated(figure: go.Figure, new: np.ndarray, ends: list[float]) -> None:
    if not len(new):
        return
    note: dict[str, Any] = {"annotation_text": "generated", "annotation_position": "bottom left"}
    figure.add_vrect(
        x0=float(new.min()) - 0.5, x1=ends[1], line_width=0, fillcolor="rgba(154, 165, 177, 0.15)",
        layer="below", **note,
    )  # fmt: skip
