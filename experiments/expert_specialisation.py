"""Experts and domains: what routing knows of a text's domain, and what each expert is needed for.

    python experiments/expert_specialisation.py --model tiny-moe --n 60 --out runs/experts

For a model of your own: --texts FILE.csv with columns `domain` and `text`. The folder gets tables
(specialisation, twins, ablation; CSV), record.json with what was run, and report.html.

1. Specialisation: mutual information of expert and domain by layer, with a permutation test over
   prompts; the same given the token; and of untrained twins, which know words only.
2. Ablation: on one half of a domain's texts the expert is chosen that this domain uses most beyond
   the others; on the other half it is taken out. The harm, in nats of loss for each token that it
   served, stands beside that of random sets of other experts that serve as many tokens.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import llama_probe as lp
from ioi_patching import PACKAGES, git_revision, weights_hash, write
from llama_probe import plots

TASKS = ("facts", "verdicts", "arithmetic", "code", "translation", "indirect object")
RESAMPLES = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, and write everything into one folder."""
    parser = argparse.ArgumentParser(description="What experts are for.")
    parser.add_argument("--model", default="tiny-moe", help="what lp.load takes")
    parser.add_argument("--texts", type=Path, help="CSV of domain and text; default: tiny-moe's")
    parser.add_argument("--n", type=int, default=60, help="texts of a domain")
    parser.add_argument("--permutations", type=int, default=9999)
    parser.add_argument("--twins", type=int, default=5, help="untrained models to compare with")
    parser.add_argument("--controls", type=int, default=20, help="random ablations of a domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    asked = parser.parse_args(arguments)
    started, begun = datetime.now(UTC), time.perf_counter()
    model = lp.load(asked.model)
    texts = planted_texts(asked.n) if asked.texts is None else pd.read_csv(asked.texts)
    routes = lp.routes_of(model, texts.text.tolist(), texts.domain.tolist())
    tables = {
        "texts": texts,
        "specialisation": lp.specialisation(
            routes, permutations=asked.permutations, seed=asked.seed
        ),
        "twins": of_twins(asked, texts),
        "ablation": ablation(model, texts, asked.controls, asked.seed),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "record.json").unlink(missing_ok=True)  # that of other tables
    for name, table in tables.items():
        write(asked.out / f"{name}.csv", table.to_csv(index=False))
    report(asked.model, lp.routing_report(routes), tables).write(asked.out / "report.html")
    record = {
        "arguments": {name: str(value) for name, value in vars(asked).items()},
        "weights_sha256": weights_hash(model),
        "texts_sha256": hashlib.sha256(texts.to_csv(index=False).encode()).hexdigest(),
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write(asked.out / "record.json", json.dumps(record, indent=2) + "\n")
    print(tables["ablation"].round(3).to_string(index=False))
    print(f"written to {asked.out}")


def planted_texts(n: int) -> pd.DataFrame:
    """Held-out questions of tiny-moe with their answers, n of each domain."""
    exam = lp.prompts.planted()["exam"]
    rows = [
        (task, question["prompt"] + question["answer"], question["prompt"])
        for task in TASKS
        for question in exam[task][:n]
    ]
    return pd.DataFrame(rows, columns=["domain", "text", "prompt"])


def of_twins(asked: argparse.Namespace, texts: pd.DataFrame) -> pd.DataFrame:
    """The same measures of untrained models: what the vocabulary alone tells."""
    frames = []
    for seed in range(asked.twins if asked.model == "tiny-moe" else 0):
        twin = lp.load(asked.model, pretrained=False, seed=seed, progress=False)
        frame = lp.specialisation(
            twin, texts.text.tolist(), texts.domain.tolist(), permutations=99, seed=asked.seed
        )
        frames.append(frame.assign(twin=seed))
    return pd.concat(frames) if frames else pd.DataFrame({"twin": []})


def ablation(model: lp.Llama, texts: pd.DataFrame, controls: int, seed: int) -> pd.DataFrame:
    """The harm of each domain's expert on texts that it was not chosen on, and of random ones."""
    draw = np.random.default_rng(seed)
    half = pd.Series(draw.permutation(len(texts)), texts.index)
    chosen = half.groupby(texts.domain).rank() % 2 == 1
    a, b = texts[chosen], texts[~chosen]
    routes_a = lp.routes_of(model, a.text.tolist(), a.domain.tolist())
    rows = []
    for domain in tqdm(texts.domain.unique(), desc="ablation"):
        layer, expert = most_its_own(routes_a, domain)
        own = b[b.domain == domain]
        plain = losses(model, own, [])
        routes = lp.routes_of(model, own.text.tolist())
        load = served(routes, layer, [expert])
        harm = losses(model, own, lp.ablate_experts({layer: [expert]}, how="zero")) - plain
        low, high = interval(harm, load, draw)
        random = []
        for _ in range(controls):
            other, experts = matched(routes, (layer, expert), load.sum(), draw)
            edit = lp.ablate_experts({other: experts}, how="zero")
            less = losses(model, own, edit) - plain
            random.append(less.sum() / served(routes, other, experts).sum())
        rows.append(
            {
                "domain": domain, "layer": layer, "expert": expert,
                "load": load.sum() / routes.lengths.sum(), "harm": harm.sum() / load.sum(),
                "ci_low": low, "ci_high": high, "random_mean": float(np.mean(random)),
                "random_max": float(np.max(random)), "controls": controls,
                "exceeds_all": bool(low > np.max(random)), "n": len(own),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def most_its_own(routes: lp.Routes, domain: str) -> tuple[int, int]:
    """The layer and expert that a domain uses most beyond what the other domains do."""
    shares = routes.shares()
    own = np.asarray(routes.labels) == domain
    beyond = shares[:, own].mean(axis=1) - shares[:, ~own].mean(axis=1)
    layer, expert = np.unravel_index(int(beyond.argmax()), beyond.shape)
    return routes.layers[int(layer)], int(expert)


def served(routes: lp.Routes, layer: int, experts: Sequence[int]) -> np.ndarray:
    """For each text, how many of its tokens are sent to any of these experts."""
    taken = np.isin(routes.experts[routes.layers.index(layer)], experts).any(axis=-1)
    return np.bincount(routes.prompt, weights=taken, minlength=routes.n_prompts)


def matched(
    routes: lp.Routes, but: tuple[int, int], load: float, draw: np.random.Generator
) -> tuple[int, list[int]]:
    """Random other experts of a random layer that together serve as many tokens, or nearly (0.9).

    Layers where the others serve fewer are left out: of a planted layer, one expert has them all.
    """
    for layer in draw.permutation(routes.layers).tolist():
        experts: list[int] = []
        for expert in draw.permutation(routes.n_experts).tolist():
            if (layer, expert) != but:
                experts.append(expert)
            if served(routes, layer, experts).sum() >= 0.9 * load:
                return layer, experts
    raise ValueError(f"no layer has other experts that serve {load:.0f} tokens of these texts")


@torch.no_grad()
def losses(model: lp.Llama, texts: pd.DataFrame, edit: Any) -> np.ndarray:
    """Of each text the summed loss in nats: of the answer, where it has a prompt; else of all."""
    values = []
    with model.hooks(edit):
        for row in texts.itertuples():
            each = model(row.text, return_type="loss", loss_per_token=True)[0]
            prompt = getattr(row, "prompt", None)
            first = model.to_tokens(prompt).shape[1] - 1 if isinstance(prompt, str) else 0
            values.append(float(each[first:].sum()))
    return np.array(values)


def interval(harm: np.ndarray, load: np.ndarray, draw: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap over texts of the harm for each token served, a ratio of sums."""
    counts = draw.multinomial(len(harm), [1 / len(harm)] * len(harm), size=RESAMPLES)
    ratios = (counts @ harm) / np.maximum(counts @ load, 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def report(name: str, routing: lp.RoutingReport, tables: dict[str, pd.DataFrame]) -> lp.Report:
    """The tables as one page."""
    page = lp.Report(f"Experts of {name}")
    page.heading("Who is used")
    page.figure(plots.routing_load(routing.load), "Load of each expert", table=routing.load)
    page.heading("What routing knows of the domain")
    found = tables["specialisation"]
    page.figure(
        plots.specialisation(found), "Bits about the domain, with their baseline", table=found
    )
    if len(tables["twins"]):
        twins = tables["twins"].groupby(["layer", "metric"]).corrected
        page.table(
            twins.agg(["mean", "min", "max"]).reset_index(),
            caption="Untrained twins, bits beyond the baseline: what the vocabulary alone tells",
        )
    page.heading("What each expert is needed for")
    page.table(
        tables["ablation"],
        caption="Harm of taking the expert out, in nats of loss for each token that it served, on "
        "texts that it was not chosen on; beside it random experts that serve as many tokens",
    )
    return page


if __name__ == "__main__":
    main()
