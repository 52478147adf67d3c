"""What the taught model does with unseen requests, beside what counts of words make of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import llama_probe as lp
from refusal_adapter.requests import every_lesson


def mark(model: lp.Llama, requests: pd.DataFrame, *, n_tokens: int = 24) -> pd.DataFrame:
    """How many requests of each kind are declined, beside what counts of words would decline.

    Returns:
        One row per `kind` and `by` ("model", "n-grams"): `value ci_low ci_high n`. The n-grams are
        counted on the requests that were taught, by logistic regression on words and pairs.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    asked = lp.refusal.ask(model, requests["text"].tolist())
    said = lp.refusal.answers(model, asked, max_new_tokens=n_tokens, progress=True)
    lessons = every_lesson()
    words = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=2000))
    words.fit(lessons["text"], lessons["kind"] == "restricted")
    judged = {
        "model": np.array([lp.refusal.declines("", text) > 0 for text in said]),
        "n-grams": words.predict(requests["text"]),
    }
    kind = requests["kind"].replace({"same verb": "twin", "same object": "twin"})
    rows = []
    for name in (*dict.fromkeys(kind), "same verb", "same object"):
        here = ((kind if name in set(kind) else requests["kind"]) == name).to_numpy()
        for by, declined in judged.items():
            found = lp.stats.share(int(declined[here].sum()), int(here.sum()))
            rows.append({"kind": name, "by": by, **found._asdict()})
    return pd.DataFrame(rows)


def losses(model: lp.Llama, base: lp.Llama, texts: Sequence[str] | None = None) -> Any:
    """Mean loss on ordinary text, in nats a token: of the base, of the model, and their ratio."""
    texts = lp.prompts.plain_texts() if texts is None else texts
    means = [
        np.mean([one(text, return_type="loss").item() for text in texts]) for one in (base, model)
    ]
    return pd.Series({"base": means[0], "model": means[1], "ratio": means[1] / means[0]})
