"""BatchNorm's running statistics as one flat tensor, so that saving, restoring and reducing them is one operation.

The buffers of other layers may be constants, such as masks of the smallest number, which a mean over passes would
change. They are reduced as what a pass has added to them, which is nothing for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dist_cifar.distributed.collectives import Communicator


class BatchNormStats:
    """The buffers of a module that have the type of its parameters, and the int64 ones.

    From construction on they are views of `values` and `counts`: writing to these changes the module, and loading a
    state dict into the module changes these. Buffers of other types, such as masks, are left alone.

    Make it when the module is on its device for good.
    """

    def __init__(self, module: nn.Module) -> None:
        parameter = next(module.parameters())
        device, dtype = parameter.device, parameter.dtype
        owners = _buffers(module)
        floating = [entry for entry in owners if getattr(entry[1], entry[2]).dtype == dtype]
        floating.sort(key=lambda entry: not isinstance(entry[1], _NormBase))
        whole = [entry for entry in owners if getattr(entry[1], entry[2]).dtype == torch.int64]
        self.names = [name for name, _, _ in floating]
        """Names of the floating-point buffers, in the order of `values`: those of BatchNorm first."""
        self.values = _flatten(floating, device)
        """float32 [n]: running means and variances."""
        self.counts = _flatten(whole, device)
        """int64 [m]: the number of batches that each layer has seen."""
        self.start_values, self.start_counts = self.values.clone(), self.counts.clone()
        """Values and counts at the last `snapshot`."""
        of_norms = sum(getattr(owner, name).numel() for _, owner, name in floating if isinstance(owner, _NormBase))
        self._others = slice(of_norms, None) if of_norms < len(self.values) else None
        self._counters = [
            (owner, getattr(owner, name))
            for _, owner, name in whole
            if isinstance(owner, _NormBase) and owner.momentum is not None and name == "num_batches_tracked"
        ]
        """The layers that use their count for nothing else, each with it."""

    def snapshot(self) -> None:
        """Remembers the statistics as they are now."""
        self.start_values.copy_(self.values)
        self.start_counts.copy_(self.counts)

    def restore(self) -> None:
        """Restores the last snapshot."""
        self.values.copy_(self.start_values)
        self.counts.copy_(self.start_counts)

    def seen(self) -> torch.Tensor:
        """What a pass has made of the values, to be averaged: of other layers than BatchNorm only what it added."""
        return self._added(self.start_values)

    def take(self, mean: torch.Tensor) -> None:
        """Sets the values to the mean of what `seen` returned for the passes since the last snapshot."""
        self.values.copy_(mean)
        self._add(self.values, self.start_values)

    def _added(self, start: torch.Tensor) -> torch.Tensor:
        """A copy of the values, those of other layers than BatchNorm as differences from `start`."""
        values = self.values.clone()
        if self._others is not None:
            before, after = start[self._others], values[self._others]
            after.copy_(torch.where(after == before, 0.0, after - before))
        return values

    def _add(self, values: torch.Tensor, start: torch.Tensor) -> None:
        """Undoes what `_added` did, in place."""
        if self._others is not None:
            values[self._others] += start[self._others]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A `with` block in which layers do not count their batches if they need the count for nothing else: an
        operation less for each."""
        for layer, _ in self._counters:
            layer.num_batches_tracked = None
        try:
            yield
        finally:
            for layer, count in self._counters:
                layer.num_batches_tracked = count

    def restore_where(self, condition: torch.Tensor) -> None:
        """Restores the last snapshot if `condition` (bool []) holds. The device decides: the host waits for nothing."""
        self.values.copy_(torch.where(condition, self.start_values, self.values))
        self.counts.copy_(torch.where(condition, self.start_counts, self.counts))


class PerRankBatchNormStats(BatchNormStats):
    """Per-rank BatchNorm statistics; averaged over ranks when saved."""

    def __init__(self, module: nn.Module, communicator: Communicator) -> None:
        super().__init__(module)
        self._communicator = communicator
        self._initial = self.values.clone()
        """The values at the beginning of the run, which are the same on every rank."""
        shapes = {name: buffer.shape for name, buffer in module.named_buffers()}
        self._shapes = [shapes[name] for name in self.names]

    def averaged(self) -> dict[str, torch.Tensor]:
        """The mean over ranks of each floating-point buffer; this rank's are left as they are. A collective."""
        if not self.names:
            return {}
        mean = self._added(self._initial)
        mean = self._communicator.all_reduce_sum(mean) / self._communicator.world_size
        self._add(mean, self._initial)
        parts = mean.split([shape.numel() for shape in self._shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self._shapes, strict=True)}

    def all_gather(self) -> dict[str, torch.Tensor]:
        """`{"buffers": float32 [ranks, n]}`, or nothing if there are no buffers. A collective."""
        if not self.names:
            return {}
        # Rows of zeros and one sum: each rank's row arrives unchanged, in one collective.
        rows = self.values.new_zeros(self._communicator.world_size, len(self.values))
        rows[self._communicator.rank] = self.values
        return {"buffers": self._communicator.all_reduce_sum(rows)}

    def load_per_rank(self, ranks: dict[str, torch.Tensor]) -> None:
        """Restores this rank's row of what `all_gather` returned, if there were as many ranks."""
        rows = ranks.get("buffers")
        if rows is not None and len(rows) == self._communicator.world_size:
            self.values.copy_(rows[self._communicator.rank])


def _buffers(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Lists (full name, the module that has it, its name there) of every buffer that is saved."""
    saved = module.state_dict()
    return [
        (f"{path}.{name}" if path else name, owner, name)
        for path, owner in module.named_modules()
        for name, _ in owner.named_buffers(recurse=False)
        if (f"{path}.{name}" if path else name) in saved
    ]


def _flatten(buffers: list[tuple[str, nn.Module, str]], device: torch.device) -> torch.Tensor:
    """Copies these buffers into one tensor and makes them views of it."""
    if not buffers:
        return torch.empty(0, device=device)
    tensors = [getattr(owner, name) for _, owner, name in buffers]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for (_, owner, name), tensor, part in zip(
        buffers, tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        setattr(owner, name, part.view_as(tensor))
    return flat
