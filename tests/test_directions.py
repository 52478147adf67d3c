"""Directions and saved probes: what they point at, how alike they are, and what is on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe.errors import CheckpointError, InputError
from llama_probe.probing import fit
from llama_probe.probing.direction import Direction, contrast_direction, direction_similarity
from llama_probe.probing.linear import LinearProbe


def planted(n: int = 4000, d: int = 5, seed: int = 0) -> tuple[Any, Any, Any]:
    """Two classes that differ along the first axis, with a nuisance along the first two."""
    random = np.random.default_rng(seed)
    y = random.integers(2, size=n)
    x = random.normal(size=(n, d)) + 100
    x[:, :2] += 3 * random.normal(size=(n, 1))
    x[:, 0] += 2 * y
    return x, y, np.eye(d)


def test_a_contrast_is_the_difference_of_means_the_second_less_the_first() -> None:
    x, y, axes = planted()
    found = contrast_direction({"blocks.3.hook_resid_post": x}, y)
    assert torch.allclose(found.vector, torch.from_numpy(x[y == 1].mean(0) - x[y == 0].mean(0)))
    assert (found.hook, found.layer, found.position) == ("blocks.3.hook_resid_post", 3, "")
    assert found.record["n"] == np.bincount(y).tolist()
    assert torch.allclose(found.unit * found.norm, found.vector)
    assert found.unit.norm().item() == pytest.approx(1)
    words = np.where(y == 1, "harmful", "benign")
    assert torch.equal(contrast_direction(x, words).vector, -1 * found.vector * -1)
    assert torch.equal(contrast_direction(x, 1 - y).vector, -found.vector)


def test_means_are_taken_in_double_precision() -> None:
    """In float32 the sum of many activations far from 0 is off by more than the contrast."""
    x = torch.full((200_000, 2), 3000.0)
    x[::2, 0] += 0.001953125  # exact in float32
    labels = np.arange(len(x)) % 2 == 0
    assert contrast_direction(x, labels).vector.tolist() == [0.001953125, 0.0]


def test_captured_activations_at_one_of_several_places() -> None:
    model = lp.load("tiny-moe", device="cpu", progress=False)
    prompts = pd.DataFrame({"text": ["12+30=", "45+11=", "The dog is"], "sum": [True, True, False]})
    acts = lp.capture(
        model, prompts, "blocks.[01].hook_resid_post", positions=[-1, 0], progress=False
    )
    found = contrast_direction(acts, "sum", hook="blocks.1.hook_resid_post", at="-1")
    rows = acts.select(at="-1")["blocks.1.hook_resid_post"].double()
    assert torch.allclose(found.vector, rows[:2].mean(0) - rows[2])
    assert (found.layer, found.position) == (1, "-1")
    assert found.record["model_hash"] == acts.record["model_hash"]
    with pytest.raises(InputError, match="say which with hook="):
        contrast_direction(acts, "sum", at="-1")
    with pytest.raises(InputError, match="say which with at="):
        contrast_direction(acts, "sum", hook="blocks.1.hook_resid_post")


def test_cosines_and_what_whitening_is_for() -> None:
    """A discriminant avoids the nuisance: plainly it is far from the difference of means."""
    x, y, axes = planted()
    within = np.cov(
        np.concatenate([x[y == 0] - x[y == 0].mean(0), x[y == 1] - x[y == 1].mean(0)]).T
    )
    means = contrast_direction(x, y)
    weight = torch.from_numpy(np.linalg.solve(within, means.vector.numpy()))[None]
    discriminant = LinearProbe(weight, torch.zeros(1).double(), "ridge", (0, 1))
    frame = direction_similarity({"means": means, "probe": discriminant}, x)
    assert frame.columns.tolist() == ["a", "b", "cosine", "whitened"]
    row = frame.set_index(["a", "b"]).loc[("means", "probe")]
    expected = torch.nn.functional.cosine_similarity(means.vector, weight[0], dim=0).item()
    assert row["cosine"] == pytest.approx(expected) and expected < 0.8
    assert row["whitened"] > 0.99
    same = frame[frame["a"] == frame["b"]]
    assert np.allclose(same[["cosine", "whitened"]], 1)
    assert direction_similarity({"means": means}).whitened.isna().all()


def test_whitening_does_not_depend_on_the_coordinates() -> None:
    random = np.random.default_rng(1)
    x, y, _ = planted()
    mixing = random.normal(size=(5, 5)) + 3 * np.eye(5)
    seen = []
    for points, change in ((x, np.eye(5)), (x @ mixing.T, mixing)):
        probe = LinearProbe(
            torch.from_numpy(np.linalg.solve(change.T, [1.0, 0, 2, 0, 0]))[None],
            torch.zeros(1).double(),
            "ridge",
            (0, 1),
        )
        both = {"means": contrast_direction(points, y), "probe": probe}
        frame = direction_similarity(both, points)
        seen.append(frame[["cosine", "whitened"]].iloc[1])
    assert seen[0]["whitened"] == pytest.approx(seen[1]["whitened"], abs=0.02)
    assert abs(seen[0]["cosine"] - seen[1]["cosine"]) > 0.1


@pytest.mark.parametrize(
    ("acts", "labels", "options", "says"),
    [
        (np.eye(3), [0, 1, 2], {}, "two classes, but the labels have 3"),
        (np.eye(3), [0, 1], {}, "there are 2 for 3 prompts"),
        (np.eye(3), [0, 1, 1], {"hook": "blocks.0.hook_resid_post"}, "hook is 'blocks.0"),
        ({"a": np.eye(3)}, [0, 1, 1], {"hook": "b"}, "hook is 'b', but there are a"),
        (np.array([[1.0], [np.nan]]), [0, 1], {}, "the array: row 1"),
    ],
)
def test_what_cannot_be_used(acts: Any, labels: Any, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        contrast_direction(acts, labels, **options)


def test_what_cannot_be_compared() -> None:
    d = contrast_direction(np.eye(3), [0, 1, 1])
    other = contrast_direction(np.eye(3)[:, :2], [0, 1, 1])
    zero = Direction(torch.zeros(3).double(), "", -1, "", {})
    many = LinearProbe(torch.eye(3).double(), torch.zeros(3).double(), "ridge", (0, 1, 2))
    for directions, says in (
        ({"a": d, "b": other}, "one size are needed"),
        ({"a": d, "zero": zero}, "'zero' is 0"),
        ({"a": d, "many": many}, "'many' has 3 rows"),
        ({}, "there are no directions"),
    ):
        with pytest.raises(InputError, match=says):
            direction_similarity(directions)
    with pytest.raises(InputError, match="have 2 dimensions"):
        direction_similarity({"a": d}, np.eye(2))
    with pytest.raises(InputError, match="3 activations in 3 dimensions cannot be inverted"):
        direction_similarity({"a": d}, np.ones((3, 3)))


def test_directions_on_disk(tmp_path: Path) -> None:
    x, y, _ = planted(n=50)
    found = contrast_direction({"blocks.3.hook_resid_post": x}, y)
    back = Direction.load(found.save(tmp_path / "direction"))
    assert torch.equal(back.vector, found.vector) and back.record == found.record
    assert repr(back) == repr(found)
    with pytest.raises(CheckpointError, match="holds a Direction, not a LinearProbe"):
        LinearProbe.load(tmp_path / "direction")
    record = tmp_path / "direction" / "record.json"
    for changes, says in (({"layer": "3"}, "its layer"), ({"hook": None}, "its hook")):
        whole = record.read_text()
        record.write_text(json.dumps({**json.loads(whole), **changes}))
        with pytest.raises(CheckpointError, match=says):
            Direction.load(tmp_path / "direction")
        record.write_text(whole)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("logistic", np.array(["no", "yes"] * 20)),
        ("mass_mean", np.arange(40) % 3),
        ("ridge", np.linspace(0, 1, 40)),
        ("logistic", np.arange(40) % 2 == 0),
    ],
    ids=["texts", "three classes", "numbers", "bools"],
)
def test_probes_on_disk(kind: str, labels: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 4))
    probe = fit(kind, x, labels, strength=None if kind == "mass_mean" else 1.0)
    back = LinearProbe.load(probe.save(tmp_path / "probe"))
    assert (back.kind, back.classes) == (probe.kind, probe.classes)
    assert back.classes is None or [type(one) for one in back.classes] == [
        type(one) for one in probe.classes or ()
    ]
    assert torch.equal(back(torch.from_numpy(x)), probe(torch.from_numpy(x)))


def test_probes_that_do_not_fit_together(tmp_path: Path) -> None:
    for weight, bias, classes in (
        (torch.zeros(1, 3), torch.zeros(1), (0, 1)),  # not float64
        (torch.zeros(2, 3).double(), torch.zeros(2).double(), (0, 1)),
        (torch.zeros(1, 3).double(), torch.zeros(1).double(), (0, 1, 2)),
        (torch.full((1, 3), torch.nan).double(), torch.zeros(1).double(), (0, 1)),
    ):
        LinearProbe(weight, bias, "ridge", classes).save(tmp_path / "probe")
        with pytest.raises(CheckpointError, match="no weights and classes"):
            LinearProbe.load(tmp_path / "probe")
    probe = LinearProbe(torch.zeros(1, 3).double(), torch.zeros(1).double(), "ridge", (None, 1))
    with pytest.raises(InputError, match="texts, numbers or bools"):
        probe.save(tmp_path / "probe")
