"""DDP against a hand-written loop in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dist_cifar.config import ComputeConfig, Config, ModelConfig, OptimizerConfig, StrategyConfig
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.models import build_model
from dist_cifar.optim import optimizer_factory
from dist_cifar.strategy.ddp import DdpStrategy

STEPS, BATCH, LR = 5, 8, 3e-4
# With Adam's usual epsilon the first steps are the signs of the gradients, and a sign turns rounding into a step.
OPTIMIZER = OptimizerConfig(eps=1e-3, weight_decay=1e-2, max_grad_norm=0.5)
CONFIG = Config(optimizer=OPTIMIZER, strategy=StrategyConfig(name="ddp"), compute=ComputeConfig(precision="fp32"))


def data(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype)
    return images, torch.randint(10, (BATCH,), generator=generator)


def plan(world_size: int, micro_batches: int) -> BatchPlan:
    return BatchPlan(
        global_size=BATCH,
        start=0,
        micro_sizes=(BATCH // world_size // micro_batches,) * micro_batches,
        virtual_ranks=world_size,
        slices=range(1),
        passes=micro_batches,
        steps_per_epoch=STEPS,
        total_steps=STEPS,
    )


def ddp(model: torch.nn.Module, communicator: Communicator, micro_batches: int = 1) -> DdpStrategy:
    return DdpStrategy(
        model,
        CONFIG,
        communicator=communicator,
        plan=plan(communicator.world_size, micro_batches),
        make_optimizer=optimizer_factory(CONFIG),
    )


def by_strategy(
    communicator: Communicator, norm: str, micro_batches: int, steps: int, dtype: torch.dtype
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Parameters and buffers after `steps`, and the gradient norms."""
    model = build_model(ModelConfig(name="resnet20", norm=norm), num_classes=10, seed=1).to(dtype)
    strategy = ddp(model, communicator, micro_batches)
    assert communicator.world_size == 1 or not strategy._replica.broadcast_buffers
    norms = []
    for step in range(steps):
        images, labels = (
            part.chunk(communicator.world_size)[communicator.rank].chunk(micro_batches) for part in data(step, dtype)
        )
        for i in range(micro_batches):
            strategy.backward(torch.nn.functional.cross_entropy(strategy.forward(images[i]), labels[i]))
        norms.append(strategy.step(LR).item())
    return {name: tensor.numpy().copy() for name, tensor in strategy.model_state_dict().items()}, norms


def by_hand(steps: int, dtype: torch.dtype) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same in one process, with nothing of the project but the network."""
    model = build_model(ModelConfig(name="resnet20", norm="group"), num_classes=10, seed=1).to(dtype)
    model.to(memory_format=torch.channels_last)  # other kernels round the convolutions in another way
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay)
    norms = []
    for step in range(steps):
        images, labels = data(step, dtype)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        optimizer.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, norms


def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray], names: list[str]) -> float:
    """Relative L2 distance of the named tensors, taken as one vector."""
    difference = sum(np.sum((first[name] - second[name]) ** 2) for name in names)
    return float(np.sqrt(difference / sum(np.sum(second[name] ** 2) for name in names)))


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (4, 1), (2, 4), (1, 2)])
def test_parameters_equal_a_hand_written_loop(ranks, world_size, micro_batches):
    """Each tensor in float64, where rounding cannot hide a wrong term, and all together in float32."""
    start, _ = by_hand(0, torch.float64)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        expected, expected_norms = by_hand(STEPS, dtype)
        groups = [[name] for name in expected] if dtype == torch.float64 else [list(expected)]
        for parameters, norms in ranks.run(world_size, by_strategy, "group", micro_batches, STEPS, dtype):
            assert parameters.keys() == expected.keys()
            for names in groups:
                assert distance(parameters, expected, names) < rtol, names
                assert distance(start, expected, names) > 50 * rtol, names
            np.testing.assert_allclose(norms, expected_norms, rtol=10 * rtol)


def test_ranks_hold_the_same_weights_bit_for_bit(ranks):
    first, *others = (parameters for parameters, _ in ranks.run(4, by_strategy, "batch", 1, 3, torch.float32))
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first)


def buffers(communicator: Communicator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A running mean as it was, as it is saved, and as it is after saving."""
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=1)
    strategy = ddp(model, communicator)
    images = data(0, torch.float32)[0].chunk(communicator.world_size)[communicator.rank]
    strategy.forward(images)
    before = model.bn1.running_mean.numpy().copy()
    saved = strategy.model_state_dict()["bn1.running_mean"].numpy().copy()
    strategy.per_rank_state()
    return before, saved, model.bn1.running_mean.numpy().copy()


def test_batchnorm_statistics_are_averaged_for_saving_and_evaluation_and_left_alone_in_training(ranks):
    results = ranks.run(2, buffers)
    mean = (results[0][0] + results[1][0]) / 2
    assert not np.array_equal(results[0][0], results[1][0])
    for before, saved, after in results:
        assert np.array_equal(before, after)
        np.testing.assert_allclose(saved, mean, rtol=1e-6)


def by_an_engine_that_sees_another_world(communicator: Communicator, name: str, value: int) -> str:
    mutant = pytest.MonkeyPatch()
    mutant.setattr(Accelerator, name, value)
    try:
        with pytest.raises(LaunchError) as caught:
            by_strategy(communicator, "group", 1, 1, torch.float32)
    finally:
        mutant.undo()
    return str(caught.value)


@pytest.mark.parametrize(("name", "value", "seen"), [("num_processes", 1, "of 1"), ("process_index", 7, "rank 7 of 2")])
def test_an_engine_that_sees_another_world_is_refused(ranks, name, value, seen):
    """As Accelerate does where it believes variables that the process group contradicts."""
    for rank, message in enumerate(ranks.run(2, by_an_engine_that_sees_another_world, name, value)):
        assert f"launch: this is rank {rank} of 2 and Accelerate takes it for rank" in message and seen in message
