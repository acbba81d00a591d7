"""What a resumed run may change."""

from __future__ import annotations

import pytest

from dist_cifar import plugins
from dist_cifar.config import Config, at_resume, batch_differences, differences, flatten, load_config
from dist_cifar.config.load import MOVED
from dist_cifar.config.marks import AtResume

RULES = {
    "run.name": "free",
    "run.dir": "free",
    "run.seed": "decides",
    "run.device": "free",
    "run.threads_per_rank": "free",
    "run.timeout_seconds": "free",
    "run.log_every_steps": "free",
    "run.log_digests": "free",
    "run.profile": "free",
    "run.straggler_factor": "free",
    "run.time_limit_seconds": "free",
    "data.source": "decides",
    "data.options": "decides",
    "data.root": "free",
    "data.url": "free",
    "data.cache_dir": "free",
    "data.stage_dir": "free",
    "data.validation_size": "decides",
    "data.synthetic_train_size": "decides",
    "data.synthetic_test_size": "decides",
    "augment.policy": "decides",
    "augment.transform": "decides",
    "augment.transform_options": "decides",
    "augment.transform_workers": "free",
    "augment.backend": "free",
    "augment.crop_padding": "decides",
    "augment.flip": "decides",
    "augment.flip_probability": "decides",
    "augment.rotation_degrees": "decides",
    "augment.brightness": "decides",
    "augment.contrast": "decides",
    "augment.saturation": "decides",
    "augment.sharpness_factor": "decides",
    "augment.sharpness_probability": "decides",
    "augment.erasing_probability": "decides",
    "augment.erasing_area": "decides",
    "augment.erasing_aspect": "decides",
    "augment.cutout_size": "decides",
    "augment.resolution": "decides",
    "model.name": "decides",
    "model.options": "decides",
    "model.norm": "decides",
    "model.depth": "decides",
    "model.widen_factor": "decides",
    "model.widths": "decides",
    "model.whitening_eps": "decides",
    "batch.global_size": "decides",
    "batch.per_rank_size": "decides",
    "batch.max_micro_batch": "decides",
    "optimizer.name": "decides",
    "optimizer.options": "decides",
    "optimizer.lr": "decides",
    "optimizer.lr_rule": "decides",
    "optimizer.lr_base_batch": "decides",
    "optimizer.warmup_epochs": "decides",
    "optimizer.weight_decay": "decides",
    "optimizer.decay_norms_and_biases": "decides",
    "optimizer.groups": "decides",
    "optimizer.betas": "decides",
    "optimizer.eps": "decides",
    "optimizer.momentum": "decides",
    "optimizer.nesterov": "decides",
    "optimizer.decoupled_decay": "decides",
    "optimizer.max_grad_norm": "decides",
    "optimizer.non_finite": "decides",
    "optimizer.max_skipped_steps": "decides",
    "mix.name": "decides",
    "mix.alpha": "decides",
    "mix.off_last_epochs": "decides",
    "average.name": "decides",
    "average.every_steps": "decides",
    "average.half_life_epochs": "decides",
    "average.start_epoch": "decides",
    "average.decay": "decides",
    "muon.momentum": "decides",
    "muon.nesterov": "decides",
    "muon.newton_schulz_steps": "decides",
    "muon.newton_schulz": "decides",
    "muon.scale": "decides",
    "muon.renormalise_every_steps": "decides",
    "muon.rest": "decides",
    "muon.rest_lr_scale": "decides",
    "schedule.name": "decides",
    "schedule.options": "decides",
    "schedule.start": "decides",
    "schedule.peak": "decides",
    "schedule.end": "decides",
    "schedule.milestone_epochs": "decides",
    "schedule.gamma": "decides",
    "plateau.metric": "decides",
    "plateau.factor": "decides",
    "plateau.patience_evaluations": "decides",
    "plateau.threshold": "decides",
    "plateau.cooldown_evaluations": "decides",
    "plateau.min_lr": "decides",
    "train.epochs": "free",
    "train.max_steps": "free",
    "train.patience_evaluations": "free",
    "train.label_smoothing": "decides",
    "strategy.name": "rounding",
    "strategy.virtual_ranks": "rounding",
    "strategy.exchange": "free",
    "strategy.grad_compression": "rounding",
    "strategy.zero_stage": "rounding",
    "compute.precision": "decides",
    "compute.compile": "rounding",
    "eval.every_epochs": "decides",
    "eval.select": "decides",
    "eval.batch_size": "decides",
    "eval.tta": "free",
    "eval.tta_share": "free",
    "checkpoint.every_steps": "free",
    "checkpoint.every_seconds": "free",
    "checkpoint.keep_last": "free",
    "checkpoint.keep_best": "free",
    "checkpoint.keep_every_steps": "free",
    "checkpoint.on_write_error": "free",
    "tracking.also": "free",
    "tracking.wandb": "free",
    "tracking.wandb_project": "free",
    "tracking.wandb_entity": "free",
    "tracking.wandb_group": "free",
    "tracking.wandb_job_type": "free",
    "tracking.wandb_notes": "free",
    "tracking.wandb_tags": "free",
    "tracking.wandb_checkpoints": "free",
}
"""Every key and what a resumed run may do with it. `decides`: it changes the result; `rounding`: it changes how the
same result is computed; `free`: neither. A new key, or another rule for one, is a decision taken here as well."""


