# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels themselves, run on the CPU, against dgg/reference/ in float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from dgg.kernels import layout

import cuda_on_host
import rows
import test_gpu
from cases import BF16, F16, F32, F64, cpp_missing
from dgg import _philox, backends, reference
from dgg.backends import chunks, libraries
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
    variant_of,
)

pytestmark = pytest.mark.skipif(
    cuda_on_host.missing() is not None, reason=str(cuda_on_host.missing())
)

CHUNK = layout.CHUNK
# Around the elements of a vector, of a group of 256 threads and of a chunk; the last has more
# chunks than one thread adds up.
EDGES = [0, 1, 3, 5, 1023, 1024, 1027, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2050]
MANY = 33 * CHUNK + 7
RULES = {"adam": 0, "sgd": 1, "guide": 2}


@pytest.fixture(scope="module")
def kernels():
    return cuda_on_host.load()


class Launches:
    """The launches of a problem, one per dtype combination, as dgg/backends/chunks.py cuts them."""

    def __init__(self, kernels, problem, order=0):
        self.kernels, self.problem = kernels, problem
        self.table = problem.table()
        self.grads, self.replays = addresses(problem.grads), addresses(problem.replays)
        codes = self.table[:, layout.DTYPES].tolist()
        self.launches = chunks.cut(problem.sizes, codes, torch.device("cpu"))
        kernels.set_block_order(order)
        kernels.count_vector_accesses()

    def leading(self, launch):
        launch.partials.fill_(float("nan"))
        return [
            self.table, launch.rows, launch.chunks, launch.starts, launch.partials, launch.counters,
            self.grads, self.replays if self.problem.replays else None, launch.chunks.shape[0],
            launch.rows.shape[0], launch.dtypes,
        ]  # fmt: skip

    def call(self, name, integers, *numbers):
        def plain(value):
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                return value.data_ptr()
            return 0 if value is None else int(value)

        values = [plain(value) for value in integers]
        array = (ctypes.c_int64 * len(values))(*(v - 2**64 if v >= 2**63 else v for v in values))
        doubles = (ctypes.c_double * max(1, len(numbers)))(*numbers)
        assert getattr(self.kernels, name)(array, doubles) == 0

    def norms(
        self, *, replay_weight=1.0, grad_scale=None, which=7, gate=None, out=None,
        max_grad_norm=None, scaling=False, per_tensor=False, importance=0.0,
    ):  # fmt: skip
        n = len(self.problem.sizes)
        squares = torch.full((3, n), float("nan"), dtype=F64)
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        for launch in self.launches:
            last = out if launch is self.launches[-1] else None
            settings = [squares, last, n, max_grad_norm is not None, scaling, per_tensor]
            own = [self.problem.distances, squares, gate, scale, n, which]
            integers = [*self.leading(launch), *own, *settings]
            self.call("norms", integers, replay_weight, max_grad_norm or 0.0, importance)
            assert not launch.counters.any()
        return squares

    def products(
        self, flags, *, replay_weight=1.0, grad_scale=None, importance=0.0, out=None,
        max_grad_norm=None, per_tensor=False, maximize=False,
    ):  # fmt: skip
        n = len(self.problem.sizes)
        sums = torch.full((reference.PRODUCTS, n), float("nan"), dtype=F64)
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        for launch in self.launches:
            last = out if launch is self.launches[-1] else None
            settings = [sums, last, n, max_grad_norm is not None, per_tensor, maximize]
            integers = [*self.leading(launch), self.problem.flags(flags), sums, scale, *settings]
            self.call("products", integers, replay_weight, max_grad_norm or 0.0, importance)
            assert not launch.counters.any()
        return sums

    def update(
        self, name, hyper, flags, *, variant=None, replay_weight=1.0, grad_scale=None,
        found_inf=None, seed=SEED, draw=DRAW, draw_index=None, importance=0.0, route="gradient",
        extra=0,
    ):  # fmt: skip
        problem = self.problem
        flags, table = problem.flags(flags), numbers_of(hyper)
        if variant is None:
            groups = hyper if isinstance(hyper, list) else [hyper]
            variant = variant_of(groups, flags, extra, importance=importance, route=route)
        scale = None if grad_scale is None else torch.tensor([grad_scale])
        found = None if found_inf is None else torch.tensor(found_inf)
        index = None if draw_index is None else torch.tensor(draw_index)
        for launch in self.launches:
            own = [problem.coefficients, flags, table, problem.distances, scale, found, index]
            integers = [*self.leading(launch), *own, seed, draw, variant, RULES[name]]
            self.call("update", integers, replay_weight, importance)
            assert not launch.counters.any()


CASES = [
    *(("adam", case, {**ADAM, **change}) for case, change in ADAM_CASES.items()),
    *(("sgd", case, {**SGD, **change}) for case, change in SGD_CASES.items()),
    ("guide", "minimize", GUIDE),
    ("guide", "maximize", {**GUIDE, "maximize": True}),
]
CASE_IDS = [f"{name}-{case}" for name, case, _ in CASES]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name,case,hyper", CASES, ids=CASE_IDS)
def test_update(kernels, name, case, hyper, situation):
    def call(name, problem, *arguments, **options):
        Launches(kernels, problem).update(name, *arguments, **options)

    rows.check_update(call, name, hyper, situation, EDGES)


@pytest.mark.parametrize("situation", ROUTES)
@pytest.mark.parametrize("case", ["adamw", "adam", "amsgrad-maximize"])
def test_adam_routes(kernels, case, situation):
    def call(name, problem, *arguments, **options):
        Launches(kernels, problem).update(name, *arguments, **options)

    rows.check_update(call, "adam", {**ADAM, **ADAM_CASES[case]}, situation, EDGES)


@pytest.mark.parametrize("situation", [name for name in ROUTES if name.startswith("decoupled")])
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd_routes(kernels, case, situation):
    def call(name, problem, *arguments, **options):
        Launches(kernels, problem).update(name, *arguments, **options)

    rows.check_update(call, "sgd", {**SGD, **SGD_CASES[case]}, situation, EDGES)


# Dtype combinations


# Parameter, gradient, replay gradient, moments, anchor, copy: those with kernels of their own.
COMBINATIONS = [
    (F32,) * 5,
    (BF16,) * 5,
    (F16,) * 5,
    (F64,) * 5,
    (F32, F32, F32, F32, BF16),
    (BF16, BF16, BF16, F32, BF16),
    (BF16, BF16, BF16, F32, F32),
    (F16, F16, F16, F32, F32),
    (BF16, F32, F32, F32, BF16),
    (F32, BF16, BF16, F32, F32),
    (F32, F16, F16, F32, F32),
]


