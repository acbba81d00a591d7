"""The script for a machine with a GPU: on this one, its parts run on the CPU."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import PATIENCE_SECONDS, REPOSITORY


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_is_in_the_result(tmp_path):
    """But for the tests that need a GPU, which this suite has itself."""
    parts = ["worlds", "speed", "recipe", "verify", "sanitizers", "strategies"]
    command = [REPOSITORY / "benchmarks/gpu.sh", "--out", tmp_path, "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=tmp_path)
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["parts"]) == parts and all(row["ok"] for row in result["parts"].values())
    worlds = result["parts"]["worlds"]["found"]
    assert {(row["world_size"], row["precision"]) for row in worlds} >= {
        (1, "bf16"),
        (2, "bf16"),
        (1, "fp32"),
        (2, "fp32"),
    }
    assert len({row["sha256"] for row in worlds}) == 2
    assert all(row["images_per_second"] > 0 for row in result["parts"]["speed"]["found"].values())
    assert set(result["parts"]["strategies"]["found"]) == {"exact", "ddp", "fsdp", "deepspeed"}
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {part} | ok |" in text for part in parts)


@pytest.mark.slow
def test_a_part_that_fails_is_in_the_result_and_costs_the_others_nothing(tmp_path, monkeypatch):
    command = [REPOSITORY / "benchmarks/gpu.sh", "--out", tmp_path, "--parts", "recipe", "speed"]
    monkeypatch.setenv("WORLD_SIZE", "many")  # which a training refuses, and the steps alone do not read
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1 and "recipe: FAILED, see gpu-recipe.log" in done.stdout, done.stdout + done.stderr
    assert {name: row["ok"] for name, row in result["parts"].items()} == {"recipe": False, "speed": True}
    assert "WORLD_SIZE" in (tmp_path / "gpu-recipe.log").read_text()
