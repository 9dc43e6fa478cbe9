# SPDX-License-Identifier: BSD-3-Clause
"""Profiles the optimizer steps of a LoRA training: what runs, on the host and on the device.

    python bench/gpu/nsys_step.py --launch --out build/profile   # what `make profile` runs

With ``--launch`` it starts itself under Nsight Systems where there is a GPU and `nsys`, and prints
the summaries of kernels and ranges; the capture covers the measured steps alone, after the warm-up
(cudaProfilerApi). Elsewhere torch.profiler takes its place, on the CPU too, and writes a trace for
https://ui.perfetto.dev. docs/profiling.md reads the output.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

import dgg
from llava_shaped import TINY, Shape, batch, make
from report import table

WARM_UP = 10
RANGES = ("dgg.step", "dgg.norm", "dgg.allreduce", "dgg.update", "dgg.prefetch")
# As many tensors as LLaVA-7B's LoRA has, and small enough for a CPU.
NARROW = Shape(hidden=256, intermediate=688, heads=8, vocabulary=1000, vision=64, patches=32)
SHAPES = {"llava7b": Shape(), "narrow": NARROW, "tiny": TINY}
# At once: a step may take seconds.
say = functools.partial(print, flush=True)


class Training:
    """A LoRA training whose optimizer is profiled; ``options`` are dgg.AdamW's."""

    def __init__(self, device: torch.device, shape: str, rank: int, **options) -> None:
        sizes = SHAPES[shape]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = make(sizes, device, dtype, rank)
        text = 448 if shape == "llava7b" else sizes.patches
        self.data = batch(sizes, device, dtype, text)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = dgg.AdamW(self.params, lr=1e-4, max_grad_norm=1.0, **options)
        self.optimizer.set_anchor()

    def step(self) -> None:
        """Takes one training step."""
        self.model(*self.data).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def warm_up(training: Training) -> None:
    """Takes the steps that compile kernels and fill caches."""
    for number in range(WARM_UP):
        say(f"warm-up: step {number + 1} of {WARM_UP}")
        training.step()


def under_nsys(training: Training, steps: int) -> None:
    """Runs the steps with the capture range round the measured ones; nsys does the rest."""
    warm_up(training)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for number in range(steps):
        say(f"nsys records: step {number + 1} of {steps}")
        training.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def by_torch(training: Training, steps: int, trace: pathlib.Path):
    """Profiles the steps with torch.profiler; writes the trace and returns the events."""
    warm_up(training)
    kinds = torch.profiler.ProfilerActivity
    on_gpu = training.params[0].device.type == "cuda"
    # One step is thrown away: the profiler's own beginning is in it.
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU], schedule=schedule
    ) as profiler:
        for number in range(1 + steps):
            what = f"step {number} of {steps}" if number else "a step that is thrown away"
            say(f"torch.profiler records: {what}")
            training.step()
            if on_gpu:
                torch.cuda.synchronize()
            profiler.step()
    say(f"writing {trace}")
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return list(profiler.events())


def tables(events, steps: int) -> str:
    """Returns what the ranges and what is in them took, per step, of the events of `by_torch`."""
    on_host = torch.autograd.DeviceType.CPU
    host = [event for event in events if event.device_type == on_host]
    spans = [event.time_range for event in host if event.name == "dgg.step"]

    def inside(event, *, end: bool) -> bool:
        time = event.time_range
        last = time.end if end else time.start
        return any(span.start <= time.start and last <= span.end for span in spans)

    named = _grouped(host)
    ranges = {name: named[name] for name in RANGES if name in named}
    within = _grouped(e for e in host if e.name not in RANGES and inside(e, end=True))
    launched = {k.name for e in host if inside(e, end=False) for k in e.kernels}
    # A range of the host has a shadow of its name on the device.
    kernels = _grouped(e for e in events if e.device_type != on_host and e.name not in named)
    ours = {name: group for name, group in kernels.items() if name in launched}
    others = {name: group for name, group in kernels.items() if name not in launched}
    found = [_table("range", "host", ranges or {"no range of dgg was seen": []}, steps)]
    for what, clock, groups, most in (
        ("operator on the host, within dgg.step", "host", within, 12),
        ("kernel or copy launched within dgg.step", "device", ours, 20),
        ("other kernel or copy of the training step", "device", others, 12),
    ):
        longest = sorted(groups.items(), key=lambda item: -_seconds(item[1]))[:most]
        if longest:
            found.append(_table(what, clock, dict(longest), steps))
    return "\n\n".join(found) + "\n"


