"""The engine: runs only what a patch changes.

1. A patch in layer l leaves the layers before it alone: a cell starts from the stream that enters
   layer l, which is known from the run that is patched.
2. Tokens before the patched position do not see it: their keys and values are known too, and only
   the positions from there on are run.
3. A patch that puts in what is there already changes nothing: its cell is not run. Before the first
   token in which the prompts differ this is so by the causal mask, whatever rounding says.
4. All layers are gone through once. Cells join where they are injected, so that each layer's
   weights are fetched once for all of them.
5. The metric's position alone is unembedded, and only the tokens that it says it reads.

Cells with the same first position run as one batch of rows [cell prompt], cell by cell; so do those
of neighbouring positions, from the earliest one on, where that adds but a few tokens.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from llama_probe.hooks import Hook, HookPoint
from llama_probe.model.cache import KVCache
from llama_probe.model.llama import Llama
from llama_probe.patching.metrics import Metric, measured
from llama_probe.patching.progress import Progress, shown
from llama_probe.patching.runs import Pairs, Run
from llama_probe.patching.sites import Cells, Site

# So many more tokens cost less than one more group of cells does.
_FEW_TOKENS = 48


@dataclass(frozen=True)
class Sweep:
    """A sweep over one site: whose run is patched, and what is put in.

    Attributes:
        model: The model.
        pairs: The prompts.
        site: Where.
        target: The run that is patched, with `site_names` and `stream_names`.
        source: What is put in, by layer [prompt pos …], as `site.by_position` has it.
        chosen: For `expert_out`, the experts that the source run chose, by layer [prompt pos k].
        same_before: Before `pairs.first`, the source is the target but for rounding.
    """

    model: Llama
    pairs: Pairs
    site: Site
    target: Run
    source: dict[int, Tensor]
    chosen: dict[int, Int[Tensor, "prompt pos k"]]
    same_before: bool

    def known(self, layer: int) -> Tensor:
        """What is there without a patch [prompt pos …]."""
        return self.site.by_position(self.target.cache[self.site.hook(layer)])

    def known_chosen(self, layer: int) -> Int[Tensor, "prompt pos k"]:
        """The experts that the target run chose."""
        return self.target.cache["expert_indices", layer]

    @cached_property
    def positions(self) -> Int[Tensor, " pos"]:
        """0, 1, …, padding counted."""
        return torch.arange(self.pairs.real.shape[1], device=self.pairs.real.device)

    def changes(self, layer: int, by_unit: bool) -> Bool[Tensor, "prompt pos unit"]:
        """Where a patch of this layer can change the answer; one unit for all unless `by_unit`."""
        source, known = self.source[layer], self.known(layer)
        if by_unit and self.site.needs_indices:
            units = range(self.site.n_units)
            pairs = [(self.expert(layer, e), self.expert(layer, e, known=True)) for e in units]
            differ = torch.stack([(a != b).any(dim=-1) for a, b in pairs], dim=-1)
        else:
            differ = source != known
            if not by_unit:
                differ = differ.flatten(2).any(dim=-1, keepdim=True)
            elif differ.ndim > 3:
                differ = differ.any(dim=-1)
        seen = self.pairs.real & (self.positions <= self.pairs.answer[:, None])
        if self.same_before:
            seen = seen & (self.positions >= self.pairs.first[:, None])
        return differ & seen[..., None]

    def expert(
        self, layer: int, expert: Any, known: bool = False
    ) -> Float[Tensor, "*cell prompt pos d_model"]:
        """What an expert, or each cell's [cell 1 1 1], adds to the stream; 0 if not chosen."""
        out = self.known(layer) if known else self.source[layer]
        chosen = self.known_chosen(layer) if known else self.chosen[layer]
        return (out * (chosen == expert)[..., None]).sum(dim=-2)

    def put_in(self, rows: Tensor, layer: int, cells: Cells, start: int) -> Tensor:
        """Rows [cell·prompt pos …] from position `start` on, patched.

        Edits `rows` in place where it can.
        """
        if self.site.needs_indices and cells.unit is not None:
            return self._put_in_expert(rows, layer, cells, start)
        by_cell = rows.unflatten(0, (len(cells), -1))
        cell = torch.arange(len(cells), device=rows.device)[:, None]
        prompt = torch.arange(by_cell.shape[1], device=rows.device)[None]
        here: tuple[Any, ...] = (cell, prompt, slice(None))
        there: tuple[Any, ...] = (prompt, slice(start, None))
        if cells.pos is not None:
            here, there = (cell, prompt, cells.pos - start), (prompt, cells.pos)
        if cells.unit is not None:
            here, there = (*here, cells.unit[:, None]), (*there, cells.unit[:, None])
        by_cell[here] = self.source[layer][there].to(rows)
        return rows

    def _put_in_expert(self, rows: Tensor, layer: int, cells: Cells, start: int) -> Tensor:
        """The expert's share replaced, wherever among a token's choices it stands, if at all."""
        assert cells.unit is not None
        by_cell = rows.unflatten(0, (len(cells), -1))
        expert = cells.unit[:, None, None, None]
        new = self.expert(layer, expert)[:, :, start:]
        taken = (self.known_chosen(layer)[:, start:] == expert)[..., None]
        others = by_cell.masked_fill(taken, 0)
        others[..., 0, :] += new.to(rows)
        if cells.pos is not None:
            here = self.positions[start:] == cells.pos[..., None]
            others = torch.where(here[..., None, None], others, by_cell)
        return others.flatten(0, 1)


