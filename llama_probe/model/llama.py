"""The instrumented Llama: one forward pass, every quantity named, every name editable.

A token's embedding enters the residual stream; each block adds what its attention and its
feed-forward compute from the normalised stream; the last norm and the unembedding turn the stream
into logits. Dense models and mixtures of experts, all kinds of RoPE and mask, padding, cached
decoding and partial runs are arguments of this one pass (`config.py` has the switches).

Hooks, with the prefix `blocks.{i}.` where they are a block's; b p = batch and position, h = query
heads (for k and v: key-value heads), d = d_model:

    hook_embed                        b p d         the token embeddings
    hook_resid_pre, _mid, _post       b p d         the residual stream
    ln1.hook_scale                    b p 1         what the norm divides by (ln2, ln_final alike)
    ln1.hook_normalized               b p d         the quotient, before the weight
    attn.hook_q, hook_k, hook_v       b p h d_head  the projections, before QK norm and RoPE
    attn.hook_rot_q, hook_rot_k       b p h d_head  as they enter the product: after QK norm, RoPE
                                                    and temperature
    attn.hook_attn_scores             b h q_p k_p   scaled and masked
    attn.hook_pattern                 b h q_p k_p   their softmax; 0 in a row that sees nothing
    attn.hook_z                       b p h d_head  the pattern times the values
    attn.hook_result                  b p h d       what each head adds to the stream
    attn.hook_q_input, _k_, _v_       b p h d       each head's own copy of the stream before ln1
    hook_mlp_in                       b p d         the feed-forward's own copy of it before ln2
    hook_attn_out, hook_mlp_out       b p d         what the two layers add to the stream
    mlp.hook_pre, hook_pre_linear     b p d_mlp     dense layers: gate and up projection
    mlp.hook_post                     b p d_mlp     dense layers: silu(gate) * up
    mlp.hook_router_…, hook_expert_…, hook_shared_…  mixtures of experts: see `moe.py`
    hook_logits                       b p d_vocab   the logits

The scores, the pattern, `hook_result` and the `…_input` copies are computed only where something
listens to them.
"""

import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llama_probe.errors import InputError
from llama_probe.hooks import HookedModel, HookPoint
from llama_probe.model import generation
from llama_probe.model.attention import Attention, Reading
from llama_probe.model.cache import KVCache
from llama_probe.model.config import LlamaConfig, Mask
from llama_probe.model.masks import visible
from llama_probe.model.mlp import MLP
from llama_probe.model.moe import MoE
from llama_probe.model.norm import RMSNorm
from llama_probe.model.rope import rotation
from llama_probe.model.text import ModelText
from llama_probe.model.weights import ModelWeights
from llama_probe.tokenizer import Tokenizer

Stream = Float[Tensor, "batch pos d_model"]
Asking = Float[Tensor, "batch query d_model"]


class Block(nn.Module):
    """One layer: attention, then the feed-forward, each adding to the residual stream."""

    hook_out_is_single_residual_stream = True  # asked by TransformerLens

    def __init__(self, cfg: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = RMSNorm(cfg.d_model, cfg.eps)
        self.attn = Attention(cfg, layer)
        self.ln2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = MoE(cfg) if cfg.moe_layers[layer] else MLP(cfg)

        self.hook_resid_pre = HookPoint()  # batch pos d_model
        self.hook_attn_out = HookPoint()  # batch pos d_model
        self.hook_resid_mid = HookPoint()  # batch pos d_model
        self.hook_mlp_in = HookPoint()  # batch pos d_model
        self.hook_mlp_out = HookPoint()  # batch pos d_model
        self.hook_resid_post = HookPoint()  # batch pos d_model

    def forward(self, resid: Stream, reading: Reading, only_last: bool = False) -> Asking:
        """The stream after this block; with `only_last`, at the last position alone."""
        resid = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self._attend(resid, reading, only_last))
        resid = self.hook_resid_mid((resid[:, -1:] if only_last else resid) + attn_out)
        mlp_in = self.hook_mlp_in(resid.clone()) if self.hook_mlp_in.listening else resid
        return self.hook_resid_post(resid + self.hook_mlp_out(self.mlp(self.ln2(mlp_in))))

    def _attend(self, resid: Stream, reading: Reading, only_last: bool) -> Asking:
        attn, normalized = self.attn, self.ln1(resid)
        hooks = (attn.hook_q_input, attn.hook_k_input, attn.hook_v_input)
        if not any(hook.listening for hook in hooks):
            asking = normalized[:, -1:] if only_last else normalized
            return attn(asking, normalized, normalized, reading)
        if not torch.allclose(normalized, self.ln1.unhooked(resid), rtol=0, atol=0, equal_nan=True):
            raise InputError(
                f"{self.ln1.hook_scale.name} or hook_normalized is edited while "
                f"{hooks[0].name} (or k, v) is listened to, which has each head normalise a "
                "stream of its own: edit one or the other"
            )
        n_heads = (attn.n_heads, attn.n_kv, attn.n_kv)
        inputs = (
            self.ln1.unhooked(hook(resid[:, :, None].repeat(1, 1, n, 1)))
            if hook.listening
            else normalized
            for hook, n in zip(hooks, n_heads, strict=True)
        )
        return attn(*inputs, reading)


