"""Path patching against the long way, in which every other output is frozen by a hook."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import unchecked

import llama_probe as lp
from llama_probe.errors import InputError

CLEAN = tiny.tokens(batch=2, length=7, seed=5)
CORRUPTED = CLEAN.clone()
CORRUPTED[0, 2], CORRUPTED[1, 3] = 100, 101
METRIC = lp.logit_diff(7, 8)
FAMILIES = ("llama-gqa", "llama-biased", "mixtral", "llama4-scout")
model_of = cache(tiny.make)


@cache
def known(family):
    """What the two prompts' own runs have at every hook that is frozen or put in."""
    names = ["*.hook_z", "*.hook_attn_out", "*.hook_mlp_out", "*.attn.hook_[qkv]"]
    names.append("*.hook_resid_mid")
    model = model_of(family)
    return [model.run_with_cache(run, names_filter=names)[1] for run in (CLEAN, CORRUPTED)]


def the_long_way(family, receiver, at, layer, head, pos, through_mlps):
    """The metric with one path patched: freeze everything, read the receiver, put it in."""
    model, (source, target) = model_of(family), known(family)
    kept = {}

    def frozen(tensor, hook):
        """What the target run had here, but for the sender's own."""
        mixed = target[hook.name].clone()
        if hook.name == lp.act_name(at, layer):
            where = (slice(None), slice(None) if pos is None else pos)
            where = where if head is None else (*where, head)
            mixed[where] = source[hook.name][where]
        return mixed

    def keep(tensor, hook):
        kept[hook.name] = tensor.clone()

    kind, *place = receiver if isinstance(receiver, tuple) else (receiver,)
    reads = {
        "q": lambda: lp.act_name("q_input", place[0]),
        "k": lambda: lp.act_name("k_input", place[0]),
        "v": lambda: lp.act_name("v_input", place[0]),
        "mlp": lambda: lp.act_name("mlp_in", place[0]),
        "logits": lambda: lp.act_name("resid_post", model.cfg.n_layers - 1),
    }[kind]()
    freeze = ["*.hook_z"] if at == "z" else ["*.hook_attn_out"]
    freeze += [] if through_mlps else ["*.hook_mlp_out"]
    if through_mlps and at == "mlp_out":
        freeze.append(lp.act_name("mlp_out", layer))
    with model.hooks([(freeze, frozen), (reads, keep)]):
        model(CORRUPTED)
    arrived = kept[reads]
    if kind in ("logits", "mlp"):
        hooks = [(reads, lambda x, hook: arrived)]
    else:
        group = model.cfg.n_heads // model.cfg.n_key_value_heads
        index = place[1] if kind == "q" else place[1] // group

        def put_in(x, hook):
            x[:, :, index] = arrived[:, :, index]
            return x

        def only(z, hook):
            others = target[hook.name].clone()
            others[:, :, place[1]] = z[:, :, place[1]]
            return others

        hooks = [(reads, put_in), (lp.act_name("z", place[0]), only)]
    return METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks)[:, -1])


@pytest.mark.parametrize("through_mlps", [False, True])
@pytest.mark.parametrize("at", ["z", "attn_out", "mlp_out"])
@pytest.mark.parametrize("receiver", [("q", 2, 3), ("k", 2, 3), ("v", 1, 7), ("mlp", 2), "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_what_the_long_way_gives(family, receiver, at, through_mlps):
    model = model_of(family)
    for over in [("layer",), ("layer", "pos")] + ([None] if at == "z" else []):
        frame = lp.path_patch(model, CLEAN, CORRUPTED, metric=METRIC, receiver=receiver, at=at,
                              over=over, through_mlps=through_mlps, each=True)  # fmt: skip
        assert frame.metric.nunique() > 1
        cells = frame[frame.prompt == 0].reset_index(drop=True)
        for index in range(0, len(cells), max(1, len(cells) // 4)):
            row = cells.iloc[index]
            place = (
                int(row["layer"]),
                *(int(row[name]) if name in cells else None for name in ("head", "pos")),
            )
            with unchecked():
                expected = the_long_way(family, receiver, at, *place, through_mlps)
            columns = [name for name in ("layer", "head", "pos") if name in frame]
            found = frame[(frame[columns] == row[columns]).all(axis=1)]
            assert np.allclose(found.metric, expected, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_to_the_logits_add_up_to_the_whole_difference(family):
    """The last tokens are the same, so all of it is written; without the norm's scale it adds."""
    model = tiny.make(family)
    options = {"metric": METRIC, "receiver": "logits", "over": ("layer",), "each": True}
    with model.hooks([("ln_final.hook_scale", lambda x, hook: torch.ones_like(x))]):
        frames = [
            lp.path_patch(model, CLEAN, CORRUPTED, at=at, **options)
            for at in ("attn_out", "mlp_out")
        ]
    frame = pd.concat(frames)
    gains = (frame.metric - frame.corrupted).groupby(frame.prompt).sum()
    whole = (frame.clean - frame.corrupted).groupby(frame.prompt).first()
    assert np.allclose(gains, whole, atol=1e-4) and whole.abs().min() > 1e-2


def test_a_sender_whose_output_does_not_change_sends_nothing():
    model = tiny.make("llama-gqa")
    frame = lp.path_patch(model, CLEAN[:1], CORRUPTED[:1], metric=METRIC, receiver="logits",
                          over=("layer", "pos", "head"))  # fmt: skip
    assert frame[frame.pos < 2].effect.abs().max() < 1e-6
    # The direct path to the logits starts at the answer's own position.
    assert frame[frame.pos < 6].effect.abs().max() < 1e-6
    assert frame[frame.pos == 6].effect.abs().min() > 1e-6


def test_noising_is_denoising_with_the_prompts_exchanged():
    model = tiny.make("mixtral")
    options = {"metric": METRIC, "receiver": ("q", 2, 0), "each": True}
    noise = lp.path_patch(model, CLEAN, CORRUPTED, direction="noise", **options)
    swapped = lp.path_patch(model, CORRUPTED, CLEAN, direction="denoise", **options)
    assert np.allclose(noise.metric, swapped.metric, atol=1e-6)
    assert np.allclose(noise.effect, swapped.effect, atol=1e-4)


def test_padding_and_small_batches_change_nothing(tiny_tokenizer):
    model = tiny.make("mistral", vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    clean, corrupted = ["a cat sat here", "the dog"], ["a cot sat here", "the fog"]
    options = {"metric": METRIC, "receiver": ("v", 2, 1), "each": True}
    batch = lp.path_patch(model, clean, corrupted, **options)
    parts = lp.path_patch(model, clean, corrupted, batch_size=2, **options)
    assert np.allclose(batch.metric, parts.metric, atol=1e-6)
    for index in range(2):
        alone = lp.path_patch(model, clean[index], corrupted[index], **options)
        assert np.allclose(batch[batch.prompt == index].metric, alone.metric, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receiver": "heads"}, "receiver is 'heads'"),
        ({"receiver": ("q", 1)}, "should be 'logits'"),
        ({"receiver": ("q", 9, 0)}, "layers 0 to 2"),
        ({"receiver": ("q", 1, 8)}, "heads 0 to 7"),
        ({"receiver": ("q", 0, 0)}, "nothing sends from z to q of layer 0"),
        ({"at": "q"}, "a sender is one of"),
        ({"direction": "up"}, "direction is 'up'"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    model = tiny.make("llama-gqa")
    given = {"metric": METRIC, "receiver": "logits", **options}
    with pytest.raises(InputError, match=message):
        lp.path_patch(model, CLEAN, CORRUPTED, **given)
