# SPDX-License-Identifier: BSD-3-Clause
"""Distances to the anchors that were measured, and for which versions of the parameters."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch


class Distances:
    """The known squares ‖u‖² of a list of parameters, and the versions at which they hold.

    A step that looks ahead measures them after its update, so that the next step need not. They
    hold as long as nobody else writes a parameter or its anchor.

    Args:
        count: Number of parameters n.
        device: Their device.

    Attributes:
        squares: float64 [n], -1 where the distance is not known.
        versions: Versions of the parameters when they were measured; None before the first time.
        memory: int64 [n], the array that becomes ``versions``; native gradients have an array of
            their own, which they update.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.squares = torch.full((count,), -1.0, dtype=torch.float64, device=device)
        self.versions: array.array | None = None
        self.memory = array.array("q", bytes(8 * count))

    def written(self, versions: Sequence[int]) -> list[int]:
        """Returns the rows whose parameters have changed versions, and keeps the new versions."""
        known, present = self.versions, array.array("q", versions)
        if known is None or present == known:
            return []
        changed = [row for row, version in enumerate(known) if version != present[row]]
        known[:] = present
        return changed

    def measured(self, versions: Sequence[int], skipped: Sequence[int] = ()) -> None:
        """Keeps the versions of the parameters after an update that looked ahead.

        Args:
            versions: Of all parameters.
            skipped: Rows that were not updated and so not measured: their distances hold at the
                versions of before.
        """
        measured_at = array.array("q", versions)
        if self.versions is not None:
            for row in skipped:
                measured_at[row] = self.versions[row]
        self.versions = self.memory
        self.versions[:] = measured_at
