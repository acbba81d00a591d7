"""What progress, tracking and checkpoints take from the training, on two ranks with a core each.

    python benchmarks/suite/overhead.py --out benchmarks/results/overhead.json

Contract: it is the trainer's own loop, global batch 128, with a progress bar on a terminal, W&B offline beside the
JSONL file, and checkpoints, all of them more often than by default so that there are many to time. On rank 0 each call
is timed, on the thread that trains:

- `progress`: the bar, every step;
- `vote`: the ranks' answers to whether anybody stops, every step;
- `log`: reducing the sums, the row and its trackers;
- `checkpoint`: collecting and comparing the tensors and handing them to the thread that writes.

While that thread writes, steps are slower, since it wants a core too: `writing` is the sum of what the steps during one
write took beyond the median step without one. `share_of_a_step` is what all of them cost together at the default
intervals (a row every 50 steps, a checkpoint an epoch of 45,000 images) over the time of a step.

Run it on a machine that does nothing else: about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cifar.config import Config, load_config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.trainer import AsyncAnyReduce, Trainer

RANKS = 2
GLOBAL_BATCH = 128
STEPS = {"resnet20": 400, "resnet18": 100}
LOG_STEPS, CHECKPOINT_STEPS = 5, 20
WARM_UP_STEPS = 20
EPOCH_STEPS = 45_000 // GLOBAL_BATCH
KINDS = ("progress", "vote", "log", "checkpoint")


class Clock:
    """Seconds of each call of what it is put around."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind].append(time.perf_counter() - start)

        return timed


def worker(model: str, scratch: Path) -> None:
    """One rank: trains, and rank 0 writes what the calls took to `scratch`."""
    torch.set_num_threads(1)
    communicator = Communicator(read_env(os.environ), device=torch.device("cpu"), timeout_seconds=600)
    config = load_config(
        None,
        [
            "data.source=synthetic",
            "data.validation_size=500",
            f"model.name={model}",
            f"batch.global_size={GLOBAL_BATCH}",
            "strategy.name=ddp",
            "compute.precision=bf16",
            "train.epochs=1000",
            f"train.max_steps={STEPS[model]}",
            "eval.every_epochs=1000",
            f"run.log_every_steps={LOG_STEPS}",
            f"checkpoint.every_steps={CHECKPOINT_STEPS}",
            f"run.dir={scratch / model}",
            "tracking.wandb=offline",
        ],
    )
    communicator.run_on_rank0(lambda: (scratch / model / "checkpoints").mkdir(parents=True))
    run, clock = Trainer.build(config, communicator), Clock()
    steps: list[tuple[float, bool]] = []  # seconds of each, and whether a checkpoint was written meanwhile
    timer = run.log.compute_timer
    start_timer, started, was_writing = timer.start, 0.0, False
    spent = 0.0

    def is_writing() -> bool:
        return run.checkpoints.store.is_writing

    def step_begins() -> None:
        nonlocal started, was_writing, spent
        now, total = time.perf_counter(), sum(map(sum, clock.seconds.values()))
        if started:
            steps.append((now - started - (total - spent), was_writing or is_writing()))
        started, was_writing, spent = now, is_writing(), total
        start_timer()

    timer.start = step_begins
    run.console.advance = clock.around("progress", run.console.advance)
    run.log.take_totals = clock.around("log", run.log.take_totals)
    run.log.steps = clock.around("log", run.log.steps)
    run.save = clock.around("checkpoint", run.save)
    AsyncAnyReduce.start, AsyncAnyReduce.result = (
        clock.around("vote", AsyncAnyReduce.start),
        clock.around("vote", AsyncAnyReduce.result),
    )
    with run.console:
        run.fit()
    if communicator.rank == 0:
        result = {"steps": steps, "calls": clock.seconds}
        (scratch / f"{model}.json").write_text(json.dumps(result), encoding="utf-8")
    communicator.close()


