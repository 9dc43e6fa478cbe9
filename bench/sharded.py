# SPDX-License-Identifier: BSD-3-Clause
"""How long an optimizer step over sharded parameters takes, and what it sends.

    python bench/sharded.py --out runs/sharded            # 1, 2 and 4 gloo ranks: 15 minutes
    python bench/sharded.py --quick                       # 2 ranks, tiny lists: half a minute
    python bench/sharded.py --ranks 2 --only small120     # what the target is stated for

The parameters are DTensors, sharded along their first dimension, as FSDP2 makes them; every rank is
a process with one torch thread. Every variant is compared with the unsharded float64 reference
before it is timed. Then the variants take turns (timing.py), in an order that is the same on all
ranks and another in each round. Before each timed step the gradients are new DTensors, as a
backward pass leaves them, and all ranks meet at a barrier. Caches are warm: nothing is evicted
between the steps.

- ``seconds``: until ``step()`` (with the clipping before it) has returned: on a CPU, where host and
  device are one, that is host and wall time at once, waiting for the other ranks included;
- ``cpu_seconds``: time the rank's main thread worked in it: without the waiting;
- ``process_seconds``: the same of all threads of the process: gloo has some of its own.

Each figure is the median (over kinds of steps, as in step.py, by their share), of the rank where it
is largest. With more ranks than cores the ranks wait for each other's time slices: the times of
those runs say how a crowded machine behaves, not what so many machines would do.

Collectives are counted apart from the timing, three times: by a dispatch mode that also adds up
their bytes, by torch's CommDebugMode, and by the sequence number of the process group, which no
collective gets past. Where they disagree the run ends.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dgg
import peers
import report
from machine import Cpu
from parameter_lists import count
from peers import Unavailable, Variant
from report import Printer, find, target
from timing import MIN_SAMPLES, Timed, rounds_of
from workload import CLIPPED, GUIDED, PLAIN, Setting, VerificationError, sampled

SCHEMA = 1
ALPHA = sampled(0.2)
MAX_NORM = 1.0
# ‖g‖ is twice the largest norm allowed: clipping is always at work.
GRAD_NORM = 2.0
# Steps in a row that are compared with the reference, so that what dgg measures ahead is used.
VERIFIED_STEPS = 3
# A variant that would use this share of a case's time takes part in fewer rounds.
SLOW = 0.15
TIMEOUT = datetime.timedelta(seconds=120)

# What DTensor parameters look like: a small network's weights, biases and projections; the A and B
# of LoRA adapters; a few large matrices. The tiny ones have uneven shards and empty ones.
LISTS: dict[str, list[tuple[int, ...]]] = {
    "small120": [(64, 64), (64,), (64, 16)] * 40,
    "lora448": [(8, 256), (256, 8)] * 224,
    "large16Mi": [(2048, 1024)] * 8,
    "tiny6": [(8, 6), (5,), (1, 7)] * 2,
    "tiny12": [(8, 6), (5,), (1, 7)] * 4,
}
FULL, QUICK = ("small120", "lora448", "large16Mi"), ("tiny6", "tiny12")

FUSED, FOREACH, LOOP = "torch fused", "torch foreach", "torch for-loop"
FOREACH_CLIP, EAGER, BY_HAND = "torch fused, foreach clip", "foreach guidance", "by hand on shards"
RUNS: list[tuple[str, Setting]] = [
    *(("dgg cpp", s) for s in (PLAIN, CLIPPED, GUIDED, ALPHA)),
    *((name, s) for name in (FUSED, FOREACH, LOOP) for s in (PLAIN, CLIPPED)),
    (FOREACH_CLIP, CLIPPED),
    (EAGER, GUIDED),
    *((BY_HAND, s) for s in (PLAIN, CLIPPED, GUIDED)),
]


class Sharded:
    """Parameters, gradients and anchors of one case, the same numbers on any number of ranks.

    Args:
        shapes: Shapes of the whole parameters.
        mesh: One-dimensional device mesh.
    """

    optimizer, lr = "adamw", 1e-3
    dtype = torch.float32
    device = torch.device("cpu")
    max_grad_norm = MAX_NORM
    # Steps begin without any, as in a training.
    moments = ()

    def __init__(self, shapes: Sequence[tuple[int, ...]], mesh) -> None:
        self.shapes, self.mesh = shapes, mesh
        self.elements = count(list(shapes))
        self._grads = [x.to_local() for x in map(self.shard, self.whole("grads"))]
        self._moved = [x.to_local() for x in map(self.shard, self.whole("moved"))]

    def whole(self, what: str) -> list[Tensor]:
        """Returns unsharded float32 tensors: ``anchors``, ``moved`` (θ) or ``grads``."""
        seed, std = {
            "anchors": (1, 1.0), "moved": (2, 2.0), "grads": (3, GRAD_NORM / self.elements**0.5),
        }[what]  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) * std for shape in self.shapes]

    def shard(self, whole: Tensor):
        """Returns a whole tensor as a DTensor; nothing is sent."""
        from torch.distributed.tensor import Shard, distribute_tensor

        return distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None)

    def like(self, local: Tensor, param):
        """Returns a local tensor as a DTensor placed as a parameter is."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, param.placements, run_check=False, shape=param.shape,
            stride=param.stride(),
        )  # fmt: skip

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns new DTensor parameters that stand at the anchors."""
        return [torch.nn.Parameter(self.shard(x)) for x in self.whole("anchors")]

    @torch.no_grad()
    def move(self, locals_: Sequence[Tensor]) -> None:
        """Takes the local parameters away from the anchors."""
        for param, moved in zip(locals_, self._moved, strict=True):
            param.copy_(moved)

    def set_anchors(self, optimizer, params) -> None:
        """Makes an optimizer of ours set its anchors, where the parameters stand."""
        optimizer.set_anchor()

    def local_grads(self) -> list[Tensor]:
        """Returns this rank's gradients, in new memory."""
        return [grad.clone() for grad in self._grads]


