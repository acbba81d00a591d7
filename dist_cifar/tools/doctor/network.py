"""Checks between the ranks of a job."""

from __future__ import annotations

import re
import socket
import statistics
import subprocess
import time
from pathlib import Path

import torch

from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.interfaces import interface_towards
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import counted
from dist_cifar.tools.doctor.findings import Finding, graded, ok, severity, warning

_SKEW_SECONDS = 1.0
"""How far clocks may be apart."""
_ONE_NODE_BYTES_PER_SECOND = 0.2e9
"""What ranks of one host exchange at least: through its memory, even with gloo on a small machine."""
_NVLINK_BYTES_PER_SECOND, _PCIE_BYTES_PER_SECOND, _NO_PEERS_BYTES_PER_SECOND = 200e9, 20e9, 5e9
"""What an all-reduce of GPUs of one host should carry: of the generations in use the least, as their makers say."""
_SHARE_OF_LINK = 0.5, 0.1
"""Bandwidth, as a share of what the link should carry: less is a warning, less still a failure."""
_LATENCY_SECONDS = 0.01, 0.2
"""Time of an all-reduce of four bytes, likewise: a step makes tens of them, and no cluster's network needs a tenth of
this."""
_MESSAGE_BYTES = 2**20
_BUSY_SECONDS = 1.0
"""How long the all-reduces of one size may take."""


def check_backend(communicator: Communicator, env: DistEnv) -> Finding:
    """Finds the backend and the interfaces that the ranks use. A collective."""
    if communicator.world_size == 1:
        return ok("backend", "one rank: there is no other to exchange with")
    backend = "nccl" if communicator.device.type == "cuda" else "gloo"
    interface = interface_towards(env.master_addr)
    places = communicator.all_gather_object(f"{socket.gethostname()}: {interface or 'unknown'}")
    return ok("backend", f"{backend}; interfaces towards rank 0: {', '.join(dict.fromkeys(places))}")


def check_clocks(communicator: Communicator) -> Finding:
    """Checks how far the hosts' clocks are apart, at most. A collective."""
    communicator.all_gather_object(None)
    started = time.monotonic()
    times = communicator.all_gather_object(time.time())
    uncertainty = time.monotonic() - started
    skew = max(0.0, max(times) - min(times) - uncertainty)
    text = f"at most {max(times) - min(times):.3f} s apart, {_SKEW_SECONDS:g} s or less wanted"
    hint = "let NTP or chrony set the clocks: time limits and logs go by them"
    return warning("clocks", text, hint) if skew > _SKEW_SECONDS else ok("clocks", text)


def expected_bytes_per_second(
    env: DistEnv, device: torch.device, system: Path = Path("/sys/class")
) -> tuple[float, str]:
    """How much the link between ranks should carry, and the source of that figure. `system` is where Linux tells of
    interfaces and ports."""
    if not env.has_several_nodes:
        return _within_host(device)
    ports = infiniband_ports(system / "infiniband") if device.type == "cuda" else []
    if ports:  # a ring leaves a host through all of them
        within, between = _within_host(device)[0], sum(ports) * 1e9 / 8
        rates = ", ".join(f"{rate:g}" for rate in ports)
        return min(within, between), f"{counted(len(ports), 'InfiniBand port')} of {rates} Gbit/s"
    interface = interface_towards(env.master_addr)
    try:
        megabits = int((system / f"net/{interface}/speed").read_text())
    except (OSError, ValueError):
        megabits = -1
    if megabits <= 0:
        return 125e6, f"{interface}, of unknown speed: 1 Gbit/s"
    return megabits * 1e6 / 8, f"{interface} of {megabits / 1000:g} Gbit/s"


def _within_host(device: torch.device) -> tuple[float, str]:
    if device.type != "cuda":
        return _ONE_NODE_BYTES_PER_SECOND, "one host"
    count = torch.cuda.device_count()
    if not all(torch.cuda.can_device_access_peer(i, j) for i in range(count) for j in range(count) if i != j):
        return _NO_PEERS_BYTES_PER_SECOND, "one host, whose GPUs do not reach each other's memory"
    if has_nvlink():
        return _NVLINK_BYTES_PER_SECOND, "NVLink"
    return _PCIE_BYTES_PER_SECOND, "PCI Express"


def has_nvlink() -> bool:
    """Whether nvidia-smi shows NVLink between GPUs of this host."""
    try:
        shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    header, *rows = [line.split() for line in shown.stdout.splitlines() if "GPU" in line] or [[]]
    count = sum(re.fullmatch(r"GPU\d+", name) is not None for name in header)  # then come network cards and others
    return any(re.fullmatch(r"NV\d+", cell) for row in rows for cell in row[1 : 1 + count])


def infiniband_ports(folder: Path) -> list[float]:
    """The rates of the active InfiniBand ports, in Gbit/s, as `folder` (/sys/class/infiniband) has them."""
    rates = []
    for port in sorted(folder.glob("*/ports/*")):
        try:
            state, rate = ((port / name).read_text() for name in ("state", "rate"))
        except OSError:
            continue
        if "ACTIVE" in state and (found := re.match(r"[\d.]+", rate)):
            rates.append(float(found[0]))
    return rates


def check_all_reduce(communicator: Communicator, env: DistEnv) -> Finding:
    """Compares time and bandwidth of an all-reduce with what the link should carry. A collective."""
    size = communicator.world_size
    if size == 1:
        return ok("all-reduce", "one rank: nothing to reduce")
    latency = max(communicator.all_gather_object(statistics.median(communicator.time_all_reduces(4, 20))))
    nbytes, slowest = _MESSAGE_BYTES, 0.0
    while True:
        slowest = max(communicator.all_gather_object(statistics.median(communicator.time_all_reduces(nbytes, 3))))
        if 3 * 4 * slowest > _BUSY_SECONDS or nbytes >= 64 * _MESSAGE_BYTES:
            break
        nbytes *= 4
    rate = 2 * (size - 1) / size * nbytes / slowest
    expected, source = min(communicator.all_gather_object(expected_bytes_per_second(env, communicator.device)))
    text = (
        f"4 bytes in {1e6 * latency:,.0f} us, {1e6 * _LATENCY_SECONDS[0]:,.0f} us or less wanted; {nbytes // 2**20} MiB"
        f" in {1000 * slowest:.1f} ms, {rate / 1e9:.3g} GB/s on the wire, {_SHARE_OF_LINK[0] * expected / 1e9:.3g} GB/s"
        f" wanted, half of what the link should carry ({source})"
    )
    hint = "see that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the fast network, and what else uses it"
    by_rate = graded("all-reduce", text, hint, rate, *(share * expected for share in _SHARE_OF_LINK))
    by_latency = graded("all-reduce", text, hint, -latency, *(-limit for limit in _LATENCY_SECONDS))
    return max((by_rate, by_latency), key=severity)
