"""Where a batch is augmented: what `augment.backend` means on which device."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest
import torch

from dist_cifar import stopping
from dist_cifar.augment import backend, cpu
from dist_cifar.augment.image import ImageStats
from dist_cifar.augment.params import sample_params
from dist_cifar.cli import main
from dist_cifar.config import AugmentConfig
from dist_cifar.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # the import then raises ImportError


@pytest.mark.parametrize(("setting", "device"), [("auto", CPU), ("cpu", CPU), ("cpu", GPU)])
def test_the_cpu_augments(setting, device):
    assert not backend.augments_on_device(setting, device)


@pytest.mark.parametrize("setting", ["auto", "device"])
def test_a_gpu_augments_where_triton_is(setting, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: {"triton": None}[name])
    assert backend.augments_on_device(setting, GPU)


def test_auto_does_without_triton(triton_is_missing):
    assert not backend.augments_on_device("auto", GPU)


def test_device_without_triton_is_an_error(triton_is_missing):
    with pytest.raises(ConfigError, match=r"augment\.backend: device was set and triton cannot be imported"):
        backend.augments_on_device("device", GPU)


def test_device_on_a_cpu_run_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "install", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it: this puts it back
    assert main(["train", f"run.dir={tmp_path}/run", "run.device=cpu", "augment.backend=device"]) == 2
    error = capsys.readouterr().err
    assert "augment.backend: device was set and this run is on the CPU" in error and error.count("\n") == 1


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
STATS = ImageStats(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def made(setting: str) -> backend.Augmenter:
    return backend.augmenter(setting, IMAGES, STATS, device=CPU)


def is_the_kernel(augment: backend.Augmenter) -> bool:
    indices = np.array([3, 19, 3])
    params = sample_params(AugmentConfig(), seed=0, epoch=0, indices=indices)
    return torch.equal(augment(indices, params), cpu.augment(IMAGES, indices, params, STATS))


def test_the_cpu_augmenter_is_the_kernel(said):
    assert is_the_kernel(made("auto")) and said == []


def right(images, stats, device):
    return lambda indices, params: cpu.augment(images, indices, params, stats)


def one_bit_off(images, stats, device):
    def augment(indices, params):
        out = cpu.augment(images, indices, params, stats)
        out[-1, 2, 31, 31] = torch.nextafter(out[-1, 2, 31, 31], torch.tensor(9.0))
        return out

    return augment


def broken(images, stats, device):
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def fake(monkeypatch):
    """A device augmenter of ours in the place of the real one, on a machine that has a GPU and triton."""

    def use(augmenter):
        module = types.SimpleNamespace(DeviceAugmenter=augmenter)
        monkeypatch.setitem(sys.modules, "dist_cifar.augment.triton_gpu", module)
        monkeypatch.setattr(backend, "augments_on_device", lambda setting, device: True)

    return use


def test_a_device_that_gives_the_bits_of_the_cpu_is_used(fake, said):
    fake(right)
    assert made("auto").__qualname__.startswith("right") and said == []
    assert made("device").__qualname__.startswith("right")


@pytest.mark.parametrize(
    ("augmenter", "reason"),
    [(one_bit_off, "it does not give the bits of the CPU"), (broken, "RuntimeError: no kernel image is available")],
)
def test_a_device_that_does_not_is_found_out(fake, said, augmenter, reason):
    fake(augmenter)
    assert is_the_kernel(made("auto"))
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(ConfigError, match=reason):
        made("device")
