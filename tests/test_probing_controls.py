"""What a score is held against: shuffles, control tasks, directions, texts, a choice of cells."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

import llama_probe as lp
from llama_probe.probing import probe
from llama_probe.probing.cells import measured
from llama_probe.probing.controls import control_labels, shuffled, why_no_control
from llama_probe.probing.design import Samples, halves
from llama_probe.probing.folds import Split, grouped_folds
from llama_probe.probing.labels import Labels
from llama_probe.probing.selection import trials


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def value(frame: pd.DataFrame, kind: str, metric: str) -> float:
    return frame[(frame["kind"] == kind) & (frame["metric"] == metric)]["value"].item()


def samples_of(labels: np.ndarray, unit: np.ndarray) -> Samples:
    return Samples(Labels(labels, (0, 1)), unit)


def test_shuffles_keep_what_groups_have_in_common() -> None:
    unit = np.repeat(np.arange(40), 3)
    whole = samples_of(np.repeat(np.arange(40) % 2, 3), unit)
    splits = grouped_folds(whole.labels, unit, 4, seed=0)
    for labels in shuffled(whole, splits, 5, seed=0):
        by_group = labels.values.reshape(40, 3)
        assert (by_group == by_group[:, :1]).all() and by_group.sum() == 60
        assert 5 < (by_group[:, 0] != np.arange(40) % 2).sum() < 35
    pairs = samples_of(np.tile([0, 1], 60), np.repeat(np.arange(60), 2))
    splits = grouped_folds(pairs.labels, pairs.unit, 4, seed=0)
    first = shuffled(pairs, splits, 1, seed=0)[0].values.reshape(60, 2)
    assert (first.sum(axis=1) == 1).all() and 15 < first[:, 0].sum() < 45


def test_a_group_takes_labels_of_a_group_of_another_size() -> None:
    unit = np.repeat(np.arange(20), np.arange(1, 21))
    constant = samples_of((unit % 2), unit)
    splits = grouped_folds(constant.labels, unit, 3, seed=0)
    for labels in shuffled(constant, splits, 5, seed=0):
        found = pd.Series(labels.values).groupby(unit).agg(["min", "max"])
        assert (found["min"] == found["max"]).all()


def test_control_labels_belong_to_a_type(random) -> None:
    types = random.integers(30, size=300)
    samples = samples_of((random.random(300) < 0.3).astype(int), np.arange(300))
    splits = grouped_folds(samples.labels, None, 5, seed=0)
    drawn = control_labels(samples, types, splits, 20, seed=0)
    for labels in drawn:
        assert (pd.Series(labels.values).groupby(types).nunique() == 1).all()
    assert np.mean([labels.values.mean() for labels in drawn]) == pytest.approx(0.3, abs=0.06)


def test_a_control_task_is_learnt_where_types_recur(random) -> None:
    """One-hot types: a probe can give each any label, so that its real labels show nothing."""
    types = random.integers(10, size=300)
    x = np.eye(10)[types] + 0.01 * random.normal(size=(300, 10))
    frame = probe(x, types < 5, controls=["control task"], control_by=types)
    assert value(frame, "probe", "accuracy") == 1
    assert value(frame, "control task", "accuracy") > 0.95
    assert abs(value(frame, "control task", "selectivity")) < 0.05


def test_a_direction_is_selective_where_types_are_not_told_apart(random) -> None:
    labels, types = np.arange(300) % 2, random.integers(30, size=300)
    x = random.normal(size=(300, 5)) + 3 * labels[:, None]
    frame = probe(x, labels, controls=["control task"], control_by=types)
    gap = value(frame, "probe", "accuracy") - value(frame, "control task", "accuracy")
    assert value(frame, "control task", "selectivity") == pytest.approx(gap)
    assert gap > 0.3


def test_selectivity_does_not_apply_where_types_are_held_out(random) -> None:
    x, labels = random.normal(size=(60, 4)), np.arange(60) % 2
    types = np.arange(60) // 6
    given: dict[str, Any] = {"controls": ["control task"], "probe": "mass_mean"}
    frames = {
        "hold types of input out, 0%": probe(x, labels, groups=types, control_by=types, **given),
        "occurs once": probe(x, labels, control_by=np.arange(60), **given),
        "one type": probe(x, labels, control_by=np.zeros(60), **given),
        "give control_by": probe(x, labels, **given),
    }
    for why, frame in frames.items():
        found = frame[frame["kind"] == "control task"]
        assert found["metric"].tolist() == ["accuracy", "selectivity"]
        assert found["value"].isna().all() and found["note"].str.contains(why).all()
    assert why_no_control(types, grouped_folds(Labels(labels, (0, 1)), None, 5, 0)) == ""


def test_random_directions_are_above_chance_by_chance_alone(random) -> None:
    """|a - 1/2| of noise: AUROC of n against n has a standard error of about sqrt(1 / 6n)."""
    labels = np.arange(400) % 2
    noise = probe(random.normal(size=(400, 300)), labels, controls=["random direction"], strength=1)
    error = np.sqrt(1 / 6 / 200)
    found = [value(noise, "random direction", name) for name in ("auroc", "auroc_p95")]
    assert found == pytest.approx([0.5 + 0.8 * error, 0.5 + 1.96 * error], abs=0.008)
    told = random.normal(size=(400, 300)) + labels[:, None]
    directed = probe(told, labels, controls=["random direction"], strength=1)
    assert value(directed, "random direction", "auroc") > found[1]


def test_texts_alone(random) -> None:
    """One word gives the label away in two of three texts; length says nothing."""
    labels = np.arange(150) % 2
    words = random.integers(50, size=(150, 6))
    given_away = np.where(labels & (random.random(150) < 2 / 3), "indeed", "though")
    texts = [" ".join([*map(str, w), g]) for w, g in zip(words, given_away, strict=True)]
    x, pairs = random.normal(size=(150, 3)), np.arange(150) // 2
    frame = probe(
        {"one hook": x, "another": x},
        labels,
        probe="mass_mean",
        groups=pairs,
        controls=["n-grams", "length"],
        texts=texts,
    )
    assert 0.75 < value(frame, "n-grams", "accuracy") < 0.95
    assert value(frame, "n-grams", "auroc") > 0.7
    assert 0.3 < value(frame, "length", "accuracy") < 0.7
    longer = [text + label * " and so on" for text, label in zip(texts, labels, strict=True)]
    told = probe(x, labels, groups=pairs, controls="length", texts=longer, strength=1)
    assert value(told, "length", "accuracy") > 0.95
    found = frame[frame["kind"] == "n-grams"]
    assert (found["hook"] == "").all() and (found["layer"] == -1).all() and len(found) == 8


def test_text_baselines_leak_on_random_folds_as_probes_do() -> None:
    """Each of 60 names is in a true and a false statement; no other word tells them apart."""
    texts = [f"{place} is a place" for place in range(10, 70) for _ in range(2)]
    labels = np.tile([0, 1], 60)
    x = np.random.default_rng(0).normal(size=(120, 2))
    given: dict[str, Any] = {"texts": texts, "controls": ["n-grams"], "probe": "mass_mean"}
    with pytest.warns(UserWarning, match="share"):
        loose = probe(x, labels, **given)
    grouped = probe(x, labels, groups=np.arange(120) // 2, **given)
    assert value(loose, "n-grams", "accuracy") < 0.4
    assert 0.4 < value(grouped, "n-grams", "accuracy") < 0.6


def test_numbers_have_baselines_too(random) -> None:
    texts = ["very " * int(n) + "good" for n in random.integers(6, size=100)]
    numbers = np.array([len(text) / 5 for text in texts])
    x = random.normal(size=(100, 3))
    frame = probe(
        x, numbers, probe="ridge", texts=texts, controls=["n-grams", "length"], groups=range(100)
    )
    assert value(frame, "n-grams", "r2") > 0.95 and value(frame, "length", "r2") > 0.95


def test_the_best_of_noise_is_at_chance_once_it_is_chosen_elsewhere(random) -> None:
    labels = np.repeat([0, 1], 50)
    noise = {f"cell {i}": random.normal(size=(100, 5)) for i in range(200)}
    given: dict[str, Any] = {"probe": "mass_mean", "controls": ["best cell"]}
    frame = probe(noise, labels, **given)
    assert (frame["cells"] == 200).all()
    for metric in ("accuracy", "auroc"):
        rows = frame[frame["metric"] == metric].set_index("kind")
        naive, corrected = rows.loc["best cell"], rows.loc["best cell, corrected"]
        assert naive["value"] == rows.loc["probe", "value"].max() > 0.62
        assert naive["ci_low"] > 0.5
        assert corrected["ci_low"] < 0.5 < corrected["ci_high"]
        assert corrected["value"] < 0.58 and "on the other" in corrected["note"]
        assert corrected["n"] == corrected["groups"] == 100


def test_each_half_is_tested_on_the_other(random) -> None:
    x, labels = random.normal(size=(60, 3)), np.arange(60) % 2
    samples = samples_of(labels, np.arange(60) // 2)
    parts = halves(samples, np.arange(60), 0, "label")
    for part, trial in zip(parts, trials("ridge", x, samples, parts, None), strict=True):
        trained, tested = (set(samples.unit[rows]) for rows in part.split)
        assert set(trial.tested.unit) == tested and not trained & tested
        assert len(trial.tested) == 30 and set(trial.merit) == {"accuracy", "auroc"}


def test_what_is_planted_survives_the_correction(random) -> None:
    labels = np.repeat([0, 1], 50)
    acts = {f"cell {i}": random.normal(size=(100, 5)) for i in range(20)}
    acts["cell 7"] += 1.2 * labels[:, None]
    frame = probe(acts, labels, probe=["mass_mean", "ridge"], controls=["best cell"])
    corrected = frame[frame["kind"] == "best cell, corrected"]
    assert (corrected["value"] > 0.8).all() and (corrected["ci_low"] > 0.7).all()
    assert corrected["note"].str.count("cell 7").tolist() == [2, 2]


def test_what_cannot_be_is_said_and_costs_nothing_else(random) -> None:
    """Two groups a class: enough for two folds, not to divide one of them again."""
    groups = np.repeat(np.arange(4), 3)
    frame = probe(
        {"a": random.normal(size=(12, 2)), "b": random.normal(size=(12, 2))},
        groups % 2,
        groups=groups,
        folds=2,
        probe="mass_mean",
        controls=["n-grams", "length", "best cell"],
        texts=["a text"] * 12,
    )
    assert frame[frame["kind"] == "probe"]["metric"].nunique() == 6
    for kind in ("n-grams", "length", "best cell, corrected"):
        found = frame[frame["kind"] == kind]
        assert found["metric"].tolist() == ["accuracy", "auroc"] and found["value"].isna().all()
        assert found["note"].str.startswith("not applicable: label, to choose").all()


def test_labels_that_cannot_be_shuffled_are_said_to_be() -> None:
    """Of five samples one has the second label, and no shuffle puts it into both folds."""
    samples = samples_of(np.array([0, 0, 0, 0, 1]), np.arange(5))
    splits = [Split(np.arange(3), np.arange(3, 5)), Split(np.arange(3, 5), np.arange(3))]
    assert shuffled(samples, splits, 5, seed=0) == []
    assert control_labels(samples, np.zeros(5, int), splits, 5, seed=0) == []
    found = measured("ridge", "shuffled labels", [], ["auroc"], 0)[0]
    assert np.isnan(found.interval.value) and found.note.startswith("not applicable")


def test_texts_say_nothing_of_labels_within_a_prompt(random) -> None:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    texts = [" ".join(map(str, random.integers(1000, size=3))) for _ in range(12)]
    acts = lp.capture(model, texts, "hook_embed", positions="all", progress=False)
    by_token = acts.index["pos"].to_numpy() % 2
    frame = probe(acts, by_token, probe="mass_mean", folds=3, controls=["n-grams", "control task"])
    found = frame[frame["kind"] == "n-grams"]
    assert found["note"].str.contains("rows of prompt 0 have different labels").all()
    # Digits recur in other prompts, so that the control task means something.
    assert frame[frame["kind"] == "control task"]["value"].notna().all()
