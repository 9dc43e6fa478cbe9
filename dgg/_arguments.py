# SPDX-License-Identifier: BSD-3-Clause
"""What optimizers are given, checked before anything is changed: options, parameters, gradients."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from dgg import _callers, _numbers, backends, sharding
from dgg._literals import Granularity, NormScope
from dgg.reference import FLOAT_DTYPES, ROUTES
from dgg.sharding import fsdp1

# Options of the whole optimizer. Every group has them, because every kind of checkpoint carries the
# groups; all groups must agree.
OPTIMIZER_OPTIONS = (
    "scaling", "norm_scope", "granularity", "max_grad_norm", "replay_weight", "seed", "draw_index",
    "task_index", "importance", "importance_mean", "importance_draw", "route",
)  # fmt: skip
# Those that earlier releases have not saved, and what they did.
NEW_OPTIONS = {
    "importance": 0.0, "importance_mean": 0.0, "importance_draw": None, "route": "gradient",
}  # fmt: skip
# Options of one group, which a schedule may change.
GROUP_OPTIONS = ("alpha", "strength")
GUIDANCE_OPTIONS = (*OPTIMIZER_OPTIONS, *GROUP_OPTIONS)
# Dtypes in which small updates of a weight are rounded away.
NARROW = (torch.bfloat16, torch.float16)
_LARGEST = sys.float_info.max
PLAIN_TYPES = {float, int, bool, str, type(None)}
_CHOICES = {
    "norm_scope": get_args(NormScope), "granularity": get_args(Granularity), "route": ROUTES,
}  # fmt: skip
# The alpha that sets the pull by itself, from the replay gradients.
AUTO = "auto"


def plain(name: str, value: Any) -> Any:
    """Returns numpy's numbers, and those in pairs, as Python's; everything else as it is.

    ``torch.load(weights_only=True)`` refuses numpy's numbers. Tensors stay tensors, since schedules
    write into them.

    Raises:
        TypeError: An array of several numbers.
    """
    # By type: numpy's float64 is a float.
    if isinstance(value, (tuple, list)) and not all(type(x) in (int, float, bool) for x in value):
        return type(value)(plain(name, x) for x in value)
    return value if isinstance(value, Tensor) else _numbers.plain(name, value)


def make_plain(group: dict[str, Any]) -> None:
    """Makes numpy's numbers among the options of a group Python's, in place."""
    for name, value in group.items():
        if name not in ("params", "param_names") and type(value) not in PLAIN_TYPES:
            group[name] = plain(name, value)


def is_number(value: Any) -> bool:
    """Returns whether it is a real number of Python, or of numpy or of an array of one element."""
    try:
        value = _numbers.plain("value", value)
    except TypeError:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the values of any of GUIDANCE_OPTIONS.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of range; the message names option, value and remedy.
    """
    options = {name: plain(name, value) for name, value in options.items()}
    for name, choices in _CHOICES.items():
        if name in options and not (isinstance(options[name], str) and options[name] in choices):
            raise ValueError(f"{name}={options[name]!r} is not one of {choices}")
    if "scaling" in options and not isinstance(options["scaling"], bool):
        raise TypeError(f"scaling={options['scaling']!r} must be True or False")
    if not (isinstance(options.get("alpha"), str) and options["alpha"] == AUTO):
        why, given = f"it is a probability, or {AUTO!r}", options.get("alpha")
        if isinstance(given, (int, float)) and 1 < given <= 100:
            why += f"; {given:g} % is {given / 100:g}"
        _check_number(options, "alpha", high=1.0, why=why)
    if isinstance(options.get("importance"), Tensor):
        raise TypeError("importance is a tensor; it must be a number: pass a Python float")
    _check_number(options, "importance", high=1.0, why="1 - importance weighs the plain difference")
    _check_number(options, "importance_mean", why="it is a mean of squares")
    _check_number(options, "strength", why="a negative one would push off the anchor")
    _check_number(options, "replay_weight", why="it weighs the replay gradient")
    if options.get("max_grad_norm") is not None:
        _check_number(options, "max_grad_norm", positive=True, why="pass None for no clipping")
    for name in ("seed", "draw_index", "task_index", "importance_draw"):
        bits = 64 if name == "seed" else 63
        if name not in options or (name == "importance_draw" and options[name] is None):
            continue
        value = options[name]
        if name == "draw_index" and isinstance(value, Tensor):
            # Captured steps have a tensor.
            if value.dtype != torch.int64 or value.numel() != 1 or value.device.type == "meta":
                raise TypeError(
                    f"draw_index is a tensor of {value.dtype} of shape {tuple(value.shape)} on "
                    f"{str(value.device)!r}; it must be an int, or one int64 with values"
                )
            if value.device.type != "cpu":
                continue  # reading it would wait for the device
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={_numbers.shown(value)} must be an int")
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={_numbers.shown(value)} must lie in [0, 2**{bits})")


