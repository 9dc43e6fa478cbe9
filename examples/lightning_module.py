# SPDX-License-Identifier: BSD-3-Clause
"""python examples/lightning_module.py

A LightningModule that is fitted to one task and then to another: a call of `fit` is a task.
"""

import logging

import pytorch_lightning as pl  # or: import lightning.pytorch as pl
import torch

import dgg


class Classifier(pl.LightningModule):
    def __init__(self, alpha):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
        )
        self.alpha, self.task = alpha, 0

    def configure_optimizers(self):
        return dgg.AdamW(self.parameters(), lr=5e-3, alpha=self.alpha, seed=self.task)

    def on_train_start(self):
        # Every task but the first is pulled back to the weights that it begins with.
        self.optimizers().set_anchor(task=self.task)

    def on_train_end(self):
        self.task += 1

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layers(x), y)

    def right(self, x, y):
        return 100 * (self.layers(x).argmax(1) == y).float().mean().item()  # per cent


def make_task(seed):  # four classes of points; every task has its own place and its own rule
    rng = torch.Generator().manual_seed(seed)
    x, rule, place = (torch.randn(*s, generator=rng) for s in ((2000, 32), (32, 4), (32,)))
    return torch.utils.data.TensorDataset(x + place, (x @ rule).argmax(dim=1))


logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
tasks = [make_task(0), make_task(1)]
print("        task 0: learnt   after task 1   task 1: learnt   forgot")
for name, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
    pl.seed_everything(0, verbose=False)
    module, score = Classifier(alpha), []
    for task in tasks:
        loader = torch.utils.data.DataLoader(task, batch_size=32, shuffle=True)
        trainer = pl.Trainer(
            max_steps=200, accelerator="cpu", enable_checkpointing=False, **quiet
        )  # fmt: skip
        trainer.fit(module, loader)
        score.append([module.right(*task.tensors) for task in tasks])
    (learnt, _), (kept, new) = score
    print(f"{name:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %{learnt - kept:9.0f} points")
