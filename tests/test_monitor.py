"""Monitors on the planted model: what they say of held-out texts, of tokens, of a generation."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import llama_probe as lp
from llama_probe.capturing import Activations, collect
from llama_probe.errors import InputError
from llama_probe.probing import fit, training
from llama_probe.probing.aggregate import HOW, Aggregate
from llama_probe.probing.monitor import Monitor
from llama_probe.probing.training import fit_monitor

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["How do I crack a vault?", "How do I paint a big door and a window?", "Hello"]
# The threshold's topics and the report's are none of the training's.
TRAIN, THRESHOLD, REPORT = (
    ["locks", "barriers", "papers", "honesty"],
    ["identity", "entry"],
    "privacy",
)


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module")
def requests() -> pd.DataFrame:
    """Requests that the model was taught to decline, and harmless twins of them."""
    exam = lp.prompts.planted()["exam"]
    return pd.DataFrame(
        {"text": one["chat"], "bad": kind == "restricted", "topic": one["topic"]}
        for kind in ("restricted", "same verb", "same object")
        for one in exam[kind]
    )


@pytest.fixture(scope="module")
def acts(model: lp.Llama, requests: pd.DataFrame) -> Activations:
    return lp.capture(model, requests, HOOK, template="chat", progress=False)


def among(acts: Activations, requests: pd.DataFrame, topics: list[str], **keep: bool) -> Any:
    chosen = requests["topic"].isin(topics)
    for column, value in keep.items():
        chosen &= requests[column] == value
    return acts.select(prompts=chosen.to_numpy())


@pytest.fixture(scope="module")
def monitor(acts: Activations, requests: pd.DataFrame) -> Monitor:
    return fit_monitor(
        among(acts, requests, TRAIN),
        "bad",
        hook=HOOK,
        groups="topic",
        negatives=among(acts, requests, THRESHOLD, bad=False),
        fpr=0.01,
    )


def test_held_out_topics_are_caught_at_the_rate_that_was_set(
    monitor: Monitor, model: lp.Llama, requests: pd.DataFrame
) -> None:
    report = requests[requests["topic"] == REPORT].reset_index(drop=True)
    scored = monitor.score(model, report.assign(n_tokens=0))  # a column with a name of ours
    assert scored["text"].tolist() == report["text"].tolist()
    assert scored["flagged"][report["bad"]].mean() >= 0.95
    assert scored["flagged"][~report["bad"]].mean() <= 0.05
    training = monitor.record["training"]
    assert training["rows"] == requests["topic"].isin(TRAIN).sum()
    assert training["groups"] == len(TRAIN)
    threshold = monitor.record["threshold"]
    assert threshold["negatives"] == (requests["topic"].isin(THRESHOLD) & ~requests["bad"]).sum()
    assert threshold["fpr_on_them"] <= 0.01


def test_a_batch_scores_as_each_prompt_alone(monitor: Monitor, model: lp.Llama) -> None:
    together = monitor.score(model, TEXTS)["score"]
    alone = [monitor.score(model, text)["score"].item() for text in TEXTS]
    assert len({len(model.to_tokens(text)[0]) for text in TEXTS}) == 3  # padding is needed
    assert np.allclose(together, alone, atol=1e-5)


def test_a_score_is_the_probe_at_the_captured_row(
    monitor: Monitor, acts: Activations, model: lp.Llama, requests: pd.DataFrame
) -> None:
    some = requests["text"][:40].tolist()
    expected = monitor.probe(acts[HOOK][:40])[:, 0].numpy()
    assert np.allclose(monitor.score(model, some)["score"], expected, atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved(
    monitor: Monitor, model: lp.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, whole = monitor.score(model, TEXTS), collect.collect

    def small(model: lp.Llama, ids: Any, *rest: Any) -> Any:
        if len(ids) > 1:
            raise MemoryError
        return whole(model, ids, *rest)

    wanted = [*TEXTS[1:], TEXTS[0]]  # not in the order of their lengths
    with monkeypatch.context() as patch:
        patch.setattr(collect, "collect", small)
        alone = monitor.score(model, wanted)
    assert np.allclose(alone["score"], together["score"][[1, 2, 0]], atol=1e-5)


def test_texts_are_fed_as_in_training(model: lp.Llama) -> None:
    """With the template and the system message that the probe was trained with."""
    texts = ["How do I crack a vault?", "How do I crack a coconut?"] * 3
    options: dict[str, Any] = {"template": "chat", "system": "Be kind."}
    acts = lp.capture(model, texts, HOOK, **options, progress=False)
    monitor = fit_monitor(acts, [True, False] * 3, hook=HOOK, probe="mass_mean")
    expected = monitor.probe(acts[HOOK])[:, 0].numpy()
    assert np.allclose(monitor.score(model, texts)["score"], expected, atol=1e-4)
    new = model.generate(texts[0], max_new_tokens=3, return_type="tokens", **options)[0]
    rows = pd.DataFrame(monitor.watch(model, texts[0], max_new_tokens=3))
    assert rows["id"][rows["new"]].tolist() == new.tolist()
    assert rows["score"][(~rows["new"]).sum() - 1] == pytest.approx(expected[0], abs=1e-4)


def test_groups_stay_together_in_the_choice_of_a_strength(
    acts: Activations, requests: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spied(*arguments: Any, **options: Any) -> Any:
        seen.append(options["groups"].tolist())
        return fit(*arguments, **options)

    monkeypatch.setattr(training, "fit", spied)
    some = among(acts, requests, TRAIN)
    for groups in ("topic", None):
        fit_monitor(some, "bad", hook=HOOK, groups=groups, strength=1.0)
    prompts = some.index["prompt"].to_numpy()
    assert seen == [requests["topic"][prompts].tolist(), prompts.tolist()]


@contextmanager
def counted(model: lp.Llama) -> Iterator[Counter[int]]:
    """How often each block is begun meanwhile."""
    seen: Counter[int] = Counter()
    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: seen.update([layer]))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_nothing_runs_above_the_hook(monitor: Monitor, model: lp.Llama) -> None:
    with counted(model) as seen:
        monitor.score(model, TEXTS)
        monitor.tokens(model, TEXTS[0])
    assert seen == {0: 2, 1: 2}


@pytest.mark.parametrize("how", HOW)
def test_aggregates_by_their_definition(how: str) -> None:
    scores = np.random.default_rng(0).normal(size=9)
    window, decay = 3, 0.8

    def by_hand(x: list[float]) -> float:
        averages = [x[0]]
        for one in x[1:]:
            averages.append(decay * averages[-1] + (1 - decay) * one)
        width = min(window, len(x))
        means = [sum(x[i : i + width]) / width for i in range(len(x) - width + 1)]
        return {
            "last": x[-1],
            "mean": sum(x) / len(x),
            "max": max(x),
            "rolling": max(means),
            "ema": max(averages),
        }[how]

    expected = [by_hand(scores[:n].tolist()) for n in range(1, 10)]
    assert np.allclose(Aggregate(how, window, decay).running(scores), expected)


@pytest.fixture(scope="module")
def by_token(acts: Activations, monitor: Monitor) -> Monitor:
    """The same probe, over all tokens but the first."""
    return replace(monitor, positions="1:", aggregate=Aggregate("rolling", 3), threshold=0.0)


def test_tokens_and_text_agree(by_token: Monitor, monitor: Monitor, model: lp.Llama) -> None:
    for one in (by_token, monitor):
        text, tokens = one.score(model, TEXTS), one.tokens(model, TEXTS[1])
        assert len(tokens) == text["n_tokens"][1]
        assert tokens["running"].iloc[-1] == pytest.approx(text["score"][1], abs=1e-4)
        assert tokens["flagged"].iloc[-1] == text["flagged"][1]
    tokens = by_token.tokens(model, TEXTS[1])
    assert tokens["token"].tolist()[:3] == ["<|begin_of_text|>", "<|header_start|>", "user"]
    assert np.isnan(tokens["running"][0])
    expected = by_token.aggregate.running(tokens["score"].to_numpy()[1:])
    assert np.allclose(tokens["running"][1:], expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}, {"stop_tokens": []}],
    ids=["greedy", "sampled", "no stop"],
)
@pytest.mark.parametrize("hook", [HOOK, "blocks.3.hook_resid_post", "blocks.2.attn.hook_z"])
def test_watching_changes_nothing_and_scores_as_a_full_pass(
    by_token: Monitor, model: lp.Llama, options: dict[str, Any], hook: str
) -> None:
    monitor = replace(by_token, hook=hook)
    with counted(model) as plain:
        new = model.generate(
            TEXTS[0], max_new_tokens=12, template="chat", return_type="tokens", **options
        )[0]
    with counted(model) as seen:
        rows = pd.DataFrame(monitor.watch(model, TEXTS[0], max_new_tokens=12, **options))
    assert seen == plain
    assert rows["id"][rows["new"]].tolist() == new.tolist()
    assert rows["pos"].tolist() == list(range(len(rows)))
    assert np.isnan(rows["score"].iloc[-1]) and rows["score"].iloc[:-1].notna().all()
    whole = monitor.tokens(model, torch.tensor(rows["id"].tolist()[:-1]))
    assert whole["token"].tolist() == rows["token"].tolist()[:-1]
    for column in ("score", "running"):
        assert np.allclose(rows[column][:-1], whole[column], atol=1e-4, equal_nan=True)
    assert rows["running"].iloc[-1] == rows["running"].iloc[-2]
    assert (rows["flagged"] == (rows["running"] > 0)).all()


def test_a_watch_that_is_left_runs_no_further(by_token: Monitor, model: lp.Llama) -> None:
    with counted(model) as seen:
        for row in by_token.watch(model, TEXTS[0], max_new_tokens=12):
            assert not any(point.listening for point in model.hook_points())
            if row.new:
                break
    assert seen[0] == 2  # the prompt, and the first new token


def test_the_response_alone_counts(by_token: Monitor, model: lp.Llama) -> None:
    monitor = replace(by_token, positions="response", aggregate=Aggregate("mean"))
    rows = pd.DataFrame(monitor.watch(model, TEXTS[0], max_new_tokens=5))
    assert rows["running"][~rows["new"]].isna().all()
    answer = "".join(rows["token"][rows["new"]][:-1])
    scored = monitor.score(
        model, pd.DataFrame({"text": [TEXTS[0]], "said": [answer]}), response="said"
    )
    assert scored["score"].item() == pytest.approx(rows["running"].iloc[-1], abs=1e-4)


def test_positions_from_the_end_cannot_be_watched(by_token: Monitor, model: lp.Llama) -> None:
    monitor = replace(by_token, positions="-3:")
    assert monitor.tokens(model, TEXTS[0])["running"].notna().sum() == 3
    with pytest.raises(InputError, match="count from the end of a finished text"):
        monitor.watch(model, TEXTS[0])


def test_a_probe_of_means_scores_by_the_mean_of_its_tokens(
    model: lp.Llama, requests: pd.DataFrame
) -> None:
    some = requests.groupby(["bad", "topic"]).head(5)
    pooled = lp.capture(model, some, HOOK, slice(1, None), pool="mean", template="chat")
    monitor = fit_monitor(pooled, "bad", hook=HOOK, probe="mass_mean")
    assert (monitor.positions, monitor.aggregate.how) == ("1:", "mean")
    expected = monitor.probe(pooled[HOOK])[:, 0].numpy()
    assert np.allclose(monitor.score(model, some)["score"], expected, atol=1e-4)


def test_a_threshold_flags_no_more_than_was_wanted(monitor: Monitor) -> None:
    for n, fpr in ((100, 0.01), (250, 0.01), (333, 0.1), (1000, 0.001)):
        scores = np.random.default_rng(n).normal(size=n)
        found = monitor.with_threshold(scores, fpr)
        assert (scores > found.threshold).sum() == int(n * fpr)
    ties = monitor.with_threshold(np.ones(100), 0.01)
    assert ties.threshold == 1 and ties.record["threshold"]["fpr_on_them"] == 0


def test_the_threshold_itself_is_not_flagged(monitor: Monitor, model: lp.Llama) -> None:
    score = monitor.score(model, TEXTS[0])["score"].item()
    for threshold, flagged in ((score, False), (score - 1e-3, True)):
        at = replace(monitor, threshold=threshold)
        assert at.score(model, TEXTS[0])["flagged"].item() == flagged


@pytest.mark.parametrize(
    ("n", "fpr", "says"),
    [(99, 0.01, "at least 100 negatives, but there are 99"), (500, 0.001, "at least 1000")],
)
def test_too_few_negatives(monitor: Monitor, n: int, fpr: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        monitor.with_threshold(np.arange(float(n)), fpr)


def test_the_threshold_is_not_set_on_what_was_trained_on(
    acts: Activations, requests: pd.DataFrame
) -> None:
    negatives = among(acts, requests, ["honesty", "entry"], bad=False)
    with pytest.raises(InputError, match="of the negatives were trained on"):
        fit_monitor(among(acts, requests, TRAIN), "bad", hook=HOOK, negatives=negatives)


def test_a_monitor_without_a_threshold_flags_nothing(monitor: Monitor, model: lp.Llama) -> None:
    plain = replace(monitor, threshold=None)
    assert plain.score(model, TEXTS)["flagged"].isna().all()
    assert next(plain.watch(model, TEXTS[0], max_new_tokens=1)).flagged is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hook": "blocks.1.hook_resid_pots"}, "did you mean"),
        ({"labels": "topic"}, "two classes, but the labels have 7"),
        ({"labels": "bda"}, "no column 'bda'; did you mean 'bad'"),
        ({"labels": [0, 1]}, "labels: there are 2 for 1065 prompts"),
        ({"aggregate": "max"}, "there is one token to score"),
        ({"aggregate": "median", "positions": "all"}, "aggregate is 'median'"),
        ({"at": "all"}, "at is 'all', but there are -1"),
        ({"probe": "forest"}, "probe is 'forest'"),
    ],
)
def test_what_cannot_be_used(acts: Activations, changes: dict[str, Any], says: str) -> None:
    arguments = {"labels": "bad", "hook": HOOK, "probe": "mass_mean", **changes}
    with pytest.raises(InputError, match=says):
        fit_monitor(acts, **arguments)


def test_activations_of_another_size_are_no_score(monitor: Monitor, model: lp.Llama) -> None:
    wrong = replace(monitor, hook="blocks.1.mlp.hook_router_logits")
    with pytest.raises(InputError, match="have 8 dimensions, but the probe was fitted on 128"):
        wrong.score(model, TEXTS)


def test_activations_that_overflow_are_no_score(monitor: Monitor, model: lp.Llama) -> None:
    broken = [(HOOK, lambda tensor, hook: tensor * torch.nan)]
    with model.hooks(broken), pytest.raises(InputError, match="is not finite"):
        monitor.score(model, TEXTS)
    with model.hooks(broken), pytest.raises(InputError, match="is not finite"):
        next(monitor.watch(model, TEXTS[0]))
