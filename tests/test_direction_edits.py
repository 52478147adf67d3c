"""Edits along directions in a model: where they act, in generation too, and that nothing stays."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from one_hook import act, farthest, here, random
from tiny import model_of
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, reads_only
from llama_probe.interventions import ablate, add, affine, replace
from llama_probe.interventions.vectors import span_of
from llama_probe.model.llama import Llama

TOKENS = tiny.tokens(batch=2, length=10)
SOURCE = "blocks.2.hook_resid_pre"
SITES = ["*.hook_resid_pre", "*.hook_attn_out", "*.hook_mlp_out"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def streams(model: Llama, edit: Any = ()) -> Any:
    with model.hooks(edit):
        return model.run_with_cache(TOKENS, names_filter=["*.hook_resid_p*", *SITES[1:]])[1]


def component(x: Tensor, r: Tensor) -> Tensor:
    return x.double() @ (r.double() / r.double().norm())


# Where it acts


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_leaks_at_any_site_in_prompt_or_new_tokens(rows):
    """Every tensor at the three sites and between, in each pass of a generation."""
    model = model_of("tiny-moe")
    directions = random(rows, model.cfg.d_model, seed=7)
    span, seen = span_of(directions).float(), []

    @reads_only
    def look(tensor: Tensor, hook: HookPoint) -> None:
        share = (tensor @ span.T).norm(dim=-1) / tensor.norm(dim=-1)
        seen.append((hook.name, tensor.shape[1] > 1, float(share.max())))

    def leaks(edit: Any) -> dict[tuple[str, bool], float]:
        seen.clear()
        watch = [([*SITES, "*.hook_resid_mid", "*.hook_resid_post"], look)]
        model.generate(["12+30=", "The dog"], max_new_tokens=5, fwd_hooks=[*edit, *watch])
        return {(name, prompt): share for name, prompt, share in seen}

    before, after = leaks(()), leaks(ablate(directions))
    assert len(after) == 2 * 5 * model.cfg.n_layers  # prompt and new, five hooks a block
    assert min(before.values()) > 1e-3
    assert max(after.values()) <= 1e-5


def test_names_of_sites_and_layers():
    names = [name for name, _ in ablate(torch.ones(6))]
    assert names == ["blocks.*.hook_resid_pre", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]
    names = [name for name, _ in ablate(torch.ones(6), at="resid_mid", layers=[0, np.int64(2)])]
    assert names == ["blocks.0.hook_resid_mid", "blocks.2.hook_resid_mid"]
    names = [name for name, _ in ablate(torch.ones(6), at=("hook_embed", "mlp_out"))]
    assert names == ["hook_embed", "blocks.*.hook_mlp_out"]


def test_only_the_layers_that_are_named_are_edited():
    model = model_of("llama-gqa")
    r = random(64, seed=5)
    cache = streams(model, ablate(r, layers=1))
    for site in ("resid_pre", "attn_out", "mlp_out"):
        assert component(cache[site, 1], r).abs().max() <= 1e-5
        assert component(cache[site, 0], r).abs().max() > 0.1
    # What enters layer 2 is what layer 1 passed on, and wrote without the component.
    assert component(cache["attn_out", 2], r).abs().max() > 0.1


def test_adding_acts_at_the_source_alone():
    model = model_of("llama-gqa")
    r = lp.Direction(random(64, seed=5), SOURCE, 2, "-1", {})
    before, after = streams(model), streams(model, add(r, 2))
    assert farthest(after["resid_pre", 2], before["resid_pre", 2] + 2 * r.vector.float()) <= 1e-5
    for layer in (0, 1):
        assert torch.equal(after["resid_pre", layer], before["resid_pre", layer])
        assert torch.equal(after["mlp_out", layer], before["mlp_out", layer])


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biased"])
def test_adding_is_a_bias_on_the_down_projection_of_the_layer_before(family):
    model, r = model_of(family), random(64, seed=5, dtype=torch.float32)
    biased = copy.deepcopy(model)
    down = biased.blocks[1].mlp.down
    bias = 1.5 * r if down.bias is None else down.bias + 1.5 * r
    down.bias = torch.nn.Parameter(bias)
    hooked = model.run_with_hooks(TOKENS, fwd_hooks=add(r, 1.5, at=SOURCE))
    assert farthest(hooked, biased(TOKENS)) <= 1e-4
    assert farthest(hooked, model(TOKENS)) > 0.1


def test_affine_sets_the_component_and_leaves_the_rest():
    model = model_of("llama-gqa")
    r = lp.Direction(random(64, seed=5), SOURCE, 2, "-1", {})
    before = streams(model)["resid_pre", 2]
    reference = before.flatten(0, 1).mean(dim=0)
    after = streams(model, affine(r, reference, scale=0.7))["resid_pre", 2]
    expected = component(reference, r.vector) + 0.7 * r.norm
    assert farthest(component(after, r.vector), expected.expand(2, 10)) <= 1e-4
    rest = [act(here(ablate, r), one.double()) for one in (before, after)]
    assert farthest(*rest) <= 1e-4


def test_affine_with_a_mean_for_each_hook_holds_it_down_the_model():
    model, r = model_of("llama-gqa"), random(64, seed=5)
    cache = streams(model)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    means = {name: cache[name].flatten(0, 1).mean(dim=0) for name in names}
    held, once = (
        streams(model, affine(r, means)),
        streams(model, affine(r, means[SOURCE], at=SOURCE)),
    )
    for name in names:
        assert farthest(component(held[name], r), component(means[name], r).expand(2, 10)) <= 1e-4
    assert farthest(component(once[names[1]], r), component(means[names[1]], r)) > 0.1


@pytest.mark.parametrize("shape", [(64,), (10, 64), (1, 64), (2, 10, 64), (2, 1, 64)])
def test_an_activation_is_put_there(shape):
    model, value = model_of("llama-gqa"), random(*shape, seed=6, dtype=torch.float32)
    kept = value.clone()
    edit = replace(value, at="blocks.1.hook_mlp_out")
    value.zero_()
    cache = streams(model, edit)
    assert torch.equal(cache["mlp_out", 1], kept.expand(2, 10, 64))
    assert torch.equal(cache["mlp_out", 0], streams(model)["mlp_out", 0])


MASK = torch.zeros(2, 10, dtype=torch.bool)
MASK[0, 3], MASK[1, 9] = True, True
CALLS = {
    "ablate": lambda r, **options: ablate(r, at=SOURCE, **options),
    "add": lambda r, **options: add(r, at=SOURCE, **options),
    "affine": lambda r, **options: affine(r, r, at=SOURCE, **options),
    "replace": lambda r, **options: replace(r, at=SOURCE, **options),
}


@pytest.mark.parametrize("positions", [-1, [0, 4], slice(2, 5), MASK[0], MASK, "prompt", "new"])
@pytest.mark.parametrize("name", CALLS)
def test_only_the_positions_that_are_named_are_edited(name, positions):
    model, r = model_of("llama-gqa"), random(64, seed=5, dtype=torch.float32)
    where = torch.zeros(2, 10, dtype=torch.bool)
    if isinstance(positions, str):
        where[:] = positions == "prompt"
    elif positions is MASK:
        where = MASK
    else:
        where[:, positions] = True
    before = streams(model)["resid_pre", 2]
    after = streams(model, CALLS[name](r, positions=positions))["resid_pre", 2]
    assert torch.equal(((before - after).abs() > 1e-6).any(dim=-1), where)


def test_new_tokens_alone_in_a_generation():
    model = model_of("tiny-moe")
    r = random(model.cfg.d_model, seed=7)
    seen = []

    @reads_only
    def look(tensor: Tensor, hook: HookPoint) -> None:
        seen.append((tensor.shape[1] > 1, float(component(tensor, r).abs().max())))

    hooks = ablate(r, positions="new") + [(SOURCE, look)]
    model.generate("12+30=", max_new_tokens=4, stop_tokens=[], fwd_hooks=hooks)
    assert [share > 1e-3 for _, share in seen] == [True, False, False, False]
    assert [prompt for prompt, _ in seen] == [True, False, False, False]


# As values


def test_a_generation_is_edited_and_the_model_is_not():
    model = model_of("tiny-moe")
    r = 30 * random(model.cfg.d_model, seed=7)
    weights = copy.deepcopy(model.state_dict())
    plain = model.generate("The dog", max_new_tokens=8)
    for edit in (ablate(streams(model)["resid_pre", 2][0, -1]), add(r, at=SOURCE)):
        with model.hooks(edit):
            assert model.generate("The dog", max_new_tokens=8) != plain
        assert model.generate("The dog", max_new_tokens=8) == plain
    with pytest.raises(InputError), model.hooks(ablate(r) + ablate(torch.ones(6))):
        model(TOKENS)
    assert not any(point.fwd_hooks for point in model.hook_points())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("edit", [ablate(random(64), fraction=0), add(random(64), 0, at=SOURCE)])
def test_none_of_it_is_the_model_to_the_last_bit(edit):
    model = model_of("llama-gqa")
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=edit), model(TOKENS))


def test_edits_join_and_act_in_order():
    """Ablate, then add: directional patching. The other way round nothing is left."""
    model, r = model_of("llama-gqa"), random(64, seed=5)
    out, put = ablate(r), add(r, at=SOURCE)
    after = component(streams(model, out + put)["resid_pre", 2], r)
    assert farthest(after, r.norm().expand(2, 10)) <= 1e-4
    assert component(streams(model, put + out)["resid_pre", 2], r).abs().max() <= 1e-4
    assert repr(out + put) == f"ablate(<(64,)>) + add(<(64,)>, 1.0, at='{SOURCE}')"


def test_what_is_given_may_change_afterwards_and_is_never_changed():
    given_rows = random(64, seed=5)
    kept = given_rows.clone()
    edits = [here(make, given_rows) for make in (ablate, add, replace)]
    edits.append(here(affine, given_rows, given_rows, scale=1))
    at = random(2, 3, 64, seed=8)
    before = [act(edit, at) for edit in edits]
    assert torch.equal(given_rows, kept)
    given_rows.mul_(0).add_(random(64, seed=9))
    assert all(torch.equal(act(edit, at), b) for edit, b in zip(edits, before, strict=True))


def test_an_edit_can_be_copied_and_sent():
    model, r = model_of("llama-gqa"), random(64, seed=5)
    edit = ablate(r, positions=[0, 1]) + add(r, at=SOURCE) + replace(r.float(), at="hook_embed")
    expected = model.run_with_hooks(TOKENS, fwd_hooks=edit)
    for other in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert repr(other) == repr(edit)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=other), expected)


def test_what_has_positions_goes_with_the_prompt_in_a_generation():
    model = model_of("tiny-moe")
    tokens = model.to_tokens("12+30=")
    value = random(tokens.shape[1], model.cfg.d_model, dtype=torch.float32)
    asked = {"max_new_tokens": 3, "stop_tokens": [], "return_type": "tokens"}
    with pytest.raises(InputError, match="cannot stand in"):
        model.generate(tokens, fwd_hooks=replace(value, at=SOURCE), **asked)
    put = replace(value, at=SOURCE, positions="prompt")
    assert len(model.generate(tokens, fwd_hooks=put, **asked)[0]) == 3
