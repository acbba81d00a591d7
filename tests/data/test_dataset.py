"""The data set of a run, whatever its source, and the validation split."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_cifar.config import DataConfig, known_names
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.dataset import load_dataset, missing_download, validation_split
from dist_cifar.data.sources import SOURCES, image_folder
from dist_cifar.data.sources.base import Source
from dist_cifar.data.sources.cifar import CifarArchive
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import ConfigError, DataError
from tests.data.sources.test_cifar import CLASSES, assert_is_the_data, make_batches, put


def as_arrays(found):
    return Arrays(
        train_images=found.train.images,
        train_labels=found.train.labels,
        test_images=found.test.images,
        test_labels=found.test.labels,
        classes=found.classes,
    )


def write_pictures(root):
    """The small archive's data as a folder of PNGs, in an order that is sorted by class."""
    batches = make_batches()
    splits = {"train": ("data_batch_1", "data_batch_2"), "test": ("test_batch",)}
    for split, names in splits.items():
        for name in names:
            for i, (row, label) in enumerate(zip(*batches[name], strict=True)):
                path = root / split / CLASSES[label] / f"{name}_{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0).copy()).save(path)
    return root


def test_synthetic(tmp_path, said):
    config = DataConfig(source="synthetic", cache_dir=str(tmp_path), synthetic_train_size=60, synthetic_test_size=20)
    found = load_dataset(config)
    assert said == []
    images, labels = synthetic_split(0, 60)
    assert np.array_equal(found.train.images, images)
    assert np.array_equal(found.train.labels, labels)
    assert np.array_equal(found.test.images, synthetic_split(1, 20)[0])
    scaled = images.reshape(-1, 3) / 255
    assert np.allclose(found.stats.mean, scaled.mean(axis=0), rtol=1e-13)
    assert np.allclose(found.stats.std, scaled.std(axis=0), rtol=1e-12)
    smaller = load_dataset(dataclasses.replace(config, synthetic_test_size=10))
    assert len(smaller.test.labels) == 10
    assert np.array_equal(smaller.train.images, images)


def test_archive_then_cache_alone(tmp_path, monkeypatch, said):
    root, cache_dir = tmp_path / "data", tmp_path / "cache"
    root.mkdir()
    monkeypatch.setitem(SOURCES, "cifar10", CifarArchive(put(root)))
    config = DataConfig(root=str(root), cache_dir=str(cache_dir))
    first = load_dataset(config)
    assert_is_the_data(as_arrays(first))
    (root / "small.tar.gz").unlink()
    second = load_dataset(config)
    assert said == []
    assert_is_the_data(as_arrays(second))
    assert (second.content_sha256, second.stats) == (first.content_sha256, first.stats)


def test_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch, said):
    root = write_pictures(tmp_path / "pictures")
    config = DataConfig(source="folder", root=str(root), cache_dir=str(tmp_path / "cache"))
    first = load_dataset(config)
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "_file_sha256", lambda path: pytest.fail("hashed again"))
        assert load_dataset(config).content_sha256 == first.content_sha256
    assert [line.split(":")[1].split()[0] for line in said] == ["hashing", "decoding"]

    changed = next((root / "train").rglob("*.png"))
    Image.new("RGB", (32, 32)).save(changed)
    second = load_dataset(config)
    assert len(said) == 4
    assert second.content_sha256 != first.content_sha256
    assert (second.train.images.reshape(-1, 3072) == 0).all(axis=1).sum() == 1


def test_a_copy_elsewhere_has_the_same_content(tmp_path):
    cache_dir = str(tmp_path / "c")
    roots = [str(write_pictures(tmp_path / name)) for name in ("one", "two")]
    found = [load_dataset(DataConfig(source="folder", root=root, cache_dir=cache_dir)) for root in roots]
    assert found[0].content_sha256 == found[1].content_sha256
    assert len(list((tmp_path / "c").glob("folder-*-v*/meta.json"))) == 1


