"""Figures of what is read off the residual stream: the logit lens, direct logit attribution."""

from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import SMALL, Grid, check, column, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace, token_names
from llama_probe.plots.labels import axis, clip, escape, token, visible
from llama_probe.plots.pca import SYMBOLS

_MOST_COLUMNS_WITH_TEXT = 40
_PIXELS = 700  # how wide the cells of a figure are together, on a page of usual width
_LETTER = 0.62  # how wide a letter is, in font sizes
_EMBED = -1  # the row below layer 0
# Kinds of parts that are drawn as bars; several of one layer are summed.
_BARS = ("mlp", "expert", "shared", "neuron", "rest", "bias", "embed")


class _Colour(NamedTuple):
    """What a lens is coloured by: the colour bar's title, and columns that only this needs."""

    bar: str
    needs: tuple[str, ...]


_COLOURS = {
    "prob": _Colour("probability (fraction)", ()),
    "entropy": _Colour("entropy (nats)", ("entropy",)),
    "kl": _Colour("KL to the output (nats)", ("kl",)),
    "rank": _Colour("", ("watched",)),  # it names the token
}


def logit_lens(frame: pd.DataFrame, title: str | None = None, *, colour: str = "prob") -> go.Figure:
    """What each layer would predict at each position, coloured by how sure it is.

    The hover gives the likeliest tokens on grids of up to 4096 cells, else the likeliest one.

    Args:
        frame: One row for each layer, position and rank, as the analysis of the same name gives:
            `layer`, `pos`, `rank` (0: likeliest), `token` (its text), `prob` (a fraction), and
            `input_token` (the text at that position) for the labels, if it is there. Read from CSV
            with `keep_default_na=False`, a token such as "null" stays a text.
        title: The figure's title, as plain text.
        colour: "prob" of the likeliest token; "entropy" or "kl" (nats), columns of the same
            analysis; or "rank", the place of the token for which `watched` is true, as the
            logarithm of 1 + rank: a vocabulary has many thousands of places.

    Raises:
        InputError: A column is missing, the frame is empty or has no rank 0, two rows have the same
            layer, position and rank, `colour` is unknown, or not one token is watched.
    """
    if colour not in _COLOURS:
        raise InputError(f"colour is {colour!r}, but should be one of {', '.join(_COLOURS)}")
    check(frame, "layer", "pos", "rank", "token", "prob", *_COLOURS[colour].needs)
    top = rows(frame, numbers(frame, "rank") == 0)
    if top.empty:
        raise InputError("the frame has no rows of rank 0, which hold the likeliest tokens")
    cells = grid(top, "pos", "layer")
    bar = _COLOURS[colour].bar
    if colour == "rank":
        bar, ranks = _watched_ranks(frame, top)
        z = np.log10(1 + cells.numbers(ranks, "rank"))
    else:
        z = cells.numbers(top, colour)
    trace = cell_trace(z, cells, bar, False)
    if colour == "rank":
        trace.colorscale = theme.SEQUENTIAL + "_r"  # bright where the token is near the top
    # A grid of zeros, such as the KL of a model without layers, has no range of its own.
    trace.update(zmin=0, zmax=1 if colour == "prob" else float(np.nanmax(z, initial=0)) or 1)
    _write_in_cells(trace, cells, top)
    found = "%{text} %{z:.3f}" if colour == "prob" else "%{text}"
    if cells.size() <= SMALL:
        trace.customdata = cells.texts(_lists(frame, top))
        found = "%{customdata}"
    if colour != "prob":
        found += f"<br>{escape(bar)}: %{{z:.3f}}"
    where = "after %{y} layers" if _is_between(frame) else "layer %{y}"
    trace.hovertemplate = f"position %{{x}}<br>{where}<br>{found}<extra></extra>"
    tokens = "input_token" if "input_token" in frame else None
    figure = cell_figure(
        trace, cells, "pos", "layer", title, token_names(top, cells, "pos", tokens)
    )
    figure.update_yaxes(title_text=_layers(frame))
    return figure


