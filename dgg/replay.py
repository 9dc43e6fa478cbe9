# SPDX-License-Identifier: BSD-3-Clause
"""A replay buffer: a fixed number of examples of every old task, mixed into new batches exactly.

The paper trains on T_t ∪ M, the new task together with a small memory M of old examples. This is M.

    buffer = ReplayBuffer(per_task=500, seed=0)
    for name, dataset in tasks:
        for batch in loader:
            batch = buffer.mix(batch, ratio=0.25)  # a quarter of what is seen is old, exactly
            ...
        buffer.add_task(dataset, name)

Examples can be anything; the buffer hands back copies of what it was given. It uses a generator of
its own and touches no global one. `state_dict()` holds plain containers (and the examples), so that
`torch.save` and `torch.load(weights_only=True)` carry it as long as the examples allow that.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections import UserDict, UserList, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dgg._numbers import as_float, as_int, plain, shown

__all__ = ["ReplayBuffer"]

_FORMAT = "dgg.ReplayBuffer"

# What nobody can change in place, or what a copy would not be the same thing as.
_ATOMIC = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, type, torch.dtype, torch.device}
)


@dataclasses.dataclass
class _Pass:
    """Where `batches()` is in a data set."""

    length: int
    steps: int | None
    made: int = 0  # batches
    passes: int = 0  # begun
    order: list[int] = dataclasses.field(default_factory=list)
    left: int = 0  # the first so many of `order` are still to come, the last of them next
    loaded: bool = False  # from a state, and not continued yet

    def over(self) -> bool:
        """Whether there is no further batch."""
        if self.steps is None:
            return self.passes > 0 and not self.left
        return self.made >= self.steps


class ReplayBuffer:
    """Keeps up to `per_task` examples of each task, chosen uniformly, and samples them evenly.

    Two ways in, both giving every example of a task the same chance to be kept:

    * `add_task(dataset, task)` draws `per_task` examples of a data set without replacement;
    * `add(example, task)` is reservoir sampling, for streams whose length is not known.

    Sampling deals from a shuffled deck: no example comes up a second time before every other one
    has come up once. The deck is shuffled anew when it runs out and when the buffer changes.

    **Copies.** Examples are copied on their way in and on every way out, so that what a collator
    does to a batch (pops a key, pads a list, masks labels in place) does not reach the memory:

    * dicts, lists, tuples, sets, deques, named tuples, dataclasses, their subclasses and the like
      (`UserDict`, `BatchEncoding`) are new, nested as they may be, and so is all that is in them;
    * tensors are detached copies of their own size, arrays of numpy and other mappings copies;
    * of any other object there is a shallow copy (`copy.copy`: an image with its pixels, a plain
      object with its attributes assigned, not copied), and where that fails, or the class has a
      `__del__`, the object itself.

    New examples pass through `mix()` and `batches()` as they come.

    Eight images of 3 x 336 x 336 floats take 0.4 ms to copy (7 ms where their memory comes fresh
    from the system), eight examples of 2,048 token ids and labels 0.03 ms as tensors and 0.4 ms as
    lists. `copy_tensors=False` copies containers and dataclasses only, and hands out tensors,
    arrays and objects of the memory itself, for whoever never changes one in place.

    **Workers.** Each worker of a `DataLoader` has a copy of the buffer, and a generator of its own,
    seeded by `seed`, the worker's number and the worker's seed, which the loader draws anew for
    every iterator: workers differ from each other and from epoch to epoch (persistent ones go on),
    and all of it repeats under the same `torch.manual_seed`. Each deals from a deck of its own and
    makes passes of its own; nothing comes back to the main process. The ranks of a distributed run
    draw the same from the same buffer: give each rank a `seed` of its own.

    Args:
        per_task: the number of examples kept for each task.
        seed: seeds the buffer's own generator.
        copy_tensors: whether what is in the containers is copied on the way out, too.

    Raises:
        TypeError: if `per_task` or `seed` is not an integer, or `copy_tensors` not a bool.
        ValueError: if `per_task` is not positive.
    """

    def __init__(self, per_task: int, *, seed: int = 0, copy_tensors: bool = True) -> None:
        """See the class."""
        self.per_task = as_int("per_task", per_task)
        self.seed = _seed("seed", seed)
        if self.per_task <= 0:
            raise ValueError(f"per_task must be positive, got {self.per_task}")
        if not isinstance(copy_tensors, bool):
            raise TypeError(f"copy_tensors must be a bool, got {shown(copy_tensors)}")
        self.copy_tensors = copy_tensors
        self._rng = random.Random(self.seed)
        self._kept: dict[Hashable, list[Any]] = {}
        self._seen: dict[Hashable, int] = {}
        self._deck: list[tuple[Hashable, int]] = []
        # Slots owed to replay but not yet dealt, an exact fraction: a ratio of 0.1 with batches
        # of 16 owes 1.6 a batch, and floats would drift.
        self._owed = Fraction(0)
        self._pass: _Pass | None = None
        # Number and seed of the DataLoader worker that the generator is of.
        self._worker: tuple[int, int] | None = None

    # ------------------------------------------------------------------------------ contents

    def __len__(self) -> int:
        """The number of examples kept, over all tasks."""
        return sum(len(kept) for kept in self._kept.values())

    def __iter__(self) -> Iterator[Any]:
        """Copies of all examples, task by task in the order in which tasks were added."""
        for kept in self._kept.values():
            for example in kept:
                yield self._out(example)

    def __contains__(self, task: Hashable) -> bool:
        """Whether the task has been added."""
        return _task(task) in self._kept

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
        task = _task(task)
        if task not in self._kept:
            raise KeyError(f"no task {shown(task)} in the buffer; it has {shown(self.tasks)}")
        return [self._out(example) for example in self._kept[task]]

    def _out(self, example: Any) -> Any:
        """An example for the user."""
        return _copied(example, self.copy_tensors)

    # ------------------------------------------------------------------------------- filling

    def add(self, example: Any, task: Hashable = 0) -> bool:
        """Offer an example of a stream (reservoir sampling); returns whether a copy was kept.

        Nothing has changed if this raises.
        """
        task = _task(task)
        self._settle()
        kept = self._kept.get(task, [])
        before = self._rng.getstate() if len(kept) >= self.per_task else None
        try:
            stays = self._offer(kept, self._seen.get(task, 0), example)
        except BaseException:
            if before:
                self._rng.setstate(before)
            raise
        self._kept[task] = kept
        self._seen[task] = self._seen.get(task, 0) + 1
        if stays:
            self._deck = []
        return stays

    def _offer(self, kept: list[Any], seen: int, example: Any) -> bool:
        """Reservoir sampling into `kept`, after `seen` examples."""
        if len(kept) < self.per_task:
            kept.append(_copied(example))
            return True
        place = self._rng.randrange(seen + 1)
        if place < self.per_task:
            kept[place] = _copied(example)
        return place < self.per_task

    def add_task(self, dataset: Iterable[Any], task: Hashable | None = None) -> int:
        """Keep `per_task` examples of a finished task, or all of them if there are fewer.

        A data set with `len()` and indices is sampled without replacement, reading only what is
        kept; any other iterable, and every `IterableDataset`, goes through the reservoir. Nothing
        has changed if this raises. A pass of `batches()` that was left is not continued afterwards.

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
        indexed = _indexed(dataset)
        task = len(self._kept) if task is None else _task(task)
        if task in self._kept:
            raise ValueError(f"task {shown(task)} is in the buffer already; use add() to extend it")
        self._settle()
        kept: list[Any] = []
        before = self._rng.getstate()
        try:
            if indexed:
                seen = len(dataset)
                chosen = self._rng.sample(range(seen), min(self.per_task, seen))
                kept = [_copied(dataset[k]) for k in chosen]
            else:
                seen = 0
                for example in dataset:
                    self._offer(kept, seen, example)
                    seen += 1
            if not kept:
                raise ValueError(f"the data set of task {shown(task)} is empty")
        except BaseException:
            self._rng.setstate(before)
            raise
        self._kept[task], self._seen[task] = kept, seen
        self._deck = []
        self._pass = None
        return len(kept)

    # ------------------------------------------------------------------------------ sampling

    def sample(self, count: int) -> list[Any]:
        """Copies of the next `count` examples of the deck, which is dealt anew as often as needed.

        Nothing has changed if this raises.

        Raises:
            TypeError: if `count` is not an integer.
            ValueError: if `count` is negative, or the buffer is empty and `count` is not 0.
        """
        count = as_int("count", count)
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count and not len(self):
            raise ValueError("the replay buffer is empty: add a finished task first")
        self._settle()
        deck, before = self._deck, None
        left = len(deck)
        dealt = []
        try:
            for _ in range(count):
                if not left:
                    before = before or self._rng.getstate()
                    deck = [
                        (task, k) for task, kept in self._kept.items() for k in range(len(kept))
                    ]
                    self._rng.shuffle(deck)
                    left = len(deck)
                left -= 1
                task, k = deck[left]
                dealt.append(self._out(self._kept[task][k]))
        except BaseException:
            if before:
                self._rng.setstate(before)
            raise
        del deck[left:]
        self._deck = deck
        return dealt

    def share(self, batch_size: int, ratio: float) -> int:
        """How many slots of the next batch belong to replay, so that the ratio is met exactly.

        What rounding leaves over is carried to the next batch: after any number of batches the
        replayed total is within one example of `ratio` times everything. Zero (and nothing owed)
        while the buffer is empty. The ratio is taken as it is written, also in fewer bits than a
        float has: 0.1 is one tenth.

        Raises:
            TypeError: if `ratio` is not a number or `batch_size` not an integer.
            ValueError: if `ratio` is not in [0, 1] or `batch_size` is negative.
        """
        exact = _as_written(ratio)
        batch_size = as_int("batch_size", batch_size)
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        return self._share(batch_size, exact)

    def _share(self, batch_size: int, ratio: Fraction) -> int:
        if not len(self):
            return 0
        owed = self._owed + ratio * batch_size
        count = min(int(owed), batch_size)
        self._owed = owed - count
        return count

    def mix(self, examples: Sequence[Any], ratio: float) -> list[Any]:
        """A batch of the same size in which replayed examples take the place of the last ones.

        Replayed examples stand at the end. The new examples they displace are dropped: to lose none
        of them, ask `share()` first, fetch that many fewer, and append `sample()`.

        Args:
            examples: a batch of the new task, before it is collated.
            ratio: the share of the batch that is old, e.g. 0.25; met exactly over batches.
        """
        if isinstance(examples, Mapping) or _columns(examples):
            raise TypeError(
                "a batch is a sequence of examples, not what a collator made of one "
                f"({type(examples).__name__}): mix first, then collate"
            )
        before = self._owed
        count = self.share(len(examples), ratio)
        try:
            return [*examples[: len(examples) - count], *self.sample(count)]
        except BaseException:
            self._owed = before
            raise

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

        Without `steps` it is one pass over the data set (the last batch may be smaller); with it,
        as many batches, going over the data set as often as needed.

        A state taken between two batches remembers how far they are. The first call after
        `load_state_dict()` makes the batches that were left, as if nothing had happened; `steps`
        is then the same number as before, and the data set has the same length and order. Without a
        load, and once the loop is through, a call begins a pass of its own, and `add_task()` ends
        a pass that was left. Of several iterators at once, the state has the one that made the
        last batch.

        Args:
            dataset: the new task; it needs `len()` and indices.
            batch_size: the size of the batches, old and new examples together.
            ratio: the share of the batch that is old, as for `share()`.
            steps: the number of batches, those before an interruption included.
            resume: False begins anew although the state that was loaded is one of an unfinished
                pass.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if an argument is out of range, or an unfinished pass is to be continued
                with other `steps` or over a data set of another length (at the first batch).
        """
        batch_size = as_int("batch_size", batch_size)
        if batch_size <= 0:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        exact = _as_written(ratio)
        if steps is not None:
            steps = as_int("steps", steps)
            if steps < 0:
                raise ValueError(f"steps must not be negative, got {steps}")
        if not _indexed(dataset):
            raise TypeError(
                f"batches() shuffles: it needs a data set with len() and indices, and "
                f"{type(dataset).__name__} has none; of a stream use mix()"
            )
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        if exact == 1 and steps is None:
            raise ValueError("ratio=1 never gets through the data set: say how many steps")
        return self._batches(dataset, batch_size, exact, steps, resume)

    def _batches(
        self,
        dataset: Sequence[Any],
        batch_size: int,
        ratio: Fraction,
        steps: int | None,
        resume: bool,
    ) -> Iterator[list[Any]]:
        self._settle()
        current = self._pass
        if resume and current is not None and current.loaded:
            now = {"len(dataset)": len(dataset), "steps": steps}
            for (name, value), then in zip(
                now.items(), (current.length, current.steps), strict=True
            ):
                if value != then:
                    raise ValueError(
                        f"the state loaded is of a pass with {name} = {then}, after {current.made} "
                        f"batches, and this call has {value}: continue with the same (steps counts "
                        "all batches, those made before included), or begin anew with resume=False"
                    )
        else:
            self._pass = None  # left by an earlier call
            current = _Pass(len(dataset), steps)
        while not current.over():
            batch = self._batch(dataset, batch_size, ratio, current)
            current.loaded = False
            self._pass = current
            yield batch
        if self._pass is current:
            self._pass = None

    def _batch(
        self, dataset: Sequence[Any], batch_size: int, ratio: Fraction, current: _Pass
    ) -> list[Any]:
        """The next batch of a pass; if anything fails, a state is still that of the last one."""
        owed, before = self._owed, None
        order, left, passes = current.order, current.left, current.passes
        try:
            old = self._share(batch_size, ratio)
            chosen: list[int] = []
            while len(chosen) < batch_size - old:
                if not left:
                    if current.steps is None and passes:
                        break
                    before = before or self._rng.getstate()
                    if not len(dataset):
                        raise ValueError("the data set has become empty")
                    order = list(range(len(dataset)))
                    self._rng.shuffle(order)
                    left, passes = len(order), passes + 1
                taken = min(left, batch_size - old - len(chosen))
                chosen += reversed(order[left - taken : left])
                left -= taken
            batch = [dataset[k] for k in chosen] + self.sample(old)
        except BaseException:
            self._owed = owed
            if before:
                self._rng.setstate(before)
            raise
        current.order, current.left, current.passes = order, left, passes
        current.made += 1
        return batch

    # ------------------------------------------------------------------------------- workers

    def _settle(self) -> None:
        """In a DataLoader's worker, takes the worker's own generator; see the class.

        Every worker gets the buffer with the generator of the main process: without this all of
        them would deal the same.
        """
        worker = _worker()
        if worker == self._worker:
            return
        self._worker = worker
        if worker is not None:
            number, seed = worker
            self._rng = random.Random(f"{_FORMAT} {self.seed} {number} {seed}")
            self._deck = []
            self._pass = None

    # -------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: examples, counts, deck, generator and unfinished pass.

        Containers are new; tensors, arrays and objects are those of the memory, so that saving
        needs no room for a second set. Change none of them in place.
        """
        version, words, gauss = self._rng.getstate()
        current = self._pass
        return {
            "format": _FORMAT,
            "per_task": self.per_task,
            "seed": self.seed,
            "tasks": [
                {
                    "task": task,
                    "seen": self._seen[task],
                    "examples": [_copied(example, leaves=False) for example in kept],
                }
                for task, kept in self._kept.items()
            ],
            "deck": [[task, k] for task, k in self._deck],
            "owed": [self._owed.numerator, self._owed.denominator],
            "rng": [version, list(words), gauss],
            "pass": None
            if current is None
            else {
                "length": current.length,
                "steps": current.steps,
                "made": current.made,
                "passes": current.passes,
                "order": current.order[: current.left],
            },
            "worker": None if self._worker is None else self._worker[0],
        }

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
        form = state.get("format") if isinstance(state, dict) else None
        if not isinstance(form, str) or form != _FORMAT:
            raise ValueError("not the state of a dgg.ReplayBuffer")
        missing = {"per_task", "seed", "tasks", "deck", "owed", "rng"} - state.keys()
        if missing:
            raise ValueError(f"the state lacks {sorted(missing)}")
        per_task = as_int("per_task of the state", state["per_task"])
        if per_task != self.per_task:
            raise ValueError(
                f"the state keeps {shown(per_task)} examples a task, this buffer {self.per_task}"
            )
        seed = _seed("seed of the state", state["seed"])
        examples, seen = _tasks_of(state["tasks"], per_task)
        deck = _deck_of(state["deck"], examples)
        owed = _owed_of(state["owed"])
        rng = _rng_of(state["rng"])
        current = _pass_of(state.get("pass"))
        number = state.get("worker")
        if number is not None:
            number = _natural("worker", number)
        kept = {task: [_copied(each) for each in some] for task, some in examples.items()}
        here = _worker()
        self.seed, self._owed, self._pass = seed, owed, current
        self._rng, self._kept, self._seen, self._deck = rng, kept, seen, deck
        self._worker = here if here is not None and here[0] == number else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayBuffer:
        """An independent buffer with the same examples (copied) and the same future."""
        other = type(self)(self.per_task, seed=self.seed, copy_tensors=self.copy_tensors)
        memo[id(self)] = other
        other.load_state_dict(copy.deepcopy(self.state_dict(), memo))
        return other


