"""An edit as a value: pairs of a hook's name and a function."""

from collections.abc import Iterable
from typing import Any

from llama_probe.errors import InputError
from llama_probe.hooks import Hook

Pair = tuple[Any, Hook]


class Edit(tuple[Any, ...]):
    """Pairs of a hook's name (or a pattern) and a function: hooks as a value that never changes.

    Joined with `+`, to other edits or to a plain list of pairs. Its repr is what makes it.

    >>> from llama_probe.interventions import bias_router
    >>> soften = Edit([("blocks.0.hook_mlp_out", lambda tensor, hook: tensor / 2)])
    >>> len(soften + bias_router({1: {0: -2.0}}))
    3
    >>> bias_router({0: {3: 1.0}}) + bias_router({1: {0: -2.0}})
    bias_router({0: {3: 1.0}}) + bias_router({1: {0: -2.0}})
    """

    says: tuple[str, ...]

    def __new__(cls, pairs: Iterable[Any] = (), says: Iterable[str] | None = None) -> "Edit":
        """An edit of these pairs; `says` has the expressions that its repr shows.

        Raises:
            InputError: Something is no pair of a name and a function.
        """
        if says is None and isinstance(pairs, Edit):
            says = pairs.says
        pairs = list(pairs)
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise InputError(
                    f"an edit is made of pairs of a hook's name and a function, not {pair!r}; "
                    "edits join with +"
                )
        edit = super().__new__(cls, map(tuple, pairs))
        edit.says = tuple(says) if says is not None else (f"Edit({pairs})",) if pairs else ()
        return edit

    def __add__(self, other: Iterable[Any]) -> "Edit":  # pyright: ignore[reportIncompatibleMethodOverride]
        """This edit, then the other."""
        return _joined(self, Edit(other))

    def __radd__(self, other: Iterable[Any]) -> "Edit":
        """The other, then this edit."""
        return _joined(Edit(other), self)

    def __repr__(self) -> str:
        return " + ".join(self.says) or "Edit()"


def _joined(first: Edit, then: Edit) -> Edit:
    return Edit([*first, *then], (*first.says, *then.says))
