# SPDX-License-Identifier: BSD-3-Clause
"""`GuidanceCallback`: task boundaries, per-task alpha and logging of a guided optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dgg import _arguments, _callers, optim, sharding
from dgg._literals import Alphas, TensorsOrPath
from dgg._signatures import listed
from dgg.anchor.importance import check_form
from dgg.hf import between_trainings as between
from dgg.hf import importance as importances
from dgg.optim import summary
from dgg.optim.unwrap import find
from dgg.step.journal import Reader

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ImportError as error:  # pragma: no cover - needs an environment without transformers
    raise ImportError(
        'dgg.hf needs transformers and cannot import it; pip install "dgg[hf]"'
    ) from error

__all__ = ["GuidanceCallback", "is_active"]

logger = logging.getLogger("dgg.hf")  # the name in the documentation


@listed
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
    (mean c, if the optimizer clips), with ``alpha="auto"`` ``guidance/alignment`` and
    ``guidance/pull``, and ``guidance/task``; what no step measured is left out.
    The last entry of a training summarises all of it. Steps are not synchronised for this: the
    numbers stay on the device until the Trainer logs.

    The optimizer is one of dgg's, or another one under a `dgg.Guidance`: then the Trainer's
    checkpoints have the guidance in ``optimizer.pt``, beside the other optimizer's state.

    Args:
        alpha: Probability of injecting, or ``"auto"``: one for all tasks, one per task in order, or
            a mapping from task number to alpha. None leaves the optimizer's own. Groups with
            ``alpha=0`` beside others stay as they are.
        task: Number of the first task this callback sees, from 0; None counts by itself. A model's
            count then begins anew with it.
        anchor: The anchor of the first task this callback sees, instead of the weights it begins
            with: named tensors, or a path as `dgg.AdamW.set_anchor` takes it: a safetensors file
            or a directory written by ``save_pretrained`` (a model, an adapter), a Trainer's last
            checkpoint. A checkpoint from the middle of a training is refused.
        guide_first_task: Also guide task 0, towards the (pre-trained) weights it begins with.
        importance: For an optimizer with ``importance`` > 0, that of the first task this callback
            sees: what ``importance_dict()`` returned, or its path. None takes what the training
            before has left: in this process, or in ``importance.safetensors`` in the folder of
            ``anchor``. Every training writes that file into its ``output_dir`` at its end.

    Raises:
        TypeError: An argument is of the wrong type; when the training begins: the Trainer's
            optimizer is none of dgg's, and no `dgg.Guidance` guides it.
        ValueError: An alpha is out of range or missing for a task; when the training begins: the
            parameters that the model trains are not those the optimizer holds, or ``task`` is
            not the checkpoint's. At the first step: the optimizer holds parameters that neither
            are in the model nor have a gradient.
        RuntimeError: A training resumed in the middle of a guided task has lost its anchor, no
            parameter of the optimizer receives a gradient, or a `dgg.Guidance` guides an optimizer
            of DeepSpeed's or FSDP's, whose checkpoints cannot carry it.
        FileNotFoundError: ``anchor`` is a path with nothing to read.
    """

    def __init__(
        self,
        alpha: Alphas | None = None, *, task: int | None = None,
        anchor: TensorsOrPath | None = None, guide_first_task: bool = False,
        importance: TensorsOrPath | None = None,
    ) -> None:  # fmt: skip
        check_form(importance)
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
        self._anchor_source, self._importance_source = anchor, importance
        # Of the present training, or of the last one.
        self._task: int | None = None
        self._guided = self._running = self._stepped = False
        self._before_trial: list[int | None] = []  # in a search: the task before it
        self._origin = ""
        self._read: Reader | None = None  # of the optimizer's journal, from the training's begin on
        # By weak references, so that the adapters of former tasks are freed.
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._outside: list[tuple[str, nn.Parameter]] = []  # until a first step: not in the model

    # -- task boundaries ------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Sets the anchor and alpha of a new task; checks a resumed one."""
        model, opt = kwargs["model"], _found(kwargs["optimizer"])
        if isinstance(opt, optim.Guidance):
            _refuse_engines(args, opt)
            opt._sync_groups()
            opt._carried = True  # the checkpoints' optimizer.pt has the guidance, too
        opt._warned.boundary_known = True  # this callback sets the anchors
        if not getattr(args, "deepspeed", None):
            # Under DeepSpeed the optimizer has flat partitions instead of the model's parameters.
            self._check_parameters(opt, model)
        _warn_of_ignored_lr(args, opt)
        if self._before_trial:  # also if the trial was pruned
            self._task, self._running = self._before_trial.pop(), False
        if state.is_hyper_param_search:  # every trial is the same task again
            self._before_trial.append(self._task)
        saved_states: Any = state.stateful_callbacks
        saved = saved_states.get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[0]
        if state.global_step > 0:
            self._resume(opt, model, (saved or {}).get("attributes", {}))
        else:
            self._begin(opt, model)
        # The Trainer updates this entry when it saves. Checkpoints that were written without this
        # callback do not have it.
        saved_states.setdefault(type(self).__name__, self.state())
        self._running, self._stepped, self._read = True, False, Reader(opt._journal)
        _stand_before_loggers(self)

    def _begin(self, opt, model: nn.Module) -> None:
        task, core = self._upcoming(model), between.core(model)
        interrupted = (self._running and task == self._task) or between.unfinished.get(core) == task
        alpha = self._alpha_of(task)
        guided = task > 0 or self.guide_first_task or self._anchor_source is not None
        kept = opt._count_anchors() > 0 and opt.param_groups[0]["task_index"] == task
        if guided and interrupted and kept:
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
            guided = opt._count_anchors() > 0
            if interrupted and not guided:
                logger.warning(
                    "task %d was begun before and did not reach its end: it is begun anew and, as "
                    "the first task, not guided; if this is the next one, pass task=%d", task,
                    task + 1, stacklevel=_callers.stacklevel(),
                )  # fmt: skip
            self._origin = "set before the training"
        for group, left_out in zip(opt.param_groups, between.unguided_groups(opt), strict=True):
            group["task_index"] = task
            if alpha is not None and not left_out:
                group["alpha"] = alpha
        self._task, self._guided = task, guided

    def _set_anchor(self, opt, model: nn.Module, task: int) -> None:
        source = self._anchor_source
        if source is None:
            self._origin = "the weights this training began with"
        else:
            self._origin = "the tensors given" if isinstance(source, Mapping) else str(source)
        # Not set_anchor(): the Trainer's state says where a task begins, not the optimizer's.
        weights = importances.source_of(opt, between.core(model), self._importance_source, source)
        named = source is not None or weights is not None
        opt._place_anchor(source, model=model if named else None, task=task, importance=weights)

    def _resume(self, opt, model: nn.Module, saved: Mapping[str, Any]) -> None:
        anchored = opt._count_anchors()
        task = saved.get("_task")
        if task is None:
            task = opt.param_groups[0]["task_index"] if anchored else self._upcoming(model)
        if self.first_task not in (None, task):
            raise ValueError(
                f"the checkpoint was written in task {task} and this is GuidanceCallback(task="
                f"{self.first_task}): resuming would train task {task} further. Give every task "
                "an output_dir of its own, or set task= (DGG_TASK) to the checkpoint's"
            )
        if task < self._upcoming(model):
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
        elif not was_guided and (self.guide_first_task or source is not None):
            logger.warning(
                "%s of this callback is not in force: task %d was resumed and goes on unguided, as "
                "it began; begin it anew to have it guided",
                "guide_first_task=True" if source is None else "anchor=", task,
                stacklevel=_callers.stacklevel(),
            )  # fmt: skip
        self._task, self._guided = task, opt._count_anchors() > 0
        alpha = self._alpha_of(task)
        left_out, groups = between.unguided_groups(opt), opt.param_groups
        resumed_alpha = groups[left_out.index(False)]["alpha"]
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
            return
        core = between.core(kwargs["model"])
        done = 0 if self._task is None else self._task + 1
        if self.first_task is None:  # else it begins a series anew
            done = max(done, between.tasks_done.get(core, 0))
        between.tasks_done[core] = done
        between.unfinished.pop(core, None)
        self._anchor_source = self._importance_source = self.first_task = None
        opt, writes = _found(kwargs["optimizer"]), state.is_world_process_zero
        importances.keep(opt, kwargs["model"], core, args.output_dir, writes=writes)

    def _upcoming(self, model: nn.Module) -> int:
        if self.first_task is not None:
            return self.first_task
        if self._running and self._task is not None:
            return self._task
        upcoming = 0 if self._task is None else self._task + 1
        return max(upcoming, between.tasks_done.get(between.core(model), 0))

    def _alpha_of(self, task: int) -> float | str | None:
        alpha = self.alpha
        if alpha is None or isinstance(alpha, (float, str)):
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
        groups = _groups(opt)
        params = [p for group in groups for p in group["params"]]
        held, name_of = set(params), {p: name for name, p in model.named_parameters()}
        others = {p for module in _modules_beside_the_model() for p in module.parameters()}
        trained = {p: name for p, name in name_of.items() if p.requires_grad}
        missing = [name for p, name in trained.items() if p not in held]
        labels = _arguments.group_labels(groups)
        labelled = [(self._names.get(p) or n, p) for n, p in zip(labels, params, strict=True)]
        outside = [(label, p) for label, p in labelled if p not in name_of and p not in others]
        if missing or (outside and not trained):
            dead = [label for label, _ in outside]
            if missing:
                # Parameters frozen on purpose are no fault, unless others replaced them.
                dead += [n for p, n in name_of.items() if p in held and not p.requires_grad]
            raise _other_parameters(missing, dead)
        # A Trainer may train more than it holds in modules. Whether these are removed adapters is
        # known when there are gradients.
        self._outside = [(label, p) for label, p in outside if p.requires_grad]
        self._names.update(trained)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Checks at the first step that gradients reach the optimizer at all."""
        if self._stepped or getattr(args, "deepspeed", None):
            return
        opt = _found(kwargs["optimizer"])
        params = [p for group in _groups(opt) for p in group["params"]]
        if all(p.grad is None for p in params) and not opt._replay:
            raise RuntimeError(
                f"none of the optimizer's {len(params)} parameters has a gradient "
                f"({_shown([self._names.get(p) or str(tuple(p.shape)) for p in params])}): the "
                "forward pass does not use them. Make their adapter active (set_adapter) before "
                "the Trainer is made"
            )
        outside, self._outside = self._outside, []
        dead = [(n, p) for n, p in outside if p.grad is None and opt._replay.get(p) is None]
        # Several losses may take turns; but what was in the model before has been replaced.
        if dead and (len(dead) == len(outside) or any(p in self._names for _, p in dead)):
            raise _other_parameters([], [label for label, _ in dead])

    # -- logging --------------------------------------------------------------------------------

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Says once what is at work."""
        if not self._stepped:
            self._stepped = True
            if self._task is not None and not state.is_hyper_param_search:
                between.unfinished[between.core(kwargs["model"])] = self._task
            if state.is_world_process_zero:
                logger.info("%s", self._describe(_found(kwargs["optimizer"])))

    def _describe(self, opt) -> str:
        text = summary.head(opt)
        if not self._guided:
            return f"{text}; task {self._task}: not guided, there is no former task to protect"
        return f"{text}; task {self._task}, anchor: {self._origin}"

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Adds the guidance to an entry of the training (not to one of an evaluation)."""
        if logs is None or self._read is None or not ("loss" in logs or "train_loss" in logs):
            return
        means = self._read.totals() if "train_loss" in logs else self._read.means()
        if not means:
            return
        values: dict[str, Any] = {f"guidance/{name}": value for name, value in means.items()}
        values["guidance/task"] = self._task
        logs.update(values)
        # The Trainer has put a copy into its history before it calls the callbacks.
        history = state.log_history
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(values)


def is_active(trainer: Any) -> bool:
    """Returns whether guidance is really at work in a Trainer.

    True once the Trainer's optimizer is one of dgg's or guided by a `dgg.Guidance`, has been
    stepped, and has an anchor and an alpha and strength above 0. So it is False before ``train()``,
    in an unguided first task, and where somebody has replaced the optimizer.

    Args:
        trainer: A `transformers.Trainer`, during or after ``train()``.
    """
    try:
        opt = find(trainer.optimizer)
    except TypeError:
        return False
    groups = opt._marked_groups() if isinstance(opt, optim.Guidance) else opt.param_groups
    at_work = any(
        group["anchored"] and group["alpha"] != 0 and float(group["strength"]) > 0
        for group in groups
    )
    return at_work and opt.param_groups[0]["draw_index"] > 0


def _unwrap(optimizer, who: str, search=optim.unwrap):
    try:
        return search(optimizer)
    except TypeError as error:
        raise TypeError(
            f"{who} found no dgg optimizer in the Trainer ({error}). An `optim=` in "
            "TrainingArguments does not make one, and an 'optimizer' block in a DeepSpeed "
            "configuration replaces it: remove the block"
        ) from None


def _found(optimizer):
    """Returns the Trainer's dgg optimizer, or the guidance of another one."""
    return _unwrap(optimizer, "GuidanceCallback", find)


