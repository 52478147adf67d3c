"""What a probe says of each sample that it did not see, on the folds of `lp.probe`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama_probe.errors import InputError
from llama_probe.plots.probing_frames import places_of, site_of
from llama_probe.probing.cells import Asked, Plan
from llama_probe.probing.data import layer_of, source
from llama_probe.probing.design import held_out, strengths_on
from llama_probe.probing.fit import check_kind, check_strength
from llama_probe.probing.labels import Labels
from llama_probe.probing.planning import Wanted, plans
from llama_probe.probing.scores import metrics_for
from llama_probe.probing.selection import decisive
from llama_probe.probing.templates import share_templates


class Samples:
    """One target's samples and folds, for scores of each kind of probe at each hook.

    Args:
        acts: These and the others as for `lp.probe`.
        labels: Of one target.
        probes: Kinds of probes.

    Attributes:
        source: The activations by hook.
        target: What the labels are called.
        probes: The kinds of probes.

    Raises:
        InputError: As `lp.probe`; or there are several targets.
    """

    def __init__(
        self,
        acts: Any,
        labels: Any,
        *,
        groups: Any,
        probes: str | Sequence[str],
        hooks: Any,
        task: str | None,
        folds: int,
        strength: int | float | None,
        texts: Sequence[str] | None,
        seed: int,
    ) -> None:
        self.probes = (probes,) if isinstance(probes, str) else tuple(dict.fromkeys(probes))
        if not self.probes:
            raise InputError("probe is empty, but should name at least one kind of probe")
        for kind in self.probes:
            check_kind(kind)
        check_strength(strength)
        self.source = source(acts, hooks, texts)
        self._asked = Asked(self.probes, (), strength, seed)
        found = plans(self.source, Wanted(labels, groups, None, task, folds, 1), self._asked)
        targets = list(dict.fromkeys(plan.target for plan in found))
        if len(targets) > 1:
            raise InputError(f"a dashboard shows one target, but there are {', '.join(targets)}")
        self.target = targets[0]
        self._plans: dict[str, Plan] = {plan.at: plan for plan in found}
        self.source.check_finite()
        self._leaks = groups is None

    @property
    def ats(self) -> list[str]:
        """The positions, as they were asked for."""
        return list(self._plans)

    def ats_in_order(self) -> list[str]:
        """The same as a grid has them: numbers by size."""
        by_number = all(at.lstrip("-").isdigit() for at in self.ats)
        return sorted(self.ats, key=int) if by_number else self.ats

    def hooks_of(self, site: str) -> dict[int, str]:
        """The hooks of a site, and those outside of blocks, by their place on the curve."""
        own = [hook for hook in self.source.hooks if _site(hook) in (site, "")]
        layers = [layer_of(hook) for hook in own]
        table = pd.DataFrame({"hook": own, "layer": layers, "kind": "probe"})
        return {place: hook for hook, place in places_of(table).of.items()}

    def layer_names(self, site: str) -> list[str]:
        """What the places on the curve are called."""
        hooks = self.hooks_of(site)
        names = [f"layer {place} (not captured)" for place in range(max(hooks) + 1)]
        for place in sorted(hooks):
            if place >= 0:
                hook = hooks[place]
                names[place] = f"layer {place}" if layer_of(hook) >= 0 else hook or "the array"
        return names

    def choices(self, controls: str | Sequence[str] | None) -> dict[str, list[str]]:
        """What can be shown, first what is shown at first."""
        labels = self.labels(self.ats[0])
        names = list(metrics_for("logistic", labels))
        if controls == "all" or "control task" in (controls or ()):
            names.append("selectivity")
        usual = decisive(labels)[-1]
        return {
            "probe": list(self.probes),
            "metric": sorted(names, key=lambda name: name != usual),
            "at": self.ats[::-1],  # the last is mostly what one wants to know
            "site": list(dict.fromkeys(filter(None, map(_site, self.source.hooks)))) or [""],
        }

    def labels(self, at: str) -> Labels:
        """The labels of a position's samples."""
        return self._plans[at].samples.labels

    def may_leak(self) -> bool:
        """Whether texts share templates and nothing keeps those together that do."""
        used = self.source.index["prompt"].unique()
        return (
            self._leaks
            and self.source.has_texts
            and share_templates(self.source.prompts["text"].iloc[used].tolist())
        )

    def frame(self, at: str) -> pd.DataFrame:
        """A position's samples: `label`, `text` and `task`, as `plots.probe_scores` takes them."""
        labels, index = self.labels(at), self.source.index.iloc[self.source.rows(at)]
        names = labels.values if labels.classes is None else np.array(labels.classes, dtype=object)
        if labels.classes is not None:
            names = names[labels.values]
        task = "number" if labels.classes is None else "classes"
        return pd.DataFrame({"label": names, "text": self._texts(index), "task": task})

    def _texts(self, index: pd.DataFrame) -> list[str]:
        if not self.source.has_texts:
            return [f"row {row}" for row in index.index]
        found = self.source.prompts["text"].iloc[index["prompt"]].tolist()
        if not index["prompt"].duplicated().any():
            return found
        pairs = zip(found, index["pos"], index["token"], strict=True)
        return [f"{pos}: {token!r} of {text}" for text, pos, token in pairs]

    def scores(self, hook: str, at: str, probe: str) -> Float[np.ndarray, "2 n"]:
        """The score of each sample, and its margin: how far it is on the right side.

        The score is for the second of two classes; of more, the same as the margin, which is that
        of the sample's class less the best other one; for numbers the prediction, whose margin is
        less the distance to the truth.
        """
        from threadpoolctl import threadpool_limits

        plan, x = self._plans[at], self.source.features(hook, at)
        splits = [part.split for part in plan.parts]
        with threadpool_limits(1):
            strengths = strengths_on(probe, x, plan.samples, plan.parts, self._asked.strength)
            held = held_out(probe, x, plan.samples, splits, strengths)
        # Each sample is tested in one fold.
        order = np.argsort(np.concatenate([split.test for split in splits]))
        return _with_margin(held.scores[order], plan.samples.labels)


def _site(hook: str) -> str:
    """A hook's name without its layer; empty outside of blocks."""
    return site_of(hook, True) if layer_of(hook) >= 0 else ""


def _with_margin(scores: Float[np.ndarray, "n out"], labels: Labels) -> Float[np.ndarray, "2 n"]:
    first, true = scores[:, 0], labels.values
    if labels.classes is None:
        return np.stack([first, -np.abs(first - true)])
    if labels.two:
        return np.stack([first, np.where(true == 1, first, -first)])
    own = np.eye(scores.shape[1], dtype=bool)[true]
    margin = scores[own] - np.where(own, -np.inf, scores).max(axis=1)
    return np.stack([margin, margin])
