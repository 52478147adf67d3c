"""Figures of activation patching: a map of effects, and estimates against exact effects."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import SMALL, check, column, grid, numbers
from llama_probe.plots.heatmap import cell_figure, cell_trace, token_names
from llama_probe.plots.labels import axis, escape

# Whichever of two comes first runs to the right.
_AXES = ("pos", "head", "expert", "neuron", "site", "layer")


def patch(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How much of the clean run's prediction each patch restores.

    Args:
        frame: One row for each patch, as the analysis of the same name gives: `effect` (0: nothing
            changed; 1: all of it), two of `layer`, `pos`, `head`, `expert`, `neuron` and `site`
            that vary, and if they are there `token` (the text at `pos`) for the labels and, for the
            hover, `metric` (the patched run's) or `ci_low`, `ci_high` and `n`.
        title: The figure's title, as plain text; None: the site.

    Raises:
        InputError: A column is missing, the frame is empty, not two columns can be the axes, or two
            rows share a cell.

    >>> frame = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "effect": 0.5})
    >>> patch(frame).data[0].zmid
    0
    """
    check(frame, "effect")
    x, y = _axes(frame)
    cells = grid(frame, x, y)
    trace = cell_trace(cells.numbers(frame, "effect"), cells, "effect (0: none, 1: all)", True)
    measured = ""
    if cells.size() <= SMALL and (texts := _hovers(frame)):
        trace.customdata = cells.texts(texts)
        measured = "%{customdata}"
    names = {"pos": "position"}
    trace.hovertemplate = (
        f"{names.get(x, x)} %{{x}}<br>{names.get(y, y)} %{{y}}"
        f"<br>effect %{{z:.3f}}{measured}<extra></extra>"
    )
    tokens = "token" if x == "pos" and "token" in frame else None
    if title is None and "site" in frame and column(frame, "site").nunique() == 1:
        title = f"Effect of patching {frame['site'].iloc[0]}"
    return cell_figure(trace, cells, x, y, title, token_names(frame, cells, x, tokens))


def effects(frame: pd.DataFrame, by: str = "site", title: str | None = None) -> go.Figure:
    """The effects of a few patches side by side, as bars with their intervals.

    Args:
        frame: One row for each patch: `effect`, the column `by`, and perhaps `ci_low`, `ci_high`.
        by: What tells the rows apart: "site", "head", "expert", "layer" or "pos".
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a bar.

    >>> frame = pd.DataFrame({"site": ["attn_out", "mlp_out"], "effect": [0.5, -0.1]})
    >>> effects(frame).data[0].x
    (0, 1)
    """
    check(frame, by, "effect")
    if frame.duplicated(by).any():
        raise InputError(f"two rows share a {by}: choose rows so that there is one for each")
    effect = numbers(frame, "effect")
    numeric = pd.api.types.is_numeric_dtype(frame[by])
    places = frame[by].astype(int).tolist() if numeric else list(range(len(frame)))
    names = {} if numeric else {i: escape(str(name)) for i, name in enumerate(frame[by])}
    bars = go.Bar(x=places, y=effect, hovertemplate=f"{by} %{{x}}<br>%{{y:.3f}}<extra></extra>")
    if {"ci_low", "ci_high"} <= set(frame.columns):
        low, high = numbers(frame, "ci_low"), numbers(frame, "ci_high")
        bars.error_y = {"array": high - effect, "arrayminus": effect - low}
    figure = go.Figure(bars, {"showlegend": False, "height": 320, **theme.chart(title)})
    figure.update_xaxes(axis(places, by, names, x=True))
    # A glance should tell small effects from large ones, whatever else is beside them.
    low, high = np.nanmin([0, *effect]), np.nanmax([1, *effect])
    figure.update_yaxes(title_text="effect (0: none, 1: all)", zeroline=True)
    figure.update_yaxes(range=[1.05 * low, 1.05 * high])
    return figure


