"""The projection of the residual stream on a direction, as an exact sum over those who wrote it.

The stream is the sum of what the embedding, each head, each feed-forward and each chosen expert
wrote before (Elhage et al. 2021), so its projection is the sum of theirs. No norm stands between,
so nothing is held fixed, as it is in the attribution of a logit.

1. The parts: whatever writes to the stream before it is read, and how its share is computed.
2. One pass over the prompts, which keeps the shares at one token of each.
3. The shares are compared with the projection that the stream itself has.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.capturing.collect import Rows, collect_fitting
from llama_probe.capturing.plan import batches, fitting_tokens
from llama_probe.capturing.positions import name_of, rows_of
from llama_probe.capturing.prompts import Encoded
from llama_probe.errors import InputError, near
from llama_probe.hooks import act_name
from llama_probe.interventions.vectors import vector_of
from llama_probe.model.llama import Llama
from llama_probe.patching.progress import Progress, shown

_TOLERANCE = 1e-4
_SHOWN_FROM = 100  # prompts
_STREAM = re.compile(r"blocks\.\d+\.hook_resid_(pre|mid|post)")


# What the parts are


class _Source(NamedTuple):
    """Parts of one kind in one layer, read from the same hooks.

    Attributes:
        component: Their kind.
        layer: Their block; -1 for the embedding.
        hooks: What is read.
        share: From what these hooks passed on, each part's projection; one row where all agree.
        n: How many parts: heads or experts, by number; else 1.
    """

    component: str
    layer: int
    hooks: tuple[str, ...]
    share: Callable[..., Float[Tensor, "row part"]]
    n: int = 1


def _sources(model: Llama, at: str, unit: Float[Tensor, " d_model"]) -> Iterator[_Source]:
    """All that is written into the stream before it is read."""
    project = partial(_project, unit=unit)
    yield _Source("embedding", -1, ("hook_embed",), project)
    attentions, feed_forwards = _layers_before(at)
    for layer in range(attentions):
        yield from _attention(model, layer, unit)
        if layer < feed_forwards:
            feed_forward = _experts if model.cfg.moe_layers[layer] else _mlp
            yield from feed_forward(model, layer, unit)


def _layers_before(at: str) -> tuple[int, int]:
    """How many attentions and how many feed-forwards write to the stream before a place in it."""
    layer, point = int(at.split(".")[1]), at.rpartition("_")[2]
    return layer + (point != "pre"), layer + (point == "post")


def _attention(model: Llama, layer: int, unit: Float[Tensor, " d_model"]) -> Iterator[_Source]:
    attn = model.blocks[layer].attn
    # What a unit of z writes; per-head results [head d_model] are never made.
    reads = einsum(_exact(attn.W_O), unit, "head d_head d_model, d_model -> head d_head")
    share = partial(_head_shares, reads=reads)
    yield _Source("head", layer, (act_name("z", layer),), share, model.cfg.n_heads)
    if attn.o.bias is not None:
        yield _Source("attention bias", layer, (), partial(_constant, attn.b_O, unit))


def _mlp(model: Llama, layer: int, unit: Float[Tensor, " d_model"]) -> Iterator[_Source]:
    mlp, hook = model.blocks[layer].mlp, act_name("mlp_out", layer)
    bias = _constant(mlp.b_out, unit)
    yield _Source("mlp", layer, (hook,), lambda out: _project(out, unit) - bias)
    if mlp.down.bias is not None:
        yield _Source("mlp bias", layer, (), lambda: bias)


def _experts(model: Llama, layer: int, unit: Float[Tensor, " d_model"]) -> Iterator[_Source]:
    moe = model.blocks[layer].mlp
    n, hooks = moe.cfg.n_experts, (act_name("expert_indices", layer), act_name("expert_out", layer))
    yield _Source("expert", layer, hooks, partial(_expert_shares, unit=unit, n_experts=n), n)
    if moe.shared is not None:
        hook = act_name("shared_out", layer)
        yield _Source("shared expert", layer, (hook,), partial(_project, unit=unit))


def _project(
    out: Float[Tensor, "row d_model"], unit: Float[Tensor, " d_model"]
) -> Float[Tensor, "row 1"]:
    return out.double() @ unit[:, None]


def _constant(
    bias: Float[Tensor, " d_model"], unit: Float[Tensor, " d_model"]
) -> Float[Tensor, "1 1"]:
    return _project(_exact(bias)[None], unit)


def _head_shares(
    z: Float[Tensor, "row head d_head"], reads: Float[Tensor, "head d_head"]
) -> Float[Tensor, "row head"]:
    return einsum(z.double(), reads, "row head d_head, head d_head -> row head")


def _expert_shares(
    indices: Int[Tensor, "row k"],
    out: Float[Tensor, "row k d_model"],
    unit: Float[Tensor, " d_model"],
    n_experts: int,
) -> Float[Tensor, "row expert"]:
    """NaN for the experts that a token was not sent to."""
    shares = torch.full((len(out), n_experts), torch.nan, dtype=torch.float64)
    return shares.scatter(1, indices, out.double() @ unit)


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


# One pass over the prompts


class Written(NamedTuple):
    """What was written.

    Attributes:
        parts: One row for each part: `component layer head expert`.
        values: Their shares; NaN for an expert that does not serve the prompt's token.
        total: The projection of the stream itself.
        attrs: `at`, `position`, and `error`, the largest gap between sum and projection.
    """

    parts: pd.DataFrame
    values: Float[np.ndarray, "prompt part"]
    total: Float[np.ndarray, " prompt"]
    attrs: dict[str, Any]


def decomposed(
    model: Llama,
    encoded: Sequence[Encoded],
    direction: Any,
    at: str | None,
    position: int | str,
    progress: Progress | None,
) -> Written:
    """What each part writes along a direction, for each prompt.

    Args:
        model: The model.
        encoded: The prompts' tokens.
        direction: A vector [d_model], or what has one.
        at: The hook where the stream is read; None: the direction's own.
        position: One token of each prompt.
        progress: See `who_writes`.

    Raises:
        InputError: The direction, the place or the position cannot be used, or the shares do not
            sum to the projection.
    """
    at = _place(model, direction, at)
    unit = _unit(model, direction)
    rows = rows_of(encoded, position, None)
    if not rows["prompt"].is_unique:
        raise InputError(
            f"position is {name_of(position)!r}, which names several tokens: give one for each "
            "prompt, as -1 or 'last of the instruction'"
        )
    sources = list(_sources(model, at, unit))
    parts = _parts(sources)
    values = np.empty((len(encoded), len(parts)))
    total, norm = np.empty(len(encoded)), np.empty(len(encoded))
    bar = len(encoded) >= _SHOWN_FROM if progress is None else progress
    with shown(bar, len(encoded), "who writes") as tell:
        done = 0
        for prompts, tensors in _passes(model, encoded, rows, [at, *_hooks(sources)]):
            values[prompts] = _shares(sources, tensors)
            total[prompts] = _project(tensors[at], unit)[:, 0]
            norm[prompts] = tensors[at].double().norm(dim=1)
            done += len(prompts)
            tell(done)
    error = _checked(values, total, norm, at, model.cfg.dtype)
    return Written(parts, values, total, {"at": at, "position": name_of(position), "error": error})


def _place(model: Llama, direction: Any, at: str | None) -> str:
    asked = getattr(direction, "hook", "") if at is None else at
    if not asked:
        raise InputError(
            "at is None and the direction says no hook of its own: say where the stream is read, "
            "as at='blocks.5.hook_resid_pre'"
        )
    streams = [name for name in model.hook_dict if _STREAM.fullmatch(name)]
    if asked not in streams:
        raise InputError(
            f"{asked!r} is no place in the residual stream of this model{near(asked, streams)}; "
            f"these are {streams[0]} to {streams[-1]}"
        )
    return asked


def _unit(model: Llama, direction: Any) -> Float[Tensor, " d_model"]:
    vector = vector_of(direction)
    if vector.ndim == 2 and len(vector) == 1:
        vector = vector[0]
    if tuple(vector.shape) != (model.cfg.d_model,):
        raise InputError(
            f"the direction has shape {tuple(vector.shape)}, but this model's stream has "
            f"{model.cfg.d_model} dimensions: give one vector of that size"
        )
    length = vector.norm()
    if not length > 0:
        raise InputError("the direction is 0 and points nowhere")
    return vector / length


def _parts(sources: Sequence[_Source]) -> pd.DataFrame:
    parts = [
        {"component": source.component, "layer": source.layer, source.component: number}
        for source in sources
        for number in range(source.n)
    ]
    frame = pd.DataFrame(parts).reindex(columns=["component", "layer", "head", "expert"])
    return frame.fillna({"head": -1, "expert": -1}).astype({"head": int, "expert": int})


def _hooks(sources: Sequence[_Source]) -> list[str]:
    return [hook for source in sources for hook in source.hooks]


def _passes(
    model: Llama, encoded: Sequence[Encoded], rows: pd.DataFrame, hooks: list[str]
) -> Iterator[tuple[Int[np.ndarray, " row"], Mapping[str, Tensor]]]:
    """What the hooks pass on at the token of each prompt, some prompts at a time."""
    cfg = model.cfg
    k = cfg.moe.top_k if cfg.moe is not None else 0
    most = fitting_tokens(model, cfg.dtype.itemsize * cfg.d_model * (k + 1))
    dtype = torch.promote_types(cfg.dtype, torch.float32)
    for batch in batches([len(one.ids) for one in encoded], most):
        ids = {prompt: encoded[prompt].ids for prompt in batch}
        asked = Rows(*(rows.iloc[batch][name].to_numpy() for name in Rows._fields))
        for some, tensors in collect_fitting(model, ids, hooks, asked, None, dtype, []):
            yield some.prompt, tensors


def _shares(
    sources: Sequence[_Source], tensors: Mapping[str, Tensor]
) -> Float[np.ndarray, "row part"]:
    shares = [source.share(*(tensors[hook] for hook in source.hooks)) for source in sources]
    n = max(map(len, shares))
    return torch.cat([share.expand(n, -1) for share in shares], dim=1).numpy()


def _checked(
    values: Float[np.ndarray, "prompt part"],
    total: Float[np.ndarray, " prompt"],
    norm: Float[np.ndarray, " prompt"],
    at: str,
    dtype: torch.dtype,
) -> float:
    """The largest gap between the parts' sum and the projection, as a share of their sizes."""
    gap, size = np.abs(np.nansum(values, axis=1) - total), np.nansum(np.abs(values), axis=1)
    # The model rounds what each part writes, and the stream at each step, to its own precision.
    eps = torch.finfo(dtype).eps
    wrong = np.flatnonzero(~(gap <= max(_TOLERANCE, eps) * size + eps * norm))
    if len(wrong):
        prompt = wrong[0]
        raise InputError(
            f"what the parts write for prompt {prompt} sums to "
            f"{np.nansum(values[prompt]):.6g}, but the projection at {at} is {total[prompt]:.6g}: "
            "an edit that is in place changes the stream, or a layer's output after its parts were "
            "read; take it away first"
        )
    return float((gap / np.where(size > 0, size, 1)).max())