def _check_number(options, name, *, high=math.inf, positive=False, why) -> None:
    if name not in options:
        return
    value = options[name]
    if isinstance(value, Tensor):
        if (
            value.layout != torch.strided
            or value.device.type == "meta"
            or value.numel() != 1
            or not value.is_floating_point()
        ):
            raise TypeError(
                f"{name}=a tensor of {value.dtype} ({value.layout}) of shape "
                f"{tuple(value.shape)} on {str(value.device)!r} must be a number, or a floating "
                "tensor of one element; pass one"
            )
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}={_numbers.shown(value)} must be a number, not {type(value).__name__}; pass a "
            "Python float or int"
        )
    inside = value > 0 if positive else value >= 0
    if not (inside and value <= high and value <= _LARGEST):
        bounds = f"{'(' if positive else '['}0, {high:g}{']' if high < math.inf else ')'}"
        raise ValueError(f"{name}={_numbers.shown(value)} must lie in {bounds}: {why}")


def guard_of(groups: Sequence[Mapping[str, Any]], ascends: Sequence[Any]) -> bool | None:
    """Returns None unless alpha is "auto", otherwise whether the guided groups maximize.

    ``ascends`` says of each group whether it does.

    Raises:
        ValueError: An option, or a group, does not go with alpha="auto".
    """
    automatic = [isinstance(group["alpha"], str) for group in groups]
    if not any(automatic):
        return None
    first = groups[0]
    if first["granularity"] != "step" or not first["scaling"]:
        raise ValueError(
            f"alpha={AUTO!r} draws nothing and finds the scale by itself, so "
            f"granularity={first['granularity']!r} and scaling={first['scaling']} would be "
            "ignored; leave granularity='step' and scaling=True, or use a number for alpha"
        )
    for number, (group, auto) in enumerate(zip(groups, automatic, strict=True)):
        alpha = group["alpha"]
        if not auto and (isinstance(alpha, Tensor) or alpha != 0):
            raise ValueError(
                f"alpha={alpha!r} of group {number} does not go with alpha={AUTO!r} of group "
                f"{automatic.index(True)}; use {AUTO!r} or 0 (not guided) in every group"
            )
    guided = {bool(maximize) for maximize, auto in zip(ascends, automatic, strict=True) if auto}
    if len(guided) > 1:
        raise ValueError(
            f"alpha={AUTO!r} compares the gradients of all its groups, and some maximize and some "
            "do not; use one optimizer for each"
        )
    return guided.pop()


