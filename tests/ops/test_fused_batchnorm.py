"""The fused BatchNorm, shortcut and ReLU against torch's, in float64."""

from __future__ import annotations

import copy
import math
from itertools import product

import numba
import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.models import build_model
from dist_cifar.ops import fused_batchnorm, norm_kernels
from dist_cifar.ops.fused_batchnorm import fuse_batchnorm_relu, fuse_layer
from tests.ops.kernels import draw, error, mutate

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(33, 16, 8, 8), (6, 64, 4, 4), (3, 5, 7, 2), (4, 3, 1, 1), (1, 2, 3, 130)]
NAMES = ["out", "images", "shortcut", "weight", "bias", "running_mean", "running_var"]
"""Of what a layer computes: the output, four gradients, two buffers."""
CASES = [*product(SHAPES, (True, False))]


@pytest.fixture
def fused(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that the fused layers were given."""
    seen: list[tuple[int, ...]] = []
    original = fused_batchnorm._fused

    def counted(layer, images, shortcut):
        seen.append(tuple(images.shape))
        return original(layer, images, shortcut)

    monkeypatch.setattr(fused_batchnorm, "_fused", counted)
    return seen


class TorchNormReLU(nn.BatchNorm2d):
    """What a fused layer computes, by torch's operations one after the other."""

    def forward(self, images: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        hidden = super().forward(images)
        if shortcut is not None:
            hidden += shortcut
        return torch.relu(hidden)


class Residual(nn.Module):
    """A block of one layer, as `fuse_batchnorm_relu` recognises it."""

    residual_layers = (("conv", "norm"),)

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.downsample = nn.Identity(), norm, nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(images)
        return torch.relu(self.norm(self.conv(images)) + shortcut)


class NormReLU(nn.Module):
    """A norm and a ReLU, as `fuse_batchnorm_relu` recognises them."""

    norm_relu_pairs = (("norm", "relu"),)

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.relu = norm, nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(images))


def make_layer(channels: int) -> TorchNormReLU:
    generator = torch.Generator().manual_seed(0)
    layer = TorchNormReLU(channels)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        tensor.data.normal_(generator=generator)
    return layer


def passes(layer: nn.Module, images: torch.Tensor, shortcut: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """By `NAMES`."""
    images = images.clone().requires_grad_()
    shortcut = shortcut if shortcut is None else shortcut.clone().requires_grad_()
    layer.zero_grad()
    out = layer(images, shortcut)
    out.backward(draw(images.shape, 3, torch.bfloat16).to(out))
    assert int(layer.num_batches_tracked) == 1
    tensors = [out.detach(), images.grad, shortcut if shortcut is None else shortcut.grad, layer.weight.grad]
    tensors += [layer.bias.grad, layer.running_mean, layer.running_var]
    return {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None}


def three(images: torch.Tensor, shortcut: torch.Tensor | None):
    """What torch computes in float64, torch, and the fused layer."""
    layer = make_layer(images.shape[1])
    ours = copy.deepcopy(layer)
    fuse_layer(ours)
    wide = [tensor if tensor is None else tensor.double() for tensor in (images, shortcut)]
    return (
        passes(copy.deepcopy(layer).double(), *wide),
        passes(layer, images, shortcut),
        passes(ours, images, shortcut),
    )


@pytest.mark.parametrize(("shape", "has_shortcut"), CASES)
def test_float32_is_as_near_to_float64_as_rounding_allows(fused, shape, has_shortcut):
    exact, _, found = three(draw(shape, 1, mean=3), draw(shape, 2) if has_shortcut else None)
    assert fused == [shape] and exact.keys() == found.keys() and ("shortcut" in found) == has_shortcut
    for name in exact:
        assert error(found[name], exact[name]) < 2e-6, name
        assert found[name].dim() < 4 or found[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "has_shortcut"), CASES)
def test_bf16_is_rounded_once(fused, shape, has_shortcut):
    """So it is at least as near to the exact result as torch, which rounds after each of three operations."""
    images, shortcut = (draw(shape, seed, torch.bfloat16, mean) for seed, mean in ((1, 3), (2, 0)))
    exact, torchs, found = three(images, shortcut if has_shortcut else None)
    assert fused == [shape]
    assert all(found[name].dtype == torchs[name].dtype for name in torchs)
    for name in exact:
        assert error(found[name], exact[name]) < max(1.02 * error(torchs[name], exact[name]), 1e-6), name
        assert error(found[name], exact[name]) < 3e-3, name
    half_a_unit = exact["out"].abs() * 2.0**-8
    assert ((found["out"].double() - exact["out"]).abs() <= half_a_unit * 1.01 + 1e-6).all()


def test_a_small_variance_beside_a_large_mean(fused):
    images = draw((16, 8, 4, 4), 1) * 1e-2 + 100
    exact, _, found = three(images, None)
    assert error(found["running_var"], exact["running_var"]) < 1e-6
    assert error(found["out"], exact["out"]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(fused, dtype, bad):
    """The step that would use it is left out, so it has to be seen."""
    layer = make_layer(4)
    fuse_layer(layer)
    images = draw((3, 4, 2, 2), 1, dtype)
    images[1, 2, 0, 1] = bad
    found = passes(layer, images, None)
    assert fused
    for name in ("out", "images"):
        assert found[name][:, 2].isnan().any() and found[name][:, [0, 1, 3]].isfinite().all(), name
    assert found["weight"].isfinite().tolist() == [True, True, False, True]


def test_numbers_are_rounded_as_torch_does():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-40, 3.39e38, 1.00390625, 1.01171875, math.inf, math.nan])])

    @numba.njit
    def narrow(values, out):
        for i in range(len(values)):
            out[i] = norm_kernels._narrow(values[i], out[i])

    out = np.empty(len(values), np.uint16)
    narrow(values.numpy(), out)
    torch.testing.assert_close(
        torch.from_numpy(out).view(torch.bfloat16), values.bfloat16(), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("images", "shortcut"),
    [
        (draw((3, 4, 2, 2), 1).double(), None),
        (draw((3, 4, 2, 2), 1, torch.bfloat16), None),
        (draw((3, 4, 2, 2), 1).contiguous(), None),
        (draw((3, 4, 2, 2), 1), draw((3, 4, 2, 2), 2, torch.bfloat16)),
        (draw((3, 4, 2, 2), 1), draw((3, 4, 1, 1), 2)),
    ],
    ids=["float64", "weights in bfloat16 too", "row-major", "mixed types", "a shortcut that is spread"],
)
def test_other_inputs_are_left_to_torch(fused, images, shortcut):
    layer = make_layer(4).to(images.dtype)
    ours = copy.deepcopy(layer)
    fuse_layer(ours)
    assert torch.equal(ours(images, shortcut), layer(images, shortcut))
    assert fused == []


