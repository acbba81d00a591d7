"""Where a batch is augmented: what `data.device_augment` means on which device."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

from dist_cifar.augment import kernel, place
from dist_cifar.augment.policy import draw
from dist_cifar.cli import main
from dist_cifar.config import AugmentConfig
from dist_cifar.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # the import then raises ImportError


@pytest.mark.parametrize(("setting", "device"), [("auto", CPU), ("cpu", CPU), ("cpu", GPU)])
def test_the_cpu_augments(setting, device):
    assert not place.augments_on_device(setting, device)


@pytest.mark.parametrize("setting", ["auto", "device"])
def test_a_gpu_augments_where_triton_is(setting, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: {"triton": None}[name])
    assert place.augments_on_device(setting, GPU)


def test_auto_does_without_triton(triton_is_missing):
    assert not place.augments_on_device("auto", GPU)


def test_device_without_triton_is_an_error(triton_is_missing):
    with pytest.raises(ConfigError, match=r"data\.device_augment: device was set and triton cannot be imported"):
        place.augments_on_device("device", GPU)


def test_device_on_a_cpu_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["train", f"run.dir={tmp_path}/run", "run.device=cpu", "data.device_augment=device"]) == 2
    error = capsys.readouterr().err
    assert "data.device_augment: device was set and this run is on the CPU" in error and error.count("\n") == 1


def test_the_cpu_augmenter_is_the_kernel():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    mean, std, indices = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), np.array([3, 19, 3])
    params = draw(AugmentConfig(), seed=0, epoch=0, indices=indices)
    found = place.augmenter(images, mean, std, on_device=None)(indices, params)
    assert torch.equal(found, kernel.augment(images, indices, params, mean, std))
