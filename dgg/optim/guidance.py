# SPDX-License-Identifier: BSD-3-Clause
"""The same guidance for any other optimizer."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, backends, sharding
from dgg.anchor import boundary
from dgg.checkpoint import source
from dgg.step import gradients, norms
from dgg.step.cache import RowCache
from dgg.step.draws import Decision, Draws
from dgg.step.gradients import ReplaySlot
from dgg.step.rule import Rule, threshold
from dgg.step.run import Verbs, abandon, finish, run
from dgg.step.settings import Settings


class GuideRule(Rule):
    """Makes every gradient G = c (g + w r) + b s (θ - θ*), equation (5), and nothing else."""


class Guidance:
    """Guides any other optimizer: a step pre-hook that edits ``.grad`` in one pass.

    Works with any `torch.optim.Optimizer` (Muon, bitsandbytes, torchao, Adafactor, ...). Before
    each of its steps every gradient becomes G = c (g + w r) + b s (θ - θ*), equation (5), in
    ``.grad`` itself. The optimizer then steps with G instead of the gradient.

    Unlike `dgg.AdamW` it cannot measure ‖θ - θ*‖ in the other optimizer's pass, so it reads the
    parameters once more on the steps that inject. Its anchors are not in the other's state (many
    optimizers take a state that is not empty for an initialised one), so save
    ``guidance.state_dict()`` beside ``optimizer.state_dict()``. `replay` does not go together with
    a GradScaler, which does not see the replay gradients. torch copies and pickles optimizers
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

    process_group = sharding.ProcessGroup()
    # As if nobody had read the state: unlike that of `Stepped` it is not watched for reads.
    _state_read = False
    _rule = GuideRule()

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, alpha: float = 0.2, strength: float = 1.0,
        scaling: bool = True, norm_scope: str = "global", granularity: str = "step",
        max_grad_norm: float | None = None, replay_weight: float = 1.0, seed: int = 0,
        anchor_dtype: torch.dtype | None = None, anchor_device: torch.device | str | None = None,
        process_group=None, backend: str | None = None,
    ) -> None:  # fmt: skip
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
        self._settings = Settings(
            backend,
            anchor_dtype=_arguments.check_dtype("anchor_dtype", anchor_dtype),
            anchor_device=_arguments.check_anchor_device(anchor_device),
        )
        self._options = {
            "alpha": alpha, "strength": strength, "scaling": scaling, "norm_scope": norm_scope,
            "granularity": granularity, "max_grad_norm": max_grad_norm,
            "replay_weight": replay_weight, "seed": seed, "draw_index": 0, "task_index": 0,
        }  # fmt: skip
        _arguments.check_options(self._options)
        self._ownership = sharding.Sharded(
            _arguments.check_process_group(process_group, self._options)
        )
        self.optimizer = optimizer
        self._original_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.param_groups: list[dict[str, Any]] = []
        self._sync_groups()
        for group in self.param_groups:
            _arguments.make_plain(group)
        # θ* by parameter, under the key that it has in the state of `dgg.AdamW`.
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._draws, self._replay = Draws(), ReplaySlot()
        self._cache: RowCache | None = None
        self._last: dict[str, Any] | None = None
        self._resumed: int | None = None
        self._named: int | None = None
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
                {**first, **{n: self._options[n] for n in _arguments.GROUP_OPTIONS}}
            )

    def _reset_caches(self) -> None:
        self._cache = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_anchor(
        self, tensors: Mapping[str, Tensor] | str | os.PathLike | None = None, *,
        model: torch.nn.Module | None = None, task: int | None = None,
    ) -> None:  # fmt: skip
        """Sets θ* to the present weights, named tensors or those of files.

        It is `dgg.AdamW.set_anchor`, with the same rule for ``task``; a resumed guidance is loaded
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
        count = self._count_anchors()
        marked = [{**group, "anchored": count} for group in self.param_groups]
        task = None if task is None else _arguments.plain("task", task)
        if not boundary.is_due(marked, tensors, task, self._resumed):
            return
        groups = self.optimizer.param_groups
        plan = functools.partial(
            boundary.plan_anchors, groups, boundary.anchors_in(self.state), tensors, model,
            self._settings.anchor_dtype, self._settings.anchor_device,
        )  # fmt: skip
        boundary.place(self, groups, marked, plan, task)
        for group, mark in zip(self.param_groups, marked, strict=True):
            group["task_index"] = mark["task_index"]
        self._named = task

    def _count_anchors(self) -> int:
        return sum("anchor" in entry for entry in self.state.values())

    def clear_anchor(self) -> None:
        """Drops the anchor: the gradients are left as they are from here on."""
        groups = self.optimizer.param_groups
        boundary.clear(self, groups, [{} for _ in groups])

    def replay(self) -> contextlib.AbstractContextManager[None]:
        """Lets the gradients of the block become r; see `dgg.AdamW.replay`."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self._replay.record(params)

    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step; see `dgg.AdamW.clear_replay`."""
        self._replay.clear()

    def guidance_stats(self) -> norms.Statistics:
        """Returns what the last step did, as device tensors; see `dgg.AdamW.guidance_stats`."""
        return norms.statistics(self._last, self._count_anchors())

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
        entries = {i: self.state.get(p, {}) for i, p in enumerate(params)}
        anchors = {i: entry["anchor"] for i, entry in entries.items() if "anchor" in entry}
        groups = [dict(group) for group in self.param_groups]
        return {"param_groups": groups, "anchors": anchors, "params": len(params)}

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
        self._sync_groups()
        _check_saved(self, params, state_dict)
        groups = state_dict["param_groups"]
        sources = {params[i]: value for i, value in state_dict["anchors"].items()}
        dtypes = [value.dtype for value in sources.values()]
        anchors = anchor.allocate_all([*sources], dtypes, self._settings.anchor_device)
        self.state = defaultdict(dict)
        for (param, value), target in zip(sources.items(), anchors, strict=True):
            anchor.write(target, value)
            self.state[param]["anchor"] = target
        fresh = self.param_groups[0]["draw_index"] in (0, self._resumed)
        self._named, self._resumed = None, groups[0]["draw_index"] if fresh else None
        self.param_groups = [dict(group) for group in groups]
        self._reset_caches()

    def _before_step(self, optimizer, args, kwargs):
        if not optimizer.state and source.making_template():
            return None  # a checkpoint helper's step, not one of the training: it counts no draw
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._edit()
            return None
        # The gradients exist only after the closure: edit them inside, with one draw a step.
        draw = self.param_groups[0]["draw_index"]

        def guided_closure():
            loss = closure()
            for group in self.param_groups:
                group["draw_index"] = draw
            self._edit()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": guided_closure}
        return (args[0], guided_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _sum_partial_gradients(self, params: Sequence[Tensor]) -> None:
        """Sums partial gradients over their ranks; the sums become ``.grad``."""
        slot = self._replay
        replayed = [p for p in params if slot.get(p) is not None] if slot else []
        grads = [*(p.grad for p in params), *map(slot.get, replayed)]
        sums = sharding.sum_partial_gradients([*params, *replayed], grads)
        for p, grad, total in zip(params, grads, sums, strict=False):
            if total is not grad:
                p.grad = total
        slot.exchange(replayed, sums[len(params) :])

    def _refuse_partitions(self, params: Sequence[Tensor]) -> None:
        known = self._original_ids
        strange = (type(p) is Tensor and p.dim() == 1 and id(p) not in known for p in params)
        if "deepspeed" in sys.modules and any(strange):
            raise RuntimeError(
                "DeepSpeed's ZeRO has put flat partitions in place of the parameters and steps "
                "them one by one, of which dgg.Guidance would take wrong norms; use dgg.AdamW, "
                "dgg.Adam or dgg.SGD, which know it"
            )

    def _edit(self) -> None:
        self._sync_groups()
        run(self, _EDIT)

    def _check(self, groups, params: Sequence[Tensor], elementwise: bool) -> None:
        slot = self._replay
        self._refuse_partitions(params)
        self._sum_partial_gradients(params)
        labels = None
        for i, p in enumerate(params):
            r = slot.get(p) if slot else None
            for grad, kind in ((p.grad, "gradient"), (r, "replay gradient")):
                if grad is not None:
                    labels = labels or _arguments.group_labels(groups)
                    _arguments.check_gradient(grad, p, labels[i], kind)
                    _arguments.check_param(p, labels[i], stepped=True, elements=elementwise)
            value = self.state.get(p, {}).get("anchor")
            if value is not None and value.shape != p.shape:
                label = _arguments.group_labels(groups)[i]
                raise ValueError(
                    f"{label} has another shape than its anchor, {tuple(value.shape)}: call "
                    "set_anchor() after a parameter has changed its shape"
                )


def _check_saved(opt: Guidance, params: Sequence[Tensor], state_dict: Any) -> None:
    """Checks a state dict before anything is changed; see `Guidance.load_state_dict`."""
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
    groups = state_dict["param_groups"]
    if len(groups) != len(opt.param_groups) or state_dict["params"] != len(params):
        raise ValueError(
            f"the state dict is of {state_dict['params']} parameters in {len(groups)} groups, "
            f"the optimizer has {len(params)} in {len(opt.param_groups)}; load it beside the "
            "optimizer it was saved with"
        )
    for number, group in enumerate(groups):
        absent = [name for name in _arguments.GUIDANCE_OPTIONS if name not in group]
        if absent:
            raise KeyError(
                f"group {number} of the state dict lacks {absent}; pass what "
                "guidance.state_dict() returned"
            )
        _arguments.check_agreement(number, group, groups[0])
        _arguments.check_options(group)
    if opt.param_groups[0]["draw_index"] == 0:
        boundary.refuse_earlier(opt._named, groups)
    labels = _arguments.group_labels(opt.optimizer.param_groups)
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


def _decide(opt: Guidance) -> Decision:
    opt._replay.check_closed()
    options = opt._draws.options.read(opt.param_groups)
    decision = Decision(options, opt.param_groups, [], options["draw_index"])
    decision.strength = float(options["strength"])
    # The other optimizer moves the parameters past what an update could measure.
    decision.looks_ahead = False
    return decision


def _take_gradients(opt: Guidance, decision: Decision) -> list[backends.Rows]:
    """Takes the gradients; makes the missing ones of parameters with a replay gradient."""
    slot, groups = opt._replay, opt.optimizer.param_groups
    elementwise = decision.options["granularity"] == "element"
    # A GradScaler hands still scaled gradients to an optimizer that unscales by itself.
    scale, found_inf = (getattr(opt.optimizer, n, None) for n in ("grad_scale", "found_inf"))
    if slot and (found_inf is not None or gradients.unscaled_unseen()):
        raise RuntimeError(
            "Guidance.replay() does not go together with a GradScaler, which cannot unscale "
            "the replay gradients; use dgg.AdamW, or bfloat16 without a scaler"
        )
    if scale is None and found_inf is None and _take_native_gradients(opt, groups, elementwise):
        return opt._cache.all_rows
    params = [p for group in groups for p in group["params"]]
    opt._check(groups, params, elementwise)
    if scale is not None:
        gradients.refuse_scaler(params, opt.process_group)
    if scale is not None or found_inf is not None:
        backend, stepped = opt._settings.backend, [p for p in params if p.grad is not None]
        launched = bool(stepped) and all(
            backends.launches(backends.choose_for(backend, p), p.device) for p in stepped
        )
        decision.scaling, decision.skipped = gradients.read_scaler(
            scale, found_inf, stepped[0].device if launched else None
        )
    if decision.skipped:
        return []
    for p in params:
        shard = sharding.local(p.grad)
        if shard is None and slot and slot.get(p) is not None:
            p.grad = sharding.like(torch.zeros_like(sharding.local(p.detach())), p)
        elif shard is not None and not backends.is_dense(shard):
            # An expanded gradient cannot be written in place.
            shard = shard.clone(memory_format=torch.contiguous_format)
            p.grad = sharding.like(shard, p)
    grads, replays = [p.grad for p in params], slot.of(params)
    if opt._cache is None or not opt._cache.valid(opt, groups, params, grads, replays):
        opt._cache = RowCache(opt, groups, params, replays)
    opt._cache.take_gradients(grads, replays, elementwise=elementwise)
    return opt._cache.all_rows


def _take_native_gradients(opt: Guidance, groups, elementwise: bool) -> bool:
    """Takes the gradients natively and without checks, if only their values are new."""
    cache = opt._cache
    if cache is None:
        return False
    replays: list[Tensor | None] = []
    if opt._replay:
        replays = opt._replay.of(cache.params)
        # A parameter with a replay gradient alone is given a gradient by `_take_gradients`.
        pairs = zip(cache.params, replays, strict=True)
        if any([r is not None and p.grad is None for p, r in pairs]):
            return False
    if not cache.take_native_gradients(opt, groups, replays, elementwise=elementwise):
        return False
    # An expanded gradient cannot be written in place.
    if all([backends.is_dense(x) for x in cache.all_rows[0].odd_gradients()]):
        return True
    cache.abandon()
    return False


def _measure(opt: Guidance, decision: Decision, all_rows: list[backends.Rows]) -> list[Tensor]:
    """Draws and measures; decides whether the step changes any gradient."""
    for rows in all_rows:
        # The other optimizer has moved the parameters since the distances were measured.
        rows.forget(anchors=False)
    coefficients = norms.measure(opt, decision, all_rows)
    scaled = getattr(opt.optimizer, "grad_scale", None) is not None
    clips = decision.options["max_grad_norm"] is not None
    decision.hyper = [
        {
            "maximize": bool(group.get("maximize", False)),
            "strength": float(options["strength"]),
            "threshold": threshold(options["alpha"]),
        }
        for group, options in zip(opt.optimizer.param_groups, opt.param_groups, strict=True)
    ]
    decision.applies = bool(decision.injecting or clips or opt._replay or scaled)
    if not decision.applies:
        abandon(opt)
    return coefficients


def _finish(opt: Guidance, decision: Decision, all_rows, coefficients) -> None:
    if decision.applies and all_rows and getattr(opt.optimizer, "grad_scale", None) is not None:
        # The gradients are unscaled now; the optimizer must not divide them again.
        opt.optimizer.grad_scale = None
    finish(opt, decision, all_rows, coefficients)
    if decision.skipped:
        opt._last = norms.record_skipped(opt.optimizer.param_groups[0]["params"][0].device)


_EDIT = Verbs(_decide, _take_gradients, _measure, _finish, abandon)
