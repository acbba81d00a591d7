"""How many CPU cores this process may use: those that it is bound to, and no more than its container's quota.

Contract: asked before torch is imported. What cannot be read is no limit.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_cores() -> int:
    """The CPU cores that this process may use, at least 1."""
    is_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


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