def token_ranks(frame: pd.DataFrame, title: str | None = None, *, value: str = "rank") -> go.Figure:
    """How far up a token stands at one position, layer by layer: a line for each watched token.

    Ranks have a logarithmic axis that runs downwards, so that the likeliest token is on top; what
    it shows is 1 + rank, as a logarithm has no 0.

    Args:
        frame: Rows of one position of `lp.logit_lens(…, watch=…)`: `layer`, `token`, `token_id`,
            `rank`, `prob`, `watched`.
        title: The figure's title, as plain text.
        value: "rank", or "prob" for the token's probability.

    Raises:
        InputError: A column is missing, no row is watched, `value` is neither of the two, or two
            rows share a token and a layer.

    >>> frame = pd.DataFrame({"layer": [0, 1], "token": "a", "token_id": 7, "rank": [9, 0]})
    >>> token_ranks(frame.assign(prob=[0.01, 0.5], watched=True)).data[0].y.tolist()
    [10.0, 1.0]
    """
    if value not in ("rank", "prob"):
        raise InputError(f"value is {value!r}, but should be rank or prob")
    check(frame, "layer", "token", "token_id", "rank", "prob", "watched")
    watched = _watched(frame)
    if watched.duplicated(["token_id", "layer"]).any():
        raise InputError(
            "two rows share a token and a layer: choose the rows of one position and site"
        )
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    where = "after %{x} layers" if _is_between(frame) else "layer %{x}"
    shown = "rank + 1 = %{y:.0f}" if value == "rank" else "probability %{y:.3f}"
    lines = watched.sort_values("layer", kind="stable").groupby("token_id", sort=False)
    for symbol, (_, line) in zip(cycle(SYMBOLS), lines, strict=False):
        name = token(line["token"].iloc[0])
        figure.add_scatter(
            x=numbers(line, "layer"),
            y=numbers(line, value) + (value == "rank"),
            mode="lines+markers",
            marker={"symbol": symbol, "size": 7},
            name=name,
            hovertemplate=f"{name}<br>{where}: {shown}<extra></extra>",
        )
    layers = sorted(set(numbers(watched, "layer").astype(int).tolist()))
    figure.update_xaxes(
        title_text=_layers(frame),
        range=[layers[0] - 0.5, layers[-1] + 0.5],
        tick0=layers[0],
        dtick=-(-len(layers) // 16),
    )
    if value == "prob":
        return figure.update_yaxes(title_text="probability (fraction)", range=[-0.03, 1.03])
    most = float(np.nanmax(numbers(watched, "rank")))
    return figure.update_yaxes(
        title_text="rank + 1 (logarithmic)",
        type="log",
        range=rank_range(most),
        dtick=1,
        exponentformat="none",
    )


def rank_range(most: float) -> list[float]:
    """The ends of an axis of ranks, best on top, as logarithms: at least one power of ten.

    Args:
        most: The largest rank.
    """
    high = max(float(np.log10(1 + most)), 1.0)
    return [1.04 * high, -0.04 * high]


def _watched(frame: pd.DataFrame) -> pd.DataFrame:
    # A CSV file with missing values gives texts.
    watched = rows(frame, column(frame, "watched").astype(str) == "True")
    if watched.empty:
        raise InputError("no row of the frame is of a watched token: use lp.logit_lens(…, watch=…)")
    return watched


def _watched_ranks(frame: pd.DataFrame, top: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What the logarithms are of, and for each likeliest token's cell the watched one's rank."""
    watched = _watched(frame)
    if watched.duplicated(["layer", "pos"]).any():
        raise InputError("several tokens are watched: leave `watched` true for one of them only")
    ranks = watched[["layer", "pos", "rank"]]
    name = clip(visible(watched["token"].iloc[0]), 16)
    cells = top.drop(columns="rank").merge(ranks, on=["layer", "pos"], how="left")
    return f"log10(1 + rank of {name})", cells


def _is_between(frame: pd.DataFrame) -> bool:
    """Whether the stream is read between layers, as many of which it has passed."""
    return "site" not in frame or bool((frame["site"] == "resid_pre").any())


def _layers(frame: pd.DataFrame) -> str:
    return "layers passed (0: embedding)" if _is_between(frame) else "layer"


def _write_in_cells(trace: go.Heatmap, cells: Grid, top: pd.DataFrame) -> None:
    """The likeliest token in each cell, as large as it fits; on hovers only if there are many.

    plotly could choose the size, but counts an escaped character as several, and is left with
    letters too small to read.
    """
    width = _PIXELS / cells.x.span()
    most = min(max(int(width / (9 * _LETTER)), 3), 10)
    # Without a probability there is no token either, as in a layer that lacks the site.
    pairs = zip(top["token"], numbers(top, "prob"), strict=True)
    texts = [clip(visible(text), most) if prob == prob else "" for text, prob in pairs]
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
