"""The processes of a job's ranks: whether one is alive, and how it is killed without hitting another one.

Contract: a process is looked at or killed only if it runs under the same kernel and in the same pid namespace as the
caller, where its process id means the same process. A process id that another process has been given since is not
taken for the rank that had it. psutil takes about 16 ms to import, so it is imported when a `RankProcess` is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Which process a rank is, for the ranks on all hosts."""

    host: str
    pid: int
    boot: str
    """Boot id of the kernel; empty where there is no /proc, and then nobody looks at or kills the process."""
    pid_namespace: int

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"

    def is_visible_from(self, other: Identity) -> bool:
        """Whether `other` can look at this process and kill it."""
        return bool(self.boot) and (self.boot, self.pid_namespace) == (other.boot, other.pid_namespace)


def own_identity() -> Identity:
    """The identity of the calling process."""
    boot, namespace = "", 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Identity(host=socket.gethostname(), pid=os.getpid(), boot=boot, pid_namespace=namespace)


def launcher_process(variable: str) -> str:
    """The process that has started all ranks of this node, as `pid:start time`; empty where that cannot be seen.

    It is the nearest one above this process that was started without `variable`, which holds the rank: between them
    may be scripts.
    """
    pid = os.getppid()
    with contextlib.suppress(OSError, IndexError, ValueError):
        while pid > 1:
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            if not any(
                entry.startswith(f"{variable}=".encode())
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ):
                return f"{pid}:{stat[19].decode()}"
            pid = int(stat[1])
    return ""


class RankProcess:
    """The process that has the pid of `identity` now, which is remembered by the time at which it was started.

    Make it while the rank is known to be alive. psutil compares the times within one process, on a clock that nobody
    can set: an identity that held them as a date would no longer match after a change of the wall clock.
    """

    def __init__(self, identity: Identity, *, seen_from: Identity) -> None:
        self._process: psutil.Process | None = None
        self._is_visible = identity.is_visible_from(seen_from)
        if self._is_visible:
            import psutil

            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(identity.pid)

    def unhealthy_reason(self) -> str | None:
        """Why the process cannot answer, as far as that can be seen from here; None if it runs or is not visible."""
        if not self._is_visible:
            return None
        import psutil

        status = psutil.STATUS_DEAD
        if self._process is not None and self._process.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                status = self._process.status()
        if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            return "its process is gone"
        return "its process is stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else None

    def kill(self) -> None:
        """Sends SIGKILL, if the process is visible and still the same one."""
        if self._process is None:
            return
        # psutil's own `kill` looks and then sends; what the handle is open on cannot become another process in between.
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(self._process.pid)
            try:
                if self._process.is_running():
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def was_alive_at(pid: int, wall_time: float) -> bool:
    """Whether the process that has the id `pid` on this host now had it at a time, in seconds since 1970."""
    import psutil

    try:
        return psutil.Process(pid).create_time() <= wall_time + 1
    except psutil.Error:
        return False
