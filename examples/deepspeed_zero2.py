# SPDX-License-Identifier: BSD-3-Clause
"""torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero2.py

DeepSpeed's ZeRO-2 on two processes: every process steps half of the weights. This is for CPUs; the
lines that only CPUs need are marked.
"""

import os

import torch

os.environ["DS_ACCELERATOR"] = "cpu"  # for CPUs
import deepspeed

import dgg

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for CPUs

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # dgg needs it; and no "optimizer" block
}


def make_task(seed):  # four classes of points; every task has its own place and its own rule
    rng = torch.Generator().manual_seed(seed)
    x, rule, place = (torch.randn(*s, generator=rng) for s in ((2000, 32), (32, 4), (32,)))
    return x + place, (x @ rule).argmax(dim=1)


def train(alpha):
    """Trains one task after the other; returns per cent right in either task after each."""
    torch.manual_seed(0)  # the same weights on every rank, and then the same draws of rows
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    # The seed of the guidance (0 by default) must be the same on every rank.
    opt = dgg.AdamW(model.parameters(), lr=5e-3, alpha=alpha)
    engine, *_ = deepspeed.initialize(model=model, optimizer=opt, config=CONFIG)
    score = []
    for number, (x, y) in enumerate(tasks):
        opt.set_anchor(task=number)  # on every rank, after deepspeed.initialize
        for _ in range(200):
            rows = torch.randint(len(x), (32,)).chunk(world)[rank]  # each rank takes its share
            engine.backward(torch.nn.functional.cross_entropy(engine(x[rows]), y[rows]))
            engine.step()
        with torch.no_grad():
            right = [(engine(x).argmax(1) == y).float().mean() for x, y in tasks]
        score.append([100 * share.item() for share in right])
    engine.destroy()
    return score


deepspeed.init_distributed("gloo")
rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
tasks = [make_task(0), make_task(1)]
if rank == 0:
    print("        task 0: learnt   after task 1   task 1: learnt   forgot")
for name, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
    (learnt, _), (kept, new) = train(alpha)
    if rank == 0:
        print(f"{name:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %{learnt - kept:9.0f} points")
torch.distributed.destroy_process_group()
