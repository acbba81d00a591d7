"""The compiled kernel against torchvision and PIL, bit for bit, and mutants of it that the same comparison catches."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import os
import subprocess
import sys
import threading
import types
import zipfile
from itertools import product
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomCrop
from torchvision.transforms import functional as F

from dist_cifar.augment import cpu, cpu_pass, reference
from dist_cifar.augment.image import ImageStats
from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.config import AugmentConfig
from dist_cifar.ops import numba_jit
from tests import PATIENCE_SECONDS, REPOSITORY

STATS = ImageStats(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
DEFAULT = AugmentConfig()
WILD = AugmentConfig(
    rotation_degrees=180.0,
    brightness=2.0,
    contrast=2.0,
    saturation=2.0,
    sharpness_factor=3.0,
    sharpness_probability=0.7,
    erasing_probability=0.9,
    erasing_area=(0.0, 0.95),
    erasing_aspect=(0.1, 10.0),
)
BOXES = [(0, 0, 5, 7), (0, 25, 5, 7), (27, 0, 5, 7), (27, 25, 5, 7), (0, 0, 31, 31), (1, 1, 31, 31), (31, 31, 1, 1)]


def natural_images(count: int) -> np.ndarray:
    """CIFAR-10 test images from a zip, at DIST_CIFAR_REAL_DATA or beside the clone; generated ones if there is none.

    uint8 [count, 32, 32, 3].
    """
    beside = REPOSITORY.parent / "shared/data/cifar10-jpeg.zip"
    path = Path(os.environ.get("DIST_CIFAR_REAL_DATA", beside))
    if not path.is_file():
        return generated_images(count)
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("test/") and name.endswith(".jpg"))
        picked = names[:: len(names) // count][:count]
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in picked])


def generated_images(count: int) -> np.ndarray:
    """Gradients, a disc and a bar of saturated colours, and noise, all of random strength: uint8 [count, 32, 32, 3]."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 31.0
    images = np.empty((count, 32, 32, 3))
    for image in images:
        colours = generator.choice([0, 40, 128, 200, 255], (4, 3)) + generator.normal(0, 10, (4, 3))
        image[:] = colours[0] + x[..., None] * (colours[1] - colours[0]) * generator.uniform(-1, 1)
        image[:] += y[..., None] * generator.normal(0, 80, 3)
        centre, radius = generator.uniform(0, 1, 2), generator.uniform(0.1, 0.5)
        image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colours[2]
        start = generator.integers(0, 28)
        image[:, start : start + 4] = colours[3]
        image += generator.normal(0, generator.choice([0, 4, 40]), image.shape)
    return np.clip(images, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    flat = np.repeat(np.array([0, 255, 128, 1], np.uint8), 32 * 32 * 3).reshape(4, 32, 32, 3)
    noise = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    extremes = noise // 128 * 255
    return np.concatenate([natural_images(900), generated_images(200), noise, extremes, flat])


def identity(n: int, size: int = 32) -> AugmentParams:
    return AugmentParams(
        shift=np.zeros((n, 2), np.int16),
        flip=np.zeros(n, np.bool_),
        angle=np.zeros(n),
        order=np.tile(np.arange(3, dtype=np.uint8), (n, 1)),
        factors=np.ones((n, 3)),
        sharpness=np.ones(n),
        box=np.zeros((n, 4), np.int16),
        cutout=np.zeros((n, 4), np.int16),
        size=size,
    )


def outputs(implementation: types.ModuleType, images, indices, params) -> dict[str, torch.Tensor]:
    """All that the kernel gives, as bits. The reference gives its bfloat16 through torch."""
    if implementation is reference:
        pixels = reference.augment_pixels(images[indices], params)
        batch = reference.augment(images[indices], params, STATS)
        rounded = batch.to(torch.bfloat16)
    else:
        pixels = implementation.augment_pixels(images, indices, params)
        batch = implementation.augment(images, indices, params, STATS)
        rounded = torch.empty_like(batch, dtype=torch.bfloat16)
        implementation.augment(images, indices, params, STATS, rounded)
    bits, rounded_bits = batch.view(torch.int32), rounded.view(torch.int16)
    return {"pixels": torch.from_numpy(pixels), "float32": bits, "bfloat16": rounded_bits}


def differing_images(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, int]:
    """For each output in which any image differs, the number of images that do. Empty if all bits are equal."""
    counts = {name: int((found[name] != expected[name]).flatten(1).any(1).sum()) for name in expected}
    return {name: count for name, count in counts.items() if count}


def compare(images, indices, params) -> dict[str, int]:
    return differing_images(outputs(cpu, images, indices, params), outputs(reference, images, indices, params))


# --- equality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "rounds"), [(DEFAULT, 9), (WILD, 8)], ids=["default", "wild"])
def test_whole_chain_equals_the_reference(images, config, rounds):
    for epoch in range(rounds):  # 17 rounds of 1,224 images: 20,808 sets of parameters
        indices = np.random.default_rng(epoch).permutation(len(images))
        params = sample_params(config, seed=11, epoch=epoch, indices=indices)
        assert compare(images, indices, params) == {}


ALONE = {
    "crop": lambda random, n: {"shift": random.integers(-4, 5, (n, 2)).astype(np.int16)},
    "flip": lambda random, n: {"flip": random.random(n) < 0.5},
    "rotation": lambda random, n: {"angle": random.uniform(-360, 360, n)},
    "brightness": lambda random, n: {"factors": np.column_stack([random.uniform(0, 3, n), np.ones((n, 2))])},
    "contrast": lambda random, n: {"factors": np.insert(np.ones((n, 2)), 1, random.uniform(0, 3, n), axis=1)},
    "saturation": lambda random, n: {"factors": np.column_stack([np.ones((n, 2)), random.uniform(0, 3, n)])},
    "sharpness": lambda random, n: {"sharpness": random.uniform(0, 3, n)},
    "order": lambda random, n: {
        "order": random.permuted(identity(n).order, axis=1),
        "factors": random.uniform(0.5, 1.5, (n, 3)),
    },
    "erasing": lambda random, n: {"box": np.array(BOXES, np.int16)[random.integers(0, len(BOXES), n)]},
    "cutout": lambda random, n: {"cutout": np.array(BOXES, np.int16)[random.integers(0, len(BOXES), n)]},
    "crop by 8": lambda random, n: {"shift": random.integers(-8, 9, (n, 2)).astype(np.int16)},
    "size": lambda random, n: {"size": 24},
}


@pytest.mark.parametrize("operation", ALONE)
def test_each_operation_alone_equals_the_reference(images, operation):
    n = len(images)
    params = dataclasses.replace(identity(n), **ALONE[operation](np.random.default_rng(5), n))
    assert compare(images, np.arange(n), params) == {}


@pytest.mark.parametrize("padding", [2, 4, 8])
def test_flip_crop_equals_torchvision_at_every_place(images, monkeypatch, padding):
    """All crops, with and without flip, against torchvision's own transform."""
    places = [(top, left, flip) for top, left in product(range(2 * padding + 1), repeat=2) for flip in (False, True)]
    indices = np.random.default_rng(6).choice(len(images), len(places), replace=False)
    crop, expected = RandomCrop(32, padding=padding, padding_mode="reflect"), []
    for index, (top, left, flip) in zip(indices, places, strict=True):
        monkeypatch.setattr(crop, "get_params", lambda image, size, top=top, left=left: (top, left, *size))
        image = crop(Image.fromarray(images[index]))
        expected.append(np.asarray(F.hflip(image) if flip else image))
    table = np.array(places)
    params = dataclasses.replace(
        identity(len(places)), shift=(table[:, :2] - padding).astype(np.int16), flip=table[:, 2].astype(np.bool_)
    )
    assert np.array_equal(cpu.augment_pixels(images, indices, params), expected)
    assert compare(images, indices, params) == {}


@pytest.mark.parametrize("policy", ["flip_crop", "none"])
def test_other_policies_equal_the_reference(images, policy):
    indices = np.arange(len(images))
    params = sample_params(AugmentConfig(policy=policy), seed=1, epoch=0, indices=indices)
    assert compare(images, indices, params) == {}
    if policy == "none":
        assert np.array_equal(cpu.augment_pixels(images, indices, params), images)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.5, 1 - 2**-25, 1.0, 1 + 2**-23, 2.0, 3.0, 255.0, 1e6])
