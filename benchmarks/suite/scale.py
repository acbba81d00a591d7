"""What a step of strategy `exact` costs as ranks grow: counted and measured here, predicted for what is not here.

    python benchmarks/suite/scale.py --out benchmarks/results/scale.json

Contract, in three parts:

- `counted`: jobs of 1 to 16 gloo ranks on this machine train the same network on the same global batch, of 16 virtual
  ranks; each rank counts the messages that it sends and their bytes, by what they are for, over the steps between two
  rows of the log, and what it asks of the job's store in a second.
- `checked`: what a model says of those jobs' steps, and what they take. By the model, all that ranks do in a step
  shares the cores: a step takes (V p + W (r + k + m M)) / min(W, cores) seconds, of V passes of p and, on each of W
  ranks, r for what every rank does by itself, k for exchanging at all, and M messages of m. p is the processor time of
  a pass, measured in each job: ranks that take turns on a core empty each other's cache. r is what a step of one rank
  takes beside its passes; k and m are a line through what those of two and of four ranks take beside that, in processor
  time. What more ranks take is not used.
- `predicted`: the same counts on named machines, by the alpha-beta model of `cost_model.py`, with the time in which the
  host starts kernels; none of these machines was measured.

Run it on a machine that does nothing else: about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost_model import Cluster, ddp_bucket_bytes, exact_bucket_bytes, exchange_sizes, predict

from dist_cifar.config import Config, load_config
from dist_cifar.distributed import failure_detector
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.ops.malloc import keep_freed_memory
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.tools.bench import GPU_IMAGES_PER_SECOND
from dist_cifar.trainer import AsyncAnyReduce, Trainer

WORLD_SIZES = (1, 2, 4, 8, 16)
VIRTUAL_RANKS, GLOBAL_BATCH, MODEL = 16, 128, "resnet20"
LOG_STEPS, WARM_UP_STEPS, STEPS = 10, 10, 40
MEASURED_ON = (2, 4)
"""Numbers of ranks on which messages are measured."""
CORES = os.cpu_count() or 1
KINDS = ("vote", "exchange", "log")
TAGS = {1: "vote", 2: "log"}
"""Of what messages with these tags are for."""
IMAGES_PER_GPU = 128
HOST_SECONDS = 4e-3
"""In which a host starts the kernels of one pass of ResNet-18: between the 3.5 and 6 ms that were estimated."""


MESSAGE_SECONDS = 1e-6
"""That a GPU's proxy is assumed to spend on one message."""


