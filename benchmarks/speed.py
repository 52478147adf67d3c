"""Forward pass, decoding, capture and mixture of experts, against transformers (sdpa)."""

from typing import Any

import torch

import llama_probe as lp
from benchmarks.measure import Row, fastest
from llama_probe.checkpoints.save import published

SDPA = "transformers (sdpa)"
ITSELF = "transformers against itself"


def smollm2() -> tuple[lp.Llama, Any]:
    """SmolLM2 and transformers' model on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = lp.load("smollm2-135m-instruct", device="cpu", dtype=torch.float32, progress=False)
    with torch.device("meta"):
        hf = LlamaForCausalLM(LlamaConfig(**model.cfg.to_hf(), attn_implementation="sdpa"))
    hf.load_state_dict(published(model), assign=True, strict=False)
    hf.tie_weights()
    # Frequencies are no weights: transformers computes them anew on the real device.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=hf.config)
    return model, hf.eval()


def forward(model: lp.Llama, hf: Any) -> list[Row]:
    """All logits of a long batch and of one short prompt."""
    rows = []
    for batch, length, rounds in ((8, 128, 5), (1, 15, 25)):
        tokens = torch.randint(3, 49000, (batch, length))
        best = fastest(
            {
                "ours": lambda tokens=tokens: model(tokens),
                "theirs": lambda tokens=tokens: hf(tokens, use_cache=False).logits,
                "again": lambda tokens=tokens: hf(tokens, use_cache=False).logits,
            },
            rounds,
        )
        assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-3
        what = f"forward, SmolLM2, {batch} × {length} tokens"
        rows.append(Row(what, SDPA, best["ours"], best["theirs"], 1.0))
        rows.append(Row(what, ITSELF, best["again"], best["theirs"], None))
    return rows


def decoding(model: lp.Llama, hf: Any) -> list[Row]:
    """Greedy decoding with the cache."""
    tokens = torch.randint(3, 49000, (1, 15))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 2}

    def theirs() -> torch.Tensor:
        return hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    def ours() -> Any:
        return model.generate(tokens, max_new_tokens=64, stop_tokens=[], return_type="tokens")

    best = fastest({"ours": ours, "theirs": theirs, "again": theirs}, 6)
    what = "greedy decoding, SmolLM2, 64 tokens after 15"
    return [
        Row(what, SDPA, best["ours"], best["theirs"], 1.0),
        Row(what, ITSELF, best["again"], best["theirs"], None),
    ]


def capture(model: lp.Llama) -> list[Row]:
    """What it costs to keep every layer's residual stream."""
    tokens = torch.randint(3, 49000, (8, 128))

    def kept() -> Any:
        return model.run_with_cache(tokens, names_filter="blocks.*.hook_resid_post")

    calls = {"bare": lambda: model(tokens), "kept": kept, "again": lambda: model(tokens)}
    best = fastest(calls, 5)
    what = "capture of every `hook_resid_post`, SmolLM2, 8 × 128"
    return [
        Row(what, "our bare forward", best["kept"], best["bare"], round(1 / 1.05, 3)),
        Row("our bare forward", "itself", best["again"], best["bare"], None),
    ]


def experts() -> list[Row]:
    """A Llama-4-shaped mixture of experts."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=512,
        intermediate_size=1024,
        intermediate_size_mlp=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=16,
        num_experts_per_tok=1,
        vocab_size=1000,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    hf = Llama4ForCausalLM(config).eval()
    model = lp.from_transformers(hf)
    tokens = torch.randint(3, 1000, (4, 256))
    best = fastest(
        {
            "ours": lambda: model(tokens),
            "theirs": lambda: hf(tokens, use_cache=False).logits,
            "again": lambda: hf(tokens, use_cache=False).logits,
        },
        6,
    )
    assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4
    what = "forward, Llama-4-shaped, 16 experts top-1, 4 × 256"
    return [
        Row(what, SDPA, best["ours"], best["theirs"], 3.0),
        Row(what, ITSELF, best["again"], best["theirs"], None),
    ]
