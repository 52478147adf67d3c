"""Fits against scikit-learn's own, the choice of a strength, and folds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llama_probe.errors import InputError
from llama_probe.probing import choose_strength, fit
from llama_probe.probing.folds import grouped_folds, inner_splits
from llama_probe.probing.labels import Labels, coded


def drawn(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose features differ in scale and mean, and labels that they tell in part."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    means = random.normal(size=(classes, d))
    x = random.normal(size=(n, d)) + means[labels]
    return x * random.uniform(0.1, 30, d) + random.normal(0, 50, d), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("d", [8, 90], ids=["fewer features", "more features"])
def test_logistic_is_scikit_learns_on_standardised_features(d: int, classes: int) -> None:
    x, labels = drawn(60, d, classes)
    own = fit("logistic", x, labels, strength=10)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000))
    expected = model.fit(x, labels).decision_function(x).reshape(60, -1)
    assert own(torch.from_numpy(x)).numpy() == pytest.approx(expected, abs=2e-2)
    assert own.classes == tuple(range(classes))


@pytest.mark.parametrize("d", [8, 90], ids=["fewer features", "more features"])
def test_ridge_is_scikit_learns_on_standardised_features(d: int) -> None:
    x, labels = drawn(60, d, 3)
    rows = torch.from_numpy(x)
    for task, model in ((labels, RidgeClassifier(7)), (labels == 1, RidgeClassifier(7))):
        expected = make_pipeline(StandardScaler(), model).fit(x, task).decision_function(x)
        own = fit("ridge", x, task, strength=7)(rows).numpy()
        assert own == pytest.approx(expected.reshape(60, -1), abs=1e-8)
    numbers = x[:, 0] * 3 + 2
    expected = make_pipeline(StandardScaler(), Ridge(7)).fit(x, numbers).predict(x)
    own = fit("ridge", x, numbers, strength=7)
    assert own(rows).numpy()[:, 0] == pytest.approx(expected, abs=1e-8)
    assert own.classes is None


def test_mass_mean_is_the_difference_of_means_with_a_midpoint_threshold() -> None:
    x, labels = drawn(60, 5, 2)
    own = fit("mass_mean", x, labels)
    zero, one = (x[labels == code].mean(axis=0) for code in (0, 1))
    assert own.weight.numpy()[0] == pytest.approx(one - zero)
    assert own(torch.from_numpy((zero + one)[None] / 2)).item() == pytest.approx(0, abs=1e-9)


def test_mass_mean_of_several_classes_is_the_nearest_mean() -> None:
    x, labels = drawn(90, 5, 4)
    own = fit("mass_mean", x, labels)(torch.from_numpy(x)).argmax(dim=1).numpy()
    assert (own == NearestCentroid().fit(x, labels).predict(x)).all()


def test_features_that_do_not_vary_say_nothing() -> None:
    x, labels = drawn(60, 5, 2)
    flat = np.hstack([x, np.full((60, 1), 1 / 3)])
    for kind in ("logistic", "ridge"):
        own = fit(kind, flat, labels, strength=1)
        assert own.weight[0, 5] == 0
        assert torch.allclose(own.weight[:, :5], fit(kind, x, labels, strength=1).weight)


def test_labels_of_any_type_and_tensors() -> None:
    x, labels = drawn(40, 3, 2)
    names = np.array(["no", "yes"])[labels]
    of_text = fit("logistic", torch.from_numpy(x).float(), list(names), strength=1)
    assert of_text.classes == ("no", "yes")
    assert torch.allclose(of_text.weight, fit("logistic", x, labels, strength=1).weight, rtol=1e-3)
    assert fit("ridge", x, torch.from_numpy(labels), strength=1).classes == (0, 1)


def test_the_strength_suits_the_data() -> None:
    """A thousand clean samples want little regularisation, thirty noisy ones want much."""
    random = np.random.default_rng(0)
    clean = random.normal(size=(1000, 5))
    noisy = random.normal(size=(30, 200))
    for kind in ("logistic", "ridge"):
        weak = choose_strength(kind, clean, clean @ np.ones(5) > 0)
        strong = choose_strength(kind, noisy, np.arange(30) % 2)
        assert weak <= 10 < 100 <= strong
    assert choose_strength("mass_mean", clean, clean[:, 0] > 0) == 0


def test_the_strength_is_chosen_on_groups() -> None:
    """Every sample is there three times: only folds that know it see that it is all noise."""
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(40, 60)), 3, axis=0)
    labels, groups = np.repeat(np.arange(40) % 2, 3), np.repeat(np.arange(40), 3)
    assert choose_strength("ridge", x, labels) < choose_strength("ridge", x, labels, groups=groups)
    own = fit("ridge", x, labels, groups=groups)
    assert torch.equal(own.weight, fit("ridge", x, labels, strength=1e6).weight)


def test_folds_keep_groups_whole_and_classes_even() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(40, size=300)
    labels = Labels((random.random(300) < 0.2).astype(int), (0, 1))
    splits = grouped_folds(labels, groups, 5, seed=0)
    for train, test in splits:
        assert not set(groups[train]) & set(groups[test])
        assert labels.values[test].mean() == pytest.approx(labels.values.mean(), abs=0.03)
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(300))
    other = grouped_folds(labels, groups, 5, seed=1)
    assert any(set(a.test) != set(b.test) for a, b in zip(splits, other, strict=True))


def test_inner_folds_are_fewer_where_groups_are_few() -> None:
    labels = Labels(np.repeat([0, 1], 6), (0, 1))
    groups = np.repeat(np.arange(4), 3)
    assert len(inner_splits(labels, groups, 3, seed=0)) == 2
    assert len(inner_splits(labels, None, 3, seed=0)) == 3


X = np.zeros((4, 2)) + np.arange(4)[:, None]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("logstic", X, [0, 1, 0, 1]), "did you mean 'logistic'"),
        (("logistic", X, [0, 1, 0]), r"shape \[4, 2\] do not fit 3 labels"),
        (("logistic", X[0], [0, 1]), r"give \[n d\]"),
        (("logistic", X, [1, 1, 1, 1]), "all 4 labels are 1"),
        (("logistic", X, [0.1, 0.2, 0.3, 0.4]), "needs classes, but the labels are numbers"),
        (("ridge", X, [0.5, 0.5, 0.5, 0.5]), "all labels are 0.5"),
        (("ridge", X, [0.5, np.inf, 0.5, 0.5]), "label 1 is not finite"),
        (("logistic", X, [0, 1, None, 1]), "labels are missing, 1 of 4, first at 2"),
        (("logistic", X, [0, "a", 1, "b"]), "several types"),
        (("logistic", X, [[0], [1], [0], [1]]), r"have shape \(4, 1\)"),
        (("mass_mean", X * [[1], [1], [np.nan], [1]], [0, 1, 0, 1]), "in 1 of 4 rows, .* row 2"),
    ],
)
def test_bad_input_is_a_sentence(given: tuple, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        fit(*given)


def test_bad_strengths_and_classes() -> None:
    with pytest.raises(InputError, match="strength is -1"):
        fit("ridge", X, [0, 1, 0, 1], strength=-1)
    with pytest.raises(InputError, match="'c' is none of the classes"):
        fit("ridge", X, ["a", "b", "c", "a"], classes=["a", "b"])
    with pytest.raises(InputError, match="groups of shape"):
        fit("ridge", X, [0, 1, 0, 1], groups=[0, 1])
    with pytest.raises(InputError, match="2 groups with the label 0, .* only 1"):
        fit("ridge", X, [0, 1, 0, 1], groups=[0, 1, 0, 2])


def test_what_labels_are() -> None:
    assert coded([True, False]).classes == (False, True)
    assert coded([3, 1, 3]).classes == (1, 3)
    assert coded(list(range(21))).classes is None
    assert coded(list(range(21)), "classes").classes == tuple(range(21))
    assert coded([0.0, 1.0]).classes is None
    assert coded([0.0, 1.0], "classes").classes == (0.0, 1.0)
    assert coded([0, 1], "number").values.tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="are to be numbers, but the first is 'a'"):
        coded(["a", "b"], "number")
    with pytest.raises(InputError, match="task is 'class'"):
        coded(["a", "b"], "class")
