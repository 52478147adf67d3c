"""One head's attention pattern."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.labels import axis, numbered

# More cells than this a side draw slowly, and a screen cannot show them.
MOST = 256


def attention(
    pattern: Any,
    tokens: Sequence[str],
    title: str | None = None,
    *,
    keys: Sequence[str] | None = None,
    minus: Any = None,
    at: tuple[int, int] = (0, 0),
    measure: str = "attention weight (fraction)",
) -> go.Figure:
    """Where each position looks: queries run downwards, keys to the right.

    Colours run from 0 to 1 for every head, so that heads can be compared. What a causal model
    cannot see is left empty. Above 256 tokens each cell shows the largest weight of a square of
    positions, and the title says so; a part of the pattern, cut out, is exact again.

    Args:
        pattern: The weights of one head [query, key], an array on the CPU.
        tokens: The text of each query's token.
        title: The figure's title, as plain text.
        keys: The text of each key's token; None: the same as the queries'.
        minus: Another pattern of the same size: what is shown is the difference, from -1 to 1, of
            squares the one farthest from 0.
        at: Which query and which key the first ones are, if this is a part of a pattern.
        measure: What the numbers are, for the colour bar.

    Raises:
        InputError: The pattern is not [query, key] or does not match the tokens, or its numbers are
            not from 0 to 1.

    >>> attention([[1.0, 0.0], [0.25, 0.75]], ["Hi", " you"]).data[0].z.tolist()
    [[1.0, nan], [0.25, 0.75]]
    """
    weights = _weights(pattern)
    texts = tokens, tokens if keys is None else keys
    _match(weights, *texts)
    size = math.ceil(max(weights.shape) / MOST)
    cells = without_future(weights, at)
    if minus is not None:
        other = _weights(minus)
        _match(other, *texts)
        cells = cells - other
    pooled = _farthest(cells, size)
    # A square is named after its first position.
    y, x = (
        list(range(start, start + side, size))
        for start, side in zip(at, weights.shape, strict=True)
    )
    gap = theme.gap(*pooled.shape)
    trace = go.Heatmap(
        x=x,
        y=y,
        z=pooled,
        zmin=0 if minus is None else -1,
        zmax=1,
        colorscale=theme.SEQUENTIAL if minus is None else theme.DIVERGING,
        xgap=gap,
        ygap=gap,
        colorbar={"title": {"text": measure}},
        hovertemplate=_hover(size),
    )
    layout: dict[str, Any] = {
        "template": theme.LIGHT,
        "height": theme.height(len(y)),
        "yaxis": _positions(y, "query position", texts[0], at[0], size, x=False),
        "xaxis": _positions(x, "key position", texts[1], at[1], size, x=True),
    }
    layout["yaxis"]["autorange"] = "reversed"
    return go.Figure(trace, layout | theme.heading(_title(title, size)))


def _weights(pattern: Any) -> np.ndarray:
    try:
        weights = np.asarray(pattern, dtype=np.float32)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the pattern should be a CPU array [query, key]: {error}") from error
    if weights.ndim != 2 or 0 in weights.shape:
        raise InputError(
            f"the pattern is {list(weights.shape)}, but should be one head's [query, key], "
            'as cache["pattern", layer][0, head] is'
        )
    if (weights < 0).any() or (weights > 1.001).any():
        raise InputError(
            f"the pattern's numbers run from {np.nanmin(weights):.4g} to {np.nanmax(weights):.4g}, "
            "but attention weights lie between 0 and 1 (are these scores before the softmax?)"
        )
    return weights


def _match(weights: np.ndarray, queries: Sequence[str], keys: Sequence[str]) -> None:
    if weights.shape != (len(queries), len(keys)):
        raise InputError(
            f"the pattern is {list(weights.shape)}, but there are {len(queries)} tokens for the "
            f"queries and {len(keys)} for the keys (keys=)"
        )


def without_future(weights: np.ndarray, at: tuple[int, int] = (0, 0)) -> np.ndarray:
    """NaN where a query cannot look; a weight there, which a causal model never has, stays."""
    n_query, n_key = weights.shape
    # Without a cut the last query sees the last key, whatever came before the first query.
    offset = at[0] - at[1] if any(at) else n_key - n_query
    future = ~np.tri(n_query, n_key, offset, dtype=bool)
    return np.where(future & (weights == 0), np.float32(np.nan), weights)


def _farthest(cells: np.ndarray, size: int) -> np.ndarray:
    """Of each square what is farthest from 0: a mean would wash single bright cells out."""
    pad = [(0, -side % size) for side in cells.shape]
    padded = np.pad(cells, pad, constant_values=np.nan)
    n_query, n_key = (side // size for side in padded.shape)
    squares = padded.reshape(n_query, size, n_key, size)
    high = np.fmax.reduce(np.fmax.reduce(squares, axis=3), axis=1)
    if not (cells < 0).any():
        return high
    low = np.fmin.reduce(np.fmin.reduce(squares, axis=3), axis=1)
    return np.where(-low > high, low, high)


def _positions(
    starts: list[int], title: str, texts: Sequence[str], first: int, size: int, x: bool
) -> dict[str, Any]:
    names = numbered(starts, [texts[start - first] for start in starts])
    layout = axis(starts, title, names, x=x)
    layout["dtick"] *= size
    return layout


def _hover(size: int) -> str:
    if size == 1:
        return "query %{y}<br>key %{x}<br>weight %{z:.4f}<extra></extra>"
    return (
        f"{size} queries from %{{y}}<br>{size} keys from %{{x}}"
        "<br>largest weight %{z:.4f}<extra></extra>"
    )


def _title(title: str | None, size: int) -> str | None:
    if size == 1:
        return title
    return f"{title or 'Attention'} (largest weight of each {size} × {size} positions)"
