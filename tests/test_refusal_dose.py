"""Doses of a direction: all of it is ablation, and what the robustness index makes of answers."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.probing import Direction
from llama_probe.refusal.asking import Asked, ask, next_logits
from llama_probe.refusal.candidates import find_candidates
from llama_probe.refusal.dose import (
    dose_response,
    robustness_difference,
    robustness_index,
    text_loss,
)
from llama_probe.refusal.effects import effects
from tests.conftest import unchecked

TEXTS = ["The capital of France is Paris.", "12+30=42;", "Mary gave it to John."]


@pytest.fixture(scope="module")
def model() -> Llama:
    return lp.load("tiny-moe")


@pytest.fixture(scope="module")
def tokens(model: Llama) -> list[int]:
    return [model.to_single_token("Sorry")]


@pytest.fixture(scope="module")
def sets(model: Llama) -> tuple[Asked, Asked]:
    frame = lp.prompts.requests("tiny-moe")
    restricted, harmless = (
        ask(model, frame.loc[frame["kind"] == kind, "text"].head(16).tolist())
        for kind in ("restricted", "same verb")
    )
    return restricted, harmless


@pytest.fixture(scope="module")
def direction(model: Llama, sets: tuple[Asked, Asked]) -> Direction:
    return find_candidates(model, *sets, (-1,)).direction(-1, 2)


@pytest.fixture(scope="module")
def response(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked], tokens: list[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    options: dict[str, Any] = {"doses": (0.5, 1.0), "n_random": 2, "max_new_tokens": 8}
    with unchecked():
        return dose_response(model, direction, *sets, tokens, **options)


def test_a_dose_of_1_is_ablation_at_the_published_sites(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked], tokens: list[int], response: Any
) -> None:
    """Each write loses all of it once, or each block and its input do: the stream is the same."""
    frame, answers = response
    both = dict(zip(("restricted", "harmless"), sets, strict=True))
    plain, said = effects(model, both, {"all": lp.ablate(direction)}, tokens, max_new_tokens=8)
    chosen = frame.query("edit == 'ablation' and direction == 'refusal' and dose == 1")
    expected = plain.query("edit == 'all'").set_index(["set", "metric"])
    columns = ["value", "change", "change_low", "change_high"]
    np.testing.assert_allclose(
        chosen.set_index(["set", "metric"])[columns], expected[columns], rtol=1e-4, atol=1e-4
    )
    dosed = answers.query("edit == 'ablation' and dose == 1")["response"]
    assert dosed.tolist() == said.query("edit == 'all'")["response"].tolist()


def test_a_half_dose_leaves_half_of_it_in_the_stream(model: Llama, direction: Direction) -> None:
    unit = direction.unit.float()
    row = model.to_tokens("The capital of France is")
    edit = lp.ablate(direction, at=("hook_embed",), fraction=0.5)
    with torch.no_grad():
        plain, half = (
            model.run_with_hooks(row, fwd_hooks=hooks, stop_at_layer=0) for hooks in ((), edit)
        )
    assert torch.allclose(half @ unit, plain @ unit / 2, atol=1e-6)


def test_doses_edits_and_sets(response: Any) -> None:
    frame, answers = response
    own = frame[frame["direction"] == "refusal"]
    places = {(*row,) for row in own[["edit", "set", "dose"]].to_numpy()}
    assert places == {
        (edit, name, dose)
        for edit, name in (("ablation", "restricted"), ("ablation", "harmless"),
                           ("addition", "harmless"))
        for dose in (0.0, 0.5, 1.0)
    }  # fmt: skip
    key = ["edit", "set", "dose", "metric", "direction", "draw"]
    assert not frame.duplicated(key).any()
    assert (own.query("dose == 0")[["change", "change_low", "change_high"]] == 0).all(axis=None)
    assert {(*row,) for row in answers[["edit", "set", "dose"]].to_numpy()} == places
    declined = own[own["metric"] == "declined"].set_index(["edit", "set", "dose"])["value"]
    assert declined["ablation", "restricted", 0] == 1 > declined["ablation", "restricted", 1]
    assert declined["addition", "harmless", 0] == 0 < declined["addition", "harmless", 1]


def test_random_directions_are_measured_at_the_next_token_alone(response: Any) -> None:
    drawn = response[0].query("direction == 'random'")
    assert set(drawn["draw"]) == {0, 1}
    assert set(drawn["metric"]) == {"refusal score", "kl"}
    assert set(response[0].query("direction == 'refusal'")["metric"]) == {
        "refusal score", "kl", "declined"
    }  # fmt: skip
    full = drawn.query("edit == 'ablation' and dose == 1 and metric == 'kl'")["value"]
    own = response[0].query(
        "direction == 'refusal' and edit == 'ablation' and dose == 1 and metric == 'kl'"
    )
    assert full.max() < own["value"].min() and full.nunique() == 4  # sets times draws


def test_an_addition_is_made_where_the_direction_is_from(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked], tokens: list[int], response: Any
) -> None:
    edits = {"1.0": lp.add(direction.vector, at="blocks.2.hook_resid_pre")}
    frame, _ = effects(model, {"harmless": sets[1]}, edits, tokens, judge=None)
    chosen = response[0].query("edit == 'addition' and direction == 'refusal' and dose == 1")
    one, other = (
        rows.set_index("metric")["value"] for rows in (chosen, frame.query("edit == '1.0'"))
    )
    assert one["refusal score"] == pytest.approx(other["refusal score"])


@pytest.mark.parametrize("doses", [(), (0.0, 1.0), (-0.5, 1.0), (0.5, 0.5), (float("nan"),)])
def test_what_is_no_dose(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked], tokens: list[int], doses: Any
) -> None:
    with pytest.raises(InputError, match="different numbers above 0"):
        dose_response(model, direction, *sets, tokens, doses=doses)


def test_a_direction_needs_a_place_and_one_vector(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked], tokens: list[int]
) -> None:
    with pytest.raises(InputError, match="this direction has no hook of its own"):
        dose_response(model, direction.vector, *sets, tokens)
    with pytest.raises(InputError, match="a subspace"):
        dose_response(model, torch.eye(2, model.cfg.d_model), *sets, tokens)


# The index, of answers made up: rows of requests, columns of doses


def answers(*declined: tuple[int, ...], doses: tuple[float, ...] = (0, 0.25, 1)) -> pd.DataFrame:
    rows = [
        ("ablation", "restricted", request, f"request {request}", dose, bool(value))
        for request, values in enumerate(declined)
        for dose, value in zip(doses, values, strict=True)
    ]
    columns = ["edit", "set", "request", "prompt", "dose", "declined"]
    others = [("ablation", "harmless", 0, "h", 0.0, True), ("addition", "harmless", 0, "h", 9, 1)]
    return pd.DataFrame([*rows, *others], columns=columns).sample(frac=1, random_state=0)


def test_the_index_is_the_area_under_the_share_of_declined_requests() -> None:
    found = robustness_index(answers((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)))
    areas = [1.0, 0.25 + 0.75 / 2, 0.25 / 2, 0.0]  # trapezia over 0 to 0.25 and 0.25 to 1
    assert found == stats.mean(np.array(areas)) and found.n == 4
    assert robustness_index(answers((1, 1, 1), (1, 1, 1))) == (1, 1, 1, 2)
    assert robustness_index(answers((0, 0, 0), (0, 0, 0))) == (0, 0, 0, 2)
    more = answers((1, 1, 0, 1), doses=(0, 0.25, 1, 2))  # beyond all of it is another edit
    assert robustness_index(more).value == areas[1]


def test_the_index_of_what_was_measured(response: Any) -> None:
    frame, said = response
    rows = frame.query("direction == 'refusal' and metric == 'declined' and edit == 'ablation'")
    none, half, all_of_it = rows.query("`set` == 'restricted'").sort_values("dose")["value"]
    by_hand = (none + half) / 4 + (half + all_of_it) / 4
    assert robustness_index(said).value == pytest.approx(by_hand)
    assert robustness_difference(said, said) == (0, 0, 0, 16)


def test_a_difference_is_paired_by_request() -> None:
    one = answers(*[(1, 1, 1), (0, 0, 0)] * 10)
    other = answers(*[(1, 1, 0), (0, 0, 0)] * 10)
    found = robustness_difference(one, other)
    assert found == stats.mean(np.array([0.375, 0.0] * 10))
    assert robustness_difference(other, one).value == -found.value


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (answers(), "no answers to restricted requests under ablation"),
        (answers((1, 0), doses=(0, 0.5)), r"doses from 0 to 1, but these are \[0.0, 0.5\]"),
        (answers((1, 0), doses=(0.5, 1)), r"doses from 0 to 1, but these are \[0.5, 1.0\]"),
        (pd.concat([answers((1, 1, 1))] * 2), "several answers at one dose"),
        (answers((1, 1, 1), (1, 1, 1)).query("request != 1 or dose != 0.25"),
         "no answer at one of the doses"),
    ],
)  # fmt: skip
def test_what_has_no_index(one: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        robustness_index(one)


def test_only_the_same_requests_and_doses_are_compared() -> None:
    one, fewer = answers((1, 1, 1), (1, 1, 0)), answers((1, 1, 1))
    coarse = answers((1, 1), (1, 0), doses=(0, 1))
    for other in (fewer, coarse, one.assign(prompt=one["prompt"] + "?")):
        with pytest.raises(InputError, match="the same requests at the same doses"):
            robustness_difference(one, other)


# What it costs on ordinary text


def test_text_loss_is_the_model_s_own(model: Llama, direction: Direction) -> None:
    edit = lp.ablate(direction)
    frame = text_loss(model, TEXTS, {"ablation": edit}).set_index("edit")
    with torch.no_grad():
        plain = [model(text, return_type="loss").item() for text in TEXTS]
        with model.hooks(edit):
            edited = [model(text, return_type="loss").item() for text in TEXTS]
    assert list(frame.index) == ["none", "ablation"] and set(frame["metric"]) == {"loss"}
    for name, losses in (("none", plain), ("ablation", edited)):
        row = frame.loc[name]
        assert tuple(row[["value", "ci_low", "ci_high", "n"]]) == stats.mean(np.array(losses))
        difference = stats.mean(np.array(losses) - np.array(plain))
        assert tuple(row[["change", "change_low", "change_high"]]) == difference[:3]
    assert frame.loc["ablation", "change"] != 0


@pytest.mark.parametrize(
    ("texts", "edits", "message"),
    [
        ([], {}, "a list of texts, at least one"),
        ("A text.", {}, "a list of texts, at least one"),
        (TEXTS, {"none": ()}, "an edit is called 'none'"),
    ],
)
def test_what_has_no_loss(model: Llama, texts: Any, edits: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_loss(model, texts, edits)


def test_next_logits_are_those_of_the_dose(
    model: Llama, direction: Direction, sets: tuple[Asked, Asked]
) -> None:
    writes = ("hook_embed", "attn_out", "mlp_out")
    for fraction, same in ((1.0, True), (0.5, False)):
        one = next_logits(model, sets[0], lp.ablate(direction, at=writes, fraction=fraction))
        other = next_logits(model, sets[0], lp.ablate(direction, fraction=fraction))
        assert torch.allclose(one, other, atol=1e-4) == same  # a fraction compounds at the sites
