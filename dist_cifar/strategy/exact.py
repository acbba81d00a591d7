"""Strategy `exact`: the same bits for every world size.

Contract: weights, buffers, optimizer state and gradient norms after a step depend on the config, the data and the
numerics of the machine (`dist_cifar.run.provenance`), not on the number of ranks. A global batch is cut into V virtual
ranks; each is computed by itself, on whichever rank, in forward and backward passes of the same shape. Their results
are summed in one balanced binary tree (`dist_cifar.strategy.tree_reduce`) and divided once by the number of passes.
BatchNorm normalises within a pass and starts every pass from the running statistics of the step's beginning; the mean
of what the passes make of them, through the same tree, is the one update of the step. Passes of one virtual rank
(`batch.max_micro_batch`) are added up in their order, before the tree.

The tree is reduced bucket by bucket while the last virtual rank's backward pass still runs: on a GPU on a stream of its
own, on a CPU in a thread. Buckets go in one order on every rank, so collectives cannot be confused.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.ops.precision import compiles
from dist_cifar.optim.base import (
    OptimizerFactory,
    load_optimizer_state_dict,
    optimizer_state_dict,
    trained_parameters,
)
from dist_cifar.optim.clipping import clipped_step
from dist_cifar.run.step_profiler import phase
from dist_cifar.strategy.base import Tensors
from dist_cifar.strategy.batchnorm_stats import BatchNormStats
from dist_cifar.strategy.bucket import Bucket, Exchange
from dist_cifar.strategy.compute import prepare_module
from dist_cifar.strategy.reduction_queue import ReductionQueue, partition
from dist_cifar.strategy.tree_nodes import passes_of_nodes
from dist_cifar.strategy.tree_reduce import TreeAccumulator

_ALIGNMENT_BYTES = 64


class ExactStrategy:
    """See `dist_cifar.strategy.base.Strategy`."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        *,
        communicator: Communicator,
        plan: BatchPlan,
        make_optimizer: OptimizerFactory,
    ) -> None:
        """`module` is moved to the communicator's device in channels-last."""
        device = communicator.device
        self._is_compiled = compiles(config.compute, device, auto_compile=False)
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._all_passes = plan.virtual_ranks * plan.passes
        # A CPU adds a gradient while it is in the cache; a GPU adds all of them at once, in one launch.
        self._nodes = passes_of_nodes(plan.slices, plan.passes, pairs=device.type == "cpu")
        self.module = module.to(device).to(memory_format=torch.channels_last)
        prepare_module(module, config, device)
        self._statistics = BatchNormStats(module)
        self._named = trained_parameters(module)
        self._trained = [parameter for _, parameter in self._named]
        self._optimizer = make_optimizer(self._named)

        # The order in which the backward pass ends with them, but for the last ones of a residual block.
        self._parameters = self._trained[::-1]
        leaves = plan.virtual_ranks
        self._gradients, self._statistics_tree = TreeAccumulator(leaves), TreeAccumulator(leaves)
        self._stats_sum = self._statistics.values
        """The sum of the running statistics after each pass of the current node."""
        self._pass = 0
        exchange = Exchange(communicator, leaves=leaves, flat=config.strategy.exchange == "flat")
        self._statistics_bucket = Bucket([self._statistics.values], exchange)
        self._buckets: list[Bucket] = []
        self._bucket_slices: list[slice] = []
        """The range of each bucket's tensors in `_parameters`."""
        for place in partition(self._parameters):
            self._buckets.append(Bucket(self._parameters[place], exchange))
            self._bucket_slices.append(place)
        self._is_alone = communicator.world_size == 1
        self._hooks: list[RemovableHandle] = []
        """In the last pass they see the gradients as they become complete."""
        self._pending: list[int] = []
        """The number of gradients of the last pass that each bucket still waits for."""
        self._next_bucket = 0
        self._reductions = ReductionQueue(communicator)
        if not self._is_alone:
            for bucket in [self._statistics_bucket, *self._buckets]:
                self._reductions.submit(bucket.warm_up)
            self._reductions.wait()
            if device.type == "cuda":  # NCCL connects on the first use; a kernel that is loaded then may wait for it
                torch.cuda.synchronize(device)
            communicator.barrier()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        statistics = self._statistics
        statistics.restore()
        with nullcontext() if self._is_last_pass or self._is_compiled else statistics.uncounted():
            logits = self.module(_aligned(images))
        seen = statistics.seen()
        node, is_first, is_last = self._nodes[self._pass]
        self._stats_sum = seen if is_first else self._stats_sum.add_(seen)
        if self._is_last_pass:
            if statistics.names:
                sums = self._statistics_tree.finish(node, [self._stats_sum])
                self._reductions.submit(partial(self._statistics_bucket.reduce, sums, self._all_passes))
        elif is_last:
            self._statistics_tree.add(node, [self._stats_sum])
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        if self._is_last_pass:
            self._next_bucket = 0
            if not self._is_alone:  # else there is nothing to wait for, so nothing to hide
                self._watch_gradients()
        loss.backward()
        node, _, is_last = self._nodes[self._pass]
        if is_last and not self._is_last_pass:
            self._gradients.add(node, self._complete_gradients(slice(None)))
            self._optimizer.zero_grad()
        elif self._is_last_pass and self._is_alone:
            while self._next_bucket < len(self._buckets):
                self._reduce_next()
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == len(self._nodes)
        if self._next_bucket < len(self._buckets):
            raise self._without_gradient("a parameter")
        phase("reduction")
        self._reductions.wait()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        phase("optimizer")
        for bucket, place in zip(self._buckets, self._bucket_slices, strict=True):
            for parameter, view in zip(self._parameters[place], bucket.views, strict=True):
                parameter.grad = view
        norm = nn.utils.get_total_norm(_gradients(self._trained))
        clipped_step(self._optimizer, lr, self._max_grad_norm, norm)

        statistics = self._statistics
        if statistics.names:
            statistics.take(self._statistics_bucket.views[0])
        statistics.restore_where(~norm.isfinite())
        statistics.snapshot()
        self._gradients.clear()
        self._statistics_tree.clear()
        self._pass = 0
        return norm

    def model_state_dict(self) -> Tensors:
        return self.module.state_dict()

    def per_rank_state(self) -> Tensors:
        return {}

    def optimizer_state_dict(self) -> Tensors:
        return optimizer_state_dict(self.module, self._optimizer)

    def load_model(self, model: Tensors) -> None:
        self.module.load_state_dict(model)
        self._statistics.snapshot()

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        self.load_model(model)
        load_optimizer_state_dict(self.module, self._optimizer, optimizer)

    @property
    def _is_last_pass(self) -> bool:
        return self._pass == len(self._nodes) - 1

    def _watch_gradients(self) -> None:
        """Has the buckets reduced, one after the other, when the backward pass that follows has their gradients."""
        self._pending = [len(bucket.views) for bucket in self._buckets]
        for index, place in enumerate(self._bucket_slices):
            for parameter in self._parameters[place]:
                ready = partial(self._on_grad_ready, index)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(ready))

    def _on_grad_ready(self, index: int, _: torch.Tensor) -> None:
        self._pending[index] -= 1
        while self._next_bucket < len(self._buckets) and self._pending[self._next_bucket] == 0:
            self._reduce_next()

    def _reduce_next(self) -> None:
        bucket, place = self._buckets[self._next_bucket], self._bucket_slices[self._next_bucket]
        gradients = self._complete_gradients(place)
        self._reductions.submit(partial(self._reduce, bucket, gradients, place))
        self._next_bucket += 1

    def _reduce(self, bucket: Bucket, gradients: list[torch.Tensor], place: slice) -> None:
        bucket.reduce(self._gradients.finish(self._nodes[-1][0], gradients, place), self._all_passes)

    def _complete_gradients(self, place: slice) -> list[torch.Tensor]:
        """The gradients of these `_parameters` after a backward pass, which must give each of them one."""
        gradients = _gradients(self._parameters[place])
        if any(gradient is None for gradient in gradients):
            raise self._without_gradient(next(name for name, one in self._named if one.grad is None))
        return gradients

    def _without_gradient(self, name: str) -> ConfigError:
        return ConfigError(
            f"strategy.name=exact: a pass gave {name} no gradient; a network that skips layers at random must multiply"
            " them by 0 instead, as dist_cifar.nn.DropPath does"
        )


def _aligned(images: torch.Tensor) -> torch.Tensor:
    """A pass's images, at an address that does not depend on its place in the rank's batch: cuDNN chooses by it."""
    return images.clone() if images.is_cuda and images.data_ptr() % _ALIGNMENT_BYTES else images


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of `parameters`, each of which has one."""
    return [parameter.grad for parameter in parameters]  # type: ignore[misc]  # none of them is None
