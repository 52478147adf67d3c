"""The best of many cells, as it looks and as it is.

The best of many scores is too good: with nothing to find, the best of 200 is still well above
chance. So the best cell is chosen on one half of the groups and tested on the other, and the other
way round, and the two scores are averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llama_probe.probing.design import Part, Samples, held_out, strengths_on
from llama_probe.probing.labels import Labels
from llama_probe.probing.scores import HeldOut, concatenated, metrics_for, once


@dataclass(frozen=True)
class Trial:
    """A cell when one half of the groups is all there is to choose by.

    Attributes:
        merit: Its metrics on inner folds of the one half.
        tested: The other half, scored by a probe that was fitted on the one.
    """

    merit: Mapping[str, float]
    tested: HeldOut


def decisive(labels: Labels) -> tuple[str, ...]:
    """The metrics by which a best cell is chosen."""
    return ("r2",) if labels.classes is None else ("accuracy", "auroc")


def trials(
    kind: str,
    x: Float[np.ndarray, "n d"],
    samples: Samples,
    halves: Sequence[Part],
    strength: int | float | None,
) -> list[Trial]:
    """A cell on each half; the strength is chosen there too, unless it is given."""
    strengths = strengths_on(kind, x, samples, halves, strength)
    tested = held_out(kind, x, samples, [half.split for half in halves], strengths)
    found = []
    for number, (half, strength) in enumerate(zip(halves, strengths, strict=True)):
        rows = half.split.train
        inner = held_out(kind, x[rows], samples[rows], half.inner, [strength] * len(half.inner))
        metrics = metrics_for(kind, samples.labels)
        merit = {
            name: metrics[name](inner, once(inner)).item() for name in decisive(samples.labels)
        }
        found.append(Trial(merit, tested.of_fold(number)))
    return found


def winners(all_trials: Sequence[Sequence[Trial]], metric: str) -> tuple[list[int], HeldOut]:
    """Which cell each half chooses, and how those do on the respective other half."""
    chosen = [best([of_cell[half].merit[metric] for of_cell in all_trials]) for half in (0, 1)]
    return chosen, concatenated([all_trials[cell][half].tested for half, cell in enumerate(chosen)])


def best(values: Sequence[float]) -> int:
    """The place of the largest; of equal ones the first; what is not known does not win.

    >>> best([float("nan"), 0.5, 0.7, 0.7])
    2
    """
    return int(np.argmax(np.nan_to_num(np.array(values), nan=-np.inf)))
