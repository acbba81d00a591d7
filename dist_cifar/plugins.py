"""Components from outside the package: names that stand for code which a user has written beside their own work.

Contract: a name is `module:attribute`, looked up from the current directory, then among installed packages, or one
that a `register_*` decorator has registered. Whatever is wrong with the code behind it is a `ConfigError` of one line
that names the file and the line. The files behind it are known by their SHA-256, which is part of the run.
Nothing here imports torch; what a module imports is its own affair.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dist_cifar.errors import ConfigError, did_you_mean, nearest, one_line
from dist_cifar.plugin_files import files_of_module, files_of_object

_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_][\w./-]*")
_CELL = re.compile(r"<dynamic-code>|.*/ipykernel_\d+/\d+\.py")
"""The file of code that has none: in a rank that cloudpickle has brought it to, and in a notebook."""
KINDS = ("model", "data_source", "optimizer", "schedule", "augmentation", "tracker", "strategy")
"""What can be brought from outside."""

_HUBS = {
    ("model", "timm"): "dist_cifar.models.hubs:timm",
    ("model", "torchvision"): "dist_cifar.models.hubs:torchvision",
}
"""Packages whose names are looked up by a function of ours: `function(name, origin)` returns the component."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A component that a decorator has registered."""

    kind: str
    name: str
    component: Any
    files: dict[str, str]
    """See `files_of`."""


_registered: dict[tuple[str, str], Registration] = {}
"""By kind and name."""
_imported: dict[str, tuple[object, dict[str, str]]] = {}
"""By the name of a module: the import that has read it, which is another one after a reload, and its files then."""


# --- names -------------------------------------------------------------------------------------------------------


def is_reference(name: str) -> bool:
    """Whether `name` has the form `module:attribute`."""
    return _REFERENCE.fullmatch(name) is not None


def registered_names(kind: str) -> list[str]:
    """The names that have been registered for a kind of component."""
    return [name for known, name in _registered if known == kind]


def register(kind: str, name: str) -> Callable[[T], T]:
    """Registers the decorated object under `name`, for this process and those that it starts with `launch`.

    Raises `ConfigError` for a name that has a colon, which would be looked up in a module.
    """
    if ":" in name or not name.strip():
        raise ConfigError(f"register_{kind}: {name!r} cannot be a name; use letters, digits and _")

    def enter(component: T) -> T:
        _registered[kind, name] = Registration(
            kind=kind, name=name, component=component, files=files_of_object(component)
        )
        return component

    return enter


def register_model(name: str) -> Callable[[T], T]:
    """Registers a builder of networks: `build(*, num_classes, **options)` returns a `torch.nn.Module`."""
    return register("model", name)


def register_data_source(name: str) -> Callable[[T], T]:
    """Registers a function `load(**options)` that returns arrays, or a subclass of `Source`."""
    return register("data_source", name)


def register_optimizer(name: str) -> Callable[[T], T]:
    """Registers a `torch.optim.Optimizer`, made as `make(parameters, lr=..., **options)`."""
    return register("optimizer", name)


def register_schedule(name: str) -> Callable[[T], T]:
    """Registers a schedule: `make(context, **options)` returns a function of the step or an `LRSchedule`."""
    return register("schedule", name)


def register_augmentation(name: str) -> Callable[[T], T]:
    """Registers a function `transform(image, generator, **options)` of one image."""
    return register("augmentation", name)


def register_tracker(name: str) -> Callable[[T], T]:
    """Registers a tracker, made as `make(config, run_dir)`."""
    return register("tracker", name)


def register_strategy(name: str) -> Callable[[T], T]:
    """Registers a strategy, made as the package's own are."""
    return register("strategy", name)


def registrations() -> list[Registration]:
    """Everything that has been registered."""
    return list(_registered.values())


def restore(entries: list[Registration]) -> None:
    """Registers in this process what `registrations` returned in another one."""
    _registered.update({(entry.kind, entry.name): entry for entry in entries})


def files_of(kind: str, name: str) -> dict[str, str]:
    """What the component `name`, which has been found, depends on: see `dist_cifar.plugin_files`."""
    if (kind, name) in _registered:
        return _registered[kind, name].files
    return _imported[name.partition(":")[0]][1]


def pickled_registrations(kind: str) -> bytes:
    """The registrations of a kind for a process that is started; nothing where there are none."""
    entries = [entry for entry in registrations() if entry.kind == kind]
    if not entries:
        return b""
    import cloudpickle  # functions of a notebook have no module that could be imported

    pickled: bytes = cloudpickle.dumps(entries)
    return pickled


