"""The bytes that hosts send to each other in strategy `exact`, in one level and in two; the bits of both.

    python benchmarks/suite/exchange.py --out benchmarks/results/exchange.json

Contract: hosts are network namespaces of this machine (`hosts.py`), and bytes are those that their interfaces count,
headers included, while a tensor of 16 MiB is reduced several times; what the ranks of a host send each other does not
leave it. Per rank: of all hosts the mean, divided by the ranks of a host. Needs root, `ip` and `unshare`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hosts import finish, hosts, sent_bytes, start_ranks

from dist_cifar.data.batching import share
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import read_env
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.strategy.bucket import Bucket, Exchange
from dist_cifar.strategy.tree_reduce import TreeAccumulator

PLACES = [(1, 2, 8), (2, 1, 8), (3, 1, 8), (2, 2, 8), (2, 3, 8), (3, 2, 12), (2, 4, 8), (4, 2, 8)]
"""Hosts, ranks of each, virtual ranks."""
ELEMENTS, REDUCTIONS = 2**22, 5
SECONDS = 300


def leaf(index: int) -> list[torch.Tensor]:
    """The tensor of a virtual rank: every order of adding them up is rounded in its own way."""
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(ELEMENTS, generator=generator) * 10 ** (4 * torch.rand(ELEMENTS, generator=generator) - 2)]


def reduce_once(bucket: Bucket, communicator: Communicator, leaves: int) -> str:
    """Reduces all leaves; the digest of the result."""
    held = share(communicator.rank, parts=communicator.world_size, count=leaves)
    tree = TreeAccumulator(leaves)
    for index in held[:-1]:
        tree.add((index, index + 1), leaf(index))
    bucket.reduce(tree.finish((held[-1], held[-1] + 1), leaf(held[-1])), leaves)
    return hashlib.sha256(bucket.views[0].numpy().tobytes()).hexdigest()


def worker(leaves: int) -> None:
    """One rank; rank 0 prints what the hosts have sent and the digests."""
    torch.set_num_threads(1)
    communicator = Communicator(read_env(os.environ), device=torch.device("cpu"), timeout_seconds=SECONDS)
    found: dict[str, Any] = {}
    for kind, flat in (("flat", True), ("auto", False)):
        exchange = Exchange(communicator, leaves=leaves, flat=flat)
        bucket = Bucket([torch.empty(ELEMENTS)], exchange)
        digest = reduce_once(bucket, communicator, leaves)
        communicator.barrier()
        before = sent_bytes()
        communicator.barrier()
        for _ in range(REDUCTIONS):
            bucket.warm_up()
        communicator.barrier()
        by_host = dict(
            communicator.all_gather_object((communicator.identities[communicator.rank].host, sent_bytes() - before))
        )
        digests = communicator.all_gather_object(digest)
        assert len(set(digests)) == 1, digests
        per_rank = sum(by_host.values()) / communicator.world_size / REDUCTIONS
        found[kind] = {"levels": len(exchange.levels), "sent_per_rank_bytes": round(per_rank), "sha256": digest}
    if communicator.rank == 0:
        print(json.dumps(found))
    communicator.close()


def measure(host_count: int, ranks_per_host: int, leaves: int) -> dict[str, Any]:
    """A row: flat and in levels."""
    command = [sys.executable, __file__, "--worker", str(leaves)]
    with hosts(host_count) as names:
        ranks = start_ranks(names, ranks_per_host, command, os.environ, stdout=subprocess.PIPE)
        found = json.loads(finish(ranks, SECONDS)[0])
    tensor = 4 * ELEMENTS
    row = {"hosts": host_count, "ranks_per_host": ranks_per_host, "virtual_ranks": leaves, **found}
    row["same_bits"] = found["flat"]["sha256"] == found["auto"]["sha256"]
    if host_count > 1:
        row["flat_over_tensor"] = round(found["flat"]["sent_per_rank_bytes"] / tensor, 4)
        row["auto_over_flat"] = round(found["auto"]["sent_per_rank_bytes"] / found["flat"]["sent_per_rank_bytes"], 4)
    return row


def main() -> None:
    """Measures all places and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    rows = []
    for place in PLACES:
        rows.append(measure(*place))
        print(rows[-1], flush=True)
    result = {"benchmark": "exchange", "hardware": hardware(), "versions": versions(), "tensor_bytes": 4 * ELEMENTS}
    result |= {"reductions": REDUCTIONS, "results": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
