"""What changed between two checkpoints of one base, and whether it bears the mark of an edit.

Orthogonalising against a direction r (Arditi et al. 2024, arXiv 2406.11717, appendix E) replaces
every weight W that writes into the residual stream by W - r r^T W. So the change dW of each of them
has one output direction, and it is the same one in all: r. Training changes weights along
directions that differ from layer to layer; that of a low-rank adapter is of low rank too, but its
output directions are not r.
"""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.interventions.vectors import span_of
from llama_probe.model.llama import Llama
from llama_probe.refusal.weight_pairs import Sums, energy_along, pairs, sums_of

_COMMON = 0.9  # of the energy of all changes: more is one direction
_REMOVED = 1e-2  # of what a weight wrote along it: less is removed (bfloat16 leaves about 3e-3)
_DRAWS = 20


@torch.no_grad()
def weight_changes(model: Llama, against: Llama, direction: Any) -> pd.DataFrame:
    """How much each weight changed, and how much of the change lies along a direction.

    Orthogonalisation shows as a share of 1 and `writes` of 0 in every weight that writes into the
    residual stream (Arditi et al. 2024, arXiv 2406.11717, appendix E). An edit with a direction of
    its own for each layer shows as a `rank1_share` of 1. For these weights it takes time in d_model
    squared times their width.

    Args:
        model: The checkpoint to look at.
        against: What it came from, of the same shape; a tied unembedding counts as one of its own.
        direction: A tensor [d], a subspace [k d], or what has such a `.vector`.

    Returns:
        One row for each weight, biases joined to theirs, with sums in float64. `weight`, `layer`
        (-1: outside of them), `site`, `expert` (missing where there is none), `change` (the
        Frobenius norm of the change over that of the weight in `against`). For the sites
        "embedding", "attention", "mlp", "expert" and "shared expert", else missing: `share` (of the
        change's energy that lies along the direction; an unrelated change has about k / d_model),
        `writes` and `writes_against` (the norm of what the weight writes along the direction over
        its whole norm), `rank1_share` (of the change's energy in its largest singular value).
        `note` says why a share is missing.

    Raises:
        InputError: The models differ in shape, a weight is not finite, or the direction has other
            dimensions.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = weight_changes(model, model, torch.ones(16))
    >>> frame.change.max(), frame.note.unique().tolist()
    (np.float64(0.0), ['unchanged'])
    """
    span = _span(direction, against.cfg.d_model)
    rows = []
    for now, before in pairs(model, against):
        found = sums_of(now, before)
        row = {"weight": now.name, "layer": now.layer, "site": now.site, "expert": now.expert}
        row["change"] = _root(found.energy, found.before)
        if now.writes:
            along = torch.trace(span @ found.gram @ span.T).item()
            row["share"] = _over(along, found.energy)
            row["writes"] = _root(energy_along(span, now), found.now)
            row["writes_against"] = _root(energy_along(span, before), found.before)
            row["rank1_share"] = _over(_top(found), found.energy)
        rows.append(row | {"note": "" if found.energy else "unchanged"})
    columns = ["weight", "layer", "site", "expert", "change", "share", "writes"]
    columns += ["writes_against", "rank1_share", "note"]
    return pd.DataFrame(rows, columns=columns).astype({"expert": "Int64"})


@dataclass(frozen=True)
class Mark:
    """Whether the weights that write into the residual stream were changed along one direction.

    Attributes:
        share: Of the energy of all their changes, what lies along the direction; NaN: no change.
        expected: The same where each weight's change has output directions of its own: the mean of
            20 draws, in which the largest singular direction of each is turned at random and its
            other energy is spread evenly.
        direction: [d] in float64, of length 1, its sign unknown (the largest entry is positive);
            None: no change.
        removed: How many of the weights were changed to write less than 1 % of what they wrote
            along it.
        changed: How many were changed at all.
        writers: How many there are.
        verdict: A sentence.
    """

    share: float
    expected: float
    direction: Float[Tensor, " d"] | None = field(repr=False)
    removed: int
    changed: int
    writers: int
    verdict: str


@torch.no_grad()
def mark_of_editing(model: Llama, against: Llama, *, seed: int = 0) -> Mark:
    """Whether one direction, which need not be known, was removed from the weights.

    The direction is the one that most of the changes' energy lies along: the first left singular
    vector of the changes of all weights that write into the residual stream, side by side. The
    verdict follows a rule: "a single direction was removed from all writers" if more than 90 % of
    the energy lies along it and every writer puts out less than 1 % of what it did along it; "a
    single direction was removed from k of n writers" if only some do (an edit may leave the
    embedding out); "the changes share one direction, but no writer lost it"; "no common
    direction"; or "no writer was changed".

    Args:
        model: The checkpoint to look at.
        against: What it came from, of the same shape.
        seed: Of the draws for `expected`.

    Returns:
        The direction, its share, and the verdict; see `Mark`.

    Raises:
        InputError: The models differ in shape, or a weight is not finite.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> mark_of_editing(model, model).verdict
    'no writer was changed'
    """
    d = against.cfg.d_model
    total = torch.zeros(d, d, dtype=torch.float64)
    energies, tops = [], []
    for now, before in pairs(model, against):
        if now.writes:
            found = sums_of(now, before)
            total += found.gram
            energies.append(found.energy)
            tops.append(_top(found))
    energy, changed = sum(energies), sum(map(bool, energies))
    if not changed:
        nan = float("nan")
        return Mark(nan, nan, None, 0, 0, len(energies), "no writer was changed")
    values, vectors = torch.linalg.eigh(total)
    direction = vectors[:, -1]
    direction = direction * direction[direction.abs().argmax()].sign()
    gone = [
        energy_along(direction[None], now) <= _REMOVED**2 * energy_along(direction[None], before)
        for now, before in pairs(model, against)
        if now.writes
    ]
    removed = sum(lost and bool(moved) for lost, moved in zip(gone, energies, strict=True))
    share = values[-1].item() / energy
    verdict = "no common direction"
    if share > _COMMON:
        verdict = "the changes share one direction, but no writer lost it"
        if removed:
            of = "all" if all(gone) else f"{removed} of {len(gone)}"
            verdict = f"a single direction was removed from {of} writers"
    expected = _expected(torch.tensor(energies), torch.tensor(tops), d, seed)
    return Mark(share, expected, direction, removed, changed, len(gone), verdict)


def _expected(energies: Float[Tensor, " n"], tops: Float[Tensor, " n"], d: int, seed: int) -> float:
    """The share of a common direction where each change has directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    rest = ((energies - tops) / (d - 1)).double()
    scale = (tops - rest).clamp(min=0).sqrt()[:, None]
    largest = []
    for _ in range(_DRAWS):
        units = torch.randn(len(tops), d, generator=generator, dtype=torch.float64)
        units = units / units.norm(dim=1, keepdim=True)
        largest.append(torch.linalg.matrix_norm(scale * units, ord=2).item() ** 2)
    return (sum(largest) / _DRAWS + rest.sum().item()) / energies.sum().item()


def _top(found: Sums) -> float:
    """The square of the change's largest singular value."""
    return torch.linalg.eigvalsh(found.gram)[-1].item() if found.energy else 0.0


def _over(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _root(part: float, whole: float) -> float:
    return _over(part, whole) ** 0.5


def _span(direction: Any, d: int) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span the direction or the subspace."""
    span = span_of(direction)
    if span.shape[1] != d:
        raise InputError(
            f"the direction has {span.shape[1]} dimensions, but the residual stream has {d}"
        )
    if not len(span):
        raise InputError("the direction is 0, so that nothing lies along it")
    return span
