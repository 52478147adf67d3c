"""Path patching: let a change reach one receiver, by the direct path, and no one else.

Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969). A sender's
output is changed as a patch would change it. What it writes into the residual stream is added to
the receiver's input alone; every other head and feed-forward sees the stream as it was. Then the
receiver's new output runs on to the logits as it may.

The stream is a sum, so the direct path needs no run of its own: the change arrives at the receiver
as it was written. With `through_mlps`, the feed-forwards in between react to it as well, as in Wang
et al.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe.errors import InputError
from llama_probe.hooks import Hook, HookPoint, act_name
from llama_probe.model.llama import Llama
from llama_probe.patching.engine import Before, Budget, measure_streams, run_layers
from llama_probe.patching.frames import Scale, frame_of
from llama_probe.patching.metrics import Metric, resolved
from llama_probe.patching.patch import check_direction, finished, with_tokens
from llama_probe.patching.runs import (
    Answers,
    Pairs,
    Run,
    both_runs,
    ends,
    pairs_of,
    stream_names,
    target_and_source,
)
from llama_probe.patching.sites import Cells, Positions, cells_of, sites_of

_SENDERS = ("z", "attn_out", "mlp_out")
_INPUTS = ("q", "k", "v")


class Receiver(NamedTuple):
    """Whose input changes: "q", "k" or "v" of a query head, "mlp" of a layer, or "logits"."""

    input: str
    layer: int | None = None
    head: int | None = None


@torch.no_grad()
def path_patch(
    model: Llama,
    clean: Any,
    corrupted: Any,
    *,
    metric: Any,
    receiver: Sequence[Any] | str,
    at: str = "z",
    over: str | Sequence[str] | None = None,
    direction: str = "denoise",
    through_mlps: bool = False,
    answer_at: Answers = -1,
    positions: Positions = None,
    each: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Patch every sender's path to one receiver.

    Args:
        model: The model.
        clean: Prompts, as for `lp.patch`.
        corrupted: Prompts, as for `lp.patch`.
        metric: As for `lp.patch`.
        receiver: ("q", layer, head), ("k", layer, head), ("v", layer, head), ("mlp", layer) or
            "logits". Heads are query heads: of keys and values that several of them share, only
            the named one sees the change.
        at: What sends: "z" (heads), "attn_out" or "mlp_out".
        over: What a cell is, as for `lp.patch`; None: layer and head for "z", else layer and pos.
        direction: As for `lp.patch`.
        through_mlps: Whether the feed-forwards between sender and receiver react.
        answer_at: As for `lp.patch`.
        positions: As for `lp.patch`, of the sender.
        each: As for `lp.patch`.
        batch_size: Most rows (one cell of one prompt each) that run at once; None: as memory
            allows.
        seed: Of the bootstrap.
        progress: Show a progress bar.

    Returns:
        The columns of `lp.patch`, for the senders before the receiver, with `receiver` ("q 9.6").

    Raises:
        InputError: As `lp.patch`; also for a receiver that is not there or has no sender before it.

    >>> from llama_probe.model.config import LlamaConfig
    >>> from llama_probe.patching.metrics import logit_diff
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> clean, corrupted = torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])
    >>> frame = path_patch(
    ...     model, clean, corrupted, metric=logit_diff(5, 6), receiver=("q", 1, 0)
    ... )
    >>> frame.layer.unique().tolist(), frame.receiver[0]
    ([0], 'q 1.0')
    """
    begun = time.perf_counter()
    check_direction(direction)
    to = _receiver(model, receiver)
    layers = _senders(model, at, to)
    pairs = pairs_of(model, clean, corrupted, answer_at)
    (site,) = sites_of(model, at, over, positions)
    cells = cells_of(site, over, pairs.real, layers=layers, positions=positions)
    names = [act_name(word, "*") for word in dict.fromkeys((at, "z", "attn_out", "resid_mid"))]
    names = [*model.hook_names(names), *stream_names(model)]
    clean_run, corrupted_run = both_runs(model, pairs, names, names)
    measure = resolved(metric, model, clean_run.logits)
    high, low = ends(measure, clean_run, corrupted_run)
    target, source = target_and_source(clean_run, corrupted_run, direction)
    paths = _Paths(model, pairs, target, source, at, to, through_mlps)
    values = _values(paths, cells, measure, batch_size, progress)
    scale = Scale.of(high, low, direction)
    frame = frame_of(cells, values, scale, pairs, site=at, each=each, seed=seed)
    frame = with_tokens(frame, model, target)
    label = f"{to.layer}" if to.head is None else f"{to.layer}.{to.head}"
    frame.insert(0, "receiver", to.input if to.layer is None else f"{to.input} {label}")
    return finished([frame], begun, direction=direction, through_mlps=through_mlps)


def _receiver(model: Llama, receiver: Sequence[Any] | str) -> Receiver:
    parts: tuple[Any, ...] = (receiver,) if isinstance(receiver, str) else tuple(receiver)
    needs = {"logits": 1, "mlp": 2, **dict.fromkeys(_INPUTS, 3)}
    if not parts or needs.get(parts[0]) != len(parts):
        raise InputError(
            f"receiver is {receiver!r}, but should be 'logits', ('mlp', layer), or one of "
            "('q', layer, head), ('k', layer, head), ('v', layer, head)"
        )
    to = Receiver(*parts)
    for index, n, what in (
        (to.layer, model.cfg.n_layers, "layer"),
        (to.head, model.cfg.n_heads, "head"),
    ):
        if index is not None and not 0 <= index < n:
            raise InputError(f"receiver is {receiver!r}, but there are {what}s 0 to {n - 1}")
    return to


