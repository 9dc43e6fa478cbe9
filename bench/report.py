# SPDX-License-Identifier: BSD-3-Clause
"""What every benchmark reports: where its numbers are from, tables, targets, JSON.

Imports no torch before it is asked about one: gpu/run.py must start where torch does not.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import textwrap
import time
from collections.abc import Iterable, Sequence

HEADER = (
    "variant", "setting", "ms", "20 %", "80 %", "n", "ns/elem", "B/elem", "GB/s", "of memory",
    "/ fused", "/ clip+fused", "/ foreach",
)  # fmt: skip
# Where host and device are two: ms is wall time, and so are the ratios; those marked dev are of
# the device time, which GB/s is computed from.
GPU_HEADER = (
    "variant", "setting", "wall ms", "host ms", "dev ms", "20 %", "80 %", "kernels ms", "launches",
    "waits", "temporary MiB", "n", "B/elem", "GB/s", "of copy", "/ fused", "/ clip+fused",
    "/ foreach", "dev / fused", "dev / clip+fused", "dev / foreach",
)  # fmt: skip

# What each column of ratios divides by: (variant, setting).
OPPONENTS = (
    ("torch fused", "plain"),
    ("torch fused", "clipped"),
    ("foreach + fused", "guided"),
)


def find(case: dict, name: str, setting: str) -> dict | None:
    """Returns the entry of a variant in a case's results, or None."""
    for entry in case["variants"]:
        if (entry["name"], entry["setting"]) == (name, setting):
            return entry
    return None


def fill_shares(case: dict, best: float) -> None:
    """Adds every variant's share of the memory bandwidth ``best`` (bytes per second).

    Warm cases get none: what they move does not come from memory.
    """
    if case["cache"] == "warm":
        return
    for entry in case["variants"]:
        if entry["bandwidth"] is not None:
            entry["share_of_bandwidth"] = entry["bandwidth"] / best


