"""The names of `import dist_cifar`: lazy, typed, and the same in each list of them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import dist_cifar
from tests import REPOSITORY


@pytest.mark.parametrize("name", dist_cifar.__all__)
def test_every_public_name_is_there_and_has_a_docstring(name):
    assert getattr(dist_cifar, name).__doc__ and name in dir(dist_cifar)


def test_all_lists_have_the_same_names():
    tree = ast.parse((REPOSITORY / "dist_cifar/__init__.py").read_text())
    typed = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    found = {name: f"dist_cifar.{module}:{name}" for name, module in dist_cifar._MODULES.items()}
    assert typed == found and sorted(found) == dist_cifar.__all__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dist_cifar' has no attribute 'trian'"):
        _ = dist_cifar.trian


def test_what_only_launches_imports_no_torch():
    code = (
        "import sys, dist_cifar as dc; dc.load_config, dc.launch, dc.train, dc.RunResult, dc.UserError;"
        " sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_the_front_door_does_not_hide_the_function_of_its_name():
    code = "import dist_cifar.train; from dist_cifar.api.training import train; assert dist_cifar.train is train"
    for before in ("", "import dist_cifar; dist_cifar.train; "):
        subprocess.run([sys.executable, "-c", before + code], cwd=REPOSITORY, check=True)
