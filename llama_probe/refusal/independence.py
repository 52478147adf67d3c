"""Whether two directions act by themselves, which being orthogonal does not say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.interventions.directions import ablate
from llama_probe.interventions.edit import Edit
from llama_probe.interventions.vectors import span_of, vector_of

_CONDITIONS = ("baseline", "first ablated", "second ablated", "both ablated")


def independence(
    score: Callable[[Edit], Any], first: Any, second: Any, *, seed: int = 0
) -> pd.DataFrame:
    """What ablating one direction does with and without another one ablated.

    Directions that are orthogonal may still act through each other. They are independent under
    intervention if ablating one leaves what the other does (Wollschläger et al. 2025, arXiv
    2502.17420, there of cosines with the stream; here of a score). The "interaction" is the change
    by both less the changes by each: 0 where they add up. At a floor of the score changes cannot
    add up, whatever the directions do.

    Args:
        score: From an edit to a score of each prompt [n], say
            `lambda edit: refusal_score(logits_of(model, edit), tokens)`, of the same prompts every
            time. It is called four times.
        first: A direction or a subspace, as `lp.ablate` takes it.
        second: Likewise.
        seed: Of the bootstrap.

    Returns:
        One row for each condition ("baseline", "first ablated", "second ablated", "both ablated")
        and metric: `condition metric value ci_low ci_high n cosine`. "score" is the mean;
        "change" the mean difference from the baseline; "change after the other" of a single
        direction what it does once the other is ablated; "interaction" of both. Intervals are
        bootstrapped over prompts, differences paired. `cosine` is that of the two directions, or
        the largest one between subspaces.

    Raises:
        InputError: The scores are no row of finite numbers, or not as many each time; the
            directions differ in dimensions or are 0.

    >>> frame = independence(lambda edit: torch.tensor([1.0, 3.0]), [1.0, 0.0], [3.0, 4.0])
    >>> frame.value[:2].tolist(), frame.cosine.round(3).unique().tolist()
    ([2.0, 2.0], [0.6])
    """
    cosine = _cosine(first, second)
    both = torch.cat([span_of(first), span_of(second)])
    edits = (Edit(), ablate(first), ablate(second), ablate(both))
    scores = {name: _scores(score(edit)) for name, edit in zip(_CONDITIONS, edits, strict=True)}
    if len({len(some) for some in scores.values()}) > 1:
        sizes = {name: len(some) for name, some in scores.items()}
        raise InputError(f"each edit should give a score for the same prompts, but gave {sizes}")
    base, one, other, all_out = scores.values()
    measured = [(name, "score", some) for name, some in scores.items()]
    measured += [(name, "change", some - base) for name, some in list(scores.items())[1:]]
    measured += [
        ("first ablated", "change after the other", all_out - other),
        ("second ablated", "change after the other", all_out - one),
        ("both ablated", "interaction", all_out - one - other + base),
    ]
    rows = [
        (name, metric, *stats.mean(values, seed=seed), cosine) for name, metric, values in measured
    ]
    columns = ["condition", "metric", "value", "ci_low", "ci_high", "n", "cosine"]
    return pd.DataFrame(rows, columns=columns)


def _scores(given: Any) -> Float[np.ndarray, " n"]:
    values = given.detach().cpu().double().numpy() if hasattr(given, "detach") else given
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(
            f"score should give a finite number for each prompt [n], not shape {values.shape}"
        )
    return values


def _cosine(first: Any, second: Any) -> float:
    a, b = span_of(first), span_of(second)
    if not len(a) or not len(b):
        raise InputError("a direction is 0, so that ablating it does nothing")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the directions have {a.shape[1]} and {b.shape[1]} dimensions")
    if vector_of(first).ndim == vector_of(second).ndim == 1:
        return torch.cosine_similarity(vector_of(first), vector_of(second), dim=0).item()
    return torch.linalg.matrix_norm(a @ b.T, ord=2).item()
