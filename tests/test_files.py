"""Files appear whole or not at all, and a folder belongs to one process at a time."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_probe.errors import OutputError
from llama_probe.files import locked, sweep, write_text, written


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    with written(path) as part:
        part.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_what_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(KeyError), written(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_gets_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    write_text(tmp_path / "a.txt", "one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"the disk is full: .*a\.txt could not be written"):
        write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_of_the_block_that_is_not_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written(tmp_path / "a.txt"):
        (tmp_path / "b.txt").read_text()


def test_sweep_removes_only_what_is_half_written(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".a.txt.77.part").touch()
    (tmp_path / ".a.txt.77.part").touch()
    (tmp_path / "deep" / ".tmpSDYJ10").touch()  # a shard that safetensors was writing
    (tmp_path / "music.part").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "music.part"]


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llama_probe.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held')"
    )
    ask = [sys.executable, "-c", code, str(tmp_path / "run")]
    with locked(tmp_path / "run"):
        refused = subprocess.run(ask, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"another process is writing to {tmp_path / 'run'}" in refused.stderr
    assert subprocess.run(ask, capture_output=True, text=True).stdout == "held\n"
