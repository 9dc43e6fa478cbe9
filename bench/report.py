# SPDX-License-Identifier: BSD-3-Clause
"""What every benchmark reports: tables, comparisons with targets, JSON."""

from __future__ import annotations

import json
import os
import pathlib
import textwrap
import time
from collections.abc import Iterable, Sequence

from provenance import provenance_lines

# What is printed fits a terminal of as many columns.
WIDTH = 100

# The ratios are what one looks for first: they stand beside the time.
HEADER = (
    "variant", "setting", "ms", "/ fused", "/ clip+fused", "/ foreach", "20 %", "80 %", "n",
    "ns/elem", "B/elem", "GB/s", "of memory",
)  # fmt: skip
# Where host and device are two: those marked dev, and the percentiles, are of the device time,
# which GB/s is computed from.
GPU_HEADER = (
    "variant", "setting", "wall ms", "/ fused", "/ clip+fused", "/ foreach", "dev ms",
    "dev / fused", "dev / clip+fused", "dev / foreach", "20 %", "80 %", "host ms", "kernels ms",
    "launches", "waits", "temporary MiB", "n", "B/elem", "GB/s", "of copy",
)  # fmt: skip

# What each column of ratios divides by: (variant, setting).
OPPONENTS = (
    ("torch fused", "plain"),
    ("torch fused", "clipped"),
    ("foreach + fused", "guided"),
)


def find(case: dict, name: str, setting: str) -> dict | None:
    """Returns the entry of a variant in a case's results, or None."""
    found = (e for e in case["variants"] if (e["name"], e["setting"]) == (name, setting))
    return next(found, None)


