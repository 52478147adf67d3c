"""Every named quantity is live, and hooks keep their promises."""

from functools import cache, partial
from typing import Any

import pytest
import tiny
import torch
from conftest import unchecked
from torch import Tensor

import llama_probe as lp
from llama_probe.errors import HookNameError, InputError
from llama_probe.hooks import OPT_IN, act_name, match_names, reads_only
from llama_probe.model.llama import Llama

ARCHITECTURES = ("llama-biased", "mixtral", "llama4-maverick", "qwen2-moe", "qwen3-moe")
TOKENS = tiny.tokens(batch=2, length=6)
# Hooks that are computed only when listened to.
LAZY = (*OPT_IN, "hook_mlp_in", "attn.hook_attn_scores", "attn.hook_pattern")


@cache
def model_of(family: str) -> Llama:
    return tiny.make(family)


def names_of(family: str) -> list[str]:
    return list(model_of(family).hook_dict)


@cache
def plain_logits(family: str) -> Tensor:
    return model_of(family)(TOKENS)


CASES = [(family, name) for family in ARCHITECTURES for name in names_of(family)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def perturb(tensor: Tensor, hook: Any, scale: float = 0.3) -> Tensor:
    """Random noise; for expert indices another choice of as many experts."""
    generator = torch.Generator().manual_seed(7)
    if not tensor.is_floating_point():
        experts = 8 if "qwen" in model_name(hook) else 6 if model_name(hook) == "mixtral" else 4
        return torch.randperm(experts, generator=generator)[: tensor.shape[-1]].expand_as(tensor)
    noise = scale * torch.randn(tensor.shape, generator=generator).to(tensor)
    # Masked scores stay masked.
    return tensor + noise.masked_fill(tensor.isinf(), 0)


def model_name(hook: Any) -> str:
    return hook.ctx["family"]


def with_family(family: str) -> Llama:
    model = model_of(family)
    for point in model.hook_dict.values():
        point.ctx["family"] = family
    return model


@reads_only
def look(tensor: Tensor, hook: Any) -> None:
    """Listen without touching."""


@pytest.mark.parametrize(("family", "name"), CASES)
def test_no_hook_is_dead(family, name):
    model = with_family(family)
    edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, perturb)])
    assert (edited - plain_logits(family)).abs().max() > 1e-3


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_no_hook_is_dead_while_another_is_listened_to(family, block):
    """Pairs within a block; editing `ln1.hook_*` beside split inputs raises, by design."""
    model = with_family(family)
    names = [n for n in model.hook_dict if n.startswith(f"blocks.{block}.")]
    for other in (name for name in names if name.endswith(LAZY)):
        with model.hooks([(other, look)]), unchecked():
            baseline = model(TOKENS)
            for name in names:
                edit = [(name, perturb)]
                if ".ln1." in name and other.endswith("_input"):
                    with pytest.raises(InputError, match="edit one or the other"):
                        model.run_with_hooks(TOKENS, fwd_hooks=edit)
                else:
                    logits = model.run_with_hooks(TOKENS, fwd_hooks=edit)
                    assert (logits - baseline).abs().max() > 1e-3, (name, other)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_reading_changes_nothing(family):
    model = model_of(family)
    plain = model(TOKENS)
    for name in names_of(family):
        read = model.run_with_hooks(TOKENS, fwd_hooks=[(name, look)])
        if name.endswith(LAZY):
            torch.testing.assert_close(read, plain, atol=2e-5, rtol=0)
        else:
            assert torch.equal(read, plain), name


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_shapes_are_those_of_the_table(family):
    model = model_of(family)
    cfg = model.cfg
    _, kept = model.run_with_cache(TOKENS, names_filter="*")
    assert list(kept) == sorted(kept, key=list(kept).index) and set(kept) == set(model.hook_dict)
    b, p, h, kv = 2, 6, cfg.n_heads, cfg.n_key_value_heads
    d, dh = cfg.d_model, cfg.d_head
    k, e, f = (cfg.moe.top_k, cfg.moe.n_experts, cfg.moe.d_expert) if cfg.moe else (0, 0, 0)
    shapes = {
        "hook_embed": (b, p, d),
        "hook_resid_pre": (b, p, d),
        "hook_resid_mid": (b, p, d),
        "hook_resid_post": (b, p, d),
        "hook_scale": (b, p, 1),
        "hook_normalized": (b, p, d),
        "hook_q": (b, p, h, dh),
        "hook_k": (b, p, kv, dh),
        "hook_v": (b, p, kv, dh),
        "hook_rot_q": (b, p, h, dh),
        "hook_rot_k": (b, p, kv, dh),
        "hook_attn_scores": (b, h, p, p),
        "hook_pattern": (b, h, p, p),
        "hook_q_input": (b, p, h, d),
        "hook_k_input": (b, p, kv, d),
        "hook_v_input": (b, p, kv, d),
        "hook_mlp_in": (b, p, d),
        "hook_z": (b, p, h, dh),
        "hook_result": (b, p, h, d),
        "hook_attn_out": (b, p, d),
        "hook_mlp_out": (b, p, d),
        "hook_pre": (b, p, cfg.d_mlp),
        "hook_pre_linear": (b, p, cfg.d_mlp),
        "hook_post": (b, p, cfg.d_mlp),
        "hook_router_logits": (b, p, e),
        "hook_expert_indices": (b, p, k),
        "hook_expert_weights": (b, p, k),
        "hook_expert_out": (b, p, k, d),
        "hook_expert_pre": (b, p, k, f),
        "hook_expert_pre_linear": (b, p, k, f),
        "hook_expert_post": (b, p, k, f),
        "hook_shared_out": (b, p, d),
        "hook_shared_gate": (b, p, 1),
        "hook_logits": (b, p, cfg.d_vocab),
    }
    shared = (b, p, cfg.moe.d_shared if cfg.moe else 0)
    for word in ("pre", "pre_linear", "post"):
        shapes[f"hook_shared_{word}"] = shared
    for name, tensor in kept.items():
        assert tuple(tensor.shape) == shapes[name.rpartition(".")[2]], name


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("cut", [2, (1, 4)])
def test_pos_slice_cuts_the_position_axis_of_every_hook(family, cut):
    model = model_of(family)
    _, whole = model.run_with_cache(TOKENS, names_filter="*")
    _, cuts = model.run_with_cache(TOKENS, names_filter="*", pos_slice=cut)
    index = slice(*cut) if isinstance(cut, tuple) else slice(cut, cut + 1)
    for name, tensor in whole.items():
        heads_first = name.endswith(("hook_attn_scores", "hook_pattern"))
        expected = tensor[:, :, index] if heads_first else tensor[:, index]
        assert torch.equal(cuts[name], expected), name


