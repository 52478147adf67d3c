"""Several data sets side by side: the same hooks, positions and classes, and who is in both."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from llama_probe.errors import InputError
from llama_probe.probing.data import Source, source
from llama_probe.probing.design import Samples
from llama_probe.probing.labels import coded
from llama_probe.probing.templates import ProbeWarning, share_templates


class DataSet(NamedTuple):
    """Activations, and of each row its label and what it belongs to."""

    name: str
    source: Source
    labels: Shaped[np.ndarray, " row"]
    groups: Shaped[np.ndarray, " row"]

    @property
    def positions(self) -> list[str]:
        """The positions that it has, as they were asked for."""
        return self.source.ats


def data_sets(sets: Mapping[str, Sequence[Any]], hooks: Any) -> list[DataSet]:
    """Data sets by name, each (activations, labels) or with groups, checked against each other.

    Raises:
        InputError: One cannot be used, or they differ in hooks or positions.
    """
    found = []
    for name, given in sets.items():
        if not isinstance(given, tuple | list) or len(given) not in (2, 3):
            raise InputError(f"{name}: give (activations, labels) or (activations, labels, groups)")
        acts, labels, *groups = given
        try:
            one = source(acts, hooks)
            one.check_finite()
            rows = one.per_row(labels, "labels")
            found.append(
                DataSet(name, one, rows, _groups(name, one, groups[0] if groups else None))
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if not found:
        raise InputError("there are no data sets: give some by name")
    first = found[0]
    for other in found[1:]:
        for what, mine, its in (
            ("hooks", first.source.hooks, other.source.hooks),
            ("positions", first.positions, other.positions),
        ):
            if set(mine) != set(its):
                raise InputError(
                    f"{first.name} and {other.name} differ in their {what} ({', '.join(mine[:3])}; "
                    f"{', '.join(its[:3])}): capture both alike, or choose hooks"
                )
    return found


def _groups(name: str, one: Source, groups: Any) -> np.ndarray:
    """What each row belongs to: its group, or its text, or its prompt in this set."""
    if groups is not None:
        return one.per_row(groups, "groups").astype(object)
    prompts = one.index["prompt"]
    if not one.has_texts:
        return np.array([f"{name} {prompt}" for prompt in prompts], dtype=object)
    texts = one.prompts["text"].iloc[prompts].to_numpy(dtype=object)
    if share_templates(pd.unique(texts).tolist()):
        warnings.warn(
            f"{name}: its prompts share templates and have no groups, so a probe may be tested on "
            "what it saw in another form: give groups, such as the names in them",
            ProbeWarning,
            stacklevel=5,
        )
    return texts


def samples_of(given: Sequence[DataSet], at: str) -> list[Samples]:
    """The rows of one position in each set, with codes that mean the same in all.

    Raises:
        InputError: The sets differ in classes, or a group is missing.
    """
    rows = [(one, one.source.rows(at)) for one in given]
    labels = coded(np.concatenate([one.labels[some] for one, some in rows]))
    units = pd.factorize(np.concatenate([one.groups[some] for one, some in rows]))[0]
    if (units < 0).any():
        raise InputError("a group is missing: give one for each prompt")
    parts = np.split(np.arange(len(labels)), np.cumsum([len(some) for _, some in rows])[:-1])
    for one, here in zip(given, parts, strict=True):
        for code, name in enumerate(labels.classes or ()):
            if not (labels.values[here] == code).any():
                raise InputError(
                    f"{one.name} has no label {name!r}, which other sets have: all sets should "
                    "have the same classes"
                )
    return [Samples(labels[here], units[here]) for here in parts]


def features_of(given: Sequence[DataSet], hook: str, at: str) -> list[Float[np.ndarray, "_n d"]]:
    """A hook's activations at one position, of each set.

    Raises:
        InputError: They differ in dimensions.
    """
    found = [one.source.features(hook, at) for one in given]
    sizes = {one.name: x.shape[1] for one, x in zip(given, found, strict=True)}
    if len(set(sizes.values())) > 1:
        raise InputError(f"activations of {hook or 'the arrays'} differ in size: {sizes}")
    return found
