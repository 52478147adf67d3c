"""Capture of many prompts: beside the bare forward on the same batches, and on two Ray workers."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import llama_probe as lp
from benchmarks.measure import Row, peak_megabytes
from llama_probe.capturing import plan
from llama_probe.runner.ray_engine import RayEngine

_SUBJECTS = ("river", "old bridge", "teacher of my sister", "cat", "small town in the north")
_VERBS = ("is", "was", "could have been", "is said to be", "will never be")


def sentences(n: int) -> list[str]:
    """Different sentences of 6 to 16 words."""
    return [
        f"Number {i}: the {_SUBJECTS[i % 5]} {_VERBS[i // 5 % 5]} here" + " and there" * (i % 4)
        for i in range(n)
    ]


def batch(model: lp.Llama) -> list[Row]:
    """2,000 prompts × 31 residual sites at the last position, into a store."""
    prompts = sentences(2000)
    hooks = ["blocks.*.hook_resid_pre", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    torch.set_num_threads(1)

    with TemporaryDirectory() as folder:

        def capture() -> None:
            acts = lp.capture(model, prompts, hooks, store=folder, progress=False)
            assert len(acts.hooks) == 31 and len(acts) == 2000
            assert list(map(len, batches)) == list(map(len, _batches(model, acts)))

        acts = lp.capture(model, prompts, "hook_embed", progress=False)
        batches = _batches(model, acts)
        masks = [tokens != model.pad_token_id for tokens in batches]

        def forward() -> None:
            for tokens, mask in zip(batches, masks, strict=True):
                model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)

        again, ours, bare = (_wall(call) for call in (forward, capture, forward))
    what = "2,000 prompts × 31 residual sites, SmolLM2, last position"
    return [
        Row(f"capture of {what}, to a store", "our bare forward, no logits", ours, bare, 0.9, "s"),
        Row("the same forward", "itself", again, bare, None, "s"),
        Row(
            "capture of 500 of them: peak memory, imports and weights included",
            "our bare forward, no logits",
            peak_megabytes(_PROGRAM + _CAPTURE),
            peak_megabytes(_PROGRAM + _FORWARD),
            None,
            "MiB resident",
        ),
    ]


def _batches(model: lp.Llama, acts: lp.Activations) -> list[torch.Tensor]:
    """The tokens that were run together."""
    together = [batch for shard in acts.record["plan"] for batch in shard]
    return [model.pad([acts.prompts["ids"][prompt] for prompt in batch]) for batch in together]


_PROGRAM = """
import torch
import llama_probe as lp
from benchmarks.capturing import sentences
torch.set_num_threads(1)
model = lp.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32, progress=False)
prompts = sentences(500)
"""
_CAPTURE = """
lp.capture(model, prompts, "blocks.*.hook_resid_pre", progress=False)
"""
_FORWARD = """
with torch.no_grad():
    for start in range(0, 500, 40):
        model(prompts[start:start + 40], stop_at_layer=model.cfg.n_layers)
"""


@torch.no_grad()
def _wall(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def ray() -> list[Row]:
    """About a minute of work on one worker and on two, one thread each; wall time."""
    torch.set_num_threads(1)
    model = lp.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32, progress=False)
    plan.SHARD_TOKENS = 2**11
    prompts = sentences(2000)
    walls: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for name, workers in (("one", 1), ("two", 2), ("one again", 1)):
            engine = _Timed(RayEngine(workers=workers))
            store = Path(folder) / name
            lp.capture(model, prompts, "blocks.*.hook_resid_pre", store=store, engine=engine)
            walls[name] = engine.seconds
    what = "capture of 2,000 prompts, SmolLM2, on two Ray workers of one thread"
    return [
        Row(what, "one worker", walls["two"], walls["one"], 1.5, "s"),
        Row("one worker", "itself", walls["one again"], walls["one"], None, "s"),
    ]


class _Timed:
    """An engine, timed from its first shard per worker on: after the workers have started."""

    def __init__(self, engine: RayEngine) -> None:
        self.engine = engine
        self.seconds = 0.0

    def __call__(self, model, job, folder, todo, told):  # noqa: ANN001, ANN204, D102
        started, done = 0.0, 0
        warm = 2 * (self.engine.workers or 1)
        for halved in self.engine(model, job, folder, todo, told):
            done += 1
            if done == warm:
                started = time.monotonic()
            yield halved
        # As if all shards had been timed.
        self.seconds = (time.monotonic() - started) * len(todo) / (done - warm)