def _groups(opt) -> list[dict[str, Any]]:
    """Returns the groups that hold the parameters."""
    return getattr(opt, "optimizer", opt).param_groups


def _modules_beside_the_model() -> Iterator[nn.Module]:
    """Yields what else a Trainer among the callers trains, as the losses of sentence-transformers.

    With a loss for each data set there are steps without a gradient of some, or of all of them.
    """
    for trainer, _ in _callers.methods("train"):
        if isinstance(trainer, Trainer):
            for name, value in vars(trainer).items():
                values = value.values() if isinstance(value, Mapping) else [value]
                if name not in ("model", "model_wrapped"):
                    yield from (x for x in values if isinstance(x, nn.Module))


def _refuse_engines(args, guidance: optim.Guidance) -> None:
    """Refuses a `dgg.Guidance` where a checkpoint would not carry it."""
    sharded = any(sharding.is_dtensor(p) for group in _groups(guidance) for p in group["params"])
    if sharded or getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise RuntimeError(
            "GuidanceCallback does not go together with a dgg.Guidance under DeepSpeed or FSDP, "
            "whose checkpoints leave the guidance out; use dgg.AdamW, dgg.Adam or dgg.SGD there"
        )


def _checked_alpha(alpha: Any) -> Any:
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


def _checked_number(alpha: Any) -> float | str:
    _arguments.check_options({"alpha": alpha})
    return alpha if isinstance(alpha, str) else float(alpha)


def _other_parameters(missing: Sequence[str], dead: Sequence[str]) -> ValueError:
    return ValueError(
        "the parameters that the model trains are not those the optimizer holds. "
        f"Trainable but not in the optimizer: {_shown(missing)}. In the optimizer but removed from "
        f"the model or frozen: {_shown(dead)}. Another adapter was made active, merged or added "
        "after the optimizer was built: make a new Trainer (or set trainer.optimizer = None) after "
        "changing adapters, and freeze (requires_grad_(False)) what is not to be trained"
    )


def _shown(names: Sequence[str], most: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _warn_of_ignored_lr(args, opt) -> None:
    if isinstance(opt, optim.Guidance):
        return  # the other optimizer's is the user's, or made of the arguments
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
