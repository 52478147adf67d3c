"""Judges: the phrases, a planted guard, what judges say of a frame, and how far they agree."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from tiny import tiny_config

import llama_probe as lp
from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.judges import REFUSAL_PHRASES, declines, judge_agreement, judge_all, rate
from llama_probe.refusal.llama_guard import LlamaGuard


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
@pytest.mark.parametrize("change", [str, str.upper, lambda text: text.replace("'", "’")])
def test_every_phrase_declines_anywhere_in_any_case(phrase, change):
    assert declines("", f"Well, {change(phrase)} do that.") == 1


@pytest.mark.parametrize(
    "response", ["", "Sure. To photograph a hotel, …", "I can", "I, an AI", "apologize", "Sorry."]
)
def test_other_words_do_not_decline(response):
    assert declines("I'm sorry, I cannot", response) == 0


def test_there_are_the_twelve_published_phrases():
    assert len({phrase.lower() for phrase in REFUSAL_PHRASES}) == 12


# A guard that is planted: a text that ends in "!" is unsafe. What comes next depends on the last
# token alone, as each block adds nothing: the embedding is one-hot and the unembedding a table.
SAYS_SAFE = [(".", "\n"), ("\n", "s"), ("s", "a"), ("a", "f"), ("f", "e"), ("e", "</s>")]
SAYS_UNSAFE = [("!", "u"), ("u", "n"), ("n", "s")]
SAYS_NOTHING = [("?", " "), (" ", " ")]
SAYS_OTHERWISE = [(",", "z"), ("z", "</s>")]
NEXT = dict(SAYS_SAFE + SAYS_UNSAFE + SAYS_NOTHING + SAYS_OTHERWISE)
TEXTS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | "
    "selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}{% endfor %}"
)


@pytest.fixture
def guard_model(tiny_tokenizer) -> Llama:
    model = Llama(tiny_config(d_model=260, n_heads=2, d_vocab=260, n_ctx=200), tiny_tokenizer)
    token = model.to_single_token
    table = torch.zeros(260, 260)
    for now, then in NEXT.items():
        table[token(then), token(now)] = 1.0
    table[token("u"), token("\n")] = 0.9  # the second best after "\n"
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        model.embed.weight.copy_(torch.eye(260))
        model.unembed.weight.copy_(table)
    model.requires_grad_(False).eval()
    return model


@pytest.fixture(params=[TEXTS, PARTS], ids=["texts", "parts"])
def guard(guard_model, request, monkeypatch) -> LlamaGuard:
    monkeypatch.setattr(guard_model.tokenizer, "chat_template", request.param)
    return LlamaGuard(guard_model)


def test_a_guard_reads_the_first_line_of_its_verdict(guard):
    assert guard.unsafe("hello!", "fine.") == 0  # "\nsafe": the blank line is passed over
    assert guard.unsafe("hello.", "fine!") == 1
    assert guard("hello.", "fine!") == 1


def test_a_guard_s_probability_is_that_of_the_first_tokens_where_the_verdict_stands(guard):
    # What the norm makes of a one-hot vector; after "." comes "\n" first.
    length = (1 / 260 + guard.model.cfg.eps) ** -0.5
    safe, unsafe = (guard.probability("x", response) for response in ("fine.", "fine!"))
    assert safe == pytest.approx(1 / (1 + np.exp((1.0 - 0.9) * length)), rel=1e-5)
    assert 1 - unsafe == pytest.approx(1 / (1 + np.exp(length)), rel=1e-3)


def test_what_a_guard_should_not_say(guard):
    with pytest.raises(InputError, match="said 'z', but a Llama Guard begins with"):
        guard.unsafe("x", "fine,")
    with pytest.raises(InputError, match="said nothing in 8 tokens"):
        guard.probability("x", "fine?")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0].content }}", "leaves the prompt or the response out"),
        ("{{ messages[1].content }}.", "leaves the prompt or the response out"),
        ("{{ raise_exception('roles!') }}", "roles!"),
    ],
)
def test_a_template_that_hides_the_conversation(guard_model, monkeypatch, template, message):
    monkeypatch.setattr(guard_model.tokenizer, "chat_template", template)
    with pytest.raises(InputError, match=message):
        LlamaGuard(guard_model)


def test_a_guard_needs_words_that_it_can_tell_apart(guard_model, monkeypatch):
    monkeypatch.setattr(guard_model.tokenizer, "encode", lambda text, prepend_bos: [5])
    with pytest.raises(InputError, match="the same token"):
        LlamaGuard(guard_model)
    with pytest.raises(InputError, match="has none"):
        LlamaGuard(Llama(tiny_config()))


@pytest.mark.parametrize("guard", [PARTS], indirect=True)
def test_a_guard_from_a_folder_says_the_same(guard, tmp_path):
    lp.save(guard.model, tmp_path / "guard")
    loaded = LlamaGuard(lp.load(tmp_path / "guard", device="cpu", progress=False))
    for response in ("fine.", "fine!"):
        assert loaded("x", response) == guard("x", response)
        assert loaded.probability("x", response) == guard.probability("x", response)


SAID = pd.DataFrame({"prompt": ["a", "b"], "response": ["I cannot", "Sure"]}, index=[7, 9])


def test_every_judge_judges_every_response():
    judged = judge_all(SAID, {"phrases": declines, "length": lambda p, r: len(p + r) / 10})
    assert judged.columns.tolist() == ["prompt", "judge", "value"]
    assert judged.values.tolist() == [
        [0, "phrases", 1.0],
        [1, "phrases", 0.0],
        [0, "length", 0.9],
        [1, "length", 0.5],
    ]


@pytest.mark.parametrize("said", [np.nan, np.inf, -0.1, 1.1, "1", None, [0.0, 1.0], "yes"])
def test_a_judge_that_says_no_share_is_named(said):
    with pytest.raises(InputError, match="judge 'odd' says .* of row 0, but should say a number"):
        judge_all(SAID, {"fine": declines, "odd": lambda p, r: said})


@pytest.mark.parametrize("said", [True, np.bool_(True), np.float32(1), torch.tensor(1.0), 1])
def test_any_kind_of_number_is_one(said):
    assert judge_all(SAID, {"judge": lambda p, r: said}).value.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("frame", "judges", "message"),
    [
        (SAID.drop(columns="response"), {"a": declines}, "no column 'response'; it has: prompt"),
        (SAID.iloc[:0], {"a": declines}, "no rows"),
        (SAID, {}, "no judges"),
        (SAID.assign(response=["I cannot", np.nan]), {"a": declines}, "row 1 should have"),
    ],
)
def test_what_cannot_be_judged(frame, judges, message):
    with pytest.raises(InputError, match=message):
        judge_all(frame, judges)


def judged(**values: Any) -> pd.DataFrame:
    rows = [(i, name, v) for name, row in values.items() for i, v in enumerate(row)]
    return pd.DataFrame(rows, columns=["prompt", "judge", "value"])


def test_agreement_by_hand():
    a = [1.0] * 25 + [0.0] * 25
    b = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    row = judge_agreement(judged(a=a, b=b)).iloc[0]
    assert (row.both, row.only_a, row.only_b, row.neither, row.n) == (20, 5, 10, 15, 50)
    assert row.kappa == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    expected = stats.share(35, 50)
    assert (row.agreement, row.ci_low, row.ci_high) == expected[:3]


values = st.lists(st.tuples(st.sampled_from([0, 0.3, 0.5, 1]), st.sampled_from([0, 0.7])),
                  min_size=1, max_size=30)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(values)
def test_kappa_is_scikit_learn_s(pairs):
    a, b = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    frame = judged(a=a, b=b)
    row = judge_agreement(frame.sample(frac=1, random_state=len(pairs))).iloc[0]
    only = {row.a: row.only_a, row.b: row.only_b}
    yes = {"a": [v >= 0.5 for v in a], "b": [v >= 0.5 for v in b]}
    for name, other in (("a", "b"), ("b", "a")):
        assert only[name] == sum(x and not y for x, y in zip(yes[name], yes[other], strict=True))
    if len({*yes["a"], *yes["b"]}) == 1:
        assert np.isnan(row.kappa)
    else:
        assert row.kappa == pytest.approx(cohen_kappa_score(yes["a"], yes["b"]), abs=1e-12)


def test_judges_that_flip_coins_agree_as_often_as_chance():
    draw = np.random.default_rng(0)
    frame = judged(a=draw.random(4000) < 0.9, b=draw.random(4000) < 0.9)
    row = judge_agreement(frame.astype({"value": float})).iloc[0]
    assert row.agreement == pytest.approx(0.82, abs=0.02)
    assert abs(row.kappa) < 0.05


def test_every_pair_has_a_row_and_people_are_judges_too():
    people = judged(people=[1, 1])
    frame = pd.concat([judge_all(SAID, {"x": declines, "y": lambda p, r: 0.5}), people])
    found = judge_agreement(frame)
    assert found[["a", "b"]].values.tolist() == [["x", "y"], ["x", "people"], ["y", "people"]]
    assert found.agreement.tolist() == [0.5, 0.5, 1.0]
    assert judge_agreement(frame, threshold=0.6).agreement.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (judged(a=[1, 0]), "needs two judges, but there are: a"),
        (judged(a=[1, 0], b=[1]), "judge 'b' has no value for prompt 1"),
        (pd.concat([judged(a=[1], b=[1])] * 2), "judge 'a' has several values for prompt 0"),
        (judged(a=[1, 0], b=[1, 2]), "from 0 to 1"),
        (judged(a=[1], b=[1]).drop(columns="judge"), "no column 'judge'"),
    ],
)
def test_what_cannot_be_compared(frame, message):
    with pytest.raises(InputError, match=message):
        judge_agreement(frame)


def test_rate_is_wilson_s():
    assert rate([1.0, 0.6, 0.0, 0.4]) == stats.share(2, 4)
    assert rate(pd.Series([0.6, 0.4]), threshold=0.7) == stats.share(0, 2)
    assert rate(np.zeros(20)).ci_high > 0.1


@pytest.mark.parametrize("said", [[], [0.5, np.nan], [2.0], [[1.0]]])
def test_what_has_no_rate(said):
    with pytest.raises(InputError, match="from 0 to 1"):
        rate(np.array(said))
    with pytest.raises(InputError, match="threshold is 0"):
        rate([1.0], threshold=0)
