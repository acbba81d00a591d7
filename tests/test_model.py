"""The networks against published sizes and torchvision's own."""

from __future__ import annotations

import pytest
import torch
import torchvision

from dist_cifar.config import ModelConfig
from dist_cifar.model import build_model

# He et al. 2016, table 6, gives the CIFAR ResNets in millions; these are the exact counts with BatchNorm.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    model = build_model(ModelConfig(name=name), num_classes=10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_logits(name, norm):
    model = build_model(ModelConfig(name=name, norm=norm), num_classes=7, seed=0)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    kinds = {type(module) for module in model.modules()}
    assert (torch.nn.GroupNorm in kinds) == (norm == "group") != (torch.nn.BatchNorm2d in kinds)


def test_resnet18_is_torchvisions_behind_the_stem():
    ours = build_model(ModelConfig(name="resnet18"), num_classes=10, seed=0)
    theirs = torchvision.models.resnet18(num_classes=10)
    state = {name: tensor for name, tensor in ours.state_dict().items() if name != "conv1.weight"}
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["conv1.weight"]
    hidden = torch.randn(2, 64, 32, 32)
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        mine, other = getattr(ours, layer).eval(), getattr(theirs, layer).eval()
        assert torch.equal(mine(hidden), other(hidden))
        hidden = mine(hidden)
    assert hidden.shape == (2, 512, 4, 4)  # the CIFAR stem keeps 32x32


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
