# SPDX-License-Identifier: BSD-3-Clause
"""The reference against its equations, element by element in Python's own arithmetic.

Every backend is tested against ``dgg/reference/``; here it is tested itself: the equations of its
docstring, written down once more for single numbers, with every option off its neutral value and
every optional argument left out once. It is the file that ``make mutate`` changes line by line
(docs/mutation_testing.md): whatever these tests would not notice there, no other test needs to.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch

from cases import BF16, F16, F32, F64
from dgg import _philox, reference
from dgg.reference import (
    CLIP,
    DISTANCE,
    FIRST_STEP,
    GRAD_NORM,
    INJECT,
    INJECT_ELEMENTS,
    TOTAL_NORM,
    updates,
)

SHAPES = [(), (3, 2), (5,), (4,), (0,), (7,)]
SEED, DRAW = 2**40 + 77, 2**33 + 5
INDICES = [0, 1, 2, 3, 4, 9]
PLACES = [(0, 1, 1), (10, 3, 8), (2**34, 2, 7), (0, 4, 4), (0, 1, 1), (5, 2, 3)]


def tensors(seed, dtype=F64, *, missing=(), positive=False):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=generator, dtype=F64)
        made.append(None if row in missing else (x.abs() if positive else x).to(dtype))
    return made


def copies(xs):
    return [None if x is None else x.clone() for x in xs]


def flat(x):
    return [float(v) for v in x.reshape(-1)]


def word(row, element, stream, *, places=PLACES, seed=SEED, draw=DRAW):
    """The word of an element of a shard, from the generator's definition."""
    if places:
        base, stretch, stride = places[row]
        element = base + (element // stretch) * stride + element % stretch
    quad = element // 4
    counter = (quad % 2**32, quad // 2**32, draw % 2**32, stream + INDICES[row])
    return _philox.block(seed, counter)[element % 4]


class Given:
    """The arguments of one step, and the step itself for a single element.

    Row 0 has no replay gradient, row 1 only that, row 2 neither, row 3 no anchor.
    """

    injected = [INJECT, INJECT_ELEMENTS, INJECT, INJECT, INJECT, INJECT_ELEMENTS]

    def __init__(self, dtype=F64, **options):
        self.params = tensors(1, dtype)
        self.grads = tensors(2, dtype, missing=(1, 2))
        self.replays = tensors(3, dtype, missing=(0, 2))
        self.anchors = tensors(4, dtype, missing=(3,))
        self.coefficients = torch.tensor(
            [0.5, 1.0, 2.0, 3.0] + [0.3 + 0.1 * row for row in range(len(SHAPES))], dtype=F64
        )
        self.flags = torch.tensor(self.injected, dtype=torch.uint8)
        self.distances = torch.full((len(SHAPES),), 9.0, dtype=F64)
        self.options = {
            "maximize": False,
            "strength": 0.7,
            "threshold": 2**31,
            "replay_weight": 1.5,
            "grad_scale": 4.0,
            "places": PLACES,
            "seed": SEED,
            "draw": DRAW,
            **options,
        }

    def total(self, row, element, *, maximize=None):
        """G of equation (5); None where the row is left alone."""
        o = self.options
        maximize = o["maximize"] if maximize is None else maximize
        g, r, anchor = (xs[row] for xs in (self.grads, self.replays or [None] * 6, self.anchors))
        if g is None and r is None:
            return None
        scale = o.get("grad_scale", 1.0)
        h = 0.0 if g is None else flat(g)[element] / scale
        if r is not None:
            h += o.get("replay_weight", 1.0) * flat(r)[element] / scale
        G = 0.5 * h * (-1 if maximize else 1)
        flag = self.injected[row]
        if flag == INJECT_ELEMENTS:
            places = o.get("places", ())
            seed, draw = o.get("seed", 0), o.get("draw", 0)
            w = word(row, element, 1 << 31, places=places, seed=seed, draw=draw)
            flag = INJECT if w < o["threshold"] else 0
        if anchor is not None and flag:
            s = o["strength"] * (0.3 + 0.1 * row)
            G += s * (flat(self.params[row])[element] - flat(anchor)[element])
        return G


def assert_all(found, expected):
    """Compares tensors with lists of numbers; None says that a row is left alone."""
    for row, (x, numbers) in enumerate(zip(found, expected, strict=True)):
        assert flat(x) == pytest.approx(numbers, rel=1e-12, abs=1e-14), f"row {row}"


# -- norms and coefficients -----------------------------------------------------------------------


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("replayed", [True, False])
def test_norms(which, replayed):
    given = Given()
    replays = given.replays if replayed else []
    known = torch.full((6,), -1.0, dtype=F64)
    known[1], known[5] = 0.0, 0.5  # neither the true one
    before = known.clone()
    options = {"replay_weight": 1.5, "grad_scale": 4.0}
    squares = reference.norms(
        given.params, given.grads, replays, given.anchors, known, which=which, **options
    )
    assert squares.dtype == F64 and squares.shape == (3, 6)
    expected = [[0.0] * 6 for _ in range(3)]
    for row, anchor in enumerate(given.anchors):
        g, r = given.grads[row], replays[row] if replayed else None
        if g is None and r is None:
            assert known[row] == before[row]
            continue
        size = given.params[row].numel()
        gs = [0.0] * size if g is None else [x / 4 for x in flat(g)]
        hs = [x + (0.0 if r is None else 1.5 * flat(r)[i] / 4) for i, x in enumerate(gs)]
        if which & reference.NORM_TOTAL:
            expected[0][row] = math.fsum(x * x for x in hs)
        if anchor is None:
            continue
        if which & reference.NORM_GRAD:
            expected[1][row] = math.fsum(x * x for x in gs)
        if which & reference.NORM_DISTANCE:
            pairs = zip(flat(given.params[row]), flat(anchor), strict=True)
            true = math.fsum((p - a) ** 2 for p, a in pairs)
            expected[2][row] = before[row].item() if before[row] >= 0 else true
            assert known[row].item() == pytest.approx(expected[2][row])
        else:
            assert known[row] == before[row]
    assert_all(squares, expected)


def test_norms_left_to_their_defaults():
    """All three, of replay gradients of weight 1, unscaled."""
    params, grads, replays = [torch.zeros(2)], [torch.full((2,), 3.0)], [torch.full((2,), 1.0)]
    distances = torch.full((1,), -1.0, dtype=F64)
    squares = reference.norms(params, grads, replays, [torch.ones(2)], distances)
    assert squares.tolist() == [[32.0], [18.0], [2.0]]


def test_norms_of_16_bits_are_squared_in_more():
    """300² overflows float16, and 1 + 2⁻¹² is 1 in bfloat16."""
    distances = torch.full((1,), -1.0, dtype=F64)
    x = torch.full((2,), 300.0, dtype=F16)
    squares = reference.norms([x], [x], [x], [torch.zeros_like(x)], distances, replay_weight=0.5)
    assert squares.tolist() == [[2 * 450.0**2], [2 * 300.0**2], [2 * 300.0**2]]
    one, little = torch.ones(1, dtype=BF16), torch.full((1,), 2.0**-12, dtype=BF16)
    squares = reference.norms([one], [one], [little], [None], distances)
    assert squares[0].item() == (1 + 2.0**-12) ** 2
    p, anchor = torch.ones(1, dtype=BF16), torch.full((1,), -(2.0**-12))
    assert reference.distance(p, anchor).item() == (1 + 2.0**-12) ** 2
    narrow = torch.full((1,), -(2.0**-12), dtype=BF16)
    assert reference.distance(p, narrow).item() == (1 + 2.0**-12) ** 2
    # float32 also beside an anchor that is kept in more.
    one, more = torch.ones(1), torch.full((1,), 1 + 2.0**-40, dtype=F64)
    assert reference.distance(one, more) == 0
    wide = torch.ones(1, dtype=F64)
    assert reference.distance(wide, torch.full((1,), -(2.0**-40), dtype=F64)) != 1
    assert reference.distance(p, anchor).dtype == F64


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_both_gradients_are_unscaled(scale):
    x, r = torch.full((2,), 6.0), torch.full((2,), 12.0)
    h, g = reference.gradients(x, r, F64, replay_weight=0.25, grad_scale=scale)
    assert flat(h) == [9.0 / scale] * 2 and flat(g) == [6.0 / scale] * 2
    h, g = reference.gradients(None, r, F64, replay_weight=0.25, grad_scale=scale)
    assert flat(h) == [3.0 / scale] * 2 and g is None


@pytest.mark.parametrize("short", range(3))
def test_lists_of_norms_have_one_length(short):
    lists = [[torch.ones(2)] * 2 for _ in range(3)]
    del lists[short][1]
    params, grads, anchors = lists
    distances = torch.full((2,), -1.0, dtype=F64)
    with pytest.raises(ValueError):
        reference.norms(params, grads, [], anchors, distances)


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("bound", [None, 0.5, 2.0, 100.0])
def test_coefficients(bound, scaling, per_tensor):
    squares = torch.tensor(
        [[4.0, 9.0, 1.0, 2.0], [1.0, 4.0, 0.0, 3.0], [2.0, 1.0, 5.0, 0.0]], dtype=F64
    )
    found = reference.coefficients(
        squares, max_grad_norm=bound, scaling=scaling, per_tensor=per_tensor
    )
    total, grad, dist = (math.sqrt(sum(row)) for row in squares.tolist())
    clip = 1.0 if bound is None else min(1.0, bound / (total + 1e-6))
    scales = [1.0] * 4
    if scaling:
        for row in range(4):
            g, d = (squares[1, row].sqrt(), squares[2, row].sqrt()) if per_tensor else (grad, dist)
            scales[row] = 0.0 if g == 0 or d == 0 else min(1.0, clip * float(g) / float(d))
    assert found.dtype == F64
    assert flat(found) == pytest.approx([clip, grad, dist, total, *scales], rel=1e-14)
    assert found[CLIP] == clip
    assert flat(found[[GRAD_NORM, DISTANCE, TOTAL_NORM]]) == pytest.approx([grad, dist, total])


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("which", [1, 2])
def test_zero_norms_give_no_scale(which, per_tensor):
    squares = torch.ones(3, 2, dtype=F64)
    squares[which] = 0.0
    found = reference.coefficients(squares, max_grad_norm=None, scaling=True, per_tensor=per_tensor)
    assert found[reference.SCALES :].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("which", [1, 2])
def test_norms_that_are_not_finite_give_no_scale(which, wrong):
    """Of their tensor, or of all; the others keep theirs."""
    squares = torch.ones(3, 2, dtype=F64)
    squares[which, 0] = wrong
    for per_tensor, expected in ((False, [0.0, 0.0]), (True, [0.0, 1.0])):
        found = reference.coefficients(
            squares, max_grad_norm=None, scaling=True, per_tensor=per_tensor
        )
        assert found[reference.SCALES :].tolist() == expected


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_master_weights_are_adopted_from_what_others_wrote(dtype):
    master = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, -3.0, 0.0])
    copy = master.to(dtype)
    copy[1], copy[3] = 1.5, -2.0
    found = reference.adopted(master, copy)
    assert found.dtype == F32
    assert found.tolist() == [1 + 2.0**-12, 1.5, -3.0, -2.0]
    assert reference.adopted(master.double(), copy).dtype == F64


