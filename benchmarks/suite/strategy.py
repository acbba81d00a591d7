"""What strategy `exact` costs against `ddp` at the same global batch, on 1 to 4 ranks, and the bytes on the wire.

    python benchmarks/suite/strategy.py --out benchmarks/results/strategy.json

Contract: full steps (forward, backward, reduction, clipping, Adam) of the trainer's own strategies on one constant
batch, gloo ranks with one thread each. All sides live in the same processes and take turns, in an order that rotates
from round to round; barriers enclose a sample, a ratio is taken within a round, the first round warms up. The sides:

- `exact`: virtual ranks of 16 images;
- `ddp_equal`: as many passes of the same 16 images on each rank, so that only the reduction differs;
- `ddp_natural`: one pass a rank, as `ddp` would be used.

Ratios of processor time (all threads of rank 0) stand beside those of time: they show work that waiting hides, or adds.
The processor time of the average rank of `exact` over that of the busiest is its efficiency where virtual ranks cannot
be shared equally: on machines with a core for each rank the others wait for the busiest.

The ranks of one run have a network namespace of their own where the system allows it (`unshare`), so that its loopback
interface counts no other process's traffic. The figure is the minimum over samples, less that of an idle sample:
keep-alives, and others on a shared interface, only ever add. It includes the headers of TCP and IP.

Run it on a machine that does nothing else: about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from cost_model import exact_bucket_counts
from torch.nn.functional import cross_entropy

from dist_cifar.config import ModelConfig, load_config
from dist_cifar.data.batching import plan_batches, share
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.cores import available_cores
from dist_cifar.distributed.launch_env import DistEnv, read_env
from dist_cifar.models import build_model
from dist_cifar.ops.malloc import keep_freed_memory
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.strategy import bucket, build_strategy, reduction_queue, slice_count, tree_reduce
from dist_cifar.strategy.batchnorm_stats import BatchNormStats
from dist_cifar.strategy.compute import kept_casts
from dist_cifar.strategy.tree_nodes import nodes_of

RANKS = (1, 2, 3, 4)
MODELS = ("resnet20", "resnet18")
PRECISIONS = ("fp32", "bf16")
GLOBAL_BATCH, VIRTUAL_RANKS = 128, 8
PASS_SIZE = GLOBAL_BATCH // VIRTUAL_RANKS
SIDES: dict[str, list[str]] = {
    "exact": ["strategy.name=exact", f"strategy.virtual_ranks={VIRTUAL_RANKS}"],
    "ddp_equal": ["strategy.name=ddp", f"batch.max_micro_batch={PASS_SIZE}"],
    "ddp_natural": ["strategy.name=ddp"],
}
BREAKDOWN_STEPS = 3
LOOPBACK = "lo"
NAMESPACE = ["unshare", "--map-root-user", "--net", "sh", "-c", f'ip link set {LOOPBACK} up && exec "$@"', "sh"]


def wire_bytes_exact(counts: Iterable[int], ranks: int) -> float:
    """Bytes that a rank sends in a step on average, for flat float32 buckets of `counts` elements, each padded.

    It sends its sums of nodes, and what it has added up."""
    held = [share(rank, parts=ranks, count=VIRTUAL_RANKS) for rank in range(ranks)]
    nodes = sum(len(nodes_of(leaves, leaves=VIRTUAL_RANKS)) for leaves in held) / ranks
    return sum((nodes + 1) * (ranks - 1) / ranks * 4 * math.ceil(count / ranks) * ranks for count in counts)


def wire_bytes_ring(count: int, ranks: int) -> float:
    """Bytes that one rank sends in a ring all-reduce of `count` float32."""
    return 2 * (ranks - 1) / ranks * 4 * count


class Side:
    """One strategy with a model of its own and this rank's part of one constant batch."""

    def __init__(self, name: str, model: str, precision: str, communicator: Communicator) -> None:
        config = load_config(
            None,
            [
                f"model.name={model}",
                f"compute.precision={precision}",
                f"batch.global_size={GLOBAL_BATCH}",
                *SIDES[name],
            ],
        )
        world_size = communicator.world_size
        slices = slice_count(config.batch, config.strategy, world_size=world_size)
        size = {"rank": communicator.rank, "world_size": world_size, "train_size": GLOBAL_BATCH}
        plan = plan_batches(config.batch, config.train, slices=slices, **size)
        module = build_model(config.model, num_classes=10, seed=0).train()
        self.strategy = build_strategy(module, config, communicator=communicator, plan=plan)
        generator = torch.Generator().manual_seed(communicator.rank)
        images = torch.randn(plan.per_rank_size, 3, 32, 32, generator=generator)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (plan.per_rank_size,), generator=generator)
        self._config = config
        self._batch = list(zip(images.split(plan.micro_sizes), labels.split(plan.micro_sizes), strict=True))

    def step(self) -> dict[str, float]:
        """One step; seconds of its parts on this rank's main thread."""
        parts: dict[str, float] = defaultdict(float)
        with kept_casts(self._config, torch.device("cpu")):
            for images, labels in self._batch:
                start = time.perf_counter()
                loss = cross_entropy(self.strategy.forward(images), labels)
                middle = time.perf_counter()
                self.strategy.backward(loss)
                parts["forward"] += middle - start
                parts["backward"] += time.perf_counter() - middle
        start = time.perf_counter()
        self.strategy.step(1e-3)
        parts["step"] = time.perf_counter() - start
        return parts


