"""Fitting linear probes, and choosing how strongly to regularise them on inner folds.

Everything is learnt from the samples given, the standardising included, and folded into a weight
and a bias for raw activations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError, near
from llama_probe.probing.folds import Split, group_codes, inner_splits
from llama_probe.probing.labels import Labels, coded
from llama_probe.probing.linear import LinearProbe

KINDS = ("logistic", "ridge", "mass_mean")
# What is tried, from strong to weak: a penalty of strength / 2 * |weight|^2 beside the summed
# log-loss, or of strength * |weight|^2 beside the summed squared error, on standardised features.
STRENGTHS = {
    "logistic": (1e4, 1e3, 1e2, 1e1, 1e0),
    "ridge": (1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1e0),
    "mass_mean": (0.0,),
}
INNER_FOLDS = 3


class Solution(NamedTuple):
    """What a fit learnt: scores are x @ weight.T + bias."""

    weight: Float[np.ndarray, "out d"]
    bias: Float[np.ndarray, " out"]

    def scores(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n out"]:
        """The scores of raw activations."""
        return x @ self.weight.T + self.bias


def fit(
    kind: str,
    x: Any,
    y: Any,
    *,
    classes: Sequence[Any] | None = None,
    groups: Any = None,
    strength: int | float | None = None,
    seed: int = 0,
) -> LinearProbe:
    """Fit one linear probe on all samples given.

    - "logistic": logistic regression (scikit-learn), multinomial for more than two classes, on
      features standardised to mean 0 and variance 1.
    - "ridge": least squares with an L2 penalty on standardised features. Classes are coded -1 and
      1 (one against the rest if there are more than two), as scikit-learn's RidgeClassifier does.
    - "mass_mean": the class whose mean is nearest on the raw features; with two classes the weight
      is the difference of the means, and the threshold lies halfway between them (Marks and
      Tegmark 2023, arXiv 2310.06824).

    Args:
        kind: One of those.
        x: The activations, an array or a tensor [n d].
        y: A label for each of them.
        classes: All labels there are; None: those in `y`, or, if `y` are floats, a number to
            predict.
        groups: A group for each sample, which the inner folds keep together; None: no groups.
        strength: Of the regularisation: 1 / C of scikit-learn's LogisticRegression, alpha of its
            Ridge; "mass_mean" has none. None: chosen by `choose_strength`.
        seed: Of the inner folds.

    Returns:
        The probe, for raw activations.

    Raises:
        InputError: There is no such kind, or strength; labels and activations differ in number, an
            activation is not finite, there is one class only, or numbers where `kind` needs
            classes.

    >>> probe = fit("mass_mean", np.array([[0.0], [2.0], [4.0], [6.0]]), ["no", "no", "yes", "yes"])
    >>> probe.weight.tolist(), probe.bias.tolist(), probe.classes
    ([[4.0]], [-12.0], ('no', 'yes'))
    """
    from threadpoolctl import threadpool_limits

    check_strength(strength)
    features, labels = _checked(kind, x, y, classes)
    with threadpool_limits(1):  # the products are small: threads would wait for each other
        if strength is None:
            strength = _chosen(kind, features, labels, groups, seed)
        solution = solutions(kind, features, labels, (strength,))[0]
    return as_probe(kind, solution, labels)


def choose_strength(
    kind: str,
    x: Any,
    y: Any,
    *,
    classes: Sequence[Any] | None = None,
    groups: Any = None,
    seed: int = 0,
) -> float:
    """The strength of regularisation that predicts best on three inner (grouped) folds.

    Best is the least held-out log-loss ("logistic") or squared error ("ridge") among powers of ten;
    among equals the strongest. Arguments and errors are those of `fit`.

    >>> x = np.random.default_rng(0).normal(size=(60, 5))
    >>> choose_strength("ridge", x, x[:, 0] * 3)
    1.0
    """
    from threadpoolctl import threadpool_limits

    features, labels = _checked(kind, x, y, classes)
    with threadpool_limits(1):
        return _chosen(kind, features, labels, groups, seed)


def as_probe(kind: str, solution: Solution, labels: Labels) -> LinearProbe:
    """A solution as a probe for tensors."""
    weight, bias = (torch.from_numpy(np.array(part, dtype=float)) for part in solution)
    return LinearProbe(weight, bias, kind, labels.classes)


def solutions(
    kind: str, x: Float[np.ndarray, "n d"], labels: Labels, strengths: Sequence[int | float]
) -> list[Solution]:
    """A fit for each strength; from strong to weak is fastest."""
    if kind == "mass_mean":
        return [_mass_mean(x, labels)] * len(strengths)
    basis = _Basis(x)
    path = _logistic_path if kind == "logistic" else _ridge_path
    return [basis.raw(solution) for solution in path(basis.z, labels, strengths)]


def strength_on(
    kind: str, x: Float[np.ndarray, "n d"], labels: Labels, splits: Sequence[Split]
) -> float:
    """The strength with the least held-out loss on some folds."""
    strengths = STRENGTHS[kind]
    if len(strengths) == 1:
        return strengths[0]
    losses = np.zeros(len(strengths))
    for train, test in splits:
        held_out = labels[test]
        for place, solution in enumerate(solutions(kind, x[train], labels[train], strengths)):
            losses[place] += _loss(kind, solution.scores(x[test]), held_out)
    # What differs by rounding alone is a tie: the strongest.
    return strengths[int(np.flatnonzero(losses <= losses.min() * (1 + 1e-9))[0])]


def probabilities(scores: Float[np.ndarray, "n out"]) -> Float[np.ndarray, "n classes"]:
    """What a logistic probe's scores say of each class."""
    from scipy.special import softmax

    logits = np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores
    return softmax(logits, axis=1)