def test_nan_is_kept():
    squares = torch.tensor([[math.nan], [1.0], [1.0]], dtype=F64)
    found = reference.coefficients(squares, max_grad_norm=1.0, scaling=True, per_tensor=False)
    assert found[CLIP].isnan() and found[reference.SCALES].isnan()


# -- the updates ----------------------------------------------------------------------------------

ADAM = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
DEFAULTS = ("replay_weight", "grad_scale", "places", "seed", "draw")


def without(options, *names):
    return {k: v for k, v in options.items() if k not in names}


def moved(given, found, kept, *, look_ahead):
    """Checks which rows were touched and the distances measured ahead."""
    for row, (x, before) in enumerate(zip(found, kept, strict=True)):
        anchor = given.anchors[row]
        if row == 2:
            assert torch.equal(x, before)
            assert given.distances[row] == 9.0
        elif look_ahead and anchor is not None:
            pairs = zip(flat(x), flat(anchor), strict=True)
            ahead = math.fsum((p - a) ** 2 for p, a in pairs)
            assert given.distances[row].item() == pytest.approx(ahead, rel=1e-12)
        else:
            assert given.distances[row] == -1.0


@pytest.mark.parametrize("left_out", [(), DEFAULTS, ("look_ahead",)], ids=str)
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_adam(maximize, decoupled, decay, amsgrad, left_out):
    given = Given(maximize=maximize, look_ahead=True)
    given.options = without(given.options, *left_out)
    look_ahead = given.options.get("look_ahead", False)
    if "replay_weight" in left_out:
        given.replays = tensors(3, missing=(0, 2))
    firsts, seconds, largest = tensors(5), tensors(6, positive=True), tensors(7, positive=True)
    steps = [torch.tensor(float(row)) for row in range(6)]
    before = [copies(xs) for xs in (given.params, firsts, seconds, largest)]
    expected = [[], [], [], []]
    for row, (theta, m, v, top) in enumerate(zip(*before, strict=True)):
        for kind in range(4):
            expected[kind].append([])
        for i in range(theta.numel()):
            p, first, second, high = (flat(x)[i] for x in (theta, m, v, top))
            G = given.total(row, i)
            if G is not None:
                if decoupled:
                    p *= 1 - 0.03 * decay
                else:
                    G += decay * p
                first = 0.8 * first + (1 - 0.8) * G
                second = 0.95 * second + (1 - 0.95) * G * G
                used = second
                if amsgrad:
                    used = high = max(high, second)
                t = row + 1
                denominator = math.sqrt(used) / math.sqrt(1 - 0.95**t) + 1e-3
                p -= 0.03 / (1 - 0.8**t) * first / denominator
            for kind, value in enumerate((p, first, second, high)):
                expected[kind][row].append(value)
    reference.adam_(
        given.params, given.grads, given.replays, firsts, seconds,
        largest if amsgrad else [None] * 6, given.anchors, steps, given.distances,
        given.coefficients, given.flags, INDICES, weight_decay=decay, decoupled=decoupled,
        amsgrad=amsgrad, **ADAM, **given.options,
    )  # fmt: skip
    for found, numbers in zip((given.params, firsts, seconds, largest), expected, strict=True):
        assert_all(found, numbers)
    assert [float(s) for s in steps] == [1, 2, 2, 4, 5, 6]
    moved(given, given.params, before[0], look_ahead=look_ahead)


