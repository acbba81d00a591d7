"""The user's own transform of an image: keyed, in processes of its own, whose number changes nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dist_cifar import plugins
from dist_cifar.augment.transform import OwnTransform, transformed
from dist_cifar.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
INDICES = np.array([4, 9, 2, 7, 100, 0])
NOISE = "examples.own_augmentation:noise"


def in_this_process(name: str, images=IMAGES, indices=INDICES, *, epoch: int = 3, seed: int = 1, **options: object):
    function = plugins.find("augmentation", "augment.transform", name)
    return transformed(function, name, options, images, seed=seed, epoch=epoch, indices=indices)


def test_the_number_of_processes_changes_nothing_and_they_end():
    expected = in_this_process(NOISE, strength=4.0)
    assert not np.array_equal(expected, IMAGES)
    for workers in (1, 3):
        transform = OwnTransform(NOISE, {"strength": 4.0}, seed=1, workers=workers)
        try:
            assert np.array_equal(transform(IMAGES, 3, INDICES), expected)
            processes = transform._processes
            assert len(processes) == workers
        finally:
            transform.close()
        assert all(process.poll() is not None for process in processes)


def test_an_image_depends_on_seed_epoch_and_index_alone():
    whole = in_this_process(NOISE)
    assert np.array_equal(in_this_process(NOISE, IMAGES[::-1], INDICES[::-1]), whole[::-1])
    assert not np.array_equal(in_this_process(NOISE, epoch=4), whole)
    assert not np.array_equal(in_this_process(NOISE, seed=2), whole)


def test_the_global_generators_are_seeded_for_each_image(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})

    @plugins.register_augmentation("all")
    def draw(image, generator):
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        return np.broadcast_to((np.array(drawn) * 255).astype(np.uint8), image.shape)

    first = in_this_process("all")
    assert np.array_equal(in_this_process("all"), first)
    assert np.array_equal(in_this_process("all", IMAGES[2:], INDICES[2:]), first[2:])
    assert (np.unique(first[:, 0, 0], axis=0, return_counts=True)[1] == 1).all()


def test_torchvisions_transforms_are_reproduced():
    name = "examples.own_augmentation:trivial_augment"
    assert np.array_equal(in_this_process(name), in_this_process(name))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image, generator: image.astype(float), r"returns float64 \[32, 32, 3\]"),
        (lambda image, generator: image[:16], r"returns uint8 \[16, 32, 3\]"),
        (lambda image, generator: 1 / 0, r"the transform of an image fails: .*test_transform.py, line \d+: ZeroDiv"),
    ],
)
def test_a_wrong_function_is_one_line(monkeypatch, function, message):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_augmentation("own")(function)
    with pytest.raises(ConfigError, match=f"augment.transform=own: {message}"):
        in_this_process("own")


def test_an_error_of_a_process_comes_back():
    transform = OwnTransform("examples.own_augmentation:gone", {}, seed=0, workers=1)
    try:
        with pytest.raises(ConfigError, match=r"own_augmentation\.py has no gone"):
            transform(IMAGES, 0, INDICES)
    finally:
        transform.close()
