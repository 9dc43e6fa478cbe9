# SPDX-License-Identifier: BSD-3-Clause
"""The C++ operators against dgg/reference.py in float64, called without an optimizer."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from cases import BF16, F16, F32, F64, cpp_missing
from dgg import _philox, reference

pytestmark = pytest.mark.skipif(
    cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}"
)

ops = torch.ops.dgg
DTYPES = [F32, BF16, F16, F64]  # in the order of their codes
BLOCK, CHUNK = 1024, 32768  # kBlock and kChunk of cpu.cpp
EDGES = [1, 3, 31, 33, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK + 1, 2 * CHUNK + 3]

THRESHOLD = _philox.threshold(0.3)

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
# Real gradients and their guidance as a step may combine them.
SITUATIONS = {
    "unguided": dict(flags=0, replay=False),
    "guided": dict(flags=reference.INJECT, replay=False),
    "elements": dict(flags=reference.INJECT_ELEMENTS, replay=False),
    "replay": dict(flags=reference.INJECT, replay=True, replay_weight=0.6),
    "scaled": dict(flags=reference.INJECT_ELEMENTS, replay=True, replay_weight=0.6, grad_scale=8.0),
}
SEED, DRAW = 0x9E3779B97F4A7C15 - 2**64, 5  # the high word matters; as int64


class Problem:
    """Lists of tensors for one call, as the table operators and as the reference want them."""

    def __init__(self, sizes, *, dtypes=None, replay=True, anchors=True, seed=0, offset=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = offset
        self.buffers = []
        n = len(sizes)
        dtypes = dtypes or [(F32,) * 5] * n
        make = self._make
        self.params = [make(size, kind[0]) for size, kind in zip(sizes, dtypes, strict=True)]
        self.grads = [make(size, kind[1]) for size, kind in zip(sizes, dtypes, strict=True)]
        self.replays = [make(s, k[2]) for s, k in zip(sizes, dtypes, strict=True)] if replay else []
        self.states = [
            [
                make(size, kind[3], positive=place > 0)
                for size, kind in zip(sizes, dtypes, strict=True)
            ]
            for place in range(3)
        ]
        self.anchors = [
            make(size, kind[4]) if anchors else None
            for size, kind in zip(sizes, dtypes, strict=True)
        ]
        self.steps = [torch.tensor(float(3 + row % 4)) for row in range(n)]
        self.distances = torch.full((n,), -1.0, dtype=F64)
        self.indices = [7 * row + 1 for row in range(n)]
        scales = torch.linspace(0.4, 0.9, n, dtype=F64)
        self.coefficients = torch.cat([torch.tensor([0.45, 2.0, 3.0, 4.0], dtype=F64), scales])

    def _make(self, size, dtype, positive=False):
        """A tensor of order one, `offset` elements into a buffer of sentinels."""
        x = torch.randn(size, generator=self.generator, dtype=F64)
        buffer = torch.full((size + 2 * self.offset,), -77.0, dtype=dtype)
        self.buffers.append(buffer)
        view = buffer[self.offset : self.offset + size]
        return view.copy_(x.abs() if positive else x)

    def tensors(self, states):
        return [*self.params, *itertools.chain(*self.states[:states])]

    def exact(self):
        """The same problem in float64."""

        def promote(tensors):
            return [None if x is None else x.to(F64, copy=True) for x in tensors]

        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("params", "grads", "replays", "anchors"):
            setattr(other, name, promote(getattr(self, name)))
        other.states = [promote(state) for state in self.states]
        other.steps = [step.clone() for step in self.steps]
        other.distances = self.distances.clone()
        return other

    def copy(self):
        other = self.exact()
        for name in ("params", "grads", "replays", "anchors"):
            originals = getattr(self, name)
            setattr(other, name, [None if x is None else x.clone() for x in originals])
        other.states = [[x.clone() for x in state] for state in self.states]
        return other

    def table(self, states, stepped=True):
        rows = []
        for row, param in enumerate(self.params):
            state = [self.states[place][row] if place < states else None for place in range(3)]
            tensors = [param, *state, self.anchors[row], self.steps[row] if stepped else None]
            kinds = [param, self.grads[row], self.replays[row] if self.replays else None,
                     *state, self.anchors[row]]  # fmt: skip
            codes = sum(
                DTYPES.index((param if x is None else x).dtype) << 8 * place
                for place, x in enumerate(kinds)
            )
            n = param.numel()
            rows.append([*map(_address, tensors), n, 0, codes, self.indices[row], 0, n, n, 0])
        return torch.tensor(rows, dtype=torch.int64)

    def addresses(self):
        replays = [_address(r) for r in self.replays]
        return (torch.tensor([_address(g) for g in self.grads]),
                torch.tensor(replays, dtype=torch.int64))  # fmt: skip


def _address(x):
    # An empty tensor that is there has no address of its own.
    return 0 if x is None else x.data_ptr() or 1


def _options(situation):
    return {"replay_weight": 1.0, "grad_scale": 1.0, **{
        key: value for key, value in situation.items() if key not in ("flags", "replay")
    }}  # fmt: skip


def _call(name, problem, hyper, flags, *, states, look_ahead=False, table=None, **options):
    options = {"replay_weight": 1.0, "grad_scale": 1.0, "seed": SEED, "draw": DRAW, **options}
    table = problem.table(states, stepped=name == "adam") if table is None else table
    flags = torch.tensor([flags] * len(problem.params), dtype=torch.uint8)
    row = torch.tensor([[float(value) for value in hyper.values()]], dtype=F64)
    arguments = (table, *problem.addresses(), problem.coefficients, flags, row)
    if name == "guide":
        ops.guide_table_(*arguments, **options)
    else:
        operator = {"adam": ops.adam_table_, "sgd": ops.sgd_table_}[name]
        operator(*arguments, problem.distances, look_ahead=look_ahead, **options)


def _reference(name, problem, hyper, flags, *, look_ahead=False, **options):
    options = {
        "replay_weight": 1.0,
        "grad_scale": 1.0,
        "seed": SEED % 2**64,
        "draw": DRAW,
        **options,
    }
    flags = [flags] * len(problem.params)
    rest = (problem.coefficients, flags, problem.indices)
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


# Half the spacing of the storage dtype, relative; float16 also has an absolute spacing near zero.
# The arithmetic before it, about ten float32 (float64) operations on terms of order one, matters
# absolutely, because terms may cancel.
_STORAGE = {F32: 2**-24, BF16: 2**-8, F16: 2**-11, F64: 2**-53}


def _assert_rounding(actual, exact, what):
    unit = 2**-53 if actual.dtype == F64 else 2**-24
    bound = _STORAGE[actual.dtype] * exact.abs() + 10 * unit * exact.abs().clamp(min=1.0)
    if actual.dtype == F16:
        bound += 2**-25
    worst = ((actual.double() - exact).abs() / bound).max().item() if exact.numel() else 0.0
    assert worst <= 1.0, f"{what}: {worst:.2f} x the allowed rounding of {actual.dtype}"


def _assert_same_step(problem, exact, states, what):
    for row, (ours, theirs) in enumerate(
        zip(problem.tensors(states), exact.tensors(states), strict=True)
    ):
        _assert_rounding(ours, theirs, f"{what}, tensor {row} of {ours.numel()} x {ours.dtype}")


def _bits(tensors):
    return hashlib.sha256(
        b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    ).hexdigest()


# Philox


def test_philox_known_answer():
    assert ops.philox_words(0, 0, 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("n", [1, 2, 5, 4099])
def test_philox_matches_python(n):
    seed, draw, index = 2**63 + 12345, 2**32 + 7, 3
    words = ops.philox_words(seed - 2**64, draw, _philox.STREAM_ELEMENT + index, n)
    assert torch.equal(words, _philox.element_words(seed, draw, index, torch.arange(n)))


# Updates


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam(case, situation):
    hyper, how = {**ADAM, **ADAM_CASES[case]}, SITUATIONS[situation]
    problem = Problem([0, *EDGES[:-1]], replay=how["replay"])
    exact = problem.exact()
    states = 3 if hyper["amsgrad"] else 2
    _call("adam", problem, hyper, how["flags"], states=states, **_options(how))
    _reference("adam", exact, hyper, how["flags"], **_options(how))
    _assert_same_step(problem, exact, states, f"{case}, {situation}")
    assert [s.item() for s in problem.steps] == [s.item() for s in exact.steps]
    assert (problem.distances == -1).all()


@pytest.mark.parametrize("first", [0, reference.FIRST_STEP])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd(case, situation, first):
    hyper, how = {**SGD, **SGD_CASES[case]}, SITUATIONS[situation]
    problem = Problem([0, *EDGES[:-1]], replay=how["replay"])
    if first:  # what lies in a new buffer must not matter
        for buffer in problem.states[0]:
            buffer.fill_(float("nan"))
    exact = problem.exact()
    states = 1 if hyper["momentum"] else 0
    _call("sgd", problem, hyper, how["flags"] | first, states=states, **_options(how))
    _reference("sgd", exact, hyper, how["flags"] | first, **_options(how))
    _assert_same_step(problem, exact, states, f"{case}, {situation}")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_guide(situation, maximize):
    hyper = dict(maximize=maximize, strength=0.7, threshold=THRESHOLD)
    how = SITUATIONS[situation]
    problem = Problem([0, *EDGES[:-1]], replay=how["replay"])
    exact = problem.exact()
    _call("guide", problem, hyper, how["flags"], states=0, **_options(how))
    _reference("guide", exact, hyper, how["flags"], **_options(how))
    for ours, theirs in zip(problem.grads, exact.grads, strict=True):
        _assert_rounding(ours, theirs, situation)


def test_guide_without_guidance_leaves_every_bit():
    problem = Problem([5, BLOCK + 1], replay=False)
    problem.coefficients[0] = 1.0
    before = _bits(problem.grads)
    _call("guide", problem, dict(maximize=False, strength=0.7, threshold=2**32), 0, states=0)
    assert _bits(problem.grads) == before


@pytest.mark.parametrize("flags", [reference.INJECT, reference.INJECT_ELEMENTS])
@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
def test_every_dtype_combination(name, flags):
    # Parameter, gradient, state and anchor in all combinations; the replay gradient takes turns.
    kinds = [
        (param, grad, DTYPES[number % 4], state, anchor)
        for number, (param, grad, state, anchor) in enumerate(itertools.product(DTYPES, repeat=4))
    ]
    problem = Problem([37] * len(kinds), dtypes=kinds)
    exact = problem.exact()
    hyper, states = {
        "adam": ({**ADAM, "amsgrad": True}, 3),
        "sgd": (SGD, 1),
        "guide": (dict(maximize=True, strength=0.7, threshold=THRESHOLD), 0),
    }[name]
    options = {"replay_weight": 0.6, "grad_scale": 4.0}
    if name != "guide":
        options["look_ahead"] = True
    _call(name, problem, hyper, flags, states=states, **options)
    _reference(name, exact, hyper, flags, **options)
    written = problem.grads if name == "guide" else problem.tensors(states)
    expected = exact.grads if name == "guide" else exact.tensors(states)
    for place, (ours, theirs) in enumerate(zip(written, expected, strict=True)):
        kind = kinds[place % len(kinds)]
        if ours.dtype == F64 and kind[0] != F64:
            # Stored wider than the arithmetic is.
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        else:
            _assert_rounding(ours, theirs, f"{name}, tensor {place}, dtypes {kind}")
    if name != "guide":
        squares = ops.norms_table(
            problem.table(0), *problem.addresses(), torch.full_like(problem.distances, -1),
            replay_weight=0.6, grad_scale=4.0, which=reference.NORM_DISTANCE,
        )  # fmt: skip
        assert torch.equal(squares[2], problem.distances)


@pytest.mark.parametrize("flags", [0, reference.INJECT, reference.INJECT_ELEMENTS])
def test_any_thread_count_gives_the_same_bits(flags):
    threads = torch.get_num_threads()
    seen = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            problem = Problem([*EDGES, 5 * CHUNK + 17, 3])
            squares = ops.norms_table(
                problem.table(2), *problem.addresses(), problem.distances,
                replay_weight=0.6, grad_scale=4.0, which=7,
            )  # fmt: skip
            _call("adam", problem, ADAM, flags, states=2, look_ahead=True, replay_weight=0.6)
            _call("sgd", problem, SGD, flags, states=1, look_ahead=True, replay_weight=0.6)
            seen.add(_bits([squares, problem.distances, *problem.tensors(3)]))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


_ISA_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_cpp
print(test_cpp.ops.isa(), test_cpp.everything())
"""


