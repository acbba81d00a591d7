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
from dist_cifar.optim.adam import adam_step, adam_tensors, build_adam, load_adam
from dist_cifar.run.step_profiler import reduction_follows
from dist_cifar.strategy.base import Tensors, prepare_module
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats

_HOOKS = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
"""What rounds the gradients before they are sent, by `strategy.grad_compression`."""


class DdpStrategy:
    """See `dist_cifar.strategy.Strategy`."""

    def __init__(self, module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        """`module` is moved to the communicator's device in channels-last."""
        device = communicator.device
        self._communicator = communicator
        self._clip_norm = config.optimizer.max_grad_norm
        self._micro_batches, self._pass = plan.micro_batches, 0
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
        self._optimizer = build_adam(module.parameters(), config.optimizer)
        self._replica: nn.Module = self._accelerator.prepare_model(self.module)
        # Only now: Accelerate moves the module to its name of the device.
        self._statistics = PerRankBatchNormStats(module, communicator)
        if self._replica is not self.module:
            # As an argument it is deprecated in torch 2.15, and the name that replaces it is unknown to 2.11.
            self._replica.broadcast_buffers = False
            if config.run.profile:
                reduction_follows(module.parameters())
            self._settle_buckets(plan.micro_size)

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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._pass == 0:
            self._statistics.snapshot()
        is_last = self._pass == self._micro_batches - 1
        with nullcontext() if is_last else self._accelerator.no_sync(self._replica):
            return self._replica(images)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss / self._micro_batches)
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == self._micro_batches
        self._pass = 0
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        adam_step(self._optimizer, lr, self._clip_norm, norm)
        self._statistics.restore_where(~norm.isfinite())
        return norm

    def model_state_dict(self) -> Tensors:
        return self.module.state_dict() | self._statistics.averaged()

    def per_rank_state(self) -> Tensors:
        return self._statistics.all_gather()

    def optimizer_state_dict(self) -> Tensors:
        return adam_tensors(self.module, self._optimizer)

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        self.module.load_state_dict(model)
        self._statistics.load_per_rank(ranks)
        load_adam(self.module, self._optimizer, optimizer)
