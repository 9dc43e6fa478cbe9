# SPDX-License-Identifier: BSD-3-Clause
"""A replay buffer: a fixed number of examples of every old task, mixed into new batches exactly.

The paper trains on T_t ∪ M, the new task together with a small memory M of old examples. This is M.

    buffer = ReplayBuffer(per_task=500, seed=0)
    for name, dataset in tasks:
        for batch in loader:
            batch = buffer.mix(batch, ratio=0.25)  # a quarter of what is seen is old, exactly
            ...
        buffer.add_task(dataset, name)

Examples can be anything; the buffer hands back what it was given. It uses a generator of its own
and touches no global one. `state_dict()` holds plain containers (and the examples), so that
`torch.save` and `torch.load(weights_only=True)` carry it as long as the examples allow that.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

__all__ = ["ReplayBuffer"]

_FORMAT = "dgg.ReplayBuffer"


class ReplayBuffer:
    """Keeps up to `per_task` examples of each task, chosen uniformly, and samples them evenly.

    Two ways in, both giving every example of a task the same chance to be kept:

    * `add_task(dataset, task)` draws `per_task` examples of a data set without replacement;
    * `add(example, task)` is reservoir sampling, for streams whose length is not known.

    Sampling deals from a shuffled deck: no example comes up a second time before every other one
    has come up once. The deck is shuffled anew when it runs out and when the buffer changes.

    Args:
        per_task: the number of examples kept for each task.
        seed: seeds the buffer's own generator.

    Raises:
        TypeError: if `per_task` or `seed` is not an integer.
        ValueError: if `per_task` is not positive.
    """

    def __init__(self, per_task: int, *, seed: int = 0) -> None:
        """See the class."""
        for name, value in (("per_task", per_task), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if per_task <= 0:
            raise ValueError(f"per_task must be positive, got {per_task}")
        self.per_task = per_task
        self.seed = seed
        self._rng = random.Random(seed)
        self._kept: dict[Hashable, list[Any]] = {}
        self._seen: dict[Hashable, int] = {}
        self._deck: list[tuple[Hashable, int]] = []
        # Slots owed to replay but not yet dealt, an exact fraction: a ratio of 0.1 with batches
        # of 16 owes 1.6 a batch, and floats would drift.
        self._owed = Fraction(0)

    # ------------------------------------------------------------------------------ contents

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(len(kept) for kept in self._kept.values())

    def __iter__(self) -> Iterator[Any]:
        """All examples, task by task in the order in which tasks were added."""
        for kept in self._kept.values():
            yield from kept

    def __contains__(self, task: Hashable) -> bool:
        """Whether the task has been added."""
        return task in self._kept

    def __repr__(self) -> str:
        """Size, seed and counts."""
        counts = ", ".join(f"{task!r}: {len(kept)}" for task, kept in self._kept.items())
        return f"{type(self).__name__}(per_task={self.per_task}, seed={self.seed}, {{{counts}}})"

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """The tasks, in the order in which they were added."""
        return tuple(self._kept)

    def examples(self, task: Hashable) -> list[Any]:
        """The examples kept of one task (a new list).

        Raises:
            KeyError: if there is no such task.
        """
        if task not in self._kept:
            raise KeyError(f"no task {task!r} in the buffer; it has {list(self._kept)}")
        return list(self._kept[task])

    # ------------------------------------------------------------------------------- filling

    def add(self, example: Any, task: Hashable = 0) -> bool:
        """Offer one example of a stream (reservoir sampling); returns whether it was kept.

        A tensor is stored as a detached copy, so that a view does not keep a whole batch alive.
        Examples of other types are stored as they are.
        """
        _check_task(task)
        kept = self._kept.setdefault(task, [])
        seen = self._seen.get(task, 0)
        self._seen[task] = seen + 1
        if len(kept) < self.per_task:
            kept.append(_own(example))
        else:
            place = self._rng.randrange(seen + 1)
            if place >= self.per_task:
                return False
            kept[place] = _own(example)
        self._deck = []
        return True

    def add_task(self, dataset: Iterable[Any], task: Hashable | None = None) -> int:
        """Keep `per_task` examples of a finished task, or all of them if there are fewer.

        A data set with `len()` and indices is sampled without replacement, reading only what is
        kept; any other iterable goes through the reservoir.

        Args:
            dataset: the examples of the task.
            task: its name; by default the number of tasks added so far.

        Returns:
            The number of examples kept.

        Raises:
            TypeError: if the data set is a mapping, or nothing that has examples.
            ValueError: if the task is there already or the data set is empty.
        """
        if isinstance(dataset, Mapping) or not (
            hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"a data set is a sequence or an iterable of examples, not "
                f"{type(dataset).__name__}; of a dict of splits pass one, such as "
                'dataset["train"]'
            )
        if task is None:
            task = len(self._kept)
        _check_task(task)
        if task in self._kept:
            raise ValueError(f"task {task!r} is in the buffer already; use add() to extend it")
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            total = len(dataset)
            if total == 0:
                raise ValueError(f"the data set of task {task!r} is empty")
            chosen = self._rng.sample(range(total), min(self.per_task, total))
            # Read everything first: a data set that fails half way must not leave half a task.
            self._kept[task] = [_own(dataset[k]) for k in chosen]
            self._seen[task] = total
        else:
            deck, before = self._deck, self._rng.getstate()
            try:
                for example in dataset:
                    self.add(example, task)
            except BaseException:
                self._kept.pop(task, None)
                self._seen.pop(task, None)
                self._deck = deck
                self._rng.setstate(before)
                raise
            if task not in self._kept:
                raise ValueError(f"the data set of task {task!r} is empty")
        self._deck = []
        return len(self._kept[task])

    # ------------------------------------------------------------------------------ sampling

    def sample(self, count: int) -> list[Any]:
        """The next `count` examples of the deck; the deck is dealt anew as often as needed.

        Raises:
            ValueError: if `count` is negative, or the buffer is empty and `count` is not 0.
        """
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count must be an int, got {count!r}")
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count and not len(self):
            raise ValueError("the replay buffer is empty: add a finished task first")
        dealt = []
        for _ in range(count):
            if not self._deck:
                self._deck = [
                    (task, k) for task, kept in self._kept.items() for k in range(len(kept))
                ]
                self._rng.shuffle(self._deck)
            task, k = self._deck.pop()
            dealt.append(self._kept[task][k])
        return dealt

    def share(self, batch_size: int, ratio: float) -> int:
        """How many slots of the next batch belong to replay, so that the ratio is met exactly.

        What rounding leaves over is carried to the next batch: after any number of batches the
        replayed total is within one example of `ratio` times everything. Zero (and nothing owed)
        while the buffer is empty. The ratio is taken as it is written: 0.1 is one tenth.

        Raises:
            ValueError: if `ratio` is not in [0, 1] or `batch_size` is negative.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {ratio}")
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        if not len(self):
            return 0
        self._owed += Fraction(str(ratio)) * batch_size
        count = min(int(self._owed), batch_size)
        self._owed -= count
        return count

    def mix(self, examples: Sequence[Any], ratio: float) -> list[Any]:
        """A batch of the same size in which replayed examples take the place of the last ones.

        Replayed examples stand at the end. The new examples they displace are dropped: to lose none
        of them, ask `share()` first, fetch that many fewer, and append `sample()`.

        Args:
            examples: a batch of the new task.
            ratio: the share of the batch that is old, e.g. 0.25; met exactly over batches.
        """
        count = self.share(len(examples), ratio)
        return [*examples[: len(examples) - count], *self.sample(count)]

    def batches(
        self, dataset: Sequence[Any], batch_size: int, ratio: float, steps: int | None = None
    ) -> Iterator[list[Any]]:
        """Mixed batches of `batch_size`: the new task, shuffled, with its share of replay appended.

        Without `steps` it is one pass over the data set (the last batch may be smaller); with it,
        as many batches, going over the data set as often as needed.
        """
        if batch_size <= 0:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        if ratio == 1 and steps is None:
            raise ValueError("ratio=1 never gets through the data set: say how many steps")
        order: list[int] = []
        passes = made = 0
        while steps is None or made < steps:
            old = self.share(batch_size, ratio)
            chosen: list[int] = []
            while len(chosen) < batch_size - old:
                if not order:
                    if steps is None and passes:
                        break
                    order = list(range(len(dataset)))
                    self._rng.shuffle(order)
                    passes += 1
                chosen.append(order.pop())
            if not chosen and old < batch_size:
                return
            yield [dataset[k] for k in chosen] + self.sample(old)
            made += 1
            if steps is None and passes and not order:
                return

    # -------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: examples, counts, deck and generator."""
        version, words, gauss = self._rng.getstate()
        return {
            "format": _FORMAT,
            "per_task": self.per_task,
            "seed": self.seed,
            "tasks": [
                {"task": task, "seen": self._seen[task], "examples": list(kept)}
                for task, kept in self._kept.items()
            ],
            "deck": [[task, k] for task, k in self._deck],
            "owed": [self._owed.numerator, self._owed.denominator],
            "rng": [version, list(words), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; the buffer is unchanged if this raises.

        Raises:
            ValueError: if the state is not a replay buffer's or was made with another `per_task`.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError("not the state of a dgg.ReplayBuffer")
        missing = {"per_task", "seed", "tasks", "deck", "owed", "rng"} - state.keys()
        if missing:
            raise ValueError(f"the state lacks {sorted(missing)}")
        if state["per_task"] != self.per_task:
            raise ValueError(
                f"the state keeps {state['per_task']} examples a task, this buffer {self.per_task}"
            )
        rng = random.Random()
        version, words, gauss = state["rng"]
        rng.setstate((version, tuple(words), gauss))
        kept = {_hashable(entry["task"]): list(entry["examples"]) for entry in state["tasks"]}
        seen = {_hashable(entry["task"]): int(entry["seen"]) for entry in state["tasks"]}
        deck = [(_hashable(task), int(k)) for task, k in state["deck"]]
        for task, k in deck:
            if task not in kept or not 0 <= k < len(kept[task]):
                raise ValueError(f"the deck names example {k} of task {task!r}, which is not there")
        self.seed = state["seed"]
        self._rng, self._kept, self._seen, self._deck = rng, kept, seen, deck
        self._owed = Fraction(*state["owed"])

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayBuffer:
        """An independent buffer with the same examples (copied) and the same future."""
        other = type(self)(self.per_task, seed=self.seed)
        memo[id(self)] = other
        other.load_state_dict(copy.deepcopy(self.state_dict(), memo))
        return other


def _check_task(task: Hashable) -> None:
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"a task must be hashable, got {task!r}") from None


def _hashable(task: Any) -> Hashable:
    """JSON turns tuples into lists; a task was hashable when it went in."""
    return tuple(_hashable(part) for part in task) if isinstance(task, list) else task


def _own(example: Any) -> Any:
    """Tensors are detached and copied; containers of tensors are walked, everything else kept."""
    if isinstance(example, torch.Tensor):
        return example.detach().clone()
    if type(example) is dict:
        return {key: _own(value) for key, value in example.items()}
    if type(example) in (list, tuple):
        return type(example)(_own(value) for value in example)
    return example