def test_edge_factors(images, factor):
    n = 100
    indices = np.arange(len(images) - n, len(images))
    for column in range(4):
        factors = np.ones((n, 4))
        factors[:, column] = factor
        params = dataclasses.replace(identity(n), factors=factors[:, :3].copy(), sharpness=factors[:, 3].copy())
        assert compare(images, indices, params) == {}


def test_edge_angles(images):
    exact = [0, 30, 45, 60, 90, 135, 180, 270, 360]
    tiny = [1e-300, 1e-17, 1e-14, 1e-9, 1e-6, 1e-4, 1e-3]
    angles = [sign * (angle + offset) for angle in exact for offset in [0, *tiny] for sign in (1, -1)]
    for flip in (False, True):
        params = dataclasses.replace(
            identity(len(angles)), angle=np.array(angles), flip=np.full(len(angles), flip, np.bool_)
        )
        assert compare(images, np.full(len(angles), 7), params) == {}


def test_normalisation_is_exact_for_any_mean_and_deviation():
    """Every value of a byte, 1,000 means and deviations: the quotients come without a division."""
    values = np.arange(1024, dtype=np.uint8).repeat(3).reshape(1, 32, 32, 3)
    random = np.random.default_rng(2)
    for _ in range(1_000):
        mean, std = random.uniform(0, 1, 3).tolist(), np.exp(random.uniform(-4, 1, 3)).tolist()
        expected = F.normalize(F.to_tensor(values[0]), mean, std)
        assert torch.equal(cpu.normalize(values, [0], ImageStats(mean, std))[0], expected), (mean, std)


