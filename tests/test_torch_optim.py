# SPDX-License-Identifier: BSD-3-Clause
"""torch's own tests of its optimizers, asked of dgg's AdamW, Adam and SGD.

The tables are torch's (``torch.testing._internal.common_optimizers``: every configuration, every
wrong one, every schedule), the tests are written anew. Wherever torch only asks that a loss falls
or that two of its implementations agree, torch.optim itself runs beside ours and both must end in
the same place. ``docs/compatibility_with_torch.md`` has a line for every test of torch's
``test/test_optim.py``: which test here stands for it, or why none does. What torch does and dgg
does not is tested here too, under "deviations", and explained there.

A way is a spelling of who carries out the step: the two backends by name, and torch's flags, which
torch's tables leave to the tests.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import re
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import dgg
from cases import BACKENDS, BF16, F16, F32, F64, cpp_missing

CLASSES = {torch.optim.AdamW: dgg.AdamW, torch.optim.Adam: dgg.Adam, torch.optim.SGD: dgg.SGD}
INFOS = {info.optim_cls: info for info in optim_db if info.optim_cls in CLASSES}
FORLOOP = {"foreach": False, "fused": False}
WAYS = {
    "reference": {"backend": "reference"},
    "cpp": {"backend": "cpp"},
    "forloop": FORLOOP,
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
NEEDS_CPP = ("cpp", "foreach", "fused")


class Case:
    """A row of torch's table: a class and one configuration of it."""

    def __init__(self, torch_class, number):
        self.torch_class, self.ours = torch_class, CLASSES[torch_class]
        self.info, self.number = INFOS[torch_class], number

    def kwargs(self, dtype=None):
        # Fresh every time: a schedule writes into a learning rate that is a tensor.
        return self.info.optim_inputs_func(device="cpu", dtype=dtype)[self.number].kwargs

    def sign(self):
        return -1 if self.kwargs().get("maximize") else 1

    def mine(self, params, way, **changes):
        return self.ours(params, **{**self.kwargs(), **WAYS[way], **changes})

    def theirs(self, params, **changes):
        return self.torch_class(params, **{**self.kwargs(), **FORLOOP, **changes})


CASES = [
    pytest.param(Case(torch_class, number), id=f"{torch_class.__name__}-{entry.desc}")
    for torch_class, info in INFOS.items()
    for number, entry in enumerate(info.optim_inputs_func(device="cpu"))
]
of_the_table = pytest.mark.parametrize("case", CASES)
both_backends = pytest.mark.parametrize("way", BACKENDS)
every_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            marks=pytest.mark.skipif(
                way in NEEDS_CPP and cpp_missing() is not None, reason=f"{cpp_missing()}"
            ),
        )
        for way in WAYS
    ],
)
of_every_class = pytest.mark.parametrize("torch_class", CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(dtype=F32, *, contiguous=True):
    """Returns weight, bias and input of a tiny layer."""
    if contiguous:
        return (
            Parameter(torch.randn(6, 5, dtype=dtype)),
            Parameter(torch.randn(6, dtype=dtype)),
            torch.randn(5, dtype=dtype),
        )
    return (
        Parameter(torch.randn(6, 5, 2, dtype=dtype)[..., 0]),
        Parameter(torch.randn(6, 2, dtype=dtype)[..., 0]),
        torch.randn(5, dtype=dtype),
    )


def twins(params):
    """Returns copies of the same strides, over memory of their own."""
    made = []
    for p in params:
        q = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach())
        made.append(Parameter(q, requires_grad=p.requires_grad))
    return made


def fall(opt, weight, bias, given):
    """Sets the gradients of a quadratic and returns its value."""
    opt.zero_grad()
    loss = (weight.mv(given) + bias).square().sum()
    loss.backward()
    return loss