def test_every_key_and_its_rule_is_a_decision():
    assert {key: at_resume(key).value for key in flatten(Config())} == RULES


def test_differences_name_what_decides_the_result():
    config = load_config(None, ["optimizer.lr=0.5", "run.log_every_steps=3", "run.dir=elsewhere"])
    assert differences(flatten(load_config()), config) == {"optimizer.lr": "optimizer.lr: 0.001 -> 0.5"}
    elsewhere = load_config(None, ["run.log_every_steps=3", "data.stage_dir=$SLURM_TMPDIR"])
    assert elsewhere.data.stage_dir == "$SLURM_TMPDIR"  # each node has its own
    assert differences(flatten(load_config()), elsewhere) == {}


@pytest.mark.parametrize(("key", "rule"), [("strategy.name", "rounding"), ("optimizer.lr", "decides")])
def test_what_is_not_free_is_a_difference(key, rule):
    old = flatten(load_config()) | {key: "another"}
    assert list(differences(old, load_config())) == [key] and at_resume(key) is AtResume(rule)


@pytest.mark.parametrize(
    ("name", "decides"), [("plateau", False), ("multistep", False), ("cosine", True), ("triangle", True)]
)
def test_the_length_of_a_run_decides_where_the_schedule_follows_it(name, decides):
    schedule = f"schedule.name={name}"
    old = flatten(load_config(None, [schedule, "train.epochs=2"]))
    assert differences(old, load_config(None, [schedule, "train.epochs=2.0"])) == {}
    found = differences(old, load_config(None, [schedule, "train.epochs=3", "train.max_steps=9"]))
    expected = {"train.epochs": "train.epochs: 2.0 -> 3.0", "train.max_steps": "train.max_steps: null -> 9"}
    assert found == (expected if decides else {})


@pytest.mark.parametrize("follows", [None, True, False])
def test_a_schedule_from_outside_follows_the_length_unless_it_says_no(monkeypatch, follows):
    def mine(context):
        return lambda step: 0.1

    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_schedule("mine")(mine)
    if follows is not None:
        mine.follows_length = follows
    short, long = (load_config(None, ["schedule.name=mine", f"train.epochs={n}"]) for n in (3, 4))
    assert list(differences(flatten(short), long)) == ([] if follows is False else ["train.epochs"])


def test_a_key_that_is_unknown_decides():
    """A checkpoint of another version: what it has set may have changed the result."""
    assert at_resume("train.unheard_of") is AtResume.DECIDES
    assert list(differences(flatten(load_config()) | {"train.unheard_of": 1}, load_config())) == ["train.unheard_of"]


def test_a_checkpoint_with_old_keys_is_resumed():
    names = {new: old for old, new in MOVED.items()}
    old = {names.get(key, key): value for key, value in flatten(load_config()).items()}
    assert differences(old, load_config()) == {}
    assert list(differences(old, load_config(None, ["compute.precision=fp32"]))) == ["compute.precision"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (("batch.per_rank_size=32", 2), ("batch.per_rank_size=32", 2), {}),
        (("batch.per_rank_size=32", 2), ("batch.per_rank_size=64", 1), {}),
        (("batch.per_rank_size=32", 2), ("batch.global_size=64", 1), {}),
        (("batch.global_size=64", 2), ("batch.per_rank_size=16", 4), {}),
        (("batch.global_size=64", 2), ("batch.global_size=64", 1), {}),
        (
            ("batch.per_rank_size=32", 2),
            ("batch.per_rank_size=32", 1),
            {"batch.per_rank_size": "global batch: 64 -> 32 (ranks: 2 -> 1; batch.global_size=64 keeps it)"},
        ),
        (
            ("batch.global_size=64", 2),
            ("batch.global_size=32", 2),
            {"batch.global_size": "batch.global_size: 64 -> 32"},
        ),
    ],
)
def test_the_batch_of_a_step_stays_what_it_was(old, new, expected):
    (old_text, old_ranks), (new_text, ranks) = old, new
    before, config = (load_config(None, ["strategy.name=ddp", text, "optimizer.lr=1"]) for text in (old_text, new_text))
    found = differences(flatten(before) | {"optimizer.lr": 2.0}, config)
    assert batch_differences(found, flatten(before), config, old_ranks=old_ranks, ranks=ranks) == expected | {
        "optimizer.lr": "optimizer.lr: 2.0 -> 1.0"
    }
