"""What is told of a capture: its size before, a bar meanwhile, what was halved after."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from llama_probe.capturing.collect import Halved
from llama_probe.capturing.job import Job, Told
from llama_probe.capturing.memory import peak_bytes


@contextmanager
def shown(
    job: Job, todo: Sequence[int], folder: Path | None, progress: bool, device: torch.device
) -> Iterator[tuple[Told, Halved]]:
    """Tell how far a capture is.

    Args:
        job: What is captured.
        todo: The shards that are still to be computed.
        folder: The store; None: memory.
        progress: Show sizes and a bar.
        device: Where the model runs, whose peak of memory is told at the end.

    Yields:
        A function to call with the tokens that have just been run, and a list for the sizes of the
        batches that had to be halved.
    """
    halved: Halved = []
    left = sum(job.n_tokens(shard) for shard in todo)
    whole = sum(job.prompts["n_tokens"])
    if progress and todo:
        tqdm.write(
            f"{len(job.prompts):,} prompts, {whole:,} tokens; {len(job.index):,} rows of "
            f"{len(job.hooks)} hooks: {job.nbytes / 1e6:,.1f} MB to {folder or 'memory'}",
            file=sys.stderr,
        )
    with tqdm(
        total=whole,
        initial=whole - left,
        desc="capture",
        unit="token",
        unit_scale=True,
        disable=not (progress and todo),
    ) as bar:
        yield bar.update, halved
        bar.set_postfix_str(f"peak memory {peak_bytes(device) / 1e9:.2f} GB")
    if halved:
        warnings.warn(
            f"{len(halved)} batches did not fit into memory and were halved (the largest had "
            f"{max(halved)} prompts): their rows agree with those of a whole batch to 1e-5 of the "
            "scale, not bit for bit",
            stacklevel=4,
        )
