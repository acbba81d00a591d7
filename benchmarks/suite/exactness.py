"""Is the result the same, to the last bit, for every world size, and for a run that is killed and resumes?

    python benchmarks/suite/exactness.py PATH_TO_FOLDER_OR_ZIP

Runs `dist-cifar verify` on real images: ResNet-20 and ResNet-18, each in fp32 and bf16, global batch 128 in 8 virtual
ranks, world sizes 1, 2 and 4 and the chain 4 -> 2 -> 1 -> 4. Writes benchmarks/results/exactness.json, and exits with 1
if a bit differs. Four ranks of one thread each share the cores of the machine: the seconds say how long the test
takes, not how fast training is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dist_cifar.run.provenance import hardware, versions

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {"resnet20": "cpu_resnet20", "resnet18": "cifar10_resnet18"}
PRECISIONS = ("fp32", "bf16")


def run(model: str, precision: str, data: Path, steps: int) -> dict[str, Any]:
    """One `verify`; its result, equal or not."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [
            *(sys.executable, "-m", "dist_cifar", "verify", "--config", f"configs/{CONFIGS[model]}.yaml"),
            *("--world-sizes", "1,2,4", "--steps", str(steps), "--dir", f"{scratch}/runs", "--json", str(result)),
            *("run.device=cpu", "data.source=folder", f"data.root={data}", f"compute.precision={precision}"),
            *("batch.global_size=128", "strategy.virtual_ranks=8"),
        ]
        subprocess.run(command, cwd=REPOSITORY)
        return {"model": model, "precision": precision} | json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Runs all and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [
        run(model, precision, options.data.resolve(), options.steps) for model in CONFIGS for precision in PRECISIONS
    ]
    numerics = rows[0]["numerics"]
    result = {
        "hardware": hardware(),
        "load_average_before": round(load, 2),
        "data": options.data.name,
        "versions": versions(),
        "numerics": numerics,
        "all_equal": all(row["equal"] for row in rows),
        "results": [{key: value for key, value in row.items() if key != "numerics"} for row in rows],
    }
    path = REPOSITORY / "benchmarks/results/exactness.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['model']} {row['precision']}: {'all equal' if row['equal'] else 'DIFFERENT'} {row['digest']}")
    sys.exit(0 if result["all_equal"] else 1)


if __name__ == "__main__":
    main()
