"""Writes docs/configuration.md from the config's dataclasses: `python benchmarks/publish/config_reference.py`."""

from __future__ import annotations

from pathlib import Path

from dist_cifar.config import AtResume, at_resume, describe

PAGE = Path(__file__).resolve().parents[2] / "docs/configuration.md"
HEAD = """# Configuration

A config is a YAML file of sections, each of which holds its fields. On the command line a field is
`section.field=value`, which takes precedence over the file. `dist-cifar train --help` lists every field as this page
does, and `--print-config` prints what would run. An unknown key, a wrong type or an impossible value is an error that
names the nearest right one. A key that was renamed is still read, with a warning.

Numbers are decimal: `010` is ten, and `0x40` and `1:30` are no numbers. On the command line a field of text takes what
stands behind the `=` as it is. In paths `~`, `$NAME` and `${NAME}` are expanded, and one that has no value is an error;
`data.stage_dir` is expanded on each node, the others when the config is read. Tags, aliases and merge keys of YAML are
not read.

This page is written by `make docs` from `dist_cifar/config/schema.py` and `dist_cifar/config/optimizer_schema.py`.

## What belongs together

**Precision and compilation.** `compute.precision` is `bf16`, `fp32` or `auto`, which takes bf16 where the GPU or the
processor has instructions for it, and says so; the run directory keeps the choice. `compute.compile` is `auto` (in
`ddp`, on GPUs with triton), `on` or `off`.

**Batch and learning rate.** `batch.global_size` is the number of samples of one optimizer step over all ranks; in
other strategies than `exact`, `batch.per_rank_size` may be given instead, and the batch grows with the ranks. The
learning rate is `optimizer.lr` times the square root of global batch / `optimizer.lr_base_batch` for Adam, and times
that ratio itself for SGD and Muon, unless `optimizer.lr_rule` says otherwise; the start says which.
`batch.max_micro_batch` splits a rank's share, or a virtual rank's, into passes whose gradients are accumulated. A
virtual rank of `exact` is one forward and backward pass: choose the batch large enough that an eighth of it keeps a GPU
busy.

**Validation.** 5,000 training images are held out; the plateau scheduler and the choice of the best checkpoint use
them. The test set is read once, at the end, with the best checkpoint, or with `eval.select=last` the last one.
`eval.tta` adds the accuracy over several views of each image, beside the plain one; nothing is chosen by it.

**Groups of parameters.** `optimizer.groups` is a list of rules, of which the first whose pattern matches a parameter's
name holds. With `optimizer.decay_norms_and_biases=false` parameters of one dimension do not decay.

```yaml
optimizer:
  groups:
    - {match: "fc.*", lr_scale: 2.0}
    - {match: "*.bias", decay_scale: 0.0}
```

`deepspeed` cannot clip groups together where it shards them, and `muon` needs whole matrices: `deepspeed` from
`strategy.zero_stage=1` on refuses both, and `fsdp` refuses `muon`.

## The augmentation

`augment.policy` is `default` (flip, rotation, colour jitter, sharpness and erasing), `flip_crop` (flip, and a crop
after reflecting four pixels of border) or `none`; the other fields of `augment` are the strengths. `crop_padding`,
`flip` and `cutout_size` hold in the first two policies, and `resolution` in all three. On a GPU a Triton kernel with
the same bits does the work (`augment.backend`); before it is used it is compared with the CPU's on 128 images, and the
CPU takes over if one bit differs. It has been checked through Triton's interpreter and its compiled
instructions, and not yet been run on a GPU.

![Augmented images per second on one core](augment.png)

The operations stand in this order: crop, flip, rotation, jitter and sharpness on bytes, as PIL rounds; the area
average to the size of the step; normalisation; the boxes of erasing and of cutout, which are set to zero.

```yaml
augment:
  policy: flip_crop
  crop_padding: 2
  flip: alternating
  cutout_size: 12
  resolution:
    - {until: 0.25, size: 20}
    - {until: 0.5, size: 24}
```

With this, the first quarter of the steps has images of 20x20 pixels, the second of 24x24 and the rest of 32x32. The
size of a step follows from the length of the run, so a resume may not change `train.epochs` or `train.max_steps`.
Networks of this package take any size; one of your own must, e.g. by global pooling before its head. With
`compute.compile` each size is compiled once.

## Fields

*At resume* says whether a resumed run may have another value. *Free*: yes. *Not in `exact`*: the field changes how sums
are rounded, so a run that stays in `exact` may not change it. The others decide the result; a resume that would change
one is refused."""

AT_RESUME = {AtResume.DECIDES: "", AtResume.ROUNDING: "not in `exact`", AtResume.FREE: "free"}


def page() -> str:
    """The whole page."""
    lines, section = [HEAD], ""
    for key, kind, default, text in describe():
        first, _, name = key.partition(".")
        if first != section:
            section = first
            lines += [
                "",
                f"## {section}",
                "",
                "| field | type | default | at resume | meaning |",
                "|---|---|---|---|---|",
            ]
        cells = (f"`{name}`", kind, f"`{default}`", AT_RESUME[at_resume(key)], text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
