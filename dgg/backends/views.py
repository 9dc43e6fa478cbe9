# SPDX-License-Identifier: BSD-3-Clause
"""Tensors as the kernels see them: local, real, nothing lazy, in an order of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgg import sharding


def real_view(x: Tensor) -> Tensor:
    """Returns a complex tensor as its real view, any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def real_views(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns the local shards of tensors as the kernels see them; None stays None."""
    return [
        None if x is None else real_view(sharding.local(x.detach()).resolve_conj()) for x in tensors
    ]


def resolved(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns gradients as the kernels see them: real, without lazy conjugation or negation."""
    return [None if x is None else x.resolve_neg() for x in real_views(grads)]


def is_dense(x: Tensor) -> bool:
    """Returns whether the tensor's memory has neither gaps nor overlaps."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(x: Tensor, y: Tensor) -> bool:
    """Returns whether two dense tensors of one shape store their elements in the same order."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


def give_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies back into the gradients: pairs of gradient and edited copy."""
    for grad, copy in copies:
        value = torch.view_as_complex(copy) if grad.is_complex() else copy
        # First cast: torch's copy to a lazily negated tensor of another dtype has the wrong sign.
        grad.copy_(value.to(grad.dtype))
