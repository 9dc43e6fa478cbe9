# SPDX-License-Identifier: BSD-3-Clause
"""The table of docs/compatibility.md, made from the marks of the tests.

    .venv/bin/python -P tests/compatibility.py                  # prints the table
    .venv/bin/python -P tests/compatibility.py --write FILE     # puts it between the two markers

A test that proves a cell says so: ``@pytest.mark.compat(ENGINE, FEATURE, ...)``; ``"!FEATURE"``
says that the feature is refused there with an error, which the test looks at. Why a cell is
refused, or cannot exist, stands in `REASONS`, in at most twelve words.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import string
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
BEGIN = "<!-- compatibility: begin; `make table` writes this from the marks of the tests -->"
END = "<!-- compatibility: end -->"

# Engines by table, and features, in the order of the page. Another name in a mark is an error.
TABLES = (
    ("one process", "DDP", "ZeroRedundancyOptimizer", "FSDP1", "FSDP2", "HSDP", "TP", "TP + FSDP2"),
    ("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"),
    (
        "accelerate DDP", "accelerate FSDP2", "accelerate DeepSpeed",
        "Trainer DDP", "Trainer FSDP2", "Trainer DeepSpeed",
    ),
)  # fmt: skip
ENGINES = tuple(engine for table in TABLES for engine in table)
FEATURES = (
    "trajectory", "clipping", "replay", "granularity tensor", "granularity element",
    "norm_scope tensor", "mixed precision", "CPU offload", "meta init", "LoRA", "tied weights",
    "frozen parts", "resume", "resume on other ranks", "anchor by name",
)  # fmt: skip

# What a table calls a feature: "trajectory" alone would not say what is proved.
TITLES = {"trajectory": "same trajectory as unsharded", "norm_scope tensor": "norm per tensor"}

MOST_WORDS = 12
REFUSED, UNSUPPORTED, ABSENT, BELOW = "refused", "not supported", "n/a", "not tested here"


class Reason(NamedTuple):
    """Why cells are not tested by a test that succeeds.

    ``kind`` is REFUSED (with an error that a marked test looks at), UNSUPPORTED, ABSENT (there is
    no such thing) or BELOW (another row or column tests what decides it; gives way to a test).
    """

    engines: tuple[str, ...]
    features: tuple[str, ...]
    kind: str
    why: str


# True: a cell with neither test nor reason is an error.
STRICT = True

WITH_ZERO = (
    "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "accelerate DeepSpeed",
    "Trainer DeepSpeed",
)  # fmt: skip
REPLICATED = ("DDP", "ZeroRedundancyOptimizer", "accelerate DDP", "Trainer DDP")

REASONS: tuple[Reason, ...] = (
    Reason(
        ("one process",), ("CPU offload", "meta init", "resume on other ranks"), ABSENT,
        "needs several ranks or an engine that makes and moves parameters",
    ),
    Reason(
        REPLICATED, ("CPU offload", "meta init"), ABSENT,
        "every rank has whole parameters, which the engine neither makes nor moves",
    ),
    Reason(("TP",), ("CPU offload",), ABSENT, "the engine has none"),
    Reason(
        ("FSDP1",), ("anchor by name",), REFUSED,
        "whole tensors are not cut into runs; load them into the model",
    ),
    Reason(
        ("FSDP1", "Trainer FSDP2"), ("CPU offload",), BELOW,
        "torch pins memory for it, which needs an accelerator",
    ),
    Reason(
        ("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2"), ("meta init",), ABSENT,
        "it partitions optimizer state, not parameters; see ZeRO-3",
    ),
    Reason(
        WITH_ZERO, ("replay",), REFUSED,
        "every backward is reduced into its own partitions; mix the batches",
    ),
    Reason(
        WITH_ZERO, ("resume on other ranks",), REFUSED,
        "its universal checkpoints carry no anchor; name it again",
    ),
)  # fmt: skip


class Cell(NamedTuple):
    """Files of the tests of one engine with one feature."""

    tested: set[str]
    refused: set[str]
    skipped: set[str]


class Found(NamedTuple):
    """What the tests say.

    Attributes:
        cells: What is marked, by engine and feature.
        problems: Marks that mean nothing.
        absent: Test files that could not be collected here, with their reasons.
    """

    cells: dict[tuple[str, str], Cell]
    problems: list[str]
    absent: list[str]


class Collector:
    """The plugin that takes up the marks of what pytest collects."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []
        self.absent: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            self.absent.append(f"{report.nodeid}: {reason}")


