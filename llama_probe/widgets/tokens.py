"""A text token by token, coloured by a number each: alone, or beside other explorers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.page import Strip, View
from llama_probe.widgets.explorer import Explorer, Selected, named
from llama_probe.widgets.selection import Selection


class TokenStrip(Explorer):
    """Tokens in a row; a click selects a position, here and in whatever shares the selection.

    Red is above 0 and blue below, and the line below a token is the thicker the farther it is from
    0; a pointer that rests on a token reads the number.

    Args:
        tokens: Their texts; blanks and control characters are made visible.
        values: A number for each, as a list, array or tensor; missing ones (NaN, None) have no
            colour. None: no colours.
        unit: What the numbers are in.
        caption: A line above them, as plain text; "{pos}" stands for the selected token.
        selection: To be shared with other explorers; None: one of its own.

    Attributes:
        pos: The selected position.

    Raises:
        InputError: There are no tokens, or not one number for each.
    """

    pos = Selected()

    def __init__(
        self,
        tokens: Sequence[str],
        values: Any = None,
        *,
        unit: str = "",
        caption: str = "Token {pos}: click another",
        selection: Selection | None = None,
    ) -> None:
        super().__init__(selection)
        if not len(tokens):
            raise InputError("there are no tokens to show")
        self.title = "Tokens"
        self._strip = Strip(list(tokens), _numbers(values), unit)
        self.labels = {"pos": named(self._strip.tokens)}
        view = View("strip", caption, lambda: self._strip, (), {"x": "pos"}, {"pos": "●"})
        self.rows = [[view]]
        self.begin(pos=0)

    @property
    def values(self) -> np.ndarray | None:
        """The numbers [pos]; set them to colour the tokens anew.

        Raises:
            InputError: There is not one for each token.
        """
        return self._strip.values  # pyright: ignore[reportReturnType]

    @values.setter
    def values(self, values: Any) -> None:
        self._strip = Strip(self._strip.tokens, _numbers(values), self._strip.unit)
        self.redraw("strip")

    def controls(self) -> Sequence[str]:
        """None: the tokens are there to be clicked."""
        return []


def _numbers(values: Any) -> np.ndarray | None:
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.detach().double().cpu()
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"values should be numbers, one for each token: {error}") from error
    if numbers.ndim != 1:
        raise InputError(f"values should be [pos], not {list(numbers.shape)}")
    return numbers
