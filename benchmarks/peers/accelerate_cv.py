"""Peer `accelerate`: the job in the manner of Accelerate's complete computer-vision example.

Source: https://github.com/huggingface/accelerate/blob/main/examples/complete_cv_example.py, and the commands of
https://github.com/huggingface/accelerate/blob/main/examples/README.md: a map-style dataset of dictionaries, a loader
with `num_workers=4`, a learning rate that changes with every step, everything handed to `prepare`.
"""

import argparse

import torch
from accelerate import Accelerator
from job import CLIP_NORM, EPOCHS, JOB, Images, adam_options, mark, network, timed, train_transform
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader


class NamedImages(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


def train(options):
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    torch.manual_seed(42)
    dataset = NamedImages(train_transform())
    loader = DataLoader(dataset, shuffle=True, batch_size=JOB.batch, num_workers=JOB.workers)
    model = network()
    model = model.to(accelerator.device)
    model = model.to(memory_format=JOB.memory_format)  # tuned
    settings = adam_options()
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    scheduler = OneCycleLR(optimizer, max_lr=settings["lr"], epochs=EPOCHS, steps_per_epoch=len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(EPOCHS):
        model.train()
        for batch in timed(loader):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            batch["image"] = batch["image"].to(memory_format=JOB.memory_format)  # tuned
            loss = cross_entropy(model(batch["image"]), batch["label"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if mark():  # measured
                return accelerator.end_training()  # measured
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    train(parser.parse_args())
