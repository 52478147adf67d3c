"""Figure of probes: the emergence curve, with what it is to be held against."""

from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.plots import theme
from llama_probe.plots.frames import rows
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.pca import SYMBOLS
from llama_probe.plots.probing_frames import (
    Places,
    heading_of,
    metric_name,
    of_metric,
    places_of,
    tidied,
)

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D31", "#56B4E9", "#E69F00")
# What a probe is held against -> its colour and its dash.
_AGAINST = {
    "shuffled labels": ("#7b8794", "dot"),
    "control task": ("#CC79A7", "dash"),
    "random direction": ("#E69F00", "dashdot"),
    "n-grams": ("#009E73", "8px,4px"),
    "length": ("#56B4E9", "8px,3px,2px,3px"),
}
_OF_TEXTS = ("n-grams", "length")
_CHANCE = {"auroc": 0.5, "r2": 0.0}
_CHANCE |= {"recall_at_1pct_fpr": 0.01, "fpr_at_1pct_threshold": 0.01}
_BAND = 0.16  # opacity of an interval
_BOUNDS = " (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
_FAINT, _MARK = "#9aa5b1", "#B3261E"


def probe(
    frame: pd.DataFrame,
    metric: str | None = None,
    title: str | None = None,
    *,
    by: str | None = None,
) -> go.Figure:
    """What probes read at each layer, beside what they are to be held against.

    A line with its 95 % band for each kind of probe, position and site; a panel for each target.
    Thin lines are the controls and baselines that the frame has: shuffled labels, the control task,
    the 95th percentile of random directions, n-grams, length; and chance, where it is known. The
    star is the best cell as it looks, the diamond beside it what it is worth when it is chosen on
    one half of the groups and tested on the other.

    Args:
        frame: As `lp.probe` gives it, or several of them in one.
        metric: Of `frame["metric"]`; None: AUROC, or else R², or else the first.
        title: The figure's title, as plain text; None: the metric.
        by: A further column that tells lines apart, such as the model's name.

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows share
            a place, a kind and a metric.
    """
    table = tidied(frame, by)
    metric = _usual(table) if metric is None else metric
    own, places = _drawn(table, metric), places_of(table)
    own = own.assign(place=[places.of.get(hook, 0) for hook in own["hook"]])  # texts have none
    targets = list(dict.fromkeys(own["target"]))
    names = [escape(clip(name, 40)) for name in targets] if len(targets) > 1 else None
    figure = make_subplots(
        rows=1,
        cols=len(targets),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=names,
    )
    looks, listed = _looks(own), set()
    for number, target in enumerate(targets, 1):
        panel = rows(own, own["target"] == target)
        for trace in _panel(panel, metric, looks, places):
            name = str(trace.name)
            trace.showlegend = trace.showlegend is not False and name not in listed
            listed |= {name} if trace.showlegend else set()
            figure.add_trace(trace, row=1, col=number)
        _say_why_empty(figure, panel, number)
    _lay_out(figure, own, metric, places, title)
    return figure


class _Look(NamedTuple):
    """How a line is told apart."""

    name: str
    colour: str
    symbol: str


_Key = tuple[str, ...]


def _usual(table: pd.DataFrame) -> str:
    there = list(dict.fromkeys(table["metric"]))
    return next((name for name in ("auroc", "r2") if name in there), there[0])


