# SPDX-License-Identifier: BSD-3-Clause
"""The sums over all parameters that a step needs, and what follows from them: c, s and a."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Storage dtypes of parameters, gradients, moments and anchors; complex ones come as real views.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Which squares `norms` is to compute.
NORM_TOTAL = 1
NORM_GRAD = 2
NORM_DISTANCE = 4

# Places in the result of `coefficients` before the scales.
CLIP, GRAD_NORM, DISTANCE, TOTAL_NORM, SCALES = 0, 1, 2, 3, 4

# Rows of the result of `products`: ‖h‖² of all tensors, then of the guided ones ‖h‖², ‖u‖², ‖r‖²,
# ⟨h, r⟩ and ⟨u, r⟩.
TOTAL, GUIDED, PULL, REPLAY, H_DOT_R, U_DOT_R = range(6)
PRODUCTS = 6
# Numbers behind the scales in the result of `guard_coefficients`.
GUARD_EXTRAS = 2

TensorList = Sequence[Tensor | None]
# Lists with a tensor in every row that uses it, which no type can say.
StateList = Sequence[Any]


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
        assert g is not None, "a row with neither gradient is left alone"
        return g, g
    r = replay.to(dtype) * replay_weight
    if grad_scale != 1.0:
        r = r / grad_scale
    return (r if g is None else g + r), g


def weighted_difference(
    param: Tensor, anchor: Tensor, importance: Tensor | None, weight: float, dtype: torch.dtype
) -> Tensor:
    """Returns u of equation (3) in ``dtype``.

    Args:
        param: θ.
        anchor: θ*.
        importance: F, or None for a pull along θ - θ* itself.
        weight: The option ``importance``, i of the equation.
        dtype: Of the arithmetic.
    """
    difference = param.to(dtype) - anchor.to(param.device, dtype)
    if importance is None:
        return difference
    return difference * ((1 - weight) + weight * importance.to(param.device, dtype))


def norms(
    params: Sequence[Tensor],
    grads: TensorList,
    replays: TensorList,
    anchors: TensorList,
    distances: Tensor,
    *,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    which: int = NORM_TOTAL | NORM_GRAD | NORM_DISTANCE,
    importances: TensorList = (),
    importance: float = 0.0,
) -> Tensor:
    """Sums the squares that equations (2) and (4) need, one partial per tensor.

    Args:
        params: Parameters θ, any floating dtype.
        grads: Gradients g or None.
        replays: Replay gradients r or None; an empty list means none at all.
        anchors: Anchors θ* or None.
        distances: float64 [n]; a value that is not negative is the known ‖u‖² of its row
            and is not computed again; computed ones are stored. Modified in place.
        replay_weight: w of equation (1).
        grad_scale: Divisor of the gradients (``GradScaler``).
        which: Bits NORM_TOTAL, NORM_GRAD, NORM_DISTANCE.
        importances: F or None; an empty list means none at all.
        importance: i of equation (3).

    Returns:
        float64 [3, n]: ‖h‖² of every row with a gradient; ‖g‖² and ‖u‖² of those with an anchor.
    """
    squares = torch.zeros(3, len(params), dtype=torch.float64, device=distances.device)
    for row, (param, grad, anchor) in enumerate(zip(params, grads, anchors, strict=True)):
        replay = entry(replays, row)
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
                distances[row] = distance(param, anchor, entry(importances, row), importance)
            squares[2, row] = distances[row]
    return squares


def distance(
    param: Tensor, anchor: Tensor, importance: Tensor | None = None, weight: float = 0.0
) -> Tensor:
    """Returns ‖u‖² as a float64 scalar tensor; see `weighted_difference`."""
    dtype = compute_dtype(param)
    return _square_sum(weighted_difference(param, anchor, importance, weight, dtype))


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
        float64 [4 + n]: c, ‖g‖, ‖u‖, ‖h‖, then s / strength of every row.
    """
    total, grad, dist = squares.sum(dim=1).sqrt().unbind()
    clip = _clip(total, max_grad_norm)
    scale = torch.ones_like(total)
    if scaling:
        g, d = (squares[1].sqrt(), squares[2].sqrt()) if per_tensor else (grad, dist)
        # clamp keeps NaN; 0/0 is decided here because minimum, fmin and Triton disagree on it.
        scale = torch.clamp(clip * g / d, max=1.0)
        # Nor is there a direction in what is not finite: a NaN would go into all weights.
        usable = (g != 0) & (d != 0) & g.isfinite() & d.isfinite()
        scale = torch.where(usable, scale, torch.zeros_like(scale))
    return torch.cat([torch.stack([clip, grad, dist, total]), scale.expand(squares.shape[1])])


