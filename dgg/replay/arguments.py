# SPDX-License-Identifier: BSD-3-Clause
"""Seeds, tasks, ratios and data sets as users pass them: checked, and in their plain form."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dgg._numbers import as_float, as_int, plain, shown
from dgg.replay.copies import is_array


def as_natural(name: str, value: Any) -> int:
    """An integer from 0 on."""
    number = as_int(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {shown(number)}")
    return number


def as_capacity(per_task: Any) -> int:
    """The number of examples kept for each task."""
    count = as_int("per_task", per_task)
    if count <= 0:
        raise ValueError(
            f"per_task must be positive, got {count}: it is how many examples of each task are "
            "kept; to replay nothing make no buffer"
        )
    return count


def as_seed(name: str, value: Any) -> int:
    """A seed of any sign. Its size is limited, because Python prints no int beyond some size."""
    seed = as_int(name, value)
    if seed.bit_length() > 1024:
        raise ValueError(f"{name} must have 1024 bits at most, got {seed.bit_length()}")
    return seed


def as_task(task: Hashable) -> Hashable:
    """A task as it is stored: hashable, and with plain numbers in place of numpy's."""
    if isinstance(task, tuple):
        task = tuple(as_task(part) for part in task) if type(task) is tuple else task
    elif hasattr(task, "dtype"):
        # A tensor is hashable, but by identity: an equal one would not find its task.
        task = plain("a task", task)
    try:
        hash(task)
    except TypeError:
        raise TypeError(f"a task must be hashable, got {shown(task)}") from None
    return task


def as_ratio(ratio: Any) -> Fraction:
    """The ratio as an exact fraction: the shortest decimal that its own type rounds to it."""
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


def is_columns(data: Any) -> bool:
    """Whether this is `(X, Y)`: a tuple of tensors or arrays with the same number of rows."""
    if not isinstance(data, tuple) or len(data) < 2:
        return False
    if not all(
        (isinstance(part, torch.Tensor) or is_array(part)) and len(part.shape) for part in data
    ):
        return False
    rows = {part.shape[0] for part in data}
    return len(rows) == 1 and rows.pop() > 1


def is_indexed(dataset: Any) -> bool:
    """Whether a data set has a length and indices; otherwise it is a stream of examples."""
    name = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise TypeError(f"a {name} has batches, not examples: pass its data set, loader.dataset")
    if is_columns(dataset):
        raise TypeError(
            f"a tuple of {len(dataset)} tensors with {dataset[0].shape[0]} rows each is not a "
            "sequence of examples: pass TensorDataset(X, Y) or list(zip(X, Y)), or a list of them "
            "if every tensor is an example"
        )
    # torch's Dataset has a __getitem__ that only raises.
    stub = getattr(type(dataset), "__getitem__", None) is Dataset.__getitem__
    indices = hasattr(dataset, "__getitem__") and not stub
    if isinstance(dataset, Mapping) or not (indices or hasattr(dataset, "__iter__")):
        raise TypeError(
            f"a data set is a sequence or an iterable of examples, not {name}; of a dict of splits "
            'pass one, such as dataset["train"]'
        )
    if isinstance(dataset, IterableDataset):
        return False
    # The streams of Hugging Face can be indexed, too, but by the names of columns.
    hf = sys.modules.get("datasets")
    if hf is not None and isinstance(dataset, getattr(hf, "IterableDataset", ())):
        return False
    return indices and hasattr(dataset, "__len__")


def check_batches(
    dataset: Any, batch_size: Any, ratio: Any, steps: Any
) -> tuple[int, Fraction, int | None]:
    """Checks what `ReplayBuffer.batches()` is called with; returns size, ratio and steps."""
    batch_size = as_int("batch_size", batch_size)
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    exact = as_ratio(ratio)
    if steps is not None:
        steps = as_natural("steps", steps)
    if not is_indexed(dataset):
        raise TypeError(
            f"batches() shuffles: it needs a data set with len() and indices, and "
            f"{type(dataset).__name__} has none; of a stream use mix()"
        )
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    if exact == 1 and steps is None:
        raise ValueError("ratio=1 never gets through the data set: say how many steps")
    return batch_size, exact, steps
