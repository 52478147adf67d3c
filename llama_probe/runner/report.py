"""The report of a run, put together from what lies in its folder.

`report.json` has its parts in order; tables and figures are files that it names. The first report
is made from them too, so that one made again is the same.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from llama_probe.files import locked, write_text, written
from llama_probe.page.report import Report
from llama_probe.runner import record as records
from llama_probe.runner.saved import read_run

_PARTS = "report.json"
_SHORT = 16  # digits of a hash that are shown


def rebuild(folder: str | Path) -> Path:
    """Write a run's report again, from its record, tables, figures and texts.

    Args:
        folder: The run's.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: The folder is no run.
        OutputError: The run is going on, or the disk is full.
    """
    run = read_run(folder)
    with locked(run.folder):
        return write_report(run.folder, run.record)


def write_report(folder: Path, record: records.Record) -> Path:
    """Write `report.html` into the folder of a run, which is locked."""
    page = Report(record["title"])
    if record["status"] != "complete":
        page.text(f"This run is not complete: {record['error'] or records.status(record)}.")
    path = folder / _PARTS
    for part in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        add_part(page, folder, part)
    page.heading("What was run")
    page.table(_what(record), max_rows=1000)
    with written(folder / "report.html") as part:
        # Half a surrogate pair, which a tokenizer may give, has no UTF-8.
        part.write_text(page.html(), encoding="utf-8", errors="xmlcharrefreplace")
    return folder / "report.html"


def add_part(page: Report, folder: Path, part: dict[str, Any]) -> None:
    """Add a part to a page: a heading, a text, or a table or figure that is read from its file."""
    match part["kind"]:
        case "heading":
            page.heading(part["text"])
        case "text":
            page.text(part["text"])
        case "table":
            frame = pd.read_parquet(folder / part["table"])
            page.table(frame, max_rows=part["max_rows"], caption=part["caption"])
        case "figure":
            figure = go.Figure(json.loads((folder / part["figure"]).read_text(encoding="utf-8")))
            table = part["table"] and pd.read_parquet(folder / part["table"])
            page.figure(figure, part["caption"], table=table, max_rows=part["max_rows"])


def write_parts(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Keep the parts of a report."""
    write_text(folder / _PARTS, json.dumps(parts, indent=2) + "\n")


def forget(folder: Path) -> None:
    """Remove the parts of an earlier attempt, which each attempt makes anew."""
    for name in ("report.html", _PARTS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)


def _what(record: records.Record) -> pd.DataFrame:
    """What the results follow from; no times, which differ between runs that are the same."""
    git = record["git"] or {}
    revision = git.get("revision", "") + (", with changes" if git.get("dirty") else "")
    rows = [
        ("experiment", record["experiment"]),
        *((f"argument {name}", value) for name, value in record["arguments"].items()),
        ("seed", record["seed"]),
        *((f"SHA-256 of model {name}", it[:_SHORT]) for name, it in record["models"].items()),
        *((f"SHA-256 of input {name}", it[:_SHORT]) for name, it in record["inputs"].items()),
        *((f"SHA-256 of {name or 'source'}", it[:_SHORT]) for name, it in record["source"].items()),
        *((f"version of {name}", it) for name, it in record["versions"].items()),
        ("git revision", revision or "none"),
        ("device", record["device"]),
        ("threads", record["threads"]),
    ]
    return pd.DataFrame([(what, str(value)) for what, value in rows], columns=["what", "value"])
