# SPDX-License-Identifier: BSD-3-Clause
"""Tables that a device's kernels read: where the tensors are, how they are cut, what a step brings.

One launch serves all tensors of one dtype combination. Everything that stays the same from step to
step (addresses of parameters, moments and anchors, the cut into chunks) lies on the device for
good; what a step brings (gradient addresses, hyper-parameters) goes there in asynchronous copies,
and in none where nothing changed. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg._prefetch import Windows
from dgg.kernels.layout import (
    ANCHOR_BIT,
    CHUNK,
    COPY_BIT,
    COPY_SLOT,
    GRANULARITIES,
    SLOT_BITS,
    SLOT_MASK,
)


@dataclass
class Launch:
    """The rows of one dtype combination, cut into chunks; all tensors on the device.

    Attributes:
        dtypes: Dtype codes of the rows, 8 bits each, as in the table.
        rows: int32 [k], rows of the table, ascending.
        chunks: int32 [m, 2], position in ``rows`` and number within the row; an empty row has one.
        starts: int32 [k + 1], first chunk of the row at each position.
        partials: float64 [3, m], workspace.
        counters: int32 [k + 1], workspace, zero between launches: of each row's chunks that are
            done, and last of the rows.
        window: Window that the rows' anchors come in (`Windows`), -1 if they lie on the device.
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
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The leading arguments of a launch after the table."""
        return self.rows, self.chunks, self.starts, self.partials, self.counters


def cut(
    numels: Sequence[int],
    codes: Sequence[int],
    device: torch.device,
    *,
    windows: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> list[Launch]:
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
        mine = [row for row, other in enumerate(kinds) if other == kind]
        rows = torch.tensor(mine, dtype=torch.int64, device="cpu")
        # An empty row has a chunk, too: the last one of a row stores what belongs to all of it.
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
        launches.append(
            Launch(
                kind[0],
                rows.int().to(device),
                torch.stack([position, number], dim=1).int().to(device),
                starts.int().to(device),
                torch.empty(3, total, dtype=torch.float64, device=device),
                torch.zeros(len(rows) + 1, dtype=torch.int32, device=device),
                kind[1],
            )
        )
    return launches


class Uploads:
    """Small host arrays on their way to a device: sent when they change, never waited for.

    A host buffer is pinned where the device has pinned memory; torch's allocator keeps it until
    the copy has happened. Inside a CUDA graph the copy becomes a node, which reads the buffer at
    every replay: what a graph reads is apart from what other steps send, in both memories, and is
    kept for good. As pinned memory cannot be had during a capture, it is made ready before.

    Args:
        device: Where the arrays go.
        capturable: Whether steps may be captured.
    """

    def __init__(self, device: torch.device, capturable: bool = False) -> None:
        self.device = device
        self._capturable = capturable
        # By name: what was sent and where to; the same for the next capture and of the last one.
        self._sent: dict[str, tuple[Tensor, Tensor]] = {}
        self._spare: dict[str, tuple[Tensor, Tensor]] = {}
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        # What earlier graphs read.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def send(self, name: str, values: Tensor) -> Tensor:
        """Returns ``values`` (CPU, contiguous) on the device, in memory that is the name's own.

        Args:
            name: What the array is; a later one of this name takes the same memory.
            values: The array; it is copied before this returns and may be reused.

        Raises:
            RuntimeError: A capture needs what no step before it has made room for.
        """
        if capturing(self.device):
            return self._record(name, values)
        if self._capturable and not _alike(self._spare.get(name), values):
            self._spare[name] = self._pinned(values), self._target(values)
        known = self._sent.get(name)
        if not _alike(known, values):
            target = self._target(values)
        elif torch.equal(known[0], values):
            return known[1]
        else:
            target = known[1]
        staged = self._pinned(values)
        staged.copy_(values)
        target.copy_(staged, non_blocking=True)
        self._sent[name] = staged, target
        return target

    def _record(self, name: str, values: Tensor) -> Tensor:
        """Makes the copy a node of the graph that is being captured.

        Where a graph begins is not known, so there is one node more rather than one too few: the
        same values are sent again, from the same memory.
        """
        recorded = self._captured.get(name)
        if not _alike(recorded, values) or not torch.equal(recorded[0], values):
            spare = self._spare.pop(name, None)
            if not _alike(spare, values):
                raise RuntimeError(
                    f"what a step needs to know of its {name} changed during a capture and there "
                    "is no memory to send it from; run a step outside of the graph before each "
                    "capture"
                )
            if recorded is not None:
                self._kept.append(recorded)
            spare[0].copy_(values)
            self._captured[name] = recorded = spare
        staged, target = recorded
        target.copy_(staged, non_blocking=True)
        return target

    def _pinned(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, pin_memory=self.device.type != "cpu")

    def _target(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=self.device, pin_memory=False)


def _alike(known: tuple[Tensor, Tensor] | None, values: Tensor) -> bool:
    return known is not None and known[0].shape == values.shape


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device; nobody waits for the copy."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Returns whether work on ``device`` is being recorded into a graph instead of run."""
    # Before its first use of a device torch has no stream, and without a driver it raises if asked.
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )


