"""What is shown, and what a click in it changes: said once, for the notebook and for a page.

A selection is a few whole numbers by name: which layer, head, query, key. A view draws a part of
the results for it, and a click in the view changes it. In a notebook Python draws a view anew; on a
page the same view is drawn once, and what differs between selections is filled in from arrays.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots.labels import visible


@dataclass(frozen=True)
class Strip:
    """A text token by token, each coloured by a number.

    Attributes:
        tokens: Their texts; blanks and control characters are made visible.
        values: A number each, red above 0 and blue below; missing ones (NaN) have no colour.
        unit: What the numbers are in.
    """

    tokens: Sequence[str]
    values: Sequence[float] | np.ndarray | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        """See that there is a number for each token."""
        if self.values is not None and len(self.values) != len(self.tokens):
            raise InputError(
                f"there are {len(self.values)} values for {len(self.tokens)} tokens; give one each"
            )


@dataclass(frozen=True)
class Fill:
    """What of a view's drawing is taken from an array of the page.

    Attributes:
        array: The array's name.
        index: The names of the selection's numbers that index its first axes; None for an axis that
            is taken whole.
        attribute: What it fills: "z", "y", "x", "text", "base", "name" of a trace, or "values" or
            "tokens" of a strip.
        trace: Which trace; None for a strip.
        pool: Of each square of so many numbers a side only the largest is shown.
    """

    array: str
    index: tuple[str | None, ...]
    attribute: str = "z"
    trace: int | None = 0
    pool: int = 1


@dataclass(frozen=True)
class View:
    """A figure or a token strip that follows a selection.

    Attributes:
        name: Its name, for tests and for `Explorer.figure`.
        caption: What it shows; "{layer}" stands for what is selected, by name if it has one.
        draw: Draws it for what is selected now; None: there is nothing to show.
        reads: What of the selection it depends on.
        clicks: What a click sets: {"x": "key", "y": "query"}, axis to name.
        marks: What is outlined: by default what a click sets, as {"key": "x", "query": "y"}; in a
            strip the letter that stands at a position, {"query": "Q"}.
        fills: On a page, what is taken from arrays when the selection changes.
        zooms: Whether it is drawn anew for the part that is zoomed into.
        grow: How much of the room beside others it takes.
    """

    name: str
    caption: str
    draw: Callable[[], go.Figure | Strip | None]
    reads: tuple[str, ...] = ()
    clicks: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] | None = None
    fills: tuple[Fill, ...] = ()
    zooms: bool = False
    grow: float = 1.0

    @property
    def marked(self) -> Mapping[str, str]:
        """`marks`, or what a click sets."""
        if self.marks is not None:
            return self.marks
        return {name: axis for axis, name in self.clicks.items()}


@dataclass(frozen=True)
class Linked:
    """Views of one selection, with all that a page needs to go on without Python.

    Attributes:
        title: What they show together.
        rows: The views, as they stand beside and below each other.
        state: What is selected at first.
        labels: For each name of the selection, what its values 0, 1, … are called.
        arrays: What views are filled from: numbers, which are rounded to 16 bits (8 where there are
            more than a million), or nested lists of texts.
        controls: Names of the selection that have a menu of their own.
        note: What a reader should know, such as what was left out.
    """

    title: str
    rows: Sequence[Sequence[View]]
    state: Mapping[str, int]
    labels: Mapping[str, Sequence[str]]
    arrays: Mapping[str, np.ndarray | list[Any]] = field(default_factory=dict)
    controls: Sequence[str] = ()
    note: str = ""

    def shown(self) -> "list[list[tuple[View, go.Figure | Strip]]]":
        """The views that have something to show, and what it is."""
        drawn = [[(view, view.draw()) for view in row] for row in self.rows]
        return [[(view, it) for view, it in row if it is not None] for row in drawn]


def kind_of(shown: go.Figure | Strip) -> str:
    """The word by which the script knows it."""
    return "strip" if isinstance(shown, Strip) else "figure"


def spec_of(shown: go.Figure | Strip, clicks: bool = False) -> dict[str, Any]:
    """What the script needs to draw it, as JSON values; a figure without its template."""
    if isinstance(shown, go.Figure):
        spec = json.loads(shown.to_json() or "{}")
        spec["layout"].pop("template", None)
        return spec
    values = None
    if shown.values is not None:
        values = [float(value) if np.isfinite(value) else None for value in shown.values]
    tokens = [visible(text) for text in shown.tokens]
    return {"tokens": tokens, "values": values, "unit": shown.unit, "clicks": clicks}


def filled(caption: str, state: Mapping[str, int], labels: Mapping[str, Sequence[str]]) -> str:
    """A caption for what is selected.

    >>> filled("Layer {layer}: {pos}", {"layer": 1, "pos": 0}, {"pos": ["0: the"]})
    'Layer 1: 0: the'
    """
    for name, value in state.items():
        named = labels.get(name, ())
        text = named[value] if 0 <= value < len(named) else str(value)
        caption = caption.replace("{" + name + "}", text)
    return caption
