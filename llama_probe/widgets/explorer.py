"""What all explorers share: views of one selection, controls, errors in sight, and pages."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from IPython.core.getipython import get_ipython
from IPython.display import display
from torch import nn

from llama_probe.errors import InputError
from llama_probe.hooks import lock_of
from llama_probe.page import Linked, Report, Strip, View
from llama_probe.page.views import filled
from llama_probe.plots.labels import clip, visible
from llama_probe.widgets.selection import Selection
from llama_probe.widgets.viewer import Viewer
from llama_probe.widgets.work import Work

_FRAME = (
    '<iframe srcdoc="{page}" style="width: 100%; height: {height}px; border: 0" '
    'sandbox="allow-scripts" title="{title}"></iframe>'
)
# The explorers that each notebook cell made when it last ran.
_made: dict[str, tuple[int, list["Explorer"]]] = {}


class Selected:
    """An attribute of an explorer that is one of its selection's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, explorer: Any, owner: type) -> Any:
        return self if explorer is None else explorer.here(self.name)

    def __set__(self, explorer: Any, value: int) -> None:
        explorer.select(**{self.name: value})


class Explorer(ipywidgets.VBox):
    """Views that follow a selection, one below the other.

    A subclass names its views in `rows` and what can be selected in `labels`, then calls `begin`.
    Attributes such as `layer` or `query` are the selection's: setting one changes what is shown, as
    a click does. An option that is not a selection's (a menu) is a trait of the explorer; the views
    that read it are drawn anew when it changes.

    Attributes:
        selection: What is selected, perhaps shared with other explorers.
        labels: By name what each value of it is called; names without labels are not selectable.
    """

    title = "Explorer"
    options: tuple[str, ...] = ()

    def __init__(self, selection: Selection | None, model: nn.Module | None = None) -> None:
        super().__init__()
        self._shared = selection is not None
        self.selection = Selection() if selection is None else selection
        self.labels: dict[str, Sequence[str]] = {}
        # What is selected here: the selection's, but for what others chose that is not here.
        self._chosen: dict[str, int] = {}
        self.rows: list[list[View]] = []
        self.closed = False
        # One lock for the model and for what is drawn from it: callbacks may run in a second
        # thread while a cell is busy.
        self._lock = RLock() if model is None else lock_of(model)
        self._viewers: dict[str, Viewer] = {}
        self._drawn: dict[str, go.Figure | Strip | None] = {}
        self._status = ipywidgets.HTML()
        self._stop = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop this work")
        self._stop.layout.display = "none"
        self._stop.on_click(lambda button: self._work.cancel())
        self._work = Work(self._worked, self._progressed)

    def begin(self, controls: Sequence[ipywidgets.Widget] = (), **first: int) -> None:
        """Lay the views out and draw them.

        Args:
            controls: Menus and sliders, above the views.
            first: What to select, unless a selection was given and what it has fits.
        """
        for view in self._views():
            self._viewers[view.name] = self._viewer(view)
        wanted = {
            name: value
            for name, value in first.items()
            if not (self._shared and self._fits(name, getattr(self.selection, name)))
        }
        self.selection.choose(**wanted)
        self._take(self.labels)
        bar = ipywidgets.HBox([*controls, self._stop, self._status])
        bar.layout.flex_flow = "row wrap"
        boxes = [ipywidgets.HBox([self._viewers[view.name] for view in row]) for row in self.rows]
        for box in boxes:
            box.layout.flex_flow = "row wrap"
        self.children = [bar, *boxes]
        self.add_class("llama-probe")
        self.redraw(*self._viewers)
        self.selection.on_change(self._changed)
        if self.options:
            self.observe(lambda change: self._changed({change.name}), list(self.options))
        _remember(self)

    def here(self, name: str) -> int:
        """What is selected here, by name; 0 where nothing can be."""
        chosen = self._chosen[name] if name in self._chosen else getattr(self.selection, name)
        return min(max(chosen, 0), max(len(self.labels.get(name, ())) - 1, 0))

    def select(self, **values: int) -> None:
        """Select something by name, as a click does.

        Raises:
            InputError: There is no such thing here.
        """
        for name, value in values.items():
            if not self._fits(name, value):
                n = len(self.labels.get(name, ()))
                raise InputError(f"{name} is {value}, but should be 0 to {n - 1}")
        self.selection.choose(**values)

    def figure(self, name: str) -> Any:
        """What a view shows now: a `go.Figure`, or a `Strip` of tokens.

        Raises:
            InputError: There is no such view.
        """
        if name not in self._drawn:
            raise InputError(f"there is no view {name!r}; there are: {', '.join(self._drawn)}")
        return self._drawn[name]

    def redraw(self, *names: str) -> None:
        """Draw some views anew."""
        with self._lock:
            for view in self._views():
                if view.name in names:
                    self._drawn[view.name] = view.draw()
                    self._show(view)

    def linked(self) -> Linked:
        """The same views for a page, without Python."""
        with self._lock:
            return Linked(
                self.title,
                self.rows,
                self._state(),
                self.labels,
                self.arrays(),
                controls=self.controls(),
                note=self.note(),
            )

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """What a page fills its views from."""
        return {}

    def controls(self) -> Sequence[str]:
        """What has a menu on a page."""
        return [name for name in ("layer", "head") if name in self.labels]

    def note(self) -> str:
        """What a page says above the views."""
        return ""

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write a page that shows the same and answers clicks, with no network and no Python.

        Returns:
            The file's path.
        """
        return Report(self.title).linked(self.linked()).write(path)

    def show_static(self, height: int = 900) -> None:
        """Show that page in place, where widgets do not run (VS Code, Colab, a saved notebook).

        Args:
            height: In pixels.
        """
        page = Report(self.title).linked(self.linked()).html()
        frame = _FRAME.format(
            page=html.escape(page, quote=True), height=height, title=html.escape(self.title)
        )
        display({"text/html": frame}, raw=True)

    def to_png(self, path: str | PathLike[str], view: str | None = None) -> Path:
        """Write a figure as a picture.

        Args:
            path: The file.
            view: Which view; None: the first that is a figure.

        Raises:
            InputError: The view is not a figure, or kaleido or a Chromium for it is missing.
        """
        figures = {name: it for name, it in self._drawn.items() if isinstance(it, go.Figure)}
        name = next(iter(figures)) if view is None else view
        if name not in figures:
            raise InputError(f"view {name!r} is no figure; figures are: {', '.join(figures)}")
        figure = go.Figure(figures[name]).update_layout(paper_bgcolor="white")
        try:
            figure.write_image(path, scale=2)
        except Exception as error:  # kaleido's own errors have no common class
            raise InputError(
                "a picture needs kaleido (pip install kaleido) and Chromium or Chrome on this "
                f"machine: {str(error).splitlines()[0]}"
            ) from error
        return Path(path)

    def close(self) -> None:
        """Stop its work and free its widgets; the selection stays."""
        if self.closed:
            return
        self.closed = True
        self._work.cancel()
        self.selection.off_change(self._changed)
        for widget in (*_below(self), *_looks([self, *_below(self)])):
            widget.close()
        super().close()

    def run(
        self, job: Callable[[Callable[[int, int], None]], Any], then: Callable[[Any], None]
    ) -> None:
        """Do slow work in a thread of its own: `job(progress)`, then `then(result)`.

        A newer job replaces an older one. What goes wrong is shown in the widget.
        """
        self._work.start(job, then)

    def wait(self, timeout: int | float | None = None) -> bool:
        """Wait for the work that runs; False if that took longer than so many seconds."""
        return self._work.wait(timeout)

    def say(self, text: str, error: bool = False) -> None:
        """Show a line of plain text above the views."""
        role, colour = (
            ("alert", "var(--jp-error-color1, #b3261e)") if error else ("status", "inherit")
        )
        self._status.value = (
            f'<span role="{role}" style="color: {colour}">{html.escape(text)}</span>'
        )

    def _state(self) -> dict[str, int]:
        return {name: self.here(name) for name in self.labels}

    def _views(self) -> list[View]:
        return [view for row in self.rows for view in row]

    def _viewer(self, view: View) -> Viewer:
        viewer = Viewer(
            on_click=lambda point: self._clicked(view, point),
            on_zoom=(lambda ranges: self._guarded(self.zoomed, view, ranges))
            if view.zooms
            else None,
            on_select=lambda points: self._guarded(self.selected, view, points),
        )
        viewer.layout.flex = f"{view.grow} 1 360px"
        viewer.layout.min_width = "0"
        kind = type(self).__name__.removesuffix("Explorer").lower()
        viewer.add_class(f"lp-{kind}-{view.name}")  # such as lp-attention-map
        return viewer

    def _fits(self, name: str, value: int) -> bool:
        return 0 <= value < len(self.labels.get(name, ()))

    def zoomed(self, view: View, ranges: dict[str, list[Any]] | None) -> None:
        """Called where a view is zoomed into: draw what lies within, or all of it (None)."""

    def selected(self, view: View, points: list[Any]) -> None:
        """Called with which points of a view's first trace are within a lasso; none: given up."""

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """Called for a click: select what it means; beside what can be selected it does nothing."""
        values = {
            name: int(round(point[axis]))
            for axis, name in view.clicks.items()
            if isinstance(point.get(axis), int | float)
        }
        if values and all(self._fits(name, value) for name, value in values.items()):
            self.selection.choose(**values)

    def _clicked(self, view: View, point: dict[str, Any]) -> None:
        self._guarded(self.clicked, view, point)

    def _guarded(self, act: Callable[..., Any], *args: Any) -> None:
        """Do what a click asks for; an exception has no other place than the widget to be seen."""
        try:
            act(*args)
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}", error=True)

    def _changed(self, names: set[str]) -> None:
        if not self._take(names) and not names & set(self.options):
            return
        self.say("")
        self.moved(names)
        with self._lock:
            for view in self._views():
                if names & set(view.reads):
                    self.redraw(view.name)
                elif names & view.marked.keys():
                    self._show(view)

    def _take(self, names: Iterable[str]) -> bool:
        """Take over what was selected and is here; whether there was anything.

        Explorers that share a selection may be of models and prompts of other sizes.
        """
        there = [name for name in names if name in self.labels]
        fit = [name for name in there if self._fits(name, getattr(self.selection, name))]
        self._chosen |= {name: getattr(self.selection, name) for name in fit}
        return bool(fit)

    def moved(self, names: set[str]) -> None:
        """Called before views are drawn for another selection."""

    def _show(self, view: View) -> None:
        shown = self._drawn[view.name]
        viewer = self._viewers[view.name]
        viewer.layout.display = "none" if shown is None else ""
        if shown is None:
            return
        state = self._state()
        caption = filled(view.caption, state, self.labels)
        marks = {axis: state[name] for name, axis in view.marked.items() if name in state}
        viewer.show(shown, caption, marks, bool(view.clicks))

    def _worked(self, state: Any) -> None:
        self._stop.layout.display = "" if state == "running" else "none"
        if isinstance(state, Exception):
            self.say(f"{type(state).__name__}: {state}", error=True)
        else:
            self.say({"running": "working …", "cancelled": "stopped"}.get(state, ""))

    def _progressed(self, done: int, total: int) -> None:
        self.say(f"working … {done} of {total}")


