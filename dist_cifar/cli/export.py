"""`export`: writes the model of a run for other programs."""

from __future__ import annotations

import argparse
import sys

from dist_cifar.cli.arguments import Commands, new_folder, path
from dist_cifar.errors import EXIT_DONE, ConfigError


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="write the model of a run for other programs: torch.export or ONNX",
        description="Write the model that a run tested as a graph that takes pixels (uint8, any number of images) and"
        " has the normalisation inside, compare it with the model, and write a model card beside it.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--to", choices=("torch", "onnx"), required=True)
    parser.add_argument("--out", type=new_folder, metavar="DIR", help="default: RUN/export")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Exports the model and prints where it is. Returns the exit code."""
    import torch

    from dist_cifar.inference import load_classifier
    from dist_cifar.tools.export import default_directory, export
    from dist_cifar.tracking.console import log_to_stream

    log_to_stream(sys.stderr, "dist_cifar: ")
    classifier = load_classifier(options.run, torch.device("cpu"))
    try:
        directory = options.out or new_folder(str(default_directory(classifier)))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--out: {error}") from None
    done = export(classifier, options.to, directory)
    precision = classifier.config.compute.precision
    print(f"model    {done.path} ({done.path.stat().st_size / 1e6:.1f} MB), step {classifier.step}")
    print(f"graph    float32; the run computed in {precision}")
    print("input    uint8 [batch, 32, 32, 3], RGB; normalised inside the graph")
    print(
        f"checked  on {done.image_count} {done.image_kind}: logits differ from the float32 model's by"
        f" {done.largest_difference:.1g} at most,"
    )
    print(f"         and {done.same_class_count} of {done.image_count} classes are those of the {precision} model")
    print(f"card     {directory / 'README.md'}")
    return EXIT_DONE
