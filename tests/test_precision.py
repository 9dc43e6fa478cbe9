# SPDX-License-Identifier: BSD-3-Clause
"""Parameters of 16 bits: stochastic rounding, master weights, moments of another dtype.

- Stochastic rounding gives exactly the bits that the float32 step and the Philox words say.
- Master weights follow a float32 training bit for bit; the parameters are their rounding; what
  somebody else writes into a parameter is taken up.
- All of it survives a checkpoint, and contradictions are refused.
- Steps in 16 bits with neither of the two say so, once.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import dgg
from cases import BACKENDS, BF16, F16, F32, make_params, set_grads
from dgg import _philox

SHAPES = [(), (7, 5), (0,), (2049,), (33, 64)]
RULES = {
    "adamw": (dgg.AdamW, {"lr": 3e-3, "weight_decay": 0.1}),
    "amsgrad": (dgg.Adam, {"lr": 3e-3, "amsgrad": True}),
    "sgd": (dgg.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": (dgg.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
}
GUIDED = {"alpha": 0.6, "strength": 0.7, "max_grad_norm": 3.0, "seed": 2**63 + 5}


def _same(tensors, others):
    return all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))


def _with_grads(params, seed, dtype=None):
    set_grads(params, torch.Generator().manual_seed(seed), dtype=dtype)


def _mirror_grads(params, twins):
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.to(q.dtype)


def _round(value, seed, draw, index):
    """bfloat16 of ``value`` as the words of the draw say, in integers."""
    elements = torch.arange(value.numel()).view(value.shape)
    words = _philox.element_words(seed, draw, index, elements, 3 << 30)
    bits = value.view(torch.int32).long() & 0xFFFFFFFF
    upper = (bits + (words & 0xFFFF)) // 65536
    return upper.to(torch.int32).to(torch.int16).view(BF16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_stochastic_rounding_follows_its_words(rule, backend):
    cls, options = RULES[rule]
    options = {**options, **GUIDED, "state_dtype": F32, "anchor_dtype": F32, "backend": backend}
    params = make_params(SHAPES, BF16)
    optimizer = cls(params, stochastic_rounding=True, **options)
    moved = 0
    for draw in range(6):
        twins = [torch.nn.Parameter(p.detach().float()) for p in params]
        twin = cls(twins, **options)
        # The same state, so that one step of float32 shows what is to be rounded.
        for p, q in zip(params, twins, strict=True):
            if optimizer.state.get(p):
                twin.state[q] = {k: v.clone() for k, v in optimizer.state[p].items()}
        for mine, theirs in zip(twin.param_groups, optimizer.param_groups, strict=True):
            mine.update({k: theirs[k] for k in ("draw_index", "task_index", "anchored")})
        _with_grads(params, draw)
        _mirror_grads(params, twins)
        optimizer.step()
        twin.step()
        for index, (p, q) in enumerate(zip(params, twins, strict=True)):
            expected = _round(q.detach(), GUIDED["seed"], draw, index)
            assert torch.equal(p, expected), f"draw {draw}, parameter {index}"
            moved += (p != q.detach().to(BF16)).sum().item()
        if draw == 2:
            optimizer.set_anchor()
    assert moved > 100, "the words never decided anything"


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_updates_survive_in_the_mean(backend):
    def trained(**options):
        p = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = dgg.SGD([p], lr=1.0, backend=backend, **options)
        for _ in range(100):
            # A quarter of the spacing of bfloat16 below 1 (2**-8).
            p.grad = torch.full_like(p, 2**-10)
            optimizer.step()
        return p.detach().double()

    assert torch.equal(trained(), torch.ones(4096, dtype=torch.float64))
    exact = 1 - 100 * 2**-10
    drawn = trained(stochastic_rounding=True)
    # Each step's rounding is Bernoulli(1/4) of 2**-8: the mean's standard deviation over 4,096
    # elements and 100 steps is 2**-8 sqrt(100 * 3/16 / 4096); five of them.
    assert abs(drawn.mean().item() - exact) < 5 * 2**-8 * (100 * 3 / 16 / 4096) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_survive_stochastic_rounding(backend):
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 2.0**-133])
    p = torch.nn.Parameter(values.to(BF16))
    optimizer = dgg.SGD([p], lr=0.0, backend=backend, stochastic_rounding=True)
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p.nan_to_num(nan=7.0), values.to(BF16).nan_to_num(nan=7.0))
    assert p[2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rule", RULES)
def test_master_weights_follow_float32(rule, dtype, backend):
    cls, options = RULES[rule]
    options = {**options, **GUIDED, "state_dtype": F32, "backend": backend}
    params = make_params([*SHAPES, (6, 4, 3)], dtype)
    params[-1].data = params[-1].data.transpose(0, 2)  # not contiguous
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = cls(params, master_weights=True, **options)
    twin = cls(twins, **options)
    for step in range(12):
        _with_grads(params, step)
        _mirror_grads(params, twins)
        if step in (3, 8):
            optimizer.set_anchor()
            twin.set_anchor()
        optimizer.step()
        twin.step()
        masters = [optimizer.state[p]["master"] for p in params]
        assert _same(masters, twins)
        assert _same(params, [m.to(dtype) for m in masters])
    anchors = [optimizer.state[p]["anchor"] for p in params]
    assert all(a.dtype == F32 for a in anchors)
    assert _same(anchors, [twin.state[q]["anchor"] for q in twins])


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_weights_beside_float32_parameters(backend):
    params = [*make_params([(40,)], BF16), *make_params([(40,)], F32, seed=1)]
    optimizer = dgg.AdamW(params, lr=0.1, master_weights=True, backend=backend)
    _with_grads(params, 0)
    before = params[1].detach().clone()
    optimizer.step()
    assert "master" in optimizer.state[params[0]] and "master" not in optimizer.state[params[1]]
    assert not torch.equal(before, params[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_by_others_are_taken_up(backend):
    (p,) = make_params([(64,)], BF16)
    optimizer = dgg.SGD([p], lr=2**-12, master_weights=True, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    master = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[:8] = 3.0
    p.grad = torch.zeros_like(p)
    optimizer.step()
    now = optimizer.state[p]["master"]
    assert torch.equal(now[:8], torch.full((8,), 3.0)) and torch.equal(p[:8], now[:8].to(BF16))
    assert torch.equal(now[8:], master[8:]), "bits below bfloat16 were lost"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["master_weights", "stochastic_rounding", "neither"])
def test_checkpoints_keep_precision(kind, backend, tmp_path):
    options = {"lr": 3e-3, "state_dtype": F32, "backend": backend, **GUIDED}
    if kind != "neither":
        options[kind] = True
    params = make_params(SHAPES, BF16)
    optimizer = dgg.AdamW(params, **options)
    for step in range(5):
        _with_grads(params, step)
        if step == 2:
            optimizer.set_anchor()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = dgg.AdamW(others, **options)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    twin = copy.deepcopy(optimizer)
    for p, q in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            loaded = resumed.state[q][name]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), name
    for step in range(5, 9):
        for every in (params, others, [p for g in twin.param_groups for p in g["params"]]):
            _with_grads(every, step)
        for each in (optimizer, resumed, twin):
            each.step()
    assert _same(params, others)
    assert _same(params, [p for g in twin.param_groups for p in g["params"]])


def test_a_checkpoint_with_masters_needs_the_option():
    params = make_params([(5,)], BF16)
    optimizer = dgg.AdamW(params, master_weights=True)
    _with_grads(params, 0)
    optimizer.step()
    other = dgg.AdamW(make_params([(5,)], BF16))
    with pytest.raises(ValueError, match="master weight of parameter 0.*master_weights=True"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize(
    "dtype,options,error,message",
    [
        (F32, {"stochastic_rounding": True}, ValueError, "bfloat16 parameters and there is none"),
        (F16, {"stochastic_rounding": True}, ValueError, "bfloat16 parameters and there is none"),
        (F32, {"master_weights": True}, ValueError, "float16 parameters and there is none"),
        (
            BF16,
            {"master_weights": True, "stochastic_rounding": True},
            ValueError,
            "choose one",
        ),
        (BF16, {"master_weights": 1}, TypeError, "master_weights=1 must be True or False"),
        (BF16, {"state_dtype": torch.int32}, TypeError, "state_dtype=torch.int32 must be one of"),
        (BF16, {"state_dtype": "float32"}, TypeError, "state_dtype='float32' must be one of"),
    ],
)
def test_contradictions_are_refused(dtype, options, error, message):
    with pytest.raises(error, match=message):
        dgg.AdamW(make_params([(3,)], dtype), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_of_another_dtype(backend):
    params = make_params(SHAPES, BF16)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = dgg.AdamW(params, lr=3e-3, state_dtype=F32, backend=backend)
    _with_grads(params, 0)
    optimizer.step()
    state = optimizer.state[params[1]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == F32
    # A checkpoint of another optimizer, with moments of bfloat16, is widened.
    plain = dgg.AdamW(twins, lr=3e-3, backend=backend)
    _with_grads(twins, 0)
    plain.step()
    optimizer.load_state_dict(plain.state_dict())
    moments = [optimizer.state[p]["exp_avg"] for p in params]
    assert all(m.dtype == F32 for m in moments)
    assert _same([m.to(BF16) for m in moments], [plain.state[q]["exp_avg"] for q in twins])


# What is lost without either


LOST = "16-bit weights lose small updates"


def _step_in_silence(optimizer, params, steps=1):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(steps):
            _with_grads(params, step)
            optimizer.step()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.SGD])
def test_16_bits_alone_warn_once(cls, dtype):
    params = [*make_params([(3,)], F32), *make_params([(5,), (2, 4)], dtype)]
    optimizer = cls(list(zip(("norm", "up", "down"), params, strict=True)), lr=1e-3)
    _with_grads(params, 0)
    with pytest.warns(UserWarning, match=LOST) as heard:
        optimizer.step()
    (warning,) = heard
    text = str(warning.message)
    assert warning.filename == __file__
    assert "parameter 'up' and 1 more are" in text and str(dtype) in text
    assert "master_weights=True" in text
    assert ("stochastic_rounding=True" in text) == (dtype == BF16)
    # The bound that it names is the one.
    bound = 1 / int(text.partition("smaller than 1/")[2].split()[0])
    one = torch.ones((), dtype=dtype)
    assert (one.float() - 0.99 * bound).to(dtype) == one
    assert (one.float() - 1.01 * bound).to(dtype) != one

    _step_in_silence(optimizer, params, 3)
    optimizer.set_anchor()  # new tables
    _step_in_silence(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    _step_in_silence(optimizer, params)
    # A copy is another optimizer.
    other = copy.deepcopy(optimizer)
    _with_grads([p for g in other.param_groups for p in g["params"]], 0)
    with pytest.warns(UserWarning, match=LOST):
        other.step()


def _kept(options, dtype=BF16):
    params = make_params([(5,)], dtype)
    return dgg.AdamW(params, **options), params


def _frozen():
    params = [*make_params([(5,)], BF16), *make_params([(5,)], F32)]
    params[0].requires_grad_(False)
    return dgg.AdamW(params), params[1:]


def _foreign():
    # What another optimizer does about it is its own affair.
    params = make_params([(5,)], BF16)
    optimizer = torch.optim.AdamW(params)
    dgg.Guidance(optimizer).set_anchor()
    return optimizer, params


SILENT = {
    "master weights": lambda: _kept({"master_weights": True}),
    "master weights of float16": lambda: _kept({"master_weights": True}, F16),
    "stochastic rounding": lambda: _kept({"stochastic_rounding": True}),
    "float32": lambda: _kept({}, F32),
    "float32 beside what is frozen": _frozen,
    "dgg.Guidance": _foreign,
}


@pytest.mark.parametrize("case", SILENT)
def test_nothing_is_said_where_nothing_is_lost(case):
    optimizer, params = SILENT[case]()
    _step_in_silence(optimizer, params, 2)


def test_16_bits_beside_what_is_rounded_stochastically_warn():
    params = [*make_params([(5,)], BF16), *make_params([(5,)], F16)]
    optimizer = dgg.AdamW(params, stochastic_rounding=True)
    _with_grads(params, 0)
    with pytest.warns(UserWarning, match=rf"{LOST}.*parameter 1 of group 0.*torch.float16"):
        optimizer.step()


def test_16_bits_that_join_later_warn_then():
    optimizer, wide = _frozen()
    _step_in_silence(optimizer, wide)
    params = optimizer.param_groups[0]["params"]
    params[0].requires_grad_(True)
    _with_grads(params, 0)
    with pytest.warns(UserWarning, match=LOST):
        optimizer.step()


def test_a_checkpoint_helpers_step_does_not_warn():
    model = torch.nn.Linear(3, 2).to(BF16)
    optimizer = dgg.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        get_optimizer_state_dict(model, optimizer)
    _with_grads(list(model.parameters()), 0)
    with pytest.warns(UserWarning, match=LOST):
        optimizer.step()


def test_the_warning_can_be_silenced_by_its_beginning():
    optimizer, params = _kept({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", LOST)
        _with_grads(params, 0)
        optimizer.step()


# -- master weights and what is written to the parameter -----------------------------------------

WRITES = {
    "in place": lambda p: p.detach().fill_(5),
    "data": lambda p: p.data.fill_(5),
    "one element": lambda p: p.data[(0,) * p.dim()].fill_(5),
    "exchanged data": lambda p: setattr(p, "data", torch.full_like(p, 5)),
    "no_grad": lambda p: torch.no_grad()(p.copy_)(torch.full_like(p, 5)),
}
LAYOUTS = {
    "rows": lambda dtype: torch.randn(3, 2, 4, 5).to(dtype),
    "channels last": lambda dtype: (
        torch.randn(3, 2, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    ),
    "transposed": lambda dtype: torch.randn(40, 33).to(dtype).t(),
    "one element": lambda dtype: torch.randn(1).to(dtype),
    "large": lambda dtype: torch.randn(40_000).to(dtype),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["step", "element"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_a_weight_is_never_undone(write, layout, granularity, dtype, backend):
    """An element that is no longer its master's rounding becomes the master, whoever wrote it."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(LAYOUTS[layout](dtype)) for _ in range(2)]
    opt = dgg.AdamW(
        params, lr=0.01, weight_decay=0.0, master_weights=True, granularity=granularity,
        backend=backend, alpha=0.5, max_grad_norm=1.0, state_dtype=torch.float32,
    )  # fmt: skip
    gradient = torch.ones_like(params[0])
    if layout == "transposed":
        gradient = gradient.contiguous()
    for step in range(4):
        for p in params:
            p.grad = gradient.clone()
        if step == 1:
            opt.set_anchor()
        if step == 3:
            WRITES[write](params[0])
            masters = [opt.state[p]["master"].clone() for p in params]
            anchors = [opt.state[p]["anchor"].clone() for p in params]
            kept = masters[0].to(dtype) == params[0]
            expected = torch.where(kept, masters[0], params[0].float())
            moments = [opt.state[p]["exp_avg"].clone() for p in params]
        opt.step()
    # The step from there, in float64 but for the scale, which is measured.
    clip = opt.guidance_stats()["clip"]
    gaps = [a - m for a, m in zip(anchors, (expected, masters[1]), strict=True)]
    distance = sum(gap.double().square().sum() for gap in gaps).sqrt()
    if opt.guidance_stats()["distance"] is not None and write in ("in place", "no_grad"):
        torch.testing.assert_close(opt.guidance_stats()["distance"].double(), distance)
    assert clip is not None and len(moments) == 2
    moved = opt.state[params[0]]["master"] - expected
    # Adam moves by no more than the learning rate times a little.
    assert moved.abs().max() <= 0.012
    assert torch.equal(opt.state[params[0]]["master"].to(dtype), params[0].detach())
    other = opt.state[params[1]]["master"] - masters[1]
    assert 0 < other.abs().max() <= 0.012


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES)
def test_anchor_is_the_weights_of_now(write, backend):
    """Load the best checkpoint into the model, set_anchor(): not what the masters were before."""
    param = torch.nn.Parameter(torch.randn(4, 3).bfloat16())
    opt = dgg.AdamW([param], lr=0.01, master_weights=True, backend=backend)
    param.grad = torch.ones_like(param)
    opt.step()
    untouched = opt.state[param]["master"].clone()
    WRITES[write](param)
    opt.set_anchor()
    same = untouched.bfloat16() == param
    expected = torch.where(same, untouched, param.float())
    assert torch.equal(opt.state[param]["anchor"], expected)
    if write == "one element":
        assert int(same.sum()) == 11


