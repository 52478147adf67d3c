"""Figures of what is read off the residual stream: the logit lens, direct logit attribution."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import SMALL, Grid, check, grid, numbers
from llama_probe.plots.heatmap import cell_figure, cell_trace, token_names
from llama_probe.plots.labels import axis, escape, token

_MOST_COLUMNS_WITH_TEXT = 40
_EMBED = -1  # the row below layer 0


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
    top = frame[numbers(frame["rank"]) == 0]
    if top.empty:
        raise InputError("the frame has no rows of rank 0, which hold the likeliest tokens")
    cells = grid(top, "pos", "layer")
    trace = cell_trace(cells.numbers(top["prob"]), cells, "probability (fraction)", False)
    trace.update(zmin=0, zmax=1, text=cells.texts([token(text, 9) for text in top["token"]]))
    if cells.x.span() <= _MOST_COLUMNS_WITH_TEXT:
        trace.texttemplate = "%{text}"
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


def _lists(frame: pd.DataFrame, top: pd.DataFrame) -> list[str]:
    """For each cell, its tokens and their probabilities, a line each."""
    lists: dict[tuple[float, float], list[str]] = {}
    ranked = frame.assign(rank=numbers(frame["rank"])).sort_values("rank", kind="stable")
    keys = zip(numbers(ranked["layer"]).tolist(), numbers(ranked["pos"]).tolist(), strict=True)
    rows = zip(keys, ranked["token"], numbers(ranked["prob"]), strict=True)
    for key, text, prob in rows:
        lists.setdefault(key, []).append(f"{prob:.3f}  {token(text, 24)}")
    keys = zip(numbers(top["layer"]).tolist(), numbers(top["pos"]).tolist(), strict=True)
    return ["<br>".join(lists[key]) for key in keys]


def direct_logit_attribution(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What each part of the model writes towards a logit: heads as cells, the rest as bars.

    Args:
        frame: One row for each part, as the analysis of the same name gives: `component`, `kind`
            ("embed", "head", "mlp", "bias"), `layer`, `head` (missing where there is none), `value`
            in logits.
        title: The figure's title, as plain text; None: what the parts sum to.

    Raises:
        InputError: A column is missing, the frame is empty or has no heads, a kind is unknown, or
            two rows stand for the same part.
    """
    check(frame, "component", "kind", "layer", "head", "value")
    unknown = set(frame["kind"]) - {"embed", "head", "mlp", "bias"}
    if unknown:
        raise InputError(f"kind is {min(unknown)!r}, but should be embed, head, mlp or bias")
    heads = frame[frame["kind"] == "head"]
    if heads.empty:
        raise InputError("the frame has no rows of kind 'head', so there is no heat map to draw")
    if title is None:
        total = numbers(frame["value"]).sum(dtype=np.float64)
        title = f"Direct logit attribution: the parts sum to {total:.2f} logits"

    cells = grid(heads, "head", "layer")
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.68, 0.32],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    trace = cell_trace(cells.numbers(heads["value"]), cells, "contribution (logits)", True)
    trace.hovertemplate = "layer %{y}, head %{x}<br>%{z:.3f} logits<extra></extra>"
    figure.add_trace(trace, row=1, col=1)
    bars = [_bars(frame, kind) for kind in ("mlp", "bias", "embed")]
    figure.add_traces([bar for bar in bars if bar is not None], rows=1, cols=2)
    _lay_out(figure, cells, title)
    return figure


def _bars(frame: pd.DataFrame, kind: str) -> go.Bar | None:
    """One kind's bars, a layer each; None if the frame has none."""
    rows = frame[frame["kind"] == kind]
    if rows.empty:
        return None
    layers = np.full(len(rows), _EMBED) if kind == "embed" else numbers(rows["layer"]).astype(int)
    if len(set(layers.tolist())) < len(rows):
        raise InputError(f"two rows of kind {kind!r} stand for the same part of the model")
    where = "embedding" if kind == "embed" else f"layer %{{y}} {kind}"
    return go.Bar(
        x=numbers(rows["value"]),
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
        title={"text": escape(title)},
        bargap=0.15,
        barmode="group",
        yaxis=layers,
        yaxis2={"range": layers["range"]},
        xaxis=axis(cells.x.positions, "head", cells.x.names, x=True),
        xaxis2={"title": {"text": "contribution (logits)"}, "zeroline": True},
    )
