# SPDX-License-Identifier: BSD-3-Clause
"""The rows of all parameters, kept from step to step as long as nobody exchanges a tensor."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import anchor, backends, sharding
from dgg.step import checks, gradients
from dgg.step.draws import Decision


class RowCache:
    """The rows of all parameters, one `backends.Rows` per device, and the tensors behind them.

    The replay gradients are those of all parameters, or none.

    Attributes:
        launched: The step of a device is launched, not run when it is called.
        unchecked: A backend takes gradients without checking them.
    """

    # Whether the gradients are those of the parameters.
    _takes_natively = True

    def __init__(self, opt, groups, params: list[Tensor], replays: Sequence) -> None:
        self.params = params
        state = opt.state
        states = [state.get(p) or {} for p in params]
        self._entries = [(p, entry) for p, entry in state.items() if isinstance(entry, dict)]
        tensors = [
            v
            for _, entry in self._entries
            for v in entry.values()
            if isinstance(v, Tensor) and v.layout == torch.strided and v.device.type != "meta"
        ]
        opt._state_read = False
        # Switching amsgrad or momentum on between two steps needs more state.
        self._needed = needed = _needs(opt, groups)
        self._weighted = bool(self._needed[-1])
        self.all_rows: list[backends.Rows] = []
        self._places: list[list[int] | None] = []
        # Frozen parameters of a model have no rows.
        usable = [
            i
            for i, (p, grad) in enumerate(zip(params, replays or [None] * len(params), strict=True))
            if not is_lazy(p)
            and (states[i] or p.requires_grad or p.grad is not None or grad is not None)
            and p.dtype.to_real() in anchor.FLOAT_DTYPES
        ]
        numbers = [number for number, group in enumerate(groups) for _ in group["params"]]
        # Parameters for which a gradient would need rows or state that are not there.
        unready = set(range(len(params))).difference(usable)
        for i, (p, entry, number) in enumerate(zip(params, states, numbers, strict=True)):
            names = [*needed[number], *(["master"] if opt._settings.has_master(p) else ())]
            if "anchor" in entry:
                # The check of a step names what has no importance to weigh its pull by.
                names += needed[-1]
            if any(entry.get(name) is None for name in names):
                unready.add(i)
        self._unready = sorted(unready)
        self._make_rows(opt, params, states, numbers, usable)
        self.launched = any(rows.launched for rows in self.all_rows)
        self.unchecked = any(rows.backend == "reference" for rows in self.all_rows)
        self._watch = self._make_watch(params, tensors, states, usable)
        self._native = (
            self._takes_natively
            and len(self.all_rows) == 1
            and self.all_rows[0].watch_gradients(self._watch)
        )
        self._state = opt.__dict__["state"]
        self._watch.keep_dicts([self._state, *(entry for _, entry in self._entries)])
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        self._lists = [list(group["params"]) for group in groups]
        self._sizes = [*map(len, self._lists)]
        self._singles = [
            (number, place, p)
            for number, members in enumerate(self._lists)
            for place, p in enumerate(members)
            if not is_lazy(p) and p.numel() == 1
        ]

    def _make_rows(self, opt, params, states, numbers, usable) -> None:
        settings, ownership = opt._settings, opt._ownership
        indices = ownership.indices(params)
        parts: dict[tuple[torch.device, str], list[int]] = {}
        for i in usable:
            backend = backends.choose_for(settings.backend, params[i])
            parts.setdefault((params[i].device, backend), []).append(i)
        for (_, backend), places in parts.items():
            entries = [states[i] for i in places]
            columns: dict[str, Any] = {
                column: [entry.get(name) for entry in entries]
                for name, column in opt._rule.columns.items()
                if name != "importance" or self._weighted
            }
            columns["masters"] = [
                entry.get("master") if settings.has_master(params[i]) else None
                for i, entry in zip(places, entries, strict=True)
            ]
            lists = ([x[i] for i in places] for x in (params, numbers, indices))
            runs, reduction = ownership.parts([params[i] for i in places])
            rows = backends.make_rows(
                backend, *lists, stochastic=settings.stochastic_rounding,
                capturable=settings.capturable, reduction=reduction, places=runs, **columns,
            )  # fmt: skip
            self.all_rows.append(rows)
            self._places.append(None if len(places) == len(params) else places)

    def _make_watch(self, params, tensors, states, usable) -> backends.MemoryWatch:
        # share_memory_() and `.data =` replace the memory of a tensor. The parameters with rows
        # come first: their gradients can be taken natively.
        place_of = {id(x): place for place, x in enumerate(tensors)}
        in_order = [i for places in self._places for i in (usable if places is None else places)]
        anchors, importances = (
            [place_of.get(id(states[i].get(name)), -1) for i in in_order]
            for name in ("anchor", "importance")
        )
        without_rows = sorted(set(range(len(params))) - set(usable))
        watched = [p for rows in self.all_rows for p in rows.params]
        watched += [params[i] for i in without_rows if not is_lazy(params[i])]
        return backends.MemoryWatch(
            watched, tensors, anchors, importances if self._weighted else ()
        )

    def take_native_gradients(
        self, opt, groups, replays: Sequence[Tensor | None], *, elementwise: bool
    ) -> bool:
        """Takes the gradients of this step natively; returns False if it cannot.

        It can if nothing was exchanged since the last step (see `valid`) and no gradient is of
        another shape than its parameter.
        """
        if not (
            self._native
            and self._same_lists(groups)
            and self._same_needs(opt, groups)
            and not (
                self._unready and any([self.params[i].grad is not None for i in self._unready])
            )
            and self._unchanged_state(opt)
        ):
            return False
        if replays:
            if any([replays[i] is not None for i in self._unready]):
                return False
            places = self._places[0]
            replays = replays if places is None else [replays[i] for i in places]
        rows: Any = self.all_rows[0]  # `TableRows`
        return rows.take_native_gradients(replays, elementwise=elementwise)

    def take_gradients(
        self, grads: Sequence[Tensor | None], replays: Sequence[Tensor | None], *, elementwise: bool
    ) -> None:
        """Hands every device's rows their gradients."""
        for rows, places in zip(self.all_rows, self._places, strict=True):
            of_rows = grads, replays
            if places is not None:
                of_rows = [grads[i] for i in places], replays and [replays[i] for i in places]
            rows.take_gradients(*of_rows, elementwise=elementwise)

    def abandon(self) -> None:
        """Releases the gradients of a step that could not be finished."""
        for rows in self.all_rows:
            rows.abandon()

    def valid(self, opt, groups, params: list[Tensor], grads, replays) -> bool:
        """Returns whether parameters, memory, state and groups are those of the last step."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        sizes = [len(group["params"]) for group in groups]
        if sizes != self._sizes or not self._same_needs(opt, groups):
            return False
        if any(grads[i] is not None or (replays and replays[i] is not None) for i in self._unready):
            return False
        if not all([p._local_tensor is shard for p, shard in self._shards]):
            return False
        # Also where nobody has read the state: a table of freed addresses corrupts the heap.
        if not (self._watch.unmoved() and self._unchanged_state(opt)):
            return False
        self._forget_rewritten()
        return True

    def anchored_and_removed(self, params: Sequence[Tensor]) -> int | None:
        """Returns how many anchored parameters of the last step are not among ``params``.

        None if ``params`` has others that were not there at the last step.
        """
        identities = set(map(id, params))
        if identities - set(map(id, self.params)):
            return None
        return sum("anchor" in entry and id(p) not in identities for p, entry in self._entries)

    def _same_lists(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether the groups hold the same parameter objects."""
        # Comparing lists takes identical members as equal without calling Tensor.__eq__. Other
        # members call it, and its result has no truth value unless it is of one element: those
        # parameters are compared one by one.
        try:
            if [group["params"] for group in groups] != self._lists:
                return False
        except (RuntimeError, TypeError):
            return False
        return not self._singles or all(
            [groups[number]["params"][place] is p for number, place, p in self._singles]
        )

    def _same_needs(self, opt, groups) -> bool:
        derived = opt._draws.options.derived
        if "needed" not in derived:
            derived["needed"] = _needs(opt, groups)
        return self._needed == derived["needed"]

    def _unchanged_state(self, opt) -> bool:
        if opt.__dict__["state"] is not self._state or not self._watch.same_dicts():
            return False
        if opt._state_read:
            # The reader may have written into an anchor, which `.data` hides from the versions.
            for rows in self.all_rows:
                rows.forget()
            opt._state_read = False
        return True

    def _forget_rewritten(self) -> None:
        """Drops the distances from anchors whose versions have changed."""
        changed = self._watch.rewritten()
        first = 0
        for rows in self.all_rows:
            rows.forget_rows(
                [row - first for row in changed if 0 <= row - first < len(rows.params)]
            )
            first += len(rows.params)


