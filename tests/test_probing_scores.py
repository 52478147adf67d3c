"""Metrics of held-out scores, against scikit-learn's, and their bootstrap."""

import numpy as np
import pytest
from sklearn import metrics as sk

from llama_probe.probing import scores
from llama_probe.probing.bootstrap import intervals
from llama_probe.probing.design import Samples, held_out
from llama_probe.probing.folds import grouped_folds
from llama_probe.probing.labels import Labels
from llama_probe.probing.scores import HeldOut, once

N, FOLDS = 400, 4


def held(
    values: np.ndarray,
    labels: np.ndarray,
    fold: np.ndarray | None = None,
    unit: np.ndarray | None = None,
) -> HeldOut:
    n, columns = len(labels), values.reshape(len(labels), -1)
    classes = tuple(range(int(labels.max()) + 1)) if labels.dtype.kind == "i" else None
    return HeldOut(
        columns,
        Labels(labels, classes),
        np.arange(n) % FOLDS if fold is None else fold,
        np.arange(n) if unit is None else unit,
        columns[:, 0].copy(),
    )


def value(metric: str, of: HeldOut) -> float:
    return getattr(scores, metric)(of, once(of)).item()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def two(random: np.random.Generator) -> HeldOut:
    """Two classes, one in three positive, with ties."""
    labels = (random.random(N) < 1 / 3).astype(int)
    return held(np.round(random.normal(size=N) + labels, 1), labels)


def of_folds(metric, of: HeldOut) -> float:
    rows = [of.fold == fold for fold in range(FOLDS)]
    return float(np.mean([metric(of.labels.values[r], of.scores[r, 0]) for r in rows]))


def test_two_classes_agree_with_scikit_learn(two: HeldOut) -> None:
    labels, predicted = two.labels.values, two.scores[:, 0] > 0
    likely = 1 / (1 + np.exp(-two.scores[:, 0]))
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "auroc": of_folds(sk.roc_auc_score, two),
        "average_precision": of_folds(sk.average_precision_score, two),
        "brier": sk.brier_score_loss(labels, likely),
    }
    assert {name: value(name, two) for name in expected} == pytest.approx(expected, abs=1e-12)


def test_weights_are_scikit_learns_sample_weights(two: HeldOut, random) -> None:
    weights = random.integers(4, size=(3, N)).astype(float)
    found = scores.auroc(two, weights), scores.average_precision(two, weights)
    for name, values in zip(("roc_auc_score", "average_precision_score"), found, strict=True):
        for some, got in zip(weights, values, strict=True):
            rows = [two.fold == fold for fold in range(FOLDS)]
            parts = [
                getattr(sk, name)(two.labels.values[r], two.scores[r, 0], sample_weight=some[r])
                for r in rows
            ]
            assert got == pytest.approx(np.mean(parts), abs=1e-12)


def test_more_classes_are_one_against_the_rest(random: np.random.Generator) -> None:
    labels = random.integers(3, size=N)
    many = held(random.normal(size=(N, 3)) + np.eye(3)[labels], labels, np.zeros(N, int))
    classes = [labels == code for code in range(3)]
    auroc = np.mean([sk.roc_auc_score(c, s) for c, s in zip(classes, many.scores.T, strict=True)])
    assert value("auroc", many) == pytest.approx(auroc, abs=1e-12)
    assert value("accuracy", many) == (many.scores.argmax(axis=1) == labels).mean()
    predicted = np.exp(many.scores) / np.exp(many.scores).sum(axis=1, keepdims=True)
    brier = np.square(predicted - np.eye(3)[labels]).sum(axis=1).mean()
    assert value("brier", many) == pytest.approx(brier)


def test_numbers_agree_with_scikit_learn(random: np.random.Generator) -> None:
    numbers = random.normal(5, 2, N)
    found = held(numbers + random.normal(size=N), numbers)
    assert value("r2", found) == pytest.approx(sk.r2_score(numbers, found.scores[:, 0]), abs=1e-12)


def test_auroc_is_not_deceived_by_the_heights_of_folds(random: np.random.Generator) -> None:
    """Folds with more positives have lower scores: pooled, a perfect ranking looks reversed."""
    fold = np.repeat(np.arange(4), 100)
    labels = (random.random(400) < np.array([0.05, 0.1, 0.9, 0.95])[fold]).astype(int)
    perfect = held(labels - 100.0 * fold, labels, fold)
    assert sk.roc_auc_score(labels, perfect.scores) < 0.2
    assert value("auroc", perfect) == value("average_precision", perfect) == 1
    interval = intervals([perfect], {"auroc": scores.auroc}, 0)["auroc"]
    assert (interval.low, interval.high) == (1, 1)


