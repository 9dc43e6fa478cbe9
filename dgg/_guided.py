# SPDX-License-Identifier: BSD-3-Clause
"""The step of the guided optimizers, their anchor and their replay: all but the base optimizer.

Until an anchor is set each class *is* the torch.optim class it derives from, with one fused pass
as its step. The flow of a step goes one way: here → `dgg.backends` → a kernel.
"""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as _torch_optimizer

from dgg import (
    _arguments,
    _boundary,
    _callers,
    _ranges,
    anchor,
    backends,
    checkpoint,
    guidance,
    reference,
    sharding,
    zero,
)  # fmt: skip
from dgg._imitable import imitable
from dgg._loading import Loading
from dgg._row_cache import RowCache
from dgg.sharding import fsdp1, zero_redundancy

# Steps after which an optimizer without an anchor, or without any gradient, is told of.
_LONG, _IDLE = 199, 100


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step with the hooks and the profile's range that torch.optim gives it.

    torch.optim would wrap the step itself, in a range for the profiler that costs as much as the
    update of a hundred tiny tensors; here only a step with hooks or under a profiler pays for it.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def hooked(self, *args, **kwargs):
        if type(self).step is hooked and (
            torch.autograd.profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _torch_optimizer._global_optimizer_pre_hooks
            or _torch_optimizer._global_optimizer_post_hooks
        ):
            return wrapped(self, *args, **kwargs)
        # A subclass with a step of its own has torch's hooks around that one.
        result = step(self, *args, **kwargs)
        self._optimizer_step_code()
        return result

    hooked.hooked = True  # torch.optim leaves it as it is
    return hooked


