"""Initial weights from training images: which images, and the same bytes on every rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.config import Config
from dist_cifar.data import training_data
from dist_cifar.data.training_data import TrainingData, build_training_data
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.strategy import initial_model
from dist_cifar.strategy.initial_model import build_initial_model, training_images
from tests.small_runs import alone

SPEEDNET = ("model.name=speednet", "model.widths=[8, 8, 8]", "batch.global_size=18")


def built(communicator: Communicator, config: Config) -> str:
    """The hash of the weights that a rank ends up with, where each rank computes others."""

    def rounded(model: nn.Module, config: Config, data: TrainingData) -> None:
        model.whiten.weight.detach().fill_(1 + communicator.rank)

    initialize, initial_model._initialize = initial_model._initialize, rounded
    try:
        data = build_training_data(config, communicator, slices=communicator.world_size)
        return weights_sha256(build_initial_model(config, data, communicator).state_dict())
    finally:
        initial_model._initialize = initialize


def test_every_rank_has_the_weights_of_rank_0(ranks, tiny):
    (expected,) = ranks.run(1, built, tiny(*SPEEDNET))
    assert ranks.run(3, built, tiny(*SPEEDNET)) == [expected] * 3


def test_ranks_that_compute_each_for_itself_are_caught(ranks, tiny):
    """The mutant."""
    found = ranks.run(3, built_without_sending, tiny(*SPEEDNET))
    assert len(set(found)) == 3


def built_without_sending(communicator: Communicator, config: Config) -> str:
    run_on_rank0, broadcast = communicator.run_on_rank0, communicator.broadcast_tensors
    communicator.run_on_rank0 = lambda function: function()
    communicator.broadcast_tensors = lambda tensors: dict(tensors)
    try:
        return built(communicator, config)
    finally:
        communicator.run_on_rank0, communicator.broadcast_tensors = run_on_rank0, broadcast


# --- the images --------------------------------------------------------------------------------------------------


def data_of(config: Config) -> TrainingData:
    return build_training_data(config, alone(), slices=1)


def row_numbers(data: TrainingData, images: torch.Tensor) -> list[int]:
    """Which images of the data set these are."""
    every = training_data.cpu.normalize(
        data.dataset.train.images, np.arange(len(data.dataset.train.images)), data.dataset.stats
    )
    return [int((every == image).flatten(1).all(1).nonzero().item()) for image in images]


def test_images_are_a_shuffle_of_the_training_split(tiny):
    data = data_of(tiny())
    rows = row_numbers(data, training_images(data, 10**6, seed=5))
    assert sorted(rows) == data.train_indices.tolist() and rows != sorted(rows)
    assert not set(rows) & set(data.validation_indices.tolist()) and len(data.validation_indices) == 40
    assert row_numbers(data, training_images(data, 20, seed=5)) == rows[:20]
    assert row_numbers(data, training_images(data, 20, seed=6)) != rows[:20]


def classes_of(data: TrainingData) -> int:
    """The number of classes among the first images, where those of the data set are sorted by class."""
    split = data.dataset.train
    order = np.argsort(split.labels, kind="stable")
    split = dataclasses.replace(split, images=np.ascontiguousarray(split.images[order]), labels=split.labels[order])
    data = dataclasses.replace(
        data, dataset=dataclasses.replace(data.dataset, train=split), train_indices=np.arange(len(order))
    )
    return len(set(split.labels[row_numbers(data, training_images(data, 60, seed=0))].tolist()))


def test_images_of_a_sorted_data_set_are_of_every_class(tiny):
    assert classes_of(data_of(tiny("data.synthetic_train_size=400"))) == 10


def test_the_first_images_of_a_sorted_data_set_are_caught(tiny, monkeypatch):
    """The mutant: no shuffle."""
    monkeypatch.setattr(initial_model, "random_words", lambda *arguments: np.zeros((10**4, 1))[: len(arguments[3])])
    assert classes_of(data_of(tiny("data.synthetic_train_size=400"))) < 4


# --- networks of one's own ---------------------------------------------------------------------------------------


class Centred(nn.Module):
    """A linear layer beside the mean of some images, to which it adds noise."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 32, 32))
        self.fc = nn.Linear(3072, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc((images - self.mean).flatten(1))

    def initialize_from_data(self, images):
        self.mean.copy_(images(50).mean(0) + torch.rand(3, 32, 32))


class Failing(Centred):
    def initialize_from_data(self, images):
        raise RuntimeError("out\nof luck")


@pytest.fixture
def own(monkeypatch, tiny):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_model("centred")(Centred)
    plugins.register_model("failing")(Failing)
    return lambda name: tiny(f"model.name={name}", "run.seed=4")


def test_a_network_from_outside_takes_its_weights_from_images(own):
    config = own("centred")
    data = data_of(config)
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    model = build_initial_model(config, data, alone())
    assert torch.equal(torch.rand(1), expected_next)
    torch.manual_seed(4)
    assert torch.equal(model.mean, training_images(data, 50, seed=4).mean(0) + torch.rand(3, 32, 32))


def test_a_network_that_fails_is_one_line_with_its_file(own):
    config = own("failing")
    message = r"model\.name=failing: initialize_from_data fails: .*test_initial_model\.py, line \d+: RuntimeError: out"
    with pytest.raises(ConfigError, match=message) as caught:
        build_initial_model(config, data_of(config), alone())
    assert "\n" not in str(caught.value)
