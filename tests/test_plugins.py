"""Names from outside the package: where they are looked up, what is said of mistakes, which files are part of a run."""

from __future__ import annotations

import hashlib
import importlib
import linecache
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cifar import plugins
from dist_cifar.config import Config, ModelConfig, load_components, load_config, own_files
from dist_cifar.errors import ConfigError

GOOD = """
    from torch import nn
    class Net(nn.Module):
        def __init__(self, num_classes: int, width: int = 8, mode: str = "a"):
            super().__init__()
    def needs(*, num_classes, depth): ...
    def no_classes(width=3): ...
    number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with a function that writes a module there; what is imported from it is forgotten."""
    before = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    monkeypatch.setattr(plugins, "_imported", {})
    yield write
    sys.path[:] = before[1]
    for name in set(sys.modules) - before[0]:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_components(load_config(None, list(overrides)))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=own_modl:Net"], "there is no own_modl.py in .*; did you mean own_model?"),
        (["model.name=own_model:Nat"], "own_model.py has no Nat; did you mean Net?"),
        (["model.name=own_model:number"], "is of type int; name a class or a function"),
        (["model.name=own_model:Net", "model.options.widht=4"], "Net has no such option; did you mean width?"),
        (["model.name=own_model:Net", "model.options.width=wide"], "model.options.width: must be int, found 'wide'"),
        (["model.name=own_model:Net", "model.options.width=true"], "must be int, found True"),
        (["model.name=own_model:Net", "model.options.num_classes=4"], "is given to Net by the training; leave it out"),
        (["model.name=own_model:needs"], "model.options.depth: needs needs it and it has no default"),
        (["model.name=own_model:no_classes"], "no_classes takes no argument num_classes"),
        (["model.name=torchvision:resnt18"], "torchvision has no classification model resnt18; did you mean resnet18?"),
        (["schedule.name=own_model:gone"], "schedule.name=own_model:gone: own_model.py has no gone"),
    ],
)
def test_a_mistake_is_one_line(folder, overrides, message):
    folder("own_model.py", GOOD)
    text = error_of(*overrides)
    before, _, after = message.partition(".*")
    assert before in text and after in text, text


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("import math\nmath.nothing\n", "line 2", "AttributeError"),
        ("def f(:\n", "line 1: SyntaxError: ", "invalid syntax"),
        ("import no_such_package\n", "line 1", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def g():\n    raise ValueError('two\\nlines')\ng()\n", "line 2", "ValueError: two lines"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(folder, text, where, what):
    folder("broken.py", text)
    line = error_of("model.name=broken:Net")
    assert line.startswith("model.name=broken:Net: importing it fails: broken.py, ") and where in line and what in line
    assert line.count("broken.py") == 1


def test_a_module_that_ends_the_program_is_refused(folder):
    folder("ends.py", "import sys; sys.exit(3)")
    assert "importing it ends the program" in error_of("model.name=ends:Net")


def test_good_names_and_options_pass_and_their_files_are_known(folder):
    helper = folder("helper.py", "x = 1\n")
    own = folder("own_model.py", "import helper\n" + textwrap.dedent(GOOD))
    config = load_config(None, ["model.name=own_model:Net", "model.options.width=16"])
    load_components(config)
    assert own_files(config) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (helper, own)}


def test_of_an_installed_package_the_version_is_known(folder):
    config = load_config(None, ["optimizer.name=torch.optim:SGD", "optimizer.options.momentum=0.9"])
    load_components(config)
    assert own_files(config) == {"torch": torch.__version__.partition("+")[0]}


def test_a_config_that_names_nothing_from_outside_imports_nothing(folder, monkeypatch):
    monkeypatch.setattr(plugins, "import_module", lambda *_: pytest.fail("imported"))
    load_components(Config())


def test_a_registered_name_is_a_value_of_its_field_and_the_nearest_one_is_a_hint(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})

    @plugins.register_model("mlp")
    def mlp(*, num_classes: int, width: int = 8): ...

    config = load_config(None, ["model.name=mlp", "model.options.width=9"])
    assert config.model == ModelConfig(name="mlp", options={"width": 9})
    load_components(config)
    assert plugins.find("model", "model.name", "mlp") is mlp
    assert "did you mean mlp?" in error_of("model.name=mlq")
    assert "tests/test_plugins.py" in own_files(config) and own_files(Config()) == {}


