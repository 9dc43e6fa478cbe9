# SPDX-License-Identifier: BSD-3-Clause
"""Steps that DeepSpeed's ZeRO optimizers drive, a flat partition at a time.

ZeRO puts flat float32 partitions of this rank in place of the parameters, and its own step calls
the optimizer's several times: once per parameter group (stages 1 and 2), once per sub-group with
all other groups emptied (stage 3), or once (its optimizer for bfloat16 with float32 gradients).
All calls of one engine step make one step here: one draw, one ‖g‖, one ‖θ - θ*‖ over all ranks.

A partition is cut into the fragments of parameters that it consists of. Their places in the
unsharded parameters are known, so draws per tensor and per element are those of the unsharded run,
and norms per tensor can be measured. The padding at a partition's end belongs to no fragment: no
kernel reads or writes it.

‖g‖ is the norm that DeepSpeed has measured and clipped by, the same on every rank, so it costs
neither a pass nor a collective. dgg could not measure it at the first call, when the gradients of
the other groups are not in their partitions yet. On the steps that inject, the first call measures
‖θ - θ*‖ over all partitions, with one collective. The update before does not measure it, since
DeepSpeed writes weights past autograd's version counters.
"""

from __future__ import annotations

import functools
import operator
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgg import _arguments, _callers, _ranges, backends, reference, sharding
from dgg.anchor import importance
from dgg.anchor.boundary import Plan
from dgg.deepspeed import anchors, partitions
from dgg.deepspeed.partitions import Partition, cut
from dgg.step import draws, norms
from dgg.step.cache import RowCache
from dgg.step.draws import Decision
from dgg.step.run import Verbs


class Partitions(sharding.Sharded):
    """Every rank steps flat partitions that DeepSpeed made of all parameters."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def tensors(self, groups: Sequence[Mapping[str, Any]]) -> list[list[Tensor]]:
        """Returns this rank's partitions by group."""
        return [
            [p.tensor for p in self._driver.partitions if p.group == number]
            for number in range(len(groups))
        ]

    def elements(self, param: Tensor) -> int:
        """Returns how many elements of a partition are no padding."""
        (partition,) = [p for p in self._driver.partitions if p.tensor is param]
        return sum(fragment.count for fragment in partition.fragments)

    def total(self, params: Sequence[Tensor], sums: Sequence[Tensor], count: int) -> Tensor:
        """Returns sums over the partitions of all ranks."""
        return self._driver.total(torch.stack([x.to("cpu") for x in sums]).sum(dim=0))

    def peers(self, params: Sequence[Tensor]) -> list:
        """Returns the group whose ranks have the other partitions."""
        return [self._driver.zero_optimizer.dp_process_group]

    def copied(self) -> sharding.Lost:
        """Returns `Lost`: a copy has one rank's partitions and no engine."""
        return sharding.Lost("group")


class _FragmentRows(RowCache):
    """The rows of all partitions: one for each fragment, all views into its partition."""

    _takes_natively = False  # the gradients are those of partitions

    def __init__(self, opt, groups, cuts: Sequence[Partition]) -> None:
        self._cuts = cuts
        self.of_partition: dict[int, backends.Rows] = {}
        super().__init__(opt, groups, [partition.tensor for partition in cuts], [])

    def _make_rows(self, opt, params, states, numbers, usable) -> None:
        for number, (partition, entry) in enumerate(zip(self._cuts, states, strict=True)):
            if not partition.fragments:
                continue  # all padding
            entry, fragments = entry or {}, partition.fragments
            members = [partition.members[f.member] for f in fragments]
            columns: dict[str, Any] = {}
            for name, column in opt._rule.columns.items():
                if name == "importance" and not self._weighted:
                    continue
                value = entry.get(name)
                if column == "steps":
                    # A step writes the count of every row, so each row needs one.
                    copies = [None if value is None else value.clone() for _ in members[1:]]
                    columns[column] = [value, *copies]
                else:
                    columns[column] = [cut(value, f) for f in fragments]
            rows = backends.make_rows(
                backends.choose(opt._settings.backend, partition.tensor.device),
                [cut(partition.tensor, f) for f in fragments],
                [partition.group] * len(members),
                [m.index for m in members],
                places=[sharding.Place(f.base, f.count, f.count) for f in fragments],
                # The state and the version are the partition's.
                holders=[partition.tensor] * len(members),
                **columns,
            )
            self.of_partition[number] = rows
            self.all_rows.append(rows)

    def _make_watch(self, params, tensors, states, usable) -> backends.MemoryWatch:
        return backends.MemoryWatch(params, tensors)