def table(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Lays out rows, the first of which is the header, aligned: text left, numbers right."""
    # Markdown wants at least one dash beside the colon.
    least = 3 if markdown else 1
    widths = [max(least, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    left = [not any(_numeric(row[c]) for row in rows[1:]) for c in range(len(widths))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
        if number == 0:
            rule = ["-" * width for width in widths]
            if markdown:
                marks = [
                    dashes if to_left else dashes[:-1] + ":"
                    for dashes, to_left in zip(rule, left, strict=True)
                ]
                lines.append(f"| {' | '.join(marks)} |")
            else:
                lines.append("  ".join(rule))
    return "\n".join(lines)


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
    """Returns title, table and notes of one case."""
    lines = [f"### {title}\n" if markdown else title, table(rows, markdown=markdown), *notes]
    return "\n".join(lines) + "\n"


def absences(case: dict) -> list[str]:
    """Returns a line for every variant that was not run."""
    return [
        f"not run: {missing['name']}"
        + (f" ({missing['setting']})" if "setting" in missing else "")
        + f": {missing['reason']}"
        for missing in case["not_run"]
    ]


def case_table(case: dict, *, markdown: bool) -> str:
    """Returns title and table of one case, and the comparisons that dgg loses."""
    on_gpu = _has_device(case)
    rows, cells = ([GPU_HEADER], _gpu_cells) if on_gpu else ([HEADER], _cpu_cells)
    opponents = [find(case, *opponent) for opponent in OPPONENTS]
    for entry in case["variants"]:
        rows.append((entry["name"], entry["setting"], *cells(entry), *ratios(entry, opponents)))
        if on_gpu:
            rows[-1] += tuple(ratios(entry, opponents, "device_seconds"))
    return page(_title(case), rows, _notes(case), markdown=markdown)


def _has_device(case: dict) -> bool:
    """Whether host and device are two."""
    return case.get("device", "cpu") != "cpu"


def _cell(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _cpu_cells(entry: dict) -> tuple[str, ...]:
    return (
        *milliseconds(entry, "seconds", "low", "high"),
        str(entry["samples"]),
        _figure(entry["ns_per_element"]),
        _cell(entry["bytes_per_element"], ".1f"),
        _cell(entry["bandwidth"], ".1f", 1e-9),
        _cell(entry["share_of_bandwidth"], ".0%"),
    )


def _gpu_cells(entry: dict) -> tuple[str, ...]:
    times = ("seconds", "host_seconds", "device_seconds", "device_low", "device_high")
    late = (entry["device_late"] or 0.0) > 0.1
    return (
        *milliseconds(entry, *times, "kernel_seconds"),
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
}
ADD_AND_CLIP = ("add + torch fused", "replay, clipped")


def host_table(case: dict, *, markdown: bool) -> str:
    """Returns title and table of one case of many tensors: medians and their ratios.

    The ratios: to the same code's plain step, to the peer of the setting (`PEERS`), and to adding
    the two gradients, ``clip_grad_norm_`` and the fused step one after the other.
    """
    rows = [("variant", "setting", "ms", "20 %", "80 %", "n", "/plain", "/peer", "/added")]
    for entry in case["variants"]:
        name, setting = entry["name"], entry["setting"]
        peers = (PEERS[setting], ADD_AND_CLIP) if name.startswith("dgg") else ()
        others = [find(case, *other) for other in ((name, "plain"), *peers)]
        cells = [*milliseconds(entry, "seconds", "low", "high"), str(entry["samples"])]
        cells += ratios(entry, others) + [""] * (3 - len(others))
        rows.append((name, setting, *cells))
    notes = [
        textwrap.fill(line, 100, subsequent_indent="    ")
        if line.startswith(("LOST", "not run"))
        else line
        for line in _notes(case)
    ]
    return page(_title(case), rows, notes, markdown=markdown)


def _title(case: dict) -> str:
    return (
        f"{case['case']}: {case['optimizer']}, {case['dtype']}, {case['elements']:,} elements in "
        f"{case['tensors']} tensor{'s' * (case['tensors'] > 1)}, {case['cache']} caches"
        + (", channels last" if case.get("channels_last") else "")
    )


def _notes(case: dict) -> list[str]:
    drawn = {
        (e["setting"], e["seed"], e["injected_fraction"])
        for e in case["variants"]
        if e["setting"].startswith("alpha")
    }
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
                if entry[figure] > other[figure]:
                    found.append(
                        f"LOST: {entry['name']} ({entry['setting']}) takes "
                        f"{entry[figure] / other[figure]:.2f} x the {words} of {other['name']} "
                        f"({other['setting']})"
                    )
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

    Args:
        what: What was measured.
        value: The result.
        shown: Format of the result.
        most: The target, if the value is not to be above it.
        least: The target, if the value is not to be below it; without both there is none.
        stated: Format of the target.
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
    pair = [find(case, *run) for run in (ours, theirs)] if case is not None else [None]
    if any(entry is None or entry[figure] is None for entry in pair):
        return None
    return pair[0][figure] / pair[1][figure]


FLAGSHIP = "adamw-float32-32Mi"
FOREACH = ("foreach + fused", "foreach + fused, d kept", "foreach + clip_grad_norm_ + fused")


def targets(cases: Iterable[dict], memory: Sequence[dict]) -> list[dict]:
    """Compares results with the project's targets: all that the results can speak to."""
    by_name = {case["case"]: case for case in cases}
    found: list[dict] = []

    def ratio(case_name, what, mine, other, most, name="dgg cpp") -> None:
        value = quotient(by_name.get(case_name), (name, mine), other)
        if value is None:
            return
        if mine.startswith("alpha"):
            what += f" ({find(by_name[case_name], name, mine)['samples']} steps)"
        found.append(target(f"{case_name}: {what}", value, most=most))

    clipped, always = ("torch fused", "clipped"), "guided, clipped / clip + fused"

    def against_fused(case_name, plain, guided, sampled) -> None:
        ratio(case_name, "plain / torch fused", "plain", ("torch fused", "plain"), plain)
        ratio(case_name, always, "guided", clipped, guided)
        ratio(case_name, "alpha=0.2, clipped / clip + fused", "alpha=0.2", clipped, sampled)

    against_fused(FLAGSHIP, 1.00, 0.90, 0.82)
    if FLAGSHIP in by_name:
        found += _judge_flagship(by_name[FLAGSHIP])
    for name in ("tiny448-cold", "tiny448-warm"):
        ratio(name, always, "guided", clipped, 0.15)
        best = ("torch fused, foreach clip", "clipped")
        ratio(name, "guided, clipped / foreach clip + fused", "guided", best, 0.15)
    ratio("tiny448-warm", "replay / plain", "replay", ("dgg cpp", "plain"), 1.50)
    # A LoRA's time is the memory's, too: it is shown without a target.
    for name, added, foreign in (("tiny448-warm", 0.25, 0.35), ("llava7b-lora16", None, None)):
        what = "replay, guided, clipped / add + clip + fused"
        ratio(name, what, "replay, guided", ADD_AND_CLIP, added)
        what = "Guidance over torch fused / foreach guidance + torch fused"
        ratio(name, what, "guided", PEERS["guided"], foreign, "dgg Guidance + torch fused")
    for kind in ("adamw-bfloat16", "sgd-float32", "momentum-float32", "sgd-bfloat16",
                 "momentum-bfloat16"):  # fmt: skip
        against_fused(f"{kind}-32Mi", 1.00, 1.00, 1.00)
    for entry in memory:
        what = f"memory: {entry['case']}, arrays of the weights' size beyond θ, g, m, v"
        judged = {"target": "1 (the anchor)", "met": entry["met"]}
        found.append({**target(what, entry["extra_arrays"]), **judged})
    return found


def _judge_flagship(case: dict) -> list[dict]:
    found = []
    reading = _reading_alone(case)
    for name in FOREACH:
        if (value := quotient(case, (name, "guided"), ("dgg cpp", "guided"))) is None:
            continue
        # The target is for guidance, `clip_grad_norm_` and the fused optimizer one after the other.
        # In the first every spare pass is taken out by hand: merely reading what a step must read
        # may take longer than the target leaves. The second buys its speed with another copy of
        # the weights.
        least = 4.2 if name == FOREACH[-1] else None
        found.append(target(f"{FLAGSHIP}: times faster than {name}", value, ".2f", least=least))
        if reading is not None:
            what = f"{FLAGSHIP}: … and if a step only read its 24 bytes an element"
            found.append(target(what, find(case, name, "guided")["seconds"] / reading, ".2f"))
    for setting in ("plain", "guided", "alpha=0.2"):
        entry = find(case, "dgg cpp", setting)
        if entry is not None and entry["share_of_bandwidth"] is not None:
            what = f"{FLAGSHIP}: {setting}, share of best of copy and triad"
            share = target(what, entry["share_of_bandwidth"], ".1%", least=0.9)
            found.append({**share, "target": "≥ 90 %"})
    return found


def _reading_alone(case: dict) -> float | None:
    """Returns the seconds that reading g twice and θ, m, v, θ* once takes at the fastest rate."""
    rates = [rate for name, rate in case["memory_bandwidth"].items() if name.startswith("read")]
    return 24 * case["elements"] / max(rates) if rates else None


def targets_table(found: Sequence[dict], *, markdown: bool) -> str:
    """Returns the table target, measured, met."""
    words = {True: "yes", False: "NO", None: "-"}
    rows = [("what", "target", "measured", "met")]
    rows += [(t["what"], t["target"], t["measured"], words[t["met"]]) for t in found]
    return table(rows, markdown=markdown) + "\n"


def bandwidth_line(bandwidth: dict[str, float]) -> str:
    """Returns one line about the measured bandwidth."""
    parts = ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in bandwidth.items())
    return f"memory bandwidth (a CPU's with write-allocate counted): {parts}"


