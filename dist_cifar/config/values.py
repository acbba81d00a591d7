"""Values of the annotated types of `schema`: checked, converted, shown.

Contract: pure functions. A value that is not of its type, or out of its range, is a `ConfigError` of one line.
"""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any, Literal

import yaml

from dist_cifar.config.schema import Range
from dist_cifar.errors import ConfigError, did_you_mean

_SAME = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16"}
"""Words of other programs; by its letters alone, `gpu` is next to `cpu`."""


def convert(hint: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the type of `hint`, or `ConfigError`. An int is a float too; nothing else is turned into another."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None:
            return None
        return convert(arguments[0], value, key, origin)
    if kind is Annotated:
        converted = convert(arguments[0], value, key, origin)
        for bounds in arguments[1:]:
            if isinstance(bounds, Range) and converted not in bounds:
                raise ConfigError(f"{origin}: {key}: must be {bounds}, found {show(value)}")
        return converted
    if kind is Literal:
        if isinstance(value, bool) and "on" in arguments:
            value = "on" if value else "off"  # YAML 1.1 takes the bare words for true and false
        if value in arguments:
            return value
        hint = did_you_mean(_SAME.get(str(value), str(value)), arguments)
        raise ConfigError(f"{origin}: {key}: must be one of {', '.join(arguments)}, found {show(value)}{hint}")
    if kind is tuple:
        many = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or (not many and len(value) != len(arguments)):
            wanted = "a list" if many else f"a list of {len(arguments)}"
            raise ConfigError(f"{origin}: {key}: must be {wanted}, found {show(value)}; write e.g. [a, b]")
        hints = [arguments[0]] * len(value) if many else arguments
        return tuple(convert(hint, item, key, origin) for hint, item in zip(hints, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{origin}: {key}: must be {type_name(hint)}, found {show(value)}")
    return value


def accepts_text(hint: Any, *, is_null: bool) -> bool:
    """Whether a value typed on the command line is taken as it stands. `is_null`: YAML reads it as null."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return str in arguments and not is_null
    return hint is str or typing.get_origin(hint) is Literal


def type_name(hint: Any) -> str:
    """The type as the help and an error show it."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument) for argument in arguments)
    if kind is Annotated:
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
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}[hint]


def show(value: Any) -> str:
    """A value as YAML would write it, on one line, so that what is printed can be typed."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
