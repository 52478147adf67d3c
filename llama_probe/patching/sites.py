"""Where a patch can act: the sites, and the cells that a sweep over them has.

A cell is one patch: a layer and, as asked for, one position and one unit (a head, an expert, a
neuron) of the site's tensor; what is not asked for is patched as a whole.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_probe.errors import InputError, near
from llama_probe.hooks import act_name
from llama_probe.model.llama import Llama

# Site: what its units are, if it has any.
SITES: dict[str, str | None] = {
    "resid_pre": None,
    "resid_mid": None,
    "resid_post": None,
    "attn_out": None,
    "mlp_out": None,
    "shared_out": None,
    "z": "head",
    "q": "head",
    "k": "head",
    "v": "head",
    "rot_q": "head",
    "rot_k": "head",
    "pattern": "head",
    "post": "neuron",
    "shared_post": "neuron",
    "router_logits": "expert",
    "expert_out": "expert",
}
Positions = Sequence[int] | Mapping[str, int | Sequence[int]] | None


@dataclass(frozen=True)
class Site:
    """A site of one model.

    Attributes:
        name: The word after `hook_`.
        unit: "head", "expert", "neuron" or None.
        n_units: How many of them a layer has; 1 for None.
        layers: The layers that have this site.
    """

    name: str
    unit: str | None
    n_units: int
    layers: list[int]

    def hook(self, layer: int) -> str:
        """The full name of the hook."""
        return act_name(self.name, layer)

    @property
    def default(self) -> tuple[str, ...]:
        """The axes of a sweep where none are named."""
        return ("layer", "head") if self.unit == "head" else ("layer", "pos")

    @property
    def needs_indices(self) -> bool:
        """Whether the site's units are the experts that a token chose, in the order chosen."""
        return self.name == "expert_out"

    def by_position(self, tensor: Tensor) -> Tensor:
        """The tensor as [row pos …]; a pattern [row head query key] with its query as position."""
        return tensor.transpose(1, 2) if self.name == "pattern" else tensor


def site_of(model: Llama, at: str) -> Site:
    """The site of that name.

    Raises:
        InputError: There is none, or this model has none.
    """
    if at not in SITES:
        raise InputError(f"at is {at!r}, but should be one of {', '.join(SITES)}{near(at, SITES)}")
    layers = [i for i in range(model.cfg.n_layers) if act_name(at, i) in model.hook_dict]
    if not layers:
        kind = "a mixture of experts" if model.cfg.moe is None else "that kind of layer"
        raise InputError(
            f"at is {at!r}, but {model.cfg.model_name} is not {kind}: it has no such hook"
        )
    return Site(at, SITES[at], _n_units(model, at), layers)


def _n_units(model: Llama, at: str) -> int:
    cfg = model.cfg
    if SITES[at] == "head":
        return cfg.n_key_value_heads if at in ("k", "v", "rot_k") else cfg.n_heads
    if SITES[at] == "neuron":
        return cfg.moe.d_shared if at == "shared_post" and cfg.moe else cfg.d_mlp
    return cfg.moe.n_experts if SITES[at] == "expert" and cfg.moe else 1


class Cells(NamedTuple):
    """The patches of a sweep, ordered by layer.

    Attributes:
        frame: What each is called, a column for each axis of the sweep.
        layer: Its layer.
        pos: Its position in each prompt, padding counted; None: all positions.
        unit: Its unit; None: all units.
    """

    frame: pd.DataFrame
    layer: Int[Tensor, " cell"]
    pos: Int[Tensor, "cell prompt"] | None
    unit: Int[Tensor, " cell"] | None

    def __len__(self) -> int:
        return len(self.layer)

    def part(self, chosen: slice | Tensor) -> "Cells":
        """Some of the cells, by their indices; the frame stays that of the whole sweep."""
        return Cells(
            self.frame,
            self.layer[chosen],
            None if self.pos is None else self.pos[chosen],
            None if self.unit is None else self.unit[chosen],
        )


