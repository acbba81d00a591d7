"""What a person meant who typed a key that there is not.

Contract: a pure function of the key and of the keys that there are. Better no hint than one that misleads: a name that
other programs use is answered from a table, and else only names that look alike are suggested, within their section.
"""

from __future__ import annotations

from collections.abc import Mapping

from dist_cifar.errors import nearest

_SCHEDULE = "the schedule is schedule.name, whose settings are schedule.<name>; those of plateau are plateau.*"
_RANKS = "`train --ranks N` starts N ranks on this machine, else the launcher sets their number (docs/launching.md)"
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("optimizer.type", "optim", "opt"), "optimizer.name"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "sched"), _SCHEDULE),
    **{name: f"optimizer.{name}" for name in ("momentum", "nesterov")},
    "milestones": "schedule.milestone_epochs",
    **dict.fromkeys(("param_groups", "no_decay"), "optimizer.groups"),
    **dict.fromkeys(("gpus", "num_gpus", "devices", "world_size", "num_nodes", "nproc", "nproc_per_node"), _RANKS),
    **dict.fromkeys(("num_workers", "workers"), "no process loads data: see run.threads_per_rank and augment.backend"),
    **dict.fromkeys(("fp16", "bf16", "amp", "use_amp", "mixed_precision", "dtype"), "compute.precision"),
    **dict.fromkeys(("arch", "architecture", "backbone", "net", "network", "model"), "model.name"),
    **dict.fromkeys(("batch_size", "train_batch_size", "bs", "batch.size"), "batch.global_size"),
    **dict.fromkeys(
        ("clip", "grad_clip", "clip_grad", "clip_grad_norm", "gradient_clip_val", "max_norm"), "optimizer.max_grad_norm"
    ),
    **dict.fromkeys(
        ("data_dir", "dataset_dir", "data_path", "dataset_path", "data_root", "data.path", "data.dir"), "data.root"
    ),
    **dict.fromkeys(("dataset", "dataset_name", "data", "data.name"), "data.source"),
    **dict.fromkeys(
        ("accumulation_steps", "gradient_accumulation_steps", "accumulate_grad_batches"), "batch.max_micro_batch"
    ),
    **dict.fromkeys(("learning_rate", "base_lr", "init_lr", "initial_lr"), "optimizer.lr"),
    **dict.fromkeys(("log_interval", "log_every", "log_freq", "print_freq", "logging_steps"), "run.log_every_steps"),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(
        ("output_dir", "out_dir", "outdir", "save_dir", "log_dir", "logdir", "work_dir", "exp_dir"), "run.dir"
    ),
    **dict.fromkeys(("save_every", "save_steps", "save_interval", "checkpoint_interval"), "checkpoint.every_steps"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps", "total_steps", "iterations"), "train.max_steps"),
    **dict.fromkeys(("val_size", "val_split", "validation_split", "valid_size"), "data.validation_size"),
    **dict.fromkeys(("cutout", "cutout_length", "augment.cutout"), "augment.cutout_size"),
    **dict.fromkeys(("image_size", "img_size", "input_size", "progressive_resizing"), "augment.resolution"),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps"), "optimizer.warmup_epochs"),
    **dict.fromkeys(("wandb", "use_wandb"), "tracking.wandb"),
    **dict.fromkeys(("wd", "l2"), "optimizer.weight_decay"),
    **dict.fromkeys(("early_stopping", "early_stop", "early_stopping_patience"), "train.patience_evaluations"),
    "accelerator": "run.device",
    "num_classes": "the number of classes is that of the data",
    "patience": "plateau.patience_evaluations",
    "resume": "a run resumes by itself; the option --resume fails if there is nothing to resume",
    "zero": "strategy.zero_stage",
}
"""Keys of other programs, with or without a section, and the key here or a sentence."""


def hint_for(key: str, known: Mapping[str, str]) -> str:
    """The end of an error's message about an unknown `key`; empty if it is not clear what was meant.

    `known` has the keys that are read, each with the name that it has now.
    """
    meant = _meant(key.strip().lower().replace("-", "_"), known)
    if meant is None:
        return ""
    return f"; {meant};" if " " in meant else f"; did you mean {meant}?"


def _meant(key: str, known: Mapping[str, str]) -> str | None:
    """A key, a section or a sentence."""
    section, _, name = key.rpartition(".")
    if ELSEWHERE.get(section) == _SCHEDULE:
        return _SCHEDULE
    if key in ELSEWHERE or name in ELSEWHERE:
        return ELSEWHERE.get(key) or ELSEWHERE[name]
    sections = {full.partition(".")[0] for full in known}
    if key in sections:
        return f"{key} is a section, whose fields are {key}.<name>"
    if not section and nearest(key, sections):
        return nearest(key, sections)
    by_name: dict[str, set[str]] = {}
    for full, current in known.items():
        by_name.setdefault(full.partition(".")[2], set()).add(current)
    wanted: str | None = name
    if len(by_name.get(name, ())) != 1:
        own = nearest(section, sections)
        in_section = {full.partition(".")[2]: {known[full]} for full in known if full.partition(".")[0] == own}
        by_name = in_section if section else by_name
        swapped = (other for other in by_name if sorted(other) == sorted(name))
        wanted = nearest(name, by_name) or next(swapped, None)
    found = by_name.get(wanted or "", set())
    return next(iter(found)) if len(found) == 1 else None
