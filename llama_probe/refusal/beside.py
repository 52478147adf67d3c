"""The direction's effects with those of random directions beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from llama_probe.interventions import ablate, add
from llama_probe.interventions.vectors import along
from llama_probe.model.llama import Llama
from llama_probe.probing import Direction
from llama_probe.refusal.asking import Asked, next_logits
from llama_probe.refusal.candidates import Candidates, read
from llama_probe.refusal.controls import matched_directions, random_directions
from llama_probe.refusal.effects import edits_along, effects
from llama_probe.refusal.judges import Judge
from llama_probe.refusal.score import mean_kl


@dataclass(frozen=True)
class Beside:
    """What random directions in the same place do."""

    model: Llama
    means: Candidates
    asked: Mapping[str, Mapping[str, Asked]]
    tokens: Sequence[int]
    n: int
    seed: int
    progress: bool

    def directions(self, direction: Direction) -> dict[str, Tensor]:
        """Both kinds, [n d] each, with as much as the direction has of the stream's mean."""
        acts = read(self.model, self.asked["fit"]["harmless"], [int(direction.position)])
        options = {"seed": self.seed, "common": self.means.common_of(direction.layer)}
        vector, n = direction.vector, self.n
        return {
            "random": random_directions(vector, n, **options),
            "matched random": matched_directions(vector, acts[direction.hook], n, **options),
        }

    def kl(self) -> tuple[float, ...]:
        """What ablating isotropic ones costs on harmless requests of the selecting part.

        They have nothing of the stream's mean: its share would say what breaking the model costs.
        """
        harmless = self.asked["select"]["harmless"]
        plain = next_logits(self.model, harmless)
        # What is taken out does not depend on a direction's length.
        drawn = random_directions(torch.ones(self.model.cfg.d_model), self.n, self.seed)
        common = normalize(torch.from_numpy(self.means.common), dim=1).mean(dim=0, keepdim=True)
        drawn = drawn - along(drawn, normalize(common, dim=1))
        bar = tqdm(drawn, "random directions", unit="direction", disable=not self.progress)
        return tuple(
            mean_kl(plain, next_logits(self.model, harmless, ablate(one))).mean().item()
            for one in bar
        )

    def effects(
        self, direction: Direction, judges: Mapping[str, Judge], max_new_tokens: int
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The direction's effects on the reporting part, and those of each random one."""
        reference = self.means.reference(int(direction.position), direction.layer)
        edits = edits_along(direction, reference)
        options: dict[str, Any] = {
            "judge": next(iter(judges.values())),
            "max_new_tokens": max_new_tokens,
            "progress": self.progress,
        }
        report = self.asked["report"]
        own, answers = effects(self.model, report, edits, self.tokens, **options)
        tables = [own.assign(direction="refusal", draw=-1)]
        drawn = self.directions(direction) if self.n else {}
        # A random direction is removed where that should lower refusal, and added where it should
        # raise it: those two are what the direction is held against.
        for edit, name in (("ablation", "restricted"), ("addition", "harmless")):
            for kind, vectors in drawn.items():
                tried = {
                    str(i): ablate(v) if edit == "ablation" else add(v, at=direction.hook)
                    for i, v in enumerate(vectors)
                }
                frame, _ = effects(self.model, {name: report[name]}, tried, self.tokens, **options)
                frame = frame[frame["edit"] != "none"]
                tables.append(
                    frame.assign(direction=kind, draw=frame["edit"].astype(int), edit=edit)
                )
        return pd.concat(tables, ignore_index=True), answers
