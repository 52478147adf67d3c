"""Routing of mixtures of experts: each measure against a plain loop, and what was planted."""

import random
from collections import Counter, defaultdict
from math import log, log2
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy import stats

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.routing import (
    Routes,
    contrast,
    expert_contrast,
    route_stability,
    routes_of,
    routing_report,
    specialisation,
)
from llama_probe.routing.contrast import _null_deviation, _units
from llama_probe.routing.resampling import ratio_interval, shuffled_within
from llama_probe.routing.specialisation import _Units as _LabelUnits
from tiny_moe import exam

LENGTHS = (7, 12, 3, 9, 12, 1)
ROWS = [
    tiny.tokens(batch=1, length=length, seed=seed)[0].tolist()
    for seed, length in enumerate(LENGTHS)
]
FAMILIES = ("mixtral", "qwen2-moe", "llama4-top2", "llama4-maverick")
every_family = pytest.mark.parametrize("family", FAMILIES)


class Seen:
    """What a family does with each prompt by itself, token by token, in plain lists."""

    def __init__(self, family: str) -> None:
        self.model = tiny.make(family)
        moe = self.model.cfg.moe
        assert moe is not None
        self.moe, self.k, self.n_experts = moe, moe.top_k, moe.n_experts
        self.layers = [i for i, is_moe in enumerate(self.model.cfg.moe_layers) if is_moe]
        names = ["*.mlp.hook_router*", "*.mlp.hook_expert_*", "*.hook_mlp_out"]
        names += ["*.mlp.hook_shared_out"] * bool(moe.d_shared)
        self.caches = [
            self.model.run_with_cache(torch.tensor([row]), names_filter=names)[1] for row in ROWS
        ]

    def per_token(self, name: str, layer: int) -> list[list[Any]]:
        """For each prompt, for each token, what a hook passed on."""
        return [cache[name, layer][0].tolist() for cache in self.caches]

    def flat(self, name: str, layer: int) -> list[Any]:
        return [token for prompt in self.per_token(name, layer) for token in prompt]

    def scores(self, layer: int) -> list[list[float]]:
        rows = []
        for logits in self.flat("router_logits", layer):
            if self.moe.rule == "softmax":
                parts = np.exp(logits)
            else:
                parts = 1 / (1 + np.exp(-np.array(logits)))
            rows.append((parts / parts.sum()).tolist())
        return rows


@pytest.fixture(scope="module", params=FAMILIES)
def seen(request: pytest.FixtureRequest) -> Seen:
    return Seen(request.param)


@pytest.fixture(scope="module")
def routes(seen: Seen) -> Routes:
    """Of padded batches: 6 prompts of 5 lengths in batches of 24 tokens at most."""
    return routes_of(seen.model, ROWS, batch_tokens=24, contributions=True, logits=True)


def test_routes_are_those_of_each_prompt_by_itself(seen: Seen, routes: Routes) -> None:
    assert routes.layers == tuple(seen.layers)
    assert routes.tokens.tolist() == [token for row in ROWS for token in row]
    assert routes.prompt.tolist() == [i for i, row in enumerate(ROWS) for _ in row]
    assert routes.pos.tolist() == [pos for row in ROWS for pos in range(len(row))]
    assert routes.logits is not None
    for index, layer in enumerate(seen.layers):
        assert routes.experts[index].tolist() == seen.flat("expert_indices", layer)
        for ours, name in ((routes.weights, "expert_weights"), (routes.logits, "router_logits")):
            np.testing.assert_allclose(ours[index], seen.flat(name, layer), atol=2e-5)
        for token, scores in enumerate(seen.scores(layer)):
            entropy = -sum(p * log(p) for p in scores) / log(seen.n_experts)
            assert routes.entropy[index, token] == pytest.approx(entropy, abs=1e-5)
            first, second, *_ = sorted(scores, reverse=True)
            assert routes.margin[index, token] == pytest.approx(first - second, abs=1e-5)


def test_batches_change_nothing(seen: Seen, routes: Routes) -> None:
    alone = routes_of(seen.model, ROWS, batch_tokens=1)
    np.testing.assert_array_equal(alone.experts, routes.experts)
    np.testing.assert_allclose(alone.weights, routes.weights, atol=2e-5)
    assert alone.logits is None and alone.norm_share is None