def test_normalize_equals_augment_without_operations(images):
    indices = np.random.default_rng(3).permutation(len(images))[:300]
    expected = reference.augment(images[indices], identity(300), STATS)
    assert torch.equal(cpu.normalize(images, indices, STATS), expected)
    rounded = torch.empty_like(expected, dtype=torch.bfloat16)
    assert cpu.normalize(images, indices, STATS, rounded) is rounded
    assert torch.equal(rounded, expected.to(torch.bfloat16))


# --- contract ----------------------------------------------------------------------------------------------------


def test_result_does_not_depend_on_the_batch(images):
    indices = np.random.default_rng(4).permutation(len(images))[:200]
    whole = cpu.augment(images, indices, sample_params(WILD, seed=1, epoch=2, indices=indices), STATS)
    for some in (indices[::-1], indices[50:51], indices[[3, 3, 90]]):
        part = cpu.augment(images, some, sample_params(WILD, seed=1, epoch=2, indices=some), STATS)
        places = [int(np.flatnonzero(indices == index)[0]) for index in some]
        assert torch.equal(part, whole[places])


def test_threads_give_the_same_bits(images):
    indices = np.arange(len(images))
    params = sample_params(WILD, seed=1, epoch=2, indices=indices)
    expected = cpu.augment(images, indices, params, STATS)
    found = [torch.empty_like(expected) for _ in range(3)]
    threads = [threading.Thread(target=cpu.augment, args=(images, indices, params, STATS, out)) for out in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in found)


