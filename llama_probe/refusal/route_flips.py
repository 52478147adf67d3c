"""How many tokens an edit sends to other experts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from llama_probe.capturing.collect import Rows, collect
from llama_probe.capturing.plan import fitting_tokens
from llama_probe.capturing.prompts import Encoded
from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.model.llama import Llama
from llama_probe.refusal.writers import encoded_prompts, resampled_means


def route_flips(
    model: Llama, prompts: Any, edit: Any, *, template: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """The share of tokens, in each layer, whose set of experts changes under an edit.

    An edit of the stream may act through the router: what it does at fixed routes, and what more it
    does by sending tokens elsewhere, `lp.interventions.freeze_routes` tells apart. The order of a
    token's experts does not count, nor do their weights. Each prompt is read as a whole, no answer
    is generated, and there is no padding: prompts of one length run together, so an edit's
    `positions` count as in the prompt alone.

    Args:
        model: A mixture of experts.
        prompts: As for `lp.capture`.
        edit: An `Edit`, or pairs of a hook's name and a function.
        template: "chat" to wrap texts in the model's chat template, as a user's message.
        seed: Of the resamples.

    Returns:
        One row for each mixture-of-experts layer: `layer`, `n` tokens, `changed` of them, their
        share `value`, `ci_low ci_high` (95 %, percentile bootstrap of 2,000 resamples of the
        prompts, as the tokens of one depend on each other; missing where there is one prompt).
        `attrs` has the share over all layers, `value`, and `prompts`, how many.

    Raises:
        InputError: No layer is a mixture of experts, or a prompt or the edit cannot be used.

    >>> import llama_probe as lp
    >>> edit = lp.interventions.force_experts({2: [0]})
    >>> frame = route_flips(lp.load("tiny-moe"), ["12+30=42;", "Translate: dog"], edit)
    >>> frame.changed[:2].tolist(), bool(frame.value[2] > 0)  # nothing changes before layer 2
    ([0, 0], True)
    """
    layers = [layer for layer, is_moe in enumerate(model.cfg.moe_layers) if is_moe]
    if not layers:
        raise InputError("no layer of this model is a mixture of experts: it has no routes to flip")
    _, encoded = encoded_prompts(model, prompts, template)
    changed = np.empty((len(encoded), len(layers)))
    for batch in _of_one_length(encoded, fitting_tokens(model, 0)):
        ids = [encoded[prompt].ids for prompt in batch]
        changed[batch] = _differ(model, ids, layers, edit).sum(axis=1)
    lengths = np.array([[len(one.ids)] for one in encoded], dtype=float)
    means = resampled_means(np.hstack([changed, lengths]), np.random.default_rng(seed))
    low, high = np.quantile(means[:, :-1] / means[:, -1:], [0.025, 0.975], axis=0)
    n, hits = int(lengths.sum()), changed.sum(axis=0)
    columns = {"n": n, "changed": hits.astype(int), "value": hits / n}
    frame = pd.DataFrame({"layer": layers, **columns, "ci_low": low, "ci_high": high})
    frame.attrs = {"value": float((hits / n).mean()), "prompts": len(encoded)}
    return frame


def _of_one_length(encoded: Sequence[Encoded], most_tokens: int) -> Iterator[list[int]]:
    """Prompts of one length in batches."""
    lengths = np.array([len(one.ids) for one in encoded])
    for length in np.unique(lengths).tolist():
        prompts, size = np.flatnonzero(lengths == length), max(1, most_tokens // length)
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size].tolist()


def _differ(
    model: Llama, ids: Sequence[Sequence[int]], layers: Sequence[int], edit: Any
) -> Bool[np.ndarray, "prompt pos layer"]:
    """Whether the edit changes the set of a token's experts."""
    n, length = len(ids), len(ids[0])
    pos = np.tile(np.arange(length), n)
    every = Rows(np.repeat(np.arange(n), length), pos, pos + 1)
    hooks = [act_name("expert_indices", layer) for layer in layers]

    def chosen() -> torch.Tensor:
        found = collect(model, ids, hooks, every, None, torch.float32)
        sets = [found[hook].sort(dim=-1).values for hook in hooks]
        return torch.stack(sets, dim=1).unflatten(0, (n, length))

    before = chosen()
    with model.hooks(edit):
        after = chosen()
    return (before != after).any(dim=-1).numpy()
