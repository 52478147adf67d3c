"""Between config.json and `LlamaConfig`, against the configurations of transformers."""

import json
from typing import Any

import pytest
import tiny
import transformers

from llama_probe.errors import ConfigError
from llama_probe.model.config import Llama3Scaling, LlamaConfig, MoeConfig, Temperature

CLASSES = ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "Llama4Text"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}


def read(config: dict[str, Any]) -> LlamaConfig:
    """Through JSON, as from a file."""
    return LlamaConfig.from_hf(json.loads(json.dumps(config)))


def sizes(kind: str) -> dict[str, Any]:
    """The keys that a configuration of this class must have."""
    model_type = getattr(transformers, f"{kind}Config").model_type
    experts = EXPERTS if kind in ("Qwen2Moe", "Qwen3Moe") else {}
    return {"model_type": model_type, **SIZES, **experts}


def theirs(kind: str, **keys: Any) -> LlamaConfig:
    """What the configuration class of transformers makes of some keys, read in full."""
    keys.pop("model_type", None)
    return LlamaConfig.from_hf(getattr(transformers, f"{kind}Config")(**keys).to_dict())


# --- transformers' classes


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_of_a_class_are_accepted(kind):
    config = getattr(transformers, f"{kind}Config")()
    cfg = LlamaConfig.from_hf(config.to_dict(), "its name")
    assert (cfg.n_layers, cfg.d_model) == (config.num_hidden_layers, config.hidden_size)
    assert (cfg.model_type, cfg.model_name) == (config.model_type, "its name")
    assert LlamaConfig.from_hf(config.to_dict()).model_name == config.model_type


@pytest.mark.parametrize("kind", CLASSES)
def test_a_key_that_is_absent_has_the_value_of_the_class(kind):
    assert read(sizes(kind)) == theirs(kind, **sizes(kind))


# (class, keys): each kind of switch once, compared with what the class fills in.
SWITCHES = [
    ("Llama", {"head_dim": 16}),
    ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"sliding_window": 5}),
    ("Mistral", {"sliding_window": None}),
    ("Mixtral", {"sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 1}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 5}),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    ("Qwen2Moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True}),
    ("Qwen2Moe", {"qkv_bias": False, "shared_expert_intermediate_size": 24}),
    ("Qwen3Moe", {"decoder_sparse_step": 3, "mlp_only_layers": [0]}),
    ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 5}),
    ("Llama4Text", {"no_rope_layer_interval": 2, "attention_chunk_size": 16}),
    ("Llama4Text", {"no_rope_layers": [0, 1, 1, 0]}),
    ("Llama4Text", {"interleave_moe_layer_step": 2}),
    ("Llama4Text", {"moe_layers": [2], "use_qk_norm": False, "attn_temperature_tuning": False}),
]


@pytest.mark.parametrize(("kind", "keys"), SWITCHES)
def test_switches_mean_what_they_mean_to_the_class(kind, keys):
    expected = theirs(kind, **sizes(kind), **keys)
    assert read({**sizes(kind), **keys}) == expected
    assert read(expected.to_hf()).but(model_name=expected.model_name) == expected


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_written_and_read_again_by_us_and_by_transformers(family):
    kind, own = tiny.FAMILIES[family]
    cfg = theirs(kind, **{**tiny._BASE, **own}).but(model_name="mine")
    written = json.loads(json.dumps(cfg.to_hf()))
    assert LlamaConfig.from_hf(written, "mine") == cfg
    assert theirs(kind, **written).but(model_name="mine") == cfg


# --- what the keys mean


def test_head_counts_and_widths():
    cfg = read({**LLAMA, "num_key_value_heads": None})
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head) == (8, 8, 8)
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read(without) == cfg
    assert read({**LLAMA, "head_dim": 32}).d_head == 32
    assert read({**LLAMA, "head_dim": None}).d_head == 8


