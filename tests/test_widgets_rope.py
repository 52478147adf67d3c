"""The explorer of RoPE: what is selected drives every view, in the notebook and on a page."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import tiny
from browser import ARGS
from playwright.sync_api import sync_playwright
from test_page import unpacked
from test_plots import as_csv
from traitlets import TraitError

import llama_probe as lp
from llama_probe import lens, plots
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.model.rope import inverse_frequencies
from llama_probe.page import Strip, pack
from llama_probe.widgets import rope as widget
from llama_probe.widgets.rope import RopeExplorer
from llama_probe.widgets.selection import Selection

TOKENS = tiny.tokens(batch=1, length=9)[0]
PROMPT = "Mary and John went to the shop. John gave the book to Mary."
# Dense, scaled with wide heads, sparse, with a QK norm, and with a layer that has no RoPE (3).
FAMILIES = ["llama-gqa", "llama-scaled", "mixtral", "qwen3", "llama4-scout"]


@pytest.fixture(params=FAMILIES)
def model(request) -> Llama:
    return tiny.make(request.param)


@pytest.fixture
def scout() -> Llama:
    return tiny.make("llama4-scout")


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe")


def bars(explorer) -> np.ndarray:
    return np.asarray(explorer.figure("contributions").data[1].y)


def curve(explorer, line=0) -> np.ndarray:
    return np.asarray(explorer.figure("distance").data[line].y)


def raw_scores(model, tokens, layer):
    """The model's own scores, with chunks and windows left to see everything."""
    name = f"blocks.{layer}.attn.hook_attn_scores"
    return model.run_with_cache(tokens, names_filter=name)[1][name][0].numpy()


def test_what_is_selected_drives_every_view(model):
    explorer = RopeExplorer(model, TOKENS, max_distance=30)
    for layer, head, query, key in [(0, 0, 8, 0), (2, 7, 3, 1), (1, 3, 6, 6)]:
        explorer.layer, explorer.head, explorer.query, explorer.key = layer, head, query, key
        explorer.pair = 2
        frame = lp.rope_contributions(model, TOKENS, layer, head, query, key)
        np.testing.assert_allclose(bars(explorer), frame.value, rtol=1e-5, atol=1e-6)
        at_most = explorer.figure("contributions").data[0]
        lowest = np.asarray(at_most.base, dtype=float)
        np.testing.assert_allclose(-lowest, frame.amplitude, rtol=1e-5)
        scores = raw_scores(model, TOKENS, layer)[head, query]
        keys = explorer.figure("keys")
        np.testing.assert_allclose(keys.values[: query + 1], scores[: query + 1], atol=1e-4)
        assert np.isnan(keys.values[query + 1 :]).all()
        assert bars(explorer).sum() == pytest.approx(float(scores[key]), rel=1e-4, abs=1e-5)
        legend = explorer.figure("contributions").data[1].name
        assert legend == f"in this run (sum: {keys.values[key]:.3f})"
        of_pair = explorer.figure("of_pair").values
        assert of_pair[key] == pytest.approx(frame.value[2], abs=1e-6)
        expected = lp.rope_distance(model, TOKENS, layer, head, max_distance=30).value
        np.testing.assert_allclose(curve(explorer), expected, rtol=1e-5, atol=1e-6)
    explorer.close()


def test_only_what_reads_a_change_is_drawn_anew(tiny_moe):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    names = ["wavelengths", "angles", "queries", "keys", "contributions", "distance", "of_pair"]
    for change, anew in [
        ({"pair": 3}, {"of_pair"}),
        ({"key": 2}, {"contributions"}),
        ({"query": 5}, {"keys", "contributions", "of_pair"}),
        ({"head": 1}, {"keys", "contributions", "distance", "of_pair"}),
    ]:
        before = {name: explorer.figure(name) for name in names}
        explorer.select(**change)
        assert {name for name in names if explorer.figure(name) is not before[name]} == anew
    explorer.close()


def test_wavelengths_and_angles_are_those_of_the_model(model):
    explorer = RopeExplorer(model, TOKENS)
    frequency = inverse_frequencies(model.cfg, model.cfg.device).numpy()
    own, context = explorer.figure("wavelengths").data
    np.testing.assert_allclose(own.y, 2 * np.pi / frequency, rtol=1e-6)
    assert set(context.y) == {model.cfg.n_ctx} and own.name == "this model"
    (angles,) = explorer.figure("angles").data
    pair, pos = 1, 13
    turned = complex(np.cos(angles.z[pair][pos]), np.sin(angles.z[pair][pos]))
    angle = float(frequency[pair]) * pos
    assert turned == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=1e-5)
    assert (angles.zmin, angles.zmax) == (0, 2 * math.pi)
    assert np.min(angles.z) >= 0 and np.max(angles.z) <= 2 * math.pi
    # Both ends of a turn have one colour.
    assert angles.colorscale[0][1] == angles.colorscale[-1][1]
    explorer.close()


