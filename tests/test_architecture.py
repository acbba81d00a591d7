"""The house keeps its order: imports run downwards, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY

PACKAGE = REPOSITORY / "dist_cifar"
ORDER = [
    "errors",
    "signals",
    "allocator",
    "deadline",
    "files",
    "config",
    "schedule",
    "jit",
    "rng",
    "data",
    "augment",
    "model",
    "convolution",
    "normalization",
    "precision",
    "profile",
    "numerics",
    "metrics",
    "distributed",
    "strategy",
    "checkpoint",
    "predictions",
    "tracking",
    "evaluate",
    "display",
    "rundir",
    "inference",
    "report",
    "watch",
    "train",
    "bench",
    "verify",
    "doctor",
    "submit",
    "cli",
    "__main__",
]
"""From the bottom of the imports to their top: a module imports from its own and from earlier ones."""
ONLY_IN = {
    "torch.distributed": ("distributed", "strategy"),
    "accelerate": ("strategy", "tracking"),
    "wandb": ("tracking",),
    "deepspeed": ("strategy",),
    "torchvision": ("augment",),
    "onnxscript": ("inference",),
    "onnxruntime": ("inference",),
}
NO_DISTRIBUTION = ("augment", "model", "convolution", "normalization")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in the file, but for the front door at its top."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                assert inner.level == 0, f"{path}: relative import"
                yield from (f"{inner.module}.{alias.name}" for alias in inner.names)


def uses(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_run_downwards(path):
    if path == PACKAGE / "__init__.py":
        assert not list(imports(path))
        return
    place = ORDER.index(room(path))
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        if package == "dist_cifar" and rest.split(".")[0] in ORDER:
            assert ORDER.index(rest.split(".")[0]) <= place, f"{path.name} imports {imported}"
        for package, rooms in ONLY_IN.items():
            assert not uses(imported, package) or room(path) in rooms, f"{path.name} imports {imported}"
        if room(path) in NO_DISTRIBUTION:
            assert not uses(imported, "dist_cifar.distributed") and not uses(imported, "torch.distributed")


def test_the_order_names_every_room():
    assert {room(path) for path in modules()} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_module_states_its_contract(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()
