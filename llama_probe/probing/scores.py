"""How well held-out scores tell the labels: each metric for many weightings of the samples at once.

A weighting says how often each sample counts, so that one function gives the metric itself (every
sample once) and its bootstrap (as often as the sample's group was drawn).

AUROC and average precision are computed within each fold and averaged, as the probes of different
folds put their scores at different heights: among pooled scores those differences would count as
errors (Parker, Guenter and Bedo 2007; Forman and Scholz 2010).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from llama_probe.probing.fit import probabilities
from llama_probe.probing.labels import Labels

_BINS = 10  # of the calibration error, of equal width
_ALLOWED = 0.01  # false positives
FEWEST_NEGATIVES = 100


@dataclass(frozen=True)
class HeldOut:
    """Samples scored by probes that did not see them.

    Attributes:
        scores: One column for two classes and for numbers, else one a class.
        labels: What they should have said.
        fold: Which probe scored a sample.
        unit: What it is drawn with in a bootstrap: its group.
        level: The first score on a scale that folds share, where 0 is the mean of a probe's
            training part and 1 the length of its weight: strengths and shares of classes may
            differ between folds.
    """

    scores: Float[np.ndarray, "n out"]
    labels: Labels
    fold: Int[np.ndarray, " n"]
    unit: Int[np.ndarray, " n"]
    level: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_units(self) -> int:
        """How many units there are to draw."""
        return len(np.unique(self.unit))

    def of_fold(self, fold: int) -> "HeldOut":
        """The samples of one fold."""
        of = self.fold == fold
        return HeldOut(
            self.scores[of], self.labels[of], self.fold[of], self.unit[of], self.level[of]
        )

    def hits(self) -> Bool[np.ndarray, " n"]:
        """Which samples have the best score for their own class."""
        if self.labels.two:
            return (self.scores[:, 0] > 0) == (self.labels.values == 1)
        return self.scores.argmax(axis=1) == self.labels.values

    def each_class(self) -> list[tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
        """The score for a class and who has it: the second of two, or each against the rest."""
        codes = [1] if self.labels.two else range(len(self.labels.classes or ()))
        return [(self.scores[:, i], self.labels.values == code) for i, code in enumerate(codes)]


def concatenated(parts: Sequence[HeldOut]) -> HeldOut:
    """The samples of several, one after the other."""
    return HeldOut(
        np.concatenate([part.scores for part in parts]),
        Labels(np.concatenate([part.labels.values for part in parts]), parts[0].labels.classes),
        np.concatenate([part.fold for part in parts]),
        np.concatenate([part.unit for part in parts]),
        np.concatenate([part.level for part in parts]),
    )


Weights = Float[np.ndarray, "b n"]
Values = Float[np.ndarray, " b"]
Metric = Callable[[HeldOut, Weights], Values]


def once(held: HeldOut) -> Weights:
    """The weighting that counts each sample once."""
    return np.ones((1, len(held)))


def accuracy(held: HeldOut, weights: Weights) -> Values:
    """The share of samples whose class has the best score."""
    return _mean(held.hits(), weights)


def balanced_accuracy(held: HeldOut, weights: Weights) -> Values:
    """The mean over classes of the accuracy among samples of the class: chance is 1 / classes."""
    classes = range(len(held.labels.classes or ()))
    parts = [
        _mean(held.hits()[of], weights[:, of]) for of in (held.labels.values == c for c in classes)
    ]
    return _mean_of_known(parts)


def auroc(held: HeldOut, weights: Weights) -> Values:
    """The chance that a sample of the class scores above another one; ties count half.

    Within folds; with more than two classes the mean over each against the rest.
    """
    return _within_folds(_auroc, held, weights)


def average_precision(held: HeldOut, weights: Weights) -> Values:
    """Precision averaged over the recalls at which it is reached, as scikit-learn's.

    Within folds; with more than two classes the mean over each against the rest.
    """
    return _within_folds(_average_precision, held, weights)


def recall_at_1pct_fpr(held: HeldOut, weights: Weights) -> Values:
    """The share of positives flagged when 1 % of the negatives of the other folds would be."""
    return _share_flagged(held, weights, held.labels.values == 1)


def fpr_at_1pct_threshold(held: HeldOut, weights: Weights) -> Values:
    """The share of a fold's negatives that the threshold set on other folds really flags."""
    return _share_flagged(held, weights, held.labels.values == 0)


