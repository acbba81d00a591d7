"""The files of a component: those of its imports, wherever they stand and whatever the process has imported."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from dist_cifar.plugin_files import files_of_module, files_of_object


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A function that writes files and imports one of them."""

    def imported(name: str, files: dict[str, str]):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    before = set(sys.modules)
    yield imported
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


FILES = {
    "mine/__init__.py": "",
    "mine/model.py": "from . import layers\nfrom .deep.part import x\nimport numpy, loose\ndef f():\n    import late\n",
    "mine/layers.py": "y = 2\n",
    "mine/deep/__init__.py": "",
    "mine/deep/part.py": "from ..layers import y\nx = 1\n",
    "loose.py": "",
    "late.py": "",
    "unused.py": "",
}


def test_every_file_that_is_imported_below_the_same_folder_counts(imported, tmp_path, monkeypatch):
    module = imported("mine.model", FILES)
    found = files_of_module(module)
    assert set(found) == set(FILES) - {"unused.py"}
    assert found["loose.py"] == hashlib.sha256(b"").hexdigest()
    importlib.import_module("late")
    monkeypatch.chdir(Path("/"))
    assert files_of_module(module) == found
    (tmp_path / "mine/layers.py").write_text("y = 3\n")
    assert files_of_module(module) != found


def test_imports_in_a_circle_end(imported):
    module = imported("one", {"one.py": "import two\n", "two.py": "import one\n"})
    assert set(files_of_module(module)) == {"one.py", "two.py"}


def test_of_an_installed_package_the_version_counts_and_of_python_nothing():
    import numpy as np

    assert files_of_module(np) == {"numpy": np.__version__}
    assert files_of_module(sys) == {}


def test_an_object_of_a_script_is_known_by_its_text(monkeypatch):
    def own(): ...

    monkeypatch.setattr(own, "__module__", "__main__")
    (name,) = files_of_object(own)
    assert name.startswith("__main__:") and name.endswith("own")
    typed: dict[str, object] = {"__name__": "__main__"}
    exec("def f(): ...", typed)
    assert files_of_object(typed["f"]) == {}


def test_an_object_of_a_module_has_the_files_of_the_module(imported):
    module = imported("alone", {"alone.py": "def f(): ...\n"})
    assert set(files_of_object(module.f)) == {"alone.py"}
