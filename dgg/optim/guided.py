# SPDX-License-Identifier: BSD-3-Clause
"""What AdamW, Adam and SGD share: torch.optim's contract, the anchor and the replay.

Until an anchor is set each class *is* the torch.optim class it derives from, with one fused pass
as its step. The methods hand on: a step to `dgg.step.run`, an anchor to `dgg.anchor.boundary`, a
checkpoint to `dgg.checkpoint`.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer

from dgg import _arguments, _callers, _ranges, deepspeed, sharding
from dgg._imitable import Imitable, imitable
from dgg.anchor import boundary
from dgg.checkpoint import load, room, source
from dgg.optim import construction
from dgg.sharding import fsdp1
from dgg.step import norms, state
from dgg.step.rule import Rule
from dgg.step.run import CAPTURED, EAGER, Verbs, run


def _closure_of(self, closure: Callable[[], Any] | None = None) -> Any:
    """Returns the closure among the arguments of `Stepped.step`, whose signature this is."""
    return closure


_closure_of.__qualname__ = "step"  # by which errors call it


class Stepped(Imitable):
    """An optimizer whose step is `dgg.step.run`."""

    # The state is room for a checkpoint that is not loaded yet.
    _awaits_load = False
    # A checkpoint helper made the state, perhaps without knowing which checkpoint will fill it.
    _template = False
    # torch.optim's hooks around the present step have been called.
    _in_hooks = False
    _new_rule: type[Rule]
    process_group = sharding.ProcessGroup()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle needs: torch's three entries and the settings."""
        names = ("_settings", "_guidance", "_awaits_load")
        attributes = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **attributes, "_ownership": self._ownership.copied()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over a copied, pickled or loaded state and starts without caches."""
        construction.take_state(self, state, super().__setstate__)

    @imitable
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does; its parameters are guided from the next anchor on.

        Args:
            param_group: ``{"params": ..., "lr": ..., "alpha": ..., "strength": ...}``; the other
                guidance options belong to the whole optimizer.

        Raises:
            TypeError: A trainable parameter has a dtype that cannot be optimized.
            ValueError: A guidance option is out of range or not one of a group, or a parameter
                is given twice.
        """
        construction.add_group(self, param_group, super().add_param_group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves it to the step to unscale the gradients.

        True with ``fused=True``, as in torch.optim, and where a scaler does not see all gradients
        (replay gradients, other ranks' partitions): the step then says how to scale.
        """
        return (
            self._settings.unscales
            or bool(self._replay)
            or self.process_group is not None
            or any(fsdp1.is_one(p) for group in self.param_groups for p in group["params"])
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignores the value that torch.optim sets: the getter computes it."""

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state by parameter: torch.optim's keys and ``anchor``.

        Code that changes the state has to read this attribute first. A step after which nobody
        has read it does not look at the state's tensors again.
        """
        try:
            state = self.__dict__["state"]
        except KeyError:  # a wrapper that imitates the class: it then asks the optimizer inside
            raise AttributeError("state") from None
        self._state_read = True
        return state

    @state.setter
    def state(self, value: dict[Tensor, Any]) -> None:
        self._state_read = True
        self.__dict__["state"] = value

    def step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D417
        """Performs one optimization step: G of the guided gradients, then the base optimizer.

        Args:
            closure: Evaluates the model again and returns the loss; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: A gradient is sparse or of an unsupported dtype.
            ValueError: An option in the groups is out of range.
            RuntimeError: The anchor that the groups promise is missing.
        """
        if (
            type(self).step is Stepped.step
            and not self._in_hooks
            and (
                torch.autograd.profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _torch_optimizer._global_optimizer_pre_hooks
                or _torch_optimizer._global_optimizer_post_hooks
            )
        ):
            # torch.optim makes every step inside of a profiler range, which costs as much as the
            # update of a hundred tiny tensors. A subclass that overrides step() has torch's hooks
            # around its own.
            self._in_hooks = True
            try:
                return _step_with_hooks(self, *args, **kwargs)  # hooks get just what was given
            finally:
                self._in_hooks = False
        closure = _closure_of(self, *args, **kwargs) if args or kwargs else None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            with torch.no_grad():
                self._uncompiled_step()
        else:
            # Not `with torch.no_grad()` and no decorator: either costs as much as a small kernel.
            enabled = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                with _ranges.record("dgg.step"):
                    verbs = self._verbs()
                    if verbs is not None:
                        run(self, verbs)
            finally:
                torch._C._set_grad_enabled(enabled)
        if not self._in_hooks:
            self._optimizer_step_code()
        return loss

    step.__signature__ = inspect.signature(_closure_of)
    step.hooked = True  # torch.optim does not wrap a step that says so

    @torch._disable_dynamo
    def _uncompiled_step(self) -> None:
        with _ranges.record("dgg.step"):
            verbs = self._verbs()
            if verbs is not None:
                run(self, verbs)

    def _verbs(self) -> Verbs | None:
        """Returns how to make this step; None if a checkpoint helper only wants state."""
        driver = self._deepspeed_driver()
        if driver is not None:
            return driver.verbs
        if self._cache is None and not self.state and source.making_template():
            room.make_template(self)
            return None
        return CAPTURED if self._settings.capturable else EAGER

    def _deepspeed_driver(self) -> deepspeed.Driver | None:
        """Returns the driver if DeepSpeed has put partitions in place of the parameters."""
        driver = self._driver
        if driver is not None and driver.zero_optimizer is not None:
            return driver
        if driver is None and construction.first_id(self.param_groups) == self._first_id:
            return None
        # The parameters were exchanged: look for an engine once.
        self._driver = deepspeed.find_driver(self)
        if self._driver is None:
            self._first_id = construction.first_id(self.param_groups)
            if driver is not None:  # its engine is gone
                self._ownership = sharding.Sharded()
        return self._driver

    def _reset_caches(self) -> None:
        """Makes the next step build its rows anew; warns if a CUDA graph uses the present ones.

        Nothing can stop a graph's replay. Its memory stays allocated, so that it does no harm.
        """
        if self._cache is not None and any(entry[0] is self._cache for entry in self._captured):
            warnings.warn(
                "the step of this optimizer was captured into a CUDA graph, and what that reads "
                "and writes was replaced since: state was loaded or exchanged, a group added, an "
                "anchor set for the first time or cleared. A replay would go on with what was "
                "there before: capture it again",
                stacklevel=_callers.stacklevel(),
            )
        self._cache = None


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(
    lambda self, *args, **kwargs: Stepped.step(self, *args, **kwargs)
)


class Guided(Stepped):
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
            ValueError: It is of another class (a key that this one needs is missing), groups or
                shapes differ, a value is out of range, or it carries no anchor while this
                optimizer has one. After any error the optimizer is as it was.
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

        Example:
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
        self, tensors: Mapping[str, Tensor] | str | os.PathLike | None = None, *,
        model: torch.nn.Module | None = None, task: int | None = None,
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

        Raises:
            FileNotFoundError: There is nothing at the path.
            KeyError: A trainable parameter has no tensor.
            RuntimeError: It would replace an anchor that was just resumed, the anchor of a task in
                progress is gone, or another rank failed.
            TypeError: ``tensors`` or one of them is of the wrong type.
            ValueError: A shape differs, values are not finite, names are not known, the path is
                a Trainer's checkpoint from the middle of a training, or ``task`` is over already
                or not the next one. After any error the former anchor is as it was.

        Example:
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
        if boundary.is_due(groups, tensors, task, self._resumed):
            self._place_anchor(tensors, model=model, task=task)
            self._named = task

    @imitable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _place_anchor(
        self, tensors: Mapping[str, Tensor] | str | os.PathLike | None = None, *,
        model: torch.nn.Module | None = None, task: int | None = None,
    ) -> None:  # fmt: skip
        """Sets the anchor as `set_anchor` does, without its rules about tasks.

        For frameworks that know where a task begins, such as `dgg.hf`.

        Args:
            tensors: As in `set_anchor`.
            model: As in `set_anchor`.
            task: Number of the task; None counts one up.
        """
        driver = self._deepspeed_driver()
        if driver is not None:
            plan = functools.partial(driver.plan_anchors, self, tensors, model)
        else:
            plan = functools.partial(
                boundary.plan_anchors, self.param_groups, boundary.anchors_in(self.state),
                tensors, model, self._settings.anchor_dtype, self._settings.anchor_device,
                functools.partial(state.stepped_weight, self), none=not self._ownership.has_all,
            )  # fmt: skip
        boundary.place(self, self._all_groups, self._all_groups, plan, task)

    @imitable
    def clear_anchor(self) -> None:
        """Drops the anchor: from here on the optimizer is torch.optim's again."""
        self._deepspeed_driver()
        boundary.clear(self, self._all_groups, self._all_groups)

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

    @imitable
    def guidance_stats(self) -> norms.Statistics:
        """Returns what the last step did, as tensors on the device: no synchronisation.

        Returns:
            ``injected`` (bool: whether anything was pulled), ``scale`` (s with the first group's
            strength; one value per tensor for ``norm_scope="tensor"``), ``grad_norm`` (‖g‖),
            ``distance`` (‖θ - θ*‖) and ``clip`` (c); None for what that step had no need to
            measure. ``anchored`` (int64: how many parameters have an anchor; 0 means that nothing
            can be guided yet) and ``guided`` (int64: how many were pulled; 0 where nothing was
            drawn). The attribute ``backend`` is the name of the step's backend.
        """
        return norms.statistics(self._last, sum(group["anchored"] for group in self.param_groups))

    @property
    @imitable
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped because gradients were inf or NaN (GradScaler).

        With ``fused=True`` or replay gradients; otherwise the scaler does not even call a step that
        is to be skipped.
        """
        return bool(self._skipped)
