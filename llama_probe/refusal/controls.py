"""Directions that are nobody's: what any direction of this length does to this model."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.interventions import vector_of


def random_directions(like: Float[Tensor, " d"], n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Directions of the same length, uniform over the sphere (isotropic).

    Args:
        like: A direction.
        n: How many.
        seed: Of the draw.

    Returns:
        In float64, on the CPU.

    Raises:
        InputError: `n` is negative.

    >>> random_directions(torch.tensor([3.0, 4.0]), 2).norm(dim=1)
    tensor([5., 5.], dtype=torch.float64)
    """
    return _of_length(_normal(n, len(like), seed), like)


def matched_directions(
    like: Float[Tensor, " d"], activations: Float[Tensor, "sample d"], n: int, seed: int = 0
) -> Float[Tensor, "n d"]:
    """Directions of the same length, drawn with the covariance of activations.

    A residual stream varies in few directions far more than in all others; an isotropic draw hardly
    meets those. This one does, in the proportion in which the activations do.

    Args:
        like: A direction.
        activations: What varies.
        n: How many.
        seed: Of the draw.

    Returns:
        In float64, on the CPU.

    Raises:
        InputError: `n` is negative, there are fewer than two samples, or they do not vary.
    """
    if len(activations) < 2:
        raise InputError("a covariance needs at least two samples")
    samples = activations.detach().cpu().double()
    drawn = _normal(n, len(samples), seed) @ (samples - samples.mean(dim=0))
    if not (drawn.norm(dim=1) > 0).all():
        raise InputError("the activations do not vary, so no direction can be drawn like them")
    return _of_length(drawn, like)


def _normal(n: int, size: int, seed: int) -> Float[Tensor, "n size"]:
    if n < 0:
        raise InputError(f"there cannot be {n} random directions: ask for 0 or more")
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _of_length(drawn: Float[Tensor, "n d"], like: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    return drawn / drawn.norm(dim=1, keepdim=True) * vector_of(like).norm()
