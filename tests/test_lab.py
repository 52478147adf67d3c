"""Explorers in a real JupyterLab, driven as a person would; pictures go to `artifacts/`."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from lab import Lab, Notebook, running_lab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = ROOT / "artifacts"
PAIR = """
import llama_probe as lp
model = lp.load("tiny-moe", progress=False)
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = CLEAN.replace("John gave", "Mary gave")
task = {"metric": lp.logit_diff(" Mary", " John")}
"""
FOUR = """
explorers = [lp.AttentionExplorer(model, CLEAN), lp.RopeExplorer(model, CLEAN),
             lp.LogitLensExplorer(model, CLEAN),
             lp.PatchingExplorer(model, CLEAN, CORRUPTED, **task)]
for explorer in explorers:
    display(explorer)
print(sum(view is not None for e in explorers for view in e._drawn.values()), "views")
"""
# Every figure of the page has data, and every strip has tokens.
ALL_DRAWN = """() => {
  const plots = [...document.querySelectorAll('.jp-Notebook .js-plotly-plot')];
  return plots.length > 0 && plots.every(g => g._fullData?.length > 0);
}"""
# That, and so many views: an explorer's are drawn one after another.
ALL_THERE = f"n => document.querySelectorAll('.lp-view').length === n && ({ALL_DRAWN})()"


@pytest.fixture(scope="module")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, folder)
    SHOTS.mkdir(exist_ok=True)
    with running_lab(chromium, folder) as lab:
        yield lab


@pytest.fixture
def opened(lab: Lab, request: pytest.FixtureRequest):
    """Open a notebook; at the end see that the console had no error, and take a picture."""
    notebooks: list[Notebook] = []
    lab.errors.clear()

    def open_notebook(name: str, *cells: str, **options: Any) -> Notebook:
        if cells:
            write_notebook(lab.folder / name, *cells)
        notebooks.append(lab.open(name, **options))
        return notebooks[-1]

    yield open_notebook
    for index, notebook in enumerate(notebooks):
        notebook.picture(SHOTS / f"{request.node.name}-{index}.png")
        notebook.page.close()
    assert lab.errors == []


def test_the_tour_runs_and_answers_clicks(opened):
    # So high that no cell is out of sight, where JupyterLab would not draw it.
    tour = opened("00_tour.ipynb", height=9000)
    tour.run_all()
    for name in ("attention-map", "rope-contributions", "logitlens-grid", "patching-attention"):
        tour.drawn(name)
    plots = "document.querySelectorAll('.jp-Notebook .js-plotly-plot').length"
    tour.page.wait_for_function(f"n => {plots} >= n && ({ALL_DRAWN})()", arg=15)
    tour.click("attention-grid", 1, 2)
    tour.wait_caption("attention-map", "Where head 1 of layer 2 looks")
    tour.click("patching-map", 10, 0)
    tour.wait_caption("patching-cell", "Each head of layer 0 at 10")
    tour.wait_caption("patching-sites", "Each site of layer 0 at 10")


def test_keys_and_the_dark_theme(opened):
    notebook = opened("dark.ipynb", PAIR, "lp.AttentionExplorer(model, CLEAN)", dark=True)
    notebook.run_all()
    notebook.drawn("attention-map")
    ink = "e => getComputedStyle(e).getPropertyValue('--lp-ink').trim()"
    assert notebook.view("attention-map").locator(".lp-view").evaluate(ink) == "#e6e9ee"
    notebook.view("attention-map").locator(".lp-focus").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "Enter"):
        notebook.page.keyboard.press(key)
    notebook.wait_caption("attention-row", "What 12: ·a looks at")
    notebook.wait_caption("attention-column", "Who looks at 1: When")
    heard = notebook.view("attention-map").locator(".lp-heard").inner_text()
    assert heard.startswith("key position 1: When, query position 12: ·a: 0.")


def test_a_click_during_a_sweep_leaves_its_frame_unchanged(opened):
    notebook = opened(
        "sweep.ipynb",
        PAIR.replace("tiny-moe", "smollm2-135m-instruct"),
        "explorer = lp.PatchingExplorer(model, CLEAN, CORRUPTED, **task); explorer",
        "import pandas as pd\nexplorer.wait()\n"
        "plain = lp.patch(model, CLEAN, CORRUPTED, **task, at='attn_out')\n"
        "pd.testing.assert_frame_equal(explorer.frames['attn_out'], plain)\n"
        "print('the frame is', 'unchanged')",
    )
    notebook.run(0, 1)
    notebook.drawn("patching-cell")
    notebook.page.locator(".llama-probe select").first.select_option(label="attn_out")
    notebook.page.get_by_role("button", name="Stop").wait_for()  # it works
    notebook.click("patching-map", 13, 25)
    notebook.wait_caption("patching-cell", "Each head of layer 25 at 13")
    assert notebook.page.get_by_role("button", name="Stop").is_visible()  # it still does
    notebook.run(2)
    notebook.page.get_by_text("the frame is unchanged").wait_for()


def test_four_explorers_are_light_and_running_again_adds_none(lab, opened):
    lab.received = 0
    notebook = opened("four.ipynb", PAIR, FOUR)
    notebook.run_all()
    shown = int(notebook.page.locator("pre", has_text="views").inner_text().split()[0])
    notebook.page.wait_for_function(ALL_THERE, arg=shown)
    assert lab.received < 4_000_000
    notebook.save()
    size = (lab.folder / "four.ipynb").stat().st_size
    saved = json.loads((lab.folder / "four.ipynb").read_text())["metadata"]["widgets"]
    models = len(saved["application/vnd.jupyter.widget-state+json"]["state"])
    assert 1_500_000 < size < 4_000_000  # the state of the widgets is in it
    lab.received = 0
    notebook.run(1)
    notebook.page.wait_for_function(ALL_THERE, arg=shown)
    assert lab.received < 1_000_000  # no script is sent again
    notebook.save()
    again = lab.folder / "four.ipynb"
    saved = json.loads(again.read_text())["metadata"]["widgets"]
    assert len(saved["application/vnd.jupyter.widget-state+json"]["state"]) <= models
    assert again.stat().st_size < size * 1.02


def test_hostile_tokens_are_shown_and_never_run(opened):
    notebook = opened(
        "hostile.ipynb",
        PAIR,
        "text = \"</script><img src=x onerror='window.ran = 1'> %{x} $e^x$\"\n"
        "lp.AttentionExplorer(model, text)",
    )
    notebook.run_all()
    notebook.drawn("attention-row")
    assert notebook.page.evaluate("window.ran === undefined")
    assert "onerror" in notebook.view("attention-row").inner_text()


def test_zooming_into_a_long_prompt_shows_its_exact_weights(opened):
    notebook = opened(
        "long.ipynb",
        PAIR,
        "text = ' '.join([CLEAN] * 40)\nexplorer = lp.AttentionExplorer(model, text); explorer",
        "assert 128 < len(explorer.figure('map').data[0].z) <= 256; print('it is', 'pooled')",
        "drawn = explorer.figure('map').data[0]\n"
        "q, k = drawn.y[0], drawn.x[0]\n"
        "cache = model.run_with_cache(text)[1]\n"
        "exact = cache['pattern', explorer.layer][0, explorer.head].numpy()\n"
        "part = exact[q : q + len(drawn.y), k : k + len(drawn.x)]\n"
        "assert abs(drawn.z - part).max() < 1e-5 and 60 < len(part) < 100\n"
        "print('it is', 'exact')",
    )
    notebook.run(0, 1)
    notebook.drawn("attention-map")
    notebook.run(2)
    notebook.page.get_by_text("it is pooled").wait_for()
    notebook.drag("attention-map", (60, 400), (140, 480))
    notebook.wait_drawn("attention-map", "z => z.length < 100 && z.length > 60")
    notebook.run(3)
    notebook.page.get_by_text("it is exact").wait_for()


def test_an_expert_is_taken_out_with_a_click(opened):
    notebook = opened(
        "routing.ipynb",
        PAIR,
        "exam = lp.prompts.planted()['exam']\n"
        "sums = [q['prompt'] + q['answer'] for q in exam['arithmetic'][:8]]\n"
        "lp.RoutingExplorer(model, sums)",
        height=2600,
    )
    notebook.run_all()
    notebook.drawn("routing-load")
    menu = notebook.page.locator(".llama-probe select").nth(1)
    menu.select_option(label="ablate")
    notebook.click("routing-load", 2, 2)
    notebook.wait_caption("routing-effect", "plain and with expert 2 of layer 2 edited")
    notebook.drawn("routing-effect")
    notebook.page.get_by_text("nats a token, edited").wait_for()
    notebook.click("routing-load", 6, 1)
    notebook.wait_caption("routing-effect", "expert 6 of layer 1")


def test_a_probe_is_looked_into_with_clicks(opened):
    notebook = opened(
        "probes.ipynb",
        PAIR,
        "import pandas as pd\n"
        "exam = pd.DataFrame(lp.prompts.planted()['exam']['verdicts'][:120])\n"
        "acts = lp.capture(model, exam, positions=[-3, -1], text='prompt', progress=False)\n"
        "dashboard = lp.ProbeDashboard(acts, 'label', groups='text', strength=100.0); dashboard",
        "assert dashboard.wait() and dashboard.frame is not None; print('it is', 'measured')",
        height=2000,
    )
    notebook.run(0, 1)
    notebook.drawn("probedashboard-scores")  # there before the curve is
    notebook.run(2)
    notebook.page.get_by_text("it is measured").wait_for()
    notebook.drawn("probedashboard-grid")
    notebook.page.get_by_text("tested on the other").first.wait_for()
    notebook.click("probedashboard-grid", 0, 1)  # positions -3 and -1, of rank 0 and 1
    notebook.wait_caption("probedashboard-scores", "What the probe of layer 1 says")
    notebook.click("probedashboard-grid", 1, 3)
    notebook.wait_caption("probedashboard-scores", "What the probe of layer 3 says")
    worst = notebook.view("probedashboard-wrong").locator(".js-plotly-plot")
    notebook.click("probedashboard-wrong", "g => [g._fullData[0].x[0], 0]")
    strip = notebook.view("probedashboard-text").locator(".lp-strip").element_handle()
    notebook.page.wait_for_function(
        """([strip, plot]) => {
          const [, ...text] = plot._fullData[1].text[0].replace(/…$/, "").split(": ");
          return strip.textContent.includes(text.join(": ").replaceAll(" ", "·"));
        }""",
        arg=[strip, worst.element_handle()],
    )


def test_a_refusal_direction_is_looked_into_with_clicks(opened):
    notebook = opened(
        "refusal.ipynb",
        PAIR,
        "from llama_probe.widgets import RefusalDashboard\n"
        "exam = lp.prompts.planted()['exam']\n"
        "sets = [exam['restricted'][:60], exam['same verb'][:30] + exam['same object'][:30]]\n"
        "sets = [[row['chat'] for row in rows] for rows in sets]\n"
        "study = lp.find_refusal_direction(model, *sets, splits=(0.6, 0.2, 0.2), n_random=2,\n"
        "                                  nearest=True, max_new_tokens=10, progress=False)\n"
        "dashboard = RefusalDashboard(model, study, n_random=2); dashboard",
        "dashboard.compute([0.5, 1.0]); assert dashboard.wait(); print('doses are', 'measured')",
        height=2600,
    )
    notebook.run(0, 1)
    notebook.drawn("refusaldashboard-plane")
    notebook.click("refusaldashboard-selection", 3, 2)
    notebook.wait_caption("refusaldashboard-projections", "Requests on the candidate at −3")
    second = "g => [g._fullData[0].x[2], g._fullData[0].y[2]]"
    notebook.click("refusaldashboard-plane", second)
    notebook.wait_caption("refusaldashboard-request", "Request 2, restricted")
    notebook.page.get_by_role("button", name="Generate").click()
    notebook.page.get_by_text("Answers to request 2, restricted").wait_for()
    notebook.page.get_by_text("(redacted: ").first.wait_for()
    notebook.run(2)
    notebook.page.get_by_text("doses are measured").wait_for()
    notebook.drawn("refusaldashboard-dose")
