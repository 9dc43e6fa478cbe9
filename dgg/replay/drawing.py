# SPDX-License-Identifier: BSD-3-Clause
"""What is drawn at random: which examples are kept, and in which order they are dealt."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable
from typing import Any

from torch.utils.data import get_worker_info

from dgg.replay.copies import copied

# An example of the memory: its task, and its place among the examples of this task.
Card = tuple[Hashable, int]


class Draws:
    """The draws of a block of code, which are taken back if the block raises.

    The state of the generator, 625 numbers, is copied when `rng` is first asked for: a block that
    draws nothing does not pay for it.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._before: Any = None

    @property
    def rng(self) -> random.Random:
        """The generator, to be drawn from at once."""
        if self._before is None:
            self._before = self._rng.getstate()
        return self._rng

    def __enter__(self) -> Draws:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and self._before is not None:
            self._rng.setstate(self._before)


def offer(example: Any, kept: list[Any], seen: int, per_task: int, draws: Draws) -> bool:
    """Reservoir sampling into `kept`, after `seen` examples; returns whether a copy was kept."""
    if len(kept) < per_task:
        kept.append(copied(example))
        return True
    place = draws.rng.randrange(seen + 1)
    if place < per_task:
        kept[place] = copied(example)
    return place < per_task


def choose(
    dataset: Iterable[Any], indexed: bool, per_task: int, draws: Draws
) -> tuple[list[Any], int]:
    """Copies of `per_task` examples of a data set, or of all, and how many examples it has."""
    if indexed:
        rows: Any = dataset  # with a length and indices
        seen = len(rows)
        places = draws.rng.sample(range(seen), min(per_task, seen))
        return [copied(rows[k]) for k in places], seen
    kept: list[Any] = []
    seen = 0
    for example in dataset:
        offer(example, kept, seen, per_task, draws)
        seen += 1
    return kept, seen


def deal(
    count: int, deck: list[Card], kept: dict[Hashable, list[Any]], draws: Draws
) -> tuple[list[Card], list[Card], int]:
    """Deals cards from the end of a deck; an empty one is replaced by all cards, shuffled.

    Returns:
        The cards; the deck they were last dealt from, as it was before; and how many of its cards
        are left, the first ones.
    """
    cards: list[Card] = []
    left = len(deck)
    while len(cards) < count:
        if not left:
            deck = [(task, k) for task, examples in kept.items() for k in range(len(examples))]
            draws.rng.shuffle(deck)
            left = len(deck)
        taken = min(left, count - len(cards))
        cards += reversed(deck[left - taken : left])
        left -= taken
    return cards, deck, left


def this_worker() -> tuple[int, int] | None:
    """Number and seed of the DataLoader worker that this process is; None in any other process."""
    info = get_worker_info()
    # Threads share the buffer and its generator, so they do not deal the same anyway.
    if info is None or getattr(info, "worker_method", None) == "thread":
        return None
    return info.id, info.seed
