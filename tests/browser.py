"""Opening a written report in a browser that has no network."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@dataclass
class BrowserCheck:
    """What was seen: traces of each figure, and whatever must not be."""

    figures: list[int]  # how many traces each figure has drawn
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # all but the file itself
    screenshot_path: Path | None = None
    hovers: list[str] = field(default_factory=list)  # what a pointer on each figure reads


def open_offline(
    chromium: str,
    path: Path,
    *,
    screenshot_path: Path | None = None,
    color_scheme: Literal["light", "dark"] = "light",
    width: int = 1200,
    hover: bool = False,
) -> BrowserCheck:
    """Open a report with the network off, wait until its figures are drawn, and look at them."""
    check = BrowserCheck(figures=[], screenshot_path=screenshot_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        try:
            context = browser.new_context(
                offline=True, color_scheme=color_scheme, viewport={"width": width, "height": 900}
            )
            page = context.new_page()
            _listen(page, check, path.resolve().as_uri())
            page.goto(path.resolve().as_uri())
            try:
                page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
            finally:
                if screenshot_path is not None:
                    page.screenshot(path=screenshot_path, full_page=True)
            check.figures = page.evaluate(
                "[...document.querySelectorAll('.js-plotly-plot')]"
                ".map(g => g._fullData?.length ?? 0)"
            )
            if hover:
                check.hovers = _hovers(page)
        finally:
            browser.close()
    return check


def _listen(page: Page, check: BrowserCheck, own: str) -> None:
    page.on("pageerror", lambda error: check.errors.append(str(error)))
    page.on("console", lambda m: check.errors.append(m.text) if m.type == "error" else None)
    # data: and blob: are what the page itself holds.
    page.on(
        "request",
        lambda request: (
            None
            if request.url == own or request.url.startswith(("data:", "blob:"))
            else check.requests.append(request.url)
        ),
    )


def _hovers(page: Page) -> list[str]:
    """What each figure shows for a pointer on the last cell of its first trace."""
    found = []
    for plot in page.query_selector_all(".js-plotly-plot"):
        plot.scroll_into_view_if_needed()
        x, y = plot.evaluate(
            """g => {
              const l = g._fullLayout, r = g.getBoundingClientRect(), t = g._fullData[0];
              const x = l[t.xaxis.replace("x", "xaxis")], y = l[t.yaxis.replace("y", "yaxis")];
              return [r.left + x._offset + x.d2p(t.x[t.x.length - 1]),
                      r.top + y._offset + y.d2p(t.y[t.y.length - 1])];
            }"""
        )
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y, steps=3)
        page.wait_for_function("g => g.querySelector('.hovertext')", arg=plot, timeout=10_000)
        found.append(plot.evaluate("g => g.querySelector('.hovertext').textContent"))
    return found
