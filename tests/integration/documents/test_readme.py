"""The README is one screen; the figures of the pages are those of the results, and the fields that they name exist."""

from __future__ import annotations

import importlib.util
import re

from dist_cifar.config import Config, flatten
from tests import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))]
MOST_WORDS = 800
"""More do not fit on a screen and the next; the rest has pages of its own."""


def test_the_readme_is_short():
    assert 300 < len(re.findall(r"[\w/.-]*\w[\w/.-]*", re.sub(r"\]\([^)]*\)|<!--.*?-->", "", README))) < MOST_WORDS


def test_figures_are_those_of_the_committed_results():
    specification = importlib.util.spec_from_file_location("tables", REPOSITORY / "benchmarks/publish/tables.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for page in module.BLOCKS:
        text = (REPOSITORY / page).read_text()
        assert module.updated(page, text) == text
    assert module.updated("README.md", README.replace("damaged checkpoints", "damaged files")) == README


def test_fields_that_the_pages_name_exist():
    known = flatten(Config())
    sections = "|".join({key.partition(".")[0] for key in known})
    field = rf"`((?:{sections})\.(?!safetensors|onnx|pt2)[a-z_]+)(?:=[^`]*)?`"
    named = {name for page in PAGES for name in re.findall(field, page)}
    assert len(named) >= 30 and named <= known.keys()
