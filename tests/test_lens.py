"""The logit lens and direct logit attribution, against the model itself."""

import sys

import pytest
import tiny
import torch
from torch.distributions import Categorical, kl_divergence

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

TOKENS = tiny.tokens(batch=1, length=9)[0]


@pytest.fixture(scope="module", params=["llama-biased", "mixtral", "llama4-maverick", "qwen2-moe"])
def model(request) -> Llama:
    return tiny.make(request.param)


def test_the_last_row_of_the_lens_is_the_models_output(model):
    frame = lp.logit_lens(model, TOKENS, top_k=4)
    last = frame[frame.layer == model.cfg.n_layers]
    top = model(TOKENS)[0].softmax(-1).topk(4)
    assert last.token_id.tolist() == top.indices.flatten().tolist()
    assert last.prob.tolist() == pytest.approx(top.values.flatten().tolist(), rel=1e-5)


def test_a_row_of_the_lens_is_the_stream_through_norm_and_unembedding(model):
    frame = lp.logit_lens(model, TOKENS, top_k=1)
    stream = model(TOKENS, stop_at_layer=1)
    logits = model.unembed(model.ln_final(stream))[0]
    row = frame[frame.layer == 1]
    assert row.token_id.tolist() == logits.argmax(-1).tolist()
    assert row.logit.tolist() == pytest.approx(logits.max(-1).values.tolist(), rel=1e-5)


def test_the_lens_is_tidy(model):
    frame = lp.logit_lens(model, TOKENS, top_k=2)
    assert len(frame) == (model.cfg.n_layers + 1) * 9 * 2
    columns = ["layer", "site", "pos", "input_token", "rank", "token", "token_id", "prob", "logit"]
    assert list(frame) == [*columns, "entropy", "kl"]
    assert not frame.duplicated(["layer", "pos", "rank"]).any()
    assert frame.sort_values(["layer", "pos", "rank"], ignore_index=True).equals(frame)
    assert frame.attrs == {}


@pytest.mark.parametrize("at", ["resid_mid", "resid_post", "attn_out", "mlp_out", "shared_out"])
def test_every_site_is_read_in_every_layer_that_has_it(model, at):
    names = [name for name in model.hook_dict if name.endswith(f"hook_{at}")]
    if not names:
        with pytest.raises(InputError, match="no layer of this model has a shared expert"):
            lp.logit_lens(model, TOKENS, at=at)
        return
    frame = lp.logit_lens(model, TOKENS, at=at, top_k=3)
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    assert frame.layer.unique().tolist() == [int(name.split(".")[1]) for name in names]
    assert (frame["site"] == at).all()
    for (_, rows), name in zip(frame.groupby("layer"), names, strict=True):
        top = model.unembed(model.ln_final(cache[name]))[0].topk(3)
        assert rows.token_id.tolist() == top.indices.flatten().tolist()
        assert rows.logit.tolist() == pytest.approx(top.values.flatten().tolist(), rel=1e-4)


def test_entropy_and_divergence_are_those_of_the_whole_distribution(model):
    frame = lp.logit_lens(model, TOKENS, top_k=1)
    output = Categorical(logits=model(TOKENS)[0])
    for layer in range(model.cfg.n_layers):
        stream = model(TOKENS, stop_at_layer=layer)
        this = Categorical(logits=model.unembed(model.ln_final(stream))[0])
        rows = frame[frame.layer == layer]
        assert rows.entropy.tolist() == pytest.approx(this.entropy().tolist(), rel=1e-5)
        assert rows.kl.tolist() == pytest.approx(kl_divergence(output, this).tolist(), rel=1e-4)
        assert (rows.kl > 0.01).all()
    last = frame[frame.layer == model.cfg.n_layers]
    assert (last.kl == 0).all()
    assert last.entropy.tolist() == pytest.approx(output.entropy().tolist(), rel=1e-5)


