"""What was captured: activations by hook, and what each row of them is."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llama_probe.capturing.job import Job
from llama_probe.capturing.moments import Moments
from llama_probe.capturing.store import Memory, Shards
from llama_probe.errors import InputError, near
from llama_probe.hooks import match_names


class Activations:
    """Activations of many prompts, in memory or in a store on disk: read alike.

    Attributes:
        hooks: The full names, in the model's order.
        index: One row for each row of activations: `prompt` (row in `prompts`), `at` (the position
            as it was asked for), `pos` (from 0, padding not counted; -1 where pooled), `token`
            (empty where pooled).
        prompts: One row for each prompt: `text`, `n_tokens`, `fed` (what the model was given, with
            template and BOS), `ids`, and the columns that came with the prompts.
        record: Where they come from, as JSON values: model, hashes, positions, template, versions.
    """

    def __init__(
        self,
        source: Memory | Shards,
        job: Job,
        hooks: Sequence[str] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self._source = source
        self._job = job
        self._rows = np.arange(len(job.index)) if rows is None else rows
        self.hooks: tuple[str, ...] = job.hooks if hooks is None else tuple(hooks)
        whole = job.index[["prompt", "at", "pos", "token"]]
        self.index = whole.iloc[self._rows].reset_index(drop=True)
        self.prompts = job.prompts
        self.record = job.record

    @classmethod
    def open(cls, folder: str | Path) -> "Activations":
        """The activations of a store, which are read as they are asked for.

        Raises:
            CheckpointError: It is no store, or it is not finished.
        """
        job = Job.read(Path(folder))
        return cls(Shards(job, Path(folder)), job)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, hook: str) -> Tensor:
        """The activations of a hook, [row, *features]; rows as in `index`.

        Raises:
            InputError: The hook was not captured.
        """
        return self._source.read(self._known(hook), self._rows)

    def _known(self, hook: str) -> str:
        if hook not in self.hooks:
            raise InputError(
                f"{hook!r} was not captured{near(hook, self.hooks)}; hooks has what was"
            )
        return hook

    def numpy(self, hook: str) -> np.ndarray:
        """The activations of a hook as an array; bfloat16, which numpy lacks, as float32.

        Raises:
            InputError: The hook was not captured.
        """
        values = self[hook]
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def frame(self, hook: str) -> pd.DataFrame:
        """The index beside the activations of a hook, one column a feature: 0, 1, ….

        Raises:
            InputError: The hook was not captured.
        """
        values = self.numpy(hook).reshape(len(self), -1)
        return self.index.join(pd.DataFrame(values, columns=list(map(str, range(values.shape[1])))))

    def select(
        self,
        *,
        prompts: Any = None,
        hooks: str | Sequence[str] | None = None,
        layers: int | Sequence[int] | None = None,
        at: str | Sequence[str] | None = None,
        pos: int | Sequence[int] | None = None,
    ) -> "Activations":
        """Some of them; of a store nothing is read yet.

        Args:
            prompts: Which prompts: their rows in `prompts`, or a mask over them.
            hooks: Names or globs.
            layers: Blocks.
            at: Positions as they were asked for, see `index`.
            pos: Positions in the prompt.

        Returns:
            A view, whose `prompts` are still all of them.

        Raises:
            InputError: Nothing is left, or there is no such prompt.
            HookNameError: A name matches nothing.
        """
        names = list(self.hooks) if hooks is None else match_names(hooks, self.hooks)
        if layers is not None:
            blocks = [f"blocks.{layer}.*" for layer in _listed(layers)]
            names = [name for name in names if any(fnmatchcase(name, block) for block in blocks)]
        keep = np.ones(len(self), dtype=bool)
        if prompts is not None:
            keep &= np.isin(self.index["prompt"], _numbers(prompts, len(self.prompts)))
        for column, wanted in (("at", at), ("pos", pos)):
            if wanted is not None:
                keep &= self.index[column].isin(_listed(wanted)).to_numpy()
        if not keep.any() or not names:
            raise InputError(
                f"nothing is left of the selection: positions are {_some(self.index['at'])}, "
                f"hooks {_some(pd.Series(self.hooks))}"
            )
        return Activations(self._source, self._job, names, self._rows[keep])

    def batches(self, hook: str, size: int = 4096) -> Iterator[Tensor]:
        """The activations of a hook, `size` rows at a time: for data that does not fit into memory.

        Raises:
            InputError: The hook was not captured.
        """
        self._known(hook)
        for start in range(0, len(self), size):
            yield self._source.read(hook, self._rows[start : start + size])

    def moments(self, hook: str, size: int = 4096) -> Moments:
        """Mean and covariance of a hook over all rows, from one pass; features flattened.

        Raises:
            InputError: The hook was not captured.
        """
        parts = (Moments.of(some.flatten(1)) for some in self.batches(hook, size))
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    def __repr__(self) -> str:
        return (
            f"Activations({len(self)} rows of {len(self.prompts)} prompts, {len(self.hooks)} hooks "
            f"of {self.record['model']}, {self.record['dtype']})"
        )


def in_memory(job: Job, parts: Iterable[dict[str, Tensor]]) -> Activations:
    """Activations from the tensors of all shards, in their order."""
    whole: dict[str, Tensor] = {}
    for shard, tensors in enumerate(parts):
        rows = torch.from_numpy(job.rows_of_shard(shard))
        for hook, values in tensors.items():
            if hook not in whole:
                whole[hook] = values.new_empty(len(job.index), *values.shape[1:])
            whole[hook][rows] = values
    return Activations(Memory(whole), job)


def _listed(one: Any) -> list[Any]:
    return [one] if isinstance(one, str | int) else list(one)


def _numbers(prompts: Any, n: int) -> np.ndarray:
    """Rows of prompts, from rows or from a mask."""
    found = np.atleast_1d(np.asarray(prompts))
    if found.dtype == bool:
        if found.shape != (n,):
            raise InputError(
                f"the mask over prompts has shape {found.shape}, but should have {(n,)}"
            )
        return np.flatnonzero(found)
    if not np.issubdtype(found.dtype, np.integer) or ((found < 0) | (found >= n)).any():
        raise InputError(f"prompts are rows from 0 to {n - 1}, or a mask over them")
    return found


def _some(values: pd.Series) -> str:
    names = list(map(str, values.unique()))
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
