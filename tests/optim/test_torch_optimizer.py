"""Optimizers from outside the package: torch's bits, a state that is saved by name, steps that change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.config import Config, GroupRule, OptimizerConfig
from dist_cifar.errors import ConfigError
from dist_cifar.optim import optimizer_factory
from dist_cifar.optim.base import Optimizer, load_optimizer_state_dict, optimizer_state_dict
from dist_cifar.optim.clipping import set_lr
from dist_cifar.optim.torch_optimizer import TorchOptimizer

NESTEROV = OptimizerConfig(
    name="examples.own_optimizer:Nesterov", options={"momentum": 0.9, "weight_decay": 1e-2}, lr=0.1
)
SGD = OptimizerConfig(name="torch.optim:SGD", options={"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}, lr=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def run(module: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        module(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def built(config: OptimizerConfig, module: nn.Module) -> Optimizer:
    return optimizer_factory(Config(optimizer=config))(module.named_parameters())


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("config", [NESTEROV, SGD], ids=["own", "torch's"])
def test_its_steps_are_those_of_torch_to_the_last_bit(config):
    ours, theirs = network(), network()
    run(ours, built(config, ours), range(4))
    oracle = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    run(theirs, oracle, range(4))
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax"])
def test_a_state_that_was_saved_continues_with_the_same_bits(name):
    config = OptimizerConfig(name=f"torch.optim:{name}", lr=0.01)
    whole, first, second = network(), network(), network()
    run(whole, built(config, whole), range(4))
    optimizer = built(config, first)
    run(first, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer_state_dict(first, optimizer).items()}
    second.load_state_dict(first.state_dict())
    resumed = built(config, second)
    load_optimizer_state_dict(second, resumed, saved)
    run(second, resumed, range(2, 4))
    assert torch.equal(weights(second), weights(whole))


def test_a_step_that_is_not_finite_changes_nothing():
    module = network()
    optimizer = built(NESTEROV, module)
    before = weights(module)
    module(torch.randn(8, 4)).sum().backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weights(module), before) and not optimizer.state
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(weights(module), before)


def test_a_group_has_a_learning_rate_of_its_own():
    module = network()
    groups = [{"params": [module[0].weight], "lr_scale": 0.5}, {"params": [module[2].weight]}]
    optimizer = TorchOptimizer(groups, lambda given: torch.optim.SGD(given, lr=1.0), "x")
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_rules_for_names_scale_its_learning_rate_and_its_decay():
    groups = (GroupRule(match="0.*", lr_scale=0.5), GroupRule(match="*.bias", decay_scale=0.0))
    config = OptimizerConfig(**{**vars(SGD), "groups": groups})
    ours, theirs = network(), network()
    optimizer = built(config, ours)
    set_lr(optimizer, 0.1)
    oracle = torch.optim.SGD(
        [
            {"params": [theirs[0].weight, theirs[0].bias], "lr": 0.05},
            {"params": [theirs[2].weight]},
            {"params": [theirs[2].bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-2,
        nesterov=True,
    )
    run(ours, optimizer, range(3))
    run(theirs, oracle, range(3))
    assert torch.equal(weights(ours), weights(theirs))


class Plain(torch.optim.Optimizer):
    """Has no weight decay."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})


class Splits(torch.optim.SGD):
    """Makes groups of its own."""

    def __init__(self, params, lr):
        parts = [group["params"] if isinstance(group, dict) else [group] for group in params]
        super().__init__([{"params": [parameter]} for part in parts for parameter in part], lr=lr)


NO_DECAY = {"groups": (GroupRule(match="*.bias", decay_scale=0.0),)}


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (Plain, NO_DECAY, "groups: optimizer.name=own has no weight_decay"),
        (Plain, {"decay_norms_and_biases": False}, "decay_norms_and_biases: optimizer.name=own has no weight_decay"),
        (Splits, NO_DECAY, "groups: does not go with optimizer.name=own, which makes groups of its own"),
        (Splits, {"groups": (GroupRule(match="*", epochs=1.0),)}, "groups: does not go with optimizer.name=own"),
    ],
)
def test_rules_that_it_cannot_follow_are_refused(monkeypatch, optimizer, settings, message):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_optimizer("own")(optimizer)
    with pytest.raises(ConfigError, match=rf"optimizer\.{message}"):
        built(OptimizerConfig(name="own", **settings), network())


@pytest.mark.parametrize(("match", "lengths"), [("*", [2.0]), ("*.bias", [None, 2.0])])
def test_groups_keep_their_lengths(match, lengths):
    rules = (GroupRule(match=match, epochs=2.0),)
    optimizer = built(OptimizerConfig(name="torch.optim:SGD", groups=rules), network())
    assert [group["epochs"] for group in optimizer.param_groups] == lengths


class Counts(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["count"] = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params, lr: 3, "returns int; it must be a torch.optim.Optimizer"),
        (lambda params, lr: torch.optim.SGD(params, lr=-1.0), "making the optimizer fails: .*ValueError"),
        (Counts, "its state count is int; keep a tensor there"),
    ],
)
def test_what_is_no_optimizer_is_refused_in_one_line(monkeypatch, make, message):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_optimizer("own")(make)
    module = network()
    with pytest.raises(ConfigError, match=f"optimizer.name=own: {message}"):
        run(module, built(OptimizerConfig(name="own"), module), range(1))
