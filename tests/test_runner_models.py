"""Experiments on a model: it is loaded once, its hash is kept, and captures resume."""

import json
from pathlib import Path

import pytest
import torch
from drawing import contents, written

import llama_probe as lp
from llama_probe.checkpoints.fingerprint import model_hash
from llama_probe.errors import CheckpointError
from llama_probe.runner import read_run, run
from llama_probe.runner.steps import loaded

# Fails after its capture for as long as the file `broken` is there.
NORMS = """
from pathlib import Path

import pandas as pd
import torch

from llama_probe.runner import Experiment, Run


def norms(model: str = "tiny-moe", layer: int = 1, twin: bool = False) -> Experiment:
    def body(run: Run) -> None:
        hook = f"blocks.{layer}.hook_resid_post"
        run.note(f"{run.model.cfg.n_layers} layers, {torch.rand(1)}")
        other = run.load(model, pretrained=False, seed=3, progress=False) if twin else None
        acts = run.capture("greetings", ["Hello there", "One two"], model=other, hooks=hook)
        if Path(__file__).with_name("broken").exists():
            raise ZeroDivisionError
        run.table("norms", lambda: pd.DataFrame({"norm": acts[hook].norm(dim=-1).numpy()}))

    return Experiment(title="Norms", body=body)
"""


@pytest.fixture
def norms(tmp_path: Path) -> Path:
    return written(tmp_path, NORMS, "norms")


def record_of(folder: str) -> dict:
    return json.loads((Path(folder) / "record.json").read_text())


def test_a_captured_table_is_what_the_model_gives(norms, tmp_path):
    [cell] = run(norms, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.error == ""
    model = lp.load("tiny-moe")
    acts = lp.capture(model, ["Hello there", "One two"], hooks="blocks.1.hook_resid_post")
    expected = acts["blocks.1.hook_resid_post"].norm(dim=-1)
    saved = read_run(cell.folder)
    assert saved.tables["norms"].norm.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert saved.store("greetings").hooks == acts.hooks
    with pytest.raises(CheckpointError):
        saved.store("farewells")
    assert record_of(cell.folder)["models"] == {"tiny-moe": model_hash(model)}
    assert model_hash(model)[:16] in (Path(cell.folder) / "report.html").read_text()


def test_a_model_is_loaded_once_a_grid_and_let_go(norms, tmp_path, monkeypatch):
    names = []
    load = lp.load

    def counted(name: str, **options: object) -> lp.Llama:
        names.append(name)
        torch.rand(1)  # as a model does that draws weights before it reads them
        return load(name, **options)

    monkeypatch.setattr("llama_probe.checkpoints.load.load", counted)
    frame = run(norms, out=tmp_path / "runs", layer=[0, 1], progress=False)
    assert (frame.status == "complete").all() and names == ["tiny-moe"]
    assert loaded.cache_info().currsize == 0
    notes = [record_of(folder)["notes"] for folder in frame.folder]
    assert notes[0] == notes[1], "loading a model does not move the generators"


@pytest.mark.parametrize("progress", [False, True])
def test_bars_of_steps_are_shown_or_not(norms, tmp_path, capsys, progress):
    run(norms, out=tmp_path / "runs", progress=progress)
    shown = capsys.readouterr().err
    assert ("capture" in shown) == progress and bool(shown) == progress


def test_a_capture_is_not_done_again(norms, tmp_path):
    (tmp_path / "broken").touch()
    [cell] = run(norms, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "failed" and "ZeroDivisionError" in cell.error
    [shard] = Path(cell.folder).glob("stores/greetings/shards/*")
    before = shard.stat().st_mtime_ns
    (tmp_path / "broken").unlink()
    norms.write_text(NORMS + "# tables are dropped now, stores stay\n")
    [cell] = run(norms, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "complete" and shard.stat().st_mtime_ns == before
    run(norms, out=tmp_path / "whole", progress=False)
    assert contents(tmp_path / "runs") == contents(tmp_path / "whole")


def test_other_weights_are_not_mixed_into_a_run_that_was_begun(norms, tmp_path):
    (tmp_path / "broken").touch()
    model = lp.load("tiny-moe")
    lp.save(model, tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "out": tmp_path / "runs", "progress": False}
    [cell] = run(norms, **given).itertuples()
    (tmp_path / "broken").unlink()
    model.W_E.data += 1
    (tmp_path / "model").rename(tmp_path / "old")
    lp.save(model, tmp_path / "model")
    [cell] = run(norms, **given).itertuples()
    assert cell.status == "failed"
    assert cell.error.startswith(f"the weights of {str(tmp_path / 'model')!r} have changed since")
    [cell] = run(norms, **given, again=True).itertuples()
    assert cell.status == "complete"


def test_another_model_is_recorded_with_its_options(norms, tmp_path):
    [cell] = run(norms, out=tmp_path / "runs", twin=True, progress=False).itertuples()
    assert cell.error == ""
    models = record_of(cell.folder)["models"]
    assert set(models) == {"tiny-moe", "tiny-moe, pretrained=False, seed=3"}
    assert len(set(models.values())) == 2


def test_run_model_needs_a_parameter(tmp_path):
    file = written(tmp_path, NORMS.replace('model: str = "tiny-moe"', 'name: str = "a"'), "norms")
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.error == "the experiment has no parameter 'model': use run.load(name)"
