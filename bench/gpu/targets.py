# SPDX-License-Identifier: BSD-3-Clause
"""What the project wants to see of its GPU kernels, against what was measured; for step.py.

Each target is judged for either backend. Device time is used for claims about kernels, wall time
for claims about steps, host time for claims about overhead; the column says which.
"""

from __future__ import annotations

from collections.abc import Iterable

from report import find, quotient, ratios, table, target

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
    for backend in BACKENDS:
        guided = (backend, "guided")
        for name, setting, other, figure, limit in RATIOS:
            value = quotient(by_name.get(name), (backend, setting), other, figure)
            if value is not None:
                what = f"{setting} / {' '.join(other)}, {_WORDS[figure]}"
                found.append(target(f"{name}, {backend}: {what}", value, most=limit))
        for name, other, figure, least in SPEEDUPS:
            value = quotient(by_name.get(name), other, guided, figure)
            if value is not None:
                what = f"{name}, {backend}: times faster than {other[0]}, {_WORDS[figure]}"
                found.append(target(what, value, ".2f", least=least, stated=".1f"))
        ours = [(name, case, e) for name, case in by_name.items() for e in case["variants"]
                if e["name"] == backend]  # fmt: skip
        for name, case, entry in ours:
            judged = case["elements"] >= 2**28 and case["optimizer"] == "adamw"
            if judged and (share := entry["share_of_bandwidth"]) is not None:
                what = f"{name}, {backend}: {entry['setting']}, share of copy bandwidth"
                found.append(target(what, share, ".1%", least=SHARE, stated=".0%"))
        for name, _, entry in ours:
            if name == LORA and entry["launches"] is not None:
                what = f"{LORA}, {backend}: {entry['setting']}, kernel launches of a step"
                found.append(target(what, entry["launches"], "", most=LAUNCHES, stated=""))
        if ours:
            waiting = sum(entry["waits_for_device"] is not None for *_, entry in ours)
            what = f"{backend}: of {len(ours)} measured steps, those that wait for the device"
            found.append({**target(what, waiting, "", most=0), "target": "0"})
    return found


def backend_table(cases: Iterable[dict], *, markdown: bool) -> str:
    """Returns the two backends side by side, from which the default follows; "" for none."""
    rows = [("case", "setting", "cpp / triton: wall", "host", "device")]
    for case in cases:
        for entry in case["variants"]:
            other = find(case, "dgg triton", entry["setting"])
            if entry["name"] == "dgg cpp" and other is not None:
                cells = [ratios(entry, [other], figure)[0] for figure in (WALL, HOST, DEVICE)]
                rows.append((case["case"], entry["setting"], *cells))
    return table(rows, markdown=markdown) + "\n" if len(rows) > 1 else ""