class Counts:
    """Messages and bytes of this rank, by what they are for."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.store_requests = 0
        isend, exchange, point_to_point = dist.isend, dist.all_to_all_single, dist.P2POp
        begin = failure_detector._begin

        def counted_isend(tensor: torch.Tensor, to: int, *, group: Any = None, tag: int = 0) -> Any:
            self.add(TAGS[tag], 1, tensor.nbytes)
            return isend(tensor, to, group=group, tag=tag)

        def counted_exchange(received: Any, sent: Any, counts: list[int], own: list[int], group: Any = None) -> Any:
            others = len(own) - 1
            self.add("exchange", others, sum(own) * 4 * others // len(own))
            return exchange(received, sent, counts, own, group=group)

        def counted_message(kind: Any, tensor: torch.Tensor, peer: int, group: Any = None) -> Any:
            if kind is dist.isend:
                self.add("exchange", 1, tensor.nbytes)
            return point_to_point(isend if kind is counted_isend else kind, tensor, peer, group)

        def counted_begin(*arguments: Any) -> Any:
            self.store_requests += 1
            return begin(*arguments)

        counted_exchange.__name__ = "all_to_all_single"
        dist.isend, dist.all_to_all_single, dist.P2POp = counted_isend, counted_exchange, counted_message
        failure_detector._begin = counted_begin

    def add(self, kind: str, messages: int, nbytes: int) -> None:
        self.messages[kind] += messages
        self.sent_bytes[kind] += nbytes


def config_of(directory: Path) -> Config:
    """The job that is counted."""
    return load_config(
        None,
        [
            *(
                "data.source=synthetic",
                "data.validation_size=500",
                f"model.name={MODEL}",
                f"batch.global_size={GLOBAL_BATCH}",
            ),
            *(f"strategy.virtual_ranks={VIRTUAL_RANKS}", "compute.precision=fp32", f"run.dir={directory}"),
            *("run.device=cpu", "tracking.wandb=disabled", f"run.log_every_steps={LOG_STEPS}"),
        ],
    )


def worker(directory: Path) -> None:
    """One rank: trains by the trainer's steps, with its votes and logs, and rank 0 writes what was counted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    env, counts = read_env(os.environ), Counts()
    communicator = Communicator(env, device=torch.device("cpu"), timeout_seconds=600)
    watch = communicator.watch(lambda failure: os._exit(1))
    trainer = Trainer.build(config_of(directory), communicator)
    vote, seconds, started, started_processor = AsyncAnyReduce(communicator, 3), [], 0.0, 0.0
    batches = [trainer.batches.make(step) for step in range(4)]
    for step in range(WARM_UP_STEPS + STEPS):
        if step == WARM_UP_STEPS:
            communicator.barrier()
            counts.messages.clear()
            counts.sent_bytes.clear()
            counts.store_requests = 0
            started, started_processor = time.perf_counter(), time.process_time()
        begun = time.perf_counter()
        vote.start(step + 1, False, False, False)
        trainer.train_step(batches[step % len(batches)])
        vote.result()
        if (step + 1) % LOG_STEPS == 0:
            trainer.log.take_totals(trainer.sums)
        seconds.append(time.perf_counter() - begun)
    elapsed = time.perf_counter() - started
    processor_seconds = time.process_time() - started_processor
    row = {
        "world_size": env.world_size,
        "messages": {kind: counts.messages[kind] / STEPS for kind in KINDS},
        "bytes": {kind: counts.sent_bytes[kind] / STEPS for kind in KINDS},
        "store_requests_per_second": counts.store_requests / elapsed,
        "step_seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "processor_seconds": processor_seconds / STEPS,
    }
    row["pass_seconds"] = seconds_of_a_pass(trainer)
    rows = communicator.all_gather_object(row)
    if env.rank == 0:
        row["step_seconds"] = max(other["step_seconds"] for other in rows)
        row["processor_seconds"] = statistics.mean(other["processor_seconds"] for other in rows)
        (directory / "row.json").write_text(json.dumps(row), encoding="utf-8")
    communicator.barrier()
    if watch is not None:
        watch.close()
    communicator.close()


def seconds_of_a_pass(trainer: Trainer) -> float:
    """Processor seconds of a pass on the thread that trains: the median over some steps by hand."""
    passes = []
    for step in range(STEPS // 2):
        batch = trainer.batches.make(step % 4)
        inputs, labels = batch.inputs.split(trainer.plan.micro_sizes), batch.labels.split(trainer.plan.micro_sizes)
        for images, targets in zip(inputs, labels, strict=True):
            begun = time.thread_time()
            logits = trainer.strategy.forward(images)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            trainer.strategy.backward(loss)
            trainer.sums.add(loss, logits, targets)
            passes.append(time.thread_time() - begun)
        trainer.strategy.step(1e-3)
    return statistics.median(passes)


def measure(world_size: int) -> dict[str, Any]:
    """The row of one job."""
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank in range(world_size):
            variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "OMP_NUM_THREADS": 1}
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            command = [sys.executable, __file__, "--worker", directory]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"{world_size} ranks ended with exit codes {codes}")
        row: dict[str, Any] = json.loads((Path(directory) / "row.json").read_text(encoding="utf-8"))
    return row


def checked(rows: Sequence[dict[str, Any]], cores: int) -> list[dict[str, float]]:
    """What the model says of each job, beside what it took."""
    by_size = {row["world_size"]: row for row in rows}
    messages = {ranks: sum(row["messages"].values()) for ranks, row in by_size.items()}
    rest = by_size[1]["processor_seconds"] - VIRTUAL_RANKS * by_size[1]["pass_seconds"]
    alone = {ranks: VIRTUAL_RANKS / ranks * row["pass_seconds"] + rest for ranks, row in by_size.items()}
    few, many = (by_size[ranks]["processor_seconds"] - alone[ranks] for ranks in MEASURED_ON)
    two, four = MEASURED_ON
    per_message = max(0.0, (many - few) / (messages[four] - messages[two]))
    per_step = few - per_message * messages[two]
    found = []
    for ranks, row in by_size.items():
        sending = per_step + per_message * messages[ranks] if ranks > 1 else 0.0
        seconds = ranks * (alone[ranks] + sending) / min(ranks, cores)
        found.append(
            {
                "world_size": ranks,
                "measured_seconds": round(row["step_seconds"], 5),
                "model_seconds": round(seconds, 5),
                "model_over_measured": round(seconds / row["step_seconds"], 3),
            }
        )
    return found


