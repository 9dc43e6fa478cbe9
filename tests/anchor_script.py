# SPDX-License-Identifier: BSD-3-Clause
"""A training script as users write them: one task, one process; tests/test_anchors.py runs it.

    python anchor_script.py FOLDER TASK [--carry] [--by-path] [--die-at STEP]

It goes on from its own checkpoint if there is one, else from the weights (with --carry from the
optimizer's state, too) of the task before.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal

import torch
from safetensors.torch import load_file, save_file

import dgg

STEPS = 10


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))


def batch(task: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * task + step)
    x = torch.randn(8, 6, generator=generator)
    return x, torch.roll(x, task + 1, dims=1)[:, :3]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("task", type=int)
    parser.add_argument("--carry", action="store_true")
    parser.add_argument("--by-path", action="store_true")
    parser.add_argument("--die-at", type=int)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task, here = args.task, args.folder / f"task{args.task}"
    before = args.folder / f"task{task - 1}"
    here.mkdir(exist_ok=True)

    model = build()
    opt = dgg.AdamW(model.parameters(), lr=1e-2, alpha=0.6, max_grad_norm=0.5, seed=7)
    first = 0
    if (here / "checkpoint.pt").exists():
        saved = torch.load(here / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
    elif task > 0:
        model.load_state_dict(load_file(before / "model.safetensors"))
        if args.carry:
            opt.load_state_dict(torch.load(before / "optimizer.pt", weights_only=True))
    if args.by_path and task > 0:
        opt.set_anchor(before, model=model, task=task)
    else:
        opt.set_anchor(task=task)

    for step in range(first, STEPS):
        if step == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch(task, step)
        (model(x) - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
        if step % 4 == 3:
            state = {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": step + 1}
            torch.save(state, here / "checkpoint.tmp")
            os.replace(here / "checkpoint.tmp", here / "checkpoint.pt")
    save_file(model.state_dict(), here / "model.safetensors")
    torch.save(opt.state_dict(), here / "optimizer.pt")


if __name__ == "__main__":
    main()
