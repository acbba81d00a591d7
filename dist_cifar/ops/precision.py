"""How a module computes: in bf16 or fp32, as it is, with faster layers on a CPU, or compiled.

Contract: `choose_precision` says what `compute.precision=auto` stands for on this machine; `prepare_forward` makes
a module compute as a config says. Weights and gradients are float32 either way, logits too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_cifar.config import ComputeConfig, Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.ops import fused_batchnorm, fused_gelu
from dist_cifar.ops.fused_batchnorm import fuse_batchnorm_relu, is_single_threaded
from dist_cifar.ops.fused_gelu import fuse_gelu
from dist_cifar.ops.gemm_conv import replace_small_convs

logger = logging.getLogger(__name__)


def choose_precision(device: torch.device) -> tuple[str, str]:
    """Chooses `bf16` where `device` computes in it by instructions of its own, `fp32` elsewhere; returns a line too.

    What a processor can do is the same at every start. A measurement is not: on a busy machine it would choose the bits
    of the run by chance.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # avx512_bf16 and amx_bf16 on x86, bf16 and sve_bf16 on Arm
        has_bf16 = any(present is True for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)
    chosen = "bf16" if has_bf16 else "fp32"
    kind = "GPU" if device.type == "cuda" else "processor"
    return chosen, f"precision  {chosen}: this {kind} has {'' if has_bf16 else 'no '}bf16 instructions"


def resolve_precision(
    config: Config, previous_config: Callable[[], Config | None], communicator: Communicator
) -> Config:
    """Returns `config` with `compute.precision=auto` resolved: to the precision of `previous_config`, with which the
    run was started, or else to what this machine has. Says that, and where bf16 is going to be slow. A collective."""
    if config.compute.precision != "auto":
        kind = "GPU" if communicator.device.type == "cuda" else "processor"
        if config.compute.precision == "bf16" and choose_precision(communicator.device)[0] == "fp32":
            logger.info(
                f"precision  bf16, which this {kind} emulates slowly; compute.precision=fp32 or auto would be faster"
            )
        return config

    def choose() -> str:
        previous = previous_config()
        if previous is not None:
            return previous.compute.precision
        chosen, line = choose_precision(communicator.device)
        logger.info(line)
        return chosen

    precision = communicator.run_on_rank0(choose)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, precision=precision))


MOST_GRAPHS = 64
"""The graphs that one network may have: images of another size, and parameters that are frozen from some step on, are
another one."""


_compiler_before: dict[tuple[Any, str], Any] = {}
"""The settings of torch's compiler that `prepare_forward` has changed, as they were."""


def _configure(settings: Any, **values: Any) -> None:
    for name, value in values.items():
        _compiler_before.setdefault((settings, name), getattr(settings, name))
        setattr(settings, name, value)


def put_compiler_back() -> None:
    """Sets torch's compiler as it was before `prepare_forward`."""
    while _compiler_before:
        (settings, name), value = _compiler_before.popitem()
        setattr(settings, name, value)


def prepare_forward(
    module: nn.Module, config: ComputeConfig, device: torch.device, *, auto_compile: bool, bitwise: bool
) -> None:
    """Sets how `module` computes in training. Call it once, before the module is wrapped.

    `auto_compile` and `bitwise` are properties of the strategy: see `dist_cifar.strategy.StrategyProperties`.
    """
    set_precision(module, config.precision, device)
    if compiles(config, device, auto_compile=auto_compile):
        if bitwise:
            _configure(torch._inductor.config, deterministic=True)
            # Above its limit of graphs the compiler would silently leave one out, and after a resume another one.
            limit = {"recompile_limit": MOST_GRAPHS, "fail_on_recompile_limit_hit": True, "suppress_errors": False}
            _configure(torch._dynamo.config, **limit)
        module.compile(dynamic=False)  # images of another size are another graph
    elif device.type == "cpu":
        replace_small_convs(module)
        fuse_batchnorm_relu(module)
        fuse_gelu(module)


def warm_up_kernels(module: nn.Module, config: ComputeConfig, device: torch.device, *, auto_compile: bool) -> None:
    """Calls what numba compiles for `module` once `prepare_forward` has prepared it with these arguments."""
    if device.type != "cpu" or compiles(config, device, auto_compile=auto_compile):
        return
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if is_single_threaded():
        fused_batchnorm.warm_up(dtype)
    if fused_gelu.concerns(module):
        fused_gelu.warm_up(dtype)


def set_precision(module: nn.Module, precision: str, device: torch.device) -> None:
    """Makes the forward pass of `module` compute in `precision`, never in TF32, which keeps ten bits of a number."""
    assert precision in ("bf16", "fp32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if precision == "bf16":
        in_bf16 = torch.autocast(device.type, torch.bfloat16)(module.forward)
        module.forward = lambda images: in_bf16(images).float()


def compiles(config: ComputeConfig, device: torch.device, *, auto_compile: bool) -> bool:
    """Whether the module is compiled.

    With `auto` it is not on CPUs, where that gains too little for what the start then takes, nor where the strategy
    does not allow it. Raises `ConfigError` for `on` where torch would find no compiler.
    """
    if config.compile == "auto":
        is_wanted = auto_compile and device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return is_wanted and _missing_compiler(device) is None
    if config.compile == "on" and (missing := _missing_compiler(device)) is not None:
        raise ConfigError(
            f"compute.compile: on was set and this machine has no compiler ({missing}), which torch.compile needs;"
            " install one, or set compute.compile=off"
        )
    return config.compile == "on"


def _missing_compiler(device: torch.device) -> str | None:
    """The program that torch.compile would start and that is not there; None if it is."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    asked = os.environ.get(variable)
    wanted = (asked.split()[0],) if asked and asked.split() else names
    return None if any(shutil.which(name) for name in wanted) else f"{variable}={asked}" if asked else names[0]
