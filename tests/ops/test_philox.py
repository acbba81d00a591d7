"""Philox against its published answers and a plain-Python transcription; draws that know nothing of their batch."""

from __future__ import annotations

import numpy as np
import pytest

from dist_cifar.ops.philox import STREAM_AUGMENT, STREAM_SPLIT, philox4x32, random_words, uniform

# The file of known answers that comes with Random123: counter, key, output of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """The definition, in Python's unbounded integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert philox4x32(np.array(words(counter), np.uint32), tuple(words(key))).tolist() == words(answer)
    assert plain_philox4x32(words(counter), words(key)) == words(answer)


def test_random_counters_equal_the_definition():
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (50, 2, 4), dtype=np.uint32)
    key = (0x12345678, 0x9ABCDEF0)
    expected = [plain_philox4x32(counter.tolist(), key) for counter in counters.reshape(-1, 4)]
    assert np.array_equal(philox4x32(counters, key).reshape(-1, 4), expected)


def test_counter_is_index_epoch_stream_block_and_key_is_the_seed():
    seed = (7 << 32) + 5
    blocks = [plain_philox4x32([42, 3, STREAM_AUGMENT, block], [5, 7]) for block in range(2)]
    assert random_words(seed, STREAM_AUGMENT, 3, [42], 6).tolist() == [(blocks[0] + blocks[1])[:6]]


def test_a_row_depends_on_its_index_alone():
    indices = np.random.default_rng(1).permutation(50_000)[:300]
    rows = random_words(9, STREAM_AUGMENT, 2, indices, 48)
    assert np.array_equal(rows[::-1], random_words(9, STREAM_AUGMENT, 2, indices[::-1], 48))
    assert np.array_equal(rows[17:18], random_words(9, STREAM_AUGMENT, 2, indices[17:18], 48))
    assert np.array_equal(rows[:, :5], random_words(9, STREAM_AUGMENT, 2, indices, 5))


def test_seed_stream_and_epoch_all_matter():
    def draw(seed=1, stream=STREAM_AUGMENT, epoch=0):
        return random_words(seed, stream, epoch, [0, 1], 4).tobytes()

    assert len({draw(), draw(seed=2), draw(seed=1 + 2**32), draw(stream=STREAM_SPLIT), draw(epoch=1)}) == 5


def test_uniform_is_uniform_on_the_grid():
    u = uniform(0, STREAM_AUGMENT, 0, np.arange(20_000), 4)
    assert u.min() >= 0 and u.max() < 1
    assert np.array_equal(u * 2**32, np.floor(u * 2**32))
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in u.T])
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03


def test_no_draws_and_no_indices():
    assert random_words(0, STREAM_AUGMENT, 0, [], 4).shape == (0, 4)
    assert random_words(0, STREAM_AUGMENT, 0, [1], 0).shape == (1, 0)