# ------------------------------------------------------------------------------- what is given


def _seed(name: str, value: Any) -> int:
    """A seed of any sign; past some size Python does not write an int any more."""
    seed = as_int(name, value)
    if seed.bit_length() > 1024:
        raise ValueError(f"{name} must have 1024 bits at most, got {seed.bit_length()}")
    return seed


def _task(task: Hashable) -> Hashable:
    """A task as it is stored: hashable, and with plain numbers in place of numpy's.

    Raises:
        TypeError: if it is not hashable.
    """
    if isinstance(task, tuple):
        task = tuple(_task(part) for part in task) if type(task) is tuple else task
    elif hasattr(task, "dtype"):
        # A tensor is hashable, but by identity: it would never be found again.
        task = plain("a task", task)
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"a task must be hashable, got {shown(task)}") from None
    return task


def _as_written(ratio: Any) -> Fraction:
    """The ratio as an exact fraction: the shortest decimal that its own type rounds to it.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not in [0, 1].
    """
    number = as_float("ratio", ratio)
    if not 0 <= number <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {shown(ratio)}")
    if isinstance(ratio, Fraction):
        return ratio
    dtype = getattr(ratio, "dtype", None)
    if isinstance(dtype, torch.dtype) or getattr(dtype, "kind", None) == "f":
        for digits in range(1, 17):
            text = f"{number:.{digits}g}"
            if _rounded(float(text), dtype) == number:
                return Fraction(text)
    return Fraction(repr(number))


