# SPDX-License-Identifier: BSD-3-Clause
"""Tables, targets on a CPU, JSON and plots of the step benchmark."""

from __future__ import annotations

import json
import pathlib
import textwrap
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


def case_table(case: dict, *, markdown: bool) -> str:
    """Returns title and table of one case, and the comparisons that dgg loses."""
    if case.get("device", "cpu") != "cpu":
        rows = [GPU_HEADER, *(_gpu_row(case, entry) for entry in case["variants"])]
        return _page(case, rows, markdown)
    rows = [HEADER]
    for entry in case["variants"]:
        ratios = _ratios(case, entry, "seconds")
        known = entry["bytes"] is not None
        share = entry["share_of_bandwidth"]
        rows.append(
            (
                entry["name"],
                entry["setting"],
                _figure(entry["seconds"] * 1e3),
                _figure(entry["low"] * 1e3),
                _figure(entry["high"] * 1e3),
                str(entry["samples"]),
                _figure(entry["ns_per_element"]),
                f"{entry['bytes_per_element']:.1f}" if known else "",
                f"{entry['bandwidth'] / 1e9:.1f}" if known else "",
                f"{share:.0%}" if share is not None else "",
                *ratios,
            )
        )
    return _page(case, rows, markdown)


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
        others = (
            find(case, name, "plain"),
            find(case, *PEERS[setting]) if name.startswith("dgg") else None,
            find(case, *ADD_AND_CLIP) if name.startswith("dgg") else None,
        )
        ratios = [
            "" if other is None else f"{entry['seconds'] / other['seconds']:.2f}"
            for other in others
        ]
        times = [_figure(entry[figure] * 1e3) for figure in ("seconds", "low", "high")]
        rows.append((name, setting, *times, str(entry["samples"]), *ratios))
    page = _page(case, rows, markdown)
    lines = page.splitlines()
    return "\n".join(
        textwrap.fill(line, 100, subsequent_indent="    ")
        if line.startswith(("LOST", "not run"))
        else line
        for line in lines
    ) + "\n" * page.endswith("\n")


def _ratios(case: dict, entry: dict, figure: str) -> list[str]:
    opponents = [find(case, *opponent) for opponent in OPPONENTS]
    return [
        "" if opponent is None else f"{entry[figure] / opponent[figure]:.2f}"
        for opponent in opponents
    ]


def _gpu_row(case: dict, entry: dict) -> tuple[str, ...]:
    def milliseconds(figure: str) -> str:
        return "" if entry[figure] is None else _figure(entry[figure] * 1e3)

    known, share = entry["bytes"] is not None, entry["share_of_bandwidth"]
    late = entry["device_late"] or 0.0
    return (
        entry["name"],
        entry["setting"],
        *map(milliseconds, ("seconds", "host_seconds", "device_seconds")),
        *map(milliseconds, ("device_low", "device_high")),
        milliseconds("kernel_seconds"),
        "" if entry["launches"] is None else str(entry["launches"]),
        "yes" if entry["waits_for_device"] else "no",
        "" if entry["temporary_bytes"] is None else f"{entry['temporary_bytes'] / 2**20:.1f}",
        f"{entry['samples']}{' late' if late > 0.1 else ''}",
        f"{entry['bytes_per_element']:.1f}" if known else "",
        f"{entry['bandwidth'] / 1e9:.0f}" if known else "",
        "" if share is None else f"{share:.1%}",
        *_ratios(case, entry, "seconds"),
        *_ratios(case, entry, "device_seconds"),
    )


def _page(case: dict, rows: Sequence[Sequence[str]], markdown: bool) -> str:
    title = (
        f"{case['case']}: {case['optimizer']}, {case['dtype']}, {case['elements']:,} elements in "
        f"{case['tensors']} tensor{'s' * (case['tensors'] > 1)}, {case['cache']} caches"
        + (", channels last" if case.get("channels_last") else "")
    )
    lines = [f"### {title}\n" if markdown else title, table(rows, markdown=markdown)]
    drawn = {
        (e["setting"], e["seed"], e["injected_fraction"])
        for e in case["variants"]
        if e["setting"].startswith("alpha")
    }
    for setting, seed, fraction in sorted(drawn):
        lines.append(f"{setting}: seed {seed}, {fraction:.1%} of the draws in the window inject")
    for missing in case["not_run"]:
        lines.append(f"not run: {missing['name']} ({missing['setting']}): {missing['reason']}")
    if case.get("device", "cpu") != "cpu":
        if case["profiler"]:
            lines.append(f"no kernel times: {case['profiler']}")
        if any((entry["device_late"] or 0.0) > 0.1 for entry in case["variants"]):
            lines.append("late: the host did not keep ahead, its time is in the device time")
    lines.extend(losses(case))
    return "\n".join(lines) + "\n"


