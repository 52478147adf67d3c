"""The hooks that read routing: they reduce what passes to a few numbers for each token."""

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama_probe.hooks import HookPoint, act_name, reads_only
from llama_probe.lens.common import wide
from llama_probe.model.config import MoeConfig


class _Update(NamedTuple):
    """What the experts of a layer write for the tokens of a batch."""

    experts: Float[Tensor, "token k d_model"]
    shared: Float[Tensor, "token d_model"] | None = None


class Recorder:
    """Hooks that reduce what passes to a few numbers for each token that is no padding."""

    real: Bool[Tensor, "batch pos"]

    def __init__(
        self, moe: MoeConfig, layers: tuple[int, ...], contributions: bool, logits: bool
    ) -> None:
        self.moe, self.layers, self.contributions = moe, layers, contributions
        names = ["experts", "weights", "entropy", "margin"]
        names += ["logits"] * logits + ["norm_share", "signed_share"] * contributions
        self.kept = {name: {layer: [] for layer in layers} for name in names}
        self.update = _Update(torch.empty(0, 0, 0))

    def hooks(self) -> list[tuple[list[str], Any]]:
        """Pairs of names and functions, for `model.hooks`."""
        words = {
            "router_logits": self._logits,
            "expert_indices": self._indices,
            "expert_weights": self._weights,
        }
        if self.contributions:
            words["expert_out"] = self._expert_out
            if self.moe.d_shared:
                words["shared_out"] = self._shared_out
            words["mlp_out"] = self._mlp_out
        return [
            ([act_name(word, layer) for layer in self.layers], reads_only(_plain(function)))
            for word, function in words.items()
        ]

    def all(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Each quantity's name and, for each layer, its values [token …] in the batches' order."""
        for name, kept in self.kept.items():
            yield name, [np.concatenate(kept[layer]) for layer in self.layers]

    def _keep(self, name: str, layer: int, values: Tensor) -> None:
        self.kept[name][layer].append(values.numpy(force=True))

    def _logits(self, logits: Tensor, hook: HookPoint) -> None:
        logits, layer = wide(logits[self.real]), hook.layer()
        if self.moe.rule == "softmax":
            scores = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            scores = scores / scores.sum(dim=-1, keepdim=True)
        # With one expert there is nothing to be unsure of, and the second score is 0.
        most = log(self.moe.n_experts) or 1.0
        self._keep("entropy", layer, torch.special.entr(scores).sum(dim=-1) / most)
        top = scores.topk(min(2, self.moe.n_experts), dim=-1).values
        self._keep("margin", layer, top[:, 0] - top[:, 1:].sum(dim=-1))
        if "logits" in self.kept:
            self._keep("logits", layer, logits)

    def _indices(self, indices: Tensor, hook: HookPoint) -> None:
        self._keep("experts", hook.layer(), indices[self.real].int())

    def _weights(self, weights: Tensor, hook: HookPoint) -> None:
        self._keep("weights", hook.layer(), wide(weights[self.real]))

    def _expert_out(self, out: Tensor, hook: HookPoint) -> None:
        self.update = _Update(wide(out[self.real]))

    def _shared_out(self, out: Tensor, hook: HookPoint) -> None:
        self.update = self.update._replace(shared=wide(out[self.real]))

    def _mlp_out(self, out: Tensor, hook: HookPoint) -> None:
        parts, shared = self.update
        if shared is not None:
            parts = torch.cat((parts, shared[:, None]), dim=1)
        whole = wide(out[self.real])[:, :, None]
        size = whole.norm(dim=1)
        self._keep("norm_share", hook.layer(), parts.norm(dim=-1) / size)
        self._keep("signed_share", hook.layer(), (parts @ whole)[..., 0] / size**2)


def _plain(method: Any) -> Any:
    """A method as a function, which can be marked."""

    def function(tensor: Tensor, hook: HookPoint) -> None:
        method(tensor, hook)

    return function