def mean_and_scale(
    x: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """What standardises features: those that do not vary, up to rounding, become 0.

    >>> mean_and_scale(np.array([[1.0, 5.0], [3.0, 5.0]]))
    (array([2., 5.]), array([ 1., inf]))
    """
    mean, spread = x.mean(axis=0), x.std(axis=0)
    return mean, np.where(spread > 1e-9 * np.abs(mean), spread, np.inf)


class _Basis:
    """Samples standardised and, where they are fewer than features, rotated into their own span.

    A penalty on the squared weight does not notice a rotation, and the best weight lies in the span
    of the samples.
    """

    def __init__(self, x: Float[np.ndarray, "n d"]) -> None:
        self.mean, self.scale = mean_and_scale(x)
        self.z = (x - self.mean) / self.scale
        self.rotation = None
        if len(x) < x.shape[1]:
            self.rotation, triangle = np.linalg.qr(self.z.T)
            self.z = np.ascontiguousarray(triangle.T)

    def raw(self, solution: Solution) -> Solution:
        """The same map, of raw activations."""
        weight, bias = solution
        weight = (weight if self.rotation is None else weight @ self.rotation.T) / self.scale
        return Solution(weight, bias - weight @ self.mean)


def _mass_mean(x: Float[np.ndarray, "n d"], labels: Labels) -> Solution:
    """Nearest class mean: a score of mu.x - |mu|^2 / 2 for each, or its difference for two."""
    n_classes = len(labels.classes or ())
    means = np.array([x[labels.values == code].mean(axis=0) for code in range(n_classes)])
    bias = -np.square(means).sum(axis=1) / 2
    if labels.two:
        return Solution(means[1:] - means[:1], bias[1:] - bias[:1])
    return Solution(means, bias)


def _logistic_path(
    z: Float[np.ndarray, "n r"], labels: Labels, strengths: Sequence[int | float]
) -> list[Solution]:
    from sklearn.linear_model import LogisticRegression

    found = []
    model = LogisticRegression(warm_start=True, max_iter=10_000)
    for strength in strengths:
        model.C = 1 / strength
        model.fit(z, labels.values)
        found.append(Solution(np.array(model.coef_), np.array(model.intercept_)))
    return found


def _ridge_path(
    z: Float[np.ndarray, "n r"], labels: Labels, strengths: Sequence[int | float]
) -> list[Solution]:
    """The closed form, with the products of the features taken once."""
    from scipy.linalg import solve

    targets = labels.indicators()
    bias = targets.mean(axis=0)
    gram, moment = z.T @ z, z.T @ (targets - bias)
    identity = np.eye(len(gram))
    return [
        Solution(solve(gram + strength * identity, moment, assume_a="pos").T, bias)
        for strength in strengths
    ]


def _loss(kind: str, scores: Float[np.ndarray, "n out"], labels: Labels) -> float:
    if kind == "ridge":
        return float(np.square(scores - labels.indicators()).sum())
    chosen = probabilities(scores)[np.arange(len(labels)), labels.values]
    return -float(np.log(np.maximum(chosen, 1e-300)).sum())


def _chosen(
    kind: str, x: Float[np.ndarray, "n d"], labels: Labels, groups: Any, seed: int
) -> float:
    if len(STRENGTHS[kind]) == 1:
        return STRENGTHS[kind][0]
    codes = None if groups is None else group_codes(groups, len(x))
    return strength_on(kind, x, labels, inner_splits(labels, codes, INNER_FOLDS, seed))


def _checked(
    kind: str, x: Any, y: Any, classes: Sequence[Any] | None
) -> tuple[Float[np.ndarray, "n d"], Labels]:
    check_kind(kind)
    features = np.asarray(x.double().cpu() if isinstance(x, Tensor) else x, dtype=float)
    labels = coded(y, classes=classes)
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(
            f"activations of shape {list(features.shape)} do not fit {len(labels)} labels: give "
            "[n d] and n labels"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(
            f"activations are NaN or infinite in {len(bad)} of {len(features)} rows, first in row "
            f"{bad[0]}"
        )
    needs_classes(kind, labels)
    return features, labels


def check_kind(kind: str) -> None:
    """Raises InputError for a kind of probe that there is not."""
    if kind not in KINDS:
        raise InputError(
            f"probe is {kind!r}, but should be one of {', '.join(KINDS)}{near(str(kind), KINDS)}"
        )


def check_strength(strength: int | float | None) -> None:
    """Raises InputError for a strength that no probe can have."""
    if strength is not None and not 0 < strength < np.inf:
        raise InputError(f"strength is {strength}, but should be above 0, or None to choose it")


def needs_classes(kind: str, labels: Labels, what: str = "label") -> None:
    """Raises InputError if a kind of probe cannot predict numbers."""
    if labels.classes is None and kind != "ridge":
        raise InputError(
            f"{what}: a {kind} probe needs classes, but the labels are numbers: use probe='ridge', "
            "or bools, texts or whole numbers as labels"
        )