class Before(KVCache):
    """Keys and values of the positions before `start`, the same for every cell."""

    def __init__(self, target: Run, start: int) -> None:
        super().__init__(n_layers=0)
        self.cache, self.length = target.cache, start

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The known ones of every row, and then its own."""
        if not self.length:
            return keys, values
        return self._after(self.cache["rot_k", layer], keys), self._after(
            self.cache["v", layer], values
        )

    def _after(self, known: Tensor, new: Tensor) -> Tensor:
        rows, n_new = new.shape[:2]
        whole = new.new_empty(rows, self.length + n_new, *new.shape[2:])
        whole.unflatten(0, (-1, len(known)))[:, :, : self.length] = known[:, : self.length]
        whole[:, self.length :] = new
        return whole

    def advance(self, new: int, real: Any) -> None:
        """Every layer starts from the same tokens."""


class _Group:
    """Cells that start at one position, and the rows of those that have joined so far."""

    def __init__(self, sweep: Sweep, cells: Cells, index: Tensor, start: int) -> None:
        self.sweep, self.cells, self.index, self.start = sweep, cells, index, start
        self.n_prompts = len(sweep.pairs.real)
        self.before = Before(sweep.target, start)
        self.stream: Tensor | None = None
        per_layer = torch.bincount(cells.layer, minlength=sweep.model.cfg.n_layers)
        self.ends = [0, *per_layer.cumsum(0).tolist()]  # of each layer's cells, which lie together

    @property
    def tokens(self) -> int:
        """How many are run in the last layer."""
        n_pos = self.sweep.pairs.real.shape[1]
        return len(self.cells) * self.n_prompts * (n_pos - self.start)

    def step(self, layer: int) -> None:
        """Run one layer, with the cells that it injects; after the last, keep the answers."""
        new = self.cells.part(slice(self.ends[layer], self.ends[layer + 1]))
        parts = [] if self.stream is None else [self.stream]
        if len(new):
            entering = self.sweep.target.cache["resid_pre", layer][:, self.start :]
            parts.append(entering.expand(len(new), *entering.shape).flatten(0, 1))
        if not parts:
            return
        hooks = [(self.sweep.site.hook(layer), self._hook(layer, new))]
        if layer < self.sweep.model.cfg.n_layers - 1:
            self.stream = self._run(torch.cat(parts), layer, hooks if len(new) else [])
            return
        # Apart, since where nothing listens the last layer runs at the last position alone.
        self.stream = torch.cat(
            [
                self._run(part, layer, hooks if len(new) and part is parts[-1] else [])
                for part in parts
            ]
        )

    def _run(
        self, stream: Tensor, layer: int, hooks: list[tuple[str, Hook]]
    ) -> Float[Tensor, "row pos d_model"]:
        with self.sweep.model.hooks(hooks):
            return run_layers(
                self.sweep.model, stream, layer, layer + 1, self.sweep.pairs, self.before
            )

    def _hook(self, layer: int, new: Cells) -> Hook:
        def put_in(tensor: Tensor, hook: HookPoint) -> Tensor:
            rows = self.sweep.site.by_position(tensor)[-len(new) * self.n_prompts :]
            rows.copy_(self.sweep.put_in(rows, layer, new, self.start))
            return tensor

        return put_in

    def answers(self) -> Float[Tensor, "cell prompt d_model"]:
        """The stream after the last layer, at the answer position."""
        assert self.stream is not None
        return self.stream[:, 0].unflatten(0, (-1, self.n_prompts))


def run_layers(
    model: Llama,
    stream: Float[Tensor, "row pos d_model"],
    first: int,
    stop: int,
    pairs: Pairs,
    before: Before,
) -> Float[Tensor, "row pos_out d_model"]:
    """Run some layers on rows [cell·prompt]; after the last layer, the answer position alone."""
    n_cells = len(stream) // len(pairs.real)
    n_pos = pairs.real.shape[1]
    answer: Any = None
    if stop == model.cfg.n_layers:
        at_end = bool((pairs.answer == n_pos - 1).all())
        answer = -1 if at_end else (pairs.answer - before.length).repeat(n_cells)
    return model(
        stream,
        start_at_layer=first,
        stop_at_layer=stop,
        logits_at=answer,
        kv_cache=before,
        attention_mask=None if pairs.mask is None else pairs.mask.repeat(n_cells, 1),
    )


def values(
    sweep: Sweep,
    cells: Cells,
    metric: Metric,
    *,
    batch_size: int | None = None,
    progress: Progress = False,
) -> Float[Tensor, "cell prompt"]:
    """The metric of every cell, for every prompt.

    Args:
        sweep: What is patched.
        cells: The cells, ordered by layer.
        metric: A metric of logits [prompt d_vocab].
        batch_size: Most rows (a cell of a prompt each) that run at once; None: as many as memory
            allows. Fewer are tried where memory runs out.
        progress: Show a progress bar; or a function of how many cells are done and of how many,
            which is called once a layer.
    """
    start, active = _starts(sweep, cells)
    known = measured(metric, sweep.target.logits)
    result = known.expand(len(cells), -1).clone()
    todo = active.nonzero().flatten()
    budget = Budget.of(sweep.model, sweep.pairs, batch_size)
    _keep_freed_memory()
    total = len(todo)
    with shown(progress, total, f"patch {sweep.site.name}") as tell:
        while len(todo):
            groups = _groups(sweep, cells, todo, start, budget)
            try:
                size = sum(len(group.index) for group in groups)
                for share in _run(groups, sweep.model.cfg.n_layers):
                    tell(total - len(todo) + share * size)
                for group in groups:
                    result[group.index] = measure_streams(sweep.model, group.answers(), metric).to(
                        result
                    )
            except RuntimeError as error:
                if not is_out_of_memory(error) or not budget.halve():
                    raise
                continue
            done = torch.cat([group.index for group in groups])
            todo = todo[~torch.isin(todo, done)]
            tell(total - len(todo))
    return result


def _keep_freed_memory() -> None:
    """Have glibc keep what a layer frees for the next: fetching it anew can cost a tenth.

    It keeps twice the largest block that was freed so far, of those of 32 MiB at most.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _starts(sweep: Sweep, cells: Cells) -> tuple[Int[Tensor, " cell"], Bool[Tensor, " cell"]]:
    """For each cell the first position that it runs, and whether it can change anything."""
    answer, first = sweep.pairs.answer.min(), sweep.pairs.first.min()
    begin = first if sweep.same_before else torch.zeros_like(first)
    start = begin.expand(len(cells)) if cells.pos is None else cells.pos.min(dim=1).values
    active = torch.zeros(len(cells), dtype=torch.bool, device=start.device)
    prompt = torch.arange(len(sweep.pairs.real), device=start.device)
    for layer in cells.layer.unique().tolist():
        here = (cells.layer == layer).nonzero().flatten()
        changes = sweep.changes(layer, by_unit=cells.unit is not None)
        unit = torch.zeros_like(here) if cells.unit is None else cells.unit[here]
        if cells.pos is None:
            active[here] = changes.any(dim=1).any(dim=0)[unit]
        else:
            active[here] = changes[prompt, cells.pos[here], unit[:, None]].any(dim=1)
    return start.clamp(max=answer), active


