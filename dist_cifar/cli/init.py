"""`init`: writes what a project of one's own begins with: configs, launch files, batch scripts and a network.

Contract: a file that exists is never overwritten, and one that could not be written to its end is removed. The files
lie in `project/`, where a clone has links to its own `configs/`, `launch/` and `slurm/`, and a wheel has their files.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from dist_cifar.cli.arguments import Commands, new_folder
from dist_cifar.errors import EXIT_DONE, ConfigError, counted, listed, printable

PROJECT = Path(__file__).with_name("project")
PARTS = {
    "configs": ("trainings, to run or to copy", ("*.yaml",)),
    "launch": ("what starts ranks, on this machine or on several", ("*.sh", "accelerate/*.yaml")),
    "slurm": ("batch scripts, with the options of your cluster at their top", ("*.sh", "*.sbatch", "logs/.gitignore")),
    "my_models.py": ("a network of your own: model.name=my_models:Net model.options.width=64", ()),
}
"""What each part of a project is for, and which files it has: beside them a clone may hold others, as logs of jobs."""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "init",
        help="write configs, launch files, batch scripts and an example network for a project of your own",
        description="Write configs/, launch/, slurm/ and my_models.py, to train and to submit jobs outside a clone of"
        " the repository. A file that exists is kept as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", type=new_folder, default=Path(), metavar="DIR", help="default: this one")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Writes the files, and prints which, and what to type next. Returns the exit code."""
    kept = []
    for part, (purpose, patterns) in PARTS.items():
        names = list(_files(part, patterns))
        here = [name for name in names if not _write_new(PROJECT / name, options.folder / name)]
        kept += here
        if len(here) < len(names):
            count = f"{counted(len(names) - len(here), 'file')}: " if patterns else ""
            print(f"wrote {part + '/' if patterns else part:<13}{count}{purpose}")
    if kept:
        print(f"kept  {listed(kept, 3)}: what exists is never overwritten")
    if options.folder != Path():
        print(f"next: cd {printable(shlex.quote(str(options.folder)))}")
    print("next: dist-cifar train --ranks 2 --config configs/quickstart.yaml")
    return EXIT_DONE


def _files(part: str, patterns: tuple[str, ...]) -> Iterator[str]:
    """The files of a part, relative to the project."""
    if not patterns:
        yield part
    for pattern in patterns:
        yield from sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / part).glob(pattern))


def _write_new(source: Path, target: Path) -> bool:
    """Copies a file, as executable as it is, unless `target` exists, and returns whether it did."""
    content = source.read_bytes()
    mode = 0o777 if os.access(source, os.X_OK) else 0o666
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"init: {target.parent} cannot be made: there is a file in its way; give another folder"
        ) from None
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True
