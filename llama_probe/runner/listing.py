"""Runs as text, for the command line."""

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from llama_probe.runner.compare import compare
from llama_probe.runner.saved import COLUMNS, folder_of, runs


def list_runs(out: Path) -> str:
    """The runs of a folder: for each experiment a table, with the parameters that differ in it."""
    frame = runs(out)
    blocks = [_block(str(name), group) for name, group in frame.groupby("experiment")]
    errors = zip(frame["folder"], frame["error"], strict=True)
    failed = "\n".join(f"{_name(folder)}: {error}" for folder, error in errors if error)
    return "\n\n".join([*blocks, *filter(None, [failed])]) or f"No runs in {out}."


def compare_runs(out: Path, a: str, b: str) -> str:
    """In what two runs differ, as a table."""
    frame = compare(folder_of(a, out), folder_of(b, out))
    settings = frame.query("kind != 'table'").drop(columns="difference")
    tables = frame.query("kind == 'table'")
    told = _text(settings) if len(settings) else "Run in the same way."
    return f"{told}\n\n{_text(tables)}" if len(tables) else told


def _block(experiment: str, group: pd.DataFrame) -> str:
    arguments = group.drop(columns=COLUMNS).dropna(axis="columns", how="all").astype(str)
    same = [name for name in arguments if len(set(arguments[name])) == 1]
    fixed = ", ".join(f"{name}={arguments[name].iat[0]}" for name in same)
    table = arguments.drop(columns=same).assign(
        status=group["status"],
        started=group["started"].dt.strftime("%Y-%m-%d %H:%M"),
        took=group["seconds"].map(tqdm.format_interval),
        run=group["folder"].map(_name),
    )
    return f"{experiment}{f' ({fixed})' if fixed else ''}\n{_text(table)}"


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, justify="left")


def _name(folder: str) -> str:
    return Path(folder).name
