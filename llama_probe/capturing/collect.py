"""One batch of prompts through the model, as far as its deepest hook."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_probe.capturing.memory import is_out_of_memory
from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, reads_only
from llama_probe.model.llama import Llama

# The ends of the names of hooks whose values are not of one token.
OF_TWO_TOKENS = ("hook_attn_scores", "hook_pattern")
# The batches that did not fit into memory and were halved, as the number of their prompts.
Halved = list[int]


class Rows(NamedTuple):
    """The rows that a batch gives, by prompt and in the prompt's order; see `positions.rows_of`."""

    prompt: np.ndarray  # row in the batch
    first: np.ndarray
    stop: np.ndarray


class _Done(Exception):
    """Raised when the deepest hook has been heard: nothing after it is wanted."""


@torch.no_grad()
def collect(
    model: Llama,
    ids: Sequence[Sequence[int]],
    hooks: Sequence[str],
    rows: Rows,
    pool: str | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What the hooks pass on at the wanted tokens, on the CPU: [row, *features] by hook."""
    lengths = np.array([len(row) for row in ids])
    n_pos = int(lengths.max())
    tokens = model.pad(ids)
    mask = torch.arange(n_pos) >= torch.from_numpy(n_pos - lengths)[:, None]
    shift = (n_pos - lengths)[rows.prompt]
    kept: dict[str, Tensor] = {}

    @reads_only
    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = _stored(_cut(tensor, rows, shift, pool), dtype)
        if len(kept) == len(hooks):
            raise _Done

    with suppress(_Done):
        model.run_with_hooks(
            tokens, attention_mask=mask.to(tokens.device), fwd_hooks=[(list(hooks), keep)]
        )
    return kept


def _cut(tensor: Tensor, rows: Rows, shift: np.ndarray, pool: str | None) -> Tensor:
    """The wanted tokens of [batch, pos, *features]; in float32 at least where pooled."""
    prompts = torch.from_numpy(rows.prompt).to(tensor.device)
    if pool is None:
        return tensor[prompts, torch.from_numpy(rows.first + shift).to(tensor.device)]
    precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    spans = zip(rows.prompt, rows.first + shift, rows.stop + shift, strict=True)
    parts = [precise[prompt, first:stop] for prompt, first, stop in spans]
    return torch.stack([part.mean(0) if pool == "mean" else part.amax(0) for part in parts])


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to("cpu", dtype if values.is_floating_point() else values.dtype)


def collect_fitting(
    model: Llama,
    ids: Mapping[int, Sequence[int]],
    hooks: Sequence[str],
    rows: Rows,
    pool: str | None,
    dtype: torch.dtype,
    halved: Halved,
) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
    """As `collect`; a batch that does not fit into memory is halved until it does.

    Args:
        model: The model.
        ids: Each prompt's tokens, by its row in the whole set.
        hooks: Full names.
        rows: The rows, with `prompt` as a row of the whole set.
        pool: How tokens become one row.
        dtype: Of what is kept.
        halved: Gets the size of each batch that was halved.

    Yields:
        The rows in parts, with their activations.

    Raises:
        InputError: Not even a single prompt fits.
    """
    prompts = list(ids)
    place = {prompt: row for row, prompt in enumerate(prompts)}
    local = rows._replace(prompt=np.array([place[prompt] for prompt in rows.prompt]))
    try:
        found = collect(model, list(ids.values()), hooks, local, pool, dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = None
    if found is not None:
        yield rows, found
        return
    # Out of the except clause, whose traceback would hold on to the tensors.
    if model.cfg.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(prompts) == 1:
        raise InputError(
            f"prompt {prompts[0]} has {len(ids[prompts[0]])} tokens and does not fit into memory "
            "alone: ask for fewer hooks, or shorten it"
        )
    halved.append(len(prompts))
    middle = len(prompts) // 2
    for some in (prompts[:middle], prompts[middle:]):
        part = {prompt: ids[prompt] for prompt in some}
        yield from collect_fitting(model, part, hooks, _of(rows, some), pool, dtype, halved)


def _of(rows: Rows, prompts: Sequence[int]) -> Rows:
    """The rows of some of the prompts."""
    wanted = np.isin(rows.prompt, prompts)
    return Rows(*(column[wanted] for column in rows))


def feature_shapes(model: Llama, hooks: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape of what each hook holds for one token.

    Raises:
        InputError: What a hook holds is not of one token: attention scores and patterns.
    """
    for name in hooks:
        if name.endswith(OF_TWO_TOKENS):
            raise InputError(
                f"{name} relates two tokens and has no row for each: lp.attention_maps reads it"
            )
    found: dict[str, tuple[int, ...]] = {}

    @reads_only
    def look(tensor: Tensor, hook: HookPoint) -> None:
        found[str(hook.name)] = tuple(tensor.shape[2:])

    mask = torch.ones(1, 1, device=model.cfg.device)
    with torch.no_grad():
        model.run_with_hooks(
            torch.tensor([[0]]), attention_mask=mask, fwd_hooks=[(list(hooks), look)]
        )
    return {name: found[name] for name in hooks}
