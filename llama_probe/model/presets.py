"""The configurations of the released models, by name.

Base and fine-tuned releases share their shapes; where context or eps differ, the numbers are the
base model's, unless the section says otherwise. Each section names its family's traits and sources:

- card: the authors' model card, or Meta's model list where the two agree
- paper: where the model is described (arXiv number); the numbers are from the next source named
- litgpt: `litgpt/config.py`; TL: TransformerLens' `loading_from_pretrained.py`
- class: the defaults of the family's configuration class in transformers
- recalled: the published config.json as generally known, not compared with the file
"""

from functools import partial
from typing import Any

from llama_probe.errors import UnknownNameError, near
from llama_probe.model.config import Llama3Scaling, LlamaConfig, MoeConfig, Temperature


def _model(
    n_layers: int, d_model: int, n_heads: int, n_kv: int, d_mlp: int, **traits: Any
) -> LlamaConfig:
    """The five numbers of a row, then whatever else is not the default."""
    return LlamaConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_key_value_heads=n_kv,
        d_mlp=d_mlp,
        **traits,
    )


def _scaled(factor: float, high_freq_factor: float = 4.0) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=high_freq_factor,
        original_context=8192,
    )


def _softmax(n_experts: int, top_k: int, d_expert: int, **more: Any) -> MoeConfig:
    return MoeConfig(n_experts=n_experts, top_k=top_k, d_expert=d_expert, rule="softmax", **more)


# The rows read: layers, d_model, query heads, key-value heads, d_mlp.

# Llama 1 (paper 2302.13971; TL): every head has its own keys and values, eps 1e-6.
_llama1 = partial(_model, d_vocab=32000, n_ctx=2048, eps=1e-6)
_LLAMA_1 = {
    "llama-1-7b": _llama1(32, 4096, 32, 32, 11008),
    "llama-1-13b": _llama1(40, 5120, 40, 40, 13824),
    "llama-1-33b": _llama1(60, 6656, 52, 52, 17920),  # Hugging Face calls it 30b
    "llama-1-65b": _llama1(80, 8192, 64, 64, 22016),
}

# Llama 2 (card; litgpt; TL): eps 1e-5, shared keys and values in 70B only. Meta's llama-stack model
# list has 8 key-value heads and theta 5e5 for 7B and 13B, which contradicts all three.
_llama2 = partial(_model, d_vocab=32000, n_ctx=4096, eps=1e-5)
_LLAMA_2 = {
    "llama-2-7b": _llama2(32, 4096, 32, 32, 11008),
    "llama-2-13b": _llama2(40, 5120, 40, 40, 13824),
    "llama-2-70b": _llama2(80, 8192, 64, 8, 28672),
}

# Code Llama (card; litgpt; TL): Llama 2 with theta 1e6, 16,384 tokens and, in the models that can
# infill, 16 tokens more. Python-70B and Instruct-70B were not tuned at 16,384 tokens.
_code = partial(_llama2, n_ctx=16384, rope_theta=1e6)
_CODE_LLAMA = {
    "code-llama-7b": _code(32, 4096, 32, 32, 11008, d_vocab=32016),
    "code-llama-7b-python": _code(32, 4096, 32, 32, 11008),
    "code-llama-13b": _code(40, 5120, 40, 40, 13824, d_vocab=32016),
    "code-llama-13b-python": _code(40, 5120, 40, 40, 13824),
    "code-llama-34b": _code(48, 8192, 64, 8, 22016),
    "code-llama-70b": _code(80, 8192, 64, 8, 28672, d_vocab=32016),
}

# Llama 3 (card; litgpt): 8 key-value heads everywhere, theta 5e5. From 3.1 on scaled RoPE; 3.2 is
# stretched by 32 (llama-models issues 166 and 241; Meta's own code has 8) and tied.
_llama3 = partial(_model, d_vocab=128256, n_ctx=8192, eps=1e-5, rope_theta=5e5)
_llama31 = partial(_llama3, n_ctx=131072, rope_scaling=_scaled(8.0))
_llama32 = partial(_llama31, rope_scaling=_scaled(32.0), tied=True)
_LLAMA_3 = {
    "llama-3-8b": _llama3(32, 4096, 32, 8, 14336),
    "llama-3-70b": _llama3(80, 8192, 64, 8, 28672),
    "llama-3.1-8b": _llama31(32, 4096, 32, 8, 14336),
    "llama-3.1-70b": _llama31(80, 8192, 64, 8, 28672),
    "llama-3.1-405b": _llama31(126, 16384, 128, 8, 53248),
    "llama-3.2-1b": _llama32(16, 2048, 32, 8, 8192),
    "llama-3.2-3b": _llama32(28, 3072, 24, 8, 8192),
    "llama-3.3-70b": _llama31(80, 8192, 64, 8, 28672),
}


