"""Whole runs of the package's networks, optimizers and schedules: the same bits on every number of ranks and through a
kill, and those of a loop that is written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_cifar import trainer as train_module
from dist_cifar.config import Config, load_components
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError
from dist_cifar.evaluate import Evaluator
from dist_cifar.inference import load_classifier
from dist_cifar.models import build_model, speednet
from dist_cifar.strategy.compute import prepare_module
from dist_cifar.tools.report.read import read_run
from dist_cifar.tools.report.sections import headline_cards
from dist_cifar.trainer import Trainer
from tests.test_trainer import at, disturbed, rows, same_bits_everywhere, spoken, summary, train

EXACT = ("strategy.name=exact", "strategy.virtual_ranks=4", "train.epochs=1.2", "data.synthetic_train_size=120")
"""Six steps."""
GROUPS = "optimizer.groups=[{match: fc.*, lr_scale: 2.0}, {match: '*.bias', lr_scale: 0.5, decay_scale: 2.0}]"
SGD = ("optimizer.name=sgd", "optimizer.lr=0.1", GROUPS, "schedule.name=triangle")
ADAMW = ("optimizer.name=adamw", "optimizer.decay_norms_and_biases=false", "schedule.name=cosine")
MUON = ("optimizer.name=muon", "optimizer.lr=0.1", GROUPS, "muon.renormalise_every_steps=2", "schedule.name=multistep")

SPEEDNET = ("model.name=speednet", "model.widths=[8, 12, 8]", "optimizer.name=muon", "schedule.name=triangle")
WIDE = ("model.name=wideresnet", "model.depth=10", "model.widen_factor=1", "optimizer.name=sgd")


@pytest.mark.parametrize(
    "parts", [SGD, ADAMW, MUON, SPEEDNET, WIDE], ids=["sgd", "adamw", "muon", "speednet", "wideresnet"]
)
def test_exact_gives_the_same_bits_on_every_world_size_and_through_a_kill(ranks, tiny, tmp_path, parts):
    config = tiny(*parts, *EXACT, "optimizer.warmup_epochs=0.4", "checkpoint.every_steps=2")
    resumed = same_bits_everywhere(ranks, config, tmp_path, stopped_at=2)
    assert summary(resumed)["steps"] == 6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
@pytest.mark.parametrize("parts", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_other_strategies_train_as_exact_does(ranks, tiny, tmp_path, parts, strategy):
    common = ("model.norm=group", "run.log_every_steps=1", "strategy.virtual_ranks=2", "train.epochs=1")
    one_group = ("optimizer.groups=[]", "optimizer.decay_norms_and_biases=true") if strategy == "deepspeed" else ()
    oracle = at(tiny(*common, *parts, *one_group, "strategy.name=exact"), tmp_path / "exact")
    ranks.run(1, train, oracle)
    config = at(tiny(*common, *parts, *one_group, f"strategy.name={strategy}"), tmp_path / strategy)
    assert ranks.run(2, disturbed, config, 2, 1, False) == [False, False]
    assert ranks.run(2, train, config) == [True, True]
    pairs = list(zip(rows(config, "train"), rows(oracle, "train"), strict=True))
    assert len(pairs) == 5
    for row, expected in pairs:
        assert (row["step"], row["lr"]) == (expected["step"], expected["lr"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)


FILTERS = "whiten.weight"


def trained_filters(config: Config) -> torch.Tensor:
    return load_classifier(Path(config.run.dir), torch.device("cpu")).module.state_dict()[FILTERS]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_the_other_strategies_train_speednet_as_exact_does(ranks, tiny, tmp_path, strategy):
    """BatchNorm sees the same images: the micro-batch of a rank is that of a virtual rank."""
    network = ("model.name=speednet", "model.widths=[8, 12, 8]", "optimizer.name=sgd", "optimizer.lr=0.02")
    common = (*network, "run.log_every_steps=1", "train.epochs=1", "strategy.virtual_ranks=2", "eval.select=last")
    oracle = at(tiny(*common, "strategy.name=exact"), tmp_path / "exact")
    ranks.run(1, train, oracle)
    config = at(tiny(*common, f"strategy.name={strategy}", "strategy.zero_stage=3"), tmp_path / strategy)
    assert ranks.run(2, disturbed, config, 2, 1, False) == [False, False]
    assert ranks.run(2, train, config) == [True, True]
    for row, expected in zip(rows(config, "train"), rows(oracle, "train"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    new = Trainer.build(at(tiny(*common), tmp_path / "new"), alone())
    initial = new.strategy.model_state_dict()
    trained = [parameter for parameter in new.strategy.module.parameters() if parameter.requires_grad]
    assert new.evaluator.parameter_count == sum(parameter.numel() for parameter in trained) + 24 * 12
    assert torch.equal(trained_filters(config), initial[FILTERS])  # to the last bit: they are frozen
    assert torch.equal(trained_filters(oracle), initial[FILTERS])


def with_other_filters(communicator: Communicator, config: Config) -> bool:
    """A run on a machine that computes other filters from the same images."""
    original, speednet.whitening_filters = speednet.whitening_filters, lambda covariance, eps: torch.ones(24, 3, 2, 2)
    try:
        return train(communicator, config)
    finally:
        speednet.whitening_filters = original


def test_a_resume_keeps_the_filters_of_the_checkpoint(ranks, tiny, tmp_path):
    config, other = (at(tiny(*SPEEDNET, *EXACT), tmp_path / name) for name in ("resumed", "other"))
    assert ranks.run(2, disturbed, config, 2, 0, False) == [False, False]
    assert all(ranks.run(1, with_other_filters, config)) and all(ranks.run(1, with_other_filters, other))
    initial = Trainer.build(at(config, tmp_path / "new"), alone()).strategy.model_state_dict()
    assert torch.equal(trained_filters(config), initial[FILTERS])
    assert trained_filters(other).eq(1).all()  # what it computes counts where there is no checkpoint


def alone() -> Communicator:
    return Communicator(DistEnv(), device=torch.device("cpu"), timeout_seconds=60)


def test_sgd_in_ddp_equals_a_hand_written_loop(tiny):
    config = tiny(*SGD, "optimizer.max_grad_norm=null", "optimizer.weight_decay=0.01")
    trainer = Trainer.build(config, alone())
    model = build_model(config.model, num_classes=10, seed=config.run.seed)
    model = model.to(memory_format=torch.channels_last).train()
    prepare_module(model, config, torch.device("cpu"))  # the same kernels: what is compared is the update
    named = dict(model.named_parameters())
    head = [parameter for name, parameter in named.items() if name.startswith("fc.")]
    biases = [p for name, p in named.items() if name.endswith(".bias") and not name.startswith("fc.")]
    others = [p for name, p in named.items() if not name.endswith(".bias") and not name.startswith("fc.")]
    oracle = torch.optim.SGD(
        [{"params": others}, {"params": biases, "weight_decay": 0.02}, {"params": head}],
        lr=1.0,
        momentum=0.9,
        weight_decay=0.01,
        nesterov=True,
        fused=True,
    )
    for step in range(4):
        batch, full = trainer.batches.make(step), 0.1 * 16 / 128
        lr = full * (0.2 + 0.8 * step / 2 if step < 2 else 1 - (step - 2) / 8)
        for group, scale in zip(oracle.param_groups, (1.0, 0.5, 2.0), strict=True):
            group["lr"] = lr * scale
        assert trainer.schedule.lr(step) == pytest.approx(lr, rel=1e-12)
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        oracle.step()
        oracle.zero_grad()
        trainer.train_step(batch)
    for name, tensor in trainer.strategy.model_state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_accuracy_with_test_time_augmentation_is_beside_the_plain_one(ranks, tiny, tmp_path):
    results = []
    for world_size in (1, 2, 4):
        config = tiny(*EXACT, "eval.tta=mirror_translate", "eval.tta_share=0.5", "eval.batch_size=7")
        config = at(config, tmp_path / str(world_size))
        if world_size == 2:  # without views up to the stop: they may be asked for at the end
            plain = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tta="none"))
            assert ranks.run(2, disturbed, plain, 2, 0, False) == [False, False]
        output = ranks.run(world_size, spoken, config)[0]
        found, (row,) = summary(config), rows(config, "test")
        assert (found["tta"], found["tta_share"]) == ("mirror_translate", 0.5)
        assert (row["accuracy_tta"], row["loss_tta"]) == (found["test_accuracy_tta"], found["test_loss_tta"])
        assert f"with TTA       {found['test_accuracy_tta']:.2%} (loss {found['test_loss_tta']:.4f})" in output
        card = ("with TTA", f"{found['test_accuracy_tta']:.2%}", "test-time augmentation: mirror_translate")
        assert card in headline_cards(read_run(Path(config.run.dir)))
        results.append([row[name] for name in ("accuracy", "loss", "accuracy_tta", "loss_tta")])
    assert results[0] == results[1] == results[2] and results[0][1] != results[0][3]


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_model_that_is_selected_is_tested_and_loaded(tiny, monkeypatch, select):
    """Of three evaluations the first is the best."""
    accuracies = iter([0.9, 0.2, 0.3])
    config = tiny(f"eval.select={select}", "train.epochs=2.4", "optimizer.lr=0.01")
    trainer = Trainer.build(config, alone())
    validate = Evaluator.validate

    def graded(evaluator, model):
        result, share = validate(evaluator, model), round(next(accuracies) * 100)
        confusion = result.confusion * 0
        confusion[0, 0], confusion[0, 1] = share, 100 - share
        return dataclasses.replace(result, confusion=confusion)

    monkeypatch.setattr(Evaluator, "validate", graded)
    with train_module.RunDir.of(config).lock():
        assert trainer.fit()
    found, step = summary(config), 5 if select == "best" else 12
    assert (found["best_step"], found["test_step"], found["steps"]) == (5, step, 12)
    classifier = load_classifier(Path(config.run.dir), torch.device("cpu"))
    assert classifier.step == step
    assert (classifier.sha256 == found["weights_sha256"]) is (select == "last")
    tested = trainer.evaluator.test(classifier.module.state_dict())
    assert tested.accuracy == found["test_accuracy"] and tested.loss == found["test_loss"]


def test_a_schedule_that_follows_the_length_is_not_resumed_with_another(ranks, tiny):
    config = tiny("schedule.name=cosine", "train.epochs=1")
    assert ranks.run(1, train, config) == [True]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2.0))
    with pytest.raises(Exception, match=r"result would change \(train\.epochs: 1\.0 -> 2\.0\)"):
        ranks.run(1, train, longer)


def test_options_of_the_packages_own_are_fields(tiny):
    with pytest.raises(ConfigError, match=r"optimizer\.options: are for what is from outside .* optimizer\.name=sgd"):
        load_components(tiny("optimizer.name=sgd", "optimizer.options.momentum=0.5"))
