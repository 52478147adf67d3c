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


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # Newcombe 1998, Table II, method 10
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((0, 10, 0, 10), -0.2775, 0.2775),
        ((10, 10, 0, 20), 0.6791, 1.0000),
        ((10, 10, 0, 10), 0.6075, 1.0000),
    ],
)
def test_share_difference_gives_newcombes_interval(counts, low, high):
    hits, n, other_hits, other_n = counts
    found = stats.share_difference(*counts)
    assert found.value == hits / n - other_hits / other_n and found.n == n + other_n
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), abs=5.1e-5)
    turned = stats.share_difference(other_hits, other_n, hits, n)
    assert turned[:3] == pytest.approx((-found.value, -found.ci_high, -found.ci_low))


def test_share_difference_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = [
        low <= 0.3 <= high
        for _, low, high, _ in (
            stats.share_difference(draw.binomial(40, 0.4), 40, draw.binomial(60, 0.1), 60)
            for _ in range(300)
        )
    ]
    assert 0.92 <= np.mean(covered) <= 0.99
    narrow = stats.share_difference(16, 40, 6, 60, confidence=0.5)
    assert narrow.ci_low > stats.share_difference(16, 40, 6, 60).ci_low


@pytest.mark.parametrize("counts", [(1, 2, 0, 0), (3, 2, 1, 2)])
def test_what_is_no_share_difference(counts):
    with pytest.raises(InputError, match="hits should be 0 to n"):
        stats.share_difference(*counts)
