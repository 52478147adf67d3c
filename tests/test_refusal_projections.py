"""Where requests lie: each axis is read at its token, and fitted means are at -1 and +1."""

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.probing import Direction
from llama_probe.refusal.asking import ask
from llama_probe.refusal.candidates import find_candidates, template_positions
from llama_probe.refusal.guard import Guard
from llama_probe.refusal.projections import (
    axis_of,
    candidate_projections,
    projection_axes,
    projections,
)
from llama_probe.refusal.study import RefusalStudy

LAYER = 2
HOOK = f"blocks.{LAYER}.hook_resid_pre"


@pytest.fixture(scope="module")
def model():
    return lp.load("tiny-moe", progress=False)


@pytest.fixture(scope="module")
def asked(model):
    exam = lp.prompts.planted()["exam"]
    sets = {"restricted": exam["restricted"], "harmless": exam["same verb"]}
    texts = {name: [row["chat"] for row in rows[:24]] for name, rows in sets.items()}
    return {name: ask(model, of) for name, of in texts.items()}


def part(asked, rows):
    return {name: of[rows] for name, of in asked.items()}


@pytest.fixture(scope="module")
def study(model, asked):
    fit = part(asked, range(12))
    means = find_candidates(model, *fit.values(), template_positions(fit["restricted"]))
    guard = Guard(True, "It refuses.", pd.DataFrame())
    direction = means.direction(-1, LAYER)
    return RefusalStudy(direction, "", guard, means=means, asked={"fit": fit})


def stream(model, text, token):
    """What the stream is at a token from the end, asked one by one."""
    tokens = ask(model, [text]).encoded[0].ids
    _, cache = model.run_with_cache(torch.tensor([tokens]), names_filter=HOOK)
    return cache[HOOK][0, token].double().numpy()


def test_means_of_the_fit_are_at_the_ends_of_both_axes(model, asked, study):
    frame = projections(model, study.asked["fit"], study)
    means = frame.groupby("set")[["harmfulness", "refusal"]].mean()
    np.testing.assert_allclose(means.loc["restricted"], 1, atol=1e-5)
    np.testing.assert_allclose(means.loc["harmless"], -1, atol=1e-5)
    assert frame.columns.tolist() == ["set", "request", "prompt", "harmfulness", "refusal"]


def test_each_axis_is_read_at_its_own_token(model, asked, study):
    """By hand for one other request: projections on unit vectors, centred and scaled."""
    frame = projections(model, part(asked, [20]), study)
    tail = -study.means.positions[0]
    text = asked["restricted"].texts[20]
    fit = study.asked["fit"]
    unit = study.vector.numpy() / np.linalg.norm(study.vector)
    for name, token in (("harmfulness", -1 - tail), ("refusal", -1)):
        ends = [
            np.mean([stream(model, one, token) for one in fit[part].texts], axis=0)
            for part in ("restricted", "harmless")
        ]
        along = unit if name == "refusal" else ends[0] - ends[1]
        along = along / np.linalg.norm(along)
        one, other = (end @ along for end in ends)
        expected = (stream(model, text, token) @ along - (one + other) / 2) / ((one - other) / 2)
        assert frame[name][0] == pytest.approx(expected, abs=1e-4)


def test_other_requests_lie_on_their_side(model, asked, study):
    frame = projections(model, part(asked, range(12, 24)), study)
    restricted = frame["set"] == "restricted"
    assert ((frame["refusal"] > 0) == restricted).mean() > 0.95


def test_nothing_lies_along_a_direction_that_the_sets_do_not_differ_by(model, study):
    drawn = torch.randn(len(study.vector), generator=torch.Generator().manual_seed(0)).double()
    fit = study.asked["fit"]
    same = Direction(drawn, HOOK, LAYER, "-1", {})
    with pytest.raises(
        InputError, match="last of the instruction: restricted and harmless requests have the same"
    ):
        projection_axes(model, same, fit["restricted"], fit["restricted"])


def test_every_candidate_is_read_at_its_own_place(model, asked, study):
    fit = study.asked["fit"]
    frame = candidate_projections(model, fit, study.means)
    assert len(frame) == 24 * len(study.means.positions) * model.cfg.n_layers
    means = frame.groupby(["layer", "position", "set"])["refusal"].mean().unstack()
    assert means.loc[0].isna().all().all()  # the template's tokens are the same for all
    np.testing.assert_allclose(means.loc[1:, "restricted"], 1, atol=1e-5)
    here = frame[(frame.layer == LAYER) & (frame.position == -1)]
    both = projections(model, fit, study)
    np.testing.assert_allclose(here["refusal"], both["refusal"], atol=1e-5)
    assert here["prompt"].tolist() == both["prompt"].tolist()


def test_an_axis_may_run_against_its_vector():
    axis = axis_of(*np.array([[-2.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), "here")
    assert axis.scale < 0
    np.testing.assert_allclose(axis.of(np.array([[3.0, 1.0], [1.0, 9.0]])), [1, -1])


def test_wrong_input_gets_a_sentence(model, asked, study):
    with pytest.raises(InputError, match="here: restricted and harmless requests have the same"):
        axis_of(np.ones(2), np.ones(2), np.ones(2), "here")
    with pytest.raises(InputError, match="sets is empty"):
        projections(model, {}, study)
    short = Direction(torch.ones(3, dtype=torch.float64), HOOK, LAYER, "-1", {})
    with pytest.raises(InputError, match=r"the direction is \[3\]"):
        projection_axes(model, short, **study.asked["fit"])
    none = RefusalStudy(None, "It does not refuse.", study.guard, asked=study.asked)
    with pytest.raises(InputError, match="no refusal direction to use: It does not refuse"):
        projections(model, asked, none)
