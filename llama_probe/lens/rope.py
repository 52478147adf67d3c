"""What rotary position embedding does to one head's scores (Su et al. 2021, arXiv 2104.09864).

A query-key product is a sum over pairs of coordinates that turn together, each at a frequency of
its own: fast pairs can tell near positions apart, slow ones hardly turn and carry content (Barbero
et al. 2024, arXiv 2410.06205). `rope_contributions` gives the terms of that sum for two tokens,
`rope_distance` the sum as their distance changes and nothing else does.

A QK norm needs no care of its own: a learned one comes before the rotation (Qwen 3), and Llama 4's
divides all of a head's coordinates by one number, which no rotation changes. Llama 4's attention
temperature is on layers without RoPE only.
"""

import math
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.lens.common import check_head, position, wide
from llama_probe.model.config import RopeLayout
from llama_probe.model.llama import Llama
from llama_probe.model.rope import inverse_frequencies, rotate, rotation


@torch.no_grad()
def rope_contributions(
    model: Llama, prompt: Any, layer: int, head: int, query: int, key: int
) -> pd.DataFrame:
    """What each rotary pair adds to one attention score.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        layer: The layer, one with RoPE.
        head: The query head.
        query: The position that looks.
        key: The position that is looked at: `query` or before it.

    Returns:
        One row for each pair: `layer`, `head`, `query`, `key`, `pair` (0 turns fastest),
        `frequency` (radians a token), `wavelength` (tokens a turn), `angle` (radians by which
        query and key are turned against each other: frequency times distance), `amplitude` (what
        the pair would add at its best angle) and `value` (what it adds). The values sum to the
        score before mask and softmax, divided by sqrt(d_head) as the model does; whether a sliding
        or chunked mask hides the key plays no part.

    Raises:
        InputError: There is more than one prompt, no such layer, head or position, the key comes
            after the query, or the layer has no RoPE.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = rope_contributions(model, torch.tensor([1, 2, 3]), 0, 0, query=2, key=0)
    >>> [round(angle, 2) for angle in frame.angle]
    [2.0, 0.02]
    """
    _check_rotary(model, layer, head)
    tokens, mask = model.one_prompt(prompt)
    query, key = (
        position(name, pos, tokens.shape[1]) for name, pos in (("query", query), ("key", key))
    )
    if key > query:
        raise InputError(f"key {key} comes after query {query}, which does not see it")
    attn = model.blocks[layer].attn
    names = [act_name("rot_q", layer), act_name("rot_k", layer)]
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, names_filter=names, stop_at_layer=layer + 1
    )
    turned_q = _pairs(wide(cache[names[0]][0, query, head]), attn.rope_layout)
    turned_k = _pairs(wide(cache[names[1]][0, key, _kv_head(model, head)]), attn.rope_layout)
    frequency = inverse_frequencies(model.cfg, turned_q.device)
    amplitude = turned_q.norm(dim=-1) * turned_k.norm(dim=-1) * attn.scale
    value = (turned_q * turned_k).sum(dim=-1) * attn.scale
    return pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "query": query,
            "key": key,
            "pair": range(len(frequency)),
            "frequency": frequency.tolist(),
            "wavelength": (2 * math.pi / frequency).tolist(),
            "angle": (frequency * (query - key)).tolist(),
            "amplitude": amplitude.tolist(),
            "value": value.tolist(),
        }
    )


@torch.no_grad()
def rope_distance(
    model: Llama,
    prompt: Any,
    layer: int,
    head: int,
    *,
    query: int | None = None,
    key: int | None = None,
    max_distance: int = 128,
) -> pd.DataFrame:
    """A head's score against distance, what query and key hold being fixed.

    Query and key are taken from the prompt as they are before RoPE (after a QK norm) and set any
    distance apart. With the mean of all positions, which is the default, the curve is the mean,
    over all pairs of positions, of the score that the two would have at that distance. A first
    token often has a key unlike all others: give `key` to see one alone.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        layer: The layer, one with RoPE.
        head: The query head.
        query: The position whose query it is; None: the mean of all.
        key: The position whose key it is; None: the mean of all.
        max_distance: The last distance in tokens; it may go beyond the prompt and the context, and
            beyond a sliding or chunked mask, which plays no part here.

    Returns:
        One row for each distance from 0 on: `layer`, `head`, `query`, `key` (missing: the mean),
        `distance` (tokens), `value` (the score before mask and softmax, divided by sqrt(d_head) as
        the model does).

    Raises:
        InputError: There is more than one prompt, no such layer, head or position, the distance is
            negative, or the layer has no RoPE.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = rope_distance(model, torch.tensor([1, 2, 3]), 0, 0, max_distance=9)
    >>> len(frame), list(frame.columns)
    (10, ['layer', 'head', 'query', 'key', 'distance', 'value'])
    """
    _check_rotary(model, layer, head)
    if max_distance < 0:
        raise InputError(f"max_distance is {max_distance}, but should be 0 or more")
    tokens, mask = model.one_prompt(prompt)
    n_pos = tokens.shape[1]
    query = None if query is None else position("query", query, n_pos)
    key = None if key is None else position("key", key, n_pos)
    attn = model.blocks[layer].attn
    names = [act_name("q", layer), act_name("k", layer)]
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, names_filter=names, stop_at_layer=layer + 1
    )
    q, k = (
        wide(x if norm is None else norm(x))[0]
        for x, norm in ((cache[names[0]], attn.q_norm), (cache[names[1]], attn.k_norm))
    )
    fixed_q = _chosen(q[:, head], query, mask[0])
    fixed_k = _chosen(k[:, _kv_head(model, head)], key, mask[0])
    # Only the distance counts: the key stays at position 0.
    distances = torch.arange(max_distance + 1, device=q.device)
    turn = rotation(distances[None], model.cfg, q.dtype)
    turned_q = rotate(fixed_q.expand(1, len(distances), 1, -1), turn, attn.rope_layout)
    frame = pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "query": query,
            "key": key,
            "distance": distances.tolist(),
            "value": (turned_q[0, :, 0] @ fixed_k * attn.scale).tolist(),
        }
    )
    return frame.astype({"query": "Int64", "key": "Int64"})


def _check_rotary(model: Llama, layer: int, head: int) -> None:
    check_head(model.cfg, layer, head)
    if not model.cfg.rope_layers[layer]:
        rotary = [index for index, has in enumerate(model.cfg.rope_layers) if has]
        raise InputError(
            f"layer {layer} has no RoPE, so that its scores know no frequencies and no distance; "
            f"layers with RoPE: {', '.join(map(str, rotary)) or 'none'}"
        )


def _kv_head(model: Llama, head: int) -> int:
    """The key-value head that serves a query head."""
    return head * model.cfg.n_key_value_heads // model.cfg.n_heads


def _chosen(
    heads: Float[Tensor, "pos d_head"], pos: int | None, real: Tensor
) -> Float[Tensor, " d_head"]:
    return heads[real.bool()].mean(dim=0) if pos is None else heads[pos]


def _pairs(x: Float[Tensor, " d_head"], layout: RopeLayout) -> Float[Tensor, "pair 2"]:
    """The coordinates that turn together, a row each."""
    return x.view(2, -1).T if layout == "half" else x.view(-1, 2)
