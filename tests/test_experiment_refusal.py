"""The experiment on refusal: on tiny-moe it finds what is there, and its checks hold."""

from pathlib import Path

import pandas as pd
import pytest
import refusal_direction

import llama_probe as lp
from llama_probe.runner import SavedRun

pytestmark = pytest.mark.slow  # a study is made for them

PAIRS = 70


def some_requests(folder: Path) -> Path:
    """One restricted request and one twin of some pairs, and ordinary ones."""
    asked = lp.prompts.requests("tiny-moe")
    ordinary = asked[asked["kind"] == "ordinary"].head(20)
    matched = asked.drop(index=asked.index[asked["kind"] == "ordinary"])
    chosen = matched[matched["pair"] < PAIRS].assign(is_twin=lambda f: f["kind"] != "restricted")
    chosen = chosen.groupby(["pair", "is_twin"]).head(1).drop(columns="is_twin")
    path = folder / "requests.csv"
    pd.concat([chosen, ordinary]).to_csv(path, index=False)
    return path


def run_of(out: Path, requests: Path) -> SavedRun:
    """A run of it, with few random directions."""
    done = lp.run(
        refusal_direction.refusal_direction,
        out=out,
        model="tiny-moe",
        requests=str(requests),
        n_random=2,
        progress=False,
    )
    assert done["status"].tolist() == ["complete"], done["error"].tolist()
    return lp.read_run(done["folder"].iloc[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    folder = tmp_path_factory.mktemp("refusal")
    return run_of(folder / "runs", some_requests(folder))


def test_it_refuses_and_the_direction_does_what_random_ones_do_not(run):
    verdict = run.tables["found"]["verdict"][0]
    assert verdict.startswith(f"This model refuses: it declines {PAIRS} of {PAIRS} restricted")
    changes = run.tables["beside random directions"]
    score = changes[(changes["metric"] == "refusal score") & (changes["edit"] == "ablation")]
    assert (score["change"].abs() > 2 * score["random_95"]).all() and (score["change"] < 0).all()
    declined = run.tables["effects"].query("direction == 'refusal' and metric == 'declined'")
    declined = declined.set_index(["edit", "set"])["value"]
    assert declined["none", "restricted"] == 1 and declined["affine", "restricted"] < 0.2


def test_what_the_parts_write_sums_to_what_the_stream_has(run):
    check = run.tables["writers check"].iloc[0]
    assert check["projection"] > 5  # it is not nothing
    assert check["parts"] == pytest.approx(check["projection"], abs=1e-4)


def test_the_edit_in_the_weights_is_that_of_the_hooks(run):
    check = run.tables["weights check"].iloc[0]
    assert 0 < check["difference"] <= 1e-3
    assert check["mark"] == "a single direction was removed from all writers"


def test_experts_are_contrasted_within_topics_too(run):
    contrast = run.tables["expert contrast"]
    against = contrast.groupby("against")["n_a"].size()
    assert set(against.index) == {"twins", "ordinary requests", "twins of the same topics"}
    assert (against == 4 * 8).all()
    raw, within = (
        contrast[contrast["against"] == name].reset_index(drop=True)
        for name in ("twins", "twins of the same topics")
    )
    assert raw["raw"].equals(within["raw"]) and not raw["value"].equals(within["value"])
    flips = run.tables["route flips"]
    assert flips["layer"].tolist() == [0, 1, 2, 3] and flips["changed"].sum() > 0


def test_two_candidates_and_two_positions(run):
    apart = run.tables["independence"].set_index(["condition", "metric"])["value"]
    assert apart["first ablated", "change"] < apart["second ablated", "change"]
    plane = run.tables["plane"]
    assert (plane["refusal"] > 0).eq(plane["set"] == "restricted").mean() > 0.9
    assert run.tables["spectrum"]["value"][0] > 0.5
    kinds = set(run.tables["separability"]["kind"])
    assert {"probe", "n-grams"} <= kinds


def test_a_run_that_was_cut_short_goes_on_without_another_study(run, monkeypatch):
    """Steps that are there are read, and the others give what they gave."""
    tables = Path(run.folder) / "tables"
    known = {path.name: path.read_bytes() for path in tables.iterdir()}
    (tables / "expert contrast.parquet").unlink()
    record = Path(run.folder) / "record.json"
    record.write_text(record.read_text().replace('"status": "complete"', '"status": "interrupted"'))
    times = {path.name: path.stat().st_mtime_ns for path in tables.iterdir()}
    monkeypatch.setattr("llama_probe.refusal.audit.find_refusal_direction", None)
    again = run_of(Path(run.folder).parent, Path(run.record["arguments"]["requests"]))
    assert again.folder == run.folder
    assert {name: (tables / name).stat().st_mtime_ns for name in times} == times
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == known


def test_a_model_that_does_not_refuse_has_no_direction(tmp_path):
    twin = lp.load("tiny-moe", pretrained=False, seed=1, progress=False)
    lp.save(twin, tmp_path / "untrained")
    requests = some_requests(tmp_path)
    done = lp.run(
        refusal_direction.refusal_direction,
        out=tmp_path / "runs",
        model=str(tmp_path / "untrained"),
        requests=str(requests),
        n_random=2,
        progress=False,
    )
    run = lp.read_run(done["folder"].iloc[0])
    first, *_, last = run.record["notes"]
    assert first.startswith("This model does not refuse") and "No direction is offered." in first
    assert "word counts alone" in last
    tables = {path.stem for path in (Path(run.folder) / "tables").glob("*.parquet")}
    assert tables == {"found", "guard", "separability"}
