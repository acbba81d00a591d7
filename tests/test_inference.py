"""Running a trained model: predictions, evaluation on other data."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_cifar import inference, plugins
from dist_cifar.cli import main
from dist_cifar.data import dataset, ood_test_sets
from dist_cifar.data.sources.synthetic import CLASSES, synthetic_split
from dist_cifar.errors import ConfigError, DataError
from dist_cifar.inference import load_classifier
from dist_cifar.run.checkpoint import read_checkpoint
from dist_cifar.tools import evaluation
from dist_cifar.tools.export import write
from tests import small_runs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "first"
    small_runs.run(path, "eval.tta=mirror")
    return path


@pytest.fixture
def classifier(trained, said):
    yield load_classifier(trained, CPU)
    assert said == [], "nothing to warn of"


def by_hand(classifier, images: np.ndarray) -> torch.Tensor:
    """Logits from the definition: no kernel of ours, no graph."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.stats.mean, classifier.stats.std))
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return classifier.module(inputs)


# --- predict -----------------------------------------------------------------------------------------------------


def predict(capsys, *words: str, code: int = 0) -> tuple[list[str], list[str]]:
    assert main(["predict", *words]) == code
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def save(pixels: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_probabilities_are_the_softmax_of_the_model(classifier):
    images = synthetic_split(1, 300)[0]  # more than one batch
    logits, mirrored = by_hand(classifier, images), by_hand(classifier, images[:, :, ::-1].copy())
    plain = classifier.probabilities(images)
    np.testing.assert_allclose(plain, logits.softmax(1).numpy(), rtol=1e-3, atol=1e-5)
    found = classifier.probabilities(images, tta=True)
    np.testing.assert_allclose(found, ((logits + mirrored) / 2).softmax(1).numpy(), rtol=1e-3, atol=1e-5)
    assert np.abs(found - plain).max() > 0.01


def test_a_folder_file_and_standard_input_say_the_same(trained, classifier, tmp_path, capsys, monkeypatch):
    images, _ = synthetic_split(1, 4)
    (tmp_path / "sub").mkdir()
    for i, pixels in enumerate(images):
        save(pixels, tmp_path / "sub" / f"{i}.png")
    (tmp_path / ".hidden").write_text("not a picture")
    lines, _ = predict(capsys, str(tmp_path), "--json", "--top", "99", "--checkpoint", str(trained))
    found = [json.loads(line) for line in lines]
    assert [row["image"] for row in found] == [str(tmp_path / "sub" / f"{i}.png") for i in range(4)]
    for row, expected in zip(found, classifier.probabilities(images), strict=True):
        shares = [one["probability"] for one in row["predictions"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
        assert {one["class"]: one["probability"] for one in row["predictions"]} == pytest.approx(
            dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-5
        )
    data = (tmp_path / "sub/2.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    (line,), _ = predict(capsys, "-", "--json", "--top", "99", "--checkpoint", str(trained))
    piped = json.loads(line)
    assert piped["image"] == "-" and [one["class"] for one in piped["predictions"]] == [
        one["class"] for one in found[2]["predictions"]
    ]
    (line,), _ = predict(capsys, str(tmp_path / "sub/2.png"), "--top", "1", "--checkpoint", str(trained))
    best = found[2]["predictions"][0]
    assert line.split()[1:] == [best["class"], f"{best['probability']:.1%}"]


def test_a_photo_is_turned_upright_and_resized(trained, tmp_path, capsys):
    upright = np.asarray(Image.fromarray(synthetic_split(1, 8)[0][6]).resize((320, 320)))
    plain = save(upright, tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned = save(np.rot90(upright).copy(), tmp_path / "turned.png", exif=exif)
    lines, _ = predict(capsys, str(plain), str(turned), "--json", "--checkpoint", str(trained))
    first, second = (json.loads(line)["predictions"] for line in lines)
    assert first == second


def test_what_is_no_picture_is_named_and_the_rest_goes_on(trained, tmp_path, capsys):
    save(synthetic_split(1, 1)[0][0], tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    lines, errors = predict(capsys, str(tmp_path), "--checkpoint", str(trained), code=74)
    assert len(lines) == 1 and "good.png" in lines[0]
    assert len(errors) == 1 and "bad.png: not a readable picture" in errors[0]
    (tmp_path / "empty.png").touch()
    lines, errors = predict(
        capsys,
        *(str(tmp_path / name) for name in ("gone.png", "empty.png", "good.png")),
        "--checkpoint",
        str(trained),
        code=74,
    )
    assert len(lines) == 1 and "good.png" in lines[0], "what follows what is missing is classified too"
    assert (
        "gone.png: there is no such file" in errors[0]
        and "empty.png: not a readable picture (it is empty)" in errors[1]
    )


def test_nothing_on_standard_input_is_an_error(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    lines, (error,) = predict(capsys, "-", "--checkpoint", str(trained), code=74)
    assert lines == [] and "standard input: not a readable picture (it is empty)" in error


def test_standard_input_may_be_closed(trained, tmp_path, capsys, monkeypatch):
    picture = save(synthetic_split(1, 1)[0][0], tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", None)
    assert len(predict(capsys, str(picture), "--checkpoint", str(trained))[0]) == 1
    _, (error,) = predict(capsys, "-", "--checkpoint", str(trained), code=74)
    assert "standard input: not a readable picture (it is empty)" in error


def test_whatever_lies_in_a_folder_is_a_line(trained, tmp_path, capsys):
    folder, picture = tmp_path / "x", synthetic_split(1, 1)[0][0]
    folder.mkdir()
    odd = os.fsencode(folder) + b"/caf\xe9\x1b[31m.png"
    os.rename(save(picture, folder / "a.png"), odd)
    (folder / "Thumbs.db").write_bytes(b"windows")
    os.mkfifo(folder / "pipe")
    (folder / "gone.png").symlink_to("nowhere")
    with (folder / "movie.mp4").open("wb") as file:
        file.truncate(4 << 30)
    (line,), errors = predict(capsys, str(folder), "--checkpoint", str(trained), code=74)
    assert r"caf\udce9\x1b[31m.png  " in line
    assert [error.partition(f"{folder}/")[2] for error in errors] == [
        "gone.png: not a readable picture (a link to nothing: nowhere)",
        "movie.mp4: not a readable picture (4,294,967,296 bytes, more than 256,000,000)",
        "pipe: not a readable picture (no regular file)",
    ]
    (line,), _ = predict(capsys, os.fsdecode(odd), "--json", "--checkpoint", str(trained))
    assert json.loads(line)["image"] == os.fsdecode(odd)
    for source, message in (
        ("", "an empty name: give"),
        (os.devnull, "neither a file nor a pipe"),
        ("x" * 300, "File name too long"),
        (str(folder / "gone.png"), "a link to nothing"),
    ):
        _, (error,) = predict(capsys, source, "--checkpoint", str(trained), code=74)
        assert message in error


def test_a_pipe_that_is_named_is_read(trained, tmp_path, capsys):
    data = save(synthetic_split(1, 1)[0][0], tmp_path / "a.png").read_bytes()
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    (line,), _ = predict(capsys, f"/dev/fd/{read}", "--checkpoint", str(trained))
    os.close(read)
    assert "%" in line


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_shows_the_same(mode, trained, tmp_path, capsys):
    """A grey picture, in files of that mode; 16 bits a channel are no white picture."""
    grey = Image.fromarray(synthetic_split(1, 4)[0][3]).convert("L")
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "x.png")
    else:
        converted = grey.convert("RGB").convert(mode) if mode in ("CMYK", "P") else grey.convert(mode)
        converted.save(tmp_path / "x.tiff")
    grey.convert("RGB").save(tmp_path / "plain.png")
    lines, _ = predict(capsys, str(tmp_path), "--json", "--top", "10", "--checkpoint", str(trained))
    first, second = ({one["class"]: one["probability"] for one in json.loads(line)["predictions"]} for line in lines)
    assert first == pytest.approx(second, abs=0.02)


def test_pixels_without_a_range_are_refused(trained, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40), np.float32)).save(tmp_path / "x.tiff")
    _, (error,) = predict(capsys, str(tmp_path / "x.tiff"), "--checkpoint", str(trained), code=74)
    assert "no known range" in error


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # which this package keeps from the user
def test_a_huge_picture_is_one_line(trained, tmp_path, capsys):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "x.png")
    _, (error,) = predict(capsys, str(tmp_path / "x.png"), "--checkpoint", str(trained), code=74)
    assert "10000x10000 pixels, more than 64,000,000" in error


def test_wrong_paths_get_the_nearest_name(trained, tmp_path, capsys):
    save(synthetic_split(1, 1)[0][0], tmp_path / "photo.png")
    _, (error,) = predict(capsys, str(tmp_path / "foto.png"), "--checkpoint", str(trained), code=74)
    assert f"did you mean {tmp_path / 'photo.png'}?" in error
    _, (error,) = predict(capsys, str(tmp_path), "--checkpoint", str(trained.parent / "frist"), code=2)
    assert f"did you mean {trained}?" in error
    (step, *_) = sorted((trained / "checkpoints").glob("step-*"))
    for wrong, right in (
        (trained / "checkpoints", trained),
        (step / "model.safetensors", step),
        (step.parent / f"{step.name[:-1]}9", step),
        (trained.parent.parent / f"{trained.parent.name}x" / "first", trained),
    ):
        _, (error,) = predict(capsys, str(tmp_path), "--checkpoint", str(wrong), code=2)
        assert f"did you mean {right}?" in error
    _, (error,) = predict(capsys, str(tmp_path), "--checkpoint", str(trained.parent), code=2)
    assert "it holds some, give one of them: first" in error


def test_the_file_best_names_a_checkpoint(trained, classifier):
    named = load_classifier(trained / "checkpoints/best", CPU)
    assert named.checkpoint == classifier.checkpoint


def test_a_damaged_checkpoint_is_named_with_what_to_do(trained, tmp_path, capsys):
    step = load_classifier(trained, CPU).checkpoint
    shutil.copytree(step, tmp_path / "step")
    data = bytearray((tmp_path / "step/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "step/model.safetensors").write_bytes(data)
    _, (error,) = predict(capsys, str(tmp_path), "--checkpoint", str(tmp_path / "step"), code=74)
    assert "SHA-256" in error and "take another of this run" in error


def test_the_latest_run_is_taken_where_none_is_said(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained)
    save(synthetic_split(1, 1)[0][0], tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/begun/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/begun/status.json").write_text("{}")
    _, (note,) = predict(capsys, "a.png")
    assert "with runs/mine/checkpoints/step-" in note
    (tmp_path / "runs/mine").unlink()
    _, (error,) = predict(capsys, "a.png", code=2)
    assert "there is no run with a checkpoint in runs/" in error


def test_a_network_whose_file_was_edited_is_named_and_its_card_has_no_result(tmp_path, monkeypatch, said):
    own = ("model.name=examples.own_model:conv_mixer", "model.options.width=8")
    small_runs.run(tmp_path / "run", *own, "train.epochs=0.1")
    assert not load_classifier(tmp_path / "run", CPU).is_changed
    assert not [line for line in said if "changed since" in line]
    edited = {"examples/own_model.py": "0" * 64}
    monkeypatch.setattr(plugins, "files_of", lambda kind, name: edited)
    classifier = load_classifier(tmp_path / "run", CPU)
    assert said[-1] == "warning: examples/own_model.py changed since the run: the model may compute something else"
    assert classifier.is_changed and write._summary_of(classifier) == {}
    assert write._summary_of(dataclasses.replace(classifier, is_changed=False))


def test_a_network_that_is_not_here_is_no_checkpoint_of_another_version(trained, tmp_path, monkeypatch):
    checkpoint = load_classifier(trained, CPU).checkpoint
    state = read_checkpoint(checkpoint).state
    gone = {**state, "config": {**state["config"], "model.name": "gone_from_here:Net"}}
    monkeypatch.setattr(inference, "require_state", lambda checkpoint: gone)
    with pytest.raises(ConfigError, match=r"model\.name=gone_from_here:Net: .*gone_from_here"):
        load_classifier(checkpoint, CPU)


# --- evaluate ----------------------------------------------------------------------------------------------------


def evaluate(tmp_path: Path, *words: str) -> dict[str, dict]:
    assert main(["evaluate", *words, "--json", str(tmp_path / "found.json")]) == 0
    return json.loads((tmp_path / "found.json").read_text())["results"]


def test_the_test_split_gives_the_number_of_the_summary(trained, tmp_path):
    summary = json.loads((trained / "summary.json").read_text())
    (found,) = evaluate(tmp_path, str(trained)).values()
    assert found["accuracy"] == summary["test_accuracy"] and found["loss"] == summary["test_loss"]
    assert found["class_accuracy"] == summary["test_class_accuracy"] and found["count"] == 80
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high


def test_mirrored_test_images_are_averaged(trained, classifier, tmp_path):
    images, labels = synthetic_split(1, 80)
    (found,) = evaluate(tmp_path, str(trained), "--tta").values()
    right = classifier.probabilities(images, tta=True).argmax(1) == labels
    assert found["accuracy"] == right.mean()
    summary = json.loads((trained / "summary.json").read_text())
    assert (found["accuracy"], found["loss"]) == (summary["test_accuracy_tta"], summary["test_loss_tta"])


def test_published_layouts_are_read(trained, classifier, tmp_path):
    images, labels = synthetic_split(1, 50)
    right = (classifier.probabilities(images).argmax(1) == labels).mean()
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    for name, part in (("v4", slice(10)), ("v6", slice(50))):
        np.save(shifted / f"cifar10.1_{name}_data.npy", images[part])
        np.save(shifted / f"cifar10.1_{name}_labels.npy", labels[part].astype(np.int32))
    found = evaluate(tmp_path, str(trained), "--data", str(shifted))
    assert list(found) == ["cifar10.1_v4", "cifar10.1_v6"] and found["cifar10.1_v6"]["accuracy"] == right

    corrupted = tmp_path / "corrupted"
    corrupted.mkdir()
    black = np.zeros_like(images)
    np.save(corrupted / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    np.save(corrupted / "fog.npy", np.concatenate([images, black, images, black, black]))
    found = evaluate(tmp_path, str(trained), "--data", str(corrupted))
    assert list(found) == [f"fog/{severity}" for severity in range(1, 6)]
    assert found["fog/1"] == found["fog/3"] and found["fog/1"]["accuracy"] == right
    assert found["fog/2"]["accuracy"] == 0.1  # one class for all


def test_evaluate_tells_whether_the_data_are_those_of_the_run(trained, tmp_path, capsys, monkeypatch):
    evaluate(tmp_path, str(trained))
    out, err = capsys.readouterr()
    assert re.search(r"data +synthetic, sha256 \w{12}, the data of the run", out) and err == ""
    load = dataset.load_dataset

    def other(images=None, classes=None):
        def found(config):
            here = load(config)
            test = dataclasses.replace(here.test, images=here.test.images[:, ::-1].copy())
            sha256 = here.content_sha256 if images is None else "ab" * 32
            return dataclasses.replace(here, test=test, content_sha256=sha256, classes=classes or here.classes)

        return found

    monkeypatch.setattr(evaluation, "load_dataset", other(images="other"))
    evaluate(tmp_path, str(trained))
    out, err = capsys.readouterr()
    assert "sha256 abababababab, not the data of the run" in out
    assert "warning: synthetic" in err and "not the images that the run was trained on" in err
    monkeypatch.setattr(evaluation, "load_dataset", other(classes=("x", *CLASSES[1:])))
    assert main(["evaluate", str(trained)]) == 74
    assert "not those of the model: it lacks disc; the model does not know x" in capsys.readouterr().err


def arrays_of(**changes) -> dict[str, np.ndarray | bytes]:
    return {"fog.npy": np.zeros((10, 32, 32, 3), np.uint8), "labels.npy": np.arange(10), **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels.npy": b""}, "labels.npy: cannot be read"),
        ({"fog.npy": b""}, "fog.npy: cannot be read"),
        ({"fog.npy": b"<html>"}, "fog.npy: cannot be read"),
        ({"fog.npy": np.lib.format.magic(1, 0) + b"\x10\0{'descr'"}, "fog.npy: cannot be read"),
        ({"fog.npy": {"a": np.zeros(3)}}, "fog.npy: cannot be read .*archive of arrays"),
        ({"labels.npy": {"a": np.zeros(3)}}, "labels.npy: cannot be read .*archive of arrays"),
        ({"fog.npy": np.uint8(3)}, "fog.npy: images must be"),
        ({"labels.npy": np.int64(1)}, "labels.npy: int64"),
        ({"labels.npy": np.array(list("abcdefghij"))}, "are not the labels of 10 images"),
        ({"labels.npy": np.arange(10) - 3}, "labels are not all from 0 to 9"),
        ({"fog.npy": np.zeros((10, 3, 32, 32), np.uint8)}, "fog.npy: images must be"),
        ({"fog.npy": np.asfortranarray(np.zeros((10, 32, 32, 3), np.uint8))}, None),
        ({"labels.npy": np.arange(10).astype(">i8")}, None),
        ({"labels.npy": np.arange(10).astype(np.uint64)}, None),
    ],
)
def test_arrays_of_other_kinds_are_read_or_one_line(tmp_path, changes, problem):
    for name, value in arrays_of(**changes).items():
        if isinstance(value, bytes):
            (tmp_path / name).write_bytes(value)
        elif isinstance(value, dict):
            np.savez(tmp_path / "x.npz", **value)
            (tmp_path / "x.npz").rename(tmp_path / name)
        else:
            np.save(tmp_path / name, value)
    if problem is None:
        sets, sha256 = ood_test_sets.read_test_sets(tmp_path, ood_test_sets.CLASSES, None)
        assert list(sets) == [f"fog/{severity}" for severity in range(1, 6)] and sha256 is None
        assert sets["fog/2"].labels.tolist() == [2, 3]
    else:
        with pytest.raises(DataError, match=problem):
            ood_test_sets.read_test_sets(tmp_path, ood_test_sets.CLASSES, None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no train/<class>/"),
        ({"cifar10.1_v6_data.npy": np.zeros((3, 32, 32), np.uint8)}, r"must be contiguous uint8 \[n, 32, 32, 3\]"),
        ({"cifar10.1_v6_data.npy": np.zeros((3, 32, 32, 3), np.uint8)}, "are not the labels of 3 images"),
        ({"labels.npy": np.zeros(2, np.int64)}, "no <corruption>.npy"),
        (
            {"labels.npy": np.full(5, 10), "fog.npy": np.zeros((5, 32, 32, 3), np.uint8)},
            "labels are not all from 0 to 9",
        ),
    ],
)
def test_other_files_are_refused(trained, tmp_path, capsys, files, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, array in files.items():
        np.save(folder / name, array)
    if "cifar10.1_v6_data.npy" in files:
        np.save(folder / "cifar10.1_v6_labels.npy", np.zeros(2 if "labels of 3" in message else 3, np.int64))
    assert main(["evaluate", str(trained), "--data", str(folder)]) == 74
    assert re.search(message, capsys.readouterr().err)


def test_labels_of_other_classes_are_warned_of(trained, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "cifar10.1_v6_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.zeros(3, np.int64))
    assert main(["evaluate", str(trained), "--data", str(tmp_path)]) == 0
    assert "classes are called disc, ring" in capsys.readouterr().err
    monkeypatch.setattr(ood_test_sets, "CLASSES", CLASSES)
    assert main(["evaluate", str(trained), "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_one_file_of_several_gets_its_folder(trained, tmp_path, capsys):
    np.save(tmp_path / "fog.npy", np.zeros((5, 32, 32, 3), np.uint8))
    assert main(["evaluate", str(trained), "--data", str(tmp_path / "fog.npy")]) == 74
    assert f"give its folder, {tmp_path}" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--data", str(tmp_path)]) == 74
    assert "data.root" not in capsys.readouterr().err, "the option is called --data"


def test_a_pickle_is_not_loaded(trained, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "labels.npy", np.array([Path()], dtype=object), allow_pickle=True)
    np.save(folder / "fog.npy", np.zeros((5, 32, 32, 3), np.uint8))
    assert main(["evaluate", str(trained), "--data", str(folder)]) == 74
    assert "cannot be read" in capsys.readouterr().err


def test_ranks_share_the_evaluation(ranks, trained):
    """The result of `evaluate` is that of one rank, on three."""
    classifier = load_classifier(trained, CPU)
    found = ranks.run(3, _evaluated, str(trained))
    images, labels = synthetic_split(1, 80)
    logits = by_hand(classifier, images).numpy()
    for confusion, collected in found:
        np.testing.assert_allclose(collected, logits, rtol=1e-3, atol=1e-3)
        assert np.trace(confusion) == (logits.argmax(1) == labels).sum()


def _evaluated(communicator, path):
    from dist_cifar.data.dataset import Split
    from dist_cifar.evaluate import evaluate

    classifier = load_classifier(Path(path), CPU)
    images, labels = synthetic_split(1, 80)
    result = evaluate(
        classifier.module,
        Split(images=images, labels=labels),
        np.arange(80),
        stats=classifier.stats,
        num_classes=10,
        batch_size=16,
        communicator=communicator,
    )
    return result.confusion, result.logits