def check_agreement(number: int, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises a ValueError if a group has another optimizer-wide option than the first group."""
    for name in OPTIMIZER_OPTIONS:
        if name not in group or name not in first or group[name] is first[name]:
            continue
        values = group[name], first[name]
        on_device = [isinstance(x, Tensor) and x.device.type != "cpu" for x in values]
        if any(on_device) and name == "draw_index":
            continue  # of captured steps, for which loading makes one tensor for all groups
        if comparable(group[name]) != comparable(first[name]):
            raise ValueError(
                f"{name} is one setting for the whole optimizer, but group 0 has "
                f"{first[name]!r} and group {number} has {group[name]!r}; set it in all groups"
            )


def settings_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the optimizer-wide options as plain values, by which ranks can be compared."""
    first = {name: groups[0][name] for name in OPTIMIZER_OPTIONS}
    return {name: x.item() if isinstance(x, Tensor) else x for name, x in first.items()}


def comparable(value: Any) -> Any:
    """Returns a value by which two values of an option can be compared, without synchronising."""
    if not isinstance(value, Tensor):
        return value
    # Tensors on an accelerator are compared by identity. A later check refuses what is no number.
    readable = value.numel() == 1 and value.device.type == "cpu" and value.layout == torch.strided
    return value.item() if readable else id(value)


def check_backend(backend: str | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless ``backend`` (None: the fastest) can run where the parameters are.

    Raises:
        RuntimeError: It cannot; the message says how to get it.
        ValueError: No such backend.
    """
    devices = dict.fromkeys(p.device for group in groups for p in group["params"])
    for device in devices or (torch.device("cpu"),):
        if device.type != "meta":
            backends.choose(backend, device)
        elif backend is not None and backend not in backends.BACKENDS:
            raise ValueError(
                f"unknown backend {backend!r}; choose one of {backends.BACKENDS} or None"
            )


def check_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns ``dtype`` if the option ``name`` may have it.

    Raises:
        TypeError: It is not one of the floating dtypes of the kernels.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}={dtype!r} must be one of {[str(d) for d in FLOAT_DTYPES]} or None (the "
            "parameter's dtype)"
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


def warn_narrow(what: str, dtype: torch.dtype, remedy: str) -> None:
    """Warns that 16-bit steps of ``what`` (weights, with "is" or "are") lose small updates."""
    # Half of the spacing below a power of two, where the spacing is smallest against the weight.
    bound = round(4 / torch.finfo(dtype).eps)
    warnings.warn(
        f"16-bit weights lose small updates: {what} stepped in {dtype}, and whatever is smaller "
        f"than 1/{bound} of a weight is rounded away; {remedy}. If it is meant to be so: "
        "warnings.filterwarnings('ignore', '16-bit weights')",
        stacklevel=_callers.stacklevel(),
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
        anchor_device = torch.device(device)
        if anchor_device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, dtype=torch.float32, device=anchor_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"anchor_device={str(device)!r} cannot hold an anchor here "
            f"({str(error).splitlines()[0]}); use 'cpu' or None (the parameter's device)"
        ) from None
    return anchor_device


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


def group_labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the label of each parameter in errors: its name, or its place and shape."""
    labels = []
    for number, group in enumerate(groups):
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            if names:
                labels.append(f"parameter {names[place]!r}")
            else:
                shape = "unknown" if is_lazy(param) else tuple(param.shape)
                labels.append(f"parameter {place} of group {number} (shape {shape})")
    return labels


def check_param(
    param: Tensor, label: str, *, stepped: bool = False, elements: bool = False
) -> None:
    """Checks that a parameter (trainable, or about to be stepped) is one the kernels can take."""
    if not stepped and (not param.requires_grad or is_lazy(param)):
        return
    if is_lazy(param):
        raise ValueError(
            f"{label} is not initialised yet (a lazy module's): run a forward pass first, which "
            "gives it its shape"
        )
    fsdp1.check(param, label)
    if sharding.is_dtensor(param):
        sharding.check(param, label, elements=elements)
    if param.layout != torch.strided or param.dtype.to_real() not in FLOAT_DTYPES:
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
    if param.is_neg() or param.is_conj():
        raise ValueError(
            f"{label} is lazily negated or conjugated (a view that is not what its memory holds) "
            "and cannot be updated in place; clone it first"
        )
    if _overlaps(param):
        raise ValueError(
            f"{label} overlaps itself in memory (an expanded tensor) and cannot be updated in "
            "place; clone it first"
        )


def check_state(name: str, value: Any, param: Tensor, label: str) -> None:
    """Checks that a value in the state of a parameter is a tensor the kernels can take.

    Raises:
        TypeError: It is no tensor of a floating dtype.
        ValueError: It has another shape, no values, or memory that cannot be written.
    """
    remedy = "drop it (del optimizer.state[p]), or put a tensor like the parameter there"
    if not isinstance(value, Tensor) or value.dtype.to_real() not in FLOAT_DTYPES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"the {name} in the state of {label} is {kind}, no floating tensor; {remedy}"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"{label} has shape {tuple(param.shape)}, its {name} {tuple(value.shape)}: a parameter "
            "that changed its shape is a new one; drop its state (del optimizer.state[p]) and call "
            "set_anchor() again, or build a new optimizer"
        )
    if value.is_complex() != param.is_complex():
        raise TypeError(
            f"the {name} in the state of {label} is {value.dtype} for a parameter of "
            f"{param.dtype}; {remedy}"
        )
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(
            f"the {name} in the state of {label} is {value.layout} on {str(value.device)!r}, where "
            f"there are no values; {remedy}"
        )
    unwritable = value.is_neg() or value.is_conj() or (value.numel() > 0 and _overlaps(value))
    if unwritable and not sharding.keeps_values_elsewhere(value):
        raise ValueError(
            f"the {name} in the state of {label} is a view that cannot be written element by "
            f"element (expanded, lazily negated or conjugated); {remedy}"
        )
    if name not in ("anchor", "importance") and value.device != param.device:
        raise ValueError(
            f"the {name} in the state of {label} is on {str(value.device)!r}, the parameter on "
            f"{str(param.device)!r}; move it, or load the state dict, which does so"
        )


def _overlaps(x: Tensor) -> bool:
    return any(st == 0 and size > 1 for st, size in zip(x.stride(), x.shape, strict=True))


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
    if grad.is_complex() != param.is_complex() or grad.dtype.to_real() not in FLOAT_DTYPES:
        raise TypeError(
            f"the {kind} of {label} is {grad.dtype} for a parameter of {param.dtype}; use float32, "
            "bfloat16, float16 or float64 gradients"
        )
