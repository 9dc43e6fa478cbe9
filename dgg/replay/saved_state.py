# SPDX-License-Identifier: BSD-3-Clause
"""The state dict of a replay buffer: every entry is checked before any is taken over."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from dgg._numbers import as_float, as_int, shown
from dgg.replay.arguments import as_natural, as_seed, as_task
from dgg.replay.copies import copied
from dgg.replay.drawing import Card
from dgg.replay.passes import _Pass

_FORMAT = "dgg.ReplayBuffer"


class Contents(NamedTuple):
    """What a state holds, in the form in which the buffer has it."""

    seed: int
    kept: dict[Hashable, list[Any]]
    seen: dict[Hashable, int]
    deck: list[Card]
    owed: Fraction
    rng: random.Random
    current: _Pass | None
    worker: int | None  # the number of the DataLoader worker that the generator belongs to


def write(contents: Contents, per_task: int) -> dict[str, Any]:
    """Returns the state: new containers of plain values, and the examples themselves."""
    version, words, gauss = contents.rng.getstate()
    return {
        "format": _FORMAT,
        "per_task": per_task,
        "seed": contents.seed,
        "tasks": [
            {
                "task": task,
                "seen": contents.seen[task],
                "examples": [copied(example, leaves=False) for example in kept],
            }
            for task, kept in contents.kept.items()
        ],
        "deck": [[task, k] for task, k in contents.deck],
        "owed": [contents.owed.numerator, contents.owed.denominator],
        "rng": [version, list(words), gauss],
        "pass": None if contents.current is None else contents.current.state(),
        "worker": contents.worker,
    }


def read(state: Any, per_task: int) -> Contents:
    """Reads a state for a buffer that keeps `per_task` examples a task; examples are copied."""
    form = state.get("format") if isinstance(state, dict) else None
    if not isinstance(form, str) or form != _FORMAT:
        raise ValueError("not the state of a dgg.ReplayBuffer")
    missing = {"per_task", "seed", "tasks", "deck", "owed", "rng"} - state.keys()
    if missing:
        raise ValueError(f"the state lacks {sorted(missing)}")
    saved_per_task = as_int("per_task of the state", state["per_task"])
    if saved_per_task != per_task:
        raise ValueError(
            f"the state keeps {shown(saved_per_task)} examples a task, this buffer {per_task}"
        )
    seed = as_seed("seed of the state", state["seed"])
    examples, seen = _tasks_of(state["tasks"], per_task)
    deck = _deck_of(state["deck"], examples)
    owed = _owed_of(state["owed"])
    rng = _rng_of(state["rng"])
    current = _pass_of(state.get("pass"))
    worker = state.get("worker")
    if worker is not None:
        worker = as_natural("worker of the state", worker)
    kept = {task: [copied(each) for each in some] for task, some in examples.items()}
    return Contents(seed, kept, seen, deck, owed, rng, current, worker)


def _listed(name: str, value: Any, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} of the state must be a list, got {shown(value)}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} of the state must have {length} entries, got {shown(value)}")
    return value


def _entries(name: str, value: Any, keys: set[str]) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{name} of the state must be a dict, got {shown(value)}")
    if missing := keys - value.keys():
        raise ValueError(f"{name} of the state lacks {sorted(missing)}")
    return value


def _stored_task(task: Any) -> Hashable:
    """A task as it was put in: JSON turns tuples, which are hashable, into lists."""

    def hashable(task: Any) -> Any:
        return tuple(hashable(part) for part in task) if isinstance(task, list) else task

    try:
        return as_task(hashable(task))
    except RecursionError:
        raise ValueError("a task of the state is nested too deeply") from None


def _tasks_of(value: Any, per_task: int) -> tuple[dict[Hashable, Any], dict[Hashable, int]]:
    """The examples, not yet copied, and how many were seen, by task."""
    examples: dict[Hashable, Any] = {}
    seen: dict[Hashable, int] = {}
    for entry in _listed("tasks", value):
        _entries("a task", entry, {"task", "seen", "examples"})
        task = _stored_task(entry["task"])
        if task in examples:
            raise ValueError(f"the state has task {shown(task)} twice")
        some = _listed(f"examples of task {shown(task)}", entry["examples"])
        count = as_natural(f"seen of task {shown(task)} of the state", entry["seen"])
        if not len(some) <= min(per_task, count):
            raise ValueError(
                f"the state has {len(some)} examples of task {shown(task)}, of {shown(count)} seen "
                f"and {per_task} kept at most"
            )
        examples[task], seen[task] = some, count
    return examples, seen


def _deck_of(value: Any, kept: dict[Hashable, Any]) -> list[Card]:
    deck = []
    for card in _listed("deck", value):
        task, k = _listed("a card of the deck", card, 2)
        task, k = _stored_task(task), as_int("a card of the deck", k)
        if task not in kept or not 0 <= k < len(kept[task]):
            raise ValueError(
                f"the deck names example {shown(k)} of task {shown(task)}, which is not there"
            )
        deck.append((task, k))
    if len(set(deck)) != len(deck):
        raise ValueError("the deck of the state names an example twice")
    return deck


def _owed_of(value: Any) -> Fraction:
    above, below = (as_int("owed of the state", part) for part in _listed("owed", value, 2))
    if not 0 <= above < below:  # what share() leaves is less than one example
        raise ValueError(f"owed of the state must be a fraction below 1, got {shown(value)}")
    return Fraction(above, below)


def _rng_of(value: Any) -> random.Random:
    version, words, gauss = _listed("rng", value, 3)
    words = tuple(as_int("rng of the state", word) for word in _listed("rng", words))
    # setstate() takes larger words modulo 2**32, and zeros, which make nothing but zeros.
    if not all(0 <= word < 2**32 for word in words) or not any(words[:-1]):
        raise ValueError("rng of the state is not one of random.Random")
    if gauss is not None:
        gauss = as_float("rng of the state", gauss)
    rng = random.Random()
    try:
        rng.setstate((as_int("rng of the state", version), words, gauss))
    except ValueError as error:
        raise ValueError(f"rng of the state is not one of random.Random: {error}") from None
    return rng


def _pass_of(value: Any) -> _Pass | None:
    """None if there was none, or if the state is older than passes in states."""
    if value is None:
        return None
    _entries("pass", value, {"length", "steps", "made", "passes", "order"})
    length, made, passes = (
        as_natural(f"{key} of the pass of the state", value[key])
        for key in ("length", "made", "passes")
    )
    steps = value["steps"]
    if steps is not None:
        steps = as_natural("steps of the pass of the state", steps)
    order = [as_int("order of the state", k) for k in _listed("order of the pass", value["order"])]
    if not all(0 <= k < length for k in order) or len(set(order)) != len(order):
        raise ValueError(f"order of the state is not one of {shown(length)} examples")
    if not length or (order and not passes) or (steps is not None and made > steps):
        raise ValueError("the pass of the state contradicts itself")
    return _Pass(length, steps, made, passes, order, len(order), loaded=True)