@pytest.mark.parametrize(("kind", "width"), [("Qwen3", 128), ("Llama4Text", 128), ("Qwen3Moe", 8)])
def test_a_missing_head_dim_differs_by_family(kind, width):
    assert read(sizes(kind)).d_head == width


def test_biases():
    assert read({**LLAMA, "attention_bias": True}).o_bias
    qwen2 = read(sizes("Qwen2"))
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.mlp_bias


@pytest.mark.parametrize(
    ("kind", "keys", "masks", "window"),
    [
        ("Mistral", {}, "ssss", 4096),
        ("Mistral", {"sliding_window": None}, "ffff", None),
        ("Mistral", {"sliding_window": 7}, "ssss", 7),
        ("Mixtral", {}, "ffff", None),
        ("Mixtral", {"sliding_window": 7}, "ssss", 7),
        ("Qwen2", {"sliding_window": 7, "max_window_layers": 1}, "ffff", None),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 7}, "ffff", None),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            "fsss",
            7,
        ),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "sfsf",
            4096,
        ),
        ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 7}, "ssss", 7),
        ("Llama4Text", {"attention_chunk_size": 7}, "cccf", 7),
        ("Llama4Text", {"attention_chunk_size": None}, "ffff", None),
    ],
)
def test_windows(kind, keys, masks, window):
    cfg = read({**sizes(kind), **keys})
    assert "".join(mask[0] for mask in cfg.masks) == masks
    assert cfg.window == window


def test_the_text_part_of_llama4():
    text = {**sizes("Llama4Text"), "attn_scale": 0.2, "floor_scale": 16}
    outer = {"model_type": "llama4", "text_config": text, "vision_config": {"image_size": 336}}
    cfg = read(outer)
    assert cfg == read(text)
    assert cfg.rope_layers == (True, True, True, False)
    assert cfg.temperature == Temperature(scale=0.2, floor=16)
    assert cfg.moe == MoeConfig(
        n_experts=16, top_k=1, d_expert=96, rule="sigmoid_input", d_shared=96
    )


# --- RoPE, old style and new


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_old_style_and_new_style_of_scaling(keys):
    cfg = read({**LLAMA, **keys})
    assert cfg.rope_theta == 5e5
    assert cfg.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32
    )
    assert cfg == theirs("Llama", **LLAMA, **keys)


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 3e5}, 3e5),
        ({"rope_scaling": None, "rope_theta": 3e5}, 3e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, 3e5),
        ({"rope_parameters": {"rope_theta": 3e5}}, 3e5),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 3e5}, 3e5),
    ],
)
def test_old_style_and_new_style_of_the_base(keys, theta):
    cfg = read({**LLAMA, **keys})
    assert (cfg.rope_theta, cfg.rope_scaling, cfg.rope_divisors) == (theta, None, None)


DIVISORS = [1.0, 2.0, 3.0, 4.0]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": DIVISORS,
    "long_factor": DIVISORS,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 32,
}


def test_divisors():
    assert read({**LLAMA, "rope_parameters": LONGROPE}).rope_divisors == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("rope", "parts"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}, ["'yarn'", "'llama3'"]),
        ({"rope_type": "linear", "factor": 4.0}, ["'linear'"]),
        ({"type": "dynamic", "factor": 4.0}, ["'dynamic'"]),
        ({"rope_type": "llama33", **LLAMA3}, ["'llama33'"]),
        ({**LONGROPE, "long_factor": [2.0] * 4}, ["'longrope'", "one set of factors"]),
        ({**LONGROPE, "attention_factor": 1.2}, ["'longrope'", "attention_factor"]),
        ({**LONGROPE, "attention_factor": None}, ["'longrope'", "attention_factor"]),
        ({**LONGROPE, "short_factor": [1.0], "long_factor": [1.0]}, ["rope_divisors", "is 4"]),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["'partial_rotary_factor'"]),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_facto": 2.0}, ["mean 'low_freq_factor'"]),
        # One set for each kind of layer.
        ({"full_attention": {"rope_theta": 1e6}}, ["'full_attention'"]),
        *(
            ({"rope_type": "llama3", **LLAMA3, key: None}, [f"no '{key}'"])
            for key in ("factor", "high_freq_factor", "original_max_position_embeddings")
        ),
        ("llama3", ["wrong kind"]),
    ],
)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_implemented(style, rope, parts):
    not_read({**LLAMA, style: rope}, *parts)


