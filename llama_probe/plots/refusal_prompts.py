"""Figures of single requests: where they lie on the refusal direction, and on that of harm."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, numbers
from llama_probe.plots.held_out import hover_texts
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.probing_frames import texts
from llama_probe.plots.refusal_looks import BELOW, FAINT_GRID, GREY, Look, heading, looks, truths

_BINS = 30
_TALL = 0.8  # of the room between two sets
_SCALED = "−1, +1: mean of harmless, restricted requests that it was fitted on"


def refusal_projections(
    frame: pd.DataFrame, title: str | None = None, *, column: str | None = None
) -> go.Figure:
    """Where the requests of each set lie on the refusal direction: a histogram each.

    The bins are the same for all sets, and the tallest bar of each set is as high. A diamond is the
    set's mean, with a 95 % interval (mean and 1.96 standard errors to both sides).

    Args:
        frame: One row for each request: `set`, and the projection; such as
            `llama_probe.refusal.projections` gives it.
        title: The figure's title, as plain text; None: what it shows.
        column: Which column is drawn; None: "value", or where there is none, "refusal".

    Raises:
        InputError: A column is missing, the frame is empty, or a set has no finite value.

    >>> frame = pd.DataFrame({"set": ["restricted"] * 2 + ["harmless"], "value": [1, 2, -1]})
    >>> [(trace.name, trace.type) for trace in refusal_projections(frame).data[:2]]
    [('restricted', 'bar'), ('restricted', 'scatter')]
    """
    if column is None:
        column = "value" if "value" in frame else "refusal"
    check(frame, "set", column)
    values = numbers(frame, column)
    sets = texts(frame, "set")
    styles = looks(sets)
    known = np.isfinite(values)
    of = {name: values[known & [own == name for own in sets]] for name in styles}
    if empty := [name for name, own in of.items() if not len(own)]:
        raise InputError(f"set {empty[0]!r} has no finite number in column {column!r}")
    edges = np.histogram_bin_edges(np.concatenate(list(of.values())), _BINS)
    figure = go.Figure()
    # The first set on top, as it is read.
    places = {name: len(of) - 1 - i for i, name in enumerate(of)}
    for name, own in of.items():
        figure.add_traces(_ridge(name, own, edges, places[name], styles[name]))
    usual = "Projections on the refusal direction"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", barmode="overlay", bargap=0,
        showlegend=False, height=180 + 90 * len(of),
        **heading(usual if title is None else title, "diamonds: means, with 95 % intervals"),
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": "#9aa5b1", "width": 1.5, "dash": "dot"})
    said = "projection on the direction"
    figure.update_xaxes(title_text=said if column == "value" else f"{said} (fit means at −1, +1)")
    labels = {place: _named(name, of[name]) for name, place in places.items()}
    figure.update_yaxes(axis(sorted(labels), "set", labels, x=False))
    return figure.update_yaxes(range=[-0.3, len(of) - 0.1])


def refusal_plane(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Each request by what the model makes of it: how harmful, and how far towards a refusal.

    Harmfulness is read at the last token of the instruction, refusal after it, where the answer
    begins (Zhao et al. 2025, arXiv 2507.11878: models tell the two apart, and an attack may change
    one and leave the other). Corners have the number of requests in their quarter. All requests are
    one trace, in their order; where it is known what became of them, those answered are hollow.

    Args:
        frame: One row for each request: `set harmfulness refusal`, and perhaps `prompt` (its text)
            and `declined`; as `llama_probe.refusal.projections` gives it.
        title: The figure's title, as plain text; None: what it shows.

    Raises:
        InputError: A column is missing, or the frame is empty.

    >>> frame = pd.DataFrame({"set": ["a", "b"], "harmfulness": [1, -1], "refusal": [0.5, -2]})
    >>> [note.text for note in refusal_plane(frame).layout.annotations]
    ['harmful, refusing: 1', 'harmless, refusing: 0', 'harmful, complying: 0', \
'harmless, complying: 1']
    """
    check(frame, "set", "harmfulness", "refusal")
    sets = texts(frame, "set")
    styles = looks(sets)
    known = "declined" in frame
    declined = truths(frame, "declined") if known else np.ones(len(frame), dtype=bool)
    x, y = numbers(frame, "harmfulness"), numbers(frame, "refusal")
    ends = ["declined" if one else "answered" for one in declined] if known else [""] * len(frame)
    labelled = pd.DataFrame(
        {
            "label": [f"{name}, {end}".rstrip(", ") for name, end in zip(sets, ends, strict=True)],
            "text": texts(frame, "prompt") if "prompt" in frame else "",
        }
    )
    points = go.Scatter(
        x=x,
        y=y,
        mode="markers",
        marker={
            "color": [styles[name].colour for name in sets],
            "symbol": [
                styles[name].symbol + ("" if end else "-open")
                for name, end in zip(sets, declined, strict=True)
            ],
            "size": 8,
            "opacity": 0.8,
            "line": {"width": 1.2},
        },
        text=hover_texts(labelled),
        hovertemplate="%{text}<br>harmfulness %{x:.2f}, refusal %{y:.2f}<extra></extra>",
        showlegend=False,
    )
    figure = go.Figure([points, *_entries(styles, known)])
    usual = "Harmfulness and refusal"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=480, showlegend=True,
        legend={**BELOW, "itemclick": False},
        **heading(usual if title is None else title, _SCALED),
    )  # fmt: skip
    _quarter(figure, x, y)
    figure.update_xaxes(title_text="harmfulness (at the end of the instruction)", **FAINT_GRID)
    return figure.update_yaxes(title_text="refusal (where the answer begins)", **FAINT_GRID)


