"""From the metric of every cell and prompt to a tidy frame."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from llama_probe.patching.runs import Pairs
from llama_probe.patching.sites import Cells

RESAMPLES = 2000


@dataclass(frozen=True)
class Scale:
    """What the metric is compared with, each [prompt]: the effect is 0 at `zero`, 1 at `one`."""

    zero: Float[np.ndarray, " prompt"]
    one: Float[np.ndarray, " prompt"]
    clean: Float[np.ndarray, " prompt"]
    corrupted: Float[np.ndarray, " prompt"]

    @classmethod
    def of(
        cls, clean: Float[Tensor, " prompt"], corrupted: Float[Tensor, " prompt"], direction: str
    ) -> "Scale":
        """Denoising leads from corrupted to clean, noising the other way."""
        high, low = (x.detach().double().numpy(force=True) for x in (clean, corrupted))
        zero, one = (low, high) if direction == "denoise" else (high, low)
        return cls(zero, one, high, low)


def frame_of(
    cells: Cells,
    values: Float[Tensor, "cell prompt"],
    scale: Scale,
    pairs: Pairs,
    *,
    site: str,
    each: bool,
    seed: int,
) -> pd.DataFrame:
    """One row for each cell, over all prompts, or with `each` for each cell and prompt."""
    metric = values.double().numpy(force=True)
    there = _there(cells, pairs)
    frame = cells.frame.assign(site=site)
    if each or metric.shape[1] == 1:
        return _of_each(frame, metric, there, scale)
    counts = there.sum(axis=1)
    gained = np.where(there, metric - scale.zero, 0)
    whole = np.where(there, scale.one - scale.zero, 0)
    low, high = _interval(gained, whole, seed)
    return frame.assign(
        metric=_mean(metric, there),
        effect=gained.sum(axis=1) / whole.sum(axis=1),
        ci_low=low,
        ci_high=high,
        n=counts,
        clean=_mean(np.broadcast_to(scale.clean, metric.shape), there),
        corrupted=_mean(np.broadcast_to(scale.corrupted, metric.shape), there),
    )


def _there(cells: Cells, pairs: Pairs) -> Bool[np.ndarray, "cell prompt"]:
    """Which prompts have the position of a cell, rather than padding."""
    n_prompts = len(pairs.real)
    if cells.pos is None:
        return np.ones((len(cells), n_prompts), dtype=bool)
    real = pairs.real.numpy(force=True)
    return real[np.arange(n_prompts), cells.pos.numpy(force=True)]


def _of_each(
    frame: pd.DataFrame,
    metric: Float[np.ndarray, "cell prompt"],
    there: Bool[np.ndarray, "cell prompt"],
    scale: Scale,
) -> pd.DataFrame:
    n_cells, n_prompts = metric.shape
    frame = frame.loc[frame.index.repeat(n_prompts)].reset_index(drop=True)
    if n_prompts > 1:
        frame["prompt"] = np.tile(np.arange(n_prompts), n_cells)
    with np.errstate(divide="ignore", invalid="ignore"):  # a pair whose metrics agree: missing
        effect = (metric - scale.zero) / (scale.one - scale.zero)
    effect[~np.isfinite(effect)] = np.nan
    frame["metric"], frame["effect"] = metric.flatten(), effect.flatten()
    frame["clean"], frame["corrupted"] = (
        np.tile(end, n_cells) for end in (scale.clean, scale.corrupted)
    )
    return frame.loc[there.flatten()].reset_index(drop=True)


def _mean(
    values: Float[np.ndarray, "cell prompt"], there: Bool[np.ndarray, "cell prompt"]
) -> Float[np.ndarray, " cell"]:
    return np.where(there, values, 0).sum(axis=1) / there.sum(axis=1)


def _interval(
    gained: Float[np.ndarray, "cell prompt"], whole: Float[np.ndarray, "cell prompt"], seed: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """95 % percentile bootstrap over prompts of the ratio of sums."""
    n_prompts = gained.shape[1]
    draws = np.random.default_rng(seed).multinomial(
        n_prompts, [1 / n_prompts] * n_prompts, size=RESAMPLES
    )
    bounds = []
    for part in np.array_split(np.arange(len(gained)), max(1, len(gained) // 2000)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (gained[part] @ draws.T) / (whole[part] @ draws.T)
        bounds.append(np.nanquantile(ratios, [0.025, 0.975], axis=1))
    low, high = np.concatenate(bounds, axis=1)
    return low, high
