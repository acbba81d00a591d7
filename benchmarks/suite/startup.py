"""Seconds from the command to the end of the first optimizer step, against Accelerate's example of the same job.

    python benchmarks/suite/startup.py ZIP --out benchmarks/results/startup.json

Contract: the peer is `peers/accelerate_cv.py`, as its documentation has it, started by `accelerate launch`; ours are
the commands of the README. All have the same model, global batch and images, decoded before anything is timed: ours
from its cache, the peer's in memory. In a round every command runs, in an order that rotates from round to round; a
ratio is taken within a round. The first step has ended when the process has written that: ours its first row in
`metrics.jsonl`, the peer the file of its marks; the script looks for either in the same way. Then ours is stopped by
SIGTERM, and the peer ends by itself.

`cold` is a command before which the kernel drops what it holds of files, `warm` the same command again. That takes root
on Linux; elsewhere cold starts are left out, and the result says so. What numba compiled is on the disk in both.

Run it on a machine that does nothing else: about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peers import BIN, GLOBAL_BATCH, PEERS, PROGRAMS, REPOSITORY, prepare

from dist_cifar.run.provenance import hardware, versions

RANKS = (1, 2)
MODELS = ("resnet20", "resnet18")
STATES = ("cold", "warm")
STRATEGIES = ("exact", "ddp")
PEER = "accelerate"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
POLL_SECONDS = 0.01
LIMIT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """A command whose start is timed."""

    model: str
    ranks: int
    name: str
    """`PEER`, or the strategy of ours."""
    launcher: str
    """`accelerate launch`, `torchrun` or `python`."""

    @property
    def is_peer(self) -> bool:
        return self.name == PEER


Samples = dict[Start, dict[str, list[float]]]
"""Seconds of each round, by the state of the cache."""


def all_starts(models: Sequence[str], ranks: Sequence[int]) -> list[Start]:
    """The peer's command and ours, for every model and number of ranks."""
    return [
        Start(model=model, ranks=number, name=name, launcher=launcher)
        for model in models
        for number in ranks
        for name, launcher in [
            (PEER, "accelerate launch"),
            *((strategy, launcher) for strategy in STRATEGIES for launcher in launchers(number)),
        ]
    ]


def launchers(ranks: int) -> tuple[str, ...]:
    """What starts ours."""
    return ("accelerate launch", "torchrun" if ranks > 1 else "python")


