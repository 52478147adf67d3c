"""Does a prompt keep its route when it is said in other words?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.routing.routes import routes_of


def route_stability(
    model: Llama, prompts: Sequence[Any], paraphrases: Sequence[Any]
) -> pd.DataFrame:
    """Whether a prompt and its paraphrase use the same experts, more than unrelated prompts do.

    Two prompts overlap by 1 - the total variation distance of their uses of a layer's experts:
    1 where the shares of their tokens agree, 0 where they have no expert in common.

    Args:
        model: The model.
        prompts: Two prompts or more.
        paraphrases: Each one in other words.

    Returns:
        One row for each layer and prompt: `layer prompt value baseline above n`. `value` is the
        overlap with its own paraphrase, `baseline` the mean overlap with the `n` others', `above`
        the share of these that overlap less (half of those that overlap alike): 0.5 by chance.

    Raises:
        InputError: There are fewer than two prompts, or not as many paraphrases.

    >>> import llama_probe as lp
    >>> frame = route_stability(
    ...     lp.load("tiny-moe"), ["12+30=42;", "Translate: dog"], ["30+12=42;", "Translate: cat"]
    ... )
    >>> bool((frame[frame.layer == 2].value > frame[frame.layer == 2].baseline).all())
    True
    """
    one, other = routes_of(model, prompts), routes_of(model, paraphrases)
    n = one.n_prompts
    if n < 2 or other.n_prompts != n:
        raise InputError(
            f"there are {n} prompts and {other.n_prompts} paraphrases, but there should be as many "
            "of these as of those, two at least"
        )
    frames = []
    uses = zip(one.layers, one.shares() / one.top_k, other.shares() / other.top_k, strict=True)
    for layer, use, other_use in uses:
        overlap = 1 - cdist(use, other_use, "cityblock") / 2
        own, others = np.diag(overlap), overlap[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        # Not told apart by rounding.
        lead = np.round(own[:, None] - others, 9)
        columns = {"layer": layer, "prompt": np.arange(n), "value": own}
        columns |= {"baseline": others.mean(axis=1), "above": (np.sign(lead) + 1).mean(axis=1) / 2}
        frames.append(pd.DataFrame(columns).assign(n=n - 1))
    return pd.concat(frames, ignore_index=True)
