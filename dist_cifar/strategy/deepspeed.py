"""Strategy `deepspeed`: DeepSpeed's engine with ZeRO stage 0, 1, 2 or 3.

Contract: `strategy.zero_stage` says what is cut among ranks instead of kept whole by each: 0 nothing, 1 Adam's state, 2
the gradients too, 3 the parameters too. Otherwise as `ddp`: gradients are averaged over ranks, each rank normalises its
own micro-batch.

The engine is called directly and not through Accelerate, whose plugin needs another package, takes each CPU process for
rank 0 of 1, and clips at 1.0 unless told. Clipping is the optimizer's here, not the engine's: so its rule is that of
every strategy, for every stage, and a step whose norm is not finite changes nothing on any rank. No scheduler is given
to the engine. A checkpoint holds whole tensors, so any number of ranks and any strategy can go on with it; they are
taken apart and put together by DeepSpeed's documented functions (`deepspeed.utils.safe_*`).

Weights stay in the row-major layout, as the engine wants them. Source: Rajbhandari et al., "ZeRO", 2020.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.optim.adam import MOMENTS, adam_options, adam_tensors, clip, load_adam, set_lr, sharded_norm
from dist_cifar.strategy.base import Tensors, prepare_module
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats


class DeepSpeedStrategy:
    """See `dist_cifar.strategy.Strategy`."""

    def __init__(self, module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        """`module` is moved to the communicator's device. Raises `LaunchError` if DeepSpeed is not installed."""
        communicator.require_process_group()
        self._device, self._stage = communicator.device, config.strategy.zero_stage
        self._rank, self._world_size = communicator.rank, communicator.world_size
        self._micro_batches, self._pass = plan.micro_batches, 0
        deepspeed = _import_deepspeed(self._device)
        self._utils = deepspeed.utils
        self.module = module.to(self._device)
        prepare_module(module, config, self._device)
        self._adam = _ClippingAdam(module.parameters(), fused=True, **adam_options(config.optimizer))
        self._adam.max_grad_norm, self._adam.is_sharded = config.optimizer.max_grad_norm, self._stage > 0
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": plan.micro_size,
                "gradient_accumulation_steps": plan.micro_batches,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": self._stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        self._statistics = PerRankBatchNormStats(module, communicator)
        self._flat = self._flat_parts()
        for part in self._flat:
            self._adam.state[part] = {
                "step": torch.zeros((), device=self._device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
        self._link_moments()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._pass == 0:
            self._statistics.snapshot()
        self._engine.set_gradient_accumulation_boundary(self._pass == self._micro_batches - 1)
        return self._engine(images.contiguous(memory_format=torch.channels_last))

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)  # which divides it by the number of micro-batches
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == self._micro_batches
        self._pass = 0
        set_lr(self._adam, lr)
        # The engine does not call the optimizer where it has found out by itself that the gradient is not finite.
        self._adam.norm = torch.full((), float("nan"), device=self._device)
        self._engine.step()
        norm = self._adam.norm
        self._statistics.restore_where(~norm.isfinite())
        return norm

    def model_state_dict(self) -> Tensors:
        state = self.module.state_dict()
        if self._stage == 3:
            state |= {name: self._utils.safe_get_full_fp32_param(p) for name, p in self.module.named_parameters()}
        return state | self._statistics.averaged()

    def per_rank_state(self) -> Tensors:
        return self._statistics.all_gather()

    def optimizer_state_dict(self) -> Tensors:
        if self._stage == 0:
            return adam_tensors(self.module, self._adam)
        step = self._adam.state[self._flat[0]]["step"]
        tensors: Tensors = {}
        for name, parameter in self.module.named_parameters():
            tensors[f"{name}.step"] = step
            for moment in MOMENTS[1:]:
                tensors[f"{name}.{moment}"] = self._utils.safe_get_full_optimizer_state(parameter, moment)
        return tensors

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        for name, buffer in buffers.items():
            buffer.copy_(model[name])
        self._statistics.load_per_rank(ranks)
        for name, parameter in parameters.items():
            self._set(parameter, None, model[name])
        if self._stage == 0:
            load_adam(self.module, self._adam, optimizer)
        elif optimizer:
            for name, parameter in parameters.items():
                for moment in MOMENTS[1:]:
                    self._set(parameter, moment, optimizer[f"{name}.{moment}"])
            for part in self._flat:
                self._adam.state[part]["step"].copy_(next(optimizer[key] for key in optimizer if key.endswith(".step")))

    def _set(self, parameter: Any, moment: str | None, whole: torch.Tensor) -> None:
        """Gives this rank its part of the parameter's value, or of one of its moments."""
        whole = whole.to(self._device)
        if self._stage < 3:
            if moment is None:
                parameter.data.copy_(whole)
                self._utils.safe_set_full_fp32_param(parameter, whole)  # in stage 0 there is no other copy
            else:
                self._utils.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # The function for whole tensors does not know of the padding with which a part may end.
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * self._world_size)
        padded[: whole.numel()] = whole.flatten()
        part = padded.narrow(0, self._rank * size, size)
        if moment is None:
            parameter.ds_tensor.data.copy_(part)
            self._utils.safe_set_local_fp32_param(parameter, part)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, part, moment)

    def _flat_parts(self) -> list[torch.Tensor]:
        """The flat tensors that hold this rank's part of all parameters, which is what Adam steps."""
        if self._stage == 0:
            return []
        engine = self._engine.optimizer
        return list(engine.fp32_partitioned_groups_flat if self._stage == 3 else engine.single_partition_of_fp32_groups)

    def _link_moments(self) -> None:
        """Tells the engine of moments that it expects to exist only after the first step."""
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


class _ClippingAdam(torch.optim.Adam):
    """Adam that clips by the norm of the whole gradient, of which it may see a part, before it steps."""

    max_grad_norm: float | None = None
    is_sharded = False
    norm: torch.Tensor
    """Of the last step, before clipping, []."""

    def step(self, closure: Any = None) -> Any:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        if self.is_sharded:
            self.norm = sharded_norm(gradients, gradients[0].device)
        else:
            self.norm = nn.utils.get_total_norm(gradients)
        clip(self, self.max_grad_norm, self.norm)
        super().step()


def _import_deepspeed(device: torch.device) -> Any:
    """The package, kept from compiling anything, and from warning of optimizers that it does not know."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise LaunchError(
            f"strategy.name=deepspeed: DeepSpeed cannot be imported ({error}); install it:"
            " DS_BUILD_OPS=0 pip install -e '.[deepspeed]'"
        ) from None
    # Its own all-reduce in shared memory is compiled on first use: half a minute at the start, and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
