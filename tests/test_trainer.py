"""Whole runs on gloo ranks: plateau, order and pixels at every world size, resume, what is written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dist_cifar import trainer as train_module
from dist_cifar.augment import params
from dist_cifar.config import Config, load_config
from dist_cifar.data import batching
from dist_cifar.data.batching import TrainingBatches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import CheckpointError, ConfigError, TrainingError
from dist_cifar.ops import numba_jit, precision
from dist_cifar.optim.plateau import Plateau
from dist_cifar.run import atomic_io, checkpoint, checkpointing, timers
from dist_cifar.stopping import Deadline
from dist_cifar.strategy.ddp import DdpStrategy
from dist_cifar.tracking.console import Console
from dist_cifar.trainer import Trainer
from tests.integration.faults.jobs import VOLATILE
from tests.rank_pool import RankError, RankPool


def rows(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def summary(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "summary.json").read_text())


def status(config: Config) -> str:
    return json.loads((Path(config.run.dir) / "status.json").read_text())["status"]


def at(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))


def train(communicator: Communicator, config: Config, must_resume: bool = False) -> bool:
    return train_module.train(config, communicator, must_resume=must_resume)


# --- the plateau -------------------------------------------------------------------------------------------------

PLATEAU = (
    "plateau.patience_evaluations=1",
    "plateau.threshold=0.9",
    "plateau.factor=0.1",
    "train.epochs=7",
    "data.synthetic_train_size=72",
    "optimizer.lr_rule=none",
    "optimizer.warmup_epochs=0",
    "model.norm=group",
)


def learning_rates(config: Config) -> list[float]:
    return [row["lr"] for row in rows(config, "train")]


def test_plateau_cuts_at_the_same_steps_on_every_world_size(ranks, tiny, tmp_path):
    sequences = []
    for world_size in (1, 2, 4):
        config = at(tiny(*PLATEAU), tmp_path / str(world_size))
        assert ranks.run(world_size, train, config) == [True] * world_size
        sequences.append(learning_rates(config))
    assert sequences[0] == sequences[1] == sequences[2]
    # Two steps an epoch; the first evaluation improves on none, each second one after it is one too many.
    assert sequences[0] == pytest.approx([1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)


def accelerate_steps_it(communicator: Communicator, metrics: list[float]) -> list[float]:
    """The mutant: a scheduler that was given to Accelerate."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=0.9)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    learning_rates = []
    for metric in metrics:
        learning_rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(metric)
    return learning_rates


