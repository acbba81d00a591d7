"""The Triton kernel against the compiled one, bit for bit, and mutants of it that the same comparison catches.

On a GPU the tests marked `gpu` compare what it computes. Without one, two things stand in for that: Triton's
interpreter runs the kernel's source on the CPU, operation by operation and with checks of int32 for overflow; and the
instructions compiled for two GPUs are searched for float arithmetic that the source does not have. They do not show
that a GPU moves pixels between its threads as the interpreter does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_cifar.augment import cpu, cpu_pass
from dist_cifar.augment import resolution as areas
from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.config import AugmentConfig
from tests import PATIENCE_SECONDS, REPOSITORY
from tests.augment.test_cpu import ALONE, DEFAULT, STATS, WILD, generated_images, identity, natural_images

pytest.importorskip("triton")
from dist_cifar.augment import triton_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
Case = tuple[np.ndarray, AugmentParams]
"""Indices and their parameters."""


def compare(module: types.ModuleType, images, case: Case, dtype: torch.dtype, where: torch.device) -> int:
    """The number of images in which any bit differs from the compiled kernel's."""
    indices, params = case
    augment = module.DeviceAugmenter(images, STATS, where, dtype)
    found = augment(indices, params).cpu()
    expected = torch.empty_like(found)
    cpu.augment(images, indices, params, STATS, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    return int((found.view(BITS[dtype]) != expected.view(BITS[dtype])).flatten(1).any(1).sum())


def hard_images() -> np.ndarray:
    """uint8 [74, 32, 32, 3]: shapes and gradients, noise, black and white noise, plain colours."""
    flat = np.repeat(np.array([0, 255, 128, 1], np.uint8), 32 * 32 * 3).reshape(4, 32, 32, 3)
    noise = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return np.concatenate([generated_images(40), noise, noise[:10] // 128 * 255, flat])


def some(images: np.ndarray, n: int) -> np.ndarray:
    return np.random.default_rng(n).permutation(np.arange(max(n, len(images))) % len(images))[:n]


def chain(images: np.ndarray, config, n: int, epoch: int = 0) -> Case:
    indices = some(images, n)
    return indices, sample_params(config, seed=11, epoch=epoch, indices=indices)


def alone(images: np.ndarray, operation: str, n: int) -> Case:
    changes = ALONE[operation](np.random.default_rng(5), n)
    return some(images, n), dataclasses.replace(identity(n), **changes)


def edge_factors(images: np.ndarray) -> Case:
    values = [0.0, 1e-40, 1e-30, 0.5, 1 - 2**-25, 1 + 2**-23, 2.0, 3.0, 255.0, 1e6]
    factors = np.ones((4 * len(values), 4))
    for column in range(4):
        factors[column::4, column] = values
    params = identity(len(factors))
    return some(images, len(factors)), dataclasses.replace(params, factors=factors[:, :3], sharpness=factors[:, 3])


def edge_angles(images: np.ndarray) -> Case:
    angles = np.array([0.0, 90, 180, 270, 360, -90, 45, 30, 60, 1e-300, -1e-14, 90 + 1e-9, 180 - 1e-6, 45 + 1e-3])
    flip = np.arange(len(angles)) % 2 == 0
    return np.full(len(angles), 45), dataclasses.replace(identity(len(angles)), angle=angles, flip=flip)


def round_factors(images: np.ndarray, n: int) -> Case:
    """Factors of one decimal: their products with whole numbers lie next to whole numbers, where a fused multiply-add
    and truncation give another result than two roundings."""
    indices, params = chain(images, WILD, n)
    generator = np.random.default_rng(6)
    tenths = generator.choice([0.6, 0.7, 0.9, 1.1, 1.3, 1.7], (n, 4))
    shift = sample_params(AugmentConfig(policy="flip_crop"), seed=2, epoch=0, indices=indices).shift
    changes = {"shift": shift, "angle": params.angle / 9, "factors": tenths[:, :3], "sharpness": tenths[:, 3]}
    return indices, dataclasses.replace(params, **changes)


def smaller(images: np.ndarray, n: int, size: int) -> Case:
    """All operations, a cutout too, on images that are then averaged."""
    indices, params = round_factors(images, n)
    cutout = sample_params(AugmentConfig(cutout_size=9), seed=2, epoch=0, indices=indices).cutout
    return indices, dataclasses.replace(params, cutout=cutout, size=size)


# --- through the interpreter -------------------------------------------------------------------------------------

CASES = {
    **{operation: lambda images, operation=operation: alone(images, operation, 6) for operation in ALONE},
    "edge factors": edge_factors,
    "edge angles": edge_angles,
    **{f"size {size}": lambda images, size=size: smaller(images, 20, size) for size in (24, 20, 16, 31, 4)},
    "default chain": lambda images: chain(images, DEFAULT, 60),
    "wild chain": lambda images: chain(images, WILD, 60),
    "round factors": lambda images: round_factors(images, 30),
    "no image": lambda images: chain(images, DEFAULT, 0),
}
MUTANTS = {
    "crop moved the other way": ("+ tl.load(row + _SHIFT_DOWN)", "- tl.load(row + _SHIFT_DOWN)"),
    "crop repeats the edge": ("tl.abs(position))", "tl.maximum(position, 0))"),
    "flip inverted": ("np.where(params.flip, 31, 0)", "np.where(params.flip, 0, 31)"),
    "rotation shifted": ("left + cos * 0.5", "left + cos"),
    "rounded, not truncated": ("tl.maximum(mixed, 0.0)", "tl.maximum(mixed + 0.5, 0.0)"),
    "product and sum fused": (
        "degenerate.to(tl.float32) + alpha * (value - degenerate).to(tl.float32)",
        # One rounding, of a sum that float64 holds exactly; the fma of an older interpreter rounds twice.
        "(degenerate.to(tl.float64) + alpha.to(tl.float64) * (value - degenerate).to(tl.float64)).to(tl.float32)",
    ),
    "order swapped": ("] = params.order", "] = params.order[:, ::-1]"),
    "mean of contrast not rounded": ("(tl.sum(grey) + _PIXELS // 2) // _PIXELS", "tl.sum(grey).to(tl.float32) / 1024"),
    "grey truncated": (" + 32768)", ")"),
    "border smoothed": ("tl.where(on_ring, plane, ", "tl.where(on_ring & (y > 31), plane, "),
    "box one row too high": ("erased_boxes(params)", "(erased_boxes(params) + [0, 0, 1, 0])"),
}


MUTANTS_OF_AVERAGES = {
    "areas start late": ("tl.maximum(j * _SIDE, pixel * SIZE)", "tl.maximum(j * _SIDE + 4, pixel * SIZE)"),
    "areas without shares": ("tl.maximum(overlap, 0) // (_SIDE // UNITS)", "tl.minimum(tl.maximum(overlap, 0), 1)"),
    "rows averaged alone": ("strips += _share(y, pixel, SIZE, UNITS)", "strips += (k == 0)"),
    "one tap too few": ("TAPS=taps(size)", "TAPS=taps(size) - 1"),
    "cutout forgotten": ("_outside(row + _CUTOUT, x, y)", "_outside(row + _BOX, x, y)"),
}


def main(mutants: list[str]) -> None:
    """What the interpreter's process does: counts the differing images of each case and of each mutant's file."""
    images = hard_images()
    counts = {name: compare(triton_gpu, images, make(images), torch.float32, CPU) for name, make in CASES.items()}
    counts["bfloat16"] = compare(triton_gpu, images, round_factors(images, 6), torch.bfloat16, CPU)
    for path in mutants:
        specification = importlib.util.spec_from_file_location(Path(path).stem, path)
        mutant = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(mutant)
        case = smaller(images, 12, 20) if Path(path).stem in MUTANTS_OF_AVERAGES else round_factors(images, 12)
        counts[Path(path).stem] = compare(mutant, images, case, torch.float32, CPU)
    print(json.dumps(counts))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, int]:
    """The counts of `main`. Whether Triton interprets is settled when it is imported: hence a process of its own."""
    folder, source = tmp_path_factory.mktemp("mutants"), inspect.getsource(triton_gpu)
    for name, (original, mutated) in (MUTANTS | MUTANTS_OF_AVERAGES).items():
        assert source.count(original) == 1, name
        (folder / f"{name}.py").write_text(source.replace(original, mutated))
    process = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, folder.iterdir())],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "bfloat16"])
