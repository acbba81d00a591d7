"""What the scripts of `benchmarks/` compute and write, on made-up measurements: nothing is timed here."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dist_cifar.config import flatten, load_config
from tests import REPOSITORY

FOLDERS = [REPOSITORY / "benchmarks/suite", REPOSITORY / "benchmarks/publish"]


@pytest.fixture
def script(monkeypatch):
    """`script("name")`: a module of one of the folders, which finds its neighbours as it does when it is run."""
    before = set(sys.modules)
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent in FOLDERS:
            del sys.modules[name]


# --- startup.py ---------------------------------------------------------------------------------------------------


def test_starts_are_compared_with_the_peer_of_as_many_ranks_in_the_same_round(script):
    startup = script("startup")
    peers = {
        ranks: startup.Start(model="resnet20", ranks=ranks, name="accelerate", launcher="accelerate launch")
        for ranks in (1, 2)
    }
    ours = startup.Start(model="resnet20", ranks=2, name="ddp", launcher="torchrun")
    samples = {peers[1]: {"warm": [1.0, 1.0]}, peers[2]: {"warm": [4.0, 10.0]}, ours: {"warm": [3.0, 1.0]}}
    *others, row = startup.result_rows(samples)
    assert not any("over_peer_median" in other for other in others)
    assert (row["over_peer_min"], row["over_peer_median"], row["over_peer_max"]) == (0.1, 0.425, 0.75)
    assert (row["seconds_median"], row["n"], row["state"], row["launcher"]) == (2.0, 2, "warm", "torchrun")


def test_every_model_and_number_of_ranks_has_one_peer_and_both_strategies(script):
    startup = script("startup")
    starts = startup.all_starts(["resnet20", "resnet18"], [1, 2])
    assert len(starts) == len(set(starts)) == 20
    assert sum(start.is_peer for start in starts) == 4
    assert {start.launcher for start in starts if start.ranks == 1} == {"accelerate launch", "python"}
    assert {start.launcher for start in starts if start.ranks == 2} == {"accelerate launch", "torchrun"}


def test_two_ranks_are_asked_of_every_launcher(script):
    startup = script("startup")
    for start in startup.all_starts(["resnet20"], [2]):
        command = " ".join(startup.launch(start))
        assert command.endswith("--nproc-per-node=2" if start.launcher == "torchrun" else "--num_processes 2")


# --- scaling.py ---------------------------------------------------------------------------------------------------


def test_ratios_are_above_one_where_the_side_that_is_named_first_is_faster(script):
    scaling = script("scaling")
    seconds = {side.name: [1.0, 1.0] for side in scaling.SIDES}
    seconds |= {"ddp 2x1": [0.5, 2.0], "plain 2x1": [1.0, 1.0]}
    found = scaling.ratios(seconds)
    assert found["ddp_over_plain_two_ranks"] == found["ddp_two_ranks_over_two_threads"] == [2.0, 0.5]
    assert found["ddp_efficiency_two_ranks"] == [2.0, 0.5] and found["exact_over_ddp_two_ranks"] == [0.5, 2.0]
    assert found["ddp_over_plain_one_rank"] == [1.0, 1.0]


def test_sides_share_a_global_batch_or_a_ranks_part_of_it(script):
    scaling = script("scaling")
    per_rank = {side.name: side.batch / side.ranks for side in scaling.SIDES}
    assert per_rank["ddp 1x1"] == per_rank["ddp 2x1"] == per_rank["exact 1x1"] == per_rank["exact 2x1"]
    assert {side.batch for side in scaling.SIDES if side.ranks * side.threads == 2} == {scaling.GLOBAL_BATCH}
    assert {name for pair in scaling.RATIOS.values() for name in pair} == set(per_rank)


# --- readme.py and plot.py ----------------------------------------------------------------------------------------


def spread(name: str, median: float) -> dict[str, float]:
    return {f"{name}_median": median, f"{name}_min": 0.9 * median, f"{name}_max": 1.1 * median}


def peers_result() -> dict[str, Any]:
    rates = {("dist_cifar", "ddp", "bf16"): 690.0, ("lightning", "tuned", "bf16"): 400.0}
    rates |= {("timm", "documented", "fp32"): 240.0, ("constant", "ddp", "bf16"): 700.0}
    rows = [
        {"model": "resnet20", "ranks": ranks, "threads_per_rank": 2 // ranks, "name": name, "variant": variant}
        | {"precision": precision, "n": 3, "workers": 0, "lines_of_code": 40}
        | spread("images_per_second", rate / ranks)
        | spread("startup_seconds", 2.0)
        | spread("data_wait_share", 0.125)
        | spread("peak_pss_bytes", 2.0**30)
        for (name, variant, precision), rate in rates.items()
        for ranks in (1, 2)
    ]
    comparisons = [
        {"model": "resnet20", "shape": shape, "strategy": strategy, "precision": precision}
        | {"against": f"best {variant}", "peer": peer}
        | spread("ratio", ratio)
        for shape in ("1x2", "2x1")
        for strategy in ("ddp", "exact")
        for precision, variant, peer, ratio in (
            ("fp32", "documented", "timm", 1.25),
            ("bf16", "documented", "timm", 2.875),
            ("bf16", "tuned", "lightning", 1.725),
        )
    ]
    return {"benchmark": "peers", "hardware": "a machine", "rounds": 3, "global_batch": 128, "data": "images.zip"} | {
        "versions": {"torch": "2.15.0"},
        "results": rows,
        "comparisons": comparisons,
    }


def test_block_of_the_peers(script):
    text = script("tables").peers(peers_result())
    lines = text.splitlines()
    assert "| **dist_cifar**, `ddp` bf16 | 690 | 345 | 2.0 s | 12.5% | 1,024 MiB | 40 |" in lines
    assert "| timm, documented | 240 | 120 | 2.0 s | 12.5% | 1,024 MiB | 40 |" in lines
    assert not any("constant" in line for line in lines)
    tuned = "1.73x (1.55 to 1.90), Lightning"
    assert f"| `ddp` bf16 over the best tuned | {tuned} | {tuned} |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {4, 8}
    assert "n = 3 interleaved" in text and "a machine" in text


def test_models_that_were_run_on_their_own_may_have_other_numbers_of_rounds(script):
    result = peers_result()
    result["results"][0]["n"] = 2
    assert result["results"][0]["name"] == "dist_cifar" and script("tables").rounds(result) == "2 to 3"


def test_ours_is_set_beside_the_same_loop_without_data(script):
    result = peers_result()
    text = script("tables").constant(result)
    assert "ResNet-20 bf16, 1 x 2: 0.986; ResNet-20 bf16, 2 x 1: 0.986" in text


def test_block_of_the_overhead(script):
    calls = {"progress": 0.001, "vote": 0.002, "log": 0.0005, "checkpoint": 0.0, "writing": -0.001}
    row = {name: {"share_of_a_step": share} for name, share in calls.items()}
    row |= {"model": "resnet20", "precision": "bf16", "share_of_a_step": 0.0025, "step": {"milliseconds_median": 118.6}}
    text = script("tables").overhead({"results": [row], "ranks": 2, "global_batch": 128, "hardware": "a machine"})
    assert "| ResNet-20 bf16, 119 ms | 0.10% | 0.20% | 0.05% | 0.00% | -0.10% | 0.25% |" in text


def test_block_of_the_settings(script):
    row = {"model": "resnet20", "setting": "one thing", "threads": 2, "n": 5} | spread("images_per_second", 1100)
    row |= spread("images_per_second_without", 900) | spread("gain", 1.2)
    text = script("tables").settings({"results": [row], "global_batch": 128, "rounds": 5, "hardware": "x"})
    assert "| one thing | ResNet-20 | 2 | 1,100 | 900 | 1.20x (1.08 to 1.32) |" in text


def test_overhead_is_what_the_calls_and_the_slower_steps_take(script):
    overhead = script("overhead")
    calm, slow = (0.1, False), (0.12, True)
    steps = [calm] * (overhead.WARM_UP_STEPS + 10) + [slow] * 3 + [calm] * 10
    calls = {"progress": [1e-4] * 40, "vote": [1e-4] * 80, "log": [0.002, 0.003] * 8, "checkpoint": [9.0, 0.05, 0.05]}
    row = overhead.figures(steps, calls, overhead.Config())
    assert row["writing"]["n"] == 1 and row["writing"]["milliseconds_median"] == pytest.approx(60)
    assert row["checkpoint"]["milliseconds_max"] == 50
    expected = (1e-4 + 2e-4 + 0.005 / 50 + (0.05 + 0.06) / overhead.EPOCH_STEPS) / 0.1
    assert row["share_of_a_step"] == pytest.approx(expected, rel=1e-3)


def test_block_of_the_starts(script):
    rows = [
        {"model": "resnet20", "ranks": 1, "name": name, "launcher": launcher, "state": state, "n": 7}
        | spread("seconds", 2.0 if name == "exact" else 8.0)
        | (spread("over_peer", 0.25) if name == "exact" else {})
        for name, launcher in (("accelerate", "accelerate launch"), ("exact", "python"))
        for state in ("cold", "warm")
    ]
    text = script("tables").startup({"results": rows, "rounds": 7, "hardware": "a machine"})
    assert "| model | ranks | command | warm, s | warm, of Accelerate's | cold, s | cold, of Accelerate's |" in text
    figures = "2.0 (1.8 to 2.2) | 0.25x (0.23 to 0.28)"
    assert f"| ResNet-20 | 1 | **dist_cifar**, `exact`: `python` | {figures} | {figures} |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {8}


def test_block_of_the_scaling(script):
    scaling = script("scaling")
    seconds = {side.name: [1.0, 1.0] for side in scaling.SIDES} | {"ddp 2x1": [0.8, 0.8]}
    row = {name: scaling.spread(values, 4) for name, values in scaling.ratios(seconds).items()}
    result = {"results": [{"model": "resnet18", "precision": "bf16"} | row], "rounds": 2, "hardware": "a machine"}
    result |= {"global_batch": 128}
    text = script("tables").scaling(result)
    assert "| ResNet-18 bf16 | 1.25x (1.25 to 1.25) | 1.25x (1.25 to 1.25) | 1.00x (1.00 to 1.00) | 0.80x" in text


def test_the_picture_of_the_peers_has_a_panel_for_each_model_and_shape(script, tmp_path, monkeypatch):
    plot = script("plot")
    figures = []
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    plot.draw_peers(peers_result(), tmp_path / "peers.png")
    one, two = figures[0].axes
    assert (one.get_title(loc="left"), two.get_title(loc="left")) == (
        "ResNet-20, 1 rank with 2 threads",
        "ResNet-20, 2 ranks with 1 thread each",
    )
    assert [bar.get_width() for bar in one.patches] == [690, 400, 240]
    bf16, _, fp32 = (bar.get_y() + bar.get_height() / 2 for bar in one.patches)
    assert bf16 < 0 and fp32 > 1  # above and below the place of their program
    assert [label.get_text() for label in one.get_yticklabels()] == ["dist_cifar, ddp", "timm train.py", "Lightning"]
    plot.plt.close(figures[0])


# --- accuracy.py --------------------------------------------------------------------------------------------------


def test_every_recipe_is_a_config_and_each_change_to_adam_keeps_the_ones_before(script, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    accuracy = script("accuracy")
    configs = {}
    for name, arguments in accuracy.recipes().items():
        file = Path(arguments[1]) if arguments[0] == "--config" else None
        configs[name] = flatten(load_config(file, [] if file else arguments))
    assert configs["resnet20_sgd"]["optimizer.name"] == "sgd"
    assert configs["default_resnet18"]["augment.policy"] == "default"
    changed = set()
    for before, after in itertools.pairwise(accuracy._CHANGES):
        differing = {key for key, value in configs[after].items() if configs[before][key] != value}
        assert differing == {change.partition("=")[0] for change in accuracy._CHANGES[after]}
        assert not differing & changed
        changed |= differing


def test_a_run_takes_the_place_of_the_same_run_in_the_result(script, tmp_path, monkeypatch):
    accuracy = script("accuracy")
    monkeypatch.setattr(accuracy, "RESULT", tmp_path / "accuracy.json")
    row = {"recipe": "adam", "epochs": 10.0, "seed": 0, "hardware": "A", "test_accuracy": 0.8}
    row |= {"data": "images.zip", "ranks": 2}
    for change in ({}, {"seed": 1}, {"hardware": "B"}, {"test_accuracy": 0.81}):
        accuracy.keep(row | change)
    rows = json.loads(accuracy.RESULT.read_text())["runs"]
    assert [(r["seed"], r["hardware"], r["test_accuracy"]) for r in rows] == [
        (0, "A", 0.81),
        (0, "B", 0.8),
        (1, "A", 0.8),
    ]


def test_a_run_says_where_its_plateau_cut_the_learning_rate(script, tmp_path, monkeypatch):
    accuracy = script("accuracy")
    monkeypatch.setattr(accuracy.subprocess, "run", lambda *arguments, **options: None)
    summary = {"world_size": 2, "threads_per_rank": 1, "wall_seconds": 60.4, "images_per_second": 9.9, "epochs": 3.0}
    summary |= {"steps": 12, "weights_sha256": "ab", "versions": {"torch": "2"}, "git_revision": "cd"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    tests = [{"kind": "eval", "epoch": epoch, "accuracy": epoch / 10} for epoch in (1.0, 2.0, 3.0)]
    cut = {"event": "lr_reduction", "step": 8, "lr": 0.05}
    events = [{"event": "started", "step": 0}, cut, {"event": "started", "step": 7}, cut]
    for name, rows in (("metrics", [{"kind": "train"}, *tests]), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = accuracy.train("default_resnet20", [], 0, Path("images.zip"), tmp_path, 2, True)
    assert row["lr_reductions"] == [[2.0, 0.05]]
    assert row["curve"] == [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]
    text = script("tables").accuracy({"runs": [row | {"test_accuracy": 0.8, "hardware": "A"}]})
    assert "| `default_resnet20` | 3 | 80.00% |  | 60 | 1 | 2, A |" in text
    other = script("tables").accuracy({"runs": [row | {"test_accuracy": 0.8, "data": name} for name in ("a", "b")]})
    assert "images of a or b;" in other and other.count(f"{row['hardware']}, a |") == 1
    assert text.endswith("The plateau of `default_resnet20` (seed 0) cut the learning rate to 5.0e-02 after epoch 2.")


def test_a_run_stays_on_its_machine_and_was_alone_if_it_always_was(script, tmp_path, monkeypatch):
    accuracy = script("accuracy")
    directory = tmp_path / "run"
    monkeypatch.setattr(accuracy, "hardware", lambda: "A")
    assert not accuracy.begun(directory, alone=False)["alone"]
    assert accuracy.begun(directory, alone=True)["alone"], "it was deleted, or never trained"
    directory.mkdir()
    assert not accuracy.begun(directory, alone=False)["alone"]
    assert not accuracy.begun(directory, alone=True)["alone"], "a part of it was not"
    monkeypatch.setattr(accuracy, "hardware", lambda: "B")
    with pytest.raises(SystemExit, match="begun on an A, and this is an B"):
        accuracy.begun(directory, alone=True)
    (directory / "summary.json").touch()
    assert accuracy.begun(directory, alone=True)["hardware"] == "A", "it is done"


def test_block_of_the_changes_to_adam(script):
    rows = [
        {"recipe": recipe, "change": change, "seed": seed, "epochs": 10.0, "test_accuracy": share}
        | {"hardware": "A", "data": "images.zip"}
        for recipe, change, seed, share in (
            ("+ all images", 2, 0, 0.84),
            ("adam", 0, 1, 0.80),
            ("adam", 0, 0, 0.79),
            ("+ cosine", 1, 1, 0.8025),
            ("+ cosine", 1, 0, 0.80),
            ("fast90", None, 0, 0.87),
        )
    ]
    lines = script("tables").adam({"runs": rows}).splitlines()
    assert lines[2:5] == [
        "| adam | 79.50% +- 0.71% |  | 2 |",
        "| + cosine | 80.12% +- 0.18% | +1.00, +0.25 | 2 |",
        "| + all images | 84.00% | +4.00 | 1 |",
    ]
    assert lines[-1] == "Images of images.zip, 10 epochs, on an A; the gain of each seed on the line above."
    elsewhere = script("tables").adam({"runs": [*rows, rows[2] | {"hardware": "B", "test_accuracy": 0.5}]})
    assert lines[3] in elsewhere and "on an A and an B;" in elsewhere


# --- time_to_accuracy.py ------------------------------------------------------------------------------------------


def timed_row(program: str, seed: int, seconds: float, accuracy: float, hardware: str = "A") -> dict[str, Any]:
    row = {"program": program, "seed": seed, "seconds": seconds, "hardware": hardware, "data": "images.zip"}
    return row | {"threads": 2, "test_accuracy": accuracy - 0.01, "test_accuracy_tta": accuracy}


TIMED = [
    timed_row("airbench94", 0, 100.0, 0.91),
    timed_row("airbench94", 1, 200.0, 0.90),
    timed_row("fast, 1 rank", 0, 50.0, 0.912),
    timed_row("fast, 1 rank", 1, 120.0, 0.90),
    timed_row("fast, 1 rank", 2, 1.0, 0.99),
    timed_row("fast, 2 ranks", 1, 126.0, 0.90),
    timed_row("airbench94", 0, 10.0, 0.91, "B"),
    timed_row("fast, 2 ranks", 0, 7.0, 0.92, "B"),
]


def test_a_recipe_is_compared_within_a_seed_and_a_machine(script):
    rows = script("time_to_accuracy").compared(TIMED)
    found = {(row["hardware"], row["program"], row["against"]): row for row in rows}
    assert {key: (row["n"], row["seconds_ratio_min"], row["seconds_ratio_max"]) for key, row in found.items()} == {
        ("A", "fast, 1 rank", "airbench94"): (2, 0.5, 0.6),
        ("A", "fast, 2 ranks", "airbench94"): (1, 0.63, 0.63),
        ("A", "fast, 2 ranks", "fast, 1 rank"): (1, 1.05, 1.05),
        ("B", "fast, 2 ranks", "airbench94"): (1, 0.7, 0.7),
    }
    assert found["A", "fast, 1 rank", "airbench94"]["test_accuracy_tta_difference_mean"] == pytest.approx(0.001)


def test_programs_on_other_numbers_of_cores_are_not_compared_and_one_without_tta_is(script):
    peer, ours = timed_row("airbench94", 0, 100.0, 0.91), timed_row("fast, 1 rank", 0, 50.0, 0.91)
    (row,) = script("time_to_accuracy").compared([peer, ours | {"test_accuracy_tta": None}])
    assert row["test_accuracy_difference_mean"] == 0 and "test_accuracy_tta_difference_mean" not in row
    rows = [peer, ours | {"threads": 1}]
    assert script("time_to_accuracy").compared(rows) == []
    text = script("tables").time_to_accuracy({"runs": rows, "comparisons": []})
    assert "| airbench94 | 90.00% | 91.00% | 100 | 1 | 1 | A |" in text
    assert "| fast, 1 rank | 90.00% | 91.00% | 50 |  | 1 | A |" in text


def test_a_run_that_was_measured_before_a_kill_is_a_row_after_the_next_start(script, tmp_path, monkeypatch):
    module = script("time_to_accuracy")
    monkeypatch.setattr(module, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(module.subprocess, "run", lambda *arguments, **options: pytest.fail("it is measured"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/statistics.json").touch()
    rows = [timed_row(program, 0, 9.0, 0.9) for program in ("airbench94", "fast, 2 ranks")]
    for row, name in zip(rows, ("airbench94", "fast-2-ranks"), strict=True):
        (tmp_path / f"{name}-seed-0.json").write_text(json.dumps(row))
    words = ["x", "images.zip", "--runs", str(tmp_path), "--seeds", "0", "--ranks", "2"]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    assert json.loads(module.RESULT.read_text())["runs"] == rows


def test_what_other_processes_compute_is_counted(script, monkeypatch):
    module = script("time_to_accuracy")
    begun = module.OtherWork()._seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    assert all(now > then for now, then in zip(module.OtherWork()._seconds(), begun, strict=True))
    readings = iter([(0.0, 100.0, 1.0), (10.0, 112.0, 9.0)])  # of the clock, all processes, and ours
    monkeypatch.setattr(module.OtherWork, "_seconds", lambda self: next(readings))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert module.OtherWork().share() == pytest.approx(0.2)


def test_the_peer_runs(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 1024), ("test", 40)):
        np.save(tmp_path / f"{split}_images.npy", generator.integers(0, 256, (count, 32, 32, 3), np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count) % 10)
    (tmp_path / "statistics.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.25] * 3}))
    program = REPOSITORY / "benchmarks/peers/airbench94.py"
    command = [sys.executable, program, tmp_path, "--max-steps", "1", "--out", tmp_path / "row.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["steps"] == 1 and row["seconds"] > 0 and 0 <= row["test_accuracy"] <= 1


def test_a_machine_keeps_the_rows_of_the_others(script, tmp_path, monkeypatch):
    module, tables = script("time_to_accuracy"), script("tables")
    monkeypatch.setattr(module, "RESULT", tmp_path / "time_to_accuracy.json")
    for row in [*TIMED[::-1], TIMED[0] | {"seconds": 80.0}]:
        module.keep(row)
    result = json.loads(module.RESULT.read_text())
    assert result["runs"] == [TIMED[0] | {"seconds": 80.0}, *TIMED[1:]]
    text = tables.time_to_accuracy(result)
    assert "| fast, 2 ranks | 91.00% | 92.00% | 7 | 0.70x | 1 | B |" in text
    assert "Seconds of fast, 2 ranks over fast, 1 rank, on the same cores: 1.05x (n = 1, A)." in text


def test_the_recipes_of_the_readme_are_of_the_machine_that_ran_most_seeds(script):
    row = {
        "recipe": "fast90",
        "change": None,
        "epochs": 8.0,
        "ranks": 2,
        "seed": 0,
        "test_accuracy": 0.8,
        "wall_seconds": 90.0,
        "data": "images.zip",
    }
    runs = [row | {"hardware": "A", "alone": True}, row | {"hardware": "A", "alone": False}, row | {"hardware": "B"}]
    runs += [row | {"hardware": "B", "epochs": 5.0}, row | {"hardware": "A", "recipe": "+ cosine", "change": 3}]
    runs.append(row | {"recipe": "default_resnet20", "hardware": "B", "alone": True, "test_accuracy": 0.7})
    again = row | {"recipe": "fast", "hardware": "A", "epochs": 8.7, "test_accuracy": 0.1, "ranks": 1}
    timed = {"runs": TIMED, "comparisons": script("time_to_accuracy").compared(TIMED)}
    text = script("tables").recipes({"runs": [*runs, again]}, timed)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| `fast` | 92.40% +- 4.89% | 93.40% +- 4.89% | 0.8 | 3 | A, 1 rank |",
        "| airbench94 | 89.50% +- 0.71% | 90.50% +- 0.71% | 2.5 | 2 | A, plain PyTorch |",
        "| `fast90` | 80.00% +- 0.00% |  | 1.5 | 2 | A, 2 ranks |",
        "| `default_resnet20` | 70.00% |  | 1.5 | 1 | B, 2 ranks |",
    ]


def test_picture_of_accuracy_against_time(script, tmp_path, monkeypatch):
    plot = script("plot")
    figures: list[Any] = []
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    run = {"recipe": "resnet18_sgd", "epochs": 2.0, "wall_seconds": 600.0, "alone": True, "hardware": "A"}
    run |= {"curve": [[1.0, 0.5], [2.0, 0.9]], "best_chosen_on": "test"}
    run |= {"test_accuracy": 0.9, "test_accuracy_tta": 0.91}
    plain = run | {"recipe": "default_resnet18", "test_accuracy": 0.88, "test_accuracy_tta": None}
    plain["best_chosen_on"] = "validation"
    others = [run | change for change in ({"alone": False}, {"hardware": "C"}, {"recipe": "fast90"})]
    runs = [*TIMED, timed_row("fast, 4 ranks", 0, 40.0, 0.91)]
    plot.draw_time_to_accuracy({"runs": runs}, {"runs": [run, plain, *others]}, tmp_path / "time.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "airbench94: 1.00x",
        "fast, 1 rank: 0.33x",
        "fast, 2 ranks: 0.77x",
        "fast, 4 ranks: 0.27x",
        "resnet18_sgd: 4.0x",
        "default_resnet18: 4.0x (curve: validation)",
    ]
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[2.0, 50.0], [4.0, 90.0]]] * 2
    dots = [tuple(map(float, dot)) for drawn in axes.collections for dot in drawn.get_offsets()]
    assert dots[-3:] == [(4.0, 90.0), (4.0, 91.0), (4.0, 88.0)]
    left, right = axes.get_xlim()
    assert all(left < x < right and axes.get_ylim()[0] < y < axes.get_ylim()[1] for x, y in dots)
    plot.plt.close(figures[0])


# --- exactness.py, host_time.py ----------------------------------------------------------------------------------


def test_block_of_the_world_sizes_says_what_differs(script):
    trials = [{"world_sizes": sizes} for sizes in ([1], [2], [3], [3, 2, 1, 3])]
    rows = [
        {"model": "resnet20", "precision": "bf16", "virtual_ranks": 6, "steps": 40, "digest": digest, "equal": equal}
        | {"trials": trials}
        for digest, equal in (("abc", True), (None, False))
    ]
    text = script("tables").world_sizes({"results": rows, "data": "images.zip", "hardware": "x"})
    assert "| resnet20 bf16 | 6 | 40 | 1 to 3 | `abc`, all equal |" in text
    assert "| resnet20 bf16 | 6 | 40 | 1 to 3 | NOT EQUAL |" in text


def test_block_of_the_host_time(script):
    row = {"variant": "all three", "operations": 2000, "milliseconds_median": 40.0} | spread("ratio", 1.5)
    text = script("tables").host_time({"results": [row], "virtual_ranks": 8, "n": 5, "hardware": "x"})
    assert "| all three | 2,000 | 1.50 (1.35 to 1.65) |" in text and "the first row, 40 ms" in text


# --- scale.py, restart.py -----------------------------------------------------------------------------------------


def counted_row(world_size: int, step_seconds: float, **more: Any) -> dict[str, Any]:
    messages = {"vote": 1.0, "exchange": 2.0 * (world_size - 1), "log": 0.2}
    return {
        "world_size": world_size,
        "messages": messages,
        "bytes": dict.fromkeys(messages, 1000.0),
        "step_seconds": step_seconds,
        **more,
    }


def test_the_model_of_a_step_shares_the_cores_among_all_that_ranks_do(script):
    scale = script("scale")
    rows = [
        counted_row(1, 0.17, pass_seconds=0.01, processor_seconds=0.17),
        counted_row(2, 0.1, pass_seconds=0.01, processor_seconds=0.08 + 0.01 + 0.002 + 3.2e-3),
        counted_row(4, 0.2, pass_seconds=0.02, processor_seconds=0.08 + 0.01 + 0.002 + 7.2e-3),
        counted_row(8, 0.3, pass_seconds=0.03, processor_seconds=9.0),  # which is not used
    ]
    rows[0]["messages"] = rows[0]["bytes"] = dict.fromkeys(rows[0]["messages"], 0.0)
    one, two, four, eight = scale.checked(rows, 2)
    assert one["model_seconds"] == pytest.approx(0.17)
    assert two["model_seconds"] == pytest.approx(0.0952)
    assert four["model_seconds"] == pytest.approx(2 * 0.0992)
    assert eight["model_seconds"] == pytest.approx(4 * (0.06 + 0.01 + 0.002 + 15.2e-3))
    assert four["model_over_measured"] == pytest.approx(four["model_seconds"] / 0.2, abs=1e-3)


def test_levels_are_predicted_to_gain_between_nodes_alone(script):
    scale, tables = script("scale"), script("tables")
    rows = scale.predicted()
    assert {row["gpus"] for row in rows} == set(scale.GPUS) and max(scale.GPUS) == 1024
    for row in rows:
        near = scale.MACHINES[row["machine"]].gpus_per_node
        assert (row["levels_milliseconds"] == row["flat_milliseconds"]) is (row["gpus"] <= near) or (
            row["levels_milliseconds"] < row["flat_milliseconds"]
        )
        assert row["vote_messages"] <= 1 and row["vote_delay_steps"] <= 9 and 0.1 < row["exact_efficiency"] < 1
        assert 0.1 < row["ddp_efficiency"] < 1
    for name in ("exact_efficiency", "ddp_efficiency"):
        for machine in scale.MACHINES:
            found = [row[name] for row in rows if row["machine"] == machine]
            assert found == sorted(found, reverse=True) and found[0] > found[-1], "more GPUs are not more efficient"
    shown = tables.scale(
        {
            "counted": [counted_row(2, 0.1, store_requests_per_second=2.0)],
            "checked": [{"world_size": 2, "measured_seconds": 0.1, "model_over_measured": 1.1}],
            "predicted": rows,
            "assumptions": {"images_per_gpu": 128, "host_seconds": 0.004},
            "model": "resnet20",
            **{"global_batch": 128, "virtual_ranks": 16, "log_every_steps": 10, "steps": 40, "hardware": "a machine"},
        }
    )
    assert "Predicted, not measured" in shown and "| 2 | 1.0 | 2.0 | 0.2 |" in shown


def predicted(script, *, memory: float = 1e12, **changes: float) -> tuple[float, float]:
    """Seconds of a step of `exact` and of `ddp`: buckets of 900 and 100 bytes at 100 bytes a second, 10 between nodes;
    memory is as good as free, so that its time can be left out."""
    model = script("cost_model")
    cluster = model.Cluster(
        gpus_per_node=2,
        within_bytes_per_second=100,
        between_bytes_per_second=10,
        within_latency_seconds=1,
        between_latency_seconds=2,
        memory_bytes_per_second=memory,
    )
    options = {"ranks": 2, "compute_seconds": 10} | changes
    buckets = {"exact_buckets": [900, 100], "ddp_buckets": [900, 100]}
    found = model.predict(**options, **buckets, cluster=cluster, in_levels=False)
    return found["exact"], found["ddp"]


def test_predicted_steps_are_those_of_a_hand_calculation(script):
    # Half of 1,000 bytes in each of two collectives, with two launches a bucket, of which an all-reduce has one; 0.55
    # of 10 seconds hide a part of that.
    assert predicted(script) == pytest.approx((10 + 14 - 5.5, 10 + 12 - 5.5))
    # Two of the three other ranks are on the other node: half of the bytes at 10 a second, against a ring at 20.
    between = (50 + 0.75 * 1000 / 20 + 8, 2 * 0.75 * 1000 / 20 + 4)
    assert predicted(script, ranks=4) == pytest.approx(tuple(10 + seconds - 5.5 for seconds in between))
    # Everything hides but the last bucket; a rank alone sends nothing.
    assert predicted(script, compute_seconds=1000) == pytest.approx((1000 + 3, 1000 + 2))
    assert predicted(script, ranks=1) == pytest.approx((10, 10))


def test_predicted_steps_have_the_memory_traffic_of_the_tree(script):
    found = predicted(script, compute_seconds=1000, memory=1000)
    assert found == pytest.approx((1003 + 2 + 3 * 0.5 + 1, 1002 + 4))


def test_between_nodes_levels_send_a_part_of_the_bytes(script):
    model = script("cost_model")
    cluster = model.Cluster(within_bytes_per_second=1e30, within_latency_seconds=0.0, between_latency_seconds=0.0)
    flat, levels = (model._exchange_seconds(8e9, 64, cluster, in_levels) for in_levels in (False, True))
    all_to_all = 56 / 64 * 8e9 / cluster.between_bytes_per_second
    assert flat > all_to_all and levels == pytest.approx(2 * all_to_all / cluster.gpus_per_node)


def test_levels_send_few_messages(script):
    model = script("cost_model")
    cluster = model.Cluster(message_seconds=1.0)
    assert model.exchange_sizes(1024, cluster) == [8, 8, 8, 2]
    assert model._exchange_seconds(0, 1024, cluster, False) == pytest.approx(2 * 1023, abs=1e-3)
    assert model._exchange_seconds(0, 1024, cluster, True) == pytest.approx(2 * 22, abs=1e-3)


LAUNCHER = """
import subprocess, sys, time
for _ in range(int(sys.argv[1])):
    subprocess.Popen([sys.executable, "-c", sys.argv[3], "0", sys.argv[2]])
time.sleep(60)
"""


def test_the_ranks_of_a_run_are_those_that_started_no_other(script, tmp_path):
    restart = script("restart")
    run = tmp_path / "run"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, "2", f"run.dir={run}", LAUNCHER])
    try:
        restart.wait_until("two ranks", lambda: len(restart.ranks_of(run)) == 2)
        ranks = restart.ranks_of(run)
        assert launcher.pid not in ranks and restart.ranks_of(tmp_path / "other") == []
    finally:
        for pid in (*restart.ranks_of(run), launcher.pid):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
