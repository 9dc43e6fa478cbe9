# SPDX-License-Identifier: BSD-3-Clause
"""Guidance itself: options, Bernoulli draws, scale, look-ahead, the replay slot.

`Engine` is what `dgg.optim` and `Guidance` share: it knows at which steps to inject, measures
the norms these steps need and nothing else, and remembers what it did for the statistics.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dgg import _dispatch, _fsdp1, _philox, _ranges, anchor, checkpoint, reference, sharding

# Options of the whole optimizer; they stand in every group, because what stands there survives
# every kind of checkpoint, and must agree.
WIDE = ("scaling", "norm_scope", "granularity", "max_grad_norm", "replay_weight", "seed",
        "draw_index", "task_index")  # fmt: skip
# Options of a group, schedulable.
PER_GROUP = ("alpha", "strength")
# Weights whose spacing is so wide that small updates are lost.
NARROW = (torch.bfloat16, torch.float16)

_CHOICES = {"norm_scope": ("global", "tensor"), "granularity": ("step", "tensor", "element")}


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the values of guidance options.

    Args:
        options: Values of any of WIDE and PER_GROUP.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of range; the message names option, value and remedy.
    """
    for name, choices in _CHOICES.items():
        if name in options and options[name] not in choices:
            raise ValueError(f"{name}={options[name]!r} is not one of {choices}")
    if "scaling" in options and not isinstance(options["scaling"], bool):
        raise TypeError(f"scaling={options['scaling']!r} must be True or False")
    _check_number(options, "alpha", low=0.0, high=1.0, why="it is a probability")
    _check_number(options, "strength", low=0.0, why="a negative one would push off the anchor")
    _check_number(options, "replay_weight", low=0.0, why="it weighs the replay gradient")
    if options.get("max_grad_norm") is not None:
        _check_number(
            options, "max_grad_norm", low=0.0, above=True, why="pass None for no clipping"
        )
    for name, limit in (("seed", 1 << 64), ("draw_index", None), ("task_index", None)):
        if name not in options:
            continue
        value = options[name]
        if name == "draw_index" and isinstance(value, Tensor) and value.dtype == torch.int64:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be an int")
        if value < 0 or (limit is not None and value >= limit):
            raise ValueError(f"{name}={value} must lie in [0, {'2**64' if limit else 'inf'})")


