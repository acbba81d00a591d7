"""The components from outside the package that a config names, found and checked before anything starts.

Contract: `load_components` imports them; a config that names none imports nothing.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from dist_cifar.config.marks import Names
from dist_cifar.config.optimizer_schema import OptimizerConfig
from dist_cifar.config.schema import HINTS, Config
from dist_cifar.config.yaml_text import show
from dist_cifar.errors import ConfigError
from dist_cifar.plugins import check_options, files_of, find


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments with which the package calls a component of a kind, beside the options."""

    given: tuple[str, ...] = ()
    positional: int = 0


_CALLS = {
    "model": _Call(given=("num_classes",)),
    "data_source": _Call(),
    "optimizer": _Call(given=("lr",), positional=1),
    "schedule": _Call(positional=1),
    "augmentation": _Call(positional=2),
    "tracker": _Call(positional=2),
    "strategy": _Call(given=("communicator", "plan", "make_optimizer"), positional=2),
}
_OF_OURS = ("weight_decay", "betas", "eps", "momentum", "nesterov", "decoupled_decay")
"""The fields of `optimizer` that an optimizer from outside the package does not read."""
_OPTIONS = {"transform": "transform_options"}
"""The field of the options of a name, where it is not `options`."""


def load_components(config: Config) -> None:
    """Imports everything that `config` names as `module:attribute` and checks the options against its signature.

    Raises `ConfigError`, which names the file and the line where there is one.
    """
    for section, name in (("model", "name"), ("data", "source"), ("optimizer", "name"), ("schedule", "name")):
        value = getattr(getattr(config, section), name)
        if getattr(config, section).options and not is_own(config, section, name):
            raise ConfigError(
                f"{section}.options: are for what is from outside the package; the settings of {section}.{name}={value}"
                " are fields of the config"
            )
    if is_own(config, "optimizer"):
        _check_own_optimizer(config.optimizer)
    for kind, section, name, value in own_components(config):
        key = f"{section}.{name}"
        component = find(kind, key, value)
        options_name = _OPTIONS.get(name, "options")
        options = getattr(getattr(config, section), options_name, {})
        call = _CALLS[kind]
        check_options(component, options, key=f"{section}.{options_name}", given=call.given, positional=call.positional)


def _check_own_optimizer(config: OptimizerConfig) -> None:
    defaults = OptimizerConfig()
    for field in _OF_OURS:
        value = getattr(config, field)
        if value != getattr(defaults, field):
            raise ConfigError(
                f"optimizer.{field}: {show(value)} was set, which optimizer.name={config.name} does not read; set"
                f" optimizer.options.{field}, and leave this at {show(getattr(defaults, field))}"
            )


def own_files(config: Config) -> dict[str, str]:
    """What the result of `config` depends on besides the package: the SHA-256 of each file of the user's own, by its
    path, and the version of each installed package that was named. Raises `ConfigError` where one cannot be imported.
    """
    found: dict[str, str] = {}
    for kind, section, field, name in own_components(config):
        find(kind, f"{section}.{field}", name)
        found |= files_of(kind, name)
    return dict(sorted(found.items()))


def is_own(config: Config, section: str, name: str = "name") -> bool:
    """Whether the field names a component from outside the package."""
    return getattr(getattr(config, section), name) not in known_names(section, name)


def known_names(section: str, field: str) -> tuple[str, ...]:
    """The names that a field takes without a colon: those of the package's own components."""
    return next(_marks(HINTS[section][field])).known


def own_components(config: Config) -> Iterator[tuple[str, str, str, str]]:
    """(kind, section, field, name) of every component from outside that the config names."""
    for section, hints in HINTS.items():
        for field, hint in hints.items():
            names = next(_marks(hint), None)
            value = getattr(getattr(config, section), field)
            for one in () if names is None or value is None else value if isinstance(value, tuple) else (value,):
                if names is not None and one not in names.known:
                    yield names.kind, section, field, one


def _marks(hint: Any) -> Iterator[Names]:
    if isinstance(hint, Names):
        yield hint
    for inner in typing.get_args(hint):
        yield from _marks(inner)
