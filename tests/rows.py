# SPDX-License-Identifier: BSD-3-Clause
"""Rows of tensors for one call of a kernel, what the reference makes of them, and what must agree.

The C++ operators, the Triton kernels and the CUDA kernels take the same table of rows. Each of
their tests brings two functions, and what is checked of every backend stands here once:

- ``call(name, problem, hyper, flags, **options)`` runs the kernel ``name`` of `HYPER`;
- ``norms(problem, which, **options)`` returns the squares of the rows.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from dgg.kernels import layout

from cases import BF16, F16, F32, F64, ROUNDING
from dgg import _philox, reference

DTYPES = [F32, BF16, F16, F64]  # in the order of their codes
THRESHOLD = _philox.threshold(0.3)
SEED, DRAW = 0x9E3779B97F4A7C15, 5  # the high word matters
SIGNED_SEED = SEED - 2**64  # as operators take it
INJECT, ELEMENTS, FIRST = reference.INJECT, reference.INJECT_ELEMENTS, reference.FIRST_STEP

ADAM = dict(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1, decoupled=True,
            amsgrad=False, maximize=False, strength=0.7, threshold=THRESHOLD)  # fmt: skip
ADAM_CASES = {
    "adamw": {},
    "adam": {"decoupled": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "decoupled": False},
    "far-lerp": {"beta1": 0.3},  # torch.lerp starts from the other end here
    "amsgrad-maximize": {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
}
SGD = dict(lr=3e-2, momentum=0.8, dampening=0.3, weight_decay=0.1, nesterov=False,
           maximize=False, strength=0.7, threshold=THRESHOLD)  # fmt: skip
SGD_CASES = {
    "momentum": {},
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "plain": {"momentum": 0.0},
    "maximize": {"maximize": True},
}
GUIDE = dict(maximize=False, strength=0.7, threshold=THRESHOLD)
HYPER = {"adam": ADAM, "sgd": SGD, "guide": GUIDE}
# With every buffer there is.
FULL = {"adam": {**ADAM, "amsgrad": True}, "sgd": SGD, "guide": {**GUIDE, "maximize": True}}
# Real gradients and their guidance as a step may combine them.
SITUATIONS = {
    "unguided": dict(flags=0, replay=False),
    "guided": dict(flags=INJECT, replay=False),
    "elements": dict(flags=ELEMENTS, replay=False),
    "replay": dict(flags=INJECT, replay=True, replay_weight=0.6),
    "scaled": dict(flags=ELEMENTS, replay=True, replay_weight=0.6, grad_scale=8.0),
    "weighted": dict(flags=INJECT, replay=False, importance=0.7),
    "weighted-elements": dict(flags=ELEMENTS, replay=True, importance=1.0),
}
# Where the pull enters, in situations that differ in what an update then has to do.
ROUTES = {
    "first-moment": dict(flags=INJECT, replay=False, route="first_moment"),
    "first-moment-weighted": dict(
        flags=ELEMENTS, replay=True, route="first_moment", importance=0.7
    ),
    "decoupled": dict(flags=INJECT, replay=False, route="decoupled"),
    "decoupled-weighted": dict(flags=ELEMENTS, replay=True, route="decoupled", importance=0.7),
}
# Of the real gradient, the gradient and the distance: usual ones, none, and such as are no numbers.
SQUARES = [
    [[4.0, 9.0, 1.0], [4.0, 0.0, 1.0], [16.0, 3.0, 0.0]],
    [[4.0, 9.0, 1.0], [0.0, 0.0, 0.0], [16.0, 3.0, 0.0]],
    [[4.0, 9.0, 1.0], [4.0, 9.0, 1.0], [0.0, 0.0, 0.0]],
    [[float("nan"), 9.0, 1.0], [4.0, float("nan"), 1.0], [9.0, 3.0, float("inf")]],
]
GUARD = 64  # elements of a buffer on either side of its tensor
SENTINEL = -77.0


def address(x: torch.Tensor | None) -> int:
    # An empty tensor that is there has no address of its own.
    return 0 if x is None else x.data_ptr() or 1


def addresses(tensors) -> torch.Tensor:
    return torch.tensor([address(x) for x in tensors], dtype=torch.int64)


def options_of(situation: str) -> dict:
    """Returns what a situation passes to a call beside its flags."""
    given = (SITUATIONS | ROUTES)[situation]
    return {key: value for key, value in given.items() if key not in ("flags", "replay")}


def states_of(name: str, hyper) -> int:
    """Returns how many moments a row has, with one set of numbers or a list of those."""
    if isinstance(hyper, list):
        return max(states_of(name, group) for group in hyper)
    if name == "adam":
        return 3 if hyper["amsgrad"] else 2
    return 1 if name == "sgd" and hyper["momentum"] else 0


def numbers_of(hyper) -> torch.Tensor:
    """Returns the numbers of all groups, float64, a row each."""
    groups = hyper if isinstance(hyper, list) else [hyper]
    return torch.tensor([[float(value) for value in group.values()] for group in groups], dtype=F64)


class Problem:
    """Rows of tensors of order one between guard zones, for one call.

    Args:
        sizes: Elements of every row.
        dtypes: Of parameter, gradient, replay gradient, moments, anchor, copy and importance, for
            all rows, or a list with a tuple for each row. Without the last the importance is as
            the anchor, without the last two a copy as the parameter.
        replay: Whether rows have a replay gradient.
        anchors: Whether they have an anchor.
        copies: Whether they have a copy.
        offset: Elements by which every tensor is off a multiple of 16 bytes.
        seed: Of the values.
    """

    def __init__(
        self, sizes, dtypes=(F32,) * 7, *, replay=True, anchors=True, copies=False, offset=0, seed=0
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = offset
        self.buffers = []
        kinds = [dtypes] * len(sizes) if isinstance(dtypes, tuple) else dtypes
        kinds = [(*kind, kind[0]) if len(kind) == 5 else kind for kind in kinds]
        self.kinds = kinds = [(*kind, kind[4]) if len(kind) == 6 else kind for kind in kinds]
        self.sizes = list(sizes)

        def make(place, positive=False):
            return [
                self._make(size, kind[place], positive)
                for size, kind in zip(sizes, kinds, strict=True)
            ]

        self.params, self.grads = make(0), make(1)
        self.replays = make(2) if replay else []
        self.states = [make(3, positive=place > 0) for place in range(3)]
        self.anchors = make(4) if anchors else [None] * len(sizes)
        self.copies = make(5) if copies else [None] * len(sizes)
        self.importances = make(6, positive=True) if anchors else [None] * len(sizes)
        for master, copy in zip(self.params, self.copies, strict=True):
            if copy is not None:  # the rounding of its master
                copy.copy_(master)
        n = len(sizes)
        self.steps = [self._make(1, F32).fill_(3 + row % 4).view(()) for row in range(n)]
        self.distances = torch.full((n,), -1.0, dtype=F64)
        self.indices = [7 * row + 1 for row in range(n)]
        self.shards = [(0, size, size) for size in sizes]  # base, stretch and stride
        scales = torch.linspace(0.4, 0.9, n, dtype=F64)
        self.coefficients = torch.cat([torch.tensor([0.45, 2.0, 3.0, 4.0], dtype=F64), scales])
        self.groups = [0] * n

    def _make(self, size, dtype, positive=False):
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype)
        assert buffer.data_ptr() % 16 == 0
        start = GUARD + self.offset
        view = buffer[start : start + size]
        self.buffers.append((buffer, start, size))
        x = torch.randn(size, generator=self.generator, dtype=F64)
        return view.copy_(x.abs() if positive else x)

    def assert_guards(self):
        for buffer, start, size in self.buffers:
            assert (buffer[:start] == SENTINEL).all() and (buffer[start + size :] == SENTINEL).all()

    def tensors(self, states):
        return [*self.params, *itertools.chain(*self.states[:states])]

    def everything(self):
        """Every byte that a launch could have written, as a digest."""
        return bits([*(buffer for buffer, _, _ in self.buffers), self.distances])

    def exact(self):
        """The same problem in float64, for the reference."""
        return self._with(lambda x: x.to(F64, copy=True))

    def copy(self):
        return self._with(torch.clone)

    def _with(self, change):
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("params", "grads", "replays", "anchors", "importances"):
            changed = [None if x is None else change(x) for x in getattr(self, name)]
            setattr(other, name, changed)
        other.states = [[change(x) for x in state] for state in self.states]
        other.steps = [step.clone() for step in self.steps]
        other.distances = self.distances.clone()
        return other

    def table(self, states=3, stepped=True):
        """Returns the table of rows, int64 [n, 15], with as many moments, with steps or without."""
        rows = []
        for row, param in enumerate(self.params):
            state = [self.states[place][row] if place < states else None for place in range(3)]
            tensors = [param, *state, self.anchors[row], self.steps[row] if stepped else None]
            kinds = [param, self.grads[row], self.replays[row] if self.replays else None, *state,
                     self.anchors[row], self.copies[row], self.importances[row]]  # fmt: skip
            codes = sum(
                DTYPES.index((param if x is None else x).dtype) << layout.SLOT_BITS * place
                for place, x in enumerate(kinds)
            )
            rows.append(
                [*map(address, tensors), param.numel(), self.groups[row], codes,
                 self.indices[row], *self.shards[row], address(self.copies[row]),
                 address(self.importances[row])]
            )  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64)

    def flags(self, flags):
        """Returns flags for every row, uint8, given one for all or one for each."""
        if not isinstance(flags, (list, torch.Tensor)):
            flags = [flags] * len(self.params)
        return torch.as_tensor(flags, dtype=torch.uint8)


ROUTE_BITS = {
    "gradient": 0, "first_moment": layout.FIRST_MOMENT_BIT, "decoupled": layout.DECOUPLED_BIT,
}  # fmt: skip


def variant_of(groups, flags, extra=0, *, importance=0.0, route="gradient"):
    """Returns the variant of a launch that rows with these numbers and flags need."""
    variant = extra
    if (flags & (INJECT | ELEMENTS)).any() or extra & layout.LOOK_AHEAD_BIT:
        variant |= layout.ANCHOR_BIT
    if (flags & ELEMENTS).any():
        variant |= layout.ELEMENTS_BIT
    if any(group.get("amsgrad") or group.get("momentum") for group in groups):
        variant |= layout.STATE_BIT
    if importance and variant & layout.ANCHOR_BIT:
        variant |= layout.IMPORTANCE_BIT
    return variant | ROUTE_BITS[route]


def reference_step(name, problem, hyper, flags, *, look_ahead=False, **options):
    """Runs the reference on a problem, with one set of numbers; flags as `Problem.flags` takes."""
    options = {"replay_weight": 1.0, "grad_scale": 1.0, "seed": SEED, "draw": DRAW, **options}
    if options.get("importance"):
        options["importances"] = problem.importances
    rest = (problem.coefficients, problem.flags(flags).tolist(), problem.indices)
    lists = (problem.params, problem.grads, problem.replays)
    if name == "guide":
        reference.guide_(*lists, problem.anchors, *rest, **hyper, **options)
    elif name == "adam":
        reference.adam_(
            *lists, *problem.states, problem.anchors, problem.steps, problem.distances, *rest,
            **hyper, look_ahead=look_ahead, **options,
        )  # fmt: skip
    else:
        reference.sgd_(
            *lists, problem.states[0], problem.anchors, problem.distances, *rest,
            **hyper, look_ahead=look_ahead, **options,
        )  # fmt: skip


def reference_groups(name, exact, groups, flags, **options):
    """Runs the reference on rows of several groups, ``exact.groups``, each with its numbers."""
    for number, hyper in enumerate(groups):
        part = object.__new__(Problem)
        part.__dict__.update(exact.__dict__)
        mine = [group == number for group in exact.groups]
        part.grads = [g if own else None for own, g in zip(mine, exact.grads, strict=True)]
        reference_step(name, part, hyper, flags, **options)


def assert_rounding(actual, exact, what, wide=True):
    """Asserts that stored values are the exact ones (float64) but for rounding.

    The arithmetic before storing, about ten float32 (float64) operations on terms of order one,
    matters absolutely, because terms may cancel. A float64 tensor of a row that computes in
    float32, which is not ``wide``, is as good as float32.
    """
    rule = ROUNDING[actual.dtype]
    unit = 2**-53 if actual.dtype == F64 and wide else 2**-24
    bound = rule["storage"] * exact.abs() + 10 * unit * exact.abs().clamp(min=1.0)
    bound += rule["absolute"]
    worst = ((actual.double() - exact).abs() / bound).max().item() if exact.numel() else 0.0
    assert worst <= 1.0, f"{what}: {worst:.2f} x the allowed rounding of {actual.dtype}"


def assert_same_step(name, problem, exact, hyper, what):
    """Asserts that a step wrote what the reference wrote, counted it, and touched nothing else."""
    states = states_of(name, hyper)
    ours = problem.grads if name == "guide" else problem.tensors(states)
    theirs = exact.grads if name == "guide" else exact.tensors(states)
    for place, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert (x is None) == (y is None)
        if x is not None:
            kind = problem.kinds[place % len(problem.kinds)]
            what_of = f"{name}, {what}, tensor {place} of {x.numel()}, dtypes {kind}"
            assert_rounding(x, y, what_of, wide=kind[0] == F64)
    if name == "adam":
        assert [s.item() for s in problem.steps] == [s.item() for s in exact.steps]
    problem.assert_guards()


def bits(tensors):
    return hashlib.sha256(
        b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    ).hexdigest()


# What is checked of every backend


def check_update(call, name, hyper, situation, sizes, first=0):
    """A step is the reference's, in every situation."""
    how, options = (SITUATIONS | ROUTES)[situation], options_of(situation)
    problem = Problem(sizes, replay=how["replay"])
    if first:  # what lies in a new buffer must not matter
        for buffer in problem.states[0]:
            buffer.fill_(float("nan"))
    exact = problem.exact()
    call(name, problem, hyper, how["flags"] | first, **options)
    reference_step(name, exact, hyper, how["flags"] | first, **options)
    assert_same_step(name, problem, exact, hyper, situation)
    assert (problem.distances == -1).all()


