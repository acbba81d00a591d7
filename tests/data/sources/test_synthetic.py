"""The synthetic data set: determined, balanced, and told apart by form alone."""

import hashlib
import time

import numpy as np
import pytest

from dist_cifar.data.sources.synthetic import CLASSES, GENERATOR_VERSION, synthetic_split


@pytest.fixture(scope="module")
def train():
    return synthetic_split(0, 4500)


@pytest.fixture(scope="module")
def test():
    return synthetic_split(1, 1000)


def test_shapes_and_types(train):
    images, labels = train
    assert (images.shape, images.dtype, images.flags.c_contiguous) == ((4500, 32, 32, 3), np.uint8, True)
    assert (labels.shape, labels.dtype) == ((4500,), np.int64)


def test_bytes_are_those_of_this_generator_version():
    """A change here means: raise GENERATOR_VERSION, or caches go on with the old images."""
    images, labels = synthetic_split(0, 100)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert (GENERATOR_VERSION, digest[:16]) == (1, "5b4cf62bac424cc5")


def test_a_larger_split_begins_with_the_smaller(train):
    images, labels = synthetic_split(0, 507)
    assert np.array_equal(images, train[0][:507])
    assert np.array_equal(labels, train[1][:507])


@pytest.mark.parametrize("size", [1, 10, 507, 1000])
def test_classes_are_balanced(size):
    counts = np.bincount(synthetic_split(0, size)[1], minlength=len(CLASSES))
    assert counts.max() - counts.min() <= 1


def test_no_image_is_drawn_twice(train, test):
    drawn = {image.tobytes() for images, _ in (train, test) for image in images}
    assert len(drawn) == 5500


def test_the_numpy_generator_is_not_touched():
    before = np.random.get_state()[1].copy()
    synthetic_split(0, 10)
    assert np.array_equal(before, np.random.get_state()[1])


def test_generation_is_quick():
    start = time.process_time()
    synthetic_split(0, 1000)
    assert time.process_time() - start < 0.5  # 6,000 in less than 3 s


def ridge_accuracy(train, test, features, penalty):
    """Test accuracy of one-against-all ridge regression."""
    (images, labels), (test_images, test_labels) = train, test
    x, x_test = features(images), features(test_images)
    centre = x.mean(axis=0)
    x, x_test = x - centre, x_test - centre
    targets = np.eye(len(CLASSES), dtype=x.dtype)[labels] - 1 / len(CLASSES)
    weights = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
    return float(((x_test @ weights).argmax(axis=1) == test_labels).mean())


def test_a_linear_classifier_on_pixels_fails(train, test):
    def pixels(images):  # means of 2x2 pixels: a linear map, and what is left is quick to solve
        return images.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4), dtype=np.float32).reshape(len(images), -1) / 255

    assert max(ridge_accuracy(train, test, pixels, penalty) for penalty in (0.01, 0.1)) < 0.4


def test_mean_colour_says_nothing(train, test):
    def colour(images):
        mean = images.mean(axis=(1, 2)) / 255
        return np.concatenate([mean, mean**2, mean[:, [0, 0, 1]] * mean[:, [1, 2, 2]]], axis=1)

    assert ridge_accuracy(train, test, colour, 1e-6) < 0.2


def test_forms_do_tell_the_classes_apart(train):
    """Edges per image differ between classes: the labels are not noise."""
    images, labels = train
    grey = images.mean(axis=3)
    edges = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) / grey.std(axis=(1, 2))
    by_class = {name: edges[labels == label].mean() for label, name in enumerate(CLASSES)}
    assert by_class["disc"] < by_class["ring"] < by_class["dots"]
    assert by_class["square"] < by_class["frame"]
