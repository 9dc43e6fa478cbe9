# SPDX-License-Identifier: BSD-3-Clause
r"""The update in plain PyTorch: specification, fallback and oracle in one.

Equations, numbered as in the README (θ parameter, g gradient, r replay gradient, θ* anchor):

    (1)  h = g + w r
    (2)  c = min(1, max_grad_norm / (‖h‖ + 1e-6)),  1 without clipping
    (3)  d = θ - θ*
    (4)  s = strength · min(1, c ‖g‖ / ‖d‖),  0 when ‖g‖ or ‖d‖ is 0 or not finite;
         strength without scaling
    (5)  G = c h + b s d,  b ~ Bernoulli(α)
    (6)  Adam, AdamW or SGD applied to G

Every backend computes these and nothing else, has these functions' signatures, and is tested
against them. Arithmetic is float32 whatever the storage type (float64 parameters: float64);
tensors promoted to float64 therefore make this file the oracle. A ``None`` in a list means
absent; a row with neither grad nor replay is untouched and counts in no norm.

Li et al., "Multimodal Continual Instruction Tuning with Dynamic Gradient Guidance",
arXiv 2511.15164.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dgg import _philox

# Storage dtypes of parameters, gradients, moments and anchors; complex ones come as real views.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What a row of `flags` may ask for.
INJECT = 1
INJECT_ELEMENTS = 2
FIRST_STEP = 4

# Which squares `norms` is to compute.
NORM_TOTAL = 1
NORM_GRAD = 2
NORM_DISTANCE = 4

# Rows of the result of `coefficients` before the scales.
CLIP, GRAD_NORM, DISTANCE, TOTAL_NORM, SCALES = 0, 1, 2, 3, 4

TensorList = Sequence[Tensor | None]


def compute_dtype(param: Tensor) -> torch.dtype:
    """Returns the arithmetic's dtype: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def gradients(
    grad: Tensor | None,
    replay: Tensor | None,
    dtype: torch.dtype,
    *,
    replay_weight: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Returns (h, g) of equation (1) in ``dtype``, unscaled; g is None if there is no grad."""
    g = None
    if grad is not None:
        g = grad.to(dtype)
        if grad_scale != 1.0:
            g = g / grad_scale
    if replay is None:
        return g, g
    r = replay.to(dtype) * replay_weight
    if grad_scale != 1.0:
        r = r / grad_scale
    return (r if g is None else g + r), g


def norms(
    params: TensorList,
    grads: TensorList,
    replays: TensorList,
    anchors: TensorList,
    distances: Tensor,
    *,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    which: int = NORM_TOTAL | NORM_GRAD | NORM_DISTANCE,
) -> Tensor:
    """Sums the squares that equations (2) and (4) need, one partial per tensor.

    Args:
        params: Parameters θ, any floating dtype.
        grads: Gradients g or None.
        replays: Replay gradients r or None; an empty list means none at all.
        anchors: Anchors θ* or None.
        distances: float64 [n]; a value that is not negative is the known ‖θ - θ*‖² of its row
            and is not computed again; computed ones are stored. Modified in place.
        replay_weight: w of equation (1).
        grad_scale: Divisor of the gradients (``GradScaler``).
        which: Bits NORM_TOTAL, NORM_GRAD, NORM_DISTANCE.

    Returns:
        float64 [3, n]: ‖h‖² of every row with a gradient; ‖g‖² and ‖d‖² of those with an anchor.
    """
    squares = torch.zeros(3, len(params), dtype=torch.float64, device=distances.device)
    for row, (param, grad, anchor) in enumerate(zip(params, grads, anchors, strict=True)):
        replay = _entry(replays, row)
        if grad is None and replay is None:
            continue
        dtype = compute_dtype(param)
        h, g = gradients(grad, replay, dtype, replay_weight=replay_weight, grad_scale=grad_scale)
        if which & NORM_TOTAL:
            squares[0, row] = _square_sum(h)
        if anchor is None:
            continue
        if which & NORM_GRAD and g is not None:
            squares[1, row] = _square_sum(g)
        if which & NORM_DISTANCE:
            if distances[row] < 0:
                distances[row] = distance(param, anchor)
            squares[2, row] = distances[row]
    return squares


def distance(param: Tensor, anchor: Tensor) -> Tensor:
    """Returns ‖θ - θ*‖² as a float64 scalar tensor."""
    dtype = compute_dtype(param)
    return _square_sum(param.to(dtype) - anchor.to(param.device, dtype))


def _square_sum(x: Tensor) -> Tensor:
    # A float64 copy of one tensor: this backend trades speed for certainty.
    return x.double().square().sum()


def coefficients(
    squares: Tensor, *, max_grad_norm: float | None, scaling: bool, per_tensor: bool
) -> Tensor:
    """Turns squares into c and s, on the device, without synchronisation.

    Args:
        squares: float64 [3, n] from `norms`, summed over the shards where there are any.
        max_grad_norm: Bound of equation (2), or None.
        scaling: False gives s = 1 (times strength), the paper's ablation.
        per_tensor: Norms of equation (4) per tensor instead of over all of them.

    Returns:
        float64 [4 + n]: c, ‖g‖, ‖d‖, ‖h‖, then s / strength of every row.
    """
    total, grad, dist = squares.sum(dim=1).sqrt().unbind()
    clip = scale = torch.ones_like(total)
    if max_grad_norm is not None:
        clip = torch.clamp(max_grad_norm / (total + 1e-6), max=1.0)
    if scaling:
        g, d = (squares[1].sqrt(), squares[2].sqrt()) if per_tensor else (grad, dist)
        # clamp keeps NaN; 0/0 is decided here because minimum, fmin and Triton disagree on it.
        scale = torch.clamp(clip * g / d, max=1.0)
        # Nor is there a direction in what is not finite: a NaN would go into all weights.
        usable = (g != 0) & (d != 0) & g.isfinite() & d.isfinite()
        scale = torch.where(usable, scale, torch.zeros_like(scale))
    return torch.cat([torch.stack([clip, grad, dist, total]), scale.expand(squares.shape[1])])


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
    if difference is not None:
        guided = total + difference * scale.to(h.dtype)
        # Selected, not multiplied away: nothing times an infinite difference would be NaN.
        total = torch.where((scale == 0).to(total.device), total, guided)
    return total


def adam_(
    params: TensorList,
    grads: TensorList,
    replays: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    max_exp_avg_sqs: TensorList,
    anchors: TensorList,
    steps: TensorList,
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
        distances: float64 [n], ‖θ_new - θ*‖² of the rows written if ``look_ahead``, else -1.
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
        seed: Seed of the draws.
        draw: Draw index k.
    """
    for row, total in _total_gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=maximize,
        strength=strength, threshold=threshold, replay_weight=replay_weight,
        grad_scale=grad_scale, seed=seed, draw=draw,
    ):  # fmt: skip
        param = params[row]
        dtype = total.dtype
        steps[row] += 1
        step = steps[row].item()
        theta = param.to(dtype)
        if decoupled:
            theta = theta * (1 - lr * weight_decay)
        elif weight_decay != 0:
            total = total + weight_decay * theta
        exp_avg = torch.lerp(exp_avgs[row].to(dtype), total, 1 - beta1)
        exp_avg_sq = exp_avg_sqs[row].to(dtype) * beta2 + (1 - beta2) * total * total
        exp_avgs[row].copy_(exp_avg)
        exp_avg_sqs[row].copy_(exp_avg_sq)
        largest = exp_avg_sq
        if amsgrad:
            largest = torch.maximum(max_exp_avg_sqs[row].to(dtype), exp_avg_sq)
            max_exp_avg_sqs[row].copy_(largest)
        denom = largest.sqrt() / (1 - beta2**step) ** 0.5 + eps
        updated = theta - (lr / (1 - beta1**step)) * exp_avg / denom
        store(
            updated, param, _entry(copies, row), indices[row], stochastic=stochastic, seed=seed,
            draw=draw, place=_entry(places, row),
        )  # fmt: skip
        _look_ahead(row, param, anchors[row], distances, look_ahead)


