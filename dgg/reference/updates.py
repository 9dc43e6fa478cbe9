# SPDX-License-Identifier: BSD-3-Clause
"""The updates of equations (5) and (6): Adam, AdamW, SGD and the gradient edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _philox
from dgg.reference.measures import (
    CLIP,
    SCALES,
    StateList,
    TensorList,
    compute_dtype,
    distance,
    entry,
    gradients,
    weighted_difference,
)

# What a row of `flags` may ask for.
INJECT = 1
INJECT_ELEMENTS = 2
FIRST_STEP = 4

# Where the pull of equation (5) enters.
ROUTES = ("gradient", "first_moment", "decoupled")


def adopted(master: Tensor, copy: Tensor) -> Tensor:
    """Returns the master weight that goes with the low-precision parameter that the model sees.

    Where the parameter is still the rounded master, the master stays. Where somebody has written
    another value into the parameter (in place, through ``.data``, by loading), the master is that.
    """
    return torch.where(master.to(copy.dtype) == copy, master, copy.to(master.dtype))


def guided_gradient(
    h: Tensor, difference: Tensor | None, clip: Tensor, scale: Tensor | None, maximize: bool
) -> Tensor:
    """Returns G of equation (5); ``maximize`` negates h, never the pull towards the anchor."""
    total = h * clip.to(h.dtype)
    if maximize:
        total = -total
    if difference is not None and scale is not None:
        guided = total + difference * scale.to(h.dtype)
        # Selected, not multiplied away: nothing times an infinite difference would be NaN.
        total = torch.where(scale.eq(0).to(total.device), total, guided)
    return total


def adam_(
    params: Sequence[Tensor],
    grads: TensorList,
    replays: TensorList,
    exp_avgs: StateList,
    exp_avg_sqs: StateList,
    max_exp_avg_sqs: StateList,
    anchors: TensorList,
    steps: list[Any],
    distances: Tensor,
    coefficients: Tensor,
    flags: Tensor,
    indices: Sequence[int],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    strength: float,
    threshold: int,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    look_ahead: bool = False,
    copies: TensorList = (),
    stochastic: bool = False,
    places: Sequence[tuple[int, int, int]] = (),
    importances: TensorList = (),
    importance: float = 0.0,
    route: str = "gradient",
    seed: int = 0,
    draw: int = 0,
) -> None:
    """Adam and AdamW on G, as ``torch.optim`` defines them; lists are modified in place.

    Args:
        params: θ, modified in place.
        grads: g or None.
        replays: r or None; may be empty.
        exp_avgs: First moments, modified in place.
        exp_avg_sqs: Second moments, modified in place.
        max_exp_avg_sqs: Largest second moments (amsgrad), modified in place; else None.
        anchors: θ* or None.
        steps: float32 scalars, incremented for every row with a gradient.
        distances: float64 [n], ‖u‖² after the update of the rows written if ``look_ahead``, else
            -1.
        coefficients: float64 [4 + n] from `coefficients`.
        flags: uint8 [n], bits INJECT and INJECT_ELEMENTS.
        indices: Tensor indices j, for element draws.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: λ; decoupled (AdamW) or added to G (Adam).
        decoupled: True for AdamW.
        amsgrad: Divide by the largest second moment so far.
        maximize: Negate h.
        strength: Factor of s.
        threshold: floor(α 2**32), compared with the words of element draws.
        replay_weight: w.
        grad_scale: Divisor of the gradients.
        look_ahead: Also measure the distance after the update.
        copies: With master weights (``params``) the parameters that the model computes with,
            which every update is written to as well; else None; may be empty.
        stochastic: Round what is stored as bfloat16 stochastically; see `store`.
        places: (base, stretch, stride) of every row that is a shard: its element l is element
            base + (l // stretch) · stride + l % stretch of the whole parameter. Empty: all are
            whole.
        importances: F or None; an empty list means none at all.
        importance: i of equation (3).
        route: Where the pull enters; one of ROUTES.
        seed: Seed of the draws.
        draw: Draw index k.
    """
    for row, guided, real, pull in _gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=maximize,
        strength=strength, threshold=threshold, replay_weight=replay_weight,
        grad_scale=grad_scale, importances=importances, importance=importance, route=route,
        seed=seed, draw=draw,
    ):  # fmt: skip
        param = params[row]
        dtype = guided.dtype
        squared = real if route == "first_moment" else guided
        steps[row] += 1
        step = steps[row].item()
        theta = param.to(dtype)
        if decoupled:
            theta = theta * (1 - lr * weight_decay)
        elif weight_decay != 0:
            guided, squared = guided + weight_decay * theta, squared + weight_decay * theta
        if pull is not None:
            theta = theta - lr * pull
        exp_avg = torch.lerp(exp_avgs[row].to(dtype), guided, 1 - beta1)
        exp_avg_sq = exp_avg_sqs[row].to(dtype) * beta2 + (1 - beta2) * squared * squared
        exp_avgs[row].copy_(exp_avg)
        exp_avg_sqs[row].copy_(exp_avg_sq)
        largest = exp_avg_sq
        if amsgrad:
            largest = torch.maximum(max_exp_avg_sqs[row].to(dtype), exp_avg_sq)
            max_exp_avg_sqs[row].copy_(largest)
        denom = largest.sqrt() / (1 - beta2**step) ** 0.5 + eps
        updated = theta - (lr / (1 - beta1**step)) * exp_avg / denom
        store(
            updated, param, entry(copies, row), indices[row], stochastic=stochastic, seed=seed,
            draw=draw, place=entry(places, row),
        )  # fmt: skip
        distances[row] = -1.0
        anchor = anchors[row]
        if look_ahead and anchor is not None:
            distances[row] = distance(param, anchor, entry(importances, row), importance)


def sgd_(
    params: Sequence[Tensor],
    grads: TensorList,
    replays: TensorList,
    momentum_buffers: StateList,
    anchors: TensorList,
    distances: Tensor,
    coefficients: Tensor,
    flags: Tensor,
    indices: Sequence[int],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    strength: float,
    threshold: int,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    look_ahead: bool = False,
    copies: TensorList = (),
    stochastic: bool = False,
    places: Sequence[tuple[int, int, int]] = (),
    importances: TensorList = (),
    importance: float = 0.0,
    route: str = "gradient",
    seed: int = 0,
    draw: int = 0,
) -> None:
    """SGD on G, as ``torch.optim`` defines it; lists are modified in place.

    Args:
        params: θ, modified in place.
        grads: g or None.
        replays: r or None; may be empty.
        momentum_buffers: Buffers, modified in place; None where momentum is 0.
        anchors: θ* or None.
        distances: float64 [n], as in `adam_`.
        coefficients: float64 [4 + n] from `coefficients`.
        flags: uint8 [n], bits INJECT, INJECT_ELEMENTS and FIRST_STEP (the buffer becomes G).
        indices: Tensor indices j, for element draws.
        lr: Learning rate.
        momentum: μ.
        dampening: τ.
        weight_decay: λ, added to G.
        nesterov: Nesterov momentum.
        maximize: Negate h.
        strength: Factor of s.
        threshold: floor(α 2**32), compared with the words of element draws.
        replay_weight: w.
        grad_scale: Divisor of the gradients.
        look_ahead: Also measure the distance after the update.
        copies: As in `adam_`.
        stochastic: Round what is stored as bfloat16 stochastically; see `store`.
        places: As in `adam_`.
        importances: As in `adam_`.
        importance: As in `adam_`.
        route: ``"gradient"`` or ``"decoupled"``; there is no second moment.
        seed: Seed of the draws.
        draw: Draw index k.
    """
    for row, total, _, pull in _gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=maximize,
        strength=strength, threshold=threshold, replay_weight=replay_weight,
        grad_scale=grad_scale, importances=importances, importance=importance, route=route,
        seed=seed, draw=draw,
    ):  # fmt: skip
        param = params[row]
        theta = param.to(total.dtype)
        if weight_decay != 0:
            total = total + weight_decay * theta
        if momentum != 0:
            if flags[row] & FIRST_STEP:
                buffer = total
            else:
                buffer = momentum_buffers[row].to(total.dtype) * momentum + (1 - dampening) * total
            momentum_buffers[row].copy_(buffer)
            total = total + momentum * buffer if nesterov else buffer
        if pull is not None:
            theta = theta - lr * pull
        store(
            theta - lr * total, param, entry(copies, row), indices[row], stochastic=stochastic,
            seed=seed, draw=draw, place=entry(places, row),
        )  # fmt: skip
        distances[row] = -1.0
        anchor = anchors[row]
        if look_ahead and anchor is not None:
            distances[row] = distance(param, anchor, entry(importances, row), importance)


def store(
    value: Tensor,
    param: Tensor,
    copy: Tensor | None,
    index: int,
    *,
    stochastic: bool,
    seed: int,
    draw: int,
    place: tuple[int, int, int] | None = None,
) -> None:
    """Writes an updated parameter, and its low-precision copy if it is a master weight.

    Stochastic rounding adds 16 random bits below the last one that bfloat16 keeps and cuts: in
    the mean the stored value is the exact one, and updates smaller than half a unit in the last
    place are not lost for good. Its words are a stream of their own of the step's Philox draw, so
    they are the same on every backend and for every sharding. inf and NaN stay as they are.

    Args:
        value: θ_new, float32 or float64.
        param: Where it is stored.
        copy: Where it is stored as well, or None.
        index: Tensor index j.
        stochastic: Whether bfloat16 is rounded stochastically.
        seed: Seed of the draws.
        draw: Draw index k.
        place: Where a shard's elements lie, or None.
    """
    for target in (param, copy):
        if target is None:
            continue
        if not stochastic or target.dtype != torch.bfloat16:
            target.copy_(value)
            continue
        elements = _elements(value, place)
        words = _philox.element_words(seed, draw, index, elements, _philox.STREAM_ROUNDING)
        bits = value.float().contiguous().view(torch.int32).to(torch.int64)
        rounded = ((bits & 0xFFFFFFFF) + (words & 0xFFFF)) >> 16 << 16
        rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32)
        cut = torch.where(value.isfinite(), rounded.view(torch.float32), value.float())
        target.copy_(cut)


def guide_(
    params: Sequence[Tensor],
    grads: StateList,
    replays: TensorList,
    anchors: TensorList,
    coefficients: Tensor,
    flags: Tensor,
    indices: Sequence[int],
    *,
    maximize: bool,
    strength: float,
    threshold: int,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    importances: TensorList = (),
    importance: float = 0.0,
    seed: int = 0,
    draw: int = 0,
    places: Sequence[tuple[int, int, int]] = (),
) -> None:
    """Replaces every gradient by G, for an optimizer of someone else's.

    With ``maximize`` the other optimizer negates what it is given, so the pull is negated here
    to point towards the anchor afterwards.

    Args:
        params: θ.
        grads: g or None, modified in place.
        replays: r or None; may be empty.
        anchors: θ* or None.
        coefficients: float64 [4 + n] from `coefficients`.
        flags: uint8 [n], bits INJECT and INJECT_ELEMENTS.
        indices: Tensor indices j, for element draws.
        maximize: The other optimizer maximizes.
        strength: Factor of s.
        threshold: floor(α 2**32), compared with the words of element draws.
        replay_weight: w.
        grad_scale: Divisor of the gradients.
        importances: As in `adam_`.
        importance: As in `adam_`.
        seed: Seed of the draws.
        draw: Draw index k.
        places: As in `adam_`.
    """
    for row, total, _, _ in _gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=False,
        strength=-strength if maximize else strength, threshold=threshold,
        replay_weight=replay_weight, grad_scale=grad_scale, importances=importances,
        importance=importance, route="gradient", seed=seed, draw=draw,
    ):  # fmt: skip
        grads[row].copy_(total)


def _gradients(
    params, grads, replays, anchors, coefficients, flags, indices, places, *,
    maximize, strength, threshold, replay_weight, grad_scale, importances, importance, route,
    seed, draw,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:  # fmt: skip
    """Yields, for every row that has a gradient, its number, G, c h and the decoupled pull.

    With the decoupled route G is c h; with the others the last entry is None. Each row is computed
    when it is asked for.
    """
    for row, param in enumerate(params):
        grad, replay, anchor = grads[row], entry(replays, row), anchors[row]
        if grad is None and replay is None:
            continue
        dtype = compute_dtype(param)
        h, _ = gradients(grad, replay, dtype, replay_weight=replay_weight, grad_scale=grad_scale)
        difference = None
        inject = int(flags[row]) & (INJECT | INJECT_ELEMENTS)
        if anchor is not None and inject:
            difference = weighted_difference(
                param, anchor, entry(importances, row), importance, h.dtype
            )
            if inject & INJECT_ELEMENTS:
                elements = _elements(param, entry(places, row))
                words = _philox.element_words(seed, draw, indices[row], elements)
                zeros = torch.zeros_like(difference)
                difference = torch.where(words < threshold, difference, zeros)
        scale = strength * coefficients[SCALES + row]
        total = real = guided_gradient(h, None, coefficients[CLIP], None, maximize)
        pull = None
        if route != "decoupled":
            total = guided_gradient(h, difference, coefficients[CLIP], scale, maximize)
        elif difference is not None and scale:
            pull = difference * scale.to(h.dtype)
        yield row, total, real, pull


def _elements(x: Tensor, place: tuple[int, int, int] | None) -> Tensor:
    """Returns the row-major indices of x's elements in the unsharded parameter."""
    elements = torch.arange(x.numel(), device=x.device).view(x.shape)
    if place is None:
        return elements
    base, stretch, stride = place
    return base + elements // stretch * stride + elements % stretch
