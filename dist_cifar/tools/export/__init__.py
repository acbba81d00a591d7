"""Exports a trained model for programs that do not have this package: as a `torch.export` program or as ONNX.

Contract: an exported graph takes pixels as Pillow gives them, has the normalisation inside, and has been compared with
the model on test images of its run before it is written. A model card lies beside it.
"""

from dist_cifar.tools.export.write import Export, default_directory, export

__all__ = ["Export", "default_directory", "export"]
