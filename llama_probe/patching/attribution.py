"""Attribution patching: every patch of a sweep estimated at once, from gradients.

A patch changes an activation a by (source - target); to first order the metric changes by that
times its gradient at the run that is patched (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). Two
forward passes and a backward one give all cells, but only to first order: saturated softmaxes and
norms hide effects. Two remedies:

1. "integrated": the gradient's average along the straight path between the two runs' embeddings
   (Hanna et al. 2024, arXiv 2403.17806), here at the middles of `steps` equal parts.
2. `qk_fix`: for queries and keys, the new attention pattern is computed exactly, and only what
   follows is linear (Kramár et al. 2024, arXiv 2403.00745).
"""

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import Hook, HookPoint, act_name
from llama_probe.model.llama import Llama
from llama_probe.patching.engine import Sweep
from llama_probe.patching.frames import Scale, frame_of
from llama_probe.patching.metrics import Metric, measured, resolved
from llama_probe.patching.patch import check_direction, finished, sweep_of, with_tokens
from llama_probe.patching.runs import (
    Answers,
    Pairs,
    Run,
    both_runs,
    ends,
    pairs_of,
    site_names,
    target_and_source,
)
from llama_probe.patching.sites import Cells, Positions, Site, cells_of, sites_of

_QUERIES, _KEYS = ("q", "rot_q"), ("k", "rot_k")


def attribution_patch(
    model: Llama,
    clean: Any,
    corrupted: Any,
    *,
    metric: Any,
    at: str | Sequence[str] = "resid_pre",
    over: str | Sequence[str] | None = None,
    direction: str = "denoise",
    method: str = "gradient",
    steps: int = 5,
    qk_fix: bool = False,
    answer_at: Answers = -1,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    units: Iterable[int] | None = None,
    each: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate what `lp.patch` would give; the arguments they share mean the same.

    Args:
        model: The model.
        clean: Prompts, as for `lp.patch`.
        corrupted: Prompts, as for `lp.patch`.
        metric: As for `lp.patch`; it has to be differentiable.
        at: As for `lp.patch`. Of router logits a gradient sees the weights of the chosen experts,
            never that others would have been chosen.
        over: As for `lp.patch`.
        direction: As for `lp.patch`.
        method: "gradient", at the run that is patched, or "integrated", along the path.
        steps: How many points of the path.
        qk_fix: For "q", "k", "rot_q" and "rot_k", compute the new pattern exactly.
        answer_at: As for `lp.patch`.
        layers: As for `lp.patch`.
        positions: As for `lp.patch`.
        units: As for `lp.patch`.
        each: As for `lp.patch`.
        seed: Of the bootstrap.

    Returns:
        The frame of `lp.patch`, with the estimated `metric` and `effect`.

    Raises:
        InputError: As `lp.patch`; also for a method that is not one of these, and `qk_fix` where
            there is nothing to fix.

    >>> from llama_probe.model.config import LlamaConfig
    >>> from llama_probe.patching.metrics import logit_diff
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> clean, corrupted = torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])
    >>> frame = attribution_patch(model, clean, corrupted, metric=logit_diff(5, 6), at="z")
    >>> frame.shape, frame.attrs["method"]
    ((8, 7), 'gradient')
    """
    begun = time.perf_counter()
    check_direction(direction)
    sites = sites_of(model, at, over, positions, units)
    _check(sites, method, steps, qk_fix)
    pairs = pairs_of(model, clean, corrupted, answer_at)
    names = ["hook_embed", *(name for site in sites for name in _names(site, qk_fix))]
    with torch.no_grad():
        clean_run, corrupted_run = both_runs(model, pairs, names, names)
    measure = resolved(metric, model, clean_run.logits)
    high, low = ends(measure, clean_run, corrupted_run)
    target, source = target_and_source(clean_run, corrupted_run, direction)
    points = [0.0] if method == "gradient" else [(i + 0.5) / steps for i in range(steps)]
    wanted = [name for name in names if not name.endswith("indices") and name != "hook_embed"]
    slopes = _gradients(model, pairs, target, source, measure, wanted, points)
    known, _ = target_and_source(high, low, direction)
    frames = []
    for site in sites:
        cells = cells_of(site, over, pairs.real, layers=layers, positions=positions, units=units)
        sweep = sweep_of(model, pairs, site, target, source)
        with torch.no_grad():
            gain = _Estimate(sweep, source, slopes, qk_fix).of(cells)
        scale = Scale.of(high, low, direction)
        frame = frame_of(cells, known + gain, scale, pairs, site=site.name, each=each, seed=seed)
        frames.append(with_tokens(frame, model, target))
    return finished(frames, begun, direction=direction, method=method, qk_fix=qk_fix)


def _check(sites: list[Site], method: str, steps: int, qk_fix: bool) -> None:
    if method not in ("gradient", "integrated"):
        raise InputError(f"method is {method!r}, but should be 'gradient' or 'integrated'")
    if steps < 1:
        raise InputError(f"steps is {steps}, but should be at least 1")
    others = [site.name for site in sites if site.name not in _QUERIES + _KEYS]
    if qk_fix and others:
        raise InputError(
            f"qk_fix is for the sites 'q', 'k', 'rot_q' and 'rot_k', not for {', '.join(others)}"
        )


def _names(site: Site, qk_fix: bool) -> list[str]:
    """The hooks that an estimate for this site needs."""
    names = site_names(site)
    if qk_fix:
        words = ("rot_q", "rot_k", "attn_scores", "pattern")
        names += [act_name(word, layer) for layer in site.layers for word in words]
    return names


def _gradients(
    model: Llama,
    pairs: Pairs,
    target: Run,
    source: Run,
    metric: Metric,
    names: list[str],
    points: list[float],
) -> dict[str, Tensor]:
    """The metric's gradient at each hook, averaged over points of the path between the runs."""
    start, end = (one.cache["hook_embed"] for one in (target, source))
    total: dict[str, Tensor] = {}
    for point in points:
        kept: dict[str, Tensor] = {}
        hooks: list[tuple[Any, Hook]] = [(list(dict.fromkeys(names)), partial(_keep, into=kept))]
        if point:
            hooks.insert(0, ("hook_embed", partial(_set, value=start + point * (end - start))))
        with torch.enable_grad(), model.hooks(hooks):
            logits = model(target.tokens, attention_mask=pairs.real, logits_at=pairs.answer)
            whole = measured(metric, logits[:, 0]).sum()
            slopes = torch.autograd.grad(whole, list(kept.values()), allow_unused=True)
        for (name, tensor), slope in zip(kept.items(), slopes, strict=True):
            slope = torch.zeros_like(tensor) if slope is None else slope
            total[name] = total.get(name, 0) + slope / len(points)
    return total


