"""Peer `timm`: the job in the manner of timm's train.py.

Source: https://github.com/huggingface/pytorch-image-models/blob/main/train.py and https://huggingface.co/docs/timm. The
script itself is not in the wheel, and its flags can express neither this model nor the rotation and the sharpness; so
this is its loop with timm's public functions. Its loader has four persistent workers, stacks uint8 images, and
normalises and erases a batch in the process that trains; the transform of the PIL images is set on its dataset.
"""

import argparse
import logging
from contextlib import nullcontext
from functools import partial

import torch
from job import (
    AUGMENT,
    CLIP_NORM,
    EPOCHS,
    JOB,
    STATISTICS,
    Images,
    adam_options,
    mark,
    network,
    pil_transforms,
    timed,
)
from timm import utils
from timm.data import create_loader
from timm.data.transforms import MaybePILToTensor
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torchvision.transforms import Compose

LOG_STEPS = 50
logger = logging.getLogger("train")


def make_loader(options):
    loader = create_loader(
        Images(None),
        input_size=(3, 32, 32),
        batch_size=JOB.batch,
        is_training=True,
        re_prob=AUGMENT.erasing_probability,
        re_mode="const",
        mean=STATISTICS["mean"],
        std=STATISTICS["std"],
        num_workers=JOB.workers,
        distributed=options.distributed,
        device=torch.device(options.device),
    )
    loader.dataset.transform = Compose([*pil_transforms(), MaybePILToTensor()])
    return loader


def train_one_epoch(epoch, task, loader, optimizer, scheduler, options, autocast):
    model = task.get_trainable_module()
    model.train()
    losses = utils.AverageMeter()
    updates = epoch * len(loader)
    optimizer.zero_grad()
    for step, (images, labels) in enumerate(timed(loader)):
        images = images.contiguous(memory_format=JOB.memory_format)  # tuned
        with autocast():
            loss = task(images, labels)["loss"]
        loss.backward()
        utils.dispatch_clip_grad(task.get_clip_parameters(), value=CLIP_NORM, mode="norm")
        optimizer.step()
        losses.update(loss.item(), images.shape[0])
        updates += 1
        optimizer.zero_grad()
        task.update_ema(step=updates)
        if step % LOG_STEPS == 0:
            average = loss.new_tensor(losses.avg)
            if options.distributed:
                average = utils.reduce_tensor(average, options.world_size)
            if utils.is_primary(options):
                logger.info(f"epoch {epoch} step {step}/{len(loader)} loss {average.item():.3f}")
        scheduler.step_update(num_updates=updates, metric=losses.avg)
        if mark():  # measured
            return True  # measured


def main():
    utils.setup_default_logging()
    options = argparse.Namespace(device="cpu")
    device = utils.init_distributed_device(options)
    utils.random_seed(42, options.rank)
    model = network().to(device)
    autocast = nullcontext
    if JOB.tuned:  # tuned
        model.to(memory_format=torch.channels_last)  # tuned
        autocast = partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16)  # tuned
    loader = make_loader(options)
    optimizer = create_optimizer_v2(model, opt="adam", filter_bias_and_bn=False, **adam_options())
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=device, verbose=utils.is_primary(options))
    if options.distributed:
        task.prepare_distributed()
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=5, updates_per_epoch=len(loader)
    )
    for epoch in range(epochs):
        if options.distributed:
            loader.sampler.set_epoch(epoch)
        if train_one_epoch(epoch, task, loader, optimizer, scheduler, options, autocast):  # measured
            break  # measured
        scheduler.step(epoch + 1)
    if options.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
