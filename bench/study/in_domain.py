# SPDX-License-Identifier: BSD-3-Clause
"""The in-domain bed: the six sub-tasks of bench/minivqa/, each seen by a camera of its own."""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from minivqa import model as vqa
from minivqa import scenes
from study.training import Bed, Columns, Data, Sizes, TestItems, file_digest


def draw(model, task: scenes.Task, count: int, seed: int, split: str) -> Columns:
    """The items of one split, seeded by its name: splits of a seed never share a stream."""
    rng = random.Random(f"minivqa/{seed}/{task.name}/{split}")
    items = scenes.make_items(task, count, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    features = vqa.image_features(model, scenes.render(items, task.camera, generator))
    prompts, answers = scenes.encode(items)
    return prompts, features, answers


@lru_cache(maxsize=1)  # a worker does one seed after another, all arms of it in a row
def load(sizes: Sizes, seed: int) -> Data:
    """Draw the images of a seed and pass them through the frozen vision tower once."""
    model = vqa.load_base()
    order = list(scenes.SEQUENCE)
    random.Random(f"minivqa/{seed}/order").shuffle(order)
    train = [draw(model, task, sizes.train_items, seed, "train") for task in order]
    test = [draw(model, task, sizes.test_items, seed, sizes.split) for task in order]
    return Data(
        tuple(task.name for task in order),
        tuple(torch.cat(parts) for parts in zip(*train, strict=True)),
        tuple(TestItems(rows) for rows in test),
    )


BED = Bed("in-domain", load, vqa.load_base, lambda: file_digest(vqa.BASE_PATH))
