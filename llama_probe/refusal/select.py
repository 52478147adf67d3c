"""Which candidate direction to take: the published rule, and one that fits small models."""

from typing import Any

import numpy as np
import pandas as pd

from llama_probe.errors import InputError

SCORES = ("refusal_score", "steering_score", "kl_div_score")
_PUBLISHED = {"kl_max": 0.1, "induce_min": 0.0, "prune": 0.2}
_FEWEST_RANDOM = 20


def select(
    scores: pd.DataFrame,
    *,
    n_layers: int,
    kl_max: int | float = 0.1,
    induce_min: int | float = 0.0,
    prune: int | float = 0.2,
) -> pd.DataFrame:
    """The candidates that pass the published rule, the best first.

    The rule is `filter_fn` of Arditi et al. (2024, arXiv 2406.11717) as coded: what is equal to a
    limit passes, though the paper writes strict inequalities. `why_dropped` says what each
    candidate fails. Of the rest the best has the lowest refusal score under ablation; those that
    tie stay in the order of `scores`. A candidate of length 0, such as the one of layer 0 at a
    token that both classes share, is treated like any other.

    Args:
        scores: One row a candidate: `position layer refusal_score steering_score kl_div_score`;
            other columns are kept.
        n_layers: Of the model, pruned ones included.
        kl_max: Most divergence of harmless answers under ablation, in nats.
        induce_min: Least refusal score of harmless prompts with the direction added.
        prune: Share of the layers, the last ones, that are left out: late candidates tend to be
            the unembedding of the refusal token itself.

    Returns:
        The rows that pass, with a column `rule`: "published", or by which limits it differs from
        that. No rows where none passes.

    Raises:
        InputError: A column is missing, holds no numbers, or names a layer that the model has not;
            or a limit cannot be used.

    >>> columns = ["position", "layer", *SCORES]
    >>> scores = pd.DataFrame([[-1, 0, 5.3, -9.0, 0.0], [-1, 3, -5.6, 6.0, 0.07]], columns=columns)
    >>> select(scores, n_layers=8)[["position", "layer"]].values.tolist()
    [[-1, 3]]
    """
    limits = {"kl_max": kl_max, "induce_min": induce_min, "prune": prune}
    others = [f"{name} = {value}" for name, value in limits.items() if value != _PUBLISHED[name]]
    rule = f"published but for {', '.join(others)}" if others else "published"
    return _passed(scores, rule, n_layers=n_layers, **limits)


def relaxed(
    scores: pd.DataFrame,
    random_kl: Any,
    *,
    n_layers: int,
    induce_min: int | float = 0.0,
    prune: int | float = 0.2,
) -> pd.DataFrame:
    """`select` with a limit on KL that is measured rather than given.

    In a narrow model any direction is a large part of the stream, and 0.1 nats may be less than
    what ablating a random one does. Here a candidate may change harmless answers as much as 95 %
    of random directions do. That is another rule than the published one, and the column `rule`
    says so; its limit may also be the lower of the two.

    Args:
        scores: As for `select`.
        random_kl: What `kl_div_score` measures, a row of at least 20 random directions.
        n_layers: Of the model.
        induce_min: As for `select`.
        prune: As for `select`.

    Returns:
        As `select`; `rule` gives the limit and the number of random directions.

    Raises:
        InputError: As for `select`, or the divergences are too few or not finite.
    """
    try:
        divergences = np.asarray(random_kl, dtype=float)
    except (TypeError, ValueError):
        raise InputError("random_kl should be a row of numbers") from None
    if divergences.ndim != 1 or len(divergences) < _FEWEST_RANDOM:
        raise InputError(
            f"random_kl has the shape {divergences.shape}, but should be a row with the KL of at "
            f"least {_FEWEST_RANDOM} random directions"
        )
    if not np.isfinite(divergences).all():
        bad = int(np.flatnonzero(~np.isfinite(divergences))[0])
        raise InputError(f"random_kl is {divergences[bad]} at {bad}, but should be finite")
    kl_max = float(np.quantile(divergences, 0.95))
    rule = f"KL limit at the 95th percentile of {len(divergences)} random directions: {kl_max:.4g}"
    return _passed(
        scores, rule, n_layers=n_layers, kl_max=kl_max, induce_min=induce_min, prune=prune
    )


def why_dropped(
    scores: pd.DataFrame,
    *,
    n_layers: int,
    kl_max: int | float = 0.1,
    induce_min: int | float = 0.0,
    prune: int | float = 0.2,
) -> pd.Series:
    """The first reason for which `select` drops each candidate, in the order of the published code.

    Args:
        scores: As for `select`.
        n_layers: As for `select`.
        kl_max: As for `select`.
        induce_min: As for `select`.
        prune: As for `select`.

    Returns:
        A column `dropped` with the index of `scores`: "not a number" (any score), "late layer",
        "KL", "does not induce", or "" for those that stay.

    Raises:
        InputError: As for `select`.
    """
    layers = _layers(scores, n_layers)
    refusal, steering, divergence = (_numbers(scores, name) for name in SCORES)
    for name, limit in (("kl_max", kl_max), ("induce_min", induce_min)):
        if np.isnan(limit):
            raise InputError(f"{name} is not a number, but should be a limit")
    if not 0 <= prune <= 1:
        raise InputError(f"prune is {prune}, but should be a share of the layers, 0 to 1")
    reasons = {
        "not a number": np.isnan(refusal) | np.isnan(steering) | np.isnan(divergence),
        # As it is coded: another way to round would prune another layer of some models.
        "late layer": layers >= int(n_layers * (1.0 - prune)),
        "KL": divergence > kl_max,
        "does not induce": steering < induce_min,
    }
    found = np.select(list(reasons.values()), list(reasons), default="")
    return pd.Series(found, index=scores.index, name="dropped", dtype=object)


def _passed(scores: pd.DataFrame, rule: str, **limits: Any) -> pd.DataFrame:
    stays = why_dropped(scores, **limits).to_numpy() == ""
    best_first = scores.loc[stays].sort_values("refusal_score", kind="stable", ignore_index=True)
    return best_first.assign(rule=pd.Series(rule, index=best_first.index, dtype=object))


def _layers(scores: pd.DataFrame, n_layers: int) -> np.ndarray:
    missing = [name for name in ("position", "layer", *SCORES) if name not in scores]
    if missing:
        has = ", ".join(map(str, scores.columns)) or "none"
        raise InputError(f"the scores have no column {missing[0]!r}; they have: {has}")
    if n_layers < 1:
        raise InputError(f"n_layers is {n_layers}, but a model has at least 1")
    layers = _numbers(scores, "layer")
    there = (layers >= 0) & (layers < n_layers) & (layers == np.floor(layers))
    if not there.all():
        raise InputError(
            f"the scores name layer {layers[~there][0]:g}, but the model has layers 0 to "
            f"{n_layers - 1}"
        )
    return layers


def _numbers(scores: pd.DataFrame, name: str) -> np.ndarray:
    try:
        return scores[name].to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError):
        raise InputError(f"column {name!r} of the scores should hold numbers") from None
