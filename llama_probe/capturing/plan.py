"""What is run together: prompts of like length in batches, batches in shards.

The plan follows from the prompts' lengths and the memory that is free. A store keeps it: what is
resumed runs the same batches, and so gives the same bits.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import torch

from llama_probe.capturing.job import Batch, Job, Shard
from llama_probe.capturing.memory import free_bytes
from llama_probe.capturing.positions import rows_of
from llama_probe.capturing.prompts import Encoded, described
from llama_probe.model.llama import Llama

# Larger batches gain nothing on a CPU, little on a GPU, and memory for them must be there.
_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
_FEWEST_TOKENS = 256
_SHARE_OF_MEMORY = 0.25
# What is lost when a run is killed: a shard holds so much at most, in bytes and in work; and where
# memory is scarce, no more than this share of it.
SHARD_BYTES = 32 * 2**20
SHARD_TOKENS = 2**15
_SHARD_SHARE = 1 / 16


def planned(
    model: Llama,
    record: dict[str, Any],
    frame: pd.DataFrame,
    encoded: Sequence[Encoded],
    positions: Sequence[Any],
    batch_tokens: int | None,
) -> Job:
    """What is to be captured, in batches and shards.

    Args:
        model: The model.
        record: What `job.record_of` gives.
        frame: The prompts.
        encoded: Their tokens.
        positions: As they were asked for.
        batch_tokens: Tokens in a batch, padding counted; None: what fits into the free memory. A
            batch never leaves more than a shard may hold, except for a single prompt that does.

    Raises:
        InputError: A prompt has no such position, or the prompts have a column of ours.
    """
    features = sum(prod(shape) for shape in record["features"].values())
    lengths = [len(one.ids) for one in encoded]
    rows = rows_of(encoded, positions, record["pool"])
    counts = rows["prompt"].value_counts().reindex(range(len(frame)), fill_value=0)
    bytes_of = (counts * features * getattr(torch, record["dtype"]).itemsize).tolist()
    densest = max(size / length for size, length in zip(bytes_of, lengths, strict=True))
    most = batch_tokens or fitting_tokens(model, features * model.cfg.dtype.itemsize)
    shard_bytes = min(SHARD_BYTES, int(_SHARD_SHARE * free_bytes(torch.device("cpu"))))
    planned_batches = batches(lengths, min(most, int(shard_bytes / densest)))
    plan = shards(planned_batches, lengths, bytes_of, shard_bytes)
    prompts = described(model, frame, encoded).assign(ids=[one.ids for one in encoded])
    return Job({**record, "plan": plan}, prompts, _placed(model, rows, encoded, plan))


def _placed(
    model: Llama, rows: pd.DataFrame, encoded: Sequence[Encoded], plan: Sequence[Shard]
) -> pd.DataFrame:
    """The rows with their token and their place: the shard, and the row in it."""
    order = [
        (number, prompt) for number, shard in enumerate(plan) for batch in shard for prompt in batch
    ]
    shard_of = {prompt: shard for shard, prompt in order}
    place_of = {prompt: place for place, (_, prompt) in enumerate(order)}
    ids = [
        encoded[prompt].ids[pos] if pos >= 0 else None
        for prompt, pos in zip(rows["prompt"], rows["pos"], strict=True)
    ]
    texts = {one: model.to_str_tokens([one])[0] for one in set(ids) if one is not None}
    places = [place_of[prompt] for prompt in rows["prompt"]]
    rows = rows.assign(
        token=[texts.get(one, "") for one in ids],
        shard=[shard_of[prompt] for prompt in rows["prompt"]],
    )
    # A prompt's rows stay together, in the order that was asked for.
    in_order = rows.iloc[np.argsort(places, kind="stable")]
    return rows.assign(row=in_order.groupby("shard").cumcount())


def batches(
    lengths: Sequence[int], most_tokens: int, most_prompts: int | None = None
) -> list[Batch]:
    """Prompts in batches of like length, the longest first, padding counted.

    What needs most memory comes first, so that a run which does not fit says so at its start.

    >>> batches([3, 9, 4, 8], most_tokens=18)
    [[1, 3], [2, 0]]
    """
    found: list[Batch] = []
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        size = len(found[-1]) + 1 if found else 0
        fits = found and lengths[found[-1][0]] * size <= most_tokens
        if fits and (most_prompts is None or size <= most_prompts):
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return found


def shards(
    planned: Sequence[Batch],
    lengths: Sequence[int],
    bytes_of: Sequence[int],
    most_bytes: int = SHARD_BYTES,
) -> list[Shard]:
    """Batches in shards of at most so many bytes of result and `SHARD_TOKENS` of work.

    Args:
        planned: The batches.
        lengths: Tokens of each prompt.
        bytes_of: Bytes that each prompt leaves in the store.
        most_bytes: The most that a shard may have; a single batch may have more.
    """
    found: list[Shard] = []
    size = work = 0
    for batch in planned:
        more = sum(bytes_of[prompt] for prompt in batch)
        tokens = lengths[batch[0]] * len(batch)
        if not found or size + more > most_bytes or work + tokens > SHARD_TOKENS:
            found.append([])
            size = work = 0
        found[-1].append(batch)
        size, work = size + more, work + tokens
    return found


def fitting_tokens(model: Llama, hook_bytes: int) -> int:
    """How many tokens to run at once, from a quarter of the memory that is free.

    Args:
        model: The model.
        hook_bytes: Bytes of what is hooked, for one token.
    """
    cfg = model.cfg
    wide = cfg.moe.top_k * cfg.moe.d_expert if cfg.moe is not None else 0
    element = torch.finfo(cfg.dtype).bits // 8
    working = element * (12 * cfg.d_model + 4 * max(cfg.d_mlp, wide))
    fits = int(_SHARE_OF_MEMORY * free_bytes(cfg.device) / (working + hook_bytes))
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS.get(cfg.device.type, 2048), fits))
