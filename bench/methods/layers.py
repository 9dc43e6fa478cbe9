# SPDX-License-Identifier: BSD-3-Clause
"""The linear layers that train, what goes into them, and the directions it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """A linear layer of which the weight trains; `bias` is its name only if it trains too."""

    module: nn.Linear
    weight: str
    bias: str | None


def trained_linears(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, Layer]:
    """Returns the linear layers whose weight is one of these parameters, by name.

    The two factors of a LoRA adapter are such layers. Convolutions are not: nothing here has any.
    """
    name_of = {id(p): name for name, p in named.items()}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in name_of:
            bias = name_of.get(id(module.bias)) if module.bias is not None else None
            found[name] = Layer(module, name_of[id(module.weight)], bias)
    return found


@torch.no_grad()
def input_moments(
    layers: dict[str, Layer],
    logits_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    samples: int | None,
) -> dict[str, Tensor]:
    """Returns R Rᵀ for every layer, R (in × n) being all its inputs, in float64.

    Args:
        layers: As `trained_linears` returns them.
        logits_of: Runs the model; it must call the layers, or nothing can be seen of them.
        batches: The data.
        samples: So many items, in whole batches; None: all. A token of an item is an input too.
    """
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + x.T @ x

        return hook

    handles = [
        layer.module.register_forward_pre_hook(watch(name)) for name, layer in layers.items()
    ]
    try:
        items = 0
        for batch in batches:
            if samples is not None and items >= samples:
                break
            items += len(logits_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    missing = layers.keys() - moments.keys()
    if missing:
        raise RuntimeError(f"logits_of did not call {min(missing)}: its inputs cannot be seen")
    return {name: moments[name] for name in layers}


def principal(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Returns squared singular values, largest first, and left vectors of R, from R Rᵀ."""
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def count_for(squares: Tensor, energy: float, total: float, already: float = 0.0) -> int:
    """Returns how many squared singular values, with what is there already, reach this energy."""
    have = already + squares.cumsum(0)
    wanted = energy * total
    if already >= wanted or total <= 0:
        return 0
    # Rounding may leave the sum of all of them just short of an energy of 1. Directions with
    # nothing in them are never counted.
    real = int((squares > 1e-12 * total).sum())
    return min(int((have < wanted).sum()) + 1, real)
