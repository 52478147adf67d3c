"""Patch sweeps: the engine against one forward pass a cell, the theorems, and the frames."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.patching import engine
from llama_probe.patching.sites import SITES

CLEAN = tiny.tokens(batch=1, length=7)[0]
CORRUPTED = CLEAN.clone()
CORRUPTED[2] = 100
METRIC = lp.logit_diff(7, 8)
FAMILIES = ("llama-gqa", "llama-biased", "mistral", "qwen3", "mixtral", "llama4-scout")
CELLS = ["layer", "pos", "head", "expert", "neuron", "prompt"]


model_of = cache(tiny.make)


@pytest.fixture(scope="module", params=["llama-gqa", "mixtral", "llama4-scout"])
def model(request) -> Llama:
    return model_of(request.param)


def pairs(n: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that differ in one or two tokens each, at places of their own."""
    clean = tiny.tokens(batch=n, length=length, seed=seed)
    draw = np.random.default_rng(seed)
    corrupted = clean.clone()
    for row in range(n):
        for pos in draw.integers(length, size=2):
            corrupted[row, pos] = 3 + (clean[row, pos] - 2) % 190
    return clean, corrupted


def overs(at: str) -> list[tuple[str, ...]]:
    """Every kind of cell that a site has."""
    unit = SITES[at]
    with_unit = [] if unit is None else [("layer", unit), ("layer", "pos", unit)]
    return [("layer",), ("layer", "pos"), *with_unit]


def assert_engines_agree(model: Llama, clean: Any, corrupted: Any, **options: Any) -> None:
    options |= {"metric": METRIC, "each": True}
    fast = lp.patch(model, clean, corrupted, **options)
    with unchecked():
        plain = lp.patch(model, clean, corrupted, engine="reference", **options)
    pd.testing.assert_frame_equal(fast.drop(columns=["effect"]), plain.drop(columns=["effect"]),
                                  atol=1e-4, rtol=0)  # fmt: skip
    # It can fail: the sweep is not constant.
    assert fast.metric.nunique() > 1


# --- the engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("at", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_gives_what_one_pass_a_cell_gives(family, at):
    model = model_of(family)
    if not any(lp.act_name(at, layer) in model.hook_dict for layer in range(model.cfg.n_layers)):
        with pytest.raises(InputError, match="no such hook"):
            lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at=at)
        return
    clean, corrupted = pairs(2, 5, seed=1)
    for over in overs(at):
        units = [0, 1] if SITES[at] in over else None
        options = {"at": at, "over": over, "units": units}
        assert_engines_agree(model, clean, corrupted, **options)
    assert_engines_agree(model, clean, corrupted, direction="noise", **options)


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    at=st.sampled_from(["resid_pre", "attn_out", "z", "v", "rot_k", "pattern", "mlp_out"]),
    direction=st.sampled_from(["denoise", "noise"]),
    seed=st.integers(0, 10_000),
    n=st.integers(1, 3),
    length=st.integers(2, 22),
    batch_size=st.sampled_from([None, 1, 5]),
    data=st.data(),
)
def test_it_does_so_on_random_models_and_pairs(
    family, at, direction, seed, n, length, batch_size, data
):
    """Longer than the windows of 12 and the chunks of 16 as well."""
    model = tiny.make(family, seed=seed)
    clean, corrupted = pairs(n, length, seed)
    answer_at = data.draw(st.integers(-length, length - 1))
    over = data.draw(st.sampled_from(overs(at)))
    options = {"at": at, "over": over, "direction": direction, "answer_at": answer_at}
    fast, plain = (
        lp.patch(model, clean, corrupted, metric=lambda logits: logits[:, 7], each=True,
                 engine=name, layers=[0, 2], batch_size=batch_size, **options)
        if (clean != corrupted)[:, : answer_at % length + 1].any() else None
        for name in ("fast", "reference")
    )  # fmt: skip
    if fast is not None and plain is not None:
        assert np.allclose(fast.metric, plain.metric, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "mixtral", "llama4-scout"])