def advance(opt, params, steps=3, seed=1):
    """Makes steps on gradients that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
        opt.step()


def some_params(dtype=F32):
    return [Parameter(torch.randn(2, 3, dtype=dtype)), Parameter(torch.randn(4, dtype=dtype))]


def named(params):
    return [(f"name{i}", p) for i, p in enumerate(params)]


def close(params, others, **tolerance):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)


def same_state(opt, params, other, others, **tolerance):
    """Compares the state by parameter; what torch calls None dgg need not have."""
    for p, q in zip(params, others, strict=True):
        one = {k: v for k, v in opt.state.get(p, {}).items() if v is not None}
        two = {k: v for k, v in other.state.get(q, {}).items() if v is not None}
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], check_dtype=False, **tolerance)


def equal_dicts(x, y):
    """Compares state dicts bit for bit."""
    if isinstance(x, torch.Tensor):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    elif isinstance(x, dict):
        assert x.keys() == y.keys()
        for key in x:
            equal_dicts(x[key], y[key])
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for one, other in zip(x, y, strict=True):
            equal_dicts(one, other)
    else:
        assert x == y


def nameless(state_dict):
    groups = [
        {k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


# -- the table ------------------------------------------------------------------------------------


def test_the_tables_leave_the_ways_to_us():
    assert len(INFOS) == 3 and len(CASES) >= 19
    for case in (row.values[0] for row in CASES):
        assert not {"foreach", "fused", "differentiable"} & case.kwargs().keys()


# -- errors ---------------------------------------------------------------------------------------

DUPLICATES = "a param group cannot have duplicate parameters"
ERRORS = [
    pytest.param(torch_class, number, id=f"{torch_class.__name__}-{row.optimizer_error_input.desc}")
    for torch_class, info in INFOS.items()
    for number, row in enumerate(info.optim_error_inputs_func(device="cpu", dtype=F32))
]


@pytest.mark.parametrize(("torch_class", "number"), ERRORS)
def test_errors_are_torchs(torch_class, number):
    rows = INFOS[torch_class].optim_error_inputs_func(device="cpu", dtype=F32)
    row = rows[number]
    given = row.optimizer_error_input
    assert row.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(row.error_type, Warning):
        # torch warns and goes on, and so does dgg, but not with duplicates: see the deviations.
        refused = pytest.raises(ValueError) if given.desc == DUPLICATES else nullcontext()
        with pytest.warns(row.error_type, match=row.error_regex), refused:
            CLASSES[torch_class](given.params, **given.kwargs)
        return
    with pytest.raises(row.error_type, match=row.error_regex):
        CLASSES[torch_class](given.params, **given.kwargs)
    if given.params is None:  # wrong options are refused over parameters that are right, too
        with pytest.raises(row.error_type, match=row.error_regex):
            CLASSES[torch_class](some_params(), **given.kwargs)


@of_every_class
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": torch.tensor(-1.0)}, ValueError),
        ({"lr": torch.ones(1, 2)}, ValueError),
        ({"weight_decay": -0.1}, ValueError),
        ({"foreach": True, "fused": True}, RuntimeError),
    ],
    ids=str,
)
def test_errors_that_all_share(torch_class, kwargs, error):
    texts = []
    for cls in (torch_class, CLASSES[torch_class]):
        with pytest.raises(error) as raised:
            cls(some_params(), **kwargs)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "kwargs",
    [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, {"momentum": -1}],
    ids=str,
)
def test_errors_of_sgd(kwargs):
    texts = []
    for cls in (torch.optim.SGD, dgg.SGD):
        with pytest.raises(ValueError) as raised:
            cls(some_params(), lr=0.1, **kwargs)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


@of_every_class
def test_a_group_that_is_refused_is_not_added(torch_class):
    p, q = some_params()
    texts = []
    for cls in (torch_class, CLASSES[torch_class]):
        opt = cls([p])
        for group, error in (
            ({"params": [("q", q)]}, ValueError),
            ({"params": {q}}, TypeError),
            ({"params": [q * 2]}, ValueError),
            ({"params": [p]}, ValueError),
            ({"params": ["q"]}, TypeError),
            ([q], TypeError),
        ):
            with pytest.raises(error) as raised:
                opt.add_param_group(group)
            texts.append(str(raised.value))
        assert [g["params"] for g in opt.param_groups] == [[p]]
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


# -- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@both_backends
@of_the_table
def test_descends_as_torch_does(case, way, contiguous):
    for schedules in ((), *case.info.scheduler_inputs):
        *params, given = linear(contiguous=contiguous)
        mirror = twins(params)
        assert [p.stride() for p in params] == [q.stride() for q in mirror]
        values = []
        for opt, ps in ((case.mine(params, way), params), (case.theirs(mirror), mirror)):
            made = [make(opt) for make in schedules]
            closure = functools.partial(fall, opt, *ps, given)
            first = closure().item()
            for _ in range(20):
                loss = closure()
                opt.step()
                for schedule in made:
                    schedule.step(*([loss] if isinstance(schedule, ReduceLROnPlateau) else []))
            values.append(closure().item())
            assert case.sign() * values[-1] < case.sign() * first
        close(params, mirror)
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@both_backends
@of_every_class
def test_groups_and_schedules_descend_as_torch_does(torch_class, way):
    for schedules in INFOS[torch_class].scheduler_inputs:
        *params, given = linear()
        mirror = twins(params)
        rates = []
        for cls, extra, ps in (
            (CLASSES[torch_class], WAYS[way], params),
            (torch_class, FORLOOP, mirror),
        ):
            opt = cls([{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.01}], **extra)
            made = [make(opt) for make in schedules]
            closure = functools.partial(fall, opt, *ps, given)
            first = closure().item()
            for _ in range(20):
                loss = opt.step(closure)
                for schedule in made:
                    schedule.step(*([loss] if isinstance(schedule, ReduceLROnPlateau) else []))
            assert closure().item() < first
            rates.append([g["lr"] for g in opt.param_groups])
        close(params, mirror)
        assert rates[0] == rates[1]


@pytest.mark.parametrize("dims", [0, 1, 2])
@every_way
@of_the_table
def test_learning_rate_in_a_tensor(case, way, dims):
    """As the number, as torch does or refuses; and it stays the caller's tensor."""
    *params, given = linear()
    lr = torch.tensor(1e-3).reshape([1] * dims)
    flags = {k: v for k, v in WAYS[way].items() if k != "backend"}
    try:
        case.torch_class(twins(params), **{**case.kwargs(), **flags, "lr": lr})
    except ValueError as refused:
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            case.mine(params, way, lr=lr)
        return
    mirror = twins(params)
    opt, other = case.mine(params, way, lr=lr), case.mine(mirror, way, lr=1e-3)
    for step in range(4):
        for each, ps in ((opt, params), (other, mirror)):
            fall(each, *ps, given)
            each.step()
        if step == 1:  # in place, as schedulers do
            lr.fill_(0.02)
            other.param_groups[0]["lr"] = 0.02
        assert opt.param_groups[0]["lr"] is lr
        # A float32 tensor holds 1e-3 and 0.02 to 24 bits.
        close(params, mirror, rtol=1e-6, atol=1e-7)


