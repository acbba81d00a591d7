"""What is suggested to a person who types a key that there is not."""

from __future__ import annotations

import pytest

from dist_cifar.config import flatten, load_config
from dist_cifar.config.key_hints import ELSEWHERE
from dist_cifar.errors import ConfigError


def error_of(key: str) -> str:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_config(None, [f"{key}=1"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimzer.lr", "did you mean optimizer.lr?"),
        ("optimiser", "did you mean optimizer?"),
        ("lr", "did you mean optimizer.lr?"),
        ("train.lr", "did you mean optimizer.lr?"),
        ("learning_rate", "did you mean optimizer.lr?"),
        ("optimizer.learning_rate", "did you mean optimizer.lr?"),
        ("learning-rate", "did you mean optimizer.lr?"),
        ("epochs", "did you mean train.epochs?"),
        ("batch_size", "did you mean batch.global_size?"),
        ("train.batch_size", "did you mean batch.global_size?"),
        ("train.precison", "did you mean compute.precision?"),  # a slip in a key's old name
        ("model.nam", "did you mean model.name?"),
        ("RUN.DIR", "did you mean run.dir?"),
        ("run..dir", "did you mean run.dir?"),
        ("data_dir", "did you mean data.root?"),
        ("model", "did you mean model.name?"),
        ("plateau.patience", "did you mean plateau.patience_evaluations?"),
        ("run", "run is a section, whose fields are run.<name>;"),
        ("optimizer.type", "did you mean optimizer.name?"),
        ("momentum", "did you mean optimizer.momentum?"),
        ("train.nesterov", "did you mean optimizer.nesterov?"),
        ("gamma", "did you mean schedule.gamma?"),
        ("schedule.milestones", "did you mean schedule.milestone_epochs?"),
        ("scheduler.name", "the schedule is schedule.name"),
        ("lr_scheduler.gamma", "the schedule is schedule.name"),
        ("train.gpus", "`train --ranks N` starts N ranks on this machine"),
    ],
)
def test_hints(key, hint):
    assert f"unknown key; {hint}" in error_of(key)


@pytest.mark.parametrize("key", ["name", "x.y.z", "model.wings", "run.output", "tracking.name", "", ".", "optimizer.x"])
def test_no_hint_is_better_than_one_that_misleads(key):
    assert "unknown key; `python -m dist_cifar train --help` lists them all" in error_of(key)


def test_the_table_names_keys_that_there_are():
    keys = flatten(load_config()).keys()
    assert {meant for meant in ELSEWHERE.values() if " " not in meant} <= keys and not keys & ELSEWHERE.keys()