# --- what is refused


def not_read(config: Any, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(config)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("lama", ["'lama'", "did you mean 'llama'"]),
        ("qwen_2", ["did you mean 'qwen2'", "implemented are llama, llama4_text"]),
        ("gpt2", ["'gpt2'"]),
        (None, ["None"]),
        (["llama"], ["['llama']"]),
        ("llama4", ["'llama4'"]),  # without its text_config
    ],
)
def test_an_unknown_family(model_type, parts):
    not_read({**LLAMA, "model_type": model_type}, "model_type", *parts)


@pytest.mark.parametrize(
    ("kind", "keys", "parts"),
    [
        ("Llama", {"logits_scaling": 8.0}, ["'logits_scaling'", "llama models do not have"]),
        ("Llama", {"mlp_bais": True}, ["'mlp_bais'", "did you mean 'mlp_bias'"]),
        ("Llama", {"sliding_window": 7}, ["'sliding_window'"]),
        ("Mistral", {"mlp_bias": True}, ["'mlp_bias'", "mistral"]),
        ("Llama", {"rope_interleaved": True}, ["rope_interleaved"]),
        ("Llama", {"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
        ("Llama", {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ("Llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "unnamed"]),
        ("Llama", {"quantization_config": "awq"}, ["quantization_config"]),
        ("Qwen2Moe", {"use_sliding_window": True}, ["use_sliding_window"]),
        (
            "Qwen2",
            {"use_sliding_window": True, "layer_types": ["linear_attention"] * 4},
            ["layer_types", "'linear'"],
        ),
        (
            "Qwen2",
            {"use_sliding_window": True, "layer_types": ["sliding_attention"]},
            ["masks has 1 entries for 4 layers"],
        ),
        ("Llama4Text", {"no_rope_layers": [1, 1]}, ["rope_layers has 2 entries for 4 layers"]),
        ("Llama4Text", {"no_rope_layer_interval": 0}, ["wrong kind"]),
        ("Llama4Text", {"interleave_moe_layer_step": 0}, ["wrong kind"]),
        ("Mixtral", {"num_experts_per_tok": 9}, ["top_k is 9", "1 to 8"]),
    ],
)
def test_keys_that_are_not_implemented(kind, keys, parts):
    not_read({**sizes(kind), **keys}, *parts)


def test_quantised_multimodal_models():
    """The key stands beside the text's part."""
    outer = {"model_type": "llama4", "text_config": sizes("Llama4Text")}
    read(outer)
    quantised = {"quantization_config": {"quant_method": "compressed-tensors"}}
    not_read({**outer, **quantised}, "compressed-tensors")


def test_keys_that_change_no_number_are_accepted():
    harmless = {
        "attention_dropout": 0.1,
        "pretraining_tp": 4,
        "torch_dtype": "bfloat16",
        "quantization_config": None,
        "auto_map": {"AutoModel": "modeling.Model"},
    }
    assert read({**LLAMA, **harmless}) == read(LLAMA)


@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("intermediate_size", "vocab_size"),
    ],
)
@pytest.mark.parametrize("value", [None, "64", 64.0, True, [64], -1, 0])
def test_sizes_that_are_missing_or_of_the_wrong_kind(key, value):
    not_read({**LLAMA, key: value}, "is 0, but" if value == 0 else repr(key))


def test_a_missing_size_of_experts():
    for key in EXPERTS:
        config = {name: value for name, value in sizes("Qwen3Moe").items() if name != key}
        not_read(config, "num_local_experts" if key == "num_experts" else key)


@pytest.mark.parametrize("value", [-2, 2.0, "2"])
def test_key_value_heads_of_the_wrong_kind(value):
    not_read({**LLAMA, "num_key_value_heads": value}, "num_key_value_heads")


# --- to_hf refuses what no family has


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "learned"},
        {"qkv_bias": True},  # a Llama has the other bias too
        {"rope_layout": "interleaved"},
        {"masks": ("sliding",) * 2, "window": 5},
        {"rope_layers": (True, False)},
        {"temperature": Temperature(scale=0.1, floor=8)},
        {"moe": MoeConfig(n_experts=4, top_k=2, d_expert=24, rule="softmax", renormalise=True)},
        {"model_type": "qwen2"},
        {"model_type": "mixtral"},
        {"model_type": "mistral", "masks": ("sliding", "full"), "window": 5},
    ],
)
def test_to_hf_refuses_what_its_family_cannot_be(changes):
    cfg = tiny.tiny_config(**changes)
    with pytest.raises(ConfigError, match=f"'{cfg.model_type}'"):
        cfg.to_hf()


