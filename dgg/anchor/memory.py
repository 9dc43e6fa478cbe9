# SPDX-License-Identifier: BSD-3-Clause
"""Memory of anchors θ*: allocating, writing and checking them.

Nothing here changes an optimizer; every check runs before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgg import backends, sharding
from dgg.reference import FLOAT_DTYPES

_COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Part(NamedTuple):
    """The source of one anchor in a file (if sharded: of this rank's part), not read yet.

    Attributes:
        stored: The file, a `sources.Stored`.
        name: Name of the tensor in it.
        param: The parameter.
        shape: Shape of the stored tensor.
        dtype: Its dtype.
        layout: Its layout.
    """

    stored: Any
    name: str
    param: Tensor
    shape: tuple[int, ...]
    dtype: Any
    layout: torch.layout = torch.strided

    def read(self) -> Tensor:
        """Returns the values as a plain tensor on the CPU, good until the files are closed."""
        # Readers make tensors on the default device.
        with torch.device("cpu"):
            return self.stored.read(self.name, self.param)


def storage_dtype(param: Tensor, anchor_dtype: torch.dtype | None, label: str) -> torch.dtype:
    """Returns the dtype an anchor of ``param`` is stored in; None means the parameter's own."""
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


def is_alias(x: Tensor, y: Tensor) -> bool:
    """Returns whether two tensors (of DTensors their shards) begin at the same memory."""
    x, y = sharding.local(x), sharding.local(y)
    if sharding.keeps_values_elsewhere(x) or sharding.keeps_values_elsewhere(y):
        return False
    return x.device == y.device and x.data_ptr() == y.data_ptr() != 0


def allocate(param: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Returns uninitialised memory for an anchor with the parameter's shape and strides."""
    device = param.device if device is None else device
    pinned = device.type == "cpu" and param.device.type == "cuda"
    with torch.inference_mode(False):  # no later step could write a tensor made in inference mode
        shard = torch.empty_like(
            sharding.local(param.detach()), dtype=dtype, device=device, requires_grad=False,
            memory_format=torch.preserve_format, pin_memory=pinned,
        )  # fmt: skip
    return sharding.like(shard, param)


def allocate_all(
    params: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> list[Tensor]:
    """Does what `allocate` does for every parameter; pinned anchors lie side by side."""
    on_host = device is not None and device.type == "cpu"
    numbers = [i for i, p in enumerate(params) if on_host and p.device.type == "cuda"]
    shards = [sharding.local(params[i].detach()) for i in numbers]
    with torch.inference_mode(False):
        pinned = backends.side_by_side(shards, [dtypes[i] for i in numbers])
    pinned_of = dict(zip(numbers, pinned, strict=True))
    return [
        sharding.like(pinned_of[i], p) if i in pinned_of else allocate(p, dtype, device)
        for i, (p, dtype) in enumerate(zip(params, dtypes, strict=True))
    ]


def memory_for(
    params: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device | None,
    former: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """Returns the memory of every parameter's next anchor: the former one's if it fits, or new."""
    memory: dict[Tensor, Tensor] = {}
    for p, dtype, old in zip(params, dtypes, former, strict=True):
        if old is not None and old.dtype == dtype and old.shape == p.shape:
            memory[p] = old
    dtype_of = {p: dtype for p, dtype in zip(params, dtypes, strict=True) if p not in memory}
    fresh = allocate_all([*dtype_of], [*dtype_of.values()], device)
    memory |= dict(zip(dtype_of, fresh, strict=True))
    return [memory[p] for p in params]


def resolved(x: Any) -> Any:
    """Returns a tensor without lazy negation or conjugation; anything else as it is.

    torch's copies between a lazily negated tensor and another dtype have the wrong sign.
    """
    if isinstance(x, Tensor) and x.layout == torch.strided and (x.is_neg() or x.is_conj()):
        return x.resolve_conj().resolve_neg()
    return x


def write(target: Tensor, source: Tensor | Part | None) -> None:
    """Copies a source into the memory of an anchor; None if the values are there already.

    Of a whole tensor the anchor's shard is copied.
    """
    if source is None:
        return
    if isinstance(source, Part):
        sharding.local(target).copy_(source.read())
        return
    values = resolved(source)
    if sharding.is_dtensor(target) and not sharding.is_dtensor(values):
        values = sharding.shard_of(values, target)
    elif sharding.is_dtensor(target):
        values = sharding.local(values.redistribute(target.device_mesh, target.placements))
    sharding.local(target).copy_(values)


def check_source(
    source: Tensor | Part, param: Tensor, label: str, dtype: torch.dtype | None = None,
    what: str = "anchor",
) -> None:  # fmt: skip
    """Checks that ``source`` can become the anchor of ``param`` (or ``what``), in ``dtype``.

    Of a source in a file only shape and dtype are checked: `check_values` checks the rest later.

    Raises:
        TypeError: Not a tensor, or not of a floating (for complex parameters: complex) dtype.
        ValueError: Another shape, or values that are not finite, or not in ``dtype``.
    """
    if not isinstance(source, (Tensor, Part)):
        raise TypeError(
            f"the {what} given for {label} is a {type(source).__name__}, not a tensor; "
            "pass a mapping from names to tensors, such as a state_dict"
        )
    if tuple(source.shape) != tuple(param.shape):
        raise ValueError(
            f"the {what} given for {label} has shape {tuple(source.shape)}, the parameter has "
            f"{tuple(param.shape)}; pass the tensors of the same architecture"
        )
    known = isinstance(source.dtype, torch.dtype)  # a file may hold what torch has no name for
    suitable = known and (
        source.dtype.is_complex if param.is_complex() else source.dtype in FLOAT_DTYPES
    )
    if not suitable or source.layout != torch.strided:
        raise TypeError(
            f"the {what} given for {label} is {source.dtype} ({source.layout}); pass dense "
            "float32, bfloat16, float16 or float64 (for complex parameters: complex) tensors"
        )
    if isinstance(source, Part):
        return
    if source.device.type == "meta":
        raise ValueError(
            f"the {what} of {label} would be taken from the meta device, which holds no values; "
            "materialise the weights first (to_empty and load them)"
        )
    check_values(source, label, dtype, what)


def check_values(
    source: Tensor, label: str, dtype: torch.dtype | None = None, what: str = "anchor"
) -> None:
    """Raises a ValueError unless all values are finite, in ``dtype`` too."""
    if not finite(source):
        raise ValueError(
            f"the {what} of {label} would not be finite: it holds inf or NaN and would turn every "
            f"guided weight into NaN; take the {what} from finite weights"
        )
    if dtype is not None and dtype != source.dtype and not finite(source, dtype.to_real()):
        raise ValueError(
            f"the {what} of {label} would not be finite: {source.dtype} values of it overflow "
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