def table(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Lays out rows, the first of which is the header, aligned: text left, numbers right."""
    # Markdown wants at least one dash beside the colon.
    widths = _widths(rows, 3 if markdown else 1)
    left = [not any(_numeric(row[c]) for row in rows[1:]) for c in range(len(widths))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
        if number == 0:
            ends = ["-" if to_left or not markdown else ":" for to_left in left]
            rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
            lines.append(f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]], least: int = 1) -> list[int]:
    return [max(least, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]


def tables(rows: Sequence[Sequence[str]], *, markdown: bool, keys: int = 2) -> str:
    """Lays out rows as `table` does, in as many tables below each other as fit `WIDTH`.

    So many columns as ``keys`` name a row: every table begins with them. Markdown is one table.
    """
    if markdown:
        return table(rows, markdown=True)
    widths, groups = _widths(rows), [[*range(keys)]]
    for column in range(keys, len(widths)):
        if rows[0][column] == "80 %":
            continue  # stands beside the other percentile
        both = rows[0][column] == "20 %"
        more = [column, column + 1] if both else [column]
        if sum(widths[c] + 2 for c in groups[-1] + more) - 2 > WIDTH and len(groups[-1]) > keys:
            groups.append([*range(keys)])
        groups[-1] += more
    parts = [[[row[c] for c in group] for row in rows] for group in groups]
    return "\n\n".join(table(part, markdown=False) for part in parts)


def wrapped(text: str) -> str:
    """Breaks lines that are longer than `WIDTH`, but for rows of markdown."""
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    lines = text.split("\n")
    return "\n".join(line if line.startswith("|") else wrapper.fill(line) for line in lines)


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "<>≤≥"


def milliseconds(entry: dict, *figures: str) -> list[str]:
    """Returns cells of times; empty ones for what was not measured."""
    return ["" if entry[name] is None else _figure(entry[name] * 1e3) for name in figures]


def ratios(
    entry: dict, opponents: Iterable[dict | None], figure: str = "seconds", digits: int = 2
) -> list[str]:
    """Returns cells of a figure divided by that of others; empty ones for who is not there."""
    return [
        "" if other is None else f"{entry[figure] / other[figure]:.{digits}f}"
        for other in opponents
    ]


def page(title: str, rows: Sequence[Sequence[str]], notes: Iterable[str], *, markdown: bool) -> str:
    """Returns title, tables and notes of one case."""
    lines = [f"### {title}\n" if markdown else title, tables(rows, markdown=markdown), *notes]
    return "\n".join(lines) + "\n"


def absences(case: dict) -> list[str]:
    """Returns a line for every variant that was not run."""
    found = []
    for missing in case["not_run"]:
        setting = f" ({missing['setting']})" if "setting" in missing else ""
        found.append(f"not run: {missing['name']}{setting}: {missing['reason']}")
    return found


def case_table(case: dict, *, markdown: bool) -> str:
    """Returns title and table of one case, and the comparisons that dgg loses."""
    on_gpu = _has_device(case)
    rows, cells = ([GPU_HEADER], _gpu_cells) if on_gpu else ([HEADER], _cpu_cells)
    opponents = [find(case, *opponent) for opponent in OPPONENTS]
    rows += [
        (entry["name"], entry["setting"], *cells(entry, opponents)) for entry in case["variants"]
    ]
    return page(_title(case), rows, _notes(case), markdown=markdown)


def _has_device(case: dict) -> bool:
    """Whether host and device are two."""
    return case.get("device", "cpu") != "cpu"


def _cell(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _cpu_cells(entry: dict, opponents: Sequence[dict | None]) -> tuple[str, ...]:
    return (
        *milliseconds(entry, "seconds"),
        *ratios(entry, opponents),
        *milliseconds(entry, "low", "high"),
        str(entry["samples"]),
        _figure(entry["ns_per_element"]),
        _cell(entry["bytes_per_element"], ".1f"),
        _cell(entry["bandwidth"], ".1f", 1e-9),
        _cell(entry["share_of_bandwidth"], ".0%"),
    )


def _gpu_cells(entry: dict, opponents: Sequence[dict | None]) -> tuple[str, ...]:
    late = (entry["device_late"] or 0.0) > 0.1
    return (
        *milliseconds(entry, "seconds"),
        *ratios(entry, opponents),
        *milliseconds(entry, "device_seconds"),
        *ratios(entry, opponents, "device_seconds"),
        *milliseconds(entry, "device_low", "device_high", "host_seconds", "kernel_seconds"),
        _cell(entry["launches"], ""),
        "yes" if entry["waits_for_device"] else "no",
        _cell(entry["temporary_bytes"], ".1f", 2**-20),
        f"{entry['samples']}{' late' if late else ''}",
        _cell(entry["bytes_per_element"], ".1f"),
        _cell(entry["bandwidth"], ".0f", 1e-9),
        _cell(entry["share_of_bandwidth"], ".1%"),
    )


# What dgg is measured against in the table of the host's time, by setting.
PEERS = {
    "plain": ("torch fused", "plain"),
    "clipped": ("torch fused", "clipped"),
    "guided": ("foreach + fused", "guided"),
    "replay": ("add + torch fused", "replay"),
    "replay, clipped": ("add + torch fused", "replay, clipped"),
    "replay, guided": ("foreach + fused", "replay, guided"),
    "guided, importance": ("foreach + fused", "guided"),
    "auto": ("foreach guard + fused", "auto"),
    "auto, importance": ("foreach guard + fused", "auto"),
}
ADD_AND_CLIP = ("add + torch fused", "replay, clipped")


def host_table(case: dict, *, markdown: bool) -> str:
    """Returns title and table of one case of many tensors: medians and their ratios.

    The ratios: to the same code's plain step, to the peer of the setting (`PEERS`), and to adding
    the two gradients, ``clip_grad_norm_`` and the fused step one after the other.
    """
    rows = [("variant", "setting", "ms", "/plain", "/peer", "/added", "20 %", "80 %", "n")]
    for entry in case["variants"]:
        name, setting = entry["name"], entry["setting"]
        peers = (PEERS[setting], ADD_AND_CLIP) if name.startswith("dgg") else ()
        others = [find(case, *other) for other in ((name, "plain"), *peers)]
        cells = milliseconds(entry, "seconds") + ratios(entry, others) + [""] * (3 - len(others))
        cells += [*milliseconds(entry, "low", "high"), str(entry["samples"])]
        rows.append((name, setting, *cells))
    return page(_title(case), rows, _notes(case), markdown=markdown)


def _title(case: dict) -> str:
    return (
        f"{case['case']}: {case['optimizer']}, {case['dtype']}, {case['elements']:,} elements in "
        f"{case['tensors']} tensor{'s' * (case['tensors'] > 1)}, {case['cache']} caches"
        + (", channels last" if case.get("channels_last") else "")
    )


def _notes(case: dict) -> list[str]:
    sampled = [e for e in case["variants"] if e["setting"].startswith("alpha")]
    drawn = {(e["setting"], e["seed"], e["injected_fraction"]) for e in sampled}
    lines = [
        f"{setting}: seed {seed}, {fraction:.1%} of the draws in the window inject"
        for setting, seed, fraction in sorted(drawn)
    ]
    lines += absences(case)
    if _has_device(case):
        if case["profiler"]:
            lines.append(f"no kernel times: {case['profiler']}")
        if any((entry["device_late"] or 0.0) > 0.1 for entry in case["variants"]):
            lines.append("late: the host did not keep ahead, its time is in the device time")
    return lines + losses(case)


def losses(case: dict) -> list[str]:
    """Returns a line for every comparison that dgg loses, by the medians."""
    figures = [("seconds", "time")]
    if _has_device(case):
        figures = [("seconds", "wall time"), ("device_seconds", "device time")]
    found = []
    for entry in case["variants"]:
        # The reference is the specification and no opponent of anybody.
        if not entry["name"].startswith("dgg") or entry["name"] == "dgg reference":
            continue
        for other in case["variants"]:
            if other["name"].startswith("dgg"):
                continue
            like = other["setting"] == entry["setting"]
            # Guidance and clipping together are to cost less than clipping alone.
            cheaper = other["setting"] == "clipped" and entry["setting"] not in ("plain", "clipped")
            for figure, words in figures if like or cheaper else ():
                if (ratio := entry[figure] / other[figure]) > 1:
                    mine, theirs = (f"{e['name']} ({e['setting']})" for e in (entry, other))
                    found.append(f"LOST: {mine} takes {ratio:.2f} x the {words} of {theirs}")
    return found


def _figure(value: float) -> str:
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if value >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def target(
    what: str, value: float, shown: str = ".3f", *, most: float | None = None,
    least: float | None = None, stated: str = ".2f",
) -> dict:  # fmt: skip
    """Returns a comparison with a target: what, target, measured, value, met.

    The value is not to be above ``most``, or not below ``least``; without both there is no target.
    ``shown`` and ``stated`` are the formats of value and target.
    """
    words, met = "no target", None
    if most is not None:
        words, met = f"≤ {most:{stated}}", value <= most
    elif least is not None:
        words, met = f"≥ {least:{stated}}", value >= least
    measured = format(value, shown)
    return {"what": what, "target": words, "measured": measured, "value": value, "met": met}


def quotient(
    case: dict | None, ours: tuple[str, str], theirs: tuple[str, str], figure: str = "seconds"
) -> float | None:
    """Returns a figure of one (variant, setting) over that of another; None: not both ran."""
    pair = [case and find(case, *run) for run in (ours, theirs)]
    if any(entry is None or entry[figure] is None for entry in pair):
        return None
    return pair[0][figure] / pair[1][figure]


def targets_table(found: Sequence[dict], *, markdown: bool) -> str:
    """Returns the table target, measured, met."""
    words = {True: "yes", False: "NO", None: "-"}
    rows = [("what", "target", "measured", "met")]
    rows += [(t["what"], t["target"], t["measured"], words[t["met"]]) for t in found]
    if not markdown:
        room = WIDTH - sum(width + 2 for width in _widths(rows)[1:])
        broken = []
        for what, *cells in rows:
            # Indented, so that a line that begins with a number is no number.
            first, *others = textwrap.wrap(what, room, subsequent_indent="  ")
            broken += [(first, *cells), *((line, "", "", "") for line in others)]
        rows = broken
    return table(rows, markdown=markdown) + "\n"


def bandwidth_line(bandwidth: dict[str, float]) -> str:
    """Returns one line about the measured bandwidth."""
    parts = ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in bandwidth.items())
    return f"memory bandwidth (a CPU's with write-allocate counted): {parts}"


class Printer:
    """Prints lines and keeps them for the page written beside the JSON.

    Both go into ``folder`` (None: nothing is written) under the name ``kind``, before the date.
    """

    def __init__(self, markdown: bool, folder: pathlib.Path | None = None, kind: str = "") -> None:
        self.markdown, self.lines, self._folder = markdown, [], folder
        self._stem = f"{kind}-{time.strftime('%Y-%m-%d', time.gmtime())}"

    def __call__(self, line: str) -> None:
        """Prints one line or paragraph, no line of it longer than `WIDTH`."""
        line = wrapped(line)
        self.lines.append(line)
        print(line, flush=True)

    def begin(self, origin: dict) -> None:
        """Prints where the numbers are from, and whether something else was going on there."""
        self(provenance_lines(origin) + "\n")
        if origin["load_average"][0] > 0.5 and origin["device"] == "cpu":
            self("This machine is not quiet: take the times as provisional.\n")

    def write(self, results: dict, *more: str) -> list[pathlib.Path]:
        """Writes results, and what was printed and ``more``; returns the files."""
        if self._folder is None:
            return []
        files = [self._folder / f"{self._stem}.{suffix}" for suffix in ("json", "md")]
        write_json(files[0], results)
        replace(files[1], "\n".join([*self.lines, *more]) + "\n")
        return files


def first_line(error: Exception, *told: type[Exception]) -> str:
    """Returns the first line of an error, behind its kind if it is none of ``told``."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, told) else f"{type(error).__name__}: {first}"


def write_json(path: pathlib.Path, results: object) -> None:
    """Writes results whole or not at all."""
    replace(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: who is interrupted leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: a worker whose parent was killed may be writing the same file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
