# SPDX-License-Identifier: BSD-3-Clause
"""Conversion of the state of other libraries' Adam and AdamW into one that dgg's optimizers load.

The libraries are recognised by the keys of their state and never imported: bitsandbytes (32 bits
and blockwise 8 bits), torchao (8 and 4 bits, float8), apex and DeepSpeed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dgg import _arguments, anchor, sharding
from dgg._signatures import listed
from dgg.checkpoint import saved_state
from dgg.reference import FLOAT_DTYPES

# The key under which bitsandbytes has quantised state, so that FSDP does not gather it.
_WRAPPED = "__bnb_optimizer_quant_state__"
_BLOCKWISE = {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
# Elements that share one absmax, today's first.
_BLOCK_SIZES = (256, 2048)
# Elements dequantised at a time, since their codes are cast to int32.
_PIECE = 1 << 24

_ADAM = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_OURS = {"anchor", "importance", "master"}
# Options of groups in other libraries that Adam does not have, or that mean something else in dgg.
_NOT_ADAMS = {"step", "bias_correction", "alpha", "t_alpha", "t_beta3"}
# Entries of a group that are the optimizer's, whatever the state dict has; options that say how a
# step is carried out.
_NOT_SAVED = {"params", "param_names", "anchored"}
_HOW = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}

_POSSIBLE = (
    "convert_state_dict() knows Adam and AdamW of bitsandbytes (32 bits, blockwise 8 bits), "
    "torchao, apex, DeepSpeed, torch and dgg. Others keep one moment or other ones (SGD, Lion, "
    "RMSprop, Adagrad, Adamax, Adafactor, NAdam, LAMB, AdEMAMix), which are not Adam's: start "
    "dgg.AdamW without them, or go on with that optimizer and guide it with dgg.Guidance"
)


@listed
def convert_state_dict(
    state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Returns the state of another library's Adam or AdamW in the form that dgg loads.

    Moments are dequantised and keep their dtype (`load_state_dict` casts them as torch does, see
    ``state_dtype``); lr, betas, eps and weight_decay are copied. Options that the other library
    does not have (amsgrad, maximize, dgg's own) are taken from the optimizer. A state dict of
    torch.optim's or dgg's optimizers is returned as an equal copy. No argument is modified.

    Args:
        state_dict: From ``state_dict()`` of bitsandbytes' AdamW, AdamW8bit and their paged
            versions, torchao's AdamW8bit, AdamW4bit and AdamWFp8, apex' FusedAdam, DeepSpeed's
            FusedAdam and DeepSpeedCPUAdam, and of the same without W.
        optimizer: The dgg.AdamW or dgg.Adam that is going to load it, over the same parameters.

    Raises:
        KeyError: A key is missing.
        TypeError: Something is of the wrong type.
        ValueError: It is no Adam's state, or group, parameter and key that are named do not fit
            the optimizer: their number, shape or values; or state belongs to no group.

    Examples:
        >>> opt = dgg.AdamW(model.parameters(), lr=2e-4)
        >>> opt.load_state_dict(dgg.convert_state_dict(saved_by_bitsandbytes, opt))
        >>> opt.set_anchor()
    """
    groups = _groups_of(optimizer)
    saved_state.check_form(state_dict, groups, taken_by="convert_state_dict()")
    pairs = list(zip(groups, state_dict["param_groups"], strict=True))
    saved_state.check_order(state_dict["param_groups"], groups)
    labels = _labels(groups, state_dict["param_groups"])
    # The check above has refused entries that no group names, unless they are empty.
    entries = {k: _unwrapped(entry) for k, entry in state_dict["state"].items() if k in labels}
    for key, entry in entries.items():
        _check_kind(entry, labels[key])
    state: dict[Any, Any] = {}
    param_groups = []
    for number, (group, saved) in enumerate(pairs):
        param_groups.append(_group(saved, group, number))
        steps = _steps({k: entries[k] for k in saved["params"] if k in entries}, saved, number)
        for param, key in zip(group["params"], saved["params"], strict=True):
            if key in entries:
                state[key] = _entry(entries[key], steps.get(key), param, labels[key])
                amsgrad = param_groups[-1].get("amsgrad")
                if state[key] and amsgrad and "max_exp_avg_sq" not in state[key]:
                    raise ValueError(
                        f"the state of {labels[key]} has no max_exp_avg_sq, which amsgrad=True "
                        "needs; build the optimizer with amsgrad=False"
                    )
    rest = {k: _copied(v) for k, v in state_dict.items() if k not in ("state", "param_groups")}
    return {"state": state, "param_groups": param_groups, **rest}