@pytest.mark.parametrize("left_out", [(), DEFAULTS, ("look_ahead",)], ids=str)
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True), (1.0, False)]
)
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("maximize", [True, False])
def test_sgd(maximize, decay, momentum, nesterov, left_out):
    given = Given(maximize=maximize, look_ahead=True)
    given.options = without(given.options, *left_out)
    given.flags[4:] |= FIRST_STEP
    buffers = tensors(5) if momentum else [None] * 6
    before, old = copies(given.params), copies(buffers)
    thetas, kept = [], []
    for row, theta in enumerate(before):
        thetas.append([])
        kept.append([])
        for i in range(theta.numel()):
            p, buffer = flat(theta)[i], flat(old[row])[i] if momentum else None
            G = given.total(row, i)
            if G is not None:
                G += decay * p
                if momentum:
                    buffer = G if row >= 4 else momentum * buffer + (1 - 0.3) * G
                    G = G + momentum * buffer if nesterov else buffer
                p -= 0.05 * G
            thetas[row].append(p)
            kept[row].append(buffer)
    reference.sgd_(
        given.params, given.grads, given.replays, buffers, given.anchors, given.distances,
        given.coefficients, given.flags, INDICES, lr=0.05, momentum=momentum, dampening=0.3,
        weight_decay=decay, nesterov=nesterov, **given.options,
    )  # fmt: skip
    assert_all(given.params, thetas)
    if momentum:
        assert_all(buffers, kept)
    moved(given, given.params, before, look_ahead=given.options.get("look_ahead", False))