def _rounded(number: float, dtype: Any) -> float:
    """What a dtype of torch or numpy makes of a number."""
    if isinstance(dtype, torch.dtype):
        return torch.tensor(number, dtype=dtype, device="cpu").item()
    return dtype.type(number).item()


def _columns(data: Any) -> bool:
    """Whether this is `(X, Y)`: a tuple of tensors or arrays with the same number of rows."""
    if not isinstance(data, tuple) or len(data) < 2:
        return False
    if not all((_is_tensor(part) or _is_array(part)) and len(part.shape) for part in data):
        return False
    rows = {part.shape[0] for part in data}
    return len(rows) == 1 and rows.pop() > 1


def _indexed(dataset: Any) -> bool:
    """Whether a data set has a length and indices, or else is a stream of examples.

    Raises:
        TypeError: if it is neither.
    """
    name = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise TypeError(f"a {name} has batches, not examples: pass its data set, loader.dataset")
    if _columns(dataset):
        raise TypeError(
            f"a tuple of {len(dataset)} tensors with {dataset[0].shape[0]} rows each is not a "
            "sequence of examples: pass TensorDataset(X, Y) or list(zip(X, Y)), or a list of them "
            "if every tensor is an example"
        )
    # torch's Dataset has an __getitem__ that only raises.
    stub = getattr(type(dataset), "__getitem__", None) is Dataset.__getitem__
    indices = hasattr(dataset, "__getitem__") and not stub
    if isinstance(dataset, Mapping) or not (indices or hasattr(dataset, "__iter__")):
        raise TypeError(
            f"a data set is a sequence or an iterable of examples, not {name}; of a dict of splits "
            'pass one, such as dataset["train"]'
        )
    if isinstance(dataset, IterableDataset):
        return False
    # Those of Hugging Face have indices, too: the names of columns.
    hf = sys.modules.get("datasets")
    if hf is not None and isinstance(dataset, getattr(hf, "IterableDataset", ())):
        return False
    return indices and hasattr(dataset, "__len__")


