"""How likely a model is to begin with a refusal, and which tokens begin its refusals."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.judges import declines

# The ids of Arditi et al. (2024, arXiv 2406.11717), with the text that each stands for. For Gemma
# the caption of the paper's Figure 10 prints 234285; its Table 4 and its code say 235285.
REFUSAL_TOKENS: dict[str, dict[int, str]] = {
    "llama-2": {306: " I"},
    "llama-3": {40: "I"},
    "qwen": {40: "I", 2121: "As"},
    "gemma": {235285: "I"},
    "yi": {59597: "I"},
}
# Three families are of one kind of model, and differ in the size of their vocabulary, to which
# fine-tuning may have added a few tokens.
_LLAMAS = {"llama-2": 32000, "yi": 64000, "llama-3": 128256}
_ADDED = 1000

_EPSILON = 1e-8
_KL_EPSILON = 1e-6


def refusal_score(
    logits: Float[Tensor, "batch d_vocab"], tokens: Sequence[int]
) -> Float64[Tensor, " batch"]:
    """The log odds that the next token is one that begins a refusal.

    log(p + 1e-8) - log(1 - p + 1e-8) in float64, with p the summed probability of the tokens
    (Arditi et al. 2024, arXiv 2406.11717): from -18.42 to 18.42, positive where p is above 1/2.

    Args:
        logits: At the last position of each prompt.
        tokens: The ids that begin a refusal; see `refusal_tokens`.

    Returns:
        One score a prompt; NaN where the logits are not finite.

    Raises:
        InputError: There are no tokens, one is there twice, or one is out of range.

    >>> refusal_score(torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]), [0]).round(decimals=4).tolist()
    [0.0, -18.4207]
    """
    _check_ids(tokens, logits.shape[-1])
    p = logits.double().softmax(dim=-1)[:, list(tokens)].sum(dim=-1)
    return (p + _EPSILON).log() - (1 - p + _EPSILON).log()


def mean_kl(
    base_logits: Float[Tensor, "batch d_vocab"], edited_logits: Float[Tensor, "batch d_vocab"]
) -> Float64[Tensor, " batch"]:
    """KL(baseline ‖ edited) of the next token, in nats, as the published pipeline computes it.

    In float64, with 1e-6 added inside both logarithms (Arditi et al. 2024, arXiv 2406.11717). That
    bounds the cost of a token that the edit rules out, and bends small divergences, which can
    even come out below 0 where the vocabulary is large. The published `kl_div_score` of a
    candidate is the mean of this over the harmless prompts.

    Args:
        base_logits: At the last position of each prompt, without the edit.
        edited_logits: The same with it.

    Returns:
        One divergence a prompt.

    >>> same = torch.tensor([[0.0, 1.0]])
    >>> mean_kl(same, same).item()
    0.0
    """
    base, edited = (x.double().softmax(dim=-1) for x in (base_logits, edited_logits))
    return (base * ((base + _KL_EPSILON).log() - (edited + _KL_EPSILON).log())).sum(dim=-1)


def refusal_tokens(
    model: Llama,
    responses: Sequence[Any] | None = None,
    harmless_responses: Sequence[Any] | None = None,
    *,
    min_share: int | float = 0.05,
    min_odds: int | float = 10.0,
) -> list[int]:
    """The token ids that begin a model's refusals.

    From its own responses: the tokens that begin at least `min_share` of its refusals, and whose
    odds of beginning a refusal are at least `min_odds` times those of beginning a harmless answer
    (`opening_tokens` shows the figures). A token such as "I" that begins both is taken if it
    begins refusals that much more readily. Without responses: the published ids of the model's
    family, if its tokenizer agrees that they stand for what was published.

    Args:
        model: With a tokenizer.
        responses: The tokens of its responses to what it should decline, such as
            `model.generate(…, return_type="tokens")` gives; only those that decline are read.
        harmless_responses: Its responses to harmless prompts; those that decline are left out.
        min_share: Of the refusals.
        min_odds: The ratio of the two odds.

    Returns:
        The ids, the most frequent first (published ones: as published).

    Raises:
        InputError: No token qualifies, one of the two kinds of responses is missing, the family is
            not in `REFUSAL_TOKENS`, or its tokenizer is another one.
    """
    if responses is None and harmless_responses is None:
        return _published(model)
    if responses is None or harmless_responses is None:
        raise InputError(
            "refusal tokens are found by comparing responses with harmless_responses: give both"
        )
    found = opening_tokens(model, responses, harmless_responses)
    kept = found[(found["share"] >= min_share) & (found["odds_ratio"] >= min_odds)]
    if kept.empty:
        best = found.sort_values("odds_ratio", ascending=False).iloc[0]
        raise InputError(
            f"no token begins {min_share:.0%} of the refusals with {min_odds:g} times the odds of "
            f"harmless answers; nearest is {best['text']!r} with {best['share']:.0%} and "
            f"{best['odds_ratio']:.3g}: give more responses, or name the tokens yourself"
        )
    return kept["token"].tolist()


def opening_tokens(
    model: Llama, responses: Sequence[Any], harmless_responses: Sequence[Any]
) -> pd.DataFrame:
    """What a model's refusals begin with, against its harmless answers.

    A response counts as a refusal by `declines`. Half a response is added to each count of the odds
    ratio (Haldane 1956; Anscombe 1956), which is thereby finite, and near 1 for a handful of
    responses.

    Args:
        model: With a tokenizer.
        responses: The tokens of its responses to what it should decline.
        harmless_responses: Of those to harmless prompts.

    Returns:
        One row for each token that begins a refusal, the most frequent first: `token text refusals
        answers share odds_ratio`. `refusals` and `answers` count what begins with it, `share` is
        of the refusals. attrs: `n_refusals`, `n_answers`.

    Raises:
        InputError: A response holds no tokens, none of `responses` declines, or all of
            `harmless_responses` do.
    """
    refusals = Counter(
        first for first, declined in _openings(model, responses, "responses") if declined
    )
    harmless = _openings(model, harmless_responses, "harmless_responses")
    answers = Counter(first for first, declined in harmless if not declined)
    n, m = refusals.total(), answers.total()
    if not n:
        raise InputError(f"none of the {len(responses)} responses declines, going by its phrases")
    if not m:
        raise InputError(f"none of the {len(harmless_responses)} harmless_responses is an answer")
    rows = []
    for token, k in sorted(refusals.items(), key=lambda item: (-item[1], item[0])):
        other = answers[token]
        odds = (k + 0.5) / (n - k + 0.5) * (m - other + 0.5) / (other + 0.5)
        rows.append((token, model.to_str_tokens([token])[0], k, other, k / n, odds))
    columns = ["token", "text", "refusals", "answers", "share", "odds_ratio"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs |= {"n_refusals": n, "n_answers": m}
    return frame


def _openings(model: Llama, responses: Sequence[Any], name: str) -> list[tuple[int, bool]]:
    """The first token of each response, and whether it declines."""
    found = []
    for row, response in enumerate(responses):
        ids = [] if isinstance(response, str) else torch.as_tensor(response).flatten().tolist()
        if not ids or not all(isinstance(token, int) for token in ids):
            raise InputError(
                f"{name} {row} should be token ids, at least one: "
                "see model.generate(…, return_type='tokens')"
            )
        found.append((ids[0], bool(declines("", model.to_string(ids)))))
    return found


def _published(model: Llama) -> list[int]:
    family = _family(model)
    if family is None or model.tokenizer is None:
        raise InputError(
            f"no refusal tokens are published for {model.cfg.model_name} and its tokenizer (there "
            f"are some for {', '.join(REFUSAL_TOKENS)}): give responses and harmless_responses"
        )
    ids = REFUSAL_TOKENS[family]
    there = model.tokenizer.str_tokens(list(ids))
    for (token, text), own in zip(ids.items(), there, strict=True):
        if own != text:
            raise InputError(
                f"token {token} of the family {family} is published as {text!r}, but here it is "
                f"{own!r}, so this is another tokenizer: give responses and harmless_responses"
            )
    return list(ids)


def _family(model: Llama) -> str | None:
    kind = model.cfg.model_type
    if kind != "llama":
        return next((family for family in ("qwen", "gemma") if kind.startswith(family)), None)
    size = model.tokenizer.vocab_size if model.tokenizer is not None else 0
    return next((name for name, n in _LLAMAS.items() if n <= size <= n + _ADDED), None)


def _check_ids(tokens: Sequence[int], d_vocab: int) -> None:
    if not len(tokens):
        raise InputError("there are no refusal tokens: see refusal_tokens")
    for token in tokens:
        if not 0 <= token < d_vocab:
            raise InputError(
                f"refusal token {token} does not exist: ids go from 0 to {d_vocab - 1}"
            )
    if len(set(tokens)) < len(tokens):
        raise InputError(f"the refusal tokens {list(tokens)} name one of them twice")
