"""Figures of single samples under a probe: their held-out scores, and where it is most wrong."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.plots import theme
from llama_probe.plots.frames import check, column, numbers
from llama_probe.plots.labels import axis, clip, escape, visible
from llama_probe.plots.pca import SYMBOLS

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_GOLDEN = 0.618034  # steps that fill an interval evenly, however many there are
_MOST_TEXT = 110
_MOST_IN_BAR = 64


def probe_scores(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What a probe says of each sample that it did not see, by class; or against the true number.

    With two classes a sample right of 0 is said to be of the second; with more, left of 0 is wrong.
    All samples are one trace, in their order.

    Args:
        frame: One row for each sample: `label`, `score` (two classes: for the second; more: of its
            class less the best other one; numbers: the prediction), `margin` (below 0: wrong; for
            numbers less the distance to the truth), `text`, and `task` ("classes" or "number").
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or scores are no numbers.

    >>> frame = pd.DataFrame({"label": ["no", "yes"], "score": [-1.0, -0.5], "task": "classes"})
    >>> probe_scores(frame.assign(margin=[1.0, -0.5], text="")).data[0].x.tolist()
    [-1.0, -0.5]
    """
    check(frame, "label", "score", "margin", "text", "task")
    score = numbers(frame, "score")
    is_number = column(frame, "task").iloc[0] == "number"
    classes = [] if is_number else _classes(frame)
    place = (
        numbers(frame, "label")
        if is_number
        else np.array([classes.index(label) for label in column(frame, "label").map(str)])
    )
    # What a class has in common is spread out, so that samples do not hide each other.
    spread = 0 if is_number else 0.7 * (np.arange(len(frame)) * _GOLDEN % 1 - 0.5)
    points = go.Scatter(
        x=score,
        y=place + spread,
        mode="markers",
        marker=_markers(place.astype(int) if classes else np.zeros(len(frame), dtype=int)),
        text=hover_texts(frame),
        hovertemplate="%{text}<br>score %{x:.3f}<extra></extra>",
        showlegend=False,
    )
    figure = go.Figure(points, {"height": 360, **theme.chart(title)})
    if is_number:
        return _against_truth(figure, score, place)
    labels = {place: escape(clip(name, 24)) for place, name in enumerate(classes)}
    figure.update_yaxes(axis(list(labels), "label", labels, x=False))
    figure.update_yaxes(range=[-0.5, len(classes) - 0.5])
    figure.add_vline(x=0, line={"color": "#9aa5b1", "width": 1.5, "dash": "dot"})
    said = (
        f"held-out score (right of 0: says {classes[1]})"
        if len(classes) == 2
        else "score of its class less the best other one (left of 0: wrong)"
    )
    return figure.update_xaxes(title_text=escape(said))


def probe_errors(frame: pd.DataFrame, title: str | None = None, *, most: int = 12) -> go.Figure:
    """The samples that a probe gets most wrong, or nearly wrong, from top to bottom.

    Args:
        frame: As for `probe_scores`; the bars are its `margin`, turned round.
        title: The figure's title, as plain text.
        most: How many.

    Raises:
        InputError: A column is missing, or the frame is empty.
    """
    check(frame, "label", "margin", "text", "task")
    worst = worst_of(frame, most)
    places = list(range(len(worst)))
    wrong = -numbers(worst, "margin")
    figure = go.Figure(
        [
            go.Bar(
                x=wrong,
                y=places,
                orientation="h",
                marker={"color": "rgba(213, 94, 0, 0.35)"},
                text=hover_texts(worst),
                textposition="none",
                hovertemplate="%{text}<br>wrong by %{x:.3f}<extra></extra>",
            ),
            go.Scatter(
                x=left_of(wrong),
                y=places,
                mode="text",
                text=bar_texts(worst),
                textposition="middle right",
                textfont={"size": 12},
                hoverinfo="skip",
                hovertemplate="%{text}<extra></extra>",
            ),
        ],
        {"showlegend": False, "height": 110 + 21 * most, "bargap": 0.15, **theme.chart(title)},
    )
    is_number = column(frame, "task").iloc[0] == "number"
    said = "distance to the truth" if is_number else "how far on the wrong side (below 0: right)"
    figure.update_xaxes(title_text=said, zeroline=True)
    return figure.update_yaxes(
        title_text="rank, the worst on top",
        autorange="reversed",
        dtick=1,
        showticklabels=False,
        ticks="",
    )


def worst_of(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows with the lowest margin, in that order."""
    order = np.argsort(numbers(frame, "margin"), kind="stable")[:most]
    return frame.iloc[order]


def left_of(wrong: np.ndarray) -> np.ndarray:
    """Where the texts of some bars begin: where the leftmost does."""
    return np.full(len(wrong), min(0.0, *wrong.tolist()))


def bar_texts(worst: pd.DataFrame) -> list[str]:
    """What stands in the bars: the label that it should have been, and the text's beginning."""
    pairs = zip(column(worst, "label"), column(worst, "text"), strict=True)
    return [escape(clip(f"{label}: {_plain(text)}", _MOST_IN_BAR)) for label, text in pairs]


def _classes(frame: pd.DataFrame) -> list[str]:
    """The labels in their own order: numbers by size, texts by alphabet."""
    found = column(frame, "label").drop_duplicates()
    return [str(label) for label in found.sort_values()]


def _markers(place: np.ndarray) -> dict[str, Any]:
    return {
        "size": 7,
        "opacity": 0.75,
        "line": {"width": 0.5, "color": "#7b8794"},
        "color": [_COLOURS[i % len(_COLOURS)] for i in place],
        "symbol": [SYMBOLS[i % len(SYMBOLS)] for i in place],
    }


def _against_truth(figure: go.Figure, score: np.ndarray, true: np.ndarray) -> go.Figure:
    ends = [float(np.nanmin([score, true])), float(np.nanmax([score, true]))]
    figure.add_shape(
        type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1],
        line={"color": "#9aa5b1", "dash": "dot"},
    )  # fmt: skip
    return figure.update_xaxes(title_text="predicted").update_yaxes(title_text="label")


def hover_texts(frame: pd.DataFrame) -> list[str]:
    """A sample's label and the beginning of its text, in lines."""
    pairs = zip(column(frame, "label"), column(frame, "text"), strict=True)
    return [
        f"<b>{escape(clip(str(label), 40))}</b><br>"
        + "<br>".join(escape(line) for line in _wrapped(clip(_plain(text), _MOST_TEXT)))
        for label, text in pairs
    ]


def _plain(text: Any) -> str:
    """A text whose blanks stay blanks and whose other control characters can be seen."""
    text = "" if pd.isna(text) else str(text)
    return "".join(c if c == " " else visible(c) for c in text)


def _wrapped(text: str) -> list[str]:
    return [text[start : start + 60] for start in range(0, len(text), 60)] or [""]
