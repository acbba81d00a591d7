"""What this package uses of W&B's private parts is as it was: fails where a version changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_cifar.tracking.wandb_private import mark_as_synced, row_count
from tests import PATIENCE_SECONDS, wandb_file
from tests.tracking.test_wandb_tracker import KEY, environment, offline_files, shell

WRITE = """
import sys, wandb
run = wandb.init(mode="offline", dir=sys.argv[1], id="one", settings=wandb.Settings(silent=True, console="off"))
for number in range(400):  # more than one block of 32 KiB
    run.log({"value": number, "text": "x" * 100}, step=number)
run.finish()
"""
HAS_KEY = """
from dist_cifar.tracking.wandb_private import has_key
print("HAS", has_key("http://127.0.0.1:9"))
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the offline file of 400 rows that wandb itself has written."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "run").mkdir()
    command = [sys.executable, "-c", WRITE, str(folder / "run")]
    subprocess.run(command, env=environment(folder), check=True, timeout=PATIENCE_SECONDS)
    return folder / "run"


def test_the_rows_of_a_file_of_wandbs_are_counted(run_dir):
    assert row_count(run_dir, "one") == 400 and row_count(run_dir, "another") == 0


def test_a_file_that_a_kill_has_cut_is_counted_as_far_as_it_is_whole(run_dir, tmp_path):
    (file,) = offline_files(run_dir.parent)
    data = file.read_bytes()
    folder = tmp_path / "wandb" / "offline-run-1"
    folder.mkdir(parents=True)
    cut = folder / "run-one.wandb"
    counts = []
    for size in range(7, len(data), 997):
        cut.write_bytes(data[:size])
        counts.append(row_count(tmp_path, "one"))
        assert counts[-1] == len(wandb_file.read(cut)["history"])
    assert counts == sorted(counts) and counts[0] == 0 and len(set(counts)) > 30
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    cut.write_bytes(flipped)
    assert 0 < row_count(tmp_path, "one") < 400, "nothing behind a damaged record is believed"


@pytest.mark.slow
def test_wandb_sync_passes_over_a_file_that_is_marked(run_dir, tmp_path):
    """`wandb sync` knows the mark by its name: without it, the file would be sent."""
    reach = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    mark_as_synced(run_dir, "another")
    assert "No runs to sync" not in shell(tmp_path, f"timeout 60 wandb sync --show 5 {run_dir}/wandb", **reach)
    mark_as_synced(run_dir, "one")
    assert "No runs to sync" in shell(tmp_path, f"wandb sync {run_dir}/wandb", **reach)


@pytest.mark.parametrize("key", [KEY, ""])
def test_a_key_is_looked_for_without_a_prompt_and_without_the_network(tmp_path, key):
    variables = {"WANDB_API_KEY": key} if key else {}
    done = subprocess.run(
        [sys.executable, "-c", HAS_KEY],
        env=environment(tmp_path, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=tmp_path,
    )
    assert f"HAS {bool(key)}\n" in done.stdout, done.stderr