def test_contributions_sum_to_the_update(seen: Seen, routes: Routes) -> None:
    assert routes.norm_share is not None and routes.signed_share is not None
    np.testing.assert_allclose(routes.signed_share.sum(axis=2), 1, atol=1e-4)
    for index, layer in enumerate(seen.layers):
        token = 0
        for cache in seen.caches:
            parts = cache["expert_out", layer][0]
            if seen.moe.d_shared:
                parts = torch.cat([parts, cache["shared_out", layer][0][:, None]], dim=1)
            updates = cache["mlp_out", layer][0]
            torch.testing.assert_close(parts.sum(dim=1), updates, atol=1e-5, rtol=1e-5)
            for written, update in zip(parts, updates, strict=True):
                norm = [float(part.norm() / update.norm()) for part in written]
                signed = [float(part.dot(update) / update.dot(update)) for part in written]
                np.testing.assert_allclose(routes.norm_share[index, token], norm, rtol=1e-3)
                np.testing.assert_allclose(routes.signed_share[index, token], signed, atol=1e-3)
                token += 1


# --- the report ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(routes: Routes) -> Any:
    return routing_report(routes, labels=["a", "b", "a", "b", "b", "a"])


def keyed(frame: pd.DataFrame, *keys: str) -> dict[Any, Any]:
    """Rows by the values of some columns."""
    assert not frame.duplicated(list(keys)).any()
    return {
        tuple(row[key] for key in keys): row for row in frame.to_dict("records")
    }  # fmt: skip


def test_load(seen: Seen, report: Any) -> None:
    n = sum(LENGTHS)
    rows = keyed(report.load, "layer", "expert", "metric")
    assert len(rows) == 2 * len(seen.layers) * seen.n_experts
    for layer in seen.layers:
        used, weight = Counter(), Counter()
        for chosen, weights in zip(
            seen.flat("expert_indices", layer), seen.flat("expert_weights", layer), strict=True
        ):
            used.update(chosen)
            for expert, w in zip(chosen, weights, strict=True):
                weight[expert] += w
        for expert in range(seen.n_experts):
            load = rows[layer, expert, "load"]
            assert load["value"] == pytest.approx(used[expert] / n)
            assert load["ci_low"] <= load["value"] <= load["ci_high"]
            assert (load["uniform"], load["n"]) == (seen.k / seen.n_experts, n)
            weighted = rows[layer, expert, "weighted_load"]
            share = weight[expert] / sum(weight.values())
            assert weighted["value"] == pytest.approx(share, abs=1e-5)
            assert weighted["uniform"] == 1 / seen.n_experts


def test_load_by_label(seen: Seen, report: Any) -> None:
    rows = keyed(report.by_label, "layer", "label", "expert")
    for layer in seen.layers:
        prompts = seen.per_token("expert_indices", layer)
        for label, members in (("a", (0, 2, 5)), ("b", (1, 3, 4))):
            tokens = [token for member in members for token in prompts[member]]
            for expert in range(seen.n_experts):
                row = rows[layer, label, expert]
                share = sum(expert in token for token in tokens) / len(tokens)
                assert (row["value"], row["n"]) == (pytest.approx(share), len(tokens))


def test_router(seen: Seen, report: Any) -> None:
    rows = keyed(report.router, "layer", "metric")
    named = "softmax" if seen.moe.rule == "softmax" else "normalised sigmoid"
    for layer in seen.layers:
        scores = seen.scores(layer)
        entropies = [-sum(p * log(p) for p in row) / log(len(row)) for row in scores]
        margins = [sorted(row)[-1] - sorted(row)[-2] for row in scores]
        for metric, values in (("entropy", entropies), ("margin", margins)):
            row = rows[layer, metric]
            assert row["value"] == pytest.approx(np.mean(values), abs=1e-5)
            assert row["sd"] == pytest.approx(np.std(values), abs=1e-5)
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["scores"] == named


def test_coactivation(seen: Seen, report: Any) -> None:
    if seen.k == 1:
        assert report.coactivation is None
        return
    n, k, n_experts = sum(LENGTHS), seen.k, seen.n_experts
    rows = keyed(report.coactivation, "layer", "expert", "other")
    assert len(rows) == len(seen.layers) * n_experts * (n_experts - 1)
    pairs = k * (k - 1) / (n_experts * (n_experts - 1))
    for (layer, expert, other), row in rows.items():
        tokens = seen.flat("expert_indices", layer)
        one = sum(expert in token for token in tokens)
        two = sum(other in token for token in tokens)
        both = sum(expert in token and other in token for token in tokens)
        if one and two:
            assert row["value"] == pytest.approx((both / n) / (one / n * two / n))
            assert row["share"] == pytest.approx(both / one)
        else:
            assert np.isnan(row["value"])
        assert row["n"] == both
        assert row["baseline"] == pytest.approx(pairs / (k / n_experts) ** 2)


