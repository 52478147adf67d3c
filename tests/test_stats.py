"""Intervals: known values, coverage, and sentences for wrong input."""

import numpy as np
import pytest

from llama_probe import stats
from llama_probe.errors import InputError


def test_share_gives_wilsons_interval():
    # By hand, with z = 1.959964: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    z, n, p = 1.959963984540054, 50, 0.2
    middle, half = p + z**2 / 2 / n, z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    found = stats.share(10, 50)
    assert found.value == 0.2 and found.n == 50
    assert found.ci_low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert found.ci_high == pytest.approx((middle + half) / (1 + z**2 / n))


def test_share_says_something_at_the_ends():
    assert stats.share(0, 20).ci_low == 0 and stats.share(0, 20).ci_high > 0.1
    assert stats.share(20, 20).ci_high == 1 and stats.share(20, 20).ci_low < 0.9


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_share(hits, n):
    with pytest.raises(InputError, match="hits should be 0 to n"):
        stats.share(hits, n)


def test_mean_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = [
        low <= 1.0 <= high
        for _, low, high, _ in (stats.mean(draw.exponential(size=60)) for _ in range(200))
    ]
    assert 0.86 <= np.mean(covered) <= 0.99


def test_mean_is_reproducible_and_flat_without_spread():
    values = np.arange(20.0)
    assert stats.mean(values) == stats.mean(values)
    assert stats.mean(values) != stats.mean(values, seed=1)
    assert stats.mean(np.full(5, 3.0)) == (3.0, 3.0, 3.0, 5)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_what_has_no_mean(values):
    with pytest.raises(InputError, match="row of finite numbers"):
        stats.mean(np.array(values, dtype=float))
