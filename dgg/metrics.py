# SPDX-License-Identifier: BSD-3-Clause
r"""Metrics of continual learning, all computed from one matrix.

`R[i][j]` is the accuracy on task j after training on task i (both counted from 0, T tasks). A run
fills the lower triangle and the diagonal; entries above the diagonal (tasks not yet trained) are
zero-shot results and may be missing (None). No entry above the diagonal enters any of these:

    final average accuracy      FAA  = 1/T · Σ_j R[T-1][j]
    the same, weighted          FAAw = Σ_j n_j · R[T-1][j] / Σ_j n_j,  n_j = test items of task j
    average incremental acc.    AIA  = 1/T · Σ_i ( 1/(i+1) · Σ_{j≤i} R[i][j] )
    backward transfer           BWT  = 1/(T-1) · Σ_{j<T-1} ( R[T-1][j] - R[j][j] )
    forgetting                  F    = 1/(T-1) · Σ_{j<T-1} ( max_{j≤i<T-1} R[i][j] - R[T-1][j] )
    learning accuracy           LA   = 1/T · Σ_j R[j][j]

and one does, which also needs the accuracies b_j of the untrained model:

    forward transfer            FWT  = 1/(T-1) · Σ_{j>0} ( R[j-1][j] - b_j )

FAAw is what the paper reports: the accuracy over all test questions put together. Numbers are in
the unit of the entries (per cent in, per cent out). A metric whose entries are missing, or which
does not exist (BWT of one task), is **None, never 0 or NaN**; `AccuracyMatrix.undefined()` says
why.

Numbers may be of any library, also in arrays and tensors of one element; those stored are Python's.
Only the standard library is used, and matplotlib where something is drawn: this file can be copied
next to any result file.
"""

from __future__ import annotations

import csv
import io
import json
import math
import operator
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = [
    "AccuracyMatrix", "average_incremental_accuracy", "backward_transfer",
    "final_average_accuracy", "forgetting", "forward_transfer", "learning_accuracy", "summary",
    "task_curve",
]  # fmt: skip

Matrix = Sequence[Sequence[float | None]]


class _UndefinedError(Exception):
    """A metric has no value; the text says why."""


# ---------------------------------------------------------------------------------- functions


def final_average_accuracy(matrix: Matrix, sizes: Sequence[float] | None = None) -> float | None:
    """FAA: `1/T · Σ_j R[T-1][j]`, or by `sizes`: `Σ_j n_j R[T-1][j] / Σ_j n_j`."""
    rows = _checked(matrix)
    return _or_none(_faa, rows) if sizes is None else _or_none(_faa_weighted, rows, sizes)


