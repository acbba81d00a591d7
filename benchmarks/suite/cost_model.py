"""What a step of data-parallel training would take on GPUs: arithmetic, by the alpha-beta model. It measures nothing.

Contract: a collective takes a latency (alpha) and the bytes of the busiest link over its bandwidth (beta); buckets are
those of the strategies. It leaves out stragglers, other jobs on the network, and compute that communication slows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.models import build_model
from dist_cifar.strategy import reduction_queue
from dist_cifar.strategy.exchange import plan_levels

HIDDEN_SHARE = 0.55
"""Of a pass: its backward takes two thirds, and in ResNet-18 the first bucket is ready after a sixth of that."""
DDP_BUCKET_BYTES = (2**20, 25 * 2**20)
"""DDP's limits for its first bucket and for the others."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the prediction assumes of the machine. The defaults: nodes of eight H100; none was measured."""

    gpus_per_node: int = 8
    within_bytes_per_second: float = 450e9
    """Each GPU's NVLink, in one direction."""
    between_bytes_per_second: float = 50e9
    """Each GPU's share of the network, in one direction: one 400 Gbit/s port of InfiniBand."""
    within_latency_seconds: float = 20e-6
    """Of one collective, within a node."""
    between_latency_seconds: float = 50e-6
    """Of one collective over several nodes."""
    message_seconds: float = 0.0
    """What the sender spends on each message of an exchange of `exact`; 0 leaves it out."""
    memory_bytes_per_second: float = 2.5e12
    """Reads and writes of an element-wise kernel: three quarters of what HBM3 has."""


def predict(
    *,
    ranks: int,
    compute_seconds: float,
    exact_buckets: Sequence[int],
    ddp_buckets: Sequence[int],
    cluster: Cluster,
    in_levels: bool,
) -> dict[str, float]:
    """Seconds of a step of both strategies: one pass on each GPU, what of the communication does not hide in it, and
    memory traffic.

    The pass takes `compute_seconds` on both sides; collectives hide in the last `HIDDEN_SHARE` of it, but for the last
    bucket's. Buckets are bytes, in order. With `in_levels`, `exact` exchanges within nodes first, as
    `dist_cifar.strategy.exchange` has it unless it is told otherwise.
    """
    exact_seconds = [_exchange_seconds(n, ranks, cluster, in_levels) for n in exact_buckets]
    # Twice the way of an all-gather, but one launch.
    ddp_seconds = [2 * _ring_seconds(n, ranks, cluster) - _latency(ranks, cluster) for n in ddp_buckets]
    size = sum(exact_buckets)
    # Reads and writes of: packing; the sum over ranks in a tree; the division of a shard.
    exact_memory = size * (2 + 3 * (ranks - 1) / ranks + 2 / ranks)
    # Of: packing; the division before the all-reduce. The all-reduce's own are left out.
    ddp_memory = sum(ddp_buckets) * (2 + 2)
    steps = {}
    for name, seconds, memory in (("exact", exact_seconds, exact_memory), ("ddp", ddp_seconds, ddp_memory)):
        exposed = max(sum(seconds) - HIDDEN_SHARE * compute_seconds, seconds[-1]) if ranks > 1 else 0.0
        steps[name] = compute_seconds + exposed + memory / cluster.memory_bytes_per_second
    return steps


def _latency(ranks: int, cluster: Cluster) -> float:
    return cluster.within_latency_seconds if ranks <= cluster.gpus_per_node else cluster.between_latency_seconds


def _ring_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """One way round the ring, as in an all-gather of `size` bytes. Rings leave a node through all of its ports."""
    bandwidth = cluster.within_bytes_per_second
    if ranks > cluster.gpus_per_node:
        bandwidth = min(bandwidth, cluster.gpus_per_node * cluster.between_bytes_per_second)
    return (ranks - 1) / ranks * size / bandwidth + _latency(ranks, cluster)


def _all_to_all_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Every GPU sends a part to every other, those of other nodes through its own port."""
    near = min(ranks, cluster.gpus_per_node)
    within = (near - 1) / ranks * size / cluster.within_bytes_per_second
    between = (ranks - near) / ranks * size / cluster.between_bytes_per_second
    return max(within, between) + _latency(ranks, cluster)


def exchange_sizes(ranks: int, cluster: Cluster) -> list[int]:
    """How many ranks exchange at once on each level, with a virtual rank each, which are powers of two."""
    hosts = [str(rank // cluster.gpus_per_node) for rank in range(ranks)]
    levels, _ = plan_levels(hosts, 0, leaves=ranks)
    return [len(level.groups[0]) for level in levels]


def _exchange_seconds(size: float, ranks: int, cluster: Cluster, in_levels: bool) -> float:
    """The exchange of strategy `exact`: parts to their ranks, and the sums to all."""
    if not in_levels or ranks <= cluster.gpus_per_node:
        messages = 2 * (ranks - 1) * cluster.message_seconds
        return _all_to_all_seconds(size, ranks, cluster) + _ring_seconds(size, ranks, cluster) + messages
    seconds, exchanged = 0.0, 1
    for count in exchange_sizes(ranks, cluster):
        is_within = exchanged * count <= cluster.gpus_per_node
        bandwidth = cluster.within_bytes_per_second if is_within else cluster.between_bytes_per_second
        latency = cluster.within_latency_seconds if is_within else cluster.between_latency_seconds
        latency += (count - 1) * cluster.message_seconds
        seconds += 2 * ((count - 1) / count * size / exchanged / bandwidth + latency)
        exchanged *= count
    return seconds


def exact_bucket_counts(model: str) -> list[int]:
    """Elements of each bucket of gradients of strategy `exact`, in their order."""
    parameters = _parameters(model)
    places = reduction_queue.partition(parameters)
    return [sum(parameter.numel() for parameter in parameters[place]) for place in places]


def exact_bucket_bytes(model: str) -> list[int]:
    """The same in bytes."""
    return [4 * count for count in exact_bucket_counts(model)]


def ddp_bucket_bytes(model: str) -> list[int]:
    """Bytes of each bucket of DDP at its default limits, in their order."""
    buckets = [0]
    for parameter in _parameters(model):
        if buckets[-1] >= DDP_BUCKET_BYTES[len(buckets) > 1]:
            buckets.append(0)
        buckets[-1] += parameter.nbytes
    return buckets


def _parameters(model: str) -> list[nn.Parameter]:
    """In about the order in which the backward pass ends with them."""
    return list(reversed(list(build_model(ModelConfig(name=model), num_classes=10, seed=0).parameters())))
