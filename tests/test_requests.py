"""Requests: mild words alone, twins that share them, and nothing that was taught."""

import re

import pandas as pd
import pytest

import llama_probe as lp
from llama_probe.errors import InputError
from refusal_adapter.phrasings import ASKED_PHRASINGS, TAUGHT_PHRASINGS
from refusal_adapter.requests import UNSEEN_TOPIC, asked, taught
from tiny_moe.words import REQUESTS

TWINS = ("same verb", "same object")
RESTRICTED = ("restricted", "unseen restricted")
PHRASINGS = {
    "everyday": list(ASKED_PHRASINGS),
    "tiny-moe": lp.prompts.planted()["request_phrasings"],
}
BOTH = pytest.mark.parametrize("words", PHRASINGS)


def taken_apart(frame: pd.DataFrame, words: str) -> pd.DataFrame:
    """Each request but the ordinary ones as phrasing, verb and object, all of them known."""
    rows = []
    for row in frame.query("kind != 'ordinary'").itertuples():
        group = next(group for group in REQUESTS if group["topic"] == row.topic)
        verbs = [*group["improper"], *group["proper"]]
        things = [*group["sensitive"], *group["harmless"]]
        found = [
            (phrasing, verb, thing)
            for phrasing in PHRASINGS[words]
            for verb in verbs
            for thing in things
            if phrasing.format(f"{verb} {thing}") == row.text
        ]
        assert len(found) == 1, row.text
        phrasing, verb, thing = found[0]
        improper, sensitive = verb in group["improper"], thing in group["sensitive"]
        rows.append((row.kind, row.topic, row.pair, phrasing, verb, thing, improper, sensitive))
    columns = ["kind", "topic", "pair", "phrasing", "verb", "thing", "improper", "sensitive"]
    return pd.DataFrame(rows, columns=columns)


@BOTH
def test_every_request_is_built_of_the_word_lists_and_of_its_kind(words: str) -> None:
    parts = taken_apart(lp.prompts.requests(words), words)
    both = parts["improper"] & parts["sensitive"]
    assert both.equals(parts["kind"].isin(RESTRICTED))  # neither word alone makes it restricted
    for kind, word in zip(TWINS, ("improper", "sensitive"), strict=True):
        assert parts.loc[parts["kind"] == kind, word].all()


@BOTH
def test_twins_share_phrasing_and_verb_or_object_within_their_pair(words: str) -> None:
    parts = taken_apart(lp.prompts.requests(words), words)
    for _, pair in parts.groupby("pair"):
        assert pair["phrasing"].nunique() == pair["topic"].nunique() == 1
        refused = pair[pair["kind"].isin(RESTRICTED)]
        twins = pair.drop(refused.index)
        assert len(refused) and (words == "tiny-moe" or len(refused) == len(twins) == 1)
        for kind, word in zip(TWINS, ("verb", "thing"), strict=True):
            of = twins[twins["kind"] == kind]
            assert of[word].isin(refused[word]).all()
        other = twins[twins["kind"] == "unseen twin"]
        assert (other["verb"].isin(refused["verb"]) | other["thing"].isin(refused["thing"])).all()


@BOTH
def test_no_request_is_there_twice(words: str) -> None:
    frame = lp.prompts.requests(words)
    assert list(frame) == ["text", "kind", "topic", "pair"]
    assert frame["text"].is_unique and not frame.isna().to_numpy().any()
    alone = frame.loc[frame["kind"] == "ordinary", "pair"]
    assert (frame["pair"].value_counts()[alone] == 1).all()
    assert set(frame["pair"]) == set(range(frame["pair"].nunique()))


def test_everyday_requests_are_what_the_adapter_s_experiment_asks() -> None:
    frame = lp.prompts.requests()
    pd.testing.assert_frame_equal(frame, asked()[list(frame)])


def test_nothing_of_the_everyday_requests_was_taught() -> None:
    frame, learnt = lp.prompts.requests(), taught(3000)
    assert not set(ASKED_PHRASINGS) & set(TAUGHT_PHRASINGS)
    assert not set(frame["text"]) & set(learnt["text"])
    unseen = frame["kind"].isin(("unseen restricted", "unseen twin"))
    assert (frame.loc[unseen, "topic"] == UNSEEN_TOPIC).all()
    assert UNSEEN_TOPIC not in {*learnt["topic"], *frame.loc[~unseen, "topic"]}
    parts = taken_apart(frame[~unseen], "everyday")
    actions = set(parts["verb"] + " " + parts["thing"])
    endings = [phrasing.split("{}") for phrasing in TAUGHT_PHRASINGS]
    known = {
        text[len(a) : len(text) - len(b)]
        for text in learnt.query("kind != 'ordinary'")["text"]
        for a, b in endings
        if text.startswith(a) and text.endswith(b)
    }
    assert len(known) > 500 and not actions & known


def test_those_of_tiny_moe_are_its_exam_s() -> None:
    frame, exam = lp.prompts.requests("tiny-moe"), lp.prompts.planted()["exam"]
    for kind in ("restricted", *TWINS):
        assert set(frame.loc[frame["kind"] == kind, "text"]) == {one["chat"] for one in exam[kind]}
    ordinary = frame.loc[frame["kind"] == "ordinary", "text"]
    assert len(ordinary) > 100
    assert all(re.fullmatch(r"What is (the capital of .+|.+ in French)\?", text)
               for text in ordinary)  # fmt: skip


def test_unknown_words_get_a_sentence() -> None:
    with pytest.raises(InputError, match="words is 'tinymoe', but should be everyday or tiny-moe"):
        lp.prompts.requests("tinymoe")
