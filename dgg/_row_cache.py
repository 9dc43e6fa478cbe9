# SPDX-License-Identifier: BSD-3-Clause
"""What a step keeps from the one before: the rows of all parameters and their origin."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import anchor, backends, sharding

if TYPE_CHECKING:
    from dgg._guided import Guided


class Lists:
    """Tells whether parameter groups still hold the parameters, by identity, of the beginning."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._lists = [list(group["params"]) for group in groups]
        self._singles = [
            (number, place, p)
            for number, members in enumerate(self._lists)
            for place, p in enumerate(members)
            if not is_lazy(p) and p.numel() == 1
        ]

    def same(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether they do."""
        # Comparing lists takes identical members as equal without a look at them. Others meet
        # Tensor.__eq__, which has no truth value unless it is of one element: those are looked at
        # one by one.
        try:
            if [group["params"] for group in groups] != self._lists:
                return False
        except (RuntimeError, TypeError):
            return False
        return all([groups[number]["params"][place] is p for number, place, p in self._singles])


class RowCache:
    """The rows of all parameters, one `Rows` per device, and what they were made from."""

    def __init__(
        self, optimizer: Guided, params: list[Tensor], replays: list[Tensor | None]
    ) -> None:
        self.params = params
        states = [optimizer.state.get(p) for p in params]
        self._keys, self._entries = list(optimizer.state), list(optimizer.state.values())
        self._dicts = [entry for entry in self._entries if isinstance(entry, dict)]
        tensors = [
            v
            for entry in self._dicts
            for v in entry.values()
            if isinstance(v, Tensor) and v.layout == torch.strided and v.device.type != "meta"
        ]
        optimizer._state_read = False
        self._groups = [
            number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]
        ]
        # Turning amsgrad or momentum on between two steps asks for state that is not there yet.
        self._needed = [optimizer._needed(group) for group in optimizer.param_groups]
        self.all_rows: list[backends.Rows] = []
        self._places: list[list[int] | None] = []
        # Frozen parameters of a whole model are not carried through every step.
        usable = [
            i
            for i, p in enumerate(params)
            if not is_lazy(p)
            and (
                states[i]
                or p.requires_grad
                or p.grad is not None
                or (replays and replays[i] is not None)
            )
            and p.dtype.to_real() in anchor.FLOAT_DTYPES
        ]
        used = set(usable)
        needed = [
            (*self._needed[number], *(("master",) if optimizer._has_master(p) else ()))
            for number, p in zip(self._groups, params, strict=True)
        ]
        self._unready = [
            i
            for i, state in enumerate(states)
            if i not in used or any((state or {}).get(name) is None for name in needed[i])
        ]
        share = optimizer._share
        numbers = range(len(params)) if share is None else share.numbers(params)
        parts: dict[tuple[torch.device, str], list[int]] = {}
        for i in usable:
            backend = backends.choose_for(optimizer._backend, params[i])
            parts.setdefault((params[i].device, backend), []).append(i)
        for (_, backend), places in parts.items():
            state = [states[i] or {} for i in places]
            columns = {
                column: [s.get(name) for s in state] for name, column in optimizer._columns.items()
            }
            self.all_rows.append(
                backends.make_rows(
                    backend,
                    [params[i] for i in places],
                    [self._groups[i] for i in places],
                    [numbers[i] for i in places],
                    masters=[
                        s.get("master") if optimizer._has_master(params[i]) else None
                        for i, s in zip(places, state, strict=True)
                    ],
                    stochastic=optimizer._stochastic,
                    capturable=optimizer._capturable,
                    process_group=optimizer.process_group,
                    reduction=None if share is None else share.reduction,
                    **columns,
                )
            )
            self._places.append(None if len(places) == len(params) else places)
        # share_memory_() and `.data =` take the memory from under a tensor. The parameters with
        # rows come first: their gradients can be taken up on the way.
        place_of = {id(x): place for place, x in enumerate(tensors)}
        anchors = [(states[i] or {}).get("anchor") for places in parts.values() for i in places]
        self._watch = backends.MemoryWatch(
            [
                *(p for rows in self.all_rows for p in rows.params),
                *(p for i, p in enumerate(params) if i not in used and not is_lazy(p)),
            ],
            tensors,
            [place_of.get(id(x), -1) for x in anchors],
        )
        self._state = optimizer.__dict__["state"]
        self._watch.keep_dicts([self._state, *self._dicts])
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        self._lists = Lists(optimizer.param_groups)
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._gathers = len(self.all_rows) == 1 and self.all_rows[0].watch_gradients(self._watch)

    def gather(self, optimizer: Guided, replays: list[Tensor | None], *, elementwise: bool) -> bool:
        """Takes up the gradients of this step natively; returns False if that is not enough.

        It is enough if nothing was exchanged since (see `valid`) and all gradients are plain, or
        but a few, which are looked at one by one.
        """
        groups = optimizer.param_groups
        if not (
            self._gathers
            and self._lists.same(groups)
            and self._same_needs(optimizer)
            and not any([self.params[i].grad is not None for i in self._unready])
            and self._unchanged_state(optimizer)
        ):
            return False
        if replays:
            if any([replays[i] is not None for i in self._unready]):
                return False
            places = self._places[0]
            replays = replays if places is None else [replays[i] for i in places]
        return self.all_rows[0].take_native_gradients(replays, elementwise=elementwise)

    def abandon(self) -> None:
        """Lets go of the gradients of a step that could not be finished."""
        for rows in self.all_rows:
            rows.abandon()

    def valid(self, optimizer: Guided, params: list[Tensor], grads, replays) -> bool:
        """Returns whether nothing was exchanged since: parameters, memory, state, groups."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if [len(group["params"]) for group in optimizer.param_groups] != self._sizes:
            return False
        if not self._same_needs(optimizer):
            return False
        if any(grads[i] is not None or (replays and replays[i] is not None) for i in self._unready):
            return False
        # The state's memory too, whoever read it: a table of freed addresses corrupts the heap.
        if not all([p._local_tensor is shard for p, shard in self._shards]):
            return False
        if not (self._watch.unmoved() and self._unchanged_state(optimizer)):
            return False
        self._forget_rewritten()
        return True

    def taken_out(self, params: list[Tensor]) -> int | None:
        """Returns how many anchored parameters are not among ``params`` any more.

        None if others have joined them in the meantime.
        """
        before, now = set(map(id, self.params)), set(map(id, params))
        if now - before:
            return None
        return sum(
            id(p) not in now
            for p, entry in zip(self._keys, self._entries, strict=True)
            if isinstance(entry, dict) and "anchor" in entry
        )

    def _same_needs(self, optimizer: Guided) -> bool:
        derived = optimizer._engine.options.derived
        if "needed" not in derived:
            derived["needed"] = [optimizer._needed(group) for group in optimizer.param_groups]
        return self._needed == derived["needed"]

    def _unchanged_state(self, optimizer: Guided) -> bool:
        if optimizer.__dict__["state"] is not self._state or not self._watch.same_dicts():
            return False
        if optimizer._state_read:
            # Whoever read the state may have written into an anchor, and `.data` hides it.
            for rows in self.all_rows:
                rows.forget()
            optimizer._state_read = False
        return True

    def _forget_rewritten(self) -> None:
        """Drops the distances from anchors that were written, through whatever reference."""
        changed = self._watch.rewritten()
        first = 0
        for rows in self.all_rows:
            rows.forget_rows(
                [row - first for row in changed if 0 <= row - first < len(rows.params)]
            )
            first += len(rows.params)

    @property
    def launched(self) -> bool:
        """Whether any device's step is launched and not waited for."""
        return any([rows.launched for rows in self.all_rows])

    @property
    def unchecked(self) -> bool:
        """Whether a backend takes gradients without looking at their kind."""
        return any([rows.backend == "reference" for rows in self.all_rows])

    def refresh(self, grads, replays, *, elementwise: bool) -> None:
        """Hands every device's rows their gradients."""
        for rows, places in zip(self.all_rows, self._places, strict=True):
            if places is None:
                rows.take_gradients(grads, replays, elementwise=elementwise)
            else:
                mine = [replays[i] for i in places] if replays else []
                rows.take_gradients([grads[i] for i in places], mine, elementwise=elementwise)
