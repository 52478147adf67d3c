"""Mean and covariance of data that does not fit into memory, from one pass over it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors, in float64; two of them join with `+`.

    The update is that of Chan, Golub and LeVeque (1979), which does not lose digits where the mean
    is large beside the spread, as it is in a residual stream.

    Attributes:
        n: How many vectors.
        mean: [d].
        scatter: [d d], the sum of outer products of deviations from the mean.

    >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0]])
    >>> both = Moments.of(x[:1]) + Moments.of(x[1:])
    >>> both.n, bool(torch.allclose(both.covariance.float(), x.T.cov()))
    (3, True)
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, x: Float[Tensor, "n d"]) -> "Moments":
        """The moments of vectors [n d], n at least 1."""
        precise = x.double()
        mean = precise.mean(dim=0)
        deviations = precise - mean
        return cls(len(x), mean, deviations.T @ deviations)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        n = self.n + other.n
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        return Moments(
            n,
            self.mean + step * (other.n / n),
            scatter + torch.outer(step, step) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance.

        Raises:
            InputError: There is only one vector.
        """
        if self.n < 2:
            raise InputError("a covariance needs two vectors or more, not one")
        return self.scatter / (self.n - 1)
