"""Figures of mixtures of experts: load, transitions, co-activation, specialisation, contrasts."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import Grid, check, column, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace
from llama_probe.plots.labels import escape
from llama_probe.plots.pca import SYMBOLS

_MOST_DOUBLINGS = 4.0  # colours do not tell 16 times from more
_FALSE_DISCOVERIES = 0.05
_FOUND, _NOT_FOUND = "#D55E00", "#9aa5b1"
# Metric -> its name in the legend and its colour.
_INFORMATION = {
    "mutual_information": ("expert and label", "#0072B2"),
    "given_token": ("expert and label, given the token", "#D55E00"),
    "by_token": ("expert and token", "#009E73"),
}


def routing_load(frame: pd.DataFrame, metric: str = "load", title: str | None = None) -> go.Figure:
    """How much more or less than its equal part each expert is used, in doublings.

    Colours show log2(load / uniform): 0 for an equal part, 1 for twice as much; at most 4 either
    way, which is also where an expert that is never used lies. The hover gives the load itself.

    Args:
        frame: `lp.routing_report(…).load`: `layer`, `expert`, `metric`, `value`, `uniform`.
        metric: "load" (share of tokens) or "weighted_load" (share of the chosen weights).
        title: The figure's title, as plain text; None: the metric.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows
            share a cell.

    >>> frame = pd.DataFrame({"layer": 0, "expert": [0, 1], "value": [0.75, 0.25]})
    >>> routing_load(frame.assign(metric="load", uniform=0.5)).data[0].z.round(2).tolist()
    [[0.5799999833106995, -1.0]]
    """
    check(frame, "layer", "expert", "metric", "value", "uniform")
    chosen = _only(frame, "metric", metric)
    cells = grid(chosen, "expert", "layer")
    name = metric.replace("_", " ")
    value = cells.numbers(chosen, "value")
    trace = _doublings(value, cells.numbers(chosen, "uniform"), cells, f"log2({name} / uniform)")
    trace.customdata = value
    trace.hovertemplate = (
        f"layer %{{y}}, expert %{{x}}<br>{name} %{{customdata:.4f}}"
        "<br>log2 to uniform %{z:.2f}<extra></extra>"
    )
    return cell_figure(trace, cells, "expert", "layer", _or(title, name.capitalize()), {})


def routing_transition(
    frame: pd.DataFrame, layer: int | None = None, title: str | None = None
) -> go.Figure:
    """Where the tokens of each expert go in the next mixture of experts.

    Args:
        frame: `lp.routing_report(…).transition`: `layer`, `next_layer`, `expert`, `next_expert`,
            `value` (a probability) and `lift` (its ratio to the next expert's load).
        layer: From which layer; None: the first.
        title: The figure's title, as plain text; None: the two layers.

    Raises:
        InputError: A column is missing, the frame is empty or has no such layer, or two rows share
            a cell.
    """
    check(frame, "layer", "next_layer", "expert", "next_expert", "value", "lift")
    chosen, layer = _of_layer(frame, layer)
    following = int(numbers(chosen, "next_layer")[0])
    cells = grid(chosen, "next_expert", "expert")
    value = cells.numbers(chosen, "value")
    trace = cell_trace(value, cells, "P(next expert | expert)", False)
    trace.update(
        zmin=0,
        zmax=float(np.nanmax(value, initial=0)) or 1,
        customdata=cells.numbers(chosen, "lift"),
    )
    trace.hovertemplate = (
        "from expert %{y} to %{x}<br>P %{z:.3f}, %{customdata:.2f} times the next one's load"
        "<extra></extra>"
    )
    title = _or(title, f"From layer {layer} to layer {following}")
    figure = cell_figure(trace, cells, "next_expert", "expert", title, {})
    figure.update_xaxes(title_text=f"expert of layer {following}")
    return figure.update_yaxes(title_text=f"expert of layer {layer}")


def routing_coactivation(
    frame: pd.DataFrame, layer: int | None = None, title: str | None = None
) -> go.Figure:
    """Which experts of a layer are chosen together, more or less than a random draw would have it.

    Colours show log2(lift / baseline), at most 4 either way.

    Args:
        frame: `lp.routing_report(…).coactivation`: `layer`, `expert`, `other`, `value` (the lift),
            `share`, `baseline`.
        layer: Which layer; None: the first.
        title: The figure's title, as plain text; None: the layer.

    Raises:
        InputError: A column is missing, the frame is empty or has no such layer, or two rows share
            a cell.
    """
    check(frame, "layer", "expert", "other", "value", "share", "baseline")
    chosen, layer = _of_layer(frame, layer)
    cells = grid(chosen, "other", "expert")
    lift = cells.numbers(chosen, "value")
    bar = "log2(lift / that of a random draw)"
    trace = _doublings(lift, cells.numbers(chosen, "baseline"), cells, bar)
    trace.customdata = np.stack((lift, cells.numbers(chosen, "share")), axis=-1)
    trace.hovertemplate = (
        "experts %{y} and %{x}<br>lift %{customdata[0]:.2f}"
        "<br>P(%{x} | %{y}) %{customdata[1]:.3f}<extra></extra>"
    )
    title = _or(title, f"Chosen together in layer {layer}")
    figure = cell_figure(trace, cells, "other", "expert", title, {})
    return figure.update_xaxes(title_text="expert")


def specialisation(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What an expert says about the label of a text, and about the token, layer by layer.

    Full markers have p of at most 0.05, in each test by itself; dotted lines are the permutations'
    mean, which is what chance gives.

    Args:
        frame: Of the analysis of the same name: `layer`, `metric`, `value`, `baseline`, `p`.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a layer and a metric.
    """
    check(frame, "layer", "metric", "value", "baseline", "p")
    if frame.duplicated(["layer", "metric"]).any():
        raise InputError("two rows share a layer and a metric: choose the rows of one analysis")
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    ordered = frame.assign(layer=numbers(frame, "layer")).sort_values("layer", kind="stable")
    found = list(dict.fromkeys(column(frame, "metric").map(str)))
    known = [metric for metric in _INFORMATION if metric in found]
    for index, metric in enumerate([*known, *(name for name in found if name not in known)]):
        name, colour = _INFORMATION.get(metric, (metric, "#CC79A7"))
        line = rows(ordered, column(ordered, "metric").map(str) == metric)
        figure.add_traces(_information(line, escape(name), colour, SYMBOLS[index % 8]))
    layers = numbers(ordered, "layer")
    figure.update_xaxes(
        title_text="layer", tick0=layers[0], dtick=max(1, -(-int(layers[-1] - layers[0]) // 16))
    )
    return figure.update_yaxes(title_text="mutual information (bits)", rangemode="tozero")


def _information(line: pd.DataFrame, name: str, colour: str, symbol: str) -> list[go.Scatter]:
    """The values of a metric, and what chance gives."""
    p = numbers(line, "p")
    layer, value, baseline = (numbers(line, name) for name in ("layer", "value", "baseline"))
    symbols = [symbol if sure else f"{symbol}-open" for sure in p <= 0.05]
    hover = "layer %{x}<br>%{y:.4f} bits"
    return [
        go.Scatter(
            x=layer, y=value, name=name, mode="lines+markers",
            line={"color": colour}, marker={"symbol": symbols, "size": 9},
            customdata=np.stack((baseline, p), axis=-1),
            hovertemplate=f"{name}<br>{hover}<br>by chance %{{customdata[0]:.4f}}, "
            "p = %{customdata[1]:.4f}<extra></extra>",
        ),
        go.Scatter(
            x=layer, y=baseline, name=f"{name}: by chance", mode="lines",
            line={"color": colour, "dash": "dot"}, showlegend=False,
            hovertemplate=f"{name}<br>{hover} by chance<extra></extra>",
        ),
    ]  # fmt: skip


def expert_contrast(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How much more each expert is used by one set of prompts, against how surely: a volcano.

    Args:
        frame: Of the analysis of the same name: `layer`, `expert`, `value`, `p`, `q`, and for the
            hover `ci_low`, `ci_high`, `stability`.
        title: The figure's title, as plain text.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share an expert.

    >>> frame = pd.DataFrame({"layer": 0, "expert": [0, 1], "value": [0.5, -0.1]})
    >>> frame = frame.assign(p=[0.001, 0.5], q=[0.002, 0.5], ci_low=-1, ci_high=1, stability=1)
    >>> [(trace.name, len(trace.x)) for trace in expert_contrast(frame).data]
    [('q of 0.05 or more', 1), ('q below 0.05', 1)]
    """
    names = ("layer", "expert", "value", "p", "q", "ci_low", "ci_high", "stability")
    check(frame, *names)
    if frame.duplicated(["layer", "expert"]).any():
        raise InputError("two rows share an expert: choose the rows of one contrast")
    values = {name: numbers(frame, name) for name in names}
    figure = go.Figure(layout={"showlegend": True, **theme.chart(title)})
    found = values["q"] < _FALSE_DISCOVERIES
    for there, name, colour, symbol in (
        (~found, "q of 0.05 or more", _NOT_FOUND, "circle-open"),
        (found, "q below 0.05", _FOUND, "diamond"),
    ):
        own = {key: column[there] for key, column in values.items()}
        figure.add_scatter(
            x=own["value"],
            y=-np.log10(own["p"]),
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 8},
            customdata=np.stack([own[key] for key in names], axis=-1),
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}"
            "<br>%{x:.3f} (%{customdata[5]:.3f} to %{customdata[6]:.3f})"
            "<br>p = %{customdata[3]:.4f}, q = %{customdata[4]:.4f}"
            "<br>in the top of %{customdata[7]:.0%} of resamples<extra></extra>",
        )
    figure.update_xaxes(title_text="difference of use (share of tokens)", zeroline=True)
    return figure.update_yaxes(title_text="-log10 p", rangemode="tozero")


def _or(title: str | None, default: str) -> str:
    return default if title is None else title


def _only(frame: pd.DataFrame, name: str, wanted: str) -> pd.DataFrame:
    chosen = rows(frame, column(frame, name) == wanted)
    if chosen.empty:
        there = ", ".join(map(str, column(frame, name).unique()))
        raise InputError(f"the frame has no {name} {wanted!r}; it has: {there}")
    return chosen


def _of_layer(frame: pd.DataFrame, layer: int | None) -> tuple[pd.DataFrame, int]:
    """The rows of a layer, and which it is."""
    layers = numbers(frame, "layer")
    wanted = int(layers.min()) if layer is None else layer
    chosen = rows(frame, layers == wanted)
    if chosen.empty:
        there = ", ".join(f"{found:.0f}" for found in np.unique(layers))
        raise InputError(f"the frame has no layer {wanted}; it has: {there}")
    return chosen, wanted


def _doublings(value: np.ndarray, unit: np.ndarray, cells: Grid, bar: str) -> Any:
    """A heat map of how often a number is doubled to come from `unit` to `value`."""
    with np.errstate(divide="ignore"):  # what is never used
        z = np.clip(np.log2(value / unit), -_MOST_DOUBLINGS, _MOST_DOUBLINGS)
    trace = cell_trace(z, cells, bar, True)
    most = max(1.0, float(np.nanmax(np.abs(z), initial=0)))
    return trace.update(zmin=-most, zmax=most)
