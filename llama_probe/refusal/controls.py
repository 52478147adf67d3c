"""Directions that are nobody's: what any direction of this length does to this model."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError


def random_directions(like: Float[Tensor, " d"], n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Directions of the same length, uniform over the sphere (isotropic)."""
    drawn = torch.randn(n, len(like), generator=_generator(seed), dtype=torch.float64)
    return _of_length(drawn, like)


def matched_directions(
    like: Float[Tensor, " d"], activations: Float[Tensor, "sample d"], n: int, seed: int = 0
) -> Float[Tensor, "n d"]:
    """Directions of the same length, drawn with the covariance of activations.

    A residual stream varies in few directions far more than in all others; an isotropic draw hardly
    meets those. This one does, in the proportion in which the activations do.

    Raises:
        InputError: There are fewer than two samples, or they do not vary.
    """
    if len(activations) < 2:
        raise InputError("a covariance needs at least two samples")
    centred = activations.double() - activations.double().mean(dim=0)
    weights = torch.randn(n, len(centred), generator=_generator(seed), dtype=torch.float64)
    drawn = weights @ centred
    if not (drawn.norm(dim=1) > 0).all():
        raise InputError("the activations do not vary, so no direction can be drawn like them")
    return _of_length(drawn, like)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _of_length(drawn: Float[Tensor, "n d"], like: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    return drawn / drawn.norm(dim=1, keepdim=True) * like.double().norm()
