"""Teach SmolLM2 to decline mildly improper requests: a LoRA adapter, and its exam.

    python experiments/train_refusal_adapter.py --out runs/refusal-adapter

takes about an hour on one CPU core, and needs `pip install peft transformers`. Killed and started
again, it goes on from its last checkpoint. `--exam FOLDER` marks an adapter that is there.

On some machines a step takes several times longer than its share, in allocating memory: then set
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 4294967296.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from refusal_adapter import exam, requests, training
from refusal_adapter.training import BASE, Plan

import llama_probe as lp
from llama_probe.checkpoints import catalogue


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train the adapter of smollm2-135m-refusal.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "refusal-adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=Plan.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exam", type=Path, help="an adapter to mark, instead of training one")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    folder = asked.exam or taught(Plan(seed=asked.seed, epochs=asked.epochs), asked.out)
    report(folder, asked.out)


def taught(plan: Plan, out: Path) -> Path:
    """Train, and write the adapter; returns its folder."""
    lessons = out / "lessons.parquet"
    if not lessons.exists():
        base = lp.load(BASE)
        found = training.lessons(base, requests.taught(plan.requests, plan.seed), plan)
        found.to_parquet(lessons)
    model = training.adapted(catalogue.pull(BASE), plan)
    log = training.train(model, pd.read_parquet(lessons), plan, out)
    log.to_csv(out / "log.csv", index=False)
    training.save(model, out / "adapter", plan)
    return out / "adapter"


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
