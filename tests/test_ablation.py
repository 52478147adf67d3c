"""Ablation cell by cell: against plain hooks, and what each kind puts in."""

import numpy as np
import pytest
import tiny
import torch
from conftest import unchecked

import llama_probe as lp
from llama_probe.errors import InputError

METRIC = lp.logit_diff(7, 8)
PROMPTS = tiny.tokens(batch=4, length=6, seed=2)


@pytest.fixture(scope="module", params=["llama-gqa", "mixtral", "llama4-scout"])
def model(request) -> lp.Llama:
    return tiny.make(request.param)


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
@pytest.mark.parametrize("at", ["attn_out", "z", "mlp_out", "pattern"])
def test_the_engine_gives_what_one_pass_a_cell_gives(model, at, by):
    for over in (None, ("layer",)):
        options = {"metric": METRIC, "at": at, "by": by, "over": over, "each": True}
        fast = lp.ablate_each(model, PROMPTS, **options)
        with unchecked():
            plain = lp.ablate_each(model, PROMPTS, engine="reference", **options)
        assert np.allclose(fast.metric, plain.metric, atol=1e-4)
        assert fast.metric.std() > 0


def test_a_head_at_its_mean_against_a_plain_hook(model):
    name = lp.act_name("z", 1)
    logits, cache = model.run_with_cache(PROMPTS, names_filter=name)
    mean = cache[name].mean(0)

    def set_head(z, hook):
        z[:, :, 3] = mean[:, 3]
        return z

    ablated = model.run_with_hooks(PROMPTS, fwd_hooks=[(name, set_head)])
    frame = lp.ablate_each(model, PROMPTS, metric=METRIC, layers=[1], units=[3])
    before, after = (float(METRIC(x[:, -1]).mean()) for x in (logits, ablated))
    assert frame.metric[0] == pytest.approx(after, abs=1e-5)
    assert frame.effect[0] == pytest.approx((before - after) / before, abs=1e-4)
    assert frame.corrupted.isna().all()


def test_zeroing_the_last_thing_that_is_added_leaves_the_embedding(model):
    zero = [("*.hook_mlp_out", torch.zeros_like), ("blocks.[1-9].hook_attn_out", torch.zeros_like)]
    hooks = [(name, lambda x, hook, fill=fill: fill(x)) for name, fill in zero]
    with model.hooks(hooks):
        frame = lp.ablate_each(model, PROMPTS, metric=METRIC, at="attn_out", by="zero",
                               over="layer", layers=[0], each=True)  # fmt: skip
    embedding = model(model.embed(PROMPTS), start_at_layer=model.cfg.n_layers)[:, -1]
    assert np.allclose(frame.metric, METRIC(embedding).detach(), atol=1e-5)
    assert not np.allclose(frame.metric, frame.clean, atol=1e-3)


def test_a_resampled_prompt_is_never_its_own(model):
    """At the last stream, what is put in decides alone: each prompt has another's metric."""
    last = model.cfg.n_layers - 1
    own = METRIC(model(PROMPTS)[:, -1])
    frame = lp.ablate_each(model, PROMPTS, metric=METRIC, at="resid_post", by="resample",
                           over=("layer",), layers=[last], each=True)  # fmt: skip
    got = torch.tensor(frame.metric.to_numpy()).float()
    assert torch.allclose(got.sort().values, own.sort().values, atol=1e-5)
    assert ((got - own).abs() > 1e-4).all()


def test_reference_prompts(model):
    others = tiny.tokens(batch=5, length=9, seed=8)
    _, cache = model.run_with_cache(others, names_filter="*.hook_attn_out")
    expected = cache["attn_out", 1][:, -6:].mean(0)
    hooks = [(lp.act_name("attn_out", 1), lambda x, hook: expected.expand_as(x))]
    value = float(METRIC(model.run_with_hooks(PROMPTS, fwd_hooks=hooks)[:, -1]).mean())
    frame = lp.ablate_each(
        model, PROMPTS, metric=METRIC, at="attn_out", over="layer", layers=[1], reference=others
    )
    assert frame.metric[0] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "noise"}, "by is 'noise'"),
        ({"prompts": PROMPTS[:1]}, "a mean needs several prompts"),
        ({"prompts": PROMPTS[:1], "by": "resample"}, "resampling needs several prompts"),
        ({"reference": PROMPTS[:, 1:]}, "at most 5 tokens"),
        ({"reference": PROMPTS[:, 1:], "by": "resample"}, "one length"),
        ({"metric": lambda logits: logits[:, 0] * 0}, "nothing to lose"),
    ],
)
def test_bad_input_gets_a_sentence(model, options, message):
    given = {"prompts": PROMPTS, "metric": METRIC, **options}
    with pytest.raises(InputError, match=message):
        lp.ablate_each(model, given.pop("prompts"), **given)


def test_experts_can_be_zeroed_only():
    model = tiny.make("mixtral")
    frame = lp.ablate_each(
        model, PROMPTS, metric=METRIC, at="expert_out", by="zero", over=("layer", "expert")
    )
    assert len(frame) == model.cfg.n_layers * model.cfg.moe.n_experts
    with pytest.raises(InputError, match="only be ablated by 'zero'"):
        lp.ablate_each(model, PROMPTS, metric=METRIC, at="expert_out")