def losses(case: dict) -> list[str]:
    """Returns a line for every comparison that dgg loses, by the medians."""
    figures = [("seconds", "time")]
    if case.get("device", "cpu") != "cpu":
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


def _reading_alone(case: dict) -> float | None:
    """Returns the seconds that reading g twice and θ, m, v, θ* once takes at the fastest rate."""
    rates = [rate for name, rate in case["memory_bandwidth"].items() if name.startswith("read")]
    return 24 * case["elements"] / max(rates) if rates else None


def targets(cases: Iterable[dict], memory: Sequence[dict]) -> list[dict]:
    """Compares results with the project's targets.

    Returns:
        For every target that the results can speak to: what, target, measured, met.
    """
    by_name = {case["case"]: case for case in cases}
    found: list[dict] = []

    def ratio(case_name, what, mine, other, limit, name="dgg cpp") -> None:
        case = by_name.get(case_name)
        if case is None:
            return
        ours, theirs = find(case, name, mine), find(case, *other)
        if ours is None or theirs is None:
            return
        value = ours["seconds"] / theirs["seconds"]
        if mine.startswith("alpha"):
            what += f" ({ours['samples']} steps)"
        found.append(
            {"what": f"{case_name}: {what}",
             "target": "no target" if limit is None else f"≤ {limit:.2f}",
             "measured": f"{value:.3f}", "value": value,
             "met": None if limit is None else value <= limit}
        )  # fmt: skip

    fused, clipped = ("torch fused", "plain"), ("torch fused", "clipped")
    ratio("adamw-float32-32Mi", "plain / torch fused", "plain", fused, 1.00)
    ratio("adamw-float32-32Mi", "guided, clipped / clip + fused", "guided", clipped, 0.90)
    ratio("adamw-float32-32Mi", "alpha=0.2, clipped / clip + fused", "alpha=0.2", clipped, 0.82)
    flagship = by_name.get("adamw-float32-32Mi")
    foreach = ("foreach + fused", "foreach + fused, d kept", "foreach + clip_grad_norm_ + fused")
    reading = _reading_alone(flagship) if flagship else None
    for name in foreach if flagship else ():
        ours, theirs = find(flagship, "dgg cpp", "guided"), find(flagship, name, "guided")
        if ours is None or theirs is None:
            continue
        value = theirs["seconds"] / ours["seconds"]
        # The target is for guidance, `clip_grad_norm_` and the fused optimizer one after the other.
        # In the first every spare pass is taken out by hand: merely reading what a step must read
        # may take longer than the target leaves. The second buys its speed with another copy of
        # the weights.
        named = name == foreach[-1]
        found.append(
            {"what": f"adamw-float32-32Mi: times faster than {name}",
             "target": "≥ 4.20" if named else "no target", "measured": f"{value:.2f}",
             "value": value, "met": value >= 4.2 if named else None}
        )  # fmt: skip
        if reading is not None:
            value = theirs["seconds"] / reading
            found.append(
                {"what": "adamw-float32-32Mi: … and if a step only read its 24 bytes an element",
                 "target": "no target", "measured": f"{value:.2f}", "value": value, "met": None}
            )  # fmt: skip
    for setting in ("plain", "guided", "alpha=0.2"):
        entry = find(flagship, "dgg cpp", setting) if flagship else None
        if entry is not None and entry["share_of_bandwidth"] is not None:
            value = entry["share_of_bandwidth"]
            found.append(
                {"what": f"adamw-float32-32Mi: {setting}, share of best of copy and triad",
                 "target": "≥ 90 %", "measured": f"{value:.1%}", "value": value,
                 "met": value >= 0.9}
            )  # fmt: skip
    for name in ("tiny448-cold", "tiny448-warm"):
        ratio(name, "guided, clipped / clip + fused", "guided", clipped, 0.15)
        best = ("torch fused, foreach clip", "clipped")
        ratio(name, "guided, clipped / foreach clip + fused", "guided", best, 0.15)
    ratio("tiny448-warm", "replay / plain", "replay", ("dgg cpp", "plain"), 1.50)
    for name in ("tiny448-warm", "llava7b-lora16"):
        judged = name == "tiny448-warm"
        ratio(name, "replay, guided, clipped / add + clip + fused", "replay, guided",
              ADD_AND_CLIP, 0.25 if judged else None)  # fmt: skip
        ratio(name, "Guidance over torch fused / foreach guidance + torch fused", "guided",
              ("foreach + fused", "guided"), 0.35 if judged else None,
              "dgg Guidance + torch fused")  # fmt: skip
    for name in ("adamw-bfloat16-32Mi", "sgd-float32-32Mi", "momentum-float32-32Mi",
                 "sgd-bfloat16-32Mi", "momentum-bfloat16-32Mi"):  # fmt: skip
        ratio(name, "plain / torch fused", "plain", fused, 1.00)
        ratio(name, "guided, clipped / clip + fused", "guided", clipped, 1.00)
        ratio(name, "alpha=0.2, clipped / clip + fused", "alpha=0.2", clipped, 1.00)
    for entry in memory:
        found.append(
            {"what": f"memory: {entry['case']}, arrays of the weights' size beyond θ, g, m, v",
             "target": "1 (the anchor)", "measured": f"{entry['extra_arrays']:.3f}",
             "value": entry["extra_arrays"], "met": entry["met"]}
        )  # fmt: skip
    return found


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


