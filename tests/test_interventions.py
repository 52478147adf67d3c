"""Edits of experts do what they say: against edited weights, and against a plain loop over experts.

All in float64, where two ways of adding the same numbers agree to 1e-9.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from threading import Thread
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

import llama_probe as lp
from llama_probe.errors import HookNameError, InputError
from llama_probe.hooks import reads_only
from llama_probe.interventions import (
    Edit,
    ablate_experts,
    bias_router,
    force_experts,
    freeze_routes,
)
from llama_probe.model.llama import Llama
from llama_probe.model.moe import MoE

FAMILIES = ("tiny-moe", "mixtral", "qwen2-moe", "qwen3-moe", "llama4-top2")
TOKENS = tiny.tokens(batch=2, length=10)
LAYER = 2  # a mixture of experts in every family
INDICES = "*.hook_expert_indices"
# Nothing that has another path computed: equal means equal to the last bit.
ROUTES = [INDICES, "*.hook_expert_weights"]
# Two positions in one row, one in the other.
MASK = torch.zeros(2, 10, dtype=torch.bool)
MASK[0, 3], MASK[0, 9], MASK[1, 5] = True, True, True


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cache
def model_of(family: str) -> Llama:
    if family == "tiny-moe":
        return lp.load("tiny-moe", device="cpu", progress=False).double()
    return tiny.make(family).double()


def run(model: Llama, edit: Any = (), tokens: Tensor = TOKENS) -> Tensor:
    return model.run_with_hooks(tokens, fwd_hooks=edit)


def routes(model: Llama, edit: Any = (), layer: int = LAYER, tokens: Tensor = TOKENS) -> Tensor:
    with model.hooks(edit):
        return model.run_with_cache(tokens, names_filter=INDICES)[1]["expert_indices", layer]


def busiest(model: Llama, layer: int = LAYER) -> list[int]:
    """The experts by how many tokens take them, most first."""
    load = torch.bincount(routes(model, layer=layer).flatten(), minlength=model.cfg.moe.n_experts)
    return load.argsort(descending=True).tolist()


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-9)


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4)


# The plain way: one token and one expert at a time, in place of a layer's output

Rule = Callable[[Tensor, tuple[int, int]], list[tuple[int, Tensor]]]


def expert_out(moe: MoE, expert: int, x: Tensor) -> Tensor:
    gate, up = moe.experts_in[expert].chunk(2)
    return linear(silu(linear(x, gate)) * linear(x, up), moe.experts_out[expert])


def family_weights(moe: MoE, logits: Tensor, chosen: list[int]) -> list[tuple[int, Tensor]]:
    """The weights that a family gives to the chosen experts of one token [expert]."""
    if moe.cfg.rule == "sigmoid_input":
        return [(expert, 1 / (1 + (-logits[expert]).exp())) for expert in chosen]
    over = logits[chosen] if moe.cfg.renormalise else logits
    return [(expert, logits[expert].exp() / over.exp().sum()) for expert in chosen]


def best(logits: Tensor, k: int, without: tuple[int, ...] = ()) -> list[int]:
    ranked = sorted(range(len(logits)), key=lambda expert: -float(logits[expert]))
    return [expert for expert in ranked if expert not in without][:k]


def plainly(model: Llama, rule: Rule, layer: int = LAYER) -> Tensor:
    """The logits, with a layer computed by loops; `rule(logits, (row, pos))` says who is chosen."""
    moe, kept = model.blocks[layer].mlp, {}

    @reads_only
    def keep(tensor: Tensor, hook: Any) -> None:
        kept["x"] = tensor * model.blocks[layer].ln2.weight

    def put(tensor: Tensor, hook: Any) -> Tensor:
        out = torch.zeros_like(tensor)
        for row, pos in np.ndindex(*tensor.shape[:2]):
            x = kept["x"][row, pos]
            for expert, weight in rule(linear(x, moe.router.weight), (row, pos)):
                if moe.cfg.rule == "sigmoid_input":
                    out[row, pos] += expert_out(moe, expert, weight * x)
                else:
                    out[row, pos] += weight * expert_out(moe, expert, x)
            if moe.shared is not None:
                shared = moe.shared
                extra = linear(
                    silu(linear(x, shared.gate.weight)) * linear(x, shared.up.weight),
                    shared.down.weight,
                )
                if moe.shared_gate is not None:
                    extra = extra / (1 + (-linear(x, moe.shared_gate.weight)).exp())
                out[row, pos] += extra
        return out

    block = f"blocks.{layer}"
    return run(model, [(f"{block}.ln2.hook_normalized", keep), (f"{block}.hook_mlp_out", put)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_way_is_the_model(family):
    """What the tests below compare with is right where nothing is edited."""
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    same = plainly(model, lambda z, at: family_weights(moe, z, best(z, moe.cfg.top_k)))
    assert close(same, model(TOKENS))


# ablate_experts


def without_expert(model: Llama, expert: int, layer: int = LAYER) -> Llama:
    """The model with its weights of one expert deleted."""
    model = copy.deepcopy(model)
    moe = model.blocks[layer].mlp
    keep = [other for other in range(moe.cfg.n_experts) if other != expert]
    moe.router.weight = torch.nn.Parameter(moe.router.weight[keep])
    moe.experts_in = torch.nn.Parameter(moe.experts_in[keep])
    moe.experts_out = torch.nn.Parameter(moe.experts_out[keep])
    moe.cfg = replace(moe.cfg, n_experts=len(keep))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_refilling_is_deleting_the_experts_weights(family):
    model = model_of(family)
    expert = busiest(model)[0]
    edited = run(model, ablate_experts({LAYER: [expert]}))
    assert close(edited, run(without_expert(model, expert)))
    assert differ(edited, model(TOKENS))
    assert expert not in routes(model, ablate_experts({LAYER: [expert]}))


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_is_zeroing_what_the_experts_write(family):
    model = model_of(family)
    experts = busiest(model)[:2]
    silent = copy.deepcopy(model)
    silent.blocks[LAYER].mlp.experts_out[experts] = 0
    edit = ablate_experts({LAYER: experts}, how="zero")
    assert close(run(model, edit), silent(TOKENS))
    assert differ(run(model, edit), model(TOKENS))
    assert torch.equal(routes(model, edit), routes(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zeroed_expert_adds_exactly_nothing(family):
    model = model_of(family)
    expert = busiest(model)[0]
    with model.hooks(ablate_experts({LAYER: [expert]}, how="zero")):
        _, cache = model.run_with_cache(TOKENS, names_filter="*.hook_expert_*")
    gone = cache["expert_indices", LAYER] == expert
    assert gone.any()
    assert (cache["expert_out", LAYER][gone] == 0).all()
    assert (cache["expert_out", LAYER][~gone].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_renormalising_gives_the_others_what_the_zeroed_had(family):
    """For Mixtral and Qwen 3 this is the family's rule over those that are left."""
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    gone = busiest(model)[0]

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        chosen = best(z, moe.cfg.top_k)
        left = [expert for expert in chosen if expert != gone]
        if moe.cfg.renormalise:
            return family_weights(moe, z, left)
        total = sum(weight for _, weight in family_weights(moe, z, chosen))
        kept = family_weights(moe, z, left)
        return [(e, w * total / sum(other for _, other in kept)) for e, w in kept]

    edit = ablate_experts({LAYER: [gone]}, how="zero", renormalise=True)
    assert close(run(model, edit), plainly(model, rule))
    if moe.cfg.top_k > 1:
        assert differ(run(model, edit), run(model, ablate_experts({LAYER: [gone]}, how="zero")))


