"""The same ablation in a copy's weights, to check hooks against: in memory, never saved."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from llama_probe.checkpoints.save import keep_in_memory
from llama_probe.errors import ConfigError, InputError
from llama_probe.interventions.vectors import along, span_of
from llama_probe.model.llama import Llama
from llama_probe.model.mlp import MLP
from llama_probe.model.moe import MoE


def orthogonalised(model: Llama, direction: Any) -> Llama:
    """A copy of a model in which nothing writes along a direction.

    The weight orthogonalisation of Arditi et al. (2024, arXiv 2406.11717, section 4). Whatever adds
    to the residual stream loses its part along the direction: the embedding, every attention's
    output projection, every down-projection (dense, each expert's, the shared expert's) and their
    biases. What reads the stream stays: norms, routers, query, key, value, gate and up projections,
    and the unembedding. The result equals `interventions.ablate` at its three sites up to rounding
    (1e-3 of a logit in float32), which checks either of them.

    The copy is for such checks. It needs the model's memory once more, `lp.save` refuses to write
    it, and its `cfg.model_name` says what it is.

    Args:
        model: The model; it does not change.
        direction: A tensor [d], or [k d] for a subspace; or what has one as its `vector`.

    Returns:
        The copy, its unembedding untied, without hooks.

    Raises:
        InputError: The direction has another width than the model's stream.
        ConfigError: A layer writes to the stream in a way that is not known here.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=4, n_heads=2, d_mlp=8, d_vocab=9))
    >>> orthogonalised(model, [0, 0, 1, 0]).W_E[:, 2].abs().max().item()
    0.0
    """
    span = span_of(direction)
    if span.shape[1] != model.cfg.d_model:
        raise InputError(
            f"the direction has {span.shape[1]} dimensions, "
            f"but the model's residual stream has {model.cfg.d_model}"
        )
    twin = copy.deepcopy(model)
    twin.reset_hooks()
    if twin.unembed.weight is twin.embed.weight:
        # One matrix would lose the direction where it is read as well, and that is another model:
        # the last norm's weights turn the stream, so that what the unembedding reads along the
        # direction is not 0 although the stream has no component there.
        twin.unembed.weight = nn.Parameter(
            twin.embed.weight.detach().clone(), twin.embed.weight.requires_grad
        )
    twin.cfg = twin.cfg.but(tied=False, model_name=f"{twin.cfg.model_name} (orthogonalised)")
    with torch.no_grad():
        _project(twin.embed.weight, span, axis=1)
        for block in twin.blocks:
            for weight, axis in _writers(block):
                _project(weight, span, axis)
    return keep_in_memory(twin, "its weights are edited to check an ablation")


def _writers(block: Any) -> list[tuple[nn.Parameter, int]]:
    """The weights of a block that write to the stream, and which of their axes is the stream's."""
    linears = [block.attn.o]
    found: list[tuple[nn.Parameter, int]] = []
    match block.mlp:
        case MLP() as mlp:
            linears.append(mlp.down)
        case MoE() as moe:
            found.append((moe.experts_out, 1))
            if moe.shared is not None:
                linears.append(moe.shared.down)
        case other:
            raise ConfigError(f"a feed-forward of type {type(other).__name__} is not known here")
    for one in linears:
        found += [(weight, 0) for weight in (one.weight, one.bias) if weight is not None]
    return found


def _project(weight: Tensor, span: Tensor, axis: int) -> None:
    """Take the span out of a weight, in place."""
    rows = weight.movedim(axis, -1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows.copy_(wide - along(wide, span.to(wide)))
