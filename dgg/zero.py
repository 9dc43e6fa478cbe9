# SPDX-License-Identifier: BSD-3-Clause
"""Steps that DeepSpeed's ZeRO optimizers drive, a flat partition at a time.

ZeRO puts flat float32 partitions of this rank in place of the parameters, and its own step calls
the optimizer's several times: once per parameter group (stages 1 and 2), once per sub-group with
all other groups emptied (stage 3), or once (its optimizer for bfloat16 with float32 gradients).
All calls of one engine step make one step here: one draw, one ‖g‖, one ‖θ - θ*‖ over all ranks.

A partition is cut back into the fragments of parameters that it consists of, whose places in the
unsharded parameters are known. So draws per tensor and per element are those of the unsharded run,
norms per tensor can be had, and the padding at a partition's end is nobody's: it is never touched
and counts nowhere.

‖g‖ is the norm that DeepSpeed has measured and clipped by, on every rank the same: it costs neither
a pass nor a collective. Only it is known at the first call, when the other groups' gradients do
not yet lie where they are stepped. ‖θ - θ*‖ is measured then, over all partitions and in one
collective, on the steps that inject. It is not carried over from the pass before, since DeepSpeed
writes weights past autograd's version counters.

DeepSpeed is never imported: an optimizer that finds other parameters than those it was given looks
for the DeepSpeed object that has it as its ``optimizer``.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgg import _arguments, _callers, _ranges, anchor, backends, guidance, reference, sharding


class Member(NamedTuple):
    """A parameter of which a partition may have a fragment.

    Attributes:
        index: Its number in the unsharded optimizer, counted over all groups.
        name: Its name in the model, or None.
        param: The model's parameter.
        shape: Its unsharded shape.
    """

    index: int
    name: str | None
    param: Tensor
    shape: torch.Size


class Fragment(NamedTuple):
    """Where a run of a parameter's elements lies in this rank's partition.

    Attributes:
        member: Number of the parameter among the partition's members.
        start: First element in the partition.
        count: Number of elements, not 0.
        base: First element in the parameter, row-major.
    """

    member: int
    start: int
    count: int
    base: int


class Partition(NamedTuple):
    """This rank's part of a group or sub-group of parameters.

    Attributes:
        tensor: What the optimizer steps, flat.
        group: Number of its parameter group.
        members: The parameters of the group or sub-group, the same on every rank.
        fragments: What this rank has of them.
    """

    tensor: Tensor
    group: int
    members: list[Member]
    fragments: list[Fragment]


def _fragment_rows(optimizer, partition: Partition) -> backends.Rows:
    """Returns the rows of one partition: one per fragment, all views into the partition."""
    state = optimizer.state.get(partition.tensor) or {}
    members = [partition.members[f.member] for f in partition.fragments]
    columns: dict[str, list] = {"anchors": [None] * len(members)}
    for name, column in optimizer._columns.items():
        value = state.get(name)
        if column == "steps":
            # A count is written once per row: the others get one of their own.
            columns[column] = [value] + [
                None if value is None else value.clone() for _ in members[1:]
            ]
        else:
            columns[column] = [_cut(value, f) for f in partition.fragments]
    return backends.make_rows(
        backends.choose(optimizer._backend, partition.tensor.device),
        [_cut(partition.tensor, f) for f in partition.fragments],
        [partition.group] * len(members),
        [m.index for m in members],
        places=[sharding.Place(f.base, f.count, f.count) for f in partition.fragments],
        # What is fresh, and whose version counts, is the partition.
        holders=[partition.tensor] * len(members),
        **columns,
    )


class _Census:
    """All members of all partitions, as rows that only say who they are: the same on all ranks."""

    anchored = True

    def __init__(self, partitions: Sequence[Partition]) -> None:
        self.groups = [p.group for p in partitions for _ in p.members]
        self.indices = [m.index for p in partitions for m in p.members]

    def constant_flags(self, value: int) -> Tensor:
        return torch.full((len(self.groups),), value, dtype=torch.uint8, device="cpu")

    def flags(self, values: Sequence[int], name: str) -> Tensor:
        return torch.tensor(values, dtype=torch.uint8, device="cpu")


class _Now(NamedTuple):
    """What was decided at the first call of an engine step and holds for the others."""

    wide: Mapping[str, Any]
    hyper: list[dict[str, Any]]
    draw: int
    flags: Tensor | None
    grad_norm: Tensor | None
    coefficients: Tensor | None
    tensors: list[Tensor]


class Zero:
    """Drives an optimizer for a ZeRO optimizer of DeepSpeed.

    Args:
        optimizer: The dgg optimizer.
        holder: DeepSpeed's optimizer around it.

    Raises:
        RuntimeError: DeepSpeed is set up in a way that is not supported; the message says what
            to use instead.
        ValueError: An option of the optimizer does not go with partitions.
    """

    def __init__(self, optimizer, holder) -> None:
        _refuse(optimizer, holder)
        self._holder = weakref.ref(holder)
        self._layout = _LAYOUTS[type(holder).__name__]
        self._partitions: list[Partition] = []
        self._rows: dict[int, tuple[backends.MemoryWatch, list, backends.Rows]] = {}
        self._now: _Now | None = None
        self._take_up(optimizer, holder)
        self._drop_orphans(optimizer)
        dtype = _dtype(holder)
        if dtype in _arguments.NARROW:
            _arguments.warn_narrow(
                "DeepSpeed's master weights are",
                dtype,
                "leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out of its "
                "configuration, then ZeRO keeps them in float32",
            )

    @property
    def holder(self):
        """DeepSpeed's optimizer, or None if it is gone."""
        return self._holder()

    def tensors(self) -> list[Tensor]:
        """Returns this rank's partitions."""
        return [p.tensor for p in self._partitions]

    # -- partitions -----------------------------------------------------------------------------

    def _take_up(self, optimizer, holder) -> None:
        """Looks at the partitions; cuts them anew if they are others than before."""
        tensors = [tensor for tensor, _ in self._layout.partitions(holder)]
        if len(tensors) == len(self._partitions) and all(
            p.tensor is t for p, t in zip(self._partitions, tensors, strict=True)
        ):
            return
        numbers = {identity: j for j, identity in enumerate(optimizer._given)}
        strange = sum(
            id(param) not in numbers
            for number in range(len(tensors))
            for param, *_ in self._layout.pieces(holder, number)
        )
        if strange:
            raise RuntimeError(
                f"DeepSpeed's engine trains {strange} parameters that this optimizer was not built "
                "with, so their draws are not known: the parameters in its groups were exchanged "
                "before deepspeed.initialize, or it has been in another engine. Build a new "
                "optimizer over model.parameters() for every engine"
            )
        names = getattr(holder, "param_names", None) or {}
        self._partitions = []
        for number, (tensor, group) in enumerate(self._layout.partitions(holder)):
            members, fragments = [], []
            for param, shape, start, base, count in self._layout.pieces(holder, number):
                if count > 0:
                    fragments.append(Fragment(len(members), start, count, base))
                members.append(Member(numbers[id(param)], names.get(param), param, shape))
            self._partitions.append(Partition(tensor, group, members, fragments))
        self._census = _Census(self._partitions)
        self._rows = {}

    def _drop_orphans(self, optimizer) -> None:
        """Drops the state of parameters that partitions took the place of: nothing can save it."""
        mine = {id(p.tensor) for p in self._partitions}
        orphans = [p for p in optimizer.state if id(p) not in mine]
        for p in orphans:
            del optimizer.state[p]
        if orphans:
            warnings.warn(
                f"the optimizer had state of {len(orphans)} parameters before DeepSpeed's ZeRO put "
                "partitions in their place, and ZeRO takes none of it along: it is dropped. Call "
                "set_anchor() after deepspeed.initialize, and resume moments with load_checkpoint",
                stacklevel=_callers.stacklevel(),
            )

    def _rows_of(self, optimizer, number: int) -> backends.Rows | None:
        """Returns the rows of a partition, or None if all of it is padding."""
        partition = self._partitions[number]
        if not partition.fragments:
            return None
        state = optimizer.state.get(partition.tensor) or {}
        values = [state.get(name) for name in optimizer._columns]
        if number in self._rows:
            watch, known, rows = self._rows[number]
            if watch.unmoved() and all(a is b for a, b in zip(known, values, strict=True)):
                return rows
        rows = _fragment_rows(optimizer, partition)
        watch = backends.MemoryWatch([partition.tensor], [v for v in values if v is not None])
        self._rows[number] = watch, values, rows
        return rows

    # -- the step -------------------------------------------------------------------------------

    def step(self, optimizer) -> None:
        """Does one of DeepSpeed's calls of ``step()``; the first of an engine step decides for all.

        Args:
            optimizer: The dgg optimizer; its groups hold the partitions to be stepped now.

        Raises:
            RuntimeError: The anchor that the groups promise is missing, or DeepSpeed does
                something that is not known here.
        """
        try:
            self._step(optimizer, self.holder)
        except BaseException:
            _put_back(optimizer, self._layout)
            raise

    def _step(self, optimizer, holder) -> None:
        self._take_up(optimizer, holder)
        number_of = {id(p.tensor): number for number, p in enumerate(self._partitions)}
        called = [
            number_of.get(id(p))
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if None in called or not called:
            raise RuntimeError(
                f"{type(holder).__name__} asks to step a tensor that is none of its partitions: "
                "either the optimizer was handed to a second engine (build a new one for every "
                "deepspeed.initialize), or this release of DeepSpeed is not known to dgg (use the "
                "one that docs/deepspeed.md names)"
            )
        if 0 in called:
            self._now = self._begin(optimizer, holder)
        if self._now is None:
            raise RuntimeError(
                f"{type(holder).__name__} did not begin its step with its first partition; this "
                "release of DeepSpeed is not known to dgg: use the one that docs/deepspeed.md names"
            )
        for number in called:
            self._update(optimizer, holder, number)
        if len(self._partitions) - 1 in called:
            self._end(optimizer)

    def _begin(self, optimizer, holder) -> _Now:
        engine, groups = optimizer._engine, optimizer._whole
        engine.replay.check_closed()
        self._part_steps(optimizer)
        wide = engine.options.read(groups)
        hyper = [optimizer._hyper(group) for group in groups]
        draw = wide["draw_index"]
        flags = None
        if self._anchored(optimizer):
            flags = engine.flags(wide, groups, self._census, draw)
        scaled = flags is not None and wide["scaling"]
        grad_norm = coefficients = None
        if scaled or wide["max_grad_norm"] is not None:
            device = self._partitions[0].tensor.device
            grad_norm = self._grad_norm(holder).to(device, torch.float64)
            if wide["norm_scope"] == "global" or not scaled:
                squares = torch.zeros(3, 1, dtype=torch.float64, device=device)
                squares[:2] = grad_norm.square()
                if scaled:
                    squares[2] = self._distance(optimizer, holder)
                coefficients = reference.coefficients(
                    squares, max_grad_norm=wide["max_grad_norm"], scaling=scaled, per_tensor=False
                )
        for group in groups:
            group["draw_index"] = draw + 1
        return _Now(wide, hyper, draw, flags, grad_norm, coefficients, [])

    def _part_steps(self, optimizer) -> None:
        # DeepSpeed's universal loader gives all sub-groups one and the same tensor.
        seen: set[int] = set()
        for partition in self._partitions:
            entry = optimizer.state.get(partition.tensor) or {}
            step = entry.get("step")
            if isinstance(step, Tensor):
                if id(step) in seen:
                    step = entry["step"] = step.clone()
                seen.add(id(step))

    def _update(self, optimizer, holder, number: int) -> None:
        now, partition = self._now, self._partitions[number]
        groups = optimizer._whole
        optimizer._init_state(partition.tensor, groups[partition.group])
        rows = self._rows_of(optimizer, number)
        elementwise = now.wide["granularity"] == "element"
        if rows is not None:
            grads = [_cut(partition.tensor.grad, f) for f in partition.fragments]
            rows.take_gradients(grads, [], elementwise=elementwise)
        found = self._coefficients(holder, number, rows)
        if rows is None:
            # Nothing of it is anybody's, but its count goes along: checkpoints compare them.
            optimizer._skip_update(partition.tensor)
            return
        flags = None
        if now.flags is not None:
            flags = optimizer._engine.flags(now.wide, groups, rows, now.draw)
        with _ranges.record("dgg.update"):
            optimizer._update_(
                rows,
                found,
                optimizer._final_flags(rows, flags),
                now.hyper,
                guidance.drawn(now.wide, now.draw, flags is not None),
                backends.Scaling(),
                look_ahead=False,
                replay_weight=float(now.wide["replay_weight"]),
            )

    def _coefficients(self, holder, number: int, rows: backends.Rows | None) -> Tensor | None:
        """Returns c and s of the rows of one partition; with norms per tensor a collective."""
        now, partition = self._now, self._partitions[number]
        if now.coefficients is not None:
            count = 0 if rows is None else len(rows.params)
            head, scale = now.coefficients.split([reference.SCALES, 1])
            return torch.cat([head, scale.expand(count)])
        if now.grad_norm is None:
            return None if rows is None else rows.constant_coefficients()
        device = partition.tensor.device
        squares = torch.zeros(3, len(partition.members), dtype=torch.float64, device=device)
        if rows is not None:
            rows.forget()
            mine = rows.norms(
                replay_weight=1.0,
                scaling=backends.Scaling(),
                which=reference.NORM_GRAD | reference.NORM_DISTANCE,
            )
            squares[:, [f.member for f in partition.fragments]] = mine
        squares = self._sum(holder, squares)
        squares[0] = 0.0
        squares[0, 0] = now.grad_norm.square()
        found = reference.coefficients(
            squares, max_grad_norm=now.wide["max_grad_norm"], scaling=True, per_tensor=True
        )
        now.tensors.append(found)
        places = [*range(reference.SCALES)]
        places += [reference.SCALES + f.member for f in partition.fragments]
        return found[places]

    def _end(self, optimizer) -> None:
        now, device = self._now, self._partitions[0].tensor.device
        found = now.coefficients
        if now.tensors:
            # ‖g‖ and ‖d‖ over all tensors, from those of every partition.
            heads = torch.stack([x[: reference.SCALES] for x in now.tensors])
            total = heads.square().sum(dim=0).sqrt()
            head = torch.stack([heads[0, 0], total[1], total[2], heads[0, 3]])
            found = torch.cat([head, *(x[reference.SCALES :] for x in now.tensors)])
        flags = None if now.flags is None else now.flags.to(device)
        if found is None:
            found = torch.ones(reference.SCALES + 1, dtype=torch.float64, device=device)
        optimizer._engine.remember(
            now.wide, self._partitions[0].tensor, flags, found, now.hyper[0]["strength"],
            backend=backends.choose(optimizer._backend, device),
        )  # fmt: skip
        self._now = None

    def _distance(self, optimizer, holder) -> Tensor:
        """Returns ‖θ - θ*‖² over all partitions of all ranks, float64 [1]: one collective."""
        with _ranges.record("dgg.norm"):
            total = torch.zeros(1, dtype=torch.float64, device=self._partitions[0].tensor.device)
            for number in range(len(self._partitions)):
                rows = self._rows_of(optimizer, number)
                if rows is None:
                    continue
                # A row counts if it has a gradient; every one will have, but not yet.
                rows.take_gradients(list(rows.params), [], elementwise=False)
                rows.forget()
                squares = rows.norms(
                    replay_weight=1.0,
                    scaling=backends.Scaling(),
                    which=reference.NORM_DISTANCE,
                )
                total += squares[2].sum().to(total.device)
                rows.release()
        return self._sum(holder, total)

    def _sum(self, holder, values: Tensor) -> Tensor:
        import torch.distributed as dist

        group = holder.dp_process_group
        if dist.get_world_size(group) == 1:
            return values
        # With offloaded partitions the group's backend may want them where the model is.
        there = values.to(self._partitions[0].members[0].param.device)
        with _ranges.record("dgg.allreduce"):
            dist.all_reduce(there, group=group)
        return there.to(values.device)

    @staticmethod
    def _grad_norm(holder) -> Tensor:
        """Returns the norm of the gradient that DeepSpeed hands over, clipped if it clips."""
        norm = holder._global_grad_norm
        if norm is None:
            raise RuntimeError(
                "zero_optimization.compute_grad_norm=false leaves out the gradient norm that a "
                "guided or clipped step needs; set it to true"
            )
        if getattr(holder, "dynamic_loss_scale", False):
            # Stages 1 and 2 unscale by the scale of after the step's update, which may have grown.
            norm = _local_of_step(holder, "scaled_global_grad_norm") / holder.loss_scale
        norm = torch.as_tensor(norm).double()
        # Older releases say -1 where gradients are inf or NaN; the square of that would look fine.
        norm = torch.where(norm < 0, torch.nan, norm)
        if holder.clip_grad > 0.0:
            norm = norm / torch.clamp((norm + 1e-6) / holder.clip_grad, min=1.0)
        return norm

    # -- anchors --------------------------------------------------------------------------------

    def _anchored(self, optimizer) -> bool:
        present = sum("anchor" in optimizer.state.get(p.tensor, ()) for p in self._partitions)
        promised = any(group["anchored"] for group in optimizer._whole)
        if present == len(self._partitions) or not (present or promised):
            return present > 0
        raise RuntimeError(
            f"the optimizer was anchored but only {present} of {len(self._partitions)} partitions "
            "have an anchor: the resume lost them (a universal checkpoint of DeepSpeed carries "
            "none). Load a checkpoint that has them, set them again with set_anchor(tensors) of "
            "the previous task's weights, or give up guidance with clear_anchor()"
        )

    def marked(self, optimizer) -> list[dict[str, Any]]:
        """Returns the groups, of which none is anchored if a resume brought no anchor at all."""
        self._take_up(optimizer, self.holder)
        if any("anchor" in optimizer.state.get(p.tensor, ()) for p in self._partitions):
            return optimizer._whole
        return [{**group, "anchored": 0} for group in optimizer._whole]

    def place_anchor(
        self,
        optimizer,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None,
        model: torch.nn.Module | None,
        task: int | None,
    ) -> None:
        """Takes the anchor from the float32 partitions of all groups, or from whole tensors.

        Args:
            optimizer: The dgg optimizer.
            tensors: Whole tensors by name, the path of some, or None for the present weights.
            model: Maps names to parameters; None takes DeepSpeed's names.
            task: Number of the task; None counts one up.

        Raises:
            FileNotFoundError: There is nothing at the path.
            KeyError: A parameter has no tensor.
            RuntimeError: Another rank failed.
            TypeError: A wrong type.
            ValueError: A shape or a value does not fit. After any error all is as it was.
        """
        self._take_up(optimizer, self.holder)
        groups = optimizer._whole
        others = [self.holder.dp_process_group]
        with sharding.on_all_or_none(others, _arguments.settings_of(groups)):
            plan = self._plan(optimizer, tensors, model)
        for partition, sources, target in plan:
            # The padding, which ZeRO-3 leaves uninitialised, must be finite in a checkpoint.
            target.zero_()
            for f, source in zip(partition.fragments, sources, strict=True):
                _cut(target, f).copy_(source)
            optimizer._init_state(partition.tensor, groups[partition.group], before_first_step=True)
            optimizer.state[partition.tensor]["anchor"] = target
        for number, group in enumerate(groups):
            group["anchored"] = sum(p.group == number for p in self._partitions)
            group["task_index"] = group["task_index"] + 1 if task is None else task

    def _plan(
        self,
        optimizer,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None,
        model: torch.nn.Module | None,
    ) -> list[tuple[Partition, list[Tensor], Tensor]]:
        """Returns of every partition what its fragments' anchors are and the memory for them."""
        if tensors is None and model is not None:
            raise ValueError("model= maps the names of tensors to parameters; give both or neither")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model= must be a torch.nn.Module, not {type(model).__name__}")
        if isinstance(tensors, (str, os.PathLike)):
            tensors = anchor.open_path(tensors)
        elif tensors is not None and not isinstance(tensors, Mapping):
            raise TypeError(
                "set_anchor() takes a mapping from names to tensors or the path of a file or "
                f"directory of them, not {type(tensors).__name__}"
            )
        names = {} if model is None else anchor.names_of_parameters(model)
        plan = []
        for number, partition in enumerate(self._partitions):
            label = f"partition {number}"
            wanted = anchor.storage_dtype(partition.tensor, optimizer._anchor_dtype, label)
            if tensors is None:
                sources = [_cut(partition.tensor, f) for f in partition.fragments]
                for f, source in zip(partition.fragments, sources, strict=True):
                    name = partition.members[f.member].name or f"a parameter of {label}"
                    anchor.check_source(source, source, name, wanted)
            else:
                sources = list(_named_sources(partition, tensors, names, model, wanted))
            old = optimizer.state.get(partition.tensor, {}).get("anchor")
            fits = old is not None and old.dtype == wanted and old.shape == partition.tensor.shape
            if not fits:
                old = anchor.allocate(partition.tensor, wanted, optimizer._anchor_device)
            plan.append((partition, sources, old))
        return plan

    def clear_anchor(self, optimizer) -> None:
        """Drops the anchors of all partitions."""
        self._take_up(optimizer, self.holder)
        for partition in self._partitions:
            if partition.tensor in optimizer.state:
                optimizer.state[partition.tensor].pop("anchor", None)
        for group in optimizer._whole:
            group["anchored"] = 0


def _cut(x: Tensor | None, fragment: Fragment) -> Tensor | None:
    # From .data, so that the fragments count their versions apart from each other.
    return None if x is None else x.data.narrow(0, fragment.start, fragment.count)


def _named_sources(
    partition: Partition,
    tensors: Mapping[str, Tensor],
    names: Mapping[Tensor, list[str]],
    model: torch.nn.Module | None,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yields of every fragment what named whole tensors have for it."""
    members = partition.members
    labels = [f"parameter {m.name!r}" for m in members]
    known = [names.get(m.param) or anchor.variants(m.name or "") for m in members]
    found = anchor.find_names(tensors, known, labels, model)
    fragments = {f.member: f for f in partition.fragments}
    for number, (member, name, label) in enumerate(zip(members, found, labels, strict=True)):
        # What other ranks have a fragment of is checked, too: all ranks raise or none.
        source = tensors[name]
        whole = torch.empty(member.shape, dtype=partition.tensor.dtype, device="meta")
        anchor.check_source(source, whole, label, dtype)
        if number in fragments:
            f = fragments[number]
            yield source.detach().reshape(-1)[f.base : f.base + f.count]


# -- what DeepSpeed's optimizers look like -------------------------------------------------------


class _Stage1And2:
    """ZeRO-1 and ZeRO-2: a partition per group, each parameter one run of the flat group."""

    @staticmethod
    def partitions(holder) -> list[tuple[Tensor, int]]:
        return [(p, group) for group, p in enumerate(holder.single_partition_of_fp32_groups)]

    @staticmethod
    def pieces(holder, number: int) -> Iterator[tuple[Tensor, torch.Size, int, int, int]]:
        """Yields (parameter, shape, start, base, count) of every parameter of a partition."""
        params = holder.round_robin_bit16_groups[number]
        size = holder.single_partition_of_fp32_groups[number].numel()
        offsets = holder.round_robin_bit16_offsets[number]
        first = size * _rank(holder.real_dp_process_group[number])
        for param, offset in zip(params, offsets, strict=True):
            low, high = max(offset, first), min(offset + param.numel(), first + size)
            yield param, param.shape, max(low - first, 0), max(low - offset, 0), high - low


class _BF16:
    """bfloat16 with float32 gradients (ZeRO-1): as stages 1 and 2, in the groups' own order."""

    @staticmethod
    def partitions(holder) -> list[tuple[Tensor, int]]:
        return [(p, group) for group, p in enumerate(holder.fp32_groups_flat_partition)]

    @staticmethod
    def pieces(holder, number: int) -> Iterator[tuple[Tensor, torch.Size, int, int, int]]:
        """Yields (parameter, shape, start, base, count) of every parameter of a partition."""
        size = holder.fp32_groups_flat_partition[number].numel()
        first, offset = size * _rank(holder.real_dp_process_group[number]), 0
        for param in holder.bf16_groups[number]:
            low, high = max(offset, first), min(offset + param.numel(), first + size)
            yield param, param.shape, max(low - first, 0), max(low - offset, 0), high - low
            offset += param.numel()


class _Stage3:
    """ZeRO-3: a partition per sub-group; of each parameter equal runs on all ranks, padded."""

    @staticmethod
    def partitions(holder) -> list[tuple[Tensor, int]]:
        tensors = holder.fp32_partitioned_groups_flat
        return [(p, holder.sub_group_to_group_id[number]) for number, p in enumerate(tensors)]

    @staticmethod
    def pieces(holder, number: int) -> Iterator[tuple[Tensor, torch.Size, int, int, int]]:
        """Yields (parameter, shape, start, base, count) of every parameter of a partition."""
        rank, start = _rank(holder.dp_process_group), 0
        for param in holder.fp16_groups[number]:
            size = param.partition_numel()
            base = min(rank * size, param.ds_numel)
            yield param, param.ds_shape, start, base, min(size, param.ds_numel - base)
            start += size


_LAYOUTS = {
    "DeepSpeedZeroOptimizer": _Stage1And2,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3,
    "BF16_Optimizer": _BF16,
}
# What an optimizer of DeepSpeed has that steps partitions.
_PARTITIONS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


def find(optimizer) -> Zero | None:
    """Returns what drives the optimizer, if it is a ZeRO optimizer of DeepSpeed.

    Args:
        optimizer: A dgg optimizer whose parameters are not those it was given.

    Raises:
        RuntimeError: Its parameters are flat partitions of an engine that is not known, or
            DeepSpeed is set up in a way that is not supported.
        ValueError: An option of the optimizer does not go with partitions.
    """
    holder = None
    if "deepspeed" in sys.modules:
        holder = next(filter(_partitions, _holders(optimizer)), None)
    if holder is not None:
        try:
            return Zero(optimizer, holder)
        except BaseException:
            _put_back(optimizer, _LAYOUTS.get(type(holder).__name__))
            raise
    _refuse_unknown(optimizer)
    return None


def _put_back(optimizer, layout: type | None) -> None:
    """Makes the groups what they are between steps, after an error in one.

    DeepSpeed would leave them as they were for its call of ``step()``, and whoever then saves what
    there is would save no more than that.
    """
    optimizer.param_groups = optimizer._whole
    if layout is _Stage3:
        for group in optimizer.param_groups:
            group["params"] = []


def _partitions(holder) -> bool:
    return any(hasattr(holder, name) for name in _PARTITIONS)


def _holders(optimizer) -> Iterator[Any]:
    """Yields the objects of DeepSpeed that have the optimizer as their ``optimizer``."""
    referrers = gc.get_referrers(optimizer)
    entries = [x for x in referrers if isinstance(x, dict)]
    owners = gc.get_referrers(*entries) if entries else []
    for owner in (*referrers, *owners):
        if not type(owner).__module__.startswith("deepspeed."):
            continue
        if getattr(owner, "optimizer", None) is optimizer:
            yield owner


def _refuse_unknown(optimizer) -> None:
    import torch.distributed as dist

    if optimizer.process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return
    given = set(optimizer._given)
    strange = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if type(p) is Tensor and p.dim() == 1 and id(p) not in given
    ]
    # DeepSpeed without ZeRO keeps whole float32 copies of 16-bit parameters.
    whole = "deepspeed" in sys.modules and any(True for _ in _holders(optimizer))
    if strange and not whole and dist.get_world_size() > 1:
        raise RuntimeError(
            "somebody put a flat tensor in place of the parameters this optimizer was given, and "
            "it is not an engine that dgg knows (DeepSpeed's ZeRO is). If every rank has a "
            "partition of a whole, say over which ranks: process_group=torch.distributed.group."
            "WORLD (or optimizer.process_group = ...); otherwise norms would be those of one rank"
        )


def _refuse(optimizer, holder) -> None:
    """Raises if DeepSpeed's or the optimizer's options do not go together."""
    name = type(holder).__name__
    if name not in _LAYOUTS:
        raise RuntimeError(
            f"DeepSpeed's {name} is not supported; use ZeRO stage 1, 2 or 3 without zenflow, "
            "super_offload and MiCS"
        )
    reasons = {
        "expert parameters (MoE) are partitioned over other ranks than the rest: not supported; "
        "guide a model without them, or use FSDP2": getattr(holder, "has_moe_layers", False),
        "model parallel ranks beside ZeRO are not supported; use ZeRO alone, or FSDP2 with tensor "
        "parallelism": _other_ranks(holder),
        "NVMe offload keeps partitions where they cannot be measured; use offload device cpu": (
            getattr(holder, "swap_optimizer", False)
            or getattr(holder, "params_in_nvme_and_cpu", False)
        ),
        "zenflow steps selected columns with an optimizer of its own; leave it out": (
            getattr(holder, "zenflow", False)
        ),
        "torch_autocast with float16 scales the loss inside every sub-step; use bfloat16, or "
        "DeepSpeed's fp16": getattr(holder, "torch_autocast_gradscaler", None) is not None,
    }
    for reason, found in reasons.items():
        if found:
            raise RuntimeError(f"DeepSpeed: {reason}")
    options = {
        "capturable=True": optimizer._capturable,
        "stochastic_rounding=True": optimizer._stochastic,
        "process_group=": optimizer.process_group is not None,
        "master_weights=True": optimizer._master and _dtype(holder) in _arguments.NARROW,
    }
    whys = {
        "capturable=True": "DeepSpeed calls the step piece by piece, no graph captures it",
        "stochastic_rounding=True": "ZeRO steps float32 weights of its own",
        "process_group=": "its own process group is used",
        "master_weights=True": "ZeRO keeps float32 weights itself, unless its configuration has "
        "bf16_master_weights_and_grads or fp16_master_weights_and_grads: drop that",
    }
    for option, given in options.items():
        if given:
            raise ValueError(f"{option} does not go with DeepSpeed ({whys[option]}); leave it out")


def _dtype(holder) -> torch.dtype:
    """Returns the dtype of the weights that ZeRO steps: float32, unless it was told otherwise."""
    return _LAYOUTS[type(holder).__name__].partitions(holder)[0][0].dtype


def _other_ranks(holder) -> bool:
    import torch.distributed as dist

    group = getattr(holder, "model_parallel_group", None)
    if group is not None and dist.get_world_size(group) > 1:
        return True
    mpu = getattr(holder, "mpu", None)
    size = getattr(mpu, "get_model_parallel_world_size", None)
    if size is not None and size() > 1:
        return True
    ranks = _ranks(holder.dp_process_group)
    others = getattr(holder, "sub_group_process_groups", ())
    return any(_ranks(other) != ranks for other in others)


def _rank(group) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def _ranks(group) -> list[int]:
    import torch.distributed as dist

    if group is None:
        return list(range(dist.get_world_size()))
    return dist.get_process_group_ranks(group)


def _local_of_step(holder, name: str) -> Tensor:
    """Returns a local variable of the ``step()`` of DeepSpeed's that is running now."""
    running = (local for owner, local in _callers.methods("step") if owner is holder)
    local = next(running, {})
    if name in local:
        return local[name]
    raise RuntimeError(
        f"{type(holder).__name__}.step() has no {name}; this release of DeepSpeed is not known to "
        "dgg: use the one that docs/deepspeed.md names, or a static loss scale"
    )
