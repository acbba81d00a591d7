"""Peer `ddp_tutorial`: the job in the manner of PyTorch's tutorial series on DistributedDataParallel, with torchrun.

Source: https://docs.pytorch.org/tutorials/beginner/ddp_series_fault_tolerance.html: a Trainer class around the loop, a
DistributedSampler, `pin_memory=True` and the loader's default of no workers. The backend is gloo, for CPUs.
"""

import os

import torch
from job import CLIP_NORM, EPOCHS, JOB, Images, adam_options, mark, network, timed, train_transform
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


class Trainer:
    def __init__(self, model, loader, optimizer):
        self.rank = int(os.environ["LOCAL_RANK"])
        self.loader = loader
        self.optimizer = optimizer
        self.model = DistributedDataParallel(model)

    def run_batch(self, images, labels):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=JOB.tuned):  # tuned
            logits = self.model(images)
            loss = torch.nn.CrossEntropyLoss()(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()

    def run_epoch(self, epoch):
        print(f"rank {self.rank}, epoch {epoch}, {len(self.loader)} steps")
        self.loader.sampler.set_epoch(epoch)
        for images, labels in timed(self.loader):
            images = images.to(memory_format=JOB.memory_format)  # tuned
            self.run_batch(images, labels)
            if mark():  # measured
                return True  # measured

    def train(self, epochs):
        for epoch in range(epochs):
            if self.run_epoch(epoch):  # measured
                return  # measured


def make_loader(dataset, batch_size):
    sampler = DistributedSampler(dataset)
    return DataLoader(
        dataset, batch_size=batch_size, pin_memory=True, shuffle=False, sampler=sampler, num_workers=JOB.workers
    )


def main():
    init_process_group(backend="gloo")
    model = network()
    model = model.to(memory_format=JOB.memory_format)  # tuned
    optimizer = torch.optim.Adam(model.parameters(), **adam_options())
    trainer = Trainer(model, make_loader(Images(train_transform()), JOB.batch), optimizer)
    trainer.train(EPOCHS)
    destroy_process_group()


if __name__ == "__main__":
    main()
