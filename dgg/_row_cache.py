# SPDX-License-Identifier: BSD-3-Clause
"""What a step keeps from the one before: the rows of all parameters and their origin."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgg import _dispatch, anchor, sharding

if TYPE_CHECKING:
    from dgg._guided import Guided

# Every so many steps the state is looked at even if nobody has read `optimizer.state` in between:
# somebody may have kept an entry of it since long ago.
_LOOK_EVERY = 64


class RowCache:
    """The rows of all parameters, one `Rows` per device, and what they were made from."""

    def __init__(self, optimizer: Guided, params: list[Tensor]) -> None:
        self.params = params
        states = [optimizer.state.get(p) for p in params]
        self._keys, self._entries = list(optimizer.state), list(optimizer.state.values())
        self._dicts = [entry for entry in self._entries if isinstance(entry, dict)]
        self._snapshots = [dict(entry) for entry in self._dicts]
        items = [(entry, key, v) for entry in self._dicts for key, v in entry.items()]
        tensors = [v for _, _, v in items if isinstance(v, Tensor)]
        self._single = [
            (entry, key, v) for entry, key, v in items if isinstance(v, Tensor) and v.numel() == 1
        ]
        self._unlooked = 0
        optimizer._state_read = False
        self._groups = [
            number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]
        ]
        # Turning amsgrad or momentum on between two steps asks for state that is not there yet.
        self._needed = [optimizer._needed(group) for group in optimizer.param_groups]
        self.all_rows: list[_dispatch.Rows] = []
        self._places: list[list[int] | None] = []
        # Frozen parameters of a whole model are not carried through every step.
        usable = [
            i
            for i, p in enumerate(params)
            if (states[i] or p.requires_grad or p.grad is not None)
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
            backend = _dispatch.choose_for(optimizer._backend, params[i])
            parts.setdefault((params[i].device, backend), []).append(i)
        for (_, backend), places in parts.items():
            state = [states[i] or {} for i in places]
            columns = {
                column: [s.get(name) for s in state] for name, column in optimizer._columns.items()
            }
            self.all_rows.append(
                _dispatch.Rows(
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
        self._watch = _dispatch.Watch(
            [
                *(p for rows in self.all_rows for p in rows.params),
                *(p for i, p in enumerate(params) if i not in used),
                *tensors,
            ]
        )
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        self._lists = [list(group["params"]) for group in optimizer.param_groups]
        self._sizes = [len(members) for members in self._lists]
        self._singles = [
            (number, place, p)
            for number, members in enumerate(self._lists)
            for place, p in enumerate(members)
            if p.numel() == 1
        ]
        self._gathers = len(self.all_rows) == 1 and self.all_rows[0].gather_by(self._watch)

    def gather(self, optimizer: Guided) -> bool:
        """Takes up the gradients of this step natively; returns False if that is not enough.

        It is enough if nothing was exchanged since (see `valid`) and all gradients are plain.
        """
        groups = optimizer.param_groups
        return (
            self._gathers
            and self._same_params(groups)
            and self._needed == [optimizer._needed(group) for group in groups]
            and not any([self.params[i].grad is not None for i in self._unready])
            and self._unchanged_state(optimizer)
            and self.all_rows[0].gather()
        )

    def _same_params(self, groups) -> bool:
        # Comparing lists takes identical members as equal without a look at them, as in
        # `_same_entries`.
        try:
            if [group["params"] for group in groups] != self._lists:
                return False
        except (RuntimeError, TypeError):
            return False
        return all([groups[number]["params"][place] is p for number, place, p in self._singles])

    def valid(self, optimizer: Guided, params: list[Tensor], grads, replays) -> bool:
        """Returns whether nothing was exchanged since: parameters, memory, state, groups."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if [len(group["params"]) for group in optimizer.param_groups] != self._sizes:
            return False
        if self._needed != [optimizer._needed(group) for group in optimizer.param_groups]:
            return False
        if any(grads[i] is not None or (replays and replays[i] is not None) for i in self._unready):
            return False
        # The state's memory too, whoever read it: a table of freed addresses corrupts the heap.
        if not all([p._local_tensor is shard for p, shard in self._shards]):
            return False
        return self._watch.unmoved() and self._unchanged_state(optimizer)

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

    def _unchanged_state(self, optimizer: Guided) -> bool:
        self._unlooked += 1
        if optimizer._state_read or self._unlooked == _LOOK_EVERY:
            if not self._same_state(optimizer):
                return False
            if optimizer._state_read:
                # Whoever read the state may have written into an anchor.
                for rows in self.all_rows:
                    rows.forget()
            optimizer._state_read, self._unlooked = False, 0
        return True

    def _same_state(self, optimizer: Guided) -> bool:
        # Not looked up by parameter: hashing a tensor costs more than all of this.
        keys, entries = list(optimizer.state), list(optimizer.state.values())
        if len(keys) != len(self._keys) or not all(map(operator.is_, keys, self._keys)):
            return False
        return all(map(operator.is_, entries, self._entries)) and self._same_entries()

    def _same_entries(self) -> bool:
        # Comparing dicts takes identical values as equal without a look at them. Others meet
        # Tensor.__eq__, which has no truth value unless it is of one element: those are looked at
        # one by one.
        try:
            if self._dicts != self._snapshots:
                return False
        except (RuntimeError, TypeError):
            return False
        return all([entry[key] is value for entry, key, value in self._single])

    @property
    def launched(self) -> bool:
        """Whether any device's step is launched and not waited for."""
        return any([rows.kernels is not None for rows in self.all_rows])

    @property
    def unchecked(self) -> bool:
        """Whether a backend takes gradients without looking at their kind."""
        return any([rows.backend == "reference" for rows in self.all_rows])

    def refresh(self, grads, replays, *, elementwise: bool) -> None:
        """Hands every device's rows their gradients."""
        for rows, places in zip(self.all_rows, self._places, strict=True):
            if places is None:
                rows.refresh(grads, replays, elementwise=elementwise)
            else:
                mine = [replays[i] for i in places] if replays else []
                rows.refresh([grads[i] for i in places], mine, elementwise=elementwise)
