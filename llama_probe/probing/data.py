"""What is probed: activations from wherever they come, and what is known of each row."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from llama_probe.capturing.activations import Activations
from llama_probe.errors import InputError, near
from llama_probe.hooks import match_names
from llama_probe.probing.labels import as_array


@dataclass(frozen=True)
class Source:
    """Activations by hook, and what each row of them is.

    Attributes:
        hooks: Their names; a single one, empty, for a bare array.
        index: One row for each row of activations: `prompt at pos token`.
        prompts: One row for each prompt; `text` where it is known.
        read: A hook's activations at one position, [row, *features], rows as in `index`.
    """

    hooks: tuple[str, ...]
    index: pd.DataFrame
    prompts: pd.DataFrame
    read: Callable[[str, str], Any]

    @property
    def ats(self) -> list[str]:
        """The positions, as they were asked for."""
        return list(self.index["at"].unique())

    def rows(self, at: str) -> Int[np.ndarray, " n"]:
        """The rows of one position."""
        return np.flatnonzero(self.index["at"] == at)

    def features(self, hook: str, at: str) -> Float[np.ndarray, "n d"]:
        """A hook's activations at one position in float64, their features flattened."""
        values = _array(self.read(hook, at))
        return values.reshape(len(values), -1).astype(np.float64)

    def check_finite(self) -> None:
        """Look at every activation once, so that nothing is lost to a bad one later.

        Raises:
            InputError: One is not finite.
        """
        for hook in self.hooks:
            for at in self.ats:
                bad = ~np.isfinite(self.features(hook, at))
                if bad.any():
                    rows = self.rows(at)[bad.any(axis=1)]
                    where = self._named(int(rows[0]))
                    raise InputError(
                        f"{hook or 'the array'}: activations are NaN or infinite in {len(rows)} of "
                        f"{len(bad)} rows ({bad.sum()} numbers), first in {where}"
                    )

    def _named(self, row: int) -> str:
        prompt = int(self.index["prompt"].iloc[row])
        text = f": {self.prompts['text'].iloc[prompt][:40]!r}" if self.has_texts else ""
        return f"row {row} (prompt {prompt}{text})"

    @property
    def has_texts(self) -> bool:
        """Whether the texts of the prompts are known."""
        return "text" in self.prompts

    def per_row(self, values: Any, what: str) -> Shaped[np.ndarray, " row"]:
        """Values, or the name of a column of prompts, for each row of activations.

        Raises:
            InputError: There is no such column, or neither a value for each prompt nor for each
                row.
        """
        if isinstance(values, str):
            columns = list(map(str, self.prompts.columns))
            if values not in columns:
                raise InputError(
                    f"{what}: the prompts have no column {values!r}{near(values, columns)}; they "
                    f"have {', '.join(columns) or 'none'}"
                )
            values = self.prompts[values]
        array = as_array(values)
        if array.ndim != 1:
            raise InputError(f"{what} should be one row of them, but have shape {array.shape}")
        if len(array) == len(self.prompts):
            return array[self.index["prompt"].to_numpy()]
        if len(array) == len(self.index):
            return array
        rows = f" and {len(self.index)} rows" if len(self.index) != len(self.prompts) else ""
        raise InputError(
            f"{what}: there are {len(array)} for {len(self.prompts)} prompts{rows} of activations; "
            "give one each"
        )

    def targets(self, labels: Any) -> dict[str, Shaped[np.ndarray, " row"]]:
        """Labels by target, one for each row: see `lp.probe` for what they may be."""
        if isinstance(labels, str):
            labels = {labels: labels}
        elif not isinstance(labels, Mapping):
            columns = set(map(str, self.prompts.columns))
            names = _texts_in(labels)
            if names and (set(names) <= columns or len(names) not in self._lengths()):
                labels = {name: name for name in names}
        if not isinstance(labels, Mapping):
            return {"label": self.per_row(labels, "labels")}
        if not labels:
            raise InputError("labels are empty: give a label for each prompt, or names of columns")
        return {name: self.per_row(some, f"labels {name!r}") for name, some in labels.items()}

    def _lengths(self) -> tuple[int, int]:
        return len(self.prompts), len(self.index)


def source(acts: Any, hooks: Any = None, texts: Sequence[str] | None = None) -> Source:
    """Activations from wherever they come: see `lp.probe`.

    Raises:
        InputError: They are none of what is taken, empty, or of different lengths; or the texts are
            not as many.
        HookNameError: A hook that is asked for is not there.
        CheckpointError: A path leads to no finished store.
    """
    if isinstance(acts, str | Path):
        acts = Activations.open(acts)
    found = _of_activations(acts) if isinstance(acts, Activations) else _of_arrays(acts)
    if hooks is not None:
        names = tuple(match_names(hooks, found.hooks))
        found = Source(names, found.index, found.prompts, found.read)
    if texts is None:
        return found
    if len(texts) != len(found.prompts):
        raise InputError(f"there are {len(texts)} texts for {len(found.prompts)} prompts")
    prompts = found.prompts.assign(text=list(texts))
    return Source(found.hooks, found.index, prompts, found.read)


def layer_of(hook: str) -> int:
    """The block that a hook belongs to; -1 outside of them.

    >>> layer_of("blocks.12.hook_resid_pre"), layer_of("hook_embed")
    (12, -1)
    """
    found = re.match(r"blocks\.(\d+)\.", hook)
    return int(found[1]) if found else -1


def _of_activations(acts: Activations) -> Source:
    return Source(acts.hooks, acts.index, acts.prompts, lambda hook, at: acts.select(at=at)[hook])


def _of_arrays(acts: Any) -> Source:
    by_name = acts if isinstance(acts, Mapping) else {"": acts}
    if not by_name:
        raise InputError("there are no activations: the dict is empty")
    arrays = {str(name): _array(values) for name, values in by_name.items()}
    for name, values in arrays.items():
        if values.ndim < 2 or not values.size or values.dtype.kind not in "fiub":
            raise InputError(
                f"{name or 'the array'}: activations should be numbers [n d] with n and d at least "
                f"1, but are {values.dtype} of shape {list(values.shape)}"
            )
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the arrays should have as many rows each, but have {lengths}")
    n = next(iter(lengths.values()))
    index = pd.DataFrame({"prompt": range(n), "at": "", "pos": -1, "token": ""})
    return Source(tuple(arrays), index, pd.DataFrame(index=range(n)), lambda hook, at: arrays[hook])


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _texts_in(labels: Any) -> list[str]:
    """The elements, if they are texts."""
    found = list(labels) if isinstance(labels, list | tuple) else []
    return found if all(isinstance(name, str) for name in found) else []