def test_a_plateau_that_accelerate_steps_is_caught(ranks):
    metrics = [1.0] * 7
    one, two = ranks.run(1, accelerate_steps_it, metrics)[0], ranks.run(2, accelerate_steps_it, metrics)[0]
    assert one == pytest.approx([1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert one != two


def unequal_plateau(communicator: Communicator) -> None:
    state = Plateau(lr=1e-3 if communicator.rank != 2 else 1e-4, best=1.0)
    communicator.assert_equal_across_ranks("the state of the plateau", dataclasses.asdict(state))


def test_ranks_that_disagree_do_not_continue(ranks):
    with pytest.raises(Exception, match=r"the state of the plateau differs.*\[2\]"):
        ranks.run(3, unequal_plateau)


# --- order and pixels --------------------------------------------------------------------------------------------


def sample_with_state(config: Any, *, seed: int, epoch: int, indices: Any, size: int) -> params.AugmentParams:
    """The mutant: a generator that remembers, as a global one does."""
    fresh = np.random.default_rng(seed).integers(0, 2**31, len(indices))
    return params.sample_params(config, seed=seed, epoch=epoch, indices=fresh, size=size)


def batches(communicator: Communicator, config: Config, steps: list[int], mutant: bool) -> list[list[Any]]:
    original = batching.sample_params
    if mutant:
        batching.sample_params = sample_with_state
    try:
        made = [Trainer.build(config, communicator).batches.make(step) for step in steps]
    finally:
        batching.sample_params = original
    return [[batch.inputs.numpy(), batch.labels.numpy()] for batch in made]


def samples(ranks: Any, world_size: int, config: Config, steps: list[int], mutant: bool = False) -> list[str]:
    """A hash of every sample of the global batches, in order."""
    by_rank = ranks.run(world_size, batches, config, steps, mutant)
    return [
        hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()
        for i in range(len(steps))
        for made in by_rank
        for image, label in zip(*made[i], strict=True)
    ]


def test_pixels_and_labels_do_not_depend_on_rank_world_size_or_call_order(ranks, tiny):
    expected = samples(ranks, 1, tiny(), [0, 3, 7])
    assert len(set(expected)) == len(expected)
    for world_size in (2, 4):
        assert samples(ranks, world_size, tiny(), [0, 3, 7]) == expected
    backwards = samples(ranks, 2, tiny(), [7, 3, 0])
    assert backwards == expected[32:] + expected[16:32] + expected[:16]


def test_pixels_do_not_depend_on_the_batch_size(ranks, tiny):
    whole = samples(ranks, 1, tiny("batch.global_size=16"), [0, 1])
    assert samples(ranks, 1, tiny("batch.global_size=8"), [0, 1, 2, 3]) == whole
    assert samples(ranks, 2, tiny("batch.global_size=32"), [0]) == whole


def test_pixels_are_the_same_after_a_resume(ranks, tiny, tmp_path):
    config = tiny()
    expected = samples(ranks, 2, at(config, tmp_path / "new"), [3, 4])
    ranks.run(2, disturbed, config, 1, 0, False)
    assert samples(ranks, 2, config, [3, 4]) == expected


def test_augmentation_from_a_generator_with_a_state_is_caught(ranks, tiny):
    assert samples(ranks, 2, tiny(), [0], mutant=True) != samples(ranks, 1, tiny(), [0], mutant=True)


@pytest.mark.parametrize("policy", ["default", "flip_crop", "none"])
def test_each_policy_trains(ranks, tiny, policy):
    config = tiny(f"augment.policy={policy}", "train.max_steps=2")
    assert ranks.run(2, train, config) == [True, True]
    assert summary(config)["steps"] == 2


def warm_ups(communicator: Communicator, config: Config) -> list[tuple[float, float]]:
    """When each warm-up of the kernel began and ended; the one of rank 0 takes long, as with a cold cache."""
    times = []

    def warm_up(use: Any) -> None:
        began = time.monotonic()
        time.sleep(0.3 if communicator.rank == 0 and not times else 0)
        times.append((began, time.monotonic()))

    original, numba_jit.warm_up = numba_jit.warm_up, warm_up
    try:
        Trainer.build(config, communicator)
    finally:
        numba_jit.warm_up = original
    return times


def test_the_rank_that_speaks_is_the_one_that_compiles(ranks, tiny):
    first, *others = ranks.run(4, warm_ups, tiny())
    assert all(began >= first[0][1] for times in others for began, _ in times)
    assert all(others)


# --- resume ------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def disturbed(communicator: Communicator, config: Config, at_step: int, rank: int, crash: bool) -> Any:
    """A run in which `rank` is told to stop, or every rank dies, before the step after `at_step`."""
    calls = 0
    original = train_module.stop_requested

    def stop_requested() -> bool:
        nonlocal calls
        calls += 1
        if crash and calls > at_step:
            raise Crash
        return communicator.rank == rank and calls > at_step

    train_module.stop_requested = stop_requested
    try:
        return train(communicator, config)
    except Crash:
        return "crashed"
    finally:
        train_module.stop_requested = original


def same_bits_everywhere(ranks: RankPool, config: Config, folder: Path, *, stopped_at: int) -> Config:
    """Trains on 1, 2 and 4 ranks, and on 4 that die, 2 that are stopped and 1 that ends; the weights must be the same.

    Returns the config of the run that was disturbed, whose 2 ranks are told to stop after `stopped_at` steps of theirs.
    """
    hashes = []
    for world_size in (1, 2, 4):
        config = at(config, folder / str(world_size))
        assert all(ranks.run(world_size, train, config))
        hashes.append(summary(config)["weights_sha256"])
    config = at(config, folder / "resumed")
    ranks.run(4, disturbed, config, 3, 1, True)
    assert ranks.run(2, disturbed, config, stopped_at, 0, False) == [False, False]
    assert ranks.run(1, train, config) == [True]
    hashes.append(summary(config)["weights_sha256"])
    assert len(set(hashes)) == 1
    return config


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(ranks, tiny, tmp_path, world_size):
    config = tiny("batch.global_size=18", "run.log_every_steps=3")  # 4 steps an epoch
    undisturbed = at(config, tmp_path / "undisturbed")
    assert ranks.run(world_size, train, undisturbed) == [True] * world_size
    # One rank alone gets the signal, in the middle of an epoch; all stop after the same step.
    assert ranks.run(world_size, disturbed, config, 1, world_size - 1, False) == [False] * world_size
    assert status(config) == "saved"
    step = 2 if world_size < 3 else 3  # of three ranks, all know a step later
    state = json.loads((Path(config.run.dir) / f"checkpoints/step-{step:08d}/state.json").read_text())
    assert state["train_state"]["step"] == step
    assert ranks.run(world_size, train, config) == [True] * world_size
    assert status(config) == "done"
    assert summary(config)["weights_sha256"] == summary(undisturbed)["weights_sha256"]
    for kind in ("train", "eval", "test"):
        kept = [
            [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows(c, kind)]
            for c in (config, undisturbed)
        ]
        assert kept[0] == kept[1] and kept[0]


def unsettled(communicator: Communicator, config: Config, at_step: int | None) -> Any:
    """The mutant: DDP orders its buckets after the first step of each process."""
    settle = DdpStrategy._settle_buckets
    DdpStrategy._settle_buckets = lambda self, micro_size: None
    try:
        return train(communicator, config) if at_step is None else disturbed(communicator, config, at_step, 0, False)
    finally:
        DdpStrategy._settle_buckets = settle


def test_buckets_that_change_with_a_resume_are_caught(ranks, tiny, tmp_path):
    config = tiny("batch.global_size=18")
    undisturbed = at(config, tmp_path / "undisturbed")
    ranks.run(3, unsettled, undisturbed, None)
    ranks.run(3, unsettled, config, 1)
    ranks.run(3, unsettled, config, None)
    assert summary(config)["weights_sha256"] != summary(undisturbed)["weights_sha256"]


def test_a_run_that_died_resumes_from_its_last_checkpoint(ranks, tiny, tmp_path):
    config = tiny("checkpoint.every_steps=2")
    undisturbed = at(config, tmp_path / "undisturbed")
    ranks.run(2, train, undisturbed)
    assert ranks.run(2, disturbed, config, 8, 0, True) == ["crashed"] * 2  # five steps an epoch
    assert len(rows(config, "train")) == 4
    assert ranks.run(2, train, config) == [True, True]
    assert summary(config)["weights_sha256"] == summary(undisturbed)["weights_sha256"]
    steps = [row["step"] for row in rows(config, "train")]
    assert steps == sorted(set(steps)) == [row["step"] for row in rows(undisturbed, "train")]


def at_a_second_a_question(communicator: Communicator, config: Config) -> list[int]:
    """The steps that are saved if whoever reads the clock finds it a second later."""
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    with mock.patch.object(checkpointing, "time", clock):
        train(communicator, config)
    events = [json.loads(line) for line in (Path(config.run.dir) / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "checkpoint"]


@pytest.mark.parametrize(
    ("seconds", "world_size", "saved"),
    [
        ("null", 2, [5, 10, 15]),  # after each evaluation
        ("1000", 2, [5, 15]),  # the best, and the last
        ("3", 1, [3, 5, 8, 11, 14, 15]),
        ("3", 2, [3, 5, 8, 11, 14, 15]),
        ("3", 4, [4, 5, 9, 13, 15]),  # the answer is known a step later
    ],
)
def test_checkpoints_by_the_clock(ranks, tiny, tmp_path, seconds, world_size, saved):
    """The weights do not change, so the first ones stay the best."""
    unchanged = ("optimizer.lr=1e-30", "model.norm=group", "train.epochs=3", "strategy.name=ddp")
    config = tiny(*unchanged, f"checkpoint.every_seconds={seconds}")
    assert ranks.run(world_size, at_a_second_a_question, config)[0] == saved
    assert summary(config)["best_step"] == 5


def test_a_resume_without_the_ranks_own_buffers_is_caught(ranks, tiny, tmp_path):
    """The mutant of the two tests above: BatchNorm statistics restored as their average."""
    config = tiny("eval.every_epochs=9", "train.max_steps=3", "optimizer.weight_decay=0")
    undisturbed = at(config, tmp_path / "undisturbed")
    ranks.run(2, train, undisturbed)
    ranks.run(2, disturbed, config, 1, 0, False)
    ranks.run(2, forgetful, config)
    assert summary(config)["weights_sha256"] != summary(undisturbed)["weights_sha256"]


def forgetful(communicator: Communicator, config: Config) -> bool:
    load = DdpStrategy.load
    DdpStrategy.load = lambda self, model, optimizer, ranks: load(self, model, {}, {})
    try:
        return train(communicator, config)
    finally:
        DdpStrategy.load = load


def test_a_run_resumes_on_another_number_of_ranks(ranks, tiny):
    config = tiny("model.norm=group")
    assert ranks.run(2, disturbed, config, 2, 0, False) == [False, False]
    assert ranks.run(1, train, config) == [True]
    assert summary(config)["world_size"] == 1 and summary(config)["steps"] == 10
    assert summary(config)["inexact_since_step"] == 3


@pytest.mark.parametrize(
    ("first", "second", "world_size"),
    [("exact", "fsdp", 2), ("fsdp", "deepspeed", 1), ("deepspeed", "ddp", 4), ("ddp", "exact", 2)],
)
def test_a_run_resumes_in_another_strategy(ranks, tiny, tmp_path, first, second, world_size):
    """The losses stay those of one that never changed, to rounding; where exactness ended is said and written."""
    common = ("model.norm=group", "train.epochs=1", "run.log_every_steps=1", "strategy.zero_stage=3")
    undisturbed = at(tiny(*common, f"strategy.name={first}"), tmp_path / "undisturbed")
    ranks.run(2, train, undisturbed)
    ranks.run(2, disturbed, tiny(*common, f"strategy.name={first}"), 2, 0, False)
    config = tiny(*common, f"strategy.name={second}")
    output = ranks.run(world_size, spoken, config)[0]
    assert f"changed: strategy.name: {first} -> {second}" in output
    assert summary(config)["strategy"] == second and summary(config)["inexact_since_step"] == 3
    pairs = list(zip(rows(config, "train"), rows(undisturbed, "train"), strict=True))
    assert len(pairs) == 5
    for row, expected in pairs:
        assert (row["step"], row["lr"]) == (expected["step"], expected["lr"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def spoken(communicator: Communicator, config: Config) -> str:
    """What the run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train(communicator, config)
    return out.getvalue()


def test_automatic_precision_is_said_and_kept_by_the_run_directory(ranks, tiny, monkeypatch):
    config = tiny("compute.precision=auto")
    assert (
        "precision  bf16: this processor"
        in ranks.run(2, spoken_with, config, ("bf16", "precision  bf16: this processor"))[0]
    )
    assert summary(config)["precision"] == "bf16"
    longer = tiny("compute.precision=auto", "train.epochs=3")
    assert "precision  " not in ranks.run(2, spoken_with, longer, ("fp32", "precision  fp32"))[0]
    assert summary(config)["precision"] == "bf16" and summary(config)["steps"] == 15


def spoken_with(communicator: Communicator, config: Config, choice: tuple[str, str]) -> str:
    """What the run prints if `choice` is the choice for this machine."""
    original, precision.choose_precision = precision.choose_precision, lambda device: choice
    try:
        return spoken(communicator, config)
    finally:
        precision.choose_precision = original


# --- strategy exact ----------------------------------------------------------------------------------------------

EXACT = (
    "strategy.name=exact",
    "strategy.virtual_ranks=4",
    "plateau.patience_evaluations=0",
    "plateau.threshold=0.9",
    "run.log_every_steps=3",
    "run.log_digests=true",
    "train.epochs=3",
)


def result(config: Config) -> tuple[Any, ...]:
    """All of a run that may not depend on how it was computed: rows, summary, and the digests of every step."""
    kept = {kind: [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows(config, kind)] for kind in KINDS}
    names = ("weights_sha256", "test_accuracy", "test_loss", "best_step", "best_val_accuracy", "inexact_since_step")
    lines = (Path(config.run.dir) / "digests.jsonl").read_text().splitlines()
    return kept, {name: summary(config)[name] for name in names}, sorted(set(lines))


KINDS = ("train", "eval", "test")


def test_exact_gives_the_same_run_on_every_world_size_and_through_a_chain_of_them(ranks, tiny, tmp_path):
    golden = at(tiny(*EXACT), tmp_path / "golden")
    ranks.run(1, train, golden)
    expected = result(golden)
    assert len(expected[2]) == 15 and len({row["lr"] for row in rows(golden, "train")}) > 2
    for world_size in (2, 4):
        config = at(tiny(*EXACT), tmp_path / str(world_size))
        assert ranks.run(world_size, train, config) == [True] * world_size
        assert result(config) == expected
    config = tiny(*EXACT, "checkpoint.every_steps=1")
    for world_size, crash in ((4, False), (2, True), (1, False)):
        ranks.run(world_size, disturbed, config, 2, 0, crash)
    assert ranks.run(4, train, config) == [True] * 4
    assert result(config) == expected


@pytest.mark.parametrize("end", ["train.epochs=1", "train.max_steps=7"])
def test_a_run_that_is_made_longer_is_the_run_that_was_meant_to_be_so_long(ranks, tiny, tmp_path, end):
    """Its first end, between two evaluations that count, is evaluated and leaves no trace in the plateau."""
    overrides = (*EXACT, "eval.every_epochs=2", "plateau.factor=0.1", "train.epochs=6")
    straight, longer = at(tiny(*overrides), tmp_path / "straight"), tiny(*overrides)
    ranks.run(1, train, straight)
    ranks.run(1, train, tiny(*overrides, end))
    assert [row["step"] for row in rows(longer, "eval")] == [5 if "epochs" in end else 7]
    ranks.run(1, train, longer)
    assert summary(longer)["weights_sha256"] == summary(straight)["weights_sha256"]
    assert len({row["lr"] for row in rows(straight, "train") if row["step"] > 5}) == 2


def of_two_machines(communicator: Communicator, config: Config) -> str:
    original = train_module.numerics_fingerprint
    train_module.numerics_fingerprint = lambda device: original(device) | {"processor": f"of rank {communicator.rank}"}
    try:
        return failing(communicator, config, TrainingError)
    finally:
        train_module.numerics_fingerprint = original


def test_ranks_that_round_differently_do_not_begin(ranks, tiny):
    assert "the numerics differs between ranks" in ranks.run(2, of_two_machines, tiny(*EXACT))[0]


def test_ddp_does_not(ranks, tiny, tmp_path):
    """What the test above compares can differ."""
    results = []
    for world_size in (1, 2):
        config = at(tiny(*EXACT, "strategy.name=ddp"), tmp_path / str(world_size))
        ranks.run(world_size, train, config)
        results.append(result(config))
    assert all(first != second for first, second in zip(*results, strict=True))


def test_more_ranks_than_virtual_ranks_are_refused_before_the_data_is_read(ranks, tiny):
    config = tiny(*EXACT, "strategy.virtual_ranks=2", "data.source=folder", "data.root=/nowhere")
    assert all("start at most 2 ranks" in message for message in ranks.run(3, failing, config, ConfigError))


def elsewhere(communicator: Communicator, config: Config, resume_anyway: bool) -> bool:
    """A run on a machine with another processor."""
    original = checkpointing.numerics_fingerprint
    checkpointing.numerics_fingerprint = lambda device: original(device) | {"threads": 64, "extensions": "avx1024"}
    try:
        return train_module.train(config, communicator, resume_anyway=resume_anyway)
    finally:
        checkpointing.numerics_fingerprint = original


def refused(communicator: Communicator, config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        elsewhere(communicator, config, False)
    return str(caught.value)


def test_exact_is_not_resumed_where_it_would_be_rounded_in_another_way(ranks, tiny):
    config = tiny(*EXACT)
    ranks.run(2, disturbed, config, 2, 0, False)
    for message in ranks.run(2, refused, config):
        assert "threads: 1 -> 64" in message and "-> avx1024" in message and "--resume-anyway" in message
        assert "torch" not in message  # only what differs
    assert ranks.run(2, elsewhere, config, True) == [True, True]
    assert summary(config)["inexact_since_step"] == 3


def test_ddp_may_be_and_says_that_it_is(ranks, tiny):
    config = tiny()
    ranks.run(2, disturbed, config, 2, 0, False)
    assert ranks.run(2, elsewhere, config, False) == [True, True]
    assert summary(config)["inexact_since_step"] == 3


def anyway(communicator: Communicator, config: Config) -> bool:
    return train_module.train(config, communicator, resume_anyway=True)


def test_resume_anyway_takes_another_config_and_refuses_another_model(ranks, tiny):
    ranks.run(1, disturbed, tiny(), 2, 0, False)
    assert "optimizer.lr: 0.001 -> 0.002" in ranks.run(1, failing, tiny("optimizer.lr=2e-3"), ConfigError)[0]
    with pytest.raises(RankError, match=r"its weights are not those of model\.name=resnet32"):
        ranks.run(1, anyway, tiny("model.name=resnet32"))
    assert ranks.run(1, anyway, tiny("optimizer.lr=2e-3")) == [True]
    assert summary(tiny())["inexact_since_step"] == 3


def test_a_run_that_is_done_is_not_trained_again(ranks, tiny):
    config = tiny("train.epochs=1")
    ranks.run(1, train, config)
    before = summary(config), rows(config, "train")
    assert ranks.run(1, train, config) == [True]
    assert (summary(config), rows(config, "train")) == before
    longer = tiny("train.epochs=2")
    assert ranks.run(1, train, longer) == [True]
    assert summary(longer)["epochs"] == 2 and rows(longer, "train")[: len(before[1])] == before[1]


def failing(communicator: Communicator, config: Config, kind: type[Exception], must_resume: bool = False) -> str:
    with pytest.raises(kind) as caught:
        train(communicator, config, must_resume)
    return str(caught.value)


def test_another_config_or_data_set_in_the_run_directory_is_refused(ranks, tiny):
    ranks.run(2, train, tiny("train.epochs=1"))
    messages = ranks.run(2, failing, tiny("optimizer.lr=2e-3", "batch.global_size=8"), ConfigError)
    assert messages[0] == messages[1]
    assert "batch.global_size: 16 -> 8; optimizer.lr: 0.001 -> 0.002" in messages[0]


def test_resume_without_a_checkpoint_is_refused(ranks, tiny):
    assert "--resume" in ranks.run(1, failing, tiny(), CheckpointError, True)[0]


# --- what is written ---------------------------------------------------------------------------------------------


def test_the_run_directory(ranks, tiny):
    config = tiny("plateau.metric=accuracy", "data.validation_size=30")
    ranks.run(2, train, config)
    path = Path(config.run.dir)
    assert load_config(path / "config.yaml") == config
    result = summary(config)
    evaluations = rows(config, "eval")
    assert [row["step"] for row in evaluations] == [5, 10] and evaluations[0]["count"] == 30
    assert result["best_val_accuracy"] == max(row["accuracy"] for row in evaluations)
    assert result["best_step"] == max(evaluations, key=lambda row: row["accuracy"])["step"]
    assert rows(config, "test")[0]["accuracy"] == result["test_accuracy"] == np.trace(result["test_confusion"]) / 40
    assert np.sum(result["test_confusion"]) == 40 and result["world_size"] == 2 and result["strategy"] == "ddp"
    assert result["steps"] == 10 and result["epochs"] == 2 and result["versions"]["torch"] == torch.__version__
    assert result["images_per_second"] > 0 and 0 <= result["data_wait_share"] < 1
    row = rows(config, "train")[-1]
    assert row["samples"] == 160 and row["grad_norm"] > 0 and row["seconds"] > 0
    assert not list(path.rglob(".tmp*"))


def test_without_a_validation_split_the_test_set_is_watched_and_the_summary_says_so(ranks, tiny):
    config = tiny("data.validation_size=0", "train.epochs=1")
    ranks.run(1, train, config)
    assert summary(config)["best_chosen_on"] == "test"
    assert [(row["split"], row["count"]) for row in rows(config, "eval")] == [("test", 40)]


def test_weights_of_the_best_checkpoint_are_those_that_are_tested(ranks, tiny):
    config = tiny("train.epochs=3", "optimizer.lr=0.3", "optimizer.warmup_epochs=0", "optimizer.max_grad_norm=null")
    ranks.run(1, train, config)
    evaluations = {row["step"]: row["accuracy"] for row in rows(config, "eval")}
    result = summary(config)
    assert result["best_val_accuracy"] == evaluations[result["best_step"]] == max(evaluations.values())


def poisoned(communicator: Communicator, config: Config, steps: list[int], rank: int) -> Any:
    """A run in which the images of `rank` are NaN in `steps`; the message if it is refused."""
    original = TrainingBatches.make

    def make(self: TrainingBatches, step: int) -> Any:
        batch = original(self, step)
        if step in steps and communicator.rank == rank:
            batch.inputs.fill_(float("nan"))
        return batch

    TrainingBatches.make = make
    try:
        return train(communicator, config)
    except TrainingError as error:
        return str(error)
    finally:
        TrainingBatches.make = original


@pytest.mark.parametrize("strategy", ["ddp", "exact"])
def test_a_loss_that_is_not_finite_on_one_rank_names_the_rank_on_all(ranks, tiny, strategy):
    for message in ranks.run(2, poisoned, tiny(f"strategy.name={strategy}"), [2], 1):
        assert "step 4: the loss of rank 1 was not finite" in message and "lower optimizer.lr" in message


@pytest.mark.parametrize("strategy", ["ddp", "exact"])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks_and_counted(ranks, tiny, strategy):
    config = tiny(f"strategy.name={strategy}", "optimizer.non_finite=skip", "optimizer.max_skipped_steps=2")
    assert ranks.run(2, poisoned, config, [2, 3], 1) == [True, True]
    train_rows = rows(config, "train")
    assert [row["skipped_steps"] for row in train_rows] == [0, 2, 2, 2, 2]
    assert all(row["grad_norm"] is not None for row in train_rows if row["step"] != 4)
    assert train_rows[1]["grad_norm"] is None  # both of its steps were skipped
    assert np.isfinite(summary(config)["test_loss"])


def test_too_many_skipped_steps_end_the_run(ranks, tiny):
    config = tiny("optimizer.non_finite=skip", "optimizer.max_skipped_steps=2")
    for message in ranks.run(2, poisoned, config, [2, 4, 5], 1):
        assert "3 steps had gradients that were not finite, more than optimizer.max_skipped_steps=2" in message


# --- stragglers and deadlines ------------------------------------------------------------------------------------


def slow(communicator: Communicator, config: Config, rank: int) -> list[str]:
    """What is said of stragglers in a run in which, by a clock of its own, a forward pass of `rank` takes three seconds
    and those of others one; these then wait."""
    forward, backward, line, lines = DdpStrategy.forward, DdpStrategy.backward, Console.line, []
    clock, works = [0.0], 3.0 if communicator.rank == rank else 1.0

    def timed(method: Any, seconds: float) -> Any:
        def call(self: DdpStrategy, argument: torch.Tensor) -> Any:
            clock[0] += seconds
            return method(self, argument)

        return call

    DdpStrategy.forward, DdpStrategy.backward = timed(forward, works), timed(backward, 3.0 - works)
    Console.line = lambda self, line: lines.append(line)
    timers.time = SimpleNamespace(perf_counter=lambda: clock[0])
    try:
        train(communicator, config)
    finally:
        DdpStrategy.forward, DdpStrategy.backward, Console.line, timers.time = forward, backward, line, time
    return [line for line in lines if line.startswith("straggler")]


def test_the_log_names_a_rank_for_which_the_others_wait(ranks, tiny):
    lines = ranks.run(3, slow, tiny("batch.global_size=12", "train.max_steps=4", "run.straggler_factor=2"), 2)[0]
    assert lines and all(line.startswith("straggler: rank 2 on ") for line in lines)


def test_a_time_limit_that_is_near_saves_and_stops(ranks, tiny):
    config = tiny("run.time_limit_seconds=1")  # less than is always left in reserve
    assert ranks.run(2, train, config) == [False, False]
    assert status(config) == "saved"
    assert ranks.run(2, train, tiny()) == [True, True]


def on_a_slow_disk(communicator: Communicator, config: Config, forgets: bool) -> Any:
    """A run whose files take 1000 seconds each on the clock that the store of checkpoints reads."""
    write_file, is_near, waited = atomic_io.write_file, Deadline.is_near, [0.0]

    def slow_write(path: Path, data: Any) -> None:
        waited[0] += 1000.0
        write_file(path, data)

    atomic_io.write_file = slow_write
    checkpoint.time = SimpleNamespace(monotonic=lambda: time.monotonic() + waited[0])
    if forgets:
        Deadline.is_near = lambda self, write_seconds, delay: is_near(self, 0.0, delay=delay)
    try:
        return train(communicator, config)
    finally:
        atomic_io.write_file, checkpoint.time, Deadline.is_near = write_file, time, is_near


def check_slow_disk(ranks: Any, config: Config, forgets: bool) -> None:
    """An hour is long enough for ten steps, and too short for a checkpoint that takes as long."""
    assert ranks.run(2, on_a_slow_disk, config, forgets) == [False, False]
    assert status(config) == "saved"


def test_the_time_that_a_checkpoint_takes_is_kept_in_reserve(ranks, tiny):
    check_slow_disk(ranks, tiny("run.time_limit_seconds=3600", "checkpoint.every_steps=1"), False)


def test_a_margin_without_the_write_is_caught(ranks, tiny):
    with pytest.raises(AssertionError, match="True"):
        check_slow_disk(ranks, tiny("run.time_limit_seconds=3600", "checkpoint.every_steps=1"), True)
