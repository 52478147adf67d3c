"""What runs leave behind: listing them, reading one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llama_probe.errors import InputError, UnknownNameError, near
from llama_probe.runner import record as records

if TYPE_CHECKING:
    from llama_probe.capturing import Activations

COLUMNS = ["folder", "experiment", "status", "started", "seconds", "error"]


@dataclass(frozen=True)
class SavedRun:
    """A run's folder, read.

    Attributes:
        folder: The folder.
        record: What `record.json` says.
    """

    folder: Path
    record: records.Record = field(repr=False)

    @property
    def status(self) -> str:
        """Complete, running, failed, interrupted or killed."""
        return records.status(self.record)

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The tables by name, each read when it is asked for."""
        return _Tables(self.folder / "tables")

    def store(self, name: str) -> "Activations":
        """The activations that `run.capture` has kept.

        Args:
            name: The store's.

        Raises:
            CheckpointError: There is no such store, or it is not finished.
        """
        from llama_probe.capturing import Activations

        return Activations.open(self.folder / "stores" / name)


class _Tables(Mapping[str, pd.DataFrame]):
    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in sorted(folder.glob("*.parquet"))}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._paths:
            has = ", ".join(self._paths) or "none"
            raise UnknownNameError(
                f"the run has no table {name!r}{near(name, self._paths)}; it has {has}"
            )
        return pd.read_parquet(self._paths[name])

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def read_run(folder: str | Path) -> SavedRun:
    """Read a run, complete or not.

    Args:
        folder: The run's.

    Returns:
        Its record and tables: `read_run(folder).tables["scores"]`.

    Raises:
        InputError: The folder is no run.
    """
    folder = Path(folder)
    record = records.read(folder)
    if record is None:
        near_by = [path.name for path in _folders(folder.parent)]
        raise InputError(f"{folder} is no run: it has no record.json{near(folder.name, near_by)}")
    return SavedRun(folder, record)


def runs(folder: str | Path = "runs") -> pd.DataFrame:
    """List the runs in a folder.

    Args:
        folder: What `--out` was.

    Returns:
        One row for each run, ordered by experiment and time: `folder`, `experiment`, `status`
        ("complete", "running", "failed", "interrupted" or "killed"), `started` (of its first
        attempt, UTC), `seconds` (of all attempts that were not killed), `error` ("" if none), and
        one column for each parameter.

    Raises:
        InputError: There is no such folder, or a record in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with runs")
    found = [read_run(path) for path in _folders(folder)]
    return framed([row_of(run) for run in found]).sort_values(
        ["experiment", "started"], kind="stable", ignore_index=True
    )


def row_of(run: SavedRun) -> dict[str, Any]:
    """The row of a run in a listing."""
    record = run.record
    return {
        "folder": str(run.folder),
        "experiment": record["experiment"],
        "status": run.status,
        "started": [*record["earlier"], record][0]["started"],
        "seconds": records.seconds(record),
        "error": record["error"] or "",
        **record["arguments"],
    }


def framed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a frame, with its columns and types where there are none too."""
    frame = pd.DataFrame(rows, columns=None if rows else COLUMNS, dtype=object)
    for name in frame:
        # Whole numbers stay whole where other experiments lack the parameter.
        if name in COLUMNS or not frame[name].isna().to_numpy().any():
            frame[name] = frame[name].infer_objects()
    return frame.assign(started=pd.to_datetime(frame["started"], utc=True))


def folder_of(name: str, out: Path) -> Path:
    """The folder of a run that is given as a path, or by its name in `out` or the end of it."""
    path = Path(name)
    if len(path.parts) > 1 or path.is_dir():
        return path
    found = [folder for folder in _folders(out) if folder.name.endswith(name)]
    return found[0] if len(found) == 1 else out / name


def _folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/record.json"))
