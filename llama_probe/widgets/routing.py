"""Which experts are used, by which tokens, and what becomes of the text without one."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor
from traitlets import Enum

from llama_probe import plots
from llama_probe.hooks import act_name
from llama_probe.interventions import ablate_experts, force_experts
from llama_probe.lens.common import raised_and_lowered, wide
from llama_probe.model.llama import Llama
from llama_probe.model.norm import rms
from llama_probe.page import Fill, Strip, View
from llama_probe.plots import frames
from llama_probe.plots.labels import token
from llama_probe.routing.report import routing_report
from llama_probe.routing.routes import routes_of
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected, named, numbers
from llama_probe.widgets.selection import Selection

_EDITS = {"none": None, "ablate": ablate_experts, "force": force_experts}
_TOP = 8  # tokens that are listed
_MOST_PROMPTS = 16  # of which an expert's output is read
_MOST_TOKENS = 256  # of a prompt, in the map of tokens and experts
_MOST_LISTS = 10_000  # of tokens, on a page


class RoutingExplorer(Explorer):
    """The load of every expert; a prompt's routes; a token's way; an expert's card; what it does.

    Click an expert in the load map, a token in the strip. The k experts with the highest scores
    are chosen. Under *Edit* the selected expert is taken out, or all tokens are sent to it, and the
    prediction after the prompt and the loss on it are shown beside those of the plain model.

    Args:
        model: A model with a mixture of experts.
        prompts: Texts, of which the load is counted and one is shown.
        labels: A label for each prompt, such as its domain, for the expert's card.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        layer, expert, prompt, pos: What is selected.
        edit: "none", "ablate" or "force".
        report: The `lp.routing_report` of the prompts.

    Raises:
        InputError: The model has no mixture of experts, or a prompt cannot be used.
    """

    layer, expert, prompt, pos = (Selected() for _ in range(4))
    options = ("edit",)
    edit = Enum(list(_EDITS), "none")

    def __init__(
        self,
        model: Llama,
        prompts: str | Sequence[str],
        labels: Sequence[Any] | None = None,
        *,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"Routing in {model.cfg.model_name}"
        self._model = model
        self._prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._routes = routes_of(model, self._prompts, labels)
        self.report = routing_report(self._routes)
        self._scores = lru_cache(8)(self._router_scores)
        self._outputs = lru_cache(64)(self._promoted)
        self._effects = lru_cache(64)(self._effect_of)
        self.labels = {
            "layer": numbers(model.cfg.n_layers),
            "expert": numbers(self._routes.n_experts),
            "prompt": [f"{i}: {text}" for i, text in enumerate(self._prompts)],
        }
        self._name_positions()
        self._lay_out()
        self.begin(self._menus(), prompt=0, pos=0, **self._busiest())

    def _lay_out(self) -> None:
        here = ("prompt", "layer")
        self.rows = [
            [
                View(
                    "load", "How much each expert is used: click one", self._load,
                    (), {"x": "expert", "y": "layer"}, grow=1.4,
                ),
                View(
                    "transition", "Where the tokens of layer {layer} go next", self._transition,
                    ("layer",), {"y": "expert"}, fills=self._next(),
                ),
                View(
                    "together", "Which experts of layer {layer} are chosen together",
                    self._together, ("layer",), {"y": "expert"},
                ),
            ],
            [
                View(
                    "strip", "What layer {layer} gives expert {expert}: click a token",
                    self._strip, (*here, "expert"), {"x": "pos"}, {"pos": "•"},
                    (Fill("scores", ("layer", None, "expert"), "values", None),),
                ),
            ],
            [
                View(
                    "tokens", "The router's scores in layer {layer}: the highest are chosen",
                    self._tokens_map, here, {"x": "expert", "y": "pos"},
                    fills=(Fill("scores", ("layer",)),),
                ),
                View(
                    "route", "The way of {pos} through the layers", self._route,
                    ("prompt", "pos"), {"x": "expert", "y": "layer"},
                    fills=(Fill("moe_scores", (None, "pos")),),
                ),
            ],
            [
                View(
                    "card", "Tokens that expert {expert} of layer {layer} takes most of",
                    self._card, ("layer", "expert"), marks={}, fills=self._lists(),
                ),
                View(
                    "domains", "Load of expert {expert} of layer {layer} by label",
                    self._domains, ("layer", "expert"), marks={}, fills=self._by_label(),
                ),
                View(
                    "promotes", "What expert {expert} of layer {layer} writes, in the vocabulary",
                    self._promotes, ("layer", "expert"), marks={},
                ),
            ],
            [
                View(
                    "effect",
                    "The next token, plain and with expert {expert} of layer {layer} edited",
                    self._effect, (*here, "expert", "edit"), marks={},
                ),
            ],
        ]  # fmt: skip

    def _menus(self) -> list[ipywidgets.Widget]:
        prompts = [(text, i) for i, text in enumerate(self.labels["prompt"])]
        return [
            menu(self, "prompt", prompts, "Prompt", of=self.selection),
            menu(self, "edit", _EDITS, "Edit"),
        ]

    def moved(self, names: set[str]) -> None:
        """Another prompt has other positions."""
        if "prompt" in names:
            self._name_positions()

    def _name_positions(self) -> None:
        names = named(self._tokens(self.here("prompt")))
        self.labels = {**self.labels, "pos": names}

    def _tokens(self, prompt: int) -> list[str]:
        ids = self._routes.tokens[self._routes.prompt == prompt]
        return self._model.to_str_tokens(torch.from_numpy(ids))

    def _busiest(self) -> dict[str, int]:
        load = self.report.load[self.report.load.metric == "load"]
        best = load.loc[load.value.idxmax()]
        return {"layer": int(best["layer"]), "expert": int(best["expert"])}

    def _moe_layer(self) -> int:
        """The selected layer, or the last mixture of experts before it."""
        layers = self._routes.layers
        return max((layer for layer in layers if layer <= self.layer), default=layers[0])

    def _load(self) -> go.Figure:
        return plots.routing_load(self.report.load, title="")

    def _transition(self) -> go.Figure | None:
        frame, layer = self.report.transition, self._moe_layer()
        if frame is None or layer == self._routes.layers[-1]:
            return None
        return plots.routing_transition(frame, layer, title="")

    def _together(self) -> go.Figure | None:
        frame = self.report.coactivation
        return frame if frame is None else plots.routing_coactivation(frame, self._moe_layer(), "")

    def _strip(self) -> Strip:
        scores = self._scores(self.prompt)[self._moe_layer(), :, self.expert]
        return Strip(self._tokens(self.prompt), scores, "of the router's score")

    def _tokens_map(self) -> go.Figure:
        scores = self._scores(self.prompt)[self._moe_layer(), :_MOST_TOKENS]
        return plots.routing_scores(scores, tokens=self._tokens(self.prompt)[:_MOST_TOKENS])

    def _route(self) -> go.Figure:
        layers = list(self._routes.layers)
        return plots.routing_scores(self._scores(self.prompt)[layers, self.pos], layers=layers)

    def _card(self) -> go.Figure | None:
        frame = self._taken(self._moe_layer(), self.expert)
        return plots.top_tokens(frame, unit="share of its tokens") if len(frame) else None

    def _taken(self, layer: int, expert: int) -> pd.DataFrame:
        """The tokens that an expert takes most often, and which share of its tokens they are."""
        chosen = self._routes.experts[self._routes.layers.index(layer)]
        ids, counts = np.unique(
            self._routes.tokens[(chosen == expert).any(axis=-1)], return_counts=True
        )
        order = np.argsort(-counts, kind="stable")[:_TOP]
        texts = self._model.to_str_tokens(torch.from_numpy(ids[order])) if len(ids) else []
        return pd.DataFrame({"token": texts, "value": counts[order] / max(counts.sum(), 1)})

    def _domains(self) -> go.Figure | None:
        frame = self.report.by_label
        if frame is None:
            return None
        here = (frame.layer == self._moe_layer()) & (frame.expert == self.expert)
        return plots.routing_by_label(frames.rows(frame, here))

    def _promotes(self) -> go.Figure | None:
        frame = self._outputs(self._moe_layer(), self.expert)
        return None if frame is None else plots.top_tokens(frame)

    @torch.no_grad()
    def _promoted(self, layer: int, expert: int) -> pd.DataFrame | None:
        """The tokens whose logits the expert raises and lowers most, over the tokens it takes."""
        moe, total, count = self._model.cfg.moe, 0, 0
        assert moe is not None
        names = [act_name("expert_out", layer), act_name("expert_indices", layer)]
        for prompt in self._prompts[:_MOST_PROMPTS]:
            stream, cache = self._model.run_with_cache(
                prompt, names_filter=names, stop_at_layer=self._model.cfg.n_layers
            )
            taken = (cache[names[1]] == expert)[..., None]
            written = (wide(cache[names[0]]) * taken).sum(dim=2)
            total = total + (written / rms(stream, self._model.ln_final.eps)).sum(dim=(0, 1))
            count += int(taken.sum())
        if not count:
            return None
        logits = wide(self._model.unembed.weight) @ (total / count * self._model.ln_final.weight)
        return raised_and_lowered(self._model, logits, _TOP)

    def _effect(self) -> go.Figure | None:
        if self.edit == "none":
            return None
        frame, losses = self._effects(self.edit, self.prompt, self._moe_layer(), self.expert)
        before, after = losses
        self.say(f"Loss on this prompt: {before:.3f} nats a token, edited {after:.3f}.")
        said = {"ablate": "taken out", "force": "given all tokens"}[self.edit]
        return plots.before_after(frame, f"Expert {said}", unit="probability (fraction)")

    @torch.no_grad()
    def _effect_of(
        self, edit: str, prompt: int, layer: int, expert: int
    ) -> tuple[pd.DataFrame, tuple[float, float]]:
        """The likeliest next tokens and the loss, plain and edited."""
        factory = _EDITS[edit]
        assert factory is not None
        text = self._prompts[prompt]
        runs: list[tuple[Tensor, float]] = []
        for edits in ([], factory({layer: [expert]})):
            with self._model.hooks(edits):
                logits = self._model(text)
                loss = self._model(text, return_type="loss") if logits.shape[1] > 1 else np.nan
            runs.append((wide(logits[0, -1]).softmax(-1), float(loss)))
        (before, loss), (after, edited) = runs
        ids = torch.maximum(before, after).topk(_TOP).indices
        frame = pd.DataFrame(
            {
                "token": self._model.to_str_tokens(ids),
                "before": before[ids].tolist(),
                "after": after[ids].tolist(),
            }
        )
        return frame, (loss, edited)

    @torch.no_grad()
    def _router_scores(self, prompt: int) -> np.ndarray:
        """The router's scores [layer pos expert]: softmax or sigmoid; NaN in dense layers."""
        moe = self._model.cfg.moe
        assert moe is not None
        _, cache = self._model.run_with_cache(
            self._prompts[prompt], names_filter=act_name("router_logits", "*")
        )
        n_pos = len(self._tokens(prompt))
        scores = np.full((self._model.cfg.n_layers, n_pos, moe.n_experts), np.nan, np.float32)
        for layer in self._routes.layers:
            logits = wide(cache["router_logits", layer][0])
            of = logits.sigmoid() if moe.rule == "sigmoid_input" else logits.softmax(-1)
            scores[layer] = of.numpy(force=True)
        return scores

    def _next(self) -> tuple[Fill, ...]:
        return () if self.report.transition is None else (Fill("transition", ("layer",)),)

    def _by_label(self) -> tuple[Fill, ...]:
        return () if self.report.by_label is None else (Fill("by_label", ("layer", "expert"), "y"),)

    def _lists(self) -> tuple[Fill, ...]:
        if len(self._routes.layers) * self._routes.n_experts > _MOST_LISTS:
            return ()
        index = ("layer", "expert")
        return Fill("card", index, "x"), Fill("card_tokens", index, "text")

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """Scores of the selected prompt, and each expert's card."""
        scores = self._scores(self.prompt)[:, :_MOST_TOKENS]
        arrays: dict[str, Any] = {
            "scores": scores, "moe_scores": scores[list(self._routes.layers)],
        }  # fmt: skip
        if self.report.transition is not None:
            arrays["transition"] = self._laid_out(self.report.transition, "next_expert")
        if self.report.by_label is not None:
            arrays["by_label"] = self._laid_out(self.report.by_label, "label")
        return arrays | (self._cards() if self._lists() else {})

    def _laid_out(self, frame: pd.DataFrame, last: str) -> np.ndarray:
        """A frame's values [layer expert last]; NaN in layers that it has not."""
        place, names = pd.factorize(frame[last])
        shape = (self._model.cfg.n_layers, self._routes.n_experts, len(names))
        values = np.full(shape, np.nan, np.float32)
        values[frame.layer, frame.expert, place] = frame.value
        return values

    def _cards(self) -> dict[str, Any]:
        shape = (self._model.cfg.n_layers, self._routes.n_experts, _TOP)
        shares = np.full(shape, np.nan, np.float32)
        texts = np.full(shape, "", dtype=object)
        for layer in self._routes.layers:
            for expert in range(self._routes.n_experts):
                frame = self._taken(layer, expert)
                shares[layer, expert, : len(frame)] = frame.value
                texts[layer, expert, : len(frame)] = [token(text) for text in frame.token]
        return {"card": shares, "card_tokens": texts.tolist()}

    def controls(self) -> Sequence[str]:
        """Both have a menu; the page holds one prompt."""
        return ["layer", "expert"]

    def note(self) -> str:
        """Which prompt it is."""
        prompt = self.labels["prompt"][self.prompt]
        return f"Load and cards: {len(self._prompts)} prompts. Routes: prompt {prompt}."