@pytest.mark.parametrize("how", ["refill", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_at_some_positions(family, how):
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    gone = busiest(model)[0]

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        k = moe.cfg.top_k
        if not MASK[at]:
            return family_weights(moe, z, best(z, k))
        if how == "refill":
            z = z.clone()
            z[gone] = -torch.inf
            return family_weights(moe, z, best(z, k, without=(gone,)))
        return [(e, w) for e, w in family_weights(moe, z, best(z, k)) if e != gone]

    edit = ablate_experts({LAYER: [gone]}, how=how, positions=MASK)
    assert close(run(model, edit), plainly(model, rule))


def test_taking_out_nearly_all_experts_is_allowed_and_one_more_is_not():
    model = model_of("mixtral")  # 6 experts, 2 for each token
    assert run(model, ablate_experts({0: [0, 1, 2, 3]})).isfinite().all()
    with pytest.raises(InputError, match=r"fewer than the 2 .* are left"):
        run(model, ablate_experts({0: [0, 1, 2, 3, 4]}))
    with pytest.raises(InputError, match="are left"):
        run(model, ablate_experts({0: [0, 1, 2]}) + ablate_experts({0: [3, 4, 5]}))


@pytest.mark.parametrize("renormalise", [False, True])
def test_zeroing_all_experts_leaves_nothing(renormalise):
    model = model_of("mixtral")
    edit = ablate_experts({LAYER: range(6)}, how="zero", renormalise=renormalise)
    with model.hooks(edit):
        _, cache = model.run_with_cache(TOKENS, names_filter=f"blocks.{LAYER}.hook_mlp_out")
    assert (cache["mlp_out", LAYER] == 0).all()


# force_experts


@pytest.mark.parametrize("positions", [None, MASK], ids=["everywhere", "masked"])
@pytest.mark.parametrize(
    ("family", "n"), [*((family, 1) for family in FAMILIES), *((f, 2) for f in FAMILIES[1:])]
)
def test_forcing(family, n, positions):
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    k = moe.cfg.top_k
    forced = tuple(busiest(model)[-n:])  # those which the router likes least

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        if positions is not None and not positions[at]:
            return family_weights(moe, z, best(z, k))
        return family_weights(moe, z, [*forced, *best(z, k - n, without=forced)])

    edit = force_experts({LAYER: forced}, positions=positions)
    assert close(run(model, edit), plainly(model, rule))
    assert differ(run(model, edit), model(TOKENS))


def test_forcing_more_than_a_token_takes():
    with pytest.raises(InputError, match=r"3 experts are forced at blocks\.0\..* a token takes 2"):
        run(model_of("mixtral"), force_experts({0: [0, 1, 2]}))


# bias_router


@pytest.mark.parametrize("positions", [None, MASK], ids=["everywhere", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_biasing(family, positions):
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    most, *_, least = busiest(model)
    amounts = {least: 1.5, most: -0.75}

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        z = z.clone()
        if positions is None or positions[at]:
            for expert, amount in amounts.items():
                z[expert] += amount
        return family_weights(moe, z, best(z, moe.cfg.top_k))

    edit = bias_router({LAYER: amounts}, positions=positions)
    assert close(run(model, edit), plainly(model, rule))
    assert differ(run(model, edit), model(TOKENS))


# freeze_routes


def louder(tensor: Tensor, hook: Any) -> Tensor:
    """An edit of activations that sends tokens elsewhere."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return tensor + tensor.std() * noise


LOUDER = Edit([("blocks.0.hook_attn_out", louder)])


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_runs_own_routes_change_nothing(family, weights):
    model = model_of(family)
    logits, cache = model.run_with_cache(TOKENS, names_filter=ROUTES)
    assert torch.equal(run(model, freeze_routes(cache, weights)), logits)
    edited, cache = _edited_run(model)
    assert torch.equal(run(model, LOUDER + freeze_routes(cache, weights)), edited)


def _edited_run(model: Llama) -> tuple[Tensor, Any]:
    with model.hooks(LOUDER):
        return model.run_with_cache(TOKENS, names_filter=ROUTES)


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_routes_withstand_an_edit_of_activations(family, weights):
    model = model_of(family)
    _, before = model.run_with_cache(TOKENS)
    _, free = _edited_run(model)
    with model.hooks(LOUDER + freeze_routes(before, weights)):
        logits, frozen = model.run_with_cache(TOKENS)
    assert not torch.equal(free["expert_indices", LAYER], before["expert_indices", LAYER])
    assert torch.equal(frozen["expert_indices", LAYER], before["expert_indices", LAYER])
    same = torch.equal(frozen["expert_weights", LAYER], before["expert_weights", LAYER])
    assert same == (weights == "frozen")
    assert differ(logits, run(model, LOUDER))
    assert differ(logits, model(TOKENS))


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_routes_of_another_prompt(family, weights):
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    other = tiny.tokens(batch=2, length=10, seed=1)
    _, cache = model.run_with_cache(other, names_filter=f"blocks.{LAYER}.mlp.*")
    indices, values = cache["expert_indices", LAYER], cache["expert_weights", LAYER]

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        chosen = indices[at].tolist()
        if weights == "live":
            return family_weights(moe, z, chosen)
        return list(zip(chosen, values[at], strict=True))

    edit = freeze_routes(cache, weights)
    assert close(run(model, edit), plainly(model, rule))
    assert differ(run(model, edit), model(TOKENS))


def test_what_happens_to_the_cache_later_does_not_change_the_edit():
    model = model_of("mixtral")
    logits, cache = model.run_with_cache(TOKENS, names_filter=ROUTES)
    edit = freeze_routes(cache)
    cache["expert_indices", LAYER].zero_()
    assert torch.equal(run(model, edit), logits)


def test_freezing_some_positions():
    model = model_of("mixtral")
    _, before = model.run_with_cache(TOKENS)
    free = routes(model, LOUDER)
    mixed = routes(model, LOUDER + freeze_routes(before, positions=slice(0, 4)))
    assert torch.equal(mixed[:, :4], before["expert_indices", LAYER][:, :4])
    assert not torch.equal(free[:, :4], mixed[:, :4])
    assert not torch.equal(mixed[:, 4:], before["expert_indices", LAYER][:, 4:])


def test_routes_of_another_shape_or_of_no_run():
    model = model_of("mixtral")
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(InputError, match=r"\(2, 10, 2\) at .*, but this pass has \(2, 7, 2\)"):
        run(model, freeze_routes(cache), TOKENS[:, :7])
    _, short = model.run_with_cache(TOKENS, pos_slice=-1)
    with pytest.raises(InputError, match=r"\(2, 1, 2\)"):
        run(model, freeze_routes(short))
    _, nothing = model.run_with_cache(TOKENS, names_filter="hook_embed")
    with pytest.raises(InputError, match="has no hook_expert_indices"):
        freeze_routes(nothing)
    _, some = model.run_with_cache(TOKENS, names_filter=INDICES)
    freeze_routes(some)
    with pytest.raises(InputError, match=r"has no blocks\.0\.mlp\.hook_expert_weights"):
        freeze_routes(some, "frozen")


def test_frozen_weights_are_never_those_of_other_experts():
    model = model_of("mixtral")
    _, cache = model.run_with_cache(TOKENS, names_filter=ROUTES)
    for edit in (
        freeze_routes(cache, "frozen") + force_experts({LAYER: [0]}),
        force_experts({LAYER: [0]}) + freeze_routes(cache, "frozen") + force_experts({LAYER: [1]}),
    ):
        with pytest.raises(InputError, match="another edit changes the experts"):
            run(model, edit)
    # What is overruled by the frozen routes does no harm.
    edit = force_experts({LAYER: [0]}) + freeze_routes(cache, "frozen")
    assert torch.equal(run(model, edit), model(TOKENS))


# What experts add


@pytest.mark.parametrize(
    "edit",
    [
        Edit(),
        ablate_experts({LAYER: [0]}, how="zero"),
        ablate_experts({LAYER: [1]}) + force_experts({LAYER: [2]}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_experts_add_sums_to_what_the_layer_adds(family, edit):
    model = model_of(family)
    with model.hooks(edit):
        _, cache = model.run_with_cache(TOKENS, names_filter=["*.hook_*out"])
    total = cache["expert_out", LAYER].sum(dim=2)
    if model.cfg.moe.d_shared:
        total = total + cache["shared_out", LAYER]
    assert close(total, cache["mlp_out", LAYER])


# Generation


class Recorder:
    """Keeps what passes a hook, one tensor a step."""

    reads_only = True

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        self.steps.append(tensor.clone())


def recorded(model: Llama, edit: Edit, n: int = 5) -> tuple[Tensor, list[Tensor]]:
    """Greedy continuations of the first six tokens, and a layer's routes in each step."""
    recorder = Recorder()
    rows = model.generate(
        TOKENS[:, :6],
        max_new_tokens=n,
        stop_tokens=[],
        return_type="tokens",
        fwd_hooks=edit + [(f"blocks.{LAYER}.mlp.hook_expert_indices", recorder)],
    )
    return torch.stack(rows), recorder.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_experts_are_used_in_every_step(family):
    model = model_of(family)
    forced = busiest(model)[-1]
    edit = force_experts({LAYER: [forced]})
    _, steps = recorded(model, edit)
    assert [step.shape[1] for step in steps] == [6, 1, 1, 1, 1]
    assert all((step == forced).any(dim=-1).all() for step in steps)
    assert not all((step == forced).any(dim=-1).all() for step in recorded(model, Edit())[1])


@pytest.mark.parametrize(
    "edit",
    [
        ablate_experts({1: [0, 1], 2: [2]}),
        ablate_experts({0: [0, 1], 2: [2, 3]}, how="zero", renormalise=True),
        force_experts({0: [0], 2: [3]}),
        bias_router({0: {0: 3.0}, 2: {1: -2.0}}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("family", ["tiny-moe", "mixtral", "qwen3-moe", "llama4-top2"])
def test_generation_with_an_edit_is_one_pass_after_another(family, edit):
    model = model_of(family)
    rows, _ = recorded(model, edit)
    tokens = TOKENS[:, :6]
    for _ in range(5):
        tokens = torch.cat((tokens, run(model, edit, tokens)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(tokens[:, 6:], rows)


def test_prompt_and_new_tokens():
    model = model_of("mixtral")
    forced = busiest(model)[-1]

    def used(positions: Any) -> list[bool]:
        _, steps = recorded(model, force_experts({LAYER: [forced]}, positions=positions))
        return [bool((step == forced).any(dim=-1).all()) for step in steps]

    assert used("prompt")[0] and not all(used("prompt")[1:])
    assert not used("new")[0] and all(used("new")[1:])
    _, free = recorded(model, Edit())
    _, steps = recorded(model, force_experts({LAYER: [forced]}, positions="new"))
    assert torch.equal(steps[0], free[0])
    # A pass over a whole text is a prompt.
    everywhere = run(model, force_experts({LAYER: [forced]}))
    assert torch.equal(run(model, force_experts({LAYER: [forced]}, positions="prompt")), everywhere)
    for n, word, other in ((2, "prompt", "new"), (1, "new", "prompt")):
        some = TOKENS[:, :n]
        edited = routes(model, force_experts({LAYER: [forced]}, positions=word), tokens=some)
        assert (edited == forced).any(dim=-1).all()
        untouched = routes(model, force_experts({LAYER: [forced]}, positions=other), tokens=some)
        assert torch.equal(untouched, routes(model, tokens=some))
    same = run(model, force_experts({LAYER: [forced]}, positions="new"))
    assert torch.equal(same, model(TOKENS))


def test_the_routes_of_a_prompt_can_be_frozen_in_generation():
    model = model_of("mixtral")
    _, cache = model.run_with_cache(TOKENS[:, :6])
    for weights in ("live", "frozen"):
        edit = LOUDER + freeze_routes(cache, weights, positions="prompt")
        _, steps = recorded(model, edit)
        assert torch.equal(steps[0], cache["expert_indices", LAYER])
        assert len(steps) == 5
    with pytest.raises(InputError, match="but this pass has"):
        recorded(model, freeze_routes(cache))


@pytest.mark.parametrize("positions", [0, -1, [2, 3], slice(1, None), torch.ones(6).bool()])
def test_counted_positions_are_refused_where_a_pass_sees_one_token(positions):
    model = model_of("mixtral")
    edit = ablate_experts({0: [1]}, positions=positions)
    recorded(model, edit, n=1)
    with pytest.raises(InputError, match="this pass has a single token.*'prompt' or 'new'"):
        recorded(model, edit, n=2)
    assert not _any_hooks(model)


# Positions


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, range(10)),
        (3, [3]),
        (-1, [9]),
        (np.int64(4), [4]),
        ([0, -2, 5], [0, 5, 8]),
        ((1, 2), [1, 2]),
        (range(4), range(4)),
        (np.array([7, 1]), [1, 7]),
        (torch.tensor([6]), [6]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 4), [0, 4, 8]),
        ([True] + [False] * 8 + [True], [0, 9]),
        (np.arange(10) > 7, [8, 9]),
    ],
    ids=repr,
)
def test_positions(positions, expected):
    model = model_of("mixtral")
    forced = busiest(model)[-1]
    free = routes(model)
    edited = routes(model, force_experts({LAYER: [forced]}, positions=positions))
    chosen = list(expected)
    others = [pos for pos in range(10) if pos not in chosen]
    assert (edited[:, chosen] == forced).any(dim=-1).all()
    assert torch.equal(edited[:, others], free[:, others])


@pytest.mark.parametrize("pos", range(10))
def test_nothing_changes_before_the_position(pos):
    """An edit at one position is that token's and what comes after it."""
    model = model_of("qwen3-moe")
    changed = run(model, ablate_experts({0: range(8)}, how="zero", positions=pos)) - model(TOKENS)
    assert (changed[:, :pos].abs() <= 1e-9).all()
    assert (changed[:, pos].abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [
        (10, r"positions are \[10\], but this pass has positions 0 to 9"),
        ([0, -11], "this pass has positions 0 to 9"),
        (slice(10, 20), "none of the 10"),
        (torch.ones(9).bool(), r"shape \(9,\), but this pass has \[batch pos\] = \(2, 10\)"),
        (torch.ones(3, 10).bool(), r"shape \(3, 10\)"),
    ],
)
def test_positions_that_a_pass_does_not_have(positions, sentence):
    with pytest.raises(InputError, match=sentence):
        run(model_of("mixtral"), bias_router({0: {1: 1.0}}, positions=positions))


@pytest.mark.parametrize(
    "positions",
    ["last", 1.5, [], True, torch.tensor(True), [[1, 2]], ["a"], {"pos": 3}, torch.ones(10)],
    ids=repr,
)
def test_what_are_no_positions(positions):
    for make in (ablate_experts, force_experts):
        with pytest.raises(InputError, match="(?s)positions is .*'prompt'"):
            make({0: [1]}, positions=positions)


# Composition


def test_edits_join_and_show_what_makes_them():
    edit = ablate_experts({0: [1]}) + bias_router({2: {3: 0.5}}, positions=[0, 1])
    assert isinstance(edit, Edit)
    assert repr(edit) == (
        "ablate_experts({0: [1]}, how='refill') + bias_router({2: {3: 0.5}}, positions=[0, 1])"
    )
    assert repr(eval(repr(edit))) == repr(edit)
    assert repr(Edit()) == "Edit()"
    pair = ("hook_embed", louder)
    for both in (edit + [pair], [pair] + edit, edit + Edit([pair])):
        assert isinstance(both, Edit) and len(both) == len(edit) + 1 and pair in both
        assert repr(both).count(" + ") == 2
    assert repr(edit + Edit()) == repr(Edit(edit)) == repr(edit)
    assert "(2, 10)" in repr(force_experts({0: [1]}, positions=MASK))
    assert repr(ablate_experts({np.int64(0): np.array([2])}, "zero", renormalise=True)) == (
        "ablate_experts({0: [2]}, how='zero', renormalise=True)"
    )


@pytest.mark.parametrize("nonsense", [["hook_embed"], [("hook_embed", 3)], [("a", louder, 1)]])
def test_what_is_no_edit(nonsense):
    with pytest.raises(InputError, match="made of pairs"):
        Edit(nonsense)
    with pytest.raises(InputError, match="made of pairs"):
        ablate_experts({0: [1]}) + nonsense


def test_edits_go_wherever_hooks_go():
    model = model_of("mixtral")
    edit = ablate_experts({LAYER: busiest(model)[:1]}, how="zero")
    expected = run(model, edit)
    assert torch.equal(run(model, [*edit]), expected)
    assert torch.equal(run(model, list(edit) + []), expected)
    with model.hooks(edit):
        assert torch.equal(model(TOKENS), expected)
    with model.hooks(fwd_hooks=edit[:]):
        assert torch.equal(model.run_with_cache(TOKENS, names_filter=INDICES)[0], expected)


def test_edits_are_values():
    model = model_of("mixtral")
    edit = ablate_experts({0: [1]}, how="zero") + force_experts({LAYER: [0]}, positions=MASK)
    expected = run(model, edit)
    for other in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert repr(other) == repr(edit)
        assert torch.equal(run(model, other), expected)
    with pytest.raises(AttributeError):
        edit.append(("hook_embed", louder))  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["refill", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bias_then_force_then_ablate(family, how):
    """Each at its own hook, so the order of joining does not matter."""
    model = model_of(family)
    moe = model.blocks[LAYER].mlp
    k, (gone, *_, forced) = moe.cfg.top_k, busiest(model)

    def rule(z: Tensor, at: tuple[int, int]) -> list[tuple[int, Tensor]]:
        z = z.clone()
        z[forced] += 2.5
        without = (forced, gone) if how == "refill" else (forced,)
        if how == "refill":
            z[gone] = -torch.inf
        chosen = family_weights(moe, z, [forced, *best(z, k - 1, without=without)])
        return [(e, w) for e, w in chosen if e != gone]

    bias, force = bias_router({LAYER: {forced: 2.5}}), force_experts({LAYER: [forced]})
    ablate = ablate_experts({LAYER: [gone]}, how=how)
    expected = plainly(model, rule)
    for edit in (bias + force + ablate, ablate + force + bias, force + ablate + bias):
        assert close(run(model, edit), expected)


def test_at_one_hook_the_later_edit_has_the_last_word():
    model = model_of("tiny-moe")  # one expert for each token
    first, then = force_experts({LAYER: [1]}), force_experts({LAYER: [5]})
    assert (routes(model, first + then) == 5).all()
    assert (routes(model, then + first) == 1).all()
    seen: list[str] = []

    def tell(name: str) -> Callable[..., None]:
        return lambda tensor, hook: seen.append(f"{name} {int(tensor.flatten()[0])}")

    name = f"blocks.{LAYER}.mlp.hook_expert_indices"
    run(model, first + [(name, tell("a"))] + then + [(name, tell("b"))])
    assert seen == ["a 1", "b 5"]


def test_zeroing_sees_the_final_choice():
    model = model_of("tiny-moe")
    zero, force = ablate_experts({LAYER: [5]}, how="zero"), force_experts({LAYER: [5]})
    name = f"blocks.{LAYER}.mlp.hook_expert_weights"
    for edit in (zero + force, force + zero):
        with model.hooks(edit):
            _, cache = model.run_with_cache(TOKENS, names_filter=name)
        assert (cache[name] == 0).all()


def test_zeroing_sees_what_a_later_hook_chooses():
    model = model_of("tiny-moe")
    zero, force = ablate_experts({LAYER: [5]}, how="zero"), force_experts({LAYER: [5]})
    expected = run(model, zero + force)
    assert torch.equal(run(model, force + zero), expected)
    assert torch.equal(run(model, [*zero, *force]), expected)
    with model.hooks(zero):
        assert torch.equal(run(model, force), expected)
    assert not torch.equal(run(model, force), expected)


def test_a_forced_expert_that_is_taken_out():
    model = model_of("mixtral")
    ablate, force = ablate_experts({LAYER: [1]}), force_experts({LAYER: [1]})
    for edit in (ablate + force, force + ablate):
        with pytest.raises(InputError, match="another edit chooses one"):
            run(model, edit)
    run(model, ablate_experts({LAYER: [1]}, positions=[0]) + force_experts({1: [1]}))


def test_two_ablations_are_one():
    model = model_of("qwen3-moe")
    for how in ("refill", "zero"):
        both = ablate_experts({LAYER: [0]}, how) + ablate_experts({LAYER: [3]}, how)
        assert torch.equal(run(model, both), run(model, ablate_experts({LAYER: [0, 3]}, how)))


def test_gradients_pass_through():
    model = model_of("mixtral")
    with torch.enable_grad():
        edit = ablate_experts({0: [1]}) + bias_router({LAYER: {0: 1.0}})
        edit += ablate_experts({1: [0]}, how="zero", renormalise=True)
        grads: dict[str, Tensor] = {}

        def keep(grad: Tensor, hook: Any) -> None:
            grads[hook.name] = grad.clone()

        with model.hooks(edit, bwd_hooks=[("blocks.*.hook_resid_pre", keep)]):
            model(TOKENS)[:, -1, 5].sum().backward()
        model.zero_grad()
    assert len(grads) == 3
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model = copy.deepcopy(model_of("qwen3-moe")).to(dtype)
    _, cache = model.run_with_cache(TOKENS)
    edit = (
        ablate_experts({0: [1]})
        + ablate_experts({1: [1, 2]}, "zero", renormalise=True)
        + bias_router({0: {2: 0.3}})
        + freeze_routes({k: v for k, v in cache.items() if ".2." in k}, "frozen")
    )
    logits = run(model, edit)
    assert logits.dtype == dtype and logits.isfinite().all()
    with model.hooks(edit):
        _, edited = model.run_with_cache(TOKENS, names_filter="*.hook_expert_weights")
    sums = edited["expert_weights", 1].double().sum(dim=-1)
    assert ((sums - 1).abs() < 4 * torch.finfo(dtype).eps).logical_or(sums == 0).all()


# Nothing is left behind, and wrong input gets a sentence


def _any_hooks(model: Llama) -> bool:
    return any(point.fwd_hooks for point in model.hook_dict.values())


def test_no_hook_survives_an_exception():
    model = model_of("mixtral")
    before = model(TOKENS)
    edit = ablate_experts({0: [1]}) + force_experts({LAYER: [0, 1, 2]})
    with pytest.raises(InputError):
        run(model, edit)
    with pytest.raises(HookNameError):
        run(model, ablate_experts({0: [1], 7: [1]}))
    with pytest.raises(RuntimeError, match="mine"), model.hooks(ablate_experts({0: [1]})):
        raise RuntimeError("mine")
    assert not _any_hooks(model)
    assert torch.equal(model(TOKENS), before)


def test_one_edit_in_two_models_at_once():
    edit = ablate_experts({LAYER: [0, 1, 2]}, how="zero")
    models = [copy.deepcopy(model_of(name)) for name in ("mixtral", "qwen3-moe")]
    expected = [run(model, edit) for model in models]
    wrong: list[int] = []

    def often(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(run(models[i], edit), expected[i]):
                    wrong.append(i)

    threads = [Thread(target=often, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "edit",
    [
        ablate_experts({1: [6]}),
        ablate_experts({1: [0, 6]}, how="zero"),
        force_experts({1: [6]}),
        bias_router({1: {6: 1.0}}),
        force_experts({1: [6]}, positions="new"),
    ],
    ids=repr,
)
def test_an_expert_that_there_is_not(edit):
    sentence = r"an edit names expert 6 at blocks\.1\..*, but there are experts 0 to 5"
    with pytest.raises(InputError, match=sentence):
        run(model_of("mixtral"), edit)


@pytest.mark.parametrize(
    "edit",
    [ablate_experts({1: [0]}), force_experts({1: [0]}), bias_router({1: {0: 1.0}})],
    ids=repr,
)
def test_a_layer_that_is_no_mixture_of_experts(edit):
    with pytest.raises(HookNameError, match=r"blocks\.1\.mlp.*did you mean 'blocks"):
        run(model_of("qwen2-moe"), edit)


@pytest.mark.parametrize(
    ("experts", "sentence"),
    [
        ({}, "should be"),
        ([1, 2], "should be"),
        ({0: []}, "no experts are named at layer 0"),
        ({0: [1, 1]}, "name one twice"),
        ({-1: [0]}, "-1 is not a layer.*from 0"),
        ({0: [-1]}, "-1 is not an expert"),
        ({0: ["a"]}, "'a' is not an expert"),
        ({0: [1.5]}, "1.5 is not an expert"),
        ({"*": [1]}, r"'\*' is not a layer"),
    ],
)
def test_what_are_no_experts(experts, sentence):
    with pytest.raises(InputError, match=sentence):
        ablate_experts(experts)
    with pytest.raises(InputError, match=sentence):
        force_experts(experts)


def test_a_single_expert_needs_no_list():
    assert repr(force_experts({0: 3})) == "force_experts({0: [3]})"


@pytest.mark.parametrize(
    ("amounts", "sentence"),
    [
        ({}, "should be"),
        ({0: [1]}, r"should be \{layer: \{expert: amount\}\}"),
        ([1], r"should be \{layer: \{expert: amount\}\}"),
        ({0: {1: float("inf")}}, "not finite"),
        ({0: {1: float("nan")}}, "not finite"),
        ({0: {1: "much"}}, "'much' is no amount"),
        ({0: {}}, "no experts are named"),
    ],
)
def test_what_are_no_amounts(amounts, sentence):
    with pytest.raises(InputError, match=sentence):
        bias_router(amounts)


def test_words_that_are_none():
    with pytest.raises(InputError, match="how is 'mean'"):
        ablate_experts({0: [1]}, how="mean")
    with pytest.raises(InputError, match="renormalise goes with how='zero'"):
        ablate_experts({0: [1]}, renormalise=True)
    with pytest.raises(InputError, match="weights is 'hot'"):
        freeze_routes({}, "hot")


# Laws

layers = st.dictionaries(
    st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1
)
places = st.one_of(
    st.none(),
    st.integers(-10, 9),
    st.lists(st.booleans(), min_size=10, max_size=10),
    st.sampled_from(["prompt", "new"]),
)
law = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@law
@given(layers, places, st.sampled_from(["refill", "zero"]))
def test_ablating_twice_is_ablating_once(experts, positions, how):
    model = model_of("mixtral")
    edit = ablate_experts(experts, how, positions=positions)
    with torch.no_grad():
        assert torch.equal(run(model, edit + edit), run(model, edit))
        again = ablate_experts(experts, how, positions=positions)
        assert torch.equal(run(model, edit + again), run(model, edit))


@law
@given(layers, places)
def test_renormalising_twice_is_renormalising_once(experts, positions):
    model = model_of("mixtral")
    edit = ablate_experts(experts, "zero", renormalise=True, positions=positions)
    with torch.no_grad():
        assert close(run(model, edit + edit), run(model, edit))


@law
@given(layers, places)
def test_a_bias_of_nothing_changes_nothing(experts, positions):
    model = model_of("mixtral")
    amounts = {layer: dict.fromkeys(ids, 0.0) for layer, ids in experts.items()}
    with torch.no_grad():
        assert torch.equal(run(model, bias_router(amounts, positions=positions)), model(TOKENS))


@law
@given(layers, places, st.floats(-3, 3))
def test_biases_add_up(experts, positions, amount):
    model = model_of("mixtral")

    def bias(by: float) -> Edit:
        amounts = {layer: dict.fromkeys(ids, by) for layer, ids in experts.items()}
        return bias_router(amounts, positions=positions)

    with torch.no_grad():
        assert close(run(model, bias(amount) + bias(-amount)), model(TOKENS))


@law
@given(st.integers(0, 2), st.integers(0, 9))
def test_forcing_what_is_chosen_anyway_changes_nothing(layer, pos):
    model = model_of("mixtral")
    with torch.no_grad():
        chosen = routes(model, layer=layer)[0, pos].tolist()
        mask = torch.zeros(2, 10, dtype=torch.bool)
        mask[0, pos] = True
        for forced in (chosen, chosen[::-1], chosen[:1]):
            edit = force_experts({layer: forced}, positions=mask)
            assert close(run(model, edit), model(TOKENS))
