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

# Each set, and what its folds keep together.
SETS = {"cities": "city", "neg_cities": "city", "sp_en_trans": "word"}
OURS = {"capitals": "group", "negated capitals": "group", "elements": "group"}


def truth_probes(
    model: str = "smollm2-135m-instruct", data: str = "", folds: int = 5, seed: int = 0
) -> lp.Experiment:
    """Probe the last token of statements before every block; each run is one model."""
    paths = [Path(data) / f"{name}.csv" for name in SETS] if data else []

    def body(run: lp.Run) -> None:
        sets, groups = (published(paths), SETS) if paths else (ours(), OURS)
        acts = {name: run.capture(name, frame, hooks=STREAM) for name, frame in sets.items()}
        curves = run.table("curves", lambda: compare_folds(acts, groups, folds, seed))
        matrix = run.table("transfer", lambda: between(acts, groups, folds, seed))
        show(run, sets, curves, matrix)

    return lp.Experiment("Is it truth that is read?", body, seed=seed, inputs=paths)


STREAM = "blocks.*.hook_resid_pre"


def published(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """The data sets of the papers; the Spanish word of a translation gets a column."""
    sets = {path.stem: lp.prompts.read_statements(path) for path in paths}
    words = sets["sp_en_trans"]["text"].str.extract(r"word '(.+?)'")[0]
    return sets | {"sp_en_trans": sets["sp_en_trans"].assign(word=words)}


def ours() -> dict[str, pd.DataFrame]:
    """Our own statements: one topic, its negations, and another topic."""
    cities, elements = (lp.prompts.true_false(topic) for topic in ("capitals", "elements"))
    return {
        "capitals": cities[~cities["negated"]],
        "negated capitals": cities[cities["negated"]],
        "elements": elements[~elements["negated"]],
    }


def compare_folds(
    acts: dict[str, lp.Activations], groups: dict[str, str], folds: int, seed: int
) -> pd.DataFrame:
    """Held-out scores of every layer, by what the folds keep together."""
    first, _, third = acts
    asked = [(first, groups[first], None), (first, "nothing", ()), (third, groups[third], None)]
    if "correct_country" in acts[first].prompts:
        asked.append((first, "correct_country", ()))
    tables = []
    for name, together, controls in asked:
        with warnings.catch_warnings():
            # Folds at random are here to show what the warning is about.
            warnings.simplefilter("ignore", lp.ProbeWarning)
            found = lp.probe(
                acts[name],
                "label",
                groups=None if together == "nothing" else together,
                probe=("logistic", "mass_mean"),
                folds=folds,
                controls=controls,
                seed=seed,
            )
        tables.append(found.assign(data=name, together=together))
    return pd.concat(tables, ignore_index=True)


def between(
    acts: dict[str, lp.Activations], groups: dict[str, str], folds: int, seed: int
) -> pd.DataFrame:
    """What a probe of one set says on another; no group is trained on and tested."""
    sets = {name: (some, "label", groups[name]) for name, some in acts.items()}
    return lp.transfer(sets, folds=folds, seed=seed)


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
    for (name, together), part in curves.groupby(["data", "together"], sort=False):
        run.heading(
            f"{name}: folds keep together what has one {together}"
            if together != "nothing"
            else f"{name}: folds at random"
        )
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
    run.note(verdict(first, negated, curves, auroc[auroc["layer"] == layer]))


def verdict(first: str, negated: str, curves: pd.DataFrame, auroc: pd.DataFrame) -> str:
    """What the numbers say, in a sentence."""
    chosen = curves[
        (curves["data"] == first)
        & (curves["kind"] == "best cell, corrected")
        & (curves["metric"] == "auroc")
    ].iloc[0]
    there = auroc[(auroc["train"] == first) & (auroc["test"] == negated)].iloc[0]
    if chosen["ci_low"] <= 0.5:
        meaning = "no layer tells true from false, so nothing follows"
    elif there["ci_high"] < 0.5:
        meaning = "what is read there is what goes together, not what is true"
    else:
        meaning = "what is read there is not turned round by a negation"
    return (
        f"{first}: AUROC {shown(chosen)}, the layer chosen on one half and tested on the other. "
        f"{first} → {negated}, before block {there['layer']}: {shown(there)}: {meaning}."
    )


def shown(row: pd.Series) -> str:
    """A value with its interval."""
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
