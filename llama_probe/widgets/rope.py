"""What rotary position embedding does: how fast its pairs turn, and what they add to a score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from traitlets import Enum, Float, HasTraits, link

from llama_probe import plots
from llama_probe.lens.rope import rope_angles, rope_maps, rope_wavelengths
from llama_probe.model.config import Llama3Scaling, LlamaConfig
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, Linked, Strip, View
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected, named, numbers
from llama_probe.widgets.selection import Selection

_OWN = "this model"
_SCALINGS = {"as it is": "", "none": "not scaled", "linear": "linear", "llama3": "Llama 3's"}
_HEIGHT = 420
# Angles are shown at so many positions: in fewer slow pairs would not be seen to turn.
_LEAST_POSITIONS, _MOST_POSITIONS = 64, 512
# So many numbers of one array a page keeps to 16 bits.
_MOST_NUMBERS = 2**20


class _Terms(NamedTuple):
    """Scores and what they are the sum of; NaN where a query does not look, or nothing turns."""

    scores: np.ndarray  # head query key
    added: np.ndarray  # head query key pair
    amplitudes: np.ndarray  # head query key pair


class RopeExplorer(Explorer):
    """How fast each rotary pair turns, what it adds to a score, and the score against distance.

    Click a pair in any figure, a query and a key in the strips of tokens. The wavelengths and the
    scores against distance may be compared with another RoPE, under which this model's queries and
    keys stay what they are. In a layer without RoPE there are scores, but nothing of pairs.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        max_distance: How far scores against distance go, in tokens.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        layer, head, query, key, pair: What is selected.
        other_theta: The other RoPE's base.
        other_scaling: The other RoPE's scaling: "as it is" in the model, "none", "linear" or
            "llama3", from the model's context on.
        other_factor: By how much "linear" and "llama3" stretch.

    Raises:
        InputError: The prompt is empty or does not fit into the context, or the distance is
            negative.
    """

    layer, head, query, key, pair = (Selected() for _ in range(5))
    options = ("other_theta", "other_scaling", "other_factor")
    other_theta = Float(10000.0, min=1.0, max=1e12)
    other_scaling = Enum(list(_SCALINGS), "as it is")
    other_factor = Float(8.0, min=1.0, max=1e6)

    def __init__(
        self,
        model: Llama,
        prompt: Any,
        *,
        max_distance: int = 128,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"RoPE of {model.cfg.model_name}"
        self._cfg = cfg = model.cfg
        self.other_theta = cfg.rope_theta
        self._maps = rope_maps(model, prompt)
        self._max_distance = max_distance
        self._terms_of = lru_cache(64)(
            lambda layer, head, query: self._terms(layer, [head], [query])
        )
        self._curve = lru_cache(64)(self._worked_out)
        self._tokens = self._maps.tokens
        positions = named(self._tokens)
        self.labels = {
            "layer": [f"{i}" if has else f"{i} (no RoPE)" for i, has in enumerate(cfg.rope_layers)],
            "head": numbers(cfg.n_heads),
            "query": positions,
            "key": positions,
            "pair": numbers(cfg.d_head // 2),
        }
        self._lay_out()
        self._menus = {name: self._menu(name) for name in ("layer", "head")}
        rotary = [layer for layer, has in enumerate(cfg.rope_layers) if has]
        first = {"layer": min(rotary, default=0), "query": len(positions) - 1}
        self.begin(self._controls(), **first, head=0, key=0, pair=0)
        self.moved({"layer", "head"})

    def _lay_out(self) -> None:
        score, place = ("layer", "head", "query"), ("layer", "head")
        marks = {"query": "Q", "key": "K"}
        self.rows = [
            [
                View(
                    "wavelengths", "How many tokens each pair takes for a turn", self._wavelengths,
                    self.options, {"x": "pair"},
                ),
                View(
                    "angles", "By which angle each pair is turned at each position", self._angles,
                    (), {"x": "query", "y": "pair"},
                ),
            ],
            [
                View(
                    "queries", "Choose a query: {query}", lambda: Strip(self._tokens),
                    (), {"x": "query"}, marks,
                )
            ],
            [
                View(
                    "keys", "Scores of {query} in head {head} of layer {layer}: choose a key",
                    self._keys, score, {"x": "key"}, marks,
                    (Fill("score", self._stored(*score), "values", None),),
                )
            ],
            [
                View(
                    "contributions", "What each pair adds to the score of {query} with {key}",
                    self._contributions, (*score, "key"), {"x": "pair"}, fills=self._bars(),
                ),
                View(
                    "distance", "The mean score in head {head} of layer {layer} by distance",
                    self._distance, (*place, *self.options), marks={}, fills=(
                        Fill("distance", self._stored(*place), "y", 0),
                        Fill("other_distance", self._stored(*place), "y", 1),
                    ),
                ),
            ],
            [
                View(
                    "of_pair", "What pair {pair} adds to the scores of {query}", self._of_pair,
                    (*score, "pair"), {"x": "key"}, marks,
                    (Fill("added", self._stored(*score, None, "pair"), "values", None),),
                )
            ],
        ]  # fmt: skip

    def _bars(self) -> tuple[Fill, ...]:
        index = self._stored("layer", "head", "query", "key")
        return (
            Fill("lowest", index, "base", 0),
            Fill("range", index, "y", 0),
            Fill("added", index, "y", 1),
            Fill("sum", index, "name", 1),
        )

    def _controls(self) -> list[ipywidgets.Widget]:
        scalings = [(text or name, name) for name, text in _SCALINGS.items()]
        return [
            *self._menus.values(),
            _number(self, "other_theta", "Compare with theta"),
            menu(self, "other_scaling", scalings, "scaling"),
            _number(self, "other_factor", "by"),
        ]

    def _menu(self, name: str) -> ipywidgets.Dropdown:
        """A menu of the selection, which may hold what is not in it: another explorer's choice."""
        choices = [(text, value) for value, text in enumerate(self.labels[name])]
        box = ipywidgets.Dropdown(options=choices, description=name.capitalize())
        box.style.description_width = "initial"
        box.layout.width = "auto"
        box.observe(lambda change: self.selection.choose(**{name: change.new}), "value")
        return box

    def moved(self, names: set[str]) -> None:
        """The menus follow; what there is nothing to see of is said."""
        for name in names & self._menus.keys():
            if self._fits(name, getattr(self.selection, name)):
                self._menus[name].value = getattr(self.selection, name)
        self.say(self._lacking())

    def _lacking(self) -> str:
        if not self._cfg.rope_layers[self.layer]:
            return f"Layer {self.layer} has no RoPE: its scores know no distance and no pairs."
        if self.key > self.query:
            return f"Position {self.query} does not see position {self.key}, which comes after it."
        return ""

    def _wavelengths(self) -> go.Figure:
        frames = [rope_wavelengths(cfg, name) for name, cfg in self._settings().items()]
        figure = plots.rope_wavelengths(pd.concat(frames), title="")
        return figure.update_layout(height=_HEIGHT)

    def _angles(self) -> go.Figure:
        n_pos = min(max(len(self._tokens), _LEAST_POSITIONS), _MOST_POSITIONS, self._cfg.n_ctx)
        figure = plots.rope_angles(rope_angles(self._cfg, n_pos), title="")
        # A label for every eighth position and every pair, or for fewer: half a page has no more.
        figure.update_xaxes(dtick=8 * -(-n_pos // 64), tickangle=0)
        figure.update_yaxes(dtick=-(-len(self.labels["pair"]) // 16))
        return figure.update_layout(height=_HEIGHT)

    def _keys(self) -> Strip:
        terms = self._terms_of(self.layer, self.head, self.query)
        return Strip(self._tokens, terms.scores[0, 0], "(score)")

    def _of_pair(self) -> Strip:
        terms = self._terms_of(self.layer, self.head, self.query)
        return Strip(self._tokens, terms.added[0, 0, :, self.pair], "of the score")

    def _contributions(self) -> go.Figure:
        terms = self._terms_of(self.layer, self.head, self.query)
        at = {name: getattr(self, name) for name in ("layer", "head", "query", "key")}
        frame = rope_wavelengths(self._cfg).assign(
            **at,
            value=terms.added[0, 0, self.key],
            amplitude=terms.amplitudes[0, 0, self.key],
        )
        figure = plots.rope_contributions(frame, title="")
        figure.data[1].name = self._summed(self.layer, float(terms.scores[0, 0, self.key]))
        return figure.update_layout(height=_HEIGHT)

    def _distance(self) -> go.Figure:
        frames = [
            pd.DataFrame(
                {
                    **dict.fromkeys(["query", "key"]),
                    "layer": self.layer,
                    "head": self.head,
                    "setting": name,
                    "distance": range(self._max_distance + 1),
                    "value": self._curve(self.layer, cfg)[self.head],
                }
            )
            for name, cfg in self._settings().items()
        ]
        figure = plots.rope_distance(pd.concat(frames), title="")
        return figure.update_layout(height=_HEIGHT)

    def _settings(self) -> dict[str, LlamaConfig]:
        """By name the model's own RoPE, and the other one if it is another."""
        scaling, factor = self.other_scaling, self.other_factor
        other = _turned_otherwise(self._cfg, self.other_theta, scaling, factor)
        if other == self._cfg:
            return {_OWN: self._cfg}
        words = _SCALINGS[scaling]
        if scaling in ("linear", "llama3"):
            words += f" scaling by {factor:g}"
        # "with" comes after "this" in the alphabet, and so in the figures.
        name = f"with theta {self.other_theta:g}" + (f", {words}" if words else "")
        return {_OWN: self._cfg, name: other}

    def _worked_out(self, layer: int, cfg: LlamaConfig) -> np.ndarray:
        """All heads' scores against distance [head, distance]."""
        if not self._cfg.rope_layers[layer]:
            return np.full((cfg.n_heads, self._max_distance + 1), np.nan, np.float32)
        curves = self._maps.curves(layer, max_distance=self._max_distance, rope=cfg)
        return curves.float().numpy(force=True)

    def _terms(self, layer: int, heads: Any, queries: Any) -> _Terms:
        scores = self._maps.scores(layer, heads, queries).float().numpy(force=True)
        n_pos = len(self._tokens)
        seen = np.tri(n_pos, dtype=bool)[queries]
        if self._cfg.rope_layers[layer]:
            added, most = (
                of(layer, heads, queries).float().numpy(force=True)
                for of in (self._maps.added, self._maps.amplitudes)
            )
        else:
            added = most = np.full((*scores.shape, self._cfg.d_head // 2), np.nan, np.float32)
        none = np.float32(np.nan)
        return _Terms(
            np.where(seen, scores, none),
            *(np.where(seen[..., None], x, none) for x in (added, most)),
        )

    def _summed(self, layer: int, score: float) -> str:
        """What the legend says of the bars."""
        if not self._cfg.rope_layers[layer]:
            return f"no RoPE in layer {layer}"
        return "not seen: a later key" if np.isnan(score) else f"in this run (sum: {score:.3f})"

    def _kept(self) -> tuple[str, ...]:
        """What a page has room to let a reader choose, besides key and pair."""
        n_pos = len(self._tokens)
        sizes = {"layer": self._cfg.n_layers, "head": self._cfg.n_heads, "query": n_pos}
        names = tuple(sizes)
        one = n_pos * self._cfg.d_head // 2
        while names and one * np.prod([sizes[name] for name in names]) > _MOST_NUMBERS:
            names = names[1:]
        return names

    def _stored(self, *index: str | None) -> tuple[str | None, ...]:
        """How a page's arrays are indexed: by what of this is not the same all over the page."""
        dropped = {"layer", "head", "query"} - set(self._kept())
        return tuple(name for name in index if name not in dropped)

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """Scores, what pairs add to them and could add, and scores against distance."""
        kept = self._kept()
        layers = list(range(self._cfg.n_layers)) if "layer" in kept else [self.layer]
        heads, queries = (
            slice(None) if name in kept else [getattr(self, name)] for name in ("head", "query")
        )
        terms = [self._terms(layer, heads, queries) for layer in layers]
        scores, added, most = (np.stack(parts) for parts in zip(*terms, strict=True))
        names = ["distance", "other_distance"]
        curves = {
            name: np.stack([self._curve(layer, cfg)[heads] for layer in layers])
            for name, cfg in zip(names, self._settings().values(), strict=False)
        }
        sums = [self._all_summed(x.tolist(), at) for at, x in zip(layers, scores, strict=True)]
        arrays = {"score": scores, "added": added, "lowest": -most, "range": 2 * most, **curves}
        return {
            name: self._dropped(x, 2 if name in curves else 3)
            for name, x in {**arrays, "sum": sums}.items()
        }

    def _all_summed(self, scores: Any, layer: int) -> Any:
        if isinstance(scores, list):
            return [self._all_summed(part, layer) for part in scores]
        return self._summed(layer, scores)

    def _dropped(self, array: Any, n_axes: int) -> Any:
        """Without those of layer, head, query, the first axes, that have one value on the page."""
        for name in ("layer", "head", "query")[:n_axes]:
            if name not in self._kept():
                array = array[0]
        return array

    def linked(self) -> Linked:
        """Nothing is clicked that the page has no numbers for."""
        linked = super().linked()
        rows = [[self._on_page(view, linked.arrays) for view in row] for row in linked.rows]
        return replace(linked, rows=rows)

    def _on_page(self, view: View, arrays: Mapping[str, Any]) -> View:
        chosen = {*self._kept(), "key", "pair"}
        return replace(
            view,
            clicks={axis: name for axis, name in view.clicks.items() if name in chosen},
            marks=view.marked,
            fills=tuple(fill for fill in view.fills if fill.array in arrays),
        )

    def controls(self) -> Sequence[str]:
        """Only what the page holds all of."""
        return [name for name in ("layer", "head") if name in self._kept()]

    def note(self) -> str:
        """What the page does not hold, and why views may be empty."""
        held = [
            f"{name} {getattr(self, name)}"
            for name in ("query", "head", "layer")
            if name not in self._kept()
        ]
        only = f"This page holds {' of '.join(held)} only. " if held else ""
        return (
            only + "Of keys that come after the query, which it does not see, there are no scores."
        )


def _turned_otherwise(cfg: LlamaConfig, theta: float, scaling: str, factor: float) -> LlamaConfig:
    """The configuration with another RoPE."""
    if scaling == "as it is":
        return cfg.but(rope_theta=theta)
    cfg = cfg.but(rope_theta=theta, rope_scaling=None, rope_divisors=None)
    if scaling == "linear":
        return cfg.but(rope_divisors=(factor,) * (cfg.d_head // 2))
    if scaling == "llama3":
        return cfg.but(
            rope_scaling=Llama3Scaling(
                factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=cfg.n_ctx
            )
        )
    return cfg


def _number(owner: HasTraits, name: str, label: str) -> ipywidgets.BoundedFloatText:
    """A box for a number that sets a trait, within its bounds."""
    trait: Any = owner.traits()[name]
    box = ipywidgets.BoundedFloatText(
        value=getattr(owner, name), min=trait.min, max=trait.max, description=label
    )
    box.style.description_width = "initial"
    box.layout.width = "auto"
    box.layout.max_width = "240px"
    link((owner, name), (box, "value"))
    return box