# Llama 4, the text part (card; class; llama-models issue 322; TensorRT-LLM's copy of Maverick's
# configuration). Three layers with RoPE and chunked attention, then one with neither but with
# attention temperature. Only Scout has QK norm and scaled RoPE; it is sparse in every layer,
# Maverick in every second. The contexts are the instruct models' (bases: 262,144).
def _llama4(n_experts: int, **traits: Any) -> LlamaConfig:
    return _model(
        *(48, 5120, 40, 8, 16384),
        d_vocab=202048,
        eps=1e-5,
        rope_theta=5e5,
        rope_layout="interleaved",
        rope_layers=(True, True, True, False) * 12,
        masks=("chunked", "chunked", "chunked", "full") * 12,
        window=8192,
        temperature=Temperature(scale=0.1, floor=8192),
        moe=MoeConfig(
            n_experts=n_experts, top_k=1, d_expert=8192, rule="sigmoid_input", d_shared=8192
        ),
        model_type="llama4_text",
        **traits,
    )


_LLAMA_4 = {
    "llama-4-scout": _llama4(
        16, n_ctx=10_485_760, qk_norm="weightless", rope_scaling=_scaled(16.0, 1.0)
    ),
    "llama-4-maverick": _llama4(128, n_ctx=1_048_576, moe_layers=(False, True) * 24),
}

# Llama Guard (card): each is a Llama fine-tuned to answer "safe" or "unsafe". Meta's model list has
# 32,000 tokens for Guard 2, which is wrong, and no scaled RoPE for Guard 3 8B, where these numbers
# follow the base model (recalled).
# Left out: Guard 3 1B INT4 (12 layers, d_mlp 6400; pruned and released quantised only), Guard 4 12B
# (a dense, pruned Scout, sizes not known here), and what is not this architecture: Guard 3 11B
# Vision, Prompt Guard.
_LLAMA_GUARD = {
    "llama-guard-1-7b": _LLAMA_2["llama-2-7b"],
    "llama-guard-2-8b": _LLAMA_3["llama-3-8b"],
    "llama-guard-3-8b": _LLAMA_3["llama-3.1-8b"],
    "llama-guard-3-1b": _LLAMA_3["llama-3.2-1b"],
}

# Mistral (paper 2310.06825; litgpt; TL): v0.1 has a sliding window, the later ones have theta 1e6.
_mistral = partial(
    _model, 32, 4096, 32, 8, 14336, d_vocab=32000, n_ctx=32768, eps=1e-5, model_type="mistral"
)
_MISTRAL = {
    "mistral-7b-v0.1": _mistral(masks=("sliding",) * 32, window=4096),
    "mistral-7b-v0.2": _mistral(rope_theta=1e6),
    "mistral-7b-v0.3": _mistral(rope_theta=1e6, d_vocab=32768),
}


# Mixtral (paper 2401.04088; litgpt; class): every layer sparse, 2 of 8 experts, no window.
def _mixtral(*sizes: int, d_vocab: int, n_ctx: int) -> LlamaConfig:
    moe = _softmax(8, 2, sizes[-1], renormalise=True)
    rest = {"eps": 1e-5, "rope_theta": 1e6, "model_type": "mixtral"}
    return _model(*sizes, d_vocab=d_vocab, n_ctx=n_ctx, moe=moe, **rest)


_MIXTRAL = {
    "mixtral-8x7b": _mixtral(32, 4096, 32, 8, 14336, d_vocab=32000, n_ctx=32768),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 8, 16384, d_vocab=32768, n_ctx=65536),
}

# Qwen2 (TL; class) and Qwen2.5 (litgpt): biases on queries, keys and values. From 7B on the rows of
# the embedding are padded to 152,064. Tied up to 3B, and Qwen2's contexts (both recalled).
_qwen2 = partial(
    _model,
    d_vocab=152064,
    n_ctx=131072,
    eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    model_type="qwen2",
)
_small2 = partial(_qwen2, d_vocab=151936, tied=True)
_QWEN_2 = {
    "qwen2-0.5b": _small2(24, 896, 14, 2, 4864),
    "qwen2-1.5b": _small2(28, 1536, 12, 2, 8960),
    "qwen2-7b": _qwen2(28, 3584, 28, 4, 18944),
    "qwen2.5-0.5b": _small2(24, 896, 14, 2, 4864, n_ctx=32768),
    "qwen2.5-1.5b": _small2(28, 1536, 12, 2, 8960),
    "qwen2.5-3b": _small2(36, 2048, 16, 2, 11008, n_ctx=32768),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13824, eps=1e-5),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648, eps=1e-5),
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29568, eps=1e-5),
}

