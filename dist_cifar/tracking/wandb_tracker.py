"""Weights & Biases behind the `Tracker` interface.

Contract: nothing depends on W&B. Whatever it does (no key, no server, a server lost half-way, an exception), the run
continues; opening takes less than 10 seconds, finishing less than 10 unless checkpoints are uploaded, and a log call
waits for no network. There is never a prompt. The only error is `ConfigError`: asked for and not installed, or a run
directory that is another run's of a sweep.

One run directory is one W&B run: its id is in `wandb_id`, and a resumed run has it too. At the first start it is
`WANDB_RUN_ID`, which the agent of a sweep sets, else made up. Files go to `wandb/` in the run directory. Logged are:

    global_step     the row's `step`; the x axis of every chart
    epoch, samples  as they are in the row
    <kind>/<name>   everything else of a row of that kind: `train/loss`, `eval/accuracy`

    test/confusion, test/classes, test/worst_mistakes   in the last row: two tables, and the worst mistakes as pictures

W&B's own step is the number of the row (see `exactly_once`), so that W&B has each row once and lacks none, wherever the
run was killed, once it is resumed. W&B is asked what it has: the server tells when a run is resumed online, and
offline it is in the files (see `wandb_private`). So a run that is resumed online after an offline part gives the server
the rows of that part, and marks its files for `wandb sync` to pass over.

W&B writes its files every 15 seconds, and sends rows as seldom. What it measures by itself in that time before a kill
is lost, and so are the rows of a run that is never resumed, but for `metrics.jsonl`. Rows of an online part that was
killed before they were sent are in the files of that part alone if the run is resumed offline.

The config goes up with the git revision, under its dotted keys (`optimizer.lr`), addresses without user names,
passwords and queries.

wandb replaces `sys.exit` and `sys.excepthook` by wrappers of its own, to learn the exit code. It leaves the handlers of
signals alone, and its helper process has a session of its own: a signal to the job's process group does not reach it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_cifar.config import Config
from dist_cifar.errors import ConfigError, one_line
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.predictions import Predictions
from dist_cifar.tracking.base import Results
from dist_cifar.tracking.exactly_once import named, public_config
from dist_cifar.tracking.wandb_private import has_key, mark_as_synced, row_count

logger = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 5
FINISH_TIMEOUT_SECONDS = 5
UPLOAD_TIMEOUT_SECONDS = 600
"""The timeout of finishing where checkpoints are to be uploaded."""

_TRUE = ("1", "true", "t", "yes", "y", "on")
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def wanted_mode(asked: str, environ: Mapping[str, str]) -> str:
    """`online`, `offline`, `disabled` or `auto` (online if there is a key, unless W&B's own settings say otherwise).

    Asked for `auto`, `WANDB_DISABLED` and `WANDB_MODE` decide.
    """
    if asked != "auto":
        return asked
    if environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return "disabled"
    return _MODES.get(environ.get("WANDB_MODE", "").strip().lower(), "auto")


def is_wanted_online(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether a run would try to reach the server; where only wandb could tell whether there is a key, yes."""
    mode = wanted_mode(config.tracking.wandb, environ)
    return mode == "online" or (mode == "auto" and _may_have_key(environ))


def run_id(run_dir: Path, environ: Mapping[str, str]) -> str:
    """The id of the run directory's W&B run, chosen at the first call.

    Raises `ConfigError` if the agent of a sweep wants another one: W&B would obey the agent.
    """
    path = run_dir / "wandb_id"
    wanted = environ.get("WANDB_RUN_ID")
    if not path.exists():
        write_atomic(path, (wanted or secrets.token_hex(8)) + "\n")
    found = path.read_text(encoding="utf-8").strip()
    if environ.get("WANDB_SWEEP_ID") and wanted and wanted != found:
        raise ConfigError(
            f"run.dir={run_dir}: holds the W&B run {found}, and the agent of the sweep starts run {wanted}; give each"
            " run a directory of its own, as configs/sweep.yaml does"
        )
    return found


def forget_wandb(run_dir: Path) -> None:
    """Makes the next `run_id` choose anew, because what the run directory held is not this run."""
    (run_dir / "wandb_id").unlink(missing_ok=True)


def open_wandb(config: Config, run_dir: Path, git_revision: Callable[[], str | None]) -> WandbTracker | None:
    """The tracker, or `None` where W&B is not wanted or cannot be had.

    Raises `ConfigError` if it is not installed, or if the run directory belongs to another run of a sweep.
    """
    asked = config.tracking.wandb
    mode = wanted_mode(asked, os.environ)
    if mode == "disabled" or (mode == "auto" and not _may_have_key(os.environ)):
        return None
    if importlib.util.find_spec("wandb") is None:
        if asked == "auto":
            return None
        raise ConfigError(
            f"tracking.wandb: {asked}, but wandb is not installed; pip install -e .[wandb], or tracking.wandb=disabled"
        )
    run_id(run_dir, os.environ)
    try:
        return _open(config, run_dir, mode, git_revision)
    except Exception as error:  # whatever it is, the run does not depend on it
        logger.info(f"W&B: {one_line(error)}; continuing without it")
        return None


class WandbTracker:
    """A run that was opened; `wandb_run` is wandb's own object. See
    `dist_cifar.tracking.exactly_once.NumberedTracker`."""

    def __init__(self, wandb_run: Any, run_dir: Path, *, offline: bool, row_count: int) -> None:
        self.row_count = row_count
        self._run = wandb_run
        self._run_dir = run_dir
        self._offline = offline
        self._failed = False
        self._test_row: dict[str, Any] = {}
        """The last row if it is a test's, held back because tables and pictures, which come later, are part of it."""
        self._test_number = 0

    @property
    def sync_command(self) -> str:
        """The command that uploads the files of the run: all offline parts, in their order, or this online one."""
        if self._offline:
            return f"wandb sync {shlex.quote(str(self._run_dir / 'wandb'))}"
        return f"wandb sync --include-online {shlex.quote(str(Path(self._run.dir).parent))}"

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Hands the row to wandb's helper process, which writes and uploads it."""
        self._log_test_row()
        if row["kind"] == "test":
            self._test_row, self._test_number = named(row), number
        else:
            self._attempt(lambda: self._run.log(named(row), step=number, commit=True))

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Uploads what is left for a few seconds; says how to upload it later where that was not enough."""
        if results is not None and results.predictions is not None:
            summary, predictions = results.summary, results.predictions
            self._log_test_row(lambda: _tables(summary, predictions))
        self._log_test_row()
        if results is not None:
            summary, checkpoints = results.summary, results.checkpoints
            self._attempt(lambda: self._run.summary.update(dict(summary)))
            self._attempt(lambda: _log_checkpoints(self._run, checkpoints))
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            logger.info(f"W&B: not everything is uploaded ({one_line(error)}); upload it with: {self.sync_command}")
            return
        if self._offline:
            logger.info(f"W&B: this run is offline; upload it with: {self.sync_command}")
        else:
            mark_as_synced(self._run_dir, self._run.id)

    def _log_test_row(self, more: Callable[[], dict[str, Any]] = dict) -> None:
        """Logs the row that was held back with `more` in it; if that fails, it is still held back."""
        row = self._test_row
        if row and self._attempt(lambda: self._run.log(row | more(), step=self._test_number, commit=True)):
            self._test_row = {}

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # nothing depends on W&B; one line of it is enough
            if not self._failed:
                logger.info(f"W&B: {one_line(error)}; some of the metrics will be missing there")
            self._failed = True
            return False
        return True


def _open(config: Config, run_dir: Path, mode: str, git_revision: Callable[[], str | None]) -> WandbTracker | None:
    import wandb

    tracking = config.tracking
    quiet = wandb.Settings(silent=True)
    own_id = run_id(run_dir, os.environ)

    def init(mode: str) -> WandbTracker:
        in_files = row_count(run_dir, own_id)
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]  # a Literal there
            dir=str(run_dir.resolve()),
            id=own_id,
            resume="allow",
            name=config.run.name,
            project=tracking.wandb_project,
            entity=tracking.wandb_entity,
            group=tracking.wandb_group,
            job_type=tracking.wandb_job_type,
            notes=tracking.wandb_notes,
            tags=tracking.wandb_tags,
            config=public_config(config) | {"git_revision": git_revision()},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=UPLOAD_TIMEOUT_SECONDS if tracking.wandb_checkpoints else FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        offline = mode == "offline"
        return WandbTracker(run, run_dir, offline=offline, row_count=in_files if offline else run.starting_step)

    settings = wandb.setup(quiet).settings
    if mode == "auto" and settings.mode == "disabled":  # `wandb disabled` was typed in this folder
        return None
    if mode == "offline" or (mode == "auto" and settings.mode == "offline"):  # or `wandb offline`
        return init("offline")
    try:
        if not has_key(settings.base_url):
            if mode == "auto":
                return None
            raise ConfigError("no API key: run `wandb login` or set WANDB_API_KEY")
        return init("online")
    except Exception as error:
        wandb.teardown()  # forgets the run that did not start: its id would be in use
        wandb.setup(quiet)
        tracker = init("offline")
        logger.info(f"W&B: {one_line(error)}; continuing offline, upload it later with: {tracker.sync_command}")
        return tracker


def _tables(summary: Mapping[str, Any], predictions: Predictions) -> dict[str, Any]:
    """The confusion matrix, the accuracy of each class and the worst mistakes, as the report shows them."""
    import wandb

    confusion, classes = summary["test_confusion"], predictions.classes
    cells = [[true, taken, confusion[i][j]] for i, true in enumerate(classes) for j, taken in enumerate(classes)]
    accuracy = summary["test_class_accuracy"]
    per_class = [[name, accuracy[name], sum(confusion[i])] for i, name in enumerate(classes)]
    mistakes = []
    for index, image in zip(predictions.worst_indices, predictions.worst_images, strict=True):
        true, taken = predictions.labels[index], predictions.predicted[index]
        share = predictions.probabilities[index, taken]
        mistakes.append(wandb.Image(image, caption=f"{classes[taken]} ({share:.1%}), is {classes[true]}"))
    return {
        "test/confusion": wandb.Table(columns=["true", "predicted", "count"], data=cells),
        "test/classes": wandb.Table(columns=["class", "accuracy", "count"], data=per_class),
        "test/worst_mistakes": mistakes,
    }


def _log_checkpoints(wandb_run: Any, checkpoints: Mapping[str, Path]) -> None:
    """Each directory as one version of an artifact, with the aliases under which it was given."""
    import wandb

    for path in dict.fromkeys(checkpoints.values()):
        artifact = wandb.Artifact(f"checkpoint-{wandb_run.id}", type="model", metadata={"checkpoint": path.name})
        artifact.add_dir(str(path))
        wandb_run.log_artifact(artifact, aliases=[alias for alias, taken in checkpoints.items() if taken == path])


def _may_have_key(environ: Mapping[str, str]) -> bool:
    """Whether there is anything to look for a key in: most machines without one need not import wandb to see that."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return any(os.path.exists(os.path.expanduser(path)) for path in (environ.get("NETRC", "~/.netrc"), "~/_netrc"))
