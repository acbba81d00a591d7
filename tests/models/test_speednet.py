"""The fast network against one that is written by hand, and its first layer against numpy's eigenvectors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_cifar.config import ModelConfig
from dist_cifar.errors import ConfigError
from dist_cifar.models import build_model, by_name, speednet
from dist_cifar.models.speednet import SpeedNet, patch_covariance, whitening_filters

NARROW = ModelConfig(name="speednet", widths=(32, 26, 40))


def built(config: ModelConfig = NARROW, num_classes: int = 10, seed: int = 3) -> SpeedNet:
    model = build_model(config, num_classes=num_classes, seed=seed)
    assert isinstance(model, SpeedNet)
    return model


def images(count: int, side: int = 32) -> torch.Tensor:
    """Blurred noise in channels that depend on each other, as the pixels of photos do."""
    noise = torch.randn(count, 3, side + 2, side + 2, generator=torch.Generator().manual_seed(count))
    mixed = torch.einsum("dc,nchw->ndhw", torch.tensor([[1.0, 0.5, 0.2], [0.8, 1.0, 0.1], [0.3, 0.9, 1.0]]), noise)
    return functional.avg_pool2d(mixed, 3, 1)


# --- the function ------------------------------------------------------------------------------------------------


def by_hand(state: dict[str, torch.Tensor], pixels: torch.Tensor, depth: int) -> torch.Tensor:
    """The network as its source describes it, from operations."""

    def norm(hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        mean, variance = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), correction=0, keepdim=True)
        return (hidden - mean) / (variance + 1e-12).sqrt() + bias.view(1, -1, 1, 1)

    def gelu(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2

    hidden = gelu(functional.conv2d(pixels, state["whiten.weight"], state["whiten.bias"]))
    for g in range(3):
        part = {name.removeprefix(f"groups.{g}."): tensor for name, tensor in state.items()}
        hidden = functional.max_pool2d(functional.conv2d(hidden, part["conv1.weight"], padding=1), 2)
        first = hidden = gelu(norm(hidden, part["norm1.bias"]))
        if depth >= 2:
            hidden = norm(functional.conv2d(hidden, part["conv2.weight"], padding=1), part["norm2.bias"])
            hidden = gelu(hidden)
        if depth == 3:
            hidden = norm(functional.conv2d(hidden, part["conv3.weight"], padding=1), part["norm3.bias"])
            hidden = gelu(hidden + first)
    return hidden.amax((2, 3)) @ state["head.weight"].T / 9


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("side", [32, 24])
def test_logits_and_gradients_are_those_of_the_network_by_hand(depth, side):
    model = built(dataclasses.replace(NARROW, depth=depth)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    state = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in model.named_parameters()}
    pixels, labels = images(6, side).double(), torch.arange(6)
    expected, found = by_hand(state, pixels, depth), model(pixels)
    torch.testing.assert_close(found, expected)
    functional.cross_entropy(expected, labels).backward()
    functional.cross_entropy(found, labels).backward()
    for name, parameter in model.named_parameters():
        if name == "whiten.weight":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)


def test_a_network_of_another_function_is_caught(monkeypatch):
    """The mutant: the first activation is added one GELU too late."""

    def late(group, hidden):
        hidden = first = group.gelu1(group.norm1(group.pool(group.conv1(hidden))))
        for number in (2, 3):
            hidden = group.gelu1(getattr(group, f"norm{number}")(getattr(group, f"conv{number}")(hidden)))
        return hidden + first

    monkeypatch.setattr(speednet.Group, "forward", late)
    with pytest.raises(AssertionError, match="not close"):
        test_logits_and_gradients_are_those_of_the_network_by_hand(3, 32)


@pytest.mark.parametrize(("depth", "momentum"), [(2, 0.4), (3, 0.1)])
def test_a_norm_has_a_bias_and_no_scale(depth, momentum):
    norms = [
        one for one in built(dataclasses.replace(NARROW, depth=depth)).modules() if isinstance(one, nn.BatchNorm2d)
    ]
    assert len(norms) == 3 * depth
    for norm in norms:
        assert [name for name, _ in norm.named_parameters()] == ["bias"] and not norm.bias.any()
        assert (norm.eps, norm.momentum) == (1e-12, momentum)


def test_the_default_is_airbench94():
    model = built(ModelConfig(name="speednet"))
    filters = [24 * 64, 64 * 64, 64 * 256, 256 * 256, 256 * 256, 256 * 256]
    biases = 2 * (64 + 256 + 256)
    assert sum(p.numel() for p in model.parameters()) == 24 * 12 + 24 + 9 * sum(filters) + biases + 2560
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["whiten.weight"]


# --- the weights before the first step ---------------------------------------------------------------------------


def test_weights_are_drawn_by_name():
    model = built()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        key = by_name.new_key()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any()
            continue
        bound = 1 / math.sqrt(parameter[0].numel())
        expected = torch.empty(parameter.shape).uniform_(-bound, bound, generator=by_name.generator_for(key, name))
        if name.startswith("groups."):
            assert not torch.equal(parameter, expected)
            for j in range(min(parameter.shape[:2])):
                expected[j] = 0
                expected[j, j, 1, 1] = 1
        torch.testing.assert_close(parameter, expected, msg=name)


def shared(first: SpeedNet, second: SpeedNet) -> list[bool]:
    """Whether each parameter of one name and shape is equal in both."""
    others = dict(second.named_parameters())
    return [
        torch.equal(parameter, others[name])
        for name, parameter in first.named_parameters()
        if name in others and parameter.shape == others[name].shape and parameter.dim() > 1
    ]


def changes() -> list[bool]:
    deeper = dataclasses.replace(NARROW, depth=3)
    return shared(built(), built(deeper)) + shared(built(), built(num_classes=7))


def test_a_change_of_one_layer_leaves_the_others():
    assert len(changes()) == 8 + 7 and all(changes())
    torch.manual_seed(9)
    assert all(shared(built(), built()))
    assert not any(shared(built(seed=1), built(seed=2))[i] for i in (0, -1))


def test_weights_by_order_of_construction_are_caught(monkeypatch):
    """The mutant."""
    monkeypatch.setattr(speednet, "generator_for", lambda key, name: torch.default_generator)
    assert not all(changes())


# --- the first layer ---------------------------------------------------------------------------------------------


def test_the_first_layer_whitens():
    pixels = images(600)
    model = built()
    model.initialize_from_data(lambda count: pixels[:count])
    filters = model.whiten.weight.detach().double().numpy().reshape(24, 12)
    patches = np.stack([pixels[:, :, i : i + 31, j : j + 31].numpy() for i in (0, 1) for j in (0, 1)])
    patches = patches.transpose(2, 0, 1, 3, 4).reshape(12, -1).astype(np.float64)
    assert not model.whiten.weight.requires_grad and np.array_equal(filters[12:], -filters[:12])

    covariance = patches @ patches.T / patches.shape[1]
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values)
    for j, i in enumerate(order):
        vector = vectors[:, i] * np.sign(vectors[np.abs(vectors[:, i]).argmax(), i])
        np.testing.assert_allclose(filters[j], vector / math.sqrt(values[i] + 5e-4), rtol=1e-4, atol=1e-5)
    white = filters[:12] @ covariance @ filters[:12].T
    np.testing.assert_allclose(white, np.diag(values[order] / (values[order] + 5e-4)), atol=1e-4)


def test_patches_without_the_epsilon_have_the_identity_as_covariance():
    covariance = patch_covariance(images(300))
    filters = whitening_filters(covariance, 1e-12).double().view(24, 12)[:12]
    torch.testing.assert_close(filters @ covariance @ filters.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4)


def test_patches_that_all_vary_in_one_direction_give_finite_filters():
    filters = whitening_filters(patch_covariance(torch.ones(3, 3, 32, 32)), 5e-4)
    assert filters.isfinite().all()


def test_the_number_of_threads_changes_no_bit_and_is_left():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = built()
            model.initialize_from_data(lambda count: images(500))
            assert torch.get_num_threads() == threads
            results.append(model.whiten.weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "speednet", "norm": "group"},
            r"model\.norm: group was set, .*speednet does not read; it is",
        ),
        ({"name": "torchvision:resnet18", "norm": "group"}, r"model\.norm: group was set, .*resnet18 does not read"),
        ({"name": "speednet", "depth": 4}, r"model\.depth: must be 1, 2 or 3 for speednet, found 4"),
        (
            {"name": "speednet", "widen_factor": 4},
            r"model\.widen_factor: 4 was set, .*=speednet does not",
        ),
        (
            {"name": "resnet18", "depth": 20},
            r"model\.depth: 20 .*=resnet18 does not read; it is for wideresnet",
        ),
        ({"name": "wrn16_4", "depth": 22}, r"model\.depth: 22 was set, which model\.name=wrn16_4 does not read"),
        ({"name": "wideresnet", "depth": 20}, r"model\.depth: must be 6 n \+ 4 for wideresnet .* found 20"),
    ],
)
def test_settings_that_a_network_does_not_have_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(ModelConfig(**settings), num_classes=10, seed=0)
    assert "\n" not in str(caught.value)
