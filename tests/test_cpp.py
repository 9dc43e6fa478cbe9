# SPDX-License-Identifier: BSD-3-Clause
"""The C++ operators against dgg/reference/ in float64, called without an optimizer."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from dgg.kernels import layout

import rows
from cases import BF16, F16, F32, F64, cpp_missing
from dgg import _philox, reference
from rows import (
    ADAM,
    ADAM_CASES,
    DRAW,
    DTYPES,
    ELEMENTS,
    FIRST,
    FULL,
    GUIDE,
    HYPER,
    INJECT,
    ROUTES,
    SEED,
    SGD,
    SGD_CASES,
    SIGNED_SEED,
    SITUATIONS,
    THRESHOLD,
    Problem,
    addresses,
    assert_same_step,
    bits,
    numbers_of,
    reference_groups,
    reference_step,
    states_of,
)

pytestmark = pytest.mark.skipif(
    cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}"
)

ops = torch.ops.dgg
BLOCK, CHUNK = 1024, 32768  # kBlock of cpu_loops.h, kChunk of cpu_chunks.h
EDGES = [1, 3, 31, 33, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK + 1, 2 * CHUNK + 3]


def call(name, problem, hyper, flags, *, look_ahead=False, table=None, **options):
    """Runs one table operator on a problem."""
    options = {
        "replay_weight": 1.0, "grad_scale": 1.0, "seed": SIGNED_SEED, "draw": DRAW, **options,
    }  # fmt: skip
    if table is None:
        table = problem.table(states_of(name, hyper), stepped=name == "adam")
    if "route" in options:
        options["route"] = layout.ROUTES[options["route"]]
    gradients = (addresses(problem.grads), addresses(problem.replays))
    arguments = (table, *gradients, problem.coefficients, problem.flags(flags), numbers_of(hyper))
    if name == "guide":
        ops.guide_table_(*arguments, **options)
    else:
        operator = {"adam": ops.adam_table_, "sgd": ops.sgd_table_}[name]
        operator(*arguments, problem.distances, look_ahead=look_ahead, **options)


def norms(
    problem, which, *, distances=None, replay_weight=1.0, grad_scale=1.0, importance=0.0
):  # fmt: skip
    """Returns the squares of a problem's rows."""
    return ops.norms_table(
        problem.table(0), addresses(problem.grads), addresses(problem.replays),
        problem.distances if distances is None else distances,
        replay_weight=replay_weight, grad_scale=grad_scale, which=which, importance=importance,
    )  # fmt: skip


def products(problem, flags, **options):
    """Returns the products of a problem's rows."""
    return ops.products_table(
        problem.table(0), addresses(problem.grads), addresses(problem.replays), flags, **options
    )


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
    rows.check_update(call, "adam", {**ADAM, **ADAM_CASES[case]}, situation, [0, *EDGES[:-1]])


@pytest.mark.parametrize("situation", ROUTES)
@pytest.mark.parametrize("case", ["adamw", "adam", "amsgrad-maximize"])
def test_adam_routes(case, situation):
    rows.check_update(call, "adam", {**ADAM, **ADAM_CASES[case]}, situation, [0, *EDGES[:-1]])


@pytest.mark.parametrize("situation", [name for name in ROUTES if name.startswith("decoupled")])
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd_routes(case, situation):
    rows.check_update(call, "sgd", {**SGD, **SGD_CASES[case]}, situation, [0, *EDGES[:-1]])


@pytest.mark.parametrize("first", [0, FIRST])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd(case, situation, first):
    hyper = {**SGD, **SGD_CASES[case]}
    rows.check_update(call, "sgd", hyper, situation, [0, *EDGES[:-1]], first)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_guide(situation, maximize):
    hyper = {**GUIDE, "maximize": maximize}
    rows.check_update(call, "guide", hyper, situation, [0, *EDGES[:-1]])


def test_guide_without_guidance_leaves_every_bit():
    problem = Problem([5, BLOCK + 1], replay=False)
    problem.coefficients[0] = 1.0
    before = bits(problem.grads)
    call("guide", problem, {**GUIDE, "threshold": 2**32}, 0)
    assert bits(problem.grads) == before


@pytest.mark.parametrize("flags", [INJECT, ELEMENTS])
@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
def test_every_dtype_combination(name, flags):
    # Parameter, gradient, state and anchor in all combinations; the replay gradient takes turns.
    kinds = [
        (param, grad, DTYPES[number % 4], state, anchor)
        for number, (param, grad, state, anchor) in enumerate(itertools.product(DTYPES, repeat=4))
    ]
    rows.check_dtypes(call, norms, name, kinds, 37, flags)


