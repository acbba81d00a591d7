"""Whole little runs for the commands that read run directories, and what one rank of them is."""

from __future__ import annotations

import torch

from dist_cifar.config import load_config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.tools.report import ReportTracker
from dist_cifar.trainer import train

VALUES = {
    "run.device": "cpu",
    "run.log_every_steps": "2",
    "data.source": "synthetic",
    "data.synthetic_train_size": "240",
    "data.synthetic_test_size": "80",
    "data.validation_size": "40",
    "model.name": "resnet8",
    "batch.global_size": "16",
    "train.epochs": "2",
    "compute.precision": "fp32",
    "tracking.wandb": "disabled",
}


def alone() -> Communicator:
    """The communicator of one rank, on the CPU."""
    return Communicator(DistEnv(), device=torch.device("cpu"), timeout_seconds=60)


def run(path, *overrides: str) -> None:
    """Trains for some seconds on one rank, in this process."""
    values = VALUES | {"run.dir": str(path)} | dict(override.split("=", 1) for override in overrides)
    config = load_config(None, [f"{key}={value}" for key, value in values.items()])
    assert train(config, alone(), trackers=[ReportTracker])
