"""Grouped-query attention with every quantity named.

Attention runs through torch's scaled_dot_product_attention, unless something listens to the scores
or the pattern of this layer: only then are they computed. Both ways agree to rounding.
"""

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llama_probe.hooks import HookPoint
from llama_probe.model.cache import KVCache
from llama_probe.model.config import LlamaConfig, Mask, RopeLayout
from llama_probe.model.norm import HeadNorm
from llama_probe.model.rope import Rotation, rotate

Heads = Float[Tensor, "batch pos head d_head"]
Queries = Float[Tensor, "batch query head d_head"]
Keys = Float[Tensor, "batch key kv_head d_head"]


@dataclass(frozen=True)
class Reading:
    """What the attention layers share in one forward pass.

    Attributes:
        positions: Position of each token read now; batch 1 where all rows agree.
        rotation: RoPE's factors at those positions.
        visible: For each kind of mask in use, which keys each query sees; None: plainly causal.
        padded: Whether there is padding; where there is none, every query sees itself at least.
        cache: Keys and values of the tokens read before, or None.
    """

    positions: Int[Tensor, "#batch pos"]
    rotation: Rotation
    visible: dict[Mask, Bool[Tensor, "#batch 1 query key"] | None]
    padded: bool
    cache: KVCache | None

    def of_last(self) -> "Reading":
        """The same for a query at the last position alone."""
        seen = {mask: None if x is None else x[..., -1:, :] for mask, x in self.visible.items()}
        own, partner = (factor[:, -1:] for factor in self.rotation)
        return replace(
            self, positions=self.positions[:, -1:], rotation=(own, partner), visible=seen
        )


