# SPDX-License-Identifier: BSD-3-Clause
"""Norms of equations (2) and (4), and the coefficients that follow from them."""

import torch
import triton
import triton.language as tl
from dgg.kernels.chunks import (
    AGAIN,
    ANCHOR,
    BLOCK,
    COLUMNS,
    IMPORTANCE,
    LARGEST,
    NUMEL,
    PARAM,
    TILE,
    add_products,
    chunk_of,
    is_last,
    is_last_of_row,
    is_reliable,
    number,
    position_of,
    read,
    read_gradient,
    read_if,
    stream,
    sum_of_row,
    tree_sum,
    weights_of,
    whole_blocks,
)  # fmt: skip
from dgg.kernels.launcher import bits, dtypes_of, kernel, pack_of
from dgg.kernels.layout import CHUNK
from dgg.kernels.update import (
    CLIP,
    DISTANCE_LENGTH,
    GRAD_LENGTH,
    NORM_DISTANCE,
    NORM_GRAD,
    NORM_TOTAL,
    SCALES,
    TOTAL_LENGTH,
    weighted_difference,
)

# Blocks that are loaded before the first of them is added up: there is so little to do with one
# that loads would not keep the memory busy.
AHEAD = tl.constexpr(4)

# Bits of `settings`: what is made of the squares; FINISH is for a norm pass that makes it, MAXIMIZE
# for products alone.
CLIPPED = tl.constexpr(1)
SCALING = tl.constexpr(2)
PER_TENSOR = tl.constexpr(4)
FINISH = tl.constexpr(8)
MAXIMIZE = tl.constexpr(16)


@triton.jit
def _add_gradients(
    total, real, grad, replay, first, unmasked, count, replay_weight,
    G: tl.constexpr, R: tl.constexpr, T: tl.constexpr, HAS_REPLAY: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds the squares of h and g; those of g do not depend on whether h is wanted, too."""
    g_pointer = stream(grad, first, G, FAST)
    r_pointer = stream(replay, first, R, FAST)
    for place in tl.range(
        0 if FAST else unmasked,
        unmasked if FAST else count,
        BLOCK,
        loop_unroll_factor=AHEAD if FAST else 1,
    ):
        offset = place + tl.arange(0, BLOCK)
        h, g = read_gradient(
            g_pointer, r_pointer, grad, replay, offset, count, replay_weight, T, HAS_REPLAY,
            FAST, AGAIN,
        )  # fmt: skip
        if HAS_REPLAY:
            total = add_products(total, h, h, offset, count, FAST)
        real = add_products(real, g, g, offset, count, FAST)
    return total, real


@triton.jit
def _add_differences(
    lanes, param, anchor, importance, rest, weight, first, unmasked, count,
    P: tl.constexpr, A: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds the squares of u, to the same bits as the updates' look-ahead."""
    p_pointer = stream(param, first, P, FAST)
    a_pointer = stream(anchor, first, A, FAST)
    f_pointer = stream(importance, first, F, FAST)
    for place in tl.range(
        0 if FAST else unmasked,
        unmasked if FAST else count,
        BLOCK,
        loop_unroll_factor=AHEAD if FAST else 1,
    ):
        offset = place + tl.arange(0, BLOCK)
        p = read(p_pointer, offset, count, None, T, FAST, AGAIN)
        a = read(a_pointer, offset, count, None, T, FAST, AGAIN)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, importance != 0, T, FAST, AGAIN)
        u = weighted_difference(p, a, f, rest, weight)
        lanes = add_products(lanes, u, u, offset, count, FAST)
    return lanes


@triton.jit
def sum_of_rows(numbers, n):
    """Sum of one number of each row, in an order that depends on n alone."""
    lanes = tl.zeros([TILE], tl.float64)
    for begin in tl.range(0, n, TILE):
        offset = begin + tl.arange(0, TILE)
        lanes += tl.load(numbers + offset, mask=offset < n, other=0.0)
    return tree_sum(lanes, TILE)


