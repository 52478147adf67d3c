"""Monitors on disk: what comes back, what is refused, and what a crash leaves behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import llama_probe as lp
from llama_probe.errors import CheckpointError, InputError
from llama_probe.probing.aggregate import Aggregate
from llama_probe.probing.monitor import Monitor
from llama_probe.probing.training import fit_monitor

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["12+30=", "45+11=", "The dog is", "The cat sat there"]


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module")
def monitor(model: lp.Llama) -> Monitor:
    acts = lp.capture(model, TEXTS, HOOK, progress=False)
    found = fit_monitor(acts, [True, True, False, False], hook=HOOK, probe="mass_mean")
    return replace(found, threshold=0.0)


@pytest.fixture(scope="module")
def other(monitor: Monitor) -> Monitor:
    """One of other weights and other settings."""
    probe = replace(monitor.probe, bias=monitor.probe.bias + 1)
    ema = Aggregate("ema", decay=0.5)
    return replace(monitor, probe=probe, positions="1:", aggregate=ema, threshold=None)


def test_another_model_or_tokenizer_is_refused(monitor: Monitor) -> None:
    monitor.check(lp.load("tiny-moe", device="cpu", progress=False))
    changed = lp.load("tiny-moe", device="cpu", progress=False)
    with torch.no_grad():
        changed.blocks[3].mlp.router.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"trained on 'tiny-moe'.*differs in its weights"):
        monitor.score(changed, TEXTS)
    retold = lp.load("tiny-moe", device="cpu", progress=False)
    assert retold.tokenizer is not None
    retold.tokenizer.add_bos = False
    with pytest.raises(InputError, match="differs in its tokenizer"):
        monitor.watch(retold, TEXTS[0])


def test_what_is_saved_is_what_is_loaded(
    monitor: Monitor, other: Monitor, model: lp.Llama, tmp_path: Path
) -> None:
    for one in (other, monitor):  # the second takes the place of the first
        one.save(tmp_path / "monitor")
        back = Monitor.load(tmp_path / "monitor")
        assert repr(back) == repr(one) and back.record == one.record
        pd.testing.assert_frame_equal(back.score(model, TEXTS), one.score(model, TEXTS))
    files = sorted(path.suffix for path in (tmp_path / "monitor").glob("[!.]*"))
    assert files == [".json", ".safetensors"]


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _other_tensors(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, path)


def _elsewhere(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.rename(folder.parent / path.name)
    _edit(folder, tensors=f"../{path.name}")


def _cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "no record.json": lambda folder: (folder / "record.json").unlink(),
    "is damaged": lambda folder: (folder / "record.json").write_text("{"),
    "is not the record": lambda folder: (folder / "record.json").write_text("[1]"),
    "has format 9": lambda folder: _edit(folder, format=9),
    "holds a Direction, not a Monitor": lambda folder: _edit(folder, kind="Direction"),
    "tensors that record.json names": _elsewhere,
    "SHA-256 is not": _cut,
    "its SHA-256": _other_tensors,
    "its threshold": lambda folder: _edit(folder, threshold="high"),
    "its aggregate": lambda folder: _edit(folder, aggregate={"how": "median"}),
    "two classes": lambda folder: _edit(folder, classes=None),
    "no weights and classes": lambda folder: _edit(folder, classes=["a", "b", "c"]),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_folder_gets_a_sentence(monitor: Monitor, tmp_path: Path, says: str) -> None:
    folder = monitor.save(tmp_path / "monitor")
    DAMAGE[says](folder)
    with pytest.raises(CheckpointError, match=says):
        Monitor.load(folder)


def test_a_foreign_folder_is_left_alone(monitor: Monitor, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no folder of ours to overwrite"):
        monitor.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_save_that_is_cut_short_leaves_the_last_one(
    monitor: Monitor, other: Monitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = monitor.save(tmp_path / "monitor")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llama_probe.probing.saved.write_text", killed)
        other.save(folder)
    assert repr(Monitor.load(folder)) == repr(monitor)
    other.save(folder)
    assert repr(Monitor.load(folder)) == repr(other)
    assert len(list(folder.glob("*.safetensors"))) == 1
