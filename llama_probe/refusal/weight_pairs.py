"""The weights of two checkpoints of one base, side by side, and sums over them in float64."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.probing.data import layer_of

# What writes into the residual stream.
_WRITERS = {
    "embed": "embedding",
    "attn.o": "attention",
    "mlp.down": "mlp",
    "mlp.experts_out": "expert",
    "mlp.shared.down": "shared expert",
}
_OTHERS = {
    "unembed": "unembedding",
    "attn.q": "query",
    "attn.k": "key",
    "attn.v": "value",
    "attn.q_norm": "query norm",
    "attn.k_norm": "key norm",
    "ln1": "norm before attention",
    "ln2": "norm before mlp",
    "ln_final": "last norm",
    "mlp.gate": "gate",
    "mlp.up": "up",
    "mlp.router": "router",
    "mlp.shared.gate": "shared gate",
    "mlp.shared.up": "shared up",
    "mlp.shared_gate": "gate of the shared expert",
}
_COLUMNS = 8192  # of a weight, taken to float64 at a time


class Weight(NamedTuple):
    """A matrix whose rows are what it puts out; a bias is one more column."""

    name: str
    layer: int
    site: str
    expert: int | None
    matrix: Float[Tensor, "out in"]
    writes: bool


def _weights(model: Llama) -> Iterator[Weight]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in parameters.items():
        if name.endswith(".bias"):
            continue
        name = name.removesuffix(".weight")
        kind, layer = re.sub(r"^blocks\.\d+\.", "", name), layer_of(name)
        if kind == "mlp.experts_in":
            for expert, both in enumerate(tensor):
                for site, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    yield Weight(f"{name}.{site}.{expert}", layer, site, expert, half, False)
        elif kind == "mlp.experts_out":
            for expert, matrix in enumerate(tensor):
                yield Weight(f"{name}.{expert}", layer, _WRITERS[kind], expert, matrix, True)
        else:
            matrix = tensor[:, None] if tensor.ndim == 1 else tensor
            matrix = matrix.T if kind == "embed" else matrix
            if (bias := parameters.get(f"{name}.bias")) is not None:
                matrix = torch.cat([matrix, bias[:, None]], dim=1)
            site = (_WRITERS | _OTHERS)[kind]
            yield Weight(name, layer, site, None, matrix, kind in _WRITERS)


def pairs(model: Llama, against: Llama) -> Iterator[tuple[Weight, Weight]]:
    """The weights of one model and those of the other, side by side.

    Raises:
        InputError: The models differ in shape.
    """
    shapes = [{w.name: tuple(w.matrix.shape) for w in _weights(one)} for one in (model, against)]
    for name in shapes[0] | shapes[1]:
        one, other = (of.get(name, "missing") for of in shapes)
        if one != other:
            raise InputError(
                f"two checkpoints of one base are compared weight by weight, but {name} is {one} "
                f"in the model and {other} in the one it is held against"
            )
    return zip(_weights(model), _weights(against), strict=True)


class Sums(NamedTuple):
    """Squared norms, and the change times its own transpose (of writers; else empty)."""

    now: float
    before: float
    energy: float
    gram: Float[Tensor, "d d"]


def sums_of(now: Weight, before: Weight) -> Sums:
    """Sums over a weight and its change.

    Raises:
        InputError: A value is not finite.
    """
    d = len(now.matrix) if now.writes else 0
    gram, sums = torch.zeros(d, d, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for one, other in zip(_chunks(now), _chunks(before), strict=True):
        moved = one - other
        sums += torch.stack([part.square().sum() for part in (one, other, moved)])
        if now.writes and moved.any():
            gram += moved @ moved.T
    if not sums.isfinite().all():
        raise InputError(f"{now.name} has a value that is not finite")
    now_squared, before_squared, energy = sums.tolist()
    return Sums(now_squared, before_squared, energy, gram)


def _chunks(weight: Weight) -> Iterator[Float[Tensor, "out some"]]:
    """Some columns at a time, in float64."""
    return (part.cpu().double() for part in weight.matrix.split(_COLUMNS, dim=1))


def energy_along(span: Float[Tensor, "rank d"], weight: Weight) -> float:
    """The squared norm of what a weight puts out along orthonormal rows."""
    return sum((span @ part).square().sum().item() for part in _chunks(weight))
