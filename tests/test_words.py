"""The package's words are the field's: names and phrases that were replaced do not come back, and docstrings are whole
sentences.

A pattern sees identifiers as well as prose: `door` is found in `_Door` and `open_door`, and not in `doorway`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest

from tests import REPOSITORY

SOURCES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "configs/*.yaml",
    "launch/**/*",
    "slurm/*",
    "benchmarks/**/*.py",
    "benchmarks/README.md",
    "dist_cifar/**/*",
)
TEXTS = {".py", ".md", ".yaml", ".sh", ".sbatch", ".html", ".jinja", ".j2", ".css", ".js"}


@dataclass(frozen=True)
class Word:
    """What is not written, what is written instead, and the files in which it may stand."""

    pattern: str
    instead: str
    allowed_in: tuple[str, ...] = ()

    def found_in(self, text: str) -> Iterator[re.Match[str]]:
        """Where it stands as a word or as a part of an identifier, on one line or on two."""
        spaced = self.pattern.replace(" ", r"\s+(?:#\s+)?")
        for match in re.finditer(rf"(?:{spaced})(?![a-z])", text):  # a border in front of it would make this slow
            if not text[max(match.start() - 1, 0) : match.start()].isalpha():
                yield match


OLD_KEYS = (
    r"batch\.virtual_ranks|data\.device_augment|optimizer\.clip_norm|train\.compile|train\.grad_compression"
    r"|train\.max_skipped_steps|train\.non_finite|train\.precision|train\.strategy(?!\.)|train\.zero_stage"
)
OLD_MODULES = (
    r"allocator|bench|checkpoint|convolution|deadline|display|doctor|files|jit|metrics|model|normalization|numerics"
    r"|precision|predictions?|profile|report|rng|rundir|schedule|signals|submit|verify|watch"
    r"|augment[./](?:place|policy|kernel|device)|data[./](?:archive|benchmarks|folder|loader|locks|stage)"
    r"|distributed[./](?:board|communicator|failures|meeting)|strategy[./](?:adam|statistics|tree)"
    r"|tracking[./](?:also|rows|wandb_adapter|wandb_log)"
)
KEY_TABLE = ("dist_cifar/config/load.py",)
WORDS = (
    # what a program does
    Word("[Mm]end(?:s|ed|ing)?", "fix, repair"),
    Word("[Gg]o(?:es|ing)? on|[Ww]ent on|[Gg]one on", "resume, continue"),
    Word("(?:has|have) not come|come so far", "is missing, has not connected, has not reached"),
    Word("let pass|lets pass", "allow, ignore"),
    Word("without a word", "without a final status"),
    Word("closed to you", "not writable"),
    Word("[Nn]obody (?:has tested|can tell)", "untested; indistinguishable"),
    Word("[Aa]s a person says|[Ff]or the person", "what it is, for whom it is, by name"),
    # the rendezvous, the store, the failure detector
    Word("[Bb]oards?", "KeyValueStore, a value in it"),
    Word(r"(?<![Ff]ront\x20)(?<![Ff]ront_)[Dd]oors?", "RendezvousServer, the server's address"),
    Word("[Gg]uests?", "Peer, rank"),
    Word("[Kk]nock(?:s|ed|ing)?", "connect"),
    Word("[Mm]eetings?", "rendezvous"),
    Word("bury|bur(?:ied|ies)", "kill_unresponsive"),
    Word("[Tt]roubles", "unhealthy ranks, problems"),
    Word("FailureWatch", "FailureDetector"),
    Word("Vote", "AsyncAnyReduce"),
    Word("on_first_rank", "run_on_rank0"),
    Word("wait_for_all", "barrier"),
    Word("require_equal", "assert_equal_across_ranks"),
    # the step and its state
    Word("LocalTree", "TreeAccumulator"),
    Word("RunningStatistics", "the names of batchnorm_stats"),
    Word("(?:model|optimizer|rank)_tensors", "model_state_dict, optimizer_state_dict, per_rank_state"),
    Word("_Run", "Trainer and its collaborators"),
    Word("OwnTime", "ComputeTimer"),
    Word("EachOnce", "ExactlyOnce"),
    Word("begun_with", "previous_config"),
    Word("starts_over", "config_changed"),
    Word("watches_test", "selects_on_test"),
    Word("lr_cut", "lr_reduction"),
    Word("MirrorAveraged|FromPixels", "ViewAverage, WithPreprocessing"),
    Word("use_once|use_kernels_once|use_products|use_fused|is_worth_it", "warm_up, replace_small_convs, ..."),
    Word(r"say(?=\()|(?<=[._])speaks", "logger.info, is_main_process"),
    # the configuration and the files
    Word("clip_norm", "max_grad_norm", KEY_TABLE),
    Word(OLD_KEYS, "the key as it is called now", (*KEY_TABLE, "benchmarks/suite/compare_commits.py")),
    Word(rf"dist_cifar[./](?:{OLD_MODULES})(?![\w-])", "the module as it is called now"),
)


@cache
def texts() -> dict[str, str]:
    """Every file whose words count, by its path in the repository."""
    paths = {path for source in SOURCES for path in REPOSITORY.glob(source) if path.suffix in TEXTS}
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def hits(word: Word, name: str, text: str) -> list[str]:
    if name in word.allowed_in:
        return []
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {word.instead}"
        for match in word.found_in(text)
    ]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.pattern[:40])
def test_replaced_words_stay_away(word):
    assert [hit for name, text in texts().items() for hit in hits(word, name, text)] == []


def test_every_word_that_may_stand_somewhere_stands_there():
    for word in WORDS:
        for name in word.allowed_in:
            assert any(word.found_in(texts()[name])), f"{word.pattern} is not in {name}: take the exception away"


@pytest.mark.parametrize(
    "text",
    [
        "Mend the driver.",
        "the run goes on offline",
        "a comment that goes\n    # on in the next line",
        "class _Door:",
        "self._guests.append(guest)",
        "the doors of the job",
        "dist_cifar/distributed/meeting.py",
        "from dist_cifar.model import build_model",
        "watch = FailureWatch()",
        "vote = Vote(communicator, 2)",
        "strategy.model_tensors()",
        "python train.py train.strategy=ddp",
        "say(line)",
        "It ended without a word.",
    ],
)
def test_replaced_words_are_found(text):
    assert [hit for word in WORDS for hit in hits(word, "dist_cifar/somewhere.py", text)]


@pytest.mark.parametrize(
    "text",
    [
        "The front door of the project.",
        "We recommend TensorBoard; see the dashboard.",
        "one vote a step",
        "from dist_cifar.models.resnet import build_model",
        "dist_cifar/run/checkpoint.py and dist_cifar/tools/report.py",
        "python -m dist_cifar report runs/quickstart",
        "train.epochs=3 strategy.name=ddp",
        "torch.nn.utils.clip_grad_norm_",
    ],
)
def test_other_words_may_stand(text):
    assert [hit for word in WORDS for hit in hits(word, "dist_cifar/somewhere.py", text)] == []


def test_there_are_texts_to_look_through():
    assert len([name for name in texts() if name.startswith("dist_cifar/")]) > 50
    assert {"README.md", "docs/tour.md", "slurm/job.sh", "benchmarks/README.md"} <= texts().keys()


# --- docstrings --------------------------------------------------------------------------------------------------

NAMES = r"argparse|bf16|float(?:32)?|glibc|int64|numba|torch|uint8"
"""Types and programs, which are written small where a sentence begins too."""
FRAGMENT = re.compile(r"(?:Of|That of|Those of|That which|Those which|One that|Who|Whose)\b|As `[^`]+`\.$|Likewise\b")
"""How a docstring begins that leaves out what it is about."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring: of modules, classes, functions, and of the names above a string."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        before: ast.AST | None = node if isinstance(node, owners) else None
        for statement in body:
            is_text = (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            )
            if is_text and (before is node or isinstance(before, ast.Assign | ast.AnnAssign)):
                yield statement.lineno, statement.value.value.strip()
            before = statement


