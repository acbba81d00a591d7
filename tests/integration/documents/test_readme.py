"""The figures of the pages are those of the results, and the fields that the README names exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from dist_cifar.config import Config, flatten
from tests import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_figures_are_those_of_the_committed_results():
    specification = importlib.util.spec_from_file_location("readme", REPOSITORY / "benchmarks/publish/tables.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for page in module.BLOCKS:
        text = (REPOSITORY / page).read_text()
        assert module.updated(page, text) == text
    assert module.updated("README.md", README.replace("images/s, one core", "images/s on a core")) == README


def test_fields_that_the_readme_names_exist():
    known = flatten(Config())
    sections = "|".join({key.partition(".")[0] for key in known})
    named = set(re.findall(rf"`((?:{sections})\.(?!safetensors|onnx)[a-z_]+)(?:=[^`]*)?`", README))
    assert len(named) >= 5 and named <= known.keys()
