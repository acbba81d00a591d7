"""The state of a checkpoint that is whole, and of another version or another program."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.run.checkpoint import Checkpoint
from dist_cifar.run.checkpoint_state import require_state
from dist_cifar.state import NO_STEPS, TrainState

STATE = {
    "train_state": dataclasses.asdict(TrainState(step=3, best_accuracy=0.5, best_step=2)),
    "schedule": {"lr": 0.1, "best": float("inf")},
    "sums": list(NO_STEPS),
    "config": {"model.name": "resnet20"},
    "data_sha256": "0" * 64,
    "classes": ["a", "b"],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "world_size": 2,
    "numerics": {"threads": 1},
    "own_files": {"mine.py": "ab"},
    "versions": {"torch": "2"},
}
GROUPS = {"model": {"w": torch.zeros(1)}, "optimizer": {}, "ranks": {}}


def checkpoint(state: object, groups: object = GROUPS) -> Checkpoint:
    return Checkpoint(step=3, path=Path("c/step-00000003"), tensors=groups, state=state)  # type: ignore[arg-type]


def test_what_a_training_saves_is_let_through():
    assert require_state(checkpoint(STATE)) is STATE


@pytest.mark.parametrize("key", [key for key in STATE if key != "versions"])
@pytest.mark.parametrize("value", [None, [], "x", -1, 1.5, [None], {"a": [[]]}, float("nan")])
def test_what_is_missing_or_of_another_kind_is_named(key, value):
    fits = {"config": dict, "schedule": dict, "numerics": dict, "data_sha256": str}
    state = copy.deepcopy(STATE) | {key: value}
    if isinstance(value, fits.get(key, ())):
        require_state(checkpoint(state))
        return
    with pytest.raises(CheckpointError, match=rf"c/step-00000003: .* not by this version of dist_cifar \({key}"):
        require_state(checkpoint(state))
    del state[key]
    with pytest.raises(CheckpointError, match=rf"{key} is missing"):
        require_state(checkpoint(state))


@pytest.mark.parametrize("state", [None, [], "x", 1])
def test_a_state_that_is_no_object_is_refused(state):
    with pytest.raises(CheckpointError, match="it is no object"):
        require_state(checkpoint(state))


@pytest.mark.parametrize("group", GROUPS)
def test_tensors_that_are_missing_are_named(group):
    with pytest.raises(CheckpointError, match=rf"{group}.safetensors is missing"):
        require_state(checkpoint(STATE, {name: tensors for name, tensors in GROUPS.items() if name != group}))


def test_a_training_state_of_other_fields_is_refused():
    chance = random.Random(0)
    for _ in range(50):
        state = copy.deepcopy(STATE)
        inside = state["train_state"]
        assert isinstance(inside, dict)
        if chance.random() < 0.5:
            del inside[chance.choice(list(inside))]
        else:
            inside["new"] = 1
        with pytest.raises(CheckpointError, match="train_state is"):
            require_state(checkpoint(state))
