# SPDX-License-Identifier: BSD-3-Clause
"""The loop that trains one arm over the sub-tasks of a LLaVA bed, for one seed.

Arm, bed, sizes and seed determine all numbers, interrupted or not: a checkpoint is written after
every sub-task.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgg.metrics import AccuracyMatrix
from dgg.replay import ReplayBuffer
from methods import METHODS, Method
from minivqa import model as vqa
from study import arms
from study.arms import Arm


@dataclass(frozen=True)
class Sizes:
    """The size of an experiment, shared by all arms of a bed."""

    steps: int  # optimizer steps a sub-task; joint training has as many in all
    train_items: int
    test_items: int
    remembered: int  # examples kept of every sub-task
    share: float = 0.25  # of a batch, replayed
    batch: int = 8
    warmup: int = 10
    max_grad_norm: float = 1.0
    rank: int = 8
    split: str = "test"  # or "validation", for tuning


Columns = tuple[Tensor, Tensor, Tensor]  # prompts, image features, answers


class Questions(NamedTuple):
    """Those of one sub-task. `together` rows make one item: it is right if all of them are."""

    rows: Columns
    together: int = 1


@dataclass(frozen=True)
class Data:
    """All sub-tasks of one seed in training order; row k of sub-task t stands at t * n + k."""

    tasks: tuple[str, ...]
    train: Columns
    test: tuple[Questions, ...]


def drawn(tasks: Sequence[str], sizes: Sizes, draw: Callable[[str, int, str], Questions]) -> Data:
    """All sub-tasks in this order; `draw` takes a name, how many items, and the split."""
    train = [draw(name, sizes.train_items, "train").rows for name in tasks]
    test = [draw(name, sizes.test_items, sizes.split) for name in tasks]
    columns = tuple(torch.cat(parts) for parts in zip(*train, strict=True))
    return Data(tuple(tasks), columns, tuple(test))


class Bed(NamedTuple):
    """Where data and model come from."""

    name: str
    load: Callable[[Sizes, int], Data]
    base: Callable[[], Any]  # the frozen model
    files: tuple[Path, ...]  # all that the numbers depend on


class Interrupted(Exception):
    """The run was asked to stop; its last checkpoint stands."""


def file_digest(*paths: Path) -> str:
    """One digest of some files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def fingerprint(bed: Bed, arm: Arm, sizes: Sizes, seed: int) -> str:
    """Names everything that the numbers of a run depend on."""
    what = {"bed": bed.name, "arm": asdict(arm), "sizes": asdict(sizes), "seed": seed,
            "data": file_digest(*bed.files)}  # fmt: skip
    return json.dumps(what, sort_keys=True)


