# SPDX-License-Identifier: BSD-3-Clause
"""What AdamW, Adam and SGD share: torch.optim's contract, the anchor and the replay.

Until an anchor is set each class *is* the torch.optim class it derives from, with one fused pass
as its step. The methods hand on: a step to `dgg.step.run`, an anchor to `dgg.anchor.boundary`, a
checkpoint to `dgg.checkpoint`.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments
from dgg._imitable import imitable
from dgg._literals import MergeRule, TensorsOrPath
from dgg._signatures import listed
from dgg.anchor import boundary, merge
from dgg.anchor import importance as importances
from dgg.checkpoint import load, room
from dgg.optim.in_groups import refuse_attributes
from dgg.optim.stepped import Stepped
from dgg.optim.summary import Reporting
from dgg.step import checks, state


@listed
class Guided(Reporting, Stepped):
    """What the guided optimizers share; stands before the torch.optim class in their bases."""

    # -- checkpoints ----------------------------------------------------------------------------

    @torch._disable_dynamo
    @imitable
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict, as torch.optim does; with numbers of Python's alone.

        If the caller is about to load a distributed checkpoint into the result, a new optimizer
        makes room for the checkpoint's state first.
        """
        load.make_whole(self)
        return super().state_dict()

    @torch._disable_dynamo
    @imitable
    @torch.inference_mode(False)  # no later step could write a tensor made in inference mode
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the torch.optim class it replaces.

        Moments follow torch's policy; an anchor keeps the dtype it was saved in. How the step is
        carried out (foreach, fused, backend) stays as constructed, whatever the checkpoint says.
        Replay gradients that wait for a step keep waiting.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            KeyError: It is no optimizer's state dict.
            RuntimeError: The checkpoint says it is anchored but anchors are missing.
            TypeError: It is no mapping, or a value in it is of the wrong type.
            ValueError: It is of another class (a key that this one needs is missing), groups,
                shapes or the order of names differ, a value is out of range, or it carries no
                anchor while this optimizer has one. After any error the optimizer is as it was.
        """
        load.load(self, state_dict, super().load_state_dict)

    @imitable
    @torch.no_grad()
    def prepare_for_load(
        self, checkpoint: Any = None, *, model: torch.nn.Module | None = None
    ) -> None:
        """Makes room for what a distributed checkpoint holds: anchors and the rest of the state.

        torch.distributed.checkpoint loads into existing tensors. A new optimizer has no anchors, so
        without this call a guided checkpoint is refused when it is loaded. Accelerate, the Trainer,
        a ``Stateful`` and torch's ``set_optimizer_state_dict`` are recognised and need no call
        (docs/checkpoints.md). Call it before ``get_optimizer_state_dict`` or ``get_state_dict``
        make the template. It counts as no task and sets no anchor: until the checkpoint is loaded,
        `step` raises.

        Args:
            checkpoint: Directory of the checkpoint, a StorageReader or its Metadata: room is made
                for exactly its state, in the dtypes it was saved in. None makes room for an anchor
                of every trainable parameter, in ``anchor_dtype``, beside the other state.
            model: Maps names to parameters; not needed if the optimizer was built from
                ``named_parameters()``.

        Raises:
            FileNotFoundError: There is no distributed checkpoint in the directory.
            KeyError: The checkpoint holds state, but of no parameter of this optimizer.
            RuntimeError: The optimizer is driven by an engine with checkpoints of its own.
            TypeError: ``checkpoint`` is no distributed checkpoint.
            ValueError: It holds master weights, which this optimizer would not keep.

        Examples:
            >>> opt = dgg.AdamW(model.parameters())
            >>> opt.prepare_for_load(path, model=model)
            >>> weights, state = get_state_dict(model, opt)
            >>> dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
            >>> set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        """
        room.prepare(self, checkpoint, model)

    # -- the anchor -----------------------------------------------------------------------------

    @imitable
    @torch.inference_mode(False)
    @torch.no_grad()
    def set_anchor(
        self, tensors: TensorsOrPath | None = None, *,
        model: torch.nn.Module | None = None, task: int | None = None,
        importance: TensorsOrPath | None = None,
    ) -> None:  # fmt: skip
        """Sets θ* at a task boundary: to the present weights, or to named tensors or files.

        Every parameter that requires a gradient (or has state from an earlier task) gets an
        anchor, of its own shape, in ``anchor_dtype``. A second call overwrites the first anchor
        in place, so there is never more than one. Parameters that join later are guided from the
        next boundary on.

        Scripts that run a process per task, and any script that is killed and resumed, say with
        ``task=k`` which task is trained now; the anchor is θ before task k begins. Call it after
        everything that is to be loaded has been loaded:

        - a new optimizer, or one with the state of the end of task k - 1: the anchor is set;
        - resumed in the middle of task k: the checkpoint's anchor is kept, nothing is read;
        - ``task=0``: nothing is set, the first task has nothing to protect (unless ``tensors``
          are given to guide it towards);
        - any other state cannot be right and is an error.

        Without ``task`` every call is a boundary, and counts as one; only a new optimizer that
        has just loaded an anchor refuses to replace it by weights that may be those of mid-task.

        With ``capturable=True`` a CUDA graph of the step stays valid if every anchor is overwritten
        in place. After the first call, and after `clear_anchor`, `load_state_dict` or
        `add_param_group`, it has to be captured again: a warning says so, and the memory of the old
        graph is kept as long as the optimizer.

        With the option ``importance`` > 0 a boundary also makes F, ``state[p]["importance"]``: v̂ =
        exp_avg_sq / (1 - β₂^step) is added to the sum over all boundaries so far, and F is that sum
        divided by its mean over all anchored parameters. Call it before moments are reset. A new
        optimizer has no second moments: pass it what the former one's `importance_dict` returned.

        Names in files are checked first; then every tensor is read one at a time, of sharded
        parameters each rank's own part only. All ranks call it. If one fails, no rank has changed
        anything, and the others raise an error with the reason.

        Args:
            tensors: The previous task's weights: named tensors, such as a model's or a peft
                adapter's state dict; or the path of a safetensors file (or of the index of
                several), of a directory that ``save_pretrained`` wrote (of a model or an
                adapter), of a Trainer's last checkpoint or of a checkpoint of
                torch.distributed.checkpoint. None takes the present weights.
            model: Maps names to parameters; not needed if the optimizer was built from
                ``named_parameters()``.
            task: Number of the task that is trained now, from 0.
            importance: Sums of v̂ by name, from `importance_dict`, or the path of a file with them;
                they replace those of this optimizer. None adds its own second moments.

        Raises:
            FileNotFoundError: There is nothing at the path.
            KeyError: A trainable parameter has no tensor.
            RuntimeError: It would replace an anchor that was just resumed, the anchor of a task in
                progress is gone, there is no second moment to make an importance of, or another
                rank failed.
            TypeError: ``tensors`` or one of them is of the wrong type.
            ValueError: A shape differs, values are not finite, names are not known, the path is
                a Trainer's checkpoint from the middle of a training, or ``task`` is over already
                or not the next one. After any error the former anchor is as it was.

        Examples:
            >>> # train.py --task K, started anew after it was killed
            >>> model.load_state_dict(resumed["model"] if resumed else weights_after_former_task)
            >>> opt = dgg.AdamW(model.parameters(), seed=K)
            >>> if resumed:
            ...     opt.load_state_dict(resumed["optimizer"])
            >>> opt.set_anchor(task=K)
        """
        driver = self._deepspeed_driver()
        groups = self.param_groups if driver is None else driver.marked_groups(self)
        self._warned.boundary_known |= task is not None
        task = None if task is None else _arguments.plain("task", task)
        importances.check_wanted(importance, groups[0]["importance"])
        if boundary.is_due(groups, tensors, task, self._resumed):
            if tensors is None:
                checks.warn_if_anchor_follows(self._warned, int(groups[0]["draw_index"]))
            self._place_anchor(tensors, model=model, task=task, importance=importance)
            self._named = task

    @imitable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _place_anchor(self, tensors: Any, *, model: Any, task: int | None, importance: Any) -> None:
        """Sets the anchor as `set_anchor` does, without its rules about tasks; None counts one up.

        For frameworks that know where a task begins, such as `dgg.hf`.
        """
        driver = self._deepspeed_driver()
        of_tensors = boundary.model_of_tensors(tensors, model, importance)
        groups = self.param_groups if driver is None else driver.groups(self)
        if driver is not None:
            plan = functools.partial(driver.plan_anchors, self, tensors, of_tensors)
            weigh = functools.partial(driver.plan_importance, self, importance, model)
        else:
            plan = functools.partial(
                boundary.plan_anchors, groups, boundary.anchors_in(self.state),
                tensors, of_tensors, self._settings.anchor_dtype, self._settings.anchor_device,
                functools.partial(state.stepped_weight, self), none=not self._ownership.has_all,
            )  # fmt: skip
            weigh = functools.partial(boundary.plan_importance, self, groups, importance, model)
        boundary.place(self, groups, groups, plan, task, weigh)

    @imitable
    def clear_anchor(self) -> None:
        """Drops the anchor: from here on the optimizer is torch.optim's again."""
        driver = self._deepspeed_driver()
        groups = self.param_groups if driver is None else driver.groups(self)
        boundary.clear(self, groups, groups)

    @imitable
    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_anchor(self, rule: MergeRule = "mean", *, keep: float | None = None) -> float:
        """Moves the weights a part of the way back to the anchor, at the end of a task.

        The anchor is then the merged model of the former tasks and the weights are the end of this
        one. Call it after the last step of the second task and later ones, before `set_anchor`
        (with which the merged weights become the anchor of the next task).

        Args:
            rule: ``"mean"``: the running mean of the tasks' models. ``"fisher"``: the point on the
                way from anchor to weights at which the tasks' losses, as quadratics with Adam's
                second moments, have their least sum (Perturb-and-Merge, arXiv 2505.22389); needs
                ``importance`` > 0. ``"rows"``: the rows of every matrix that moved farthest stay,
                the others go back (Neuron-Fusion's kind, arXiv 2505.16703); vectors stay.
            keep: Share of the rows that stay, for ``"rows"`` alone; None is a half.

        Returns:
            The share of the way that is kept, a of θ* + a (θ - θ*); for ``"rows"`` the share of
            the rows.

        Raises:
            RuntimeError: There is no anchor, no second moment for ``"fisher"``, or an engine has
                put flat partitions in place of the parameters. Nothing is changed.
            ValueError: ``rule`` or ``keep`` is out of range, ``keep`` is given to a rule without
                rows, a parameter has another shape than its anchor, or holds inf or NaN.
        """
        if self._deepspeed_driver() is not None:
            raise RuntimeError(
                "merge_anchor() cannot write the weights of a model that DeepSpeed's ZeRO steps: "
                "save it, merge the saved weights, and load them for the next task"
            )
        weights = functools.partial(state.stepped_weight, self)
        return merge.merge(self, self.param_groups, rule, keep, weights)

    @imitable
    @torch.no_grad()
    def importance_dict(self, *, model: torch.nn.Module | None = None) -> dict[str, Tensor]:
        """Returns the sums of v̂ by name, that of the present task included: for the next optimizer.

        A new optimizer (another process, another Trainer) has no second moments. Save this at the
        end of a task, and pass it to the next one's ``set_anchor(importance=...)``.

        Args:
            model: Maps parameters to names; not needed if the optimizer was built from
                ``named_parameters()``.

        Returns:
            float32 (float64) tensors of the parameters' shapes, DTensors where these are; not
            divided by their mean. Under DeepSpeed's ZeRO all ranks call this, and each gets whole
            tensors on the CPU.

        Raises:
            RuntimeError: There is no second moment, or an engine has flat partitions whose places
                in the parameters are not known (FSDP1, ``process_group=``) or a share of them
                (ZeroRedundancyOptimizer).
            ValueError: A parameter has no name.
        """
        driver = self._deepspeed_driver()
        if driver is not None:
            return driver.importance_dict(self, model)
        return importances.as_dict(self, self.param_groups, model)

    # -- replay, statistics, gradients ----------------------------------------------------------

    @imitable
    def replay(self) -> AbstractContextManager[None]:
        """Lets the gradients of the block become r, beside ``.grad`` and without a copy.

        ``with opt.replay(): loss_on_replay.backward()``. Several blocks before a step add up. The
        step consumes them, wherever `zero_grad` (or the model's) is called between the two:

            with opt.replay(): loss(old).backward()      opt.zero_grad()
            opt.zero_grad()                              with opt.replay(): loss(old).backward()
            loss(new).backward()                         loss(new).backward()
            opt.step()                                   opt.step()

        Where a step is left out on purpose, `clear_replay` drops them; a second `zero_grad` of the
        optimizer without a step in between does so, too, and warns once.
        """
        if self._deepspeed_driver() is not None:
            raise RuntimeError(
                "replay() cannot keep gradients apart under DeepSpeed's ZeRO, which reduces them "
                "into partitions of its own in every backward pass: put the replayed examples into "
                "the batch instead (dgg.ReplayBuffer.mix)"
            )
        return self._replay.record(self._ownership.recorded(self.param_groups))

    @imitable
    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step, where that step is left out."""
        self._replay.clear()

    @imitable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients in ``.grad``; those of `replay` are kept for the next step.

        A second call since the last replay block, without a step in between, drops them, too.

        Args:
            set_to_none: As in torch.optim.
        """
        super().zero_grad(set_to_none)
        self._replay.zero_grad()

    @property
    @imitable
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped because gradients were inf or NaN (GradScaler).

        With ``fused=True`` or replay gradients; otherwise the scaler does not even call a step that
        is to be skipped.
        """
        return bool(self._skipped)


refuse_attributes(Guided)
