"""Figures of who writes a direction, of what changed between checkpoints, and of subspaces."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.probing_frames import metric_name, of_metric, texts
from llama_probe.plots.refusal_looks import (
    BELOW,
    FAINT_GRID,
    GREY,
    band,
    errors,
    heading,
    looks,
    said_bounds,
)

_KINDS = {
    "embedding": "#8C6D31", "mlp": "#0072B2", "expert": "#009E73", "shared expert": "#56B4E9",
    "attention bias": "#CC79A7", "mlp bias": "#E69F00",
}  # fmt: skip
_HALVES = {
    "halves": ("the two models, split halves", "dash"),
    "halves_a": ("the first with itself, split halves", "dot"),
    "halves_b": ("the second with itself, split halves", "dashdot"),
}


def refusal_writers(frame: pd.DataFrame, title: str | None = None, *, most: int = 20) -> go.Figure:
    """Which parts of a model write a direction: its heads as a map, the other parts as bars.

    Args:
        frame: As `llama_probe.refusal.writers.who_writes` gives it: `component layer head expert
            value ci_low ci_high n`.
        title: The figure's title, as plain text; None: what all parts sum to.
        most: How many bars, those with the largest values.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a part.

    >>> frame = pd.DataFrame({"component": ["head", "mlp"], "layer": 0, "head": [0, -1]})
    >>> frame = frame.assign(expert=-1, value=[0.5, -1], ci_low=0, ci_high=1, n=9)
    >>> [trace.type for trace in refusal_writers(frame).data]
    ['heatmap', 'bar']
    """
    check(frame, "component", "layer", "head", "expert", "value", "ci_low", "ci_high", "n")
    table = frame.assign(component=texts(frame, "component"))
    if table.duplicated(["component", "layer", "head", "expert"]).any():
        raise InputError("two rows share a part: choose the rows of one direction")
    is_head = table["component"] == "head"
    heads, others = rows(table, is_head), rows(table, ~is_head)
    parts = [(heads, _head_map), (others, lambda of: _bars(of, most))]
    parts = [(of, draw) for of, draw in parts if len(of)]
    figure = make_subplots(rows=1, cols=len(parts), horizontal_spacing=0.36)
    for number, (of, draw) in enumerate(parts, 1):
        trace, sides = draw(of)
        if trace.type == "heatmap":
            end = figure.layout["xaxis" if number == 1 else f"xaxis{number}"].domain[1]
            trace.colorbar.x = end + 0.005
        figure.add_trace(trace, row=1, col=number)
        figure.update_xaxes(sides["x"], row=1, col=number)
        figure.update_yaxes(sides["y"], row=1, col=number)
    usual = f"Who writes the direction: all parts sum to {numbers(table, 'value').sum():.3g}"
    left_out = max(len(others) - most, 0)
    said = f"{left_out} smaller parts are left out of the bars; " if left_out else ""
    n_layers = len(set(table["layer"]))
    return figure.update_layout(
        template=theme.LIGHT, showlegend=False, bargap=0.2,
        height=max(theme.height(n_layers), 140 + 24 * min(len(others), most)),
        **heading(usual if title is None else title, f"{said}bars: 95 % intervals"),
    )  # fmt: skip


def refusal_changes(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What changed between two checkpoints: the direction by layer, or the weights that write.

    A frame with `cosine` gives the cosine of the two models' directions by layer, and what split
    halves of the prompts reach, which is the most that can be expected of noisy estimates. A frame
    with `share` gives, by layer and kind of weight, the share of the weights' changes that lies
    along the direction: 1 everywhere is the mark of a direction that was edited out.

    Args:
        frame: As `direction_change` gives it (`layer cosine ci_low ci_high halves halves_a
            halves_b n`), or `weight_changes` (`layer site share change`), both in
            `llama_probe.refusal.changes` and beside it.
        title: The figure's title, as plain text; None: what it shows.

    Raises:
        InputError: A column is missing, the frame is empty, two rows share a layer, or no weight
            that writes was changed.

    >>> frame = pd.DataFrame({"layer": [0, 1], "site": "mlp", "share": [0.25, 1], "change": 0.1})
    >>> refusal_changes(frame).data[0].z.tolist()
    [[0.25], [1.0]]
    """
    if "cosine" in frame:
        return _of_directions(frame, title)
    return _of_weights(frame, title)


