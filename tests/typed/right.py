# SPDX-License-Identifier: BSD-3-Clause
"""A user's script that no type checker complains of; it is checked and never run."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import dgg


def guided(model: nn.Module) -> dgg.AdamW:
    """The options, with the types that users have."""
    opt = dgg.AdamW(
        model.parameters(), lr=2e-4, betas=(0.9, 0.999), weight_decay=0.01, alpha="auto",
        norm_scope="tensor", granularity="step", max_grad_norm=1.0, route="first_moment", seed=3,
        anchor_dtype=torch.bfloat16, anchor_device="cpu", master_weights=True, backend="cpp",
        process_group=torch.distributed.group.WORLD,
    )  # fmt: skip
    dgg.Adam(model.named_parameters(), alpha=torch.tensor(0.2), lr=torch.tensor(1e-3))
    dgg.SGD([{"params": list(model.parameters()), "alpha": 0.1}], momentum=0.9)
    return opt


def loop(model: nn.Module, opt: dgg.AdamW, batches: list[Tensor]) -> float:
    """A task with replay."""
    memory = dgg.ReplayBuffer(100, seed=1)
    opt.set_anchor(task=1)
    opt.set_anchor(model.state_dict(), model=model)
    opt.set_anchor(pathlib.Path("task0"), importance="importance.safetensors")
    for batch in batches:
        with opt.replay():
            model(memory.sample(4)).backward()
        model(batch).backward()
        assert_type(opt.step(), None)
        opt.zero_grad()

    def closure() -> float:
        return 1.0

    assert_type(opt.step(closure), float)
    assert_type(opt.last_step_skipped, bool)
    assert_type(opt.merge_anchor("rows", keep=0.5), float)
    assert_type(opt.importance_dict(model=model), dict[str, Tensor])
    assert_type(memory.add_task(batches, task="first"), int)
    opt.load_state_dict(dgg.convert_state_dict(opt.state_dict(), opt))
    for group in opt.param_groups:
        group["alpha"] = 0.1
    weights: Tensor = opt.state[next(model.parameters())]["anchor"]
    return float(weights.norm())


def wrapped(accelerated: object, inner: dgg.SGD) -> None:
    """The optimizer inside a framework's wrapper."""
    assert_type(dgg.unwrap(inner), dgg.SGD)
    opt = dgg.unwrap(accelerated)
    opt.set_anchor(task=2)
    opt.step()
    print(opt.param_groups[0]["lr"], opt.guidance_stats()["injected"])


def foreign(model: nn.Module) -> None:
    """Any other optimizer, and what is measured of it."""
    guidance = dgg.Guidance(torch.optim.RMSprop(model.parameters()), alpha=0.2, backend=None)
    guidance.set_anchor()
    matrix = dgg.metrics.AccuracyMatrix(["first", "second"])
    matrix.record(0, 0, 0.9)
    assert_type(matrix.forgetting(), float | None)
    assert_type(dgg.show_config(), str)


def trainer() -> None:
    """The Hugging Face Trainer."""
    dgg.hf.GuidanceCallback(alpha=[0.0, 0.2, "auto"], task=1)
    dgg.hf.GuidanceCallback(alpha={1: 0.1})
    replaying = dgg.hf.ReplayTrainer(replay_buffer=dgg.ReplayBuffer(10), replay_ratio=0.5)
    assert_type(replaying.remember(), int)
    assert_type(dgg.hf.is_active(replaying), bool)
