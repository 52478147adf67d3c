"""A capture as plain data: all that is needed to compute any part of it, and to check whose it is.

In a store it is three files beside the folder `shards/`:

    manifest.json     what is captured, from what, and which prompts run together in which shard
    prompts.parquet   one row a prompt: its text, columns and token ids
    index.parquet     one row a row of activations: prompt, position, token, shard and row therein

They are written before the first shard and never changed, so a run that is killed goes on from
them, and workers on other machines need nothing else.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llama_probe.capturing.collect import Halved, Rows, collect_fitting
from llama_probe.errors import CheckpointError, InputError
from llama_probe.files import write_text, written
from llama_probe.model.llama import Llama

Batch = list[int]  # which prompts
Shard = list[Batch]
# Called with the number of tokens that have just been run.
Told = Callable[[int], object]

FORMAT = 1
_PACKAGES = ("llama-probe", "torch", "transformer-lens", "tokenizers", "numpy")
# What two captures must agree on to be one. The rest follows from it, or is kept for the record.
_IDENTITY = {
    "model_hash": "another model",
    "tokenizer_hash": "another tokenizer",
    "hooks": "other hooks",
    "positions": "other positions",
    "pool": "another pooling",
    "template": "another template",
    "system": "another system message",
    "prepend_bos": "another rule for BOS",
    "max_new_tokens": "answers of another length",
    "dtype": "another precision",
    "prompts_hash": "other prompts",
}
# What may change the last digits.
_CONDITIONS = ("versions", "device", "threads")
_SAVED_AS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Job:
    """See above.

    Attributes:
        record: What `manifest.json` says, JSON values only.
        prompts: One row a prompt, with its token ids in `ids`.
        index: One row a row of activations.
    """

    record: dict[str, Any] = field(repr=False)
    prompts: pd.DataFrame = field(repr=False)
    index: pd.DataFrame = field(repr=False)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The full names, in the model's order."""
        return tuple(self.record["hooks"])

    @property
    def plan(self) -> list[Shard]:
        """Which prompts run together."""
        return self.record["plan"]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept."""
        return getattr(torch, self.record["dtype"])

    @cached_property
    def _rows_by_shard(self) -> list[np.ndarray]:
        """Of each shard, which rows of the index it has, in its own order."""
        order = np.lexsort((self.index["row"], self.index["shard"]))
        ends = np.cumsum(np.bincount(self.index["shard"], minlength=len(self.plan)))
        return np.split(order, ends[:-1])

    def rows_of_shard(self, shard: int) -> np.ndarray:
        """Which rows of the index a shard has, in its own order."""
        return self._rows_by_shard[shard]

    @property
    def nbytes(self) -> int:
        """The size of all activations together."""
        features = sum(prod(shape) for shape in self.record["features"].values())
        return len(self.index) * features * self.dtype.itemsize

    def n_tokens(self, shard: int) -> int:
        """How many tokens the prompts of a shard have."""
        prompts = [prompt for batch in self.plan[shard] for prompt in batch]
        return int(self.prompts["n_tokens"].iloc[prompts].sum())

    def compute(
        self, model: Llama, shard: int, halved: Halved, told: Told = lambda tokens: None
    ) -> dict[str, Tensor]:
        """The activations of a shard, [row, *features] by hook.

        Args:
            model: The model.
            shard: Which.
            halved: Gets the size of each batch that had to be halved.
            told: Called after each batch.
        """
        rows = self.index.iloc[self.rows_of_shard(shard)]
        columns = {name: rows[name].to_numpy() for name in Rows._fields}
        whole: dict[str, Tensor] = {}
        for batch in self.plan[shard]:
            of_batch = np.isin(columns["prompt"], batch)
            parts = collect_fitting(
                model,
                {prompt: self.prompts["ids"].iat[prompt] for prompt in batch},
                self.hooks,
                Rows(**{name: column[of_batch] for name, column in columns.items()}),
                self.record["pool"],
                self.dtype,
                halved,
            )
            for some, tensors in parts:
                here = torch.from_numpy(np.isin(columns["prompt"], some.prompt))
                for hook in self.hooks:
                    values = tensors.pop(hook)
                    if hook not in whole:
                        whole[hook] = values.new_empty(len(rows), *values.shape[1:])
                    whole[hook][here] = values
            told(int(self.prompts["n_tokens"].iloc[batch].sum()))
        return whole

    def shapes(self, shard: int) -> dict[str, list[int]]:
        """The shape of each hook's tensor in a shard."""
        features = self.record["features"]
        return {hook: [len(self.rows_of_shard(shard)), *features[hook]] for hook in self.hooks}

    def write(self, folder: Path) -> None:
        """Begin a store; the manifest comes last, so that a folder with one has all three."""
        for name, frame in (("prompts", self.prompts), ("index", self.index)):
            with written(folder / f"{name}.parquet") as part:
                _to_parquet(frame, part)
        write_text(folder / "manifest.json", json.dumps(self.record, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """What a store holds.

        Raises:
            CheckpointError: It is no store, it is damaged, or a newer version of this package made
                it.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} is no store of activations: it has no manifest.json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise CheckpointError(
                    f"the store {folder} has format {record['format']}, but this version of "
                    f"llama_probe reads format {FORMAT}"
                )
            prompts, index = (
                pd.read_parquet(folder / f"{name}.parquet") for name in ("prompts", "index")
            )
            # Parquet gives arrays for lists.
            for name in {"ids", "messages"} & set(prompts):
                prompts[name] = [row.tolist() for row in prompts[name]]
            return cls(record, prompts, index)
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the store {folder} is damaged: {error}") from error

    def check_same(self, record: dict[str, Any], folder: Path) -> None:
        """Refuse to go on with the store of another capture; warn where its bits may differ.

        Args:
            record: Of the capture that is asked for.
            folder: The store.

        Raises:
            InputError: They differ, and in what.
        """
        for key, what in _IDENTITY.items():
            mine, asked = self.record[key], record[key]
            if mine != asked:
                raise InputError(
                    f"the store {folder} was made with {what} ({_short(mine)}, not "
                    f"{_short(asked)}): choose another folder, or capture the same"
                )
        changed = [key for key in _CONDITIONS if self.record[key] != record[key]]
        if changed:
            warnings.warn(
                f"the store {folder} was begun with other {' and '.join(changed)}: what is added "
                "to it now may differ in its last digits",
                stacklevel=5,
            )


def record_of(
    *, features: dict[str, tuple[int, ...]], dtype: torch.dtype, **rest: Any
) -> dict[str, Any]:
    """The record of a capture."""
    return {
        "format": FORMAT,
        **rest,
        "hooks": list(features),
        "features": {hook: list(shape) for hook, shape in features.items()},
        "dtype": _SAVED_AS[dtype],
        "versions": {name: version(name) for name in _PACKAGES},
    }


def checked_dtype(dtype: Any) -> torch.dtype:
    """The precision to keep activations in, from its name or torch's.

    Raises:
        InputError: It is none of the three that a store can have.
    """
    for kind, name in _SAVED_AS.items():
        if dtype in (kind, name):
            return kind
    raise InputError(f"dtype is {dtype!r}, but should be one of {', '.join(_SAVED_AS.values())}")


def prompts_hash(ids: Iterable[Sequence[int]], frame: pd.DataFrame) -> str:
    """The SHA-256 of prompts: of their tokens, and of the columns that came with them."""
    found = hashlib.sha256()
    for row in ids:
        found.update(f"{','.join(map(str, row))}\n".encode())
    found.update(frame.to_csv(index=False).encode())
    return found.hexdigest()


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return f"{text[:60]} …" if len(text) > 64 else text


def _to_parquet(frame: pd.DataFrame, path: Path) -> None:
    import pyarrow as pa

    try:
        frame.to_parquet(path, index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"the prompts have a column that cannot be stored ({error}): leave it out, or make it "
            "all texts or all numbers"
        ) from error