@every_way
@pytest.mark.parametrize("torch_class", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("shapes", [((), ()), ((1, 1, 1), (1, 1)), ((1,), ())], ids=str)
def test_betas_in_tensors(torch_class, shapes, way):
    params = some_params()
    mirror = twins(params)
    betas = tuple(torch.tensor(b).reshape(s) for b, s in zip((0.9, 0.99), shapes, strict=True))
    flags = {k: v for k, v in WAYS[way].items() if k != "backend"}
    try:
        other = torch_class(mirror, betas=betas, **flags)
    except ValueError as refused:
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            CLASSES[torch_class](params, betas=betas, **WAYS[way])
        return
    opt = CLASSES[torch_class](params, betas=betas, **WAYS[way])
    other.param_groups[0]["betas"] = tuple(map(float, betas))
    advance(opt, params)
    advance(other, mirror)
    close(params, mirror)


@every_way
@of_the_table
def test_complex_is_its_real_view(case, way):
    """torch's fused kernels take no complex parameters; ours do."""
    made = [
        torch.randn(6, 5, dtype=torch.complex64),
        torch.randn(6, dtype=torch.complex64),
        torch.randn(6, 5),  # real ones beside them
    ]
    views = [torch.view_as_real(x) if x.is_complex() else x for x in made]
    params, mirror = [Parameter(x) for x in made], [Parameter(x.clone()) for x in views]
    torchs = twins(params)
    opt, real, theirs = case.mine(params, way), case.mine(mirror, way), case.theirs(torchs)
    for _ in range(4):
        for p, q, r in zip(params, mirror, torchs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = torch.view_as_real(p.grad) if p.is_complex() else p.grad.clone()
            r.grad = p.grad.clone()
        for each in (opt, real, theirs):
            each.step()
        for p, q in zip(params, mirror, strict=True):
            assert torch.equal(torch.view_as_real(p) if p.is_complex() else p, q)
        close(params, torchs)


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@every_way
@of_the_table
def test_complex_is_its_two_parts(case, way):
    point = Parameter(torch.randn(2, dtype=torch.complex64))
    parts = [Parameter(point.detach().real.clone()), Parameter(point.detach().imag.clone())]
    opt, other = case.mine([point], way), case.mine(parts, way)
    for _ in range(3):
        opt.zero_grad()
        other.zero_grad()
        rosenbrock(point).abs().backward()
        rosenbrock(torch.complex(*parts)).abs().backward()
        opt.step()
        other.step()
        torch.testing.assert_close(point.detach().real, parts[0].detach())
        torch.testing.assert_close(point.detach().imag, parts[1].detach())


def sigmoid_net(dtype):
    """A network, its input, and a scalar parameter that no layer uses."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)
    apart = Parameter(torch.rand((), dtype=dtype))
    apart.grad = torch.rand_like(apart)
    given = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    return net, apart, given


def train(opt, net, given):
    """Seven steps: one without gradients, two with a frozen layer. Yields after each."""
    for step in range(7):
        opt.zero_grad()
        net[2].requires_grad_(step not in (3, 4))
        if step != 2:
            net(given).sum().backward()
        opt.step()
        yield step


def paired(mine, theirs, dtype, **tolerance):
    """Trains two optimizers side by side and compares weights and state at every step."""
    runs = []
    for make in (mine, theirs):
        net, apart, given = sigmoid_net(dtype)
        params = [*net.parameters(), apart]
        opt = make(params)
        runs.append((opt, params, train(opt, net, given)))
    (opt, params, one), (other, others, two) = runs
    for _ in zip(one, two, strict=True):
        close(params, others, **tolerance)
        same_state(opt, params, other, others, **tolerance)
    return opt, params


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@every_way
@of_the_table
def test_every_way_is_torchs_in_every_dtype(case, way, dtype):
    kwargs = case.kwargs(dtype)  # a larger eps in float16
    mine = functools.partial(case.ours, **kwargs, **WAYS[way])
    if dtype in (F64, F32):
        for flags in (FORLOOP, {"foreach": True}):
            if flags != FORLOOP and isinstance(kwargs.get("lr"), torch.Tensor):
                continue
            paired(mine, functools.partial(case.torch_class, **kwargs, **flags), dtype)
    elif case.torch_class is not torch.optim.SGD:
        # In 16 bits torch's fused step computes in float32, as dgg does; its other ways round every
        # intermediate, and its fused SGD is wrong on the CPU (pytorch#191763).
        paired(mine, functools.partial(case.torch_class, **kwargs, fused=True), dtype)
    reference = functools.partial(case.ours, **case.kwargs(dtype), backend="reference")
    paired(functools.partial(case.ours, **case.kwargs(dtype), **WAYS[way]), reference, dtype)


@every_way
@of_the_table
def test_dtypes_mixed_in_one_group(case, way):
    """Each is stepped as it would be alone; integers without gradient are left."""
    made = [torch.rand(2, 3).to(dtype) for dtype in (F64, F32, F16, BF16)]
    grads = [torch.rand_like(x) for x in made]
    counts = torch.randint(1024, (2, 3))
    params = [Parameter(x) for x in made]
    opt = case.mine([params[0], Parameter(counts, requires_grad=False), *params[1:]], way)
    alone = twins(params)
    others = [case.mine([p], way) for p in alone]
    torchs = twins(params)
    theirs = case.theirs(torchs)
    kept = counts.clone()
    for _ in range(7):
        for p, q, r, grad in zip(params, alone, torchs, grads, strict=True):
            p.grad, q.grad, r.grad = grad.clone(), grad.clone(), grad.clone()
        for each in (opt, theirs, *others):
            each.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(counts, kept)
    close(params[:2], torchs[:2])


@pytest.mark.parametrize("default", [F64, F16], ids=str)
@every_way
@of_the_table
def test_another_default_dtype(case, way, default):
    kwargs = case.kwargs()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        opt, params = paired(
            functools.partial(case.ours, **kwargs, **WAYS[way]),
            functools.partial(case.torch_class, **kwargs, **FORLOOP),
            F64,
        )
    finally:
        torch.set_default_dtype(before)
    for p in params:
        # As torch's fused steps have it; its other ways make it float64 under a default of float64.
        assert opt.state[p].get("step", torch.zeros(())).dtype == F32


@every_way
@of_the_table
def test_without_gradients_nothing_moves(case, way):
    for requires_grad in (False, True):
        params = [torch.randn(2, 3, requires_grad=requires_grad) for _ in range(2)]
        kept = [p.detach().clone() for p in params]
        opt = case.mine(params, way)
        loss = torch.tensor([1.0])
        with pytest.warns(UserWarning, match="no gradient") if requires_grad else quiet():
            assert opt.step(lambda loss=loss: loss) is loss
        opt.step()
        for p, q in zip(params, kept, strict=True):
            assert torch.equal(p, q)
        assert not any(opt.state.values())


class quiet:
    """A context that does nothing."""

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@every_way
@of_the_table
def test_zero_gradients_move_nothing_but_by_decay(case, way):
    params = some_params()
    kept, mirror = [p.detach().clone() for p in params], twins(params)
    opt, other = case.mine(params, way), case.theirs(mirror)
    for p, q in zip(params, mirror, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    opt.step(lambda: torch.ones(1))
    other.step()
    close(params, mirror)
    if opt.param_groups[0]["weight_decay"] == 0:
        for p, q in zip(params, kept, strict=True):
            assert torch.equal(p, q)


@every_way
@of_every_class
def test_empty_parameters(torch_class, way):
    """Embeddings of no rows, as some models build them."""
    empty, full = Parameter(torch.empty(0, 4)), Parameter(torch.ones(2))
    opt = CLASSES[torch_class]([empty, full], lr=0.1, **WAYS[way])
    for _ in range(2):
        empty.grad, full.grad = torch.empty(0, 4), torch.ones(2)
        opt.step()
    assert (full < 1).all()


@every_way
@of_the_table
def test_weight_decay_of_a_group(case, way):
    *params, given = linear()
    mirror = twins(params)
    for cls, extra, ps in ((case.ours, WAYS[way], params), (case.torch_class, FORLOOP, mirror)):
        opt = cls(
            [
                {"params": [ps[0]], **case.kwargs()},
                {"params": [ps[1]], **{**case.kwargs(), "weight_decay": 0.0}},
            ],
            **extra,
        )
        first = fall(opt, *ps, given).item()
        for _ in range(20):
            fall(opt, *ps, given)
            opt.step()
        assert case.sign() * fall(opt, *ps, given).item() < case.sign() * first
    close(params, mirror)


@every_way
@of_the_table
def test_learning_rate_of_a_group(case, way):
    *params, given = linear()
    still = Parameter(torch.randn(2))
    kept = still.detach().clone()
    kwargs = case.kwargs()
    kwargs["lr"] = kwargs.get("lr") or 1e-3
    # As little as makes no difference, so what moves the others is their group's own.
    opt = case.ours([{"params": params, **kwargs}, {"params": [still]}], **WAYS[way], lr=1e-28)
    mirror = twins(params)
    other = case.torch_class(mirror, **kwargs, **FORLOOP)
    first = fall(opt, *params, given).item()
    for _ in range(20):
        fall(opt, *params, given)
        still.grad = torch.rand_like(still)
        opt.step()
        fall(other, *mirror, given)
        other.step()
    assert case.sign() * fall(opt, *params, given).item() < case.sign() * first
    assert torch.equal(still, kept)
    close(params, mirror)


# -- GradScaler -----------------------------------------------------------------------------------


@every_way
@of_every_class
def test_only_a_fused_step_is_given_the_scale(torch_class, way):
    """GradScaler unscales for all others, which is what its callers see in ``.grad``."""
    flags = {k: v for k, v in WAYS[way].items() if k != "backend"}
    theirs = torch_class(some_params(), **flags)
    opt = CLASSES[torch_class](some_params(), **WAYS[way])
    supports = getattr(opt, "_step_supports_amp_scaling", False)
    assert supports == getattr(theirs, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("scale", [None, 1.0, 4.0])
@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.skipif(cpp_missing() is not None, reason=f"{cpp_missing()}")
@of_the_table
def test_fused_steps_unless_inf_was_found(case, found, scale):
    params = [Parameter(torch.ones(1)) for _ in range(5)]
    mirror = twins(params)
    opt = case.mine(params, "fused")
    other = case.theirs(mirror, fused=True)
    for each, ps in ((opt, params), (other, mirror)):
        each.grad_scale = None if scale is None else torch.full((1,), scale)
        each.found_inf = torch.tensor(found)
        for _ in range(2):
            for p in ps:
                p.grad = torch.full_like(p, 0.5 * (scale or 1.0))
            each.step()
        for p in ps:
            if "step" in each.state[p]:
                assert each.state[p]["step"] == 2 * (1 - found)
    close(params, mirror)
    if found:
        assert all(torch.equal(p, torch.ones(1)) for p in params)


@pytest.mark.parametrize("unscaled", [False, True])
@every_way
@of_the_table
def test_grad_scaler_as_with_torch(case, way, unscaled):
    """Five scaled steps, the third overflows: weights, scale and state are torch's."""
    runs = []
    flags = {k: v for k, v in WAYS[way].items() if k != "backend"}
    *made, given = linear()
    for make in (
        lambda ps: case.mine(ps, way),
        lambda ps: case.torch_class(ps, **{**case.kwargs(), **flags}),
    ):
        params = twins(made)
        try:
            opt = make(params)
        except ValueError:
            return  # a learning rate in a tensor with foreach=True, tested above
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
        scales = []
        for step in range(5):
            opt.zero_grad()
            loss = (params[0].mv(given) + params[1]).square().sum()
            scaler.scale(loss).backward()
            if step == 2:
                params[0].grad[0, 0] = float("inf")
            if unscaled:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(params, 5.0)
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append((params, opt, scales))
    (params, opt, scales), (others, other, expected) = runs
    assert scales == expected
    assert len(set(scales)) > 1
    close(params, others)
    same_state(opt, params, other, others)


# -- printing, copies, state ----------------------------------------------------------------------


@every_way
@of_the_table
def test_prints_what_torch_prints(case, way):
    opt = case.mine(some_params(), way)
    flags = {k: v for k, v in WAYS[way].items() if k != "backend"}
    lines = repr(opt).splitlines()
    theirs = repr(case.theirs(some_params(), **{"foreach": None, "fused": None, **flags}))
    assert set(theirs.splitlines()) <= set(lines)
    assert any("alpha" in line for line in lines)


@every_way
@of_the_table
def test_copies_have_all_public_attributes(case, way):
    params = some_params()
    opt = case.mine(params, way)
    advance(opt, params)
    other = copy.deepcopy(opt)
    public = [{k for k in each.__dict__ if not k.startswith("_")} for each in (opt, other)]
    assert public[0] == public[1]
    equal_dicts(opt.state_dict(), other.state_dict())
    assert opt.param_groups[0]["params"][0] is not other.param_groups[0]["params"][0]


@every_way
@of_the_table
def test_state_is_there_after_a_step(case, way):
    net = torch.nn.Linear(5, 5)
    opt = case.mine(net.parameters(), way)
    net(torch.rand(2, 5)).sum().backward()
    opt.step()
    for entry in opt.state.values():
        assert entry
    assert len(opt.state) == (2 if opt.param_groups[0].get("momentum", 1) else 0)


@pytest.mark.parametrize("names", list(itertools.product([True, False], repeat=2)), ids=str)
@every_way
@of_the_table
def test_state_dict_depends_on_nothing_but_the_steps(case, way, names):
    *params, given = linear()
    opt = case.mine(named(params) if names[0] else params, way)
    for _ in range(4):
        fall(opt, *params, given)
        opt.step()
    others = twins(params)
    other = case.mine(named(others) if names[1] else others, way)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        for each, ps in ((opt, params), (other, others)):
            fall(each, *ps, given)
            each.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
    equal_dicts(nameless(opt.state_dict()), nameless(other.state_dict()))
    if any(names):
        assert other.param_groups[0]["param_names"] == ["name0", "name1"]
    # A group that stands there twice has the same numbers both times.
    other.param_groups.extend(other.param_groups)
    last = [nameless(each.state_dict())["param_groups"][-1] for each in (opt, other)]
    equal_dicts(*last)


@every_way
@of_the_table
def test_state_dicts_from_before_torch_had_the_flags(case, way):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    given = torch.rand(1, 4, 6, 6)
    opt = case.mine(net.parameters(), way)

    def step():
        opt.zero_grad()
        net(given).square().sum().backward()
        opt.step()

    for _ in range(3):
        step()
    twin, other = copy.deepcopy((net, opt))
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for flag in case.info.not_og_supported_flags:
            if flag != "maximize" or not group[flag]:  # it would ascend from here on
                group.pop(flag, None)
    kept = copy.deepcopy(old)
    opt.load_state_dict(old)
    equal_dicts(old, kept)
    step()
    other.zero_grad()
    twin(given).square().sum().backward()
    other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("names", list(itertools.product([True, False], repeat=2)), ids=str)
@of_the_table
def test_state_dicts_from_and_to_named_parameters(case, names):
    """Between torch's optimizer and ours, both ways."""
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    given = torch.rand(1, 4, 6, 6)
    for first, second in (
        (case.ours, case.ours), (case.ours, case.torch_class), (case.torch_class, case.ours)
    ):  # fmt: skip
        opt = first(net.named_parameters() if names[0] else net.parameters(), **case.kwargs())
        for _ in range(2):
            opt.zero_grad()
            net(given).square().sum().backward()
            opt.step()
        other = second(net.named_parameters() if names[1] else net.parameters(), **case.kwargs())
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        net(given).square().sum().backward()
        other.step()
        if any(names):
            saved = other.state_dict()["param_groups"][0]["param_names"]
            assert saved == ["0.weight", "0.bias", "1.weight", "1.bias"]
        else:
            assert "param_names" not in other.state_dict()["param_groups"][0]


@pytest.mark.parametrize("names", [True, False])
@every_way
@of_the_table
def test_saved_and_loaded_is_the_same(case, way, names):
    params = some_params()
    opt = case.mine(named(params) if names else params, way)
    advance(opt, params)
    state = opt.state_dict()
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        equal_dicts(torch.load(file, weights_only=weights_only), state)


@every_way
@of_the_table
def test_step_that_is_no_tensor(case, way):
    params = some_params()
    opt = case.mine(params, way)
    advance(opt, params)
    twin_params, twin = copy.deepcopy((params, opt))
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = entry["step"].item()
    opt.load_state_dict(state)
    advance(opt, params, seed=2)
    advance(twin, twin_params, seed=2)
    for p, q in zip(params, twin_params, strict=True):
        assert torch.equal(p, q)


@every_way
@of_the_table
def test_state_goes_to_parameters_of_another_dtype(case, way):
    """torch asks it of another device: moments follow the parameter, the dict stays as it is."""
    params = some_params()
    opt = case.mine(params, way)
    advance(opt, params)
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    wide = [Parameter(p.detach().double()) for p in params]
    other = case.mine(wide, way)
    other.load_state_dict(saved)
    equal_dicts(saved, kept)
    for p, q in zip(params, wide, strict=True):
        for key, value in opt.state[p].items():
            assert other.state[q][key].dtype == (F32 if key == "step" else F64)
            torch.testing.assert_close(other.state[q][key], value, check_dtype=False)
    advance(opt, params, seed=2)
    advance(other, wide, seed=2)
    equal_dicts({k: v for k, v in saved.items() if k == "param_groups"},
                {k: v for k, v in kept.items() if k == "param_groups"})  # fmt: skip
    close(params, wide, check_dtype=False)


@of_every_class
def test_state_dicts_of_other_groups_are_refused(torch_class):
    p, q = some_params()
    opt = CLASSES[torch_class]([p, q])
    for other in (
        CLASSES[torch_class]([p]),
        CLASSES[torch_class]([{"params": [p]}, {"params": [q]}]),
    ):
        for one, two in ((opt, other), (other, opt)):
            with pytest.raises(ValueError, match="group"):
                one.load_state_dict(two.state_dict())


@pytest.mark.parametrize("other", [torch.optim, dgg])
def test_adamw_stays_adamw(other):
    """The decoupled decay is the class's, or for Adam the state dict's."""
    p = some_params()[0]
    state = dgg.AdamW([p]).state_dict()
    adam = other.Adam([p])
    adam.load_state_dict(state)
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    fresh = other.Adam([p]).state_dict()
    assert fresh["param_groups"][0]["decoupled_weight_decay"] is False
    adamw = dgg.AdamW([p])
    adamw.load_state_dict(fresh)
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
    # From before torch.optim.AdamW was an Adam.
    del state["param_groups"][0]["decoupled_weight_decay"]
    adamw = dgg.AdamW([p], weight_decay=0.5)
    adamw.load_state_dict(state)
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
    p.grad = torch.zeros_like(p)
    expected = p.detach() * (1 - 1e-3 * 1e-2)  # the state dict's, which are the defaults
    adamw.step()
    torch.testing.assert_close(p.detach(), expected)


# -- hooks ----------------------------------------------------------------------------------------


@every_way
@of_the_table
def test_step_hooks(case, way):
    p = torch.tensor([1.0, 1.0])
    opt = case.mine([p], way)
    calls = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o, args, kwargs))),
        opt.register_step_post_hook(
            lambda o, args, kwargs: calls.append(("post", o, args, kwargs))
        ),
    ]
    opt.step()
    opt.step(closure=None)
    assert calls == [("pre", opt, (opt,), {}), ("post", opt, (opt,), {}),
                     ("pre", opt, (opt,), {"closure": None}),
                     ("post", opt, (opt,), {"closure": None})]  # fmt: skip
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(calls) == 4