def refusal_subspace(
    frame: pd.DataFrame, title: str | None = None, *, metric: str | None = None
) -> go.Figure:
    """How well classes are told apart after k directions are removed, beside random ones.

    Args:
        frame: The frame of a `Subspace`: `k kind metric value ci_low ci_high n`.
        title: The figure's title, as plain text; None: the metric.
        metric: Of `frame["metric"]`: "auroc", "auroc refitted", or "share" (of a spectrum, for
            which k alone counts); None: the first.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows share
            a kind and a k.

    >>> frame = pd.DataFrame({"k": [0, 1], "kind": "logistic removed", "metric": "auroc"})
    >>> frame = frame.assign(value=[1, 0.5], ci_low=0.4, ci_high=1, n=9)
    >>> refusal_subspace(frame).data[-1].y.tolist()
    [1.0, 0.5]
    """
    check(frame, "k", "kind", "metric", "value", "ci_low", "ci_high", "n")
    metric = texts(frame, "metric")[0] if metric is None else metric
    own = of_metric(frame, metric)
    own = own.assign(kind=texts(own, "kind"), k=numbers(own, "k")).sort_values("k", kind="stable")
    if own.duplicated(["kind", "k"]).any():
        raise InputError("two rows share a kind and a k: choose the rows of one subspace")
    # What is expected of nobody's direction is grey, whatever it is called.
    kinds = sorted(set(own["kind"]), key=lambda kind: (_is_random(kind), kind))
    styles = looks(kinds)
    bands, lines = [], []
    for kind in kinds:
        line = rows(own, own["kind"] == kind)
        x, y, low, high = (numbers(line, part) for part in ("k", "value", "ci_low", "ci_high"))
        colour, dash = (
            (GREY, "dot") if _is_random(kind) else (styles[kind].colour, styles[kind].dash)
        )
        shown = escape(clip(kind, 40))
        options: dict[str, Any] = {"name": shown, "legendgroup": shown}
        bands.append(band(x, low, high, colour, 0.16, showlegend=False, **options))
        said = f"{shown}, k = %{{x}}<br>{escape(metric_name(metric))} %{{y:.3f}}%{{customdata}}"
        lines.append(
            go.Scatter(
                x=x, y=y, mode="lines+markers", customdata=said_bounds(line),
                line={"color": colour, "width": 2.5, "dash": dash},
                marker={"symbol": styles[kind].symbol, "size": 8, "color": colour},
                hovertemplate=f"{said}<extra></extra>", **options,
            )
        )  # fmt: skip
    ends = [float(numbers(own, "k").min()), float(numbers(own, "k").max())]
    chance = [_flat("chance", ends, 0.5)] if "auroc" in metric else []
    usual = f"{metric_name(metric)} after k directions are removed"
    if metric == "share":
        usual = "Share of the squared differences along direction k"
    figure = go.Figure([*bands, *chance, *lines])
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=420, showlegend=True,
        legend=BELOW, **heading(usual if title is None else title, "bands: 95 %"),
    )  # fmt: skip
    figure.update_xaxes(title_text="k (directions)", dtick=1)
    return figure.update_yaxes(title_text=escape(metric_name(metric)), **FAINT_GRID)


def _is_random(kind: str) -> bool:
    return "random" in kind or "within" in kind


def _head_map(heads: pd.DataFrame) -> tuple[Any, dict[str, Any]]:
    cells = grid(heads, "head", "layer")
    trace = cell_trace(cells.numbers(heads, "value"), cells, "written along it", True)
    trace.customdata = cells.texts(said_bounds(heads))
    trace.hovertemplate = "layer %{y}, head %{x}<br>writes %{z:.3f}%{customdata}<extra></extra>"
    x = axis(cells.x.positions, "head", cells.x.names, x=True)
    return trace, {"x": x, "y": axis(cells.y.positions, "layer", cells.y.names, x=False)}


