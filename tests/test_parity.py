"""Logits against transformers and Meta's reference code, in float32.

Models are tiny and random: weights N(0, 0.15), norms, biases and QK norms off their defaults, so
that logits have a standard deviation above 1. Transformers runs its sdpa attention.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe.model.cache import KVCache
from llama_probe.model.config import MoeConfig, Temperature
from llama_probe.model.llama import Llama

TOLERANCE = 2e-5  # largest absolute difference of a logit
FAMILIES = list(tiny.FAMILIES)


@cache
def pair(family: str, **changes: Any) -> tuple[Any, Llama]:
    hf = tiny.make_hf(family, **changes)
    return hf, lp.from_transformers(hf)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def padded(tokens: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows with pads in front, row i having `widths[i]` of them and losing as many at its end."""
    rows = [[0] * n + row[: len(row) - n].tolist() for n, row in zip(widths, tokens, strict=True)]
    mask = [[0] * n + [1] * (tokens.shape[1] - n) for n in widths]
    return torch.tensor(rows), torch.tensor(mask)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_full_forward(family):
    hf, model = pair(family)
    tokens = tiny.tokens()
    expected = hf(tokens).logits
    assert expected.std() >= 1
    assert distance(model(tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_step_by_step(family):
    hf, model = pair(family)
    tokens = tiny.tokens()
    kv_cache = KVCache(model.cfg.n_layers)
    steps = [model(part, kv_cache=kv_cache) for part in (tokens[:, :5], *tokens[:, 5:].split(1, 1))]
    assert kv_cache.length == tokens.shape[1]
    assert distance(torch.cat(steps, dim=1), hf(tokens).logits) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_in_pieces_of_several_tokens(family):
    hf, model = pair(family)
    tokens = tiny.tokens()
    kv_cache = KVCache(model.cfg.n_layers)
    steps = [model(part, kv_cache=kv_cache) for part in tokens.split(11, 1)]
    assert distance(torch.cat(steps, dim=1), hf(tokens).logits) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family):
    """Against transformers on each row alone: it is the sequence that counts, not its place."""
    hf, model = pair(family)
    tokens, widths = tiny.tokens(), [0, 13]
    rows, mask = padded(tokens, widths)
    logits = model(rows, attention_mask=mask)
    kv_cache = KVCache(model.cfg.n_layers)
    first = model(rows[:, :20], attention_mask=mask[:, :20], kv_cache=kv_cache)
    steps = [model(part, kv_cache=kv_cache) for part in rows[:, 20:].split(1, 1)]
    cached = torch.cat((first, *steps), dim=1)
    for row, width in enumerate(widths):
        alone = hf(rows[row : row + 1, width:]).logits[0]
        assert distance(logits[row, width:], alone) <= TOLERANCE
        assert distance(cached[row, width:], alone) <= TOLERANCE


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("llama4")])
def test_left_padding_as_transformers_does_it(family):
    """Llama 4 is left out: transformers counts pads in its attention temperature."""
    hf, model = pair(family)
    rows, mask = padded(tiny.tokens(), [4, 13])
    expected = hf(rows, attention_mask=mask).logits
    assert distance(model(rows, attention_mask=mask)[mask > 0], expected[mask > 0]) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama4-scout", "llama4-maverick"])
