"""What of DeepSpeed is not documented and is used all the same, in one place.

Contract: holds for deepspeed 0.19, to which pyproject.toml binds the extra `deepspeed`. No other module of the package
touches an attribute of DeepSpeed that its documentation does not name. Before that bound is moved,
tests/strategy/test_deepspeed_private.py has to pass: it checks what each of these attributes means.
"""

from __future__ import annotations

import logging
from typing import Any

import torch


def quiet_logger() -> None:
    """Keeps DeepSpeed from warning of optimizers that it does not know, and of what it would compile."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def disable_shm_all_reduce(deepspeed: Any) -> None:
    """Keeps DeepSpeed from its own all-reduce in shared memory: compiled on first use, it costs half a minute at the
    start, and needs a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def flat_parts(engine: Any, *, stage: int) -> list[torch.Tensor]:
    """The flat tensors that hold this rank's part of all parameters, which are what the optimizer steps."""
    if stage == 0:
        return []
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def link_optimizer_state(engine: Any, *, stage: int) -> None:
    """Has the engine find the optimizer's state, which it expects to exist only after the first step."""
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def local_part(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter of ZeRO stage 3, flat, with the padding with which it may end."""
    return parameter.ds_tensor.data
