"""Is truth linearly readable, layer by layer, and is it truth that is read?

    llama-probe run experiments/truth_probes.py -P model=smollm2-135m-instruct -P data=FOLDER

`data` is a folder with cities.csv, neg_cities.csv and sp_en_trans.csv of the geometry of truth
(Marks and Tegmark 2023, arXiv 2310.06824; Bürger, Hamprecht and Nadler 2024, arXiv 2407.12831),
which have a statement, a label and, for cities, city, country and correct_country. Without it the
statements of `lp.prompts.true_false` are used.
"""

import warnings
from pathlib import Path

import pandas as pd

import llama_probe as lp

SETS = ("cities", "neg_cities", "sp_en_trans")


def truth_probes(
    model: str = "smollm2-135m-instruct", data: str = "", folds: int = 5, seed: int = 0
) -> lp.Experiment:
    """Probe the last token of statements before every block; each run is one model."""
    paths = [Path(data) / f"{name}.csv" for name in SETS] if data else []

    def body(run: lp.Run) -> None:
        sets = published(paths) if paths else ours()
        acts = {name: run.capture(name, frame, hooks=STREAM) for name, frame in sets.items()}
        curves = run.table("curves", lambda: compare_folds(acts, sets, folds, seed))
        matrix = run.table("transfer", lambda: between(acts, folds, seed))
        show(run, sets, curves, matrix)

    return lp.Experiment("Is it truth that is read?", body, seed=seed, inputs=paths)


STREAM = "blocks.*.hook_resid_pre"


def published(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """The data sets of the papers, with the groups that may leak: `group`, and `second`."""
    sets = {path.stem: lp.prompts.read_statements(path) for path in paths}
    for name in ("cities", "neg_cities"):
        sets[name] = sets[name].assign(group=sets[name]["city"], second=sets[name].correct_country)
    words = sets["sp_en_trans"]["text"].str.extract(r"word '(.+?)'")[0]
    sets["sp_en_trans"] = sets["sp_en_trans"].assign(group=words)
    return sets


def ours() -> dict[str, pd.DataFrame]:
    """Our own statements: one topic, its negations, and another topic."""
    cities, elements = (lp.prompts.true_false(topic) for topic in ("capitals", "elements"))
    return {
        "capitals": cities[~cities["negated"]],
        "negated capitals": cities[cities["negated"]],
        "elements": elements[~elements["negated"]],
    }


def compare_folds(
    acts: dict[str, lp.Activations], sets: dict[str, pd.DataFrame], folds: int, seed: int
) -> pd.DataFrame:
    """Held-out scores of every layer, by what the folds keep together."""
    first, _, third = sets
    asked = [(first, "group", None), (first, "nothing", ()), (third, "group", None)]
    if "second" in sets[first]:
        asked.append((first, "second", ()))
    tables = []
    for name, groups, controls in asked:
        with warnings.catch_warnings():
            # Folds at random are here to show what the warning is about.
            warnings.simplefilter("ignore", lp.ProbeWarning)
            found = lp.probe(
                acts[name],
                "label",
                groups=None if groups == "nothing" else groups,
                probe=("logistic", "mass_mean"),
                folds=folds,
                controls=controls,
                seed=seed,
            )
        tables.append(found.assign(data=name, grouped_by=groups))
    return pd.concat(tables, ignore_index=True)


def between(acts: dict[str, lp.Activations], folds: int, seed: int) -> pd.DataFrame:
    """What a probe of one set says on another; no group is trained on and tested."""
    return lp.transfer(
        {name: (some, "label", "group") for name, some in acts.items()}, folds=folds, seed=seed
    )


def show(
    run: lp.Run, sets: dict[str, pd.DataFrame], curves: pd.DataFrame, matrix: pd.DataFrame
) -> None:
    """Put the report together."""
    first, negated, _ = sets
    run.text(
        "Scores are of held-out statements; intervals are 95 %, from drawing groups again. "
        + "; ".join(f"{name}: {len(frame):,} statements" for name, frame in sets.items())
        + "."
    )
    for (name, groups), part in curves.groupby(["data", "grouped_by"], sort=False):
        run.heading(f"{name}, folds that keep together: {groups}")
        run.figure(
            lp.plots.probe(part, metric="accuracy"),
            "Accuracy of a probe at the last token, before each block",
            table=part,
        )
    run.heading("Does it hold elsewhere?")
    auroc = matrix[matrix["metric"] == "auroc"]
    same = auroc[(auroc["train"] == first) & (auroc["test"] == first)]
    layer = int(same.loc[same["value"].idxmax(), "layer"])
    run.figure(
        lp.plots.transfer(matrix, layer=layer),
        f"AUROC before block {layer}, chosen by {first}: rows are what a probe was trained on",
        table=auroc,
    )
    inverted = auroc[(auroc["train"] == first) & (auroc["test"] == negated)]
    worst = inverted.loc[inverted["value"].idxmin()]
    run.note(
        f"{first} → {negated}: AUROC {worst['value']:.3f} [{worst['ci_low']:.3f}, "
        f"{worst['ci_high']:.3f}] before block {worst['layer']}; below 0.5 the probe calls the "
        "negation of what is true true: it reads what goes together, not truth"
    )
