"""The attention explorer through its traits, without a browser."""

import numpy as np
import pytest
import torch
from tiny import make, tiny_config, tokens
from traitlets import TraitError

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.lens.attention import attention_maps
from llama_probe.model.llama import Llama
from llama_probe.page import pack
from llama_probe.widgets.attention import AttentionExplorer
from llama_probe.widgets.selection import Selection

TEXT = "The capital of France is Paris. The capital of France is"


@pytest.fixture(scope="module")
def model():
    return lp.load("tiny-moe")


def pattern_of(model, prompt, layer, head):
    _, cache = model.run_with_cache(prompt, names_filter=lp.act_name("pattern", layer))
    return cache["pattern", layer][0, head].numpy()


def shown(explorer, name="map"):
    return np.array(explorer.figure(name).data[0].z, dtype=float)


def without_future(pattern):
    return np.where(np.tri(*pattern.shape, dtype=bool), pattern, np.nan)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3", "mixtral", "llama4-scout"])
def test_patterns_are_the_models_own(family):
    model = make(family)
    ids = tokens(1, 40)
    maps = attention_maps(model, ids)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            expected = pattern_of(model, ids, layer, head)
            np.testing.assert_allclose(maps.pattern(layer, head), expected, atol=2e-6)
            some = maps.pattern(layer, head, [3, 39])
            np.testing.assert_allclose(some, expected[[3, 39]], atol=2e-6)


def test_scores_are_those_of_head_scores(model):
    scores = attention_maps(model, TEXT).scores()
    expected = lp.head_scores(model, TEXT)
    keys = ["layer", "head", "metric"]
    assert scores[keys].equals(expected[keys])
    np.testing.assert_allclose(scores.value, expected.value, atol=1e-5)


def test_scores_of_a_long_text_are_of_some_queries():
    model = Llama(tiny_config(n_ctx=512))
    scores = attention_maps(model, torch.randint(0, 50, (400,))).scores()
    assert set(scores.n) == {256} and scores.value.notna().all()


def test_what_a_head_writes_sums_to_its_share_of_a_logit(model):
    maps = attention_maps(model, TEXT)
    parts = lp.direct_logit_attribution(model, TEXT, " Paris")
    frame = maps.writes(1, 2, -1, top_k=1000)
    mine = frame[frame.token == " Paris"].value.iloc[0]
    expected = parts.query("layer == 1 and head == 2").value.iloc[0]
    assert mine == pytest.approx(expected, abs=1e-4)
    by_key = [maps.writes(1, 2, -1, key, top_k=1000) for key in range(len(maps.tokens))]
    total = sum(f[f.token == " Paris"].value.iloc[0] for f in by_key)
    assert total == pytest.approx(expected, abs=1e-4)


def test_value_weighted_shares_sum_to_one(model):
    maps = attention_maps(model, TEXT)
    shares = maps.value_weighted(2, 1)
    assert torch.allclose(shares.sum(-1), torch.ones(len(maps.tokens)))
    assert not torch.allclose(shares, maps.pattern(2, 1), atol=0.01)


def test_traits_choose_what_is_shown(model):
    explorer = AttentionExplorer(model, TEXT)
    explorer.layer, explorer.head = 2, 1
    expected = without_future(pattern_of(model, TEXT, 2, 1))
    np.testing.assert_allclose(shown(explorer), expected, atol=2e-6)
    explorer.query = 3
    np.testing.assert_allclose(explorer.figure("row").values, expected[3], atol=2e-6)
    explorer.key = 1
    np.testing.assert_allclose(explorer.figure("column").values, expected[:, 1], atol=2e-6)
    expected = attention_maps(model, TEXT).writes(2, 1, 3)
    np.testing.assert_allclose(explorer.figure("writes").data[0].x, expected.value, atol=1e-5)
    explorer.this_key_only = True
    expected = attention_maps(model, TEXT).writes(2, 1, 3, 1)
    np.testing.assert_allclose(explorer.figure("writes").data[0].x, expected.value, atol=1e-5)
    explorer.metric = "entropy"
    assert explorer.figure("grid").data[0].colorbar.title.text == "entropy (nats)"


def test_it_opens_on_the_strongest_head(model):
    explorer = AttentionExplorer(model, TEXT)
    scores = attention_maps(model, TEXT).scores().query("metric == 'induction'")
    best = scores.loc[scores.value.idxmax()]
    assert (explorer.layer, explorer.head) == (best["layer"], best["head"])


def test_weights_by_value(model):
    explorer = AttentionExplorer(model, TEXT)
    explorer.select(layer=1, head=0)
    explorer.weights = "value-weighted"
    expected = without_future(attention_maps(model, TEXT).value_weighted(1, 0).numpy())
    np.testing.assert_allclose(shown(explorer), expected, atol=1e-6)
    assert explorer.figure("map").data[0].colorbar.title.text == "share of what is moved"


def test_comparing_heads_and_prompts(model):
    other = "The capital of Spain is Madrid. The capital of Spain is"
    explorer = AttentionExplorer(model, [TEXT, other])
    explorer.select(layer=1, head=0)
    assert explorer.figure("other") is None
    explorer.compare = "side by side"
    explorer.other_prompt, explorer.other_layer, explorer.other_head = 1, 2, 3
    theirs = pattern_of(model, other, 2, 3)
    np.testing.assert_allclose(shown(explorer, "other"), without_future(theirs), atol=2e-6)
    explorer.compare = "difference"
    expected = without_future(pattern_of(model, TEXT, 1, 0) - theirs)
    np.testing.assert_allclose(shown(explorer), expected, atol=3e-6)
    assert explorer.figure("map").data[0].zmin == -1 and explorer.figure("other") is None
    explorer.compare = "side by side"  # as many tokens, but others
    names = explorer.figure("other").layout.xaxis.labelalias
    assert names["4"] == "4: ·Spain"
    assert explorer.figure("map").layout.xaxis.labelalias["4"] == "4: ·France"
    explorer.prompt = 1
    assert explorer.figure("row").tokens[4] == " Spain"