def loopback_bytes() -> int:
    """All bytes that the loopback interface of this network namespace has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LOOPBACK:
            return int(counters.split()[8])
    raise OSError(f"/proc/net/dev has no interface {LOOPBACK}")


def sample(side: Side | None, steps: int, barrier: Callable[[], Any]) -> tuple[float, float, int]:
    """Seconds, this rank's processor seconds, all ranks' bytes on the wire, of `steps` steps; of none without side."""
    barrier()
    sent, start, start_cpu = loopback_bytes(), time.perf_counter(), time.process_time()
    for _ in range(steps if side else 0):
        side.step()
    barrier()
    return time.perf_counter() - start, time.process_time() - start_cpu, loopback_bytes() - sent


def measure(model: str, precision: str, options: argparse.Namespace, communicator: Communicator) -> dict[str, Any]:
    """One row of the result, on every rank."""
    AcceleratorState._reset_state()  # it holds one precision for the life of a process
    sides = {name: Side(name, model, precision, communicator) for name in SIDES}

    def barrier() -> None:
        communicator.all_reduce_sum(torch.zeros(1))

    warm_up_seconds = [sample(side, 1, barrier)[0] for side in sides.values()]
    steps = communicator.broadcast(max(1, round(options.sample_seconds / max(warm_up_seconds))))
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    sent: dict[str, list[int]] = {name: [] for name in SIDES}
    idle = []
    order = list(SIDES)
    for number in range(options.rounds + 1):
        order = [*order[1:], order[0]]
        for name in order:
            sample_seconds, sample_cpu_seconds, sample_bytes = sample(sides[name], steps, barrier)
            if number:
                seconds[name].append(sample_seconds / steps)
                cpu_seconds[name].append(sample_cpu_seconds / steps)
                sent[name].append(sample_bytes)
        idle.append(sample(None, 0, barrier)[2])

    ranks, counts = communicator.world_size, exact_bucket_counts(model)
    statistics_count = len(BatchNormStats(build_model(ModelConfig(name=model), num_classes=10, seed=0)).values)
    row: dict[str, Any] = {
        "model": model,
        "precision": precision,
        "ranks": ranks,
        "steps_per_sample": steps,
        "gradient_bytes": 4 * sum(counts),
    }
    for name, values in seconds.items():
        row |= spread(f"{name}_seconds_per_step", values, 5)
    for name in ("ddp_equal", "ddp_natural"):
        for kind, values in (("", seconds), ("_cpu", cpu_seconds)):
            ratios = [mine / other for mine, other in zip(values["exact"], values[name], strict=True)]
            row |= spread(f"exact_over_{name}{kind}", ratios, 4)
    busy = communicator.all_gather_object(statistics.median(cpu_seconds["exact"]))
    row["exact_efficiency_measured"] = round(statistics.mean(busy) / max(busy), 4)
    row["exact_efficiency_predicted"] = round(VIRTUAL_RANKS / ranks / math.ceil(VIRTUAL_RANKS / ranks), 4)
    counted = {"exact": wire_bytes_exact([*counts, statistics_count], ranks)}
    counted |= dict.fromkeys(("ddp_equal", "ddp_natural"), wire_bytes_ring(sum(counts), ranks))
    for name in SIDES if ranks > 1 else ():
        measured = (min(sent[name]) - min(idle)) / steps / ranks
        row[f"{name}_wire_bytes_per_rank_measured"] = round(measured)
        row[f"{name}_wire_bytes_per_rank_counted"] = round(counted[name])
        row[f"{name}_wire_measured_over_counted"] = round(measured / counted[name], 4)
    row["milliseconds_per_step"] = {name: breakdown(side, barrier) for name, side in sides.items()}
    if ranks > 1:
        row["milliseconds_alone"] = collectives_alone(sum(counts), communicator, barrier)
    return row


def spread(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, minimum and maximum of `values`."""
    functions = (("median", statistics.median), ("min", min), ("max", max))
    return {f"{name}_{kind}": round(function(values), digits) for kind, function in functions}


