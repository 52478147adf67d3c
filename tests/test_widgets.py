"""The ground that explorers stand on: selections, work in the background, views, errors."""

import threading
import time
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from tiny import tiny_config
from traitlets import Unicode

from llama_probe.errors import InputError
from llama_probe.hooks import lock_of
from llama_probe.model.llama import Llama
from llama_probe.page import Strip, View
from llama_probe.widgets import viewer
from llama_probe.widgets.explorer import Explorer, Selected, _below, named
from llama_probe.widgets.selection import Selection
from llama_probe.widgets.work import Work


class Squares(Explorer):
    """Two views of a number, and one of nothing."""

    layer, pos = Selected(), Selected()
    options = ("mode",)
    mode = Unicode("bars")

    def __init__(self, n: int = 4, selection: Selection | None = None) -> None:
        super().__init__(selection)
        self.drawn: list[str] = []
        self.labels = {"layer": list(map(str, range(n))), "pos": ["a", "b", "c"]}
        self.rows = [
            [View("bars", "Layer {layer}", self._bars, ("layer", "mode"), {"x": "layer"})],
            [View("strip", "At {pos}", self._strip, ("pos",), {"x": "pos"}, {"pos": "P"})],
            [View("never", "Never", lambda: None)],
        ]
        self.begin(pos=2)

    def _bars(self) -> go.Figure:
        self.drawn.append("bars")
        if self.layer == 3:
            raise RuntimeError("no layer <3>")
        return go.Figure(go.Bar(x=[0, 1, 2, 3], y=[self.layer**2] * 4))

    def _strip(self) -> Strip:
        self.drawn.append("strip")
        return Strip(["a", "b", "c"], [0.0, float(self.pos), np.nan])


def test_a_selection_tells_of_several_changes_at_once():
    heard: list[set[str]] = []
    selection = Selection(layer=1)
    selection.on_change(heard.append)
    selection.choose(layer=2, head=3)
    selection.query = 4
    selection.query = 4
    selection.off_change(heard.append)
    selection.query = 5
    assert heard == [{"layer", "head"}, {"query"}]


def test_a_selection_knows_its_names():
    with pytest.raises(InputError, match="no 'laier'; it has: .*layer"):
        Selection(laier=1)


def test_setting_an_attribute_draws_what_reads_it_and_nothing_else():
    explorer = Squares()
    assert (explorer.layer, explorer.pos) == (0, 2)
    explorer.drawn.clear()
    explorer.layer = 2
    assert explorer.figure("bars").data[0].y == (4, 4, 4, 4) and explorer.drawn == ["bars"]
    explorer.pos = 1
    assert explorer.figure("strip").values[1] == 1 and explorer.drawn == ["bars", "strip"]
    explorer.mode = "lines"
    assert explorer.drawn == ["bars", "strip", "bars"]


def test_the_widget_is_told_of_the_caption_and_the_mark():
    explorer = Squares()
    bars, strip, never = (explorer._viewers[name] for name in ("bars", "strip", "never"))
    explorer.layer = 1
    assert (bars.caption, bars.marks, bars.kind) == ("Layer 1", {"x": 1}, "figure")
    assert (strip.caption, strip.marks, strip.kind) == ("At c", {"P": 2}, "strip")
    assert never.layout.display == "none" and explorer.figure("never") is None


def test_what_is_out_of_range_is_refused_or_from_others_ignored():
    explorer = Squares()
    with pytest.raises(InputError, match="layer is 4, but should be 0 to 3"):
        explorer.layer = 4
    with pytest.raises(InputError, match="there is no view 'x'; there are: bars"):
        explorer.figure("x")
    explorer.selection.layer = 9  # by an explorer of a larger model
    assert explorer.figure("bars").data[0].y == (0, 0, 0, 0)


def test_two_explorers_share_a_selection():
    selection = Selection()
    one, other = Squares(selection=selection), Squares(selection=selection)
    one._viewers["bars"]._hear(None, {"click": {"x": 2, "y": 0.5}}, None)
    assert other.figure("bars").data[0].y == (4, 4, 4, 4)
    assert Squares(selection=selection).layer == 2  # one that comes later takes what is there
    other.close()
    one.layer = 1
    assert other.figure("bars").data[0].y == (4, 4, 4, 4)


def test_an_error_behind_a_click_is_shown_and_escaped():
    explorer = Squares()
    explorer._viewers["bars"]._hear(None, {"click": {"x": 3, "y": 0}}, None)
    assert "no layer &lt;3&gt;" in explorer._status.value and "alert" in explorer._status.value
    explorer._viewers["bars"]._hear(None, {"click": {"x": 1, "y": 0}}, None)
    assert "no layer" not in explorer._status.value
    with pytest.raises(RuntimeError, match="no layer"):
        explorer.layer = 3  # in Python there is a place to see it


