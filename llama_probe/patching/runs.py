"""The two runs that a patch sweep starts from: prompts in pairs, and what is kept of each run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import ActivationCache, HookPoint, act_name, reads_only
from llama_probe.model.llama import Llama
from llama_probe.patching.metrics import Metric, measured
from llama_probe.patching.sites import Site

Answers = int | Sequence[int]


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts that agree in length, padded on the left.

    Attributes:
        clean: Tokens of the clean prompts.
        corrupted: Tokens of the corrupted ones; the clean ones again where there are none.
        real: Which tokens are no padding.
        answer: The position whose prediction is measured, padding counted.
        first: The first position at which a pair differs, padding counted.
    """

    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    real: Bool[Tensor, "prompt pos"]
    answer: Int[Tensor, " prompt"]
    first: Int[Tensor, " prompt"]

    @cached_property
    def mask(self) -> Bool[Tensor, "prompt pos"] | None:
        """The attention mask, None where nothing is padding."""
        return None if bool(self.real.all()) else self.real


def pairs_of(model: Llama, clean: Any, corrupted: Any, answer_at: Answers = -1) -> Pairs:
    """Tokens of clean and corrupted prompts, one of each or as many.

    Raises:
        InputError: They differ in number or in length, or there is no such answer position.
    """
    (tokens, real), (other, other_real) = map(model.tokens_and_mask, (clean, corrupted))
    if len(tokens) != len(other):
        raise InputError(f"there are {len(tokens)} clean prompts, but {len(other)} corrupted ones")
    lengths, others = real.sum(dim=1), other_real.sum(dim=1)
    for row in (lengths != others).nonzero().flatten().tolist():
        shown = (
            model.to_str_tokens(ids[mask.bool()])
            for ids, mask in ((tokens[row], real[row]), (other[row], other_real[row]))
        )
        raise InputError(
            f"the clean prompt{f' {row}' if len(tokens) > 1 else ''} has {lengths[row]} tokens and "
            f"the corrupted one {others[row]}: positions only correspond where the lengths are "
            "equal\n  clean:     {}\n  corrupted: {}".format(*shown)
        )
    longest = int(lengths.max())  # padding that all rows share tells nothing
    tokens, other, real = (x[:, -longest:] for x in (tokens, other, real.bool()))
    differ = (tokens != other) & real
    first = torch.where(differ.any(dim=1), differ.long().argmax(dim=1), longest)
    return Pairs(tokens, other, real, _answer(answer_at, lengths, longest), first)


def _answer(answer_at: Answers, lengths: Tensor, longest: int) -> Int[Tensor, " prompt"]:
    at = torch.as_tensor(answer_at, device=lengths.device)
    if at.is_floating_point() or at.ndim > 1 or (at.ndim == 1 and len(at) != len(lengths)):
        raise InputError(
            f"answer_at is {answer_at}, but should be a position, or one for each of the "
            f"{len(lengths)} prompts"
        )
    if ((at >= lengths) | (at < -lengths)).any():
        raise InputError(
            f"answer_at is {answer_at}, but the prompts have {lengths.tolist()} tokens"
        )
    return torch.where(at < 0, longest + at, longest - lengths + at)


@dataclass(frozen=True)
class Run:
    """What is known of one run of all prompts.

    Attributes:
        tokens: What was read.
        logits: At the answer position.
        cache: The hooks that were asked for.
    """

    tokens: Int[Tensor, "prompt pos"]
    logits: Float[Tensor, "prompt d_vocab"]
    cache: ActivationCache


def run(model: Llama, tokens: Int[Tensor, "prompt pos"], pairs: Pairs, names: list[str]) -> Run:
    """One run of the clean or the corrupted prompts, with what hooks of these names pass on."""
    logits, cache = model.run_with_cache(
        tokens, attention_mask=pairs.real, names_filter=names, logits_at=pairs.answer
    )
    return Run(tokens, logits[:, 0], cache)


def both_runs(
    model: Llama, pairs: Pairs, clean_names: list[str], corrupted_names: list[str]
) -> tuple[Run, Run]:
    """The clean and the corrupted run in one pass, each with what its hooks pass on."""
    asked_of = set(clean_names), set(corrupted_names)
    wanted = {name: tuple(name in asked for asked in asked_of) for name in set.union(*asked_of)}
    kept: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    @reads_only
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        halves = tensor.detach().chunk(2)
        for into, half, asked in zip(kept, halves, wanted[str(hook.name)], strict=True):
            if asked:
                # Alone, a half would keep both in memory.
                into[str(hook.name)] = half if all(wanted[str(hook.name)]) else half.clone()

    with model.hooks([(list(wanted), keep)]):
        logits = model(
            torch.cat((pairs.clean, pairs.corrupted)),
            attention_mask=pairs.real.repeat(2, 1),
            logits_at=pairs.answer.repeat(2),
        )
    clean, corrupted = (
        Run(tokens, half[:, 0], ActivationCache(cache, model))
        for tokens, half, cache in zip(
            (pairs.clean, pairs.corrupted), logits.chunk(2), kept, strict=True
        )
    )
    return clean, corrupted


def target_and_source(clean: Any, corrupted: Any, direction: str) -> tuple[Any, Any]:
    """What is patched, and what is put into it."""
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def site_names(site: Site) -> list[str]:
    """The hooks that hold a site's values."""
    names = [site.hook(layer) for layer in site.layers]
    if site.needs_indices:
        names += [act_name("expert_indices", layer) for layer in site.layers]
    return names


def stream_names(model: Llama) -> list[str]:
    """The hooks from which a run can be continued at any layer and position."""
    words = ("resid_pre", "rot_k", "v")
    names = [act_name(word, layer) for layer in range(model.cfg.n_layers) for word in words]
    return [*names, act_name("resid_post", model.cfg.n_layers - 1)]


def ends(metric: Metric, clean: Run, corrupted: Run) -> tuple[Tensor, Tensor]:
    """The metric of both runs, each [prompt].

    Raises:
        InputError: They agree, so that there is no effect to speak of.
    """
    values = measured(metric, clean.logits), measured(metric, corrupted.logits)
    means = [float(value.double().mean()) for value in values]
    if means[0] == means[1]:
        raise InputError(f"the metric is {means[0]} for both prompts: there is no effect to split")
    return values
