"""Ablation in the weights of a copy: it equals the hooks, touches what writes, and is not saved."""

import copy

import pytest
import tiny
import torch
from tiny import model_of
from torch import Tensor, nn

import llama_probe as lp
from llama_probe.errors import ConfigError, InputError
from llama_probe.interventions import ablate
from llama_probe.model.llama import Llama
from llama_probe.refusal.weights import orthogonalised

# Experts with a shared one whose weight multiplies the input (tiny-moe, Llama 4; Maverick has
# dense layers in between), with a gated shared one (Qwen 2), with none (Mixtral); biases.
FAMILIES = ["tiny-moe", "mixtral", "llama4-maverick", "qwen2-moe", "llama-biased", "llama-tied"]
TOKENS = tiny.tokens(batch=2, length=24)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def direction_of(model: Llama, *rows: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*rows, model.cfg.d_model, generator=generator)


def farthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def tie(twin: Llama) -> Llama:
    """The trap: the one matrix edited that the embedding and the unembedding share."""
    twin.unembed.weight = twin.embed.weight
    return twin


# The same as hooks


@pytest.mark.parametrize("rank", [(), (3,)], ids=["vector", "subspace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_and_weights_give_the_same_logits(family, rank):
    model = model_of(family)
    direction = direction_of(model, *rank)
    hooked = model.run_with_hooks(TOKENS, fwd_hooks=ablate(direction))
    assert farthest(hooked, orthogonalised(model, direction)(TOKENS)) <= 1e-3
    assert farthest(hooked, model(TOKENS)) > 0.1


def test_and_the_same_text():
    model = model_of("tiny-moe")
    direction = direction_of(model)
    prompts = [one["chat"] for one in lp.prompts.planted()["exam"]["restricted"][:4]]
    asked = {"template": "chat", "max_new_tokens": 12}
    hooked = model.generate(prompts, fwd_hooks=ablate(direction), **asked)
    assert orthogonalised(model, direction).generate(prompts, **asked) == hooked


@pytest.mark.parametrize("family", ["llama4-maverick", "llama-biased"])
def test_a_fraction_of_each_write_is_weights_part_of_the_way(family):
    model = model_of(family)
    direction = direction_of(model)
    part = orthogonalised(model, direction)
    for name, weight in part.named_parameters():
        weight.copy_(0.7 * model.state_dict()[name] + 0.3 * weight)
    writes = ("hook_embed", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")
    edit = ablate(direction, at=writes, fraction=0.3)
    assert farthest(model.run_with_hooks(TOKENS, fwd_hooks=edit), part(TOKENS)) <= 1e-3
    # At the published sites, blocks take from what is left.
    everywhere = model.run_with_hooks(TOKENS, fwd_hooks=ablate(direction, fraction=0.3))
    assert farthest(everywhere, part(TOKENS)) > 0.01


@pytest.mark.slow
def test_on_a_real_model(smollm2):
    """Random directions, and one along the few dimensions that are far larger than the rest."""
    text = "The three primary colours are red, blue and yellow. Water boils at a temperature of"
    stream = smollm2.run_with_cache(text, names_filter="blocks.15.hook_resid_pre")[1]
    massive = stream["resid_pre", 15][0, 0]
    for direction in (direction_of(smollm2), massive):
        hooked = smollm2.run_with_hooks(text, fwd_hooks=ablate(direction))
        twin = orthogonalised(smollm2, direction)
        assert farthest(hooked, twin(text)) <= 1e-3
        assert farthest(hooked, smollm2(text)) > 0.1
        assert farthest(hooked, tie(twin)(text)) > 0.1


# The trap of tied embeddings


def test_editing_a_tied_matrix_is_another_model():
    model = model_of("llama-tied")
    direction = direction_of(model)
    hooked = model.run_with_hooks(TOKENS, fwd_hooks=ablate(direction))
    assert model.unembed.weight is model.embed.weight
    assert farthest(hooked, tie(orthogonalised(model, direction))(TOKENS)) > 0.1


def test_it_would_be_the_same_if_the_last_norm_weighed_all_alike():
    model = copy.deepcopy(model_of("llama-tied"))
    model.ln_final.weight.fill_(1.7)
    direction = direction_of(model)
    hooked = model.run_with_hooks(TOKENS, fwd_hooks=ablate(direction))
    assert farthest(hooked, tie(orthogonalised(model, direction))(TOKENS)) <= 1e-3


# What is edited and what is not


@pytest.mark.parametrize("family", FAMILIES)
def test_what_writes_is_projected_and_nothing_else_changes(family):
    model = model_of(family)
    unit = nn.functional.normalize(direction_of(model), dim=0)
    twin = orthogonalised(model, 5 * unit)
    writes = ("embed.weight", ".o.weight", ".o.bias", ".down.weight", ".down.bias", "experts_out")
    before = model.state_dict()
    for name, weight in twin.state_dict().items():
        if not name.endswith(writes) or name == "unembed.weight":
            assert torch.equal(weight, before[name]), name
            continue
        axis = {"embed.weight": 1}.get(name, weight.ndim - 2 if weight.ndim > 1 else 0)
        left = torch.tensordot(weight, unit, dims=([axis], [0]))
        there = torch.tensordot(before[name], unit, dims=([axis], [0]))
        assert left.abs().max() <= 1e-5 * weight.norm(), name
        assert (there.abs() > 1e-4).any(dim=-1).all(), name  # each expert's had some
        moved = torch.movedim(before[name] - weight, axis, -1)
        assert farthest(moved, there[..., None] * unit) <= 1e-5, name


def test_the_model_itself_does_not_change():
    model = model_of("llama-tied")
    before = copy.deepcopy(model.state_dict())
    twin = orthogonalised(model, direction_of(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.unembed.weight is model.embed.weight and model.cfg.tied
    assert twin.unembed.weight is not twin.embed.weight and not twin.cfg.tied
    assert twin.cfg.model_name == f"{model.cfg.model_name} (orthogonalised)"
    assert twin.unembed.weight.requires_grad == model.unembed.weight.requires_grad


def test_a_copy_made_while_hooks_are_in_place_has_none():
    model = tiny.make("llama-gqa")
    direction = direction_of(model)
    with model.hooks([("blocks.*.hook_mlp_out", lambda x, hook: 0 * x)]):
        twin = orthogonalised(model, direction)
        silent = model(TOKENS)
    assert not any(point.fwd_hooks for point in twin.hook_points())
    assert farthest(twin(TOKENS), orthogonalised(model, direction)(TOKENS)) == 0
    assert farthest(twin(TOKENS), silent) > 0.1


def test_a_direction_of_zero_leaves_every_weight():
    model = model_of("mixtral")
    twin = orthogonalised(model, torch.zeros(model.cfg.d_model))
    assert torch.equal(twin(TOKENS), model(TOKENS))


# Never saved


def test_it_is_not_saved_nor_is_a_copy_of_it(tmp_path):
    model = tiny.make("llama-gqa")
    twin = orthogonalised(model, direction_of(model))
    for one in (twin, copy.deepcopy(twin), orthogonalised(twin, direction_of(model)), twin.half()):
        with pytest.raises(InputError, match=r"\(orthogonalised\) is not to be saved: its weights"):
            lp.save(one, tmp_path / "edited")
    assert not list(tmp_path.iterdir())
    assert lp.save(model, tmp_path / "whole").is_dir()


# What cannot be used


def test_a_direction_of_another_width_is_refused():
    with pytest.raises(InputError, match="has 5 dimensions, but the model's residual stream has"):
        orthogonalised(model_of("mixtral"), torch.ones(5))


def test_a_feed_forward_that_is_not_known_is_refused():
    model = tiny.make("llama-gqa")
    model.blocks[1].mlp = nn.Identity()
    with pytest.raises(ConfigError, match="type Identity is not known"):
        orthogonalised(model, direction_of(model))
