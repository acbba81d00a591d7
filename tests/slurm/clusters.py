"""The cluster that `cluster.sh` brings up, as the tests see it.

Contract: every method waits for SLURM's answer; an answer that does not come or is an error is an `AssertionError` with
what SLURM says. `Cluster.reset` brings it to its first state: no job, every node idle.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SCRIPT = Path(__file__).with_name("cluster.sh")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """`count` nodes: `node1`, `node2`, ..."""

    def __init__(self, count: int) -> None:
        self.nodes = [f"node{number}" for number in range(1, count + 1)]
        self._call("up", str(count))
        self.conf = self._call("conf").strip()

    def close(self) -> None:
        self._call("down")

    def _call(self, *arguments: str) -> str:
        # Into files: what `up` starts keeps its output open for longer than it takes itself.
        done = subprocess.run([SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"cluster.sh {' '.join(arguments)}: {done.stdout}"
        return done.stdout

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """A command of SLURM's; returns its standard output."""
        variables = {**(os.environ if env is None else env), "SLURM_CONF": self.conf}
        done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Submits a script; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *options, str(script), *arguments, env=env, cwd=cwd))

    def sbatch_wrapped(self, command: str, *, options: Sequence[str] = ()) -> int:
        """Submits a command line."""
        return int(self.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}"))

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ExitCode, ..."""
        text = self.run("scontrol", "show", "job", "-o", str(job))
        return dict(re.findall(r"(?:^| )(\w+)=(\S*)", text))

    def nodes_of(self, job: int) -> list[str]:
        """The nodes that it runs on, or last ran on."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def wait(self, job: int | str, seconds: float) -> dict[str, str]:
        """Until the job has ended for good."""
        self.until(lambda: self.job(job)["JobState"] in _ENDED, seconds, f"the end of job {job}", job)
        return self.job(job)

    def until(self, condition: Callable[[], bool], seconds: float, what: str, job: int | str | None = None) -> None:
        """Until the condition holds. Fails with what SLURM says."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = self.run("squeue") + self.run("sinfo", "-N")
                if job is not None:
                    output = Path(self.job(job)["StdOut"])
                    said += output.read_text(errors="replace")[-6000:] if output.exists() else f"no {output}"
                raise AssertionError(f"not within {seconds:g} s: {what}\n{said}")
            time.sleep(0.2)

    def inside(self, node: str, *command: str) -> str:
        """A command in a node, whatever its exit code; returns its standard output."""
        return subprocess.run([SCRIPT, "inside", node, *command], stdout=subprocess.PIPE, text=True, timeout=60).stdout

    def processes(self, node: str, pattern: str) -> list[int]:
        """Processes of a node whose command line matches, by their numbers there."""
        return [int(number) for number in self.inside(node, "pgrep", "-f", pattern).split()]

    def fail(self, node: str) -> None:
        """The power goes."""
        self._call("fail", node)

    def cut(self, node: str) -> None:
        """The cable goes, the processes stay."""
        self._call("fail", node, "cut")

    def drain(self, node: str) -> None:
        """No further job for it."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def states(self) -> dict[str, str]:
        """State of each node, e.g. `idle`, `down*`."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T").splitlines())

    def reset(self) -> None:
        """Ends all jobs and mends all nodes."""
        jobs = self.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.run("scancel", *jobs)
        for node, state in self.states().items():
            if state.startswith("drain"):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        for node in self.nodes:
            self._call("heal", node)

        def ready() -> bool:
            return not self.run("squeue", "-h") and set(self.states().values()) == {"idle"}

        self.until(ready, 60, "a cluster without jobs whose nodes are idle")
