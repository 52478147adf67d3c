"""Direct logit attribution: which parts of the model write a logit (Elhage et al. 2021).

The final residual stream is the sum of what the embedding, each head and each feed-forward wrote,
and the logits are linear in it but for the last norm. That norm's scale is held at its value in
this run ("frozen"), which makes the split exact: the parts' shares sum to the logit. What a part
changes about the scale is not seen, nor what it does by way of later layers.

A feed-forward splits further: a mixture of experts into the chosen experts and the shared one, a
dense one into its neurons (Geva et al. 2022, arXiv 2203.14680).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import ActivationCache, HookPoint, act_name, reads_only
from llama_probe.lens.common import position, wide
from llama_probe.model.llama import Llama


class _Part(NamedTuple):
    """A row of the frame."""

    component: str
    kind: str
    value: float
    layer: int | None = None
    head: int | None = None
    expert: int | None = None
    neuron: int | None = None


@torch.no_grad()
def direct_logit_attribution(
    model: Llama,
    prompt: Any,
    answer: str | int,
    foil: str | int | None = None,
    *,
    pos: int = -1,
    experts: bool = False,
    neurons: int = 0,
) -> pd.DataFrame:
    """How much each part of the model writes towards one token, or towards one against another.

    The last norm's scale is held at its value in this run.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        answer: The token, as text of one token or as its id.
        foil: The token to compare with; None for the answer's logit alone.
        pos: The position whose prediction is split.
        experts: Split each mixture of experts into its chosen experts and the shared one.
        neurons: Take so many neurons out of each dense feed-forward, those with the largest shares
            whatever their sign.

    Returns:
        One row for each part: `component` ("embed", "L3 H5", "L3 mlp", "L3 bias", "L3 E2",
        "L3 shared", "L3 N17", "L3 rest"), `kind` ("embed", "head", "mlp", "bias": of the
        attention's output, "expert", "shared", "neuron", "rest": of a feed-forward whose neurons
        were taken out, with its bias), `layer`, `head` (missing where there is none), with
        `experts` and `neurons` also `expert` and `neuron`, and `value` in logits. The values sum
        to the logit (difference) that the model gives.

    Raises:
        InputError: There is more than one prompt, a text is not one token, there is no such
            position, or the model has no experts or neurons to split into.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = direct_logit_attribution(model, torch.tensor([1, 2, 3]), answer=7, foil=8)
    >>> list(frame.component)
    ['embed', 'L0 H0', 'L0 H1', 'L0 H2', 'L0 H3', 'L0 mlp']
    >>> frame = direct_logit_attribution(model, torch.tensor([1, 2, 3]), answer=7, neurons=2)
    >>> list(frame.kind[-3:])
    ['neuron', 'neuron', 'rest']
    """
    _check(model, experts, neurons)
    tokens, mask = model.one_prompt(prompt)
    pos = position("pos", pos, tokens.shape[1])
    direction = wide(model.unembed.weight[model.to_single_token(answer)])
    if foil is not None:
        direction = direction - model.unembed.weight[model.to_single_token(foil)]
    names = _names(model, experts, neurons)
    cache, scale = _run(model, tokens, mask, pos, names)
    direction = direction * model.ln_final.weight / scale

    parts = [_Part("embed", "embed", _share(cache["hook_embed"], direction))]
    for layer in range(model.cfg.n_layers):
        parts += _attention(model, layer, cache, direction)
        if model.cfg.moe_layers[layer] and experts:
            parts += _experts(layer, cache, direction)
        elif not model.cfg.moe_layers[layer] and neurons:
            parts += _neurons(model, layer, cache, direction, neurons)
        else:
            value = _share(cache["mlp_out", layer], direction)
            parts.append(_Part(f"L{layer} mlp", "mlp", value, layer))
    return _frame(parts, experts, bool(neurons))


def _check(model: Llama, experts: bool, neurons: int) -> None:
    cfg = model.cfg
    if experts and not any(cfg.moe_layers):
        raise InputError("experts is set, but no layer of this model is a mixture of experts")
    if not 0 <= neurons <= cfg.d_mlp:
        raise InputError(f"neurons is {neurons}, but should be 0 to {cfg.d_mlp}")
    if neurons and all(cfg.moe_layers):
        raise InputError(
            f"neurons is {neurons}, but every layer of this model is a mixture of experts: "
            "experts=True splits those"
        )


def _names(model: Llama, experts: bool, neurons: int) -> list[str]:
    """The hooks that the split needs; `hook_expert_out` and the like only where asked for."""
    names = ["hook_embed", act_name("z", "*"), act_name("mlp_out", "*")]
    if experts:
        names += [act_name(word, "*") for word in ("expert_indices", "expert_out")]
        if model.cfg.moe is not None and model.cfg.moe.d_shared:
            names.append(act_name("shared_out", "*"))
    return [*names, act_name("post", "*")] if neurons else names


def _run(
    model: Llama, tokens: Tensor, mask: Tensor, pos: int, names: list[str]
) -> tuple[ActivationCache, Float[Tensor, " one"]]:
    """What the hooks pass on at one position, and the last norm's scale there."""
    scales = []

    # Not through the cache: the norm sees that one position only, so it has no others to cut.
    @reads_only
    def keep(scale: Tensor, hook: HookPoint) -> None:
        scales.append(scale[0, 0])

    with model.hooks([("ln_final.hook_scale", keep)]):
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=names, logits_at=pos, pos_slice=pos
        )
    return cache, scales[0]