# -- gradients at the ends of their range --------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e20, 3e38])
def test_scale_of_gradients_of_any_size(size, clipped, scope, backend):
    """float32 squares overflow from 1.8e19 and vanish below 1e-23; norms must do neither."""
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(3000))]
    opt = dgg.SGD(
        params, lr=1e-3, alpha=1.0, norm_scope=scope, backend=backend,
        max_grad_norm=1.0 if clipped else None,
    )  # fmt: skip
    opt.set_anchor()
    for p in params:
        p.data.add_(min(size, 1e3))
    before = [p.detach().double() for p in params]
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()) * size
    grads = [p.grad.double() for p in params]
    opt.step()
    total = torch.cat(grads).norm()
    clip = min(1.0, 1.0 / (total.item() + 1e-6)) if clipped else 1.0
    anchors = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(3000).double()]
    gaps = [start - anchor for start, anchor in zip(before, anchors, strict=True)]
    for p, start, grad, gap in zip(params, before, grads, gaps, strict=True):
        g = grad.norm() if scope == "tensor" else total
        d = gap.norm() if scope == "tensor" else torch.cat(gaps).norm()
        s = min(1.0, clip * g.item() / d.item()) if d > 0 else 0.0
        expected = start - 1e-3 * (clip * grad + s * gap)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-12)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_gradient_that_is_not_finite_does_no_more_damage_than_in_torch(
    bad, clipped, scope, backend
):
    runs = []
    for cls, options in (
        (torch.optim.SGD, {}),
        (dgg.SGD, {"alpha": 1.0, "norm_scope": scope, "backend": backend}),
    ):
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        if cls is dgg.SGD and clipped:
            options["max_grad_norm"] = 1.0
        opt = cls(params, lr=0.1, **options)
        if cls is dgg.SGD:
            opt.set_anchor()
        for p in params:
            p.data.add_(0.5)
            p.grad = torch.ones_like(p)
        params[0].grad[1] = bad
        if cls is torch.optim.SGD and clipped:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        runs.append([p.detach().isnan() | p.detach().isinf() for p in params])
    for theirs, mine in zip(*runs, strict=True):
        assert not (mine & ~theirs).any()
