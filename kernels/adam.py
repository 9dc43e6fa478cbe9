# SPDX-License-Identifier: BSD-3-Clause
"""Adam and AdamW: one pass over parameter, gradient, moments and, where it is needed, anchor."""

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import (
    ANCHOR,
    BLOCK,
    EXP_AVG,
    EXP_AVG_SQ,
    GROUP,
    MAX_EXP_AVG_SQ,
    ONCE,
    PARAM,
    STEP,
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
from dgg.kernels.layout import ADAM_HYPER, CHUNK
from dgg.kernels.update import (
    adam,
    adopted,
    guided_gradient,
    narrow,
    power,
)

# Columns of `hyper`.
ADAM_LR = tl.constexpr(ADAM_HYPER.index("lr"))
ADAM_BETA1 = tl.constexpr(ADAM_HYPER.index("beta1"))
ADAM_BETA2 = tl.constexpr(ADAM_HYPER.index("beta2"))
ADAM_EPS = tl.constexpr(ADAM_HYPER.index("eps"))
ADAM_WEIGHT_DECAY = tl.constexpr(ADAM_HYPER.index("weight_decay"))
ADAM_DECOUPLED = tl.constexpr(ADAM_HYPER.index("decoupled"))
ADAM_AMSGRAD = tl.constexpr(ADAM_HYPER.index("amsgrad"))
ADAM_MAXIMIZE = tl.constexpr(ADAM_HYPER.index("maximize"))
ADAM_STRENGTH = tl.constexpr(ADAM_HYPER.index("strength"))
ADAM_THRESHOLD = tl.constexpr(ADAM_HYPER.index("threshold"))
ADAM_HYPERS = tl.constexpr(len(ADAM_HYPER))


@triton.jit
def _adam_chunk(
    lanes, line, param, grad, replay, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, copy,
    first, unmasked, count, guidance, amsgrad, draw, seed, replay_weight, factor, l2, keep,
    weight1, rest1, beta2, weight2, inv_sqrt_bias2, eps, step_size,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, AMSGRAD: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Updates a part of a chunk; returns the lanes with its squares for the look-ahead."""
    importance, guided, reading, weighing, masked, threshold, pull, rest, weight = guidance
    p_pointer = stream(param, first, P, FAST)
    g_pointer = stream(grad, first, G, FAST)
    r_pointer = stream(replay, first, R, FAST)
    m_pointer = stream(exp_avg, first, M, FAST)
    v_pointer = stream(exp_avg_sq, first, V, FAST)
    x_pointer = stream(max_exp_avg_sq, first, X, FAST)
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
        m = read(m_pointer, offset, count, None, T, FAST, ONCE)
        v = read(v_pointer, offset, count, None, T, FAST, ONCE)
        x = read_if(AMSGRAD, x_pointer, offset, count, amsgrad, T, FAST, ONCE)
        a = read_if(HAS_ANCHOR, a_pointer, offset, count, reading, T, FAST, ONCE)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, weighing, T, FAST, ONCE)
        total, real, shift = guided_gradient(
            h, p, a, f, rest, weight, factor, pull, guided, drawn, ROUTE
        )
        p, m, v, x = adam(
            p, total, real, shift, m, v, x, amsgrad,
            l2, keep, weight1, rest1, beta2, weight2, inv_sqrt_bias2, eps, step_size,
            ROUTE,
        )  # fmt: skip
        write(m_pointer, offset, count, None, narrow(m, M), FAST, ONCE)
        write(v_pointer, offset, count, None, narrow(v, V), FAST, ONCE)
        if AMSGRAD:
            write(x_pointer, offset, count, amsgrad, narrow(x, X), FAST, ONCE)
        words = rounding_of(line, first + place, draw, seed, ROUNDING, BLOCK, PACK, FAST)
        lanes = store_param(
            lanes, p, words, p_pointer, c_pointer, copy, a, f, rest, weight, offset, count,
            P, C, T, HAS_COPY, LOOK_AHEAD, FAST,
        )  # fmt: skip
    return lanes


@kernel
def adam_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
    distances, grad_scale, found_inf, draw_index, replay_weight: tl.int64, seed: tl.int64,
    draw: tl.int64, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, AMSGRAD: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one counts the step and sums the distances."""
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, tl.program_id(0), HAS_REPLAY, CHUNK
    )
    # That there is something to walk saves registers, a fifth of them, if the compiler knows it.
    running = ((grad | replay) != 0) & (count > 0)
    if found_inf is not None:
        running = running & (tl.load(found_inf) == 0)

    if running:
        param = tl.load(line + PARAM)
        exp_avg = tl.load(line + EXP_AVG)
        exp_avg_sq = tl.load(line + EXP_AVG_SQ)
        group = hyper + tl.load(line + GROUP) * ADAM_HYPERS
        lr = tl.load(group + ADAM_LR)
        beta1 = tl.load(group + ADAM_BETA1)
        beta2 = tl.load(group + ADAM_BETA2)
        eps = tl.load(group + ADAM_EPS)
        weight_decay = tl.load(group + ADAM_WEIGHT_DECAY)
        decoupled = tl.load(group + ADAM_DECOUPLED) != 0
        step = tl.load(tl.load(line + STEP).to(tl.pointer_type(tl.float32))) + 1.0

        # In float64: float32 knows 1 - 0.999 to two digits only.
        factor = factor_of(coefficients, grad_scale)
        factor = tl.where(tl.load(group + ADAM_MAXIMIZE) != 0, -factor, factor)
        l2 = tl.where(decoupled, 0.0, weight_decay)
        keep = tl.where(decoupled, 1.0 - lr * weight_decay, 1.0)
        inv_sqrt_bias2 = 1.0 / tl.sqrt(1.0 - power(beta2, step))
        step_size = lr / (1.0 - power(beta1, step))

        addresses = param | grad | replay | exp_avg | exp_avg_sq
        amsgrad = False
        max_exp_avg_sq = param
        if AMSGRAD:
            amsgrad = tl.load(group + ADAM_AMSGRAD) != 0
            max_exp_avg_sq = tl.where(amsgrad, tl.load(line + MAX_EXP_AVG_SQ), 0)
            addresses = addresses | max_exp_avg_sq
        anchor, copy, unmasked, guidance = guidance_of_update(
            row, line, flags, coefficients, group + ADAM_STRENGTH, group + ADAM_THRESHOLD, lr,
            pull_weight, factor, addresses, count, T, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, ROUNDING,
            HAS_COPY, HAS_IMPORTANCE, ROUTE, BLOCK,
        )  # fmt: skip
        draw_word = draw_of(draw_index, draw)

        lanes = tl.zeros([BLOCK], T)
        for walk in tl.static_range(2):
            if walk == 1:
                # Read again, not kept through the first walk: for the registers that this frees.
                # Without them a guided step with bfloat16 anchors would be spilled on sm_90.
                param = tl.load(line + PARAM)
                exp_avg_sq = tl.load(line + EXP_AVG_SQ)
                if HAS_ANCHOR:
                    anchor = tl.load(line + ANCHOR)
            lanes = _adam_chunk(
                lanes, line, param, grad, replay, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, copy,
                first, unmasked, count, guidance, amsgrad, draw_word, seed,
                number(replay_weight).to(T), factor.to(T), l2.to(T), keep.to(T),
                (1.0 - beta1).to(T), beta1.to(T), beta2.to(T), (1.0 - beta2).to(T),
                inv_sqrt_bias2.to(T), eps.to(T), step_size.to(T),
                P, G, R, M, V, X, A, C, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD,
                AMSGRAD, ROUNDING, HAS_COPY, HAS_IMPORTANCE, ROUTE, BLOCK, PACK, walk == 0,
            )  # fmt: skip
        if LOOK_AHEAD:
            tl.store(partials + tl.program_id(0), tree_sum(lanes, BLOCK))

    finish_update(
        table, rows, chunks, starts, partials, counters, grads, replays, distances, found_inf,
        HAS_REPLAY, LOOK_AHEAD, True,
    )  # fmt: skip


def adam_launch_(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, starts: torch.Tensor,
    partials: torch.Tensor, counters: torch.Tensor, grads: torch.Tensor, replays: torch.Tensor,
    coefficients: torch.Tensor, flags: torch.Tensor, hyper: torch.Tensor, distances: torch.Tensor,
    grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None,
    draw_index: torch.Tensor | None, *, dtypes: int, replay_weight: float, seed: int, draw: int,
    variant: int, importance: float = 0.0, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """Runs `reference.adam_` on the rows of one launch.

    Args:
        table: int64 [n, 15], on the device as everything here; columns as in csrc/table.h.
            Tensors are modified in place, step counts too.
        rows: int32 [k], rows of the table that this launch is about.
        chunks: int32 [m, 2], position in ``rows`` and number within the row; each row has one.
        starts: int32 [k + 1], first chunk of the row at each position.
        partials: float64 [5, m], workspace.
        counters: int32 [k + 1], workspace, zero between launches.
        grads: int64 [n], addresses of the gradients, 0 for None.
        replays: int64 [n] or [0], likewise.
        coefficients: float64 [4 + n] from `coefficients_launch`, or what
            `guard_coefficients_launch` makes but for the last two numbers.
        flags: uint8 [n], bits of `reference.INJECT` and its like.
        hyper: float64 [groups, 10], columns as in ADAM_HYPER.
        distances: float64 [n]; squares after the update of the rows written with LOOK_AHEAD, -1
            where none was measured.
        grad_scale: float32, one element, or None; divisor of the gradients.
        found_inf: float32, one element, or None; unless it is 0, nothing changes.
        draw_index: int64, one element, or None; the draw index where the device counts it.
        dtypes: The rows' dtype codes, 4 bits each.
        replay_weight: w of equation (1).
        seed: Seed of the draws, as the int64 of the same bits.
        draw: Draw index k if the device does not count it.
        variant: Bits of layout.py, ANCHOR_BIT and its like. IMPORTANCE_BIT weighs the pull, and
            FIRST_MOMENT_BIT and DECOUPLED_BIT say where it enters.
        importance: i of equation (3); only read with IMPORTANCE_BIT.
        chunk: Elements of a chunk, a power of two.

    Raises:
        ValueError: ``variant`` asks for what needs an anchor, without ANCHOR_BIT, or for two
            routes.
    """
    of_slots = dtypes_of(dtypes)
    features = features_of(variant, of_slots)
    # An importance that nobody reads does not count; it has the parameter's dtype mostly.
    pack = pack_of(*of_slots[: -1 if variant & layout.IMPORTANCE_BIT else -2])
    replayed = replays.shape[0] > 0
    adam_kernel.launch(
        chunks.shape[0], table, rows, chunks, starts, partials, counters, grads, replays,
        coefficients, flags, hyper, distances, grad_scale, found_inf, draw_index,
        bits(replay_weight), seed, draw, bits(importance), *of_slots, replayed, *features, chunk,
        min(BLOCK, chunk), pack, pack=pack,
    )  # fmt: skip
