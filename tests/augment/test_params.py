"""The drawn parameters: their distributions are torchvision's, and a row is a function of its index alone."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomErasing

from dist_cifar.augment import params as params_module
from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.augment.params import BRIGHTNESS, CONTRAST, SATURATION, AugmentParams, sample_params
from dist_cifar.config import AugmentConfig
from dist_cifar.ops.philox import STREAM_AUGMENT, uniform

N = 20_000
CONFIG = AugmentConfig()
FIELDS = [field.name for field in dataclasses.fields(AugmentParams) if field.name != "size"]


@pytest.fixture(scope="module")
def params() -> AugmentParams:
    return sample_params(CONFIG, seed=0, epoch=0, indices=np.arange(N))


def assert_rate(hits: np.ndarray, probability: float) -> None:
    """Within five standard deviations of the expected number of hits."""
    assert abs(hits.sum() - len(hits) * probability) < 5 * math.sqrt(len(hits) * probability * (1 - probability))


def plain_box(config: AugmentConfig, u: list[float]) -> list[int]:
    """RandomErasing for one image in plain Python: `u` holds the chance and four numbers for each attempt."""
    if u[0] >= config.erasing_probability:
        return [0, 0, 0, 0]
    for attempt in range(10):
        area_draw, aspect_draw, top_draw, left_draw = u[1 + 4 * attempt : 5 + 4 * attempt]
        low, high = config.erasing_area
        area = IMAGE_SIZE * IMAGE_SIZE * (low + (high - low) * area_draw)
        log_low, log_high = (math.log(aspect) for aspect in config.erasing_aspect)
        aspect = math.exp(log_low + (log_high - log_low) * aspect_draw)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < IMAGE_SIZE and width < IMAGE_SIZE:
            return [int(top_draw * (IMAGE_SIZE - height + 1)), int(left_draw * (IMAGE_SIZE - width + 1)), height, width]
    return [0, 0, 0, 0]


@pytest.mark.parametrize("policy", ["default", "flip_crop", "none"])
def test_types_and_shapes(policy):
    params = sample_params(AugmentConfig(policy=policy), seed=0, epoch=0, indices=np.arange(N))
    shapes = {name: (getattr(params, name).dtype.name, getattr(params, name).shape) for name in FIELDS}
    assert shapes == {
        "shift": ("int16", (N, 2)),
        "flip": ("bool", (N,)),
        "angle": ("float64", (N,)),
        "order": ("uint8", (N, 3)),
        "factors": ("float64", (N, 3)),
        "sharpness": ("float64", (N,)),
        "box": ("int16", (N, 4)),
        "cutout": ("int16", (N, 4)),
    }


def test_rates(params):
    assert_rate(params.flip, 0.5)
    assert_rate(params.sharpness == 2.0, 0.2)
    assert_rate(params.sharpness == 1.0, 0.8)
    assert_rate(params.box[:, 2] > 0, 0.75)


@pytest.mark.parametrize("field", ["angle", "factors"])
def test_ranges_are_filled_evenly(params, field):
    low, high = {"angle": (-20, 20), "factors": (0.8, 1.2)}[field]
    for column in getattr(params, field).reshape(N, -1).T:
        counts, _ = np.histogram(column, 20, (low, high))
        assert counts.sum() == N
        assert np.abs(counts - N / 20).max() < 5 * math.sqrt(N / 20)


def test_every_order_is_as_likely(params):
    for order in permutations((BRIGHTNESS, CONTRAST, SATURATION)):
        assert_rate((params.order == order).all(axis=1), 1 / 6)


def test_draws_are_independent(params):
    drawn = [name for name in FIELDS if name not in ("shift", "box", "cutout")]
    table = np.column_stack([getattr(params, name).reshape(N, -1).astype(float) for name in drawn])
    table = np.column_stack([table, params.box[:, 2] > 0])
    others = np.corrcoef(table.T) - np.eye(table.shape[1])
    others[2:5, 2:5] = 0  # the three places of one order
    assert np.abs(others).max() < 5 / math.sqrt(N)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        AugmentConfig(erasing_probability=1.0, erasing_area=(0.3, 1.0), erasing_aspect=(0.2, 5.0)),
        AugmentConfig(erasing_probability=1.0, erasing_area=(0.0, 0.01)),
    ],
    ids=["default", "large", "small"],
)
def test_boxes_follow_the_plain_rule(config):
    indices = np.arange(5_000)
    boxes = sample_params(config, seed=3, epoch=1, indices=indices).box
    u = uniform(3, STREAM_AUGMENT, 1, indices, 48)[:, 7:]
    assert boxes.tolist() == [plain_box(config, row) for row in u.tolist()]
    top, left, height, width = boxes.astype(int).T
    assert (height < IMAGE_SIZE).all() and (width < IMAGE_SIZE).all()
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= IMAGE_SIZE and (left + width).max() <= IMAGE_SIZE


def test_boxes_are_distributed_as_torchvision_draws_them(params):
    torch.manual_seed(0)
    image = torch.empty(3, IMAGE_SIZE, IMAGE_SIZE)
    theirs = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3_000)], float
    )
    ours = params.box[params.box[:, 2] > 0].astype(float)
    ours, theirs = (np.column_stack([boxes, boxes[:, 2] * boxes[:, 3]]) for boxes in (ours, theirs))
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()


def test_a_box_that_never_fits_is_not_drawn():
    config = AugmentConfig(erasing_probability=1.0, erasing_area=(1.0, 1.0))
    assert not sample_params(config, seed=0, epoch=0, indices=np.arange(500)).box.any()


def test_strength_zero_changes_nothing():
    off = AugmentConfig(
        flip_probability=0.0,
        rotation_degrees=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        sharpness_probability=0.0,
        erasing_probability=0.0,
    )
    params = sample_params(off, seed=0, epoch=0, indices=np.arange(500))
    assert not params.flip.any() and not params.angle.any() and not params.box.any()
    assert (params.factors == 1).all() and (params.sharpness == 1).all()


def test_factors_never_fall_below_zero():
    params = sample_params(AugmentConfig(brightness=3.0), seed=0, epoch=0, indices=np.arange(2_000))
    assert params.factors[:, BRIGHTNESS].min() >= 0
    assert 3.9 < params.factors[:, BRIGHTNESS].max() <= 4


# --- policies ----------------------------------------------------------------------------------------------------

NOTHING = {"shift": 0, "flip": False, "angle": 0, "factors": 1, "sharpness": 1, "box": 0, "cutout": 0}


def changed(params: AugmentParams) -> set[str]:
    """The operations that change any image."""
    return {name for name, value in NOTHING.items() if (getattr(params, name) != value).any()}


@pytest.mark.parametrize(
    ("policy", "operations"),
    [("default", NOTHING.keys() - {"shift", "cutout"}), ("flip_crop", {"shift", "flip"}), ("none", set())],
)
def test_a_policy_has_its_own_operations_only(policy, operations):
    """Every strength stands at its default, so each operation would show."""
    assert changed(sample_params(AugmentConfig(policy=policy), seed=0, epoch=0, indices=np.arange(500))) == operations


def test_the_words_of_the_default_policy_stay():
    """Other words, or another use of them, would change the runs that are resumed or repeated."""
    params = sample_params(CONFIG, seed=7, epoch=3, indices=[0, 49_999])
    found = {name: getattr(params, name).tolist() for name in FIELDS}
    assert found == {
        "shift": [[0, 0], [0, 0]],
        "flip": [False, True],
        "angle": [-10.822834949940443, 15.10293422266841],
        "order": [[1, 0, 2], [2, 0, 1]],
        "factors": [
            [0.9452593392692507, 0.9035560780204833, 0.9444576649926603],
            [0.8786101590842009, 0.8468150295317174, 0.9105728046037257],
        ],
        "sharpness": [1.0, 1.0],
        "box": [[19, 13, 11, 15], [10, 7, 17, 19]],
        "cutout": [[0, 0, 0, 0], [0, 0, 0, 0]],
    }


def test_flip_crop_is_distributed_as_torchvision_draws_it():
    """Flip and the 81 places of the crop, all independent and evenly filled."""
    params = sample_params(AugmentConfig(policy="flip_crop"), seed=0, epoch=0, indices=np.arange(N))
    assert_rate(params.flip, 0.5)
    distances = range(-4, 5)
    for place in product(distances, distances):
        hits = (params.shift == place).all(axis=1)
        assert_rate(hits, 1 / 81)
        assert_rate(hits & params.flip, 1 / 162)
    for axis in (0, 1):
        for distance in distances:
            assert_rate(params.shift[:, axis] == distance, 1 / 9)


def test_flip_crop_reads_the_flip_probability_alone():
    plain, other = (
        sample_params(config, seed=1, epoch=2, indices=np.arange(200))
        for config in (
            AugmentConfig(policy="flip_crop"),
            AugmentConfig(policy="flip_crop", rotation_degrees=90.0, brightness=1.0, erasing_probability=1.0),
        )
    )
    assert all(np.array_equal(getattr(plain, name), getattr(other, name)) for name in FIELDS)
    never = sample_params(
        AugmentConfig(policy="flip_crop", flip_probability=0.0), seed=1, epoch=2, indices=np.arange(200)
    )
    assert not never.flip.any() and np.array_equal(never.shift, plain.shift)


@pytest.mark.parametrize("policy", ["default", "flip_crop", "none"])
@settings(max_examples=30, deadline=None)
@given(
    indices=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_a_row_depends_on_seed_epoch_and_index_alone(policy, indices, seed, epoch):
    config = AugmentConfig(policy=policy)
    together = sample_params(config, seed=seed, epoch=epoch, indices=indices)
    backwards = sample_params(config, seed=seed, epoch=epoch, indices=indices[::-1])
    alone = sample_params(config, seed=seed, epoch=epoch, indices=indices[:1])
    for name in FIELDS:
        assert np.array_equal(getattr(together, name)[::-1], getattr(backwards, name))
        assert np.array_equal(getattr(together, name)[:1], getattr(alone, name))


# --- crop, alternating flip, cutout ------------------------------------------------------------------------------


def with_policy(policy: str, module: Any = params_module, *, epoch: int = 0, **fields: Any) -> AugmentParams:
    return module.sample_params(AugmentConfig(policy=policy, **fields), seed=5, epoch=epoch, indices=np.arange(N // 4))


def check_alternating_flip(module: Any) -> None:
    """Half of the images, others in the next epoch, the same after two; the flip that `random` has in epoch 0."""
    for policy in ("default", "flip_crop"):
        flips = [with_policy(policy, module, epoch=epoch, flip="alternating").flip for epoch in range(4)]
        assert_rate(flips[0], 0.5)
        assert np.array_equal(flips[0], with_policy(policy).flip)
        assert np.array_equal(flips[1], ~flips[0])
        assert np.array_equal(flips[2], flips[0]) and np.array_equal(flips[3], flips[1])


def check_crop(module: Any) -> None:
    for policy, padding in product(("default", "flip_crop"), (1, 2, 8)):
        shift = with_policy(policy, module, crop_padding=padding).shift
        for axis, distance in product((0, 1), range(-padding, padding + 1)):
            assert_rate(shift[:, axis] == distance, 1 / (2 * padding + 1))
        assert abs(np.corrcoef(shift.T)[0, 1]) < 5 / math.sqrt(len(shift))


def check_cutout(module: Any) -> None:
    """Every corner with which the square lies inside the image, as often as another; none depends on the crop."""
    for policy, size in product(("default", "flip_crop"), (1, 12, 29)):
        params = with_policy(policy, module, crop_padding=2, cutout_size=size)
        assert (params.cutout[:, 2:] == size).all()
        for axis, corner in product((0, 1), range(33 - size)):
            assert_rate(params.cutout[:, axis] == corner, 1 / (33 - size))
        assert params.cutout[:, :2].max() == 32 - size
        table = np.corrcoef(np.column_stack([params.shift, params.cutout[:, :2]]).T)
        assert np.abs(table - np.eye(4)).max() < 5 / math.sqrt(len(params.cutout))


CHECKS = {"flip": check_alternating_flip, "crop": check_crop, "cutout": check_cutout}
MUTANTS = {
    "flip by the bit of this epoch": ("flip", "STREAM_AUGMENT, 0, indices, 1)", "STREAM_AUGMENT, epoch, indices, 1)"),
    "flip in the same epochs": ("flip", "epoch % 2 == 1", "epoch % 2 == 2"),
    "crop never at the end": ("crop", "(2 * padding + 1)", "(2 * padding)"),
    "crop by one number": ("crop", "u[:, draws : draws + 2]", "u[:, draws : draws + 1].repeat(2, 1)"),
    "cutout never at the end": ("cutout", "(IMAGE_SIZE - size + 1)", "(IMAGE_SIZE - size)"),
    "cutout where the crop is": (
        "cutout",
        "_sample_cutout(u[:, draws + 2 :]",
        "_sample_cutout(u[:, draws : draws + 2]",
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_crop_flip_and_cutout_are_distributed_as_they_say(check):
    CHECKS[check](params_module)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name):
    source, (check, original, mutated) = inspect.getsource(params_module), MUTANTS[name]
    assert source.count(original) == 1
    source = source.replace("@compiled", "").replace(original, mutated)  # a mutant must not reach the cache
    mutant = types.ModuleType("mutant_params")
    sys.modules[mutant.__name__] = mutant  # where a dataclass looks up its types
    try:
        exec(source, vars(mutant))
        with pytest.raises(AssertionError):
            CHECKS[check](mutant)
    finally:
        del sys.modules[mutant.__name__]


def test_new_operations_leave_the_draws_of_the_policy_alone():
    for policy in ("default", "flip_crop"):
        plain, more = with_policy(policy), with_policy(policy, crop_padding=4, cutout_size=8)
        for name in set(FIELDS) - {"shift", "cutout"}:
            assert np.array_equal(getattr(plain, name), getattr(more, name))
    assert np.array_equal(with_policy("flip_crop").shift, with_policy("flip_crop", crop_padding=4).shift)
    assert changed(with_policy("none", crop_padding=4, cutout_size=8, flip="alternating")) == set()


def test_epochs_and_seeds_differ():
    angles = {
        sample_params(CONFIG, seed=seed, epoch=epoch, indices=[5]).angle[0] for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(angles) == 4
