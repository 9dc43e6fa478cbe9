# SPDX-License-Identifier: BSD-3-Clause
"""Squares and products of equations (2) and (7), and the strength of the pull that follows."""

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import (
    AGAIN,
    ANCHOR,
    BLOCK,
    COLUMNS,
    COPY,
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
    read_if,
    stream,
    sum_of_row,
    tree_sum,
    weights_of,
    whole_blocks,
)  # fmt: skip
from dgg.kernels.launcher import bits, dtypes_of, kernel, pack_of
from dgg.kernels.layout import CHUNK
from dgg.kernels.norms import (
    FINISH,
    MAXIMIZE,
    PER_TENSOR,
    clip_of,
    program_from_the_end,
    settings_of,
    sum_of_rows,
)
from dgg.kernels.update import (
    CLIP,
    DISTANCE_LENGTH,
    GRAD_LENGTH,
    INJECT,
    SCALES,
    TOTAL_LENGTH,
    adopted,
    real_gradient,
    weighted_difference,
)

# Rows of `products`. Partial sums are those but for the first, which is the second, too.
TOTAL = tl.constexpr(layout.TOTAL)
GUIDED = tl.constexpr(layout.GUIDED)
PULL = tl.constexpr(layout.PULL)
REPLAY = tl.constexpr(layout.REPLAY)
H_DOT_R = tl.constexpr(layout.H_DOT_R)
U_DOT_R = tl.constexpr(layout.U_DOT_R)

# A sum that float32 has spoiled is formed again in blocks so many times shorter: five sums in
# float64 of whole ones would take registers from the walk that every chunk goes through.
SHORTER = tl.constexpr(4)


