"""Which device a rank gets, with GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from dist_cifar.distributed import cores
from dist_cifar.distributed.device import bind_to_cores_near, choose_device, sees_only_its_own, visible_gpus
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError, LaunchError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """`gpus(count)`: torch sees so many; returns the list of those that are chosen."""

    def see(count: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see


def rank(local_rank: int, local_world_size: int, launcher: str = "torchrun") -> DistEnv:
    return DistEnv(
        rank=local_rank,
        world_size=local_world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        launcher=launcher,
    )


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_a_rank_gets_the_gpu_of_its_number(gpus, setting):
    chosen = gpus(4)
    assert [choose_device(setting, rank(i, 4)) for i in range(4)] == [torch.device("cuda", i) for i in range(4)]
    assert chosen == [0, 1, 2, 3] and visible_gpus(setting) == 4


@pytest.mark.parametrize(("setting", "count"), [("cpu", 4), ("auto", 0)])
def test_the_cpu(gpus, setting, count):
    assert not gpus(count) and visible_gpus(setting) == 0
    assert choose_device(setting, rank(1, 2)) == torch.device("cpu")


def test_accelerate_can_force_the_cpu_but_not_against_the_config(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device("auto", DistEnv()) == torch.device("cpu") and visible_gpus("auto") == 0
    assert choose_device("cuda", DistEnv()) == torch.device("cuda", 0) and visible_gpus("cuda") == 1


def test_a_missing_gpu_is_an_error(gpus):
    gpus(0)
    with pytest.raises(ConfigError, match=r"run\.device: cuda was set and torch finds no GPU.*fix the driver"):
        choose_device("cuda", DistEnv())
    gpus(2)
    with pytest.raises(LaunchError, match="launch: 3 ranks on this node and 2 GPUs"):
        choose_device("auto", rank(2, 3))


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "mpi", "flux"])
def test_a_rank_may_see_only_its_own_gpu(gpus, launcher):
    chosen = gpus(1)
    assert [choose_device("auto", rank(i, 2, launcher)) for i in range(2)] == [torch.device("cuda", 0)] * 2
    assert chosen == [0, 0]
    assert sees_only_its_own(rank(1, 2, launcher), 1) and not sees_only_its_own(rank(0, 1, launcher), 1)
    assert not sees_only_its_own(rank(1, 2, launcher), 2)


def test_counting_imports_no_torch_where_the_cpu_was_asked_for():
    code = "import sys; from dist_cifar.distributed.device import visible_gpus; assert not visible_gpus('cpu')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def test_a_rank_is_bound_to_the_cores_of_its_gpu(tmp_path, monkeypatch):
    lists = {"bus/pci/devices/0001:c1:00.0/local_cpulist": "2-3\n"}
    lists |= {"devices/system/node/node0/cpulist": "0-1\n", "devices/system/node/node1/cpulist": "2-3\n"}
    for name, text in lists.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    bound: list[set[int]] = []
    monkeypatch.setattr(cores.cores_near, "__defaults__", (tmp_path,))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, allowed: bound.append(allowed), raising=False)
    place = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    bind_to_cores_near(torch.device("cpu"))
    assert bound == []
    bind_to_cores_near(torch.device("cuda", 3))
    assert bound == [{2, 3}]