def figures(steps: Sequence[tuple[float, bool]], calls: dict[str, list[float]], config: Config) -> dict[str, Any]:
    """One row of the result: medians, minima and maxima in milliseconds, and the share of a step."""
    steps = steps[WARM_UP_STEPS:]
    calm = [seconds for seconds, writes in steps if not writes]
    step_seconds = statistics.median(calm)
    writes, before = [], False
    for seconds, is_writing in steps:
        if is_writing:
            if not before:
                writes.append(0.0)
            writes[-1] += seconds - step_seconds
        before = is_writing
    vote, log = calls["vote"], calls["log"]
    samples = {
        "step": calm,
        "progress": calls["progress"][WARM_UP_STEPS:],
        "vote": [start + result for start, result in zip(vote[::2], vote[1::2], strict=True)][WARM_UP_STEPS:],
        "log": [reduce + row for reduce, row in zip(log[::2], log[1::2], strict=True)][1:],
        "checkpoint": calls["checkpoint"][1:],
        "writing": writes,
    }
    intervals = {
        "progress": 1,
        "vote": 1,
        "log": config.run.log_every_steps,
        "checkpoint": EPOCH_STEPS,
        "writing": EPOCH_STEPS,
    }
    shares = {name: statistics.fmean(samples[name]) / every / step_seconds for name, every in intervals.items()}
    row: dict[str, Any] = {}
    for name, values in samples.items():
        row[name] = {"n": len(values), "milliseconds_median": round(1e3 * statistics.median(values), 4)}
        row[name] |= {f"milliseconds_{f.__name__}": round(1e3 * f(values), 4) for f in (min, max)}
        if name in shares:
            row[name] |= {"every_steps": intervals[name], "share_of_a_step": round(shares[name], 6)}
    return row | {"share_of_a_step": round(sum(shares.values()), 6)}


def measure(model: str) -> dict[str, Any]:
    """Trains one model on two ranks, the first of which has a terminal."""
    with tempfile.TemporaryDirectory() as directory:
        scratch, ranks = Path(directory), []
        parent, terminal = pty.openpty()
        threading.Thread(target=_drain, args=(parent,), daemon=True).start()
        for rank in range(RANKS):
            variables = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": scratch.name}
            variables |= {"OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true", "WANDB_DIR": directory}
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            command = [sys.executable, __file__, "--worker", model, directory]
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=terminal if rank == 0 else subprocess.DEVNULL)
            )
        os.close(terminal)
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"{model}: the ranks ended with exit codes {codes}")
        found = json.loads((scratch / f"{model}.json").read_text(encoding="utf-8"))
    return {"model": model, "precision": "bf16"} | figures(found["steps"], found["calls"], Config())


def _drain(descriptor: int) -> None:
    """Reads what the bar writes, as a terminal does, until nobody has it open."""
    with contextlib.suppress(OSError):
        while os.read(descriptor, 65536):
            pass


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{result['hardware']}; {RANKS} ranks, global batch {GLOBAL_BATCH}"]
    for row in result["results"]:
        lines.append(f"{row['model']} {row['precision']}: together {row['share_of_a_step']:.2%} of a step")
        for name in ("step", *KINDS, "writing"):
            cost = row[name]
            text = "{:.2f} ({:.2f} to {:.2f}) ms".format(*(cost[f"milliseconds_{k}"] for k in ("median", "min", "max")))
            if "share_of_a_step" in cost:
                text += f", every {cost['every_steps']} steps: {cost['share_of_a_step']:.3%} of a step"
            lines.append(f"  {name:11}{text}, n = {cost['n']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS), help="default: both")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker[0], Path(options.worker[1]))
    load = round(os.getloadavg()[0], 2)
    result = {
        "benchmark": "overhead",
        "hardware": hardware(),
        "load_average_before": load,
        "global_batch": GLOBAL_BATCH,
        "ranks": RANKS,
        "versions": versions(),
        "results": [measure(model) for model in options.models],
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
