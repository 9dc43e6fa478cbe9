# SPDX-License-Identifier: BSD-3-Clause
"""How a program finds its chunk, walks it, and how sums of chunks become sums of rows.

A program works on one chunk of one tensor, all addresses come from the table. Where all tensors
are aligned to 16 bytes, whole blocks are walked without masks, which makes every access 128 bits
wide; what is left is walked with masks. Both walks are one function.

Sums are formed in an order that depends on nothing but the cut into chunks: lanes by position,
then trees of two-operand additions. The program that is the last of its row to be done sums the
row's chunks, so that rows are finished side by side and in the same launch. `tl.sum` over many
elements would add in an order that depends on how the compiler spreads them over threads, which
differs between kernels.
"""

# Annotations are what the compiler reads: no `from __future__ import annotations` in this folder.
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.update import (
    CERTAIN,
    CLIP,
    INJECT,
    INJECT_ELEMENTS,
    SCALES,
    STREAM_ELEMENT,
    element_words,
    narrow,
    narrow_by_word,
    real_gradient,
    widen,
)  # fmt: skip

# Columns of the table.
PARAM = tl.constexpr(layout.PARAM)
EXP_AVG = tl.constexpr(layout.EXP_AVG)
EXP_AVG_SQ = tl.constexpr(layout.EXP_AVG_SQ)
MAX_EXP_AVG_SQ = tl.constexpr(layout.MAX_EXP_AVG_SQ)
ANCHOR = tl.constexpr(layout.ANCHOR)
STEP = tl.constexpr(layout.STEP)
NUMEL = tl.constexpr(layout.NUMEL)
GROUP = tl.constexpr(layout.GROUP)
INDEX = tl.constexpr(layout.INDEX)
BASE = tl.constexpr(layout.BASE)
STRETCH = tl.constexpr(layout.STRETCH)
STRIDE = tl.constexpr(layout.STRIDE)
COPY = tl.constexpr(layout.COPY)
IMPORTANCE = tl.constexpr(layout.IMPORTANCE)
COLUMNS = tl.constexpr(layout.COLUMNS)

# Elements of a block, the part of a chunk that is in registers at one time. Lanes of sums are the
# elements of a block, so it is the same for all kernels and dtypes.
BLOCK = 1024

# A sum of squares in float32 between these has lost nothing that matters; see `is_reliable`.
SMALLEST_SUM = tl.constexpr(2.0**-100)
LARGEST = tl.constexpr(1.7976931348623157e308)

# Partial sums of a row that are added at one time.
TILE = tl.constexpr(1024)

# Whether a stream is wanted again soon; what is not makes room in the cache first. As in
# csrc/cuda_update.cuh: an update reads everything for the last time of its step, and writes
# parameters for the next forward pass, but moments for a step before which a whole training step
# has been through the cache. A norm pass leaves what it reads to the update behind it, and the
# gradient edit its results, and parameters, to the optimizer behind it.
AGAIN = tl.constexpr("")
ONCE = tl.constexpr("evict_first")


@triton.jit
def number(value):
    """The float64 whose bits were passed."""
    return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def position_of(chunks, program):
    """Position, among the rows of the launch, of the one that a program's chunk is of.

    Loaded where it is needed, not kept: the registers are for the walks.
    """
    return tl.load(chunks + 2 * program.to(tl.int64))


@triton.jit
def chunk_of(
    table, rows, chunks, grads, replays, program, HAS_REPLAY: tl.constexpr, CHUNK: tl.constexpr
):
    """Row of a program's chunk and its line of the table, first element and number of elements.

    Last come the addresses of the row's gradient and replay gradient, 0 where there is none.
    """
    turn = tl.load(chunks + 2 * program.to(tl.int64) + 1)
    row = tl.load(rows + position_of(chunks, program)).to(tl.int64)
    turn = turn.to(tl.int64)
    line = table + row * COLUMNS
    first = turn * CHUNK
    count = tl.minimum(tl.load(line + NUMEL) - first, CHUNK).to(tl.int32)
    grad = tl.load(grads + row)
    replay = grad * 0
    if HAS_REPLAY:
        replay = tl.load(replays + row)
    return row, line, first, count, grad, replay


