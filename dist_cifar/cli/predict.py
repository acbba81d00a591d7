"""`predict`: classifies images with the model of a run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_cifar.cli.arguments import Commands, path, positive
from dist_cifar.errors import EXIT_DATA, EXIT_DONE, printable
from dist_cifar.job.error_line import print_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dist_cifar.inference import Classifier

logger = logging.getLogger(__name__)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "predict",
        help="classify pictures with the model of a run",
        description="Classify pictures of any format and size with the model that a run tested.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|FOLDER|-", help="files, folders of files, or - for bytes on standard input"
    )
    parser.add_argument(
        "--checkpoint", type=path, metavar="RUN", help="run directory or checkpoint; default: the latest in runs/"
    )
    parser.add_argument("--top", type=positive, default=3, metavar="K", help="classes to show; default: 3")
    parser.add_argument("--tta", action="store_true", help="average each image with its mirror image")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Prints each image's classes; images that cannot be read go to standard error and make the exit code 74."""
    from dist_cifar.config import Config
    from dist_cifar.distributed.device import choose_device
    from dist_cifar.distributed.launch_env import DistEnv
    from dist_cifar.inference import batched, load_classifier, load_images
    from dist_cifar.tracking.console import log_to_stream

    log_to_stream(sys.stderr, "dist_cifar: ")
    classifier = load_classifier(options.checkpoint, choose_device(Config().run.device, DistEnv()))
    if options.checkpoint is None:
        logger.info(f"with {classifier.checkpoint}")
    code = EXIT_DONE
    for batch in batched(load_images(options.images, lambda: sys.stdin.buffer)):
        for name, problem in batch:
            if isinstance(problem, str):
                code = EXIT_DATA
                print_error(printable(f"{'standard input' if name == '-' else name}: {problem}"))
        readable = [(name, pixels) for name, pixels in batch if not isinstance(pixels, str)]
        if readable:
            _classify(classifier, readable, options)
    return code


def _classify(
    classifier: Classifier, images: Sequence[tuple[str, npt.NDArray[np.uint8]]], options: argparse.Namespace
) -> None:
    """Prints a line for each image: its name and its most probable classes."""
    import numpy as np

    from dist_cifar.inference import top_k

    shown = [printable(name) for name, _ in images]
    width = max(map(len, shown))
    found = classifier.probabilities(np.stack([pixels for _, pixels in images]), tta=options.tta)
    for (name, _), text, probabilities in zip(images, shown, found, strict=True):
        best = top_k(probabilities, classifier.classes, min(options.top, len(classifier.classes)))
        if options.json:
            listed = [{"class": label, "probability": share} for label, share in best]
            print(json.dumps({"image": name, "predictions": listed}))
        else:
            print(f"{text:<{width}}  " + "  ".join(f"{printable(label)} {share:.1%}" for label, share in best))