def _keep(tensor: Tensor, hook: HookPoint, into: dict[str, Tensor]) -> Tensor:
    # With frozen weights no gradient comes from before: let it start here.
    tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    into[str(hook.name)] = tensor
    return tensor


def _set(tensor: Tensor, hook: HookPoint, value: Tensor) -> Tensor:
    return value


class _Estimate:
    """The estimated gains of the cells of one site."""

    def __init__(self, sweep: Sweep, source: Run, slopes: dict[str, Tensor], qk_fix: bool) -> None:
        self.sweep, self.site, self.slopes = sweep, sweep.site, slopes
        self.source, self.qk_fix = source, qk_fix

    def of(self, cells: Cells) -> Float[Tensor, "cell prompt"]:
        """What each cell adds to the metric of each prompt."""
        pairs = self.sweep.pairs
        gains = torch.zeros(len(cells), len(pairs.real), device=pairs.real.device)
        prompt = torch.arange(len(pairs.real), device=gains.device)
        for layer in cells.layer.unique().tolist():
            here = (cells.layer == layer).nonzero().flatten()
            gain = self._gain(layer, whole=cells.pos is None).float()
            by_unit = gain if cells.unit is not None else gain.sum(dim=2, keepdim=True)
            unit = torch.zeros_like(here) if cells.unit is None else cells.unit[here]
            if cells.pos is None:
                gains[here] = by_unit.sum(dim=1).T[unit]
            else:
                gains[here] = by_unit[prompt, cells.pos[here], unit[:, None]]
        return gains

    def _gain(self, layer: int, whole: bool) -> Float[Tensor, "prompt pos unit"]:
        """The gain of each position and unit; with `whole`, of all positions in one patch."""
        if self.qk_fix and self.site.name in _QUERIES:
            return self._gain_of_queries(layer)
        if self.qk_fix and self.site.name in _KEYS:
            return self._gain_of_all_keys(layer) if whole else self._gain_of_keys(layer)
        slope = self.site.by_position(self.slopes[self.site.hook(layer)])
        if self.site.needs_indices:  # the same slope for all choices of a token: they are added up
            sweep, slope = self.sweep, slope[:, :, 0]
            changes = [
                sweep.expert(layer, e) - sweep.expert(layer, e, known=True)
                for e in range(self.site.n_units)
            ]
            return torch.stack([(change * slope).sum(dim=-1) for change in changes], dim=-1)
        gain = (self.sweep.source[layer] - self.sweep.known(layer)) * slope
        if gain.ndim == 4:
            return gain.sum(dim=-1)
        return gain if self.site.unit is not None else gain.sum(dim=-1, keepdim=True)

    def _gain_of_queries(self, layer: int) -> Float[Tensor, "prompt pos head"]:
        """Each query's new row of the pattern, exactly; a row has one query only."""
        change = self._scores(
            layer,
            self._turned("rot_q", layer, source=True) - self._turned("rot_q", layer),
            self._turned("rot_k", layer),
        )
        return self._gain_of_rows(layer, change).transpose(1, 2)

    def _gain_of_all_keys(self, layer: int) -> Float[Tensor, "prompt pos head"]:
        """All keys of a key-value head at once; the gain stands at the query where it arises."""
        change = self._scores(
            layer,
            self._turned("rot_q", layer),
            self._turned("rot_k", layer, source=True) - self._turned("rot_k", layer),
        )
        return self._by_key_head(self._gain_of_rows(layer, change)).transpose(1, 2)

    def _gain_of_rows(
        self, layer: int, change: Float[Tensor, "prompt head query key"]
    ) -> Float[Tensor, "prompt head query"]:
        scores = self._known("attn_scores", layer)
        seen = scores > -torch.inf
        new = torch.where(seen, scores + change, -torch.inf)
        pattern = new.masked_fill(~seen.any(-1, keepdim=True), 0).softmax(dim=-1)
        pattern = pattern.masked_fill(~seen, 0)
        return ((pattern - self._known("pattern", layer)) * self._slope(layer)).sum(dim=-1)

    def _gain_of_keys(self, layer: int) -> Float[Tensor, "prompt pos head"]:
        """One key at a time: a softmax in which one score moves by `change` has a closed form."""
        change = self._scores(
            layer,
            self._turned("rot_q", layer),
            self._turned("rot_k", layer, source=True) - self._turned("rot_k", layer),
        )
        pattern, slope = self._known("pattern", layer).double(), self._slope(layer).double()
        grown = pattern * change.double().expm1()  # what the row's sum grows by
        mean = (pattern * slope).sum(dim=-1, keepdim=True)
        gain = grown / (1 + grown) * (slope - mean)
        return self._by_key_head(gain.sum(dim=2)).transpose(1, 2)

    def _by_key_head(self, x: Float[Tensor, "prompt head pos"]) -> Float[Tensor, "prompt kv pos"]:
        return x.unflatten(1, (self.site.n_units, -1)).sum(dim=2)

    def _scores(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        n_kv = keys.shape[2]
        grouped = rearrange(queries, "b query (kv group) d -> b query kv group d", kv=n_kv)
        scores = einsum(grouped, keys, "b query kv g d, b key kv d -> b kv g query key")
        return scores.flatten(1, 2) * self.sweep.model.blocks[layer].attn.scale

    def _turned(self, word: str, layer: int, source: bool = False) -> Tensor:
        return (self.source if source else self.sweep.target).cache[word, layer]

    def _known(self, word: str, layer: int) -> Tensor:
        return self.sweep.target.cache[word, layer]

    def _slope(self, layer: int) -> Tensor:
        return self.slopes[act_name("pattern", layer)]
