"""Shards of activations on disk: each a safetensors file that appears whole or not at all."""

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_probe.capturing.collect import Halved
from llama_probe.capturing.job import Job, Told
from llama_probe.errors import CheckpointError
from llama_probe.files import written
from llama_probe.model.llama import Llama


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / "shards" / f"{shard:05d}.safetensors"


def write_shard(
    model: Llama, job: Job, folder: Path, shard: int, told: Told = lambda tokens: None
) -> Halved:
    """Compute a shard and write it.

    Returns:
        The sizes of the batches that did not fit into memory and were halved.

    Raises:
        OutputError: The disk is full.
    """
    halved: Halved = []
    tensors = job.compute(model, shard, halved, told)
    with written(shard_path(folder, shard)) as part:
        try:
            save_file(tensors, part, {"halved": ",".join(map(str, halved))})
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
    return halved


def missing(job: Job, folder: Path) -> list[int]:
    """The shards that are not there, or not whole."""
    return [shard for shard in range(len(job.plan)) if not _is_whole(job, folder, shard)]


def _is_whole(job: Job, folder: Path, shard: int) -> bool:
    path = shard_path(folder, shard)
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return False
    return shapes == job.shapes(shard)


class Shards:
    """Reads rows of a store as they are asked for; the files are mapped, not loaded."""

    def __init__(self, job: Job, folder: Path) -> None:
        lacking = missing(job, folder)
        if lacking:
            raise CheckpointError(
                f"the store {folder} is not finished: {len(lacking)} of its {len(job.plan)} shards "
                "are missing or damaged; run the same capture again, which goes on from there"
            )
        self.folder = folder
        self.shard = job.index["shard"].to_numpy()
        self.row = job.index["row"].to_numpy()

    def read(self, hook: str, rows: np.ndarray) -> Tensor:
        """Some rows of a hook, in that order."""
        found = torch.empty(0)
        for shard, here in _by_shard(self.shard[rows]):
            with safe_open(shard_path(self.folder, shard), "pt") as file:
                wanted = torch.from_numpy(self.row[rows[here]])
                first, stop = int(wanted.min()), int(wanted.max()) + 1
                span = file.get_slice(hook)[first:stop]
            if not len(found):
                found = span.new_empty(len(rows), *span.shape[1:])
            found[torch.from_numpy(here)] = span[wanted - first]
        return found


def _by_shard(shards: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    order = np.argsort(shards, kind="stable")
    found, starts = np.unique(shards[order], return_index=True)
    return zip(found.tolist(), np.split(order, starts[1:]), strict=True)


class Memory:
    """The same over tensors in memory, whose rows lie in the order of the index."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, hook: str, rows: np.ndarray) -> Tensor:
        """Some rows of a hook, in that order."""
        whole = self.tensors[hook]
        everything = len(rows) == len(whole) and (rows == np.arange(len(whole))).all()
        return whole if everything else whole[torch.from_numpy(rows)]


def local(
    model: Llama, job: Job, folder: Path, todo: Iterable[int], told: Told
) -> Iterator[Halved]:
    """Write shards one after another in this process."""
    for shard in todo:
        yield write_shard(model, job, folder, shard, told)
