"""Groups that are trained for a part of the run: a loop by hand, what is no longer computed, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.errors import ConfigError
from dist_cifar.models import build_model
from dist_cifar.strategy import freezing
from dist_cifar.strategy.compute import prepare_module
from dist_cifar.trainer import Trainer
from tests.small_runs import alone

RULES = "optimizer.groups=[{match: whiten.bias, lr_scale: 4.0, epochs: 0.6}, {match: head.*, lr_scale: 2.0}]"
LENGTH = 3
"""Steps of 0.6 epochs."""
SPEEDNET = ("model.name=speednet", "model.widths=[8, 12, 8]", "optimizer.name=sgd", "optimizer.lr=0.05")
PLAIN = (
    "schedule.name=constant",
    "optimizer.warmup_epochs=0",
    "optimizer.lr_rule=none",
    "optimizer.max_grad_norm=null",
)


@pytest.fixture
def config(tiny):
    return lambda *overrides: tiny(*SPEEDNET, *PLAIN, RULES, "optimizer.weight_decay=0.01", *overrides)


def check_steps(config: Config) -> None:
    """Six steps of a run and of a loop in torch, which computes the gradient of the bias to the end."""
    trainer = Trainer.build(config, alone())
    assert trainer.plan.steps_per_epoch == 5
    model = build_model(config.model, num_classes=10, seed=config.run.seed)
    model = model.to(memory_format=torch.channels_last).train()
    model.load_state_dict(trainer.strategy.model_state_dict())
    prepare_module(model, config, torch.device("cpu"))  # the same kernels: what is compared is the update
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    bias, head = named.pop("whiten.bias"), named.pop("head.weight")
    groups = [{"params": [bias]}, {"params": [head]}, {"params": list(named.values())}]
    oracle = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.01, nesterov=True, fused=True)
    grad_norms = []
    for step in range(6):
        rates = (0.05 * 4 * max(0, 1 - step / LENGTH), 0.05 * 2, 0.05)
        for group, lr in zip(oracle.param_groups, rates, strict=True):
            group["lr"] = lr
        batch = trainer.batches.make(step)
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None and (p is not bias or step < LENGTH)]
        grad_norms.append(nn.utils.get_total_norm(gradients).item())
        oracle.step()
        oracle.zero_grad()
        norm = trainer.train_step(batch)
        assert norm.item() == pytest.approx(grad_norms[-1], rel=1e-4), f"norm of step {step}"
        for name, tensor in trainer.strategy.model_state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=f"{step} {name}")


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_a_group_with_a_length_equals_a_hand_written_loop(config, strategy):
    check_steps(config(f"strategy.name={strategy}", "strategy.virtual_ranks=1"))


def test_a_group_that_does_not_slow_down_or_goes_on_is_caught(config, monkeypatch):
    for mutant in (lambda self, lr: 1.0, lambda self, lr: max(0.1, 1 - self._step / LENGTH)):

        def step(self, lr, mutant=mutant):
            for group, _, lr_scale in self._groups:
                group["lr_scale"] = lr_scale * mutant(self, lr)
            return super(freezing.FreezingStrategy, self).step(lr)

        monkeypatch.setattr(freezing.FreezingStrategy, "step", step)
        with pytest.raises(AssertionError, match=r"whiten\.bias"):
            check_steps(config("strategy.name=exact", "strategy.virtual_ranks=1"))


@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_the_gradient_of_a_frozen_group_is_not_computed(ranks, config, strategy):
    overrides = (f"strategy.name={strategy}", "strategy.virtual_ranks=2", "batch.max_micro_batch=4")
    for seen in ranks.run(2, needed, config(*overrides)):
        assert seen == [True] * LENGTH * 2 + [False] * 4


def needed(communicator, config) -> list[bool]:
    """Of each pass of five steps, whether what follows the first bias has a gradient."""
    trainer, seen = Trainer.build(config, communicator), []
    module = trainer.strategy.module
    module.groups.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    for step in range(5):
        trainer.train_step(trainer.batches.make(step))
        assert all(parameter.requires_grad for name, parameter in module.named_parameters() if name != "whiten.weight")
    return seen


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_shard_refuse_it(config, strategy):
    with pytest.raises(ConfigError, match=rf"optimizer\.groups: epochs of a group need whole weights .*{strategy}"):
        config(f"strategy.name={strategy}", "strategy.zero_stage=0")
