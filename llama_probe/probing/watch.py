"""A generation under a probe's eye: each token's score as soon as the model has read it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, reads_only
from llama_probe.model.cache import KVCache
from llama_probe.model.generation import _choose
from llama_probe.model.llama import Llama

if TYPE_CHECKING:
    from llama_probe.probing.monitor import Monitor


class Watched(NamedTuple):
    """A token of a watched generation.

    Attributes:
        pos: Its position, from 0, the prompt included.
        id: The token.
        token: Its text.
        new: Whether it was generated.
        score: The probe's score at this token; NaN for the last one, which the model never reads.
        running: The score of the text so far; NaN before the first token that counts.
        flagged: Whether `running` is above the threshold; None without one.
    """

    pos: int
    id: int
    token: str
    new: bool
    score: float
    running: float
    flagged: bool | None


class Sampling(NamedTuple):
    """How the next token is chosen; the arguments of `model.generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    random: torch.Generator
    stops: frozenset[int]


def watched(
    monitor: "Monitor",
    model: Llama,
    ids: Sequence[int],
    counts: Callable[[int], bool],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[Watched]:
    """The tokens of a prompt, then those that the model continues it with.

    One forward pass a token, as in `model.generate`, whose tokens these are; between two of them
    no hook is in the model. The pass that chooses a token does not read it, so that a token's
    score comes with the pass after it.

    Args:
        monitor: Its probe and its aggregate.
        model: The model.
        ids: The prompt.
        counts: Whether the token at a position counts in the score of the text.
        max_new_tokens: At most so many.
        sampling: How they are chosen.
    """
    cache = KVCache(model.cfg.n_layers)
    counted: list[float] = []
    pos = 0

    def seen(id: int, new: bool, score: float) -> Watched:
        if counts(pos) and not np.isnan(score):
            counted.append(score)
        running = monitor.aggregate.running(np.array(counted))[-1].item() if counted else np.nan
        flagged = None if monitor.threshold is None else running > monitor.threshold
        return Watched(pos, id, model.to_str_tokens([id])[0], new, score, running, flagged)

    unread = list(ids)
    for step in range(max_new_tokens):
        tokens = torch.tensor([unread], device=model.cfg.device)
        logits, activations = _read(model, tokens, monitor.hook, cache)
        scores = monitor.probe(activations)[:, 0].tolist()
        for id, score in zip(unread, scores, strict=True):
            if np.isnan(score):
                raise InputError(f"the activation of token {pos} at {monitor.hook} is not finite")
            yield seen(id, step > 0, score)
            pos += 1
        chosen = _choose(
            logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.random
        )
        unread = chosen.tolist()
        if unread[0] in sampling.stops:
            break
    yield seen(unread[0], True, np.nan)


@torch.no_grad()
def _read(
    model: Llama, tokens: Int[Tensor, "1 pos"], hook: str, cache: KVCache
) -> tuple[Float[Tensor, "1 d_vocab"], Float[Tensor, "pos d"]]:
    """One step of generation: the next token's logits, and what the hook passed on meanwhile."""
    kept: list[Tensor] = []

    @reads_only
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept.append(tensor[0].flatten(1))

    logits = model.run_with_hooks(
        tokens,
        attention_mask=torch.ones_like(tokens),
        kv_cache=cache,
        logits_at=-1,
        fwd_hooks=[(hook, keep)],
    )
    return logits[:, -1], kept[0].cpu()
