"""Whole runs of the package's networks, optimizers and schedules: the same bits on every number of ranks and through a
kill, and those of a loop that is written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar import trainer as train_module
from dist_cifar.config import Config, load_components
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.evaluate import Evaluator
from dist_cifar.inference import load_classifier
from dist_cifar.models import build_model, speednet
from dist_cifar.strategy.compute import prepare_module
from dist_cifar.tools.report.read import read_run
from dist_cifar.tools.report.sections import headline_cards
from dist_cifar.trainer import Trainer
from tests.small_runs import alone
from tests.test_trainer import at, disturbed, rows, same_bits_everywhere, spoken, summary, train

EXACT = ("strategy.name=exact", "strategy.virtual_ranks=4", "train.epochs=1.2", "data.synthetic_train_size=120")
"""Six steps."""
GROUPS = "optimizer.groups=[{match: fc.*, lr_scale: 2.0}, {match: '*.bias', lr_scale: 0.5, decay_scale: 2.0}]"
SGD = ("optimizer.name=sgd", "optimizer.lr=0.1", GROUPS, "schedule.name=triangle")
ADAMW = ("optimizer.name=adamw", "optimizer.decay_norms_and_biases=false", "schedule.name=cosine")
MUON = ("optimizer.name=muon", "optimizer.lr=0.1", GROUPS, "muon.renormalise_every_steps=2", "schedule.name=multistep")

SPEEDNET = ("model.name=speednet", "model.widths=[8, 12, 8]", "optimizer.name=muon", "schedule.name=triangle")
WIDE = ("model.name=wideresnet", "model.depth=10", "model.widen_factor=1")
EMA = ("average.name=ema", "average.every_steps=2", "average.half_life_epochs=0.5", "average.start_epoch=0.2")
LOOKAHEAD = ("average.name=lookahead", "average.every_steps=4")
CUTMIX = ("mix.name=cutmix", "mix.off_last_epochs=0.4", "train.label_smoothing=0.1")
SIZES = "augment.resolution=[{until: 0.5, size: 20}, {until: 0.8, size: 24}]"
"""Of six steps, the first three have 20 pixels and the next two 24."""
PIXELS = ("augment.crop_padding=2", "augment.flip=alternating", "augment.cutout_size=12", SIZES)
LENGTHS = "optimizer.groups=[{match: head.*, lr_scale: 2.0}, {match: whiten.bias, epochs: 0.6}]"
"""The bias of the first layer is frozen after three steps."""
RUNS = {
    "sgd": (*SGD, *LOOKAHEAD, *CUTMIX),
    "adamw": (*ADAMW, *EMA, *PIXELS, *WIDE),
    "muon": (*MUON, *SPEEDNET[:2], LENGTHS, "mix.name=mixup"),
}
"""Every part is in one of these."""


@pytest.mark.parametrize("parts", RUNS.values(), ids=RUNS)
def test_exact_gives_the_same_bits_on_every_world_size_and_through_a_kill(ranks, tiny, tmp_path, parts):
    config = tiny(*parts, *EXACT, "optimizer.warmup_epochs=0.4", "checkpoint.every_steps=2")
    resumed = same_bits_everywhere(ranks, config, tmp_path, stopped_at=2)
    assert summary(resumed)["steps"] == 6
    note = next(note for label, _, note in headline_cards(read_run(Path(resumed.run.dir))) if label == "test accuracy")
    assert ("average of the weights: " + config.average.name in note) is (config.average.name != "none")


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


@pytest.mark.parametrize("average", ["none", "ema", "lookahead"])
def test_sgd_in_ddp_equals_a_hand_written_loop(tiny, average):
    """Four steps, and the average of the weights after every second one."""
    averaged = (f"average.name={average}", "average.every_steps=2", "average.half_life_epochs=0.5", "average.decay=0.7")
    config = tiny(*SGD, *averaged, "optimizer.max_grad_norm=null", "optimizer.weight_decay=0.01")
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
    start = floats(model)
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
        if average == "ema" and step == 0:
            start = floats(model)
        elif step % 2:
            kept = 0.5**0.8 if average == "ema" else 0.7**2 * ((step + 1) / 10) ** 3  # half-life 2.5 steps; of 10 steps
            start = {name: kept * start[name] + (1 - kept) * value for name, value in floats(model).items()}
            if average == "lookahead":
                model.load_state_dict(model.state_dict() | start)
    expected = model.state_dict() | (start if average == "ema" else {})
    for name, tensor in trainer.strategy.model_state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights and running statistics."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


VALIDATE = Evaluator.validate


def grade(monkeypatch, accuracies):
    """The evaluations have these accuracies."""

    def graded(evaluator, model):
        result, share = VALIDATE(evaluator, model), round(next(accuracies) * 100)
        confusion = result.confusion * 0
        confusion[0, 0], confusion[0, 1] = share, 100 - share
        return dataclasses.replace(result, confusion=confusion)

    monkeypatch.setattr(Evaluator, "validate", graded)


def fit(config) -> bool:
    with train_module.RunDir.of(config).lock():
        return Trainer.build(config, alone()).fit()


def test_a_run_ends_early_when_it_no_longer_gets_better(tiny, tmp_path, monkeypatch, said):
    """The best of nine evaluations is the third; it ends with the fifth, also after a stop in the fourth epoch."""
    overrides = ("train.epochs=9", "train.patience_evaluations=2", "eval.select=best")
    given = [0.2, 0.3, 0.5, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    grade(monkeypatch, iter(given))
    config = tiny(*overrides)
    assert fit(config)
    found = summary(config)
    assert (found["steps"], found["best_step"]) == (25, 15)
    assert "ended early at step 25: no better accuracy than at step 15 in 2 evaluations" in said
    assert fit(config) and "train.patience_evaluations=N makes it longer" in said[-2]

    parts = tiny(*overrides, f"run.dir={tmp_path}/parts")
    grade(monkeypatch, iter(given))
    assert fit(dataclasses.replace(parts, train=dataclasses.replace(parts.train, max_steps=17))) is True
    grade(monkeypatch, iter(given[3:]))
    assert fit(parts)
    assert summary(parts)["weights_sha256"] == found["weights_sha256"] and summary(parts)["steps"] == 25


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("weight_decay=0.1", r"0\.1 was set, .*SGD does not read; set optimizer\.options\.weight_decay, .* at 0\.0001"),
        ("betas=[0.9,0.99]", r"\[0\.9, 0\.99\] was set, .*SGD does not read"),
        ("nesterov=false", "false was set, .*SGD does not read"),
    ],
)
def test_fields_that_an_own_optimizer_does_not_read_are_refused(tiny, field, message):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field.partition('=')[0]}: {message}"):
        load_components(tiny("optimizer.name=torch.optim:SGD", f"optimizer.{field}"))
    load_components(tiny("optimizer.name=torch.optim:SGD", "optimizer.options.weight_decay=0.1"))


@pytest.mark.parametrize("model", ["speednet", "fixed"])
def test_a_size_that_the_network_does_not_take_is_refused_before_the_first_step(tiny, monkeypatch, model):
    monkeypatch.setattr(plugins, "_registered", {})
    plugins.register_model("fixed")(lambda *, num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)))
    config = tiny(f"model.name={model}", "augment.resolution=[{until: 0.3, size: 32}, {until: 0.5, size: 4}]")
    with pytest.raises(ConfigError, match=r"resolution: the network does not take images of 4x4 \(") as caught:
        Trainer.build(config, alone())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["resnet8", "resnet18"])
def test_every_size_trains_in_the_fused_layers_as_in_torchs(tiny, one_thread, model):
    """On one thread, where convolutions and BatchNorm are this package's own."""
    phases = ", ".join(f"{{until: {(size - 3) / 40:.3f}, size: {size}}}" for size in range(4, 32))  # of 40 steps
    config = tiny(f"model.name={model}", "batch.global_size=4", f"augment.resolution=[{phases}]")
    trainer = Trainer.build(config, alone())
    assert [trainer.batches.make(step).inputs.shape[2:] for step in range(29)] == [(n, n) for n in range(4, 33)]
    plain = build_model(config.model, num_classes=10, seed=config.run.seed).train()
    for step in (0, 1, 5, 7, 10, 12, 16, 21, 27):
        plain.load_state_dict(trainer.strategy.model_state_dict())
        plain.zero_grad()
        batch = trainer.batches.make(step)
        nn.functional.cross_entropy(plain(batch.inputs), batch.labels).backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
        assert trainer.train_step(batch) == pytest.approx(norm.item(), rel=1e-3)


