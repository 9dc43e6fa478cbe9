# SPDX-License-Identifier: BSD-3-Clause
"""The gradient edit for optimizers of someone else's, and the draws that a device makes itself."""

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import (
    AGAIN,
    ANCHOR,
    BLOCK,
    COLUMNS,
    GROUP,
    IMPORTANCE,
    INDEX,
    ONCE,
    PARAM,
    chunk_of,
    draw_of,
    drawn_of,
    factor_of,
    guidance_of,
    number,
    read_gradient,
    read_if,
    stream,
    weights_of,
    whole_blocks,
    words_stay_together,
    write,
)  # fmt: skip
from dgg.kernels.launcher import bits, dtypes_of, kernel, pack_of
from dgg.kernels.layout import CHUNK, GUIDE_HYPER
from dgg.kernels.update import (
    BY_GRADIENT,
    CERTAIN,
    FIRST_STEP,
    INJECT,
    INJECT_ELEMENTS,
    STREAM_STEP,
    STREAM_TENSOR,
    guided_gradient,
    narrow,
    one_word,
)  # fmt: skip

# Columns of `hyper`.
GUIDE_MAXIMIZE = tl.constexpr(GUIDE_HYPER.index("maximize"))
GUIDE_STRENGTH = tl.constexpr(GUIDE_HYPER.index("strength"))
GUIDE_THRESHOLD = tl.constexpr(GUIDE_HYPER.index("threshold"))
GUIDE_HYPERS = tl.constexpr(len(GUIDE_HYPER))

BY_STEP = tl.constexpr(layout.BY_STEP)
BY_TENSOR = tl.constexpr(layout.BY_TENSOR)


@triton.jit
def _guide_chunk(
    line, param, grad, replay, anchor, importance, first, unmasked, count, guided, weighing,
    masked, threshold, draw, seed, replay_weight, factor, pull, rest, weight,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    T: tl.constexpr, HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    p_pointer = stream(param, first, P, FAST)
    g_pointer = stream(grad, first, G, FAST)
    r_pointer = stream(replay, first, R, FAST)
    a_pointer = stream(anchor, first, A, FAST)
    f_pointer = stream(importance, first, F, FAST)
    for place in tl.range(0 if FAST else unmasked, unmasked if FAST else count, BLOCK):
        offset = place + tl.arange(0, BLOCK)
        # First, when nothing else takes registers yet.
        drawn = drawn_of(
            line, first + place, masked, threshold, draw, seed, ELEMENTS, BLOCK, PACK, FAST
        )
        h, _ = read_gradient(
            g_pointer, r_pointer, grad, replay, offset, count, replay_weight, T, HAS_REPLAY,
            FAST, ONCE,
        )  # fmt: skip
        p = read_if(HAS_ANCHOR, p_pointer, offset, count, guided, T, FAST, AGAIN)
        a = read_if(HAS_ANCHOR, a_pointer, offset, count, guided, T, FAST, ONCE)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, weighing, T, FAST, ONCE)
        total, _, _ = guided_gradient(
            h, p, a, f, rest, weight, factor, pull, guided, drawn, BY_GRADIENT
        )
        write(g_pointer, offset, count, None, narrow(total, G), FAST, AGAIN)