@pytest.mark.parametrize("flags", [0, INJECT, ELEMENTS])
def test_any_thread_count_gives_the_same_bits(flags):
    threads = torch.get_num_threads()
    seen = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            problem = Problem([*EDGES, 5 * CHUNK + 17, 3])
            squares = norms(problem, 7, replay_weight=0.6, grad_scale=4.0)
            call("adam", problem, ADAM, flags, look_ahead=True, replay_weight=0.6)
            call("sgd", problem, SGD, flags, look_ahead=True, replay_weight=0.6)
            seen.add(bits([squares, problem.distances, *problem.tensors(3)]))
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
    problem = Problem([67] * len(kinds) + [BLOCK + 5], [*kinds, (F32,) * 5])
    problem.grads[3][5] = float("nan")
    squares = norms(problem, 7, replay_weight=0.6, grad_scale=4.0)
    for name in ("adam", "sgd"):
        call(name, problem, FULL[name], ELEMENTS, look_ahead=True, grad_scale=3.0)
    return bits([squares, problem.distances, *problem.tensors(3)])


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


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("offset", [1, 3])
def test_nothing_beyond_the_tensor_is_touched(dtype, offset):
    sizes = [*range(1, 40), BLOCK + 1, CHUNK + 1]
    problem = Problem(sizes, [(dtype,) * 5] * len(sizes), offset=offset)
    exact = problem.exact()
    call("adam", problem, FULL["adam"], ELEMENTS, replay_weight=0.6, look_ahead=True)
    reference_step("adam", exact, FULL["adam"], ELEMENTS, replay_weight=0.6)
    assert_same_step("adam", problem, exact, FULL["adam"], "sliding views")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(dtype, bad):
    rows.check_nan_and_infinity(call, dtype, bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HYPER)
def test_what_does_not_pull_does_not_reach_the_gradient(name, dtype, bad):
    rows.check_what_does_not_pull(call, name, dtype, bad)


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
                look_ahead=False, seed=0, draw=0, importances=[],
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
    rows.check_rows_without_gradient(call, 9)


def test_groups_have_their_own_numbers():
    problem = Problem([9, CHUNK + 9], replay=False)
    groups = [
        ADAM, {**ADAM, "lr": 0.2, "beta2": 0.7, "strength": 0.0, "decoupled": False},
    ]  # fmt: skip
    problem.groups = [0, 1]
    exact = problem.exact()
    call("adam", problem, groups, INJECT)
    reference_groups("adam", exact, groups, INJECT)
    assert_same_step("adam", problem, exact, ADAM, "two groups")


@pytest.mark.parametrize(
    "height,columns,first,width", [(6, 10, 4, 3), (5, 700, 100, 300), (4, 8, 0, 8)]
)
def test_element_draws_of_a_shard_are_those_of_the_whole(height, columns, first, width):
    whole = Problem([height * columns], replay=False)
    part = whole.copy()

    def cut(x):
        return x.view(height, columns)[:, first : first + width].reshape(-1).clone()

    for name in ("params", "grads", "anchors"):
        setattr(part, name, [cut(x) for x in getattr(whole, name)])
    part.states = [[cut(x) for x in state] for state in whole.states]
    part.shards = [(first, width, columns)]
    for problem in (whole, part):
        call("adam", problem, ADAM, ELEMENTS)
    assert torch.equal(part.params[0], cut(whole.params[0]))


def test_element_draws_beyond_2_to_the_34():
    # The counter's second word: an index whose quarter does not fit 32 bits.
    problem = Problem([64], replay=False)
    base = 2**34 + 2
    problem.shards = [(base, 64, 64)]
    exact = problem.exact()
    words = _philox.element_words(SEED, DRAW, problem.indices[0], torch.arange(base, base + 64))
    drawn = words < THRESHOLD
    assert 5 < drawn.sum() < 35
    exact.anchors = [torch.where(drawn, exact.anchors[0], exact.params[0])]
    call("adam", problem, ADAM, ELEMENTS)
    reference_step("adam", exact, ADAM, INJECT)
    assert_same_step("adam", problem, exact, ADAM, "large index")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_certain_element_draws(alpha):
    rows.check_certain_element_draws(call, alpha, BLOCK + 3)


# Norms and coefficients


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("replay", [False, True])
def test_norms(which, replay, importance):
    rows.check_norms(norms, which, replay, EDGES, importance)