def _grouped(events) -> dict[str, list]:
    groups: dict[str, list] = {}
    for event in events:
        groups.setdefault(event.name, []).append(event)
    return groups


def _seconds(events) -> float:
    return sum(event.time_range.end - event.time_range.start for event in events) * 1e-6


def _table(what: str, clock: str, groups: dict[str, list], steps: int) -> str:
    rows = [(what, "times a step", f"{clock} ms a step")]
    for name, events in groups.items():
        spent = f"{_seconds(events) / steps * 1e3:.4f}" if events else ""
        rows.append((name[:90], f"{len(events) / steps:g}" if events else "", spent))
    return table(rows, markdown=True)


def launch(nsys: str, out: pathlib.Path, arguments: list[str]) -> bool:
    """Profiles under nsys and prints its summaries; returns whether there is a report."""
    out.mkdir(parents=True, exist_ok=True)
    report = out / "step.nsys-rep"
    report.unlink(missing_ok=True)
    command = [
        nsys, "profile", "-t", "cuda,nvtx,osrt", "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop", "--force-overwrite=true", "-o", str(out / "step"),
        sys.executable, __file__, "--captured", *arguments,
    ]  # fmt: skip
    say(f"profiling under nsys; the report goes to {report}")
    done = subprocess.run(command, env={**os.environ, "DGG_NVTX": "1"})
    if done.returncode or not report.exists():
        print(f"nsys made no report (exit code {done.returncode}): torch.profiler instead")
        return False
    say("summing up what nsys recorded")
    reports = "cuda_gpu_kern_sum,cuda_gpu_mem_time_sum,nvtx_sum,cuda_api_sum"
    subprocess.run([nsys, "stats", "--force-export=true", "--report", reports, str(report)])
    print(f"{report}: open it in Nsight Systems")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Profiles the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch", action="store_true", help="under nsys where that can be")
    parser.add_argument("--captured", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/profile"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--shape", choices=SHAPES, help="default: llava7b, on a CPU narrow")
    parser.add_argument("--rank", type=int, default=16)
    # Traces of more steps are too large to open.
    parser.add_argument("--steps", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--alpha", type=float, default=1.0, help="1: every step injects")
    parser.add_argument("--backend", choices=("cpp", "triton", "reference"))
    parser.add_argument("--anchor-device", choices=("cpu",), help="anchors on the host")
    options = parser.parse_args(arguments)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here that torch can use")
    nsys = shutil.which("nsys")
    if options.launch and name == "cuda" and nsys:
        given = sys.argv[1:] if arguments is None else arguments
        if launch(nsys, options.out, [a for a in given if a != "--launch"]):
            return 0
    elif options.launch:
        print("no nsys here: torch.profiler" if name == "cuda" else "no GPU here: torch.profiler")
    trace = options.out / "step-trace.json.gz"
    shape = options.shape or ("llava7b" if name == "cuda" else "narrow")
    if not options.captured:
        say(f"profiling with torch.profiler; the trace goes to {trace}")
    say(f"building the model: shape {shape}, LoRA of rank {options.rank}, on {name}")
    training = Training(
        torch.device(name), shape, options.rank, alpha=options.alpha, backend=options.backend,
        anchor_device=options.anchor_device,
    )  # fmt: skip
    if options.captured:
        under_nsys(training, options.steps)
        return 0
    events = by_torch(training, options.steps, trace)
    print("\n" + dgg.show_config() + "\n")
    print(tables(events, options.steps))
    print(f"{trace}: open it at https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    sys.exit(main())
