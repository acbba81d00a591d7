"""Strategy `ddp`: Accelerate's DistributedDataParallel.

Contract: gradients are averaged over ranks, as views of their buckets, and no buffers are broadcast; each rank
normalises its own micro-batch, and BatchNorm's running statistics are averaged when they are looked at. With one rank
the model is not wrapped. Only the model is given to Accelerate: it would step a prepared ReduceLROnPlateau once for
each rank, and shard again what our sampler has sharded.

DDP's `static_graph` is not used: it fails when the first pass accumulates, orders its buckets at another time (see
`_settle_buckets`) and gains nothing for a model without unused parameters.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType
from torch import nn

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.optim.base import (
    OptimizerFactory,
    load_optimizer_state_dict,
    optimizer_state_dict,
    trained_parameters,
)
from dist_cifar.optim.clipping import clipped_step
from dist_cifar.run.step_profiler import reduction_follows
from dist_cifar.strategy.base import DataParallelStrategy, Tensors
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats
from dist_cifar.strategy.compute import prepare_module

_HOOKS = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
"""The hook that rounds the gradients before they are sent, by `strategy.grad_compression`."""


class DdpStrategy(DataParallelStrategy):
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
        super().__init__(config, communicator=communicator, plan=plan)
        device = communicator.device
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # `prepare_forward` sets it, as for every strategy
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, comm_hook=_HOOKS[config.strategy.grad_compression]
                )
            ],
        )
        counted = self._accelerator.process_index, self._accelerator.num_processes
        if counted != (communicator.rank, communicator.world_size):
            raise LaunchError(
                f"launch: this is rank {communicator.rank} of {communicator.world_size} and Accelerate takes it for"
                f" rank {counted[0]} of {counted[1]}; start with the files of launch/accelerate or with torchrun"
            )
        self.module = module.to(device).to(memory_format=torch.channels_last)
        prepare_module(module, config, device)
        self._optimizer = make_optimizer(trained_parameters(module))
        self._replica: nn.Module = self._accelerator.prepare_model(self.module)
        # Only now: Accelerate moves the module to its name of the device.
        self._statistics = PerRankBatchNormStats(module, communicator)
        if self._replica is not self.module:
            # As an argument it is deprecated in torch 2.15, and the name that replaces it is unknown to 2.11.
            self._replica.broadcast_buffers = False
            if config.run.profile:
                reduction_follows(module.parameters())
            self._settle_buckets(plan.micro_sizes[0])

    def _settle_buckets(self, micro_size: int) -> None:
        """Makes DDP order its buckets now, by one pass that changes nothing else.

        It does so after its first backward pass, by the order in which the gradients arrived. The place of a gradient
        in its bucket decides the order in which ranks are added up: without this, the first step after a resume would
        be rounded in another way than the same step of a run that was not interrupted.
        """
        images = torch.zeros(micro_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=self._communicator.device)
        parameter = next(self.module.parameters())
        self._accelerator.backward(self._replica(images.to(parameter.dtype)).sum())
        self._optimizer.zero_grad()
        self._statistics.restore()

    def _forward(self, images: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        with nullcontext() if is_last else self._accelerator.no_sync(self._replica):
            return self._replica(images)

    def _backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss / self._micro_batches)

    def _step(self, lr: float) -> torch.Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        clipped_step(self._optimizer, lr, self._max_grad_norm, norm)
        return norm

    def optimizer_state_dict(self) -> Tensors:
        return optimizer_state_dict(self.module, self._optimizer)

    def _whole_model(self) -> Tensors:
        return self.module.state_dict()

    def load_model(self, model: Tensors) -> None:
        self.module.load_state_dict(model)

    def _load_optimizer(self, optimizer: Tensors) -> None:
        load_optimizer_state_dict(self.module, self._optimizer, optimizer)