def everything():
    """Bits of one step of everything, for comparing instruction sets across processes."""
    kinds = [(p, g, g, p, a) for p, g, a in itertools.product(DTYPES, repeat=3)]
    problem = Problem([67] * len(kinds) + [BLOCK + 5], dtypes=[*kinds, (F32,) * 5])
    problem.grads[3][5] = float("nan")
    flags = reference.INJECT_ELEMENTS
    squares = ops.norms_table(
        problem.table(2), *problem.addresses(), problem.distances,
        replay_weight=0.6, grad_scale=4.0, which=7,
    )  # fmt: skip
    for name, hyper, states in (("adam", {**ADAM, "amsgrad": True}, 3), ("sgd", SGD, 1)):
        _call(name, problem, hyper, flags, states=states, look_ahead=True, grad_scale=3.0)
    return _bits([squares, problem.distances, *problem.tensors(3)])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_any_instruction_set_gives_the_same_bits(isa):
    here = ops.isa()
    if here == "baseline" or here == isa:
        pytest.skip(f"this machine has nothing beyond {here}")
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ISA_SCRIPT, os.path.dirname(__file__)],
        env={**os.environ, "DGG_ISA": isa}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [isa, everything()]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [1, 3])
def test_nothing_beyond_the_tensor_is_touched(dtype, offset):
    sizes = [*range(1, 40), BLOCK + 1, CHUNK + 1]
    problem = Problem(sizes, dtypes=[(dtype,) * 5] * len(sizes), offset=offset)
    exact = problem.exact()
    flags = reference.INJECT_ELEMENTS
    hyper = {**ADAM, "amsgrad": True}
    _call("adam", problem, hyper, flags, states=3, replay_weight=0.6, look_ahead=True)
    _reference("adam", exact, hyper, flags, replay_weight=0.6)
    _assert_same_step(problem, exact, 3, "sliding views")
    for buffer in problem.buffers:
        assert (buffer[:offset] == -77).all() and (buffer[-offset:] == -77).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(dtype, bad):
    problem = Problem([40, 40], dtypes=[(dtype,) * 5] * 2, replay=False)
    problem.grads[0][7] = bad
    problem.params[1][11] = bad
    exact = problem.exact()
    hyper = {**ADAM, "amsgrad": True}
    _call("adam", problem, hyper, reference.INJECT, states=3)
    _reference("adam", exact, hyper, reference.INJECT)
    for ours, theirs in zip(problem.tensors(3), exact.tensors(3), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
    assert problem.params[0].isnan().sum() == 1
    assert problem.states[2][0].isfinite().sum() == 39


def test_half_conversions_are_exact_for_every_value():
    # All float16 values through a step that changes nothing, and their neighbourhood through one
    # that rounds.
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
    for dtype, values in ((F16, half), (BF16, half.view(torch.int16).view(BF16))):
        param = values.clone()
        zero = torch.zeros(len(values))
        coefficients, flags = torch.ones(5, dtype=F64), torch.zeros(1, dtype=torch.uint8)

        def step(param, grad, lr, coefficients=coefficients, flags=flags):
            ops.sgd_(
                [param], [grad], [], [], [], torch.zeros(1, dtype=F64), coefficients, flags, [0],
                lr=lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                maximize=False, strength=1.0, threshold=0, replay_weight=1.0, grad_scale=1.0,
                look_ahead=False, seed=0, draw=0,
            )  # fmt: skip

        step(param, zero, 0.5)
        numbers = ~values.isnan()
        assert torch.equal(param[numbers], values[numbers])
        assert param[~numbers].isnan().all()
        rough = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
        rough = rough * values.float().nan_to_num(1.0, 1.0, 1.0)
        rounded = torch.zeros(len(values), dtype=dtype)
        step(rounded, -rough, 1.0)
        assert torch.equal(rounded, rough.to(dtype))


def test_rows_without_gradient_are_untouched():
    problem = Problem([9, 9, 9], replay=True)
    problem.grads[1] = problem.replays[1] = None
    problem.grads[2] = None  # a replay gradient only: stepped with w r
    exact = problem.exact()
    before = _bits([problem.params[1], *(state[1] for state in problem.states), problem.steps[1]])
    problem.distances[1] = 5.0
    _call("adam", problem, ADAM, reference.INJECT, states=2, replay_weight=0.6, look_ahead=True)
    _reference("adam", exact, ADAM, reference.INJECT, replay_weight=0.6)
    after = _bits([problem.params[1], *(state[1] for state in problem.states), problem.steps[1]])
    assert before == after
    assert problem.distances[1] == 5.0
    _assert_same_step(problem, exact, 2, "replay only")


def test_groups_have_their_own_numbers():
    problem = Problem([9, CHUNK + 9], replay=False)
    other = {**ADAM, "lr": 0.2, "beta2": 0.7, "strength": 0.0, "decoupled": False}
    table = problem.table(2)
    table[1, 7] = 1
    hyper = torch.tensor([list(map(float, h.values())) for h in (ADAM, other)], dtype=F64)
    exact = problem.exact()
    ops.adam_table_(
        table, *problem.addresses(), problem.coefficients, torch.ones(2, dtype=torch.uint8), hyper,
        problem.distances, replay_weight=1.0, grad_scale=1.0, look_ahead=False, seed=1, draw=2,
    )  # fmt: skip
    grads = exact.grads
    for row, group in enumerate((ADAM, other)):
        exact.grads = [g if place == row else None for place, g in enumerate(grads)]
        _reference("adam", exact, group, reference.INJECT)
    _assert_same_step(problem, exact, 2, "two groups")


@pytest.mark.parametrize(
    "rows,columns,first,width", [(6, 10, 4, 3), (5, 700, 100, 300), (4, 8, 0, 8)]
)
def test_element_draws_of_a_shard_are_those_of_the_whole(rows, columns, first, width):
    whole = Problem([rows * columns], replay=False)
    part = whole.copy()

    def cut(x):
        return x.view(rows, columns)[:, first : first + width].reshape(-1).clone()

    for name in ("params", "grads", "anchors"):
        setattr(part, name, [cut(x) for x in getattr(whole, name)])
    part.states = [[cut(x) for x in state] for state in whole.states]
    table = part.table(2)
    table[0, 10:13] = torch.tensor([first, width, columns])
    for problem, addresses in ((whole, None), (part, table)):
        _call("adam", problem, ADAM, reference.INJECT_ELEMENTS, states=2, table=addresses)
    assert torch.equal(part.params[0], cut(whole.params[0]))


def test_element_draws_beyond_2_to_the_34():
    # The counter's second word: an index whose quarter does not fit 32 bits.
    problem = Problem([64], replay=False)
    table = problem.table(2)
    base = 2**34 + 2
    table[0, 10] = base
    exact = problem.exact()
    words = _philox.element_words(
        SEED % 2**64, DRAW, problem.indices[0], torch.arange(base, base + 64)
    )
    drawn = words < THRESHOLD
    assert 5 < drawn.sum() < 35
    exact.anchors = [torch.where(drawn, exact.anchors[0], exact.params[0])]
    _call("adam", problem, ADAM, reference.INJECT_ELEMENTS, states=2, table=table)
    _reference("adam", exact, ADAM, reference.INJECT)
    _assert_same_step(problem, exact, 2, "large index")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_certain_element_draws(alpha):
    hyper = {**ADAM, "threshold": _philox.threshold(alpha)}
    problem = Problem([BLOCK + 3], replay=False)
    other = problem.copy()
    _call("adam", problem, hyper, reference.INJECT_ELEMENTS, states=2)
    _call("adam", other, hyper, reference.INJECT if alpha else 0, states=2)
    assert torch.equal(problem.params[0], other.params[0])


# Norms and coefficients


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("replay", [False, True])
def test_norms(which, replay):
    sizes = [0, *EDGES, 7, 7, 7]
    problem = Problem(sizes, replay=replay)
    problem.anchors[3] = None
    problem.grads[-1] = None  # with replay: a replay gradient only
    problem.grads[-2] = None
    if replay:
        problem.replays[-2] = problem.replays[4] = None
    problem.distances[5], problem.distances[6] = 123.0, float("nan")
    exact = problem.exact()
    options = {"replay_weight": 0.6, "grad_scale": 4.0, "which": which}
    squares = ops.norms_table(problem.table(0), *problem.addresses(), problem.distances, **options)
    expected = reference.norms(
        exact.params, exact.grads, exact.replays, exact.anchors, exact.distances, **options
    )
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(
        problem.distances, exact.distances, rtol=1e-6, atol=0, equal_nan=True
    )


def test_norms_of_many_equal_values_are_accurate():
    # Summed in one float32 number, 4 M equal squares come out too small.
    x = torch.full((2**22,), 1.1)
    (square,) = ops.norms(
        [x], [x], [], [], torch.full((1,), -1.0, dtype=F64),
        replay_weight=1.0, grad_scale=1.0, which=1,
    )[0]  # fmt: skip
    assert abs(square.item() / x.double().square().sum().item() - 1) < 1e-6


def test_norms_overflow_to_infinity_and_keep_nan():
    problem = Problem([5, 5, 5], replay=False)
    problem.grads[0][2] = 1e30
    problem.grads[1][2] = float("nan")
    squares = ops.norms_table(
        problem.table(0), *problem.addresses(), problem.distances,
        replay_weight=1.0, grad_scale=1.0, which=7,
    )  # fmt: skip
    assert squares[0, 0] == squares[1, 0] == float("inf")
    assert squares[0, 1].isnan() and squares[:, 2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [0, reference.INJECT, reference.INJECT_ELEMENTS])
def test_look_ahead_is_the_next_norm_pass(dtype, flags):
    problem = Problem([0, *EDGES], dtypes=[(dtype,) * 5] * (1 + len(EDGES)), replay=False)
    problem.anchors[2] = None
    _call("adam", problem, ADAM, flags, states=2, look_ahead=True)
    unknown = torch.full_like(problem.distances, -1.0)
    squares = ops.norms_table(
        problem.table(0), *problem.addresses(), unknown,
        replay_weight=1.0, grad_scale=1.0, which=reference.NORM_DISTANCE,
    )  # fmt: skip
    assert problem.distances[2] == unknown[2] == -1
    anchored = torch.tensor([x is not None for x in problem.anchors])
    assert torch.equal(problem.distances[anchored], squares[2][anchored])
    assert torch.equal(problem.distances, unknown)
    exact = [
        reference.distance(p.double(), a.double()).item() if a is not None else -1
        for p, a in zip(problem.params, problem.anchors, strict=True)
    ]
    torch.testing.assert_close(problem.distances, torch.tensor(exact, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize(
    "squares",
    [
        [[4.0, 9.0, 1.0], [4.0, 0.0, 1.0], [16.0, 3.0, 0.0]],
        [[4.0, 9.0, 1.0], [0.0, 0.0, 0.0], [16.0, 3.0, 0.0]],
        [[4.0, 9.0, 1.0], [4.0, 9.0, 1.0], [0.0, 0.0, 0.0]],
        [[float("nan"), 9.0, 1.0], [4.0, float("nan"), 1.0], [9.0, 3.0, float("inf")]],
    ],
)
def test_coefficients(squares, per_tensor, scaling, max_grad_norm):
    squares = torch.tensor(squares, dtype=F64)
    options = dict(max_grad_norm=max_grad_norm, scaling=scaling, per_tensor=per_tensor)
    torch.testing.assert_close(
        ops.coefficients(squares, **options), reference.coefficients(squares, **options),
        rtol=1e-15, atol=0, equal_nan=True,
    )  # fmt: skip


# List operators


def _list_calls(problem):
    """Name, positional and keyword arguments of every list operator."""
    flags = torch.full((len(problem.params),), reference.INJECT_ELEMENTS, dtype=torch.uint8)
    common = dict(replay_weight=0.6, grad_scale=4.0)
    draws = dict(seed=SEED, draw=DRAW)
    lists = [problem.params, problem.grads, problem.replays]
    rest = [problem.coefficients, flags, problem.indices]
    amsgrad = {**ADAM, "amsgrad": True}
    guide = dict(maximize=True, strength=0.7, threshold=THRESHOLD)
    yield "norms", [*lists, problem.anchors, problem.distances], {**common, "which": 7}
    yield (
        "adam_",
        [*lists, *problem.states, problem.anchors, problem.steps, problem.distances, *rest],
        {**amsgrad, **common, **draws, "look_ahead": True},
    )
    yield (
        "sgd_",
        [*lists, problem.states[0], problem.anchors, problem.distances, *rest],
        {**SGD, **common, **draws, "look_ahead": True},
    )
    yield "guide_", [*lists, problem.anchors, *rest], {**guide, **common, **draws}


def test_lists_and_tables_agree():
    kinds = [(F32,) * 5, (BF16,) * 5, (BF16, F32, BF16, F32, F16), (F64,) * 5]
    sizes = [33, BLOCK + 1, 5, 7]
    flags = reference.INJECT_ELEMENTS
    for place, (name, hyper, states) in enumerate(
        [("norms", None, 0), ("adam", {**ADAM, "amsgrad": True}, 3), ("sgd", SGD, 1),
         ("guide", dict(maximize=True, strength=0.7, threshold=THRESHOLD), 0)]
    ):  # fmt: skip
        problem = Problem(sizes, dtypes=kinds)
        twin = problem.copy()
        operator, arguments, options = list(_list_calls(problem))[place]
        result = getattr(ops, operator)(*arguments, **options)
        if name == "norms":
            assert torch.equal(result, ops.norms_table(
                twin.table(0), *twin.addresses(), twin.distances, **options
            ))  # fmt: skip
            continue
        look_ahead = {} if name == "guide" else {"look_ahead": True}
        _call(
            name, twin, hyper, flags, states=states, replay_weight=0.6, grad_scale=4.0, **look_ahead
        )
        for ours, theirs in zip(
            [*problem.tensors(3), *problem.grads, problem.distances],
            [*twin.tensors(3), *twin.grads, twin.distances],
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", range(4))
def test_opcheck(place):
    problem = Problem([33, 5])
    operator, arguments, options = list(_list_calls(problem))[place]
    torch.library.opcheck(getattr(ops, operator).default, tuple(arguments), options)


def test_opcheck_coefficients():
    squares = torch.tensor([[4.0, 9.0], [4.0, 1.0], [16.0, 3.0]], dtype=F64)
    options = dict(max_grad_norm=0.5, scaling=True, per_tensor=True)
    torch.library.opcheck(ops.coefficients.default, (squares,), options)


def _spoil(problem, how):
    if how == "grads[1] has another shape":
        problem.grads[1] = problem.grads[1][:-1]
    elif how == "replays has 1 tensors":
        problem.replays = problem.replays[:1]
    elif how == "states[0] is not contiguous":
        problem.states[0][0] = torch.zeros(66)[::2]
    elif how == "anchors[1] must be":
        problem.anchors[1] = problem.anchors[1].int()
    elif how == "steps[0] must be":
        problem.steps[0] = torch.zeros(1, dtype=torch.int64)
    elif how == "exp_avg_sqs has 0":
        problem.states[1] = []
    elif how == "max_exp_avg_sqs has 0":
        problem.states[2] = []
    elif how == "coefficients must be":
        problem.coefficients = problem.coefficients[:-1]
    elif how == "distances must be":
        problem.distances = problem.distances.float()
    elif how == "indices has 1":
        problem.indices = [3]


@pytest.mark.parametrize(
    "how",
    [
        "grads[1] has another shape",
        "replays has 1 tensors",
        "states[0] is not contiguous",
        "anchors[1] must be",
        "steps[0] must be",
        "exp_avg_sqs has 0",
        "max_exp_avg_sqs has 0",
        "coefficients must be",
        "distances must be",
        "indices has 1",
    ],
)
def test_list_operator_names_what_is_wrong(how):
    problem = Problem([33, 5])
    _spoil(problem, how)
    before = _bits([*problem.params, problem.steps[1]])
    _, arguments, options = list(_list_calls(problem))[1]
    message = how.replace("states[0]", "exp_avgs[0]").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RuntimeError, match=message):
        ops.adam_(*arguments, **options)
    assert _bits([*problem.params, problem.steps[1]]) == before


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda table: table[:, :13].contiguous(), r"shape \[n, 14\]"),
        (lambda table: table.index_fill(1, torch.tensor([7]), 1), "group 1 of 1"),
        (lambda table: table.index_fill(1, torch.tensor([8]), 4), "dtype code"),
        (lambda table: table.index_fill(1, torch.tensor([2]), 0), "no address for moment 1"),
        (lambda table: table.index_fill(1, torch.tensor([5]), 0), "no step"),
        (lambda table: table.int(), "dtype int64"),
    ],
)
def test_table_operator_refuses_a_bad_table(spoil, message):
    problem = Problem([9, 9], replay=False)
    before = _bits([*problem.tensors(3), *problem.steps])
    with pytest.raises(RuntimeError, match=message):
        _call("adam", problem, ADAM, 0, states=2, table=spoil(problem.table(2)))
    assert _bits([*problem.tensors(3), *problem.steps]) == before


def test_isa_is_known():
    assert ops.isa() in ("avx512", "avx2", "baseline")
