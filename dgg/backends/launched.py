# SPDX-License-Identifier: BSD-3-Clause
"""Rows that a device's kernels step: asynchronous launches of Triton or CUDA.

One launch serves all tensors of one dtype combination. Data that stays the same from step to step
(addresses of parameters, moments and anchors, the cut into chunks) is uploaded once. Gradient
addresses and hyper-parameters are uploaded asynchronously in the steps in which they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg.backends import libraries
from dgg.backends.chunks import Launch, cuts_of
from dgg.backends.prefetch import AnchorWindows, is_away
from dgg.backends.rows import Draw, Scaling
from dgg.backends.table import TableRows, signed
from dgg.backends.uploads import Uploads, capturing
from dgg.kernels import layout

# Settings of a norm launch that computes no coefficients.
_NO_SETTINGS: dict[str, Any] = {"max_grad_norm": None, "scaling": False, "per_tensor": False}
# The same of a launch of `products`.
_NO_GUARD: dict[str, Any] = {"max_grad_norm": None, "per_tensor": False, "maximize": False}
# The bit of a launch for the place where the pull enters.
_ROUTE_BITS = {
    "gradient": 0, "first_moment": layout.FIRST_MOMENT_BIT, "decoupled": layout.DECOUPLED_BIT,
}  # fmt: skip


class LaunchedRows(TableRows):
    """Rows whose steps are launches on a device, which has their tables and workspace.

    Arguments are those of `Rows`, and ``capturable``: whether steps may be captured into a graph.

    Attributes:
        windows: Windows of the anchors that are kept off the device, or None.
    """

    launched = True

    def __init__(
        self, backend: str, params: Sequence[Tensor], *args: Any, capturable: bool = False,
        **columns: Any,
    ) -> None:  # fmt: skip
        super().__init__(backend, params, *args, **columns)
        self._launchers = libraries.launchers(backend)
        self._uploads = Uploads(self.device, capturable)
        self.windows = self._make_windows()
        numels = self._base_table[:, layout.NUMEL].tolist()
        windows_of_rows = None if self.windows is None else self.windows.of_row
        self._cut = cuts_of(numels, self.device, windows_of_rows)
        self._launches: list[Launch] = []
        self._host_table: Tensor | None = None
        # Chunks and workspace of captured steps, which their graphs use for good.
        self._captured: list[list[Launch]] = []
        self._hyper_on_device: dict[tuple[str, ...], Tensor] = {}
        self._none = torch.empty(0, dtype=torch.int64, device=self.device)
        # Whether the distances to anchors that are kept off the device hold for this step.
        self._measured = False
        # The distances are on the device; the native gradients drop them in this array of the host.
        self._dropped = torch.ones(len(self.params), dtype=torch.float64, device="cpu")

    def _make_windows(self) -> AnchorWindows | None:
        """Returns the windows of anchors kept off the device; enters their addresses there.

        The importances kept off the device come with them.
        """
        anchors, importances = (
            [
                x if is_away(x, p) else None
                for x, p in zip(self._state[column], self.params, strict=True)
            ]
            for column in (layout.ANCHOR, layout.IMPORTANCE)
        )
        if all(x is None for x in (*anchors, *importances)):
            return None
        windows = AnchorWindows(anchors, self.device, importances=importances)
        for column, addresses in (
            (layout.ANCHOR, windows.addresses), (layout.IMPORTANCE, windows.importance_addresses),
        ):  # fmt: skip
            for row, address in enumerate(addresses):
                if address:
                    self._base_table[row, column] = address
        return windows

    # -- the inputs of a step -------------------------------------------------------------------

    def flags(self, values: Sequence[int], name: str) -> Tensor:
        """Uploads the flags asynchronously."""
        return self._uploads.send(name, torch.tensor(values, dtype=torch.uint8, device="cpu"))

    def take_native_gradients(self, replays: Sequence[Tensor | None], *, elementwise: bool) -> bool:
        """Takes the gradients natively and uploads their addresses."""
        if not super().take_native_gradients(replays, elementwise=elementwise):
            return False
        if bool((self._dropped < 0).any()):
            self._dropped.fill_(1.0)
            self.forget()
        self._begin()
        return True

    def take_gradients(self, grads, replays, *, elementwise: bool) -> None:
        """Takes the gradients and uploads their addresses."""
        super().take_gradients(grads, replays, elementwise=elementwise)
        self._begin()

    def _begin(self) -> None:
        """Uploads the table and the addresses if they changed, and cuts the rows."""
        self._join()
        self._hyper_on_device.clear()
        captured = capturing(self.device)
        if captured or self._table is not self._host_table:
            self._launches = self._cut(tuple(self._table[:, layout.DTYPES].tolist()))
            self._device_table = self._uploads.send("table", self._table)
            # A graph has a table of its own.
            self._host_table = None if captured else self._table
            if captured:
                self._captured.append(self._launches)
        self._device_grads = self._uploads.send("grads", self._grad_addresses)
        self._device_replays = self._none
        if self._replay_addresses.numel():
            self._device_replays = self._uploads.send("replays", self._replay_addresses)

    def _hyper(self, groups: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> Tensor:
        """Returns the float64 [groups, names] table of hyper-parameters on the device.

        Values that are tensors on the device are copied there, not read by the host.
        """
        if names in self._hyper_on_device:
            return self._hyper_on_device[names]
        values = [group[name] for group in groups for name in names]
        on_device = [isinstance(x, Tensor) and x.device.type != "cpu" for x in values]
        numbers = [0.0 if on else float(x) for on, x in zip(on_device, values, strict=True)]
        host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        table = self._uploads.send("hyper", host)
        if any(on_device):
            # A copy: the uploaded table must stay as it was sent.
            table = table.clone()
            for place, on in enumerate(on_device):
                if on:
                    table[place].copy_(values[place].reshape(()), non_blocking=True)
        self._hyper_on_device[names] = table = table.view(len(groups), len(names))
        return table

    # -- the distances --------------------------------------------------------------------------

    def forget(self, *, anchors: bool = True) -> None:
        """Drops all distances, and with ``anchors`` the anchors in the windows."""
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
        """Makes the current stream wait for `_measure_ahead`."""
        if self.windows is not None:
            self.windows.join()

    def _measure_ahead(self, windows: AnchorWindows) -> None:
        """Measures the distances to anchors kept off the device, on the side stream.

        The next forward and backward pass run at the same time. Until the next `_begin` nothing
        else may use the launches.
        """
        windows.follow()
        # A new anchor may free all these tensors while the side stream uses them.
        tensors = [x for launch in self._launches for x in launch.tensors]
        windows.lend([self._device_table, self.distances, self._none, *tensors])
        with windows.aside():
            # Every row counts as present, since the gradients of the next step are not known yet.
            present = self._device_table[:, layout.PARAM].contiguous()
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
        """Yields the launches, those without a window first; makes each wait for its window."""
        yield from [launch for launch in self._launches if launch.window < 0]
        windows = self.windows
        if windows is None:
            return
        for number in windows.order():
            windows.fetch(number)
            yield from [launch for launch in self._launches if launch.window == number]
            windows.done(number)

    def _launch_norms(
        self, launch: Launch, squares: Tensor, grads: Tensor, replays: Tensor, *, which: int,
        replay_weight: float = 0.0, gate: Tensor | None = None, grad_scale: Tensor | None = None,
        out: Tensor | None = None, settings: Mapping[str, Any] = _NO_SETTINGS,
    ) -> None:  # fmt: skip
        self._launchers.norms_launch(
            self._device_table, *launch.tensors, grads, replays, self.distances, squares, gate,
            grad_scale, out, dtypes=launch.dtypes, replay_weight=replay_weight, which=which,
            importance=self.importance, **settings,
        )  # fmt: skip

    def norms(
        self, *, replay_weight: float, scaling: Scaling, which: int, gate: Tensor | None = None,
        out: Tensor | None = None, settings: Mapping[str, Any] = _NO_SETTINGS,
    ) -> Tensor:  # fmt: skip
        """Launches `reference.norms`, and with ``out`` `reference.coefficients` in the same."""
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

    def coefficients(self, squares: Tensor, **settings) -> Tensor:
        """Launches `reference.coefficients`."""
        out = self._empty(reference.SCALES + len(self.params))
        self._launchers.coefficients_launch(squares, out, **settings)
        return out

    def measure(self, settings: Mapping[str, Any], **options) -> Tensor:
        """Launches both as one: the last block of the norm pass computes the coefficients."""
        out = self._empty(reference.SCALES + len(self.params))
        self.norms(out=out, settings=settings, **options)
        return out

    def products(
        self, flags: Tensor, *, replay_weight: float, scaling: Scaling, out: Tensor | None = None,
        settings: Mapping[str, Any] = _NO_GUARD,
    ) -> Tensor:  # fmt: skip
        """Launches `reference.products`, and with ``out`` what follows from them in the same."""
        sums = self._empty(reference.PRODUCTS, len(self.params))
        launches = list(self._launches) if self.windows is None else self._as_anchors_come()
        for launch in launches:
            last = out is not None and launch is self._launches[-1]
            self._launchers.products_launch(
                self._device_table, *launch.tensors, self._device_grads, self._device_replays,
                flags, sums, scaling.grad_scale, out if last else None, dtypes=launch.dtypes,
                replay_weight=replay_weight, importance=self.importance,
                **(settings if last else _NO_GUARD),
            )  # fmt: skip
        return sums

    def guard_coefficients(self, sums: Tensor, **settings) -> Tensor:
        """Launches `reference.guard_coefficients`."""
        out = self._empty(reference.SCALES + len(self.params) + reference.GUARD_EXTRAS)
        self._launchers.guard_coefficients_launch(sums, out, **settings)
        return out

    def measure_guard(self, settings: Mapping[str, Any], flags: Tensor, **options) -> Tensor:
        """Launches both as one, unless anchors come in windows, in an order of their own."""
        if self.windows is not None:
            return super().measure_guard(settings, flags, **options)
        out = self._empty(reference.SCALES + len(self.params) + reference.GUARD_EXTRAS)
        self.products(flags, out=out, settings=settings, **options)
        return out

    def draw_flags(
        self, flags: Tensor, groups: Sequence[dict], names: tuple[str, ...], draw_index: Tensor,
        seed: int, granularity: str,
    ) -> Tensor:  # fmt: skip
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
        self._launchers.draw_flags_launch(
            self._device_table, self._hyper(groups, names), draw_index, flags, gate,
            seed=signed(seed), granularity=layout.GRANULARITIES[granularity],
            threshold_column=names.index("threshold"), strength_column=names.index("strength"),
        )  # fmt: skip
        return gate

    def update_(
        self, rule, coefficients, flags, groups, draw, scaling, *, look_ahead, replay_weight
    ) -> None:
        """Launches the rule's update, once for each dtype combination."""
        # Anchors kept off the device come a second time for the next step's distances, which are
        # measured beside its forward and backward pass instead of in the update.
        windows = self.windows
        variant = self._bits_of(draw)
        if look_ahead and windows is None:
            variant |= layout.ANCHOR_BIT | layout.LOOK_AHEAD_BIT
            variant |= layout.IMPORTANCE_BIT if self.importance else 0
        if any(group[rule.optional] for group in groups):
            variant |= layout.STATE_BIT
        if self.stochastic:
            variant |= layout.STOCHASTIC_BIT
        if draw.injecting:
            variant |= _ROUTE_BITS[self.route]
        function = getattr(self._launchers, rule.name[:-1] + "_launch_")
        hyper = self._hyper(groups, rule.hyper)
        for launch in self._as_anchors_come() if variant & layout.ANCHOR_BIT else self._launches:
            function(
                self._device_table, *launch.tensors, self._device_grads, self._device_replays,
                coefficients, flags, hyper, self.distances, scaling.grad_scale, scaling.found_inf,
                draw.index_tensor, dtypes=launch.dtypes,
                variant=variant | (layout.COPY_BIT if launch.copies else 0),
                replay_weight=replay_weight, seed=signed(draw.seed), draw=draw.index,
                importance=self.importance,
            )  # fmt: skip
        self._measured = False
        if windows is not None and look_ahead:
            look_ahead = not self._staged_now
            if look_ahead:
                self._measure_ahead(windows)
        self._after_update(look_ahead)

    def _bits_of(self, draw: Draw) -> int:
        """Returns the bits of a launch's variant that the draw decides."""
        bits = layout.ELEMENTS_BIT if draw.elements else 0
        if draw.injecting:
            bits |= layout.ANCHOR_BIT | (layout.IMPORTANCE_BIT if self.importance else 0)
        return bits

    def guide_(self, coefficients, flags, groups, draw, scaling, *, replay_weight) -> None:
        """Launches `reference.guide_`, once for each dtype combination."""
        hyper = self._hyper(groups, layout.GUIDE_HYPER)
        for launch in self._as_anchors_come() if draw.injecting else self._launches:
            self._launchers.guide_launch_(
                self._device_table, launch.rows, launch.chunks, self._device_grads,
                self._device_replays, coefficients, flags, hyper, scaling.grad_scale,
                scaling.found_inf, draw.index_tensor, dtypes=launch.dtypes,
                variant=self._bits_of(draw), replay_weight=replay_weight, seed=signed(draw.seed),
                draw=draw.index, importance=self.importance,
            )  # fmt: skip
        self._after_guide()
