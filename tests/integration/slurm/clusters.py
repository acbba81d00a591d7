"""The cluster that `cluster.sh` brings up, as the tests see it.

Contract: a method returns when SLURM has answered. An answer that is an error or does not come is an `AssertionError`
with what SLURM says. A job is named by its id, and a task of an array by `<id>_<task>`. Nodes share all files but
/dev/shm, so jobs may write below pytest's `tmp_path`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import PATIENCE_SECONDS, REPOSITORY, may_make_namespaces

SCRIPT = Path(__file__).with_name("cluster.sh")

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}
_OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
_LOG_TAIL_CHARACTERS = 6000


def missing() -> list[str]:
    """What this machine lacks for a cluster."""
    commands = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "pgrep")
    lacks = [command for command in commands if shutil.which(command) is None]
    if os.geteuid() != 0:
        lacks.append("root")
    elif "unshare" not in lacks and not may_make_namespaces():
        lacks.append("the right to make namespaces (CAP_SYS_ADMIN)")
    elif "freezer" not in Path("/proc/cgroups").read_text():
        lacks.append("the freezer of cgroup v1")
    return lacks


def remains(directory: Path) -> dict[str, list[str]]:
    """What this machine has of the cluster in a directory, by kind; nothing after `down`."""
    checksum = subprocess.run("cksum", input=f"{directory}\n", capture_output=True, text=True, check=True).stdout
    key = int(checksum.split()[0]) % 512
    freezer = "mount -t cgroup -o freezer cgroup /mnt && find /mnt -type d"
    cgroups = subprocess.run(
        ["unshare", "--mount", "sh", "-c", freezer], capture_output=True, text=True, check=True
    ).stdout
    found = {
        "files": [str(directory)] if directory.exists() else [],
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line],
        "links": [name for name in os.listdir("/sys/class/net") if re.fullmatch(rf"dc{key}(-.*)?", name)],
        "cgroups": [line for line in cgroups.splitlines() if f"/dist_cifar_{key}/" in f"{line}/"],
        "processes": [],
    }
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in line or f"/dist_cifar_{key}" in (process / "cgroup").read_text():
                found["processes"].append(f"{process.name} {line}")
    return {kind: things for kind, things in found.items() if things}


class Cluster:
    """A running cluster of `count` nodes, `node1`, `node2`, ..., each with 8 cores, 64 GB and 4 GPUs that are fakes.

    Partitions: `debug`, the default, and `high`, which preempts it. `close` leaves nothing of it.
    """

    def __init__(self, count: int, directory: Path | None = None) -> None:
        self.nodes = [f"node{number}" for number in range(1, count + 1)]
        self._variables = {} if directory is None else {"DIST_CIFAR_CLUSTER": str(directory)}
        self._dead: set[str] = set()
        self._cut: set[str] = set()
        self._script("up", str(count))
        self._variables["SLURM_CONF"] = self._script("env").strip().removeprefix("export SLURM_CONF=")
        self.directory = Path(self._variables["SLURM_CONF"]).parents[1]

    def close(self) -> None:
        self._script("down")

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Runs a command of SLURM's on this machine, with this process's environment and `env`. Returns its output."""
        variables = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith("SLURM_") and key not in _OF_A_RANK
            },
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            **(env or {}),
            **self._variables,
        }
        done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    # Jobs

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Submits a script, whose environment is this process's, `env`, and PATH and PYTHONPATH of the suite."""
        return int(self.run("sbatch", "--parsable", *options, str(script), *arguments, env=env, cwd=cwd))

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, Reason, ExitCode, ..."""
        (line,) = self.run("scontrol", "show", "job", "--oneliner", str(job)).splitlines()
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][\w:/]*=)", line.strip()))

    def state(self, job: int | str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def nodes_of(self, job: int | str) -> list[str]:
        """The nodes that a job has, or had last."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def wait(self, job: int | str) -> dict[str, str]:
        """Waits for the end of a job, over all its requeues; returns `job`."""
        self.wait_until(lambda: self.state(job) in _ENDED, f"the end of job {job}", job)
        return self.job(job)

    def wait_until(
        self,
        condition: Callable[[], bool],
        what: str,
        job: int | str | None = None,
        *,
        seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Waits for a condition. The error has the jobs, the nodes and the end of the log of `job`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = self.run("squeue") + self.run("sinfo", "--Node", "--long")
                if job is not None:
                    log = Path(self.job(job)["StdOut"])
                    said += log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:] if log.exists() else f"no {log}"
                raise AssertionError(f"not within {seconds:g} s: {what}\n{said}")
            time.sleep(0.1)

    def scancel(self, *jobs: int | str) -> None:
        self.run("scancel", *map(str, jobs))

    def signal(self, job: int | str, name: str, *options: str) -> None:
        """Sends a signal to the tasks of a job; with `--batch` to its batch shell alone, with `--full` to both."""
        self.run("scancel", f"--signal={name}", *options, str(job))

    # Nodes

    def states(self) -> dict[str, str]:
        """Each node's state: idle, mixed, down*, ... (`*`: it does not answer)."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def run_on(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on a node, which may fail."""
        line = [SCRIPT, "inside", node, *command]
        return subprocess.run(line, env=self._environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def processes(self, node: str, pattern: str) -> list[int]:
        """The processes of a node whose command line matches, oldest first, by their numbers on the node."""
        done = self.run_on(node, "pgrep", "--full", pattern)
        assert done.returncode in (0, 1), done.stderr
        return [int(number) for number in done.stdout.split()]

    def fail(self, node: str) -> None:
        """Kills all that runs on a node. Peers see its connections end, or silence if it is `cut` first."""
        self._dead.add(node)
        self._script("fail", node)

    def cut(self, node: str) -> None:
        """Cuts a node's link; it runs on."""
        self._cut.add(node)
        self._script("fail", node, "cut")

    def heal(self, node: str) -> None:
        """Undoes `fail` and `cut`."""
        if node in self._dead and not self.states()[node].startswith("down"):
            # A node that is back before SLURM has missed it keeps the jobs that died with it, for ever.
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
        self._script("heal", node)
        self._dead.discard(node)
        self._cut.discard(node)

    def undrain(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def reset(self) -> None:
        """Cancels every job, heals every node, and waits until all are idle."""
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.scancel(*set(jobs))
        for node in self._dead | self._cut:
            self.heal(node)
        for node, state in self.states().items():
            if state.startswith("drain"):
                self.undrain(node)

        def idle() -> bool:
            return not self.run("squeue", "--noheader") and set(self.states().values()) == {"idle"}

        self.wait_until(idle, "no job, and every node idle")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._variables}

    def _script(self, *arguments: str) -> str:
        line = [SCRIPT, *arguments]
        done = subprocess.run(line, env=self._environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert done.returncode == 0, f"cluster.sh {' '.join(arguments)}: {done.stderr}"
        return done.stdout
