"""Reads a config: the defaults, a YAML file, `key=value` overrides; checks it and prints it.

Contract: `load_config(path, overrides)` returns a `Config` in which every value has its declared type and range, or
raises `ConfigError` with one line that names the path of the key, the value found and what to do. No torch is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from dist_cifar.config import schema
from dist_cifar.config.schema import HINTS, SECTIONS, Config, Range
from dist_cifar.errors import ConfigError, nearest, nearest_path

logger = logging.getLogger(__name__)

_MOVED = {
    "batch.virtual_ranks": "strategy.virtual_ranks",
    "data.device_augment": "augment.backend",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "train.compile": "compute.compile",
    "train.grad_compression": "strategy.grad_compression",
    "train.max_skipped_steps": "optimizer.max_skipped_steps",
    "train.non_finite": "optimizer.non_finite",
    "train.precision": "compute.precision",
    "train.strategy": "strategy.name",
    "train.zero_stage": "strategy.zero_stage",
}
"""Keys that have another name now. They are still read, with a warning: configs and job scripts outlive a checkout."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file at `path`, then each `key=value` of `overrides`.

    Raises `ConfigError` for a missing or unreadable file, an unknown key, a wrong type or an impossible value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        _update(values, _read_yaml(Path(path)))
    _update(values, _parse_overrides(overrides))
    if path is not None:
        values.setdefault("run.name", Path(path).stem)
    return config_from_values(values)


def config_from_values(values: Mapping[str, Any]) -> Config:
    """A `Config` from dotted keys (`{"optimizer.lr": 1e-3}`), each value already of its type; the rest are defaults."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    config = Config(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})
    _check(config)
    if config.run.dir is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{config.run.name}"))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys to values, in the order of the declaration; tuples as lists, ready for JSON and YAML."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal `Config`."""
    lines: list[str] = []
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        lines.append(f"  {name}: {show(value)}")
    return "\n".join(lines) + "\n"


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, docstring) of every field, in the order of the declaration."""
    docs = _field_docs()
    defaults = flatten(Config())
    return [
        (f"{section}.{name}", _type_name(hint), show(defaults[f"{section}.{name}"]), docs[section][name])
        for section, hints in HINTS.items()
        for name, hint in hints.items()
    ]


# --- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml says nothing of its types
    """Safe YAML that reads `1e-3` as a number (as YAML 1.2 does) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string; write a name")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}: line {line}: not YAML: {error.problem}; mend the line") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_path(path, Path("configs"))
        hint = f"did you mean {near}?" if near else "give a YAML file"
        raise ConfigError(f"--config {path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}); give a YAML file") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {show(tree)}, not sections; write `section:` and `  key: value` below it")
    values: dict[str, Any] = {}
    for section, fields in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: {_unknown(section, SECTIONS)}")
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {section}: found {show(fields)}; write its keys below it, one a line")
        for name, value in fields.items():
            key = _current_key(f"{section}.{name}", str(path))
            values[key] = _convert(_hint(key, str(path)), value, key, str(path))
    return values


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"argument {override!r}: not an option and not key=value; write e.g. train.epochs=3")
        key = _current_key(key, "command line")
        hint = _hint(key, "command line")
        value = _parse_yaml(text, f"command line: {key}")
        bare = _bare(hint)
        if _accepts_text(bare) and not (value is None and _is_optional(bare)):
            value = text  # run.name=007 is a name, not a number
        if key in values:
            raise ConfigError(f"command line: {key} is given twice; give it once")
        values[key] = _convert(hint, value, key, "command line")
    return values


def _current_key(key: str, origin: str) -> str:
    """The name that a key has now, if it is one of `_MOVED`; otherwise the key itself."""
    if key not in _MOVED:
        return key
    logger.warning("warning: %s: %s is now called %s", origin, key, _MOVED[key])
    return _MOVED[key]


