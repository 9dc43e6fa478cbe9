# SPDX-License-Identifier: BSD-3-Clause
"""Rows: the parallel lists that every backend works on.

A kernel sees plain local tensors and numbers. `Rows` holds them as parallel lists, a row for each
parameter. Its subclasses compute: `ReferenceRows` with torch's operations, `TableRows` with the C++
operators, `LaunchedRows` with launches of Triton or CUDA.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgg import reference, sharding
from dgg.backends.distances import Distances
from dgg.backends.views import real_view, real_views
from dgg.backends.watch import MemoryWatch
from dgg.kernels import layout
from dgg.kernels.layout import (
    ANCHOR,
    COPY,
    EXP_AVG,
    EXP_AVG_SQ,
    IMPORTANCE,
    MAX_EXP_AVG_SQ,
    PARAM,
    STEP,
)


class Scaling(NamedTuple):
    """The scale of this step's gradients, and a GradScaler's verdict on them.

    Attributes:
        divisor: Divisor of the gradients, for backends that run when they are called.
        grad_scale: The same as a float32 tensor, for launches; None is 1.
        found_inf: float32 tensor; launches change nothing where it is not 0. None is 0.
    """

    divisor: float = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Draw(NamedTuple):
    """The draw of a step.

    Attributes:
        seed: Seed in [0, 2**64).
        index: Draw index k.
        injecting: Whether any row may inject.
        elements: Whether any row may draw per element.
        index_tensor: int64 tensor of one element, the draw index that a captured step reads in
            place of ``index``.
    """

    seed: int
    index: int  # type: ignore[assignment]  # instead of tuple.index(), which nobody calls
    injecting: bool
    elements: bool
    index_tensor: Tensor | None = None


class Rule(NamedTuple):
    """An update rule as the backends know it.

    Attributes:
        name: Of its function in `reference`. The operator on the table has the same name in
            `libraries.OPERATORS`; the launch is called ``adam_launch_`` where this is ``adam_``.
        state: Columns of the lists that the reference takes after the gradients.
        hyper: Hyper-parameters in the order of the kernels' table; each group has all of them.
        optional: The hyper-parameter with which the rule has its optional state.
    """

    name: str
    state: tuple[int, ...]
    hyper: tuple[str, ...]
    optional: str


_ADAM_STATE = (EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, ANCHOR, STEP)
ADAM = Rule("adam_", _ADAM_STATE, layout.ADAM_HYPER, "amsgrad")
SGD = Rule("sgd_", (EXP_AVG, ANCHOR), layout.SGD_HYPER, "momentum")


class Rows:
    """The parallel lists of one device's parameters, a row for each parameter.

    A step calls `take_gradients` or `take_native_gradients`, then `measure` (or `norms` and
    `coefficients`, with a sum over ranks in between), then `update_` or `guide_`; `abandon` if
    nothing is written.

    Args:
        backend: Name of the backend.
        params: Parameters: θ, or with master weights their copies.
        groups: Number of each row's parameter group.
        indices: Tensor index j of each row, counted over all groups.
        anchors: θ* of each row or None. The next five lists are state; None for none at all.
        exp_avgs: m.
        exp_avg_sqs: v.
        max_exp_avg_sqs: v of amsgrad.
        steps: Step counts.
        masters: Master weights θ.
        importances: F.
        stochastic: Round bfloat16 weights stochastically.
        reduction: Sums squares over ranks, or None.
        places: Where each row's elements lie in the whole tensor; empty if all rows are whole.
        holders: The tensors whose versions an update moves, if they are not ``params``.

    Attributes:
        holders: The argument, or the parameters.
        params: The parameters, of DTensors the local shards.
        anchored: Whether any row has an anchor.
        distances: float64 [n], known ‖u‖² of each row, or -1.
        importance: The option, i of equation (3).
        route: Where the pull enters; one of `reference.ROUTES`.
        grads: Gradient of each row in the present step or None.
        replays: Replay gradient of each row or None; empty when there are none at all.
        present: Not 0 if there is a gradient or replay gradient in the present step.
    """

    # What computes: the functions of `reference`, or others of their names.
    _functions: Mapping[str, Any] = vars(reference)
    # Whether steps are asynchronous launches.
    launched = False
    # Whether the kernels compare every weight with the rounding of its master.
    _finds_written_copies = True
    present = 0
    # Whether every row had a gradient in the present step.
    _complete = False
    importance = 0.0
    route = "gradient"

    def __init__(
        self, backend: str, params: Sequence[Tensor], groups: Sequence[int],
        indices: Sequence[int], *, anchors: Sequence[Tensor | None],
        exp_avgs: Sequence[Tensor | None] = (), exp_avg_sqs: Sequence[Tensor | None] = (),
        max_exp_avg_sqs: Sequence[Tensor | None] = (), steps: Sequence[Tensor | None] = (),
        masters: Sequence[Tensor | None] = (), importances: Sequence[Tensor | None] = (),
        stochastic: bool = False, reduction: sharding.Reduction | None = None,
        places: Sequence[sharding.Place | None] = (), holders: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        absent = [None] * len(params)
        self.backend = backend
        self.stochastic = stochastic
        self.holders = list(holders or params)
        self.params = [sharding.local(p) for p in params]
        self.device = self.params[0].device
        self.groups = list(groups)
        self.indices = list(indices)
        self._shards = sharding.Shards(params) if any(map(sharding.is_dtensor, params)) else None
        self.reduction, self.places = reduction, list(places)
        self._known = Distances(len(self.params), self.device)
        self.distances = self._known.squares
        self._constants: dict[object, Tensor] = {}
        self._masters = real_views(masters or absent)
        self._has_masters = any(master is not None for master in self._masters)
        # Versions of the parameters when the masters last agreed with them.
        self._adopted: array.array | None = None
        # Kernels see complex tensors as pairs of reals.
        self._state = {
            EXP_AVG: real_views(exp_avgs or absent),
            EXP_AVG_SQ: real_views(exp_avg_sqs or absent),
            MAX_EXP_AVG_SQ: real_views(max_exp_avg_sqs or absent),
            ANCHOR: real_views(anchors),
            IMPORTANCE: real_views(importances or absent),
            STEP: list(steps or absent),
        }
        has_anchor = [anchor is not None for anchor in anchors]
        self.anchored = any(has_anchor)
        self._has_anchor = torch.tensor(has_anchor, device="cpu")
        self.grads: list[Tensor | None] = []
        self.replays: list[Tensor | None] = []
        # Gradients that a kernel edits in a copy, and the copies.
        self._grad_copies: list[tuple[Tensor, Tensor]] = []

    # -- the columns ----------------------------------------------------------------------------

    def tensors(self, column: int) -> list[Any]:
        """Returns the tensors of a column as the kernels see them: one or None per row."""
        return [self._tensor(column, row) for row in range(len(self.params))]

    def _tensor(self, column: int, row: int) -> Any:
        # A new view of the parameter every time: a kept one would keep memory alive after
        # `.data =` has replaced it.
        if column == PARAM and self._masters[row] is not None:
            return self._masters[row]
        if column == COPY and self._masters[row] is None:
            return None
        if column in (PARAM, COPY):
            return real_view(self.params[row].detach())
        return self._state[column][row]

    def _place(self, row: int) -> tuple[int, int, int]:
        """Returns base, stretch and stride of a row's elements, as kernels count them."""
        pairs = 2 if self.params[row].is_complex() else 1  # kernels see complex numbers as pairs
        place = self.places[row] if self.places else None
        if place is None:
            return 0, pairs * self.params[row].numel(), pairs * self.params[row].numel()
        return pairs * place.base, pairs * place.stretch, pairs * place.stride

    def flags(self, values: Sequence[int], name: str) -> Tensor:
        """Returns uint8 flags, one per row, on the device; valid until the next of this name."""
        return torch.tensor(values, dtype=torch.uint8, device="cpu").to(self.device)

    def constant_flags(self, value: int) -> Tensor:
        """Returns (cached) uint8 flags that are the same for every row; not to be modified."""
        if value not in self._constants:
            self._constants[value] = torch.full(
                (len(self.params),), value, dtype=torch.uint8, device=self.device
            )
        return self._constants[value]

    def constant_coefficients(self) -> Tensor:
        """Returns (cached) coefficients of a step that neither clips nor scales: c = s = 1."""
        if "coefficients" not in self._constants:
            self._constants["coefficients"] = torch.ones(
                reference.SCALES + len(self.params), dtype=torch.float64, device=self.device
            )
        return self._constants["coefficients"]

    @property
    def active(self) -> Tensor:
        """Whether a row had a gradient in the last step, and an anchor: bool [n] on the CPU."""
        return self._has_anchor if self._complete else self._has_anchor & self._had_gradients()

    def _had_gradients(self) -> Tensor:
        """Returns whether each row had a gradient or replay gradient in the last step."""
        raise NotImplementedError

    def use_options(self, options: Mapping[str, Any]) -> None:
        """Takes the options of the optimizer that say along what, and where, the anchor pulls."""
        importance = float(options["importance"])
        if importance != self.importance:
            self.forget(anchors=False)  # they were measured with another weight
        self.importance, self.route = importance, options["route"]

    # -- the gradients --------------------------------------------------------------------------

    def watch_gradients(self, watch: MemoryWatch) -> bool:
        """Prepares `TableRows.take_native_gradients`; returns whether it is possible.

        Args:
            watch: Its first parameters are these rows', in the rows' order.
        """
        return False

    def take_gradients(
        self, grads: Sequence[Tensor | None], replays: Sequence[Tensor | None], *, elementwise: bool
    ) -> None:
        """Takes the gradients of this step.

        Args:
            grads: Gradient of each row or None; strided, of the parameter's shape.
            replays: Replay gradient of each row or None; empty if there are none at all.
            elementwise: Draws are made per element, so elements have to lie in row-major order.
        """
        raise NotImplementedError

    def _shards_of(self, grads: Any, replays: Any) -> tuple[Any, Any]:
        """Returns the local shards of gradients, after a check of their placements."""
        if self._shards is None:
            return grads, replays
        return self._shards.of_grads(grads), [sharding.local(r) for r in replays]

    def _without_gradient(self) -> list[int]:
        if self._complete:
            return []
        return [
            row
            for row, grad in enumerate(self.grads)
            if grad is None and not (self.replays and self.replays[row] is not None)
        ]

    def abandon(self) -> None:
        """Ends a step that wrote nothing."""
        self.release()

    def release(self) -> None:
        """Releases the gradients and the copies made of them."""
        self.grads, self.replays, self._grad_copies = [], [], []

    # -- changes by others ----------------------------------------------------------------------

    def _versions(self) -> Sequence[int]:
        """Returns a number per parameter that changes with every write that autograd sees."""
        if self._shards is not None:
            return self._shards.versions()
        return [p._version for p in self.params]

    def adopt_changes(self) -> None:
        """Copies changes that somebody made to the parameters into their master weights.

        An element that is the rounding of its master keeps the master; any other becomes its
        master. Versions do not count writes through ``.data``: the kernels find these element by
        element, and for the reference all weights are compared here.
        """
        if not self._has_masters:
            return
        versions = array.array("q", self._versions())
        before = self._adopted if self._finds_written_copies else None  # None: compare all rows
        if versions == before:
            return
        for row, master in enumerate(self._masters):
            if master is not None and (before is None or before[row] != versions[row]):
                master.copy_(reference.adopted(master, self._tensor(COPY, row)))
        self._adopted = versions

    def forget(self, *, anchors: bool = True) -> None:
        """Drops all known distances; with ``anchors`` these may have been written, too."""
        self.distances.fill_(-1.0)

    def forget_rows(self, rows: Sequence[int], *, anchors: bool = True) -> None:
        """Drops the known distances of rows; with ``anchors`` these were written, too."""
        if rows:
            self.distances[list(rows)] = -1.0

    def forget_changed(self) -> None:
        """Drops the known distance of every parameter that was changed since it was measured."""
        if self._known.versions is not None:
            self.forget_rows(self._known.written(self._versions()), anchors=False)

    def _after_update(self, look_ahead: bool) -> None:
        """Ends a step that wrote the parameters, and with ``look_ahead`` measured distances."""
        if look_ahead:
            self._known.measured(self._versions(), self._without_gradient())
        if self._has_masters:
            self._adopted = array.array("q", self._versions())
        self.release()

    # -- the computation ------------------------------------------------------------------------

    def norms(
        self, *, replay_weight: float, scaling: Scaling, which: int, gate: Tensor | None = None
    ) -> Tensor:
        """Returns the squares of `reference.norms` for these rows.

        Args:
            replay_weight: w.
            scaling: Divisor of the gradients.
            which: Bits of `reference`.
            gate: uint8 [1]; a captured step measures for the injection only where it is not 0.
        """
        raise NotImplementedError

    def coefficients(self, squares: Tensor, **settings: Any) -> Tensor:
        """Returns c, the norms and s as `reference.coefficients` does."""
        return self._functions["coefficients"](squares, **settings)

    def measure(self, settings: Mapping[str, Any], **options: Any) -> Tensor:
        """Returns the `coefficients` that follow from `norms` in which nobody else has a part."""
        return self.coefficients(self.norms(**options), **settings)

    def products(self, flags: Tensor, *, replay_weight: float, scaling: Scaling) -> Tensor:
        """Returns the sums of `reference.products` for these rows.

        Args:
            flags: uint8 [n], which rows are guided.
            replay_weight: w.
            scaling: Divisor of the gradients.
        """
        raise NotImplementedError

    def guard_coefficients(self, sums: Tensor, **settings: Any) -> Tensor:
        """Returns c, the norms and a as `reference.guard_coefficients` does."""
        return self._functions["guard_coefficients"](sums, **settings)

    def measure_guard(self, settings: Mapping[str, Any], flags: Tensor, **options: Any) -> Tensor:
        """Returns the same with `guard_coefficients` and `products`."""
        return self.guard_coefficients(self.products(flags, **options), **settings)

    def update_(
        self, rule: Rule, coefficients: Tensor, flags: Tensor, groups: Sequence[dict], draw: Draw,
        scaling: Scaling, *, look_ahead: bool, replay_weight: float,
    ) -> None:  # fmt: skip
        """Runs an update rule on these rows: all groups in one call, parameters in place.

        Args:
            rule: `ADAM` or `SGD`.
            coefficients: float64 [4 + n].
            flags: uint8 [n].
            groups: Hyper-parameters of every group, the names in ``rule.hyper``.
            draw: The draw of the step.
            scaling: Divisor of the gradients, and whether to change anything.
            look_ahead: Also measure the distances after the update.
            replay_weight: w.
        """
        raise NotImplementedError

    def guide_(
        self, coefficients: Tensor, flags: Tensor, groups: Sequence[dict], draw: Draw,
        scaling: Scaling, *, replay_weight: float,
    ) -> None:  # fmt: skip
        """Runs `reference.guide_` on these rows: every gradient becomes G, in place.

        Args:
            coefficients: float64 [4 + n].
            flags: uint8 [n].
            groups: Hyper-parameters of every group, the names in GUIDE_HYPER.
            draw: The draw of the step.
            scaling: Divisor of the gradients, and whether to change anything.
            replay_weight: w.
        """
        raise NotImplementedError