PIECES = (
    (tree_reduce.TreeAccumulator, "add", "tree_adds"),
    (tree_reduce.TreeAccumulator, "finish", "tree_adds"),
    (bucket.Bucket, "reduce", "reduce"),
    (bucket, "tree_sum", "sum_over_ranks"),
    (Communicator, "all_to_all", "all_to_all"),
    (Communicator, "all_gather", "all_gather"),
    (BatchNormStats, "restore", "statistics"),
    (reduction_queue.ReductionQueue, "wait", "waiting_for_reductions"),
)
"""What an instrumented step of `exact` times, and under which name. `reduce` holds packing and the exchange."""


@contextmanager
def _instrumented(totals: dict[str, float]) -> Iterator[None]:
    """Adds up seconds, in whichever thread, and under `<name>_cpu` seconds of that thread's processor."""

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start, start_cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                totals[name] += time.perf_counter() - start
                totals[f"{name}_cpu"] += time.thread_time() - start_cpu

        return call

    with ExitStack() as stack:
        for owner, attribute, name in PIECES:
            stack.enter_context(mock.patch.object(owner, attribute, timed(getattr(owner, attribute), name)))
        yield


def breakdown(side: Side, barrier: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the parts of a step on this rank: the median over instrumented steps."""
    steps = []
    for _ in range(BREAKDOWN_STEPS):
        totals: dict[str, float] = defaultdict(float)
        barrier()
        with _instrumented(totals):
            parts = side.step()
        if "reduce" in totals:
            for kind in ("", "_cpu"):
                inner = sum(totals[name + kind] for name in ("all_to_all", "all_gather", "sum_over_ranks"))
                totals["packing" + kind] = totals.pop("reduce" + kind) - inner
        steps.append(parts | totals)
    return {name: round(1e3 * statistics.median(step.get(name, 0.0) for step in steps), 3) for name in steps[0]}


def collectives_alone(count: int, communicator: Communicator, barrier: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of collectives over `count` float32 while nothing is computed: the minimum of several."""
    count = math.ceil(count / communicator.world_size) * communicator.world_size
    flat, received = torch.zeros(count), torch.zeros(count)
    shard = flat[: count // communicator.world_size].clone()
    group = communicator.group([range(communicator.world_size)])
    candidates = {
        "all_reduce": lambda: communicator.all_reduce_sum(flat),
        "all_to_all": lambda: communicator.all_to_all(received, flat, [len(shard)] * communicator.world_size, group),
        "all_gather": lambda: communicator.all_gather(flat, shard, group),
    }
    best = dict.fromkeys(candidates, math.inf)
    for _ in range(2 * BREAKDOWN_STEPS):
        for name, call in candidates.items():
            barrier()
            start = time.perf_counter()
            call()
            barrier()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: round(1e3 * seconds, 3) for name, seconds in best.items()}


def worker(options: argparse.Namespace, out: Path) -> None:
    """One rank: measures, and rank 0 writes the rows to `out`."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    alone = DistEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
    env = read_env(os.environ) if "WORLD_SIZE" in os.environ else alone
    communicator = Communicator(env, device=torch.device("cpu"), timeout_seconds=300)
    rows = []
    for model in options.models:
        for precision in options.precisions:
            rows.append(measure(model, precision, options, communicator))
            if communicator.rank == 0:
                print(f"{model} {precision} on {env.world_size} ranks: done", file=sys.stderr, flush=True)
    if communicator.rank == 0:
        out.write_text(json.dumps(rows), encoding="utf-8")
    communicator.close()


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [
        f"{result['hardware']}; batch {GLOBAL_BATCH}, {VIRTUAL_RANKS} virtual ranks, n = {result['rounds']} rounds",
        "median (minimum to maximum) of exact over ddp, within a round; MB that one rank sends in a step",
        "",
        f"{'':24}{'step':>9}   {'exact / ddp, equal passes':26}{'its processor time':26}{'exact / ddp, one pass':26}"
        f"{'exact MB':>9}{'ddp MB':>9}{'ratio':>7}",
    ]
    for row in result["results"]:
        line = f"{row['model']:10}{row['precision']:6}{row['ranks']:2} ranks"
        line += f"{row['exact_seconds_per_step_median']:9.3f} s "
        for name in ("exact_over_ddp_equal", "exact_over_ddp_equal_cpu", "exact_over_ddp_natural"):
            median, low, high = (row[f"{name}_{kind}"] for kind in ("median", "min", "max"))
            line += f"{median:.3f} ({low:.3f} to {high:.3f})".ljust(26)
        if row["ranks"] > 1:
            mine, other = (row[f"{name}_wire_bytes_per_rank_measured"] for name in ("exact", "ddp_equal"))
            line += f"{mine / 1e6:9.3f}{other / 1e6:9.3f}{mine / other:7.3f}"
        lines.append(line)
    lines += [
        "",
        "milliseconds of one step of exact on rank 0; those of the reductions may hide behind the backward pass",
    ]
    names = ("forward", "backward", "step", *dict.fromkeys(name for *_, name in PIECES if name != "reduce"), "packing")
    lines.append(" " * 24 + "".join(f"{name.replace('_', ' ')[:15]:>16}" for name in names))
    for row in result["results"]:
        for side in ("exact", "ddp_equal"):
            parts = row["milliseconds_per_step"][side]
            line = f"{row['model']:10}{row['precision']:6}{row['ranks']:2} " + side[:5]
            lines.append(line + "".join(f"{parts[name]:16.1f}" if name in parts else " " * 16 for name in names))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of strategy exact against ddp.")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks (default: 1 2 3 4)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models (default: resnet20 resnet18)")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="precisions (default: fp32 bf16)")
    parser.add_argument(
        "--sample-seconds",
        type=float,
        default=1.0,
        help="least time of a sample, if above a step (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options, options.worker)
    load, rows = round(os.getloadavg()[0], 2), []
    isolated = _succeeds([*NAMESPACE, "true"])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in options.ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
            torchrun.append(f"--nproc-per-node={ranks}")
            out = Path(scratch, f"{ranks}.json")
            # With torchrun's variables set, Accelerate would start a process group for one rank too.
            command = [sys.executable, *(torchrun if ranks > 1 else []), *sys.argv, "--worker", str(out)]
            subprocess.run([*(NAMESPACE if isolated else []), *command], check=True, env=variables)
            rows += json.loads(out.read_text(encoding="utf-8"))
    result = {
        "benchmark": "strategy",
        "hardware": hardware(),
        "load_average_before": load,
        "threads_per_rank": 1,
        "cores": available_cores(),
        "oversubscribed_ranks": [ranks for ranks in options.ranks if ranks > available_cores()],
        "global_batch": GLOBAL_BATCH,
        "virtual_ranks": VIRTUAL_RANKS,
        "rounds": options.rounds,
        "own_network_namespace": isolated,
        "versions": versions(),
        "results": rows,
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
