"""Candidates for the refusal direction, and the three scores by which one is chosen.

Arditi et al. 2024 (arXiv 2406.11717): at every token of the chat template that follows the
instruction, and before every block, the difference of the mean residual streams of restricted and
harmless requests. Each is scored by what it does: how far refusal falls when it is removed, how far
it rises when it is added to harmless requests, and what removing it costs on those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe.capturing import Activations, capture
from llama_probe.hooks import act_name
from llama_probe.interventions import ablate, add
from llama_probe.model.llama import Llama
from llama_probe.probing import Direction
from llama_probe.refusal.asking import Asked, next_logits
from llama_probe.refusal.score import mean_kl, refusal_score


@dataclass(frozen=True)
class Candidates:
    """Differences of means at every position and layer.

    Attributes:
        positions: Negative, from the end of the prompt.
        restricted: Mean activations [position layer d] in float64.
        harmless: Likewise.
        common: Mean activations of harmless requests over all of their tokens [layer d].
        n: How many requests the means are of: restricted, harmless.
    """

    positions: tuple[int, ...]
    restricted: Float[np.ndarray, "position layer d"]
    harmless: Float[np.ndarray, "position layer d"]
    common: Float[np.ndarray, "layer d"]
    n: tuple[int, int]

    def direction(self, position: int, layer: int) -> Direction:
        """The candidate of one place."""
        row = self.positions.index(position)
        vector = self.restricted[row, layer] - self.harmless[row, layer]
        record = {
            "method": "difference of class means",
            "classes": ["harmless", "restricted"],
            "n": {"restricted": self.n[0], "harmless": self.n[1]},
        }
        hook = act_name("resid_pre", layer)
        return Direction(torch.from_numpy(vector), hook, layer, str(position), record)

    def reference(self, position: int, layer: int) -> Float[Tensor, " d"]:
        """The mean of harmless requests at one place: what the affine edit re-centres at."""
        return torch.from_numpy(self.harmless[self.positions.index(position), layer].copy())

    def common_of(self, layer: int) -> Float[Tensor, " d"]:
        """The stream's mean before one block; see `random_directions`."""
        return torch.from_numpy(self.common[layer].copy())


def template_positions(*asked: Asked) -> tuple[int, ...]:
    """The tokens of the chat template that follow every instruction, counted from the end.

    Without a template (raw texts) that is the last token alone.
    """
    tail = min(one.prompt - one.instruction for some in asked for one in some.encoded)
    return tuple(range(-max(tail, 1), 0))


def read(
    model: Llama,
    asked: Asked,
    positions: Sequence[Any],
    *,
    pool: str | None = None,
    progress: bool = False,
) -> Activations:
    """The stream before every block, at some positions of each request."""
    return capture(
        model,
        asked.prompts,
        hooks="blocks.*.hook_resid_pre",
        positions=list(positions),
        pool=pool,
        template=asked.template,
        system=asked.system,
        progress=progress,
    )


def find_candidates(
    model: Llama,
    restricted: Asked,
    harmless: Asked,
    positions: Sequence[int],
    *,
    progress: bool = False,
) -> Candidates:
    """The candidate of every position and layer, from requests of the fitting part."""
    means = []
    for asked in (restricted, harmless):
        acts = read(model, asked, positions, progress=progress)
        at = acts.index["at"].to_numpy()
        of_layer = [
            acts[act_name("resid_pre", i)].double().numpy() for i in range(model.cfg.n_layers)
        ]
        means.append(
            np.stack([[x[at == str(p)].mean(axis=0) for x in of_layer] for p in positions])
        )
    every = read(model, harmless, ["all"], pool="mean", progress=progress)
    common = np.stack(
        [
            every[act_name("resid_pre", i)].double().numpy().mean(axis=0)
            for i in range(model.cfg.n_layers)
        ]
    )
    n = len(restricted), len(harmless)
    return Candidates(tuple(positions), means[0], means[1], common, n)


def score_candidates(
    model: Llama,
    candidates: Candidates,
    restricted: Asked,
    harmless: Asked,
    tokens: Sequence[int],
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """The three published scores of every candidate, on requests of the selecting part.

    Args:
        model: The model.
        candidates: From other requests.
        restricted: Requests that the model declines.
        harmless: Requests that it answers.
        tokens: How its refusals begin; see `refusal_tokens`.
        progress: Show a bar.

    Returns:
        One row per candidate: `position layer refusal_score steering_score kl_div_score`, and
        `norm`. The first is the mean score of restricted requests when the direction is ablated,
        the second that of harmless ones when it is added before its block, the third the mean KL
        divergence on harmless ones (nats) when it is ablated. `attrs` have both scores without an
        edit.
    """
    plain = next_logits(model, harmless)
    places = [(p, layer) for p in candidates.positions for layer in range(model.cfg.n_layers)]
    rows = []
    for position, layer in tqdm(places, "candidates", unit="direction", disable=not progress):
        direction = candidates.direction(position, layer)
        removed = ablate(direction)
        bypass = refusal_score(next_logits(model, restricted, removed), tokens)
        induced = refusal_score(next_logits(model, harmless, add(direction)), tokens)
        cost = mean_kl(plain, next_logits(model, harmless, removed))
        rows.append(
            {
                "position": position,
                "layer": layer,
                "refusal_score": bypass.mean().item(),
                "steering_score": induced.mean().item(),
                "kl_div_score": cost.mean().item(),
                "norm": direction.norm,
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs = {
        "restricted_score": refusal_score(next_logits(model, restricted), tokens).mean().item(),
        "harmless_score": refusal_score(plain, tokens).mean().item(),
    }
    return frame