MACHINES = {
    "nodes of 8 H100, 400 Gbit/s of InfiniBand each": Cluster(message_seconds=MESSAGE_SECONDS),
    "nodes of 8 A100, 200 Gbit/s of InfiniBand each": Cluster(
        message_seconds=MESSAGE_SECONDS,
        within_bytes_per_second=300e9,
        between_bytes_per_second=25e9,
        memory_bytes_per_second=1.5e12,
    ),
    "nodes of 4 GPUs on PCI Express, 100 Gbit/s of Ethernet for all": Cluster(
        message_seconds=MESSAGE_SECONDS,
        gpus_per_node=4,
        within_bytes_per_second=20e9,
        between_bytes_per_second=3.1e9,
        between_latency_seconds=100e-6,
        memory_bytes_per_second=1.0e12,
    ),
}
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)


def predicted(clusters: dict[str, Cluster] | None = None) -> list[dict[str, Any]]:
    """Steps of ResNet-18 in bf16 with 128 images a GPU: of `exact`, with as many virtual ranks as GPUs, flat and in
    levels, and of `ddp`."""
    exact_buckets, ddp_buckets = exact_bucket_bytes("resnet18"), ddp_bucket_bytes("resnet18")
    rows, reductions = [], len(exact_buckets) + 1  # that of the statistics
    for name, cluster in (clusters or MACHINES).items():
        for gpus in GPUS:
            compute = max(IMAGES_PER_GPU / GPU_IMAGES_PER_SECOND, HOST_SECONDS)
            flat, levels = (
                predict(
                    ranks=gpus,
                    compute_seconds=compute,
                    exact_buckets=exact_buckets,
                    ddp_buckets=ddp_buckets,
                    cluster=cluster,
                    in_levels=in_levels,
                )
                for in_levels in (False, True)
            )
            steps = {"flat": flat["exact"], "levels": levels["exact"], "ddp": levels["ddp"]}
            rows.append(
                {
                    "machine": name,
                    "gpus": gpus,
                    "vote_messages": 1 if gpus > 1 else 0,
                    "vote_delay_steps": max(0, (gpus - 1).bit_length() - 1),
                    "exchange_messages": 2 * reductions * sum(size - 1 for size in exchange_sizes(gpus, cluster)),
                    "exchange_messages_flat": 2 * reductions * (gpus - 1),
                    "log_messages": 2 * (gpus - 1).bit_length(),
                    "log_bytes": gpus * len(pickle.dumps({0: tuple(range(12))})),
                    **{f"{kind}_milliseconds": round(1e3 * seconds, 3) for kind, seconds in steps.items()},
                    "exact_efficiency": round(compute / steps["levels"], 3),
                    "ddp_efficiency": round(compute / steps["ddp"], 3),
                }
            )
    return rows


def main() -> None:
    """Counts, checks, predicts and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--world-sizes", nargs="+", type=int, default=list(WORLD_SIZES))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    load = os.getloadavg()[0]
    rows = []
    for world_size in options.world_sizes:
        rows.append(measure(world_size))
        print(rows[-1], flush=True)
    result = {
        "benchmark": "scale",
        "hardware": hardware(),
        "load_average_before": round(load, 2),
        "versions": versions(),
        "model": MODEL,
        "virtual_ranks": VIRTUAL_RANKS,
        "global_batch": GLOBAL_BATCH,
        "log_every_steps": LOG_STEPS,
        "steps": STEPS,
        "counted": rows,
        "checked": checked(rows, CORES),
        "assumptions": {
            "images_per_gpu": IMAGES_PER_GPU,
            "gpu_images_per_second": GPU_IMAGES_PER_SECOND,
            "host_seconds": HOST_SECONDS,
            "message_seconds": MESSAGE_SECONDS,
        },
        "predicted": predicted(),
    }
    for line in result["checked"]:
        print(line)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
