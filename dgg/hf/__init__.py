# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face Trainer: task boundaries, replay in a second backward pass, logs of the guidance.

    trainer = dgg.hf.ReplayTrainer(  # or Trainer, without the two lines of the memory
        model, args, train_dataset=task,
        optimizer_cls_and_kwargs=(dgg.AdamW, {"lr": 2e-4, "alpha": 0.2}),
        callbacks=[dgg.hf.GuidanceCallback()],
        replay_buffer=memory,
    )
    trainer.train()
    trainer.remember()

The guidance itself happens in the optimizer's step; the callback only says where a task begins
and reports. Importing this module imports transformers; ``import dgg`` does not.
"""

from dgg.hf.callback import GuidanceCallback, is_active
from dgg.hf.every_trainer import install
from dgg.hf.replay_trainer import ReplayTrainer, with_replay

__all__ = ["GuidanceCallback", "ReplayTrainer", "install", "is_active", "with_replay"]
