"""The logit lens: reading the residual stream in the vocabulary (nostalgebraist 2020).

1. Keep the stream at one site of every layer, or what a layer adds to it there.
2. Pass it through the last norm and the unembedding: what the model would predict if it stopped
   there, or if it had this addition alone.
3. Give the likeliest tokens of each layer and position, and how far its distribution is from that
   of the model's own output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.lens.common import wide
from llama_probe.model.llama import Llama

_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "shared_out")
_MOST_LOGITS = 2**24  # computed at once: 64 MiB in float32


@torch.no_grad()
def logit_lens(
    model: Llama,
    prompt: Any,
    *,
    at: str = "resid_pre",
    top_k: int = 5,
    watch: str | int | Sequence[str | int] | None = None,
) -> pd.DataFrame:
    """What each layer would predict at each position.

    Streams and additions alike are scaled by a norm of their own, as if they were the final
    stream. Ranks do not depend on that scale; probabilities, entropy and KL do.

    Logits are computed for some positions of one layer at a time, so memory does not grow with the
    vocabulary times the prompt.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        at: The site: a stream ("resid_pre", "resid_mid", "resid_post") or what is added to it
            ("attn_out", "mlp_out"; "shared_out" in layers with a shared expert).
        top_k: How many of the likeliest tokens to give.
        watch: One or more tokens, as text of one token or as ids, to follow through all layers.

    Returns:
        One row for each layer, position and rank: `layer` (with "resid_pre", 0 is the embedding
        and n_layers the model's own output), `site`, `pos`, `input_token` (text at that position),
        `rank` (0: likeliest), `token` (its text), `token_id`, `prob` (a fraction), `logit`, and for
        the position as a whole `entropy` (nats, of all tokens' probabilities) and `kl` (nats: the
        divergence of this layer's distribution from that of the model's output, KL(output ‖ layer);
        0 where they agree). With `watch`, each watched token has a row as well where it is not
        among the likeliest, and `watched` says which rows are theirs.

    Raises:
        InputError: There is more than one prompt, the site is unknown or this model has none,
            `top_k` is out of range, or a watched text is not one token.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> frame = logit_lens(Llama(cfg), torch.tensor([1, 2, 3]), top_k=1)
    >>> len(frame), int(frame.layer.max()), float(frame.kl.iloc[-1])
    (9, 2, 0.0)
    >>> frame = logit_lens(Llama(cfg), torch.tensor([1, 2, 3]), at="mlp_out", watch=[7, 8])
    >>> int(frame.watched.sum())
    12
    """
    _check(model, at, top_k)
    watched = _ids(model, watch)
    tokens, mask = model.one_prompt(prompt)
    streams, final = _streams(model, tokens, mask, at)
    texts = model.to_str_tokens(tokens[0])
    frames = []
    positions = torch.arange(len(texts), device=final.device)
    for some in positions.split(max(1, _MOST_LOGITS // model.cfg.d_vocab)):
        output = _logits(model, final[some]).log_softmax(dim=-1)
        for layer, stream in streams.items():
            logits = _logits(model, stream[some])
            rows = _tokens(logits, top_k, watched) | _distances(logits, output)
            frames.append(_frame(model, layer, int(some[0]), rows))
    frame = pd.concat(frames).sort_values(["layer", "pos", "rank"], ignore_index=True)
    frame.insert(1, "site", at)
    frame.insert(3, "input_token", [texts[pos] for pos in frame["pos"]])
    if watch is not None:
        frame["watched"] = frame["token_id"].isin(watched.tolist())
    return frame


def _check(model: Llama, at: str, top_k: int) -> None:
    if at not in _SITES:
        raise InputError(f"at is {at!r}, but should be one of {', '.join(_SITES)}")
    if not any(act_name(at, layer) in model.hook_dict for layer in range(model.cfg.n_layers)):
        raise InputError(f"at is {at!r}, but no layer of this model has a shared expert")
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise InputError(f"top_k is {top_k}, but should be 1 to {model.cfg.d_vocab}")


def _ids(model: Llama, watch: str | int | Sequence[str | int] | None) -> Int[Tensor, " watched"]:
    several = [watch] if isinstance(watch, str | int) else watch or []
    ids = dict.fromkeys(map(model.to_single_token, several))
    return torch.tensor(list(ids), dtype=torch.long, device=model.cfg.device)


def _streams(
    model: Llama, tokens: Int[Tensor, "1 pos"], mask: Tensor, at: str
) -> tuple[dict[int, Float[Tensor, "pos d_model"]], Float[Tensor, "pos d_model"]]:
    """What is at the site, by layer, and the final stream."""
    n_layers = model.cfg.n_layers
    names = [act_name(at, "*"), act_name("resid_post", n_layers - 1)]
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names, logits_at=-1)
    final = cache["resid_post", n_layers - 1][0]
    layers = [layer for layer in range(n_layers) if act_name(at, layer) in model.hook_dict]
    streams = {layer: cache[at, layer][0] for layer in layers}
    return streams | {n_layers: final} if at == "resid_pre" else streams, final


def _logits(model: Llama, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
    return wide(model.unembed(model.ln_final.unhooked(stream)))


def _tokens(
    logits: Float[Tensor, "pos d_vocab"], top_k: int, watched: Int[Tensor, " watched"]
) -> dict[str, Tensor]:
    """The likeliest tokens and then the watched ones that are not among them, a row each."""
    n_pos = logits.shape[0]
    top = logits.topk(top_k, dim=-1).indices
    ids = torch.cat((top, watched.expand(n_pos, -1)), dim=-1)
    ranks = torch.arange(top_k, device=top.device).expand(n_pos, -1)
    ranks = torch.cat((ranks, top_k + _ranks_below(logits, top, watched)), dim=-1)
    known = (watched[None, :, None] == top[:, None, :]).any(dim=-1)
    kept = torch.cat((torch.ones_like(top, dtype=torch.bool), ~known), dim=-1)
    return {
        "pos": kept.nonzero()[:, 0],
        "rank": ranks[kept],
        "token_id": ids[kept],
        "prob": logits.softmax(dim=-1).gather(-1, ids)[kept],
        "logit": logits.gather(-1, ids)[kept],
    }


def _ranks_below(
    logits: Float[Tensor, "pos d_vocab"],
    top: Int[Tensor, "pos rank"],
    watched: Int[Tensor, " watched"],
) -> Int[Tensor, "pos watched"]:
    """How many of the tokens that are not on top come before each watched one.

    Of equal logits, which are common in bfloat16, the lower id comes first: no two share a rank.
    """
    rest = logits.scatter(-1, top, -torch.inf)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    counts = [
        ((rest > own) | ((rest == own) & (ids < token))).sum(dim=-1)
        for token, own in zip(watched, logits[:, watched, None].unbind(dim=1), strict=True)
    ]
    return torch.stack(counts, dim=-1) if counts else top[:, :0]


def _distances(
    logits: Float[Tensor, "pos d_vocab"], output: Float[Tensor, "pos d_vocab"]
) -> dict[str, Tensor]:
    """Entropy of each position's distribution, and the output's divergence from it, in nats."""
    log_probs = logits.log_softmax(dim=-1)
    kl = (output.exp() * (output - log_probs)).sum(dim=-1)
    # It is never negative, but for rounding.
    return {
        "entropy": torch.special.entr(log_probs.exp()).sum(dim=-1),
        "kl": kl.clamp(min=0),
    }


def _frame(model: Llama, layer: int, start: int, rows: Mapping[str, Tensor]) -> pd.DataFrame:
    """The rows of some positions of a layer; what is known by position is repeated."""
    pos = rows["pos"]
    return pd.DataFrame(
        {
            "layer": layer,
            "pos": (pos + start).tolist(),
            "rank": rows["rank"].tolist(),
            "token": model.to_str_tokens(rows["token_id"]),
            "token_id": rows["token_id"].tolist(),
            "prob": rows["prob"].tolist(),
            "logit": rows["logit"].tolist(),
            "entropy": rows["entropy"][pos].tolist(),
            "kl": rows["kl"][pos].tolist(),
        }
    )
