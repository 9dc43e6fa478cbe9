# SPDX-License-Identifier: BSD-3-Clause
"""Anchors θ*: taking them from the weights or from named tensors, and checking them.

Nothing here changes an optimizer; every check runs before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgg import sharding
from dgg.reference import FLOAT_DTYPES

_COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def storage_dtype(param: Tensor, anchor_dtype: torch.dtype | None, label: str) -> torch.dtype:
    """Returns the dtype an anchor of ``param`` is stored in.

    Args:
        param: The parameter.
        anchor_dtype: The optimizer's ``anchor_dtype``; None means the parameter's own.
        label: Name of the parameter, for the error.

    Raises:
        TypeError: No complex dtype goes with ``anchor_dtype``.
    """
    if anchor_dtype is None:
        return param.dtype
    if not param.is_complex():
        return anchor_dtype
    if anchor_dtype not in _COMPLEX_OF:
        raise TypeError(
            f"{label} is complex and anchor_dtype={anchor_dtype} has no complex counterpart; "
            "use anchor_dtype=None, torch.float32 or torch.float64"
        )
    return _COMPLEX_OF[anchor_dtype]


def allocate(param: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Returns uninitialised memory for an anchor with the parameter's shape and strides."""
    device = param.device if device is None else device
    pinned = device.type == "cpu" and param.device.type == "cuda"
    made = torch.empty_like(
        sharding.local(param.detach()),
        dtype=dtype,
        device=device,
        memory_format=torch.preserve_format,
        requires_grad=False,
        pin_memory=pinned,
    )
    return sharding.like(made, param)


def write(target: Tensor, source: Tensor) -> None:
    """Copies a source into the memory of an anchor; of a whole tensor the anchor's shard."""
    if sharding.is_dtensor(target) and not sharding.is_dtensor(source):
        source = sharding.shard_of(source, target)
    elif sharding.is_dtensor(target):
        source = sharding.local(source.redistribute(target.device_mesh, target.placements))
    sharding.local(target).copy_(source)


def check_source(
    source: Tensor, param: Tensor, label: str, dtype: torch.dtype | None = None
) -> None:
    """Checks that ``source`` can become the anchor of ``param``, stored in ``dtype``.

    Raises:
        TypeError: Not a tensor, or not of a floating (for complex parameters: complex) dtype.
        ValueError: Another shape, or values that are not finite, or not in ``dtype``.
    """
    if not isinstance(source, Tensor):
        raise TypeError(
            f"the anchor given for {label} is a {type(source).__name__}, not a tensor; "
            "pass a mapping from names to tensors, such as a state_dict"
        )
    if source.shape != param.shape:
        raise ValueError(
            f"the anchor given for {label} has shape {tuple(source.shape)}, the parameter has "
            f"{tuple(param.shape)}; pass the tensors of the same architecture"
        )
    suitable = source.is_complex() if param.is_complex() else source.dtype in FLOAT_DTYPES
    if not suitable or source.layout != torch.strided:
        raise TypeError(
            f"the anchor given for {label} is {source.dtype} ({source.layout}); pass dense "
            "float32, bfloat16, float16 or float64 (for complex parameters: complex) tensors"
        )
    if source.device.type == "meta":
        raise ValueError(
            f"the anchor of {label} would be taken from the meta device, which holds no values; "
            "materialise the weights first (to_empty and load them)"
        )
    if not finite(source):
        raise ValueError(
            f"the anchor of {label} would not be finite: it holds inf or NaN and would turn every "
            "guided weight into NaN; take the anchor from finite weights"
        )
    if dtype is not None and dtype != source.dtype and not finite(source, dtype.to_real()):
        raise ValueError(
            f"the anchor of {label} would not be finite: {source.dtype} values of it overflow "
            f"{dtype}; pass a wider anchor_dtype (torch.bfloat16 has the range of float32)"
        )


def finite(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Returns whether every element is finite (in ``dtype``), without a full-size temporary."""
    x = sharding.local(x.detach())
    if x.numel() == 0:
        return True
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    low, high = torch.aminmax(x)
    if dtype is not None:
        low, high = low.to(dtype), high.to(dtype)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def names_of_parameters(model: torch.nn.Module) -> dict[Tensor, list[str]]:
    """Returns all names of every parameter of ``model``, tied ones under each of their names.

    Besides the plain names: names without the prefixes that wrappers add (``module.``,
    ``_orig_mod.``), and without peft's adapter name, as adapter checkpoints are written.
    """
    adapters = list(getattr(model, "peft_config", None) or ())
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        variants = [name]
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        variants.append(plain)
        for adapter in adapters:
            variants.append(plain.replace(f".{adapter}.", ".").removesuffix(f".{adapter}"))
        seen = names.setdefault(param, [])
        seen.extend(v for v in variants if v not in seen)
    return names


def match_named(
    tensors: Mapping[str, Tensor],
    params: Sequence[Tensor],
    names: Sequence[Sequence[str]],
    labels: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Finds the source of every parameter's anchor by name, and checks it.

    Args:
        tensors: Named tensors: a model's or an adapter's state dict. Names of parameters that
            the optimizer does not hold (frozen ones, buffers) are left alone.
        params: The parameters to be anchored.
        names: For each parameter the names it may have in ``tensors``.
        labels: For each parameter how errors call it.
        dtypes: For each parameter the storage dtype of its anchor.

    Returns:
        One source per parameter.

    Raises:
        KeyError: A parameter has no tensor.
        TypeError: A tensor's type does not fit.
        ValueError: A tensor's shape or values do not fit.
    """
    sources, missing = [], []
    for param, candidates, label, dtype in zip(params, names, labels, dtypes, strict=True):
        found = next((name for name in candidates if name in tensors), None)
        if found is None:
            missing.append(label)
            continue
        check_source(tensors[found], param, label, dtype)
        sources.append(tensors[found])
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        have = ", ".join(map(str, list(tensors)[:3])) or "nothing"
        raise KeyError(
            f"no tensor for {len(missing)} of {len(params)} trainable parameters: {shown}; the "
            f"names given start with: {have}. Pass the state dict of the same model or adapter, "
            "or freeze (requires_grad_(False)) what has no anchor"
        )
    return sources
