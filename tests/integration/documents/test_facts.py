"""What the pages under docs/ name exists, and what they compute is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from types import ModuleType

import numpy as np
import pytest
import torch

import dist_cifar
from dist_cifar.config import Config, describe, load_config
from dist_cifar.config.schema import SECTIONS
from dist_cifar.data.batching import share
from dist_cifar.errors import ConfigError
from dist_cifar.run import training_sums
from dist_cifar.run.provenance import numerics_fingerprint
from dist_cifar.strategy import reduction_queue
from dist_cifar.strategy.tree_nodes import nodes_of
from dist_cifar.strategy.tree_reduce import TreeAccumulator
from tests import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
EXACTNESS = (DOCS / "exactness.md").read_text()
TESTS = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
PACKAGE = "\n".join(path.read_text() for path in (REPOSITORY / "dist_cifar").rglob("*.py"))
WRITTEN = {"runs", "data", "wandb", "build", "dist"}
"""Folders that a checkout has once it was used."""
FOLDERS = sorted(
    path.name for path in REPOSITORY.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in WRITTEN
)


OVERRIDES = re.compile(r"[a-z]+\.\w+=\S+( [a-z]+\.\w+=\S+)+")
"""Several `key=value`s."""


def quoted(page: str) -> list[str]:
    """What stands in backticks within a line."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?s)^```.*?^```", "", page, flags=re.MULTILINE))


def wrong_names(page: str) -> list[str]:
    """What a page names that does not exist: files, tests, config fields and their values, files of a run."""
    keys = {key for key, *_ in describe()}
    wrong = []
    for name in (name for words in quoted(page) for name in (words.split() if OVERRIDES.fullmatch(words) else [words])):
        field = re.fullmatch(rf"((?:{'|'.join(SECTIONS)})\.(?!onnx|pt2|safetensors)\w+)(=.*)?", name)
        if re.match(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*$", name):
            exists = (REPOSITORY / name).exists()
        elif re.fullmatch(r"test_\w+", name):
            exists = f"def {name}(" in TESTS or f'"{name}"' in PACKAGE
        elif re.fullmatch(r"\w+\.(jsonl?|yaml)", name):
            exists = f'"{name}"' in PACKAGE or (REPOSITORY / "launch/accelerate" / name).exists()
        elif field:
            exists = field[1] in keys and (field[2] is None or is_accepted(name))
        else:
            continue
        if not exists:
            wrong.append(name)
    return wrong


def is_accepted(override: str) -> bool:
    try:
        load_config(None, [override])
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    assert wrong_names(page.read_text()) == []


@pytest.mark.parametrize(
    "name",
    [
        "`tests/test_trees.py`",
        "`test_a_right_fold_is_another_sum`",
        "`batch.virtual_rank`",
        "`strategy.name=exactly`",
        "`digest.jsonl`",
        "`nine_gpus.yaml`",
        "`data.source=folder data.roots=images.zip`",
    ],
)
def test_wrong_names_are_found(name):
    assert len(wrong_names(f"{EXACTNESS}\nSee {name}.\n")) == 1


# --- docs/exactness.md -------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    """A script of benchmarks/publish/ as a module."""
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / f"benchmarks/publish/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_script_draws():
    assert (DOCS / "tree.svg").read_text() == script("tree_picture").picture()


def test_make_docs_calls_every_script():
    scripts = {f"benchmarks/publish/{path.name}" for path in (REPOSITORY / "benchmarks/publish").glob("*.py")}
    target = (REPOSITORY / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
    assert scripts == set(re.findall(r"benchmarks/publish/\w+\.py", target))


def test_all_numerics_are_named_and_no_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    names = {name for device in ("cpu", "cuda") for name in numerics_fingerprint(torch.device(device))}
    rows = re.findall(r"(?m)^\|(?: numerics| on a CPU| on a GPU|) \|([^|:]*):", EXACTNESS)
    in_table = {name for row in rows for name in quoted(row) if "." not in name}
    assert in_table == names


def test_all_mutants_are_named():
    tree = ast.parse((REPOSITORY / "tests/strategy/test_exact.py").read_text())
    (mutants,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "MUTANTS")
    names = [key.value for key in mutants.keys]
    assert len(names) >= 4 and [name for name in names if f'"{name}"' not in EXACTNESS] == []


def test_the_sums_of_the_example_are_those_of_float32():
    one, tenth, fifth = np.float32(1), np.float32(0.1), np.float32(0.2)
    assert f"(1 + 0.1) + 0.2 = {(one + tenth) + fifth:.9g}\n" in EXACTNESS
    assert f"1 + (0.1 + 0.2) = {one + (tenth + fifth):.9g}\n" in EXACTNESS


def test_the_partial_sums_of_a_rank_are_as_many_as_the_page_says():
    most = []
    for leaves in (8, 4, 2, 1):
        tree, kept = TreeAccumulator(leaves), [0]
        for leaf in range(leaves - 1):
            tree.add((leaf, leaf + 1), [torch.ones(1)])
            kept.append(len(tree._sums))
        most.append(max(kept))
    assert "{}, {}, {} and {} for V = 8".format(*most) in EXACTNESS


def test_constants_are_those_of_the_code():
    assert Config().strategy.virtual_ranks == 8 and "from 1 to `strategy.virtual_ranks` (8 by default)" in EXACTNESS
    nodes = [nodes_of(share(rank, parts=3, count=8), leaves=8) for rank in range(3)]
    assert nodes[1] == [(2, 4), (4, 5)] and "2, 3 and 4 of 8" in EXACTNESS
    assert f"at least {reduction_queue.BUCKET_BYTES // 2**20} MiB" in EXACTNESS
    assert training_sums._QUANTUM == 2.0**-24 and "2^-24" in EXACTNESS
    assert 2**53 * training_sums._QUANTUM > 500e6 and "more than 500 million" in EXACTNESS


# --- docs/slurm.md -----------------------------------------------------------------------------------------------

SLURM = (DOCS / "slurm.md").read_text()
SCRIPTS = {path.name: path.read_text() for path in (REPOSITORY / "slurm").iterdir() if path.is_file()}
SOURCES = re.sub(r'"\s*f?"', "", PACKAGE + "\n".join(SCRIPTS.values()))
"""With strings that go on in the next line put together."""


def first_column(heading: str) -> list[str]:
    """What stands in backticks in the first column of the table below a heading."""
    table = SLURM.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)]