class Driver:
    """Drives an optimizer for the ZeRO optimizer of DeepSpeed around it.

    Attributes:
        partitions: This rank's, in DeepSpeed's order.
        verbs: A step's verbs: the first of DeepSpeed's calls decides, the last one finishes.

    Raises:
        RuntimeError: DeepSpeed is set up in a way that is not supported; the message says what
            to use instead.
        ValueError: An option of the optimizer does not go with partitions.
    """

    def __init__(self, opt, zero_optimizer) -> None:
        partitions.refuse(opt, zero_optimizer)
        self._zero_optimizer = weakref.ref(zero_optimizer)
        self.partitions: list[Partition] = []
        # Of the engine step in progress; its first call makes it.
        self._decision: Decision | None = None
        self.verbs = Verbs(
            self._decide, self._take_gradients, self._measure, self._finish, self._abandon
        )
        self._look_at_partitions(opt)
        opt._ownership = Partitions(self)
        self._drop_orphans(opt)
        dtype = partitions.weights_dtype(zero_optimizer)
        if dtype in _arguments.NARROW:
            _arguments.warn_narrow(
                "DeepSpeed's master weights are",
                dtype,
                "leave bf16_master_weights_and_grads and fp16_master_weights_and_grads out of its "
                "configuration, then ZeRO keeps them in float32",
            )

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer, or None if it is gone."""
        return self._zero_optimizer()

    def _look_at_partitions(self, opt) -> None:
        """Cuts the partitions into fragments anew if DeepSpeed has replaced them."""
        tensors = partitions.tensors_of(self.zero_optimizer)
        known = [p.tensor for p in self.partitions]
        if len(tensors) != len(known) or not all(map(operator.is_, tensors, known)):
            self.partitions = partitions.partitions_of(opt, self.zero_optimizer)
            opt._cache = None

    def groups(self, opt) -> list[dict[str, Any]]:
        """Returns the groups of all partitions; of a list that was set anew, the new ones."""
        if len(opt.param_groups) == len(opt._all_groups):  # not DeepSpeed's for the step of one
            opt._all_groups = opt.param_groups
        return opt._all_groups

    def _drop_orphans(self, opt) -> None:
        """Drops the state of parameters that were replaced by partitions, with a warning."""
        partitions_now = {id(p.tensor) for p in self.partitions}
        orphans = [p for p in opt.state if id(p) not in partitions_now]
        for p in orphans:
            del opt.state[p]
        if orphans:
            warnings.warn(
                f"the optimizer had state of {len(orphans)} parameters before DeepSpeed's ZeRO put "
                "partitions in their place, and ZeRO takes none of it along: it is dropped. Call "
                "set_anchor() after deepspeed.initialize, and resume moments with load_checkpoint",
                stacklevel=_callers.stacklevel(),
            )

    def _decide(self, opt) -> Decision:
        """Returns the decision of the engine step; its first call makes it."""
        self._look_at_partitions(opt)
        number_of = {id(p.tensor): number for number, p in enumerate(self.partitions)}
        params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        self._called = [number_of[id(p)] for p in params if id(p) in number_of]
        kind = type(self.zero_optimizer).__name__
        known = self.groups(opt)
        if not all(any(group is other for other in known) for group in opt.param_groups):
            raise RuntimeError(
                f"the list of groups was set anew after the last step, and {kind} shows one group "
                "of it at a time: the former list is in force again. Change it in place, "
                "optimizer.param_groups[:] = groups"
            )
        if len(self._called) < len(params) or not params:
            raise RuntimeError(
                f"{kind} asks to step a tensor that is none of its partitions: "
                "either the optimizer was handed to a second engine (build a new one for every "
                "deepspeed.initialize), or this release of DeepSpeed is not known to dgg (use the "
                "one that docs/deepspeed.md names)"
            )
        if 0 in self._called:
            self._decision = self._decide_for_all(opt)
        if self._decision is None:
            raise RuntimeError(
                f"{kind} did not begin its step with its first partition; this "
                "release of DeepSpeed is not known to dgg: use the one that docs/deepspeed.md names"
            )
        return self._decision

    def _decide_for_all(self, opt) -> Decision:
        opt._replay.check_closed()
        self._part_steps(opt)
        groups = opt._all_groups
        options = opt._draws.options.read(groups)
        decision = Decision(options, groups, draws.hyper_of(opt, groups), options["draw_index"])
        decision.looks_ahead = False
        partitions.refuse_guard(groups)
        self._flags = self._draw_for_all(opt, decision) if self._is_anchored(opt) else None
        scaled = self._flags is not None and options["scaling"]
        self._grad_norm: Tensor | None = None  # ‖g‖, measured by DeepSpeed
        self._coefficients: Tensor | None = None  # c and s, if the same for all tensors
        self._by_partition: list[Tensor] = []  # otherwise those of each partition
        if scaled or options["max_grad_norm"] is not None:
            device = self.partitions[0].tensor.device
            norm = partitions.grad_norm(self.zero_optimizer).to(device, torch.float64)
            self._grad_norm = norm
            if options["norm_scope"] == "global" or not scaled:
                squares = torch.zeros(3, 1, dtype=torch.float64, device=device)
                squares[:2] = norm.square()
                if scaled:
                    squares[2] = self._squared_distance(opt)
                bound = options["max_grad_norm"]
                self._coefficients = reference.coefficients(
                    squares, max_grad_norm=bound, scaling=scaled, per_tensor=False
                )
        for group in groups:
            group["draw_index"] = decision.index + 1
        return decision

    def _draw_for_all(self, opt, decision: Decision) -> Tensor | None:
        """Returns the uint8 flags of all members of all partitions; None if none injects."""
        groups = [p.group for p in self.partitions for _ in p.members]
        indices = [m.index for p in self.partitions for m in p.members]
        flags = opt._draws.drawn(decision, groups, indices, decision.index)
        if flags == 0:
            return None
        flags = [flags] * len(groups) if isinstance(flags, int) else flags
        return torch.tensor(flags, dtype=torch.uint8, device="cpu")

    def _part_steps(self, opt) -> None:
        # DeepSpeed's universal loader gives all sub-groups the same tensor as step count.
        counts: set[int] = set()
        for partition in self.partitions:
            entry = opt.state.get(partition.tensor) or {}
            if isinstance(step := entry.get("step"), Tensor):
                if id(step) in counts:
                    step = entry["step"] = step.clone()
                counts.add(id(step))

    def _rows(self, opt) -> dict[int, backends.Rows]:
        """Returns the rows of every partition that is not all padding."""
        params = [p.tensor for p in self.partitions]
        pairs = zip(opt._all_groups, opt._ownership.tensors(opt._all_groups), strict=True)
        groups = [{**group, "params": tensors} for group, tensors in pairs]
        grads = [p.grad for p in params]
        if opt._cache is None or not opt._cache.valid(opt, groups, params, grads, []):
            opt._cache = _FragmentRows(opt, groups, self.partitions)
        for rows in opt._cache.all_rows:
            rows.use_options(groups[0])
        return opt._cache.of_partition

    def _take_gradients(self, opt, decision: Decision) -> list[backends.Rows]:
        groups = opt._all_groups
        for number in self._called:
            partition = self.partitions[number]
            opt._rule.init_state(opt, partition.tensor, groups[partition.group], first=True)
        rows_of = self._rows(opt)
        elementwise = decision.options["granularity"] == "element"
        stepped = [number for number in self._called if number in rows_of]
        for number in stepped:
            partition = self.partitions[number]
            grads = [cut(partition.tensor.grad, f) for f in partition.fragments]
            rows_of[number].take_gradients(grads, [], elementwise=elementwise)
        return [rows_of[number] for number in stepped]

    def _measure(self, opt, decision: Decision, all_rows: Sequence[backends.Rows]) -> list[Tensor]:
        of_all_rows: list[Any] = []
        for number in self._called:
            rows = opt._cache.of_partition.get(number)
            coefficients = self._coefficients_of(decision, number, rows)
            if rows is None:
                # It is all padding, but its step count must agree with the others in checkpoints.
                opt._rule.skip_update(opt, self.partitions[number].tensor)
            else:
                of_all_rows.append(coefficients)
        decision.flags = [
            None if self._flags is None else opt._draws.flags(decision, rows, decision.index)
            for rows in all_rows
        ]
        draws.settle(decision, any([flags is not None for flags in decision.flags]))
        return of_all_rows

    def _coefficients_of(
        self, decision: Decision, number: int, rows: backends.Rows | None
    ) -> Tensor | None:
        """Returns c and s of the rows of one partition; with norms per tensor a collective."""
        partition = self.partitions[number]
        if self._coefficients is not None:
            head, scale = self._coefficients.split([reference.SCALES, 1])
            return torch.cat([head, scale.expand(len(partition.fragments))])
        if self._grad_norm is None:
            return None if rows is None else rows.constant_coefficients()
        device = partition.tensor.device
        squares = torch.zeros(3, len(partition.members), dtype=torch.float64, device=device)
        if rows is not None:
            rows.forget()
            squares[:, [f.member for f in partition.fragments]] = rows.norms(
                replay_weight=1.0,
                scaling=decision.scaling,
                which=reference.NORM_GRAD | reference.NORM_DISTANCE,
            )
        squares = self.total(squares)
        squares[0] = 0.0
        squares[0, 0] = self._grad_norm.square()
        coefficients = reference.coefficients(
            squares, max_grad_norm=decision.options["max_grad_norm"], scaling=True, per_tensor=True
        )
        self._by_partition.append(coefficients)
        places = [*range(reference.SCALES)]
        places += [reference.SCALES + f.member for f in partition.fragments]
        return coefficients[places]

    def _finish(self, opt, decision: Decision, all_rows, _) -> None:
        if len(self.partitions) - 1 not in self._called:
            return
        device, coefficients = self.partitions[0].tensor.device, self._coefficients
        if self._by_partition:
            # ‖g‖ and ‖d‖ over all tensors, from those of every partition.
            heads = torch.stack([x[: reference.SCALES] for x in self._by_partition])
            total = heads.square().sum(dim=0).sqrt()
            head = torch.stack([heads[0, 0], total[1], total[2], heads[0, 3]])
            scales = [x[reference.SCALES :] for x in self._by_partition]
            coefficients = torch.cat([head, *scales])
        flags = None if self._flags is None else self._flags.to(device)
        if coefficients is None:
            coefficients = torch.ones(reference.SCALES + 1, dtype=torch.float64, device=device)
        backend = backends.choose(opt._settings.backend, device)
        norms.keep(opt, norms.record(decision, device, backend, flags, coefficients, None))
        self._decision = None

    def _abandon(self, opt) -> None:
        partitions.put_back(opt, self.zero_optimizer)

    def _squared_distance(self, opt) -> Tensor:
        """Returns ‖θ - θ*‖² over all partitions of all ranks, float64 [1]: one collective."""
        with _ranges.record("dgg.norm"):
            total = torch.zeros(1, dtype=torch.float64, device=self.partitions[0].tensor.device)
            for rows in self._rows(opt).values():
                # Rows without a gradient do not count. All rows will have one, but not yet.
                rows.take_gradients(list(rows.params), [], elementwise=False)
                rows.forget()
                squares = rows.norms(
                    replay_weight=1.0, scaling=backends.Scaling(), which=reference.NORM_DISTANCE
                )
                total += squares[2].sum().to(total.device)
                rows.release()
        return self.total(total)

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of values over all ranks; every rank calls it."""
        group = self.zero_optimizer.dp_process_group
        if dist.get_world_size(group) == 1:
            return values
        # Partitions may be offloaded, but the group's backend sums on the model's device.
        on_device = values.to(self.partitions[0].members[0].param.device)
        with _ranges.record("dgg.allreduce"):
            dist.all_reduce(on_device, group=group)
        return on_device.to(values.device)

    def _count_anchors(self, opt) -> int:
        return sum("anchor" in opt.state.get(p.tensor, ()) for p in self.partitions)

    def _is_anchored(self, opt) -> bool:
        present = self._count_anchors(opt)
        promised = any(group["anchored"] for group in opt._all_groups)
        if present == len(self.partitions) or not (present or promised):
            self._check_importance(opt)
            return present > 0
        raise RuntimeError(
            f"the optimizer was anchored but only {present} of {len(self.partitions)} partitions "
            "have an anchor: the resume lost them (a universal checkpoint of DeepSpeed carries "
            "none). Load a checkpoint that has them, set them again with set_anchor(tensors) of "
            "the previous task's weights, or give up guidance with clear_anchor()"
        )

    def _check_importance(self, opt) -> None:
        weight = opt._all_groups[0]["importance"]
        entries = [opt.state.get(p.tensor, {}) for p in self.partitions]
        if weight and any("anchor" in entry and "importance" not in entry for entry in entries):
            raise RuntimeError(
                f"importance={weight} weighs the pull of partitions whose state has no importance: "
                "it is made at a task boundary. Set it with set_anchor(), or "
                "set_anchor(importance=...), while the option is on; or set the option to 0"
            )

    def marked_groups(self, opt) -> list[dict[str, Any]]:
        """Returns the groups; marked as without anchors if a resume has brought none."""
        self._look_at_partitions(opt)
        groups = self.groups(opt)
        return groups if self._count_anchors(opt) else [{**g, "anchored": 0} for g in groups]

    def plan_anchors(self, opt, tensors: Any, model: torch.nn.Module | None) -> Plan:
        """Returns the plan of `anchors.plan_anchors` for the present partitions."""
        self._look_at_partitions(opt)
        return anchors.plan_anchors(opt, self.partitions, tensors, model)

    def plan_importance(
        self, opt, source: Any, model: torch.nn.Module | None, params: Sequence[Tensor]
    ) -> list[importance.Entry]:
        """Returns the plan of `importance.plan` for the present partitions."""
        labels = [f"partition {number}" for number in range(len(params))]
        match = None
        if source is not None:
            match = functools.partial(anchors.named_sums, self.partitions, source, model)
        return importance.plan(opt, self.groups(opt), params, labels, match)

    def importance_dict(self, opt, model: torch.nn.Module | None) -> dict[str, Tensor]:
        """Returns the sums of v̂ by name, whole on every rank; every rank calls it."""
        self._look_at_partitions(opt)
        tensors = [partition.tensor for partition in self.partitions]
        sums, known = importance.running_sums(opt, self.groups(opt), tensors)
        # A rank may have padding alone, which no step has reached.
        importance.refuse_unknown(
            opt, bool(self.total(torch.tensor([float(any(known))], device="cpu")))
        )
        return anchors.whole_sums(self.partitions, sums, model, self.total)


def find_driver(opt) -> Driver | None:
    """Returns the driver of an optimizer whose parameters ZeRO has replaced, otherwise None.

    Raises:
        RuntimeError: Its parameters are flat partitions of an unknown engine, or DeepSpeed is set
            up in a way that is not supported.
        ValueError: An option of the optimizer does not go with partitions.
    """
    zero_optimizer = partitions.find_zero_optimizer(opt)
    if zero_optimizer is None:
        partitions.refuse_unknown_partitions(opt)
        return None
    try:
        return Driver(opt, zero_optimizer)
    except BaseException:
        partitions.put_back(opt, zero_optimizer)
        raise
