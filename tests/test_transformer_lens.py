"""TransformerLens' own functions run on our models unchanged and give what plain hooks give."""

from functools import cache, partial
from inspect import getattr_static
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_protocol import TransformerLensModelWithWeights
from transformer_lens.tools import analysis
from transformer_lens.utilities import get_act_name

import llama_probe as lp
from llama_probe.checkpoints.save import published
from llama_probe.hooks import HookPoint
from llama_probe.model.llama import Llama

CLEAN = tiny.tokens(batch=2, length=4)
CORRUPTED = tiny.tokens(batch=2, length=4, seed=1)
FAMILIES = ("llama-gqa", "llama-biased", "mixtral")
ANSWER, FOIL = 5, 7
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@cache
def model_of(family: str, n_layers: int = 2, dtype: torch.dtype = torch.float32) -> Llama:
    sizes = {"num_hidden_layers": n_layers, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 4 if family == "llama-mha" else 2
    return tiny.make(family, **sizes).to(dtype)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, ANSWER] - logits[:, -1, FOIL]).mean()


def run(model: Llama, tokens: Tensor = CLEAN, **options: Any) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)


# The model, its names and its cache


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_follows_the_protocol(family):
    model = model_of(family)
    assert isinstance(model, TransformerLensModelWithWeights)
    # What isinstance looks at from Python 3.12 on, where a module's submodules are no attributes.
    for name in ("cfg", "blocks", "ln_final", "run_with_cache", "tokens_to_residual_directions"):
        getattr_static(model, name)


