# SPDX-License-Identifier: BSD-3-Clause
"""What the project wants to see of its GPU kernels, against what was measured; for step.py.

Each target is judged for either backend. Device time is used for claims about kernels, wall time
for claims about steps, host time for claims about overhead; the column says which.
"""

from __future__ import annotations

from collections.abc import Iterable

from report import find, table

BACKENDS = ("dgg cpp", "dgg triton")
PLAIN, CLIPPED = ("torch fused", "plain"), ("torch fused", "clipped")
FOREACH = ("foreach + clip_grad_norm_ + fused", "guided")
FOREACH_LEAN = ("foreach + fused", "guided")
COMPILED = ("torch.compile", "guided")
LARGE = ("adamw-float32-256Mi", "adamw-bfloat16-256Mi")
LORA = "llava7b-lora16"
DEVICE, WALL, HOST = "device_seconds", "seconds", "host_seconds"
# (case, our setting, opponent, figure, at most); None: shown without a target.
RATIOS = [
    *((case, "guided", CLIPPED, DEVICE, 0.90) for case in LARGE),
    *((case, "alpha=0.2", CLIPPED, DEVICE, 0.84) for case in LARGE),
    *((case, "guided", COMPILED, DEVICE, 0.85) for case in LARGE),
    *((case, "plain", PLAIN, DEVICE, None) for case in LARGE),
    *((case, "alpha=0", PLAIN, DEVICE, None) for case in LARGE),
    *((case, "alpha=0.05", CLIPPED, DEVICE, None) for case in LARGE),
    (LORA, "plain", PLAIN, HOST, 0.30),
    (LORA, "guided", CLIPPED, HOST, 0.30),
    (LORA, "guided", PLAIN, HOST, None),
    (LORA, "guided", CLIPPED, WALL, None),
]
# (case, opponent, figure, at least).
SPEEDUPS = [
    *((case, FOREACH, DEVICE, 2.0) for case in LARGE),
    *((case, FOREACH_LEAN, DEVICE, None) for case in LARGE),
    (LORA, FOREACH, WALL, 5.0),
    (LORA, FOREACH_LEAN, WALL, None),
]
SHARE = 0.90
# Kernels that a guided, clipped step of one dtype launches, however many tensors it has.
LAUNCHES = 2
_WORDS = {DEVICE: "device time", WALL: "wall time", HOST: "host time"}


def gpu_targets(cases: Iterable[dict]) -> list[dict]:
    """Returns for every target that the results can speak to: what, target, measured, met."""
    by_name = {case["case"]: case for case in cases}
    found: list[dict] = []

    def add(what: str, value: float, shown: str, target: str, met: bool | None) -> None:
        found.append(
            {"what": what, "target": target, "measured": shown, "value": value, "met": met}
        )

    def pair(case_name: str, backend: str, setting: str, other: tuple[str, str], figure: str):
        case = by_name.get(case_name)
        if case is None:
            return None
        ours, theirs = find(case, backend, setting), find(case, *other)
        if ours is None or theirs is None or ours[figure] is None or theirs[figure] is None:
            return None
        return ours[figure], theirs[figure]

    for backend in BACKENDS:
        for name, setting, other, figure, limit in RATIOS:
            if (both := pair(name, backend, setting, other, figure)) is None:
                continue
            value = both[0] / both[1]
            add(
                f"{name}, {backend}: {setting} / {' '.join(other)}, {_WORDS[figure]}",
                value,
                f"{value:.3f}",
                "no target" if limit is None else f"≤ {limit:.2f}",
                None if limit is None else value <= limit,
            )
        for name, other, figure, least in SPEEDUPS:
            if (both := pair(name, backend, "guided", other, figure)) is None:
                continue
            value = both[1] / both[0]
            add(
                f"{name}, {backend}: times faster than {other[0]}, {_WORDS[figure]}",
                value,
                f"{value:.2f}",
                "no target" if least is None else f"≥ {least:.1f}",
                None if least is None else value >= least,
            )
        for name, case in by_name.items():
            judged = case["elements"] >= 2**28 and case["optimizer"] == "adamw"
            for entry in case["variants"] if judged else ():
                share = entry["share_of_bandwidth"]
                if entry["name"] != backend or share is None:
                    continue
                add(
                    f"{name}, {backend}: {entry['setting']}, share of copy bandwidth",
                    share,
                    f"{share:.1%}",
                    f"≥ {SHARE:.0%}",
                    share >= SHARE,
                )
        lora = by_name.get(LORA)
        for entry in lora["variants"] if lora else ():
            if entry["name"] == backend and entry["launches"] is not None:
                add(
                    f"{LORA}, {backend}: {entry['setting']}, kernel launches of a step",
                    entry["launches"],
                    str(entry["launches"]),
                    f"≤ {LAUNCHES}",
                    entry["launches"] <= LAUNCHES,
                )
        entries = [e for c in by_name.values() for e in c["variants"] if e["name"] == backend]
        if entries:
            waiting = sum(entry["waits_for_device"] is not None for entry in entries)
            add(
                f"{backend}: of {len(entries)} measured steps, those that wait for the device",
                waiting,
                str(waiting),
                "0",
                waiting == 0,
            )
    return found


def backend_table(cases: Iterable[dict], *, markdown: bool) -> str:
    """Returns the two backends side by side, from which the default follows; "" for none."""
    rows = [("case", "setting", "cpp / triton: wall", "host", "device")]
    for case in cases:
        for entry in case["variants"]:
            other = find(case, "dgg triton", entry["setting"])
            if entry["name"] == "dgg cpp" and other is not None:
                ratios = [f"{entry[figure] / other[figure]:.2f}" for figure in (WALL, HOST, DEVICE)]
                rows.append((case["case"], entry["setting"], *ratios))
    return table(rows, markdown=markdown) + "\n" if len(rows) > 1 else ""
