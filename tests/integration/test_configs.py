"""Every experiment of configs/ builds and runs two steps."""

from __future__ import annotations

import json

import pytest

from dist_cifar.config import Config, load_config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.trainer import train
from tests import REPOSITORY

FILES = sorted((REPOSITORY / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if path.stem != "sweep"]
"""All but W&B's file of a sweep; see `tests/tracking/test_wandb_tracker.py`."""


def run(communicator: Communicator, config: Config) -> bool:
    return train(config, communicator)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(ranks, tmp_path, path):
    """On few and generated images and in small batches, with all else as the file says."""
    overrides = [
        "data.source=synthetic",
        "data.synthetic_train_size=300",
        "data.synthetic_test_size=20",
        "data.validation_size=20",
        "batch.global_size=64",
        "train.max_steps=2",
        "run.device=cpu",
        "compute.precision=auto",  # bf16 that is emulated takes minutes
        "tracking.wandb=disabled",
        f"run.dir={tmp_path}",
    ]
    assert ranks.run(2, run, load_config(path, overrides)) == [True, True]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["name"] == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_says_source_result_and_command(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert all(
        any(line.startswith(f"# {word}:") for line in header) for word in ("Source", "Expected result", "Command")
    )


def test_there_are_experiments():
    assert len(CONFIGS) >= 3