def test_prompts_of_unequal_length_have_no_difference(model):
    explorer = AttentionExplorer(model, [TEXT, "The capital"])
    explorer.other_prompt = 1
    with pytest.raises(InputError, match="14 tokens"):
        explorer.compare = "difference"
    explorer.compare = "side by side"
    assert shown(explorer, "other").shape == (3, 3)
    explorer.query = 13
    explorer.prompt = 1
    assert explorer.query == 2 and shown(explorer).shape == (3, 3)


def test_one_token_one_head():
    model = Llama(tiny_config(n_heads=1, n_key_value_heads=1))
    explorer = AttentionExplorer(model, torch.tensor([7]))
    assert shown(explorer).tolist() == [[1.0]] and explorer.metric == "previous_token"
    assert explorer.figure("row").values.tolist() == [1.0]


def test_a_long_prompt_is_pooled_and_exact_where_zoomed():
    model = Llama(tiny_config(n_ctx=1024))
    ids = torch.randint(0, 50, (600,))
    explorer = AttentionExplorer(model, ids)
    explorer.select(layer=1, head=2)
    exact = pattern_of(model, ids, 1, 2)
    assert shown(explorer).shape == (200, 200)
    assert shown(explorer)[199, 0] == pytest.approx(exact[597:, :3].max(), abs=1e-6)
    explorer._viewers["map"]._hear(None, {"zoom": {"y": [519.6, 399.5], "x": [99.5, 180.2]}}, None)
    np.testing.assert_allclose(shown(explorer), exact[400:521, 100:181], atol=1e-6)
    assert explorer.figure("map").data[0].x[0] == 100
    explorer._viewers["map"]._hear(None, {"zoom": None}, None)
    assert shown(explorer).shape == (200, 200)
    # A click in a square means its largest weight.
    explorer._viewers["map"]._hear(None, {"click": {"y": 597, "x": 300}}, None)
    square = exact[597:600, 300:303]
    assert exact[explorer.query, explorer.key] == square.max()


@pytest.mark.slow
def test_the_default_figure_of_2048_tokens_is_small():
    model = Llama(tiny_config(n_ctx=2048))
    ids = torch.randint(0, 50, (2048,))
    explorer = AttentionExplorer(model, ids)
    assert len(explorer._viewers["map"].spec) < 2_000_000
    explorer._viewers["map"]._hear(None, {"zoom": {"y": [1500, 1700], "x": [10, 200]}}, None)
    exact = pattern_of(model, ids, explorer.layer, explorer.head)
    np.testing.assert_allclose(shown(explorer), exact[1500:1701, 10:201], atol=1e-6)


def test_a_selection_may_be_shared_with_another_model(model):
    selection = Selection()
    big = AttentionExplorer(model, TEXT, selection=selection)
    small = AttentionExplorer(Llama(tiny_config()), torch.tensor([1, 2, 3]), selection=selection)
    big.layer = 1
    assert small.layer == 1
    before = shown(small)
    big.layer = 3  # of which the small one has none
    np.testing.assert_array_equal(shown(small), before)


@pytest.mark.parametrize(("n_layers", "n_pos", "ndim"), [(2, 20, 4), (9, 1000, 3), (2, 1600, 2)])
def test_a_page_holds_as_many_patterns_as_fit(n_layers, n_pos, ndim):
    model = Llama(tiny_config(n_layers=n_layers, n_ctx=2048, n_heads=8, d_head=8))
    explorer = AttentionExplorer(model, torch.randint(0, 50, (n_pos,)))
    explorer.select(layer=1, head=3)
    linked = explorer.linked()
    array = linked.arrays["pattern"]
    chosen = {"layer": 1, "head": 3, "query": 11, "key": 2}
    assert array.ndim == ndim
    assert (linked.note == "") == (ndim == 4)
    expected = without_future(pattern_of(model, explorer._prompts[0], 1, 3))
    for name, part in (("map", expected), ("row", expected[11]), ("column", expected[:, 2])):
        (view,) = (view for row in linked.rows for view in row if view.name == name)
        fill = view.fills[0]
        index = tuple(slice(None) if at is None else chosen[at] for at in fill.index)
        np.testing.assert_allclose(array[index], part, atol=2e-6)


def test_the_page_of_32_heads_by_512_tokens_is_small(tmp_path):
    cfg = tiny_config(n_layers=1, n_heads=32, n_key_value_heads=8, d_head=8, n_ctx=512)
    explorer = AttentionExplorer(Llama(cfg), torch.randint(0, 50, (512,)))
    explorer._pattern.cache_clear()
    path = explorer.to_html(tmp_path / "page.html")
    assert path.stat().st_size < 6_000_000
    assert explorer.linked().arrays["pattern"].shape == (1, 32, 512, 512)
    (fill,) = explorer.rows[0][1].fills
    assert fill.pool == 2 and shown(explorer).shape == (256, 256)
    about, _ = pack.packed({"x": explorer.linked().arrays["pattern"]})
    assert about["x"]["bits"] == 8


def test_wrong_input_gets_a_sentence(model):
    with pytest.raises(InputError, match="the list is empty"):
        AttentionExplorer(model, [])
    explorer = AttentionExplorer(model, TEXT)
    with pytest.raises(TraitError, match="expected any of"):
        explorer.compare = "both"
    with pytest.raises(InputError, match="it has: entropy"):
        explorer.metric = "inductoin"
