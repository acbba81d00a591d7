"""What an image is, and that every compiled kernel was written for that."""

from __future__ import annotations

import numpy as np
import pytest

from dist_cifar.augment import cpu, cpu_pass, params
from dist_cifar.augment.image import IMAGE_SHAPE, IMAGE_SIZE, UNSCALED, are_images, require_images


def test_the_kernels_have_the_size_of_an_image():
    assert (cpu_pass._SIDE, params._SIDE) == (IMAGE_SIZE, IMAGE_SIZE)
    assert IMAGE_SHAPE == (IMAGE_SIZE, IMAGE_SIZE, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 33, 32, 3), np.uint8),
        np.zeros((2, 32, 31, 3), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.uint8)[:, ::-1],
    ],
)
def test_other_images_are_refused_with_one_message(array):
    assert not are_images(array)
    message = r"^images must be contiguous uint8 \[n, 32, 32, 3\], found .*\[[\d, ]*\]$"
    with pytest.raises(ValueError, match=message):
        require_images(array)
    with pytest.raises(ValueError, match=message):
        cpu.normalize(array, [0], UNSCALED)


def test_images_are_let_through():
    for n in (0, 1, 5):
        require_images(np.zeros((n, *IMAGE_SHAPE), np.uint8))