@pytest.mark.parametrize(
    "message", [name for name in first_column("Messages") if not name.startswith(("sbatch: ", "slurm/"))]
)
def test_messages_are_what_is_said(message):
    """The longest part of it that is not a value."""
    part = max(re.split(r"\d+|[A-Z]{4,}|\(.*?\)|crashed", message), key=len)
    assert len(part) >= 9 and part in SOURCES


@pytest.mark.parametrize("option", first_column("The scripts"))
def test_options_of_the_scripts_exist(option):
    if option.startswith("slurm/"):
        assert option.removeprefix("slurm/") in SCRIPTS
    else:
        assert re.search(rf"^#+SBATCH {re.escape(option)}|^{option}=", SCRIPTS["train.sbatch"], re.MULTILINE)


def test_every_script_and_option_is_described():
    described = set(first_column("The scripts"))
    assert described >= {f"slurm/{name}" for name in SCRIPTS}
    settings = re.findall(r"^#+SBATCH (--[\w-]+)|^(\w+)=", SCRIPTS["train.sbatch"] + SCRIPTS["train_srun.sbatch"], re.M)
    known = {name.partition("=")[0] for name in described} | {"--job-name", "--output", "--ntasks-per-node"}
    assert {option or variable for option, variable in settings} <= known


# --- docs/configuration.md ----------------------------------------------------------------------------------------


def test_the_reference_is_what_its_script_writes():
    reference = script("config_reference")
    assert (DOCS / "configuration.md") == reference.PAGE
    assert reference.PAGE.read_text() == reference.page()


# --- docs/api.md -------------------------------------------------------------------------------------------------


def test_the_api_is_what_its_script_writes():
    reference = script("api_reference")
    assert (DOCS / "api.md") == reference.PAGE
    assert reference.PAGE.read_text() == reference.page()


def test_every_public_name_is_on_the_page_of_the_api():
    reference = script("api_reference")
    assert sorted(name for names in reference.SECTIONS.values() for name in names) == dist_cifar.__all__


# --- docs/troubleshooting.md --------------------------------------------------------------------------------------

TROUBLES = (DOCS / "troubleshooting.md").read_text()
QUOTED = [
    part
    for row in re.findall(r"(?m)^\| (`.*?`) \|", TROUBLES)
    for message in re.findall(r"`(.+?)`", row)
    for part in message.split("...")
    if len(part.strip()) > 6
]


@pytest.mark.parametrize("part", QUOTED)
def test_troubles_are_what_is_said(part):
    assert part.strip(" ?") in SOURCES


def test_there_are_troubles():
    assert len(QUOTED) >= 20
