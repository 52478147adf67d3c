"""What edits along directions take, what they refuse, and what they are called."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import HookNameError, InputError
from llama_probe.interventions import Edit, HasVector, ablate, add, affine, replace, vector_of
from llama_probe.interventions.vectors import span_of

SOURCE = "blocks.2.hook_resid_pre"
MASK = torch.zeros(2, 10, dtype=torch.bool)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


R, MEAN = random(6, seed=1), random(6, seed=3)


def here(make: Callable[..., Edit], *given: Any, **options: Any) -> Edit:
    return make(*given, at="hook_embed", **options)


def test_reprs_say_how_an_edit_was_made():
    r = lp.Direction(R, SOURCE, 2, "-1", {})
    shown = f"Direction(hook='{SOURCE}', layer=2, position='-1')"
    assert repr(ablate(r)) == f"ablate({shown})"
    edit = ablate(R, at="mlp_out", layers=[1], fraction=0.5, positions="new")
    assert repr(edit) == ("ablate(<(6,)>, at='mlp_out', layers=[1], fraction=0.5, positions='new')")
    assert repr(add(r, -1, positions=MASK)) == f"add({shown}, -1, positions=<(2, 10)>)"
    assert repr(affine(r, MEAN, scale=1)) == f"affine({shown}, <(6,)>, scale=1)"
    assert repr(affine(r, {"a": MEAN, "b": MEAN})) == f"affine({shown}, <means of 2 hooks>)"


# What a direction may be


def test_a_direction_is_a_tensor_or_has_a_vector():
    direction = lp.Direction(R, "", -1, "", {})
    assert isinstance(direction, HasVector) and not isinstance(R, HasVector)
    ways = (R, R.numpy(), R.tolist(), direction, SimpleNamespace(vector=R.float().double()))
    for way in ways[:4]:
        assert torch.equal(vector_of(way), R)
    assert vector_of(ways[4]).dtype == torch.float64
    assert vector_of(R.half().requires_grad_(True)).dtype == torch.float64
    assert vector_of(torch.ones(2, 3)).shape == (2, 3)
    assert vector_of(R) is not R


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("harmless", "of type str"),
        (None, "of type NoneType"),
        (object(), "of type object"),
        (torch.ones(2, 3, 4), r"not torch.float32 \(2, 3, 4\)"),
        (torch.tensor(1.0), r"not torch.float32 \(\)"),
        (torch.ones(0), r"\(0,\)"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        ([1.0, float("nan")], "not finite"),
        (SimpleNamespace(vector=[float("inf")]), "not finite"),
    ],
)
def test_what_is_no_direction_is_refused(wrong, says):
    for make in (vector_of, span_of, ablate):
        with pytest.raises(InputError, match=says):
            make(wrong)


WRONG = {
    "no hook": (lambda: add(R), "add needs at=, a hook's name"),
    "empty hook": (lambda: affine(lp.Direction(R, "", -1, "", {}), R), "affine needs at="),
    "a subspace to add": (
        lambda: here(add, torch.ones(2, 6)),
        r"one vector \[d\], but .* \(2, 6\)",
    ),
    "scaled subspace": (lambda: here(affine, torch.eye(6), R, scale=1), "with a scale"),
    "wide reference": (lambda: here(affine, R, torch.ones(5)), "has 5 dimensions, the direction 6"),
    "many references": (lambda: here(affine, R, torch.ones(2, 6)), "one mean activation"),
    "no references": (lambda: affine(R, {}), "name one at least"),
    "at twice": (lambda: here(affine, R, {"hook_embed": R}), "leave at out"),
    "infinite scale": (lambda: here(add, R, float("inf")), "scale is inf"),
    "no fraction": (lambda: ablate(R, fraction=float("nan")), "fraction is nan"),
    "no site": (lambda: ablate(R, at=()), "at or layers is empty"),
    "no layer": (lambda: ablate(R, layers=[]), "at or layers is empty"),
    "from the end": (lambda: ablate(R, layers=[-1]), "numbers counted from 0"),
    "layer by name": (lambda: ablate(R, layers="last"), "numbers counted from 0"),
    "layers of a name": (lambda: ablate(R, at="hook_embed", layers=[1]), "full name 'hook_embed'"),
    "positions": (lambda: ablate(R, positions="last"), "the words are 'prompt' and 'new'"),
    "activation": (lambda: here(replace, "zeros"), "not of type str"),
    "integers": (lambda: here(replace, [1, 2]), "floating-point numbers"),
    "not finite": (lambda: here(replace, [float("nan")]), "not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told_in_a_sentence(name):
    make, says = WRONG[name]
    with pytest.raises(InputError, match=says):
        make()


WRONG_WHEN_RUN = {
    "width": (ablate(R), InputError, r"6 dimensions edits .* blocks.0.hook_resid_pre has .* 64\)"),
    "heads": (add(random(8), at="blocks.0.attn.hook_z"), InputError, r"has .* \(2, 10, 8, 8\)"),
    "layer": (ablate(random(64), layers=[7]), HookNameError, "'blocks.7.hook_resid_pre'"),
    "site": (ablate(random(64), at="resid_pree"), HookNameError, "did you mean"),
    "hook": (add(random(64), at="resid_pre"), HookNameError, "no hook is named"),
    "shape": (replace(random(7, 64), at=SOURCE), InputError, r"\(7, 64\) cannot stand in .* of bl"),
    "scores": (replace(R, at="*.hook_attn_scores"), InputError, "put at hooks"),
}


@pytest.mark.parametrize("name", WRONG_WHEN_RUN)
def test_what_does_not_fit_the_model_is_told_when_run(name):
    edit, error, says = WRONG_WHEN_RUN[name]
    model = tiny.make("llama-gqa")
    with pytest.raises(error, match=says):
        model.run_with_hooks(tiny.tokens(length=10), fwd_hooks=edit)
    assert not any(point.fwd_hooks for point in model.hook_points())
