"""Refusal subspaces: planted ranks, nulls, spectra, and directions that act on each other."""

from typing import Any

import numpy as np
import pytest
import torch

from llama_probe.errors import InputError
from llama_probe.interventions.edit import Edit
from llama_probe.model.llama import Llama
from llama_probe.refusal.independence import independence
from llama_probe.refusal.spectrum import SAME_CLASS, spectrum
from llama_probe.refusal.subspace import LOGISTIC, MEANS, RANDOM, Subspace, refusal_subspace
from tests.tiny import randomise, tiny_config

METRICS = ("auroc", "auroc refitted")


def twins(n: int = 400, d: int = 8, seed: int = 0) -> tuple[Any, Any, Any]:
    """Twins of either class that differ in the first two dimensions only.

    The classes' means differ along the first alone; what the two dimensions share makes a probe
    look along their difference, so that both must go. The others vary much, so that the plane is
    found well.
    """
    random = np.random.default_rng(seed)
    y, pair = np.tile([0, 1], n), np.repeat(np.arange(n), 2)
    own = random.normal(size=(2 * n, d))
    x = np.where(np.arange(d) < 2, own, 10 * random.normal(size=(n, d))[pair] + 3 * own)
    x[:, 0] = 3 * x[:, 1] + 3 * y + random.normal(size=2 * n)
    return x, y, pair


def null(n: int = 300, d: int = 8, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)), random.integers(2, size=n)


def values(found: Subspace, kind: str, metric: str = "auroc") -> list[float]:
    frame = found.frame
    return frame[(frame.kind == kind) & (frame.metric == metric)].sort_values("k").value.tolist()


@pytest.fixture(scope="module")
def planted() -> Subspace:
    x, y, pair = twins()
    return refusal_subspace({"blocks.2.hook_resid_pre": x}, y, groups=pair, k_max=4, n_random=4)


@pytest.mark.parametrize("metric", METRICS)
def test_a_plane_takes_two_rounds_of_a_probe_and_one_of_means(
    planted: Subspace, metric: str
) -> None:
    assert planted.rounds(LOGISTIC, metric) == 2
    assert planted.rounds(MEANS, metric) == 1
    start, once, twice, *_ = values(planted, LOGISTIC, metric)
    assert start > 0.95 and once > 0.6 and twice < 0.55


def test_random_directions_remove_nothing() -> None:
    random = np.random.default_rng(0)
    y = np.arange(400) % 2
    x = random.normal(size=(400, 40)) + 2 * y[:, None] * np.eye(40)[0]
    found = refusal_subspace(x, y, k_max=2, n_random=4)
    for metric in METRICS:
        assert found.rounds(RANDOM, metric) is None
        start, once, twice = values(found, RANDOM, metric)
        assert start > 0.8 and once > start - 0.05 and twice > start - 0.08
    assert values(found, LOGISTIC)[2] < 0.65


def test_the_basis_spans_the_plane_and_goes_where_directions_go(planted: Subspace) -> None:
    assert torch.allclose(planted.basis @ planted.basis.T, torch.eye(4).double(), atol=1e-12)
    assert planted.vector is planted.basis
    assert planted.basis[:2, :2].norm().item() == pytest.approx(2**0.5, abs=0.02)
    assert (planted.hook, planted.layer, planted.position) == ("blocks.2.hook_resid_pre", 2, "")


def test_where_nothing_is_to_be_found_the_classes_are_at_chance_from_the_start() -> None:
    x, y = null()
    found = refusal_subspace(x, y, k_max=2, n_random=2)
    assert [found.rounds(LOGISTIC, metric) for metric in METRICS] == [0, 0]


def test_the_half_measured_on_was_not_fitted_on() -> None:
    """With more dimensions than prompts a probe knows its own half by heart."""
    x, y = null(n=60, d=200)
    found = refusal_subspace(x, y, k_max=1, n_random=1)
    assert all(0.25 < value < 0.75 for value in found.frame.value)


def test_twins_stay_together_and_seeds_repeat() -> None:
    x, y, pair = twins(n=60)
    found = [
        refusal_subspace(x, y, groups=groups, k_max=1, n_random=1, seed=seed).frame
        for groups, seed in ((pair, 0), (pair, 0), (None, 0), (pair, 1))
    ]
    assert found[0].equals(found[1])
    assert not found[0].equals(found[2]) and not found[0].equals(found[3])
    assert set(found[0].n) == {60}


def test_means_are_removed_by_one_direction_as_the_theorem_says() -> None:
    """The first half's own probe is then at chance to the digit, which says little of the second's.

    Hence the second metric: with few prompts for many dimensions much of the difference is left.
    """
    random = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = random.normal(size=(200, 60))
    x[:, :4] += 2 * y[:, None]
    found = refusal_subspace(x, y, k_max=1, n_random=1)
    assert values(found, MEANS)[1] == 0.5
    assert values(found, MEANS, "auroc refitted")[1] > 0.6