@pytest.mark.parametrize("left_out", [(), DEFAULTS], ids=str)
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_guide(replayed, maximize, left_out):
    """The other optimizer negates all it is given, the pull with it."""
    given = Given(maximize=maximize)
    given.options = without(given.options, *left_out)
    if not replayed:
        given.replays = []
    expected = []
    for row, grad in enumerate(given.grads):
        numbers = None
        if grad is not None:
            turn = -1 if maximize else 1
            numbers = [turn * given.total(row, i) for i in range(grad.numel())]
        expected.append(numbers)
    # A replay gradient alone would have nowhere to go: whoever calls sees to it.
    grads = copies(given.grads)
    rows = [row for row, grad in enumerate(grads) if grad is not None]

    def some(xs):
        return [xs[row] for row in rows]

    more = dict(given.options)
    if more.get("places"):
        more["places"] = some(PLACES)
    reference.guide_(
        some(given.params), some(grads), some(given.replays) if replayed else [],
        some(given.anchors), given.coefficients[[0, 1, 2, 3, *(4 + row for row in rows)]],
        given.flags[rows], some(INDICES), **more,
    )  # fmt: skip
    assert_all(some(grads), some(expected))
    none = [torch.ones(2), None], [None, None], [], [None, None]
    reference.guide_(
        *none, given.coefficients, given.flags[:2], [0, 1], maximize=False, strength=1.0,
        threshold=0,
    )  # fmt: skip