def check_agreement(number: int, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises a ValueError if a group has another optimizer-wide option than the first group."""
    for name in WIDE:
        if name not in group or name not in first or group[name] is first[name]:
            continue
        if isinstance(group[name], Tensor) or isinstance(first[name], Tensor):
            # The draw index of captured steps: one tensor for all groups, made so when loaded.
            continue
        if group[name] != first[name]:
            raise ValueError(
                f"{name} is one setting for the whole optimizer, but group 0 has "
                f"{first[name]!r} and group {number} has {group[name]!r}; set it in all groups"
            )


def _check_number(options, name, *, low, high=math.inf, above=False, why) -> None:
    if name not in options:
        return
    value = options[name]
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}={value!r} must be a number, not {type(value).__name__}; pass a Python float "
            "or int"
        )
    inside = low < value if above else low <= value
    if not (inside and value <= high and math.isfinite(value)):
        bounds = f"{'(' if above else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
        raise ValueError(f"{name}={value} must lie in {bounds}: {why}")


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    # What lies on an accelerator is not read, only told apart.
    return value.item() if value.device.type == "cpu" else id(value)


class Options:
    """The options in force at one step, read from the groups and checked when they change."""

    def __init__(self) -> None:
        self._checked: Any = None

    def read(self, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Returns the first group as the source of the optimizer-wide options.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is out of range, or groups disagree on an optimizer-wide one.
        """
        first = groups[0]
        # draw_index moves every step and is written by us alone. Tensors are compared by value:
        # a schedule may write into one.
        present = [
            tuple([_plain(g[name]) for name in (*WIDE, *PER_GROUP) if name != "draw_index"])
            for g in groups
        ]
        if present != self._checked:
            for number, group in enumerate(groups):
                check_agreement(number, group, first)
                check_options({name: group[name] for name in (*WIDE, *PER_GROUP)})
            self._checked = present
        return first


# Parameters whose gradients an open replay() block of some optimizer records.
_recorded: set[int] = set()


class ReplaySlot:
    """Holds the replay gradients r between ``with opt.replay():`` and the step that uses them."""

    def __init__(self) -> None:
        self._grads: dict[int, tuple[Tensor, Tensor]] = {}
        self._open = False

    def __bool__(self) -> bool:
        return bool(self._grads)

    def get(self, param: Tensor) -> Tensor | None:
        """Returns the replay gradient of ``param`` or None."""
        entry = self._grads.get(id(param))
        return None if entry is None else entry[1]

    def check_closed(self) -> None:
        """Raises a RuntimeError inside a replay() block, where ``.grad`` is not the gradient."""
        if self._open:
            raise RuntimeError(
                "step() inside a replay() block would take the replay gradient for the gradient; "
                "leave the block before the step"
            )

    def exchange(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Puts other tensors in place of the replay gradients of ``params``."""
        for p, grad in zip(params, grads, strict=True):
            self._grads[id(p)] = (p, grad)

    def clear(self) -> None:
        """Drops all replay gradients."""
        self._grads.clear()

    @contextlib.contextmanager
    def record(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Lets gradients flow into the slot instead of ``.grad``, without copying any.

        The gradients already in ``.grad`` are put aside and come back at the end; several
        recordings before a step add up. Only gradients that are views of an engine's buckets are
        copied.
        """
        if self._open:
            raise RuntimeError("replay() blocks do not nest; leave the outer one first")
        mine = set(map(id, params))
        if not mine.isdisjoint(_recorded):
            raise RuntimeError(
                "a replay() block of another optimizer over the same parameters is open and would "
                "get no gradient of theirs; leave it first, and give each block its own backward()"
            )
        present = [_apart(p.grad) for p in params]
        before = dict(self._grads)
        self._open = True
        _recorded.update(mine)
        try:
            for p in params:
                p.grad = self.get(p)
            yield
            self._grads = {id(p): (p, _apart(p.grad)) for p in params if p.grad is not None}
        except BaseException:
            self._grads = before
            raise
        finally:
            self._open = False
            _recorded.difference_update(mine)
            for p, grad in zip(params, present, strict=True):
                p.grad = grad


def _apart(grad: Tensor | None) -> Tensor | None:
    """Returns a gradient that no later backward pass writes into.

    DistributedDataParallel(gradient_as_bucket_view=True) and FSDP1 make ``.grad`` a view of a
    bucket that the next backward pass fills again; what autograd makes itself is no view.
    """
    if grad is None or sharding.is_dtensor(grad) or not grad._is_view():
        return grad
    return grad.clone()


def check_gradient(grad: Tensor, param: Tensor, label: str, kind: str = "gradient") -> None:
    """Checks that a gradient is one the kernels can take.

    Raises:
        TypeError: Sparse, or of a dtype that is not floating; names the parameter.
        ValueError: Of another shape than the parameter.
    """
    if grad.layout != torch.strided:
        raise TypeError(
            f"the {kind} of {label} is {grad.layout}; dgg needs dense gradients: build the module "
            "with sparse=False, or give that parameter to torch.optim.SparseAdam"
        )
    if sharding.keeps_values_elsewhere(grad) and not sharding.keeps_values_elsewhere(param):
        raise TypeError(
            f"the {kind} of {label} is a {type(sharding.local(grad)).__name__}, which keeps its "
            "values in other tensors; make it a plain tensor before the step"
        )
    if not sharding.all_equal_dtensors(grad, param):
        raise ValueError(
            f"the {kind} of {label} is not sharded as the parameter is "
            f"({getattr(grad, 'placements', 'a plain tensor')} for "
            f"{getattr(param, 'placements', 'a plain tensor')}); redistribute it before the step"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the {kind} of {label} has shape {tuple(grad.shape)}, the parameter has "
            f"{tuple(param.shape)}; somebody exchanged its data: compute it anew"
        )
    if grad.is_complex() != param.is_complex() or grad.dtype.to_real() not in anchor.FLOAT_DTYPES:
        raise TypeError(
            f"the {kind} of {label} is {grad.dtype} for a parameter of {param.dtype}; use float32, "
            "bfloat16, float16 or float64 gradients"
        )


def check_param(
    param: Tensor, label: str, *, stepped: bool = False, elements: bool = False
) -> None:
    """Checks that a parameter (trainable, or about to be stepped) is one the kernels can take."""
    if not stepped and not param.requires_grad:
        return
    _fsdp1.check(param, label)
    if sharding.is_dtensor(param):
        sharding.check(param, label, elements=elements)
    if param.layout != torch.strided or param.dtype.to_real() not in anchor.FLOAT_DTYPES:
        raise TypeError(
            f"{label} is {param.dtype} ({param.layout}); dgg optimizes dense float32, bfloat16, "
            "float16, float64 (and complex) parameters: freeze it or convert it"
        )
    if stepped and (param.device.type == "meta" or isinstance(sharding.local(param), FakeTensor)):
        where = "on the meta device" if param.device.type == "meta" else "a FakeTensor"
        raise ValueError(
            f"{label} is {where} and holds no values; materialise the model (to_empty and load the "
            "weights), which gives it new parameters, and make the optimizer afterwards"
        )
    if any(st == 0 and size > 1 for st, size in zip(param.stride(), param.shape, strict=True)):
        raise ValueError(
            f"{label} overlaps itself in memory (an expanded tensor) and cannot be updated in "
            "place; clone it first"
        )


def plan_anchors(
    groups: Sequence[Mapping[str, Any]],
    known: Mapping[Tensor, Tensor | None],
    tensors: Mapping[str, Tensor] | str | os.PathLike | None,
    model: torch.nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    weights: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    none: bool = False,
) -> list[tuple[Tensor, Tensor | anchor.Part | None, Tensor]]:
    """Decides which parameters get an anchor, from what and into which memory.

    Nothing that exists is written: of a file each tensor is read into the memory of its new
    anchor; where there is an anchor to be overwritten it is read twice, to be looked at first.

    Args:
        groups: Parameter groups.
        known: Present anchor (or None) of every parameter that has state.
        tensors: Named sources, the path of some, or None for the present weights.
        model: Maps names to parameters, or None if the groups know the names.
        dtype: Storage dtype or None for the parameter's.
        device: Storage device or None for the parameter's.
        weights: What the optimizer steps for a parameter: itself, or its master weight.
        none: Whether there may be nothing to anchor: other ranks have the parameters.

    Returns:
        (parameter, source, target) of every parameter to anchor; a present anchor that fits is
        its target again. The source is None where the target has the values already.

    Raises:
        FileNotFoundError: There is nothing at the path.
        KeyError: A trainable parameter has no tensor.
        TypeError: A wrong type.
        ValueError: A shape, value or name does not fit.
    """
    if tensors is None and model is not None:
        raise ValueError("model= maps the names of tensors to parameters; give both or neither")
    if tensors is not None and not isinstance(tensors, (Mapping, str, os.PathLike)):
        raise TypeError(
            "set_anchor() takes a mapping from names to tensors or the path of a file or "
            f"directory of them, not {type(tensors).__name__}; pass a state_dict, or the path that "
            "save_pretrained() wrote to"
        )
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model= must be a torch.nn.Module, not {type(model).__name__}")
    every = [p for group in groups for p in group["params"]]
    chosen = [
        (p, label)
        for p, label in zip(every, group_labels(groups), strict=True)
        if p.requires_grad or p in known
    ]
    if not chosen and none:
        return []
    if not chosen:
        raise ValueError(
            "set_anchor() found no trainable parameter in this optimizer; unfreeze "
            "(requires_grad_(True)) what the next task trains first"
        )
    params, labels = [p for p, _ in chosen], [label for _, label in chosen]
    for p, label in chosen:
        check_param(p, label, stepped=True)
        if tensors is not None and _fsdp1.is_one(p):
            raise ValueError(
                f"{label} is FSDP1's, and anchors by name are not cut into its runs: load the "
                "tensors into the model and call set_anchor() before the next task is trained"
            )
        if device is not None and device != p.device and sharding.is_dtensor(p):
            raise ValueError(
                f"anchor_device={str(device)!r} is not supported for DTensors, and {label} is one "
                f"on {str(p.device)!r}; leave it None"
            )
        if device is not None and device.type not in ("cpu", p.device.type):
            raise ValueError(
                f"anchor_device={str(device)!r} does not go with {label} on {str(p.device)!r}; "
                "use 'cpu' or None (the parameter's device)"
            )
    stepped = [weights(p) for p in params]
    dtypes = [
        anchor.storage_dtype(theta, dtype, label)
        for theta, label in zip(stepped, labels, strict=True)
    ]
    if tensors is None:
        sources = stepped
        for p, theta, label, wanted in zip(params, stepped, labels, dtypes, strict=True):
            anchor.check_source(theta, p, label, wanted)
    else:
        names = _names_of(groups, model, params)
        if not isinstance(tensors, Mapping):
            tensors = anchor.open_path(tensors)
        sources = anchor.match_named(tensors, params, names, labels, dtypes, model)
    plan = []
    for p, theta, source, label, wanted in zip(
        params, stepped, sources, labels, dtypes, strict=True
    ):
        old = known.get(p)
        fits = old is not None and old.dtype == wanted and old.shape == p.shape
        # Somebody may have put the weights themselves there.
        fits = fits and not anchor.is_alias(old, p) and not anchor.is_alias(old, theta)
        target = old if fits else anchor.allocate(p, wanted, device)
        if isinstance(source, anchor.Part):
            values = source.read()
            anchor.check_values(values, label, wanted)
            if not fits:
                sharding.local(target).copy_(values)
                source = None
        plan.append((p, source, target))
    return plan


def _names_of(groups, model, params) -> list[list[str]]:
    if model is not None:
        known = anchor.names_of_parameters(model)
        return [known.get(p, []) for p in params]
    names: dict[Tensor, str] = {}
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "set_anchor(tensors) cannot tell which name belongs to which parameter: pass "
                "model=, or build the optimizer from model.named_parameters()"
            )
        names.update(zip(group["params"], group["param_names"], strict=True))
    return [anchor.variants(names[p]) for p in params]


def begins_task(task: int, groups: Sequence[Mapping[str, Any]], draws: int, *, given: bool) -> bool:
    """Decides what ``set_anchor(task=...)`` does: True sets the anchor, False keeps what is.

    Args:
        task: Number of the task that is to be trained now.
        groups: Parameter groups with ``task_index``.
        draws: Steps made so far.
        given: Whether tensors or a path are given, not the present weights.

    Raises:
        TypeError: ``task`` is no int.
        ValueError: ``task`` is negative, over already, or not the next one.
        RuntimeError: The anchor of a task in progress is gone, and nothing is given for it.
    """
    check_options({"task_index": task})
    present = groups[0]["task_index"]
    anchored = any(group["anchored"] for group in groups)
    if present > task:
        raise ValueError(
            f"set_anchor(task={task}): this optimizer is in task {present}, beyond it. Resume from "
            f"a checkpoint of task {task}, or of the end of task {task - 1}"
            if task
            else f"set_anchor(task=0): this optimizer is in task {present}, beyond it. Start with "
            "a new optimizer, or resume from a checkpoint of task 0"
        )
    if present == task:
        if anchored or (task == 0 and not given):
            return False
        if task and not given:
            raise RuntimeError(
                f"set_anchor(task={task}): this optimizer is in task {task} already and has no "
                "anchor, and the weights of now need not be those the task began with. Name them: "
                f"set_anchor(path_or_tensors_of_the_end_of_task_{task - 1}, model=model, "
                f"task={task})"
            )
        return True
    if present < task - 1 and (draws or anchored):
        raise ValueError(
            f"set_anchor(task={task}): this optimizer is in task {present}, so task {present + 1} "
            f"would be left out. Load the state of the end of task {task - 1}, or start task "
            f"{task} with a new optimizer"
        )
    return True


def refuse_resumed(groups: Sequence[Mapping[str, Any]], draws: int, resumed: int | None) -> None:
    """Raises where ``set_anchor()`` could replace a resumed anchor by the weights of mid-task.

    Args:
        groups: Parameter groups with ``task_index`` and ``anchored``.
        draws: Steps made so far.
        resumed: Steps that a fresh optimizer was resumed after, or None if it was not.

    Raises:
        RuntimeError: The optimizer has an anchor from a checkpoint and made no step since.
    """
    task = groups[0]["task_index"]
    if resumed and draws == resumed and any(group["anchored"] for group in groups):
        raise RuntimeError(
            f"this optimizer was just resumed in task {task}, after {draws} steps and with that "
            "task's anchor: set_anchor() would replace it by the weights of now, which in the "
            "middle of a task are not those it began with. Say which task is trained now: "
            f"set_anchor(task={task}) goes on with the resumed anchor, set_anchor(task={task + 1}) "
            "begins the next task; or clear_anchor() first"
        )


def refuse_earlier(named: int | None, saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises where a state of an earlier task would take the place of an anchor just set.

    Args:
        named: The task that a new optimizer's anchor was set for by number, or None.
        saved: Groups of the state that is about to be loaded.

    Raises:
        ValueError: The state is of an earlier task.
    """
    task = saved[0].get("task_index", 0) if saved else 0
    if named is not None and task < named:
        raise ValueError(
            f"set_anchor(task={named}) was called before a state of task {task} is loaded, whose "
            f"anchor would take its place: load first, then call set_anchor(task={named})"
        )


def settings_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the optimizer-wide options as plain values, by which ranks can be compared."""
    first = {name: groups[0][name] for name in WIDE}
    return {name: x.item() if isinstance(x, Tensor) else x for name, x in first.items()}


class Engine:
    """Decides when to inject, measures what that needs, and remembers it.

    One engine belongs to one optimizer and keeps nothing that a checkpoint would need: seed and
    draw index stand in the groups.
    """

    def __init__(self) -> None:
        self.options = Options()
        self.replay = ReplaySlot()
        # Steps that a fresh optimizer was resumed after; the task that was named with the anchor.
        self.resumed: int | None = None
        self.named: int | None = None
        self._words: tuple[int, int, int] | None = None
        self._last: dict[str, Any] | None = None

    def flags(
        self, wide: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], rows, draw: int
    ) -> Tensor | None:
        """Returns the uint8 flags of every row at draw ``draw``; None if none injects."""
        if not rows.anchored:
            return None
        limits = _limits(groups)
        if not any(limits):
            return None
        granularity, seed = wide["granularity"], wide["seed"]
        if granularity == "step":
            # At α = 1 the step is known without its word.
            sure = all([limit in (0, 1 << 32) for limit in limits])
            word = 0 if sure else self._step_word(seed, draw)
            by_group = [reference.INJECT if word < limit else 0 for limit in limits]
        elif granularity == "element":
            # Above or below all words the elements' draws are known without drawing.
            by_group = [
                reference.INJECT if limit == 1 << 32 else reference.INJECT_ELEMENTS if limit else 0
                for limit in limits
            ]
        else:
            words = _philox.tensor_words(seed, draw, torch.tensor(rows.indices, device="cpu"))
            limit = torch.tensor([limits[group] for group in rows.groups], device="cpu")
            hit = words < limit
            # Two places: the next step's flags are asked for before this step's are read.
            return rows.flags(hit.tolist(), f"flags {draw % 2}") if bool(hit.any()) else None
        if not any(by_group):
            return None
        if len(set(by_group)) == 1:
            return rows.constant_flags(by_group[0])
        return rows.flags([by_group[group] for group in rows.groups], f"flags {draw % 2}")

    @staticmethod
    def joins(wide: Mapping[str, Any], groups, all_rows, process_group) -> bool:
        """Returns whether a rank takes part in norms without knowing if any rank injects.

        Draws per tensor are those of this rank's tensors; of partitions others may have more.
        """
        return (
            process_group is not None
            and wide["granularity"] == "tensor"
            and any(rows.anchored for rows in all_rows)
            and any(_limits(groups))
        )

    def _step_word(self, seed: int, draw: int) -> int:
        # The look-ahead asks at step k for k + 1, which the next step asks for again.
        if self._words is None or self._words[:2] != (seed, draw):
            self._words = (seed, draw, _philox.step_word(seed, draw))
        return self._words[2]

    @staticmethod
    def measures(wide: Mapping[str, Any], injecting: bool) -> bool:
        """Returns whether a step needs norms, so that `measure` sums them over ranks."""
        return wide["max_grad_norm"] is not None or (injecting and wide["scaling"])

    def measure(
        self,
        wide: Mapping[str, Any],
        all_rows: Sequence[_dispatch.Rows],
        injecting: bool,
        scaling: _dispatch.Scaling,
        gates: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns the coefficients [4 + n] of each device's rows, computing only needed norms.

        Args:
            wide: Optimizer-wide options.
            all_rows: The rows of every device.
            injecting: Whether any row may inject.
            scaling: Divisor of the gradients.
            gates: uint8 [1] of every device: whether a captured step injects.
        """
        which = reference.NORM_TOTAL if wide["max_grad_norm"] is not None else 0
        if injecting and wide["scaling"]:
            which |= reference.NORM_GRAD | reference.NORM_DISTANCE
            for rows in all_rows:
                if gates is None:
                    rows.forget_changed()
                else:
                    rows.forget(anchors=False)
        if not which:
            return [rows.constant_coefficients() for rows in all_rows]
        with _ranges.record("dgg.norm"):
            squares = [
                _dispatch.norms(
                    rows,
                    replay_weight=float(wide["replay_weight"]),
                    scaling=scaling,
                    which=which,
                    gate=None if gates is None else gates[place],
                )
                for place, rows in enumerate(all_rows)
            ]
        per_tensor = wide["norm_scope"] == "tensor"
        for part, rows in zip(squares, all_rows, strict=True):
            if rows.reduction is not None:
                rows.reduction.sum_(part, per_tensor=per_tensor)
        settings = {
            "max_grad_norm": wide["max_grad_norm"],
            "scaling": wide["scaling"],
            "per_tensor": per_tensor,
        }
        if len(all_rows) == 1:
            return [_dispatch.coefficients(all_rows[0], squares[0], **settings)]
        # One norm over several devices: the few squares travel, the gradients stay.
        home = squares[0].device
        joined = torch.cat([part.to(home) for part in squares], dim=1)
        found = reference.coefficients(joined, **settings)
        sizes = [reference.SCALES, *(part.shape[1] for part in squares)]
        head, *scales = found.split(sizes)
        return [
            torch.cat([head, part]).to(rows.device)
            for part, rows in zip(scales, all_rows, strict=True)
        ]

    def remember(self, wide, rows, flags, coefficients, strength, found_inf=None) -> None:
        """Keeps what the statistics of this step are made of; nothing is computed here."""
        self._last = {
            "flags": flags,
            "found_inf": found_inf,
            "coefficients": coefficients,
            "strength": strength,
            "per_tensor": wide["norm_scope"] == "tensor",
            "measured": flags is not None and wide["scaling"],
            "clipped": wide["max_grad_norm"] is not None,
            "device": rows.device,
        }

    def remember_skipped(self, device: torch.device) -> None:
        """Keeps that the last step was skipped for inf or NaN gradients."""
        self._last = {"flags": None, "coefficients": None, "device": device}

    def statistics(self) -> dict[str, Tensor | None]:
        """Returns the statistics of the last step as tensors on its device; see `AdamW`."""
        names = ("injected", "scale", "grad_norm", "distance", "clip")
        last = self._last
        if last is None:
            return dict.fromkeys(names)
        stats: dict[str, Tensor | None] = dict.fromkeys(names)
        flags, found = last["flags"], last["coefficients"]
        zero = torch.zeros((), device=last["device"])
        stats["injected"] = zero.bool() if flags is None else (flags & 3).ne(0).any()
        if last.get("found_inf") is not None:
            stats["injected"] = stats["injected"] & last["found_inf"].eq(0).all()
        stats["scale"] = zero
        if found is None:
            return stats
        if flags is not None:
            scales = found[reference.SCALES :] * last["strength"]
            stats["scale"] = scales.float() if last["per_tensor"] else scales[0].float()
        if last["measured"]:
            stats["grad_norm"] = found[reference.GRAD_NORM].float()
            stats["distance"] = found[reference.DISTANCE].float()
        if last["clipped"]:
            stats["clip"] = found[reference.CLIP].float()
        return stats


def _limits(groups: Sequence[Mapping[str, Any]]) -> list:
    """Returns the threshold of every group's draws; 0 where nothing can be injected."""
    return [threshold(g["alpha"]) if float(g["strength"]) > 0 else 0 for g in groups]


def threshold(alpha: float | Tensor) -> int | Tensor:
    """Returns the threshold of the draws for a group's alpha: floor(α · 2**32).

    A tensor on an accelerator stays there.
    """
    if isinstance(alpha, Tensor) and alpha.device.type != "cpu":
        return (alpha.double() * 4294967296.0).floor()
    return _philox.threshold(float(alpha))


def drawn(wide: Mapping[str, Any], draw: int, injecting: bool) -> _dispatch.Draw:
    """Returns the draw of a step as the backends take it."""
    elements = injecting and wide["granularity"] == "element"
    return _dispatch.Draw(wide["seed"], draw, injecting, elements)


def read_scaler(
    grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device | None
) -> tuple[_dispatch.Scaling, bool]:
    """Reads what a GradScaler left on the optimizer: on the host only where nothing is launched.

    Args:
        grad_scale: Divisor of the gradients, one element, or None.
        found_inf: Not 0 where a gradient is inf or NaN, one element, or None.
        device: Where the step is launched, or None where it runs when it is called.

    Returns:
        The scaling, and whether the step is known to be skipped; launches find out by themselves.
    """
    if grad_scale is None and found_inf is None:
        return _dispatch.Scaling(), False
    if device is not None:
        there = [
            None if x is None else x.to(device, torch.float32) for x in (grad_scale, found_inf)
        ]
        return _dispatch.Scaling(1.0, *there), False
    skip = found_inf is not None and bool(found_inf)
    return _dispatch.Scaling(1.0 if grad_scale is None else float(grad_scale)), skip


def refuse_scaler(params: Sequence[Tensor], process_group) -> None:
    """Raises if a GradScaler that lets the step unscale has seen a part of the gradients only.

    Of DTensors torch sums over the ranks what it finds, of FSDP1's runs only unscale_() does: each
    rank would skip or step its part of the weights, and change its scale, by a verdict of its own.

    Raises:
        RuntimeError: The gradients are runs of FSDP1 or partitions over a process group.
    """
    if process_group is not None or any(map(_fsdp1.is_one, params)):
        raise RuntimeError(
            "a GradScaler would look for inf and NaN in this rank's part of the gradients alone: "
            "call scaler.unscale_(optimizer) before scaler.step(optimizer), of a scaler that sums "
            "over the ranks what it finds "
            "(torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler)"
        )


def unscaled_unseen() -> bool:
    """Returns whether a GradScaler calls the step that has unscaled ``.grad`` without a word.

    So it does where the optimizer it is given, a wrapper say, does not unscale by itself. Told by
    who calls; asked only where there are replay gradients, which it cannot have seen.
    """
    return checkpoint.called_by("torch.amp.grad_scaler", "GradScaler", "_maybe_opt_step")


def group_labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns how errors call each parameter: its name, or its place and shape."""
    labels = []
    for number, group in enumerate(groups):
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            if names:
                labels.append(f"parameter {names[place]!r}")
            else:
                shape = tuple(param.shape)
                labels.append(f"parameter {place} of group {number} (shape {shape})")
    return labels


class Guidance:
    """Guides an optimizer of someone else's: a step pre-hook that edits ``.grad`` in one pass.

    Works with any `torch.optim.Optimizer` (Muon, bitsandbytes, torchao, Adafactor, ...). Before
    each of its steps every gradient becomes G = c (g + w r) + b s (θ - θ*), equation (5); what the
    optimizer then does with G is its own affair. The hook works on ``.grad`` in place.

    Unlike `dgg.AdamW` it cannot measure ‖θ - θ*‖ in the other optimizer's pass and reads the
    parameters once more on the steps that inject; its anchors live here, not in the other's state
    (many optimizers take a state that is not empty for an initialised one), so save
    ``guidance.state_dict()`` beside ``optimizer.state_dict()``. `replay` does not go together with
    a GradScaler, which cannot unscale what it does not see. Torch copies and pickles optimizers
    without their hooks: a copy is not guided, make a new guidance over it.

    Args:
        optimizer: The optimizer to guide.
        alpha: Probability of injecting the guidance at a step (α).
        strength: Factor of the guidance's scale s.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False gives s = strength.
        norm_scope: ``"global"`` or ``"tensor"``.
        granularity: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm in the same pass, or None.
        replay_weight: Weight w of the replay gradients.
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        anchor_device: Storage device of the anchor; None is the parameter's.
        process_group: Group over whose ranks plain parameters are partitioned; see `dgg.AdamW`.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or None (the fastest).

    Attributes:
        param_groups: A dict per group of the optimizer with the guidance options; ``alpha`` and
            ``strength`` are schedulable, per group.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or an argument has the wrong type.
        ValueError: An argument is out of range, or the optimizer is guided already.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> opt = torch.optim.Muon(model.parameters())
        >>> guidance = dgg.Guidance(opt, alpha=0.2)
        >>> train(model, opt, first_task)
        >>> guidance.set_anchor()
        >>> train(model, opt, second_task)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
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
        process_group=None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Guidance takes a torch.optim.Optimizer, not {type(optimizer).__name__}; of a "
                "wrapper pass the optimizer inside"
            )
        if hasattr(optimizer, "guidance_stats") or getattr(optimizer, "_dgg_guided", False):
            raise ValueError(
                f"{type(optimizer).__name__} is guided already; set its own options instead of "
                "wrapping it again"
            )
        check_backend(backend, optimizer.param_groups)
        self._backend = backend
        self._anchor_dtype = check_anchor_dtype(anchor_dtype)
        self._anchor_device = check_anchor_device(anchor_device)
        self._options = {
            "alpha": alpha, "strength": strength, "scaling": scaling, "norm_scope": norm_scope,
            "granularity": granularity, "max_grad_norm": max_grad_norm,
            "replay_weight": replay_weight, "seed": seed, "draw_index": 0, "task_index": 0,
        }  # fmt: skip
        check_options(self._options)
        self.process_group = check_process_group(process_group, self._options)
        self.optimizer = optimizer
        self._given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.param_groups: list[dict[str, Any]] = []
        self._sync_groups()
        self._anchors: dict[Tensor, Tensor] = {}
        self._engine = Engine()
        self._rows: list[tuple[list[int], _dispatch.Rows]] = []
        self._rows_params: list[Tensor] = []
        self._watch: _dispatch.Watch | None = None
        self._shards: list[tuple[Tensor, Tensor]] = []
        optimizer._dgg_guided = True
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def __reduce_ex__(self, protocol):
        """Refuses to be copied or pickled, since the hook would stay behind."""
        raise TypeError(
            "a Guidance can be neither copied nor pickled, its hook belongs to one optimizer: copy "
            "the optimizer, make a Guidance over the copy and load_state_dict() into it"
        )

    def _sync_groups(self) -> None:
        # Groups may be added to the optimizer at any time; they start with group 0's options.
        while len(self.param_groups) < len(self.optimizer.param_groups):
            first = self.param_groups[0] if self.param_groups else self._options
            self.param_groups.append({**first, **{n: self._options[n] for n in PER_GROUP}})

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_anchor(
        self,
        tensors: Mapping[str, Tensor] | str | os.PathLike | None = None,
        *,
        model: torch.nn.Module | None = None,
        task: int | None = None,
    ) -> None:
        """Sets θ* to the present weights, named tensors or those of files.

        It is `dgg.AdamW.set_anchor`, with the same rule for ``task``; what is resumed is loaded
        by this class' `load_state_dict`.

        Args:
            tensors: The previous task's weights by name, or their path; None takes the present
                weights.
            model: Maps names to parameters.
            task: Number of the task that begins now, or goes on.

        Raises:
            FileNotFoundError: There is nothing at the path.
            KeyError: A trainable parameter has no tensor.
            RuntimeError: It would replace an anchor that was just resumed, the anchor of a task in
                progress is gone, or another rank failed.
            TypeError: ``tensors`` or one of them is of the wrong type.
            ValueError: A shape, value or name does not fit, or ``task``. After any error all is as
                it was.
        """
        self._sync_groups()
        draws = self.param_groups[0]["draw_index"]
        marked = [{**group, "anchored": len(self._anchors)} for group in self.param_groups]
        if task is not None:
            if not begins_task(task, marked, draws, given=tensors is not None):
                return
        elif tensors is None:
            refuse_resumed(marked, draws, self._engine.resumed)
        groups = self.optimizer.param_groups
        every = [p for group in groups for p in group["params"]]
        peers = sharding.peers(every, self.process_group)
        with sharding.on_all_or_none(peers, settings_of(self.param_groups)):
            plan = plan_anchors(
                groups, self._anchors, tensors, model, self._anchor_dtype, self._anchor_device
            )
        for param, source, target in plan:
            anchor.write(target, source)
            self._anchors[param] = target
        for group in self.param_groups:
            group["task_index"] = group["task_index"] + 1 if task is None else task
        self._engine.named = task
        self._rows = []

    def clear_anchor(self) -> None:
        """Drops the anchor: the gradients are left as they are from here on."""
        self._anchors.clear()
        self._rows = []

    def replay(self) -> contextlib.AbstractContextManager[None]:
        """Lets the gradients of the block become r; see `dgg.AdamW.replay`."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self._engine.replay.record(params)

    def guidance_stats(self) -> dict[str, Tensor | None]:
        """Returns what the last step did, as device tensors; see `dgg.AdamW.guidance_stats`."""
        return self._engine.statistics()

    def remove(self) -> None:
        """Takes the hook off the optimizer; the anchor is dropped."""
        self._handle.remove()
        self.clear_anchor()
        self.optimizer._dgg_guided = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the options, the draw index and the anchors by parameter number."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        anchors = {i: self._anchors[p] for i, p in enumerate(params) if p in self._anchors}
        return {
            "param_groups": [dict(group) for group in self.param_groups],
            "anchors": anchors,
            "params": len(params),
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned; anchors keep the dtype they were saved in.

        Args:
            state_dict: From ``state_dict()`` of a guidance over the same parameters.

        Raises:
            KeyError: The state dict is not one of a guidance.
            ValueError: Numbers of groups or parameters, or shapes, differ. Nothing is changed.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict() takes what state_dict() returned, not "
                f"{type(state_dict).__name__}; torch.load the file first"
            )
        if not state_dict.keys() >= {"param_groups", "anchors", "params"}:
            raise KeyError(
                f"no state dict of a guidance: it has {sorted(map(str, state_dict))}, not anchors, "
                "param_groups and params; pass what guidance.state_dict() returned"
            )
        self._sync_groups()
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups) or state_dict["params"] != len(params):
            raise ValueError(
                f"the state dict is of {state_dict['params']} parameters in {len(groups)} groups, "
                f"the optimizer has {len(params)} in {len(self.param_groups)}; load it beside the "
                "optimizer it was saved with"
            )
        for number, group in enumerate(groups):
            absent = [name for name in (*WIDE, *PER_GROUP) if name not in group]
            if absent:
                raise KeyError(
                    f"group {number} of the state dict lacks {absent}; pass what "
                    "guidance.state_dict() returned"
                )
            check_agreement(number, group, groups[0])
            check_options(group)
        if self.param_groups[0]["draw_index"] == 0:
            refuse_earlier(self._engine.named, groups)
        labels = group_labels(self.optimizer.param_groups)
        for i, value in state_dict["anchors"].items():
            if i not in range(len(params)):
                raise KeyError(
                    f"the state dict has an anchor of parameter {i!r} of {len(params)}; pass what "
                    "guidance.state_dict() returned"
                )
            anchor.check_source(value, params[i], labels[i])
        self._anchors = {
            params[i]: self._anchor_of(params[i], value)
            for i, value in state_dict["anchors"].items()
        }
        engine, mine = self._engine, self.param_groups[0]["draw_index"]
        engine.named = None
        fresh = mine in (0, engine.resumed)
        engine.resumed = groups[0]["draw_index"] if fresh else None
        self.param_groups = [dict(group) for group in groups]
        self._rows = []

    def _anchor_of(self, param: Tensor, value: Tensor) -> Tensor:
        made = anchor.allocate(param, value.dtype, self._anchor_device)
        anchor.write(made, value)
        return made

    def _before_step(self, optimizer, args, kwargs):
        if not optimizer.state and checkpoint.making_template():
            return None  # no step of the training: it counts no draw
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._edit()
            return None
        # The gradients exist only after the closure: edit them inside, with one draw a step.
        draw = self.param_groups[0]["draw_index"]

        def guided_closure():
            loss = closure()
            self._set_draw(draw)
            self._edit()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": guided_closure}
        return (args[0], guided_closure, *args[2:]), kwargs

    def _set_draw(self, draw: int) -> None:
        for group in self.param_groups:
            group["draw_index"] = draw

    @torch.no_grad()
    def _settle(self, params: Sequence[Tensor]) -> None:
        """Sums partial gradients, in ``.grad``, where the other optimizer wants them too."""
        slot = self._engine.replay
        replayed = [p for p in params if slot.get(p) is not None] if slot else []
        both = [*(p.grad for p in params), *map(slot.get, replayed)]
        found = sharding.settled([*params, *replayed], both)
        for p, given, whole in zip(params, both, found, strict=False):
            if whole is not given:
                p.grad = whole
        slot.exchange(replayed, found[len(params) :])

    def _refuse_partitions(self, params: Sequence[Tensor]) -> None:
        strange = (type(p) is Tensor and p.dim() == 1 and id(p) not in self._given for p in params)
        if "deepspeed" in sys.modules and any(strange):
            raise RuntimeError(
                "DeepSpeed's ZeRO has put flat partitions in place of the parameters and steps "
                "them one by one, of which dgg.Guidance would take wrong norms; use dgg.AdamW, "
                "dgg.Adam or dgg.SGD, which know it"
            )

    def _edit(self) -> None:
        self._sync_groups()
        engine, slot = self._engine, self._engine.replay
        slot.check_closed()
        wide = engine.options.read(self.param_groups)
        draw = wide["draw_index"]
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        self._refuse_partitions(params)
        self._settle(params)
        labels = None
        for i, p in enumerate(params):
            r = slot.get(p) if slot else None
            for given, kind in ((p.grad, "gradient"), (r, "replay gradient")):
                if given is not None:
                    labels = labels or group_labels(groups)
                    check_gradient(given, p, labels[i], kind)
                    check_param(
                        p, labels[i], stepped=True, elements=wide["granularity"] == "element"
                    )
            if p in self._anchors and self._anchors[p].shape != p.shape:
                label = group_labels(groups)[i]
                raise ValueError(
                    f"{label} has another shape than its anchor, "
                    f"{tuple(self._anchors[p].shape)}: call set_anchor() after a parameter has "
                    "changed its shape"
                )
        # With GradScaler an optimizer that unscales by itself gets gradients that are scaled yet.
        scale, found = (getattr(self.optimizer, n, None) for n in ("grad_scale", "found_inf"))
        if slot and (found is not None or unscaled_unseen()):
            raise RuntimeError(
                "Guidance.replay() does not go together with a GradScaler, which cannot unscale "
                "the replay gradients; use dgg.AdamW, or bfloat16 without a scaler"
            )
        if scale is not None:
            refuse_scaler(params, self.process_group)
        all_rows = self._current_rows(params)
        launched = all_rows and all(rows.kernels is not None for _, rows in all_rows)
        scaling, skip = read_scaler(scale, found, params[0].device if launched else None)
        if skip:
            engine.remember_skipped(params[0].device)
            self._set_draw(draw + 1)
            return
        for p in params:
            shard = sharding.local(p.grad)
            if shard is None and slot and slot.get(p) is not None:
                p.grad = sharding.like(torch.zeros_like(sharding.local(p.detach())), p)
            elif shard is not None and not _dispatch.is_dense(shard):
                # An expanded gradient cannot be written in place.
                shard = shard.clone(memory_format=torch.contiguous_format)
                p.grad = sharding.like(shard, p)
        for places, rows in all_rows:
            replays = [slot.get(params[i]) for i in places] if slot else []
            rows.refresh(
                [params[i].grad for i in places],
                replays,
                elementwise=wide["granularity"] == "element",
            )
            # The other optimizer has moved the parameters since any distance was measured.
            rows.forget(anchors=False)
        only = [rows for _, rows in all_rows]
        flags = [engine.flags(wide, self.param_groups, rows, draw) for rows in only]
        injecting = any(x is not None for x in flags)
        injecting = injecting or engine.joins(wide, self.param_groups, only, self.process_group)
        found = engine.measure(wide, only, injecting, scaling)
        neutral = not injecting and wide["max_grad_norm"] is None and not slot and scale is None
        if neutral:
            for rows in only:
                rows.release()
        else:
            hyper = [
                {
                    "maximize": bool(group.get("maximize", False)),
                    "strength": float(mine["strength"]),
                    "threshold": threshold(mine["alpha"]),
                }
                for group, mine in zip(groups, self.param_groups, strict=True)
            ]
            for rows, row_flags, row_found in zip(only, flags, found, strict=True):
                _dispatch.guide_(
                    rows,
                    row_found,
                    rows.constant_flags(0) if row_flags is None else row_flags,
                    hyper,
                    drawn(wide, draw, injecting),
                    scaling,
                    replay_weight=float(wide["replay_weight"]),
                )
            if scale is not None:
                # The gradients are unscaled now; the optimizer must not divide them again.
                self.optimizer.grad_scale = None
        if only:
            strength = self.param_groups[0]["strength"]
            engine.remember(wide, only[0], flags[0], found[0], float(strength), scaling.found_inf)
        self._set_draw(draw + 1)
        slot.clear()

    def _current_rows(self, params: list[Tensor]) -> list[tuple[list[int], _dispatch.Rows]]:
        same = len(params) == len(self._rows_params) and all(
            old is new for old, new in zip(self._rows_params, params, strict=True)
        )
        same = same and all(p._local_tensor is shard for p, shard in self._shards)
        if self._rows and same and self._watch is not None and self._watch.unmoved():
            return self._rows
        numbers = [n for n, g in enumerate(self.optimizer.param_groups) for _ in g["params"]]
        parts: dict[tuple[torch.device, str], list[int]] = {}
        for i, p in enumerate(params):
            if p.dtype.to_real() in anchor.FLOAT_DTYPES:
                backend = _dispatch.choose_for(self._backend, p)
                parts.setdefault((p.device, backend), []).append(i)
        self._rows = [
            (
                places,
                _dispatch.Rows(
                    backend,
                    [params[i] for i in places],
                    [numbers[i] for i in places],
                    places,
                    anchors=[self._anchors.get(params[i]) for i in places],
                    process_group=self.process_group,
                ),
            )
            for (_, backend), places in parts.items()
        ]
        self._rows_params = params
        anchors = [self._anchors[p] for p in params if p in self._anchors]
        self._watch = _dispatch.Watch([*params, *anchors])
        # Engines exchange the shard inside of a DTensor.
        self._shards = [(p, sharding.local(p)) for p in params if sharding.is_dtensor(p)]
        return self._rows


def check_backend(backend: str | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless ``backend`` (None: the fastest) can run where the parameters are.

    Raises:
        RuntimeError: It cannot; the message says how to get it.
        ValueError: No such backend.
    """
    devices = dict.fromkeys(p.device for group in groups for p in group["params"])
    for device in devices or (torch.device("cpu"),):
        if device.type != "meta":
            _dispatch.choose(backend, device)
        elif backend is not None and backend not in _dispatch.BACKENDS:
            raise ValueError(
                f"unknown backend {backend!r}; choose one of {_dispatch.BACKENDS} or None"
            )


def check_anchor_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns ``dtype`` if an anchor can be stored in it.

    Raises:
        TypeError: It is not one of the floating dtypes of the kernels.
    """
    if dtype is not None and dtype not in anchor.FLOAT_DTYPES:
        raise TypeError(
            f"anchor_dtype={dtype!r} must be one of {[str(d) for d in anchor.FLOAT_DTYPES]} or "
            "None (the parameter's dtype)"
        )
    return dtype


def check_state_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns ``dtype`` if moments can be stored in it.

    Raises:
        TypeError: It is not one of the floating dtypes of the kernels.
    """
    if dtype is not None and dtype not in anchor.FLOAT_DTYPES:
        raise TypeError(
            f"state_dtype={dtype!r} must be one of {[str(d) for d in anchor.FLOAT_DTYPES]} or "
            "None (the parameter's dtype)"
        )
    return dtype


def check_precision(
    stochastic_rounding: bool, master_weights: bool, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Checks the options for parameters of 16 bits against the parameters.

    Raises:
        TypeError: One of them is no bool.
        ValueError: Both are given, or no parameter is of a dtype they are for.
    """
    options = {"stochastic_rounding": stochastic_rounding, "master_weights": master_weights}
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")
    if stochastic_rounding and master_weights:
        raise ValueError(
            "stochastic_rounding and master_weights both keep small updates from being lost; "
            "choose one (a master weight leaves nothing to round)"
        )
    dtypes = {p.dtype for group in groups for p in group["params"]}
    if stochastic_rounding and torch.bfloat16 not in dtypes:
        raise ValueError(
            "stochastic_rounding=True is for bfloat16 parameters and there is none (found "
            f"{sorted(map(str, dtypes))}); leave it False"
        )
    if master_weights and dtypes.isdisjoint(NARROW):
        raise ValueError(
            "master_weights=True is for bfloat16 and float16 parameters and there is none (found "
            f"{sorted(map(str, dtypes))}); leave it False"
        )


def warn_narrow(what: str, dtype: torch.dtype, remedy: str, *, stacklevel: int) -> None:
    """Warns that steps in 16 bits lose small updates.

    Args:
        what: Subject and verb of what is stepped so.
        dtype: Its dtype.
        remedy: What to do instead.
        stacklevel: As in `warnings.warn`, counted from here.
    """
    # Half of the spacing below a power of two, where it is finest against the weight.
    bound = round(4 / torch.finfo(dtype).eps)
    warnings.warn(
        f"16-bit weights lose small updates: {what} stepped in {dtype}, and whatever is smaller "
        f"than 1/{bound} of a weight is rounded away; {remedy}. If it is meant to be so: "
        "warnings.filterwarnings('ignore', '16-bit weights')",
        stacklevel=stacklevel,
    )


def check_anchor_device(device: torch.device | str | None) -> torch.device | None:
    """Returns ``device`` as a torch.device if an anchor can be stored there, or None.

    Raises:
        TypeError: It is not a device at all.
        ValueError: There is no such device here, or it holds no values.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(
            f"anchor_device={device!r} must be a torch.device or its name; use 'cpu' or None (the "
            "parameter's device)"
        )
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"anchor_device={str(device)!r} cannot hold an anchor here "
            f"({str(error).splitlines()[0]}); use 'cpu' or None (the parameter's device)"
        ) from None
    return found


def check_process_group(process_group: Any, options: Mapping[str, Any]) -> Any:
    """Returns the group over whose ranks plain parameters are partitioned, or None.

    Raises:
        TypeError: It is no process group.
        ValueError: An option needs to know where a partition's elements belong.
    """
    if process_group is None:
        return None
    if not (torch.distributed.is_available() and hasattr(process_group, "rank")):
        raise TypeError(
            f"process_group={process_group!r} must be a torch.distributed.ProcessGroup, or None if "
            "every rank has whole parameters"
        )
    if options.get("granularity") == "element" or options.get("norm_scope") == "tensor":
        raise ValueError(
            "process_group= says that each rank has a flat partition, of which nobody knows where "
            "tensors begin; use norm_scope='global' and granularity='step' or 'tensor'"
        )
    return process_group
