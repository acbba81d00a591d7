"""Tests of `own_warnings` and of pytest's `filterwarnings`: this package's warnings fail a test, others do not."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dist_cifar
from tests.own_warnings import own_warnings

PACKAGE = Path(dist_cifar.__file__).parent


WARNS = "import warnings; warnings.warn('old', FutureWarning)"


def warn_from(module: str) -> None:
    """Warns as a line of a module of that name would."""
    exec(WARNS, {"__name__": module})


@pytest.mark.parametrize("module", ["dist_cifar", "dist_cifar.train", "dist_cifar.strategy.ddp"])
def test_a_warning_of_this_package_is_an_error_in_the_suite(module):
    with pytest.raises(FutureWarning, match="old"):
        warn_from(module)


@pytest.mark.parametrize("module", ["torch.nn", "dist_cifar_plugin", "other.dist_cifar"])
def test_a_warning_of_another_package_is_none(module):
    with warnings.catch_warnings(record=True) as caught:  # by the filters of pyproject.toml
        warn_from(module)
    assert [str(one.message) for one in caught] == ["old"]


def printed_by(path: str) -> str:
    """What Python prints of a warning at that path."""
    program = f"exec(compile({WARNS!r}, {path!r}, 'exec'))"
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert f"{path}:1: FutureWarning: old" in done.stderr
    return done.stderr


@pytest.mark.parametrize("path", [f"{PACKAGE}/train.py", f"{PACKAGE}/strategy/ddp.py", "dist_cifar/train.py"])
def test_a_line_of_this_package_is_found(path):
    (line,) = own_warnings(f"loading\n{printed_by(path)}done\n")
    assert line.startswith(path)
    assert own_warnings(f"[rank1]: {line}\n"), "a launcher may put the rank before it"


@pytest.mark.parametrize(
    "path", [f"{PACKAGE.parent}/.venv/lib/python3/site-packages/torch/x.py", "/srv/dist_cifar/torch/x.py"]
)
def test_a_line_of_another_package_is_not(path):
    assert own_warnings(printed_by(path)) == []


def test_other_words_are_not():
    assert own_warnings(f"{PACKAGE}/train.py:3: in main\n[W123 socket.cpp:7] Warning: slow\nUserWarning: x\n") == []