def test_a_name_of_the_package_cannot_be_registered_and_used(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_optimizer("sgd")(lambda parameters, lr: None)
    assert "sgd is the package's own; register yours under another name" in error_of("optimizer.name=sgd")


@pytest.mark.parametrize("name", ["a:b", " ", ""])
def test_a_name_that_could_not_be_found_again_is_not_registered(name):
    with pytest.raises(ConfigError, match="cannot be a name"):
        plugins.register_model(name)


def test_registrations_reach_another_process(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})
    entry = plugins.Registration(kind="tracker", name="mine", component=print, files={"a.py": "0"})
    plugins.restore([entry])
    assert plugins.registrations() == [entry]
    assert plugins.find("tracker", "tracking.also", "mine") is print
    assert plugins.files_of("tracker", "mine") == {"a.py": "0"}


def test_what_an_earlier_run_of_the_process_depended_on_is_not_of_this_one(folder):
    folder("helper.py", "x = 1\n")
    for name in ("own_model.py", "other_model.py"):
        folder(name, "import helper\n" + textwrap.dedent(GOOD))
    first, second = (load_config(None, [f"model.name={name}:Net"]) for name in ("own_model", "other_model"))
    before = own_files(first)
    assert own_files(second).keys() == {"helper.py", "other_model.py"}
    assert own_files(first) == before and before.keys() == {"helper.py", "own_model.py"}


def test_the_hash_of_a_file_is_that_of_the_code_which_was_imported(folder):
    path, config = folder("own_model.py", GOOD), load_config(None, ["model.name=own_model:Net"])
    hashes = []
    for number in (0, 1):
        path.write_text(path.read_text() + f"    # edit {number}\n")
        hashes.append(own_files(config)["own_model.py"])
    assert hashes[0] == hashes[1] != hashlib.sha256(path.read_bytes()).hexdigest()
    importlib.reload(sys.modules["own_model"])
    assert own_files(config) == {"own_model.py": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("file", ["<dynamic-code>", "/tmp/ipykernel_12/345.py"])
def test_code_of_a_notebook_is_named_by_its_function(file):
    names: dict[str, Any] = {}
    exec(compile("def forward():\n    raise ValueError('mine')", file, "exec"), names)
    with pytest.raises(ValueError) as caught:
        names["forward"]()
    error = plugins.broken("model.name=net", caught.value, "its forward pass")
    assert str(error) == "model.name=net: its forward pass fails: in forward, line 2: ValueError: mine"


def test_a_class_of_a_notebook_is_known_by_its_methods(monkeypatch):
    """A cell is a file that only `linecache` knows, and its classes have a module without a file."""
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None)
    sources = []
    for number in (1, 1, 2):
        cell = f"class Net:\n    def forward(self, images):\n        return {number} * images\n"
        monkeypatch.setitem(linecache.cache, "<cell>", (len(cell), None, cell.splitlines(keepends=True), "<cell>"))
        names = {"__name__": "__main__"}
        exec(compile(cell, "<cell>", "exec"), names)
        plugins.register_model("net")(names["Net"])
        sources.append(plugins.files_of("model", "net"))
    assert sources[0].keys() == {"__main__:Net"} and sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        ("int", [1], [1.0, True, "1", None]),
        ("float", [1, 1.5], [True, "1"]),
        ("str | None", ["a", None], [1]),
        ("bool", [True], [1]),
        ("list[int]", [[1, 2]], [1, "a"]),
        ("typing.Literal['a', 'b']", ["a"], ["c"]),
        ("dict", [{"a": 1}], [[1]]),
        ("torch.Size", [1, "a"], []),
    ],
)
def test_options_are_checked_against_annotations(hint, good, bad):
    namespace: dict[str, object] = {}
    exec(f"import typing, torch\ndef f(x: {hint}): ...", namespace)
    for value in good:
        plugins.check_options(namespace["f"], {"x": value}, key="k")
    for value in bad:
        with pytest.raises(ConfigError, match=r"k.x: must be"):
            plugins.check_options(namespace["f"], {"x": value}, key="k")
