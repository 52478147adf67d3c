"""Figures of what is read off the residual stream: the logit lens, direct logit attribution."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import SMALL, Grid, check, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace, token_names
from llama_probe.plots.labels import axis, clip, escape, token, visible

_MOST_COLUMNS_WITH_TEXT = 40
_PIXELS = 700  # how wide the cells of a figure are together, on a page of usual width
_LETTER = 0.62  # how wide a letter is, in font sizes
_EMBED = -1  # the row below layer 0
# Kinds of parts that are drawn as bars; several of one layer are summed.
_BARS = ("mlp", "expert", "shared", "neuron", "rest", "bias", "embed")


def logit_lens(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What each layer would predict at each position, coloured by how sure it is.

    The hover gives the likeliest tokens on grids of up to 4096 cells, else the likeliest one.

    Args:
        frame: One row for each layer, position and rank, as the analysis of the same name gives:
            `layer`, `pos`, `rank` (0: likeliest), `token` (its text), `prob` (a fraction), and
            `input_token` (the text at that position) for the labels, if it is there. Read from CSV
            with `keep_default_na=False`, a token such as "null" stays a text.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty or has no rank 0, or two rows have the
            same layer, position and rank.
    """
    check(frame, "layer", "pos", "rank", "token", "prob")
    top = rows(frame, numbers(frame, "rank") == 0)
    if top.empty:
        raise InputError("the frame has no rows of rank 0, which hold the likeliest tokens")
    cells = grid(top, "pos", "layer")
    trace = cell_trace(cells.numbers(top, "prob"), cells, "probability (fraction)", False)
    trace.update(zmin=0, zmax=1)
    _write_in_cells(trace, cells, top)
    found = "%{text} %{z:.3f}"
    if cells.size() <= SMALL:
        trace.customdata = cells.texts(_lists(frame, top))
        found = "%{customdata}"
    trace.hovertemplate = f"position %{{x}}<br>after %{{y}} layers<br>{found}<extra></extra>"
    tokens = "input_token" if "input_token" in frame else None
    figure = cell_figure(
        trace, cells, "pos", "layer", title, token_names(top, cells, "pos", tokens)
    )
    figure.update_yaxes(title_text="layers passed (0: embedding)")
    return figure


def _write_in_cells(trace: go.Heatmap, cells: Grid, top: pd.DataFrame) -> None:
    """The likeliest token in each cell, as large as it fits; on hovers only if there are many.

    plotly could choose the size, but counts an escaped character as several, and is left with
    letters too small to read.
    """
    width = _PIXELS / cells.x.span()
    most = min(max(int(width / (9 * _LETTER)), 3), 10)
    texts = [clip(visible(text), most) for text in top["token"]]
    trace.text = cells.texts([escape(text) for text in texts])
    if cells.x.span() <= _MOST_COLUMNS_WITH_TEXT:
        trace.texttemplate = "%{text}"
        trace.textfont = {"size": min(int(width / (max(map(len, texts)) * _LETTER)), 11)}


def _lists(frame: pd.DataFrame, top: pd.DataFrame) -> list[str]:
    """For each cell, its tokens and their probabilities, a line each."""
    lists: dict[tuple[float, float], list[str]] = {}
    ranked = frame.assign(rank=numbers(frame, "rank")).sort_values("rank", kind="stable")
    keys = zip(numbers(ranked, "layer").tolist(), numbers(ranked, "pos").tolist(), strict=True)
    entries = zip(keys, ranked["token"], numbers(ranked, "prob"), strict=True)
    for key, text, prob in entries:
        lists.setdefault(key, []).append(f"{prob:.3f}  {token(text, 24)}")
    keys = zip(numbers(top, "layer").tolist(), numbers(top, "pos").tolist(), strict=True)
    return ["<br>".join(lists[key]) for key in keys]


def direct_logit_attribution(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What each part of the model writes towards a logit: heads as cells, the rest as bars.

    Args:
        frame: One row for each part, as the analysis of the same name gives: `component`, `kind`
            ("embed", "head", "mlp", "expert", "shared", "neuron", "rest", "bias"), `layer`, `head`
            (missing where there is none), `value` in logits.
        title: The figure's title, as plain text; None: what the parts sum to.

    Raises:
        InputError: A column is missing, the frame is empty or has no heads, a kind is unknown, or
            two rows stand for the same part.
    """
    check(frame, "component", "kind", "layer", "head", "value")
    unknown = set(frame["kind"]) - {"head", *_BARS}
    if unknown:
        raise InputError(
            f"kind is {min(unknown)!r}, but should be head, {', '.join(_BARS[:-1])} or {_BARS[-1]}"
        )
    heads = rows(frame, frame["kind"] == "head")
    if heads.empty:
        raise InputError("the frame has no rows of kind 'head', so there is no heat map to draw")
    if title is None:
        total = numbers(frame, "value").sum(dtype=np.float64)
        title = f"Direct logit attribution: the parts sum to {total:.2f} logits"

    cells = grid(heads, "head", "layer")
    # The bars stand on the left, so that the colour bar is beside the cells that it explains.
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.3, 0.7],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    trace = cell_trace(cells.numbers(heads, "value"), cells, "contribution (logits)", True)
    trace.hovertemplate = "layer %{y}, head %{x}<br>%{z:.3f} logits<extra></extra>"
    figure.add_trace(trace, row=1, col=2)
    bars = [_bars(frame, kind) for kind in _BARS]
    figure.add_traces([bar for bar in bars if bar is not None], rows=1, cols=1)
    _lay_out(figure, cells, title)
    return figure


def _bars(frame: pd.DataFrame, kind: str) -> go.Bar | None:
    """One kind's bars, its sum in each layer; None if the frame has none."""
    part = rows(frame, frame["kind"] == kind)
    if part.empty:
        return None
    if part.duplicated(["layer", "component"]).any():
        raise InputError(f"two rows of kind {kind!r} stand for the same part of the model")
    at = np.full(len(part), _EMBED) if kind == "embed" else numbers(part, "layer").astype(int)
    layers, row = np.unique(at, return_inverse=True)
    sums = np.bincount(row, weights=numbers(part, "value")).astype(np.float32)
    where = "embedding" if kind == "embed" else f"layer %{{y}} {kind}"
    return go.Bar(
        x=sums,
        y=layers,
        orientation="h",
        name=kind,
        hovertemplate=f"{where}<br>%{{x:.3f}} logits<extra></extra>",
    )


def _lay_out(figure: go.Figure, cells: Grid, title: str) -> None:
    """Axes of the attribution's two panels, and one row below layer 0 for the embedding."""
    # plotly writes a minus sign, not a hyphen, in front of a negative number.
    names = {_EMBED: "embed", **cells.y.names}
    layers = axis(cells.y.positions, "layer", names, x=False)
    layers["labelalias"]["−1"] = "embed"
    layers["range"] = [_EMBED - 0.6, cells.y.positions[-1] + 0.5]
    figure.update_layout(
        template=theme.LIGHT,
        height=theme.height(cells.y.span() + 1),
        bargap=0.15,
        barmode="relative",
        yaxis=layers,
        yaxis2={**layers, "title": None, "ticks": ""},
        xaxis={"title": {"text": "contribution (logits)"}, "zeroline": True},
        xaxis2=axis(cells.x.positions, "head", cells.x.names, x=True),
        **theme.heading(title),
    )
