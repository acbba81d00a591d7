"""Every page: its blocks run as typed or say why not, its commands are valid, its links lead somewhere.

A block of `sh` or `python` runs, unless the line above it is `<!-- not run: REASON -->`.
The blocks of a page are taken in their order, in one copy of the repository that also has what a user would have
(`folder_of`): a trained quickstart, a virtual environment, pictures. `shortened` is all that is changed in a command.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from dist_cifar.cli.parser import parse
from dist_cifar.config import load_config
from tests import PATIENCE_SECONDS, REPOSITORY

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
TESTS = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
LANGUAGES = {"sh": ["bash", "-ec"], "python": [sys.executable, "-c"]}
"""What runs a block: it gets it as its last argument."""
MARK = re.compile(r"<!-- not run: ([^\n]*?) -->")
DOORS = r"dist_cifar/train\.py|-m dist_cifar\.train|dist_cifar train|dist-cifar train"
TRAINING = re.compile(rf"{DOORS}|launch/local\.sh(?: --ranks \d+)?|launch/torchrun\.sh")
QUICK = (
    "run.device=cpu run.log_every_steps=2 data.source=synthetic data.synthetic_train_size=72"
    " data.synthetic_test_size=80 data.validation_size=40 model.name=resnet8 batch.global_size=16"
    " compute.precision=fp32 train.epochs=1"
)
"""Goes to every training command, but for the fields that it sets itself."""
LOADED = re.compile(r'(load_config\("configs/[^"]+", )\[(.*?)\]')
"""Where a block of Python reads the config of a training, with its overrides."""


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    line: int
    language: str
    text: str
    reason: str | None
    """Why it does not run."""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that could run."""
    fenced = re.compile(rf"(?:{MARK.pattern}\n)?^```({'|'.join(LANGUAGES)})\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Block(text[: match.start(2)].count("\n") + 1, match[2], match[3], match[1]) for match in fenced.finditer(text)
    ]


def shortened(text: str) -> str:
    """The same commands, training for some steps on little data."""

    def quick(given: list[str]) -> list[str]:
        keys = {word.partition("=")[0] for word in given}
        return [word for word in QUICK.split() if word.partition("=")[0] not in keys]

    def line(command: str) -> str:
        command = TRAINING.sub(lambda match: " ".join([match[0], *quick(command.split())]), command)
        return LOADED.sub(loaded, command)

    def loaded(match: re.Match[str]) -> str:
        overrides = [*ast.literal_eval(f"[{match[2]}]")]
        return f"{match[1]}{[*quick(overrides), *overrides]}"

    return "\n".join(line(command) for command in text.split("\n"))


def run(block: Block, folder: Path) -> str:
    """What it prints. Raises `AssertionError` with that if it fails."""
    environ = os.environ | {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*LANGUAGES[block.language], shortened(block.text)],
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, f"exit code {done.returncode} of the block at line {block.line}:\n{done.stdout}"
    return done.stdout


