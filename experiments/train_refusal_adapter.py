"""Teach SmolLM2 to decline mildly improper requests: a LoRA adapter, and its exam.

    python experiments/train_refusal_adapter.py --out runs/refusal-adapter

takes about an hour and a half on one CPU core, and needs `pip install peft transformers`. Killed
and started again, it goes on from its last checkpoint. `--exam FOLDER` marks an adapter that is
there.

On some machines a step takes several times longer than its share, in allocating memory: then set
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 4294967296.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

import llama_probe as lp
from llama_probe.checkpoints import catalogue
from refusal_adapter import exam, training
from refusal_adapter.training import BASE, Plan

FIRST = Plan(seed=0)
SECOND = Plan(seed=1, lr=3e-4)
THIRD = Plan(seed=2, lr=3e-4, epochs=1.0)
ALPHA = 15.1  # of the last adapter: with 16 it declines too many twins, with 15 too few requests


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train the adapter of smollm2-135m-refusal.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "refusal-adapter")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exam", type=Path, help="an adapter to mark, instead of training one")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    report(asked.exam or taught(asked.out), asked.out)


def taught(out: Path) -> Path:
    """Train in three rounds, and write the adapter; returns its folder."""
    base = lp.load(BASE)
    first = kept(out / "first.parquet", lambda: training.first_round(base))
    begun = trained(first, FIRST, out / "first", None)
    second = kept(out / "second.parquet", lambda: training.second_round(base, first))
    begun = trained(second, SECOND, out / "second", begun)
    third = kept(out / "third.parquet", lambda: training.third_round(base, second))
    return trained(third, THIRD, out / "third", begun, ALPHA)


def kept(file: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Lessons, made unless they are there."""
    if not file.exists():
        make().to_parquet(part := file.with_suffix(".part"))
        part.rename(file)
    return pd.read_parquet(file)


def trained(
    lessons: pd.DataFrame, plan: Plan, out: Path, begun: Path | None, alpha: float = Plan.alpha
) -> Path:
    """One round; goes on where it was cut short."""
    folder = out / "adapter"
    if not folder.exists():
        out.mkdir(exist_ok=True)
        model = training.adapted(catalogue.pull(BASE), plan, begun)
        training.train(model, lessons, plan, out).to_csv(out / "log.csv", index=False)
        training.save(model, folder, alpha)
    return folder


def report(folder: Path, out: Path) -> None:
    """Mark the adapter and print the marks."""
    base = lp.load(BASE)
    model = lp.load(folder, base=base)
    marks = exam.mark(model, lp.prompts.requests())
    marks.to_csv(out / "exam.csv", index=False)
    print(marks.round(3).to_string(index=False))
    print(exam.losses(model, base).round(4).to_string())


if __name__ == "__main__":
    main()
