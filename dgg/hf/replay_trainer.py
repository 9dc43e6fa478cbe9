# SPDX-License-Identifier: BSD-3-Clause
"""`ReplayTrainer`, `with_replay`: a Trainer with a second backward pass, on old examples.

The passes are those of the Trainer: its own `training_step` is called again, under
``opt.replay()``, so that the loss, its scaling, autocast, activation offloading and what a subclass
adds are the same for old examples as for new ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

from dgg import _callers
from dgg.hf.callback import GuidanceCallback, _unwrap, logger
from dgg.replay import ReplayBuffer
from dgg.replay.arguments import as_ratio
from dgg.replay.buffer import course

__all__ = ["ReplayTrainer", "with_replay"]

MEMORY_NAME = "replay_buffer.pt"  # in a checkpoint, beside optimizer.pt

if TYPE_CHECKING:  # it stands before a Trainer's class in the bases of every class
    _Trainer = Trainer
else:
    _Trainer = object


# The bound of an optimizer's own, and the one that a Trainer has put into its groups.
_handed: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _own_bound(opt) -> Any:
    """Returns the `max_grad_norm` of an optimizer without that of a former training."""
    bound = opt.param_groups[0]["max_grad_norm"]  # of all groups
    own, handed = _handed.get(opt, (bound, bound))
    return own if bound == handed else bound


class _Replay(_Trainer):
    """What is put before a Trainer's class; see `ReplayTrainer`."""

    def __init__(
        self, *args: Any, replay_buffer: ReplayBuffer | None = None, replay_ratio: float = 0.25,
        replay_collator: Callable[[list[Any]], Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if replay_buffer is not None and not isinstance(replay_buffer, ReplayBuffer):
            raise TypeError(
                f"replay_buffer= must be a dgg.ReplayBuffer, not {type(replay_buffer).__name__}"
            )
        if replay_collator is not None and not callable(replay_collator):
            raise TypeError(
                f"replay_collator= must be a function of a list of examples, not "
                f"{type(replay_collator).__name__}"
            )
        if as_ratio(replay_ratio) == 0:
            raise ValueError("replay_ratio=0 replays nothing; pass no replay_buffer instead")
        self.replay_buffer = replay_buffer
        self.replay_ratio = replay_ratio
        self.replay_collator = replay_collator
        # Of the present call of train().
        self._clips_in_step = False
        self._replay_collate: Any = None
        # Sum of the replayed losses since the last log entry, on the device, and its steps.
        self._replay_loss: Any = 0
        self._replay_steps = 0
        super().__init__(*args, **kwargs)
        if replay_buffer is not None:
            self._refuse_engines()

    def remember(self, task: Hashable | None = None, dataset: Iterable[Any] | None = None) -> int:
        """Keeps examples of a finished task for replay in the tasks after it.

        Every rank calls it, with the same data: the memories of the ranks are the same.

        Args:
            task: Name of the task; None is the number that `GuidanceCallback` gave it, or without
                a callback the number of tasks in the buffer.
            dataset: The examples; None is the Trainer's `train_dataset`.

        Returns:
            How many examples were kept.

        Raises:
            ValueError: There is no replay buffer, or it has the task already.
            TypeError: The data set has no examples; see `dgg.ReplayBuffer.add_task`.
        """
        if self.replay_buffer is None:
            raise ValueError("remember() needs a memory: give the Trainer a replay_buffer=")
        if task is None:
            callbacks = self.callback_handler.callbacks
            task = next((x._task for x in callbacks if isinstance(x, GuidanceCallback)), None)
        examples: Any = self.train_dataset if dataset is None else dataset
        return self.replay_buffer.add_task(examples, task)

    # -- the training ---------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does; from the second task on with replay."""
        self._clips_in_step = False
        self._replay_collate, self._replay_loss, self._replay_steps = None, 0, 0
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Makes the Trainer's step, and before the optimizer's the pass over old examples."""
        if self.replay_buffer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._replay_collate is None:
            # Here everything is loaded, and every rank comes by.
            self._replay_collate = self.replay_collator or self._get_collator_with_removed_columns(
                self.data_collator, description="replay"
            )
            self._check_ranks(self.replay_buffer)
            if len(self.replay_buffer):
                self._clip_in_step(_unwrap(self.optimizer, type(self).__name__))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the optimizer's step comes next
            self._replay_examples(model, self.replay_buffer)
        return loss

    def _replay_examples(self, model, memory: ReplayBuffer) -> None:
        """Makes the gradient of the mean loss of some old examples the replay gradient."""
        parts = self._draw(memory)
        if not parts:
            return
        opt = _unwrap(self.optimizer, type(self).__name__)
        self._clip_in_step(opt)
        batches, items = self.get_batch_samples(
            map(self._replay_collate, parts), len(parts), self.args.device
        )
        count, steps = sum(map(len, parts)), self.current_gradient_accumulation_steps
        losses = []
        opt.clear_replay()  # of a step that was begun and not made
        try:
            with opt.replay():
                for place, (rows, batch) in enumerate(zip(parts, batches, strict=True), 1):
                    # The Trainer divides a batch's mean loss by this, if the loss is not already
                    # one over all tokens (`items`).
                    share: Any = count / len(rows)
                    self.current_gradient_accumulation_steps = share
                    with self._unsynchronised(model, last=place == len(parts)):
                        losses.append(super().training_step(model, batch, items))
        finally:
            self.current_gradient_accumulation_steps = steps
        self._replay_loss += torch.stack(losses).sum()
        self._replay_steps += 1

    def _draw(self, memory: ReplayBuffer) -> list[list[Any]]:
        """Draws this rank's old examples of one optimizer step, in batches of the usual size."""
        size = self._train_batch_size
        if self.accelerator.split_batches:
            size //= self.accelerator.num_processes
        # Counted from the arguments, not from the batches: all ranks must make as many passes, and
        # a collator may pack a batch into one row.
        count = memory.share(size * self.current_gradient_accumulation_steps, self.replay_ratio)
        if not count:
            return []
        rank, world_size = self._data_rank()
        rows = memory.sample(count, rank=rank, world_size=world_size)
        return [rows[start : start + size] for start in range(0, count, size)]

    def _data_rank(self) -> tuple[int, int]:
        """Returns which part of the data this rank trains on, and of how many."""
        # Ranks that share a layer or a sequence train on the same examples.
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return self.args.process_index // alike, max(self.args.world_size // alike, 1)

    def _unsynchronised(self, model, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which gradients stay on their rank, but those of the last pass."""
        always = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        # accelerate has not wrapped a model that was sharded when it was loaded.
        always = always or getattr(self, "is_distributed_loading_by_transformers", False)
        return contextlib.nullcontext() if last or always else self.accelerator.no_sync(model=model)

    # -- clipping -------------------------------------------------------------------------------

    def _clip_in_step(self, opt) -> None:
        """Hands `max_grad_norm` of the arguments to the optimizer, which clips h = g + w r.

        The Trainer knows g alone: clipped by it, g would shrink beside an r that does not.
        """
        bound = self.args.max_grad_norm
        if self._clips_in_step or not bound:
            return
        if not hasattr(super(), "_clip_grad_norm"):
            raise RuntimeError(
                "this release of transformers would clip the new gradients and not the replayed "
                "ones: set max_grad_norm=0 in the TrainingArguments, and max_grad_norm among the "
                "optimizer's arguments"
            )
        own = _own_bound(opt)
        smaller = bound if own is None else min(own, bound)
        for group in opt.param_groups:
            group["max_grad_norm"] = smaller
        _handed[opt] = own, smaller
        self._clips_in_step = True

    def _clip_grad_norm(self, model):
        # None: the Trainer then measures the norm of the new gradients for its log.
        return None if self._clips_in_step else super()._clip_grad_norm(model)

    # -- logging --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss of the old examples to the entries of the training."""
        if "loss" in logs and self._replay_steps:
            means: Any = self.accelerator.gather(self._replay_loss / self._replay_steps)
            logs["replay/loss"] = means.mean().item()
            self._replay_loss, self._replay_steps = 0, 0
        super().log(logs, *args, **kwargs)

    # -- checkpoints ----------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.replay_buffer is not None and self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self.replay_buffer.state_dict(), os.path.join(output_dir, MEMORY_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.replay_buffer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        opt = _unwrap(self.optimizer, type(self).__name__)
        own = _own_bound(opt)
        super()._load_optimizer_and_scheduler(checkpoint)
        _handed[opt] = own, opt.param_groups[0]["max_grad_norm"]  # by the Trainer that saved it
        path = os.path.join(checkpoint, MEMORY_NAME)
        if not os.path.isfile(path):
            logger.warning(
                "the checkpoint %s has no replay buffer: old examples are those of now, drawn in "
                "an order of their own", checkpoint, stacklevel=_callers.stacklevel(),
            )  # fmt: skip
            return
        try:
            with safe_globals():
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises is of many kinds
            if "add_safe_globals" in str(error):
                raise RuntimeError(
                    f"{path} has examples of types that torch does not load unasked: name them "
                    f"with torch.serialization.add_safe_globals([...]) before resuming ({error})"
                ) from error
            raise RuntimeError(
                f"{path} is damaged or no replay buffer: resume from another checkpoint, or remove "
                "the file and give the Trainer a buffer that is filled already"
            ) from error
        self.replay_buffer.load_state_dict(state)

    # -- checks ---------------------------------------------------------------------------------

    def _refuse_engines(self) -> None:
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                "a replay_buffer needs gradients that are kept apart, and DeepSpeed's ZeRO reduces "
                "them into partitions of its own in every backward pass: put the replayed examples "
                "into the batch instead (dgg.ReplayBuffer.mix in the data_collator)"
            )
        if self.accelerator.scaler is not None:
            raise RuntimeError(
                "a replay_buffer does not go together with fp16=True: the Trainer lets its "
                "GradScaler unscale the new gradients before the step, where it cannot reach the "
                "replayed ones; use bf16=True"
            )

    def _check_ranks(self, memory: ReplayBuffer) -> None:
        """Raises where ranks would draw differently: they would wait for each other for ever."""
        if self.accelerator.num_processes == 1:
            return
        from accelerate.utils import gather_object

        text = repr((course(memory), as_ratio(self.replay_ratio)))
        mine = hashlib.sha256(text.encode()).hexdigest()
        if len(set(gather_object([mine]))) > 1:
            raise RuntimeError(
                "the replay buffers of the ranks differ: give every rank a buffer with the same "
                "seed, tasks and ratio; each draws other examples of it by itself"
            )


class ReplayTrainer(_Replay, Trainer):
    """A Trainer that replays old examples: h = g + w r in every optimizer step.

    Before each step of the optimizer a second backward pass over examples of the buffer leaves
    their mean gradient r beside the gradient g of the new ones; w is ``replay_weight`` of the
    optimizer. While the buffer is empty, in the first task, it is the Trainer.

    **How many.** ``replay_ratio`` old examples for every new one of the step: with batches of 8,
    ``gradient_accumulation_steps=4`` and a ratio of 0.25 they are 8, in one pass after the last of
    the four. They are drawn once per optimizer step, and passes have the batch size at most. What
    rounding leaves over is carried to the next step. Loss and gradient are a mean over the old
    examples (or their tokens) of the step over all ranks, so the ratio says how exact r is and what
    it costs, and w how much it counts. ``replay_weight=replay_ratio`` counts an old example as
    much as a new one.

    **Ranks.** Every rank holds the same buffer, filled alike, and draws other examples of it. With
    DDP and FSDP r is averaged over the ranks as g is.

    **Clipping.** ``max_grad_norm`` of the TrainingArguments bounds h, as the paper's does: it is
    handed to the optimizer, which clips in its step; of two bounds the smaller one holds.

    **Resume.** Buffer, deck and generator are in the checkpoint, ``replay_buffer.pt``: a resumed
    training goes on bit for bit.

    Log entries of the training have ``replay/loss``.

    Args:
        *args: As `transformers.Trainer`, as all other keywords.
        replay_buffer: The memory; None is the Trainer alone. Fill it with `remember` when a task
            has ended.
        replay_ratio: Old examples for every new one, in (0, 1].
        replay_collator: Makes a batch of old examples; None is the Trainer's own, without the
            columns that the model does not take.

    Raises:
        TypeError: An argument is of the wrong type; at the first step with replay: the Trainer's
            optimizer is none of dgg's.
        ValueError: ``replay_ratio`` is not in (0, 1].
        RuntimeError: The engine is DeepSpeed, or ``fp16=True`` has a GradScaler; at the first step:
            the buffers of the ranks differ.
    """


@functools.cache
def with_replay(trainer: type[Trainer]) -> type[ReplayTrainer]:
    """Returns a subclass of a Trainer's class that replays old examples; see `ReplayTrainer`.

    For trl's and one's own: ``dgg.hf.with_replay(SFTTrainer)(..., replay_buffer=memory)``. The
    class must train on what its collator makes of examples, through `training_step`.

    Args:
        trainer: `transformers.Trainer` or a subclass.

    Raises:
        TypeError: It is no such class.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"with_replay() takes a subclass of transformers.Trainer, not {trainer!r}")
    made: Any = trainer
    if not issubclass(trainer, _Replay):
        name, doc = f"Replay{trainer.__name__}", ReplayTrainer.__doc__
        made = type(name, (_Replay, trainer), {"__doc__": doc})
    return made
