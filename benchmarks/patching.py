"""Patch sweeps against TransformerLens' own, on its own model, and against hand-written hooks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import llama_probe as lp
from benchmarks.measure import Row, cpu_seconds, fastest, peak_megabytes
from llama_probe.checkpoints.save import published

# Without BOS: what differs late, and at the very first token.
LATE = (
    "When Mary and John went to the store, John gave a drink to",
    "When Mary and John went to the store, Mary gave a drink to",
)
FIRST = (LATE[0], "While Mary and John went to the store, John gave a drink to")
MARY, JOHN = " Mary", " John"
LENS = "TransformerLens"
HOOKS = "hand-written hooks on transformers, all positions of a layer at once, full logits"


def bridge(model: lp.Llama) -> Any:
    """TransformerLens' own model on the same weights."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    assert model.tokenizer is not None
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.cfg.to_hf()))
    hf.load_state_dict(published(model), strict=False)
    with TemporaryDirectory() as folder:  # the tokenizer is read again while booting
        model.tokenizer.save(Path(folder))
        return TransformerBridge.boot_transformers(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            hf_model=hf.eval(),
            tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
            device="cpu",
            dtype=torch.float32,
        )


def sweeps(model: lp.Llama, hf: Any) -> list[Row]:
    """The 30 × 14 grid of the residual stream, and the 30 × 9 heads, on both pairs."""
    theirs = bridge(model)
    goals = {"resid_pre": {"late": 50, "at once": 12}, "z": {"late": 15, "at once": 8}}
    rows = []
    for at, of_pairs in goals.items():
        lens = {}
        for differ, goal in of_pairs.items():
            pair = LATE if differ == "late" else FIRST
            clean, corrupted = (model.to_tokens(text, prepend_bos=False) for text in pair)
            ours = partial(_ours, model, clean, corrupted, at)
            kept = theirs.run_with_cache(clean)[1]
            sweep = partial(_lens, at, theirs, corrupted, kept, _metric(model))
            found: list[Tensor] = []
            lens[differ] = cpu_seconds(lambda found=found, sweep=sweep: found.append(sweep()))
            assert (found[0].flatten() - ours().flatten()).abs().max() < 1e-3
            what = f"patch sweep, SmolLM2, `{at}`, 14 tokens, prompts differ {differ}"
            best = fastest({"ours": ours}, 3)["ours"]
            rows.append(Row(what, LENS, best, lens[differ], goal))
            if at == "resid_pre":
                hooks = partial(hand_written, model, hf, clean, corrupted)
                assert (hooks().flatten() - ours().flatten()).abs().max() < 1e-3
                once, again = cpu_seconds(hooks), cpu_seconds(hooks)
                goal = 12 if differ == "late" else 3
                rows.append(Row(what, HOOKS, best, min(once, again), goal))
                rows.append(Row("the same hooks", "themselves", again, once, None))
        rows.append(Row(f"`{at}` by {LENS}", "its other pair", lens["at once"], lens["late"], None))
    return rows


def _lens(at: str, theirs: Any, corrupted: Tensor, kept: Any, metric: Any) -> Tensor:
    """TransformerLens' own sweep: a forward pass a cell."""
    from transformer_lens import patching

    if at == "z":
        return patching.get_act_patch_attn_head_out_all_pos(theirs, corrupted, kept, metric)
    return patching.get_act_patch_resid_pre(theirs, corrupted, kept, metric)


def _ours(model: lp.Llama, clean: Tensor, corrupted: Tensor, at: str) -> Tensor:
    frame = lp.patch(model, clean, corrupted, metric=lp.logit_diff(MARY, JOHN), at=at)
    return torch.tensor(frame["metric"].to_numpy())


def _metric(model: lp.Llama) -> Callable[[Tensor], Tensor]:
    mary, john = map(model.to_single_token, (MARY, JOHN))
    return lambda logits: logits[0, -1, mary] - logits[0, -1, john]


@torch.no_grad()
def hand_written(model: lp.Llama, hf: Any, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The sweep of the residual stream as people write it: a batch of all positions a layer."""
    n_pos = clean.shape[1]
    mary, john = map(model.to_single_token, (MARY, JOHN))
    streams = hf(clean, output_hidden_states=True, use_cache=False).hidden_states
    batch, pos = corrupted.expand(n_pos, -1), torch.arange(n_pos)
    rows = []
    for layer, block in enumerate(hf.model.layers):

        def put_in(module: Any, args: Any, layer: int = layer) -> Any:
            stream = args[0].clone()
            stream[pos, pos] = streams[layer][0]
            return (stream, *args[1:])

        handle = block.register_forward_pre_hook(put_in)
        logits = hf(batch, use_cache=False).logits[:, -1]
        handle.remove()
        rows.append(logits[:, mary] - logits[:, john])
    return torch.stack(rows)


_BATCH = """
import torch, llama_probe as lp
torch.set_num_threads(1)
model = lp.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32, progress=False)
from benchmarks.patching import pairs_of_length
clean, corrupted, metric = pairs_of_length(model, 16, 15)
"""


def pairs_of_length(model: lp.Llama, n: int, length: int) -> tuple[Tensor, Tensor, Any]:
    """Generated pairs of so many tokens, without BOS, and their metric."""
    pairs = lp.prompts.indirect_object(model, 40 * n, prepend_bos=False)
    chosen = pairs[pairs.end == length - 1].head(n)
    assert len(chosen) == n
    clean, corrupted = (
        model.to_tokens(chosen[column].tolist(), prepend_bos=False)
        for column in ("clean", "corrupted")
    )
    return clean, corrupted, lp.logit_diff(chosen.answer.tolist(), chosen.foil.tolist())


def batch(model: lp.Llama) -> list[Row]:
    """Sixteen pairs × 30 layers × 15 positions in one call: its time and its peak memory."""
    clean, corrupted, metric = pairs_of_length(model, 16, 15)
    answers, foils = metric.answer, metric.foil

    def one_by_one() -> None:
        for i in range(len(clean)):
            each = lp.logit_diff(answers[i], foils[i])
            lp.patch(model, clean[i], corrupted[i], metric=each)

    best = fastest(
        {
            "batch": lambda: lp.patch(model, clean, corrupted, metric=metric),
            "one by one": one_by_one,
            "again": one_by_one,
        },
        2,
    )
    forward = peak_megabytes(_BATCH + "with torch.no_grad(): model(clean)")
    sweep = peak_megabytes(_BATCH + "lp.patch(model, clean, corrupted, metric=metric)")
    what = "patch sweep, SmolLM2, `resid_pre`, 16 pairs × 30 layers × 15 positions, one call"
    return [
        Row(what, "a call for each pair", best["batch"], best["one by one"], None),
        Row("a call for each pair", "itself", best["again"], best["one by one"], None),
        Row(f"{what}, peak memory", "one forward of the 16", sweep, forward, None, "MB"),
    ]
