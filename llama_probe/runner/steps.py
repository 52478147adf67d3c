"""What an experiment's body works with: steps that are kept, and a report that is put together.

A step, a table or a capture, is done once: a run that was cut short reads what it has. So that it
goes on as if nothing had happened, a step's table is always the one read back from disk, and the
global generators of random numbers are seeded before each step and after it, from the run's seed
and the step's name.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.files import write_text, written
from llama_probe.page.report import Report
from llama_probe.page.views import spec_of
from llama_probe.runner import record as records
from llama_probe.runner.report import add_part, write_parts

if TYPE_CHECKING:
    from llama_probe.capturing import Activations
    from llama_probe.model.llama import Llama

_NAME = re.compile(r"\w[\w .+-]*")


class Run:
    """One run of an experiment, as its body sees it.

    Attributes:
        folder: Where all of it is kept.
        seed: The experiment's.
        arguments: What the experiment was called with.
        progress: Whether steps should show bars.
    """

    def __init__(
        self, folder: Path, record: records.Record, engine: str = "local", progress: bool = True
    ) -> None:
        self.folder = folder
        self.progress = progress
        self.seed: int = record["seed"]
        self.arguments: dict[str, Any] = record["arguments"]
        self._record = record
        self._engine = engine
        self._parts: list[dict[str, Any]] = []
        self._names: set[str] = set()
        _seed_all(self.seed, "body")

    @cached_property
    def model(self) -> "Llama":
        """The model that the argument `model` names, as `lp.load` gives it.

        Raises:
            InputError: The experiment has no parameter `model`, or the weights have changed since
                this run was begun.
        """
        if "model" not in self.arguments:
            raise InputError("the experiment has no parameter 'model': use run.load(name)")
        name = self.arguments["model"]
        with self._seeded("model"):
            model, digest = loaded(name, self.progress)
        self._keep_hash(name, digest)
        return model

    def load(self, name: str | Path, **options: Any) -> "Llama":
        """Load another model and keep its hash in the record.

        Args:
            name: As `lp.load`.
            options: As `lp.load`.

        Raises:
            LlamaProbeError: As `lp.load`; or the weights have changed since this run was begun.
        """
        from llama_probe.checkpoints.fingerprint import model_hash
        from llama_probe.checkpoints.load import load

        with self._seeded(f"model {name}"):
            model = load(name, **options)
        told = "".join(f", {key}={value}" for key, value in options.items() if key != "progress")
        self._keep_hash(f"{name}{told}", model_hash(model))
        return model

    def table(
        self,
        name: str,
        compute: Callable[[], pd.DataFrame],
        *,
        caption: str | None = None,
        max_rows: int = 50,
    ) -> pd.DataFrame:
        """Compute a table and keep it, or read it if an earlier attempt has computed it.

        `compute` should draw from numpy's, torch's or Python's global generator, or from one that
        it makes itself: one that several steps share is not where it was when a step is read.

        Args:
            name: The table's, and its file's.
            compute: Gives it.
            caption: Show it in the report under this line; None: do not show it.
            max_rows: How many rows to show.

        Returns:
            The table as it was read back from `tables/NAME.parquet`.

        Raises:
            InputError: The name is taken or cannot be a file's, or the table cannot be kept.
            OutputError: The disk is full.
        """
        path = self.folder / "tables" / f"{name}.parquet"
        with self._step("table", name):
            if not path.exists():
                _write_table(path, name, compute())
            frame = pd.read_parquet(path)
        if caption is not None:
            self._add("table", table=_relative(path), caption=caption, max_rows=max_rows)
        return frame

    def capture(
        self, name: str, prompts: Any, *, model: "Llama | None" = None, **options: Any
    ) -> "Activations":
        """Capture activations into a store of this run, or read those that are there.

        Args:
            name: The store's, and its folder's.
            prompts: As `lp.capture`.
            model: Which model; None: `run.model`.
            options: As `lp.capture`: hooks, positions, template …

        Returns:
            The activations, read from `stores/NAME`.

        Raises:
            LlamaProbeError: As `lp.capture`.
        """
        from llama_probe.capturing import capture

        if self._engine == "ray":
            from llama_probe.runner.ray_engine import RayEngine

            options.setdefault("engine", RayEngine())
        options.setdefault("progress", self.progress)
        model = self.model if model is None else model
        with self._step("store", name):
            return capture(model, prompts, store=self.folder / "stores" / name, **options)

    def heading(self, text: str) -> None:
        """Add a heading to the report.

        Args:
            text: Plain text.
        """
        self._add("heading", text=text)

    def text(self, text: str) -> None:
        """Add a paragraph to the report.

        Args:
            text: Plain text; line breaks are kept.
        """
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """Keep a sentence on what came out or what is to be known of it.

        It stands in the report and in the record, and is printed when the grid is done.

        Args:
            text: Plain text.
        """
        self._record["notes"].append(text)
        self._add("text", text=text)

    def figure(
        self,
        figure: go.Figure,
        caption: str,
        *,
        table: pd.DataFrame | None = None,
        max_rows: int = 200,
    ) -> None:
        """Add a figure to the report, as it is now.

        Args:
            figure: The figure.
            caption: A line below it, as plain text.
            table: Its numbers, folded away under it.
            max_rows: How many rows of `table` to show.

        Raises:
            OutputError: The disk is full.
        """
        path = self.folder / "figures" / f"{len(self._parts):02}.json"
        write_text(path, json.dumps(spec_of(figure)))
        numbers = None
        if table is not None:
            numbers = path.with_suffix(".parquet")
            _write_table(numbers, caption, table)
        self._add(
            "figure",
            figure=_relative(path),
            caption=caption,
            table=numbers and _relative(numbers),
            max_rows=max_rows,
        )

    def _add(self, kind: str, **part: Any) -> None:
        part = {"kind": kind, **part}
        add_part(Report(""), self.folder, part)  # what cannot be shown is an error here, not later
        self._parts.append(part)
        write_parts(self.folder, self._parts)

    @contextmanager
    def _step(self, kind: str, name: str) -> Iterator[None]:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"a {kind} cannot be called {name!r}: use letters, digits, blanks and . + - _"
            )
        step = f"{kind} {name}"
        if step in self._names:
            raise InputError(f"this run has a {kind} {name!r} already: give each its own name")
        self._names.add(step)
        with self._seeded(step):
            yield

    @contextmanager
    def _seeded(self, step: str) -> Iterator[None]:
        """Whether the step is done or read, what follows draws the same numbers."""
        _seed_all(self.seed, step)
        yield
        _seed_all(self.seed, f"after {step}")

    def _keep_hash(self, name: str, digest: str) -> None:
        known = self._record["models"]
        if known.get(name, digest) != digest:
            raise InputError(
                f"the weights of {name!r} have changed since this run was begun: begin it again "
                "(--again, or again=True)"
            )
        if name not in known:
            known[name] = digest
            records.write(self.folder, self._record)


@lru_cache(maxsize=1)
def loaded(name: str, progress: bool = True) -> "tuple[Llama, str]":
    """A model and its hash, kept until another is asked for: cells of a grid share it."""
    from llama_probe.checkpoints.fingerprint import model_hash
    from llama_probe.checkpoints.load import load

    model = load(name, progress=progress)
    return model, model_hash(model)


def _seed_all(seed: int, step: str) -> None:
    """Seed all global generators from the run's seed and a step's name."""
    import torch

    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    number = int.from_bytes(digest[:4])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _write_table(path: Path, name: str, frame: Any) -> None:
    from pyarrow import ArrowException

    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"table {name!r} is {type(frame).__name__}, but should be a DataFrame")
    if any(level is not None for level in frame.index.names):
        index = ", ".join(map(str, frame.index.names))
        raise InputError(
            f"table {name!r} has an index ({index}), which is not kept: use reset_index()"
        )
    with written(path) as part:
        try:
            frame.to_parquet(part, index=False)
        except (ArrowException, ValueError, TypeError) as error:
            what = " ".join(str(error).split())
            raise InputError(f"table {name!r} cannot be kept as Parquet: {what}") from error


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