def test_the_threshold_comes_from_the_other_folds(random: np.random.Generator) -> None:
    """Negatives of one fold score higher than all others: a threshold of its own would hide it."""
    labels, fold = np.repeat([0, 1], 200), np.tile(np.arange(4), 100)
    shifted = held(random.normal(size=400) + 3 * labels + 5 * (fold == 0), labels, fold)
    assert value("fpr_at_1pct_threshold", shifted) > 0.2
    same = held(random.normal(size=400) + 3 * labels, labels, fold)
    assert value("fpr_at_1pct_threshold", same) < 0.04
    assert 0.5 < value("recall_at_1pct_fpr", same) < 0.9


def test_recall_by_hand() -> None:
    """Of 200 negatives of the other fold, two may be flagged: those at 198 and 199."""
    negatives = np.arange(200.0)
    positives = np.array([197.0, 197.5, 198.0, 199.0])
    both = np.concatenate([negatives, positives, negatives, positives])
    labels = np.concatenate([np.zeros(200, int), np.ones(4, int)] * 2)
    found = held(both, labels, np.repeat([0, 1], 204))
    assert value("fpr_at_1pct_threshold", found) == 2 / 200
    assert value("recall_at_1pct_fpr", found) == 3 / 4


def test_recall_is_refused_below_100_negatives(two: HeldOut) -> None:
    labels = Labels(np.repeat([0, 1], [99, 300]), (0, 1))
    assert "99 negatives" in scores.refusal("recall_at_1pct_fpr", labels)
    assert "99 negatives" in scores.refusal("fpr_at_1pct_threshold", labels)
    assert scores.refusal("auroc", labels) == ""
    assert scores.refusal("recall_at_1pct_fpr", two.labels) == ""


def test_calibration_error_by_hand() -> None:
    """Half the samples are told 0.75, half 0.25, and half of either are positive."""
    log_odds = np.log(3) * np.repeat([1.0, -1.0], 100)
    assert value("ece", held(log_odds, np.repeat([1, 0, 1, 0], 50))) == pytest.approx(0.25)
    calibrated = np.repeat([1, 0, 1, 0], [75, 25, 25, 75])
    assert value("ece", held(log_odds, calibrated)) == pytest.approx(0)


def test_folds_of_other_strengths_share_a_threshold(random: np.random.Generator) -> None:
    """A probe that is held back a thousand times more has scores a thousand times as small."""
    labels = np.arange(2000) % 2
    x = random.normal(size=(2000, 5)) + labels[:, None]
    samples = Samples(Labels(labels, (0, 1)), np.arange(2000))
    splits = grouped_folds(samples.labels, None, 2, seed=0)
    found = held_out("logistic", x, samples, splits, [1.0, 1e5])
    largest = [np.abs(found.scores[found.fold == fold]).max() for fold in (0, 1)]
    assert largest[0] > 20 * largest[1]
    assert 0.002 < value("fpr_at_1pct_threshold", found) < 0.03
    assert value("recall_at_1pct_fpr", found) > 0.3


def test_a_bootstrap_of_groups_is_wider_where_samples_repeat(two: HeldOut) -> None:
    """Every sample eight times over is no more evidence than once."""
    repeated = np.repeat(np.arange(N), 8)
    values, labels, fold = two.scores[repeated], two.labels.values[repeated], two.fold[repeated]
    by = {"accuracy": scores.accuracy, "auroc": scores.auroc}
    as_samples = intervals([held(values, labels, fold)], by, 0)
    as_groups = intervals([held(values, labels, fold, repeated)], by, 0)
    once_each = intervals([two], by, 0)
    for name in by:
        narrow, wide, true = (
            one[name].high - one[name].low for one in (as_samples, as_groups, once_each)
        )
        assert wide > 2 * narrow
        assert wide == pytest.approx(true, rel=0.15)


def test_an_interval_is_that_of_the_textbook(two: HeldOut) -> None:
    low, high = intervals([two], {"accuracy": scores.accuracy}, 0)["accuracy"][1:]
    share = value("accuracy", two)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(share * (1 - share) / N), rel=0.1)
    assert intervals([two], {"a": scores.auroc}, 0) == intervals([two], {"a": scores.auroc}, 0)
    assert intervals([two], {"a": scores.auroc}, 0) != intervals([two], {"a": scores.auroc}, 1)


def test_a_resample_without_a_class_is_left_out() -> None:
    """Two units, one a class: half of the resamples have no AUROC."""
    labels = np.repeat([0, 1], 10)
    perfect = held(labels.astype(float), labels, np.zeros(20, int), labels)
    interval = intervals([perfect], {"auroc": scores.auroc}, 0)["auroc"]
    assert tuple(interval) == (1, 1, 1)
