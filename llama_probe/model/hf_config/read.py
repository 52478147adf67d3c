"""From Hugging Face's config.json to `LlamaConfig`.

1. A family, named by `model_type`, says which keys it understands and what their defaults are.
2. `from_hf` reads those keys. Any other key is an error unless it is known not to change the
   numbers: a silent default is how a RoPE scaling gets lost.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llama_probe.errors import ConfigError, near
from llama_probe.model.config import Llama3Scaling, LlamaConfig, Mask, MoeConfig, Temperature

# Keys that say how a model was made, is trained, sampled from or stored, not what it computes.
_HARMLESS = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures "
    "attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens "
    "boi_token_index bos_token_id chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping eoi_token_index "
    "eos_token_id experts_implementation finetuning_task forced_bos_token_id forced_eos_token_id "
    "for_llm_compressor id2label image_token_index initializer_range is_decoder "
    "is_encoder_decoder is_llama_config label2id length_penalty max_length min_length model_type "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp "
    "problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate "
    "router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers.js_config transformers_version typical_p unsloth_fixed use_bfloat16 "
    "use_cache pruned_heads tie_encoder_decoder add_cross_attention encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty".split()
)
# Read for every family.
_COMMON = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters rope_interleaved "
    "attention_bias quantization_config".split()
)
# What `rope_parameters` and `rope_scaling` may hold.
_ROPE = frozenset(
    "rope_theta rope_type type factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings short_factor long_factor attention_factor".split()
)
# Families whose RoPE base is not 10,000 where their config.json leaves it out.
_DEFAULT_THETA = {"mixtral": 1e6, "llama4_text": 5e5}
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_SPARSE = (
    "decoder_sparse_step moe_intermediate_size num_experts_per_tok num_experts num_local_experts "
    "norm_topk_prob mlp_only_layers"
).split()


class _Keys:
    """A config.json: `keys(name)` must be there, `keys(name, default)` may be absent or null."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __call__(self, name: str, *default: Any) -> Any:
        value = self.config.get(name)
        if value is not None:
            return value
        if not default:
            raise ConfigError(f"config.json has no {name!r}, which this model needs")
        return default[0]

    def count(self, name: str, *default: int) -> int:
        """A whole number from 0 up."""
        value = self(name, *default)
        if type(value) is not int or value < 0:
            raise ConfigError(f"config.json has {value!r} for {name!r}, which should be a number")
        return value