def ece(held: HeldOut, weights: Weights) -> Values:
    """Expected calibration error: by how much a probability is off, over ten bins of equal width.

    Of the probability of the second class, or of the likeliest of more than two (Naeini, Cooper and
    Hauskrecht 2015; Guo et al. 2017, arXiv 1706.04599).
    """
    predicted = probabilities(held.scores)
    if held.labels.two:
        believed, true = predicted[:, 1], held.labels.values == 1
    else:
        believed, true = predicted.max(axis=1), held.hits()
    bins = np.minimum((believed * _BINS).astype(int), _BINS - 1)
    gaps = np.where(bins[:, None] == np.arange(_BINS), (believed - true)[:, None], 0.0)
    return _ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def brier(held: HeldOut, weights: Weights) -> Values:
    """The squared error of the probability of the second class, or summed over more than two."""
    predicted = probabilities(held.scores)
    errors = np.square(predicted - np.eye(predicted.shape[1])[held.labels.values])
    return _mean(errors[:, 1] if held.labels.two else errors.sum(axis=1), weights)


def r2(held: HeldOut, weights: Weights) -> Values:
    """The share of the labels' variance that is predicted; below 0: worse than their mean."""
    true = held.labels.values
    total = weights.sum(axis=1)
    mean = _ratio(weights @ true, total)
    variance = _ratio(weights @ np.square(true), total) - np.square(mean)
    return 1 - _ratio(_mean(np.square(true - held.scores[:, 0]), weights), variance)


def metrics_for(kind: str, labels: Labels) -> dict[str, Metric]:
    """The metrics of a kind of probe, by name."""
    if labels.classes is None:
        found = [r2]
    else:
        found = [accuracy, balanced_accuracy, auroc, average_precision]
        found += [recall_at_1pct_fpr, fpr_at_1pct_threshold] if labels.two else []
        found += [ece, brier] if kind == "logistic" else []
    return {metric.__name__: metric for metric in found}


def refusal(metric: str, labels: Labels) -> str:
    """Why a metric is not given, as a sentence; empty if it is."""
    negatives = int((labels.values == 0).sum())
    if metric in ("recall_at_1pct_fpr", "fpr_at_1pct_threshold") and negatives < FEWEST_NEGATIVES:
        return (
            f"refused: {negatives} negatives cannot show 1 % of false positives, it takes "
            f"{FEWEST_NEGATIVES}"
        )
    return ""


def _mean(values: np.ndarray, weights: Weights) -> Values:
    return _ratio(weights @ values.astype(weights.dtype), weights.sum(axis=1))


def _ratio(parts: Values, wholes: Values) -> Values:
    """NaN where there is nothing to divide by."""
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _mean_of_known(parts: list[Values]) -> Values:
    """The mean of what is not NaN: a resample may lack a class in a fold."""
    values = np.array(parts)
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0, dtype=float))


def _within_folds(
    metric: Callable[[Float[np.ndarray, " n"], Bool[np.ndarray, " n"], Weights], Values],
    held: HeldOut,
    weights: Weights,
) -> Values:
    parts = []
    for fold in np.unique(held.fold):
        rows = held.fold == fold
        of_fold = weights[:, rows]
        parts.append(
            _mean_of_known([metric(s[rows], true[rows], of_fold) for s, true in held.each_class()])
        )
    return _mean_of_known(parts)


def _auroc(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Weights
) -> Values:
    negatives = np.argsort(scores[~positive])
    sorted_negatives = scores[~positive][negatives]
    below = np.pad(weights[:, ~positive][:, negatives].cumsum(axis=1), ((0, 0), (1, 0)))
    first, last = (
        np.searchsorted(sorted_negatives, scores[positive], s) for s in ("left", "right")
    )
    of_positives = weights[:, positive]
    wins = (of_positives * (below[:, first] + below[:, last])).sum(axis=1) / 2
    return _ratio(wins, of_positives.sum(axis=1) * below[:, -1])


def _average_precision(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Weights
) -> Values:
    order = np.argsort(-scores)
    # Samples of equal score are flagged together.
    last = np.searchsorted(-scores[order], -scores[order], "right") - 1
    true = weights[:, order] * positive[order]
    flagged = weights[:, order].cumsum(axis=1)[:, last]
    right = true.cumsum(axis=1)[:, last]
    precision = np.divide(right, flagged, out=np.zeros_like(right), where=flagged > 0)
    return _ratio((true * precision).sum(axis=1), true.sum(axis=1))


def _share_flagged(held: HeldOut, weights: Weights, of: Bool[np.ndarray, " n"]) -> Values:
    """The share flagged, each fold by the threshold that the negatives of the others set.

    A sample is flagged if at most 1 % of those negatives score as high as it does.
    """
    scores = held.level
    negative = held.labels.values == 0
    flagged = np.zeros(len(weights))
    for fold in np.unique(held.fold):
        here, setting = (held.fold == fold) & of, (held.fold != fold) & negative
        order = np.argsort(-scores[setting])
        above = np.pad(weights[:, setting][:, order].cumsum(axis=1), ((0, 0), (1, 0)))
        as_high = np.searchsorted(-scores[setting][order], -scores[here], "right")
        over = above[:, as_high] <= _ALLOWED * above[:, -1:]
        flagged += (weights[:, here] * over).sum(axis=1)
    return _ratio(flagged, weights[:, of].sum(axis=1))
