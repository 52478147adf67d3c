"""GGUF files of architecture `llama`, written as llama.cpp's converter writes them."""

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor

import llama_probe as lp
from llama_probe.checkpoints import gguf_llama
from llama_probe.model.llama import Llama

TOLERANCE = 2e-5  # largest absolute difference of a logit

# Transformers' names, behind "model." and "layers.{i}.", and GGUF's, behind "blk.{i}.".
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", *(chr(0x100 + i) for i in range(196)), "Āā"],
    "tokenizer.ggml.merges": ["Ā ā"],
    "tokenizer.ggml.token_type": [3, 3, *[1] * 197],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Besides those of tiny.FAMILIES: the family, and what is changed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biased-attention": ("llama-gqa", {"attention_bias": True}),
    # Some pairs are kept, one is mixed, the others are stretched.
    "scaled": (
        "llama-scaled",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 128,
            }
        },
    ),
}


@cache
def hf_model(family: str) -> Any:
    base, changes = VARIANTS.get(family, (family, {}))
    return tiny.make_hf(base, **changes)


def permuted(weight: Tensor, n_heads: int) -> Tensor:
    """Rows in interleaved order: convert_hf_to_gguf.py's `permute`."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(hf: Any, *, stacked: bool = True, permute: bool = True) -> dict[str, np.ndarray]:
    """The weights of a Llama or Mixtral of transformers under GGUF's names, in its order."""
    heads = {"attn_q": hf.config.num_attention_heads, "attn_k": hf.config.num_key_value_heads}
    written: dict[str, Tensor] = {}
    for name, weight in hf.named_parameters():
        if not name.startswith("model.layers."):
            module, _, kind = name.rpartition(".")
            written[f"{TOP[module]}.{kind}"] = weight
            continue
        _, _, layer, inner = name.split(".", 3)
        if inner.startswith("mlp.experts"):
            written |= experts(f"blk.{layer}.", inner, weight, stacked)
            continue
        module, _, kind = inner.rpartition(".")
        if permute and BLOCK[module] in heads:
            weight = permuted(weight, heads[BLOCK[module]])
        written[f"blk.{layer}.{BLOCK[module]}.{kind}"] = weight
    return {name: np.ascontiguousarray(weight.detach().numpy()) for name, weight in written.items()}


def experts(place: str, inner: str, weight: Tensor, stacked: bool) -> dict[str, Tensor]:
    if inner.endswith("gate_up_proj"):
        gates, ups = weight.chunk(2, dim=1)
        parts = {"ffn_gate": gates, "ffn_up": ups}
    else:
        parts = {"ffn_down": weight}
    if stacked:
        return {f"{place}{part}_exps.weight": stack for part, stack in parts.items()}
    return {
        f"{place}{part}.{expert}.weight": one
        for part, stack in parts.items()
        for expert, one in enumerate(stack)
    }