class Grey(Source):
    """A source of our own, with one grey image of each class."""

    def key(self, config, cache_dir):
        return "ab" * 32

    def read(self, config):
        images, labels = np.full((2, 32, 32, 3), 128, np.uint8), np.arange(2)
        return Arrays(
            train_images=images, train_labels=labels, test_images=images, test_labels=labels, classes=("one", "two")
        )


def test_every_source_of_the_config_is_registered_and_another_one_is_an_entry(tmp_path, monkeypatch):
    assert set(SOURCES) == set(known_names("data", "source"))
    monkeypatch.setitem(SOURCES, "grey", Grey())
    config = DataConfig(source="grey", cache_dir=str(tmp_path))
    assert load_dataset(config).classes == ("one", "two")
    assert missing_download(config) is None


def test_a_download_is_missing_until_it_is_here_or_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    spec = put(tmp_path / "mirror")
    monkeypatch.setitem(SOURCES, "cifar10", CifarArchive(spec))
    root = tmp_path / "data"
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"))
    assert missing_download(config) == spec.url
    mirror = dataclasses.replace(config, url=(tmp_path / "mirror" / "small.tar.gz").as_uri())
    assert missing_download(mirror) == mirror.url
    load_dataset(mirror)
    assert missing_download(config) is None
    (root / "small.tar.gz").unlink()
    assert missing_download(config) is None  # it is in the cache
    assert missing_download(dataclasses.replace(config, cache_dir=str(tmp_path / "other"))) == spec.url
    (root / "small-py").mkdir()
    assert missing_download(dataclasses.replace(config, cache_dir=str(tmp_path / "other"))) is None


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing.*data.root must hold"):
        load_dataset(DataConfig(source="folder", root=str(tmp_path / "missing"), cache_dir=str(tmp_path)))


def test_no_torch_is_imported():
    code = "import sys; import dist_cifar.data.dataset; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the validation split -----------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.data())
def test_the_split_is_stratified(values, data):
    labels = np.array(values, np.int64)
    size = data.draw(st.integers(0, len(values) - 1))
    try:
        train, validation = validation_split(labels, size, "abcde")
    except ConfigError as error:
        assert "data.validation_size" in str(error)  # only where the exact share, rounded up, is a whole class
        assert any(-(-size * count // len(labels)) == count for count in np.bincount(labels) if count)
        return
    assert train.dtype == validation.dtype == np.int64
    assert len(validation) == size
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    shares = np.bincount(labels[validation], minlength=5)
    assert (np.abs(shares - size * np.bincount(labels, minlength=5) / len(labels)) < 1).all()
    assert set(labels[train]) == set(values)


def test_the_split_of_cifar10_is_even_and_fixed():
    labels = np.arange(50_000) % 10
    train, validation = validation_split(labels, 5000, "abcdefghij")
    assert (len(train), len(validation)) == (45_000, 5000)
    assert np.bincount(labels[validation]).tolist() == [500] * 10
    # Fixed for good: another choice would let old runs be validated on images that they were trained on.
    assert validation[:5].tolist() == [0, 4, 24, 28, 36]
    assert abs(validation.mean() - 25_000) < 1000  # and spread over the whole set


def test_size_zero_holds_out_nothing():
    train, validation = validation_split(np.array([0, 1, 1]), 0, "ab")
    assert train.tolist() == [0, 1, 2]
    assert (validation.tolist(), validation.dtype) == ([], np.int64)


@pytest.mark.parametrize(("labels", "size"), [([0, 1], 2), ([0, 1], 3), ([0] * 9 + [1], 9)])
def test_a_split_without_training_images_is_refused(labels, size):
    with pytest.raises(
        ConfigError, match=r"data\.validation_size: \d leaves no training image(,| of class dog \(1 image\);)"
    ):
        validation_split(np.array(labels), size, ("cat", "dog"))
