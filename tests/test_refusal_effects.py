"""What edits do: paired with the plain model, request by request."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import Asked, ask, next_logits
from llama_probe.refusal.candidates import find_candidates
from llama_probe.refusal.effects import effects
from llama_probe.refusal.judges import declines
from llama_probe.refusal.score import mean_kl, refusal_score
from tests.conftest import unchecked

KINDS = {"restricted": "restricted", "harmless": "same verb"}


@pytest.fixture(scope="module")
def model() -> Llama:
    return lp.load("tiny-moe")


@pytest.fixture(scope="module")
def tokens(model: Llama) -> list[int]:
    return [model.to_single_token("Sorry")]


@pytest.fixture(scope="module")
def sets(model: Llama) -> dict[str, Asked]:
    frame = lp.prompts.requests("tiny-moe")
    return {name: ask(model, frame.loc[frame["kind"] == kind, "text"].head(16).tolist())
            for name, kind in KINDS.items()}  # fmt: skip


@pytest.fixture(scope="module")
def edits(model: Llama, sets: dict[str, Asked]) -> dict[str, Any]:
    found = find_candidates(model, sets["restricted"], sets["harmless"], (-1,)).direction(-1, 2)
    return {"ablation": lp.ablate(found), "addition": lp.add(found)}


@pytest.fixture(scope="module")
def found(
    model: Llama, sets: dict[str, Asked], edits: dict[str, Any], tokens: list[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    with unchecked():
        return effects(model, sets, edits, tokens, max_new_tokens=8)


def test_there_is_a_row_for_every_edit_set_and_metric(found: Any) -> None:
    frame, answers = found
    key = ["edit", "set", "metric"]
    assert list(frame) == [*key, "value", "ci_low", "ci_high", "n", "change", "change_low",
                           "change_high"]  # fmt: skip
    assert len(frame) == len(frame[key].drop_duplicates()) == 3 * 2 * 3
    assert (frame["n"] == 16).all()
    assert list(answers) == ["edit", "set", "request", "prompt", "response", "declined"]
    assert len(answers) == 3 * 2 * 16


def test_the_plain_model_changes_nothing(found: Any) -> None:
    plain = found[0].query("edit == 'none'")
    assert (plain[["change", "change_low", "change_high"]] == 0).all(axis=None)
    assert (plain.query("metric == 'kl'")["value"] == 0).all()


def test_scores_and_costs_are_paired_by_request(
    model: Llama, sets: dict[str, Asked], edits: dict[str, Any], tokens: list[int], found: Any
) -> None:
    rows = found[0].set_index(["edit", "set", "metric"])
    for name, asked in sets.items():
        plain = next_logits(model, asked)
        for edit, hooks in edits.items():
            logits = next_logits(model, asked, hooks)
            before, after = (refusal_score(x, tokens).numpy() for x in (plain, logits))
            row = rows.loc[(edit, name, "refusal score")]
            assert tuple(row[:4]) == pytest.approx(stats.mean(after))
            assert tuple(row[4:]) == pytest.approx(stats.mean(after - before)[:3])
            own, cost = stats.mean(before), rows.loc[(edit, name, "kl")]
            assert row["change"] == pytest.approx(row["value"] - own.value)
            # Paired: not the interval of the two means by themselves.
            width = np.hypot(own.ci_high - own.ci_low, row["ci_high"] - row["ci_low"])
            assert row["change_high"] - row["change_low"] != pytest.approx(width, rel=0.01)
            assert cost["value"] == pytest.approx(mean_kl(plain, logits).mean().item())
            assert cost["value"] == cost["change"]


def test_declining_is_counted_from_the_answers(
    model: Llama, sets: dict[str, Asked], edits: dict[str, Any], found: Any
) -> None:
    frame, answers = found
    rows = frame.query("metric == 'declined'").set_index(["edit", "set"])
    for (edit, name), said in answers.groupby(["edit", "set"]):
        assert said["prompt"].tolist() == sets[name].texts
        assert said["request"].tolist() == list(range(16))
        hits = [bool(declines("", response)) for response in said["response"]]
        assert said["declined"].tolist() == hits
        assert tuple(rows.loc[(edit, name)][1:5]) == stats.share(sum(hits), 16)
        plain = answers[(answers["edit"] == "none") & (answers["set"] == name)]["declined"]
        difference = np.array(hits, dtype=float) - plain.to_numpy(dtype=float)
        assert tuple(rows.loc[(edit, name)][5:]) == stats.mean(difference)[:3]
    alone = model.generate(sets["restricted"].prompts[3], template="chat", max_new_tokens=8,
                           fwd_hooks=edits["ablation"])  # fmt: skip
    one = answers.query("edit == 'ablation' and `set` == 'restricted' and request == 3")
    assert one["response"].tolist() == [alone]
    # And the edits do what they are for.
    share = rows["value"]
    assert share["none", "restricted"] == 1 > 0.75 > share["ablation", "restricted"]
    assert share["none", "harmless"] == 0 < 0.25 < share["addition", "harmless"]


def test_without_a_judge_nothing_is_answered(
    model: Llama, sets: dict[str, Asked], edits: dict[str, Any], tokens: list[int], found: Any
) -> None:
    frame, answers = effects(model, sets, edits, tokens, judge=None)
    assert answers.empty and list(answers) == list(found[1])
    assert set(frame["metric"]) == {"refusal score", "kl"}
    same = found[0].query("metric != 'declined'").reset_index(drop=True)
    pd.testing.assert_frame_equal(frame, same)


def test_another_judge_and_sets_of_other_sizes(
    model: Llama, sets: dict[str, Asked], tokens: list[int]
) -> None:
    def long(prompt: str, response: str) -> float:
        return float(len(response) > 3)

    nudge = lp.add(torch.ones(model.cfg.d_model), at="blocks.0.hook_resid_pre")
    some = {"restricted": sets["restricted"][[0, 1]], "harmless": sets["harmless"][[0]]}
    frame, answers = effects(model, some, {"nudge": nudge}, tokens, judge=long, max_new_tokens=4)
    assert answers["declined"].tolist() == [len(text) > 3 for text in answers["response"]]
    assert frame.query("`set` == 'harmless'")["n"].tolist() == [1] * 6


def test_what_cannot_be_compared(model: Llama, sets: dict[str, Asked], tokens: list[int]) -> None:
    nothing = torch.ones(model.cfg.d_model)
    with pytest.raises(InputError, match="an edit is called 'none'"):
        effects(model, sets, {"none": lp.ablate(nothing)}, tokens)
    with pytest.raises(InputError, match="names positions"):
        effects(model, sets, {"last": lp.ablate(nothing, positions=-1)}, tokens)
    with pytest.raises(InputError, match="there are no requests"):
        effects(model, {"restricted": sets["restricted"][[]]}, {}, tokens)
