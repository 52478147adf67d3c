"""Confidence intervals for shares and means."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from llama_probe.errors import InputError


class Estimate(NamedTuple):
    """A value, its confidence interval, and how many observations it rests on."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def share(hits: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """The share `hits / n` with Wilson's score interval.

    Unlike the normal approximation it stays within 0 and 1 and says something at 0 and at n hits
    (Wilson 1927; Brown, Cai and DasGupta 2001 recommend it).

    Raises:
        InputError: There are no observations, or more hits than observations.

    >>> [round(float(x), 3) for x in share(9, 10)]
    [0.9, 0.596, 0.982, 10.0]
    """
    from scipy.stats import binomtest

    if not 0 <= hits <= n or n == 0:
        raise InputError(
            f"{hits} hits of {n} are no share: hits should be 0 to n, and n at least 1"
        )
    low, high = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Estimate(hits / n, float(low), float(high), n)


def mean(values: Float[Any, " n"], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of independent observations [n] with a percentile bootstrap interval.

    From 2,000 resamples, the same for the same seed (Efron 1979). Observations that all agree give
    an interval of no width.

    Raises:
        InputError: There are no observations, or one is not finite.

    >>> estimate = mean(np.array([1.0, 2.0, 3.0, 4.0]))
    >>> estimate.value, bool(1 <= estimate.ci_low < 2.5 < estimate.ci_high <= 4)
    (2.5, True)
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError("a mean needs a row of finite numbers, at least one")
    value = float(values.mean())
    if (values == values[0]).all():
        return Estimate(value, value, value, len(values))
    low, high = bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        confidence_level=confidence,
        method="percentile",
        rng=seed,
        batch=max(1, 10_000_000 // len(values)),
    ).confidence_interval
    return Estimate(value, float(low), float(high), len(values))


def share_difference(
    hits: int, n: int, other_hits: int, other_n: int, *, confidence: float = 0.95
) -> Estimate:
    """One share less another, of different observations, with Newcombe's interval.

    Newcombe 1998 (Statistics in Medicine 17, 873-890), method 10: from the two Wilson intervals.

    Raises:
        InputError: As `share`.

    >>> [round(float(x), 3) for x in share_difference(56, 70, 48, 80)]
    [0.2, 0.052, 0.334, 150.0]
    """
    one = share(hits, n, confidence=confidence)
    other = share(other_hits, other_n, confidence=confidence)
    gap = one.value - other.value
    below = np.hypot(one.value - one.ci_low, other.ci_high - other.value)
    above = np.hypot(one.ci_high - one.value, other.value - other.ci_low)
    return Estimate(gap, float(gap - below), float(gap + above), n + other_n)