@pytest.mark.parametrize("at", ["resid_pre", "z", "pattern", "k"])
def test_padded_batches(family, at, tiny_tokenizer):
    model = tiny.make(family, vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    clean = ["a cat sat here", "the dog", "one more line of text"]
    corrupted = ["a cot sat here", "the fog", "one more life of text"]
    assert_engines_agree(model, clean, corrupted, at=at)
    assert_engines_agree(model, clean, corrupted, at=at, over=("layer", "pos"))
    options = {"metric": METRIC, "at": at, "over": ("layer", "pos")}
    batch = lp.patch(model, clean, corrupted, each=True, **options)
    for index, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        alone = lp.patch(model, one, other, **options)
        mine = batch[batch.prompt == index].reset_index(drop=True)
        assert np.allclose(mine.metric, alone.metric, atol=1e-4)
        assert (mine.pos + len(model.to_tokens(one)[0])).tolist() == alone.pos.tolist()


def test_a_patch_may_flip_routes():
    """So the comparisons above have such patches among them."""
    model = tiny.make("mixtral")
    names = [lp.act_name("expert_indices", 2)]
    _, plain = model.run_with_cache(CORRUPTED, names_filter=names)
    _, clean = model.run_with_cache(CLEAN)
    put_in = (lp.act_name("resid_pre", 1), lambda x, hook: clean["resid_pre", 1])
    with model.hooks([put_in]):
        _, patched = model.run_with_cache(CORRUPTED, names_filter=names)
    assert (plain["expert_indices", 2] != patched["expert_indices", 2]).any()


def test_only_what_changes_is_run(model, monkeypatch):
    runs, step = [], engine._Group.step

    def spied(group, layer):
        step(group, layer)
        runs.append(None if group.stream is None else tuple(group.stream.shape[:2]))

    monkeypatch.setattr(engine._Group, "step", spied)
    monkeypatch.setattr(engine, "_FEW_TOKENS", 0)
    apart = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    assert {shape[1] for shape in runs if shape} == {5, 4, 3, 2, 1}, "positions before 2 are known"
    assert max(shape[0] for shape in runs if shape) <= model.cfg.n_layers
    # Before the first layer nothing but the differing token can change anything.
    first = [shape for shape in runs[: len({5, 4, 3, 2, 1})] if shape]
    assert first == [(1, 5)]
    # Position 6 now runs from 5 on, and 4 from 3 on; 1 is what is left after the last layer.
    runs.clear()
    monkeypatch.setattr(engine, "_FEW_TOKENS", model.cfg.n_layers)
    joined = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    assert {shape[1] for shape in runs if shape} == {5, 4, 2, 1}
    assert np.allclose(apart.metric, joined.metric, atol=1e-5)


def test_out_of_memory_halves_the_batch(model, monkeypatch):
    whole = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="z")
    step, failures = engine._Group.step, []

    def scarce(group, layer):
        if len(group.cells) > 3:
            failures.append(len(group.cells))
            raise torch.OutOfMemoryError("out of memory")
        return step(group, layer)

    monkeypatch.setattr(engine._Group, "step", scarce)
    monkeypatch.setattr(engine, "free_memory", lambda device: 2**22)
    parts = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="z")
    assert failures
    assert np.allclose(whole.metric, parts.metric, atol=1e-5)
    monkeypatch.setattr(engine._Group, "step", lambda group, layer: [][0])
    with pytest.raises(IndexError):
        lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="z")


def test_no_hook_is_left_even_where_a_metric_raises(model):
    def metric(logits):
        if len(calls) > 3:
            raise ValueError("mine")
        calls.append(1)
        return logits[:, 7]

    calls: list[int] = []
    with pytest.raises(ValueError, match="mine"):
        lp.patch(model, CLEAN, CORRUPTED, metric=metric)
    assert not any(point.has_hooks() for point in model.hook_points())


# --- theorems ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("at", ["resid_pre", "resid_mid", "resid_post"])
def test_patching_the_whole_stream_gives_the_other_run(model, at, direction):
    frame = lp.patch(
        model, CLEAN, CORRUPTED, metric=METRIC, at=at, over=("layer",), direction=direction
    )
    assert np.allclose(frame.effect, 1, atol=1e-3)
    whole = frame.clean if direction == "denoise" else frame.corrupted
    assert np.allclose(frame.metric, whole, atol=2e-5)


