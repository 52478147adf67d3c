"""What the routing measures share: intervals and p-values whose unit is the prompt.

Tokens of one prompt depend on each other, so prompts are what is drawn and what is permuted.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000


def ratio_interval(
    parts: Float[np.ndarray, "prompt cell"],
    wholes: Float[np.ndarray, "prompt cell_or_one"],
    seed: int,
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Ratios of sums over prompts with 95 % percentile bootstrap intervals (Efron 1979).

    Args:
        parts: Each prompt's share in the numerators.
        wholes: Its share in the denominators.
        seed: Of the 2,000 resamples.

    Returns:
        The ratios and their bounds; no bounds (NaN) where there is one prompt only.

    >>> ratio, low, high = ratio_interval(np.array([[1.0], [2.0]]), np.array([[2.0], [2.0]]), 0)
    >>> ratio.item(), low.item(), high.item()
    (0.75, 0.5, 1.0)
    """
    n_prompts, n_cells = parts.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = parts.sum(axis=0) / wholes.sum(axis=0)
        if n_prompts == 1:
            return ratio, np.full(n_cells, np.nan), np.full(n_cells, np.nan)
        draws = _draws(n_prompts, seed)
        bounds = []
        for at in np.array_split(np.arange(n_cells), max(1, n_cells // 2000)):
            whole = wholes[:, at] if wholes.shape[1] > 1 else wholes
            ratios = (draws @ parts[:, at]) / (draws @ whole)
            bounds.append(np.quantile(ratios, [0.025, 0.975], axis=0))
    low, high = np.concatenate(bounds, axis=1)
    return ratio, low, high


@lru_cache(maxsize=1)  # the measures of a report share them
def _draws(n: int, seed: int) -> Float[np.ndarray, "resample n"]:
    """How often each of n is drawn in each resample."""
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    return draws.astype(float)


def p_value(
    observed: Float[np.ndarray, " cell"], null: Float[np.ndarray, "permutation cell"]
) -> Float[np.ndarray, " cell"]:
    """The share of permutations that are at least as large, the observed one among them.

    Never 0, and valid for any number of permutations (Phipson and Smyth 2010, arXiv 1603.05766).

    >>> p_value(np.array([3.0]), np.array([[1.0], [3.0], [4.0]])).item()
    0.75
    """
    return (1 + count_at_least(null, observed)) / (1 + len(null))


def count_at_least(
    null: Float[np.ndarray, "permutation cell_or_one"], observed: Float[np.ndarray, " cell"]
) -> Int[np.ndarray, " cell"]:
    """How many permutations are at least as large; what differs by rounding alone counts too."""
    return (null >= observed - 1e-9).sum(axis=0)


def shuffled_within(
    values: Float[np.ndarray, " unit"],
    strata: Int[np.ndarray, " unit"],
    n: int,
    draw: np.random.Generator,
) -> Float[np.ndarray, "n unit"]:
    """The values in random order, n times, each staying in its stratum.

    >>> shuffled_within(
    ...     np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1]), 5, np.random.default_rng(0)
    ... )[:, 2].tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    order = np.argsort(strata + draw.random((n, len(values))), axis=1)
    shuffled = np.empty((n, len(values)))
    np.put_along_axis(shuffled, order, values[np.argsort(strata, kind="stable")][None], axis=1)
    return shuffled