# -- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rule", ["adam", "amsgrad", "sgd", "guide"])
def test_arithmetic_is_float32(rule, dtype):
    """From storage of any dtype, also mixed: the float32 result, rounded once."""
    results = []
    for storage in (dtype, F32):
        given = Given(look_ahead=True)
        # Values that either kind of 16 bits can hold, in both runs.
        for xs, kind in zip(
            (given.params, given.grads, given.replays, given.anchors),
            (dtype, BF16, F16, BF16),
            strict=True,
        ):
            for row, x in enumerate(xs):
                if x is not None:
                    xs[row] = x.to(F16).to(BF16).to(F32 if storage == F32 else kind)
        moments = [
            [x.to(F16).to(BF16).to(storage) for x in tensors(seed, positive=seed > 5)]
            for seed in (5, 6, 7)
        ]
        steps = [torch.tensor(float(row)) for row in range(6)]
        if rule == "guide":
            given.grads[1] = torch.zeros_like(given.replays[1])
            given.options.pop("look_ahead")
            reference.guide_(
                given.params, given.grads, given.replays, given.anchors, given.coefficients,
                given.flags, INDICES, **given.options,
            )  # fmt: skip
        elif rule == "sgd":
            reference.sgd_(
                given.params, given.grads, given.replays, moments[0], given.anchors,
                given.distances, given.coefficients, given.flags, INDICES, lr=0.05, momentum=0.8,
                dampening=0.3, weight_decay=0.1, nesterov=True, **given.options,
            )  # fmt: skip
        else:
            reference.adam_(
                given.params, given.grads, given.replays, *moments, given.anchors, steps,
                given.distances, given.coefficients, given.flags, INDICES, weight_decay=0.1,
                decoupled=True, amsgrad=rule == "amsgrad", **ADAM, **given.options,
            )  # fmt: skip
        results.append([*given.params, *sum(moments, []), *given.grads])
    for x, y in zip(*results, strict=True):
        if x is not None:
            assert torch.equal(x, y.to(x.dtype))


