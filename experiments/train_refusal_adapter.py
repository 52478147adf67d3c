"""Teach SmolLM2 to decline mildly improper requests: a LoRA adapter, and its exam.

    python experiments/train_refusal_adapter.py --out runs/refusal-adapter

takes about an hour and a half on two CPU cores, and a few minutes on a GPU (`--device cuda`). It
needs `pip install peft transformers`. Killed and started again, it goes on from its last
checkpoint. `--exam FOLDER` marks an adapter that is there.

On some machines a step takes several times longer than its share, in allocating memory: then set
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 4294967296.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

import llama_probe as lp
from llama_probe.checkpoints import catalogue
from llama_probe.files import written
from refusal_adapter import exam, training
from refusal_adapter.training import BASE, Plan


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train the adapter of smollm2-135m-refusal.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "refusal-adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; all of its cores if left out")
    parser.add_argument("--exam", type=Path, help="an adapter to mark, instead of training one")
    asked = parser.parse_args()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    base = lp.load(BASE, device=asked.device)
    report(asked.exam or taught(base, asked.out, Plan()), base, asked.out)


def taught(base: lp.Llama, out: Path, plan: Plan) -> Path:
    """Train an adapter unless it is there; returns its folder."""
    folder = out / "adapter"
    if not folder.exists():
        lessons = out / "lessons.parquet"
        if not lessons.exists():
            with written(lessons) as part:
                training.lessons(base).to_parquet(part)
        model = training.adapted(catalogue.pull(BASE), plan, str(base.cfg.device))
        log = training.train(model, pd.read_parquet(lessons), plan, out)
        log.to_csv(out / "log.csv", index=False)
        training.save(model, folder)
    return folder


def report(folder: Path, base: lp.Llama, out: Path) -> None:
    """Mark the adapter and print the marks."""
    model = lp.load(folder, base=base)
    marks = exam.mark(model, lp.prompts.requests())
    marks.to_csv(out / "exam.csv", index=False)
    print(marks.round(3).to_string(index=False))
    print(exam.losses(model, base).round(4).to_string())


if __name__ == "__main__":
    main()
