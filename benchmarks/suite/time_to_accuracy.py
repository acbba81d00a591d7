"""Seconds and accuracy of the recipe `fast` against airbench94, in turns on one machine.

    python benchmarks/suite/time_to_accuracy.py PATH_TO_FOLDER_OR_ZIP --runs FOLDER --seeds 0 1 2

For each seed the peer (`benchmarks/peers/airbench94.py`, one process on all cores) and then the recipe, by
`dist-cifar train`, on the numbers of ranks that are asked for. Seconds are those of what depends on the images: initial
weights, training and the final evaluation; the images are decoded before. What is done is kept in FOLDER and not
repeated. Each run is a row of benchmarks/results/time_to_accuracy.json, in the place of an earlier row of its program,
seed and hardware. Run it on a machine that does nothing else: each row has the share of the cores' time that went to
other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from accuracy import with_row

from dist_cifar.config import load_config
from dist_cifar.data.dataset import load_dataset
from dist_cifar.distributed.cores import available_cores
from dist_cifar.errors import counted
from dist_cifar.run.provenance import hardware, versions

REPOSITORY = Path(__file__).resolve().parents[2]
PEER = REPOSITORY / "benchmarks/peers/airbench94.py"
RESULT = REPOSITORY / "benchmarks/results/time_to_accuracy.json"
PEERS_NAME = "airbench94"


def write_images(data: Path, folder: Path) -> None:
    """The images as the peer reads them, with the statistics that the recipe normalises by."""
    dataset = load_dataset(load_config(None, ["data.source=folder", f"data.root={data}"]).data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        np.save(folder / f"{name}_images.npy", split.images)
        np.save(folder / f"{name}_labels.npy", split.labels)
    statistics_of = {"mean": dataset.stats.mean, "std": dataset.stats.std}
    (folder / "statistics.json").write_text(
        json.dumps({name: list(map(float, v)) for name, v in statistics_of.items()})
    )


KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Makes glibc keep memory that is freed, as this package does for itself: the peer is a tenth faster with it."""


def run_peer(images: Path, seed: int, out: Path) -> dict[str, Any]:
    """One run of the peer."""
    command = [sys.executable, PEER, images, "--seed", str(seed), "--out", out]
    subprocess.run(command, check=True, env=os.environ | KEPT_MEMORY)
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def run_ours(config: str, ranks: int, data: Path, seed: int, directory: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of the recipe; `wall_seconds` counts from the reading of the decoded images on."""
    command = [
        *(sys.executable, "-m", "dist_cifar", "train", "--ranks", str(ranks), "--config", f"configs/{config}.yaml"),
        *("data.source=folder", f"data.root={data}", f"run.seed={seed}", f"run.dir={directory}", "run.device=cpu"),
        *("tracking.wandb=disabled", *overrides),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "threads": summary["threads_per_rank"] * ranks,
        "seconds": summary["wall_seconds"],
        **{name: summary.get(name) for name in ("test_accuracy", "test_accuracy_tta", "precision", "steps")},
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each program against the peer, and against itself on one rank, within a seed, on one machine and on as many of
    its cores."""
    programs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        programs.setdefault((row["hardware"], row["program"]), {})[row["seed"]] = row
    found = []
    for (machine, program), ours in programs.items():
        one_rank = f"{program.partition(',')[0]}, 1 rank"
        for against in (PEERS_NAME, one_rank):
            theirs = programs.get((machine, against), {})
            pairs = [(row, theirs[seed]) for seed, row in ours.items() if seed in theirs]
            pairs = [(row, other) for row, other in pairs if row["threads"] == other["threads"]]
            if pairs and against != program != PEERS_NAME:
                seconds = [row["seconds"] / other["seconds"] for row, other in pairs]
                points = {
                    name: [row[name] - other[name] for row, other in pairs if None not in (row[name], other[name])]
                    for name in ("test_accuracy", "test_accuracy_tta")
                }
                found.append(
                    {
                        "program": program,
                        "against": against,
                        "hardware": machine,
                        "n": len(pairs),
                        "seconds_ratio_median": statistics.median(seconds),
                        "seconds_ratio_min": min(seconds),
                        "seconds_ratio_max": max(seconds),
                        **{
                            f"{name}_difference_mean": statistics.fmean(differences)
                            for name, differences in points.items()
                            if differences
                        },
                    }
                )
    return found


class OtherWork:
    """What this machine does beside the processes that are started from here and waited for."""

    def __init__(self) -> None:
        self._begun = self._seconds()

    def share(self) -> float:
        """The share of all cores' time since the start."""
        elapsed, busy, own = (now - then for now, then in zip(self._seconds(), self._begun, strict=True))
        return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))

    def _seconds(self) -> tuple[float, float, float]:
        """Of the clock, of all cores that were not idle, and of processes that have ended here."""
        cores, own = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = sum(getattr(cores, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
        return time.monotonic(), busy, own.ru_utime + own.ru_stime


def keep(row: dict[str, Any]) -> None:
    """Writes the row into the result: a machine's peer first, and each program's rows by seed."""
    rows = with_row(RESULT, row, ("hardware", "program", "seed"))
    rows.sort(key=lambda row: (row["hardware"], row["program"] != PEERS_NAME, row["program"], row["seed"]))
    result = {"benchmark": "time_to_accuracy", "comparisons": compared(rows), "runs": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Runs what is not done yet, seed by seed, and writes the JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of the images, the results and the run directories"
    )
    parser.add_argument("--config", default="fast", help="the recipe, a file of configs/ without its ending")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="one rank computes with all cores")
    options = parser.parse_args()
    data, runs = options.data.resolve(), options.runs.resolve()
    images = runs / "images"
    if not (images / "statistics.json").exists():
        write_images(data, images)
    for seed in options.seeds:
        for ranks in (0, *options.ranks):
            program = f"{options.config}, {counted(ranks, 'rank')}" if ranks else PEERS_NAME
            path = runs / f"{program.replace(', ', '-').replace(' ', '-')}-seed-{seed}.json"
            if not path.exists():
                others = OtherWork()
                if ranks == 0:
                    row = run_peer(images, seed, runs / "peer.json")
                else:
                    threads = [f"run.threads_per_rank={available_cores()}"] if ranks == 1 else []
                    row = run_ours(options.config, ranks, data, seed, runs / path.stem, threads)
                row = {"program": program, **row, "other_work_share": round(others.share(), 4)}
                row |= {"hardware": hardware(), "data": data.name, "versions": versions()}
                path.write_text(json.dumps(row) + "\n", encoding="utf-8")
            row = json.loads(path.read_text(encoding="utf-8"))
            keep(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
