"""What more ranks gain on this machine's cores, and the trainer against a hand-written loop.

    python benchmarks/suite/scaling.py --out benchmarks/results/scaling.json

Contract: the trainer's own loop, and the loop that one would write by hand (torch's DistributedDataParallel, the same
model, precision, channels-last, clipping and fused Adam) on a constant batch. Every side has processes of its own,
which wait while it is not their turn. Sides take turns, in an order that rotates from round to round; a ratio is taken
within a round, the first round warms up. The sides are named by ranks x threads of each:

- `2x1`: the global batch of 128 on two ranks with one thread each: `ddp`, `exact` and `plain`, the hand-written loop;
- `1x2`: the same batch on one rank with two threads: `ddp` and `plain`, which has no DistributedDataParallel there;
- `1x1`: half of the batch on one rank with one thread, the share of a rank of `2x1`: `ddp` and `exact`.

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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost_model import exact_bucket_bytes
from torch.nn.functional import cross_entropy

from dist_cifar.config import ModelConfig, OptimizerConfig, load_config
from dist_cifar.data.prefetch import Batch
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.models import build_model
from dist_cifar.ops.malloc import keep_freed_memory
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.trainer import Trainer

MODELS = ("resnet20", "resnet18")
PRECISIONS = ("fp32", "bf16")
GLOBAL_BATCH = 128
PASS_SIZE = 16
"""Images of a virtual rank of `exact`."""
REDUCTIONS = 7
"""How often the reduction alone is timed; the minimum counts."""
ADAM = OptimizerConfig()
TURN = "turn:"
"""Begins a line in which a rank says how many seconds its turn took."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What takes turns: a loop on a number of ranks and threads."""

    loop: str
    """`ddp` and `exact`, of the trainer, or `plain`, written by hand."""
    ranks: int
    threads: int
    """Of each rank."""
    batch: int
    """Images of one step, over all ranks."""

    @property
    def name(self) -> str:
        return f"{self.loop} {self.ranks}x{self.threads}"


