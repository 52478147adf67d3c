"""Least-squares concept erasure: the smallest edit after which no linear probe finds a concept.

LEACE (Belrose et al. 2023, arXiv 2306.03819): a linear probe finds a concept z in activations x
exactly if their cross-covariance is not zero. Of all affine maps that make it zero, the one that
moves x least (in the mean square) is

    x - W⁺ P W (x - mean),

with W the whitening of x, and P the orthogonal projection on the columns of W cov(x, z).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from llama_probe.errors import InputError
from llama_probe.probing.cells import measured
from llama_probe.probing.data import layer_of, source
from llama_probe.probing.design import Part, Samples, held_out, parts_of, strengths_on
from llama_probe.probing.fit import STRENGTHS, check_kind, needs_classes
from llama_probe.probing.folds import Split, grouped_folds
from llama_probe.probing.labels import Labels, coded
from llama_probe.probing.planning import units
from llama_probe.probing.scores import HeldOut
from llama_probe.probing.selection import decisive

# Singular values of the whitened cross-covariance below this share of the largest are rounding.
_NOTHING = 1e-10


@dataclass(frozen=True)
class Eraser:
    """A map of activations that takes a concept out and leaves the mean where it is.

    Attributes:
        mean: [d] in float64.
        left: [d rank]; `left @ right` is the projection that is taken away.
        right: [rank d].
    """

    mean: Float[Tensor, " d"]
    left: Float[Tensor, "d rank"]
    right: Float[Tensor, "rank d"]

    def __call__(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Activations without the concept, in their own precision; also `fn` of a hook's edit."""
        mean, left, right = (part.to(x.device) for part in (self.mean, self.left, self.right))
        precise = x.double()
        return (precise - (precise - mean) @ right.T @ left.T).to(x.dtype)


def leace(x: Float[Tensor, "n d"], y: Any) -> Eraser:
    """The eraser of a concept, from activations and what is known of each.

    On these activations the class means then coincide, so that no linear probe with a bias does
    better than one that ignores them. On others this holds as far as their moments agree, which
    takes many more activations than dimensions: see `erasure_check`.

    Args:
        x: The activations.
        y: The concept: a label for each (bools, texts, few whole numbers: classes), or numbers [n]
            or [n, concepts] that are to be unpredictable.

    Returns:
        A callable on [..., d], which `lp.Edit` can apply to a running model as well.

    Raises:
        InputError: There is not one label for each activation, all are the same, or a number is
            not finite.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 3.0], [0.0, 2.0], [1.0, 0.0], [5.0, 5.0], [6.0, 4.0]])
    >>> erased = leace(x, ["no", "no", "no", "no", "yes", "yes"])(x)
    >>> bool(torch.allclose(erased[:4].mean(0), erased[4:].mean(0), atol=1e-5))
    True
    """
    z = _concept(y)
    if len(z) != len(x):
        raise InputError(f"there are {len(z)} labels for {len(x)} activations; give one each")
    if not x.isfinite().all():
        row = int((~x.isfinite().all(dim=1)).nonzero()[0])
        raise InputError(f"activation {row} has a value that is not finite")
    precise = x.double().cpu()
    centred = precise - precise.mean(dim=0)
    spread = z - z.mean(dim=0)
    return leace_of_moments(
        precise.mean(dim=0), centred.T @ centred / len(x), centred.T @ spread / len(x)
    )


def leace_of_moments(
    mean: Float[Tensor, " d"],
    covariance: Float[Tensor, "d d"],
    cross_covariance: Float[Tensor, "d k"],
) -> Eraser:
    """The eraser from moments alone, for data that does not fit into memory.

    Args:
        mean: Of the activations.
        covariance: Of the activations.
        cross_covariance: Of activations and concept; for classes its columns are each class's
            share times (its mean - the mean of all).

    >>> one = leace_of_moments(torch.zeros(2), torch.eye(2), torch.tensor([[1.0], [0.0]]))
    >>> one(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.0, 4.0]]
    """
    variances, axes = torch.linalg.eigh(covariance.double())
    # As for a pseudo-inverse: what varies less is rounding.
    kept = variances > variances[-1] * len(variances) * torch.finfo(variances.dtype).eps
    deviations, axes = variances[kept].sqrt(), axes[:, kept]
    whiten = (axes / deviations) @ axes.T
    unwhiten = (axes * deviations) @ axes.T
    u, strength, _ = torch.linalg.svd(whiten @ cross_covariance.double(), full_matrices=False)
    u = u[:, strength > _NOTHING * strength[0]]
    return Eraser(mean.double(), unwhiten @ u, u.T @ whiten)


