"""Fixtures of the whole suite."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dist_cifar.config import Config, load_config
from dist_cifar.distributed.launch_env import lone_environ
from dist_cifar.tracking.console import LineHandler
from tests.rank_pool import RankPool

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's caches, uses the user's W&B key or takes the suite for a rank of a job."""
    patch = pytest.MonkeyPatch()
    kept = lone_environ(os.environ)
    for name in list(os.environ):
        if name not in kept or name == "OMP_NUM_THREADS" or name.startswith(("WANDB_", "ACCELERATE_", "SLURM_")):
            patch.delenv(name)
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
    for name in ("no_proxy", "NO_PROXY"):
        patch.setenv(name, "localhost,127.0.0.1")
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def same_environment(clean_environment: None) -> Iterator[None]:
    """A test that is itself a rank of a job leaves what that sets, gloo's interface for one, to no other test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory, clean_environment: None) -> Iterator[RankPool]:
    """Gloo ranks."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more of them torch's own kernels are kept, or a sum is rounded otherwise."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the package logs for the person in front of it, as they come."""
    lines: list[str] = []
    logger, handler = logging.getLogger("dist_cifar"), LineHandler(lines.append)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """`tiny("key=value", ...)`: a config that trains in a second, with its run directory below `tmp_path`."""

    def make(*overrides: str) -> Config:
        values = {
            "run.dir": str(tmp_path / "run"),
            "run.device": "cpu",
            "run.log_every_steps": "2",
            "data.source": "synthetic",
            "data.synthetic_train_size": "120",
            "data.synthetic_test_size": "40",
            "data.validation_size": "40",
            "model.name": "resnet8",
            "batch.global_size": "16",
            "optimizer.warmup_epochs": "1",
            "train.epochs": "2",
            "compute.precision": "fp32",
            "strategy.name": "ddp",
            "tracking.wandb": "disabled",
        }
        values |= dict(override.split("=", 1) for override in overrides)
        return load_config(None, [f"{key}={value}" for key, value in values.items()])

    return make
