"""`load_model`: predictions, evaluation and export as of the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_cifar import load_model
from dist_cifar.api.run_result import read_result
from dist_cifar.config import load_config
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import ConfigError, DataError
from dist_cifar.run.run_dir import RunDir
from tests import small_runs

IMAGES = synthetic_split(1, 6)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "first"
    small_runs.run(path, "train.max_steps=4")
    return path


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained, device="cpu")


def test_a_run_its_directory_and_its_checkpoint_are_the_same_model(trained, model):
    result = read_result(load_config(None, [f"run.dir={trained}"]), is_done=True)
    for run in (result, str(trained), model.classifier.checkpoint):
        assert load_model(run, device="cpu").classifier.sha256 == model.classifier.sha256
    assert isinstance(model.module, torch.nn.Module) and not model.module.training
    assert repr(model).startswith("<TrainedModel: resnet8, 10 classes, ")


def test_every_kind_of_image_is_predicted_alike(model, tmp_path):
    found = model.predict(IMAGES)
    probabilities = model.classifier.probabilities(IMAGES)
    assert [dict(classes) for classes in found] == [
        dict(zip(model.classes, map(float, row), strict=True)) for row in probabilities
    ]
    assert all(list(classes) == sorted(classes, key=lambda item: -item[1]) for classes in found)
    paths = [tmp_path / f"{i}.png" for i in range(len(IMAGES))]
    for path, pixels in zip(paths, IMAGES, strict=True):
        Image.fromarray(pixels).save(path)
    opened = [Image.fromarray(pixels) for pixels in IMAGES]
    assert model.predict(paths) == model.predict(tmp_path) == model.predict(opened) == model.predict(list(IMAGES))
    assert [classes[0][0] for classes in found] == [label for ((label, _),) in model.predict(IMAGES, top=1)]
    one = [IMAGES[0], opened[0], str(paths[0])]
    assert model.predict(one[0]) == model.predict(one[1]) == model.predict(one[2])
    assert model.predict([]) == []


def test_all_that_is_no_image_is_named_in_one_error(model, tmp_path):
    (tmp_path / "text.png").write_text("text")
    wrong = [np.zeros((2, 32, 32, 3)), np.zeros((28, 28), np.uint8), tmp_path / "text.png", tmp_path / "none.png", 7]
    with pytest.raises(DataError) as raised:
        model.predict(wrong)
    for part in ("image 0: must be uint8", "image 1: must be uint8", "text.png: not a readable picture", "none.png"):
        assert part in str(raised.value)
    assert "image 4: a int is no image" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="top=0"):
        model.predict(IMAGES, top=0)


def test_the_evaluation_is_that_of_the_summary(trained, model, tmp_path):
    (result,) = model.evaluate().values()
    assert result["accuracy"] == RunDir(trained).summary()["test_accuracy"]
    assert list(model.evaluate()) == ["test"]
    with pytest.raises(DataError):
        model.evaluate(tmp_path / "nothing")


def test_export_gives_the_path(trained, model, tmp_path, monkeypatch):
    called = []

    def export(classifier, kind, directory):
        called.append((kind, directory))
        return type("Export", (), {"path": directory / kind})

    monkeypatch.setattr("dist_cifar.tools.export.export", export)
    assert model.export() == trained / "export/torch"
    assert model.export(to="onnx", out=str(tmp_path)) == tmp_path / "onnx"
    with pytest.raises(ConfigError, match="to='tensorrt' is unknown"):
        model.export(to="tensorrt")


def test_what_is_no_run_gets_the_nearest_one(trained):
    with pytest.raises(ConfigError, match=rf"did you mean {trained}\?"):
        load_model(trained.parent / "frist")
    with pytest.raises(ConfigError, match="device='gpu' is unknown"):
        load_model(trained, device="gpu")
