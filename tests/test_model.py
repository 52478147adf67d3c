"""The forward pass: partial runs, padding, gradients, precision, bad input."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import ConfigError, InputError
from llama_probe.model.cache import KVCache
from llama_probe.model.config import Llama3Scaling, MoeConfig, Temperature
from llama_probe.model.llama import Llama
from llama_probe.model.masks import visible
from llama_probe.model.rope import inverse_frequencies

FAMILIES = ("llama-biased", "mistral", "mixtral", "llama4-scout", "qwen2-moe", "qwen3")
TOKENS = tiny.tokens(batch=2, length=20)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Llama:
    return tiny.make(request.param)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_start_and_stop_compose_to_the_whole(model, layer):
    stream = model(TOKENS, stop_at_layer=layer)
    assert torch.equal(model(stream, start_at_layer=layer), model(TOKENS))
    below = model(stream, start_at_layer=layer, stop_at_layer=layer + 1)
    assert torch.equal(below, model(TOKENS, stop_at_layer=layer + 1))


def test_a_partial_run_skips_the_other_layers(model):
    ran = []
    hooks = [("blocks.*.hook_resid_post", lambda tensor, hook: ran.append(hook.layer()))]
    stream = model.run_with_hooks(TOKENS, fwd_hooks=hooks, stop_at_layer=2)
    assert ran == [0, 1]
    model.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=2)
    assert ran == [0, 1, *range(2, model.cfg.n_layers)]


def test_negative_layers_count_from_the_end(model):
    n = model.cfg.n_layers
    assert torch.equal(model(TOKENS, stop_at_layer=-1), model(TOKENS, stop_at_layer=n - 1))
    for wrong in (n + 1, -n - 1):
        with pytest.raises(InputError, match="has layers 0 to"):
            model(TOKENS, stop_at_layer=wrong)


def test_masks_and_positions_apply_to_a_given_stream(model):
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    stream = model(TOKENS, attention_mask=mask, stop_at_layer=1)
    logits = model(stream, attention_mask=mask, start_at_layer=1)
    assert torch.equal(logits, model(TOKENS, attention_mask=mask))
    assert (logits - model(stream, start_at_layer=1))[0, 6:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("at", "index"),
    [(-1, [19]), (3, [3]), ([0, -2], [0, 18]), (slice(5, 9), [5, 6, 7, 8])],
)
def test_logits_at_some_positions(model, at, index):
    torch.testing.assert_close(model(TOKENS, logits_at=at), model(TOKENS)[:, index])


def test_logits_at_a_position_of_its_own_for_each_row(model):
    logits = model(TOKENS, logits_at=torch.tensor([4, 11]))
    whole = model(TOKENS)
    torch.testing.assert_close(logits, torch.stack((whole[0, 4], whole[1, 11]))[:, None])


def test_loss_is_the_next_tokens_cross_entropy(model):
    log_probs = model(TOKENS).log_softmax(-1)
    expected = -log_probs[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(model(TOKENS, return_type="loss", loss_per_token=True), expected)
    torch.testing.assert_close(model(TOKENS, return_type="loss"), expected.mean())


def test_loss_leaves_padding_out(model):
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    padded = model(TOKENS[:1], attention_mask=mask[:1], return_type="loss")
    torch.testing.assert_close(padded, model(TOKENS[:1, 6:], return_type="loss"))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    widths=st.lists(st.integers(0, 11), min_size=1, max_size=3),
    cut=st.integers(1, 19),
)
def test_left_padding_and_caching_change_nothing(family, widths, cut):
    model = _model(family)
    rows = tiny.tokens(batch=len(widths), length=20, seed=3)
    mask = torch.stack([(torch.arange(20) >= width).long() for width in widths])
    kv_cache = KVCache(model.cfg.n_layers)
    first = model(rows[:, :cut], attention_mask=mask[:, :cut], kv_cache=kv_cache)
    second = model(rows[:, cut:], attention_mask=mask, kv_cache=kv_cache)
    both = torch.cat((first, second), dim=1)
    for row, width in enumerate(widths):
        alone = model(rows[row : row + 1, width:])[0]
        torch.testing.assert_close(both[row, width:], alone, atol=2e-5, rtol=0)


_MODELS: dict[str, Llama] = {}


def _model(family: str) -> Llama:
    return _MODELS.setdefault(family, tiny.make(family))


def test_a_row_that_sees_nothing_has_pattern_zero(model):
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    eager, kept = model.run_with_cache(
        TOKENS, attention_mask=mask, names_filter=["*hook_pattern", "*hook_z"]
    )
    _, fast = model.run_with_cache(TOKENS, attention_mask=mask, names_filter="*hook_z")
    for layer in range(model.cfg.n_layers):
        assert not kept["pattern", layer][0, :, :6].any()
        assert not fast["z", layer][0, :6].any()
        torch.testing.assert_close(kept["z", layer], fast["z", layer], atol=2e-5, rtol=0)
    assert eager.isfinite().all()


def test_contributions_sum_to_the_stream(model):
    _, kept = model.run_with_cache(TOKENS)
    total = kept["hook_embed"]
    for layer in range(model.cfg.n_layers):
        total = total + kept["attn_out", layer] + kept["mlp_out", layer]
    torch.testing.assert_close(total, kept["resid_post", model.cfg.n_layers - 1])


def test_a_failed_pass_leaves_the_cache_as_it_was(model):
    kv_cache = KVCache(model.cfg.n_layers)
    model(TOKENS[:, :8], kv_cache=kv_cache)

    def fail(tensor: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.hooks([("blocks.1.hook_mlp_out", fail)]):
        model(TOKENS[:, 8:], kv_cache=kv_cache)
    assert kv_cache.length == 8
    last = model(TOKENS[:, 8:], kv_cache=kv_cache)
    torch.testing.assert_close(last, model(TOKENS)[:, 8:], atol=2e-5, rtol=0)


def test_a_pass_that_fails_after_the_last_layer_leaves_the_cache_as_it_was(model):
    kv_cache = KVCache(model.cfg.n_layers)
    model(TOKENS[:, :8], kv_cache=kv_cache)
    with pytest.raises(InputError, match="positions"):
        model(TOKENS[:, 8:], kv_cache=kv_cache, logits_at=99)
    assert kv_cache.length == 8


def test_what_was_cached_of_a_pass_is_not_the_kv_cache(model):
    kv_cache = KVCache(model.cfg.n_layers)
    _, kept = model.run_with_cache(TOKENS[:, :8], kv_cache=kv_cache, names_filter="*hook_v")
    for tensor in kept.values():
        tensor.zero_()
    last = model(TOKENS[:, 8:], kv_cache=kv_cache)
    torch.testing.assert_close(last, model(TOKENS)[:, 8:], atol=2e-5, rtol=0)


def test_a_cache_that_a_layer_was_left_out_of_is_refused(model):
    kv_cache = KVCache(model.cfg.n_layers)
    model(TOKENS[:, :8], kv_cache=kv_cache, stop_at_layer=1)
    with pytest.raises(InputError, match="layer 1 has not seen"):
        model(TOKENS[:, 8:], kv_cache=kv_cache)
    whole = KVCache(model.cfg.n_layers)
    model(TOKENS[:, :8], kv_cache=whole)
    with pytest.raises(InputError, match="batch of 2"):
        model(TOKENS[:1, 8:], kv_cache=whole)


SWITCHES = {
    "dense": {},
    "biased, learned norm": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": "learned",
    },
    "llama 4": {
        "n_layers": 2,
        "qk_norm": "weightless",
        "rope_layout": "interleaved",
        "rope_layers": (True, False),
        "masks": ("chunked", "full"),
        "window": 3,
        "temperature": Temperature(scale=0.1, floor=2),
        "moe": MoeConfig(n_experts=4, top_k=1, d_expert=6, rule="sigmoid_input", d_shared=6),
        "model_type": "llama4_text",
    },
    "mixtral": {
        "moe": MoeConfig(n_experts=4, top_k=2, d_expert=6, rule="softmax", renormalise=True)
    },
    "qwen2-moe": {
        "moe": MoeConfig(
            n_experts=4, top_k=2, d_expert=6, rule="softmax", d_shared=5, shared_gate=True
        ),
        "masks": ("sliding", "full"),
        "window": 3,
    },
}


def double(switches: dict[str, Any]) -> Llama:
    """A tiny trainable model in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        model = Llama(tiny.tiny_config(d_model=8, n_heads=2, n_key_value_heads=1, **switches))
    finally:
        torch.set_default_dtype(torch.float32)
    tiny.randomise(model, std=0.4)
    return model


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("switches", list(SWITCHES.values()), ids=list(SWITCHES))
def test_gradients_against_finite_differences(switches, eager):
    """Every weight, in float64, through the fast paths and through those that hooks switch on."""
    model = double(switches)
    tokens = torch.tensor([[0, 0, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    listening = [n for n in model.hook_dict if eager]

    def loss() -> Tensor:
        with model.hooks([(listening, lambda tensor, hook: None)] if listening else []):
            return model(tokens, attention_mask=mask)[mask > 0].log_softmax(-1)[:, 5].sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    if eager:
        assert (loss() - double_loss(model, tokens, mask)).abs() < 1e-12
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad(), unchecked():
            step = 1e-5
            parameter += step * way
            above = loss()
            parameter -= 2 * step * way
            below = loss()
            parameter += step * way
        measured = float((above - below) / (2 * step))
        predicted = float((parameter.grad * way).sum())
        assert predicted == pytest.approx(measured, rel=1e-5, abs=1e-7), name
    if not model.cfg.tied:
        assert sum(float(p.grad.abs().sum()) > 0 for p in model.parameters()) > 10


def double_loss(model: Llama, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(tokens, attention_mask=mask)[mask > 0].log_softmax(-1)[:, 5].sum()


def test_a_hidden_expert_gets_no_gradient_but_the_chosen_do():
    model = double(SWITCHES["mixtral"])
    model(torch.tensor([[1, 2]])).sum().backward()
    gradient = model.blocks[0].mlp.experts_in.grad
    assert gradient is not None
    used = gradient.abs().sum(dim=(1, 2)) > 0
    assert 2 <= int(used.sum()) <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(model, dtype):
    """Norms stay in float32 at least; both attention paths agree as far as the precision goes."""
    import copy

    cast = copy.deepcopy(model).to(dtype)
    assert cast.cfg.dtype == dtype
    logits = cast(TOKENS)
    assert logits.dtype == dtype and logits.isfinite().all()
    scale = cast.run_with_cache(TOKENS, names_filter="ln_final.hook_scale")[1]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert scale["ln_final.hook_scale"].dtype == expected
    if model.cfg.moe is None:
        eager, _ = cast.run_with_cache(TOKENS, names_filter="*hook_pattern")
        atol = {torch.bfloat16: 0.3, torch.float16: 0.04, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(eager, logits, atol=atol, rtol=0)


BAD_INPUT: list[tuple[Any, dict[str, Any], str]] = [
    (torch.zeros(1, 0, dtype=torch.long), {}, "empty"),
    (torch.tensor([[1.0, 2.0]]), {}, "integers"),
    (torch.ones(1, 2, 3, dtype=torch.long), {}, "integers \\[batch pos\\]"),
    (torch.tensor([[1, 199]]), {}, "0 to 198.*1 to 199"),
    (torch.tensor([[-1, 5]]), {}, "0 to 198"),
    (torch.ones(1, 513, dtype=torch.long), {}, "513 tokens, but the context is 512"),
    (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    (torch.tensor([[1, 2]]), {"start_at_layer": 1}, "residual stream"),
    (torch.tensor([[1, 2]]), {"logits_at": 2}, "positions 0 to 1"),
    (torch.tensor([[1, 2]]), {"logits_at": torch.tensor([0, 1])}, "batch has 1 rows"),
    (torch.tensor([[1, 2]]), {"return_type": "loss", "logits_at": -1}, "return_type"),
    ("some text", {}, "no tokenizer"),
    (torch.tensor([[1, 2]]), {"attention_mask": torch.tensor([[-torch.inf, 0.0]])}, "1 for tokens"),
    (torch.tensor([[1]]), {"return_type": "loss"}, "at least two tokens"),
    (torch.tensor([[1, 2]]), {"logits_at": torch.tensor([7])}, "positions 0 to 1"),
]


@pytest.mark.parametrize(("given", "options", "message"), BAD_INPUT)
def test_bad_input_gets_a_sentence(model, given, options, message):
    with pytest.raises(InputError, match=message):
        model(given, **options)


@pytest.fixture
def with_text(tiny_tokenizer) -> Llama:
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    return model


@pytest.mark.parametrize("text", ["", ["a", ""], []])
def test_an_empty_prompt_is_an_error(with_text, text):
    with pytest.raises(InputError, match="empty"):
        with_text(text)


@pytest.mark.parametrize(
    "ids", [[4, 5, 6], [[4, 5, 6]], np.array([4, 5, 6]), torch.tensor([4, 5, 6], dtype=torch.int32)]
)
def test_ids_in_a_list_or_an_array_are_tokens(model, ids):
    assert torch.equal(model(ids), model(torch.tensor([[4, 5, 6]])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.tensor([[4]])}, "'input_ids'"),
        ([[1, 2], [3]], "a list of texts"),
        ([None], "a list of texts"),
        (["a", 3], "text 1 is of type int"),
    ],
)
def test_other_kinds_of_input_get_a_sentence(with_text, given, message):
    with pytest.raises(InputError, match=message):
        with_text(given)


def test_text_in_a_batch_equals_text_alone(with_text):
    texts = ["one", "a longer text", "x"]
    logits = with_text(texts, logits_at=-1)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], with_text(text)[0, -1:], atol=2e-5, rtol=0)


def test_texts_are_padded_right_even_where_the_pad_token_is_also_bos(with_text):
    import copy

    model = copy.copy(with_text)
    model.tokenizer = copy.copy(with_text.tokenizer)
    model.tokenizer.pad_token_id = model.tokenizer.bos_token_id
    logits = model(["abcde", "abcd"], logits_at=-1)
    torch.testing.assert_close(logits[1], model("abcd")[0, -1:], atol=2e-5, rtol=0)


def test_a_padded_batch_of_texts_may_continue_a_cache(with_text):
    kv_cache = KVCache(with_text.cfg.n_layers)
    with_text(["same", "same"], kv_cache=kv_cache)
    logits = with_text([" abcdef", " xyz"], kv_cache=kv_cache, logits_at=-1)
    torch.testing.assert_close(logits[1], with_text("same xyz")[0, -1:], atol=2e-5, rtol=0)


def test_padding_is_derived_from_pad_tokens_at_the_start(with_text):
    tokens = with_text.to_tokens(["one", "a longer text"])
    assert int(tokens[0, 0]) == with_text.pad_token_id
    torch.testing.assert_close(with_text(tokens), with_text(["one", "a longer text"]))
    ignoring = with_text(tokens, attention_mask=torch.ones_like(tokens))
    assert (ignoring - with_text(tokens))[0, -1].abs().max() > 1e-3


def test_padding_that_is_also_bos_is_ambiguous(with_text):
    import copy

    model = copy.copy(with_text)
    model.tokenizer = copy.copy(with_text.tokenizer)
    model.tokenizer.pad_token_id = bos = model.tokenizer.bos_token_id
    assert model.padding_mask(torch.tensor([[bos, 5, 6]])) is None
    with pytest.raises(InputError, match="padding and BOS at once"):
        model(torch.tensor([[bos, bos, 6]]))
    model(torch.tensor([[bos, bos, 6]]), attention_mask=torch.tensor([[0, 1, 1]]))


def test_pads_at_the_end_change_nothing_before_them(with_text):
    tokens = with_text.to_tokens("a longer text")
    padded = torch.nn.functional.pad(tokens, (0, 4), value=with_text.pad_token_id)
    logits = with_text(padded)[:, : tokens.shape[1]]
    torch.testing.assert_close(logits, with_text(tokens), atol=2e-5, rtol=0)


def test_single_tokens(with_text):
    mary = with_text.to_single_token(" Mary")
    assert with_text.to_str_tokens([mary]) == [" Mary"] and with_text.to_single_token(mary) == mary
    with pytest.raises(InputError, match="2 tokens"):
        with_text.to_single_token("ab")
    with pytest.raises(InputError, match="token ids go from"):
        with_text.to_single_token(10_000)


def test_moving_and_casting_is_known_to_the_configuration():
    model = Llama(tiny.tiny_config())
    assert model.cfg.dtype == torch.float32 and model.cfg.device.type == "cpu"
    assert model.double().cfg.dtype == torch.float64
    assert model.to("meta").cfg.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_key_value_heads": 3}, "evenly"),
        ({"d_head": 5}, "even"),
        ({"act_fn": "gelu"}, "silu"),
        ({"masks": ("full",)}, "1 entries for 2 layers"),
        ({"masks": ("sliding", "full")}, "window"),
        ({"moe_layers": (True, False)}, "moe"),
        ({"rope_divisors": (1.0,)}, "1 numbers"),
        ({"n_layers": 0}, "at least 1"),
    ],
)
def test_a_contradictory_configuration_is_an_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.tiny_config(**changes)


