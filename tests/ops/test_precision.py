"""What `auto` chooses, and that a module then computes so."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_cifar.config import ComputeConfig, Config, ModelConfig
from dist_cifar.models import build_model
from dist_cifar.ops import precision
from dist_cifar.ops.precision import choose_precision, compiles, prepare_forward, resolve_precision, set_precision

CPU = torch.device("cpu")


def capabilities(**present: bool | str) -> dict[str, bool | str | int]:
    """What `torch.cpu.get_capabilities` returns: flags, and facts that are no flags."""
    return {"architecture": "x86_64", "avx512_f": True, "l2_cache_size": 1048576, "avx512_bf16": False} | present


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        (capabilities(), "fp32"),
        (capabilities(avx512_bf16=True), "bf16"),
        (capabilities(amx_bf16=True), "bf16"),
        (capabilities(architecture="aarch64", bf16=True), "bf16"),
        (capabilities(cpu_name="bf16"), "fp32"),
        ({}, "fp32"),
    ],
)
def test_a_processor_with_bf16_instructions_computes_in_bf16(monkeypatch, found, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    has = "has" if chosen == "bf16" else "has no"
    assert choose_precision(CPU) == (chosen, f"precision  {chosen}: this processor {has} bf16 instructions")


def test_the_choice_for_this_processor_is_what_linux_says_of_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"} else "fp32"
    assert choose_precision(CPU)[0] == expected


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, supported, chosen):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or supported
    )
    assert choose_precision(torch.device("cuda"))[0] == chosen
    assert asked == [False]


@pytest.mark.parametrize(
    ("found", "asked", "slow"), [("fp32", "bf16", True), ("fp32", "fp32", False), ("bf16", "bf16", False)]
)
def test_bf16_that_is_emulated_is_said_to_be_slow(monkeypatch, said, found, asked, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities(avx512_bf16=found == "bf16"))
    config = Config(compute=ComputeConfig(precision=asked))
    assert resolve_precision(config, lambda: None, SimpleNamespace(device=CPU)) is config
    line = "precision  bf16, which this processor emulates slowly; compute.precision=fp32 or auto would be faster"
    assert said == ([line] if slow else [])


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


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_nothing_is_computed_in_tf32(precision):
    """torch's default for convolutions is TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        set_precision(torch.nn.Linear(2, 2), precision, torch.device("cuda", 0))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_settings_of_torchs_compiler_are_put_back():
    names = ("recompile_limit", "fail_on_recompile_limit_hit", "suppress_errors")
    settings = torch._dynamo.config
    before = [getattr(settings, name) for name in names]
    deterministic = torch._inductor.config.deterministic
    for _ in range(2):
        prepare_forward(nn.Linear(2, 2), ComputeConfig(compile="on"), CPU, auto_compile=False, bitwise=True)
    assert [getattr(settings, name) for name in names] == [precision.MOST_GRAPHS, True, False]
    precision.put_compiler_back()
    assert [getattr(settings, name) for name in names] == before
    assert torch._inductor.config.deterministic == deterministic
