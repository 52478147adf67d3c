"""What was measured, as one tidy frame."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from llama_probe.probing.bootstrap import NONE
from llama_probe.probing.cells import Measured, Plan, measured
from llama_probe.probing.data import layer_of
from llama_probe.probing.selection import Trial, best, decisive, winners

COLUMNS = [
    *("hook", "layer", "at", "pos", "target", "probe", "kind"),
    *("metric", "value", "ci_low", "ci_high", "n", "groups", "cells", "note"),
]


@dataclass(frozen=True)
class Place:
    """Where activations were taken; the empty place of what does not rest on any."""

    hook: str = ""
    at: str = ""
    pos: int = -1

    def __str__(self) -> str:
        return " at ".join(part for part in (self.hook, self.at) if part) or "the array"


@dataclass(frozen=True)
class Result:
    """One hook at one position for one target."""

    place: Place
    plan: Plan
    measured: Sequence[Measured]
    trials: dict[str, list[Trial]]


def row(place: Place, target: str, cells: int, found: Measured) -> dict[str, object]:
    """A row of the frame."""
    value, low, high = found.interval
    return {
        **{"hook": place.hook, "layer": layer_of(place.hook), "at": place.at, "pos": place.pos},
        **{"target": target, "probe": found.probe, "kind": found.kind, "metric": found.metric},
        **{"value": value, "ci_low": low, "ci_high": high, "n": found.n, "groups": found.groups},
        **{"cells": cells, "note": found.note},
    }


def best_cells(results: Sequence[Result], seed: int) -> Iterator[tuple[Place, Measured]]:
    """The best cell of a target: as it looks, and chosen on one half and tested on the other."""
    for metric in decisive(results[0].plan.samples.labels):
        naive = [
            (result.place, one)
            for result in results
            for one in result.measured
            if one.kind == "probe" and one.metric == metric
        ]
        place, one = naive[best([one.interval.value for _, one in naive])]
        yield place, one._replace(kind="best cell")
        yield _corrected(results, metric, seed)


def _corrected(results: Sequence[Result], metric: str, seed: int) -> tuple[Place, Measured]:
    kind = "best cell, corrected"
    impossible = [result.plan.no_halves for result in results if result.plan.no_halves]
    if impossible:
        return Place(), Measured("", kind, metric, NONE, 0, 0, impossible[0])
    candidates = [
        (result.place, probe, trials)
        for result in results
        for probe, trials in result.trials.items()
    ]
    chosen, held = winners([trials for _, _, trials in candidates], metric)
    (place, probe, _), (other, other_probe, _) = (candidates[which] for which in chosen)
    note = f"chosen on one half: {probe} of {place}; on the other: {other_probe} of {other}"
    if chosen[0] != chosen[1]:
        place, probe = Place(), ""
    # The metrics to choose by are the same for all kinds of probes.
    found = measured("mass_mean", kind, [held], [metric], seed)[0]
    return place, found._replace(probe=probe, note=note)


def frame(rows: Sequence[dict[str, object]], **attrs: int | str | bool) -> pd.DataFrame:
    """The rows as a frame, with how it was made."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.attrs.update(attrs)
    return table