def _axes(frame: pd.DataFrame) -> tuple[str, str]:
    """The two columns to lay the frame out by: those that vary, then any others."""
    present = [name for name in _AXES if name in frame and _given(frame, name).any()]
    vary = [name for name in present if column(frame, name).nunique(dropna=False) > 1]
    if len(vary) > 2:
        raise InputError(
            f"the columns {', '.join(vary)} all vary, but a heat map has two axes: "
            f"choose rows, such as frame[frame[{vary[0]!r}] == {frame[vary[0]].iloc[0]!r}]"
        )
    # A layer is what one expects on y, even if there is only one.
    still = [name for name in ("layer", *_AXES[:-1]) if name in present]
    chosen = [*vary, *(name for name in still if name not in vary)][:2]
    if len(chosen) < 2:
        has = ", ".join(map(str, frame.columns))
        raise InputError(f"the frame needs two of the columns {', '.join(_AXES)}; it has: {has}")
    first, second = sorted(chosen, key=_AXES.index)
    return first, second


def _given(frame: pd.DataFrame, name: str) -> pd.Series:
    """Where a column has a value; a CSV read with keep_default_na=False has empty texts instead."""
    return column(frame, name).notna() & (column(frame, name).astype(str) != "")


def _hovers(frame: pd.DataFrame) -> list[str]:
    """For each row its metric and its interval, as far as the frame has them."""
    texts = [""] * len(frame)
    if "metric" in frame and pd.api.types.is_numeric_dtype(frame["metric"]):
        texts = [f"<br>metric {value:.3f}" for value in numbers(frame, "metric")]
    if not {"ci_low", "ci_high", "n"} <= set(frame.columns):
        return texts if any(texts) else []
    bounds = zip(*(numbers(frame, name) for name in ("ci_low", "ci_high", "n")), strict=True)
    return [
        f" ({low:.3f} to {high:.3f}, n = {n:.0f}){text}" if low == low else text
        for text, (low, high, n) in zip(texts, bounds, strict=True)
    ]


def agreement(exact: pd.DataFrame, estimate: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Estimated effects against exact ones, a point for each patch, coloured by site.

    Args:
        exact: Of exact patching: `site`, `effect` and the cells' columns.
        estimate: The same cells, estimated.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, or no cell is in both frames.

    >>> frame = pd.DataFrame({"layer": [0, 1], "site": "z", "effect": [0.1, 0.9]})
    >>> agreement(frame, frame).data[0].mode
    'markers'
    """
    check(exact, "site", "effect")
    check(estimate, "site", "effect")
    keys = [name for name in (*_AXES, "prompt") if name in exact and name in estimate]
    both = exact.merge(estimate, on=keys, suffixes=("", "_estimate"))
    if both.empty:
        raise InputError("the two frames have no cell in common")
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    effects = [numbers(both, name) for name in ("effect", "effect_estimate")]
    low, high = (float(f(np.concatenate(effects))) for f in (np.nanmin, np.nanmax))
    for index, (site, part) in enumerate(both.groupby("site", sort=False)):
        names = [name for name in keys if name != "site" and bool(part[name].notna().all())]
        where = part[names].apply(
            lambda row: ", ".join(f"{name} {row[name]}" for name in row.index), axis=1
        )
        figure.add_scatter(
            x=numbers(part, "effect"),
            y=numbers(part, "effect_estimate"),
            mode="markers",
            name=escape(str(site)),
            marker={"size": 7, "opacity": 0.7, "symbol": index % 8},
            text=[escape(text) for text in where],
            hovertemplate="%{text}<br>exact %{x:.3f}, estimate %{y:.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", name="equal", hoverinfo="skip",
        line={"dash": "dot", "color": "#9aa5b1"},
    )  # fmt: skip
    figure.update_xaxes(title_text="exact effect", zeroline=True)
    figure.update_yaxes(title_text="estimated effect", zeroline=True)
    return figure
