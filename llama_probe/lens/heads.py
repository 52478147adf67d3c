"""What each attention head looks at, in a few numbers.

On random tokens that are repeated, only position and repetition can tell tokens apart, so what a
head does there it does by mechanism. Induction is the prefix matching of Olsson et al. 2022 (arXiv
2209.11895): from a token, look at what came after the same token earlier on.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, act_name, reads_only
from llama_probe.lens.common import wide
from llama_probe.model.llama import Llama

METRICS = ("entropy", "previous_token", "first_token", "duplicate_token", "induction")


@torch.no_grad()
def head_scores(
    model: Llama, prompts: Any = None, *, n: int = 16, length: int = 32, seed: int = 0
) -> pd.DataFrame:
    """Attention summaries of every head, on random repeated tokens or on given text.

    "previous_token", "first_token", "duplicate_token" and "induction" are the weight (a fraction)
    that a query puts on the token before it, on position 0, on earlier occurrences of its own
    token, and on what came right after those. "entropy" is that of the weights in nats, not
    normalised: ln(k) where a query looks at k keys alike. Each is averaged over the queries of a
    sequence that have such a key (entropy: all but the first, which sees itself alone), then over
    sequences.

    A key that a sliding or chunked mask hides counts, with the weight 0 that it has: in such a
    layer a low score may be the mask's doing. Repeats are all within sight if a sequence, twice
    `length` and perhaps BOS, fits into `cfg.window` (one that starts at position 0, for chunks).

    Args:
        model: The model.
        prompts: A text, a list of texts, or tokens [pos] or [batch pos]; None for random tokens:
            `length` different ones, none of them special, and then the same again, after BOS where
            the checkpoint's texts begin with it.
        n: How many random sequences.
        length: How many random tokens, before they are repeated.
        seed: Of the random tokens.

    Returns:
        One row for each head and metric: `layer`, `head`, `metric`, `value`, `ci_low` and `ci_high`
        (95 %, bootstrap over sequences), `n` (sequences; those without a repeat say nothing of
        "duplicate_token" and "induction"). What nothing is known of is missing: the value where
        nothing repeats, the interval where there is one sequence only.

    Raises:
        InputError: A sequence has one token only or does not fit into the context, `n` or `length`
            is out of range, or the vocabulary is too small for `length` different tokens.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> frame = head_scores(Llama(cfg), n=3, length=8)
    >>> list(frame.metric[:5])
    ['entropy', 'previous_token', 'first_token', 'duplicate_token', 'induction']
    >>> frame = head_scores(Llama(cfg), torch.tensor([1, 2, 3]))  # nothing repeats
    >>> frame.value.isna().sum() == 2 * cfg.n_layers * cfg.n_heads
    np.True_
    """
    if prompts is None:
        sequences = _random_sequences(model, n, length, seed)
    else:
        sequences = _given_sequences(model, prompts)
    return _frame(torch.stack([_scores(model, tokens) for tokens in sequences]))


def _random_sequences(model: Llama, n: int, length: int, seed: int) -> list[Int[Tensor, " pos"]]:
    tokenizer = model.tokenizer
    start = [] if tokenizer is None or not tokenizer.add_bos else [tokenizer.bos_token_id]
    if n < 1 or length < 2:
        raise InputError(f"n is {n} and length {length}, but should be at least 1 and 2")
    if len(start) + 2 * length > model.cfg.n_ctx:
        raise InputError(
            f"length is {length}, so that a sequence has {len(start) + 2 * length} tokens, "
            f"but the context is {model.cfg.n_ctx}"
        )
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(n):
        block = list(islice(_shuffled(model, generator), length))
        if len(block) < length:
            raise InputError(f"length is {length}, but the vocabulary has {len(block)} such tokens")
        sequences.append(torch.tensor([*start, *block, *block], device=model.cfg.device))
    return sequences


def _shuffled(model: Llama, generator: torch.Generator) -> Iterator[int]:
    """All tokens that stand for text, in random order."""
    tokenizer = model.tokenizer
    for token in torch.randperm(model.cfg.d_vocab, generator=generator).tolist():
        if tokenizer is None or tokenizer.decode([token], skip_special=True):
            yield token


def _given_sequences(model: Llama, prompts: Any) -> list[Int[Tensor, " pos"]]:
    """Each prompt by itself, so that there is no padding among the keys."""
    if isinstance(prompts, list | tuple) and all(isinstance(one, str) for one in prompts):
        rows = [model.to_tokens(text)[0] for text in prompts]
    else:
        tokens, mask = model.tokens_and_mask(prompts)
        rows = [row[real] for row, real in zip(tokens, mask, strict=True)]
    if not rows:
        raise InputError("there is no prompt to look at: the list is empty")
    for index, row in enumerate(rows):
        if len(row) < 2:
            raise InputError(
                f"prompt {index} has one token, which can look at nothing but itself: give it two"
            )
    return rows


def _scores(model: Llama, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "layer metric head"]:
    """One sequence's scores; patterns are summed up as they come, never kept."""
    wanted = wanted_keys(tokens)
    layers = []

    @reads_only
    def summarise(pattern: Tensor, hook: HookPoint) -> None:
        layers.append(summaries(wide(pattern[0, :, 1:]), wanted[:, 1:]))

    with model.hooks([(act_name("pattern", "*"), summarise)]):
        model(tokens[None], attention_mask=torch.ones_like(tokens)[None], logits_at=-1)
    return torch.stack(layers).cpu()


def wanted_keys(tokens: Int[Tensor, " pos"]) -> Bool[Tensor, "target query key"]:
    """For each score but the entropy, the keys that count for each query, in `METRICS`' order.

    The first query sees itself alone, and has none.
    """
    index = torch.arange(len(tokens), device=tokens.device)
    earlier = index < index[:, None]
    previous = index == index[:, None] - 1
    first = earlier & (index == 0)
    duplicate = earlier & (tokens == tokens[:, None])
    after = duplicate.roll(1, dims=1)  # the last column, which comes to the front, is all False
    return torch.stack((previous, first, duplicate, after & earlier))


def summaries(
    pattern: Float[Tensor, "head query key"], wanted: Bool[Tensor, "target query key"]
) -> Float[Tensor, "metric head"]:
    """The entropy of each head, then its weight on each target, over queries that have one."""
    scores = [torch.special.entr(pattern).sum(dim=-1).mean(dim=-1)]
    for keys in wanted:
        queries = keys.any(dim=-1)
        # The mean of none is missing (NaN).
        scores.append((pattern * keys).sum(dim=-1)[:, queries].mean(dim=-1))
    return torch.stack(scores)


def _frame(scores: Float[Tensor, "sequence layer metric head"]) -> pd.DataFrame:
    values = scores.numpy()
    rows = [
        (layer, head, metric, *_estimate(values[:, layer, index, head]))
        for layer in range(values.shape[1])
        for head in range(values.shape[3])
        for index, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(
        rows, columns=["layer", "head", "metric", "value", "ci_low", "ci_high", "n"]
    )


def _estimate(values: Float[np.ndarray, " sequence"]) -> tuple[float, float, float, int]:
    known = values[~np.isnan(values)]
    if len(known) > 1:
        return stats.mean(known)
    return (float(known[0]) if len(known) else np.nan), np.nan, np.nan, len(known)
