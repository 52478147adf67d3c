"""A grid of runs: an experiment for all combinations of its parameters' values, on some engine."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from tqdm.auto import tqdm

from llama_probe.errors import InputError
from llama_probe.runner.cell import Cell, Outcome, run_cell
from llama_probe.runner.find import Found, find
from llama_probe.runner.parameters import parameters_of, product, texts, values
from llama_probe.runner.saved import framed, read_run, row_of
from llama_probe.runner.steps import loaded


@runtime_checkable
class Engine(Protocol):
    """Who runs the cells of a grid."""

    def map(self, cells: Sequence[Cell], found: Found) -> Iterator[Outcome]:
        """Bring cells to completion with `run_cell`, anywhere and in any order.

        Args:
            cells: Plain data: `run_cell(cell)` works in any process that sees the same files.
            found: Their experiment, for those that are run in this process.

        Yields:
            What became of each, as soon as it is known.
        """
        ...


class Local:
    """Runs cells in this process, one after another."""

    def map(self, cells: Sequence[Cell], found: Found) -> Iterator[Outcome]:
        """See `Engine.map`."""
        return (run_cell(cell, found) for cell in cells)


def _ray() -> Engine:
    from llama_probe.runner.ray_engine import RayEngine

    return RayEngine()


ENGINES: dict[str, Callable[[], Engine]] = {"local": Local, "ray": _ray}


def run(
    experiment: str | Path | Callable[..., Any],
    /,
    *,
    out: str | Path = "runs",
    again: bool = False,
    engine: str | Engine = "local",
    progress: bool = True,
    **parameters: Any,
) -> pd.DataFrame:
    """Run an experiment for all combinations of its parameters' values.

    Each combination is a run with a folder of its own, whose name follows from the experiment and
    its arguments. What is complete is not done again, what was cut short goes on from the last
    table or shard that was written, and a run that fails does not keep the others from going on.

    Args:
        experiment: A function that returns an `Experiment`; or the file that it is in, as
            "file.py" or "file.py::function".
        out: The folder of the runs' folders.
        again: Begin anew, whatever there is.
        engine: "local"; "ray", which places cells, or the shards of a single one, on a Ray
            cluster; or an `Engine`, such as `RayEngine(workers=2)`.
        progress: Show a bar for the whole grid and those of its steps, and what fails as it does.
        parameters: Their values; a list, tuple or range gives several.

    Returns:
        As `runs`, one row for each combination. Here `status` may also be "outdated" (complete, but
        its source or inputs have changed since) or "refused" (it could not be begun), and `error`
        says what went wrong.

    Raises:
        InputError: The experiment, a parameter or the engine cannot be used.
        OutputError: The disk is full.
    """
    found, cells = plan(experiment, parameters, out, again)
    outcomes = {outcome.run: outcome for outcome in run_cells(found, cells, engine, progress)}
    return framed([_row(cell, outcomes[cell.name]) for cell in cells])


def plan(
    experiment: str | Path | Callable[..., Any],
    given: Mapping[str, Any] | Sequence[str],
    out: str | Path,
    again: bool = False,
) -> tuple[Found, list[Cell]]:
    """Find an experiment, and what is to be run of it; nothing is written.

    Args:
        experiment: As `run`.
        given: The parameters' values, as `run` takes them, or as texts "key=v1,v2".
        out: As `run`.
        again: As `run`.

    Raises:
        InputError: As `run`.
    """
    found = find(experiment)
    known = parameters_of(found.name, found.function)
    if isinstance(given, Mapping):
        several = values(known, found.name, given)
    else:
        several = texts(known, found.name, given)
    grid = product(known, found.name, several)
    return found, [
        Cell(found.name, found.address, row, str(Path(out).expanduser()), again) for row in grid
    ]


def run_cells(
    found: Found, cells: Sequence[Cell], engine: str | Engine = "local", progress: bool = True
) -> list[Outcome]:
    """Bring all cells of a grid to completion.

    Args:
        found: Their experiment.
        cells: As `plan` gives them.
        engine: Who runs them.
        progress: Show bars, and what goes wrong as it does.

    Raises:
        InputError: There is no such engine.
        OutputError: The disk is full.
    """
    chosen = _engine(engine)
    cells = [replace(cell, progress=progress) for cell in cells]
    waiting = _labels(cells)
    outcomes = []
    try:
        with tqdm(total=len(cells), unit="run", disable=not progress) as bar:
            bar.set_description(next(iter(waiting.values())))
            for outcome in chosen.map(cells, found):
                outcomes.append(outcome)
                del waiting[outcome.run]
                if outcome.message and progress:
                    bar.write(f"{outcome.run}: {outcome.status}: {outcome.message}", sys.stderr)
                bar.update()
                # Drawn each time, however quick the runs are: the bar tells which one is under way.
                bar.set_description(next(iter(waiting.values()), found.name))
    finally:
        loaded.cache_clear()
    return outcomes


def _labels(cells: Sequence[Cell]) -> dict[str, str]:
    """What the bar calls each cell: what tells it from the others."""
    told = [[f"{key}={value}" for key, value in cell.arguments.items()] for cell in cells]
    same = set(told[0]).intersection(*told[1:])
    return {
        cell.name: " ".join([cell.experiment, *(part for part in parts if part not in same)])
        for cell, parts in zip(cells, told, strict=True)
    }


def _engine(engine: str | Engine) -> Engine:
    if not isinstance(engine, str):
        return engine
    if engine not in ENGINES:
        raise InputError(f"there is no engine {engine!r}; it should be {' or '.join(ENGINES)}")
    return ENGINES[engine]()


def _row(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """The row of a cell: what its folder says, and what has become of it now."""
    now = {"status": outcome.status, "error": outcome.message}
    if outcome.status != "refused":
        return row_of(read_run(cell.folder)) | now
    row = {"folder": str(cell.folder), "experiment": cell.experiment, **now}
    return row | {"started": None, "seconds": math.nan} | cell.arguments
