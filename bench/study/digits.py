# SPDX-License-Identifier: BSD-3-Clause
"""The digits beds: five tasks made of handwritten digits, all seeds of a setting at once.

* `classes`: two classes a task, one head for all ten (class-incremental);
* `permuted`: all classes, the pixels in another order in every task;
* `rotated`: all classes, turned by 0, 36, 72, 108 or 144 degrees.

A network of 64–32–10 units learns them. Everything that is drawn (split, order of the tasks, first
weights, remembered examples, batches) depends on bed, setting and seed alone, so that all methods
see the same. Arrays have a leading dimension of seeds; `rules.py` trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA_PATH = Path(__file__).with_name("digits.npz")
BEDS = ("classes", "permuted", "rotated")
TASKS = 5
INPUTS, HIDDEN, CLASSES = 64, 32, 10
PARAMETERS = HIDDEN * INPUTS + HIDDEN + CLASSES * HIDDEN + CLASSES
TRAIN, VALIDATION, TEST = 1000, 300, 497
ANGLES = (0, 36, 72, 108, 144)
BATCH, REPLAYED = 32, 8
WARMUP = 10
# The best for replay alone of 0.00125, doubled up to 0.04, on validation items of seeds 100
# to 109 at 160 steps and 5 remembered examples. All methods share it.
LEARNING_RATES = {"classes": 5e-3, "permuted": 1e-2, "rotated": 1e-2}


@dataclass(frozen=True)
class Setting:
    """One bed, how long a task is, and how many examples of each old task are remembered."""

    bed: str
    steps: int
    remembered: int
    split: str = "test"  # or "validation", for tuning


@dataclass(frozen=True)
class Batches:
    """One task of all seeds: what each step sees. Old rows stand at the end of a batch."""

    images: Tensor  # [seeds, steps, BATCH, INPUTS]
    labels: Tensor  # [seeds, steps, BATCH]
    replayed: int  # rows of a batch that are old


@dataclass(frozen=True)
class Stream:
    """All that a setting shows to the networks of some seeds."""

    setting: Setting
    seeds: tuple[int, ...]
    weights: Tensor  # [seeds, PARAMETERS], the first ones
    tasks: tuple[Batches, ...]
    fisher_images: tuple[Tensor, ...]  # a task: [seeds, 300, INPUTS], for Fisher matrices
    test_images: tuple[Tensor, ...]  # a task: [seeds, items, INPUTS]
    test_labels: tuple[Tensor, ...]  # a task: [seeds, items]; -1 fills up

    @property
    def lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return LEARNING_RATES[self.setting.bed]


@lru_cache(maxsize=1)
def load() -> tuple[np.ndarray, np.ndarray]:
    """Images in 0 … 1 as rows of 64, and their labels."""
    with np.load(DATA_PATH) as file:
        return file["images"].astype(np.float64) / 16, file["labels"].astype(np.int64)


def rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    """Images (rows of 64) turned about their centre, bilinear, 0 outside."""
    if degrees == 0:
        return images
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], dtype=torch.float64)
    square = torch.from_numpy(images).view(-1, 1, 8, 8)
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(square.shape), align_corners=False)
    return F.grid_sample(square, grid, align_corners=False).view(-1, INPUTS).numpy()


def stream(setting: Setting, seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> Stream:
    """Draw everything for some seeds."""
    if setting.bed not in BEDS or setting.split not in ("test", "validation"):
        raise ValueError(f"no such setting: {setting}")
    ones = [_one_seed(setting, seed) for seed in seeds]

    def stacked(name: str) -> tuple[Tensor, ...]:
        """A task: the arrays of all seeds."""
        arrays = [np.stack(of_task) for of_task in zip(*(one[name] for one in ones), strict=True)]
        return tuple(torch.from_numpy(x).to(dtype if x.dtype.kind == "f" else None) for x in arrays)

    replayed = [0] + [REPLAYED if setting.remembered else 0] * (TASKS - 1)
    widest = max(len(one["test_labels"][t]) for one in ones for t in range(TASKS))
    for one in ones:  # classes are not equally frequent
        for t in range(TASKS):
            short = widest - len(one["test_labels"][t])
            one["test_labels"][t] = np.pad(one["test_labels"][t], (0, short), constant_values=-1)
            one["test_images"][t] = np.pad(one["test_images"][t], ((0, short), (0, 0)))
    return Stream(
        setting,
        tuple(seeds),
        torch.from_numpy(np.stack([one["weights"] for one in ones])).to(dtype),
        tuple(map(Batches, stacked("images"), stacked("labels"), replayed)),
        stacked("fisher"),
        stacked("test_images"),
        stacked("test_labels"),
    )


def _one_seed(setting: Setting, seed: int) -> dict[str, list[np.ndarray]]:
    """What one seed draws. Each kind of draw has a generator of its own."""

    def generator(*what: object) -> np.random.Generator:
        name = "/".join(map(str, ("digits", setting.bed, seed, *what)))
        return np.random.default_rng(random.Random(name).getrandbits(64))

    images, labels = load()
    order = generator("split").permutation(len(labels))
    train, validation, test = np.split(order, (TRAIN, TRAIN + VALIDATION))
    held_out = test if setting.split == "test" else validation
    views, members = _tasks(setting.bed, images, labels, generator("tasks"))
    drawn: dict[str, list[np.ndarray]] = {
        name: [] for name in ("images", "labels", "fisher", "test_images", "test_labels")
    }
    drawn["weights"] = _first_weights(generator("weights"))
    memory: list[np.ndarray] = []
    for t, (view, of_task) in enumerate(zip(views, members, strict=True)):
        rows = train[of_task[train]]
        old = REPLAYED if t and setting.remembered else 0
        # Steps, memory and task have draws of their own, so no setting depends on another.
        rng = generator("batches", setting.steps, setting.remembered, t)
        new = _passes(rng, rows, setting.steps * (BATCH - old)).reshape(setting.steps, -1)
        pixels, answers = view[new], labels[new]
        if old:
            which = rng.integers(t, size=(setting.steps, old))
            items = (
                rng.integers(setting.remembered, size=(setting.steps, old))
                % np.array([len(rows) for rows in memory])[which]
            )
            kept = np.array([[memory[k][i] for k, i in zip(*pair, strict=True)]
                             for pair in zip(which, items, strict=True)])  # fmt: skip
            seen = np.stack(views[:t])[which, kept]
            pixels, answers = np.concatenate([pixels, seen], 1), np.hstack([answers, labels[kept]])
        drawn["images"].append(pixels)
        drawn["labels"].append(answers)
        keep = generator("memory", t).permutation(rows)[: setting.remembered]
        memory.append(keep)
        drawn["fisher"].append(view[_passes(generator("fisher", t), rows, 300)])
        asked = held_out[of_task[held_out]]
        drawn["test_images"].append(view[asked])
        drawn["test_labels"].append(labels[asked])
    return drawn


def _tasks(
    bed: str, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of every task: all images as it shows them, and which of them belong to it."""
    everything = np.ones(len(labels), dtype=bool)
    if bed == "classes":
        order = rng.permutation(CLASSES).reshape(TASKS, -1)
        return [images] * TASKS, [np.isin(labels, pair) for pair in order]
    if bed == "permuted":
        views = [images[:, rng.permutation(INPUTS)] for _ in range(TASKS)]
    else:
        views = [rotated(images, degrees) for degrees in rng.permutation(ANGLES)]
    return views, [everything] * TASKS


