"""The model card: installs a training run as the model in the box, and shows its figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tiny_moe.exam import total_use

TARGET = Path(__file__).resolve().parents[2] / "llama_probe" / "assets" / "tiny_moe"
TEMPLATE = Path(__file__).with_name("card.md")


def install(runs: list[Path], target: Path = TARGET) -> None:
    """Copy the first run's model into the package and write the card."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (runs[0] / "model").iterdir():
        shutil.copyfile(file, target / file.name)
    planted = json.loads((target / "planted.json").read_text())
    text = TEMPLATE.read_text()
    for slot, table in {
        "EXAM": exam_table(runs),
        "HEADS": head_table(runs[0]),
        "EXPERTS": expert_table(runs[0], planted["planted_layer"]),
        "USE": least_use(runs),
        "APART": apart(runs),
        "RUNS": run_table(runs),
        "LOSS": loss_table(runs),
    }.items():
        text = text.replace(f"<!-- {slot} -->", table)
    (target / "README.md").write_text(text)


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of cells as a table."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def exam_table(runs: list[Path]) -> str:
    """Share right of each task, for each run."""
    marks = [pd.read_csv(run / "exam.csv").set_index("task") for run in runs]
    return markdown(
        [
            {"task": str(task), "n": f"{marks[0].n[task]}"}
            | {f"seed {i}": interval(mark.loc[task]) for i, mark in enumerate(marks)}
            for task in marks[0].index
        ]
    )


def apart(runs: list[Path]) -> str:
    """The tasks in which two runs differ by more than their intervals."""
    marks = [pd.read_csv(run / "exam.csv").set_index("task") for run in runs]
    low = pd.concat([mark.ci_low for mark in marks], axis=1).max(axis=1)
    high = pd.concat([mark.ci_high for mark in marks], axis=1).min(axis=1)
    return ", ".join(low.index[low > high]) or "none"


def interval(row: Any) -> str:
    """A value with its confidence interval."""
    return f"{row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"


def head_table(run: Path) -> str:
    """What each head does."""
    costs = pd.read_csv(run / "heads.csv")
    induction = pd.read_csv(run / "induction.csv")
    both = costs.merge(induction, on=["layer", "head"], suffixes=("", "_induction"))
    both = both.sort_values("value", ascending=False)
    return markdown(
        [
            {
                "head": f"{row.layer:.0f}.{row['head']:.0f}",
                "indirect object lost": interval(row),
                "prefix matching": f"{row.value_induction:.2f}",
            }
            for _, row in both.iterrows()
        ]
    )


def expert_table(run: Path, layer: int) -> str:
    """Where each task's tokens go in the planted layer."""
    use = pd.read_csv(run / "experts.csv").query("layer == @layer")
    wide = use.pivot(index="task", columns="expert", values="value")
    return markdown(
        [
            {"task": str(task)} | {f"expert {e}": f"{share:.2f}" for e, share in row.items()}
            for task, row in wide.iterrows()
        ]
    )


def least_use(runs: list[Path]) -> str:
    """The smallest share of held-out tokens that any expert of any layer gets, for each run."""
    least = [total_use(pd.read_csv(run / "experts.csv")).min() for run in runs]
    return " and ".join(f"{share:.1%} (seed {i})" for i, share in enumerate(least))


def run_table(runs: list[Path]) -> str:
    """Steps and time of each run."""
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    return markdown(
        [
            {
                "seed": str(i),
                "steps": f"{state['step']:,}",
                "minutes": f"{state['seconds'] / 60:.0f}",
            }
            for i, state in enumerate(states)
        ]
    )


def loss_table(runs: list[Path]) -> str:
    """The log, averaged over tenths of the training."""
    rows = [{"tenth": f"{tenth + 1}"} for tenth in range(10)]
    for i, run in enumerate(runs):
        log = pd.read_csv(run / "log.csv")
        means = log.groupby(log["step"] * 10 // (log["step"].max() + 1)).mean()
        for tenth, row in enumerate(rows):
            for term in means.columns[2:]:
                row[f"seed {i}: {term}"] = f"{means[term].iloc[tenth]:.4f}"
    return markdown(rows)
