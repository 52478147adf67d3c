"""A fitted linear probe: what it takes to score an activation, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import CheckpointError, InputError
from llama_probe.probing.saved import read_folder, write_folder


@dataclass(frozen=True)
class LinearProbe:
    """A map from an activation to one score a class, or to one number.

    It works on raw activations: any standardising of the fit is folded into weight and bias.

    Attributes:
        weight: [out d] in float64; one row for two classes and for regression.
        bias: [out].
        kind: "logistic", "ridge" or "mass_mean".
        classes: The labels, sorted; with two, a score above 0 means the second. None: regression.
    """

    weight: Float[Tensor, "out d"]
    bias: Float[Tensor, " out"]
    kind: str
    classes: tuple[Any, ...] | None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n out"]:
        """The score of each activation: for a logistic probe its log-odds.

        Raises:
            InputError: The activations have other dimensions.
        """
        if x.shape[1] != self.weight.shape[1]:
            raise InputError(
                f"the activations have {x.shape[1]} dimensions, but the probe was fitted on "
                f"{self.weight.shape[1]}"
            )
        return x.to(self.weight) @ self.weight.T + self.bias

    def save(self, folder: str | Path) -> Path:
        """Write the probe as safetensors and JSON; `load` reads it.

        Args:
            folder: New, empty, or one with a saved probe, which is replaced.

        Raises:
            InputError: The folder holds something else, or a class is no number, text or bool.
            OutputError: It cannot be written to.
        """
        return write_folder(folder, "LinearProbe", self.tensors(), self.record())

    @classmethod
    def load(cls, folder: str | Path) -> "LinearProbe":
        """The probe that `save` wrote.

        Raises:
            CheckpointError: The folder is missing or damaged, or holds something else.
        """
        return cls.of(*read_folder(folder, "LinearProbe"), where=str(folder))

    def tensors(self) -> dict[str, Tensor]:
        """What `of` needs beside `record`."""
        return {"weight": self.weight, "bias": self.bias}

    def record(self) -> dict[str, Any]:
        """Kind and classes as JSON values.

        Raises:
            InputError: A class is no number, text or bool.
        """
        classes = None if self.classes is None else list(map(_plain, self.classes))
        return {"probe": self.kind, "classes": classes}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], record: dict[str, Any], where: str) -> "LinearProbe":
        """A probe from its tensors and its record, checked before anything is computed with them.

        Raises:
            CheckpointError: They do not fit together.
        """
        damaged = CheckpointError(f"{where} is damaged: it holds no weights and classes of a probe")
        try:
            weight, bias = tensors["weight"], tensors["bias"]
            kind, classes = record["probe"], record["classes"]
        except KeyError:
            raise damaged from None
        if not isinstance(kind, str) or not isinstance(classes, list | None):
            raise damaged
        n_out = bias.numel() if classes is None else len(classes) if len(classes) > 2 else 1
        if weight.ndim != 2 or weight.shape[0] != n_out or bias.shape != (n_out,):
            raise damaged
        if weight.dtype != torch.float64 or not (weight.isfinite().all() and bias.isfinite().all()):
            raise damaged
        return cls(weight, bias.double(), kind, None if classes is None else tuple(classes))


def _plain(label: Any) -> Any:
    """A label as a JSON value: numpy's numbers become Python's."""
    plain = label.item() if hasattr(label, "item") else label
    if not isinstance(plain, str | int | float | bool):
        raise InputError(
            f"the class {label!r} is a {type(label).__name__}: a saved probe's classes are texts, "
            "numbers or bools"
        )
    return plain
