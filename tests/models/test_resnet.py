"""The networks against published sizes and torchvision's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision

from dist_cifar.config import ModelConfig, known_names
from dist_cifar.models import MODELS, build_model
from dist_cifar.models.resnet import ZeroPadded

# He et al. 2016, table 6, gives the CIFAR ResNets of 20 layers and more in millions; these are the exact counts with
# BatchNorm.
PARAMETERS = {
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wrn16_4": 2_748_890,
    "wrn28_10": 36_479_194,
    "wrn40_4": 8_949_210,
    "wideresnet": 36_479_194,
    "speednet": 1_971_640,
}
RESNETS = [name for name in PARAMETERS if name.startswith("resnet")]


def test_every_name_of_the_config_has_a_builder():
    assert set(MODELS) == set(known_names("model", "name")) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    model = build_model(ModelConfig(name=name), num_classes=10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", [*RESNETS, "wrn16_4"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_logits(name, norm):
    model = build_model(ModelConfig(name=name, norm=norm), num_classes=7, seed=0)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    kind, other = (torch.nn.GroupNorm, torch.nn.BatchNorm2d)[:: 1 if norm == "group" else -1]
    modules = list(model.modules())
    assert any(isinstance(module, kind) for module in modules)
    assert not any(isinstance(module, other) for module in modules)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_wide_networks_are_torchvisions_behind_the_stem(name, norm):
    ours = build_model(ModelConfig(name=name, norm=norm), num_classes=10, seed=3)
    torch.manual_seed(3)
    kind = {"batch": torch.nn.BatchNorm2d, "group": partial(torch.nn.GroupNorm, 8)}[norm]
    theirs = getattr(torchvision.models, name)(num_classes=10, norm_layer=kind)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    torch.nn.init.kaiming_normal_(theirs.conv1.weight, mode="fan_out", nonlinearity="relu")
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    hidden = ours.layer4(ours.layer3(ours.layer2(ours.layer1(torch.randn(2, 64, 32, 32)))))
    assert hidden.shape[2:] == (4, 4)  # the CIFAR stem keeps 32x32


def test_the_shortcut_of_the_narrow_networks_has_no_weights():
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=0)
    hidden = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).reshape(2, 16, 4, 4)
    short = model.layer2[0].downsample(hidden)
    assert short.shape == (2, 32, 2, 2) and torch.equal(short[:, 8:24], hidden[:, :, ::2, ::2])
    assert not short[:, :8].any() and not short[:, 24:].any()


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=3).state_dict()
    other = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_shortcut_takes_every_second_pixel_and_its_gradient_keeps_the_memory_format():
    """A gradient in another layout than the activations costs a twentieth of the step."""
    (shortcut,) = (
        module
        for module in build_model(ModelConfig(name="resnet20"), num_classes=10, seed=0).layer2.modules()
        if isinstance(module, ZeroPadded)
    )
    hidden = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = shortcut(hidden)
    assert torch.equal(out[:, 8:24], hidden[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()
    out.backward(torch.randn_like(out))
    assert hidden.grad.is_contiguous(memory_format=torch.channels_last)
    assert hidden.grad[:, :, ::2, ::2].all() and not hidden.grad[:, :, 1::2].any()