def test_the_spectrum_of_pairs_that_share_a_direction() -> None:
    random = np.random.default_rng(0)
    y, pair = np.tile(["a", "b"], 100), np.repeat(np.arange(100), 2)
    base = random.normal(size=(100, 12))[pair]
    one = base + 2 * (y == "b")[:, None] * np.eye(12)[3]
    found = spectrum(one + 0.01 * random.normal(size=one.shape), y, pair, k_max=3)
    shares = found.frame[found.frame.kind != SAME_CLASS].value.tolist()
    assert shares[0] > 0.99 and shares == sorted(shares, reverse=True)
    assert torch.allclose(found.basis[0], torch.eye(12).double()[3], atol=0.01)
    # Two directions, as much each: half of the pairs along one of them.
    both = base + 2 * (y == "b")[:, None] * np.eye(12)[3 + pair % 2]
    halves = spectrum(both, y, pair, k_max=3).frame
    assert halves[halves.kind != SAME_CLASS].value.round(6).tolist() == [0.5, 0.5, 0]
    within = halves[halves.kind == SAME_CLASS]
    assert (within.value < 0.3).all() and (within.ci_low < within.ci_high).all()


def test_pairs_at_random_have_the_mean_difference_first() -> None:
    random = np.random.default_rng(0)
    y = random.integers(2, size=300)
    x = random.normal(size=(300, 6)) + 6 * y[:, None] * np.eye(6)[1]
    assert spectrum(x, y).basis[0, 1].item() > 0.99


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(tiny_config())
    randomise(model)
    return model


def test_two_directions_that_add_up_and_two_that_do_not(model: Llama) -> None:
    """Scores that are made of what an edit leaves of a stream at the first site."""
    axes, prompts = torch.eye(16), torch.randn(40, 1, 16)

    def left(edit: Edit) -> torch.Tensor:
        with model.hooks(edit):
            return model.blocks[0].hook_resid_pre(prompts)[:, 0].double()

    added = independence(lambda edit: left(edit)[:, :2].sum(1), axes[0], axes[1])
    multiplied = independence(lambda edit: left(edit)[:, :2].square().prod(1), axes[0], axes[1])
    by = ["condition", "metric"]
    added, multiplied = added.set_index(by), multiplied.set_index(by)
    assert added.value["both ablated", "score"] == pytest.approx(0, abs=1e-12)
    alone = added.loc["first ablated", "change"]
    assert alone.value == pytest.approx(-prompts[:, 0, 0].mean().item())
    after = added.loc["first ablated", "change after the other"]
    assert after.value == pytest.approx(alone.value)
    for bound in ("value", "ci_low", "ci_high"):
        assert added[bound]["both ablated", "interaction"] == pytest.approx(0, abs=1e-12)
    assert multiplied.ci_low["both ablated", "interaction"] > 0
    assert multiplied.value["first ablated", "change after the other"] == 0
    assert set(added.cosine) == {0} and set(added.n) == {40}


def test_differences_are_paired_over_prompts() -> None:
    """Prompts that differ much, and an edit that takes 1 off each: no doubt about the change."""
    scores = torch.linspace(-100, 100, 30).double()
    frame = independence(lambda edit: scores - len(edit.says), [1.0, 0], [-1.0, 0])
    change = frame[(frame.metric == "change") & (frame.condition == "first ablated")].iloc[0]
    assert (change.value, change.ci_low, change.ci_high) == (-1, -1, -1)
    assert frame.ci_low[0] < -10 and frame.cosine[0] == -1


def test_what_cannot_be_used_is_refused() -> None:
    x, y, pair = twins(n=30)
    with pytest.raises(InputError, match="k_max is 8"):
        refusal_subspace(x, y, k_max=8)
    with pytest.raises(InputError, match="n_random"):
        refusal_subspace(x, y, n_random=0)
    with pytest.raises(InputError, match="two classes"):
        refusal_subspace(x, np.arange(60) % 3)
    with pytest.raises(InputError, match="not finite"):
        refusal_subspace(np.where(x > 1, np.nan, x), y)
    with pytest.raises(InputError, match="no 'share'"):
        refusal_subspace(x, y, k_max=1, n_random=1).rounds(LOGISTIC, "share")
    with pytest.raises(InputError, match="one class only"):
        spectrum(x, y, np.arange(60))
    with pytest.raises(InputError, match="at least two pairs"):
        spectrum(x[:2], y[:2], pair[:2])
    with pytest.raises(InputError, match="is 0"):
        independence(lambda edit: [1.0], [0.0, 0.0], [1.0, 0.0])
    with pytest.raises(InputError, match="2 and 3 dimensions"):
        independence(lambda edit: [1.0], [1.0, 0.0], [1.0, 0.0, 0.0])
    with pytest.raises(InputError, match="same prompts"):
        independence(lambda edit: [1.0] * (1 + len(edit.says)), [1.0, 0.0], [0.0, 1.0])
