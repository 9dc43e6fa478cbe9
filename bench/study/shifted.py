# SPDX-License-Identifier: BSD-3-Clause
"""The shifted bed: six unlike sub-tasks (`shifted_tasks.py`) for the small LLaVA.

The committed base does not know all the words. It is left as it is; here its vocabulary is
lengthened by `NEW_WORDS`, each with a row of the embedding and of the head that is drawn with the
spread of the rows there are, from one fixed seed, and stays frozen like all of the base. So a new
answer is a direction that the adapter has to learn to point in.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from minivqa import model as vqa
from minivqa import scenes
from study import digits, shifted_tasks
from study.training import Bed, Data, Questions, Sizes, drawn

_SPOKEN = (
    "which digit this written picture kind high bar height sum are together describe"
).split()
NEW_WORDS = tuple(
    word
    for word in dict.fromkeys(
        [*_SPOKEN, *shifted_tasks.DIGIT_WORDS, *shifted_tasks.CATEGORY_WORDS,
         *(word for word, _, _ in shifted_tasks.names())]
    )
    if word not in scenes.WORD_ID
)  # fmt: skip
WORD_ID = {word: k for k, word in enumerate((*scenes.VOCABULARY, *NEW_WORDS))}


def base():
    """The shipped base with rows for the new words, frozen."""
    model = vqa.load_base()
    generator = torch.Generator().manual_seed(0)

    def lengthened(rows: torch.Tensor) -> torch.Tensor:
        new = torch.randn(len(NEW_WORDS), rows.shape[1], generator=generator) * rows.std()
        return torch.cat([rows, new])

    old = model.get_input_embeddings()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(lengthened(old.weight)))
    head = torch.nn.Linear(model.lm_head.in_features, len(WORD_ID), bias=False)
    head.weight.data = lengthened(model.lm_head.weight)
    model.lm_head = head
    return model.eval().requires_grad_(False)


def encode(pictures: shifted_tasks.Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and answers as token ids."""
    return scenes.encode_words(pictures.questions, pictures.answers, WORD_ID)


def draw(model, name: str, count: int, seed: int, split: str) -> Questions:
    """The rows of one split, seeded by its name."""
    rng = random.Random(f"shifted/{seed}/{name}/{split}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    pictures = shifted_tasks.TASKS[name](count, rng, generator, split != "train")
    prompts, answers = encode(pictures)
    features = vqa.image_features(model, pictures.pixels)
    return Questions((prompts, features, answers), pictures.together)


@lru_cache(maxsize=1)
def load(sizes: Sizes, seed: int) -> Data:
    """Draw the pictures of a seed and pass them through the frozen vision tower once."""
    model = base()
    order = list(shifted_tasks.TASKS)
    random.Random(f"shifted/{seed}/order").shuffle(order)
    return drawn(order, sizes, lambda name, count, split: draw(model, name, count, seed, split))


FILES = (vqa.BASE_PATH, digits.DATA_PATH, shifted_tasks.LISTING, *shifted_tasks.ATLASES.values())
BED = Bed("shifted", load, base, FILES)
