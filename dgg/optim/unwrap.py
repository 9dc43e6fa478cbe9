# SPDX-License-Identifier: BSD-3-Clause
"""The dgg optimizer inside the wrappers of frameworks."""

from __future__ import annotations

from typing import Any

from dgg.optim.guided import Guided


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
        # Lightning's and Fabric's wrappers imitate the class of what they wrap.
        inside = vars(inner).get("_optimizer") if isinstance(inner, Guided) else None
        if isinstance(inner, Guided) and not isinstance(inside, Guided):
            return inner
        seen.append(type(inner).__name__)
        inner = (
            inside
            if inside is not None
            else next(
                (
                    found
                    for name in ("optimizer", "_optimizer", "basic_optimizer", "optim")
                    if (found := getattr(inner, name, None)) is not None
                ),
                None,
            )
        )
    raise TypeError(
        f"no dgg optimizer inside {' > '.join(seen)}: pass dgg.AdamW, dgg.Adam or dgg.SGD to the "
        "framework (Trainer: optimizer_cls_and_kwargs=(dgg.AdamW, {...}))"
    )
