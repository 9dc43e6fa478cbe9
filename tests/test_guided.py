# SPDX-License-Identifier: BSD-3-Clause
"""Guided steps against the reference in float64.

- A hand-computed step of four elements, with literals.
- Every optimizer x guidance setting x dtype mix x backend: each step starts from the stored state,
  is done once as it is and once by the reference on float64 copies; parameters and state must be
  within the rounding of their storage dtype, every element, and the masks identical.
- Replay gradients of weight 1.5, parameters that miss a gradient or have a replay gradient only,
  groups with their own alpha and strength, look-ahead against measured distances.
"""

from __future__ import annotations

import copy

import pytest
import torch

import dgg
from cases import (
    BACKENDS,
    F32,
    F64,
    GUIDANCE,
    MIXES,
    OPTIMIZERS,
    SHAPES,
    SMALL_SHAPES,
    assert_rounding,
    make_params,
    set_grads,
)
from dgg import _philox, reference


def build(name, params, guidance, **more):
    cls, kwargs = OPTIMIZERS[name]
    options = {"replay_weight": 1.5, "seed": 77, **kwargs, **guidance, **more}
    half = max(1, len(params) // 2)
    groups = [
        {"params": params[:half]},
        # Another alpha and strength: the same words against another threshold.
        {"params": params[half:], "alpha": min(1.0, options["alpha"] * 1.1), "strength": 0.9},
    ]
    return cls([g for g in groups if g["params"]], **options)


class Oracle:
    """The same optimizer on float64 copies, reset to the stored state before every step."""

    def __init__(self, name, params, guidance):
        self.params = [torch.nn.Parameter(p.detach().to(F64, copy=True)) for p in params]
        self.optimizer = build(name, self.params, guidance, backend="reference")

    def sync(self, optimizer, params):
        for p, q in zip(params, self.params, strict=True):
            q.data.copy_(p.detach())
            q.grad = None if p.grad is None else p.grad.to(F64, copy=True)
            if p in optimizer.state:
                self.optimizer.state[q] = {
                    key: value.clone() if key == "step" else value.to(F64, copy=True)
                    for key, value in optimizer.state[p].items()
                }
        self.optimizer._cache = None
        for mine, theirs in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            for key in ("draw_index", "task_index", "anchored"):
                mine[key] = theirs[key]


def replay_into(optimizer, params, values):
    with optimizer.replay():
        for p, value in zip(params, values, strict=True):
            p.grad = None if value is None else value.to(p.dtype)


def magnitude(optimizer, p):
    """Returns the magnitude of the terms that one step adds up, per element."""
    total = 1 + p.detach().double().abs()
    for term in (p.grad, *(optimizer.state[p].get(k) for k in ("anchor", "momentum_buffer"))):
        if term is not None:
            total = total + term.double().abs()
    return total


def warm_moments(optimizer, params, generator):
    """Starts Adam's moments at order one.

    At v = 0 the step is lr sign(G): the division by |G| would show G's own rounding, amplified
    without bound where G cancels, and test the conditioning of Adam rather than the kernels.
    """
    for p in params:
        state = optimizer.state[p]
        if "exp_avg" not in state:
            continue
        state["step"].fill_(3)
        state["exp_avg"].copy_(0.1 * torch.randn(p.shape, generator=generator))
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                state[key].copy_(0.5 + torch.rand(p.shape, generator=generator))


@pytest.mark.compat("one process", "trajectory", "clipping", "replay", "norm_scope tensor")
@pytest.mark.compat("one process", "mixed precision")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m if d))
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_element_is_the_reference_rounded(name, guidance, mix, backend):
    dtype, grad_dtype, anchor_dtype = mix
    shapes = SHAPES if backend == "cpp" else SMALL_SHAPES
    params = make_params(shapes, dtype)
    options = {**GUIDANCE[guidance], "anchor_dtype": anchor_dtype}
    optimizer = build(name, params, options, backend=backend)
    oracle = Oracle(name, params, {**options, "anchor_dtype": None})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        away = [p + torch.randn(p.shape, generator=generator).to(dtype) for p in params]
        for p, q in zip(params, away, strict=True):
            p.data, q.data = q.data, p.data
        optimizer.set_anchor()
        for p, q in zip(params, away, strict=True):
            p.data, q.data = q.data, p.data
    warm_moments(optimizer, params, generator)
    for step in range(6):
        set_grads(params, generator, dtype=grad_dtype, missing=(step % 5,))
        oracle.sync(optimizer, params)
        scales = [magnitude(optimizer, p) for p in params]
        if step % 2:
            # Row 2 has a replay gradient only where its gradient is missing.
            values = [torch.randn(p.shape, generator=generator, dtype=F64) for p in params]
            values = [v.to(dtype) for v in values]
            values[1] = None
            replay_into(optimizer, params, values)
            replay_into(oracle.optimizer, oracle.params, values)
            for row, value in enumerate(values):
                scales[row] += 0.0 if value is None else 1.5 * value.double().abs()
        optimizer.step()
        oracle.optimizer.step()
        for row, (p, q) in enumerate(zip(params, oracle.params, strict=True)):
            label = f"{name} {guidance} step {step} row {row}"
            assert_rounding(p.detach(), q.detach(), scales[row], label)
            for key, value in oracle.optimizer.state[q].items():
                stored = optimizer.state[p][key]
                if key in ("step", "anchor"):
                    assert torch.equal(stored.double(), value.double())
                    continue
                scale = scales[row] ** 2 if key.endswith("_sq") else scales[row]
                assert_rounding(stored, value, scale, f"{label} {key}")
        hit = optimizer.guidance_stats()["injected"]
        assert hit == oracle.optimizer.guidance_stats()["injected"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_step(backend):
    # θ - θ* = (3, 0, 4, 0), ‖d‖ = 5; g = (0, 1, 0, 0), ‖g‖ = 1: s = 1/5.
    # G = (0.6, 1, 0.8, 0); SGD with lr 0.5 and no decay: θ - G/2.
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    opt = dgg.SGD([p], lr=0.5, alpha=1.0, backend=backend)
    with torch.no_grad():
        p.copy_(torch.tensor([-2.0, 2.0, -1.0, 4.0]))
        opt.set_anchor()
        p.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    p.grad = torch.tensor([0.0, 1.0, 0.0, 0.0])
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.7, 1.5, 2.6, 4.0]), rtol=0, atol=3e-7)
    stats = opt.guidance_stats()
    assert bool(stats["injected"])
    assert stats["scale"].item() == pytest.approx(0.2)
    assert stats["grad_norm"].item() == 1.0
    assert stats["distance"].item() == 5.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_clipping_and_replay(backend):
    # h = g + 2 r = (3, 4): ‖h‖ = 5, c = 1 / (5 + 1e-6); g = (1, 4), ‖g‖ = √17; d = (10, 0).
    # s = c √17 / 10; G = (3 c + 10 s, 4 c) = (0.6 + 0.8246, 0.8).
    p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    opt = dgg.SGD([p], lr=1.0, alpha=1.0, max_grad_norm=1.0, replay_weight=2.0, backend=backend)
    opt.set_anchor({"p": torch.tensor([-10.0, 0.0])}, model=_Holder(p))
    with opt.replay():
        p.grad = torch.tensor([1.0, 0.0])
    p.grad = torch.tensor([1.0, 4.0])
    opt.step()
    expected = torch.tensor([-(0.6 + 17**0.5 / 5), -0.8])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