@every_way
@of_every_class
def test_global_and_own_step_hooks_in_order(torch_class, way):
    p = torch.tensor([1.0, 1.0])
    opt, other = CLASSES[torch_class]([p], **WAYS[way]), torch.optim.SGD([p])
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
        *(o.register_step_pre_hook(lambda *_: calls.append(1)) for o in (opt, other)),
        *(o.register_step_post_hook(lambda *_: calls.append(2)) for o in (opt, other)),
    ]
    for each in (opt, other, opt):
        each.step()
    for handle in handles:
        handle.remove()
    assert calls == [0, 1, 2, 5] * 3
    opt.step()
    other.step()
    assert calls == [0, 1, 2, 5] * 3


@of_every_class
def test_a_hook_may_change_what_the_step_is_given(torch_class):
    p = Parameter(torch.ones(2))
    results = []
    for cls in (torch_class, CLASSES[torch_class]):
        opt = cls([p], lr=0.1)

        def hook(opt, args, kwargs):
            return (args[0], lambda: 7.0), {}

        handle = opt.register_step_pre_hook(hook)
        p.grad = torch.ones(2)
        results.append(opt.step())
        handle.remove()
        opt.register_step_pre_hook(lambda *_: "neither None nor a pair")
        with pytest.raises(RuntimeError) as raised:
            opt.step()
        results.append(str(raised.value).partition("must")[2])
    assert results[:2] == results[2:]
    assert results[0] == 7.0