def sgd_(
    params: TensorList,
    grads: TensorList,
    replays: TensorList,
    momentum_buffers: TensorList,
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
        seed: Seed of the draws.
        draw: Draw index k.
    """
    for row, total in _total_gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=maximize,
        strength=strength, threshold=threshold, replay_weight=replay_weight,
        grad_scale=grad_scale, seed=seed, draw=draw,
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
        store(
            theta - lr * total, param, _entry(copies, row), indices[row], stochastic=stochastic,
            seed=seed, draw=draw, place=_entry(places, row),
        )  # fmt: skip
        _look_ahead(row, param, anchors[row], distances, look_ahead)


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
    params: TensorList,
    grads: TensorList,
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
        seed: Seed of the draws.
        draw: Draw index k.
        places: As in `adam_`.
    """
    for row, total in _total_gradients(
        params, grads, replays, anchors, coefficients, flags, indices, places, maximize=False,
        strength=-strength if maximize else strength, threshold=threshold,
        replay_weight=replay_weight, grad_scale=grad_scale, seed=seed, draw=draw,
    ):  # fmt: skip
        grads[row].copy_(total)


def _total_gradients(
    params, grads, replays, anchors, coefficients, flags, indices, places, *,
    maximize, strength, threshold, replay_weight, grad_scale, seed, draw,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Yields the number and G of every row that has a gradient, each when it is asked for."""
    for row, param in enumerate(params):
        grad, replay, anchor = grads[row], _entry(replays, row), anchors[row]
        if grad is None and replay is None:
            continue
        dtype = compute_dtype(param)
        h, _ = gradients(grad, replay, dtype, replay_weight=replay_weight, grad_scale=grad_scale)
        difference = None
        inject = int(flags[row]) & (INJECT | INJECT_ELEMENTS)
        if anchor is not None and inject:
            difference = param.to(h.dtype) - anchor.to(param.device, h.dtype)
            if inject & INJECT_ELEMENTS:
                elements = _elements(param, _entry(places, row))
                words = _philox.element_words(seed, draw, indices[row], elements)
                zeros = torch.zeros_like(difference)
                difference = torch.where(words < threshold, difference, zeros)
        scale = strength * coefficients[SCALES + row]
        yield row, guided_gradient(h, difference, coefficients[CLIP], scale, maximize)


def _entry(entries, row):
    """Returns the entry of a row; None if the list is empty, which means that no row has one."""
    return entries[row] if len(entries) else None


def _elements(x: Tensor, place: tuple[int, int, int] | None) -> Tensor:
    """Returns the row-major indices of x's elements in the unsharded parameter."""
    elements = torch.arange(x.numel(), device=x.device).view(x.shape)
    if place is None:
        return elements
    base, stretch, stride = place
    return base + elements // stretch * stride + elements % stretch


def _look_ahead(row, param, anchor, distances, look_ahead) -> None:
    distances[row] = distance(param, anchor) if look_ahead and anchor is not None else -1.0
