"""Where each weight of ours stands in a Hugging Face checkpoint, as tables.

A weight is found under one of several `Source`s: published files keep every expert apart, while
transformers 5 holds all experts of a layer in one tensor. Names here leave out what comes before
`layers.`, which differs between text models and the text part of multimodal ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_probe.model.config import LlamaConfig


def only(parts: Sequence[Tensor]) -> Tensor:
    """The one tensor, as it is."""
    return parts[0]


def transposed(parts: Sequence[Tensor]) -> Tensor:
    """The one tensor [expert, in, out] as [expert, out, in]: a view."""
    return parts[0].transpose(1, 2)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor for each expert."""
    return torch.stack(list(parts))


def paired(parts: Sequence[Tensor]) -> Tensor:
    """Every expert's gate, then every expert's up projection: gate above up for each."""
    half = len(parts) // 2
    return torch.stack([torch.cat(pair) for pair in zip(parts[:half], parts[half:], strict=True)])


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The tensors that a weight is made of, and how.

    Attributes:
        names: Of the tensors.
        build: Makes the weight of them.
        asked: The shape that each tensor should have, from the weight's.
    """

    names: tuple[str, ...]
    build: Callable[[Sequence[Tensor]], Tensor] = only
    asked: Callable[[Shape], Shape] = tuple


def sides_swapped(shape: Shape) -> Shape:
    """A tensor of `transposed`."""
    return (shape[0], shape[2], shape[1])


def one_expert(shape: Shape) -> Shape:
    """A tensor of `stacked`."""
    return shape[1:]


def half_an_expert(shape: Shape) -> Shape:
    """A tensor of `paired`."""
    return (shape[1] // 2, *shape[2:])


_TOP = {
    "embed.weight": "embed_tokens.weight",
    "ln_final.weight": "norm.weight",
    "unembed.weight": "lm_head.weight",
}
_BLOCK = {
    "ln1.weight": "input_layernorm.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "{ffn}.gate_proj",
    "mlp.up": "{ffn}.up_proj",
    "mlp.down": "{ffn}.down_proj",
    "mlp.shared.gate": "{ffn}.shared_expert.gate_proj",
    "mlp.shared.up": "{ffn}.shared_expert.up_proj",
    "mlp.shared.down": "{ffn}.shared_expert.down_proj",
    "mlp.shared_gate": "{ffn}.shared_expert_gate",
}
# Published names of one expert's gate, up and down projection, and where the experts stand.
_EXPERT = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
# Tensors of multimodal and of old checkpoints that a text model does not use.
IGNORED = ("vision_model.", "multi_modal_projector.", "rotary_emb.inv_freq")


def sources(name: str, cfg: LlamaConfig) -> list[Source]:
    """The sources that a weight of ours may have, the published form first.

    >>> cfg = LlamaConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, d_vocab=9)
    >>> sources("blocks.0.attn.q.weight", cfg)[0].names
    ('layers.0.self_attn.q_proj.weight',)
    """
    if name in _TOP:
        return [Source((_TOP[name],))]
    _, layer, inner = name.split(".", 2)
    place = f"layers.{layer}."
    if inner in ("mlp.router.weight", "mlp.experts_in", "mlp.experts_out"):
        return _moe_sources(inner, place, cfg)
    module, _, kind = inner.rpartition(".")
    written = _BLOCK[inner] if inner in _BLOCK else f"{_BLOCK[module]}.{kind}"
    return [Source((place + written.format(ffn=_ffn(cfg)),))]


def _ffn(cfg: LlamaConfig) -> str:
    return "feed_forward" if cfg.model_type == "llama4_text" else "mlp"


def _moe_sources(inner: str, place: str, cfg: LlamaConfig) -> list[Source]:
    assert cfg.moe is not None
    if cfg.model_type == "llama4_text":
        into, out = (f"{place}feed_forward.experts.{part}_proj" for part in ("gate_up", "down"))
        table = {
            "mlp.router.weight": Source((f"{place}feed_forward.router.weight",)),
            "mlp.experts_in": Source((into,), transposed, sides_swapped),
            "mlp.experts_out": Source((out,), transposed, sides_swapped),
        }
        return [table[inner]]
    folder, gate, up, down = _EXPERT[cfg.model_type]

    def each(part: str) -> tuple[str, ...]:
        count = range(cfg.moe.n_experts if cfg.moe else 0)
        return tuple(f"{place}{folder}.experts.{expert}.{part}.weight" for expert in count)

    published = {
        "mlp.router.weight": Source((f"{place}{folder}.gate.weight",)),
        "mlp.experts_in": Source(each(gate) + each(up), paired, half_an_expert),
        "mlp.experts_out": Source(each(down), stacked, one_expert),
    }
    in_memory = {
        "mlp.router.weight": Source((f"{place}mlp.gate.weight",)),
        "mlp.experts_in": Source((f"{place}mlp.experts.gate_up_proj",)),
        "mlp.experts_out": Source((f"{place}mlp.experts.down_proj",)),
    }
    return [published[inner], in_memory[inner]]