def _bars(others: pd.DataFrame, most: int) -> tuple[Any, dict[str, Any]]:
    """The largest parts, from top to bottom."""
    value = numbers(others, "value")
    order = np.argsort(-np.abs(value), kind="stable")[:most]
    shown = others.iloc[order]
    names = [escape(name) for name in _part_names(shown)]
    places = list(range(len(shown)))
    trace = go.Bar(
        x=value[order],
        y=places,
        orientation="h",
        marker={"color": [_KINDS.get(kind, GREY) for kind in shown["component"]]},
        error_x=errors(shown),
        customdata=[f"{name}: {at:.3f}{said}" for name, at, said in zip(
            names, value[order], said_bounds(shown), strict=True)],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    y = axis(places, "part", dict(enumerate(names)), x=False) | {"autorange": "reversed"}
    y |= {"dtick": 1}
    x = {"title": {"text": "written along the direction"}, "zeroline": True}
    return trace, {"x": x, "y": y}


def _part_names(parts: pd.DataFrame) -> list[str]:
    found = []
    for kind, layer, expert in zip(
        parts["component"], numbers(parts, "layer"), numbers(parts, "expert"), strict=True
    ):
        name = clip(kind, 24) + (f" {expert:.0f}" if expert >= 0 else "")
        found.append(name + (f", layer {layer:.0f}" if layer >= 0 else ""))
    return found


def _of_directions(frame: pd.DataFrame, title: str | None) -> go.Figure:
    check(frame, "layer", "cosine", "ci_low", "ci_high", *_HALVES, "n")
    table = frame.assign(layer=numbers(frame, "layer")).sort_values("layer", kind="stable")
    if table.duplicated("layer").any():
        raise InputError("two rows share a layer: choose the rows of one site and position")
    x, y, low, high = (numbers(table, name) for name in ("layer", "cosine", "ci_low", "ci_high"))
    blue = "#0072B2"
    figure = go.Figure(band(x, low, high, blue, 0.16, name="cosine", showlegend=False))
    for name, (said, dash) in _HALVES.items():
        figure.add_scatter(
            x=x, y=numbers(table, name), mode="lines+markers", name=said,
            line={"color": GREY, "width": 1.5, "dash": dash}, marker={"size": 4},
            hovertemplate=f"{said}<br>layer %{{x}}: cosine %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=x, y=y, mode="lines+markers", name="the two models", customdata=said_bounds(table),
        line={"color": blue, "width": 2.5}, marker={"size": 8},
        hovertemplate="the two models<br>layer %{x}: cosine %{y:.3f}%{customdata}<extra></extra>",
    )  # fmt: skip
    usual, said = "How far the direction turned", "unturned: as high as split halves; band: 95 %"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=420, showlegend=True,
        legend=BELOW,
        **heading(usual if title is None else title, said),
    )  # fmt: skip
    figure.update_xaxes(title_text="layer")
    return figure.update_yaxes(title_text="cosine of the directions", **FAINT_GRID)


def _of_weights(frame: pd.DataFrame, title: str | None) -> go.Figure:
    check(frame, "layer", "site", "share", "change")
    table = pd.DataFrame({name: numbers(frame, name) for name in ("layer", "share", "change")})
    table = table.assign(site=texts(frame, "site"), layer=table["layer"].astype(int))
    table = rows(table, table["share"].notna())
    if table.empty:
        raise InputError("no weight that writes into the residual stream was changed")
    # A cell may have several weights, such as experts: their mean, with the range in the hover.
    of_cell = table.groupby(["layer", "site"], sort=False)
    means = of_cell.agg(share=("share", "mean"), change=("change", "mean")).reset_index()
    low, high, n = (of_cell["share"].agg(how).to_numpy() for how in ("min", "max", "size"))
    cells = grid(means, "site", "layer")
    trace = cell_trace(cells.numbers(means, "share"), cells, "share along the direction", False)
    trace.update(zmin=0, zmax=1)
    trace.customdata = cells.texts(
        [
            (f"<br>mean of {count} weights, {least:.3f} to {largest:.3f}" if count > 1 else "")
            + f"<br>changed by {change:.2e} of its norm"
            for count, least, largest, change in zip(n, low, high, means["change"], strict=True)
        ]
    )
    trace.hovertemplate = "%{x}, layer %{y}<br>share %{z:.4f}%{customdata}<extra></extra>"
    usual = "Share of each change that lies along the direction"
    figure = cell_figure(trace, cells, "site", "layer", usual if title is None else title, {})
    names = {-1: "outside"} if -1 in cells.y.positions else cells.y.names
    figure.update_yaxes(
        labelalias={("−" + str(-k) if k < 0 else str(k)): v for k, v in names.items()}
    )
    return figure.update_xaxes(title_text="kind of weight")


def _flat(name: str, ends: list[float], value: float) -> go.Scatter:
    return go.Scatter(
        x=ends, y=[value, value], mode="lines", name=name,
        line={"color": "#9aa5b1", "width": 1.5},
        hovertemplate=f"{name}: {value}<extra></extra>",
    )  # fmt: skip
