"""From a map of patches to the head behind a cell."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from traitlets import Unicode

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.lens.attention import attention_maps
from llama_probe.model.llama import Llama
from llama_probe.page import Fill, View
from llama_probe.patching.patch import patch
from llama_probe.patching.sites import sites_of
from llama_probe.plots.attention import without_future
from llama_probe.plots.labels import visible
from llama_probe.widgets.attention import AttentionExplorer
from llama_probe.widgets.controls import menu
from llama_probe.widgets.explorer import Explorer, Selected, named, numbers
from llama_probe.widgets.selection import Selection

# More cells than this of heads are not swept for a page: it would take minutes.
_MOST_CELLS = 2000


class PatchingExplorer(Explorer):
    """A map of effects; the sites and the heads at the clicked cell; where that head looks.

    The map of another site, and that of all heads, are swept in the background: the notebook and
    the other views go on meanwhile, and "Stop" stops it.

    Args:
        model: The model.
        clean: A prompt: a text, or tokens [pos].
        corrupted: The prompt to compare with, of as many tokens.
        metric: What is measured, as for `lp.patch`: `lp.logit_diff(" Mary", " John")`.
        sites: The sites to choose from, without units: the first is swept at once.
        direction: "denoise" or "noise", as for `lp.patch`.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        layer, pos, head: What is selected.
        site: Which site's map is shown, or will be when its sweep is done.
        frames: By site, and "z" for the heads, the frames of `lp.patch` that were swept.

    Raises:
        InputError: As `lp.patch`; or there is more than one pair, or a site has heads or experts.
    """

    layer, pos, head = (Selected() for _ in range(3))
    options = ("site",)
    site = Unicode("resid_pre")

    def __init__(
        self,
        model: Llama,
        clean: Any,
        corrupted: Any,
        *,
        metric: Any,
        sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
        direction: str = "denoise",
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection, model)
        self.title = f"Patching in {model.cfg.model_name}"
        self._model, self._prompts, self._sites = model, (clean, corrupted), list(sites)
        self._task: dict[str, Any] = {"metric": metric, "direction": direction}
        self._check()
        self._at_cell = lru_cache(256)(self._sites_at_cell)
        self._heads_at_cell = lru_cache(256)(self._swept_heads_at_cell)
        self._maps = attention_maps(model, clean)
        self.site = self._shown = self._sites[0]
        self.frames: dict[str, pd.DataFrame] = {self.site: self._swept(self.site)}
        self._attention: AttentionExplorer | None = None
        self.labels = {
            "layer": numbers(model.cfg.n_layers),
            "head": numbers(model.cfg.n_heads),
            "pos": self._position_names(),
        }
        self._lay_out()
        self.begin(self._controls(), **self._strongest())
        self._take_strongest_head()

    def _check(self) -> None:
        for site in self._sites:
            if sites_of(self._model, site, ("layer", "pos"), None, None)[0].unit is not None:
                raise InputError(
                    f"site {site!r} has heads or experts; give sites of positions only"
                )
        ids = [self._model.one_prompt(prompt)[0] for prompt in self._prompts]
        if ids[0].shape != ids[1].shape:
            patch(self._model, *self._prompts, **self._task)  # says what does not correspond

    def _position_names(self) -> list[str]:
        """The clean tokens, and the corrupted ones where they differ."""
        names = named(self._maps.tokens)
        ids = self._model.one_prompt(self._prompts[1])[0][0]
        others = self._model.to_str_tokens(ids)
        differ = (ids != self._maps.ids).tolist()
        return [
            f"{name} (corrupted: {visible(other)})" if changed else name
            for name, other, changed in zip(names, others, differ, strict=True)
        ]

    def _lay_out(self) -> None:
        cell = {"x": "pos", "y": "layer"}
        self.rows = [
            [
                View(
                    "map", "Each layer and position: click a cell", self._map,
                    (), cell,
                ),
                View(
                    "heads", "Each head, at all positions: click one",
                    self._all_heads, (), {"x": "head", "y": "layer"},
                ),
            ],
            [
                View(
                    "sites", "Each site of layer {layer} at {pos}", self._sites_here,
                    ("layer", "pos"), marks={}, fills=self._filled("sites", "pos"),
                ),
                View(
                    "cell", "Each head of layer {layer} at {pos}: click one", self._heads_here,
                    ("layer", "pos"), {"x": "head"}, fills=self._filled("cell", "pos"),
                ),
            ],
            [
                View(
                    "attention", "Where head {head} of layer {layer} looks in the clean prompt",
                    self._pattern, ("layer", "head"), {"y": "pos"},
                    fills=(Fill("pattern", ("layer", "head")),),
                ),
            ],
        ]  # fmt: skip

    def _filled(self, array: str, axis: str) -> tuple[Fill, ...]:
        if array == "cell" and self._cells_of_heads() > _MOST_CELLS:
            return ()
        return (Fill(array, ("layer", axis), "y"),)

    def _controls(self) -> list[ipywidgets.Widget]:
        heads = ipywidgets.Button(description="Sweep all heads", tooltip="Patch each head's output")
        heads.on_click(lambda button: self.sweep("z"))
        more = ipywidgets.Button(
            description="Open the head", tooltip="Show the selected head in an attention explorer"
        )
        more.on_click(lambda button: self._guarded(self.open_head))
        for button in (heads, more):
            button.layout.width = "auto"
        return [menu(self, "site", self._sites, "Site"), heads, more]

    def sweep(self, site: str) -> None:
        """Sweep a site in the background, unless that was done; "z" for the heads.

        A newer sweep replaces one that still runs. `wait()` waits for it.
        """

        def keep(frame: pd.DataFrame) -> None:
            with self._lock:
                self.frames[site] = frame
                self._show_map(site)

        if site in self.frames:
            self._show_map(site)
        else:
            self.run(lambda progress: self._swept(site, progress), keep)

    def open_head(self) -> AttentionExplorer:
        """Show the selected head in an attention explorer of both prompts, below the other views.

        It shares the selection: a click on another cell or head changes it too.
        """
        if self._attention is None or self._attention.closed:
            self.selection.query = self.pos
            self._attention = AttentionExplorer(self._model, self._both(), selection=self.selection)
            # Without one that another run of a cell has closed.
            kept = [box for box in self.children if not isinstance(box, AttentionExplorer)]
            self.children = [*kept, self._attention]
        return self._attention

    def _both(self) -> Any:
        texts = [p for p in self._prompts if isinstance(p, str)]
        return texts if len(texts) == 2 else self._prompts[0]

    def moved(self, names: set[str]) -> None:
        """Another site is swept; another position is the query of an opened head."""
        if "site" in names:
            self.sweep(self.site)
        if "pos" in names and self._attention is not None:
            self.selection.query = self.pos

    def clicked(self, view: View, point: dict[str, Any]) -> None:
        """With a cell of the map, its strongest head is chosen."""
        super().clicked(view, point)
        if view.name == "map":
            self._take_strongest_head()

    def _take_strongest_head(self) -> None:
        effects = self._heads_at_cell(self.layer, self.pos).effect.abs()
        if effects.notna().any():
            self.selection.head = int(effects.to_numpy().argmax())

    def _swept(self, site: str, progress: Any = False) -> pd.DataFrame:
        return patch(self._model, *self._prompts, **self._task, at=site, progress=progress)

    def _sites_at_cell(self, layer: int, pos: int) -> pd.DataFrame:
        return patch(
            self._model, *self._prompts, **self._task, at=self._sites, over=("layer", "pos"),
            layers=[layer], positions=[pos],
        )  # fmt: skip

    def _swept_heads_at_cell(self, layer: int, pos: int) -> pd.DataFrame:
        return patch(
            self._model, *self._prompts, **self._task, at="z", over=("layer", "pos", "head"),
            layers=[layer], positions=[pos],
        )  # fmt: skip

    def _show_map(self, site: str) -> None:
        if site == "z":
            self.redraw("heads")
        elif site == self.site:  # else another was chosen meanwhile
            self._shown = site
            self.redraw("map")

    def _map(self) -> go.Figure:
        return plots.patch(self.frames[self._shown])

    def _all_heads(self) -> go.Figure | None:
        return plots.patch(self.frames["z"]) if "z" in self.frames else None

    def _sites_here(self) -> go.Figure:
        return plots.effects(self._at_cell(self.layer, self.pos), "site")

    def _heads_here(self) -> go.Figure:
        return plots.effects(self._heads_at_cell(self.layer, self.pos), "head")

    def _pattern(self) -> go.Figure:
        return plots.attention(self._weights(self.layer, self.head), self._maps.tokens)

    def _weights(self, layer: int, head: int) -> np.ndarray:
        return self._maps.pattern(layer, head).float().numpy(force=True)

    def _strongest(self) -> dict[str, int]:
        frame = self.frames[self.site]
        best = frame.loc[frame.effect.abs().idxmax()]
        return {"layer": int(best["layer"]), "pos": int(best["pos"])}

    def _cells_of_heads(self) -> int:
        cfg = self._model.cfg
        return cfg.n_layers * cfg.n_heads * len(self._maps.tokens)

    def arrays(self) -> Mapping[str, np.ndarray | list[Any]]:
        """The effects of every site, of every head if there are not too many, and all patterns."""
        cfg, n_pos = self._model.cfg, len(self._maps.tokens)
        sweeps = [
            self.frames[site] if site in self.frames else self._swept(site) for site in self._sites
        ]
        by_site = [
            frame.effect.to_numpy().reshape(cfg.n_layers, n_pos) for frame in map(_sorted, sweeps)
        ]
        patterns = [
            [without_future(self._weights(layer, head)) for head in range(cfg.n_heads)]
            for layer in range(cfg.n_layers)
        ]
        arrays: dict[str, Any] = {
            "sites": np.stack(by_site, axis=-1),
            "pattern": np.array(patterns),
        }
        if self._cells_of_heads() <= _MOST_CELLS:
            heads = patch(
                self._model, *self._prompts, **self._task, at="z", over=("layer", "pos", "head")
            )
            shape = (cfg.n_layers, n_pos, cfg.n_heads)
            arrays["cell"] = _sorted(heads).effect.to_numpy().reshape(shape)
        return arrays

    def note(self) -> str:
        """What a page has no room for."""
        if self._cells_of_heads() <= _MOST_CELLS:
            return ""
        where = f"layer {self.layer} at {self.labels['pos'][self.pos]}"
        return f"On this page the effects of single heads are those of {where}."


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values([name for name in ("layer", "pos", "head") if name in frame])
