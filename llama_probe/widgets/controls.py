"""Menus and switches that are tied to a trait."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import ipywidgets
from traitlets import HasTraits, TraitError, link


def menu(
    owner: HasTraits, name: str, choices: Iterable[Any], label: str, *, of: HasTraits | None = None
) -> ipywidgets.Dropdown:
    """A menu that sets a trait.

    Args:
        owner: Whose trait.
        name: The trait.
        choices: Its values, or pairs of a text and a value.
        label: What stands before it.
        of: Whose trait, if not the owner's.
    """
    owner = owner if of is None else of
    box = ipywidgets.Dropdown(
        options=list(choices), description=label, style={"description_width": "initial"}
    )
    box.layout.width = "auto"
    box.layout.max_width = "320px"

    def follow(change: Any = None) -> None:
        # A shared selection may hold what is not in this menu.
        with suppress(TraitError):
            box.value = getattr(owner, name)

    follow()
    box.observe(lambda change: setattr(owner, name, change.new), "value")
    owner.observe(follow, name)
    return box


def switch(owner: HasTraits, name: str, label: str) -> ipywidgets.Checkbox:
    """A box to tick that sets a trait."""
    box = ipywidgets.Checkbox(value=getattr(owner, name), description=label, indent=False)
    box.layout.width = "auto"
    link((owner, name), (box, "value"))
    return box
