"""Tiny random models of every family: transformers' own, and ours on the same weights."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llama_probe import LlamaConfig
from llama_probe.checkpoints.load import from_transformers, load
from llama_probe.model.llama import Llama

_BASE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "attn_implementation": "sdpa",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "intermediate_size_mlp": 80,
    "attention_chunk_size": 16,
    "floor_scale": 8,
}
_QWEN_MOE = {"num_experts": 8, "moe_intermediate_size": 48}

# name -> (transformers' class, what its configuration has besides _BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("Llama", {}),
    "llama-scaled": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_QWEN_MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": ("Qwen3Moe", {**_QWEN_MOE, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "llama4-scout": (
        "Llama4Text",
        {**_LLAMA4, "rope_parameters": {**_LLAMA3, "high_freq_factor": 1.0, "factor": 16.0}},
    ),
    "llama4-maverick": (
        "Llama4Text",
        {**_LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    ),
    "llama4-top2": ("Llama4Text", {**_LLAMA4, "num_experts_per_tok": 2}),
}


def make_hf(family: str, seed: int = 0, **changes: Any) -> Any:
    """Transformers' model with weights N(0, 0.15), and norms and biases off their defaults."""
    import transformers

    kind, own = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**_BASE, **own, **changes})
    classes = {"Llama4Text": "Llama4ForCausalLM"}
    model = getattr(transformers, classes.get(kind, f"{kind}ForCausalLM"))(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(family: str, seed: int = 0, **changes: Any) -> Llama:
    """Our model, on the weights of `make_hf`."""
    return from_transformers(make_hf(family, seed, **changes))


@cache
def model_of(family: str) -> Llama:
    """The same model each time, not to be changed: tiny-moe, or one on the weights of `make_hf`."""
    if family == "tiny-moe":
        return load("tiny-moe", device="cpu", progress=False)
    return make(family)


def tokens(batch: int = 2, length: int = 48, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 199, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Weights N(0, std) and norms off 1, for models of ours that are built from a configuration."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "ln" in name or "norm" in name
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1 + 0.2 * noise) if norm else std * noise)


def tiny_config(**changes: Any) -> LlamaConfig:
    """The smallest configuration with grouped queries."""
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_key_value_heads": 2, "d_mlp": 24}
    return LlamaConfig(**{**sizes, "d_vocab": 50, "n_ctx": 64, **changes})
