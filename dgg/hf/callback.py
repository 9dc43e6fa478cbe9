# SPDX-License-Identifier: BSD-3-Clause
"""`GuidanceCallback`: task boundaries, per-task alpha and logging of a guided optimizer."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dgg import _arguments, _callers, backends, optim

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ImportError as error:  # pragma: no cover - needs an environment without transformers
    raise ImportError(
        'dgg.hf needs transformers and cannot import it; pip install "dgg[hf]"'
    ) from error

__all__ = ["GuidanceCallback", "is_active"]

logger = logging.getLogger("dgg.hf")  # the name in the documentation

# Number of finished trainings by model, so that tasks are counted also in scripts that make a new
# Trainer and a new callback for every task.
_tasks_done: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class GuidanceCallback(TrainerCallback, ExportableState):
    """Sets the anchor at task boundaries, sets alpha per task, logs the guidance.

    **The rule.** A call of ``trainer.train()`` is one task. When it begins, and only then, the
    weights it begins with become the anchor; the first task has nothing to protect and is not
    guided. A training resumed from a checkpoint is in the middle of its task: number, anchor,
    alpha and draw index come from the checkpoint, and nothing is snapshotted. A training that
    was interrupted and begins anew with the same optimizer keeps its anchor.

    Tasks are counted per callback and per model, whichever is higher, so one callback may serve
    all tasks or every task have its own, with one Trainer or many. A script that runs a process
    per task says which one it is: ``GuidanceCallback(task=2)``.

    In the log entries of the training, and so in every logger: ``guidance/injected`` (share of
    the steps since the last entry that were guided), ``guidance/scale`` (mean s of these),
    ``guidance/distance`` (mean ‖θ - θ*‖), ``guidance/grad_norm`` (mean ‖g‖), ``guidance/clip``
    (mean c, if the optimizer clips) and ``guidance/task``; what no step measured is left out.
    The last entry of a training summarises all of it. Steps are not synchronised for this: the
    numbers stay on the device until the Trainer logs.

    Args:
        alpha: Probability of injecting: one number, one per task in order, or a mapping from
            task number to alpha. None leaves the optimizer's own.
        task: Number of the first task this callback sees, from 0; None counts by itself.
        anchor: The anchor of the first task this callback sees, instead of the weights it begins
            with: named tensors, or a path as `dgg.AdamW.set_anchor` takes it: a safetensors file
            or a directory written by ``save_pretrained`` (a model, an adapter), a Trainer's last
            checkpoint. A checkpoint from the middle of a training is refused.
        guide_first_task: Also guide task 0, towards the (pre-trained) weights it begins with.

    Raises:
        TypeError: An argument is of the wrong type; when the training begins: the Trainer's
            optimizer is none of dgg's.
        ValueError: An alpha is out of range or missing for a task; when the training begins: the
            parameters that the model trains are not those the optimizer holds, or ``task`` is
            not the checkpoint's.
        RuntimeError: A training resumed in the middle of a guided task has lost its anchor, or
            no parameter of the optimizer receives a gradient.
        FileNotFoundError: ``anchor`` is a path with nothing to read.
    """

    def __init__(
        self, alpha: float | Sequence[float] | Mapping[int, float] | None = None, *,
        task: int | None = None, anchor: Mapping[str, Tensor] | str | os.PathLike | None = None,
        guide_first_task: bool = False,
    ) -> None:  # fmt: skip
        self.alpha = _checked_alpha(alpha)
        if task is not None:
            task = _arguments.plain("task", task)
            _arguments.check_options({"task_index": task})
        if anchor is not None and not isinstance(anchor, (Mapping, str, os.PathLike)):
            raise TypeError(
                f"anchor= must be named tensors or the path of a safetensors file or directory, "
                f"not {type(anchor).__name__}"
            )
        if not isinstance(guide_first_task, bool):
            raise TypeError(f"guide_first_task={guide_first_task!r} must be True or False")
        self.first_task = task
        self.guide_first_task = guide_first_task
        self._anchor_source = anchor
        # Of the present training, or of the last one.
        self._task: int | None = None
        self._guided = self._running = self._stepped = False
        self._origin = ""
        self._window = _Window()
        # By weak references, so that the adapters of former tasks are freed.
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # -- task boundaries ------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Sets the anchor and alpha of a new task; checks a resumed one."""
        model, opt = kwargs["model"], _unwrap(kwargs["optimizer"])
        opt._warned.boundary_known = True  # this callback sets the anchors
        if not getattr(args, "deepspeed", None):
            # Under DeepSpeed the optimizer has flat partitions instead of the model's parameters.
            self._check_parameters(opt, model)
        _warn_of_ignored_lr(args, opt)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[0]
        if state.global_step > 0:
            self._resume(opt, model, (saved or {}).get("attributes", {}))
        else:
            self._begin(opt, model)
        # The Trainer updates this entry when it saves. Checkpoints that were written without this
        # callback do not have it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._running, self._stepped, self._window = True, False, _Window()
        _stand_before_loggers(self)

    def _begin(self, opt, model: nn.Module) -> None:
        task = self._upcoming(model)
        interrupted = self._running and task == self._task
        alpha = self._alpha_of(task)
        guided = task > 0 or self.guide_first_task or self._anchor_source is not None
        if guided and interrupted and _anchored(opt):
            self._origin = "kept from before the interruption"
        elif guided:
            if interrupted:
                logger.warning(
                    "task %d was begun before and did not reach its end: its anchor becomes the "
                    "weights of now, not those it began with; pass anchor= or resume from a "
                    "checkpoint to keep them", task, stacklevel=_callers.stacklevel(),
                )  # fmt: skip
            self._set_anchor(opt, model, task)
        else:
            # An anchor set by hand before the first task stays.
            guided = _anchored(opt) > 0
            self._origin = "set before the training"
        for group in opt.param_groups:
            group["task_index"] = task
            if alpha is not None:
                group["alpha"] = alpha
        self._task, self._guided = task, guided

    def _set_anchor(self, opt, model: nn.Module, task: int) -> None:
        source = self._anchor_source
        if source is None:
            self._origin = "the weights this training began with"
        else:
            self._origin = "the tensors given" if isinstance(source, Mapping) else str(source)
        # Not set_anchor(): the Trainer's state says where a task begins, not the optimizer's.
        opt._place_anchor(source, model=None if source is None else model, task=task)

    def _resume(self, opt, model: nn.Module, saved: Mapping[str, Any]) -> None:
        anchored = _anchored(opt)
        task = saved.get("_task")
        if task is None:
            task = opt.param_groups[0]["task_index"] if anchored else self._upcoming(model)
        elif task < (self.first_task or 0):
            raise ValueError(
                f"the checkpoint was written in task {task} and this is GuidanceCallback(task="
                f"{self.first_task}): resuming would train the former task again. Give every task "
                "an output_dir of its own, or set task= to the checkpoint's"
            )
        elif task < self._upcoming(model):
            logger.warning(
                "the checkpoint was written in task %d, which came to its end already: it is "
                "trained further; give every task an output_dir of its own if that is not meant",
                task, stacklevel=_callers.stacklevel(),
            )  # fmt: skip
        self._origin = "the checkpoint"
        source = self._anchor_source
        was_guided = saved.get("_guided", task > 0 or self.guide_first_task or source is not None)
        if was_guided and not anchored:
            if source is None:
                raise RuntimeError(
                    f"resuming in the middle of task {task}, which was guided, but the checkpoint "
                    "has no anchor, and the weights of now are not those the task began with. "
                    "Resume from a checkpoint with optimizer.pt (save_only_model=False), or pass "
                    "GuidanceCallback(anchor=...) with the previous task's weights"
                )
            self._set_anchor(opt, model, task)
        self._task, self._guided = task, _anchored(opt) > 0
        alpha, resumed_alpha = self._alpha_of(task), opt.param_groups[0]["alpha"]
        if alpha is not None and alpha != resumed_alpha:
            logger.warning(
                "alpha=%s of this callback is not in force: task %d was resumed and goes on with "
                "the checkpoint's alpha=%s", alpha, task, resumed_alpha,
                stacklevel=_callers.stacklevel(),
            )  # fmt: skip

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Counts the task as done; the next training is another one."""
        self._running = False
        if state.is_hyper_param_search:
            return  # Every trial is the same task again.
        self._anchor_source = self.first_task = None
        core = _core(kwargs["model"])
        _tasks_done[core] = max(self._task + 1, _tasks_done.get(core, 0))

    def _upcoming(self, model: nn.Module) -> int:
        if self.first_task is not None:
            return self.first_task
        if self._running:
            return self._task
        upcoming = 0 if self._task is None else self._task + 1
        return max(upcoming, _tasks_done.get(_core(model), 0))

    def _alpha_of(self, task: int) -> float | None:
        alpha = self.alpha
        if alpha is None or isinstance(alpha, float):
            return alpha
        if isinstance(alpha, dict):
            by_task, remedy = alpha, f"add the key {task}"
        else:
            by_task, remedy = dict(enumerate(alpha)), "give one alpha per task, the first included"
        if task in by_task:
            return by_task[task]
        raise ValueError(f"alpha={alpha} has no value for task {task}; {remedy}")

    def state(self) -> dict[str, Any]:
        """Returns what a Trainer checkpoint keeps of this callback."""
        arguments = {"alpha": self.alpha, "task": self.first_task}
        arguments["guide_first_task"] = self.guide_first_task
        return {"args": arguments, "attributes": {"_task": self._task, "_guided": self._guided}}

    # -- checks ---------------------------------------------------------------------------------

    def _check_parameters(self, opt, model: nn.Module) -> None:
        params = [p for group in opt.param_groups for p in group["params"]]
        ids = {id(p) for p in params}
        ids_in_model = {id(p) for p in model.parameters()}
        named = list(model.named_parameters())
        missing = [name for name, p in named if p.requires_grad and id(p) not in ids]
        dead = [
            self._names.get(p) or label
            for p, label in zip(params, _arguments.group_labels(opt.param_groups), strict=True)
            if id(p) not in ids_in_model
        ]
        if missing or dead:
            if missing:
                # Parameters frozen on purpose are no fault, unless others replaced them.
                dead += [n for n, p in named if id(p) in ids and not p.requires_grad]
            raise ValueError(
                "the parameters that the model trains are not those the optimizer holds. "
                f"Trainable but not in the optimizer: {_shown(missing)}. In the optimizer but "
                f"removed from the model or frozen: {_shown(dead)}. Another adapter was made "
                "active, merged or added after the optimizer was built: make a new Trainer (or "
                "set trainer.optimizer = None) after changing adapters, and freeze "
                "(requires_grad_(False)) what is not to be trained"
            )
        for name, p in named:
            if p.requires_grad:
                self._names[p] = name

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Checks at the first step that gradients reach the optimizer at all."""
        if self._stepped or getattr(args, "deepspeed", None):
            return
        opt = _unwrap(kwargs["optimizer"])
        params = [p for group in opt.param_groups for p in group["params"]]
        if all(p.grad is None for p in params) and not opt._replay:
            raise RuntimeError(
                f"none of the optimizer's {len(params)} parameters has a gradient "
                f"({_shown([self._names.get(p) or str(tuple(p.shape)) for p in params])}): the "
                "forward pass does not use them. Make their adapter active (set_adapter) before "
                "the Trainer is made"
            )

    # -- logging --------------------------------------------------------------------------------

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Keeps the step's statistics, on the device; says once what is at work."""
        opt = _unwrap(kwargs["optimizer"])
        self._window.add(opt.guidance_stats())
        if not self._stepped:
            self._stepped = True
            if state.is_world_process_zero:
                logger.info("%s", self._describe(opt))

    def _describe(self, opt) -> str:
        pieces = "tensors" if opt._deepspeed_driver() is None else "partitions of this rank"
        # From the ownership, since DeepSpeed's ZeRO-3 keeps the groups empty between the steps.
        members = opt._ownership.tensors(opt.param_groups)
        devices = {p.device for params in members for p in params}
        names = sorted({backends.choose(opt._settings.backend, device) for device in devices})
        text = f"dgg.{type(opt).__name__} (backend {', '.join(names)}), task {self._task}: "
        if not self._guided:
            return text + "not guided, there is no former task to protect"
        anchors = [s["anchor"] for s in opt.state.values() if "anchor" in s]
        size = sum(a.numel() * a.element_size() for a in anchors) / 2**20
        alphas = sorted({float(group["alpha"]) for group in opt.param_groups})
        return text + (
            f"alpha {', '.join(f'{a:g}' for a in alphas)}, anchor of {len(anchors)} {pieces} "
            f"({size:.1f} MiB): {self._origin}"
        )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Adds the guidance to an entry of the training (not to one of an evaluation)."""
        if logs is None or not ("loss" in logs or "train_loss" in logs):
            return
        values = self._window.totals() if "train_loss" in logs else self._window.means()
        if not values:
            return
        values["guidance/task"] = self._task
        logs.update(values)
        # The Trainer has put a copy into its history before it calls the callbacks.
        history = state.log_history
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(values)


class _Window:
    """Means of the steps' statistics; reading them is the only synchronisation."""

    # Steps after which statistics are summed on the device. Without logging, an epoch would
    # otherwise keep the tensors of all its steps.
    _FOLD = 64

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor | None]] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._totals: dict[str, tuple[float, int]] = {}

    def add(self, stats: dict[str, Tensor | None]) -> None:
        """Adds one step's statistics."""
        self._rows.append(stats)
        if len(self._rows) >= self._FOLD:
            self._fold()

    def _fold(self) -> None:
        for name in ("injected", "scale", "grad_norm", "distance", "clip"):
            values = [row[name].float().mean() for row in self._rows if row[name] is not None]
            if values:
                total, count = torch.stack(values).sum(), len(values)
                if name in self._sums:
                    total, count = self._sums[name][0] + total, self._sums[name][1] + count
                self._sums[name] = total, count
        self._rows.clear()

    def means(self) -> dict[str, float]:
        """Returns the means of the steps since the last call; empty if there were none."""
        return self._means(self._drain())

    def totals(self) -> dict[str, float]:
        """Returns the means of all steps."""
        self._drain()
        return self._means(self._totals)

    def _drain(self) -> dict[str, tuple[float, int]]:
        self._fold()
        if not self._sums:
            return {}
        numbers = torch.stack([total for total, _ in self._sums.values()]).tolist()
        counts = [count for _, count in self._sums.values()]
        sums = dict(zip(self._sums, zip(numbers, counts, strict=True), strict=True))
        self._sums.clear()
        for name, (number, count) in sums.items():
            total, steps = self._totals.get(name, (0.0, 0))
            self._totals[name] = (total + number, steps + count)
        return sums

    @staticmethod
    def _means(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
        means = {f"guidance/{name}": total / count for name, (total, count) in sums.items()}
        # s is 0 on the steps that inject nothing; its mean is over the steps that inject.
        scale = means.pop("guidance/scale", 0.0)
        if means.get("guidance/injected"):
            means["guidance/scale"] = scale / means["guidance/injected"]
        return means


def is_active(trainer) -> bool:
    """Returns whether guidance is really at work in a Trainer.

    True once the Trainer's optimizer is one of dgg's, has been stepped, and has an anchor and an
    alpha and strength above 0. So it is False before ``train()``, in an unguided first task, and
    where somebody has replaced the optimizer.

    Args:
        trainer: A `transformers.Trainer`, during or after ``train()``.
    """
    try:
        opt = optim.unwrap(trainer.optimizer)
    except TypeError:
        return False
    at_work = any(
        group["anchored"] and float(group["alpha"]) > 0 and float(group["strength"]) > 0
        for group in opt.param_groups
    )
    return at_work and opt.param_groups[0]["draw_index"] > 0


def _unwrap(optimizer, who: str = "GuidanceCallback"):
    try:
        return optim.unwrap(optimizer)
    except TypeError as error:
        raise TypeError(
            f"{who} found no dgg optimizer in the Trainer ({error}). An `optim=` in "
            "TrainingArguments does not make one, and an 'optimizer' block in a DeepSpeed "
            "configuration replaces it: remove the block"
        ) from None


def _checked_alpha(alpha: Any) -> float | list[float] | dict[int, float] | None:
    if alpha is None:
        return None
    if getattr(alpha, "ndim", 0) == 1 and len(alpha) != 1:
        alpha = alpha.tolist()  # an array of numpy's or torch's, one for every task
    if isinstance(alpha, Mapping):
        try:
            # A Trainer checkpoint is JSON, where keys are text.
            by_task = {int(task): value for task, value in alpha.items()}
        except (TypeError, ValueError):
            raise TypeError(f"alpha={alpha!r} must map task numbers to numbers") from None
        return {task: _checked_number(value) for task, value in by_task.items()}
    if isinstance(alpha, Sequence) and not isinstance(alpha, str):
        return [_checked_number(value) for value in alpha]
    return _checked_number(alpha)


def _checked_number(alpha: Any) -> float:
    _arguments.check_options({"alpha": alpha})
    return float(alpha)


def _anchored(opt) -> int:
    return sum(group["anchored"] for group in opt.param_groups)


def _core(model: nn.Module) -> nn.Module:
    # The model inside peft's wrapper: it outlives merge_and_unload and a second get_peft_model.
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _shown(names: Sequence[str], most: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _warn_of_ignored_lr(args, opt) -> None:
    default = type(args).__dataclass_fields__["learning_rate"].default
    group = opt.param_groups[0]
    rate = float(group.get("initial_lr", group["lr"]))
    if args.learning_rate not in (default, rate):
        logger.warning(
            "learning_rate=%g of TrainingArguments is not used: optimizer_cls_and_kwargs has its "
            "own, here %g; put lr there", args.learning_rate, rate,
            stacklevel=_callers.stacklevel(),
        )  # fmt: skip


def _stand_before_loggers(callback: TrainerCallback) -> None:
    """Puts the callback before the Trainer's reporting callbacks.

    The Trainer calls TensorBoard, W&B and the like before any callback of the user, and callbacks
    can add to an entry only by being called before them. The handler with the list of callbacks is
    among the callers. If it is not found, the history and the printed entries have the numbers.
    """
    for handler, _ in _callers.methods():
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # In place and with the same length: the handler is iterating over this list.
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
