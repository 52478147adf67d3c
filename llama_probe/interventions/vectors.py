"""What a direction is: a vector, or the subspace of several, as orthonormal rows."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError

# A shorter vector is the rounding of a difference that is 0, and has no direction.
_NOTHING = 1e-8


@runtime_checkable
class HasVector(Protocol):
    """Whatever has a vector, such as `lp.Direction`."""

    @property
    def vector(self) -> Any:
        """The vector [d], or vectors [k d]."""


def vector_of(direction: Any) -> Float[Tensor, "*k d"]:
    """A direction's vector, in float64 on the CPU: a copy.

    Args:
        direction: Numbers [d], or [k d] for the subspace that its rows span; or what has them as
            its `vector`.

    Returns:
        [d] or [k d], with the length that was given.

    Raises:
        InputError: It is neither, or not finite.

    >>> vector_of([3, 4])
    tensor([3., 4.], dtype=torch.float64)
    """
    given = direction.vector if isinstance(direction, HasVector) else direction
    try:
        vector = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.double)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"a direction is a tensor [d] or [k d], or has one as its vector, "
            f"but this is of type {type(given).__name__}"
        ) from None
    if vector.ndim not in (1, 2) or not vector.numel() or vector.is_complex():
        raise InputError(
            f"a direction is real numbers [d] or [k d], not {vector.dtype} {tuple(vector.shape)}"
        )
    vector = vector.detach().to("cpu", torch.float64, copy=True)
    if not vector.isfinite().all():
        raise InputError("a direction has a number that is not finite")
    return vector


def span_of(direction: Any) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span a direction or subspace; none where it is 0.

    A vector shorter than 1e-8 counts as 0: it is what rounding leaves of the difference of two
    equal means. (The published code divides by the length plus 1e-8, to the same end.)

    Args:
        direction: As for `vector_of`; rows may depend on each other.

    Raises:
        InputError: As `vector_of`.

    >>> span_of([[0, 2, 0], [0, 5, 0]]).abs()
    tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    rows = torch.atleast_2d(vector_of(direction))
    _, lengths, units = torch.linalg.svd(rows, full_matrices=False)
    rounding = lengths[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
    return units[lengths > rounding.clamp(min=_NOTHING)]


def along(x: Float[Tensor, "*axes d"], span: Float[Tensor, "rank d"]) -> Float[Tensor, "*axes d"]:
    """The part of x in the subspace that orthonormal rows span."""
    return x @ span.T @ span