@triton.jit
def _add_products(
    hh, uu, rr, hr, ur, grad, replay, param, anchor, importance, copy, guided, weighing,
    first, unmasked, count, replay_weight, rest, weight,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, T: tl.constexpr, HAS_REPLAY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    HAS_COPY: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds the five products of h, u and r; of rows that are not guided nothing but h is read."""
    g_pointer = stream(grad, first, G, FAST)
    r_pointer = stream(replay, first, R, FAST)
    p_pointer = stream(param, first, P, FAST)
    a_pointer = stream(anchor, first, A, FAST)
    c_pointer = stream(copy, first, C, FAST)
    f_pointer = stream(importance, first, F, FAST)
    for place in tl.range(0 if FAST else unmasked, unmasked if FAST else count, BLOCK):
        offset = place + tl.arange(0, BLOCK)
        if HAS_REPLAY:
            g = read(g_pointer, offset, count, grad != 0, T, FAST, AGAIN)
            r = read(r_pointer, offset, count, replay != 0, T, FAST, AGAIN)
            h = real_gradient(g, r, replay_weight, replay != 0)
        else:
            h = read(g_pointer, offset, count, None, T, FAST, AGAIN)
        p = read(p_pointer, offset, count, guided, T, FAST, AGAIN)
        if HAS_COPY:
            c = read(c_pointer, offset, count, guided & (copy != 0), T, FAST, AGAIN)
            p = adopted(p, c, copy, C, T)
        a = read(a_pointer, offset, count, guided, T, FAST, AGAIN)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, weighing, T, FAST, AGAIN)
        u = weighted_difference(p, a, f, rest, weight)
        hh = add_products(hh, h, h, offset, count, FAST)
        uu = add_products(uu, u, u, offset, count, FAST)
        if HAS_REPLAY:
            rr = add_products(rr, r, r, offset, count, FAST)
            hr = add_products(hr, h, r, offset, count, FAST)
            ur = add_products(ur, u, r, offset, count, FAST)
    return hh, uu, rr, hr, ur


@triton.jit
def _finish_products(
    table, rows, chunks, starts, partials, counters, grads, replays, flags, products, out,
    grad_scale, n, slots, members, max_grad_norm, settings, HAS_REPLAY: tl.constexpr,
):  # fmt: skip
    """When all of a row is done, sums its partials and stores what they were for.

    And when all of the rows are done, makes the coefficients, if the settings say so.
    """
    position = position_of(chunks, program_from_the_end())
    if is_last_of_row(counters, starts, position):
        row = tl.load(rows + position).to(tl.int64)
        numel = tl.load(table + row * COLUMNS + NUMEL)
        replayed = False
        active = tl.load(grads + row) != 0
        if HAS_REPLAY:
            replayed = tl.load(replays + row) != 0
            active = active | replayed
        guided = active & _is_guided(row, table + row * COLUMNS, flags)
        scale = tl.full([], 1.0, tl.float64)
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(tl.float64)
        squared = scale * scale

        zero = tl.full([], 0.0, tl.float64)
        total = zero
        if active:
            total = sum_of_row(partials, starts, position, numel) / squared
        head = tl.where(guided, total, 0.0)
        pull = zero
        if guided:
            pull = sum_of_row(partials + slots, starts, position, numel)
        tl.store(products + TOTAL * n + row, total)
        tl.store(products + GUIDED * n + row, head)
        tl.store(products + PULL * n + row, pull)
        replay = zero
        h_dot_r = zero
        u_dot_r = zero
        if HAS_REPLAY:
            if guided & replayed:
                replay = sum_of_row(partials + 2 * slots, starts, position, numel) / squared
                h_dot_r = sum_of_row(partials + 3 * slots, starts, position, numel) / squared
                u_dot_r = sum_of_row(partials + 4 * slots, starts, position, numel) / scale
        tl.store(products + REPLAY * n + row, replay)
        tl.store(products + H_DOT_R * n + row, h_dot_r)
        tl.store(products + U_DOT_R * n + row, u_dot_r)
        if (settings & FINISH) != 0:
            if is_last(counters + members, members):
                _make_guard(products, out, n, max_grad_norm, settings)


@triton.jit
def _is_guided(row, line, flags):
    return ((tl.load(flags + row).to(tl.int32) & INJECT) != 0) & (tl.load(line + ANCHOR) != 0)


@triton.jit
def _strength(clip, head, pull, h_dot_r, u_dot_r, settings):
    """Equation (7) without the strength, of norms of h and u; 0 where nothing is to be done."""
    back = tl.where((settings & MAXIMIZE) != 0, -u_dot_r, u_dot_r)
    enough = -clip * h_dot_r / back
    most = clip * head / pull
    least = tl.where(enough < most, enough, most)
    # What is not finite has no direction, and a pull that overflows is none.
    usable = (h_dot_r < 0) & (back > 0) & (pull > 0) & (head <= LARGEST) & (pull <= LARGEST)
    return tl.where(usable & (enough == enough) & (least <= LARGEST), least, 0.0)


@triton.jit
def _make_guard(products, out, n, max_grad_norm, settings):
    """What one program makes of the products: the sums over the rows have a fixed order."""
    total = tl.sqrt(sum_of_rows(products + TOTAL * n, n))
    head = tl.sqrt(sum_of_rows(products + GUIDED * n, n))
    pull = tl.sqrt(sum_of_rows(products + PULL * n, n))
    replay = tl.sqrt(sum_of_rows(products + REPLAY * n, n))
    h_dot_r = sum_of_rows(products + H_DOT_R * n, n)
    u_dot_r = sum_of_rows(products + U_DOT_R * n, n)
    clip = clip_of(total, max_grad_norm, settings)
    tl.store(out + CLIP, clip)
    tl.store(out + GRAD_LENGTH, head)
    tl.store(out + DISTANCE_LENGTH, pull)
    tl.store(out + TOTAL_LENGTH, total)
    common = _strength(clip, head, pull, h_dot_r, u_dot_r, settings)
    lanes = tl.zeros([TILE // 8], tl.float64)
    # An element a thread, as for the scales of norms.py.
    for begin in tl.range(0, n, TILE // 8):
        row = begin + tl.arange(0, TILE // 8)
        in_table = row < n
        squares = tl.load(products + PULL * n + row, mask=in_table, other=0.0)
        strengths = tl.zeros([TILE // 8], tl.float64) + common
        if (settings & PER_TENSOR) != 0:
            heads = tl.sqrt(tl.load(products + GUIDED * n + row, mask=in_table, other=0.0))
            conflicts = tl.load(products + H_DOT_R * n + row, mask=in_table, other=0.0)
            ways = tl.load(products + U_DOT_R * n + row, mask=in_table, other=0.0)
            strengths = _strength(clip, heads, tl.sqrt(squares), conflicts, ways, settings)
        tl.store(out + SCALES + row, strengths, mask=in_table)
        lanes += strengths * strengths * squares
    length = tl.sqrt(tree_sum(lanes, TILE // 8))
    lengths = head * replay
    tl.store(out + SCALES + n, tl.where(lengths > 0, h_dot_r / lengths, 0.0))
    tl.store(out + SCALES + n + 1, tl.where(head > 0, length / head, 0.0))


@kernel
def products_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, flags, products, grad_scale,
    out, n, slots, members, replay_weight: tl.int64, max_grad_norm: tl.int64, settings,
    pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, T: tl.constexpr, HAS_REPLAY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    HAS_COPY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one sums its chunks, the last row's the rows."""
    slots = slots.to(tl.int64)
    n = n.to(tl.int64)
    program = program_from_the_end()
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, program, HAS_REPLAY, CHUNK
    )

    if ((grad | replay) != 0) & (count > 0):
        guided = _is_guided(row, line, flags)
        param = tl.load(line + PARAM)
        anchor = tl.load(line + ANCHOR)
        copy = param
        importance = param
        rest = number(pull_weight)
        weight = rest
        weighing = False
        used = param | anchor
        if HAS_COPY:
            copy = tl.load(line + COPY)
            used = used | copy
        if HAS_IMPORTANCE:
            importance = tl.load(line + IMPORTANCE)
            rest, weight = weights_of(importance, pull_weight)
            weighing = guided & (importance != 0)
            used = used | importance
        unmasked = whole_blocks(count, grad | replay | tl.where(guided, used, 0), BLOCK)
        wide_weight = number(replay_weight).to(T)
        zeros = tl.zeros([BLOCK], T)
        hh, uu, rr, hr, ur = zeros, zeros, zeros, zeros, zeros
        for walk in tl.static_range(2):
            hh, uu, rr, hr, ur = _add_products(
                hh, uu, rr, hr, ur, grad, replay, param, anchor, importance, copy, guided, weighing,
                first, unmasked, count, wide_weight, rest.to(T), weight.to(T),
                P, G, R, A, C, F, T, HAS_REPLAY, HAS_IMPORTANCE, HAS_COPY, BLOCK, walk == 0,
            )  # fmt: skip
        of_hh = tree_sum(hh, BLOCK)
        of_uu = tree_sum(uu, BLOCK)
        of_rr = tree_sum(rr, BLOCK)
        of_hr = tree_sum(hr, BLOCK)
        of_ur = tree_sum(ur, BLOCK)
        if T == tl.float32:
            # A product is no larger than the squares of its factors: where these are sound, it is.
            spoiled = (is_reliable(of_hh) == 0) | (guided & (is_reliable(of_uu) == 0))
            if HAS_REPLAY:
                spoiled = spoiled | (guided & (replay != 0) & (is_reliable(of_rr) == 0))
            if spoiled:
                # Once more in float64, out of the cache.
                wide = tl.zeros([BLOCK // SHORTER], tl.float64)
                hh64, uu64, rr64, hr64, ur64 = _add_products(
                    wide, wide, wide, wide, wide, grad, replay, param, anchor, importance, copy,
                    guided, weighing, first, 0, count, wide_weight, rest.to(T), weight.to(T),
                    P, G, R, A, C, F, T, HAS_REPLAY, HAS_IMPORTANCE, HAS_COPY, BLOCK // SHORTER,
                    False,
                )  # fmt: skip
                of_hh = tree_sum(hh64, BLOCK // SHORTER)
                of_uu = tree_sum(uu64, BLOCK // SHORTER)
                of_rr = tree_sum(rr64, BLOCK // SHORTER)
                of_hr = tree_sum(hr64, BLOCK // SHORTER)
                of_ur = tree_sum(ur64, BLOCK // SHORTER)
        tl.store(partials + program, of_hh)
        if guided:
            tl.store(partials + slots + program, of_uu)
            if HAS_REPLAY:
                tl.store(partials + 2 * slots + program, of_rr)
                tl.store(partials + 3 * slots + program, of_hr)
                tl.store(partials + 4 * slots + program, of_ur)

    _finish_products(
        table, rows, chunks, starts, partials, counters, grads, replays, flags, products, out,
        grad_scale, n, slots, members, max_grad_norm, settings, HAS_REPLAY,
    )  # fmt: skip


def products_launch(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, starts: torch.Tensor,
    partials: torch.Tensor, counters: torch.Tensor, grads: torch.Tensor, replays: torch.Tensor,
    flags: torch.Tensor, products: torch.Tensor, grad_scale: torch.Tensor | None,
    out: torch.Tensor | None, *, dtypes: int, replay_weight: float, importance: float,
    max_grad_norm: float | None, per_tensor: bool, maximize: bool, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Computes `reference.products` of the rows of one launch, and what follows from all of them.

    With master weights, whose copies have another dtype, a parameter that is not the rounding of
    its master counts in its place. Arguments are those of `adam_launch_`, and, with ``out``, of
    `guard_coefficients_launch`, and

    - ``flags``: uint8 [n]; rows with the bit INJECT and an anchor are guided;
    - ``products``: float64 [6, n], the result; written for the rows of the launch;
    - ``out``: float64 [4 + n + 2] or None; what `guard_coefficients_launch` would make of
      ``products``, the rows of other launches having been written before;
    - ``importance``: i of equation (3).
    """
    p, g, r, _, _, _, a, c, f, t = dtypes_of(dtypes)
    weighted, copied = importance != 0, c != p
    pack = pack_of(p, g, r, a, *([f] if weighted else []), *([c] if copied else []))
    settings = settings_of(max_grad_norm, False, per_tensor, maximize)
    if out is None:  # the same variant, which then writes nowhere
        out = products
    else:
        settings |= FINISH.value
    m = chunks.shape[0]
    products_kernel.launch(
        m, table, rows, chunks, starts, partials, counters, grads, replays, flags, products,
        grad_scale, out, table.shape[0], m, rows.shape[0], bits(replay_weight),
        bits(max_grad_norm or 0.0), settings, bits(importance),
        p, g, r, a, c, f, t, replays.shape[0] > 0, weighted, copied, chunk, min(BLOCK, chunk),
        pack=pack,
    )  # fmt: skip


@kernel
def guard_coefficients_kernel(products, out, n, max_grad_norm: tl.int64, settings):
    """One program: for products that have been summed over ranks since."""
    _make_guard(products, out, n.to(tl.int64), max_grad_norm, settings)


def guard_coefficients_launch(
    products: torch.Tensor, out: torch.Tensor, *, max_grad_norm: float | None, per_tensor: bool,
    maximize: bool,
) -> None:  # fmt: skip
    """Computes `reference.guard_coefficients`.

    Args:
        products: float64 [6, n] from `products_launch`.
        out: float64 [4 + n + 2], the result.
        max_grad_norm: Bound of equation (2), or None.
        per_tensor: Equation (7) for every tensor by itself.
        maximize: The objective is ascended: h and r change sign, u does not.
    """
    settings = settings_of(max_grad_norm, False, per_tensor, maximize)
    guard_coefficients_kernel.launch(
        1, products, out, products.shape[1], bits(max_grad_norm or 0.0), settings
    )
