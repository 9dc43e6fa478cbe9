# SPDX-License-Identifier: BSD-3-Clause
"""The same guidance for any other optimizer."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding
from dgg._literals import Alpha, Backend, Granularity, NormScope, ProcessGroup, TensorsOrPath
from dgg._signatures import listed
from dgg.anchor import boundary
from dgg.anchor import importance as importances
from dgg.checkpoint import source
from dgg.optim.gradient_edit import EDIT, GuideRule
from dgg.optim.in_groups import refuse_attributes
from dgg.optim.summary import Reporting
from dgg.step import checks
from dgg.step.cache import RowCache
from dgg.step.checks import Warned
from dgg.step.draws import Draws
from dgg.step.gradients import ReplaySlot
from dgg.step.journal import Journal
from dgg.step.run import run
from dgg.step.settings import Settings


@listed
class Guidance(Reporting):
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
        alpha: Probability of injecting the guidance at a step (α), or ``"auto"``; see `dgg.AdamW`.
        strength: Factor of the guidance's scale s.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False gives s = strength.
        norm_scope: ``"global"`` or ``"tensor"``.
        granularity: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm in the same pass, or None.
        replay_weight: Weight w of the replay gradients.
        importance: Weight of the importance in the pull; see `dgg.AdamW`.
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        importance_dtype: Storage dtype of the importance; None is the parameter's.
        anchor_device: Storage device of anchor and importance; None is the parameter's.
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
        self, optimizer: torch.optim.Optimizer, *, alpha: Alpha = 0.2, strength: float = 1.0,
        scaling: bool = True, norm_scope: NormScope = "global", granularity: Granularity = "step",
        max_grad_norm: float | None = None, replay_weight: float = 1.0, importance: float = 0.0,
        seed: int = 0, anchor_dtype: torch.dtype | None = None,
        importance_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None, process_group: ProcessGroup | None = None,
        backend: Backend | None = None,
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
            importance_dtype=_arguments.check_dtype("importance_dtype", importance_dtype),
        )
        self._options = {
            "alpha": alpha, "strength": strength, "scaling": scaling, "norm_scope": norm_scope,
            "granularity": granularity, "max_grad_norm": max_grad_norm,
            "replay_weight": replay_weight, "seed": seed, "draw_index": 0, "task_index": 0,
            "importance": importance, "importance_mean": 0.0, "route": "gradient",
        }  # fmt: skip
        _arguments.check_options(self._options)
        _arguments.guard_of([self._options], [False])
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
        self._draws, self._replay, self._warned = Draws(), ReplaySlot(), Warned()
        self._cache: RowCache | None = None
        self._last: dict[str, Any] | None = None
        self._journal = Journal()
        self._resumed: int | None = None
        self._named: int | None = None
        vars(optimizer)["_dgg_guided"] = True
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
        self, tensors: TensorsOrPath | None = None, *,
        model: torch.nn.Module | None = None, task: int | None = None,
        importance: TensorsOrPath | None = None,
    ) -> None:  # fmt: skip
        """Sets θ* to the present weights, named tensors or those of files.

        It is `dgg.AdamW.set_anchor`, with the same rule for ``task``; a resumed guidance is loaded
        by this class' `load_state_dict`.

        Args:
            tensors: The previous task's weights by name, or their path; None takes the present
                weights.
            model: Maps names to parameters.
            task: Number of the task that begins now, or goes on.
            importance: As in `dgg.AdamW.set_anchor`; the second moments are the guided
                optimizer's, if it keeps ``exp_avg_sq``.

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
        importances.check_wanted(importance, marked[0]["importance"])
        if not boundary.is_due(marked, tensors, task, self._resumed):
            return
        if tensors is None:
            checks.warn_if_anchor_follows(self._warned, int(marked[0]["draw_index"]))
        groups = self.optimizer.param_groups
        plan = functools.partial(
            boundary.plan_anchors, groups, boundary.anchors_in(self.state), tensors,
            boundary.model_of_tensors(tensors, model, importance), self._settings.anchor_dtype,
            self._settings.anchor_device,
        )  # fmt: skip
        weigh = functools.partial(boundary.plan_importance, self, groups, importance, model)
        boundary.place(self, groups, marked, plan, task, weigh)
        for group, mark in zip(self.param_groups, marked, strict=True):
            group.update({name: mark[name] for name in ("task_index", "importance_mean")})
        self._named = task

    @property
    def _shown(self) -> str:
        return f"Guidance({type(self.optimizer).__name__})"

    def _count_anchors(self) -> int:
        return sum("anchor" in entry for entry in self.state.values())

    def clear_anchor(self) -> None:
        """Drops the anchor: the gradients are left as they are from here on."""
        groups = self.optimizer.param_groups
        boundary.clear(self, groups, [{} for _ in groups])
        for group in self.param_groups:
            group["importance_mean"] = 0.0

    @torch.no_grad()
    def importance_dict(self, *, model: torch.nn.Module | None = None) -> dict[str, Tensor]:
        """Returns the sums of v̂ by name; see `dgg.AdamW.importance_dict`."""
        self._sync_groups()
        return importances.as_dict(self, self.optimizer.param_groups, model)

    def replay(self) -> contextlib.AbstractContextManager[None]:
        """Lets the gradients of the block become r; see `dgg.AdamW.replay`."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self._replay.record(params)

    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step; see `dgg.AdamW.clear_replay`."""
        self._replay.clear()

    def remove(self) -> None:
        """Takes the hook off the optimizer; the anchor is dropped."""
        self._handle.remove()
        self.clear_anchor()
        vars(self.optimizer)["_dgg_guided"] = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the options, the draw index and the anchors by parameter number."""
        self._sync_groups()
        for group in self.param_groups:
            _arguments.make_plain(group)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        entries = {i: self.state.get(p, {}) for i, p in enumerate(params)}
        anchors, weights = (
            {i: entry[name] for i, entry in entries.items() if name in entry}
            for name in ("anchor", "importance")
        )
        groups = [dict(group) for group in self.param_groups]
        saved = {"param_groups": groups, "anchors": anchors, "params": len(params)}
        return {**saved, "importances": weights} if weights else saved

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
        loaded: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        saved = state_dict["anchors"], state_dict.get("importances", {})
        for name, values in zip(("anchor", "importance"), saved, strict=True):
            dtypes = [value.dtype for value in values.values()]
            members = [params[i] for i in values]
            targets = anchor.allocate_all(members, dtypes, self._settings.anchor_device)
            for param, value, target in zip(members, values.values(), targets, strict=True):
                anchor.write(target, value)
                loaded[param][name] = target
        self.state = loaded
        fresh = self.param_groups[0]["draw_index"] in (0, self._resumed)
        self._named, self._resumed = None, groups[0]["draw_index"] if fresh else None
        self.param_groups = [{**_arguments.NEW_OPTIONS, **group} for group in groups]
        self._journal.begin_task()
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
        run(self, EDIT)

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
            entry = self.state.get(p, {})
            value = entry.get("anchor")
            if labels and (p.grad is not None or r is not None):
                checks.check_weighed(entry, self.param_groups[0]["importance"], labels[i])
            if value is not None and value.shape != p.shape:
                label = _arguments.group_labels(groups)[i]
                raise ValueError(
                    f"{label} has another shape than its anchor, {tuple(value.shape)}: call "
                    "set_anchor() after a parameter has changed its shape"
                )


refuse_attributes(Guidance)


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
        needed = set(_arguments.GUIDANCE_OPTIONS) - _arguments.NEW_OPTIONS.keys()
        absent = sorted(name for name in needed if name not in group)
        if absent:
            raise KeyError(
                f"group {number} of the state dict lacks {absent}; pass what "
                "guidance.state_dict() returned"
            )
        completed = [{**_arguments.NEW_OPTIONS, **each} for each in (group, groups[0])]
        _arguments.check_agreement(number, *completed)
        _arguments.check_options(group)
    ascends = [group.get("maximize") for group in opt.optimizer.param_groups]
    _arguments.guard_of(groups, ascends)
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
    weights = state_dict.get("importances", {})
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"the state dict's importances are a {type(weights).__name__}, not a dict by parameter "
            "number; pass what guidance.state_dict() returned"
        )
    for i in {*state_dict["anchors"], *weights}:
        if groups[0].get("importance") and i not in weights or i not in state_dict["anchors"]:
            raise KeyError(
                f"the state dict weighs its pull, but has no anchor and importance of parameter "
                f"{i!r}; pass what guidance.state_dict() returned"
            )
        if i in weights:
            importances.check_saved(weights[i], params[i], labels[i])