def _named(name: str, own: np.ndarray) -> str:
    above = escape(f"{(own > 0).mean():.0%} of {len(own)} above 0")
    return f"{escape(clip(name, 24))}<br>{above}"


def _ridge(
    name: str, own: np.ndarray, edges: np.ndarray, place: int, look: Look
) -> list[go.Bar | go.Scatter]:
    """A set's histogram, standing on its line, and its mean."""
    counts, _ = np.histogram(own, edges)
    shown = escape(clip(name, 40))
    bars = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=_TALL * counts / counts.max(),
        base=[place] * len(counts),
        width=np.diff(edges),
        marker={"color": look.colour, "opacity": 0.55, "line": {"width": 1, "color": look.colour}},
        name=shown,
        customdata=[
            f"{count} of {len(own)} from {low:.2f} to {high:.2f}"
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ],
        hovertemplate=f"{shown}<br>%{{customdata}}<extra></extra>",
    )
    mean, error = float(own.mean()), float("nan")
    if len(own) > 1:
        error = 1.96 * float(own.std(ddof=1)) / len(own) ** 0.5
    bounds = f" (95 &#37;: {mean - error:.3f} to {mean + error:.3f})" if error == error else ""
    centre = go.Scatter(
        x=[mean],
        y=[place],
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": look.colour},
        error_x={"array": [error], "thickness": 1.4, "width": 5, "color": look.colour},
        name=shown,
        hovertemplate=f"{shown}<br>mean {mean:.3f}{bounds}, n = {len(own)}<extra></extra>",
    )
    return [bars, centre]


def _entries(styles: dict[str, Look], known: bool) -> list[go.Scatter]:
    """The legend: the sets, and what hollow means."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        (name, {"color": look.colour, "symbol": look.symbol}) for name, look in styles.items()
    ]
    if known:
        kinds += [
            (end, {"color": GREY, "symbol": symbol, "line": {"width": 1.2}})
            for end, symbol in (("declined", "circle"), ("answered", "circle-open"))
        ]
    return [
        go.Scatter(
            x=[None], y=[None], mode="markers", marker={"size": 9, **marker},
            name=escape(clip(name, 40)), hoverinfo="skip",
        )
        for name, marker in kinds
    ]  # fmt: skip


def _quarter(figure: go.Figure, x: np.ndarray, y: np.ndarray) -> None:
    """Lines at 0, and how many lie in each quarter."""
    line = {"color": "#9aa5b1", "width": 1.5, "dash": "dot"}
    figure.add_vline(x=0, line=line).add_hline(y=0, line=line)
    for up, does in ((True, "refusing"), (False, "complying")):
        for right, what in ((True, "harmful"), (False, "harmless")):
            n = int((((x > 0) == right) & ((y > 0) == up) & np.isfinite(x) & np.isfinite(y)).sum())
            figure.add_annotation(
                text=f"{what}, {does}: {n}", showarrow=False, font={"size": 12},
                x=float(right), y=float(up), xref="x domain", yref="y domain",
                xanchor="right" if right else "left", yanchor="top" if up else "bottom",
            )  # fmt: skip
