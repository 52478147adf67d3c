"""Patch sweeps: every cell against a forward pass of its own, and the theorems."""

import pandas as pd
import pytest
import tiny
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

CLEAN = tiny.tokens(batch=1, length=7)[0]
CORRUPTED = CLEAN.clone()
CORRUPTED[2] = 100
METRIC = lp.logit_diff(7, 8)
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@pytest.fixture(scope="module", params=["llama-gqa", "mixtral", "llama4-scout"])
def model(request) -> Llama:
    return tiny.make(request.param)


def naive(model: Llama, at: str) -> list[float]:
    """One whole forward pass a cell."""
    _, clean = model.run_with_cache(CLEAN, names_filter=lp.act_name(at, "*"))
    values = []
    for layer in range(model.cfg.n_layers):
        for cell in range(model.cfg.n_heads if at == "z" else len(CLEAN)):

            def put_in(tensor, hook, layer=layer, cell=cell):
                edited = tensor.clone()
                index = (slice(None), slice(None), cell) if at == "z" else (slice(None), cell)
                edited[index] = clean[at, layer][index]
                return edited

            logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(lp.act_name(at, layer), put_in)])
            values.append(float(METRIC(logits[:, -1])))
    return values


@pytest.mark.parametrize("at", SITES)
def test_every_cell_equals_a_pass_of_its_own(model, at):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at=at)
    assert frame.metric.tolist() == pytest.approx(naive(model, at), abs=2e-5)
    clean, corrupted = (float(METRIC(model(tokens)[:, -1])) for tokens in (CLEAN, CORRUPTED))
    assert frame.clean.unique() == pytest.approx([clean], abs=2e-5)
    assert frame.corrupted.unique() == pytest.approx([corrupted], abs=2e-5)
    effect = (frame.metric - frame.corrupted) / (frame.clean - frame.corrupted)
    pd.testing.assert_series_equal(frame.effect, effect, check_names=False)


def test_small_batches_change_nothing(model):
    whole = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    parts = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, batch_size=2)
    pd.testing.assert_frame_equal(whole, parts, atol=2e-5)


def test_before_the_first_layer_only_the_differing_token_counts(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    first = frame[frame.layer == 0].set_index("pos").effect
    assert first[2] == pytest.approx(1, abs=1e-4)
    assert first.drop(2).abs().max() < 1e-4


def test_a_last_layer_can_only_be_patched_where_the_metric_reads(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, at="resid_post")
    last = frame[frame.layer == model.cfg.n_layers - 1].set_index("pos").effect
    assert last[6] == pytest.approx(1, abs=1e-4)
    assert last.drop(6).abs().max() < 1e-4


def test_padding_stays_padding_in_every_cell(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    padded = model.to_tokens(["abcdef", "xyz"])[1:]
    clean = padded.clone()
    clean[0, 4] = 50
    frame = lp.patch(model, clean, padded, metric=METRIC).set_index(["layer", "pos"])
    alone = lp.patch(model, clean[:, 3:], padded[:, 3:], metric=METRIC).set_index(["layer", "pos"])
    assert frame.effect[frame.index.get_level_values("pos") < 3].abs().max() < 1e-4
    for layer in range(3):
        for pos in range(3):
            assert frame.effect[layer, pos + 3] == pytest.approx(alone.effect[layer, pos], abs=1e-4)


def test_a_metric_of_ones_own(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=lambda logits: logits.softmax(-1)[:, 7])
    assert frame.metric.between(0, 1).all()


def test_the_frame_is_tidy(model):
    frame = lp.patch(model, CLEAN, CORRUPTED, metric=METRIC, over=("layer", "pos"))
    expected = ["layer", "pos", "metric", "effect", "clean", "corrupted", "site", "token"]
    assert list(frame) == expected and len(frame) == model.cfg.n_layers * 7
    assert frame[frame.pos == 2].token.unique().tolist() == ["<100>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "resid_pots"}, "at is 'resid_pots'"),
        ({"over": ("layer", "head")}, "patched over"),
        ({"batch_size": 0}, "batch_size"),
        ({"corrupted": CORRUPTED[:-1]}, "7 tokens and the corrupted one 6"),
        ({"clean": tiny.tokens(2, 7)}, "one prompt, not 2"),
        ({"corrupted": CLEAN}, "same for both|for both prompts"),
        ({"metric": lambda logits: logits.sum()}, "one number a row"),
        ({"metric": lp.logit_diff(" Mary", " John")}, "no tokenizer"),
    ],
)
def test_bad_input_gets_a_sentence(model, options, message):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, **options}
    with pytest.raises(InputError, match=message):
        lp.patch(model, given.pop("clean"), given.pop("corrupted"), **given)


def test_a_metric_that_names_texts_needs_a_model():
    with pytest.raises(InputError, match="on\\(model\\)"):
        lp.logit_diff(" Mary", " John")(torch.zeros(1, 5))


def test_no_hook_is_left(model):
    lp.patch(model, CLEAN, CORRUPTED, metric=METRIC)
    assert not any(point.has_hooks() for point in model.hook_points())
