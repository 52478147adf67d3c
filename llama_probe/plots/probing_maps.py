"""Figures of probes as maps: layer by position, and training set by test set."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, grid, numbers, rows
from llama_probe.plots.heatmap import cell_figure, cell_trace
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.probing_frames import heading_of, metric_name, of_metric, texts

_AROUND_HALF = ("auroc", "balanced_accuracy", "accuracy")


def probe_grid(frame: pd.DataFrame, metric: str = "auroc", title: str | None = None) -> go.Figure:
    """What a probe reads at each layer and position.

    Args:
        frame: As `lp.probe` gives it, of one target, one kind of probe and one site.
        metric: Of `frame["metric"]`.
        title: The figure's title, as plain text; None: the metric.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows share
            a layer and a position.

    >>> frame = pd.DataFrame({"layer": [0, 1], "at": "-1", "kind": "probe", "metric": "auroc"})
    >>> probe_grid(frame.assign(value=[0.5, 1], ci_low=0, ci_high=1, n=9)).data[0].z.tolist()
    [[0.5], [1.0]]
    """
    check(frame, "layer", "at", "kind", "metric", "value", "ci_low", "ci_high", "n")
    probes = rows(frame, np.array(texts(frame, "kind")) == "probe")
    own = of_metric(probes, metric)
    own = own.assign(at=texts(own, "at"))
    cells = grid(own, "at", "layer")
    trace = cell_trace(cells.numbers(own, "value"), cells, metric_name(metric), False)
    trace.update(_colours(metric))
    trace.customdata = cells.texts(_intervals(own))
    trace.hovertemplate = (
        f"position %{{x}}<br>layer %{{y}}<br>{escape(metric_name(metric))} %{{z:.3f}}"
        "%{customdata}<extra></extra>"
    )
    title = f"{heading_of(metric)} by layer and position" if title is None else title
    asked = list(dict.fromkeys(own["at"]))
    by_number = all(at.lstrip("-").isdigit() for at in asked)
    named = {} if by_number else {x: escape(clip(at, 28)) for x, at in enumerate(asked)}
    figure = cell_figure(trace, cells, "at", "layer", title, named)
    return figure.update_xaxes(title_text="position")


def transfer(
    frame: pd.DataFrame,
    metric: str = "auroc",
    layer: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """What a probe of each data set (a row) says on each data set (a column).

    Blue below 0.5 is worse than chance: there the labels are read the wrong way round.

    Args:
        frame: As `lp.transfer` gives it: `train`, `test`, `hook`, `layer`, `at`, `metric`, `value`,
            `ci_low`, `ci_high`, `n`.
        metric: Of `frame["metric"]`.
        layer: Which layer; None: the one with the best mean on the diagonal, where sets are tested
            on themselves.
        title: The figure's title, as plain text; None: the metric and the layer.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric or layer, or two
            rows share a pair.

    >>> frame = pd.DataFrame({"train": ["a", "a"], "test": ["a", "b"], "value": [0.9, 0.1]})
    >>> frame = frame.assign(hook="x", layer=3, at="-1", metric="auroc", ci_low=0, ci_high=1, n=9)
    >>> transfer(frame).data[0].text
    (['0.90', '0.10'],)
    """
    names = ("train", "test", "hook", "layer", "at", "metric", "value", "ci_low", "ci_high", "n")
    check(frame, *names)
    own = of_metric(frame, metric)
    own = own.assign(train=texts(own, "train"), test=texts(own, "test"))
    own, layer = _of_layer(own, layer)
    if own.duplicated(["train", "test"]).any():
        raise InputError(
            "two rows share a training set and a test set: choose the rows of one position, one "
            "site and one kind of probe"
        )
    sides = {side: list(dict.fromkeys(own[side])) for side in ("train", "test")}
    # The same order on both sides, so that the diagonal is one.
    sides["test"].sort(key=lambda name: _place(sides["train"], name))
    z, hovers = _matrix(own, sides)
    written = [["" if np.isnan(value) else f"{value:.2f}" for value in line] for line in z]
    figure = go.Figure(
        go.Heatmap(
            x=list(range(z.shape[1])),
            y=list(range(z.shape[0])),
            z=z,
            text=written,
            texttemplate="%{text}",
            textfont={"size": 14},
            customdata=hovers,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": escape(metric_name(metric))}},
            hovertemplate="trained on %{y}<br>tested on %{x}"
            f"<br>{escape(metric_name(metric))} %{{z:.3f}}%{{customdata}}<extra></extra>",
            **_colours(metric),
        )
    )
    if title is None:
        title = heading_of(metric) + (f", layer {layer}" if layer is not None else "")
    figure.update_layout(
        template=theme.LIGHT, height=min(180 + 56 * len(z), 860), **theme.heading(title)
    )
    for side, update in (("test", figure.update_xaxes), ("train", figure.update_yaxes)):
        labels = {place: escape(clip(name, 28)) for place, name in enumerate(sides[side])}
        said = {"test": "tested on", "train": "trained on"}[side]
        update(axis(list(labels), said, labels, x=side == "test"))
    return figure.update_yaxes(autorange="reversed")


def _place(names: list[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _matrix(own: pd.DataFrame, sides: dict[str, list[str]]) -> tuple[np.ndarray, list[list[str]]]:
    """Values and the rest of their hovers, [train test]."""
    shape = len(sides["train"]), len(sides["test"])
    z = np.full(shape, np.nan, dtype=np.float32)
    hovers = [[""] * shape[1] for _ in range(shape[0])]
    values = zip(own["train"], own["test"], numbers(own, "value"), _intervals(own), strict=True)
    for train, test, value, interval in values:
        row, col = sides["train"].index(train), sides["test"].index(test)
        z[row, col], hovers[row][col] = value, interval
    return z, hovers


def _of_layer(own: pd.DataFrame, layer: int | None) -> tuple[pd.DataFrame, int | None]:
    """The rows of a layer, and which it is; None if it is outside of blocks."""
    layers = numbers(own, "layer").astype(int)
    if layer is None:
        value = np.where(own["train"] == own["test"], numbers(own, "value"), np.nan)
        found = np.unique(layers[~np.isnan(value)])
        means = [float(np.nanmean(value[layers == one])) for one in found]
        layer = int(found[np.argmax(means)]) if len(found) else int(layers[0])
    chosen = rows(own, layers == layer)
    if chosen.empty:
        there = ", ".join(map(str, np.unique(layers)))
        raise InputError(f"the frame has no layer {layer}; it has: {there}")
    return chosen, layer if layer >= 0 else None


def _colours(metric: str) -> dict[str, Any]:
    """Around one half what is worse than a coin is blue; other metrics from 0 up."""
    if metric in _AROUND_HALF:
        return {"colorscale": theme.DIVERGING, "zmin": 0, "zmax": 1, "zmid": 0.5}
    return {"colorscale": theme.SEQUENTIAL}


def _intervals(own: pd.DataFrame) -> list[str]:
    """For each row what a hover says after the value."""
    bounds = zip(*(numbers(own, name) for name in ("ci_low", "ci_high", "n")), strict=True)
    notes = texts(own, "note") if "note" in own else [""] * len(own)
    return [
        (f" ({low:.3f} to {high:.3f}, n = {n:.0f})" if low == low else "")
        + (f"<br>{escape(note)}" if note else "")
        for (low, high, n), note in zip(bounds, notes, strict=True)
    ]
