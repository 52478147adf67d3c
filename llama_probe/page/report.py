"""One HTML file that shows text, tables and live figures, offline and from any folder.

The page is report.html, beside this file, its script views.js and page.js. Whatever is put into a
report is escaped; the page's content policy forbids it any request.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, SupportsFloat
from uuid import uuid4

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from markupsafe import Markup

from llama_probe.errors import InputError
from llama_probe.page import pack
from llama_probe.page.views import Linked, Strip, View, filled, kind_of, spec_of
from llama_probe.plots import theme
from llama_probe.plots.labels import visible

_STRONGEST = 0.55  # opacity of the strongest token colour: text on it stays readable


class Report:
    """A page that is put together from top to bottom, then written.

    Each method that adds something returns the report, so that calls can be chained.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[dict[str, Any]] = []

    def heading(self, text: str) -> "Report":
        """Add a heading.

        Args:
            text: Plain text.
        """
        return self._add("heading", text=text)

    def text(self, text: str) -> "Report":
        """Add a paragraph.

        Args:
            text: Plain text; line breaks are kept.
        """
        return self._add("text", text=text)

    def table(
        self, frame: pd.DataFrame, *, max_rows: int = 50, caption: str | None = None
    ) -> "Report":
        """Add a table.

        Args:
            frame: The table; its index is not shown.
            max_rows: How many rows to show; if there are more, the page says so.
            caption: A line above the table, as plain text.

        Raises:
            InputError: `max_rows` is below 1.
        """
        return self._add("table", table=_table(frame, max_rows), caption=caption)

    def figure(
        self,
        figure: go.Figure,
        caption: str,
        *,
        table: pd.DataFrame | None = None,
        max_rows: int = 200,
    ) -> "Report":
        """Add a figure, as it is now; it takes the page's template, light or dark.

        Args:
            figure: The figure.
            caption: A line below the figure, as plain text; also what a screen reader says of it.
            table: The figure's numbers, folded away under it.
            max_rows: How many rows of `table` to show.

        Raises:
            InputError: The caption is empty, or `max_rows` is below 1.
        """
        if not caption.strip():
            raise InputError("a figure needs a caption that says what it shows; this one is empty")
        numbers = None if table is None else _table(table, max_rows)
        spec = _script_json(spec_of(figure))
        return self._add("figure", spec=spec, caption=caption, table=numbers)

    def linked(self, linked: Linked) -> "Report":
        """Add views that a click in one of them changes, as an explorer has them.

        Args:
            linked: The views, with the arrays that they are filled from.

        Raises:
            InputError: A view is filled from an array that is not there, or by more numbers than
                the array has axes.
        """
        about, blob = pack.packed(linked.arrays)
        rows = linked.shown()
        spec = {
            "state": dict(linked.state),
            "labels": {name: list(map(str, texts)) for name, texts in linked.labels.items()},
            "arrays": about,
            "views": [_view(view, it, linked) for row in rows for view, it in row],
        }
        names = [[(view.name, view.grow) for view, _ in row] for row in rows]
        menus = [(name, linked.labels[name]) for name in linked.controls]
        return self._add(
            "linked", spec=_script_json(spec), blob=blob, rows=names, menus=menus, note=linked.note,
            caption=linked.title,
        )  # fmt: skip

    def tokens(
        self,
        tokens: Sequence[str],
        values: Iterable[SupportsFloat] | None = None,
        *,
        caption: str | None = None,
    ) -> "Report":
        """Add a text whose tokens can be told apart, coloured by a number each.

        Args:
            tokens: The texts.
            values: Numbers that colour them: red above 0, blue below, more strongly the farther
                from it; also what a pointer that rests on a token reads.
            caption: A line above them, as plain text.

        Raises:
            InputError: There are more or fewer values than tokens.
        """
        numbers = None if values is None else [float(value) for value in values]
        if numbers is not None and len(numbers) != len(tokens):
            raise InputError(
                f"there are {len(numbers)} values for {len(tokens)} tokens; give one for each"
            )
        return self._add("tokens", tokens=_tokens(tokens, numbers), caption=caption)

    def html(self) -> str:
        """The whole page."""
        page = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        draws = any(part["kind"] in ("figure", "linked") for part in self._parts)
        return page.from_string(own_file("report.html")).render(
            title=self.title,
            parts=self._parts,
            plotly=pack.plotly_text() if draws else "",
            templates=_script_json(templates()),
            script=Markup(own_file("views.js") + own_file("page.js")),  # ours, without end tags
        )

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the page to a file, replacing one that is there only once the new one is complete.

        Args:
            path: The file; its folders are made.

        Returns:
            The file's path.

        Raises:
            InputError: The path is a folder.
        """
        path = Path(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file, such as report.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, so that two runs which write the same report do not mix.
        part = path.with_name(f".{path.name}.{uuid4().hex}.part")
        try:
            # Half a surrogate pair, which a tokenizer may give, has no UTF-8.
            part.write_text(self.html(), encoding="utf-8", errors="xmlcharrefreplace")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def _add(self, kind: str, **part: Any) -> "Report":
        self._parts.append({"kind": kind, **part})
        return self


def _script_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: without `<` nothing in it ends the element."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


def _view(view: View, shown: go.Figure | Strip, linked: Linked) -> dict[str, Any]:
    """A view as the page's script takes it."""
    for fill in view.fills:
        if _axes(linked.arrays.get(fill.array)) < len(fill.index):
            raise InputError(
                f"view {view.name!r} is filled from array {fill.array!r}, which is missing or has "
                f"fewer axes than the view needs: {', '.join(name or 'all' for name in fill.index)}"
            )
    # What follows the selection in Python only stays, with what it says, as it is now.
    stays = bool(linked.labels.keys() & set(view.reads)) and not view.fills
    caption = filled(view.caption, linked.state, linked.labels) if stays else view.caption
    return {
        "name": view.name,
        "kind": kind_of(shown),
        "caption": caption,
        "spec": spec_of(shown, clicks=bool(view.clicks)),
        "clicks": dict(view.clicks),
        "marks": dict(view.marked),
        "reads": sorted({*view.reads, *view.marked}),
        "fills": [asdict(fill) for fill in view.fills],
    }


