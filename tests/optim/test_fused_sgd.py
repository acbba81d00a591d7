"""`FusedSGD` against torch's own."""

from __future__ import annotations

import pytest
import torch

from dist_cifar.optim.clipping import set_lr
from dist_cifar.optim.fused_sgd import FusedSGD
from tests.optim.test_fused_adam import SKIPPED, grouped, parameters

LR, DECAY = 0.1, 0.05


@pytest.mark.parametrize("divided", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_bits_are_those_of_torchs_fused_sgd(momentum, nesterov, decoupled, divided):
    ours, theirs = parameters(), parameters()
    options = {"lr": LR, "momentum": momentum, "nesterov": nesterov}
    mine = FusedSGD(grouped(ours) if divided else ours, **options, weight_decay=DECAY, decoupled=decoupled)
    coupled = 0.0 if decoupled else DECAY
    other = torch.optim.SGD(grouped(theirs) if divided else theirs, fused=True, **options, weight_decay=coupled)
    for step in range(5):
        for parameter, twin in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        for optimizer in (mine, other):
            set_lr(optimizer, LR / (step + 1))
        mine.found_inf = torch.tensor(float(step == SKIPPED))
        mine.step()
        if step != SKIPPED:  # torch's own would have made a buffer of NaN at its first step
            if decoupled:
                with torch.no_grad():
                    for twin in theirs[:1] if divided else theirs:
                        twin.mul_(1 - LR / (step + 1) * DECAY)
            other.step()
        for parameter, twin in zip(ours, theirs, strict=True):
            assert torch.equal(parameter, twin), step
        mine.zero_grad()
    for parameter, twin in zip(ours, theirs, strict=True):
        if momentum:
            buffer = mine.state[parameter]["momentum_buffer"]
            assert torch.equal(buffer, other.state[twin]["momentum_buffer"]) and buffer.stride() == parameter.stride()


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_that_is_skipped_changes_nothing(decoupled):
    made = parameters()
    before = [parameter.detach().clone() for parameter in made]
    optimizer = FusedSGD(made, lr=LR, momentum=0.9, nesterov=True, weight_decay=DECAY, decoupled=decoupled)
    for parameter in made:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for parameter, old in zip(made, before, strict=True):
        assert torch.equal(parameter, old) and not optimizer.state[parameter]["momentum_buffer"].any()
