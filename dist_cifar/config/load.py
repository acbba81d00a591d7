"""Reads, checks and prints a config: the defaults, then a YAML file, then `key=value` overrides.

Contract: `load_config(path, overrides)` returns a `Config` in which every value has its declared type and range, or
raises `ConfigError` with one line that names the path of the key, the value found and what to do. No torch is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_origin

from dist_cifar.config import optimizer_schema, schema
from dist_cifar.config.key_hints import hint_for
from dist_cifar.config.marks import PathKind
from dist_cifar.config.paths import expand_path, has_variables
from dist_cifar.config.schema import HINTS, SECTIONS, Config
from dist_cifar.config.values import convert, is_optional, path_kind, type_name, unmarked
from dist_cifar.config.yaml_text import brief, parse_yaml, read_text, show
from dist_cifar.errors import ConfigError, nearest_path

logger = logging.getLogger(__name__)

MOVED = {
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
"""Keys that have another name now. They are still read, because configs, job scripts and runs outlive a checkout."""


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, environ: Mapping[str, str] = os.environ
) -> Config:
    """The defaults, then the YAML file at `path`, then each `key=value` of `overrides`; paths are expanded.

    `path` may be a pipe, which gives the run no name. `environ` has the variables of paths. Raises `ConfigError` for a
    missing or unreadable file, an unknown key, a wrong type or an impossible value, and nothing else for any bytes.
    """
    values: dict[str, Any] = {}
    old_names: list[str] = []
    if path is not None:
        path = Path(path)
        _update(values, _read_yaml(path, old_names))
        if _is_plain_file(path):
            values.setdefault("run.name", path.stem)
    given, options = _parse_overrides(overrides, old_names)
    _update(values, given)
    for field, some in options.items():
        values[field] = values.get(field, {}) | some
    config = config_from_values({key: _expanded(key, value, environ) for key, value in values.items()})
    for line in old_names:
        logger.warning("warning: %s", line)
    return config


def load_written_config(path: Path) -> Config:
    """The config in a file that `to_yaml` has written. Its components need not be registered in this process.

    Raises as `load_config`.
    """
    return config_from_values(_read_yaml(path, [], any_name=True))


def config_from_values(values: Mapping[str, Any]) -> Config:
    """A `Config` from dotted keys (`{"optimizer.lr": 1e-3}`), each value already of its type, or as `flatten` returns
    it; the rest are defaults. Raises `ConfigError`."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in with_current_keys(values).items():
        section, _, name = key.partition(".")
        if isinstance(value, list) and name in HINTS.get(section, {}):  # of a checkpoint
            value = convert(HINTS[section][name], value, key, "config", any_name=True)
        sections[section][name] = value
    config = Config(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})
    _check(config)
    if config.run.dir is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{config.run.name}"))
    return config


def checked(config: Config, *, environ: Mapping[str, str] = os.environ) -> Config:
    """The same config, for one that was made or changed in Python: checked as if it had been read, and its paths
    expanded. Raises `ConfigError`."""
    if not isinstance(config, Config):
        raise ConfigError(f"a Config is needed, found {brief(config)}; load_config(path) reads one")
    values = {key: convert(_hint(key, "Config"), value, key, "Config") for key, value in flatten(config).items()}
    return config_from_values({key: _expanded(key, value, environ) for key, value in values.items()})


def with_current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the names that their keys have now."""
    return {MOVED.get(key, key): value for key, value in values.items()}


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
    """(key, type, default, docstring) of every field, in the order of the declaration.

    Docstrings are read from the source, and empty where the package is installed without it.
    """
    docs = _field_docs()
    defaults = flatten(Config())
    return [
        (f"{section}.{name}", type_name(hint), show(defaults[f"{section}.{name}"]), docs.get(f"{section}.{name}", ""))
        for section, hints in HINTS.items()
        for name, hint in hints.items()
    ]


# --- reading -----------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, old_names: list[str], *, any_name: bool = False) -> dict[str, Any]:
    try:
        text = read_text(path)
    except FileNotFoundError:
        near = nearest_path(path, Path("configs"))
        hint = f"did you mean {near}?" if near else "give a YAML file"
        raise ConfigError(f"--config {path}: no such file; {hint}") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}); give a YAML file") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {brief(tree)}, not sections; write `section:` and `  key: value` below it")
    values: dict[str, Any] = {}
    for section, fields in tree.items():
        if section not in SECTIONS:
            raise _unknown(section, str(path))
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {section}: found {brief(fields)}; write its keys below it, one a line")
        values |= {f"{section}.{name}": value for name, value in fields.items()}
    values = _rename(values, str(path), old_names)
    origin = str(path)
    return {key: convert(_hint(key, origin), value, key, origin, any_name=any_name) for key, value in values.items()}


def _is_plain_file(path: Path) -> bool:
    """Whether the file has a name of its own, as `/dev/stdin` and the pipe of a `<(command)` have not."""
    return stat.S_ISREG(path.stat().st_mode) and path.absolute().parts[1:2] not in (("dev",), ("proc",))


def _parse_overrides(
    overrides: Sequence[str], old_names: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The values of fields, and single arguments by name of fields that hold such."""
    origin = "command line"
    texts: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"argument {brief(override)}: not an option and not key=value; write e.g. train.epochs=3")
        if key in texts:
            raise ConfigError(f"{origin}: {brief(key)} is given twice; give it once")
        texts[key] = text
        field, _, name = key.rpartition(".")
        if _is_options(field):
            options.setdefault(field, {})[name] = _option(texts.pop(key), f"{origin}: {key}")
    for field, given in options.items():
        convert(_hint(field, origin), given, field, origin)
    values: dict[str, Any] = {}
    for key, text in _rename(texts, origin, old_names).items():
        hint = _hint(key, origin)
        values[key] = convert(hint, _typed(hint, text, f"{origin}: {key}"), key, origin)
    return values, options


