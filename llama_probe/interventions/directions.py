"""Edits along directions of the residual stream: take out, add, re-centre, put in place.

Ablation and addition are two terms of one affine edit (Marshall, Scherlis and Belrose 2024, arXiv
2411.09003), and one function does all three: x - fraction * (the part of x along the direction) +
a shift. It works in float32 at least and gives back the tensor's own precision.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, act_name
from llama_probe.interventions.edit import Edit, Pair
from llama_probe.interventions.positions import Places, places_of, where
from llama_probe.interventions.vectors import HasVector as HasVector
from llama_probe.interventions.vectors import along, span_of, vector_of

Stream = Float[Tensor, "batch pos d"]

# Where the residual stream is read by a block and written to (Arditi et al. 2024).
SITES = ("resid_pre", "attn_out", "mlp_out")


def ablate(
    direction: Any,
    *,
    at: str | Sequence[str] = SITES,
    layers: Any = None,
    fraction: int | float = 1.0,
    positions: Any = None,
) -> Edit:
    """Directional ablation (Arditi et al. 2024, arXiv 2406.11717): take out what lies along it.

    x becomes x - fraction * (x · r) r with r the unit vector, or loses that fraction of its part in
    a subspace. At the three published sites of all layers nothing that a block reads or writes
    keeps a component; `refusal.orthogonalised` does the same to the weights.

    A fraction in between acts at each site anew, so what a layer has written is diminished again by
    every block that follows. `at=("hook_embed", "attn_out", "mlp_out")` takes it from each write
    once; there the stream keeps 1 - fraction of what is written to it.

    Args:
        direction: A tensor [d], or [k d] for a subspace; or what has one as its `vector`, such as
            `lp.Direction`. Its length does not matter, and a vector of 0 changes nothing.
        at: Sites by the short names of `act_name`, in each of the layers; or hooks by their full
            names or globs.
        layers: The layers of sites by short names; None: all.
        fraction: How much is taken out: 1 all, 0 nothing, 2 a reflection.
        positions: The tokens that are edited; see the module.

    Raises:
        InputError: An argument is not as described; when run, a site has another width.
        HookNameError: When run, there is no such site or layer.

    >>> ablate([0.0, 3.0], fraction=0.5)
    ablate([0.0, 3.0], fraction=0.5)
    """
    span = span_of(direction)
    nothing = span.new_zeros(span.shape[1])
    move = _move(span, _finite(fraction, "fraction"), nothing, positions)
    said = _said(
        "ablate",
        direction,
        at=None if at == SITES else at,
        layers=layers,
        fraction=None if fraction == 1 else fraction,
        positions=positions,
    )
    return Edit([(name, move) for name in _names(at, layers)], [said])


def add(
    direction: Any, scale: int | float = 1.0, *, at: str | None = None, positions: Any = None
) -> Edit:
    """Activation addition (Turner et al. 2023, arXiv 2308.10248): x + scale * the vector as it is.

    As Arditi et al. (2024) use it, at the input of the block that the direction is from, and there
    alone; a scale of 1 induces, of -1 takes away. At block l this is what a bias on the
    down-projection of block l - 1 does.

    Args:
        direction: A tensor [d], or what has one as its `vector`; its length matters.
        scale: What it is multiplied by.
        at: The full name of a hook, or a glob; None: the direction's own `hook`.
        positions: The tokens that are edited; see the module.

    Raises:
        InputError: An argument is not as described, or it is not said where; when run, the hook
            has another width.
        HookNameError: When run, there is no such hook.

    >>> add([0.0, 3.0], -1, at="blocks.2.hook_resid_pre")
    add([0.0, 3.0], -1, at='blocks.2.hook_resid_pre')
    """
    vector = _single(direction, "add takes one vector [d]")
    nothing = vector.new_zeros(0, len(vector))
    move = _move(nothing, 0.0, _finite(scale, "scale") * vector, positions)
    said = _said("add", direction, scale, at=at, positions=positions)
    return Edit([(_place(at, direction, "add"), move)], [said])


def affine(
    direction: Any,
    reference: Any,
    *,
    scale: int | float = 0.0,
    at: str | None = None,
    positions: Any = None,
) -> Edit:
    """Affine concept editing (Marshall, Scherlis and Belrose 2024, arXiv 2411.09003).

    x becomes x - proj(x) + proj(reference) + scale * r: its component along the direction is set to
    the reference's, plus `scale` lengths of r. With the mean of harmless prompts for a reference
    and r the difference of means from there to harmful ones, a scale of 0 sets the harmless level
    and 1 the harmful one. Ablation is the case in which the reference has no component.

    A mean belongs to the hook at which it was taken, so one reference acts at one hook, and later
    layers may write the component again. To hold it down the model, give each `hook_resid_pre` its
    own mean. The layers' outputs have means of their own, which add up to the stream's: to set each
    of them to the stream's mean would count that many times over.

    Args:
        direction: As for `ablate`; with a scale, a single vector [d], whose length matters.
        reference: A mean activation [d], or what has one as its `vector`; or one for each hook:
            {name: [d]}.
        scale: How much of the vector is added.
        at: The full name of the hook of a single reference; None: the direction's own `hook`.
        positions: The tokens that are edited; see the module.

    Raises:
        InputError: An argument is not as described, or it is not said where; when run, the hook
            has another width.
        HookNameError: When run, there is no such hook.

    >>> affine([0.0, 3.0], [5.0, 1.0], scale=1, at="blocks.2.hook_resid_pre")
    affine([0.0, 3.0], [5.0, 1.0], scale=1, at='blocks.2.hook_resid_pre')
    """
    span = span_of(direction)
    if isinstance(reference, Mapping):
        if at is not None or not reference:
            raise InputError("references by hook say where: name one at least, and leave at out")
        means = dict(reference)
    else:
        means = {_place(at, direction, "affine"): reference}
    if _finite(scale, "scale"):
        shift = scale * _single(direction, "with a scale, affine takes one vector [d]")
    else:
        shift = span.new_zeros(span.shape[1])
    pairs: list[Pair] = []
    for name, mean in means.items():
        mean = _single(mean, "a reference is one mean activation [d]")
        if mean.shape != shift.shape:
            raise InputError(
                f"the reference for {name} has {len(mean)} dimensions, the direction {len(shift)}"
            )
        pairs.append((name, _move(span, 1.0, along(mean, span) + shift, positions)))
    said = _said("affine", direction, reference, scale=scale or None, at=at, positions=positions)
    return Edit(pairs, [said])


def replace(activation: Any, *, at: str, positions: Any = None) -> Edit:
    """Put an activation in the place of whatever is there.

    Args:
        activation: [d], or anything up to [batch pos d] that broadcasts to what is there.
        at: The full name of a hook [batch pos d], or a glob.
        positions: The tokens whose activations are replaced; see the module. In `generate`, what
            has a position axis goes with "prompt".

    Raises:
        InputError: An argument is not as described; when run, the activation does not broadcast to
            the hook's shape.
        HookNameError: When run, there is no such hook.

    >>> replace(torch.zeros(64), at="blocks.*.hook_mlp_out", positions="new")
    replace(<(64,)>, at='blocks.*.hook_mlp_out', positions='new')
    """
    try:
        values = activation if isinstance(activation, Tensor) else torch.tensor(activation)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"an activation is a tensor, not of type {type(activation).__name__}"
        ) from None
    if values.ndim not in (1, 2, 3) or not values.is_floating_point() or not values.numel():
        raise InputError(
            "an activation is floating-point numbers [d], [pos d] or [batch pos d], "
            f"not {values.dtype} {tuple(values.shape)}"
        )
    if not values.isfinite().all():
        raise InputError("the activation has a number that is not finite")
    # A copy: what happens to the tensor later is not to change the edit.
    kept = _Constant(values.detach().clone())
    put = partial(_put, values=kept, places=places_of(positions))
    return Edit([(at, put)], [_said("replace", activation, at=at, positions=positions)])


# What is meant


def _single(direction: Any, rule: str) -> Float[Tensor, " d"]:
    vector = vector_of(direction)
    if vector.ndim > 1:
        raise InputError(f"{rule}, but this is a subspace [k d] = {tuple(vector.shape)}")
    return vector


def _place(at: str | None, direction: Any, name: str) -> str:
    place = getattr(direction, "hook", None) if at is None else at
    if not isinstance(place, str) or not place:
        raise InputError(f"{name} needs at=, a hook's name: this direction has no hook of its own")
    return place


def _names(at: str | Sequence[str], layers: Any) -> list[str]:
    """The hooks that sites in layers are, each once."""
    sites = [at] if isinstance(at, str) else list(at)
    if layers is not None and (full := [site for site in sites if "hook_" in site]):
        raise InputError(f"layers choose among short names, but at has the full name {full[0]!r}")
    names = {
        site if "hook_" in site else act_name(site, layer): None
        for layer in _layers(layers)
        for site in sites
    }
    if not names:
        raise InputError("at or layers is empty: name a site and a layer, or leave them out")
    return list(names)


def _layers(layers: Any) -> list[int | str]:
    if layers is None:
        return ["*"]
    numbers = list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(hasattr(number, "__index__") and number >= 0 for number in numbers):
        raise InputError(f"layers is {layers!r}, but should be None, or numbers counted from 0")
    return [int(number) for number in numbers]


def _finite(number: int | float, name: str) -> float:
    if not isfinite(number):
        raise InputError(f"{name} is {number}, but should be finite")
    return float(number)


def _said(name: str, *given: Any, **options: Any) -> str:
    """The call that makes an edit."""
    shown = [_shown(one) for one in given]
    shown += [f"{key}={_shown(value)}" for key, value in options.items() if value is not None]
    return f"{name}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"<means of {len(value)} hooks>"
    shape = getattr(value, "shape", ())
    return f"<{tuple(shape)}>" if shape else repr(value)


# What happens at the hooks


class _Constant:
    """A tensor, kept where and in the precision in which passes need it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """On x's device, in float32 or in x's precision where that is higher."""
        key = (x.device, torch.promote_types(x.dtype, torch.float32))
        if key not in self._made:
            self._made[key] = self.values.to(*key)
        return self._made[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Constant, (self.values,)


def _move(
    span: Float[Tensor, "rank d"],
    fraction: float,
    shift: Float[Tensor, " d"],
    positions: Any,
) -> partial[Tensor]:
    constants = {"span": _Constant(span), "shift": _Constant(shift)}
    return partial(_moved, **constants, fraction=fraction, places=places_of(positions))


def _moved(
    x: Tensor,
    hook: HookPoint,
    *,
    span: _Constant,
    shift: _Constant,
    fraction: float,
    places: Places,
) -> Stream:
    d = shift.values.shape[0]
    if x.ndim != 3 or x.shape[-1] != d or not x.is_floating_point():
        raise InputError(
            f"a direction of {d} dimensions edits [batch pos {d}], "
            f"but {hook.name} has {x.dtype} {tuple(x.shape)}"
        )
    wide, onto = x.to(torch.promote_types(x.dtype, torch.float32)), span.like(x)
    moved = wide - fraction * along(wide, onto) + shift.like(x)
    return torch.where(where(places, x), moved.to(x.dtype), x)


def _put(x: Tensor, hook: HookPoint, *, values: _Constant, places: Places) -> Tensor:
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(
            f"an activation is put at hooks [batch pos d], but {hook.name} has "
            f"{x.dtype} {tuple(x.shape)}"
        )
    here = where(places, x)
    if not here.any():
        return x
    put = values.like(x).to(x.dtype)
    try:
        return torch.where(here, put.expand(x.shape), x)
    except RuntimeError:
        raise InputError(
            f"the activation {tuple(put.shape)} cannot stand in for the {tuple(x.shape)} "
            f"of {hook.name}"
        ) from None
