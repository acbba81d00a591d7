"""Does the training loop ever wait for data? Real batches against one constant batch, on two ranks with a core each.

    python benchmarks/suite/epoch.py --data cifar10.zip --out benchmarks/results/epoch.json

Contract: it is the trainer's own loop, prefetch thread and all, on ResNet-20 with a global batch of 128. Windows of
steps take turns within one run: in one the batches are prepared as always, in the next each is the same batch,
prepared once. Nothing else differs. Steps at both ends of a window are not counted, since the thread works ahead and
prepares for the window that follows. A ratio is taken within a pair of neighbouring windows; the first pair warms up.
`--data` is a folder or zip as for `data.source=folder`; without it, as many generated images as CIFAR-10 has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_cifar.config import load_config
from dist_cifar.data.prefetch import Batch
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.run.run_dir import RunDir
from dist_cifar.trainer import Trainer

RANKS = 2
GLOBAL_BATCH = 128
MARGIN_STEPS = 4
"""Not counted at each end of a window; more than the batches that the thread prepares ahead."""
KINDS = ("real", "constant")
FIGURES = ("real_images_per_second", "constant_images_per_second", "ratio", "data_wait_share")


def worker(precision: str, options: argparse.Namespace, scratch: Path) -> None:
    """One rank: trains, and rank 0 writes the windows' figures to `scratch`."""
    torch.set_num_threads(1)
    communicator = Communicator(read_env(os.environ), device=torch.device("cpu"), timeout_seconds=60)
    source = ["data.source=folder", f"data.root={options.data}"] if options.data else ["data.source=synthetic"]
    config = load_config(
        None,
        [
            *source,
            "data.synthetic_train_size=50000",
            "model.name=resnet20",
            f"batch.global_size={GLOBAL_BATCH}",
            f"compute.precision={precision}",
            "train.epochs=1000",
            f"train.max_steps={2 * options.steps * (options.repeats + 1)}",
            "eval.every_epochs=1000",
            f"run.log_every_steps={options.steps}",
            f"run.dir={scratch / precision}",
            "tracking.wandb=disabled",
        ],
    )
    communicator.run_on_rank0(RunDir(scratch / precision).open)
    run = Trainer.build(config, communicator)
    make_real, constant, take_step = run.batches.make, run.batches.make(0), run.train_step
    marks: list[tuple[float, float]] = []  # after each step: the time, and the time waited for data so far

    def step(batch: Batch) -> torch.Tensor:
        norm = take_step(batch)
        marks.append((time.perf_counter(), run.state.wait_seconds))
        return norm

    run.batches.make = lambda step: constant if step // options.steps % 2 else make_real(step)
    run.train_step = step
    run.fit()
    ranks = communicator.all_gather_object(marks)
    if communicator.rank == 0:
        (scratch / f"{precision}.json").write_text(json.dumps(windows(ranks, options.steps)), encoding="utf-8")
    communicator.close()


def windows(ranks: list[list[tuple[float, float]]], steps: int) -> dict[str, Any]:
    """Images/s of rank 0 and the share of the time that the ranks waited, for each kind the windows in order."""
    result: dict[str, Any] = {kind: {"images_per_second": [], "data_wait_share": []} for kind in KINDS}
    for number in range(2, len(ranks[0]) // steps):
        first, last = number * steps + MARGIN_STEPS, (number + 1) * steps - 1 - MARGIN_STEPS
        seconds = ranks[0][last][0] - ranks[0][first][0]
        waited = statistics.mean(marks[last][1] - marks[first][1] for marks in ranks)
        into = result[KINDS[number % 2]]
        into["images_per_second"].append((last - first) * GLOBAL_BATCH / seconds)
        into["data_wait_share"].append(waited / seconds)
    return result | {"first_batch_seconds": max(marks[0][1] for marks in ranks)}


def summary(precision: str, measured: dict[str, Any]) -> dict[str, Any]:
    real, constant = (measured[kind]["images_per_second"] for kind in KINDS)
    ratios = [mine / other for mine, other in zip(real, constant, strict=True)]
    columns = zip(FIGURES, (real, constant, ratios, measured["real"]["data_wait_share"]), (1, 1, 4, 5), strict=True)
    row = {"precision": precision, "first_batch_seconds": round(measured["first_batch_seconds"], 3)}
    for name, values, digits in columns:
        for kind, function in (("median", statistics.median), ("min", min), ("max", max)):
            row[f"{name}_{kind}"] = round(function(values), digits)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder or zip of images; default: generated images")
    parser.add_argument("--repeats", type=int, default=10, help="pairs of windows that count (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a window (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", nargs=2, metavar=("PRECISION", "SCRATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker[0], options, Path(options.worker[1]))
    load, rows = round(os.getloadavg()[0], 2), []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", *sys.argv]
    with tempfile.TemporaryDirectory() as scratch:
        for precision in ("fp32", "bf16"):
            subprocess.run(
                [*launch, "--worker", precision, scratch], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            rows.append(summary(precision, json.loads(Path(scratch, f"{precision}.json").read_text(encoding="utf-8"))))
    print(
        f"{hardware()}; ResNet-20, {RANKS} ranks x 1 thread, batch {GLOBAL_BATCH}, {options.repeats} pairs of windows"
    )
    for row in rows:
        for name in FIGURES:
            median, low, high = (row[f"{name}_{kind}"] for kind in ("median", "min", "max"))
            print(f"{row['precision']:6}{name:28}{median:>10,}   ({low:,} to {high:,})")
    if options.out:
        result = {
            "benchmark": "epoch",
            "hardware": hardware(),
            "load_average_before": load,
            "ranks": RANKS,
            "threads_per_rank": 1,
            "model": "resnet20",
            "global_batch": GLOBAL_BATCH,
            "data": "folder" if options.data else "synthetic",
            "pairs": options.repeats,
            "steps_counted_per_window": options.steps - 1 - 2 * MARGIN_STEPS,
            "versions": versions() | {"numba": version("numba")},
            "results": rows,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
