# SPDX-License-Identifier: BSD-3-Clause
"""`ReplayBuffer`: fill it, sample it, mix it into batches, save and resume it."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from dgg._numbers import as_int, shown
from dgg._signatures import listed
from dgg.replay import saved_state
from dgg.replay.arguments import (
    as_capacity,
    as_natural,
    as_ratio,
    as_seed,
    as_task,
    check_batches,
    is_columns,
    is_indexed,
)
from dgg.replay.copies import copied
from dgg.replay.drawing import Card, Draws, choose, deal, offer, this_worker
from dgg.replay.passes import _Pass


@listed
class ReplayBuffer:
    """Keeps up to `per_task` examples of each task, chosen uniformly, and samples them evenly.

    There are two ways in. Both give every example of a task the same chance to be kept:

    * `add_task(dataset, task)` draws `per_task` examples of a data set without replacement;
    * `add(example, task)` is reservoir sampling, for streams whose length is not known.

    Sampling deals from a shuffled deck: no example comes up a second time before every other one
    has come up once. The deck is shuffled anew when it runs out and when the buffer changes.

    **Copies.** Examples are copied on their way in and on every way out. So what a collator does
    to a batch (pops a key, pads a list, masks labels in place) does not reach the memory:

    * dicts, lists, tuples, sets, deques, named tuples, dataclasses, their subclasses and the like
      (`UserDict`, `BatchEncoding`) are new, however deeply nested, and so is all that is in them;
    * tensors are detached copies of their own size, arrays of numpy and other mappings copies;
    * any other object is copied with `copy.copy` (an image with its pixels; of a plain object the
      attributes are assigned, not copied). Where that fails, or the class has a `__del__`, the
      object itself is kept and handed out.

    New examples pass through `mix()` and `batches()` as they are. `copy_tensors=False` hands out
    the tensors, arrays and objects of the memory itself, and copies only containers and
    dataclasses: for users who never change an example in place.

    **Workers.** Each worker of a `DataLoader` has a copy of the buffer with its own generator. It
    is seeded by `seed`, the worker's number and the worker's seed, which the loader draws anew for
    every iterator. So workers differ from each other and from epoch to epoch (persistent ones go
    on), and all of it repeats under the same `torch.manual_seed`. Each worker has its own deck and
    its own passes; nothing comes back to the main process. The ranks of a distributed run draw the
    same from the same buffer: give each rank another `seed`.

    Args:
        per_task: the number of examples kept for each task.
        seed: seeds the buffer's own generator.
        copy_tensors: whether what is in the containers is copied on the way out, too.

    Raises:
        TypeError: if `per_task` or `seed` is not an integer, or `copy_tensors` not a bool.
        ValueError: if `per_task` is not positive.
    """

    __module__ = "dgg.replay"  # as pickles name it

    def __init__(self, per_task: int, *, seed: int = 0, copy_tensors: bool = True) -> None:
        self.per_task = as_capacity(per_task)
        self.seed = as_seed("seed", seed)
        if not isinstance(copy_tensors, bool):
            raise TypeError(f"copy_tensors must be a bool, got {shown(copy_tensors)}")
        self.copy_tensors = copy_tensors
        self._rng = random.Random(self.seed)
        self._kept: dict[Hashable, list[Any]] = {}
        self._seen: dict[Hashable, int] = {}
        self._deck: list[Card] = []
        # Slots owed to replay but not yet dealt, an exact fraction: a ratio of 0.1 with batches
        # of 16 owes 1.6 a batch, and floats would drift.
        self._owed = Fraction(0)
        self._pass: _Pass | None = None
        # Number and seed of the DataLoader worker to which the generator belongs.
        self._worker: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------ contents

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(len(kept) for kept in self._kept.values())

    def __iter__(self) -> Iterator[Any]:
        """Copies of all examples, task by task in the order in which tasks were added."""
        for kept in self._kept.values():
            for example in kept:
                yield copied(example, self.copy_tensors)

    def __contains__(self, task: Hashable) -> bool:
        """Whether the task has been added."""
        return as_task(task) in self._kept

    def __repr__(self) -> str:
        """Size, seed and counts."""
        counts = ", ".join(f"{shown(task)}: {len(kept)}" for task, kept in self._kept.items())
        return f"{type(self).__name__}(per_task={self.per_task}, seed={self.seed}, {{{counts}}})"

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """The tasks, in the order in which they were added."""
        return tuple(self._kept)

    def examples(self, task: Hashable) -> list[Any]:
        """Copies of the examples kept of one task.

        Raises:
            KeyError: if there is no such task.
        """
        task = as_task(task)
        if task not in self._kept:
            raise KeyError(f"no task {shown(task)} in the buffer; it has {shown(self.tasks)}")
        return [copied(example, self.copy_tensors) for example in self._kept[task]]

    # ------------------------------------------------------------------------------- filling

    def add(self, example: Any, task: Hashable = 0) -> bool:
        """Offer an example of a stream (reservoir sampling); returns whether a copy was kept.

        Nothing has changed if this raises.
        """
        task = as_task(task)
        self._settle()
        kept, seen = self._kept.get(task, []), self._seen.get(task, 0)
        with Draws(self._rng) as draws:
            stays = offer(example, kept, seen, self.per_task, draws)
        self._kept[task], self._seen[task] = kept, seen + 1
        if stays:
            self._deck = []
        return stays

    def add_task(self, dataset: Iterable[Any], task: Hashable | None = None) -> int:
        """Keep `per_task` examples of a finished task, or all of them if there are fewer.

        A data set with `len()` and indices is sampled without replacement, and only the examples
        kept are read. Any other iterable, and every `IterableDataset`, goes through the reservoir.
        Nothing has changed if this raises. A pass of `batches()` that was left is not continued
        afterwards.

        Args:
            dataset: the examples of the task. A single tensor is a data set of its rows.
            task: its name; by default the number of tasks added so far.

        Returns:
            The number of examples kept.

        Raises:
            TypeError: if the data set is a mapping, a `DataLoader` (it has batches), a tuple of
                tensors such as `(X, Y)`, or nothing that has examples.
            ValueError: if the task is there already or the data set is empty.
        """
        indexed = is_indexed(dataset)
        task = len(self._kept) if task is None else as_task(task)
        if task in self._kept:
            raise ValueError(f"task {shown(task)} is in the buffer already; use add() to extend it")
        self._settle()
        with Draws(self._rng) as draws:
            kept, seen = choose(dataset, indexed, self.per_task, draws)
            if not kept:
                raise ValueError(f"the data set of task {shown(task)} is empty")
        self._kept[task], self._seen[task] = kept, seen
        self._deck = []
        self._pass = None
        return len(kept)

    # ------------------------------------------------------------------------------ sampling

    def sample(self, count: int, *, rank: int = 0, world_size: int = 1) -> list[Any]:
        """Copies of the next `count` examples of the deck, which is dealt anew as often as needed.

        Nothing has changed if this raises.

        Args:
            count: how many this rank receives.
            rank: which part of the cards that are dealt, from 0.
            world_size: into how many parts they go. Ranks whose buffers are the same deal the same
                `count * world_size` cards, and each takes other ones of them; so the buffers stay
                the same.

        Raises:
            TypeError: if an argument is not an integer.
            ValueError: if `count` is negative, there is no such rank, or the buffer is empty and
                `count` is not 0.
        """
        count = as_natural("count", count)
        rank, world_size = as_int("rank", rank), as_int("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if count and not len(self):
            raise ValueError("the replay buffer is empty: add a finished task first")
        self._settle()
        with Draws(self._rng) as draws:
            cards, deck, left = deal(count * world_size, self._deck, self._kept, draws)
            cards = cards[rank * count : (rank + 1) * count]
            examples = [copied(self._kept[task][k], self.copy_tensors) for task, k in cards]
        del deck[left:]
        self._deck = deck
        return examples

    def share(self, batch_size: int, ratio: float) -> int:
        """How many slots of the next batch belong to replay, so that the ratio is met exactly.

        What rounding leaves over is carried to the next batch: after any number of batches the
        replayed total is within one example of `ratio` times everything. While the buffer is empty
        the answer is 0, and nothing is owed for later. The ratio is taken as it is written, also
        in fewer bits than a float has: 0.1 is one tenth.

        Raises:
            TypeError: if `ratio` is not a number or `batch_size` not an integer.
            ValueError: if `ratio` is not in [0, 1] or `batch_size` is negative.
        """
        exact = as_ratio(ratio)
        count, self._owed = self._slots(as_natural("batch_size", batch_size), exact)
        return count

    def _slots(self, batch_size: int, ratio: Fraction) -> tuple[int, Fraction]:
        """How many slots of the next batch belong to replay, and what is owed after it."""
        if not len(self):
            return 0, self._owed
        owed = self._owed + ratio * batch_size
        count = min(int(owed), batch_size)
        return count, owed - count

    def mix(self, examples: Sequence[Any], ratio: float) -> list[Any]:
        """A batch of the same size in which replayed examples take the place of the last ones.

        Replayed examples stand at the end. The new examples they displace are dropped: to lose none
        of them, ask `share()` first, fetch that many fewer, and append `sample()`.

        Args:
            examples: a batch of the new task, before it is collated.
            ratio: the share of the batch that is old, e.g. 0.25; met exactly over batches.
        """
        if isinstance(examples, Mapping) or is_columns(examples):
            raise TypeError(
                "a batch is a sequence of examples, not what a collator made of one "
                f"({type(examples).__name__}): mix first, then collate"
            )
        count, owed = self._slots(len(examples), as_ratio(ratio))
        batch = [*examples[: len(examples) - count], *self.sample(count)]
        self._owed = owed
        return batch

    def batches(
        self,
        dataset: Sequence[Any],
        batch_size: int,
        ratio: float,
        steps: int | None = None,
        *,
        resume: bool = True,
    ) -> Iterator[list[Any]]:
        """Mixed batches of `batch_size`: the new task, shuffled, with its share of replay appended.

        Without `steps` it is one pass over the data set, and the last batch may be smaller. With
        it there are that many batches, and the data set is gone over as often as needed.

        A state taken between two batches remembers how far they are. The first call after
        `load_state_dict()` makes the batches that were left, as if nothing had happened; `steps`
        is then the same number as before, and the data set has the same length and order. Without a
        load, and once the loop is through, a call begins a new pass. `add_task()` ends a pass that
        was left. Of several iterators at once, the state has the one that made the last batch.

        Args:
            dataset: the new task; it needs `len()` and indices.
            batch_size: the size of the batches, old and new examples together.
            ratio: the share of the batch that is old, as for `share()`.
            steps: the number of batches, those before an interruption included.
            resume: False begins anew even if the state that was loaded has an unfinished pass.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if an argument is out of range, or an unfinished pass is to be continued
                with other `steps` or over a data set of another length (at the first batch).
        """
        batch_size, exact, steps = check_batches(dataset, batch_size, ratio, steps)

        def mixed() -> Iterator[list[Any]]:
            self._settle()
            current = self._pass
            if resume and current is not None and current.loaded:
                current.check_continued(len(dataset), steps)
            else:
                self._pass = None  # left by an earlier call
                current = _Pass(len(dataset), steps)
            while not current.over():
                # If anything fails in here, a state is still that of the batch before.
                with Draws(self._rng) as draws:
                    old, owed = self._slots(batch_size, exact)
                    indices, after = current.deal(batch_size - old, dataset, draws)
                    batch = [dataset[k] for k in indices] + self.sample(old)
                self._owed, self._pass, current = owed, after, after
                yield batch
            if self._pass is current:
                self._pass = None

        return mixed()

    def _settle(self) -> None:
        """In a DataLoader's worker, takes the worker's own generator; see the class.

        Every worker receives the buffer with the generator of the main process. Without this all
        workers would deal the same.
        """
        worker = this_worker()
        if worker == self._worker:
            return
        self._worker = worker
        if worker is not None:
            number, seed = worker
            self._rng = random.Random(f"dgg.ReplayBuffer {self.seed} {number} {seed}")
            self._deck = []
            self._pass = None

    # -------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: examples, counts, deck, generator and unfinished pass.

        Containers are new; tensors, arrays and objects are those of the memory, so that saving
        needs no room for a second set. Change none of them in place.
        """
        worker = None if self._worker is None else self._worker[0]
        contents = saved_state.Contents(
            self.seed, self._kept, self._seen, self._deck, self._owed, self._rng, self._pass, worker
        )
        return saved_state.write(contents, self.per_task)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; the buffer is unchanged if this raises.

        The examples are copied. States from before passes were part of them load, too. A
        DataLoader's worker continues the generator of a state that the same worker took, and
        draws from one of its own after any other.

        Raises:
            TypeError: if something in the state is of the wrong type.
            ValueError: if the state is not a replay buffer's, was made with another `per_task`, or
                contradicts itself.
        """
        saved = saved_state.read(state, self.per_task)
        worker = this_worker()
        self.seed, self._owed, self._pass = saved.seed, saved.owed, saved.current
        self._rng, self._kept, self._seen = saved.rng, saved.kept, saved.seen
        self._deck = saved.deck
        self._worker = worker if worker is not None and worker[0] == saved.worker else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayBuffer:
        """An independent buffer with the same examples (copied) and the same future."""
        # Without the constructor, whose arguments in a subclass may be others.
        memo[id(self)] = other = type(self).__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        if other._pass is not None:  # to be continued by batches() of the copy
            other._pass = dataclasses.replace(other._pass, loaded=True)
        return other


def course(buffer: ReplayBuffer) -> tuple[Any, ...]:
    """What decides all further draws: equal where buffers of the same data draw the same."""
    number = {task: place for place, task in enumerate(buffer._kept)}
    deck = [(number[task], k) for task, k in buffer._deck]
    sizes = [(len(kept), buffer._seen[task]) for task, kept in buffer._kept.items()]
    return sizes, deck, buffer._owed, buffer._rng.getstate()
