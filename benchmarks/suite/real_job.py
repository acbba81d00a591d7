"""The real job of the README: ResNet-20, three epochs of CIFAR-10, two CPU ranks, several seeds, two launchers.

    python benchmarks/suite/real_job.py PATH_TO_FOLDER_OR_ZIP

Runs `configs/cpu_resnet20.yaml` through `accelerate launch` once for each seed, and seed 0 through `torchrun` as well,
which must end with the same weights. Writes benchmarks/results/real_job.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dist_cifar.run.provenance import hardware

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "accelerate": [f"{BIN}/accelerate", "launch", "--config_file", "launch/accelerate/cpu.yaml"],
    "torchrun": [f"{BIN}/torchrun", "--standalone", "--nproc-per-node", "2"],
}
SEEDS = (0, 1, 2)
KEPT = ("test_accuracy", "best_val_accuracy", "images_per_second", "data_wait_share", "wall_seconds", "weights_sha256")


def run(launcher: str, data: Path, seed: int) -> dict[str, Any]:
    """One run in a fresh directory; what its summary says."""
    directory = Path(tempfile.mkdtemp())
    command = [
        *LAUNCHERS[launcher],
        *("dist_cifar/train.py", "--config", "configs/cpu_resnet20.yaml"),
        *("data.source=folder", f"data.root={data}", f"run.seed={seed}", f"run.dir={directory}"),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    summary = json.loads((directory / "summary.json").read_text())
    shutil.rmtree(directory)
    row = {"launcher": launcher, "seed": seed, "world_size": summary["world_size"]}
    return row | {name: summary[name] for name in KEPT} | {"versions": summary["versions"]}


def main() -> None:
    """Runs all, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    data = parser.parse_args().data.resolve()
    load = os.getloadavg()[0]
    rows = [run("accelerate", data, seed) for seed in SEEDS] + [run("torchrun", data, 0)]
    same = rows[0]["weights_sha256"] == rows[-1]["weights_sha256"]
    by_seed = rows[: len(SEEDS)]
    result = {
        "hardware": hardware(),
        "load_average_before": round(load, 2),
        "data": data.name,
        "n": len(SEEDS),
        "versions": rows[0].pop("versions"),
        "same_weights_through_torchrun": same,
        "spread": {
            name: {
                "min": min(row[name] for row in by_seed),
                "median": statistics.median(row[name] for row in by_seed),
                "max": max(row[name] for row in by_seed),
            }
            for name in KEPT[:-1]
        },
        "runs": [{key: value for key, value in row.items() if key != "versions"} for row in rows],
    }
    path = REPOSITORY / "benchmarks/results/real_job.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for name, spread in result["spread"].items():
        print(f"{name:<20} median {spread['median']:.4f}  min {spread['min']:.4f}  max {spread['max']:.4f}")
    print(f"same weights through torchrun: {same}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
