"""What the settings that the trainer makes by itself on a CPU gain: each is left out in turn.

    python benchmarks/suite/settings.py --out benchmarks/results/settings.json

Contract: the trainer's own loop on one rank with as many threads as there are cores, strategy ddp, bf16, global batch
128. In a round each variant runs once, in a process of its own, in an order that rotates; `gain` is the rate with all
settings over that without the one, at as many threads, within a round. The settings:

- `freed memory is kept` (`dist_cifar/ops/malloc.py`): glibc does not give it back to the kernel after every step;
- `one thread beside the loop` (`dist_cifar/data/prefetch.py`): the thread that prepares batches has no OpenMP workers;
- `small convolutions as products` (`dist_cifar/ops/gemm_conv.py`): those of few pixels are products of matrices.
  ResNet-20 has none of them;
- `BatchNorm and ReLU in one` (`dist_cifar/ops/fused_batchnorm.py`): with one thread;
- `pool, BatchNorm and GELU in one` (`dist_cifar/ops/fused_gelu.py`): of speednet.

Run it on a machine that does nothing else: about ten minutes on two cores.
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
from pathlib import Path
from typing import Any

import torch

from dist_cifar.config import load_config
from dist_cifar.data.prefetch import Batch
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.ops import precision
from dist_cifar.ops.malloc import keep_freed_memory
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.trainer import Trainer

GLOBAL_BATCH = 128
STEPS = {"resnet20": (10, 60), "resnet18": (4, 14), "speednet": (10, 60)}
"""Steps that warm up, and all."""
MEMORY, THREADS, PRODUCTS = "freed memory is kept", "one thread beside the loop", "small convolutions as products"
NORMS, GELU = "BatchNorm and ReLU in one", "pool, BatchNorm and GELU in one"
SETTINGS = {
    "resnet20": (MEMORY, THREADS, NORMS),
    "resnet18": (MEMORY, THREADS, PRODUCTS, NORMS),
    "speednet": (MEMORY, THREADS, PRODUCTS, GELU),
}
CORES = os.cpu_count() or 1
Variant = tuple[str, int]
"""The setting that is left out, or none; threads."""


def threads_of(setting: str) -> int:
    """With which a setting is measured."""
    return 1 if setting == NORMS else CORES


def worker(left_out: str, threads: int, model: str, scratch: Path) -> None:
    """Trains, and prints images/s."""
    torch.set_num_threads(threads)
    if left_out != MEMORY:
        keep_freed_memory()
    if left_out == THREADS:
        torch.set_num_threads = lambda _: None
    if left_out == PRODUCTS:
        precision.replace_small_convs = lambda _: None
    if left_out == NORMS:
        precision.fuse_batchnorm_relu = lambda _: None
    if left_out == GELU:
        precision.fuse_gelu = lambda _: None
    warm_up, steps = STEPS[model]
    config = load_config(
        None,
        [
            "data.source=synthetic",
            "data.synthetic_train_size=50000",
            "data.validation_size=5000",
            "data.synthetic_test_size=200",
            f"model.name={model}",
            f"batch.global_size={GLOBAL_BATCH}",
            "strategy.name=ddp",
            "compute.precision=bf16",
            "train.epochs=100",
            f"train.max_steps={steps}",
            "eval.every_epochs=100",
            f"run.log_every_steps={steps}",
            f"run.dir={scratch}",
            "tracking.wandb=disabled",
        ],
    )
    communicator = Communicator(read_env({}), device=torch.device("cpu"), timeout_seconds=600)
    (scratch / "checkpoints").mkdir()
    run = Trainer.build(config, communicator)
    take_step, ends = run.train_step, []

    def step(batch: Batch) -> torch.Tensor:
        norm = take_step(batch)
        ends.append(time.perf_counter())
        return norm

    run.train_step = step
    run.fit()
    # The last batches are no sample: the thread beside the loop has ended by then.
    timed = ends[warm_up - 1 : -2]
    print("rate", (len(timed) - 1) * GLOBAL_BATCH / (timed[-1] - timed[0]))


def rate(variant: Variant, model: str) -> float:
    """Images/s of one run."""
    left_out, threads = variant[0], str(variant[1])
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--worker", left_out, threads, model, scratch]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return float(out.splitlines()[-1].removeprefix("rate "))


def measure(model: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    without = [(setting, threads_of(setting)) for setting in SETTINGS[model]]
    variants: list[Variant] = [("none", CORES), ("none", 1), *without]
    rates: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds):
        first = number % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            rates[variant].append(rate(variant, model))
    rows = []
    for setting, threads in without:
        with_all, without_one = rates["none", threads], rates[setting, threads]
        gains = [whole / part for whole, part in zip(with_all, without_one, strict=True)]
        row: dict[str, Any] = {"model": model, "setting": setting, "threads": threads, "n": rounds}
        for name, values, digits in (
            ("images_per_second", with_all, 1),
            ("images_per_second_without", without_one, 1),
            ("gain", gains, 3),
        ):
            row |= {f"{name}_{f.__name__}": round(f(values), digits) for f in (statistics.median, min, max)}
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{result['hardware']}; one rank, ddp, bf16, n = {result['rounds']} rounds"]
    for row in result["results"]:
        with_all, without_one = row["images_per_second_median"], row["images_per_second_without_median"]
        lines.append(
            f"{row['model']:9} {row['setting']:31} {row['threads']} threads: {with_all:7.1f} images/s, without it"
            f" {without_one:7.1f}: gain {row['gain_median']:.2f}x ({row['gain_min']:.2f} to {row['gain_max']:.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        left_out, threads, model, scratch = options.worker
        return worker(left_out, int(threads), model, Path(scratch))
    load = round(os.getloadavg()[0], 2)
    result = {
        "benchmark": "settings",
        "hardware": hardware(),
        "load_average_before": load,
        "global_batch": GLOBAL_BATCH,
        "rounds": options.rounds,
        "versions": versions(),
        "results": [row for model in options.models for row in measure(model, options.rounds)],
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