class OverShards(Variant):
    """What a variant does otherwise where its parameters are DTensors."""

    guided = False
    optimizer: torch.optim.Optimizer

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        # The parameters stand at the anchors while the optimizer is made.
        super().__init__(workload, setting)
        self.locals = [param.detach().to_local() for param in self.params]
        workload.move(self.locals)

    def ready(self) -> None:
        """Gives every parameter a new gradient, as a backward pass does."""
        for param, grad in zip(self.params, self.workload.local_grads(), strict=True):
            param.grad = self.workload.like(grad, param)

    def results(self) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of parameters and first moments."""
        moments = [self.optimizer.state[param]["exp_avg"].to_local() for param in self.params]
        return {"θ": self.locals, "m": moments}

    def elements_moved(self) -> None:
        """Not accounted."""
        return None


class Ours(OverShards, peers.DggCpp):
    """The package under test."""

    guided = True

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns what float32 arithmetic leaves."""
        return 1e-5, 0.0


class Fused(OverShards, peers.TorchFused):
    """torch.optim.AdamW over DTensors, behind torch.nn.utils.clip_grad_norm_ if it clips."""


class Foreach(Fused):
    """The same with foreach=True."""

    name = FOREACH
    how: ClassVar[dict[str, bool]] = {"foreach": True}


class Loop(Fused):
    """The same, a parameter after the other."""

    name = LOOP
    how: ClassVar[dict[str, bool]] = {"foreach": False, "fused": False}


class FusedForeachClip(OverShards, peers.TorchFusedForeachClip):
    """torch fused with the clipping told to use foreach."""


class ForeachGuidance(Fused):
    """Guidance by torch._foreach_* over DTensors, between clipping and the fused optimizer."""

    name = EAGER
    guided = True

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        super().__init__(workload, setting)
        self._anchors = [workload.shard(x) for x in workload.whole("anchors")]

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Clips, guides, steps; the norm that the clipping found is used again."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        if inject:
            peers.guide_by_foreach(
                self.params, self._anchors, grad_norm=torch.clamp(norm, max=MAX_NORM),
                norm=functools.partial(torch.nn.utils.get_total_norm, foreach=True),
            )  # fmt: skip
        self.optimizer.step()