def _is_options(key: str) -> bool:
    """Whether `key` names a field that holds arguments by name."""
    section, _, name = key.partition(".")
    return get_origin(unmarked(HINTS.get(section, {}).get(name))) is dict


def _option(text: str, origin: str) -> Any:
    """What was typed for an argument of unknown type: what YAML reads in it, or the text."""
    try:
        return parse_yaml(text, origin)
    except ConfigError:
        return text


def _typed(hint: Any, text: str, origin: str) -> Any:
    """What was typed behind the `=`: the text itself for a field of text, else what YAML reads in it.

    `run.name=007` is a name and no number, and a note may hold a colon. An optional text is null if it is `null` or
    nothing.
    """
    kind = unmarked(hint)
    if kind is not str and get_origin(kind) is not Literal:
        return parse_yaml(text, origin)
    return None if is_optional(hint) and text in ("", "null", "Null", "NULL") else text


def _expanded(key: str, value: Any, environ: Mapping[str, str]) -> Any:
    """A path as it is used; other values as they are."""
    section, _, name = key.partition(".")
    kind = path_kind(HINTS[section][name])
    if kind is None or value is None:
        return value
    if not value or "\n" in value or "\t" in value:
        raise ConfigError(f"{key}: {brief(value)} is no path; name a file or folder")
    if kind is PathKind.NODE:
        return value
    expanded = expand_path(value, key, environ)
    if has_variables(expanded):
        raise ConfigError(f"{key}: {brief(value)} stands for {brief(expanded)}, which begins with ~ or holds a $")
    return expanded


def _rename(values: Mapping[str, Any], origin: str, old_names: list[str]) -> dict[str, Any]:
    """`values` under the current names of their keys; a line that names those that have moved goes to `old_names`."""
    moved = [f"{key} is now {MOVED[key]}" for key in values if key in MOVED]
    if moved:
        old_names.append(f"{origin}: keys have new names: {', '.join(moved)}")
    for key in values:
        if MOVED.get(key) in values:
            raise ConfigError(f"{origin}: {key} is the old name of {MOVED[key]}, which is given too; remove {key}")
    return with_current_keys(values)


