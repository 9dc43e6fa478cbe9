# SPDX-License-Identifier: BSD-3-Clause
"""How long a whole training step takes, and how much of it is the optimizer's.

    python bench/training_step.py --device cuda --out runs/training
    python bench/training_step.py --preset smoke     # tiny, on the CPU: tests this script

Forward, backward and optimizer step of a model with LLaVA-7B's shapes (llava_shaped.py), bfloat16,
one image and 448 tokens of text (1,024 positions): with LoRA of rank 16 and 128 on every linear
layer, and full fine-tuning of as many layers as fit into the memory. The variants run one after the
other, each alone in memory, in two blocks of which the second is in reverse order; a block injects
at exactly the wanted share of its steps. A step is timed from an idle device to an idle device, and
its optimizer from the end of the backward pass to the end of the update, both on the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dgg
from dgg import backends
from llava_shaped import TINY, LlavaShaped, Shape, batch, make
from machine import Cpu, DeviceLost, device_of, give_up
from provenance import provenance
from report import Printer, absences, first_line, page, ratios
from timing import weighed
from torch_variants import guide_by_foreach
from variant import injections

SCHEMA = 1
LR, CLIP = 1e-4, 1.0
WARM_UP = 3
# Seconds of (step, optimizer) by whether the step injects.
Times = dict[bool, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    build: Callable  # (parameters, alpha, seed) → a step that takes whether to inject
    alpha: float | None  # share of the steps that inject; None: no guidance
    steps: int  # that are measured in a block


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str
    shape: Shape
    rank: int | None  # of LoRA; None: full fine-tuning
    text: int = 448  # tokens
    dtype: torch.dtype = torch.bfloat16  # of the weights; adapters are float32


def _torch_fused(params: Sequence[Tensor], alpha, seed):
    """Torch's optimizer, behind guidance by foreach if there is an alpha."""
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    anchors = []
    if alpha is not None:
        anchors = [p.detach().clone() for p in params]
        _leave(params)

    @torch.no_grad()
    def step(inject: bool) -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
        if inject:
            guide_by_foreach(params, anchors, dtype=params[0].dtype)
        optimizer.step()

    return step


def _dgg(backend: str, anchor_device: str | None = None):
    def build(params: Sequence[Tensor], alpha, seed):
        optimizer = dgg.AdamW(
            params, lr=LR, alpha=alpha, seed=seed, max_grad_norm=CLIP, backend=backend,
            anchor_device=anchor_device,
        )  # fmt: skip
        optimizer.set_anchor()
        _leave(params)
        return lambda inject: optimizer.step()

    return build


@torch.no_grad()
def _leave(params: Sequence[Tensor]) -> None:
    # At the anchor itself there is no guidance. More than bfloat16 rounds away.
    torch._foreach_mul_(list(params), 1.01)


def variants(device: Cpu, steps: int) -> tuple[list[Variant], list[dict[str, str]]]:
    """Returns the variants that can run here, and why the others cannot."""
    wanted = [
        Variant("torch fused + clip", _torch_fused, None, steps),
        Variant("foreach guidance + clip + torch fused", _torch_fused, 0.2, steps),
    ]
    missing = []
    for backend in ("cpp", "triton"):
        if (reason := backends.unavailable(backend, device.device)) is not None:
            missing.append({"name": f"dgg {backend}", "reason": reason})
            continue
        wanted.append(Variant(f"dgg {backend}", _dgg(backend), 0.2, steps))
        wanted.append(Variant(f"dgg {backend}", _dgg(backend), 0.05, 2 * steps))
        if device.name != "cpu":
            name = f"dgg {backend}, anchor on the host"
            wanted.append(Variant(name, _dgg(backend, "cpu"), 0.05, 2 * steps))
    return wanted, missing


def models(device: Cpu, preset: str) -> list[Model]:
    """Returns what is trained: LoRA of two ranks, and in full what fits."""
    if preset == "smoke":
        small = {"text": 8, "dtype": torch.float32}
        return [Model("lora2", TINY, 2, **small), Model("full-2-layers", TINY, None, **small)]
    low, high = (Model(f"llava7b-lora{rank}", Shape(), rank) for rank in (16, 128))
    full = fitting(device.free_bytes())
    return [low, Model(f"full-{full.layers}-layers", full, None), high]