def _concept(y: Any) -> Float[Tensor, "n k"]:
    """What is to be unpredictable, as numbers: one column a class, or the numbers given."""
    if getattr(y, "ndim", 1) == 2:
        numbers = torch.as_tensor(y).double()
        if not numbers.isfinite().all():
            raise InputError("y has a number that is not finite")
        return numbers
    labels = coded(y)
    values = torch.from_numpy(labels.values)
    return values[:, None] if labels.classes is None else one_hot(values).double()


def erasure_check(
    acts: Any,
    labels: Any,
    groups: Any = None,
    *,
    hooks: Any = None,
    probe: str = "logistic",
    strength: int | float | None = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """How well a probe does before and after erasure, where neither has seen the samples.

    Each fold is scored by a probe that was fitted on one half of the other folds; the eraser, where
    there is one, comes from the other half. On the samples of the eraser itself a probe would find
    nothing, which says nothing of others. What is left there is what the eraser could not know: it
    takes away a difference of means that it estimates, and is off by about 2 sqrt(d / n) standard
    deviations for two classes of n samples together in d dimensions that vary alike.

    Args:
        acts: What `lp.probe` takes.
        labels: A column of the prompts, or a label for each prompt (or row).
        groups: Likewise; what must not be torn apart. None: each prompt by itself.
        hooks: Names or globs; None: all.
        probe: "logistic", "ridge" or "mass_mean".
        strength: Of the regularisation; None: chosen on inner folds.
        folds: How many.
        seed: Of folds, halves and intervals.

    Returns:
        For each hook and position two rows a metric ("auroc" and "accuracy"; "r2" for numbers), of
        `kind` "probe" and "erased": `hook layer at probe kind metric value ci_low ci_high n groups
        note`; the interval is from drawing groups again, `note` says how many samples the eraser
        had.

    Raises:
        InputError: An argument cannot be used, or an activation is not finite.

    >>> x = np.random.default_rng(0).normal(size=(400, 3))
    >>> frame = erasure_check(x, x[:, 0] > 0, probe="mass_mean")
    >>> before, after = frame[frame.metric == "auroc"].value
    >>> before > 0.95, after < 0.7
    (True, True)
    """
    check_kind(probe)
    found = source(acts, hooks)
    found.check_finite()
    everyone = Samples(coded(found.per_row(labels, "labels")), units(found, groups))
    needs_classes(probe, everyone.labels)
    names = decisive(everyone.labels)
    rows = []
    for at in found.ats:
        samples = everyone[found.rows(at)]
        splits = grouped_folds(samples.labels, samples.groups, folds, seed, at)
        thirds = [_thirds(samples, split, seed) for split in splits]
        for hook in found.hooks:
            x = torch.from_numpy(found.features(hook, at))
            erased = [leace(x[some], samples.labels.values[some])(x) for some, _ in thirds]
            note = f"by an eraser from {len(thirds[0][0])} samples in {x.shape[1]} dimensions"
            for kind, seen in (("probe", [x] * folds), ("erased", erased)):
                held = _held_out(
                    seen, samples, [split for _, split in thirds], probe, strength, seed
                )
                where = (hook, layer_of(hook), at, probe, kind)
                for one in measured(probe, kind, [held], names, seed):
                    figures = (one.metric, *one.interval, one.n, one.groups)
                    rows.append((*where, *figures, note if kind == "erased" else ""))
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = ["hook", "layer", "at", "probe", "kind", "metric", "value", "ci_low", "ci_high"]
_COLUMNS += ["n", "groups", "note"]


def _thirds(samples: Samples, split: Split, seed: int) -> tuple[Int[np.ndarray, " n"], Split]:
    """Of a fold: the samples for the eraser, and those to fit on and to score."""
    train = samples[split.train]
    half = grouped_folds(train.labels, train.groups, 2, seed, "half of a training part")[0]
    return split.train[half.train], Split(split.train[half.test], split.test)


def _held_out(
    x: Sequence[Float[Tensor, "n d"]],
    samples: Samples,
    splits: Sequence[Split],
    probe: str,
    strength: int | float | None,
    seed: int,
) -> HeldOut:
    """The held-out scores of folds whose activations differ: one set of all samples for each."""
    n, k = len(samples), len(splits)
    values, unit = np.tile(samples.labels.values, k), np.tile(samples.unit, k)
    repeated = Samples(Labels(values, samples.labels.classes), unit)
    apart = [Split(train + n * fold, test + n * fold) for fold, (train, test) in enumerate(splits)]
    if strength is None and len(STRENGTHS[probe]) > 1:
        parts = parts_of(repeated, apart, seed, "half of a training part")
    else:
        parts = list(map(Part, apart))
    every = torch.cat(list(x)).numpy()
    strengths = strengths_on(probe, every, repeated, parts, strength)
    return held_out(probe, every, repeated, apart, strengths)
