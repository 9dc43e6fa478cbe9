# SPDX-License-Identifier: BSD-3-Clause
"""Replay gradients beside ``.grad``, and the scale and verdict of a GradScaler."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dgg import _callers, anchor, backends, sharding
from dgg.sharding import fsdp1

_UNSCALED = backends.Scaling()

# Parameters whose gradients an open replay() block of some optimizer records.
_recorded: set[int] = set()


class ReplaySlot:
    """Holds the replay gradients r between ``with opt.replay():`` and the step that uses them.

    Attributes:
        recorded: A block has ended since the last step, whether or not it left any gradient here.
        looking: A step evaluates its closure, whose `zero_grad` leaves out no step.
    """

    def __init__(self) -> None:
        self._grads: dict[int, tuple[Tensor, Tensor]] = {}
        # The parameters of the last block in their order, and the replay gradient of each.
        self._recorded: tuple[list[Tensor], list[Tensor | None]] = [], []
        self._open = False
        self.recorded = self.looking = False
        # zero_grad() was called since the last block; a warning told of a dropped gradient.
        self._zeroed = self._warned = False

    def __bool__(self) -> bool:
        return bool(self._grads)

    def get(self, param: Tensor) -> Tensor | None:
        """Returns the replay gradient of ``param`` or None."""
        entry = self._grads.get(id(param))
        return None if entry is None else entry[1]

    def of(self, params: list[Tensor]) -> list[Tensor | None]:
        """Returns the replay gradient of each parameter or None; empty if there are none at all."""
        if not self._grads:
            return []
        recorded, grads = self._recorded
        if len(recorded) == len(params) and all(map(operator.is_, recorded, params)):
            return grads
        return [self.get(p) for p in params]

    def check_closed(self) -> None:
        """Raises a RuntimeError inside a replay() block, where ``.grad`` is not the gradient."""
        if self._open:
            raise RuntimeError(
                "step() inside a replay() block would take the replay gradient for the gradient; "
                "leave the block before the step"
            )

    def exchange(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Puts other tensors in place of the replay gradients of ``params``."""
        pairs = zip(params, grads, strict=True)
        others = {id(p): (p, grad) for p, grad in pairs if grad is not None}
        self._grads, self._recorded = {**self._grads, **others}, ([], [])

    def clear(self) -> None:
        """Drops all replay gradients."""
        self.restore(({}, ([], []), False, False))

    def kept(self) -> tuple:
        """Returns what `restore` takes; no block and no step writes into it."""
        return self._grads, self._recorded, self.recorded, self._zeroed

    def restore(self, kept: tuple) -> None:
        """Goes back to what there was when `kept` was called."""
        self._grads, self._recorded, self.recorded, self._zeroed = kept

    def zero_grad(self) -> None:
        """Notes that the optimizer has zeroed ``.grad``; the replay gradients stay.

        A loop may call it anywhere between the block and the step. A second call without a step in
        between means that the step was left out, and drops the replay gradients.
        """
        if self._open or self.looking or not self.recorded:
            return
        if not self._zeroed:
            self._zeroed = True
            return
        had_any = bool(self._grads)
        self.clear()
        if had_any and not self._warned:
            self._warned = True
            warnings.warn(
                "zero_grad() was called twice since the replay() block and no step() in between: "
                "the replay gradients are dropped. Step once per block, or drop them with "
                "clear_replay() where a step is left out on purpose",
                stacklevel=_callers.stacklevel(),
            )

    @contextlib.contextmanager
    def record(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Records gradients in the slot instead of ``.grad``, without copying any.

        The gradients already in ``.grad`` come back at the end; several blocks before a step add
        up. Only gradients that are views of an engine's buckets, and those of an earlier block, are
        copied; the views come back, too, with the values that they had.
        """
        if self._open:
            raise RuntimeError("replay() blocks do not nest; leave the outer one first")
        identities = set(map(id, params))
        if not identities.isdisjoint(_recorded):
            raise RuntimeError(
                "a replay() block of another optimizer over the same parameters is open and would "
                "get no gradient of theirs; leave it first, and give each block its own backward()"
            )
        for p in params:
            r = self.get(p)
            # torch takes gradients of another dtype where grad_dtype says so (None: of any).
            dtype = getattr(p, "grad_dtype", p.dtype)
            if r is not None and (
                (r.device, r.shape) != (p.device, p.shape) or dtype not in (None, r.dtype)
            ):
                raise RuntimeError(
                    f"replay gradients of {r.dtype}, shape {tuple(r.shape)}, are waiting for "
                    f"a step and the parameter has become {p.dtype}, {tuple(p.shape)}: step first, "
                    "or drop them with clear_replay()"
                )
        present = [p.grad for p in params]
        values = [*map(detached_from_bucket, present)]
        # A backward pass adds to the recorded gradients in place: after an error copies come back.
        # Those of a step that looks again (`kept`) are not added to, the copies are.
        copies = {key: (p, grad.clone()) for key, (p, grad) in self._grads.items()}
        before = copies
        if self.looking:
            self._grads, before = copies, self._grads
        self._open = True
        _recorded.update(identities)
        try:
            for p in params:
                p.grad = self.get(p)
            yield
            grads = [detached_from_bucket(p.grad) for p in params]
            self._grads = {
                id(p): (p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None
            }
            self._recorded = list(params), grads
            self.recorded, self._zeroed = True, False
        except BaseException:
            self._grads, self._recorded = before, ([], [])
            raise
        finally:
            self._open = False
            _recorded.difference_update(identities)
            for p, grad, value in zip(params, present, values, strict=True):
                p.grad = _written_back(grad, value)


def detached_from_bucket(grad: Tensor | None) -> Tensor | None:
    """Returns a gradient that no later backward pass writes into.

    DistributedDataParallel(gradient_as_bucket_view=True) and FSDP1 make ``.grad`` a view of a
    bucket that the next backward pass fills again; autograd's own gradients are no views.
    """
    if grad is None or sharding.is_dtensor(grad) or not grad._is_view():
        return grad
    return grad.clone()


@torch.no_grad()
def _written_back(grad: Tensor | None, value: Tensor | None) -> Tensor | None:
    """Returns ``grad``, with the values that it had; those alone where no view can take them."""
    if grad is None or value is None or grad is value:
        return value
    expanded = torch._debug_has_internal_overlap(grad) == 1  # copy_() asks the same
    return value if expanded else grad.copy_(value)


def read_scaler(
    grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device | None
) -> tuple[backends.Scaling, bool]:
    """Reads the tensors that a GradScaler left on the optimizer, of one element each or None.

    Returns:
        The scaling, and whether the host knows that the step is skipped. Launches on ``device``
        read ``found_inf`` there; without a device the call synchronises.
    """
    if device is not None:
        tensors = [x if x is None else x.to(device, torch.float32) for x in (grad_scale, found_inf)]
        return backends.Scaling(1.0, *tensors), False
    skip = found_inf is not None and bool(found_inf)
    return backends.Scaling(1.0 if grad_scale is None else float(grad_scale)), skip


def refuse_scaler(params: Sequence[Tensor], process_group) -> None:
    """Raises if a GradScaler that lets the step unscale has seen only this rank's gradients.

    Each rank would then skip its part of the step, and change its scale, by itself. Of DTensors
    torch sums the verdict over the ranks; of FSDP1's runs only unscale_() does.
    """
    if process_group is not None or any(map(fsdp1.is_one, params)):
        raise RuntimeError(
            "a GradScaler would look for inf and NaN in this rank's part of the gradients alone: "
            "call scaler.unscale_(optimizer) before scaler.step(optimizer), of a scaler that sums "
            "over the ranks what it finds "
            "(torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler)"
        )


def unscaled_unseen() -> bool:
    """Returns whether the caller is a GradScaler that has unscaled ``.grad`` before the step.

    It does so, and leaves no attribute, if the optimizer it was given (a wrapper, say) does not
    unscale by itself.
    """
    return _callers.called_by("torch.amp.grad_scaler", "GradScaler", "_maybe_opt_step")


def scaler_state(opt, replays: Sequence[Tensor | None]) -> tuple[backends.Scaling, Tensor | bool]:
    """Returns the scaling of a GradScaler, and whether its verdict skips the step.

    The latter is a tensor if only the device knows.
    """
    scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
    has_scaler = scale is not None or found_inf is not None
    if replays and scale is None and (has_scaler or unscaled_unseen()):
        raise RuntimeError(
            "GradScaler.unscale_() has unscaled the gradients but cannot reach the replay "
            "gradients; do not call it beside replay(): dgg clips in the step itself, set "
            "max_grad_norm on the optimizer. (Of a wrapper, ZeroRedundancyOptimizer say, "
            "GradScaler.step() calls it too: use bfloat16 without a scaler there)"
        )
    if not has_scaler:
        return _UNSCALED, False
    params = [p for group in opt.param_groups for p in group["params"]]
    if scale is not None:
        refuse_scaler(params, opt.process_group)
    devices = dict.fromkeys(p.device for p in params)
    launched = all(
        backends.launches(backends.choose(opt._settings.backend, device), device)
        for device in devices
    )
    scaling, skipped = read_scaler(scale, found_inf, next(iter(devices)) if launched else None)
    present = [r for r in replays if r is not None and r.numel()]
    if launched:
        if present and scaling.found_inf is not None:
            largest = torch.stack(torch._foreach_norm(present, float("inf")))
            infinite = largest.isfinite().all().logical_not().to(torch.float32)
            scaling = scaling._replace(found_inf=scaling.found_inf.reshape(()) + infinite)
        if scaling.found_inf is not None and opt._rule.waits_for_scaler(opt):
            skipped = bool(scaling.found_inf)
        return scaling, skipped or (False if scaling.found_inf is None else scaling.found_inf)
    if found_inf is not None and not skipped and not all(anchor.finite(r) for r in present):
        skipped = True
        warnings.warn(
            "the step is skipped because the replay gradients are inf or NaN, which GradScaler "
            "does not see: it will not lower its scale by itself; lower it with "
            "scaler.update(new_scale)",
            stacklevel=_callers.stacklevel(),
        )
    return scaling, skipped
