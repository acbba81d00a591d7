"""Data sets that a function returns."""

from __future__ import annotations

import numpy as np
import pytest

from dist_cifar import plugins
from dist_cifar.config import DataConfig
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.sources.base import Source
from dist_cifar.errors import ConfigError, DataError

IMAGES, LABELS = np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 0, 1])
GOOD = {
    "train_images": IMAGES,
    "train_labels": LABELS,
    "test_images": IMAGES + 1,
    "test_labels": LABELS,
    "classes": ["a", "b"],
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})

    def load(component, **options):
        plugins.register_data_source("own")(component)
        return load_dataset(DataConfig(source="own", options=options, cache_dir=str(tmp_path / "cache")))

    return load


def test_the_example_gives_any_number_of_classes(tmp_path):
    config = DataConfig(
        source="examples.own_data:bars",
        options={"count": 70, "test_count": 21, "classes": 7},
        cache_dir=str(tmp_path),
    )
    dataset = load_dataset(config)
    assert dataset.train.images.shape == (70, 32, 32, 3) and len(dataset.classes) == 7
    assert np.bincount(dataset.test.labels).sum() == 21


@pytest.mark.parametrize("form", ["mapping", "sequence", "arrays"])
def test_what_a_function_returns_is_the_data_set(load, form):
    forms = {"mapping": GOOD, "sequence": tuple(GOOD.values()), "arrays": Arrays(**GOOD)}
    dataset = load(lambda: forms[form])
    assert dataset.classes == ("a", "b") and np.array_equal(dataset.test.images, IMAGES + 1)


def test_a_change_of_what_it_returns_is_noticed_and_reaches_the_training(load):
    first = load(lambda: GOOD)
    second = load(lambda: GOOD | {"train_images": IMAGES + 5})
    assert first.content_sha256 != second.content_sha256 and second.train.images.max() == 5


def test_a_source_may_be_a_class_with_a_key_of_its_own(load):
    class Own(Source):
        def __init__(self, level: int = 0):
            self.level = level

        def key(self, config, cache_dir):
            return f"{self.level:064x}"

        def read(self, config):
            return Arrays(**GOOD | {"train_images": IMAGES + self.level})

    assert load(Own, level=9).train.images.max() == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": IMAGES.astype(float)}, r"train_images is float64 \[4, 32, 32, 3\]; it must be uint8"),
        ({"test_images": IMAGES[:, :16]}, r"test_images is uint8 \[4, 16, 32, 3\]"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "n > 0"),
        ({"train_labels": LABELS[:3]}, r"train_labels is int64 \[3\]; it must be whole numbers \[4\]"),
        ({"train_labels": LABELS * 1.0}, "train_labels is float64"),
        ({"test_labels": LABELS + 1}, "test_labels holds 1 to 2; labels are places among the 2 classes, from 0 to 1"),
        ({"test_labels": LABELS - 1}, "test_labels holds -1 to 0"),
        ({"classes": ["a", "a"]}, "names, each once"),
        ({"classes": ["a", "b\x1b[2J"]}, "cannot be a class"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(load, changes, message):
    with pytest.raises(DataError, match=f"data.source=own: .*{message}") as caught:
        load(lambda: GOOD | changes)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("returned", [None, 3, (IMAGES, LABELS), {"train_images": IMAGES}])
def test_what_is_no_five_arrays_is_refused(load, returned):
    with pytest.raises(DataError, match=r"data.source=own: returns"):
        load(lambda: returned)


def test_a_function_that_fails_is_named_with_its_line(load):
    with pytest.raises(ConfigError, match=r"loading the data fails: .*test_function.py, line \d+: ZeroDivisionError"):
        load(lambda: 1 / 0)
