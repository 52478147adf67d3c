"""Along how many directions two classes of paired prompts differ."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from llama_probe.errors import InputError
from llama_probe.probing.data import layer_of
from llama_probe.probing.design import Samples
from llama_probe.refusal.subspace import COLUMNS, Subspace, chosen, spread

PAIRS, SAME_CLASS = "paired differences", "differences within a class"


def spectrum(
    acts: Any,
    labels: Any,
    pairs: Any = None,
    *,
    hook: str | None = None,
    at: str | None = None,
    k_max: int = 10,
    n_random: int = 20,
    seed: int = 0,
) -> Subspace:
    """Along how many directions paired prompts differ: singular values of their differences.

    One direction that all pairs share gives a first share near 1. The differences are not centred:
    the first direction is about that of the difference in means. The share of the first few is the
    measure by which latent adversarial training was found to spread refusal over more directions.

    A few dimensions with large values make any spectrum steep: compare with differences of prompts
    of the same class, as many.

    Args:
        acts: What `lp.probe` takes.
        labels: A column of the prompts, or a label for each prompt (or row); two classes.
        pairs: Likewise: which prompts belong together; each pair has both classes, and where a
            class has several of its prompts, their mean counts. None: paired at random.
        hook: Whose activations; None: the only ones there.
        at: At which position; None: the only one there.
        k_max: The most directions; no more than there are pairs or dimensions.
        n_random: How often prompts of the same class are paired.
        seed: Of random pairs.

    Returns:
        The subspace of the first directions, towards the later class. Its frame: `k kind metric
        value ci_low ci_high n note`, the metric "share" being that of the squared differences which
        direction k alone has, and `n` the pairs; within a class the mean and the 2.5 and 97.5
        percentiles of draws.

    Raises:
        InputError: Labels or pairs cannot be used, a pair lacks a class, there are fewer than two,
            all prompts of a pair agree in all pairs, or an activation is not finite.

    >>> x = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    >>> found = spectrum(x, [0, 1, 0, 1], pairs=["a", "a", "b", "b"])
    >>> found.frame.value[:2].round(2).tolist()
    [0.97, 0.03]
    """
    x, samples, hook, at = chosen(acts, labels, pairs, hook, at)
    random = np.random.default_rng(seed)
    of_class = [np.flatnonzero(samples.labels.values == code) for code in (0, 1)]
    if pairs is None:
        n = min(map(len, of_class))
        first, second = (random.permutation(rows)[:n] for rows in of_class)
        differences = x[second] - x[first]
    else:
        differences = _paired(x, samples)
    if len(differences) < 2 or not differences.any():
        raise InputError(
            f"a spectrum needs at least two pairs that differ, but there are {len(differences)}"
            + ("" if differences.any() else " without a difference")
        )
    k_max = min(k_max, *differences.shape)
    shares, right = _svd(differences)
    basis = right[:k_max]
    basis = basis * np.where(basis @ differences.mean(axis=0) < 0, -1.0, 1.0)[:, None]
    within = []
    for _ in range(n_random):
        parts = [_within(x, random.permutation(rows)) for rows in of_class]
        within.append(_svd(random.permutation(np.concatenate(parts))[: len(differences)])[0])
    note = "paired at random" if pairs is None else ""
    rows = []
    for k in range(1, k_max + 1):
        same = spread([some[k - 1] if len(some) >= k else 0.0 for some in within])
        alone = (shares[k - 1], np.nan, np.nan)
        rows.append((k, PAIRS, "share", *alone, len(differences), note))
        rows.append((k, SAME_CLASS, "share", *same, len(differences), ""))
    frame = pd.DataFrame(rows, columns=COLUMNS).sort_values(["kind", "k"], ascending=[False, True])
    frame = frame.reset_index(drop=True)
    return Subspace(torch.from_numpy(basis), hook, layer_of(hook), at, frame)


def _paired(x: Float[np.ndarray, "n d"], samples: Samples) -> Float[np.ndarray, "pair d"]:
    """For each pair the mean of the second class less that of the first."""
    found = []
    for unit in np.unique(samples.unit):
        of_pair = [(samples.unit == unit) & (samples.labels.values == code) for code in (0, 1)]
        if not all(rows.any() for rows in of_pair):
            row = int(np.flatnonzero(samples.unit == unit)[0])
            raise InputError(f"pairs: that of row {row} has prompts of one class only")
        found.append(x[of_pair[1]].mean(axis=0) - x[of_pair[0]].mean(axis=0))
    return np.array(found)


def _within(x: Float[np.ndarray, "n d"], rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "h d"]:
    half = len(rows) // 2
    return x[rows[:half]] - x[rows[half : 2 * half]]


def _svd(
    differences: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "r d"]]:
    """Shares of the squares, and the directions."""
    _, values, right = np.linalg.svd(differences, full_matrices=False)
    return values**2 / (values**2).sum(), right
