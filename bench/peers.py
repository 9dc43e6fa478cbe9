# SPDX-License-Identifier: BSD-3-Clause
"""What is compared: dgg's backends and everything a user would write or install instead.

Every peer is written as well as its style allows: few
passes, few temporaries, no Python work that can be hoisted out of the step. Each class says how
many bytes its step has to move, with write-allocate where a line is written that was not read.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from dgg.kernels.layout import CHUNK
from torch import Tensor

import dgg
from dgg import _philox, backends
from gpu import launch_driver
from report import first_line
from workload import (
    BETA1,
    BETA2,
    EPS,
    FIRST_STEP,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Setting,
    VerificationError,
    Workload,
)

# Draws over which the cost of a setting is averaged; more where α times this is no whole number.
WINDOW = 50


def window(alpha: float | None) -> int:
    """Returns the number of draws over which a setting's cost is averaged."""
    if alpha is None or (Fraction(str(alpha)) * WINDOW).denominator == 1:
        return WINDOW
    return 2 * WINDOW


class Unavailable(RuntimeError):
    """The variant cannot run here; the message says why."""


def choose_seed(alpha: float, draws: int = WINDOW) -> int:
    """Returns the smallest seed whose first ``draws`` draws inject at the wanted share.

    A run of 50 draws at α = 0.2 injects anything between 5 and 15 times; the average of a lucky
    one would flatter dgg, of an unlucky one its peers. The draw after the window must agree with
    the first one, so that going back to the start is a step like any other.
    """
    wanted = round(Fraction(str(alpha)) * draws)
    seed = 0
    while True:
        drawn = injections(seed, alpha, draws + 1)
        if sum(drawn[:draws]) == wanted and drawn[draws] == drawn[0]:
            return seed
        seed += 1


def injections(seed: int, alpha: float, count: int) -> list[bool]:
    """Returns which of the draws 0 … count - 1 inject, the real draws of the package."""
    limit = _philox.threshold(alpha)
    return [_philox.step_word(seed, draw) < limit for draw in range(count)]


