"""Strategy `fsdp`: torch's fully sharded data parallelism (`fully_shard`, FSDP2).

Contract: parameters, gradients and Adam's state are cut along their first dimension and every rank keeps a part; the
parameters of a residual block are gathered for its forward and backward pass alone. Otherwise as `ddp`: gradients are
averaged over ranks, each rank normalises its own micro-batch. Adam runs on the parts, on every rank at the same
learning rate, after clipping by the norm of the whole gradient.

Weights stay in the row-major layout: FSDP2 takes no other. Source: Zhao et al., "PyTorch FSDP", 2023, and torch's
documentation of `fully_shard`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.optim.adam import MOMENTS, adam_step, build_adam, sharded_norm
from dist_cifar.strategy.base import Tensors, prepare_module
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats


class FsdpStrategy:
    """See `dist_cifar.strategy.Strategy`."""

    def __init__(self, module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        """`module` is moved to the communicator's device and its parameters become sharded."""
        communicator.require_process_group()
        self._device, self._clip_norm = communicator.device, config.optimizer.max_grad_norm
        self._micro_batches, self._pass = plan.micro_batches, 0
        self.module: Any = module.to(self._device)  # `fully_shard` makes it one of its own class
        prepare_module(module, config, self._device)
        mesh = init_device_mesh(self._device.type, (communicator.world_size,))
        for stage in module.children():
            if isinstance(stage, nn.Sequential):
                for block in stage:
                    fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self._statistics = PerRankBatchNormStats(module, communicator)
        # DTensors, and so their gradients.
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        # Plain tensors with the memory of this rank's parts: fused Adam is not for DTensors on every device.
        self._parts = {name: parameter.to_local().detach() for name, parameter in self._parameters.items()}
        self._optimizer = build_adam((part for part in self._parts.values() if part.numel()), config.optimizer)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._pass == 0:
            self._statistics.snapshot()
        is_last = self._pass == self._micro_batches - 1
        self.module.set_requires_gradient_sync(is_last)
        return self.module(images.contiguous(memory_format=torch.channels_last))

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._micro_batches).backward()
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == self._micro_batches
        self._pass = 0
        gradients = []
        for name, part in self._parts.items():
            if part.numel():
                part.grad = self._parameters[name].grad.to_local()
                gradients.append(part.grad)
            self._parameters[name].grad = None
        norm = sharded_norm(gradients, self._device)
        adam_step(self._optimizer, lr, self._clip_norm, norm)
        self._statistics.restore_where(~norm.isfinite())
        return norm

    def model_state_dict(self) -> Tensors:
        state = self.module.state_dict()
        state |= {name: tensor.full_tensor() for name, tensor in state.items() if isinstance(tensor, DTensor)}
        return state | self._statistics.averaged()

    def per_rank_state(self) -> Tensors:
        return self._statistics.all_gather()

    def optimizer_state_dict(self) -> Tensors:
        tensors: Tensors = {}
        if not self._optimizer.state:
            return tensors
        step = next(iter(self._optimizer.state.values()))["step"]
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(self._parts[name], {})
            tensors[f"{name}.step"] = step
            for moment in MOMENTS[1:]:
                part = moments.get(moment, self._parts[name])  # an empty part is its own moments
                tensors[f"{name}.{moment}"] = self._like(parameter, part).full_tensor()
        return tensors

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        for name, tensor in self.module.state_dict().items():
            if isinstance(tensor, DTensor):
                self._parts[name].copy_(self._part(tensor, model[name]))
            else:
                tensor.copy_(model[name])
        self._statistics.load_per_rank(ranks)
        for name, parameter in self._parameters.items():
            part = self._parts[name]
            if f"{name}.step" in optimizer and part.numel():
                self._optimizer.state[part] = {"step": optimizer[f"{name}.step"].to(self._device, copy=True)} | {
                    # Like the part in its layout too: fused Adam takes that for granted.
                    moment: torch.empty_like(part).copy_(self._part(parameter, optimizer[f"{name}.{moment}"]))
                    for moment in MOMENTS[1:]
                }

    def _part(self, like: DTensor, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that all ranks hold, cut as the parameter `like`."""
        return distribute_tensor(
            whole.to(self._device), like.device_mesh, like.placements, src_data_rank=None
        ).to_local()

    def _like(self, parameter: DTensor, part: torch.Tensor) -> DTensor:
        """The tensor cut as `parameter` of which this rank holds `part`."""
        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