def write(
    folder: pathlib.Path, results: dict, text: str, stem: str, *, drawn: bool = True
) -> list[pathlib.Path]:
    """Writes JSON, table and (unless ``drawn`` is False) plots; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    replace(data, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    replace(page, text)
    return [data, page, *(plots(folder, results, stem) if drawn else [])]


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: who is interrupted leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def plots(folder: pathlib.Path, results: dict, stem: str) -> list[pathlib.Path]:
    """Draws time and share of bandwidth over the number of elements, a file per optimizer."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    single = [case for case in results["cases"] if case["tensors"] == 1]
    for kind in sorted({(case["optimizer"], case["dtype"]) for case in single}):
        cases = sorted(
            (c for c in single if (c["optimizer"], c["dtype"]) == kind), key=lambda c: c["elements"]
        )
        if len(cases) < 2:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
        names = dict.fromkeys((e["name"], e["setting"]) for c in cases for e in c["variants"])
        for number, (name, setting) in enumerate(names):
            points = [(c["elements"], find(c, name, setting)) for c in cases]
            points = [(n, e) for n, e in points if e is not None]
            style = {
                "marker": "o" if name.startswith("dgg") else ".",
                "linewidth": 2.2 if name.startswith("dgg") else 1.1,
                "linestyle": "-" if name.startswith("dgg") else "--",
                "color": f"C{number % 10}" if number < 10 else "0.5",
            }
            sizes, label = [n for n, _ in points], f"{name}, {setting}"
            left.plot(sizes, [e["ns_per_element"] for _, e in points], label=label, **style)
            shares = [(n, e["share_of_bandwidth"]) for n, e in points if e["share_of_bandwidth"]]
            if shares:
                right.plot(*zip(*shares, strict=True), label=label, **style)
        left.set(xscale="log", yscale="log", xlabel="elements", ylabel="ns per element and step")
        right.axhline(1.0, color="black", linewidth=0.8)
        right.set(
            xscale="log", xlabel="elements", ylabel="share of the best of copy and triad", ylim=0
        )
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        found = results["provenance"]
        where = f"{found['cpu']}, {found['threads']} threads"
        if found.get("gpu"):
            where = found["gpu"]["name"]
        figure.suptitle(
            f"{kind[0]}, {kind[1]}, one tensor: {where}, torch {found['torch']}", fontsize=10
        )
        figure.tight_layout(rect=(0, 0.06 + 0.035 * ((len(labels) + 3) // 4), 1, 1))
        path = folder / f"{stem}-{kind[0]}-{kind[1]}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        files.append(path)
    return files