@pytest.mark.parametrize("form", [Residual, NormReLU])
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_other_layers_are_left_alone(fused, form, options):
    module = form(nn.BatchNorm2d(4, **options))
    ours = copy.deepcopy(module)
    fuse_batchnorm_relu(ours)
    assert torch.equal(ours(draw((3, 4, 2, 2), 1)), module(draw((3, 4, 2, 2), 1))) and fused == []


@pytest.mark.parametrize("form", [Residual, NormReLU])
def test_what_states_its_form_is_fused_and_what_inherits_it_is_not(fused, form):
    class Other(form):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.norm(images)

    images = draw((3, 4, 2, 2), 1)
    for kind, calls in ((form, 1), (Other, 0)):
        fused.clear()
        module = kind(nn.BatchNorm2d(4))
        ours = copy.deepcopy(module)
        fuse_batchnorm_relu(ours)
        torch.testing.assert_close(ours(images), module(images))
        assert len(fused) == calls


def test_evaluation_and_more_threads_are_left_to_torch(fused):
    images, layer = draw((3, 4, 2, 2), 1), make_layer(4)
    fuse_layer(layer)
    layer.eval()(images)
    layer.train()
    torch.set_num_threads(2)
    layer(images)
    assert fused == []
    torch.set_num_threads(1)
    layer(images)
    assert fused == [(3, 4, 2, 2)]