def test_reads_a_read_only_memory_map(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    indices = [5, 900, 2]
    params = sample_params(DEFAULT, seed=0, epoch=0, indices=indices)
    compilations = len(cpu_pass.augment_batch.signatures)
    assert torch.equal(cpu.augment(mapped, indices, params, STATS), cpu.augment(images, indices, params, STATS))
    assert len(cpu_pass.augment_batch.signatures) == compilations


def test_output_is_ready_for_the_model(images):
    out = cpu.augment(images, [1, 2], sample_params(DEFAULT, seed=0, epoch=0, indices=[1, 2]), STATS)
    assert out.shape == (2, 3, 32, 32) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert cpu.augment(images, [], sample_params(DEFAULT, seed=0, epoch=0, indices=[]), STATS).shape == (
        0,
        3,
        32,
        32,
    )


def test_refuses_what_the_compiled_code_cannot_check(images):
    one = identity(1)
    for index in (-1, len(images)):
        with pytest.raises(IndexError, match=f"of {len(images)} images"):
            cpu.augment(images, [index], one, STATS)
    with pytest.raises(ValueError, match="images must be contiguous uint8"):
        cpu.augment(images.astype(np.float32), [0], one, STATS)
    with pytest.raises(ValueError, match="images must be contiguous uint8"):
        cpu.augment(images[:, ::-1], [0], one, STATS)
    with pytest.raises(ValueError, match="parameters of 1 images for 2 indices"):
        cpu.augment(images, [0, 1], one, STATS)
    with pytest.raises(ValueError, match=r"out must be channels-last \[1, 3, 32, 32\]"):
        cpu.augment(images, [0], one, STATS, torch.empty(1, 3, 32, 32))
    with pytest.raises(ValueError, match="out must be float32 or bfloat16"):
        cpu.augment(images, [0], one, STATS, cpu.augment(images, [0], one, STATS).double())


# --- mutants: the comparison above catches each ------------------------------------------------------------------

MUTANTS = {
    "crop moved the other way": ("_I(_I(y) + down)", "_I(_I(y) - down)"),
    "crop repeats the edge": ("abs(_I(_I(x) + right))", "max(_I(0), _I(_I(x) + right))"),
    "crop reflects the edge too": ("abs(_I(_I(x) + right))", "max(_I(_I(x) + right), ~_I(_I(x) + right))"),
    "flip inverted": ("if flip else 0", "if not flip else 0"),
    "rotation centre shifted": ("centre = _SIDE / 2", "centre = (_SIDE - 1) / 2"),
    "rounded, not truncated": ("return np.float32(_I(number))", "return np.float32(_I(number + _HALF))"),
    "not clipped at black": ("if mixed > _ZERO else _ZERO", "if mixed > _ZERO else -mixed"),
    "order swapped": ("order[i, k]", "order[i, 2 - k]"),
    "mean of contrast not rounded": ("(total + _PIXELS // 2) // _PIXELS", "total / _PIXELS"),
    "grey truncated": ("_fma(blue, _BLUE_SHARE, _HALF)", "blue * _BLUE_SHARE"),
    "border smoothed": ("value if on_ring else smooth", "smooth"),
    "box one row too high": ("_scaled(top + height, side))", "_scaled(top + height, side) + 1)"),
    "edge of a box rounded down": ("(edge * side + _SIDE // 2)", "(edge * side)"),
    "cutout as wide as the box": ("cutout[i, 2], cutout[i, 3]", "cutout[i, 2], box[i, 3]"),
    "areas not weighted": ("total += weights[x, k] *", "total += _HALF *"),
    "average divided by 255 with one product": (
        "unit = _divide(planes[channel * pixels + p], _WHITE, _UNIT_HIGH, _UNIT_LOW)",
        "unit = planes[channel * pixels + p] * _UNIT_HIGH",
    ),
    "quotient by one product": ("return _fma(number, high, number * low)", "return number * high"),
    "bfloat16 truncated": (" + np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))", ""),
}
IN_THE_TENSOR = {"float32", "bfloat16"}
SEEN_IN = {
    "box one row too high": IN_THE_TENSOR,
    "edge of a box rounded down": IN_THE_TENSOR,
    "cutout as wide as the box": IN_THE_TENSOR,
    "areas not weighted": IN_THE_TENSOR,
    "bfloat16 truncated": {"bfloat16"},
}
AT_OTHER_SIZES = ("edge of", "areas not", "average divided")
"""How the mutants begin that only an image of another size shows."""


@pytest.fixture(scope="module")
def mutant_case(images):
    indices = np.arange(0, len(images), 8)
    params = sample_params(WILD, seed=2, epoch=0, indices=indices)
    params = dataclasses.replace(
        params,
        shift=sample_params(AugmentConfig(policy="flip_crop"), seed=2, epoch=0, indices=indices).shift,
        angle=params.angle / 9,
        factors=0.7 + 0.2 * params.factors,
        cutout=sample_params(AugmentConfig(cutout_size=9), seed=2, epoch=0, indices=indices).cutout,
    )
    return indices, params, outputs(reference, images, indices, params)


@pytest.fixture(scope="module")
def small_case(images, mutant_case):
    indices, params, _ = mutant_case
    params = dataclasses.replace(params, size=20)
    return indices, params, outputs(reference, images, indices, params)


def test_the_comparison_passes_the_kernel_itself(images, mutant_case, small_case):
    for indices, params, expected in (mutant_case, small_case):
        assert differing_images(outputs(cpu, images, indices, params), expected) == {}


def mutant_of_kernel(original: str, mutated: str) -> types.SimpleNamespace:
    """The kernel with a piece of its source changed; what does not lead to that piece is not compiled again."""
    source = inspect.getsource(cpu_pass) + inspect.getsource(cpu)
    assert source.count(original) == 1
    texts, uses = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first_line = min(part.lineno for part in (node, *node.decorator_list))
            texts[node.name] = "\n".join(source.splitlines()[first_line - 1 : node.end_lineno])
            uses[node.name] = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    changed = {name for name, text in texts.items() if original in text}
    while callers := {name for name in texts if uses[name] & changed} - changed:
        changed |= callers
    namespace = dict(vars(cpu_pass) | vars(cpu), compiled=numba_jit.inlined)  # a mutant must not reach the cache
    for name in changed:
        exec("from __future__ import annotations\n" + texts[name].replace(original, mutated), namespace)
    return types.SimpleNamespace(**namespace)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_catches_a_mutant(images, mutant_case, small_case, name):
    indices, params, expected = small_case if name.startswith(AT_OTHER_SIZES) else mutant_case
    mutant = mutant_of_kernel(*MUTANTS[name])
    assert SEEN_IN.get(name, {"float32"}) <= differing_images(outputs(mutant, images, indices, params), expected).keys()


# --- the cache ---------------------------------------------------------------------------------------------------

WARM_UP = """
import hashlib, logging, sys
import numpy as np
from dist_cifar.ops import numba_jit
from dist_cifar.augment import cpu
from dist_cifar.augment.image import UNSCALED
from dist_cifar.augment.params import sample_params
from dist_cifar.config import AugmentConfig
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
numba_jit.warm_up(cpu.warm_up)
images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
params = sample_params(AugmentConfig(), seed=0, epoch=0, indices=range(9))
print(hashlib.sha256(cpu.augment(images, range(9), params, UNSCALED).numpy().tobytes()).hexdigest())
"""


def test_a_cold_cache_is_announced_and_survives_two_ranks_at_once(tmp_path):
    def start() -> subprocess.Popen:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.Popen([sys.executable, "-c", WARM_UP], env=environment, stdout=subprocess.PIPE, text=True)

    ranks = [start(), start()]
    together = [rank.communicate(timeout=PATIENCE_SECONDS)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    said = [line for lines in together for line in lines[:-1] if not line.startswith("waiting for another process")]
    assert len(said) == 1 and said[0].startswith("compiling kernels for this machine (once")
    assert together[0][-1] == together[1][-1]


def test_compiles_without_a_cache_where_nothing_can_be_written(monkeypatch):
    njit = numba.njit

    def refuse_cache(*, cache=False, **options):
        def decorate(function):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return njit(**options)(function)

        return decorate

    monkeypatch.setattr(numba, "njit", refuse_cache)
    assert numba_jit.compiled(lambda number: number + 1)(2) == 3


LOAD = """
import sys
from dist_cifar.ops import numba_jit
from dist_cifar.augment import cpu
sys.exit(not numba_jit.load(cpu.warm_up))
"""


def test_loading_compiles_nothing(tmp_path):
    def loads() -> bool:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", LOAD], env=environment, timeout=PATIENCE_SECONDS).returncode == 0

    assert not loads() and not list(tmp_path.rglob("*.nbc"))
    subprocess.run([sys.executable, "-c", WARM_UP], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, check=True)
    assert loads()
