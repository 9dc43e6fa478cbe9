# SPDX-License-Identifier: BSD-3-Clause
"""python examples/two_tasks.py

A network learns a task and then another one, without guidance and with it. The table says how much
of the first task is left.
"""

import torch

import dgg


def make_task(seed):  # four classes of points; every task has its own place and its own rule
    rng = torch.Generator().manual_seed(seed)
    x, rule, place = (torch.randn(*s, generator=rng) for s in ((2000, 32), (32, 4), (32,)))
    return x + place, (x @ rule).argmax(dim=1)


tasks = [make_task(0), make_task(1)]
print("        task 0: learnt   after task 1   task 1: learnt   forgot")
for name, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    opt = dgg.AdamW(model.parameters(), lr=5e-3, alpha=alpha)  # in place of torch.optim.AdamW
    score = []  # a row per task trained: per cent right in either task
    for number, (x, y) in enumerate(tasks):
        opt.set_anchor(task=number)  # task 1 is pulled back to the weights that it begins with
        for _ in range(200):
            rows = torch.randint(len(x), (32,))
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        score.append([100 * (model(x).argmax(1) == y).float().mean().item() for x, y in tasks])
    (learnt, _), (kept, new) = score
    print(f"{name:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %{learnt - kept:9.0f} points")
