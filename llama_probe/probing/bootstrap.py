"""Intervals by drawing groups again: samples of a group depend on each other."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

from llama_probe.probing.scores import HeldOut, Metric, once

RESAMPLES = 1000
_MOST_WEIGHTS = 4_000_000  # of one chunk of resamples


class Interval(NamedTuple):
    """A metric and its 95 % percentile interval (Efron 1979)."""

    value: float
    low: float
    high: float


NONE = Interval(np.nan, np.nan, np.nan)


def intervals(
    helds: Sequence[HeldOut], metrics: Mapping[str, Metric], seed: int
) -> dict[str, Interval]:
    """Each metric's mean over some sets of held-out scores, from 1,000 resamples of their units.

    The interval is of a single set: with several, as for several shuffles of the labels, it covers
    what one of them may give.
    """
    values = {
        name: [metric(held, once(held)).item() for held in helds]
        for name, metric in metrics.items()
    }
    resampled: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for held in helds:
        units, unit = np.unique(held.unit, return_inverse=True)
        draws = _draws(len(units), seed)
        for some in np.array_split(draws, max(1, draws.shape[0] * len(held) // _MOST_WEIGHTS)):
            weights = some[:, unit].astype(float)
            for name, metric in metrics.items():
                resampled[name].append(metric(held, weights))
    return {
        name: Interval(float(np.mean(values[name])), *_bounds(np.concatenate(resampled[name])))
        for name in metrics
    }


def _bounds(values: np.ndarray) -> tuple[float, float]:
    # A resample may lack a class altogether.
    known = values[~np.isnan(values)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=4)  # every cell of a target draws the same
def _draws(n: int, seed: int) -> UInt[np.ndarray, "resample n"]:
    """How often each of n is drawn in each resample."""
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    return draws.astype(np.uint16)