def metadata_of(hf: Any) -> dict[str, Any]:
    config = hf.config
    values = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }
    if hasattr(config, "num_local_experts"):
        values["llama.expert_count"] = config.num_local_experts
        values["llama.expert_used_count"] = config.num_experts_per_tok
    return values


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A file; None for a value leaves it out, a pair is (data, type)."""
    writer = gguf.GGUFWriter(path, arch="", use_temp_file=False)
    writer.kv_data[0].clear()  # the writer's own general.architecture
    add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
    add |= {int: writer.add_int32, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(
    tmp_path: Path,
    family: str = "llama-gqa",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    **options: bool,
) -> Path:
    """The file of a family, some metadata and tensors changed or (None) left out."""
    hf = hf_model(family)
    held = {**tensors_of(hf, **options), **(tensors or {})}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    return write(tmp_path / f"{family}.gguf", {**metadata_of(hf), **(metadata or {})}, held)


def load(path: Path, **options: Any) -> Llama:
    return lp.load(path, device="cpu", progress=False, **options)


def distance(model: Llama, hf: Any) -> float:
    return float((model(tiny.tokens()) - hf(tiny.tokens()).logits).abs().max())


def refused(path: Path, error: type[Exception], *parts: str) -> None:
    with pytest.raises(error) as caught:
        load(path)
    assert caught.type is error
    for part in parts:
        assert part in str(caught.value)


# --- against transformers on the same weights


@pytest.mark.parametrize(
    ("family", "stacked"),
    [
        *((f, True) for f in ("llama-mha", "llama-gqa", "llama-tied", "biased-attention")),
        *(("mixtral", stacked) for stacked in (True, False)),
    ],
)
def test_equals_transformers(family, stacked, tmp_path):
    model = load(written(tmp_path, family, stacked=stacked))
    assert distance(model, hf_model(family)) <= TOLERANCE
    own = lp.from_transformers(hf_model(family))
    assert model.cfg == own.cfg.but(model_name=family, eps=model.cfg.eps)
    assert model.cfg.eps == np.float32(own.cfg.eps)  # the file has it in 32 bits
    for ours, theirs in zip(model.parameters(), own.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the same order, bit for bit


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F16])
def test_quantised_weights_are_what_they_are_dequantised_to(family, kind, tmp_path):
    """Against transformers on the numbers that gguf-py dequantises."""
    quantised: dict[str, Any] = {}
    rounded: dict[str, np.ndarray] = {}
    for name, data in tensors_of(hf_model(family)).items():
        rounded[name] = data
        if data.ndim > 1 and "ffn_gate_inp" not in name:
            quantised[name] = (quantize(data, kind), kind)
            rounded[name] = dequantize(quantised[name][0], kind)
    path = written(tmp_path, family, tensors=quantised)
    plain = load(write(tmp_path / "rounded.gguf", metadata_of(hf_model(family)), rounded))
    hf = tiny.make_hf(family)
    model = load(path)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32
    assert distance(model, hf) > TOLERANCE  # rounding shows
    folder = lp.save(model, tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert distance(model, again) <= TOLERANCE


@pytest.mark.slow
def test_transformers_reads_the_same_from_the_file(tmp_path):
    path = written(tmp_path, metadata=VOCABULARY)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert type(hf).__name__ == "LlamaForCausalLM"
    assert distance(load(path), hf) <= TOLERANCE


def test_dtype_and_name(tmp_path):
    model = load(written(tmp_path), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16
    assert model.cfg.model_name == "llama-gqa"
    assert not any(weight.requires_grad for weight in model.parameters())


def test_what_is_left_out_has_llama_cpps_value(tmp_path):
    names = ("rope.freq_base", "rope.dimension_count", "attention.key_length", "vocab_size")
    model = load(written(tmp_path, metadata={f"llama.{name}": None for name in names}))
    assert (model.cfg.rope_theta, model.cfg.d_head, model.cfg.d_vocab) == (10000.0, 8, 199)
    mha = load(written(tmp_path, "llama-mha", {"llama.attention.head_count_kv": None}))
    assert mha.cfg.n_key_value_heads == 8
    assert distance(mha, hf_model("llama-mha")) <= TOLERANCE


# --- the order of rows


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_a_file_that_is_not_permuted_would_be_seen(family, tmp_path):
    model = load(written(tmp_path, family, permute=False))
    assert distance(model, hf_model(family)) > 50 * TOLERANCE


def test_undoing_the_order_of_other_heads_would_be_seen(tmp_path, monkeypatch):
    """Keys have fewer heads than queries."""
    undo = gguf_llama.to_halves
    monkeypatch.setattr(gguf_llama, "to_halves", lambda weight, n_heads: undo(weight, 2))
    assert distance(load(written(tmp_path)), hf_model("llama-gqa")) > 50 * TOLERANCE


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_to_halves_undoes_the_converter(shape):
    weight = torch.arange(float(np.prod(shape))).reshape(shape)
    assert torch.equal(gguf_llama.to_halves(permuted(weight, 3), 3), weight)
    assert not torch.equal(permuted(weight, 3), weight)


# --- RoPE


def rope_divisors(hf: Any) -> np.ndarray:
    """What the converter writes for Llama 3.1: plain frequencies over scaled ones."""
    config = hf.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    return (plain / hf.model.rotary_emb.inv_freq).numpy()


def test_the_divisors_are_llama3s_scaling(tmp_path):
    hf = hf_model("scaled")
    divisors = rope_divisors(hf)
    assert {1, 8} < set(divisors.round(4).tolist())
    model = load(written(tmp_path, "scaled", tensors={"rope_freqs.weight": divisors}))
    assert model.cfg.rope_divisors == tuple(divisors.tolist())
    assert model.cfg.rope_scaling is None
    assert distance(model, hf) <= TOLERANCE
    without = load(written(tmp_path, "scaled"))
    assert without.cfg.rope_divisors is None
    assert distance(without, hf) > 50 * TOLERANCE


def test_divisors_of_another_size(tmp_path):
    tensors = {"rope_freqs.weight": np.ones(5, np.float32)}
    refused(written(tmp_path, tensors=tensors), lp.ConfigError, "rope_divisors has 5", "is 4")


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "longrope"},
        {"factor": 4.0},  # llama.cpp takes it for linear
        {"scale_linear": 4.0},  # as old files call it
    ],
)
def test_rope_scaling_is_refused(scaling, tmp_path):
    prefixes = {"scale_linear": "llama.rope."}
    changes = {f"{prefixes.get(k, 'llama.rope.scaling.')}{k}": v for k, v in scaling.items()}
    refused(written(tmp_path, metadata=changes), lp.ConfigError, "RoPE scaling")


@pytest.mark.parametrize("scaling", [{"type": "none", "factor": 4.0}, {"factor": 1.0}])
def test_rope_scaling_that_scales_nothing(scaling, tmp_path):
    changes = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    model = load(written(tmp_path, metadata=changes))
    assert distance(model, hf_model("llama-gqa")) <= TOLERANCE


def test_rotating_part_of_a_head_is_refused(tmp_path):
    changes = {"llama.rope.dimension_count": 4}
    refused(written(tmp_path, metadata=changes), lp.ConfigError, "rotates part of each head")


# --- vocabulary


def test_without_a_vocabulary_there_are_tokens_only(tmp_path):
    model = load(written(tmp_path))
    assert model.tokenizer is None
    with pytest.raises(lp.InputError, match="tokenizer"):
        model("some text")


def test_with_a_vocabulary(tmp_path):
    model = load(written(tmp_path, metadata=VOCABULARY))
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == 199
    assert model.tokenizer.bos_token_id == 0


def test_a_vocabulary_that_is_damaged(tmp_path):
    changes = {**VOCABULARY, "tokenizer.ggml.token_type": [1]}
    refused(written(tmp_path, metadata=changes), lp.CheckpointError, "token_type")


# --- what is refused


@pytest.mark.parametrize("architecture", ["qwen2", "llama4", None])
def test_another_architecture(architecture, tmp_path):
    path = written(tmp_path, metadata={"general.architecture": architecture})
    refused(path, lp.ConfigError, str(path), repr(architecture), "'llama'")


NEEDED = [
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon", "expert_used_count"),
]


@pytest.mark.parametrize("value", [None, "four", True, [8, 8, 8], -1])
@pytest.mark.parametrize("key", NEEDED)
def test_metadata_that_is_missing_or_of_the_wrong_kind(key, value, tmp_path):
    path = written(tmp_path, "mixtral", {f"llama.{key}": value})
    refused(path, lp.CheckpointError, str(path), f"'llama.{key}'", f"has {value!r}")


@pytest.mark.parametrize("key", ["attention.head_count_kv", "expert_count"])
def test_optional_metadata_of_the_wrong_kind(key, tmp_path):
    path = written(tmp_path, "mixtral", {f"llama.{key}": -2})
    refused(path, lp.CheckpointError, f"'llama.{key}'", "has -2")


def test_a_fraction_for_a_count(tmp_path):
    path = written(tmp_path, metadata={"llama.block_count": 3.0})
    refused(path, lp.CheckpointError, "'llama.block_count'", "has 3.0")


@pytest.mark.parametrize("used", [0, 7])
def test_a_number_of_chosen_experts_that_cannot_be(used, tmp_path):
    path = written(tmp_path, "mixtral", {"llama.expert_used_count": used})
    refused(path, lp.ConfigError, f"top_k is {used}", "1 to 6 experts")


@pytest.mark.parametrize(
    ("key", "value", "error", "parts"),
    [
        ("attention.head_count", 0, lp.CheckpointError, ["0 attention heads"]),
        ("attention.head_count_kv", 3, lp.ConfigError, ["8 query heads", "3 key-value heads"]),
        ("attention.head_count_kv", 4, lp.CheckpointError, ["attn_k", "(16, 64)", "(32, 64)"]),
        ("block_count", 0, lp.ConfigError, ["n_layers is 0"]),
        ("block_count", 2, lp.CheckpointError, ["9 tensors", "'blk.2."]),
        ("block_count", 4, lp.CheckpointError, ["no tensor 'blk.3.attn_norm.weight'"]),
        ("block_count", 2**31 - 1, lp.CheckpointError, ["2147483647 layers"]),
        ("embedding_length", 32, lp.CheckpointError, ["token_embd", "(199, 64)", "(199, 32)"]),
        ("feed_forward_length", 95, lp.CheckpointError, ["ffn_gate", "(96, 64)", "(95, 64)"]),
    ],
)
def test_metadata_that_does_not_fit_the_tensors(key, value, error, parts, tmp_path):
    path = written(tmp_path, metadata={f"llama.{key}": value})
    refused(path, error, *parts)


FLOAT, INTEGER = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.int32)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"token_embd.weight": None}, ["no tensor 'token_embd.weight'"]),
        ({"output_norm.weight": None}, ["no tensor 'output_norm.weight'"]),
        (
            {"blk.1.attn_v.weight": None, "blk.1.attn_w.weight": FLOAT},
            ["no tensor 'blk.1.attn_v.weight'", "'blk.1.attn_w.weight'"],
        ),
        ({"blk.1.attn_q.weight": FLOAT[:40]}, ["'blk.1.attn_q.weight'", "(40, 64)", "(64, 64)"]),
        ({"blk.1.attn_q.weight": FLOAT[:63]}, ["'blk.1.attn_q.weight'", "(63, 64)", "(64, 64)"]),
        ({"blk.1.attn_q.weight": INTEGER}, ["'blk.1.attn_q.weight'", "I32"]),
        ({"blk.1.ffn_up.bias": FLOAT[0]}, ["1 tensors", "'blk.1.ffn_up.bias'"]),
    ],
)
def test_tensors_that_do_not_fit(tensors, parts, tmp_path):
    path = written(tmp_path, tensors=tensors)
    refused(path, lp.CheckpointError, str(path), *parts)


@pytest.mark.parametrize(
    ("stacked", "name", "shape", "parts"),
    [
        (True, "blk.2.ffn_up_exps.weight", (6, 95, 64), ["(6, 96, 64)"]),
        (True, "blk.2.ffn_gate_exps.weight", (5, 96, 64), ["(6, 96, 64)"]),
        (True, "blk.2.ffn_down_exps.weight", (6, 96, 64), ["(6, 64, 96)"]),
        (False, "blk.2.ffn_up.4.weight", (95, 64), ["(96, 64)"]),
        (False, "blk.2.ffn_down.5.weight", (96, 64), ["(64, 96)"]),
    ],
)
def test_experts_of_a_wrong_shape(stacked, name, shape, parts, tmp_path):
    tensors = {name: np.zeros(shape, np.float32)}
    path = written(tmp_path, "mixtral", tensors=tensors, stacked=stacked)
    refused(path, lp.CheckpointError, repr(name), f"shape {shape},", *parts)


@pytest.mark.parametrize(
    ("stacked", "name"), [(True, "blk.0.ffn_up_exps.weight"), (False, "blk.0.ffn_up.3.weight")]
)
def test_experts_that_are_missing(stacked, name, tmp_path):
    path = written(tmp_path, "mixtral", tensors={name: None}, stacked=stacked)
    refused(path, lp.CheckpointError, "no tensor 'blk.0.ffn_")


def test_a_file_that_is_cut_short(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    refused(path, lp.CheckpointError, str(path), "file ends at byte")
