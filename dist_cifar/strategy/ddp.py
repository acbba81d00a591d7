"""Strategy `ddp`: Accelerate's DistributedDataParallel.

Contract: gradients are averaged over ranks, as views of their buckets, and no buffers are broadcast; each rank
normalises its own micro-batch, and BatchNorm's running statistics are averaged when they are looked at. With one rank
the model is not wrapped. Only the model is given to Accelerate: it would step a prepared ReduceLROnPlateau once for
each rank, and shard again what our sampler has sharded.

DDP's `static_graph` is not used: it fails when the first pass accumulates, orders its buckets at another time (see
`_settle_buckets`) and gains nothing for a model without unused parameters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from dist_cifar.config import OptimizerConfig
from dist_cifar.distributed.communicator import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.schedule import BatchPlan

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of one parameter."""


class DdpStrategy:
    """See `dist_cifar.strategy.Strategy`."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        communicator: Communicator,
        precision: str,
        plan: BatchPlan,
    ) -> None:
        """`module` is moved to the communicator's device in channels-last; `precision` is `fp32` or `bf16`."""
        device = communicator.device
        self._communicator = communicator
        self._clip_norm = config.clip_norm
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        if self._accelerator.num_processes != communicator.world_size:
            raise LaunchError(
                f"launch: the job has {communicator.world_size} ranks and Accelerate counts"
                f" {self._accelerator.num_processes}; start with the files of launch/accelerate or with torchrun"
            )
        self.module = module.to(device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.Adam(
            self.module.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._replica: nn.Module = self._accelerator.prepare_model(self.module)
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
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        images = torch.zeros(micro_size, 3, 32, 32, device=self._communicator.device)
        parameter = next(self.module.parameters())
        self._accelerator.backward(self._replica(images.to(parameter.dtype)).sum())
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._replica(images)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self._replica)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self, lr: float) -> torch.Tensor:
        parameters = list(self.module.parameters())
        if self._clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = self._accelerator.clip_grad_norm_(parameters, self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def average_buffers(self) -> None:
        averaged = self._averaged_buffers()
        with torch.no_grad():
            for name, buffer in self._float_buffers().items():
                buffer.copy_(averaged[name])

    def model_tensors(self) -> dict[str, torch.Tensor]:
        state = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        return state | {name: tensor.cpu() for name, tensor in self._averaged_buffers().items()}

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        # Rows of zeros and one sum: each rank's row arrives unchanged, in one collective.
        names, flat = self._flat_buffers()
        rows = torch.zeros(self._communicator.world_size, flat.numel(), device=flat.device)
        rows[self._communicator.rank] = flat
        return {"buffers": self._communicator.sum(rows).cpu()} if names else {}

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return {
            f"{names[parameter]}.{moment}": moments[moment].detach().cpu()
            for parameter, moments in self._optimizer.state.items()
            for moment in _MOMENTS
        }

    def load(
        self,
        model: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        ranks: dict[str, torch.Tensor],
    ) -> None:
        self.module.load_state_dict(model)
        rows = ranks.get("buffers")
        if rows is not None and len(rows) == self._communicator.world_size:
            with torch.no_grad():
                sizes = [buffer.numel() for buffer in self._float_buffers().values()]
                parts = rows[self._communicator.rank].split(sizes)
                for buffer, part in zip(self._float_buffers().values(), parts, strict=True):
                    buffer.copy_(part.view_as(buffer))
        for name, parameter in self.module.named_parameters():
            moments = {moment: optimizer.get(f"{name}.{moment}") for moment in _MOMENTS}
            if moments["step"] is not None:
                # Like the parameter in memory format and device; the step count stays where fused Adam keeps it.
                self._optimizer.state[parameter] = {
                    "step": moments["step"].to(parameter.device),
                    "exp_avg": torch.empty_like(parameter).copy_(moments["exp_avg"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(moments["exp_avg_sq"]),
                }

    def _float_buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer for name, buffer in self.module.named_buffers() if buffer.is_floating_point()}

    def _flat_buffers(self) -> tuple[list[str], torch.Tensor]:
        buffers = self._float_buffers()
        flat = [buffer.detach().reshape(-1) for buffer in buffers.values()]
        return list(buffers), torch.cat(flat) if flat else torch.empty(0)

    def _averaged_buffers(self) -> dict[str, torch.Tensor]:
        names, flat = self._flat_buffers()
        if not names:
            return {}
        mean = self._communicator.sum(flat) / self._communicator.world_size
        buffers = self._float_buffers()
        parts = mean.split([buffers[name].numel() for name in names])
        return {name: part.view_as(buffers[name]) for name, part in zip(names, parts, strict=True)}
