"""A fitted linear probe: what it takes to score an activation, and nothing else."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """A map from an activation to one score a class, or to one number.

    It works on raw activations: any standardising of the fit is folded into weight and bias.

    Attributes:
        weight: [out d] in float64; one row for two classes and for regression.
        bias: [out].
        kind: "logistic", "ridge", "mass_mean" or "leace".
        classes: The labels, sorted; with two, a score above 0 means the second. None: regression.
    """

    weight: Float[Tensor, "out d"]
    bias: Float[Tensor, " out"]
    kind: str
    classes: tuple[Any, ...] | None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n out"]:
        """The score of each activation: for a logistic probe its log-odds."""
        return x.to(self.weight) @ self.weight.T + self.bias
