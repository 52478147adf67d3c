"""Do prompts share templates? Then random folds leak, and one should give groups."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Two texts share a template if they have this share of the words of either in common.
ALIKE = 0.6
_MOST_TEXTS = 2000


class ProbeWarning(UserWarning):
    """A probe's score may not mean what it seems to."""


def share_templates(texts: Sequence[str]) -> bool:
    """Whether more than half of some texts have another one that is mostly the same.

    Mostly the same: of the different words of either, at least 60 % are in both, whatever their
    order, capitals and punctuation. The first 2,000 texts are looked at.

    >>> share_templates([f"The city of {city} is in France." for city in ("Paris", "Lyon")])
    True
    >>> share_templates(["It rained all night.", "She sold her bicycle to a friend."])
    False
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if len(texts) < 2:
        return False

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower())) or {""}

    # Its types know no functions.
    vectorizer: Any = CountVectorizer(analyzer=words)  # pyright: ignore[reportArgumentType]
    has = vectorizer.fit_transform(list(texts)[:_MOST_TEXTS])
    common = (has @ has.T).toarray()
    lengths = common.diagonal()
    alike = common >= ALIKE * np.maximum(lengths[:, None], lengths)
    np.fill_diagonal(alike, False)
    return bool(alike.any(axis=1).mean() > 0.5)
