# SPDX-License-Identifier: BSD-3-Clause
"""What every implementation that is compared shares: its draws, its optimizer, its byte count.

Every one is written as well as its style allows: few passes, few temporaries, no Python work that
can be hoisted out of the step. Each class says how many bytes its step has to move, with
write-allocate where a line is written that was not read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from dgg import _philox
from workload import BETA1, BETA2, EPS, FIRST_STEP, MOMENTUM, WEIGHT_DECAY, Setting, Workload

# Draws over which the cost of a setting is averaged; more where α times this is no whole number.
WINDOW = 50


class Unavailable(RuntimeError):
    """The variant cannot run here; the message says why."""


def choose_seed(alpha: float, draws: int) -> int:
    """Returns the smallest seed whose first ``draws`` draws inject at the wanted share.

    A run of 50 draws at α = 0.2 injects anything between 5 and 15 times; the average of a lucky
    one would flatter dgg, of an unlucky one its peers. The draw after the window must agree with
    the first one, so that going back to the start is a step like any other.
    """
    wanted = round(Fraction(str(alpha)) * draws)
    patterns = ((seed, injections(seed, alpha, draws + 1)) for seed in itertools.count())
    return next(
        seed
        for seed, drawn in patterns
        if sum(drawn[:draws]) == wanted and drawn[draws] == drawn[0]
    )


def injections(seed: int, alpha: float, count: int) -> list[bool]:
    """Returns which of the draws 0 … count - 1 inject, the real draws of the package."""
    limit = _philox.threshold(alpha)
    return [_philox.step_word(seed, draw) < limit for draw in range(count)]


class Variant:
    """One implementation in one setting, on a workload.

    Attributes:
        guided: Whether it has the settings with an alpha; ``replays``, ``automatic`` and ``weighs``
            say the same of replay gradients, alpha="auto" and importance.
        needs: Fields of the setting without which it would be another variant → that variant.
        foreign: Somebody else's code: where it computes something else it is left out, with that as
            the reason, instead of ending the run.
        built_on: The variant whose optimizer it calls: where that computes something else, this one
            may, too, and is left out likewise.
        optimizer: What steps, if nothing else is written.
        verified: Set by the harness; what is not verified is not timed.
        window: Draws over which the cost is averaged.
        pattern: Which of them inject, and whether the one behind them does.
    """

    name: ClassVar[str]
    guided: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    automatic: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    needs: ClassVar[dict[str, str]] = {}
    foreign: ClassVar[bool] = False
    built_on: ClassVar[str | None] = None
    optimizer: torch.optim.Optimizer
    verified = False

    def __init__(self, workload: Workload, setting: Setting) -> None:
        if setting.alpha is not None and not self.guided:
            raise Unavailable("it has no guidance")
        if setting.replay and not self.replays:
            raise Unavailable("it has no replay gradients")
        if setting.automatic != self.automatic and not (self.automatic and self.weighs):
            raise Unavailable("it has no alpha='auto', or nothing else")
        if setting.importance and not self.weighs:
            raise Unavailable("it has no importance")
        for field, other in self.needs.items():
            if not getattr(setting, field):
                words = {"clipped": "clipping", "replay": "replay gradients"}[field]
                raise Unavailable(f"without {words} it is {other}")
        self.workload, self.setting, self.calls = workload, setting, 0
        self._draw = self.seed = 0
        share = Fraction(str(setting.alpha or 0)) * WINDOW
        self.window = WINDOW if share.denominator == 1 else 2 * WINDOW
        self.pattern = [False] * (self.window + 1)
        if setting.alpha is not None:
            self.seed = choose_seed(setting.alpha, self.window)
            self.pattern = injections(self.seed, setting.alpha, self.window + 1)
        # A CPU reads a line before it is written; a GPU does not.
        self._write_allocate = 1.0 if workload.device.type == "cpu" else 0.0
        self.params = workload.parameters()
        self._max_norm = workload.max_grad_norm

    def __call__(self) -> None:
        """Takes one step and counts it."""
        self.step(self.pattern[self._draw])
        self.calls += 1
        self._draw += 1
        if self._draw == self.window:
            self.seek(0)

    def ready(self) -> None:
        """Leaves the gradients as backward passes would; comes before every step, untimed."""
        self.workload.latest = self
        self.workload.fresh_gradients()

    def verified_elsewhere(self) -> float | None:
        """Returns the error of a verification by other means; None: a step here is compared."""
        return None

    def seek(self, draw: int) -> None:
        """Goes to a draw index within the window."""
        self._draw = draw

    def kind(self) -> tuple[bool, bool]:
        """Returns what the next step's cost depends on: whether it, and the one after, inject."""
        return self.pattern[self._draw], self.pattern[self._draw + 1]

    def shares(self) -> dict[tuple[bool, bool], Fraction]:
        """Returns how often each kind occurs in the window of draws."""
        kinds = Counter(itertools.pairwise(self.pattern))
        return {kind: Fraction(times, self.window) for kind, times in kinds.items()}

    def approach(self, kind: tuple[bool, bool]) -> None:
        """Takes an unmeasured step after which the next one is of this kind.

        The step before matters: it is the one that measures ahead.
        """
        kinds = list(itertools.pairwise(self.pattern))
        later = ((self._draw + offset) % self.window for offset in range(1, self.window + 1))
        draw = next(draw for draw in later if kinds[draw] == kind)
        self.seek((draw - 1) % self.window)
        self.ready()
        self()

    def step(self, inject: bool) -> None:
        """Takes one step."""
        self.optimizer.step()

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns (relative, absolute) tolerance of the verification.

        For 16 bits the peers round G to storage several times. Torch's norms add up in float32
        and miss more of the sum the longer a tensor is: on a CPU, 1e-5 of the norm of 10**6 normal
        elements, 1.1e-2 of that of 10**8. Guidance left out or scaled wrongly is off by more.
        """
        base = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        base += 2e-10 * max(p.numel() for p in self.params)
        return base, base

    def elements_moved(self) -> float | None:
        """Returns arrays read and written per step; by default one pass of the update."""
        return self._update_arrays()

    def bytes_moved(self) -> float | None:
        """Returns the bytes a step has to move."""
        arrays = self.elements_moved()
        if arrays is None:
            return None
        return arrays * self.workload.elements * self.workload.dtype.itemsize

    def _update_arrays(self) -> int:
        # θ read and written, g read, each moment read and written.
        return 3 + 2 * len(self.workload.moments)

    def share_injected(self) -> float:
        """Returns the share of the draws in the window that inject."""
        return sum(self.pattern[: self.window]) / self.window


def preset(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    work: Workload,
    step_device: torch.device | str = "cpu",
) -> None:
    """Makes an optimizer work on the workload's moments, if there are any."""
    for row, param in enumerate(params if work.moments else ()):
        state = optimizer.state[param]
        if work.optimizer == "adamw":
            state["step"] = torch.tensor(float(FIRST_STEP), device=step_device)
            state["exp_avg"], state["exp_avg_sq"] = (moment[row] for moment in work.moments)
        elif work.optimizer == "momentum":
            state["momentum_buffer"] = work.moments[0][row]


def arguments(work: Workload) -> dict[str, object]:
    """Returns the hyper-parameters of a workload's optimizer."""
    if work.optimizer == "adamw":
        return {"lr": work.lr, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    momentum = MOMENTUM if work.optimizer == "momentum" else 0.0
    return {"lr": work.lr, "momentum": momentum, "weight_decay": WEIGHT_DECAY}


def guidance(work: Workload, setting: Setting, seed: int, backend: str) -> dict[str, object]:
    """Returns the arguments of an optimizer of ours for a setting."""
    alpha = 0.2 if setting.alpha is None else setting.alpha
    return {
        "alpha": "auto" if setting.automatic else alpha,
        "importance": setting.importance,
        "max_grad_norm": work.max_grad_norm if setting.clipped else None,
        "seed": seed,
        "backend": backend,
    }


def torch_optimizer(params, work: Workload, **how: bool) -> torch.optim.Optimizer:
    """Returns torch's optimizer of a workload; ``how`` it goes through the parameters."""
    kind = torch.optim.AdamW if work.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(params, **arguments(work), **how)
    # Only torch's fused step wants its count on the device.
    preset(optimizer, params, work, work.device if how.get("fused") else "cpu")
    return optimizer
