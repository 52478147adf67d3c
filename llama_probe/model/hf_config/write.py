"""From `LlamaConfig` to a config.json in the new style (`rope_parameters`).

What is written is read back at once: a configuration that no family of transformers can express is
an error, never a file that means something else.
"""

from typing import Any

from llama_probe.errors import ConfigError
from llama_probe.model.config import LlamaConfig, MoeConfig
from llama_probe.model.hf_config.read import from_hf


def to_hf(cfg: LlamaConfig) -> dict[str, Any]:
    """See `LlamaConfig.to_hf`."""
    written = {
        "model_type": cfg.model_type,
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "head_dim": cfg.d_head,
        "intermediate_size": cfg.d_mlp,
        "vocab_size": cfg.d_vocab,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.eps,
        "hidden_act": cfg.act_fn,
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": _rope_parameters(cfg),
        **_own_keys(cfg),
    }
    if from_hf(written).but(model_name=cfg.model_name) != cfg:
        raise ConfigError(
            f"no model of type {cfg.model_type!r} has this combination of switches, "
            "so it cannot be written as a config.json"
        )
    return written


def _rope_parameters(cfg: LlamaConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": cfg.rope_theta, "rope_type": "default"}
    if (scaling := cfg.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if cfg.rope_divisors is not None:
        divisors = list(cfg.rope_divisors)
        rope |= {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": cfg.n_ctx,
        }
    return rope


def _own_keys(cfg: LlamaConfig) -> dict[str, Any]:
    types = [f"{mask}_attention" for mask in cfg.masks]
    sliding = "sliding" in cfg.masks
    moe = cfg.moe
    match cfg.model_type:
        case "llama":
            return {"attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias}
        case "mistral":
            return {"sliding_window": cfg.window}
        case "mixtral" if moe:
            return {
                "sliding_window": cfg.window,
                "num_local_experts": moe.n_experts,
                "num_experts_per_tok": moe.top_k,
            }
        case "qwen2":
            return _window_keys(cfg, sliding, types)
        case "qwen3":
            return {"attention_bias": cfg.o_bias, **_window_keys(cfg, sliding, types)}
        case "qwen2_moe" if moe:
            return {
                "qkv_bias": cfg.qkv_bias,
                "shared_expert_intermediate_size": moe.d_shared,
                **_sparse_keys(cfg, moe),
            }
        case "qwen3_moe" if moe:
            window = {"use_sliding_window": sliding, "sliding_window": cfg.window}
            return {"attention_bias": cfg.o_bias, **window, **_sparse_keys(cfg, moe)}
        case "llama4_text" if moe:
            return {
                "attention_bias": cfg.o_bias,
                "intermediate_size": moe.d_expert,
                "intermediate_size_mlp": cfg.d_mlp,
                "num_local_experts": moe.n_experts,
                "num_experts_per_tok": moe.top_k,
                "moe_layers": [i for i, is_moe in enumerate(cfg.moe_layers) if is_moe],
                "no_rope_layers": [int(rope) for rope in cfg.rope_layers],
                "use_qk_norm": cfg.qk_norm == "weightless",
                "attention_chunk_size": cfg.window,
                "layer_types": types,
                "attn_temperature_tuning": cfg.temperature is not None,
                "attn_scale": cfg.temperature.scale if cfg.temperature else 0.1,
                "floor_scale": cfg.temperature.floor if cfg.temperature else 8192,
            }
        case _:
            return {}


def _window_keys(cfg: LlamaConfig, sliding: bool, types: list[str]) -> dict[str, Any]:
    if not sliding:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": cfg.window, "layer_types": types}


def _sparse_keys(cfg: LlamaConfig, moe: MoeConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.renormalise,
        "mlp_only_layers": [i for i, is_moe in enumerate(cfg.moe_layers) if not is_moe],
    }
