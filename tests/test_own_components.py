"""Whole runs of the user's own components: every guarantee that the package's own ones have."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar import trainer as train_module
from dist_cifar.config import Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.models import build_model
from dist_cifar.trainer import Trainer
from tests.small_runs import alone
from tests.test_trainer import at, disturbed, rows, same_bits_everywhere, summary, train

DATA = (
    "data.source=examples.own_data:bars",
    "data.options.count=182",
    "data.options.test_count=42",
    "data.validation_size=42",
    "batch.global_size=16",
    "train.epochs=1",
    "augment.policy=flip_crop",
)
VIT = ("model.name=examples.own_model:ViT", "model.options.width=16", "model.options.dropout=0.2")
MIXER = ("model.name=examples.own_model:conv_mixer", "model.options.width=8", "model.options.depth=1")
PARTS = (
    "optimizer.name=examples.own_optimizer:Nesterov",
    "optimizer.options.weight_decay=0.01",
    "optimizer.warmup_epochs=0.5",
    "schedule.name=examples.own_schedule:cosine",
)
NOISE = ("augment.transform=examples.own_augmentation:noise",)


@pytest.fixture
def own(tiny):
    return lambda *overrides: tiny(*DATA, *overrides)


@pytest.mark.parametrize("model", [VIT, MIXER], ids=["vit", "mixer"])
def test_exact_gives_the_same_bits_on_every_world_size_and_through_a_resume(ranks, own, tmp_path, model):
    config = own(*model, *PARTS, *NOISE, "strategy.name=exact", "strategy.virtual_ranks=4")
    config = same_bits_everywhere(ranks, config, tmp_path, stopped_at=5)
    assert len(summary(config)["test_class_accuracy"]) == 7
    assert set(summary(config)["own_files"]) >= {"examples/own_model.py", "examples/own_data.py"}


def train_without_keys(communicator: Communicator, config: Config) -> bool:
    original, train_module.seed_pass = train_module.seed_pass, lambda *_: None
    try:
        return train(communicator, config)
    finally:
        train_module.seed_pass = original


def test_dropout_that_is_not_keyed_is_caught(ranks, own, tmp_path):
    config = own(*VIT, "strategy.name=exact", "strategy.virtual_ranks=4")
    hashes = set()
    for world_size in (1, 2):
        config = at(config, tmp_path / str(world_size))
        ranks.run(world_size, train_without_keys, config)
        hashes.add(summary(config)["weights_sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_the_other_strategies_train_as_exact_does(ranks, own, tmp_path, strategy):
    """Without dropout and BatchNorm, whose batches are the strategy's own, the losses are equal to rounding."""
    common = (*VIT, "model.options.dropout=0.0", *PARTS, "run.log_every_steps=1", "strategy.virtual_ranks=2")
    oracle = at(own(*common[:2], *common[3:], "strategy.name=exact"), tmp_path / "exact")
    ranks.run(1, train, oracle)
    config = at(own(*common[:2], *common[3:], f"strategy.name={strategy}"), tmp_path / strategy)
    assert ranks.run(2, disturbed, config, 2, 1, False) == [False, False]
    assert ranks.run(2, train, config) == [True, True]
    pairs = list(zip(rows(config, "train"), rows(oracle, "train"), strict=True))
    assert len(pairs) == 8
    for row, expected in pairs:
        assert (row["step"], row["lr"]) == (expected["step"], expected["lr"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def beside_a_hand_written_loop(communicator: Communicator, config: Config) -> None:
    trainer = Trainer.build(config, communicator)
    model = build_model(config.model, num_classes=7, seed=config.run.seed)
    model = model.to(memory_format=torch.channels_last).train()
    oracle = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for step in range(4):
        batch = trainer.batches.make(step)
        oracle.param_groups[0]["lr"] = trainer.schedule.lr(step)
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        oracle.step()
        oracle.zero_grad()
        trainer.train_step(batch)
    for name, tensor in trainer.strategy.model_state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_ddp_equals_a_hand_written_loop(ranks, own):
    ranks.run(1, beside_a_hand_written_loop, own(*MIXER, *PARTS, "strategy.name=ddp", "optimizer.max_grad_norm=null"))


class Buffers(nn.Module):
    """Has buffers of several kinds: of floats and of whole numbers that change, a mask, and one that is not saved."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3072, dtype=torch.bool))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.layer = nn.Linear(3072, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average.lerp_(images.mean((0, 2, 3)).detach(), 0.1)
            self.passes.add_(1)
        centred = images - self.average.view(1, 3, 1, 1)
        return self.layer(centred.flatten(1) * self.mask * self.scale * self.frozen)


class Constants(nn.Module):
    """Has constants that a sum over passes or ranks would overflow, or a mean round, beside a buffer that changes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("smallest", torch.full((2,), torch.finfo(torch.float32).min))
        self.register_buffer("never", torch.tensor(-torch.inf))
        self.register_buffer("tenths", torch.linspace(0.1, 0.9, 50))
        self.register_buffer("average", torch.zeros(()))
        self.norm, self.layer = nn.BatchNorm2d(3), nn.Linear(3072, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average += images.mean().detach()
        return self.layer(self.norm(images).flatten(1))


def constants_after_two_steps(communicator: Communicator, config: Config) -> tuple[bool, float]:
    trainer = Trainer.build(config, communicator)
    for step in range(2):
        trainer.train_step(trainer.batches.make(step))
    before, after = Constants(7).state_dict(), trainer.strategy.model_state_dict()
    are_equal = all(torch.equal(before[name], after[name]) for name in ("smallest", "never", "tenths"))
    return are_equal, after["average"].item()


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_constants_stay_what_they_are(ranks, own, strategy):
    plain = ("batch.global_size=24", "strategy.virtual_ranks=3", f"strategy.name={strategy}", "run.log_every_steps=1")
    config = own("model.name=tests.test_own_components:Constants", *PARTS, *plain)
    found = [result for world_size in (1, 2, 3) for result in ranks.run(world_size, constants_after_two_steps, config)]
    assert all(are_equal for are_equal, _ in found)
    averages = {average for _, average in found}
    assert 0.0 not in averages and (strategy == "ddp" or len(averages) == 1)


class Skips(nn.Module):
    """Leaves a layer out from its third pass on, the trial's not counted, so that its parameters have no gradient."""

    passes = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.extra, self.layer = nn.Conv2d(3, 3, 1), nn.Linear(3072, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += len(images) > 2
        if self.passes < 3:
            images = images + self.extra(images)
        return self.layer(images.flatten(1))


def some_steps(communicator: Communicator, config: Config) -> None:
    trainer = Trainer.build(config, communicator)
    for step in range(4):
        trainer.train_step(trainer.batches.make(step))


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_layer_that_is_left_out_is_named(ranks, own, world_size):
    config = own(
        "model.name=tests.test_own_components:Skips", *PARTS, "strategy.name=exact", "strategy.virtual_ranks=4"
    )
    named = r"(extra\.(weight|bias)|a parameter) no gradient; .*DropPath does"
    with pytest.raises(Exception, match=f"a pass gave {named}"):
        ranks.run(world_size, some_steps, config)


@pytest.mark.parametrize("strategy", ["exact", "ddp", "fsdp", "deepspeed"])
def test_buffers_and_frozen_parameters(ranks, own, tmp_path, strategy):
    config = own("model.name=tests.test_own_components:Buffers", *PARTS, f"strategy.name={strategy}")
    hashes = set()
    for name, world_size in (("whole", 2), ("resumed", 2), ("alone", 1)):
        config = at(config, tmp_path / name)
        if name == "resumed":
            ranks.run(2, disturbed, config, 3, 0, False)
        assert all(ranks.run(world_size, train, config))
        if world_size == 2 or strategy == "exact":
            hashes.add(summary(config)["weights_sha256"])
    assert len(hashes) == 1


def test_a_resume_after_an_edit_is_refused_by_the_files_name(own, monkeypatch):
    communicator = alone()
    files, spec = {"mine.py": "0" * 64}, importlib.import_module("examples.own_model").__spec__
    monkeypatch.setattr(plugins, "_imported", plugins._imported | {"examples.own_model": (spec, files)})
    config = own(*VIT)
    assert not disturbed(communicator, config, 2, 0, False)
    files["mine.py"] = "1" * 64
    with pytest.raises(ConfigError, match=r"result would change .*mine.py: 000000000000 -> 111111111111"):
        train(communicator, config)
    files["mine.py"] = "0" * 64
    assert train(communicator, config)
