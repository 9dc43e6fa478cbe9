# SPDX-License-Identifier: BSD-3-Clause
"""What guidance did over many steps: sums that stay on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import backends, reference

NAMES: tuple[str, ...] = ("injected", "scale", "grad_norm", "distance", "clip", "alignment", "pull")
_INJECTED, _SCALE = NAMES.index("injected"), NAMES.index("scale")


class Journal:
    """Adds up the records of an optimizer's steps.

    A step hands over its record, which costs nothing: the tensors in it were made by the step. Only
    every 64th step adds the records up, on the device.

    Attributes:
        steps: Steps since the optimizer was made.
    """

    # As many records may wait; each holds 4 + n doubles, for n parameters.
    _FOLD = 64

    def __init__(self) -> None:
        self.steps = 0
        self._records: list[dict[str, Any]] = []
        # float64 [2, names]: sums over the steps that measured something, and how many did.
        self._sums: Tensor | None = None
        self._since_boundary = Reader(self)
        self._logged = Reader(self)

    def add(self, record: dict[str, Any]) -> None:
        """Adds a step's record, as `norms.record` and `norms.record_skipped` make it."""
        self.steps += 1
        self._records.append(record)
        if len(self._records) >= self._FOLD:
            self._fold()

    def begin_task(self) -> None:
        """Counts from here on: an anchor was set or cleared."""
        self._since_boundary = Reader(self)

    def since_boundary(self) -> tuple[int, dict[str, float]]:
        """Returns the steps since the last boundary and their means, as `Reader.totals` does."""
        return self.steps - self._since_boundary.first_step, self._since_boundary.totals()

    def since_log(self) -> dict[str, float]:
        """Returns the means of the steps since the last call, as `Reader.means` does."""
        return self._logged.means()

    def sums(self) -> Tensor | None:
        """Returns float64 [2, names] over all steps, a new tensor; None before the first step."""
        self._fold()
        return self._sums

    def _fold(self) -> None:
        alike: dict[Any, list[dict[str, Any]]] = {}
        for record in self._records:
            alike.setdefault(_kind(record), []).append(record)
        for records in alike.values():
            table = _sums(records)
            if self._sums is None:
                self._sums = table
            else:
                self._sums = self._sums.to(table.device) + table
        self._records.clear()


class Reader:
    """Means over the steps since some moment; reading them is the only synchronisation."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.first_step = self._last_step = journal.steps
        self._first = self._last = journal.sums()

    def means(self) -> dict[str, float]:
        """Returns the means of the steps since the last call; empty if there were none."""
        if self._journal.steps == self._last_step:
            return {}
        now, before = self._journal.sums(), self._last
        self._last, self._last_step = now, self._journal.steps
        return _means(now, before)

    def totals(self) -> dict[str, float]:
        """Returns the means of all steps since the reader was made; empty if there were none."""
        if self._journal.steps == self.first_step:
            return {}
        return _means(self._journal.sums(), self._first)


def _means(now: Tensor | None, before: Tensor | None) -> dict[str, float]:
    if now is None:
        return {}
    sums, counts = (now if before is None else now - before.to(now.device)).tolist()
    # s is 0 on the steps that inject nothing; its mean is over those that inject.
    counts[_SCALE] = sums[_INJECTED]
    return {
        name: total / count for name, total, count in zip(NAMES, sums, counts, strict=True) if count
    }


def _kind(record: dict[str, Any]) -> Any:
    """Returns what records have to share to be added up together."""
    coefficients = record["coefficients"]
    if coefficients is None:
        return None
    names = ("flags", "active", "found_inf", "alignment_and_pull")
    present = tuple(record[name] is not None for name in names)
    settings = tuple(record[name] for name in ("per_tensor", "measured", "clipped", "strength"))
    return (len(coefficients), coefficients.device, *present, *settings)


def _sums(records: Sequence[dict[str, Any]]) -> Tensor:
    """Returns float64 [2, names] of records of one kind."""
    first, steps = records[0], len(records)
    device = first["device"] if first["coefficients"] is None else first["coefficients"].device
    nothing = torch.zeros(steps, dtype=torch.float64, device=device)
    values = dict.fromkeys(NAMES, torch.full_like(nothing, torch.nan))
    values["injected"] = values["scale"] = nothing
    if first["coefficients"] is not None:
        _read(records, values)
    table = torch.stack(list(values.values()))
    known = table.isfinite()  # NaN: not measured; inf: a step whose gradients overflowed
    return torch.stack([torch.where(known, table, 0).sum(dim=1), known.sum(dim=1)])


def _read(records: Sequence[dict[str, Any]], values: dict[str, Tensor]) -> None:
    """Puts float64 [steps] under every name that the steps know; NaN where one has none."""

    def stacked(name: str) -> Tensor:
        return torch.stack([record[name] for record in records])

    first, coefficients = records[0], stacked("coefficients")
    guarded = first["alignment_and_pull"] is not None
    if first["clipped"]:
        values["clip"] = coefficients[:, reference.CLIP]
    if first["flags"] is None:
        return
    scales = coefficients[:, reference.SCALES :] * first["strength"]
    pulled = (stacked("flags") & (reference.INJECT | reference.INJECT_ELEMENTS)).ne(0)
    if first["active"] is not None:
        pulled = pulled & backends.without_waiting(stacked("active"), pulled.device)
    if first["found_inf"] is not None:
        overflowed = torch.stack([record["found_inf"].ne(0).any() for record in records])
        pulled = pulled & ~overflowed[:, None]
    if guarded:
        pulled = pulled & (scales if first["per_tensor"] else scales[:, :1]).ne(0)
    injected = pulled.any(dim=1)
    values["injected"] = injected.double()
    values["scale"] = scales.mean(dim=1) if first["per_tensor"] else scales[:, 0]
    if not first["measured"]:
        return
    # A captured step measures only if it draws; what it left in the other places says nothing.
    measured = torch.where(injected | guarded, 0.0, torch.nan)
    grad_norm = coefficients[:, reference.GRAD_NORM]
    values["grad_norm"] = grad_norm + measured
    values["distance"] = distance = coefficients[:, reference.DISTANCE] + measured
    if guarded:
        values["alignment"], pull = stacked("alignment_and_pull").unbind(1)
        values["pull"] = pull * first["strength"]
    elif not first["per_tensor"]:
        values["pull"] = scales[:, 0] * distance / (coefficients[:, reference.CLIP] * grad_norm)
