"""Capture shards and grid cells on a local Ray cluster of two workers, one of which may die."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from killed import contents

import llama_probe as lp
from llama_probe.capturing import plan

pytestmark = pytest.mark.slow

STREAM = "blocks.*.hook_resid_post"
TWO = lp.RayEngine(workers=2)


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One cluster for all tests, so that they wait for it once."""
    ray = pytest.importorskip("ray", reason="Ray is an optional extra")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHARD_TOKENS", 2000)


def to(folder: Path, model: lp.Llama, **options: Any) -> lp.Activations:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1999, (400, 100), generator=generator)
    return lp.capture(model, tokens, STREAM, [-1, 3], store=folder, batch_tokens=2000, **options)


def test_two_workers_write_the_store_of_one(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path / "local", model)
    acts = to(tmp_path / "ray", model, engine=TWO)
    assert len(acts.record["plan"]) == 20
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_a_worker_that_is_killed_costs_only_its_shard(model: lp.Llama, tmp_path: Path) -> None:
    to(tmp_path / "local", model)
    shards = tmp_path / "ray" / "shards"
    killed: list[tuple[int, dict[Path, int]]] = []

    def kill() -> None:
        while len(list(shards.glob("*.safetensors"))) < 4:
            time.sleep(0.005)
        ours = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "_Shards" in " ".join(process.info["cmdline"] or [])
        ]
        there = {path: path.stat().st_mtime_ns for path in shards.glob("*.safetensors")}
        ours[0].kill()
        killed.append((len(ours), there))

    killer = threading.Thread(target=kill)
    killer.start()
    to(tmp_path / "ray", model, engine=TWO)
    killer.join()
    (workers, there), *_ = killed
    assert workers and 4 <= len(there) < 20
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    # What had been written before was not written again, but for the shard in hand.
    assert sum(path.stat().st_mtime_ns != written for path, written in there.items()) <= 1


def test_workers_with_another_model_are_refused(model: lp.Llama, tmp_path: Path) -> None:
    twin = lp.load("tiny-moe", pretrained=False, seed=1, device="cpu", progress=False)
    with pytest.raises(lp.InputError, match="tiny-moe is on the workers another model"):
        to(tmp_path, twin, engine=lp.RayEngine(workers=1, source="tiny-moe"))


EXPERIMENT = '''
import os

import numpy as np
import pandas as pd

import llama_probe as lp


def sizes(model: str = "tiny-moe", layer: int = 0) -> lp.Experiment:
    """How large the stream is."""

    def body(run):
        hook = f"blocks.{layer}.hook_resid_post"
        acts = run.capture("acts", ["one", "two words"] * 30, hooks=hook)
        norms = acts[hook].norm(dim=1).numpy()
        run.table("norms", lambda: pd.DataFrame({"norm": norms, "drawn": np.random.rand(60)}))
        run.table("worker", lambda: pd.DataFrame({"pid": [os.getpid()]}))
        if layer == 3:
            raise ValueError("the last layer is out of bounds")

    return lp.Experiment("Sizes", body)
'''


def test_cells_of_a_grid_run_on_workers(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(EXPERIMENT)
    there, here = (
        lp.run(
            tmp_path / "sizes.py",
            out=tmp_path / where,
            engine=engine,
            layer=[0, 1, 3],
            progress=False,
        )
        for where, engine in (("ray", "ray"), ("local", "local"))
    )
    assert there["status"].tolist() == here["status"].tolist() == ["complete", "complete", "failed"]
    assert "out of bounds" in there["error"].iloc[2]
    for mine, its in zip(here["folder"], there["folder"], strict=True):
        tables = [lp.read_run(folder).tables for folder in (mine, its)]
        assert tables[0]["norms"].equals(tables[1]["norms"])
        assert tables[0]["worker"]["pid"].tolist() == [os.getpid()]
        assert tables[1]["worker"]["pid"].tolist() != [os.getpid()]


def test_the_shards_of_a_single_cell_run_on_workers(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(EXPERIMENT)
    asked: list[int] = []
    run = lp.RayEngine.__call__

    def watched(self: lp.RayEngine, *arguments: Any) -> Iterator[list[int]]:
        asked.extend(arguments[3])
        return run(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lp.RayEngine, "__call__", watched)
        frame = lp.run(tmp_path / "sizes.py", out=tmp_path, engine="ray", layer=1, progress=False)
    assert frame["status"].tolist() == ["complete"] and asked == [0]


def test_without_ray_there_is_a_sentence(
    model: lp.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(lp.InputError, match=r"needs Ray: pip install 'llama-probe\[ray\]'"):
        to(tmp_path, model, engine=TWO)