class ByHand(OverShards):
    """What a careful user writes without dgg: plain local shards, one all-reduce, torch fused.

    The optimizer holds plain tensors then: what is saved of it are one rank's shards.
    """

    name = BY_HAND
    guided = True

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        super().__init__(workload, setting)
        self._shards = [torch.nn.Parameter(x) for x in self.locals]
        self._anchors = [workload.shard(x).to_local() for x in workload.whole("anchors")]
        self.optimizer = torch.optim.AdamW(self._shards, **peers.arguments(workload), fused=True)

    def ready(self) -> None:
        """As for the others; the parameters of the model stay DTensors."""
        for shard, grad in zip(self._shards, self.workload.local_grads(), strict=True):
            shard.grad = grad

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Clips and guides with both norms in one all-reduce."""
        if self.setting.clipped:
            self._change_gradients(inject)
        self.optimizer.step()

    def _change_gradients(self, inject: bool) -> None:
        grads = [shard.grad for shard in self._shards]
        lists, differences = [grads], None
        if inject:
            differences = torch._foreach_sub(self._shards, self._anchors)
            lists.append(differences)
        squares = torch.stack(
            [torch.stack(torch._foreach_norm(x)).double().square().sum() for x in lists]
        )
        dist.all_reduce(squares, group=self.workload.mesh.get_group())
        norms = squares.sqrt().tolist()
        clip = min(1.0, MAX_NORM / (norms[0] + 1e-6))
        torch._foreach_mul_(grads, clip)
        if differences is not None:
            torch._foreach_add_(grads, differences, alpha=min(1.0, clip * norms[0] / norms[1]))

    def results(self) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of parameters and first moments."""
        moments = [self.optimizer.state[shard]["exp_avg"] for shard in self._shards]
        return {"θ": self.locals, "m": moments}


IMPLEMENTATIONS: dict[str, Callable[[Sharded, Setting], OverShards]] = {
    kind.name: kind
    for kind in (Ours, Fused, Foreach, Loop, FusedForeachClip, ForeachGuidance, ByHand)
}


class Oracle:
    """The same steps unsharded, in float64, by dgg's reference backend."""

    def __init__(self, work: Sharded) -> None:
        self._work = work
        self._found: dict[str, dict[str, list[Tensor]]] = {}

    def results(self, variant: OverShards, draw: int) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of parameters and first moments after the verified steps."""
        setting = variant.setting
        if setting.name not in self._found:
            params = [torch.nn.Parameter(x.double()) for x in self._work.whole("anchors")]
            optimizer = dgg.AdamW(
                params,
                **peers.arguments(self._work),
                **peers.guidance(self._work, setting, variant.seed, "reference"),
            )
            if setting.alpha is not None:
                optimizer.set_anchor()
            optimizer.param_groups[0]["draw_index"] = draw
            grads = [x.double() for x in self._work.whole("grads")]
            with torch.no_grad():
                for param, moved in zip(params, self._work.whole("moved"), strict=True):
                    param.copy_(moved)
            for _ in range(VERIFIED_STEPS):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.clone()
                optimizer.step()
            moments = [optimizer.state[param]["exp_avg"] for param in params]
            self._found[setting.name] = {
                name: [self._work.shard(x.detach()).to_local().clone() for x in tensors]
                for name, tensors in (("θ", params), ("m", moments))
            }
        return self._found[setting.name]


def verify(variant: OverShards, oracle: Oracle) -> float:
    """Takes the first steps of a variant and compares them; only then it may be timed.

    Every rank compares its shards; a mistake on one is an error on all.

    Returns:
        The largest error in units of the variant's tolerance.

    Raises:
        VerificationError: The variant computes something else. On all ranks.
    """
    draw = 0
    if variant.setting.alpha not in (None, 0.0, 1.0):
        # A step that does not inject before one that does: the first one measures ahead.
        while variant.kind() != (False, True):
            draw += 1
            variant.seek(draw)
    for _ in range(VERIFIED_STEPS):
        variant.ready()
        variant()
    variant.seek(0)
    worst = 0.0
    expected = oracle.results(variant, draw)
    for name, tensors in variant.results().items():
        for got, want in zip(tensors, expected[name], strict=True):
            if want.numel() == 0:
                continue
            scale = want.square().mean().sqrt() + want.abs()
            error = float(((got.double() - want).abs() / scale).max())
            error /= variant.tolerance(torch.float32)[0]
            worst = max(worst, error) if error == error else float("inf")
    found = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, worst)
    worst = max(found)
    if not worst <= 1.0:
        raise VerificationError(
            f"{variant.name} ({variant.setting.name}) on {dist.get_world_size()} ranks is "
            f"{worst:.3g} times its tolerance away from the float64 reference and is not timed"
        )
    variant.verified = True
    return worst


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives that pass the dispatcher, and the bytes each rank puts in.

    Sees what DTensor and functional collectives issue (``_c10d_functional``) and plain
    ``torch.distributed`` calls (``c10d``), each once. DTensor operations come here taken apart.
    """

    _SILENT = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}
        self.bytes = self.asynchronous = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Notes a collective and lets it run."""
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = function.overloadpacket.__name__.rstrip("_")
        if function.namespace in ("c10d", "_c10d_functional") and name not in self._SILENT:
            name = {"allreduce": "all_reduce"}.get(name, name)
            # Left out where it is the default, which is True; functional ones are waited for.
            if function.namespace == "c10d" and bound(function, args, kwargs or {})["async_op"]:
                self.asynchronous += 1
            self.operations[name] = self.operations.get(name, 0) + 1
            inputs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes += sum(x.numel() * x.element_size() for x in inputs)
        return function(*args, **(kwargs or {}))


def bound(function, args, kwargs) -> dict[str, object]:
    """Returns an operator's arguments by name, the defaults of those left out included."""
    found = {}
    for place, argument in enumerate(function._schema.arguments):
        given = args[place] if place < len(args) else argument.default_value
        found[argument.name] = kwargs.get(argument.name, given)
    return found