def _groups(
    sweep: Sweep, cells: Cells, todo: Tensor, start: Tensor, budget: "Budget"
) -> list[_Group]:
    """Cells that run together, latest start first: as many groups as can be held at once."""
    groups: list[_Group] = []
    held = 0
    start = _joined(start[todo], len(sweep.pairs.real))
    for at in start.unique().flip(0).tolist():
        index = todo[start == at]
        for part in index.split(budget.cells(sweep.pairs.real.shape[1] - at)):
            group = _Group(sweep, cells.part(part), part, at)
            held += group.tokens
            if groups and held > budget.held_tokens:
                return groups
            groups.append(group)
    return groups


def _joined(start: Int[Tensor, " cell"], n_prompts: int) -> Int[Tensor, " cell"]:
    """Earlier starts where that costs little: fewer groups go through the layers then."""
    for later, earlier in pairwise(start.unique().flip(0).tolist()):
        here = start == later
        if int(here.sum()) * n_prompts * (later - earlier) <= _FEW_TOKENS:
            start = start.masked_fill(here, earlier)
    return start


def _run(groups: list[_Group], n_layers: int) -> Iterator[float]:
    """Run them layer by layer, and say before each which share is done."""
    first = min(int(group.cells.layer[0]) for group in groups)
    for layer in range(first, n_layers):
        yield (layer - first) / (n_layers - first)
        for group in groups:
            group.step(layer)


