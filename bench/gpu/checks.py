# SPDX-License-Identifier: BSD-3-Clause
"""What has to hold on a GPU before anything is worth measuring: a minute, for both backends.

    python bench/gpu/checks.py --out build/checks    # every check; checks.json after each
    python bench/gpu/checks.py --small-step          # one small step alone, for compute-sanitizer

Each check says what it saw. One that fails does not stop the others; where a kernel takes the
device with it the process ends with the exit code LOST, and the results say at which check. run.py
runs it in its first stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dgg
from dgg.backends import unavailable
from gpu.targets import LAUNCHES
from machine import Cpu, device_of, give_up
from parameter_lists import many_tiny
from peers import IMPLEMENTATIONS
from report import first_line, table, write_json
from timing import verify
from variant import Variant
from workload import CLIPPED, GUIDED, PLAIN, REPLAY, REPLAY_GUIDED, Setting, Workload, largest_error

BACKENDS = ("cpp", "triton")
# Below, at and above the end of a chunk, and more than one.
SHAPES = [(1,), (3, 5), (8191,), (8192,), (8193,), (130, 257)]
SMALL = [(1,), (3, 5), (65,), (8193,)]
REPEATS, REPLAYS = 20, 6


class Broken(AssertionError):
    """A check saw what must not be."""


class NotHere(RuntimeError):
    """A check cannot be made here; the message says why."""


@dataclasses.dataclass
class Where:
    """What the checks run on."""

    device: Cpu
    shapes: list[tuple[int, ...]]
    listed: list[tuple[int, ...]]  # shapes of the list whose launches are counted

    def variant(self, backend: str, setting: Setting, *, steps: int = 0, shapes=None) -> Variant:
        """Returns a variant of ours after some steps, from tensors that are the same every time."""
        work = Workload(
            shapes or self.shapes, torch.float32, "adamw", self.device.device, replay=setting.replay
        )
        made = IMPLEMENTATIONS[f"dgg {backend}"](work, setting)
        for _ in range(steps):
            made.ready()
            made()
        return made


def _steps(where: Where, backend: str, setting: Setting, count: int) -> list[torch.Tensor]:
    stored = where.variant(backend, setting, steps=count).workload.stored()
    return [x.detach().clone() for tensors in stored for x in tensors]


def same_bits(backend: str, where: Where) -> str:
    """Three guided, clipped steps with replay gradients, again and again: the same bits."""
    first = _steps(where, backend, REPLAY_GUIDED, 3)
    for number in range(REPEATS):
        again = _steps(where, backend, REPLAY_GUIDED, 3)
        if not all(map(torch.equal, first, again)):
            raise Broken(f"run {number + 2} of {REPEATS + 1} differs from the first")
    return f"{REPEATS + 1} runs of 3 steps"


def reference(backend: str, where: Where) -> str:
    """Every setting against the float64 reference."""
    settings = (PLAIN, CLIPPED, GUIDED, REPLAY, REPLAY_GUIDED)
    worst = max(verify(where.variant(backend, setting)) for setting in settings)
    return f"{len(settings)} settings, at most {worst:.2f} of the tolerance off"


def agree(where: Where) -> str:
    """Both backends from the same start."""
    worst = 0.0
    for setting in (PLAIN, REPLAY_GUIDED):
        cpp, triton = (_steps(where, backend, setting, 2) for backend in BACKENDS)
        # Two roundings apart at the most, one of either: twice the defaults of torch.testing.
        off = largest_error(
            (mine.double(), theirs.double(), 2 * (1e-5 + 1.3e-6 * mine.double().abs()))
            for mine, theirs in zip(cpp, triton, strict=True)
        )
        worst = max(worst, off)
    if not worst <= 1:
        raise Broken(f"they are {worst:.3g} times what is allowed apart")
    return f"at most {worst:.2f} of what is allowed apart"


def no_wait(backend: str, where: Where) -> str:
    """Steps under torch's synchronisation check."""
    settings = (PLAIN, CLIPPED, GUIDED, REPLAY_GUIDED)
    for setting in settings:
        variant = where.variant(backend, setting, steps=3)  # what is new is made
        variant.ready()
        if (seen := where.device.waits(variant)) is not None:
            raise Broken(f"a {setting.name} step waits: {seen}")
    if where.device.name == "cpu":
        raise NotHere("the host is the device")
    return f"{len(settings)} settings"


def launches(backend: str, where: Where) -> str:
    """Kernels of a guided, clipped step over a list of tensors."""
    variant = where.variant(backend, GUIDED, steps=3, shapes=where.listed)
    found = where.device.profile([(variant.ready, variant)] * 3)
    if isinstance(found, str):
        raise NotHere(found)
    most = max(found, key=lambda call: call.launches)
    if most.launches != LAUNCHES:
        raise Broken(f"{most.launches}, not {LAUNCHES}: {', '.join(most.names)}")
    return f"{most.launches} for {len(where.listed)} tensors"


def graphs(backend: str, where: Where) -> str:
    """Replays of a captured step, and as many eager ones: the same bits."""
    if where.device.name == "cpu":
        raise NotHere("the CPU has no graphs")

    def build() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn(shape, generator=generator) for shape in where.shapes]
        return [torch.nn.Parameter(x.to(where.device.device)) for x in made]

    runs = []
    for optimizer, params in eager_and_replayed(build, backend, REPLAYS):
        where.device.synchronize()
        runs.append([p.detach().clone() for p in params])
        runs[-1] += [x.clone() for p in params for x in optimizer.state[p].values()]
    if not all(map(torch.equal, *runs)):
        raise Broken("replays and eager steps give other bits")
    return f"{REPLAYS} replays"