def count_collectives(variant: OverShards, group) -> list[dict[str, object]]:
    """Counts what each kind of step of a variant sends.

    Raises:
        RuntimeError: The three ways of counting disagree.
    """
    from torch.distributed.tensor.debug import CommDebugMode

    found = []
    for kind in sorted(variant.shares()):
        # The step before matters: it may start what this one waits for.
        variant.approach(kind)
        variant.ready()
        before = group._get_sequence_number_for_group()
        with CommDebugMode() as debug, CollectiveCounter() as counter:
            variant()
        issued = group._get_sequence_number_for_group() - before
        counted = sum(counter.operations.values())
        if not issued == counted == debug.get_total_counts():
            raise RuntimeError(
                f"{variant.name} ({variant.setting.name}): the process group issued {issued} "
                f"collectives a step, of which {counted} passed the dispatcher and CommDebugMode "
                f"saw {debug.get_total_counts()}"
            )
        found.append(
            {
                "injects": kind[0], "next_injects": kind[1], "share": float(variant.shares()[kind]),
                "count": counted, "asynchronous": counter.asynchronous, "bytes": counter.bytes,
                "operations": counter.operations,
            }
        )  # fmt: skip
    variant.seek(0)
    return found


FIGURES = ("seconds", "cpu_seconds", "process_seconds")


class Rank(Cpu):
    """A rank's CPU: a step begins when all ranks are there."""

    stratified = True

    def wall(self, function: Callable[[], object]) -> dict[str, float]:
        """Returns the times of one call: of the clock, of this thread, of all threads."""
        dist.barrier()
        process, thread, begin = time.process_time(), time.thread_time(), time.perf_counter()
        function()
        end = time.perf_counter()
        taken = (end - begin, time.thread_time() - thread, time.process_time() - process)
        return dict(zip(FIGURES, taken, strict=True))