def measure_streams(
    model: Llama, streams: Float[Tensor, "cell prompt d_model"], metric: Metric
) -> Float[Tensor, "cell prompt"]:
    """The metric of each cell, from the stream after the last layer."""
    cells_at_once = max(1, 2**24 // (streams.shape[1] * model.cfg.d_vocab))
    return torch.stack(
        [
            measured(metric, logits)
            for part in streams.split(cells_at_once)
            for logits in _logits(model, part, getattr(metric, "reads", None))
        ]
    )


def _logits(
    model: Llama, streams: Float[Tensor, "cell prompt d_model"], reads: list[int] | None
) -> Float[Tensor, "cell prompt d_vocab"]:
    """Logits, of some tokens only if `reads` names them: NaN elsewhere."""
    rows = streams.flatten(0, 1)[:, None]
    if reads is None or model.hook_logits.listening:
        logits = model(rows, start_at_layer=model.cfg.n_layers)
    else:
        logits = rows.new_full((*rows.shape[:2], model.cfg.d_vocab), torch.nan)
        logits[..., reads] = linear(model.ln_final(rows), model.unembed.weight[reads])
    return logits.unflatten(0, streams.shape[:2])[:, :, 0]


@dataclass
class Budget:
    """How much may run at once, and be held between layers.

    Attributes:
        prompts: Rows of a cell.
        rows: Most rows that run at once, whatever their length.
        tokens: Most tokens that run at once.
        held_tokens: Most tokens whose stream is held.
    """

    prompts: int
    rows: int
    tokens: int
    held_tokens: int

    @classmethod
    def of(cls, model: Llama, pairs: Pairs, batch_size: int | None) -> "Budget":
        """From the memory that is free, of which half may be used."""
        cfg, n_pos = model.cfg, pairs.real.shape[1]
        size = model.embed.weight.element_size()
        free = free_memory(pairs.real.device) // 2
        width = cfg.d_mlp if cfg.moe is None else cfg.moe.top_k * (cfg.moe.d_expert + cfg.d_model)
        # Streams and their norms, heads, neurons, a pattern, the keys and values of all positions.
        running = 8 * cfg.d_model + 4 * cfg.n_heads * cfg.d_head + 4 * width
        running += 4 * cfg.n_heads * n_pos
        tokens = free // (2 * size * running)
        if pairs.real.device.type == "cpu":
            tokens = min(tokens, 1024)  # more only leave the cache
        return cls(
            len(pairs.real),
            batch_size or 2**31,
            max(1, tokens),
            max(1, free // (2 * size * 3 * cfg.d_model)),
        )

    def cells(self, length: int) -> int:
        """How many cells of that many positions may run at once; one at least."""
        rows = min(self.rows, self.tokens // max(1, length))
        return max(1, rows // self.prompts)

    def halve(self) -> bool:
        """Allow half as much; False where a single cell is the least that can run."""
        if self.tokens <= 1:
            return False
        self.tokens //= 2
        self.held_tokens = max(1, self.held_tokens // 2)
        return True


def free_memory(device: torch.device) -> int:
    """Bytes that can be had; a GiB where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**30


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
