# SPDX-License-Identifier: BSD-3-Clause
"""Norms of a step, the coefficients c and s that follow from them, and the statistics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _ranges, backends, reference
from dgg.step import draws
from dgg.step.draws import Decision


def measure(opt, decision: Decision, all_rows: Sequence[backends.Rows]) -> list[Tensor]:
    """Draws, and returns the coefficients float64 [4 + n] of each device's rows."""
    ownership = opt._ownership
    if len(all_rows) > 1 and ownership.everywhere() is not None:
        raise ValueError(
            "ZeroRedundancyOptimizer over parameters on several devices is not supported; "
            "build one per device"
        )
    draws.draw(opt, decision, all_rows)
    if all_rows:
        return coefficients(decision, all_rows)
    options = decision.options
    if decision.guarded and decision.injecting:
        ownership.join_norms(reference.PRODUCTS)
    elif options["max_grad_norm"] is not None or (decision.injecting and options["scaling"]):
        ownership.join_norms()
    return []


def coefficients(
    decision: Decision, all_rows: Sequence[backends.Rows], gates: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Returns the coefficients [4 + n] of each device's rows; only needed norms are measured.

    ``gates`` are uint8 [1] of every device: whether a captured step injects.
    """
    if decision.guarded and decision.injecting:
        return _guard_coefficients(decision, all_rows)
    options = decision.options
    bound = options["max_grad_norm"]
    which = reference.NORM_TOTAL if bound is not None else 0
    if decision.injecting and options["scaling"]:
        which |= reference.NORM_GRAD | reference.NORM_DISTANCE
        for rows in all_rows:
            if gates is None:
                rows.forget_changed()
            else:
                rows.forget(anchors=False)
    if not which:
        return [rows.constant_coefficients() for rows in all_rows]
    per_tensor = options["norm_scope"] == "tensor"
    bound = None if bound is None else float(bound)
    settings = {"max_grad_norm": bound, "scaling": options["scaling"], "per_tensor": per_tensor}
    weight = float(options["replay_weight"])
    scaling = decision.scaling
    arguments: dict[str, Any] = {"replay_weight": weight, "scaling": scaling, "which": which}
    gate_of = [None] * len(all_rows) if gates is None else gates
    with _ranges.record("dgg.norm"):
        if len(all_rows) == 1 and all_rows[0].reduction is None:
            return [all_rows[0].measure(settings, gate=gate_of[0], **arguments)]
        squares = [
            rows.norms(gate=gate, **arguments) for rows, gate in zip(all_rows, gate_of, strict=True)
        ]
    joined = _joined(squares, all_rows, per_tensor)
    if len(all_rows) == 1:
        return [all_rows[0].coefficients(joined, **settings)]
    return _parted(reference.coefficients(joined, **settings), all_rows)


def _joined(sums: Sequence[Tensor], all_rows: Sequence[backends.Rows], per_tensor: bool) -> Tensor:
    """Returns the sums of every device's rows beside each other, formed over all ranks."""
    for part, rows in zip(sums, all_rows, strict=True):
        if rows.reduction is not None:
            rows.reduction.sum_(part, per_tensor=per_tensor)
    # One norm over several devices: the few sums travel, the gradients stay.
    home = sums[0].device
    return sums[0] if len(sums) == 1 else torch.cat([part.to(home) for part in sums], dim=1)


def _parted(whole: Tensor, all_rows: Sequence[backends.Rows]) -> list[Tensor]:
    """Returns each device's part of the coefficients of all rows; all have what is not of a row."""
    sizes = [len(rows.params) for rows in all_rows]
    head, *scales, extras = whole.split(
        [reference.SCALES, *sizes, len(whole) - reference.SCALES - sum(sizes)]
    )
    return [
        torch.cat([head, part, extras]).to(rows.device)
        for part, rows in zip(scales, all_rows, strict=True)
    ]


def _guard_coefficients(decision: Decision, all_rows: Sequence[backends.Rows]) -> list[Tensor]:
    """Returns the coefficients [4 + n] of each device's rows for alpha="auto"."""
    options, bound = decision.options, decision.options["max_grad_norm"]
    per_tensor = options["norm_scope"] == "tensor"
    settings = {
        "max_grad_norm": None if bound is None else float(bound), "per_tensor": per_tensor,
        "maximize": decision.ascends,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "replay_weight": float(options["replay_weight"]), "scaling": decision.scaling
    }  # fmt: skip
    all_flags = [
        rows.constant_flags(0) if flags is None else flags
        for rows, flags in zip(all_rows, decision.flags, strict=True)
    ]
    with _ranges.record("dgg.norm"):
        if len(all_rows) == 1 and all_rows[0].reduction is None:
            result = all_rows[0].measure_guard(settings, all_flags[0], **arguments)
            return _without_extras(decision, [result])
        sums = [
            rows.products(flags, **arguments)
            for rows, flags in zip(all_rows, all_flags, strict=True)
        ]
    joined = _joined(sums, all_rows, per_tensor)
    if len(all_rows) == 1:
        return _without_extras(decision, [all_rows[0].guard_coefficients(joined, **settings)])
    whole = reference.guard_coefficients(joined, **settings)
    return _without_extras(decision, _parted(whole, all_rows))


def _without_extras(decision: Decision, coefficients: Sequence[Tensor]) -> list[Tensor]:
    """Returns coefficients without alignment and pull, which the decision keeps."""
    decision.alignment_and_pull = coefficients[0][-reference.GUARD_EXTRAS :]
    return [x[: -reference.GUARD_EXTRAS] for x in coefficients]


_STATISTICS = (
    "injected", "scale", "grad_norm", "distance", "clip", "anchored", "guided", "alignment", "pull",
)  # fmt: skip


class Statistics(dict[str, Any]):
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


def record(
    decision: Decision, device: torch.device, backend: str, flags: Tensor | None,
    coefficients: Tensor, active: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record of a step from which `statistics` computes; nothing is computed here.

    The flags are uint8 [n], or None where none injects; the coefficients float64 [4 + n];
    ``active`` as in `pulled`.
    """
    options = decision.options
    per_tensor = options["norm_scope"] == "tensor"
    return {
        "flags": flags, "coefficients": coefficients, "active": active, "device": device,
        "backend": backend, "found_inf": decision.scaling.found_inf,
        "strength": decision.strength, "per_tensor": per_tensor,
        # One pull for all that is guided, so that ‖pull‖ / ‖c g‖ follows from s and the norms.
        "whole": options["granularity"] == "step" and not per_tensor,
        "measured": flags is not None and (options["scaling"] or decision.guarded),
        "alignment_and_pull": decision.alignment_and_pull,
        "clipped": options["max_grad_norm"] is not None,
    }  # fmt: skip


def record_skipped(device: torch.device) -> dict[str, Any]:
    """Returns the record of a step that changed nothing."""
    nothing = dict.fromkeys(("flags", "coefficients", "active", "found_inf", "alignment_and_pull"))
    return {**nothing, "device": device}


def pulled(
    flags: Tensor, active: Tensor | None, infinite: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Returns which rows a step pulled, or several steps if the tensors have a leading dimension.

    Args:
        flags: uint8 [n], what was drawn.
        active: bool [n] on the CPU, rows with a gradient and an anchor; None for all rows.
        infinite: bool [] or [1], whether a GradScaler found inf; None without one.
        lengths: [n], [1] or [], those of the pulls with alpha="auto", which draws every step and
            often pulls with length 0; None otherwise.
    """
    found = (flags & (reference.INJECT | reference.INJECT_ELEMENTS)).ne(0)
    if active is not None:
        found = found & backends.without_waiting(active, found.device)
    if infinite is not None:
        found = found & ~infinite
    return found if lengths is None else found & lengths.ne(0)


def keep(opt, record: dict[str, Any], *, captured: bool = False) -> None:
    """Keeps a step's record for the statistics, and counts it.

    A step that is being captured is not counted: its replays are not seen from here.
    """
    opt._last = record
    if not captured:
        opt._journal.add(record)


def statistics(last: dict[str, Any] | None, anchored: int) -> Statistics:
    """Returns the statistics of the last step as tensors on its device.

    They are those of `Reporting.guidance_stats`; ``last`` is None before the first step.
    """
    stats = Statistics(dict.fromkeys(_STATISTICS))
    stats["anchored"] = torch.full((), anchored, dtype=torch.int64, device="cpu")
    if last is None:
        return stats
    stats.backend = last.get("backend", "")
    flags, coefficients = last["flags"], last["coefficients"]
    zero = torch.zeros((), device=last["device"], dtype=torch.float32)
    stats["injected"], stats["guided"], stats["scale"] = zero.bool(), zero.long(), zero
    if coefficients is None:
        return stats
    guarded = last["alignment_and_pull"] is not None
    if flags is not None:
        lengths = coefficients[reference.SCALES :]
        lengths = lengths if last["per_tensor"] else lengths[0]
        infinite = None if last["found_inf"] is None else last["found_inf"].ne(0).any()
        guided = pulled(flags, last["active"], infinite, lengths if guarded else None)
        stats["injected"], stats["guided"] = guided.any(), guided.sum()
        stats["scale"] = (lengths * last["strength"]).float()
    if last["measured"]:
        stats["grad_norm"] = coefficients[reference.GRAD_NORM].float()
        stats["distance"] = coefficients[reference.DISTANCE].float()
    if guarded:
        alignment, pull = last["alignment_and_pull"].unbind()
        stats["alignment"], stats["pull"] = alignment.float(), (pull * last["strength"]).float()
    if last["clipped"]:
        stats["clip"] = coefficients[reference.CLIP].float()
    return stats