def from_hf(config: Mapping[str, Any], model_name: str = "") -> LlamaConfig:
    """See `LlamaConfig.from_hf`."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"a configuration is a JSON object, but this is {type(config).__name__}")
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, Mapping) and quantization.get("quant_method")
        raise ConfigError(
            "config.json has a quantization_config: the weights are quantised by "
            f"{named or 'an unnamed method'}, which is not implemented; "
            "load the unquantised model, or a GGUF file"
        )
    model_type = config.get("model_type")
    if model_type == "llama4" and isinstance(config.get("text_config"), Mapping):
        return from_hf(config["text_config"], model_name)
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(
            f"config.json has model_type {model_type!r}{near(str(model_type), _FAMILIES)}; "
            f"implemented are {', '.join(sorted(_FAMILIES))}"
        )
    family, own_keys = _FAMILIES[model_type]
    for name in config:
        if name not in _HARMLESS and name not in _COMMON and name not in own_keys:
            raise ConfigError(
                f"config.json has the key {name!r}, which {model_type} models do not have and "
                f"which may change the numbers{near(name, {*_COMMON, *own_keys})}"
            )
    try:
        return LlamaConfig(
            model_type=model_type,
            model_name=model_name or model_type,
            **{**_common(_Keys(config)), **family(_Keys(config))},
        )
    except ConfigError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config.json has a value of the wrong kind: {error}") from error


def _common(keys: _Keys) -> dict[str, Any]:
    return {
        "n_layers": keys.count("num_hidden_layers"),
        "d_model": keys.count("hidden_size"),
        "n_heads": keys.count("num_attention_heads"),
        "n_key_value_heads": keys.count("num_key_value_heads", 0),
        "d_head": keys.count("head_dim", 0),
        "d_mlp": keys.count("intermediate_size"),
        "d_vocab": keys.count("vocab_size"),
        "n_ctx": keys.count("max_position_embeddings", 2048),
        "eps": keys("rms_norm_eps", 1e-6),
        "act_fn": keys("hidden_act", "silu"),
        "tied": keys("tie_word_embeddings", False),
        **_rope(keys),
    }


def _rope(keys: _Keys) -> dict[str, Any]:
    if keys("rope_interleaved", False):
        raise ConfigError("rope_interleaved is not implemented for this family")
    rope = {**keys("rope_scaling", {}), **keys("rope_parameters", {})}
    theta = rope.get("rope_theta", keys("rope_theta", _DEFAULT_THETA.get(keys("model_type"), 1e4)))
    theta = float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(set(rope) - _ROPE)
    if unknown and kind in ("default", "llama3", "longrope"):
        raise ConfigError(
            f"config.json has {unknown[0]!r} in its RoPE parameters, which may change the numbers"
            f"{near(unknown[0], _ROPE)}"
        )
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "llama3":
        inner = _Keys(rope)
        scaling = Llama3Scaling(
            factor=inner("factor"),
            low_freq_factor=inner("low_freq_factor"),
            high_freq_factor=inner("high_freq_factor"),
            original_context=inner("original_max_position_embeddings"),
        )
        return {"rope_theta": theta, "rope_scaling": scaling}
    if (
        kind == "longrope"
        and rope.get("short_factor") == rope.get("long_factor")
        and rope.get("attention_factor") == 1.0
    ):
        return {"rope_theta": theta, "rope_divisors": tuple(rope["long_factor"])}
    raise ConfigError(
        f"the RoPE scaling {kind!r} is not implemented; implemented are 'default', 'llama3', and "
        "'longrope' with one set of factors and attention_factor 1"
    )


def _llama(keys: _Keys) -> dict[str, Any]:
    bias = keys("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": keys("mlp_bias", False)}


def _mistral(keys: _Keys) -> dict[str, Any]:
    # A `null` means no window, while an absent key means the class's default of 4096.
    width = keys.config.get("sliding_window", 4096)
    return _masks(keys, "sliding" if width else "full", width)


def _mixtral(keys: _Keys) -> dict[str, Any]:
    width = keys("sliding_window", None)
    moe = MoeConfig(
        n_experts=keys("num_local_experts", 8),
        top_k=keys("num_experts_per_tok", 2),
        d_expert=keys("intermediate_size"),
        rule="softmax",
        renormalise=True,
    )
    eps = keys("rms_norm_eps", 1e-5)
    return {**_masks(keys, "sliding" if width else "full", width), "moe": moe, "eps": eps}


def _qwen2(keys: _Keys) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_masks(keys)}


def _qwen3(keys: _Keys) -> dict[str, Any]:
    bias = keys("attention_bias", False)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": "learned",
        "d_head": keys("head_dim", 128),
        **_qwen_masks(keys),
    }


def _qwen2_moe(keys: _Keys) -> dict[str, Any]:
    if keys("use_sliding_window", False):
        raise ConfigError("qwen2_moe with use_sliding_window is not implemented")
    shared = keys("shared_expert_intermediate_size", 5632)
    sparse = _sparse(keys, d_shared=shared, shared_gate=True)
    return {"qkv_bias": keys("qkv_bias", True), **sparse}


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    width = keys("sliding_window", 4096) if keys("use_sliding_window", False) else None
    dense = {**_qwen3(_Keys({**keys.config, "use_sliding_window": False}))}
    # Unlike Qwen3Config, Qwen3MoeConfig has no head_dim of its own.
    dense["d_head"] = keys("head_dim", 0)
    return {**dense, **_masks(keys, "sliding" if width else "full", width), **_sparse(keys)}


def _llama4(keys: _Keys) -> dict[str, Any]:
    n_layers = keys("num_hidden_layers")
    bias = keys("attention_bias", False)
    period = keys("no_rope_layer_interval", 4)
    rope = keys("no_rope_layers", []) or [(i + 1) % period != 0 for i in range(n_layers)]
    step = keys("interleave_moe_layer_step", 1)
    moe_layers = keys("moe_layers", range(step - 1, n_layers, step))
    temperature = Temperature(scale=keys("attn_scale", 0.1), floor=keys("floor_scale", 8192))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "d_head": keys("head_dim", 128),
        "d_mlp": keys("intermediate_size_mlp", 16384),
        "eps": keys("rms_norm_eps", 1e-5),
        "qk_norm": "weightless" if keys("use_qk_norm", True) else "none",
        "rope_layout": "interleaved",
        "rope_layers": tuple(bool(r) for r in rope[:n_layers]),
        "temperature": temperature if keys("attn_temperature_tuning", True) else None,
        "moe": MoeConfig(
            n_experts=keys("num_local_experts", 16),
            top_k=keys("num_experts_per_tok", 1),
            d_expert=keys("intermediate_size"),
            rule="sigmoid_input",
            d_shared=keys("intermediate_size"),
        ),
        "moe_layers": tuple(i in moe_layers for i in range(n_layers)),
        **_llama4_masks(keys, rope),
    }


def _llama4_masks(keys: _Keys, rope: list[Any]) -> dict[str, Any]:
    chunk = keys.config.get("attention_chunk_size", 8192)
    kinds = keys("layer_types", ["chunked_attention" if r else "full_attention" for r in rope])
    if chunk is None:
        return {}
    return _layer_types(kinds[: keys("num_hidden_layers")], chunk)


def _masks(keys: _Keys, mask: Mask, window: int | None) -> dict[str, Any]:
    """The same mask on every layer."""
    return {"masks": (mask,) * keys("num_hidden_layers"), "window": window}


def _qwen_masks(keys: _Keys) -> dict[str, Any]:
    """Layers from `max_window_layers` on have the window, if it is in use at all."""
    if not keys("use_sliding_window", False):
        return {}
    first = keys("max_window_layers", 28)
    kinds = [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(keys("num_hidden_layers"))
    ]
    return _layer_types(keys("layer_types", kinds), keys("sliding_window", 4096))


def _layer_types(kinds: list[str], window: int) -> dict[str, Any]:
    masks = tuple(kind.removesuffix("_attention") for kind in kinds)
    if unknown := set(masks) - {"full", "sliding", "chunked"}:
        raise ConfigError(f"layer_types has {sorted(unknown)}, which are not implemented")
    return {"masks": masks, "window": window if set(masks) != {"full"} else None}


def _sparse(keys: _Keys, d_shared: int = 0, shared_gate: bool = False) -> dict[str, Any]:
    """Qwen's mixture of experts."""
    n_layers, step = keys("num_hidden_layers"), keys("decoder_sparse_step", 1)
    dense = keys("mlp_only_layers", [])
    return {
        "moe": MoeConfig(
            n_experts=keys("num_experts", 0) or keys("num_local_experts"),
            top_k=keys("num_experts_per_tok"),
            d_expert=keys("moe_intermediate_size"),
            rule="softmax",
            renormalise=keys("norm_topk_prob", False),
            d_shared=d_shared,
            shared_gate=shared_gate,
        ),
        "moe_layers": tuple((i + 1) % step == 0 and i not in dense for i in range(n_layers)),
    }