def test_a_position_that_is_not_there_gets_a_sentence():
    model = tiny.make("llama-gqa")
    with pytest.raises(InputError, match="pos_slice is 3, but ln_final.hook_scale has 1"):
        model.run_with_cache(TOKENS, names_filter="ln_final.hook_scale", pos_slice=3, logits_at=-1)


def test_an_unfiltered_cache_leaves_out_what_multiplies_memory():
    model = model_of("qwen2-moe")
    _, kept = model.run_with_cache(TOKENS)
    assert not any(name.endswith(OPT_IN) for name in kept)
    assert set(model.hook_dict) - set(kept) == {n for n in model.hook_dict if n.endswith(OPT_IN)}


class Stop(Exception):
    pass


def test_no_hook_survives_an_exception():
    model = model_of("mixtral")

    def fail(tensor: Tensor, hook: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        model.run_with_hooks(TOKENS, fwd_hooks=[("*", look), ("blocks.1.hook_mlp_out", fail)])
    with pytest.raises(Stop), model.hooks([("blocks.1.hook_mlp_out", fail)]):
        model.run_with_cache(TOKENS)
    with pytest.raises(HookNameError), model.hooks([("hook_embed", look), ("no_such", look)]):
        pass
    assert not any(point._forward_hooks or point.fwd_hooks for point in model.hook_dict.values())


def test_a_name_that_matches_nothing_gives_the_near_ones():
    model = model_of("llama-biased")
    for run in (
        lambda: model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pots"),
        lambda: model.run_with_cache(
            TOKENS, names_filter=["hook_embed", "blocks.0.hook_resid_pots"]
        ),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pots", look)]),
        lambda: model.add_hook("blocks.0.hook_resid_pots", look),
        lambda: model.hook_names("blocks.0.hook_resid_pots"),
    ):
        with pytest.raises(HookNameError, match="did you mean 'blocks.0.hook_resid_post'"):
            run()
    with pytest.raises(HookNameError, match="empty list"):
        model.run_with_cache(TOKENS, names_filter=[])
    with pytest.raises(HookNameError, match="accepts none"):
        model.run_with_cache(TOKENS, names_filter=lambda name: False)
    with pytest.raises(HookNameError, match="no hook is named"):
        model.run_with_cache(TOKENS, names_filter="blocks.*.mlp.hook_router_logits")


def test_a_cache_miss_gives_the_near_names():
    _, kept = model_of("llama-biased").run_with_cache(TOKENS, names_filter="*resid_post")
    assert kept["resid_post", 1] is kept["blocks.1.hook_resid_post"]
    with pytest.raises(HookNameError, match="did you mean"):
        kept["blocks.1.hook_resid_past"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda t: t[:, :1], "keep the shape"),
        (lambda t: 3.0, "should return a tensor"),
        (lambda t: t.long(), "int64"),
    ],
)
def test_a_hook_that_returns_something_else_is_an_error(result, message):
    edit = [("blocks.0.hook_mlp_out", lambda tensor, hook: result(tensor))]
    with pytest.raises(InputError, match=message):
        model_of("llama-biased").run_with_hooks(TOKENS, fwd_hooks=edit)