def collect(folder: pathlib.Path = TESTS) -> Found:
    """Collects the tests below a folder, slow ones included, and reads their marks.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    collector, said = Collector(), io.StringIO()
    # -s: within a test the outer pytest has the streams already.
    arguments = ["--collect-only", "-q", "-s", "-m", "", "-p", "no:cacheprovider"]
    arguments += ["-p", "no:faulthandler", "-p", "no:xdist", str(folder)]
    kept = os.environ.pop("PYTEST_ADDOPTS", None)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = pytest.main(arguments, plugins=[collector])
    finally:
        if kept is not None:
            os.environ["PYTEST_ADDOPTS"] = kept
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest could not collect {folder}:\n{said.getvalue()}")
    return read(collector.items, collector.absent)


def read(items: Iterable[pytest.Item], absent: Iterable[str] = ()) -> Found:
    """Reads the marks of collected tests."""
    found = Found({}, [], sorted(absent))
    for item in items:
        skip = item.get_closest_marker("skip")
        why = skip and (skip.kwargs.get("reason") or next(iter(skip.args), None))
        for mark in item.iter_markers("compat"):
            engine, *features = mark.args or ("",)
            wrong = [] if engine in ENGINES else [f"engine {engine!r}"]
            wrong += [f"feature {f!r}" for f in features if f.removeprefix("!") not in FEATURES]
            if wrong or not features or mark.kwargs:
                what = ", ".join(wrong) or ("no feature" if not features else "keywords")
                found.problems.append(f"{item.nodeid}: the mark compat{mark.args} has {what}")
                continue
            if skip and not why:
                continue  # proves nothing, and does not say why
            for feature in features:
                key = engine, feature.removeprefix("!")
                cell = found.cells.setdefault(key, Cell(set(), set(), set()))
                if skip:
                    cell.skipped.add(why)
                else:
                    files = cell.refused if feature.startswith("!") else cell.tested
                    files.add(item.path.name)
    return found


def check(
    found: Found, reasons: Iterable[Reason] = REASONS, *, strict: bool = STRICT
) -> dict[tuple[str, str], Reason]:
    """Checks that marks and reasons fit together.

    Returns:
        The reason of each cell that has one.

    Raises:
        ValueError: They do not; the message has a line for each fault.
    """
    problems = list(found.problems)
    why: dict[tuple[str, str], Reason] = {}
    whole = not found.absent  # else a mark that is missed may be in a file that is left out
    for reason in reasons:
        if reason.kind not in (REFUSED, UNSUPPORTED, ABSENT, BELOW):
            problems.append(f"{reason.kind!r} is no kind of reason")
        if len(reason.why.split()) > MOST_WORDS:
            problems.append(f"{reason.why!r} has more than {MOST_WORDS} words")
        for engine in reason.engines:
            for feature in reason.features:
                if engine not in ENGINES or feature not in FEATURES:
                    problems.append(f"a reason is given for {engine!r} × {feature!r}: no such cell")
                elif (engine, feature) in why:
                    problems.append(f"{engine} × {feature} has two reasons")
                why[engine, feature] = reason
    for key, reason in why.items():
        cell = found.cells.get(key, Cell(set(), set(), set()))
        name = " × ".join(key)
        if whole and reason.kind == REFUSED and not cell.refused:
            problems.append(f"{name}: refused, it is said, but no test is marked with '!{key[1]}'")
        if reason.kind in (UNSUPPORTED, ABSENT) and (cell.tested or cell.refused):
            problems.append(f"{name}: {reason.kind}, it is said, but {sorted(cell[0] | cell[1])}")
    for engine in ENGINES:
        for feature in FEATURES:
            cell = found.cells.get((engine, feature))
            if cell and cell.refused and not cell.tested and (engine, feature) not in why:
                problems.append(
                    f"{engine} × {feature}: refused by {sorted(cell.refused)}, but why?"
                )
            if whole and strict and cell is None and (engine, feature) not in why:
                problems.append(f"{engine} × {feature}: neither a test nor a reason")
    if problems:
        raise ValueError("the compatibility table cannot be made:\n  " + "\n  ".join(problems))
    return why


def render(found: Found, reasons: Iterable[Reason] = REASONS, *, strict: bool = STRICT) -> str:
    """Returns the tables, with their letters and notes, as Markdown.

    Raises:
        ValueError: Marks and reasons do not fit together, or (``strict``) a cell has neither.
    """
    why = check(found, reasons, strict=strict)
    files = sorted(set().union(*(cell.tested for cell in found.cells.values())))
    letters = dict(zip(files, string.ascii_letters, strict=False))
    notes: dict[str, int] = {}

    def content(engine: str, feature: str) -> str:
        cell = found.cells.get((engine, feature), Cell(set(), set(), set()))
        text = " ".join(letters[file] for file in sorted(cell.tested))
        said = [f"skipped here: {reason}" for reason in sorted(cell.skipped)]
        reason = why.get((engine, feature))
        if reason is not None and not (reason.kind == BELOW and cell.tested):
            tests = ", ".join(f"`{file}`" for file in sorted(cell.refused))
            said.insert(0, f"{reason.kind}: {reason.why}" + (f" ({tests})" if tests else ""))
        numbers = [notes.setdefault(note, len(notes) + 1) for note in said]
        marks = "".join(f"<sup>{number}</sup>" for number in numbers)
        return (text or ("–" if marks else "")) + marks

    lines = []
    for table in TABLES:
        lines.append("| | " + " | ".join(table) + " |")
        lines.append("|---|" + ":-:|" * len(table))
        for feature in FEATURES:
            cells = " | ".join(content(engine, feature) for engine in table)
            lines.append(f"| {TITLES.get(feature, feature)} | {cells} |")
        lines.append("")
    tested = "Tested by, in `tests/`: " + ", ".join(f"{letters[x]} `{x}`" for x in files) + "."
    if any((e, f) not in found.cells and (e, f) not in why for e in ENGINES for f in FEATURES):
        tested += " An empty cell is not tested."
    lines += textwrap.wrap(tested, 120)
    lines += ["", *(f"<sup>{number}</sup> {note}  " for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def replaced(text: str, table: str) -> str:
    """Returns a text with what stands between the two markers replaced.

    Raises:
        ValueError: The markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text has no place for the table: it needs {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}"


def untested(found: Found, why: Mapping[tuple[str, str], Reason]) -> list[str]:
    """Returns the cells that have neither a test nor a reason."""
    cells = ((engine, feature) for engine in ENGINES for feature in FEATURES)
    return [" × ".join(cell) for cell in cells if cell not in found.cells and cell not in why]


def main() -> int:
    """Prints or writes the table; says on stderr what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="put it into this file")
    parser.add_argument("--strict", action="store_true", help="an empty cell is an error")
    args = parser.parse_args()
    found = collect()
    for line in found.absent:
        print(f"left out, so the table is not whole and not written: {line}", file=sys.stderr)
    try:
        table = render(found, strict=STRICT or args.strict)
        if args.write and not found.absent:
            text = args.write.read_text(encoding="utf-8")
            args.write.write_text(replaced(text, table), encoding="utf-8")
        elif not args.write:
            print(table, end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for cell in untested(found, check(found)):
        print(f"not tested: {cell}", file=sys.stderr)
    return 1 if found.absent else 0


if __name__ == "__main__":
    sys.exit(main())