class _Holder(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("zero", ["grad", "distance"])
def test_zero_norms_give_no_guidance_and_no_nan(zero, scope, backend):
    p = torch.nn.Parameter(torch.randn(5))
    opt = dgg.AdamW([p], alpha=1.0, norm_scope=scope, weight_decay=0.1, backend=backend)
    opt.set_anchor()
    if zero == "grad":
        with torch.no_grad():
            p.add_(1)
        p.grad = torch.zeros(5)
    else:
        p.grad = torch.randn(5)
    mirror = torch.nn.Parameter(p.detach().clone())
    mirror.grad = p.grad.clone()
    torch.optim.AdamW([mirror], weight_decay=0.1).step()
    opt.step()
    torch.testing.assert_close(p, mirror)
    assert opt.guidance_stats()["scale"].item() == 0.0


@pytest.mark.compat("one process", "granularity tensor", "granularity element")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_masks_are_philox(granularity, backend):
    # lr 1, no gradient but a tiny one, unscaled guidance of strength 1: a drawn element lands on
    # the anchor, one not drawn stays.
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(257)), torch.nn.Parameter(torch.randn(11, 13))]
    opt = dgg.SGD(
        params, lr=1.0, alpha=0.3, scaling=False, granularity=granularity, seed=2**63 + 5,
        backend=backend,
    )  # fmt: skip
    opt.set_anchor()
    for draw in range(12):
        with torch.no_grad():
            for p in params:
                p.add_(1)
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        for j, (p, old) in enumerate(zip(params, before, strict=True)):
            moved = p.detach() != old
            limit = int(0.3 * 2**32)
            if granularity == "step":
                expected = torch.full_like(moved, _philox.step_word(2**63 + 5, draw) < limit)
            elif granularity == "tensor":
                word = _philox.tensor_words(2**63 + 5, draw, torch.tensor([j])).item()
                expected = torch.full_like(moved, word < limit)
            else:
                elements = torch.arange(p.numel()).view(p.shape)
                expected = _philox.element_words(2**63 + 5, draw, j, elements) < limit
            assert torch.equal(moved, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_element_masks_do_not_depend_on_the_memory_format(backend):
    base = torch.randn(4, 6, 5, 5)
    results = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(base.clone().to(memory_format=fmt))
        opt = dgg.SGD([p], lr=0.1, alpha=0.5, granularity="element", scaling=False, backend=backend)
        opt.set_anchor()
        with torch.no_grad():
            p.add_(1)
        p.grad = torch.ones_like(p)
        opt.step()
        results.append(p.detach().contiguous())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_backends_agree_over_many_steps(name):
    if dgg.backends.choose(None, torch.device("cpu")) != "cpp":
        pytest.skip("C++ backend missing")
    runs = []
    for backend in ("reference", "cpp"):
        params = make_params(SMALL_SHAPES, F64)
        optimizer = build(name, params, GUIDANCE["step"], backend=backend)
        generator = torch.Generator().manual_seed(5)
        for step in range(30):
            if step in (5, 17):
                optimizer.set_anchor()
            set_grads(params, generator)
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_look_ahead_equals_a_measured_distance(backend):
    params = make_params(SMALL_SHAPES, F32)
    optimizer = build("adamw", params, {"alpha": 1.0, "strength": 0.7}, backend=backend)
    twin_params = copy.deepcopy(params)
    twin = build("adamw", twin_params, {"alpha": 1.0, "strength": 0.7}, backend=backend)
    optimizer.set_anchor()
    twin.set_anchor()
    generator = torch.Generator().manual_seed(5)
    for step in range(10):
        set_grads(params, generator, missing=(step % 4,))
        for p, q in zip(params, twin_params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        twin._cache = None  # forgets every distance: the norm pass measures anew
        twin.step()
        assert torch.equal(*(o.guidance_stats()["distance"] for o in (optimizer, twin)))
    for p, q in zip(params, twin_params, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_anchor_count_in_the_clipping_only(backend):
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    opt = dgg.SGD([a], lr=1.0, alpha=1.0, max_grad_norm=1.0, backend=backend)
    opt.set_anchor()
    opt.add_param_group({"params": [b]})
    with torch.no_grad():
        a.add_(10)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    opt.step()
    # c = 1/5; ‖g‖ = 3 (a alone), ‖d‖ = 10: s = 0.06; a: 10 - (0.6 + 0.6), b: -0.8.
    assert a.item() == pytest.approx(8.8, rel=1e-6)
    assert b.item() == pytest.approx(-0.8, rel=1e-6)


def test_reference_functions_take_none_and_empty_lists():
    distances = torch.full((2,), -1.0, dtype=F64)
    squares = reference.norms(
        [torch.ones(3), torch.ones(2)],
        [torch.full((3,), 2.0), None],
        [],
        [torch.zeros(3), torch.zeros(2)],
        distances,
    )
    assert squares.tolist() == [[12.0, 0.0], [12.0, 0.0], [3.0, 0.0]]
    assert distances.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_are_guided_and_not_their_product(backend):
    """With LoRA: factors of the same product, turned in the rank's space, are pulled back."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((4, 9), (7, 4)))
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    params = [torch.nn.Parameter(x.clone()) for x in (a, b)]
    opt = dgg.SGD(params, lr=0.1, alpha=1.0, strength=0.5, scaling=False, backend=backend)
    opt.set_anchor()
    turned = [turn.T @ a, b @ turn]
    torch.testing.assert_close(turned[1] @ turned[0], b @ a)
    with torch.no_grad():
        for p, t in zip(params, turned, strict=True):
            p.copy_(t)
            p.grad = torch.zeros_like(p)
            p.grad.view(-1)[0] = 1e-30  # not zero, which would leave guidance out
    opt.step()
    for p, t, anchor in zip(params, turned, (a, b), strict=True):
        assert (t - anchor).norm() > 1
        torch.testing.assert_close(p.detach(), t - 0.1 * 0.5 * (t - anchor))
