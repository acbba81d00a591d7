"""Moves tensors between the host and a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU through page-locked memory, on the current stream and without waiting."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, in their order, on the CPU: those of a device as row-major copies, in one transfer, for which it
    waits; those of the CPU as they are."""
    distant = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "cpu"}
    if not distant:
        return dict(tensors)
    packed = pack(list(distant.values()))
    on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed)
    copies = dict(zip(distant, unpack(on_host, list(distant.values())), strict=True))
    return {name: copies.get(name, tensor) for name, tensor in tensors.items()}


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The values of tensors of any types, row-major, as one uint8 [bytes]; larger types come first, so each value is
    aligned."""
    parts = [tensors[i].detach().contiguous().reshape(-1).view(torch.uint8) for i in _by_size(tensors)]
    return torch.cat(parts)


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What `pack` made of tensors of the types and shapes of `like`, as views of `packed`."""
    order = _by_size(like)
    parts = packed.split([like[i].nbytes for i in order])
    views = {i: part.view(like[i].dtype).view(like[i].shape) for i, part in zip(order, parts, strict=True)}
    return [views[i] for i in range(len(like))]


def _by_size(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The places of the tensors, those of larger types first."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
