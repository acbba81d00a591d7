"""Smaller images: the area average against torch's pooling, the sizes of a run, and mutants of both."""

from __future__ import annotations

import inspect
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torchvision.transforms import functional as F

from dist_cifar.augment import cpu, reference, resolution
from dist_cifar.augment.image import UNSCALED
from dist_cifar.augment.params import sample_params
from dist_cifar.config import AugmentConfig, ResolutionPhase
from tests.augment.test_cpu import STATS, WILD, differing_images, generated_images, identity, outputs

SIZES = range(4, 33)
PHASES = (ResolutionPhase(until=0.3, size=20), ResolutionPhase(until=0.7, size=24))
NEW = (
    AugmentConfig(crop_padding=2, flip="alternating", cutout_size=12, erasing_probability=0.5),
    AugmentConfig(policy="flip_crop", crop_padding=8, cutout_size=7),
    WILD,
)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return np.concatenate([generated_images(60), noise, noise // 128 * 255, np.full((1, 32, 32, 3), 255, np.uint8)])


# --- the average -------------------------------------------------------------------------------------------------


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).double()


def pooled(images: np.ndarray, size: int) -> torch.Tensor:
    """Torch's area average [n, 3, size, size], of images of which each pixel was made size x size: there every area has
    whole pixels. Of an image itself it counts a pixel that is covered in part as a whole one."""
    large = planes(images).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    return adaptive_avg_pool2d(large, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_average_is_torchs(images, size):
    some = images[::9].copy()
    averages = np.stack([reference.area_average(image, size) for image in some])
    expected = pooled(some, size)
    assert torch.equal(torch.from_numpy(averages).permute(0, 3, 1, 2).double(), expected)
    shrunk = cpu.augment(some, np.arange(len(some)), identity(len(some), size), UNSCALED)
    torch.testing.assert_close(shrunk.double() * 255, expected, rtol=2**-23, atol=0)
    if 32 % size == 0:
        assert torch.equal(expected, interpolate(planes(some), (size, size), mode="area"))


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_equals_the_reference_at_every_size(images, size):
    indices = np.arange(len(images))[:: 2 if size in (16, 20, 24, 28) else 8]
    for config in NEW:
        params = sample_params(config, seed=4, epoch=1, indices=indices, size=size)
        found = cpu.augment(images, indices, params, STATS)
        assert found.shape == (len(indices), 3, size, size) and found.is_contiguous(memory_format=torch.channels_last)
        assert (
            differing_images(outputs(cpu, images, indices, params), outputs(reference, images, indices, params)) == {}
        )


@pytest.mark.parametrize("size", [16, 24, 32])
def test_cutout_and_erasing_are_torchvisions_erase(images, size):
    """At these sizes a cutout of 12 has 6, 9 and 12 pixels."""
    indices, none = np.arange(len(images)), np.zeros((len(images), 4), np.int16)
    params = sample_params(NEW[0], seed=4, epoch=1, indices=indices, size=size)
    whole = cpu.augment(images, indices, _replace(params, box=none, cutout=none), STATS)
    found = cpu.augment(images, indices, params, STATS)
    for image, expected, box, cutout in zip(found, whole, params.box.tolist(), params.cutout.tolist(), strict=True):
        for top, left, height, width in (box, cutout):
            top, left, bottom, right = (
                int(Fraction(edge * size, 32) + Fraction(1, 2)) for edge in (top, left, top + height, left + width)
            )
            expected = F.erase(expected, top, left, bottom - top, right - left, torch.tensor(0.0))
        assert cutout[2:] == [12, 12] and bottom - top == right - left == 12 * size // 32
        assert torch.equal(image, expected)


def _replace(params, **changes):
    return type(params)(**vars(params) | changes)


def test_the_weights_are_those_of_the_paper_and_pencil():
    first, weights = resolution.area_weights(24)
    assert first[:4].tolist() == [0, 1, 2, 4]
    assert weights[:4].tolist() == [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]
    assert resolution.area_weights(16)[1].tolist() == [[0.5, 0.5]] * 16
    assert resolution.units(20) == 8 and set((8 * resolution.area_weights(20)[1]).ravel()) <= set(range(9))


def test_every_average_is_normalised_as_a_division_would():
    """All sums that the averages of an odd size can be, 261,121 of them, and the table of the GPU."""
    triton_gpu = pytest.importorskip("dist_cifar.augment.triton_gpu", exc_type=ImportError)
    units = torch.arange(255 * 1024 + 1).double() / 1024
    mean, std = (torch.tensor(numbers) for numbers in (STATS.mean, STATS.std))
    expected = (units.float() / 255)[:, None].sub(mean) / std
    table = triton_gpu.normalized_values(STATS, torch.float32, 31)
    assert torch.equal(table, expected)
    assert torch.equal(triton_gpu.normalized_values(STATS, torch.bfloat16, 31), expected.bfloat16())
    pixels = units.float().numpy()
    padded = np.resize(pixels, (-(-len(pixels) // 1024), 1024))
    for row, values in zip(padded, np.resize(expected.numpy(), (len(padded), 1024, 3)), strict=True):
        assert np.array_equal(_standardized(row), values)


def _standardized(row: np.ndarray) -> np.ndarray:
    from dist_cifar.augment import cpu_pass

    out = np.empty(3 * len(row), np.float32)
    cpu_pass._standardize_averages(np.tile(row, 3), len(row), cpu._scales(STATS), out)
    return out.reshape(-1, 3)


# --- the sizes of a run ------------------------------------------------------------------------------------------


def test_the_size_is_a_function_of_the_step_and_the_length():
    assert [resolution.size_at(PHASES, step, 10) for step in range(10)] == [20] * 3 + [24] * 4 + [32] * 3
    assert [resolution.size_at(PHASES, step, 5) for step in range(5)] == [20] * 2 + [24] * 2 + [32]
    assert {resolution.size_at((), step, 10) for step in range(10)} == {32}
    assert {resolution.size_at((ResolutionPhase(until=1.0, size=8),), step, 3) for step in range(3)} == {8}
    assert resolution.sizes(PHASES) == (20, 24, 32) and resolution.sizes(()) == (32,)


# --- mutants -----------------------------------------------------------------------------------------------------

MUTANTS = {
    "a fraction as a float": ("as_written(phase.until)", "Fraction(phase.until)"),
    "a phase one step longer": ("if done < ", "if done <= "),
    "areas start one pixel late": ("first[:, None] + np.arange(width)", "first[:, None] + 1 + np.arange(width)"),
    "areas end early": ("start + IMAGE_SIZE, pixel + size", "start + IMAGE_SIZE - 1, pixel + size"),
    "one tap too few": ("(IMAGE_SIZE * (j + 1) - 1) // size", "(IMAGE_SIZE * (j + 1) - 1) // size - 1"),
}


def checks(module: types.ModuleType, images: np.ndarray) -> None:
    """Raises `AssertionError` where a mutant differs."""
    sizes = [module.size_at((ResolutionPhase(until=0.7, size=24),), step, 10) for step in range(10)]
    assert sizes == [24] * 7 + [32] * 3
    assert module.size_at((ResolutionPhase(until=0.1, size=24),), 1, 10) == 32
    for size in (20, 24, 31):
        first, weights = module.area_weights(size)
        matrix = np.zeros((size, 32))
        for j, (start, row) in enumerate(zip(first, weights, strict=True)):
            matrix[j, start : start + len(row)] = row
        average = np.einsum("iy,yxc,jx->ijc", matrix, images[0].astype(float), matrix)
        assert np.array_equal(average, reference.area_average(images[0], size))


def test_the_checks_pass_the_module_itself(images):
    checks(resolution, images)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_catch_a_mutant(images, name):
    source, (original, mutated) = inspect.getsource(resolution), MUTANTS[name]
    assert source.count(original) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(original, mutated), vars(mutant))
    with pytest.raises(AssertionError):
        checks(mutant, images)
