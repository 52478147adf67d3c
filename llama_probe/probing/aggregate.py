"""From the scores of tokens to the score of a text, as it stands after each token."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llama_probe.errors import InputError, near

HOW = ("last", "mean", "max", "rolling", "ema")


@dataclass(frozen=True)
class Aggregate:
    """A rule that makes one score of many.

    Attributes:
        how: "last"; "mean"; "max"; "rolling", the highest mean of `window` tokens in a row (of
            all, in a shorter text); or "ema", the highest value that the exponential moving
            average of the scores has reached (Kramár et al. 2026, arXiv 2601.11516).
        window: Tokens in a rolling mean.
        decay: How much of its last value an exponential moving average keeps.
    """

    how: str = "last"
    window: int = 8
    decay: int | float = 0.9

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise InputError(
                f"aggregate is {self.how!r}{near(self.how, HOW)}; it should be one of "
                f"{', '.join(HOW)}"
            )
        if self.window < 1:
            raise InputError(f"window is {self.window}, but should be at least 1 token")
        if not 0 <= self.decay < 1:
            raise InputError(f"decay is {self.decay}, but should be at least 0 and below 1")

    def running(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The score of the text up to each of its tokens.

        >>> Aggregate("rolling", window=2).running(np.array([9.0, 1.0, 3.0, 0.0])).tolist()
        [9.0, 5.0, 5.0, 5.0]
        """
        if self.how == "last":
            return scores
        counts = np.arange(1, len(scores) + 1)
        if self.how == "mean":
            return np.cumsum(scores) / counts
        if self.how == "max":
            return np.maximum.accumulate(scores)
        if self.how == "rolling":
            sums = np.concatenate(([0.0], np.cumsum(scores)))
            widths = np.minimum(counts, self.window)
            means = (sums[counts] - sums[counts - widths]) / widths
            # A window that is not full yet counts only while there is none that is.
            whole = means[self.window - 1 :]
            return np.concatenate((means[: self.window - 1], np.maximum.accumulate(whole)))
        average = scores.copy()
        for at in range(1, len(scores)):
            average[at] = self.decay * average[at - 1] + (1 - self.decay) * scores[at]
        return np.maximum.accumulate(average)

    def by_prompt(
        self, scores: Float[np.ndarray, " row"], prompt: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, " prompt"]:
        """The score of each text from those of its tokens, which follow each other.

        >>> Aggregate("max").by_prompt(np.array([1.0, 3.0, 2.0]), np.array([0, 0, 7])).tolist()
        [3.0, 2.0]
        """
        starts = np.flatnonzero(np.diff(prompt)) + 1
        return np.array([self.running(part)[-1] for part in np.split(scores, starts)])
