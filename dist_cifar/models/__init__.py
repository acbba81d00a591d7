"""The networks by name. A new family is a file beside `resnet.py`, with builders that are entered in `MODELS`; one from
outside the package is named in the config.

Nothing here knows of ranks, devices, the training, or of how `dist_cifar.ops` makes a network faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.config import ModelConfig
from dist_cifar.errors import ConfigError, listed, one_line
from dist_cifar.models import resnet, speednet, wideresnet

_DEFAULTS = ModelConfig()

ModelBuilder = Callable[..., nn.Module]
"""Called as `build(config: ModelConfig, *, num_classes: int)`: makes a network from float32 [n, 3, 32, 32] to logits
float32 [n, num_classes], on the CPU, and draws its weights from torch's global generator."""

MODELS: dict[str, ModelBuilder] = {
    **resnet.BUILDERS,
    **wideresnet.BUILDERS,
    "speednet": speednet.build_speednet,
}
"""The builder of every network by its name."""
_SETTINGS: dict[str, tuple[str, ...]] = {
    "norm": (*resnet.BUILDERS, *wideresnet.BUILDERS),
    "depth": ("wideresnet", "speednet"),
    "widen_factor": ("wideresnet",),
    "widths": ("speednet",),
    "whitening_eps": ("speednet",),
}
"""The networks that read a field of `ModelConfig`, for each field that not all networks read."""


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """Builds the network of `config` on the CPU: float32 [n, 3, 32, 32] to logits float32 [n, num_classes].

    The weights are the same for the same arguments, on every rank and whatever the global generator holds, which is
    left as it was. Raises `ConfigError` where a network from outside the package fails or is none, and for a setting
    that the network does not read.
    """
    for field, names in _SETTINGS.items():
        value = getattr(config, field)
        if config.name not in names and value != getattr(_DEFAULTS, field):
            raise ConfigError(
                f"model.{field}: {value} was set, which model.name={config.name} does not read; it is for"
                f" {listed(list(names))}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name in MODELS:
            return MODELS[config.name](config, num_classes=num_classes)
        return _build_own(config, num_classes)


def check_image_sizes(model: nn.Module, sizes: Sequence[int]) -> None:
    """Raises `ConfigError` where a forward and backward pass of `model` fails with images of one of `sizes`, in pixels.

    A copy is tried, in training mode, on two images; the global generator is left as it was.
    """
    for size in sizes:
        trial = copy.deepcopy(model).train()
        try:
            with torch.random.fork_rng(devices=[]):
                trial(torch.zeros(2, 3, size, size)).sum().backward()
        except Exception as error:
            raise ConfigError(
                f"augment.resolution: the network does not take images of {size}x{size} ({one_line(error)}); choose a"
                " larger size"
            ) from None


def _build_own(config: ModelConfig, num_classes: int) -> nn.Module:
    """Builds a network from outside the package, and tries a copy of it on two images."""
    origin = f"model.name={config.name}"
    build = plugins.find("model", "model.name", config.name)
    try:
        model = build(num_classes=num_classes, **config.options)
    except Exception as error:
        raise plugins.broken(origin, error, "building the model") from None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{origin}: returns {type(model).__name__}; it must return a torch.nn.Module")
    parameters = dict(model.named_parameters())
    if not any(one.requires_grad for one in parameters.values()):
        raise ConfigError(f"{origin}: the model has no parameter to train")
    odd = next((name for name, one in parameters.items() if one.dtype != torch.float32 or one.is_meta), None)
    if odd is not None:
        raise ConfigError(f"{origin}: its parameter {odd} is {parameters[odd].dtype}; float32 on the CPU is needed")
    trial = copy.deepcopy(model)
    try:
        logits = trial(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if shape == (2, num_classes):
            logits.sum().backward()
    except Exception as error:
        raise plugins.broken(origin, error, f"its forward pass of [2, 3, {IMAGE_SIZE}, {IMAGE_SIZE}]") from None
    if shape != (2, num_classes):
        raise ConfigError(f"{origin}: its forward pass of two images returns {shape}; must be [2, {num_classes}]")
    unused = next((name for name, one in trial.named_parameters() if one.requires_grad and one.grad is None), None)
    if unused is not None:
        raise ConfigError(
            f"{origin}: its parameter {unused} has no effect on the output, so no gradient; use it, or set its"
            " requires_grad to False"
        )
    _require_known_buffers(model, trial, origin)
    return model


def _require_known_buffers(model: nn.Module, seen: nn.Module, origin: str) -> None:
    """Raises `ConfigError` for a buffer that a forward pass changes and that strategies could not average over ranks.

    `seen` is a copy of `model` after one forward pass. Buffers of float32 that are saved are averaged; those of int64
    are counts, and must not depend on the images.
    """
    saved, again = model.state_dict(), copy.deepcopy(model)
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    first = {name: buffer.clone() for name, buffer in seen.named_buffers()}
    try:
        for network in (seen, again):
            network(images)
    except Exception as error:
        raise plugins.broken(origin, error, "its second forward pass") from None
    others = dict(again.named_buffers())
    for name, buffer in seen.named_buffers():
        if name not in first or (name in saved and buffer.dtype == torch.float32):
            continue
        is_count = name in saved and buffer.dtype == torch.int64
        if not torch.equal(first[name], others[name] if is_count else buffer):
            raise ConfigError(
                f"{origin}: its forward pass changes the buffer {name} ({buffer.dtype}, persistent={name in saved}),"
                " which could not be averaged over ranks; keep it in float32, persistent"
            )