def copied(source: Path, target: Path) -> Path:
    """A copy of a checkout, without what git does not keep but for compiled code, which is slow to make again."""
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "data", "wandb", "build", "dist")

    def ignore(folder: str, names: list[str]) -> set[str]:
        at_top = Path(folder) == source
        return {name for name in ignored(folder, names) if at_top} | (
            {"runs"} if source == REPOSITORY and at_top else set()
        )

    return Path(shutil.copytree(source, target, ignore=ignore, symlinks=True))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after a (short) `make quickstart`, with what the pages take for given beside it."""
    folder = copied(REPOSITORY, tmp_path_factory.mktemp("documents") / "trained")
    launch = re.search(r"(?m)^LAUNCH := \$\(BIN\)/(.*)$", (folder / "Makefile").read_text())[1]
    run(Block(0, "sh", f"{launch} --config configs/quickstart.yaml\n", None), folder)
    for path in ("photo.png", "folder/one.jpg"):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.effect_noise((64, 48), 50).convert("RGB").save(folder / path)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for split, count in (("train", 60), ("test", 10)):
            for kind in ("cats", "dogs"):
                for i in range(count):
                    archive.write(folder / "photo.png", f"{split}/{kind}/{i}.png")
    return folder


@pytest.fixture
def folder_of(trained: Path, tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        folder = copied(trained, tmp_path / "dist_cifar")
        (folder / ".venv").symlink_to(sys.prefix)
        return folder

    return make


RUNNING = [page for page in PAGES if any(block.reason is None for block in blocks_of(page.read_text()))]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_blocks_run(page, folder_of):
    folder = folder_of()
    for block in blocks_of(page.read_text()):
        if block.reason is None:
            run(block, folder)


def test_pages_have_blocks_that_run():
    assert {"README.md", "docs/tour.md", "docs/strategies.md", "docs/tracking.md"} <= set(map(name_of, RUNNING))


def wrong_marks(text: str) -> list[str]:
    """Marks that are not above a block, say nothing, or name a test or a file that does not exist."""
    reasons = [block.reason for block in blocks_of(text) if block.reason is not None]
    loose = Counter(re.findall(r"(?m)^<!-- not run.*", text)) - Counter(
        f"<!-- not run: {reason} -->" for reason in reasons
    )
    wrong = list(loose.elements())
    for reason in reasons:
        files = re.findall(r"[\w./-]*/[\w./-]*\w", reason)
        tests = re.findall(r"\btest_\w+\b(?!\.py)", re.sub(r"\S*/\S*", "", reason))
        if (
            len(reason.split()) < 3
            or not all((REPOSITORY / name).exists() for name in files)
            or not all(f"def {name}(" in TESTS for name in tests)
        ):
            wrong.append(reason)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_do_not_run_say_why(page):
    assert wrong_marks(page.read_text()) == []


@pytest.mark.parametrize(
    ("mark", "is_right"),
    [
        ("<!-- not run: it needs eight GPUs -->\n", True),
        ("<!-- not run: tests/integration/documents/test_blocks.py runs it -->\n", True),
        ("<!-- not run: test_blocks_run does it -->\n", True),
        ("<!-- not run: tests/test_nothing.py runs it -->\n", False),
        ("<!-- not run: test_that_is_missing does it -->\n", False),
        ("<!-- not run: why -->\n", False),
        ("<!-- not run: it needs eight GPUs -->\n\n", False),
        ("<!-- not run it needs eight GPUs -->\n", False),
    ],
)
def test_wrong_marks_are_found(mark, is_right):
    text = f"Text.\n\n{mark}```sh\nfalse\n```\n"
    assert (wrong_marks(text) == []) == is_right


def test_a_block_that_fails_is_found(tmp_path):
    blocks = blocks_of("One.\n\n```sh\necho said && cd /\ntest $PWD = /\n```\n\n```sh\nfalse\ntrue\n```\n")
    assert run(blocks[0], tmp_path) == "said\n"
    with pytest.raises(AssertionError, match="block at line 8"):
        run(blocks[1], tmp_path)


# --- what is not run is valid all the same -----------------------------------------------------------------------

COMMANDS = [
    line.rstrip(" &")
    for page in PAGES
    for block in blocks_of(page.read_text())
    if block.language == "sh"
    for line in block.text.splitlines()
]
OTHERS = "init|verify|data|submit|doctor|report|watch|evaluate|predict|export"


def arguments_of(line: str, doors: str) -> list[str]:
    """The program's own arguments, with a file in place of the one that the reader has."""
    line = line.replace("--config FILE", "--config configs/quickstart.yaml").replace("key=value ...", "train.epochs=3")
    line = re.sub(r" (\|\||[<>|]).*", "", line)
    return shlex.split(re.split(rf"(?:{doors})(?= |$)", line, maxsplit=1)[1], comments=True)


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(DOORS, line)])
def test_training_commands_are_valid(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    launcher = re.search(r"--config_file (\S+)", line)
    assert launcher is None or (REPOSITORY / launcher[1]).is_file()
    options = parse(["train", *arguments_of(line, DOORS)])
    load_config(options.config, options.overrides)


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(rf"dist[_-]cifar ({OTHERS})\b", line)])
def test_other_commands_are_valid(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options = parse(arguments_of(line, "dist[_-]cifar"))
    if "overrides" in options:
        load_config(options.config, options.overrides)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    assert re.search(rf"(?m)^{line.split()[1]}:", (REPOSITORY / "Makefile").read_text())


def test_there_are_commands():
    assert sum(bool(re.search(DOORS, line)) for line in COMMANDS) >= 15


# --- links -------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text)):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def wrong_links(page: Path, text: str) -> list[str]:
    """Relative links to files that do not exist or to headings that their page does not have."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```", "", text)):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(text if target == page else target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert wrong_links(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("link", "is_right"),
    [
        ("../README.md", True),
        ("../README.md#how-it-compares", True),
        ("#whats-new-_here_-c", True),
        ("#twice-1", True),
        ("https://example.org/#none", True),
        ("trees.svg", False),
        ("../README.md#how-it-compare", False),
        ("#twice-2", False),
        ("#inside", False),
    ],
)
def test_wrong_links_are_found(link, is_right):
    text = f"# What's new: `_here_`, C?\n## Twice\n## Twice\n```sh\n# inside\n```\nSee [it]({link}).\n"
    assert (wrong_links(REPOSITORY / "docs/tour.md", text) == []) == is_right


def test_every_page_of_docs_is_reached_from_the_readme():
    linked = re.findall(r"\]\((docs/\w+\.md)", (REPOSITORY / "README.md").read_text())
    assert {name_of(page) for page in PAGES if page.parent.name == "docs"} <= set(linked)