def test_transition(seen: Seen, report: Any) -> None:
    rows = keyed(report.transition, "layer", "expert", "next_expert")
    assert len(rows) == (len(seen.layers) - 1) * seen.n_experts**2
    for here, there in zip(seen.layers, seen.layers[1:], strict=False):
        tokens = seen.flat("expert_indices", here)
        following = seen.flat("expert_indices", there)
        for i in range(seen.n_experts):
            for j in range(seen.n_experts):
                row = rows[here, i, j]
                assert (row["next_layer"], row["n"]) == (there, sum(i in t for t in tokens))
                of_i = [t for token, t in zip(tokens, following, strict=True) if i in token]
                if not of_i:
                    assert np.isnan(row["value"])
                    continue
                share = sum(j in token for token in of_i) / len(of_i)
                assert row["value"] == pytest.approx(share)
                load = sum(j in token for token in following) / len(following)
                assert not load or row["lift"] == pytest.approx(share / load)


def overlap(one: list[int], other: list[int]) -> float:
    return len(set(one) & set(other)) / len(one)


def test_persistence(seen: Seen, report: Any) -> None:
    rows = keyed(report.persistence, "layer", "metric")
    for layer in seen.layers:
        prompts = seen.per_token("expert_indices", layer)
        together, alike = [], []
        for prompt in prompts:
            together += [overlap(*pair) for pair in zip(prompt, prompt[1:], strict=False)]
            every = [
                overlap(one, other)
                for i, one in enumerate(prompt)
                for j, other in enumerate(prompt)
                if i != j
            ]
            alike += [np.mean(every)] * (len(prompt) - 1) if every else []
        tokens = [token for prompt in prompts for token in prompt]
        anything = [
            overlap(one, other)
            for i, one in enumerate(tokens)
            for j, other in enumerate(tokens)
            if i != j
        ]
        for metric, value in (
            ("previous_token", np.mean(together)),
            ("same_prompt", np.mean(alike)),
            ("order", np.mean(together) - np.mean(alike)),
            ("any_prompt", np.mean(anything)),
        ):
            assert rows[layer, metric]["value"] == pytest.approx(value)
            assert rows[layer, metric]["n"] == sum(LENGTHS) - len(LENGTHS)


def test_contributions_by_expert(seen: Seen, routes: Routes, report: Any) -> None:
    frame = report.contributions
    assert routes.norm_share is not None and routes.signed_share is not None
    n = sum(LENGTHS)
    for metric, shares in (("norm", routes.norm_share), ("signed", routes.signed_share)):
        for index, layer in enumerate(seen.layers):
            own = frame[(frame.layer == layer) & (frame.metric == metric)]
            total = defaultdict(list)
            for chosen, values in zip(routes.experts[index], shares[index], strict=True):
                for expert, value in zip(chosen, values, strict=False):
                    total[int(expert)].append(float(value))
            for row in own[own.kind == "expert"].itertuples():
                assert row.n == len(total[row.expert])
                if total[row.expert]:
                    assert row.value == pytest.approx(np.mean(total[row.expert]), abs=1e-5)
                assert row.share == pytest.approx(sum(total[row.expert]) / n, abs=1e-5)
            shared = own[own.kind == "shared"]
            assert len(shared) == bool(seen.moe.d_shared)
            if len(shared):
                assert shared.value.item() == pytest.approx(shares[index, :, -1].mean(), abs=1e-5)
                assert shared.expert.isna().all()
            if metric == "signed":
                assert own["share"].sum() == pytest.approx(1, abs=1e-4)


def test_a_report_of_a_model_is_that_of_its_routes() -> None:
    model = tiny.make("llama4-top2")
    ours = routing_report(model, ROWS, contributions=True)
    theirs = routing_report(routes_of(model, ROWS, contributions=True))
    for name in ("load", "router", "persistence", "coactivation", "transition", "contributions"):
        pd.testing.assert_frame_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.by_label is None and routing_report(model, ROWS).contributions is None


def test_one_prompt_has_no_interval_and_one_layer_no_transition() -> None:
    model = tiny.make("mixtral", num_hidden_layers=1)
    report = routing_report(model, torch.tensor([ROWS[0]]))
    assert report.load.ci_low.isna().all() and report.load.value.notna().all()
    assert report.transition is None
    alone = routing_report(model, [[5]]).persistence
    assert alone.value.isna().all()  # a single token has no other


def test_one_expert_has_nothing_to_choose() -> None:
    model = tiny.make("mixtral", num_local_experts=1, num_experts_per_tok=1)
    router = routing_report(model, ROWS).router.groupby("metric").value.max()
    assert router["entropy"] == 0 and router["margin"] == 1


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    draw = np.random.default_rng(1)
    parts, wholes = draw.random((30, 2)), 1 + draw.random((30, 1))
    ratio, low, high = ratio_interval(parts, wholes, 0)
    again = np.random.default_rng(2)
    picks = [again.integers(30, size=30) for _ in range(4000)]
    ratios = [parts[pick].sum(axis=0) / wholes[pick].sum() for pick in picks]
    np.testing.assert_allclose(ratio, parts.sum(axis=0) / wholes.sum())
    np.testing.assert_allclose((low, high), np.quantile(ratios, [0.025, 0.975], axis=0), atol=0.01)


