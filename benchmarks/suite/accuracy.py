"""What accuracy the recipes reach on real images, and what each change to Adam's recipe gains.

    python benchmarks/suite/accuracy.py PATH_TO_FOLDER_OR_ZIP --runs FOLDER --recipes adam adamw --seeds 0 1

Trains each recipe with each seed, seed by seed, in run directories below FOLDER, which are kept: started again, it
resumes what was interrupted and does not repeat what is done. Each run that is done is a row of
benchmarks/results/accuracy.json, in the place of an earlier row of its recipe, number of epochs, seed, images, ranks
and hardware. Accuracies hold on a machine that does other work as well; `--beside-other-work` says that it does, and
the pages then leave the seconds out. A run stays on the machine that began it, and was alone if it was each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare_commits import rows_of

from dist_cifar.run.provenance import hardware

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = REPOSITORY / "benchmarks/results/accuracy.json"

_ADAM = [
    *("model.name=resnet20", "batch.global_size=256", "train.epochs=10"),
    *("optimizer.warmup_epochs=0.5", "plateau.patience_evaluations=1", "compute.precision=auto"),
]
_CHANGES = {
    "adam": [],
    "+ decoupled decay": [
        "optimizer.name=adamw",
        "optimizer.weight_decay=0.07",
        "optimizer.decay_norms_and_biases=false",
    ],
    "+ flip and crop": ["augment.policy=flip_crop"],
    "+ cosine": ["schedule.name=cosine"],
    "+ all images": ["data.validation_size=0", "eval.select=last"],
    "+ label smoothing": ["train.label_smoothing=0.1"],
    "+ beta2 0.99": ["optimizer.betas=[0.9, 0.99]"],
}
"""The default recipe on a ResNet-20 for ten epochs, its patience scaled to them, and what is changed in addition."""


def recipes() -> dict[str, list[str]]:
    """The arguments of `dist-cifar train` for each recipe."""
    found: dict[str, list[str]] = {}
    arguments = list(_ADAM)
    for name, change in _CHANGES.items():
        keys = {value.partition("=")[0] for value in change}
        arguments = [value for value in arguments if value.partition("=")[0] not in keys] + change
        found[name] = arguments
    for name in ("fast", "fast90", "resnet20_sgd", "resnet18_sgd", "cpu_resnet20", "adamw"):
        found[name] = ["--config", f"configs/{name}.yaml"]
    found["default_resnet20"] = [
        "model.name=resnet20",
        "batch.global_size=256",
        "train.epochs=30",
        "compute.precision=auto",
    ]
    found["default_resnet18"] = ["train.epochs=30", "compute.precision=auto"]
    return found


def begun(directory: Path, *, alone: bool) -> dict[str, Any]:
    """The machine of a run and whether it was the run's alone, from its first start on; kept beside `directory`."""
    path = directory.with_name(f"{directory.name}.json")
    found = {"hardware": hardware(), "load_average_before": round(os.getloadavg()[0], 2), "alone": alone}
    if path.exists() and directory.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        if (directory / "summary.json").exists():
            return first
        if first["hardware"] != found["hardware"]:
            raise SystemExit(f"{directory} was begun on an {first['hardware']}, and this is an {found['hardware']}")
        found = first | {"alone": first["alone"] and alone}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def train(
    name: str, arguments: list[str], seed: int, data: Path, directory: Path, ranks: int, alone: bool
) -> dict[str, Any]:
    """One run, or what is left of it; its row."""
    machine = begun(directory, alone=alone)
    command = [
        *(sys.executable, "-m", "dist_cifar", "train", "--ranks", str(ranks), *arguments),
        *("data.source=folder", f"data.root={data}", f"run.seed={seed}", f"run.dir={directory}", "run.device=cpu"),
        *("tracking.wandb=disabled", "checkpoint.every_steps=100"),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    rows = rows_of(directory / "metrics.jsonl")
    events = rows_of(directory / "events.jsonl")
    cuts = {event["step"]: event["lr"] for event in events if event["event"] == "lr_reduction"}  # a resume repeats some
    kept = (
        "epochs",
        "steps",
        "test_accuracy",
        "test_accuracy_tta",
        "test_loss",
        "best_chosen_on",
        "test_step",
        "precision",
        "strategy",
    )
    return {
        "recipe": name,
        "change": list(_CHANGES).index(name) if name in _CHANGES else None,
        "seed": seed,
        "arguments": arguments,
        "data": data.name,
        **machine,
        "ranks": summary["world_size"],
        "threads_per_rank": summary["threads_per_rank"],
        **{key: summary.get(key) for key in kept},
        "wall_seconds": round(summary["wall_seconds"]),
        "images_per_second": round(summary["images_per_second"]),
        "curve": [[round(row["epoch"], 3), row["accuracy"]] for row in rows if row["kind"] == "eval"],
        "lr_reductions": [[round(step * summary["epochs"] / summary["steps"], 3), lr] for step, lr in cuts.items()],
        "weights_sha256": summary["weights_sha256"],
        "torch": summary["versions"]["torch"],
        "git_revision": summary["git_revision"],
    }


def with_row(result: Path, row: dict[str, Any], identity: tuple[str, ...]) -> list[dict[str, Any]]:
    """The runs of a result, with this row in the place of one that has the same values of `identity`."""
    rows = json.loads(result.read_text(encoding="utf-8"))["runs"] if result.exists() else []
    return [other for other in rows if any(other[key] != row[key] for key in identity)] + [row]


def keep(row: dict[str, Any]) -> None:
    """Writes the row into the result."""
    identity = ("recipe", "epochs", "seed", "data", "ranks", "hardware")
    rows = with_row(RESULT, row, identity)
    rows.sort(key=lambda row: [str(row[key]) for key in identity])
    RESULT.write_text(json.dumps({"runs": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Runs what is asked for, seed by seed."""
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder or zip of train/<class>/* and test/<class>/*")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--recipes", nargs="+", choices=known, default=list(_CHANGES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--beside-other-work", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.recipes:
            directory = options.runs.resolve() / f"{name.replace(' ', '_')}-{seed}"
            data, alone = options.data.resolve(), not options.beside_other_work
            row = train(name, known[name], seed, data, directory, options.ranks, alone)
            keep(row)
            print(f"{name}, seed {seed}: {row['test_accuracy']:.2%} in {row['wall_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
