"""Grids of small experiments, in this process: what is kept, resumed, refused and listed."""

import json
import linecache
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from drawing import DRAWS, contents, written

from llama_probe.errors import InputError, UnknownNameError
from llama_probe.files import locked
from llama_probe.runner import compare, read_run, rebuild, run, runs
from llama_probe.runner.cell import Cell, Outcome, run_cell
from llama_probe.runner.experiment import Experiment


@pytest.fixture
def draws(tmp_path: Path) -> Path:
    return written(tmp_path)


def record_of(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "record.json").read_text())


def test_a_grid_is_the_product_of_the_values(draws, tmp_path):
    frame = run(draws, out=tmp_path / "runs", n=[1, 2], seed=range(2), progress=False)
    assert frame[["n", "seed"]].to_numpy().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert (frame.status == "complete").all() and (frame.error == "").all()
    assert (frame.seconds > 0).all() and str(frame.started.dtype).endswith("UTC]")
    for row in frame.itertuples():
        tables = read_run(row.folder).tables
        assert list(tables) == ["draws 0", "draws 1"] and len(tables["draws 0"]) == row.n
    first, second = (read_run(folder).tables["draws 0"] for folder in frame.folder[:2])
    assert not first.equals(second), "another seed, other draws"


def test_draws_differ_between_steps_and_generators(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    tables = pd.concat(list(read_run(folder).tables.values()))
    assert tables.nunique().tolist() == [6, 6, 6]
    assert len(set(tables.to_numpy().ravel())) == 18


def test_what_a_step_draws_does_not_depend_on_the_steps_before_it(draws, tmp_path):
    other = written(tmp_path, DRAWS.replace("range(steps)", "reversed(range(steps))"), "other")
    one, two = (read_run(run(file, out=tmp_path / "runs", progress=False).folder[0]).tables
                for file in (draws, other))  # fmt: skip
    assert list(one) == list(two) and all(one[name].equals(two[name]) for name in one)


def test_the_record_says_what_was_run(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", n=2, seed=5, progress=False).folder
    record = record_of(folder)
    assert record["experiment"] == "draws" and record["title"] == "2 draws"
    assert record["status"] == "complete" and record["error"] is record["traceback"] is None
    assert record["arguments"]["n"] == 2 and record["defaults"]["n"] == 3 and record["seed"] == 5
    assert len(record["source"]["draws.py"]) == 64
    assert {"python", "torch", "llama-probe", "numpy"} <= record["versions"].keys()
    assert record["device"] and record["threads"] == 1 and record["earlier"] == []
    assert record["started"] < record["ended"]
    assert len(record["notes"]) == 1 and record["notes"][0].startswith("mean 0.")
    assert Path(folder).name.startswith(
        "draws-n=2-steps=2-pause=0.0-fails=False-drawn=False-seed=5-"
    )


def test_what_is_complete_is_not_done_again(draws, tmp_path):
    frame = run(draws, out=tmp_path / "runs", n=[1, 2], progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")}
    again = run(draws, out=tmp_path / "runs", n=[1, 2], progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == before
    pd.testing.assert_frame_equal(frame, again)


def test_again_begins_anew_with_the_same_result(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    first, old = contents(tmp_path / "runs"), record_of(folder)
    run(draws, out=tmp_path / "runs", again=True, progress=False)
    assert contents(tmp_path / "runs") == first
    assert record_of(folder)["started"] > old["started"] and record_of(folder)["earlier"] == []


def test_another_source_is_said_and_nothing_is_overwritten(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    before = contents(tmp_path / "runs")
    draws.write_text(DRAWS.replace('draws", body', 'new draws", body'))
    [outcome] = run(draws, out=tmp_path / "runs", progress=False).itertuples()
    assert outcome.status == "outdated"
    assert outcome.error.startswith("draws.py has changed since this run was completed")
    assert "--again" in outcome.error and contents(tmp_path / "runs") == before
    [outcome] = run(draws, out=tmp_path / "runs", again=True, progress=False).itertuples()
    assert outcome.status == "complete" and record_of(folder)["title"] == "3 new draws"


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(draws, tmp_path, capsys):
    frame = run(draws, out=tmp_path / "runs", fails=[True, False])
    assert frame.status.tolist() == ["failed", "complete"]
    line = 1 + DRAWS.splitlines().index('            raise ZeroDivisionError("on purpose")')
    assert frame.error[0] == f"draws.py, line {line}: ZeroDivisionError: on purpose"
    record = record_of(frame.folder[0])
    assert record["status"] == "failed" and record["error"] == frame.error[0]
    assert record["traceback"].rstrip().endswith("ZeroDivisionError: on purpose")
    assert not (Path(frame.folder[0]) / "report.html").exists()
    shown = capsys.readouterr().err
    assert "2/2" in shown and shown.count("failed: draws.py, line") == 1
    listed = runs(tmp_path / "runs").set_index("fails")
    assert listed.status.to_dict() == {True: "failed", False: "complete"}
    assert listed.error[True] == frame.error[0]


def flaky(tmp_path: Path, source: str = DRAWS) -> Path:
    """Fails at its last step for as long as the file `broken` is there."""
    (tmp_path / "broken").touch()
    there = "__import__('pathlib').Path(__file__).with_name('broken').exists()"
    return written(tmp_path, source.replace("if fails:", f"if {there}:"))


def test_a_run_goes_on_from_its_tables(tmp_path, monkeypatch):
    file = flaky(tmp_path)
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "failed"
    table = Path(cell.folder) / "tables" / "draws 1.parquet"
    before = table.stat().st_mtime_ns
    (tmp_path / "broken").unlink()
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "complete" and table.stat().st_mtime_ns == before
    record = record_of(cell.folder)
    assert [attempt["status"] for attempt in record["earlier"]] == ["failed"]
    assert record["error"] is None and len(record["notes"]) == 1
    run(file, out=tmp_path / "whole", progress=False)
    assert contents(tmp_path / "runs") == contents(tmp_path / "whole")


def test_after_a_change_tables_of_an_unfinished_run_are_computed_again(tmp_path, capsys):
    file = flaky(tmp_path)
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    old = read_run(cell.folder).tables["draws 0"]
    (tmp_path / "broken").unlink()
    file.write_text(file.read_text().replace("np.random.rand(n)", "7 + np.random.rand(n)"))
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "complete"
    assert "draws.py has changed: its tables are computed again" in capsys.readouterr().err
    new = read_run(cell.folder).tables["draws 0"]
    pd.testing.assert_series_equal(new.numpy, old.numpy + 7)


def test_tables_without_a_record_are_not_trusted(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "whole", progress=False).folder
    left = tmp_path / "runs" / Path(folder).name / "tables" / "draws 0.parquet"
    left.parent.mkdir(parents=True)
    pd.DataFrame({"python": [0.0]}).to_parquet(left)
    run(draws, out=tmp_path / "runs", progress=False)
    assert contents(tmp_path / "runs") == contents(tmp_path / "whole")


def test_input_files_are_hashed_and_watched(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("x\n1\n")
    source = DRAWS.replace("seed=seed)", f"seed=seed, inputs=[{str(data)!r}])")
    file = written(tmp_path, source)
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert len(record_of(cell.folder)["inputs"][str(data)]) == 64
    data.write_text("x\n22\n")
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "outdated" and "data.csv has changed" in cell.error
    data.unlink()
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "refused" and "data.csv is no file" in cell.error
    assert record_of(cell.folder)["status"] == "complete", "what was complete stays so"
    [cell] = run(file, out=tmp_path / "others", progress=False).itertuples()
    assert cell.status == "failed" and record_of(cell.folder)["status"] == "failed"


def test_a_folder_is_held_by_one_run(draws, tmp_path):
    [cell] = run(draws, out=tmp_path / "runs", n=1, progress=False).itertuples()
    with locked(Path(cell.folder)):
        frame = run(draws, out=tmp_path / "runs", n=[1, 2], again=True, progress=False)
    assert frame.status.tolist() == ["refused", "complete"]
    assert frame.error[0].startswith("another process is writing to ")


def test_a_report_is_rebuilt_as_it_was(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", drawn=True, progress=False).folder
    page = Path(folder) / "report.html"
    first = page.read_bytes()
    for text in ("3 draws", "Step 0", "Between: 0.", "The last draws", "mean 0.", "What was run"):
        assert text.encode() in first
    page.unlink()
    assert rebuild(folder) == page and page.read_bytes() == first
    assert b"not complete" not in first


def test_the_report_of_a_run_that_failed_says_so(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", fails=True, progress=False).folder
    page = rebuild(folder).read_text()
    assert "This run is not complete: draws.py, line" in page and "Step 1" in page


def test_a_part_that_cannot_be_shown_is_an_error_where_it_is_added(tmp_path):
    file = written(tmp_path, DRAWS.replace('"The last draws"', '""'))
    [cell] = run(file, out=tmp_path / "runs", drawn=True, progress=False).itertuples()
    assert "a figure needs a caption" in cell.error
    assert "run.figure" in record_of(cell.folder)["traceback"]


@pytest.mark.parametrize(
    ("compute", "sentence"),
    [
        ("5", "table 'draws 0' is int, but should be a DataFrame"),
        ("pd.DataFrame({'a': [1]}).groupby('a').sum()", "has an index (a), which is not kept"),
        ("pd.DataFrame({'a': [1, 'x']})", "table 'draws 0' cannot be kept as Parquet: "),
        ("pd.DataFrame([[1, 2]], columns=['a', 'a'])", "cannot be kept as Parquet: Duplicate"),
    ],
)
def test_a_table_that_cannot_be_kept(tmp_path, compute, sentence):
    source = DRAWS.replace(
        'run.table(f"draws {step}", draw,', f'run.table(f"draws {{step}}", lambda: {compute},'
    )
    [cell] = run(written(tmp_path, source), out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "failed" and sentence in cell.error and "\n" not in cell.error
    assert not list(Path(cell.folder).rglob("*.par*"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("same", "has a table 'same' already"), ("../x{step}", "a table cannot be called '../x0'")],
)
def test_names_of_tables(tmp_path, name, sentence):
    file = written(tmp_path, DRAWS.replace('f"draws {step}", draw', f'f"{name}", draw'))
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "failed" and sentence in cell.error


def test_a_table_is_the_one_that_is_kept(tmp_path):
    """Computed or read, a step gives the same: here the index is gone both times."""
    source = DRAWS.replace("(n).numpy()})", "(n).numpy()}, index=range(5, 5 + n))")
    source = source.replace(
        'run.text(f"Between', 'assert list(table.index) == [0, 1, 2]; run.text(f"Between'
    )
    [cell] = run(written(tmp_path, source), out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "complete"


def test_a_function_that_returns_no_experiment(tmp_path):
    file = written(tmp_path, "import llama_probe.runner as r\ndef draws() -> r.Experiment: pass\n")
    [cell] = run(file, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "failed"
    assert cell.error == "draws returned NoneType, but should return an lp.Experiment"


def test_a_body_that_exits_has_failed(tmp_path):
    file = written(tmp_path, DRAWS.replace('ZeroDivisionError("on purpose")', "SystemExit(3)"))
    frame = run(file, out=tmp_path / "runs", fails=[True, False], progress=False)
    assert frame.status.tolist() == ["failed", "complete"] and "SystemExit: 3" in frame.error[0]


def test_the_listing_tells_a_killed_run_from_a_running_one(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    path, record = Path(folder) / "record.json", record_of(folder)
    path.write_text(json.dumps({**record, "status": "running", "ended": None}))
    assert runs(tmp_path / "runs").status.tolist() == ["running"], "this process is alive"
    record["process"]["begun"] -= 1000  # another process that had the same number
    path.write_text(json.dumps({**record, "status": "running", "ended": None}))
    assert runs(tmp_path / "runs").status.tolist() == ["killed"]


def test_a_damaged_record_is_named(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    (Path(folder) / "record.json").write_text("{")
    with pytest.raises(InputError, match="record.json is not the record of a run"):
        runs(tmp_path / "runs")
    [cell] = run(draws, out=tmp_path / "runs", progress=False).itertuples()
    assert cell.status == "refused" and "is not the record of a run" in cell.error


def test_reading_what_is_not_there(draws, tmp_path):
    [folder] = run(draws, out=tmp_path / "runs", progress=False).folder
    with pytest.raises(UnknownNameError, match="no table 'draws 2'; did you mean 'draws 1'"):
        read_run(folder).tables["draws 2"]
    with pytest.raises(InputError, match="is no run: it has no record.json; did you mean 'draws-n"):
        read_run(folder[:-1])
    with pytest.raises(InputError, match="there is no folder .* with runs"):
        runs(tmp_path / "elsewhere")
    assert runs(tmp_path).empty and list(runs(tmp_path))[0] == "folder"


def test_whole_numbers_stay_whole_beside_an_experiment_without_the_parameter(draws, tmp_path):
    other = written(tmp_path, DRAWS.replace("steps", "rounds"), "other")
    for experiment in (draws, other):
        run(experiment, out=tmp_path / "runs", progress=False)
    frame = runs(tmp_path / "runs").set_index("experiment")
    assert repr(frame.steps["draws"]) == "2" and repr(frame.steps["other.draws"]) == "nan"
    assert str(frame.n.dtype) == "int64" and str(frame.fails.dtype) == "bool"


def test_comparing_two_runs(draws, tmp_path):
    a, b = run(draws, out=tmp_path / "runs", steps=[1, 2], seed=3, progress=False).folder
    frame = compare(a, b).set_index(["kind", "name"])
    assert list(frame.index) == [("argument", "steps"), ("table", "draws 0"), ("table", "draws 1")]
    assert frame.loc[("argument", "steps"), ["a", "b"]].tolist() == ["1", "2"]
    assert frame.difference["table", "draws 0"] == "the same"
    assert frame.loc[("table", "draws 1"), ["a", "b"]].tolist() == ["", "3 rows, 3 columns"]
    [c] = run(draws, out=tmp_path / "runs", steps=1, seed=4, progress=False).folder
    difference = compare(a, c).set_index("name").difference["draws 0"]
    x, y = (read_run(folder).tables["draws 0"] for folder in (a, c))
    assert f"numpy in 3 of 3 rows, by at most {(x.numpy - y.numpy).abs().max():.3g}" in difference


class Elsewhere:
    """An engine that sends cells as JSON and has no function at hand, as one on another machine."""

    def map(self, cells, found):
        for cell in reversed(cells):
            outcome = run_cell(Cell(**json.loads(json.dumps(asdict(cell)))))
            yield Outcome(**json.loads(json.dumps(asdict(outcome))))


def test_a_cell_is_plain_data_that_any_process_can_run(draws, tmp_path):
    frame = run(draws, out=tmp_path / "far", n=[1, 2], engine=Elsewhere(), progress=False)
    assert frame.n.tolist() == [1, 2] and (frame.status == "complete").all()
    run(draws, out=tmp_path / "near", n=[1, 2], progress=False)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_an_unknown_engine_is_named(draws, tmp_path):
    with pytest.raises(InputError, match="there is no engine 'cloud'; it should be local or ray"):
        run(draws, out=tmp_path / "runs", engine="cloud")
    assert not (tmp_path / "runs").exists()


def test_a_function_at_hand_is_run_as_it_is(tmp_path):
    def coin(throws: int = 2, seed: int = 0) -> Experiment:
        def body(run):
            run.table("throws", lambda: pd.DataFrame({"heads": range(throws)}))

        return Experiment(title="Coins", body=body, seed=seed)

    frame = run(coin, out=tmp_path, throws=[1, 2], progress=False)
    assert frame.experiment.unique().tolist() == ["test_runner.coin"]
    assert len(read_run(frame.folder[1]).tables["throws"]) == 2
    assert "test_runner.py" in record_of(frame.folder[0])["source"]


def test_a_function_typed_in_a_notebook(tmp_path):
    """Its file does not exist, and its text is what tells whether it has changed."""

    def typed(cell: str) -> Any:
        linecache.cache["<cell 1>"] = (len(cell), None, cell.splitlines(keepends=True), "<cell 1>")
        space: dict[str, Any] = {"Experiment": Experiment}
        exec(compile(cell, "<cell 1>", "exec"), space)
        return space["idle"]

    text = "def idle():\n    return Experiment('Idle', lambda run: run.heading('one'))\n"
    idle = typed(text)
    [cell] = run(idle, out=tmp_path, progress=False).itertuples()
    assert cell.status == "complete" and cell.experiment == "idle"
    assert list(record_of(cell.folder)["source"]) == [""]
    [cell] = run(typed(text.replace("one", "two")), out=tmp_path, progress=False).itertuples()
    assert cell.status == "outdated" and cell.error.startswith("its source has changed since")
    outcome = run_cell(Cell("idle", "", {}, str(tmp_path)))
    assert outcome.status == "refused" and "was typed into a notebook" in outcome.message
