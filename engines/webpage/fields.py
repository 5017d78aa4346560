"""JSON to frozen dataclasses, as their annotations say; what does not fit is named with its place in the document."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

SHOWN = 60
"""Characters of a value in a message."""


class Unfit(Exception):
    """A value that does not fit: its field, the rule, and what it is; an InputError where the file is known."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field} must be {rule}, got {shown(value)}.")


@dataclass(frozen=True)
class Rule:
    """For Annotated: what a value has to be beyond its type."""

    text: str
    holds: Callable[[Any], bool]


Amount = Annotated[float, Rule("a number, 0 or more", lambda value: value >= 0)]
Positive = Annotated[float, Rule("a number above 0", lambda value: value > 0)]
Share = Annotated[float, Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Whole = Annotated[int, Rule("a whole number, 0 or more", lambda value: value >= 0)]
Count = Annotated[int, Rule("a whole number, 1 or more", lambda value: value >= 1)]
_TYPES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def parse(text: str) -> object:
    """JSON, without the constants that only Python's has.

    Raises:
        ValueError: not JSON, NaN or an infinity, or nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("brackets nested deeper than any benchmark writes") from None


def decode(kind: Any, value: Any, field: str) -> Any:
    """`value`, as `parse` gave it, as `kind`: a dataclass, Literal, tuple, Mapping, Annotated or a plain type.

    Keys that a dataclass does not have are left alone: a later version may write more. Keys with a default may be
    absent.

    Raises:
        Unfit: it does not fit.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # X | None
        return None if value is None else decode(args[0], value, field)
    if origin is Annotated:
        return _ruled(args[0], args[1], value, field)
    if origin is Literal:
        return _checked(value, value in args, field, f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        _checked(value, isinstance(value, list), field, "a list")
        return tuple(decode(args[0], each, f"{field}[{i}]") for i, each in enumerate(value))
    if origin is Mapping or is_dataclass(kind):
        _checked(value, isinstance(value, dict), field, "an object")
    if origin is Mapping:
        return {key: decode(args[1], each, _inside(field, key)) for key, each in value.items()}
    if is_dataclass(kind):
        return _from_object(kind, value, field)
    return value if kind is Any else _plain(kind, value, field)


def shown(value: object) -> str:
    """A value in a message: one line, of a length that can be read."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 2]}.."


def _from_object(cls: Any, value: dict[str, Any], field: str) -> Any:
    found = {}
    for one, hint in _hints(cls):
        if one.name in value:
            found[one.name] = decode(hint, value[one.name], _inside(field, one.name))
        elif one.default is MISSING and one.default_factory is MISSING:
            raise Unfit(_inside(field, one.name), "given", _Absent())
    return cls(**found)


def _ruled(kind: Any, rule: Rule, value: object, field: str) -> Any:
    try:
        found = decode(kind, value, field)
    except Unfit:
        raise Unfit(field, rule.text, value) from None
    return _checked(found, rule.holds(found), field, rule.text)


def _plain(kind: Any, value: Any, field: str) -> Any:
    """Of float, int, str and bool; whole numbers pass as float, true and false as neither."""
    try:
        found = float(value) if kind is float and type(value) is int else value
    except OverflowError:
        found = math.inf
    fits = type(found) is kind and (kind is not float or math.isfinite(found))
    return _checked(found, fits, field, _TYPES[kind])


def _checked(value: Any, fits: bool, field: str, rule: str) -> Any:
    if not fits:
        raise Unfit(field, rule, value)
    return value


@cache
def _hints(kind: Any) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((each, hints[each.name]) for each in fields(kind))


def _inside(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON has not")


class _Absent:
    def __repr__(self) -> str:
        return "none"
