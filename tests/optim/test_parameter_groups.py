"""Rules for parameters by name and by dimension."""

from __future__ import annotations

import pytest
import torch

from dist_cifar.config import GroupRule, OptimizerConfig, flatten, load_config, to_yaml
from dist_cifar.errors import ConfigError
from dist_cifar.optim.parameter_groups import group_parameters

NAMED = {
    "conv.weight": torch.zeros(2, 3, 3, 3),
    "bn1.weight": torch.zeros(2),
    "bn1.bias": torch.zeros(2),
    "fc.weight": torch.zeros(5, 2),
    "fc.bias": torch.zeros(5),
}


def found(**options: object) -> list[tuple[list[str], float, float]]:
    """(names, factor on the learning rate, factor on the decay) of each group."""
    names = {parameter: name for name, parameter in NAMED.items()}
    groups = group_parameters(NAMED.items(), OptimizerConfig(**options))
    return [([names[one] for one in group["params"]], group["lr_scale"], group["decay_scale"]) for group in groups]


def test_without_rules_there_is_one_group_in_the_order_of_the_network():
    assert found() == [(list(NAMED), 1.0, 1.0)]


def test_norms_and_biases_need_not_decay():
    assert found(decay_norms_and_biases=False) == [
        (["conv.weight", "fc.weight"], 1.0, 1.0),
        (["bn1.weight", "bn1.bias", "fc.bias"], 1.0, 0.0),
    ]


def test_the_first_rule_that_matches_holds():
    rules = (GroupRule(match="fc.*", lr_scale=2.0), GroupRule(match="*.bias", lr_scale=64.0, decay_scale=0.5))
    assert found(groups=rules) == [
        (["conv.weight", "bn1.weight"], 1.0, 1.0),
        (["bn1.bias"], 64.0, 0.5),
        (["fc.weight", "fc.bias"], 2.0, 1.0),
    ]


def test_groups_of_different_lengths_are_apart():
    rules = (GroupRule(match="fc.bias", epochs=0.5), GroupRule(match="*.bias"))
    groups = group_parameters(NAMED.items(), OptimizerConfig(groups=rules))
    assert [group["epochs"] for group in groups] == [None, 0.5]


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"groups: head\.\* matches no parameter; there are conv\.weight, "):
        found(groups=(GroupRule(match="head.*"),))


def test_a_rule_that_earlier_ones_leave_nothing_is_refused():
    rules = (GroupRule(match="*.bias", lr_scale=64.0), GroupRule(match="fc.*"), GroupRule(match="fc.b*", epochs=1.0))
    with pytest.raises(ConfigError, match=r"groups: fc\.b\* holds for no parameter, since .*\*\.bias, fc\.\*\) match"):
        found(groups=rules)
    assert len(found(groups=(rules[2], *rules[:2]))) == 3


def test_rules_are_typed_in_yaml_and_read_back(tmp_path):
    config = load_config(None, ["optimizer.groups=[{match: fc.*, lr_scale: 2}, {match: '*.bias', decay_scale: 0}]"])
    assert config.optimizer.groups == (
        GroupRule(match="fc.*", lr_scale=2.0),
        GroupRule(match="*.bias", decay_scale=0.0),
    )
    assert flatten(config)["optimizer.groups"][0] == {
        "match": "fc.*",
        "lr_scale": 2.0,
        "decay_scale": 1.0,
        "epochs": None,
    }
    path = tmp_path / "cifar10_resnet18.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", r"must be \{match, lr_scale, decay_scale, epochs\}, found a; write \{match: a, lr_scale: 2\.0\}"),
        ("[{mach: a}]", r"has no mach; did you mean match\?"),
        ("[{lr_scale: 1}]", r"match is missing in \{lr_scale: 1\}"),
        ("[{match: a, lr_scale: -1}]", r"lr_scale: must be >= 0 and <= 10000, found -1"),
        ("[{match: 3}]", r"match: must be text, found 3"),
        ("fc", r"must be a list, found fc"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=rf"optimizer\.groups.*{message}"):
        load_config(None, [f"optimizer.groups={text}"])


@pytest.mark.parametrize("rule", ["optimizer.groups=[{match: fc.*}]", "optimizer.decay_norms_and_biases=false"])
def test_deepspeed_that_shards_steps_one_group_only(rule):
    with pytest.raises(ConfigError, match=r"strategy\.name=deepspeed with strategy\.zero_stage=1 steps one group"):
        load_config(None, [rule, "strategy.name=deepspeed"])
    for others in (["strategy.name=fsdp"], ["strategy.name=deepspeed", "strategy.zero_stage=0"]):
        load_config(None, [rule, *others])
