"""What `accelerate launch` told this process beside its rank, and what of it contradicts the config.

Contract: options of `accelerate launch` that the config decides are refused by name where the two differ; none is
ignored in silence. Nothing here looks at anything but the variables and the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dist_cifar.errors import LaunchError

if TYPE_CHECKING:
    from dist_cifar.config import Config

USE_CPU = "ACCELERATE_USE_CPU"
"""Set by `accelerate launch --cpu`, and by people who want CPU ranks from a launcher that does not say so."""
_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What `ACCELERATE_USE_...` may switch on."""
_STRATEGIES = ("DEEPSPEED", "FSDP")
"""The engines whose name is also the name of a strategy."""
_OF_THE_CONFIG = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "batch.max_micro_batch says how a batch is accumulated"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "compute.compile says whether the model is compiled by dynamo"),
    "ACCELERATE_TORCH_DEVICE": ((), "run.device says what a rank computes on"),
    "ACCELERATE_FP8_BACKEND": (("no", "none"), "compute.precision says in what is computed"),
}
"""What Accelerate would do behind the config's back: the values that change nothing, and who decides it here."""
_COUNTED_BY = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables from which Accelerate's `PartialState` learns that there are other processes."""


def started_by_accelerate(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` is the parent: it always sets a precision."""
    return "ACCELERATE_MIXED_PRECISION" in environ


def forces_cpu(environ: Mapping[str, str]) -> bool:
    """Whether the launcher was told to leave GPUs alone."""
    return _is_set(environ, USE_CPU)


@contextmanager
def without_other_processes(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Hides for the block that there are other ranks, so that Accelerate's state is made for one process."""
    hidden = {name: environ.pop(name) for name in _COUNTED_BY if name in environ}
    try:
        yield
    finally:
        environ.update(hidden)


def refuse_contradictions(config: Config, environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for options of `accelerate launch` that contradict the config."""
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.compute.precision):
        raise LaunchError(
            f"launch: accelerate was given mixed_precision={precision}, as an option or in its file of defaults"
            f" ({_defaults_file(environ)}), and compute.precision is {config.compute.precision}; leave the former out"
            " and set compute.precision"
        )
    for name in _ENGINES:
        if _is_set(environ, f"ACCELERATE_USE_{name}") and config.strategy.name != name.lower():
            hint = f"set strategy.name={name.lower()}, or leave it out" if name in _STRATEGIES else "leave it out"
            raise LaunchError(
                f"launch: accelerate was told to use {name} and strategy.name is {config.strategy.name}; {hint}"
            )
    for name, (neutral, field) in _OF_THE_CONFIG.items():
        value = environ.get(name, "")
        if value and value.lower() not in neutral:
            raise LaunchError(
                f"launch: {name}={value}, an option of accelerate launch or of its file of defaults"
                f" ({_defaults_file(environ)}), would change the training: leave it out there, or unset it; {field}"
            )
    if _is_set(environ, "ACCELERATE_USE_DEEPSPEED"):
        _refuse_other_plugin_settings(config, environ)


def _refuse_other_plugin_settings(config: Config, environ: Mapping[str, str]) -> None:
    """Raises `LaunchError` for settings of Accelerate's DeepSpeed plugin that contradict the config."""
    zero_stage = str(config.strategy.zero_stage)
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", zero_stage)
    if stage != zero_stage:
        raise LaunchError(
            f"launch: accelerate was given zero_stage={stage} and strategy.zero_stage is {zero_stage}; set"
            f" strategy.zero_stage={stage}, or leave the former out"
        )
    if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise LaunchError(
            "launch: accelerate was given a deepspeed_config_file; the config says everything here: leave it out"
        )
    clip = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clip not in ("none", "auto") and _number(clip) != (config.optimizer.max_grad_norm or 0.0):
        raise LaunchError(
            f"launch: accelerate was given gradient_clipping={clip} and optimizer.max_grad_norm is"
            f" {config.optimizer.max_grad_norm}; leave the former out and set optimizer.max_grad_norm"
        )


def _defaults_file(environ: Mapping[str, str]) -> str:
    """Where `accelerate config` writes what `accelerate launch` does unless it is told otherwise."""
    cache = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return f"{cache}/accelerate/default_config.yaml"


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
