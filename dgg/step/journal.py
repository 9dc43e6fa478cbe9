# SPDX-License-Identifier: BSD-3-Clause
"""What guidance did over many steps: sums that stay on the device until somebody asks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg.step import norms

NAMES: tuple[str, ...] = ("injected", "scale", "grad_norm", "distance", "clip", "alignment", "pull")
_INJECTED, _SCALE = NAMES.index("injected"), NAMES.index("scale")


class Journal:
    """Adds up the records of an optimizer's steps.

    Of a step's record it keeps the tensors, which the step has made anyway. Only now and then are
    they added up, on the device: many at once, so that it costs next to nothing.

    Attributes:
        steps: Steps since the optimizer was made.
        paused: Records are not added: they are of the same step again.
        readers: Get all records that are added up from now on.
        logged: Reads the means since the last log.
    """

    # As many records, and numbers in them, may wait: a record has 4 + n doubles for n parameters.
    _RECORDS, _NUMBERS = 1024, 2**16
    _FEWEST = 64

    def __init__(self) -> None:
        self.steps = 0
        self.paused = False
        # By kind: a record of that kind, and the tensors of all of them that wait.
        self._waiting: dict[Any, tuple[dict[str, Any], list[tuple[Tensor | None, ...]]]] = {}
        self._count, self._limit = 0, self._FEWEST
        self.readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._since_boundary = Reader(self)
        self.logged = Reader(self)

    def add(self, record: dict[str, Any]) -> None:
        """Adds a step's record, as `norms.record` and `norms.record_skipped` make it."""
        if self.paused:
            return
        self.steps += 1
        kind = _kind(record)
        waiting = self._waiting.get(kind)
        if waiting is None:
            waiting = self._waiting[kind] = record, []
        waiting[1].append(_tensors(record))
        self._count += 1
        if self._count >= self._limit:
            self.fold()

    def begin_task(self) -> None:
        """Counts from here on: an anchor was set, loaded or cleared."""
        self._since_boundary = Reader(self)

    def since_boundary(self) -> tuple[int, dict[str, float]]:
        """Returns the steps since the last boundary and their means, as `Reader.totals` does."""
        return self.steps - self._since_boundary.first_step, self._since_boundary.totals()

    def fold(self) -> None:
        """Adds up the records that wait, for every reader."""
        for first, steps in self._waiting.values():
            table = _sums(first, steps)
            for reader in self.readers:
                reader.add(table)
            if (coefficients := first["coefficients"]) is not None:
                fitting = self._NUMBERS // len(coefficients)
                self._limit = max(self._FEWEST, min(self._RECORDS, fitting))
        self._waiting.clear()
        self._count = 0


class Reader:
    """Means over the steps since some moment; reading them is the only synchronisation.

    Every reader has sums of its own: as differences of longer sums, means would be lost behind one
    step with a huge gradient.

    Attributes:
        first_step: Steps of the journal when the reader was made.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.first_step = journal.steps
        # float64 [2, names]: sums over the steps that measured something, and how many did; since
        # the last call of `means`, and before it.
        self._window: Tensor | None = None
        self._before: Tensor | None = None
        journal.fold()  # for the readers before it
        journal.readers.add(self)

    def add(self, table: Tensor) -> None:
        """Adds the sums of some steps."""
        self._window = _joined(self._window, table)

    def means(self) -> dict[str, float]:
        """Returns the means of the steps since the last call; empty if there were none."""
        self._journal.fold()
        window, self._window = self._window, None
        self._before = _joined(self._before, window)
        return _means(window)

    def totals(self) -> dict[str, float]:
        """Returns the means of all steps since the reader was made; empty if there were none."""
        self._journal.fold()
        return _means(_joined(self._before, self._window))


def _joined(sums: Tensor | None, more: Tensor | None) -> Tensor | None:
    if sums is None or more is None:
        return more if sums is None else sums
    return sums.to(more.device) + more


def _means(table: Tensor | None) -> dict[str, float]:
    if table is None:
        return {}
    sums, counts = table.tolist()
    # s is 0 on the steps that inject nothing; its mean is over those that inject.
    counts[_SCALE] = sums[_INJECTED]
    return {
        name: total / count for name, total, count in zip(NAMES, sums, counts, strict=True) if count
    }


_TENSORS = ("coefficients", "flags", "active", "found_inf", "alignment_and_pull")
_tensors = itemgetter(*_TENSORS)
_settings = itemgetter("device", "per_tensor", "measured", "clipped", "strength", "whole")


def _kind(record: dict[str, Any]) -> Any:
    """Returns what records have to share to be added up together.

    Asked for every record, and so most of what the journal costs: no loops.
    """
    coefficients = record["coefficients"]
    if coefficients is None:
        return None
    return (
        coefficients.numel(), record["flags"] is None, record["active"] is None,
        record["found_inf"] is None, record["alignment_and_pull"] is None, _settings(record),
    )  # fmt: skip


def _sums(first: dict[str, Any], steps: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
    """Returns float64 [2, names] of steps of the kind of ``first``, from their `_tensors`."""
    nothing = torch.zeros(len(steps), dtype=torch.float64, device=first["device"])
    values = dict.fromkeys(NAMES, torch.full_like(nothing, torch.nan))
    values["injected"] = values["scale"] = nothing
    if first["coefficients"] is not None:
        _read(first, dict(zip(_TENSORS, zip(*steps, strict=True), strict=True)), values)
    table = torch.stack(list(values.values()))
    known = table.isfinite()  # NaN: not measured; inf: a step whose gradients overflowed
    return torch.stack([torch.where(known, table, 0).sum(dim=1), known.sum(dim=1)])


def _read(
    first: dict[str, Any], columns: dict[str, tuple[Any, ...]], values: dict[str, Tensor]
) -> None:
    """Puts float64 [steps] under every name that the steps know; NaN where one has none."""

    def stacked(name: str) -> Tensor:
        tensors = columns[name]
        if all([x is tensors[0] for x in tensors]):  # flags, most of the time
            return tensors[0][None]
        return torch.stack(tensors)

    steps = len(columns["coefficients"])
    coefficients = stacked("coefficients").expand(steps, -1)
    guarded = first["alignment_and_pull"] is not None
    if first["clipped"]:
        values["clip"] = coefficients[:, reference.CLIP]
    if first["flags"] is None:
        return
    lengths = coefficients[:, reference.SCALES :]
    if not first["per_tensor"]:
        lengths = lengths[:, :1]
    scales = lengths * first["strength"]
    active = None if first["active"] is None else stacked("active")
    infinite = None
    if first["found_inf"] is not None:
        infinite = torch.stack([found.ne(0).any() for found in columns["found_inf"]])[:, None]
    rows = norms.pulled(stacked("flags"), active, infinite, lengths if guarded else None)
    injected = rows.any(dim=1).expand(steps)
    values["injected"] = injected.double()
    # A step may have drawn what has no gradient or no anchor.
    values["scale"] = torch.where(injected, scales.mean(dim=1), 0)
    if not first["measured"]:
        return
    # A captured step measures only if it draws; what it left in the other places says nothing.
    measured = torch.where(injected | guarded, 0.0, torch.nan)
    grad_norm = coefficients[:, reference.GRAD_NORM]
    values["grad_norm"] = grad_norm + measured
    values["distance"] = distance = coefficients[:, reference.DISTANCE] + measured
    if guarded:
        values["alignment"], pull = torch.stack(columns["alignment_and_pull"]).unbind(1)
        values["pull"] = pull * first["strength"]
    elif first["whole"]:
        values["pull"] = scales[:, 0] * distance / (coefficients[:, reference.CLIP] * grad_norm)