class Kernels:
    """The launches of one device's rows: their tables, their workspace, this step's addresses.

    Args:
        functions: What has the launches: `dgg.kernels` (Triton) or ``torch.ops.dgg`` (CUDA).
        device: The device of all rows.
        size: Number of rows n.
        columns: Numbers of the table's columns param, numel and dtypes.
        windows: Windows of the anchors that are kept off the device, or None.
        capturable: Whether steps may be captured.
    """

    def __init__(
        self,
        functions: Any,
        device: torch.device,
        size: int,
        columns: tuple[int, int, int],
        windows: Windows | None = None,
        capturable: bool = False,
    ) -> None:
        self.windows = windows
        self.device = device
        self.size = size
        self.uploads = Uploads(device, capturable)
        self._functions = functions
        self._columns = columns
        self._launches: dict[tuple[int, ...], list[Launch]] = {}
        self._host_table: Tensor | None = None
        # Chunks and workspace of captured steps.
        self._kept: list[list[Launch]] = []
        self._hyper: dict[tuple[str, ...], Tensor] = {}
        self._none = torch.empty(0, dtype=torch.int64, device=device)
        # Whether the distances to anchors that are elsewhere hold for this step.
        self.measured = False

    def begin(self, table: Tensor, grads: Tensor, replays: Tensor) -> None:
        """Takes up what a step works on.

        Args:
            table: int64 [n, 14] on the CPU.
            grads: int64 [n] on the CPU, addresses.
            replays: int64 [n] on the CPU, or [0].
        """
        self.join()
        self._hyper.clear()
        inside = capturing(self.device)
        if inside or table is not self._host_table:
            _, numels, dtypes = self._columns
            codes = tuple(table[:, dtypes].tolist())
            if codes not in self._launches:
                # Gradients change their dtype when autocast does: a few cuts are worth keeping.
                while len(self._launches) >= 4:
                    del self._launches[next(iter(self._launches))]
                self._launches[codes] = cut(
                    table[:, numels].tolist(),
                    codes,
                    self.device,
                    windows=None if self.windows is None else self.windows.of_row,
                )
            self.launches = self._launches[codes]
            self.table = self.uploads.send("table", table)
            # A graph has a table of its own.
            self._host_table = None if inside else table
            if inside:
                self._kept.append(self.launches)
        self.grads = self.uploads.send("grads", grads)
        self.replays = self.uploads.send("replays", replays) if replays.numel() else self._none

    def join(self) -> None:
        """Lets the device finish measuring ahead before it goes on."""
        if self.windows is not None:
            self.windows.join()

    def forget(self, *, anchors: bool) -> None:
        """Takes no distance for known, and with ``anchors`` none of them for current."""
        self.join()
        self.measured = False
        if anchors and self.windows is not None:
            self.windows.forget()

    def measure_ahead(self, distances: Tensor) -> None:
        """Measures all distances with anchors that come from elsewhere, beside what follows.

        Until the next `begin`, the forward and the backward pass run at the same time; nothing
        else may use the launches.
        """
        windows = self.windows
        windows.follow()
        # A new anchor drops all of these, at any time.
        used = [x for launch in self.launches for x in launch.tensors]
        windows.lend([self.table, distances, self._none, *used])
        with windows.aside():
            # Every row counts as present: which gradients the next step brings is not known yet.
            present = self.table[:, self._columns[0]].contiguous()
            distances.fill_(-1.0)
            self._measure(distances, present, self._none)
        windows.leave()
        self.measured = True

    def _measure(self, distances: Tensor, grads: Tensor, replays: Tensor) -> None:
        squares = self._squares()
        for number in self._numbers():
            for launch in self._of_window(number):
                self._norms_of(
                    launch, distances, squares, grads, replays, which=reference.NORM_DISTANCE
                )
            self._leave_window(number)

    def _squares(self) -> Tensor:
        return torch.empty(3, self.size, dtype=torch.float64, device=self.device)

    def _norms_of(
        self,
        launch: Launch,
        distances: Tensor,
        squares: Tensor,
        grads: Tensor,
        replays: Tensor,
        *,
        which: int,
        gate: Tensor | None = None,
        grad_scale: Tensor | None = None,
        out: Tensor | None = None,
        replay_weight: float = 0.0,
        max_grad_norm: float | None = None,
        scaling: bool = False,
        per_tensor: bool = False,
    ) -> None:
        self._functions.norms_launch(
            self.table,
            *launch.tensors,
            grads,
            replays,
            distances,
            squares,
            gate,
            grad_scale,
            out,
            dtypes=launch.dtypes,
            replay_weight=replay_weight,
            which=which,
            max_grad_norm=max_grad_norm,
            scaling=scaling,
            per_tensor=per_tensor,
        )

    def _numbers(self) -> list[int]:
        """Returns the windows in the order of a pass, -1 for the anchors that are here."""
        return [-1] if self.windows is None else [-1, *self.windows.order()]

    def _of_window(self, number: int) -> list[Launch]:
        """Returns a window's launches once its anchors are on their way and waited for."""
        if number >= 0:
            self.windows.fetch(number)
            self.windows.wait(number)
        return [launch for launch in self.launches if launch.window == number]

    def _leave_window(self, number: int) -> None:
        if number >= 0:
            self.windows.done(number)

    def hyper(self, groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Tensor:
        """Returns the float64 [groups, names] table of hyper-parameters on the device.

        Values that are tensors on the device are copied there, not read. A step asks for it more
        than once.
        """
        names = tuple(names)
        if names not in self._hyper:
            self._hyper[names] = self._make_hyper(groups, names)
        return self._hyper[names]

    def _make_hyper(self, groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Tensor:
        values = [group[name] for group in groups for name in names]
        there = [
            (place, value)
            for place, value in enumerate(values)
            if isinstance(value, Tensor) and value.device.type != "cpu"
        ]
        for place, _ in there:
            values[place] = 0.0
        host = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
        table = self.uploads.send("hyper", host)
        if there:
            # Not into the uploaded table itself, which is taken as it was sent.
            table = table.clone()
            for place, value in there:
                table[place].copy_(value.reshape(()), non_blocking=True)
        return table.view(len(groups), len(names))

    def norms(self, distances: Tensor, *, which: int, **options) -> Tensor:
        """Returns float64 [3, n], the squares of `reference.norms`; fills ``distances``.

        Args:
            distances: float64 [n], known squares or negative.
            which: Bits of `reference`.
            options: replay_weight, grad_scale and gate.
        """
        squares = self._squares()
        self._norms(distances, squares, None, which, options, {})
        return squares

    def coefficients(self, squares: Tensor, **settings) -> Tensor:
        """Returns float64 [4 + n] as `reference.coefficients` does."""
        out = self._coefficients()
        self._functions.coefficients_launch(squares, out, **settings)
        return out

    def measure(
        self, distances: Tensor, settings: Mapping[str, Any], *, which: int, **options
    ) -> Tensor:
        """Returns the `coefficients`, with these settings, of the `norms`, in no launch more.

        The block that ends the last row of the norm pass makes them.
        """
        out = self._coefficients()
        self._norms(distances, self._squares(), out, which, options, settings)
        return out

    def _coefficients(self) -> Tensor:
        return torch.empty(reference.SCALES + self.size, dtype=torch.float64, device=self.device)

    def _norms(
        self,
        distances: Tensor,
        squares: Tensor,
        out: Tensor | None,
        which: int,
        options: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        if self.windows is not None and which & reference.NORM_DISTANCE and not self.measured:
            self._measure(distances, self.grads, self.replays)
        last = self.launches[-1]
        for launch in self.launches:
            finish = {"out": out, **settings} if launch is last else {}
            self._norms_of(
                launch, distances, squares, self.grads, self.replays, which=which, **options,
                **finish,
            )  # fmt: skip

    def update_(
        self,
        rule: str,
        coefficients: Tensor,
        flags: Tensor,
        hyper: Tensor,
        distances: Tensor,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        draw_index: Tensor | None,
        variant: int,
        **options,
    ) -> None:
        """Runs ``adam_`` or ``sgd_`` on all rows; options: replay_weight, seed and draw."""
        function = getattr(self._functions, rule[:-1] + "_launch_")
        for launch in self._reading(variant):
            function(
                self.table,
                *launch.tensors,
                self.grads,
                self.replays,
                coefficients,
                flags,
                hyper,
                distances,
                grad_scale,
                found_inf,
                draw_index,
                dtypes=launch.dtypes,
                variant=variant | (COPY_BIT if launch.copies else 0),
                **options,
            )

    def _reading(self, variant: int) -> Iterator[Launch]:
        """Yields the launches in the order in which the anchors come, if they are read."""
        if not variant & ANCHOR_BIT:
            yield from self.launches
            return
        for number in self._numbers():
            yield from self._of_window(number)
            self._leave_window(number)

    def guide_(
        self,
        coefficients: Tensor,
        flags: Tensor,
        hyper: Tensor,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        draw_index: Tensor | None,
        variant: int,
        **options,
    ) -> None:
        """Runs ``guide_`` on all rows; options as in `update_`."""
        for launch in self._reading(variant):
            self._functions.guide_launch_(
                self.table,
                launch.rows,
                launch.chunks,
                self.grads,
                self.replays,
                coefficients,
                flags,
                hyper,
                grad_scale,
                found_inf,
                draw_index,
                dtypes=launch.dtypes,
                variant=variant,
                **options,
            )

    def draw_flags(
        self,
        flags: Tensor,
        hyper: Tensor,
        draw_index: Tensor,
        *,
        seed: int,
        granularity: str,
        threshold_column: int,
        strength_column: int,
    ) -> Tensor:
        """Draws on the device: fills ``flags``, returns uint8 [1], whether any row injects."""
        gate = torch.empty(1, dtype=torch.uint8, device=self.device)
        self._functions.draw_flags_launch(
            self.table,
            hyper,
            draw_index,
            flags,
            gate,
            seed=seed,
            granularity=GRANULARITIES[granularity],
            threshold_column=threshold_column,
            strength_column=strength_column,
        )
        return gate
