"""From what a call is given to what each cell needs: samples, folds, halves, labels at random."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int, Shaped

from llama_probe.errors import InputError
from llama_probe.probing.cells import Asked, Plan
from llama_probe.probing.controls import NONE_FOUND, control_labels, shuffled, why_no_control
from llama_probe.probing.data import Source
from llama_probe.probing.design import Part, Samples, halves, parts_of
from llama_probe.probing.fit import needs_classes
from llama_probe.probing.folds import group_codes, grouped_folds
from llama_probe.probing.labels import coded


class Wanted(NamedTuple):
    """How samples are labelled and divided."""

    labels: Any
    groups: Any
    control_by: Any
    task: str | None
    folds: int
    repeats: int


def plans(source: Source, wanted: Wanted, asked: Asked) -> list[Plan]:
    """One for each target and position.

    Raises:
        InputError: Labels, groups or `control_by` do not fit, or folds cannot be drawn.
    """
    unit = units(source, wanted.groups)
    types = _types(source, wanted.control_by)
    found = []
    for target, values in source.targets(wanted.labels).items():
        labels = coded(values, wanted.task, what=target)
        for kind in asked.probes:
            needs_classes(kind, labels, target)
        for at in source.ats:
            found.append(_plan(source, target, at, Samples(labels, unit), types, wanted, asked))
    return found


def units(source: Source, groups: Any) -> Int[np.ndarray, " row"]:
    """What each row is held out and drawn with: its group, or else its prompt.

    Raises:
        InputError: The groups are not as many, or tear a prompt apart.
    """
    prompt = source.index["prompt"].to_numpy()
    if groups is None:
        return prompt
    codes = group_codes(source.per_row(groups, "groups"), len(prompt))
    if torn := torn_prompts(prompt, codes):
        raise InputError(
            f"groups: the rows of prompt {torn[0]} are in several groups, so that it would be both "
            "trained on and tested on: give each prompt one group"
        )
    return codes


def torn_prompts(prompt: Int[np.ndarray, " n"], values: Shaped[np.ndarray, " n"]) -> list[int]:
    """The prompts whose rows do not agree.

    >>> torn_prompts(np.array([0, 0, 1]), np.array(["a", "b", "a"]))
    [0]
    """
    pairs = pd.DataFrame({"prompt": prompt, "value": values}).drop_duplicates()
    return pairs.loc[pairs["prompt"].duplicated(), "prompt"].unique().tolist()


def _types(source: Source, by: Any) -> Int[np.ndarray, " row"]:
    """Which type of input each row is, by its token unless told; -1: not known."""
    if by is None:
        tokens = source.index["token"]
        return np.where(tokens == "", -1, pd.factorize(tokens)[0])
    return group_codes(source.per_row(by, "control_by"), len(source.index))


def _plan(
    source: Source,
    target: str,
    at: str,
    everyone: Samples,
    types: Int[np.ndarray, " row"],
    wanted: Wanted,
    asked: Asked,
) -> Plan:
    rows = source.rows(at)
    samples, types = everyone[rows], types[rows]
    seed, what = asked.seed, f"{target} at {at}" if at else target
    splits = grouped_folds(samples.labels, samples.groups, wanted.folds, seed, what)
    parts = parts_of(samples, splits, seed, what) if asked.chooses else list(map(Part, splits))
    of_halves, no_halves = [], ""
    if "best cell" in asked.controls:
        try:
            of_halves = halves(everyone, rows, seed, what)
        except InputError as error:
            no_halves = f"not applicable: {error}"
    no_control = why_no_control(types, splits)
    shuffles, control = [], []
    if "shuffled labels" in asked.controls:
        shuffles = shuffled(samples, splits, wanted.repeats, seed)
    if "control task" in asked.controls and not no_control:
        control = control_labels(samples, types, splits, wanted.repeats, seed)
        no_control = "" if control else NONE_FOUND
    positions = source.index["pos"].iloc[rows].unique()
    return Plan(
        target=target,
        at=at,
        pos=int(positions[0]) if len(positions) == 1 else -1,
        prompt=source.index["prompt"].to_numpy()[rows],
        samples=samples,
        parts=parts,
        halves=of_halves,
        no_halves=no_halves,
        shuffles=shuffles,
        control=control,
        no_control=no_control,
    )
