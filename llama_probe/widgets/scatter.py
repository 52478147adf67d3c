"""Prompts as points: what a layer tells apart, and which prompts lie together."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from traitlets import Any as Anything
from traitlets import Unicode, validate

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.lens.pca import activation_pca, checked_layers, sites_of
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, Linked, Strip, View
from llama_probe.plots.labels import clip, visible
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected
from llama_probe.widgets.selection import Selection

_MOST_ROWS = 200  # of the table
_RING = {"size": 19, "symbol": "circle-open", "color": "#B3261E", "line": {"width": 2.5}}
_TABLE = (
    '<table style="border-collapse: collapse; line-height: 1.4">'
    "<caption style='text-align: left; font-weight: 600'>{caption}</caption>{rows}</table>"
)
_CELL = '<{kind} style="text-align: left; padding: 2px 10px; white-space: pre-wrap">{text}</{kind}>'


class ActivationScatter(Explorer):
    """Prompts on the two principal components of a site's activations, layer by layer.

    Click a point to read its prompt; drag around points to list theirs in a table, which the next
    click clears.

    Args:
        model: The model.
        prompts: Two or more texts, or tokens [batch pos].
        at: The site, as for `lp.activation_pca`.
        pos: The position in each prompt: from 0, or negative ones from its end.
        labels: What kind each prompt is of, for its colour and shape.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        prompt, layer: What is selected.
        at: The site; setting it runs the model again.
        chosen: Which prompts are in the table.

    Raises:
        InputError: As `lp.activation_pca`.
    """

    prompt, layer = Selected(), Selected()
    options = ("at", "chosen")
    at = Unicode("resid_post")
    chosen = Anything([])

    def __init__(
        self,
        model: Llama,
        prompts: Any,
        *,
        at: str = "resid_post",
        pos: int = -1,
        labels: Sequence[Any] | None = None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"Activations of {model.cfg.model_name}"
        self._model = model
        self._frames = lru_cache(8)(
            lambda at: activation_pca(model, prompts, at, pos, labels=labels)
        )
        self.at = at
        with self._lock:
            first = self._layer_rows(self._layers()[0])
        self._texts, self._kinds = first["text"].tolist(), first["label"].tolist()
        self._tokens = self._tokens_of(prompts)
        self.labels = {"layer": self._layer_names(), "prompt": self._prompt_names(pos)}
        self._lay_out()
        self._table = ipywidgets.HTML(self._tabulated())
        self.begin(self._controls(), layer=self._middle(), prompt=0)
        self._follow()
        self.children = [*self.children, self._table]

    def _lay_out(self) -> None:
        points = [Fill(name, ("layer",), side, 0) for name, side in (("pc1", "x"), ("pc2", "y"))]
        ring = ("layer", "prompt")
        self.rows = [
            [
                View(
                    "scatter", "Layer {layer}: click a prompt",
                    self._scatter, ("layer", "prompt", "at", "chosen"), {"index": "prompt"}, {},
                    (*points, Fill("ring1", ring, "x", 1), Fill("ring2", ring, "y", 1)),
                )
            ],
            [
                View(
                    "text", "Prompt {prompt}", lambda: Strip(self._tokens[self.prompt]),
                    ("prompt",), marks={}, fills=(Fill("tokens", ("prompt",), "tokens", None),),
                )
            ],
        ]  # fmt: skip

    def _controls(self) -> list[ipywidgets.Widget]:
        self._slider = ipywidgets.IntSlider(
            min=0, max=len(self.labels["layer"]) - 1, description="Layer"
        )
        self._slider.observe(self._slid, "value")
        return [menu(self, "at", sites_of(self._model), "Site"), self._slider]

    @validate("at")
    def _known_site(self, proposal: Any) -> str:
        checked_layers(self._model, proposal["value"])
        return proposal["value"]

    @validate("chosen")
    def _known_prompts(self, proposal: Any) -> list[int]:
        chosen = [int(index) for index in proposal["value"]]
        beyond = [index for index in chosen if not 0 <= index < len(self._texts)]
        if beyond:
            n = len(self._texts)
            raise InputError(f"chosen has {beyond[0]}, but prompts are 0 to {n - 1}")
        return sorted(set(chosen))

    def moved(self, names: set[str]) -> None:
        """The slider follows; another site has other components; the table lists what is chosen."""
        if "at" in names:
            self.labels = {**self.labels, "layer": self._layer_names()}
        if "layer" in names:
            self._follow()
        if names & {"chosen", "layer", "at"}:
            self._table.value = self._tabulated()

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """Only the points of the first trace are prompts."""
        if view.name != "scatter" or not point.get("trace"):
            super().clicked(view, point)

    def selected(self, view: View, points: list[Any]) -> None:
        """What is within a lasso goes into the table."""
        if view.name == "scatter":
            self.chosen = points

    def _slid(self, change: Any) -> None:
        self.selection.choose(layer=change["new"])

    def _follow(self) -> None:
        self._slider.value = self.layer

    def _frame(self) -> pd.DataFrame:
        return self._frames(self.at)

    def _layers(self) -> list[int]:
        return checked_layers(self._model, self.at)

    def _middle(self) -> int:
        layers = self._layers()
        return layers[len(layers) // 2]

    def _layer_rows(self, layer: int) -> pd.DataFrame:
        frame = self._frame()
        return cast(pd.DataFrame, frame[frame.layer == layer])

    def _scatter(self) -> go.Figure | None:
        rows = self._layer_rows(self.layer)
        if rows.empty:
            return None  # a layer without the site
        figure = plots.activation_pca(rows, title="")
        points, *legend = cast(Any, figure.data)
        prompt = self.prompt
        ring = go.Scatter(
            x=points.x[[prompt]], y=points.y[[prompt]], mode="markers", marker=_RING,
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        if self.chosen:
            points.selectedpoints = self.chosen
        figure = go.Figure([points, ring, *legend], figure.layout)
        # What is drawn around points of one layer means nothing in another.
        layer = f"{self.at} {self.layer}"
        return figure.update_layout(
            dragmode="lasso", uirevision=layer, selectionrevision=f"{layer} {self.chosen}"
        )

    def _tabulated(self) -> str:
        if not self.chosen:
            return "Drag around points to list their prompts here."
        rows = self._layer_rows(self.layer).set_index("prompt").reindex(self.chosen)
        head = _row("th", ["prompt", "label", "component 1", "component 2", "text"])
        places = zip(self.chosen, rows.pc1, rows.pc2, strict=True)
        body = [
            _row("td", [i, self._kinds[i], f"{one:.3g}", f"{two:.3g}", self._texts[i]])
            for i, one, two in list(places)[:_MOST_ROWS]
        ]
        n = len(self.chosen)
        caption = f"{n} chosen prompt{'' if n == 1 else 's'}"
        if n > _MOST_ROWS:
            caption += f", the first {_MOST_ROWS} of them"
        return _TABLE.format(caption=caption, rows=head + "".join(body))

    def _layer_names(self) -> list[str]:
        shares = self._frame().drop_duplicates("layer").set_index("layer")
        names = []
        for layer in range(self._model.cfg.n_layers):
            name = str(layer)
            if layer in shares.index:
                one, two = 100 * shares.loc[layer, ["explained1", "explained2"]].to_numpy(float)
                name += f" ({one:.0f}% + {two:.0f}% of the variance)"
            names.append(name)
        return names

    def _tokens_of(self, prompts: Any) -> list[list[str]]:
        tokens, mask = self._model.tokens_and_mask(prompts)
        return [
            self._model.to_str_tokens(row[real.bool()])
            for row, real in zip(tokens, mask, strict=True)
        ]

    def _prompt_names(self, pos: int) -> list[str]:
        names = []
        for prompt, tokens in enumerate(self._tokens):
            # Negative ones count from the end, as in Python.
            at = range(len(tokens))[pos]
            read = f"read at {at}: {clip(visible(tokens[at]), 24)}"
            names.append(f"{prompt}: {clip(self._texts[prompt], 60)} ({read})")
        return names

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """Every layer's coordinates, and the prompts' tokens."""
        frame = self._frame()
        wide = [frame.pivot(index="layer", columns="prompt", values=pc) for pc in ("pc1", "pc2")]
        # A layer without the site has no points.
        pc1, pc2 = (part.reindex(range(len(self.labels["layer"]))).to_numpy() for part in wide)
        tokens = [[visible(text) for text in tokens] for tokens in self._tokens]
        return {
            "pc1": pc1, "pc2": pc2, "ring1": pc1[..., None], "ring2": pc2[..., None],
            "tokens": tokens,
        }  # fmt: skip

    def linked(self) -> Linked:
        """The same views for a page, where axes keep their titles: shares are in the caption."""
        linked = super().linked()
        rows = [
            [replace(view, draw=self._on_page) if view.name == "scatter" else view for view in row]
            for row in linked.rows
        ]
        return replace(linked, rows=rows)

    def _on_page(self) -> go.Figure | None:
        figure = self._scatter()
        if figure is None:
            return None
        figure.update_traces(selectedpoints=None, selector=0)
        figure.update_layout(dragmode="zoom", xaxis_title_text="component 1")
        return figure.update_layout(yaxis_title_text="component 2")

    def controls(self) -> Sequence[str]:
        """Both have a menu."""
        return ["layer", "prompt"]

    def note(self) -> str:
        """Where the stream is read, which does not change on a page."""
        return f"Principal components of {self.at}."


def _row(kind: str, texts: Sequence[Any]) -> str:
    cells = [_CELL.format(kind=kind, text=html.escape(str(text))) for text in texts]
    return f"<tr>{''.join(cells)}</tr>"