def test_one_value_for_each_channel_is_torchs_error():
    layer = make_layer(4)
    fuse_layer(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(draw((1, 4, 1, 1), 1))


@pytest.mark.parametrize(("name", "count"), [("resnet20", 19), ("resnet18", 17), ("resnet50", 49), ("wrn16_4", 13)])
def test_all_that_ends_with_relu_is_fused(fused, name, count):
    network = build_model(ModelConfig(name=name), num_classes=10, seed=0).to(memory_format=torch.channels_last)
    names = list(network.state_dict())
    fuse_batchnorm_relu(network)
    network(draw((2, 3, 32, 32), 1)).sum().backward()
    assert len(fused) == count
    assert list(network.state_dict()) == names
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "wrn16_4"])
def test_where_a_kernel_does_not_fit_the_bits_are_those_of_the_plain_network(fused, name):
    """Two threads: what the network was recognised as is computed by torch's operations, in their order."""
    network = build_model(ModelConfig(name=name), num_classes=10, seed=0).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(network)
    fuse_batchnorm_relu(ours)
    torch.set_num_threads(2)
    images = draw((2, 3, 32, 32), 1)
    for module in (network, ours):
        module(images).square().sum().backward()
    for parameter, twin in zip(network.parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad)
    assert all(torch.equal(one, other) for one, other in zip(network.buffers(), ours.buffers(), strict=True))
    assert fused == []


@pytest.mark.parametrize(("name", "count"), [("resnet20", 19), ("wrn16_4", 13)])
def test_a_network_that_is_fused_computes_the_same_function(fused, name, count):
    """In float64 by torch, and in float32 by the kernels, which sum in another order."""
    network = build_model(ModelConfig(name=name), num_classes=10, seed=0).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(network)
    fuse_batchnorm_relu(ours)
    images = draw((4, 3, 32, 32), 1)
    logits, expected = ours(images), network.double()(images.double())
    assert len(fused) == count
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_norm_without_a_scale_is_left_alone(fused):
    network = build_model(ModelConfig(name="speednet", widths=(8, 8, 8)), num_classes=10, seed=0)
    images = draw((2, 3, 32, 32), 1)
    expected = network(images)
    fuse_batchnorm_relu(network)
    assert torch.equal(network(images), expected) and fused == []


def test_group_norm_is_left_alone(fused):
    network = build_model(ModelConfig(name="resnet20", norm="group"), num_classes=10, seed=0)
    images = draw((2, 3, 32, 32), 1)
    expected = network(images)
    fuse_batchnorm_relu(network)
    assert torch.equal(network(images), expected) and fused == []


MUTANTS = {
    "the mean of a block": ("sums[c] / count", "sums[c] / (count - 1)"),
    "the population's variance": ("variance * count / (count - 1)", "variance"),
    "no epsilon": ("variance + epsilon", "variance"),
    "the shortcut after ReLU": ("+ _widen(shortcut[i, j])", ""),
    "ReLU's gradient everywhere": ("_widen(out[i, j]) <= 0", "_widen(out[i, j]) < 0"),
    "no gradient through the mean": ("scale_of_one * sums[c]", "0"),
    "no gradient through the deviation": ("- slope[j] * (_widen(x[i, j]) - mean[j])", ""),
    "rounding down": ("builder.add(wide(0x7FFF), odd)", "wide(0)"),
    "the last block left out": ("range(start, min(start + _BLOCK, rows))", "range(start, start + rows % _BLOCK)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_catches_a_mutant(monkeypatch, name):
    mutate(monkeypatch, fused_batchnorm, ("normalize", "differentiate"), MUTANTS[name])
    worst = 0.0
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 3e-3)):
        images, shortcut = (draw((33, 16, 8, 8), seed, dtype, mean) for seed, mean in ((1, 3), (2, 0)))
        exact, _, found = three(images, shortcut)
        worst = max(worst, *(error(found[key], exact[key]) / bound for key in exact))
    assert worst > 1
