"""Seconds from the SIGKILL of one rank to the next optimizer step of the job, and where they go.

    python benchmarks/suite/restart.py --out benchmarks/results/restart.json

Contract: a job of two CPU ranks (ResNet-20 on generated images, a row of the log in every step, a checkpoint in every
fifth) runs under each launcher; after some steps a rank is killed, the first and the second in turn, and the clock runs
until the next row of the log. The parts:

- `detection`: until the first process of the new start exists: the others notice and end, the launcher starts again;
- `start`: until the run says that it resumes: imports, rendezvous, the checkpoint is loaded;
- `step`: until the end of the first step.

`srun` is `slurm/train_srun.sbatch` on the suite's cluster (tests/integration/slurm), whose nodes share this machine.
Run it on a machine that does nothing else: about ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dist_cifar.run.provenance import hardware, versions  # noqa: E402
from dist_cifar.run.run_dir import RunDir  # noqa: E402
from tests.integration.slurm.clusters import Cluster  # noqa: E402

TRAINING = (
    *(
        "--config",
        "configs/quickstart.yaml",
        "train.epochs=100000",
        "run.log_every_steps=1",
        "eval.every_epochs=100000",
    ),
    *("checkpoint.every_steps=5", "tracking.wandb=disabled", "run.device=cpu"),
)
STEPS, PATIENCE_SECONDS = 12, 120.0
"""Steps of a start before a rank is killed; after so long there is something wrong."""
PARTS = ("detection", "start", "step")


def processes_of(run: Path) -> dict[int, tuple[int, int]]:
    """The parent and the age of each process of Python's whose arguments name this run directory."""
    found: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if f"run.dir={run}".encode() in arguments and b"python" in arguments[0]:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1]), int(fields[19])
    return found


def ranks_of(run: Path) -> list[int]:
    """Those of them that are no parent of another one, by their age."""
    found = processes_of(run)
    parents = {parent for parent, _ in found.values()}
    return sorted(found.keys() - parents, key=lambda pid: found[pid][1])


@contextmanager
def script(name: str, run: Path) -> Iterator[None]:
    """The job under a script of launch/."""
    environment = os.environ | {"MAX_RESTARTS": "1000", "RANKS": "2"}
    words = [f"launch/{name}", *(("--ranks", "2") if name == "local.sh" else ()), *TRAINING, f"run.dir={run}"]
    process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def srun(cluster: Cluster, run: Path) -> Iterator[None]:
    """The job under srun."""
    text = (REPOSITORY / "slurm/train_srun.sbatch").read_text(encoding="utf-8")
    batch = run.parent / "train_srun.sbatch"
    batch.write_text(text.replace("max_restarts=3", "max_restarts=1000"), encoding="utf-8")
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={run.parent}/job.log"]
    cluster.sbatch(batch, *TRAINING, f"run.dir={run}", options=options, cwd=REPOSITORY)
    try:
        yield
    finally:
        cluster.reset()


def wait_until(what: str, holds: Any) -> float:
    """The time at which `holds` is first true, to some milliseconds."""
    deadline = time.time() + PATIENCE_SECONDS
    while not holds():
        if time.time() > deadline:
            raise TimeoutError(f"{what} did not come within {PATIENCE_SECONDS:g} s")
        time.sleep(0.004)
    return time.time()


def last_step(run: Path) -> int:
    """The step of the last row of the log."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            rows = [
                json.loads(line) for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")
            ]
    except OSError:
        return 0
    return max((row["step"] for row in rows), default=0)


def starts(run: Path) -> list[dict[str, Any]]:
    """The events of starts and resumes."""
    with contextlib.suppress(OSError):
        return [event for event in RunDir(run).events()[0] if event["event"] in ("started", "resumed")]
    return []


def one_restart(run: Path, victim: int) -> dict[str, float]:
    """Kills a rank; the seconds of each part."""
    wait_until("the first steps", lambda: starts(run) and last_step(run) >= starts(run)[-1]["step"] + STEPS)
    begun = len(starts(run))
    time.sleep(random.random() / 2)
    ranks = ranks_of(run)
    assert len(ranks) == 2, ranks
    known = set(processes_of(run))
    killed = time.time()
    os.kill(ranks[victim], signal.SIGKILL)
    born = wait_until("a new process", lambda: set(processes_of(run)) - known)
    resumed = wait_until("the resume", lambda: len(starts(run)) > begun)
    at = starts(run)[-1]["step"]
    metrics = run / "metrics.jsonl"
    stepped = wait_until("a step", lambda: last_step(run) > at and metrics.stat().st_mtime > resumed - 1)
    return {"detection": born - killed, "start": resumed - born, "step": stepped - resumed, "all": stepped - killed}


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "p50": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "all": [round(value, 3) for value in values],
    }


def measure(launcher: str, n: int) -> dict[str, Any]:
    """The row of one launcher."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        run = Path(directory) / "run"
        if launcher == "srun":
            cluster = stack.enter_context(contextlib.closing(Cluster(2)))
            stack.enter_context(srun(cluster, run))
        else:
            stack.enter_context(script(launcher, run))
        rows = [one_restart(run, i % 2) for i in range(n)]
    return {
        "launcher": launcher,
        "n": n,
        **{f"{part}_seconds": spread([row[part] for row in rows]) for part in (*PARTS, "all")},
    }


def main() -> None:
    """Measures each launcher and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launchers", nargs="+", default=["torchrun.sh", "local.sh", "srun"])
    parser.add_argument("--n", type=int, default=20)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for launcher in options.launchers:
        rows.append(measure(launcher, options.n))
        print(
            {name: value["p50"] if isinstance(value, dict) else value for name, value in rows[-1].items()}, flush=True
        )
    result = {"benchmark": "restart", "hardware": hardware(), "load_average_before": round(load, 2)}
    result |= {"versions": versions(), "results": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
