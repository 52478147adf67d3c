"""Transfer between data sets: planted signs and leaks, and the negations of real facts."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.probing import ProbeWarning
from llama_probe.probing.transfer import transfer

COLUMNS = "train test hook layer at probe metric value ci_low ci_high n groups note".split()
HOOK = "blocks.3.hook_resid_post"


def planted(n: int = 200, d: int = 6, sign: int = 1, seed: int = 0) -> tuple[Any, Any, Any]:
    """Two samples a group, one of each class, which differ along the first axis."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n // 2), 2)
    y = np.tile([0, 1], n // 2)
    x = random.normal(size=(n, d)) + 2
    x[:, 0] += 3 * sign * (2 * y - 1)
    return x, y, groups


def auroc(frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    some = frame[frame["metric"] == "auroc"]
    return dict(zip(zip(some["train"], some["test"], strict=True), some["value"], strict=True))


def test_signs_and_columns() -> None:
    x, y, groups = planted()
    other, its, _ = planted(sign=-1, seed=1)
    frame = transfer(
        {"here": ({HOOK: x}, y, groups), "against": ({HOOK: other}, its, groups + 1000)}
    )
    assert frame.columns.tolist() == COLUMNS
    found = auroc(frame)
    assert found["here", "here"] > 0.95 and found["against", "against"] > 0.95
    assert found["here", "against"] < 0.05 and found["against", "here"] < 0.05
    assert set(frame["layer"]) == {3} and set(frame["n"]) == {200} and set(frame["groups"]) == {100}
    assert (frame["ci_low"] <= frame["value"]).all() and (frame["value"] <= frame["ci_high"]).all()
    away = frame[frame["train"] != frame["test"]]
    assert set(away["note"]) == {""}
    assert set(frame["note"]) - {""} == {"100 of 100 groups are trained on too, and held out"}


def test_what_is_learnt_on_one_set_need_not_be_there_on_the_other() -> None:
    """A shortcut that only one set has is what its probe takes, not that of the other."""
    random = np.random.default_rng(0)
    y = np.arange(400) % 2
    both = random.normal(size=(400, 2)) + y[:, None] * [2, 8]
    one = random.normal(size=(400, 2)) * [1, 8] + y[:, None] * [2, 0]
    frame = transfer({"both": (both, y), "one": (one, y)}, probe="mass_mean")
    assert set(frame["note"][frame["train"] != frame["test"]]) == {""}  # no sample is in both
    found = auroc(frame)
    assert found["both", "one"] < 0.7 and found["one", "both"] > 0.95


def leaky(seed: int) -> tuple[Any, Any, Any]:
    """Nothing but the group tells the label: a probe that saw the group knows it."""
    random = np.random.default_rng(0)
    codes = random.normal(size=(60, 120))  # of the groups, the same in every set
    y = random.integers(2, size=60)
    noise = np.random.default_rng(seed).normal(size=(60, 120))
    return codes + 0.01 * noise, y, np.array([f"group {i}" for i in range(60)])


def test_no_probe_scores_a_group_that_it_saw() -> None:
    frame = transfer({"one": leaky(1), "two": leaky(2)}, metrics=["auroc"], strength=1.0)
    assert all(abs(value - 0.5) < 0.2 for value in auroc(frame).values())
    x, y, groups = leaky(2)
    apart = {"one": leaky(1), "two": (x, y, [f"other {name}" for name in groups])}
    leaks = auroc(transfer(apart, metrics=["auroc"], strength=1.0))
    assert leaks["one", "two"] > 0.95  # told that they share no groups, it leaks


def test_the_diagonal_is_the_score_of_lp_probe() -> None:
    x, y, groups = planted(n=80)
    x[:, 0] /= 4
    frame = transfer({"one": (x, y, groups)}, metrics=["auroc", "accuracy", "ece"], seed=3)
    alone = lp.probe(x, y, groups=groups, controls=(), seed=3, progress=False)
    both = frame.merge(alone, on="metric", suffixes=("", "_alone"))
    assert len(both) == 3
    for column in ("value", "ci_low", "ci_high", "n", "groups"):
        assert np.allclose(both[column], both[f"{column}_alone"])


def test_sets_that_overlap_in_part() -> None:
    """Groups of the other set that were never trained on are scored too, once each."""
    x, y, groups = planted()
    other, its, theirs = planted(n=100, seed=1)
    frame = transfer({"one": (x, y, groups), "two": (other, its, theirs + 80)}, metrics=["auroc"])
    row = frame[(frame["train"] == "one") & (frame["test"] == "two")].iloc[0]
    assert (row["n"], row["groups"], row["value"] > 0.95) == (100, 50, True)
    assert row["note"] == "20 of 50 groups are trained on too, and held out"


def test_captured_sets_without_groups_are_held_apart_by_text() -> None:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    exam = lp.prompts.planted()["exam"]
    sums = [one["prompt"] for one in exam["arithmetic"]]
    facts = [one["prompt"] for one in exam["facts"]]
    hooks = "blocks.[01].hook_resid_post"
    acts = [
        lp.capture(model, sums[some] + facts[some], hooks, progress=False)
        for some in (slice(0, 40), slice(20, 60))
    ]
    labels = ["sum"] * 40 + ["fact"] * 40
    frame = transfer({"one": (acts[0], labels), "two": (acts[1], labels)}, probe="mass_mean")
    assert set(frame["hook"]) == set(acts[0].hooks) and set(frame["at"]) == {"-1"}
    assert min(auroc(frame[frame["layer"] == 1]).values()) > 0.95
    note = frame["note"][frame["train"] != frame["test"]].iloc[0]
    assert note.startswith("40 of 80 groups")


def test_prompts_of_one_template_without_groups_are_warned_of() -> None:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    names = ["France", "Spain", "Italy", "Japan", "Peru", "Cuba"]
    texts = [f"The capital of {name} is" for name in names]
    acts = lp.capture(model, texts, "blocks.0.hook_resid_post", progress=False)
    with pytest.warns(ProbeWarning, match="one: its prompts share templates"):
        transfer({"one": (acts, [0, 1] * 3)}, probe="mass_mean", folds=2)


def test_numbers() -> None:
    x, _, groups = planted(n=120)
    frame = transfer(
        {"one": (x[:80], x[:80, 0], groups[:80]), "two": (x[80:], -x[80:, 0], groups[80:])},
        probe="ridge",
    )
    value = dict(zip(zip(frame["train"], frame["test"], strict=True), frame["value"], strict=True))
    assert set(frame["metric"]) == {"r2"}
    assert value["one", "one"] > 0.95 and value["one", "two"] < 0


X, Y, GROUPS = planted(n=40)
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "there are no data sets"),
    ({"a": (X,)}, {}, r"a: give \(activations, labels\)"),
    ({"a": (X, Y[:3])}, {}, "a: labels: there are 3 for 40 prompts"),
    ({"a": (X, Y), "b": ({"x": X}, Y)}, {}, "a and b differ in their hooks"),
    ({"a": (X, Y), "b": (X[:, :2], Y)}, {}, "differ in size"),
    ({"a": (X, Y), "b": (X, np.where(Y == 1, 2, 0))}, {}, "a has no label 2"),
    ({"a": (X, Y)}, {"metrics": ["aurok"]}, "did you mean 'auroc'"),
    ({"a": (X, Y)}, {"metrics": ["recall_at_1pct_fpr"]}, "there are accuracy"),
    ({"a": (X, Y)}, {"probe": "forest"}, "probe is 'forest'"),
    ({"a": (X, X[:, 0])}, {}, "needs classes"),
    ({"a": (np.where(X == X.max(), np.nan, X), Y)}, {}, "a: .* NaN"),
    ({"a": (X, Y, [None] + [1] * 39)}, {}, "a group is missing"),
]


@pytest.mark.parametrize(("sets", "options", "says"), BAD, ids=[says for *_, says in BAD])
def test_what_cannot_be_used(sets: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        transfer(sets, **options)


@pytest.mark.slow
def test_a_probe_of_truth_reads_negations_the_wrong_way_round(
    smollm2: lp.Llama, shared: Path
) -> None:
    """What cities teach at layer 13 is that city and country go together, not that it is true."""
    sets = {}
    for name in ("cities", "neg_cities"):
        rows = pd.read_csv(shared / "data" / "truth" / f"{name}.csv")
        rows = rows[rows["city"].isin(rows["city"].unique()[:240])]
        acts = lp.capture(
            smollm2, rows, "blocks.13.hook_resid_pre", text="statement", progress=False
        )
        sets[name] = (acts, "label", "city")
    found = auroc(transfer(sets, strength=100.0, metrics=["auroc"]))
    assert found["cities", "cities"] > 0.8
    assert found["cities", "neg_cities"] <= 0.15
