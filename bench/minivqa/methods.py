# SPDX-License-Identifier: BSD-3-Clause
"""The methods compared, and the loop that trains one of them over the sequence of sub-tasks.

Everything a run depends on is in `Settings`, `Method` and the seed: the same three give the same
numbers on the same machine, interrupted or not. A checkpoint is written after each sub-task.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dgg
from dgg.metrics import AccuracyMatrix
from dgg.replay import ReplayBuffer
from minivqa import model as vqa
from minivqa import scenes


@dataclass(frozen=True)
class Method:
    """What is done against forgetting."""

    name: str
    label: str
    joint: bool = False  # all sub-tasks at once: the upper bound
    replay: bool = False  # train on T_t ∪ M, M being a few examples of every old sub-task
    alpha: float = 0.0  # probability of adding the missing gradient at a step; 0: none
    scaling: bool = True
    penalty: float = 0.0  # L2-SP: penalty / 2 * |theta - theta*|^2 in the loss
    lr: float = 3e-3  # at the end of the warm-up of each sub-task; falls to 0


@dataclass(frozen=True)
class Settings:
    """The size of an experiment, shared by all methods."""

    steps: int  # optimizer steps for each sub-task (joint training: as many in all)
    train_items: int
    test_items: int
    replay_per_task: int
    replay_share: float | None = None  # of a batch; None: the share that M has in T_t ∪ M
    batch: int = 8
    warmup: int = 10
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    rank: int = 8
    split: str = "test"  # "validation" for tuning: other items, and other seeds by convention


METHODS = {
    method.name: method
    for method in (
        Method("joint", "joint training (upper bound)", joint=True),
        Method("guidance_replay", "ĝ + replay (DGG)", replay=True, alpha=0.1),
        Method("l2sp", "L2-SP + replay", replay=True, penalty=0.3),
        Method("replay", "replay only", replay=True, lr=1.5e-3),
        Method("guidance", "ĝ only, no replay", alpha=0.1),
        Method("sequential", "sequential (lower bound)"),
        # Ablations of the paper, in --preset full.
        Method("no_scaling", "ĝ + replay, no scaling", replay=True, alpha=0.1, scaling=False),
        Method("no_bernoulli", "ĝ + replay, no sampling (α = 1)", replay=True, alpha=1.0),
    )
}


class Interrupted(Exception):
    """The run was asked to stop; its last checkpoint stands."""


# ----------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """All sub-tasks of one seed, in training order; item k of sub-task t has row t * n + k."""

    tasks: tuple[str, ...]
    train: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # prompts, image features, answers
    test: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]  # one triple a sub-task


def _draw(model, task: scenes.Task, count: int, seed: int, split: str):
    """The items of one split: seeded by name, so the splits of a seed never share a stream."""
    rng = random.Random(f"minivqa/{seed}/{task.name}/{split}")
    items = scenes.make_items(task, count, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    features = vqa.image_features(model, scenes.render(items, task.camera, generator))
    prompts, answers = scenes.encode(items)
    return prompts, features, answers


@lru_cache(maxsize=1)  # a worker does one seed after another, all methods of it in a row
def load_data(settings: Settings, seed: int) -> Data:
    """Draw the images of a seed and pass them through the frozen vision tower once."""
    model = vqa.load_base()
    order = list(scenes.SEQUENCE)
    random.Random(f"minivqa/{seed}/order").shuffle(order)  # every seed has an order of its own
    train = [_draw(model, task, settings.train_items, seed, "train") for task in order]
    test = [_draw(model, task, settings.test_items, seed, settings.split) for task in order]
    return Data(
        tasks=tuple(task.name for task in order),
        train=tuple(torch.cat(parts) for parts in zip(*train, strict=True)),
        test=tuple(test),
    )


# ------------------------------------------------------------------------------------------ run


def fingerprint(method: Method, settings: Settings, seed: int) -> str:
    """Names everything the numbers of a run depend on, so that no foreign checkpoint is resumed."""
    base = hashlib.sha256(vqa.BASE_PATH.read_bytes()).hexdigest()
    found = {"method": asdict(method), "settings": asdict(settings), "seed": seed, "base": base}
    return json.dumps(found, sort_keys=True)


def run(
    method: Method,
    settings: Settings,
    seed: int,
    checkpoint: Path,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda stage, step: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train one method over all sub-tasks of one seed and return its result."""
    started = time.perf_counter()
    data = load_data(settings, seed)
    count = len(data.tasks)
    stages = 1 if method.joint else count
    model = vqa.with_lora(vqa.load_base(), settings.rank, seed)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = dgg.AdamW(
        parameters, lr=method.lr, weight_decay=settings.weight_decay, alpha=method.alpha,
        scaling=method.scaling, max_grad_norm=settings.max_grad_norm, seed=seed,
    )  # fmt: skip
    answer = vqa.Answerer(model)
    buffer = ReplayBuffer(settings.replay_per_task, seed=seed)
    matrix = AccuracyMatrix(data.tasks, [settings.test_items] * count)
    anchor: list[torch.Tensor] | None = None
    trace: list[dict[str, Any]] = []
    stage, spent = 0, 0.0
    mark = fingerprint(method, settings, seed)

    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["fingerprint"] != mark:
            raise ValueError(f"{checkpoint} is of another experiment; use another --out")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved["adapter"][name])
        optimizer.load_state_dict(saved["optimizer"])
        buffer.load_state_dict(saved["buffer"])
        matrix.rows = saved["rows"]
        anchor, trace, stage = saved["anchor"], saved["trace"], saved["stage"]
        torch.set_rng_state(saved["rng"])
        spent = saved["seconds"]

    while stage < stages:
        last = count if method.joint else stage + 1  # behind the last sub-task that is trained
        steps = settings.steps * (last - stage)
        rows = range(stage * settings.train_items, last * settings.train_items)
        meter = _Meter()
        model.train()
        _forget_moments(optimizer)
        # As in the paper, the loss is that of the union of the new sub-task and the memory M; a
        # share of its own weights M more, as few examples would hardly ever come up otherwise.
        ratio = len(buffer) / (len(buffer) + len(rows))
        if buffer and settings.replay_share is not None:
            ratio = settings.replay_share
        for step, chosen in enumerate(buffer.batches(rows, settings.batch, ratio, steps=steps)):
            if stop():
                raise Interrupted
            for group in optimizer.param_groups:
                group["lr"] = method.lr * min(1, (step + 1) / settings.warmup) * (1 - step / steps)
            prompts, features, answers = (part[chosen] for part in data.train)
            loss = F.cross_entropy(answer(prompts, features), answers)
            extra = 0.0
            if method.penalty and anchor is not None:
                term = 0.5 * method.penalty * squared_distance(parameters, anchor)
                extra = float(term.detach())
                loss = loss + term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.step(loss, extra, optimizer if method.alpha and stage else None)
            progress(stage, step + 1)
        trace.append({"task": "all" if method.joint else data.tasks[stage], **meter.result()})
        if method.penalty and stage and not meter.penalty > 0:
            raise AssertionError("the L2-SP penalty was zero during a whole sub-task")

        model.eval()
        for j in range(last):
            matrix.record(last - 1, j, vqa.accuracy(answer, *data.test[j]))

        # The task boundary: remember some examples, and where the parameters are now.
        if method.replay:
            buffer.add_task(rows, stage)
        if method.alpha:
            optimizer.set_anchor()
        if method.penalty:
            anchor = [p.detach().clone() for p in parameters]
        stage += 1
        saved = {
            "fingerprint": mark,
            "stage": stage,
            "adapter": {name: p.detach() for name, p in named.items()},
            "optimizer": optimizer.state_dict(),
            "buffer": buffer.state_dict(),
            "rows": matrix.rows,
            "anchor": anchor,
            "trace": trace,
            "rng": torch.get_rng_state(),
            "seconds": spent + time.perf_counter() - started,
        }
        _save(checkpoint, saved)

    return {
        "method": method.name,
        "label": method.label,
        "seed": seed,
        **{key: getattr(method, key) for key in ("alpha", "scaling", "penalty", "lr", "replay")},
        "tasks": list(data.tasks),
        "matrix": matrix.rows,
        **matrix.summary(),
        "undefined": matrix.undefined(),
        "trace": trace,
        "seconds": spent + time.perf_counter() - started,
    }


