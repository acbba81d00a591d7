"""The strategies by name, what is known of each without torch, and who can share a global batch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dist_cifar.config import BatchConfig, StrategyConfig, known_names
from dist_cifar.errors import ConfigError
from dist_cifar.strategy import STRATEGIES, bitwise_strategy, properties, slice_count, waiting


def test_every_name_of_the_config_is_a_strategy():
    assert set(STRATEGIES) == set(known_names("strategy", "name"))


def test_one_strategy_is_bitwise_and_pins_what_its_bits_depend_on():
    assert [name for name, known in STRATEGIES.items() if known.bitwise] == [bitwise_strategy()] == ["exact"]
    known = properties(StrategyConfig(name="exact"))
    assert known.single_threaded and not known.auto_compile


def test_properties_are_known_without_torch():
    """The number of threads must be set before torch is imported."""
    program = "import sys, dist_cifar.strategy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(("name", "world_size", "slices"), [("exact", 4, 8), ("exact", 1, 8), ("ddp", 4, 4)])
def test_slices_of_a_global_batch(name, world_size, slices):
    batch, strategy = BatchConfig(global_size=128), StrategyConfig(name=name, virtual_ranks=8)
    assert slice_count(batch, strategy, world_size=world_size) == slices


def test_errors_name_what_would_work():
    with pytest.raises(ConfigError, match=r"9 ranks cannot share 8 virtual ranks.*; start at most 8 ranks"):
        slice_count(BatchConfig(), StrategyConfig(name="exact"), world_size=9)
    with pytest.raises(ConfigError, match=r"3 ranks cannot share a global batch of 2; .* at most 2 ranks"):
        slice_count(BatchConfig(global_size=2), StrategyConfig(name="ddp"), world_size=3)
    with pytest.raises(ConfigError, match=r"128 samples .* 3 ranks, .* set batch.global_size=126 or 129"):
        slice_count(BatchConfig(global_size=128), StrategyConfig(name="deepspeed"), world_size=3)


@pytest.mark.parametrize(
    ("virtual_ranks", "batch", "world_size", "expected"),
    [
        (8, 128, 4, None),
        (
            8,
            128,
            3,
            "3 ranks share 8 virtual ranks: each computes 89% .*; strategy.virtual_ranks=32 would make that 97%",
        ),
        (8, 120, 7, "7 ranks share 8 virtual ranks: each computes 57% .*; strategy.virtual_ranks=20 .* 95%"),
        (
            20,
            120,
            7,
            "7 ranks share 20 virtual ranks: each computes 95% of a step on average, and waits for .* more; $",
        ),
        (7, 7, 6, "7 virtual ranks: each computes 58% .* one more; $"),
    ],
)
def test_what_ranks_wait_is_said_and_which_number_would_be_better(virtual_ranks, batch, world_size, expected):
    strategy = StrategyConfig(name="exact", virtual_ranks=virtual_ranks)
    found = waiting(BatchConfig(global_size=batch), strategy, world_size=world_size)
    assert found is None if expected is None else re.search(expected, "; ".join(found)), found
    assert waiting(BatchConfig(global_size=batch), StrategyConfig(name="ddp"), world_size=world_size) is None
