# SPDX-License-Identifier: BSD-3-Clause
"""The state of other libraries' Adam and AdamW, turned into one that dgg's optimizers load.

Known by their keys alone, so that none of these libraries is imported: bitsandbytes (32 bits and
blockwise 8 bits), torchao (8 and 4 bits, float8), apex and DeepSpeed.
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
from dgg.checkpoint import saved_state
from dgg.reference import FLOAT_DTYPES

# bitsandbytes hides what it quantised in here, so that FSDP does not gather it.
_WRAPPED = "__bnb_optimizer_quant_state__"
_BLOCKWISE = {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
# Elements that share one absmax, today's first.
_BLOCK_SIZES = (256, 2048)
# Elements dequantised at a time: their codes are widened to look the values up.
_PIECE = 1 << 24

_ADAM = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_OURS = {"anchor", "master"}
# Of a group in another library: what Adam has not, AdEMAMix' own, or has another meaning in dgg.
_NOT_ADAMS = {"step", "bias_correction", "alpha", "t_alpha", "t_beta3"}
# How the step is carried out, and what belongs to the optimizer as it is.
_NOT_SAVED = {"params", "param_names", "anchored"}
_HOW = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}

_POSSIBLE = (
    "convert_state_dict() knows Adam and AdamW of bitsandbytes (32 bits, blockwise 8 bits), "
    "torchao, apex, DeepSpeed, torch and dgg. Others keep one moment or other ones (SGD, Lion, "
    "RMSprop, Adagrad, Adamax, Adafactor, NAdam, LAMB, AdEMAMix), which are not Adam's: start "
    "dgg.AdamW without them, or go on with that optimizer and guide it with dgg.Guidance"
)


def convert_state_dict(
    state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Returns the state of another library's Adam or AdamW in the form that dgg loads.

    Moments come out dequantised and in the dtype they are kept in (`load_state_dict` casts them as
    torch does, see ``state_dtype``), lr, betas, eps and weight_decay as they were. What the other
    library has not (amsgrad, maximize, dgg's own options) is the optimizer's. A state dict of
    torch.optim's or dgg's optimizers comes out as an equal copy. Nothing that is given changes.

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

    Example:
        >>> opt = dgg.AdamW(model.parameters(), lr=2e-4)
        >>> opt.load_state_dict(dgg.convert_state_dict(saved_by_bitsandbytes, opt))
        >>> opt.set_anchor()
    """
    groups = _groups_of(optimizer)
    saved_state.check_form(state_dict, groups, taken_by="convert_state_dict()")
    for number, (mine, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        _check_names(saved, mine, number)
    labels = _labels(groups, state_dict["param_groups"])
    # Of what no group names there is nothing to convert, or the check above has said so.
    entries = {k: _unwrapped(entry) for k, entry in state_dict["state"].items() if k in labels}
    for key, entry in entries.items():
        _check_kind(entry, labels[key])
    state: dict[Any, Any] = {}
    param_groups = []
    for number, (mine, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        group = _group(saved, mine, number)
        here = {key: entries[key] for key in saved["params"] if key in entries}
        steps = _steps(here, saved, number)
        for param, key in zip(mine["params"], saved["params"], strict=True):
            if key in here:
                state[key] = _entry(here[key], steps.get(key), param, labels[key])
                _check_amsgrad(state[key], group, labels[key])
        param_groups.append(group)
    rest = {k: _copied(v) for k, v in state_dict.items() if k not in ("state", "param_groups")}
    return {"state": state, "param_groups": param_groups, **rest}


# -- the whole ----------------------------------------------------------------------------------


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


def _check_names(saved: Mapping[str, Any], mine: Mapping[str, Any], number: int) -> None:
    """Raises where both know the parameters' names and have them in another order."""
    known = mine.get("param_names")
    names = saved.get("param_names")
    if names is None and all(isinstance(key, str) for key in saved["params"]):
        names = saved["params"]
    if known is None or names is None or list(names) == list(known):
        return
    if sorted(names) == sorted(known):
        place = next(i for i, (x, y) in enumerate(zip(names, known, strict=True)) if x != y)
        raise ValueError(
            f"parameter {place} of group {number} is {names[place]!r} in the state dict and "
            f"{known[place]!r} in the optimizer; build it from the parameters in the same order"
        )


def _labels(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> dict[Any, str]:
    """Returns how errors call the parameter of every key."""
    labels = {}
    for number, (mine, group) in enumerate(zip(groups, saved, strict=True)):
        names = mine.get("param_names")
        for place, key in enumerate(group["params"]):
            name = f" ({names[place]!r})" if names else ""
            labels[key] = f"parameter {place}{name} of group {number}"
    return labels


# -- groups -------------------------------------------------------------------------------------


def _group(saved: Mapping[str, Any], mine: Mapping[str, Any], number: int) -> dict[str, Any]:
    _check_group(saved, number)
    if saved.keys() >= {"amsgrad", "maximize"}:  # torch's or dgg's: whole as it is
        return {key: _copied(value) for key, value in saved.items()}
    # What has one name and two meanings is dgg's: guidance does not come from elsewhere.
    guidance = {*_arguments.GUIDANCE_OPTIONS}
    foreign = saved.keys() - _NOT_ADAMS - _HOW - _NOT_SAVED - guidance
    group = {key: _copied(mine[key]) for key in mine if key not in _NOT_SAVED | foreign}
    for key in saved:
        if key in foreign:
            group[key] = _number(_copied(saved[key]), like=mine.get(key))
    group["betas"] = tuple(group["betas"])
    return {**group, "params": list(saved["params"]), "anchored": 0}


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


# -- entries ------------------------------------------------------------------------------------


def _unwrapped(entry: Any) -> Any:
    if isinstance(entry, Mapping) and isinstance(entry.get(_WRAPPED), Mapping):
        return {**{k: v for k, v in entry.items() if k != _WRAPPED}, **entry[_WRAPPED]}
    return entry


def _steps(entries: Mapping[Any, Any], saved: Mapping[str, Any], number: int) -> dict[Any, Any]:
    """Returns the step of every parameter of a group that has state."""
    found = {key: entry for key, entry in entries.items() if entry}
    own = {key: entry["step"] for key, entry in found.items() if "step" in entry}
    if "step" not in saved or not found:
        return own
    if not own:  # apex counts per group
        return dict.fromkeys(found, saved["step"])
    counts = {key: _count(value) for key, value in own.items()}
    if "bias_correction" not in saved or None in counts.values() or len(own) < len(found):
        return own
    if len(set(counts.values())) == 1:
        return own
    # DeepSpeed's FusedAdam steps all parameters of a dtype by the count of the last one, and
    # raises no other.
    dtypes = {getattr(entry.get("exp_avg"), "dtype", None) for entry in found.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"group {number} has the steps {sorted(set(counts.values()))} and moments in "
            f"{sorted(map(str, dtypes))}: DeepSpeed's FusedAdam counts with the last parameter "
            "alone, once per dtype, so nobody can tell how often it stepped; set step of all"
        )
    return dict.fromkeys(found, max(counts.values()))


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
    """Returns a copy of a tensor, of torchao's quantised ones the values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} of {label} is a {type(value).__name__}, not a tensor")
    shard = sharding.local(value)
    if not is_traceable_wrapper_subclass(shard):
        return value.detach().clone()
    if not hasattr(type(shard), "dequantize"):
        raise TypeError(f"{key} of {label} is a {type(shard).__name__}, which has no dequantize()")
    # A copy also where it has nothing to compute.
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


def _check_amsgrad(entry: Mapping[str, Any], group: Mapping[str, Any], label: str) -> None:
    if entry and group.get("amsgrad") and "max_exp_avg_sq" not in entry:
        raise ValueError(
            f"the state of {label} has no max_exp_avg_sq, which amsgrad=True needs; build the "
            "optimizer with amsgrad=False"
        )
