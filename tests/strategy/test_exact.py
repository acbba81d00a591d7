"""Strategy `exact`: one process is the oracle of many, to the last bit; and a hand-written loop that of one process."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dist_cifar.config import BatchConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, StrategyConfig
from dist_cifar.data.batching import plan_batches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.models import build_model
from dist_cifar.run.provenance import make_deterministic
from dist_cifar.strategy import bucket, build_strategy, exact, reduction_queue, tree_nodes, tree_reduce
from dist_cifar.strategy.exact import ExactStrategy

BATCH, VIRTUAL, LR, STEPS = 16, 4, 3e-4, 3
OPTIMIZER = OptimizerConfig(eps=1e-3, weight_decay=1e-2, max_grad_norm=0.5)


def config(**changes: Any) -> Config:
    """`model`, `precision`, `max_micro_batch`, `virtual_ranks`, `non_finite`, `norm` may be given."""
    return Config(
        model=ModelConfig(name=changes.get("model", "resnet8"), norm=changes.get("norm", "batch")),
        batch=BatchConfig(
            global_size=BATCH,
            max_micro_batch=changes.get("max_micro_batch"),
        ),
        optimizer=dataclasses.replace(OPTIMIZER, non_finite=changes.get("non_finite", "raise")),
        strategy=StrategyConfig(name="exact", virtual_ranks=changes.get("virtual_ranks", VIRTUAL)),
        compute=ComputeConfig(precision=changes.get("precision", "fp32")),
    )


def data(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype)
    return images, torch.randint(10, (BATCH,), generator=generator)


def build(communicator: Communicator, config: Config, dtype: torch.dtype = torch.float32) -> tuple[ExactStrategy, Any]:
    slices, world_size = config.strategy.virtual_ranks, communicator.world_size
    rank = communicator.rank
    plan = plan_batches(config.batch, config.train, slices=slices, rank=rank, world_size=world_size, train_size=BATCH)
    model = build_model(config.model, num_classes=10, seed=1).to(dtype)
    strategy = build_strategy(model, config, communicator=communicator, plan=plan)
    assert isinstance(strategy, ExactStrategy)
    return strategy, plan


def train_step(strategy: ExactStrategy, plan: Any, communicator: Communicator, step: int, poison: int = -1) -> float:
    """One step; the images of virtual rank `poison` are NaN."""
    parameter = next(strategy.module.parameters())
    images, labels = (part.to(parameter.device) for part in data(step, parameter.dtype))
    if poison >= 0:
        images.chunk(VIRTUAL)[poison].fill_(float("nan"))
    images, labels = (part[plan.start :][: plan.per_rank_size] for part in (images, labels))
    for inputs, targets in zip(images.split(plan.micro_sizes), labels.split(plan.micro_sizes), strict=True):
        strategy.backward(torch.nn.functional.cross_entropy(strategy.forward(inputs), targets))
    return strategy.step(LR).item()


def state(strategy: ExactStrategy) -> dict[str, str]:
    tensors = strategy.model_state_dict() | strategy.optimizer_state_dict()
    return {name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def trained(communicator: Communicator, config: Config, steps: int = STEPS) -> tuple[dict[str, str], list[float]]:
    strategy, plan = build(communicator, config)
    norms = [train_step(strategy, plan, communicator, step) for step in range(steps)]
    return state(strategy), norms


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"norm": "group"},
        {"max_micro_batch": 2},
        {"virtual_ranks": 8, "precision": "bf16"},
    ],
)
def test_every_world_size_gives_the_same_bits_on_every_rank(ranks, changes):
    expected = ranks.run(1, trained, config(**changes))[0]
    assert expected[1][0] != expected[1][1]
    for world_size in (2, 3, 4):
        for result in ranks.run(world_size, trained, config(**changes)):
            assert result == expected


@pytest.mark.slow
@pytest.mark.parametrize("virtual_ranks", [8, 16])
def test_many_ranks_give_the_same_bits(ranks, virtual_ranks):
    expected = ranks.run(1, trained, config(virtual_ranks=virtual_ranks), 1)[0]
    for world_size in (5, 6, 7, 8):
        for result in ranks.run(world_size, trained, config(virtual_ranks=virtual_ranks), 1):
            assert result == expected


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50", "resnet56"])
def test_every_resnet_gives_the_same_bits(ranks, model):
    expected = ranks.run(1, trained, config(model=model), 1)[0]
    assert ranks.run(4, trained, config(model=model), 1)[3] == expected


def small_buckets(communicator: Communicator, config: Config) -> tuple[dict[str, str], list[float]]:
    original, reduction_queue.BUCKET_BYTES = reduction_queue.BUCKET_BYTES, 10_000
    try:
        return trained(communicator, config)
    finally:
        reduction_queue.BUCKET_BYTES = original


def test_buckets_do_not_change_the_bits(ranks):
    expected = ranks.run(1, trained, config())[0]
    assert ranks.run(1, small_buckets, config())[0] == expected
    assert ranks.run(4, small_buckets, config())[0] == expected


def reduced_before_the_first_step(communicator: Communicator) -> tuple[int, int]:
    """How many reductions, and how many buckets there are, that of the statistics included."""
    with mock.patch.object(bucket.Bucket, "reduce", autospec=True, side_effect=bucket.Bucket.reduce) as reduce:
        strategy, _ = build(communicator, config())
    return reduce.call_count, len(strategy._buckets) + 1


def test_ranks_connect_before_the_first_step(ranks):
    """Else a GPU would open connections while kernels that it loads for the first time wait for it."""
    assert ranks.run(1, reduced_before_the_first_step)[0][0] == 0
    for reductions, buckets in ranks.run(2, reduced_before_the_first_step):
        assert reductions == buckets


def without_pairs(communicator: Communicator, config: Config) -> tuple[dict[str, str], list[float]]:
    """As on a GPU."""
    with mock.patch.object(exact, "passes_of_nodes", passes_without_pairs):
        return trained(communicator, config)


def passes_without_pairs(slices: range, passes: int, *, pairs: bool) -> list[tuple[tree_nodes.Node, bool, bool]]:
    assert pairs
    return tree_nodes.passes_of_nodes(slices, passes, pairs=False)


def test_pairs_that_autograd_adds_up_change_no_bit(ranks):
    expected = ranks.run(1, trained, config(virtual_ranks=8))[0]
    assert ranks.run(1, without_pairs, config(virtual_ranks=8))[0] == expected
    assert ranks.run(3, without_pairs, config(virtual_ranks=8))[0] == expected


def hooks_called(communicator: Communicator, config: Config) -> tuple[int, int]:
    """How often a hook is called in three steps, and how many parameters there are."""
    calls, called = 0, ExactStrategy._on_grad_ready

    def count(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        called(*arguments)

    with mock.patch.object(ExactStrategy, "_on_grad_ready", count):
        strategy, plan = build(communicator, config)
        for step in range(3):
            train_step(strategy, plan, communicator, step)
    return calls, len(list(strategy.module.parameters()))


def test_gradients_are_watched_in_the_last_pass_of_a_step_where_there_is_something_to_hide(ranks):
    (calls, count), *_ = ranks.run(2, hooks_called, config())
    assert calls == 3 * count
    assert ranks.run(1, hooks_called, config()) == [(0, count)]


# --- against a hand-written loop ---------------------------------------------------------------------------------


def by_hand(communicator: Communicator, passes: int, steps: int, dtype: torch.dtype) -> tuple[dict[str, Any], list]:
    """Virtual ranks one after the other in one process, with nothing of the project but the network."""
    model = build_model(ModelConfig(name="resnet8"), num_classes=10, seed=1).to(dtype)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay)
    norms = []
    for step in range(steps):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after = {name: torch.zeros_like(buffer) for name, buffer in before.items()}
        optimizer.zero_grad()
        for images, labels in zip(*(part.chunk(passes) for part in data(step, dtype)), strict=True):
            for name, buffer in model.named_buffers():
                buffer.data.copy_(before[name])
            (torch.nn.functional.cross_entropy(model(images), labels) / passes).backward()
            for name, buffer in model.named_buffers():
                after[name] += buffer
        for name, buffer in model.named_buffers():
            buffer.data.copy_(after[name] / passes)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        optimizer.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, norms


def in_double(communicator: Communicator, config: Config, steps: int) -> tuple[dict[str, Any], list]:
    strategy, plan = build(communicator, config, torch.float64)
    norms = [train_step(strategy, plan, communicator, step) for step in range(steps)]
    return {name: tensor.numpy().copy() for name, tensor in strategy.model_state_dict().items()}, norms


def agrees(result: tuple[dict[str, Any], list], expected: tuple[dict[str, Any], list]) -> bool:
    return np.allclose(result[1], expected[1], rtol=1e-8) and all(
        np.allclose(result[0][name], expected[0][name], rtol=1e-8, atol=1e-11) for name in expected[0]
    )


@pytest.mark.parametrize(("world_size", "max_micro_batch", "passes"), [(1, None, 4), (4, None, 4), (2, 2, 8)])
def test_a_step_is_that_of_a_hand_written_loop(ranks, world_size, max_micro_batch, passes):
    """In float64, where rounding cannot hide a wrong term: gradients, clipping, Adam and BatchNorm's statistics."""
    expected = ranks.run(1, by_hand, passes, STEPS, torch.float64)[0]
    result = ranks.run(world_size, in_double, config(max_micro_batch=max_micro_batch), STEPS)[0]
    assert result[0].keys() == expected[0].keys() and int(result[0]["bn1.num_batches_tracked"]) == STEPS
    assert agrees(result, expected)
    assert not agrees(ranks.run(1, by_hand, 2, STEPS, torch.float64)[0], expected)