def test_a_last_layer_that_adds_nothing_leaves_no_divergence(model):
    last = model.cfg.n_layers - 1
    names = [f"blocks.{last}.hook_attn_out", f"blocks.{last}.hook_mlp_out"]
    with model.hooks([(names, lambda tensor, hook: tensor * 0)]):
        kl = lp.logit_lens(model, TOKENS, top_k=1).groupby("layer").kl.max()
    assert kl[last] == kl[last + 1] == 0
    assert (kl[:last] > 0.01).all()


def test_watched_tokens_are_followed_through_all_layers(model):
    frame = lp.logit_lens(model, TOKENS, top_k=4, watch=[7, 150, 7])
    assert not frame.duplicated(["layer", "pos", "rank"]).any()
    assert not frame.duplicated(["layer", "pos", "token_id"]).any()
    for layer in (0, 2):
        stream = model(TOKENS, stop_at_layer=layer)
        logits = model.unembed(model.ln_final(stream))[0]
        ranks = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
        for token in (7, 150):
            rows = frame[(frame.layer == layer) & (frame.token_id == token)]
            assert rows.watched.all() and rows.pos.tolist() == list(range(9))
            assert rows["rank"].tolist() == ranks[:, token].tolist()
            assert rows.logit.tolist() == pytest.approx(logits[:, token].tolist(), rel=1e-4)
            probs = logits.softmax(-1)[:, token].tolist()
            assert rows.prob.tolist() == pytest.approx(probs, rel=1e-4)
    plain = lp.logit_lens(model, TOKENS, top_k=4)
    top = frame[frame["rank"] < 4].drop(columns="watched").reset_index(drop=True)
    assert top.equals(plain)


def test_a_watched_token_that_is_among_the_likeliest_has_one_row():
    model = tiny.make("llama-gqa")
    best = int(model(TOKENS)[0, -1].argmax())
    frame = lp.logit_lens(model, TOKENS, top_k=1, watch=best)
    last = frame[(frame.layer == model.cfg.n_layers) & (frame.pos == 8)]
    assert len(last) == 1 and bool(last.watched.item())


def test_equal_logits_get_ranks_of_their_own():
    model = tiny.make("llama-gqa")
    with torch.no_grad():
        model.unembed.weight[20:30] = model.unembed.weight[20]
    frame = lp.logit_lens(model, TOKENS, top_k=2, watch=list(range(20, 30)))
    assert not frame.duplicated(["layer", "pos", "rank"]).any()
    below = frame[(frame["rank"] >= 2) & frame.watched]
    assert (
        below.groupby(["layer", "pos"])["rank"].agg(lambda ranks: ranks.max() - ranks.min()).max()
        == 9
    )


def test_logits_are_computed_for_some_positions_at_a_time(monkeypatch):
    model = tiny.make("llama-gqa")
    whole = lp.logit_lens(model, TOKENS, watch=5)
    sizes = []
    # The module, whose name in the package is that of its function.
    monkeypatch.setattr(sys.modules["llama_probe.lens.logit_lens"], "_MOST_LOGITS", 2 * 199)
    handle = model.unembed.register_forward_hook(lambda _, x, out: sizes.append(out.numel()))
    in_blocks = lp.logit_lens(model, TOKENS, watch=5)
    handle.remove()
    assert max(sizes) == 2 * 199
    numbers = ["prob", "logit", "entropy", "kl"]
    assert in_blocks.drop(columns=numbers).equals(whole.drop(columns=numbers))
    assert (in_blocks[numbers] - whole[numbers]).abs().max(axis=None) < 1e-5


