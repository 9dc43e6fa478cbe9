# SPDX-License-Identifier: BSD-3-Clause
"""The in-domain bed: the six sub-tasks of bench/minivqa/, each seen by a camera of its own."""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from minivqa import model as vqa
from minivqa import scenes
from study.training import Bed, Data, Questions, Sizes, drawn


def draw(model, task: scenes.Task, count: int, seed: int, split: str) -> Questions:
    """The items of one split, seeded by its name: splits of a seed never share a stream."""
    rng = random.Random(f"minivqa/{seed}/{task.name}/{split}")
    items = scenes.make_items(task, count, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    features = vqa.image_features(model, scenes.render(items, task.camera, generator))
    prompts, answers = scenes.encode(items)
    return Questions((prompts, features, answers))


@lru_cache(maxsize=1)  # a worker does one seed after another, all arms of it in a row
def load(sizes: Sizes, seed: int) -> Data:
    """Draw the images of a seed and pass them through the frozen vision tower once."""
    model = vqa.load_base()
    tasks = {task.name: task for task in scenes.SEQUENCE}
    order = list(tasks)
    random.Random(f"minivqa/{seed}/order").shuffle(order)
    return drawn(
        order, sizes, lambda name, count, split: draw(model, tasks[name], count, seed, split)
    )


BED = Bed("in-domain", load, vqa.load_base, (vqa.BASE_PATH,))