def fitting(free: int) -> Shape:
    """Returns the deepest model whose full fine-tuning fits into ``free`` bytes for every variant.

    θ, g, m, v, θ* and a temporary of the eager guidance in bfloat16, and a seventh for activations.
    """
    shape = Shape()
    while shape.layers > 1 and shape.parameters() * 2 * 7 > 0.9 * free:
        shape = dataclasses.replace(shape, layers=shape.layers - 1)
    return shape


def mark(device: Cpu):
    """Notes where the device is: an event on a GPU, the host's clock on a CPU."""
    if device.name == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def train(
    model: LlavaShaped, data, variant: Variant, device: Cpu
) -> tuple[Times, dict[str, int | None]]:
    """Trains one block; returns (step, optimizer) seconds by kind of step, and bytes."""
    params = [p for p in model.parameters() if p.requires_grad]
    alpha = variant.alpha or 0.0
    for seed in itertools.count():
        pattern = injections(seed, alpha, WARM_UP + variant.steps)
        # Warm-up steps are draws too: the window begins behind them.
        if sum(pattern[WARM_UP:]) == round(alpha * variant.steps):
            break
    step = variant.build(params, variant.alpha, seed)
    times: Times = {}
    on_gpu = device.name != "cpu"
    for number, inject in enumerate(pattern):
        if number == WARM_UP and on_gpu:
            device.synchronize()
            torch.cuda.reset_peak_memory_stats()
        device.synchronize()
        begin = time.perf_counter()
        loss = model(*data)
        loss.backward()
        before = mark(device)
        step(inject)
        after = mark(device)
        for p in params:
            p.grad = None
        device.synchronize()
        if number >= WARM_UP:
            total = time.perf_counter() - begin
            taken = before.elapsed_time(after) * 1e-3 if on_gpu else after - before
            times.setdefault(inject, []).append((total, taken))
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{variant.name}: the loss is {loss.item()}")
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    steady = torch.cuda.memory_allocated() if on_gpu else None
    return times, {"peak": peak, "steady": steady}


def summary(variant: Variant, blocks: Sequence[Times], memory: dict) -> dict[str, object]:
    """Returns a variant's entry: medians of either kind of step, weighed by alpha."""
    alpha = variant.alpha or 0.0
    kinds = {kind: [x for block in blocks for x in block.get(kind, [])] for kind in (True, False)}

    def figure(place: int, q: float = 0.5) -> float:
        times = {kind: [pair[place] for pair in pairs] for kind, pairs in kinds.items() if pairs}
        return weighed(times, {True: alpha, False: 1 - alpha}, q)

    return {
        "name": variant.name,
        "alpha": variant.alpha,
        "seconds": figure(0),
        "low": figure(0, 0.2),
        "high": figure(0, 0.8),
        "optimizer_seconds": figure(1),
        "optimizer_share": figure(1) / figure(0),
        "samples": sum(map(len, kinds.values())),
        "peak_bytes": memory["peak"],
        "steady_bytes": memory["steady"],
    }


def run_model(
    model: Model, device: Cpu, wanted: Sequence[Variant], say, *, deadline: float = math.inf,
    keep: Callable[[dict], object] = lambda found: None,
) -> dict[str, object]:  # fmt: skip
    """Measures all variants on one model; those begun too late or too large are left out.

    ``keep`` is called with what is known after every block.

    Raises:
        DeviceLost: A variant made the device unusable; ``keep`` was given what there is.
    """
    built = make(model.shape, device.device, model.dtype, model.rank)
    data = batch(model.shape, device.device, model.dtype, model.text)
    trained = [p for p in built.parameters() if p.requires_grad]
    start = [p.detach().cpu() for p in trained] if model.rank is not None else None
    found: dict[str, object] = {
        "case": model.name,
        "rank": model.rank,
        "parameters": model.shape.parameters(),
        "trained": sum(p.numel() for p in trained),
        "tensors": len(trained),
        "positions": model.shape.patches + model.text,
        "variants": [],
        "not_run": [],
    }
    blocks: dict[Variant, list] = {}
    memory: dict[Variant, dict] = {}

    def known() -> dict[str, object]:
        found["variants"] = [summary(v, times, memory[v]) for v, times in blocks.items() if times]
        return found

    for variant in [*wanted, *reversed(wanted)]:
        label = f"{variant.name}, alpha={variant.alpha}"
        if blocks.get(variant) == []:
            continue  # it did not fit before
        measured = blocks.setdefault(variant, [])
        if time.perf_counter() > deadline:
            if not measured:
                found["not_run"].append({"name": label, "reason": "no time was left for it"})
            continue
        # Full fine-tuning goes on from where the variant before it left: a copy would not fit.
        for p, value in zip(trained, start or [], strict=start is not None):
            p.data.copy_(value)
        try:
            times, used = train(built, data, variant, device)
        except Exception as error:  # too large, or broken: the others are measured all the same
            large = isinstance(error, torch.OutOfMemoryError)
            reason = first_line(error, torch.OutOfMemoryError)
            found["not_run"].append({"name": label, "reason": reason, "wrong": not large})
            say(f"  {label} not run: {reason}")
            if (lost := device.lost()) is not None:
                keep(known())
                raise DeviceLost(variant.name, f"alpha={variant.alpha}", lost) from error
            for p in trained:
                p.grad = None
        else:
            measured.append(times)
            memory.setdefault(variant, used)
        gc.collect()
        device.release()
        keep(known())
    return known()