@pytest.mark.parametrize("importance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype, replay, importance):
    rows.check_products(products, dtype, replay, EDGES, importance)


def test_products_of_extreme_numbers():
    rows.check_extreme_products(products)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", rows.GUARDS)
def test_guard_coefficients(name, max_grad_norm, per_tensor, maximize):
    rows.check_guard(ops.guard_coefficients, name, max_grad_norm, per_tensor, maximize)


def test_norms_of_many_equal_values_are_accurate():
    # Summed in one float32 number, 4 M equal squares come out too small.
    x = torch.full((2**22,), 1.1)
    (square,) = ops.norms(
        [x], [x], [], [], torch.full((1,), -1.0, dtype=F64),
        replay_weight=1.0, grad_scale=1.0, which=1, importances=[],
    )[0]  # fmt: skip
    assert abs(square.item() / x.double().square().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_written_parameters_take_their_masters_place(name, dtype):
    rows.check_adoption(call, name, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_norms_of_extreme_numbers(dtype):
    rows.check_extreme_norms(norms, call, dtype)


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [0, INJECT, ELEMENTS])
def test_look_ahead_is_the_next_norm_pass(dtype, flags, importance):
    rows.check_look_ahead(call, norms, "adam", dtype, EDGES, flags, importance)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("squares", rows.SQUARES)
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
    flags = torch.full((len(problem.params),), ELEMENTS, dtype=torch.uint8)
    weighing = dict(importances=problem.importances, importance=0.7)
    common = dict(replay_weight=0.6, grad_scale=4.0, **weighing)
    draws = dict(seed=SIGNED_SEED, draw=DRAW)
    lists = [problem.params, problem.grads, problem.replays]
    rest = [problem.coefficients, flags, problem.indices]
    yield "norms", [*lists, problem.anchors, problem.distances], {**common, "which": 7}
    yield (
        "adam_",
        [*lists, *problem.states, problem.anchors, problem.steps, problem.distances, *rest],
        {**FULL["adam"], **common, **draws, "look_ahead": True, "route": layout.BY_FIRST_MOMENT},
    )
    yield (
        "sgd_",
        [*lists, problem.states[0], problem.anchors, problem.distances, *rest],
        {**SGD, **common, **draws, "look_ahead": True, "route": layout.BY_DECOUPLED},
    )
    yield "guide_", [*lists, problem.anchors, *rest], {**FULL["guide"], **common, **draws}
    yield "products", [*lists, problem.anchors, torch.full_like(flags, INJECT)], common


def test_lists_and_tables_agree():
    kinds = [(F32,) * 5, (BF16,) * 5, (BF16, F32, BF16, F32, F16), (F64,) * 5]
    sizes = [33, BLOCK + 1, 5, 7]
    for place, name in enumerate(("norms", "adam", "sgd", "guide", "products")):
        problem = Problem(sizes, kinds)
        twin = problem.copy()
        operator, arguments, options = list(_list_calls(problem))[place]
        result = getattr(ops, operator)(*arguments, **options)
        weighed = {name: x for name, x in options.items() if name != "importances"}
        if name == "norms":
            assert torch.equal(result, norms(twin, **weighed))
            continue
        if name == "products":
            assert torch.equal(result, products(twin, arguments[-1], **weighed))
            continue
        how = {} if name == "guide" else {"look_ahead": True}
        how |= {"adam": {"route": "first_moment"}, "sgd": {"route": "decoupled"}}.get(name, {})
        call(
            name, twin, FULL[name], ELEMENTS, replay_weight=0.6, grad_scale=4.0, importance=0.7,
            **how,
        )  # fmt: skip
        for ours, theirs in zip(
            [*problem.tensors(3), *problem.grads, problem.distances],
            [*twin.tensors(3), *twin.grads, twin.distances],
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", range(5))
def test_opcheck(place):
    problem = Problem([33, 5])
    operator, arguments, options = list(_list_calls(problem))[place]
    torch.library.opcheck(getattr(ops, operator).default, tuple(arguments), options)


@pytest.mark.parametrize("place", range(5))
def test_list_operators_in_a_compiled_graph(place):
    """Compiled without a break, they change what they change outside: the schemas say all of it."""
    eager = Problem([33, 5])
    twin = eager.copy()
    operator, arguments, options = list(_list_calls(eager))[place]
    expected = getattr(ops, operator)(*arguments, **options)
    _, others, _ = list(_list_calls(twin))[place]
    call_it = torch.compile(
        lambda: getattr(ops, operator)(*others, **options), backend="aot_eager", fullgraph=True
    )
    found = call_it()
    assert expected is None and found is None or torch.equal(expected, found)
    for mine, theirs in zip(
        [*eager.tensors(3), *eager.steps, *eager.grads, eager.distances],
        [*twin.tensors(3), *twin.steps, *twin.grads, twin.distances],
        strict=True,
    ):
        assert torch.equal(mine, theirs)


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
    before = bits([*problem.params, problem.steps[1]])
    _, arguments, options = list(_list_calls(problem))[1]
    message = how.replace("states[0]", "exp_avgs[0]").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RuntimeError, match=message):
        ops.adam_(*arguments, **options)
    assert bits([*problem.params, problem.steps[1]]) == before


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda table: table[:, :13].contiguous(), r"shape \[n, 15\]"),
        (lambda table: table.index_fill(1, torch.tensor([7]), 1), "group 1 of 1"),
        (lambda table: table.index_fill(1, torch.tensor([8]), 4), "dtype code"),
        (lambda table: table.index_fill(1, torch.tensor([2]), 0), "no address for moment 1"),
        (lambda table: table.index_fill(1, torch.tensor([5]), 0), "no step"),
        (lambda table: table.int(), "dtype int64"),
    ],
)
def test_table_operator_refuses_a_bad_table(spoil, message):
    problem = Problem([9, 9], replay=False)
    before = bits([*problem.tensors(3), *problem.steps])
    with pytest.raises(RuntimeError, match=message):
        call("adam", problem, ADAM, 0, table=spoil(problem.table(2)))
    assert bits([*problem.tensors(3), *problem.steps]) == before


def test_isa_is_known():
    assert ops.isa() in ("avx512", "avx2", "baseline")
