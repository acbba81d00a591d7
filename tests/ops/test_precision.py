"""What `auto` chooses, and that a module then computes so."""

from __future__ import annotations

import shutil

import pytest
import torch

from dist_cifar.config import ComputeConfig, ModelConfig
from dist_cifar.models import build_model
from dist_cifar.ops import precision
from dist_cifar.ops.precision import choose_precision, compiles, prepare_forward

CPU = torch.device("cpu")


@pytest.mark.parametrize(("share", "chosen"), [(0.3, "bf16"), (0.89, "bf16"), (0.95, "fp32"), (3.0, "fp32")])
def test_bf16_has_to_be_clearly_faster(monkeypatch, share, chosen):
    monkeypatch.setattr(precision, "_layer_seconds", lambda name, device: {"fp32": 1.0, "bf16": share}[name])
    name, line = choose_precision(CPU)
    assert name == chosen
    assert line == f"precision  {chosen}: a convolution takes 1000.00 ms in fp32, {share * 1e3:.2f} ms in bf16"


def test_the_measurement_tells_the_precisions_apart(monkeypatch):
    """The layer is run under autocast for bf16 alone, forward and backward."""
    seen = []

    class Recorded(torch.nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            out = super().forward(images)
            out.register_hook(lambda gradient: seen.append(gradient.dtype))
            return out

    monkeypatch.setattr(torch.nn, "Conv2d", Recorded)
    choose_precision(CPU)
    half = len(seen) // 2
    assert half > 1 and set(seen[:half]) | set(seen[half:]) == {torch.float32, torch.bfloat16}
    assert seen == sorted(seen, key=lambda dtype: dtype == torch.bfloat16)


def test_a_module_computes_in_bf16_and_answers_in_float32():
    images = torch.randn(4, 3, 32, 32)
    modules = {name: build_model(ModelConfig(name="resnet20"), num_classes=10, seed=0) for name in ("fp32", "bf16")}
    for name, module in modules.items():
        prepare_forward(module, ComputeConfig(precision=name), CPU, auto_compile=True, bitwise=False)
    logits = {name: module(images) for name, module in modules.items()}
    assert logits["bf16"].dtype == logits["fp32"].dtype == torch.float32
    assert torch.equal(logits["bf16"], logits["bf16"].bfloat16().float())
    assert not torch.equal(logits["fp32"], logits["fp32"].bfloat16().float())
    logits["bf16"].sum().backward()
    assert modules["bf16"].conv1.weight.grad.dtype == torch.float32


def test_what_is_compiled():
    cuda = torch.device("cuda")
    for allowed in (True, False):
        assert compiles(ComputeConfig(), cuda, auto_compile=allowed) is allowed  # triton comes with torch's wheels
    assert not compiles(ComputeConfig(), CPU, auto_compile=True)
    assert compiles(ComputeConfig(compile="on"), CPU, auto_compile=False)
    assert not compiles(ComputeConfig(compile="off"), cuda, auto_compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_a_compiled_module_gives_the_same_gradients():
    """One block of a ResNet, whose graph has every kind of layer. In float64: in float32 a sum near zero may pass ReLU
    in one and not in the other."""
    images = torch.randn(4, 16, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    gradients = []
    for compiled in ("off", "on"):
        module = build_model(ModelConfig(name="resnet20", norm="group"), num_classes=10, seed=0).double().layer2[0]
        names = list(module.state_dict())
        prepare_forward(
            module, ComputeConfig(precision="fp32", compile=compiled), CPU, auto_compile=True, bitwise=False
        )
        module(images).square().mean().backward()
        gradients.append(module.conv1.weight.grad)
        assert list(module.state_dict()) == names
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert not torch.equal(gradients[0], torch.zeros_like(gradients[0]))
