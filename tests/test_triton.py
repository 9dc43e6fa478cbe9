# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels against dgg/reference/ in float64, launched without an optimizer.

Without a GPU they run in Triton's interpreter. That is slow, so chunks are small here: what is
tested is every branch, not every size.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from dgg.kernels import layout
from dgg.kernels.layout import ANCHOR, GROUP, NUMEL, STRETCH, STRIDE

import cases
import rows
from cases import BF16, F16, F32, F64
from dgg import _philox, kernels, reference
from dgg.backends import chunks
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
    variant_of,
)

CPU = torch.device("cpu")
MISSING = kernels.unavailable(CPU)

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"no Triton on the CPU: {MISSING}"),
    pytest.mark.usefixtures("quick_interpreter"),
    # numpy's, about what GPUs do silently
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]

CHUNK = 256
EDGES = [1, 3, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]

LAUNCHES = {"adam": "adam_launch_", "sgd": "sgd_launch_", "guide": "guide_launch_"}


def cut(problem, table, chunk=CHUNK):
    return chunks.cut(
        [p.numel() for p in problem.params], table[:, layout.DTYPES].tolist(), CPU, chunk=chunk
    )


def call(
    name, problem, hyper, flags, *, chunk=CHUNK, table=None, look_ahead=False, stochastic=False,
    grad_scale=None, found_inf=None, draw_index=None, replay_weight=1.0, seed=SIGNED_SEED,
    draw=DRAW, distances=None, importance=0.0, route="gradient",
):  # fmt: skip
    """Runs one kernel on a problem; `hyper` is one set of numbers or a list of those."""
    if table is None:
        table = problem.table(states_of(name, hyper), stepped=name == "adam")
    flags, numbers = problem.flags(flags), numbers_of(hyper)
    extra = layout.LOOK_AHEAD_BIT if look_ahead else 0
    if stochastic:
        extra |= layout.STOCHASTIC_BIT
    if any(copy is not None for copy in problem.copies):
        extra |= layout.COPY_BIT
    variant = variant_of(
        hyper if isinstance(hyper, list) else [hyper], flags, extra, importance=importance,
        route=route,
    )  # fmt: skip
    grads, replays = addresses(problem.grads), addresses(problem.replays)
    if grad_scale is not None:
        grad_scale = torch.tensor(grad_scale)
    options = dict(replay_weight=replay_weight, seed=seed, draw=draw, variant=variant, chunk=chunk,
                   importance=importance)  # fmt: skip
    for part in cut(problem, table, chunk):
        common = (grads, replays, problem.coefficients, flags, numbers)
        if name == "guide":
            kernels.guide_launch_(
                table, part.rows, part.chunks, *common, grad_scale, found_inf, draw_index,
                dtypes=part.dtypes, **options,
            )  # fmt: skip
        else:
            getattr(kernels, LAUNCHES[name])(
                table, *part.tensors, *common,
                problem.distances if distances is None else distances,
                grad_scale, found_inf, draw_index, dtypes=part.dtypes, **options,
            )  # fmt: skip
        assert not part.counters.any()


def call_norms(
    problem, which, *, chunk=CHUNK, replay_weight=1.0, grad_scale=None, gate=None, distances=None,
    out=None, max_grad_norm=None, scaling=False, per_tensor=False, importance=0.0,
):  # fmt: skip
    squares = torch.full((3, len(problem.params)), -9.0, dtype=F64)
    table = problem.table(0)
    if grad_scale is not None:
        grad_scale = torch.tensor([grad_scale])
    parts = cut(problem, table, chunk)
    for part in parts:
        kernels.norms_launch(
            table, *part.tensors, addresses(problem.grads), addresses(problem.replays),
            problem.distances if distances is None else distances, squares, gate, grad_scale,
            out if part is parts[-1] else None, dtypes=part.dtypes, replay_weight=replay_weight,
            which=which, chunk=chunk, max_grad_norm=max_grad_norm, scaling=scaling,
            per_tensor=per_tensor, importance=importance,
        )  # fmt: skip
        assert not part.counters.any()
    return squares


def call_coefficients(squares, **options):
    out = torch.full((reference.SCALES + squares.shape[1],), -9.0, dtype=F64)
    kernels.coefficients_launch(squares, out, **options)
    return out


def call_products(
    problem, flags, *, chunk=CHUNK, replay_weight=1.0, grad_scale=None, importance=0.0, out=None,
    max_grad_norm=None, per_tensor=False, maximize=False,
):  # fmt: skip
    sums = torch.full((reference.PRODUCTS, len(problem.params)), -9.0, dtype=F64)
    table = problem.table(0)
    if grad_scale is not None:
        grad_scale = torch.tensor([grad_scale])
    parts = cut(problem, table, chunk)
    for part in parts:
        part.partials.fill_(float("nan"))
        kernels.products_launch(
            table, *part.tensors, addresses(problem.grads), addresses(problem.replays), flags, sums,
            grad_scale, out if part is parts[-1] else None, dtypes=part.dtypes,
            replay_weight=replay_weight, importance=importance, max_grad_norm=max_grad_norm,
            per_tensor=per_tensor, maximize=maximize, chunk=chunk,
        )  # fmt: skip
        assert not part.counters.any()
    return sums


