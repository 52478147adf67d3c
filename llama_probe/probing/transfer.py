"""Does what a probe learnt on one data set hold on another?

A probe that finds a concept where it was trained may have found something that goes with it there:
of "the city of X is in Y" it may learn that X goes with Y, which on "is not in" is the opposite of
truth (Marks and Tegmark 2023, arXiv 2310.06824; Levinstein and Herrmann 2023, arXiv 2307.00175).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from llama_probe.errors import InputError, near
from llama_probe.probing.cells import measured
from llama_probe.probing.data import layer_of
from llama_probe.probing.design import Part, Samples, held_out, parts_of, strengths_on
from llama_probe.probing.fit import STRENGTHS, check_kind, needs_classes
from llama_probe.probing.folds import Split, grouped_folds
from llama_probe.probing.labels import Labels
from llama_probe.probing.scores import HeldOut, metrics_for
from llama_probe.probing.sets import data_sets, features_of, samples_of


def transfer(
    sets: Mapping[str, Sequence[Any]],
    *,
    hooks: Any = None,
    probe: str = "logistic",
    strength: int | float | None = None,
    metrics: Sequence[str] | None = None,
    folds: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Fit a probe on each data set and score it on each: the transfer matrix.

    No probe scores a sample whose group it was trained on. Where two sets share groups (and on the
    diagonal, where all are shared), probes are fitted on folds of the training set's groups, and
    each test sample is scored by one that did not see its group; a set that shares none is scored
    by a probe of the whole training set.

    Args:
        sets: By name: activations, labels, and groups if there are any. Activations and labels are
            what `lp.probe` takes, with one kind of label; groups a column or one for each prompt
            (or row). Without groups each text is one. All sets have the same hooks, positions and
            classes.
        hooks: Names or globs; None: all.
        probe: "logistic", "ridge" or "mass_mean".
        strength: Of the regularisation; None: chosen on inner folds of the training set.
        metrics: Which of those of `lp.probe`, but recall at a rate of false positives, whose
            threshold is set on other folds; None: AUROC and accuracy, or r2 for numbers.
        folds: Of the training set's groups.
        seed: Of folds and intervals.
        progress: Whether to show a bar; None: on a terminal.

    Returns:
        One row for each pair, hook, position and metric: `train test hook layer at probe metric
        value ci_low ci_high n groups note`. The interval is from drawing the test set's groups
        again, `n` and `groups` are the test set's; an AUROC below 0.5 says that the labels are read
        the wrong way round.

    Raises:
        InputError: Sets differ in hooks, positions, dimensions or classes, an activation is not
            finite, or an argument cannot be used.

    >>> random = np.random.default_rng(0)
    >>> y = random.integers(2, size=60)
    >>> x = random.normal(size=(60, 4)) + 3 * y[:, None]
    >>> frame = transfer({"one": (x, y), "reversed": (x, 1 - y)}, metrics=["auroc"])
    >>> (frame.value > 0.5).tolist()
    [True, False, False, True]
    """
    import sklearn.linear_model  # noqa: F401 - only libraries that are loaded can be limited

    check_kind(probe)
    given = data_sets(sets, hooks)
    chooses = strength is None and len(STRENGTHS[probe]) > 1
    hidden = None if progress is None else not progress
    rows = []
    # One thread, as in `lp.probe`: the products are small.
    with threadpool_limits(1):
        for at in given[0].positions:
            samples = samples_of(given, at)
            needs_classes(probe, samples[0].labels)
            names = _checked(metrics, probe, samples[0].labels)
            parts = [
                _parts(some, chooses, folds, seed, one.name)
                for one, some in zip(given, samples, strict=True)
            ]
            for hook in tqdm(given[0].source.hooks, desc="transfer", unit="hook", disable=hidden):
                x = features_of(given, hook, at)
                for pair, held in _matrix(x, samples, parts, probe, strength, seed):
                    where = [given[one].name for one in pair] + [hook, layer_of(hook), at, probe]
                    note = _note(*(samples[one] for one in pair))
                    for one in measured(probe, "", [held], names, seed):
                        rows.append([*where, one.metric, *one.interval, one.n, one.groups, note])
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = ["train", "test", "hook", "layer", "at", "probe"]
_COLUMNS += ["metric", "value", "ci_low", "ci_high", "n", "groups", "note"]


def _matrix(
    x: Sequence[Float[np.ndarray, "_n d"]],
    samples: Sequence[Samples],
    parts: Sequence[Sequence[Part]],
    probe: str,
    strength: int | float | None,
    seed: int,
) -> Iterator[tuple[tuple[int, int], HeldOut]]:
    """For each pair of a training and a test set, which may be one, the test set's scores."""
    for train in range(len(samples)):
        strengths = strengths_on(probe, x[train], samples[train], parts[train], strength)
        for test in range(len(samples)):
            splits = _splits(samples[train], samples[test], parts[train], seed)
            yield (
                (train, test),
                held_out(
                    probe,
                    np.concatenate([x[train], x[test]]),
                    _joined(samples[train], samples[test]),
                    list(splits.values()),
                    [strengths[part] for part in splits],
                ),
            )


def _parts(samples: Samples, chooses: bool, folds: int, seed: int, name: str) -> list[Part]:
    """The folds of a training set, and last the whole of it with nothing held out."""
    splits = grouped_folds(samples.labels, samples.groups, folds, seed, name)
    splits.append(Split(np.arange(len(samples)), np.arange(0)))
    return parts_of(samples, splits, seed, name) if chooses else list(map(Part, splits))


def _splits(train: Samples, test: Samples, parts: Sequence[Part], seed: int) -> dict[int, Split]:
    """Which part of the training set the probe for which test samples is fitted on.

    Args:
        train: The training set.
        test: The test set, which may be the same.
        parts: Of the training set; the last one is the whole.
        seed: For groups that the training set does not have, which go to any fold.

    Returns:
        By place in `parts`: rows of the two sets joined, those of the test set after the others.
    """
    *folds, whole = [part.split for part in parts]
    rows = len(train) + np.arange(len(test))
    if not np.isin(test.unit, train.unit).any():
        return {len(folds): Split(whole.train, rows)}
    units = 1 + max(train.unit.max(), test.unit.max())
    fold_of = np.random.default_rng(seed).integers(len(folds), size=units)
    for fold, split in enumerate(folds):
        fold_of[train.unit[split.test]] = fold
    fold = fold_of[test.unit]
    found = {one: Split(split.train, rows[fold == one]) for one, split in enumerate(folds)}
    return {one: split for one, split in found.items() if len(split.test)}


def _joined(train: Samples, test: Samples) -> Samples:
    values = np.concatenate([train.labels.values, test.labels.values])
    units = np.concatenate([train.unit, test.unit])
    return Samples(Labels(values, train.labels.classes), units)


def _checked(metrics: Sequence[str] | None, probe: str, labels: Labels) -> list[str]:
    """The metrics to give, in order."""
    there = [name for name in metrics_for(probe, labels) if "1pct" not in name]
    if metrics is None:
        return [name for name in there if name in ("auroc", "accuracy", "r2")]
    for name in metrics:
        if name not in there:
            raise InputError(
                f"metrics has {name!r}{near(name, there)}; there are {', '.join(there)}"
            )
    return list(metrics)


def _note(train: Samples, test: Samples) -> str:
    """Which test samples were scored by a probe of a part of the training set."""
    units = np.unique(test.unit)
    shared = int(np.isin(units, train.unit).sum())
    return f"{shared} of {len(units)} groups are trained on too, and held out" if shared else ""
