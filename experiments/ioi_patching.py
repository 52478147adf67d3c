"""Indirect objects: patch sweeps over many held-out pairs, exact and estimated, in one folder.

    python experiments/ioi_patching.py --model smollm2-135m-instruct --n 16 --out runs/ioi

The folder gets tidy tables (pairs, behaviour, exact, estimates, agreement; CSV), record.json with
what was run, and report.html. Each file is complete or not there, and the record comes last.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pandas as pd

import llama_probe as lp
from llama_probe import plots
from llama_probe.page.report import Report

N_BEHAVIOUR = 200  # the fewest pairs that the model's own answers are counted on
STREAMS = ["resid_pre", "attn_out", "mlp_out"]
HEADS = ["z", "q", "k"]
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "integrated": {"method": "integrated"},
    "QK fix": {"qk_fix": True},
}
PACKAGES = ("llama-probe", "torch", "transformer-lens", "numpy", "pandas", "plotly")


class Tables(NamedTuple):
    """What a run finds; each becomes a CSV file."""

    pairs: pd.DataFrame
    behaviour: pd.DataFrame
    exact: pd.DataFrame
    estimates: pd.DataFrame
    agreement: pd.DataFrame


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, and write everything into one folder."""
    parser = argparse.ArgumentParser(description="Patch sweeps on indirect objects.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what lp.load takes")
    parser.add_argument("--n", type=int, default=16, help="pairs to patch")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the intervals")
    parser.add_argument("--out", type=Path, help="default: runs/ioi-MODEL-SEED")
    asked = parser.parse_args(arguments)
    out = asked.out or Path("runs") / f"ioi-{Path(asked.model).name}-{asked.seed}"
    started = datetime.now(UTC)
    begun = time.perf_counter()

    model = lp.load(asked.model)
    tables = run(model, held_out(model, asked.model, max(asked.n, N_BEHAVIOUR), asked.seed), asked)
    print(tables.behaviour.round(3).to_string(index=False))
    print(tables.agreement.round(3).to_string(index=False))

    out.mkdir(parents=True, exist_ok=True)
    (out / "record.json").unlink(missing_ok=True)  # that of other tables
    for name, table in tables._asdict().items():
        write(out / f"{name}.csv", table.to_csv(index=False))
    report(asked.model, asked.n, tables).write(out / "report.html")
    record = {
        "arguments": {name: str(value) for name, value in vars(asked).items()},
        "model": asked.model,
        "weights_sha256": weights_hash(model),
        "pairs_sha256": hashlib.sha256(tables.pairs.to_csv(index=False).encode()).hexdigest(),
        "seed": asked.seed,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write(out / "record.json", json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")


def held_out(model: lp.Llama, name: str, n: int, seed: int) -> pd.DataFrame:
    """Pairs of sentences and names that no choice was made on.

    tiny-moe knows sentences of its own only; of these, pairs of names that it was never taught.
    """
    draw = lp.prompts.indirect_object
    if name != "tiny-moe":
        return draw(model, n, split="test", seed=seed)
    truth = lp.prompts.planted()
    words = {kind: truth[kind] for kind in ("names", "places", "gifts")}
    # A sentence that begins with a name makes it another token.
    words["templates"] = [story for story in truth["stories"] if not story.startswith("{")]
    untaught = {frozenset(pair) for pair in truth["held_out_name_pairs"]}
    pairs = draw(model, 10 * n, split="all", seed=seed, **words)
    people = zip(pairs.answer.str.strip(), pairs.foil.str.strip(), strict=True)
    return pairs[[frozenset(both) in untaught for both in people]].head(n).reset_index(drop=True)


def run(model: lp.Llama, pairs: pd.DataFrame, asked: argparse.Namespace) -> Tables:
    """Everything that is measured; the first `asked.n` pairs are patched."""
    patched = pairs.head(asked.n)
    exact = sweep(lp.patch, model, patched, seed=asked.seed, progress=True)
    estimates = {
        name: sweep(lp.attribution_patch, model, patched, seed=asked.seed, **options)
        for name, options in METHODS.items()
    }
    agreement = [
        lp.agreement(exact, estimate).assign(method=name) for name, estimate in estimates.items()
    ]
    return Tables(
        pairs,
        behaviour(model, pairs, asked.seed),
        exact,
        pd.concat([frame.assign(method=name) for name, frame in estimates.items()]),
        with_largest(pd.concat(agreement), exact),
    )


def behaviour(model: lp.Llama, pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What the model itself answers to the clean prompts, with 95 % intervals."""
    values = []
    for start in range(0, len(pairs), 50):
        part = pairs.iloc[start : start + 50]
        metric = lp.logit_diff(part.answer.tolist(), part.foil.tolist()).on(model)
        values += metric(model(part.clean.tolist(), logits_at=-1)[:, -1]).tolist()
    right = sum(value > 0 for value in values)
    measures = {
        "logit difference": lp.stats.mean(np.array(values), seed=seed),
        "share right": lp.stats.share(right, len(values)),
    }
    return pd.DataFrame(
        {"measure": name, **estimate._asdict()} for name, estimate in measures.items()
    )


def sweep(
    effects: Callable[..., pd.DataFrame], model: lp.Llama, pairs: pd.DataFrame, **options: Any
) -> pd.DataFrame:
    """The effects at all sites: streams at the named positions, heads at all of them together."""
    prompts = pairs.clean.tolist(), pairs.corrupted.tolist()
    options["metric"] = lp.logit_diff(pairs.answer.tolist(), pairs.foil.tolist())
    if options.get("qk_fix"):
        return effects(model, *prompts, at=["q", "k"], **options)
    places = pairs.assign(**{"S2+1": pairs.S2 + 1})
    named = {role: places[role].tolist() for role in ("IO", "S1", "S2", "S2+1", "end")}
    return effects(model, *prompts, at=STREAMS + HEADS, positions=named, **options)


def with_largest(agreement: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """The table with each site's largest effect: of small ones a correlation says nothing."""
    largest = exact.effect.abs().groupby(exact.site).max()
    table = agreement.assign(largest=agreement.site.map(largest))
    first = ["site", "method", "largest"]
    return table[[*first, *(name for name in table if name not in first)]]


def report(name: str, n: int, tables: Tables) -> Report:
    """The tables as one page."""
    page = Report(f"Indirect objects in {name}")
    page.text(
        "Each pair differs in who gives, and with it in the right answer. An effect is the share "
        "of the clean run's logit difference that one patch brings back to the corrupted run; "
        f"{n} pairs, ratio of means, 95 % bootstrap intervals over pairs."
    )
    page.table(tables.behaviour, caption=f"The model's answers to {len(tables.pairs)} prompts")
    page.heading("Where: streams, attention and feed-forwards")
    for site in STREAMS:
        cells = tables.exact[tables.exact.site == site]
        caption = f"Effect of patching {site}, by layer and named position"
        page.figure(plots.patch(cells), caption, table=cells.dropna(axis="columns", how="all"))
    page.heading("Who: heads")
    cells = tables.exact[tables.exact.site == "z"].dropna(axis="columns", how="all")
    ordered = cells.sort_values("effect", key=abs, ascending=False)
    page.figure(plots.patch(cells), "Effect of each head's output, at all positions", table=ordered)
    page.heading("Estimates from gradients")
    page.table(
        tables.agreement,
        caption="How well estimates agree with exact effects. Recall: of the ten largest effects. "
        "Where the largest effect is near 0, a correlation says nothing.",
    )
    for method, estimate in tables.estimates.groupby("method", sort=False):
        figure = plots.agreement(tables.exact, estimate, title=f"Estimated by: {method}")
        page.figure(figure.update_layout(height=520), f"{method} against exact effects")
    return page


def write(path: Path, text: str) -> None:
    """Write a file, replacing one that is there only once the new one is complete."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def weights_hash(model: lp.Llama) -> str:
    """SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def git_revision() -> str | None:
    """The commit that this file is run from, with "+" where files have changed since."""

    def git(*command: str) -> str:
        ran = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
