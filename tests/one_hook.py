"""Edits of a single hook, tried on plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_probe.hooks import HookPoint
from llama_probe.interventions import Edit

PLACE = HookPoint()
PLACE.name = "here"


def random(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **{"dtype": torch.float64, **options})


def act(edit: Edit, x: Tensor) -> Tensor:
    """What an edit of one hook makes of a tensor there."""
    ((_, hook),) = edit
    return hook(x, hook=PLACE)


def here(make: Callable[..., Edit], *given: Any, **options: Any) -> Edit:
    return make(*given, at="hook_embed", **options)


def farthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
