"""Three parts of the requests: one to fit, one to select, one to report on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llama_probe.errors import InputError

PARTS = ("fit", "select", "report")


def three_parts(
    n: int,
    shares: Sequence[float],
    seed: int,
    groups: Sequence[object] | None = None,
) -> dict[str, Int[np.ndarray, " _"]]:
    """Rows of each part, drawn at random; rows of one group stay together.

    Args:
        n: Number of rows.
        shares: Of fit, select and report; they sum to 1.
        seed: Of the draw.
        groups: For each row what it belongs to; rows of one group go to the same part, and the
            shares count groups.

    Raises:
        InputError: The shares cannot be used, or a part would be empty.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"splits is {tuple(shares)}, but should be three shares that sum to 1")
    if groups is not None:
        return _by_group(list(map(str, groups)), shares, seed)
    order = np.random.default_rng(seed).permutation(n)
    return _checked(np.split(order, _cuts(n, shares)), "requests", n)


def _by_group(
    groups: list[str], shares: Sequence[float], seed: int
) -> dict[str, Int[np.ndarray, " _"]]:
    names = np.unique(groups)
    order = np.random.default_rng(seed).permutation(names)
    parts = np.split(order, _cuts(len(names), shares))
    rows = [np.flatnonzero(np.isin(groups, part)) for part in parts]
    return _checked(rows, "groups", len(names))


def _cuts(n: int, shares: Sequence[float]) -> list[int]:
    return [round(n * shares[0]), round(n * (shares[0] + shares[1]))]


def _checked(
    parts: Sequence[Int[np.ndarray, " _"]], what: str, n: int
) -> dict[str, Int[np.ndarray, " _"]]:
    if any(len(part) < 2 for part in parts):
        raise InputError(
            f"{n} {what} are too few for three parts (fit, select, report) of at least 2 rows each"
        )
    return {name: np.sort(part) for name, part in zip(PARTS, parts, strict=True)}