def _name(kind):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in kind)


@pytest.mark.parametrize("situation", ["unguided", "guided", "elements", "replay"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", COMBINATIONS, ids=_name)
def test_kernels_of_their_own(kernels, kind, name, situation):
    how, hyper = SITUATIONS[situation], HYPER[name]
    # Two groups of vectors at least, whatever their width, and a rest.
    problem = Problem([CHUNK + 4 * 1024 + 5, 7], kind, replay=how["replay"])
    exact = problem.exact()
    launches = Launches(kernels, problem)
    launches.update(name, hyper, how["flags"], **rows.options_of(situation))
    assert len(launches.launches) == 1 and kernels.count_vector_accesses() > 0
    reference_step(name, exact, hyper, how["flags"], **rows.options_of(situation))
    assert_same_step(name, problem, exact, hyper, situation)


# Those of which also kernels have their own that weigh the pull, or let it enter elsewhere than in
# the gradient; a copy and the importance follow.
ROUTED = [(F32,) * 7, (BF16,) * 7, (BF16, BF16, BF16, F32, BF16, BF16, BF16)]


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("route", ["gradient", "first_moment", "decoupled"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ROUTED, ids=_name)
def test_routed_kernels_of_their_own(kernels, kind, name, route, replay):
    """Rows with an importance and without one, which look ahead, too."""
    problem = Problem([CHUNK + 4 * 1024 + 5, 7, 2048], kind, replay=replay)
    problem.importances[2] = None
    exact = problem.exact()
    launches = Launches(kernels, problem)
    options = {"importance": 0.7, "route": route, "replay_weight": 0.6}
    launches.update(name, HYPER[name], INJECT, extra=layout.LOOK_AHEAD_BIT, **options)
    assert kernels.count_vector_accesses() > 0
    reference_step(name, exact, HYPER[name], INJECT, **options)
    assert_same_step(name, problem, exact, HYPER[name], route)
    found = problem.distances.clone()
    problem.distances.fill_(-1.0)
    squares = Launches(kernels, problem).norms(which=reference.NORM_DISTANCE, importance=0.7)
    assert torch.equal(squares[2], found) and (found > 0).all()


def test_a_weight_of_one_half_of_ones_is_no_weight(kernels):
    """The routed kernels, with what changes nothing, give the bits of the others."""
    for name, kind in itertools.product(("adam", "sgd"), ((F32,) * 7, (BF16,) * 7)):
        plain, routed = (Problem([CHUNK + 1029, 3], kind) for _ in range(2))
        for x in routed.importances:
            x.fill_(1.0)
        options = {"replay_weight": 0.6, "extra": layout.LOOK_AHEAD_BIT}
        Launches(kernels, plain).update(name, HYPER[name], INJECT, **options)
        Launches(kernels, routed).update(name, HYPER[name], INJECT, importance=0.5, **options)
        for x, y in zip(plain.importances, routed.importances, strict=True):
            x.copy_(y)
        assert plain.everything() == routed.everything()


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("flags", [0, INJECT, ELEMENTS])
@pytest.mark.parametrize("name", RULES)
def test_every_dtype_combination(kernels, name, flags, importance):
    # Parameter, gradient, state and anchor in all combinations; the replay gradient takes turns.
    kinds = [
        (param, grad, DTYPES[number % 4], state, anchor, param, DTYPES[number // 3 % 4])
        for number, (param, grad, state, anchor) in enumerate(itertools.product(DTYPES, repeat=4))
    ]

    def norms(problem, which, *, distances, **options):
        known, problem.distances = problem.distances, distances
        squares = Launches(kernels, problem).norms(which=which, **options)
        problem.distances = known
        return squares

    rows.check_dtypes(_caller(kernels), norms, name, kinds, 1027, flags, importance)


def _caller(kernels):
    """Returns what `rows` calls to run an update."""

    def call(name, problem, hyper, flags, *, look_ahead=False, **options):
        extra = layout.LOOK_AHEAD_BIT if look_ahead else 0
        Launches(kernels, problem).update(name, hyper, flags, extra=extra, **options)

    return call


@pytest.mark.parametrize("route", layout.ROUTES)
@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_same_bits_as_the_cpu_backend(kernels, name, importance, route):
    if cpp_missing() is not None:
        pytest.skip(f"C++ backend missing: {cpp_missing()}")
    hyper = {**HYPER[name]}
    ours, theirs = Problem([CHUNK + 2049, 3, 1024]), Problem([CHUNK + 2049, 3, 1024])
    options = {"replay_weight": 0.6, "grad_scale": 4.0, "importance": importance}
    Launches(kernels, ours).update(name, hyper, ELEMENTS, route=route, **options)
    operator = getattr(torch.ops.dgg, f"{name}_table_")
    operator(
        theirs.table(), addresses(theirs.grads), addresses(theirs.replays), theirs.coefficients,
        theirs.flags(ELEMENTS), numbers_of(hyper), theirs.distances,
        look_ahead=False, seed=SIGNED_SEED, draw=DRAW, route=layout.ROUTES[route], **options,
    )  # fmt: skip
    assert ours.everything() == theirs.everything()


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_written_parameters_take_their_masters_place(kernels, name, dtype, importance):
    def call(name, problem, hyper, flags, *, look_ahead, **options):
        extra = layout.COPY_BIT | (layout.LOOK_AHEAD_BIT if look_ahead else 0)
        Launches(kernels, problem).update(
            name, hyper, flags, extra=extra, importance=importance, **options
        )

    rows.check_adoption(call, name, dtype)


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_what_does_not_pull_does_not_reach_the_gradient(kernels, name, dtype, bad, importance):
    def call(name, problem, *arguments):
        problem.importances = [None] * 4  # rows without one, in the kernels that weigh
        Launches(kernels, problem).update(name, *arguments, importance=importance)

    rows.check_what_does_not_pull(call, name, dtype, bad)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_norms_of_extreme_numbers(kernels, dtype):
    def call(name, problem, hyper, flags, *, look_ahead):
        variant = variant_of(
            [hyper], problem.flags(flags), layout.LOOK_AHEAD_BIT | layout.ANCHOR_BIT
        )
        Launches(kernels, problem).update(name, hyper, flags, variant=variant)

    def norms(problem, which, *, distances=None):
        known = problem.distances
        problem.distances = known if distances is None else distances
        squares = Launches(kernels, problem).norms(which=which)
        problem.distances = known
        return squares

    rows.check_extreme_norms(norms, call, dtype)


# Where the elements lie


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("kind", [(F32,) * 5, (BF16,) * 5, (F64,) * 5, (F32, F16, BF16, F64, F32)])
@pytest.mark.parametrize("name", RULES)
def test_misaligned_views(kernels, name, kind, importance):
    hyper = FULL[name]
    results, vectors = set(), []
    for offset in (0, 1, 3):
        problem = Problem(EDGES, kind, offset=offset)
        launches = Launches(kernels, problem)
        squares = launches.norms(replay_weight=0.6, importance=importance)
        flags = INJECT if importance else ELEMENTS  # kernels of their own, where there are any
        launches.update(
            name, hyper, flags, replay_weight=0.6, importance=importance,
            extra=layout.LOOK_AHEAD_BIT if name != "guide" else 0,
        )  # fmt: skip
        vectors.append(kernels.count_vector_accesses())
        problem.assert_guards()
        written = [*problem.tensors(3), *problem.grads, problem.distances, squares]
        results.add(bits(written))
    assert len(results) == 1
    assert vectors[0] > 0 and vectors[1] == vectors[2] == 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "shard", [(0, 40, 100), (8, 12, 16), (2, 10, 31), (5, 1, 3), (96, 4096, 5000)]
)
def test_element_draws_of_a_shard(kernels, name, shard):
    base, stretch, stride = shard
    n = CHUNK + 2049
    local = torch.arange(n)
    index = base + (local // stretch) * stride + local % stretch
    whole = int(index.max()) + 1
    problem = Problem([n], replay=False)
    problem.shards = [shard]
    exact = problem.exact()
    unsharded = Problem([whole], replay=False).exact()
    lists = ("params", "grads", "anchors")
    for mine, theirs in zip(
        [*(getattr(exact, key)[0] for key in lists), *(state[0] for state in exact.states)],
        [*(getattr(unsharded, key)[0] for key in lists), *(state[0] for state in unsharded.states)],
        strict=True,
    ):
        theirs[index] = mine
    Launches(kernels, problem).update(name, HYPER[name], ELEMENTS)
    reference_step(name, unsharded, HYPER[name], ELEMENTS)
    for mine, theirs in zip(
        [exact.params, exact.grads, *exact.states],
        [unsharded.params, unsharded.grads, *unsharded.states],
        strict=True,
    ):
        mine[0].copy_(theirs[0][index])
    exact.steps = unsharded.steps
    assert_same_step(name, problem, exact, HYPER[name], f"shard {shard}")
    whole_blocks = all(number % 4 == 0 for number in shard)
    assert (kernels.count_vector_accesses() > 0) == whole_blocks


def test_element_masks_are_exact(kernels):
    # With a learning rate of 1 and nothing else, what moved is the mask.
    n = 2 * CHUNK + 13
    problem = Problem([n], replay=False)
    problem.params[0].fill_(1.0)
    problem.anchors[0].zero_()
    problem.grads[0].zero_()
    hyper = {**SGD, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    Launches(kernels, problem).update("sgd", hyper, ELEMENTS)
    words = _philox.element_words(SEED, DRAW, problem.indices[0], torch.arange(n))
    assert torch.equal(problem.params[0] != 1.0, words < THRESHOLD)


def test_draw_index_on_the_device(kernels):
    draw = 2**40 + 77
    problems = [Problem([1029], replay=False) for _ in range(2)]
    Launches(kernels, problems[0]).update("sgd", SGD, ELEMENTS, draw=3, draw_index=draw)
    Launches(kernels, problems[1]).update("sgd", SGD, ELEMENTS, draw=draw % 2**32)
    assert problems[0].everything() == problems[1].everything()


# Rows


@pytest.mark.parametrize("name", RULES)
def test_rows_with_one_gradient_or_none(kernels, name):
    hyper = HYPER[name]
    problem = Problem([1029, 1030, 5, 1031, 0, 0])
    problem.grads[0] = None  # only a replay gradient
    problem.replays[1] = None
    for row in (2, 5):
        problem.grads[row] = problem.replays[row] = None
    if name == "guide":  # the caller gives every replay gradient a gradient to go into
        problem.replays[0] = None
    problem.distances.fill_(0.25)
    exact = problem.exact()
    before = [t.clone() for t in (problem.params[2], problem.states[0][2], problem.steps[2])]
    Launches(kernels, problem).update(name, hyper, INJECT, replay_weight=0.6)
    reference_step(name, exact, hyper, INJECT, replay_weight=0.6)
    assert_same_step(name, problem, exact, hyper, "rows")
    if name == "guide":
        return
    after = [problem.params[2], problem.states[0][2], problem.steps[2]]
    assert all(map(torch.equal, before, after))
    assert problem.distances.tolist() == [-1, -1, 0.25, -1, -1, 0.25]


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0]])
def test_launch_of_empty_rows(kernels, sizes):
    problem = Problem(sizes, replay=False)
    launches = Launches(kernels, problem)
    assert (launches.norms() == 0).all() and (problem.distances == 0).all()
    variant = layout.ANCHOR_BIT | layout.LOOK_AHEAD_BIT
    launches.update("adam", ADAM, INJECT, variant=variant)
    launches.update("sgd", SGD, INJECT, variant=variant)
    launches.update("guide", GUIDE, INJECT)
    assert [s.item() for s in problem.steps] == [4 + row for row in range(len(sizes))]
    assert (problem.distances == 0).all()


def test_groups_with_and_without_optional_state(kernels):
    for name, one, other in (
        ("adam", {**ADAM, "amsgrad": True}, {**ADAM, "lr": 0.1}),
        ("sgd", SGD, {**SGD, "momentum": 0.0, "nesterov": True, "lr": 0.1}),
    ):
        problem = Problem([CHUNK + 1, 1029, 77, 2050], replay=False)
        problem.groups = [0, 1, 1, 0]
        exact = problem.exact()
        untouched = [problem.states[2 if name == "adam" else 0][row].clone() for row in (1, 2)]
        Launches(kernels, problem).update(name, [one, other], INJECT)
        reference_groups(name, exact, [one, other], INJECT)
        assert_same_step(name, problem, exact, one, "groups")
        for row, before in zip((1, 2), untouched, strict=True):
            assert torch.equal(problem.states[2 if name == "adam" else 0][row], before)


@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_first_step_of_momentum(kernels, momentum):
    hyper = {**SGD, "momentum": momentum}
    problem = Problem([CHUNK + 1027, 5], replay=False)
    for buffer in problem.states[0]:
        buffer.fill_(float("nan"))  # what lies in a new buffer must not matter
    exact = problem.exact()
    Launches(kernels, problem).update("sgd", hyper, INJECT | FIRST)
    reference_step("sgd", exact, hyper, INJECT | FIRST)
    assert_same_step("sgd", problem, exact, hyper, "first step")


@pytest.mark.parametrize("weighted", [0, layout.IMPORTANCE_BIT])
def test_rows_that_neither_inject_nor_look_ahead_do_not_read_their_anchors(kernels, weighted):
    n, groups = 2 * CHUNK, 2 * CHUNK // 1024
    counts = {}
    for flags in (0, INJECT):
        for look_ahead in (0, layout.LOOK_AHEAD_BIT):
            problem = Problem([n], replay=False)
            variant = layout.ANCHOR_BIT | look_ahead | weighted
            Launches(kernels, problem).update("adam", ADAM, flags, variant=variant, importance=0.7)
            counts[flags, look_ahead] = kernels.count_vector_accesses() / groups / 256
    plain = 4 + 2  # stores of the parameter are ordinary ones, which do not count
    guided = plain + (2 if weighted else 1)
    assert counts == {(0, 0): plain, (INJECT, 0): guided, (0, layout.LOOK_AHEAD_BIT): guided,
                      (INJECT, layout.LOOK_AHEAD_BIT): guided}  # fmt: skip


@pytest.mark.parametrize("pull", ["strength", "coefficient", "threshold", "no anchor"])
def test_no_pull_is_no_guidance(kernels, pull):
    hyper, flags = dict(SGD), INJECT
    problem = Problem([1029], replay=False, anchors=pull != "no anchor")
    if pull != "no anchor":
        problem.anchors[0].fill_(float("nan"))
    if pull == "strength":
        hyper["strength"] = 0.0
    elif pull == "coefficient":
        problem.coefficients[reference.SCALES] = 0.0
    elif pull == "threshold":
        hyper["threshold"], flags = 0, ELEMENTS
    exact = problem.exact()
    Launches(kernels, problem).update("sgd", hyper, flags)
    reference_step("sgd", exact, hyper, 0)
    assert_same_step("sgd", problem, exact, hyper, pull)


def test_guide_without_guidance_leaves_every_bit(kernels):
    problem = Problem([1029, 5], replay=False)
    problem.coefficients[0] = 1.0
    before = problem.everything()
    Launches(kernels, problem).update("guide", {**GUIDE, "threshold": 2**32}, 0)
    assert problem.everything() == before and kernels.count_vector_accesses() == 0


@pytest.mark.parametrize("found", [1.0, float("nan")])
@pytest.mark.parametrize("name", RULES)
def test_found_inf_changes_nothing(kernels, name, found):
    problem = Problem([CHUNK + 5, 3, 0])
    before = problem.everything()
    launches = Launches(kernels, problem)
    variant = layout.ANCHOR_BIT | (layout.LOOK_AHEAD_BIT if name != "guide" else 0)
    launches.update(name, HYPER[name], INJECT, found_inf=found, variant=variant)
    assert problem.everything() == before
    launches.update(name, HYPER[name], INJECT, found_inf=0.0, variant=variant)
    assert problem.everything() != before


# Rounding


@pytest.mark.parametrize("flags", [0, ELEMENTS])
@pytest.mark.parametrize(
    "kind", [(BF16,) * 5, (BF16, BF16, BF16, F32, BF16), (BF16, F32) + (F32,) * 3]
)
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_stochastic_rounding(kernels, name, kind, flags):
    sizes = [CHUNK + 1029, 3]
    problem = Problem(sizes, kind, replay=False)
    # The same values in float32 give what is to be rounded.
    wide = Problem(sizes, (F32, *kind[1:]), replay=False)
    for ours, theirs in zip(problem.params, wide.params, strict=True):
        theirs.copy_(ours)
    extra = layout.STOCHASTIC_BIT | (layout.STATE_BIT if name == "sgd" else 0)
    flag_list = problem.flags(flags)
    variant = variant_of([HYPER[name]], flag_list, extra)
    Launches(kernels, problem).update(name, HYPER[name], flags, variant=variant)
    Launches(kernels, wide).update(name, HYPER[name], flags)
    for row, size in enumerate(sizes):
        expected = _rounded(wide.params[row], problem.indices[row], torch.arange(size))
        assert torch.equal(problem.params[row].view(torch.int16), expected.view(torch.int16))
        assert torch.equal(problem.states[0][row], wide.states[0][row])
    assert not torch.equal(problem.params[0], wide.params[0].to(BF16))
    problem.assert_guards()


def _rounded(exact, index, elements):
    """What the specification says: the upper half of bits + (word & 0xFFFF)."""
    quad = elements >> 2
    stream = 0xC0000000 + index
    words = _philox.block(SEED, (quad & 0xFFFFFFFF, quad >> 32, 0 * quad + DRAW, 0 * quad + stream))
    word = torch.stack(words).gather(0, (elements & 3)[None])[0]
    bits = exact.view(torch.int32).long() & 0xFFFFFFFF
    upper = ((bits + (word & 0xFFFF)) >> 16).to(torch.int32).to(torch.int16).view(BF16)
    return torch.where(exact.isfinite(), upper, exact.to(BF16))


def test_stochastic_rounding_of_infinities_and_nan(kernels):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.0, -0.0])
    problem = Problem([5], (BF16,) * 5, replay=False)
    problem.params[0].copy_(values)
    problem.grads[0].zero_()
    hyper = {**SGD, "momentum": 0.0, "weight_decay": 0.0}
    Launches(kernels, problem).update("sgd", hyper, 0, variant=layout.STOCHASTIC_BIT)
    torch.testing.assert_close(problem.params[0].float(), values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["gradient", "decoupled"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("flags", [0, INJECT])
@pytest.mark.parametrize("copy", [BF16, F16])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_copy(kernels, name, copy, flags, stochastic, route):
    kind = (F32, copy, copy, F32, F32, copy)
    problem = Problem([CHUNK + 1029, 3], kind, replay=False, copies=True)
    exact = problem.exact()
    extra = layout.COPY_BIT | (layout.STOCHASTIC_BIT if stochastic else 0)
    Launches(kernels, problem).update(name, HYPER[name], flags, extra=extra, route=route)
    reference_step(name, exact, HYPER[name], flags, route=route)
    assert_same_step(name, problem, exact, HYPER[name], "master weights")
    for row, (master, written) in enumerate(zip(problem.params, problem.copies, strict=True)):
        expected = master.to(copy)
        if stochastic and copy == BF16:
            expected = _rounded(master, problem.indices[row], torch.arange(master.numel()))
        assert torch.equal(written.view(torch.int16), expected.view(torch.int16))


# Norms and what is made of them


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("kind", [*COMBINATIONS, (F32, F16, BF16, F64, F32)], ids=_name)
def test_norms(kernels, kind, replay, importance):
    problem = Problem([*EDGES, MANY], kind, replay=replay)
    if replay:
        problem.grads[3] = None
        problem.replays[4] = None
        problem.grads[5] = problem.replays[5] = None
    problem.distances[7] = 0.25
    problem.distances[8] = float("nan")
    problem.anchors[9] = None
    problem.importances[10] = None
    exact = problem.exact()
    options = {"replay_weight": 0.6, "grad_scale": 4.0, "importance": importance}
    squares = Launches(kernels, problem).norms(**options)
    expected = reference.norms(
        exact.params, exact.grads, exact.replays, exact.anchors, exact.distances,
        importances=exact.importances if importance else (), **options,
    )  # fmt: skip
    # Eight float32 (float64) roundings a lane, then float64; a quad has four more.
    unit = 2**-53 if kind[0] == F64 else 2**-24
    torch.testing.assert_close(squares, expected, rtol=16 * unit, atol=0, equal_nan=True)
    torch.testing.assert_close(
        problem.distances, exact.distances, rtol=16 * unit, atol=0, equal_nan=True
    )
    problem.assert_guards()


def test_squares_of_gradients_do_not_depend_on_what_else_is_computed(kernels):
    for kind in ((F32,) * 5, (BF16,) * 5, (F32, BF16, F32, F32, F16)):
        seen = set()
        for replay, which in itertools.product((False, True), (2, 3, 6, 7)):
            problem = Problem([*EDGES, MANY], kind, replay=replay)
            squares = Launches(kernels, problem).norms(which=which, replay_weight=0.6)
            seen.add(bits([squares[1]]))
            if not replay and which & reference.NORM_TOTAL:
                assert torch.equal(squares[0], squares[1])
        # The generic kernel has the same lanes as the others.
        assert len(seen) == 1


@pytest.mark.parametrize("importance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(kernels, dtype, replay, importance):
    def products(problem, flags, **options):
        return Launches(kernels, problem).products(flags, **options)

    rows.check_products(products, dtype, replay, [*EDGES, MANY], importance)


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize(
    "kind",
    [(F32,) * 4 + (BF16,), (F32, BF16, BF16, F32, F32), (BF16, F32, F16, F64, F32, BF16, F16)],
    ids=_name,
)
def test_products_of_mixed_dtypes(kernels, kind, importance):
    problem = Problem([*EDGES, MANY], kind)
    exact = problem.exact()
    flags = problem.flags(INJECT)
    options = {"replay_weight": 0.6, "grad_scale": 4.0, "importance": importance}
    sums = Launches(kernels, problem).products(flags, **options)
    expected = reference.products(
        exact.params, exact.grads, exact.replays, exact.anchors, flags,
        importances=exact.importances if importance else (), **options,
    )  # fmt: skip
    lengths = expected[1:4].sqrt()
    bounds = torch.stack([*lengths.square(), lengths[0] * lengths[2], lengths[1] * lengths[2]])
    assert ((sums[1:] - expected[1:]).abs() <= 1e-6 * bounds).all()


def test_products_of_extreme_numbers(kernels):
    def products(problem, flags, **options):
        return Launches(kernels, problem).products(flags, **options)

    rows.check_extreme_products(products)


def test_products_do_not_depend_on_alignment_or_on_the_kernel(kernels):
    for kind in ((F32,) * 5, (BF16,) * 5):
        seen, vectors = set(), []
        for offset, importance in itertools.product((0, 1, 3), (0.0, 0.5)):
            problem = Problem([*EDGES, MANY], kind, offset=offset)
            for x in problem.importances:  # u is the difference, whatever it is multiplied with
                x.fill_(1.0)
            sums = Launches(kernels, problem).products(
                INJECT, replay_weight=0.6, importance=importance
            )
            vectors.append(kernels.count_vector_accesses() > 0)
            squares = Launches(kernels, problem).norms(replay_weight=0.6, importance=importance)
            assert torch.equal(sums[0], squares[0]) and torch.equal(sums[2], squares[2])
            seen.add(bits([sums]))
            problem.assert_guards()
        assert len(seen) == 1 and vectors == [True, True, False, False, False, False]


def test_products_read_no_more_than_they_need(kernels):
    n, groups = 2 * CHUNK, 2 * CHUNK // 1024 * 256
    counts = []
    for flags, replay, importance in [(0, True, 0.7), (INJECT, False, 0.0), (INJECT, True, 0.7)]:
        problem = Problem([n], replay=replay)
        Launches(kernels, problem).products(flags, importance=importance)
        counts.append(kernels.count_vector_accesses() / groups)
    assert counts == [2, 3, 5]  # g, r; g, parameter, anchor; all of them and the importance


def _guard(kernels, sums, *, max_grad_norm, per_tensor, maximize):
    n = sums.shape[1]
    out = torch.full((reference.SCALES + n + reference.GUARD_EXTRAS,), float("nan"), dtype=F64)
    integers = [sums.data_ptr(), out.data_ptr(), n, max_grad_norm is not None, per_tensor, maximize]
    array = (ctypes.c_int64 * len(integers))(*integers)
    assert kernels.guard(array, (ctypes.c_double * 1)(max_grad_norm or 0.0)) == 0
    return out


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", rows.GUARDS)
def test_guard_coefficients(kernels, name, max_grad_norm, per_tensor, maximize):
    def coefficients(sums, **settings):
        return _guard(kernels, sums, **settings)

    rows.check_guard(coefficients, name, max_grad_norm, per_tensor, maximize)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 700])
def test_guard_coefficients_of_many_rows(kernels, n, per_tensor):
    generator = torch.Generator().manual_seed(1)
    sums = torch.rand(reference.PRODUCTS, n, dtype=F64, generator=generator)
    sums[reference.H_DOT_R] *= -1
    sums[:, ::5] = 0
    settings = {"max_grad_norm": 2.0, "per_tensor": per_tensor, "maximize": False}
    out = _guard(kernels, sums, **settings)
    torch.testing.assert_close(
        out, reference.guard_coefficients(sums, **settings), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_products_pass_makes_the_coefficients(kernels, per_tensor, order):
    sizes = [*EDGES, *[1] * 300]
    problem = Problem(sizes)
    problem.grads[1] = problem.replays[1] = None
    problem.anchors[2] = None
    for row in (1, len(sizes) - 1):  # a launch of other dtypes
        problem.params[row] = problem.params[row].double()
    settings = {"max_grad_norm": 2.0, "per_tensor": per_tensor, "maximize": True}
    seen = set()
    for _ in range(2):  # the counters are ready for the next step
        n = reference.SCALES + len(sizes) + reference.GUARD_EXTRAS
        out = torch.full((n,), float("nan"), dtype=F64)
        sums = Launches(kernels, problem, order).products(INJECT, out=out, **settings)
        assert (sums[:, 1] == 0).all() and (sums[1:, 2] == 0).all() and sums[0, 2] > 0
        assert torch.equal(out, _guard(kernels, sums, **settings))
        seen.add(bits([out, sums]))
    assert len(seen) == 1


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [0, INJECT, ELEMENTS])
def test_look_ahead_is_the_next_norm_pass(kernels, dtype, flags, importance):
    def norms(problem, which, *, distances, **options):
        known, problem.distances = problem.distances, distances
        squares = Launches(kernels, problem).norms(which=which, **options)
        problem.distances = known
        return squares

    rows.check_look_ahead(_caller(kernels), norms, "adam", dtype, EDGES, flags, importance)


@pytest.mark.parametrize("open_", [0, 1])
def test_gate_of_the_norms(kernels, open_):
    problem = Problem([CHUNK + 3, 5])
    gate = torch.tensor([open_], dtype=torch.uint8)
    squares = Launches(kernels, problem).norms(gate=gate)
    assert (squares[0] > 0).all()
    assert ((squares[1:] > 0) == bool(open_)).all()
    assert ((problem.distances == -1) == (not open_)).all()


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("kind", [*COMBINATIONS, (F16, F32, F32, BF16, F64)], ids=_name)
def test_distance_after_the_update_is_the_next_norm(kernels, kind, name):
    problem = Problem([*EDGES, MANY], kind, replay=False)
    problem.grads[4] = None
    problem.anchors[5] = None
    problem.distances.fill_(0.25)
    variant = layout.ANCHOR_BIT | layout.LOOK_AHEAD_BIT | (layout.STATE_BIT if name == "sgd" else 0)
    Launches(kernels, problem).update(name, HYPER[name], INJECT, variant=variant)
    found = problem.distances.clone()
    assert found[4] == 0.25 and found[5] == -1
    problem.distances.fill_(-1.0)
    squares = Launches(kernels, problem).norms(which=reference.NORM_DISTANCE)
    measured = [row for row in range(len(found)) if row not in (4, 5)]
    assert torch.equal(squares[2][measured], found[measured])


@pytest.mark.parametrize("scaling,per_tensor", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0, 1e9])
def test_coefficients(kernels, max_grad_norm, scaling, per_tensor):
    generator = torch.Generator().manual_seed(1)
    for n in (0, 1, 255, 256, 700):
        squares = torch.rand(3, n, dtype=F64, generator=generator)
        squares[:, ::5] = 0
        out = torch.full((4 + n,), float("nan"), dtype=F64)
        _coefficients(kernels, squares, out, max_grad_norm, scaling, per_tensor)
        expected = reference.coefficients(
            squares, max_grad_norm=max_grad_norm, scaling=scaling, per_tensor=per_tensor
        )
        torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)


