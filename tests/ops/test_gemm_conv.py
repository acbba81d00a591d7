"""Convolutions as products of matrices against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.models import build_model
from dist_cifar.ops import gemm_conv
from dist_cifar.ops.gemm_conv import replace_small_convs

SHAPES = [
    (256, 256, 4, 3, 1, 1),
    (256, 512, 8, 3, 2, 1),
    (256, 512, 8, 1, 2, 0),
    (512, 256, 4, 1, 1, 0),
    (256, 256, 5, 3, 1, 0),
    (256, 256, 2, 3, 1, 2),
    (256, 256, 7, 5, 2, 1),
]
"""Channels in and out, side of the image, of the kernel, stride, padding."""


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the outputs that were computed as products."""
    seen: list[tuple[int, ...]] = []
    apply = gemm_conv._Product.apply

    def counted(*arguments):
        out = apply(*arguments)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(gemm_conv._Product, "apply", counted)
    return seen


def layers(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Conv2d]:
    """Torch's and ours, with the same weights."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=padding, bias=False)
        pair.append(layer.to(memory_format=torch.channels_last))
    replace_small_convs(pair[1])
    return pair


def images(channels: int, side: int, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(3, channels, side, width or side, generator=generator)
    return drawn.to(memory_format=torch.channels_last)


def passes(layer: nn.Module, images: torch.Tensor, *, bf16: bool = False) -> list[torch.Tensor]:
    """The output, and the gradients of the images and of the weights."""
    inputs = images.clone().requires_grad_()
    layer.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = layer(inputs)
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out.detach(), inputs.grad, layer.weight.grad]


@pytest.mark.parametrize(("inputs", "outputs", "side", "kernel", "stride", "padding"), SHAPES)
def test_outputs_and_gradients_are_those_of_torch(products, inputs, outputs, side, kernel, stride, padding):
    torchs, ours = layers(inputs, outputs, kernel, stride, padding)
    expected, found = (passes(layer, images(inputs, side)) for layer in (torchs, ours))
    assert len(products) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        assert one.stride() == other.stride()


def test_an_image_need_not_be_square(products):
    torchs, ours = layers(256, 256, 3, 1, 1)
    expected, found = (passes(layer, images(256, 2, 8)) for layer in (torchs, ours))
    assert products == [(3, 256, 2, 8)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("inputs", "outputs", "side", "kernel", "stride", "padding"), SHAPES)
def test_bf16_is_as_near_to_fp32_as_torchs(inputs, outputs, side, kernel, stride, padding):
    torchs, ours = layers(inputs, outputs, kernel, stride, padding)
    exact = passes(torchs, images(inputs, side))
    torchs_rounded, rounded = (passes(layer, images(inputs, side), bf16=True) for layer in (torchs, ours))
    for whole, other, one in zip(exact, torchs_rounded, rounded, strict=True):
        error, torchs_error = ((tensor.float() - whole).norm() for tensor in (one, other))
        assert error <= 1.05 * torchs_error and error < 0.01 * whole.norm()


def test_the_layout_of_the_weights_does_not_matter():
    _, ours = layers(256, 256, 3, 1, 1)
    expected = passes(ours, images(256, 4))
    ours.to(memory_format=torch.contiguous_format)
    for one, other in zip(passes(ours, images(256, 4)), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(256, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(256, 256, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(256, 256, 3, padding="same", bias=False),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(256, 256, (3, 1), padding=(1, 0), bias=False),
        nn.Conv2d(256, 256, 1, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(products, layer):
    expected = layer(images(layer.in_channels, 4))
    replace_small_convs(layer)
    assert torch.equal(layer(images(layer.in_channels, 4)), expected)
    assert products == []


def test_larger_images_are_left_to_torch(products):
    torchs, ours = layers(256, 256, 3, 1, 1)
    for one, other in zip(passes(ours, images(256, 5)), passes(torchs, images(256, 5)), strict=True):
        assert torch.equal(one, other)
    assert products == []


@pytest.mark.parametrize(("name", "count"), [("resnet18", 5), ("resnet50", 9), ("resnet20", 0)])
def test_the_last_stage_of_the_wide_networks_is_products(products, name, count):
    model = build_model(ModelConfig(name=name), num_classes=10, seed=0)
    names = list(model.state_dict())
    replace_small_convs(model)
    model(images(3, 32)).sum().backward()
    assert len(products) == count
    assert list(model.state_dict()) == names
    assert all(parameter.grad is not None for parameter in model.parameters())
