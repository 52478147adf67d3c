"""Prompts under a probe: a score for each of their tokens, and which of them count."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from llama_probe.capturing.collect import Rows, collect_fitting
from llama_probe.capturing.plan import batches, fitting_tokens
from llama_probe.capturing.positions import rows_of
from llama_probe.capturing.prompts import Encoded
from llama_probe.checkpoints.fingerprint import model_hash, tokenizer_hash
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.probing.linear import LinearProbe

_HASHES: WeakKeyDictionary[Llama, tuple[str, str]] = WeakKeyDictionary()


def hashes_of(model: Llama) -> tuple[str, str]:
    """The hashes of a model and of its tokenizer, computed once for each model object."""
    if model not in _HASHES:
        _HASHES[model] = model_hash(model), tokenizer_hash(model.tokenizer)
    return _HASHES[model]


def token_scores(
    model: Llama,
    probe: LinearProbe,
    hook: str,
    encoded: Sequence[Encoded],
    rows: pd.DataFrame,
) -> Float[np.ndarray, " row"]:
    """The score of a two-class probe at each row of `rows_of`, in that order.

    Only the scores of a batch are kept of it, and it runs no further than the hook.

    Raises:
        InputError: An activation is not finite, or too many for the probe.
    """
    lengths = [len(one.ids) for one in encoded]
    precision = torch.promote_types(model.cfg.dtype, torch.float32)
    columns = Rows(*(rows[name].to_numpy() for name in Rows._fields))
    found = np.empty(len(rows))
    for batch in batches(lengths, fitting_tokens(model, model.cfg.d_model * precision.itemsize)):
        mine = np.isin(columns.prompt, batch)
        parts = collect_fitting(
            model,
            {prompt: encoded[prompt].ids for prompt in batch},
            [hook],
            Rows(*(column[mine] for column in columns)),
            None,
            precision,
            [],
        )
        for some, kept in parts:
            scores = probe(kept[hook].flatten(1))[:, 0].numpy()
            found[np.isin(columns.prompt, some.prompt)] = scores
    if not np.isfinite(found).all():
        row = rows.iloc[int(np.flatnonzero(~np.isfinite(found))[0])]
        raise InputError(
            f"the activation of prompt {row['prompt']} at {hook}, position {row['pos']}, is not "
            "finite"
        )
    return found


def position_of(name: str) -> int | slice | str:
    """A position from its text: the inverse of `capturing.positions.name_of`.

    >>> position_of("-1"), position_of("1:"), position_of("all")
    (-1, slice(1, None, None), 'all')
    """
    try:
        if ":" in name:
            return slice(*(int(part) if part else None for part in name.split(":")))
        return int(name)
    except (ValueError, TypeError):
        return name


def counting(positions: str, one: Encoded, *, finished: bool) -> Callable[[int], bool]:
    """Which tokens count in the score of a text that is read token by token.

    Position -1 is the last one so far, whichever that is: all count, and the last one wins.

    Args:
        positions: As a monitor has them.
        one: The prompt.
        finished: Whether the text ends where the prompt does.

    Raises:
        InputError: They count from the end, and that is still open.
    """
    position: Any = position_of(positions)
    if position in ("all", -1):
        return lambda pos: True
    if position == "response":
        return lambda pos: pos >= one.prompt
    if isinstance(position, int) and position >= 0:
        position = slice(position, position + 1)
    if isinstance(position, slice):
        start, stop, step = position.start or 0, position.stop, position.step or 1
        if start >= 0 and (stop is None or stop >= 0) and step > 0:
            return lambda pos: (
                pos >= start and (stop is None or pos < stop) and (pos - start) % step == 0
            )
    if not finished and not isinstance(position, str):
        raise InputError(
            f"this monitor reads the positions {positions!r}, which count from the end of a "
            "finished text: use score, or train it on others"
        )
    places = set(rows_of([one], [position], None)["pos"])
    return lambda pos: pos in places
