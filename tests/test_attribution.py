"""Attribution patching: against gradients by finite differences, and against exact patches."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.patching.sites import SITES

CLEAN = tiny.tokens(batch=2, length=6, seed=5)
CORRUPTED = CLEAN.clone()
CORRUPTED[0, 2], CORRUPTED[1, 1] = 100, 101
METRIC = lp.logit_diff(7, 8)


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "z", "q", "k", "pattern", "mlp_out"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "mixtral", "llama4-scout"])
def test_it_is_the_slope_of_the_exact_patch(family, at):
    """Mixing a hundredth of the clean activation in changes the metric a hundredth as much."""
    model = tiny.make(family).double()
    estimate = lp.attribution_patch(model, CLEAN, CORRUPTED, metric=METRIC, at=at, each=True)
    names = "*.hook_" + at if at.startswith("resid") or at.endswith("out") else f"*.attn.hook_{at}"
    _, clean = model.run_with_cache(CLEAN, names_filter=names)
    base = METRIC(model(CORRUPTED)[:, -1])
    unit = SITES[at]
    for index in range(0, len(estimate), 7):
        row = estimate.iloc[index]
        name = lp.act_name(at, int(row.layer))

        def mix(x, hook, row=row, name=name):
            place = (slice(None),) * (1 if at == "pattern" or unit is None else 2)
            place = (*place, int(row["head"] if unit else row["pos"]))
            x[place] += 1e-4 * (clean[name][place] - x[place])
            return x

        moved = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, mix)])[:, -1])
        slope = float((moved - base)[int(row.prompt)]) / 1e-4
        assert row.metric - row.corrupted == pytest.approx(slope, abs=1e-3, rel=1e-2)


@pytest.mark.parametrize("at", ["q", "k", "rot_q", "rot_k"])
@pytest.mark.parametrize("over", [("layer", "head"), ("layer", "pos", "head"), ("layer", "pos")])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "llama4-scout"])
def test_the_qk_fix_is_exact_but_for_what_follows_the_pattern(family, at, over):
    """In the last layer, with a metric that is linear in its output, nothing else is left."""
    model = tiny.make(family)
    last = model.cfg.n_layers - 1
    options = {"metric": METRIC, "at": at, "over": over, "layers": [last], "each": True}
    hooks = [
        (f"blocks.{last}.hook_mlp_out", lambda x, hook: torch.zeros_like(x)),
        ("ln_final.hook_scale", lambda x, hook: torch.ones_like(x)),
    ]
    with model.hooks(hooks):
        exact = lp.patch(model, CLEAN, CORRUPTED, engine="reference", **options)
        plain = lp.attribution_patch(model, CLEAN, CORRUPTED, **options)
        fixed = lp.attribution_patch(model, CLEAN, CORRUPTED, qk_fix=True, **options)
    # Of several heads the gains add up, since the rest is linear.
    assert np.allclose(fixed.metric, exact.metric, atol=2e-4)
    assert not np.allclose(plain.metric, exact.metric, atol=2e-4)


def test_integrated_gradients_sum_to_the_whole_difference():
    """Of the embeddings, along the path between them (Sundararajan et al. 2017, completeness)."""
    model = tiny.make("llama-gqa")
    options = {"metric": METRIC, "over": ("layer",), "layers": [0], "each": True}
    gradient, few, many = (
        lp.attribution_patch(model, CLEAN, CORRUPTED, **kind, **options).effect
        for kind in (
            {"method": "gradient"},
            {"method": "integrated", "steps": 5},
            {"method": "integrated", "steps": 200},
        )
    )
    assert np.allclose(many, 1, atol=5e-3)
    assert (few - 1).abs().max() < (gradient - 1).abs().max()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_where_the_rest_is_linear_the_estimate_is_exact(direction):
    model = tiny.make("llama4-scout")
    last = model.cfg.n_layers - 1
    options = {"metric": METRIC, "at": ["resid_post", "mlp_out", "expert_out", "shared_out"],
               "layers": [last], "over": ("layer", "pos"), "direction": direction}  # fmt: skip
    with model.hooks([("ln_final.hook_scale", lambda x, hook: torch.ones_like(x))]):
        exact = lp.patch(model, CLEAN, CORRUPTED, **options)
        estimate = lp.attribution_patch(model, CLEAN, CORRUPTED, **options)
    columns = ["effect", "metric", "ci_low", "ci_high"]
    assert np.allclose(exact[columns], estimate[columns], atol=1e-4, equal_nan=True)
    assert list(exact) == list(estimate)


def test_experts_by_unit():
    model = tiny.make("llama4-top2")
    last = model.cfg.n_layers - 1
    options = {"metric": METRIC, "at": "expert_out", "layers": [last],
               "over": ("layer", "pos", "expert")}  # fmt: skip
    with model.hooks([("ln_final.hook_scale", lambda x, hook: torch.ones_like(x))]):
        exact = lp.patch(model, CLEAN, CORRUPTED, **options)
        estimate = lp.attribution_patch(model, CLEAN, CORRUPTED, **options)
    assert np.allclose(exact.metric, estimate.metric, atol=1e-4)


def test_every_site_has_an_estimate_and_weights_stay_frozen():
    for family in ("llama-gqa", "llama4-scout"):
        model = tiny.make(family)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for at in SITES:
            if any(lp.act_name(at, i) in model.hook_dict for i in range(model.cfg.n_layers)):
                frame = lp.attribution_patch(model, CLEAN, CORRUPTED, metric=METRIC, at=at)
                assert frame.effect.notna().all() and frame.effect.nunique() > 1, at
        assert all(parameter.grad is None for parameter in model.parameters())


def test_agreement():
    exact = pd.DataFrame({"layer": range(20), "site": "z", "effect": np.arange(20) - 10.0})
    same = lp.agreement(exact, exact, k=5).iloc[0]
    assert (same.pearson, same.spearman, same.recall) == pytest.approx((1, 1, 1))
    assert lp.agreement(exact, exact.assign(effect=-exact.effect)).pearson[0] == pytest.approx(-1)
    other = exact.assign(effect=np.roll(exact.effect, 10))
    assert lp.agreement(exact, other, k=3).recall[0] < 1
    both = pd.concat([exact, exact.assign(site="attn_out", head=np.nan)])
    assert lp.agreement(both, exact).site.tolist() == ["z"]
    assert lp.agreement(both, both).pearson.tolist() == pytest.approx([1, 1])
    with pytest.raises(InputError, match="only 10 cells"):
        lp.agreement(exact, exact.head(10))
    with pytest.raises(InputError, match="no site in common"):
        lp.agreement(exact, exact.assign(site="q"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "relp"}, "method is 'relp'"),
        ({"steps": 0, "method": "integrated"}, "steps is 0"),
        ({"qk_fix": True, "at": ["q", "z"]}, "qk_fix is for.*not for z"),
        ({"direction": "up"}, "direction is 'up'"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises(InputError, match=message):
        lp.attribution_patch(tiny.make("llama-gqa"), CLEAN, CORRUPTED, metric=METRIC, **options)
