"""Strategy `fsdp`: torch's fully sharded data parallelism (`fully_shard`, FSDP2).

Contract: parameters, gradients and the optimizer's state are cut along their first dimension and every rank keeps a
part; the parameters of a residual block are gathered for its forward and backward pass alone. Otherwise as `ddp`:
gradients are averaged over ranks, each rank normalises its own micro-batch. The optimizer steps the parts, on every
rank at the same learning rate, after clipping by the norm of the whole gradient.

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
from dist_cifar.optim.base import OptimizerFactory, is_per_element
from dist_cifar.optim.clipping import clipped_step, sharded_norm
from dist_cifar.strategy.base import DataParallelStrategy, Tensors
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats
from dist_cifar.strategy.compute import prepare_module


class FsdpStrategy(DataParallelStrategy):
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
        """`module` is moved to the communicator's device and its parameters become sharded."""
        super().__init__(config, communicator=communicator, plan=plan)
        communicator.require_process_group()
        self.module = module.to(self._device)  # `fully_shard` makes it one of its own class
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
        self._trained = {name: part for name, part in self._parts.items() if self._parameters[name].requires_grad}
        # Empty parts too, by whose names rules go: they get no gradient, and so are not stepped.
        self._optimizer = make_optimizer(self._trained.items())

    def _forward(self, images: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        self.module.set_requires_gradient_sync(is_last)
        return self.module(images.contiguous(memory_format=torch.channels_last))

    def _backward(self, loss: torch.Tensor) -> None:
        (loss / self._micro_batches).backward()

    def _step(self, lr: float) -> torch.Tensor:
        gradients = []
        for name, part in self._trained.items():
            if part.numel():
                part.grad = self._parameters[name].grad.to_local()
                gradients.append(part.grad)
            self._parameters[name].grad = None
        norm = sharded_norm(gradients, self._device)
        clipped_step(self._optimizer, lr, self._max_grad_norm, norm)
        return norm

    def optimizer_state_dict(self) -> Tensors:
        tensors: Tensors = {}
        if not self._optimizer.state:
            return tensors
        stepped = next(iter(self._optimizer.state.values()))
        for name, part in self._trained.items():
            parameter = self._parameters[name]
            # An empty part, which the optimizer does not step, has empty moments.
            state = self._optimizer.state.get(part) or self._optimizer.new_state(part)
            for key, value in state.items():
                cut = is_per_element(value, part)
                tensors[f"{name}.{key}"] = self._like(parameter, value).full_tensor() if cut else stepped[key]
        return tensors

    def _whole_model(self) -> Tensors:
        state = self.module.state_dict()
        return state | {name: tensor.full_tensor() for name, tensor in state.items() if isinstance(tensor, DTensor)}

    def load_model(self, model: Tensors) -> None:
        for name, tensor in self.module.state_dict().items():
            if isinstance(tensor, DTensor):
                self._parts[name].copy_(self._part(tensor, model[name]))
            else:
                tensor.copy_(model[name])

    def _load_optimizer(self, optimizer: Tensors) -> None:
        for name, part in self._trained.items():
            parameter = self._parameters[name]
            state = self._optimizer.new_state(part)
            if part.numel() and any(f"{name}.{key}" in optimizer for key in state):
                for key, value in state.items():
                    whole = optimizer[f"{name}.{key}"]
                    value.copy_(self._part(parameter, whole) if is_per_element(value, part) else whole)
                self._optimizer.state[part] = state

    def _part(self, like: DTensor, whole: torch.Tensor) -> torch.Tensor:
        """Cuts a tensor that all ranks hold as the parameter `like` is; returns this rank's part."""
        return distribute_tensor(
            whole.to(self._device), like.device_mesh, like.placements, src_data_rank=None
        ).to_local()

    def _like(self, parameter: DTensor, part: torch.Tensor) -> DTensor:
        """Returns the sharded tensor, cut as `parameter`, of which this rank holds `part`."""
        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
