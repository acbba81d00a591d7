from __future__ import annotations

import pytest
import torch

from dist_cifar.nn import DropPath
from dist_cifar.ops.pass_random import seed_pass


def test_images_are_left_out_whole_and_the_mean_stays():
    branch = torch.ones(4000, 3, 2, 2)
    seed_pass(1, 2, 3)
    out = DropPath(0.25)(branch)
    rows = out.flatten(1)
    assert ((rows == 0).all(1) | (rows == rows.new_tensor(1 / 0.75)).all(1)).all()
    assert rows[:, 0].mean().item() == pytest.approx(1, abs=0.05)


def test_a_pass_draws_the_same_again_and_another_pass_does_not():
    layer, branch, drawn = DropPath(0.5), torch.ones(64, 1), {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        seed_pass(*key)
        out = layer(branch)
        assert torch.equal(drawn.setdefault(key, out), out)
    assert len({tuple(out.flatten().tolist()) for out in drawn.values()}) == 4


def test_evaluation_changes_nothing():
    branch = torch.randn(5, 2)
    assert DropPath(0.9).eval()(branch) is branch


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_probability_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match="p must be"):
        DropPath(p)