# --- prompts, edits, errors ----------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


def test_padding_is_left_out_of_texts_and_tokens(model: lp.Llama) -> None:
    texts = ["12+30=42;", "The capital of France is Paris.", "2+2="]
    of_texts = routes_of(model, texts)
    padded = model.to_tokens(texts)
    assert (padded[:, 0] == model.pad_token_id).any()
    rows = [model.to_tokens(text)[0].tolist() for text in texts]
    for same in (padded, padded.tolist(), rows):
        other = routes_of(model, same)
        np.testing.assert_array_equal(other.experts, of_texts.experts)
        np.testing.assert_array_equal(other.tokens, of_texts.tokens)
    assert of_texts.lengths.tolist() == [len(row) for row in rows]
    one = routes_of(model, texts[1])
    np.testing.assert_array_equal(one.experts, of_texts.experts[:, of_texts.prompt == 1])


def test_edits_in_place_are_seen(model: lp.Llama) -> None:
    def third(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.full_like(indices, 3)

    with model.hooks([("blocks.1.mlp.hook_expert_indices", third)]):
        load = routing_report(model, ["12+30=42;"]).load
    own = load[(load.layer == 1) & (load.metric == "load")]
    assert own.value.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_what_cannot_be_used_gets_a_sentence(model: lp.Llama) -> None:
    dense = tiny.make("llama-gqa")
    routes = routes_of(model, ["a b", "c d", "e f"])
    for wrong, says in (
        (lambda: routes_of(dense, ROWS), "no layer of this model is a mixture"),
        (lambda: routes_of(model, []), "no prompt"),
        (lambda: routes_of(model, ["a", "b"], ["x"]), "1 labels for 2 prompts"),
        (lambda: routes_of(model, ["a", "b"], ["x", None]), "label of prompt 1 is missing"),
        (lambda: routing_report(model), "prompts are missing"),
        (lambda: routing_report(routes, ["a"]), "Routes already"),
        (lambda: specialisation(routes), "labels are missing"),
        (lambda: specialisation(routes, None, ["x"] * 3), "1 different labels"),
        (lambda: specialisation(routes, None, list("xyz")), "3 different labels"),
        (lambda: specialisation(routes, None, list("xxy"), permutations=0), "permutations is 0"),
        (lambda: expert_contrast(model, ["a"], ["b", "c"]), "1 and 2 prompts"),
        (lambda: expert_contrast(model, ["a", "b"], ["b", "c", "d"], pairs=True), "pairs is set"),
        (lambda: expert_contrast(model, routes, routes, permutations=0), "permutations is 0"),
        (lambda: expert_contrast(model, routes, made([[0], [1]])), "of models that differ"),
        (
            lambda: expert_contrast(model, routes, routes, topics=(list("xyz"), list("uvw"))),
            "no topic in common",
        ),
        (lambda: expert_contrast(model, routes, routes, topics=(["x"], ["y"])), "3 and 3 topics"),
        (
            lambda: expert_contrast(model, routes, routes, (["x", "x", None], ["x"] * 3)),
            "a topic is missing",
        ),
        (
            lambda: expert_contrast(model, routes, routes, (list("xxy"), list("xyx")), pairs=True),
            "topics of a pair differ",
        ),
        (lambda: route_stability(model, ["a"], ["b"]), "1 prompts and 1 paraphrases"),
        (lambda: route_stability(model, ["a", "b"], ["b", "c", "d"]), "2 prompts and 3"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()


# --- paraphrases ---------------------------------------------------------------------------


def test_route_stability_against_a_plain_loop() -> None:
    model = tiny.make("mixtral")
    others = [row[::-1] for row in ROWS]
    frame = keyed(route_stability(model, ROWS, others), "layer", "prompt")
    uses = [routes_of(model, rows).shares() / 2 for rows in (ROWS, others)]
    for layer in range(3):
        for i in range(len(ROWS)):
            overlaps = [
                sum(min(uses[0][layer, i, e], uses[1][layer, j, e]) for e in range(6))
                for j in range(len(ROWS))
            ]
            own = overlaps.pop(i)
            row = frame[layer, i]
            assert row["value"] == pytest.approx(own)
            assert row["baseline"] == pytest.approx(np.mean(overlaps))
            beats = [0.5 if abs(own - x) < 1e-9 else float(own > x) for x in overlaps]
            assert row["above"] == pytest.approx(np.mean(beats))


def test_paraphrases_of_facts_keep_their_route(model: lp.Llama) -> None:
    countries = ("France", "Spain", "Italy")
    prompts = [f"The capital of {c} is" for c in countries] + ["12+30=", "45+11=", "77+20="]
    others = [f"{c} has its capital in" for c in countries] + ["30+12=", "11+45=", "20+77="]
    frame = route_stability(model, prompts, others)
    planted = frame[frame.layer == lp.prompts.planted()["planted_layer"]]
    assert (planted.value > planted.baseline + 0.1).all()


# --- specialisation ------------------------------------------------------------------------


def information(pairs: list[tuple[Any, Any]]) -> float:
    """I(x; y) in bits, by its definition."""
    n = len(pairs)
    both, left, right = Counter(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    return sum(count / n * log2(count * n / (left[x] * right[y])) for (x, y), count in both.items())


def informations(
    tokens: list[int], experts: list[list[int]], labels: list[Any]
) -> dict[str, float]:
    rows = [
        (token, expert, label)
        for token, chosen, label in zip(tokens, experts, labels, strict=True)
        for expert in chosen
    ]
    groups = defaultdict(list)
    for token, expert, label in rows:
        groups[token].append((expert, label))
    return {
        "mutual_information": information([(expert, label) for _, expert, label in rows]),
        "given_token": sum(len(g) / len(rows) * information(g) for g in groups.values()),
        "by_token": information([(expert, token) for token, expert, _ in rows]),
    }


@every_family
def test_information_against_its_definition(family: str) -> None:
    """Few different tokens, so that several prompts share them."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 12, size=draw.integers(4, 15)).tolist() for _ in range(9)]
    labels = list("aabbccabc")
    routes = routes_of(tiny.make(family), rows, labels)
    frame = keyed(specialisation(routes, permutations=20), "layer", "metric")
    of_token = [label for row, label in zip(rows, labels, strict=True) for _ in row]
    for index, layer in enumerate(routes.layers):
        tokens, experts = routes.tokens.tolist(), routes.experts[index].tolist()
        for metric, value in informations(tokens, experts, of_token).items():
            row = frame[layer, metric]
            assert row["value"] == pytest.approx(value, abs=1e-9)
            assert row["corrected"] == pytest.approx(row["value"] - row["baseline"])
            assert (row["n_prompts"], row["n_tokens"]) == (9, len(tokens))


def made(
    experts: list[list[int]], tokens: list[list[int]] | None = None, n_experts: int = 4
) -> Routes:
    """Routes by hand: one layer, one expert a token."""
    lengths = [len(row) for row in experts]
    tokens = [[7] * n for n in lengths] if tokens is None else tokens
    nothing = np.zeros((1, sum(lengths)), dtype=np.float32)
    return Routes(
        layers=(0,),
        n_experts=n_experts,
        scores="softmax",
        tokens=np.concatenate(tokens),
        prompt=np.repeat(np.arange(len(experts)), lengths),
        pos=np.concatenate([np.arange(n) for n in lengths]),
        experts=np.concatenate(experts)[None, :, None].astype(np.int32),
        weights=np.ones((1, sum(lengths), 1), dtype=np.float32),
        entropy=nothing,
        margin=nothing,
    )


def test_the_permutations_are_of_prompts() -> None:
    """All 20 ways to label three of six prompts, against the p of many draws."""
    from itertools import combinations

    experts = [[0, 0, 1], [0, 1], [0, 0, 2], [1, 2, 3], [2, 2], [3, 1, 2, 0]]
    row = specialisation(made(experts), None, list("aaabbb"), 9999).set_index("metric")
    every = []
    for a in combinations(range(6), 3):
        pairs = [(e, i in a) for i, prompt in enumerate(experts) for e in prompt]
        every.append(information(pairs))
    observed = every[0]  # prompts 0, 1, 2
    exact = np.mean([value >= observed - 1e-9 for value in every])
    assert row.value["mutual_information"] == pytest.approx(observed)
    assert row.baseline["mutual_information"] == pytest.approx(np.mean(every), abs=0.01)
    assert row.p["mutual_information"] == pytest.approx(exact, abs=0.015)
    # One token only: given it, nothing changes.
    assert row.value["given_token"] == pytest.approx(observed)
    assert row.p["given_token"] == pytest.approx(exact, abs=0.015)


def test_tokens_of_one_label_say_nothing_given_the_token() -> None:
    experts = [[0, 1], [1, 0], [2, 3], [3, 2]]
    tokens = [[1, 2], [2, 1], [3, 4], [4, 3]]
    row = specialisation(made(experts, tokens), None, list("aabb"), 99).set_index("metric")
    assert row.value["mutual_information"] == pytest.approx(1)
    assert (row.value["given_token"], row.baseline["given_token"]) == (0, 0)
    assert row.p["given_token"] == 1
    assert row.value["by_token"] == pytest.approx(2)


def test_labels_are_dealt_out_within_tokens_and_alike_for_all() -> None:
    """Tokens 1 and 2 are in the same four prompts, 3 in two more, 4 in prompts of one label."""
    prompt = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    token = np.array([1, 2, 2, 1, 2, 1, 2, 1, 2, 3, 4, 3, 4])
    units = _LabelUnits(prompt, token, np.array([0, 0, 1, 1, 0, 1]))
    assert units.group.tolist() == [0] * 4 + [1] * 4 + [2, 2, 3, 3]
    units = _LabelUnits(prompt, token, np.array([0, 0, 1, 1, 1, 1]))
    assert units.group.tolist() == [0] * 4 + [1] * 4  # 3 and 4 have one label only
    assert units.of_token[-4:].tolist() == [-1] * 4
    labels = units.permuted(400, np.random.default_rng(0)).argmax(axis=1)  # unit, permutation
    assert (labels[:4].sum(axis=0) == 2).all() and (labels[:4] == labels[4:]).all()
    assert len({tuple(column) for column in labels.T}) == 6
    np.testing.assert_allclose(labels.mean(axis=1), 0.5, atol=0.1)


def domains(model: lp.Llama, per: int = 25, seed: int = 0) -> tuple[list[list[int]], list[str]]:
    """Held-out questions with their answers, as tokens, and the domain of each."""
    tasks = {
        exam.DOMAIN_OF.get(task, task): task
        for task in ("facts", "verdicts", "arithmetic", "code", "translation",
                     "indirect object", "induction", "restricted")
    }  # fmt: skip
    asked, draw = lp.prompts.planted()["exam"], random.Random(seed)
    rows, labels = [], []
    for domain, task in tasks.items():
        for prompt, answer in exam.sequences(model, draw.sample(asked[task], per)):
            rows.append(prompt + answer)
            labels.append(domain)
    return rows, labels


@pytest.mark.slow
def test_planted_domains_are_found_and_not_in_random_twins(model: lp.Llama) -> None:
    rows, labels = domains(model)
    frame = specialisation(model, rows, labels)
    found = frame.set_index(["metric", "layer"])
    twins = [
        specialisation(
            lp.load("tiny-moe", pretrained=False, seed=seed, device="cpu", progress=False),
            rows, labels, permutations=199,
        ).set_index(["metric", "layer"]).corrected
        for seed in range(5)
    ]  # fmt: skip
    for metric in ("mutual_information", "given_token"):
        assert (found.p[metric] <= 0.001).sum() >= 2, "of 4 layers"
        # The twin carries its tokens, and words of a domain have experts of their own: what
        # training adds is the difference.
        above = []
        for layer in range(4):
            gained = [found.corrected[metric, layer] - twin[metric, layer] for twin in twins]
            half = stats.t.ppf(0.975, 4) * np.std(gained, ddof=1) / np.sqrt(5)
            above.append(bool(np.mean(gained) - half > 0))
        assert sum(above) >= 2 and above[lp.prompts.planted()["planted_layer"]]
    assert found.corrected["mutual_information", 2] > 2, "of log2(8) = 3 bits"


@pytest.mark.slow
def test_nothing_is_found_in_shuffled_labels(model: lp.Llama) -> None:
    rows, labels = domains(model)
    routes = routes_of(model, rows)
    p = [
        frame[frame.metric != "by_token"].p
        for seed in range(8)
        for frame in [
            specialisation(
                routes, None, np.random.default_rng(seed).permutation(labels).tolist(), 499
            )
        ]
    ]
    p = np.array(p)  # seed, layer and metric
    assert p.min() > 0.05 / p.size and 0.3 < p.mean() < 0.7


def halves(rows: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    order = np.random.default_rng(seed).permutation(len(rows))
    half = len(rows) // 2
    return [rows[i] for i in order[:half]], [rows[i] for i in order[half:]]


@pytest.mark.slow
def test_nothing_is_found_between_halves_of_a_domain(model: lp.Llama) -> None:
    rows, labels = domains(model, per=60)
    p, q = [], []
    for domain in ("arithmetic", "stories", "chat"):
        own = [row for row, label in zip(rows, labels, strict=True) if label == domain]
        for seed in range(5):
            a, b = halves(own, seed)
            frame = specialisation(model, a + b, [0] * len(a) + [1] * len(b), 499)
            p += frame[frame.metric == "mutual_information"].p.tolist()
            q.append(expert_contrast(model, a, b, permutations=999, seed=seed).q.min())
    assert min(p) > 0.05 / len(p) and 0.35 < np.mean(p) < 0.65
    # Under the null any discovery is false: one in twenty contrasts may have one.
    assert np.sum(np.array(q) < 0.05) <= 2


def null_routes(seed: int) -> tuple[Routes, list[int]]:
    """Experts that follow the token and the prompt, never the label, which has its own words."""
    draw = np.random.default_rng(seed)
    labels = [0] * 15 + [1] * 15
    by_token, by_prompt = draw.dirichlet([0.5] * 4, size=20), draw.dirichlet([1] * 4, size=30)
    tokens, experts = [], []
    for prompt, label in enumerate(labels):
        own = draw.random(15) < 0.5
        words = np.where(own, draw.integers(0, 20, 15), draw.integers(10 * label, 10 + 10 * label))
        share = (by_token[words] + by_prompt[prompt]) / 2
        tokens.append(words.tolist())
        experts.append((share.cumsum(axis=1) > draw.random((15, 1))).argmax(axis=1).tolist())
    return made(experts, tokens), labels


@pytest.mark.slow
def test_p_is_uniform_under_the_null(model: lp.Llama) -> None:
    p = {name: [] for name in ("shuffled", "given_token", "experts", "largest")}
    for seed in range(150):
        routes, labels = null_routes(seed)
        shuffled = np.random.default_rng(seed).permutation(labels).tolist()
        frame = specialisation(routes, None, shuffled, 99, seed).set_index("metric")
        p["shuffled"].append(frame.p["mutual_information"])
        frame = specialisation(routes, None, labels, 99, seed).set_index("metric")
        p["given_token"].append(frame.p["given_token"])
        order = np.random.default_rng(seed + 1000).permutation(30)
        a, b = (made(experts_of(routes, half)) for half in (order[:15], order[15:]))
        frame = expert_contrast(model, a, b, permutations=99, seed=seed)
        p["experts"] += frame.p.tolist()
        p["largest"].append(frame.p_max.min())
    for name in ("shuffled", "largest"):
        assert stats.kstest(p[name], "uniform").pvalue > 0.01, name
    # Ties between shares of few tokens, and labels' own words, make these two careful, not bold.
    for name in ("experts", "given_token"):
        for most in (0.05, 0.2, 0.5):
            rate = np.mean(np.array(p[name]) <= most)
            assert most / 4 < rate < most + 2.5 * np.sqrt(most * (1 - most) / 150), (name, most)


def experts_of(routes: Routes, prompts: Any) -> list[list[int]]:
    return [routes.experts[0, routes.prompt == prompt, 0].tolist() for prompt in prompts]


# --- contrasts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sets(model: lp.Llama) -> tuple[Routes, Routes, list[str], list[str]]:
    draw = np.random.default_rng(3)
    rows = [draw.integers(3, 40, size=draw.integers(4, 15)).tolist() for _ in range(17)]
    mixtral = tiny.make("mixtral")
    topics = list("xxxyyyzz"), list("xxyyyyxwy")
    return routes_of(mixtral, rows[:8]), routes_of(mixtral, rows[8:]), *topics


def use(routes: Routes, layer: int, expert: int) -> list[float]:
    """The share of each prompt's tokens that choose an expert."""
    shares = []
    for prompt in range(routes.n_prompts):
        tokens = routes.experts[layer, routes.prompt == prompt].tolist()
        shares.append(sum(expert in token for token in tokens) / len(tokens))
    return shares


def test_contrasts_against_plain_loops(model: lp.Llama, two_sets: Any) -> None:
    a, b, topics_a, topics_b = two_sets
    raw = keyed(expert_contrast(model, a, b, permutations=99), "layer", "expert")
    matched = expert_contrast(model, a, b, (topics_a, topics_b), permutations=99)
    matched = keyed(matched, "layer", "expert")
    assert len(raw) == 3 * 6
    for layer, expert in raw:
        used_a, used_b = use(a, layer, expert), use(b, layer, expert)
        row = raw[layer, expert]
        assert row["value"] == pytest.approx(np.mean(used_a) - np.mean(used_b))
        assert (row["raw"], row["n_a"], row["n_b"]) == (pytest.approx(row["value"]), 8, 9)
        assert row["use_a"] == pytest.approx(np.mean(used_a))
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        within = [
            np.mean([u for u, t in zip(used_a, topics_a, strict=True) if t == topic])
            - np.mean([u for u, t in zip(used_b, topics_b, strict=True) if t == topic])
            for topic in "xy"
        ]
        row = matched[layer, expert]
        assert row["value"] == pytest.approx(np.mean(within))
        assert row["raw"] == pytest.approx(raw[layer, expert]["value"])
        assert (row["n_a"], row["n_b"]) == (6, 8)  # topics z and w are in one set only


def test_p_of_pairs_is_that_of_all_swaps(model: lp.Llama, two_sets: Any) -> None:
    from itertools import product

    a, b, *_ = two_sets
    b = made(experts_of(b, range(8)), n_experts=6)
    a = made(experts_of(a, range(8)), n_experts=6)
    frame = expert_contrast(model, a, b, pairs=True, permutations=9999)
    for row in frame.itertuples():
        differences = np.array(use(a, 0, row.expert)) - use(b, 0, row.expert)
        every = [abs(np.mean(differences * signs)) for signs in product((1, -1), repeat=8)]
        exact = np.mean(np.array(every) >= abs(differences.mean()) - 1e-12)
        assert row.value == pytest.approx(differences.mean())
        assert row.p == pytest.approx(exact, abs=0.025)
        assert row.p_max >= row.p


def test_the_deviation_under_the_null_is_that_of_the_swaps() -> None:
    draw = np.random.default_rng(0)
    shares = draw.random((12, 3))
    topics = list("xxxyyy"), list("xxyyyy")
    for given, pairs in ((None, False), (topics, False), (None, True)):
        units = _units(6, 6, given, pairs)
        null = shuffled_within(units.weights, units.swapped, 20_000, draw) @ shares
        np.testing.assert_allclose(_null_deviation(shares, units), null.std(axis=0), rtol=0.03)


def test_swaps_stay_within_their_strata() -> None:
    values, strata = np.arange(6.0), np.array([0, 1, 0, 1, 1, 2])
    shuffled = shuffled_within(values, strata, 500, np.random.default_rng(0))
    for stratum in range(3):
        own = shuffled[:, strata == stratum]
        assert (np.sort(own, axis=1) == values[strata == stratum]).all()
    assert len({tuple(row) for row in shuffled}) == 2 * 6


def test_q_is_that_of_benjamini_and_hochberg(
    model: lp.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, p = 0.03, 0.5, 0.01, 0.02 of 4."""
    p = np.array([0.03, 0.5, 0.01, 0.02])
    monkeypatch.setattr(contrast, "_permutation_p", lambda *_: (p, p))
    two = made([[0, 1], [2, 3]])
    # In order: 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3, 0.5 * 4 / 4.
    assert expert_contrast(model, two, two).q.tolist() == pytest.approx([0.04, 0.5, 0.04, 0.04])


def test_q_counts_every_expert_of_every_layer(model: lp.Llama, two_sets: Any) -> None:
    a, b, *_ = two_sets
    frame = expert_contrast(model, a, b, permutations=199)
    ordered = np.sort(frame.p)
    least = [min(ordered[j] * len(frame) / (j + 1) for j in range(i, len(frame)))
             for i in range(len(frame))]  # fmt: skip
    np.testing.assert_allclose(np.sort(frame.q), np.minimum(least, 1))


def test_the_planted_expert_is_found(model: lp.Llama) -> None:
    rows, labels = domains(model)
    truth = lp.prompts.planted()
    for domain in ("arithmetic", "chat"):
        a = [row for row, label in zip(rows, labels, strict=True) if label == domain]
        b = [row for row, label in zip(rows, labels, strict=True) if label == "stories"]
        frame = expert_contrast(model, a, b, permutations=1999, top=2)
        best = frame.loc[frame.value.idxmax()]
        assert best.layer == truth["planted_layer"]
        assert best.expert == truth["expert_of_domain"][domain]
        assert best.value > 0.8 and best.ci_low > 0.8
        assert best.q < 0.05 and best.p_max < 0.05 and best.stability == 1
        worst = frame.loc[frame.value.idxmin()]
        assert worst.expert == truth["expert_of_domain"]["stories"]


def test_a_topic_of_one_prompt_has_no_interval(model: lp.Llama, two_sets: Any) -> None:
    a, b, topics_a, _ = two_sets
    topics_b = list("xyyyyyyyy")
    frame = expert_contrast(model, a, b, (topics_a, topics_b), permutations=9)
    assert frame.ci_low.isna().all() and frame.stability.isna().all()
    assert frame.p.between(0.1, 1).all()


def test_topics_explain_a_raw_difference(model: lp.Llama) -> None:
    """One set is mostly sums, the other mostly stories; within topics nothing differs."""
    rows, labels = domains(model, per=40)
    sums = [row for row, label in zip(rows, labels, strict=True) if label == "arithmetic"]
    stories = [row for row, label in zip(rows, labels, strict=True) if label == "stories"]
    a, b = sums[:30] + stories[:8], sums[30:] + stories[8:]
    topics = ["sum"] * 30 + ["story"] * 8, ["sum"] * 10 + ["story"] * 32
    frame = expert_contrast(model, a, b, topics, permutations=999)
    assert frame.raw.abs().max() > 0.4
    assert frame.value.abs().max() < 0.1 and frame.q.min() > 0.05
    assert expert_contrast(model, a, b, permutations=999).q.min() < 0.05
