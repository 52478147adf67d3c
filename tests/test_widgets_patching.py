"""The patching explorer through its traits, and its sweeps in the background."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import make, tokens

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.widgets.patching import PatchingExplorer
from llama_probe.widgets.selection import Selection

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
TASK = {"metric": lp.logit_diff(" Mary", " John")}


@pytest.fixture(scope="module")
def model():
    return lp.load("tiny-moe")


@pytest.fixture
def explorer(model):
    made = PatchingExplorer(model, CLEAN, CORRUPTED, **TASK)
    yield made
    made.close()


def z(explorer, name):
    return np.array(explorer.figure(name).data[0].z, dtype=float)


def y(explorer, name):
    return np.array(explorer.figure(name).data[0].y, dtype=float)


def test_it_opens_on_the_strongest_cell_and_head(model, explorer):
    frame = lp.patch(model, CLEAN, CORRUPTED, **TASK)
    np.testing.assert_allclose(z(explorer, "map").flatten(), frame.effect, atol=1e-5)
    best = frame.loc[frame.effect.abs().idxmax()]
    assert (explorer.layer, explorer.pos) == (best["layer"], best["pos"])
    assert explorer.head == int(np.abs(y(explorer, "cell")).argmax())


def test_a_click_opens_the_sites_and_heads_of_its_cell(model, explorer):
    explorer._viewers["map"]._hear(None, {"click": {"x": 10, "y": 0}}, None)
    assert (explorer.layer, explorer.pos) == (0, 10)
    chosen = {"layers": [0], "positions": [10]}
    sites = lp.patch(
        model, CLEAN, CORRUPTED, **TASK, **chosen, over=("layer", "pos"),
        at=["resid_pre", "attn_out", "mlp_out"],
    )  # fmt: skip
    np.testing.assert_allclose(y(explorer, "sites"), sites.effect, atol=1e-6)
    heads = lp.patch(
        model, CLEAN, CORRUPTED, **TASK, **chosen, at="z", over=("layer", "pos", "head")
    )
    np.testing.assert_allclose(y(explorer, "cell"), heads.effect, atol=1e-6)
    assert explorer.head == int(heads.effect.abs().to_numpy().argmax())
    explorer._viewers["cell"]._hear(None, {"click": {"x": 3, "y": 0.1}}, None)
    assert explorer.head == 3
    _, cache = model.run_with_cache(CLEAN)
    pattern = cache["pattern", 0][0, 3].numpy()
    shown = z(explorer, "attention")
    np.testing.assert_allclose(np.nan_to_num(shown), pattern, atol=2e-6)


def test_another_site_is_swept_in_the_background(model, explorer):
    before = z(explorer, "map")
    explorer.site = "mlp_out"
    assert explorer.wait(60.0)
    frame = lp.patch(model, CLEAN, CORRUPTED, **TASK, at="mlp_out")
    pd.testing.assert_frame_equal(explorer.frames["mlp_out"], frame)
    np.testing.assert_allclose(z(explorer, "map").flatten(), frame.effect, atol=1e-6)
    explorer.site = "resid_pre"  # known already
    np.testing.assert_array_equal(z(explorer, "map"), before)


def test_all_heads(model, explorer):
    assert explorer.figure("heads") is None
    explorer.sweep("z")
    assert explorer.wait(60.0)
    frame = lp.patch(model, CLEAN, CORRUPTED, **TASK, at="z")
    np.testing.assert_allclose(z(explorer, "heads").flatten(), frame.effect, atol=1e-6)
    explorer._viewers["heads"]._hear(None, {"click": {"x": 2, "y": 3}}, None)
    assert (explorer.layer, explorer.head) == (3, 2)


def test_a_click_during_a_sweep_leaves_its_frame_unchanged(model, explorer, monkeypatch):
    expected = lp.patch(model, CLEAN, CORRUPTED, **TASK, at="attn_out")
    begun = threading.Event()

    # The lock is free between the layers of a sweep: clicks there must not disturb it.
    def click(done, total):
        if not begun.is_set() and done:
            begun.set()
            explorer._viewers["map"]._hear(None, {"click": {"x": 9, "y": 1}}, None)

    monkeypatch.setattr(explorer._work, "_on_progress", click)
    explorer.site = "attn_out"
    for pos in range(1, 9):
        explorer.pos = pos
    assert explorer.wait(60.0) and begun.is_set()
    pd.testing.assert_frame_equal(explorer.frames["attn_out"], expected)


def test_a_newer_sweep_replaces_an_older_one(explorer, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def stay(done, total):
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr(explorer._work, "_on_progress", stay)
    explorer.site = "attn_out"
    assert begun.wait(60)
    explorer.site = "mlp_out"
    go_on.set()
    assert explorer.wait(60.0)
    assert set(explorer.frames) == {"resid_pre", "mlp_out"} and explorer._shown == "mlp_out"


def test_a_sweep_can_be_stopped(explorer, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def stay(done, total):
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr(explorer._work, "_on_progress", stay)
    before = z(explorer, "map")
    explorer.site = "attn_out"
    assert begun.wait(60)
    explorer._stop.click()
    go_on.set()
    assert explorer.wait(60.0)
    assert "stopped" in explorer._status.value and explorer._stop.layout.display == "none"
    np.testing.assert_array_equal(z(explorer, "map"), before)


def test_the_head_opens_in_an_attention_explorer(explorer):
    attention = explorer.open_head()
    assert attention in explorer.children and explorer.open_head() is attention
    explorer.select(layer=2, pos=7)
    assert (attention.layer, attention.head, attention.query) == (2, explorer.head, 7)
    attention.head = 0
    assert explorer.head == 0
    explorer.close()
    assert attention.comm is None


def test_wrong_input_gets_a_sentence(model):
    with pytest.raises(InputError, match="site 'z' has heads"):
        PatchingExplorer(model, CLEAN, CORRUPTED, **TASK, sites=["z"])
    with pytest.raises(InputError, match="tokens"):
        PatchingExplorer(model, CLEAN, "When Mary", **TASK)
    with pytest.raises(InputError, match="no effect to split"):
        PatchingExplorer(model, CLEAN, CLEAN, **TASK)


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_dense_and_mixture_models_given_as_tokens(family):
    model = make(family)
    clean = tokens(1, 12)[0]
    corrupted = clean.clone()
    corrupted[0] = 5
    metric = lp.logit_diff(7, 8)
    selection = Selection()
    explorer = PatchingExplorer(
        model, clean, corrupted, metric=metric, direction="noise", selection=selection
    )
    frame = lp.patch(model, clean, corrupted, metric=metric, direction="noise")
    np.testing.assert_allclose(z(explorer, "map").flatten(), frame.effect, atol=1e-5)
    assert explorer.open_head().selection is selection


def test_the_page_holds_what_clicks_would_show(model, explorer):
    arrays = explorer.linked().arrays
    for layer, pos in ((0, 10), (2, 14), (3, 1)):
        explorer.select(layer=layer, pos=pos)
        np.testing.assert_allclose(y(explorer, "sites"), arrays["sites"][layer, pos], atol=1e-5)
        np.testing.assert_allclose(y(explorer, "cell"), arrays["cell"][layer, pos], atol=1e-5)
    shown = z(explorer, "attention")
    np.testing.assert_allclose(shown, arrays["pattern"][explorer.layer, explorer.head], atol=1e-6)


def test_a_page_of_a_large_model_says_what_it_leaves_out(explorer, monkeypatch):
    monkeypatch.setattr("llama_probe.widgets.patching._MOST_CELLS", 10)
    linked = explorer.linked()
    assert "cell" not in linked.arrays and f"layer {explorer.layer} at" in linked.note


def test_prompts_of_one_token():
    model = make("llama-gqa")
    explorer = PatchingExplorer(
        model, torch.tensor([7]), torch.tensor([8]), metric=lp.logit_diff(7, 8)
    )
    assert z(explorer, "map").shape == (model.cfg.n_layers, 1)
    assert z(explorer, "attention").tolist() == [[1.0]]
    assert y(explorer, "sites")[0] == pytest.approx(1, abs=1e-4)


def test_positions_say_where_the_prompts_differ(explorer):
    names = explorer.labels["pos"]
    assert names[10] == "10: ·John (corrupted: ·Mary)" and names[14] == "14: ·to"
