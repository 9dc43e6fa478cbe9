# SPDX-License-Identifier: BSD-3-Clause
"""Cutting rows into chunks, the units of work of a launch.

One launch serves all rows of one dtype combination. The cut is uploaded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgg.kernels.layout import CHUNK, COPY_SLOT, PARTIALS, SLOT_BITS, SLOT_MASK


@dataclass
class Launch:
    """The rows of one dtype combination, cut into chunks; all tensors on the device.

    Attributes:
        dtypes: Dtype codes of the rows, as in the table.
        rows: int32 [k], rows of the table, ascending.
        chunks: int32 [m, 2], position in ``rows`` and number within the row; an empty row has one.
        starts: int32 [k + 1], first chunk of the row at each position.
        partials: float64 [5, m], workspace.
        counters: int32 [k + 1], workspace, zero between launches: how many chunks of each row are
            done, and last how many rows.
        window: Window of the rows' anchors, -1 if the anchors are on the device.
    """

    dtypes: int
    rows: Tensor
    chunks: Tensor
    starts: Tensor
    partials: Tensor
    counters: Tensor
    window: int = -1

    @property
    def copies(self) -> bool:
        """Whether the rows are master weights: their copies are stored in another dtype."""
        return self.dtypes & SLOT_MASK != self.dtypes >> SLOT_BITS * COPY_SLOT & SLOT_MASK

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leading arguments of a launch after the table."""
        return self.rows, self.chunks, self.starts, self.partials, self.counters


def cut(
    numels: Sequence[int], codes: Sequence[int], device: torch.device, *,
    windows: Sequence[int] | None = None, chunk: int = CHUNK,
) -> list[Launch]:  # fmt: skip
    """Cuts rows into chunks, one `Launch` per dtype combination (and window of anchors).

    Args:
        numels: Elements of every row.
        codes: Dtype codes of every row.
        device: Where the tables are to lie.
        windows: Window of every row's anchor; None if all anchors lie on the device.
        chunk: Elements of a chunk.

    Raises:
        ValueError: More chunks than a 32-bit index holds.
    """
    sizes = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
    kinds = list(zip(codes, windows or [-1] * len(codes), strict=True))
    launches = []
    for kind in dict.fromkeys(kinds):
        members = [row for row, other in enumerate(kinds) if other == kind]
        rows = torch.tensor(members, dtype=torch.int64, device="cpu")
        # An empty row has a chunk, too: the last chunk of a row stores the results for the row.
        counts = ((sizes[rows] + chunk - 1) // chunk).clamp(min=1)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=starts[1:])
        total = int(starts[-1])
        if total >= 1 << 31:
            raise ValueError(
                f"{int(sizes.sum())} elements make {total} chunks, more than one launch can count; "
                "split the parameters over more devices"
            )
        position = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), counts)
        number = torch.arange(total, device="cpu") - starts[position]
        chunks = torch.stack([position, number], dim=1)
        partials = torch.empty(PARTIALS, total, dtype=torch.float64, device=device)
        counters = torch.zeros(len(rows) + 1, dtype=torch.int32, device=device)
        rows, chunks, starts = (x.int().to(device) for x in (rows, chunks, starts))
        launches.append(Launch(kind[0], rows, chunks, starts, partials, counters, kind[1]))
    return launches


def cuts_of(
    numels: Sequence[int], device: torch.device, windows: Sequence[int] | None = None
) -> Callable[[tuple[int, ...]], list[Launch]]:
    """Returns `cut` as a function of a tuple of dtype codes, which keeps its last few results.

    Gradients change their dtype when autocast does.
    """
    kept = functools.lru_cache(maxsize=4)
    return kept(functools.partial(cut, numels, device=device, windows=windows))
