"""Computes what the sections about a single run show: the first screen, classes, mistakes, calibration, settings.

Contract: pure functions of a `Run`; the templates only lay out what they return.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_cifar.config import Config, describe, flatten
from dist_cifar.errors import counted
from dist_cifar.run.predictions import Predictions
from dist_cifar.run.summary import test_step
from dist_cifar.tools.report.charts import points_of
from dist_cifar.tools.report.drawing import BarChart, bar_chart
from dist_cifar.tools.report.formats import duration, number
from dist_cifar.tools.report.read import Run

CALIBRATION_BINS = 10
"""Bins of the reliability diagram."""
MAX_FITTING_CLASSES = 12
"""Classes whose confusion table is made to fit the screen of a phone."""

Card = tuple[str, str, str]
"""(label, value, note) on the first screen."""


def headline_cards(run: Run) -> list[Card]:
    """The facts of the first screen, of which a young run has fewer."""
    summary, trained = run.summary, run.of_kind("train")
    cards = _result_cards(run)
    if trained and not summary:
        loss, accuracy = (points_of(trained[-1:], key) for key in ("loss", "accuracy"))
        note = f"accuracy {accuracy[0][1]:.2%}" if accuracy else ""
        cards.append(("training loss", number(loss[0][1]) if loss else "not finite", note))
    if run.rows:
        last = run.rows[-1]
        done = f"epoch {number(last['epoch'])}, step {last['step']:,}"
        left = run.seconds_left
        note = done if left is None else f"{done}; about {duration(left)} of training left"
        cards.append(("time", duration(summary.get("wall_seconds", last["seconds"])), note))
    if trained:
        speed = summary.get("images_per_second", float(np.median([row["images_per_second"] for row in trained])))
        wait = summary.get("data_wait_share", float(np.mean([row["data_wait_share"] for row in trained])))
        cards.append(("throughput", f"{speed:,.0f} images/s", f"data wait {wait:.1%} of a step"))
    if run.starts:
        sizes = [start["world_size"] for start in run.starts]
        changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
        hardware = ", ".join(dict.fromkeys(start["device"] for start in run.starts))
        shown = " → ".join(map(str, changes)) if len(changes) <= 5 else ", ".join(map(str, sorted(set(changes))))
        cards.append(("world size", shown, f"{hardware}, {counted(len(sizes), 'start')}"))
    cards.append(("model", run.config.model.name, f"{run.config.strategy.name}, {run.config.compute.precision}"))
    return cards


def _result_cards(run: Run) -> list[Card]:
    summary, evaluations = run.summary, run.of_kind("eval")
    if summary:
        epoch = summary["best_step"] * summary["epochs"] / summary["steps"]
        chosen = f"{summary['best_val_accuracy']:.2%} on the {summary['best_chosen_on']} split"
        if test_step(summary) != summary["best_step"]:
            chosen += "; the last one was tested"
        average = run.config.average.name
        averaged = "" if average == "none" else f"; average of the weights: {average}"
        cards = [
            ("test accuracy", f"{summary['test_accuracy']:.2%}", f"95% interval {run.accuracy_interval}{averaged}"),
            ("best epoch", f"{epoch:g} of {summary['epochs']:g}", chosen),
        ]
        if summary.get("test_accuracy_tta") is not None:
            views = f"test-time augmentation: {summary.get('tta')}"
            cards.insert(1, ("with TTA", f"{summary['test_accuracy_tta']:.2%}", views))
        return cards
    if evaluations:
        best = max(evaluations, key=lambda row: row["accuracy"])
        return [(f"best {best['split']} accuracy", f"{best['accuracy']:.2%}", f"epoch {number(best['epoch'])}")]
    return []


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of test images in the confusion table."""

    count: int
    kind: str
    """`good` on the diagonal, else `bad`: classes of the style sheet."""
    strength: float
    """Strength of the colour, from 0 to 1."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The confusion table and the accuracy of each class."""

    names: list[str]
    rows: list[list[Cell | None]]
    """Cells by true and predicted class; None for no image, because a hundred classes have ten thousand cells."""
    accuracies: dict[str, float | None]
    frequent_mistakes: list[str]
    fits: bool


def classes(run: Run) -> Classes:
    """The confusion table and the accuracies of the classes, from the summary of a run."""
    accuracies = run.summary["test_class_accuracy"]
    names, confusion = list(accuracies), np.array(run.summary["test_confusion"])
    return Classes(
        names=names,
        rows=[_confusion_row(i, confusion[i].tolist(), names) for i in range(len(names))],
        accuracies=accuracies,
        frequent_mistakes=_frequent_mistakes(confusion, names),
        fits=len(names) <= MAX_FITTING_CLASSES,
    )


