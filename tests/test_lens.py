"""The logit lens and direct logit attribution, against the model itself."""

import pytest
import tiny
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

TOKENS = tiny.tokens(batch=1, length=9)[0]


@pytest.fixture(scope="module", params=["llama-biased", "mixtral", "llama4-maverick", "qwen2-moe"])
def model(request) -> Llama:
    return tiny.make(request.param)


def test_the_last_row_of_the_lens_is_the_models_output(model):
    frame = lp.logit_lens(model, TOKENS, top_k=4)
    last = frame[frame.layer == model.cfg.n_layers]
    top = model(TOKENS)[0].softmax(-1).topk(4)
    assert last.token_id.tolist() == top.indices.flatten().tolist()
    assert last.prob.tolist() == pytest.approx(top.values.flatten().tolist(), rel=1e-5)


def test_a_row_of_the_lens_is_the_stream_through_norm_and_unembedding(model):
    frame = lp.logit_lens(model, TOKENS, top_k=1)
    stream = model(TOKENS, stop_at_layer=1)
    logits = model.unembed(model.ln_final(stream))[0]
    row = frame[frame.layer == 1]
    assert row.token_id.tolist() == logits.argmax(-1).tolist()
    assert row.logit.tolist() == pytest.approx(logits.max(-1).values.tolist(), rel=1e-5)


def test_the_lens_is_tidy(model):
    frame = lp.logit_lens(model, TOKENS, top_k=2)
    assert len(frame) == (model.cfg.n_layers + 1) * 9 * 2
    columns = ["layer", "pos", "input_token", "rank", "token", "token_id", "prob", "logit"]
    assert list(frame) == columns
    assert not frame.duplicated(["layer", "pos", "rank"]).any()
    assert frame.attrs == {}


@pytest.mark.parametrize("pos", [-1, 3])
@pytest.mark.parametrize("foil", [8, None])
def test_attribution_sums_to_the_logits(model, foil, pos):
    frame = lp.direct_logit_attribution(model, TOKENS, 7, foil, pos=pos)
    logits = model(TOKENS)[0, pos]
    expected = logits[7] - (0 if foil is None else logits[foil])
    assert frame.value.sum() == pytest.approx(float(expected), abs=2e-5)
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    assert (frame.kind == "head").sum() == n_heads
    assert (frame.kind == "bias").sum() == (model.cfg.n_layers if model.cfg.o_bias else 0)


def test_a_heads_share_is_what_the_frozen_norm_loses_without_it(model):
    frame = lp.direct_logit_attribution(model, TOKENS, 7, 8)
    share = float(
        frame[(frame.layer == model.cfg.n_layers - 1) & (frame["head"] == 2)].value.item()
    )
    last = model.cfg.n_layers - 1
    names = [
        "ln_final.hook_scale",
        f"blocks.{last}.attn.hook_result",
        f"blocks.{last}.hook_mlp_out",
    ]
    _, kept = model.run_with_cache(TOKENS, names_filter=names)
    scale, mlp = kept["ln_final.hook_scale"], kept["mlp_out", last]

    def without(result, hook):
        return result * (torch.arange(model.cfg.n_heads) != 2)[:, None]

    frozen = [
        (names[0], lambda tensor, hook: scale),
        (names[1], without),
        (names[2], lambda tensor, hook: mlp),
    ]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=frozen)[0, -1]
    whole = model(TOKENS)[0, -1]
    loss = (whole[7] - whole[8]) - (logits[7] - logits[8])
    assert share == pytest.approx(float(loss), abs=2e-5)


def test_bad_input_gets_a_sentence(model):
    with pytest.raises(InputError, match="one prompt, not 2"):
        lp.logit_lens(model, tiny.tokens(2, 5))
    with pytest.raises(InputError, match="top_k is 0"):
        lp.logit_lens(model, TOKENS, top_k=0)
    with pytest.raises(InputError, match="9 tokens"):
        lp.direct_logit_attribution(model, TOKENS, 7, pos=9)
    with pytest.raises(InputError, match="token ids go from"):
        lp.direct_logit_attribution(model, TOKENS, 400)
    with pytest.raises(InputError, match="no tokenizer"):
        lp.direct_logit_attribution(model, TOKENS, " Mary")