def run_case(name: str, mesh, rounds: int, seconds: float, log) -> dict[str, object]:
    """Verifies, counts and times all variants on a list; every rank calls it.

    Returns:
        The case's entry in the results, the same on all ranks.
    """
    begin = time.perf_counter()
    work = Sharded(LISTS[name], mesh)
    oracle = Oracle(work)
    timed, counted, absent = [], [], []
    for implementation, setting in RUNS:
        try:
            variant = IMPLEMENTATIONS[implementation](work, setting)
        except Unavailable as reason:
            absent.append({"name": implementation, "setting": setting.name, "reason": str(reason)})
            continue
        timed.append(Timed(variant, verify(variant, oracle)))
        counted.append(count_collectives(variant, mesh.get_group()))
    del oracle
    log(f"  {name}: verified and counted, {time.perf_counter() - begin:.0f} s")
    rounds = _measure(timed, rounds, seconds)
    entries = [_entry(*pair) for pair in zip(timed, counted, strict=True)]
    for entry in timed:
        if not all(torch.isfinite(x).all() for x in entry.variant.locals):
            raise FloatingPointError(f"{name}: {entry.variant.name} left parameters not finite")
    return {
        "case": f"{name}-{dist.get_world_size()}",
        "list": name,
        "ranks": dist.get_world_size(),
        "optimizer": "adamw",
        "dtype": "float32",
        "placements": "Shard(0)",
        "elements": work.elements,
        "tensors": len(work.shapes),
        "shapes": sorted(set(work.shapes)),
        "cache": "warm",
        "rounds": rounds,
        "wall_seconds": time.perf_counter() - begin,
        "variants": entries,
        "not_run": absent,
    }


def _measure(timed: list[Timed], rounds: int, seconds: float) -> int:
    device, costs = Rank(), []
    for entry in timed:
        turns = []
        for _ in range(3):
            begin = time.perf_counter()
            entry.take_turn(device)
            turns.append(time.perf_counter() - begin)
        costs.append(min(turns))
        entry.samples.clear()
    # The first rank plans for all: ranks with plans of their own would wait for each other.
    dist.broadcast_object_list(costs, src=0)
    for entry, cost in zip(timed, costs, strict=True):
        entry.be_slow(rounds, SLOW * seconds / cost)
    whole = sum(cost / entry.stride for entry, cost in zip(timed, costs, strict=True))
    least = MIN_SAMPLES * max(entry.stride for entry in timed)
    rounds = max(least, min(rounds, int(seconds / whole)))
    for turn in rounds_of(timed, rounds):
        for entry in turn:
            entry.take_turn(device)
    return rounds


def _entry(entry: Timed, collectives: list[dict[str, object]]) -> dict[str, object]:
    """Returns a variant's entry, from the figures of all ranks."""
    own = {(name, q): entry.quantile(q, name) for name in FIGURES for q in (0.0, 0.2, 0.5, 0.8)}
    ranks: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, own)
    slowest = max(ranks, key=lambda found: found["seconds", 0.5])
    variant = entry.variant
    return {
        "name": variant.name,
        "setting": variant.setting.name,
        "seconds": slowest["seconds", 0.5],
        "low": slowest["seconds", 0.2],
        "high": slowest["seconds", 0.8],
        "fastest": slowest["seconds", 0.0],
        "seconds_by_rank": [found["seconds", 0.5] for found in ranks],
        "cpu_seconds": max(found["cpu_seconds", 0.5] for found in ranks),
        "process_seconds": max(found["process_seconds", 0.5] for found in ranks),
        "samples": entry.count(),
        "collectives": collectives,
        "collectives_per_step": sum(c["share"] * c["count"] for c in collectives),
        "bytes_per_step": sum(c["share"] * c["bytes"] for c in collectives),
        "seed": variant.seed,
        "injected_fraction": sum(c["share"] for c in collectives if c["injects"]),
        "error_in_tolerances": entry.error,
    }


def work(rank: int, world: int, folder: str, names: Sequence[str], rounds: int, seconds: float):
    """What every rank runs; the first one leaves the cases in ``folder``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    log = print if rank == 0 else lambda line: None
    cases = [run_case(name, mesh, rounds, seconds, log) for name in names]
    if rank == 0:
        pathlib.Path(folder, "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, names: Sequence[str], rounds: int, seconds: float) -> list[dict]:
    """Starts the ranks and returns their cases."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, folder, names, rounds, seconds), nprocs=ranks)
        return json.loads(pathlib.Path(folder, "cases.json").read_text(encoding="utf-8"))


