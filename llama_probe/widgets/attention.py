"""Where the heads of a model look, from all heads to one weight."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from traitlets import Bool, Enum, Int, Unicode

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.lens.attention import AttentionMaps, attention_maps
from llama_probe.lens.heads import METRICS
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, Strip, View
from llama_probe.plots.attention import MOST, without_future
from llama_probe.plots.labels import token
from llama_probe.widgets.controls import menu, switch
from llama_probe.widgets.explorer import Explorer, Selected, named, numbers
from llama_probe.widgets.selection import Selection

_MEASURES = {"raw": "attention weight (fraction)", "value-weighted": "share of what is moved"}
# What a page may hold: so many weights, and so many lists of tokens.
_MOST_WEIGHTS = 32 * 512 * 512
_MOST_LISTS = 5000


class AttentionExplorer(Explorer):
    """A score of every head; a head's pattern; a query's and a key's share of it; what it writes.

    Click a head in the grid, a weight in the pattern, a token in a strip. Above 256 tokens the
    pattern shows the largest weight of each square, and the exact ones of what is zoomed into.

    Args:
        model: The model.
        prompts: A text, or tokens [pos]; or a list of texts, to choose from and compare.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        prompt, layer, head, query, key: What is selected.
        metric: The score in the grid: one of `lp.head_scores`.
        weights: "raw", or "value-weighted": how much each key brings, not how much it is looked at.
        compare: "off", "side by side" or "difference": the selected head against `other_head` of
            `other_layer`, on `other_prompt`.
        this_key_only: Whether what is written is of the selected key alone.

    Raises:
        InputError: A prompt is empty or does not fit into the context.
    """

    prompt, layer, head, query, key = (Selected() for _ in range(5))
    options = (
        "metric", "weights", "compare", "other_prompt", "other_layer", "other_head",
        "this_key_only",
    )  # fmt: skip
    metric = Unicode("induction")
    weights = Enum(list(_MEASURES), "raw")
    compare = Enum(["off", "side by side", "difference"], "off")
    other_prompt, other_layer, other_head = Int(0), Int(0), Int(0)
    this_key_only = Bool(False)

    def __init__(self, model: Llama, prompts: Any, *, selection: Selection | None = None) -> None:
        super().__init__(selection, model)
        several = isinstance(prompts, list | tuple) and all(isinstance(p, str) for p in prompts)
        self._prompts: Sequence[Any] = list(prompts) if several else [prompts]
        if not len(self._prompts):
            raise InputError("there is no prompt to look at: the list is empty")
        self.title = f"Attention of {model.cfg.model_name}"
        self._model = model
        self._maps = lru_cache(8)(lambda prompt: attention_maps(model, self._prompts[prompt]))
        self._scores = lru_cache(8)(lambda prompt: self._maps(prompt).scores())
        self._pattern = lru_cache(32)(self._worked_out)
        self._window: tuple[slice, slice] | None = None
        cfg = model.cfg
        self.labels = {"layer": numbers(cfg.n_layers), "head": numbers(cfg.n_heads)}
        if several:
            self.labels["prompt"] = [f"{i}: {text}" for i, text in enumerate(self._prompts)]
        self._name_positions()
        if not self._scores(self.here("prompt")).query("metric == 'induction'").value.notna().any():
            self.metric = "previous_token"
        self._lay_out()
        n_pos = len(self._tokens())
        self.begin(self._menus(), query=n_pos - 1, key=0, **self._best_head())

    def _lay_out(self) -> None:
        strip = {"query": "Q", "key": "K"}
        place, pattern = ("prompt", "layer", "head"), ("layer", "head")
        compared = ("compare", "other_prompt", "other_layer", "other_head")
        self.rows = [
            [
                View(
                    "grid", "A score of every head: click one", self._grid,
                    ("prompt", "metric"), {"x": "head", "y": "layer"},
                ),
                View(
                    "map", "Where head {head} of layer {layer} looks: click a weight", self._map,
                    (*place, "weights", *compared), {"x": "key", "y": "query"},
                    fills=(Fill("pattern", self._stored(*pattern), pool=self._pool()),),
                    zooms=True, grow=1.8,
                ),
            ],
            [
                View(
                    "other", "Where the other head looks", self._other,
                    (*place, "weights", *compared), {"x": "key", "y": "query"},
                ),
            ],
            [
                View(
                    "row", "What {query} looks at", self._row, (*place, "query", "weights"),
                    {"x": "key"}, strip,
                    (Fill("pattern", self._stored(*pattern, "query"), "values", None),),
                )
            ],
            [
                View(
                    "column", "Who looks at {key}", self._column, (*place, "key", "weights"),
                    {"x": "query"}, strip,
                    (Fill("pattern", self._stored(*pattern, None, "key"), "values", None),),
                )
            ],
            [
                View(
                    "writes", "What head {head} of layer {layer} writes at {query}", self._writes,
                    (*place, "query", "key", "this_key_only"), marks={}, fills=self._written(),
                )
            ],
        ]  # fmt: skip

    def _menus(self) -> list[ipywidgets.Widget]:
        cfg = self._model.cfg
        layers, heads = range(cfg.n_layers), range(cfg.n_heads)
        menus = [
            menu(self, "metric", METRICS, "Score"),
            menu(self, "weights", _MEASURES, "Weights"),
            menu(self, "compare", ["off", "side by side", "difference"], "Compare"),
            menu(self, "other_layer", layers, "with layer"),
            menu(self, "other_head", heads, "head"),
            switch(self, "this_key_only", "Writes: from this key only"),
        ]
        if len(self._prompts) > 1:
            which = [(text, i) for i, text in enumerate(self.labels["prompt"])]
            menus.insert(0, menu(self, "prompt", which, "Prompt", of=self.selection))
            menus.insert(-1, menu(self, "other_prompt", which, "on prompt"))
        return menus

    def moved(self, names: set[str]) -> None:
        """Another prompt has other positions; another pattern is shown whole."""
        if "prompt" in names:
            self._window = None
            self._name_positions()
            self._lay_out()  # a page holds more or less of another length
            last = len(self._tokens()) - 1
            self.selection.choose(query=min(self.query, last), key=min(self.key, last))

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """In a square of many weights, the click means the largest."""
        if view.name in ("map", "other"):
            point = {**point, **self._largest(point)}
        super().clicked(view, point)

    def zoomed(self, view: View, ranges: dict[str, list[Any]] | None) -> None:
        """Show the exact weights of what is zoomed into, if the whole is too large for that."""
        n_pos = len(self._tokens())

        def part(ends: list[Any]) -> slice:
            low, high = sorted(ends)
            return slice(max(0, int(low + 0.5)), min(n_pos, int(high + 0.5) + 1))

        window = None if ranges is None else (part(ranges["y"]), part(ranges["x"]))
        if window != self._window:
            self._window = window
            self.redraw("map", "other")

    def _grid(self) -> go.Figure:
        return plots.head_scores(self._scores(self.here("prompt")), self.metric, title="")

    def _map(self) -> go.Figure:
        own = self._pattern(self.here("prompt"), self.layer, self.head, self.weights)
        minus = self._others() if self.compare == "difference" else None
        return self._drawn_pattern(own, self._tokens(), minus)

    def _other(self) -> go.Figure | None:
        if self.compare != "side by side":
            return None
        return self._drawn_pattern(self._others(), self._maps(self.other_prompt).tokens)

    def _others(self) -> np.ndarray:
        return self._pattern(self.other_prompt, self.other_layer, self.other_head, self.weights)

    def _drawn_pattern(
        self, pattern: np.ndarray, tokens: list[str], minus: np.ndarray | None = None
    ) -> go.Figure:
        whole = slice(0, len(tokens))
        # Another prompt's length may leave nothing of the part that is zoomed into.
        window = self._window if len(tokens) == len(self._tokens()) else None
        queries, keys = window or (whole, whole)
        figure = plots.attention(
            pattern[queries, keys],
            tokens[queries],
            keys=tokens[keys],
            minus=None if minus is None else minus[queries, keys],
            at=(queries.start, keys.start),
            measure=_MEASURES[self.weights] if minus is None else "difference",
        )
        # Zooming further keeps its frame; another prompt starts anew.
        return figure.update_layout(uirevision=f"{self.here('prompt')} {len(tokens)}")

    def _row(self) -> Strip:
        pattern = self._pattern(self.here("prompt"), self.layer, self.head, self.weights)
        return Strip(self._tokens(), without_future(pattern)[self.query], "of the weight")

    def _column(self) -> Strip:
        pattern = self._pattern(self.here("prompt"), self.layer, self.head, self.weights)
        return Strip(self._tokens(), without_future(pattern)[:, self.key], "of their weight")

    def _writes(self) -> go.Figure:
        key = self.key if self.this_key_only else None
        maps = self._maps(self.here("prompt"))
        return plots.top_tokens(maps.writes(self.layer, self.head, self.query, key))

    def _worked_out(self, prompt: int, layer: int, head: int, weights: str) -> np.ndarray:
        maps: AttentionMaps = self._maps(prompt)
        of = maps.pattern if weights == "raw" else maps.value_weighted
        return of(layer, head).float().numpy(force=True)

    def _largest(self, point: dict[str, Any]) -> dict[str, int]:
        size = self._pool() if self._window is None else 1
        query, key = int(round(point["y"])), int(round(point["x"]))
        if size == 1:
            return {"y": query, "x": key}
        pattern = self._pattern(self.here("prompt"), self.layer, self.head, self.weights)
        square = pattern[query : query + size, key : key + size]
        row, column = np.unravel_index(int(square.argmax()), square.shape)
        return {"y": query + int(row), "x": key + int(column)}

    def _pool(self) -> int:
        """How many positions a side one cell of the whole pattern stands for."""
        return -(-len(self._tokens()) // MOST)

    def _tokens(self) -> list[str]:
        return self._maps(self.here("prompt")).tokens

    def _name_positions(self) -> None:
        names = named(self._tokens())
        self.labels = {**self.labels, "query": names, "key": names}

    def _best_head(self) -> dict[str, int]:
        scores = self._scores(self.here("prompt"))
        chosen = scores[(scores.metric == self.metric) & scores.value.notna()]
        if chosen.empty:
            return {"layer": 0, "head": 0}
        best = chosen.loc[chosen.value.idxmax()]
        return {"layer": int(best["layer"]), "head": int(best["head"])}

    def _stored(self, *index: str | None) -> tuple[str | None, ...]:
        """How a page's patterns are indexed: all heads of all layers, of one layer, or one head."""
        kept = ("layer", "head") if self._scope() == "all" else ("head",)
        dropped = {"layer", "head"} - set(kept if self._scope() != "head" else ())
        return tuple(name for name in index if name not in dropped)

    def _scope(self) -> str:
        cfg, area = self._model.cfg, len(self._tokens()) ** 2
        if cfg.n_layers * cfg.n_heads * area <= _MOST_WEIGHTS:
            return "all"
        return "layer" if cfg.n_heads * area <= _MOST_WEIGHTS else "head"

    def _written(self) -> tuple[Fill, ...]:
        cfg = self._model.cfg
        if self._scope() != "all" or cfg.n_layers * cfg.n_heads * len(self._tokens()) > _MOST_LISTS:
            return ()
        index = ("layer", "head", "query")
        return Fill("written", index, "x"), Fill("written_tokens", index, "text")

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """The patterns, as many as a page may hold, and what is written."""
        cfg, scope = self._model.cfg, self._scope()
        layers = range(cfg.n_layers) if scope == "all" else [self.layer]
        heads = [self.head] if scope == "head" else range(cfg.n_heads)
        prompt = self.here("prompt")

        def weights(layer: int, head: int) -> np.ndarray:
            return without_future(self._worked_out(prompt, layer, head, self.weights))

        patterns = np.array([[weights(layer, head) for head in heads] for layer in layers])
        arrays: dict[str, Any] = {
            "pattern": patterns.squeeze(tuple(range({"all": 0, "layer": 1, "head": 2}[scope])))
        }
        return arrays | (self._all_written() if self._written() else {})

    def _all_written(self) -> dict[str, Any]:
        cfg, maps = self._model.cfg, self._maps(self.here("prompt"))
        frames = [
            [
                [maps.writes(layer, head, query) for query in range(len(maps.tokens))]
                for head in range(cfg.n_heads)
            ]
            for layer in range(cfg.n_layers)
        ]
        return {
            "written": np.array([[[f.value for f in row] for row in part] for part in frames]),
            "written_tokens": [
                [[[token(text) for text in f.token] for f in row] for row in part]
                for part in frames
            ],
        }

    def controls(self) -> Sequence[str]:
        """Only what the page holds all of."""
        return {"all": ["layer", "head"], "layer": ["head"], "head": []}[self._scope()]

    def note(self) -> str:
        """What a long prompt leaves no room for."""
        return {
            "all": "",
            "layer": f"This page holds the patterns of layer {self.layer} only.",
            "head": f"This page holds the pattern of head {self.head} of layer {self.layer} only.",
        }[self._scope()]
