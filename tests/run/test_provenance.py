"""Which revision of the source made a result, and which kernels."""

from __future__ import annotations

import subprocess

import pytest
import torch

import dist_cifar
from dist_cifar.run import provenance
from dist_cifar.run.provenance import (
    choose_kernels,
    git_revision,
    hardware,
    numerics_fingerprint,
)


def test_the_history_of_a_project_around_the_package_is_not_its_own(tmp_path, monkeypatch):
    package = tmp_path / "site/dist_cifar"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.invalid", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setattr(dist_cifar, "__file__", str(package / "__init__.py"))
    assert git_revision() is None
    subprocess.run([*git, "add", "site"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision() == head


@pytest.mark.parametrize(
    ("processor", "named"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family 25, model 17), 2 cores"),
        ({"model name": "AMD EPYC 9654", "cpu family": "25", "model": "17"}, "AMD EPYC 9654, 2 cores"),
        ({"model name": "Some ARM"}, "Some ARM, 2 cores"),
    ],
)
def test_processors_that_a_hypervisor_gives_one_name_are_told_apart(monkeypatch, processor, named):
    monkeypatch.setattr(provenance, "_processor", lambda *keys: next(processor.get(key, "") for key in keys))
    monkeypatch.setattr(provenance, "available_cores", lambda: 2)
    assert hardware() == named


def test_cudnn_chooses_by_the_clock_only_where_no_bits_are_promised(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    choose_kernels(torch.device("cpu"), bitwise=False)
    assert not torch.backends.cudnn.benchmark
    choose_kernels(torch.device("cuda", 0), bitwise=False)
    assert torch.backends.cudnn.benchmark
    choose_kernels(torch.device("cuda", 0), bitwise=True)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", ["NVIDIA_TF32_OVERRIDE", "CUBLASLT_WORKSPACE_SIZE"])
def test_what_changes_a_gpus_kernels_is_in_its_numerics(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    before = numerics_fingerprint(torch.device("cuda", 0))
    monkeypatch.setenv(name, "1")
    assert numerics_fingerprint(torch.device("cuda", 0)) == before | {name: "1"} != before