def set_in_place(tensor: Tensor, hook: Any, give_back: bool) -> Tensor | None:
    tensor.fill_(0.5)
    return tensor if give_back else None


@pytest.mark.parametrize(
    ("family", "give_back"),
    [("llama-biased", False), *((family, True) for family in ARCHITECTURES)],
)
def test_an_edit_in_place_acts_and_changes_nothing_else(family, give_back):
    """TransformerLens' setters edit in place; so do they here, on copies."""
    model = model_of(family)
    _, plain = model.run_with_cache(TOKENS, names_filter="*")
    reference = {name: tensor.clone() for name, tensor in plain.items()}
    setter = partial(set_in_place, give_back=give_back)
    names = [
        name
        for name in model.hook_dict
        if name.startswith(("blocks.1.", "hook_", "ln_final."))
        and plain[name].is_floating_point()
        and ".ln1." not in name
    ]
    for name in names:
        with model.hooks([(name, setter)]):
            logits, _ = model.run_with_cache(TOKENS, names_filter=["*_resid_*", "*_out"])
        pure = model.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda t, hook: torch.full_like(t, 0.5))]
        )
        torch.testing.assert_close(logits, pure, atol=2e-5, rtol=0)
    for name, tensor in plain.items():
        assert torch.equal(tensor, reference[name]), name


def test_what_is_cached_before_an_edit_stays_what_it_was():
    """The stream after block 0 and before block 1 is one tensor; editing the second in place."""
    model = model_of("llama-biased")
    plain = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_post")[1]
    with model.hooks([("blocks.1.hook_resid_pre", partial(set_in_place, give_back=True))]):
        _, kept = model.run_with_cache(TOKENS, names_filter="blocks.*.hook_resid_*")
    assert torch.equal(kept["resid_post", 0], plain["resid_post", 0])
    assert kept["resid_post", 0].abs().sum() > 0


def test_a_given_stream_is_never_edited():
    model = model_of("llama-biased")
    _, kept = model.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_pre")
    stream = kept["resid_pre", 1].clone()
    given = stream.clone()
    edit = [("blocks.1.hook_resid_pre", partial(set_in_place, give_back=True))]
    with model.hooks(edit):
        _, inner = model.run_with_cache(given, start_at_layer=1, names_filter="*resid_pre")
    assert torch.equal(given, stream)
    given.zero_()
    assert inner["resid_pre", 2].abs().sum() > 0


def test_hooks_act_in_order_and_see_each_other():
    model = model_of("llama-biased")
    seen = []

    def add_one(tensor: Tensor, hook: Any) -> Tensor:
        seen.append(float(tensor[0, 0, 0]))
        return tensor + 1

    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", add_one), ("hook_embed", add_one)])
    assert seen[1] == pytest.approx(seen[0] + 1)


def test_gradients_reach_hooks_though_weights_are_frozen():
    model = model_of("qwen2-moe")
    names = [n for n in model.hook_dict if "indices" not in n]
    with torch.enable_grad():
        kept = {}

        def keep(gradient: Tensor, hook: Any) -> None:
            kept[hook.name] = gradient.clone()

        with model.hooks(bwd_hooks=[(names, keep)]):
            model(TOKENS)[:, -1, 5].sum().backward()
    lost = {name for name in names if name not in kept or not kept[name].abs().sum() > 0}
    # `hook_scale` and `hook_normalized` of ln1 do not act while inputs are split per head.
    assert {name for name in lost if ".ln1." not in name} == set()


def test_incl_bwd_on_a_mixture_of_experts():
    with torch.enable_grad():
        _, kept = model_of("mixtral").run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert kept["blocks.0.mlp.hook_router_logits_grad"].abs().sum() > 0


def test_incl_bwd_keeps_gradients():
    model = model_of("llama-biased")
    with torch.enable_grad():
        loss, kept = model.run_with_cache(
            TOKENS, return_type="loss", incl_bwd=True, names_filter="*resid_post"
        )
    assert loss.ndim == 0
    assert kept["blocks.0.hook_resid_post_grad"].shape == kept["resid_post", 0].shape
    assert kept["blocks.0.hook_resid_post_grad"].abs().sum() > 0


def test_backward_hooks_that_could_never_act_are_refused():
    with pytest.raises(InputError, match="model.hooks"):
        model_of("llama-biased").run_with_hooks(TOKENS, bwd_hooks=[("hook_embed", look)])


