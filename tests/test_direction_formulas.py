"""What edits along directions do to a tensor: their formulas, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_hook import act, farthest, here, random

from llama_probe.interventions import ablate, add, affine, replace
from llama_probe.interventions.vectors import span_of

R, X, MEAN = random(6, seed=1), random(2, 5, 6, seed=2), random(6, seed=3)
r, x, mean = R.numpy(), X.numpy(), MEAN.numpy()
unit = r / np.linalg.norm(r)
proj = (x @ unit)[..., None] * unit

FORMULAS = {
    "ablate": (here(ablate, R), x - proj),
    "ablate, longer": (here(ablate, 9 * R), x - proj),
    "ablate, in part": (here(ablate, R, fraction=0.3), x - 0.3 * proj),
    "ablate, reflected": (here(ablate, R, fraction=2), x - 2 * proj),
    "add": (here(add, R), x + r),
    "add, scaled": (here(add, R, -0.5), x - 0.5 * r),
    "affine": (here(affine, R, MEAN), x - proj + mean @ unit * unit),
    "affine, scaled": (here(affine, R, MEAN, scale=2), x - proj + mean @ unit * unit + 2 * r),
    "replace": (here(replace, MEAN), np.broadcast_to(mean, x.shape)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula(name):
    edit, expected = FORMULAS[name]
    before = X.clone()
    assert np.abs(act(edit, X).numpy() - expected).max() <= 1e-12
    assert torch.equal(X, before)


def test_a_subspace_is_what_its_rows_span():
    """Rows that depend on each other and are no right angles apart; against a QR decomposition."""
    rows = random(3, 6, seed=4)
    basis = np.linalg.qr(rows.numpy().T)[0]
    expected = x - x @ basis @ basis.T
    dependent = torch.cat([rows, rows[:1] + 2 * rows[1:2], 100 * rows[2:]])
    for given_rows in (rows, dependent):
        assert np.abs(act(here(ablate, given_rows), X).numpy() - expected).max() <= 1e-12
    assert span_of(dependent).shape == (3, 6)
    one_by_one = act(here(ablate, rows[1]), act(here(ablate, rows[0]), X))
    assert farthest(one_by_one, act(here(ablate, rows[:2]), X)) > 0.01


def test_affine_keeps_a_subspace_at_the_reference():
    rows = random(2, 6, seed=4)
    moved = act(here(affine, rows, MEAN), X)
    assert farthest(moved @ rows.T, (MEAN @ rows.T).expand(2, 5, 2)) <= 1e-12
    assert farthest(act(here(ablate, rows), moved), act(here(ablate, rows), X)) <= 1e-12


NUMBERS = st.integers(0, 10_000)


@settings(max_examples=30, deadline=None)
@given(seed=NUMBERS, rank=st.integers(1, 8), d=st.integers(1, 8))
def test_ablating_twice_is_ablating_once(seed, rank, d):
    at = random(3, 4, d, seed=seed) * 100
    edit = here(ablate, random(rank, d, seed=seed + 1))
    once = act(edit, at)
    assert farthest(act(edit, once), once) <= 1e-9
    assert once.norm() <= at.norm()
    assert rank < d or once.abs().max() <= 1e-9  # all of it, where the rows span the space


@settings(max_examples=20, deadline=None)
@given(seed=NUMBERS, scale=st.floats(1e-3, 1e3))
def test_only_the_line_matters_to_ablation(seed, scale):
    r = random(6, seed=seed)
    assert farthest(act(here(ablate, -scale * r), X), act(here(ablate, r), X)) <= 1e-12


@pytest.mark.parametrize("zero", [torch.zeros(6), torch.zeros(2, 6), 1e-9 * R / R.norm()])
def test_a_direction_of_zero_changes_nothing(zero):
    """What is left of the difference of two equal means has no direction, however it points."""
    assert torch.equal(act(here(ablate, zero), X), X)
    assert torch.equal(act(here(affine, zero, MEAN), X), X)
    assert farthest(act(here(ablate, 1e-7 * R), X), act(here(ablate, R), X)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_works_in_float32_at_least_and_gives_back_the_own_precision(dtype):
    low = X.to(dtype)
    for name in ("ablate", "add", "affine, scaled", "replace"):
        edit, _ = FORMULAS[name]
        moved = act(edit, low)
        assert moved.dtype == dtype
        assert torch.equal(moved, act(edit, low.float()).to(dtype)), name


def test_gradients_flow_through_what_is_left():
    with torch.enable_grad():
        leaf = X.clone().requires_grad_()
        act(here(ablate, R), leaf).pow(2).sum().backward()
    assert leaf.grad is not None
    assert farthest(leaf.grad, 2 * torch.from_numpy(x - proj)) <= 1e-12
