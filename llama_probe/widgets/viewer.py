"""The widget that shows one figure or token strip, and hears clicks in it.

plotly's own FigureWidget sends its 5 MB script once for each figure, and arrays of two axes as text
(plotly.py issue 5056). Here the script is sent once for a kernel, compressed, by a widget that
shows nothing; what draws is the script of the offline pages.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import plotly.graph_objects as go
from traitlets import Bool, Bytes, Dict, Unicode

from llama_probe import __version__
from llama_probe.page import pack
from llama_probe.page.report import own_file, templates
from llama_probe.page.views import Strip, kind_of, spec_of

# What the browser keeps the script under: a page may show notebooks of two versions.
_SHELF = f"llama_probe {__version__}"

# Runs in the browser: makes modules of the scripts, and leaves them where every viewer finds them.
_SHARE = """
async function start(model) {
  const bytes = (name) => {
    const data = model.get(name);
    return data.buffer ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : data;
  };
  const url = URL.createObjectURL(new Blob([model.get("script")], {type: "text/javascript"}));
  const views = await import(url);
  URL.revokeObjectURL(url);
  const Plotly = await views.loadPlotly(bytes("plotly"));
  return {views, Plotly, templates: model.get("templates")};
}
export default {
  initialize({model}) {
    const shelf = "SHELF";
    globalThis[shelf] ??= start(model).catch((error) => {
      delete globalThis[shelf];
      throw error;
    });
  },
};
"""

# Runs in the browser for each viewer; short, since it is sent with each of them.
_SHOW = """
async function shared() {
  const begun = Date.now();
  while (!globalThis["SHELF"]) {
    if (Date.now() - begun > 30000) throw new Error("run the cell again: its script is missing");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return globalThis["SHELF"];
}
export default {
  async render({model, el}) {
    const {views, ...tools} = await shared();
    const root = document.createElement("div");
    el.appendChild(root);
    // Busy until Python has answered: it runs the model for some clicks.
    const say = (what) => {
      root.setAttribute("aria-busy", "true");
      model.send(what);
    };
    const answered = () => root.removeAttribute("aria-busy");
    model.on("msg:custom", answered);
    const onClick = (event) => say({click: event});
    const onZoom = model.get("zooms") ? (ranges) => say({zoom: ranges}) : null;
    const onSelect = (points) => say({select: points});
    const view = new views.View(root, {...tools, onClick, onZoom, onSelect});
    let spec, text;
    const show = () => {
      if (!model.get("spec")) return;
      if (text !== model.get("spec")) spec = JSON.parse((text = model.get("spec")));
      const caption = model.get("caption");
      view.show({kind: model.get("kind"), caption, spec, marks: model.get("marks")});
    };
    model.on("change", show);
    show();
    return () => {
      model.off("change", show);
      model.off("msg:custom", answered);
      view.close();
    };
  },
};
"""


class _Scripts(anywidget.AnyWidget):
    """Brings plotly and our script into the browser; one for a kernel."""

    _esm = _SHARE.replace("SHELF", _SHELF)
    plotly = Bytes().tag(sync=True)
    script = Unicode().tag(sync=True)
    templates = Dict().tag(sync=True)


_scripts: list[_Scripts] = []


def _bring_scripts() -> None:
    if not _scripts:
        _scripts.append(
            _Scripts(
                plotly=pack.plotly_script(), script=own_file("views.js"), templates=templates()
            )
        )


class Viewer(anywidget.AnyWidget):
    """Shows a figure or a strip; `on_click`, `on_zoom` and `on_select` say who hears of it."""

    _esm = _SHOW.replace("SHELF", _SHELF)
    kind = Unicode("figure").tag(sync=True)
    caption = Unicode().tag(sync=True)
    spec = Unicode().tag(sync=True)
    marks = Dict().tag(sync=True)
    zooms = Bool(False).tag(sync=True)

    def __init__(
        self,
        *,
        on_click: Callable[[dict[str, Any]], None] | None = None,
        on_zoom: Callable[[dict[str, list[Any]] | None], None] | None = None,
        on_select: Callable[[list[Any]], None] | None = None,
    ) -> None:
        _bring_scripts()
        super().__init__(zooms=on_zoom is not None)
        self._shown: go.Figure | Strip | None = None
        self._spec = ""
        self._heard = {"click": on_click, "zoom": on_zoom, "select": on_select}
        self.on_msg(self._hear)

    def show(
        self,
        shown: go.Figure | Strip,
        caption: str,
        marks: Mapping[str, int],
        clicks: bool = False,
    ) -> None:
        """Show it; what is as it was is not sent again."""
        if shown is not self._shown:
            self._shown = shown
            self._spec = json.dumps(spec_of(shown, clicks), allow_nan=False)
        with self.hold_sync():
            self.kind, self.spec, self.caption = kind_of(shown), self._spec, caption
            self.marks = dict(marks)

    def _hear(self, widget: Any, content: Any, buffers: Any) -> None:
        try:
            for name, hear in self._heard.items():
                if isinstance(content, dict) and name in content and hear is not None:
                    hear(content[name])
        finally:
            self.send({"answered": True})
