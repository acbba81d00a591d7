"""A network from outside the package is tried before it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.config import ModelConfig
from dist_cifar.errors import ConfigError
from dist_cifar.models import build_model


def linear(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))


class Unused(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.used, self.unused = linear(num_classes), nn.Linear(2, 2)

    def forward(self, images):
        return self.used(images)


class Fails(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.layer(images)


def fails(*, num_classes):
    raise RuntimeError("out\nof luck")


class Keeps(nn.Module):
    """Changes a buffer of some type in each pass, by one or by what it sees."""

    def __init__(self, num_classes, dtype, persistent, is_data):
        super().__init__()
        self.layer, self.is_data = linear(num_classes), is_data
        self.register_buffer("kept", torch.zeros((), dtype=dtype), persistent=persistent)

    def forward(self, images):
        added = images.sum() if self.is_data else torch.ones(())
        self.kept += added.to(self.kept.dtype)
        return self.layer(images)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})
    return lambda build: plugins.register_model("own")(build)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda *, num_classes: 3, "returns int; it must return a torch.nn.Module"),
        (lambda *, num_classes: linear(num_classes + 1), r"returns \(2, 8\); must be \[2, 7\]"),
        (lambda *, num_classes: nn.Flatten(), "has no parameter to train"),
        (lambda *, num_classes: linear(num_classes).double(), "1.weight is torch.float64; float32"),
        (Unused, "its parameter unused.weight has no effect on the output"),
        (Fails, r"its forward pass of \[2, 3, 32, 32\] fails: .*test_own_model.py, line \d+: RuntimeError"),
        (fails, r"building the model fails: .*test_own_model.py, line \d+: RuntimeError: out of luck"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(registered, build, message):
    registered(build)
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(ModelConfig(name="own"), num_classes=7, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "persistent", "is_data", "is_refused"),
    [
        (torch.float32, True, True, False),
        (torch.float32, False, True, True),
        (torch.float64, True, True, True),
        (torch.int64, True, False, False),
        (torch.int64, True, True, True),
        (torch.int32, True, False, True),
        (torch.bool, False, False, False),  # it is set once
    ],
)
def test_a_buffer_that_changes_and_cannot_be_averaged_is_refused(registered, dtype, persistent, is_data, is_refused):
    registered(lambda *, num_classes: Keeps(num_classes, dtype, persistent, is_data))
    if not is_refused:
        assert build_model(ModelConfig(name="own"), num_classes=7, seed=0).kept == 0
        return
    message = rf"changes the buffer kept \({dtype}, persistent={persistent}\), which could not be averaged"
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(name="own"), num_classes=7, seed=0)


def test_the_trial_leaves_the_model_and_the_generator_as_they_were(registered):
    def plain(*, num_classes):
        return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), *linear(num_classes))

    registered(plain)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (build_model(ModelConfig(name="own"), num_classes=7, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert first[0].num_batches_tracked == 0 and all(p.grad is None for p in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_network_of_torchvision_has_its_options_and_its_errors():
    model = build_model(
        ModelConfig(name="torchvision:resnet18", options={"width_per_group": 64}), num_classes=7, seed=0
    )
    assert model.fc.out_features == 7
    with pytest.raises(ConfigError, match=r"building the model fails: TypeError: .*depth"):
        build_model(ModelConfig(name="torchvision:resnet18", options={"depth": 3}), num_classes=7, seed=0)
