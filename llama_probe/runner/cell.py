"""One cell of a grid: described in plain data, and brought to completion by `run_cell`.

Engines call `run_cell` where they please: it finds the experiment, holds the run's folder, and
records whatever happens there. The folder's name follows from the experiment and all of its
arguments, so that the same cell finds its folder again.
"""

import hashlib
import json
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llama_probe.errors import InputError, LlamaProbeError, OutputError
from llama_probe.files import locked, sweep
from llama_probe.runner import record as records
from llama_probe.runner.experiment import Experiment
from llama_probe.runner.find import Found, find, line_of
from llama_probe.runner.report import forget, write_report
from llama_probe.runner.steps import Run

_LONGEST = 120  # letters of a folder's name


@dataclass(frozen=True)
class Cell:
    """One run that is asked for.

    Attributes:
        experiment: The experiment's name.
        address: What `find` finds it by: "file::function"; "" for a function typed in a notebook.
        arguments: All arguments, defaults too, as JSON values.
        out: The folder of all runs.
        again: Begin anew, whatever there is.
        engine: Who computes the shards of its captures: "local" or "ray".
        progress: Whether its steps show bars.
    """

    experiment: str
    address: str
    arguments: dict[str, Any]
    out: str
    again: bool = False
    engine: str = "local"
    progress: bool = True

    @property
    def name(self) -> str:
        """The name of the run's folder.

        >>> Cell("probes", "", {"model": "org/tiny", "layer": 2}, "runs").name
        'probes-model=tiny-layer=2-163dfa28'
        """
        told = "".join(f"-{key}={_short(value)}" for key, value in self.arguments.items())
        whole = json.dumps([self.experiment, self.arguments], sort_keys=True)
        digest = hashlib.sha256(whole.encode()).hexdigest()
        return f"{(self.experiment + told)[:_LONGEST]}-{digest[:8]}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) / self.name


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        run: The name of its folder.
        status: "complete"; "failed": the body raised an error; "outdated": there is a complete run
            of an earlier version of the experiment; "refused": nothing could be begun.
        message: What went wrong, as one sentence; "" if nothing did.
        done: Whether it has been run now; False if there was a complete run.
        notes: What the body noted.
    """

    run: str
    status: str
    message: str = ""
    done: bool = True
    notes: Sequence[str] = ()


def run_cell(cell: Cell, found: Found | None = None) -> Outcome:
    """Bring a cell to completion, unless it is complete; what goes wrong in it is recorded.

    Args:
        cell: The cell.
        found: Its experiment, where this process has it; None: find it.

    Raises:
        OutputError: Nothing more can be written, as on a full disk.
        KeyboardInterrupt: It was interrupted, which is recorded too.
    """
    with ExitStack() as held:
        try:
            found = found or _find(cell)
            held.enter_context(locked(cell.folder))
            old = records.read(cell.folder)
        except LlamaProbeError as error:
            return Outcome(cell.name, "refused", str(error), done=False)
        sweep(cell.folder)
        held.enter_context(found.importable())
        new = records.new(found, cell.arguments)
        complete = old if old and old["status"] == "complete" else None
        try:
            experiment = _asked_for(found, new)
        except (Exception, SystemExit) as error:
            message = _sentence(error, found)
            if complete:
                return Outcome(cell.name, "refused", message, done=False)
            _cut_short(cell.folder, old or new, "failed", message)
            return Outcome(cell.name, "failed", message)
        if complete and not cell.again:
            return _kept(cell, complete, new)
        _begin(cell, old, new)
        return _attempt(cell, found, experiment, new)


def _find(cell: Cell) -> Found:
    if not cell.address:
        raise InputError(
            f"{cell.experiment} was typed into a notebook, where no other process finds it: write "
            "it in a file"
        )
    return find(cell.address)


def _kept(cell: Cell, old: records.Record, new: records.Record) -> Outcome:
    """What to say of a run that is complete: it stays as it is."""
    changed = records.changes(old, new, ["llama-probe"])
    if not changed:
        return Outcome(cell.name, "complete", done=False, notes=old["notes"])
    message = (
        f"{changed} since this run was completed: begin it again with --again (again=True), or "
        "keep it and choose another --out"
    )
    return Outcome(cell.name, "outdated", message, done=False)


def _attempt(cell: Cell, found: Found, experiment: Experiment, record: records.Record) -> Outcome:
    try:
        experiment.body(Run(cell.folder, record, cell.engine, cell.progress))
        record |= {"status": "complete", "ended": records.now()}
        write_report(cell.folder, record)
        records.write(cell.folder, record)
    except KeyboardInterrupt:
        _cut_short(cell.folder, record, "interrupted")
        raise
    except (Exception, SystemExit) as error:
        message = _sentence(error, found)
        _cut_short(cell.folder, record, "failed", message)
        if isinstance(error, OutputError):
            raise
        return Outcome(cell.name, "failed", message)
    return Outcome(cell.name, "complete", notes=record["notes"])


def _asked_for(found: Found, record: records.Record) -> Experiment:
    """The experiment for the record's arguments; the record gets what it says of itself."""
    experiment = found.function(**record["arguments"])
    if not isinstance(experiment, Experiment):
        what = type(experiment).__name__
        raise InputError(f"{found.name} returned {what}, but should return an lp.Experiment")
    record |= {"title": experiment.title, "seed": experiment.seed}
    record["inputs"] = records.hashes(experiment.inputs)
    return experiment


def _begin(cell: Cell, old: records.Record | None, new: records.Record) -> None:
    """Make the folder ready: what cannot be a part of this run goes before the record says so."""
    if old is None or cell.again:
        for name in ("record.json", "tables", "stores"):
            _remove(cell.folder / name)
    else:
        if changed := records.changes(old, new, new["versions"]):
            tqdm.write(f"{cell.name}: {changed}: its tables are computed again", sys.stderr)
            _remove(cell.folder / "tables")
        else:
            new["models"] = old["models"]
        past = {key: old[key] for key in ("started", "ended", "status")}
        if past["status"] == "running":
            past["status"] = "killed"  # for its folder was free
        new["earlier"] = [*old["earlier"], past]
    forget(cell.folder)
    records.write(cell.folder, new)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cut_short(folder: Path, record: records.Record, status: str, error: str = "") -> None:
    """Record that an attempt has ended early, and by which error if one is being handled."""
    told = {"status": status, "ended": records.now(), "error": error or None}
    if error:
        told["traceback"] = traceback.format_exc()
    with suppress(OutputError):  # on a full disk the record goes on saying "running"
        records.write(folder, {**record, **told})


def _sentence(error: BaseException, found: Found) -> str:
    """What went wrong, and in which line of the experiment if it was not told on purpose."""
    if isinstance(error, LlamaProbeError):
        return str(error)
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    line = line_of(error, found.file)
    return f"{found.file.name}, line {line}: {what}" if found.file and line else what


def _short(value: Any) -> str:
    """A value as a part of a folder's name: of a path, its end."""
    text = re.sub(r"[^\w.+-]+", "_", str(value).rstrip("/").rpartition("/")[2])
    return text.strip("_")[:24]
