"""`lp.probe`: planted truth is found, nothing is found in noise, and folds do not leak."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import llama_probe as lp
from llama_probe.probing import ProbeWarning, probe
from llama_probe.probing.data import source

COLUMNS = (
    "hook layer at pos target probe kind metric value ci_low ci_high n groups cells note".split()
)
FEW: dict[str, Any] = {"probe": "mass_mean", "controls": ()}


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def row(frame: pd.DataFrame, metric: str, kind: str = "probe", **others: Any) -> pd.Series:
    """The one row that is meant."""
    mask = (frame["metric"] == metric) & (frame["kind"] == kind)
    for name, wanted in others.items():
        mask &= frame[name] == wanted
    assert mask.sum() == 1
    return frame[mask].iloc[0]


def planted(random: np.random.Generator, n: int = 200) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Noise in layer 0, a direction that tells the labels in layer 1."""
    labels = random.integers(2, size=n)
    noise = random.normal(size=(2, n, 20))
    noise[1] += 1.5 * labels[:, None]
    return {f"blocks.{layer}.hook_resid_post": noise[layer] for layer in range(2)}, labels


@pytest.mark.parametrize("kind", ["logistic", "ridge", "mass_mean"])
def test_what_is_planted_is_found_and_noise_is_not(kind: str, random) -> None:
    acts, labels = planted(random)
    frame = probe(acts, labels, probe=kind, controls=["shuffled labels"])
    assert frame.columns.tolist() == COLUMNS
    for metric in ("accuracy", "auroc"):
        found = row(frame, metric, layer=1)
        assert found["value"] >= 0.95 and found["ci_low"] > 0.9
        noise = row(frame, metric, layer=0)
        assert noise["ci_low"] < 0.5 < noise["ci_high"]
        for layer in (0, 1):
            shuffled = row(frame, metric, "shuffled labels", layer=layer)
            assert shuffled["ci_low"] < 0.5 < shuffled["ci_high"]
            assert abs(shuffled["value"] - 0.5) < 0.08


def test_the_columns_say_what_was_done(random) -> None:
    acts, labels = planted(random)
    frame = probe(acts, labels, groups=np.arange(200) // 2, strength=100, controls=())
    found = row(frame, "auroc", layer=1)
    expected = {
        **{"hook": "blocks.1.hook_resid_post", "at": "", "pos": -1, "target": "label"},
        **{"probe": "logistic", "n": 200, "groups": 100, "cells": 2, "note": ""},
    }
    assert {name: found[name] for name in expected} == expected
    assert set(frame[frame["layer"] == 1]["metric"]) == {
        *("accuracy", "balanced_accuracy", "auroc", "average_precision", "ece", "brier"),
        *("recall_at_1pct_fpr", "fpr_at_1pct_threshold"),
    }
    assert frame.attrs == {"folds": 5, "seed": 0, "resamples": 1000, "grouped": True}


def test_scores_are_those_of_scikit_learns_cross_validation(random) -> None:
    acts, labels = planted(random)
    x = acts["blocks.1.hook_resid_post"] * 0.3
    frame = probe(x, labels, strength=10, controls=())
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, x, labels, cv=folds, method="decision_function")
    assert row(frame, "accuracy")["value"] == accuracy_score(labels, scores > 0)
    parts = [roc_auc_score(labels[test], scores[test]) for _, test in folds.split(x, labels)]
    assert row(frame, "auroc")["value"] == pytest.approx(np.mean(parts), abs=1e-9)