def _clip(total: Tensor, max_grad_norm: float | None) -> Tensor:
    """Returns c of equation (2)."""
    if max_grad_norm is None:
        return torch.ones_like(total)
    return torch.clamp(max_grad_norm / (total + 1e-6), max=1.0)


def products(
    params: Sequence[Tensor],
    grads: TensorList,
    replays: TensorList,
    anchors: TensorList,
    flags: Tensor,
    *,
    replay_weight: float = 1.0,
    grad_scale: float = 1.0,
    importances: TensorList = (),
    importance: float = 0.0,
) -> Tensor:
    """Sums the squares and products that equations (2) and (7) need, one partial per tensor.

    Args:
        params: Parameters θ.
        grads: Gradients g or None.
        replays: Replay gradients r or None.
        anchors: Anchors θ* or None.
        flags: uint8 [n]; a row with a bit INJECT and an anchor is guided.
        replay_weight: w of equation (1); r itself is not weighted.
        grad_scale: Divisor of both gradients.
        importances: F or None; an empty list means none at all.
        importance: i of equation (3).

    Returns:
        float64 [6, n]: ‖h‖² of every row with a gradient; of the guided ones among them ‖h‖²,
        ‖u‖², ‖r‖², ⟨h, r⟩ and ⟨u, r⟩, the last three 0 where there is no r.
    """
    sums = torch.zeros(PRODUCTS, len(params), dtype=torch.float64, device=flags.device)
    for row, (param, grad, anchor) in enumerate(zip(params, grads, anchors, strict=True)):
        replay = entry(replays, row)
        if grad is None and replay is None:
            continue
        dtype = compute_dtype(param)
        h, _ = gradients(grad, replay, dtype, replay_weight=replay_weight, grad_scale=grad_scale)
        sums[TOTAL, row] = _square_sum(h)
        if anchor is None or not flags[row]:
            continue
        u = weighted_difference(param, anchor, entry(importances, row), importance, dtype)
        sums[GUIDED, row] = sums[TOTAL, row]
        sums[PULL, row] = _square_sum(u)
        if replay is not None:
            r = replay.to(dtype)
            if grad_scale != 1.0:
                r = r / grad_scale
            sums[REPLAY, row] = _square_sum(r)
            sums[H_DOT_R, row] = (h.double() * r.double()).sum()
            sums[U_DOT_R, row] = (u.double() * r.double()).sum()
    return sums


def guard_coefficients(
    sums: Tensor, *, max_grad_norm: float | None, per_tensor: bool, maximize: bool = False
) -> Tensor:
    """Turns the result of `products` into c and the a of equation (7), on the device.

    Args:
        sums: float64 [6, n], summed over the shards where there are any.
        max_grad_norm: Bound of equation (2), or None.
        per_tensor: Equation (7) for every tensor by itself instead of over all of them.
        maximize: The objective is ascended: h and r change sign, u does not.

    Returns:
        float64 [6 + n]: c, ‖h‖ and ‖u‖ of the guided rows, ‖h‖ of all, then a / strength of every
        row, then the alignment ⟨h, r⟩ / (‖h‖ ‖r‖) and the pull a ‖u‖ / ‖h‖, over all guided rows.
    """
    whole = sums.sum(dim=1)
    total = whole[TOTAL].sqrt()
    clip = _clip(total, max_grad_norm)
    of_rows = sums if per_tensor else whole.unsqueeze(1)
    head, pull = of_rows[GUIDED].sqrt(), of_rows[PULL].sqrt()
    conflict, back = of_rows[H_DOT_R], of_rows[U_DOT_R]
    if maximize:
        back = -back
    least = torch.minimum(-clip * conflict / back, clip * head / pull)
    # What is not finite has no direction, and a pull that overflows is none.
    usable = (conflict < 0) & (back > 0) & (pull > 0) & head.isfinite() & pull.isfinite()
    a = torch.where(usable & least.isfinite(), least, torch.zeros_like(least))
    norm, replay = whole[GUIDED].sqrt(), whole[REPLAY].sqrt()
    length = (a.square() * of_rows[PULL]).sum().sqrt()
    zero = torch.zeros_like(total)
    cosine = torch.where(norm * replay > 0, whole[H_DOT_R] / (norm * replay), zero)
    share = torch.where(norm > 0, length / norm, zero)
    return torch.cat(
        [
            torch.stack([clip, norm, whole[PULL].sqrt(), total]),
            a.expand(sums.shape[1]),
            torch.stack([cosine, share]),
        ]
    )


def entry(entries, row):
    """Returns the entry of a row; None if the list is empty, which means that no row has one."""
    return entries[row] if len(entries) else None