def note(opt):
    opt.state["test"] = 1


def take_note(opt, state_dict):
    state_dict["noted"] = state_dict["state"].pop("test", None)
    return state_dict


@every_way
@of_the_table
def test_state_dict_hooks(case, way):
    for before, after in itertools.product([True, False], repeat=2):
        opt = case.mine(some_params(), way)
        if before:
            opt.register_state_dict_pre_hook(note)
        if after:
            opt.register_state_dict_post_hook(take_note)
        state = opt.state_dict()
        assert state["state"].get("test") == (1 if before and not after else None)
        if after:
            assert state["noted"] == (1 if before else None)


@of_every_class
def test_hooks_of_the_state_dict_go_in_their_order(torch_class):
    opt = CLASSES[torch_class](some_params())
    calls = []
    for prepend, number in ((False, 1), (False, 2), (True, 0)):
        opt.register_state_dict_pre_hook(lambda o, n=number: calls.append(n), prepend=prepend)
        opt.register_state_dict_post_hook(lambda o, s, n=number: calls.append(n), prepend=prepend)
        opt.register_load_state_dict_pre_hook(
            lambda o, s, n=number: calls.append(n), prepend=prepend
        )
        opt.register_load_state_dict_post_hook(lambda o, n=number: calls.append(n), prepend=prepend)
    state = opt.state_dict()
    assert calls == [0, 1, 2] * 2
    opt.load_state_dict(state)
    assert calls == [0, 1, 2] * 4


