"""Values of the annotated types of `schema`: checked and converted.

Contract: pure functions. A value that is not of its type, or out of its range, is a `ConfigError` of one line.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from fractions import Fraction
from typing import Annotated, Any, Literal

from dist_cifar.config.marks import Names, PathKind, Range
from dist_cifar.config.yaml_text import brief
from dist_cifar.errors import ConfigError, did_you_mean, listed
from dist_cifar.plugins import is_reference, registered_names

_SAME = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16"}
"""Words of other programs; by its letters alone, `gpu` is next to `cpu`."""
_UNUSABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
"""Control characters other than tab and line feed, and what is left of bytes that are not UTF-8."""


def as_written(number: float) -> Fraction:
    """The decimal number that a config has: 0.1 is a tenth, which no float is."""
    return Fraction(str(number))


def convert(hint: Any, value: Any, key: str, origin: str, *, any_name: bool = False) -> Any:
    """`value` as the type of `hint`, or `ConfigError`. An int is a float too; nothing else is turned into another.

    With `any_name` a component may have a name that is not known in this process.
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None:
            return None
        return convert(arguments[0], value, key, origin, any_name=any_name)
    if kind is Annotated:
        plain = arguments[0]
        if plain in (int, float):
            return _number(hint, plain, value, key, origin)
        for mark in arguments[1:]:
            if isinstance(mark, Names):
                return value if any_name and isinstance(value, str) else _name(mark, value, key, origin)
        return convert(plain, value, key, origin, any_name=any_name)
    if kind is dict:
        return _options(value, key, origin)
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, key, origin)
    if kind is Literal:
        if isinstance(value, bool) and "on" in arguments:
            value = "on" if value else "off"  # YAML 1.1 takes the bare words for true and false
        if isinstance(value, str) and value in arguments:
            return value
        hint = did_you_mean(_SAME.get(str(value), str(value)), arguments) if isinstance(value, str) else ""
        raise ConfigError(f"{origin}: {key}: must be one of {', '.join(arguments)}, found {brief(value)}{hint}")
    if kind is tuple:
        many = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or (not many and len(value) != len(arguments)):
            wanted = "a list" if many else f"a list of {len(arguments)}"
            raise ConfigError(f"{origin}: {key}: must be {wanted}, found {brief(value)}; write e.g. [a, b]")
        hints = [arguments[0]] * len(value) if many else arguments
        items = zip(hints, value, strict=True)
        return tuple(convert(hint, item, key, origin, any_name=any_name) for hint, item in items)
    if type(value) is not hint:
        quotes = "; put it in quotes" if hint is str and isinstance(value, bool | int | float) else ""
        raise ConfigError(f"{origin}: {key}: must be {type_name(hint)}, found {brief(value)}{quotes}")
    if hint is str and _UNUSABLE.search(value):
        raise ConfigError(f"{origin}: {key}: found {brief(value)}, which holds a control character; remove it")
    return value


def _record(record: Any, value: Any, key: str, origin: str) -> Any:
    """A mapping as the dataclass `record`, whose fields are converted by their types."""
    hints, fields = typing.get_type_hints(record, include_extras=True), dataclasses.fields(record)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        example = f"{fields[0].name}: a, {fields[1].name}: 2.0"
        raise ConfigError(f"{origin}: {key}: must be {type_name(record)}, found {brief(value)}; write {{{example}}}")
    for name in value:
        if name not in hints:
            known = did_you_mean(name, hints) or f"; it has {listed(list(hints))}"
            raise ConfigError(f"{origin}: {key}: has no {brief(name)}{known}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in value:
            raise ConfigError(f"{origin}: {key}: {field.name} is missing in {brief(value)}; add it")
    return record(**{name: convert(hints[name], one, f"{key}.{name}", origin) for name, one in value.items()})


def _number(hint: Any, plain: type, value: Any, key: str, origin: str) -> int | float:
    """A number of the type `plain` within the bounds of `hint`; infinity and NaN are within none."""
    (bounds,) = (mark for mark in typing.get_args(hint) if isinstance(mark, Range))
    is_number = type(value) is plain or (plain is float and type(value) is int)
    if not is_number or not math.isfinite(bounds.maximum if type(value) is int else value):
        raise ConfigError(f"{origin}: {key}: must be a {type_name(hint)}, found {brief(value)}")
    if value not in bounds:
        raise ConfigError(f"{origin}: {key}: must be {bounds}, found {brief(value)}")
    return plain(value)


def _name(names: Names, value: Any, key: str, origin: str) -> str:
    """A name that is known, registered or has the form of a reference; whether that leads anywhere is seen later."""
    registered = registered_names(names.kind)
    if value in names.known and value in registered:
        raise ConfigError(f"{origin}: {key}: {value} is the package's own; register yours under another name")
    known = (*names.known, *registered)
    if isinstance(value, str) and (value in known or is_reference(value)):
        return value
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    choices = ", ".join((*known, "module:attribute"))
    raise ConfigError(f"{origin}: {key}: must be one of {choices}, found {brief(value)}{hint}")


def _options(value: Any, key: str, origin: str) -> dict[str, Any]:
    """Arguments by name, whose values are what YAML can hold."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise ConfigError(f"{origin}: {key}: must be names with values, found {brief(value)}; write e.g. {{width: 64}}")
    for name, one in value.items():
        _plain(one, f"{key}.{name}", origin)
    return value


def _plain(value: Any, key: str, origin: str) -> None:
    """Raises `ConfigError` unless a value is null, true, false, a finite number, a text, or lists and names of such."""
    if isinstance(value, list):
        for one in value:
            _plain(one, key, origin)
    elif isinstance(value, dict):
        _options(value, key, origin)
    elif isinstance(value, str):
        convert(str, value, key, origin)
    elif not isinstance(value, bool | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            f"{origin}: {key}: must be a number, a text, true, false, null or a list, found {brief(value)}"
        )
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{origin}: {key}: must be below 2^63, found {brief(value)}")


def unmarked(hint: Any) -> Any:
    """The type without its marks, and without the null that it may be."""
    while typing.get_origin(hint) in (Annotated, types.UnionType, typing.Union):
        hint = typing.get_args(hint)[0]
    return hint


def is_optional(hint: Any) -> bool:
    """Whether null is a value of the type."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return type(None) in typing.get_args(hint)


def path_kind(hint: Any) -> PathKind | None:
    """Whether the field holds a path, and where that is expanded."""
    while typing.get_origin(hint) in (Annotated, types.UnionType, typing.Union):
        hint, *marks = typing.get_args(hint)
        for mark in marks:
            if isinstance(mark, PathKind):
                return mark
    return None


def type_name(hint: Any) -> str:
    """The type as the help and an error show it."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument) for argument in arguments)
    if kind is Annotated:
        names = [mark for mark in arguments[1:] if isinstance(mark, Names)]
        if names:
            return str(names[0])
        return " ".join(
            [type_name(arguments[0]), *(str(bounds) for bounds in arguments[1:] if isinstance(bounds, Range))]
        )
    if kind is Literal:
        return " | ".join(arguments)
    if kind is tuple:
        inside = (
            f"{type_name(arguments[0])}, ..."
            if arguments[-1] is Ellipsis
            else ", ".join(type_name(argument) for argument in arguments)
        )
        return f"[{inside}]"
    if kind is dict:
        return "names with values"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}[hint]