def _attention(
    model: Llama, layer: int, cache: ActivationCache, direction: Float[Tensor, " d_model"]
) -> Iterator[_Part]:
    attn = model.blocks[layer].attn
    z = wide(cache["z", layer][0, 0])
    shares = einsum(z, wide(attn.W_O), direction, "head d, head d d_model, d_model -> head")
    for head, value in enumerate(shares.tolist()):
        yield _Part(f"L{layer} H{head}", "head", value, layer, head=head)
    if attn.o.bias is not None:
        value = _share(attn.b_O, direction)
        yield _Part(f"L{layer} bias", "bias", value, layer)


def _experts(
    layer: int, cache: ActivationCache, direction: Float[Tensor, " d_model"]
) -> Iterator[_Part]:
    chosen = cache["expert_indices", layer][0, 0].tolist()
    for expert, out in zip(chosen, cache["expert_out", layer][0, 0], strict=True):
        value = _share(out, direction)
        yield _Part(f"L{layer} E{expert}", "expert", value, layer, expert=expert)
    if act_name("shared_out", layer) in cache.cache_dict:
        value = _share(cache["shared_out", layer], direction)
        yield _Part(f"L{layer} shared", "shared", value, layer)


def _neurons(
    model: Llama,
    layer: int,
    cache: ActivationCache,
    direction: Float[Tensor, " d_model"],
    most: int,
) -> Iterator[_Part]:
    """The neurons with the largest shares, and the rest, so that the sum stays what it was."""
    shares = wide(cache["post", layer][0, 0]) * (wide(model.blocks[layer].mlp.W_out) @ direction)
    top = shares.abs().topk(most).indices
    for neuron, value in zip(top.tolist(), shares[top].tolist(), strict=True):
        yield _Part(f"L{layer} N{neuron}", "neuron", value, layer, neuron=neuron)
    rest = _share(cache["mlp_out", layer], direction) - float(shares[top].sum())
    yield _Part(f"L{layer} rest", "rest", rest, layer)


def _share(vector: Float[Tensor, "... d_model"], direction: Float[Tensor, " d_model"]) -> float:
    return float(wide(vector).flatten() @ direction)


def _frame(parts: list[_Part], experts: bool, neurons: bool) -> pd.DataFrame:
    asked = ["layer", "head", *["expert"] * experts, *["neuron"] * neurons]
    unasked = [name for name in ("expert", "neuron") if name not in asked]
    frame = pd.DataFrame(parts).drop(columns=unasked)
    frame.insert(len(frame.columns) - 1, "value", frame.pop("value"))
    return frame.astype(dict.fromkeys(asked, "Int64"))
