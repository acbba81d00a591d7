"""Strategy `deepspeed`: DeepSpeed's engine with ZeRO stage 0, 1, 2 or 3.

Contract: `strategy.zero_stage` says what is cut among ranks instead of kept whole by each: 0 nothing, 1 the state of
the optimizer, 2 the gradients too, 3 the parameters too. Otherwise as `ddp`: gradients are averaged over ranks, each
rank normalises its own micro-batch.

The engine is called directly and not through Accelerate, whose plugin needs another package, takes each CPU process for
rank 0 of 1, and clips at 1.0 unless told. Clipping is the optimizer's here, not the engine's: so its rule is that of
every strategy, for every stage, and a step whose norm is not finite changes nothing on any rank. No scheduler is given
to the engine. A checkpoint holds whole tensors, so any number of ranks and any strategy can resume from it; they
are taken apart and put together by DeepSpeed's documented functions (`deepspeed.utils.safe_*`).

Weights stay in the row-major layout, as the engine wants them. Source: Rajbhandari et al., "ZeRO", 2020.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import LaunchError
from dist_cifar.optim.base import (
    Optimizer,
    OptimizerFactory,
    is_per_element,
    load_optimizer_state_dict,
    optimizer_state_dict,
    trained_parameters,
)
from dist_cifar.optim.clipping import clip_by_norm, set_lr, sharded_norm
from dist_cifar.strategy import deepspeed_private
from dist_cifar.strategy.base import DataParallelStrategy, Tensors
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats
from dist_cifar.strategy.compute import prepare_module


class DeepSpeedStrategy(DataParallelStrategy):
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
        """`module` is moved to the communicator's device. Raises `LaunchError` if DeepSpeed is not installed."""
        super().__init__(config, communicator=communicator, plan=plan)
        communicator.require_process_group()
        self._stage = config.strategy.zero_stage
        deepspeed = _import_deepspeed(self._device)
        self._utils, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self.module = module.to(self._device)
        prepare_module(module, config, self._device)
        self._optimizer = make_optimizer(trained_parameters(module))
        self._clipping = _ClippingOptimizer(self._optimizer, self._max_grad_norm, is_sharded=self._stage > 0)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._clipping,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": plan.micro_sizes[0],
                "gradient_accumulation_steps": plan.micro_batches,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": self._stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        self._statistics = PerRankBatchNormStats(module, communicator)
        self._flat = deepspeed_private.flat_parts(self._engine, stage=self._stage)
        for part in self._flat:
            self._optimizer.state[part] = self._optimizer.new_state(part)
        deepspeed_private.link_optimizer_state(self._engine, stage=self._stage)

    def _forward(self, images: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(images.contiguous(memory_format=torch.channels_last))

    def _backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)  # which divides it by the number of micro-batches

    def _step(self, lr: float) -> torch.Tensor:
        set_lr(self._optimizer, lr)
        # The engine does not call the optimizer where it has found out by itself that the gradient is not finite.
        self._clipping.norm = torch.full((), float("nan"), device=self._device)
        self._engine.step()
        return self._clipping.norm

    def optimizer_state_dict(self) -> Tensors:
        if self._stage == 0:
            return optimizer_state_dict(self.module, self._optimizer)
        flat = self._flat[0]
        state = self._optimizer.state[flat]
        tensors: Tensors = {}
        for name, parameter in trained_parameters(self.module):
            for key, value in state.items():
                cut = is_per_element(value, flat)
                tensors[f"{name}.{key}"] = self._utils.safe_get_full_optimizer_state(parameter, key) if cut else value
        return tensors

    def _whole_model(self) -> Tensors:
        state = self.module.state_dict()
        if self._stage == 3:
            state |= {name: self._whole(parameter) for name, parameter in self.module.named_parameters()}
        return state

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The value of a parameter of ZeRO stage 3, whose optimizer does not hold those that are not trained."""
        if parameter.requires_grad:
            whole: torch.Tensor = self._utils.safe_get_full_fp32_param(parameter)
            return whole
        with self._gathered(parameter):
            return parameter.detach().clone()

    def load_model(self, model: Tensors) -> None:
        for name, buffer in self.module.named_buffers():
            if name in model:
                buffer.copy_(model[name])
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self._set(parameter, None, model[name])
            else:
                with self._gathered(parameter, modifier_rank=0, enabled=self._stage == 3), torch.no_grad():
                    parameter.copy_(model[name])

    def _load_optimizer(self, optimizer: Tensors) -> None:
        if self._stage == 0:
            load_optimizer_state_dict(self.module, self._optimizer, optimizer)
        elif optimizer:
            for name, parameter in trained_parameters(self.module):
                for part in self._flat:
                    for key, value in self._optimizer.state[part].items():
                        if is_per_element(value, part):
                            self._set(parameter, key, optimizer[f"{name}.{key}"])
                        else:  # the same for all parameters
                            value.copy_(optimizer[f"{name}.{key}"])

    def _set(self, parameter: Any, key: str | None, whole: torch.Tensor) -> None:
        """Gives this rank its part of the parameter's value, or of an entry of the optimizer's state."""
        whole = whole.to(self._device)
        if self._stage < 3:
            if key is None:
                parameter.data.copy_(whole)
                self._utils.safe_set_full_fp32_param(parameter, whole)  # in stage 0 there is no other copy
            else:
                self._utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # The function for whole tensors does not know of the padding with which a part may end.
        local = deepspeed_private.local_part(parameter)
        padded = whole.new_zeros(local.numel() * self._communicator.world_size)
        padded[: whole.numel()] = whole.flatten()
        part = padded.narrow(0, self._communicator.rank * local.numel(), local.numel())
        if key is None:
            local.copy_(part)
            self._utils.safe_set_local_fp32_param(parameter, part)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, part, key)


class _ClippingOptimizer(torch.optim.Optimizer):
    """Makes an optimizer one of torch's class, as the engine wants it, that clips before it steps: by the norm of the
    whole gradient, of which it may see a part."""

    norm: torch.Tensor
    """The norm of the last step's gradient before clipping, []."""

    def __init__(self, optimizer: Optimizer, max_grad_norm: float | None, *, is_sharded: bool) -> None:
        super().__init__(optimizer.param_groups, {})
        self._optimizer, self._max_grad_norm, self._is_sharded = optimizer, max_grad_norm, is_sharded
        self._share()

    def _share(self) -> None:
        """The engine puts its flat parts into the groups of this object, and looks for the state here."""
        self._optimizer.param_groups, self._optimizer.state = self.param_groups, self.state

    def step(self, closure: Any = None) -> Any:
        self._share()
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        if self._is_sharded:
            self.norm = sharded_norm(gradients, gradients[0].device)
        else:
            self.norm = nn.utils.get_total_norm(gradients)
        clip_by_norm(self._optimizer, self._max_grad_norm, self.norm)
        self._optimizer.step()


def _import_deepspeed(device: torch.device) -> Any:
    """The package, kept from compiling anything."""
    deepspeed_private.quiet_logger()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise LaunchError(
            f"strategy.name=deepspeed: DeepSpeed cannot be imported ({error}); install it:"
            " DS_BUILD_OPS=0 pip install -e '.[deepspeed]'"
        ) from None
    deepspeed_private.disable_shm_all_reduce(deepspeed)
    return deepspeed
