"""Moving tensors to the host in one piece."""

from __future__ import annotations

import pytest
import torch

from dist_cifar.ops import transfer
from dist_cifar.ops.transfer import download, pack, unpack


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 5, 7, 2, generator=generator)
    return {
        "flags": torch.tensor([True, False, True]),
        "half": images[0].bfloat16(),
        "none": images[:0],
        "last": images.contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(images[1].transpose(0, 1)),
        "count": torch.tensor(2**40 + 1),
        "nan": torch.tensor([float("nan"), -0.0]),
    }


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (first, second)]
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(*bits)


def test_what_is_unpacked_is_what_was_packed():
    before = list(tensors().values())
    after = unpack(pack(before), before)
    assert all(same(*pair) for pair in zip(before, after, strict=True))
    assert all(tensor.is_contiguous() and tensor.data_ptr() % tensor.itemsize == 0 for tensor in after)


def test_another_order_is_caught(monkeypatch):
    """The mutant: flags of three bytes before numbers of four."""
    before = list(tensors().values())
    monkeypatch.setattr(transfer, "_by_size", lambda of: list(range(len(of))))
    with pytest.raises(RuntimeError):
        unpack(pack(before), before)


def test_tensors_of_the_cpu_stay_where_they_are():
    before = tensors()
    after = download(before)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_arrive_in_one_transfer(monkeypatch):
    before = tensors()
    calls = []
    monkeypatch.setattr(transfer, "pack", lambda of: calls.append(1) or pack(of))
    after = download({name: tensor.cuda() if name != "half" else tensor for name, tensor in before.items()})
    assert list(after) == list(before) and len(calls) == 1
    assert all(tensor.device.type == "cpu" and same(tensor, before[name]) for name, tensor in after.items())