def test_left_padding_as_transformers_does_it_without_temperature(family):
    hf, model = pair(family, attn_temperature_tuning=False)
    rows, mask = padded(tiny.tokens(), [4, 13])
    expected = hf(rows, attention_mask=mask).logits
    assert distance(model(rows, attention_mask=mask)[mask > 0], expected[mask > 0]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_agrees(family):
    hf, model = pair(family)
    tokens = tiny.tokens()
    listening = ["*hook_attn_scores", "*hook_pattern"]
    logits, attention = model.run_with_cache(tokens, names_filter=listening)
    assert distance(logits, hf(tokens).logits) <= TOLERANCE
    pattern = attention["pattern", 0]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


MOE = [name for name in FAMILIES if "moe" in name or "mixtral" in name or "llama4" in name]


@pytest.mark.parametrize("family", MOE)
def test_no_router_is_undecided(family):
    """Where a margin is under 1e-5, rounding may choose another expert and logits may differ."""
    _, model = pair(family)
    _, kept = model.run_with_cache(tiny.tokens(), names_filter="*hook_router_logits")
    assert model.cfg.moe is not None
    k = model.cfg.moe.top_k
    for logits in kept.values():
        ordered = logits.sort(dim=-1, descending=True).values
        assert int((ordered[..., k - 1] - ordered[..., k] < 1e-5).sum()) == 0


def moe(family: str, **changes: Any) -> MoeConfig:
    cfg = pair(family)[1].cfg.moe
    assert cfg is not None
    return replace(cfg, **changes)


# What each family's switches would be if one of them were wrong; the weights stay the same.
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("llama-mha", {"rope_layout": "interleaved"}),
    ("llama-gqa", {"rope_theta": 20000.0}),
    ("llama-scaled", {"rope_scaling": None}),
    ("llama-tied", {"eps": 1e-3}),
    ("llama-biased", {"rope_layers": (True, True, False)}),
    ("mistral", {"window": 13}),
    ("mistral", {"masks": (), "window": None}),
    ("mixtral", {"moe": lambda: moe("mixtral", renormalise=False)}),
    ("mixtral", {"moe": lambda: moe("mixtral", top_k=3)}),
    ("qwen2", {"masks": ("sliding",) * 3}),
    ("qwen2-moe", {"moe": lambda: moe("qwen2-moe", renormalise=True)}),
    ("qwen3-moe", {"moe": lambda: moe("qwen3-moe", renormalise=False)}),
    ("llama4-scout", {"rope_scaling": None}),
    ("llama4-scout", {"rope_layout": "half"}),
    ("llama4-scout", {"qk_norm": "none"}),
    ("llama4-scout", {"masks": ("full",) * 4}),
    ("llama4-scout", {"window": 17}),
    ("llama4-scout", {"moe": lambda: moe("llama4-scout", rule="softmax")}),
    ("llama4-maverick", {"temperature": None}),
    ("llama4-maverick", {"temperature": Temperature(scale=0.1, floor=16)}),
    ("llama4-top2", {"moe": lambda: moe("llama4-top2", top_k=1)}),
]


@pytest.mark.parametrize(("family", "wrong"), WRONG)
def test_a_wrong_switch_would_be_seen(family, wrong):
    hf, model = pair(family)
    changes = {key: value() if callable(value) else value for key, value in wrong.items()}
    broken = Llama(model.cfg.but(**changes))
    broken.load_state_dict(model.state_dict())
    tokens = tiny.tokens()
    assert distance(broken(tokens), hf(tokens).logits) > 50 * TOLERANCE


@pytest.mark.parametrize("part", ["q_norm", "k_norm", "q.bias", "v.bias", "shared_gate"])
def test_a_weight_left_out_would_be_seen(part):
    family = {"q_norm": "qwen3", "k_norm": "qwen3", "shared_gate": "qwen2-moe"}.get(part, "qwen2")
    hf, model = pair(family)
    state = {
        name: torch.ones_like(value)
        if part in name and "norm" in part
        else value * (part not in name)
        for name, value in model.state_dict().items()
    }
    broken = Llama(model.cfg)
    broken.load_state_dict(state)
    tokens = tiny.tokens()
    assert distance(broken(tokens), hf(tokens).logits) > 50 * TOLERANCE


@pytest.mark.parametrize("case", ["llama3_gqa", "llama4_scout-like"])
def test_reference_logits(shared, case):
    """Meta's own code and transformers, on published-format weights: 5e-5 to both."""
    folder = shared / "parity" / case
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = lp.load(folder / "hf", device="cpu")
    logits = model(expected["tokens"])
    assert distance(logits, expected["logits_meta"]) <= 5e-5
    assert distance(logits, expected["logits_hf"]) <= 5e-5
    shifted = model(expected["tokens"].roll(1, dims=1))
    assert distance(shifted, expected["logits_meta"]) > 1


def test_the_weights_are_shared_and_the_given_model_is_untouched():
    hf = tiny.make_hf("llama4-scout")
    before = hf(tiny.tokens()).logits
    model = lp.from_transformers(hf)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    theirs = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    assert own == theirs
    assert all(parameter.requires_grad for parameter in hf.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(hf(tiny.tokens()).logits, before)
