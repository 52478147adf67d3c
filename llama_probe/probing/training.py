"""From captured activations to a monitor: fit its probe, and set its threshold on other texts."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from llama_probe.capturing import Activations
from llama_probe.capturing.positions import name_of
from llama_probe.errors import InputError, near
from llama_probe.probing.aggregate import Aggregate
from llama_probe.probing.data import source
from llama_probe.probing.direction import only
from llama_probe.probing.fit import fit
from llama_probe.probing.monitor import Monitor
from llama_probe.probing.reading import position_of

# What a monitor has in common with the capture that it was trained on.
_FED = {
    "model_hash": "another model",
    "tokenizer_hash": "another tokenizer",
    "template": "another template",
    "system": "another system message",
    "prepend_bos": "another rule for BOS",
}


def fit_monitor(
    acts: Activations,
    labels: Any,
    *,
    hook: str,
    at: str | None = None,
    probe: str = "logistic",
    strength: int | float | None = None,
    groups: Any = None,
    positions: Any = None,
    aggregate: str | None = None,
    window: int = 8,
    decay: int | float = 0.9,
    negatives: Activations | None = None,
    fpr: int | float = 0.01,
    seed: int = 0,
) -> Monitor:
    """A monitor from activations with labels; its threshold from benign texts of another set.

    A measurement, not a defence: whoever knows of the probe can look for inputs that it does not
    notice (Bailey et al. 2024, arXiv 2412.09565). Report its recall and its false positives on
    texts that neither the probe nor the threshold has seen.

    Args:
        acts: What to train on.
        labels: The name of a column of `acts.prompts`, or a label for each prompt (or row) of
            `acts`; of two classes, what is looked for being the second in order (True, 1).
        hook: The hook to read: a block's.
        at: Of `acts.index["at"]`; None: the only one there.
        probe: "logistic", "ridge" or "mass_mean".
        strength: Of the regularisation; None: chosen on inner folds.
        groups: For the inner folds: a column, or one for each prompt or row; None: every prompt.
        positions: The tokens that count when a text is scored, as for `lp.capture`; None: those
            that the probe was trained on. The first token of a text is mostly the same and very
            large, so `slice(1, None)` is better than "all".
        aggregate: How their scores become the text's: "last", "mean", "max", "rolling" (the
            highest mean of `window` tokens in a row) or "ema" (the highest that an exponential
            moving average reaches); None: "last" for one position, "mean" for several.
        window: Tokens of a rolling mean.
        decay: How much of its last value the moving average keeps.
        negatives: Benign texts to set the threshold on, at least 100, none of them in training;
            None: no threshold, see `Monitor.with_threshold`.
        fpr: The share of them that may be flagged.
        seed: Of the inner folds.

    Raises:
        InputError: A label, a position or an argument cannot be used, or `negatives` are too few,
            were trained on, or were captured otherwise.

    >>> import llama_probe as lp
    >>> texts = [f"{a}+{b}=" for a in (12, 31, 45) for b in (17, 60)]
    >>> texts += [f"The capital of {name} is" for name in ("France", "Spain", "Italy", "Japan")]
    >>> model, sums = lp.load("tiny-moe", progress=False), [True] * 6 + [False] * 4
    >>> acts = lp.capture(model, texts, "blocks.1.hook_resid_post")
    >>> monitor = fit_monitor(acts, sums, hook="blocks.1.hook_resid_post", probe="mass_mean")
    >>> (monitor.score(model, ["77+12=", "The capital of Peru is"]).score > 0).tolist()
    [True, False]
    """
    if hook not in acts.hooks or not hook.startswith("blocks."):
        raise InputError(
            f"hook is {hook!r}, but a monitor reads one hook of a block that was captured"
            f"{near(hook, acts.hooks)}"
        )
    at = only("at", at, acts.index["at"].unique())
    part = acts.select(hooks=hook, at=at)
    known = source(part)
    y, units = known.per_row(labels, "labels"), part.index["prompt"].to_numpy()
    if groups is not None:
        units = known.per_row(groups, "groups")
    found, counts = np.unique(y, return_counts=True)
    if len(found) != 2:
        raise InputError(f"a monitor needs two classes, but the labels have {len(found)}")
    where, how = _scored_at(at, positions, aggregate)
    x = part[hook].flatten(1)
    fitted = fit(probe, x, y, classes=found.tolist(), groups=units, strength=strength, seed=seed)
    monitor = Monitor(
        probe=fitted,
        hook=hook,
        positions=where,
        aggregate=Aggregate(how, window, decay),
        threshold=None,
        record={
            "model": acts.record["model"],
            "capture": {key: acts.record[key] for key in ("dtype", "prompts_hash", "versions")},
            "training": {
                "at": at,
                "strength": strength,
                "seed": seed,
                "rows": len(part),
                "groups": len(np.unique(units)),
                "counts": counts.tolist(),
            },
        },
        **{key: acts.record[key] for key in _FED},
    )
    if negatives is None:
        return monitor
    _check_negatives(negatives, part)
    where = f"prompts {negatives.record['prompts_hash'][:12]}"
    return monitor.with_threshold(_scores(monitor, negatives), fpr, source=where)


def _scored_at(at: str, positions: Any, aggregate: str | None) -> tuple[str, str]:
    """Which tokens count in a text's score, and how: by default as in training."""
    if at.startswith("max of "):
        raise InputError(
            "a probe of max-pooled activations has no score for a token: capture with pool='mean', "
            "or without pool"
        )
    where = at.removeprefix("mean of ") if positions is None else name_of(positions)
    single = isinstance(position_of(where), int) or where.startswith("last of ")
    how = aggregate or ("last" if single else "mean")
    if single and how != "last":
        raise InputError(
            f"aggregate is {how!r}, but there is one token to score, {where!r}: give positions, "
            "such as 'all' or slice(1, None)"
        )
    return where, how


def _check_negatives(negatives: Activations, trained: Activations) -> None:
    for key, what in _FED.items():
        if negatives.record[key] != trained.record[key]:
            raise InputError(f"the negatives were captured with {what} than the training set")
    if both := _fed(negatives) & _fed(trained):
        raise InputError(
            f"{len(both)} of the negatives were trained on, such as {min(both)!r}: a threshold set "
            "on them would be too low"
        )


def _fed(acts: Activations) -> set[str]:
    return set(acts.prompts["fed"].iloc[acts.index["prompt"].unique()])


def _scores(monitor: Monitor, acts: Activations) -> Float[np.ndarray, " prompt"]:
    """The score of each captured prompt."""
    there, at = acts.index["at"].unique(), monitor.positions
    if monitor.aggregate.how == "mean" and at not in there:
        at = f"mean of {at}"  # the score of a mean is the mean of the scores
    if at not in there or monitor.hook not in acts.hooks:
        raise InputError(
            f"the negatives should be captured at {monitor.hook}, positions {monitor.positions!r}, "
            f"but have {', '.join(there)} of {', '.join(acts.hooks[:3])}"
        )
    part = acts.select(at=at)
    parts = (some.flatten(1) for some in part.batches(monitor.hook))
    scores = torch.cat([monitor.probe(some)[:, 0] for some in parts])
    return monitor.aggregate.by_prompt(scores.numpy(), part.index["prompt"].to_numpy())
