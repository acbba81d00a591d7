"""What a step of `exact` costs its host: the operations that it starts, and the time that takes.

    python benchmarks/suite/host_time.py --out benchmarks/results/host_time.json

Contract: the host of a GPU starts each operation by itself, so a step cannot take less time than that. Here a CPU
stands for such a host: one rank of one thread computes eight virtual ranks in bf16, without the kernels that are for
CPUs. Operations are counted on ResNet-18. Milliseconds are those of a ResNet-20, which has as many layers, with one
image of 8x8 pixels a pass, so that there is little arithmetic. What saves operations is left out in turn, and all of
it; the variants take turns within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cifar.config import load_config
from dist_cifar.data.batching import plan_batches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.models import build_model
from dist_cifar.ops import precision
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.strategy import build_strategy, compute, exact, tree_nodes
from dist_cifar.strategy.batchnorm_stats import BatchNormStats

VIRTUAL_RANKS = 8
WARM_UP, STEPS = 3, 10
NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}


class Counting(TorchDispatchMode):
    """Counts the operators that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_WORK:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(*, pairs: bool = False) -> Iterator[None]:
    """A `with` block in which strategies are built for a CPU as for a GPU; `pairs`: but for its sums of gradients."""

    def passes_of_nodes(slices: range, passes: int, **_: bool) -> list[tuple[tree_nodes.Node, bool, bool]]:
        return tree_nodes.passes_of_nodes(slices, passes, pairs=pairs)

    with ExitStack() as replaced:
        for name in ("replace_small_convs", "fuse_batchnorm_relu", "fuse_gelu"):
            replaced.enter_context(mock.patch.object(precision, name, lambda module: None))
        replaced.enter_context(mock.patch.object(exact, "passes_of_nodes", passes_of_nodes))
        yield


class Job:
    """Steps of `exact` on one rank; what saves operations can be left out."""

    def __init__(
        self, model: str, side: int, *, pairs: bool = False, counted: bool = False, cast: bool = False
    ) -> None:
        """`side`: of the images, pixels. `pairs`: gradients of two passes are added one by one; `counted`: layers count
        their batches in every pass; `cast`: weights are cast to bf16 in every pass."""
        self._is_counted, self._is_cast = counted, cast
        given = {"model.name": model, "batch.global_size": VIRTUAL_RANKS, "strategy.virtual_ranks": VIRTUAL_RANKS}
        given |= {"compute.precision": "bf16", "strategy.name": "exact"}
        self._config = config = load_config(None, [f"{key}={value}" for key, value in given.items()])
        plan = plan_batches(
            config.batch, config.train, slices=VIRTUAL_RANKS, rank=0, world_size=1, train_size=VIRTUAL_RANKS
        )
        communicator = Communicator(DistEnv(), device=torch.device("cpu"), timeout_seconds=60)
        with as_on_a_gpu(pairs=pairs):
            network = build_model(config.model, num_classes=10, seed=0)
            self._strategy = build_strategy(network, config, communicator=communicator, plan=plan)
        self._sums = TrainingSums(communicator.device, may_skip=False)
        self._passes = [(torch.randn(size, 3, side, side), torch.randint(10, (size,))) for size in plan.micro_sizes]

    def step(self) -> None:
        with ExitStack() as block:
            if self._is_counted:
                block.enter_context(mock.patch.object(BatchNormStats, "uncounted", lambda self: nullcontext()))
            if not self._is_cast:
                block.enter_context(compute.kept_casts(self._config, torch.device("cpu")))
            for images, labels in self._passes:
                logits = self._strategy.forward(images)
                loss = cross_entropy(logits, labels)
                self._strategy.backward(loss)
                self._sums.add(loss, logits, labels)
        self._sums.add_step(self._strategy.step(1e-3))


VARIANTS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "gradients added one by one": {"pairs": True},
    "batches counted in every pass": {"counted": True},
    "weights cast in every pass": {"cast": True},
    "all three": {"pairs": True, "counted": True, "cast": True},
}


def operations(model: str, **left_out: bool) -> Counter[str]:
    """The operations of a step, by name."""
    job = Job(model, 32, **left_out)
    job.step()  # the optimizer makes its state
    with Counting() as counting:
        job.step()
    return counting.counts


def milliseconds(step: Callable[[], None]) -> float:
    """The median of some steps."""
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Counts, measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    counts = {name: operations("resnet18", **left_out).total() for name, left_out in VARIANTS.items()}
    jobs = {name: Job("resnet20", 8, **left_out) for name, left_out in VARIANTS.items()}
    for job in jobs.values():
        for _ in range(WARM_UP):
            job.step()
    rounds = [{name: milliseconds(job.step) for name, job in jobs.items()} for _ in range(options.rounds)]
    rows = []
    for name in VARIANTS:
        ratios = [taken[name] / taken["as it is"] for taken in rounds]
        rows.append(
            {
                "variant": name,
                "operations": counts[name],
                "milliseconds_median": round(statistics.median(taken[name] for taken in rounds), 2),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
        print(json.dumps(rows[-1]))
    result = {
        "benchmark": "host_time",
        "hardware": hardware(),
        "load_average_before": round(load, 2),
        "virtual_ranks": VIRTUAL_RANKS,
        "n": options.rounds,
        "versions": versions(),
        "results": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
