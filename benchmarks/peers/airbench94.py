"""Peer `airbench94`: the method of the paper in plain PyTorch, on a CPU, written from its description.

    python benchmarks/peers/airbench94.py FOLDER --seed 0 --out result.json

FOLDER holds train_images.npy (uint8 [n, 32, 32, 3]), train_labels.npy, test_images.npy, test_labels.npy and
statistics.json. All cores compute one process, in channels-last, in bf16 where the processor has instructions for it;
the clock runs over what depends on the images: whitening, training, and the final evaluation with its test-time
augmentation. Against the paper, whitening is computed from shuffled images, since the folder may be sorted by class.

Source: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, 2024, section 3 and the listing of
its hyperparameters.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH, LR, DECAY, MOMENTUM, BIAS_SCALE, SMOOTHING = 1024, 11.5, 0.0153, 0.85, 64.0, 0.2
"""The rate belongs to 1,024 images and to a summed loss, the decay to 1,024 images; both to a momentum of 0.85."""
WIDTHS, TRANSLATE, EPOCHS, WHITEN_BIAS_EPOCHS, LOOKAHEAD_EVERY = (64, 256, 256), 2, 9.9, 3, 5
PRECISION = torch.bfloat16 if any("bf16" in k and v is True for k, v in torch.cpu.get_capabilities().items()) else None


class Group(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding="same", bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", bias=False)
        self.norm1, self.norm2 = (nn.BatchNorm2d(width, eps=1e-12, momentum=0.4) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x):
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Net(nn.Module):
    def __init__(self, images):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        patches = F.unfold(images, 2).double().transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        rows = (vectors / torch.sqrt(values + 5e-4)).T.flip(0).float().view(12, 3, 2, 2)
        self.whiten.weight.data = torch.cat([rows, -rows])
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(*(Group(n, w) for n, w in zip((24, *WIDTHS[:-1]), WIDTHS, strict=True)))
        self.head = nn.Linear(WIDTHS[-1], 10, bias=False)

    def forward(self, x):
        x = self.groups(F.gelu(self.whiten(x)))
        return self.head(x.amax((2, 3))) / 9


def augmented(images, flipped, epoch):
    """The images of one epoch: flipped in every second one, and moved by at most TRANSLATE pixels."""
    turn = flipped ^ bool(epoch % 2)
    images = torch.where(turn[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, [TRANSLATE] * 4, "reflect")
    places = torch.randint(2 * TRANSLATE + 1, (len(images), 2))
    moved = torch.empty_like(images)
    for y in range(2 * TRANSLATE + 1):
        for x in range(2 * TRANSLATE + 1):
            chosen = (places[:, 0] == y) & (places[:, 1] == x)
            moved[chosen] = padded[chosen, :, y : y + 32, x : x + 32]
    return moved


def rate(step, total):
    """The share of the full rate: from 0.2 up to 1 at 0.23 of the run, then down to 0.07."""
    done = step / total
    return 0.2 + 0.8 * done / 0.23 if done < 0.23 else 1 + (0.07 - 1) * (done - 0.23) / (1 - 0.23)


@torch.no_grad()
def pull(net, slow, share):
    """Moves the slow weights by 1 - `share` to the weights, and sets the weights to them."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            slow[name].lerp_(value, 1 - share)
            value.copy_(slow[name])


@torch.no_grad()
def accuracies(net, images, labels):
    """The accuracy of the images alone, and of the weighted views."""
    net.eval()
    right = [0, 0]
    for batch, truth in zip(images.split(2000), labels.split(2000), strict=True):
        padded = F.pad(batch, [1] * 4, "reflect")
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION is not None):
            views = [
                [net(view.to(memory_format=torch.channels_last)) for view in (shifted, shifted.flip(3))]
                for shifted in (batch, padded[:, :, :32, :32], padded[:, :, 2:, 2:])
            ]
        means = [sum(pair) / 2 for pair in views]
        for i, logits in enumerate((views[0][0], means[0] / 2 + (means[1] + means[2]) / 4)):
            right[i] += (logits.argmax(1) == truth).sum().item()
    return [count / len(labels) for count in right]


def train(data, seed, max_steps):
    torch.manual_seed(seed)
    statistics = json.loads((data / "statistics.json").read_text())
    mean, std = (torch.tensor(statistics[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images, labels = {}, {}
    for split in ("train", "test"):
        pixels = torch.from_numpy(np.load(data / f"{split}_images.npy")).permute(0, 3, 1, 2)
        images[split] = ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        labels[split] = torch.from_numpy(np.load(data / f"{split}_labels.npy")).long()

    start = time.perf_counter()
    net = Net(images["train"][torch.randperm(len(labels["train"]))[:5000]]).to(memory_format=torch.channels_last)
    steps_per_epoch = len(labels["train"]) // BATCH
    total = math.ceil(EPOCHS * steps_per_epoch)
    kilostep = 1024 * (1 + 1 / (1 - MOMENTUM))
    full, decay = LR / kilostep, DECAY * BATCH / kilostep
    norms = [p for name, p in net.named_parameters() if "norm" in name and p.requires_grad]
    others = [p for name, p in net.named_parameters() if "norm" not in name and p.requires_grad]
    optimizer = torch.optim.SGD(
        [
            {"params": norms, "full": full * BIAS_SCALE, "weight_decay": decay / (full * BIAS_SCALE)},
            {"params": others, "full": full, "weight_decay": decay / full},
        ],
        lr=full,
        momentum=MOMENTUM,
        nesterov=True,
    )
    slow = {name: value.clone() for name, value in net.state_dict().items()}
    flipped = torch.rand(len(labels["train"])) < 0.5
    step = 0
    for epoch in range(math.ceil(EPOCHS)):
        inputs = augmented(images["train"], flipped, epoch)
        net.whiten.bias.requires_grad_(epoch < WHITEN_BIAS_EPOCHS)
        order = torch.randperm(len(inputs))[: steps_per_epoch * BATCH].view(-1, BATCH)
        net.train()
        for chosen in order:
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * rate(step, total)
            with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION is not None):
                logits = net(inputs[chosen].contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels["train"][chosen], label_smoothing=SMOOTHING, reduction="sum")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if step % LOOKAHEAD_EVERY == 0:
                pull(net, slow, 0.95**LOOKAHEAD_EVERY * (step / total) ** 3)
            if step >= min(total, max_steps):
                break
        print(f"epoch {epoch + 1}, step {step} of {total}: {time.perf_counter() - start:.0f} s", flush=True)
        if step >= min(total, max_steps):
            break
    pull(net, slow, 1.0)
    plain, with_views = accuracies(net, images["test"], labels["test"])
    seconds = time.perf_counter() - start
    return {"test_accuracy": plain, "test_accuracy_tta": with_views, "seconds": seconds, "steps": step}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = train(options.data, options.seed, options.max_steps)
    result |= {"seed": options.seed, "threads": torch.get_num_threads(), "precision": str(PRECISION or torch.float32)}
    options.out.write_text(json.dumps(result) + "\n")
    print(result)


if __name__ == "__main__":
    main()
