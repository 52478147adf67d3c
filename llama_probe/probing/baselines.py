"""What the text alone gives: n-grams and length, on the folds of the probes."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from llama_probe.errors import InputError
from llama_probe.probing.bootstrap import NONE
from llama_probe.probing.cells import Asked, Measured, Plan, measured
from llama_probe.probing.design import (
    Part,
    Samples,
    Scored,
    assembled,
    held_out,
    parts_of,
    strengths_on,
)
from llama_probe.probing.folds import Split
from llama_probe.probing.labels import Labels
from llama_probe.probing.planning import torn_prompts
from llama_probe.probing.scores import HeldOut, metrics_for
from llama_probe.probing.selection import decisive

# C of logistic regression, 1 / alpha of ridge, on counts.
_LOOSENESS = (0.01, 0.1, 1.0, 10.0, 100.0)


def of_texts(texts: list[str], plan: Plan, asked: Asked) -> Iterator[Measured]:
    """What texts alone give: one sample for each prompt, in the fold that the prompt is in.

    Args:
        texts: Those of all prompts.
        plan: Whose labels and folds.
        asked: Which baselines, and the seed.
    """
    prompts, first = np.unique(plan.prompt, return_index=True)
    samples = plan.samples[first]
    probe = "ridge" if samples.labels.classes is None else "logistic"
    splits = [
        Split(*(np.flatnonzero(np.isin(first, rows)) for rows in p.split)) for p in plan.parts
    ]
    try:
        if torn := torn_prompts(plan.prompt, plan.samples.labels.values):
            raise InputError(f"the rows of prompt {torn[0]} have different labels")
        parts = parts_of(samples, splits, asked.seed, plan.target)
    except InputError as error:  # which must not cost the scores of the probes
        for kind, metric in product(asked.of_texts, decisive(samples.labels)):
            yield Measured(probe, kind, metric, NONE, 0, 0, f"not applicable: {error}")
        return
    own = [texts[prompt] for prompt in prompts.tolist()]
    for kind in asked.of_texts:
        baseline = ngrams if kind == "n-grams" else length
        held = baseline(own, samples, parts)
        names = list(metrics_for(probe, samples.labels))
        yield from measured(probe, kind, [held], names, asked.seed)


def length(texts: Sequence[str], samples: Samples, parts: Sequence[Part]) -> HeldOut:
    """The numbers of characters and words, with logistic regression (ridge for numbers)."""
    kind = "ridge" if samples.labels.classes is None else "logistic"
    x = np.array([[len(text), len(text.split())] for text in texts], dtype=float)
    strengths = strengths_on(kind, x, samples, parts)
    return held_out(kind, x, samples, [part.split for part in parts], strengths)


def ngrams(texts: Sequence[str], samples: Samples, parts: Sequence[Part]) -> HeldOut:
    """Counts of single words and pairs of neighbours, with logistic regression (ridge for numbers).

    A word is what lies between spaces or punctuation; capitals do not count, marks count as words.
    Which ones there are, and how strongly to regularise, is learnt on the training part alone.
    """
    scored = []
    for part in parts:
        train, test = part.split
        search = _search(samples.labels, part)
        search.fit([texts[row] for row in train], samples.labels.values[train])
        scores_of = search.predict if samples.labels.classes is None else search.decision_function
        scores, seen = (
            scores_of([texts[row] for row in rows]).reshape(len(rows), -1) for rows in (test, train)
        )
        weight = np.atleast_2d(search.best_estimator_[-1].coef_)[0]
        scored.append(Scored(scores, float(seen[:, 0].mean()), float(np.linalg.norm(weight))))
    return assembled(samples, [part.split for part in parts], scored)


def _search(labels: Labels, part: Part) -> Any:
    """Words, and a linear model whose regularisation is chosen on the inner splits."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2))
    if labels.classes is None:
        grid = {"ridge__alpha": [1 / c for c in _LOOSENESS]}
        pipeline, loss = make_pipeline(words, Ridge()), "neg_mean_squared_error"
    else:
        grid = {"logisticregression__C": _LOOSENESS}
        pipeline = make_pipeline(words, LogisticRegression(max_iter=10_000))
        loss = "neg_log_loss"
    return GridSearchCV(pipeline, grid, scoring=loss, cv=list(part.inner))
