"""`dist-cifar bench`: its figures are consistent, and only running it imports torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dist_cifar.bench import GPU_IMAGES_PER_SECOND, augment_report, bench_augment
from dist_cifar.cli import main


def figures(report: str) -> dict[str, tuple[float, ...]]:
    """For each output type images/s, its minimum and maximum, and the GPUs fed."""
    found = re.findall(r"^(float32|bfloat16) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)$", report, re.MULTILINE)
    return {name: tuple(float(number.replace(",", "")) for number in numbers) for name, *numbers in found}


def test_augment_measures_both_output_types():
    said: list[str] = []
    bench_augment(window_seconds=0.01, say=said.append)
    found = figures(said[-1])
    assert found.keys() == {"float32", "bfloat16"}
    for median, low, high, gpus in found.values():
        assert 100 < low <= median <= high
        assert gpus == pytest.approx(median / GPU_IMAGES_PER_SECOND, abs=0.051)
    assert "windows of 0.01 s" in said[-1]


def test_augment_report_says_the_median_and_names_the_assumption():
    report = augment_report({"float32": [210_000.0, 70_000.0, 140_000.0], "bfloat16": [35_000.0] * 3}, 0.5)
    assert figures(report) == {
        "float32": (140_000, 70_000, 210_000, 2.0),
        "bfloat16": (35_000, 35_000, 35_000, 0.5),
    }
    assert "3 windows of 0.5 s" in report and "70,000 a GPU" in report and "assumption" in report


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["bench", "augment", "--help"]])
def test_help_imports_no_torch(arguments):
    code = f"""
import sys
from dist_cifar.cli import main
try:
    main({arguments})
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "bench" in done.stdout, done.stderr


def test_bench_names_its_entries_when_none_is_given(capsys):
    assert main(["bench"]) == 2
    assert "BENCHMARK" in capsys.readouterr().err
