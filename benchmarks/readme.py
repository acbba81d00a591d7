"""Writes the figures of README.md from benchmarks/results/*.json.

    python benchmarks/readme.py

Each block of the README between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by what the function of that name
makes of `results/NAME.json`. A test runs it and finds nothing to change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results"


def real_job(result: dict[str, Any]) -> str:
    """Accuracy and speed of the real job."""
    accuracy, speed, wall = (result["spread"][name] for name in ("test_accuracy", "images_per_second", "wall_seconds"))
    same = "ends with the same weights" if result["same_weights_through_torchrun"] else "ENDS WITH OTHER WEIGHTS"
    return (
        f"On an {result['hardware']}, with {result['data']} as the images: test accuracy"
        f" {accuracy['median']:.1%} ({accuracy['min']:.1%} to {accuracy['max']:.1%}),"
        f" {speed['median']:,.0f} images/s ({speed['min']:,.0f} to {speed['max']:,.0f}), {wall['median']:.0f} s a run;"
        f" median and range of n = {result['n']} seeds. The same run through torchrun {same}."
    )


def augment(result: dict[str, Any]) -> str:
    """The table of the augmentation benchmark."""
    lines = ["| augmentation | images/s, one core | range | dist_cifar is |", "|---|---|---|---|"]
    for row in sorted(result["results"], key=lambda row: -row["images_per_second_median"]):
        low, high = row["images_per_second_min"], row["images_per_second_max"]
        ratio = "" if row["name"] == "dist_cifar" else f"{row['ours_over_this_median']:.0f}x"
        lines.append(f"| {row['name']} | {row['images_per_second_median']:,} | {low:,} to {high:,} | {ratio} |")
    return "\n".join(
        [*lines, "", f"Median and range of n = {result['rounds']} interleaved rounds, float32, {result['hardware']}."]
    )


def epoch(result: dict[str, Any]) -> str:
    """How much of a step the loop waits for data."""
    parts = [
        f"{row['precision']}: {row['ratio_median']:.1%} ({row['ratio_min']:.1%} to {row['ratio_max']:.1%}) of the"
        f" images/s of the same loop with one constant batch, data wait {row['data_wait_share_median']:.2%} of a step"
        for row in result["results"]
    ]
    return (
        "ResNet-20 on two ranks with one core each, real batches against a constant one. "
        + "; ".join(parts)
        + f". Median and range of n = {result['pairs']} pairs, {result['hardware']}."
    )


def exactness(result: dict[str, Any]) -> str:
    """The table of the digests."""
    lines = ["| model | steps | world sizes | digest of the state | seconds, all phases |", "|---|---|---|---|---|"]
    for row in result["results"]:
        phases = ", ".join(" -> ".join(map(str, phase["world_sizes"])) for phase in row["phases"])
        seconds = sum(phase["seconds"] for phase in row["phases"])
        digest = f"`{row['digest']}`, all equal" if row["equal"] else "NOT EQUAL"
        lines.append(f"| {row['model']} {row['precision']} | {row['steps']} | {phases} | {digest} | {seconds:,.0f} |")
    where = f"With {result['data']} as the images, batch 128, on an {result['hardware']}"
    load = f"which did other work as well (load average {result['load_average_before']:g} at the start)"
    return "\n".join([*lines, "", f"{where}, {load}."])


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "real_job": real_job,
    "augment": augment,
    "epoch": epoch,
    "exactness": exactness,
}


def updated(readme: str) -> str:
    """The README with its figures as the results say."""
    for name, make in BLOCKS.items():
        text = make(json.loads((RESULTS / f"{name}.json").read_text()))
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        readme, count = block.subn(lambda match, text=text: match[1] + text + match[2], readme)
        assert count == 1, f"README.md has {count} blocks {name}"
    return readme


if __name__ == "__main__":
    path = REPOSITORY / "README.md"
    path.write_text(updated(path.read_text()))
