"""Refusal at a glance: the choice of a direction, where requests lie on it, what edits do."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from traitlets import Enum

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, Strip, View
from llama_probe.plots.frames import rows
from llama_probe.plots.labels import clip, visible
from llama_probe.refusal.asking import Asked, ask
from llama_probe.refusal.dose import DOSES
from llama_probe.refusal.projections import candidate_projections, projections
from llama_probe.refusal.study import RefusalStudy
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected, numbers
from llama_probe.widgets.refusal_work import answered, dosed, edits_of, table
from llama_probe.widgets.selection import Selection

_METRICS = ("declined", "refusal score", "kl")
_MOST_IN_MENU = 200
_RING = {"size": 17, "symbol": "circle-open", "color": "#B3261E", "line": {"width": 2.5}}


class RefusalDashboard(Explorer):
    """The candidates, the requests on the picked one, harmfulness and refusal, doses, answers.

    Click a candidate in the maps, a request in the plane. Nothing is generated until a button asks
    for it: "Compute" measures the dose-response on at most 32 requests of each set, "Generate" what
    the model answers to the selected request, plain and under each edit, in at most 48 tokens.

    Directions and the axes of the plane are fitted on the study's fitting part; requests of that
    part are left out here.

    A study without a direction shows its verdict and how often the model declined, nothing else.

    Args:
        model: The model.
        study: What `lp.find_refusal_direction` found in it.
        restricted: Requests that it should decline: what `lp.capture` takes; None: those of the
            study's reporting part.
        harmless: Requests that it should answer, likewise.
        redact: Show how an answer begins, and no more.
        n_random: Random directions beside the dose-response.
        seed: Of those.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        pos, layer: The candidate: which of the positions, and the block.
        prompt: The request, restricted ones first.
        metric: Of the dose-response: "declined", "refusal score" or "kl".
        doses: The frame of `dose_response`; None until it is computed.
        answers: What was answered, by request and edit, not redacted; see `generate`.

    Raises:
        InputError: A request cannot be used, or a set has none that the study was not fitted on.
    """

    layer, pos, prompt = (Selected() for _ in range(3))
    options = ("metric",)
    metric = Enum(list(_METRICS), "declined")

    def __init__(
        self,
        model: Llama,
        study: RefusalStudy,
        restricted: Any = None,
        harmless: Any = None,
        *,
        redact: bool = True,
        n_random: int = 20,
        seed: int = 0,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"Refusal in {model.cfg.model_name}"
        self.study, self.redact = study, redact
        self.doses: pd.DataFrame | None = None
        self.answers: dict[int, dict[str, str]] = {}
        self._model, self._random = model, {"n_random": n_random, "seed": seed}
        verdict = ipywidgets.HTML(html.escape(study.verdict))
        guard = View("guard", "Does the model refuse?", self._guard)
        if study.direction is None:
            self.rows = [[guard]]
            self.begin()
            bar, *views = self.children
            self.children = [bar, verdict, *views]
            return
        given = {"restricted": restricted, "harmless": harmless}
        self._asked = {name: self._others(name, of) for name, of in given.items()}
        self._edits = edits_of(study)
        with self._lock:
            self._plane_of = projections(model, self._asked, study)
            self._of_candidates = candidate_projections(model, self._asked, _means(study))
        self._places = sorted(set(study.candidates["position"]))
        self._name_all()
        self._lay_out(guard)
        self._table = ipywidgets.HTML()
        self.begin(self._controls(), **self._chosen_candidate(), prompt=0)
        self._table.value = self._tabulated()
        bar, *views = self.children
        self.children = [bar, verdict, *views, self._table]

    def _lay_out(self, guard: View) -> None:
        here = ("layer", "pos")
        ring = tuple(Fill(f"ring_{side}", ("prompt",), side, 1) for side in "xy")
        self.rows = [
            [
                View(
                    "selection", "Each candidate: click one", self._selection, (),
                    {"x": "pos", "y": "layer"},
                ),
            ],
            [
                View(
                    "projections", "Requests on the candidate at {pos}, before block {layer}",
                    self._projections, here,
                ),
                View(
                    "plane", "Each request: click one", self._plane, ("prompt",),
                    {"index": "prompt"}, {}, ring,
                ),
            ],
            [
                View("effects", "What edits along the chosen direction do", self._effects,
                     ("metric",)),
                View("dose", "How much of it does it take?", self._dose, ("metric",)),
            ],
            [
                guard,
                View(
                    "request", "Request {prompt}", self._request, ("prompt",), marks={},
                    fills=(Fill("words", ("prompt",), "tokens", None),),
                ),
            ],
        ]  # fmt: skip

    def _controls(self) -> list[ipywidgets.Widget]:
        compute = ipywidgets.Button(description="Compute", tooltip="Measure the dose-response")
        compute.on_click(lambda button: self.compute())
        generate = ipywidgets.Button(description="Generate", tooltip="Answer the selected request")
        generate.on_click(lambda button: self.generate())
        for button in (compute, generate):
            button.layout.width = "auto"
        found: list[ipywidgets.Widget] = [menu(self, "metric", _METRICS, "Metric")]
        if len(self.labels["prompt"]) <= _MOST_IN_MENU:
            named = [(name, i) for i, name in enumerate(self.labels["prompt"])]
            found.append(menu(self, "prompt", named, "Request", of=self.selection))
        return [*found, compute, generate]

    def compute(self, doses: Sequence[float] = DOSES) -> None:
        """Measure the dose-response in the background; `wait()` waits for it.

        Args:
            doses: See `llama_probe.refusal.dose_response`.
        """
        study = self._with_direction()

        def job(progress: Any) -> pd.DataFrame:
            return dosed(self._model, study, self._asked, doses, progress, **self._random)

        def keep(frame: pd.DataFrame) -> None:
            self.doses = frame
            self.redraw("dose")

        self.run(job, keep)

    def generate(self) -> None:
        """Answer the selected request, plain and under each edit; `wait()` waits for it."""
        self._with_direction()
        prompt = self.prompt
        asked = self._request_of(prompt)

        def job(progress: Any) -> dict[str, str]:
            return answered(self._model, asked, self._edits, progress)

        def keep(said: dict[str, str]) -> None:
            self.answers[prompt] = said
            self._table.value = self._tabulated()

        self.run(job, keep)

    def moved(self, names: set[str]) -> None:
        """The answers are those to the selected request."""
        if "prompt" in names:
            self._table.value = self._tabulated()

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """Only the points of the plane's first trace are requests."""
        if view.name != "plane" or not point.get("trace"):
            super().clicked(view, point)

    def _with_direction(self) -> RefusalStudy:
        if self.study.direction is None:
            raise InputError(f"there is no refusal direction to edit: {self.study.verdict}")
        return self.study

    def _others(self, name: str, given: Any) -> Asked:
        """The requests of a set that the study was not fitted on."""
        study = self.study
        if given is None:
            return study.asked["report"][name]
        how = {name: study.record[name] for name in ("template", "system")}
        asked = ask(self._model, given, template=how["template"], system=how["system"])
        seen = {tuple(one.ids) for one in study.asked["fit"][name].encoded}
        left = [row for row, one in enumerate(asked.encoded) if tuple(one.ids) not in seen]
        if not left:
            raise InputError(
                f"all {len(asked)} {name} requests are among those that the study was fitted on: "
                "give others, or none for those of its reporting part"
            )
        return asked[left]

    def _name_all(self) -> None:
        requests = zip(self._plane_of["set"], self._plane_of["prompt"], strict=True)
        ids = self._asked["restricted"].encoded[0].ids
        tokens = self._model.to_str_tokens(ids)
        self.labels = {
            "pos": [f"{place}: {visible(tokens[place])}".replace("-", "−", 1)
                    for place in self._places],
            "layer": numbers(self._model.cfg.n_layers),
            "prompt": [f"{i}, {name}: {clip(text, 60)}" for i, (name, text) in enumerate(requests)],
        }  # fmt: skip

    def _chosen_candidate(self) -> dict[str, int]:
        chosen = self.study.candidates.query("chosen").iloc[0]
        return {"layer": int(chosen["layer"]), "pos": self._places.index(chosen["position"])}

    def _request_of(self, prompt: int) -> Asked:
        name, request = self._plane_of.loc[prompt, ["set", "request"]]
        return self._asked[name][[int(request)]]

    def _guard(self) -> go.Figure:
        return plots.refusal_guard(self.study.guard.frame, title="")

    def _selection(self) -> go.Figure:
        return plots.refusal(self.study.candidates)

    def _projections(self) -> go.Figure | None:
        position = self._places[self.pos]
        frame = self._of_candidates
        frame = rows(frame, (frame["layer"] == self.layer) & (frame["position"] == position))
        if not frame["refusal"].notna().to_numpy().any():
            self.say("This candidate is 0: nothing differs there yet.")
            return None
        return plots.refusal_projections(frame, self._said_of(position))

    def _said_of(self, position: int) -> str:
        """The three scores of the picked candidate, and what became of it."""
        frame = self.study.candidates
        here = (frame["position"] == position) & (frame["layer"] == self.layer)
        one = rows(frame, here).to_dict("records")[0]
        end = "passes" if not one["dropped"] else f"dropped: {one['dropped']}"
        if one["chosen"]:
            end = "chosen"
        said = (
            f"Score {one['refusal_score']:.2f} ablated, {one['steering_score']:.2f} added; "
            f"KL {one['kl_div_score']:.3g}; {end}"
        )
        return said.replace("-", "−")

    def _plane(self) -> go.Figure:
        figure = plots.refusal_plane(self._plane_of, title="")
        points, *legend = cast(Any, figure.data)
        ring = go.Scatter(
            x=points.x[[self.prompt]], y=points.y[[self.prompt]], mode="markers", marker=_RING,
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        return go.Figure([points, ring, *legend], figure.layout)

    def _effects(self) -> go.Figure:
        return plots.refusal_effects(self.study.effects, title="", metric=self.metric)

    def _dose(self) -> go.Figure | None:
        if self.doses is None:
            return None
        return plots.dose_response(self.doses, title="", metric=self.metric)

    def _request(self) -> Strip:
        return Strip(_words(self._plane_of["prompt"].iloc[self.prompt]))

    def _tabulated(self) -> str:
        request = str(self.labels["prompt"][self.prompt])
        return table(request, self.answers.get(self.prompt), self.redact)

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """Where the ring goes, and the requests' texts; answers stay out of a page."""
        if self.study.direction is None:
            return {}
        return {
            "ring_x": self._plane_of[["harmfulness"]].to_numpy(np.float32),
            "ring_y": self._plane_of[["refusal"]].to_numpy(np.float32),
            "words": [list(map(visible, _words(text))) for text in self._plane_of["prompt"]],
        }

    def controls(self) -> Sequence[str]:
        """The requests have a menu, if they are few."""
        named = self.labels.get("prompt", ())
        return ["prompt"] if 0 < len(named) <= _MOST_IN_MENU else []

    def note(self) -> str:
        """The verdict."""
        return self.study.verdict


def _means(study: RefusalStudy) -> Any:
    if study.means is None:
        raise InputError("this study holds no means, so that no candidate can be shown")
    return study.means


def _words(text: str) -> list[str]:
    """A text as a strip shows it, a word at a time."""
    parts = text.split(" ")
    return [parts[0], *(f" {part}" for part in parts[1:])]