def call_guard(sums, **options):
    size = reference.SCALES + sums.shape[1] + reference.GUARD_EXTRAS
    out = torch.full((size,), -9.0, dtype=F64)
    kernels.guard_coefficients_launch(sums, out, **options)
    return out


# Updates


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam(case, situation):
    rows.check_update(call, "adam", {**ADAM, **ADAM_CASES[case]}, situation, [0, *EDGES])


@pytest.mark.parametrize("situation", ROUTES)
@pytest.mark.parametrize("case", ["adamw", "adam", "amsgrad-maximize"])
def test_adam_routes(case, situation):
    rows.check_update(call, "adam", {**ADAM, **ADAM_CASES[case]}, situation, [0, *EDGES])


@pytest.mark.parametrize("situation", [name for name in ROUTES if name.startswith("decoupled")])
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd_routes(case, situation):
    rows.check_update(call, "sgd", {**SGD, **SGD_CASES[case]}, situation, [0, *EDGES[3:]])


@pytest.mark.parametrize("first", [0, FIRST])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd(case, situation, first):
    hyper = {**SGD, **SGD_CASES[case]}
    rows.check_update(call, "sgd", hyper, situation, [0, *EDGES[3:]], first)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_guide(situation, maximize):
    rows.check_update(call, "guide", {**GUIDE, "maximize": maximize}, situation, [0, *EDGES])


def test_guide_without_guidance_leaves_every_bit():
    problem = Problem([5, CHUNK + 1, 7], replay=False)
    problem.coefficients[0] = 1.0
    problem.anchors[2] = None
    # A NaN with a payload comes back with another one from any arithmetic.
    problem.grads[0].view(torch.int32)[3] = 0x7FA00001
    before = bits(problem.grads[:1]), bits(problem.grads[2:])
    call("guide", problem, {**GUIDE, "threshold": 2**32}, [0, INJECT, INJECT])
    assert (bits(problem.grads[:1]), bits(problem.grads[2:])) == before


def hyper_of(optimizer):
    """Name of the kernel and its numbers for a row of cases.OPTIMIZERS."""
    kind, given = cases.OPTIMIZERS[optimizer]
    given = dict(given)
    if kind is cases.dgg.SGD:
        defaults = {**SGD, "momentum": 0.0, "dampening": 0.0}
        return "sgd", {**defaults, **given}
    beta1, beta2 = given.pop("betas")
    defaults = {**ADAM, "eps": 1e-8, "decoupled": kind is cases.dgg.AdamW}
    return "adam", {**defaults, "beta1": beta1, "beta2": beta2, **given}


