# SPDX-License-Identifier: BSD-3-Clause
"""The arithmetic, written once for every Triton kernel; equations as in dgg/reference/.

Storage conversions, Philox, and the updates of a block of elements. Nothing here knows about
tables or memory. Everything is computed in the dtype T of the arithmetic, scalars too. Products
and sums are fused where this file says so and nowhere else (launches forbid the compiler to do it
of its own accord), so that an element's result depends on nothing but its operands.
"""

import triton
import triton.language as tl
from dgg.kernels import layout

# The interpreter's own conversions of bfloat16 truncate and lose small numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Bits of `flags`.
INJECT = tl.constexpr(layout.INJECT)
INJECT_ELEMENTS = tl.constexpr(layout.INJECT_ELEMENTS)
FIRST_STEP = tl.constexpr(layout.FIRST_STEP)

# Bits of `which`.
NORM_TOTAL = tl.constexpr(layout.NORM_TOTAL)
NORM_GRAD = tl.constexpr(layout.NORM_GRAD)
NORM_DISTANCE = tl.constexpr(layout.NORM_DISTANCE)

# Places in `coefficients`.
CLIP = tl.constexpr(layout.CLIP)
GRAD_LENGTH = tl.constexpr(layout.GRAD_LENGTH)
DISTANCE_LENGTH = tl.constexpr(layout.DISTANCE_LENGTH)
TOTAL_LENGTH = tl.constexpr(layout.TOTAL_LENGTH)
SCALES = tl.constexpr(layout.SCALES)

# Where the pull enters.
BY_GRADIENT = tl.constexpr(layout.BY_GRADIENT)
BY_FIRST_MOMENT = tl.constexpr(layout.BY_FIRST_MOMENT)
BY_DECOUPLED = tl.constexpr(layout.BY_DECOUPLED)

# Counter word 3 of Philox. A tensor's stream is this plus its index.
STREAM_STEP = tl.constexpr(layout.STREAM_STEP)
STREAM_TENSOR = tl.constexpr(layout.STREAM_TENSOR)
STREAM_ELEMENT = tl.constexpr(layout.STREAM_ELEMENT)
STREAM_ROUNDING = tl.constexpr(layout.STREAM_ROUNDING)

# Thresholds are compared with 32-bit words; this one is never reached.
CERTAIN = tl.constexpr(4294967296.0)


@triton.jit
def widen(x, T: tl.constexpr):
    """Stored numbers as numbers of the arithmetic."""
    if x.dtype == tl.float64:
        return x.to(T)
    elif x.dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(T)
    else:
        return x.to(tl.float32).to(T)


@triton.jit
def narrow(x, S: tl.constexpr):
    """Numbers of the arithmetic rounded to nearest even, as they are stored."""
    if S == tl.float64:
        return x.to(tl.float64)
    elif S == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        upper = bits >> 16
        rounded = (bits + 0x7FFF + (upper & 1)) >> 16
        # Rounding could carry the payload of a NaN into its exponent.
        stored = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, upper | 0x40, rounded)
        return stored.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.float32).to(S)


