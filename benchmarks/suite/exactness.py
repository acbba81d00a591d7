"""Is the result the same, to the last bit, for every world size, and for a run that is killed and resumes?

    python benchmarks/suite/exactness.py PATH_TO_FOLDER_OR_ZIP
    python benchmarks/suite/exactness.py PATH_TO_FOLDER_OR_ZIP --every-world-size --steps 40

Runs `dist-cifar verify` on real images: ResNet-20 and ResNet-18, each in fp32 and bf16, global batch 128 in 8 virtual
ranks, world sizes 1, 2 and 4 and the chain 4 -> 2 -> 1 -> 4. With `--every-world-size` it is ResNet-20 at all world
sizes from 1 to 8 with 8 virtual ranks, and from 1 to 6 with 6 and with 12, and the chains of these down and up again.
Writes benchmarks/results/exactness.json, or world_sizes.json, and exits with 1 if a bit differs. Ranks of one thread
each share the cores of the machine: the seconds say how long the test takes, not how fast training is.
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


EVERY = ((8, 128, "1,2,3,4,5,6,7,8"), (6, 120, "1,2,3,4,5,6"), (12, 120, "1,2,3,4,5,6"))
"""Virtual ranks, global batch, and world sizes."""


def run(
    model: str,
    precision: str,
    data: Path,
    steps: int,
    *,
    virtual_ranks: int = 8,
    batch: int = 128,
    sizes: str = "1,2,4",
) -> dict[str, Any]:
    """One `verify`; its result, equal or not."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [
            *(sys.executable, "-m", "dist_cifar", "verify", "--config", f"configs/{CONFIGS[model]}.yaml"),
            *("--world-sizes", sizes, "--steps", str(steps), "--dir", f"{scratch}/runs", "--json", str(result)),
            *("run.device=cpu", "data.source=folder", f"data.root={data}", f"compute.precision={precision}"),
            *(f"batch.global_size={batch}", f"strategy.virtual_ranks={virtual_ranks}"),
        ]
        subprocess.run(command, cwd=REPOSITORY)
        row = {"model": model, "precision": precision, "virtual_ranks": virtual_ranks}
        return row | json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Runs all and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every-world-size", action="store_true")
    options = parser.parse_args()
    load, data, steps = os.getloadavg()[0], options.data.resolve(), options.steps
    if options.every_world_size:
        rows = [
            run("resnet20", precision, data, steps, virtual_ranks=virtual_ranks, batch=batch, sizes=sizes)
            for virtual_ranks, batch, sizes in EVERY
            for precision in PRECISIONS
        ]
    else:
        rows = [run(model, precision, data, steps) for model in CONFIGS for precision in PRECISIONS]
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
    path = REPOSITORY / f"benchmarks/results/{'world_sizes' if options.every_world_size else 'exactness'}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['model']} {row['precision']}: {'all equal' if row['equal'] else 'DIFFERENT'} {row['digest']}")
    sys.exit(0 if result["all_equal"] else 1)


if __name__ == "__main__":
    main()
