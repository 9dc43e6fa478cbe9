# SPDX-License-Identifier: BSD-3-Clause
"""Adam, AdamW and SGD: one pass over parameter, gradient, state and, where it is needed, anchor.

What differs between them stands behind ADAM. STATE is what a rule may do without: Adam's largest
second moments, SGD's momentum, which has the column of the first moments.
"""

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import (
    AGAIN,
    ANCHOR,
    BLOCK,
    COPY,
    EXP_AVG,
    EXP_AVG_SQ,
    GROUP,
    IMPORTANCE,
    MAX_EXP_AVG_SQ,
    ONCE,
    PARAM,
    STEP,
    add_products,
    chunk_of,
    draw_of,
    drawn_of,
    factor_of,
    finish_update,
    guidance_of,
    number,
    read,
    read_gradient,
    read_if,
    rounded,
    stream,
    tree_sum,
    weights_of,
    whole_blocks,
    words_of,
    words_stay_together,
    write,
)  # fmt: skip
from dgg.kernels.launcher import Kernel, bits, dtypes_of, features_of, kernel, pack_of
from dgg.kernels.layout import ADAM_HYPER, CHUNK, SGD_HYPER
from dgg.kernels.update import (
    BY_DECOUPLED,
    FIRST_STEP,
    STREAM_ROUNDING,
    adam,
    adopted,
    guided_gradient,
    narrow,
    power,
    sgd,
    weighted_difference,
    widen,
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
def _update_chunk(
    lanes, line, param, grad, replay, states, anchor, copy, importance, first, unmasked, count,
    guided, reading, weighing, masked, threshold, draw, seed, scalars, numbers,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    ADAM: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Updates a part of a chunk; returns the lanes with its squares for the look-ahead."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    replay_weight, factor, pull, rest, weight = scalars
    if ADAM:
        amsgrad, l2, keep, weight1, rest1, beta2, weight2, inv_sqrt_bias2, eps, step_size = numbers
    else:
        remembering, fresh, l2, lr, momentum, undamped, nesterov = numbers
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
        if ADAM:
            m = read(m_pointer, offset, count, None, T, FAST, ONCE)
            v = read(v_pointer, offset, count, None, T, FAST, ONCE)
            x = read_if(STATE, x_pointer, offset, count, amsgrad, T, FAST, ONCE)
        else:
            # A new buffer is set, not read.
            kept = remembering & (fresh == 0)
            m = read_if(STATE, m_pointer, offset, count, kept, T, FAST, ONCE)
        a = read_if(HAS_ANCHOR, a_pointer, offset, count, reading, T, FAST, ONCE)
        f = read_if(HAS_IMPORTANCE, f_pointer, offset, count, weighing, T, FAST, ONCE)
        total, real, shift = guided_gradient(
            h, p, a, f, rest, weight, factor, pull, guided, drawn, ROUTE
        )
        if ADAM:
            p, m, v, x = adam(
                p, total, real, shift, m, v, x, amsgrad,
                l2, keep, weight1, rest1, beta2, weight2, inv_sqrt_bias2, eps, step_size,
                ROUTE,
            )  # fmt: skip
            write(m_pointer, offset, count, None, narrow(m, M), FAST, ONCE)
            write(v_pointer, offset, count, None, narrow(v, V), FAST, ONCE)
            if STATE:
                write(x_pointer, offset, count, amsgrad, narrow(x, X), FAST, ONCE)
        else:
            p, m = sgd(p, total, shift, m, l2, lr, momentum, undamped, nesterov, fresh, ROUTE)
            if STATE:
                write(m_pointer, offset, count, remembering, narrow(m, M), FAST, ONCE)
        words = None
        if ROUNDING:
            words = words_of(line, first + place, draw, STREAM_ROUNDING, seed, BLOCK, PACK, FAST)
        stored = rounded(p, words, P)
        write(p_pointer, offset, count, None, stored, FAST, AGAIN)
        if HAS_COPY:
            write(c_pointer, offset, count, copy != 0, rounded(p, words, C), FAST, AGAIN)
        if LOOK_AHEAD:
            # As stored: what the next step's norm pass would see.
            u = weighted_difference(widen(stored, T), a, f, rest, weight)
            lanes = add_products(lanes, u, u, offset, count, FAST)
    return lanes


@triton.jit
def _update(
    table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
    distances, grad_scale, found_inf, draw_index, replay_weight, seed, draw, pull_weight,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    ADAM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """What a program does: it updates a chunk, and what it must if it is its row's last one."""
    row, line, first, count, grad, replay = chunk_of(
        table, rows, chunks, grads, replays, tl.program_id(0), HAS_REPLAY, CHUNK
    )
    # That there is something to walk saves registers, a fifth of them, if the compiler knows it.
    running = ((grad | replay) != 0) & (count > 0)
    if found_inf is not None:
        running = running & (tl.load(found_inf) == 0)

    if running:
        param = tl.load(line + PARAM)
        if ADAM:
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
            if STATE:
                amsgrad = tl.load(group + ADAM_AMSGRAD) != 0
                max_exp_avg_sq = tl.where(amsgrad, tl.load(line + MAX_EXP_AVG_SQ), 0)
                addresses = addresses | max_exp_avg_sq
        else:
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
            exp_avg = param
            exp_avg_sq = param
            max_exp_avg_sq = param
            if STATE:
                remembering = momentum != 0
                fresh = (tl.load(flags + row).to(tl.int32) & FIRST_STEP) != 0
                exp_avg = tl.where(remembering, tl.load(line + EXP_AVG), 0)
                addresses = addresses | exp_avg

        anchor = param
        importance = param
        copy = param
        guided = False
        reading = False
        weighing = False
        masked = False
        pull = factor
        rest = factor
        weight = factor
        threshold = factor
        if HAS_COPY:
            copy = tl.load(line + COPY)
            addresses = addresses | copy
        if HAS_ANCHOR:
            anchor = tl.load(line + ANCHOR)
            threshold = tl.load(group + (ADAM_THRESHOLD if ADAM else SGD_THRESHOLD))
            strength = tl.load(group + (ADAM_STRENGTH if ADAM else SGD_STRENGTH))
            pull, guided, masked = guidance_of(
                row, anchor, flags, coefficients, strength, threshold
            )
            if ROUTE == BY_DECOUPLED:
                pull = lr * pull
            reading = guided
            if LOOK_AHEAD:
                reading = anchor != 0
            addresses = addresses | tl.where(reading, anchor, 0)
        if HAS_IMPORTANCE:
            importance = tl.load(line + IMPORTANCE)
            rest, weight = weights_of(importance, pull_weight)
            weighing = reading & (importance != 0)
            addresses = addresses | tl.where(weighing, importance, 0)
        unmasked = whole_blocks(count, addresses, BLOCK)
        if ELEMENTS:
            unmasked = tl.where((masked == 0) | words_stay_together(line), unmasked, 0)
        if ROUNDING:
            unmasked = tl.where(words_stay_together(line), unmasked, 0)
        draw_word = draw_of(draw_index, draw)

        lanes = tl.zeros([BLOCK], T)
        scalars = (number(replay_weight).to(T), factor.to(T), pull.to(T), rest.to(T), weight.to(T))
        if ADAM:
            numbers = (
                amsgrad, l2.to(T), keep.to(T), (1.0 - beta1).to(T), beta1.to(T), beta2.to(T),
                (1.0 - beta2).to(T), inv_sqrt_bias2.to(T), eps.to(T), step_size.to(T),
            )  # fmt: skip
        else:
            numbers = (  # type: ignore[assignment]  # of another length
                remembering, fresh, l2.to(T), lr.to(T), momentum.to(T), undamped.to(T), nesterov
            )  # fmt: skip
        for walk in tl.static_range(2):
            if walk == 1:
                # Read again, not kept through the first walk: for the registers that this frees.
                # Without them a guided step with bfloat16 anchors would be spilled on sm_90.
                param = tl.load(line + PARAM)
                if ADAM:
                    exp_avg_sq = tl.load(line + EXP_AVG_SQ)
                if HAS_ANCHOR:
                    anchor = tl.load(line + ANCHOR)
            lanes = _update_chunk(
                lanes, line, param, grad, replay, (exp_avg, exp_avg_sq, max_exp_avg_sq), anchor,
                copy, importance, first, unmasked, count, guided, reading, weighing, masked,
                threshold, draw_word, seed, scalars, numbers,
                P, G, R, M, V, X, A, C, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, STATE,
                ROUNDING, HAS_COPY, HAS_IMPORTANCE, ROUTE, ADAM, BLOCK, PACK, walk == 0,
            )  # fmt: skip
        if LOOK_AHEAD:
            tl.store(partials + tl.program_id(0), tree_sum(lanes, BLOCK))

    finish_update(
        table, rows, chunks, starts, partials, counters, grads, replays, distances, found_inf,
        HAS_REPLAY, LOOK_AHEAD, ADAM,
    )  # fmt: skip


@kernel
def adam_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
    distances, grad_scale, found_inf, draw_index, replay_weight: tl.int64, seed: tl.int64,
    draw: tl.int64, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one counts the step and sums the distances."""
    _update(
        table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
        distances, grad_scale, found_inf, draw_index, replay_weight, seed, draw, pull_weight,
        P, G, R, M, V, X, A, C, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, STATE, ROUNDING,
        HAS_COPY, HAS_IMPORTANCE, ROUTE, True, CHUNK, BLOCK, PACK,
    )  # fmt: skip


@kernel
def sgd_kernel(
    table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
    distances, grad_scale, found_inf, draw_index, replay_weight: tl.int64, seed: tl.int64,
    draw: tl.int64, pull_weight: tl.int64,
    P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    X: tl.constexpr, A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    HAS_REPLAY: tl.constexpr, HAS_ANCHOR: tl.constexpr, ELEMENTS: tl.constexpr,
    LOOK_AHEAD: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_COPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, ROUTE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A program per chunk; a row's last one sums the distances."""
    _update(
        table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
        distances, grad_scale, found_inf, draw_index, replay_weight, seed, draw, pull_weight,
        P, G, R, M, V, X, A, C, F, T, HAS_REPLAY, HAS_ANCHOR, ELEMENTS, LOOK_AHEAD, STATE, ROUNDING,
        HAS_COPY, HAS_IMPORTANCE, ROUTE, False, CHUNK, BLOCK, PACK,
    )  # fmt: skip


def adam_launch_(
    table: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor, starts: torch.Tensor,
    partials: torch.Tensor, counters: torch.Tensor, grads: torch.Tensor, replays: torch.Tensor,
    coefficients: torch.Tensor, flags: torch.Tensor, hyper: torch.Tensor, distances: torch.Tensor,
    grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None,
    draw_index: torch.Tensor | None, *, dtypes: int, replay_weight: float, seed: int, draw: int,
    variant: int, importance: float = 0.0, chunk: int = CHUNK, of: Kernel = adam_kernel,
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
        of: The rule's kernel.

    Raises:
        ValueError: ``variant`` asks for what needs an anchor, without ANCHOR_BIT, or for two
            routes.
    """
    of_slots = dtypes_of(dtypes)
    features = features_of(variant, of_slots)
    # An importance that nobody reads does not count; it has the parameter's dtype mostly.
    pack = pack_of(*of_slots[: -1 if variant & layout.IMPORTANCE_BIT else -2])
    of.launch(
        chunks.shape[0], table, rows, chunks, starts, partials, counters, grads, replays,
        coefficients, flags, hyper, distances, grad_scale, found_inf, draw_index,
        bits(replay_weight), seed, draw, bits(importance), *of_slots, replays.shape[0] > 0,
        *features, chunk, min(BLOCK, chunk), pack, pack=pack,
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
    adam_launch_(
        table, rows, chunks, starts, partials, counters, grads, replays, coefficients, flags, hyper,
        distances, grad_scale, found_inf, draw_index, dtypes=dtypes, replay_weight=replay_weight,
        seed=seed, draw=draw, variant=variant, importance=importance, chunk=chunk, of=sgd_kernel,
    )  # fmt: skip