@pytest.mark.parametrize("mix", cases.MIXES, ids=lambda mix: "-".join(str(d)[6:] for d in mix))
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_every_optimizer_with_every_mix(optimizer, mix):
    name, hyper = hyper_of(optimizer)
    param, grad, anchor = mix
    kind = (param, grad, grad, param, anchor or param)
    problem = Problem([65, CHUNK, CHUNK + 9], kind, replay=False)
    exact = problem.exact()
    flags = [0, INJECT, ELEMENTS]
    call(name, problem, hyper, flags, look_ahead=True)
    reference_step(name, exact, hyper, flags, look_ahead=True)
    assert_same_step(name, problem, exact, hyper, f"{optimizer}, {mix}")
    torch.testing.assert_close(
        problem.distances,
        torch.stack([
            reference.distance(p.double(), a.double())
            for p, a in zip(problem.params, problem.anchors, strict=True)
        ]),
        rtol=1e-6, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("guidance", cases.GUIDANCE)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_a_whole_step(optimizer, guidance):
    """Norms, coefficients and update, with every kind of guidance."""
    name, hyper = hyper_of(optimizer)
    asked = cases.GUIDANCE[guidance]
    alpha = asked["alpha"]
    hyper = {**hyper, "strength": asked["strength"], "threshold": _philox.threshold(alpha)}
    elements = asked.get("granularity") == "element" and alpha < 1
    problem = Problem([65, CHUNK + 1, 3], replay=False)
    exact = problem.exact()
    flags = ELEMENTS if elements else INJECT
    rule = dict(
        max_grad_norm=asked.get("max_grad_norm"),
        scaling=asked.get("scaling", True),
        per_tensor=asked.get("norm_scope") == "tensor",
    )
    problem.coefficients = call_coefficients(call_norms(problem, 7), **rule)
    exact.coefficients = reference.coefficients(
        reference.norms(exact.params, exact.grads, [], exact.anchors, exact.distances), **rule
    )
    torch.testing.assert_close(problem.coefficients, exact.coefficients, rtol=1e-6, atol=0)
    call(name, problem, hyper, flags)
    reference_step(name, exact, hyper, flags)
    assert_same_step(name, problem, exact, hyper, f"{optimizer}, {guidance}")


@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
def test_dtype_combinations(name):
    # All pairs with the parameter's dtype; gradient, state and anchor take turns.
    kinds = [
        tuple(DTYPES[(p + shift) % 4] for shift in (0, turn, 3 * turn, turn + 1, 2 * turn))
        for p, turn in itertools.product(range(4), repeat=2)
    ]
    rows.check_dtypes(call, call_norms, name, kinds, 37, ELEMENTS)


@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
def test_dtype_combinations_with_importance(name):
    # All pairs of anchor and importance, the others taking turns.
    kinds = [
        tuple(DTYPES[(a + shift) % 4] for shift in (f, 0, 2 * f + 1, f + 1, 0, f, f))
        for a, f in itertools.product(range(4), repeat=2)
    ]
    rows.check_dtypes(call, call_norms, name, kinds, 37, ELEMENTS, importance=0.7)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_chunks_as_they_are_used(dtype):
    # The real chunk has several blocks; here are whole chunks, whole blocks and a ragged end.
    sizes = [layout.CHUNK + 1024 + 5, 1024, 1023, 2049]
    problem = Problem(sizes, (dtype,) * 5, replay=False)
    exact = problem.exact()
    unknown = torch.full_like(problem.distances, -1.0)
    hyper = FULL["adam"]
    call("adam", problem, hyper, ELEMENTS, chunk=layout.CHUNK, look_ahead=True)
    reference_step("adam", exact, hyper, ELEMENTS)
    assert_same_step("adam", problem, exact, hyper, "real chunks")
    squares = call_norms(problem, 7, chunk=layout.CHUNK, distances=unknown)
    assert torch.equal(squares[2], problem.distances)
    expected = [g.double().square().sum().item() for g in problem.grads]
    torch.testing.assert_close(squares[1], torch.tensor(expected, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_misaligned_views_give_the_same_bits(name, dtype):
    """Aligned tensors and views into the middle of others take different walks."""
    sizes = [1, 7, 40, CHUNK, CHUNK + 9, 2 * CHUNK]
    options = {"replay_weight": 0.6, "importance": 0.7}
    options |= {} if name == "guide" else {"look_ahead": True}
    results = []
    for offset in (0, 1, 3):
        problem = Problem(sizes, (dtype,) * 5, offset=offset)
        call(name, problem, FULL[name], ELEMENTS, **options)
        results.append([*problem.tensors(3), *problem.grads, problem.distances])
        problem.assert_guards()
        assert offset or all(x.data_ptr() % 16 == 0 for x in results[0])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(dtype, bad):
    rows.check_nan_and_infinity(call, dtype, bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HYPER)
def test_what_does_not_pull_does_not_reach_the_gradient(name, dtype, bad):
    rows.check_what_does_not_pull(call, name, dtype, bad)


def plain(**changes):
    """SGD that subtracts the gradient and does nothing else."""
    return {**SGD, "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, **changes}


def lone(param, grad, anchor=None):
    """A problem of one tensor with a factor of one."""
    problem = Problem([param.numel()], replay=False)
    problem.params, problem.grads, problem.anchors = [param], [grad], [anchor]
    problem.coefficients = torch.ones(5, dtype=F64)
    problem.indices = [7]
    return problem


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_conversions_are_exact_for_every_value(dtype):
    # All 16-bit values through a step that changes nothing, and their neighbourhood through one
    # that rounds.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = values.clone()
    call("sgd", lone(param, torch.zeros(len(values))), plain(lr=0.5), 0, chunk=layout.CHUNK)
    numbers = ~values.isnan()
    assert torch.equal(param[numbers], values[numbers])
    assert param[~numbers].isnan().all()
    rough = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    rough = rough * values.float().nan_to_num(1.0, 1.0, 1.0)
    rounded = torch.zeros(len(values), dtype=dtype)
    call("sgd", lone(rounded, -rough), plain(), 0, chunk=layout.CHUNK)
    assert torch.equal(rounded, rough.to(dtype))


def test_rows_without_gradient_are_untouched():
    rows.check_rows_without_gradient(call, CHUNK + 9)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_launch_of_empty_tensors(name):
    problem = Problem([0, 0, 0])
    problem.grads[1] = problem.replays[1] = None
    problem.anchors[2] = None
    steps = [s.item() for s in problem.steps]
    problem.distances.fill_(7.0)
    squares = call_norms(problem, 7)
    assert squares.tolist() == [[0.0] * 3, [0.0] * 3, [7.0, 0.0, 0.0]]
    call(name, problem, ADAM if name == "adam" else SGD, INJECT, look_ahead=True)
    assert problem.distances.tolist() == [0.0, 7.0, -1.0]
    counted = [1, 0, 1] if name == "adam" else [0, 0, 0]
    assert [s.item() for s in problem.steps] == [a + b for a, b in zip(steps, counted, strict=True)]
    call("guide", problem, GUIDE, INJECT)


def test_groups_have_their_own_numbers():
    problem = Problem([9, CHUNK + 9], replay=False)
    groups = [ADAM, {**FULL["adam"], "lr": 0.2, "beta2": 0.7, "strength": 0.0}]
    problem.groups = [0, 1]
    exact = problem.exact()
    call("adam", problem, groups, INJECT)
    reference_groups("adam", exact, groups, INJECT)
    assert_same_step("adam", problem, exact, FULL["adam"], "two groups")


def test_momentum_in_one_group_only():
    problem = Problem([9, CHUNK + 9], replay=False)
    groups = [SGD, {**SGD, "momentum": 0.0}]
    problem.groups = [0, 1]
    untouched = bits([problem.states[0][1]])
    exact = problem.exact()
    call("sgd", problem, groups, INJECT)
    reference_groups("sgd", exact, groups, INJECT)
    assert_same_step("sgd", problem, exact, SGD, "two groups")
    assert bits([problem.states[0][1]]) == untouched


@pytest.mark.parametrize("name", ["adam", "sgd", "guide"])
@pytest.mark.parametrize("found", [1.0, float("nan"), 0.0])
def test_found_inf_changes_nothing(name, found):
    problem = Problem([9, CHUNK + 9])
    twin = problem.copy()
    for each in (problem, twin):
        each.distances.fill_(3.0)
    hyper = HYPER[name]
    everything = [*problem.tensors(3), *problem.grads, *problem.steps, problem.distances]
    before = bits(everything)
    look_ahead = {} if name == "guide" else {"look_ahead": True}
    call(name, problem, hyper, ELEMENTS, found_inf=torch.tensor([found]), **look_ahead)
    if found == 0:
        call(name, twin, hyper, ELEMENTS, **look_ahead)
        before = bits([*twin.tensors(3), *twin.grads, *twin.steps, twin.distances])
    assert bits(everything) == before


@pytest.mark.parametrize("step", [0, 1, 999, 2**20, 2**24 - 2])
def test_bias_corrections(step):
    problem = Problem([33], (F64,) * 5, replay=False)
    hyper = {**ADAM, "beta1": 0.9, "beta2": 0.9999}
    problem.steps[0].fill_(float(step))
    exact = problem.exact()
    call("adam", problem, hyper, INJECT)
    reference_step("adam", exact, hyper, INJECT)
    # A correction of 1 - 0.9999 carries the rounding of 0.9999, ten thousand times larger.
    torch.testing.assert_close(problem.params[0], exact.params[0], rtol=1e-12, atol=1e-12)
    assert problem.steps[0].item() == step + 1


def test_elements_beyond_2_to_the_33():
    """Offsets are 64-bit: a chunk far behind the beginning of its tensor."""
    number = 2**33 // CHUNK + 3
    problem = Problem([CHUNK + 40], replay=False)
    exact = problem.exact()
    skipped = number * CHUNK
    table = problem.table(2)
    for column in (layout.PARAM, layout.EXP_AVG, layout.EXP_AVG_SQ, ANCHOR):
        table[0, column] -= skipped * 4
    table[0, NUMEL] = table[0, STRETCH] = table[0, STRIDE] = skipped + CHUNK + 40
    grads = addresses(problem.grads) - skipped * 4
    kernels.adam_launch_(
        table, torch.zeros(1, dtype=torch.int32),
        torch.tensor([[0, number], [0, number + 1]], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32), torch.zeros(layout.PARTIALS, 2, dtype=F64),
        torch.zeros(1, dtype=torch.int32), grads, torch.empty(0, dtype=torch.int64),
        problem.coefficients, problem.flags(ELEMENTS), numbers_of(ADAM), problem.distances,
        None, None, None, dtypes=0, replay_weight=1.0, seed=SIGNED_SEED, draw=DRAW,
        variant=layout.ANCHOR_BIT | layout.ELEMENTS_BIT, chunk=CHUNK,
    )  # fmt: skip
    elements = torch.arange(skipped, skipped + CHUNK + 40)
    drawn = _philox.element_words(SEED, DRAW, problem.indices[0], elements) < THRESHOLD
    assert 30 < drawn.sum() < 150
    exact.anchors = [torch.where(drawn, exact.anchors[0], exact.params[0])]
    reference_step("adam", exact, ADAM, INJECT)
    assert_same_step("adam", problem, exact, ADAM, "far away")


@pytest.mark.parametrize(
    "name,variant,message",
    [
        ("adam", layout.LOOK_AHEAD_BIT, "the routes need ANCHOR"),
        ("adam", layout.IMPORTANCE_BIT, "the routes need ANCHOR"),
        ("sgd", layout.DECOUPLED_BIT, "the routes need ANCHOR"),
        ("adam", 1 | layout.FIRST_MOMENT_BIT | layout.DECOUPLED_BIT, "exclude each other"),
        ("sgd", 1 | layout.FIRST_MOMENT_BIT, "SGD has none"),
    ],
)
def test_a_variant_that_contradicts_itself_is_refused(name, variant, message):
    problem = Problem([9], replay=False)
    (part,) = cut(problem, problem.table(2))
    with pytest.raises(ValueError, match=message):
        getattr(kernels, LAUNCHES[name])(
            problem.table(2), *part.tensors, addresses(problem.grads), addresses([]),
            problem.coefficients, problem.flags(0), torch.zeros(1, 10, dtype=F64),
            problem.distances, None, None, None, dtypes=0, replay_weight=1.0, seed=0, draw=0,
            variant=variant,
        )  # fmt: skip


# Draws

# Numbers of elements, base, stretch and stride of shards of all kinds.
SHARDS = {
    "whole": (2 * CHUNK + 9, 0, 2 * CHUNK + 9, 2 * CHUNK + 9),
    "rows": (2 * CHUNK + 9, 4 * CHUNK, 2 * CHUNK + 9, 2 * CHUNK + 9),
    "odd rows": (CHUNK + 7, 1001, CHUNK + 7, CHUNK + 7),
    "columns": (2 * CHUNK, 8, 12, 40),
    "odd columns": (2 * CHUNK, 3, 7, 20),
    "far": (CHUNK + 64, 2**34 + 2, CHUNK + 64, CHUNK + 64),
    "far columns": (2 * CHUNK, 2**34, 64, 2**30),
}


def unsharded(shard):
    count, base, stretch, stride = SHARDS[shard]
    place = torch.arange(count)
    return base + place // stretch * stride + place % stretch


@pytest.mark.parametrize("counted", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("shard", SHARDS)
def test_element_masks(shard, dtype, counted):
    """What is injected is exactly what the words say: the gradient becomes the mask."""
    count, *place = SHARDS[shard]
    problem = lone(*(torch.full((count,), x, dtype=dtype) for x in (1.0, 0.0, 0.0)))
    problem.shards = [place]
    draw = 2**32 + 3
    index = torch.tensor(draw) if counted else None
    hyper = {**GUIDE, "strength": 1.0}
    call("guide", problem, hyper, ELEMENTS, draw=0 if counted else draw,
         draw_index=index)  # fmt: skip
    words = _philox.element_words(SEED, draw, 7, unsharded(shard))
    assert torch.equal(problem.grads[0], (words < THRESHOLD).to(dtype))
    assert 0.2 < problem.grads[0].double().mean() < 0.4


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_certain_element_draws(alpha):
    rows.check_certain_element_draws(call, alpha, CHUNK + 3)


def test_lowest_and_highest_thresholds():
    words = _philox.element_words(SEED, DRAW, 7, torch.arange(CHUNK))
    for threshold in (1, int(words.min()) + 1, int(words.max()), int(words.max()) + 1, 2**32 - 1):
        problem = lone(*(torch.full((CHUNK,), x) for x in (1.0, 0.0, 0.0)))
        call("guide", problem, {**GUIDE, "strength": 1.0, "threshold": threshold}, ELEMENTS)
        assert torch.equal(problem.grads[0], (words < threshold).float())


def rounded_by_words(x, words):
    """bfloat16 of float32 numbers by the rule for stochastic rounding."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    upper = ((bits + (words & 0xFFFF)) >> 16) & 0xFFFF
    stored = torch.where(upper >= 2**15, upper - 2**16, upper).to(torch.int16).view(BF16)
    return torch.where(x.isfinite(), stored, x.to(BF16))


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("shard", SHARDS)
def test_stochastic_rounding(shard, name):
    count, *place = SHARDS[shard]
    generator = torch.Generator().manual_seed(3)
    param, grad = (torch.randn(count, generator=generator) for _ in range(2))
    param[5:9] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])
    words = _philox.block(
        SEED,
        ((index := unsharded(shard)) // 4 & 0xFFFFFFFF, index // 4 >> 32, 0 * index + DRAW,
         0 * index + 0xC0000000 + 7),
    )  # fmt: skip
    words = torch.stack(words)[index % 4, torch.arange(count)]

    # As a copy of float32 master weights, which hold the number that is rounded.
    problem = lone(param.clone(), grad.clone(), param.clone())
    problem.states = [[torch.rand(count, generator=generator)] for _ in range(3)]
    problem.shards, problem.copies = [place], [copy := torch.zeros(count, dtype=BF16)]
    call(name, problem, FULL[name], INJECT, stochastic=True)
    expected = rounded_by_words(problem.params[0], words)
    assert torch.equal(copy.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(copy[numbers], expected[numbers])
    assert (copy != problem.params[0].to(BF16)).float().mean() > 0.15  # a quarter is expected

    if name == "sgd":  # the parameter itself; what is rounded is known exactly
        narrow = param.to(BF16)
        problem = lone(narrow.clone(), grad)
        problem.shards = [place]
        call("sgd", problem, plain(), 0, stochastic=True)
        expected = rounded_by_words(narrow.float() - grad, words)
        assert torch.equal(problem.params[0][numbers], expected[numbers])
        assert torch.equal(problem.params[0].isnan(), expected.isnan())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kinds", [(F32, BF16), (F32, F16), (F64, F32)])
def test_copies_of_master_weights(kinds, offset):
    master, dtype = kinds
    sizes = [5, CHUNK + 9, 0]
    kind = (*(master,) * 5, dtype)
    problem = Problem(sizes, kind, replay=False, copies=True, offset=offset)
    exact = problem.exact()
    call("adam", problem, ADAM, INJECT, look_ahead=True)
    reference_step("adam", exact, ADAM, INJECT)
    assert_same_step("adam", problem, exact, ADAM, "master weights")
    for param, copy in zip(problem.params, problem.copies, strict=True):
        assert torch.equal(copy, param.to(dtype))
    # The distance is that of the master weights.
    squares = call_norms(problem, 4, distances=torch.full_like(problem.distances, -1.0))
    assert torch.equal(squares[2], problem.distances)


@pytest.mark.parametrize("granularity", layout.GRANULARITIES)
def test_draws_on_the_device(granularity):
    n, draw = 1030, 2**32 + 9
    problem = Problem([0] * n, replay=False)
    table = problem.table(0)
    table[:, ANCHOR] = 1
    table[::5, ANCHOR] = 0  # without an anchor
    table[:, GROUP] = torch.arange(n) % 4
    alphas, strengths = [0.5, 0.0, 1.0, 0.5], [0.7, 0.7, 0.7, 0.0]
    thresholds = torch.tensor([_philox.threshold(alpha) for alpha in alphas])
    hyper = torch.tensor(
        [[9.0, float(t), 8.0, s] for t, s in zip(thresholds, strengths, strict=True)], dtype=F64
    )
    flags = torch.full((n,), 3, dtype=torch.uint8)
    flags[1::3] |= FIRST
    gate = torch.tensor([7], dtype=torch.uint8)

    def draw_flags():
        kernels.draw_flags_launch(
            table, hyper, torch.tensor(draw), flags, gate, seed=SIGNED_SEED,
            granularity=layout.GRANULARITIES[granularity], threshold_column=1, strength_column=3,
        )  # fmt: skip

    draw_flags()
    own = thresholds[table[:, GROUP]]
    if granularity == "step":
        injected = (_philox.step_word(SEED, draw) < own).long() * INJECT
    elif granularity == "tensor":
        words = _philox.tensor_words(SEED, draw, torch.tensor(problem.indices))
        injected = (words < own).long() * INJECT
    else:
        injected = torch.where(own == 2**32, INJECT, torch.where(own > 0, ELEMENTS, 0))
    injected[(table[:, ANCHOR] == 0) | (table[:, GROUP] == 3)] = 0
    expected = injected.to(torch.uint8)
    expected[1::3] |= FIRST
    assert torch.equal(flags, expected)
    assert injected.any() and gate.item() == 1
    table[:, ANCHOR] = 0
    draw_flags()
    assert gate.item() == 0 and set(flags.tolist()) == {0, FIRST}


# Norms and coefficients


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("which", range(1, 8))
@pytest.mark.parametrize("replay", [False, True])
def test_norms(which, replay, importance):
    rows.check_norms(call_norms, which, replay, EDGES, importance)


@pytest.mark.parametrize("importance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype, replay, importance):
    rows.check_products(call_products, dtype, replay, EDGES, importance)


def test_products_of_extreme_numbers():
    rows.check_extreme_products(call_products)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_of_chunks_as_they_are_used(dtype, offset):
    """Whole blocks, ragged ends and misaligned views give the reference's sums, and one run's."""
    sizes = [layout.CHUNK + 1024 + 5, 1024, 1023, 2049]
    kinds = (dtype, dtype, F32, dtype, BF16, dtype, dtype)
    problem, aligned = (Problem(sizes, kinds, offset=x) for x in (offset, 0))
    flags = problem.flags(INJECT)
    options = {"replay_weight": 0.6, "importance": 0.7}
    sums = call_products(problem, flags, chunk=layout.CHUNK, **options)
    exact = problem.exact()
    expected = reference.products(
        exact.params, exact.grads, exact.replays, exact.anchors, flags,
        importances=exact.importances, **options,
    )  # fmt: skip
    torch.testing.assert_close(sums[:4], expected[:4], rtol=1e-6, atol=0)
    bounds = (expected[[1, 2]] * expected[3]).sqrt()
    assert ((sums[4:] - expected[4:]).abs() <= 1e-6 * bounds).all()
    assert torch.equal(sums, call_products(aligned, flags, chunk=layout.CHUNK, **options))


@pytest.mark.parametrize("kinds", [(F32, BF16), (F64, F32)])
def test_products_count_written_parameters_in_their_masters_place(kinds):
    master, dtype = kinds
    problem = Problem([5, CHUNK + 9, 0], (*(master,) * 5, dtype, master), copies=True)
    for copy in problem.copies[:2]:
        copy[::3] += 0.5
    flags = problem.flags(INJECT)
    sums = call_products(problem, flags, replay_weight=0.6)
    exact = problem.exact()
    exact.params = [
        reference.adopted(p, c).double()
        for p, c in zip(problem.params, problem.copies, strict=True)
    ]
    expected = reference.products(
        exact.params, exact.grads, exact.replays, exact.anchors, flags, replay_weight=0.6
    )
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)
    assert (sums[reference.PULL, :2] / expected[reference.PULL, :2] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", rows.GUARDS)
def test_guard_coefficients(name, max_grad_norm, per_tensor, maximize):
    rows.check_guard(call_guard, name, max_grad_norm, per_tensor, maximize)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_guard_coefficients_of_many_rows(per_tensor):
    sums = torch.randn(6, 2100, generator=torch.Generator().manual_seed(0), dtype=F64)
    sums[:4].abs_()
    sums[reference.H_DOT_R] -= 0.5
    sums[reference.U_DOT_R] += 0.5
    settings = dict(max_grad_norm=1.0, per_tensor=per_tensor, maximize=False)
    expected = reference.guard_coefficients(sums, **settings)
    pulled = (expected[reference.SCALES : -2] > 0).double().mean()
    assert 0.2 < pulled < 0.9 if per_tensor else pulled == 1
    torch.testing.assert_close(call_guard(sums, **settings), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
def test_the_product_pass_makes_the_coefficients(max_grad_norm, per_tensor, maximize):
    sizes = [0, 5, CHUNK + 9, 0, 2 * CHUNK, *[1] * 9]
    settings = dict(max_grad_norm=max_grad_norm, per_tensor=per_tensor, maximize=maximize)
    problem = Problem(sizes)
    problem.grads[1] = problem.replays[1] = problem.anchors[2] = None
    for row in (1, len(sizes) - 1):  # a launch of other dtypes
        problem.params[row] = problem.params[row].double()
    # The gradient raises the replayed loss, and the pull lowers it.
    for p, a, g, r in zip(
        problem.params, problem.anchors, problem.grads, problem.replays, strict=True
    ):
        if a is not None and r is not None:
            r.copy_(p - a).mul_(-1.0 if maximize else 1.0).add_(0.1)
            g.copy_(r).mul_(-2.0)
    flags = problem.flags(INJECT)
    found = []
    for _ in range(2):  # the counter is ready for the next step
        out = torch.full((reference.SCALES + len(sizes) + 2,), float("nan"), dtype=F64)
        sums = call_products(problem, flags, out=out, replay_weight=0.5, **settings)
        assert torch.equal(out, call_guard(sums, **settings))
        assert (out[0] < 1) == (max_grad_norm is not None) and (out[1:4] > 0).all()
        assert out[reference.SCALES + 4] > 0 and out[-1] > 0
        found.append(bits([out, sums]))
    assert found[0] == found[1]
    # Nobody asks for them: the sums are the same.
    assert bits([call_products(problem, flags, replay_weight=0.5)]) == bits([sums])


@pytest.mark.parametrize(
    "dtypes", [(F32,) * 5, (BF16,) * 5, (BF16, F32, F16, F32, F16), (F64,) * 5]
)
def test_gradient_norm_does_not_depend_on_what_else_is_computed(dtypes):
    problem = Problem([33, 2 * CHUNK + 3], dtypes)
    replays = problem.replays
    seen = set()
    for which, problem.replays in itertools.product((2, 3, 6, 7), (replays, [])):
        seen.add(bits([call_norms(problem, which, replay_weight=0.6)[1]]))
    assert len(seen) == 1


@pytest.mark.parametrize("gate", [0, 1])
def test_closed_gate_leaves_the_total_norm(gate):
    problem = Problem([9, CHUNK + 9], replay=False)
    squares = call_norms(problem, 7, gate=torch.tensor([gate], dtype=torch.uint8))
    assert (squares[0] > 0).all()
    assert (squares[1:] > 0).all() if gate else (squares[1:] == 0).all()
    assert (problem.distances >= 0).all() if gate else (problem.distances == -1).all()


@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize("scaling,per_tensor", [(True, False), (True, True), (False, False)])
def test_the_norm_pass_makes_the_coefficients(scaling, per_tensor, max_grad_norm):
    rows.check_coefficients_of_the_pass(
        call_norms, call_coefficients, [0, 5, CHUNK + 9, 0, 2 * CHUNK, *[1] * 9], max_grad_norm,
        scaling, per_tensor,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", rows.DTYPES[1:3])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_written_parameters_take_their_masters_place(name, dtype):
    rows.check_adoption(call, name, dtype)


@pytest.mark.parametrize("dtype", rows.DTYPES[:3])
def test_norms_of_extreme_numbers(dtype):
    rows.check_extreme_norms(call_norms, call, dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        [16 * 9 + 3, 16, 16 * 20, 5, 0, 16 * 3],
        [16 * 17, 16 * 20 + 1],
        pytest.param([16 * 1030], marks=pytest.mark.slow),
        [40, 5] + [0] * 30 + [33],
    ],
    ids=["few chunks a row", "many", "very many", "most rows empty"],
)
def test_rows_of_many_chunks(sizes):
    problem = Problem(sizes, replay=False)
    exact = problem.exact()
    expected = reference.norms(exact.params, exact.grads, [], exact.anchors, exact.distances)
    squares = call_norms(problem, 7, chunk=16)
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
    before = [s.item() for s in problem.steps]
    for look_ahead in (True, False):
        call("adam", problem, {**ADAM, "lr": 0.0}, 0, chunk=16, look_ahead=look_ahead)
        assert torch.equal(problem.distances, squares[2] if look_ahead else 0 * squares[2] - 1)
    assert [s.item() - 2 for s in problem.steps] == before


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_look_ahead_is_the_next_norm_pass(dtype, name, importance):
    flags = [0, INJECT, ELEMENTS] * 3
    rows.check_look_ahead(call, call_norms, name, dtype, EDGES, flags, importance)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 0.1, 1e9])
@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_coefficients(per_tensor, scaling, max_grad_norm):
    many = torch.rand(3, 2100, generator=torch.Generator().manual_seed(0), dtype=F64)
    for squares in (*rows.SQUARES, many):
        squares = torch.as_tensor(squares, dtype=F64)
        options = dict(max_grad_norm=max_grad_norm, scaling=scaling, per_tensor=per_tensor)
        torch.testing.assert_close(
            call_coefficients(squares, **options), reference.coefficients(squares, **options),
            rtol=1e-14, atol=0, equal_nan=True,
        )  # fmt: skip


# The package


def run_python(code):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reasons_for_being_unavailable(monkeypatch):
    code = (
        "import sys, torch, dgg.kernels; print('triton' in sys.modules); "
        "print(dgg.kernels.unavailable(torch.device('cpu'))); "
        "print(dgg.kernels.unavailable(torch.device('cuda', 0)))"
    )
    imported, cpu, cuda = run_python(code).splitlines()
    assert imported == "False"  # by importing dgg alone
    assert "TRITON_INTERPRET=1" in cpu
    assert cuda == "None" if torch.cuda.is_available() else "no device" in cuda
    # The same in the interpreter, before the kernels are declared.
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, f"{kernels.__name__}.update", raising=False)
        patch.setenv("TRITON_INTERPRET", "1")
        assert kernels.unavailable(CPU) is None
        cuda = kernels.unavailable(torch.device("cuda", 0))
        assert "the interpreter cannot read 'cuda' memory" in cuda

    import triton

    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.3.1+git")
        assert "Triton 3.3.1+git is too old; install 3.4 or later" in kernels.unavailable(CPU)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in kernels.unavailable(CPU)


def test_unknown_names_are_missing():
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        kernels.__getattr__("adam")


def test_coefficients_with_constants_that_have_no_hash(monkeypatch):
    """As those of Triton 3.4."""
    from triton import language as tl

    monkeypatch.setattr(tl.constexpr, "__hash__", None)
    squares, out = torch.ones(3, 2, dtype=F64), torch.empty(reference.SCALES + 2, dtype=F64)
    settings = {"max_grad_norm": 0.5, "scaling": True, "per_tensor": True}
    kernels.coefficients_launch(squares, out, **settings)
    torch.testing.assert_close(out, reference.coefficients(squares, **settings))