def _confusion_row(true: int, counts: Sequence[int], names: Sequence[str]) -> list[Cell | None]:
    total = max(sum(counts), 1)
    row: list[Cell | None] = []
    for predicted, count in enumerate(counts):
        is_right, share = true == predicted, count / total
        cell = Cell(
            count=count,
            kind="good" if is_right else "bad",
            strength=share if is_right else min(1.0, 4 * share),
            note=f"{count} of {total} {names[true]} were taken for {names[predicted]}",
        )
        row.append(cell if count else None)
    return row


def _frequent_mistakes(confusion: npt.NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """The five most frequent mistakes, as text."""
    wrong = confusion * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    pairs = [divmod(int(index), len(names)) for index in order if wrong.flat[index]]
    return [f"{names[true]} taken for {names[predicted]} ({wrong[true, predicted]:,})" for true, predicted in pairs]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A test image that is classified wrongly."""

    index: int
    image: str
    """A `data:` address."""
    true: str
    predicted: str
    true_share: float
    """The probability that the model gave the true class."""
    predicted_share: float


def worst_mistakes(found: Predictions) -> list[Mistake]:
    """The mistakes of which the predictions hold the images, the worst first."""
    mistakes = []
    for index, image in zip(found.worst_indices.tolist(), found.worst_images, strict=True):
        true, predicted = found.labels[index], found.predicted[index]
        mistakes.append(
            Mistake(
                index=index,
                image=_png(image),
                true=found.classes[true],
                predicted=found.classes[predicted],
                true_share=float(found.probabilities[index, true]),
                predicted_share=float(found.probabilities[index, predicted]),
            )
        )
    return mistakes


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The reliability diagram and the expected calibration error of Guo et al. (2017)."""

    error: float
    confidence: float
    """Mean confidence over all test images."""
    accuracy: float
    accuracies: BarChart
    shares: BarChart


def calibration(found: Predictions) -> Calibration:
    """How sure the model is, and how often it is right, in `CALIBRATION_BINS` bins of its confidence."""
    confidence = found.probabilities.max(axis=1).astype(np.float64)
    right = found.predicted == found.labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    error, accuracies, shares = 0.0, [], []
    for i in range(CALIBRATION_BINS):
        inside = bins == i
        if not inside.any():
            continue
        accuracy, mean, share = float(right[inside].mean()), float(confidence[inside].mean()), float(inside.mean())
        error += share * abs(accuracy - mean)
        note = f"{int(inside.sum()):,} images, confidence {mean:.1%}, accuracy {accuracy:.1%}"
        accuracies.append((i, accuracy, note))
        shares.append((i, share, note))
    return Calibration(
        error=error,
        confidence=float(confidence.mean()),
        accuracy=float(right.mean()),
        accuracies=bar_chart(
            "Accuracy of the images at each confidence", "accuracy", accuracies, bins=CALIBRATION_BINS, diagonal=True
        ),
        shares=bar_chart(
            "How many images have that confidence", "share of images", shares, bins=CALIBRATION_BINS, diagonal=False
        ),
    )


def augmentation_sheet(found: Predictions) -> str:
    """One picture, as a `data:` address: a row for each training image, transparent between the images."""
    rows, columns, size = found.augmented.shape[:3]
    pitch = size + 2
    sheet = np.zeros((rows * pitch - 2, columns * pitch - 2, 4), np.uint8)
    for i in range(rows):
        for j in range(columns):
            part = sheet[i * pitch : i * pitch + size, j * pitch : j * pitch + size]
            part[..., :3], part[..., 3] = found.augmented[i, j], 255
    return _png(sheet)


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def profile_rows(run: Run) -> list[tuple[str, str]]:
    """Where the time of a step goes, as (name, text); empty for a run that was not profiled."""
    if not run.profile:
        return []
    from dist_cifar.run import step_profiler  # imports torch, which nothing else here needs

    return step_profiler.lines(run.profile)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of the config."""

    key: str
    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The config of a run, and the versions and numerics it ran with."""

    changed: list[Setting]
    """Fields that differ from the defaults."""
    unchanged: list[Setting]
    facts: dict[str, str]


def settings(run: Run) -> Settings:
    """The fields of the config, and the facts of the summary about the code, the data and the machine."""
    defaults, meanings = flatten(Config()), {key: text for key, _, _, text in describe()}
    changed: list[Setting] = []
    unchanged: list[Setting] = []
    for key, value in flatten(run.config).items():
        setting = Setting(key=key, value=shown_value(value), meaning=meanings[key])
        (unchanged if value == defaults[key] else changed).append(setting)
    names = ("git_revision", "weights_sha256", "data_sha256", "inexact_since_step")
    facts = {name: run.summary.get(name) for name in names}
    facts |= (run.summary.get("versions") or {}) | (run.summary.get("numerics") or {})
    facts |= run.summary.get("own_files") or {}
    shown = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    return Settings(changed=changed, unchanged=unchanged, facts=shown)


def shown_value(value: Any) -> str:
    """A value of the config, as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