def test_float64_stays_float64():
    assert reference.compute_dtype(torch.ones(1, dtype=F64)) == F64
    for dtype in (F32, F16, BF16):
        assert reference.compute_dtype(torch.ones(1, dtype=dtype)) == F32
    h, g = reference.gradients(
        torch.ones(1, dtype=F16), torch.ones(1, dtype=BF16), F64, replay_weight=0.5, grad_scale=1.0
    )
    assert (h.dtype, g.dtype) == (F64, F64)
    clip, scale = torch.tensor(0.5, dtype=F64), torch.tensor(2.0, dtype=F64)
    for dtype in (F32, F64):
        made = reference.guided_gradient(
            torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype), clip, scale, False
        )
        assert made.dtype == dtype and made.tolist() == [2.5, 2.5]
        # Numbers without dimensions would be promoted by the coefficients.
        one = torch.ones((), dtype=dtype)
        assert reference.guided_gradient(one, None, clip, None, True).dtype == dtype
        made = reference.guided_gradient(one, one, clip, scale, False)
        assert made.dtype == dtype and made == 2.5


def test_state_that_is_kept_in_more_is_read_as_float32():
    grad = torch.zeros(1)
    anchor = torch.full((1,), 1 + 2.0**-40, dtype=F64)
    ones = torch.ones(5, dtype=F64)
    flags = torch.tensor([INJECT], dtype=torch.uint8)
    reference.guide_(
        [torch.ones(1)], [grad], [], [anchor], ones, flags, [0], maximize=False, strength=1.0,
        threshold=0,
    )  # fmt: skip
    assert grad == 0
    largest = torch.full((1,), 1 + 2.0**-40, dtype=F64)
    reference.adam_(
        [torch.ones(1)], [grad], [], [torch.zeros(1)], [torch.zeros(1)], [largest], [None],
        [torch.zeros(())], torch.zeros(1, dtype=F64), ones, flags, [0], weight_decay=0.0,
        decoupled=True, amsgrad=True, maximize=False, strength=1.0, threshold=0, **ADAM,
    )  # fmt: skip
    assert largest == 1


def test_a_word_equal_to_the_threshold_does_not_inject():
    """Of 2³² words the smallest ⌊α 2³²⌋ do: none for 0."""
    theta, anchor = torch.full((8,), 3.0), torch.zeros(8)
    words = [word(0, i, 1 << 31, places=()) for i in range(8)]
    for threshold in (words[3], words[3] + 1):
        grad = torch.zeros(8)
        reference.guide_(
            [theta], [grad], [], [anchor], torch.ones(5, dtype=F64),
            torch.tensor([INJECT_ELEMENTS], dtype=torch.uint8), [0], maximize=False, strength=1.0,
            threshold=threshold, seed=SEED, draw=DRAW,
        )  # fmt: skip
        assert flat(grad) == [3.0 if w < threshold else 0.0 for w in words]


# -- what is stored -------------------------------------------------------------------------------


