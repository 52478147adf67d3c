"""What counting routes costs, beside the forward pass that it counts."""

from functools import partial

import torch

import llama_probe as lp
from benchmarks.measure import Row, fastest


def report() -> list[Row]:
    """The one-pass measures of 200 prompts × 64 tokens on tiny-moe."""
    model = lp.load("tiny-moe", progress=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, model.cfg.d_vocab, (200, 64), generator=generator)

    def forward() -> None:
        for batch in tokens.split(64):
            model(batch)

    calls = {
        "routes": partial(lp.routes_of, model, tokens),
        "report": partial(lp.routing_report, model, tokens),
        "forward": forward,
        "again": forward,
    }
    best = fastest(calls, 3)
    what, bare = "of 200 prompts × 64 tokens, tiny-moe", "our bare forward, all logits"
    return [
        Row(f"routes {what}", bare, best["routes"], best["forward"], None),
        Row(f"routing report {what}", bare, best["report"], best["forward"], 1 / 1.3),
        Row("the same forward", "itself", best["again"], best["forward"], None),
    ]
