"""Turns a model into the bytes of an exported graph, and compares what the graph computes with the model.

Contract: weights and arithmetic are float32. Nothing is written to disk.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dist_cifar.errors import CheckpointError, ConfigError

CHECKED_IMAGES = 256
_TOLERANCE = 1e-3
"""Allowed difference of a logit, relative to the largest: other kernels add up float32 in another order."""

Compute = Callable[[torch.Tensor], npt.NDArray[np.float32]]
"""Runs an exported graph: uint8 [n, 32, 32, 3] to logits float32 [n, classes]."""


def to_torch(graph: nn.Module, example: torch.Tensor, metadata: Mapping[str, Any]) -> tuple[bytes, Compute]:
    """Exports with `torch.export`, for any batch size; `metadata` is the extra file `metadata.json`."""
    program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"metadata.json": json.dumps(metadata)})
    data.seek(0)
    module = torch.export.load(data).module()
    return data.getvalue(), lambda images: module(images).detach().numpy()


def to_onnx(graph: nn.Module, example: torch.Tensor, metadata: Mapping[str, Any]) -> tuple[bytes, Compute]:
    """Exports to ONNX, for any batch size; `metadata` becomes ONNX metadata properties.

    Raises `ConfigError` if the packages are missing, or older than torch needs.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch needs it

        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    except ImportError as error:
        raise ConfigError(f"--to onnx: {error.name} is not installed; pip install --upgrade -e '.[onnx]'") from None
    assert program is not None
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def largest_difference(graph: nn.Module, compute: Compute, images: torch.Tensor) -> float:
    """The largest difference of a logit between `graph` and its export, in batches of 1, 55 and the rest.

    Raises `CheckpointError` if it is larger than rounding explains.
    """
    with torch.no_grad():
        expected = graph(images).numpy()
    found = np.concatenate([compute(part) for part in torch.tensor_split(images, (1, 56)) if len(part)])
    difference = float(np.abs(found - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise CheckpointError(f"export: logits of the graph differ from the model's by {difference:.3g}; not written")
    return difference
