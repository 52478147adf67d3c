"""The released models' configurations, against published totals and the traps of each family."""

import pytest

from llama_probe.errors import UnknownNameError
from llama_probe.model import presets
from llama_probe.model.config import LlamaConfig
from llama_probe.model.presets import PRESETS, preset, preset_names

# Parameters in billions, and KiB of keys and values per token in bfloat16.
PUBLISHED = {
    "llama-1-7b": (6.738, 512),
    "llama-1-13b": (13.016, 800),
    "llama-1-33b": (32.529, 1560),
    "llama-1-65b": (65.286, 2560),
    "llama-2-7b": (6.738, 512),
    "llama-2-13b": (13.016, 800),
    "llama-2-70b": (68.977, 320),
    "code-llama-34b": (33.744, 192),
    "llama-3-8b": (8.030, 128),
    "llama-3-70b": (70.554, 320),
    "llama-3.1-8b": (8.030, 128),
    "llama-3.1-70b": (70.554, 320),
    "llama-3.1-405b": (405.853, 504),
    "llama-3.2-1b": (1.236, 32),
    "llama-3.2-3b": (3.213, 112),
    "llama-3.3-70b": (70.554, 320),
    "llama-4-scout": (107.770, 192),
    "llama-4-maverick": (400.712, 192),
    "mistral-7b-v0.1": (7.242, 128),
    "mixtral-8x7b": (46.703, 128),
    "mixtral-8x22b": (140.630, 224),
    "qwen2.5-7b": (7.616, 56),  # with the biases, as in 72B
    "qwen2.5-72b": (72.706, 320),
    "qwen3-30b-a3b": (30.532, 96),
    "qwen3-235b-a22b": (235.094, 188),
    "smollm2-135m": (0.135, 22.5),
    "smollm2-360m": (0.362, 40),
    "smollm2-1.7b": (1.711, 192),
}
ACTIVE = {
    "llama-4-scout": 17.17,
    "llama-4-maverick": 17.18,
    "mixtral-8x7b": 12.88,
    "mixtral-8x22b": 39.16,
    "qwen3-30b-a3b": 3.35,
    "qwen3-235b-a22b": 22.19,
}
# As the model cards round or cut them, so good to 1.5 %: less than an embedding, so that a model
# tied by mistake, or not tied, shows.
CARDS = {
    "qwen2-0.5b": 0.49,
    "qwen2-1.5b": 1.54,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "falcon3-1b": 1.67,
    "falcon3-3b": 3.23,
    "falcon3-7b": 7.46,
    "falcon3-10b": 10.3,
}


def attention_parameters(cfg: LlamaConfig) -> int:
    queries, keys = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    weights = 2 * cfg.d_model * (queries + keys)
    biases = cfg.qkv_bias * (queries + 2 * keys) + cfg.o_bias * cfg.d_model
    norms = 2 * cfg.d_head if cfg.qk_norm == "learned" else 0
    return weights + biases + norms


def sparse_parameters(cfg: LlamaConfig, active: bool) -> int:
    """A sparse feed-forward; `active`: no more experts than a token sees."""
    if cfg.moe is None:
        return 0
    experts = cfg.moe.top_k if active else cfg.moe.n_experts
    width = experts * cfg.moe.d_expert + cfg.moe.d_shared
    return cfg.d_model * (3 * width + cfg.moe.n_experts + cfg.moe.shared_gate)


def billions(cfg: LlamaConfig, active: bool = False) -> float:
    n_sparse = sum(cfg.moe_layers)
    feed_forward = n_sparse * sparse_parameters(cfg, active)
    feed_forward += (cfg.n_layers - n_sparse) * 3 * cfg.d_model * cfg.d_mlp
    blocks = cfg.n_layers * (attention_parameters(cfg) + 2 * cfg.d_model) + feed_forward
    embeddings = cfg.d_vocab * cfg.d_model * (1 if cfg.tied else 2)
    return (blocks + embeddings + cfg.d_model) / 1e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cache_are_as_published(name: str):
    cfg = preset(name)
    total, cache = PUBLISHED[name]
    assert billions(cfg) == pytest.approx(total, abs=0.00051)
    assert 2 * 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head / 1024 == cache


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_as_published(name: str):
    assert billions(preset(name), active=True) == pytest.approx(ACTIVE[name], abs=0.0051)


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_the_model_cards(name: str):
    cfg = preset(name)
    assert billions(cfg) == pytest.approx(CARDS[name], rel=0.015)
    assert billions(cfg.but(tied=not cfg.tied)) != pytest.approx(CARDS[name], rel=0.015)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_config_json(name: str):
    cfg = preset(name)
    assert cfg.model_name == name
    assert LlamaConfig.from_hf(cfg.to_hf(), name) == cfg


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_type_is_the_familys(name: str):
    prefixes = {
        "llama-4": "llama4_text",
        "qwen3-30b-a3b": "qwen3_moe",
        "qwen3-235b-a22b": "qwen3_moe",
        "qwen3": "qwen3",
        "qwen1.5-moe": "qwen2_moe",
        "qwen2-moe": "qwen2_moe",
        "qwen2": "qwen2",
        "mistral": "mistral",
        "mixtral": "mixtral",
    }
    wanted = next((prefixes[p] for p in prefixes if name.startswith(p)), "llama")
    assert preset(name).model_type == wanted