def case_table(case: dict) -> str:
    """Returns title and table of one model, in markdown."""
    rows = [
        ("variant", "alpha", "step ms", "20 %", "80 %", "optimizer ms", "of the step", "peak GiB",
         "steady GiB", "n", "/ torch")
    ]  # fmt: skip
    base = next((e for e in case["variants"] if e["name"].startswith("torch fused")), None)
    for entry in case["variants"]:
        gib = [entry[name] and entry[name] / 2**30 for name in ("peak_bytes", "steady_bytes")]
        rows.append(
            (
                entry["name"],
                "-" if entry["alpha"] is None else f"{entry['alpha']:g}",
                *(f"{entry[name] * 1e3:.2f}" for name in ("seconds", "low", "high")),
                f"{entry['optimizer_seconds'] * 1e3:.3f}",
                f"{entry['optimizer_share']:.1%}",
                *("" if size is None else f"{size:.2f}" for size in gib),
                str(entry["samples"]),
                *ratios(entry, [base], digits=3),
            )
        )
    what = "full fine-tuning" if case["rank"] is None else f"LoRA rank {case['rank']}"
    title = (
        f"{case['case']}: {what}, {case['parameters'] / 1e9:.3g} G weights, "
        f"{case['trained'] / 1e6:.4g} M trained in {case['tensors']} tensors, "
        f"{case['positions']} positions"
    )
    return page(title, rows, absences(case), markdown=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=("smoke", "full"), default="full")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and table")
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME",
        help="leave out the variants whose names begin so, which lost the device elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--deadline", type=float, default=math.inf, help="begin nothing after so many seconds"
    )
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    if options.device == "cpu" and options.preset != "smoke":
        parser.error("7 billion weights need a GPU: --device cuda, or --preset smoke")
    device = device_of(parser, options.device)
    say = Printer(True, options.out, f"training-{options.device}")
    results = {"schema": SCHEMA, "provenance": provenance(device), "preset": options.preset,
               "cases": []}  # fmt: skip
    say.begin(results["provenance"])
    wanted, missing = variants(device, 5 if options.preset == "smoke" else 10)
    for name in options.without:
        missing.append({"name": name, "reason": "left out: it lost the device elsewhere"})
        wanted = [variant for variant in wanted if not variant.name.startswith(name)]
    limit = begin + options.deadline

    def keep(found: dict) -> None:
        say.write({**results, "cases": [*results["cases"], found]}, case_table(found))

    for model in models(device, options.preset):
        if time.perf_counter() > limit:
            say(f"{model.name} skipped: no time was left for it\n")
            continue
        try:
            found = run_model(model, device, wanted, say, deadline=limit, keep=keep)
        except DeviceLost as error:
            give_up(error)
        found["not_run"] += missing
        keep(found)
        results["cases"].append(found)
        say(case_table(found))
        gc.collect()
        device.release()
    missing = [entry for case in results["cases"] for entry in case["not_run"]]
    return int(any(entry.get("wrong") for entry in missing))


if __name__ == "__main__":
    sys.exit(main())
