"""The fused max-pool, BatchNorm and GELU, and the fused bias and GELU, against torch's, in float64."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.models import build_model
from dist_cifar.models.speednet import UnscaledBatchNorm2d
from dist_cifar.ops import fused_gelu
from dist_cifar.ops.fused_gelu import fuse_gelu
from tests.ops.kernels import draw, error, mutate

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(33, 16, 8, 8), (5, 64, 7, 5), (3, 5, 2, 31), (9, 24, 3, 2), (4, 3, 1, 1)]
POOLED = [shape for shape in SHAPES if shape[2] > 1]
CASES = [*((shape, False) for shape in SHAPES), *((shape, True) for shape in POOLED)]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def fused(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that the kernels were given."""
    seen: list[tuple[int, ...]] = []
    for kind in (fused_gelu._NormGELU, fused_gelu._BiasGELU):

        def counted(images: torch.Tensor, *rest: Any, original: Any = kind.apply) -> torch.Tensor:
            seen.append(tuple(images.shape))
            return original(images, *rest)

        monkeypatch.setattr(kind, "apply", counted)
    return seen


class PoolNormGELU(nn.Module):
    """Layers as `fuse_gelu` recognises them."""

    pool_norm_gelu = (("pool", "norm", "gelu"),)

    def __init__(self, norm: nn.Module, pool: nn.Module | None = None, gelu: nn.Module | None = None) -> None:
        super().__init__()
        self.pool, self.norm, self.gelu = pool or nn.MaxPool2d(2), norm, gelu or nn.GELU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gelu(self.norm(self.pool(images)))


class NormGELU(nn.Module):
    """The same without a pool."""

    pool_norm_gelu = ((None, "norm", "gelu"),)

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.gelu = norm, nn.GELU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gelu(self.norm(images))


class ConvGELU(nn.Module):
    """A convolution and GELU as `fuse_gelu` recognises them."""

    conv_gelu = (("conv", "gelu"),)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv, self.gelu = nn.Conv2d(3, 24, 2, **options), nn.GELU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gelu(self.conv(images))


def make_norm(channels: int) -> UnscaledBatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    norm = UnscaledBatchNorm2d(channels, momentum=0.4)
    for tensor in (norm.bias, norm.running_mean):
        tensor.data.normal_(generator=generator)
    return norm


def make_module(channels: int, is_pooled: bool) -> nn.Module:
    return (PoolNormGELU if is_pooled else NormGELU)(make_norm(channels))