def fault_of(docstring: str) -> str | None:
    """What is wrong with a docstring, or None."""
    first = docstring.partition("\n\n")[0]
    if not re.match(rf"[A-Z`\"'(\[{{0-9]|(?:{NAMES})\b", first):
        return "begins without a capital letter"
    if not first.endswith((".", ":", ":**", "?", "`", "```")):
        return "its first paragraph ends without a full stop"
    if FRAGMENT.match(" ".join(docstring.split())):
        return "is a fragment: begin with what the thing does or is"
    return None


PACKAGE = [name for name in texts() if name.startswith("dist_cifar/") and name.endswith(".py")]


@pytest.mark.parametrize("name", PACKAGE)
def test_docstrings_are_sentences(name):
    found = [(line, text, fault_of(text)) for line, text in docstrings(texts()[name])]
    assert [f"{name}:{line}: {text.splitlines()[0]!r} {fault}" for line, text, fault in found if fault] == []


@pytest.mark.parametrize(
    ("source", "is_right"),
    [
        ('"""Trains."""', True),
        ('def f():\n    """Returns the sum.\n\n    More.\n    """', True),
        ('x = 1\n"""Seconds between two signs of life."""', True),
        ('x = 1\n"""`seed`: the operations below."""', True),
        ('print()\n"""no docstring"""', True),
        ('"""trains."""', False),
        ('"""Trains"""', False),
        ('def f():\n    """Of the run."""', False),
        ('def f():\n    """That of a rank which failed."""', False),
        ('class A:\n    x: int = 1\n    """Those of a rank."""', False),
        ('class A:\n    """As `BatchNormReLU`."""', False),
    ],
)
def test_faults_of_docstrings_are_found(source, is_right):
    assert ([fault_of(text) for _, text in docstrings(source)] in ([], [None])) == is_right