@triton.jit
def narrow_by_word(x, words):
    """bfloat16 numbers, rounded up with the probability that x is beyond the lower one.

    The lower 16 bits of the word are added to those that are cut off. What is not finite is
    rounded to nearest.
    """
    single = x.to(tl.float32)
    bits = single.to(tl.uint32, bitcast=True)
    stored = ((bits + (words & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, stored, narrow(single, tl.bfloat16))


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """The four words of a counter, Philox4x32-10 (Salmon et al., SC 2011); all uint32."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def one_word(draw, stream, seed):
    """The word that decides a whole step or tensor; stream is uint32, of any shape."""
    zero = stream ^ stream
    word, _, _, _ = philox(zero, zero, zero + draw, stream, seed)
    return word


@triton.jit
def unsharded_index(first, offset, base, stretch, stride, numel):
    """Row-major index in the unsharded parameter, int64, of elements of a shard.

    They are `offset`, less than 2^30, behind the place `first`; all others are int64. There is one
    quotient of 64 bits, a call, for all of them: with one each, registers would be spilled.
    """
    if stretch >= numel:
        index = base + first + offset
    else:
        turn = first // stretch
        rest = first - turn * stretch
        # The end of a stretch that is longer is all that elements so near can come to.
        short = tl.minimum(stretch, 1 << 30)
        near = tl.maximum(rest - (stretch - short), 0).to(tl.uint32) + offset.to(tl.uint32)
        turns = (near // short.to(tl.uint32)).to(tl.int64)
        index = base + turn * stride + rest + offset + turns * (stride - stretch)
    return index


@triton.jit
def words_of_index(index, draw, stream, seed):
    """The four words of the counters that row-major indices belong to."""
    counter = index >> 2
    low = counter.to(tl.uint32)
    zero = low ^ low
    return philox(low, (counter >> 32).to(tl.uint32), zero + draw, zero + stream, seed)


@triton.jit
def element_words(
    first, base, stretch, stride, numel, draw, stream, seed,
    BLOCK: tl.constexpr, PACK: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """The words of a block of elements, `first` the place of the first one in its tensor.

    With QUADS there is one counter for four elements; else, where shards cut through them, one
    for each. PACK is the number of neighbouring elements in one thread: with 8, a thread makes
    the words of two neighbouring counters, so that none has to go to another thread.
    """
    if not QUADS:
        index = unsharded_index(first, tl.arange(0, BLOCK), base, stretch, stride, numel)
        w0, w1, w2, w3 = words_of_index(index, draw, stream, seed)
        lane = index & 3
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    elif PACK == 8:
        place = 8 * tl.arange(0, BLOCK // 8)
        index = unsharded_index(first, place, base, stretch, stride, numel)
        w0, w1, w2, w3 = words_of_index(index, draw, stream, seed)
        index = unsharded_index(first, place + 4, base, stretch, stride, numel)
        w4, w5, w6, w7 = words_of_index(index, draw, stream, seed)
        even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
        odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
        words = tl.reshape(tl.join(even, odd), [BLOCK])
    else:
        place = 4 * tl.arange(0, BLOCK // 4)
        index = unsharded_index(first, place, base, stretch, stride, numel)
        w0, w1, w2, w3 = words_of_index(index, draw, stream, seed)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    return words


@triton.jit
def real_gradient(grad, replay, replay_weight, replayed):
    """Equation (1), before the division by the gradient scale; `replayed` says if there is r."""
    return tl.where(replayed, tl.fma(replay_weight, replay, grad), grad)


@triton.jit
def adopted(master, param, present, C: tl.constexpr, T: tl.constexpr):
    """A master weight, or the parameter, stored as C, if that is not the rounding of its master.

    The parameter was written by somebody else then.
    """
    weight = tl.where(widen(narrow(master, C), T) == param, master, param)
    return tl.where(present != 0, weight, master)


@triton.jit
def weighted_difference(param, anchor, importance, rest, weight):
    """The u of equation (3), to the same bits wherever it is needed.

    `rest` is 1 - i and `weight` i; of a row without importance they are 1 and 0. `importance` is
    None in kernels that do not weigh the pull.
    """
    difference = param - anchor
    if importance is not None:
        difference = difference * tl.fma(weight, importance, rest)
    return difference


@triton.jit
def guided_gradient(
    gradient, param, anchor, importance, rest, weight, factor, pull, guided, drawn,
    ROUTE: tl.constexpr,
):  # fmt: skip
    """G of equation (5), c h, and what the parameter is moved by outside of the moments.

    `factor` is c over the gradient scale, `pull` is b s, with the decoupled route times the
    learning rate. `anchor` is None in kernels that guide nothing, `drawn` None where no draw is by
    element. Only with the decoupled route does the last result mean anything.
    """
    total = factor * gradient
    real = total
    shift = total
    if anchor is not None:
        difference = weighted_difference(param, anchor, importance, rest, weight)
        if drawn is not None:
            difference = tl.where(drawn, difference, 0.0)
        if ROUTE == BY_DECOUPLED:
            shift = tl.where(guided, pull * difference, 0.0)
        else:
            total = tl.where(guided, tl.fma(pull, difference, total), total)
    return total, real, shift


@triton.jit
def power(base, exponent):
    """Power of a float64 number with a whole exponent."""
    left = exponent.to(tl.int64)
    result = base * 0.0 + 1.0
    while left > 0:
        result = tl.where((left & 1) != 0, result * base, result)
        base = base * base
        left = left >> 1
    return result


@triton.jit
def root(x):
    """Square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """Quotient, correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def with_decay(total, param, l2):
    """Gradient with the weight decay that belongs to it; 0 * inf must not get in."""
    return tl.where(l2 != 0, tl.fma(l2, param, total), total)


@triton.jit
def adam(
    param, total, real, shift, exp_avg, exp_avg_sq, max_exp_avg_sq, amsgrad,
    l2, keep, weight1, rest1, beta2, weight2, inv_sqrt_bias2, eps, step_size,
    ROUTE: tl.constexpr,
):  # fmt: skip
    """Equation (6), torch.optim.Adam and AdamW; the scalars are those of AdamScalars in update.h.

    The first moment is a lerp taken from the nearer end, as torch.lerp is. `max_exp_avg_sq` is
    None in kernels without amsgrad; in others the row says whether it is used. `real` and `shift`
    are those of `guided_gradient`.
    """
    total = with_decay(total, param, l2)
    squared = total
    if ROUTE == BY_FIRST_MOMENT:
        squared = with_decay(real, param, l2)
    near = weight1 < 0.5
    start = tl.where(near, exp_avg, total)
    exp_avg = tl.fma(tl.where(near, weight1, -rest1), total - exp_avg, start)
    exp_avg_sq = tl.fma(beta2, exp_avg_sq, weight2 * squared * squared)
    second = exp_avg_sq
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        # The first comparison fails for NaN in either place, the second lets a new one in.
        fresh = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        largest = tl.where(fresh, exp_avg_sq, max_exp_avg_sq)
        second = tl.where(amsgrad, largest, exp_avg_sq)
    denom = tl.fma(root(second), inv_sqrt_bias2, eps)
    if ROUTE == BY_DECOUPLED:
        param = tl.fma(param, keep, -shift) - quotient(step_size * exp_avg, denom)
    else:
        param = tl.fma(param, keep, -quotient(step_size * exp_avg, denom))
    return param, exp_avg, exp_avg_sq, largest


@triton.jit
def sgd(
    param, total, shift, buffer, l2, lr, momentum, undamped, nesterov, first, ROUTE: tl.constexpr
):
    """Equation (6), torch.optim.SGD.

    `buffer` is None in kernels without momentum; in others a row may have momentum 0. `shift` is
    that of `guided_gradient`.
    """
    total = with_decay(total, param, l2)
    new_buffer = total
    if buffer is not None:
        new_buffer = tl.where(first, total, tl.fma(momentum, buffer, undamped * total))
        nesterov_total = tl.where(nesterov, tl.fma(momentum, new_buffer, total), new_buffer)
        total = tl.where(momentum != 0, nesterov_total, total)
    if ROUTE == BY_DECOUPLED:
        param = param - shift
    return tl.fma(-lr, total, param), new_buffer
