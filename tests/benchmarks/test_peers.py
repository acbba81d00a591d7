"""`benchmarks/suite/peers.py`: its arithmetic and its commands. To run the peers takes what the extra `bench`
installs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from dist_cifar.config import load_config
from tests import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks/suite"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    specification = importlib.util.spec_from_file_location("peers_benchmark", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["peers_benchmark"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def sample(peers: ModuleType, rate: float):
    return peers.Sample(
        images_per_second=rate, data_wait_share=0.5, startup_seconds=1.0, peak_pss_bytes=2, peak_rss_bytes=3
    )


def row(peers: ModuleType, name: str, variant: str, precision: str, workers: int | None = None):
    return peers.Row(model="resnet20", shape="1x2", name=name, variant=variant, precision=precision, workers=workers)


@pytest.mark.parametrize(("warm_up", "rate", "wait"), [(1, 2 * 12 / 6, 1.5 / 6), (2, 12 / 2, 1.0 / 2)])
def test_rate_counts_the_steps_after_the_warm_up_and_the_wait_of_all_ranks(peers, warm_up, rate, wait):
    ranks = [[(100, 50), (104, 51), (106, 53)], [(100, 7), (104, 7), (106, 7)]]
    assert peers.rate_and_wait(ranks, warm_up, 12) == (pytest.approx(rate), pytest.approx(wait))


def test_the_log_of_ours_gives_the_same_figures(peers):
    rows = [
        {"step": 2, "seconds": 10.0, "images_per_second": 4.0, "data_wait_share": 0.5},
        {"step": 4, "seconds": 14.0, "images_per_second": 6.0, "data_wait_share": 0.25},
        {"step": 6, "seconds": 18.0, "images_per_second": 6.0, "data_wait_share": 0.0},
    ]
    assert peers.rate_and_wait_of_log(rows, 12) == (4 * 12 / 8, 1.0 / 8)


def test_lines_of_code_are_those_that_a_user_writes(peers):
    source = '''"""Docstring
of two lines."""

import os

# a comment
class A:
    """Docstring."""

    def f(self):
        text = """no
