"""Small experiments in files, for the tests of the runner."""

import hashlib
from pathlib import Path

# Draws from all three generators, in steps and between them, and from one that a step makes.
DRAWS = """
import random
import time

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from llama_probe.runner import Experiment, Run


def draws(
    n: int = 3,
    steps: int = 2,
    pause: float = 0.0,
    fails: bool = False,
    drawn: bool = False,
    seed: int = 0,
) -> Experiment:
    def draw() -> pd.DataFrame:
        time.sleep(pause)
        numbers = {"python": [random.random() for _ in range(n)], "numpy": np.random.rand(n)}
        return pd.DataFrame({**numbers, "torch": torch.rand(n).numpy()})

    def body(run: Run) -> None:
        run.heading("Draws")
        for step in range(steps):
            table = run.table(f"draws {step}", draw, caption=f"Step {step}")
            run.text(f"Between: {random.random()}, {np.random.rand()}, {float(torch.rand(1))}")
        if fails:
            raise ZeroDivisionError("on purpose")
        if drawn:
            run.figure(go.Figure(go.Scatter(y=table.numpy)), "The last draws", table=table)
        run.note(f"mean {table.numpy.mean():.6f}")

    return Experiment(title=f"{n} draws", body=body, seed=seed)
"""


def written(folder: Path, source: str = DRAWS, name: str = "draws") -> Path:
    """The file of an experiment."""
    path = folder / f"{name}.py"
    path.write_text(source)
    return path


def contents(out: Path) -> dict[str, str]:
    """Hashes of all files that runs leave, but for locks and records, which have times in them."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (".lock", "record.json")
    }