def _groups_of(optimizer: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"convert_state_dict() takes the dgg.AdamW or dgg.Adam that is to load the state, not "
            f"{type(optimizer).__name__}; of a wrapper pass dgg.unwrap(wrapper)"
        )
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(
            f"{type(optimizer).__name__} does not have the two moments of Adam; pass a dgg.AdamW "
            "or dgg.Adam as optimizer"
        )
    return optimizer.param_groups


def _labels(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> dict[Any, str]:
    """Returns the label in errors of the parameter of every key."""
    labels = {}
    for number, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        names = group.get("param_names")
        for place, key in enumerate(saved_group["params"]):
            name = f" ({names[place]!r})" if names else ""
            labels[key] = f"parameter {place}{name} of group {number}"
    return labels


def _group(saved: Mapping[str, Any], group: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the converted group; what the saved one lacks comes from the optimizer's."""
    _check_group(saved, number)
    if saved.keys() >= {"amsgrad", "maximize"}:  # torch's or dgg's: nothing to convert
        return {key: _copied(value) for key, value in saved.items()}
    # An option with the name of a guidance option means something else in the other library.
    from_saved = saved.keys() - _NOT_ADAMS - _HOW - _NOT_SAVED - {*_arguments.GUIDANCE_OPTIONS}
    converted = {key: _copied(group[key]) for key in group if key not in _NOT_SAVED | from_saved}
    for key in saved:
        if key in from_saved:
            converted[key] = _number(_copied(saved[key]), like=group.get(key))
    converted["betas"] = tuple(converted["betas"])
    return {**converted, "params": list(saved["params"]), "anchored": 0}


def _check_group(saved: Mapping[str, Any], number: int) -> None:
    if not saved.get("bias_correction", True):
        raise ValueError(
            f"group {number} has bias_correction={saved['bias_correction']}: its moments were used "
            "as they are, and dgg's Adam corrects their bias; there is no state of it that would "
            "go on like this"
        )
    betas = saved.get("betas", (0.9, 0.999))
    if saved.get("t_alpha") is not None or saved.get("t_beta3") is not None:
        raise ValueError(f"group {number} has t_alpha or t_beta3, so it is AdEMAMix'. {_POSSIBLE}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"group {number} has betas={betas!r}, not Adam's two. {_POSSIBLE}")
    numbers = {"betas[0]": betas[0], "betas[1]": betas[1]}
    numbers |= {key: saved[key] for key in ("lr", "eps", "weight_decay") if key in saved}
    for name, value in numbers.items():
        plain = _number(_copied(value))
        if isinstance(plain, bool) or not isinstance(plain, (int, float)):
            raise TypeError(
                f"group {number} has {name}={value!r}, a {type(value).__name__}, where a number "
                "must be; the state dict is damaged"
            )
        if not (math.isfinite(plain) and plain >= 0 and (plain < 1 or name[0] != "b")):
            raise ValueError(
                f"group {number} has {name}={plain}, which must lie in "
                f"[0, {'1' if name[0] == 'b' else 'inf'}); the state dict is damaged"
            )


def _number(value: Any, like: Any = None) -> Any:
    """Returns the number in a tensor of one element, a tensor where the optimizer has one."""
    if isinstance(like, Tensor) and isinstance(value, (int, float, Tensor)):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _copied(value: Any) -> Any:
    """Returns a copy that shares no memory, with Python's numbers for NumPy's."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {_copied(key): _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return copy.deepcopy(value)


def _unwrapped(entry: Any) -> Any:
    if isinstance(entry, Mapping) and isinstance(entry.get(_WRAPPED), Mapping):
        return {**{k: v for k, v in entry.items() if k != _WRAPPED}, **entry[_WRAPPED]}
    return entry


def _steps(entries: Mapping[Any, Any], saved: Mapping[str, Any], number: int) -> dict[Any, Any]:
    entries = {key: entry for key, entry in entries.items() if entry}
    steps = {key: entry["step"] for key, entry in entries.items() if "step" in entry}
    if "step" not in saved or not entries:
        return steps
    if not steps:  # apex counts per group
        return dict.fromkeys(entries, saved["step"])
    counts = {_count(value) for value in steps.values()}
    known = sorted(count for count in counts if count is not None)
    complete = len(known) == len(counts) and len(steps) == len(entries)
    if "bias_correction" not in saved or not complete or len(counts) == 1:
        return steps
    # DeepSpeed's FusedAdam steps all parameters of a dtype by the count of the last one, and
    # increases no other.
    dtypes = {getattr(entry.get("exp_avg"), "dtype", None) for entry in entries.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"group {number} has the steps {known} and moments in "
            f"{sorted(map(str, dtypes))}: DeepSpeed's FusedAdam counts with the last parameter "
            "alone, once per dtype, so nobody can tell how often it stepped; set step of all"
        )
    return dict.fromkeys(entries, known[-1])


def _count(step: Any) -> float | None:
    step = _number(_copied(step))
    return step if isinstance(step, (int, float)) and not isinstance(step, bool) else None


def _check_kind(entry: Any, label: str) -> None:
    """Raises unless the keys are those of an Adam that is known."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"the state of {label} is a {type(entry).__name__}, not a dict")
    keys = set(map(str, entry))
    if keys & {"max1", "max2", "new_max1", "new_max2"}:
        raise ValueError(
            f"the state of {label} has {sorted(keys)}: these are bitsandbytes' 8 bits with one "
            "scale per tensor (block_wise=False), which are not read; start dgg.AdamW without them"
        )
    bitsandbytes = {"state1", "state2"} <= keys <= {"step", *_BLOCKWISE}
    if keys and not bitsandbytes and not {"exp_avg", "exp_avg_sq"} <= keys <= _ADAM | _OURS:
        raise ValueError(f"the state of {label} has {sorted(keys)}. {_POSSIBLE}")


def _entry(entry: Mapping[str, Any], step: Any, param: Tensor, label: str) -> dict[str, Any]:
    if not entry:
        return {}
    if "state1" in entry:
        moments = {
            "exp_avg": _bitsandbytes(entry, "1", param, label),
            "exp_avg_sq": _bitsandbytes(entry, "2", param, label),
        }
    else:
        moments = {key: _plain(entry[key], key, label) for key in entry if key != "step"}
    for key, value in moments.items():
        _check_moment(value, key, param, label)
    if step is None:
        raise KeyError(
            f"the state of {label} has no step, nor has its group; without it the bias of the "
            "moments cannot be corrected: pass the state dict as the optimizer returned it"
        )
    return {"step": _step(step, label), **moments}


def _step(value: Any, label: str) -> Tensor:
    count = _count(value)
    if count is None:
        raise TypeError(f"step of {label} is a {type(value).__name__}; it must be a number")
    if not (math.isfinite(count) and count >= 0 and count == int(count)):
        raise ValueError(f"step of {label} is {count}; it must be a whole number from 0 on")
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.tensor(float(count), dtype=torch.float32, device="cpu")


def _plain(value: Any, key: str, label: str) -> Any:
    """Returns a copy of a tensor; torchao's quantised ones are dequantised."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} of {label} is a {type(value).__name__}, not a tensor")
    shard = sharding.local(value)
    if not is_traceable_wrapper_subclass(shard):
        return value.detach().clone()
    if not hasattr(type(shard), "dequantize"):
        raise TypeError(f"{key} of {label} is a {type(shard).__name__}, which has no dequantize()")
    # A copy, since dequantize() may return the tensor itself.
    return sharding.like(shard.dequantize().detach().clone(), value)


def _bitsandbytes(entry: Mapping[str, Any], which: str, param: Tensor, label: str) -> Tensor:
    key = f"state{which}"
    codes = entry[key]
    if not isinstance(codes, Tensor):
        raise TypeError(f"{key} of {label} is a {type(codes).__name__}, not a tensor")
    if tuple(codes.shape) != tuple(param.shape):
        raise ValueError(
            f"{key} of {label} has shape {tuple(codes.shape)}, the parameter has "
            f"{tuple(param.shape)}; load it into the same architecture (AdEMAMix has one axis more)"
        )
    if not codes.is_contiguous():
        raise ValueError(
            f"{key} of {label} is not contiguous (channels_last?): bitsandbytes steps such tensors "
            "in another order than theirs, so nobody can tell whose its values are"
        )
    if codes.dtype != torch.uint8:
        return codes.detach().clone()
    missing = [name for name in (f"qmap{which}", f"absmax{which}") if name not in entry]
    if missing:
        raise KeyError(f"{key} of {label} is quantised, and {missing} are missing")
    qmap, absmax = entry[f"qmap{which}"], entry[f"absmax{which}"]
    for name, value in ((f"qmap{which}", qmap), (f"absmax{which}", absmax)):
        if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES or value.dim() != 1:
            raise TypeError(f"{name} of {label} must be a floating tensor of one dimension")
        if not anchor.finite(value):
            raise ValueError(f"{name} of {label} holds inf or NaN; the state is damaged")
    if qmap.numel() != 256:
        raise ValueError(f"qmap{which} of {label} has {qmap.numel()} values, 8 bits need 256")
    size, blocks = codes.numel(), absmax.numel()
    block = next((b for b in _BLOCK_SIZES if -(-size // b) == blocks), None)
    if block is None:
        raise ValueError(
            f"absmax{which} of {label} has {blocks} blocks for {size} elements, which is neither "
            f"256 nor 2048 elements a block; the state is damaged"
        )
    return _dequantised(codes, qmap.float(), absmax.float(), block)


def _dequantised(codes: Tensor, qmap: Tensor, absmax: Tensor, block: int) -> Tensor:
    flat = codes.detach().reshape(-1)
    qmap, absmax = qmap.to(flat.device), absmax.to(flat.device)
    values = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), _PIECE):  # a multiple of every block size
        piece = flat[start : start + _PIECE]
        scales = absmax[start // block : -(-(start + _PIECE) // block)].repeat_interleave(block)
        scales = scales[: piece.numel()]
        torch.mul(qmap[piece.int()], scales, out=values[start : start + piece.numel()])
    return values.reshape(codes.shape)


def _check_moment(value: Any, key: str, param: Tensor, label: str) -> None:
    if tuple(value.shape) != tuple(param.shape):
        raise ValueError(
            f"{key} of {label} has shape {tuple(value.shape)}, the parameter has "
            f"{tuple(param.shape)}; load it into the same architecture"
        )
    suitable = value.dtype.is_complex if param.is_complex() else value.dtype in FLOAT_DTYPES
    if not suitable or value.layout != torch.strided:
        raise TypeError(
            f"{key} of {label} is {value.dtype} ({value.layout}); it must be a dense float32, "
            "bfloat16, float16 or float64 tensor (of complex parameters: complex)"
        )
    if value.device.type == "meta":
        raise ValueError(f"{key} of {label} is on the meta device and has no values; load it first")
    if not anchor.finite(value):
        raise ValueError(
            f"{key} of {label} holds inf or NaN and would turn the weights into NaN; go back to a "
            "checkpoint that is sound"
        )
    shard = sharding.local(value)
    if key.endswith("exp_avg_sq") and not shard.is_complex() and shard.numel() and shard.min() < 0:
        raise ValueError(f"{key} of {label} has negative values, whose root Adam would take")