HEADER = (
    "variant", "setting", "ms", "20 %", "80 %", "CPU ms", "n", "collectives", "bytes", "/ fused",
    "/ clip+fused", "/ foreach guidance",
)  # fmt: skip
OPPONENTS = ((FUSED, "plain"), (FUSED, "clipped"), (EAGER, "guided"))


def case_table(case: dict, cores: int, *, markdown: bool) -> str:
    """Returns title, table and notes of one case."""
    title = (
        f"{case['list']} on {case['ranks']} rank{'s' * (case['ranks'] > 1)}: AdamW, float32, "
        f"{case['elements']:,} elements in {case['tensors']} DTensors, Shard(0)"
    )
    opponents = [find(case, *opponent) for opponent in OPPONENTS]
    rows = [HEADER] + [
        (
            entry["name"],
            entry["setting"],
            *(f"{entry[key] * 1e3:.3f}" for key in ("seconds", "low", "high", "cpu_seconds")),
            str(entry["samples"]),
            f"{entry['collectives_per_step']:g}",
            f"{entry['bytes_per_step']:g}",
            *report.ratios(entry, opponents),
        )
        for entry in case["variants"]
    ]
    notes = report.absences(case) + report.losses(case)
    if case["ranks"] > cores:
        notes.append(
            f"{case['ranks']} ranks share {cores} cores: most of the time is waiting for a core"
        )
    return report.page(title, rows, notes, markdown=markdown)


def targets(cases: Sequence[dict]) -> list[dict]:
    """Compares results with the project's targets: what, target, measured, met."""
    found = []
    for case in cases:
        ours = {setting: find(case, "dgg cpp", setting) for setting in ("plain", "guided")}
        if None in ours.values():
            continue
        stated = case["case"] == "small120-2"
        for other, limit in ((FUSED, 0.35), (FOREACH_CLIP, None)) if stated else ():
            value = report.quotient(case, ("dgg cpp", "guided"), (other, "clipped"))
            if value is not None:
                what = f"{case['case']}: guided, clipped / {other} over DTensor, clipped"
                found.append(target(what, value, most=limit))
        for setting, limit in (("plain", 0), ("guided", 1)):
            what = f"{case['case']}: collectives in a {setting} step"
            value = max(c["count"] for c in ours[setting]["collectives"])
            found.append(target(what, value, "", most=limit, stated=""))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 ranks, tiny lists, few rounds")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 4; with --quick 2")
    parser.add_argument("--only", default="", help="run only lists whose name contains this")
    parser.add_argument("--rounds", type=int, help="turns of a fast variant; default 100, quick 8")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing a list, about")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and tables")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    options = parser.parse_args(arguments)
    names = [name for name in (QUICK if options.quick else FULL) if options.only in name]
    if not names:
        parser.error(f"--only {options.only}: no such list; there are {', '.join(FULL)}")
    if not dist.is_available() or not dist.is_gloo_available():
        parser.error("this torch was built without torch.distributed or without gloo")
    torch.set_num_threads(1)
    rounds = options.rounds or (8 if options.quick else 100)
    ranks = options.ranks or ([2] if options.quick else [1, 2, 4])
    say = Printer(options.markdown, options.out, "sharded-cpu")
    results: dict[str, object] = {
        "schema": SCHEMA, "provenance": report.provenance(Cpu()),
        "settings": {
            "quick": options.quick, "ranks": ranks, "rounds": rounds, "seconds": options.seconds,
            "backend": "gloo", "threads_per_rank": 1, "max_norm": MAX_NORM,
        },
        "cases": [], "complete": False,
    }  # fmt: skip
    say.begin(results["provenance"])
    for world in ranks:
        for case in run(world, names, rounds, options.seconds):
            results["cases"].append(case)
            cores = results["provenance"]["cores"]
            say(case_table(case, cores, markdown=options.markdown))
        # Whatever ends the run, what it has measured stays.
        say.write(results)
    results["provenance"]["load_average_after"] = os.getloadavg()
    results["targets"] = targets(results["cases"])
    if results["targets"]:
        say(report.targets_table(results["targets"], markdown=options.markdown))
    results["complete"] = True
    for path in say.write(results):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
