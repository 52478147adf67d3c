"""Directions that are nobody's: what any direction of this length does to this model.

Ablation takes from the stream what all of it has in common, too. Some models keep a huge constant
in a few places (Sun et al. 2024, arXiv 2402.17762), and one that loses a part of it breaks,
whatever the direction stands for. So random directions may be asked to have as much of it as the
one that they are held against, no more.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from llama_probe.errors import InputError
from llama_probe.interventions import vector_of


def random_directions(
    like: Float[Tensor, " d"], n: int, seed: int = 0, *, common: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "n d"]:
    """Directions of the same length, uniform over the sphere (isotropic).

    Args:
        like: A direction.
        n: How many.
        seed: Of the draw.
        common: The mean of the stream. If it is given, all draws have as much of it as `like` has,
            and are uniform otherwise.

    Returns:
        In float64, on the CPU.

    Raises:
        InputError: `n` is negative.

    >>> random_directions(torch.tensor([3.0, 4.0]), 2).norm(dim=1)
    tensor([5., 5.], dtype=torch.float64)
    >>> random_directions(torch.tensor([3.0, 4.0]), 2, common=torch.tensor([2.0, 0.0]))[:, 0]
    tensor([3., 3.], dtype=torch.float64)
    """
    return _alike(_normal(n, len(like), seed), like, common)


def matched_directions(
    like: Float[Tensor, " d"],
    activations: Float[Tensor, "sample d"],
    n: int,
    seed: int = 0,
    *,
    common: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "n d"]:
    """Directions of the same length, drawn with the covariance of activations.

    A residual stream varies in few directions far more than in all others; an isotropic draw hardly
    meets those. This one does, in the proportion in which the activations do.

    Args:
        like: A direction.
        activations: What varies.
        n: How many.
        seed: Of the draw.
        common: See `random_directions`.

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
    return _alike(drawn, like, common)


def _normal(n: int, size: int, seed: int) -> Float[Tensor, "n size"]:
    if n < 0:
        raise InputError(f"there cannot be {n} random directions: ask for 0 or more")
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _alike(
    drawn: Float[Tensor, "n d"], like: Float[Tensor, " d"], common: Float[Tensor, " d"] | None
) -> Float[Tensor, "n d"]:
    """Draws as long as a direction, and with as much as it has of what is common."""
    vector = vector_of(like)
    if common is None:
        return drawn / drawn.norm(dim=1, keepdim=True) * vector.norm()
    unit = normalize(vector_of(common), dim=0)
    along = (vector @ unit) * unit
    across = drawn - (drawn @ unit)[:, None] * unit
    return along + across / across.norm(dim=1, keepdim=True) * (vector - along).norm()