class Attention(nn.Module):
    """The attention of one layer; `W_Q W_K W_V W_O` are views of its weights by head.

    Hooks: see the table in `llama.py`.
    """

    def __init__(self, cfg: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv, self.d_head = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head
        self.scale = cfg.d_head**-0.5
        self.mask: Mask = cfg.masks[layer]
        self.rope_layout: RopeLayout | None = cfg.rope_layout if cfg.rope_layers[layer] else None
        self.temperature = None if cfg.rope_layers[layer] else cfg.temperature

        self.q = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.k = nn.Linear(cfg.d_model, cfg.n_key_value_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.d_model, cfg.n_key_value_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.o = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=cfg.o_bias)
        self.learned_norm = cfg.qk_norm == "learned"
        if self.learned_norm or (cfg.qk_norm == "weightless" and self.rope_layout):
            self.q_norm = HeadNorm(cfg.d_head, cfg.eps, learned=self.learned_norm)
            self.k_norm = HeadNorm(cfg.d_head, cfg.eps, learned=self.learned_norm)
        else:
            self.q_norm = self.k_norm = None

        self.hook_q_input = HookPoint()  # batch pos head d_model
        self.hook_k_input = HookPoint()  # batch pos kv_head d_model
        self.hook_v_input = HookPoint()  # batch pos kv_head d_model
        self.hook_q = HookPoint()  # batch pos head d_head
        self.hook_k = HookPoint()  # batch pos kv_head d_head
        self.hook_v = HookPoint()  # batch pos kv_head d_head
        self.hook_rot_q = HookPoint()  # batch pos head d_head
        self.hook_rot_k = HookPoint()  # batch pos kv_head d_head
        self.hook_attn_scores = HookPoint()  # batch head q_pos k_pos
        self.hook_pattern = HookPoint()  # batch head q_pos k_pos
        self.hook_z = HookPoint()  # batch pos head d_head
        self.hook_result = HookPoint()  # batch pos head d_model

    def forward(
        self,
        q_input: Float[Tensor, "batch query *q_head d_model"],
        k_input: Float[Tensor, "batch pos *k_head d_model"],
        v_input: Float[Tensor, "batch pos *v_head d_model"],
        reading: Reading,
    ) -> Float[Tensor, "batch query d_model"]:
        """Attend.

        Args:
            q_input: The normalised stream, or one of its own for every head; its last position
                alone where no other is asked for.
            k_input: Likewise for the keys; usually the same tensor.
            v_input: Likewise for the values; usually the same tensor.
            reading: Positions, masks and cache of this pass.
        """
        q = self.hook_q(self._heads(self.q, q_input))
        k = self.hook_k(self._heads(self.k, k_input))
        v = self.hook_v(self._heads(self.v, v_input))
        asking = reading if q.shape[1] == k.shape[1] else reading.of_last()
        q = self.hook_rot_q(self._cooled(self._placed(q, self.q_norm, asking), asking))
        k = self.hook_rot_k(self._placed(k, self.k_norm, reading))
        if reading.cache is not None:
            k, v = reading.cache.extend(self.layer, k, v)
        eager = self.hook_attn_scores.listening or self.hook_pattern.listening
        attend = self._attend_eagerly if eager else self._attend
        return self._output(self.hook_z(attend(q, k, v, asking)))

    def _heads(self, linear: nn.Linear, x: Float[Tensor, "batch pos *head d_model"]) -> Heads:
        if x.ndim == 3:
            return linear(x).view(*x.shape[:2], -1, self.d_head)
        weight = linear.weight.unflatten(0, (-1, self.d_head))
        heads = einsum(x, weight, "batch pos head d, head d_head d -> batch pos head d_head")
        return heads if linear.bias is None else heads + linear.bias.unflatten(0, (-1, self.d_head))

    def _placed(self, x: Heads, norm: HeadNorm | None, reading: Reading) -> Heads:
        """QK norm and RoPE, in the family's order."""
        if norm is not None and self.learned_norm:
            x = norm(x)
        if self.rope_layout is not None:
            x = rotate(x, reading.rotation, self.rope_layout)
        return norm(x) if norm is not None and not self.learned_norm else x

    def _cooled(self, q: Heads, reading: Reading) -> Heads:
        """Llama 4's attention temperature."""
        if self.temperature is None:
            return q
        blocks = ((reading.positions + 1) / self.temperature.floor).floor()
        factor = self.temperature.scale * blocks.log1p() + 1
        return (q * factor[..., None, None]).to(q.dtype)

    def _attend(self, q: Queries, k: Keys, v: Keys, asking: Reading) -> Queries:
        seen, nothing = asking.visible[self.mask], None
        causal = seen is None and q.shape[1] > 1
        if seen is not None and asking.padded:
            # A query that sees nothing would be 0/0: let it see everything, and discard the result.
            nothing = ~seen.any(dim=-1, keepdim=True)
            seen = seen | nothing
        z = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=self.n_kv != self.n_heads,
        )
        return (z if nothing is None else z.masked_fill(nothing, 0)).transpose(1, 2)

    def _attend_eagerly(self, q: Queries, k: Keys, v: Keys, asking: Reading) -> Queries:
        seen, n_queries, n_keys = asking.visible[self.mask], q.shape[1], k.shape[1]
        if seen is None:
            index = torch.arange(n_keys, device=q.device)
            seen = (index <= index[-n_queries:, None])[None, None]
        grouped = rearrange(q, "batch query (kv group) d -> batch kv group query d", kv=self.n_kv)
        keys, values = (rearrange(x, "batch key kv d -> batch kv 1 key d") for x in (k, v))
        scores = (grouped @ keys.transpose(-1, -2) * self.scale).flatten(1, 2)
        scores = self.hook_attn_scores(scores.masked_fill(~seen, -torch.inf))
        nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
        softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
        pattern = scores.masked_fill(nothing, 0).softmax(dim=-1, dtype=softmax_dtype)
        pattern = self.hook_pattern(pattern.masked_fill(nothing, 0).to(q.dtype))
        z = pattern.unflatten(1, (self.n_kv, -1)) @ values
        return rearrange(z, "batch kv group query d -> batch query (kv group) d")

    def _output(self, z: Heads) -> Float[Tensor, "batch pos d_model"]:
        if not self.hook_result.listening:
            return self.o(z.reshape(*z.shape[:2], -1))
        result = einsum(z, self.W_O, "batch pos head d, head d d_model -> batch pos head d_model")
        out = self.hook_result(result).sum(dim=2)
        return out if self.o.bias is None else out + self.o.bias

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights by head."""
        return self.q.weight.unflatten(0, (-1, self.d_head)).transpose(1, 2)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights by key-value head."""
        return self.k.weight.unflatten(0, (-1, self.d_head)).transpose(1, 2)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights by key-value head."""
        return self.v.weight.unflatten(0, (-1, self.d_head)).transpose(1, 2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights by head."""
        return self.o.weight.T.unflatten(0, (-1, self.d_head))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the family has none."""
        return (
            self.o.weight.new_zeros(self.o.weight.shape[0]) if self.o.bias is None else self.o.bias
        )