def test_hooks_that_are_no_pairs_are_refused():
    with pytest.raises(InputError, match="list of pairs"):
        model_of("llama-biased").run_with_hooks(TOKENS, fwd_hooks=("hook_embed", look))


def test_remove_batch_dim():
    model = model_of("llama-biased")
    _, kept = model.run_with_cache(TOKENS[:1], names_filter="*hook_z", remove_batch_dim=True)
    assert kept["z", 0].ndim == 3
    with pytest.raises(InputError, match="batch of 1"):
        model.run_with_cache(TOKENS, names_filter="*hook_z", remove_batch_dim=True)


def test_act_name_writes_names_that_exist():
    dense, sparse = model_of("llama-biased"), model_of("qwen2-moe")
    for model, layer in ((dense, 1), (sparse, 0)):
        prefix = f"blocks.{layer}."
        for name in (n for n in model.hook_dict if n.startswith(prefix) and ".ln" not in n):
            word = name.rpartition("hook_")[2]
            assert act_name(word, layer) == name
    assert act_name("scale", 1, "ln2") == "blocks.1.ln2.hook_scale"
    assert act_name("embed") == "hook_embed"


def test_globs_keep_the_models_order():
    names = ["a.hook_z", "b.hook_z", "c"]
    assert match_names(["b.*", "a.*"], names) == ["a.hook_z", "b.hook_z"]
    assert match_names(lambda name: name == "c", names) == ["c"]


def test_editing_router_logits_reroutes():
    model = model_of("mixtral")
    logits = "blocks.1.mlp.hook_router_logits"

    def prefer_last(tensor: Tensor, hook: Any) -> Tensor:
        return tensor + torch.tensor([0.0, 0, 0, 0, 50, 50])

    with model.hooks([(logits, prefer_last)]):
        _, kept = model.run_with_cache(TOKENS, names_filter="blocks.1.mlp.*")
    assert set(kept["expert_indices", 1].unique().tolist()) == {4, 5}
    weights = kept["expert_weights", 1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "llama4-maverick"])
def test_editing_indices_reroutes_with_the_weights_of_the_logits(family):
    model = model_of(family)
    layer = 1
    name = f"blocks.{layer}.mlp.hook_expert_indices"
    assert model.cfg.moe is not None
    forced = torch.arange(model.cfg.moe.top_k)
    with model.hooks([(name, lambda t, hook: forced.expand_as(t))]):
        _, kept = model.run_with_cache(TOKENS, names_filter=f"blocks.{layer}.mlp.*")
    logits = kept["router_logits", layer]
    if model.cfg.moe.rule == "sigmoid_input":
        expected = logits[..., forced].sigmoid()
    else:
        expected = logits.softmax(-1)[..., forced]
        if model.cfg.moe.renormalise:
            expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(kept["expert_weights", layer], expected)


@pytest.mark.parametrize(
    ("indices", "message"), [([0, 6], "experts 0 to 5"), ([-1, 0], "experts 0"), ([2, 2], "twice")]
)
def test_impossible_indices_are_refused(indices, message):
    edit = lambda tensor, hook: torch.tensor(indices).expand_as(tensor)  # noqa: E731
    hooks = [("blocks.0.mlp.hook_expert_indices", edit)]
    with pytest.raises(InputError, match=message):
        model_of("mixtral").run_with_hooks(TOKENS, fwd_hooks=hooks)


def test_editing_weights_reweights():
    model = model_of("mixtral")
    double = [("blocks.2.mlp.hook_expert_weights", lambda tensor, hook: 2 * tensor)]
    _, plain = model.run_with_cache(TOKENS, names_filter="blocks.2.mlp.*")
    with model.hooks(double):
        _, kept = model.run_with_cache(TOKENS, names_filter="blocks.2.mlp.*")
    torch.testing.assert_close(kept["expert_out", 2], 2 * plain["expert_out", 2])


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "llama4-maverick"])
def test_experts_and_shared_expert_sum_to_the_layer(family):
    model = model_of(family)
    layer = next(i for i in range(3) if model.cfg.moe_layers[i])
    _, kept = model.run_with_cache(TOKENS, names_filter=f"blocks.{layer}.*")
    total = kept["expert_out", layer].sum(dim=2)
    if model.cfg.moe is not None and model.cfg.moe.d_shared:
        total = total + kept["shared_out", layer]
    torch.testing.assert_close(total, kept["mlp_out", layer])


def test_heads_sum_to_the_attention():
    model = model_of("llama-biased")
    _, kept = model.run_with_cache(TOKENS, names_filter="blocks.1.*")
    total = kept["result", 1].sum(dim=2) + model.blocks[1].attn.b_O
    torch.testing.assert_close(total, kept["attn_out", 1])


def test_the_public_names():
    assert lp.act_name is act_name and lp.ActivationCache is not None