def test_scaled_frequencies_are_metas_rule():
    """Kept, mixed and stretched wavelengths, worked out by hand."""
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64
    )
    cfg = tiny.tiny_config(d_head=16, rope_theta=1000.0)
    plain = inverse_frequencies(cfg, torch.device("cpu"))
    scaled = inverse_frequencies(cfg.but(rope_scaling=scaling), torch.device("cpu"))
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        turns = 64 * before / (2 * torch.pi)
        kept = min(max((turns - 1) / 3, 0), 1)
        assert after == pytest.approx(kept * before + (1 - kept) * before / 8, rel=1e-6)
    assert scaled[0] == plain[0] and scaled[-1] == plain[-1] / 8


@pytest.mark.parametrize("mask", ["full", "sliding", "chunked"])
@pytest.mark.parametrize("n_queries", [1, 3, 7])
def test_masks_by_their_definition(mask, n_queries):
    real = torch.tensor([[False, False, *[True] * 5], [True] * 7])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    seen = visible(mask, 3, positions, n_queries, real)
    assert seen is not None and seen.shape == (2, 1, n_queries, 7)
    for row in range(2):
        for q in range(n_queries):
            for k in range(7):
                query = 7 - n_queries + q
                i, j = int(positions[row, query]), int(positions[row, k])
                near = {"full": True, "sliding": i - j < 3, "chunked": i // 3 == j // 3}[mask]
                expected = bool(real[row, k]) and k <= query and near
                assert bool(seen[row, 0, q, k]) == expected


def test_plain_causal_needs_no_mask():
    positions = torch.arange(6)[None]
    assert visible("full", None, positions, 6, None) is None
    assert visible("sliding", 6, positions, 6, None) is None
    assert visible("sliding", 5, positions, 6, None) is not None
    assert visible("full", None, positions, 1, None) is None
    assert visible("full", None, positions, 2, None) is not None


def test_accumulated_bias_is_what_the_biases_add():
    model = tiny.make("llama-biased")
    expected = sum(b.attn.o.bias + b.mlp.down.bias for b in model.blocks[:2])
    torch.testing.assert_close(model.accumulated_bias(2), expected)
    with_attention = model.accumulated_bias(2, mlp_input=True)
    torch.testing.assert_close(with_attention, expected + model.blocks[2].attn.o.bias)


def test_initial_weights_are_small_and_seeded():
    torch.manual_seed(1)
    first = Llama(tiny.tiny_config()).state_dict()
    torch.manual_seed(1)
    second = Llama(tiny.tiny_config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["embed.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_the_public_class():
    assert lp.Llama is Llama


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_layer_runs_at_the_last_position_alone_where_that_is_enough(family):
    model = tiny.make(family)
    tokens = tiny.tokens(batch=3, length=40)
    mask = torch.ones_like(tokens)
    mask[0, :7] = mask[1, :1] = 0
    for options in ({}, {"attention_mask": mask}):
        whole = model(tokens, **options)[:, -1:]
        torch.testing.assert_close(model(tokens, logits_at=-1, **options), whole, atol=2e-5, rtol=0)
        # Whoever listens sees every position.
        name = lp.act_name("resid_post", -1 + model.cfg.n_layers)
        logits, cache = model.run_with_cache(tokens, names_filter=name, logits_at=-1, **options)
        torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)
        assert cache[name].shape[1] == 40
    stream = model(tokens, stop_at_layer=model.cfg.n_layers)
    last = model(tokens, stop_at_layer=model.cfg.n_layers, logits_at=-1)
    torch.testing.assert_close(last, stream[:, -1:], atol=2e-5, rtol=0)
    cache = KVCache(model.cfg.n_layers)
    model(tokens[:, :30], kv_cache=cache, logits_at=-1)
    after = model(tokens[:, 30:], kv_cache=cache, logits_at=-1)
    torch.testing.assert_close(after, model(tokens)[:, -1:], atol=2e-5, rtol=0)