def _senders(model: Llama, at: str, to: Receiver) -> list[int]:
    """The layers whose output comes before the receiver's input."""
    if at not in _SENDERS:
        raise InputError(f"at is {at!r}, but a sender is one of {', '.join(_SENDERS)}")
    end = model.cfg.n_layers if to.layer is None else to.layer
    end += to.input == "mlp" and at != "mlp_out"  # a layer's attention is before its feed-forward
    if end == 0:
        raise InputError(f"nothing sends from {at} to {to.input} of layer {to.layer}")
    return list(range(end))


class _Paths:
    """The changes that senders write, and what becomes of them at the receiver."""

    def __init__(
        self,
        model: Llama,
        pairs: Pairs,
        target: Run,
        source: Run,
        at: str,
        to: Receiver,
        through_mlps: bool,
    ) -> None:
        self.model, self.pairs, self.target, self.source = model, pairs, target, source
        self.at, self.to, self.through_mlps = at, to, through_mlps
        self.start = int(torch.minimum(pairs.first.min(), pairs.answer.min()))

    def values_of(self, cells: Cells, metric: Metric) -> Float[Tensor, "cell prompt"]:
        """The metric of each cell."""
        written = [self._written(cells, i) for i in range(len(cells))]
        if self.through_mlps:
            arriving = torch.stack(
                [
                    self._arriving(int(layer), x)
                    for layer, x in zip(cells.layer, written, strict=True)
                ]
            )
        else:
            arriving = torch.stack(written)
        if self.to.layer is None:
            prompt = torch.arange(len(self.pairs.real), device=arriving.device)
            last = self.target.cache["resid_post", self.model.cfg.n_layers - 1]
            streams = last[prompt, self.pairs.answer]
            streams = streams + arriving[:, prompt, self.pairs.answer - self.start]
        else:
            streams = self._run_receiver(arriving)
        return measure_streams(self.model, streams, metric)

    def _written(self, cells: Cells, index: int) -> Float[Tensor, "prompt pos d_model"]:
        """What a sender writes in the source run more than in the target run."""
        layer = int(cells.layer[index])
        old, new = (x.cache[self.at, layer][:, self.start :] for x in (self.target, self.source))
        change = new - old
        if self.at == "z":
            W_O = self.model.blocks[layer].attn.W_O
            if cells.unit is not None:
                head = int(cells.unit[index])
                change, W_O = change[:, :, head : head + 1], W_O[head : head + 1]
            change = einsum(change, W_O, "b pos head d, head d d_model -> b pos d_model")
        if cells.pos is not None:
            here = torch.arange(self.start, self.pairs.real.shape[1], device=change.device)
            change = change * (here == cells.pos[index, :, None])[..., None]
        return change

    def _arriving(self, layer: int, written: Tensor) -> Tensor:
        """The change at the receiver, where feed-forwards on the way react to it."""
        change = written
        end = self.model.cfg.n_layers if self.to.layer is None else self.to.layer
        for i in range(layer, end):
            if i == layer and self.at == "mlp_out":
                continue
            mid = self.target.cache["resid_mid", i][:, self.start :]
            block = self.model.blocks[i]
            change = change + block.mlp(block.ln2(mid + change)) - block.mlp(block.ln2(mid))
        return change

    def _run_receiver(
        self, arriving: Float[Tensor, "cell prompt pos d_model"]
    ) -> Float[Tensor, "cell prompt d_model"]:
        """The last stream at the answer, with the change added to the receiver's input alone."""
        layer, n_cells = self.to.layer, len(arriving)
        assert layer is not None
        stream = self.target.cache["resid_pre", layer][:, self.start :].repeat(n_cells, 1, 1)
        before = Before(self.target, self.start)
        with self.model.hooks(self._hooks(layer, arriving.flatten(0, 1))):
            last = run_layers(
                self.model, stream, layer, self.model.cfg.n_layers, self.pairs, before
            )
        return last[:, 0].unflatten(0, (n_cells, -1))

    def _hooks(self, layer: int, rows: Tensor) -> list[tuple[str, Hook]]:
        if self.to.head is None:
            return [(act_name("mlp_in", layer), partial(_add, change=rows))]
        shared = self.model.cfg.n_heads // self.model.cfg.n_key_value_heads
        head = self.to.head if self.to.input == "q" else self.to.head // shared
        known = self.target.cache["z", layer][:, self.start :]
        return [
            (
                act_name(f"{self.to.input}_input", layer),
                partial(_add_to_head, change=rows, head=head),
            ),
            (act_name("z", layer), partial(_only_head, known=known, head=self.to.head)),
        ]


def _add(x: Tensor, hook: HookPoint, change: Tensor) -> Tensor:
    return x + change


def _add_to_head(x: Tensor, hook: HookPoint, change: Tensor, head: int) -> Tensor:
    x[:, :, head] += change
    return x


def _only_head(z: Tensor, hook: HookPoint, known: Tensor, head: int) -> Tensor:
    """The other heads, which may share its keys and values, say what they said."""
    others = known.repeat(len(z) // len(known), 1, 1, 1)
    others[:, :, head] = z[:, :, head]
    return others


def _values(
    paths: _Paths, cells: Cells, metric: Metric, batch_size: int | None, progress: bool
) -> Float[Tensor, "cell prompt"]:
    n_pos = paths.pairs.real.shape[1] - paths.start
    budget = Budget.of(paths.model, paths.pairs, batch_size)
    parts = torch.arange(len(cells), device=cells.layer.device).split(budget.cells(n_pos))
    bar = tqdm(parts, desc="path patch", disable=not progress)
    return torch.cat([paths.values_of(cells.part(part), metric) for part in bar])
