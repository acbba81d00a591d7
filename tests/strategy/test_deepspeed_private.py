"""What the adapter takes for granted of DeepSpeed: these tests decide whether a newer version may be allowed."""

from __future__ import annotations

import importlib.metadata
import tomllib

import pytest
import torch
from packaging.requirements import Requirement

from dist_cifar.config import BatchConfig, Config, ModelConfig, StrategyConfig
from dist_cifar.data.batching import plan_batches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.models import build_model
from dist_cifar.strategy import build_strategy, deepspeed_private
from dist_cifar.strategy.deepspeed import DeepSpeedStrategy
from tests import REPOSITORY
from tests.rank_pool import RankError

MODEL, BATCH = ModelConfig(name="resnet20"), 4


def test_the_version_is_one_that_the_adapter_is_written_for():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirement = Requirement(extras["deepspeed"][0])
    operators = {specifier.operator for specifier in requirement.specifier}
    assert requirement.name == "deepspeed" and "<" in operators, "a bound from above"
    assert importlib.metadata.version("deepspeed") in requirement.specifier


def build(communicator: Communicator, stage: int) -> DeepSpeedStrategy:
    strategy_config = StrategyConfig(name="deepspeed", zero_stage=stage)
    config = Config(model=MODEL, batch=BatchConfig(global_size=BATCH), strategy=strategy_config)
    world_size = communicator.world_size
    plan = plan_batches(
        config.batch, config.train, slices=world_size, rank=communicator.rank, world_size=world_size, train_size=BATCH
    )
    model = build_model(MODEL, num_classes=10, seed=0)
    strategy = build_strategy(model, config, communicator=communicator, plan=plan)
    assert isinstance(strategy, DeepSpeedStrategy)
    return strategy


def parts(communicator: Communicator, stage: int) -> None:
    strategy = build(communicator, stage)
    whole = {name: p.detach() for name, p in build_model(MODEL, num_classes=10, seed=0).named_parameters()}
    count = sum(tensor.numel() for tensor in whole.values())
    flat = deepspeed_private.flat_parts(strategy._engine, stage=stage)
    if stage == 0:
        assert flat == []
        return
    # They are this rank's part, in float32, and what the optimizer is given to step.
    sizes = communicator.all_reduce_sum(torch.tensor([float(sum(part.numel() for part in flat))]))
    assert count <= sizes.item() < count + 64 * len(whole) * communicator.world_size
    assert all(part.dtype == torch.float32 for part in flat)
    if stage < 3:  # in stage 3 the engine puts them there for the time of a step
        stepped = [parameter for group in strategy._clipping.param_groups for parameter in group["params"]]
        assert [id(part) for part in flat] == [id(parameter) for parameter in stepped]
    # Their state is found by name before the first step, and a write to the state is seen.
    for part in flat:
        strategy._optimizer.state[part]["exp_avg"].fill_(3.0)
    for name, parameter in strategy.module.named_parameters():
        found = strategy._utils.safe_get_full_optimizer_state(parameter, "exp_avg")
        assert torch.equal(found, torch.full_like(whole[name], 3.0)), name
    if stage == 3:
        for name, parameter in strategy.module.named_parameters():
            local = deepspeed_private.local_part(parameter)
            expected = whole[name].flatten()[communicator.rank * local.numel() :][: local.numel()]
            assert torch.equal(local[: len(expected)], expected), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_parts_of_each_stage_are_what_the_adapter_says(ranks, stage):
    ranks.run(2, parts, stage)


def unlinked(communicator: Communicator) -> None:
    link = deepspeed_private.link_optimizer_state
    deepspeed_private.link_optimizer_state = lambda engine, *, stage: None
    try:
        parts(communicator, 1)
    finally:
        deepspeed_private.link_optimizer_state = link


def test_a_state_that_is_not_linked_is_caught(ranks):
    """The mutant: without the private call the engine knows of no state before the first step."""
    with pytest.raises(RankError):
        ranks.run(2, unlinked)


def shm_all_reduce(communicator: Communicator) -> bool:
    build(communicator, 0)
    import deepspeed

    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_nothing_is_compiled_for_an_all_reduce_in_shared_memory(ranks):
    assert ranks.run(2, shm_all_reduce) == [False, False]
