# SPDX-License-Identifier: BSD-3-Clause
"""Rows in a table of addresses, which the C++ operators read.

The table is made once and only the column of the gradients is refreshed: an operator that takes
448-tensor lists costs more than the step it does; one that takes a table costs about a microsecond.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg.backends.libraries import OPERATORS
from dgg.backends.rows import Rows
from dgg.backends.views import give_back, is_dense, resolved, same_order
from dgg.backends.watch import MemoryWatch
from dgg.kernels import layout
from dgg.kernels.layout import (
    ANCHOR,
    COPY,
    DTYPES,
    GUIDE_HYPER,
    IMPORTANCE,
    PARAM,
    ROUTES,
    SLOT_BITS,
    STEP,
)
from dgg.reference import FLOAT_DTYPES

_MOMENTS = (layout.EXP_AVG, layout.EXP_AVG_SQ, layout.MAX_EXP_AVG_SQ)
# Tensors of the parameter's shape, in the order of their codes.
_STATE = (*_MOMENTS, ANCHOR, COPY, IMPORTANCE)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}
# The address entered for an empty gradient, which has none; 0 means that there is no gradient.
_NOWHERE = 1
_NO_ADDRESSES = torch.empty(0, dtype=torch.int64, device="cpu")


def signed(seed: int) -> int:
    """Returns a seed as the operators take it: the int64 of the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


class AddressColumn:
    """The addresses of a step's gradients, or of its replay gradients, a row each.

    Args:
        params: The parameters.
        usual: For each of them whether kernels can take any contiguous gradient of its dtype and
            shape as it is.

    Attributes:
        addresses: int64 [n] on the CPU; 0 where there is no gradient.
    """

    def __init__(self, params: Sequence[Tensor], usual: Sequence[bool]) -> None:
        self._expected: tuple[list[Any], list[Any], Sequence[bool]] = (
            [p.dtype for p in params], [p.shape for p in params], usual,
        )  # fmt: skip
        # Made once: making a tensor for the addresses of every step costs more than filling it.
        self._memory = bytearray(max(8 * len(params), 1))
        self._pack = struct.Struct(f"{len(params)}q").pack_into
        self.addresses = torch.frombuffer(self._memory, dtype=torch.int64, count=len(params))

    def enter(self, grads: Sequence[Any]) -> set[int]:
        """Enters the addresses of all gradients; returns the rows that need a closer look.

        Args:
            grads: Gradient or None of each row.
        """
        # Comprehensions over one attribute, the fastest way in Python, for 448 gradients a step.
        dtypes, shapes, usual = self._expected
        rows: list[int] | None = None
        try:
            addresses, present = list(map(Tensor.data_ptr, grads)), grads
        except TypeError:  # some are None
            rows = [row for row, g in enumerate(grads) if g is not None]
            present = [grads[row] for row in rows]
            addresses = [0 if g is None else g.data_ptr() for g in grads]
            dtypes, shapes = [dtypes[row] for row in rows], [shapes[row] for row in rows]
            usual = [usual[row] for row in rows]
        if 0 in addresses:
            addresses = [
                a or (0 if g is None else _NOWHERE) for a, g in zip(addresses, grads, strict=True)
            ]
        self._pack(self._memory, 0, *addresses)
        kinds = [g.dtype for g in present], [g.shape for g in present]
        plain = [c and not n for c, n in zip(
            map(Tensor.is_contiguous, present), map(Tensor.is_neg, present), strict=True
        )]  # fmt: skip
        if any([dtype.is_complex for dtype in kinds[0]]):
            plain = [p and not g.is_conj() for p, g in zip(plain, present, strict=True)]
        if _NOWHERE in addresses:
            nowhere = [g.numel() > 0 and not g.data_ptr() for g in present]
            plain = [p and not n for p, n in zip(plain, nowhere, strict=True)]
        if kinds == (dtypes, shapes) and all(plain) and all(usual):
            return set()
        as_expected = zip(*kinds, dtypes, shapes, plain, usual, strict=True)
        return {
            place if rows is None else rows[place]
            for place, (dtype, shape, *expected, ok, kind) in enumerate(as_expected)
            if not (ok and kind) or [dtype, shape] != expected
        }


