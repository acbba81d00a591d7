"""What several commands share of their options: the config, and types that check a number or a path.

Contract: a path that cannot be written is an error before the work begins whose result it is for.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dist_cifar.errors import nearest_path

if TYPE_CHECKING:
    from dist_cifar.config import Config

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
"""What `add_subparsers` returns."""


def add_config(parser: argparse.ArgumentParser, *, example: str) -> None:
    """Adds `--config` and the overrides, of which the help shows `example`."""
    parser.add_argument("--config", type=path, metavar="FILE", help="YAML file; default: configs/cifar10_resnet18.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"config fields, e.g. {example}")


def config_of(options: argparse.Namespace) -> Config:
    """The config that the options give. Raises `ConfigError`."""
    from dist_cifar.config import load_config

    return load_config(options.config, options.overrides)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Adds the option that DeepSpeed's launcher puts before all that the user has written, also before the command."""
    parser.add_argument(
        "--local_rank", "--local-rank", dest="local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)


def port(text: str) -> int:
    """A TCP port; 0 stands for any that is free."""
    if count(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: they end at 65535")
    return int(text)


def path(text: str) -> Path:
    """A path; the shell has not expanded the `~` of `--option=~/name`."""
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such home; write the path out") from None


def new_file(text: str) -> Path:
    """A file that can be written."""
    file = path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file in it")
    if file.exists() and not file.is_file():  # a device or a pipe, which is written through
        if not os.access(file, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} is not writable; give another one")
        return file
    _require_writable(Path(os.path.realpath(file)).parent if file.is_symlink() else file.parent, text)
    return file


def new_folder(text: str) -> Path:
    """A folder that exists and can be written, or that can be made."""
    folder = path(text)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    _require_writable(existing, text)
    return folder


def _require_writable(folder: Path, text: str) -> None:
    """Raises `ArgumentTypeError`, which quotes the argument `text`, unless files can be made in `folder`."""
    if not folder.exists():
        near = nearest_path(folder)
        hint = f"did you mean {near / Path(text).name}?" if near and near.is_dir() else "make it first"
        raise argparse.ArgumentTypeError(f"{text} cannot be written: there is no folder {folder}; {hint}")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is no folder; choose another one")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {folder} is not writable; choose another folder")
