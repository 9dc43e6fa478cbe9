# SPDX-License-Identifier: BSD-3-Clause
"""One line that guides every Trainer of a process, for frameworks that make their Trainer."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import transformers

from dgg import optim
from dgg._literals import Alphas
from dgg.hf.callback import GuidanceCallback

TASK_VARIABLE = "DGG_TASK"
# What a Trainer may be told to take where dgg's optimizer stands in for it.
_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adamw_torch_xla")

_trainer: Any = transformers.Trainer
_installed: Installed | None = None


class _Choice:
    """Stands for `Trainer.get_optimizer_cls_and_kwargs` and answers for the guided Trainers.

    Not `optimizer_cls_and_kwargs` of the Trainer: subclasses would then leave out what they add to
    the answer, as sentence-transformers the parameters of a loss and learning rates by name.
    """

    def __init__(self, former: Any):
        self._former = former

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        former = self._former.__get__(trainer, owner)
        choice = None if trainer is None else vars(trainer).get("_dgg_choice")
        if choice is None:
            return former
        # Asked when the optimizer is made: a search sets the training's arguments before that.
        optimizer, options = choice
        return functools.wraps(former)(lambda args, model=None: _chosen(optimizer, options, args))


class Installed:
    """What `install` has put into transformers; `remove` takes it out again.

    Attributes:
        callback: The `GuidanceCallback` of every Trainer whose optimizer is made here.
    """

    def __init__(
        self, optimizer: type, options: dict[str, Any],
        callback: GuidanceCallback, other: GuidanceCallback,
    ) -> None:  # fmt: skip
        self.callback = callback
        self._former = former = _trainer.__init__
        choice = vars(_trainer)["get_optimizer_cls_and_kwargs"]
        if not isinstance(choice, _Choice):
            # For good: a guided Trainer may outlive the handle that guides it.
            _trainer.get_optimizer_cls_and_kwargs = _Choice(choice)

        @functools.wraps(former)
        def begin(trainer: Any, *args: Any, **kwargs: Any) -> None:
            former(trainer, *args, **kwargs)
            if not self._works:
                return
            # What a Trainer is given stays; the callback tells if it is none of dgg's.
            makes = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
            if makes:
                _chosen(optimizer, options, trainer.args)  # what is wrong is said here
                trainer._dgg_choice = optimizer, options
            callbacks = trainer.callback_handler.callbacks
            if not any(isinstance(known, GuidanceCallback) for known in callbacks):
                trainer.add_callback(callback if makes else other)

        self._begin, self._works = begin, True
        _trainer.__init__ = begin

    def remove(self) -> None:
        """Gives the Trainers that are made from here on what they had before."""
        global _installed
        self._works = False
        if _installed is self:
            _installed = None
        if _trainer.__init__ is self._begin:  # else another library has put its own around it
            _trainer.__init__ = self._former


def _chosen(
    optimizer: type, options: dict[str, Any], args: transformers.TrainingArguments
) -> tuple[type, dict[str, Any]]:
    """Returns class and arguments of the optimizer."""
    name = str(getattr(args.optim, "value", args.optim))
    is_sgd = issubclass(optimizer, torch.optim.SGD)
    known = ("sgd",) if is_sgd else _ADAM
    if name not in known:
        raise ValueError(
            f"optim={name!r} of the training's arguments is not in force: dgg.hf.install() has "
            f"put dgg.{optimizer.__name__} in its place. Set optim={known[0]!r}, or "
            "give this Trainer another optimizer in its own arguments"
        )
    if args.optim_args:
        raise ValueError(
            f"optim_args={args.optim_args!r} is not read: pass dgg.hf.install() the arguments "
            "of the optimizer"
        )
    found: dict[str, Any] = {"lr": args.learning_rate}
    if not is_sgd:
        found |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return optimizer, found | options


def install(
    alpha: Alphas = 0.2, *,
    task: int | None = None, anchor: Any = None, optimizer: type = optim.AdamW, **options: Any,
) -> Installed:  # fmt: skip
    """Gives every Trainer that is made from here on a dgg optimizer and a `GuidanceCallback`.

    For frameworks that make a Trainer out of a configuration (LLaMA-Factory, ms-swift, axolotl) and
    for scripts that are not to be changed: call it before they make their Trainer, in every
    process. Learning rate, betas and eps come from the training's arguments, weight decay too;
    what the Trainer's class adds, such as learning rates by name, stays. Trainers that are given
    an optimizer of their own keep it and its alpha; the callback then stops the training if it is
    none of dgg's. Trainers that are given a `GuidanceCallback` keep that one alone. A second call
    takes the place of the first.

    Args:
        alpha: As in `GuidanceCallback`: for all tasks, or by task.
        task: Number of the task that this process trains, from 0. None takes the environment
            variable ``DGG_TASK``; without it tasks are counted, a call of ``train()`` each.
        anchor: As in `GuidanceCallback`: where the former task's weights are, if a process
            does not begin with them.
        optimizer: `dgg.AdamW`, `dgg.Adam` or `dgg.SGD`.
        options: Further arguments of the optimizer, such as ``importance=0.5``; they win over
            those of the training.

    Returns:
        A handle, whose ``.remove()`` undoes it.

    Raises:
        TypeError: The optimizer is none of dgg's or does not know an argument.
        ValueError: An argument is out of range, or ``DGG_TASK`` is no number. Nothing is changed.

    Examples:
        >>> dgg.hf.install(alpha=0.2, task=3)
        >>> llamafactory.train.tuner.run_exp(config)
    """
    global _installed
    known = (optim.AdamW, optim.Adam, optim.SGD)
    if not (isinstance(optimizer, type) and issubclass(optimizer, known)):
        raise TypeError(f"optimizer={optimizer!r} must be dgg.AdamW, dgg.Adam or dgg.SGD")
    if "params" in options:
        raise TypeError("params are those of the Trainer's model; leave them out")
    if "weight_decay" in options:  # which the Trainer puts into every group
        raise TypeError("weight_decay is that of the training's arguments; set it there")
    optimizer(
        [torch.nn.Parameter(torch.zeros(1, device="cpu", dtype=torch.float32))],
        **{"lr": 1e-3, **options},
    )
    if task is None and TASK_VARIABLE in os.environ:
        value = os.environ[TASK_VARIABLE]
        if not value.isascii() or not value.isdigit():
            raise ValueError(f"{TASK_VARIABLE}={value!r} must be the number of the task, from 0")
        task = int(value)
    callback, other = (GuidanceCallback(x, task=task, anchor=anchor) for x in (alpha, None))
    if isinstance(callback.alpha, (float, str)):
        options["alpha"] = callback.alpha  # in force also under a callback of the Trainer's own
    if _installed is not None:
        _installed.remove()
    _installed = Installed(optimizer, options, callback, other)
    return _installed
