"""Token text that can be seen and cannot do anything: for axes, cells and hovers.

plotly reads a small HTML in every text (`<b>`, `&amp;`), TeX between dollar signs, and `%{...}` in
templates; a token may hold any of these.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

_SEEN = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "%": "&#37;"}
_NOTHING = "∅"

_MOST_X, _MOST_Y = 64, 40


def visible(text: Any) -> str:
    r"""A token's text with its blanks and control characters made visible.

    Args:
        text: The text; a missing value is shown as an empty one is, as a CSV file does not tell the
            two apart.

    >>> visible(" Mary\n"), visible(""), visible("\x1b")
    ('·Mary↵', '∅', '\\x1b')
    """
    if not isinstance(text, str):
        text = "" if pd.isna(text) else str(text)
    shown = (_SEEN.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
    return "".join(shown) or _NOTHING


def clip(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis: at most so many characters.

    >>> clip("attention", 6)
    'atten…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def escape(text: str) -> str:
    """Text that plotly shows as it is.

    >>> escape("<b> 5%{x}")
    '&lt;b&gt; 5&#37;{x}'
    """
    return "".join(_ESCAPED.get(c, c) for c in text)


def token(text: Any, most: int = 16) -> str:
    """A token's text for plotly: visible, clipped, escaped.

    >>> token(" <b>")
    '·&lt;b&gt;'
    """
    return escape(clip(visible(text), most))


def numbered(positions: Sequence[int], texts: Sequence[Any]) -> dict[int, str]:
    """Labels of positions, which stay different where the tokens are the same.

    >>> numbered([0, 1], ["the", " the"])
    {0: '0: the', 1: '1: ·the'}
    """
    return {pos: f"{pos}: {token(text)}" for pos, text in zip(positions, texts, strict=True)}


def _step(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50 … that is not below."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return next(step for step in steps if step >= least)


def axis(positions: Sequence[int], title: str, names: dict[int, str], x: bool) -> dict[str, Any]:
    """The layout of an axis of whole numbers, some of which have names.

    The names are aliases rather than tick texts: plotly then shows them on hovers too, also those
    of ticks left out for want of room.

    Args:
        positions: Where the cells lie, ascending.
        title: The axis' title, as plain text.
        names: What to write at a position, ready for plotly; the others keep their number.
        x: Whether it is the horizontal axis; else the vertical one.
    """
    most = _MOST_X if x else _MOST_Y
    layout: dict[str, Any] = {
        "title": {"text": escape(title)},
        "tick0": positions[0],
        "dtick": _step(len(positions) / most),
        "exponentformat": "none",
        "labelalias": {str(pos): name for pos, name in names.items()},
    }
    # Level labels are read more easily, but there is room only for few or short ones.
    longest = max(map(len, names.values()), default=1)
    if x and (len(positions) * longest > 90 or len(positions) > 30):
        layout["tickangle"] = -90 if len(positions) > 24 else -45
    return layout
