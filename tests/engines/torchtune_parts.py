# SPDX-License-Identifier: BSD-3-Clause
"""What a configuration of torchtune names in its test: a tokenizer, data, a schedule."""

from __future__ import annotations

import torch

WORDS, LENGTH = 32, 12


class Tokenizer:
    """None is needed but its number for padding."""

    pad_id = 0


def counting(tokenizer, stride: int) -> list[dict[str, list[int]]]:
    """Returns rows that count in steps of ``stride``: every stride is another task."""
    rows = [[1 + (start + stride * k) % (WORDS - 1) for k in range(LENGTH)] for start in range(24)]
    return [{"tokens": row, "labels": [*row]} for row in rows]


def constant(optimizer, num_training_steps: int, last_epoch: int):
    """Returns a schedule that changes nothing.

    torchtune's recipe for adapters counts steps from 0 when it is resumed, and so its schedule.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch)
