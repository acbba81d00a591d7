"""Renders the model card: a Markdown page with the header that Hugging Face's hub reads.

Contract: all facts in it come from the classifier and its run's summary; a name that the template misspells is an
error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dist_cifar.errors import printable
from dist_cifar.inference import Classifier
from dist_cifar.run.predictions import wilson_interval

MODEL_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
"""The file that each kind of export is written to; beside its name with `.py.j2` lies a program that runs it."""

OWN_MARK = b"that was trained by dist_cifar on the images of"
"""Part of every card."""


def model_metadata(classifier: Classifier) -> dict[str, Any]:
    """The facts inside an exported model: its input, its output and where it comes from."""
    return {
        "model": classifier.config.model.name,
        "classes": list(classifier.classes),
        "input": "images: uint8 [batch, 32, 32, 3], RGB; other sizes are resized to 32x32 by an antialiased bilinear"
        " filter",
        "normalisation": {
            "inside the graph": True,
            "mean": list(classifier.stats.mean),
            "std": list(classifier.stats.std),
        },
        "output": "logits: float32 [batch, classes]; softmax gives probabilities",
        "step": str(classifier.step),
        "weights_sha256": classifier.sha256,
    }


def model_card(
    classifier: Classifier, metadata: Mapping[str, Any], summary: Mapping[str, Any], files: Sequence[str]
) -> str:
    """The card of an exported model, for its folder.

    `files` are the exported ones, values of `MODEL_FILES`; `summary` is empty for another checkpoint than the best.
    """
    data = classifier.config.data
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_cifar.tools.export"),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda share, digits: f"{share:.{digits}%}",
        "thousands": lambda count: f"{count:,.0f}",
        "json": json.dumps,
        "text": plain_text,
    }
    return environment.get_template("model_card.md.j2").render(
        classifier=classifier,
        config=classifier.config,
        metadata=metadata,
        summary=summary,
        data=data.source if data.source != "folder" else Path(data.root).name,
        files=files,
        test=_test_counts(summary) if summary else None,
    )


def plain_text(name: str) -> str:
    """A name as Markdown shows it letter for letter, on one line, in a cell of a table too."""
    return re.sub(r"[\\`*\[\]<>|&]", r"\\\g<0>", printable(" ".join(name.split())))


def _test_counts(summary: Mapping[str, Any]) -> dict[str, Any]:
    confusion = np.array(summary["test_confusion"])
    count = int(confusion.sum())
    low, high = wilson_interval(int(np.trace(confusion)), count)
    return {"count": count, "low": low, "high": high}