_LLAMA4_KEYS = (
    "num_experts_per_tok num_local_experts moe_layers interleave_moe_layer_step use_qk_norm "
    "no_rope_layers no_rope_layer_interval attention_chunk_size layer_types "
    "attn_temperature_tuning floor_scale attn_scale intermediate_size_mlp"
).split()

# model_type -> what reads its own switches, and the keys that they stand in.
_FAMILIES: dict[str, tuple[Callable[[_Keys], dict[str, Any]], frozenset[str]]] = {
    "llama": (_llama, frozenset(["mlp_bias"])),
    "mistral": (_mistral, frozenset(["sliding_window"])),
    "mixtral": (
        _mixtral,
        frozenset(["sliding_window", "num_local_experts", "num_experts_per_tok"]),
    ),
    "qwen2": (_qwen2, frozenset(_WINDOW)),
    "qwen3": (_qwen3, frozenset(_WINDOW)),
    "qwen2_moe": (
        _qwen2_moe,
        frozenset([*_WINDOW, *_SPARSE, "shared_expert_intermediate_size", "qkv_bias"]),
    ),
    "qwen3_moe": (_qwen3_moe, frozenset([*_WINDOW, *_SPARSE])),
    "llama4_text": (_llama4, frozenset(_LLAMA4_KEYS)),
}
