"""For which tokens of a pass an edit acts."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe.errors import InputError

Where = Bool[Tensor, "batch pos 1"]
Places = slice | Tensor | str | None


def places_of(positions: Any) -> Places:
    """Positions as a slice, a word, None, or a tensor of numbers [n] or a mask [(batch) pos]."""
    if positions is None or isinstance(positions, slice):
        return positions
    if isinstance(positions, str):
        if positions not in ("prompt", "new"):
            raise InputError(f"positions is {positions!r}; the words are 'prompt' and 'new'")
        return positions
    try:
        places = torch.as_tensor(positions).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise _no_positions(positions) from None
    mask = places.dtype == torch.bool
    if places.is_floating_point() or places.is_complex() or not places.numel():
        raise _no_positions(positions)
    if places.ndim > (2 if mask else 1) or (mask and places.ndim == 0):
        raise _no_positions(positions)
    return places if mask else places.long().reshape(-1)


def _no_positions(positions: Any) -> InputError:
    return InputError(
        f"positions is {positions!r}, but should be None, an int, a list of ints, a slice, a mask "
        "[pos] or [batch pos], 'prompt' or 'new'"
    )


def where(
    places: Places, tensor: Float[Tensor, "batch pos n"] | Int[Tensor, "batch pos n"]
) -> Where:
    """Where in this pass an edit acts."""
    batch, n_pos = tensor.shape[:2]
    here = torch.zeros(batch, n_pos, dtype=torch.bool, device=tensor.device)
    if places is None or isinstance(places, str):
        acts = places is None or (places == "prompt") == (n_pos > 1)
        return here.fill_(acts)[..., None]
    if n_pos == 1:
        raise InputError(
            "positions count in one pass, and this pass has a single token, like every step of "
            "generate after the prompt: leave positions out, or ask for 'prompt' or 'new'"
        )
    if isinstance(places, Tensor) and places.dtype == torch.bool:
        if tuple(places.shape) not in {(n_pos,), (batch, n_pos)}:
            raise InputError(
                f"the mask of positions has shape {tuple(places.shape)}, "
                f"but this pass has [batch pos] = {(batch, n_pos)}"
            )
        return here.logical_or(places.to(here.device))[..., None]
    if isinstance(places, Tensor) and (places.min() < -n_pos or places.max() >= n_pos):
        raise InputError(
            f"positions are {places.tolist()}, but this pass has positions 0 to {n_pos - 1}"
        )
    here[:, places if isinstance(places, slice) else places.to(here.device)] = True
    if not here.any():
        raise InputError(f"positions {places} are none of the {n_pos} of this pass")
    return here[..., None]