def find(kind: str, key: str, name: str) -> Any:
    """The object that the config's `key` calls `name`, which is registered or a reference. Raises `ConfigError`."""
    if (kind, name) in _registered:
        return _registered[kind, name].component
    module_name, _, attribute = name.partition(":")
    found: Any = import_module(module_name, f"{key}={name}")
    if (kind, module_name) in _HUBS:
        hub, _, function = _HUBS[kind, module_name].partition(":")
        return getattr(importlib.import_module(hub), function)(attribute, f"{key}={name}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"{key}={name}: {_place(module_name)} has no {part}{did_you_mean(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}={name}: is of type {type(found).__name__}; name a class or a function")
    return found


# --- importing ---------------------------------------------------------------------------------------------------


def import_module(name: str, origin: str) -> types.ModuleType:
    """Imports the module `name`, from the current directory if it lies there. Raises `ConfigError`.

    `origin` begins the error's message, e.g. `model.name=my_models:Net`.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            files = [path.stem for path in Path.cwd().glob("*.py")]
            raise ConfigError(
                f"{origin}: there is no {error.name}.py in {here} and no package of that name is installed"
                f"{did_you_mean(name, files)}"
            ) from None
        raise broken(origin, error, "importing it") from None
    except Exception as error:
        raise broken(origin, error, "importing it") from None
    except SystemExit as error:
        raise ConfigError(f"{origin}: importing it ends the program ({error}); move that below `if __name__`") from None
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # for what it imports later
    if name not in _imported or _imported[name][0] is not module.__spec__:
        _imported[name] = module.__spec__, files_of_module(module)
    return module


# --- errors ------------------------------------------------------------------------------------------------------


def broken(origin: str, error: BaseException, doing: str) -> ConfigError:
    """The line for an exception of the user's own code: which file and line raised it, and what."""
    what = one_line(error)
    if isinstance(error, SyntaxError) and error.filename:
        what = error.msg  # the rest is the place
        where = f"{_shown(error.filename)}, line {error.lineno}: "
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _is_own(frame.filename)]
        where = f"{_shown(own[-1].filename, own[-1].name)}, line {own[-1].lineno}: " if own else ""
    return ConfigError(f"{origin}: {doing} fails: {where}{type(error).__name__}: {what}")


def _is_own(filename: str) -> bool:
    """Whether a file is neither this package's nor installed nor Python's own."""
    if _CELL.fullmatch(filename):
        return True
    path = Path(filename)
    inside = ("site-packages", "dist-packages", "lib", "lib64")
    return path.suffix == ".py" and not path.is_relative_to(Path(__file__).parent) and not set(inside) & set(path.parts)


def _shown(filename: str, function: str = "") -> str:
    if _CELL.fullmatch(filename):
        return f"in {function}"
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _place(module_name: str) -> str:
    file = getattr(sys.modules[module_name], "__file__", None)
    return module_name if file is None else _shown(file)


# --- options -----------------------------------------------------------------------------------------------------


def check_options(
    component: Any, options: Mapping[str, Any], *, key: str, given: tuple[str, ...] = (), positional: int = 0
) -> None:
    """Checks `options` against the signature of what is going to be called with them.

    `key` is the config's field of the options; `given` names the arguments that the package gives itself, beside the
    first `positional` ones. Raises `ConfigError` for an option that is unknown, missing or of a type that its
    annotation excludes.
    """
    try:
        parameters = inspect.signature(component).parameters
        hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except (TypeError, ValueError, NameError):  # of C code, or with names that exist for type checkers alone
        return
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    named = named[positional:]
    own = [name for name in named if name not in given]
    what = getattr(component, "__name__", "it")
    for name in given:
        if name not in named and not takes_all:
            raise ConfigError(f"{key}: {what} takes no argument {name}, which every such component is given; add it")
    for name, value in options.items():
        if name in given:
            raise ConfigError(f"{key}.{name}: is given to {what} by the training; leave it out")
        if name not in own and not takes_all:
            meant = nearest(name, own)
            hint = f"did you mean {meant}?" if meant else f"it takes {', '.join(own) or 'none'}"
            raise ConfigError(f"{key}.{name}: {what} has no such option; {hint}")
        if name in hints and not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise ConfigError(f"{key}.{name}: must be {kind}, found {value!r}")
    missing = [name for name in own if parameters[name].default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: {what} needs it and it has no default; set {key}.{missing[0]}=VALUE")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML may be of the annotated type; of annotations that are not simple ones, yes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if hint in (list, tuple) or origin in (list, tuple):
        return isinstance(value, list | tuple)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    return True
