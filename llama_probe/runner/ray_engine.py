"""Capture shards and grid cells on a Ray cluster: one replica of the model a worker.

1. Workers are actors; each holds a model, or runs cells that load their own.
2. Each is given one item at a time, and the next one when it is done.
3. A worker that dies is replaced, and its item done again: what it wrote is whole or not there.

All of them write into one folder, so it must be on a path that every machine sees.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llama_probe.capturing.collect import Halved
from llama_probe.capturing.job import Job, Told
from llama_probe.capturing.store import write_shard
from llama_probe.checkpoints.fingerprint import model_hash
from llama_probe.checkpoints.load import load
from llama_probe.errors import InputError, LlamaProbeError
from llama_probe.model.llama import Llama
from llama_probe.runner.cell import Cell, Outcome, run_cell
from llama_probe.runner.find import Found

_MOST_DEATHS = 3  # of workers, on one item


@dataclass(frozen=True)
class RayEngine:
    """Computes shards for `lp.capture(engine=…)`, and runs cells for `lp.run(engine=…)`.

    The results are those of the local engine, bit for bit where workers have as many threads as it
    has and processors of the same kind. Connects to the cluster that `ray start` or RAY_ADDRESS
    names, else starts one on this machine.

    Attributes:
        workers: How many; None: one a GPU, or as many as the cluster has processors for.
        threads: Of each worker; None: as many as torch has in this process.
        source: What `lp.load` takes, for workers to load the model from; None: it is sent to them.
    """

    workers: int | None = None
    threads: int | None = None
    source: str | None = None

    def __call__(
        self, model: Llama, job: Job, folder: Path, todo: Sequence[int], told: Told
    ) -> Iterator[Halved]:
        """Write the shards of a store; see `capturing.capture.Engine`.

        Raises:
            InputError: Ray is not installed, the workers' model is another one, or workers die
                again and again on one shard.
        """
        if not todo:
            return
        ray = _connected()
        sent = None if self.source else ray.put(model)
        at = str(folder.resolve())
        digest = job.record["model_hash"]
        pool = self._pool(ray, _Shards, len(todo), sent, self.source, at, digest)
        for shard, halved in pool.each(todo, lambda worker, shard: worker.write.remote(shard)):
            told(job.n_tokens(shard))
            yield halved

    def map(self, cells: Sequence[Cell], found: Found) -> Iterator[Outcome]:
        """Bring the cells of a grid to completion; of a single one, the shards are spread.

        Raises:
            InputError: Ray is not installed, or workers die again and again on one cell.
        """
        if len(cells) == 1:
            yield run_cell(replace(cells[0], engine="ray"), found)
            return
        pool = self._pool(_connected(), _Cells, len(cells))
        placed = [replace(cell, out=str(Path(cell.out).resolve())) for cell in cells]
        for _, outcome in pool.each(placed, lambda worker, cell: worker.run.remote(cell)):
            yield outcome

    def _pool(self, ray: Any, kind: type, most: int, *arguments: Any) -> "_Pool":
        threads = self.threads or torch.get_num_threads()
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        room = gpus or int(there.get("CPU", 1) // threads)
        options = {"num_cpus": min(threads, there.get("CPU", 1)), "num_gpus": 1 if gpus else 0}
        start = ray.remote(kind).options(**options).remote
        n = min(self.workers or max(1, room), max(1, room), most)
        return _Pool(ray, n, lambda: start(threads, *arguments))


class _Pool:
    """Workers that are replaced when they die."""

    def __init__(self, ray: Any, n: int, start: Callable[[], Any]) -> None:
        self.ray, self.n, self.start = ray, n, start

    def each(
        self, items: Sequence[Any], call: Callable[[Any, Any], Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Each item and what a worker made of it, in the order in which they are done."""
        waiting = list(reversed(items))
        idle = [self.start() for _ in range(self.n)]
        busy: dict[Any, tuple[Any, Any]] = {}
        deaths: Counter[int] = Counter()
        try:
            while waiting or busy:
                while idle and waiting:
                    worker, item = idle.pop(), waiting.pop()
                    busy[call(worker, item)] = (worker, item)
                (done,), _ = self.ray.wait(list(busy), num_returns=1)
                worker, item = busy[done]
                try:
                    result = self._result(done)
                except self.ray.exceptions.RayActorError as error:
                    deaths[id(item)] += 1
                    if deaths[id(item)] == _MOST_DEATHS:
                        raise InputError(
                            f"{_MOST_DEATHS} workers died one after another on {item}: is their "
                            f"memory enough? ({error})"
                        ) from error
                    waiting.append(item)
                    idle.append(self.start())
                else:
                    idle.append(worker)
                    yield item, result
                finally:
                    del busy[done]
        finally:
            for worker in [*idle, *(worker for worker, _ in busy.values())]:
                self.ray.kill(worker)

    def _result(self, done: Any) -> Any:
        try:
            return self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LlamaProbeError):
                raise error.cause from error
            raise


class _Shards:
    """A worker that has the model, and writes shards of one store."""

    def __init__(
        self, threads: int, sent: Llama | None, source: str | None, folder: str, digest: str
    ) -> None:
        torch.set_num_threads(threads)
        self.sent, self.source = sent, source
        self.folder, self.digest = Path(folder), digest

    @cached_property
    def job(self) -> Job:
        return Job.read(self.folder)

    @cached_property
    def model(self) -> Llama:
        if self.sent is None:
            model = load(str(self.source), progress=False)
        else:
            model = self.sent.to("cuda") if torch.cuda.is_available() else self.sent
        if model_hash(model) != self.digest:
            raise InputError(
                f"{self.source} is on the workers another model than the one that is given"
            )
        return model

    def write(self, shard: int) -> Halved:
        return write_shard(self.model, self.job, self.folder, shard)


class _Cells:
    """A worker that runs cells; between cells of one model it keeps it."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def run(self, cell: Cell) -> Outcome:
        return run_cell(cell)


def _connected() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "the engine 'ray' needs Ray: pip install 'llama-probe[ray]', or use engine='local'"
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return ray