def check_dtypes(call, norms, name, kinds, size, flags, importance=0.0):
    """So it is in every combination of dtypes, and the look-ahead is the next norm's distance."""
    problem = Problem([size] * len(kinds), kinds)
    exact = problem.exact()
    options = {"replay_weight": 0.6, "grad_scale": 4.0}
    weighing = {"importance": importance} if importance else {}
    options |= weighing
    look_ahead = {} if name == "guide" else {"look_ahead": True}
    call(name, problem, FULL[name], flags, **options, **look_ahead)
    reference_step(name, exact, FULL[name], flags, **options)
    assert_same_step(name, problem, exact, FULL[name], f"flags {flags}")
    if name != "guide":
        unknown = torch.full_like(problem.distances, -1.0)
        squares = norms(problem, reference.NORM_DISTANCE, distances=unknown, **weighing)
        assert (problem.distances >= 0).all()
        assert torch.equal(squares[2], problem.distances) and torch.equal(squares[2], unknown)


def check_nan_and_infinity(call, dtype, bad):
    """They stay where they are."""
    problem = Problem([40, 40], (dtype,) * 5, replay=False)
    problem.grads[0][7] = bad
    problem.params[1][11] = bad
    exact = problem.exact()
    call("adam", problem, FULL["adam"], INJECT)
    reference_step("adam", exact, FULL["adam"], INJECT)
    for ours, theirs in zip(problem.tensors(3), exact.tensors(3), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
    assert problem.params[0].isnan().sum() == 1
    assert problem.states[2][0].isfinite().sum() == 39


def check_what_does_not_pull(call, name, dtype, bad):
    """Where nothing pulls, what a weight and its anchor are does not reach the gradient.

    Rows: drawn by element, drawn with a scale of 0, not drawn, and wholly drawn.
    """
    size = 5003  # whole vectors of every backend, and a rest
    flags = [ELEMENTS, INJECT, 0, INJECT]
    # Decay that is added to the gradient would bring the weight in by itself.
    hyper = {**FULL[name], **({} if name == "guide" else {"weight_decay": 0.0})}
    problem = Problem([size] * 4, (dtype,) * 5, replay=False)
    problem.coefficients[reference.SCALES + 1] = 0.0
    bad_places = torch.zeros(size, dtype=torch.bool)
    for param, anchor in zip(problem.params, problem.anchors, strict=True):
        param[::5] = bad
        anchor[1::7] = bad
        bad_places[::5] = bad_places[1::7] = True
    words = _philox.element_words(SEED, DRAW, problem.indices[0], torch.arange(size))
    pulled = torch.zeros(4, size, dtype=torch.bool)
    pulled[0], pulled[3] = words < THRESHOLD, True
    exact = problem.exact()
    call(name, problem, hyper, flags)
    reference_step(name, exact, hyper, flags)
    ours = problem.grads if name == "guide" else problem.states[0]
    theirs = exact.grads if name == "guide" else exact.states[0]
    for row in range(4):
        finite = ~(bad_places & pulled[row])
        assert torch.equal(ours[row].isfinite(), finite), f"row {row}"
        assert torch.equal(theirs[row].isfinite(), finite), f"row {row} of the reference"
        assert torch.equal(ours[row].isnan(), theirs[row].isnan()), f"row {row}"
        assert_rounding(ours[row][finite], theirs[row][finite], f"row {row}", dtype == F64)


def check_rows_without_gradient(call, size):
    """They are untouched; an empty one that has a gradient is counted."""
    problem = Problem([9, size, 9, 0])
    problem.grads[1] = problem.replays[1] = None
    problem.grads[2] = None  # a replay gradient only: stepped with w r
    problem.replays[0] = None
    exact = problem.exact()

    def second():
        state = [state[1] for state in problem.states]
        return bits([problem.params[1], *state, problem.steps[1]])

    before = second()
    problem.distances[1] = 5.0
    call("adam", problem, ADAM, INJECT, replay_weight=0.6, look_ahead=True)
    reference_step("adam", exact, ADAM, INJECT, replay_weight=0.6, look_ahead=True)
    assert second() == before
    assert problem.distances[1] == 5.0
    assert problem.distances[3] == 0.0
    assert_same_step("adam", problem, exact, ADAM, "replay only")


def check_certain_element_draws(call, alpha, size):
    """Every element is drawn, or none."""
    hyper = {**ADAM, "threshold": _philox.threshold(alpha)}
    problem = Problem([size], replay=False)
    other = problem.copy()
    call("adam", problem, hyper, ELEMENTS)
    call("adam", other, hyper, INJECT if alpha else 0)
    assert torch.equal(problem.params[0], other.params[0])


def check_norms(norms, which, replay, sizes, importance=0.0):
    """Squares and distances are the reference's, whatever is asked for and whatever is missing."""
    problem = Problem([0, *sizes, 7, 7, 7], replay=replay)
    problem.anchors[3] = None
    problem.grads[-1] = None  # with replay: a replay gradient only
    problem.grads[-2] = None
    if replay:
        problem.replays[-2] = problem.replays[4] = None
    problem.distances[5], problem.distances[6] = 123.0, float("nan")
    exact = problem.exact()
    options = {"replay_weight": 0.6, "grad_scale": 4.0}
    if importance:
        options["importance"] = importance
        problem.importances[1] = exact.importances[1] = None
    squares = norms(problem, which, **options)
    expected = reference.norms(
        exact.params, exact.grads, exact.replays, exact.anchors, exact.distances,
        which=which, importances=exact.importances if importance else (), **options,
    )  # fmt: skip
    for ours, theirs in ((squares, expected), (problem.distances, exact.distances)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)


def check_products(products, dtype, replay, sizes, importance, grad_scale=4.0):
    """Squares and products are the reference's; rows that are not guided count in the total alone.

    Args:
        products: problem, flags, options → float64 [6, n].
        dtype: Of all tensors.
        replay: Whether rows have a replay gradient.
        sizes: Elements of the rows.
        importance: The option.
        grad_scale: Divisor of the gradients.
    """
    problem = Problem([0, *sizes, 7, 7, 7, 7], (dtype,) * 7, replay=replay)
    problem.anchors[3] = problem.importances[4] = None
    problem.grads[-1] = None  # with replay: a replay gradient only
    problem.grads[-2] = None
    if replay:
        problem.replays[-2] = problem.replays[4] = None
    flags = [INJECT] * len(problem.sizes)
    flags[-3] = 0
    exact = problem.exact()
    options = {"replay_weight": 0.6, "grad_scale": grad_scale, "importance": importance}
    sums = products(problem, problem.flags(flags), **options)
    expected = reference.products(
        exact.params, exact.grads, exact.replays, exact.anchors, problem.flags(flags),
        importances=exact.importances if importance else (), **options,
    )  # fmt: skip
    # Products of vectors may cancel: their error is that of the factors' lengths.
    lengths = expected[[1, 2, 3]].sqrt()
    bounds = torch.stack([lengths[0] * lengths[2], lengths[1] * lengths[2]])
    torch.testing.assert_close(sums[:4], expected[:4], rtol=1e-6, atol=0)
    assert ((sums[4:] - expected[4:]).abs() <= 1e-6 * bounds).all()
    problem.assert_guards()


def check_extreme_products(products):
    """Products of finite float32 numbers neither overflow nor vanish; NaN and inf stay."""
    problem = Problem([5, 5, 5, 3000, 5], replay=True)
    largest, smallest = torch.finfo(F32).max, torch.finfo(F32).tiny
    for x in (problem.grads[0], problem.replays[0], problem.grads[3]):
        x.fill_(largest / 4)
    for x in (problem.grads[1], problem.replays[1]):
        x.fill_(smallest)
    problem.replays[2][3] = float("nan")
    problem.grads[4][0] = float("inf")
    exact = problem.exact()
    flags = problem.flags(INJECT)
    sums = products(problem, flags, replay_weight=0.5, grad_scale=1.0, importance=0.0)
    expected = reference.products(
        exact.params, exact.grads, exact.replays, exact.anchors, flags, replay_weight=0.5
    )
    lengths = expected[[1, 2, 3]].sqrt()
    bounds = torch.stack([lengths[0] * lengths[2], lengths[1] * lengths[2]])
    torch.testing.assert_close(sums[:4], expected[:4], rtol=1e-6, atol=0, equal_nan=True)
    finite = bounds.isfinite()
    assert torch.equal(sums[4:].isfinite(), expected[4:].isfinite())
    assert ((sums[4:] - expected[4:]).abs() <= 1e-6 * bounds)[finite].all()


# Sums over rows of which equation (7) makes something, or nothing: columns as `products` has rows.
GUARDS = {
    "conflict": [9.0, 4.0, 1.0, 4.0, -2.0, 1.5],
    "capped": [9.0, 4.0, 1.0, 4.0, -2.0, 1e-3],
    "no-conflict": [9.0, 4.0, 1.0, 4.0, 2.0, 1.5],
    "no-way-back": [9.0, 4.0, 1.0, 4.0, -2.0, -1.5],
    "at-the-anchor": [9.0, 4.0, 0.0, 4.0, -2.0, 0.0],
    "nan": [9.0, float("nan"), 1.0, 4.0, -2.0, 1.5],
    "inf": [9.0, 4.0, float("inf"), 4.0, -2.0, 1.5],
}


def check_guard(coefficients, name, max_grad_norm, per_tensor, maximize):
    """The strength of equation (7) is the reference's.

    Args:
        coefficients: products, options → float64 [4 + n + 2].
        name: One of GUARDS.
        max_grad_norm: Setting.
        per_tensor: Likewise.
        maximize: Likewise.
    """
    column = torch.tensor(GUARDS[name], dtype=F64).unsqueeze(1)
    others = torch.tensor([[3.0, 0.5], [2.0, 0.5], [0.2, 0.1], [1.0, 0.3], [-0.3, 0.1], [0.2, 0.1]])
    sums = torch.cat([column, others.double()], dim=1)
    settings = {"max_grad_norm": max_grad_norm, "per_tensor": per_tensor, "maximize": maximize}
    expected = reference.guard_coefficients(sums, **settings)
    ours = coefficients(sums, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0, equal_nan=True)


def check_extreme_norms(norms, call, dtype=torch.float32):
    """Squares of finite float32 numbers neither overflow nor vanish; NaN and inf stay."""
    sizes = [5, 5, 5, 5, 5, 20_000, 20_000, 5]
    problem = Problem(sizes, (dtype,) * 5, replay=False)
    largest = torch.finfo(dtype).max
    smallest = torch.finfo(dtype).tiny
    problem.grads[0][2] = min(largest, 1e30)
    problem.grads[1][2] = float("nan")
    problem.grads[2][2] = float("inf")
    problem.grads[3].fill_(largest)
    problem.grads[4].fill_(smallest)
    problem.grads[5].fill_(largest)
    problem.grads[6].zero_()
    problem.grads[6][12_345] = smallest
    squares = norms(problem, 7)
    expected = [g.double().square().sum().item() for g in problem.grads]
    assert squares[0, 1].isnan() and squares[0, 2].isinf()
    torch.testing.assert_close(
        squares[:2, :], torch.tensor(2 * [expected], dtype=F64), rtol=1e-6, atol=0, equal_nan=True
    )
    # Distances, in the norm pass and after an update that leaves the parameters where they are.
    for row, (theta, anchor) in enumerate(
        [(largest, 0.0), (smallest, 0.0), (1.0, 1.0), (0.0, -largest), (smallest, -smallest)]
    ):
        problem.params[row].fill_(theta)
        problem.anchors[row].fill_(anchor)
    problem.anchors[5].copy_(problem.params[5]).add_(smallest if dtype != F16 else 0)
    exact = [
        reference.distance(p, a).item()
        for p, a in zip(problem.params, problem.anchors, strict=True)
    ]
    unknown = torch.full_like(problem.distances, -1.0)
    squares = norms(problem, reference.NORM_DISTANCE, distances=unknown)
    exact = torch.tensor(exact, dtype=F64)
    torch.testing.assert_close(squares[2], exact, rtol=1e-6, atol=0)
    for grad in problem.grads:
        grad.zero_()
    call("sgd", problem, {**HYPER["sgd"], "lr": 0.0}, 0, look_ahead=True)
    # What an update cannot tell it leaves to the next norm pass.
    known = problem.distances >= 0
    torch.testing.assert_close(problem.distances[known], exact[known], rtol=1e-6, atol=0)
    squares = norms(problem, reference.NORM_DISTANCE, distances=problem.distances)
    torch.testing.assert_close(squares[2], exact, rtol=1e-6, atol=0)


def check_adoption(call, name, dtype, *, grad_scale=None):
    """A parameter that is no longer its master's rounding takes the master's place."""
    sizes, kind = [1, 7, 300, 2057], (F32, dtype, dtype, F32, F32, dtype)
    options = {} if grad_scale is None else {"grad_scale": grad_scale}
    written, adopted = (Problem(sizes, kind, copies=True) for _ in range(2))
    for row, copy in enumerate(written.copies):
        copy[:: row + 1] += 0.5
        copy[-1] = float("nan") if row == 3 else 0.0
    for master, copy, theirs in zip(adopted.params, written.copies, adopted.copies, strict=True):
        master.copy_(reference.adopted(master, copy))
        theirs.copy_(copy)
    for problem in (written, adopted):
        call(name, problem, HYPER[name], INJECT, look_ahead=True, **options)
    for ours, theirs in (
        (written.params, adopted.params),
        (written.copies, adopted.copies),
        (written.states[0], adopted.states[0]),
    ):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert all(
        torch.equal(p.to(dtype), c)
        for p, c in zip(written.params[:3], written.copies[:3], strict=True)
    )
    torch.testing.assert_close(written.distances, adopted.distances, rtol=0, atol=0, equal_nan=True)


def check_look_ahead(call, norms, name, dtype, sizes, flags, importance=0.0):
    """The distances that a step leaves are those that the next norm pass would find."""
    sizes = [0, *sizes]
    problem = Problem(sizes, (dtype,) * 5, replay=False)
    problem.anchors[2] = None
    weighing = {"importance": importance} if importance else {}
    call(name, problem, HYPER[name], flags, look_ahead=True, **weighing)
    unknown = torch.full_like(problem.distances, -1.0)
    squares = norms(problem, reference.NORM_DISTANCE, distances=unknown, **weighing)
    assert problem.distances[2] == unknown[2] == -1
    anchored = torch.tensor([x is not None for x in problem.anchors])
    assert torch.equal(problem.distances[anchored], squares[2][anchored])
    assert torch.equal(problem.distances, unknown)
    exact = [
        -1
        if a is None
        else reference.distance(
            p.double(), a.double(), f.double() if importance else None, importance
        ).item()
        for p, a, f in zip(problem.params, problem.anchors, problem.importances, strict=True)
    ]
    torch.testing.assert_close(problem.distances, torch.tensor(exact, dtype=F64), rtol=1e-6, atol=0)


def check_coefficients_of_the_pass(norms, coefficients, sizes, max_grad_norm, scaling, per_tensor):
    """What a norm pass makes of its squares is what the launch of its own makes of them.

    Args:
        norms: Runs the norms of a problem, with the settings and ``out`` for the coefficients.
        coefficients: Returns the coefficients of squares.
        sizes: Of the problem's tensors.
        max_grad_norm: Setting.
        scaling: Likewise.
        per_tensor: Likewise.
    """
    settings = dict(max_grad_norm=max_grad_norm, scaling=scaling, per_tensor=per_tensor)
    problem = Problem(sizes, replay=False)
    problem.grads[1] = None
    problem.anchors[2] = None
    for row in (1, len(sizes) - 1):  # a launch of other dtypes
        problem.params[row] = problem.params[row].double()
    twin_distances = problem.distances.clone()
    found = []
    for _ in range(2):  # the counter is ready for the next step
        out = torch.full((reference.SCALES + len(sizes),), float("nan"), dtype=F64)
        squares = norms(problem, which=7, out=out, **settings)
        assert torch.equal(out, coefficients(squares, **settings))
        assert (out[0] < 1) == (max_grad_norm is not None) and (out[1:4] > 0).all()
        found.append(bits([out, squares, problem.distances]))
        problem.distances.copy_(twin_distances)
    assert found[0] == found[1]
    # Nobody asks for them: they are left alone, and so are the squares.
    assert bits([norms(problem, which=7)]) == bits([squares])