def test_before_the_first_layer_only_the_differing_token_counts(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    first = frame[frame.layer == 0].set_index("pos").effect
    assert first[2] == pytest.approx(1, abs=1e-4)
    assert (first.drop(2) == 0).all()


def test_tokens_before_the_first_difference_have_no_effect_at_all(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="attn_out")
    assert (frame[frame.pos < 2].effect == 0).all()
    # In the last layer only the answer's position has one.
    assert (frame[(frame.pos >= 2) & (frame.layer < model.cfg.n_layers - 1)].effect != 0).all()


def test_a_last_layer_can_only_be_patched_where_the_metric_reads(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="resid_post")
    last = frame[frame.layer == model.cfg.n_layers - 1].set_index("pos").effect
    assert last[6] == pytest.approx(1, abs=1e-4)
    assert last.drop(6).abs().max() < 1e-4


def test_what_comes_after_the_answer_has_no_effect(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, answer_at=4)
    assert (frame[frame.pos > 4].effect == 0).all()
    short = lp.patch(model, CLEAN[:5], CORRUPTED[:5], metric=METRIC)
    assert np.allclose(frame[frame.pos <= 4].metric, short.metric, atol=1e-5)


def test_rotated_and_plain_keys_are_the_same_patch(model):
    plain, rotated = (
        lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at=at, over=("layer", "pos", "head"))
        for at in ("k", "rot_k")
    )
    assert np.allclose(plain.metric, rotated.metric, atol=1e-5)


# --- a real model --------------------------------------------------------------------------

# Measured with TransformerLens 4.3 and with hand-written hooks on transformers' model.
ANCHORS = {
    9: {0: 6.120, 5: 6.154, 10: 6.110, 15: 6.266, 20: 5.068, 25: -5.915, 29: -5.410},
    13: {20: -4.105, 25: 5.044, 29: 5.638},
}


@pytest.mark.slow
def test_reference_values_on_smollm2(smollm2):
    texts = [
        f"When Mary and John went to the store, {giver} gave a drink to"
        for giver in ("John", "Mary")
    ]
    clean, corrupted = (smollm2.to_tokens(text, prepend_bos=False) for text in texts)
    metric = lp.logit_diff(" Mary", " John")
    frame = lp.patch(smollm2, clean, corrupted, metric=metric)
    assert frame.clean[0] == pytest.approx(6.1196, abs=1e-3)
    assert frame.corrupted[0] == pytest.approx(-5.4853, abs=1e-3)
    found = frame.set_index(["pos", "layer"]).metric
    for pos, of_layers in ANCHORS.items():
        for layer, value in of_layers.items():
            assert found[pos, layer] == pytest.approx(value, abs=2e-3)
    with_bos = (smollm2.to_tokens(text, prepend_bos=True) for text in texts)
    heads = lp.patch(smollm2, *with_bos, metric=metric, at="z").set_index(["layer", "head"]).effect
    known = {(23, 3): 0.57, (20, 0): 0.34, (17, 4): 0.29, (29, 1): 0.28, (24, 4): -0.21,
             (19, 2): 0.20, (29, 0): -0.20, (23, 0): 0.13}  # fmt: skip
    for head, effect in known.items():
        assert heads[head] == pytest.approx(effect, abs=0.01)
    assert heads.drop(index=list(known)).abs().max() < 0.045


# --- metrics, frames, batches --------------------------------------------------------------


def test_metrics(model):
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]])
    assert lp.logit_diff([2, 0], [1, 1])(logits).tolist() == [2, 2]
    assert lp.logit_diff(2, [1, 0])(logits).tolist() == [2, -2]
    assert lp.prob([2, 0])(logits).tolist() == pytest.approx([0.8438, 0.7870], abs=1e-4)
    kl = lp.patch(model, CLEAN, CORRUPTED, metric=lp.kl(), over=("layer",))
    assert kl.clean[0] == pytest.approx(0, abs=1e-5) and kl.corrupted[0] > 1e-3
    full, narrow = (
        lp.patch(model, CLEAN, CORRUPTED, metric=metric)
        for metric in (lambda logits: logits[:, 7] - logits[:, 8], METRIC)
    )
    assert np.allclose(full.metric, narrow.metric, atol=1e-5), "only what is read is unembedded"


def test_batches_have_means_of_ratios_of_sums_and_intervals(model):
    clean, corrupted = pairs(6, 6, seed=3)
    answers, foils = [7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]
    metric = lp.logit_diff(answers, foils)
    each = lp.patch(model, clean, corrupted, metric=metric, each=True)
    frame = lp.patch(model, clean, corrupted, metric=metric)
    means = each.groupby(["layer", "pos"], sort=False)[["metric", "clean", "corrupted"]].mean()
    assert np.allclose(frame[["metric", "clean", "corrupted"]], means)
    effect = (means.metric - means.corrupted) / (means.clean - means.corrupted)
    assert np.allclose(frame.effect, effect)
    assert (frame.n == 6).all()
    moved = frame[frame.effect != 0]
    assert (moved.ci_low <= moved.effect).all() and (moved.effect <= moved.ci_high).all()
    for index in range(6):
        one = lp.logit_diff(answers[index], foils[index])
        alone = lp.patch(model, clean[index], corrupted[index], metric=one)
        assert np.allclose(each[each.prompt == index].metric, alone.metric, atol=1e-5)
    again = lp.patch(model, clean, corrupted, metric=metric)
    pd.testing.assert_frame_equal(frame, again)


