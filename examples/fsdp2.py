# SPDX-License-Identifier: BSD-3-Clause
"""torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

FSDP2 on two processes: every process holds half of the weights, moments and anchors. The optimizer
needs no other lines than in one process. Runs on CPUs.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import dgg


def make_task(seed):  # four classes of points; every task has its own place and its own rule
    rng = torch.Generator().manual_seed(seed)
    x, rule, place = (torch.randn(*s, generator=rng) for s in ((2000, 32), (32, 4), (32,)))
    return x + place, (x @ rule).argmax(dim=1)


def train(alpha):
    """Trains one task after the other; returns per cent right in either task after each."""
    torch.manual_seed(0)  # the same weights on every rank, and then the same draws of rows
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    fully_shard(model, mesh=mesh)
    # After sharding. The seed of the guidance (0 by default) must be the same on every rank.
    opt = dgg.AdamW(model.parameters(), lr=5e-3, alpha=alpha)
    score = []
    for number, (x, y) in enumerate(tasks):
        opt.set_anchor(task=number)  # on every rank; each keeps the anchor of its own part
        for _ in range(200):
            rows = torch.randint(len(x), (32,)).chunk(world)[rank]  # each rank takes its share
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            right = [(model(x).argmax(1) == y).float().mean() for x, y in tasks]
        score.append([100 * share.item() for share in right])
    return score


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (world,))
tasks = [make_task(0), make_task(1)]
if rank == 0:
    print("        task 0: learnt   after task 1   task 1: learnt   forgot")
for name, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
    (learnt, _), (kept, new) = train(alpha)
    if rank == 0:
        print(f"{name:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %{learnt - kept:9.0f} points")
dist.barrier()  # a rank that leaves first would break the others' connections
dist.destroy_process_group()