def _worker() -> tuple[int, int] | None:
    """Number and seed of the DataLoader worker that this process is."""
    info = get_worker_info()
    # Threads share the buffer, and so never deal the same.
    if info is None or getattr(info, "worker_method", None) == "thread":
        return None
    return info.id, info.seed


# ----------------------------------------------------------------------------------- copying


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    return numpy is not None and isinstance(value, numpy.ndarray)


def _copied(example: Any, leaves: bool = True) -> Any:
    """A copy as the class describes it; without `leaves` only the containers are new."""
    try:
        return _walked(example, leaves)
    except RecursionError:
        # Something that contains itself (a node that knows its parent): slower, but it knows that.
        return copy.deepcopy(example)


def _walked(example: Any, leaves: bool) -> Any:
    kind = type(example)
    if kind in _ATOMIC:
        return example
    if _is_tensor(example):
        # Cloned, so that a view does not keep a whole batch alive.
        return example.detach().clone() if leaves else example
    if kind is dict:
        return {key: _walked(value, leaves) for key, value in example.items()}
    if kind in (list, tuple, set, frozenset):
        if _ATOMIC.issuperset(map(type, example)):  # as token ids are: seven times as fast
            return kind(example)
        return kind([_walked(value, leaves) for value in example])
    if isinstance(example, tuple):
        return _walked_tuple(example, leaves)
    if isinstance(example, (dict, UserDict)):
        return _refilled(example, list(example.items()), kind.__setitem__, leaves)
    if isinstance(example, (list, UserList, deque)):
        return _refilled(example, list(enumerate(example)), kind.__setitem__, leaves)
    if isinstance(example, Set):
        return _tried(copy.copy, example)
    if dataclasses.is_dataclass(example):
        names = [field.name for field in dataclasses.fields(example)]
        parts = [(name, getattr(example, name)) for name in names if hasattr(example, name)]
        return _refilled(example, parts, object.__setattr__, leaves)  # frozen ones, too
    if not leaves:
        return example
    if isinstance(example, Mapping) or (_is_array(example) and example.dtype.hasobject):
        return _tried(copy.deepcopy, example)  # a shallow copy may share what is inside
    return _tried(copy.copy, example)