@every_way
@of_the_table
def test_hooks_before_loading(case, way):
    """One changes the dict it is given, the other returns another one; the later one wins."""
    params = some_params()
    opt = case.mine(params, way)
    state = opt.state_dict()

    def change(opt, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def replace(opt, state_dict):
        made = copy.deepcopy(state_dict)
        made["param_groups"][0]["lr"] = 0.003
        return made

    opt.register_load_state_dict_pre_hook(change)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.002
    handle = opt.register_load_state_dict_pre_hook(replace, prepend=True)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.002
    handle.remove()
    opt.register_load_state_dict_pre_hook(replace)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.003
    mirror = twins(params)
    other = case.mine(mirror, way, lr=0.003)
    advance(opt, params)
    advance(other, mirror)
    for p, q in zip(params, mirror, strict=True):
        assert torch.equal(p, q)


@every_way
@of_the_table
def test_hooks_after_loading(case, way):
    for before in (True, False):
        params = some_params()
        opt = case.mine(params, way)
        advance(opt, params)

        def replace(opt, state_dict):
            made = copy.deepcopy(state_dict)
            made["param_groups"][0]["lr"] = 0.003
            return made

        def finish(opt):
            opt.state["lr seen"] = opt.param_groups[0]["lr"]

        if before:
            opt.register_load_state_dict_pre_hook(replace)
        opt.register_load_state_dict_post_hook(finish)
        opt.load_state_dict(opt.state_dict())
        assert (opt.state["lr seen"] == 0.003) == before
        advance(opt, params)  # what stands there by a name is no parameter's state
        assert opt.state["lr seen"] == opt.param_groups[0]["lr"]


@of_every_class
def test_a_hook_may_convert_a_foreign_state_dict(torch_class):
    """What such hooks are for: another project's names and groups, put right before loading."""
    params = some_params()
    opt = CLASSES[torch_class](params, lr=0.1)
    advance(opt, params)
    twin_params, twin = copy.deepcopy((params, opt))
    saved = copy.deepcopy(opt.state_dict())
    foreign = {
        "state": {
            key: {f"their_{name}": value for name, value in entry.items()}
            for key, entry in saved["state"].items()
        },
        "param_groups": [{**saved["param_groups"][0], "params": [key]} for key in (0, 1)],
    }

    def convert(opt, state_dict):
        groups = state_dict["param_groups"]
        joined = {**groups[0], "params": [key for group in groups for key in group["params"]]}
        return {
            "state": {
                key: {name.removeprefix("their_"): value for name, value in entry.items()}
                for key, entry in state_dict["state"].items()
            },
            "param_groups": [joined],
        }

    for cls in (torch_class, CLASSES[torch_class]):
        others = twins(params)
        other = cls(others)
        other.register_load_state_dict_pre_hook(convert)
        other.load_state_dict(copy.deepcopy(foreign))
        advance(other, others, seed=2)
        if cls is torch_class:
            continue
        advance(twin, twin_params, seed=2)
        for p, q in zip(others, twin_params, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("returns", [False, True])
@of_every_class
def test_a_hook_may_set_an_option(torch_class, returns):
    """Also one of the guidance, which no state dict of torch has; there or in another dict."""
    params = some_params()
    saved = torch_class(twins(params), lr=0.1).state_dict()
    opt = CLASSES[torch_class](params, alpha=0.3)

    def hook(opt, state_dict):
        if returns:
            state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0].update(lr=0.5, alpha=0.7)
        return state_dict if returns else None

    opt.register_load_state_dict_pre_hook(hook)
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["alpha"]) == (0.5, 0.7)


