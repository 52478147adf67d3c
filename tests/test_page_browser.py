"""A linked page in a browser without a network: clicks and keys change what is shown."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import ARGS
from playwright.sync_api import Browser, Page, sync_playwright
from test_page import NASTY, linked, pattern

from llama_probe import plots
from llama_probe.page import Report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DATA = "g => g._fullData[0].z.map(row => [...row])"


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        yield browser
        browser.close()


def opened(browser: Browser, folder: Path, tokens: list[str]) -> Page:
    path = Report("Linked").linked(linked(tokens)).write(folder / "page.html")
    page = browser.new_context(offline=True).new_page()
    page.set_default_timeout(30_000)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    return page


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return opened(browser, tmp_path_factory.mktemp("page"), NASTY)


def view(page: Page, name: str):
    return page.locator(f'[data-view="{name}"]')


def values(page: Page) -> list[str]:
    return view(page, "row").locator("span[data-pos]").evaluate_all("s => s.map(x => x.title)")


def test_a_menu_fills_the_map_with_the_other_head(page):
    plot = view(page, "map").locator(".js-plotly-plot")
    weights = pattern(len(NASTY))
    future = ~np.tri(len(NASTY), dtype=bool)
    for head in (1, 0):
        page.locator("select").select_option(str(head))
        page.wait_for_function("text => document.body.innerText.includes(text)", arg=f"Head {head}")
        page.wait_for_timeout(200)
        shown = np.array(plot.evaluate(DATA), dtype=float)
        expected = np.where(future, np.nan, weights[head])
        np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_a_click_on_a_weight_changes_both_strips(page):
    plot = view(page, "map").locator(".js-plotly-plot")
    x, y = plot.evaluate(
        """g => {
          const {xaxis, yaxis} = g._fullLayout, {left, top} = g.getBoundingClientRect();
          return [left + xaxis._offset + xaxis.d2p(2), top + yaxis._offset + yaxis.d2p(5)];
        }"""
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y, steps=3)
    page.wait_for_function("g => g._hoverdata", arg=plot.element_handle())
    page.mouse.click(x, y)
    page.wait_for_function("() => document.querySelector('.linked').linkedState.query === 5")
    assert view(page, "row").locator(".lp-caption").inner_text().startswith("What 5:")
    weights = pattern(len(NASTY))[0]
    assert values(page)[2] == f"2: {weights[5, 2]:.4g}" and values(page)[6] == "6"
    column = view(page, "column").locator("span[data-pos]")
    assert column.nth(7).get_attribute("title") == f"7: {weights[7, 2]:.4g}"
    assert column.nth(1).get_attribute("title") == "1"


def test_keys_move_and_select(page):
    strip = view(page, "row").locator(".lp-focus")
    strip.focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    heard = view(page, "row").locator(".lp-heard").inner_text()
    page.keyboard.press("Enter")
    key = page.evaluate("document.querySelector('.linked').linkedState.key")
    assert heard.startswith(f"{key} ")
    grid = view(page, "map").locator(".lp-focus")
    grid.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.linked').linkedState.query === 6")
    assert "query position 6" in view(page, "map").locator(".lp-heard").inner_text()
    assert grid.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


def test_the_numbers_are_there_as_a_table(page):
    details = view(page, "map").locator("details")
    details.locator("summary").click()
    assert details.locator("tr").count() == 1 + len(NASTY) * (len(NASTY) + 1) // 2
    assert details.locator("th").all_inner_texts()[2] == "attention weight (fraction)"
    assert NASTY[2] in details.locator("table").inner_text().replace("·", " ")


def test_no_token_was_run(page):
    assert page.evaluate("window.ran === undefined")
    assert NASTY[0] in page.locator("body").inner_text().replace("·", " ")
    assert page.locator("img").count() == 0


def test_a_long_pattern_is_pooled_as_in_python(browser, tmp_path):
    tokens = [f"t{i}" for i in range(300)]
    page = opened(browser, tmp_path, tokens)
    shown = view(page, "map").locator(".js-plotly-plot").evaluate(DATA)
    expected = plots.attention(pattern(300)[0], tokens).data[0].z
    np.testing.assert_allclose(np.array(shown, dtype=float), expected, atol=1e-4)