def provenance(device) -> dict[str, object]:
    """Returns what a reader needs to judge or repeat the numbers."""
    import torch

    import dgg

    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    active = re.search(r"\[(\w+)\]", huge.read_text()) if huge.exists() else None
    configuration = dgg.show_config().splitlines()
    gpu = None
    if device.device.type == "cuda":
        gpu = {**gpu_report(), "cache": device.cache_bytes}
    return {
        "gpu": gpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": device.cache_bytes,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": active[1] if active else None,
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgg": dgg.__version__,
        "backends": [line.strip() for line in configuration[1:]],
        "compiler": (output(["g++", "--version"]) or "none").splitlines()[0],
        "commit": commit(),
        "uncommitted_changes": uncommitted_changes(),
    }


# What nvidia-smi is asked for; asking changes nothing.
_GPU_FIELDS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
    "utilization.gpu", "ecc.mode.current", "mig.mode.current", "compute_cap",
)  # fmt: skip


def gpu_report() -> dict[str, str | None]:
    """Returns what nvidia-smi and torch say about the GPU; no setting is touched."""
    import torch

    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "-i"]
    place = torch.cuda.current_device() if torch.cuda.is_available() else 0
    answer = output([*query, str(place)])
    values = [value.strip() for value in answer.split(",")] if answer else []
    found: dict[str, str | None] = dict.fromkeys(_GPU_FIELDS)
    if len(values) == len(_GPU_FIELDS):
        found.update(zip(_GPU_FIELDS, values, strict=True))
    elif torch.cuda.is_available():
        found["name"] = torch.cuda.get_device_name(place)
    found["cuda"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def commit() -> str | None:
    """Returns the commit that is checked out; None: not known here."""
    return _git("rev-parse", "HEAD")


def uncommitted_changes() -> bool | None:
    """Returns whether tracked files differ from the commit; None: not known here."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def _git(*arguments: str) -> str | None:
    return output(["git", "-C", str(pathlib.Path(__file__).parent), *arguments])


def cpu_model() -> str:
    """Returns the processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def output(command: list[str]) -> str | None:
    """Returns what a short command prints; None: it is not here, or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance_lines(found: dict) -> str:
    """Returns where and when the numbers were taken."""
    gpu = found.get("gpu") or {}
    card = (
        f"{gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}, CUDA "
        f"{gpu['cuda']}, Triton {gpu['triton']}, SM {gpu['clocks.sm']} of {gpu['clocks.max.sm']}, "
        f"memory {gpu['clocks.mem']} of {gpu['clocks.max.mem']}, power {gpu['power.draw']} of "
        f"{gpu['power.limit']}, {gpu['temperature.gpu']} °C\n"
        if gpu
        else ""
    )
    backends = "; ".join(" ".join(line.split()) for line in found["backends"] if "usable" in line)
    load = ", ".join(f"{x:.2f}" for x in found["load_average"])
    commit = (found["commit"] or "unknown")[:12] + (
        " with uncommitted changes" if found["uncommitted_changes"] else ""
    )
    return (
        f"{card}{found['cpu']}, {found['cores']} cores, {found['threads']} threads, "
        f"{found['memory'] / 2**30:.0f} GiB, last-level cache "
        f"{found['last_level_cache'] / 2**20:.1f} MiB, huge pages: {found['huge_pages']}\n"
        f"torch {found['torch']}, dgg {found['dgg']}, {found['compiler']}, "
        f"Python {found['python']}\n{backends}\n"
        f"commit {commit}, {found['date']}, load average {load}"
    )


class Printer:
    """Prints lines and keeps them for the page written beside the JSON.

    Args:
        markdown: Tables are to be markdown.
        folder: Where JSON and page go; None: nothing is written.
        kind: Their name, before the date.
    """

    def __init__(
        self, markdown: bool = False, folder: pathlib.Path | None = None, kind: str = ""
    ) -> None:
        self.markdown, self.lines, self._folder = markdown, [], folder
        self._stem = f"{kind}-{time.strftime('%Y-%m-%d', time.gmtime())}"

    def __call__(self, line: str) -> None:
        """Prints one line or paragraph."""
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