class Guided(Loading):
    """What the guided optimizers share; stands before the torch.optim class in their bases."""

    # State key → list of the kernels.
    _columns: dict[str, str]
    # A copy cannot take the process group along.
    _lost_group = False
    # ... nor the ZeroRedundancyOptimizer of whose parameters it steps a share.
    _lost_share = False
    # What it has warned of: 16 bits without compensation, no anchor, no gradient.
    _said_narrow = _said_unguided = _said_idle = False
    # A task boundary was named or a callback knows it; steps in a row without any gradient.
    _boundary_known = False
    _idle = 0
    # Steps with fused=True take what a GradScaler says, as torch.optim's do.
    _unscales = False
    _rule: backends.Rule

    # -- construction ---------------------------------------------------------------------------

    def _init_guidance(self, parent: Callable[[], None], **options: Any) -> None:
        """Checks the guidance arguments, then lets torch.optim check and take the others."""
        name = type(self).__name__
        if options.pop("differentiable"):
            raise ValueError(
                f"dgg.{name} does not support differentiable=True: the fused step writes in place "
                f"and records no graph; use torch.optim.{name} to differentiate through a step"
            )
        self._capturable = bool(options.pop("capturable"))
        self.process_group = _arguments.check_process_group(options.pop("process_group"), options)
        self._share = zero_redundancy.builder()
        if self._share is not None and (self.process_group is not None or self._capturable):
            raise ValueError(
                "process_group= and capturable=True do not go with ZeroRedundancyOptimizer, whose "
                "own process group is used and whose ranks synchronise in every step; leave both"
            )
        fused, foreach = options.pop("fused"), options.pop("foreach")
        self._transient()
        self._backend = options.pop("backend")
        self._anchor_dtype = _arguments.check_dtype("anchor_dtype", options.pop("anchor_dtype"))
        self._anchor_device = _arguments.check_anchor_device(options.pop("anchor_device"))
        if self._capturable and self._anchor_device is not None:
            raise ValueError(
                f"capturable=True does not go with anchor_device={str(self._anchor_device)!r}: "
                "anchors are brought to the device for draws that the host knows, those of a "
                "captured step only the device knows; leave anchor_device None"
            )
        self._state_dtype = _arguments.check_dtype("state_dtype", options.pop("state_dtype"))
        self._stochastic = options.pop("stochastic_rounding")
        self._master = options.pop("master_weights")
        if not (fused or foreach) and (fused is False or foreach is False):
            # Either asks for torch's tensor-by-tensor arithmetic, which is what the reference is;
            # beside a True of the other it only says which of the fast ways it is (torchtitan).
            if self._backend not in (None, "reference"):
                raise ValueError(
                    f"fused={fused}, foreach={foreach} ask for an unfused step and "
                    f"backend={self._backend!r} for a fused one; drop either"
                )
            self._backend = "reference"
        if (fused or foreach) and self._backend == "reference":
            raise ValueError(
                f"fused={fused}, foreach={foreach} ask for a fused step and backend='reference' "
                "for an unfused one; drop either"
            )
        self._fused, self._unscales = bool(fused or foreach), bool(fused)
        self._guidance = {**options, "draw_index": 0, "task_index": 0}
        _arguments.check_options(self._guidance)
        _arguments.make_plain(self._guidance)
        # Identities: a weak reference would forbid torch to swap a parameter (to_empty() of
        # FSDP2's modules does), another one would keep what an engine exchanges alive.
        self._given, self._driver, self._own = [], None, None
        parent()
        self._whole, self._own = self.param_groups, _first(self.param_groups)
        _arguments.check_backend(self._backend, self.param_groups)
        share = self._share
        every = self.param_groups if share is None else [{"params": share.params()}]
        _arguments.check_precision(self._stochastic, self._master, every)
        self._check_kernels(p for group in self.param_groups for p in group["params"])
        self.defaults.update(self._guidance)
        _arguments.make_plain(self.defaults)

    def _check_kernels(self, params: Iterable[Tensor]) -> None:
        """Raises unless fused and captured steps can be had where the parameters are."""
        devices = [d for d in dict.fromkeys(p.device for p in params) if d.type != "meta"]
        if self._capturable and len(devices) > 1:
            raise ValueError(
                f"capturable=True needs all parameters on one device, they are on {devices}; use "
                "an optimizer per device, or leave it False"
            )
        for device in devices:
            backend = backends.choose(self._backend, device)
            if self._fused and backend == "reference":
                raise RuntimeError(
                    f"foreach=True or fused=True cannot be met on {str(device)!r}, the fused "
                    f"kernels miss: {backends.unavailable('cpp', device)}"
                )
            if self._capturable and not backends.launches(backend, device):
                raise ValueError(
                    f"capturable=True needs kernels that run on a GPU; on {str(device)!r} the step "
                    f"is the {backend!r} backend's, which no graph can capture: leave it False"
                )

    def _transient(self) -> None:
        # Nothing of this is ever needed by a checkpoint, a copy or a pickle.
        self._engine = guidance.Engine()
        self._rows: RowCache | None = None
        # All that captured steps read and write, for the optimizer's life: a graph knows addresses
        # alone. First of each the rows.
        self.__dict__.setdefault("_captured", [])
        # The last gradients were partial sums of the ranks'.
        self._partial = False
        self._skipped: Tensor | bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle needs: torch's three entries and the settings."""
        names = (
            "_backend", "_fused", "_unscales", "_capturable", "_anchor_dtype", "_anchor_device",
            "_state_dtype", "_stochastic", "_master", "_guidance", "_awaits_load",
        )  # fmt: skip
        lost = self.process_group is not None or self._driver is not None or self._lost_group
        kept = {name: getattr(self, name) for name in names}
        lost_share = self._share is not None or self._lost_share
        return {
            **super().__getstate__(), **kept, "_lost_group": lost, "_lost_share": lost_share,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes up a copied, pickled or loaded state and starts without caches."""
        self._transient()
        if "process_group" not in self.__dict__:  # a copy; loading keeps what there is
            self.process_group = None
        self.__dict__.setdefault("_share", None)
        super().__setstate__(state)
        # DeepSpeed steps groups one by one in a list of their own.
        self._whole = self.param_groups
        if "_given" not in self.__dict__:
            self._given = [id(p) for group in self.param_groups for p in group["params"]]
            self._driver, self._own = None, _first(self.param_groups)
        for group in self.param_groups:
            for name, value in self._guidance.items():
                group.setdefault(name, value)
            group.setdefault("anchored", 0)

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
        wide = self.param_groups[0] if self.param_groups else self._guidance
        if isinstance(param_group, dict) and "anchored" in param_group:
            # A dict that was a group before, since torch.optim keeps the one it is given. What
            # belonged to that optimizer as a whole does not come along, nor is it changed there.
            param_group = {k: v for k, v in param_group.items() if k not in _arguments.WIDE}
        if isinstance(param_group, dict):
            for name in _arguments.WIDE:
                if name in param_group and param_group[name] != wide[name]:
                    raise ValueError(
                        f"{name} is one setting for the whole optimizer ({wide[name]!r}); a group "
                        f"cannot have its own ({param_group[name]!r}). Per group: alpha, strength"
                    )
            options = {n: param_group[n] for n in _arguments.PER_GROUP if n in param_group}
            _arguments.check_options(options)
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _arguments.make_plain(group)
            seen: set[int] = set()
            for place, param in enumerate(group["params"]):
                names = group.get("param_names")
                label = f"parameter {names[place]!r}" if names else f"parameter {place}"
                _arguments.check_param(param, f"{label} of group {before}")
                if id(param) in seen:
                    raise ValueError(
                        f"{label} of group {before} is in the group twice and would be updated by "
                        "two threads at once; pass every parameter once"
                    )
                seen.add(id(param))
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise
        for name in _arguments.WIDE:
            group[name] = wide[name]
        for name in _arguments.PER_GROUP:
            group.setdefault(name, self._guidance[name])
        group["anchored"] = 0
        self._given += map(id, group["params"])
        self._drop_rows()

    # -- state ----------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves it to the step to unscale the gradients.

        As in torch.optim with ``fused=True`` alone; and where a scaler does not see all: replay
        gradients, and those of other ranks' partitions, of which the step says what to do.
        """
        return (
            self._unscales
            or bool(self._engine.replay)
            or self.process_group is not None
            or any(fsdp1.is_one(p) for group in self.param_groups for p in group["params"])
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignores what torch.optim sets: it follows from the options and the replay gradients."""

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state by parameter: torch.optim's keys and ``anchor``.

        Whoever changes the state reads it here first, so that a step need not look at thousands
        of tensors that nobody touched.
        """
        try:
            state = self.__dict__["state"]
        except KeyError:  # of a wrapper that imitates the class and looks elsewhere then
            raise AttributeError("state") from None
        self._state_read = True
        return state

    @state.setter
    def state(self, value: dict[Tensor, Any]) -> None:
        self._state_read = True
        self.__dict__["state"] = value

    # -- the step -------------------------------------------------------------------------------

    @_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            with torch.no_grad():
                self._uncompiled_step()
            return loss
        # Without the objects of `no_grad` and the decorated function's wrapper: either costs as
        # much as a small kernel.
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            with _ranges.record("dgg.step"):
                self._step()
        except BaseException:
            if self._rows is not None:
                self._rows.abandon()
            raise
        finally:
            torch._C._set_grad_enabled(enabled)
        return loss

    @torch._disable_dynamo
    def _uncompiled_step(self) -> None:
        with _ranges.record("dgg.step"):
            self._step()

    def _step(self) -> None:
        driver = self._driven_by()
        if driver is not None:
            driver.step(self)
            return
        if self._rows is None and not self.state and checkpoint.making_template():
            self._make_template()
            return
        engine, groups = self._engine, self.param_groups
        engine.replay.check_closed()
        wide = engine.options.read(groups)
        # Before any state is made, since it can raise.
        derived = engine.options.derived
        hyper = derived.get("hyper")
        if hyper is None:
            hyper = derived["hyper"] = [self._hyper(group) for group in groups]
        draw = 0 if self._capturable else wide["draw_index"]
        slot, cache = engine.replay, self._rows
        replays: list[Tensor | None] = []
        if slot:
            lists = [group["params"] for group in groups]
            replays = slot.of(lists[0] if len(lists) == 1 else [p for each in lists for p in each])
        scaling, self._skipped = self._scaler_state(replays)
        skipped = self._skipped is True
        if cache is not None and cache.launched:
            self._check_capture(cache.all_rows[0].device, True)
        elementwise = wide["granularity"] == "element"
        if cache is None or skipped or not cache.gather(self, replays, elementwise=elementwise):
            cache = self._take_up(replays, skipped, elementwise=elementwise)
        if skipped:
            self._advance(draw)
            engine.remember_skipped(groups[0]["params"][0].device)
            slot.clear()
            return
        share = self._share
        if share is not None:
            every = [engine.flags(wide, groups, share.every_row(), draw)]
            if len(cache.all_rows) > 1:
                raise ValueError(
                    "ZeroRedundancyOptimizer over parameters on several devices is not supported; "
                    "build one per device"
                )
        if not cache.all_rows:
            if share is not None and engine.measures(wide, every[0] is not None):
                share.join()
            self._warn_if_nothing_happens(draw, cache)
            self._advance(draw)
            if groups[0]["params"]:
                engine.remember_skipped(groups[0]["params"][0].device)
            slot.clear()
            return
        if self._capturable:
            self._captured_step(wide, hyper, cache.all_rows, scaling)
            slot.clear()
            return
        if draw >= _LONG or self._idle or not cache.all_rows[0].present:
            self._warn_if_nothing_happens(draw, cache)
        flags = [engine.flags(wide, groups, rows, draw) for rows in cache.all_rows]
        # Ranks that have nothing to inject themselves take part in the norms of those that do.
        injecting = any(x is not None for x in (flags if share is None else every))
        injecting = injecting or engine.joins(wide, groups, cache.all_rows, self.process_group)
        found = engine.measure(wide, cache.all_rows, injecting, scaling)
        drawn = guidance.drawn(wide, draw, injecting)
        with _ranges.record("dgg.update"):
            for rows, row_flags, row_found in zip(cache.all_rows, flags, found, strict=True):
                ahead = wide["scaling"] and engine.flags(wide, groups, rows, draw + 1) is not None
                self._update_(
                    rows,
                    row_found,
                    self._final_flags(rows, row_flags),
                    hyper,
                    drawn,
                    scaling,
                    look_ahead=ahead,
                    replay_weight=float(wide["replay_weight"]),
                )
        self._advance(draw)
        strength = hyper[0]["strength"]
        engine.remember(wide, cache.all_rows[0], flags[0], found[0], strength, scaling.found_inf)
        slot.clear()

    def _update_(self, rows: backends.Rows, *args, **kwargs) -> None:
        rows.update_(self._rule, *args, **kwargs)

    def _driven_by(self) -> zero.Zero | None:
        """Returns the engine that steps its own partitions in place of the parameters, if any."""
        driver = self._driver
        if driver is not None and driver.holder is not None:
            return driver
        if driver is None and _first(self.param_groups) == self._own:
            return None
        # The parameters were exchanged: look once by whom.
        self._driver = zero.find(self)
        if self._driver is None:
            self._own = _first(self.param_groups)
        return self._driver

    def _skip_update(self, param: Tensor) -> None:
        """Ends a step in which every element of ``param`` is padding and none is updated."""
        step = self.state[param].get("step")
        if step is not None:
            step += 1

    def _take_up(self, replays, skipped: bool, *, elementwise: bool) -> RowCache | None:
        """Takes up the gradients after a look at everything they rely on, unless it is skipped."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        cache = self._rows
        valid = cache is not None and cache.valid(self, params, grads, replays)
        if not valid or self._partial:
            grads, replays = self._settled(params, grads, replays)
        if not valid or cache.unchecked:
            self._check_step(params, grads, replays)
        if params and backends.capturing(params[0].device):
            # Before anything is made, which would be made in the graph.
            self._check_capture(params[0].device, valid)
        if not valid and not skipped:
            cache = self._make_rows(params, grads, replays)
        if skipped:
            return None
        try:
            cache.refresh(grads, replays, elementwise=elementwise)
        except (RuntimeError, KeyError):
            # A gradient of another kind than at the steps before: partial, or say which it is.
            partial = self._partial
            grads, replays = self._settled(params, grads, replays)
            self._check_step(params, grads, replays)
            if partial or not self._partial:
                raise
            cache.refresh(grads, replays, elementwise=elementwise)
        return cache

    def _settled(self, params, grads, replays) -> tuple[list, list]:
        """Sums partial gradients, and remembers that there are such."""
        both = [*grads, *replays]
        found = sharding.settled([*params, *params][: len(both)], both)
        self._partial = not all(map(operator.is_, found, both))
        return found[: len(grads)], found[len(grads) :]

    def _check_capture(self, device: torch.device, valid: bool) -> None:
        """Raises if a graph is being captured that would replay the wrong thing."""
        if not backends.capturing(device):
            return
        if not self._capturable:
            raise RuntimeError(
                "this step is being captured into a CUDA graph, whose replays would repeat its "
                "draw, learning rate and step count; build the optimizer with capturable=True"
            )
        if not valid:
            raise RuntimeError(
                "the first step cannot be captured, it makes the state; run a warm-up step before "
                "the capture, as torch.cuda.graph() asks for"
            )

    def _captured_step(self, wide, hyper, all_rows, scaling: backends.Scaling) -> None:
        """A step that decides everything on the device, so that a graph of it can be replayed."""
        (rows,) = all_rows
        draw = self._draw_on(rows.device)
        if backends.capturing(rows.device):
            given = [x for g in self.param_groups for x in g.values() if isinstance(x, Tensor)]
            self._captured.append((self._rows, draw, scaling, given))
        flags = self._final_flags(rows, rows.constant_flags(0)).clone()
        gates = None
        if rows.anchored:
            gates = [
                rows.draw_flags(
                    flags, hyper, self._rule.hyper, draw, wide["seed"], wide["granularity"]
                )
            ]
        injecting = rows.anchored
        (found,) = self._engine.measure(wide, all_rows, injecting, scaling, gates)
        drawn = guidance.drawn(wide, 0, injecting)._replace(index_tensor=draw)
        with _ranges.record("dgg.update"):
            self._update_(
                rows, found, flags, hyper, drawn, scaling, look_ahead=False,
                replay_weight=float(wide["replay_weight"]),
            )  # fmt: skip
        draw.add_(1)
        strength = hyper[0]["strength"]
        self._engine.remember(wide, rows, flags, found, strength, scaling.found_inf)

    def _drop_rows(self) -> None:
        """Has the next step make its rows anew, and says so if a graph works on the present ones.

        Nothing can stop a replay; what it works on is kept, so that it harms nobody.
        """
        if self._rows is not None and any(entry[0] is self._rows for entry in self._captured):
            warnings.warn(
                "the step of this optimizer was captured into a CUDA graph, and what that reads "
                "and writes was replaced since: state was loaded or exchanged, a group added, an "
                "anchor set for the first time or cleared. A replay would go on with what was "
                "there before: capture it again",
                stacklevel=_callers.stacklevel(),
            )
        self._rows = None

    def _draw_on(self, device: torch.device) -> Tensor:
        """Returns the draw index as an int64 tensor on ``device``, the same in all groups."""
        value = self.param_groups[0]["draw_index"]
        if not (isinstance(value, Tensor) and value.device == device):
            value = torch.full((), int(value), dtype=torch.int64, device=device)
        for group in self.param_groups:
            group["draw_index"] = value
        return value

    def _advance(self, draw: int) -> None:
        if self._capturable:
            self._draw_on(self.param_groups[0]["params"][0].device).add_(1)
            return
        draw += 1  # one object for all groups, by which the next step knows that they agree
        for group in self.param_groups:
            group["draw_index"] = draw

    def _scaler_state(self, replays) -> tuple[backends.Scaling, Tensor | bool]:
        """Returns the scaling and whether to skip (a tensor if only the device knows)."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        seen = scale is not None or found is not None
        if not seen and not replays:
            return backends.Scaling(), False
        if replays and scale is None and (seen or guidance.unscaled_unseen()):
            raise RuntimeError(
                "GradScaler.unscale_() has unscaled the gradients but cannot reach the replay "
                "gradients; do not call it beside replay(): dgg clips in the step itself, set "
                "max_grad_norm on the optimizer. (Of a wrapper, ZeroRedundancyOptimizer say, "
                "GradScaler.step() calls it too: use bfloat16 without a scaler there)"
            )
        if not seen:
            return backends.Scaling(), False
        params = [p for g in self.param_groups for p in g["params"]]
        if scale is not None:
            guidance.refuse_scaler(params, self.process_group)
        devices = dict.fromkeys(p.device for p in params)
        launched = all(
            backends.launches(backends.choose(self._backend, device), device) for device in devices
        )
        scaling, skip = guidance.read_scaler(
            scale, found, next(iter(devices)) if launched else None
        )
        present = [r for r in replays if r is not None and r.numel()]
        if launched:
            if present and scaling.found_inf is not None:
                largest = torch.stack(torch._foreach_norm(present, float("inf")))
                infinite = largest.isfinite().all().logical_not()
                scaling = scaling._replace(
                    found_inf=scaling.found_inf.reshape(()) + infinite.to(torch.float32)
                )
            if scaling.found_inf is not None and self._waits_for_scaler():
                skip = bool(scaling.found_inf)
            return scaling, skip or (False if scaling.found_inf is None else scaling.found_inf)
        if found is not None and not skip and not all(anchor.finite(r) for r in present):
            skip = True
            warnings.warn(
                "the step is skipped because the replay gradients are inf or NaN, which GradScaler "
                "does not see: it will not lower its scale by itself; lower it with "
                "scaler.update(new_scale)",
                stacklevel=_callers.stacklevel(),
            )
        return scaling, skip

    def _waits_for_scaler(self) -> bool:
        """Whether this one step must know on the host if it is skipped."""
        return False

    def _check_step(self, params, grads, replays) -> None:
        """Checks everything a step relies on, before anything is changed."""
        labels = None
        group_of = [group for group in self.param_groups for _ in group["params"]]
        for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
            replay = replays[place] if replays else None
            if grad is None and replay is None:
                continue
            labels = labels or _arguments.group_labels(self.param_groups)
            label = labels[place]
            _arguments.check_param(
                param,
                label,
                stepped=True,
                elements=self.param_groups[0]["granularity"] == "element",
            )
            backends.choose_for(self._backend, param)
            for given, kind in ((grad, "gradient"), (replay, "replay gradient")):
                if given is not None:
                    _arguments.check_gradient(given, param, label, kind)
            entry = self.state.get(param, {})
            if not isinstance(entry, dict):
                raise TypeError(
                    f"the state of {label} is a {type(entry).__name__}, not a dict; drop it (del "
                    "optimizer.state[p])"
                )
            for name in (*self._needed(group_of[place]), "anchor", "master"):
                if entry.get(name) is not None:
                    _arguments.check_state(name, entry[name], param, label)
            held = entry.get("anchor")
            if held is not None and any(
                anchor.is_alias(held, theta) for theta in (param, entry.get("master", param))
            ):
                raise ValueError(
                    f"the anchor in the state of {label} is the parameter's own memory: it would "
                    "move along and guide nothing; call set_anchor(), which copies"
                )
        if self._awaits_load:
            raise RuntimeError(
                "prepare_for_load(), or a load that failed, has made room in this optimizer for a "
                "checkpoint that was not loaded: load it (set_optimizer_state_dict, "
                "set_state_dict or load_state_dict), or give it up with clear_anchor() or "
                "set_anchor()"
            )
        self._check_anchored(params)

    def _check_anchored(self, params: list[Tensor]) -> None:
        """Raises if anchors that the groups promise are not there."""
        groups = self.param_groups
        present = [sum("anchor" in self.state.get(p, ()) for p in g["params"]) for g in groups]
        promised = [group["anchored"] - self._others(n) for n, group in enumerate(groups)]
        missing = [here < there for here, there in zip(present, promised, strict=True)]
        if not any(missing):
            return
        # Somebody has taken parameters out of a group, or into another: none goes unguided.
        if self._rows is not None and sum(promised) - sum(present) == self._rows.taken_out(params):
            for n, group in enumerate(groups):
                group["anchored"] = present[n] + self._others(n)
            return
        number = missing.index(True)
        raise RuntimeError(
            f"group {number} was anchored ({groups[number]['anchored']} parameters) but only "
            f"{present[number]} anchors are in the state: the resume lost them, or parameters or "
            "state were exchanged. Load a checkpoint that has them, set them again with "
            "set_anchor(tensors) of the previous task's weights (at a task boundary: set_anchor() "
            "after the exchange), or give up guidance with clear_anchor()"
        )

    def _others(self, number: int) -> int:
        """Returns how many parameters of a group are anchored on other ranks."""
        return 0 if self._share is None else self._share.others(number, self.param_groups[number])

    def _make_rows(self, params, grads, replays) -> RowCache:
        if self._lost_share and self._share is None:
            raise RuntimeError(
                "this optimizer was copied out of a ZeroRedundancyOptimizer and has only one "
                "rank's share of the parameters: build a new ZeroRedundancyOptimizer"
            )
        if self._lost_group and self.process_group is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled, and its process group could not come "
                "along: set optimizer.process_group before the step, or its norms would be those "
                "of this rank alone"
            )
        self._warn_if_idle(params, grads, replays)
        self._warn_if_narrow(params, grads, replays)
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if grads[place] is not None or (replays and replays[place] is not None):
                    self._init_state(p, group)
                    if not self._has_master(p):  # the model has been made wide: model.float()
                        self.state.get(p, {}).pop("master", None)
                place += 1
        self._drop_rows()
        self._rows = RowCache(self, params, replays)
        return self._rows

    def _warn_if_idle(self, params, grads, replays) -> None:
        """Warns at a first step without any gradient: the model trains other parameters."""
        if self._rows is not None or any(self.state.values()):
            return
        waiting = [
            p for p in params if p.requires_grad and not is_lazy(p) and sharding.local(p).numel()
        ]
        if waiting and all(g is None for g in (*grads, *replays)):
            warnings.warn(
                f"the first step found no gradient in any of {len(waiting)} parameters and changed "
                "nothing. If the model was sharded or wrapped (fully_shard, an adapter) after the "
                "optimizer was made, it trains other parameters: make the optimizer afterwards",
                stacklevel=_callers.stacklevel(),
            )

    def _warn_if_nothing_happens(self, draw: int, cache: RowCache) -> None:
        """Warns once if no gradient, or no anchor, has been there for a long time."""
        self._idle = 0 if any([rows.present for rows in cache.all_rows]) else self._idle + 1
        if self._idle == _IDLE and not self._said_idle:
            self._said_idle = True
            warnings.warn(
                f"no parameter has had a gradient for {_IDLE} steps, and none has changed. If the "
                "model was sharded, wrapped or exchanged after the optimizer was made, it trains "
                "other parameters: make the optimizer afterwards",
                stacklevel=_callers.stacklevel(),
            )
        groups = self.param_groups
        if draw < _LONG or self._said_unguided or self._boundary_known or groups[0]["task_index"]:
            return
        if any(group["anchored"] for group in groups) or not guidance.can_inject(groups):
            return
        self._said_unguided = True
        warnings.warn(
            f"{draw + 1} steps were made with alpha > 0 and nothing is guided, for there is no "
            "anchor: call set_anchor() at the end of every task. If this is the first one there is "
            "nothing to protect yet: say so with set_anchor(task=0) before it begins",
            stacklevel=_callers.stacklevel(),
        )

    def _warn_if_narrow(self, params, grads, replays) -> None:
        """Warns once if 16-bit weights are stepped and nothing keeps what their rounding loses."""
        if self._said_narrow:
            return
        narrow = [
            place
            for place, p in enumerate(params)
            if p.dtype in _arguments.NARROW
            and (grads[place] is not None or (replays and replays[place] is not None))
            and not self._has_master(p)
            and not (self._stochastic and p.dtype == torch.bfloat16)
        ]
        if not narrow:
            return
        label = _arguments.group_labels(self.param_groups)[narrow[0]]
        more = f" and {len(narrow) - 1} more are" if len(narrow) > 1 else " is"
        dtype = params[narrow[0]].dtype
        rounding = " or stochastic_rounding=True (no memory)" if dtype == torch.bfloat16 else ""
        _arguments.warn_narrow(
            f"{label}{more}",
            dtype,
            f"pass master_weights=True (a float32 copy){rounding}, or keep the weights in float32 "
            "and compute in 16 bits under autocast",
        )
        self._said_narrow = True

    def _final_flags(self, rows: backends.Rows, flags: Tensor | None) -> Tensor:
        return rows.constant_flags(0) if flags is None else flags

    # -- the anchor -----------------------------------------------------------------------------

    @imitable
    @torch.inference_mode(False)  # what is made there no later step could write
    @torch.no_grad()
    def set_anchor(
        self,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None = None,
        *,
        model: torch.nn.Module | None = None,
        task: int | None = None,
    ) -> None:
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

        With ``capturable=True`` a CUDA graph of the step stays valid where every anchor is
        overwritten in place. Where anchors are new (the first call), and after `clear_anchor`,
        `load_state_dict` or `add_param_group`, it has to be captured again: a warning says so, and
        what the old graph works on is kept as long as the optimizer.

        Of a path the names are checked first; then every tensor is read one at a time, of sharded
        parameters each rank's own part only. All ranks call it; if one fails, none has changed
        anything and the others say what it was.

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
        draws = int(self.param_groups[0]["draw_index"])
        if task is not None:
            task = _arguments.plain("task", task)
            driver = self._driven_by()
            groups = self.param_groups if driver is None else driver.marked(self)
            begins = _boundary.begins_task(task, groups, draws, given=tensors is not None)
            self._boundary_known = True
            if not begins:
                return
        elif tensors is None:
            _boundary.refuse_resumed(self.param_groups, draws, self._engine.resumed)
        self._place_anchor(tensors, model=model, task=task)
        self._engine.named = task

    @imitable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _place_anchor(
        self,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None = None,
        *,
        model: torch.nn.Module | None = None,
        task: int | None = None,
    ) -> None:
        """Does what `set_anchor` does without asking whether it can be right.

        For frameworks that know by themselves where a task begins, as `dgg.hf` does.

        Args:
            tensors: As in `set_anchor`.
            model: As in `set_anchor`.
            task: Number of the task; None counts one up.
        """
        driver = self._driven_by()
        if driver is not None:
            driver.place_anchor(self, tensors, model, task)
            return
        if self._share is None:
            params = [p for group in self.param_groups for p in group["params"]]
            others = sharding.peers(params, self.process_group)
        else:
            others = self._share.peers()
        with sharding.on_all_or_none(others, _arguments.settings_of(self.param_groups)):
            plan = _boundary.plan_anchors(
                self.param_groups,
                {
                    p: entry.get("anchor")
                    for p, entry in self.state.items()
                    if isinstance(entry, dict) and entry
                },
                tensors,
                model,
                self._anchor_dtype,
                self._anchor_device,
                self._stepped,
                none=self._share is not None,
            )
        groups = {p: group for group in self.param_groups for p in group["params"]}
        moved = any([target is not self.state.get(p, {}).get("anchor") for p, _, target in plan])
        for p, source, target in plan:
            anchor.write(target, source)
            # Together with the moments: Adam would take a state that holds an anchor alone for
            # initialised, and checkpoints made before the first step would miss the moments.
            self._init_state(p, groups[p], before_first_step=True)
            self.state[p]["anchor"] = target
        for group in self.param_groups:
            group["anchored"] = sum("anchor" in self.state.get(p, ()) for p in group["params"])
            group["task_index"] = group["task_index"] + 1 if task is None else task
        if self._share is not None:
            self._share.note_anchors(self.param_groups, anchored=True)
        self._awaits_load = False
        if moved:  # else the next step finds that its distances are those of another anchor
            self._drop_rows()

    def _has_master(self, param: Tensor) -> bool:
        return self._master and param.dtype in _arguments.NARROW

    def _stepped(self, param: Tensor) -> Tensor:
        """Returns what a step updates for ``param``: its master weight, or the parameter."""
        if not self._has_master(param):
            return param.detach()
        master = self.state.get(param, {}).get("master")
        if master is None:
            return param.detach().float()
        # Somebody may have written the parameter since: loaded the best checkpoint, say.
        mine, theirs = sharding.local(master), sharding.local(param.detach())
        if torch.equal(mine.to(theirs.dtype), theirs):
            return master
        return sharding.like(reference.adopted(mine, theirs), param)

    def _make_state(self, param: Tensor, names: Iterable[str]) -> None:
        """Makes what is missing of ``names``: moments of zeros, and the master weight."""
        state = self.state[param]
        for name in names:
            if state.get(name) is not None:
                continue
            if name == "master":
                state[name] = param.detach().to(torch.float32, copy=True)
                continue
            dtype = anchor.storage_dtype(param, self._state_dtype, "a parameter")
            state[name] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
            )

    @imitable
    def clear_anchor(self) -> None:
        """Drops the anchor: from here on the optimizer is torch.optim's again."""
        driver = self._driven_by()
        if driver is not None:
            driver.clear_anchor(self)
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self.state[p].pop("anchor", None)
            group["anchored"] = 0
        if self._share is not None:
            self._share.note_anchors(self.param_groups, anchored=False)
        self._awaits_load = False
        self._drop_rows()

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
        if self._driven_by() is not None:
            raise RuntimeError(
                "replay() cannot keep gradients apart under DeepSpeed's ZeRO, which reduces them "
                "into partitions of its own in every backward pass: put the replayed examples into "
                "the batch instead (dgg.ReplayBuffer.mix)"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        if self._share is not None:
            # A reduction over ranks sums the gradients of those who step the others, too.
            params = self._share.params()
        return self._engine.replay.record(params)

    @imitable
    def clear_replay(self) -> None:
        """Drops the replay gradients that wait for a step, where that step is left out."""
        self._engine.replay.clear()

    @imitable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients in ``.grad``; those of `replay` are kept for the next step.

        A second call since the last replay block, without a step in between, drops them, too.

        Args:
            set_to_none: As in torch.optim.
        """
        super().zero_grad(set_to_none)
        self._engine.replay.zero_grad()

    @imitable
    def guidance_stats(self) -> guidance.Statistics:
        """Returns what the last step did, as tensors on the device: no synchronisation.

        Returns:
            ``injected`` (bool: whether anything was pulled), ``scale`` (s with the first group's
            strength; one value per tensor for ``norm_scope="tensor"``), ``grad_norm`` (‖g‖),
            ``distance`` (‖θ - θ*‖) and ``clip`` (c); None for what that step had no need to
            measure. ``anchored`` (int64: how many parameters have an anchor; 0 means that nothing
            can be guided yet) and ``guided`` (int64: how many were pulled; 0 where nothing was
            drawn). The attribute ``backend`` names who made the step.
        """
        return self._engine.statistics(sum(group["anchored"] for group in self.param_groups))

    @property
    @imitable
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped because gradients were inf or NaN (GradScaler).

        With ``fused=True`` or replay gradients; otherwise the scaler does not even call a step that
        is to be skipped.
        """
        return bool(self._skipped)

    def _step_scalar(self, param: Tensor, step: Any) -> Tensor:
        """Returns ``step`` as a float32 scalar: beside the parameter if launches write it."""
        device = param.device
        if not backends.launches(backends.choose(self._backend, device), device):
            device = torch.device("cpu")
        same = isinstance(step, Tensor) and not step.is_neg()
        if same and (step.dtype, step.dim(), step.device) == (torch.float32, 0, device):
            return step
        # Filled there: a copy of a number on the host would be waited for.
        return torch.full((), float(step), dtype=torch.float32, device=device)


def _first(groups: list[dict[str, Any]]) -> int | None:
    params = groups[0]["params"] if groups else []
    return id(params[0]) if params else None