@pytest.mark.parametrize("point", [{}, {"x": None}, {"x": "a"}, {"x": -3}, {"x": 99}])
def test_a_click_beside_does_nothing(point):
    explorer = Squares()
    explorer._viewers["bars"]._hear(None, {"click": point}, None)
    assert explorer.layer == 0 and explorer._status.value.count("alert") == 0


def test_close_frees_every_widget_once():
    explorer = Squares()
    widgets = [*_below(explorer), explorer]
    assert all(widget.comm is not None for widget in widgets) and len(widgets) > 6
    explorer.close()
    explorer.close()
    assert all(widget.comm is None for widget in widgets)


def test_the_scripts_are_one_widget_for_all(monkeypatch):
    Squares()
    before = list(viewer._scripts)
    Squares()
    assert viewer._scripts == before and len(before) == 1
    assert len(before[0].plotly) < 1_700_000
    assert len(viewer.Viewer._esm) < 2_000  # is sent with each viewer


def test_running_a_cell_again_closes_what_it_made(monkeypatch):
    class Shell:
        execution_count = 1

        def get_parent(self) -> dict[str, Any]:
            return {"metadata": {"cellId": "a cell"}}

    shell = Shell()
    monkeypatch.setattr("llama_probe.widgets.explorer.get_ipython", lambda: shell)
    first, second = Squares(), Squares()
    assert not first.closed
    shell.execution_count = 2
    again = Squares()
    assert first.closed and second.closed and not again.closed


def test_names_of_positions_show_blanks():
    assert named([" a", "", "\n"]) == ["0: ·a", "1: ∅", "2: ↵"]


def test_work_is_replaced_by_newer_work():
    heard: list[Any] = []
    results: list[str] = []
    work = Work(heard.append, lambda done, total: None)
    begun = threading.Event()

    def endless(progress):
        begun.set()
        while True:
            progress(0, 1)

    work.start(endless, results.append)
    assert begun.wait(10)
    work.start(lambda progress: "new", results.append)
    assert work.wait(10) and results == ["new"]
    assert heard == ["running", "cancelled", "running", "done"]


def test_work_can_be_cancelled_and_its_errors_are_told():
    heard: list[Any] = []
    work = Work(heard.append, lambda done, total: None)
    begun = threading.Event()

    def endless(progress):
        begun.set()
        while True:
            progress(0, 1)

    work.start(endless, lambda result: heard.append("never"))
    assert begun.wait(10) and not work.wait(0.01)
    work.cancel()
    assert work.wait(10) and heard == ["running", "cancelled"]
    error = ValueError("x")

    def fails(progress):
        raise error

    work.start(fails, lambda result: None)
    assert work.wait(10) and heard[2:] == ["running", error]


def test_hooks_of_one_thread_do_not_reach_anothers_run():
    model = Llama(tiny_config())
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens)
    entered, results = threading.Event(), []

    def other():
        entered.wait(10)
        results.append(model(tokens))

    thread = threading.Thread(target=other)
    thread.start()
    with model.hooks([("*.hook_mlp_out", lambda x, hook: 0 * x)]):
        entered.set()
        time.sleep(0.2)
        edited = model(tokens)
        assert not results  # it waits
    thread.join(10)
    assert torch.equal(results[0], expected) and not torch.equal(edited, expected)


def test_a_copy_of_a_model_has_a_lock_of_its_own():
    import copy

    model = Llama(tiny_config())
    with lock_of(model):
        other = copy.deepcopy(model)
    assert lock_of(other) is not lock_of(model) and lock_of(model) is lock_of(model)


def test_a_page_in_place_cannot_reach_out_of_its_frame(monkeypatch):
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(
        "llama_probe.widgets.explorer.display", lambda data, raw: shown.append(data)
    )
    Squares().show_static(height=300)
    frame = shown[0]["text/html"]
    assert frame.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in frame
    assert "<script" not in frame and "&lt;script" in frame and "height: 300px" in frame


@pytest.mark.slow
@pytest.mark.browser
def test_a_picture_is_written(chromium, tmp_path):
    path = Squares().to_png(tmp_path / "bars.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_a_picture_that_cannot_be_made_says_what_it_needs(monkeypatch, tmp_path):
    def fails(*args, **options):
        raise ValueError("no browser\nmore lines")

    monkeypatch.setattr(go.Figure, "write_image", fails)
    with pytest.raises(InputError, match="kaleido .* and Chromium .*: no browser$"):
        Squares().to_png(tmp_path / "bars.png")
    with pytest.raises(InputError, match="view 'strip' is no figure; figures are: bars"):
        Squares().to_png(tmp_path / "bars.png", "strip")