def average_incremental_accuracy(matrix: Matrix) -> float | None:
    """AIA: `1/T · Σ_i mean_{j≤i} R[i][j]`, first the mean of each row, then of the rows."""
    return _or_none(_aia, _checked(matrix))


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT: `1/(T-1) · Σ_{j<T-1} (R[T-1][j] - R[j][j])`; negative means forgetting."""
    return _or_none(_bwt, _checked(matrix))


def forgetting(matrix: Matrix) -> float | None:
    """F: `1/(T-1) · Σ_{j<T-1} (max_{j≤i<T-1} R[i][j] - R[T-1][j])`.

    The maximum is over what was reached before the last task: F < 0 where the last task helped.
    """
    return _or_none(_forgetting, _checked(matrix))


def learning_accuracy(matrix: Matrix) -> float | None:
    """LA: `1/T · Σ_j R[j][j]`, how well each task was learnt in its turn (plasticity)."""
    return _or_none(_learning, _checked(matrix))


def forward_transfer(matrix: Matrix, untrained: Sequence[float | None]) -> float | None:
    """FWT: `1/(T-1) · Σ_{j>0} (R[j-1][j] - b_j)`, `b_j` = accuracy on task j before training."""
    rows = _checked(matrix)
    base = [_number(value, f"untrained[{j}]") for j, value in enumerate(untrained)]
    if len(base) != len(rows):
        raise ValueError(f"{len(base)} untrained accuracies for {len(rows)} tasks")
    return _or_none(_fwt, rows, base)


def task_curve(matrix: Matrix, task: int) -> list[float | None]:
    """Accuracy on one task after it and after every later one: `R[task][task] … R[T-1][task]`."""
    rows = _checked(matrix)
    task = _index("task", task, len(rows))
    return [rows[i][task] for i in range(task, len(rows))]


def summary(matrix: Matrix, sizes: Sequence[float] | None = None) -> dict[str, float | None]:
    """All metrics by short name: faa, faa_weighted, aia, bwt, forgetting, learning.

    `faa_weighted` is None without `sizes`.
    """
    return AccuracyMatrix.from_rows(matrix, sizes=sizes).summary()


# ------------------------------------------------------------------------------------ the class


class AccuracyMatrix:
    """`R[i][j]` = accuracy on task j after training on task i, filled as a run goes along.

    Args:
        tasks: the names of the tasks in training order, or their number.
        sizes: the sizes of their test sets, for the weighted FAA.
    """

    def __init__(self, tasks: int | Sequence[str], sizes: Sequence[float] | None = None) -> None:
        names = _names(tasks)
        if not names:
            raise ValueError("there must be at least one task")
        if len(set(names)) != len(names):
            raise ValueError(f"task names must differ, got {names}")
        self.tasks: list[str] = names
        self.sizes = None if sizes is None else _checked_sizes(sizes, len(names))
        self.rows: list[list[float | None]] = [[None] * len(names) for _ in names]

    @classmethod
    def from_rows(
        cls, rows: Matrix, tasks: Sequence[str] | None = None, sizes: Sequence[float] | None = None
    ) -> AccuracyMatrix:
        """From a square list of lists; missing entries are None."""
        checked = _checked(rows)
        result = cls(len(checked) if tasks is None else tasks, sizes)
        if len(result.tasks) != len(checked):
            raise ValueError(f"{len(result.tasks)} task names for {len(checked)} rows")
        result.rows = checked
        return result

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.tasks)

    def __getitem__(self, i: int) -> list[float | None]:
        """Row i: accuracies after training on task i (a copy; use `record` to change it)."""
        return list(self.rows[_integer("i", i)])

    def __eq__(self, other: object) -> bool:
        """Same tasks, sizes and entries."""
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return (self.tasks, self.sizes, self.rows) == (other.tasks, other.sizes, other.rows)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        """Names and progress."""
        done = sum(row[i] is not None for i, row in enumerate(self.rows))
        return f"{type(self).__name__}({self.tasks}, {done} of {len(self)} tasks trained)"

    def record(self, trained: int, evaluated: int, accuracy: float) -> None:
        """Set `R[trained][evaluated]`.

        Raises:
            IndexError: if there is no such task (negative indices included).
            TypeError: if an index is not an integer, or the accuracy not a number.
            ValueError: if the accuracy is not finite, or None.
        """
        trained = _index("trained", trained, len(self))
        evaluated = _index("evaluated", evaluated, len(self))
        value = _number(accuracy, f"R[{trained}][{evaluated}]")
        if value is None:
            raise ValueError("an accuracy must be a number")
        self.rows[trained][evaluated] = value

    # The metrics, by the names of the module's docstring.

    def faa(self) -> float | None:
        """Final average accuracy."""
        return _or_none(_faa, self.rows)

    def faa_weighted(self) -> float | None:
        """Final average accuracy weighted by test set size, as in the paper."""
        return _or_none(_faa_weighted, self.rows, self.sizes)

    def aia(self) -> float | None:
        """Average incremental accuracy."""
        return _or_none(_aia, self.rows)

    def bwt(self) -> float | None:
        """Backward transfer."""
        return _or_none(_bwt, self.rows)

    def forgetting(self) -> float | None:
        """Forgetting."""
        return _or_none(_forgetting, self.rows)

    def learning(self) -> float | None:
        """Learning accuracy."""
        return _or_none(_learning, self.rows)

    def curve(self, task: int | str) -> list[float | None]:
        """Accuracy of one task (index or name) after it and after every later one."""
        return task_curve(self.rows, self.tasks.index(task) if isinstance(task, str) else task)

    def curves(self) -> dict[str, list[float | None]]:
        """Every task's curve by name."""
        return {name: task_curve(self.rows, j) for j, name in enumerate(self.tasks)}

    def summary(self) -> dict[str, float | None]:
        """All metrics by short name."""
        metrics = self._metrics().items()
        return {name: _or_none(function, *arguments) for name, (function, arguments) in metrics}

    def undefined(self) -> dict[str, str]:
        """For every metric that is None, the reason."""
        reasons = {}
        for name, (function, arguments) in self._metrics().items():
            try:
                function(*arguments)
            except _UndefinedError as reason:
                reasons[name] = str(reason)
        return reasons

    def _metrics(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        others = {"aia": _aia, "bwt": _bwt, "forgetting": _forgetting, "learning": _learning}
        return {
            "faa": (_faa, (self.rows,)),
            "faa_weighted": (_faa_weighted, (self.rows, self.sizes)),
            **{name: (function, (self.rows,)) for name, function in others.items()},
        }

    def plot(self, ax: Any = None, **image: Any) -> Any:
        """Draws R as a heat map: a row for every task trained, a column for every task tested.

        FAA, AIA and BWT are the title. What is missing stays empty, and a metric that has no value
        is a dash. The colours go from 0 to 1, or to 100 where an entry is above 1.

        Args:
            ax: The Axes of matplotlib to draw into; None makes a figure.
            **image: For ``Axes.imshow``: another ``cmap``, ``vmin`` or ``vmax``.

        Returns:
            The Axes: ``matrix.plot().figure.savefig("matrix.png")``.

        Raises:
            ImportError: ``ax`` is None, and there is no matplotlib.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    "AccuracyMatrix.plot() draws with matplotlib and cannot import it; "
                    "pip install matplotlib"
                ) from error
            ax = plt.subplots(layout="constrained")[1]
        shown = [[math.nan if x is None else x for x in row] for row in self.rows]
        per_cent = any(x > 1 for row in shown for x in row)
        # A norm of the caller's has its own ends.
        ends = {} if "norm" in image else {"vmin": 0, "vmax": 100 if per_cent else 1}
        colours = {"cmap": "viridis", **ends, **image}
        drawn = ax.imshow(shown, **colours)
        for i, row in enumerate(self.rows):
            for j, value in enumerate(row):
                if value is None:
                    continue
                red, green, blue, _ = drawn.cmap(drawn.norm(value))
                # Rec. 601's brightness of the cell decides the colour of its number.
                ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                text = f"{value:.0f}" if per_cent else f"{value:.2f}"
                ax.text(j, i, text, ha="center", va="center", color=ink)
        size = range(len(self))
        ax.set_xticks(size, self.tasks, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(size, self.tasks)
        ax.set(xlabel="tested on", ylabel="after training")
        numbers = (("FAA", self.faa()), ("AIA", self.aia()), ("BWT", self.bwt()))
        form = ".1f" if per_cent else ".3f"
        title = [f"{name} {'–' if x is None else format(x, form)}" for name, x in numbers]
        ax.set_title("   ".join(title))
        return ax

    # JSON and CSV. JSON carries the metrics too, for whoever reads the file; CSV is R alone.

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """A JSON object with tasks, sizes, matrix and metrics; also written to `path` if given."""
        data: dict[str, Any] = {"tasks": self.tasks, "sizes": self.sizes, "matrix": self.rows}
        data["metrics"] = self.summary()
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        return text if path is None else _written(path, text)

    @classmethod
    def from_json(cls, source: str | PathLike[str] | Mapping[str, Any]) -> AccuracyMatrix:
        """From the text of `to_json`, a path to it, or the parsed object."""
        data = source if isinstance(source, Mapping) else json.loads(_text(source, "{"))
        return cls.from_rows(data["matrix"], data.get("tasks"), data.get("sizes"))

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """R as CSV: a header with the tasks, a row for each task trained; missing is empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        for name, row in zip(self.tasks, self.rows, strict=True):
            writer.writerow([name, *("" if value is None else repr(value) for value in row)])
        return out.getvalue() if path is None else _written(path, out.getvalue())

    @classmethod
    def from_csv(
        cls, source: str | PathLike[str], sizes: Sequence[float] | None = None
    ) -> AccuracyMatrix:
        """From the text of `to_csv` or a path to it."""
        if not (text := _text(source, "after,")).endswith("\n"):
            raise ValueError(f"the CSV is empty or was cut off: {text[-20:]!r} ends no line")
        lines = list(csv.reader(io.StringIO(text, newline="")))
        tasks = lines[0][1:]
        if [line[0] for line in lines[1:]] != tasks:
            raise ValueError("the rows of the CSV are not the tasks of its header")
        rows = [[float(value) if value else None for value in line[1:]] for line in lines[1:]]
        return cls.from_rows(rows, tasks, sizes)


# --------------------------------------------------------------------------------- the formulas


def _faa(rows: list[list[float | None]]) -> float:
    return _mean([_entry(rows, len(rows) - 1, j) for j in range(len(rows))])


def _faa_weighted(rows: list[list[float | None]], sizes: Sequence[float] | None) -> float:
    if sizes is None:
        raise _UndefinedError("the sizes of the test sets are not given")
    sizes = _checked_sizes(sizes, len(rows))
    total = math.fsum(n * _entry(rows, len(rows) - 1, j) for j, n in enumerate(sizes))
    return total / math.fsum(sizes)


def _aia(rows: list[list[float | None]]) -> float:
    return _mean([_mean([_entry(rows, i, j) for j in range(i + 1)]) for i in range(len(rows))])


def _bwt(rows: list[list[float | None]]) -> float:
    last = _earlier(rows)
    return _mean([_entry(rows, last, j) - _entry(rows, j, j) for j in range(last)])


def _forgetting(rows: list[list[float | None]]) -> float:
    last = _earlier(rows)
    best = [max(_entry(rows, i, j) for i in range(j, last)) for j in range(last)]
    return _mean([known - _entry(rows, last, j) for j, known in enumerate(best)])


def _learning(rows: list[list[float | None]]) -> float:
    return _mean([_entry(rows, j, j) for j in range(len(rows))])


def _fwt(rows: list[list[float | None]], base: list[float | None]) -> float:
    _earlier(rows)
    gains = []
    for j in range(1, len(rows)):
        before = base[j]
        if before is None:
            raise _UndefinedError(f"the untrained accuracy on task {j} is missing")
        gains.append(_entry(rows, j - 1, j) - before)
    return _mean(gains)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _entry(rows: list[list[float | None]], i: int, j: int) -> float:
    value = rows[i][j]
    if value is None:
        raise _UndefinedError(f"R[{i}][{j}] is missing")
    return value


def _earlier(rows: list[list[float | None]]) -> int:
    if len(rows) < 2:
        raise _UndefinedError("there is only one task, so none came before the last")
    return len(rows) - 1


def _or_none(function: Any, *arguments: Any) -> float | None:
    try:
        return function(*arguments)
    except _UndefinedError:
        return None


def _checked(matrix: Matrix) -> list[list[float | None]]:
    rows = []
    for i, row in enumerate(matrix):
        if not hasattr(row, "__iter__") or isinstance(row, str):
            raise TypeError(f"row {i} of the matrix must be a list of accuracies, got {row!r}")
        rows.append([_number(value, f"R[{i}][{j}]") for j, value in enumerate(row)])
    if not rows:
        raise ValueError("the matrix is empty")
    for i, row in enumerate(rows):
        if len(row) != len(rows):
            raise ValueError(f"the matrix must be square: {len(rows)} rows, row {i} has {len(row)}")
    return rows


def _checked_sizes(sizes: Sequence[float], count: int) -> list[float]:
    sizes = [_plain(f"sizes[{j}]", size) for j, size in enumerate(sizes)]
    if len(sizes) != count:
        raise ValueError(f"{len(sizes)} sizes for {count} tasks")
    for j, size in enumerate(sizes):
        if isinstance(size, str):
            raise TypeError(f"sizes[{j}] must be a number, got {size!r}")
        number = _number(size, f"sizes[{j}]")
        if isinstance(size, bool) or number is None or number <= 0:
            raise ValueError(f"sizes[{j}] must be positive, got {size!r}")
        sizes[j] = size if isinstance(size, int) else number
    return sizes


def _names(tasks: int | Sequence[str]) -> list[str]:
    given: Any = tasks
    is_one = hasattr(given, "item") and math.prod(getattr(given, "shape", ())) == 1
    number = given.item() if is_one else given
    if isinstance(number, int) and not isinstance(number, bool):
        return [f"task {j}" for j in range(number)]
    if not isinstance(given, (str, bytes, set, frozenset)):  # sets have no order
        try:
            names = list(given)
        except TypeError:  # not iterable, or an array without dimensions
            pass
        else:
            if any(isinstance(x, (list, tuple)) or getattr(x, "ndim", 0) for x in names):
                raise TypeError(
                    "tasks must be the names of the tasks or their number, and has rows: make a "
                    "matrix of accuracies with AccuracyMatrix.from_rows(rows)"
                )
            return [str(name) for name in names]
    raise TypeError(f"tasks must be a number or a list of names in order, got {tasks!r}")


def _plain(name: str, value: Any) -> Any:
    """The element of a scalar or of an array or tensor of one element; all else as it is."""
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be one number: {error}") from None


def _integer(name: str, value: Any) -> int:
    number = _plain(name, value)
    if isinstance(number, bool) or not hasattr(type(number), "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(number)


def _index(name: str, value: Any, count: int) -> int:
    """The index of a task; negative ones do not count from the end."""
    index = _integer(name, value)
    if not 0 <= index < count:
        raise IndexError(f"no task {index}: there are {count}")
    return index


def _number(value: Any, where: str) -> float | None:
    """A finite float, or None; a tensor or numpy scalar will do."""
    value = _plain(where, value)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(f"{where} must be a number or None: {error}") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {number}; an entry that is not known must be None")
    return number


def _written(path: str | PathLike[str], text: str) -> str:
    """The text, now in the file; where the disk is full the file is as it was."""
    file = Path(path)  # or a link or a pipe, which stays one
    former = file.read_bytes() if file.is_file() else None
    try:
        file.write_text(text, encoding="utf-8", newline="")
    except OSError:
        if former is not None:
            file.write_bytes(former)
        raise
    return text


def _text(source: str | PathLike[str], start: str) -> str:
    """The content itself if it begins like one, else that of the file of this name."""
    if isinstance(source, str) and source.lstrip().startswith(start):
        return source
    return Path(source).read_text(encoding="utf-8")
