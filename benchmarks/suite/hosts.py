"""Hosts on one machine: network namespaces with names of their own, joined by a bridge.

Needs root, `ip` and `unshare`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

INTERFACE = "eth0"
"""The one interface of each host but loopback."""
_NETWORK = "10.98.7"
_NUMBERS = itertools.count()


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """The names of `count` hosts, which are gone when the `with` block is left."""
    job = f"{os.getpid()}x{next(_NUMBERS)}"  # a link outlives its host by a moment
    names = [f"host{job}x{i}" for i in range(count)]
    bridge = f"b{job}"
    try:
        _run(f"ip link add {bridge} type bridge", f"ip link set {bridge} up")
        for i, name in enumerate(names):
            link = f"v{job}x{i}"
            _run(
                f"ip netns add {name}",
                f"ip link add {link} type veth peer name {INTERFACE} netns {name}",
                f"ip link set {link} master {bridge} up",
                f"ip -n {name} addr add {_NETWORK}.{i + 1}/24 dev {INTERFACE}",
                f"ip -n {name} link set {INTERFACE} up",
                f"ip -n {name} link set lo up",
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", bridge], check=False, stderr=subprocess.DEVNULL)


def start_ranks(
    names: Sequence[str], ranks_per_host: int, command: Sequence[str], environ: Mapping[str, str], **options: Any
) -> list[subprocess.Popen[str]]:
    """Starts `command` as each rank of a job on these hosts, one host after the other."""
    world_size, started = len(names) * ranks_per_host, []
    for rank in range(world_size):
        host, local_rank = divmod(rank, ranks_per_host)
        place = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": ranks_per_host,
            "MASTER_ADDR": f"{_NETWORK}.1",
            "MASTER_PORT": 29400,
        }
        named = [
            "ip",
            "netns",
            "exec",
            names[host],
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0" && exec "$@"',
            names[host],
        ]
        variables = {**environ, **{name: str(value) for name, value in place.items()}}
        started.append(subprocess.Popen([*named, *command], env=variables, text=True, **options))
    return started


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each process has printed on a pipe, if it has one. Raises `RuntimeError` where one fails; ends them all."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] or "" for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"ranks ended with {[process.returncode for process in processes]}: {outputs}")
    return outputs


def sent_bytes() -> int:
    """What the host of this process has sent to others so far."""
    with open(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes", encoding="utf-8") as counter:
        return int(counter.read())


def _run(*lines: str) -> None:
    for line in lines:
        subprocess.run(line.split(), check=True, stdout=sys.stderr)
