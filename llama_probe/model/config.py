"""What a Llama-family network looks like: one block with switches.

`LlamaConfig` holds every number and switch that the forward pass depends on, under the names that
TransformerLens uses. `LlamaConfig.from_hf` reads a Hugging Face config.json (`hf_config/`);
`LlamaConfig.preset` knows the released models (`presets.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from llama_probe.errors import ConfigError

Mask = Literal["full", "sliding", "chunked"]
QKNorm = Literal["none", "weightless", "learned"]
RopeLayout = Literal["half", "interleaved"]
RouterRule = Literal["softmax", "sigmoid_input"]


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's static RoPE scaling: long wavelengths are stretched, short ones kept.

    Attributes:
        factor: What the frequencies of long wavelengths are divided by.
        low_freq_factor: Wavelengths above `original_context / low_freq_factor` are stretched.
        high_freq_factor: Wavelengths below `original_context / high_freq_factor` are kept.
        original_context: Tokens of context before the scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Llama 4's attention temperature, on layers without RoPE.

    Queries at position p are multiplied by `scale * log(floor((p + 1) / floor) + 1) + 1`.
    """

    scale: float
    floor: int


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The mixture of experts of those layers that have one.

    Attributes:
        n_experts: Routed experts in a layer.
        top_k: Experts chosen for each token.
        d_expert: Width of a routed expert.
        rule: "softmax": probabilities over all experts weight the chosen experts' output (Mixtral,
            Qwen). "sigmoid_input": the sigmoid of its logit weights a chosen expert's input
            (Llama 4).
        renormalise: Divide the chosen probabilities by their sum ("softmax" only).
        d_shared: Width of the expert that sees every token; 0 for none.
        shared_gate: Multiply the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
    """

    n_experts: int
    top_k: int
    d_expert: int
    rule: RouterRule
    renormalise: bool = False
    d_shared: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise ConfigError(f"top_k is {self.top_k}, but should be 1 to {self.n_experts} experts")
        if self.renormalise and self.rule != "softmax":
            raise ConfigError("only a softmax router has weights to renormalise")
        if self.shared_gate and not self.d_shared:
            raise ConfigError("shared_gate is set, but there is no shared expert (d_shared is 0)")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Every number and switch that the forward pass depends on.

    Attributes:
        n_layers: Blocks.
        d_model: Width of the residual stream.
        n_heads: Query heads.
        n_key_value_heads: Key and value heads; each serves `n_heads / n_key_value_heads` queries.
        d_head: Width of a head; free of `d_model / n_heads`.
        d_mlp: Width of the feed-forward of dense layers.
        d_vocab: Tokens of the vocabulary.
        n_ctx: Longest context, in tokens.
        eps: Added to the mean square in every RMS norm.
        act_fn: Activation of the gate; "silu" is the only one of this family.
        tied: The unembedding is the embedding.
        qkv_bias: Biases on the query, key and value projections.
        o_bias: Bias on the attention's output projection.
        mlp_bias: Biases in the dense feed-forward.
        qk_norm: RMS norm of each query and key head: "weightless" after RoPE and on RoPE layers
            only (Llama 4), "learned" before RoPE (Qwen 3), or "none".
        rope_theta: Base of the RoPE frequencies.
        rope_layout: Which coordinates turn together: (i, i + d_head / 2) for "half" (Hugging
            Face's Llama), (2i, 2i + 1) for "interleaved" (Meta's checkpoints, Llama 4).
        rope_scaling: Llama 3.1's scaling, or None.
        rope_divisors: d_head / 2 numbers that divide the frequencies (GGUF's `rope_freqs`), or
            None. Excludes `rope_scaling`.
        rope_layers: For each layer, whether it has RoPE.
        masks: For each layer, what a query sees: all that came before it ("full"), the last
            `window` tokens ("sliding"), or its own block of `window` tokens ("chunked").
        window: Tokens of the sliding window or of a chunk.
        temperature: Attention temperature on layers without RoPE, or None.
        moe: The mixture of experts, or None.
        moe_layers: For each layer, whether its feed-forward is the mixture of experts.
        model_type: Hugging Face's name of the family, which `save` writes.
        model_name: What the model is called in reports and records.
        device: Where the weights are; the model keeps it up to date.
        dtype: What the weights are; the model keeps it up to date.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    n_key_value_heads: int = 0  # 0: as many as n_heads
    d_head: int = 0  # 0: d_model / n_heads
    n_ctx: int = 2048
    eps: float = 1e-5
    act_fn: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    rope_theta: float = 10000.0
    rope_layout: RopeLayout = "half"
    rope_scaling: Llama3Scaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    rope_layers: tuple[bool, ...] = ()  # (): every layer
    masks: tuple[Mask, ...] = ()  # (): every layer "full"
    window: int | None = None
    temperature: Temperature | None = None
    moe: MoeConfig | None = None
    moe_layers: tuple[bool, ...] = ()  # (): every layer where there is a `moe`, else none
    model_type: str = "llama"
    model_name: str = "llama"
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    # What TransformerLens' analyses ask of a configuration. Its three `use_…` switches turn hooks
    # on that are always there in this package (computed when something listens).
    normalization_type = "RMS"
    positional_embedding_type = "rotary"
    gated_mlp = True
    final_rms = True
    attn_only = False
    parallel_attn_mlp = False
    use_attn_result = True
    use_split_qkv_input = True
    use_hook_mlp_in = True
    use_attn_in = False

    def __post_init__(self) -> None:
        def default(name: str, value: object) -> None:
            if not getattr(self, name):
                object.__setattr__(self, name, value)

        for name in ("n_layers", "d_model", "n_heads", "d_mlp", "d_vocab", "n_ctx"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but should be at least 1")
        for name in ("rope_layers", "masks", "moe_layers", "rope_divisors"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        default("n_key_value_heads", self.n_heads)
        default("d_head", self.d_model // self.n_heads)
        default("rope_layers", (True,) * self.n_layers)
        default("masks", ("full",) * self.n_layers)
        default("moe_layers", (self.moe is not None,) * self.n_layers)
        self._check()

    def _check(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ConfigError(
                f"{self.n_heads} query heads cannot share {self.n_key_value_heads} key-value heads "
                "evenly"
            )
        if self.d_head < 2 or self.d_head % 2:
            raise ConfigError(f"d_head is {self.d_head}, but RoPE turns pairs: it should be even")
        if self.act_fn != "silu":
            raise ConfigError(f"act_fn is {self.act_fn!r}, but only 'silu' is implemented")
        for name in ("rope_layers", "masks", "moe_layers"):
            if (n := len(getattr(self, name))) != self.n_layers:
                raise ConfigError(f"{name} has {n} entries for {self.n_layers} layers")
        if set(self.masks) - {"full"} and not self.window:
            raise ConfigError(f"masks are {sorted(set(self.masks))}, so window should be set")
        if any(self.moe_layers) and self.moe is None:
            raise ConfigError("moe_layers names layers, but moe, which says what they are, is None")
        if self.rope_divisors is not None:
            if self.rope_scaling is not None:
                raise ConfigError("rope_divisors and rope_scaling exclude each other")
            if len(self.rope_divisors) != self.d_head // 2:
                raise ConfigError(
                    f"rope_divisors has {len(self.rope_divisors)} numbers, "
                    f"but d_head / 2 is {self.d_head // 2}"
                )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], model_name: str = "") -> "LlamaConfig":
        """Read the contents of a Hugging Face config.json, old style or new.

        Raises:
            ConfigError: The family is unknown, a value is missing, or a key that would change the
                numbers is not implemented; the message names it.

        >>> LlamaConfig.from_hf(
        ...     {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        ...      "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
        ... ).n_key_value_heads
        4
        """
        from llama_probe.model.hf_config import from_hf

        return from_hf(config, model_name)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that `from_hf` and transformers read back.

        Raises:
            ConfigError: No family of transformers has this combination of switches.
        """
        from llama_probe.model.hf_config import to_hf

        return to_hf(self)

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """The configuration of a released model, without its weights.

        Raises:
            UnknownNameError: There is no such preset; the message gives the near names.

        >>> LlamaConfig.preset("llama-3.1-8b").n_layers
        32
        """
        from llama_probe.model.presets import preset

        return preset(name)

    def but(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
