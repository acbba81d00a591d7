"""Peer `lightning`: the job in the manner of Lightning's CIFAR-10 tutorial.

Source: https://lightning.ai/docs/pytorch/stable/notebooks/lightning_examples/cifar10-baseline.html and, for the ranks,
https://lightning.ai/docs/pytorch/stable/accelerators/gpu_intermediate.html: a LightningModule with a learning rate that
changes with every step, its Trainer with the default logger and progress bar, half as many workers as the machine has
cores, `strategy="ddp"` on several ranks.
"""

import lightning as L
import torch
from job import (
    CLIP_NORM,
    EPOCHS,
    JOB,
    Images,
    adam_options,
    mark,
    network,
    time_all_loaders,
    train_transform,
)
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader


class LitResnet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()
        self.model = self.model.to(memory_format=JOB.memory_format)  # tuned

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_index):
        images, labels = batch
        images = images.to(memory_format=JOB.memory_format)  # tuned
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        settings = adam_options()
        optimizer = torch.optim.Adam(self.parameters(), **settings)
        scheduler = OneCycleLR(
            optimizer, max_lr=settings["lr"], total_steps=EPOCHS * len(self.trainer.train_dataloader)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, outputs, batch, batch_index):  # measured
        mark()  # measured


def main():
    L.seed_everything(7)
    time_all_loaders()  # measured
    loader = DataLoader(Images(train_transform()), batch_size=JOB.batch, shuffle=True, num_workers=JOB.workers)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        max_steps=JOB.steps,  # measured
        accelerator="cpu",
        devices=JOB.ranks,
        strategy="ddp" if JOB.ranks > 1 else "auto",
        precision="bf16-mixed" if JOB.tuned else "32-true",  # tuned
        gradient_clip_val=CLIP_NORM,
        default_root_dir=JOB.out,
    )
    trainer.fit(LitResnet(), loader)


if __name__ == "__main__":
    main()
