"""Figures of what edits along a refusal direction do: by dose, and beside random directions."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.frames import check, numbers, rows
from llama_probe.plots.labels import axis, clip, escape
from llama_probe.plots.probing_frames import of_metric, texts
from llama_probe.plots.refusal_looks import (
    BELOW,
    FAINT_GRID,
    GREY,
    Look,
    band,
    errors,
    heading,
    list_once,
    looks,
    said_bounds,
)

_UNITS = {"declined": "declined (share)", "refusal score": "refusal score (log-odds)"}
_UNITS |= {"kl": "KL to the plain model (nats)", "loss": "loss (nats a token)"}
_DOSES = {"ablation": "fraction removed", "addition": "multiple added"}
_GOLDEN = 0.618034  # steps that fill an interval evenly, however many there are
_RANDOM = {"random": ("#7b8794", "circle"), "matched random": ("#b08900", "x-thin-open")}


def dose_response(
    frame: pd.DataFrame, title: str | None = None, *, metric: str = "declined"
) -> go.Figure:
    """What removing a growing part of a direction does, and adding a growing multiple of it.

    A panel for each edit, a line with its 95 % band for each set. The hatched grey bands are where
    95 % of random directions of the same length lie, where these were measured.

    Args:
        frame: As `llama_probe.refusal.dose.dose_response` gives it: `edit dose set metric direction
            value ci_low ci_high n`.
        title: The figure's title, as plain text; None: what it shows.
        metric: Of `frame["metric"]`: "declined", "refusal score" or "kl".

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows share
            an edit, a set and a dose.

    >>> frame = pd.DataFrame({"dose": [0, 1], "value": [1, 0], "ci_low": 0, "ci_high": 1, "n": 9})
    >>> frame = frame.assign(edit="ablation", set="restricted", metric="declined")
    >>> dose_response(frame.assign(direction="refusal")).data[1].y.tolist()
    [1.0, 0.0]
    """
    names = ("edit", "dose", "set", "metric", "direction", "value", "ci_low", "ci_high", "n")
    check(frame, *names)
    own = of_metric(frame, metric)
    own = own.assign(**{name: texts(own, name) for name in ("edit", "set", "direction")})
    own = own.assign(dose=numbers(own, "dose")).sort_values("dose", kind="stable")
    is_own = own["direction"] == "refusal"
    mine, random = rows(own, is_own), rows(own, ~is_own)
    if mine.duplicated(["edit", "set", "dose"]).any():
        raise InputError("two rows share an edit, a set and a dose: choose the rows of one model")
    edits = list(dict.fromkeys(own["edit"]))
    figure = make_subplots(
        rows=1, cols=len(edits), shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=[escape(clip(name, 40)) for name in edits],
    )  # fmt: skip
    styles = looks(own["set"])
    for number, edit in enumerate(edits, 1):
        drawn, own = rows(random, random["edit"] == edit), rows(mine, mine["edit"] == edit)
        for trace in _panel(drawn, own, styles, _unit(metric)):
            figure.add_trace(trace, row=1, col=number)
        said = _DOSES.get(edit, "dose")
        figure.update_xaxes(title_text=said, row=1, col=number)
    list_once(figure)
    usual = "Dose and response"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=440, showlegend=True,
        legend=BELOW, **heading(usual if title is None else title, _said_of_random(random)),
    )  # fmt: skip
    if title != "":
        figure.update_layout(margin={"t": 108})  # for the panels' names too
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(**FAINT_GRID)
    figure.update_yaxes(title_text=escape(_unit(metric)), col=1)
    return figure.update_yaxes(**FAINT_GRID, **_range(metric))


def refusal_effects(
    frame: pd.DataFrame, title: str | None = None, *, metric: str = "declined"
) -> go.Figure:
    """What each edit along the direction does to each set, beside random directions.

    Large marks are the direction's, with 95 % intervals; small ones are single random directions of
    the same length, isotropic or with the activations' covariance ("matched").

    Args:
        frame: `effects` of a `RefusalStudy`: `edit set metric value ci_low ci_high n direction`,
            and perhaps `change change_low change_high`, for the hover.
        title: The figure's title, as plain text; None: what it shows.
        metric: Of `frame["metric"]`: "declined", "refusal score" or "kl".

    Raises:
        InputError: A column is missing, the frame is empty or has no such metric, or two rows of
            the direction share an edit and a set.

    >>> frame = pd.DataFrame({"edit": ["none", "ablation"], "value": [1, 0], "ci_low": 0, "n": 9})
    >>> frame = frame.assign(ci_high=1, set="restricted", metric="declined", direction="refusal")
    >>> refusal_effects(frame).data[0].y.tolist()
    [1.0, 0.0]
    """
    check(frame, "edit", "set", "metric", "value", "ci_low", "ci_high", "n", "direction")
    own = of_metric(frame, metric)
    own = own.assign(**{name: texts(own, name) for name in ("edit", "set", "direction")})
    is_own = own["direction"] == "refusal"
    mine, random = rows(own, is_own), rows(own, ~is_own)
    if mine.duplicated(["edit", "set"]).any():
        raise InputError("two rows share an edit and a set: choose the rows of one model")
    edits = {edit: i for i, edit in enumerate(dict.fromkeys(own["edit"]))}
    styles = looks(own["set"])
    beside = {name: 0.5 * ((i + 0.5) / len(styles) - 0.5) for i, name in enumerate(styles)}
    figure = go.Figure()
    for name in styles:
        for kind in dict.fromkeys(random["direction"]):
            drawn = rows(random, (random["direction"] == kind) & (random["set"] == name))
            if len(drawn):
                figure.add_trace(_cloud(drawn, kind, edits, beside[name], name))
    for name, look in styles.items():
        of_set = rows(mine, mine["set"] == name)
        if len(of_set):
            x = np.array([edits[edit] for edit in of_set["edit"]]) + beside[name]
            figure.add_trace(_points(of_set, x, name, look))
    list_once(figure)
    usual = "What edits along the direction do"
    figure.update_layout(
        template=theme.LIGHT, plot_bgcolor="rgba(0,0,0,0)", height=440, showlegend=True,
        legend=BELOW, **heading(usual if title is None else title, _said_of_random(random)),
    )  # fmt: skip
    labels = {i: escape(clip(edit, 24)) for edit, i in edits.items()}
    figure.update_xaxes(axis(list(labels), "edit", labels, x=True), range=[-0.5, len(edits) - 0.5])
    figure.update_yaxes(title_text=escape(_unit(metric)))
    return figure.update_yaxes(**FAINT_GRID, **_range(metric))


def _panel(
    random: pd.DataFrame, mine: pd.DataFrame, styles: dict[str, Look], unit: str
) -> list[go.Scatter]:
    """What is drawn of one edit, bands first."""
    traces, lines = [], []
    for name, look in styles.items():
        shown = escape(clip(name, 40))
        drawn = rows(random, random["set"] == name)
        if len(drawn):
            traces.append(_random_band(drawn, shown, look))
        line = rows(mine, mine["set"] == name)
        if line.empty:
            continue
        x, low, high = (numbers(line, part) for part in ("dose", "ci_low", "ci_high"))
        traces.append(
            band(x, low, high, look.colour, 0.16, name=shown, legendgroup=shown, showlegend=False)
        )
        lines.append(
            go.Scatter(
                x=x,
                y=numbers(line, "value"),
                mode="lines+markers",
                line={"color": look.colour, "width": 2.5, "dash": look.dash},
                marker={"symbol": look.symbol, "size": 8, "color": look.colour},
                name=shown,
                legendgroup=shown,
                customdata=said_bounds(line),
                hovertemplate=f"{shown}, dose %{{x}}<br>{escape(unit)} %{{y:.3f}}%{{customdata}}"
                "<extra></extra>",
            )
        )
    return [*traces, *lines]


def _random_band(drawn: pd.DataFrame, shown: str, look: Look) -> go.Scatter:
    of_dose = drawn.assign(value=numbers(drawn, "value")).groupby("dose")["value"]
    low, high = of_dose.quantile(0.025), of_dose.quantile(0.975)
    doses = np.array(low.index, dtype=np.float32)
    name = f"random directions, {shown}"
    trace = band(
        doses, low.to_numpy(np.float32), high.to_numpy(np.float32), GREY, 0.18,
        name=name, legendgroup=name,
    )  # fmt: skip
    pattern = {"shape": "/", "fgcolor": look.colour, "size": 7, "solidity": 0.15}
    return trace.update(fillpattern=pattern, line={"color": look.colour, "width": 0.8})


def _cloud(
    drawn: pd.DataFrame, kind: str, edits: dict[str, int], beside: float, name: str
) -> go.Scatter:
    """Single random directions, spread so that they do not hide each other."""
    colour, symbol = _RANDOM.get(kind, (GREY, "diamond-open"))
    spread = 0.14 * (np.arange(len(drawn)) * _GOLDEN % 1 - 0.5)
    away = -0.13 if kind == "random" else 0.13
    shown = escape(clip(kind, 40))
    return go.Scatter(
        x=np.array([edits[edit] for edit in drawn["edit"]]) + beside + away + spread,
        y=numbers(drawn, "value"),
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 6, "opacity": 0.75},
        name=f"{shown} directions",
        hovertemplate=f"a {shown} direction, {escape(clip(name, 40))}<br>%{{y:.3f}}<extra></extra>",
    )


def _points(of_set: pd.DataFrame, x: np.ndarray, name: str, look: Look) -> go.Scatter:
    shown = escape(clip(name, 40))
    said = said_bounds(of_set)
    if {"change", "change_low", "change_high"} <= set(of_set.columns):
        changes = said_bounds(of_set, "change_low", "change_high", None)
        values = numbers(of_set, "change")
        said = [
            f"{first}<br>change {value:+.3f}{second}"
            for first, value, second in zip(said, values, changes, strict=True)
        ]
    return go.Scatter(
        x=x,
        y=numbers(of_set, "value"),
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 11},
        error_y=errors(of_set),
        name=shown,
        text=[escape(clip(edit, 40)) for edit in of_set["edit"]],
        customdata=said,
        hovertemplate=f"{shown}, %{{text}}<br>%{{y:.3f}}%{{customdata}}<extra></extra>",
    )


def _unit(metric: str) -> str:
    return _UNITS.get(metric, metric)


def _range(metric: str) -> dict[str, Any]:
    return {"range": [-0.04, 1.04]} if metric == "declined" else {}


def _said_of_random(random: pd.DataFrame) -> str:
    if random.empty:
        return "95 % intervals; random directions are not measured by this"
    alike = [name for name in ("direction", "edit", "set", "dose") if name in random]
    draws = int(random.groupby(alike, sort=False)["value"].size().to_numpy().max())
    kinds = len(set(random["direction"]))
    of_each = f" of each of {kinds} kinds" if kinds > 1 else ""
    return f"95 % intervals; {draws} random directions of the same length{of_each}"