def _coefficients(kernels, squares, out, max_grad_norm, scaling, per_tensor):
    integers = [squares.data_ptr(), out.data_ptr(), squares.shape[1], max_grad_norm is not None,
                scaling, per_tensor]  # fmt: skip
    array = (ctypes.c_int64 * len(integers))(*integers)
    assert kernels.coefficients(array, (ctypes.c_double * 1)(max_grad_norm or 0.0)) == 0


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize("scaling,per_tensor", [(True, False), (True, True), (False, False)])
def test_the_norm_pass_makes_the_coefficients(kernels, scaling, per_tensor, max_grad_norm, order):
    def norms(problem, **options):
        return Launches(kernels, problem, order).norms(**options)

    def coefficients(squares, **settings):
        out = torch.empty(reference.SCALES + squares.shape[1], dtype=F64)
        _coefficients(kernels, squares, out, *settings.values())
        return out

    rows.check_coefficients_of_the_pass(
        norms, coefficients, [*EDGES, *[1] * 300], max_grad_norm, scaling, per_tensor
    )


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_coefficients_keep_nan_and_decide_zero(kernels, spoiled):
    squares = torch.ones(3, 9, dtype=F64)
    squares[spoiled, 4] = float("nan")
    for per_tensor in (False, True):
        out = torch.zeros(13, dtype=F64)
        _coefficients(kernels, squares, out, 2.0, True, per_tensor)
        expected = reference.coefficients(
            squares, max_grad_norm=2.0, scaling=True, per_tensor=per_tensor
        )
        torch.testing.assert_close(out, expected, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("granularity", layout.GRANULARITIES)
def test_draw_flags(kernels, granularity):
    n = 600
    problem = Problem([1] * n, replay=False)
    problem.groups = [row % 4 for row in range(n)]
    problem.anchors[8] = None
    limits = [THRESHOLD, 2**32, 0, 2**31]
    strengths = [0.7, 0.7, 0.7, 0.0]
    hyper = torch.tensor(
        [[9.0, s, float(t)] for s, t in zip(strengths, limits, strict=True)], dtype=F64
    )
    table = problem.table()
    for draw in (DRAW, DRAW + 1, 2**33 + 1):
        flags = torch.tensor([row % 8 for row in range(n)], dtype=torch.uint8)
        gate = torch.full((1,), 7, dtype=torch.uint8)
        code = layout.GRANULARITIES[granularity]
        tensors = [table, hyper, torch.tensor(draw), flags, gate]
        values = [*(x.data_ptr() for x in tensors), n, 3, SIGNED_SEED, code, 2, 1]
        assert kernels.draw_flags((ctypes.c_int64 * len(values))(*values), None) == 0
        words = {
            "step": torch.full((n,), _philox.step_word(SEED, draw)),
            "tensor": _philox.tensor_words(SEED, draw, torch.tensor(problem.indices)),
        }.get(granularity)
        for row in range(n):
            group = problem.groups[row]
            limit = limits[group] if strengths[group] > 0 and row != 8 else 0
            if granularity == "element":
                expected = INJECT if limit == 2**32 else ELEMENTS if limit else 0
            else:
                expected = INJECT if words[row] < limit else 0
            assert flags[row] == expected | (row % 8 & FIRST), (row, draw)
        assert gate.item() == (flags & (INJECT | ELEMENTS)).any()


def test_gate_is_shut_when_nothing_injects(kernels):
    problem = Problem([1], replay=False, anchors=False)
    table = problem.table()
    tensors = [table, torch.tensor([[0.7, 2.0**32]], dtype=F64), torch.tensor(DRAW),
               torch.tensor([3], dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)]  # fmt: skip
    values = [*(x.data_ptr() for x in tensors), 1, 2, 0, 0, 1, 0]
    assert kernels.draw_flags((ctypes.c_int64 * len(values))(*values), None) == 0
    assert tensors[3].item() == 0 and tensors[4].item() == 0


# Order


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("flags", [0, INJECT, ELEMENTS])
def test_any_order_of_blocks_gives_the_same_bits(kernels, flags, importance):
    seen = set()
    sizes = [*EDGES, 5 * CHUNK + 17, MANY] + [3] * 300
    for order in (0, 1, 2):
        problem = Problem(sizes)
        launches = Launches(kernels, problem, order)
        squares = launches.norms(replay_weight=0.6, importance=importance)
        sums = launches.products(flags, replay_weight=0.6, importance=importance)
        options = {"replay_weight": 0.6, "importance": importance}
        for name in ("adam", "sgd"):
            variant = (
                layout.ANCHOR_BIT | layout.LOOK_AHEAD_BIT | layout.ELEMENTS_BIT | layout.STATE_BIT
                | (layout.IMPORTANCE_BIT if importance else 0)
            )  # fmt: skip
            launches.update(name, HYPER[name], flags, variant=variant, **options)
        launches.update("guide", GUIDE, flags, **options)
        seen.add((problem.everything(), bits([squares, sums])))
        problem.assert_guards()
    assert len(seen) == 1


# Operators


def _operator_arguments(launches, launch):
    problem = launches.problem
    replays = launches.replays if problem.replays else torch.empty(0, dtype=torch.int64)
    chunks = (launches.table, launch.rows, launch.chunks)
    workspace = (launch.starts, launch.partials, launch.counters)
    return chunks, workspace, (launches.grads, replays)


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("flags", [INJECT, ELEMENTS])
@pytest.mark.parametrize("name", RULES)
def test_operators(kernels, name, flags, importance):
    ours, theirs = Problem([CHUNK + 1029, 3, 0]), Problem([CHUNK + 1029, 3, 0])
    launches = Launches(kernels, ours)
    (launch,) = launches.launches
    chunks, workspace, gradients = _operator_arguments(launches, launch)
    flag_list = ours.flags(flags)
    hyper = numbers_of(HYPER[name])
    variant = variant_of([HYPER[name]], flag_list, importance=importance) | (
        layout.LOOK_AHEAD_BIT if name != "guide" else 0
    )
    weighing = {"importance": importance} if importance else {}  # which is 0 by default
    scale, found = torch.tensor(2.0), torch.zeros(1)
    squares = torch.zeros(3, 3, dtype=F64)
    options = {"dtypes": launch.dtypes, "replay_weight": 0.6, **weighing}
    torch.ops.dgg.norms_launch(
        *chunks, *workspace, *gradients, ours.distances, squares, None, scale, None, which=7,
        max_grad_norm=None, scaling=False, per_tensor=False, **options,
    )  # fmt: skip
    expected = Launches(kernels, theirs).norms(replay_weight=0.6, grad_scale=2.0, **weighing)
    assert torch.equal(squares, expected)
    torch.ops.dgg.coefficients_launch(
        squares, ours.coefficients, max_grad_norm=3.0, scaling=True, per_tensor=False
    )
    _coefficients(kernels, expected, theirs.coefficients, 3.0, True, False)
    assert torch.equal(ours.coefficients, theirs.coefficients)
    if name == "guide":
        workspace = ()
    own = [ours.coefficients, flag_list, hyper]
    if name != "guide":
        own.append(ours.distances)
    draws = {"seed": SIGNED_SEED, "draw": 1, "variant": variant}
    getattr(torch.ops.dgg, f"{name}_launch_")(
        *chunks, *workspace, *gradients, *own, scale, found, torch.tensor(DRAW), **draws, **options
    )
    Launches(kernels, theirs).update(
        name, HYPER[name], flags, variant=variant, replay_weight=0.6, grad_scale=2.0, **weighing
    )
    assert ours.everything() == theirs.everything()


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
def test_norms_operator_makes_the_coefficients(kernels):
    problem = Problem([CHUNK + 5, 3])
    launches = Launches(kernels, problem)
    (launch,) = launches.launches
    chunks, workspace, gradients = _operator_arguments(launches, launch)
    squares, out = torch.zeros(3, 2, dtype=F64), torch.zeros(6, dtype=F64)
    settings = {"max_grad_norm": 2.0, "scaling": True, "per_tensor": True}
    options = {"dtypes": launch.dtypes, "replay_weight": 0.6, "which": 7, **settings}

    def run(chunks, workspace, out):
        torch.ops.dgg.norms_launch(
            *chunks, *workspace, *gradients, problem.distances, squares, None, None, out, **options
        )

    run(chunks, workspace, out)
    expected = torch.zeros(6, dtype=F64)
    torch.ops.dgg.coefficients_launch(squares, expected, **settings)
    assert torch.equal(out, expected) and (out > 0).all()
    with pytest.raises(RuntimeError, match="out must be contiguous, of dtype float64 and have 6"):
        run(chunks, workspace, out[:-1].clone())
    with pytest.raises(RuntimeError, match="counters must be contiguous, of dtype int32 and have"):
        run(chunks, (*workspace[:2], workspace[2][:-1].clone()), out)
    none = (launches.table, launch.rows[:0], launch.chunks[:0])
    with pytest.raises(RuntimeError, match="the last row's block makes `out`, and there is no row"):
        run(
            none, (launch.starts[:1], launch.partials[:, :0].contiguous(), launch.counters[:1]), out
        )


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
def test_products_operators(kernels):
    problem = Problem([CHUNK + 5, 3])
    launches = Launches(kernels, problem)
    (launch,) = launches.launches
    chunks, workspace, gradients = _operator_arguments(launches, launch)
    flags, scale = problem.flags([INJECT, 0]), torch.tensor(2.0)
    sums, out = torch.zeros(6, 2, dtype=F64), torch.zeros(8, dtype=F64)
    settings = {"max_grad_norm": 2.0, "per_tensor": False, "maximize": False}
    options = {"dtypes": launch.dtypes, "replay_weight": 0.6, "importance": 0.7, **settings}

    def run(out, flags=flags, sums=sums, **others):
        torch.ops.dgg.products_launch(
            *chunks, *workspace, *gradients, flags, sums, scale, out, **{**options, **others}
        )

    run(None)
    expected = launches.products(flags, replay_weight=0.6, grad_scale=2.0, importance=0.7)
    assert torch.equal(sums, expected) and (out == 0).all()
    run(out)
    assert torch.equal(out, _guard(kernels, expected, **settings)) and (out[:4] > 0).all()
    again = torch.zeros(8, dtype=F64)
    torch.ops.dgg.guard_coefficients_launch(sums, again, **settings)
    assert torch.equal(out, again)
    for message, wrong in {
        "out must be contiguous, of dtype float64 and have 8": dict(out=out[:-1].clone()),
        "flags must be contiguous, of dtype uint8": dict(out=None, flags=flags.bool()),
        "products must be contiguous, of dtype float64 and have 12": dict(out=None, sums=sums[:5]),
        r"importance must lie in \[0, 1\], not 1.5": dict(out=None, importance=1.5),
    }.items():
        with pytest.raises(RuntimeError, match=f"dgg::products_launch: {message}"):
            run(**wrong)
    with pytest.raises(RuntimeError, match=r"guard_coefficients_launch: .* shape \[6, n\]"):
        torch.ops.dgg.guard_coefficients_launch(sums[:3], again, **settings)


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
def test_draw_flags_operator(kernels):
    problem = Problem([1, 1], replay=False)
    table = problem.table()
    flags = torch.tensor([FIRST, 0], dtype=torch.uint8)
    gate = torch.zeros(1, dtype=torch.uint8)
    hyper = torch.tensor([[0.7, 2.0**32]], dtype=F64)
    torch.ops.dgg.draw_flags_launch(
        table, hyper, torch.tensor(DRAW), flags, gate, seed=SIGNED_SEED, granularity=1,
        threshold_column=1, strength_column=0,
    )  # fmt: skip
    assert flags.tolist() == [FIRST | INJECT, INJECT] and gate.item() == 1


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.parametrize(
    "place,value,message",
    [
        (0, lambda x: x[:, :13].contiguous(), r"table must have shape \[n, 15\]"),
        (0, lambda x: x.int(), "table must be contiguous, of dtype int64"),
        (1, lambda x: x.long(), "rows must be contiguous, of dtype int32"),
        (3, lambda x: x[:-1].clone(), "starts must be contiguous, of dtype int32 and have 3"),
        (4, lambda x: x[:3].clone(), "partials must be contiguous, of dtype float64 and have 10"),
        (6, lambda x: x[:1].clone(), "grads must be contiguous, of dtype int64 and have 2"),
        (7, lambda x: x[:1].clone(), "replays must be contiguous, of dtype int64 and have 2"),
        (8, lambda x: x[:-1].clone(), "coefficients must be contiguous, of dtype float64"),
        (9, lambda x: x.bool(), "flags must be contiguous, of dtype uint8"),
        (10, lambda x: x[:, 1:].clone(), r"hyper must have shape \[groups, 10\]"),
        (11, lambda x: x.float(), "distances must be contiguous, of dtype float64"),
        (12, lambda x: torch.ones(2), "grad_scale must be contiguous, of dtype float32"),
        (13, lambda x: torch.ones(1, dtype=F64), "found_inf must be contiguous, of dtype float32"),
        (14, lambda x: torch.ones(1), "draw_index must be contiguous, of dtype int64"),
    ],
)
def test_operator_names_what_is_wrong(kernels, place, value, message):
    problem = Problem([5, 7])
    launches = Launches(kernels, problem)
    (launch,) = launches.launches
    chunks, workspace, gradients = _operator_arguments(launches, launch)
    hyper = numbers_of(ADAM)
    flags = torch.zeros(2, dtype=torch.uint8)
    arguments = [*chunks, *workspace, *gradients, problem.coefficients, flags, hyper,
                 problem.distances, None, None, None]  # fmt: skip
    arguments[place] = value(arguments[place])
    before = problem.everything()
    with pytest.raises(RuntimeError, match=f"dgg::adam_launch_: {message}"):
        torch.ops.dgg.adam_launch_(
            *arguments, dtypes=launch.dtypes, replay_weight=1.0, seed=0, draw=0, variant=0
        )
    assert problem.everything() == before


STEPS = [
    ("adamw", F32, {"importance": 0.7, "alpha": 1.0}),
    ("adamw", BF16, {"importance": 0.7, "alpha": 0.5, "granularity": "element"}),
    ("adamw", F32, {"importance": 0.7, "alpha": "auto"}),
    ("adamw", BF16, {"alpha": "auto", "norm_scope": "tensor"}),
    ("adam", F32, {"importance": 0.7, "alpha": 1.0, "route": "first_moment"}),
    ("sgd-momentum", F32, {"alpha": 1.0, "route": "decoupled"}),
]


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.parametrize(("kind", "dtype", "options"), STEPS, ids=str)
def test_steps_of_optimizers(kernels, kind, dtype, options, monkeypatch):
    """What an optimizer launches on a GPU, launched here: in place of Triton's interpreter."""
    reason = backends.unavailable("triton", torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"the backend whose launches these replace is missing: {reason}")
    monkeypatch.setattr(libraries, "launchers", lambda backend: torch.ops.dgg)
    monkeypatch.setattr(test_gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(test_gpu, "ON_GPU", False)
    test_gpu.check_beside_the_reference(kind, "triton", dtype, **options)