def _drawn(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric; what 95 % of random directions do not reach is a metric of its own."""
    own = of_metric(table, metric)
    if metric != "auroc":
        return own
    random = table["kind"] == "random direction"
    return rows(table, np.where(random, table["metric"] == "auroc_p95", table["metric"] == "auroc"))


def _main(own: pd.DataFrame) -> str:
    """The kind of row that the figure is about: selectivity is the control task's."""
    return "probe" if "probe" in set(own["kind"]) else "control task"


def _looks(own: pd.DataFrame) -> dict[_Key, _Look]:
    """How each line is told apart, named by what is not the same for all of them."""
    keys = [key for key, _ in _lines(own, _main(own))]
    varied = [len(set(parts)) > 1 for parts in zip(*keys, strict=True)]
    if not any(varied):
        varied = [False, True, False, False]  # the kind of probe
    styles = zip(cycle(_LINES), cycle(SYMBOLS), strict=False)
    return {
        key: _Look(escape(_said(key, varied)) or "probe", *style)
        for key, style in zip(keys, styles, strict=False)
    }


def _said(key: _Key, varied: list[bool]) -> str:
    words = (key[0], key[1].replace("_", " "), f"at {key[2]}", key[3])
    return ", ".join(word for word, varies in zip(words, varied, strict=True) if varies and word)


def _lines(own: pd.DataFrame, kind: str) -> Iterator[tuple[_Key, pd.DataFrame]]:
    """The lines of a kind, each from left to right."""
    of_kind = rows(own, own["kind"] == kind)
    for key, line in of_kind.groupby(["by", "probe", "at", "site"], sort=False):
        by, probe, at, site = map(str, key)  # pyright: ignore[reportArgumentType]
        yield (by, probe, at, site), line.sort_values("place", kind="stable")


def _panel(
    panel: pd.DataFrame, metric: str, looks: dict[_Key, _Look], places: Places
) -> Iterator[go.Scatter]:
    """What is drawn of one target, bands first."""
    span, shown, main = places.span(), escape(metric_name(metric)), _main(panel)
    ends = [span[0] - 0.4, span[-1] + 0.4]
    lines = dict(_lines(panel, main))
    against = {kind: list(_lines(panel, kind)) for kind in _AGAINST if kind != main}
    for key, line in lines.items():
        yield _band(line, looks[key].name, looks[key].colour, _BAND)
    if metric in _CHANCE:
        yield _flat("chance", ends, _CHANCE[metric], (_FAINT, "solid"), f"{shown} by chance")
    for kind, found in against.items():
        for _, line in found:
            if kind == "shuffled labels" and len(found) == 1:
                yield _band(line, kind, _AGAINST[kind][0], _BAND / 2)
            yield _against(line, kind, ends, shown, places)
    for key, line in lines.items():
        yield _line(line, looks[key], shown, places)
    yield from _best(panel, shown, places)


def _band(line: pd.DataFrame, name: str, colour: str, opacity: float) -> go.Scatter:
    """The interval around a line; gaps of the line are gaps of the band."""
    x, low, high = (line[name].to_numpy(dtype=float) for name in ("place", "ci_low", "ci_high"))
    known = np.isfinite(low) & np.isfinite(high)
    outline: list[tuple[float | None, float | None]] = []
    for run in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if len(run) and known[run[0]]:
            there = list(zip(x[run], low[run], strict=True))
            back = list(zip(x[run][::-1], high[run][::-1], strict=True))
            outline += [*there, *back, there[0], (None, None)]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return go.Scatter(
        x=[x for x, _ in outline],
        y=[y for _, y in outline],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"rgba({red}, {green}, {blue}, {opacity})",
        name=name,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def _line(line: pd.DataFrame, look: _Look, shown: str, places: Places) -> go.Scatter:
    where = f"{look.name}<br>{places.hover()}"
    return go.Scatter(
        x=line["place"],
        y=line["value"],
        mode="lines+markers" if places.title == "layer" else "markers",
        line={"color": look.colour, "width": 2.5},
        marker={"symbol": look.symbol, "size": 7, "color": look.colour},
        name=look.name,
        legendgroup=look.name,
        legendrank=1,
        customdata=_bounds(line),
        hovertemplate=f"{where}: {shown} %{{y:.3f}}{_BOUNDS}<extra></extra>",
    )


def _bounds(line: pd.DataFrame) -> np.ndarray:
    return line[["ci_low", "ci_high"]].to_numpy(dtype=np.float32)


def _against(
    line: pd.DataFrame, kind: str, ends: list[float], shown: str, places: Places
) -> go.Scatter:
    """A control or a baseline; those of texts are the same at all layers."""
    look = _AGAINST[kind]
    if kind in _OF_TEXTS:
        low, high = _bounds(line)[0]
        said = f"{shown} %{{y:.3f}} ({low:.3f} to {high:.3f})"
        return _flat(kind, ends, float(line["value"].iloc[0]), look, said)
    is_random = kind == "random direction"
    name = f"{kind}, 95th percentile" if is_random else kind
    of = [str(line[part].iloc[0]) for part in ("by", "probe", "at")]
    where = f"{name}<br>{escape(', '.join(part for part in of if part))}<br>{places.hover()}"
    return go.Scatter(
        x=line["place"],
        y=line["value"],
        mode="lines" if len(line) > 1 and places.title == "layer" else "markers",
        line={"color": look[0], "width": 1.5, "dash": look[1]},
        marker={"color": look[0], "symbol": "line-ew-open", "size": 14},
        name=name,
        legendgroup=name,
        customdata=_bounds(line),
        hovertemplate=f"{where}: {shown} %{{y:.3f}}{'' if is_random else _BOUNDS}<extra></extra>",
    )


def _flat(
    name: str, ends: list[float], value: float, look: tuple[str, str], said: str
) -> go.Scatter:
    """A line that is as high at all layers."""
    return go.Scatter(
        x=ends,
        y=[value, value],
        mode="lines",
        line={"color": look[0], "width": 1.5, "dash": look[1]},
        name=name,
        legendgroup=name,
        hovertemplate=f"{name}<br>{said}<extra></extra>",
    )


def _best(panel: pd.DataFrame, shown: str, places: Places) -> Iterator[go.Scatter]:
    """The best cell as it looks, and beside it what it is worth."""
    beside = min(max(0.12, 0.018 * len(places.span())), 0.45)
    for by, found in panel.groupby("by", sort=False):
        naive = rows(found, found["kind"] == "best cell")
        corrected = rows(found, found["kind"] == "best cell, corrected")
        if len(naive) != 1:
            continue
        x, cells = places.of.get(naive["hook"].iloc[0], 0), int(naive["cells"].iloc[0])
        of = f" ({by})" if by else ""
        yield _mark(x, naive, f"best of {cells} cells{of}", "star", shown)
        if bool(corrected["value"].notna().all()) and len(corrected):
            yield _mark(
                x + beside, corrected, f"chosen on one half, tested on the other{of}",
                "diamond-open", shown,
            )  # fmt: skip


def _mark(x: int | float, row: pd.DataFrame, name: str, symbol: str, shown: str) -> go.Scatter:
    value, note = row["value"].to_numpy(dtype=float), str(row["note"].iloc[0])
    low, high = _bounds(row).T
    said = "".join(f"<br>{escape(part)}" for part in note.split("; ") if part)
    name = escape(f"{name}: {value[0]:.3f}")
    return go.Scatter(
        x=[x],
        y=value,
        mode="markers",
        marker={"symbol": symbol, "size": 12, "color": _MARK, "line": {"width": 2, "color": _MARK}},
        error_y={"array": high - value, "arrayminus": value - low, "thickness": 1.2, "width": 3},
        name=name,
        legendgroup=name,
        customdata=_bounds(row),
        hovertemplate=f"{name}<br>{shown} %{{y:.3f}}{_BOUNDS}{said}<extra></extra>",
    )


def _say_why_empty(figure: go.Figure, panel: pd.DataFrame, number: int) -> None:
    """Where no value is known, the frame's reason for it."""
    main = rows(panel, panel["kind"] == _main(panel))
    if main.empty or bool(main["value"].notna().any()):
        return
    why = next((str(note) for note in main["note"] if note), "no value is known")
    figure.add_annotation(
        text="<br>".join(escape(why[at : at + 60]) for at in range(0, len(why), 60)),
        x=0.5, y=0.5, xref="x domain", yref="y domain", showarrow=False, row=1, col=number,
    )  # fmt: skip


def _lay_out(
    figure: go.Figure, own: pd.DataFrame, metric: str, places: Places, title: str | None
) -> None:
    looked = rows(own, own["kind"] == _main(own))
    cells, samples, groups = (_listed(looked[name]) for name in ("cells", "n", "groups"))
    said = f"{cells} cells looked at; {samples} held-out samples in {groups} groups; bands: 95 %"
    usual = heading_of(metric) + (" by layer" if places.title == "layer" else "")
    layout: dict[str, Any] = {
        "template": theme.LIGHT,
        "plot_bgcolor": "rgba(0,0,0,0)",
        "height": 480,
        "title": {
            "text": escape(usual if title is None else title),
            "subtitle": {"text": escape(said)},
        },
        "margin": {"t": 84 if len(set(own["target"])) == 1 else 104},
        "showlegend": True,
        "legend": {"x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom", "yref": "container"},
    }
    figure.update_layout(layout)
    span = places.span()
    ticks = axis(span, places.title, places.names, x=True)
    # plotly writes a minus sign, not a hyphen, in front of a negative number.
    ticks["labelalias"] |= {f"−{-at}": name for at, name in places.names.items() if at < 0}
    figure.update_xaxes(ticks, range=[span[0] - 0.5, span[-1] + 0.5])
    figure.update_yaxes(title_text=escape(metric_name(metric)), col=1)
    figure.update_yaxes(showgrid=True, gridcolor="rgba(154, 165, 177, 0.25)")


def _listed(values: Iterable[float]) -> str:
    known = sorted({int(value) for value in values if value == value})
    return " or ".join(f"{value:,}" for value in known) or "no"
