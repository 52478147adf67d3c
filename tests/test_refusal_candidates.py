"""Parts of the requests, candidates and their scores, random directions: against plain sums."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import Asked, ask
from llama_probe.refusal.candidates import (
    Candidates,
    find_candidates,
    score_candidates,
    template_positions,
)
from llama_probe.refusal.controls import matched_directions, random_directions
from llama_probe.refusal.splits import PARTS, three_parts

SHARES = (0.5, 0.25, 0.25)


# Parts


@pytest.mark.parametrize("groups", [None, [i // 3 for i in range(60)]])
def test_parts_are_disjoint_and_cover_everything(groups: Any) -> None:
    parts = three_parts(60, SHARES, 0, groups)
    assert tuple(parts) == PARTS
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))
    assert [len(part) for part in parts.values()] == [30, 15, 15]
    if groups is not None:
        of = [{groups[row] for row in part} for part in parts.values()]
        assert sum(map(len, of)) == 20  # no group is in two parts


def test_parts_are_drawn_by_the_seed() -> None:
    def fit(seed: int, groups: Any = None) -> list[int]:
        return three_parts(40, SHARES, seed, groups)["fit"].tolist()

    assert fit(0) == fit(0) != fit(1) and fit(0) != list(range(20))
    pairs = [row // 2 for row in range(40)]
    assert fit(0, pairs) == fit(0, pairs) != fit(1, pairs)


@pytest.mark.parametrize(
    ("n", "shares", "groups", "message"),
    [
        (40, (0.5, 0.5), None, "three shares that sum to 1"),
        (40, (0.5, 0.5, 0.5), None, "three shares that sum to 1"),
        (40, (1.0, 0.5, -0.5), None, "three shares that sum to 1"),
        (6, SHARES, None, "6 requests are too few"),
        (40, SHARES, [0] * 40, "1 groups are too few"),
    ],
)
def test_what_gives_no_parts(n: int, shares: Any, groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        three_parts(n, shares, 0, groups)


# Candidates


@pytest.fixture(scope="module")
def model() -> Llama:
    return lp.load("tiny-moe")


@pytest.fixture(scope="module")
def sets(model: Llama) -> tuple[Asked, Asked]:
    frame = lp.prompts.requests("tiny-moe")
    kinds = ("restricted", "same verb")
    texts = [frame.loc[frame["kind"] == kind, "text"].head(6).tolist() for kind in kinds]
    return ask(model, texts[0]), ask(model, texts[1])


@pytest.fixture(scope="module")
def found(model: Llama, sets: tuple[Asked, Asked]) -> Candidates:
    return find_candidates(model, *sets, template_positions(*sets))


def stream(model: Llama, asked: Asked) -> Tensor:
    """[request layer position d] before every block, at the six last tokens, one at a time."""
    rows = []
    for one in asked.encoded:
        _, cache = model.run_with_cache(torch.tensor([one.ids]), names_filter="*.hook_resid_pre")
        layers = range(model.cfg.n_layers)
        rows.append(torch.stack([cache["resid_pre", layer][0, -6:].detach() for layer in layers]))
    return torch.stack(rows).double()


def test_candidates_are_differences_of_means(
    model: Llama, sets: tuple[Asked, Asked], found: Candidates
) -> None:
    assert found.positions == (-6, -5, -4, -3, -2, -1)  # all that follows the instruction
    restricted, harmless = (stream(model, asked).mean(dim=0) for asked in sets)
    for position in found.positions:
        for layer in range(model.cfg.n_layers):
            one = found.direction(position, layer)
            expected = restricted[layer, position] - harmless[layer, position]
            assert torch.allclose(one.vector, expected, rtol=0, atol=1e-5)
            assert (one.hook, one.layer) == (f"blocks.{layer}.hook_resid_pre", layer)
            assert one.position == str(position)
            reference = found.reference(position, layer)
            assert torch.allclose(reference, harmless[layer, position], rtol=0, atol=1e-5)


def test_texts_without_a_template_have_one_position(model: Llama) -> None:
    raw = ask(model, ["Paris is", "12+30="], template=None)
    assert template_positions(raw) == (-1,)


def log_odds(logits: Tensor, tokens: list[int]) -> float:
    p = logits.double().softmax(dim=-1)[tokens].sum().item()
    return float(np.log(p + 1e-8) - np.log(1 - p + 1e-8))


@torch.no_grad()
def test_scores_are_those_of_plain_hooks(
    model: Llama, sets: tuple[Asked, Asked], found: Candidates
) -> None:
    """One candidate by hand: own hooks, one request at a time, the paper's formulas."""
    tokens = [model.to_single_token("Sorry")]
    some = replace(
        found,
        positions=(-1,),
        restricted=found.restricted[-1:],
        harmless=found.harmless[-1:],
    )
    scores = score_candidates(model, some, *sets, tokens).set_index("layer")
    vector = found.direction(-1, 2).vector.float()
    unit = vector / vector.norm()

    def remove(x: Tensor, hook: Any) -> Tensor:
        return x - (x @ unit)[..., None] * unit

    def put(x: Tensor, hook: Any) -> Tensor:
        return x + vector

    sites = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    removing = [(f"blocks.{i}.{site}", remove) for i in range(model.cfg.n_layers) for site in sites]
    putting = [("blocks.2.hook_resid_pre", put)]

    def last(asked: Asked, hooks: Any) -> list[Tensor]:
        return [
            model.run_with_hooks(torch.tensor([one.ids]), fwd_hooks=hooks)[0, -1]
            for one in asked.encoded
        ]

    bypass = np.mean([log_odds(logits, tokens) for logits in last(sets[0], removing)])
    induce = np.mean([log_odds(logits, tokens) for logits in last(sets[1], putting)])
    costs = []
    for before, after in zip(last(sets[1], []), last(sets[1], removing), strict=True):
        p, q = (x.double().softmax(dim=-1).numpy() for x in (before, after))
        costs.append((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum())
    expected = [bypass, induce, np.mean(costs), vector.norm().item()]
    columns = ["refusal_score", "steering_score", "kl_div_score", "norm"]
    assert scores.loc[2, columns].tolist() == pytest.approx(expected, abs=1e-3)
    assert list(scores.reset_index()["position"]) == [-1] * model.cfg.n_layers

    # At a token that all share, the stream before the first block is the same for both sets.
    plain = [np.mean([log_odds(x, tokens) for x in last(asked, [])]) for asked in sets]
    assert scores.loc[0, columns].tolist() == pytest.approx([*plain, 0, 0], abs=1e-3)
    attrs = scores.attrs
    assert [attrs["restricted_score"], attrs["harmless_score"]] == pytest.approx(plain, abs=1e-3)
    assert scores.loc[2, "refusal_score"] < plain[0] - 3


# Random directions


def test_isotropic_directions() -> None:
    like = torch.tensor([0.0, 3.0, 4.0, 0.0])
    drawn = random_directions(like, 4000)
    assert torch.allclose(drawn.norm(dim=1), torch.full((4000,), 5.0, dtype=torch.float64))
    assert torch.allclose(drawn.T @ drawn / 4000, torch.eye(4).double() * 25 / 4, atol=0.5)
    assert torch.equal(random_directions(like, 3), random_directions(like, 3))
    assert not torch.equal(random_directions(like, 3), random_directions(like, 3, seed=1))
    assert random_directions(like, 0).shape == (0, 4)


def test_matched_directions_vary_as_the_activations_do() -> None:
    axes = torch.tensor([10.0, 1.0, 0.1, 0.0])
    acts = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * axes + 7
    drawn = matched_directions(torch.ones(4), acts, 2000)
    assert torch.allclose(drawn.norm(dim=1), torch.full((2000,), 2.0, dtype=torch.float64))
    spread = drawn.abs().median(dim=0).values
    assert spread[0] > 1.9 and 0.1 < spread[1] < 0.6 and spread[2] < 0.1 and spread[3] < 1e-9
    assert abs(drawn[:, 0].sign().mean()) < 0.1  # the activations' mean is not in it


def test_draws_have_no_more_of_the_mean_than_the_direction() -> None:
    like, common = torch.tensor([0.0, 3.0, 4.0, 0.0]), torch.tensor([100.0, 10.0, 0.0, 0.0])
    acts = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + common
    unit = common.double() / common.double().norm()
    for free, held in (
        (random_directions(like, 500), random_directions(like, 500, common=common)),
        (
            matched_directions(like, acts, 500),
            matched_directions(like, acts, 500, common=common),
        ),
    ):
        assert torch.allclose(held @ unit, (like.double() @ unit).expand(500))
        assert (free @ unit).std() > 1
        assert torch.allclose(held.norm(dim=1), torch.full((500,), 5.0, dtype=torch.float64))
        assert held.std(dim=0)[1:].min() > 1  # they differ in all else


def test_a_mean_of_nothing_holds_nothing() -> None:
    like = torch.tensor([3.0, 4.0])
    held = random_directions(like, 3, common=torch.zeros(2))
    assert torch.allclose(held, random_directions(like, 3))


def test_the_common_mean_is_that_of_all_tokens(model, sets, found) -> None:
    name = "blocks.2.hook_resid_pre"
    caches = [model.run_with_cache(torch.tensor([one.ids]))[1] for one in sets[1].encoded]
    means = torch.stack([cache[name][0].detach().double().mean(0) for cache in caches])
    assert torch.allclose(found.common_of(2), means.mean(0), atol=1e-5)


def test_what_gives_no_random_directions() -> None:
    with pytest.raises(InputError, match="-1 random directions"):
        random_directions(torch.ones(3), -1)
    with pytest.raises(InputError, match="at least two samples"):
        matched_directions(torch.ones(3), torch.ones(1, 3), 2)
    with pytest.raises(InputError, match="do not vary"):
        matched_directions(torch.ones(3), torch.ones(5, 3), 2)