# Qwen2-MoE (class): probabilities as they are, and a gated expert that sees every token. It was
# released as Qwen1.5-MoE. Theta and context are recalled (the chat model's context: 32,768).
_QWEN_2_MOE = {
    name: _model(
        *(24, 2048, 16, 16, 5632),
        d_vocab=151936,
        n_ctx=8192,
        eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
        moe=_softmax(60, 4, 1408, d_shared=5632, shared_gate=True),
        model_type="qwen2_moe",
    )
    for name in ("qwen1.5-moe-a2.7b", "qwen2-moe-a2.7b")
}

# Qwen3 (paper 2505.09388; litgpt; class): heads of 128 always, learned QK norm, no biases.
# Tied up to 4B (recalled). The sparse models use 8 of 128 experts, renormalised as their files say
# (the class does not), and no layer has their d_mlp.
_qwen3 = partial(
    _model, d_vocab=151936, n_ctx=40960, eps=1e-6, rope_theta=1e6, d_head=128, qk_norm="learned"
)
_dense3 = partial(_qwen3, model_type="qwen3")
_sparse3 = partial(_qwen3, model_type="qwen3_moe")
_QWEN_3 = {
    "qwen3-0.6b": _dense3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _dense3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3-4b": _dense3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3-8b": _dense3(36, 4096, 32, 8, 12288),
    "qwen3-14b": _dense3(40, 5120, 40, 8, 17408),
    "qwen3-32b": _dense3(64, 5120, 64, 8, 25600),
    "qwen3-30b-a3b": _sparse3(48, 2048, 32, 4, 6144, moe=_softmax(128, 8, 768, renormalise=True)),
    "qwen3-235b-a22b": _sparse3(
        94, 4096, 64, 4, 12288, moe=_softmax(128, 8, 1536, renormalise=True)
    ),
}

# SmolLM2 (paper 2502.02737; litgpt; 135M's GGUF header): heads of 64. That 360M and 1.7B are tied
# is recalled.
_smol = partial(_model, d_vocab=49152, n_ctx=8192, eps=1e-5, tied=True)
_SMOLLM_2 = {
    "smollm2-135m": _smol(30, 576, 9, 3, 1536, rope_theta=1e5),
    "smollm2-360m": _smol(32, 960, 15, 5, 2560, rope_theta=1e5),
    "smollm2-1.7b": _smol(24, 2048, 32, 32, 8192, rope_theta=1.3e5),
}

# Falcon 3 (litgpt): the Llama block, unlike Falcon 1, with heads of 256. Not tied (recalled).
_falcon = partial(_model, d_vocab=131072, n_ctx=32768, eps=1e-6, rope_theta=1000042.0)
_FALCON_3 = {
    "falcon3-1b": _falcon(18, 2048, 8, 4, 8192, n_ctx=4096),
    "falcon3-3b": _falcon(22, 3072, 12, 4, 9216),
    "falcon3-7b": _falcon(28, 3072, 12, 4, 23040),
    "falcon3-10b": _falcon(40, 3072, 12, 4, 23040),
}

_TABLES = [
    _LLAMA_1,
    _LLAMA_2,
    _CODE_LLAMA,
    _LLAMA_3,
    _LLAMA_4,
    _LLAMA_GUARD,
    _MISTRAL,
    _MIXTRAL,
    _QWEN_2,
    _QWEN_2_MOE,
    _QWEN_3,
    _SMOLLM_2,
    _FALCON_3,
]
PRESETS: dict[str, LlamaConfig] = {
    name: cfg.but(model_name=name) for table in _TABLES for name, cfg in table.items()
}


def preset(name: str) -> LlamaConfig:
    """The configuration of a released model, without its weights.

    Raises:
        UnknownNameError: There is no such preset; the message gives the near names.

    >>> preset("mixtral-8x7b").moe.n_experts
    8
    """
    if name not in PRESETS:
        raise UnknownNameError(
            f"there is no preset {name!r}{near(name.lower(), PRESETS)}; "
            f"preset_names() lists all {len(PRESETS)}"
        )
    return PRESETS[name]


def preset_names() -> list[str]:
    """The names that `preset` knows, family by family.

    >>> preset_names()[:2]
    ['llama-1-7b', 'llama-1-13b']
    """
    return list(PRESETS)
