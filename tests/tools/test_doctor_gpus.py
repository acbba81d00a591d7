"""What the doctor says of GPUs that are not there: their links, their memory, the cores of their ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.tools.doctor import machine, network

GPU = torch.device("cuda", 0)
ONE_HOST = DistEnv(rank=0, world_size=2, local_rank=0, local_world_size=2)
TWO_HOSTS = DistEnv(rank=0, world_size=4, local_rank=0, local_world_size=2, master_addr="localhost")
NVLINK = (
    "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPXB\t0-31\nGPU1\tNV18\t X \tSYS\t0-31\nNIC0\tPXB\tSYS\t X\n"
)
PCIE = NVLINK.replace("NV18", "PHB").replace("PXB", "NV2")  # a card's own name is no link between GPUs


@pytest.fixture
def host(monkeypatch, tmp_path):
    """`host(topology, peers)`: two GPUs of a host, and a folder of what Linux knows of its ports."""

    def make(topology: str | None, peers: bool = True) -> Path:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: peers)
        folder = tmp_path / "bin"
        folder.mkdir()
        if topology is not None:
            program = folder / "nvidia-smi"
            program.write_text(f"#!/bin/sh\ncat <<'end'\n{topology}end\n")
            program.chmod(0o755)
            monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        else:
            monkeypatch.setenv("PATH", str(folder))
        return tmp_path / "class"

    return make


def add_port(system: Path, card: str, state: str, rate: str) -> None:
    port = system / "infiniband" / card / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")


@pytest.mark.parametrize(
    ("topology", "peers", "gigabytes", "source"),
    [
        (NVLINK, True, 200, "NVLink"),
        (PCIE, True, 20, "PCI Express"),
        (None, True, 20, "PCI Express"),
        (NVLINK, False, 5, "one host, whose GPUs do not reach each other's memory"),
    ],
)
def test_within_a_host(host, topology, peers, gigabytes, source):
    system = host(topology, peers)
    assert network.expected_bytes_per_second(ONE_HOST, GPU, system) == (gigabytes * 1e9, source)
    assert network.expected_bytes_per_second(ONE_HOST, torch.device("cpu"), system) == (0.2e9, "one host")


def test_between_hosts_all_active_ports_count(host):
    system = host(NVLINK)
    add_port(system, "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    add_port(system, "mlx5_1", "4: ACTIVE", "200 Gb/sec (4X HDR)")
    add_port(system, "mlx5_2", "1: DOWN", "40 Gb/sec (4X QDR)")
    found = network.expected_bytes_per_second(TWO_HOSTS, GPU, system)
    assert found == (75e9, "2 InfiniBand ports of 400, 200 Gbit/s")
    for card in range(3, 8):
        add_port(system, f"mlx5_{card}", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    assert network.expected_bytes_per_second(TWO_HOSTS, GPU, system)[0] == 200e9  # NVLink is slower than all of them


def test_without_infiniband_the_interface_counts(host):
    system = host(NVLINK)
    speed = system / "net/lo/speed"
    speed.parent.mkdir(parents=True)
    speed.write_text("25000\n")
    assert network.expected_bytes_per_second(TWO_HOSTS, GPU, system) == (25e9 / 8, "lo of 25 Gbit/s")
    add_port(system, "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    assert network.expected_bytes_per_second(TWO_HOSTS, torch.device("cpu"), system) == (25e9 / 8, "lo of 25 Gbit/s")


@pytest.mark.parametrize(("cores", "state"), [(16, "ok"), (8, "ok"), (7, "warning"), (1, "failed")])
def test_a_rank_of_a_gpu_needs_cores(monkeypatch, cores, state):
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    assert machine.check_cores(GPU, ONE_HOST).state == state
    assert machine.check_cores(torch.device("cpu"), ONE_HOST).state == "ok"


@pytest.mark.parametrize(("free", "state"), [(79, "ok"), (60, "warning")])
def test_memory_that_others_use_is_a_warning(host, monkeypatch, free, state):
    host(NVLINK)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    found = machine.check_gpus(GPU)
    assert found.state == state and ("20.0 GiB of 80.0 GiB" in found.found) == (state == "warning"), found