def passes(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the gradients and the buffers, by name."""
    images = images.clone().requires_grad_()
    out = module(images)
    out.backward(draw(out.shape, 3, torch.bfloat16).to(out))
    found = {"out": out.detach(), "images": images.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return found | {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def three(module: nn.Module, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
    """What torch computes in float64, torch, and the kernels."""
    ours = copy.deepcopy(module)
    fuse_gelu(ours)
    return passes(copy.deepcopy(module).double(), images.double()), passes(module, images), passes(ours, images)


@pytest.mark.parametrize(("shape", "is_pooled"), CASES)
def test_float32_is_as_near_to_float64_as_rounding_allows(fused, shape, is_pooled):
    exact, _, found = three(make_module(shape[1], is_pooled), draw(shape, 1, mean=3))
    assert fused == [shape] and exact.keys() == found.keys()
    for name in exact:
        assert error(found[name], exact[name]) < 2e-6, name
        assert found[name].dim() < 4 or found[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "is_pooled"), CASES)
def test_bf16_is_as_near_to_float64_as_torch(fused, shape, is_pooled):
    exact, torchs, found = three(make_module(shape[1], is_pooled), draw(shape, 1, torch.bfloat16, 3))
    assert fused == [shape]
    assert all(found[name].dtype == torchs[name].dtype for name in torchs)
    for name in exact:
        slack = 1.1 if name == "images" else 1.02  # rounded as often as torch does, of other sums
        assert error(found[name], exact[name]) < max(slack * error(torchs[name], exact[name]), 1e-6), name
        assert error(found[name], exact[name]) < 6e-3, name
    half_a_unit = exact["out"].abs() * 2.0**-8
    assert ((found["out"].double() - exact["out"]).abs() <= half_a_unit * 1.01 + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_and_gelu(fused, dtype):
    """The images need no gradient, as the first ones of a network; the bias does."""
    module = ConvGELU()
    module.conv.weight.requires_grad_(False)
    ours, images = copy.deepcopy(module), draw((9, 3, 12, 12), 1)
    fuse_gelu(ours)
    found = []
    for network, given in ((copy.deepcopy(module).double(), images.double()), (module, images), (ours, images)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16 and given is images):
            out = network(given)
        out.backward(draw(out.shape, 3, torch.bfloat16).to(out))
        assert network.conv.weight.grad is None
        found.append((out.detach(), network.conv.bias.grad))
    assert fused == [(9, 24, 11, 11)]
    for exact, torchs, fast in zip(*found, strict=True):
        assert fast.dtype == torchs.dtype
        assert error(fast, exact) < max(1.02 * error(torchs, exact), 1e-6)


def test_gelu_and_its_slope_everywhere():
    """Of numbers from -30 to 30, whose norm is left out by a bias of zero and a scale of one."""
    values = torch.linspace(-30, 30, 40001)
    exact = values.double().requires_grad_()
    nn.functional.gelu(exact).sum().backward()
    images, bias = values.view(1, 1, 1, -1).clone().requires_grad_(), torch.zeros(1)
    out = fused_gelu._BiasGELU.apply(images.contiguous(memory_format=torch.channels_last), bias)
    out.sum().backward()
    torch.testing.assert_close(out.flatten().double(), nn.functional.gelu(values.double()), rtol=3e-7, atol=5e-7)
    torch.testing.assert_close(images.grad.flatten().double(), exact.grad, rtol=3e-7, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_values_the_first_one_gets_the_gradient_as_in_torch(fused, dtype):
    images = draw((4, 8, 6, 6), 1).round().to(dtype)  # few different numbers
    exact, _, found = three(make_module(8, True), images)
    assert fused and (found["images"] != 0).sum() <= 4 * 8 * 9
    assert torch.equal(found["images"] != 0, exact["images"] != 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_what_is_not_finite_stays_so(fused, dtype, bad, place):
    """The step that would use it is left out, so it has to be seen."""
    images = draw((3, 4, 4, 4), 1, dtype)
    images[1, 2, place[0], place[1]] = bad
    _, _, found = three(make_module(4, True), images)
    assert fused
    for name in ("out", "images"):
        assert found[name][:, 2].isnan().any() and found[name][:, [0, 1, 3]].isfinite().all(), name


@pytest.mark.parametrize(("dtype", "is_pooled"), [*product(DTYPES, (False, True))])
def test_the_number_of_threads_changes_no_bit(fused, dtype, is_pooled):
    images, found = draw((33, 16, 9, 9), 1, dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        module = make_module(16, is_pooled)
        fuse_gelu(module)
        found.append(passes(module, images))
    assert len(fused) == 3
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


def test_a_small_variance_beside_a_large_mean(fused):
    exact, _, found = three(make_module(8, True), draw((16, 8, 4, 4), 1) * 1e-2 + 100)
    assert fused and error(found["norm.running_var"], exact["norm.running_var"]) < 1e-6
    assert error(found["out"], exact["out"]) < 1e-3


@pytest.mark.parametrize(
    "images",
    [draw((3, 4, 4, 4), 1).double(), draw((3, 4, 4, 4), 1, torch.bfloat16), draw((3, 4, 4, 4), 1).contiguous()],
    ids=["float64", "the bias in bfloat16 too", "row-major"],
)
@pytest.mark.parametrize("is_pooled", [False, True])
def test_other_inputs_are_left_to_torch(fused, images, is_pooled):
    module = make_module(4, is_pooled).to(images.dtype)
    ours = copy.deepcopy(module)
    fuse_gelu(ours)
    assert torch.equal(ours(images), module(images)) and fused == []


class Inherits(PoolNormGELU):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images)


@pytest.mark.parametrize(
    "module",
    [
        PoolNormGELU(nn.BatchNorm2d(4)),
        PoolNormGELU(nn.GroupNorm(2, 4)),
        PoolNormGELU(make_norm(4), pool=nn.MaxPool2d(3, 2)),
        PoolNormGELU(make_norm(4), pool=nn.AvgPool2d(2)),
        PoolNormGELU(make_norm(4), gelu=nn.GELU("tanh")),
        PoolNormGELU(make_norm(4), gelu=nn.ReLU()),
        Inherits(make_norm(4)),
    ],
    ids=["a scale", "group norm", "3x3", "mean", "tanh", "ReLU", "inherits"],
)
def test_other_layers_are_left_alone(fused, module):
    ours, images = copy.deepcopy(module), draw((3, 4, 6, 6), 1)
    fuse_gelu(ours)
    assert torch.equal(ours(images), module(images)) and fused == []


@pytest.mark.parametrize("options", [{"bias": False}, {"padding_mode": "reflect", "padding": 1}], ids=str)
def test_other_convolutions_are_left_alone(fused, options):
    module = ConvGELU(**options)
    ours, images = copy.deepcopy(module), draw((3, 3, 6, 6), 1)
    fuse_gelu(ours)
    assert torch.equal(ours(images), module(images)) and fused == []


def test_evaluation_is_left_to_torch(fused):
    network = build_model(ModelConfig(name="speednet", widths=(8, 8, 8)), num_classes=10, seed=0).eval()
    ours = copy.deepcopy(network)
    fuse_gelu(ours)
    images = draw((2, 3, 32, 32), 1)
    assert torch.equal(ours(images), network(images)) and fused == []


def test_one_value_for_each_channel_is_torchs_error():
    module = make_module(4, True)
    fuse_gelu(module)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(draw((1, 4, 2, 2), 1))


@pytest.mark.parametrize(("depth", "count"), [(1, 4), (2, 7), (3, 7)])
def test_a_speednet_that_is_fused_computes_the_same_function(fused, depth, count):
    """In float64 by torch, and in float32 by the kernels. The third layer of a group, which adds, is left to torch."""
    config = ModelConfig(name="speednet", widths=(8, 16, 16), depth=depth)
    network = build_model(config, num_classes=10, seed=0).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(network)
    fuse_gelu(ours)
    assert list(ours.state_dict()) == list(network.state_dict())
    images = draw((6, 3, 32, 32), 1)
    logits, expected = ours(images), network.double()(images.double())
    assert len(fused) == count
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)
    for module, result in ((ours, logits), (network, expected)):
        result.square().sum().backward()
        assert module.whiten.weight.grad is None
    for (name, one), other in zip(ours.named_parameters(), network.parameters(), strict=True):
        assert other.grad is None or error(one.grad, other.grad) < 1e-3, name


MUTANTS = {
    "the sum of other pixels": ("difference = _widen(row[j])", "difference = _widen(row[0])"),
    "no squares": ("squares[j] += difference * difference", "squares[j] += difference"),
    "the last one of equal values": ("wins = _exceeds(number, best)", "wins = not (number < best)"),
    "NaN does not win": (
        'builder.or_(builder.fcmp_ordered(">", value, other), is_nan)',
        'builder.fcmp_ordered(">", value, other)',
    ),
    "another place": ("c[k], np.uint8(2))", "c[k], np.uint8(3))"),
    "one row of places": ("of_x[image, 2 * i + 1], np.uint8(2)", "of_x[image, 2 * i + 1], np.uint8(0)"),
    "the last row is not written": ("of_x[image, 2 * values.shape[1] :] = 0", "pass"),
    "the last pixel is not written": ("target[2 * len(of_row) :] = 0", "pass"),
    "no density": ("y * bell * _DENSITY_AT_0", "np.float32(0)"),
    "the wrong tail": ("_choose(y < 0, tail, _ONE - tail)", "_choose(y > 0, tail, _ONE - tail)"),
    "a term of the series is missing": ("bell = bell * rest + _EXP[3]", "bell = bell * rest"),
    "no gradient through the deviation": ("- slopes[j] * (_widen(row[j]) - means[j])", ""),
    "no gradient through the mean": ("(_widen(row[j]) - means[j]) - offsets[j]", "(_widen(row[j]) - means[j])"),
    "a chunk is left out": ("for chunk in range(first, last)", "for chunk in range(first, last - 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_catches_a_mutant(monkeypatch, name):
    kernels = ("pool_and_sum", "apply_gelu", "differentiate_gelu", "differentiate_norm")
    mutate(monkeypatch, fused_gelu, kernels, MUTANTS[name])
    monkeypatch.setattr(fused_gelu, "_empty", lambda like, size, dtype=None: filled(like, size, dtype))
    worst = 0.0
    for images in (draw((33, 16, 7, 7), 1, mean=3), draw((9, 8, 8, 8), 1).round()):
        exact, _, found = three(make_module(images.shape[1], True), images)
        worst = max(worst, *(error(found[key], exact[key]) / 2e-6 for key in exact))
    images[1, 0, 1, 1] = math.nan  # where only the pool sees it
    _, torchs, found = three(make_module(images.shape[1], True), images)
    sees_nan = np.array_equal(found["out"].isnan(), torchs["out"].isnan())
    assert not worst <= 1 or not sees_nan


def filled(like: torch.Tensor, size: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """Memory as it may be found, so that what is not written is seen."""
    return torch.full(tuple(size), 7, dtype=dtype or like.dtype).to(memory_format=torch.channels_last)
