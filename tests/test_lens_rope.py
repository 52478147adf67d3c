"""The views of RoPE, against the model's own scores and against complex rotation."""

import cmath
import math

import numpy as np
import pytest
import tiny
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

TOKENS = tiny.tokens(batch=1, length=11)[0]  # shorter than any window, so that nothing is masked


def interleaved_with_divisors() -> Llama:
    """What no family has: interleaved, divided frequencies, learned QK norm, biases."""
    changes = {"rope_layout": "interleaved", "rope_divisors": (1.0, 3.0), "qk_norm": "learned"}
    model = Llama(tiny.tiny_config(**changes, qkv_bias=True, rope_layers=(True, False)))
    tiny.randomise(model)
    return model


MAKERS = {name: lambda name=name: tiny.make(name) for name in tiny.FAMILIES}
MAKERS["interleaved-divided"] = interleaved_with_divisors


@pytest.fixture(scope="module", params=MAKERS)
def model(request) -> Llama:
    return MAKERS[request.param]()


def tokens_of(model):
    return TOKENS % model.cfg.d_vocab


def rotary_layers(model):
    return [layer for layer, has in enumerate(model.cfg.rope_layers) if has]


def scores_of(model, layer):
    name = f"blocks.{layer}.attn.hook_attn_scores"
    return model.run_with_cache(tokens_of(model), names_filter=name)[1][name][0]


def heads_and_positions(model):
    for head in (0, model.cfg.n_heads - 1):
        for query, key in ((10, 0), (7, 6), (4, 4)):
            yield head, query, key


def test_pairs_sum_to_the_score(model):
    assert rotary_layers(model)
    for layer in rotary_layers(model):
        scores = scores_of(model, layer)
        for head, query, key in heads_and_positions(model):
            frame = lp.rope_contributions(model, tokens_of(model), layer, head, query, key)
            score = float(scores[head, query, key])
            assert frame.value.sum() == pytest.approx(score, rel=1e-4, abs=1e-6)
            assert frame.pair.tolist() == list(range(model.cfg.d_head // 2))
            assert (frame.value.abs() <= frame.amplitude * (1 + 1e-5)).all()


def test_a_pair_is_a_complex_product_turned_by_its_angle(model):
    """The angle column, the frequencies and the choice of pairs, from queries before RoPE."""
    layer, head, query, key = rotary_layers(model)[-1], model.cfg.n_heads - 1, 9, 2
    frame = lp.rope_contributions(model, tokens_of(model), layer, head, query, key)
    names = [f"blocks.{layer}.attn.hook_{word}" for word in "qk"]
    _, cache = model.run_with_cache(tokens_of(model), names_filter=names)
    attn, half = model.blocks[layer].attn, model.cfg.d_head // 2
    kv = head // (model.cfg.n_heads // model.cfg.n_key_value_heads)
    q, k = cache[names[0]], cache[names[1]]
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = q[0, query, head].tolist(), k[0, key, kv].tolist()
    for pair, angle, value in zip(frame.pair, frame.angle, frame.value, strict=True):
        is_half = model.cfg.rope_layout == "half"
        a, b = (pair, pair + half) if is_half else (2 * pair, 2 * pair + 1)
        product = complex(q[a], q[b]) * complex(k[a], k[b]).conjugate()
        turned = (product * cmath.exp(1j * angle)).real / math.sqrt(model.cfg.d_head)
        assert value == pytest.approx(turned, rel=1e-4, abs=1e-5)
    assert frame.angle.tolist() == pytest.approx((frame.frequency * (query - key)).tolist())
    assert (frame.wavelength * frame.frequency).tolist() == pytest.approx([2 * math.pi] * half)
    assert frame.frequency.is_monotonic_decreasing


def test_the_distance_of_two_positions_gives_their_score(model):
    for layer in rotary_layers(model):
        scores = scores_of(model, layer)
        for head, query, key in heads_and_positions(model):
            frame = lp.rope_distance(
                model, tokens_of(model), layer, head, query=query, key=key, max_distance=20
            )
            value = frame.set_index("distance").value
            score = float(scores[head, query, key])
            assert value[query - key] == pytest.approx(score, rel=1e-4, abs=2e-6)
            assert abs(value[query - key + 1] - score) > 1e-5


def test_the_mean_curve_is_the_mean_of_all_curves(model):
    layer, head = rotary_layers(model)[0], 1
    tokens = tokens_of(model)[:4]
    mean = lp.rope_distance(model, tokens, layer, head, max_distance=9)
    curves = [
        lp.rope_distance(model, tokens, layer, head, query=q, key=k, max_distance=9).value
        for q in range(4)
        for k in range(4)
    ]
    np.testing.assert_allclose(mean.value, np.mean(curves, axis=0), rtol=1e-4, atol=1e-6)
    assert mean[["query", "key"]].isna().all(axis=None)


def test_content_and_distance_are_told_apart():
    # Queries and keys that know no tokens: what is left is distance, the same for all positions.
    model = tiny.make("llama-gqa")
    same = torch.full((6,), 9)
    near, far = (lp.rope_contributions(model, same, 0, 0, q, q - 2).value for q in (2, 5))
    np.testing.assert_allclose(near, far, atol=1e-5)
    other = lp.rope_contributions(model, same, 0, 0, 5, 2).value
    assert (near - other).abs().max() > 1e-3


def test_padding_does_not_count(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    short = model.to_tokens(["abc", "abcabc"])[:1]
    assert short.shape[1] == 6
    padded, alone = (lp.rope_distance(model, x, 1, 2).value for x in (short, "abc"))
    np.testing.assert_allclose(padded, alone, atol=1e-5)


# Angles are computed in float32 whatever the model's precision.
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.02), (torch.float64, 1e-6)])
def test_other_precisions(dtype, close):
    model = tiny.make("qwen3").to(dtype)
    score = float(scores_of(model, 1)[0, 10, 3])
    frame = lp.rope_contributions(model, TOKENS, 1, 0, -1, 3)
    assert frame.value.sum() == pytest.approx(score, abs=close)
    value = lp.rope_distance(model, TOKENS, 1, 0, query=10, key=3).value[7]
    assert value == pytest.approx(score, abs=close)


def test_bad_input_gets_a_sentence():
    model = tiny.make("llama4-scout")
    with pytest.raises(InputError, match="layer 3 has no RoPE.*layers with RoPE: 0, 1, 2"):
        lp.rope_contributions(model, TOKENS, 3, 0, 5, 2)
    with pytest.raises(InputError, match="layer 3 has no RoPE"):
        lp.rope_distance(model, TOKENS, 3, 0)
    with pytest.raises(InputError, match="key 5 comes after query 2"):
        lp.rope_contributions(model, TOKENS, 0, 0, 2, 5)
    with pytest.raises(InputError, match="layer is 4, but the model has layers 0 to 3"):
        lp.rope_contributions(model, TOKENS, 4, 0, 2, 1)
    with pytest.raises(InputError, match="head is 8, but the model has heads 0 to 7"):
        lp.rope_distance(model, TOKENS, 0, 8)
    with pytest.raises(InputError, match="query is 11, but the prompt has 11 tokens"):
        lp.rope_distance(model, TOKENS, 0, 0, query=11)
    with pytest.raises(InputError, match="key is -12"):
        lp.rope_contributions(model, TOKENS, 0, 0, 5, -12)
    with pytest.raises(InputError, match="max_distance is -1"):
        lp.rope_distance(model, TOKENS, 0, 0, max_distance=-1)
    with pytest.raises(InputError, match="one prompt, not 2"):
        lp.rope_distance(model, tiny.tokens(2, 5), 0, 0)
