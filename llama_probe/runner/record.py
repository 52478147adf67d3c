"""What was run, with what, and how it went: `record.json` in the folder of a run."""

import hashlib
import inspect
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from llama_probe.errors import InputError
from llama_probe.files import write_text
from llama_probe.runner.find import Found

Record = dict[str, Any]

_FILE = "record.json"
_PACKAGES = (
    "llama-probe", "torch", "transformer-lens", "tokenizers", "numpy", "pandas", "scikit-learn",
    "scipy", "plotly",
)  # fmt: skip


def new(found: Found, arguments: dict[str, Any]) -> Record:
    """The record of a run that is about to begin.

    Args:
        found: The experiment.
        arguments: All of them.
    """
    import torch  # takes seconds, and who reads a record does without

    signature = inspect.signature(found.function).parameters.values()
    versions = {name: version(name) for name in _PACKAGES}
    return {
        "experiment": found.name,
        "title": found.name,
        "file": found.file and str(found.file),
        "arguments": arguments,
        "defaults": {it.name: it.default for it in signature if it.default is not it.empty},
        "seed": None,
        "status": "running",
        "error": None,
        "traceback": None,
        "started": now(),
        "ended": None,
        "earlier": [],
        "source": found.source,
        "inputs": {},
        "models": {},
        "versions": {"python": platform.python_version(), **versions},
        "git": found.file and git_state(found.file.parent),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "process": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": psutil.Process().create_time(),
        },
        "notes": [],
    }


def read(folder: Path) -> Record | None:
    """The record of a run; None where there is none.

    Raises:
        InputError: It is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"status", "arguments", "versions", "earlier"} <= record.keys():
            raise ValueError("it has other fields")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the record of a run: {error}") from None
    return record


def write(folder: Path, record: Record) -> None:
    """Write the record of a run.

    Raises:
        OutputError: The disk is full.
    """
    write_text(folder / _FILE, json.dumps(record, indent=2) + "\n")


def status(record: Record) -> str:
    """How a run stands: "killed" if its process went without a word, else what the record says."""
    process = record["process"]
    if record["status"] != "running" or process["host"] != socket.gethostname():
        return record["status"]
    try:
        begun = psutil.Process(process["pid"]).create_time()
    except psutil.NoSuchProcess:
        return "killed"
    # Another one may have got its number; the clock may have been set by a little.
    return "running" if abs(begun - process["begun"]) < 5 else "killed"


def changes(old: Record, now: Record, packages: Iterable[str]) -> str:
    """What has changed so that the result may be another; empty if nothing has.

    Args:
        old: The record of an earlier attempt.
        now: That of this one.
        packages: Whose versions count.
    """
    found = []
    for kind in ("source", "inputs"):
        files = sorted({*old[kind], *now[kind]})
        changed = [file for file in files if old[kind].get(file) != now[kind].get(file)]
        found += [f"{file or 'its source'} has changed" for file in changed]
    for package in packages:
        before, here = (record["versions"].get(package) for record in (old, now))
        if before != here:
            found.append(f"{package} is {here} and was {before}")
    return " and ".join(found)


def hashes(inputs: Iterable[str | Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its path.

    Raises:
        InputError: One is missing.
    """
    found = {}
    for path in map(Path, inputs):
        if not path.is_file():
            raise InputError(f"the experiment's input {path} is no file")
        state = path.stat()
        found[str(path)] = _hash(path.resolve(), state.st_size, state.st_mtime_ns)
    return found


@lru_cache
def _hash(path: Path, size: int, changed: int) -> str:
    """Read once a grid: size and time of the last change tell whether it has to be read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and whether tracked files differ; None outside git."""

    def git(*command: str) -> str:
        ran = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds(record: Record) -> float:
    """How long a run took, over all its attempts; what killed ones took is not known."""
    attempts = [record, *record["earlier"]]
    spans = [(attempt["started"], attempt["ended"]) for attempt in attempts if attempt["ended"]]
    took = [datetime.fromisoformat(end) - datetime.fromisoformat(start) for start, end in spans]
    return sum((span.total_seconds() for span in took), 0.0)
