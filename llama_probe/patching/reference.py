"""The plain way: one whole forward pass for each cell. For tests, and for those who doubt."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.hooks import HookPoint
from llama_probe.patching.engine import Sweep
from llama_probe.patching.metrics import Metric, measured
from llama_probe.patching.progress import Progress, shown
from llama_probe.patching.sites import Cells


def values(
    sweep: Sweep,
    cells: Cells,
    metric: Metric,
    *,
    batch_size: int | None = None,
    progress: Progress = False,
) -> Float[Tensor, "cell prompt"]:
    """The metric of every cell, for every prompt; the arguments are those of `engine.values`."""
    rows = []
    with shown(progress, len(cells), "patch, plainly") as tell:
        for cell in range(len(cells)):
            tell(cell)
            rows.append(_value(sweep, cells, cell, metric))
        tell(len(cells))
    return torch.stack(rows)


def _value(sweep: Sweep, cells: Cells, cell: int, metric: Metric) -> Float[Tensor, " prompt"]:
    layer = int(cells.layer[cell])
    unit = None if cells.unit is None else int(cells.unit[cell])
    places = None if cells.pos is None else cells.pos[cell].tolist()

    def put_in(tensor: Tensor, hook: HookPoint) -> Tensor:
        by_position = sweep.site.by_position(tensor)
        for prompt in range(len(tensor)):
            at: Any = slice(None) if places is None else places[prompt]
            source = sweep.source[layer][prompt, at]
            if unit is None:
                by_position[prompt, at] = source
            elif sweep.site.needs_indices:
                there = sweep.chosen[layer][prompt, at, :, None] == unit
                here = sweep.known_chosen(layer)[prompt, at, :, None] == unit
                written = torch.where(here, 0, by_position[prompt, at])
                written[..., 0, :] += torch.where(there, source, 0).sum(-2)
                by_position[prompt, at] = written
            elif places is None:
                by_position[prompt, :, unit] = source[:, unit]
            else:
                by_position[prompt, at, unit] = source[unit]
        return tensor

    logits = sweep.model.run_with_hooks(
        sweep.target.tokens,
        attention_mask=sweep.pairs.real,
        fwd_hooks=[(sweep.site.hook(layer), put_in)],
        logits_at=sweep.pairs.answer,
    )
    return measured(metric, logits[:, 0])