def _needs(opt, groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the state that a step reads, of every group; and last that of anchored parameters."""
    weighted = ("importance",) if opt.param_groups[0]["importance"] else ()
    return [*(opt._rule.needed(group) for group in groups), weighted]


def take_gradients(opt, decision: Decision) -> list[backends.Rows]:
    """Takes the gradients of a step; all checks run before state is made.

    It fills in the decision's replay gradients and scaling, and returns the rows of every device,
    none if the step is skipped.
    """
    slot, cache, groups = opt._replay, opt._cache, opt.param_groups
    if slot:
        lists = [group["params"] for group in groups]
        decision.replays = slot.of(lists[0] if len(lists) == 1 else [p for x in lists for p in x])
    decision.scaling, opt._skipped = gradients.scaler_state(opt, decision.replays)
    decision.skipped = opt._skipped is True
    if cache is not None and cache.launched:
        checks.check_capture(opt, cache.all_rows[0].device, True)
    elementwise = decision.options["granularity"] == "element"
    if (
        cache is None
        or decision.skipped
        or not cache.take_native_gradients(opt, groups, decision.replays, elementwise=elementwise)
    ):
        cache = _take_one_by_one(opt, decision, elementwise)
    if decision.skipped or cache is None:
        return []
    for rows in cache.all_rows:
        rows.use_options(decision.options)
    if not opt._settings.capturable or not cache.all_rows:
        idle = opt._warned.idle_steps or not cache.all_rows or not cache.all_rows[0].present
        if idle or decision.index >= checks.LONG:
            checks.warn_if_nothing_happens(opt, decision.index, cache.all_rows)
    return cache.all_rows


def _take_one_by_one(opt, decision: Decision, elementwise: bool) -> RowCache | None:
    """Checks the gradients and all that the step uses, then takes them unless it is skipped."""
    cache, groups, replays = opt._cache, opt.param_groups, decision.replays
    params = [p for group in groups for p in group["params"]]
    grads = [p.grad for p in params]
    if cache is not None and not cache.valid(opt, groups, params, grads, replays):
        cache = None
    if cache is None or cache.unchecked or opt._partial:
        grads, replays = with_sums(opt, params, grads, replays)
    if cache is None or cache.unchecked:
        checks.check_step(opt, params, grads, replays)
    if params:
        # Before state is made, which would become part of the graph.
        checks.check_capture(opt, params[0].device, cache is not None)
    if decision.skipped:
        return None
    if cache is None:
        cache = _remake(opt, params, grads, replays)
    try:
        cache.take_gradients(grads, replays, elementwise=elementwise)
    except (RuntimeError, KeyError):
        # A gradient that differs from those of the last steps: either partial sums, which can be
        # summed, or the checks below raise an error that names it.
        summed_before = opt._partial
        grads, replays = with_sums(opt, params, grads, replays)
        checks.check_step(opt, params, grads, replays)
        if summed_before or not opt._partial:
            raise
        cache.take_gradients(grads, replays, elementwise=elementwise)
    return cache


def with_sums(opt, params, grads, replays) -> tuple[list, list]:
    """Sums partial gradients over their ranks; notes whether there were any."""
    gradients_and_replays = [*grads, *replays]
    twice = [*params, *params][: len(gradients_and_replays)]
    sums = sharding.sum_partial_gradients(twice, gradients_and_replays)
    opt._partial = not all(map(operator.is_, sums, gradients_and_replays))
    return sums[: len(grads)], sums[len(grads) :]


def _remake(opt, params: list[Tensor], grads, replays) -> RowCache:
    """Makes the state that is missing, and the rows anew."""
    opt._ownership.check()
    places = checks.with_gradient(grads, replays)
    checks.warn_if_idle(opt, params, places)
    checks.warn_if_narrow(opt, params, places)
    checks.warn_if_slow(opt, params, places)
    group_of = [group for group in opt.param_groups for _ in group["params"]]
    for place in places:
        p = params[place]
        opt._rule.init_state(opt, p, group_of[place], first=True)
        if not opt._settings.has_master(p):  # model.float() was called since the master was made
            opt.state.get(p, {}).pop("master", None)
    opt._reset_caches()
    opt._cache = RowCache(opt, opt.param_groups, params, replays)
    return opt._cache
