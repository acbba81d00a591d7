"""What the README tells a user to type is valid."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from PIL import Image

from dist_cifar import cli
from dist_cifar.config import Config, flatten, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
BLOCKS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
DOORS = r"dist_cifar/train\.py|dist_cifar train|dist-cifar train"
TRAINING = [line for line in BLOCKS if re.search(DOORS, line)]


def test_there_are_commands():
    assert len(TRAINING) >= 9


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_parse(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line.replace("--config FILE key=value ...", "--config configs/quickstart.yaml train.epochs=3"))
    launcher = words[words.index("--config_file") + 1] if "--config_file" in words else None
    assert launcher is None or (REPOSITORY / launcher).is_file()
    start = next(i for i, word in enumerate(words) if word in ("dist_cifar/train.py", "train"))
    options = cli._parser().parse_args(["train", *words[start + 1 :]])
    load_config(options.config, options.overrides)


@pytest.mark.parametrize(
    "line", [line for line in BLOCKS if re.search(r"dist[_-]cifar (verify|data|submit|doctor)", line)]
)
def test_other_commands_parse(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word in ("verify", "data", "submit", "doctor"))
    options = cli._parser().parse_args(words[start:])
    load_config(options.config, options.overrides)


@pytest.mark.slow
def test_commands_about_a_run_do_what_they_say(tmp_path, monkeypatch):
    """The whole block, as typed, beside two little runs and a picture."""
    (block,) = [block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "dist_cifar predict" in block]
    for name in ("other", "quickstart"):
        small_runs.run(tmp_path / "runs" / name, f"run.name={name}")
    (tmp_path / "folder").mkdir()
    for path in ("photo.png", "folder/one.jpg"):
        Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / path)
    environ = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    for line in block.splitlines():
        subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environ, check=True, timeout=120)
    assert (tmp_path / "both.html").exists() and (tmp_path / "runs/quickstart/export/model.onnx").exists()


@pytest.mark.parametrize("target", re.findall(r"(?m)^make (\w+)", "\n".join(BLOCKS)))
def test_make_targets_exist(target):
    assert re.search(rf"(?m)^{target}:", MAKEFILE)


def test_relative_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / link).exists(), link


def test_figures_are_those_of_the_committed_results():
    specification = importlib.util.spec_from_file_location("readme", REPOSITORY / "benchmarks/readme.py")
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