def _update(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Puts a layer over `values`. A layer that sets one of the two batch sizes unsets the other."""
    sizes = ("batch.global_size", "batch.per_rank_size")
    values.update(layer)
    for size, other in (sizes, sizes[::-1]):
        if layer.get(size) is not None and other not in layer:
            values[other] = None


def _hint(key: str, origin: str) -> Any:
    section, _, name = key.partition(".")
    if section in HINTS and name in HINTS[section]:
        return HINTS[section][name]
    known = [f"{section}.{name}" for section, hints in HINTS.items() for name in hints]
    raise ConfigError(f"{origin}: {_unknown(key, known)}")


def _unknown(key: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    by_last_part = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestion = _nearest(key, known) or (f"; did you mean {by_last_part[0]}?" if by_last_part else "")
    return f"{key}: unknown key{suggestion or ';'} `python -m dist_cifar train --help` lists them all"


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    match = nearest(word, known)
    return f"; did you mean {match}?" if match else ""


# --- types -------------------------------------------------------------------------------------------------------


_SAME = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16"}
"""Words of other programs; by its letters alone, `gpu` is next to `cpu`."""


def _convert(hint: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the type of `hint`, or `ConfigError`. An int is a float too; nothing else is turned into another."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(arguments[0], value, key, origin)
    if kind is Annotated:
        converted = _convert(arguments[0], value, key, origin)
        for bounds in arguments[1:]:
            if isinstance(bounds, Range) and converted not in bounds:
                raise ConfigError(f"{origin}: {key}: must be {bounds}, found {show(value)}")
        return converted
    if kind is Literal:
        if isinstance(value, bool) and "on" in arguments:
            value = "on" if value else "off"  # YAML 1.1 takes the bare words for true and false
        if value in arguments:
            return value
        hint = _nearest(_SAME.get(str(value), str(value)), arguments)
        raise ConfigError(f"{origin}: {key}: must be one of {', '.join(arguments)}, found {show(value)}{hint}")
    if kind is tuple:
        many = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or (not many and len(value) != len(arguments)):
            wanted = "a list" if many else f"a list of {len(arguments)}"
            raise ConfigError(f"{origin}: {key}: must be {wanted}, found {show(value)}; write e.g. [a, b]")
        hints = [arguments[0]] * len(value) if many else arguments
        return tuple(_convert(hint, item, key, origin) for hint, item in zip(hints, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{origin}: {key}: must be {_type_name(hint)}, found {show(value)}")
    return value


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _bare(hint: Any) -> Any:
    """The type without its annotations."""
    return _bare(typing.get_args(hint)[0]) if typing.get_origin(hint) is Annotated else hint


def _accepts_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is Literal or (_is_optional(hint) and str in typing.get_args(hint))


def _type_name(hint: Any) -> str:
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(_type_name(argument) for argument in arguments)
    if kind is Annotated:
        return " ".join(
            [_type_name(arguments[0]), *(str(bounds) for bounds in arguments[1:] if isinstance(bounds, Range))]
        )
    if kind is Literal:
        return " | ".join(arguments)
    if kind is tuple:
        inside = (
            f"{_type_name(arguments[0])}, ..."
            if arguments[-1] is Ellipsis
            else ", ".join(_type_name(argument) for argument in arguments)
        )
        return f"[{inside}]"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}[hint]


def show(value: Any) -> str:
    """A value as YAML would write it, on one line, so that what is printed can be typed."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check(config: Config) -> None:
    """What no single field can say of itself."""
    batch, augment, data, strategy = config.batch, config.augment, config.data, config.strategy
    if (batch.global_size is None) == (batch.per_rank_size is None):
        both = "both" if batch.global_size is not None else "neither"
        raise ConfigError(
            f"batch: {both} of global_size and per_rank_size set ({show(batch.global_size)},"
            f" {show(batch.per_rank_size)}); set exactly one, the other null"
        )
    if config.strategy.name == "exact":
        if batch.global_size is None:
            raise ConfigError(
                "batch.per_rank_size: in strategy.name=exact nothing depends on the world size, the batch neither;"
                " set batch.global_size"
            )
        if strategy.virtual_ranks & (strategy.virtual_ranks - 1):
            raise ConfigError(
                f"strategy.virtual_ranks: must be a power of two, found {strategy.virtual_ranks}; write 8"
            )
        if batch.global_size % strategy.virtual_ranks:
            raise ConfigError(
                f"batch.global_size: {batch.global_size} samples cannot be shared equally by"
                f" strategy.virtual_ranks={strategy.virtual_ranks}; set a multiple of it"
            )
    for name in ("erasing_area", "erasing_aspect"):
        low, high = getattr(augment, name)
        if low > high:
            raise ConfigError(f"augment.{name}: must rise, found [{low}, {high}]; write [{high}, {low}]")
    if any(beta >= 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: must be < 1, found {show(list(config.optimizer.betas))}")
    if data.source == "synthetic" and data.validation_size >= data.synthetic_train_size:
        raise ConfigError(
            f"data.validation_size: {data.validation_size} leaves no training image of"
            f" data.synthetic_train_size={data.synthetic_train_size}; make it smaller"
        )
    if not config.run.name or "/" in config.run.name:
        raise ConfigError(f"run.name: must be a name without '/', found {show(config.run.name)}")


def _field_docs() -> dict[str, dict[str, str]]:
    """The docstring under each field: {section: {field: text}}."""
    by_class = {section.__name__: name for name, section in SECTIONS.items()}
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef) and node.name in by_class:
            docs[by_class[node.name]] = {
                ast.unparse(statement.target): " ".join(ast.literal_eval(text.value).split())
                for statement, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr)
            }
    return docs