def test_names_are_unique_and_lower_case():
    names = preset_names()
    assert len(names) == sum(len(table) for table in presets._TABLES)
    assert names == [name.lower() for name in names]


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'llama-3.1-8b'"):
        preset("Llama-3.1-8")
    with pytest.raises(UnknownNameError, match="no preset 'gpt2'; preset_names"):
        preset("gpt2")


def test_llama_2_shares_keys_and_values_in_70b_only():
    heads = {size: preset(f"llama-2-{size}").n_key_value_heads for size in ("7b", "13b", "70b")}
    assert heads == {"7b": 32, "13b": 40, "70b": 8}
    assert preset("llama-2-13b").rope_theta == 1e4


def test_code_llama_has_more_tokens_where_it_can_infill():
    sizes = {name: cfg.d_vocab for name, cfg in PRESETS.items() if name.startswith("code-llama")}
    assert {name for name, size in sizes.items() if size == 32016} == {
        "code-llama-7b",
        "code-llama-13b",
        "code-llama-70b",
    }
    assert set(sizes.values()) == {32000, 32016}


def test_llama_3_2_is_stretched_by_32_and_tied():
    factors = {
        name: cfg.rope_scaling.factor if cfg.rope_scaling else None
        for name, cfg in PRESETS.items()
        if name.startswith("llama-3")
    }
    assert factors == {
        "llama-3-8b": None,
        "llama-3-70b": None,
        "llama-3.1-8b": 8,
        "llama-3.1-70b": 8,
        "llama-3.1-405b": 8,
        "llama-3.2-1b": 32,
        "llama-3.2-3b": 32,
        "llama-3.3-70b": 8,
    }
    assert [name for name in factors if preset(name).tied] == ["llama-3.2-1b", "llama-3.2-3b"]


def test_scout_and_maverick_differ_where_they_should():
    scout, maverick = preset("llama-4-scout"), preset("llama-4-maverick")
    scaling = scout.rope_scaling
    assert scaling is not None and maverick.rope_scaling is None
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (16, 1, 1)
    assert (scout.qk_norm, maverick.qk_norm) == ("weightless", "none")
    assert all(scout.moe_layers)
    assert [i for i, sparse in enumerate(maverick.moe_layers) if sparse] == list(range(1, 48, 2))


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
def test_llama_4_has_neither_rope_nor_chunks_in_every_fourth_layer(name: str):
    cfg = preset(name)
    fourth = [(i + 1) % 4 == 0 for i in range(48)]
    assert cfg.rope_layers == tuple(not f for f in fourth)
    assert cfg.masks == tuple("full" if f else "chunked" for f in fourth)
    assert cfg.window == 8192 and cfg.temperature is not None
    assert cfg.rope_layout == "interleaved"


def test_only_the_first_mistral_slides():
    assert set(preset("mistral-7b-v0.1").masks) == {"sliding"}
    assert {name for name, cfg in PRESETS.items() if "sliding" in cfg.masks} == {"mistral-7b-v0.1"}
    assert preset("mistral-7b-v0.3").rope_theta == 1e6


def test_switches_of_the_qwens():
    dense2, sparse2 = preset("qwen2.5-7b"), preset("qwen1.5-moe-a2.7b")
    assert dense2.qkv_bias and not dense2.o_bias and sparse2.qkv_bias
    assert sparse2.moe is not None and sparse2.moe.shared_gate and not sparse2.moe.renormalise
    for name in ("qwen3-0.6b", "qwen3-32b", "qwen3-235b-a22b"):
        cfg = preset(name)
        assert (cfg.d_head, cfg.qk_norm, cfg.qkv_bias) == (128, "learned", False)
    sparse3 = preset("qwen3-30b-a3b").moe
    assert sparse3 is not None and sparse3.renormalise and not sparse3.d_shared


def test_guards_have_the_shape_of_their_base():
    bases = {"1-7b": "2-7b", "2-8b": "3-8b", "3-8b": "3.1-8b", "3-1b": "3.2-1b"}
    for guard, base in bases.items():
        name = f"llama-guard-{guard}"
        assert preset(name) == preset(f"llama-{base}").but(model_name=name)
