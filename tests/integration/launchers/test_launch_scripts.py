"""`launch/`: each script and file started as a person starts it, and the weights that come out."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_cifar.config import Config, to_yaml
from tests import PATIENCE_SECONDS, REPOSITORY

LAUNCH = REPOSITORY / "launch"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    return {}


@pytest.fixture
def config(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """A config in strategy exact: one hash for any number of ranks."""
    path = tmp_path / "tiny.yaml"
    fields = ("strategy.name=exact", "train.epochs=6", "run.log_every_steps=1", "checkpoint.every_steps=3")
    path.write_text(to_yaml(tiny(*fields)))
    return path


def start(command: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What they have printed; all must have ended well."""
    printed = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return printed


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture
def require_golden(golden: dict[str, str], config: Path, tmp_path: Path) -> Callable[[Path, int], None]:
    """Fails unless a run directory holds a run of so many ranks with the weights of a plain one."""

    def check(directory: Path, world_size: int) -> None:
        if not golden:
            plain = tmp_path / "plain"
            finish(
                start(
                    [sys.executable, "-m", "dist_cifar", "train", "--config", str(config), f"run.dir={plain}"], tmp_path
                )
            )
            golden["sha256"] = summary(plain)["weights_sha256"]
        assert summary(directory)["world_size"] == world_size
        assert summary(directory)["weights_sha256"] == golden["sha256"]

    return check


def own_address() -> str:
    """An address of this machine that other machines could reach; loopback would not do for several nodes."""
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    assert addresses, "this machine has no network"
    return addresses[0]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_local(config, require_golden, tmp_path):
    (printed,) = finish(start([str(LAUNCH / "local.sh"), "--config", str(config)], tmp_path))
    assert "launch/local.sh: no GPU; 2 CPU ranks" in printed
    require_golden(tmp_path / "run", 2)


@pytest.mark.slow
def test_local_with_a_number_of_ranks(config, require_golden, tmp_path):
    finish(start([str(LAUNCH / "local.sh"), "--ranks", "1", "--config", str(config)], Path("/")))
    require_golden(tmp_path / "run", 1)


@pytest.mark.slow
def test_accelerate_on_two_nodes(config, require_golden, tmp_path):
    command = [
        "accelerate",
        "launch",
        "--config_file",
        str(LAUNCH / "accelerate/two_nodes.yaml"),
        "--num_processes",
        "2",
    ]
    command += ["--main_process_ip", own_address(), "--main_process_port", free_port()]
    train = [str(REPOSITORY / "dist_cifar/train.py"), "--config", str(config)]
    finish(
        *(
            start([*command, "--machine_rank", str(node), *train], tmp_path, ACCELERATE_USE_CPU="true")
            for node in (0, 1)
        )
    )
    require_golden(tmp_path / "run", 2)


@pytest.mark.slow
def test_accelerate_on_one_gpu_without_it(config, require_golden, tmp_path):
    command = ["accelerate", "launch", "--config_file", str(LAUNCH / "accelerate/one_gpu.yaml")]
    finish(start([*command, "-m", "dist_cifar.train", "--config", str(config)], tmp_path))
    require_golden(tmp_path / "run", 1)


PROCESSES = {"cpu": 2, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16, "deepspeed": 8, "fsdp": 8}
"""What each of Accelerate's files starts."""


@pytest.mark.parametrize(("name", "processes"), PROCESSES.items())
def test_accelerate_reads_its_files(name, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(LAUNCH / f"accelerate/{name}.yaml")).num_processes == processes
    assert {path.stem for path in LAUNCH.glob("accelerate/*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("local.sh", ["--ranks", "two"], {}, "launch/local.sh: --ranks wants a number, found 'two'"),
        ("local.sh", ["--ranks"], {}, "launch/local.sh: --ranks wants a number, found ''"),
        ("local.sh", [], {"PATH": "/usr/bin:/bin"}, "launch/local.sh: there is no torchrun; activate"),
        ("torchrun.sh", [], {"PATH": "/usr/bin:/bin"}, "launch/torchrun.sh: there is no torchrun; activate"),
        ("torchrun.sh", [], {"NODES": "2"}, "launch/torchrun.sh: NODES=2 without HEAD"),
        ("torchrun.sh", [], {"NODES": "0"}, "launch/torchrun.sh: NODES wants at least 1"),
        ("torchrun.sh", [], {"RANKS": "08"}, "launch/torchrun.sh: RANKS wants a number, found '08'"),
        ("torchrun.sh", [], {"RANKS": "2x"}, "launch/torchrun.sh: RANKS wants a number, found '2x'"),
        ("torchrun.sh", [], {"MAX_RESTARTS": "-1"}, "launch/torchrun.sh: MAX_RESTARTS wants a number, found '-1'"),
        ("torchrun.sh", ["run.dri=x"], {}, "dist_cifar: error: command line: run.dri: unknown key"),
    ],
)
def test_bad_input_is_one_line(script, arguments, variables, message, tmp_path):
    copy = shutil.copytree(LAUNCH, tmp_path / "launch") / script  # without a .venv beside it
    process = start(["bash", str(copy), *arguments], tmp_path, **variables)
    printed = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == 2 and printed.count("\n") == 1
    assert message in printed


@pytest.mark.parametrize(
    "path", sorted([*LAUNCH.glob("*.sh"), *(REPOSITORY / "slurm").glob("*.s*")]), ids=lambda p: p.name
)
def test_scripts_are_sound(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    is_sourced = path.name in ("gpus.sh", "job.sh")
    assert is_sourced or path.parent != LAUNCH or os.access(path, os.X_OK)
    assert is_sourced or path.read_text().startswith("#!/bin/bash\n")
