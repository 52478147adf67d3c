"""A direction in activation space, such as the difference of two classes' means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.capturing import Activations
from llama_probe.errors import CheckpointError, InputError, near
from llama_probe.probing.data import Source, layer_of, source
from llama_probe.probing.labels import coded
from llama_probe.probing.linear import LinearProbe
from llama_probe.probing.saved import read_folder, write_folder


@dataclass(frozen=True)
class Direction:
    """A vector at a place in a model.

    Attributes:
        vector: [d] in float64; its length is that of what it was made from.
        hook: The full name of the hook; empty: unknown.
        layer: Its block; -1 outside of them.
        position: Where in the prompt, as `acts.index["at"]` says it; empty: unknown.
        record: How it was made, as JSON values.
    """

    vector: Float[Tensor, " d"] = field(repr=False)
    hook: str
    layer: int
    position: str
    record: dict[str, Any] = field(repr=False)

    @property
    def norm(self) -> float:
        """The vector's length."""
        return self.vector.norm().item()

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The vector at length 1."""
        return self.vector / self.vector.norm()

    def save(self, folder: str | Path) -> Path:
        """Write the direction as safetensors and JSON; `load` reads it.

        Args:
            folder: New, empty, or one with a saved direction, which is replaced.

        Raises:
            InputError: The folder holds something else.
            OutputError: It cannot be written to.
        """
        record = {name: getattr(self, name) for name in _TYPES}
        return write_folder(folder, "Direction", {"vector": self.vector}, record)

    @classmethod
    def load(cls, folder: str | Path) -> "Direction":
        """The direction that `save` wrote.

        Raises:
            CheckpointError: The folder is missing or damaged, or holds something else.
        """
        tensors, record = read_folder(folder, "Direction")
        vector = tensors.get("vector")
        if vector is None or vector.ndim != 1 or not vector.isfinite().all():
            raise CheckpointError(f"{folder} is damaged: it holds no finite vector")
        for name, kind in _TYPES.items():
            if not isinstance(record.get(name), kind):
                raise CheckpointError(f"{folder} is damaged: its {name} cannot be used")
        return cls(vector.double(), **{name: record[name] for name in _TYPES})


_TYPES = {"hook": str, "layer": int, "position": str, "record": dict}


def contrast_direction(
    acts: Any, labels: Any, *, hook: str | None = None, at: str | None = None
) -> Direction:
    """The difference of two classes' mean activations, the second less the first.

    Also known as difference-in-means or mass-mean direction (Marks and Tegmark 2023, arXiv
    2310.06824; Arditi et al. 2024, arXiv 2406.11717).

    Args:
        acts: What `lp.probe` takes: `Activations`, a store's path, a dict of arrays by hook, or an
            array [n d].
        labels: A column of the prompts, or a label for each prompt (or row); two classes, which
            are sorted: the direction points to True, 1, or the later text.
        hook: Whose activations; None: the only ones there.
        at: At which position, as `acts.index["at"]` says it; None: the only one there.

    Returns:
        The direction in float64, features flattened.

    Raises:
        InputError: A hook, a position or labels cannot be used, or an activation is not finite.

    >>> x = np.array([[1.0, 0.0], [1.0, 2.0], [4.0, 1.0]])
    >>> contrast_direction(x, [False, False, True]).vector.tolist()
    [3.0, 0.0]
    """
    found = source(acts)
    hook, at = only("hook", hook, found.hooks), only("at", at, found.index["at"].unique().tolist())
    rows = found.rows(at)
    y = coded(found.per_row(labels, "labels")[rows], "classes")
    if not y.two:
        raise InputError(
            f"a contrast needs two classes, but the labels have {len(y.classes or ())}"
        )
    x = _finite(found, hook, at)
    means = [x[y.values == code].mean(axis=0) for code in (0, 1)]
    record: dict[str, Any] = {
        "method": "difference of class means",
        "classes": [str(name) for name in y.classes or ()],
        "n": np.bincount(y.values).tolist(),
    }
    if isinstance(acts, Activations):
        keys = ("model", "model_hash", "template", "system", "prompts_hash", "dtype")
        record |= {key: acts.record[key] for key in keys}
    return Direction(torch.from_numpy(means[1] - means[0]), hook, layer_of(hook), at, record)


def direction_similarity(
    directions: Mapping[str, Direction | LinearProbe],
    acts: Any = None,
    *,
    hook: str | None = None,
    at: str | None = None,
) -> pd.DataFrame:
    """How much directions, and the weights of probes, point the same way.

    Cosines depend on the coordinates. In a residual stream a few dimensions vary far more than the
    rest, and two directions may be parallel for that reason alone; and the weight of a probe may be
    far from the difference of means that it detects, as it avoids what else varies along that.
    Activations give a cosine that does not depend on them: with S their covariance, in coordinates
    in which it is the identity, a direction v becomes S^(-1/2) v, and a probe's weight w, which
    reads, becomes S^(1/2) w. There a difference of means v and the linear discriminant S^-1 v are
    one.

    Args:
        directions: By name; probes with one row of weights.
        acts: Activations, as for `contrast_direction`, that say what varies; None: plain cosines.
        hook: Whose activations; None: the only ones there.
        at: At which position; None: the only one there.

    Returns:
        One row for each ordered pair: `a`, `b`, `cosine`, `whitened` (missing without `acts`; with
        Ledoit and Wolf's (2004) estimate of the covariance).

    Raises:
        InputError: They differ in dimensions, one is 0, or a probe has several rows of weights.

    >>> x = np.array([[1.0, 0.0], [1.0, 2.0], [4.0, 1.0]])
    >>> d = contrast_direction(x, [0, 0, 1])
    >>> direction_similarity({"one": d, "other": d}).cosine.round(3).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    vectors = {name: _vector(name, one) for name, one in directions.items()}
    if not vectors:
        raise InputError("there are no directions to compare")
    if len({len(vector) for vector in vectors.values()}) > 1:
        sizes = {name: len(vector) for name, vector in vectors.items()}
        raise InputError(f"directions of one size are needed, but there are {sizes}")
    plain = _cosines(np.array(list(vectors.values())))
    whitened = np.full_like(plain, np.nan)
    if acts is not None:
        found = source(acts)
        hook = only("hook", hook, found.hooks)
        at = only("at", at, found.index["at"].unique().tolist())
        x = _finite(found, hook, at)
        if x.shape[1] != len(next(iter(vectors.values()))):
            raise InputError(f"the activations have {x.shape[1]} dimensions, the directions others")
        root, inverse = _roots(x)
        reads = [isinstance(one, LinearProbe) for one in directions.values()]
        moved = [
            (root if read else inverse) @ vector
            for vector, read in zip(vectors.values(), reads, strict=True)
        ]
        whitened = _cosines(np.array(moved))
    names = list(vectors)
    return pd.DataFrame(
        {
            "a": np.repeat(names, len(names)),
            "b": names * len(names),
            "cosine": plain.ravel(),
            "whitened": whitened.ravel(),
        }
    )


def only(what: str, asked: str | None, there: Any) -> str:
    """The one that is asked for, or the only one that there is.

    Raises:
        InputError: It is not there, or there are several to choose from.
    """
    names = list(map(str, there))
    if asked is None and len(names) == 1:
        return names[0]
    if asked in names:
        return str(asked)
    some = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    if asked is None:
        raise InputError(f"there are {len(names)} to choose from ({some}): say which with {what}=")
    raise InputError(f"{what} is {asked!r}, but there are {some}{near(asked, names)}")


def _finite(found: Source, hook: str, at: str) -> Float[np.ndarray, "n d"]:
    x = found.features(hook, at)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise InputError(f"{hook or 'the array'}: row {bad[0]} of position {at!r} is not finite")
    return x


def _vector(name: str, one: Direction | LinearProbe) -> Float[np.ndarray, " d"]:
    weights = one.weight if isinstance(one, LinearProbe) else one.vector[None]
    if len(weights) != 1:
        raise InputError(f"{name!r} has {len(weights)} rows of weights, but a direction is one")
    vector = weights[0].double().cpu().numpy()
    if not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"{name!r} is 0 or not finite, and has no direction")
    return vector


def _cosines(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units @ units.T


def _roots(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "2 d d"]:
    """The square root of the covariance, and its inverse."""
    from sklearn.covariance import ledoit_wolf

    variances, axes = np.linalg.eigh(ledoit_wolf(x)[0])
    if variances[0] <= variances[-1] * len(variances) * np.finfo(float).eps:
        raise InputError(
            f"the covariance of {len(x)} activations in {len(variances)} dimensions cannot be "
            "inverted: give more of them"
        )
    deviations = np.sqrt(variances)
    return np.stack([(axes * deviations) @ axes.T, (axes / deviations) @ axes.T])
