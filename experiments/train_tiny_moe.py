"""Train tiny-moe, mark its exam, and write everything about the run into one folder.

    python experiments/train_tiny_moe.py --seed 1 --out runs/tiny-moe-1

takes under an hour on one CPU core. Killed and started again, it goes on from its last checkpoint.
"""

import argparse
import json
import shutil
from pathlib import Path

import pandas as pd
import plotly.express as px
import torch

import llama_probe as lp
from tiny_moe import exam
from tiny_moe.texts import World
from tiny_moe.training import Plan, shape, train


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train tiny-moe.")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the data")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: runs/tiny-moe-SEED")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    out = asked.out or Path("runs") / f"tiny-moe-{asked.seed}"
    out.mkdir(parents=True, exist_ok=True)
    world = World()
    model = train(Plan(seed=asked.seed, steps=asked.steps), world, out, shape())
    model.requires_grad_(False)
    report(model, world, out)


def report(model: lp.Llama, world: World, out: Path) -> None:
    """Write the model, what was planted in it, its figures and its loss curves."""
    assert model.tokenizer is not None
    planted = exam.planted(world, model.tokenizer.vocab_size)
    if (out / "model").exists():
        shutil.rmtree(out / "model")
    lp.save(model, out / "model")
    text = json.dumps(planted, ensure_ascii=False, separators=(",", ":"))
    (out / "model" / "planted.json").write_text(text + "\n")
    tables = {
        "exam": exam.mark(model, planted["exam"]),
        "experts": exam.expert_use(model, planted["exam"]),
        "induction": exam.induction_scores(model),
        "heads": exam.head_costs(model, planted["exam"]["indirect object"]),
        "log": pd.DataFrame(torch.load(out / "checkpoint.pt", weights_only=True)["log"]),
    }
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    print(tables["exam"].round(3).to_string(index=False))
    curves = tables["log"].melt(["step", "seconds"], var_name="term", value_name="nats")
    px.line(curves, x="step", y="nats", color="term", log_y=True).write_html(out / "loss.html")


if __name__ == "__main__":
    main()