class Llama(ModelText, ModelWeights, HookedModel):
    """A Llama-family model; `lp.load` makes one with trained weights.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> model = Llama(cfg)
    >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]), names_filter="*.hook_z")
    >>> logits.shape, cache["z", 1].shape
    (torch.Size([1, 3, 50]), torch.Size([1, 3, 4, 4]))
    """

    # TransformerLens' protocol looks these two up on the class.
    @property
    def blocks(self) -> Any:
        """The layers: a ModuleList of `Block`."""
        return self._modules["blocks"]

    @property
    def ln_final(self) -> RMSNorm:
        """The norm before the unembedding."""
        return cast(RMSNorm, self._modules["ln_final"])

    def __init__(self, cfg: LlamaConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        empty = torch.empty(cfg.d_vocab, cfg.d_model)
        # Drawing numbers on the meta device imports torch's compiler: a second, and for nothing.
        weight = empty if empty.is_meta else None
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model, _weight=weight)
        self.hook_embed = HookPoint()  # batch pos d_model
        # Set like this since the names are properties of the class.
        self._modules["blocks"] = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self._modules["ln_final"] = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        if cfg.tied:
            self.unembed.weight = self.embed.weight
        self.hook_logits = HookPoint()  # batch pos d_vocab
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.setup()
        self._apply(lambda tensor: tensor)

    def forward(
        self,
        input: Any,
        *,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: int | slice | Sequence[int] | Tensor | None = None,
        return_type: Literal["logits", "loss"] = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
    ) -> Tensor:
        """Run the model, or some of its layers.

        Args:
            input: Text, a list of texts (padded on the left), tokens [batch pos] or [pos]; with
                `start_at_layer`, the residual stream [batch pos d_model] that enters that layer
                (never edited).
            attention_mask: Which tokens are no padding [batch pos] (with `kv_cache` also [batch
                all]). None: known for texts; for tokens, derived from pad tokens at the start of
                rows (pads at the end need no mask; after what a `kv_cache` holds, and in a given
                stream, all count as real).
            kv_cache: What was read before; this pass adds to it.
            start_at_layer: First layer to run, on a given stream; negative numbers count from the
                end. None: all, from tokens.
            stop_at_layer: First layer not to run; the residual stream that would enter it is
                returned.
            logits_at: Compute logits (or the stream after the last layer) at these positions only:
                an int, a slice, a list, or a tensor [batch] with one for each row. The position
                axis stays. With -1 the last layer runs at the last position alone, unless
                something listens to one of its hooks.
            return_type: "loss" for the next token's cross-entropy in nats, in float32 at least;
                what `attention_mask` (or the rule above) calls padding is left out.
            loss_per_token: Keep the losses apart [batch pos-1]; those of padding are 0.
            prepend_bos: Whether texts begin with the BOS token; None: the checkpoint's own rule.

        Returns:
            Logits [batch pos d_vocab], the residual stream, or the loss.

        Raises:
            InputError: The input is empty, too long, out of range, of the wrong shape, or its
                padding is ambiguous.
        """
        start, stop = self._layers(start_at_layer or 0, stop_at_layer)
        partial = start_at_layer is not None or stop_at_layer is not None or logits_at is not None
        if return_type != "logits" and (return_type != "loss" or partial):
            raise InputError(
                "return_type should be 'logits', or 'loss' for a run over whole sequences of tokens"
            )
        tokens = None
        if start_at_layer is not None:
            resid, real = self._given_stream(input), attention_mask
        else:
            continued = kv_cache is not None and kv_cache.length > 0
            tokens, real = self.tokens_and_mask(
                input, attention_mask, prepend_bos=prepend_bos, continued=continued
            )
            resid = self.hook_embed(self.embed(tokens))
        new = resid.shape[1]
        reading, real = self._reading(resid, real, kv_cache)
        ends = start < stop == self.cfg.n_layers
        only_last = (
            ends and isinstance(logits_at, int) and logits_at == -1 and not self._hears_last()
        )
        for layer in range(start, stop):
            resid = self.blocks[layer](resid, reading, only_last and layer == stop - 1)
        if logits_at is not None and stop == self.cfg.n_layers:
            resid = _chosen(resid, logits_at)
        if stop_at_layer is None:
            resid = self.hook_logits(self.unembed(self.ln_final(resid)))
        if kv_cache is not None:
            kv_cache.advance(new, real)
        if return_type == "loss" and tokens is not None:
            return _loss(resid, tokens, None if real is None else real[:, -new:], loss_per_token)
        return resid

    def _hears_last(self) -> bool:
        """Whether anything listens to a hook of the last layer."""
        points = self.blocks[-1].modules()
        return any(point.listening for point in points if isinstance(point, HookPoint))

    def _layers(self, start: int, stop: int | None) -> tuple[int, int]:
        n = self.cfg.n_layers
        first = start + n if start < 0 else start
        last = n if stop is None else stop + n if stop < 0 else stop
        if not 0 <= first <= last <= n:
            raise InputError(
                f"layers {start} to {stop} were asked for, but the model has layers 0 to {n - 1}"
            )
        return first, last

    def _given_stream(self, resid: Any) -> Stream:
        if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[2] != self.cfg.d_model:
            raise InputError(
                "with start_at_layer the input is the residual stream [batch pos "
                f"{self.cfg.d_model}], not {_described(resid)}"
            )
        return resid.clone()

    def _reading(
        self, resid: Stream, real: Tensor | None, cache: KVCache | None
    ) -> tuple[Reading, Bool[Tensor, "batch all"] | None]:
        """Positions, masks and RoPE of this pass, and which of all tokens are real."""
        new = resid.shape[1]
        past = cache.length if cache is not None else 0
        if past + new > self.cfg.n_ctx:
            raise InputError(
                f"the input has {past + new} tokens, but the context is {self.cfg.n_ctx}"
            )
        real = self._all_real(resid, real, cache)
        if real is None:
            positions = torch.arange(past + new, device=resid.device)[None]
        else:
            positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        seen: dict[Mask, Tensor | None] = {
            mask: visible(mask, self.cfg.window, positions, new, real)
            for mask in dict.fromkeys(self.cfg.masks)
        }
        now = positions[:, past:]
        factors = rotation(now, self.cfg, resid.dtype)
        return Reading(now, factors, seen, real is not None, cache), real

    def _all_real(
        self, resid: Stream, real: Tensor | None, cache: KVCache | None
    ) -> Bool[Tensor, "batch all"] | None:
        """Which tokens are no padding, earlier ones included; None where all are."""
        batch, new, _ = resid.shape
        past = cache.length if cache is not None else 0
        before = cache.real if cache is not None else None
        if real is None and before is None:
            return None
        if real is None:
            real = torch.ones(batch, new, dtype=torch.bool, device=resid.device)
        if tuple(real.shape) not in {(batch, new), (batch, past + new)}:
            raise InputError(
                f"attention_mask has shape {tuple(real.shape)}, but should have {(batch, new)}"
                + (f" or, with the cache, {(batch, past + new)}" if past else "")
            )
        if ((real != 0) & (real != 1)).any():
            raise InputError(
                "attention_mask should be 1 for tokens and 0 for padding, nothing else"
            )
        real = real.to(resid.device).bool()
        if before is not None and before.shape[0] != batch:
            raise InputError(f"the cache holds a batch of {before.shape[0]}, not of {batch}")
        if past and real.shape[1] == new:
            if before is None:
                before = torch.ones(batch, past, dtype=torch.bool, device=resid.device)
            real = torch.cat((before, real), dim=1)
        return None if real.all() else real

    generate = generation.generate

    def __repr__(self) -> str:
        """One line; `hook_dict` has the names of the hooks."""
        cfg = self.cfg
        experts = f", {cfg.moe.n_experts} experts (top {cfg.moe.top_k})" if cfg.moe else ""
        return (
            f"Llama({cfg.model_name}: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} "
            f"heads ({cfg.n_key_value_heads} KV){experts}, {cfg.dtype} on {cfg.device}, "
            f"{len(self.hook_dict)} hooks)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Llama":
        """Move or cast, and keep `cfg.device` and `cfg.dtype` true."""
        super()._apply(fn, recurse)
        weight = self.embed.weight
        self.cfg = self.cfg.but(device=weight.device, dtype=weight.dtype)
        return self


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _chosen(
    resid: Stream, at: int | slice | Sequence[int] | Tensor
) -> Float[Tensor, "batch chosen d_model"]:
    """The stream at some positions; the position axis stays."""
    batch, n_pos, _ = resid.shape
    if isinstance(at, slice):
        return resid[:, at]
    if isinstance(at, Tensor) and at.ndim == 1:
        if at.shape[0] != batch or at.is_floating_point() or at.dtype == torch.bool:
            raise InputError(f"logits_at has {_described(at)}, but the batch has {batch} rows")
        if at.min() < -n_pos or at.max() >= n_pos:
            raise InputError(
                f"logits_at has {at.tolist()}, but there are positions 0 to {n_pos - 1}"
            )
        return resid[torch.arange(batch, device=resid.device), at.to(resid.device)][:, None]
    wanted = list(at) if isinstance(at, Sequence) else [operator.index(at)]
    if not wanted or any(not -n_pos <= position < n_pos for position in wanted):
        raise InputError(f"logits_at has {wanted}, but there are positions 0 to {n_pos - 1}")
    return resid[:, wanted]


def _loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None,
    per_token: bool,
) -> Float[Tensor, ""] | Float[Tensor, "batch next"]:
    if tokens.shape[1] < 2:
        raise InputError("a loss needs at least two tokens: the first has nothing to predict it")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.unflatten(0, (tokens.shape[0], -1))
    if real is None:
        return losses if per_token else losses.mean()
    counted = real[:, 1:] & real[:, :-1]
    losses = losses.masked_fill(~counted, 0)
    return losses if per_token else losses.sum() / counted.sum()
