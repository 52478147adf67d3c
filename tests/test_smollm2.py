"""A real model from its GGUF file, against transformers on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llama_probe as lp
from llama_probe.checkpoints.save import published
from llama_probe.model.llama import Llama

pytestmark = pytest.mark.slow

PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "To make a good cup of tea, first",
    "1, 2, 4, 8, 16,",
    "The opposite of hot is",
    "In 1969, the first people landed on",
]


@pytest.fixture(scope="module")
def from_gguf(smollm2_path: Path) -> Any:
    """Transformers' own loading of the file."""
    from transformers import AutoModelForCausalLM

    folder, file = smollm2_path.parent, smollm2_path.name
    hf = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="sdpa"
    )
    return hf.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_weight_is_bit_identical(smollm2: Llama, from_gguf: Any):
    theirs = from_gguf.state_dict()
    ours = published(smollm2)
    assert len(ours) == 272 == len(theirs) - 1  # theirs names the tied unembedding as well
    assert smollm2.unembed.weight is smollm2.embed.weight
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


GREEDY = {"max_new_tokens": 64, "stop_tokens": [], "return_type": "tokens", "progress": False}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_greedy_continuations_are_identical(smollm2: Llama, from_gguf: Any):
    """If each token is what transformers would choose after those before it, all are."""
    rows = smollm2.generate(PROMPTS, **GREEDY)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens = torch.cat([smollm2.to_tokens(prompt)[0], row])[None]
        with torch.no_grad():
            chosen = from_gguf(tokens[:, :-1]).logits[0, -64:].argmax(dim=-1)
        assert row.tolist() == chosen.tolist(), prompt


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_one_continuation_against_the_loop_of_transformers(smollm2: Llama, from_gguf: Any):
    tokens = smollm2.to_tokens(PROMPTS[1])
    expected = from_gguf.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
        repetition_penalty=1.0,
    )[0, tokens.shape[1] :]
    (alone,) = smollm2.generate(tokens, **GREEDY)
    assert alone.tolist() == expected.tolist()


def test_anchor_values(smollm2: Llama):
    """Logit differences that TransformerLens gives for this file, without and with BOS."""
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupted = clean.replace("John gave", "Mary gave")
    metric = lp.logit_diff(" Mary", " John").on(smollm2)
    for bos, expected in ((False, (6.1196, -5.4853)), (True, (5.2873, -5.0470))):
        for prompt, value in zip((clean, corrupted), expected, strict=True):
            logits = smollm2(prompt, prepend_bos=bos, logits_at=-1)[:, -1]
            assert float(metric(logits)) == pytest.approx(value, abs=2e-3)


def test_it_answers_in_its_chat_template(smollm2: Llama):
    answer = smollm2.generate("What is the capital of France?", template="chat", max_new_tokens=12)
    assert "Paris" in answer


def test_both_attention_paths_agree(smollm2: Llama):
    """1e-4 of the logits' scale on a real model."""
    prompt = PROMPTS[4]
    fast = smollm2(prompt)
    eager, _ = smollm2.run_with_cache(prompt, names_filter="*hook_pattern")
    assert (fast - eager).abs().max() <= 1e-4 * fast.abs().max()
