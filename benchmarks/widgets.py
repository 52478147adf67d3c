"""How long a reader waits: from a click to what it changes, and for a long prompt to open."""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llama_probe as lp
from benchmarks.measure import Row

ROOT = Path(__file__).resolve().parent.parent
TEXT = "When Mary and John went to the store, John gave a drink to"
CLICKS = 20
# From the mouse button to the frame after the second figure has been drawn.
_CLICK = """async ([plot, root, x, y]) => {
  const count = () => root.dataset.drawn;
  const before = count(), begun = performance.now();
  const {left, top} = plot.getBoundingClientRect(), l = plot._fullLayout;
  const at = {clientX: left + l.xaxis._offset + l.xaxis.d2p(x),
              clientY: top + l.yaxis._offset + l.yaxis.d2p(y)};
  const trace = plot._fullData[0];
  const point = {x, y, curveNumber: 0, pointIndex: 0, xaxis: l.xaxis, yaxis: l.yaxis};
  plot.emit("plotly_click", {points: [point], event: at});
  while (count() === before) await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return performance.now() - begun;
}"""


def opening() -> list[Row]:
    """Opening an attention explorer on 2,048 tokens."""
    tiny, _ = _open("tiny-moe")
    smol, bare = _open("smollm2-135m-instruct")
    what = "attention explorer opens on 2,048 tokens"
    return [
        Row(f"{what}, tiny-moe", "3 s", tiny, 3, 1, "s"),
        Row(f"{what}, SmolLM2", "two bare forwards, last logits", smol, 2 * bare, 1, "s"),
    ]


def _open(name: str) -> tuple[float, float]:
    """The seconds that the explorer takes, and a bare forward pass of the same tokens."""
    model = lp.load(name, progress=False)
    model.cfg = model.cfg.but(n_ctx=2048)  # tiny-moe was taught on 1,024
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, model.cfg.d_vocab, (1, 2048), generator=generator)
    with torch.no_grad():
        model(tokens, logits_at=-1)
        ours = min(_seconds(lambda: lp.AttentionExplorer(model, tokens)) for _ in range(3))
        bare = min(_seconds(lambda: model(tokens, logits_at=-1)) for _ in range(3))
    return ours, bare


def clicks() -> list[Row]:
    """From a click to what it changes, in JupyterLab and on an offline page."""
    measured = {
        "click on a head → its pattern, JupyterLab": _in_jupyterlab(
            f"lp.AttentionExplorer(model, {TEXT!r})", "attention-grid", "attention-map", _heads()
        ),
        "click on an expert → it is ablated, JupyterLab": _in_jupyterlab(
            f"explorer = lp.RoutingExplorer(model, {TEXT!r})\nexplorer.edit = 'ablate'\nexplorer",
            "routing-load", "routing-effect", [(i % 8, (i // 8) % 4) for i in range(CLICKS)],
        ),
        "click on a head → its pattern, an offline page": _offline(),
    }  # fmt: skip
    rows = []
    for what, times in measured.items():
        what = f"{what}, {len(times)} clicks"
        rows.append(Row(f"{what}, median", "300 ms", statistics.median(times), 300, 1, "ms"))
        rows.append(Row(f"{what}, worst", "300 ms", max(times), 300, None, "ms"))
    return rows


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _heads() -> list[tuple[int, int]]:
    """So that each click chooses another head than the one before."""
    return [(i % 4, (i // 4) % 4) for i in range(CLICKS)]


def _chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("clicks need a Chromium: install Debian's package chromium")
    return found


def _in_jupyterlab(
    code: str, clicked: str, changed: str, cells: list[tuple[int, int]]
) -> list[float]:
    """The milliseconds of each click in a heat map, until another view is drawn."""
    # What drives the browser is the tests' own.
    sys.path.append(str(ROOT / "tests"))
    from lab import running_lab, write_notebook

    folder = Path(tempfile.mkdtemp())
    load = "import llama_probe as lp\nmodel = lp.load('tiny-moe', progress=False)\n"
    write_notebook(folder / "clicks.ipynb", load + code)
    with running_lab(_chromium(), folder) as lab:
        notebook = lab.open("clicks.ipynb", height=2600)
        notebook.run_all()
        notebook.drawn(changed)
        plot = notebook.view(clicked).locator(".js-plotly-plot").element_handle()
        root = notebook.view(changed).locator(".lp-view").element_handle()
        notebook.page.evaluate(_CLICK, [plot, root, 3, 3])
        return [notebook.page.evaluate(_CLICK, [plot, root, x, y]) for x, y in cells]


def _offline() -> list[float]:
    from browser import ARGS
    from playwright.sync_api import sync_playwright

    model = lp.load("tiny-moe", progress=False)
    tokens = torch.randint(100, 2000, (1, 512), generator=torch.Generator().manual_seed(0))
    path = lp.AttentionExplorer(model, tokens).to_html(Path(tempfile.mkdtemp()) / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=ARGS)
        page = browser.new_context(offline=True).new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        plot = page.locator('[data-view="grid"] .js-plotly-plot').element_handle()
        root = page.locator('[data-view="map"]').element_handle()
        page.evaluate(_CLICK, [plot, root, 3, 3])
        times = [page.evaluate(_CLICK, [plot, root, x, y]) for x, y in _heads()]
        browser.close()
    return times
