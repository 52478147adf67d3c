"""The refusal score and the divergence by their properties; which tokens begin refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.judges import declines
from llama_probe.refusal.score import (
    REFUSAL_TOKENS,
    mean_kl,
    opening_tokens,
    refusal_score,
    refusal_tokens,
)

FLOOR = -18.4207  # log(1e-8), seen in the released Gemma run
floats = st.floats(-40, 40, width=32)
logits_of_6 = st.lists(st.lists(floats, min_size=6, max_size=6), min_size=1, max_size=4)
subset = st.sets(st.integers(0, 5), min_size=1, max_size=5)


def of_probability(p: float) -> Tensor:
    """Logits of two tokens, the first with probability p."""
    return torch.tensor([[p, 1 - p]], dtype=torch.float64).log()


def test_floor_ceiling_and_middle():
    assert refusal_score(of_probability(0), [0]).item() == pytest.approx(FLOOR, abs=5e-5)
    assert refusal_score(of_probability(1), [0]).item() == pytest.approx(-FLOOR, abs=5e-5)
    assert refusal_score(of_probability(0.5), [0]).item() == 0


@pytest.mark.parametrize("p", [0.001, 0.3, 0.9])
def test_between_them_it_is_the_log_odds(p):
    score = refusal_score(of_probability(p).float(), [0])
    assert score.dtype == torch.float64
    assert score.item() == pytest.approx(math.log(p / (1 - p)), abs=2e-5)


@settings(deadline=None)
@given(logits_of_6, subset)
def test_what_refuses_and_what_does_not_are_opposites(rows, tokens):
    logits = torch.tensor(rows)
    others = sorted(set(range(6)) - tokens)
    score = refusal_score(logits, sorted(tokens))
    assert torch.allclose(score, -refusal_score(logits, others), rtol=0, atol=1e-6)
    assert (score.abs() <= -FLOOR + 1e-4).all()


@settings(deadline=None)
@given(logits_of_6, subset, floats)
def test_it_counts_no_level_and_no_order_and_each_row_for_itself(rows, tokens, level):
    logits, ids = torch.tensor(rows, dtype=torch.float64), sorted(tokens)
    score = refusal_score(logits, ids)
    # 1 - p is off by 1e-16, beside which 1e-8 was added.
    assert torch.allclose(score, refusal_score(logits + level, ids[::-1]), rtol=0, atol=1e-6)
    for row, one in enumerate(score):
        assert torch.allclose(one, refusal_score(logits[row : row + 1], ids)[0], atol=1e-9)


@settings(deadline=None)
@given(logits_of_6, st.floats(0.125, 10))
def test_more_of_a_token_is_a_higher_score(rows, more):
    logits = torch.tensor(rows, dtype=torch.float64)
    raised = logits.clone()
    raised[:, 2] += more
    assert (refusal_score(raised, [2]) >= refusal_score(logits, [2]) - 1e-9).all()
    assert (refusal_score(logits, [2, 3]) >= refusal_score(logits, [2]) - 1e-9).all()


def test_several_tokens_add_their_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    assert refusal_score(logits, [1, 2]).item() == pytest.approx(0, abs=1e-6)


def test_logits_that_are_no_numbers_are_no_score():
    assert refusal_score(torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), [0]).isnan().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no refusal tokens"),
        ([2], "ids go from 0 to 1"),
        ([-1], "token -1 does not exist"),
        ([1, 1], "one of them twice"),
    ],
)
def test_tokens_that_cannot_be_scored(tokens, message):
    with pytest.raises(InputError, match=message):
        refusal_score(torch.zeros(1, 2), tokens)


def test_divergence_by_hand():
    p, q, e = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.9, 0.0]), 1e-6
    expected = (p * (np.log(p + e) - np.log(q + e))).sum()
    found = mean_kl(torch.tensor(p).log()[None], torch.tensor(q).log()[None])
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert expected < 0.1 * math.log(1e6) + 1.1  # the token ruled out costs no infinity
    back = mean_kl(torch.tensor(q).log()[None], torch.tensor(p).log()[None])
    assert back.item() != pytest.approx(expected, rel=0.1)


@settings(deadline=None)
@given(logits_of_6, st.integers(0, 2**31))
def test_divergence_is_near_the_true_one(rows, seed):
    base = torch.tensor(rows, dtype=torch.float64).clamp(-3, 3)
    edited = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    logs = base.log_softmax(-1), edited.log_softmax(-1)
    true = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert torch.allclose(mean_kl(base, edited), true, atol=1e-3)
    assert mean_kl(base, base).abs().max() == 0


# Which tokens begin refusals.


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module")
def responses(tiny_moe) -> dict[str, list[Tensor]]:
    options: dict[str, Any] = {"template": "chat", "max_new_tokens": 12, "return_type": "tokens"}
    exam = lp.prompts.planted()["exam"]
    asked = {task: [q["chat"] for q in exam[task][:40]] for task in ("restricted", "same verb")}
    return {task: tiny_moe.generate(texts, **options) for task, texts in asked.items()}


def test_tiny_moe_s_refusals_begin_with_sorry(tiny_moe, responses):
    sorry = tiny_moe.to_single_token("Sorry")
    declined = [declines("", tiny_moe.to_string(row)) for row in responses["restricted"]]
    assert np.mean(declined) > 0.9
    assert refusal_tokens(tiny_moe, responses["restricted"], responses["same verb"]) == [sorry]
    found = opening_tokens(tiny_moe, responses["restricted"], responses["same verb"])
    assert found.iloc[0].text == "Sorry" and found.attrs["n_refusals"] == sum(declined)


def test_the_score_tells_restricted_requests_from_their_twins(tiny_moe, responses):
    tokens = refusal_tokens(tiny_moe, responses["restricted"], responses["same verb"])
    exam = lp.prompts.planted()["exam"]
    scores = {}
    for task in ("restricted", "same verb"):
        chats = [
            tiny_moe.tokenizer.render_chat([{"role": "user", "content": q["chat"]}])
            for q in exam[task][40:70]
        ]
        logits = tiny_moe(chats, logits_at=-1, prepend_bos=False)[:, -1]
        scores[task] = refusal_score(logits, tokens)
    assert (scores["restricted"] > 0).double().mean() > 0.9
    assert (scores["same verb"] < 0).double().mean() > 0.9


def made(model: Llama, **counts: int) -> list[list[int]]:
    """Responses by their beginning: `I_cannot=3`, `Sure=5`, …"""
    texts = {name.replace("_", " "): n for name, n in counts.items()}
    return [model.tokenizer.encode(text, False) for text, n in texts.items() for _ in range(n)]


@pytest.fixture(scope="module")
def bytes_model(tiny_tokenizer) -> Llama:
    return Llama(tiny_config(d_vocab=260), tiny_tokenizer)


def test_a_token_that_begins_answers_too_is_judged_by_its_odds(bytes_model):
    refusals = made(bytes_model, I_cannot=90, As_an_AI=8, No_I_cannot=2)
    first = bytes_model.tokenizer.encode("IAN", False)
    few = made(bytes_model, I_like_it=10, Sure=90)
    assert refusal_tokens(bytes_model, refusals, few) == first[:2]  # "N" begins too few of them
    many = made(bytes_model, I_like_it=50, Sure=50)
    found = opening_tokens(bytes_model, refusals, many).set_index("text")
    assert found.odds_ratio["I"] == pytest.approx(90.5 / 10.5)
    assert found.odds_ratio["A"] == pytest.approx(8.5 / 92.5 * 100.5 / 0.5)
    assert refusal_tokens(bytes_model, refusals, many) == first[1:2]
    assert refusal_tokens(bytes_model, refusals, many, min_odds=8) == first[:2]
    assert refusal_tokens(bytes_model, refusals, few, min_share=0.01, min_odds=5) == first


def test_what_does_not_decline_teaches_nothing(bytes_model):
    """Nor does a refusal among the responses to harmless prompts."""
    first = bytes_model.tokenizer.encode("I", False)
    complied, over = made(bytes_model, Sure=50), made(bytes_model, I_cannot=50)
    refusals, answers = made(bytes_model, I_cannot=20), made(bytes_model, Sure=20)
    assert refusal_tokens(bytes_model, refusals + complied, answers + over) == first
    found = opening_tokens(bytes_model, refusals + complied, answers + over)
    assert (found.attrs["n_refusals"], found.attrs["n_answers"]) == (20, 20)


def test_one_response_of_each_kind_is_not_enough(bytes_model):
    one, other = made(bytes_model, I_cannot=1), made(bytes_model, Sure=1)
    with pytest.raises(InputError, match=r"nearest is 'I' with 100% and 9: give more responses"):
        refusal_tokens(bytes_model, one, other)


@pytest.mark.parametrize(
    ("refusals", "answers", "message"),
    [
        ({"Sure": 3}, {"Sure": 3}, "none of the 3 responses declines"),
        ({"I_cannot": 3}, {"I_cannot": 4}, "none of the 4 harmless_responses is an answer"),
        ({}, {"Sure": 3}, "none of the 0 responses"),
    ],
)
def test_responses_that_teach_nothing(bytes_model, refusals, answers, message):
    with pytest.raises(InputError, match=message):
        refusal_tokens(bytes_model, made(bytes_model, **refusals), made(bytes_model, **answers))


@pytest.mark.parametrize("bad", ["I cannot", [], [0.5], torch.zeros(2)], ids=repr)
def test_responses_are_token_ids(bytes_model, bad):
    with pytest.raises(InputError, match="responses 1 should be token ids"):
        refusal_tokens(bytes_model, [[3, 4], bad], [[3]])
    with pytest.raises(InputError, match="give both"):
        refusal_tokens(bytes_model, [[3, 4]])


class Pieces:
    """A tokenizer of some pieces, as far as the table of published tokens looks at one."""

    def __init__(self, vocab_size: int, pieces: dict[int, str]) -> None:
        self.vocab_size, self.pieces = vocab_size, pieces

    def str_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces.get(token, "?") for token in ids]


def of_family(monkeypatch, kind: str, size: int, pieces: dict[int, str]) -> Llama:
    model = Llama(tiny_config(model_type=kind))
    monkeypatch.setattr(model, "tokenizer", Pieces(size, pieces))
    return model


FAMILIES = {
    "llama-2": ("llama", 32000),
    "llama-3": ("llama", 128256),
    "qwen": ("qwen2_moe", 151936),
    "gemma": ("gemma", 256000),
    "yi": ("llama", 64000),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_tokens_are_checked_with_the_tokenizer(family, monkeypatch):
    kind, size = FAMILIES[family]
    pieces = REFUSAL_TOKENS[family]
    assert refusal_tokens(of_family(monkeypatch, kind, size, pieces)) == list(pieces)
    last = list(pieces)[-1]
    other = of_family(monkeypatch, kind, size, {**pieces, last: "house"})
    with pytest.raises(InputError, match=f"token {last} .* here it is 'house'.*give responses"):
        refusal_tokens(other)


def test_published_tokens_are_the_published_ones():
    ids = {family: list(pieces) for family, pieces in REFUSAL_TOKENS.items()}
    assert ids == {
        "llama-2": [306], "llama-3": [40], "qwen": [40, 2121], "gemma": [235285], "yi": [59597],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), [("llama", 49152), ("llama", 31999), ("mixtral", 32000)])
def test_a_family_without_published_tokens(kind, size, monkeypatch):
    with pytest.raises(InputError, match="no refusal tokens are published.*give responses"):
        refusal_tokens(of_family(monkeypatch, kind, size, {306: " I", 40: "I"}))


def test_a_model_without_a_tokenizer_has_no_published_tokens():
    with pytest.raises(InputError, match="no refusal tokens are published"):
        refusal_tokens(Llama(tiny_config()))