# --- mutants -----------------------------------------------------------------------------------------------------


class AllNeighbours(dict):
    """In the place of the tree: whatever stands side by side is added up."""

    def __missing__(self, pair: tuple[tree_nodes.Node, tree_nodes.Node]) -> tree_nodes.Node:
        return pair[0][0], pair[1][1]

    def get(self, pair: Any, default: Any = None) -> Any:
        return self[pair]

    def __contains__(self, pair: Any) -> bool:
        return True


def rows_in_order(rows: torch.Tensor, nodes: Any, *, leaves: int) -> torch.Tensor:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def statistics_of_each_rank(self: ExactStrategy, lr: float) -> torch.Tensor:
    last = self._statistics.values.clone()
    norm = _STEP(self, lr)
    self._statistics.values.copy_(last)
    self._statistics.snapshot()
    return norm


def a_batch_for_each_pass(self: ExactStrategy, lr: float) -> torch.Tensor:
    self._statistics.counts += len(self._nodes) - 1
    return _STEP(self, lr)


def one_slice_a_rank(self: ExactStrategy, *arguments: Any, **keywords: Any) -> None:
    _INIT(self, *arguments, **keywords)
    whole, count = (self._nodes[0][0][0], self._nodes[-1][0][1]), len(self._nodes)
    self._nodes = [(whole, i == 0, i == count - 1) for i in range(count)]


