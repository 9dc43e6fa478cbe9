# SPDX-License-Identifier: BSD-3-Clause
"""SGD: one pass over parameter, gradient, momentum and, where it is needed, anchor."""

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import (
    ANCHOR,
    BLOCK,
    EXP_AVG,
    GROUP,
    ONCE,
    PARAM,
    chunk_of,
    draw_of,
    drawn_of,
    factor_of,
    finish_update,
    guidance_of_update,
    number,
    read,
    read_gradient,
    read_if,
    rounding_of,
    store_param,
    stream,
    tree_sum,
    write,
)  # fmt: skip
from dgg.kernels.launcher import bits, dtypes_of, features_of, kernel, pack_of
from dgg.kernels.layout import CHUNK, SGD_HYPER
from dgg.kernels.update import (
    FIRST_STEP,
    adopted,
    guided_gradient,
    narrow,
    sgd,
)

# Columns of `hyper`.
SGD_LR = tl.constexpr(SGD_HYPER.index("lr"))
SGD_MOMENTUM = tl.constexpr(SGD_HYPER.index("momentum"))
SGD_DAMPENING = tl.constexpr(SGD_HYPER.index("dampening"))
SGD_WEIGHT_DECAY = tl.constexpr(SGD_HYPER.index("weight_decay"))
SGD_NESTEROV = tl.constexpr(SGD_HYPER.index("nesterov"))
SGD_MAXIMIZE = tl.constexpr(SGD_HYPER.index("maximize"))
SGD_STRENGTH = tl.constexpr(SGD_HYPER.index("strength"))
SGD_THRESHOLD = tl.constexpr(SGD_HYPER.index("threshold"))
SGD_HYPERS = tl.constexpr(len(SGD_HYPER))


@triton.jit
def _sgd_chunk(
    lanes, line, param, grad, replay, buffer, anchor, copy, first, unmasked, count, guidance,
    remembering, fresh, draw, seed, replay_weight, factor, l2, lr, momentum, undamped, nesterov,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, A: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, MOMENTUM: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Updates a part of a chunk; returns the lanes with its squares for the look-ahead."""
    importance, guided, reading, weighing, masked, threshold, pull, rest, weight = guidance
    p_pointer = stream(param, first, P, FAST)
    g_pointer = stream(grad, first, G, FAST)
    r_pointer = stream(replay, first, R, FAST)
    b_pointer = stream(buffer, first, M, FAST)
    a_pointer = stream(anchor, first, A, FAST)
    c_pointer = stream(copy, first, C, FAST)
    f_pointer = stream(importance, first, F, FAST)
    for place in tl.range(0 if FAST else unmasked, unmasked if FAST else count, BLOCK):
        offset = place + tl.arange(0, BLOCK)
        # First, when nothing else takes registers yet.
        drawn = drawn_of(
            line, first + place, masked, threshold, draw, seed, ELEMENTS, BLOCK, PACK, FAST
        )
        p = read(p_pointer, offset, count, None, T, FAST, ONCE)
        if HAS_COPY:
            p = adopted(p, read(c_pointer, offset, count, copy != 0, T, FAST, ONCE), copy, C, T)
        h, _ = read_gradient(
            g_pointer, r_pointer, grad, replay, offset, count, replay_weight, T, HAS_REPLAY,
            FAST, ONCE,
        )  # fmt: skip
        # A new buffer is set, not read.
        kept = remembering & (fresh == 0)
        b = read_if(MOMENTUM, b_pointer, offset, count, kept, T, FAST, ONCE)
        a = read_if(HAS_ANCHOR, a_pointer, offset, count, reading, T, FAST, ONCE)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, weighing, T, FAST, ONCE)
        total, _, shift = guided_gradient(
            h, p, a, f, rest, weight, factor, pull, guided, drawn, ROUTE
        )
        p, b = sgd(p, total, shift, b, l2, lr, momentum, undamped, nesterov, fresh, ROUTE)
        if MOMENTUM:
            write(b_pointer, offset, count, remembering, narrow(b, M), FAST, ONCE)
        words = rounding_of(line, first + place, draw, seed, ROUNDING, BLOCK, PACK, FAST)
        lanes = store_param(
            lanes, p, words, p_pointer, c_pointer, copy, a, f, rest, weight, offset, count,
            P, C, T, HAS_COPY, LOOK_AHEAD, FAST,
        )  # fmt: skip
    return lanes


@kernel
def sgd_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
    distances, grad_scale, found_inf, draw_index, replay_weight: tl.int64, seed: tl.int64,
    draw: tl.int64, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, A: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, MOMENTUM: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one sums the distances."""
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, tl.program_id(0), HAS_REPLAY, CHUNK
    )
    # That there is something to walk saves registers, a fifth of them, if the compiler knows it.
    running = ((grad | replay) != 0) & (count > 0)
    if found_inf is not None:
        running = running & (tl.load(found_inf) == 0)

    if running:
        param = tl.load(line + PARAM)
        group = hyper + tl.load(line + GROUP) * SGD_HYPERS
        lr = tl.load(group + SGD_LR)
        momentum = tl.load(group + SGD_MOMENTUM)
        undamped = 1.0 - tl.load(group + SGD_DAMPENING)
        l2 = tl.load(group + SGD_WEIGHT_DECAY)
        nesterov = tl.load(group + SGD_NESTEROV) != 0
        factor = factor_of(coefficients, grad_scale)
        factor = tl.where(tl.load(group + SGD_MAXIMIZE) != 0, -factor, factor)

        addresses = param | grad | replay
        remembering = False
        fresh = False
        buffer = param
        if MOMENTUM:
            remembering = momentum != 0
            fresh = (tl.load(flags + row).to(tl.int32) & FIRST_STEP) != 0
            buffer = tl.where(remembering, tl.load(line + EXP_AVG), 0)
            addresses = addresses | buffer
        anchor, copy, unmasked, guidance = guidance_of_update(
            row, line, flags, coefficients, group + SGD_STRENGTH, group + SGD_THRESHOLD, lr,
            pull_weight, factor, addresses, count, T, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, ROUNDING,
            HAS_COPY, HAS_IMPORTANCE, ROUTE, BLOCK,
        )  # fmt: skip
        draw_word = draw_of(draw_index, draw)

        lanes = tl.zeros([BLOCK], T)
        for walk in tl.static_range(2):
            if walk == 1:
                # Read again, not kept through the first walk: for the registers that this frees.
                param = tl.load(line + PARAM)
                if HAS_ANCHOR:
                    anchor = tl.load(line + ANCHOR)
            lanes = _sgd_chunk(
                lanes, line, param, grad, replay, buffer, anchor, copy, first, unmasked, count,
                guidance, remembering, fresh, draw_word, seed, number(replay_weight).to(T),
                factor.to(T), l2.to(T), lr.to(T), momentum.to(T), undamped.to(T), nesterov,
                P, G, R, M, A, C, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, MOMENTUM,
                ROUNDING, HAS_COPY, HAS_IMPORTANCE, ROUTE, BLOCK, PACK, walk == 0,
            )  # fmt: skip
        if LOOK_AHEAD:
            tl.store(partials + tl.program_id(0), tree_sum(lanes, BLOCK))

    finish_update(
        table, rows, chunks, starts, partials, counters, grads, replays, distances, found_inf,
        HAS_REPLAY, LOOK_AHEAD, False,
    )  # fmt: skip


