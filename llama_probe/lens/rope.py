"""What rotary position embedding does to one head's scores (Su et al. 2021, arXiv 2104.09864).

A query-key product is a sum over pairs of coordinates that turn together, each at a frequency of
its own: fast pairs can tell near positions apart, slow ones hardly turn and carry content (Barbero
et al. 2024, arXiv 2410.06205). `rope_wavelengths` and `rope_angles` say how fast the pairs turn,
`rope_contributions` gives the terms of that sum for two tokens, `rope_distance` the sum as their
distance changes and nothing else does; `rope_maps` runs a prompt once and answers for any of them.

A QK norm needs no care of its own: a learned one comes before the rotation (Qwen 3), and Llama 4's
divides all of a head's coordinates by one number, which no rotation changes. Llama 4's attention
temperature is on layers without RoPE only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.lens.common import check_head, position, wide
from llama_probe.model.config import LlamaConfig, RopeLayout
from llama_probe.model.llama import Llama
from llama_probe.model.rope import inverse_frequencies, rotate, rotation


def rope_wavelengths(cfg: LlamaConfig, setting: str = "this model") -> pd.DataFrame:
    """How fast each rotary pair turns.

    Args:
        cfg: The configuration, as `model.cfg`; its theta, scaling and head size count.
        setting: What it is called, in frames that hold several.

    Returns:
        One row for each pair: `setting`, `pair` (0 turns fastest), `frequency` (radians a token),
        `wavelength` (tokens a turn), `context` (the longest context, in tokens).

    >>> from llama_probe.model.config import LlamaConfig
    >>> frame = rope_wavelengths(LlamaConfig.preset("llama-3.1-8b"))
    >>> [f"{wavelength:.3g}" for wavelength in frame.wavelength.iloc[[0, -1]]]
    ['6.28', '2.05e+07']
    """
    frequency = inverse_frequencies(cfg, torch.device("cpu"))
    return pd.DataFrame(
        {
            "setting": setting,
            "pair": range(len(frequency)),
            "frequency": frequency.tolist(),
            "wavelength": (2 * math.pi / frequency).tolist(),
            "context": cfg.n_ctx,
        }
    )


def rope_angles(cfg: LlamaConfig, n_pos: int) -> pd.DataFrame:
    """By which angle each rotary pair is turned at each position.

    Args:
        cfg: The configuration, as `model.cfg`; its theta, scaling and head size count.
        n_pos: How many positions, from 0 on.

    Returns:
        One row for each pair and position: `pair` (0 turns fastest), `pos`, `angle` (radians, full
        turns taken off: 0 to 2 pi).

    Raises:
        InputError: There are no positions.

    >>> from llama_probe.model.config import LlamaConfig
    >>> frame = rope_angles(LlamaConfig.preset("llama-2-7b"), n_pos=8)
    >>> [round(angle, 2) for angle in frame.angle[:8]]  # pair 0: one radian a token
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.72]
    """
    if n_pos < 1:
        raise InputError(f"n_pos is {n_pos}, but should be at least 1")
    frequency = inverse_frequencies(cfg, torch.device("cpu"))
    # The angles as the model computes them, in float32; only full turns are taken off in float64.
    angles = frequency[:, None] * torch.arange(n_pos).float()
    pairs = torch.arange(len(frequency)).repeat_interleave(n_pos)
    return pd.DataFrame(
        {
            "pair": pairs.tolist(),
            "pos": list(range(n_pos)) * len(frequency),
            "angle": (angles.double() % (2 * math.pi)).flatten().tolist(),
        }
    )


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
    check_head(model.cfg, layer, head)
    _check_rotary(model.cfg, layer)
    return rope_maps(model, prompt, [layer]).contributions(layer, head, query, key)


def rope_distance(
    model: Llama,
    prompt: Any,
    layer: int,
    head: int,
    *,
    query: int | None = None,
    key: int | None = None,
    max_distance: int = 128,
    rope: LlamaConfig | None = None,
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
        rope: A configuration whose theta and scaling turn this query and key instead of the
            model's own, which they were made with: `model.cfg.but(rope_theta=1e6)`.

    Returns:
        One row for each distance from 0 on: `layer`, `head`, `query`, `key` (missing: the mean),
        `distance` (tokens), `value` (the score before mask and softmax, divided by sqrt(d_head) as
        the model does).

    Raises:
        InputError: There is more than one prompt, no such layer, head or position, the distance is
            negative, the layer has no RoPE, or the heads of `rope` have another size.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = rope_distance(model, torch.tensor([1, 2, 3]), 0, 0, max_distance=9)
    >>> len(frame), list(frame.columns)
    (10, ['layer', 'head', 'query', 'key', 'distance', 'value'])
    """
    check_head(model.cfg, layer, head)
    _check_rotary(model.cfg, layer)
    _check_distance(model.cfg, max_distance, rope)
    return rope_maps(model, prompt, [layer]).distance(
        layer, head, query=query, key=key, max_distance=max_distance, rope=rope
    )


