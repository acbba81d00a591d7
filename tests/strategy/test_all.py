"""Every strategy against a hand-written loop, and against each other where a run is resumed in another one."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest
import torch

from dist_cifar.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PlateauConfig,
    StrategyConfig,
)
from dist_cifar.data.batching import BatchPlan, plan_batches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.models import build_model
from dist_cifar.optim.plateau import start_plateau, step_plateau
from dist_cifar.strategy import build_strategy, slice_count
from dist_cifar.strategy.base import Strategy

STEPS, BATCH, LR, EVERY = 20, 8, 1e-4, 4
EPS = 1e-2
"""With Adam's usual epsilon the first steps are the signs of the gradients, and a sign turns rounding into a step."""
PLATEAU = PlateauConfig(patience_evaluations=0, threshold=0.2, factor=0.5)
STRATEGIES = ["ddp", "exact", "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3", "fsdp"]
"""With the ZeRO stage."""


def config(
    strategy: str,
    *,
    model: str = "resnet8",
    norm: str = "group",
    max_grad_norm: float | None = 4.0,
    micro: int | None = None,
) -> Config:
    name, _, stage = strategy.partition(" ")
    return Config(
        model=ModelConfig(name=model, norm=norm),
        batch=BatchConfig(global_size=BATCH, max_micro_batch=micro),
        optimizer=OptimizerConfig(eps=EPS, weight_decay=1e-2, max_grad_norm=max_grad_norm),
        plateau=PLATEAU,
        strategy=StrategyConfig(name=name, virtual_ranks=4, zero_stage=int(stage or 1)),
        compute=ComputeConfig(precision="fp32"),
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours that tell the class: the loss falls, so that the plateau sees more than noise."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(10, (BATCH,), generator=generator)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 3
    return images.contiguous(memory_format=torch.channels_last), labels


def build(communicator: Communicator, config: Config, dtype: torch.dtype = torch.float32) -> tuple[Strategy, BatchPlan]:
    world_size = communicator.world_size
    slices = slice_count(config.batch, config.strategy, world_size=world_size)
    rank = communicator.rank
    plan = plan_batches(config.batch, config.train, slices=slices, rank=rank, world_size=world_size, train_size=BATCH)
    model = build_model(config.model, num_classes=10, seed=1).to(dtype)
    return build_strategy(model, config, communicator=communicator, plan=plan), plan


def train_step(
    strategy: Strategy, plan: BatchPlan, communicator: Communicator, step: int, lr: float, poison: int | None = None
) -> tuple[float, float]:
    """The mean loss over the global batch, and the gradient's norm; the images of rank `poison` are NaN."""
    images, labels = (part[plan.start :][: plan.per_rank_size] for part in data(step))
    if communicator.rank == poison:
        images = torch.full_like(images, float("nan"))
    losses = []
    parts = images.split(plan.micro_sizes), labels.split(plan.micro_sizes), plan.weights
    for inputs, targets, weight in zip(*parts, strict=True):
        loss = torch.nn.functional.cross_entropy(strategy.forward(inputs), targets) * weight
        strategy.backward(loss)
        losses.append(loss.detach())
    norm = strategy.step(lr)
    return float(np.mean(communicator.all_gather_object(torch.stack(losses).mean().item()))), norm.item()


Curve = list[tuple[float, float, float]]
"""(loss, norm before clipping, learning rate) of each step."""


def run(communicator: Communicator, config: Config, steps: int = STEPS) -> tuple[Curve, dict[str, np.ndarray]]:
    """The curve, the plateau advance on the training loss, and the model after it."""
    strategy, plan = build(communicator, config)
    plateau, curve = start_plateau(config.plateau, LR), []
    for step in range(steps):
        loss, norm = train_step(strategy, plan, communicator, step, plateau.lr)
        curve.append((loss, norm, plateau.lr))
        if (step + 1) % EVERY == 0:
            plateau = step_plateau(config.plateau, plateau, float(np.mean([row[0] for row in curve[-EVERY:]])))
    return curve, {name: tensor.numpy().copy() for name, tensor in strategy.model_state_dict().items()}


def by_hand(
    max_grad_norm: float | None = 4.0, factor: float = 0.5, *, model_name: str = "resnet8", steps: int = STEPS
) -> Curve:
    """The same in one process: plain torch, its own clipping, Adam and ReduceLROnPlateau."""
    model = build_model(ModelConfig(name=model_name, norm="group"), num_classes=10, seed=1)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=EPS, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    scheduler.factor = factor  # its constructor refuses 1
    curve = []
    for step in range(steps):
        images, labels = data(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"]))
        if (step + 1) % EVERY == 0:
            scheduler.step(float(np.mean([row[0] for row in curve[-EVERY:]])))
    return curve


def require_parity(curve: Curve, expected: Curve) -> None:
    losses, norms, lrs = zip(*curve, strict=True)
    expected_losses, expected_norms, expected_lrs = zip(*expected, strict=True)
    assert lrs == expected_lrs
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    np.testing.assert_allclose(norms, expected_norms, rtol=5e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_norms_and_learning_rates_are_those_of_a_hand_written_loop(ranks, strategy):
    expected = by_hand()
    assert len({lr for _, _, lr in expected}) > 2, "the plateau should cut"
    assert min(norm for _, norm, _ in expected) < 4.0 < max(norm for _, norm, _ in expected)
    for curve, _ in ranks.run(2, run, config(strategy)):
        require_parity(curve, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_passes_are_accumulated_and_clipping_can_be_off(ranks, strategy):
    expected = by_hand(max_grad_norm=None)
    for curve, _ in ranks.run(2, run, config(strategy, max_grad_norm=None, micro=2), 5):
        require_parity(curve, expected[:5])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_may_have_different_shares_of_a_batch(ranks, strategy):
    """Of 8 samples 2, 3 and 3, and in two passes 1 and 1, 1 and 2, 1 and 2."""
    expected = by_hand()
    for micro in (None, 2):
        for curve, _ in ranks.run(3, run, config(strategy, micro=micro), 5):
            require_parity(curve, expected[:5])


def unweighted(communicator: Communicator, config: Config) -> Curve:
    """The mutant: each rank's mean counts as much as the others'."""
    with mock.patch.object(BatchPlan, "weights", property(lambda plan: (1.0,) * plan.micro_batches)):
        return run(communicator, config, 5)[0]


def test_the_mean_of_means_is_another_gradient(ranks):
    with pytest.raises(AssertionError):
        require_parity(ranks.run(3, unweighted, config("ddp"))[0], by_hand()[:5])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wide_network_whose_small_convolutions_are_products_too(ranks, strategy):
    """ResNet-20 has none of them, and engines that cut weights up must have them whole again for the backward pass."""
    expected = by_hand_of_resnet18()
    for curve, _ in ranks.run(2, run, config(strategy, model="resnet18"), len(expected)):
        require_parity(curve, expected)


@functools.cache
def by_hand_of_resnet18() -> Curve:
    return by_hand(model_name="resnet18", steps=3)


# --- resuming what another one has saved ----------------------------------------------------------------------

Saved = tuple[Curve, dict[str, dict[str, torch.Tensor]]]
SAVED_STEP, RESUMED_STEPS = 6, 4


def saved(communicator: Communicator, config: Config, poison_rank: int | None = None) -> Saved:
    """The curve up to the save, and what a checkpoint would hold."""
    strategy, plan = build(communicator, config)
    curve = [(*train_step(strategy, plan, communicator, step, LR), LR) for step in range(SAVED_STEP)]
    tensors = checkpoint(strategy)
    if poison_rank is not None:
        norm = train_step(strategy, plan, communicator, SAVED_STEP, LR, poison=poison_rank)[1]
        assert not np.isfinite(norm)
        after = checkpoint(strategy)
        for group in tensors:
            assert tensors[group].keys() == after[group].keys()
            for name in tensors[group]:
                assert torch.equal(tensors[group][name], after[group][name]), (group, name)
        curve.append((*train_step(strategy, plan, communicator, SAVED_STEP, LR), LR))
    return curve, tensors


def checkpoint(strategy: Strategy) -> dict[str, dict[str, torch.Tensor]]:
    groups = {
        "model": strategy.model_state_dict(),
        "optimizer": strategy.optimizer_state_dict(),
        "ranks": strategy.per_rank_state(),
    }
    return {group: {name: tensor.clone() for name, tensor in tensors.items()} for group, tensors in groups.items()}


def resumed(communicator: Communicator, config: Config, tensors: dict[str, dict[str, torch.Tensor]]) -> Saved:
    """What is saved at once by the one that has loaded it, and its curve."""
    strategy, plan = build(communicator, config)
    strategy.load(tensors["model"], tensors["optimizer"], tensors["ranks"])
    loaded = checkpoint(strategy)
    steps = range(SAVED_STEP, SAVED_STEP + RESUMED_STEPS)
    return [(*train_step(strategy, plan, communicator, step, LR), LR) for step in steps], loaded


def require_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("first", "second", "world_size"),
    [(name, name, world_size) for name in STRATEGIES for world_size in (1, 4)]
    + [(name, STRATEGIES[i - 1], 2) for i, name in enumerate(STRATEGIES)],
)
def test_a_run_resumes_at_another_world_size_and_in_another_strategy(ranks, first, second, world_size):
    expected = by_hand_at_one_rate()
    curve, tensors = ranks.run(2, saved, config(first))[0]
    require_parity(curve, expected[:SAVED_STEP])
    for rest, loaded in ranks.run(world_size, resumed, config(second), tensors):
        require_same(loaded["model"], tensors["model"])
        require_same(loaded["optimizer"], tensors["optimizer"])
        require_parity(rest, expected[SAVED_STEP : SAVED_STEP + RESUMED_STEPS])


@functools.cache
def by_hand_at_one_rate() -> Curve:
    return by_hand(factor=1.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(ranks, strategy):
    """Weights, moments and BatchNorm's statistics; and the training continues."""
    for curve, _ in ranks.run(2, saved, config(strategy, norm="batch"), 1):
        assert np.isfinite(curve[-1][:2]).all()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "exact"])
def test_statistics_of_each_rank_are_restored_and_their_mean_is_the_models(ranks, strategy):
    results = ranks.run(2, saved, config(strategy, norm="batch"))
    tensors = results[0][1]
    rows = tensors["ranks"]["buffers"]
    assert not torch.equal(rows[0], rows[1])
    names = [name for name in tensors["model"] if "running" in name]
    mean = torch.cat([tensors["model"][name] for name in sorted(names)])
    assert torch.allclose(mean.sum(), rows.mean(0).sum(), rtol=1e-5)
    for _, loaded in ranks.run(2, resumed, config(strategy, norm="batch"), tensors):
        require_same(loaded["ranks"], tensors["ranks"])
        require_same(loaded["model"], tensors["model"])