def statistics_in_order(self: ExactStrategy, *arguments: Any, **keywords: Any) -> None:
    _INIT(self, *arguments, **keywords)
    self._statistics_tree._parents = AllNeighbours()


_STEP, _INIT = ExactStrategy.step, ExactStrategy.__init__
MUTANTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a left fold of the local leaves": (tree_reduce, "parents_in", lambda leaves: AllNeighbours()),
    "all passes of a rank added up in their order": (ExactStrategy, "__init__", one_slice_a_rank),
    "statistics of a rank added up in their order": (ExactStrategy, "__init__", statistics_in_order),
    "a left fold over the ranks": (bucket, "tree_sum", rows_in_order),
    "statistics applied on each rank": (ExactStrategy, "step", statistics_of_each_rank),
    "batches counted for each pass": (ExactStrategy, "step", a_batch_for_each_pass),
}


def mutated(communicator: Communicator, name: str) -> dict[str, str]:
    owner, attribute, replacement = MUTANTS[name]
    original = getattr(owner, attribute)
    setattr(owner, attribute, replacement)
    try:
        return trained(communicator, config(virtual_ranks=8))[0]
    finally:
        setattr(owner, attribute, original)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(ranks, name):
    results = [ranks.run(world_size, mutated, name)[0] for world_size in (1, 2, 4)]
    assert results[0] != results[1] or results[0] != results[2]


def running_statistics_from_pass_to_pass(communicator: Communicator) -> dict[str, str]:
    restore, exact.BatchNormStats.restore = exact.BatchNormStats.restore, lambda self: None
    try:
        return trained(communicator, config())[0]
    finally:
        exact.BatchNormStats.restore = restore


def test_statistics_that_run_from_pass_to_pass_are_caught(ranks):
    one, four = (ranks.run(n, running_statistics_from_pass_to_pass)[0] for n in (1, 4))
    assert one["bn1.running_mean"] != four["bn1.running_mean"]


# --- what is not finite ------------------------------------------------------------------------------------------


def skipping(communicator: Communicator, poisoned: int) -> tuple[dict[str, str], list[float], dict[str, str]]:
    """Two steps, the second of which is poisoned on one virtual rank, and a third; the state after the first too."""
    strategy, plan = build(communicator, config(non_finite="skip"))
    norms = [train_step(strategy, plan, communicator, 0)]
    first = state(strategy)
    norms.append(train_step(strategy, plan, communicator, 1, poison=poisoned))
    assert state(strategy) == first
    norms.append(train_step(strategy, plan, communicator, 2))
    return state(strategy), norms, first


@pytest.mark.parametrize("poisoned", [0, 3])
def test_a_step_that_is_not_finite_on_one_virtual_rank_is_skipped_on_all(ranks, poisoned):
    expected = ranks.run(1, skipping, poisoned)[0]
    assert np.isfinite(expected[1]).tolist() == [True, False, True] and expected[0] != expected[2]
    for result in ranks.run(4, skipping, poisoned):
        assert result[0] == expected[0] and result[2] == expected[2]


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_bits_every_time_and_with_every_bucket_size(precision, monkeypatch):
    """The reduction on a stream of its own must wait for the gradients, and the step for the reduction."""
    device = torch.device("cuda", 0)
    make_deterministic(device)
    communicator = Communicator(DistEnv(), device=device, timeout_seconds=60)
    results = []
    for bucket_bytes in (10_000, 10_000, reduction_queue.BUCKET_BYTES):
        monkeypatch.setattr(reduction_queue, "BUCKET_BYTES", bucket_bytes)
        strategy, plan = build(communicator, config(precision=precision))
        norms = [train_step(strategy, plan, communicator, step) for step in range(STEPS)]
        results.append((state(strategy), norms))
    assert results[0] == results[1] == results[2]
