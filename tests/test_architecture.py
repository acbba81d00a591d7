"""The house keeps its order: imports run downwards, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY

PACKAGE = REPOSITORY / "dist_cifar"
ORDER = [
    ["errors", "file_lock", "terminal", "plugin_files"],
    ["stopping", "plugins", "nn"],
    ["config"],
    ["distributed"],
    ["ops"],
    ["state"],
    ["augment", "optim"],
    ["models"],
    ["run"],
    ["data"],
    ["evaluate"],
    ["tta"],
    ["strategy"],
    ["tracking"],
    ["trainer"],
    ["inference"],
    ["tools"],
    ["job"],
    ["api"],
    ["cli"],
    ["train", "__main__"],
]
"""The rooms from the bottom of the imports to their top. A room imports from itself and from rows above its own: those
of one row do not know each other."""
ONLY_IN = {
    "torch.distributed": ("distributed", "optim", "strategy"),
    "accelerate": ("strategy", "tracking"),
    "wandb": ("tracking",),
    "deepspeed": ("strategy",),
    "torchvision": ("augment", "models"),
    "timm": ("models",),
    "jinja2": ("tools",),
    "onnxscript": ("tools",),
    "onnxruntime": ("tools",),
    "psutil": ("distributed", "tools"),
    "cloudpickle": ("api", "plugins"),
}
"""Where a package may be imported."""
NO_DISTRIBUTION = ("augment", "models")
FILE_LINES, FUNCTION_LINES = 400, 60
READ_FIRST = (
    "trainer.py",
    "state.py",
    "evaluate.py",
    "data/batching.py",
    "data/sampler.py",
    "optim/lr_schedule.py",
    "strategy/base.py",
    "strategy/ddp.py",
    "strategy/exact.py",
    "strategy/tree_reduce.py",
)
"""What one reads to understand a training."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(PACKAGE).as_posix() for path in paths]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row(name: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if name in rooms)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, at_run_time: bool = False) -> Iterator[str]:
    """Every module that is imported anywhere in the file; with `at_run_time`, when the file itself is imported."""
    nodes: list[ast.AST] = list(ast.walk(tree(path)))
    if at_run_time:
        nodes = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_imports_run_downwards(path):
    if path == PACKAGE / "__init__.py":
        return
    here = room(path)
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        there = rest.split(".")[0]
        if package == "dist_cifar" and any(there in rooms for rooms in ORDER):
            assert there == here or row(there) < row(here), f"{path.name} imports {imported}"
        for package, rooms in ONLY_IN.items():
            assert not uses(imported, package) or here in rooms, f"{path.name} imports {imported}"
        if here in NO_DISTRIBUTION:
            assert not uses(imported, "dist_cifar.distributed") and not uses(imported, "torch.distributed")


def test_the_order_names_every_room():
    assert {room(path) for path in modules()} - {"__init__"} == {name for rooms in ORDER for name in rooms}


def test_an_import_that_runs_upwards_is_found(tmp_path, monkeypatch):
    """The mutant."""
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops/fast.py"
    path.write_text("def f():\n    from dist_cifar.trainer import Trainer\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match=r"fast\.py imports dist_cifar\.trainer"):
        test_imports_run_downwards(path)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_is_a_circle():
    known = {module_name(path) for path in modules()}
    graph = {}
    for path in modules():
        name = module_name(path)
        found = {
            imported if imported in known else imported.rpartition(".")[0]
            for imported in imports(path, at_run_time=True)
        }
        graph[name] = (found & known) - {name}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_every_module_states_its_contract(path):
    assert ast.get_docstring(tree(path)) or not path.read_text().strip()


def test_no_strategy_is_asked_for_by_name():
    """A strategy states its properties; who needs one asks for it."""
    for path in modules():
        if room(path) in ("strategy", "config"):
            continue
        literals = [node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)]
        assert "exact" not in literals, path


def test_files_and_functions_are_short_enough_to_read():
    """A sign, not a law: what is longer is listed here, so that it is a decision."""
    long_files = {name for path, name in zip(modules(), names(modules()), strict=True) if lines(path) > FILE_LINES}
    assert long_files <= LONG_FILES, long_files - LONG_FILES
    long_functions = {
        f"{name}:{node.name}"
        for path, name in zip(modules(), names(modules()), strict=True)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert long_functions <= LONG_FUNCTIONS, long_functions - LONG_FUNCTIONS


LONG_FILES = {"run/checkpoint.py"}
LONG_FUNCTIONS: set[str] = set()


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_what_one_reads_to_understand_a_training_is_short():
    assert sum(lines(PACKAGE / name) for name in READ_FIRST) < 1400
    assert lines(PACKAGE / "trainer.py") < 300


@pytest.mark.parametrize("command", ["import dist_cifar", "from dist_cifar.cli import main; main(['--help'])"])
def test_help_imports_nothing_heavy(command):
    heavy = ("torch", "numpy", "accelerate", "jinja2", "psutil", "tqdm", "numba")
    code = (
        f"import sys, contextlib\nwith contextlib.suppress(SystemExit):\n    {command}\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