def test_named_positions(model):
    clean, corrupted = pairs(3, 6, seed=4)
    named = lp.patch(model, clean, corrupted, metric=METRIC, each=True,
                     positions={"place": [1, 4, 2], "end": -1})  # fmt: skip
    every = lp.patch(model, clean, corrupted, metric=METRIC, each=True)
    every = every.set_index(["layer", "prompt", "pos"]).metric
    for prompt, pos in enumerate((1, 4, 2)):
        found = named[(named.pos == "place") & (named.prompt == prompt)].metric
        assert np.allclose(
            found, [every[layer, prompt, pos] for layer in range(len(found))], atol=1e-5
        )
    assert named.pos.unique().tolist() == ["place", "end"]


def test_several_sites_are_one_frame(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at=["resid_pre", "attn_out"])
    assert frame.site.unique().tolist() == ["resid_pre", "attn_out"]
    alone = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="attn_out")
    both = frame[frame.site == "attn_out"].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, alone, atol=1e-6)
    assert set(frame.attrs) == {"direction", "seconds"}


def test_positions_and_units_go_to_the_sites_that_have_them(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at=["resid_pre", "z"],
                     positions=[2, 6], units=[1])  # fmt: skip
    streams, heads = (frame[frame.site == at] for at in ("resid_pre", "z"))
    assert streams.pos.unique().tolist() == [2, 6] and heads["head"].unique().tolist() == [1]


def test_the_frame_is_tidy(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, over=("layer", "pos"))
    expected = ["layer", "pos", "token", "site", "metric", "effect", "clean", "corrupted"]
    assert list(frame) == expected and len(frame) == model.cfg.n_layers * 7
    assert frame[frame.pos == 2].token.unique().tolist() == ["<100>"]
    some = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, layers=[1], positions=[2, 6])
    assert some[["layer", "pos"]].to_numpy().tolist() == [[1, 2], [1, 6]]
    head = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="z", units=[3])
    assert head["head"].unique().tolist() == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "resid_pots"}, "at is 'resid_pots'.*resid_post"),
        ({"over": ("layer", "head")}, "patched over"),
        ({"over": ("pos",)}, "patched over 'layer'"),
        ({"batch_size": 0}, "batch_size"),
        ({"engine": "warp"}, "engine is 'warp'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"layers": [9]}, "not among"),
        ({"positions": [7]}, "not among the 7 positions"),
        ({"positions": {"a": [1, 2]}}, "has 2 places, but there are 1 prompts"),
        ({"positions": {"a": 7}}, "the prompts have \\[7\\] tokens"),
        ({"units": [0]}, "units are given"),
        ({"over": ("layer",), "positions": [1]}, "'pos' is not in over"),
        ({"answer_at": 7}, "answer_at is 7"),
        ({"answer_at": [1, 2]}, "one for each of the 1 prompts"),
        ({"corrupted": CORRUPTED[:-1]}, "(?s)7 tokens and the corrupted one 6.*<100>"),
        ({"clean": tiny.tokens(2, 7)}, "2 clean prompts, but 1 corrupted"),
        ({"corrupted": CLEAN}, "same for both|for both prompts"),
        ({"metric": lambda logits: logits.sum()}, "one number a row"),
        ({"metric": lambda logits: logits[:, 0] / 0}, "not finite"),
        ({"metric": lp.logit_diff(" Mary", " John")}, "no tokenizer"),
        ({"metric": lp.logit_diff([7, 8], 9)}, "names 2 tokens for 1 prompts"),
    ],
)
def test_bad_input_gets_a_sentence(model, options, message):
    given_ = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, **options}
    with pytest.raises(InputError, match=message):
        lp.patch(model, given_.pop("clean"), given_.pop("corrupted"), **given_)


def test_a_metric_that_names_texts_needs_a_model():
    with pytest.raises(InputError, match="on\\(model\\)"):
        lp.logit_diff(" Mary", " John")(torch.zeros(1, 5))
    with pytest.raises(InputError, match="on\\(model, clean\\)"):
        lp.kl()(torch.zeros(1, 5))
