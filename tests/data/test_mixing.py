"""Mixup and CutMix: who is mixed with whom and how much, against a loop by hand and torchvision's transforms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from dist_cifar.config import MixConfig, differences, flatten, load_config
from dist_cifar.data import mixing
from dist_cifar.data.mixing import Mix, MixedBatches, draw_mix
from dist_cifar.data.training_data import build_training_data
from dist_cifar.errors import ConfigError
from tests.small_runs import alone


def batches(tiny, *overrides: str):
    return build_training_data(tiny(*overrides), alone(), slices=1).batches


def shares(alpha: float, steps: int = 4000) -> np.ndarray:
    return np.array([draw_mix(alpha, seed=3, epoch=0, position=i, global_size=16).share for i in range(steps)])


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_have_the_moments_of_beta(alpha):
    found = shares(alpha)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert found.min() >= 0 and found.max() <= 1
    assert found.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(found)))
    assert found.var() == pytest.approx(variance, rel=0.08)


def test_shifts_and_centres_are_uniform_and_no_sample_is_its_own_partner():
    mixes = [draw_mix(1.0, seed=0, epoch=e, position=p, global_size=5) for e in range(40) for p in range(50)]
    counts = np.bincount([mix.shift for mix in mixes], minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 400
    places = np.array([mix.centre for mix in mixes])
    assert places.min() >= 0 and places.max() < 1 and np.abs(places.mean(0) - 0.5).max() < 0.03


def test_a_draw_that_needs_more_numbers_takes_them(monkeypatch):
    asked = []
    draw = mixing.uniform
    monkeypatch.setattr(mixing, "uniform", lambda *arguments: asked.append(arguments[-1]) or draw(*arguments))
    shares(4.0, 300)
    assert max(asked) > 60 and min(asked) == 8


def by_hand(plain, mix_of, steps, name, classes=10):
    """The mixed batches of `steps`, image by image, from the batches that are not mixed."""
    for step in steps:
        batch, mix = plain.make(step), mix_of(step)
        inputs, labels = batch.inputs.clone(), torch.zeros(len(batch.labels), classes)
        for i in range(len(inputs)):
            partner = (i + mix.shift) % len(inputs)
            share = mix.share
            if name == "mixup":
                inputs[i] = mix.share * batch.inputs[i] + (1 - mix.share) * batch.inputs[partner]
            else:
                half = 32 * math.sqrt(1 - mix.share) / 2
                middles = [math.floor(32 * place) for place in mix.centre]
                inside = [
                    (y, x)
                    for y, x in itertools.product(range(32), range(32))
                    if all(round(m - half) <= v < round(m + half) for m, v in zip(middles, (y, x), strict=True))
                ]
                for y, x in inside:
                    inputs[i, :, y, x] = batch.inputs[partner, :, y, x]
                share = 1 - len(inside) / 1024
            labels[i, batch.labels[i]] += share
            labels[i, batch.labels[partner]] += 1 - share
        yield inputs, labels


def check_by_hand(tiny, name):
    mixed, plain = batches(tiny, f"mix.name={name}"), batches(tiny)
    assert isinstance(mixed, MixedBatches) and not isinstance(plain, MixedBatches)

    def mix_of(step):
        return draw_mix(1.0, seed=0, epoch=step // 5, position=step % 5, global_size=16)

    for step, (inputs, labels) in enumerate(by_hand(plain, mix_of, range(7), name)):
        batch = mixed.make(step)
        torch.testing.assert_close(batch.inputs, inputs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(batch.labels, labels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_batch_is_what_a_loop_by_hand_makes(tiny, name):
    check_by_hand(tiny, name)


def test_partners_of_this_rank_alone_are_caught(tiny, monkeypatch):
    """The mutant that takes the images of the next place and the labels of its own."""
    original = mixing.draw_mix
    monkeypatch.setattr(mixing, "draw_mix", lambda *args, **keys: _next(original(*args, **keys)))
    with pytest.raises(AssertionError):
        check_by_hand(tiny, "mixup")


def _next(mix: Mix) -> Mix:
    return Mix(shift=mix.shift + 1, share=mix.share, centre=mix.centre)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_torchvisions(alpha):
    """Which takes the partner one place before, and whose share is read from its labels."""
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    for _ in range(5):
        expected, shares_of_classes = v2.MixUp(alpha=alpha, num_classes=6)(images, labels)
        mix = Mix(shift=5, share=shares_of_classes[1, 1].item(), centre=(0.0, 0.0))
        inputs, kept = mixing._mixup(images.clone(), images.roll(1, 0), mix)
        torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-6)
        assert shares_of_classes[1, 0].item() == pytest.approx(1 - kept, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.71, 0.9999, 1.0])
@pytest.mark.parametrize("centre", [(0.0, 0.999), (0.5, 0.1), (0.4, 0.6)])
def test_the_share_of_cutmix_is_what_the_box_leaves(share, centre):
    images = torch.randn(2, 3, 24, 24)
    inputs, kept = mixing._cutmix(images.clone(), images.flip(0), Mix(shift=1, share=share, centre=centre))
    changed = (inputs != images).all(1).float().mean(dim=(1, 2))
    assert changed.tolist() == pytest.approx(2 * [1 - kept]) and kept >= share - 0.07


def test_the_loss_is_the_weighted_sum_of_both_labels_losses(tiny):
    batch, plain = batches(tiny, "mix.name=mixup").make(0), batches(tiny).make(0)
    mix = draw_mix(1.0, seed=0, epoch=0, position=0, global_size=16)
    logits = torch.randn(16, 10)
    for smoothing in (0.0, 0.1):
        first, second = (
            cross_entropy(logits, labels, label_smoothing=smoothing)
            for labels in (plain.labels, plain.labels.roll(-mix.shift))
        )
        found = cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        assert found.item() == pytest.approx((mix.share * first + (1 - mix.share) * second).item(), rel=1e-5)


def test_the_last_epochs_are_not_mixed(tiny):
    mixed, plain = batches(tiny, "mix.name=cutmix", "mix.off_last_epochs=1.4"), batches(tiny)
    kinds = [mixed.make(step).labels.dim() for step in range(10)]
    assert kinds == [2, 2, 2] + 7 * [1]
    assert torch.equal(mixed.make(3).inputs, plain.make(3).inputs)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"mix\.name: mixup mixes pairs and batch\.global_size=1 has none"):
        load_config(None, ["mix.name=mixup", "batch.global_size=1", "strategy.virtual_ranks=1"])
    short, long = (load_config(None, ["mix.name=mixup", "mix.off_last_epochs=1", f"train.epochs={n}"]) for n in (8, 9))
    assert list(differences(flatten(short), long)) == ["train.epochs"]
    assert MixConfig().name == "none"
