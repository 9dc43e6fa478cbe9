# SPDX-License-Identifier: BSD-3-Clause
"""Rows that a device's kernels step: launches of Triton or CUDA, which nobody waits for.

One launch serves all tensors of one dtype combination. Everything that stays the same from step to
step (addresses of parameters, moments and anchors, the cut into chunks) lies on the device for
good; what a step brings (gradient addresses, hyper-parameters) goes there in asynchronous copies,
and in none where nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg.backends import libraries
from dgg.backends.chunks import Cuts, Launch
from dgg.backends.prefetch import AnchorWindows, is_away
from dgg.backends.rows import Draw, Scaling
from dgg.backends.table import TableRows, signed
from dgg.backends.uploads import Uploads, capturing
from dgg.kernels.layout import (
    ANCHOR,
    ANCHOR_BIT,
    COPY_BIT,
    DTYPES,
    ELEMENTS_BIT,
    GRANULARITIES,
    GUIDE_HYPER,
    LOOK_AHEAD_BIT,
    NUMEL,
    PARAM,
    STATE_BIT,
    STOCHASTIC_BIT,
)

# What a norm launch is told where it makes no coefficients.
_NO_SETTINGS = {"max_grad_norm": None, "scaling": False, "per_tensor": False}


class LaunchedRows(TableRows):
    """Rows whose steps are launches on a device: tables and workspace there, addresses per step.

    Args:
        backend: "triton" or "cpp".
        params: Parameters.
        args: As in `Rows`.
        capturable: Whether steps may be captured into a graph.
        columns: As in `Rows`.

    Attributes:
        windows: Windows of the anchors that are kept off the device, or None.
    """

    launched = True

    def __init__(
        self, backend: str, params: Sequence[Tensor], *args: Any, capturable: bool = False,
        **columns: Any,
    ) -> None:  # fmt: skip
        super().__init__(backend, params, *args, **columns)
        self._functions = libraries.launchers(backend)
        self._uploads = Uploads(self.device, capturable)
        self.windows = self._make_windows()
        self._cuts = Cuts(
            self._base_table[:, NUMEL].tolist(),
            self.device,
            None if self.windows is None else self.windows.of_row,
        )
        self._launches: list[Launch] = []
        self._host_table: Tensor | None = None
        # Chunks and workspace of captured steps.
        self._captured: list[list[Launch]] = []
        self._hyper_on_device: dict[tuple[str, ...], Tensor] = {}
        self._none = torch.empty(0, dtype=torch.int64, device=self.device)
        # Whether the distances to anchors that are elsewhere hold for this step.
        self._measured = False
        # The distances are on the device; which of them are dropped is noted on the host.
        self._noted = torch.ones(len(self.params), dtype=torch.float64, device="cpu")

    def _make_windows(self) -> AnchorWindows | None:
        """Returns the windows of anchors that are elsewhere, and enters where they will come."""
        away = [
            anchor if is_away(anchor, p) else None
            for anchor, p in zip(self._state[ANCHOR], self.params, strict=True)
        ]
        if all(anchor is None for anchor in away):
            return None
        windows = AnchorWindows(away, self.device)
        rows = [row for row, number in enumerate(windows.of_row) if number >= 0]
        self._base_table[rows, ANCHOR] = torch.tensor(
            [windows.addresses[row] for row in rows], dtype=torch.int64, device="cpu"
        )
        return windows

    # -- what a step brings ---------------------------------------------------------------------

    def flags(self, values: Sequence[int], name: str) -> Tensor:
        """Sends the flags without waiting."""
        return self._uploads.send(name, torch.tensor(values, dtype=torch.uint8, device="cpu"))

    def take_native_gradients(self, replays: Sequence[Tensor | None], *, elementwise: bool) -> bool:
        """Sends the addresses that the native look finds."""
        if not super().take_native_gradients(replays, elementwise=elementwise):
            return False
        if bool((self._noted < 0).any()):
            self._noted.fill_(1.0)
            self.forget()
        self._begin()
        return True

    def take_gradients(self, grads, replays, *, elementwise: bool) -> None:
        """Sends the addresses."""
        super().take_gradients(grads, replays, elementwise=elementwise)
        self._begin()

    def _begin(self) -> None:
        """Sends the table and the addresses where they changed, and cuts the rows."""
        self._join()
        self._hyper_on_device.clear()
        inside = capturing(self.device)
        if inside or self._table is not self._host_table:
            self._launches = self._cuts.of(tuple(self._table[:, DTYPES].tolist()))
            self._device_table = self._uploads.send("table", self._table)
            # A graph has a table of its own.
            self._host_table = None if inside else self._table
            if inside:
                self._captured.append(self._launches)
        self._device_grads = self._uploads.send("grads", self._grad_addresses)
        self._device_replays = self._none
        if self._replay_addresses.numel():
            self._device_replays = self._uploads.send("replays", self._replay_addresses)

    def _hyper(self, groups: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> Tensor:
        """Returns the float64 [groups, names] table of hyper-parameters on the device.

        Values that are tensors on the device are copied there, not read. A step asks for it more
        than once.
        """
        if names not in self._hyper_on_device:
            self._hyper_on_device[names] = _send_hyper(self._uploads, groups, names)
        return self._hyper_on_device[names]

    # -- the distances --------------------------------------------------------------------------

    def forget(self, *, anchors: bool = True) -> None:
        """Drops all distances, and with ``anchors`` what has come of the anchors themselves."""
        self._join()
        self._measured = False
        if anchors and self.windows is not None:
            self.windows.forget()
        super().forget()

    def forget_rows(self, rows: Sequence[int], *, anchors: bool = True) -> None:
        """Drops all distances if there are rows: one launch instead of one for each row."""
        if rows:
            self.forget(anchors=anchors)

    def _join(self) -> None:
        """Lets the device finish measuring ahead before it goes on."""
        if self.windows is not None:
            self.windows.join()

    def _measure_ahead(self) -> None:
        """Measures all distances with anchors that come from elsewhere, beside what follows.

        Until the next `_begin`, the forward and the backward pass run at the same time; nothing
        else may use the launches.
        """
        windows = self.windows
        windows.follow()
        # A new anchor drops all of these, at any time.
        used = [x for launch in self._launches for x in launch.tensors]
        windows.lend([self._device_table, self.distances, self._none, *used])
        with windows.aside():
            # Every row counts as present: which gradients the next step brings is not known yet.
            present = self._device_table[:, PARAM].contiguous()
            self.distances.fill_(-1.0)
            self._measure_in_windows(present, self._none)
        windows.leave()
        self._measured = True

    def _measure_in_windows(self, grads: Tensor, replays: Tensor) -> None:
        squares = self._empty(3, len(self.params))
        for launch in self._as_anchors_come():
            self._launch_norms(launch, squares, grads, replays, which=reference.NORM_DISTANCE)

    # -- the launches ---------------------------------------------------------------------------

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def _as_anchors_come(self) -> Iterator[Launch]:
        """Yields the launches in the order in which their anchors come, those that are here first.

        A window is on its way and waited for when its launches come up.
        """
        yield from [launch for launch in self._launches if launch.window < 0]
        for number in () if self.windows is None else self.windows.order():
            self.windows.fetch(number)
            self.windows.wait(number)
            yield from [launch for launch in self._launches if launch.window == number]
            self.windows.done(number)

    def _launch_norms(
        self,
        launch: Launch,
        squares: Tensor,
        grads: Tensor,
        replays: Tensor,
        *,
        which: int,
        replay_weight: float = 0.0,
        gate: Tensor | None = None,
        grad_scale: Tensor | None = None,
        out: Tensor | None = None,
        settings: Mapping[str, Any] = _NO_SETTINGS,
    ) -> None:
        self._functions.norms_launch(
            self._device_table, *launch.tensors, grads, replays, self.distances, squares, gate,
            grad_scale, out, dtypes=launch.dtypes, replay_weight=replay_weight, which=which,
            **settings,
        )  # fmt: skip

    def _norms(
        self,
        out: Tensor | None,
        settings: Mapping[str, Any],
        *,
        replay_weight: float,
        scaling: Scaling,
        which: int,
        gate: Tensor | None = None,
    ) -> Tensor:
        grads, replays = self._device_grads, self._device_replays
        if self.windows is not None and which & reference.NORM_DISTANCE and not self._measured:
            self._measure_in_windows(grads, replays)
        squares = self._empty(3, len(self.params))
        for launch in self._launches:
            last = launch is self._launches[-1]
            self._launch_norms(
                launch, squares, grads, replays, which=which, replay_weight=replay_weight,
                gate=gate, grad_scale=scaling.grad_scale, out=out if last else None,
                settings=settings if last else _NO_SETTINGS,
            )  # fmt: skip
        return squares

    def norms(self, **options) -> Tensor:
        """Launches what `reference.norms` does."""
        return self._norms(None, _NO_SETTINGS, **options)

    def coefficients(self, squares: Tensor, **settings) -> Tensor:
        """Launches what `reference.coefficients` does."""
        out = self._empty(reference.SCALES + len(self.params))
        self._functions.coefficients_launch(squares, out, **settings)
        return out

    def measure(self, settings: Mapping[str, Any], **options) -> Tensor:
        """Launches both in one: the block that ends the last row of the norm pass makes them."""
        out = self._empty(reference.SCALES + len(self.params))
        self._norms(out, settings, **options)
        return out

    def draw_flags(
        self,
        flags: Tensor,
        groups: Sequence[dict],
        names: tuple[str, ...],
        draw_index: Tensor,
        seed: int,
        granularity: str,
    ) -> Tensor:
        """Draws on the device, for a step that is captured.

        Args:
            flags: uint8 [n]; INJECT and INJECT_ELEMENTS are set, FIRST_STEP is kept. In place.
            groups: Hyper-parameters of every group.
            names: Their order in the kernels' table.
            draw_index: int64, draw index k.
            seed: Seed of the draws.
            granularity: What a draw decides.

        Returns:
            uint8 [1], whether any row injects.
        """
        gate = torch.empty(1, dtype=torch.uint8, device=self.device)
        self._functions.draw_flags_launch(
            self._device_table, self._hyper(groups, names), draw_index, flags, gate,
            seed=signed(seed), granularity=GRANULARITIES[granularity],
            threshold_column=names.index("threshold"), strength_column=names.index("strength"),
        )  # fmt: skip
        return gate

    def update_(
        self, rule, coefficients, flags, groups, draw, scaling, *, look_ahead, replay_weight
    ) -> None:
        """Launches the rule's update, once for each dtype combination."""
        # Anchors that are not here come again for the next step's distances, beside its forward
        # and backward pass.
        away = self.windows is not None
        here = look_ahead and not away
        variant = _bits_of(draw)
        if here:
            variant |= ANCHOR_BIT | LOOK_AHEAD_BIT
        if any(group[rule.optional] for group in groups):
            variant |= STATE_BIT
        if self.stochastic:
            variant |= STOCHASTIC_BIT
        function = getattr(self._functions, rule.name[:-1] + "_launch_")
        hyper = self._hyper(groups, rule.hyper)
        for launch in self._as_anchors_come() if variant & ANCHOR_BIT else self._launches:
            function(
                self._device_table, *launch.tensors, self._device_grads, self._device_replays,
                coefficients, flags, hyper, self.distances, scaling.grad_scale, scaling.found_inf,
                draw.index_tensor, dtypes=launch.dtypes,
                variant=variant | (COPY_BIT if launch.copies else 0), replay_weight=replay_weight,
                seed=signed(draw.seed), draw=draw.index,
            )  # fmt: skip
        self._measured = False
        look_ahead = look_ahead and not (away and self._staged_now)
        if away and look_ahead:
            self._measure_ahead()
        self._after_update(look_ahead)

    def guide_(self, coefficients, flags, groups, draw, scaling, *, replay_weight) -> None:
        """Launches what `reference.guide_` does, once for each dtype combination."""
        hyper = self._hyper(groups, GUIDE_HYPER)
        for launch in self._as_anchors_come() if draw.injecting else self._launches:
            self._functions.guide_launch_(
                self._device_table, launch.rows, launch.chunks, self._device_grads,
                self._device_replays, coefficients, flags, hyper, scaling.grad_scale,
                scaling.found_inf, draw.index_tensor, dtypes=launch.dtypes, variant=_bits_of(draw),
                replay_weight=replay_weight, seed=signed(draw.seed), draw=draw.index,
            )  # fmt: skip
        self._after_guide()


def _send_hyper(
    uploads: Uploads, groups: Sequence[Mapping[str, Any]], names: tuple[str, ...]
) -> Tensor:
    values = [group[name] for group in groups for name in names]
    there = [
        (place, value)
        for place, value in enumerate(values)
        if isinstance(value, Tensor) and value.device.type != "cpu"
    ]
    for place, _ in there:
        values[place] = 0.0
    host = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
    table = uploads.send("hyper", host)
    if there:
        # Not into the uploaded table itself, which is taken as it was sent.
        table = table.clone()
        for place, value in there:
            table[place].copy_(value.reshape(()), non_blocking=True)
    return table.view(len(groups), len(names))


def _bits_of(draw: Draw) -> int:
    """Returns the bits of a launch's variant that the draw decides."""
    return (ANCHOR_BIT if draw.injecting else 0) | (ELEMENTS_BIT if draw.elements else 0)