def test_tokens_are_watched_by_their_text(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    frame = lp.logit_lens(model, "ab", watch=" Mary", top_k=1)
    assert set(frame[frame.watched].token) == {" Mary"}
    with pytest.raises(InputError, match="is 5 tokens, not one"):
        lp.logit_lens(model, "ab", watch="Peter")


@pytest.mark.parametrize("pos", [-1, 3])
@pytest.mark.parametrize("foil", [8, None])
def test_attribution_sums_to_the_logits(model, foil, pos):
    frame = lp.direct_logit_attribution(model, TOKENS, 7, foil, pos=pos)
    logits = model(TOKENS)[0, pos]
    expected = logits[7] - (0 if foil is None else logits[foil])
    assert frame.value.sum() == pytest.approx(float(expected), abs=2e-5)
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    assert (frame.kind == "head").sum() == n_heads
    assert (frame.kind == "bias").sum() == (model.cfg.n_layers if model.cfg.o_bias else 0)


def test_a_heads_share_is_what_the_frozen_norm_loses_without_it(model):
    frame = lp.direct_logit_attribution(model, TOKENS, 7, 8)
    share = float(
        frame[(frame.layer == model.cfg.n_layers - 1) & (frame["head"] == 2)].value.item()
    )
    last = model.cfg.n_layers - 1
    names = [
        "ln_final.hook_scale",
        f"blocks.{last}.attn.hook_result",
        f"blocks.{last}.hook_mlp_out",
    ]
    _, kept = model.run_with_cache(TOKENS, names_filter=names)
    scale, mlp = kept["ln_final.hook_scale"], kept["mlp_out", last]

    def without(result, hook):
        return result * (torch.arange(model.cfg.n_heads) != 2)[:, None]

    frozen = [
        (names[0], lambda tensor, hook: scale),
        (names[1], without),
        (names[2], lambda tensor, hook: mlp),
    ]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=frozen)[0, -1]
    whole = model(TOKENS)[0, -1]
    loss = (whole[7] - whole[8]) - (logits[7] - logits[8])
    assert share == pytest.approx(float(loss), abs=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("foil", [8, None])
def test_the_finest_split_sums_to_the_logits_of_every_family(family, foil):
    model = tiny.make(family)
    cfg = model.cfg
    finest = {"experts": any(cfg.moe_layers), "neurons": 0 if all(cfg.moe_layers) else 5}
    frame = lp.direct_logit_attribution(model, TOKENS, 7, foil, **finest)
    logits = model(TOKENS)[0, -1]
    expected = logits[7] - (0 if foil is None else logits[foil])
    assert frame.value.sum() == pytest.approx(float(expected), rel=1e-4)
    n_moe, n_dense = sum(cfg.moe_layers), cfg.n_layers - sum(cfg.moe_layers)
    counts = frame.kind.value_counts()
    assert counts.get("expert", 0) == (n_moe * cfg.moe.top_k if cfg.moe else 0)
    assert counts.get("shared", 0) == (n_moe if cfg.moe and cfg.moe.d_shared else 0)
    assert (counts.get("neuron", 0), counts.get("rest", 0)) == (5 * n_dense, n_dense)
    assert "mlp" not in counts


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "llama4-top2"])
def test_experts_are_the_chosen_ones_and_sum_to_their_layer(family):
    model = tiny.make(family)
    whole = lp.direct_logit_attribution(model, TOKENS, 7, 8)
    split = lp.direct_logit_attribution(model, TOKENS, 7, 8, experts=True)
    names = "blocks.*.mlp.hook_expert_indices"
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    for layer in (0, 2):
        parts = split[(split.layer == layer) & split.kind.isin(["expert", "shared"])]
        mlp = whole[(whole.layer == layer) & (whole.kind == "mlp")].value.item()
        assert parts.value.sum() == pytest.approx(mlp, rel=1e-4, abs=1e-6)
        chosen = cache["expert_indices", layer][0, -1].tolist()
        assert parts.expert.dropna().tolist() == chosen


