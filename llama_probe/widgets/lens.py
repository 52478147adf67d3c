"""What a model would say if it stopped at a layer: the logit lens, from the grid to one token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, cast

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from traitlets import Any as Anything
from traitlets import Unicode, validate

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.lens.logit_lens import logit_lens
from llama_probe.lens.pca import checked_layers, sites_of
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, Linked, Strip, View
from llama_probe.plots.labels import token, visible
from llama_probe.plots.lens import rank_range
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected, named
from llama_probe.widgets.selection import Selection

_COLOURS = {
    "probability": "prob",
    "entropy": "entropy",
    "KL to the output": "kl",
    "rank of the watched token": "rank",
}
_MOST_LISTS = 20_000  # of likeliest tokens, on a page
_BLANKS = str.maketrans("·↵⇥", " \n\t")  # as `visible` shows them


class LogitLensExplorer(Explorer):
    """The likeliest token at each layer and position; a cell's list; a token's way up.

    Click a cell of the grid, a token of the prompt or a layer of a line.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        at: The site, as for `lp.logit_lens`. With "resid_pre" layer 0 is the embedding, and there
            is one more layer than the model has: its output.
        watch: One or more tokens, as text of one token or ids, to follow through all layers; None:
            the one that the model itself predicts after the prompt.
        top_k: How many of the likeliest tokens to list.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        layer, pos: What is selected.
        at: The site; setting it runs the model again.
        watch: The watched tokens' ids, None as above; may be set to all that the argument may be.
        colour: "prob" (of the likeliest token), "entropy", "kl" or "rank" (of the first watched
            token).

    Raises:
        InputError: The prompt is empty or does not fit into the context, there are several, the
            site is unknown, or a watched text is not one token.
    """

    layer, pos = Selected(), Selected()
    options = ("at", "watch", "colour")
    at = Unicode("resid_pre")
    watch = Anything(None)
    colour = Unicode("prob")

    def __init__(
        self,
        model: Llama,
        prompt: Any,
        *,
        at: str = "resid_pre",
        watch: str | int | Sequence[str | int] | None = None,
        top_k: int = 8,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"Logit lens of {model.cfg.model_name}"
        self._model = model
        self._ids, self._mask = model.one_prompt(prompt)
        self._tokens = model.to_str_tokens(self._ids[0])
        self._top_k = min(top_k, model.cfg.d_vocab)
        self._frames = lru_cache(8)(self._computed)
        self.at = at
        self.watch = watch
        self.labels = {"layer": self._layer_names(), "pos": named(self._tokens)}
        self._lay_out()
        with self._lock:
            last = int(self._frame().layer.to_numpy().max())
        self.begin(self._controls(), layer=last, pos=len(self._tokens) - 1)

    def _lay_out(self) -> None:
        cell, line = ("layer", "pos", "at"), ("pos", "at", "watch")
        watched = range(len(self._watched()))
        self.rows = [
            [
                View(
                    "prompt", "The prompt: click a token", lambda: Strip(self._tokens),
                    clicks={"x": "pos"}, marks={"pos": "●"},
                ),
                View(
                    "top", "Likeliest at {pos}, {layer}", self._top, cell, marks={},
                    fills=(Fill("top", cell[:2], "x"), Fill("top_tokens", cell[:2], "text")),
                ),
            ],
            [
                View(
                    "grid", "The likeliest token at each layer and position: click a cell",
                    self._grid, ("at", "colour", "watch"), {"x": "pos", "y": "layer"},
                ),
            ],
            [
                View(
                    name, caption, draw, line, {"x": "layer"},
                    fills=tuple(Fill(f"{name}_{i}", ("pos",), "y", i) for i in watched),
                )
                for name, caption, draw in (
                    ("ranks", "How far up the watched token is at {pos}", self._ranks),
                    ("probs", "How likely it is there", self._probs),
                )
            ],
        ]  # fmt: skip

    def _controls(self) -> list[ipywidgets.Widget]:
        self._field = ipywidgets.Text(
            value=self._watched_texts(),
            description="Watch",
            placeholder="a token; · for a space",
            tooltip="One token, or several with blanks between them; · stands for a space",
            continuous_update=False,
            style={"description_width": "initial"},
        )
        self._field.observe(self._typed, "value")
        return [
            menu(self, "at", sites_of(self._model), "Site"),
            menu(self, "colour", _COLOURS.items(), "Colour"),
            self._field,
        ]

    @validate("at")
    def _known_site(self, proposal: Any) -> str:
        checked_layers(self._model, proposal["value"])
        return proposal["value"]

    @validate("watch")
    def _single_tokens(self, proposal: Any) -> tuple[int, ...] | None:
        watch = proposal["value"]
        several = [watch] if isinstance(watch, str | int) else watch
        return tuple(dict.fromkeys(map(self._model.to_single_token, several))) or None

    @validate("colour")
    def _known_colour(self, proposal: Any) -> str:
        colour = proposal["value"]
        if colour not in _COLOURS.values():
            known = ", ".join(_COLOURS.values())
            raise InputError(f"colour is {colour!r}, but should be one of {known}")
        return colour

    def moved(self, names: set[str]) -> None:
        """Another site may have fewer layers; the field says what is watched."""
        if "at" in names:
            self.labels = {**self.labels, "layer": self._layer_names()}
            self.selection.choose(layer=self.layer)
        if "watch" in names:
            self._lay_out()
            self._field.value = self._watched_texts()

    def _typed(self, change: Any) -> None:
        if change["new"] == self._watched_texts():
            return
        try:
            self.watch = self._read(change["new"])
            self._field.value = self._watched_texts()
        except InputError as error:
            self.say(f"{error}; · stands for a space", error=True)

    def _read(self, text: str) -> tuple[int, ...] | None:
        """The tokens that somebody typed: one as it is, or several with blanks between them."""
        if self._model.tokenizer is None:
            if not all(part.strip("<>").isdecimal() for part in text.split()):
                raise InputError("this model has no tokenizer: give ids, not text")
            return tuple(int(part.strip("<>")) for part in text.split())
        single = self._model.to_single_token
        for whole in (text, text.translate(_BLANKS)):
            try:
                return (single(whole),)
            except InputError:
                continue  # then it is several, or wrong
        return tuple(single(part.translate(_BLANKS)) for part in text.split())

    def _watched(self) -> tuple[int, ...]:
        return cast("tuple[int, ...] | None", self.watch) or (self._predicted,)

    def _watched_texts(self) -> str:
        return " ".join(visible(text) for text in self._model.to_str_tokens(self._watched()))

    @cached_property
    @torch.no_grad()
    def _predicted(self) -> int:
        with self._lock:
            logits = self._model(self._ids, attention_mask=self._mask, logits_at=-1)
        return int(logits[0, -1].argmax())

    def _computed(self, at: str, watch: tuple[int, ...]) -> pd.DataFrame:
        return logit_lens(self._model, self._ids, at=at, top_k=self._top_k, watch=watch)

    def _frame(self) -> pd.DataFrame:
        return self._frames(self.at, self._watched())

    def _rows(self, wanted: Any) -> pd.DataFrame:
        return cast(pd.DataFrame, self._frame()[wanted])

    def _grid(self) -> go.Figure:
        frame = self._frame()
        # The rank can be of one token only.
        frame = frame.assign(watched=frame.token_id == self._watched()[0])
        missing = self._missing_layers()
        if missing:
            frame = pd.concat([frame, self._nothing(missing)], ignore_index=True)
        return plots.logit_lens(frame, title="", colour=self.colour)

    def _top(self) -> go.Figure | None:
        frame, layer, pos = self._frame(), self.layer, self.pos
        here = (frame.layer == layer) & (frame.pos == pos) & (frame["rank"] < self._top_k)
        if not here.any():
            return None
        return plots.top_tokens(self._rows(here), "prob", unit="probability (fraction)")

    def _ranks(self) -> go.Figure:
        figure = plots.token_ranks(self._line())
        # The same axis at all positions, so that they can be compared.
        most = float(self._rows(self._frame().watched)["rank"].to_numpy().max())
        return figure.update_yaxes(range=rank_range(most)).update_layout(height=340)

    def _probs(self) -> go.Figure:
        return plots.token_ranks(self._line(), value="prob").update_layout(height=340)

    def _line(self) -> pd.DataFrame:
        frame = self._frame()
        line = self._rows(frame.watched & (frame.pos == self.pos))
        # Lines in the order in which the tokens were named.
        return line.sort_values("token_id", key=lambda ids: ids.map(self._watched().index))

    def _layer_names(self) -> list[str]:
        n = self._model.cfg.n_layers
        if self.at != "resid_pre":
            return [f"{self.at} of layer {layer}" for layer in range(n)]
        ends = {0: " (embedding)", n: " (output)"}
        return [f"after {i} layer{'' if i == 1 else 's'}{ends.get(i, '')}" for i in range(n + 1)]

    def _missing_layers(self) -> list[int]:
        """Layers without the site: rows of the grid that stay empty."""
        return sorted({*range(len(self.labels["layer"]))} - set(self._frame().layer))

    def _nothing(self, layers: Sequence[int]) -> pd.DataFrame:
        cells = [(layer, pos) for layer in layers for pos in range(len(self._tokens))]
        frame = pd.DataFrame(cells, columns=["layer", "pos"]).assign(rank=0, token="", prob=np.nan)
        frame["input_token"] = [self._tokens[pos] for _, pos in cells]
        return frame.assign(site=self.at, watched=False)

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """The likeliest tokens of each cell, and the watched ones' ranks and probabilities."""
        frame, n_pos = self._frame(), len(self._tokens)
        lines: dict[str, Any] = {}
        for i, watched in enumerate(self._watched()):
            rows = self._rows(frame.token_id == watched)
            for name, values in (("ranks", rows["rank"] + 1), ("probs", rows.prob)):
                lines[f"{name}_{i}"] = values.to_numpy(dtype=float).reshape(-1, n_pos).T
        return lines | (self._lists() if self._holds_lists() else {})

    def _holds_lists(self) -> bool:
        return len(self.labels["layer"]) * len(self._tokens) <= _MOST_LISTS

    def _lists(self) -> dict[str, Any]:
        frame = self._rows(self._frame()["rank"] < self._top_k)
        shape = len(self.labels["layer"]), len(self._tokens), self._top_k
        probs = np.full(shape, np.nan)
        texts = np.full(shape, "", dtype=object)
        at = frame.layer.to_numpy(), frame.pos.to_numpy(), frame["rank"].to_numpy()
        probs[at], texts[at] = frame.prob, [token(text) for text in frame.token]
        return {"top": probs, "top_tokens": texts.tolist()}

    def linked(self) -> Linked:
        """The same views for a page; of a long prompt without the lists of likeliest tokens."""
        linked = super().linked()
        if self._holds_lists():
            return linked
        rows = [[view for view in row if view.name != "top"] for row in linked.rows]
        return replace(linked, rows=rows)

    def controls(self) -> Sequence[str]:
        """Both have a menu."""
        return ["layer", "pos"]

    def note(self) -> str:
        """Where the stream is read, which does not change on a page."""
        note = f"Read at {self.at}. Watched: {self._watched_texts()}."
        return (
            note if self._holds_lists() else f"{note} The lists of likeliest tokens are left out."
        )
