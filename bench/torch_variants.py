# SPDX-License-Identifier: BSD-3-Clause
"""The variants in peers.py that a user writes with torch alone: clipping, guidance, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from report import first_line
from variant import Unavailable, Variant, torch_optimizer
from workload import BETA1, BETA2, EPS, FIRST_STEP, LR, MOMENTUM, WEIGHT_DECAY, Setting, Workload


class TorchFused(Variant):
    """torch.optim with fused=True, with clip_grad_norm_ when the setting clips."""

    name = "torch fused"
    foreign = True
    how: ClassVar[dict[str, bool]] = {"fused": True}
    foreach_clip: ClassVar[bool | None] = None

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self.optimizer = torch_optimizer(self.params, workload, **self.how)

    def step(self, inject: bool) -> None:
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


class _EagerGuidance(Variant):
    """Guidance and clipping in eager torch, then a torch optimizer."""

    guided = True
    how: ClassVar[dict[str, bool]] = {"fused": True}

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self.optimizer = torch_optimizer(self.params, workload, **self.how)
        self._on_host = workload.device.type == "cpu"

    def _scalar(self, value: Tensor) -> Tensor | float:
        # On a CPU reading a number costs nothing and spares a pass; on a GPU it would synchronise.
        # There torch._foreach_mul_ falls back to a kernel per tensor for a number of another dtype.
        return value.item() if self._on_host else value.to(self.workload.dtype)

    def _clip(self, grad_norm: Tensor) -> Tensor:
        if not self.setting.clipped:
            return torch.ones_like(grad_norm)
        return torch.clamp(self._max_norm / (grad_norm + 1e-6), max=1.0)

    def _clip_and_pull(self, grads, clip: Tensor, differences, scale: Tensor | None) -> None:
        """Makes the gradients c h + s d; ``differences`` None: c h."""
        if self.setting.clipped:
            torch._foreach_mul_(grads, self._scalar(clip))
        if differences is not None and self._on_host:
            torch._foreach_add_(grads, differences, alpha=scale.item())
        elif differences is not None:
            torch._foreach_mul_(differences, self._scalar(scale))
            torch._foreach_add_(grads, differences)

    def elements_moved(self) -> float | None:
        """Norm 1, clip 2; injected: d 2 + 1 and its write-allocate, ‖d‖ 1, G 3; the update.

        Where s cannot be read without waiting for the device, s d is a pass of its own (2).
        """
        clipping = 3.0 if self.setting.clipped else 1.0
        injected = 7.0 + self._write_allocate + (0.0 if self._on_host else 2.0)
        return self._update_arrays() + clipping + injected * self.share_injected()


class LoopGuidance(_EagerGuidance):
    """A for-loop over the parameters and the for-loop optimizer: the formula, typed in."""

    name = "for-loop"
    how: ClassVar[dict[str, bool]] = {"foreach": False, "fused": False}

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        params, anchors = self.params, self.workload.anchors
        grads = [p.grad for p in params]
        grad_norm = torch.stack([g.norm(dtype=torch.float32) for g in grads]).norm()
        clip = self._clip(grad_norm)
        differences = None
        if inject:
            differences = [p - a for p, a in zip(params, anchors, strict=True)]
            distance = torch.stack([d.norm(dtype=torch.float32) for d in differences]).norm()
            scale = self._scalar(torch.clamp(clip * grad_norm / distance, max=1.0))
        clip = self._scalar(clip)
        for row, grad in enumerate(grads):
            if self.setting.clipped:
                grad.mul_(clip)
            if inject and self._on_host:
                grad.add_(differences[row], alpha=scale)
            elif inject:
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
        params, anchors = self.params, self.workload.anchors
        grads = [p.grad for p in params]
        grad_norm = total_norm = norm_of(grads)
        if self.setting.replay:
            torch._foreach_add_(grads, self.workload.replays)
            total_norm = norm_of(grads)
        clip = self._clip(total_norm)
        differences = scale = None
        if inject:
            differences = self._differences(params, anchors)
            scale = torch.clamp(clip * grad_norm / norm_of(differences), max=1.0)
        self._clip_and_pull(grads, clip, differences, scale)
        del differences
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """Replay gradients: added (3), and a norm of the sum."""
        return super().elements_moved() + 4.0 * self.setting.replay

    def _differences(self, params, anchors) -> Sequence[Tensor]:
        return torch._foreach_sub(params, anchors)


class ForeachGuard(_EagerGuidance):
    """The rule of alpha="auto" by torch._foreach_* and the fused optimizer."""

    name = "foreach guard + fused"
    built_on = "torch fused"
    replays = automatic = True

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        params, replays = self.params, self.workload.replays
        grads = [p.grad for p in params]
        torch._foreach_add_(grads, replays)
        head = norm_of(grads)
        clip = self._clip(head)
        differences = torch._foreach_sub(params, self.workload.anchors)
        conflict, back = dot_of(grads, replays), dot_of(differences, replays)
        most = clip * head / norm_of(differences)
        scale = torch.minimum(-clip * conflict / back, most)
        scale = torch.where((conflict < 0) & (back > 0), scale, torch.zeros_like(scale))
        self._clip_and_pull(grads, clip, differences, scale)
        del differences
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """Added 3, ‖h‖ 1, d 2 + 1, two products 4, ‖d‖ 1, clipped 2, G 3; the update."""
        more = self._write_allocate + (0.0 if self._on_host else 2.0)
        return self._update_arrays() + 17.0 + more


def dot_of(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Returns the product of two lists of tensors, float32 at least."""
    wide = torch.promote_types(xs[0].dtype, torch.float32)
    flat = ((x.reshape(-1).to(wide), y.reshape(-1).to(wide)) for x, y in zip(xs, ys, strict=True))
    return torch.stack([torch.dot(x, y) for x, y in flat]).sum()


class ForeachGuidanceTypical(_EagerGuidance):
    """Guidance by torch._foreach_* behind torch's own clipping: what one writes first.

    Each formula is a line of its own: the norm is taken again after the clipping, and s d is
    formed before it is added. The variant above is this one with every spare pass taken out.
    """

    name = "foreach + clip_grad_norm_ + fused"
    built_on = "torch fused"

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        if self.setting.clipped:
            torch.nn.utils.clip_grad_norm_(self.params, self._max_norm, foreach=True)
        if inject:
            dtype = None if self._on_host else self.workload.dtype
            guide_by_foreach(self.params, self.workload.anchors, dtype=dtype)
        self.optimizer.step()

    def elements_moved(self) -> float | None:
        """The norm once more, and s d in place, on the steps that inject."""
        more = 3.0 if self._on_host else 1.0
        return super().elements_moved() + more * self.share_injected()


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

    ``grad_norm`` is that of the gradients, if it is known, ``norm`` how norms are taken, ``dtype``
    that of s: on a GPU that of the tensors, else there is a kernel for each of them.
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
            many = f"inductor unrolls the step: compiling {len(workload.params)} tensors with a C++"
            raise Unavailable(f"{many} compiler takes longer than the whole benchmark")
        self._step = torch.tensor(float(FIRST_STEP), device=workload.device)
        self._grads = [p.grad for p in self.params]
        # Every size is compiled for itself; a limit on recompilations would fall back to eager.
        torch._dynamo.reset()
        self._compiled = torch.compile(_guided_step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Runs the compiled function; the first call compiles."""
        work = self.workload
        tensors = (self.params, self._grads, work.anchors, work.moments, self._step)
        try:
            self._compiled(*tensors, self._max_norm, work.optimizer)
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
