"""What probes read, layer by layer; what one says of each sample; where it is wrong."""

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from traitlets import Unicode, validate

from llama_probe import plots
from llama_probe.capturing import Activations
from llama_probe.errors import InputError, near
from llama_probe.page import Fill, Strip, View
from llama_probe.plots.frames import check, rows
from llama_probe.plots.held_out import bar_texts, hover_texts, left_of, worst_of
from llama_probe.plots.labels import clip, visible
from llama_probe.plots.probing_frames import metric_name, texts
from llama_probe.probing.cells import OF_TEXTS
from llama_probe.probing.data import layer_of
from llama_probe.probing.probe import probe as measured
from llama_probe.probing.templates import ProbeWarning
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected
from llama_probe.widgets.held_out import Samples
from llama_probe.widgets.selection import Selection

_MOST_POINTS = 2000  # samples that are shown
_MOST_WRONG = 12
_MOST_IN_MENU = 200
_RING = {"size": 17, "symbol": "circle-open", "color": "#B3261E", "line": {"width": 2.5}}
_LEAK = (
    "Most prompts share most of their words with another one, and no groups are given: what they "
    "share may leak between folds."
)


class ProbeDashboard(Explorer):
    """The emergence curve; the held-out scores at a layer; the samples that it gets most wrong.

    Click a layer of the curve, a sample or a bar. The curve is measured in the background, unless
    its frame is given; "Stop" stops that. What is shown of samples comes from the same folds.

    Args:
        acts: As for `lp.probe`: `Activations`, the folder of a store, a dict of arrays, an array.
        labels: Of one target.
        frame: What `lp.probe` gave for the same arguments; None: measured here.
        groups, probe, hooks, task, folds, strength, controls, control_by, repeats, texts, seed: As
            for `lp.probe`.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        layer, prompt: What is selected: a place on the curve, and one of the samples (a prompt, or
            a token where positions have several). Of more than 2,000 samples every so many-th is
            there.
        probe, metric, at, site: What is shown, as the frame names it; `site` is a hook's name
            without its layer.
        frame: What `lp.probe` gave; None until it is measured.

    Raises:
        InputError: As `lp.probe`; or labels of several targets are given.
    """

    layer, prompt = Selected(), Selected()
    options = ("probe", "metric", "at", "site")
    probe = Unicode()
    metric = Unicode()
    at = Unicode()
    site = Unicode()

    def __init__(
        self,
        acts: Any,
        labels: Any,
        *,
        frame: pd.DataFrame | None = None,
        groups: Any = None,
        probe: str | Sequence[str] = "logistic",
        hooks: Any = None,
        task: str | None = None,
        folds: int = 5,
        strength: int | float | None = None,
        controls: str | Sequence[str] | None = None,
        control_by: Any = None,
        repeats: int = 5,
        texts: Sequence[str] | None = None,
        seed: int = 0,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection)
        folded: dict[str, Any] = {
            "groups": groups, "hooks": hooks, "task": task, "folds": folds, "strength": strength,
            "texts": texts, "seed": seed,
        }  # fmt: skip
        self._samples = Samples(acts, labels, probes=probe, **folded)
        beside = {"controls": controls, "control_by": control_by, "repeats": repeats}
        self._call = (acts, labels), {"probe": probe, **folded, **beside}
        self._scores = lru_cache(512)(self._samples.scores)
        self._frames = lru_cache(8)(self._samples.frame)
        of = f" in {acts.record['model']}" if isinstance(acts, Activations) else ""
        self.title = f"Probes of {self._samples.target}{of}"
        self._choices = self._samples.choices(controls)
        self.frame = None if frame is None else self._checked(frame)
        for name in self.options:
            setattr(self, name, self._choices[name][0])
        self._name_all()
        self._lay_out()
        self._says = ipywidgets.HTML(html.escape(self.note()))
        self.begin(self._controls(), layer=self._first(), prompt=0)
        bar, *views = self.children
        self.children = [bar, self._says, *views]
        if frame is None:
            self.measure()

    def _lay_out(self) -> None:
        here = ("layer", "probe", "at", "site")
        ring = ("layer", "prompt")
        curve = View("curve", "Each layer: click one", self._curve, self.options, {"x": "layer"})
        grid = View(
            "grid", "Each layer and position: click a cell", self._grid, self.options,
            {"y": "layer"},
        )  # fmt: skip
        self.rows = [
            [curve, *([grid] if len(self._samples.ats) > 1 else [])],
            [
                View(
                    "scores", "What the probe of {layer} says of samples it did not see: click one",
                    self._points, (*here, "prompt"), {"index": "prompt"}, {},
                    (
                        Fill("scores", ("layer",), "x", 0), Fill("ring_x", ring, "x", 1),
                        Fill("ring_y", ("prompt",), "y", 1),
                    ),
                ),
                View(
                    "wrong", "What it gets most wrong: the label, and the text", self._wrong, here,
                    marks={},
                    fills=(
                        Fill("wrong", ("layer",), "x"), Fill("hovers", ("layer",), "text"),
                        Fill("texts", ("layer",), "text", 1), Fill("left", ("layer",), "x", 1),
                    ),
                ),
            ],
            [
                View(
                    "text", "Sample {prompt}", self._text, ("prompt", "at"), marks={},
                    fills=(Fill("words", ("prompt",), "tokens", None),),
                ),
            ],
        ]  # fmt: skip

    def _controls(self) -> list[ipywidgets.Widget]:
        self._again = ipywidgets.Button(description="Measure", tooltip="Measure the curve")
        self._again.layout.width = "auto"
        self._again.layout.display = "none"
        self._again.on_click(lambda button: self.measure())
        metrics = [(metric_name(name), name) for name in self._choices["metric"]]
        choices: dict[str, Sequence[Any]] = {**self._choices, "metric": metrics}
        named = {"probe": "Probe", "metric": "Metric", "at": "Position", "site": "Site"}
        menus = [menu(self, name, choices[name], named[name]) for name in named
                 if len(choices[name]) > 1]  # fmt: skip
        return [*menus, self._again]

    @validate("probe", "metric", "at", "site")
    def _known(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        there = self._choices[name]
        if value not in there:
            raise InputError(
                f"{name} is {value!r}, but should be one of {', '.join(there)}{near(value, there)}"
            )
        return value

    def _checked(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A frame, with texts as texts, that has what is shown here."""
        check(frame, "hook", "at", "probe", "kind", "metric", "target")
        named = ("hook", "at", "probe", "target")
        frame = frame.assign(**{name: texts(frame, name) for name in named})
        frame = rows(frame, frame["target"] == self._samples.target)
        lacking = set(self._samples.source.hooks) - set(frame["hook"])
        lacking |= set(self._samples.ats) - set(frame["at"])
        lacking |= set(self._samples.probes) - set(frame["probe"])
        if lacking:
            raise InputError(
                f"the frame has no row of {min(lacking)!r}: give that of lp.probe for the same "
                "arguments, or none"
            )
        return frame

    def measure(self) -> None:
        """Measure the curve in the background; `wait()` waits for it."""
        (acts, labels), arguments = self._call

        def job(progress: Any) -> pd.DataFrame:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ProbeWarning)  # the note says it
                return measured(acts, labels, **arguments, progress=progress)

        def keep(frame: pd.DataFrame) -> None:
            with self._lock:
                self.frame = frame
                self._says.value = html.escape(self.note())
                self.redraw("curve", "grid")

        self.run(job, keep)

    def _worked(self, state: Any) -> None:
        """What was stopped, or failed, can be begun again."""
        super()._worked(state)
        begins = self.frame is None and state != "running"
        self._again.layout.display = "" if begins else "none"

    def moved(self, names: set[str]) -> None:
        """Another position has other samples, another site other layers."""
        if names & {"at", "site"}:
            self._name_all()
            self.selection.choose(layer=self.layer, prompt=self.prompt)

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """A bar is a sample; a cell of the grid is a position too; only points are samples."""
        if view.name == "wrong":
            held, rank = self._held(), int(round(point["y"]))
            if held is not None and 0 <= rank < min(_MOST_WRONG, len(held)):
                self.selection.choose(prompt=int(worst_of(held, _MOST_WRONG).index[rank]))
        elif view.name != "scores" or not point.get("trace"):
            if view.name == "grid":
                cells = cast(Any, self.figure("grid")).data[0]
                self.at = self._samples.ats_in_order()[list(cells.x).index(point["x"])]
            super().clicked(view, point)

    def _hooks(self) -> dict[int, str]:
        return self._samples.hooks_of(self.site)

    def _name_all(self) -> None:
        samples = zip(self._chosen_rows(), self._shown_samples()["label"], strict=True)
        self.labels = {
            **self.labels,
            "layer": self._samples.layer_names(self.site),
            "prompt": [f"{row}, labelled {clip(str(label), 40)}" for row, label in samples],
        }

    def _first(self) -> int:
        """The best layer, where the curve is known; else one in the middle."""
        places = {hook: place for place, hook in self._hooks().items() if place >= 0}
        if self.frame is None:
            return sorted(places.values())[len(places) // 2]
        frame = self._of_here()
        frame = rows(frame, (frame["kind"] == "probe") & (frame["metric"] == self.metric))
        frame = rows(frame, frame["hook"].isin(list(places)))
        return places[frame.loc[frame["value"].idxmax(), "hook"]]

    def _of_here(self) -> pd.DataFrame:
        """The rows of the frame that belong to what is shown."""
        frame = cast(pd.DataFrame, self.frame)
        here = (frame["at"] == self.at) & frame["hook"].isin(list(self._hooks().values()))
        here &= frame["probe"].isin([self.probe, ""])
        always = [*OF_TEXTS, "best cell, corrected"]
        return rows(frame, here | frame["kind"].isin(always))

    def _curve(self) -> go.Figure | None:
        if self.frame is None:
            return None
        frame = self._of_here()
        if self.metric not in set(frame["metric"]):
            self.say(f"{metric_name(self.metric)} is not measured for {self.probe} probes.")
            return None
        return plots.probe(frame, self.metric)

    def _grid(self) -> go.Figure | None:
        if self.frame is None:
            return None
        hooks = [hook for hook in self._hooks().values() if layer_of(hook) >= 0]
        frame = rows(self.frame, self.frame["hook"].isin(hooks))
        frame = rows(frame, (frame["probe"] == self.probe) & (frame["kind"] == "probe"))
        there = self.metric in set(frame["metric"])
        return plots.probe_grid(frame, self.metric) if there else None

    def _chosen_rows(self) -> np.ndarray:
        """Which samples of the position are shown."""
        n = len(self._frames(self.at))
        return np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).astype(int))

    def _shown_samples(self) -> pd.DataFrame:
        return self._frames(self.at).iloc[self._chosen_rows()].reset_index(drop=True)

    def _held(self, place: int | None = None) -> pd.DataFrame | None:
        """The samples with their scores at a place; None if there is no hook."""
        hook = self._hooks().get(self.layer if place is None else place)
        if hook is None:
            return None
        score, margin = self._scores(hook, self.at, self.probe)[:, self._chosen_rows()]
        return self._shown_samples().assign(score=score, margin=margin)

    def _points(self) -> go.Figure | None:
        held = self._held()
        if held is None:
            return None
        figure = plots.probe_scores(held)
        points = cast(Any, figure.data[0])
        figure.add_scatter(
            x=[points.x[self.prompt]], y=[points.y[self.prompt]], mode="markers", marker=_RING,
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        return figure

    def _wrong(self) -> go.Figure | None:
        held = self._held()
        return None if held is None else plots.probe_errors(held, most=_MOST_WRONG)

    def _text(self) -> Strip:
        return Strip(_words(self._shown_samples()["text"].iloc[self.prompt]))

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """Of each layer the samples' scores and what is most wrong; the samples' texts."""
        n, samples = len(self.labels["layer"]), self._shown_samples()
        most = min(_MOST_WRONG, len(samples))
        scores, wrong = np.full((n, len(samples)), np.nan), np.full((n, most), np.nan)
        bars = [[""] * most for _ in range(n)]
        hovers = [[""] * most for _ in range(n)]
        for place in range(n):
            held = self._held(place)
            if held is not None:
                worst = worst_of(held, most)
                scores[place], wrong[place] = held["score"], -worst["margin"]
                bars[place], hovers[place] = bar_texts(worst), hover_texts(worst)
        points = cast(Any, plots.probe_scores(samples.assign(score=0.0, margin=0.0)).data[0])
        return {
            "scores": scores, "ring_x": scores[..., None], "ring_y": points.y[:, None],
            "wrong": wrong, "left": np.array(list(map(left_of, wrong))), "texts": bars,
            "hovers": hovers,
            "words": [list(map(visible, _words(text))) for text in samples["text"]],
        }  # fmt: skip

    def controls(self) -> Sequence[str]:
        """The layer has a menu; the samples too, if they are few."""
        return ["layer", "prompt"] if len(self.labels["prompt"]) <= _MOST_IN_MENU else ["layer"]

    def note(self) -> str:
        """What the best cell is worth, how many samples are shown, and what may leak."""
        shown, n = len(self._chosen_rows()), len(self._frames(self.at))
        parts = [_LEAK] if self._samples.may_leak() else []
        parts += [] if shown == n else [f"{shown:,} of {n:,} samples are shown."]
        return " ".join([*self._said_of_best(), *parts])

    def _said_of_best(self) -> list[str]:
        metric = self._choices["metric"][0]
        if self.frame is None:
            return []
        found = rows(self.frame, self.frame["metric"] == metric)
        said = []
        for _, one in rows(found, found["kind"] == "best cell").iterrows():
            said.append(
                f"The best of {one['cells']} cells by {metric_name(metric)} is {one['probe']} of "
                f"{one['hook']} at {one['at']}: {one['value']:.3f}."
            )
        for value in found.loc[found["kind"] == "best cell, corrected", "value"].dropna():
            said.append(f"Chosen on one half of the groups, tested on the other: {value:.3f}.")
        return said


def _words(text: str) -> list[str]:
    """A text as a strip shows it, a word at a time."""
    return re.findall(r"\s*\S+", text) or [text]