def bits_of(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def number_of(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@pytest.mark.parametrize("place", [None, (10, 3, 8)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_stochastic_rounding_bit_for_bit(dtype, place):
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(7, 5, generator=generator, dtype=dtype).t()  # not row-major
    value[0] = torch.tensor([0.0, -0.0, 1e-41, -1e30, 3.3895313e38, 1.0, -2.0])
    param, copy = torch.zeros(5, 7), torch.zeros(5, 7, dtype=BF16)
    reference.store(value, param, copy, 3, stochastic=True, seed=SEED, draw=DRAW, place=place)
    assert torch.equal(param, value.float())
    up = 0
    for i, x in enumerate(flat(value)):
        element = i if place is None else 10 + i // 3 * 8 + i % 3
        quad = element // 4
        words = _philox.block(SEED, (quad, 0, DRAW % 2**32, (3 << 30) + 3))
        bits = (bits_of(x) + words[element % 4] % 65536) // 65536 * 65536
        stored = flat(copy)[i]
        assert stored == number_of(bits)
        assert math.copysign(1, stored) == math.copysign(1, x)
        up += bits != bits_of(x) // 65536 * 65536
    assert 10 < up < 25


def test_only_bfloat16_is_rounded_stochastically():
    value = torch.full((64,), 1 + 2.0**-12)
    param, copy = torch.zeros(64, dtype=F16), torch.zeros(64, dtype=BF16)
    reference.store(value, param, copy, 0, stochastic=False, seed=1, draw=0)
    assert torch.equal(param, value.to(F16)) and torch.equal(copy, value.to(BF16))
    param, copy = torch.zeros(64, dtype=F16), torch.zeros(64, dtype=BF16)
    reference.store(value, param, copy, 0, stochastic=True, seed=1, draw=0)
    assert torch.equal(param, value.to(F16)) and set(flat(copy)) <= {1.0, 1 + 2.0**-7}
    param = torch.zeros(64, dtype=BF16)
    reference.store(1.5 * value, param, None, 0, stochastic=True, seed=1, draw=0)
    assert len(set(flat(param))) == 1 or set(flat(param)) <= {1.5, 1.5 + 2.0**-7}


def test_what_is_not_finite_is_stored_as_it_is():
    value = torch.tensor([math.inf, -math.inf, math.nan])
    param = torch.zeros(3, dtype=BF16)
    for draw in range(20):
        reference.store(value, param, None, 0, stochastic=True, seed=1, draw=draw)
        assert param[0] == math.inf and param[1] == -math.inf and param[2].isnan()


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("stochastic", [True, False, None])
def test_updates_store_with_words_of_their_own(rule, stochastic):
    """Of their row, seed, draw and place; in the copies of master weights as well."""
    given = Given(F32, **({} if stochastic is None else {"stochastic": stochastic}))
    given.options["copies"] = tensors(8, BF16)
    if rule == "adam":
        moments = [tensors(seed, F32, positive=True) for seed in (5, 6, 7)]
        steps = [torch.tensor(float(row)) for row in range(6)]
        reference.adam_(
            given.params, given.grads, given.replays, *moments, given.anchors, steps,
            given.distances, given.coefficients, given.flags, INDICES, weight_decay=0.1,
            decoupled=True, amsgrad=True, **ADAM, **given.options,
        )  # fmt: skip
    else:
        reference.sgd_(
            given.params, given.grads, given.replays, tensors(5, F32), given.anchors,
            given.distances, given.coefficients, given.flags, INDICES, lr=0.05, momentum=0.8,
            dampening=0.3, weight_decay=0.1, nesterov=True, **given.options,
        )  # fmt: skip
    untouched = tensors(8, BF16)[2]
    for row, (theta, copy) in enumerate(zip(given.params, given.options["copies"], strict=True)):
        if row == 2:
            assert torch.equal(copy, untouched)
            continue
        expected = torch.zeros_like(copy)
        reference.store(
            theta, expected, None, INDICES[row], stochastic=bool(stochastic), seed=SEED, draw=DRAW,
            place=PLACES[row],
        )  # fmt: skip
        assert torch.equal(copy, expected)


# -- devices --------------------------------------------------------------------------------------


def test_everything_is_made_where_the_parameters_are():
    """The meta device stands for an accelerator: what is made on the CPU could not be combined."""
    p = torch.zeros(2, 3, device="meta")
    assert updates._elements(p, None).device.type == "meta"
    assert updates._elements(p, (0, 1, 1)).shape == (2, 3)
    distances = torch.full((1,), -1.0, dtype=F64, device="meta")
    squares = reference.norms([p], [None], [], [None], distances)
    assert squares.device.type == "meta"
    assert reference.distance(p, torch.zeros(2, 3)).device.type == "meta"
    for flag in (INJECT, INJECT_ELEMENTS):
        grad = torch.zeros(2, 3, device="meta")
        reference.guide_(
            [p], [grad], [], [torch.zeros(2, 3)], torch.ones(5, dtype=F64),
            torch.tensor([flag], dtype=torch.uint8), [0], maximize=False, strength=1.0,
            threshold=2**31,
        )  # fmt: skip


def test_places_count_rows_of_blocks():
    x = torch.zeros(2, 3)
    assert updates._elements(x, None).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert updates._elements(x, (100, 2, 10)).tolist() == [[100, 101, 110], [111, 120, 121]]