def _passes(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: one shuffled pass over all of them after another."""
    passes = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[:count]


def _first_weights(rng: np.random.Generator) -> np.ndarray:
    """One vector, drawn as `torch.nn.Linear` draws: uniform within ± 1/√inputs."""
    parts = []
    for outputs, inputs in ((HIDDEN, INPUTS), (CLASSES, HIDDEN)):
        reach = inputs**-0.5
        parts += [rng.uniform(-reach, reach, outputs * inputs), rng.uniform(-reach, reach, outputs)]
    return np.concatenate(parts)


# -- the network, with its gradients by hand ------------------------------------------------------


def unpack(flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of [seeds, PARAMETERS] as weights and biases, in the order of torch.nn.Linear."""
    first, bias, second, last = flat.split([HIDDEN * INPUTS, HIDDEN, CLASSES * HIDDEN, CLASSES], 1)
    return first.view(-1, HIDDEN, INPUTS), bias, second.view(-1, CLASSES, HIDDEN), last


def forward(flat: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden units and logits of [seeds, rows, INPUTS]."""
    first, bias, second, last = unpack(flat)
    hidden = torch.baddbmm(bias[:, None], images, first.mT).relu()
    return hidden, torch.baddbmm(last[:, None], hidden, second.mT)


class Pass:
    """One forward pass and the cross-entropy's derivative by each row's logits."""

    def __init__(self, flat: Tensor, images: Tensor, labels: Tensor) -> None:
        self._flat, self._images = flat, images
        self._hidden, logits = forward(flat, images)
        self._by_logits = logits.softmax(-1)
        self._by_logits.scatter_add_(
            2, labels[..., None], torch.full_like(logits[..., :1], -1.0)
        )  # fmt: skip

    def gradient(self, begin: int, end: int) -> Tensor:
        """Gradient [seeds, PARAMETERS] of the mean loss over rows begin … end − 1."""
        hidden, by_logits = (
            self._hidden[:, begin:end],
            self._by_logits[:, begin:end] / (end - begin),
        )
        by_hidden = (by_logits @ unpack(self._flat)[2]) * (hidden > 0)
        return _summed(self._images[:, begin:end], by_hidden, hidden, by_logits)


def _summed(images: Tensor, by_hidden: Tensor, hidden: Tensor, by_logits: Tensor) -> Tensor:
    """What rows add up to by the weights, from what enters a layer and the derivative behind it."""
    parts = (by_hidden.mT @ images, by_hidden.sum(1), by_logits.mT @ hidden, by_logits.sum(1))
    return torch.cat([part.flatten(1) for part in parts], 1)


def exact_fisher(flat: Tensor, images: Tensor) -> Tensor:
    """Diagonal of the Fisher matrix: the mean over rows, the expectation over all labels."""
    hidden, logits = forward(flat, images)
    share = logits.softmax(-1)
    second, total = unpack(flat)[2], torch.zeros_like(flat)
    for label in range(CLASSES):
        by_logits = share.clone()
        by_logits[..., label] -= 1
        by_hidden = (by_logits @ second) * (hidden > 0)
        # The gradient of one row by a matrix is an outer product, and so is its square.
        weight = share[..., label : label + 1] / images.shape[1]
        a, b = weight * by_hidden.square(), weight * by_logits.square()
        total += _summed(images.square(), a, hidden.square(), b)
    return total


def accuracies(flat: Tensor, stream: Stream) -> Tensor:
    """Accuracy in % on every task: [tasks, seeds]."""
    found = []
    for images, labels in zip(stream.test_images, stream.test_labels, strict=True):
        right = forward(flat, images)[1].argmax(-1) == labels
        found.append(100 * right.sum(-1) / (labels >= 0).sum(-1))
    return torch.stack(found)