def _walked_tuple(example: tuple[Any, ...], leaves: bool) -> tuple[Any, ...]:
    """A named tuple or another subclass of tuple."""
    values = [_walked(value, leaves) for value in example]
    if all(new is old for new, old in zip(values, example, strict=True)):
        return example
    try:
        result = tuple.__new__(type(example), values)  # past a __new__ that takes something else
    except TypeError:
        return type(example)(values)  # what torch.max returns, for one
    if hasattr(example, "__dict__"):
        result.__dict__.update(example.__dict__)
    return result


def _refilled(example: Any, parts: list[tuple[Any, Any]], put: Any, leaves: bool) -> Any:
    """A shallow copy, in which copies of the parts take their places."""
    copies = [(key, value, _walked(value, leaves)) for key, value in parts]

    def refill(example: Any) -> Any:
        result = copy.copy(example)
        for key, value, new in copies:
            if new is not value:
                put(result, key, new)
        return result

    return _tried(refill, example)


def _tried(way: Any, example: Any) -> Any:
    """A copy, or the object itself where there is none or where it would do harm."""
    if hasattr(type(example), "__del__"):
        return example  # the end of the copy would close what both have
    try:
        return way(example)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return example  # files, locks, generators, ...


# --------------------------------------------------------------------------------- saved states


