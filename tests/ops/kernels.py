"""What the tests of the compiled kernels share."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_cifar.ops import norm_kernels, numba_jit


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return drawn.to(dtype).to(memory_format=torch.channels_last)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def mutate(
    monkeypatch: pytest.MonkeyPatch, user: ModuleType, kernels: tuple[str, ...], mutant: tuple[str, str]
) -> None:
    """Makes `user` call those kernels of `norm_kernels` with the first text of `mutant` replaced by the second."""
    source = inspect.getsource(norm_kernels)
    assert mutant[0] in source
    monkeypatch.setattr(numba_jit, "compiled", numba_jit.inlined)
    namespace: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(*mutant), "mutant", "exec"), namespace)
    for kernel in kernels:
        monkeypatch.setattr(user, kernel, namespace[kernel])
