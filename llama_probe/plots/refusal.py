"""Figures of a refusal study's beginning: does the model refuse, and which candidate is it?"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import Grid, check, grid, numbers, rows
from llama_probe.plots.heatmap import cell_trace
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.probing_frames import of_metric, texts
from llama_probe.plots.refusal_looks import (
    BELOW,
    FAINT_GRID,
    errors,
    heading,
    looks,
    said_bounds,
    truths,
)

_INK, _YELLOW = "#1f2933", "#F0E442"
_DIMMED = 0.35  # opacity of candidates that are dropped
_LEAST_KL = 1e-4  # nats; less is drawn as this


class _Panel(NamedTuple):
    """One of the three scores."""

    column: str
    title: str


_PANELS = (
    _Panel("refusal_score", "Restricted requests, ablated"),
    _Panel("steering_score", "Harmless requests, added"),
    _Panel("kl_div_score", "Harmless requests, ablated"),
)


def refusal(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """The three scores by which a refusal direction is chosen, of each candidate.

    From left to right: the refusal score of restricted requests without the direction (blue: they
    are no longer declined), that of harmless ones with it (red: they are declined), and what taking
    it out costs on harmless ones, on a logarithmic scale. Candidates that are dropped are dimmed,
    with the reason in the hover; those that pass are ringed; a star marks the chosen one.

    Args:
        frame: `candidates` of a `RefusalStudy`: `position layer refusal_score steering_score
            kl_div_score dropped chosen`, and perhaps `norm`.
        title: The figure's title, as plain text; None: how many candidates there are, and pass.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a position and layer.

    >>> frame = pd.DataFrame({"position": [-2, -1], "layer": 0, "refusal_score": [1.0, -2.0]})
    >>> frame = frame.assign(steering_score=1.0, kl_div_score=[0.5, 0.05])
    >>> figure = refusal(frame.assign(dropped=["KL", ""], chosen=[False, True]))
    >>> figure.layout.title.text, figure.data[0].z.tolist()
    ('2 candidates for the refusal direction, 1 passes', [[1.0, -2.0]])
    """
    names = ("position", "layer", *(panel.column for panel in _PANELS), "dropped", "chosen")
    check(frame, *names)
    table = frame.assign(position=numbers(frame, "position").astype(int))
    table = table.assign(dropped=texts(table, "dropped"), chosen=truths(table, "chosen"))
    laid = grid(table, "position", "layer")
    places = sorted(set(table["position"]))
    # By rank, so that a position is a cell's number, as a selection counts them.
    side = laid.x._replace(positions=list(range(len(places))), names={})
    cells = Grid(side, laid.y)
    figure = make_subplots(
        rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.12,
        subplot_titles=[panel.title for panel in _PANELS],
    )  # fmt: skip
    for number, panel in enumerate(_PANELS, 1):
        for trace in _maps(table, cells, panel, figure, number):
            figure.add_trace(trace, row=1, col=number)
        for trace in _marks(table, cells, listed=number == 1):
            figure.add_trace(trace, row=1, col=number)
    passing = list(table["dropped"]).count("")
    usual = f"{_counted(len(table), 'candidate')} for the refusal direction, {_passes(passing)}"
    _lay_out(figure, cells, {i: _minus(place) for i, place in enumerate(places)})
    return figure.update_layout(heading(usual if title is None else title))


def refusal_guard(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """How often a model declines restricted and harmless requests, by each judge.

    Args:
        frame: `guard.frame` of a `RefusalStudy`: `judge set metric value ci_low ci_high n`.
        title: The figure's title, as plain text; None: what it shows.

    Raises:
        InputError: A column is missing, the frame is empty, or two rows share a judge and a set.

    >>> frame = pd.DataFrame({"set": ["restricted", "harmless"], "value": [1, 0]})
    >>> frame = frame.assign(judge="phrase", metric="declined", ci_low=0, ci_high=1, n=40)
    >>> [(trace.name, trace.y.tolist()) for trace in refusal_guard(frame).data]
    [('restricted', [1.0]), ('harmless', [0.0])]
    """
    check(frame, "judge", "set", "metric", "value", "ci_low", "ci_high", "n")
    own = of_metric(frame, "declined")
    own = own.assign(judge=texts(own, "judge"), set=texts(own, "set"))
    if own.duplicated(["judge", "set"]).any():
        raise InputError("two rows share a judge and a set: choose the rows of one model")
    judges = {name: i for i, name in enumerate(dict.fromkeys(own["judge"]))}
    figure = go.Figure()
    styles = looks(own["set"])
    for number, (name, look) in enumerate(styles.items()):
        of_set = rows(own, own["set"] == name)
        beside = 0.16 * (number - (len(styles) - 1) / 2)
        shown = escape(clip(name, 40))
        figure.add_scatter(
            x=np.array([judges[judge] for judge in of_set["judge"]]) + beside,
            y=numbers(of_set, "value"),
            mode="markers",
            marker={"color": look.colour, "symbol": look.symbol, "size": 11},
            error_y=errors(of_set),
            name=shown,
            customdata=_said(of_set),
            hovertemplate=f"{shown}<br>%{{customdata}}<extra></extra>",
        )
    said = "share of requests that are declined; bars: 95 % intervals"
    usual = "Does the model refuse?"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=400, showlegend=True,
        legend=BELOW, **heading(usual if title is None else title, said),
    )  # fmt: skip
    labels = {i: escape(clip(name, 28)) for name, i in judges.items()}
    figure.update_xaxes(axis(list(labels), "judge", labels, x=True))
    figure.update_xaxes(range=[-0.5, len(judges) - 0.5])
    low = min(0.0, float(np.nanmin(numbers(own, "ci_low"), initial=0.0)))
    figure.update_yaxes(title_text="declined (share)", range=[low - 0.04, 1.04], **FAINT_GRID)
    return figure


def _said(of_set: pd.DataFrame) -> list[str]:
    parts = zip(of_set["judge"], numbers(of_set, "value"), said_bounds(of_set), strict=True)
    return [f"judge {escape(clip(judge, 40))}: {value:.3f}{b}" for judge, value, b in parts]


def _maps(
    table: pd.DataFrame, cells: Grid, panel: _Panel, figure: Any, number: int
) -> list[go.Heatmap]:
    """All candidates, dimmed, and over them those that pass or are chosen."""
    is_kl = panel.column == "kl_div_score"
    z = cells.numbers(table, panel.column)
    stays = np.zeros(z.shape, dtype=bool)
    kept = (table["dropped"] == "").to_numpy() | table["chosen"].to_numpy()
    stays[cells.y.rank[kept], cells.x.rank[kept]] = True
    colours = _of_kl(z) if is_kl else _of_scores(table)
    shown = np.log10(np.maximum(z, _LEAST_KL)).astype(np.float32) if is_kl else z
    first = cell_trace(shown, cells, "", diverging=not is_kl)
    right = figure.layout["xaxis" if number == 1 else f"xaxis{number}"].domain[1]
    said = "KL (nats)" if is_kl else "score (log-odds)"
    bar = {"title": {"text": said, "side": "right"}, "x": right + 0.005}
    first.update(colours, showscale=number > 1, opacity=_DIMMED).update(colorbar=bar)
    first.customdata = cells.texts(_hovers(table))
    first.hovertemplate = "%{customdata}<extra></extra>"
    over = go.Heatmap(first)
    over.update(z=np.where(stays, shown, np.float32(np.nan)), opacity=1, showscale=False)
    return [first, over]


def _of_scores(table: pd.DataFrame) -> dict[str, Any]:
    """The same limits for both scores, which are compared."""
    both = [numbers(table, panel.column) for panel in _PANELS[:2]]
    most = float(np.nanmax(np.abs(both), initial=0)) or 1
    return {"zmin": -most, "zmax": most, "zmid": 0}


def _of_kl(z: np.ndarray) -> dict[str, Any]:
    logs = np.log10(np.maximum(z, _LEAST_KL))
    low = float(np.floor(np.nanmin(logs, initial=0)))
    high = max(float(np.ceil(np.nanmax(logs, initial=low))), low + 1)
    ticks = list(range(int(low), int(high) + 1))
    names = {"tickvals": ticks, "ticktext": [f"{10.0**tick:g}" for tick in ticks]}
    return {"zmin": low, "zmax": high, "colorbar": names}


def _hovers(table: pd.DataFrame) -> list[str]:
    names = ("position", "layer", *(panel.column for panel in _PANELS))
    columns = [numbers(table, name) for name in names]
    norms = numbers(table, "norm") if "norm" in table else np.full(len(table), np.nan)
    ends = zip(norms, table["dropped"], table["chosen"], strict=True)
    found = []
    for values, (norm, dropped, chosen) in zip(zip(*columns, strict=True), ends, strict=True):
        position, layer, bypass, induced, cost = values
        verdict = f"dropped: {escape(clip(dropped, 60))}" if dropped else "passes"
        found.append(
            f"position {_minus(int(position))}, before block {layer:.0f}"
            f"<br>restricted, ablated: score {bypass:.3f}"
            f"<br>harmless, added: score {induced:.3f}"
            f"<br>harmless, ablated: KL {cost:.4f} nats"
            + (f"<br>length {norm:.3f}" if norm == norm else "")
            + f"<br>{verdict}{'; <b>chosen</b>' if chosen else ''}"
        )
    return found


def _marks(table: pd.DataFrame, cells: Grid, listed: bool) -> list[go.Scatter]:
    """Rings around those that pass, dark with a light line so that both show on any colour."""
    passes = (table["dropped"] == "").to_numpy()
    kinds: list[tuple[str, np.ndarray, dict[str, Any], bool]] = [
        ("passes", passes, _ring(_INK, 4), listed),
        ("passes", passes, _ring("#ffffff", 1.8), False),
        ("chosen", table["chosen"].to_numpy(), _STAR, listed),
    ]
    x = np.array(cells.x.positions)[cells.x.rank]
    y = np.array(cells.y.positions)[cells.y.rank]
    return [
        go.Scatter(
            x=x[which], y=y[which], mode="markers", marker=marker, name=name, legendgroup=name,
            showlegend=shown, hoverinfo="skip",
        )
        for name, which, marker, shown in kinds
    ]  # fmt: skip


_STAR = {"symbol": "star", "size": 13, "color": _YELLOW, "line": {"color": _INK, "width": 1.5}}


def _ring(colour: str, width: int | float) -> dict[str, Any]:
    return {"symbol": "circle-open", "size": 15, "color": colour, "line": {"width": width}}


def _lay_out(figure: go.Figure, cells: Grid, positions: dict[int, str]) -> None:
    figure.update_layout(
        template=theme.LIGHT,
        height=theme.height(cells.y.span()) + 60,
        legend=BELOW,
        showlegend=True,
    )
    names = {place: escape(name) for place, name in positions.items()}
    figure.update_xaxes(axis(list(names), "position, from the end", names, x=True))
    figure.update_xaxes(range=[-0.5, len(names) - 0.5])
    figure.update_yaxes(axis(cells.y.positions, "", cells.y.names, x=False))
    figure.update_yaxes(title_text="before block", col=1)
    figure.update_annotations(font={"size": 13})


def _minus(position: int) -> str:
    """A position as plotly writes numbers, with a minus sign."""
    return str(position).replace("-", "−")


def _counted(n: int, name: str) -> str:
    return f"{n:,} {name}{'' if n == 1 else 's'}"


def _passes(n: int) -> str:
    return f"{n or 'none'} pass{'es' if n <= 1 else ''}"