def _natural(name: str, value: Any) -> int:
    number = as_int(f"{name} of the state", value)
    if number < 0:
        raise ValueError(f"{name} of the state must not be negative, got {shown(number)}")
    return number


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
    """JSON turns tuples into lists; a task was hashable when it went in."""

    def hashable(task: Any) -> Any:
        return tuple(hashable(part) for part in task) if isinstance(task, list) else task

    try:
        return _task(hashable(task))
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
        count = _natural(f"seen of task {shown(task)}", entry["seen"])
        if not len(some) <= min(per_task, count):
            raise ValueError(
                f"the state has {len(some)} examples of task {shown(task)}, of {shown(count)} seen "
                f"and {per_task} kept at most"
            )
        examples[task], seen[task] = some, count
    return examples, seen


def _deck_of(value: Any, kept: dict[Hashable, Any]) -> list[tuple[Hashable, int]]:
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
    """None if there was none, or the state is from before they were kept."""
    if value is None:
        return None
    _entries("pass", value, {"length", "steps", "made", "passes", "order"})
    length, made, passes = (
        _natural(f"{key} of the pass", value[key]) for key in ("length", "made", "passes")
    )
    steps = value["steps"]
    if steps is not None:
        steps = _natural("steps of the pass", steps)
    order = [as_int("order of the state", k) for k in _listed("order of the pass", value["order"])]
    if not all(0 <= k < length for k in order) or len(set(order)) != len(order):
        raise ValueError(f"order of the state is not one of {shown(length)} examples")
    if not length or (order and not passes) or (steps is not None and made > steps):
        raise ValueError("the pass of the state contradicts itself")
    return _Pass(length, steps, made, passes, order, len(order), loaded=True)
