"""What is selected: a layer, a head, a position.

Explorers take a selection and watch it; they never call one another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from traitlets import HasTraits, Int, observe

from llama_probe.errors import InputError


class Selection(HasTraits):
    """Whole numbers that say what is looked at; several explorers may share one.

    >>> selection = Selection(layer=2)
    >>> selection.on_change(lambda names: print(sorted(names), selection.layer))
    >>> selection.choose(layer=1, head=3)
    ['head', 'layer'] 1
    """

    prompt = Int(0, help="which of several prompts")
    layer = Int(0)
    head = Int(0)
    query = Int(0, help="the position that looks")
    key = Int(0, help="the position that is looked at")
    pos = Int(0, help="a position, where nothing looks at anything")
    pair = Int(0, help="a rotary pair")
    expert = Int(0)
    token = Int(0, help="which of the tokens that are listed")
    site = Int(0, help="which of the sites that are listed")

    def __init__(self, **values: int) -> None:
        unknown = set(values) - set(self.class_trait_names())
        if unknown:
            has = ", ".join(self.class_trait_names())
            raise InputError(f"a selection has no {min(unknown)!r}; it has: {has}")
        self._listeners: list[Callable[[set[str]], None]] = []
        self._changed: set[str] = set()
        self._depth = 0
        super().__init__(**values)

    def choose(self, **values: int) -> None:
        """Set several at once: those who watch hear of it once."""
        with self._together():
            for name, value in values.items():
                setattr(self, name, value)

    def on_change(self, listener: Callable[[set[str]], None]) -> None:
        """Call a function with the names of what has changed, whenever something has."""
        self._listeners.append(listener)

    def off_change(self, listener: Callable[[set[str]], None]) -> None:
        """Do not call it any more."""
        self._listeners = [known for known in self._listeners if known != listener]

    @contextmanager
    def _together(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._changed:
                names, self._changed = self._changed, set()
                for listener in tuple(self._listeners):
                    listener(names)

    @observe("prompt", "layer", "head", "query", "key", "pos", "pair", "expert", "token", "site")
    def _note(self, change: Any) -> None:
        with self._together():
            self._changed.add(change.name)
