"""What `lp.probe` cannot use is refused in one sentence, before anything is fitted."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import llama_probe as lp
from llama_probe.errors import CheckpointError, HookNameError, InputError
from llama_probe.probing import probe
from llama_probe.probing.templates import share_templates

N = 20
LABELS = np.arange(N) % 2
X = np.random.default_rng(0).normal(size=(N, 3))


@pytest.fixture(scope="module")
def acts() -> Any:
    """Two positions of twenty prompts; the index has forty rows."""
    model = lp.load("tiny-moe", device="cpu", progress=False)
    prompts = pd.DataFrame({"text": [f"{i} and {i * i}" for i in range(N)], "even": LABELS == 0})
    return lp.capture(model, prompts, "blocks.*.hook_resid_post", positions=[-1, 0], progress=False)


def refused(sentence: str, *args: Any, **given: Any) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        probe(*args, **{"controls": (), "progress": False, **given})
    assert str(error.value).count("\n") == 0


def test_labels() -> None:
    refused("labels: there are 19 for 20 prompts of activations", X, LABELS[:19])
    refused("labels 'b': there are 3 for 20", X, {"a": LABELS, "b": LABELS[:3]})
    refused("label: all 20 labels are 1", X, np.ones(N, int))
    refused(
        "a: labels are missing, 1 of 20, first at 4",
        X,
        {"a": np.where(np.arange(N) == 4, None, 1)},
    )
    refused("labels are empty", X, {})
    refused("label: a logistic probe needs classes, but the labels are numbers", X, X[:, 0])
    refused("needs classes", X, X[:, 0], probe=["ridge", "mass_mean"])
    refused("are to be numbers, but the first is 'a'", X, ["a", "b"] * 10, task="number")
    refused("task is 'regression'", X, LABELS, task="regression")


def test_names_of_columns(acts: Any) -> None:
    refused("no column 'evn'; did you mean 'even'; they have text, ", acts, "evn")
    refused("no column 'evn'", acts, ["even", "evn"])
    refused("groups: the prompts have no column 'group'", acts, "even", groups="group")
    refused("control_by: the prompts have no column", acts, "even", control_by="tpye")
    refused("no column 'label'; they have none", X, "label")
    with pytest.raises(HookNameError, match="did you mean 'blocks.1.hook_resid_post'"):
        probe(acts, "even", hooks="blocks.1.hook_resid_pots")
    with pytest.raises(HookNameError, match="did you mean 'layer 1'"):
        probe({"layer 1": X}, LABELS, hooks="layer1")


def test_groups(acts: Any) -> None:
    refused("groups: there are 3 for 20", X, LABELS, groups=[1, 2, 3])
    refused("group 2 is missing", X, LABELS, groups=[0, 1, None, *range(17)])
    refused("prompt 0 are in several groups", acts, "even", groups=np.arange(2 * N))


def test_folds() -> None:
    refused("folds is 1", X, LABELS, folds=1)
    refused(
        "5 folds need 5 groups with the label 0, .* only 4", X, LABELS, groups=np.arange(N) // 2 % 4
    )
    refused("5 folds need 5 samples with the label True, .* only 3", X, np.arange(N) > 16)
    big = np.repeat([0, 1, 2, 3], [14, 2, 2, 2])
    labels = np.repeat([0, 1, 0], [1, 13, 6])
    labels[[14, 16]] = 1
    refused("label: fold . of 3 has no sample of", X, labels, groups=big, folds=3)
    refused("to choose a strength in the training part of fold 1", X[:4], LABELS[:4], folds=2)


def test_four_samples_are_enough_where_no_strength_is_chosen() -> None:
    for given in ({"probe": "mass_mean"}, {"strength": 1}):
        assert len(probe(X[:4], LABELS[:4], folds=2, controls=(), **given))


def test_activations(acts: Any, tmp_path: Path) -> None:
    bad = X.copy()
    bad[[3, 7], 1] = np.nan, np.inf
    refused(
        r"b: .* NaN or infinite in 2 of 20 rows \(2 numbers\), first in row 3 \(prompt 3",
        {"a": X, "b": bad},
        LABELS,
    )
    refused(
        r"the array: .* row 3 \(prompt 3: 'a text'\)",
        bad,
        LABELS,
        texts=["a text"] * N,
        groups=range(N),
    )
    refused(r"\[n d\] .* but are float64 of shape \[20\]", X[:, 0], LABELS)
    refused("a: activations should be numbers", {"a": np.full((N, 2), "x")}, LABELS)
    refused("the dict is empty", {}, LABELS)
    refused("have {'a': 20, 'b': 19}", {"a": X, "b": X[1:]}, LABELS)
    with pytest.raises(CheckpointError):
        probe(tmp_path / "no store", LABELS)


def test_nan_in_captured_activations_is_located(acts: Any) -> None:
    rows = acts.index.query("at == '0' and prompt == 5").index
    values = acts._source.tensors["blocks.1.hook_resid_post"]
    kept = values[rows].clone()
    values[rows] = np.nan
    try:
        refused(
            rf"blocks.1.hook_resid_post: .* in 1 of 20 rows .* {rows[0]} \(prompt 5: '5 and 25'\)",
            acts,
            "even",
        )
    finally:
        values[rows] = kept


def test_probes_and_controls() -> None:
    refused("probe is 'ridgid', but .*did you mean 'ridge'", X, LABELS, probe="ridgid")
    refused("probe is empty", X, LABELS, probe=[])
    refused("no control 'shuffled'", X, LABELS, controls=["shuffled"])
    refused("'n-grams' needs the texts", X, LABELS, controls="n-grams")
    refused("'n-grams' needs the texts", X, LABELS, controls="all")
    refused("there are 2 texts for 20 prompts", X, LABELS, texts=["a", "b"])
    refused("strength is 0", X, LABELS, strength=0)
    refused("repeats is 0", X, LABELS, repeats=0)


def test_nothing_is_fitted_before_everything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_probe.probing import cells

    def never(*_: Any) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr(cells, "held_out", never)
    bad = np.where(np.arange(N)[:, None] == N - 1, np.nan, X)
    refused("NaN", {"good": X, "bad": bad}, LABELS)


def test_templates() -> None:
    cities = [
        f"The city of {a} is in {b}." for a in ("Lyon", "Bonn", "New York") for b in ("X", "Y")
    ]
    unrelated = [
        "It rained all night, and by morning the road was gone.",
        "She sold her bicycle to a friend of the family.",
        "Photosynthesis turns light into sugar.",
        "The committee will meet again in the spring.",
        "Nobody remembers who wrote the song.",
        "A kettle whistled in the kitchen of the old house.",
    ]
    assert share_templates(cities)
    assert not share_templates(unrelated)
    # More than half must: three of nine do not, six of nine do.
    assert not share_templates([*unrelated, *cities[:3]])
    assert share_templates([*unrelated[:3], *cities])
    assert not share_templates([]) and not share_templates(["Alone."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert share_templates(["", "?"])


def test_templates_of_public_sets(shared: Path) -> None:
    for name in ("cities", "neg_cities", "sp_en_trans", "neg_sp_en_trans"):
        texts = pd.read_csv(shared / "data" / "truth" / f"{name}.csv")["statement"]
        assert share_templates(texts.tolist())
