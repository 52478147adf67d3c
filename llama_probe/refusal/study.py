"""What was found: the direction, what it does, and everything that it was chosen from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.interventions import Edit
from llama_probe.probing import Direction
from llama_probe.refusal.asking import Asked
from llama_probe.refusal.candidates import Candidates
from llama_probe.refusal.effects import edits_along
from llama_probe.refusal.guard import Guard

_CHANGES = ["edit", "set", "metric", "change", "direction", "random_mean", "random_95", "draws"]


@dataclass(frozen=True)
class RefusalStudy:
    """What `find_refusal_direction` found; stands for its direction wherever one is taken.

    Attributes:
        direction: The direction, or None where the model does not refuse or no candidate passes.
        verdict: The outcome in a sentence or two.
        guard: Whether the model refuses; see `guard`.
        tokens: The token ids that begin its refusals; empty where it does not refuse.
        candidates: One row a candidate: `position layer refusal_score steering_score kl_div_score
            norm`, `dropped` (the first reason, by the published rule), `chosen`. From the
            selecting part.
        survivors: The candidates that pass, best first, with the `rule` that they pass; of
            `nearest` that one.
        effects: What the direction does, and what random ones do, on the reporting part: the
            columns of `effects`, and `direction` ("refusal", "random", "matched random") with
            `draw`, the number of a random one and -1 for the refusal direction. Random ones have as
            much of the stream's mean as that has (`random_directions`); they are ablated on
            restricted and added on harmless requests.
        answers: The answers behind `effects`, of the direction and of the plain model.
        random_kl: What ablating each of some isotropic directions costs on harmless requests of
            the selecting part; they have nothing of the stream's mean.
        means: The mean activations of the fitting part, for every position and layer.
        asked: The requests of each part, by set: `study.asked["report"]["restricted"]`.
        record: Arguments, counts and shares, as JSON values.
    """

    direction: Direction | None
    verdict: str
    guard: Guard = field(repr=False)
    tokens: tuple[int, ...] = ()
    candidates: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    survivors: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    effects: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    answers: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    random_kl: tuple[float, ...] = field(default=(), repr=False)
    means: Candidates | None = field(default=None, repr=False)
    asked: Mapping[str, Mapping[str, Asked]] = field(default_factory=dict, repr=False)
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def vector(self) -> Tensor:
        """The direction's vector, so that `lp.ablate(study)` works.

        Raises:
            InputError: There is no direction; the sentence is the verdict.
        """
        return self._found().vector

    @property
    def hook(self) -> str:
        """The direction's hook, so that `lp.add(study)` works.

        Raises:
            InputError: As `vector`.
        """
        return self._found().hook

    @property
    def reference(self) -> Tensor:
        """The mean of harmless requests where the direction lies: what `lp.affine` re-centres at.

        Raises:
            InputError: As `vector`.
        """
        direction = self._found()
        return self._means().reference(int(direction.position), direction.layer)

    @property
    def common(self) -> Tensor:
        """The stream's mean where the direction lies; see `random_directions`.

        Raises:
            InputError: As `reference`.
        """
        layer = self._found().layer
        return self._means().common_of(layer)

    @property
    def edits(self) -> dict[str, Edit]:
        """What is done along the direction, by name; see `edits_along`.

        Raises:
            InputError: As `vector`.
        """
        return edits_along(self._found(), self.reference)

    def _found(self) -> Direction:
        if self.direction is None:
            raise InputError(f"there is no refusal direction to use: {self.verdict}")
        return self.direction

    def _means(self) -> Candidates:
        if self.means is None:
            raise InputError("this study holds no means")
        return self.means


def random_changes(effects: pd.DataFrame) -> pd.DataFrame:
    """What random directions changed, beside the refusal direction.

    Args:
        effects: Of a `RefusalStudy`.

    Returns:
        One row per `edit set metric`: the refusal direction's `change`, and for each kind of random
        direction the mean, the 95th percentile of its absolute change, and the number of draws.
        No rows where no random directions were drawn.

    Raises:
        InputError: The frame is of a study without a direction.
    """
    if effects.empty:
        raise InputError("there are no effects: this study has no direction")
    own = effects[effects["direction"] == "refusal"].set_index(["edit", "set", "metric"])
    rows = []
    drawn = effects[effects["direction"] != "refusal"]
    for place, found in drawn.groupby(["edit", "set", "metric", "direction"], sort=False):
        edit, name, metric, kind = cast("tuple[str, str, str, str]", place)
        changes = np.array(found["change"], dtype=float)
        rows.append(
            {
                "edit": edit,
                "set": name,
                "metric": metric,
                "change": own.loc[(edit, name, metric), "change"],
                "direction": kind,
                "random_mean": float(changes.mean()),
                "random_95": float(np.quantile(np.abs(changes), 0.95)),
                "draws": len(found),
            }
        )
    return pd.DataFrame(rows, columns=_CHANGES)