@dataclass(frozen=True)
class RopeMaps:
    """The queries and keys of one run, before and after RoPE; `rope_maps` makes it.

    Whatever is asked of it, the causal mask plays no part: the scores of keys that come after the
    query are there too. Neither does a sliding or chunked mask.

    Attributes:
        model: The model.
        ids: The prompt's tokens.
        real: Whether each of them is a token, not padding.
        plain: By layer, the queries and keys before RoPE, after a QK norm.
        turned: By layer, the queries and keys as they enter the product.
    """

    model: Llama
    ids: Int[Tensor, " pos"]
    real: Bool[Tensor, " pos"]
    plain: dict[int, tuple[Tensor, Tensor]]
    turned: dict[int, tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> list[str]:
        """The texts of the prompt's tokens."""
        return self.model.to_str_tokens(self.ids)

    @torch.no_grad()
    def scores(
        self, layer: int, heads: Any = slice(None), queries: Any = slice(None)
    ) -> Float[Tensor, "head query key"]:
        """Attention scores before mask and softmax, also of a layer without RoPE.

        Args:
            layer: The layer.
            heads: Some of the query heads, as a list or slice.
            queries: Some of the positions that look, likewise.

        Raises:
            InputError: There is no such layer in the maps.
        """
        q, k = self._turned(layer, heads, queries)
        return torch.einsum("qhd,khd->hqk", q, k) * self.model.blocks[layer].attn.scale

    @torch.no_grad()
    def added(
        self, layer: int, heads: Any = slice(None), queries: Any = slice(None)
    ) -> Float[Tensor, "head query key pair"]:
        """What each rotary pair adds to each score: the terms that `scores` is the sum of.

        Args:
            layer: The layer, one with RoPE.
            heads: Some of the query heads, as a list or slice.
            queries: Some of the positions that look, likewise.

        Raises:
            InputError: There is no such layer in the maps, or it has no RoPE.
        """
        q, k = self._turned_pairs(layer, heads, queries)
        return torch.einsum("qhpc,khpc->hqkp", q, k) * self.model.blocks[layer].attn.scale

    @torch.no_grad()
    def amplitudes(
        self, layer: int, heads: Any = slice(None), queries: Any = slice(None)
    ) -> Float[Tensor, "head query key pair"]:
        """What each rotary pair would add to each score at its best angle.

        The arguments and errors are those of `added`.
        """
        q, k = (x.norm(dim=-1) for x in self._turned_pairs(layer, heads, queries))
        return torch.einsum("qhp,khp->hqkp", q, k) * self.model.blocks[layer].attn.scale

    @torch.no_grad()
    def curves(
        self,
        layer: int,
        heads: Any = slice(None),
        *,
        query: int | None = None,
        key: int | None = None,
        max_distance: int = 128,
        rope: LlamaConfig | None = None,
    ) -> Float[Tensor, "head distance"]:
        """The scores of heads against distance, as `rope_distance` gives them for one.

        The arguments are the same, but for `heads`: some of the query heads, as a list or slice.

        Raises:
            InputError: As `rope_distance`.
        """
        cfg = self.model.cfg
        _check_rotary(cfg, layer)
        _check_distance(cfg, max_distance, rope)
        q, k = self._of_heads(self.plain, layer, heads)
        attn = self.model.blocks[layer].attn
        fixed_q, fixed_k = (
            wide(x)[self.real].mean(dim=0)
            if pos is None
            else wide(x)[position(name, pos, len(self.ids))]
            for name, x, pos in (("query", q, query), ("key", k, key))
        )
        # Only the distance counts: the key stays at position 0.
        distances = torch.arange(max_distance + 1, device=q.device)
        rope = (cfg if rope is None else rope).but(rope_layout=cfg.rope_layout)
        turn = rotation(distances[None], rope, fixed_q.dtype)
        far_q = rotate(fixed_q.expand(1, len(distances), -1, -1), turn, rope.rope_layout)[0]
        return torch.einsum("dhc,hc->hd", far_q, fixed_k) * attn.scale

    def contributions(self, layer: int, head: int, query: int, key: int) -> pd.DataFrame:
        """What `rope_contributions` gives: arguments, columns and errors are the same."""
        check_head(self.model.cfg, layer, head)
        query, key = (
            position(name, pos, len(self.ids)) for name, pos in (("query", query), ("key", key))
        )
        if key > query:
            raise InputError(f"key {key} comes after query {query}, which does not see it")
        value = self.added(layer, [head], [query])[0, 0, key]
        amplitude = self.amplitudes(layer, [head], [query])[0, 0, key]
        frame = rope_wavelengths(self.model.cfg)
        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "query": query,
                "key": key,
                **frame[["pair", "frequency", "wavelength"]],
                "angle": frame["frequency"] * (query - key),
                "amplitude": amplitude.tolist(),
                "value": value.tolist(),
            }
        )

    def distance(
        self,
        layer: int,
        head: int,
        *,
        query: int | None = None,
        key: int | None = None,
        max_distance: int = 128,
        rope: LlamaConfig | None = None,
    ) -> pd.DataFrame:
        """What `rope_distance` gives: arguments, columns and errors are the same."""
        check_head(self.model.cfg, layer, head)
        (curve,) = self.curves(
            layer, [head], query=query, key=key, max_distance=max_distance, rope=rope
        )
        n_pos = len(self.ids)
        frame = pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "query": None if query is None else position("query", query, n_pos),
                "key": None if key is None else position("key", key, n_pos),
                "distance": range(max_distance + 1),
                "value": curve.tolist(),
            }
        )
        return frame.astype({"query": "Int64", "key": "Int64"})

    def _turned(self, layer: int, heads: Any, queries: Any) -> tuple[Tensor, Tensor]:
        q, k = self._of_heads(self.turned, layer, heads)
        return wide(q[queries]), wide(k)

    def _turned_pairs(self, layer: int, heads: Any, queries: Any) -> tuple[Tensor, Tensor]:
        _check_rotary(self.model.cfg, layer)
        q, k = self._turned(layer, heads, queries)
        layout = self.model.cfg.rope_layout
        return _pairs(q, layout), _pairs(k, layout)

    def _of_heads(
        self, kept: dict[int, tuple[Tensor, Tensor]], layer: int, heads: Any
    ) -> tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "pos head d_head"]]:
        """Queries of some heads, and for each of them the keys that serve it."""
        if layer not in kept:
            raise InputError(f"layer is {layer}, but these maps hold {', '.join(map(str, kept))}")
        (q, k), cfg = kept[layer], self.model.cfg
        chosen = torch.arange(cfg.n_heads, device=q.device)[heads]
        return q[:, chosen], k[:, chosen * cfg.n_key_value_heads // cfg.n_heads]


@torch.no_grad()
def rope_maps(model: Llama, prompt: Any, layers: Sequence[int] | None = None) -> RopeMaps:
    """Run a prompt once, and keep what RoPE's part in every score can be worked out from.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        layers: Which layers; None: all of them.

    Raises:
        InputError: There is more than one prompt, or it does not fit into the context.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> maps = rope_maps(model, torch.tensor([1, 2, 3]))
    >>> maps.added(layer=0).shape  # head query key pair
    torch.Size([4, 3, 3, 2])
    """
    ids, mask = model.one_prompt(prompt)
    layers = range(model.cfg.n_layers) if layers is None else layers
    words = ("q", "k", "rot_q", "rot_k")
    _, cache = model.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=[act_name(word, layer) for layer in layers for word in words],
        stop_at_layer=max(layers) + 1,
    )
    plain, turned = {}, {}
    for layer in layers:
        attn = model.blocks[layer].attn
        q, k, turned_q, turned_k = (cache[word, layer] for word in words)
        q, k = (x if norm is None else norm(x) for x, norm in ((q, attn.q_norm), (k, attn.k_norm)))
        plain[layer], turned[layer] = (q[0], k[0]), (turned_q[0], turned_k[0])
    return RopeMaps(model, ids[0], mask[0].bool(), plain, turned)


def _check_rotary(cfg: LlamaConfig, layer: int) -> None:
    if not cfg.rope_layers[layer]:
        rotary = [index for index, has in enumerate(cfg.rope_layers) if has]
        raise InputError(
            f"layer {layer} has no RoPE, so that its scores know no frequencies and no distance; "
            f"layers with RoPE: {', '.join(map(str, rotary)) or 'none'}"
        )


def _check_distance(cfg: LlamaConfig, max_distance: int, rope: LlamaConfig | None) -> None:
    if max_distance < 0:
        raise InputError(f"max_distance is {max_distance}, but should be 0 or more")
    if rope is not None and rope.d_head != cfg.d_head:
        raise InputError(
            f"rope turns heads of {rope.d_head} coordinates, but the model's have {cfg.d_head}; "
            "change a copy of its own: model.cfg.but(rope_theta=...)"
        )


def _pairs(x: Float[Tensor, "*axes d_head"], layout: RopeLayout) -> Float[Tensor, "*axes pair 2"]:
    """The coordinates that turn together, a row each."""
    return x.unflatten(-1, (2, -1)).mT if layout == "half" else x.unflatten(-1, (-1, 2))
