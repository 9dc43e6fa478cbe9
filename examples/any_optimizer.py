# SPDX-License-Identifier: BSD-3-Clause
"""python examples/any_optimizer.py

`dgg.Guidance` guides optimizers that are none of dgg's: Muon of torch.optim, Lion (written out
below), and schedule-free SGD if its library is installed (`pip install schedulefree`).
"""

import torch

import dgg


class Lion(torch.optim.Optimizer):  # Chen et al., arXiv 2302.06675
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(m.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 0.01)


optimizers = {"Muon": (torch.optim.Muon, 0.01), "Lion": (Lion, 0.001)}
try:
    from schedulefree import SGDScheduleFree

    optimizers["schedule-free"] = (SGDScheduleFree, 0.5)
except ImportError:
    print("schedulefree is not installed")


def make_task(seed):  # four classes of points; every task has its own place and its own rule
    rng = torch.Generator().manual_seed(seed)
    x, rule, place = (torch.randn(*s, generator=rng) for s in ((2000, 32), (32, 4), (32,)))
    return x + place, (x @ rule).argmax(dim=1)


def train(cls, lr, alpha):
    """Trains one task after the other; returns per cent right in either task after each."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 4, bias=False)
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])  # Muon takes matrices only
    score = []
    for number, (x, y) in enumerate(tasks):
        opt = cls(model.parameters(), lr=lr)
        guidance = dgg.Guidance(opt, alpha=alpha, seed=number)  # guides every opt.step()
        guidance.set_anchor(task=number)  # task 1 is pulled back to the weights it begins with
        if hasattr(opt, "train"):
            opt.train()  # schedule-free keeps two sets of weights: one to train ...
        for _ in range(200):
            rows = torch.randint(len(x), (32,))
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        if hasattr(opt, "eval"):
            opt.eval()  # ... and one to use, which is the anchor of the next task
        score.append([100 * (model(x).argmax(1) == y).float().mean().item() for x, y in tasks])
    return score


tasks = [make_task(0), make_task(1)]
print("                      task 0: learnt   after task 1   task 1: learnt   forgot")
for name, (cls, lr) in optimizers.items():
    for kind, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
        (learnt, _), (kept, new) = train(cls, lr, alpha)
        print(
            f"{name:14}{kind:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %"
            f"{learnt - kept:9.0f} points"
        )