def test_clicks_select(tiny_moe):
    explorer = RopeExplorer(tiny_moe, PROMPT)

    def click(name, **point):
        view = next(view for row in explorer.rows for view in row if view.name == name)
        explorer.clicked(view, point)

    click("wavelengths", x=4, y=100.0)
    assert explorer.pair == 4
    click("angles", x=7, y=2)
    assert (explorer.query, explorer.pair) == (7, 2)
    click("angles", x=40, y=5)  # beyond the prompt
    assert (explorer.query, explorer.pair) == (7, 2)
    click("contributions", x=9, y=0.1)
    click("queries", x=11)
    click("keys", x=6)
    assert (explorer.pair, explorer.query, explorer.key) == (9, 11, 6)
    click("of_pair", x=3)
    assert explorer.key == 3
    explorer.close()


def test_a_layer_without_rope_says_so(scout):
    explorer = RopeExplorer(scout, TOKENS)
    explorer.layer = 3
    assert "Layer 3 has no RoPE" in explorer._status.value
    assert np.isnan(bars(explorer)).all() and np.isnan(curve(explorer)).all()
    assert np.isnan(explorer.figure("of_pair").values).all()
    assert explorer.figure("contributions").data[1].name == "no RoPE in layer 3"
    scores = raw_scores(scout, TOKENS, 3)[0, 8]  # there are scores, with their temperature
    np.testing.assert_allclose(explorer.figure("keys").values, scores, atol=1e-4)
    assert explorer.labels["layer"] == ["0", "1", "2", "3 (no RoPE)"]
    assert "of layer 3 (no RoPE)" in explorer._viewers["keys"].caption
    explorer.layer = 1
    assert "RoPE" not in explorer._status.value and np.isfinite(bars(explorer)).all()
    explorer.close()


def test_a_model_without_rope_and_one_whose_first_layer_has_none():
    for layers, first in [((False, False), 0), ((False, True), 1)]:
        model = Llama(tiny.tiny_config(rope_layers=layers))
        tiny.randomise(model)
        explorer = RopeExplorer(model, TOKENS % 50)
        assert explorer.layer == first
        assert np.isfinite(bars(explorer)).all() == layers[first]
        assert explorer.arrays()["added"].shape == (2, 4, 9, 9, 2)
        explorer.close()


def test_a_later_key_is_not_seen(tiny_moe, tmp_path):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    explorer.select(query=2, key=5)
    assert np.isnan(bars(explorer)).all()
    assert explorer.figure("contributions").data[1].name == "not seen: a later key"
    assert "Position 2 does not see position 5" in explorer._status.value
    assert "not seen: a later key" in explorer.to_html(tmp_path / "page.html").read_text()
    explorer.query = 6
    assert np.isfinite(bars(explorer)).all() and "does not see" not in explorer._status.value
    explorer.close()


