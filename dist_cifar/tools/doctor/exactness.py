"""The check of the bits that this machine computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dist_cifar.config import Config
from dist_cifar.distributed.device import visible_gpus
from dist_cifar.distributed.launch_env import lone_environ
from dist_cifar.tools.doctor.findings import Finding, failed, ok


def check_exactness(config: Config) -> Finding:
    """Runs `verify` with a small network on this host: ten steps at two world sizes and through two kills."""
    sizes = "1" if visible_gpus(config.run.device) else "1,2"
    with tempfile.TemporaryDirectory(prefix="dist_cifar-doctor-") as folder:
        command = [sys.executable, "-m", "dist_cifar", "verify", "--steps", "10", "--world-sizes", sizes]
        command += ["--dir", f"{folder}/runs", "--json", f"{folder}/found.json", f"run.device={config.run.device}"]
        command += ["data.source=synthetic", "data.synthetic_train_size=1200", "data.synthetic_test_size=100"]
        command += ["data.validation_size=100", "model.name=resnet8", "batch.global_size=64", "compute.precision=fp32"]
        done = subprocess.run(
            command, env=lone_environ(os.environ), capture_output=True, text=True, timeout=300, start_new_session=True
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            return failed("exactness", f"{' '.join(last)}", "run dist-cifar verify, and see docs/exactness.md")
        digest = json.loads(Path(folder, "found.json").read_text())["trials"][0]["digest"]
    return ok("exactness", f"10 steps at world sizes {sizes}, killed and resumed: all bits equal ({digest})")