def test_pairs_leak_unless_they_are_grouped(random) -> None:
    """Each subject is there once true and once false, as a city in statements of both kinds."""
    subjects = np.repeat(random.normal(size=(100, 300)), 2, axis=0)
    x, labels = subjects + 0.01 * random.normal(size=subjects.shape), np.tile([0, 1], 100)
    loose = row(probe(x, labels, controls=()), "accuracy")
    assert loose["value"] < 0.3 and loose["groups"] == 200
    grouped = row(probe(x, labels, groups=np.arange(200) // 2, controls=()), "accuracy")
    assert grouped["ci_low"] <= 0.5 <= grouped["ci_high"] and grouped["groups"] == 100


def test_copies_leak_unless_they_are_grouped(random) -> None:
    x = np.repeat(random.normal(size=(100, 300)), 2, axis=0)
    labels, groups = np.repeat(np.arange(100) % 2, 2), np.arange(200) // 2
    assert row(probe(x, labels, controls=()), "accuracy")["value"] > 0.7
    grouped = row(probe(x, labels, groups=groups, controls=()), "accuracy")
    assert grouped["value"] < 0.6 and grouped["ci_low"] < 0.5


def test_a_warning_where_texts_share_a_template_and_no_groups_are_given(random) -> None:
    x, labels = random.normal(size=(40, 3)), np.arange(40) % 2
    template = [f"The city of {random.integers(10**6)} is in {random.integers(9)}." for _ in x]
    given = {"controls": (), "probe": "mass_mean"}
    with pytest.warns(ProbeWarning, match="give groups="):
        probe(x, labels, texts=template, **given)
    unrelated = [" ".join(map(str, random.integers(200, size=8))) for _ in x]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(x, labels, texts=template, groups=np.arange(40) // 2, **given)
        probe(x, labels, texts=unrelated, **given)
        probe(x, labels, **given)


def test_the_same_seed_gives_the_same_frame(random) -> None:
    acts, labels = planted(random, 60)
    given: dict[str, Any] = {
        "groups": np.arange(60) // 2,
        "control_by": np.arange(60) % 7,
        "controls": ["shuffled labels", "random direction", "control task", "best cell"],
    }
    first = probe(acts, labels, seed=3, **given)
    pd.testing.assert_frame_equal(first, probe(acts, labels, seed=3, **given), check_exact=True)
    assert not first["value"].equals(probe(acts, labels, seed=4, **given)["value"])


def test_more_than_two_classes(random) -> None:
    labels = random.integers(3, size=240)
    x = random.normal(size=(240, 10)) + 3 * np.eye(10)[labels]
    frame = probe(x, np.array(["a", "b", "c"])[labels], probe=["logistic", "ridge", "mass_mean"])
    for kind in ("logistic", "ridge", "mass_mean"):
        assert row(frame, "accuracy", probe=kind)["value"] > 0.9
        assert row(frame, "auroc", probe=kind)["value"] > 0.95
        assert row(frame, "auroc", "shuffled labels", probe=kind)["value"] < 0.6
    assert "recall_at_1pct_fpr" not in set(frame["metric"])
    assert "two classes" in row(frame, "auroc", "random direction")["note"]


def test_numbers_are_predicted_by_ridge(random) -> None:
    x = random.normal(size=(200, 10))
    numbers = 10 + x @ np.arange(10) + random.normal(size=200)
    frame = probe(x, numbers, probe="ridge", groups=np.arange(200) // 4)
    assert row(frame, "r2")["value"] > 0.95
    assert row(frame, "r2", "shuffled labels")["value"] < 0.1
    assert set(frame["metric"]) == {"r2", "auroc"}
    whole = probe(x, np.round(numbers).astype(int), probe="ridge", controls=())
    assert whole["metric"].tolist() == ["r2"]


def test_several_targets_of_several_kinds(random) -> None:
    acts, labels = planted(random)
    frame = probe(acts, {"planted": labels, "noise": random.permutation(labels)}, **FEW)
    assert row(frame, "auroc", target="planted", layer=1)["value"] > 0.95
    assert row(frame, "auroc", target="noise", layer=1)["value"] < 0.65


def test_arrays_tensors_dicts_and_features_of_several_axes_are_alike(random) -> None:
    x, labels = random.normal(size=(60, 6)) + np.arange(60)[:, None] % 2, np.arange(60) % 2
    expected = probe(x, labels, **FEW)["value"]
    as_bfloat16 = torch.from_numpy(x).bfloat16()
    for same in (x.reshape(60, 2, 3), torch.from_numpy(x), {"any name": x}, {"hook": x[:, None]}):
        assert probe(same, labels, **FEW)["value"].equals(expected)
    rounded = probe(as_bfloat16.float().numpy(), labels, **FEW)["value"]
    assert probe(as_bfloat16, torch.from_numpy(labels), **FEW)["value"].equals(rounded)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[lp.Llama, Path]:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    store = tmp_path_factory.mktemp("store")
    words = "red blue green one two six cat dog".split()
    rows = [
        {"text": f"{word} {other} {last}", "last": last in "onetwosix", "group": word}
        for word in words
        for other in words[::2]
        for last in words[:6]
    ]
    hooks = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post", "blocks.1.attn.hook_z"]
    lp.capture(model, pd.DataFrame(rows), hooks, positions=[-1, 0], store=store, progress=False)
    return model, store


def test_a_store_is_probed_by_the_names_of_columns(captured: tuple[lp.Llama, Path]) -> None:
    frame = probe(captured[1], ["last"], groups="group", **FEW)
    assert (frame["cells"] == 2 * len(lp.Activations.open(captured[1]).hooks)).all()
    last = frame[(frame["at"] == "-1") & (frame["metric"] == "auroc")]
    assert last["value"].max() > 0.95
    first = frame[(frame["at"] == "0") & (frame["metric"] == "auroc")]
    assert (first["value"].between(0.45, 0.55)).all() and (first["pos"] == 0).all()
    some = probe(captured[1], "last", groups="group", hooks="blocks.*.hook_resid_post", **FEW)
    assert set(some["hook"]) < set(frame["hook"]) and (some["target"] == "last").all()


def test_rows_of_a_prompt_stay_together(captured: tuple[lp.Llama, Path]) -> None:
    """Prompts that are all different, labelled at random: every row knows its prompt by heart."""
    random = np.random.default_rng(0)
    texts = [" ".join(map(str, random.integers(1000, size=4))) for _ in range(80)]
    acts = lp.capture(captured[0], texts, "blocks.0.attn.hook_z", positions="all", progress=False)
    frame = probe(acts, np.arange(80) % 2, controls=(), strength=1)
    assert (source(acts).per_row(np.arange(80), "prompts") == acts.index["prompt"]).all()
    found = row(frame, "accuracy")
    assert found["n"] == len(acts) and found["groups"] == 80 and found["pos"] == -1
    assert found["ci_low"] < 0.5 < found["ci_high"]
    by_row = np.arange(len(acts)) % 2
    assert row(probe(acts, by_row, **FEW), "accuracy")["n"] == len(acts)


def verdicts() -> pd.DataFrame:
    """Statements that tiny-moe judged in its exam, grouped by the first subject that they name."""
    truth = lp.prompts.planted()
    subjects = sorted(fact["subject"] for fact in truth["facts"])
    exam = truth["exam"]["verdicts"]
    named = [
        [subject for subject in subjects if re.search(rf"\b{subject}\b", asked["prompt"])]
        for asked in exam
    ]
    return pd.DataFrame(
        {
            "text": [asked["prompt"] for asked in exam],
            "true": [asked["label"] for asked in exam],
            "subject": [found[0] for found in named],
        }
    )


@pytest.mark.slow
def test_the_truth_planted_in_tiny_moe_is_found_and_not_in_its_random_twin() -> None:
    frames = []
    for pretrained in (True, False):
        model = lp.load("tiny-moe", device="cpu", pretrained=pretrained, seed=1, progress=False)
        acts = lp.capture(model, verdicts(), "blocks.*.hook_resid_post", progress=False)
        controls = ["shuffled labels", "best cell", *(["n-grams"] if pretrained else [])]
        frames.append(probe(acts, "true", groups="subject", controls=controls, strength=10))
    trained, twin = frames
    assert row(trained, "accuracy", layer=2)["value"] >= 0.95
    assert row(trained, "accuracy", "best cell, corrected")["ci_low"] > 0.9
    chance = pd.concat([trained, twin]).query(
        "kind in ('shuffled labels', 'n-grams') and metric in ('accuracy', 'auroc')"
    )
    assert len(chance) == 18
    assert (chance["ci_low"] < 0.5).all() and (chance["ci_high"] > 0.5).all()
    assert twin[twin["kind"] == "probe"].query("metric == 'auroc'")["value"].max() < 0.6
    corrected = row(twin, "accuracy", "best cell, corrected")
    assert corrected["ci_low"] < 0.5 < corrected["ci_high"]
