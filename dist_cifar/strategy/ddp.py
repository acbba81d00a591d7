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
from torch import nn

from dist_cifar.config import Config
from dist_cifar.distributed.communicator import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.schedule import BatchPlan
from dist_cifar.strategy import Tensors
from dist_cifar.strategy.adam import adam_step, adam_tensors, build_adam, load_adam
from dist_cifar.strategy.statistics import RunningStatistics


class DdpStrategy:
    """See `dist_cifar.strategy.Strategy`."""

    def __init__(self, module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        """`module` is moved to the communicator's device in channels-last."""
        device = communicator.device
        self._communicator = communicator
        self._clip_norm = config.optimizer.clip_norm
        self._micro_batches, self._pass = plan.micro_batches, 0
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision={"fp32": "no", "bf16": "bf16"}[config.train.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        counted = self._accelerator.process_index, self._accelerator.num_processes
        if counted != (communicator.rank, communicator.world_size):
            raise LaunchError(
                f"launch: this is rank {communicator.rank} of {communicator.world_size} and Accelerate takes it for"
                f" rank {counted[0]} of {counted[1]}; start with the files of launch/accelerate or with torchrun"
            )
        self.module = module.to(device, memory_format=torch.channels_last)
        self._optimizer = build_adam(module, config.optimizer)
        self._replica: nn.Module = self._accelerator.prepare_model(self.module)
        self._statistics = RunningStatistics(module)  # only now: Accelerate moves the module to its name of the device
        if self._replica is not self.module:
            # As an argument it is deprecated in torch 2.15, and the name that replaces it is unknown to 2.11.
            self._replica.broadcast_buffers = False
            self._settle_buckets(plan.micro_size)

    def _settle_buckets(self, micro_size: int) -> None:
        """Makes DDP order its buckets now, by one pass that changes nothing else.

        It does so after its first backward pass, by the order in which the gradients arrived. The place of a gradient
        in its bucket decides the order in which ranks are added up: without this, the first step after a resume would
        be rounded in another way than the same step of a run that was not interrupted.
        """
        images = torch.zeros(micro_size, 3, 32, 32, device=self._communicator.device)
        parameter = next(self.module.parameters())
        self._accelerator.backward(self._replica(images.to(parameter.dtype)).sum())
        self._optimizer.zero_grad()
        self._statistics.rewind()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._pass == 0:
            self._statistics.mark()
        is_last = self._pass == self._micro_batches - 1
        with nullcontext() if is_last else self._accelerator.no_sync(self._replica):
            return self._replica(images)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss / self._micro_batches)
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == self._micro_batches
        self._pass = 0
        parameters = list(self.module.parameters())
        if self._clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = self._accelerator.clip_grad_norm_(parameters, self._clip_norm)
        adam_step(self._optimizer, lr, norm)
        self._statistics.rewind_where(~norm.isfinite())
        return norm

    def average_buffers(self) -> None:
        self._statistics.values.copy_(self._averaged_statistics())

    def model_tensors(self) -> Tensors:
        state = self.module.state_dict()
        parts = self._averaged_statistics().split([state[name].numel() for name in self._statistics.names])
        return state | {
            name: part.view_as(state[name]) for name, part in zip(self._statistics.names, parts, strict=True)
        }

    def rank_tensors(self) -> Tensors:
        # Rows of zeros and one sum: each rank's row arrives unchanged, in one collective.
        values = self._statistics.values
        rows = values.new_zeros(self._communicator.world_size, len(values))
        rows[self._communicator.rank] = values
        return {"buffers": self._communicator.sum(rows)} if len(values) else {}

    def optimizer_tensors(self) -> Tensors:
        return adam_tensors(self.module, self._optimizer)

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        self.module.load_state_dict(model)
        rows = ranks.get("buffers")
        if rows is not None and len(rows) == self._communicator.world_size:
            self._statistics.values.copy_(rows[self._communicator.rank])
        load_adam(self.module, self._optimizer, optimizer)

    def _averaged_statistics(self) -> torch.Tensor:
        values = self._statistics.values
        return self._communicator.sum(values.clone()) / self._communicator.world_size if len(values) else values
