"""Llama-family models from GGUF files of architecture `llama`, dense and mixture of experts.

What such a file does differently from a Hugging Face folder: query and key rows are stored in
Meta's interleaved order, Llama 3.1's RoPE scaling is a tensor of divisors (`rope_freqs.weight`),
experts are stacked, and a missing `output.weight` means that the unembedding is the embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_probe.checkpoints.assemble import fill, skeleton
from llama_probe.checkpoints.gguf import GgufFile
from llama_probe.checkpoints.names import Shape, Source, half_an_expert, one_expert, paired, stacked
from llama_probe.errors import CheckpointError, ConfigError
from llama_probe.model.config import LlamaConfig, MoeConfig
from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer

_ROPE_DIVISORS = "rope_freqs.weight"


def load_gguf(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    name: str = "",
    progress: bool = False,
) -> Llama:
    """Load weights, configuration and tokenizer from a GGUF file.

    Args:
        path: The file.
        device: Where the weights go.
        dtype: What they become; None: float32, as they are dequantised.
        name: What the model is called; the file's name if empty.
        progress: Show a progress bar.

    Raises:
        CheckpointError: The file is damaged, or a tensor is missing or does not fit.
        ConfigError: The architecture, or a switch of it, is not implemented.
    """
    with GgufFile(path) as file:
        cfg = config_of(file, name or path.stem)
        tokenizer = None
        if "tokenizer.ggml.model" in file.metadata:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        return fill(
            skeleton(cfg, tokenizer),
            _Tensors(file),
            sources,
            str(path),
            device=device,
            dtype=dtype,
            also_used=[_ROPE_DIVISORS],
            progress=progress,
        )


def config_of(file: GgufFile, name: str) -> LlamaConfig:
    """The configuration that a file's metadata and tensors describe.

    Raises:
        CheckpointError: A value is missing or of the wrong kind.
        ConfigError: The architecture, or a switch of it, is not implemented.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{file.path} has architecture {architecture!r}; GGUF files of architecture 'llama' "
            "are read (Llama, Mistral, Mixtral, SmolLM), the rest from Hugging Face folders"
        )

    def value(key: str, kind: type, *default: Any) -> Any:
        found = metadata.get(f"llama.{key}", *default)
        if type(found) is int and kind is float:
            found = float(found)
        if isinstance(found, bool) or not isinstance(found, kind) or found < 0:
            raise CheckpointError(
                f"{file.path} should have a number 'llama.{key}', but has {found!r}"
            )
        return found

    n_heads, d_model = value("attention.head_count", int), value("embedding_length", int)
    if n_heads < 1:
        raise CheckpointError(f"{file.path} has {n_heads} attention heads")
    d_head = value("attention.key_length", int, d_model // n_heads)
    if value("rope.dimension_count", int, d_head) != d_head:
        raise ConfigError(f"{file.path} rotates part of each head only, which is not implemented")
    # As llama.cpp reads them: "linear" unless said otherwise, by a factor that old files call
    # scale_linear; 0 and 1 scale nothing.
    scaling = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1))
    if scaling != "none" and not (scaling == "linear" and factor in (0, 1)):
        raise ConfigError(
            f"{file.path} has RoPE scaling {scaling!r} by {factor}, which is not implemented"
        )
    if (n_layers := value("block_count", int)) > len(file.tensors):
        raise CheckpointError(
            f"{file.path} claims {n_layers} layers, but has {len(file.tensors)} tensors"
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor 'token_embd.weight'")
    n_experts = value("expert_count", int, 0)
    moe = None
    if n_experts:
        moe = MoeConfig(
            n_experts=n_experts,
            top_k=value("expert_used_count", int),
            d_expert=value("feed_forward_length", int),
            rule="softmax",
            renormalise=True,
        )
    divisors = None
    if _ROPE_DIVISORS in file.tensors:
        divisors = tuple(file.read(_ROPE_DIVISORS).tolist())
    return LlamaConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_key_value_heads=value("attention.head_count_kv", int, n_heads),
        d_head=d_head,
        d_mlp=value("feed_forward_length", int),
        d_vocab=file.tensors["token_embd.weight"].shape[0],
        n_ctx=value("context_length", int),
        eps=value("attention.layer_norm_rms_epsilon", float),
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        rope_theta=value("rope.freq_base", float, 10000.0),
        rope_divisors=divisors,
        moe=moe,
        model_type="mixtral" if moe else "llama",
        model_name=name,
    )


class _Tensors(Mapping[str, Tensor]):
    """The file's tensors, each dequantised when asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.read(name))

    def __contains__(self, name: object) -> bool:
        return name in self._file.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)


_TOP = {
    "embed.weight": "token_embd.weight",
    "ln_final.weight": "output_norm.weight",
    "unembed.weight": "output.weight",
}
_BLOCK = {
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
}


def sources(name: str, cfg: LlamaConfig) -> list[Source]:
    """The sources that a weight of ours may have in a GGUF file.

    >>> cfg = LlamaConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, d_vocab=9)
    >>> sources("blocks.0.mlp.up.weight", cfg)[0].names
    ('blk.0.ffn_up.weight',)
    """
    if name in _TOP:
        return [Source((_TOP[name],))]
    _, layer, inner = name.split(".", 2)
    place = f"blk.{layer}."
    if inner == "mlp.experts_in":
        gates, ups = _each(place, "ffn_gate", cfg), _each(place, "ffn_up", cfg)
        stacks = (f"{place}ffn_gate_exps.weight", f"{place}ffn_up_exps.weight")
        return [
            Source(stacks, _side_by_side, _one_side),
            Source(gates + ups, paired, half_an_expert),
        ]
    if inner == "mlp.experts_out":
        each = _each(place, "ffn_down", cfg)
        return [Source((f"{place}ffn_down_exps.weight",)), Source(each, stacked, one_expert)]
    module, _, kind = inner.rpartition(".")
    written = (f"{place}{_BLOCK[module]}.{kind}",)
    n_heads = {"attn.q": cfg.n_heads, "attn.k": cfg.n_key_value_heads}.get(module)
    if n_heads is None:
        return [Source(written)]
    return [Source(written, lambda parts: to_halves(parts[0], n_heads))]


def _each(place: str, part: str, cfg: LlamaConfig) -> tuple[str, ...]:
    """The names of old files, which keep every expert apart."""
    count = range(cfg.moe.n_experts if cfg.moe else 0)
    return tuple(f"{place}{part}.{expert}.weight" for expert in count)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


def _one_side(shape: Shape) -> Shape:
    return (shape[0], shape[1] // 2, shape[2])


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of each head from pairs (2i, 2i + 1) to pairs (i, i + d_head / 2).

    >>> to_halves(torch.arange(4), n_heads=1)
    tensor([0, 2, 1, 3])
    """
    pairs = weight.unflatten(0, (n_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
