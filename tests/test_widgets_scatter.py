"""Principal components of activations: the analysis, the figure, the explorer."""

import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from browser import ARGS
from playwright.sync_api import sync_playwright
from sklearn.decomposition import PCA
from test_plots import NASTY, as_csv

import llama_probe as lp
from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.lens import activation_pca
from llama_probe.model.llama import Llama
from llama_probe.page import pack
from llama_probe.page.report import own_file, templates
from llama_probe.widgets.scatter import ActivationScatter
from llama_probe.widgets.selection import Selection

TOKENS = tiny.tokens(batch=9, length=6)
LABELS = ["a", "b", "a"] * 3
TEXTS = [f"{name} went to the {place}" for name in ("Mary", "John") for place in ("city", "store")]
TEXTS[0] = "When Mary and John went home, " + TEXTS[0]  # not all of one length


@pytest.fixture(scope="module", params=["llama-gqa", "mixtral", "qwen2-moe"])
def model(request) -> Llama:
    return tiny.make(request.param)


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe", device="cpu")


def sent(explorer, name="scatter"):
    return json.loads(explorer._viewers[name].spec)


# The analysis.


@pytest.mark.parametrize("at", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_components_are_those_of_scikit_learn(model, at):
    frame = activation_pca(model, TOKENS, at, 3)
    _, cache = model.run_with_cache(TOKENS, names_filter=f"*hook_{at}")
    for layer in range(model.cfg.n_layers):
        pca = PCA(2, svd_solver="full")
        theirs = pca.fit_transform(cache[at, layer][:, 3].double().numpy())
        largest = np.abs(pca.components_).argmax(axis=1)
        theirs *= np.sign(pca.components_[[0, 1], largest])
        ours = frame[frame.layer == layer]
        np.testing.assert_allclose(ours[["pc1", "pc2"]], theirs, rtol=1e-5, atol=1e-5)
        shares = ours[["explained1", "explained2"]].drop_duplicates()
        np.testing.assert_allclose(shares, pca.explained_variance_ratio_[None], rtol=1e-5)


def test_the_frame_is_tidy(model):
    frame = activation_pca(model, TOKENS, labels=LABELS)
    columns = ["layer", "prompt", "text", "pc1", "pc2", "explained1", "explained2", "label"]
    assert list(frame) == columns
    assert len(frame) == model.cfg.n_layers * 9 and frame.attrs == {}
    assert frame[frame.layer == 1].label.tolist() == LABELS
    assert frame.text[0] == "".join(f"<{id}>" for id in TOKENS[0].tolist())
    assert (activation_pca(model, TOKENS).label == "").all()


@pytest.mark.parametrize("pos", [-1, -2, 1, 2])
def test_padding_and_batches_change_nothing(tiny_moe, pos, monkeypatch):
    frame = activation_pca(tiny_moe, TEXTS, pos=pos)
    streams = [tiny_moe.run_with_cache(text)[1]["resid_post", 1][0, pos] for text in TEXTS]
    points = torch.stack(streams).double().numpy()
    ours = frame[frame.layer == 1][["pc1", "pc2"]].to_numpy()
    theirs = PCA(2, svd_solver="full").fit_transform(points)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("llama_probe.lens.pca._BATCH", 3)
    again = activation_pca(tiny_moe, TEXTS, pos=pos)
    np.testing.assert_allclose(again[["pc1", "pc2"]], frame[["pc1", "pc2"]], rtol=1e-3, atol=1e-3)


def test_two_prompts_differ_along_one_component_and_the_same_ones_along_none(model):
    frame = activation_pca(model, TOKENS[:2])
    np.testing.assert_allclose(frame.explained1, 1, rtol=1e-6)
    np.testing.assert_allclose(frame.pc2, 0, atol=1e-5)
    same = activation_pca(model, TOKENS[:1].repeat(3, 1))
    assert (same[["pc1", "explained1", "explained2"]].abs() < 1e-6).all(axis=None)


def test_prompts_of_one_token(model):
    assert len(activation_pca(model, TOKENS[:, :1])) == 9 * model.cfg.n_layers


def test_wrong_arguments_get_a_sentence(model):
    for options, message in (
        ({"at": "pattern"}, "at is 'pattern', but should be one of resid_pre, "),
        ({"pos": 6}, "pos is 6, but prompt 0 has 6 tokens"),
        ({"pos": -7}, "pos is -7, but prompt 0 has 6 tokens"),
        ({"labels": ["a"]}, "there are 1 labels for 9 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            activation_pca(model, TOKENS, **options)
    for prompts in (TOKENS[:1], TOKENS[0], [5, 6], "Mary", ["Mary"], []):
        with pytest.raises(InputError, match="two or more prompts"):
            activation_pca(model, prompts)
    if not any("shared_out" in name for name in model.hook_dict):
        with pytest.raises(InputError, match="no layer of this model has a shared expert"):
            activation_pca(model, TOKENS, "shared_out")


def test_a_prompt_that_is_too_short_is_named(tiny_moe):
    with pytest.raises(InputError, match="pos is 7, but prompt 1 has"):
        activation_pca(tiny_moe, TEXTS, pos=7)


# The figure.


def pca_frame(labels=("x", "y", "x"), texts=("a", " b", "c")):
    rows = [(layer, prompt) for layer in range(2) for prompt in range(3)]
    frame = pd.DataFrame(rows, columns=["layer", "prompt"])
    frame["text"] = [texts[prompt] for _, prompt in rows]
    frame["label"] = [labels[prompt] for _, prompt in rows]
    frame["pc1"] = [layer + prompt / 2 for layer, prompt in rows]
    return frame.assign(pc2=-frame.pc1, explained1=0.625, explained2=0.25)


def test_kinds_differ_by_colour_and_by_shape():
    figure = plots.activation_pca(pca_frame())
    points, x, y = figure.data
    assert points.x.tolist() == [1, 1.5, 2] and points.y.tolist() == [-1, -1.5, -2]
    assert points.marker.color[0] == points.marker.color[2] == x.marker.color
    assert points.marker.color[1] == y.marker.color != x.marker.color
    assert points.marker.symbol[1] == y.marker.symbol != points.marker.symbol[0]
    assert (x.name, y.name) == ("x", "y") and figure.layout.showlegend
    assert figure.layout.xaxis.title.text == "component 1 (62.5&#37; of the variance)"
    assert figure.layout.title.text == "Layer 1"
    assert plots.activation_pca(pca_frame(), 0).data[0].x.tolist() == [0, 0.5, 1]


def test_without_labels_there_is_no_legend():
    figure = plots.activation_pca(pca_frame(labels=("", "", "")))
    assert len(figure.data) == 1 and not figure.layout.showlegend


def test_the_figure_is_the_same_after_concat_a_csv_and_in_any_order():
    frame = pca_frame()
    wanted = plots.activation_pca(frame).to_json()
    halves = pd.concat([frame.iloc[:2], frame.iloc[2:]], ignore_index=True)
    shuffled = frame.sample(frac=1, random_state=1)
    for again in (as_csv(halves), as_csv(halves, keep_default_na=False), shuffled):
        assert plots.activation_pca(again).to_json() == wanted
    empty = pca_frame(labels=("", "", ""))
    assert plots.activation_pca(as_csv(empty)).to_json() == plots.activation_pca(empty).to_json()


def test_hovers_are_clipped_and_escaped():
    points, *legend = plots.activation_pca(
        pca_frame(texts=("word " * 100, "<b>%{x}\n", "$x$"), labels=NASTY[:3])
    ).data
    assert len("".join(points.text[0].split("<br>"))) == 120
    assert points.text[1] == "&lt;b&gt;&#37;{x}↵" and points.text[2] == "&#36;x&#36;"
    assert all("<" not in entry.name for entry in legend)


def test_wrong_frames_get_a_sentence():
    frame = pca_frame()
    with pytest.raises(InputError, match="no column 'pc2'; it has: layer"):
        plots.activation_pca(frame.drop(columns="pc2"))
    with pytest.raises(InputError, match="no rows"):
        plots.activation_pca(frame.iloc[:0])
    with pytest.raises(InputError, match="no layer 5; it has: 0, 1"):
        plots.activation_pca(frame, 5)
    with pytest.raises(InputError, match="share a layer and a prompt"):
        plots.activation_pca(pd.concat([frame, frame]))


# The explorer.


def test_setting_a_layer_draws_its_points(model):
    explorer = ActivationScatter(model, TOKENS, labels=LABELS)
    frame = activation_pca(model, TOKENS)
    assert (explorer.prompt, explorer.layer) == (0, model.cfg.n_layers // 2)
    assert explorer._slider.value == explorer.layer
    for layer in (0, model.cfg.n_layers - 1):
        explorer.layer = layer
        points, ring, *legend = explorer.figure("scatter").data
        wanted = frame[frame.layer == layer]
        np.testing.assert_allclose(points.x, wanted.pc1, rtol=1e-5)
        np.testing.assert_allclose(points.y, wanted.pc2, rtol=1e-5)
        assert explorer._slider.value == layer and len(legend) == 2
        assert (
            f"({100 * wanted.explained1.iloc[0]:.1f}&#37;"
            in sent(explorer)["layout"]["xaxis"]["title"]["text"]
        )
    explorer._slider.value = 1
    assert explorer.layer == 1
    assert explorer._viewers["scatter"].caption.startswith("Layer 1 (")


def test_a_click_on_a_point_shows_its_prompt_in_full(tiny_moe):
    explorer = ActivationScatter(tiny_moe, TEXTS, pos=-2)
    explorer._viewers["scatter"]._hear(
        None, {"click": {"x": 0.1, "y": 0.2, "trace": 0, "index": 2}}, []
    )
    assert explorer.prompt == 2
    strip = explorer.figure("text")
    assert strip.tokens == tiny_moe.to_str_tokens(TEXTS[2])
    points, ring = explorer.figure("scatter").data
    assert (ring.x[0], ring.y[0]) == (points.x[2], points.y[2])
    assert "John went to the city (read at " in explorer._viewers["text"].caption
    explorer._viewers["scatter"]._hear(None, {"click": {"trace": 1, "index": 0}}, [])
    assert explorer.prompt == 2


def test_a_lasso_lists_its_prompts(model):
    explorer = ActivationScatter(model, TOKENS, labels=LABELS)
    assert explorer.figure("scatter").layout.dragmode == "lasso"
    assert explorer.figure("scatter").data[0].selectedpoints is None
    explorer._viewers["scatter"]._hear(None, {"select": [3, 0]}, [])
    assert explorer.chosen == [0, 3]
    assert list(explorer.figure("scatter").data[0].selectedpoints) == [0, 3]
    table = explorer._table.value
    assert "2 chosen prompts" in table and table.count("<tr>") == 3
    before = table
    explorer.layer = 0
    assert explorer.chosen == [0, 3] and explorer._table.value != before
    explorer._viewers["scatter"]._hear(None, {"select": []}, [])
    assert explorer.chosen == [] and "<table" not in explorer._table.value
    explorer._viewers["scatter"]._hear(None, {"select": [99]}, [])
    assert "chosen has 99, but prompts are 0 to 8" in explorer._status.value
    with pytest.raises(InputError, match="prompts are 0 to 8"):
        explorer.chosen = [-1]
    explorer.chosen = [8]
    assert "1 chosen prompt<" in explorer._table.value


def test_long_tables_are_cut(model, monkeypatch):
    monkeypatch.setattr("llama_probe.widgets.scatter._MOST_ROWS", 2)
    explorer = ActivationScatter(model, TOKENS)
    explorer.chosen = range(5)
    assert "5 chosen prompts, the first 2 of them" in explorer._table.value
    assert explorer._table.value.count("<tr>") == 3


def test_another_site_is_run_live_and_only_once(model):
    explorer = ActivationScatter(model, TOKENS)
    explorer.at = "attn_out"
    frame = activation_pca(model, TOKENS, "attn_out")
    wanted = frame[frame.layer == explorer.layer]
    np.testing.assert_allclose(explorer.figure("scatter").data[0].x, wanted.pc1, rtol=1e-5)
    explorer.at = "resid_post"
    explorer.at = "attn_out"
    assert explorer._frames.cache_info().misses == 2
    with pytest.raises(InputError, match="at is 'pattern'"):
        explorer.at = "pattern"


def test_layers_without_the_site_have_no_figure():
    explorer = ActivationScatter(tiny.make("qwen2-moe"), TOKENS, at="shared_out")
    assert explorer.layer == 2
    explorer.layer = 1
    assert explorer.figure("scatter") is None
    explorer.chosen = [0]
    assert "<63><90>" in html.unescape(explorer._table.value)
    assert np.isnan(explorer.arrays()["pc1"][1]).all()
    explorer.layer = 0
    assert explorer.figure("scatter") is not None


def test_what_another_explorer_selects_out_of_range_is_ignored(model):
    selection = Selection(prompt=3, layer=70)
    explorer = ActivationScatter(model, TOKENS, selection=selection)
    assert (explorer.prompt, explorer.layer) == (3, model.cfg.n_layers // 2)
    before = explorer.figure("scatter")
    selection.layer = 70
    assert selection.layer == 70 and explorer.figure("scatter") is before
    selection.prompt = 4
    assert explorer.figure("text").tokens == [f"<{id}>" for id in TOKENS[4].tolist()]


def test_close_stops_listening(model):
    explorer = ActivationScatter(model, TOKENS)
    explorer.close()
    before = explorer.figure("text")
    explorer.selection.prompt = 5
    assert explorer.closed and explorer.figure("text") is before


def test_a_pages_arrays_are_the_live_figures(tiny_moe):
    explorer = ActivationScatter(tiny_moe, TEXTS, labels=["m", "m", "j", "j"])
    arrays = explorer.linked().arrays
    for layer, prompt in ((0, 1), (3, 2)):
        explorer.select(layer=layer, prompt=prompt)
        points, ring, *_ = explorer.figure("scatter").data
        np.testing.assert_allclose(arrays["pc1"][layer], points.x, rtol=1e-5)
        np.testing.assert_allclose(arrays["pc2"][layer], points.y, rtol=1e-5)
        np.testing.assert_allclose(arrays["ring1"][layer, prompt], ring.x, rtol=1e-5)
        np.testing.assert_allclose(arrays["ring2"][layer, prompt], ring.y, rtol=1e-5)
        assert arrays["tokens"][prompt] == sent(explorer, "text")["tokens"]


def test_a_page_says_shares_in_captions_not_on_axes(tiny_moe, tmp_path):
    explorer = ActivationScatter(tiny_moe, TEXTS)
    explorer.chosen = [1]
    view = explorer.linked().rows[0][0]
    figure = view.draw()
    assert figure.layout.xaxis.title.text == "component 1"
    assert figure.data[0].selectedpoints is None and figure.layout.dragmode == "zoom"
    assert list(explorer.figure("scatter").data[0].selectedpoints) == [1]
    assert "% of the variance)" in explorer.linked().labels["layer"][0]
    assert explorer.to_html(tmp_path / "a.html").stat().st_size > 1_000_000


def test_hostile_prompts_are_only_text(tiny_moe, tmp_path):
    texts = [text or "x" for text in NASTY]
    explorer = ActivationScatter(tiny_moe, texts, pos=0, labels=NASTY)
    explorer.chosen = range(len(texts))
    table = explorer._table.value
    assert "<b>" not in table and "</script>" not in table and "&lt;/script&gt;" in table
    assert "<b>" not in explorer.figure("scatter").to_json()
    page = explorer.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") and "<b>bold" not in page


# In a browser.

_HARNESS = """<body><div id="root" style="width: 900px"></div><script type="module">
%s
const raw = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
window.heard = [];
const tools = {Plotly: await loadPlotly(raw), templates: %s};
window.view = new View(document.getElementById("root"), {
  ...tools, onSelect: (select) => heard.push({select}), onClick: (click) => heard.push({click}),
});
window.show = (spec) => view.show({kind: "figure", caption: "", spec, marks: {}});
await show(%s);
document.documentElement.dataset.drawn = "all";
</script></body>"""


def lasso(page, *corners):
    """Drag around a part of the plot, given in shares of its width and height."""
    box = page.query_selector(".nsewdrag").bounding_box()
    points = [
        (box["x"] + x * box["width"], box["y"] + y * box["height"])
        for x, y in [*corners, corners[0]]
    ]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


@pytest.mark.browser
@pytest.mark.slow
def test_a_lasso_in_a_browser_says_which_points_and_drawing_anew_says_nothing(
    chromium, tiny_moe, tmp_path: Path
):
    explorer = ActivationScatter(tiny_moe, TEXTS, labels=["m", "m", "j", "j"])
    spec = json.dumps(sent(explorer)).replace("<", "\\u003c")
    parts = own_file("views.js"), pack.plotly_text(), json.dumps(templates()), spec
    (tmp_path / "a.html").write_text(_HARNESS % parts, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        try:
            page = browser.new_page()
            page.goto((tmp_path / "a.html").as_uri())
            page.wait_for_selector("html[data-drawn]", state="attached")
            lasso(page, (0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98))
            page.wait_for_function("heard.length")
            assert page.evaluate("heard") == [{"select": [0, 1, 2, 3]}]
            explorer._viewers["scatter"]._hear(None, {"select": [0, 2]}, [])
            explorer.layer = 0
            page.evaluate("spec => show(spec)", sent(explorer))
            assert page.evaluate("view.inner.plot._fullData[0].selectedpoints") == [0, 2]
            assert page.evaluate("heard.length") == 1
        finally:
            browser.close()
