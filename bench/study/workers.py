# SPDX-License-Identifier: BSD-3-Clause
"""Worker processes of one thread each that take jobs, and how a study is interrupted.

Ctrl-C, SIGTERM and a killed parent all end the workers; what is finished stays, and a run that was
in the middle goes on from its last sub-task.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from report import replace
from study import training
from study.jobs import Job, execute


class Stopped(Exception):
    """The user has asked to stop."""


def run(jobs: Sequence[Job], out: Path, count: int, origin: dict[str, Any], clock: Clock) -> bool:
    """Run jobs in `count` processes; False if one failed.

    Raises:
        Stopped: Ctrl-C or SIGTERM.
    """
    context = multiprocessing.get_context("spawn")
    waiting, news, stop = context.Queue(), context.Queue(), context.Event()
    count = max(1, min(count, len(jobs)))
    for job in [*jobs, *[None] * count]:
        waiting.put(job)
    more = (os.getpid(), waiting, news, stop, out, origin)
    processes = [context.Process(target=_worker, args=more, daemon=True) for _ in range(count)]
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = finished = 0
    try:
        # Ctrl-C reaches all processes of a terminal. Workers inherit that it is ignored, from their
        # first line on; this process alone answers.
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for process in processes:
                process.start()
        finally:
            signal.signal(signal.SIGINT, interrupted)
        while finished < count:
            try:
                kind, text, steps = news.get(timeout=5)
            except queue.Empty:
                dead = [p for p in processes if not p.is_alive() and p.exitcode]
                if dead:
                    print(f"a worker ended with code {dead[0].exitcode}", file=sys.stderr)
                    return False
                continue
            if kind == "result":
                print(clock.line(text, steps), flush=True)
            elif kind == "error":
                failed += 1
                print(text, file=sys.stderr, flush=True)
            else:
                finished += 1
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        stop.set()
        _end(processes)
    return not failed


def _end(processes: Sequence[Any]) -> None:
    """Let workers end by themselves for a while: they stop at their next step."""
    # A second Ctrl-C must not leave workers behind.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    deadline = time.monotonic() + 5
    for process in processes:
        if process.pid is not None:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join(timeout=5)
    signal.signal(signal.SIGINT, previous)


class Clock:
    """How far a part is, and how long the rest will take."""

    def __init__(self, steps: float, jobs: int, seconds_a_step: float) -> None:
        self._began = time.perf_counter()
        self._steps, self._jobs, self._guess = steps, jobs, seconds_a_step
        self._done_steps, self._done = 0.0, 0

    def remaining(self) -> float:
        """Seconds, from what was measured so far."""
        rest = max(0.0, self._steps - self._done_steps)
        if not self._done_steps:
            return rest * self._guess
        return rest * (time.perf_counter() - self._began) / self._done_steps

    def line(self, text: str, steps: float) -> str:
        """A finished job's line."""
        self._done_steps += steps
        self._done += 1
        return f"[{self._done:4d}/{self._jobs}] {text}   {duration(self.remaining())} left"


def duration(seconds: float) -> str:
    """As people say it."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _worker(
    parent: int, waiting: Any, news: Any, stop: Any, out: Path, origin: dict[str, Any]
) -> None:
    """Take jobs until there are none; end quietly when the parent is gone."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    def stopped() -> bool:
        # Left alone, workers of a killed parent would write checkpoints beside a resumed run.
        return stop.is_set() or os.getppid() != parent

    while not stopped():
        try:
            job = waiting.get(timeout=2)
        except queue.Empty:
            continue
        if job is None:
            break
        checkpoint = out / "checkpoints" / f"{job.part}-{job.name}.pt"
        began = time.perf_counter()
        try:
            result = execute(job, checkpoint, stopped)
        except training.Interrupted:
            break
        except Exception:
            text = f"{job.part}/{job.name}:\n{traceback.format_exc()}"
            news.put(("error", text, job.steps))
            continue
        path = out / job.path
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"name": job.name, "fingerprint": job.fingerprint(), "origin": origin,
                  "result": result}  # fmt: skip
        replace(path, json.dumps(stored) + "\n")
        checkpoint.unlink(missing_ok=True)
        shown = f"   FAA {result['faa']:5.1f}" if "faa" in result else ""
        text = f"{job.part}/{job.name}{shown}   {time.perf_counter() - began:.0f} s"
        news.put(("result", text, job.steps))
    news.put(("end", "", 0))
