"""The quota of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_cifar.distributed import cores
from dist_cifar.distributed.cores import available_cores, cores_near, cpu_quota

V1 = "5:cpuset:/\n4:cpu,cpuacct:/d\n1:name=systemd:/d\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container with a namespace of its own
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "cpu.max": "800000 100000"}, 4.0),
        (
            V1,
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "200000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"},
            2,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
        ("0::/\n", {"cpu.max": "rubbish"}, None),
        ("", {"cpu.max": "150000 100000\n"}, None),
    ],
)
def test_the_quota_of_either_version(tmp_path, own, files, quota):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "own") == quota


def test_without_control_groups_there_is_no_quota():
    assert cpu_quota(Path("/nowhere"), Path("/nowhere")) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.5, 1), (1.5, 1), (3.0, 3), (64.0, 4)])
def test_cores_are_those_of_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert available_cores() == expected


GPU = "0000:3b:00.0"


@pytest.mark.parametrize(
    ("near", "nodes", "allowed", "bound"),
    [
        ("8-15\n", ["0-7", "8-15"], range(16), range(8, 16)),
        ("4-7,12-15", ["0-3,8-11", "4-7,12-15"], range(16), [4, 5, 6, 7, 12, 13, 14, 15]),
        ("8-15", ["0-7", "8-15"], range(4, 12), range(8, 12)),
        ("8-15", ["0-7", "8-15"], range(8), range(8)),  # none of them is this job's
        ("8-15", ["0-7", "8-15"], range(9), range(9)),  # one is: too few for the ranks of that node
        ("0-15", ["0-15"], range(16), range(16)),
        ("0-15", [], range(16), range(16)),  # a kernel without NUMA
        ("rubbish", ["0-7", "8-15"], range(16), range(16)),
        (None, ["0-7", "8-15"], range(16), range(16)),
    ],
)
def test_the_cores_near_a_gpu(tmp_path, near, nodes, allowed, bound):
    files = {f"devices/system/node/node{i}/cpulist": text for i, text in enumerate(nodes)}
    files |= {"devices/system/node/possible": "0-1"} | (
        {} if near is None else {f"bus/pci/devices/{GPU}/local_cpulist": near}
    )
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores_near(GPU, set(allowed), tmp_path) == set(bound)
