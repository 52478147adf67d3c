"""Attention summaries of heads, against loops over the pattern and TransformerLens' detector."""

import math

import numpy as np
import pytest
import tiny
import torch
from transformer_lens.head_detector import (
    compute_head_attention_similarity_score,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

import llama_probe as lp
from llama_probe.errors import InputError

REPEATED = torch.tensor([9, 5, 7, 11, 5, 7, 9, 9, 30])
METRICS = ["entropy", "previous_token", "first_token", "duplicate_token", "induction"]


def pattern_of(model, tokens):
    _, cache = model.run_with_cache(tokens[None], names_filter="*.hook_pattern")
    return torch.stack([pattern[0] for pattern in cache.values()])  # layer head query key


def by_loop(pattern, tokens):
    """The five scores of one head, by the words of the docstring."""
    n = len(tokens)
    looks = {
        "previous_token": lambda q, k: k == q - 1,
        "first_token": lambda q, k: k == 0,
        "duplicate_token": lambda q, k: tokens[k] == tokens[q],
        "induction": lambda q, k: k > 0 and tokens[k - 1] == tokens[q],
    }
    scores = {}
    for metric, wanted in looks.items():
        keys = {q: [k for k in range(q) if wanted(q, k)] for q in range(n)}
        weights = [sum(pattern[q][k] for k in ks) for q, ks in keys.items() if ks]
        scores[metric] = sum(weights) / len(weights)
    rows = [[w for w in row if w > 0] for row in pattern[1:]]
    scores["entropy"] = sum(-w * math.log(w) for row in rows for w in row) / (n - 1)
    return scores


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3-moe", "llama4-scout"])
def test_scores_are_those_of_a_loop(family):
    model = tiny.make(family)
    frame = lp.head_scores(model, REPEATED)
    assert list(frame) == ["layer", "head", "metric", "value", "ci_low", "ci_high", "n"]
    assert len(frame) == model.cfg.n_layers * model.cfg.n_heads * 5
    patterns = pattern_of(model, REPEATED).tolist()
    for (layer, head), rows in frame.groupby(["layer", "head"]):
        expected = by_loop(patterns[layer][head], REPEATED.tolist())
        assert rows.metric.tolist() == METRICS
        assert dict(zip(rows.metric, rows.value, strict=True)) == pytest.approx(expected, rel=1e-4)


def test_scores_are_transformer_lens_own_but_for_the_queries_that_count():
    # Theirs divides by all queries, ours by those that have a key to find.
    model = tiny.make("llama-gqa")
    tokens = tiny.tokens(batch=1, length=10)[0].repeat(2)
    grids = {
        "previous_token": get_previous_token_head_detection_pattern(tokens[None]),
        "duplicate_token": get_duplicate_token_head_detection_pattern(tokens[None]),
        "induction": get_induction_head_detection_pattern(tokens[None]),
    }
    frame = lp.head_scores(model, tokens).set_index(["metric", "layer", "head"]).value
    for metric, grid in grids.items():
        counting = int(grid.any(dim=1).sum())
        for (layer, head), value in frame[metric].items():
            theirs = compute_head_attention_similarity_score(
                pattern_of(model, tokens)[layer, head],
                grid,
                exclude_bos=False,
                exclude_current_token=False,
                error_measure="mul",
            )
            assert value * counting / 20 == pytest.approx(theirs, rel=1e-4)


def test_a_perfect_head_scores_1_and_another_0():
    model = tiny.make("llama-gqa")
    n, length = 3, 8

    def looks_at(keys):
        return torch.nn.functional.one_hot(torch.tensor(keys), 2 * length).float()

    induction = looks_at([0] * length + list(range(1, length + 1)))
    previous = looks_at([0, *range(2 * length - 1)])
    alike = torch.ones(2 * length, 2 * length).tril()
    alike = alike / alike.sum(dim=1, keepdim=True)

    def put_in(pattern, hook):
        pattern[:, 0], pattern[:, 1], pattern[:, 2] = induction, previous, alike
        return pattern

    with model.hooks([("blocks.1.attn.hook_pattern", put_in)]):
        frame = lp.head_scores(model, n=n, length=length)
    values = frame[frame.layer == 1].pivot(index="head", columns="metric", values="value")
    assert values.induction[0] == values.previous_token[1] == 1
    assert values.induction[1] == values.duplicate_token[0] == values.entropy[1] == 0
    uniform = np.mean([math.log(k) for k in range(2, 2 * length + 1)])
    assert values.entropy[2] == pytest.approx(uniform, rel=1e-5)
    untouched = frame[frame.layer == 0]
    assert (untouched.query("metric == 'induction'").value < 0.9).all()


def test_a_mask_that_hides_the_earlier_occurrence_gives_0():
    model = tiny.make("llama4-scout")  # three layers see blocks of 16, the last sees everything
    assert model.cfg.masks[-1] == "full" and model.cfg.window == 16
    frame = lp.head_scores(model, n=2, length=16)
    chunked = frame[frame.metric.isin(["duplicate_token", "induction"]) & (frame.layer < 3)]
    assert (chunked.query("metric == 'duplicate_token'").value == 0).all()
    # After the last token came the repeat, which it sees: that one of 16 queries may score.
    assert (chunked.query("metric == 'induction'").value < 1 / 16).all()
    seen = lp.head_scores(model, n=2, length=8)
    assert (seen.value > 0).all()
    assert (frame[frame.layer == 3].value > 0).all()


def test_random_tokens_depend_on_the_seed_alone():
    model = tiny.make("llama-gqa")
    first, again, other = (lp.head_scores(model, n=2, length=6, seed=s) for s in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)


def test_intervals_are_over_sequences():
    model = tiny.make("llama-gqa")
    frame = lp.head_scores(model, n=5, length=6)
    assert (frame.n == 5).all()
    assert ((frame.ci_low <= frame.value) & (frame.value <= frame.ci_high)).all()
    assert (frame.ci_low < frame.ci_high).any()
    one = lp.head_scores(model, n=1, length=6)
    assert (one.n == 1).all() and one.value.notna().all()
    assert one.ci_low.isna().all() and one.ci_high.isna().all()


def test_what_repeats_nowhere_is_missing(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    repeats = ["duplicate_token", "induction"]
    frame = lp.head_scores(model, ["abcd", "abab", "abcab"])
    assert (frame[frame.metric.isin(repeats)].n == 2).all()
    assert (frame[~frame.metric.isin(repeats)].n == 3).all()
    assert frame.notna().all(axis=None)
    none = lp.head_scores(model, "abcd")
    assert none[none.metric.isin(repeats)].value.isna().all()
    assert (none[none.metric.isin(repeats)].n == 0).all()
    assert none[~none.metric.isin(repeats)].value.notna().all()
    single = lp.head_scores(model, "abab").value
    assert lp.head_scores(model, ["abab", "abab"]).value.tolist() == single.tolist()


def test_looking_at_oneself_is_no_induction():
    # In "aa" it is the second token itself that came right after the first.
    frame = lp.head_scores(tiny.make("llama-gqa"), torch.tensor([5, 5]))
    scores = frame.groupby("metric").value
    assert scores.count()["induction"] == 0
    assert scores.count()["duplicate_token"] > 0


def test_padding_is_no_key(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    padded = model.to_tokens(["abab", "abcabcabc"])
    assert padded[0, 0] == tiny_tokenizer.eos_token_id
    assert lp.head_scores(model, padded).equals(lp.head_scores(model, ["abab", "abcabcabc"]))


def test_random_tokens_are_no_special_ones_and_come_after_bos(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size, head_dim=4)
    model.tokenizer = tiny_tokenizer
    n_text = tiny_tokenizer.vocab_size - 2
    model.cfg = model.cfg.but(n_ctx=2 * n_text + 2)
    assert lp.head_scores(model, n=1, length=n_text).n.max() == 1
    with pytest.raises(InputError, match=f"the vocabulary has {n_text} such tokens"):
        lp.head_scores(model, n=1, length=n_text + 1)
    tiny_tokenizer.add_bos = True
    try:
        with pytest.raises(InputError, match="a sequence has 519 tokens, but the context is 518"):
            lp.head_scores(model, n=1, length=n_text + 1)
    finally:
        tiny_tokenizer.add_bos = False


@pytest.mark.slow
def test_a_real_model_has_heads_of_each_kind(smollm2):
    frame = lp.head_scores(smollm2, n=4, length=24)
    best = frame[frame.metric != "entropy"].groupby("metric").ci_low.max()
    assert (best > 0.6).all(), best


def test_bad_input_gets_a_sentence():
    model = tiny.make("llama-gqa")
    with pytest.raises(InputError, match="n is 0 and length 32"):
        lp.head_scores(model, n=0)
    with pytest.raises(InputError, match="a sequence has 600 tokens, but the context is 512"):
        lp.head_scores(model, length=300)
    with pytest.raises(InputError, match="prompt 0 has one token"):
        lp.head_scores(model, torch.tensor([5]))
    with pytest.raises(InputError, match="the list is empty"):
        lp.head_scores(model, [])
    with pytest.raises(InputError, match="no tokenizer"):
        lp.head_scores(model, "text")
