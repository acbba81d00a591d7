"""Seconds from sbatch to the first step, and from the signal of a preemption to a durable checkpoint and the requeue.

    python benchmarks/suite/slurm.py --out benchmarks/results/slurm.json

Brings up the test cluster (tests/integration/slurm: real SLURM, nodes that share this machine) and submits
slurm/train.sbatch n times: ResNet-20 on generated images, batch 64, two nodes with one rank each. The first step has
ended when `metrics.jsonl` has its row. Then SIGTERM is sent to the tasks, as a preemption does; the checkpoint is
durable (written, synchronised, renamed) when `status.json` says `saved`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dist_cifar.run.atomic_io import write_atomic  # noqa: E402
from dist_cifar.run.provenance import hardware, versions  # noqa: E402
from dist_cifar.run.run_dir import RunDir  # noqa: E402
from tests.integration.slurm.clusters import Cluster  # noqa: E402

ARGUMENTS = ("--config", "configs/quickstart.yaml", "run.log_every_steps=1", "tracking.wandb=disabled")
OPTIONS = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")


def measure(cluster: Cluster, folder: Path) -> dict[str, float]:
    """One job: submitted, signalled after its first step, cancelled when it has saved."""
    run = folder / "run"
    submitted = time.time()
    job = cluster.sbatch(
        REPOSITORY / "slurm/train.sbatch",
        *ARGUMENTS,
        f"run.dir={run}",
        options=[*OPTIONS, f"--output={folder}/job.log"],
        cwd=REPOSITORY,
    )
    rows = run / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    first_step = time.time()
    signalled = time.time()
    cluster.run("scancel", "--signal=TERM", str(job))
    while (status := RunDir(run).status()).get("status") != "saved":
        time.sleep(0.01)
    requeues = run / "requeues.log"
    while not requeues.exists():
        time.sleep(0.01)
    requeued = requeues.stat().st_mtime
    cluster.reset()
    return {
        "sbatch_to_first_step": first_step - submitted,
        "signal_to_checkpoint": status["time"] - signalled,
        "signal_to_requeue": requeued - signalled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    cluster = Cluster(2)
    try:
        version = cluster.run("sbatch", "--version").strip()
        with tempfile.TemporaryDirectory() as folder:
            measured = []
            for number in range(options.jobs):
                (Path(folder) / str(number)).mkdir()
                measured.append(measure(cluster, Path(folder) / str(number)))
                print(number, measured[-1], flush=True)
    finally:
        cluster.close()
    result: dict[str, Any] = {
        "benchmark": "slurm",
        "hardware": hardware(),
        "load_average_before": load,
        "slurm": version,
        "nodes": 2,
        "ranks": 2,
        "n": options.jobs,
        "versions": versions(),
    }
    for name in measured[0]:
        seconds = sorted(row[name] for row in measured)
        result[f"{name}_seconds"] = {
            "p50": round(statistics.median(seconds), 2),
            "min": round(seconds[0], 2),
            "max": round(seconds[-1], 2),
            "all": [round(value, 3) for value in seconds],
        }
    write_atomic(options.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
