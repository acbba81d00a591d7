"""Layers that draw random numbers in training and keep every guarantee of the strategies.

Contract: they draw from torch's generators, which the trainer seeds before each forward pass of a network of the user's
own by the seed, the step and the place of the pass in the global batch. So do torch's own layers: `Dropout` is torch's.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import Dropout

__all__ = ["DropPath", "Dropout"]


class DropPath(nn.Module):
    """Stochastic depth: leaves out what a residual block adds, for each image by itself, with probability `p`.

    What stays is divided by 1 - p, so that its mean stays what it is; in evaluation nothing changes. Source: Huang et
    al., "Deep networks with stochastic depth", ECCV 2016.
    """

    def __init__(self, p: float = 0.1) -> None:
        """Raises `ValueError` unless 0 <= p < 1."""
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and less than 1, found {p}")
        self.p = p

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """float [n, ...] to float of the same shape."""
        if not self.training or self.p == 0:
            return branch
        kept = torch.rand(len(branch), *[1] * (branch.dim() - 1), device=branch.device) >= self.p
        return branch * (kept / (1 - self.p)).to(branch.dtype)
