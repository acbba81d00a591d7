"""Initial weights that are keyed by the names of the parameters.

Contract: what is drawn for a parameter is a function of (key, name, shape) alone, not of the order in which the layers
were made: a layer that is added to a network leaves the weights of the others as they were.
"""

from __future__ import annotations

import hashlib

import torch


def new_key() -> int:
    """Draws a key from torch's global generator: a network's builder calls it once, before anything else is drawn."""
    return int(torch.randint(2**62, ()))


def generator_for(key: int, name: str) -> torch.Generator:
    """The generator of the parameter `name`, on the CPU, seeded by 63 bits of SHA-256 of `key` and `name`."""
    digest = hashlib.sha256(f"{key} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