class _Run:
    """One run: model, optimizer, memory, method and what was measured."""

    def __init__(self, bed: Bed, arm: Arm, sizes: Sizes, seed: int) -> None:
        self.bed, self.arm, self.sizes, self.seed = bed, arm, sizes, seed
        self.data = bed.load(sizes, seed)
        self.model = vqa.with_lora(bed.base(), sizes.rank, seed)
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = arms.optimizer(arm, self.parameters, seed, sizes.max_grad_norm)
        self.optimizer.set_anchor(task=0)  # there is nothing to protect yet
        self.answer: Callable[[Tensor, Tensor], Tensor] = vqa.Answerer(self.model)
        self.method = self._make_method() if arm.is_method else None
        self.buffer = ReplayBuffer(sizes.remembered, seed=seed)
        count = len(self.data.tasks)
        self.matrix = AccuracyMatrix(self.data.tasks, [sizes.test_items] * count)
        self.means: list[dict[str, float]] = []  # a sub-task: means over its steps
        self.trace: list[dict[str, float]] = []
        self.stage, self.spent = 0, 0.0

    def _make_method(self) -> Method:
        make = METHODS[self.arm.kind]
        slow = partial(vqa.answer_logits, self.model)
        logits = slow if make.reads_modules else self.answer
        if make.reads_modules == "step":
            self.answer = slow
        more = {"seed": self.seed} if "seed" in inspect.signature(make).parameters else {}
        return make(
            self.model, self.named, self.optimizer, self.loss, lambda batch: logits(*batch[:2]),
            **self.arm.options, **more,
        )  # fmt: skip

    def batch(self, rows: Sequence[int]) -> Columns:
        """The columns of some training rows."""
        prompts, features, answers = self.data.train
        return prompts[rows], features[rows], answers[rows]

    def loss(self, batch: Columns) -> Tensor:
        """The mean loss of a batch."""
        prompts, features, answers = batch
        return F.cross_entropy(self.answer(prompts, features), answers)

    # -- one sub-task ------------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool], trace_every: int) -> None:
        """Train the next sub-task, evaluate, and make the boundary."""
        sizes, stage = self.sizes, self.stage
        seen: dict[str, list[float]] = {}
        count = len(self.data.tasks)
        last = count if self.arm.joint else stage + 1
        steps = sizes.steps * (last - stage)
        rows = range(stage * sizes.train_items, last * sizes.train_items)
        self.model.train()
        arms.forget_moments(self.optimizer)
        if self.method:
            self.method.begin_task(stage)
        ratio = sizes.share if len(self.buffer) else 0.0
        for step, chosen in enumerate(self.buffer.batches(rows, sizes.batch, ratio, steps=steps)):
            if stop():
                raise Interrupted
            rate = min(1, (step + 1) / sizes.warmup) * (1 - step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.arm.lr * rate
            new = [row for row in chosen if row >= rows.start]
            old = [row for row in chosen if row < rows.start]
            found = {"loss": self.step(new, old), **arms.measured(self.arm, self.optimizer)}
            for name, value in found.items():
                seen.setdefault(name, []).append(value)
            if trace_every and step % trace_every == 0:
                self.trace.append({"step": stage * sizes.steps + step, **found})
        self.means.append({name: math.fsum(x) / len(x) for name, x in seen.items()})
        self.boundary(last, rows)

    def step(self, new: list[int], old: list[int]) -> float:
        """One optimizer step on the mean loss over new and old rows together."""
        if self.method:
            replayed = self.batch(old) if old else None
            limit = self.sizes.max_grad_norm
            return self.method.step(self.batch(new + old), replayed, limit).item()
        self.optimizer.zero_grad()
        if self.arm.kind != "guard" or not old:
            loss = self.loss(self.batch(new + old))
            loss.backward()
        else:
            share = len(old) / (len(new) + len(old))
            loss = (1 - share) * self.loss(self.batch(new))
            loss.backward()
            with self.optimizer.replay():
                again = share * self.loss(self.batch(old))
                again.backward()
            loss = loss + again
        self.optimizer.step()
        return loss.item()

    def boundary(self, last: int, rows: range) -> None:
        """Evaluate, remember some examples, and where the parameters are now."""
        kept: Sequence[int] = rows
        if self.method:
            # One by one: each gradient of a Fisher matrix goes through a whole batch.
            batches = [self.batch([row]) for row in rows]
            self.method.end_task(self.stage, batches)
            if self.method.chooses_examples:
                places = self.method.choose(batches, None, self.sizes.remembered)
                kept = [rows[int(k)] for k in places]
        self.model.eval()
        for j in range(last):
            self.matrix.record(last - 1, j, vqa.accuracy(self.answer, *self.data.test[j]))
        if self.arm.replay:
            self.buffer.add_task(kept, self.stage)
        if self.arm.kind in ("dgg", "guard"):
            self.optimizer.set_anchor()
        self.stage = last

    # -- checkpoints -------------------------------------------------------------------------------

    def state(self, mark: str, seconds: float) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "fingerprint": mark,
            "stage": self.stage,
            "adapter": {name: p.detach() for name, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict() if self.method else None,
            "buffer": self.buffer.state_dict(),
            "rows": self.matrix.rows,
            "means": self.means,
            "trace": self.trace,
            "rng": torch.get_rng_state(),
            "seconds": seconds,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(saved["adapter"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.method:
            self.method.load_state_dict(saved["method"])
        self.buffer.load_state_dict(saved["buffer"])
        self.matrix.rows = saved["rows"]
        self.means, self.trace = saved["means"], saved["trace"]
        self.stage, self.spent = saved["stage"], saved["seconds"]
        torch.set_rng_state(saved["rng"])


def run(
    bed: Bed,
    arm: Arm,
    sizes: Sizes,
    seed: int,
    checkpoint: Path | None = None,
    *,
    trace_every: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train one arm over all sub-tasks of one seed and return its result.

    Args:
        bed: data and model.
        arm: what is done against forgetting.
        sizes: how much of everything.
        seed: of data, order, adapter, memory and draws.
        checkpoint: written after each sub-task, and resumed if it is there.
        trace_every: at every so many steps, loss and measurements go to the result's `trace`.
        stop: asked at each step; True ends the run with `Interrupted`.

    Raises:
        Interrupted: `stop` said so.
        ValueError: the checkpoint is of another experiment.
    """
    started = time.perf_counter()
    mark = fingerprint(bed, arm, sizes, seed)
    it = _Run(bed, arm, sizes, seed)
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["fingerprint"] != mark:
            raise ValueError(f"{checkpoint} is of another experiment; use another --out")
        it.load(saved)
    while it.stage < len(it.data.tasks):
        it.train(stop, trace_every)
        if checkpoint is not None:
            _save(checkpoint, it.state(mark, it.spent + time.perf_counter() - started))
    return {
        "arm": asdict(arm),
        "seed": seed,
        "tasks": list(it.data.tasks),
        "matrix": it.matrix.rows,
        **it.matrix.summary(),
        "means": it.means,
        "trace": it.trace,
        "seconds": round(it.spent + time.perf_counter() - started, 2),
    }


def _save(path: Path, data: dict[str, Any]) -> None:
    """Atomically: after a kill there is the old checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
