# SPDX-License-Identifier: BSD-3-Clause
"""Lightning: task boundaries and logs of the guidance, by a callback.

    import lightning.pytorch as pl  # or pytorch_lightning
    import dgg.lightning

    guide = dgg.lightning.GuidanceCallback()
    for task in tasks:
        pl.Trainer(callbacks=[guide]).fit(module, task)  # configure_optimizers returns dgg.AdamW(…)

Lightning is two packages with a base class of callbacks each: this module takes that of the one
that was imported before, else of the one that is installed. ``import dgg`` imports neither.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from typing import Any

from dgg import _arguments, _callers, optim
from dgg.optim.unwrap import find

__all__ = ["GuidanceCallback"]


def _callback_class() -> type:
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", name):
                raise
    raise ImportError("dgg.lightning needs Lightning: pip install lightning")


# A class, which no type checker can know.
_Callback: Any = _callback_class()


class GuidanceCallback(_Callback):
    """Sets the anchor at the beginning of every task, and logs what guidance does.

    A call of ``trainer.fit()`` is one task. When it begins, the weights it begins with become the
    anchor; the first task has nothing to protect and is not guided. A training resumed with
    ``ckpt_path=`` is in the middle of its task: number, anchor and draws come from the checkpoint.

    Use one callback for all tasks. A script that runs a process per task says which one it is; a
    checkpoint of another task is then refused. The sums that ``importance=`` needs are handed from
    one task to the next, and are in Lightning's checkpoints.

    The optimizers are dgg's, or other ones for which ``configure_optimizers`` makes a
    `dgg.Guidance`; Lightning's checkpoints have its state in theirs.

    Every ``log_every_n_steps`` steps `dgg.AdamW.guidance_log` goes to the Trainer's loggers.

    Args:
        task: Number of the first task this callback sees, from 0; None is 0, or the checkpoint's.

    Raises:
        TypeError: ``task`` is no number; when the training begins: no optimizer is one of dgg's, or
            guided by a `dgg.Guidance`.
        ValueError: ``task`` is negative; when the training begins: it is not the checkpoint's.
    """

    def __init__(self, task: int | None = None) -> None:
        super().__init__()
        self.task = 0 if task is None else _arguments.plain("task", task)
        _arguments.check_options({"task_index": self.task})
        self._said = task is not None  # and the task that was said has not ended
        self._importance: list[dict[str, Any]] | None = None
        self._anchored: list[int] = []  # anchors of each optimizer in the task in progress
        self._running = False  # a task was begun and has not ended
        self._resumed = False  # a checkpoint was loaded, and no training has begun since
        self._fits = True  # what loads is for a training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets the anchor of a new task, or keeps that of a resumed one."""
        guided = self._guided(trainer)
        if self._running and not self._resumed:
            warnings.warn(
                f"task {self.task} was begun before and did not reach its end: its anchor becomes "
                "the weights of now, which are not those of the end of the task before. Resume "
                "with ckpt_path=, or begin anew with the former task's weights",
                stacklevel=_callers.stacklevel(),
            )
        if self._resumed:
            self._refuse_lost(guided)
        self._running, self._resumed = True, False
        nothing: list[Any] = [None] * len(guided)
        kept = self._importance or nothing
        if len(kept) != len(guided):
            raise RuntimeError(
                f"the former task had {len(kept)} optimizers of dgg and this one has "
                f"{len(guided)}: use a callback for each"
            )
        for opt, sums in zip(guided, kept, strict=True):
            if isinstance(opt, optim.Guidance):
                opt._carried = True
            # After a resumed checkpoint the state has its own; set_anchor then reads nothing.
            needed = opt.param_groups[0]["importance"] and self.task > 0
            more = {"importance": sums, "model": pl_module} if needed and sums is not None else {}
            opt.set_anchor(task=self.task, **more)
        self._anchored = [opt._count_anchors() for opt in guided]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs where the Trainer logs."""
        loop, every = trainer.fit_loop, trainer.log_every_n_steps
        if loop._should_accumulate() and pl_module.automatic_optimization:
            return
        # Not the Trainer's global_step, which counts the steps of all optimizers.
        if trainer.loggers and every and (loop.epoch_loop._batches_that_stepped + 1) % every == 0:
            guided = self._guided(trainer)
            for number, opt in enumerate(guided):
                end = f"/{number}" if len(guided) > 1 else ""
                found = {f"{name}{end}": float(x) for name, x in opt.guidance_log().items()}
                pl_module.log_dict(found)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Counts the task as done, and keeps what the next one's importance is made of."""
        guided, self._running, self._anchored = self._guided(trainer), False, []
        if trainer.fast_dev_run:
            return
        if any(opt.param_groups[0]["importance"] for opt in guided):
            self._importance = [opt.importance_dict(model=pl_module) for opt in guided]
        self.task, self._said = self.task + 1, False

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Counts a task that was resumed from a checkpoint of its end: nothing is trained then."""
        if self._resumed:
            self._resumed = False
            if self._running:
                self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of this callback."""
        return {
            "task": self.task, "importance": self._importance, "anchored": self._anchored,
            "running": self._running,
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Notes what for: a test of a checkpoint loads it into the callbacks, too."""
        self._fits = trainer.state.fn == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on in the task of a checkpoint, or after it if that was saved after its end."""
        if not self._fits:
            return
        if self._said and state_dict["task"] != self.task:
            raise ValueError(
                f"the checkpoint was written in task {state_dict['task']} and this is "
                f"GuidanceCallback(task={self.task}): resume with a checkpoint of that task, or "
                "leave out ckpt_path= and load the module's weights alone to begin it"
            )
        self.task, self._importance = state_dict["task"], state_dict["importance"]
        self._anchored = state_dict.get("anchored", [])
        self._resumed, self._running = True, state_dict.get("running", True)

    def _refuse_lost(self, guided: list[Any]) -> None:
        """Raises a RuntimeError if a checkpoint had an anchor that was not loaded."""
        for opt, before in zip(guided, self._anchored, strict=False):
            if before and not opt._count_anchors():
                raise RuntimeError(
                    f"resuming in the middle of task {self.task}, which was guided, but the "
                    "checkpoint has brought no anchor, and the weights of now are not those the "
                    "task began with: the optimizer's state was saved or loaded without that of "
                    "its dgg.Guidance. Begin the task anew from the former task's weights, or save "
                    "guidance.state_dict() by yourself"
                )

    def _guided(self, trainer: Any) -> list[Any]:
        """Returns dgg's optimizers among the Trainer's, and the guidances of others."""
        found = []
        for wrapped in trainer.optimizers:
            with contextlib.suppress(TypeError):
                found.append(find(wrapped))
        if not found:
            kinds = ", ".join(type(x).__name__ for x in trainer.optimizers)
            raise TypeError(
                f"configure_optimizers returned {kinds or 'no optimizer'}, none of dgg's: return "
                "dgg.AdamW(...), make a dgg.Guidance(optimizer), or leave out GuidanceCallback"
            )
        return found
