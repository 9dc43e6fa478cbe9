# SPDX-License-Identifier: BSD-3-Clause
"""Loading the state of the guided optimizers: nothing lost, nothing cast, or an error.

torch.optim would cast anchors to the parameters' dtype, and torch.distributed.checkpoint leaves out
what the template it fills has no room for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import (
    _arguments,
    _boundary,
    _saved_state,
    anchor,
    backends,
    checkpoint,
    sharding,
)
from dgg._imitable import Imitable, imitable
from dgg.sharding import fsdp1

# What ranks say to each other begins with it.
_ROOM = "dgg: room for a state dict"

_FLAGS_OF_OURS = ("foreach", "fused", "capturable", "differentiable")


class Loading(Imitable):
    """What `dgg._guided.Guided` does about checkpoints; stands between it and torch.optim."""

    # The state is room for a checkpoint that is yet to be loaded.
    _awaits_load = False
    # The state was made by a checkpoint helper, who may not have known what will be loaded into it.
    _template = False

    @torch._disable_dynamo
    @imitable
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict, as torch.optim does; with numbers of Python's alone.

        Asked by who is going to fill it from a distributed checkpoint, a new optimizer makes room
        for what that holds, if a helper has made its state before that was known.
        """
        if self._template and self._rows is None and not self._awaits_load:
            source = checkpoint.source()
            if source is not None and not source.broadcast:
                self._make_room_for(source)
        for group in self.param_groups:
            _arguments.make_plain(group)
            if "step" not in self._columns:  # SGD's buffer is begun by a step
                continue
            for p in group["params"]:
                # amsgrad switched on since the last step: as the next one would do it.
                if isinstance(entry := self.state.get(p), dict) and "exp_avg" in entry:
                    self._make_state(p, self._needed(group))
        return super().state_dict()

    @torch._disable_dynamo
    @imitable
    @torch.inference_mode(False)  # what is made there no later step could write
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
        # What loading replaces it makes anew, and leaves the former as it is.
        before = dict(self.__dict__)
        try:
            self._load(state_dict)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        # Hooks may repair what they are given and look at what was loaded: they run before and
        # after everything, not only around what torch does of it.
        before, after = (
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        )
        hooks = {name: getattr(self, name) for name in (before, after)}
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
            for hook in hooks[before].values():
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        for name in hooks:
            setattr(self, name, OrderedDict())
        self._load_checked(state_dict)
        for name, registered in hooks.items():
            setattr(self, name, registered)
        for hook in hooks[after].values():
            hook(self)

    def _load_checked(self, state_dict: Mapping[str, Any]) -> None:
        state_dict = self._completed(state_dict)
        anchors = self._checked_anchors(state_dict)
        before = int(self.param_groups[0]["draw_index"]), self._engine.resumed
        slot, rows = self._engine.replay, self._rows
        if before[0] <= 1:
            _boundary.refuse_earlier(self._engine.named, state_dict["param_groups"])
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
            key: {k: anchor.resolved(v) for k, v in entry.items() if k not in kept_back}
            if isinstance(entry, Mapping)
            else entry
            for key, entry in state_dict["state"].items()
        }
        super().load_state_dict(stripped)
        self._load_kept_back(state_dict, kept_back - {"anchor"})
        self._shard_moments()
        self._own_moments()
        for group, flags, mine, saved in zip(
            self.param_groups, kept, ours, state_dict["param_groups"], strict=True
        ):
            _arguments.make_plain(group)
            group.update({k: v for k, v in flags.items() if v is not None or k in group})
            group.update({k: v for k, v in mine.items() if k not in saved})
        dtypes = [value.dtype for value in anchors.values()]
        made = anchor.allocate_all([*anchors], dtypes, self._anchor_device)
        for (param, value), target in zip(anchors.items(), made, strict=True):
            # A copy: set_anchor() writes in place, and the checkpoint may be another optimizer's.
            anchor.write(target, value.detach())
            self.state[param]["anchor"] = target
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if saved.get("anchored"):
                self._anchor_empty(group)
            present = sum("anchor" in self.state.get(p, ()) for p in group["params"])
            group["anchored"] = max(present, saved.get("anchored", 0))  # other ranks' included
        self._normalise_steps()
        # Torch's checkpoint helpers make an empty step before they load into a new optimizer.
        fresh = before[0] <= 1 or before[0] == before[1]
        self._engine.resumed = int(self.param_groups[0]["draw_index"]) if fresh else None
        self._engine.replay = slot
        self._awaits_load, self._rows = False, rows
        self._drop_rows()

    def _own_moments(self) -> None:
        """Gives every moment memory of its own, as dense as the parameter's.

        torch takes the checkpoint's tensors as they are: an expanded one, one that two parameters
        share, or a parameter's own, could not be written.
        """
        taken = {
            (p.device, sharding.local(p).untyped_storage().data_ptr())
            for group in self.param_groups
            for p in group["params"]
            if not (is_lazy(p) or sharding.keeps_values_elsewhere(p))
        }
        for entry in self.state.values():
            if not isinstance(entry, dict):
                continue
            for name in self._columns:  # masters are copies
                value = entry.get(name)
                if not isinstance(value, Tensor) or sharding.is_dtensor(value):
                    continue
                place = value.device, value.untyped_storage().data_ptr()
                if not backends.is_dense(value):
                    entry[name] = value.contiguous()
                elif value.numel() and place in taken:
                    entry[name] = value.clone()
                taken.add(place)

    def _anchor_empty(self, group: dict[str, Any]) -> None:
        """Anchors what FSDP1 left nothing of here, and its checkpoints therefore leave out.

        A rank on which all is empty would not know otherwise that there are norms to be summed.
        """
        for param in group["params"]:
            empty = fsdp1.is_empty(param) and param.requires_grad
            if empty and "anchor" not in self.state.get(param, ()):
                self._init_state(param, group, before_first_step=True)
                self.state[param]["anchor"] = torch.empty_like(param)

    def _load_kept_back(self, state_dict: Mapping[str, Any], names: set[str]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if name not in names or value is None:
                        continue
                    if name != "master":
                        dtype = anchor.storage_dtype(param, self._state_dtype, "a parameter")
                    elif self._has_master(param):
                        dtype = torch.float32
                    else:
                        continue  # the weights have become wide enough to hold everything
                    value = anchor.resolved(value.detach())
                    self.state[param][name] = value.to(param.device, dtype, copy=True)

    def _completed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a state dict as it would be if torch's checkpoint helpers had left it whole.

        Of flattened ones they put empty dicts where the checkpoint has nothing, and they leave out
        frozen parameters, whose prepared room the load has filled all the same.
        """
        _saved_state.check_form(state_dict, self.param_groups)
        state = {
            key: {k: v for k, v in entry.items() if not (isinstance(v, Mapping) and not v)}
            if isinstance(entry, Mapping)
            else entry
            for key, entry in state_dict["state"].items()
        }
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                if state.get(key) is None and self._awaits_load and not param.requires_grad:
                    room = self.state.get(param, {})
                    if "anchor" in room and anchor.finite(room["anchor"]):
                        state[key] = dict(room)
        # None and {} say that nothing is known of a parameter.
        known = {
            key: entry
            for key, entry in state.items()
            if entry is not None and not (isinstance(entry, Mapping) and not entry)
        }
        return {**state_dict, "state": known}

    def _shard_moments(self) -> None:
        """Shards what came as whole tensors: what torch's helpers find no room for."""
        for param, entry in self.state.items():
            if not sharding.is_dtensor(param) or not isinstance(entry, dict):
                continue
            for name in entry.keys() & {*self._columns, "master"} - {"step"}:
                value = entry[name]
                if isinstance(value, Tensor) and not sharding.is_dtensor(value):
                    made = anchor.allocate(param, value.dtype, None)
                    anchor.write(made, value.detach())
                    entry[name] = made

    def _check_entries(self, state_dict: Mapping[str, Any]) -> None:
        """Checks groups and states but for the anchors."""
        ours = {**self._guidance, "anchored": 0}
        for number, (group, saved) in enumerate(
            zip(self.param_groups, state_dict["param_groups"], strict=True)
        ):
            _saved_state.check_group(number, saved, self.defaults, ours)
            options = {**group, **saved}
            if saved.get("amsgrad") is None:
                options["amsgrad"] = False
            for place, (param, key) in enumerate(
                zip(group["params"], saved["params"], strict=True)
            ):
                if key not in state_dict["state"]:
                    continue
                entry = state_dict["state"][key]
                label = f"parameter {place} of group {number}"
                needed = self._needed_to_load(options, entry)
                known = [*self._columns.keys() - {"anchor"}, "master"]
                _saved_state.check_entry(entry, param, label, needed, known)
                if "master" in entry and not self._master:
                    raise ValueError(
                        f"the checkpoint has a master weight of {label}, which this optimizer "
                        "would not keep; build it with master_weights=True over 16-bit parameters"
                    )

    def _checked_anchors(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Tensor]:
        self._check_entries(state_dict)
        saved_groups = state_dict["param_groups"]
        found: dict[Tensor, Tensor] = {}
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            present, filled, frozen = 0, 0, 0
            for place, (param, key) in enumerate(
                zip(group["params"], saved["params"], strict=True)
            ):
                entry = state_dict["state"].get(key, {})
                value = entry.get("anchor")
                if value is None or self._unfilled(value, saved):
                    present += fsdp1.is_empty(param)
                    frozen += not param.requires_grad
                    continue
                anchor.check_source(value, param, f"parameter {place} of group {number}")
                found[param] = value
                present += 1
                filled += value.numel() > 0
            check = {name: saved[name] for name in self._guidance if name in saved}
            _arguments.check_agreement(number, check, saved_groups[0])
            _arguments.check_options(check)
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

    @imitable
    @torch.no_grad()
    def prepare_for_load(
        self,
        checkpoint: Any = None,
        *,
        model: torch.nn.Module | None = None,
    ) -> None:
        """Makes room for what a distributed checkpoint holds: anchors and the rest of the state.

        torch.distributed.checkpoint loads into what is there. A new optimizer has no anchors, so
        without this a guided checkpoint is refused when it is loaded, unless it is known who loads
        it: accelerate, the Trainer, a ``Stateful`` and torch's ``set_optimizer_state_dict`` need no
        call (docs/checkpoints.md). Call it before ``get_optimizer_state_dict`` or
        ``get_state_dict`` make the template. It counts as no task and sets no anchor: until the
        checkpoint is loaded, `step` raises.

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
        self._make_room(held)

    def _make_room(self, held: Sequence[Mapping[str, torch.dtype | None]]) -> None:
        """Makes the state of every parameter that ``held`` says, anchors without any value."""
        params = [p for group in self.param_groups for p in group["params"]]
        for number, (p, names) in enumerate(zip(params, held, strict=True)):
            if "master" in names and not self._has_master(p):
                raise ValueError(
                    f"the checkpoint has a master weight of parameter {number}, which this "
                    "optimizer would not keep; build it with master_weights=True over 16-bit "
                    "parameters"
                )
        for p, names in zip(params, held, strict=True):
            if not names:
                self.state.pop(p, None)
                continue
            state = self.state[p]
            for name in state.keys() - names:
                del state[name]
            if "step" in names:
                state["step"] = self._step_scalar(p, state.get("step", 0.0))
            self._make_state(p, [name for name in names if name != "anchor"])
            if "anchor" in names:
                dtype = names["anchor"] or anchor.storage_dtype(
                    self._stepped(p), self._anchor_dtype, "a parameter"
                )
                state["anchor"] = anchor.allocate(p, dtype, self._anchor_device)
                # No weights are NaN: what is not overwritten will be noticed.
                sharding.local(state["anchor"]).fill_(float("nan"))
        for group in self.param_groups:
            group["anchored"] = sum("anchor" in self.state.get(p, ()) for p in group["params"])
        self._awaits_load = True
        self._drop_rows()

    def _kept(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the keys of the state that a step keeps of a parameter, anchors apart."""
        step = ("step",) if "step" in self._columns else ()
        master = ("master",) if self._has_master(param) else ()
        return (*step, *self._needed(group), *master)

    def _held_by(self, source: Any, model) -> list[dict[str, torch.dtype | None]]:
        held = checkpoint.held_by(source, {*self._columns, "master"})
        return checkpoint.find(held, self._names(model))

    def _names(self, model) -> list[list[str]]:
        """Returns the names that every parameter may have in a checkpoint."""
        known = anchor.names_of_parameters(model)
        names: list[list[str]] = []
        for group in self.param_groups:
            own = group.get("param_names", [None] * len(group["params"]))
            for p, name in zip(group["params"], own, strict=True):
                names.append([*known.get(p, []), *([] if name is None else anchor.variants(name))])
        return names

    def _normalise_steps(self) -> None:
        """Gives ``step`` and the draw index the form that the kernels write."""
        for param, entry in self.state.items():
            if isinstance(entry, dict) and entry.get("step") is not None:
                # Its own: one count for two parameters would go up twice in a step.
                entry["step"] = self._step_scalar(param, entry["step"]).clone()
        for group in self.param_groups:
            if isinstance(group["draw_index"], Tensor) and not self._capturable:
                group["draw_index"] = int(group["draw_index"])

    def _make_template(self) -> None:
        """Makes the state of torch's checkpoint helper, which calls a step with zero gradients.

        Nothing else: no step is counted, no draw consumed, no momentum begun. Where it is known
        what will be loaded and that has anchors, it is room for just that.
        """
        if self._awaits_load:
            return  # room was made, for a checkpoint that holds no state
        source = checkpoint.source() if self._share is None else None
        if source is not None and source.broadcast:
            anchored = self._make_room_together(source)
        else:
            self._check_template()
            anchored = source is not None and self._make_room_for(source)
        self._template = True
        if anchored and source.checkpoint is None:
            return  # of what a state dict does not hold there is to be no state
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state.get(p):
                    self._init_state(p, group)

    def _check_template(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self._check_step(params, [p.grad for p in params], [])

    def _make_room_for(self, source: checkpoint.Source) -> bool:
        """Makes room for what will be loaded, if that has anchors, which it returns."""
        if source.checkpoint is None:
            held = self._held_in(source)
        else:
            try:
                held = self._held_by(source.checkpoint, source.model)
            except Exception:
                # Torch reads it next, and what is wrong with it is an error on all ranks.
                return False
        anchored = any("anchor" in names for names in held)
        if anchored:
            self._make_room(held)
        return anchored

    def _held_in(self, source: checkpoint.Source) -> list[dict[str, torch.dtype | None]]:
        """Returns what the state dict of a source holds of every parameter.

        Raises:
            KeyError: It holds nothing of a parameter that is trained, and that is an error.
            ValueError: A shape is not the parameter's.
        """
        entries = checkpoint.entries_in(source.given or {}, {*self._columns, "master"})
        names = self._names(source.model)
        some = {name: entry for name, entry in entries.items() if entry}
        try:
            found = checkpoint.find(some, names)
        except KeyError:
            found = [{} for _ in names]
        params = [p for group in self.param_groups for p in group["params"]]
        by_name = not all(name.isdigit() for name in entries)
        held = []
        for number, (p, entry, mine) in enumerate(zip(params, found, names, strict=True)):
            label = f"parameter {number} ({mine[0]})" if mine else f"parameter {number}"
            if source.strict and by_name and p.requires_grad and not {*mine} & entries.keys():
                raise KeyError(
                    f"the state dict holds nothing of {label}, which is trained: is it another "
                    "model's? StateDictOptions(strict=False) loads the others"
                )
            for key, value in entry.items():
                shape = getattr(value, "shape", p.shape)
                if key != "step" and shape != p.shape:
                    raise ValueError(
                        f"the state dict's {key} of {label} has shape {tuple(shape)}, the "
                        f"parameter has {tuple(p.shape)}; load it into the same architecture"
                    )
            held.append({key: getattr(value, "dtype", None) for key, value in entry.items()})
        return held

    def _make_room_together(self, source: checkpoint.Source) -> bool:
        """Makes room on every rank for what rank 0 was given; returns whether it has anchors.

        Raises on all ranks if any of them cannot: none is left waiting for the others.
        """
        # In the group and from the rank that torch takes for the tensors.
        rank, world = dist.get_rank(), dist.get_world_size()
        held: list[dict[str, torch.dtype | None]] = []
        wrong: Exception | None = None
        try:
            self._check_template()
            if rank == 0:
                held = self._held_in(source)
        except Exception as error:
            wrong = error
        # No dict, which torch would take for its own message where a rank has state already.
        told: list[Any] = [(_ROOM, held)]
        dist.broadcast_object_list(told, src=0)
        if not (isinstance(told[0], tuple) and len(told[0]) == 2 and told[0][0] == _ROOM):
            raise RuntimeError(
                "the optimizer has state on rank 0 and none here: call prepare_for_load() on all "
                "ranks or on none before a state dict is loaded with broadcast_from_rank0=True"
            )
        held = told[0][1]
        anchored = any("anchor" in names for names in held)
        if anchored and wrong is None:
            try:
                self._make_room(held)
            except Exception as error:
                wrong = error
        everywhere: list[str | None] = [None] * world
        dist.all_gather_object(everywhere, None if wrong is None else str(wrong))
        if wrong is not None:
            raise wrong
        for other, text in enumerate(everywhere):
            if text is not None:
                raise RuntimeError(f"rank {other} cannot load: {text}")
        return anchored