def sgd_launch_(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, starts: torch.Tensor,
    partials: torch.Tensor, counters: torch.Tensor, grads: torch.Tensor, replays: torch.Tensor,
    coefficients: torch.Tensor, flags: torch.Tensor, hyper: torch.Tensor, distances: torch.Tensor,
    grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None,
    draw_index: torch.Tensor | None, *, dtypes: int, replay_weight: float, seed: int, draw: int,
    variant: int, importance: float = 0.0, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Runs `reference.sgd_` on the rows of one launch; arguments as in `adam_launch_`.

    ``hyper`` is float64 [groups, 8] with columns as in SGD_HYPER, and STATE_BIT in ``variant`` says
    that some group has momentum.

    Raises:
        ValueError: ``variant`` asks for what needs an anchor, without ANCHOR_BIT, or for two
            routes, or for the one through a second moment, which SGD does not have.
    """
    if variant & layout.FIRST_MOMENT_BIT:
        raise ValueError(f"variant {variant}: FIRST_MOMENT needs a second moment, SGD has none")
    of_slots = dtypes_of(dtypes)
    features = features_of(variant, of_slots)
    p, g, r, b, _, _, a, c, f, t = of_slots
    pack = pack_of(p, g, r, b, a, c, *([f] if variant & layout.IMPORTANCE_BIT else []))
    replayed = replays.shape[0] > 0
    sgd_kernel.launch(
        chunks.shape[0], table, rows, chunks, starts, partials, counters, grads, replays,
        coefficients, flags, hyper, distances, grad_scale, found_inf, draw_index,
        bits(replay_weight), seed, draw, bits(importance), p, g, r, b, a, c, f, t, replayed,
        *features, chunk, min(BLOCK, chunk), pack, pack=pack,
    )  # fmt: skip
