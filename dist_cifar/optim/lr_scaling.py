"""How the learning rate follows the global batch."""

from __future__ import annotations

import math

from dist_cifar.config import OptimizerConfig

_LINEAR = ("sgd", "muon")
"""The optimizers whose rule is linear; that of others is the square root."""


def scaled_lr(optimizer: OptimizerConfig, global_size: int) -> tuple[float, str]:
    """The full learning rate for a global batch, and a line that says where it comes from.

    Square root for Adam: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022.
    Linear: Goyal et al., "Accurate, large minibatch SGD", 2017.
    """
    chosen, why = optimizer.lr_rule, ""
    if chosen == "auto":
        chosen, why = "linear" if optimizer.name in _LINEAR else "sqrt", f" for {optimizer.name}"
    ratio = global_size / optimizer.lr_base_batch
    factor = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[chosen]
    lr = optimizer.lr * factor
    rule = {
        "sqrt": f"sqrt({global_size}/{optimizer.lr_base_batch})",
        "linear": f"{global_size}/{optimizer.lr_base_batch}",
        "none": "1",
    }[chosen]
    return lr, f"lr {lr:.6g} = {optimizer.lr:g} x {rule} (rule {chosen}{why}, global batch {global_size})"