def test_ddp_resumes_within_a_size_with_the_same_bits(ranks, tiny, tmp_path):
    config = tiny(*PIXELS, "batch.global_size=24", "train.epochs=2")  # 6 steps
    undisturbed = at(config, tmp_path / "undisturbed")
    assert ranks.run(2, train, undisturbed) == [True, True]
    for steps in (1, 3):
        assert ranks.run(2, disturbed, config, steps, 0, False) == [False, False]
    assert ranks.run(2, train, config) == [True, True]
    assert summary(config)["weights_sha256"] == summary(undisturbed)["weights_sha256"]
    whole = at(tiny("batch.global_size=24", "train.epochs=2", *PIXELS[:-1]), tmp_path / "whole")
    ranks.run(2, train, whole)
    assert summary(whole)["weights_sha256"] != summary(config)["weights_sha256"]


def test_the_sizes_follow_the_length_which_is_not_resumed_with_another(ranks, tiny):
    config = tiny(SIZES, "train.epochs=1")
    assert ranks.run(1, train, config) == [True]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2.0))
    with pytest.raises(Exception, match=r"result would change \(train\.epochs: 1\.0 -> 2\.0\)"):
        ranks.run(1, train, longer)


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
    grade(monkeypatch, accuracies)
    with train_module.RunDir.of(config).lock():
        assert trainer.fit()
    found, step = summary(config), 5 if select == "best" else 12
    assert (found["best_step"], found["test_step"], found["steps"]) == (5, step, 12)
    classifier = load_classifier(Path(config.run.dir), torch.device("cpu"))
    assert classifier.step == step
    assert (classifier.sha256 == found["weights_sha256"]) is (select == "last")
    tested = trainer.evaluator.test(classifier.module.state_dict())
    assert tested.accuracy == found["test_accuracy"] and tested.loss == found["test_loss"]
    Path(config.run.dir, "config.yaml").write_text("eval: {select: neither}")
    assert load_classifier(Path(config.run.dir), torch.device("cpu")).step == step


