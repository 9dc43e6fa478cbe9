# SPDX-License-Identifier: BSD-3-Clause
"""The same guidance for an optimizer of someone else's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, _boundary, anchor, backends, checkpoint, guidance, sharding
from dgg._row_cache import Lists


class Guidance:
    """Guides an optimizer of someone else's: a step pre-hook that edits ``.grad`` in one pass.

    Works with any `torch.optim.Optimizer` (Muon, bitsandbytes, torchao, Adafactor, ...). Before
    each of its steps every gradient becomes G = c (g + w r) + b s (θ - θ*), equation (5); what the
    optimizer then does with G is its own affair. The hook works on ``.grad`` in place.

    Unlike `dgg.AdamW` it cannot measure ‖θ - θ*‖ in the other optimizer's pass and reads the
    parameters once more on the steps that inject; its anchors live here, not in the other's state
    (many optimizers take a state that is not empty for an initialised one), so save
    ``guidance.state_dict()`` beside ``optimizer.state_dict()``. `replay` does not go together with
    a GradScaler, which cannot unscale what it does not see. Torch copies and pickles optimizers
    without their hooks: a copy is not guided, make a new guidance over it.

    Args:
        optimizer: The optimizer to guide.
        alpha: Probability of injecting the guidance at a step (α).
        strength: Factor of the guidance's scale s.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False gives s = strength.
        norm_scope: ``"global"`` or ``"tensor"``.
        granularity: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm in the same pass, or None.
        replay_weight: Weight w of the replay gradients.
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        anchor_device: Storage device of the anchor; None is the parameter's.
        process_group: Group over whose ranks plain parameters are partitioned; see `dgg.AdamW`.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or None (the fastest).

    Attributes:
        param_groups: A dict per group of the optimizer with the guidance options; ``alpha`` and
            ``strength`` are schedulable, per group.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or an argument has the wrong type.
        ValueError: An argument is out of range, or the optimizer is guided already.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> opt = torch.optim.Muon(model.parameters())
        >>> guidance = dgg.Guidance(opt, alpha=0.2)
        >>> train(model, opt, first_task)
        >>> guidance.set_anchor()
        >>> train(model, opt, second_task)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Guidance takes a torch.optim.Optimizer, not {type(optimizer).__name__}; of a "
                "wrapper pass the optimizer inside"
            )
        if hasattr(optimizer, "guidance_stats") or getattr(optimizer, "_dgg_guided", False):
            raise ValueError(
                f"{type(optimizer).__name__} is guided already; set its own options instead of "
                "wrapping it again"
            )
        _arguments.check_backend(backend, optimizer.param_groups)
        self._backend = backend
        self._anchor_dtype = _arguments.check_dtype("anchor_dtype", anchor_dtype)
        self._anchor_device = _arguments.check_anchor_device(anchor_device)
        self._options = {
            "alpha": alpha, "strength": strength, "scaling": scaling, "norm_scope": norm_scope,
            "granularity": granularity, "max_grad_norm": max_grad_norm,
            "replay_weight": replay_weight, "seed": seed, "draw_index": 0, "task_index": 0,
        }  # fmt: skip
        _arguments.check_options(self._options)
        self.process_group = _arguments.check_process_group(process_group, self._options)
        self.optimizer = optimizer
        self._given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.param_groups: list[dict[str, Any]] = []
        self._sync_groups()
        for group in self.param_groups:
            _arguments.make_plain(group)
        self._anchors: dict[Tensor, Tensor] = {}
        self._engine = guidance.Engine()
        self._rows: list[tuple[list[int], backends.Rows]] = []
        self._rows_params: list[Tensor] = []
        self._watch: backends.MemoryWatch | None = None
        # Whether the gradients of these parameters can be taken up natively.
        self._gathers, self._lists = False, Lists([])
        self._shards: list[tuple[Tensor, Tensor]] = []
        optimizer._dgg_guided = True
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def __reduce_ex__(self, protocol):
        """Refuses to be copied or pickled, since the hook would stay behind."""
        raise TypeError(
            "a Guidance can be neither copied nor pickled, its hook belongs to one optimizer: copy "
            "the optimizer, make a Guidance over the copy and load_state_dict() into it"
        )

    def _sync_groups(self) -> None:
        # Groups may be added to the optimizer at any time; they start with group 0's options.
        while len(self.param_groups) < len(self.optimizer.param_groups):
            first = self.param_groups[0] if self.param_groups else self._options
            self.param_groups.append(
                {**first, **{n: self._options[n] for n in _arguments.PER_GROUP}}
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_anchor(
        self,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None = None,
        *,
        model: torch.nn.Module | None = None,
        task: int | None = None,
    ) -> None:
        """Sets θ* to the present weights, named tensors or those of files.

        It is `dgg.AdamW.set_anchor`, with the same rule for ``task``; what is resumed is loaded
        by this class' `load_state_dict`.

        Args:
            tensors: The previous task's weights by name, or their path; None takes the present
                weights.
            model: Maps names to parameters.
            task: Number of the task that begins now, or goes on.

        Raises:
            FileNotFoundError: There is nothing at the path.
            KeyError: A trainable parameter has no tensor.
            RuntimeError: It would replace an anchor that was just resumed, the anchor of a task in
                progress is gone, or another rank failed.
            TypeError: ``tensors`` or one of them is of the wrong type.
            ValueError: A shape, value or name does not fit, or ``task``. After any error all is as
                it was.
        """
        self._sync_groups()
        draws = self.param_groups[0]["draw_index"]
        marked = [{**group, "anchored": len(self._anchors)} for group in self.param_groups]
        if task is not None:
            task = _arguments.plain("task", task)
            if not _boundary.begins_task(task, marked, draws, given=tensors is not None):
                return
        elif tensors is None:
            _boundary.refuse_resumed(marked, draws, self._engine.resumed)
        groups = self.optimizer.param_groups
        every = [p for group in groups for p in group["params"]]
        peers = sharding.peers(every, self.process_group)
        with sharding.on_all_or_none(peers, _arguments.settings_of(self.param_groups)):
            plan = _boundary.plan_anchors(
                groups, self._anchors, tensors, model, self._anchor_dtype, self._anchor_device
            )
        for param, source, target in plan:
            anchor.write(target, source)
            self._anchors[param] = target
        for group in self.param_groups:
            group["task_index"] = group["task_index"] + 1 if task is None else task
        self._engine.named = task
        self._rows, self._gathers = [], False

    def clear_anchor(self) -> None:
        """Drops the anchor: the gradients are left as they are from here on."""
        self._anchors.clear()
        self._rows, self._gathers = [], False

    def replay(self) -> contextlib.AbstractContextManager[None]:
        """Lets the gradients of the block become r; see `dgg.AdamW.replay`."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self._engine.replay.record(params)

    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step; see `dgg.AdamW.clear_replay`."""
        self._engine.replay.clear()

    def guidance_stats(self) -> guidance.Statistics:
        """Returns what the last step did, as device tensors; see `dgg.AdamW.guidance_stats`."""
        return self._engine.statistics(len(self._anchors))

    def remove(self) -> None:
        """Takes the hook off the optimizer; the anchor is dropped."""
        self._handle.remove()
        self.clear_anchor()
        self.optimizer._dgg_guided = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the options, the draw index and the anchors by parameter number."""
        self._sync_groups()
        for group in self.param_groups:
            _arguments.make_plain(group)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        anchors = {i: self._anchors[p] for i, p in enumerate(params) if p in self._anchors}
        return {
            "param_groups": [dict(group) for group in self.param_groups],
            "anchors": anchors,
            "params": len(params),
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned; anchors keep the dtype they were saved in.

        Args:
            state_dict: From ``state_dict()`` of a guidance over the same parameters.

        Raises:
            KeyError: The state dict is not one of a guidance.
            ValueError: Numbers of groups or parameters, or shapes, differ. Nothing is changed.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict() takes what state_dict() returned, not "
                f"{type(state_dict).__name__}; torch.load the file first"
            )
        if not state_dict.keys() >= {"param_groups", "anchors", "params"}:
            raise KeyError(
                f"no state dict of a guidance: it has {sorted(map(str, state_dict))}, not anchors, "
                "param_groups and params; pass what guidance.state_dict() returned"
            )
        self._sync_groups()
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups) or state_dict["params"] != len(params):
            raise ValueError(
                f"the state dict is of {state_dict['params']} parameters in {len(groups)} groups, "
                f"the optimizer has {len(params)} in {len(self.param_groups)}; load it beside the "
                "optimizer it was saved with"
            )
        for number, group in enumerate(groups):
            absent = [
                name for name in (*_arguments.WIDE, *_arguments.PER_GROUP) if name not in group
            ]
            if absent:
                raise KeyError(
                    f"group {number} of the state dict lacks {absent}; pass what "
                    "guidance.state_dict() returned"
                )
            _arguments.check_agreement(number, group, groups[0])
            _arguments.check_options(group)
        if self.param_groups[0]["draw_index"] == 0:
            _boundary.refuse_earlier(self._engine.named, groups)
        labels = _arguments.group_labels(self.optimizer.param_groups)
        if not isinstance(state_dict["anchors"], Mapping):
            raise TypeError(
                f"the state dict's anchors are a {type(state_dict['anchors']).__name__}, not a "
                "dict by parameter number; pass what guidance.state_dict() returned"
            )
        for i, value in state_dict["anchors"].items():
            if type(i) is not int or i not in range(len(params)):
                raise KeyError(
                    f"the state dict has an anchor of parameter {i!r} of {len(params)}; pass what "
                    "guidance.state_dict() returned"
                )
            anchor.check_source(value, params[i], labels[i])
        anchors = {params[i]: value for i, value in state_dict["anchors"].items()}
        dtypes = [value.dtype for value in anchors.values()]
        made = anchor.allocate_all([*anchors], dtypes, self._anchor_device)
        for target, value in zip(made, anchors.values(), strict=True):
            anchor.write(target, value)
        self._anchors = dict(zip(anchors, made, strict=True))
        engine, mine = self._engine, self.param_groups[0]["draw_index"]
        engine.named = None
        fresh = mine in (0, engine.resumed)
        engine.resumed = groups[0]["draw_index"] if fresh else None
        self.param_groups = [dict(group) for group in groups]
        self._rows, self._gathers = [], False

    def _before_step(self, optimizer, args, kwargs):
        if not optimizer.state and checkpoint.making_template():
            return None  # no step of the training: it counts no draw
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._edit()
            return None
        # The gradients exist only after the closure: edit them inside, with one draw a step.
        draw = self.param_groups[0]["draw_index"]

        def guided_closure():
            loss = closure()
            self._set_draw(draw)
            self._edit()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": guided_closure}
        return (args[0], guided_closure, *args[2:]), kwargs

    def _set_draw(self, draw: int) -> None:
        for group in self.param_groups:
            group["draw_index"] = draw

    @torch.no_grad()
    def _settle(self, params: Sequence[Tensor]) -> None:
        """Sums partial gradients, in ``.grad``, where the other optimizer wants them too."""
        slot = self._engine.replay
        replayed = [p for p in params if slot.get(p) is not None] if slot else []
        both = [*(p.grad for p in params), *map(slot.get, replayed)]
        found = sharding.settled([*params, *replayed], both)
        for p, given, whole in zip(params, both, found, strict=False):
            if whole is not given:
                p.grad = whole
        slot.exchange(replayed, found[len(params) :])

    def _refuse_partitions(self, params: Sequence[Tensor]) -> None:
        strange = (type(p) is Tensor and p.dim() == 1 and id(p) not in self._given for p in params)
        if "deepspeed" in sys.modules and any(strange):
            raise RuntimeError(
                "DeepSpeed's ZeRO has put flat partitions in place of the parameters and steps "
                "them one by one, of which dgg.Guidance would take wrong norms; use dgg.AdamW, "
                "dgg.Adam or dgg.SGD, which know it"
            )

    def _edit(self) -> None:
        try:
            self._edit_or_raise()
        except BaseException:
            for _, rows in self._rows:
                rows.abandon()
            raise

    def _edit_or_raise(self) -> None:
        self._sync_groups()
        engine, slot = self._engine, self._engine.replay
        slot.check_closed()
        wide = engine.options.read(self.param_groups)
        draw, elementwise = wide["draw_index"], wide["granularity"] == "element"
        groups = self.optimizer.param_groups
        # With GradScaler an optimizer that unscales by itself gets gradients that are scaled yet.
        scale, found = (getattr(self.optimizer, n, None) for n in ("grad_scale", "found_inf"))
        if slot and (found is not None or guidance.unscaled_unseen()):
            raise RuntimeError(
                "Guidance.replay() does not go together with a GradScaler, which cannot unscale "
                "the replay gradients; use dgg.AdamW, or bfloat16 without a scaler"
            )
        taken = scale is None and found is None and self._gather(groups, elementwise)
        params = [] if taken else [p for group in groups for p in group["params"]]
        if not taken:
            self._check(groups, params, elementwise)
        if scale is not None:
            guidance.refuse_scaler(params, self.process_group)
        all_rows = self._rows if taken else self._current_rows(params)
        launched = all_rows and all(rows.launched for _, rows in all_rows)
        device = params[0].device if launched and params else None
        scaling, skip = guidance.read_scaler(scale, found, device)
        if skip:
            engine.remember_skipped(params[0].device)
            self._set_draw(draw + 1)
            return
        if not taken:
            self._take_up(params, all_rows, elementwise)
        for _, rows in all_rows:
            # The other optimizer has moved the parameters since any distance was measured.
            rows.forget(anchors=False)
        only = [rows for _, rows in all_rows]
        flags = [engine.flags(wide, self.param_groups, rows, draw) for rows in only]
        injecting = any(x is not None for x in flags)
        injecting = injecting or engine.joins(wide, self.param_groups, only, self.process_group)
        found = engine.measure(wide, only, injecting, scaling)
        neutral = not injecting and wide["max_grad_norm"] is None and not slot and scale is None
        if neutral:
            for rows in only:
                rows.abandon()
        else:
            hyper = [
                {
                    "maximize": bool(group.get("maximize", False)),
                    "strength": float(mine["strength"]),
                    "threshold": guidance.threshold(mine["alpha"]),
                }
                for group, mine in zip(groups, self.param_groups, strict=True)
            ]
            for rows, row_flags, row_found in zip(only, flags, found, strict=True):
                rows.guide_(
                    row_found,
                    rows.constant_flags(0) if row_flags is None else row_flags,
                    hyper,
                    guidance.drawn(wide, draw, injecting),
                    scaling,
                    replay_weight=float(wide["replay_weight"]),
                )
            if scale is not None:
                # The gradients are unscaled now; the optimizer must not divide them again.
                self.optimizer.grad_scale = None
        if only:
            strength = self.param_groups[0]["strength"]
            engine.remember(wide, only[0], flags[0], found[0], float(strength), scaling.found_inf)
        self._set_draw(draw + 1)
        slot.clear()

    def _gather(self, groups: Sequence[Mapping[str, Any]], elementwise: bool) -> bool:
        """Takes up the gradients natively, if nothing but their values is new since the last step.

        Then there is nothing to check either: what is strange is left to the long way.
        """
        if not (self._gathers and self._lists.same(groups)):
            return False
        ((_, rows),), slot = self._rows, self._engine.replay
        replays: list[Tensor | None] = []
        if slot:
            replays = slot.of(rows.params)
            # Where there is a replay gradient alone, the other optimizer is given a gradient.
            pairs = zip(rows.params, replays, strict=True)
            if any([r is not None and p.grad is None for p, r in pairs]):
                return False
        if not rows.take_native_gradients(replays, elementwise=elementwise):
            return False
        # An expanded gradient cannot be written in place.
        if all([backends.is_dense(x) for x in rows.odd_gradients()]):
            return True
        rows.abandon()
        return False

    def _check(self, groups, params: Sequence[Tensor], elementwise: bool) -> None:
        """Checks everything that a step relies on."""
        slot = self._engine.replay
        self._refuse_partitions(params)
        self._settle(params)
        labels = None
        for i, p in enumerate(params):
            r = slot.get(p) if slot else None
            for given, kind in ((p.grad, "gradient"), (r, "replay gradient")):
                if given is not None:
                    labels = labels or _arguments.group_labels(groups)
                    _arguments.check_gradient(given, p, labels[i], kind)
                    _arguments.check_param(p, labels[i], stepped=True, elements=elementwise)
            if p in self._anchors and self._anchors[p].shape != p.shape:
                label = _arguments.group_labels(groups)[i]
                raise ValueError(
                    f"{label} has another shape than its anchor, "
                    f"{tuple(self._anchors[p].shape)}: call set_anchor() after a parameter has "
                    "changed its shape"
                )

    def _take_up(self, params: Sequence[Tensor], all_rows, elementwise: bool) -> None:
        """Takes up the gradients one by one, and makes those that the other optimizer is to see."""
        slot = self._engine.replay
        for p in params:
            shard = sharding.local(p.grad)
            if shard is None and slot and slot.get(p) is not None:
                p.grad = sharding.like(torch.zeros_like(sharding.local(p.detach())), p)
            elif shard is not None and not backends.is_dense(shard):
                # An expanded gradient cannot be written in place.
                shard = shard.clone(memory_format=torch.contiguous_format)
                p.grad = sharding.like(shard, p)
        for places, rows in all_rows:
            replays = slot.of([params[i] for i in places])
            rows.take_gradients([params[i].grad for i in places], replays, elementwise=elementwise)

    def _current_rows(self, params: list[Tensor]) -> list[tuple[list[int], backends.Rows]]:
        same = len(params) == len(self._rows_params) and all(
            old is new for old, new in zip(self._rows_params, params, strict=True)
        )
        same = same and all(p._local_tensor is shard for p, shard in self._shards)
        if self._rows and same and self._watch is not None and self._watch.unmoved():
            return self._rows
        numbers = [n for n, g in enumerate(self.optimizer.param_groups) for _ in g["params"]]
        parts: dict[tuple[torch.device, str], list[int]] = {}
        for i, p in enumerate(params):
            if p.dtype.to_real() in anchor.FLOAT_DTYPES:
                backend = backends.choose_for(self._backend, p)
                parts.setdefault((p.device, backend), []).append(i)
        self._rows = [
            (
                places,
                backends.make_rows(
                    backend,
                    [params[i] for i in places],
                    [numbers[i] for i in places],
                    places,
                    anchors=[self._anchors.get(params[i]) for i in places],
                    process_group=self.process_group,
                ),
            )
            for (_, backend), places in parts.items()
        ]
        self._rows_params = params
        anchors = [self._anchors[p] for p in params if p in self._anchors]
        self._watch = backends.MemoryWatch(params, anchors)
        self._lists = Lists(self.optimizer.param_groups)
        self._gathers = (
            len(self._rows) == 1
            and len(self._rows[0][0]) == len(params)
            and self._rows[0][1].watch_gradients(self._watch)
        )
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        return self._rows