docstring"""
        fast(text)  # tuned
        mark()  # measured
        return text  # not left out
'''
    assert peers.lines_of_code(source, ["# measured", "# tuned"]) == 6
    assert peers.lines_of_code(source, ["# measured"]) == 7


def test_ratio_is_taken_within_a_round(peers):
    mine = {0: sample(peers, 20.0), 1: sample(peers, 90.0)}
    other = {1: sample(peers, 30.0), 0: sample(peers, 10.0)}
    assert peers.ratios(mine, other) == [2.0, 3.0]


def test_only_the_fastest_tuned_row_of_a_peer_goes_on(peers):
    rates = {
        row(peers, "timm", "tuned", "bf16", 0): 5.0,
        row(peers, "timm", "tuned", "bf16", 4): 6.0,
        row(peers, "timm", "documented", "fp32", 4): 1.0,
        row(peers, "lightning", "tuned", "bf16", 0): 2.0,
        replace(row(peers, "timm", "tuned", "bf16", 0), shape="2x1"): 3.0,
    }
    assert peers.slower_tuned(rates) == {row(peers, "timm", "tuned", "bf16", 0)}


def test_comparisons_take_the_peer_with_the_best_median(peers):
    ours32, ours16 = (row(peers, peers.OURS, "ddp", precision) for precision in ("fp32", "bf16"))
    timm, accelerate = (row(peers, name, "documented", "fp32", 4) for name in ("timm", "accelerate"))
    tuned = row(peers, "timm", "tuned", "bf16", 0)
    rates = {
        ours32: (30, 40, 50),
        ours16: (60, 90, 80),
        timm: (10, 10, 100),
        accelerate: (20, 20, 20),
        tuned: (30, 30, 40),
        row(peers, peers.CONSTANT, "ddp", "bf16"): (99, 99, 99),
    }
    samples = {row: {i: sample(peers, rate) for i, rate in enumerate(values)} for row, values in rates.items()}
    found = [
        (
            item["precision"],
            item["against"],
            item["peer"],
            *(item[f"ratio_{kind}"] for kind in ("median", "min", "max")),
        )
        for item in peers.comparisons(samples)
    ]
    assert found == [
        ("fp32", "best documented", "accelerate", 2, 1.5, 2.5),
        ("bf16", "best documented", "accelerate", 4, 3, 4.5),
        ("bf16", "best tuned", "timm", 2, 2, 3),
    ]
    (result,) = [item for item in peers.result_rows(samples) if item["name"] == "accelerate"]
    assert (result["ddp_bf16_over_this_min"], result["ddp_bf16_over_this_median"]) == (3, 4)
    assert (result["images_per_second_max"], result["n"], result["workers"]) == (20, 3, 4)


def test_every_peer_runs_in_both_variants_on_the_shapes_that_it_can(peers):
    rows = peers.all_rows(["resnet20"], list(peers.SHAPES), [*peers.PEERS, peers.OURS, peers.CONSTANT])
    assert len(rows) == len(set(rows))
    for name, peer in peers.PEERS.items():
        mine = {(row.shape, row.variant, row.workers) for row in rows if row.name == name}
        assert mine == {
            (shape, variant, workers)
            for shape in peer.shapes
            for variant, workers in (("documented", peer.workers), ("tuned", peer.workers), ("tuned", 0))
        }
        assert (peers.PROGRAMS / peer.program).is_file()


def test_ours_is_the_real_command_with_a_config_that_it_takes(peers, tmp_path):
    mine = peers.Row(model="resnet20", shape="2x1", name=peers.OURS, variant="exact", precision="bf16")
    (tmp_path / "config.yaml").write_text(peers._config(mine, Path("images.zip"), tmp_path))
    config = load_config(tmp_path / "config.yaml", [])
    assert (config.strategy.name, config.compute.precision, config.batch.global_size) == ("exact", "bf16", 128)
    assert config.run.log_every_steps == 4 and config.run.threads_per_rank == 1
    command = peers._command(mine, tmp_path / "config.yaml")
    assert "--nproc-per-node=2" in command and command[-3].endswith("dist_cifar/train.py")
    assert peers.code_and_config(mine)["lines_of_code"] == 0 < peers.code_and_config(mine)["lines_of_config"]


def test_the_programs_mark_their_steps_once(peers):
    """A program with a mark more would be measured as twice as fast."""
    for peer in peers.PEERS.values():
        source = (peers.PROGRAMS / peer.program).read_text()
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        assert sum(ast.unparse(call.func) == "mark" for call in calls) == 1
        assert all(line.endswith("# measured") for line in source.splitlines() if "mark()" in line)


@pytest.mark.parametrize(
    ("name", "failures", "attempts", "succeeds"), [("timm", 1, 2, True), ("timm", 2, 2, False), ("ours", 1, 1, False)]
)
def test_a_peer_that_hangs_is_started_again_once_and_ours_is_not(
    peers, monkeypatch, tmp_path, name, failures, attempts, succeeds
):
    begun = []

    def run(row, data, scratch):
        assert not any(scratch.iterdir())
        (scratch / "log").touch()
        begun.append(row)
        if len(begun) <= failures:
            raise RuntimeError("not done")
        return sample(peers, 1.0)

    monkeypatch.setattr(peers, "run", run)
    one = row(peers, peers.OURS if name == "ours" else name, "ddp", "bf16")
    if succeeds:
        assert peers.run_again(one, tmp_path, tmp_path) == sample(peers, 1.0)
    else:
        with pytest.raises(RuntimeError, match="not done"):
            peers.run_again(one, tmp_path, tmp_path)
    assert begun == [one] * attempts


def test_rows_that_are_not_run_again_stay_in_their_place(peers):
    def rows(n, *cells):
        results = [
            {"model": model, "ranks": int(shape[0]), "threads_per_rank": int(shape[2]), "n": n}
            for model, shape in cells
        ]
        return {"results": results, "comparisons": [{"model": model, "shape": shape, "n": n} for model, shape in cells]}

    cells = [(model, shape) for model in peers.STEPS for shape in peers.SHAPES]
    assert peers.merged({}, rows(1, *cells) | {"rounds": 1}, cells) == rows(1, *cells) | {"rounds": 1}
    found = peers.merged(rows(1, *cells), rows(2, cells[1]), [cells[1]])
    for name in ("results", "comparisons"):
        expected = rows(1, *cells)[name]
        expected[1]["n"] = 2
        assert found[name] == expected
