"""Runs that are killed, interrupted, or have no room to write: they end as if nothing had been."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from drawing import DRAWS, contents, written

from llama_probe import cli, files
from llama_probe.runner import run, runs

KILLS = 10


def command_line(arguments: Sequence[str]) -> None:
    """`llama-probe`, in a process of its own."""
    sys.argv = ["llama-probe", *arguments]
    cli.main()


def started(arguments: Sequence[str]) -> multiprocessing.process.BaseProcess:
    """A process that has imported everything and begins at once: forked from one that waits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llama_probe.cli", "llama_probe.runner.listing"])
    process = context.Process(target=command_line, args=(arguments,))
    process.start()
    return process


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """What is there in the end is bit for bit what an uninterrupted grid leaves."""
    file = written(tmp_path)
    grid = ["run", str(file), "-P", "n=1,2,3", "-P", "steps=16", "-P", "pause=0.01"]
    grid += ["-P", "drawn=true", "--out"]
    whole = started([*grid, str(tmp_path / "whole")])
    whole.join()
    assert whole.exitcode == 0
    killed = tmp_path / "killed"
    moments = random.Random(7)
    for _ in range(KILLS):
        process = started([*grid, str(killed)])
        kill(process, killed, moments.randrange(5), moments.uniform(0, 0.05))
    last = started([*grid, str(killed)])
    last.join()
    assert last.exitcode == 0
    assert contents(killed) == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.part"))
    earlier = [
        attempt for folder in runs(killed).folder for attempt in record_of(folder)["earlier"]
    ]
    assert {attempt["status"] for attempt in earlier} == {"killed"}
    assert len(earlier) > KILLS / 2, "the others were killed between two cells"


# Kills itself half-way through its second table for as long as the file `broken` is there.
HALF = """
import os
import signal
from pathlib import Path


def half(self, path, **options):
    to_parquet(self, path, **options)
    if "draws 1" in str(path) and Path(__file__).with_name("broken").exists():
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)


to_parquet, pd.DataFrame.to_parquet = pd.DataFrame.to_parquet, half
"""


@pytest.mark.slow
def test_killed_half_way_through_a_table(tmp_path):
    (tmp_path / "broken").touch()
    command = ["run", str(written(tmp_path, DRAWS + HALF)), "--out"]
    for out, code in (("killed", -signal.SIGKILL), ("killed", 0), ("whole", 0)):
        process = started([*command, str(tmp_path / out)])
        process.join()
        assert process.exitcode == code
        parts = [path.name for path in tmp_path.rglob("*.part")]
        assert len(parts) == (code != 0), parts
        (tmp_path / "broken").unlink(missing_ok=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def kill(
    process: multiprocessing.process.BaseProcess, out: Path, tables: int, seconds: float
) -> None:
    """Kill a process when it has begun a run, written so many tables, and worked for a while."""

    def n_tables() -> int:
        return len(list(out.glob("*/tables/*.parquet")))

    before = n_tables()
    wait_for(lambda: process.pid in pids(out))
    wait_for(lambda: n_tables() >= before + tables)
    time.sleep(seconds)
    assert process.exitcode is None, "it was done before it could be killed ten times"
    process.kill()
    process.join()


def pids(out: Path) -> set[int]:
    """The processes that have begun one of the runs, of each the last."""
    return {record_of(path.parent)["process"]["pid"] for path in out.glob("*/record.json")}


def record_of(folder: Path | str) -> dict[str, Any]:
    return json.loads((Path(folder) / "record.json").read_text())


def subprocess_at_work(tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    """The command line as a user starts it, when its second table is written.

    The first brings imports, in the middle of which Python may lose an interruption.
    """
    arguments = ["run", str(written(tmp_path)), "-P", f"steps={steps}", "-P", "pause=1.0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_probe.cli", *arguments, "--out", str(tmp_path / "runs")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and so are all of its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: bool(list(tmp_path.glob("runs/*/tables/draws 1.parquet"))))
    return process


@pytest.mark.slow
def test_ctrl_c_is_recorded_and_the_same_command_goes_on(tmp_path):
    process = subprocess_at_work(tmp_path, steps=4)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate()
    assert process.returncode == 130
    assert "Interrupted: the same command goes on from here." in shown
    assert "Traceback" not in shown
    assert runs(tmp_path / "runs").status.tolist() == ["interrupted"]
    first = next(tmp_path.glob("runs/*/tables/draws 0.parquet"))
    before = first.stat().st_mtime_ns
    run(tmp_path / "draws.py", out=tmp_path / "runs", steps=4, pause=1.0, progress=False)
    assert first.stat().st_mtime_ns == before
    assert runs(tmp_path / "runs").status.tolist() == ["complete"]


@pytest.mark.slow
def test_two_processes_into_one_folder(tmp_path):
    process = subprocess_at_work(tmp_path, steps=30)
    [cell] = run(
        tmp_path / "draws.py", out=tmp_path / "runs", steps=30, pause=1.0, progress=False
    ).itertuples()
    assert cell.status == "refused"
    assert cell.error.startswith(f"another process is writing to {tmp_path / 'runs'}")
    assert runs(tmp_path / "runs").status.tolist() == ["running"]
    process.kill()
    process.communicate()
    assert runs(tmp_path / "runs").status.tolist() == ["killed"]


@pytest.fixture
def full(monkeypatch) -> Callable[[str], None]:
    """Make the disk full for files whose names have a word in them; "" makes room again."""
    fsync = os.fsync

    def fill(word: str) -> None:
        def failing(descriptor: int) -> None:
            if word and word in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", failing)

    return fill


def outcome_of(monkeypatch, capsys, *arguments: str) -> tuple[int | str | None, str]:
    """The exit code of the command line and the last line that it printed about an error."""
    monkeypatch.setattr(sys, "argv", ["llama-probe", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().err.rstrip().splitlines()
    return end.value.code, shown[-1] if shown else ""


@pytest.mark.parametrize(("word", "status"), [("draws 1", "failed"), ("/runs/", None)])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    tmp_path, monkeypatch, capsys, full, word, status
):
    """Full while a table is written, with or without room left for the record."""
    file = written(tmp_path)
    command = ["run", str(file), "-P", "n=1,2", "--out", str(tmp_path / "runs")]
    full(word)
    code, told = outcome_of(monkeypatch, capsys, *command)
    assert code == 1 and told.startswith("the disk is full: ")
    assert not list(tmp_path.rglob("*.part"))
    if status:
        listed = runs(tmp_path / "runs")
        assert listed.status.tolist() == [status] and listed.error[0] == told
        assert len(list(tmp_path.rglob("draws 0.parquet"))) == 1, "the grid stopped there"
    full("")
    assert outcome_of(monkeypatch, capsys, *command)[0] == 0
    run(file, out=tmp_path / "whole", n=[1, 2], progress=False)
    assert contents(tmp_path / "runs") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_leaves_what_a_kill_leaves(tmp_path, monkeypatch, capsys, full):
    """From the first table on nothing can be written, so the record goes on saying "running"."""
    file = written(tmp_path)
    body = file.read_text().replace(
        "for step in", "__import__('os').environ['FULL'] = '1'\n        for step in"
    )
    file.write_text(body)
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if "FULL" in os.environ:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", failing)
    monkeypatch.setenv("FULL", "1")
    monkeypatch.delenv("FULL")
    code, told = outcome_of(monkeypatch, capsys, "run", str(file), "--out", str(tmp_path / "runs"))
    assert code == 1 and told.startswith("the disk is full: ") and "draws 0.parquet" in told
    [record] = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["status"] == "running"
