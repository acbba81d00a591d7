"""The strategies by name, what is known of each without torch, and who can share a global batch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dist_cifar.config import BatchConfig, StrategyConfig, known_names
from dist_cifar.errors import ConfigError
from dist_cifar.strategy import STRATEGIES, bitwise_strategy, properties, slice_count


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
    with pytest.raises(ConfigError, match=r"8 virtual ranks .* 3 ranks; start 1, 2, 4, 8 ranks"):
        slice_count(BatchConfig(), StrategyConfig(name="exact"), world_size=3)
    with pytest.raises(ConfigError, match=r"128 samples .* 3 ranks; set batch.global_size=126 or 129"):
        slice_count(BatchConfig(global_size=128), StrategyConfig(name="ddp"), world_size=3)