def launch(start: Start) -> list[str]:
    """What stands before the program."""
    if start.launcher == "python":
        return [sys.executable]
    if start.launcher == "torchrun":
        return [f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={start.ranks}"]
    several = ["--config_file", f"{REPOSITORY}/launch/accelerate/cpu.yaml"]
    single = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    number = ["--num_processes", str(start.ranks)]
    return [f"{BIN}/accelerate", "launch", *(several if start.ranks > 1 else single), *number]


def time_start(start: Start, data: Path, scratch: Path) -> float:
    """Runs the command once, with `scratch` (empty) for everything that it writes. Raises `RuntimeError`."""
    threads = max(1, (os.cpu_count() or 1) // start.ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    if start.is_peer:
        peer, sign = PEERS[PEER], scratch / "0.json"
        job = {"model": start.model, "ranks": start.ranks, "batch": GLOBAL_BATCH // start.ranks, "steps": 1}
        job |= {"tuned": False, "workers": peer.workers, "data": str(scratch.parent / "images"), "out": str(scratch)}
        environment["PEERS_JOB"] = json.dumps(job)
        command = [*launch(start), str(PROGRAMS / peer.program), "--cpu"]
    else:
        config, sign = scratch / "config.yaml", scratch / "run/metrics.jsonl"
        config.write_text(yaml.safe_dump(config_of(start, data, scratch)), encoding="utf-8")
        command = [*launch(start), str(REPOSITORY / "dist_cifar/train.py"), "--config", str(config)]
    with open(scratch / "log", "w+", encoding="utf-8") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (sign.exists() and sign.stat().st_size):
                if process.poll() is not None or time.monotonic() > began + LIMIT_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"{start}: no step (exit code {process.poll()})\n{log.read()[-3000:]}")
                time.sleep(POLL_SECONDS)
            return time.monotonic() - began
        finally:
            if process.poll() is None and not start.is_peer:
                process.send_signal(signal.SIGTERM)
            process.wait()


def config_of(start: Start, data: Path, scratch: Path) -> dict[str, Any]:
    """The config file of a command of ours."""
    return {
        "run": {"dir": str(scratch / "run"), "device": "cpu", "log_every_steps": 1},
        "data": {"source": "folder", "root": str(data), "cache_dir": str(scratch.parent / "cache")},
        "model": {"name": start.model},
        "batch": {"global_size": GLOBAL_BATCH},
        "train": {"strategy": start.name, "precision": "fp32"},
        "tracking": {"wandb": "disabled"},
    }


def drop_file_caches() -> bool:
    """Whether the kernel has forgotten what it held of files."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def measure(starts: Sequence[Start], states: Sequence[str], data: Path, rounds: int) -> Samples:
    """All rounds of all commands; before the first, each runs once and is not counted."""
    samples: Samples = {start: {state: [] for state in states} for start in starts}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(data, scratch)
        for number in range(rounds + 1):
            first = number * len(starts) // (rounds + 1)
            for start in [*starts[first:], *starts[:first]]:
                for state in states if number else ("warm",):
                    if state == "cold":
                        drop_file_caches()
                    with tempfile.TemporaryDirectory(dir=scratch) as own:
                        seconds = time_start(start, data, Path(own))
                    if number:
                        samples[start][state].append(seconds)
                    print(f"round {number} {label(start)} {state:5}{seconds:7.2f} s", file=sys.stderr, flush=True)
    return samples


def label(start: Start) -> str:
    """The command in one line's beginning."""
    return f"{start.model:9}{start.ranks} ranks  {start.name:11}{start.launcher:18}"


def result_rows(samples: Samples) -> list[dict[str, Any]]:
    """A row for each command and state of the cache; those of ours with their seconds over the peer's."""
    rows = []
    for start, states in samples.items():
        peer = next(
            other for other in samples if other.is_peer and (other.model, other.ranks) == (start.model, start.ranks)
        )
        for state, seconds in states.items():
            row: dict[str, Any] = {"model": start.model, "ranks": start.ranks, "name": start.name}
            row |= {"launcher": start.launcher, "state": state, "n": len(seconds)} | spread("seconds", seconds, 2)
            if not start.is_peer:
                ratios = [mine / other for mine, other in zip(seconds, samples[peer][state], strict=True)]
                row |= spread("over_peer", ratios, 3)
            rows.append(row)
    return rows


def spread(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, minimum and maximum of `values`."""
    functions = (("median", statistics.median), ("min", min), ("max", max))
    return {f"{name}_{kind}": round(function(values), digits) for kind, function in functions}


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [
        f"{result['hardware']}; global batch {GLOBAL_BATCH}, n = {result['rounds']} rounds; command to first step",
        f"{'':41}{'':7}{'seconds (min to max)':28}over the peer's",
    ]
    for row in result["results"]:
        median, low, high = (row[f"seconds_{kind}"] for kind in ("median", "min", "max"))
        line = f"{row['model']:9}{row['ranks']} ranks  {row['name']:11}{row['launcher']:18}{row['state']:6}"
        line += f"{median:7.2f} ({low:.2f} to {high:.2f})".ljust(28)
        if "over_peer_median" in row:
            line += "{:.2f} ({:.2f} to {:.2f})".format(*(row[f"over_peer_{kind}"] for kind in ("median", "min", "max")))
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet20"], help="default: resnet20")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks (default: 1 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    states = STATES if drop_file_caches() else STATES[1:]
    samples = measure(all_starts(options.models, options.ranks), states, options.data.resolve(), options.rounds)
    result = {
        "benchmark": "startup",
        "hardware": hardware(),
        "load_average_before": load,
        "data": options.data.name,
        "global_batch": GLOBAL_BATCH,
        "rounds": options.rounds,
        "cold": "file caches dropped" if "cold" in states else f"not possible: {DROP_CACHES} cannot be written",
        "versions": versions() | {"numba": version("numba")},
        "results": result_rows(samples),
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
