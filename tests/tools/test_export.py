"""Exported graphs and the model card beside them."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from dist_cifar.cli import main
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.sources.synthetic import CLASSES, synthetic_split
from dist_cifar.errors import CheckpointError, ConfigError
from dist_cifar.inference import WithPreprocessing, load_classifier
from dist_cifar.tools.export import export, write
from dist_cifar.tools.export.model_card import model_card, model_metadata
from tests import PATIENCE_SECONDS, small_runs
from tests.test_inference import CPU, by_hand


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "first"
    small_runs.run(path)
    return path


@pytest.fixture(scope="module")
def classifier(trained):
    return load_classifier(trained, CPU)


def test_onnx_gives_the_models_logits_for_any_batch(trained, classifier, tmp_path, capsys):
    assert main(["export", str(trained), "--to", "onnx", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "checked  on 80 test images of the run: logits differ from the float32 model's by" in out
    assert "graph    float32; the run computed in fp32" in out and "80 of 80 classes are those of the fp32 model" in out
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for images in (synthetic_split(1, 256)[0], synthetic_split(0, 1)[0], np.zeros((17, 32, 32, 3), np.uint8)):
        (logits,) = session.run(None, {"images": images})
        np.testing.assert_allclose(logits, by_hand(classifier, images), rtol=1e-3, atol=1e-3)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES) and facts["weights_sha256"] == classifier.sha256
    assert json.loads(facts["normalisation"])["mean"] == list(classifier.stats.mean)


@pytest.mark.parametrize("missing", ["onnxscript", "onnxscript._framework_apis.torch_2_11"])
def test_a_package_that_is_missing_or_too_old_is_one_line(trained, tmp_path, monkeypatch, capsys, missing):
    def refuse(*arguments, **options):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    if missing == "onnxscript":
        monkeypatch.setitem(sys.modules, missing, None)
    else:
        monkeypatch.setattr(torch.onnx, "export", refuse)
    assert main(["export", str(trained), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    line = f"dist_cifar: error: --to onnx: {missing} is not installed; pip install --upgrade -e '.[onnx]'\n"
    assert capsys.readouterr().err == line and not (tmp_path / "out").exists()


def test_torch_export_gives_the_models_logits_for_any_batch(trained, classifier):
    assert main(["export", str(trained), "--to", "torch"]) == 0
    extra = {"metadata.json": ""}
    module = torch.export.load(trained / "export/model.pt2", extra_files=extra).module()
    for images in (synthetic_split(1, 256)[0], synthetic_split(0, 1)[0]):
        np.testing.assert_allclose(
            module(torch.from_numpy(images)).detach(), by_hand(classifier, images), rtol=1e-3, atol=1e-3
        )
    assert json.loads(extra["metadata.json"])["classes"] == list(CLASSES)


def test_the_folder_of_the_export_is_that_of_the_run_wherever_one_is(classifier, trained, tmp_path, monkeypatch):
    for folder, name in ((classifier.checkpoint, "."), (trained / "checkpoints", classifier.checkpoint.name)):
        monkeypatch.chdir(folder)
        found = write.default_directory(dataclasses.replace(classifier, checkpoint=Path(name)))
        assert found == trained.absolute() / "export"
    with pytest.raises(ConfigError, match="is in no run directory; give a folder"):
        write.default_directory(dataclasses.replace(classifier, checkpoint=tmp_path / "step-00000009"))


class Decides(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((1, 2)) if images.float().mean() > 0 else images.float().sum((1, 2))


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_own_network_that_cannot_be_exported_is_one_line(classifier, kind):
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    model = dataclasses.replace(classifier.config.model, name="mine:Decides")
    with pytest.raises(ConfigError, match=f"model.name=mine:Decides: exporting it to {kind} fails: ") as caught:
        write._traced(Decides().eval(), images, {}, kind, dataclasses.replace(classifier.config, model=model))
    assert "\n" not in str(caught.value)


def test_what_fails_with_a_network_of_the_package_is_a_defect(classifier, monkeypatch):
    def fail(*arguments):
        raise ValueError("a defect")

    monkeypatch.setattr(write, "to_torch", fail)
    with pytest.raises(ValueError, match="a defect"):
        write._traced(Decides(), torch.zeros(1), {}, "torch", classifier.config)


def test_without_the_runs_images_it_is_checked_on_generated_ones(classifier, tmp_path, said):
    data = dataclasses.replace(classifier.config.data, source="folder", root=str(tmp_path / "gone"))
    moved = dataclasses.replace(classifier, config=dataclasses.replace(classifier.config, data=data))
    done = export(moved, "torch", tmp_path / "out")
    assert (done.image_count, done.image_kind) == (256, "generated images")
    assert [line for line in said if "cannot be read, and generated ones take their place" in line]


def test_the_images_are_of_every_part_of_the_test_split(classifier):
    data = dataclasses.replace(classifier.config.data, synthetic_test_size=1000)
    larger = dataclasses.replace(classifier, config=dataclasses.replace(classifier.config, data=data))
    images, kind = write._checked_images(larger)
    assert len(images) == 256 and kind == "test images of the run"
    split = load_dataset(data).test.images
    assert np.array_equal(images[0], split[0]) and np.array_equal(images[-1], split[-1])


def test_a_graph_that_computes_something_else_is_not_written(classifier, tmp_path, monkeypatch):
    class Wrong(WithPreprocessing):
        def forward(self, images):
            return super().forward(images) * (1 if not torch.compiler.is_compiling() else 1.1)

    monkeypatch.setattr(write, "WithPreprocessing", Wrong)
    with pytest.raises(CheckpointError, match="differ from the model's"):
        export(classifier, "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_the_summary_says(trained, classifier, tmp_path):
    main(["export", str(trained), "--to", "torch", "--out", str(tmp_path)])
    card = (tmp_path / "README.md").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.2%}" in card and classifier.sha256 in card
    assert all(f"| {name} |" in card for name in CLASSES) and "uint8 [batch, 32, 32, 3]" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "image-classification"
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(summary["test_accuracy"], rel=1e-5)


def test_the_programs_of_the_card_name_the_photo(trained, classifier, tmp_path):
    """Copied from the card and run as they stand, beside the files."""
    photo = synthetic_split(1, 8)[0][5]
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=100, subsampling=0)
    for kind in ("torch", "onnx"):
        main(["export", str(trained), "--to", kind, "--out", str(tmp_path)])
    programs = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 2
    expected = classifier.probabilities(np.asarray(Image.open(tmp_path / "photo.jpg"))[None])[0]
    for program in programs:
        command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", program]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
        )
        label, share = done.stdout.split()
        assert label == CLASSES[expected.argmax()] and float(share) == pytest.approx(expected.max(), abs=1e-3)


def test_a_card_speaks_of_its_own_model_alone(trained, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"of another run")
    main(["export", str(trained), "--to", "torch", "--out", str(tmp_path)])
    assert "`model.pt2`" in (tmp_path / "README.md").read_text()
    assert "model.onnx" not in (tmp_path / "README.md").read_text()


def test_names_in_the_card_are_shown_letter_for_letter(trained, classifier, tmp_path):
    names = ("a|b", "<b>*x*</b>", "[y](z)", "1\n2", "\x1b[2J", *classifier.classes[5:])
    named = dataclasses.replace(classifier, classes=names)
    card = model_card(named, model_metadata(named), {}, ["model.onnx"])
    assert r"a\|b, \<b\>\*x\*\</b\>, \[y\](z), 1 2, \\x1b\[2J, " in card


def test_a_checkpoint_is_a_model_too(trained, classifier, tmp_path):
    found = [load_classifier(path, CPU) for path in sorted((trained / "checkpoints").glob("step-*"))]
    assert [named.step for named in found] == [int(named.checkpoint.name.partition("-")[2]) for named in found]
    (other, *_) = (named for named in found if named.step != classifier.step)
    main(["export", str(other.checkpoint), "--to", "torch", "--out", str(tmp_path)])
    assert "Not evaluated on the test split" in (tmp_path / "README.md").read_text()
