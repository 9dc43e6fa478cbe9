# SPDX-License-Identifier: BSD-3-Clause
"""Whether an optimizer can be guided by `dgg.Guidance`: a life of two tasks, looked at closely.

    python -P tests/guided_optimizers.py lion_pytorch:Lion bitsandbytes.optim:Adam8bit

tries optimizers that are installed, and prints a line for each; test_foreign.py does it for all of
torch's. docs/guidance.md has the table.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import io
import sys
import time

import torch
from torch.nn import Parameter

import dgg
from dgg import _philox

# Muon takes matrices only, and what is kept in 8 bits has 4096 elements at least.
SHAPES = [(64, 64), (7, 5)]
ALPHA, STRENGTH, SEED = 0.6, 0.7, 21
# Where the first task ends, where the second one is interrupted, and where it ends.
BOUNDARY, CUT, END = 4, 7, 11


class Life:
    """Steps of an optimizer on two tasks.

    Args:
        make: Makes the optimizer of a list of parameters.
        guided: It has a `dgg.Guidance`; without, it is given ``gradients``.
        values: Of the parameters; None takes the first ones.
        gradients: What the optimizer is to see, one list for every look at them.
    """

    def __init__(self, make, *, guided=True, values=None, gradients=None) -> None:
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.params = [Parameter(x.clone()) for x in (drawn if values is None else values)]
        self.opt = make(self.params)
        if hasattr(self.opt, "train"):
            self.opt.train()  # schedule-free
        self.guidance = None
        self.seen, self.edits, self._given = [], [], iter(gradients or ())
        if guided:
            self.guidance = dgg.Guidance(self.opt, alpha=ALPHA, strength=STRENGTH, seed=SEED)
        self.step = 0
        # Behind the hook of the guidance: it sees what the optimizer will see.
        self.opt.register_step_pre_hook(self._look)

    def _look(self, optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._see()
            return None

        def looked_at():
            loss = closure()
            self._see()
            return loss

        return (args[0], looked_at), {}

    def _see(self) -> None:
        if self.guidance is None:
            for p, x in zip(self.params, next(self._given), strict=True):
                p.grad = x.clone()
            return
        self.seen.append([p.grad.clone() for p in self.params])
        pulls = [torch.zeros(p.shape, dtype=torch.float64) for p in self.params]
        anchors = [self.guidance.state.get(p, {}).get("anchor") for p in self.params]
        drawn = _philox.step_word(SEED, self.step) < int(ALPHA * 2**32)
        if drawn and anchors[0] is not None:
            d = [
                p.detach().double() - a.double() for p, a in zip(self.params, anchors, strict=True)
            ]
            norms = [sum((x.double() ** 2).sum() for x in xs).sqrt() for xs in (self.real, d)]
            s = min(1.0, float(norms[0] / norms[1])) if norms[1] else 0.0
            pulls = [STRENGTH * s * x for x in d]
        self.edits.append(max(float(x.abs().max()) for x in pulls))
        for p, g, pull in zip(self.params, self.real, pulls, strict=True):
            # Equation (5), to the rounding of float32.
            torch.testing.assert_close(p.grad, (g.double() + pull).float(), rtol=1e-5, atol=1e-6)

    def _closure(self):
        task = self.step >= BOUNDARY
        self.opt.zero_grad()
        losses = [
            ((p - (1.5 if task else -0.5)).square() * (1 + 0.1 * self.step)).sum() + p.cos().sum()
            for p in self.params
        ]
        sum(losses).backward()
        self.real = [p.grad.clone() for p in self.params]
        return sum(losses).detach()

    def go_on(self, end: int, *, closure: bool = False) -> Life:
        """Steps until ``end`` steps are made."""
        while self.step < end:
            if self.step == BOUNDARY and self.guidance is not None:
                self.guidance.set_anchor(task=1)
            if closure:
                self.opt.step(self._closure)
            else:
                self._closure()
                self.opt.step()
            self.step += 1
        return self


def check(make, *, closure: bool = False) -> None:
    """Raises an AssertionError unless the optimizer is guided rightly and resumes bit for bit.

    Its gradients are those of equation (5) at every look; it steps with them as it would with any
    others; and a life that was saved, loaded into new objects and went on ends as one that was not.

    Args:
        make: Makes the optimizer of a list of parameters.
        closure: It must be given one.
    """
    whole = Life(make).go_on(END, closure=closure)
    pulled = sum(size > 0 for size in whole.edits)
    assert 0 < pulled < len(whole.edits), "no step was guided, or every step was"
    by_hand = Life(make, guided=False, gradients=whole.seen).go_on(END, closure=closure)
    first = Life(make).go_on(CUT, closure=closure)
    file = io.BytesIO()
    torch.save([first.opt.state_dict(), first.guidance.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = Life(make, values=[p.detach().clone() for p in first.params])
    resumed.opt.load_state_dict(saved[0])
    resumed.guidance.load_state_dict(copy.deepcopy(saved[1]))
    resumed.step = CUT
    resumed.go_on(END, closure=closure)
    start = Life(make).params
    for p, q, r, begin in zip(whole.params, by_hand.params, resumed.params, start, strict=True):
        assert p.isfinite().all() and not torch.equal(p, begin)
        assert torch.equal(p, q), "it steps otherwise than with gradients edited by hand"
        assert torch.equal(p, r), "it does not resume bit for bit"


def main(names: list[str]) -> None:
    """Tries optimizers named ``module:class``; a number behind another ``:`` is the rate."""
    for name in names:
        module, kind, *rate = name.split(":")
        distribution = importlib.metadata.packages_distributions()[module.split(".")[0]][0]
        version = f"{distribution} {importlib.metadata.version(distribution)}"
        begin = time.perf_counter()
        try:
            cls = getattr(importlib.import_module(module), kind)
            lr = float(rate[0]) if rate else 0.01
            check(lambda params, cls=cls, lr=lr: cls(params, lr=lr))
            found = "as by hand, resumes"
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
        print(f"{version} {kind}: {found} ({time.perf_counter() - begin:.1f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
