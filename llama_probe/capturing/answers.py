"""The model's own answers to prompts, before anything is captured from them."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from llama_probe.capturing.plan import batches
from llama_probe.capturing.prompts import Encoded
from llama_probe.model.llama import Llama

_AT_ONCE = 16


def answers(
    model: Llama, encoded: Sequence[Encoded], max_new_tokens: int, progress: bool
) -> list[list[int]]:
    """What the model answers to each prompt, greedily, without the token that ends it."""
    stops = model.tokenizer.stop_ids if model.tokenizer is not None else frozenset()
    found: dict[int, list[int]] = {}
    lengths = [len(one.ids) for one in encoded]
    with tqdm(total=len(encoded), desc="answers", unit="prompt", disable=not progress) as bar:
        for batch in batches(lengths, _AT_ONCE * max(lengths), _AT_ONCE):
            tokens = model.pad([encoded[prompt].ids for prompt in batch])
            real = torch.tensor([[lengths[prompt]] for prompt in batch])
            mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - real
            new = model.generate(
                tokens,
                attention_mask=mask.to(tokens.device),
                max_new_tokens=max_new_tokens,
                return_type="tokens",
                progress=False,
            )
            for prompt, row in zip(batch, new, strict=True):
                ids = row.tolist()
                found[prompt] = ids[:-1] if ids[-1] in stops else ids
            bar.update(len(batch))
    return [found[prompt] for prompt in range(len(encoded))]
