"""`FusedAdam` and `FusedAdamW` against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_cifar.optim.clipping import set_lr
from dist_cifar.optim.fused_adam import FusedAdam, FusedAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(8, 4, 3, 3), (17,), (10, 64)]
SKIPPED = 3
"""A step whose gradients are said not to be finite."""


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return [tensor.requires_grad_() for tensor in made]


def grouped(made: list[torch.Tensor]) -> list[dict[str, Any]]:
    """In two groups, the second without decay and at half the learning rate, which torch is told as `lr`."""
    return [{"params": made[:1]}, {"params": made[1:], "lr_scale": 0.5, "decay_scale": 0.0, "weight_decay": 0.0}]


@pytest.mark.parametrize(("adam", "torchs"), [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)])
@pytest.mark.parametrize("divided", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("idle", [None, 1], ids=["all", "one has no gradient"])
def test_the_bits_are_those_of_torchs_fused_adam(adam, torchs, divided, idle):
    ours, theirs = parameters(), parameters()
    mine = adam(grouped(ours) if divided else ours, **OPTIONS)
    other = torchs(grouped(theirs) if divided else theirs, fused=True, **OPTIONS)
    for step in range(6):
        for number, (parameter, twin) in enumerate(zip(ours, theirs, strict=True)):
            if number != idle:
                parameter.grad = torch.randn_like(parameter)
                twin.grad = parameter.grad.clone()
        for optimizer in (mine, other):
            set_lr(optimizer, 1e-2 / (step + 1))
            optimizer.found_inf = torch.tensor(float(step == SKIPPED))
            optimizer.step()
            optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in ours)
    assert mine.state.keys() == {parameter for number, parameter in enumerate(ours) if number != idle}
    for parameter, twin in zip(ours, theirs, strict=True):
        assert torch.equal(parameter, twin)
        for name, moment in other.state[twin].items():
            found = mine.state[parameter][name]
            assert torch.equal(found, moment) and found.stride() == moment.stride()
    assert mine.state[ours[0]]["step"] == 5  # of 6: one was skipped


def test_a_step_that_is_skipped_changes_nothing():
    (parameter,) = made = parameters()[1:2]
    before = parameter.detach().clone()
    optimizer = FusedAdam(made, **OPTIONS)
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, before) and optimizer.state[parameter]["step"] == 0