@kernel
def guide_kernel(
    table, rows, chunks, grads, replays, coefficients, flags, hyper, grad_scale, found_inf,
    draw_index, replay_weight: tl.int64, seed: tl.int64, draw: tl.int64, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    T: tl.constexpr, HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; one with nothing to change changes nothing."""
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, tl.program_id(0), HAS_REPLAY, CHUNK
    )
    factor = factor_of(coefficients, grad_scale)
    param = grad * 0
    anchor = param
    importance = param
    guided = False
    weighing = False
    masked = False
    pull = factor
    rest = factor
    weight = factor
    threshold = factor
    needed = (factor != 1) | (replay != 0)
    if HAS_ANCHOR:
        group = hyper + tl.load(line + GROUP) * GUIDE_HYPERS
        param = tl.load(line + PARAM)
        anchor = tl.load(line + ANCHOR)
        threshold = tl.load(group + GUIDE_THRESHOLD)
        pull, guided, masked = guidance_of(
            row, anchor, flags, coefficients, tl.load(group + GUIDE_STRENGTH), threshold
        )
        # The other optimizer negates what it is given; the pull must survive that.
        pull = tl.where(tl.load(group + GUIDE_MAXIMIZE) != 0, -pull, pull)
        needed = needed | guided
    running = needed & (grad != 0) & (count > 0)
    if found_inf is not None:
        running = running & (tl.load(found_inf) == 0)

    if running:
        addresses = grad | replay
        if HAS_ANCHOR:
            addresses = addresses | tl.where(guided, param | anchor, 0)
        if HAS_IMPORTANCE:
            importance = tl.load(line + IMPORTANCE)
            rest, weight = weights_of(importance, pull_weight)
            weighing = guided & (importance != 0)
            addresses = addresses | tl.where(weighing, importance, 0)
        unmasked = whole_blocks(count, addresses, BLOCK)
        if ELEMENTS:
            unmasked = tl.where((masked == 0) | words_stay_together(line), unmasked, 0)
        draw_word = draw_of(draw_index, draw)
        for walk in tl.static_range(2):
            _guide_chunk(
                line, param, grad, replay, anchor, importance, first, unmasked, count, guided,
                weighing, masked, threshold, draw_word, seed, number(replay_weight).to(T),
                factor.to(T), pull.to(T), rest.to(T), weight.to(T),
                P, G, R, A, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, HAS_IMPORTANCE, BLOCK, PACK,
                walk == 0,
            )  # fmt: skip


def guide_launch_(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, grads: torch.Tensor,
    replays: torch.Tensor, coefficients: torch.Tensor, flags: torch.Tensor, hyper: torch.Tensor,
    grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None,
    draw_index: torch.Tensor | None, *, dtypes: int, replay_weight: float, seed: int, draw: int,
    variant: int, importance: float = 0.0, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Runs `reference.guide_` on the rows of one launch; arguments as in `adam_launch_`.

    A row without a gradient, or without a pull, a replay gradient and a factor, is not written.
    ``hyper`` is float64 [groups, 3] with columns as in GUIDE_HYPER; of ``variant`` only
    ANCHOR_BIT and, with it, ELEMENTS_BIT and IMPORTANCE_BIT matter.
    """
    p, g, r, _, _, _, a, _, f, t = dtypes_of(dtypes)
    anchored = bool(variant & layout.ANCHOR_BIT)
    elements = anchored and bool(variant & layout.ELEMENTS_BIT)
    weighted = anchored and bool(variant & layout.IMPORTANCE_BIT)
    pack = pack_of(p, g, r, a, *([f] if weighted else []))
    guide_kernel.launch(
        chunks.shape[0], table, rows, chunks, grads, replays, coefficients, flags, hyper,
        grad_scale, found_inf, draw_index, bits(replay_weight), seed, draw, bits(importance),
        p, g, r, a, f, t, replays.shape[0] > 0, anchored, elements, weighted, chunk,
        min(BLOCK, chunk), pack, pack=pack,
    )  # fmt: skip


@kernel
def draw_flags_kernel(
    table, hyper, draw_index, flags, gate, n, hypers, threshold_column, strength_column,
    seed: tl.int64, GRANULARITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all rows, since the gate says whether any of them injects."""
    draw = draw_of(draw_index, draw_index)
    injecting = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, n, BLOCK):
        row = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        in_table = row < n
        line = table + row * COLUMNS
        group = hyper + tl.load(line + GROUP, mask=in_table, other=0) * hypers
        threshold = tl.load(group + threshold_column, mask=in_table, other=0.0)
        strength = tl.load(group + strength_column, mask=in_table, other=0.0)
        anchor = tl.load(line + ANCHOR, mask=in_table, other=0)
        if GRANULARITY == BY_STEP:
            word = one_word(draw, tl.full([BLOCK], STREAM_STEP, tl.uint32), seed)
            drawn = tl.where(word.to(tl.float64) < threshold, INJECT, 0)
        elif GRANULARITY == BY_TENSOR:
            index = tl.load(line + INDEX, mask=in_table, other=0).to(tl.uint32)
            word = one_word(draw, index + STREAM_TENSOR, seed)
            drawn = tl.where(word.to(tl.float64) < threshold, INJECT, 0)
        else:
            drawn = tl.where(threshold > 0, INJECT_ELEMENTS, 0)
            drawn = tl.where(threshold >= CERTAIN, INJECT, drawn)
        drawn = tl.where((anchor != 0) & (strength != 0), drawn, 0)
        first_step = tl.load(flags + row, mask=in_table, other=0).to(tl.int32) & FIRST_STEP
        tl.store(flags + row, (drawn | first_step).to(tl.uint8), mask=in_table)
        injecting = injecting | drawn
    tl.store(gate, (tl.max(injecting) != 0).to(tl.uint8))


def draw_flags_launch(
    table: torch.Tensor, hyper: torch.Tensor, draw_index: torch.Tensor, flags: torch.Tensor,
    gate: torch.Tensor, *, seed: int, granularity: int, threshold_column: int,
    strength_column: int,
) -> None:  # fmt: skip
    """Draws on the device: which rows inject at the draw index that the device counts.

    Args:
        table: int64 [n, 15], on the device as everything here.
        hyper: float64 [groups, columns].
        draw_index: int64, one element.
        flags: uint8 [n]; the bits for injection are set, the others stay.
        gate: uint8 [1]; set to whether any row injects.
        seed: Seed of the draws, as the int64 of the same bits.
        granularity: As numbered in layout.py.
        threshold_column: Column of ``hyper`` with floor(alpha 2**32).
        strength_column: Column of ``hyper`` with the strength; rows with 0 do not inject.
    """
    draw_flags_kernel.launch(
        1, table, hyper, draw_index, flags, gate, table.shape[0], hyper.shape[1],
        threshold_column, strength_column, seed, granularity, BLOCK,
    )  # fmt: skip
