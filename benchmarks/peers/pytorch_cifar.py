"""Peer `pytorch_cifar`: the job in the manner of the widely copied script kuangliu/pytorch-cifar.

Source: https://github.com/kuangliu/pytorch-cifar/blob/master/main.py: one process, two workers, and after every step
the loss and the number of right answers as Python numbers on a progress line.
"""

import sys
import time

import torch
from job import CLIP_NORM, EPOCHS, JOB, Images, adam_options, mark, network, timed, train_transform
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

WIDTH = 40

device = "cuda" if torch.cuda.is_available() else "cpu"
loader = DataLoader(Images(train_transform()), batch_size=JOB.batch, shuffle=True, num_workers=JOB.workers)
model = network().to(device)
model = model.to(memory_format=JOB.memory_format)  # tuned
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), **adam_options())
scheduler = CosineAnnealingLR(optimizer, T_max=EPOCHS)


def show(step, steps, started, text):
    done = WIDTH * (step + 1) // steps
    seconds = time.time() - started
    sys.stdout.write(f"\r[{'=' * done}{'.' * (WIDTH - done)}] {step + 1}/{steps} {seconds:.1f} s | {text}")
    sys.stdout.flush()


def train(epoch):
    print(f"\nepoch {epoch}")
    model.train()
    loss_sum, correct, total, started = 0, 0, 0, time.time()
    for step, (images, labels) in enumerate(timed(loader)):
        images, labels = images.to(device), labels.to(device)
        images = images.to(memory_format=JOB.memory_format)  # tuned
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=JOB.tuned):  # tuned
            logits = model(images)
            loss = criterion(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        loss_sum += loss.item()
        total += labels.size(0)
        correct += logits.argmax(1).eq(labels).sum().item()
        show(step, len(loader), started, f"loss {loss_sum / (step + 1):.3f}, accuracy {correct / total:.3f}")
        if mark():  # measured
            sys.exit()  # measured


for epoch in range(EPOCHS):
    train(epoch)
    scheduler.step()