def _forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Every sub-task starts as with a fresh optimizer; the anchor and the draws go on.

    Gradients at the end of a sub-task that was learnt are tiny. Divided by the root of their second
    moment, the first gradients of the next one would make steps that destroy what is there.
    """
    for state in optimizer.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name].zero_()


def squared_distance(parameters, anchor) -> torch.Tensor:
    """|theta - theta*|^2 over all parameters."""
    squares = [(p - a).square().sum() for p, a in zip(parameters, anchor, strict=True)]
    return torch.stack(squares).sum()


class _Meter:
    """Means over one sub-task: loss, penalty, and what the guidance did."""

    def __init__(self) -> None:
        self.steps = self.hits = self.short = 0
        self.loss = self.penalty = self.scale = self.grad_norm = self.distance = 0.0

    def step(self, loss: torch.Tensor, penalty: float, guided) -> None:
        self.steps += 1
        self.loss += float(loss.detach())
        self.penalty += penalty
        if guided is None:
            return
        stats = guided.guidance_stats()
        if stats["injected"]:  # only then are the norms measured
            stats = {name: float(stats[name]) for name in ("scale", "grad_norm", "distance")}
            self.hits += 1
            self.scale += stats["scale"]
            self.short += stats["scale"] < 1  # how often the scaling did anything
            self.grad_norm += stats["grad_norm"]
            self.distance = stats["distance"]  # the last one: how far the sub-task has led

    def result(self) -> dict[str, float]:
        hits = max(self.hits, 1)
        return {
            "steps": self.steps,
            "loss": self.loss / self.steps,
            "penalty": self.penalty / self.steps,
            "injected": self.hits / self.steps,
            "scale": self.scale / hits,
            "scaled_down": self.short / hits,
            "grad_norm": self.grad_norm / hits,
            "distance": self.distance,
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


def variant(name: str, **changes: Any) -> Method:
    """A method with other hyper-parameters, for tuning."""
    return replace(METHODS[name], **changes)