def _axes(array: np.ndarray | list[Any] | None) -> int:
    """How many axes an array or nested lists have; -1 where there is none."""
    if isinstance(array, list):
        return 1 + (_axes(array[0]) if array and isinstance(array[0], list) else 0)
    return -1 if array is None else array.ndim


@cache
def own_file(name: str) -> str:
    """A file that lies beside this one."""
    return files("llama_probe.page").joinpath(name).read_text(encoding="utf-8")


@cache
def templates() -> dict[str, Any]:
    """Plotly's templates for a light and a dark page."""
    names = {"light": theme.LIGHT, "dark": theme.DARK}
    return {mode: pio.templates[name].to_plotly_json() for mode, name in names.items()}


def _table(frame: pd.DataFrame, max_rows: int) -> dict[str, Any]:
    """What the page needs of a table: column names, which are numbers, cells as text."""
    if max_rows < 1:
        raise InputError(f"max_rows is {max_rows}, but should be at least 1")
    shown = frame.head(max_rows)
    return {
        "columns": [str(name) for name in frame.columns],
        "numeric": [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes],
        "rows": [[_cell(value) for value in row] for row in shown.itertuples(index=False)],
        "left_out": len(frame) - len(shown),
        "length": len(frame),
    }


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Real) and not isinstance(value, Integral) and not math.isnan(value):
        return f"{float(value):.4g}"
    missing = pd.api.types.is_scalar(value) and bool(pd.isna(value))
    return "" if missing else str(value)


def _tokens(tokens: Sequence[str], values: list[float] | None) -> list[dict[str, Any]]:
    numbers = [math.nan] * len(tokens) if values is None else values
    most = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    return [
        {
            "text": visible(text),
            "value": None if values is None else f"{pos}: {number:.4g}",
            "style": _colour(number, most),
            "breaks": "\n" in str(text),
        }
        for pos, (text, number) in enumerate(zip(tokens, numbers, strict=True))
    ]


def _colour(number: float, most: float) -> str | None:
    """The background of a token; none where there is nothing to show."""
    if not math.isfinite(number) or not most:
        return None
    rgb = "213, 94, 0" if number > 0 else "0, 114, 178"
    return f"background: rgba({rgb}, {_STRONGEST * abs(number) / most:.3f})"
