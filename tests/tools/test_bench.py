"""`dist-cifar bench` and `benchmarks/suite/strategy.py`: their figures are right; only running them imports torch."""

from __future__ import annotations

import dataclasses
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


def predicted(strategy: ModuleType, **changes: float) -> dict[str, float]:
    """Times of 900 and 100 bytes at 100 and 10 bytes a second; memory as good as free, so its time can be left out."""
    cluster = strategy.Cluster(
        gpus_per_node=2,
        within_bytes_per_second=100,
        between_bytes_per_second=10,
        within_latency_seconds=1,
        between_latency_seconds=2,
        memory_bytes_per_second=changes.pop("memory", 1e12),
    )
    options = {"ranks": 2, "passes": 1, "compute_seconds": 100, "hidden_share": 0.1} | changes
    return strategy.predict(**options, exact_buckets=[900, 100], ddp_buckets=[900, 100], cluster=cluster)


def test_prediction_within_a_node_is_that_of_a_hand_calculation(strategy):
    found = predicted(strategy)
    # Half of 1000 bytes in each of two collectives, with two launches a bucket; an all-reduce has one.
    assert found["exact_communication_seconds"] == pytest.approx(2 * 5 + 4)
    assert found["ddp_communication_seconds"] == pytest.approx(2 * 5 + 2)
    assert found["exact_exposed_seconds"] == pytest.approx(14 - 10)
    assert found["ddp_exposed_seconds"] == pytest.approx(12 - 10)
    assert found["exact_over_ddp"] == pytest.approx(104 / 102)


def test_prediction_between_nodes_knows_that_an_all_to_all_leaves_through_one_port(strategy):
    found = predicted(strategy, ranks=4)
    # Two of the three other ranks are on the other node: half of the bytes at 10 a second, against a ring at 20.
    assert found["exact_communication_seconds"] == pytest.approx(50 + 0.75 * 1000 / 20 + 8)
    assert found["ddp_communication_seconds"] == pytest.approx(2 * 0.75 * 1000 / 20 + 4)


def test_prediction_hides_everything_but_the_last_bucket(strategy):
    found = predicted(strategy, hidden_share=1.0)
    assert found["exact_exposed_seconds"] == pytest.approx(1 + 2)
    assert predicted(strategy, ranks=1)["exact_exposed_seconds"] == 0


def test_prediction_counts_the_memory_traffic_of_the_tree(strategy):
    found = predicted(strategy, passes=3, memory=1000)
    assert found["exact_memory_seconds"] == pytest.approx(3 * 2 + 2 + 3 * 0.5 + 1)
    assert found["ddp_memory_seconds"] == pytest.approx(3 * 2 + 4)


def test_more_network_costs_less(strategy):
    rows = [
        strategy.predictions(dataclasses.replace(strategy.Cluster(), between_bytes_per_second=speed))
        for speed in (25e9, 100e9)
    ]
    assert [row["exact_over_ddp"] > 1 for row in rows[0]] == [True] * len(strategy.PREDICTED)
    assert rows[0][-1]["exact_exposed_seconds"] > rows[1][-1]["exact_exposed_seconds"]


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
    assert {"hardware", "versions", "rounds", "load_average_before", "assumptions", "predictions"} <= result.keys()
    assert "NO GPU WAS MEASURED" in done.stdout and "no GPU" in result["assumptions"]["measured"]
    (row,) = result["results"]
    assert (row["model"], row["precision"], row["ranks"], row["steps_per_sample"]) == ("resnet20", "fp32", 4, 1)
    for name in ("exact", "ddp_equal", "ddp_natural"):
        assert row[f"{name}_wire_measured_over_counted"] == pytest.approx(1, abs=0.04)
    for name in ("exact_over_ddp_equal", "exact_over_ddp_equal_cpu", "exact_over_ddp_natural"):
        assert 0 < row[f"{name}_min"] <= row[f"{name}_median"] <= row[f"{name}_max"]
    parts = row["milliseconds_per_step"]["exact"]
    assert all(parts[name] > 0 for name in ("tree_adds", "packing", "all_to_all", "all_gather", "sum_over_ranks"))
