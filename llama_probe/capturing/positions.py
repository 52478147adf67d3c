"""Which tokens of a prompt are kept: by number, by what they are, or pooled into one row.

A row of activations stands for the tokens from `first` to before `stop` of one prompt; without
pooling that is one token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from llama_probe.capturing.prompts import Encoded
from llama_probe.errors import InputError, near

# What can be asked for by name, as the tokens that it means.
_NAMED: dict[str, Callable[[Encoded], range]] = {
    "all": lambda one: range(len(one.ids)),
    "last of the instruction": lambda one: range(one.instruction - 1, one.instruction),
    "last of the template": lambda one: range(one.prompt - 1, one.prompt),
    "response": lambda one: range(one.prompt, len(one.ids)),
}
POOLS = ("mean", "max")


def rows_of(encoded: Sequence[Encoded], positions: Any, pool: str | None) -> pd.DataFrame:
    """The rows that are to be kept: one for each prompt and token, or pooled range of tokens.

    Args:
        encoded: The prompts.
        positions: A position (negative ones count from the end), a slice, "all", "last of the
            instruction", "last of the template", "response", or a list of these.
        pool: "mean" or "max" for one row over all tokens of each of `positions`.

    Returns:
        `prompt`, `at` (the position as it was asked for), `pos` (from 0; -1 where pooled), `first`,
        `stop`; by prompt, in the order that was asked for.

    Raises:
        InputError: A position is unknown, or a prompt has no such token.
    """
    if pool is not None and pool not in POOLS:
        raise InputError(f"pool is {pool!r}, but should be {' or '.join(map(repr, POOLS))}")
    asked = list(positions) if isinstance(positions, list | tuple) else [positions]
    if not asked:
        raise InputError("positions is an empty list, which would keep nothing")
    if pool is not None and any(
        isinstance(one, slice) and one.step not in (None, 1) for one in asked
    ):
        raise InputError("pooling goes over tokens that follow each other: give slices no step")
    rows = []
    for prompt, one in enumerate(encoded):
        for position in asked:
            tokens = _tokens(one, position, prompt)
            at = name_of(position)
            if pool is not None:
                rows.append((prompt, f"{pool} of {at}", -1, tokens[0], tokens[-1] + 1))
            else:
                rows += [(prompt, at, pos, pos, pos + 1) for pos in tokens]
    return pd.DataFrame(rows, columns=["prompt", "at", "pos", "first", "stop"])


def name_of(position: Any) -> str:
    """A position as text, as frames have it in their column `at`.

    >>> name_of(-1), name_of(slice(1, None)), name_of("all")
    ('-1', '1:', 'all')
    """
    if isinstance(position, slice):
        start, stop = ("" if end is None else end for end in (position.start, position.stop))
        return f"{start}:{stop}" + (f":{position.step}" if position.step is not None else "")
    return str(position)


def _tokens(one: Encoded, position: Any, prompt: int) -> range:
    n = len(one.ids)
    if isinstance(position, bool) or not isinstance(position, int | slice | str):
        raise InputError(
            f"positions has {position!r}, but should be whole numbers, slices or "
            f"{', '.join(map(repr, _NAMED))}"
        )
    if isinstance(position, int):
        found = range(n)[position : position + 1 or None]
    elif isinstance(position, slice):
        found = range(n)[position]
    elif position in _NAMED:
        found = _NAMED[position](one)
    else:
        raise InputError(
            f"positions has {position!r}{near(position, _NAMED)}; it should be a number, a slice "
            f"or one of {', '.join(map(repr, _NAMED))}"
        )
    if not found:
        why = (
            "has no answer: name its column with response=, or give max_new_tokens"
            if position == "response"
            else f"has {n} tokens"
        )
        raise InputError(f"positions is {name_of(position)!r}, but prompt {prompt} {why}")
    return found