@pytest.mark.parametrize("kind", ["expert", "shared", "neuron"])
def test_a_share_is_what_the_frozen_norm_loses_without_the_part(kind):
    model = tiny.make("llama-biased" if kind == "neuron" else "llama4-top2")
    last = model.cfg.n_layers - 1
    split = {"neurons": 3} if kind == "neuron" else {"experts": True}
    frame = lp.direct_logit_attribution(model, TOKENS, 7, 8, **split)
    row = frame[(frame.layer == last) & (frame.kind == kind)].iloc[0]
    where = {"expert": "mlp.hook_expert_out", "shared": "mlp.hook_shared_out"}
    part = f"blocks.{last}.{where.get(kind, 'mlp.hook_post')}"
    _, cache = model.run_with_cache(TOKENS, names_filter="ln_final.hook_scale")

    def without(tensor, hook):
        if kind == "shared":
            return tensor * 0
        index = 0 if kind == "expert" else int(row.neuron)
        axis = 2 if kind == "expert" else -1
        return tensor.index_fill(axis, torch.tensor([index]), 0)

    frozen = [("ln_final.hook_scale", lambda tensor, hook: cache["ln_final.hook_scale"])]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=[*frozen, (part, without)])[0, -1]
    whole = model(TOKENS)[0, -1]
    loss = float((whole[7] - whole[8]) - (logits[7] - logits[8]))
    assert row.value == pytest.approx(loss, abs=2e-5)
    assert abs(loss) > 1e-3


def test_the_neurons_taken_out_are_the_largest_and_all_of_them_leave_the_bias():
    model = tiny.make("llama-biased")
    every = lp.direct_logit_attribution(model, TOKENS, 7, neurons=96)
    three = lp.direct_logit_attribution(model, TOKENS, 7, neurons=3)
    scale = model.run_with_cache(TOKENS, names_filter="ln_final.hook_scale")[1]
    direction = model.unembed.weight[7] * model.ln_final.weight
    for layer, block in enumerate(model.blocks):
        shares = every[(every.layer == layer) & (every.kind == "neuron")].value.abs()
        largest = three[(three.layer == layer) & (three.kind == "neuron")].value.abs()
        assert largest.tolist() == shares.nlargest(3).tolist()
        rest = every[(every.layer == layer) & (every.kind == "rest")].value.item()
        bias = block.mlp.b_out @ direction / scale["ln_final.hook_scale"][0, -1]
        assert rest == pytest.approx(float(bias), abs=2e-5)


def test_columns_of_experts_and_neurons_are_there_when_asked_for():
    model = tiny.make("qwen2-moe")
    columns = ["component", "kind", "layer", "head", "value"]
    assert list(lp.direct_logit_attribution(model, TOKENS, 7)) == columns
    frame = lp.direct_logit_attribution(model, TOKENS, 7, experts=True, neurons=2)
    assert list(frame) == [*columns[:4], "expert", "neuron", "value"]
    assert not frame.component.duplicated().any()


def test_bad_input_gets_a_sentence(model):
    with pytest.raises(InputError, match="one prompt, not 2"):
        lp.logit_lens(model, tiny.tokens(2, 5))
    with pytest.raises(InputError, match="top_k is 0"):
        lp.logit_lens(model, TOKENS, top_k=0)
    with pytest.raises(InputError, match="9 tokens"):
        lp.direct_logit_attribution(model, TOKENS, 7, pos=9)
    with pytest.raises(InputError, match="token ids go from"):
        lp.direct_logit_attribution(model, TOKENS, 400)
    with pytest.raises(InputError, match="no tokenizer"):
        lp.direct_logit_attribution(model, TOKENS, " Mary")
    with pytest.raises(InputError, match="at is 'resid_pots', but should be one of resid_pre"):
        lp.logit_lens(model, TOKENS, at="resid_pots")
    with pytest.raises(InputError, match="token ids go from 0 to 198, not to 199"):
        lp.logit_lens(model, TOKENS, watch=[5, 199])


def test_splits_that_the_model_does_not_have_get_a_sentence():
    dense, moe = tiny.make("llama-gqa"), tiny.make("mixtral")
    with pytest.raises(InputError, match="no layer of this model is a mixture of experts"):
        lp.direct_logit_attribution(dense, TOKENS, 7, experts=True)
    with pytest.raises(InputError, match="neurons is 97, but should be 0 to 96"):
        lp.direct_logit_attribution(dense, TOKENS, 7, neurons=97)
    with pytest.raises(InputError, match="experts=True splits those"):
        lp.direct_logit_attribution(moe, TOKENS, 7, neurons=1)