@triton.jit
def is_last(counter, members):
    """Whether all others of so many have counted; if so, the counter is zero again.

    The barrier collects the program's threads behind the one that counts; what each program did
    before it counted is then visible to the last one.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == members - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def is_last_of_row(counters, starts, position):
    """Whether every other chunk of the row is done; see `is_last`."""
    number = tl.load(starts + position + 1) - tl.load(starts + position)
    return is_last(counters + position, number)


@triton.jit
def whole_blocks(count, addresses, BLOCK: tl.constexpr):
    """Elements of a chunk that may be walked without masks, given all its addresses together."""
    return tl.where((addresses & 15) == 0, count - count % BLOCK, 0)


@triton.jit
def stream(address, first, S: tl.constexpr, FAST: tl.constexpr):
    """Pointer to element `first` of the tensor at an address, made in the walk that it is for.

    A promise of alignment sticks to the operation that made the pointer: made outside, it would
    hold in the walk with masks, too.
    """
    pointer = address.to(tl.pointer_type(S)) + first
    if FAST:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def everywhere(condition, N: tl.constexpr):
    """A condition on a whole row as a mask; the interpreter spreads integers alone correctly."""
    return (tl.zeros([N], tl.int32) + condition.to(tl.int32)) != 0


@triton.jit
def where_of(offset, count, present, FAST: tl.constexpr):
    """Mask of a block, None where nothing is masked."""
    if FAST and present is None:
        mask = None
    elif FAST:
        mask = everywhere(present, offset.shape[0])
    elif present is None:
        mask = offset < count
    else:
        mask = (offset < count) & everywhere(present, offset.shape[0])
    return mask


@triton.jit
def read(pointer, offset, count, present, T: tl.constexpr, FAST: tl.constexpr, REUSE: tl.constexpr):
    """Elements as the arithmetic wants them, 0 beyond the end and where `present` is false.

    `present` is None where that is certain. REUSE is AGAIN or ONCE.
    """
    mask = where_of(offset, count, present, FAST)
    if mask is None:
        x = tl.load(pointer + offset, eviction_policy=REUSE)
    else:
        x = tl.load(pointer + offset, mask=mask, other=0.0, eviction_policy=REUSE)
    return widen(x, T)


@triton.jit
def read_if(
    THERE: tl.constexpr, pointer, offset, count, present,
    T: tl.constexpr, FAST: tl.constexpr, REUSE: tl.constexpr,
):  # fmt: skip
    """What `read` returns; None in kernels that do without this tensor."""
    x = None
    if THERE:
        x = read(pointer, offset, count, present, T, FAST, REUSE)
    return x


@triton.jit
def write(pointer, offset, count, present, x, FAST: tl.constexpr, REUSE: tl.constexpr):
    """Stores what has the tensor's dtype already; see `read`."""
    mask = where_of(offset, count, present, FAST)
    if mask is None:
        tl.store(pointer + offset, x, eviction_policy=REUSE)
    else:
        tl.store(pointer + offset, x, mask=mask, eviction_policy=REUSE)


@triton.jit
def read_gradient(
    g_pointer, r_pointer, grad, replay, offset, count, replay_weight,
    T: tl.constexpr, HAS_REPLAY: tl.constexpr, FAST: tl.constexpr, REUSE: tl.constexpr,
):  # fmt: skip
    """The h and g of equation (1), for a row that has at least one of g and r."""
    if HAS_REPLAY:
        g = read(g_pointer, offset, count, grad != 0, T, FAST, REUSE)
        r = read(r_pointer, offset, count, replay != 0, T, FAST, REUSE)
        h = real_gradient(g, r, replay_weight, replay != 0)
    else:
        g = read(g_pointer, offset, count, None, T, FAST, REUSE)
        h = g
    return h, g


@triton.jit
def rounded(x, words, S: tl.constexpr):
    """Numbers as they are stored; words of the rounding stream are for bfloat16, else None."""
    if words is not None and S == tl.bfloat16:
        return narrow_by_word(x, words)
    else:
        return narrow(x, S)


@triton.jit
def draw_of(draw_index, draw):
    """Draw index k, the device's own where it has one, as the counter's word."""
    if draw_index is None:
        return draw.to(tl.uint32)
    else:
        return tl.load(draw_index).to(tl.uint32)


@triton.jit
def factor_of(coefficients, grad_scale):
    """c, with the gradient scale that goes with it, float64."""
    factor = tl.load(coefficients + CLIP)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    return factor


@triton.jit
def guidance_of(row, anchor, flags, coefficients, strength, threshold):
    """The pull b s of a row, whether it is guided at all, and whether element by element."""
    flag = tl.load(flags + row).to(tl.int32)
    pull = strength * tl.load(coefficients + SCALES + row)
    by_element = (flag & INJECT_ELEMENTS) != 0
    guided = ((flag & (INJECT | INJECT_ELEMENTS)) != 0) & (anchor != 0) & (pull != 0)
    guided = guided & ((threshold > 0) | ((flag & INJECT_ELEMENTS) == 0))
    return pull, guided, guided & by_element & (threshold < CERTAIN)


