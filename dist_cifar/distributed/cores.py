"""Which CPU cores this process may use: those that it is bound to, and no more than its container's quota.

Contract: asked before torch is imported. What cannot be read is no limit.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_SYSTEM = Path("/sys")


def available_cores() -> int:
    """The CPU cores that this process may use, at least 1."""
    is_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cores_near(address: str, allowed: set[int], system: Path = _SYSTEM) -> set[int]:
    """Returns those of the cores `allowed` that are of the NUMA node of the PCI device at `address`, as 0000:3b:00.0.

    It is all of them if the system does not say which those are, or if that node has fewer of them than others have.
    """
    near = _listed(system / "bus/pci/devices" / address / "local_cpulist") & allowed
    nodes = [_listed(path) & allowed for path in (system / "devices/system/node").glob("node[0-9]*/cpulist")]
    has_its_share = len(near) * sum(map(bool, nodes)) >= len(allowed)
    return near if near and has_its_share else allowed


def bind_near(address: str) -> None:
    """Binds this process, with the threads that it starts from now on, to `cores_near` of the PCI device."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores_near(address, os.sched_getaffinity(0)))


def _listed(path: Path) -> set[int]:
    """The numbers in a file such as `0-3,8`; none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        ends = [part.partition("-") for part in path.read_text().strip().split(",")]
        return {core for first, _, last in ends for core in range(int(first), int(last or first) + 1)}
    return set()


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = _OWN) -> float | None:
    """The smallest share of processor time, in cores, that a control group around this process sets; None without one.

    Both versions of control groups, as a container sees them or the machine.
    """
    lines = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            roots = (cgroups, cgroups / "unified")
        elif "cpu" in controllers.split(","):
            roots = (cgroups / controllers, cgroups / "cpu")
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for root in roots:
            found += [_quota_of(root / part) for part in (inside, *inside.parents)]
    return min((quota for quota in found if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, _, period = (group / "cpu.max").read_text().strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