class Variant(abc.ABC):
    """One implementation in one setting, on a workload.

    Attributes:
        name: As the tables call it.
        guided: Whether it has the settings with an alpha.
        replays: Whether it has the settings with replay gradients.
        needs: Fields of the setting without which it would be another variant → that variant.
        foreign: Somebody else's code: where it computes something else it is left out, with that as
            the reason, instead of ending the run.
        built_on: The variant whose optimizer it calls: where that computes something else, this one
            may, too, and is left out likewise.
        verified: Set by the harness; what is not verified is not timed.
        calls: Steps taken so far.
        window: Draws over which the cost is averaged.
    """

    name: ClassVar[str]
    guided: ClassVar[bool]
    replays: ClassVar[bool] = False
    needs: ClassVar[dict[str, str]] = {}
    foreign: ClassVar[bool] = False
    built_on: ClassVar[str | None] = None
    verified = False

    def __init__(self, workload: Workload, setting: Setting) -> None:
        if (setting.alpha is not None) and not self.guided:
            raise Unavailable("it has no guidance")
        if setting.replay and not self.replays:
            raise Unavailable("it has no replay gradients")
        for field, other in self.needs.items():
            if not getattr(setting, field):
                words = {"clipped": "clipping", "replay": "replay gradients"}[field]
                raise Unavailable(f"without {words} it is {other}")
        self.workload, self.setting, self.calls = workload, setting, 0
        self._draw = 0
        self.seed = 0
        self.window = window(setting.alpha)
        if setting.alpha is not None:
            self.seed = choose_seed(setting.alpha, self.window)
            self._pattern = injections(self.seed, setting.alpha, self.window + 1)
        else:
            self._pattern = [False] * (self.window + 1)
        # A CPU reads a line before it is written; a GPU does not.
        self._write_allocate = 1.0 if workload.device.type == "cpu" else 0.0
        self.params = workload.parameters()
        self._max_norm = workload.max_grad_norm

    def __call__(self) -> None:
        """Takes one step and counts it."""
        self.step(self._pattern[self._draw])
        self.calls += 1
        self._draw += 1
        if self._draw == self.window:
            self.seek(0)

    def ready(self) -> None:
        """Leaves the gradients as backward passes would; comes before every step, untimed."""
        self.workload.fresh_gradients()

    def verified_elsewhere(self) -> float | None:
        """Returns the error of a verification by other means; None: a step here is compared."""
        return None

    def seek(self, draw: int) -> None:
        """Goes to a draw index within the window."""
        self._draw = draw

    def injects(self) -> bool:
        """Returns whether the next step injects."""
        return self._pattern[self._draw]

    def kind(self) -> tuple[bool, bool]:
        """Returns what the next step's cost depends on: whether it, and the one after, inject."""
        return self._pattern[self._draw], self._pattern[self._draw + 1]

    def shares(self) -> dict[tuple[bool, bool], Fraction]:
        """Returns how often each kind occurs in the window of draws."""
        found: dict[tuple[bool, bool], Fraction] = {}
        for draw in range(self.window):
            kind = (self._pattern[draw], self._pattern[draw + 1])
            found[kind] = found.get(kind, Fraction(0)) + Fraction(1, self.window)
        return found

    def approach(self, kind: tuple[bool, bool]) -> None:
        """Takes an unmeasured step after which the next one is of this kind.

        The step before matters: it is the one that measures ahead.
        """
        for offset in range(1, self.window + 1):
            draw = (self._draw + offset) % self.window
            if (self._pattern[draw], self._pattern[draw + 1]) == kind:
                self.seek((draw - 1) % self.window)
                self.ready()
                self()
                return
        raise ValueError(f"no draw of the window is of the kind {kind}")

    @abc.abstractmethod
    def step(self, inject: bool) -> None:
        """Takes one step."""

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns (relative, absolute) tolerance of the verification.

        For 16 bits the peers round G to storage several times. Torch's norms add up in float32
        and miss more of the sum the longer a tensor is: on a CPU, 1e-5 of the norm of 10**6 normal
        elements, 1.1e-2 of that of 10**8. Guidance left out or scaled wrongly is off by more.
        """
        longest = max((p.numel() for p in self.params), default=0)
        base = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        base += 2e-10 * longest
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

    def _share_injected(self) -> float:
        return sum(self._pattern[: self.window]) / self.window


def _preset(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    work: Workload,
    *,
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
    return {
        "alpha": 0.2 if setting.alpha is None else setting.alpha,
        "max_grad_norm": work.max_grad_norm if setting.clipped else None,
        "seed": seed,
        "backend": backend,
    }


def unavailable(backend: str, device: torch.device) -> str | None:
    """Returns why a backend of ours cannot run on a device, or None."""
    return backends.unavailable(backend, device)


def _require(backend: str, work: Workload) -> None:
    if (reason := unavailable(backend, work.device)) is not None:
        raise Unavailable(reason)


def _torch_optimizer(params, work: Workload, **how: bool) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if work.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(params, **arguments(work), **how)
    # Only torch's fused step wants its count on the device.
    _preset(optimizer, params, work, step_device=work.device if how.get("fused") else "cpu")
    return optimizer


class _Guiding(Variant):
    """Has an optimizer of ours, which keeps replay gradients in a slot of their own."""

    guided = replays = True

    def ready(self) -> None:
        """The same, and the replay gradients wait for the step."""
        super().ready()
        if self.setting.replay:
            self.optimizer.clear_replay()
            self.record()

    def record(self) -> None:
        """A block with a backward pass that makes the replay gradients."""
        with self.optimizer.replay():
            for param, replay in zip(self.params, self.workload.replays, strict=True):
                param.grad = replay

    def seek(self, draw: int) -> None:
        """Goes to a draw index; it stands in the groups, as after a resume."""
        super().seek(draw)
        for group in self.optimizer.param_groups:
            group["draw_index"] = draw


class Dgg(_Guiding):
    """The package under test."""

    backend: ClassVar[str]

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        _require(self.backend, workload)
        kind = dgg.AdamW if workload.optimizer == "adamw" else dgg.SGD
        self.optimizer = kind(
            self.params,
            **arguments(workload),
            **guidance(workload, setting, self.seed, self.backend),
        )
        _preset(self.optimizer, self.params, workload)
        if setting.alpha is not None:
            workload.set_anchors(self.optimizer, self.params)

    def step(self, inject: bool) -> None:
        """Takes one step; the optimizer draws for itself."""
        self.optimizer.step()

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the defaults of torch.testing: dgg has no excuse."""
        relative = {torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
        return relative[dtype], 1e-5

    def elements_moved(self) -> float | None:
        """One pass; the gradients once more for their norm; the anchor when it is used."""
        normed = self.setting.clipped or self.setting.alpha is not None
        gradients = 1.0 + self.setting.replay
        return self._update_arrays() - 1.0 + gradients * (1 + normed) + self._share_injected()


class DggCpp(Dgg):
    """The C++ kernels."""

    name = "dgg cpp"
    backend = "cpp"


class DggCppBlock(DggCpp):
    """The same with the block timed that takes the replay gradients apart from the others.

    The backward pass in it is not a step's affair: assigning the gradients stands for it.
    """

    name = "dgg cpp, replay() timed"
    needs: ClassVar[dict[str, str]] = {"replay": "dgg cpp"}

    def ready(self) -> None:
        """Gradients alone; what is kept from a step that was not taken is dropped."""
        Variant.ready(self)
        self.optimizer.clear_replay()

    def step(self, inject: bool) -> None:
        """The block, then the step."""
        self.record()
        super().step(inject)


class DggTriton(Dgg):
    """The Triton kernels."""

    name = "dgg triton"
    backend = "triton"


class DggLaunched(DggTriton):
    """Launched steps as the host makes them, with a driver that starts nothing.

    Its time is the host's for a GPU, less what only a GPU's driver does; see launch_driver.py.
    """

    name = "dgg triton, nothing started"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        if workload.device.type != "cpu":
            raise Unavailable("on a GPU the steps of dgg triton are launched")
        try:
            self._driver = launch_driver.install()
        except RuntimeError as reason:
            raise Unavailable(str(reason)) from reason
        super().__init__(workload, setting)

    def verified_elsewhere(self) -> float:
        """Compares what the interpreter computes, and looks at what is started here.

        Raises:
            VerificationError: A step is wrong, or does not start what it has to.
        """
        work, setting = self.workload, self.setting
        dtype = str(work.dtype).removeprefix("torch.")
        try:
            error = launch_driver.interpreted(work.optimizer, dtype)[setting.name]
        except RuntimeError as reason:
            raise VerificationError(f"{self.name} ({setting.name}): {reason}") from reason
        chunks = sum(max(1, -(-p.numel() // CHUNK)) for p in self.params)
        update = "adam_kernel" if work.optimizer == "adamw" else "sgd_kernel"
        # The norms' kernel where there is a norm, and always the update: once, over all chunks.
        wanted = [(update, chunks)]
        if setting.clipped or setting.alpha is not None:
            wanted.append(("norms_kernel", chunks))
        for _ in range(2):
            self.ready()
            started = launch_driver.started_by(self._driver, self)
            large = [launch for launch in started if launch[0] in ("norms_kernel", update)]
            if sorted(large) != sorted(wanted):
                raise VerificationError(
                    f"{self.name} ({setting.name}) starts {started}, not {wanted}"
                )
        self.seek(0)
        return error

    def elements_moved(self) -> float | None:
        """Nothing is."""
        return None


class DggReference(Dgg):
    """The specification in plain torch; slow by intent, never an opponent."""

    name = "dgg reference"
    backend = "reference"

    def elements_moved(self) -> float | None:
        """Not accounted: float32 copies of everything."""
        return None


class TorchFused(Variant):
    """torch.optim with fused=True, with clip_grad_norm_ when the setting clips."""

    name = "torch fused"
    guided = False
    foreign = True
    how: ClassVar[dict[str, bool]] = {"fused": True}
    foreach_clip: ClassVar[bool | None] = None

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self.optimizer = _torch_optimizer(self.params, workload, **self.how)

    def step(self, inject: bool) -> None:
        """Clips if asked to and steps."""
        if self.setting.clipped:
            torch.nn.utils.clip_grad_norm_(self.params, self._max_norm, foreach=self.foreach_clip)
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """Clipping reads the gradient for the norm and rewrites it."""
        return self._update_arrays() + (3.0 if self.setting.clipped else 0.0)


class TorchFusedForeachClip(TorchFused):
    """The same with the clipping that is not the default on a CPU but has less overhead there."""

    name = "torch fused, foreach clip"
    foreach_clip = True
    needs: ClassVar[dict[str, str]] = {"clipped": "torch fused"}


class AddFused(TorchFused):
    """Replay gradients added to the others in one foreach call, then what comes without them."""

    name = "add + torch fused"
    replays = True
    needs: ClassVar[dict[str, str]] = {"replay": "torch fused"}

    def step(self, inject: bool) -> None:
        """Adds, clips if asked to, steps."""
        torch._foreach_add_([p.grad for p in self.params], self.workload.replays)
        super().step(inject)

    def elements_moved(self) -> float | None:
        """Adding reads two and writes one."""
        return super().elements_moved() + 3.0


class AddFusedForeachClip(AddFused):
    """The same with the clipping that is not the default on a CPU."""

    name = "add + torch fused, foreach clip"
    foreach_clip = True
    needs: ClassVar[dict[str, str]] = {**AddFused.needs, "clipped": "add + torch fused"}


class GuidanceOverFused(_Guiding):
    """`dgg.Guidance` over torch's fused optimizer: the gradients are edited, torch steps."""

    name = "dgg Guidance + torch fused"
    built_on = "torch fused"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if setting.alpha is None and not setting.clipped and not setting.replay:
            raise Unavailable("without anything to do to the gradients it is torch fused")
        _require("cpp", workload)
        self._torch = _torch_optimizer(self.params, workload, fused=True)
        self.optimizer = dgg.Guidance(self._torch, **guidance(workload, setting, self.seed, "cpp"))
        if setting.alpha is not None:
            workload.set_anchors(self.optimizer, self.params)

    def step(self, inject: bool) -> None:
        """Torch's step; the guidance hangs on it."""
        self._torch.step()

    def elements_moved(self) -> float | None:
        """Norms: g, r, and d's two; the edit: g twice, r, d's two; the update."""
        gradients = 1.0 + self.setting.replay
        edit = gradients + 1.0 + 2.0 * self._share_injected()
        return self._update_arrays() + gradients + 2.0 * self._share_injected() + edit


class _EagerGuidance(Variant):
    """Guidance and clipping in eager torch, then a torch optimizer."""

    guided = True
    how: ClassVar[dict[str, bool]] = {"fused": True}

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self.optimizer = _torch_optimizer(self.params, workload, **self.how)
        self._on_host = workload.device.type == "cpu"

    def _scalar(self, value: Tensor) -> Tensor | float:
        # On a CPU reading a number costs nothing and spares a pass; on a GPU it would synchronise.
        # There torch._foreach_mul_ falls back to a kernel per tensor for a number of another dtype.
        return value.item() if self._on_host else value.to(self.workload.dtype)

    def _clip(self, grad_norm: Tensor) -> Tensor:
        if not self.setting.clipped:
            return torch.ones_like(grad_norm)
        return torch.clamp(self._max_norm / (grad_norm + 1e-6), max=1.0)

    def elements_moved(self) -> float | None:
        """Norm 1, clip 2; injected: d 2 + 1 and its write-allocate, ‖d‖ 1, G 3; the update.

        Where s cannot be read without waiting for the device, s d is a pass of its own (2).
        """
        clipping = 3.0 if self.setting.clipped else 1.0
        injected = 7.0 + self._write_allocate + (0.0 if self._on_host else 2.0)
        return self._update_arrays() + clipping + injected * self._share_injected()


class LoopGuidance(_EagerGuidance):
    """A for-loop over the parameters and the for-loop optimizer: the formula, typed in."""

    name = "for-loop"
    how: ClassVar[dict[str, bool]] = {"foreach": False, "fused": False}

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Guides each gradient, then steps."""
        params, anchors = self.params, self.workload.anchors
        grads = [p.grad for p in params]
        grad_norm = torch.stack([g.norm(dtype=torch.float32) for g in grads]).norm()
        clip = self._clip(grad_norm)
        differences = scale = None
        if inject:
            differences = [p - a for p, a in zip(params, anchors, strict=True)]
            distance = torch.stack([d.norm(dtype=torch.float32) for d in differences]).norm()
            scale = self._scalar(torch.clamp(clip * grad_norm / distance, max=1.0))
        clip = self._scalar(clip)
        for row, grad in enumerate(grads):
            if self.setting.clipped:
                grad.mul_(clip)
            if differences is not None:
                if self._on_host:
                    grad.add_(differences[row], alpha=scale)
                else:
                    grad.add_(differences[row].mul_(scale))
        del differences
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """As the foreach one, with torch's optimizer taken apart into its passes."""
        guidance = super().elements_moved() - self._update_arrays()
        # AdamW: θ decayed 2, m 3, v scaled 2, g² added 3, √v 3, divided 3, eps 2, θ 4.
        # SGD: weight decay writes a copy of g 4, momentum scaled 2, G added 3, θ 3.
        passes = {"adamw": 22.0, "momentum": 12.0, "sgd": 7.0}[self.workload.optimizer]
        return guidance + passes


class ForeachGuidance(_EagerGuidance):
    """Guidance by torch._foreach_* and the fused optimizer: what one writes to be fast."""

    name = "foreach + fused"
    built_on = "torch fused"
    replays = True

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Guides all gradients, then steps."""
        params, anchors = self.params, self.workload.anchors
        grads = [p.grad for p in params]
        grad_norm = total_norm = norm_of(grads)
        if self.setting.replay:
            torch._foreach_add_(grads, self.workload.replays)
            total_norm = norm_of(grads)
        clip = self._clip(total_norm)
        if inject:
            differences = self._differences(params, anchors)
            scale = torch.clamp(clip * grad_norm / norm_of(differences), max=1.0)
            if self._on_host:
                if self.setting.clipped:
                    torch._foreach_mul_(grads, clip.item())
                torch._foreach_add_(grads, differences, alpha=scale.item())
            else:
                if self.setting.clipped:
                    torch._foreach_mul_(grads, self._scalar(clip))
                torch._foreach_mul_(differences, self._scalar(scale))
                torch._foreach_add_(grads, differences)
            del differences
        elif self.setting.clipped:
            torch._foreach_mul_(grads, self._scalar(clip))
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """Replay gradients: added (3), and a norm of the sum."""
        return super().elements_moved() + 4.0 * self.setting.replay

    def _differences(self, params, anchors) -> Sequence[Tensor]:
        return torch._foreach_sub(params, anchors)


class ForeachGuidanceTypical(_EagerGuidance):
    """Guidance by torch._foreach_* behind torch's own clipping: what one writes first.

    Each formula is a line of its own: the norm is taken again after the clipping, and s d is
    formed before it is added. The variant above is this one with every spare pass taken out.
    """

    name = "foreach + clip_grad_norm_ + fused"
    built_on = "torch fused"

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Clips, guides, steps."""
        if self.setting.clipped:
            torch.nn.utils.clip_grad_norm_(self.params, self._max_norm, foreach=True)
        if inject:
            dtype = None if self._on_host else self.workload.dtype
            guide_by_foreach(self.params, self.workload.anchors, dtype=dtype)
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """The norm once more, and s d in place, on the steps that inject."""
        more = 3.0 if self._on_host else 1.0
        return super().elements_moved() + more * self._share_injected()


class ForeachGuidanceKeptBuffer(ForeachGuidance):
    """The same with d kept between the steps: a second copy of the weights for fewer page faults.

    The strongest eager peer in time, at a price in memory that dgg does not have.
    """

    name = "foreach + fused, d kept"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self._kept = [torch.zeros_like(p) for p in workload.params]

    def _differences(self, params, anchors) -> Sequence[Tensor]:
        for param, anchor, kept in zip(params, anchors, self._kept, strict=True):
            torch.sub(param, anchor, out=kept)
        return self._kept


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all tensors together, summed in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)))


def guide_by_foreach(
    params: Sequence[Tensor], anchors: Sequence[Tensor], *, grad_norm: Tensor | None = None,
    norm: Callable[[Sequence[Tensor]], Tensor] = norm_of, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Adds s d to the gradients by torch._foreach_*, a line for each formula.

    Args:
        params: Parameters with gradients.
        anchors: θ* of each.
        grad_norm: Norm of the gradients, if it is known.
        norm: How norms are taken.
        dtype: Of s. On a GPU that of the tensors: else there is a kernel for each of them.
    """
    grads = [p.grad for p in params]
    differences = torch._foreach_sub(params, anchors)
    grad_norm = norm(grads) if grad_norm is None else grad_norm
    scale = torch.clamp(grad_norm / norm(differences), max=1.0)
    torch._foreach_mul_(differences, scale if dtype is None else scale.to(dtype))
    torch._foreach_add_(grads, differences)


class CompiledGuidance(Variant):
    """The whole guided step under torch.compile, written so that it fuses into two loops."""

    name = "torch.compile"
    guided = True

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if setting.alpha != 1.0:
            raise Unavailable("the compiled step injects always")
        if len(workload.params) > 16:
            raise Unavailable(
                f"inductor unrolls the step: compiling {len(workload.params)} tensors with a C++ "
                "compiler takes longer than the whole benchmark"
            )
        self._step = torch.tensor(float(FIRST_STEP), device=workload.device)
        self._grads = [p.grad for p in self.params]
        # Every size is compiled for itself; a limit on recompilations would fall back to eager.
        torch._dynamo.reset()
        self._compiled = torch.compile(_guided_step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Runs the compiled function; the first call compiles."""
        work = self.workload
        try:
            self._compiled(
                self.params, self._grads, work.anchors, work.moments, self._step,
                self._max_norm, work.optimizer,
            )  # fmt: skip
        except Exception as error:
            if self.calls:
                raise
            reason = first_line(error, Exception)
            raise Unavailable(f"it does not compile here: {reason}") from error

    def elements_moved(self) -> float | None:
        """Norms 1 + 2, then the update with the anchor."""
        return self._update_arrays() + 4.0


def _guided_step(params, grads, anchors, moments, step, max_norm, optimizer):
    step.add_(1)
    total = sum(g.float().square().sum() for g in grads).sqrt()
    pairs = list(zip(params, anchors, strict=True))
    distance = sum((p.float() - a.float()).square().sum() for p, a in pairs).sqrt()
    clip = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    scale = torch.clamp(clip * total / distance, max=1.0)
    for row, (param, anchor) in enumerate(pairs):
        theta = param.float()
        gradient = clip * grads[row].float() + scale * (theta - anchor.float())
        if optimizer == "adamw":
            m, v = moments[0][row], moments[1][row]
            first = torch.lerp(m.float(), gradient, 1 - BETA1)
            second = v.float() * BETA2 + (1 - BETA2) * gradient * gradient
            denominator = second.sqrt() / (1 - BETA2**step).sqrt() + EPS
            theta = theta * (1 - LR * WEIGHT_DECAY)
            theta = theta - (LR / (1 - BETA1**step)) * first / denominator
            m.copy_(first)
            v.copy_(second)
        else:
            gradient = gradient + WEIGHT_DECAY * theta
            if moments:
                gradient = moments[0][row].float() * MOMENTUM + gradient
                moments[0][row].copy_(gradient)
            theta = theta - LR * gradient
        param.copy_(theta)


def _deepspeed_kernels(name: str) -> None:
    """Refuses kernels that DeepSpeed would first compile: minutes that nobody asked for.

    A compilation that was once interrupted leaves a lock behind for which torch waits forever.
    """
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get(name):
        raise Unavailable(
            f"its kernels are not built; install DeepSpeed with DS_BUILD_{name.upper()}=1"
        )


class _ForeignAdamW(Variant):
    """Somebody else's fused AdamW, where it is installed; neither guidance nor clipping."""

    guided = False
    foreign = True
    where: ClassVar[str] = "cuda"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if workload.optimizer != "adamw" or setting.clipped:
            raise Unavailable("it is a plain AdamW")
        if workload.device.type != self.where:
            raise Unavailable(f"it runs on a {'GPU' if self.where == 'cuda' else 'CPU'} only")
        try:
            self.optimizer = self._build()
            for row, param in enumerate(self.params):
                self._seed_state(param, *(moment[row] for moment in workload.moments))
        except Unavailable:
            raise
        except Exception as error:  # not installed, or built for another torch: all one here
            raise Unavailable(first_line(error)) from error

    @abc.abstractmethod
    def _build(self) -> torch.optim.Optimizer: ...

    def _seed_state(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        state = self.optimizer.state[param]
        state.update(step=FIRST_STEP, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = FIRST_STEP

    def step(self, inject: bool) -> None:
        """Steps."""
        self.optimizer.step()


class DeepSpeedCpuAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for CPUs; one that computes something else ends the run."""

    name = "DeepSpeedCPUAdam"
    foreign = False
    where = "cpu"

    def _build(self):
        _deepspeed_kernels("cpu_adam")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        how = {"adamw_mode": True, "fp32_optimizer_states": False}
        return DeepSpeedCPUAdam(self.params, **arguments(self.workload), **how)


class ApexFusedAdam(_ForeignAdamW):
    """NVIDIA apex."""

    name = "apex FusedAdam"

    def _build(self):
        from apex.optimizers import FusedAdam

        return FusedAdam(self.params, adam_w_mode=True, **arguments(self.workload))


class DeepSpeedFusedAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for GPUs."""

    name = "DeepSpeed FusedAdam"

    def _build(self):
        _deepspeed_kernels("fused_adam")
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(self.params, adam_w_mode=True, **arguments(self.workload))


class BitsAndBytes(_ForeignAdamW):
    """bitsandbytes with 32-bit state: the same arithmetic, a kernel per tensor."""

    name = "bitsandbytes AdamW32bit"

    def _build(self):
        from bitsandbytes.optim import AdamW32bit

        return AdamW32bit(self.params, **arguments(self.workload))

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        self.optimizer.state[param].update(step=FIRST_STEP, state1=exp_avg, state2=exp_avg_sq)


class Optimi(_ForeignAdamW):
    """optimi's Triton kernels."""

    name = "optimi AdamW"

    def _build(self):
        from optimi import AdamW

        return AdamW(self.params, triton=True, kahan_sum=False, **arguments(self.workload))

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        super()._seed_state(param, exp_avg, exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = torch.tensor(FIRST_STEP, dtype=torch.int32)


IMPLEMENTATIONS: dict[str, type[Variant]] = {
    kind.name: kind
    for kind in (
        DggCpp, DggCppBlock, DggTriton, DggLaunched, DggReference, GuidanceOverFused, TorchFused,
        TorchFusedForeachClip, AddFused, AddFusedForeachClip, LoopGuidance,
        ForeachGuidance, ForeachGuidanceKeptBuffer, ForeachGuidanceTypical,
        CompiledGuidance, DeepSpeedCpuAdam,
        ApexFusedAdam, DeepSpeedFusedAdam, BitsAndBytes, Optimi,
    )
}  # fmt: skip