def test_one_token_and_one_head():
    model = Llama(tiny.tiny_config(n_heads=1, n_key_value_heads=1, n_layers=1))
    tiny.randomise(model)
    token = TOKENS[:1] % 50
    explorer = RopeExplorer(model, token, max_distance=0)
    score = float(raw_scores(model, token, 0)[0, 0, 0])
    assert bars(explorer).sum() == pytest.approx(score, rel=1e-5)
    # Alone, and no distance apart, the mean is that one score.
    assert curve(explorer) == pytest.approx([score], rel=1e-5)
    assert explorer.linked().arrays["score"].shape == (1, 1, 1, 1)
    explorer.close()


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        ("as it is", "with theta 500000"),
        ("none", "with theta 500000, not scaled"),
        ("linear", "with theta 500000, linear scaling by 4"),
        ("llama3", "with theta 500000, Llama 3's scaling by 4"),
    ],
)
def test_another_rope_is_shown_beside_the_models_own(tiny_moe, scaling, name):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    assert len(explorer.figure("distance").data) == 1
    before = curve(explorer)
    explorer.other_factor, explorer.other_theta, explorer.other_scaling = 4.0, 5e5, scaling
    own, other, context = explorer.figure("wavelengths").data
    assert [own.name, other.name] == ["this model", name] and "context" in context.name
    plain = 2 * np.pi * 5e5 ** (np.arange(16) / 16)
    if scaling == "linear":
        np.testing.assert_allclose(other.y, 4 * plain, rtol=1e-5)
    elif scaling == "llama3":
        np.testing.assert_allclose(other.y[[0, -1]], plain[[0, -1]] * [1, 4], rtol=1e-5)
    else:
        np.testing.assert_allclose(other.y, plain, rtol=1e-5)
    np.testing.assert_array_equal(curve(explorer), before)
    changed = widget._turned_otherwise(tiny_moe.cfg, 5e5, scaling, 4.0)
    expected = lp.rope_distance(tiny_moe, PROMPT, 0, 0, rope=changed).value
    np.testing.assert_allclose(curve(explorer, 1), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(curve(explorer, 1) - before).max() > 0.1
    explorer.other_theta, explorer.other_scaling = tiny_moe.cfg.rope_theta, "none"
    assert len(explorer.figure("distance").data) == 1  # again the model's own
    explorer.close()


def test_the_scaling_of_a_model_can_be_taken_away():
    model = tiny.make("llama-scaled")
    explorer = RopeExplorer(model, TOKENS)
    explorer.other_scaling = "none"
    own, other, _ = explorer.figure("wavelengths").data
    assert own.y[-1] == pytest.approx(8 * other.y[-1]) and own.y[0] == pytest.approx(other.y[0])
    explorer.close()


def test_a_wrong_option_is_refused(tiny_moe):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    for name, value in [("other_theta", 0.0), ("other_scaling", "yarn"), ("other_factor", -1.0)]:
        with pytest.raises(TraitError):
            setattr(explorer, name, value)
    with pytest.raises(InputError, match="layer is 4, but should be 0 to 3"):
        explorer.layer = 4
    explorer.close()
    with pytest.raises(InputError, match="max_distance is -1"):
        RopeExplorer(tiny_moe, PROMPT, max_distance=-1)


def test_a_distance_under_the_models_own_rope_is_the_same():
    model = tiny.make("llama-gqa")
    own = lp.rope_distance(model, TOKENS, 1, 2)
    again = lp.rope_distance(model, TOKENS, 1, 2, rope=model.cfg)
    assert own.equals(again)
    # The layout is the model's, whatever the other configuration says.
    theirs = model.cfg.but(rope_layout="interleaved")
    assert own.equals(lp.rope_distance(model, TOKENS, 1, 2, rope=theirs))
    with pytest.raises(InputError, match="heads of 64 coordinates, but the model's have 8"):
        lp.rope_distance(model, TOKENS, 1, 2, rope=lp.LlamaConfig.preset("smollm2-135m"))


def test_a_distance_under_another_rope_is_that_of_a_model_that_has_it():
    """Layer 0 has the same queries and keys under any RoPE."""
    model, other = tiny.make("llama-gqa"), tiny.make("llama-gqa")
    cfg = model.cfg.but(rope_theta=77.0, rope_divisors=(1.0, 2.0, 3.0, 4.0))
    theirs = Llama(cfg)
    theirs.load_state_dict(other.state_dict())
    frame = lp.rope_distance(model, TOKENS, 0, 5, query=8, key=2, rope=cfg)
    score = float(raw_scores(theirs, TOKENS, 0)[5, 8, 2])
    assert frame.value[6] == pytest.approx(score, rel=1e-4, abs=1e-6)


def test_maps_answer_for_all_heads_at_once(model):
    maps = lens.rope_maps(model, TOKENS)
    for layer in (0, 2):
        scores = raw_scores(model, TOKENS, layer)
        seen = np.tri(len(TOKENS), dtype=bool)
        np.testing.assert_allclose(maps.scores(layer)[:, seen], scores[:, seen], atol=2e-4)
        np.testing.assert_allclose(maps.added(layer).sum(-1), maps.scores(layer), atol=1e-4)
        assert (maps.added(layer).abs() <= maps.amplitudes(layer) * (1 + 1e-4) + 1e-6).all()
        for head in range(model.cfg.n_heads):
            curve = lp.rope_distance(model, TOKENS, layer, head, max_distance=9).value
            np.testing.assert_allclose(maps.curves(layer, max_distance=9)[head], curve, atol=1e-6)
    with pytest.raises(InputError, match="layer is 2, but these maps hold 0, 1"):
        lens.rope_maps(model, TOKENS, [0, 1]).scores(2)


def test_a_shared_selection(tiny_moe):
    selection = Selection(layer=2, head=3, query=99, pair=5)
    explorer = RopeExplorer(tiny_moe, PROMPT, selection=selection)
    last = len(explorer.labels["query"]) - 1
    assert (explorer.layer, explorer.head, explorer.pair, explorer.query) == (2, 3, 5, last)
    before = bars(explorer)
    selection.query = 99  # of another prompt
    np.testing.assert_array_equal(bars(explorer), before)
    selection.query = 4
    frame = lp.rope_contributions(tiny_moe, PROMPT, 2, 3, 4, 0)
    np.testing.assert_allclose(bars(explorer), frame.value, rtol=1e-5, atol=1e-6)
    explorer.close()
    shown = explorer.figure("contributions")
    selection.choose(query=6)
    assert explorer.figure("contributions") is shown and explorer.closed


def test_menus_and_selection_follow_each_other(tiny_moe):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    layers, heads = explorer._menus["layer"], explorer._menus["head"]
    layers.value = 2
    assert explorer.layer == 2
    explorer.head = 3
    assert heads.value == 3
    explorer.selection.layer = 50  # another model's
    assert layers.value == 2
    explorer.close()


def test_the_model_runs_once(tiny_moe, monkeypatch):
    runs = []
    run = Llama.run_with_cache
    monkeypatch.setattr(Llama, "run_with_cache", lambda *a, **k: runs.append(1) or run(*a, **k))
    explorer = RopeExplorer(tiny_moe, PROMPT)
    explorer.select(layer=1, head=2, query=5, key=1)
    explorer.arrays()
    assert len(runs) == 1
    explorer.close()


def filled_figures(explorer, **state):
    """What a page's script would fill in for another selection: (view, trace, what) to numbers."""
    linked = explorer.linked()
    about, blob = pack.packed(linked.arrays)
    found = {}
    for row in linked.rows:
        for view in row:
            for fill in view.fills:
                index = tuple(
                    slice(None) if name is None else {**linked.state, **state}[name]
                    for name in fill.index
                )
                if isinstance(linked.arrays[fill.array], list):
                    value = linked.arrays[fill.array]
                    for place in index:
                        value = value[place]
                else:
                    value = unpacked(about, blob, fill.array)[index]
                found[view.name, fill.trace, fill.attribute] = value
    return found


def assert_page_is_live(explorer, **state):
    filled = filled_figures(explorer, **state)
    explorer.select(**state)
    for (name, trace, attribute), value in filled.items():
        shown = explorer.figure(name)
        own = shown if isinstance(shown, Strip) else shown.data[trace]
        live = getattr(own, attribute)
        live = live if isinstance(live, str) else np.asarray(live, dtype=float)
        if isinstance(value, str):
            assert value == live
        else:
            np.testing.assert_allclose(value, live, atol=2e-3, err_msg=f"{name} {attribute}")
    return {name for name, _, _ in filled}


def test_a_page_shows_what_the_explorer_shows(tiny_moe):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    explorer.other_scaling = "linear"
    for state in [
        {"layer": 1, "head": 3, "query": 9, "key": 4, "pair": 5},
        {"layer": 2, "head": 0, "query": 3, "key": 3, "pair": 0},
        {"layer": 3, "head": 1, "query": 7, "key": 2, "pair": 15},  # no RoPE
        {"layer": 0, "head": 1, "query": 2, "key": 7, "pair": 1},  # not seen
    ]:
        filled = assert_page_is_live(explorer, **state)
        assert filled == {"keys", "contributions", "distance", "of_pair"}
    assert explorer.controls() == ["layer", "head"] and "only" not in explorer.note()
    explorer.close()


@pytest.mark.parametrize(
    ("most", "kept", "note"),
    [
        (4000, ["head"], "This page holds layer 2 only."),
        (1000, [], "This page holds head 1 of layer 2 only."),
        (100, [], "This page holds query 6 of head 1 of layer 2 only."),
    ],
)
def test_a_page_holds_what_there_is_room_for(monkeypatch, most, kept, note):
    monkeypatch.setattr(widget, "_MOST_NUMBERS", most)
    model = tiny.make("mixtral")  # 3 layers, 8 heads, 9 tokens, 4 pairs
    explorer = RopeExplorer(model, TOKENS)
    explorer.select(layer=2, head=1, query=6)
    assert explorer.controls() == kept and explorer.note().startswith(note)
    sizes = [np.size(array) for array in explorer.arrays().values()]
    assert max(sizes) <= max(most, 129 * 8)
    state = {"head": 5} if kept else {}
    state |= {} if most == 100 else {"query": 4}
    assert_page_is_live(explorer, key=3, pair=2, **state)
    clicks = [name for row in explorer.linked().rows for v in row for name in v.clicks.values()]
    assert ("query" in clicks) == (most != 100) and {"key", "pair"} <= set(clicks)
    explorer.close()


def hovered(page, plot, explorer) -> str:
    """Point at the bar of what a pair could add, beside what it adds; how much that is."""
    most = -np.asarray(explorer.figure("contributions").data[0].base, dtype=float)
    pair = int(most.argmax())
    plot.scroll_into_view_if_needed()
    x, y = plot.evaluate(
        """(g, [x, y]) => {
          const {xaxis, yaxis} = g._fullLayout, {left, top} = g.getBoundingClientRect();
          return [left + xaxis._offset + xaxis.d2p(x), top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [pair, -most[pair] / 2 * np.sign(bars(explorer)[pair])],
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y, steps=3)
    plot.locator(".hovertext").wait_for()
    return f"{most[pair]:.3f}"


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_answers_clicks(chromium, tiny_moe, tmp_path):
    explorer = RopeExplorer(tiny_moe, PROMPT)
    explorer.other_theta = 1e5
    path = explorer.to_html(tmp_path / "rope.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        page = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}).new_page()
        page.set_default_timeout(30_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        page.locator("select").nth(0).select_option("1")
        page.locator('[data-view="queries"] span[data-pos="9"]').click()
        page.locator('[data-view="keys"] span[data-pos="4"]').click()
        explorer.select(layer=1, query=9, key=4)
        legend = explorer.figure("contributions").data[1].name
        shown = page.locator('[data-view="contributions"]')
        page.wait_for_function("text => document.body.textContent.includes(text)", arg=legend)
        plot = shown.locator(".js-plotly-plot")
        np.testing.assert_allclose(
            plot.evaluate("g => [...g._fullData[1].y]"), bars(explorer), atol=1e-3
        )
        lines = page.locator('[data-view="distance"] .js-plotly-plot')
        for line in (0, 1):
            y = lines.evaluate("(g, line) => [...g._fullData[line].y]", line)
            np.testing.assert_allclose(y, curve(explorer, line), atol=1e-3)
        assert (
            f"at most ±{hovered(page, plot, explorer)}" in plot.locator(".hovertext").text_content()
        )
        assert errors == []
        browser.close()
    explorer.close()


def test_figures_of_wavelengths_and_angles_refuse_wrong_frames():
    own = lens.rope_wavelengths(tiny.tiny_config())
    angles = lens.rope_angles(tiny.tiny_config(), 3)
    for draw, frame in [(plots.rope_wavelengths, own), (plots.rope_angles, angles)]:
        assert isinstance(draw(frame), go.Figure)
        with pytest.raises(InputError, match="no column 'pair'"):
            draw(frame.drop(columns="pair"))
        with pytest.raises(InputError, match="no rows"):
            draw(frame.iloc[:0])
        with pytest.raises(InputError, match="share"):
            draw(frame.loc[[0, 0]])
    with pytest.raises(InputError, match="n_pos is 0"):
        lens.rope_angles(tiny.tiny_config(), 0)


def test_figures_draw_the_same_after_concat_and_a_csv_round_trip_and_in_any_order():
    cfg = tiny.tiny_config()
    settings = [
        lens.rope_wavelengths(cfg),
        lens.rope_wavelengths(cfg.but(rope_theta=9.0), "with 9"),
    ]
    angles = lens.rope_angles(cfg, 20)
    for draw, frame in [
        (plots.rope_wavelengths, pd.concat(settings, ignore_index=True)),
        (plots.rope_angles, pd.concat([angles[:9], angles[9:]], ignore_index=True)),
    ]:
        drawn = draw(frame).to_json()
        assert draw(as_csv(frame)).to_json() == drawn
        assert draw(frame.sample(frac=1, random_state=1)).to_json() == drawn
        assert draw(frame, "<b>").layout.title.text == "&lt;b&gt;"


def test_lines_of_distance_are_called_by_what_tells_them_apart(tiny_moe):
    own = lp.rope_distance(tiny_moe, PROMPT, 0, 1, max_distance=5)
    other = lp.rope_distance(tiny_moe, PROMPT, 2, 1, max_distance=5)

    def names(*frames):
        return [line.name for line in plots.rope_distance(pd.concat(frames)).data]

    assert names(own, other) == ["L0 H1", "L2 H1"]
    assert names(own.assign(setting="a"), own.assign(setting="b")) == ["a", "b"]
    assert names(own, own.assign(setting="b")) == ["L0 H1", "b"]
    assert names(own.assign(setting="a"), other.assign(setting="b")) == ["L0 H1, a", "L2 H1, b"]
    with pytest.raises(InputError, match="share a line"):
        names(own.assign(setting="a"), own.assign(setting="a"))
