"""`dist-cifar bench` and `benchmarks/suite/strategy.py`: their figures are right; only running them imports torch."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from types import ModuleType

import pytest

from dist_cifar.cli import main
from dist_cifar.tools.bench import GPU_IMAGES_PER_SECOND, augment_report, bench_augment
from tests import PATIENCE_SECONDS, REPOSITORY

STRATEGY = REPOSITORY / "benchmarks/suite/strategy.py"


def figures(report: str) -> dict[str, tuple[float, ...]]:
    """For each output type images/s, its minimum and maximum, and the GPUs fed."""
    found = re.findall(r"^(float32|bfloat16) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)$", report, re.MULTILINE)
    return {name: tuple(float(number.replace(",", "")) for number in numbers) for name, *numbers in found}


def test_augment_measures_both_output_types(capsys):
    bench_augment(window_seconds=0.01)
    report = capsys.readouterr().out
    found = figures(report)
    assert found.keys() == {"float32", "bfloat16"}
    for median, low, high, gpus in found.values():
        assert 100 < low <= median <= high
        assert gpus == pytest.approx(median / GPU_IMAGES_PER_SECOND, abs=0.051)
    assert "windows of 0.01 s" in report


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0 and "bench" in done.stdout, done.stderr


def test_bench_names_its_entries_when_none_is_given(capsys):
    assert main(["bench"]) == 2
    assert "BENCHMARK" in capsys.readouterr().err


# --- benchmarks/suite/strategy.py --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strategy() -> ModuleType:
    specification = importlib.util.spec_from_file_location("strategy_benchmark", STRATEGY)
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STRATEGY.parent))  # as when it is run
        specification.loader.exec_module(module)
    return module


def test_bytes_on_the_wire_are_counted(strategy):
    assert strategy.wire_bytes_ring(1000, 1) == strategy.wire_bytes_exact([1000], 1) == 0
    assert strategy.wire_bytes_ring(1000, 4) == 1.5 * 4000
    assert strategy.wire_bytes_exact([1000, 998], 4) == 1.5 * (4000 + 4000)  # padded to a multiple of four elements


@pytest.mark.slow
def test_strategy_benchmark_measures_the_traffic_that_it_counts(tmp_path):
    """On four ranks, where handing every gradient to everyone would be twice as much."""
    out = tmp_path / "strategy.json"
    quick = ["--rounds", "1", "--ranks", "4", "--models", "resnet20", "--precisions", "fp32", "--sample-seconds", "0"]
    done = subprocess.run(
        [sys.executable, str(STRATEGY), *quick, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"hardware", "versions", "rounds", "load_average_before"} <= result.keys()
    (row,) = result["results"]
    assert (row["model"], row["precision"], row["ranks"], row["steps_per_sample"]) == ("resnet20", "fp32", 4, 1)
    for name in ("exact", "ddp_equal", "ddp_natural"):
        assert row[f"{name}_wire_measured_over_counted"] == pytest.approx(1, abs=0.04)
    for name in ("exact_over_ddp_equal", "exact_over_ddp_equal_cpu", "exact_over_ddp_natural"):
        assert 0 < row[f"{name}_min"] <= row[f"{name}_median"] <= row[f"{name}_max"]
    parts = row["milliseconds_per_step"]["exact"]
    assert all(parts[name] > 0 for name in ("tree_adds", "packing", "all_to_all", "all_gather", "sum_over_ranks"))