@of_every_class
def test_a_hook_after_loading_sees_all_that_was_loaded(torch_class):
    """Anchors and master weights are put back by dgg, not by torch, and yet before the hook."""
    cls = CLASSES[torch_class]
    params = some_params(BF16)
    opt = cls(params, lr=0.1, master_weights=True)
    opt.set_anchor()
    advance(opt, params)
    others = twins(params)
    other = cls(others, lr=0.1, master_weights=True)
    seen = []
    other.register_load_state_dict_post_hook(lambda o: seen.append(copy.deepcopy(o.state_dict())))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert len(seen) == 1
    equal_dicts(seen[0], opt.state_dict())


@pytest.mark.parametrize("where", ["constructor", "state dict", "group"])
@of_every_class
def test_an_array_of_one_number_is_that_number(torch_class, where):
    """torch takes numpy's numbers wherever it takes Python's."""
    array = numpy.array([0.25])
    params = some_params()
    mirror = twins(params)
    opt = CLASSES[torch_class](params, lr=array if where == "constructor" else 0.5)
    if where == "state dict":
        saved = opt.state_dict()
        saved["param_groups"][0]["lr"] = array
        opt.load_state_dict(saved)
    elif where == "group":
        opt.param_groups[0]["lr"] = array
    advance(opt, params)
    advance(torch_class(mirror, lr=0.25), mirror)
    close(params, mirror)