class TableRows(Rows):
    """Rows whose steps are C++ operators on a table of addresses."""

    _functions = OPERATORS

    def __init__(self, backend: str, params: Sequence[Tensor], *args: Any, **columns: Any) -> None:
        super().__init__(backend, params, *args, **columns)
        self._staged = [not self._flat(row) for row in range(len(self.params))]
        # Contiguous gradients of these parameters need no look at their strides.
        self._usual = [
            not staged and p.is_contiguous()
            for staged, p in zip(self._staged, self.params, strict=True)
        ]
        self._address_columns = [AddressColumn(self.params, self._usual) for _ in range(2)]
        self._base_table = self._make_table()
        self._native: Any = None  # `NativeGradients`, where there are any
        # Where the native gradients drop distances, by writing -1.
        self._dropped = self.distances
        self._hyper_groups: Sequence[dict] | None = None
        self._hyper_values: list[float] = []
        self._hyper_numbers: Tensor
        # Whether this step's gradients were taken natively.
        self._taken_natively = False
        self._grad_addresses = self._address_columns[0].addresses
        self._replay_addresses = _NO_ADDRESSES
        self.release()

    # -- the table ------------------------------------------------------------------------------

    def _flat(self, row: int) -> bool:
        # An element-wise kernel may walk memory in any order that all its tensors share.
        param = self._tensor(PARAM, row)
        state = [self._tensor(column, row) for column in _STATE]
        return is_dense(param) and all(x is None or same_order(x, param) for x in state)

    def _make_table(self) -> Tensor:
        lines = []
        for row in range(len(self.params)):
            tensors = [self._tensor(column, row) for column in (PARAM, *_MOMENTS, ANCHOR, STEP)]
            behind = [self._tensor(column, row) for column in (COPY, IMPORTANCE)]
            lines.append(
                [*(0 if x is None else x.data_ptr() for x in tensors), tensors[0].numel(),
                 self.groups[row], self._dtype_codes(row, None, None), self.indices[row],
                 *self._place(row), *(0 if x is None else x.data_ptr() for x in behind)]
            )  # fmt: skip
        return torch.tensor(lines, dtype=torch.int64, device="cpu")

    def _dtype_codes(self, row: int, grad: Tensor | None, replay: Tensor | None) -> int:
        param = self._tensor(PARAM, row)
        state = (self._tensor(column, row) for column in _STATE)
        # An absent gradient counts as one of the model's dtype, not of the master weight's.
        grads = (self.params[row] if x is None else x for x in (grad, replay))
        others = (param if x is None else x for x in state)
        dtypes = [x.dtype for x in (param, *grads, *others)]
        packed = 0
        for slot, dtype in enumerate(dtypes):
            packed |= _DTYPE_CODES[dtype.to_real()] << (SLOT_BITS * slot)
        return packed

    def _hyper_table(self, groups: Sequence[dict], names: Sequence[str]) -> Tensor:
        if groups is self._hyper_groups:
            return self._hyper_numbers
        self._hyper_groups = groups
        values = [group[name] for group in groups for name in names]
        if values != self._hyper_values:
            numbers = array.array("d", values)
            self._hyper_numbers = torch.frombuffer(numbers, dtype=torch.float64).view(
                len(groups), len(names)
            )
            self._hyper_values = values
        return self._hyper_numbers

    # -- the gradients --------------------------------------------------------------------------

    def watch_gradients(self, watch: MemoryWatch) -> bool:
        """Prepares the native gradients; the gradients inside of DTensors are out of reach."""
        if self._shards is None:
            # Stochastic rounding numbers the elements, so they have to be contiguous.
            usual = self._usual if self.stochastic else [not staged for staged in self._staged]
            buffers = [column.addresses for column in self._address_columns]
            self._native = watch.native_gradients(
                self.params, *buffers, self._dropped, usual, self._usual
            )
        if self._native is None:
            return False
        self._known.memory = self._native.versions
        return True

    def take_native_gradients(self, replays: Sequence[Tensor | None], *, elementwise: bool) -> bool:
        """Takes the gradients from ``.grad``, as `take_gradients` would, natively.

        Returns whether it did. If not, a watched tensor moved or a gradient is wrong, and
        `take_gradients` takes them or raises.
        """
        native = self._native
        present = native.begin(self._known.versions is not None, replays, row_major=elementwise)
        if present < 0:
            return False
        self._taken_natively = True
        self._replay_addresses = self._address_columns[1].addresses if replays else _NO_ADDRESSES
        self.present, self._complete = present, present == len(self.params)
        odd = native.odd()
        if odd or self._has_masters:
            try:
                self._take_odd({row: self.params[row].grad for row in odd}, replays, elementwise)
            except (RuntimeError, TypeError):
                self.abandon()
                return False
        return True

    def odd_gradients(self) -> list[Tensor]:
        """Returns the gradients that `take_native_gradients` could not take as they are."""
        grads = [self.params[row].grad for row in self._native.odd()]
        return [g for g in grads if g is not None]

    def take_gradients(self, grads, replays, *, elementwise: bool) -> None:
        """Enters the addresses of the gradients, and makes copies of those that need one."""
        self._taken_natively = False
        grads, replays = self._shards_of(grads, replays)
        self.release()
        self.grads, self.replays = grads, replays
        self._replay_addresses = self._address_columns[1].addresses if replays else _NO_ADDRESSES
        self._complete = not any([g is None for g in grads])
        # Only whether it is 0 matters.
        every = len(self.params) if self._complete else 0
        self.present = every or sum([x is not None for x in (*grads, *replays)])
        odd = self._address_columns[0].enter(grads)
        if replays:
            odd |= self._address_columns[1].enter(replays)
        self._take_odd({row: grads[row] for row in sorted(odd)}, replays, elementwise)

    def _take_odd(
        self, grads: Mapping[int, Any], replays: Sequence[Tensor | None], elementwise: bool
    ) -> None:
        """Takes the gradients of rows that need a look at their strides or dtypes, or a copy.

        ``grads`` has the gradient or None of these rows alone; the rest is as in `take_gradients`.
        """
        pairs = {}
        for row, grad in grads.items():
            pairs[row] = pair = resolved([grad, replays[row] if replays else None])
            shape = self._tensor(PARAM, row).shape
            if any(x is not None and x.shape != shape for x in pair):
                # After `.grad.data =` alone; a kernel would read beyond the gradient's end.
                raise RuntimeError("a gradient has another shape than its parameter")
            for x in pair:
                if x is not None and x.numel() and not x.data_ptr():
                    raise RuntimeError(f"a gradient is a {type(x).__name__} without memory")
        self.adopt_changes()  # before a copy is made
        if pairs:
            self._table = self._base_table.clone()
        for row, pair in pairs.items():
            param = self._tensor(PARAM, row)
            staged = (
                self._staged[row]
                or not all(x is None or (is_dense(x) and same_order(x, param)) for x in pair)
                or ((elementwise or self.stochastic) and not param.is_contiguous())
            )
            if staged:
                self._stage(row)
            for slot, x in enumerate(pair):
                address = 0
                if x is not None:
                    plain = x.contiguous() if staged else x
                    self._kept.append(plain)
                    if slot == 0 and plain.data_ptr() != grads[row].data_ptr():
                        self._grad_copies.append((grads[row].detach(), plain))
                    address = plain.data_ptr() or _NOWHERE
                if slot == 0 or replays:
                    self._address_columns[slot].addresses[row] = address
            self._table[row, DTYPES] = self._dtype_codes(row, *pair)

    def _stage(self, row: int) -> None:
        # Kernels work on contiguous copies where strides differ.
        self._staged_now = True
        for column in (PARAM, *_STATE):
            tensor = self._tensor(column, row)
            if tensor is None:
                continue
            copy = tensor.to(self.device).contiguous()
            self._kept.append(copy)
            self._table[row, column] = copy.data_ptr()
            if copy.data_ptr() != tensor.data_ptr() and column not in (ANCHOR, IMPORTANCE):
                self._copies.append((row, tensor, copy))

    def _had_gradients(self) -> Tensor:
        present = self._grad_addresses != 0
        if self._replay_addresses.numel():
            present = present | (self._replay_addresses != 0)
        return present

    def abandon(self) -> None:
        """Releases the gradients, those that were taken natively included."""
        if self._taken_natively:
            self._native.end(written=False)
            self._taken_natively = False
        self.release()

    def release(self) -> None:
        """Releases the gradients and all copies."""
        self.grads, self.replays, self._grad_copies = [], [], []
        # Row, tensor and its copy, where kernels work on copies; all that a step must keep alive.
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        self._kept: list[Tensor] = []
        # A step with odd gradients has a table of its own, and perhaps staged rows.
        self._table, self._staged_now = self._base_table, False
        # Whether the versions of the distances were read in this step.
        self._versions_read = False

    def _versions(self) -> Sequence[int]:
        return self._native.versions if self._taken_natively else super()._versions()

    def forget_changed(self) -> None:
        """Compares the versions, unless the native gradients have."""
        if not self._taken_natively:
            super().forget_changed()
            self._versions_read = self._known.versions is not None

    # -- the computation ------------------------------------------------------------------------

    def norms(self, *, replay_weight, scaling, which, gate=None) -> Tensor:
        """Calls the operator of `reference.norms`."""
        return OPERATORS["norms"](
            self._table, self._grad_addresses, self._replay_addresses, self.distances,
            replay_weight=replay_weight, grad_scale=scaling.divisor, which=which,
            importance=self.importance,
        )  # fmt: skip

    def products(self, flags: Tensor, *, replay_weight, scaling) -> Tensor:
        """Calls the operator of `reference.products`."""
        return OPERATORS["products"](
            self._table, self._grad_addresses, self._replay_addresses, flags,
            replay_weight=replay_weight, grad_scale=scaling.divisor, importance=self.importance,
        )  # fmt: skip

    def update_(
        self, rule, coefficients, flags, groups, draw, scaling, *, look_ahead, replay_weight
    ) -> None:
        """Calls the rule's operator, once for all groups."""
        OPERATORS[rule.name](
            self._table, self._grad_addresses, self._replay_addresses, coefficients, flags,
            self._hyper_table(groups, rule.hyper), self.distances, replay_weight=replay_weight,
            grad_scale=scaling.divisor, look_ahead=look_ahead, stochastic=self.stochastic,
            seed=signed(draw.seed), draw=draw.index, importance=self.importance,
            route=ROUTES[self.route],
        )  # fmt: skip
        self._after_update(look_ahead)

    def guide_(self, coefficients, flags, groups, draw, scaling, *, replay_weight) -> None:
        """Calls the operator of `reference.guide_`, once for all groups."""
        OPERATORS["guide_"](
            self._table, self._grad_addresses, self._replay_addresses, coefficients, flags,
            self._hyper_table(groups, GUIDE_HYPER), replay_weight=replay_weight,
            grad_scale=scaling.divisor, seed=signed(draw.seed), draw=draw.index,
            importance=self.importance,
        )  # fmt: skip
        self._after_guide()

    def _after_guide(self) -> None:
        if self._grad_copies:
            give_back(self._grad_copies)
        # Autograd does not see writes through addresses.
        grads = [p.grad for p in self.params] if self._taken_natively else self.grads
        torch.autograd.graph.increment_version([g for g in grads if g is not None])
        self.abandon()

    def _after_update(self, look_ahead: bool) -> None:
        for _, target, copy in self._copies:
            target.copy_(copy)
        if self._taken_natively:
            self._native.end(written=True)
            versions = self._native.versions
            for row, _, _ in self._copies:
                versions[row] = self.params[row]._version
            if look_ahead:
                self._known.versions = versions
            if self._has_masters:
                self._adopted = versions[:]
            self._taken_natively = False
            self.release()
            return
        # Autograd does not see writes through addresses.
        written = self.holders
        if skipped := set(self._without_gradient()):
            written = [p for row, p in enumerate(written) if row not in skipped]
        torch.autograd.graph.increment_version(written)
        if look_ahead and self._versions_read and self._complete and not self._copies:
            # They were read in this step and have just moved by one.
            self._known.measured([version + 1 for version in self._known.versions or ()])
            look_ahead = False
        super()._after_update(look_ahead)
