"""Muon against its formula in numpy, and against torch's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from dist_cifar.config import ComputeConfig, Config, GroupRule, MuonConfig, OptimizerConfig, load_config
from dist_cifar.errors import ConfigError
from dist_cifar.optim import optimizer_factory
from dist_cifar.optim.base import Optimizer, load_optimizer_state_dict, optimizer_state_dict
from dist_cifar.optim.clipping import set_lr
from dist_cifar.optim.muon import newton_schulz

Matrix = npt.NDArray[np.float64]
LR, DECAY, STEPS = 0.1, 0.02, 4
CONFIG = Config(
    optimizer=OptimizerConfig(name="muon", lr=LR, weight_decay=DECAY, momentum=0.8),
    compute=ComputeConfig(precision="fp32"),
)


def network() -> nn.Module:
    """Filter banks with more columns than rows and with more rows than columns, and a rest."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 9, 1), nn.Flatten(), nn.Linear(36, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def optimizer_of(module: nn.Module, config: Config = CONFIG) -> Optimizer:
    return optimizer_factory(config)(module.named_parameters())


def give_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(memory_format=torch.preserve_format)


def train(module: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(module, step)
        set_lr(optimizer, LR / (step + 1))
        optimizer.step()
        optimizer.zero_grad()


def numpy_newton_schulz(matrix: Matrix, steps: int, a: float, b: float, c: float) -> Matrix:
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    if len(x) > x.shape[1]:
        return numpy_newton_schulz(matrix.T, steps, a, b, c).T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def by_formula(config: MuonConfig) -> dict[str, Matrix]:
    """The filter banks of `network` after `STEPS`, in float64."""
    module = network()
    weights = {n: p.detach().double().numpy().reshape(len(p), -1) for n, p in module.named_parameters() if p.dim() == 4}
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(STEPS):
        give_gradients(module, step)
        lr = LR / (step + 1)
        for name, weight in weights.items():
            gradient = module.get_parameter(name).grad.double().numpy().reshape(weight.shape)
            momenta[name] = config.momentum * momenta[name] + gradient
            direction = gradient + config.momentum * momenta[name] if config.nesterov else momenta[name]
            if config.renormalise_every_steps and step % config.renormalise_every_steps == 0:
                weight = weight * np.sqrt(len(weight)) / (np.linalg.norm(weight) + 1e-7)
            rows, columns = weight.shape
            scales = {"none": 1, "rows": max(1, rows / columns) ** 0.5, "rms": 0.2 * max(rows, columns) ** 0.5}
            orthogonal = numpy_newton_schulz(direction, config.newton_schulz_steps, *config.newton_schulz)
            weights[name] = (weight - lr * scales[config.scale] * orthogonal) * (1 - lr * DECAY)
    return weights


@pytest.mark.parametrize(
    "muon",
    [
        MuonConfig(),
        MuonConfig(nesterov=False, scale="rms", renormalise_every_steps=0),
        MuonConfig(momentum=0.95, scale="rows", renormalise_every_steps=3, newton_schulz_steps=5),
        MuonConfig(newton_schulz=(3.4576, -4.7391, 2.0843)),
    ],
    ids=["airbench", "plain", "rows", "polynomial"],
)
def test_filters_follow_the_formula_and_the_rest_follows_sgd(muon):
    config = dataclasses.replace(CONFIG, muon=dataclasses.replace(muon, rest_lr_scale=0.5))
    ours, theirs = network(), network()
    train(ours, optimizer_of(ours, config), range(STEPS))
    for name, expected in by_formula(config.muon).items():
        weight = ours.get_parameter(name)
        np.testing.assert_allclose(weight.detach().numpy().reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    rest = [parameter for parameter in theirs.parameters() if parameter.dim() != 4]
    oracle = torch.optim.SGD(rest, lr=LR, momentum=0.8, nesterov=True, weight_decay=DECAY, fused=True)
    for group in oracle.param_groups:
        group["lr_scale"] = 0.5
    train(theirs, oracle, range(STEPS))
    for name, parameter in theirs.named_parameters():
        assert parameter.dim() == 4 or torch.equal(parameter, ours.get_parameter(name)), name


def test_filters_that_are_frozen_keep_their_bits():
    rules = (GroupRule(match="0.weight", lr_scale=0.0),)
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, groups=rules))
    module = network()
    train(module, optimizer_of(module, config), range(STEPS))
    assert torch.equal(module[0].weight, network()[0].weight)


def test_the_rest_may_be_adamw():
    config = dataclasses.replace(CONFIG, muon=MuonConfig(rest="adamw"))
    module, twin = network(), network()
    train(module, optimizer_of(module, config), range(STEPS))
    rest = [parameter for parameter in twin.parameters() if parameter.dim() != 4]
    train(twin, torch.optim.AdamW(rest, lr=LR, weight_decay=DECAY, fused=True), range(STEPS))
    assert torch.equal(module[4].weight, twin[4].weight) and not torch.equal(module[4].weight, network()[4].weight)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_newton_schulz_brings_singular_values_near_1(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    found = newton_schulz(matrix, 5, (3.4445, -4.7750, 2.0315))
    expected = numpy_newton_schulz(matrix.double().numpy(), 5, 3.4445, -4.7750, 2.0315)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert found.shape == shape and torch.linalg.svdvals(found).median() == pytest.approx(1, abs=0.35)


def test_in_bf16_it_is_torchs_to_rounding():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix.clone()
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "ns_steps": 5, "eps": 1e-7}
    torch.optim.Muon([weight], lr=1.0, ns_coefficients=(3.4445, -4.7750, 2.0315), **options).step()
    expected = -weight.detach().bfloat16()
    found = newton_schulz(matrix.bfloat16(), 5, (3.4445, -4.7750, 2.0315))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def test_a_state_that_was_saved_continues_with_the_same_bits():
    whole, part = network(), network()
    config = dataclasses.replace(CONFIG, muon=MuonConfig(renormalise_every_steps=3))
    train(whole, optimizer_of(whole, config), range(5))
    first = optimizer_of(part, config)
    train(part, first, range(2))
    saved = {name: tensor.clone() for name, tensor in optimizer_state_dict(part, first).items()}
    assert {name for name in saved if name.startswith("0.weight")} == {"0.weight.step", "0.weight.momentum_buffer"}
    resumed = optimizer_of(part, config)
    load_optimizer_state_dict(part, resumed, saved)
    train(part, resumed, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), part.parameters(), strict=True))


def test_a_bank_has_the_same_bits_whatever_else_is_trained():
    """Nothing is computed in a stack whose composition could depend on who holds what."""
    whole, alone = network(), network()
    train(whole, optimizer_of(whole), range(2))
    optimizer = optimizer_factory(CONFIG)([("0.weight", alone[0].weight)])
    train(alone, optimizer, range(2))
    assert torch.equal(whole[0].weight, alone[0].weight)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_who_has_no_whole_matrices_refuses_it_by_name(strategy):
    with pytest.raises(ConfigError, match=rf"optimizer\.name: muon needs whole matrices and strategy\.name={strategy}"):
        load_config(None, ["optimizer.name=muon", f"strategy.name={strategy}"])
    load_config(None, ["optimizer.name=muon", "strategy.name=deepspeed", "strategy.zero_stage=0"])