def cells_of(
    site: Site,
    over: Sequence[str] | str | None,
    real: Bool[Tensor, "prompt pos"],
    *,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    units: Iterable[int] | None = None,
) -> Cells:
    """All cells of a sweep; positions and units choose among those that it goes over.

    Raises:
        InputError: An axis, a layer, a position or a unit that is not there.
    """
    axes = _axes(site, over)
    lists: dict[str, list[Any]] = {
        "layer": _among(site.layers, layers, f"layers with {site.name}", len(site.layers))
    }
    places = _places(real, positions) if "pos" in axes else {}
    if "pos" in axes:
        lists["pos"] = list(places)
    if site.unit is not None and site.unit in axes:
        lists[site.unit] = _among(range(site.n_units), units, f"{site.unit}s", site.n_units)
    frame = pd.DataFrame(list(product(*lists.values())), columns=list(lists))
    device = real.device
    layer = torch.tensor(frame["layer"].to_numpy(), device=device)
    pos = torch.stack([places[name] for name in frame["pos"]]) if "pos" in lists else None
    unit = torch.tensor(frame[site.unit].to_numpy(), device=device) if site.unit in lists else None
    return Cells(frame, layer, pos, unit)


def sites_of(
    model: Llama,
    at: str | Sequence[str],
    over: Sequence[str] | str | None,
    positions: Positions = None,
    units: Iterable[int] | None = None,
) -> list[Site]:
    """The sites of those names; what is chosen among has to be an axis of some sweep over them.

    Raises:
        InputError: There is no such site, or positions or units are given, but no sweep goes over
            them.
    """
    sites = [site_of(model, name) for name in ([at] if isinstance(at, str) else at)]
    axes = {name for site in sites for name in _axes(site, over)}
    if positions is not None and "pos" not in axes:
        raise InputError("positions are given, but 'pos' is not in over")
    if units is not None and not axes - {"layer", "pos"}:
        of_sites = ", ".join(sorted({repr(site.unit) for site in sites if site.unit})) or "a unit"
        raise InputError(f"units are given, but {of_sites} is not in over")
    return sites


def _axes(site: Site, over: Sequence[str] | str | None) -> tuple[str, ...]:
    axes = site.default if over is None else (over,) if isinstance(over, str) else tuple(over)
    allowed = ("layer", "pos") if site.unit is None else ("layer", "pos", site.unit)
    if "layer" not in axes or not set(axes) <= set(allowed) or len(set(axes)) < len(axes):
        raise InputError(
            f"over is {axes}, but {site.name} is patched over 'layer' and any of {allowed[1:]}"
        )
    return axes


def _among(there: Iterable[int], wanted: Iterable[int] | None, what: str, n: int) -> list[int]:
    there = list(there)
    if wanted is None:
        return there
    chosen = [wanted] if isinstance(wanted, int) else list(wanted)
    if not chosen or not set(chosen) <= set(there):
        raise InputError(f"{chosen} are not among the {n} {what}: {there[0]} to {there[-1]}")
    return sorted(set(chosen))


def _places(real: Bool[Tensor, "prompt pos"], positions: Positions) -> dict[Any, Tensor]:
    """For each position's name, where it stands in every prompt, padding counted.

    Prompts of one length count from 0. Others count from their ends, where they agree: -1 is the
    last token.
    """
    n_prompts, n_pos = real.shape
    lengths = real.sum(dim=1)
    begins = n_pos - lengths
    if isinstance(positions, Mapping):
        return {
            name: begins + _within(torch.as_tensor(at, device=real.device), lengths, str(name))
            for name, at in positions.items()
        }
    if bool((lengths == lengths[0]).all()):
        names = _among(range(int(lengths[0])), positions, "positions", int(lengths[0]))
        return {name: begins + name for name in names}
    names = _among(range(-n_pos, 0), positions, "positions, counted from the end,", n_pos)
    return {name: torch.full_like(begins, n_pos + name) for name in names}


def _within(at: Tensor, lengths: Tensor, name: str) -> Tensor:
    """Positions [prompt] of one name, negative ones counted from the end."""
    if at.ndim > 1 or (at.ndim == 1 and len(at) != len(lengths)):
        raise InputError(
            f"position {name!r} has {len(at)} places, but there are {len(lengths)} prompts"
        )
    at = at.expand(len(lengths))
    if ((at >= lengths) | (at < -lengths)).any():
        raise InputError(
            f"position {name!r} is {at.tolist()}, but the prompts have {lengths.tolist()} tokens"
        )
    return torch.where(at < 0, at + lengths, at)