def eager_and_replayed(
    build: Callable[[], list[torch.nn.Parameter]], backend: str, steps: int, **options
) -> Iterator[tuple[dgg.AdamW, list[torch.nn.Parameter]]]:
    """Yields optimizer and parameters after eager steps, then after replays of a captured one.

    Learning rate and alpha lie on the device and change from step to step. Two steps, with the
    anchor set between them, come before. ``build`` returns the same values at each call.
    """
    for captured in (False, True):
        params = build()
        optimizer = dgg.AdamW(
            params, alpha=0.5, seed=8, max_grad_norm=1.0, capturable=True, backend=backend,
            **options,
        )  # fmt: skip
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(1e-3, device=params[0].device)
        group["alpha"] = torch.tensor(0.5, device=params[0].device)
        for p in params:
            p.grad = torch.zeros_like(p)
        generator = torch.Generator().manual_seed(3)

        def fill(params=params, generator=generator) -> None:
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))

        fill()
        # As torch.cuda.graph() asks for: the warm-up on a side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
            optimizer.set_anchor()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for number in range(steps):
            fill()
            group["lr"].fill_(1e-3 / (number + 1))
            group["alpha"].fill_((number % 3) / 2)
            step()
        yield optimizer, params


def checks() -> dict[str, Callable[[Where], str]]:
    """Returns the checks by name, in the order in which they are made."""
    found: dict[str, Callable[[Where], str]] = {}
    for check in (reference, same_bits, no_wait, launches, graphs):
        for backend in BACKENDS:
            name = f"{check.__name__.replace('_', ' ')}, {backend}"
            found[name] = functools.partial(check, backend)
    found["agree, cpp and triton"] = agree
    return found


def run(where: Where, keep: Callable[[dict[str, dict]], None]) -> dict[str, dict]:
    """Makes every check; ``keep`` is called with all results so far before and after each."""
    results: dict[str, dict] = {}
    gone = None
    missing = {b: unavailable(b, where.device.device) for b in BACKENDS}
    for name, check in checks().items():
        absent = [f"{b}: {missing[b]}" for b in BACKENDS if b in name and missing[b]]
        begin = time.perf_counter()
        results[name] = {"status": "failed", "seen": "the process ended in it", "seconds": 0.0}
        keep(results)
        try:
            if absent:
                # On a GPU both are to run.
                raise (NotHere if where.device.name == "cpu" else Broken)("; ".join(absent))
            status, seen = "ok", check(where)
        except NotHere as reason:
            status, seen = "not run", str(reason)
        except Exception as error:  # whatever it is, the next check may tell more
            status, seen = "failed", first_line(error, Broken)
            gone = where.device.lost()
        seconds = round(time.perf_counter() - begin, 1)
        results[name] = {"status": status, "seen": seen, "seconds": seconds}
        print(f"{status:>7}  {name}: {seen} ({seconds} s)", flush=True)
        keep(results)
        if gone is not None:
            give_up(gone)
    return results


def results_table(results: dict[str, dict]) -> str:
    """Returns the checks as a markdown table."""
    rows = [("check", "status", "seen", "s")]
    rows += [(name, r["status"], r["seen"], str(r["seconds"])) for name, r in results.items()]
    return table(rows, markdown=True) + "\n"


def small_step(device: torch.device) -> None:
    """Small steps of every kernel: what a memory checker has to see, and nothing else."""
    for backend in BACKENDS:
        if (reason := unavailable(backend, device)) is not None:
            print(f"{backend} is not checked: {reason}")
            continue
        for kind, more in (
            (dgg.AdamW, {"alpha": 1.0}), (dgg.SGD, {"alpha": 1.0, "lr": 0.1, "momentum": 0.9}),
            (dgg.AdamW, {"alpha": "auto", "importance": 0.5}),
        ):  # fmt: skip
            params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in SMALL]
            optimizer = kind(params, max_grad_norm=1.0, backend=backend, **more)
            for step in range(3):
                if step == 1:  # importance comes from the moments of a step before it
                    optimizer.set_anchor()
                for p in params:
                    p.grad = torch.ones_like(p)
                with optimizer.replay():
                    for p in params:
                        p.grad = torch.full_like(p, 0.5)
                optimizer.step()
            if not all(bool(p.isfinite().all()) for p in params):
                raise Broken(f"{backend}: parameters are not finite")
        print(f"{backend}: checked", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Makes the checks; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=pathlib.Path, help="folder for checks.json")
    parser.add_argument("--small-step", action="store_true", help="one small step alone")
    options = parser.parse_args(arguments)
    if options.small_step:
        small_step(torch.device(options.device))
        return 0
    device = device_of(parser, options.device)
    print(dgg.show_config(), flush=True)
    small = options.device == "cpu"
    where = Where(device, SMALL if small else SHAPES, many_tiny(5 if small else 448))

    def keep(results: dict[str, dict]) -> None:
        if options.out is not None:
            write_json(options.out / "checks.json", {"checks": results})

    results = run(where, keep)
    print("\n" + results_table(results))
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