@triton.jit
def clip_of(total, max_grad_norm, settings):
    """Equation (2)."""
    clip = tl.full([], 1.0, tl.float64)
    if (settings & CLIPPED) != 0:
        ratio = number(max_grad_norm) / (total + 1e-6)
        clip = tl.where(ratio > 1.0, 1.0, ratio)
    return clip


@triton.jit
def _scale(clip, grad, distance):
    """Equation (4) without the strength."""
    ratio = clip * grad / distance
    ratio = tl.where(ratio > 1.0, 1.0, ratio)  # NaN stays NaN
    # Stated apart: 0 / 0 is where backends would differ, and what is not finite has no direction.
    usable = (grad != 0) & (distance != 0) & (grad <= LARGEST) & (distance <= LARGEST)
    return tl.where(usable, ratio, 0.0)


@triton.jit
def _make_coefficients(squares, out, n, max_grad_norm, settings):
    """What one program makes of the squares: the sums over the rows have a fixed order."""
    total = tl.sqrt(sum_of_rows(squares, n))
    grad = tl.sqrt(sum_of_rows(squares + n, n))
    distance = tl.sqrt(sum_of_rows(squares + 2 * n, n))
    clip = clip_of(total, max_grad_norm, settings)
    tl.store(out + CLIP, clip)
    tl.store(out + GRAD_LENGTH, grad)
    tl.store(out + DISTANCE_LENGTH, distance)
    tl.store(out + TOTAL_LENGTH, total)
    scaling = (settings & SCALING) != 0
    by_tensor = scaling & ((settings & PER_TENSOR) != 0)
    scale = tl.full([], 1.0, tl.float64)
    if scaling & (by_tensor == 0):
        scale = _scale(clip, grad, distance)
    # An element a thread: roots and quotients in float64 are calls, and what lives across many of
    # them would be spilled.
    for begin in tl.range(0, n, TILE // 8):
        offset = begin + tl.arange(0, TILE // 8)
        in_table = offset < n
        scales = tl.zeros([TILE // 8], tl.float64) + scale
        if by_tensor:
            grad_norm = tl.sqrt(tl.load(squares + n + offset, mask=in_table, other=0.0))
            distance_norm = tl.sqrt(tl.load(squares + 2 * n + offset, mask=in_table, other=0.0))
            scales = _scale(clip, grad_norm, distance_norm)
        tl.store(out + SCALES + offset, scales, mask=in_table)


@triton.jit
def program_from_the_end():
    """The program's number, counted from the last."""
    # A norm pass then ends with what the update behind it begins with: the cache still holds it.
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _finish_norms(
    table, rows, chunks, starts, partials, counters, grads, replays, distances, squares, out,
    grad_scale, n, slots, members, which, max_grad_norm, settings, HAS_REPLAY: tl.constexpr,
):  # fmt: skip
    """When all of a row is done, sums its partials and stores what they were for.

    And when all of the rows are done, makes the coefficients, if the settings say so.
    """
    position = position_of(chunks, program_from_the_end())
    if is_last_of_row(counters, starts, position):
        row = tl.load(rows + position).to(tl.int64)
        numel = tl.load(table + row * COLUMNS + NUMEL)
        has_grad = tl.load(grads + row) != 0
        active = has_grad
        if HAS_REPLAY:
            active = active | (tl.load(replays + row) != 0)
        anchored = active & (tl.load(table + row * COLUMNS + ANCHOR) != 0)
        scale = tl.full([], 1.0, tl.float64)
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(tl.float64)
            scale = scale * scale

        total = tl.full([], 0.0, tl.float64)
        real = total
        if active & ((which & (NORM_TOTAL | NORM_GRAD)) != 0):
            real = sum_of_row(partials + slots, starts, position, numel)
            total = real
            if HAS_REPLAY:
                if (which & NORM_TOTAL) != 0:
                    total = sum_of_row(partials, starts, position, numel)
        wanted = active & ((which & NORM_TOTAL) != 0)
        tl.store(squares + row, tl.where(wanted, total / scale, 0.0))
        wanted = anchored & has_grad & ((which & NORM_GRAD) != 0)
        tl.store(squares + n + row, tl.where(wanted, real / scale, 0.0))

        distance = tl.full([], 0.0, tl.float64)
        if anchored & ((which & NORM_DISTANCE) != 0):
            distance = tl.load(distances + row)
            if distance < 0:  # NaN is known
                distance = sum_of_row(partials + 2 * slots, starts, position, numel)
                tl.store(distances + row, distance)
        tl.store(squares + 2 * n + row, distance)
        if (settings & FINISH) != 0:
            if is_last(counters + members, members):
                _make_coefficients(squares, out, n, max_grad_norm, settings)


@kernel
def norms_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, distances, squares, gate,
    grad_scale, out, n, slots, members, which, replay_weight: tl.int64, max_grad_norm: tl.int64,
    settings, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    T: tl.constexpr, HAS_REPLAY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one sums its chunks, the last row's the rows."""
    if gate is not None:  # the device's own; while no row injects, it leaves only ||h||
        which = tl.where(tl.load(gate) != 0, which, which & NORM_TOTAL)
    slots = slots.to(tl.int64)
    n = n.to(tl.int64)
    program = program_from_the_end()
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, program, HAS_REPLAY, CHUNK
    )
    active = (grad | replay) != 0

    if active & (count > 0) & ((which & (NORM_TOTAL | NORM_GRAD)) != 0):
        weight = number(replay_weight).to(T)
        total = tl.zeros([BLOCK], T)
        real = tl.zeros([BLOCK], T)
        unmasked = whole_blocks(count, grad | replay, BLOCK)
        for walk in tl.static_range(2):
            total, real = _add_gradients(
                total, real, grad, replay, first, unmasked, count, weight, G, R, T, HAS_REPLAY,
                BLOCK, walk == 0,
            )  # fmt: skip
        of_total = tree_sum(total, BLOCK)
        of_real = tree_sum(real, BLOCK)
        if T == tl.float32:
            spoiled = is_reliable(of_real) == 0
            if HAS_REPLAY:
                spoiled = spoiled | (is_reliable(of_total) == 0)
            if spoiled:
                # Once more in float64, out of the cache.
                total64, real64 = _add_gradients(
                    tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), grad, replay,
                    first, 0, count, weight, G, R, T, HAS_REPLAY, BLOCK, False,
                )  # fmt: skip
                of_total = tree_sum(total64, BLOCK)
                of_real = tree_sum(real64, BLOCK)
        if HAS_REPLAY:
            tl.store(partials + program, of_total)
        tl.store(partials + slots + program, of_real)

    anchor = tl.load(line + ANCHOR)
    if active & (count > 0) & (anchor != 0) & ((which & NORM_DISTANCE) != 0):
        if tl.load(distances + row) < 0:
            param = tl.load(line + PARAM)
            addresses = param | anchor
            importance = param
            rest = number(pull_weight)
            weight = rest
            if HAS_IMPORTANCE:
                importance = tl.load(line + IMPORTANCE)
                rest, weight = weights_of(importance, pull_weight)
                addresses = addresses | importance
            lanes = tl.zeros([BLOCK], T)
            unmasked = whole_blocks(count, addresses, BLOCK)
            for walk in tl.static_range(2):
                lanes = _add_differences(
                    lanes, param, anchor, importance, rest.to(T), weight.to(T), first, unmasked,
                    count, P, A, F, T, HAS_IMPORTANCE, BLOCK, walk == 0,
                )  # fmt: skip
            of_distance = tree_sum(lanes, BLOCK)
            if T == tl.float32:
                if is_reliable(of_distance) == 0:
                    lanes64 = _add_differences(
                        tl.zeros([BLOCK], tl.float64), param, anchor, importance, rest.to(T),
                        weight.to(T), first, 0, count, P, A, F, T, HAS_IMPORTANCE, BLOCK, False,
                    )  # fmt: skip
                    of_distance = tree_sum(lanes64, BLOCK)
            tl.store(partials + 2 * slots + program, of_distance)

    _finish_norms(
        table, rows, chunks, starts, partials, counters, grads, replays, distances, squares, out,
        grad_scale, n, slots, members, which, max_grad_norm, settings, HAS_REPLAY,
    )  # fmt: skip


def norms_launch(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, starts: torch.Tensor,
    partials: torch.Tensor, counters: torch.Tensor, grads: torch.Tensor, replays: torch.Tensor,
    distances: torch.Tensor, squares: torch.Tensor, gate: torch.Tensor | None,
    grad_scale: torch.Tensor | None, out: torch.Tensor | None, *, dtypes: int,
    replay_weight: float, which: int, max_grad_norm: float | None, scaling: bool,
    per_tensor: bool, importance: float = 0.0, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Computes `reference.norms` of the rows of one launch, and what follows from all squares.

    Arguments are those of `adam_launch_`, and, with ``out``, of `coefficients_launch`, and

    - ``distances``: float64 [n], known squares or negative; those measured are stored;
    - ``squares``: float64 [3, n], the result; written for the rows of the launch;
    - ``gate``: uint8 [1] or None; where it holds 0, only NORM_TOTAL is computed;
    - ``out``: float64 [4 + n] or None; what `coefficients_launch` would make of ``squares``, the
      rows of other launches having been written before;
    - ``which``: bits of `reference.NORM_TOTAL` and its like;
    - ``importance``: i of equation (3); rows that have an importance are measured by it.
    """
    p, g, r, _, _, _, a, _, f, t = dtypes_of(dtypes)
    n, m = table.shape[0], chunks.shape[0]
    replayed = replays.shape[0] > 0
    weighted = importance != 0
    pack = pack_of(p, g, r, a, *([f] if weighted else []))
    settings = settings_of(max_grad_norm, scaling, per_tensor)
    if out is None:  # the same variant, which then writes nowhere
        out = squares
    else:
        settings |= FINISH.value
    norms_kernel.launch(
        m, table, rows, chunks, starts, partials, counters, grads, replays, distances, squares,
        gate, grad_scale, out, n, m, rows.shape[0], which, bits(replay_weight),
        bits(max_grad_norm or 0.0), settings, bits(importance),
        p, g, r, a, f, t, replayed, weighted, chunk, min(BLOCK, chunk), pack=pack,
    )  # fmt: skip


@kernel
def coefficients_kernel(squares, out, n, max_grad_norm: tl.int64, settings):
    """One program: for squares that have been summed over ranks since."""
    _make_coefficients(squares, out, n.to(tl.int64), max_grad_norm, settings)


def settings_of(
    max_grad_norm: float | None, scaling: bool, per_tensor: bool, maximize: bool = False
) -> int:
    """Returns the bits that tell a kernel what to make of the squares."""
    settings = CLIPPED.value if max_grad_norm is not None else 0
    settings |= SCALING.value if scaling else 0
    settings |= PER_TENSOR.value if per_tensor else 0
    return settings | (MAXIMIZE.value if maximize else 0)


def coefficients_launch(
    squares: torch.Tensor, out: torch.Tensor, *, max_grad_norm: float | None, scaling: bool,
    per_tensor: bool,
) -> None:  # fmt: skip
    """Computes `reference.coefficients`.

    Args:
        squares: float64 [3, n] from `norms_launch`.
        out: float64 [4 + n], the result.
        max_grad_norm: Bound of equation (2), or None.
        scaling: False gives scales of 1.
        per_tensor: Norms of equation (4) per tensor.
    """
    settings = settings_of(max_grad_norm, scaling, per_tensor)
    coefficients_kernel.launch(
        1, squares, out, squares.shape[1], bits(max_grad_norm or 0.0), settings
    )
