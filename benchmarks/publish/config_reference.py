"""Writes docs/configuration.md from the config's dataclasses: `python benchmarks/publish/config_reference.py`."""

from __future__ import annotations

from pathlib import Path

from dist_cifar.config import describe

HEAD = """# Configuration

Every field of a config, with its type and default; this page is written by `benchmarks/publish/config_reference.py`
from `dist_cifar/config/schema.py`. In a YAML file a section holds its fields; on the command line a field is
`section.field=value`. `python -m dist_cifar train --print-config` prints what would run.

## What goes together

**Precision and compilation.** `compute.precision` is `bf16`, `fp32` or `auto`, which measures a convolution in both
when a run first starts, takes bf16 if that saves a tenth or more, and says so; the run directory keeps the choice.
`compute.compile` is `auto` (on for GPUs with triton, but not in `exact`), `on` or `off`.

**Batch and learning rate.** `batch.global_size` is the number of samples of one optimizer step over all ranks; with
`ddp`, `batch.per_rank_size` may be given instead, and the batch grows with the ranks. The learning rate is
`optimizer.lr` times the square root of global batch / `optimizer.lr_base_batch`; `optimizer.lr_rule` has `linear` and
`none` as well. `batch.max_micro_batch` splits a rank's share, or a virtual rank's, into passes whose gradients are
accumulated. A virtual rank of `exact` is one forward and backward pass: choose the batch large enough that an eighth of
it keeps a GPU busy.

**Validation.** 5,000 training images are held out; the plateau scheduler and the choice of the best checkpoint look at
them. The test set is read once, at the end, with the best checkpoint.

## The augmentation

`augment.policy` is `seed` (flip, rotation, colour jitter, sharpness and erasing), `flip_crop` (flip, and a crop after
reflecting four pixels of border) or `none`; the other fields of `augment` are the strengths. On a GPU a Triton kernel
with the same bits does the work (`augment.backend`); before it is used it is compared with the CPU's on 128 images,
and the CPU takes over if one bit differs. It has been checked through Triton's interpreter and its compiled
instructions, and not yet been run on a GPU.

![Augmented images per second on one core](augment.png)"""


def page() -> str:
    """The whole page."""
    lines, section = [HEAD], ""
    for key, kind, default, text in describe():
        first, _, name = key.partition(".")
        if first != section:
            section = first
            lines += ["", f"## {section}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{name}`", kind, f"`{default}`", text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