def test_get_act_name_names_our_hooks():
    hooks = model_of("llama-gqa").hook_dict
    stream = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in")
    attention = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
    feed_forward = ("pre", "pre_linear", "post")
    aliases = ("attn", "attn_logits", "key", "query", "value", "mlp_pre", "mlp_post")
    for word in (*stream, *attention, *feed_forward, *aliases):
        assert get_act_name(word, 1) in hooks
    for short in ("q1", "pattern1", "attn1", "post1", "scale1ln2"):
        assert get_act_name(short) in hooks
    for word, norm in product(("scale", "normalized"), ("ln1", "ln2")):
        assert get_act_name(word, 1, norm) in hooks
    assert get_act_name("embed") in hooks and "ln_final.hook_scale" in hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_sum_of_its_parts(family):
    model = model_of(family)
    _, kept = run(model)
    assert isinstance(kept, lp.ActivationCache)
    parts, labels = kept.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    close(parts.sum(0), kept["resid_post", 1])
    close(kept.decompose_resid(1, mlp_input=True).sum(0), kept["resid_mid", 1])

    heads_and_layers = kept.get_full_resid_decomposition(expand_neurons=False)
    assert len(heads_and_layers) == 2 * 4 + 2 + 1 + 1  # heads, feed-forwards, embedding, bias
    close(heads_and_layers.sum(0), kept["resid_post", 1])


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biased"])
def test_dense_streams_split_into_neurons(family):
    model = model_of(family)
    _, kept = run(model)
    neurons, labels = kept.stack_neuron_results(-1, return_labels=True)
    assert labels[97] == "L1N1" and len(neurons) == 2 * 96
    for layer, ours in enumerate(neurons.unflatten(0, (2, 96))):
        close(ours.sum(0) + model.blocks[layer].mlp.b_out, kept["mlp_out", layer])
    parts = kept.get_full_resid_decomposition()
    close(parts.sum(0), kept["resid_post", 1])
    close(
        kept.get_full_resid_decomposition(1, mlp_input=True).sum(0),
        kept["resid_mid", 1],
    )
    direction = model.tokens_to_residual_directions(ANSWER)
    projected = kept.get_full_resid_decomposition(project_output_onto=direction, apply_ln=True)
    close(projected, parts / kept["ln_final.hook_scale"] @ direction)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_heads_are_hook_result(family):
    model = model_of(family)
    _, kept = run(model)
    assert "blocks.0.attn.hook_result" not in kept
    heads, labels = kept.stack_head_results(return_labels=True)
    assert labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    _, results = run(model, names_filter="*.hook_result")
    expected = torch.cat([results["result", layer] for layer in range(2)], dim=2)
    close(heads, expected.permute(2, 0, 1, 3))
    rest = kept.stack_head_results(incl_remainder=True)
    close(rest.sum(0), kept["resid_post", 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_streams_give_the_logits(family):
    model = model_of(family)
    logits, kept = run(model)
    streams, labels = kept.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    for label, stream in zip(labels[:-1], streams, strict=False):
        layer, _, word = label.partition("_")
        assert torch.equal(stream, kept[f"resid_{word}", int(layer)])
    with torch.no_grad():
        close(kept.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U, logits)
        # Each ln1 divides by the scale of its own run.
        normalized = kept.apply_ln_to_stack(kept["resid_pre", 1][None], layer=1)[0]
    close(normalized, kept["normalized", 1, "ln1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_sum_to_the_logits(family):
    model = model_of(family)
    logits, kept = run(model)
    parts = kept.decompose_resid()
    close(kept.logit_attrs(parts, ANSWER).sum(0), logits[..., ANSWER])
    close(kept.logit_attrs(parts, torch.tensor([ANSWER])).sum(0), logits[..., ANSWER])
    close(kept.logit_attrs(parts, ANSWER, FOIL).sum(0), logits[..., ANSWER] - logits[..., FOIL])
    own = logits.gather(-1, CORRUPTED[..., None])[..., 0]
    close(kept.logit_attrs(parts, CORRUPTED).sum(0), own)
    last = kept.decompose_resid(pos_slice=-1)
    each = kept.logit_attrs(last, CORRUPTED[:, -1], pos_slice=-1)
    close(each.sum(0), own[:, -1])


def test_stacks_and_slices_of_a_mixture_of_experts():
    model = model_of("mixtral")
    _, kept = run(model)
    stacked = kept.stack_activation("expert_weights")
    assert torch.equal(stacked[1], kept["expert_weights", 1])
    assert torch.equal(kept["router_logits", -1], kept["router_logits", 1])
    second = kept.apply_slice_to_batch_dim(1)
    assert torch.equal(second["expert_indices", 0], kept["expert_indices", 0][1])
    _, alone = run(model, CLEAN[:1])
    _, bare = run(model, CLEAN[:1], remove_batch_dim=True)
    for name, tensor in alone.remove_batch_dim().items():
        assert torch.equal(tensor, bare[name]), name


# Activation patching

# The end of each function's name, the activation, and the axes of its result after the layer.
SWEEPS = {
    "resid_pre": ("resid_pre", "pos"),
    "resid_mid": ("resid_mid", "pos"),
    "attn_out": ("attn_out", "pos"),
    "mlp_out": ("mlp_out", "pos"),
    "attn_head_out_by_pos": ("z", "pos head"),
    "attn_head_q_by_pos": ("q", "pos head"),
    "attn_head_k_by_pos": ("k", "pos head"),
    "attn_head_v_by_pos": ("v", "pos head"),
    "attn_head_pattern_by_pos": ("pattern", "head query"),
    "attn_head_pattern_dest_src_pos": ("pattern", "head query key"),
    "attn_head_out_all_pos": ("z", "head"),
    "attn_head_q_all_pos": ("q", "head"),
    "attn_head_k_all_pos": ("k", "head"),
    "attn_head_v_all_pos": ("v", "head"),
    "attn_head_pattern_all_pos": ("pattern", "head"),
}


def sweep(model: Llama, name: str, kept: Any) -> Tensor:
    with torch.no_grad():
        return getattr(patching, f"get_act_patch_{name}")(model, CORRUPTED, kept, metric)


def naive(model: Llama, word: str, axes: str, clean: Any) -> Tensor:
    """One forward pass a cell, each with a hook that returns a new tensor."""
    heads = model.cfg.n_key_value_heads if word in ("k", "v") else model.cfg.n_heads
    sizes = {"pos": 4, "head": heads, "query": 4, "key": 4}
    dims = {"pos": 1, "head": 1 if word == "pattern" else 2, "query": 2, "key": 3}
    result = torch.zeros(2, *(sizes[axis] for axis in axes.split()))
    for layer, *index in product(*map(range, result.shape)):
        value = clean[word, layer]
        here = torch.ones(value.shape, dtype=torch.bool)
        for axis, i in zip(axes.split(), index, strict=True):
            dim = dims[axis]
            shape = [-1 if d == dim else 1 for d in range(value.ndim)]
            here = here & (torch.arange(value.shape[dim]) == i).view(shape)

        def patched(
            tensor: Tensor, hook: HookPoint, here: Tensor = here, value: Tensor = value
        ) -> Tensor:
            return torch.where(here, value, tensor)

        with torch.no_grad():
            logits = model.run_with_hooks(
                CORRUPTED, fwd_hooks=[(lp.act_name(word, layer), patched)]
            )
        result[layer, *index] = metric(logits)
    return result


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_patching_gives_what_plain_hooks_give(family, name):
    """TransformerLens' setters edit in place: neither cache nor tokens may change by that."""
    model = model_of(family)
    _, kept = run(model)
    before = {key: tensor.clone() for key, tensor in kept.items()}
    tokens = CORRUPTED.clone()
    values = sweep(model, name, kept)
    expected = naive(model, *SWEEPS[name], kept)
    assert values.shape == expected.shape and expected.std() > 1e-3
    close(values, expected)
    assert torch.equal(CORRUPTED, tokens)
    for key, tensor in kept.items():
        assert torch.equal(tensor, before[key]), key


def test_setters_change_nothing_that_is_cached_in_the_same_run():
    """The stream after block 0 is the tensor that the setter is given before block 1."""
    model = model_of("llama-gqa")
    _, clean = run(model)
    _, corrupted = run(model, CORRUPTED)
    setter = partial(
        patching.layer_pos_patch_setter, index=[1, 2], clean_activation=clean["resid_pre", 1]
    )

    def patch(tensor: Tensor, hook: HookPoint) -> Tensor:
        return setter(tensor)

    with model.hooks([("blocks.1.hook_resid_pre", patch)]):
        _, kept = run(model, CORRUPTED)
    assert torch.equal(kept["resid_post", 0], corrupted["resid_post", 0])
    assert not torch.equal(kept["resid_mid", 1], corrupted["resid_mid", 1])


@pytest.mark.parametrize(
    ("every", "names"),
    [
        ("block_every", ["resid_pre", "attn_out", "mlp_out"]),
        ("attn_head_all_pos_every", [n for n in SWEEPS if n.endswith("_all_pos")]),
        ("attn_head_by_pos_every", [n for n in SWEEPS if n.endswith("_by_pos")]),
    ],
)
def test_every_kind_of_patch_in_one_call(every, names):
    model = model_of("llama-gqa")
    _, kept = run(model)
    values = sweep(model, every, kept)
    for mine, name in zip(values, names, strict=True):
        expected = sweep(model, name, kept)
        if name == "attn_head_pattern_by_pos":
            expected = expected.transpose(1, 2)
        close(mine[..., : expected.shape[-1]], expected)
        assert not mine[..., expected.shape[-1] :].any()  # two key-value heads for four queries


def test_patching_keeps_examples_and_their_statistics():
    model = model_of("llama-gqa")
    _, kept = run(model)
    with torch.no_grad():
        found = patching.get_act_patch_resid_pre(
            model,
            CORRUPTED,
            kept,
            lambda logits: logits[:, -1, ANSWER] - logits[:, -1, FOIL],
            reduce="none",
            baseline=True,
        )
    close(found.mean(), sweep(model, "resid_pre", kept))
    assert found.effect().shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("family", "component"),
    [("llama-gqa", "q"), ("mixtral", "q"), *(("llama-mha", part) for part in "qkv")],
)
def test_direct_paths_end_at_one_head(family, component):
    """Against the head's query, key or value, computed from the stream with the path's change."""
    model = model_of(family, n_layers=3)
    _, clean = run(model)
    _, corrupted = run(model, CORRUPTED)
    with torch.no_grad():
        values = patching.get_act_patch_direct_path(
            model, CORRUPTED, clean, corrupted, metric, 0, 1, component, verbose=False
        )
        assert not values[0].any()
        write = (clean["z", 0] - corrupted["z", 0])[:, :, 1] @ model.blocks[0].attn.W_O[1]
        for layer, head in product((1, 2), range(4)):
            block = model.blocks[layer]
            weight = getattr(block.attn, f"W_{component.upper()}")[head]
            changed = block.ln1.unhooked(corrupted["resid_pre", layer] + write) @ weight

            def put(
                tensor: Tensor, hook: HookPoint, head: int = head, changed: Tensor = changed
            ) -> Tensor:
                here = (torch.arange(tensor.shape[2]) == head)[:, None]
                return torch.where(here, changed[:, :, None], tensor)

            edit = [(lp.act_name(component, layer), put)]
            close(values[layer, head], metric(model.run_with_hooks(CORRUPTED, fwd_hooks=edit)))
        base = metric(model(CORRUPTED))
    assert (values[1:] - base).abs().min() > 1e-5


def test_direct_paths_from_every_head():
    model = model_of("llama-gqa")
    (_, clean), (_, corrupted) = run(model), run(model, CORRUPTED)
    arguments = (model, CORRUPTED, clean, corrupted, metric)
    with torch.no_grad():
        every = patching.get_act_patch_direct_path_all_sources(*arguments, verbose=False)
        one = patching.get_act_patch_direct_path(*arguments, 0, 2, verbose=False)
    close(every[0, 2], one)


# Heads by what they look at


def test_detect_head(tiny_tokenizer):
    model = tiny.make("llama-gqa", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    prompt, other = "abcabcd", "aab"
    ids = model.to_tokens(prompt)
    _, kept = run(model, ids)
    rows = ids[0].tolist()
    looks = {
        "previous_token_head": lambda q, k: k == q - 1,
        "duplicate_token_head": lambda q, k: k < q and rows[k] == rows[q],
        "induction_head": lambda q, k: 0 < k <= q and rows[k - 1] == rows[q],
    }
    for name, wanted in looks.items():
        grid = torch.tensor([[wanted(q, k) for k in range(7)] for q in range(7)])
        pattern = torch.stack([kept["pattern", layer][0] for layer in range(3)])
        expected = (pattern * grid).sum((2, 3)) / pattern.sum((2, 3))
        close(detect_head(model, prompt, name), expected)
        close(detect_head(model, prompt, grid.float()), expected)
        both = detect_head(model, [prompt, other], name)
        close(both, (expected + detect_head(model, other, name)) / 2)


# tools.analysis


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_logit_lens(family):
    model = model_of(family)
    logits, kept = run(model)
    lens = analysis.logit_lens(model, CLEAN, positions=None)
    streams = (kept["resid_pre", 0], kept["resid_pre", 1], kept["resid_post", 1])
    with torch.no_grad():
        expected = [model.unembed(model.ln_final.unhooked(stream)) for stream in streams]
    close(lens.readout.values, torch.stack(expected))
    close(lens.readout.values[-1], logits)
    top = kept.logit_lens(positions=None, incl_mid=True, top_k=3)
    assert torch.equal(top.readout.top_ids[-1], logits.topk(3).indices)


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_direct_logit_attribution(family):
    model = model_of(family)
    logits, _ = run(model)
    wanted = logits[:, -1, ANSWER] - logits[:, -1, FOIL]
    share = partial(analysis.direct_logit_attribution, model, CLEAN, ANSWER, FOIL)
    with torch.no_grad():
        close(share(unit="component").attribution.sum(0), wanted)
        close(share(unit="head").attribution.sum(0), wanted)
        close(share(unit="layer").attribution[-1], wanted)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "mixtral"])
def test_tools_attribution_patch(family):
    """Each node's score against the metric's slope towards the clean activation."""
    model = model_of(family, dtype=torch.float64)
    pair = (CLEAN[:1], CORRUPTED[:1])
    found = analysis.attribution_patch(model, *pair, metric).node_scores
    assert len(found) == 4 * (1 + 2 * (4 + 1))
    _, clean = run(model, pair[0])
    for node, score in found.items():
        value = clean[node.hook_name][0, node.position]
        head = slice(None) if node.head is None else node.head

        def move(tensor: Tensor, hook: HookPoint, step: float, node=node, head=head, value=value):
            moved = tensor.clone()
            moved[0, node.position, head] += step * (value - tensor[0, node.position])[head]
            return moved

        up, down = (
            metric(
                model.run_with_hooks(
                    pair[1], fwd_hooks=[(node.hook_name, partial(move, step=step))]
                )
            )
            for step in (1e-4, -1e-4)
        )
        assert score == pytest.approx(float(up - down) / 2e-4, abs=1e-5), node


def test_tools_edge_attribution_and_faithfulness():
    model = model_of("llama-mha", dtype=torch.float64)
    pair = (CLEAN[:1], CORRUPTED[:1])
    edges = analysis.EdgeAttributionConfig(granularity="edge")
    found = analysis.attribution_patch(model, *pair, metric, edges)
    nodes = analysis.attribution_patch(model, *pair, metric).node_scores
    for node, score in found.node_scores.items():
        assert score == pytest.approx(nodes[node], abs=1e-9), node

    faithful = partial(analysis.faithfulness, model, *pair, metric)
    every = list(found.edge_scores)
    assert faithful(every).recovered == pytest.approx(1)
    assert faithful([]).recovered == pytest.approx(0, abs=1e-9)

    # All edges but the one from the embedding to one head's query.
    reader = analysis.Node("q_input", position=3, layer=1, head=2)
    dropped = (analysis.Node("embed", position=3), reader)
    result = faithful([edge for edge in every if edge != dropped])
    change = (model.embed(pair[1]) - model.embed(pair[0]))[0, 3]

    def ablated(tensor: Tensor, hook: HookPoint) -> Tensor:
        moved = tensor.clone()
        moved[0, 3, 2] += change
        return moved

    with torch.no_grad():
        top, low = metric(model(pair[0])), metric(model(pair[1]))
        mid = metric(model.run_with_hooks(pair[0], fwd_hooks=[(reader.hook_name, ablated)]))
    assert result.recovered == pytest.approx(float((mid - low) / (top - low)), abs=1e-9)
    assert abs(result.recovered - 1) > 1e-6


def answers(model: Llama, tokens: Tensor) -> Tensor:
    return model(tokens)[:, -1, [ANSWER, FOIL]]


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_tools_interchange(family):
    model, name = model_of(family), "blocks.1.hook_resid_pre"
    last = torch.tensor([3, 3])
    logits = partial(answers, model)
    source = analysis.collect_activations(model, name, CLEAN, logits, positions=last)
    _, kept = run(model)
    close(source, kept[name][:, -1])
    basis = analysis.random_basis(64, rank=3, seed=0)
    swap = analysis.SubspaceInterchange(basis)
    found = analysis.intervened_logits(model, name, swap, CORRUPTED, source, logits, positions=last)

    def swapped(tensor: Tensor, hook: HookPoint) -> Tensor:
        moved = tensor[:, -1] + (source - tensor[:, -1]) @ basis @ basis.T
        return torch.cat((tensor[:, :-1], moved[:, None]), dim=1)

    with model.hooks([(name, swapped)]), torch.no_grad():
        close(found, answers(model, CORRUPTED))
    das = analysis.fit_das(
        model,
        name,
        CORRUPTED,
        CLEAN,
        torch.tensor([0, 1]),
        logits,
        rank=2,
        base_positions=last,
        source_positions=last,
        epochs=5,
    )
    assert das.losses[-1] < das.losses[0]
    close(das.basis.T @ das.basis, torch.eye(2))


def test_tools_sparse_probing():
    model = model_of("llama-gqa")
    _, kept = run(model, tiny.tokens(batch=20, length=4))
    neurons = kept["post", 1].flatten(0, 1)
    neurons = neurons / neurons.std(0)
    labels = (neurons[:, 17] > neurons[:, 17].median()).long()
    probe = analysis.fit_sparse_probe(neurons, labels, k=1)
    assert probe.selected_features.tolist() == [17]


# The same weights in TransformerLens' own model

PAIR = (
    "When Mary and John went to the store, John gave a drink to",
    "When Mary and John went to the store, Mary gave a drink to",
)
# Measured beforehand with TransformerLens 4.3 on transformers' model: (layer, position), clean
# stream into corrupted run, logit difference.
ANCHORS = {
    (0, 9): 6.120,
    (5, 9): 6.154,
    (10, 9): 6.110,
    (15, 9): 6.266,
    (20, 9): 5.068,
    (25, 9): -5.915,
    (29, 9): -5.410,
    (20, 13): -4.105,
    (25, 13): 5.044,
    (29, 13): 5.638,
    (0, 3): -5.4853,
    (20, 11): None,
    (29, 10): None,
}
HEADS = [(17, 4), (19, 2), (20, 0), (23, 0), (23, 3), (24, 4), (29, 0), (29, 1), (0, 5), (10, 8)]


def bridge_of(model: Llama, folder: Path) -> Any:
    """TransformerLens' model on transformers' model with our weights."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    assert model.tokenizer is not None
    model.tokenizer.save(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.cfg.to_hf()))
    missing, unexpected = hf_model.load_state_dict(published(model), strict=False)
    assert missing == ["lm_head.weight"] and unexpected == [] and model.cfg.tied
    return TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=hf_model.eval(),
        tokenizer=tokenizer,
        device="cpu",
        dtype=torch.float32,
    )


@pytest.mark.slow
def test_patching_agrees_with_transformer_lens_own_model(smollm2, tmp_path):
    """Some cells of the sweeps; all of them agreed once, within 1.5e-5."""
    bridge = bridge_of(smollm2, tmp_path)
    clean, corrupted = (smollm2.to_tokens(text, prepend_bos=False) for text in PAIR)
    mary, john = (smollm2.to_single_token(name) for name in (" Mary", " John"))

    def names(logits: Tensor) -> Tensor:
        return logits[0, -1, mary] - logits[0, -1, john]

    streams = pd.DataFrame(list(ANCHORS), columns=["layer", "pos"])
    heads = pd.DataFrame(HEADS, columns=["layer", "head"])
    found = []
    for model in (smollm2, bridge):
        with torch.no_grad():
            logits, kept = model.run_with_cache(clean)
            assert float(names(logits)) == pytest.approx(6.1196, abs=1e-3)
            assert float(names(model(corrupted))) == pytest.approx(-5.4853, abs=1e-3)
            found.append(
                [
                    function(model, corrupted, kept, names, index_axis_names=None, index_df=cells)
                    for function, cells in (
                        (patching.get_act_patch_resid_pre, streams),
                        (patching.get_act_patch_attn_head_out_all_pos, heads),
                    )
                ]
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for value, anchor in zip(found[0][0].tolist(), ANCHORS.values(), strict=True):
        assert anchor is None or value == pytest.approx(anchor, abs=1e-3)
