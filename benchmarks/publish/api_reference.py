"""Writes docs/api.md from the docstrings of the public names: `python benchmarks/publish/api_reference.py`."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import dist_cifar

PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"
HEAD = """# The Python API

`import dist_cifar` takes no time: each name imports what it needs when it is first used. A training that is started
from Python and one of the command line have the same bits, and resume each other. Types are part of the package.

This page is written by `make docs` from the docstrings, and its blocks run in the suite."""

SECTIONS = {
    "Configure": ("load_config", "Config"),
    "Train": ("train", "launch", "RunResult"),
    "Use a trained model": ("load_model", "TrainedModel"),
    "Components of your own": (
        "register_model",
        "register_data_source",
        "register_optimizer",
        "register_schedule",
        "register_augmentation",
        "register_tracker",
        "register_strategy",
    ),
    "Errors": ("UserError", "RankError"),
    "The parts of a training": ("Trainer", "Strategy", "LRSchedule", "Optimizer", "Tracker", "Source"),
}
"""The public names by their headings."""

EXAMPLES = {
    "load_config": """
        import dataclasses

        import dist_cifar

        config = dist_cifar.load_config("configs/quickstart.yaml", ["train.epochs=3"])
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=9))
        print(config.run.dir, longer.train.epochs)
        try:
            dist_cifar.load_config(None, ["train.epoch=3"])
        except dist_cifar.UserError as error:
            print(error)
    """,
    "register_model": """
        import numpy as np
        import torch
        from torch import nn

        import dist_cifar


        @dist_cifar.register_model("mlp")
        def mlp(*, num_classes, width=64):
            return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, num_classes))


        @dist_cifar.register_data_source("noise")
        def noise(count=400):
            images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
            labels = np.arange(count) % 3
            return images[:-100], labels[:-100], images[-100:], labels[-100:], ["rock", "paper", "scissors"]


        @dist_cifar.register_optimizer("heavy_ball")
        def heavy_ball(parameters, lr, momentum=0.9):
            return torch.optim.SGD(parameters, lr, momentum)


        @dist_cifar.register_schedule("linear")
        def linear(context):
            return lambda step: context.lr * (1 - step / context.total_steps)


        @dist_cifar.register_augmentation("darken")
        def darken(image, generator):
            return (image * generator.uniform(0.5, 1)).astype(np.uint8)


        @dist_cifar.register_tracker("printer")
        class Printer:
            def __init__(self, config, run_dir):
                self.name = config.run.name

            def log(self, row):
                print(self.name, row["kind"], row["step"])

            def finish(self, exit_code, results=None):
                print("ended", exit_code)


        config = dist_cifar.load_config(
            "configs/quickstart.yaml",
            [
                "run.dir=runs/own",
                "model.name=mlp",
                "model.options.width=32",
                "data.source=noise",
                "data.validation_size=30",
                "optimizer.name=heavy_ball",
                "schedule.name=linear",
                "augment.transform=darken",
                "tracking.also=[printer]",
            ],
        )
        print(dist_cifar.train(config))
    """,
    "Trainer": """
        import numpy as np
        import torch

        import dist_cifar
        from dist_cifar.data.arrays import Arrays
        from dist_cifar.distributed.collectives import Communicator
        from dist_cifar.distributed.launch_env import DistEnv
        from dist_cifar.optim import optimizer_factory
        from dist_cifar.run.run_dir import RunDir


        class Printer:
            \"\"\"A Tracker.\"\"\"

            def log(self, row):
                print(row["kind"], row["step"], row["loss"])

            def finish(self, exit_code, results=None):
                print("ended", exit_code)


        class Noise(dist_cifar.Source):
            \"\"\"A Source.\"\"\"

            def key(self, config, cache_dir):
                return "0" * 64

            def read(self, config):
                generator = np.random.Generator(np.random.Philox(0))
                images = generator.integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
                labels = np.arange(40) % 2
                return Arrays(
                    train_images=images,
                    train_labels=labels,
                    test_images=images,
                    test_labels=labels,
                    classes=("this", "that"),
                )


        config = dist_cifar.load_config("configs/quickstart.yaml", ["run.dir=runs/parts", "compute.precision=fp32"])
        alone = Communicator(DistEnv(), device=torch.device("cpu"), timeout_seconds=60)
        trainer = dist_cifar.Trainer.build(config, alone)
        print(trainer.schedule.describe(), trainer.schedule.lr(0))  # an LRSchedule
        print(sum(tensor.numel() for tensor in trainer.strategy.model_state_dict().values()))  # a Strategy
        optimizer = optimizer_factory(config)(trainer.strategy.module.named_parameters())
        print(len(optimizer.param_groups), "group of parameters")  # an Optimizer
        print(Noise().read(config.data).classes)
        with RunDir.of(config).lock():
            assert trainer.fit([lambda config, run_dir: Printer()])
    """,
}
"""Examples of names whose docstring has none."""

SHOWN_BY = {
    "Config": "load_config",
    "RunResult": "train",
    "TrainedModel": "load_model",
    "UserError": "load_config",
    "RankError": "launch",
    **dict.fromkeys(SECTIONS["Components of your own"][1:-1], "register_model"),
    "register_strategy": "Strategy",
    **dict.fromkeys(("Strategy", "LRSchedule", "Optimizer", "Tracker", "Source"), "Trainer"),
}
"""Names that are used in the example of another one."""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for heading, names in SECTIONS.items():
        parts.append(f"## {heading}")
        for name in names:
            parts += _entry(name)
    return "\n\n".join(parts) + "\n"


def _entry(name: str) -> list[str]:
    """The heading, the text, the members and the example of a name."""
    found = getattr(dist_cifar, name)
    node = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0]
    text, _, example = (inspect.getdoc(found) or "").partition("\nExample:\n")
    parts = [f"### {name}"]
    if isinstance(node, ast.FunctionDef):
        parts.append(f"`{_signature(node)}`")
    parts.append(text.strip())
    if isinstance(node, ast.ClassDef) and (members := _members(node)):
        parts.append("\n".join(members))
    example = example or EXAMPLES.get(name, "")
    if example:
        parts.append(f"```python\n{textwrap.dedent(example).strip()}\n```")
    else:
        parts.append(f"Example: [{SHOWN_BY[name]}](#{SHOWN_BY[name].lower()}).")
    return parts


def _signature(node: ast.FunctionDef) -> str:
    arguments = re.sub(r"^(?:self|cls)(?:, )?", "", ast.unparse(node.args))
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{node.name}({arguments}){returns}"


def _members(node: ast.ClassDef) -> list[str]:
    """A line for each public field, property and method that has a docstring."""
    lines = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        text: Any = None
        if isinstance(statement, ast.FunctionDef) and statement.name[0] != "_":
            is_property = any(ast.unparse(decorator) == "property" for decorator in statement.decorator_list)
            shown = statement.name if is_property else _signature(statement)
            text = ast.get_docstring(statement)
        elif isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            shown = f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}"
            text = ast.literal_eval(following.value)
        if text:
            lines.append(f"- `{shown}`: {' '.join(text.split())}")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
