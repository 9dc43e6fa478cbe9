# SPDX-License-Identifier: BSD-3-Clause
"""The step of AdamW, Adam and SGD as torch.optim calls it; what it does is in `dgg.step.run`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import torch.optim.optimizer as _torch_optimizer
from torch import Tensor
from torch.autograd import profiler

from dgg import _callers, _ranges, deepspeed, sharding
from dgg._imitable import Imitable, imitable
from dgg._signatures import listed
from dgg.checkpoint import room, source
from dgg.optim import construction
from dgg.sharding import fsdp1
from dgg.step.rule import Rule
from dgg.step.run import CAPTURED, EAGER, Verbs, run

if TYPE_CHECKING:
    from collections import defaultdict

    from dgg.step.cache import RowCache
    from dgg.step.draws import Draws
    from dgg.step.gradients import ReplaySlot
    from dgg.step.settings import Settings

    # It stands before a class of torch.optim in the bases of every optimizer.
    _Optimizer = torch.optim.Optimizer
else:
    _Optimizer = object

_Loss = TypeVar("_Loss")


def _closure_of(self, closure: Callable[[], Any] | None = None) -> Any:
    """Returns the closure among the arguments of `Stepped.step`, whose signature this is."""
    return closure


_closure_of.__qualname__ = "step"  # by which errors call it


@listed
class Stepped(Imitable, _Optimizer):
    """An optimizer whose step is `dgg.step.run`."""

    # The state is room for a checkpoint that is not loaded yet.
    _awaits_load = False
    # A checkpoint helper made the state, perhaps without knowing which checkpoint will fill it.
    _template = False
    # torch.optim's hooks around the present step have been called.
    _in_hooks = False
    process_group = sharding.ProcessGroup()

    if TYPE_CHECKING:
        # What `construction` sets.
        _new_rule: type[Rule]
        _rule: Rule
        _settings: Settings
        _guidance: dict[str, Any]
        _ownership: sharding.Sharded
        _draws: Draws
        _replay: ReplaySlot
        _cache: RowCache | None
        _all_groups: list[dict[str, Any]]
        _original_ids: list[int]
        _driver: deepspeed.Driver | None
        _first_id: int | None
        _captured: list[tuple[Any, ...]]
        _partial: bool  # the last gradients were partial sums
        _skipped: Tensor | bool  # the last step was skipped

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle needs: torch's three entries and the settings."""
        names = ("_settings", "_guidance", "_awaits_load", "_resumed", "_named")
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
    def state(self) -> defaultdict[Tensor, Any]:
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

    # torch.optim has an attribute.
    @state.setter
    def state(self, value) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._state_read = True
        self.__dict__["state"] = value

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Performs one optimization step: G of the guided gradients, then the base optimizer.

        The closure is optional; it evaluates the model again and returns the loss.

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
                profiler._is_profiler_enabled
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
            self._replay.looking = True
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self._replay.looking = False
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

    # torch.optim does not wrap a step that says that it is hooked.
    vars(step).update(__signature__=inspect.signature(_closure_of), hooked=True)

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