def test_to_hf_of_an_unknown_family():
    with pytest.raises(ConfigError, match="'lama'.*did you mean 'llama'"):
        tiny.tiny_config(model_type="lama").to_hf()


@pytest.mark.parametrize("name", ["", "mine"])
def test_to_hf_does_not_depend_on_the_name(name):
    cfg = tiny.tiny_config()
    assert cfg.but(model_name=name).to_hf() == cfg.to_hf()


# --- LlamaConfig


def test_defaults():
    cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=24, d_vocab=50)
    assert (cfg.n_key_value_heads, cfg.d_head) == (4, 4)
    assert cfg.rope_layers == (True, True)
    assert cfg.masks == ("full", "full")
    assert cfg.moe_layers == (False, False)
    moe = MoeConfig(n_experts=4, top_k=2, d_expert=24, rule="softmax")
    assert cfg.but(moe=moe, moe_layers=()).moe_layers == (True, True)
    assert cfg.but(d_head=6).d_head == 6 and cfg.d_head == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"d_vocab": -1}, "d_vocab is -1"),
        ({"n_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"d_head": 5}, "d_head is 5"),
        ({"n_heads": 17, "n_key_value_heads": 17}, "d_head is 0"),
        ({"act_fn": "gelu"}, "'gelu'"),
        ({"rope_layers": (True,)}, "rope_layers has 1 entries for 2 layers"),
        ({"masks": ("full",) * 3}, "masks has 3 entries"),
        ({"moe_layers": (False,)}, "moe_layers has 1 entries"),
        ({"masks": ("full", "sliding")}, "window should be set"),
        ({"moe_layers": (True, False)}, "moe_layers names layers"),
        ({"rope_divisors": (1.0,)}, "rope_divisors has 1 numbers, but d_head / 2 is 2"),
        (
            {
                "rope_divisors": (1.0, 1.0),
                "rope_scaling": Llama3Scaling(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32
                ),
            },
            "exclude each other",
        ),
    ],
)
def test_contradictions(changes, match):
    with pytest.raises(ConfigError, match=match):
        tiny.tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"top_k": 0}, "top_k is 0, but should be 1 to 4"),
        ({"top_k": 5}, "top_k is 5, but should be 1 to 4"),
        ({"rule": "sigmoid_input", "renormalise": True}, "only a softmax router"),
        ({"shared_gate": True}, "no shared expert"),
    ],
)
def test_contradictions_of_experts(changes, match):
    with pytest.raises(ConfigError, match=match):
        MoeConfig(**{"n_experts": 4, "top_k": 2, "d_expert": 8, "rule": "softmax", **changes})