# -- schedules ------------------------------------------------------------------------------------


@every_way
@of_every_class
def test_a_schedule_moves_every_group(torch_class, way):
    p, q = some_params()
    mirror = twins([p, q])
    runs = []
    for cls, extra, ps in (
        (CLASSES[torch_class], WAYS[way], [p, q]), (torch_class, FORLOOP, mirror)
    ):  # fmt: skip
        opt = cls([{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.5}], lr=0.1, **extra)
        schedule = LambdaLR(opt, [lambda k: 0.9**k, lambda k: 1 / (k + 1)])
        for _ in range(4):
            advance(opt, ps, steps=1)
            schedule.step()
        late = Parameter(torch.ones(3))
        opt.add_param_group({"params": [late], "lr": 0.25})
        advance(opt, [*ps, late], steps=1)
        runs.append([*ps, late])
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.1 * 0.9**4, 0.1, 0.25])
    close(*runs)


# -- deviations -----------------------------------------------------------------------------------
# Each has its reason in docs/compatibility_with_torch.md.


@of_every_class
def test_deviation_duplicates_are_refused(torch_class):
    p = Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        torch_class([p, p])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="in the group twice"):
        CLASSES[torch_class]([p, p])
    opt = CLASSES[torch_class]([p])
    q = Parameter(torch.ones(2))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="in the group twice"):
        opt.add_param_group({"params": [q, q]})
    assert len(opt.param_groups) == 1


@every_way
@of_every_class
def test_deviation_meta_parameters_cannot_be_stepped(torch_class, way):
    """torch's fused step says so, too, its forloop does nothing."""
    with torch.device("meta"):
        net = torch.nn.Linear(2, 3)
    opt = CLASSES[torch_class](net.parameters(), **WAYS[way])
    for p in net.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises(ValueError, match="on the meta device.*make the optimizer afterwards"):
        opt.step()
    assert not any(opt.state.values())
    opt.zero_grad(set_to_none=True)
    net.to_empty(device="cpu")
    opt = CLASSES[torch_class](net.parameters(), **WAYS[way])
    for p in net.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    opt.step()
    assert all((p < 1).all() for p in net.parameters())


@every_way
@of_the_table
def test_deviation_sparse_gradients_are_refused(case, way):
    p = Parameter(torch.tensor([1.5, 1.5], dtype=F64))
    kept = p.detach().clone()
    opt = case.mine([p], way)
    p.grad = torch.sparse_coo_tensor([[0, 0]], [0.25, 0.75], (2,), dtype=F64)
    with pytest.raises(TypeError, match="sparse_coo.*SparseAdam"):
        opt.step()
    assert torch.equal(p, kept)
    assert not any(opt.state.values())
    p.grad = p.grad.to_dense()
    opt.step()
    assert not torch.equal(p, kept)


@of_every_class
def test_deviation_no_graph_through_a_step(torch_class):
    name = torch_class.__name__
    for extra in ({}, {"fused": True}):
        with pytest.raises(ValueError, match=rf"differentiable=True.*torch\.optim\.{name}"):
            CLASSES[torch_class](some_params(), differentiable=True, **extra)


@pytest.mark.parametrize("torch_class", [torch.optim.AdamW, torch.optim.Adam])
def test_deviation_capturable_needs_a_gpu(torch_class):
    """torch lets it be built and stops at the step."""
    with pytest.raises(ValueError, match="capturable=True needs kernels that run on a GPU"):
        CLASSES[torch_class](some_params(), capturable=True)


@pytest.mark.skipif(cpp_missing() is not None, reason=f"{cpp_missing()}")
@of_every_class
def test_deviation_a_scaled_gradient_is_left_as_it_is(torch_class):
    """torch's fused kernels write the unscaled one back."""
    kept = []
    for cls in (torch_class, CLASSES[torch_class]):
        p = Parameter(torch.ones(3))
        opt = cls([p], lr=0.1, fused=True)
        p.grad = torch.full((3,), 4.0)
        opt.grad_scale, opt.found_inf = torch.full((1,), 4.0), torch.zeros(())
        opt.step()
        kept.append(p.grad[0].item())
    assert kept == [1.0, 4.0]


@every_way
@of_the_table
def test_deviation_a_checkpoint_does_not_choose_the_way(case, way):
    """torch would take the flags of a run on another machine and stop at the step."""
    params = some_params()
    opt = case.mine(params, way)
    advance(opt, params)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        group.update(fused=True, foreach=False, capturable=True)
    others = twins(params)
    other = case.mine(others, way)
    flags = [(g["fused"], g["foreach"]) for g in other.param_groups]
    other.load_state_dict(saved)
    assert [(g["fused"], g["foreach"]) for g in other.param_groups] == flags
    assert not other.param_groups[0].get("capturable")
    advance(opt, params, seed=2)
    advance(other, others, seed=2)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