@triton.jit
def weights_of(importance, weight):
    """1 - i and i of equation (3) for a row: 1 and 0 where it has no importance."""
    weight = tl.where(importance != 0, number(weight), 0.0)
    return 1.0 - weight, weight


@triton.jit
def words_stay_together(line):
    """Whether four elements of a row, from a multiple of four on, have one counter among them."""
    base = tl.load(line + BASE)
    stretch = tl.load(line + STRETCH)
    stride = tl.load(line + STRIDE)
    whole = (stretch >= tl.load(line + NUMEL)) | (((stretch | stride) & 3) == 0)
    return ((base & 3) == 0) & whole


@triton.jit
def words_of(
    line, first, draw, stream, seed, BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr
):
    """Words of a block in the row's stream, `first` the place of its first element."""
    index = tl.load(line + INDEX).to(tl.uint32) + stream
    return element_words(
        first, tl.load(line + BASE), tl.load(line + STRETCH), tl.load(line + STRIDE),
        tl.load(line + NUMEL), draw, index, seed, BLOCK, PACK, FAST,
    )  # fmt: skip


@triton.jit
def drawn_of(
    line, first, masked, threshold, draw, seed, ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Which elements of a block the draw injects; None in kernels without such draws."""
    drawn = None
    if ELEMENTS:
        drawn = tl.full([BLOCK], 1, tl.int1)
        if masked:
            limit = threshold.to(tl.int64).to(tl.uint32)
            drawn = words_of(line, first, draw, STREAM_ELEMENT, seed, BLOCK, PACK, FAST) < limit
    return drawn


@triton.jit
def add_products(lanes, x, y, offset, count, FAST: tl.constexpr):
    """Lanes plus the products of a block; what lies beyond the end counts nothing, NaN included."""
    more = tl.fma(x.to(lanes.dtype), y.to(lanes.dtype), lanes)
    if not FAST:
        more = tl.where(offset < count, more, lanes)
    return more


@triton.jit
def tree_sum(x, N: tl.constexpr):
    """Sum of N numbers, a power of two, in float64; the same order in every kernel."""
    x = x.to(tl.float64)
    for level in tl.static_range(13):
        if (N >> level) > 2:
            x = tl.sum(tl.reshape(x, [2, (N >> level) // 2]), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def is_reliable(total):
    """Whether a sum of squares in float32 is what it ought to be.

    No square has overflowed, and those that have vanished are too small to matter beside the sum.
    """
    return (total >= SMALLEST_SUM) & (total <= LARGEST)


@triton.jit
def sum_of_row(partials, starts, position, numel):
    """Sum of the partials of a row's chunks; its order depends on their number alone.

    They come from other programs, which `is_last` has waited for. An empty row has a chunk that
    nobody walked.
    """
    start = tl.load(starts + position)
    stop = tl.where(numel > 0, tl.load(starts + position + 1), start)
    lanes = tl.zeros([TILE], tl.float64)
    for place in tl.range(start, stop, TILE, loop_unroll_factor=2):
        index = place + tl.arange(0, TILE)
        lanes += tl.load(partials + index, mask=index < stop, other=0.0)
    return tree_sum(lanes, TILE)


@triton.jit
def finish_update(
    table, rows, chunks, starts, partials, counters, grads, replays, distances, found_inf,
    HAS_REPLAY: tl.constexpr, LOOK_AHEAD: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Stores what only holds when all of a row is done: its step count and measured distance."""
    position = position_of(chunks, tl.program_id(0))
    if LOOK_AHEAD or STEPS:
        last = is_last_of_row(counters, starts, position)
    else:  # nobody reads what is written, so nobody has to be waited for
        last = tl.load(starts + position) == tl.program_id(0)
    if last:
        row = tl.load(rows + position).to(tl.int64)
        line = table + row * COLUMNS
        active = tl.load(grads + row) != 0
        if HAS_REPLAY:
            active = active | (tl.load(replays + row) != 0)
        if found_inf is not None:
            active = active & (tl.load(found_inf) == 0)
        if active:
            distance = tl.full([], -1.0, tl.float64)
            if LOOK_AHEAD:
                if tl.load(line + ANCHOR) != 0:
                    numel = tl.load(line + NUMEL)
                    distance = sum_of_row(partials, starts, position, numel)
                    # What float32 may have spoiled is left to the next norm pass.
                    distance = tl.where((numel == 0) | is_reliable(distance), distance, -1.0)
            tl.store(distances + row, distance)
            if STEPS:
                step = tl.load(line + STEP).to(tl.pointer_type(tl.float32))
                tl.store(step, tl.load(step) + 1.0)
