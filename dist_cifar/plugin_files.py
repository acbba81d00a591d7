"""Which files a component from outside the package depends on, each with its SHA-256.

Contract: a function of the files alone, so a run has the same ones whatever else its process has imported: the file of
a module, and those below the same folder that it imports, wherever in it, and so on. Of an installed package the
version stands for its files. A component without a module, of a notebook or a script, is known by its own text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = {"site-packages", "dist-packages"}


def files_of_module(module: types.ModuleType) -> dict[str, str]:
    """SHA-256 by the path below the folder from which `module` was imported; or the version by an installed package."""
    file = getattr(module, "__file__", None)
    package = module.__name__.partition(".")[0]
    if file is None or _INSTALLED & set(Path(file).parts):
        return _version(package)
    path = Path(file).resolve()
    root = path.parents[module.__name__.count(".") + (path.name == "__init__.py")]
    found: dict[str, str] = {}
    pending = [path]
    while pending:
        path = pending.pop()
        name = path.relative_to(root).as_posix()
        if name not in found:
            content = path.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
            pending += _imported(content, path, root)
    return dict(sorted(found.items()))


def files_of_object(component: Any) -> dict[str, str]:
    """The files of the module in which `component` was defined; of a notebook's or a script's, its own text."""
    module = sys.modules.get(getattr(component, "__module__", None) or "")
    if module is not None and module.__name__ != "__main__":
        return files_of_module(module)
    try:
        text = _text(component)
    except (OSError, TypeError):
        return {}  # typed at a prompt: there is nothing to compare
    return {f"__main__:{component.__qualname__}": hashlib.sha256(text.encode()).hexdigest()}


def _text(component: Any) -> str:
    """The source of a function or class. Of a notebook's classes Python finds only the methods."""
    try:
        return inspect.getsource(component)
    except (OSError, TypeError):
        methods = [value for value in vars(component).values() if inspect.isfunction(value)]
        if not methods:
            raise
        return "".join(map(inspect.getsource, methods))


def _version(package: str) -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}  # a part of Python


def _imported(content: bytes, path: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that a file imports, this package's own left out."""
    for name in _imported_names(content, path, root):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:count])
            for candidate in (place.with_suffix(".py"), place / "__init__.py"):
                if candidate.is_file() and not candidate.resolve().is_relative_to(_PACKAGE):
                    yield candidate


def _imported_names(content: bytes, path: Path, root: Path) -> Iterator[str]:
    """The absolute names of all modules, and of what may be one, in a file's imports."""
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = path.relative_to(root).parts[:-1]
            base = [*folders[: len(folders) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
