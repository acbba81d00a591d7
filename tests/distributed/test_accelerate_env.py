"""What `accelerate launch` sets, against the config."""

from __future__ import annotations

import re

import pytest

from dist_cifar.config import load_config
from dist_cifar.distributed.accelerate_env import (
    forces_cpu,
    refuse_contradictions,
    started_by_accelerate,
    without_other_processes,
)
from dist_cifar.errors import LaunchError

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "ACCELERATE_USE_DEEPSPEED": "false"}
DEEPSPEED = PLAIN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
AGREES = [
    ([], PLAIN | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}),
    ([], PLAIN | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "", "ACCELERATE_DYNAMO_BACKEND": ""}),
    ([], {}),
    ([], PLAIN),
    (["compute.precision=bf16"], PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    (["strategy.name=fsdp"], PLAIN | {"ACCELERATE_USE_FSDP": "true"}),
    (["strategy.name=deepspeed"], DEEPSPEED),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "auto"}),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}),
    (["strategy.name=deepspeed", "optimizer.max_grad_norm=null"], DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0"}),
]
CONTRADICTS = [
    ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "GRADIENT_ACCUMULATION_STEPS=4, .*default_config"),
    (
        [],
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"},
        "GRADIENT_ACCUMULATION_STEPS=x, .*max_micro_batch",
    ),
    (
        ["compute.compile=on"],
        PLAIN | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        "BACKEND=INDUCTOR, .*compute.comp",
    ),
    ([], {"ACCELERATE_TORCH_DEVICE": "cpu"}, "ACCELERATE_TORCH_DEVICE=cpu, .*run.device"),
    ([], PLAIN | {"HF_HOME": "/h", "ACCELERATE_MIXED_PRECISION": "fp16"}, "=fp16, .*/h/accelerate/default_config.yaml"),
    (
        ["compute.precision=fp32"],
        PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"},
        "precision=bf16, .* and compute",
    ),
    ([], DEEPSPEED, "to use DEEPSPEED and strategy.name is exact; set strategy.name=deepspeed, or leave it out"),
    ([], PLAIN | {"ACCELERATE_USE_FSDP": "1"}, "to use FSDP and strategy.name is exact; set strategy.name=fsdp"),
    ([], PLAIN | {"ACCELERATE_USE_MEGATRON_LM": "true"}, "to use MEGATRON_LM and strategy.name is exact; leave it out"),
    ([], PLAIN | {"ACCELERATE_USE_PARALLELISM_CONFIG": "yes"}, "to use PARALLELISM_CONFIG"),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage=3"),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x"}, "deepspeed_config_file"),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping=0.5"),
    (["strategy.name=deepspeed"], DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "lots"}, "gradient_clipping=lots"),
]


@pytest.mark.parametrize(("overrides", "environ"), AGREES)
def test_what_agrees_is_taken(overrides, environ):
    refuse_contradictions(load_config(None, overrides), environ)


@pytest.mark.parametrize(("overrides", "environ", "message"), CONTRADICTS)
def test_what_contradicts_the_config_is_refused_by_name(overrides, environ, message):
    with pytest.raises(LaunchError, match=r"launch: (accelerate was |ACCELERATE_)") as caught:
        refuse_contradictions(load_config(None, overrides), environ)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_who_started_the_process():
    assert started_by_accelerate(PLAIN) and not started_by_accelerate({"RANK": "0"})
    assert not forces_cpu(PLAIN) and not forces_cpu({}) and forces_cpu({"ACCELERATE_USE_CPU": "true"})


def test_other_processes_are_hidden_for_the_block_even_if_it_fails():
    environ = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", "PATH": "/bin"}
    before = dict(environ)
    with pytest.raises(RuntimeError), without_other_processes(environ):
        assert environ == {"PATH": "/bin"}
        raise RuntimeError
    assert environ == before
