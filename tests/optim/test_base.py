"""The state of an optimizer by the names of the parameters, clipping, and steps that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import nn

from dist_cifar.config import ComputeConfig, Config, OptimizerConfig
from dist_cifar.optim import OPTIMIZERS, optimizer_factory
from dist_cifar.optim.base import Optimizer, load_optimizer_state_dict, optimizer_state_dict
from dist_cifar.optim.clipping import clip_by_norm, clipped_step


class Momentum:
    """SGD with momentum: an optimizer whose state has other names than Adam's."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self.found_inf: torch.Tensor | None = None

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"velocity": torch.zeros_like(parameter), "updates": torch.zeros(())}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state.setdefault(parameter, self.new_state(parameter))
                state["velocity"].mul_(0.9).add_(parameter.grad)
                state["updates"] += 1
                parameter -= self.param_groups[0]["lr"] * state["velocity"]

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


def made(name: str, parameters: Iterable[torch.Tensor]) -> Optimizer:
    config = Config(optimizer=OptimizerConfig(name=name), compute=ComputeConfig(precision="fp32"))
    return optimizer_factory(config)((str(number), parameter) for number, parameter in enumerate(parameters))


def adam(parameters: Iterable[torch.Tensor]) -> Optimizer:
    return made("adam", parameters)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)


def train(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        module(torch.randn(5, 3, 4, 4)).square().mean().backward()
        clipped_step(optimizer, 1e-2, 1.0, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("make", "entries"),
    [
        (adam, ["step", "exp_avg", "exp_avg_sq"]),
        (partial(made, "adamw"), ["step", "exp_avg", "exp_avg_sq"]),
        (partial(made, "sgd"), ["momentum_buffer"]),
        (Momentum, ["velocity", "updates"]),
    ],
)
def test_training_continues_from_the_state_by_name(make, entries):
    whole = network()
    optimizer = make(whole.parameters())
    train(whole, optimizer, range(3))
    part, saved = copy.deepcopy(whole), optimizer_state_dict(whole, optimizer)
    assert list(saved) == [f"{name}.{entry}" for name, _ in whole.named_parameters() for entry in entries]
    # As a file gives it back: row-major, and shared with nobody.
    saved = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in saved.items()}
    train(whole, optimizer, range(3, 5))

    resumed = make(part.parameters())
    load_optimizer_state_dict(part, resumed, saved)
    for parameter, state in resumed.state.items():
        assert list(state) == entries
        assert all(value.dim() == 0 or value.stride() == parameter.stride() for value in state.values())
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    train(part, resumed, range(3, 5))
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items()), "a step must not write to the file's"
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), part.parameters(), strict=True))
    after, expected = optimizer_state_dict(part, resumed), optimizer_state_dict(whole, optimizer)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_parameters_without_an_entry_are_left_without_state():
    module = network()
    optimizer = adam(module.parameters())
    load_optimizer_state_dict(module, optimizer, {})
    assert optimizer.state == {}


def test_half_a_state_is_an_error():
    module = network()
    with pytest.raises(KeyError, match="exp_avg"):
        load_optimizer_state_dict(module, adam(module.parameters()), {"0.weight.step": torch.ones(())})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_all_as_it_was_where_the_norm_is_not_finite(name):
    module = network()
    optimizer = made(name, module.parameters())
    train(module, optimizer, range(2))
    tensors = dict(module.named_parameters()) | optimizer_state_dict(module, optimizer)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    clipped_step(optimizer, 1e-2, 1.0, torch.tensor(float("nan")))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(("limit", "factor"), [(1.0, 0.25), (5.0, 1.0), (None, 1.0)])
def test_gradients_are_scaled_to_the_limit_and_never_up(limit, factor):
    module = network()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip_by_norm(adam(module.parameters()), limit, torch.tensor(4.0))
    for parameter in module.parameters():
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, factor))
