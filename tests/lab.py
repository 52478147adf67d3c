"""A JupyterLab of its own, and a headless browser that works in it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from browser import ARGS
from playwright.sync_api import Page, sync_playwright

# No news and no updates; widgets are saved with their notebook.
_SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": True},
}


# Where a cell is on the screen, and whether the pointer is on it.
_PIXEL = """(g, [x, y]) => {
  const {xaxis, yaxis} = g._fullLayout, {left, top} = g.getBoundingClientRect();
  return [left + xaxis._offset + xaxis.d2p(x), top + yaxis._offset + yaxis.d2p(y)];
}"""
_HOVERED = "(g, [x, y]) => g._hoverdata?.[0]?.x === x && g._hoverdata[0].y === y"


@dataclass
class Lab:
    """A running JupyterLab, and what its browser has said and received."""

    url: str
    token: str
    folder: Path
    browser: Any
    errors: list[str] = field(default_factory=list)
    received: int = 0  # bytes, over websockets

    def open(self, name: str, *, dark: bool = False, height: int = 1400) -> "Notebook":
        """Open a notebook in a page of its own, with its kernel ready."""
        page = self.browser.new_page(viewport={"width": 1400, "height": height})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("websocket", lambda socket: socket.on("framereceived", self._count))
        page.goto(f"{self.url}/lab/tree/{name}?token={self.token}&reset")
        page.wait_for_selector(".jp-Notebook")
        if dark:
            page.evaluate(
                "window.jupyterapp.commands.execute('apputils:change-theme', "
                "{theme: 'JupyterLab Dark'})"
            )
        page.evaluate(
            """async () => {
              const p = window.jupyterapp.shell.currentWidget;
              await p.context.ready;
              await p.sessionContext.ready;
              await p.sessionContext.session.kernel.info;
            }"""
        )
        return Notebook(self, page)

    def _count(self, frame: Any) -> None:
        self.received += len(frame)


@dataclass
class Notebook:
    """A notebook in the browser."""

    lab: Lab
    page: Page

    def run_all(self) -> None:
        """Run every cell, and see that all of them succeed."""
        assert self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')"), (
            self.page.locator(".jp-OutputArea-output").all_inner_texts()
        )

    def run(self, *cells: int) -> None:
        """Run some cells."""
        for cell in cells:
            assert self.page.evaluate(
                """async (cell) => {
                  window.jupyterapp.shell.currentWidget.content.activeCellIndex = cell;
                  return window.jupyterapp.commands.execute('notebook:run-cell').then(() => true);
                }""",
                cell,
            )

    def picture(self, path: Path) -> None:
        """Take a picture of what is seen."""
        self.page.screenshot(path=path)

    def save(self) -> None:
        """Save it, with the state of its widgets."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")

    def view(self, name: str) -> Any:
        """A view by its explorer and name, such as "attention-map"; the last of several."""
        return self.page.locator(f".lp-{name}").last

    def drawn(self, name: str) -> int:
        """Wait until a view is drawn; how often it was."""
        self.page.wait_for_function(
            "name => [...document.querySelectorAll(`.lp-${name} [data-drawn]`)].length", arg=name
        )
        return int(self.view(name).locator("[data-drawn]").get_attribute("data-drawn"))

    def click(self, name: str, *place: float | str) -> None:
        """Click a cell of a figure, as a person would.

        `place` is its coordinates, or a function of the figure that gives them: what is there may
        still be redrawn, so it is asked again until the pointer has reached it.
        """
        plot = self.view(name).locator(".js-plotly-plot")
        plot.scroll_into_view_if_needed()
        for _ in range(100):
            x, y = plot.evaluate(place[0]) if isinstance(place[0], str) else place
            left, top = plot.evaluate(_PIXEL, [x, y])
            self.page.mouse.move(left - 3, top)
            self.page.mouse.move(left, top, steps=3)
            self.page.wait_for_timeout(50)
            # plotly hears a click only where it has shown a hover; figures may still be resized.
            if plot.evaluate(_HOVERED, [x, y]) and plot.evaluate(_PIXEL, [x, y]) == [left, top]:
                self.page.mouse.down()
                self.page.mouse.up()
                return
        raise AssertionError(f"the pointer does not reach {x}, {y} of {name}")

    def drag(self, name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a box in a figure, which zooms into it."""
        plot = self.view(name).locator(".js-plotly-plot")
        plot.scroll_into_view_if_needed()
        for step, (x, y) in enumerate((start, end)):
            self.page.mouse.move(*plot.evaluate(_PIXEL, [x, y]), steps=5)
            self.page.mouse.up() if step else self.page.mouse.down()

    def wait_drawn(self, name: str, condition: str) -> None:
        """Wait until what a heat map shows fulfils a condition, a function of its rows."""
        self.page.wait_for_function(
            f"g => ({condition})(g._fullData[0].z)",
            arg=self.view(name).locator(".js-plotly-plot").element_handle(),
        )

    def wait_caption(self, name: str, text: str) -> None:
        """Wait until a view says so."""
        self.page.wait_for_function(
            """([name, text]) => [...document.querySelectorAll(`.lp-${name} .lp-caption`)]
                .some((caption) => caption.textContent.includes(text))""",
            arg=[name, text],
        )


@contextmanager
def running_lab(chromium: str, folder: Path) -> Iterator[Lab]:
    """Start JupyterLab on a folder, and a browser; both are gone at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    for plugin, settings in _SETTINGS.items():
        path = folder / ".settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
        "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    log = (folder / ".lab.log").open("w")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        _wait_until_up(server, f"{url}/api/status?token={token}", folder / ".lab.log")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
            try:
                yield Lab(url, token, folder, browser)
            finally:
                browser.close()
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def _wait_until_up(server: Any, url: str, log: Path) -> None:
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )
    nbformat.write(notebook, path)