def named(tokens: Sequence[str]) -> list[str]:
    """What positions are called: their number and their token."""
    return [f"{pos}: {clip(visible(text), 24)}" for pos, text in enumerate(tokens)]


def numbers(n: int) -> list[str]:
    """What things are called that have a number only."""
    return list(map(str, range(n)))


def _looks(widgets: Iterable[ipywidgets.Widget]) -> list[ipywidgets.Widget]:
    """Their layouts and styles, which are widgets too."""
    parts = [getattr(widget, name, None) for widget in widgets for name in ("layout", "style")]
    return [part for part in parts if isinstance(part, ipywidgets.Widget)]


def _below(box: ipywidgets.Box) -> list[ipywidgets.Widget]:
    found = []
    for child in box.children:
        found += [*(_below(child) if isinstance(child, ipywidgets.Box) else []), child]
    return found


def _remember(explorer: Explorer) -> None:
    """Close what the same notebook cell made when it ran before: it is seen nowhere any more."""
    shell = get_ipython()
    # Outside of a kernel there is no request that a cell was run by.
    request = getattr(shell, "get_parent", dict)() or {}
    cell = request.get("metadata", {}).get("cellId")
    if shell is None or cell is None:
        return
    run, made = _made.get(cell, (shell.execution_count, []))
    if run != shell.execution_count:
        for old in made:
            old.close()
        made = []
    _made[cell] = (shell.execution_count, [*made, explorer])
