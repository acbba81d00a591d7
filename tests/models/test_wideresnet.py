"""Wide ResNets against their published sizes and against one that is written by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dist_cifar.config import ModelConfig
from dist_cifar.models import build_model, wideresnet


def by_hand(state: dict[str, torch.Tensor], pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """The network in evaluation, as the paper's authors have written it, from operations."""

    def norm_relu(name: str, hidden: torch.Tensor) -> torch.Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return functional.batch_norm(hidden, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    hidden = functional.conv2d(pixels, state["conv.weight"], padding=1)
    for g in (1, 2, 3):
        for b in range(blocks):
            name, stride = f"group{g}.{b}", 2 if g > 1 and b == 0 else 1
            active = norm_relu(f"{name}.bn1", hidden)
            if f"{name}.shortcut.weight" in state:
                hidden = functional.conv2d(active, state[f"{name}.shortcut.weight"], stride=stride)
            active = functional.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            active = norm_relu(f"{name}.bn2", active)
            hidden = hidden + functional.conv2d(active, state[f"{name}.conv2.weight"], padding=1)
    return functional.linear(norm_relu("bn", hidden).mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(("depth", "widen_factor"), [(10, 1), (16, 2)])
def test_logits_are_those_of_the_network_by_hand(depth, widen_factor):
    config = ModelConfig(name="wideresnet", depth=depth, widen_factor=widen_factor)
    model = build_model(config, num_classes=7, seed=0).double()
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model(pixels)  # statistics that are not those of the beginning
    model.eval()
    torch.testing.assert_close(model(pixels), by_hand(model.state_dict(), pixels, (depth - 4) // 6))


def test_a_shortcut_of_the_input_itself_is_caught(monkeypatch):
    """The mutant: the 1x1 convolution sees what has no norm yet."""

    def forward(block, hidden):
        shortcut = hidden if block.shortcut is None else block.shortcut(hidden)
        active = block.conv1(block.relu1(block.bn1(hidden)))
        return block.conv2(block.relu2(block.bn2(active))) + shortcut

    monkeypatch.setattr(wideresnet.WideBlock, "forward", forward)
    with pytest.raises(AssertionError, match="not close"):
        test_logits_are_those_of_the_network_by_hand(10, 2)


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        # Zagoruyko and Komodakis 2016, tables 4 and 5.
        ({"name": "wrn16_4"}, 2.7),
        ({"name": "wrn28_10"}, 36.5),
        ({"name": "wrn40_4"}, 8.9),
        ({"name": "wideresnet"}, 36.5),
        ({"name": "wideresnet", "depth": 40, "widen_factor": 1}, 0.6),
        ({"name": "wideresnet", "depth": 16, "widen_factor": 8}, 11.0),
    ],
)
def test_sizes_are_those_of_the_paper(settings, millions):
    with torch.device("meta"):
        model = wideresnet.BUILDERS[settings["name"]](ModelConfig(**settings), num_classes=10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    layers = sum(getattr(one, "kernel_size", None) == (3, 3) for one in model.modules())
    expected = {"wrn16_4": 16, "wrn28_10": 28, "wrn40_4": 40}.get(settings["name"], settings.get("depth", 28))
    assert layers == expected - 3  # the paper counts three shortcuts, and not the linear layer
