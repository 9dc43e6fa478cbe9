# SPDX-License-Identifier: BSD-3-Clause
"""The dgg optimizer inside the wrappers of frameworks."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch

from dgg._signatures import listed
from dgg.optim.guidance import GUIDED, Guidance
from dgg.optim.guided import Guided

# Attributes in which frameworks keep the optimizer that they wrap.
_ATTRIBUTES = ("optimizer", "_optimizer", "basic_optimizer", "optim")

_Optimizer = TypeVar("_Optimizer", bound=Guided)


@overload
def unwrap(optimizer: _Optimizer) -> _Optimizer: ...
@overload
def unwrap(optimizer: object) -> Guided: ...
@listed
def unwrap(optimizer: object) -> Guided:
    """Returns the dgg optimizer inside wrappers.

    Args:
        optimizer: A dgg optimizer, or accelerate's, DeepSpeed's, Lightning's or Megatron's wrapper
            around one, or a ZeroRedundancyOptimizer (its local optimizer), nested to any depth.

    Raises:
        TypeError: There is no dgg optimizer inside.
    """
    found = find(optimizer)
    if isinstance(found, Guidance):
        raise TypeError(
            f"{type(found.optimizer).__name__} is no dgg optimizer but guided by a dgg.Guidance: "
            "call the methods of that"
        )
    return found


def find(optimizer: object) -> Guided | Guidance:
    """Returns the dgg optimizer inside wrappers, or the guidance of another optimizer there."""
    types: list[str] = []
    inner: Any = optimizer
    while inner is not None and len(types) < 16:
        # Lightning's and Fabric's wrappers imitate the class of the optimizer inside them.
        imitated = vars(inner).get("_optimizer") if isinstance(inner, Guided) else None
        if isinstance(inner, Guided) and not isinstance(imitated, Guided):
            return inner
        guidance = vars(inner).get(GUIDED) if isinstance(inner, torch.optim.Optimizer) else None
        if isinstance(guidance, Guidance):
            return guidance
        types.append(type(inner).__name__)
        if imitated is None:
            attributes = [getattr(inner, name, None) for name in _ATTRIBUTES]
            inner = next((x for x in attributes if x is not None), None)
        else:
            inner = imitated
    raise TypeError(
        f"no dgg optimizer inside {' > '.join(types)}: pass dgg.AdamW, dgg.Adam or dgg.SGD to the "
        "framework (Trainer: optimizer_cls_and_kwargs=(dgg.AdamW, {...}))"
    )
