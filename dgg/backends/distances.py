# SPDX-License-Identifier: BSD-3-Clause
"""What is known of the distances to the anchors, and for which values of the parameters."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch


class Distances:
    """The known squares ‖θ - θ*‖² of a list of parameters, and the versions at which they hold.

    A step that looks ahead measures them after its update, so that the next step need not. They
    hold as long as nobody else writes a parameter or its anchor.

    Args:
        count: Number of parameters n.
        device: Their device.

    Attributes:
        squares: float64 [n], -1 where the distance is not known.
        versions: Versions of the parameters when they were measured; None before the first time.
        memory: int64 [n], what ``versions`` will be; the native look at the gradients brings its
            own, which it writes.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.squares = torch.full((count,), -1.0, dtype=torch.float64, device=device)
        self.versions: array.array | None = None
        self.memory = array.array("q", bytes(8 * count))

    def forget(self) -> None:
        """Takes no distance for known."""
        self.squares.fill_(-1.0)

    def forget_rows(self, rows: Sequence[int]) -> None:
        """Takes the distances of these rows for unknown."""
        self.squares[list(rows)] = -1.0

    def written(self, versions: Sequence[int]) -> list[int]:
        """Returns the rows whose parameters have other versions by now, and notes these."""
        now = array.array("q", versions)
        if now == self.versions:
            return []
        changed = [row for row, version in enumerate(self.versions) if version != now[row]]
        self.versions[:] = now
        return changed

    def measured(self, versions: Sequence[int], skipped: Sequence[int] = ()) -> None:
        """Notes the versions of the parameters after an update that looked ahead.

        Args:
            versions: Of all parameters, now.
            skipped: Rows that were not updated and so not measured: what is known of them holds
                at the version that it held at before.
        """
        now = array.array("q", versions)
        if self.versions is not None:
            for row in skipped:
                now[row] = self.versions[row]
        self.versions = self.memory
        self.versions[:] = now
