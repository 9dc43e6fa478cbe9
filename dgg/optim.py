# SPDX-License-Identifier: BSD-3-Clause
"""AdamW, Adam and SGD with Dynamic Gradient Guidance: drop-in for ``torch.optim``.

Until an anchor is set each class *is* the torch.optim class it derives from, with one fused pass
as its step. The flow of a step goes one way: here → `_dispatch` → a backend.
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
from torch.optim import optimizer as _torch_optimizer

from dgg import (
    _device,
    _dispatch,
    _fsdp1,
    _ranges,
    _zero_redundancy,
    anchor,
    checkpoint,
    guidance,
    reference,
    sharding,
    zero,
)  # fmt: skip

__all__ = ["SGD", "Adam", "AdamW"]

_FLAGS_OF_OURS = ("foreach", "fused", "capturable", "differentiable")


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


class _Guided:
    """What the guided optimizers share; stands before the torch.optim class in their bases."""

    # State key → list of the kernels.
    _columns: dict[str, str]
    # A copy cannot take the process group along.
    _lost_group = False
    # ... nor the ZeroRedundancyOptimizer of whose parameters it steps a share.
    _lost_share = False
    # The state is room for a checkpoint that is yet to be loaded.
    _awaits_load = False
    _rule: _dispatch.Rule

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
        self.process_group = guidance.check_process_group(options.pop("process_group"), options)
        self._share = _zero_redundancy.builder()
        if self._share is not None and (self.process_group is not None or self._capturable):
            raise ValueError(
                "process_group= and capturable=True do not go with ZeroRedundancyOptimizer, whose "
                "own process group is used and whose ranks synchronise in every step; leave both"
            )
        fused, foreach = options.pop("fused"), options.pop("foreach")
        self._transient()
        self._backend = options.pop("backend")
        self._anchor_dtype = guidance.check_anchor_dtype(options.pop("anchor_dtype"))
        self._anchor_device = guidance.check_anchor_device(options.pop("anchor_device"))
        if self._capturable and self._anchor_device is not None:
            raise ValueError(
                f"capturable=True does not go with anchor_device={str(self._anchor_device)!r}: "
                "anchors are brought to the device for draws that the host knows, those of a "
                "captured step only the device knows; leave anchor_device None"
            )
        self._state_dtype = guidance.check_state_dtype(options.pop("state_dtype"))
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
        self._fused = bool(fused or foreach)
        self._guidance = {**options, "draw_index": 0, "task_index": 0}
        guidance.check_options(self._guidance)
        # Identities: a weak reference would forbid torch to swap a parameter (to_empty() of
        # FSDP2's modules does), another one would keep what an engine exchanges alive.
        self._given, self._driver, self._own = [], None, None
        parent()
        self._whole, self._own = self.param_groups, _first(self.param_groups)
        guidance.check_backend(self._backend, self.param_groups)
        share = self._share
        every = self.param_groups if share is None else [{"params": share.params()}]
        guidance.check_precision(self._stochastic, self._master, every)
        self._check_kernels(p for group in self.param_groups for p in group["params"])
        self.defaults.update(self._guidance)
        # torch.optim sets this with fused=True only; our step always honours both attributes.
        self._step_supports_amp_scaling = True

    def _check_kernels(self, params: Iterable[Tensor]) -> None:
        """Raises unless fused and captured steps can be had where the parameters are."""
        devices = [d for d in dict.fromkeys(p.device for p in params) if d.type != "meta"]
        if self._capturable and len(devices) > 1:
            raise ValueError(
                f"capturable=True needs all parameters on one device, they are on {devices}; use "
                "an optimizer per device, or leave it False"
            )
        for device in devices:
            backend = _dispatch.choose(self._backend, device)
            if self._fused and backend == "reference":
                raise RuntimeError(
                    f"foreach=True or fused=True cannot be met on {str(device)!r}, the fused "
                    f"kernels miss: {_dispatch.unavailable('cpp', device)}"
                )
            if self._capturable and not _dispatch.launches(backend, device):
                raise ValueError(
                    f"capturable=True needs kernels that run on a GPU; on {str(device)!r} the step "
                    f"is the {backend!r} backend's, which no graph can capture: leave it False"
                )

    def _transient(self) -> None:
        # Nothing of this is ever needed by a checkpoint, a copy or a pickle.
        self._engine = guidance.Engine()
        self._rows: _RowCache | None = None
        # The last gradients were partial sums of the ranks'.
        self._partial = False
        self._skipped: Tensor | bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle needs: torch's three entries and the settings."""
        names = (
            "_backend", "_fused", "_capturable", "_anchor_dtype", "_anchor_device",
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
        self._step_supports_amp_scaling = True
        for group in self.param_groups:
            for name, value in self._guidance.items():
                group.setdefault(name, value)
            group.setdefault("anchored", 0)

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
        if isinstance(param_group, dict):
            for name in guidance.WIDE:
                if name in param_group and param_group[name] != wide[name]:
                    raise ValueError(
                        f"{name} is one setting for the whole optimizer ({wide[name]!r}); a group "
                        f"cannot have its own ({param_group[name]!r}). Per group: alpha, strength"
                    )
            options = {n: param_group[n] for n in guidance.PER_GROUP if n in param_group}
            guidance.check_options(options)
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            seen: set[int] = set()
            for place, param in enumerate(group["params"]):
                names = group.get("param_names")
                label = f"parameter {names[place]!r}" if names else f"parameter {place}"
                guidance.check_param(param, f"{label} of group {before}")
                if id(param) in seen:
                    raise ValueError(
                        f"{label} of group {before} is in the group twice and would be updated by "
                        "two threads at once; pass every parameter once"
                    )
                seen.add(id(param))
        except (TypeError, ValueError):
            del self.param_groups[before:]
            raise
        for name in guidance.WIDE:
            group[name] = wide[name]
        for name in guidance.PER_GROUP:
            group.setdefault(name, self._guidance[name])
        group["anchored"] = 0
        self._given += map(id, group["params"])
        self._rows = None

    # -- state ----------------------------------------------------------------------------------

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state by parameter: torch.optim's keys and ``anchor``.

        Whoever changes the state reads it here first, so that a step need not look at thousands
        of tensors that nobody touched.
        """
        self._state_read = True
        return self.__dict__["state"]

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
        with torch.no_grad(), _ranges.record("dgg.step"):
            if torch.compiler.is_compiling():
                self._uncompiled_step()
            else:
                # Not through the decorated one: its wrapper costs as much as a small kernel.
                self._step()
        return loss

    @torch._disable_dynamo
    def _uncompiled_step(self) -> None:
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
        hyper = [self._hyper(group) for group in groups]
        draw = 0 if self._capturable else wide["draw_index"]
        slot, cache = engine.replay, self._rows
        params = [p for group in groups for p in group["params"]] if slot else []
        replays = [slot.get(p) for p in params]
        scaling, self._skipped = self._scaler_state(replays)
        skipped = self._skipped is True
        if cache is not None and cache.launched:
            self._check_capture(cache.all_rows[0].device, True)
        if cache is None or slot or skipped or not cache.gather(self):
            cache = self._take_up(replays, skipped, elementwise=wide["granularity"] == "element")
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
            self._advance(draw)
            slot.clear()
            return
        for rows in cache.all_rows:
            if rows.has_masters:
                rows.take_up_changes()
        if self._capturable:
            self._captured_step(wide, hyper, cache.all_rows, scaling)
            slot.clear()
            return
        flags = [engine.flags(wide, groups, rows, draw) for rows in cache.all_rows]
        # Ranks that have nothing to inject themselves take part in the norms of those that do.
        injecting = any(x is not None for x in (flags if share is None else every))
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

    def _update_(self, rows: _dispatch.Rows, *args, **kwargs) -> None:
        _dispatch.update_(self._rule, rows, *args, **kwargs)

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

    def _make_template(self) -> None:
        """Makes the state of torch's checkpoint helper, which calls a step with zero gradients.

        Nothing else: no step is counted, no draw consumed, no momentum begun.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._check_step(params, [p.grad for p in params], [])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._init_state(p, group)

    def _skip_update(self, param: Tensor) -> None:
        """Ends a step in which every element of ``param`` is padding and none is updated."""
        step = self.state[param].get("step")
        if step is not None:
            step += 1

    def _take_up(self, replays, skipped: bool, *, elementwise: bool) -> _RowCache | None:
        """Takes up the gradients after a look at everything they rely on, unless it is skipped."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        cache = self._rows
        valid = cache is not None and cache.valid(self, params, grads, replays)
        if not valid or self._partial:
            grads, replays = self._settled(params, grads, replays)
        if not valid or cache.unchecked:
            self._check_step(params, grads, replays)
        if not valid and not skipped:
            cache = self._make_rows(params, grads, replays)
        if cache is not None and cache.launched:
            self._check_capture(params[0].device, valid)
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
        if not _device.capturing(device):
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

    def _captured_step(self, wide, hyper, all_rows, scaling: _dispatch.Scaling) -> None:
        """A step that decides everything on the device, so that a graph of it can be replayed."""
        (rows,) = all_rows
        draw = self._draw_on(rows.device)
        flags = self._final_flags(rows, rows.constant_flags(0)).clone()
        gates = None
        if rows.anchored:
            gates = [
                _dispatch.draw_flags(
                    rows, flags, hyper, self._rule.hyper, draw, wide["seed"], wide["granularity"]
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
        for group in self.param_groups:
            group["draw_index"] = draw + 1

    def _scaler_state(self, replays) -> tuple[_dispatch.Scaling, Tensor | bool]:
        """Returns the scaling and whether to skip (a tensor if only the device knows)."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None:
            return _dispatch.Scaling(), False
        if replays and found is not None and scale is None:
            raise RuntimeError(
                "GradScaler.unscale_() has unscaled the gradients but cannot reach the replay "
                "gradients; do not call it beside replay(): dgg clips in the step itself, set "
                "max_grad_norm on the optimizer"
            )
        devices = dict.fromkeys(p.device for g in self.param_groups for p in g["params"])
        launched = all(
            _dispatch.launches(_dispatch.choose(self._backend, device), device)
            for device in devices
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
                stacklevel=5,
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
            labels = labels or guidance.group_labels(self.param_groups)
            label = labels[place]
            guidance.check_param(
                param,
                label,
                stepped=True,
                elements=self.param_groups[0]["granularity"] == "element",
            )
            for given, kind in ((grad, "gradient"), (replay, "replay gradient")):
                if given is not None:
                    guidance.check_gradient(given, param, label, kind)
            for name in (*self._needed(group_of[place]), "anchor", "master"):
                value = self.state.get(param, {}).get(name)
                if value is not None and value.shape != param.shape:
                    raise ValueError(
                        f"{label} has shape {tuple(param.shape)}, its {name} "
                        f"{tuple(value.shape)}: a parameter that changed its shape is a new one; "
                        "drop its state (del optimizer.state[p]) and call set_anchor() again, or "
                        "build a new optimizer"
                    )
        if self._awaits_load:
            raise RuntimeError(
                "prepare_for_load() has made room in this optimizer for a checkpoint that was not "
                "loaded: load it (set_optimizer_state_dict, set_state_dict or load_state_dict), or "
                "give it up with clear_anchor() or set_anchor()"
            )
        for number, group in enumerate(self.param_groups):
            present = sum("anchor" in self.state.get(p, ()) for p in group["params"])
            if present < group["anchored"] - self._others(number):
                raise RuntimeError(
                    f"group {number} was anchored ({group['anchored']} parameters) but only "
                    f"{present} anchors are in the state: the resume lost them. Load a checkpoint "
                    "that has them, set them again with set_anchor(tensors) of the previous "
                    "task's weights, or give up guidance with clear_anchor()"
                )

    def _others(self, number: int) -> int:
        """Returns how many parameters of a group are anchored on other ranks."""
        return 0 if self._share is None else self._share.others(number, self.param_groups[number])

    def _make_rows(self, params, grads, replays) -> _RowCache:
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
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if grads[place] is not None or (replays and replays[place] is not None):
                    self._init_state(p, group)
                place += 1
        self._rows = _RowCache(self, params)
        return self._rows

    def _warn_if_idle(self, params, grads, replays) -> None:
        """Warns at a first step without any gradient: the model trains other parameters."""
        if self._rows is not None or any(self.state.values()):
            return
        waiting = [p for p in params if p.requires_grad and sharding.local(p).numel()]
        if waiting and all(g is None for g in (*grads, *replays)):
            warnings.warn(
                f"the first step found no gradient in any of {len(waiting)} parameters and changed "
                "nothing. If the model was sharded or wrapped (fully_shard, an adapter) after the "
                "optimizer was made, it trains other parameters: make the optimizer afterwards",
                stacklevel=7,
            )

    def _final_flags(self, rows: _dispatch.Rows, flags: Tensor | None) -> Tensor:
        return rows.constant_flags(0) if flags is None else flags

    # -- the anchor -----------------------------------------------------------------------------

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

        Of a path the names are checked first; then every tensor is read one at a time, of sharded
        parameters each rank's own part only.

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
            RuntimeError: It would replace an anchor that was just resumed, or the anchor of a
                task in progress is gone.
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
            driver = self._driven_by()
            groups = self.param_groups if driver is None else driver.marked(self)
            if not guidance.begins_task(task, groups, draws, given=tensors is not None):
                return
        elif tensors is None:
            guidance.refuse_resumed(self.param_groups, draws, self._engine.resumed)
        self._place_anchor(tensors, model=model, task=task)
        self._engine.named = task

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
        plan = guidance.plan_anchors(
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
        self._awaits_load, self._rows = False, None

    def _has_master(self, param: Tensor) -> bool:
        return self._master and param.dtype in (torch.bfloat16, torch.float16)

    def _stepped(self, param: Tensor) -> Tensor:
        """Returns what a step updates for ``param``: its master weight, or the parameter."""
        if not self._has_master(param):
            return param.detach()
        master = self.state.get(param, {}).get("master")
        return param.detach().float() if master is None else master

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
        self._awaits_load, self._rows = False, None

    # -- replay, statistics, gradients ----------------------------------------------------------

    def replay(self) -> AbstractContextManager[None]:
        """Lets the gradients of the block become r, beside ``.grad`` and without a copy.

        ``with opt.replay(): loss_on_replay.backward()``. Several blocks before a step add up; the
        step (or `zero_grad`) consumes them.
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, those of `replay` too.

        Args:
            set_to_none: As in torch.optim; the replay gradients are dropped in either case.
        """
        self._engine.replay.clear()
        super().zero_grad(set_to_none)

    def guidance_stats(self) -> dict[str, Tensor | None]:
        """Returns what the last step did, as tensors on the device: no synchronisation.

        Returns:
            ``injected`` (bool), ``scale`` (s with the first group's strength; one value per
            tensor for ``norm_scope="tensor"``), ``grad_norm`` (‖g‖), ``distance`` (‖θ - θ*‖) and
            ``clip`` (c); None for what that step had no need to measure.
        """
        return self._engine.statistics()

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped because gradients were inf or NaN (GradScaler)."""
        return bool(self._skipped)

    # -- checkpoints ----------------------------------------------------------------------------

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the torch.optim class it replaces.

        Moments follow torch's policy; an anchor keeps the dtype it was saved in. How the step is
        carried out (foreach, fused, backend) stays as constructed, whatever the checkpoint says.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            KeyError: It is no optimizer's state dict.
            RuntimeError: The checkpoint says it is anchored but anchors are missing.
            TypeError: It is no mapping, or an anchor in it is no floating tensor.
            ValueError: Groups or shapes differ, or it carries no anchor while this optimizer has
                one. After any error the optimizer is as it was.
        """
        state_dict = self._completed(state_dict)
        anchors = self._checked_anchors(state_dict)
        before = int(self.param_groups[0]["draw_index"]), self._engine.resumed
        if before[0] <= 1:
            guidance.refuse_earlier(self._engine.named, state_dict["param_groups"])
        kept = [{name: group.get(name) for name in _FLAGS_OF_OURS} for group in self.param_groups]
        ours = [
            {name: group[name] for name in (*self._guidance, "anchored")}
            for group in self.param_groups
        ]
        # torch casts all floating state to the parameter's dtype, which would round an anchor, a
        # master weight and moments that are kept in another dtype.
        kept_back = {"anchor", "master"}
        if self._state_dtype is not None:
            kept_back |= self._columns.keys() - {"step"}
        stripped = dict(state_dict)
        stripped["state"] = {
            key: {k: v for k, v in entry.items() if k not in kept_back}
            if isinstance(entry, dict)
            else entry
            for key, entry in state_dict["state"].items()
        }
        super().load_state_dict(stripped)
        self._load_kept_back(state_dict, kept_back - {"anchor"})
        self._shard_moments()
        for group, flags, mine, saved in zip(
            self.param_groups, kept, ours, state_dict["param_groups"], strict=True
        ):
            group.update({k: v for k, v in flags.items() if v is not None or k in group})
            group.update({k: v for k, v in mine.items() if k not in saved})
        for param, value in anchors.items():
            # A copy: set_anchor() writes in place, and the checkpoint may be another optimizer's.
            made = anchor.allocate(param, value.dtype, self._anchor_device)
            anchor.write(made, value.detach())
            self.state[param]["anchor"] = made
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if saved.get("anchored"):
                self._anchor_empty(group)
            present = sum("anchor" in self.state.get(p, ()) for p in group["params"])
            group["anchored"] = max(present, saved.get("anchored", 0))  # other ranks' included
        self._normalise_steps()
        # Torch's checkpoint helpers make an empty step before they load into a new optimizer.
        fresh = before[0] <= 1 or before[0] == before[1]
        self._engine.resumed = int(self.param_groups[0]["draw_index"]) if fresh else None
        self._awaits_load, self._rows = False, None

    def _anchor_empty(self, group: dict[str, Any]) -> None:
        """Anchors what FSDP1 left nothing of here, and its checkpoints therefore leave out.

        A rank on which all is empty would not know otherwise that there are norms to be summed.
        """
        for param in group["params"]:
            empty = _fsdp1.is_empty(param) and param.requires_grad
            if empty and "anchor" not in self.state.get(param, ()):
                self._init_state(param, group, before_first_step=True)
                self.state[param]["anchor"] = torch.empty_like(param, requires_grad=False)

    def _load_kept_back(self, state_dict: Mapping[str, Any], names: set[str]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                for name in names & state_dict["state"].get(key, {}).keys():
                    value = state_dict["state"][key][name]
                    if value is None:
                        continue
                    dtype = torch.float32
                    if name != "master":
                        dtype = anchor.storage_dtype(param, self._state_dtype, "a parameter")
                    self.state[param][name] = value.detach().to(param.device, dtype, copy=True)

    def _completed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a state dict as it would be if torch's checkpoint helpers had left it whole.

        Of flattened ones they put empty dicts where the checkpoint has nothing, and they leave out
        frozen parameters, whose prepared room the load has filled all the same.
        """
        self._check_form(state_dict)
        state = {
            key: {k: v for k, v in entry.items() if not (isinstance(v, Mapping) and not v)}
            if isinstance(entry, Mapping)
            else entry
            for key, entry in state_dict["state"].items()
        }
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for place, (param, key) in enumerate(
                zip(group["params"], saved["params"], strict=True)
            ):
                entry = state.get(key)
                if entry is not None and entry.keys() < state_dict["state"][key].keys():
                    self._check_partial(entry, place)
                if entry is None and self._awaits_load and not param.requires_grad:
                    room = self.state.get(param, {})
                    if "anchor" in room and anchor.finite(room["anchor"]):
                        state[key] = dict(room)
        return {**state_dict, "state": {key: entry for key, entry in state.items() if entry != {}}}

    def _check_partial(self, entry: Mapping[str, Any], place: int) -> None:
        missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name in self._columns]
        missing = [name for name in missing if entry and name not in entry]
        if missing:
            raise ValueError(
                f"the checkpoint carries no {', '.join(missing)} of parameter {place}, but other "
                "state of it: it is not this optimizer's, or parts of it were lost on the way"
            )

    def _shard_moments(self) -> None:
        """Shards what came as whole tensors: what torch's helpers find no room for."""
        for param, entry in self.state.items():
            if not sharding.is_dtensor(param) or not isinstance(entry, dict):
                continue
            for name in entry.keys() & {*self._columns, "master"} - {"step", "anchor"}:
                value = entry[name]
                if isinstance(value, Tensor) and not sharding.is_dtensor(value):
                    made = anchor.allocate(param, value.dtype, None)
                    anchor.write(made, value.detach())
                    entry[name] = made

    def _check_form(self, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict() takes what an optimizer's state_dict() returned, not "
                f"{type(state_dict).__name__}; torch.load the file first"
            )
        if not state_dict.keys() >= {"state", "param_groups"}:
            raise KeyError(
                f"no optimizer's state dict: it has {list(map(str, state_dict))[:5]}, not state "
                "and param_groups; pass what optimizer.state_dict() returned (of a whole "
                "checkpoint the optimizer's entry)"
            )
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in saved_groups]
        mine = [len(group["params"]) for group in self.param_groups]
        if sizes != mine:
            raise ValueError(
                f"the checkpoint's groups hold {sizes} parameters, this optimizer's {mine}; build "
                "the optimizer over the same groups first (add_param_group() and freezing included)"
            )

    def _checked_anchors(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Tensor]:
        saved_groups = state_dict["param_groups"]
        found: dict[Tensor, Tensor] = {}
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            present, filled, frozen = 0, 0, 0
            for place, (param, key) in enumerate(
                zip(group["params"], saved["params"], strict=False)
            ):
                entry = state_dict["state"].get(key, {})
                for name in self._columns.keys() & entry.keys() - {"step", "anchor"}:
                    shape = getattr(entry[name], "shape", param.shape)
                    if shape != param.shape:
                        raise ValueError(
                            f"the checkpoint's {name} of parameter {place} of group {number} has "
                            f"shape {tuple(shape)}, the parameter has {tuple(param.shape)}; load "
                            "it into the same architecture"
                        )
                if "master" in entry and not self._has_master(param):
                    raise ValueError(
                        f"the checkpoint has a master weight of parameter {place} of group "
                        f"{number}, which this optimizer would not keep; build it with "
                        "master_weights=True over 16-bit parameters"
                    )
                value = entry.get("anchor")
                if value is None or self._unfilled(value, saved):
                    present += _fsdp1.is_empty(param)
                    frozen += not param.requires_grad
                    continue
                anchor.check_source(value, param, f"parameter {place} of group {number}")
                found[param] = value
                present += 1
                filled += value.numel() > 0
            check = {name: saved[name] for name in self._guidance if name in saved}
            guidance.check_agreement(number, check, saved_groups[0])
            guidance.check_options(check)
            missing = saved.get("anchored", 0) - self._others(number) - present
            if missing > 0:
                raise RuntimeError(
                    f"the checkpoint's group {number} was anchored ({saved['anchored']} "
                    f"parameters) but carries {present} anchors: they were lost on the way. "
                    + (
                        "torch's checkpoint helpers leave out the state of frozen parameters: "
                        "requires_grad_(True) while it is loaded, or prepare_for_load() with a "
                        "distributed checkpoint"
                        if missing <= frozen
                        else "A new optimizer has no room for them where a distributed checkpoint "
                        "or torch's set_optimizer_state_dict fills what is there: call "
                        "prepare_for_load(checkpoint) first, before get_optimizer_state_dict. "
                        "Otherwise save and load the whole state_dict(), or call "
                        "set_anchor(tensors) with the previous task's weights after loading one "
                        "without guidance"
                    )
                )
            if filled > saved.get("anchored", filled):
                raise ValueError(
                    f"the checkpoint's group {number} has {saved['anchored']} anchored parameters, "
                    f"but {filled} anchors came with it: they are not the checkpoint's but this "
                    "optimizer's, as they stood in the template of a partial load. Call "
                    "prepare_for_load(checkpoint) or clear_anchor() before the template is made"
                )
        mine = any("anchor" in entry for entry in self.state.values() if isinstance(entry, dict))
        mine = mine and not self._awaits_load
        if mine and not found and not any(saved.get("anchored") for saved in saved_groups):
            raise ValueError(
                "this optimizer has an anchor and the checkpoint carries none: loading would drop "
                "it silently. Load first and call set_anchor() afterwards, or call clear_anchor() "
                "before loading"
            )
        return found

    def _unfilled(self, value: Any, saved: Mapping[str, Any]) -> bool:
        """Returns whether an anchor is prepared room into which nothing was loaded."""
        if not self._awaits_load or not isinstance(value, Tensor):
            return False
        if sharding.local(value).numel() == 0:  # which only the group can tell
            return not saved.get("anchored", 1)
        return not anchor.finite(value)

    @torch.no_grad()
    def prepare_for_load(
        self,
        checkpoint: Any = None,
        *,
        model: torch.nn.Module | None = None,
    ) -> None:
        """Makes room for what a distributed checkpoint holds: anchors and the rest of the state.

        torch.distributed.checkpoint loads into what is there. A new optimizer has no anchors, so
        without this a guided checkpoint is refused when it is loaded. Call it before
        ``get_optimizer_state_dict`` or ``get_state_dict`` make the template. It counts as no task
        and sets no anchor: until the checkpoint is loaded, `step` raises.

        Args:
            checkpoint: Directory of the checkpoint, a StorageReader or its Metadata: exactly what
                it holds finds room, in the dtypes it was saved in. None makes room for an anchor of
                every trainable parameter, in ``anchor_dtype``, beside the other state.
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
        if self._driven_by() is not None or self._share is not None:
            raise RuntimeError(
                "prepare_for_load() is for torch.distributed.checkpoint over FSDP2 and other "
                "DTensors; DeepSpeed and ZeroRedundancyOptimizer load their own checkpoints"
            )
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        if checkpoint is None:
            held = [
                {name: None for name in (*self._kept(p, group), "anchor")}
                if p.requires_grad or p in self.state
                else {}
                for p, group in every
            ]
        else:
            held = self._held_by(checkpoint, model)
        for number, ((p, _), names) in enumerate(zip(every, held, strict=True)):
            if "master" in names and not self._has_master(p):
                raise ValueError(
                    f"the checkpoint has a master weight of parameter {number}, which this "
                    "optimizer would not keep; build it with master_weights=True over 16-bit "
                    "parameters"
                )
        for (p, _), names in zip(every, held, strict=True):
            if not names:
                self.state.pop(p, None)
                continue
            state = self.state[p]
            for name in state.keys() - names:
                del state[name]
            if "step" in names:
                state["step"] = self._step_scalar(p, state.get("step", 0.0))
            self._make_state(p, [name for name in names if name not in ("step", "anchor")])
            if "anchor" in names:
                dtype = names["anchor"] or anchor.storage_dtype(
                    self._stepped(p), self._anchor_dtype, "a parameter"
                )
                state["anchor"] = anchor.allocate(p, dtype, self._anchor_device)
                # No weights are NaN: what is not overwritten will be noticed.
                sharding.local(state["anchor"]).fill_(float("nan"))
        for group in self.param_groups:
            group["anchored"] = sum("anchor" in self.state.get(p, ()) for p in group["params"])
        self._awaits_load, self._rows = True, None

    def _kept(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the keys of the state that a step keeps of a parameter, anchors apart."""
        step = ("step",) if "step" in self._columns else ()
        master = ("master",) if self._has_master(param) else ()
        return (*step, *self._needed(group), *master)

    def _held_by(self, source: Any, model) -> list[dict[str, torch.dtype | None]]:
        known = {} if model is None else anchor.names_of_parameters(model)
        names: list[list[str]] = []
        for group in self.param_groups:
            own = group.get("param_names", [None] * len(group["params"]))
            for p, name in zip(group["params"], own, strict=True):
                names.append([*known.get(p, []), *([] if name is None else anchor.variants(name))])
        return checkpoint.find(checkpoint.held_by(source, {*self._columns, "master"}), names)

    def _normalise_steps(self) -> None:
        """Gives ``step`` and the draw index the form that the kernels write."""
        for param, entry in self.state.items():
            if isinstance(entry, dict) and entry.get("step") is not None:
                entry["step"] = self._step_scalar(param, entry["step"])
        draw = self.param_groups[0]["draw_index"]
        if isinstance(draw, Tensor) and not self._capturable:
            for group in self.param_groups:
                group["draw_index"] = int(draw)

    def _step_scalar(self, param: Tensor, step: Any) -> Tensor:
        """Returns ``step`` as a float32 scalar: beside the parameter if launches write it."""
        device = param.device
        if not _dispatch.launches(_dispatch.choose(self._backend, device), device):
            device = torch.device("cpu")
        if isinstance(step, Tensor) and (step.dtype, step.dim(), step.device) == (
            torch.float32,
            0,
            device,
        ):
            return step
        # Filled there: a copy of a number on the host would be waited for.
        return torch.full((), float(step), dtype=torch.float32, device=device)


# Every so many steps the state is looked at even if nobody has read `optimizer.state` in between:
# somebody may have kept an entry of it since long ago.
_LOOK_EVERY = 64


class _RowCache:
    """The rows of all parameters, one `Rows` per device, and what they were made from."""

    def __init__(self, optimizer: _Guided, params: list[Tensor]) -> None:
        self.params = params
        states = [optimizer.state.get(p) for p in params]
        self._keys, self._entries = list(optimizer.state), list(optimizer.state.values())
        self._dicts = [entry for entry in self._entries if isinstance(entry, dict)]
        self._snapshots = [dict(entry) for entry in self._dicts]
        items = [(entry, key, v) for entry in self._dicts for key, v in entry.items()]
        tensors = [v for _, _, v in items if isinstance(v, Tensor)]
        self._single = [
            (entry, key, v) for entry, key, v in items if isinstance(v, Tensor) and v.numel() == 1
        ]
        self._unlooked = 0
        optimizer._state_read = False
        self._groups = [
            number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]
        ]
        # Turning amsgrad or momentum on between two steps asks for state that is not there yet.
        self._needed = [optimizer._needed(group) for group in optimizer.param_groups]
        self.all_rows: list[_dispatch.Rows] = []
        self._places: list[list[int] | None] = []
        # Frozen parameters of a whole model are not carried through every step.
        usable = [
            i
            for i, p in enumerate(params)
            if (states[i] or p.requires_grad or p.grad is not None)
            and p.dtype.to_real() in anchor.FLOAT_DTYPES
        ]
        used = set(usable)
        needed = [
            (*self._needed[number], *(("master",) if optimizer._has_master(p) else ()))
            for number, p in zip(self._groups, params, strict=True)
        ]
        self._unready = [
            i
            for i, state in enumerate(states)
            if i not in used or any((state or {}).get(name) is None for name in needed[i])
        ]
        share = optimizer._share
        numbers = range(len(params)) if share is None else share.numbers(params)
        devices: dict[torch.device, list[int]] = {}
        for i in usable:
            devices.setdefault(params[i].device, []).append(i)
        for device, places in devices.items():
            state = [states[i] or {} for i in places]
            columns = {
                column: [s.get(name) for s in state] for name, column in optimizer._columns.items()
            }
            self.all_rows.append(
                _dispatch.Rows(
                    _dispatch.choose(optimizer._backend, device),
                    [params[i] for i in places],
                    [self._groups[i] for i in places],
                    [numbers[i] for i in places],
                    masters=[
                        s.get("master") if optimizer._has_master(params[i]) else None
                        for i, s in zip(places, state, strict=True)
                    ],
                    stochastic=optimizer._stochastic,
                    capturable=optimizer._capturable,
                    process_group=optimizer.process_group,
                    reduction=None if share is None else share.reduction,
                    **columns,
                )
            )
            self._places.append(None if len(places) == len(params) else places)
        # share_memory_() and `.data =` take the memory from under a tensor. The parameters with
        # rows come first: their gradients can be taken up on the way.
        self._watch = _dispatch.Watch(
            [
                *(p for rows in self.all_rows for p in rows.params),
                *(p for i, p in enumerate(params) if i not in used),
                *tensors,
            ]
        )
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        self._lists = [list(group["params"]) for group in optimizer.param_groups]
        self._singles = [
            (number, place, p)
            for number, members in enumerate(self._lists)
            for place, p in enumerate(members)
            if p.numel() == 1
        ]
        self._gathers = len(self.all_rows) == 1 and self.all_rows[0].gather_by(self._watch)

    def gather(self, optimizer: _Guided) -> bool:
        """Takes up the gradients of this step natively; returns False if that is not enough.

        It is enough if nothing was exchanged since (see `valid`) and all gradients are plain.
        """
        groups = optimizer.param_groups
        return (
            self._gathers
            and self._same_params(groups)
            and self._needed == [optimizer._needed(group) for group in groups]
            and not any([self.params[i].grad is not None for i in self._unready])
            and self._unchanged_state(optimizer)
            and self.all_rows[0].gather()
        )

    def _same_params(self, groups) -> bool:
        # Comparing lists takes identical members as equal without a look at them, as in
        # `_same_entries`.
        try:
            if [group["params"] for group in groups] != self._lists:
                return False
        except (RuntimeError, TypeError):
            return False
        return all([groups[number]["params"][place] is p for number, place, p in self._singles])

    def valid(self, optimizer: _Guided, params: list[Tensor], grads, replays) -> bool:
        """Returns whether nothing was exchanged since: parameters, memory, state, groups."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if self._needed != [optimizer._needed(group) for group in optimizer.param_groups]:
            return False
        if any(grads[i] is not None or (replays and replays[i] is not None) for i in self._unready):
            return False
        # The state's memory too, whoever read it: a table of freed addresses corrupts the heap.
        if not all([p._local_tensor is shard for p, shard in self._shards]):
            return False
        return self._watch.unmoved() and self._unchanged_state(optimizer)

    def _unchanged_state(self, optimizer: _Guided) -> bool:
        self._unlooked += 1
        if optimizer._state_read or self._unlooked == _LOOK_EVERY:
            if not self._same_state(optimizer):
                return False
            if optimizer._state_read:
                # Whoever read the state may have written into an anchor.
                for rows in self.all_rows:
                    rows.forget()
            optimizer._state_read, self._unlooked = False, 0
        return True

    def _same_state(self, optimizer: _Guided) -> bool:
        # Not looked up by parameter: hashing a tensor costs more than all of this.
        keys, entries = list(optimizer.state), list(optimizer.state.values())
        if len(keys) != len(self._keys) or not all(map(operator.is_, keys, self._keys)):
            return False
        return all(map(operator.is_, entries, self._entries)) and self._same_entries()

    def _same_entries(self) -> bool:
        # Comparing dicts takes identical values as equal without a look at them. Others meet
        # Tensor.__eq__, which has no truth value unless it is of one element: those are looked at
        # one by one.
        try:
            if self._dicts != self._snapshots:
                return False
        except (RuntimeError, TypeError):
            return False
        return all([entry[key] is value for entry, key, value in self._single])

    @property
    def launched(self) -> bool:
        """Whether any device's step is launched and not waited for."""
        return any([rows.kernels is not None for rows in self.all_rows])

    @property
    def unchecked(self) -> bool:
        """Whether a backend takes gradients without looking at their kind."""
        return any([rows.backend == "reference" for rows in self.all_rows])

    def refresh(self, grads, replays, *, elementwise: bool) -> None:
        """Hands every device's rows their gradients."""
        for rows, places in zip(self.all_rows, self._places, strict=True):
            if places is None:
                rows.refresh(grads, replays, elementwise=elementwise)
            else:
                mine = [replays[i] for i in places] if replays else []
                rows.refresh([grads[i] for i in places], mine, elementwise=elementwise)


class Adam(_Guided, torch.optim.Adam):
    """`torch.optim.Adam` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient G.
        amsgrad: Divide by the largest second moment so far.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        capturable: Make steps that a CUDA graph can capture: draw index, draws and step counts
            stay on the device, and ``lr`` and ``alpha`` may be tensors there. GPU only.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        decoupled_weight_decay: True makes this AdamW.
        guidance: The keyword arguments from ``alpha`` to ``backend`` are those of `AdamW`.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _rule = _dispatch.ADAM
    _columns = {
        "exp_avg": "exp_avgs",
        "exp_avg_sq": "exp_avg_sqs",
        "max_exp_avg_sq": "max_exp_avg_sqs",
        "step": "steps",
        "anchor": "anchors",
    }

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        arguments = {"foreach": foreach, "fused": fused, "maximize": maximize}

        def parent() -> None:
            torch.optim.Adam.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad,
                decoupled_weight_decay=decoupled_weight_decay, **arguments,
            )  # fmt: skip

        self._init_guidance(
            parent, foreach=foreach, fused=fused, capturable=capturable,
            differentiable=differentiable, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip

    def _needed(self, group: dict) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def _init_state(self, param: Tensor, group: dict, *, before_first_step: bool = False) -> None:
        state = self.state[param]
        state["step"] = self._step_scalar(param, state.get("step", 0.0))
        self._make_state(param, self._needed(group))
        if self._has_master(param):
            self._make_state(param, ("master",))

    def _hyper(self, group: dict) -> dict[str, Any]:
        return {
            "lr": _host(group, "lr"),
            "beta1": _host_value("betas", group["betas"][0]),
            "beta2": _host_value("betas", group["betas"][1]),
            "eps": group["eps"],
            "weight_decay": _host(group, "weight_decay"),
            "decoupled": group["decoupled_weight_decay"],
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
            "strength": _host(group, "strength"),
            "threshold": guidance.threshold(group["alpha"]),
        }


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay: θ is multiplied by 1 - lr · weight_decay.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        capturable: Make steps that a CUDA graph can capture: draw index, draws and step counts
            stay on the device, and ``lr`` and ``alpha`` may be tensors there. GPU only.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        alpha: Probability of injecting the guidance at a step (α); per group, schedulable.
        strength: Factor of the guidance's scale s; per group, schedulable.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False is the paper's ablation (s = strength).
        norm_scope: ``"global"``: one norm over all guided parameters; ``"tensor"``: one each.
        granularity: What one Bernoulli draw decides: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm within the step, or None.
        replay_weight: Weight w of the replay gradients recorded by `replay`.
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        anchor_device: Storage device of the anchor; None is the parameter's.
        state_dtype: Storage dtype of the moments; None is the parameter's.
        stochastic_rounding: Round bfloat16 parameters stochastically, so that small updates are
            not lost in the mean; the random words are drawn as the Bernoulli draws are.
        master_weights: Keep a float32 copy of every bfloat16 and float16 parameter in
            ``state[p]["master"]``; steps update it and write its rounding to the parameter.
        process_group: Group over whose ranks plain parameters are flat partitions of a whole, as
            some engines hand them over; norms are summed over it. DTensors need none.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or None (the fastest).

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> opt = dgg.AdamW(model.parameters(), lr=2e-4, alpha=0.2, max_grad_norm=1.0)
        >>> for task in tasks:
        ...     for batch in task:
        ...         model(batch).backward()
        ...         opt.step()
        ...         opt.zero_grad()
        ...     opt.set_anchor()
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip


class SGD(_Guided, torch.optim.SGD):
    """`torch.optim.SGD` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        momentum: Momentum factor μ.
        dampening: Dampening τ of the momentum.
        weight_decay: L2 penalty, added to the gradient G.
        nesterov: Nesterov momentum.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        guidance: The keyword arguments from ``alpha`` to ``backend`` are those of `AdamW`.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _rule = _dispatch.SGD
    _columns = {"momentum_buffer": "exp_avgs", "anchor": "anchors"}

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        def parent() -> None:
            torch.optim.SGD.__init__(
                self, params, lr, momentum, dampening, weight_decay, nesterov,
                maximize=maximize, foreach=foreach, fused=fused,
            )  # fmt: skip

        self._init_guidance(
            parent, foreach=foreach, fused=fused, capturable=capturable,
            differentiable=differentiable, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip

    def _transient(self) -> None:
        super()._transient()
        # Parameters whose buffer was made for this step and takes G as it is (torch: no dampening).
        self._fresh: set[int] = set()

    def _needed(self, group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _init_state(self, param: Tensor, group: dict, *, before_first_step: bool = False) -> None:
        if self._has_master(param):
            self._make_state(param, ("master",))
        # The buffer is made by the first step, in which it becomes G; the anchor may come earlier.
        if group["momentum"] == 0 or before_first_step:
            return
        if self.state[param].get("momentum_buffer") is None:
            self._make_state(param, ("momentum_buffer",))
            self._fresh.add(id(param))

    def _hyper(self, group: dict) -> dict[str, Any]:
        return {
            "lr": _host(group, "lr"),
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": _host(group, "weight_decay"),
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "strength": _host(group, "strength"),
            "threshold": guidance.threshold(group["alpha"]),
        }

    def _final_flags(self, rows: _dispatch.Rows, flags: Tensor | None) -> Tensor:
        flags = super()._final_flags(rows, flags)
        if not self._fresh:
            return flags
        fresh = [reference.FIRST_STEP if id(p) in self._fresh else 0 for p in rows.holders]
        return flags | rows.flags(fresh, "fresh")

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as `dgg.AdamW` does; buffers that no step has begun stay so."""
        super().load_state_dict(state_dict)
        # Torch's checkpoint helpers save buffers of zeros before the first step.
        if all(saved.get("draw_index", 1) == 0 for saved in state_dict["param_groups"]):
            self._fresh.update(
                id(p)
                for p, entry in self.state.items()
                if isinstance(entry.get("momentum_buffer"), Tensor)
                and not sharding.local(entry["momentum_buffer"]).any()
            )

    def _skip_update(self, param: Tensor) -> None:
        self._fresh.discard(id(param))

    def _waits_for_scaler(self) -> bool:
        # A buffer is made by its first step, if that is not skipped.
        return self._rows is None or bool(self._fresh)

    def _update_(self, rows: _dispatch.Rows, *args, **kwargs) -> None:
        super()._update_(rows, *args, **kwargs)
        self._fresh.difference_update(map(id, rows.holders))


def unwrap(optimizer: Any) -> Any:
    """Returns the dgg optimizer inside wrappers.

    Args:
        optimizer: A dgg optimizer, or accelerate's, DeepSpeed's, Lightning's or Megatron's wrapper
            around one, or a ZeroRedundancyOptimizer (its local optimizer), nested to any depth.

    Raises:
        TypeError: There is no dgg optimizer inside.
    """
    seen: list[str] = []
    inner = optimizer
    while inner is not None and len(seen) < 16:
        if isinstance(inner, _Guided):
            return inner
        seen.append(type(inner).__name__)
        inner = next(
            (
                found
                for name in ("optimizer", "_optimizer", "basic_optimizer", "optim")
                if (found := getattr(inner, name, None)) is not None
            ),
            None,
        )
    raise TypeError(
        f"no dgg optimizer inside {' > '.join(seen)}: pass dgg.AdamW, dgg.Adam or dgg.SGD to the "
        "framework (Trainer: optimizer_cls_and_kwargs=(dgg.AdamW, {...}))"
    )


def _first(groups: list[dict[str, Any]]) -> int | None:
    params = groups[0]["params"] if groups else []
    return id(params[0]) if params else None


def _host(group: Mapping[str, Any], name: str) -> float | Tensor:
    return _host_value(name, group[name])


def _host_value(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of {value.numel()} elements; pass a number or a tensor of one"
            )
        # A tensor on an accelerator stays there: reading it would synchronise.
        if value.device.type != "cpu":
            return value
    return float(value)
