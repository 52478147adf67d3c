"""The parameters of an experiment: its function's arguments, and the values given for them.

Types are int, float, str, bool, Literal, lists of these, and unions such as `int | None`.
"""

import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llama_probe.errors import InputError, near

# Columns of `lp.runs` and arguments of `lp.run`.
_TAKEN = {"folder", "experiment", "status", "started", "seconds", "error"}
_TAKEN |= {"out", "again", "engine", "progress"}
# How a text is read as each type, in the order in which they are tried.
_READERS: dict[type, Callable[[str], Any]] = {
    NoneType: {"none": None, "None": None, "null": None}.__getitem__,
    bool: {"true": True, "True": True, "false": False, "False": False}.__getitem__,
    int: int,
    float: float,
    str: str,
}
_WORDS = {NoneType: "none", bool: "true or false", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class Parameter:
    """One argument of an experiment's function.

    Attributes:
        name: Its name.
        kinds: The types that it may have, and the values of a Literal.
        default: What it is when it is not given; `inspect.Parameter.empty` if it must be.
    """

    name: str
    kinds: tuple[Any, ...]
    default: Any

    def fit(self, value: Any) -> Any:
        """A value as this parameter takes it.

        Raises:
            InputError: It is of another type.
        """
        try:
            return _fit(value, self.kinds)
        except ValueError:
            raise self._wrong(value) from None

    def read(self, text: str) -> list[Any]:
        """The values in a text of the command line, such as "1,2" or "[1, 2], [3]".

        Raises:
            InputError: One of them is of another type.
        """
        pieces: Sequence[Any] = [piece.strip() for piece in text.split(",")]
        read = _read
        if text.lstrip()[:1] in {"[", '"'}:
            try:
                pieces, read = json.loads(f"[{text}]"), _fit
            except ValueError as error:
                raise InputError(f"{self.name}={text} is not JSON: {error}") from None
        try:
            return [read(piece, self.kinds) for piece in pieces]
        except ValueError:
            raise self._wrong(text) from None

    def _wrong(self, value: object) -> InputError:
        return InputError(f"{self.name} is {value!r}, but should be {_described(self.kinds)}")


def parameters_of(name: str, function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of an experiment.

    Args:
        name: The experiment's, for messages.
        function: The function.

    Raises:
        InputError: An argument's type is none that can be given on the command line.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError as error:
        raise InputError(f"an annotation of {name} means nothing: {error}") from None
    found = {}
    for argument in signature.parameters.values():
        if argument.kind in (
            argument.VAR_POSITIONAL,
            argument.VAR_KEYWORD,
            argument.POSITIONAL_ONLY,
        ):
            raise InputError(f"{name} takes {argument}, but its arguments should be named ones")
        if argument.name in _TAKEN:
            raise InputError(f"{name} cannot have a parameter {argument.name!r}: rename it")
        kinds = _kinds(_annotation(argument))
        if kinds is None:
            raise InputError(
                f"{name} has a parameter '{argument}', but its type should be int, float, str, "
                "bool, Literal, a list of these, or one of several such as int | None"
            )
        if argument.default is not argument.empty:
            _json(name, argument)
        found[argument.name] = Parameter(argument.name, kinds, argument.default)
    return found


def texts(known: Mapping[str, Parameter], name: str, given: Iterable[str]) -> dict[str, list[Any]]:
    """The values in texts "key=v1,v2", by parameter.

    Args:
        known: The experiment's parameters.
        name: The experiment's name, for messages.
        given: The texts; values of a key that comes twice are taken together.

    Raises:
        InputError: A text has no "=", names no parameter, or a value is of the wrong type.
    """
    found: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals:
            raise InputError(f"-P {text} gives no value; write it as key=value or key=v1,v2")
        _known(known, name, key)
        found[key] = found.get(key, []) + known[key].read(values)
    return found


def values(
    known: Mapping[str, Parameter], name: str, given: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """The values given in Python, by parameter: one, or a list, tuple or range of several.

    Args:
        known: The experiment's parameters.
        name: The experiment's name, for messages.
        given: The values.

    Raises:
        InputError: There is no such parameter, or a value is of the wrong type.
    """
    for key in given:
        _known(known, name, key)
    return {key: _several(known[key], value) for key, value in given.items()}


def _several(parameter: Parameter, value: Any) -> list[Any]:
    try:
        return [parameter.fit(value)]
    except InputError:
        if not isinstance(value, list | tuple | range) or not value:
            raise
    return [parameter.fit(one) for one in value]


def product(
    known: Mapping[str, Parameter], name: str, given: Mapping[str, list[Any]]
) -> list[dict[str, Any]]:
    """All combinations of values, with the defaults of what is not given.

    Those of one model stand together, so that it is loaded once.

    Args:
        known: The experiment's parameters.
        name: The experiment's name, for messages.
        given: The values of each parameter.

    Raises:
        InputError: A parameter without a default has no value.
    """
    several = {}
    for key, parameter in known.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise InputError(f"{name} needs a value for {key!r}, which has no default")
        several[key] = _distinct(given[key] if key in given else [parameter.default])
    found = [dict(zip(several, row, strict=True)) for row in itertools.product(*several.values())]
    models = several.get("model", [None])
    return sorted(found, key=lambda arguments: models.index(arguments.get("model")))


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _known(known: Mapping[str, Parameter], name: str, key: str) -> None:
    if key not in known:
        has = ", ".join(known) or "none"
        raise InputError(f"{name} has no parameter {key!r}{near(key, known)}; it has {has}")


def _json(name: str, argument: inspect.Parameter) -> None:
    try:
        json.dumps(argument.default)
    except TypeError:
        raise InputError(
            f"{name} has a parameter '{argument}', whose default has no form in JSON"
        ) from None


def _annotation(argument: inspect.Parameter) -> Any:
    if argument.annotation is not argument.empty:
        return argument.annotation
    return str if argument.default is argument.empty else type(argument.default)


def _kinds(annotation: Any) -> tuple[Any, ...] | None:
    """The types of an annotation one by one; None if it has one that cannot be given."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        each = [_kinds(part) for part in parts]
        return None if None in each else tuple(kind for kinds in each for kind in kinds or ())
    if origin is list:
        return None if _kinds(parts[0]) is None else (annotation,)
    annotation = NoneType if annotation is None else annotation
    known = annotation in _READERS or annotation is list or origin is Literal
    return (annotation,) if known else None


def _fit(value: Any, kinds: Sequence[Any]) -> Any:
    """A value as one of the types takes it; ValueError if none does."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy's
    if value in _choices(kinds):
        return value
    for kind in kinds:
        if get_origin(kind) is list:
            if isinstance(value, list):
                return [_fit(one, _kinds(get_args(kind)[0]) or ()) for one in value]
        elif type(value) is kind:
            return value
    if float in kinds and type(value) is int:
        return float(value)
    raise ValueError(value)


def _read(text: str, kinds: Sequence[Any]) -> Any:
    """What a text stands for, as one of the types; ValueError if for none."""
    for choice in _choices(kinds):
        if str(choice) == text:
            return choice
    for kind, reader in _READERS.items():
        if kind in kinds:
            with suppress(ValueError, KeyError):
                return reader(text)
    raise ValueError(text)


def _choices(kinds: Sequence[Any]) -> list[Any]:
    return [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def _described(kinds: Sequence[Any]) -> str:
    words = [repr(choice) for choice in _choices(kinds)]
    for kind in kinds:
        if kind is list or get_origin(kind) is list:
            inside = get_args(kind)
            of = f" of {_described(_kinds(inside[0]) or ())}" if inside else ""
            words.append(f"a list{of}, such as [1, 2]")
        elif kind in _WORDS:
            words.append(_WORDS[kind])
    return " or ".join(words)