def test_the_interpreted_kernel_equals_the_compiled_one(interpreted, case):
    assert interpreted[case] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MUTANTS, *MUTANTS_OF_AVERAGES])
def test_the_comparison_catches_a_mutant(interpreted, name):
    assert interpreted[name] > 0


# --- what the GPU will execute -----------------------------------------------------------------------------------


def compiled_for(capability: int, fusion: bool, size: int, **options: int) -> dict[str, Any]:
    """What the kernel becomes for a GPU that need not be there: `ptx` and `cubin` among others."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"SIZE": size, "UNITS": areas.units(size), "TAPS": areas.taps(size)}
    signature = {"images": "*u8", "packed": "*i32", "table": "*fp32", "out": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    return compile(
        ASTSource(fn=triton_gpu._augment_images, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": fusion, **options},
    ).asm


def float_instructions(capability: int, fusion: bool, size: int) -> set[str]:
    """The kinds of float instructions of the kernel in PTX.

    Comparisons are left out: they round nothing, and compilers word them differently.
    """
    ptx = compiled_for(capability, fusion, size)["ptx"]
    found = re.findall(r"^\s*(?:@\S+ )?(\w[\w.]*\.f\d\w+(?:\.\w+)*)\s", ptx, re.MULTILINE)
    return {instruction for instruction in found if not instruction.startswith("setp.")}


def machine_instructions(folder: Path, capability: int, fusion: bool, size: int, **options: int) -> set[str]:
    """The names of the instructions that a GPU executes, which NVIDIA's assembler makes of PTX, and its disassembler
    reads; both come with Triton."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled_for(capability, fusion, size, **options)["cubin"])
    disassembler = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/nvdisasm"
    listing = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+ )?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE)
    assert len(found) > 200
    return set(found)


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_gpu_rounds_product_and_sum(capability, size, monkeypatch, tmp_path):
    """`.rn` is a rounding to nearest that no later stage may merge with another."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    exact = {"cvt.rn.f32.s32", "mul.rn.f32", "add.rn.f32", "max.f32", "min.f32", "cvt.rzi.s32.f32"}
    assert float_instructions(capability, fusion=False, size=size) == exact
    assert "fma.rn.f32" in float_instructions(capability, fusion=True, size=size)


FUSED, SPILLED = {"FFMA", "FFMA2"}, {"LDL", "STL"}


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_assembler_merges_nothing_and_all_fits_into_registers(capability, size, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = machine_instructions(tmp_path, capability, fusion=False, size=size)
    assert {"FMUL", "FADD"} <= found and not found & (FUSED | SPILLED)
    assert machine_instructions(tmp_path, capability, fusion=True, size=size) & FUSED
    assert machine_instructions(tmp_path, capability, fusion=False, size=size, maxnreg=24) >= SPILLED


def test_the_launch_forbids_fusion(monkeypatch):
    options = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **given: options.update(given)

    monkeypatch.setattr(triton_gpu, "_augment_images", Recorder())
    images = hard_images()
    triton_gpu.DeviceAugmenter(images, STATS, CPU)(*chain(images, DEFAULT, 1))
    assert options["enable_fp_fusion"] is False


# --- what the CPU prepares ---------------------------------------------------------------------------------------


def test_the_rotations_are_the_compiled_kernels():
    generator = np.random.default_rng(0)
    angles = np.concatenate([generator.uniform(-400, 400, 20_000), edge_angles(np.empty(46))[1].angle])
    y, x = np.mgrid[:32, :32]
    source = np.empty(1024, np.uint16)
    for angle, (x_start, y_start, cos, sin, back) in zip(angles, triton_gpu._rotation(angles).astype(int), strict=True):
        from_x, from_y = (x_start + x * cos + y * sin) >> 16, (y_start + x * back + y * cos) >> 16
        outside = (from_x | from_y) & -32 != 0
        cpu_pass._locate(False, angle, source)
        assert np.array_equal(np.where(outside, 1024, 32 * from_y + from_x).ravel(), source), angle


def test_the_table_holds_what_normalize_gives():
    values = np.arange(256, dtype=np.uint8)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image.reshape(1024, 3)[:256] = values[:, None]
    expected = cpu.normalize(image, [0], STATS)[0].permute(1, 2, 0).reshape(1024, 3)[:256]
    assert torch.equal(triton_gpu.normalized_values(STATS, torch.float32), expected)
    assert torch.equal(triton_gpu.normalized_values(STATS, torch.bfloat16), expected.bfloat16())


def test_refuses_what_the_kernel_cannot_check():
    images = hard_images()
    augment = triton_gpu.DeviceAugmenter(images, STATS, CPU)
    for index in (-1, len(images)):
        with pytest.raises(IndexError, match=f"of {len(images)} images"):
            augment([index], identity(1))
    with pytest.raises(ValueError, match="parameters of 1 images for 2 indices"):
        augment([0, 1], identity(1))
    with pytest.raises(ValueError, match="images must be contiguous uint8"):
        triton_gpu.DeviceAugmenter(images.astype(np.float32), STATS, CPU)


# --- on a GPU ----------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def gpu_cases(images: np.ndarray) -> Iterator[tuple[str, Case]]:
    for epoch in range(18):
        yield f"chain {epoch}", chain(images, (DEFAULT, WILD)[epoch % 2], 1_200, epoch)
    for operation in ALONE:
        yield operation, alone(images, operation, 1_200)
    yield "edge factors", edge_factors(images)
    yield "edge angles", edge_angles(images)
    yield "round factors", round_factors(images, 1_200)
    for size in range(4, 32):
        yield f"size {size}", smaller(images, 300, size)
    yield "no image", chain(images, DEFAULT, 0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", BITS)
def test_a_gpu_equals_the_compiled_kernel(dtype):
    images = np.concatenate([hard_images(), natural_images(900)])
    different = {name: compare(triton_gpu, images, case, dtype, GPU) for name, case in gpu_cases(images)}
    assert different == dict.fromkeys(different, 0)


BATCHES = """
import hashlib, sys
import torch
from dist_cifar.config import load_config
from dist_cifar.data.prefetch import prefetch
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.trainer import Trainer
device = torch.device(sys.argv[1])
communicator = Communicator(DistEnv(), device=device, timeout_seconds=60)
trainer = Trainer.build(load_config(None, sys.argv[2:]), communicator)
busy = torch.ones(2000, 2000, device=device)
for batch in prefetch(trainer.batches.make, range(20), device):
    assert batch.inputs.device == batch.labels.device == device
    for _ in range(20):
        busy = busy @ busy / 2000  # the loop's stream lags behind the one that fills the batches
    copies = batch.inputs.clone(), batch.labels.clone()
    del batch
    digest = hashlib.sha256(b"".join(copy.cpu().numpy().tobytes() for copy in copies))
    print("sha256", digest.hexdigest())
assert trainer.fit()
"""


def batches(tmp_path: Path, device: str, backend: str) -> list[str]:
    """A hash of each of the first batches that the loop would get, after which the whole training runs."""
    overrides = {
        "run.dir": tmp_path / f"{device}-{backend}",
        "data.source": "synthetic",
        "data.synthetic_train_size": 440,
        "data.synthetic_test_size": 40,
        "data.validation_size": 40,
        "augment.backend": backend,
        "model.name": "resnet20",
        "batch.global_size": 40,
        "train.epochs": 2,
        "tracking.wandb": "disabled",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    process = subprocess.run(
        [sys.executable, "-c", BATCHES, device, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert process.returncode == 0, process.stderr
    return [line for line in process.stdout.splitlines() if line.startswith("sha256 ")]


@pytest.mark.gpu
@needs_gpu
def test_the_loop_gets_the_same_batches_wherever_they_are_augmented(tmp_path):
    expected = batches(tmp_path, "cpu", "cpu")
    assert len(set(expected)) == 20
    assert batches(tmp_path, "cuda:0", "cpu") == expected
    assert batches(tmp_path, "cuda:0", "device") == expected


if __name__ == "__main__":
    main(sys.argv[1:])