def _update(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Puts a layer over `values`. A layer that sets one of the two batch sizes unsets the other."""
    sizes = ("batch.global_size", "batch.per_rank_size")
    values |= layer
    for size, other in (sizes, sizes[::-1]):
        if layer.get(size) is not None and other not in layer:
            values[other] = None


def _hint(key: str, origin: str) -> Any:
    """The annotated type of a key. Raises `ConfigError` if there is no such key."""
    section, _, name = key.partition(".")
    if section in HINTS and name in HINTS[section]:
        return HINTS[section][name]
    raise _unknown(key, origin)


def _unknown(key: str, origin: str) -> ConfigError:
    hint = key_hint(key) or ";"
    return ConfigError(f"{origin}: {brief(key)}: unknown key{hint} `python -m dist_cifar train --help` lists them all")


def key_hint(key: str) -> str:
    """The end of an error's message about a key that there is not; empty if it is not clear what was meant."""
    known = [f"{section}.{name}" for section, hints in HINTS.items() for name in hints]
    return hint_for(key, {name: name for name in known} | MOVED)


# --- checking ----------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    """Raises `ConfigError` where fields contradict each other."""
    batch, augment, data, strategy = config.batch, config.augment, config.data, config.strategy
    _check_optimizer(config)
    if (batch.global_size is None) == (batch.per_rank_size is None):
        both = "both" if batch.global_size is not None else "neither"
        raise ConfigError(
            f"batch: {both} of global_size and per_rank_size set ({show(batch.global_size)},"
            f" {show(batch.per_rank_size)}); set exactly one, the other null"
        )
    if strategy.name == "exact":
        if batch.global_size is None:
            raise ConfigError(
                "batch.per_rank_size: in strategy.name=exact nothing depends on the world size, the batch neither;"
                " set batch.global_size"
            )
        if batch.global_size % strategy.virtual_ranks:
            raise ConfigError(
                f"batch.global_size: {batch.global_size} samples cannot be shared equally by"
                f" strategy.virtual_ranks={strategy.virtual_ranks}; set a multiple of it"
            )
    if augment.transform is not None and augment.backend == "device":
        raise ConfigError(
            "augment.backend: device was set and augment.transform runs on the CPU; set augment.backend=auto"
        )
    if config.mix.name != "none" and config.batch.global_size == 1:
        raise ConfigError(f"mix.name: {config.mix.name} mixes pairs and batch.global_size=1 has none; make it larger")
    for name in ("erasing_area", "erasing_aspect"):
        low, high = getattr(augment, name)
        if low > high:
            raise ConfigError(f"augment.{name}: must rise, found [{low}, {high}]; write [{high}, {low}]")
    ends = [phase.until for phase in augment.resolution]
    if any(later <= end for end, later in pairwise(ends)):
        raise ConfigError(f"augment.resolution: until must rise from phase to phase, found {show(ends)}")
    if data.source == "synthetic" and data.validation_size >= data.synthetic_train_size:
        raise ConfigError(
            f"data.validation_size: {data.validation_size} leaves no training image of"
            f" data.synthetic_train_size={data.synthetic_train_size}; make it smaller"
        )
    if config.run.name in ("", ".", "..") or any(character in config.run.name for character in "/$\n\t"):
        raise ConfigError(f"run.name: must be a name without '/' and '$', found {brief(config.run.name)}")


def _check_optimizer(config: Config) -> None:
    """Raises `ConfigError` for what an optimizer or a strategy cannot do, before anything takes long."""
    optimizer, strategy = config.optimizer, config.strategy
    zero = strategy.name == "deepspeed" and strategy.zero_stage > 0
    sharded = f"strategy.name={strategy.name}" + (f" with strategy.zero_stage={strategy.zero_stage}" if zero else "")
    if optimizer.name == "muon" and (zero or strategy.name == "fsdp"):
        raise ConfigError(
            f"optimizer.name: muon needs whole matrices and {sharded} gives each rank a part of them; choose"
            " strategy.name=exact or ddp, or another optimizer"
        )
    if zero and (optimizer.groups or not optimizer.decay_norms_and_biases):
        field = "groups" if optimizer.groups else "decay_norms_and_biases"
        raise ConfigError(
            f"optimizer.{field}: {sharded} steps one group after the other, where clipping needs the norm of all;"
            " choose strategy.name=fsdp or ddp, or strategy.zero_stage=0"
        )
    of_whole_weights = {
        f"average.name: {config.average.name} needs": config.average.name != "none",
        "optimizer.groups: epochs of a group need": any(rule.epochs is not None for rule in optimizer.groups),
    }
    for needs, is_set in of_whole_weights.items():
        if is_set and strategy.name in ("deepspeed", "fsdp"):
            raise ConfigError(
                f"{needs} whole weights on every rank and strategy.name={strategy.name} shards them; choose"
                " strategy.name=exact or ddp"
            )
    if config.compute.compile == "on" and strategy.name == "fsdp":
        raise ConfigError(
            "compute.compile: on does not go with strategy.name=fsdp: its blocks would be compiled one by one, and the"
            " backward pass of one fail over what another did to the statistics; set compute.compile=off or auto"
        )
    milestones = list(config.schedule.milestone_epochs)
    if config.schedule.name == "multistep" and milestones != sorted(milestones):
        raise ConfigError(f"schedule.milestone_epochs: must rise, found {show(milestones)}")


def _field_docs() -> dict[str, str]:
    """Key to the docstring under its field."""
    try:
        source = inspect.getsource(schema) + inspect.getsource(optimizer_schema)
    except OSError:
        return {}
    by_class = {section.__name__: name for name, section in SECTIONS.items()}
    docs: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in by_class:
            for statement, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                    key = f"{by_class[node.name]}.{ast.unparse(statement.target)}"
                    docs[key] = " ".join(ast.literal_eval(text.value).split())
    return docs
