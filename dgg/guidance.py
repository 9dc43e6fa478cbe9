# SPDX-License-Identifier: BSD-3-Clause
"""Guidance itself: Bernoulli draws, scale, look-ahead, the replay slot.

`Engine` is what `dgg.optim` and `dgg.foreign` share: it knows at which steps to inject, measures
the norms these steps need and nothing else, and remembers what it did for the statistics.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import (
    _arguments,
    _callers,
    _philox,
    _ranges,
    backends,
    reference,
    sharding,
)
from dgg.sharding import fsdp1

# Parameters whose gradients an open replay() block of some optimizer records.
_recorded: set[int] = set()


class ReplaySlot:
    """Holds the replay gradients r between ``with opt.replay():`` and the step that uses them."""

    def __init__(self) -> None:
        self._grads: dict[int, tuple[Tensor, Tensor]] = {}
        # The parameters of the last block in their order, and what stands in `_grads` of each.
        self._recorded: tuple[list[Tensor], list[Tensor | None]] = [], []
        self._open = False
        # zero_grad() was called since the last block; a dropped gradient was warned of.
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

    def exchange(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Puts other tensors in place of the replay gradients of ``params``."""
        for p, grad in zip(params, grads, strict=True):
            self._grads[id(p)] = (p, grad)
        self._recorded = [], []

    def clear(self) -> None:
        """Drops all replay gradients: the step has used them, or nobody wants them any more."""
        self._grads.clear()
        self._recorded = [], []
        self._zeroed = False

    def zero_grad(self) -> None:
        """Notes that the optimizer has zeroed gradients: after a block that is ``.grad``'s alone.

        So loops may do it anywhere between the block and the step. A second time without a step in
        between can only mean that the step is not to come, and drops the gradients.
        """
        if self._open or not self._grads:
            return
        if not self._zeroed:
            self._zeroed = True
            return
        self.clear()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "zero_grad() was called twice since the replay() block and no step() in between: "
                "the replay gradients are dropped. Step once per block, or drop them with "
                "clear_replay() where a step is left out on purpose",
                stacklevel=_callers.stacklevel(),
            )

    @contextlib.contextmanager
    def record(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Lets gradients flow into the slot instead of ``.grad``, without copying any.

        The gradients already in ``.grad`` are put aside and come back at the end; several
        recordings before a step add up. Only gradients that are views of an engine's buckets, and
        those of an earlier block, are copied.
        """
        if self._open:
            raise RuntimeError("replay() blocks do not nest; leave the outer one first")
        mine = set(map(id, params))
        if not mine.isdisjoint(_recorded):
            raise RuntimeError(
                "a replay() block of another optimizer over the same parameters is open and would "
                "get no gradient of theirs; leave it first, and give each block its own backward()"
            )
        for p in params:
            kept = self.get(p)
            # torch takes gradients of another dtype where grad_dtype says so (None: of any).
            dtype = getattr(p, "grad_dtype", p.dtype)
            if kept is not None and (
                (kept.device, kept.shape) != (p.device, p.shape) or dtype not in (None, kept.dtype)
            ):
                raise RuntimeError(
                    f"replay gradients of {kept.dtype}, shape {tuple(kept.shape)}, are waiting for "
                    f"a step and the parameter has become {p.dtype}, {tuple(p.shape)}: step first, "
                    "or drop them with clear_replay()"
                )
        present = [_apart(p.grad) for p in params]
        # Backward passes add to what they find, in place: only a copy of it can come back.
        before = {key: (p, grad.clone()) for key, (p, grad) in self._grads.items()}
        self._open = True
        _recorded.update(mine)
        try:
            for p in params:
                p.grad = self.get(p)
            yield
            grads = [_apart(p.grad) for p in params]
            self._grads = {
                id(p): (p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None
            }
            self._recorded = list(params), grads
            self._zeroed = False
        except BaseException:
            self._grads, self._recorded = before, ([], [])
            raise
        finally:
            self._open = False
            _recorded.difference_update(mine)
            for p, grad in zip(params, present, strict=True):
                p.grad = grad


def _apart(grad: Tensor | None) -> Tensor | None:
    """Returns a gradient that no later backward pass writes into.

    DistributedDataParallel(gradient_as_bucket_view=True) and FSDP1 make ``.grad`` a view of a
    bucket that the next backward pass fills again; what autograd makes itself is no view.
    """
    if grad is None or sharding.is_dtensor(grad) or not grad._is_view():
        return grad
    return grad.clone()


class Engine:
    """Decides when to inject, measures what that needs, and remembers it.

    One engine belongs to one optimizer and keeps nothing that a checkpoint would need: seed and
    draw index stand in the groups.
    """

    def __init__(self) -> None:
        self.options = _arguments.Options()
        self.replay = ReplaySlot()
        # Steps that a fresh optimizer was resumed after; the task that was named with the anchor.
        self.resumed: int | None = None
        self.named: int | None = None
        self._words: tuple[int, int, int] | None = None
        self._last: dict[str, Any] | None = None

    def flags(
        self, wide: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rows, draw: int
    ) -> Tensor | None:
        """Returns the uint8 flags of every row at draw ``draw``; None if none injects."""
        if not rows.anchored:
            return None
        limits = self._limits(groups)
        if not any(limits):
            return None
        granularity, seed = wide["granularity"], wide["seed"]
        if granularity == "step":
            # At α = 1 the step is known without its word.
            sure = all([limit in (0, 1 << 32) for limit in limits])
            word = 0 if sure else self._step_word(seed, draw)
            by_group = [reference.INJECT if word < limit else 0 for limit in limits]
        elif granularity == "element":
            # Above or below all words the elements' draws are known without drawing.
            by_group = [
                reference.INJECT if limit == 1 << 32 else reference.INJECT_ELEMENTS if limit else 0
                for limit in limits
            ]
        else:
            words = _philox.tensor_words(seed, draw, torch.tensor(rows.indices, device="cpu"))
            limit = torch.tensor([limits[group] for group in rows.groups], device="cpu")
            hit = words < limit
            # Two places: the next step's flags are asked for before this step's are read.
            return rows.flags(hit.tolist(), f"flags {draw % 2}") if bool(hit.any()) else None
        if not any(by_group):
            return None
        if len(set(by_group)) == 1:
            return rows.constant_flags(by_group[0])
        return rows.flags([by_group[group] for group in rows.groups], f"flags {draw % 2}")

    def _limits(self, groups: Sequence[Mapping[str, Any]]) -> list:
        limits = self.options.derived.get("limits")
        if limits is None:
            limits = self.options.derived["limits"] = _limits(groups)
        return limits

    def joins(self, wide: Mapping[str, Any], groups, all_rows, process_group) -> bool:
        """Returns whether a rank takes part in norms without knowing if any rank injects.

        Draws per tensor are those of this rank's tensors; of partitions others may have more.
        """
        return (
            process_group is not None
            and wide["granularity"] == "tensor"
            and any(rows.anchored for rows in all_rows)
            and any(self._limits(groups))
        )

    def _step_word(self, seed: int, draw: int) -> int:
        # The look-ahead asks at step k for k + 1, which the next step asks for again.
        if self._words is None or self._words[:2] != (seed, draw):
            self._words = (seed, draw, _philox.step_word(seed, draw))
        return self._words[2]

    @staticmethod
    def measures(wide: Mapping[str, Any], injecting: bool) -> bool:
        """Returns whether a step needs norms, so that `measure` sums them over ranks."""
        return wide["max_grad_norm"] is not None or (injecting and wide["scaling"])

    def measure(
        self,
        wide: Mapping[str, Any],
        all_rows: Sequence[backends.Rows],
        injecting: bool,
        scaling: backends.Scaling,
        gates: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns the coefficients [4 + n] of each device's rows, computing only needed norms.

        Args:
            wide: Optimizer-wide options.
            all_rows: The rows of every device.
            injecting: Whether any row may inject.
            scaling: Divisor of the gradients.
            gates: uint8 [1] of every device: whether a captured step injects.
        """
        which = reference.NORM_TOTAL if wide["max_grad_norm"] is not None else 0
        if injecting and wide["scaling"]:
            which |= reference.NORM_GRAD | reference.NORM_DISTANCE
            for rows in all_rows:
                if gates is None:
                    rows.forget_changed()
                else:
                    rows.forget(anchors=False)
        if not which:
            return [rows.constant_coefficients() for rows in all_rows]
        per_tensor = wide["norm_scope"] == "tensor"
        bound = wide["max_grad_norm"]
        settings = {
            "max_grad_norm": None if bound is None else float(bound),
            "scaling": wide["scaling"],
            "per_tensor": per_tensor,
        }
        options = {
            "replay_weight": float(wide["replay_weight"]), "scaling": scaling, "which": which
        }  # fmt: skip
        gates = [None] * len(all_rows) if gates is None else gates
        with _ranges.record("dgg.norm"):
            if len(all_rows) == 1 and all_rows[0].reduction is None:
                return [all_rows[0].measure(settings, gate=gates[0], **options)]
            squares = [
                rows.norms(gate=gate, **options) for rows, gate in zip(all_rows, gates, strict=True)
            ]
        for part, rows in zip(squares, all_rows, strict=True):
            if rows.reduction is not None:
                rows.reduction.sum_(part, per_tensor=per_tensor)
        if len(all_rows) == 1:
            return [all_rows[0].coefficients(squares[0], **settings)]
        # One norm over several devices: the few squares travel, the gradients stay.
        home = squares[0].device
        joined = torch.cat([part.to(home) for part in squares], dim=1)
        found = reference.coefficients(joined, **settings)
        sizes = [reference.SCALES, *(part.shape[1] for part in squares)]
        head, *scales = found.split(sizes)
        return [
            torch.cat([head, part]).to(rows.device)
            for part, rows in zip(scales, all_rows, strict=True)
        ]

    def remember(
        self, wide, rows, flags, coefficients, strength, found_inf=None, backend=None
    ) -> None:
        """Keeps what the statistics of this step are made of; little is computed here."""
        self._last = {
            "flags": flags,
            "found_inf": found_inf,
            "coefficients": coefficients,
            "strength": strength,
            "per_tensor": wide["norm_scope"] == "tensor",
            "measured": flags is not None and wide["scaling"],
            "clipped": wide["max_grad_norm"] is not None,
            "device": rows.device,
            "backend": backend or rows.backend,
            "active": None if flags is None else getattr(rows, "active", None),
        }

    def remember_skipped(self, device: torch.device) -> None:
        """Keeps that the last step was skipped for inf or NaN gradients."""
        self._last = {"flags": None, "coefficients": None, "device": device}

    def statistics(self, anchored: int) -> Statistics:
        """Returns the statistics of the last step as tensors on its device; see `AdamW`.

        Args:
            anchored: How many parameters have an anchor.
        """
        last = self._last
        stats = Statistics(dict.fromkeys(_STATISTICS))
        device = None if last is None else last["device"]
        stats["anchored"] = torch.full((), anchored, dtype=torch.int64, device="cpu")
        if last is None:
            return stats
        stats.backend = last.get("backend", "")
        flags, found = last["flags"], last["coefficients"]
        zero = torch.zeros((), device=device, dtype=torch.float32)
        stats["injected"], stats["guided"] = zero.bool(), zero.long()
        if flags is not None:
            # Flags say what was drawn; a parameter without gradient was left alone all the same.
            guided = (flags & (reference.INJECT | reference.INJECT_ELEMENTS)).ne(0)
            if last["active"] is not None:
                guided = guided & backends.without_waiting(last["active"], guided.device)
            if last.get("found_inf") is not None:
                guided = guided & last["found_inf"].eq(0).all()
            stats["injected"], stats["guided"] = guided.any(), guided.sum()
        stats["scale"] = zero
        if found is None:
            return stats
        if flags is not None:
            scales = found[reference.SCALES :] * last["strength"]
            stats["scale"] = scales.float() if last["per_tensor"] else scales[0].float()
        if last["measured"]:
            stats["grad_norm"] = found[reference.GRAD_NORM].float()
            stats["distance"] = found[reference.DISTANCE].float()
        if last["clipped"]:
            stats["clip"] = found[reference.CLIP].float()
        return stats


_STATISTICS = ("injected", "scale", "grad_norm", "distance", "clip", "anchored", "guided")


class Statistics(dict):
    """What a step did: tensors or None by name, which a logger takes as they are.

    Attributes:
        backend: Name of the backend that made the step, or "" before the first one; also as
            ``statistics["backend"]``, but none of the items, which are tensors.
    """

    backend: str = ""

    def __reduce__(self):
        """Saves the items alone, in a form that ``torch.load(weights_only=True)`` reads."""
        return OrderedDict, (list(self.items()),)

    def __missing__(self, key: str) -> str:
        """Returns the backend."""
        if key == "backend":
            return self.backend
        raise KeyError(key)


def _limits(groups: Sequence[Mapping[str, Any]]) -> list:
    """Returns the threshold of every group's draws; 0 where nothing can be injected."""
    return [threshold(g["alpha"]) if float(g["strength"]) > 0 else 0 for g in groups]


def can_inject(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether anything could be injected if there were an anchor."""
    return any(_limits(groups))


def threshold(alpha: float | Tensor) -> int | Tensor:
    """Returns the threshold of the draws for a group's alpha: floor(α · 2**32).

    A tensor on an accelerator stays there.
    """
    if isinstance(alpha, Tensor) and alpha.device.type != "cpu":
        return (alpha.double() * 4294967296.0).floor()
    return _philox.threshold(float(alpha))


def drawn(wide: Mapping[str, Any], draw: int, injecting: bool) -> backends.Draw:
    """Returns the draw of a step as the backends take it."""
    elements = injecting and wide["granularity"] == "element"
    return backends.Draw(wide["seed"], draw, injecting, elements)


def read_scaler(
    grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device | None
) -> tuple[backends.Scaling, bool]:
    """Reads what a GradScaler left on the optimizer: on the host only where nothing is launched.

    Args:
        grad_scale: Divisor of the gradients, one element, or None.
        found_inf: Not 0 where a gradient is inf or NaN, one element, or None.
        device: Where the step is launched, or None where it runs when it is called.

    Returns:
        The scaling, and whether the step is known to be skipped; launches find out by themselves.
    """
    if grad_scale is None and found_inf is None:
        return backends.Scaling(), False
    if device is not None:
        there = [
            None if x is None else x.to(device, torch.float32) for x in (grad_scale, found_inf)
        ]
        return backends.Scaling(1.0, *there), False
    skip = found_inf is not None and bool(found_inf)
    return backends.Scaling(1.0 if grad_scale is None else float(grad_scale)), skip


def refuse_scaler(params: Sequence[Tensor], process_group) -> None:
    """Raises if a GradScaler that lets the step unscale has seen a part of the gradients only.

    Of DTensors torch sums over the ranks what it finds, of FSDP1's runs only unscale_() does: each
    rank would skip or step its part of the weights, and change its scale, by a verdict of its own.

    Raises:
        RuntimeError: The gradients are runs of FSDP1 or partitions over a process group.
    """
    if process_group is not None or any(map(fsdp1.is_one, params)):
        raise RuntimeError(
            "a GradScaler would look for inf and NaN in this rank's part of the gradients alone: "
            "call scaler.unscale_(optimizer) before scaler.step(optimizer), of a scaler that sums "
            "over the ranks what it finds "
            "(torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler)"
        )


def unscaled_unseen() -> bool:
    """Returns whether a GradScaler calls the step that has unscaled ``.grad`` without a word.

    So it does where the optimizer it is given, a wrapper say, does not unscale by itself. Told by
    who calls; asked only where there are replay gradients, which it cannot have seen.
    """
    return _callers.called_by("torch.amp.grad_scaler", "GradScaler", "_maybe_opt_step")
