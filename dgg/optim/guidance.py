# SPDX-License-Identifier: BSD-3-Clause
"""The same guidance for any other optimizer."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding
from dgg._literals import Alpha, Backend, Granularity, NormScope, ProcessGroup, TensorsOrPath
from dgg._signatures import listed
from dgg.anchor import boundary
from dgg.anchor import importance as importances
from dgg.checkpoint import source
from dgg.optim.construction import start_without_caches
from dgg.optim.gradient_edit import EDIT, GuideRule, refuse_partitions
from dgg.optim.guidance_state import check_saved
from dgg.optim.hooks import guided_closure, watch_zero_grad
from dgg.optim.in_groups import refuse_attributes
from dgg.optim.summary import Reporting
from dgg.step import checks
from dgg.step.run import run
from dgg.step.settings import Settings

# The attribute of an optimizer that has its guidance, and the key of that in its state dict.
GUIDED, CARRIED = "_dgg_guidance", "dgg_guidance"


@listed
class Guidance(Reporting):
    """Guides any other optimizer: a step pre-hook that edits ``.grad`` in one pass.

    Works with any `torch.optim.Optimizer` (Muon, bitsandbytes, torchao, Adafactor, ...). Before
    each of its steps every gradient becomes G = c (g + w r) + b s (θ - θ*), equation (5), in
    ``.grad`` itself. The optimizer then steps with G instead of the gradient.

    Unlike `dgg.AdamW` it cannot measure ‖θ - θ*‖ in the other optimizer's pass, so it reads the
    parameters once more on the steps that inject. Its anchors are not in the other's state (many
    optimizers take a state that is not empty for an initialised one), so save
    ``guidance.state_dict()`` beside ``optimizer.state_dict()``. In a training with a
    ``GuidanceCallback`` the latter has it, as ``"dgg_guidance"``, and loading it loads both.
    `replay` does not go together with a GradScaler, which does not see the replay gradients. torch
    copies and pickles optimizers without their hooks: a copy is not guided, make a new guidance
    over it.

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

    Examples:
        >>> opt = torch.optim.Muon(model.parameters())
        >>> guidance = dgg.Guidance(opt, alpha=0.2)
        >>> train(model, opt, first_task)
        >>> guidance.set_anchor()
        >>> train(model, opt, second_task)
    """

    process_group = sharding.ProcessGroup()
    # As if nobody had read the state: unlike that of `Stepped` it is not watched for reads.
    _state_read = False
    _new_rule = GuideRule
    # The state dicts of the optimizer carry the guidance's; a callback says so.
    _carried = False
    # Two parameters had one tensor as their gradient, at a step whose gradients were looked at.
    _shared_gradients = False
    # The guidance's part of a state dict that is loading.
    _arriving: Any = None

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
        if hasattr(optimizer, "guidance_stats") or getattr(optimizer, GUIDED, None) is not None:
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
            **_arguments.NEW_OPTIONS, "importance": importance,
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
        start_without_caches(self)
        vars(optimizer)[GUIDED] = self
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._into_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._unwatch = watch_zero_grad(optimizer, self._replay)

    def __reduce_ex__(self, protocol):
        """Refuses to be copied or pickled, since the hook would stay behind."""
        raise TypeError(
            "a Guidance can be neither copied nor pickled, its hook belongs to one optimizer: copy "
            "the optimizer, make a Guidance over the copy and load_state_dict() into it"
        )

    def _sync_groups(self) -> None:
        if len(self.param_groups) > len(self.optimizer.param_groups):
            refuse_partitions(self)
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has {len(self.optimizer.param_groups)} groups "
                f"left of the {len(self.param_groups)} whose options its dgg.Guidance has, which "
                "cannot tell which group has gone: put it back at its place (freeze parameters "
                "with requires_grad_(False)), or call remove() and make a new dgg.Guidance"
            )
        # Groups may be added to the optimizer at any time; they start with group 0's options.
        while len(self.param_groups) < len(self.optimizer.param_groups):
            first = self.param_groups[0] if self.param_groups else self._options
            self.param_groups.append(
                {**first, **{n: self._options[n] for n in _arguments.GROUP_OPTIONS}}
            )

    def _reset_caches(self) -> None:
        self._cache = None

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
        marked = self._marked_groups()
        task = None if task is None else _arguments.plain("task", task)
        importances.check_wanted(importance, marked[0]["importance"])
        if not boundary.is_due(marked, tensors, task, self._resumed):
            return
        if tensors is None:
            checks.warn_if_anchor_follows(self._warned, int(marked[0]["draw_index"]))
        self._place_anchor(tensors, model=model, task=task, importance=importance)
        self._named = task

    def _marked_groups(self) -> list[dict[str, Any]]:
        """Returns the groups with the mark that those of `dgg.AdamW` have."""
        self._refuse_removed()
        self._sync_groups()
        count = self._count_anchors()
        return [{**group, "anchored": count} for group in self.param_groups]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _place_anchor(self, tensors: Any, *, model: Any, task: int | None, importance: Any) -> None:
        """Sets the anchor as `set_anchor` does, without its rules about tasks."""
        marked, groups = self._marked_groups(), self.optimizer.param_groups
        plan = functools.partial(
            boundary.plan_anchors, groups, boundary.anchors_in(self.state), tensors,
            boundary.model_of_tensors(tensors, model, importance), self._settings.anchor_dtype,
            self._settings.anchor_device,
        )  # fmt: skip
        weigh = functools.partial(boundary.plan_importance, self, groups, importance, model)
        boundary.place(self, groups, marked, plan, task, weigh)
        for group, mark in zip(self.param_groups, marked, strict=True):
            names = ("task_index", "importance_mean", "importance_draw")
            group.update({name: mark[name] for name in names})

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
            group["importance_mean"], group["importance_draw"] = 0.0, None

    @torch.no_grad()
    def importance_dict(self, *, model: torch.nn.Module | None = None) -> dict[str, Tensor]:
        """Returns the sums of v̂ by name; see `dgg.AdamW.importance_dict`."""
        self._sync_groups()
        return importances.as_dict(self, self.optimizer.param_groups, model)

    def replay(self) -> contextlib.AbstractContextManager[None]:
        """Lets the gradients of the block become r; see `dgg.AdamW.replay`.

        A second ``zero_grad`` drops those of a step left out: one of the guided optimizer itself,
        not of Lightning's or Fabric's wrapper around it.
        """
        self._refuse_removed()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self._replay.record(params)

    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step; see `dgg.AdamW.clear_replay`."""
        self._replay.clear()

    def remove(self) -> None:
        """Takes the hooks off the optimizer; the anchor is dropped.

        `set_anchor`, `load_state_dict` and `replay`, which would do nothing, are errors from here
        on. A second call does nothing.
        """
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        self._unwatch()
        self.clear_replay()
        self.clear_anchor()
        vars(self.optimizer).pop(GUIDED, None)

    def _refuse_removed(self) -> None:
        if not self._handles:
            raise RuntimeError(
                f"remove() has taken this guidance off its {type(self.optimizer).__name__}, which "
                "it would guide no more: make a new dgg.Guidance(optimizer)"
            )

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
        names = [n for group in self.optimizer.param_groups for n in group.get("param_names", ())]
        if len(names) == len(params):  # by which a load sees that the order is another
            saved["param_names"] = names
        return {**saved, "importances": weights} if weights else saved

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned; anchors keep the dtype they were saved in.

        Args:
            state_dict: From ``state_dict()`` of a guidance over the same parameters.

        Raises:
            KeyError: The state dict is not one of a guidance.
            ValueError: Numbers of groups or parameters, their order (if named) or shapes differ.
                Nothing is changed.
        """
        self._refuse_removed()
        self._sync_groups()
        check_saved(self, state_dict)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        groups = state_dict["param_groups"]
        loaded: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for name, key in (("anchor", "anchors"), ("importance", "importances")):
            values = state_dict.get(key, {})
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

    def _into_state_dict(self, optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        return {**state_dict, CARRIED: self.state_dict()} if self._carried else None

    def _before_load(self, optimizer, state_dict: dict[str, Any]) -> None:
        self._arriving = state_dict.get(CARRIED)
        if self._arriving is not None:
            self._sync_groups()
            check_saved(self, self._arriving)  # before the optimizer has loaded its part

    def _after_load(self, optimizer) -> None:
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self.load_state_dict(arriving)

    def _before_step(self, optimizer, args, kwargs):
        if not optimizer.state and source.making_template():
            return None  # a checkpoint helper's step, not one of the training: it counts no draw
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._edit()
            return None
        guided = guided_closure(self, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": guided}
        return (args[0], guided, *args[2:]), kwargs

    def _edit(self) -> None:
        self._sync_groups()
        run(self, EDIT)


refuse_attributes(Guidance)
