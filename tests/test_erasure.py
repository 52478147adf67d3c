"""LEACE: its theorems on planted data, the reference implementation, what it leaves held out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

import llama_probe as lp
from llama_probe.capturing import Moments
from llama_probe.errors import InputError
from llama_probe.probing.erasure import Eraser, erasure_check, leace, leace_of_moments


def planted(
    n: int = 600, d: int = 12, classes: int = 2, shift: float = 2, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """Correlated activations far from 0, whose means differ by class along several directions."""
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=n)
    mixing = random.normal(size=(d, d)) * np.logspace(0, -2, d)
    x = random.normal(size=(n, d)) @ mixing + shift * random.normal(size=(classes, d))[y] + 30
    return torch.from_numpy(x), y


def class_means(x: torch.Tensor, y: np.ndarray) -> torch.Tensor:
    return torch.stack([x[torch.from_numpy(y == code)].mean(0) for code in np.unique(y)])


@pytest.mark.parametrize("classes", [2, 4])
def test_class_means_coincide_and_the_mean_stays(classes: int) -> None:
    x, y = planted(classes=classes)
    erased = leace(x, y)(x)
    before, after = (class_means(values, y) for values in (x, erased))
    assert (before - before.mean(0)).abs().max() > 1
    assert (after - after[0]).abs().max() < 1e-9
    assert torch.allclose(erased.mean(0), x.mean(0), atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_no_linear_probe_does_better_than_the_commonest_class(classes: int) -> None:
    x, y = planted(classes=classes)
    erased = leace(x, y)(x).numpy()
    chance = np.bincount(y).max() / len(y)
    for values, least, most in ((x.numpy(), 0.95, 1), (erased, 0, chance + 1e-9)):
        fitted = LogisticRegression(C=1e6, tol=1e-8, max_iter=5000).fit(
            (values - values.mean(0)) / values.std(0), y
        )
        score = fitted.score((values - values.mean(0)) / values.std(0), y)
        assert least <= score <= most
    assert LinearRegression().fit(erased, np.eye(classes)[y]).score(erased, np.eye(classes)[y]) == (
        pytest.approx(0, abs=1e-9)
    )


def test_erasing_twice_is_erasing_once() -> None:
    x, y = planted()
    eraser = leace(x, y)
    once = eraser(x)
    assert torch.allclose(eraser(once), once, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the reference itself
@pytest.mark.parametrize("classes", [2, 4])
def test_the_reference_implementation_agrees(classes: int) -> None:
    from concept_erasure import LeaceFitter

    x, y = planted(classes=classes)
    z = torch.eye(classes, dtype=x.dtype)[y]
    fitter = LeaceFitter.fit(x, z, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-6)
    assert torch.allclose(leace(x, y)(x), fitter.eraser(x), atol=1e-8)


def test_no_other_erasure_moves_less() -> None:
    """The orthogonal projection along the difference of means erases as well, and moves more."""
    x, y = planted(shift=0.2)
    erased = leace(x, y)(x)
    means = class_means(x, y)
    unit = torch.nn.functional.normalize(means[1] - means[0], dim=0)
    projected = x - torch.outer((x - x.mean(0)) @ unit, unit)
    assert class_means(projected, y).diff(dim=0).abs().max() < 1e-9
    assert (erased - x).square().sum() < 0.5 * (projected - x).square().sum()


def test_a_number_is_no_longer_predictable() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 6)) + 5
    y = x @ [1.0, 2, 0, 0, 0, -1] + 0.1 * random.normal(size=400)
    both = np.stack([y, x[:, 3]], axis=1)
    for concept in (y, both):
        erased = leace(torch.from_numpy(x), concept)(torch.from_numpy(x)).numpy()
        assert LinearRegression().fit(x, concept).score(x, concept) > 0.99
        assert LinearRegression().fit(erased, concept).score(erased, concept) < 1e-9


def test_moments_give_the_same_eraser() -> None:
    x, y = planted(classes=3)
    parts = [Moments.of(x[torch.from_numpy(y == code)]) for code in range(3)]
    whole = parts[0] + parts[1] + parts[2]
    cross = torch.stack([part.n / whole.n * (part.mean - whole.mean) for part in parts], dim=1)
    eraser = leace_of_moments(whole.mean, whole.scatter / whole.n, cross)
    assert torch.allclose(eraser(x), leace(x, y)(x), atol=1e-8)


def test_fewer_activations_than_dimensions() -> None:
    x, y = planted(n=8, d=12)
    erased = leace(x, y)(x)
    assert erased.isfinite().all()
    assert class_means(erased, y).diff(dim=0).abs().max() < 1e-8


def test_an_eraser_is_an_edit_of_a_running_model() -> None:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    hook = lp.act_name("resid_post", 1)
    prompts = [f"The capital of {name} is" for name in ("France", "Spain", "Italy", "Japan")]
    labels = ["west", "west", "south", "east"]
    x = lp.capture(model, prompts, hooks=hook, progress=False)[hook]
    eraser = leace(x, labels)
    edit = lp.Edit([(hook, lambda tensor, hook: eraser(tensor))])
    with model.hooks(edit):
        after = lp.capture(model, prompts, hooks="blocks.2.hook_resid_pre", progress=False)
    erased = after["blocks.2.hook_resid_pre"]
    assert torch.allclose(erased, eraser(x), atol=1e-4)
    assert not torch.allclose(erased, x, atol=1e-2)
    assert class_means(erased, np.array(labels)).diff(dim=0).abs().max() < 1e-3


def test_precision_is_kept() -> None:
    x, y = planted()
    assert leace(x, y)(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(leace(x.float(), y), Eraser)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.eye(3), [0, 1], "2 labels for 3"),
        (torch.eye(3), [1, 1, 1], "all 3 labels"),
        (torch.eye(3), np.array([[0.0], [1.0], [np.nan]]), "not finite"),
        (torch.tensor([[1.0], [torch.nan]]), [0, 1], "activation 1 "),
    ],
)
def test_what_cannot_be_used(x: torch.Tensor, y: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        leace(x, y)


def test_a_probe_before_and_after_on_samples_that_neither_saw() -> None:
    x, y = planted(n=1200)
    groups = np.arange(len(y)) // 2
    frame = erasure_check({"blocks.1.hook_resid_post": x}, y, groups, strength=1.0)
    assert frame.columns.tolist() == (
        "hook layer at probe kind metric value ci_low ci_high n groups note".split()
    )
    rows = frame.set_index(["kind", "metric"])
    assert rows.loc[("probe", "auroc"), "value"] > 0.98
    assert rows.loc[("erased", "auroc"), "value"] < 0.6
    assert rows.loc[("erased", "accuracy"), "value"] < 0.6
    assert (
        set(frame["n"]) == {1200} and set(frame["groups"]) == {600} and set(frame["layer"]) == {1}
    )
    assert "480 samples in 12 dimensions" in rows.loc[("erased", "auroc"), "note"]


def test_what_few_samples_do_not_tell_stays_behind() -> None:
    """What an eraser knows is a mean of few samples: the rest of the concept it does not touch."""
    random = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = torch.from_numpy(random.normal(size=(100, 400)))
    x[:, 50] += 4 * torch.from_numpy(y)
    assert class_means(leace(x, y)(x), y).diff(dim=0).abs().max() < 1e-8
    rows = erasure_check(x, y, probe="mass_mean").set_index(["kind", "metric"])
    assert rows.loc[("probe", "auroc"), "value"] > 0.9
    assert rows.loc[("erased", "auroc"), "value"] > 0.75
    assert "40 samples in 400 dimensions" in rows.loc[("erased", "auroc"), "note"]


def test_numbers_before_and_after() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 4))
    frame = erasure_check(x, x[:, 1] + 0.1 * random.normal(size=600), probe="ridge")
    before, after = frame["value"]
    assert before > 0.95 and after < 0.1


def test_a_check_that_cannot_be_made() -> None:
    x, y = planted(n=40)
    with pytest.raises(InputError, match="probe is 'forest'"):
        erasure_check(x, y, probe="forest")
    with pytest.raises(InputError, match="ridge"):
        erasure_check(x, x[:, 0])
