"""Finding the direction: on tiny-moe; where there is nothing; and what cannot be asked."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import next_logits
from llama_probe.refusal.beside import Beside
from llama_probe.refusal.candidates import find_candidates, score_candidates
from llama_probe.refusal.find import find_refusal_direction
from llama_probe.refusal.study import RefusalStudy, random_changes
from tests.conftest import unchecked

QUICK: dict[str, Any] = {"n_random": 0, "max_new_tokens": 8, "progress": False}
LAST: dict[str, Any] = {**QUICK, "positions": (-1,)}  # where tiny-moe's refusal is


def requests(kind: str, n: int) -> pd.DataFrame:
    frame = lp.prompts.requests("tiny-moe")
    kinds = ["same verb", "same object"] if kind == "twin" else [kind]
    return frame[frame["kind"].isin(kinds)].sample(n, random_state=0)


@pytest.fixture(scope="module")
def model() -> Llama:
    return lp.load("tiny-moe")


@pytest.fixture(scope="module")
def study(model: Llama) -> RefusalStudy:
    with unchecked():
        sets = requests("restricted", 60), requests("twin", 60)
        return find_refusal_direction(model, *sets, **{**LAST, "n_random": 3}, nearest=True, seed=1)


def share(study: RefusalStudy, edit: str, name: str) -> float:
    rows = study.effects.query("direction == 'refusal' and metric == 'declined'")
    return rows.set_index(["edit", "set"])["value"][edit, name]


# On a model that declines


@pytest.mark.slow
def test_one_direction_mediates_tiny_moe_s_refusal_and_random_ones_do_not(model: Llama) -> None:
    with unchecked():
        sets = requests("restricted", 200), requests("twin", 200)
        options = {**LAST, "n_random": 20, "max_new_tokens": 6}
        study = find_refusal_direction(model, *sets, **options, nearest=True)
    direction = study.direction
    assert direction is not None and (direction.position, direction.layer) == ("-1", 2)
    assert share(study, "none", "restricted") >= 0.95 and share(study, "none", "harmless") <= 0.05
    assert share(study, "ablation", "restricted") <= 0.15
    assert share(study, "addition", "harmless") >= 0.8
    changes = random_changes(study.effects).query("metric == 'declined'")
    isotropic = changes[changes["direction"] == "random"].set_index(["edit", "set"])
    assert isotropic["draws"].tolist() == [20, 20]
    assert isotropic["random_mean"].abs().max() <= 0.05
    assert isotropic["change"].abs().min() > 0.8 > 0.3 > isotropic["random_95"].max()
    cost = study.candidates.query("chosen")["kl_div_score"].item()
    assert len(study.random_kl) == 20 and 10 * np.quantile(study.random_kl, 0.95) < cost < 0.5


def test_a_study_says_what_it_found(study: RefusalStudy, model: Llama) -> None:
    assert study.direction is not None and study.direction.layer == 2
    assert study.tokens == (model.to_single_token("Sorry"),)
    assert share(study, "ablation", "restricted") < 0.5 < share(study, "addition", "harmless")
    assert "declines 60 of 60 restricted and 0 of 60 harmless requests" in study.verdict
    assert "Of 4 candidate directions the one at position -1 before block 2" in study.verdict
    kl = study.candidates.query("chosen")["kl_div_score"].item()
    rule = f"least KL of those that work, {kl:.3g}, none within 0.1"
    assert study.survivors["rule"].tolist() == [rule] and rule in study.verdict
    assert study.candidates["dropped"].ne("").all() and study.candidates["chosen"].sum() == 1
    percent = f"{share(study, 'ablation', 'restricted'):.0%}, adding it"
    assert percent in study.verdict


def test_a_study_stands_for_its_direction(study: RefusalStudy) -> None:
    direction = study.direction
    assert direction is not None
    assert torch.equal(study.vector, direction.vector) and study.hook == direction.hook
    asked, model = study.asked["report"]["harmless"], lp.load("tiny-moe")
    for one, other in (
        (lp.ablate(study), lp.ablate(direction.vector)),
        (lp.add(study), lp.add(direction.vector, at="blocks.2.hook_resid_pre")),
        (lp.affine(study, study.reference), lp.affine(direction, study.reference)),
    ):
        assert torch.equal(next_logits(model, asked, one), next_logits(model, asked, other))


def test_each_part_has_requests_of_its_own(study: RefusalStudy) -> None:
    for name in ("restricted", "harmless"):
        parts = [set(study.asked[part][name].texts) for part in ("fit", "select", "report")]
        assert list(map(len, parts)) == [30, 15, 15] and len(set.union(*parts)) == 60
        assert set(study.answers.query("`set` == @name")["prompt"]) == parts[2]


def test_means_are_of_the_fitting_part_and_scores_of_the_selecting_part(
    model: Llama, study: RefusalStudy
) -> None:
    def sets(part: str) -> Any:
        return study.asked[part]["restricted"], study.asked[part]["harmless"]

    assert study.means is not None
    again = find_candidates(model, *sets("fit"), (-1,))
    np.testing.assert_array_equal(again.restricted, study.means.restricted)
    np.testing.assert_array_equal(again.harmless, study.means.harmless)
    columns = ["refusal_score", "steering_score", "kl_div_score"]
    found = study.candidates[columns].to_numpy()
    scores = score_candidates(model, study.means, *sets("select"), study.tokens)
    np.testing.assert_allclose(scores[columns], found)
    fitted = score_candidates(model, study.means, *sets("fit"), study.tokens)
    assert not np.allclose(fitted[columns], found, atol=1e-3)


def test_random_directions_stand_beside(study: RefusalStudy) -> None:
    drawn = study.effects.query("direction != 'refusal'")
    assert {(*row,) for row in drawn[["edit", "set"]].to_numpy()} == {
        ("ablation", "restricted"), ("addition", "harmless")
    }  # fmt: skip
    assert drawn.groupby(["direction", "edit", "metric"])["draw"].apply(list).tolist() == (
        [[0, 1, 2]] * 12
    )
    assert len(study.random_kl) == 3
    summary = random_changes(study.effects).set_index(["direction", "edit", "metric"])
    own = drawn.query("direction == 'matched random' and edit == 'addition' and metric == 'kl'")
    row = summary.loc[("matched random", "addition", "kl")]
    assert row["random_mean"] == pytest.approx(own["change"].mean())
    assert row["random_95"] == pytest.approx(np.quantile(own["change"].abs(), 0.95))
    shown = study.effects.query("edit == 'addition' and direction == 'refusal' and metric == 'kl'")
    assert row["change"] == shown.set_index("set")["change"]["harmless"]


def test_the_record_is_json_and_the_direction_can_be_saved(study: RefusalStudy, tmp_path) -> None:
    record = json.loads(json.dumps(study.record, allow_nan=False))
    assert record == study.record
    assert record["requests"]["select"] == {"restricted": 15, "harmless": 15}
    assert record["tokens"] == list(study.tokens) and record["candidates"] == 4
    direction = study.direction
    assert direction is not None
    direction.save(tmp_path / "direction")
    assert lp.Direction.load(tmp_path / "direction").record["rule"] == record["rule"]


@pytest.mark.slow
def test_the_seed_decides_everything(model: Llama) -> None:
    sets = requests("restricted", 24), requests("twin", 24)
    with unchecked():
        one, same, other = (
            find_refusal_direction(model, *sets, **LAST, kl_max=2.0, seed=seed)
            for seed in (0, 0, 1)
        )
    pd.testing.assert_frame_equal(one.candidates, same.candidates)
    pd.testing.assert_frame_equal(one.effects, same.effects)
    assert one.record == same.record and torch.equal(one.vector, same.vector)
    assert not torch.equal(one.vector, other.vector)
    assert one.record["rule"] == "published but for kl_max = 2.0" in one.verdict


# Where no direction is offered


def no_direction(study: RefusalStudy, begin: str) -> None:
    assert study.direction is None and study.effects.empty
    assert study.verdict.startswith(begin)
    for use in (lp.ablate, lp.add, lambda study: study.reference):
        with pytest.raises(InputError, match="there is no refusal direction to use: This model"):
            use(study)
    with pytest.raises(InputError, match="this study has no direction"):
        random_changes(study.effects)
    json.dumps(study.record, allow_nan=False)


def test_a_model_that_was_never_trained() -> None:
    model = lp.load("tiny-moe", pretrained=False)
    with unchecked():
        study = find_refusal_direction(
            model, requests("restricted", 20), requests("twin", 20), **QUICK
        )
    no_direction(study, "This model does not refuse restricted requests in particular: it declines")
    assert study.verdict.endswith("No direction is offered.") and not study.guard.refuses
    assert "0 of 20 restricted and 0 of 20 harmless" in study.verdict


def test_two_harmless_sets_that_differ(model: Llama) -> None:
    """A difference of means tells them apart; behaviour does not."""
    verbs, objects = requests("same verb", 24), requests("same object", 24)
    with unchecked():
        study = find_refusal_direction(model, verbs, objects, **QUICK)
    no_direction(study, "This model does not refuse restricted requests in particular: it declines")
    assert study.candidates.empty and study.tokens == ()


def test_candidates_that_do_not_pass_are_shown_and_not_offered(model: Llama) -> None:
    sets = requests("restricted", 24), requests("twin", 24)
    with unchecked():
        study = find_refusal_direction(model, *sets, **LAST, kl_max=0.0)
        never = find_refusal_direction(model, *sets, **LAST, nearest=True, induce_min=50)
    no_direction(study, "This model refuses: it declines")
    assert "Of 4 candidate directions none passes (" in study.verdict
    assert "; nearest=True takes one at a higher KL." in study.verdict
    assert len(study.candidates) == 4 and not study.candidates["chosen"].any()
    no_direction(never, "This model refuses: it declines")
    assert never.verdict.endswith("; none of them works at any KL.")


def test_a_limit_from_random_directions_is_named(model: Llama, monkeypatch) -> None:
    monkeypatch.setattr(Beside, "kl", lambda self: (1.0,) * 20)
    monkeypatch.setattr(Beside, "directions", lambda self, direction: {})
    sets, options = (requests("restricted", 24), requests("twin", 24)), {**LAST, "n_random": 20}
    with unchecked():
        study = find_refusal_direction(model, *sets, **options, kl_max=0.0)
    rule = "KL limit at the 95th percentile of 20 random directions: 1"
    assert study.record["rule"] == rule and rule in study.verdict and study.direction is not None


# Which requests


def test_a_request_that_is_there_twice_counts_once(model: Llama) -> None:
    sets = requests("restricted", 20), requests("twin", 20)
    twice = pd.concat([sets[1], sets[1].head(7)])
    with unchecked():
        study = find_refusal_direction(model, sets[0], twice, **LAST)
    assert study.record["repeated"] == {"restricted": 0, "harmless": 7}
    texts = [text for part in study.asked.values() for text in part["harmless"].texts]
    assert len(texts) == len(set(texts)) == 20


def test_groups_stay_together_across_both_sets(model: Llama) -> None:
    sets = requests("restricted", 60), requests("twin", 60)
    with unchecked():
        study = find_refusal_direction(model, *sets, **LAST, groups="pair")
    pair = pd.concat(sets).set_index("text")["pair"]
    parts = [
        {pair[text] for asked in part.values() for text in asked.texts}
        for part in study.asked.values()
    ]
    assert len(set.union(*parts)) == sum(map(len, parts)) == pair.nunique()


def test_a_part_may_use_fewer_requests_drawn_from_all_of_its_own(model: Llama) -> None:
    sets = requests("restricted", 40), requests("twin", 40)
    with unchecked():
        whole = find_refusal_direction(model, *sets, **LAST)
        study = find_refusal_direction(model, *sets, **LAST, most={"select": 4, "report": 100})
    assert study.record["requests"]["select"] == {"restricted": 4, "harmless": 4}
    assert study.record["requests"]["report"] == {"restricted": 10, "harmless": 10}
    for name in ("restricted", "harmless"):
        every, some = (s.asked["select"][name].texts for s in (whole, study))
        assert set(some) < set(every) and some != every[:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harmless": requests("restricted", 3)}, "restricted and harmless, such as '"),
        ({"groups": "theme"}, "no column 'theme' to group by"),
        ({"most": {"test": 4}}, "most names 'test', but the parts are fit, select, report"),
        ({"most": {"fit": 1}}, "most allows the fit part 1 requests"),
        ({"positions": (0, -1)}, "different negative numbers"),
        ({"positions": ()}, "different negative numbers"),
        ({"splits": (0.5, 0.5)}, "three shares"),
        ({"judges": {}}, "at least one judge"),
    ],
)
def test_what_cannot_be_asked(model: Llama, options: dict[str, Any], message: str) -> None:
    harmless = requests("twin", 12)
    options = {"restricted": requests("restricted", 12), "harmless": harmless, **QUICK, **options}
    with pytest.raises(InputError, match=message), unchecked():
        find_refusal_direction(model, **options)


def test_a_group_must_be_named(model: Llama) -> None:
    sets = requests("restricted", 12), requests("twin", 12).assign(pair=np.nan)
    with pytest.raises(InputError, match="a harmless request has nothing in the column 'pair'"):
        find_refusal_direction(model, *sets, **QUICK, groups="pair")
