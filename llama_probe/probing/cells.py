"""One cell: a hook at a position for a target, by each kind of probe, with its controls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llama_probe.probing.bootstrap import NONE, Interval, intervals
from llama_probe.probing.controls import DIRECTIONS, NONE_FOUND, random_directions
from llama_probe.probing.design import Part, Samples, held_out, strengths_on
from llama_probe.probing.labels import Labels
from llama_probe.probing.scores import HeldOut, Values, Weights, metrics_for, refusal
from llama_probe.probing.selection import Trial, decisive, trials

OF_TEXTS = ("n-grams", "length")


@dataclass(frozen=True)
class Plan:
    """What all hooks have in common for one target at one position.

    Attributes:
        pos: The position in the prompt; -1 if it is not the same in all, or pooled.
        prompt: Which prompt each sample is of.
        parts: The folds.
        halves: The groups in two halves, to choose the best cell on one and test it on the other.
        no_halves: Why that cannot be.
        shuffles: Labels that mean nothing.
        control: Labels of the control task.
        no_control: Why there are none.
    """

    target: str
    at: str
    pos: int
    prompt: Int[np.ndarray, " n"]
    samples: Samples
    parts: Sequence[Part]
    halves: Sequence[Part]
    no_halves: str
    shuffles: Sequence[Labels]
    control: Sequence[Labels]
    no_control: str


class Asked(NamedTuple):
    """What a call asks of every cell."""

    probes: tuple[str, ...]
    controls: tuple[str, ...]
    strength: int | float | None
    seed: int

    @property
    def of_texts(self) -> list[str]:
        """The baselines that are asked for."""
        return [kind for kind in OF_TEXTS if kind in self.controls]

    @property
    def chooses(self) -> bool:
        """Whether a strength of regularisation is to be chosen on inner folds."""
        return self.strength is None and set(self.probes) != {"mass_mean"}


class Measured(NamedTuple):
    """One metric of a cell."""

    probe: str
    kind: str
    metric: str
    interval: Interval
    n: int
    groups: int
    note: str = ""


def measured(
    probe: str, kind: str, helds: Sequence[HeldOut], names: Sequence[str], seed: int
) -> list[Measured]:
    """Some metrics of held-out scores; of several sets, as of several shuffles, their mean."""
    if not helds:
        return [Measured(probe, kind, name, NONE, 0, 0, NONE_FOUND) for name in names]
    held = helds[0]
    metrics = metrics_for(probe, held.labels)
    notes = {name: refusal(name, held.labels) for name in names}
    known = intervals(helds, {name: metrics[name] for name in names if not notes[name]}, seed)
    return [
        Measured(probe, kind, name, known.get(name, NONE), len(held), held.n_units, notes[name])
        for name in names
    ]


def cell(
    x: Float[np.ndarray, "n d"], plan: Plan, asked: Asked
) -> tuple[list[Measured], dict[str, list[Trial]]]:
    """All metrics of a cell, and by kind of probe how it does on each half."""
    found: list[Measured] = []
    tried = {}
    for probe in asked.probes:
        found += _of_probe(probe, x, plan, asked)
        if plan.halves:
            tried[probe] = trials(probe, x, plan.samples, plan.halves, asked.strength)
    if "random direction" in asked.controls:
        found += _of_directions(x, plan, asked.seed)
    return found, tried


def _of_probe(
    probe: str, x: Float[np.ndarray, "n d"], plan: Plan, asked: Asked
) -> Iterator[Measured]:
    strengths = strengths_on(probe, x, plan.samples, plan.parts, asked.strength)
    splits = [part.split for part in plan.parts]

    def scored(labels: Labels) -> HeldOut:
        return held_out(probe, x, plan.samples.relabelled(labels), splits, strengths)

    held = scored(plan.samples.labels)
    few = decisive(held.labels)
    yield from measured(probe, "probe", [held], list(metrics_for(probe, held.labels)), asked.seed)
    if "shuffled labels" in asked.controls:
        helds = [scored(labels) for labels in plan.shuffles]
        yield from measured(probe, "shuffled labels", helds, few, asked.seed)
    if "control task" in asked.controls:
        controls = [scored(labels) for labels in plan.control]
        yield from _of_control(probe, held, controls, plan.no_control, asked.seed)


def _of_control(
    probe: str, held: HeldOut, controls: Sequence[HeldOut], why_not: str, seed: int
) -> Iterator[Measured]:
    """How well labels drawn for each type of input are learnt, and by how much worse than ours."""
    name = decisive(held.labels)[0]
    metric = metrics_for(probe, held.labels)[name]

    def selectivity(control: HeldOut, weights: Weights) -> Values:
        return metric(held, weights) - metric(control, weights)

    both = {name: metric, "selectivity": selectivity}
    known = dict.fromkeys(both, NONE) if why_not else intervals(controls, both, seed)
    for name, interval in known.items():
        yield Measured(probe, "control task", name, interval, len(held), held.n_units, why_not)


def _of_directions(x: Float[np.ndarray, "n d"], plan: Plan, seed: int) -> list[Measured]:
    """The mean and the 95th percentile over random directions."""
    as_measured = partial(Measured, "", "random direction", n=len(x), groups=plan.samples.n_units)
    if not plan.samples.labels.two:
        return [as_measured("auroc", NONE, note="not applicable: a direction tells two classes")]
    found = random_directions(x, plan.samples, [part.split for part in plan.parts], seed)
    low, p95, high = (float(np.quantile(found, q)) for q in (0.025, 0.95, 0.975))
    note = f"of {DIRECTIONS} directions"
    return [
        as_measured("auroc", Interval(float(found.mean()), low, high), note=f"mean {note}"),
        as_measured("auroc_p95", Interval(p95, np.nan, np.nan), note=f"95th percentile {note}"),
    ]