SIDES = [
    *(Side(loop=loop, ranks=2, threads=1, batch=GLOBAL_BATCH) for loop in ("ddp", "exact", "plain")),
    *(Side(loop=loop, ranks=1, threads=2, batch=GLOBAL_BATCH) for loop in ("ddp", "plain")),
    *(Side(loop=loop, ranks=1, threads=1, batch=GLOBAL_BATCH // 2) for loop in ("ddp", "exact")),
]
RATIOS = {
    "ddp_two_ranks_over_two_threads": ("ddp 1x2", "ddp 2x1"),
    "ddp_over_plain_two_ranks": ("plain 2x1", "ddp 2x1"),
    "ddp_over_plain_one_rank": ("plain 1x2", "ddp 1x2"),
    "exact_over_ddp_two_ranks": ("ddp 2x1", "exact 2x1"),
    "ddp_efficiency_two_ranks": ("ddp 1x1", "ddp 2x1"),
    "exact_efficiency_two_ranks": ("exact 1x1", "exact 2x1"),
}
"""Seconds of a step of the first side over those of the second: above 1 the second, which the name begins with, is
faster. Efficiency: what a rank loses by having another one."""


# --- a rank ------------------------------------------------------------------------------------------------------


class Gate:
    """Lets a loop run for as many steps as the parent says, and tells it how long they took."""

    def __init__(self) -> None:
        self._steps, self._started = 0, 0.0

    def pass_through(self) -> None:
        """To be called at the end of every step; waits while it is not this side's turn."""
        self._steps -= 1
        if self._steps > 0:
            return
        print(TURN, time.perf_counter() - self._started, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # the parent has seen enough
        self._steps, self._started = int(line), time.perf_counter()


def trained(side: Side, model: str, precision: str, scratch: Path) -> None:
    """The trainer's loop, every step on the batch of the first one."""
    keep_freed_memory()  # as the command line does
    communicator = Communicator(read_env(os.environ), device=torch.device("cpu"), timeout_seconds=3600)
    run_dir = scratch / side.name.replace(" ", "-")
    run_dir.mkdir(exist_ok=True)
    config = load_config(
        None,
        [
            "data.source=synthetic",
            "data.validation_size=100",
            f"model.name={model}",
            f"strategy.name={side.loop}",
            f"compute.precision={precision}",
            "train.epochs=100000",
            f"batch.global_size={side.batch}",
            f"strategy.virtual_ranks={side.batch // PASS_SIZE}",
            "optimizer.lr=1e-6",
            "eval.every_epochs=100000",
            "run.log_every_steps=1000000",
            f"run.dir={run_dir}",
            "tracking.wandb=disabled",
        ],
    )
    run, gate = Trainer.build(config, communicator), Gate()
    constant, take_step = run.batches.make(0), run.train_step

    def step(batch: Batch) -> torch.Tensor:
        norm = take_step(batch)
        gate.pass_through()
        return norm

    run.batches.make = lambda _: constant
    run.train_step = step
    run.fit()


def plain(side: Side, model: str, precision: str, scratch: Path) -> None:
    """What one would write by hand."""
    rank = int(os.environ.get("RANK", "0"))
    network = build_model(ModelConfig(name=model), num_classes=10, seed=0).to(memory_format=torch.channels_last)
    if side.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/plain", rank=rank, world_size=side.ranks)
        network = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6, weight_decay=ADAM.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(side.batch // side.ranks, 3, 32, 32, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),), generator=generator)
    gate = Gate()
    while True:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = cross_entropy(network(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), ADAM.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        gate.pass_through()


def reduction(model: str, scratch: Path) -> None:
    """Prints the seconds of one all-reduce of all gradients at once, while nothing is computed."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{scratch}/reduction-{model}", rank=rank, world_size=ranks)
    flat, best = torch.zeros(sum(exact_bucket_bytes(model)) // 4), float("inf")
    for _ in range(REDUCTIONS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        best = min(best, time.perf_counter() - start)
    print(TURN, best, flush=True)
    dist.destroy_process_group()


def worker(options: argparse.Namespace) -> None:
    """One rank of one side."""
    name, model, precision, scratch = options.worker
    if name == "reduction":
        return reduction(model, Path(scratch))
    side = next(side for side in SIDES if side.name == name)
    torch.set_num_threads(side.threads)
    (plain if side.loop == "plain" else trained)(side, model, precision, Path(scratch))


# --- the parent --------------------------------------------------------------------------------------------------


def start(name: str, ranks: int, threads: int, model: str, precision: str, scratch: Path) -> list[subprocess.Popen]:
    """The ranks of one side, with torchrun's variables; what they say for people goes to standard error."""
    processes = []
    for rank in range(ranks):
        variables: dict[str, Any] = {"OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}
        if ranks > 1:  # with these, Accelerate would start a process group for one rank too
            variables |= {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
            variables |= {"TORCHELASTIC_RUN_ID": f"{scratch.name} {name}"}
        command = [sys.executable, __file__, "--worker", name, model, precision, str(scratch)]
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def seconds_of(processes: Sequence[subprocess.Popen]) -> float:
    """What the ranks say, at the end of a turn, that it took: the slowest counts."""
    found = []
    for process in processes:
        for line in process.stdout:
            if line.startswith(TURN):  # all else is what the trainer says
                found.append(float(line.split()[1]))
                break
        else:
            raise RuntimeError(f"a rank has ended with exit code {process.wait()}")
    return max(found)


def turn(processes: Sequence[subprocess.Popen], steps: int) -> float:
    """Seconds of a step."""
    for process in processes:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    return seconds_of(processes) / steps


def measure(model: str, precision: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One row of the result."""
    running: dict[str, list[subprocess.Popen]] = {}
    try:
        for side in SIDES:
            running[side.name] = start(side.name, side.ranks, side.threads, model, precision, scratch)
            seconds_of(running[side.name])  # its first step
        steps = max(1, round(options.sample_seconds / max(turn(ranks, 2) for ranks in running.values())))
        seconds: dict[str, list[float]] = {name: [] for name in running}
        order = list(running)
        for number in range(options.rounds + 1):
            order = [*order[1:], order[0]]
            for name in order:
                step_seconds = turn(running[name], steps)
                if number:
                    seconds[name].append(step_seconds)
    finally:
        for process in (process for ranks in running.values() for process in ranks):
            process.kill()
            process.wait()
    row: dict[str, Any] = {"model": model, "precision": precision, "steps_per_sample": steps}
    row["seconds_per_step"] = {name: spread(values, 5) for name, values in seconds.items()}
    return row | {name: spread(values, 4) for name, values in ratios(seconds).items()}


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """`RATIOS` of each round."""
    return {
        name: [other / mine for other, mine in zip(seconds[slower], seconds[faster], strict=True)]
        for name, (slower, faster) in RATIOS.items()
    }


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, minimum and maximum of `values`."""
    functions: dict[str, Callable[..., float]] = {"median": statistics.median, "min": min, "max": max}
    return {kind: round(function(values), digits) for kind, function in functions.items()}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""

    def text(values: dict[str, float], scale: float = 1, unit: str = "") -> str:
        return f"{scale * values['median']:.3f} ({scale * values['min']:.3f} to {scale * values['max']:.3f}){unit}"

    lines = [f"{result['hardware']}; global batch {GLOBAL_BATCH}, n = {result['rounds']} rounds: median (min to max)"]
    for row in result["results"]:
        lines += ["", f"{row['model']} {row['precision']}"]
        lines += [f"  {name:32}{text(value, 1e3, ' ms')}" for name, value in row["seconds_per_step"].items()]
        lines += [f"  {name:32}{text(row[name])}" for name in RATIOS]
    lines.append("")
    for row in result["reductions"]:
        lines.append(
            f"all-reduce of {row['bytes'] / 1e6:.1f} MB alone, {row['ranks']} ranks: {1e3 * row['seconds']:.1f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default %(default)s)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models (default: resnet20 resnet18)")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="precisions (default: fp32 bf16)")
    parser.add_argument(
        "--sample-seconds", type=float, default=2.0, help="about the longest turn (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    load, rows, reductions = round(os.getloadavg()[0], 2), [], []
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            ranks = start("reduction", 2, 1, model, "fp32", Path(scratch))
            seconds = seconds_of(ranks)
            for process in ranks:
                process.communicate()
        size = sum(exact_bucket_bytes(model))
        reductions.append({"model": model, "ranks": 2, "bytes": size, "seconds": round(seconds, 5)})
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append(measure(model, precision, options, Path(scratch)))
            print(f"{model} {precision}: done", file=sys.stderr, flush=True)
    result = {
        "benchmark": "scaling",
        "hardware": hardware(),
        "load_average_before": load,
        "global_batch": GLOBAL_BATCH,
        "rounds": options.rounds,
        "versions": versions(),
        "results": rows,
        "reductions": reductions,
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
