# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_deepspeed.py runs; started by torch.multiprocessing."""

from __future__ import annotations

import datetime
import json
import logging
import os
import pathlib
import sys

import torch
import torch.distributed as dist

import dgg

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
STEPS = 50
BOUNDARIES = (4, 30)


def start(rank: int, world: int, folder: str) -> None:
    """Makes the process group; DeepSpeed takes the one that is there."""
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def network(dtype=torch.float32) -> torch.nn.Module:
    """Uneven sizes, a layer that is frozen, and biases in groups of their own."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7), torch.nn.LayerNorm(7),
        torch.nn.Linear(7, 5), torch.nn.Linear(5, 1),
    )  # fmt: skip
    model[2].requires_grad_(False)
    return model.to(dtype)


def groups(model) -> list[dict]:
    """Three groups: matrices, vectors, and one of a single element; with a frozen parameter."""
    named = list(model.named_parameters())
    last = named[-1][1]
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() == 1 and p is not last], "lr": 1e-2},
        {"params": [last], "alpha": 1.0, "strength": 0.4},
    ]


RULES = {
    "adamw": (dgg.AdamW, {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-4}),
    "sgd": (dgg.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
}
GUIDANCE = {"alpha": 0.5, "strength": 0.7, "seed": 2**63 + 9}


def build(model, rule: str, options: dict):
    """Returns the optimizer of a case."""
    cls, defaults = RULES[rule]
    return cls(groups(model), **{**defaults, **GUIDANCE, **options})


def batch(k: int) -> torch.Tensor:
    """Returns the inputs of step k, the same on every rank."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 + k))


def loss_of(model, x: torch.Tensor) -> torch.Tensor:
    """Returns a loss in which every trainable parameter takes part."""
    return (model(x.to(next(model.parameters()).dtype)).float() - x.sum(1, True)).square().mean()


def alone(rule="adamw", options=None, clip=None, dtype=torch.float32, first=0, last=STEPS):
    """The run without DeepSpeed, by the same optimizer, that clips for itself."""
    model = network(dtype)
    options = {"max_grad_norm": clip, **(options or {})}
    if dtype != torch.float32:
        options["master_weights"] = True
    optimizer = build(model, rule, options)
    stats = []
    for k in range(first, last):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        loss_of(model, batch(k)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stats.append(optimizer.guidance_stats())
    return model, optimizer, stats


def config(stage: int, **changes) -> dict:
    """The documented configuration of a stage with changes; ``zero`` changes its section."""
    name = "deepspeed_zero3.json" if stage == 3 else "deepspeed_zero2.json"
    made = json.loads((DOCS / name).read_text())
    made["zero_optimization"].update({"stage": stage, **changes.pop("zero", {})})
    # A machine without a GPU: DeepSpeed's default would let the CPU's memory decide.
    made.update(changes)
    return made


def engine_of(model, optimizer, configuration):
    """Returns DeepSpeed's engine."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)[0]


def whole_weights(engine) -> list[torch.Tensor]:
    """Returns every parameter's weights, float32 where ZeRO has them so."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [
        (safe_get_full_fp32_param(p) if p.requires_grad else p.detach()).clone().cpu()
        if p.requires_grad or not hasattr(p, "ds_id")
        else torch.empty(0)
        for p in engine.module.parameters()
    ]


class OurCollectives:
    """Counts the collectives that dgg starts, not DeepSpeed's."""

    def __enter__(self):
        self.count, self._original = 0, dist.all_reduce

        def counting(*args, **kwargs):
            self.count += sys._getframe(1).f_globals["__name__"].startswith("dgg")
            return self._original(*args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *exception):
        dist.all_reduce = self._original


def train(engine, optimizer, first=0, last=STEPS):
    """Trains; returns what dgg did in every step."""
    results = []
    for k in range(first, last):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        with OurCollectives() as ours:
            engine.backward(loss_of(engine, batch(k)))
            engine.step()
        results.append((ours.count, optimizer.guidance_stats()))
    return results


def run_cases(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """Runs every case; rank 0 leaves the results in ``folder``."""
    start(rank, world, folder)
    results = []
    for case in cases:
        model = network()
        optimizer = build(model, case["rule"], case["options"])
        engine = engine_of(model, optimizer, config(**case["config"]))
        assert dgg.unwrap(engine) is optimizer and dgg.unwrap(engine.optimizer) is optimizer
        # The constructor neither steps nor draws.
        assert optimizer.param_groups[0]["draw_index"] == 0
        steps = train(engine, optimizer)
        assert {group["draw_index"] for group in optimizer.param_groups} == {STEPS}
        # Every rank knows the same.
        facts = [
            [float(x) for x in s.values() if x is not None and x.numel() == 1] for _, s in steps
        ]
        everyone = [None] * world
        dist.all_gather_object(everyone, facts)
        assert all(other == facts for other in everyone), case
        results.append({"weights": whole_weights(engine), "steps": steps})
        engine.destroy()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    dist.barrier()
    dist.destroy_process_group()