def test_a_schedule_that_follows_the_length_is_not_resumed_with_another(ranks, tiny):
    config = tiny("schedule.name=cosine", "train.epochs=1")
    assert ranks.run(1, train, config) == [True]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2.0))
    with pytest.raises(Exception, match=r"result would change \(train\.epochs: 1\.0 -> 2\.0\)"):
        ranks.run(1, train, longer)


def test_a_run_that_is_done_says_what_makes_it_longer_and_where_a_late_tta_is(tiny, said):
    config = tiny("train.epochs=1")
    assert fit(config) and fit(config) and "this run is done; train.epochs=N makes it longer" in said[-2]
    limited = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=5))
    assert fit(limited) and "this run is done; train.max_steps=N makes it longer" in said[-2]
    followed = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, name="cosine"))
    followed = dataclasses.replace(followed, run=dataclasses.replace(config.run, dir=config.run.dir + "-cosine"))
    assert fit(followed) and fit(followed) and "done; a longer one is a new run (run.dir=PATH)" in said[-2]
    for tta, then in (("mirror", f"; dist-cifar evaluate {config.run.dir} --tta has it"), ("mirror_translate", "")):
        late = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tta=tta))
        assert fit(late) and said[-2] == f"its final test did not use eval.tta={tta} (eval.tta_share=1){then}"


def test_options_of_the_packages_own_are_fields(tiny):
    with pytest.raises(ConfigError, match=r"optimizer\.options: are for what is from outside .* optimizer\.name=sgd"):
        load_components(tiny("optimizer.name=sgd", "optimizer.options.momentum=0.5"))
