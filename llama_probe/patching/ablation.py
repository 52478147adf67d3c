"""Ablation: what is lost where a head, a layer or a neuron says nothing of its own."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.patching.engine import Sweep
from llama_probe.patching.frames import Scale, frame_of
from llama_probe.patching.metrics import measured, resolved
from llama_probe.patching.patch import engine_of, finished, with_tokens
from llama_probe.patching.progress import Progress
from llama_probe.patching.runs import Answers, Pairs, Run, pairs_of, run, site_names, stream_names
from llama_probe.patching.sites import Positions, Site, cells_of, sites_of

_MEANS = ("zero", "mean", "resample")


@torch.no_grad()
def ablate_each(
    model: Llama,
    prompts: Any,
    *,
    metric: Any,
    at: str | Sequence[str] = "z",
    over: str | Sequence[str] | None = None,
    by: str = "mean",
    reference: Any = None,
    answer_at: Answers = -1,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    units: Iterable[int] | None = None,
    each: bool = False,
    engine: str = "fast",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> pd.DataFrame:
    """Ablate one site cell by cell, and measure what is lost of a prediction.

    Zero is far from anything the model has seen, and so overstates (Zhang and Nanda 2024, arXiv
    2309.16042; Wang et al. 2022, arXiv 2211.00593, use the mean): prefer "mean" or "resample".

    Args:
        model: The model.
        prompts: As `clean` of `lp.patch`.
        metric: As for `lp.patch`.
        at: As for `lp.patch`.
        over: As for `lp.patch`.
        by: What is put in: "zero"; "mean", over the reference prompts at the same position, which
            is counted from the end; "resample", the activation of another prompt at the same
            position, drawn once for all cells.
        reference: Prompts for mean and resampling; None: `prompts`.
        answer_at: As for `lp.patch`.
        layers: As for `lp.patch`.
        positions: As for `lp.patch`.
        units: As for `lp.patch`.
        each: As for `lp.patch`.
        engine: As for `lp.patch`.
        batch_size: As for `lp.patch`.
        seed: Of the bootstrap and of the resampling.
        progress: As for `lp.patch`.

    Returns:
        The columns of `lp.patch`, with `corrupted` missing: `effect` is the share of the metric
        that is lost, (clean - ablated) / clean.

    Raises:
        InputError: An argument is not one of those named, there are too few reference prompts, or
            the metric of the prompts is 0, of which no share can be lost.

    >>> from llama_probe.model.config import LlamaConfig
    >>> from llama_probe.patching.metrics import logit_diff
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = ablate_each(model, torch.tensor([1, 2, 3]), metric=logit_diff(5, 6), by="zero")
    >>> list(frame)
    ['layer', 'head', 'site', 'metric', 'effect', 'clean', 'corrupted']
    """
    begun = time.perf_counter()
    if by not in _MEANS:
        raise InputError(f"by is {by!r}, but should be one of {', '.join(_MEANS)}")
    sites = sites_of(model, at, over, positions, units)
    values = engine_of(engine, batch_size)
    pairs = pairs_of(model, prompts, prompts, answer_at)
    held = [name for site in sites for name in site_names(site)]
    target = run(model, pairs.clean, pairs, [*held, *stream_names(model)])
    measure = resolved(metric, model, target.logits)
    clean = measured(measure, target.logits).double().numpy(force=True)
    if clean.mean() == 0:
        raise InputError("the metric of the prompts is 0: there is nothing to lose")
    others = target, pairs
    if reference is not None and by != "zero":
        other_pairs = pairs_of(model, reference, reference)
        others = run(model, other_pairs.clean, other_pairs, held), other_pairs
    scale = Scale(clean, np.zeros_like(clean), clean, np.full_like(clean, np.nan))
    frames = []
    for site in sites:
        cells = cells_of(site, over, pairs.real, layers=layers, positions=positions, units=units)
        sweep = _sweep(model, pairs, site, target, _Putting(by, *others, reference is None, seed))
        ablated = values(sweep, cells, measure, batch_size=batch_size, progress=progress)
        frame = frame_of(cells, ablated, scale, pairs, site=site.name, each=each, seed=seed)
        frames.append(with_tokens(frame, model, target))
    return finished(frames, begun, by=by)


class _Putting:
    """What an ablation puts in."""

    def __init__(self, by: str, others: Run, pairs: Pairs, own: bool, seed: int) -> None:
        self.by, self.others, self.pairs, self.own, self.seed = by, others, pairs, own, seed

    def source(self, site: Site, layer: int, target: Tensor) -> Tensor:
        """What is put into one layer [prompt pos …]."""
        if self.by == "zero":
            return torch.zeros_like(target)
        known = site.by_position(self.others.cache[site.hook(layer)])
        if self.by == "mean":
            return self._mean(known, target.shape[1]).expand_as(target)
        return known[self._drawn(len(target), target.shape[1])]

    def _mean(self, known: Tensor, n_pos: int) -> Tensor:
        """Over the prompts that have a position, counted from the end [pos …]."""
        if len(known) < 2:
            raise InputError("a mean needs several prompts: pass reference=[...]")
        real = self.pairs.real.to(known)
        if real.shape[1] < n_pos:
            raise InputError(
                f"the reference prompts have at most {real.shape[1]} tokens, the prompts {n_pos}"
            )
        weights = (real / real.sum(dim=0))[:, -n_pos:]
        return torch.einsum("rp,rp...->p...", weights, known[:, -n_pos:])

    def _drawn(self, n: int, n_pos: int) -> Tensor:
        """For each prompt another one."""
        if not bool(self.pairs.real.all()) or self.pairs.real.shape[1] != n_pos:
            raise InputError("resampling needs prompts of one length: others have no such position")
        draw = np.random.default_rng(self.seed)
        n_others = len(self.pairs.real)
        if not self.own:
            return torch.from_numpy(draw.integers(n_others, size=n))
        if n < 2:
            raise InputError("resampling needs several prompts: pass reference=[...]")
        order = draw.permutation(n)  # each takes the next in a ring, so never itself
        drawn = np.empty(n, dtype=np.int64)
        drawn[order] = np.roll(order, 1)
        return torch.from_numpy(drawn)


def _sweep(model: Llama, pairs: Pairs, site: Site, target: Run, putting: _Putting) -> Sweep:
    if site.needs_indices and putting.by != "zero":
        raise InputError(
            f"{site.name} can only be ablated by 'zero': each token has its own experts"
        )
    if site.name == "pattern" and putting.by != "zero" and not bool(pairs.real.all()):
        raise InputError("patterns of prompts of unequal length have no keys in common")
    known = {layer: site.by_position(target.cache[site.hook(layer)]) for layer in site.layers}
    source = {layer: putting.source(site, layer, tensor) for layer, tensor in known.items()}
    chosen = {}
    if site.needs_indices:
        chosen = {layer: target.cache["expert_indices", layer] for layer in site.layers}
    return Sweep(model, pairs, site, target, source, chosen, same_before=False)
