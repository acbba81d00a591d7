"""How a module computes: in bf16 or fp32, as it is, with faster layers on a CPU, or compiled.

Contract: `choose_precision` measures what `compute.precision=auto` stands for on this machine; `prepare_forward` makes
a module compute as a config says. Weights and gradients are float32 either way, logits too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable

import torch
from torch import nn

from dist_cifar.config import ComputeConfig, Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.ops.fused_batchnorm import fuse_batchnorm_relu, is_single_threaded, warm_up
from dist_cifar.ops.gemm_conv import replace_small_convs

logger = logging.getLogger(__name__)

_PROBE_SHAPE = (16, 64, 32, 32)
"""The input of the layer that is measured: images, channels, height, width; that of a ResNet-18's first stage."""
_PROBE_REPEATS = 5
_PROBE_SECONDS = 0.3
"""The time after which no other repeat is begun, for each precision."""
_MUST_SAVE = 0.9
"""bf16 rounds more coarsely: it has to take less than this share of the time of fp32."""


def choose_precision(device: torch.device) -> tuple[str, str]:
    """Chooses `bf16` or `fp32` by timing one convolution, forward and backward, in both; returns a line on it too."""
    seconds = {name: _layer_seconds(name, device) for name in ("fp32", "bf16")}
    chosen = "bf16" if seconds["bf16"] < _MUST_SAVE * seconds["fp32"] else "fp32"
    return chosen, (
        f"precision  {chosen}: a convolution takes {seconds['fp32'] * 1e3:.2f} ms in fp32,"
        f" {seconds['bf16'] * 1e3:.2f} ms in bf16"
    )


def resolve_precision(
    config: Config, previous_config: Callable[[], Config | None], communicator: Communicator
) -> Config:
    """Returns `config` with `compute.precision=auto` resolved: to the precision of `previous_config`, with which the
    run was started, or else to what is faster here. A collective."""
    if config.compute.precision != "auto":
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


def prepare_forward(
    module: nn.Module, config: ComputeConfig, device: torch.device, *, auto_compile: bool, bitwise: bool
) -> None:
    """Sets how `module` computes in training. Call it once, before the module is wrapped.

    `auto_compile` and `bitwise` are properties of the strategy: see `dist_cifar.strategy.StrategyProperties`.
    """
    set_precision(module, config.precision, device)
    if compiles(config, device, auto_compile=auto_compile):
        if bitwise:
            torch._inductor.config.deterministic = True
        module.compile()
    elif device.type == "cpu":
        replace_small_convs(module)
        fuse_batchnorm_relu(module)


def warm_up_kernels(config: ComputeConfig, device: torch.device, *, auto_compile: bool) -> None:
    """Calls what numba compiles for a module that `prepare_forward` has prepared with these arguments."""
    if device.type == "cpu" and is_single_threaded() and not compiles(config, device, auto_compile=auto_compile):
        warm_up(torch.bfloat16 if config.precision == "bf16" else torch.float32)


def set_precision(module: nn.Module, precision: str, device: torch.device) -> None:
    """Makes the forward pass of `module` compute in `precision`."""
    assert precision in ("bf16", "fp32")
    if precision == "bf16":
        in_bf16 = torch.autocast(device.type, torch.bfloat16)(module.forward)
        module.forward = lambda images: in_bf16(images).float()


def compiles(config: ComputeConfig, device: torch.device, *, auto_compile: bool) -> bool:
    """Whether the module is compiled.

    With `auto` it is not on CPUs, where that gains too little for what the start then takes, nor where the strategy
    promises the same bits everywhere (`auto_compile` is false): they would depend on the compiler. Raises `ConfigError`
    for `on` where torch would find no compiler.
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


def _layer_seconds(precision: str, device: torch.device) -> float:
    """Measures the shortest of some forward and backward passes of one convolution."""
    channels = _PROBE_SHAPE[1]
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(device).to(memory_format=torch.channels_last)
    images = torch.zeros(_PROBE_SHAPE, device=device).to(memory_format=torch.channels_last).requires_grad_()
    shortest, began = float("inf"), time.perf_counter()
    for repeat in range(1 + _PROBE_REPEATS):
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = layer(images)
        out.sum().backward()
        _wait(device)
        if repeat:  # the first one chooses kernels
            shortest = min(shortest, time.perf_counter() - start)
            if time.perf_counter() - began > _PROBE_SECONDS:
                break
    return shortest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
