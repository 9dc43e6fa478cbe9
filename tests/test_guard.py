# SPDX-License-Identifier: BSD-3-Clause
"""alpha="auto": the pull is the least with which a step does not raise the loss of old examples."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import dgg
from cases import BACKENDS, BF16, F32, F64

SHAPES = [(3,), (7, 5), (65,), (0,), ()]


def make(dtype=F64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
        for shape in shapes
    ]


def gradients(params, seed, conflict=0.0):
    """Returns g and r for every parameter, with ⟨g, r⟩ lowered by ``conflict`` ‖r‖²."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for p in params:
        r = torch.randn(p.shape, generator=generator, dtype=F64)
        g = torch.randn(p.shape, generator=generator, dtype=F64) - conflict * r
        pairs.append((g, r))
    return pairs


def hand_over(params, opt, pairs, scale=1.0):
    with opt.replay():
        for p, (_, r) in zip(params, pairs, strict=True):
            p.grad = (scale * r).to(p.dtype)
    for p, (g, _) in zip(params, pairs, strict=True):
        p.grad = (scale * g).to(p.dtype)


def step(params, opt, seed, conflict=2.0, scale=1.0):
    hand_over(params, opt, gradients(params, seed, conflict), scale)
    opt.step()


def leave_anchor(params, opt, towards=None):
    """Sets the anchor so that θ - θ* points along ``towards`` (or anywhere), and returns θ*."""
    generator = torch.Generator().manual_seed(9)
    away = [
        0.1 * torch.randn(p.shape, generator=generator, dtype=F64) if d is None else d
        for p, d in zip(params, towards or [None] * len(params), strict=True)
    ]
    with torch.no_grad():
        for p, d in zip(params, away, strict=True):
            p.sub_(d.to(p.dtype))
        opt.set_anchor()
        for p, d in zip(params, away, strict=True):
            p.add_(d.to(p.dtype))


def dot(xs, ys):
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(xs, ys, strict=True))


class Expected:
    """Equation (7) by hand, for all tensors together or for one."""

    def __init__(self, h, u, r, clip, maximize=False):
        sign = -1.0 if maximize else 1.0
        self.x, self.y = dot(h, r), sign * dot(u, r)
        self.head, self.pull = dot(h, h) ** 0.5, dot(u, u) ** 0.5
        self.a = 0.0
        if self.x < 0 < self.y:
            self.a = min(-clip * self.x / self.y, clip * self.head / self.pull)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_edited_gradient_is_that_of_equation_7(weight, maximize, bound, backend):
    params = make()
    other = torch.optim.SGD(params, lr=0.1, maximize=maximize)
    opt = dgg.Guidance(
        other, alpha="auto", replay_weight=weight, max_grad_norm=bound, backend=backend
    )
    pairs = gradients(params, 1, conflict=2.0)
    sign = -1.0 if maximize else 1.0
    # θ - θ* along r (against it, for an objective that is ascended): the anchor lowers the loss.
    leave_anchor(params, opt, [0.5 * sign * r + 0.1 for _, r in pairs])
    anchors = [opt.state[p]["anchor"].clone() for p in params]
    with opt.replay():
        for p, (_, r) in zip(params, pairs, strict=True):
            p.grad = r.clone()
    for p, (g, _) in zip(params, pairs, strict=True):
        p.grad = g.clone()
    h = [g + weight * r for g, r in pairs]
    u = [p.detach() - a for p, a in zip(params, anchors, strict=True)]
    r = [r for _, r in pairs]
    clip = 1.0 if bound is None else min(1.0, bound / (dot(h, h) ** 0.5 + 1e-6))
    expected = Expected(h, u, r, clip, maximize)
    other.step()
    assert expected.a > 0
    total = [p.grad for p in params]
    for ours, hh, uu in zip(total, h, u, strict=True):
        torch.testing.assert_close(ours, clip * hh + sign * expected.a * uu, rtol=1e-9, atol=1e-11)
    stats = opt.guidance_stats()
    assert stats["scale"].item() == pytest.approx(expected.a, rel=1e-5)
    assert stats["alignment"].item() == pytest.approx(
        expected.x / (expected.head * dot(r, r) ** 0.5), rel=1e-5
    )
    share = expected.a * expected.pull / expected.head
    assert stats["pull"].item() == pytest.approx(share, rel=1e-5)
    # Its purpose: to first order the loss of the old examples does not change.
    if expected.a < 0.999 * clip * expected.head / expected.pull:
        along = dot(total, r) / (dot(total, total) * dot(r, r)) ** 0.5
        assert abs(along) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_fused_step_is_the_edit_and_the_plain_step(name, dtype, backend):
    params, twins = make(dtype), make(dtype)
    if name == "AdamW":
        ours = dgg.AdamW(params, lr=1e-2, alpha="auto", max_grad_norm=1.0, backend=backend)
        other = dgg.AdamW(twins, lr=1e-2, alpha=0.0, backend=backend)
    else:
        more = {"lr": 1e-2, "momentum": 0.9}
        ours = dgg.SGD(params, alpha="auto", max_grad_norm=1.0, backend=backend, **more)
        other = dgg.SGD(twins, alpha=0.0, backend=backend, **more)
    leave_anchor(params, ours)
    anchors = [ours.state[p]["anchor"].double() for p in params]
    for seed in range(4):
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.detach())
        pairs = [
            (g.to(dtype).double(), r.to(dtype).double()) for g, r in gradients(params, seed, 1)
        ]
        h, r = [g + r for g, r in pairs], [r for _, r in pairs]
        u = [p.detach().double() - a for p, a in zip(params, anchors, strict=True)]
        clip = min(1.0, 1.0 / (dot(h, h) ** 0.5 + 1e-6))
        a = Expected(h, u, r, clip).a
        hand_over(params, ours, pairs)
        ours.step()
        for q, hh, uu in zip(twins, h, u, strict=True):
            q.grad_dtype = None  # G is not rounded to the parameter's dtype
            q.grad = (clip * hh + a * uu).to(F64 if dtype == F64 else F32)
        other.step()
        assert ours.guidance_stats()["scale"].item() == pytest.approx(a, rel=1e-4, abs=1e-7)
        accuracy = {F64: 1e-9, F32: 2e-6, BF16: 2**-7}[dtype]
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_tensor_each_has_its_own_strength(backend):
    params = make()
    opt = dgg.AdamW(params, alpha="auto", norm_scope="tensor", max_grad_norm=2.0, backend=backend)
    pairs = gradients(params, 1, conflict=2.0)
    pairs[1] = gradients(params, 2, conflict=-2.0)[1]  # no conflict there
    leave_anchor(params, opt, [0.5 * r for _, r in pairs])
    hand_over(params, opt, pairs)
    h = [g + r for g, r in pairs]
    clip = min(1.0, 2.0 / (dot(h, h) ** 0.5 + 1e-6))
    u = [p.detach() - opt.state[p]["anchor"] for p in params]
    expected = [
        Expected([hh], [uu], [r], clip).a for hh, uu, (_, r) in zip(h, u, pairs, strict=True)
    ]
    opt.step()
    assert expected[0] > 0 and expected[1] == 0
    torch.testing.assert_close(
        opt.guidance_stats()["scale"].double(), torch.tensor(expected, dtype=F64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_replay_is_the_plain_step(backend):
    params, twins = make(F32), make(F32)
    ours = dgg.AdamW(params, alpha="auto", max_grad_norm=1.0, backend=backend)
    plain = dgg.AdamW(twins, alpha=0.0, max_grad_norm=1.0, backend=backend)
    for each, opt in ((params, ours), (twins, plain)):
        leave_anchor(each, opt)
        for seed in range(3):
            for p, (g, _) in zip(each, gradients(each, seed), strict=True):
                p.grad = g.to(F32)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    stats = ours.guidance_stats()
    assert not stats["injected"] and stats["pull"] is None and stats["alignment"] is None


@pytest.mark.parametrize("build", ["AdamW", "Guidance"])
def test_a_run_without_any_replay_is_told_once(build):
    params = make(F32)
    if build == "AdamW":
        opt = stepped = dgg.AdamW(params, alpha="auto")
    else:
        stepped = torch.optim.SGD(params, lr=0.1)
        opt = dgg.Guidance(stepped, alpha="auto")

    def plain_steps(count):
        for _ in range(count):
            for p in params:
                p.grad = torch.ones_like(p)
            stepped.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_steps(120)  # the first task has nothing to protect
        opt.set_anchor()
        plain_steps(99)
    with pytest.warns(UserWarning, match=r"replay gradients, and 100 steps had none") as caught:
        plain_steps(150)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_with_alpha_0_is_not_guided(backend):
    params, twins = make(F64), make(F64)
    runs = []
    for each, second in ((params, params[2:]), (twins, twins[2:])):
        groups = [{"params": each[:2]}, {"params": second, "alpha": 0.0}]
        opt = dgg.AdamW(groups, alpha="auto", backend=backend)
        pairs = gradients(each, 1, conflict=2.0)
        leave_anchor(each, opt, [0.5 * r for _, r in pairs])
        if each is twins:  # where those anchors are does not matter
            for p in second:
                opt.state[p]["anchor"].add_(3.0)
        hand_over(each, opt, pairs)
        opt.step()
        runs.append(opt.guidance_stats()["scale"].item())
        assert opt.guidance_stats()["guided"] == 2
    assert runs[0] > 0 and runs[0] == runs[1]
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients_on_either_side(backend):
    params = make(F64, [(3,), (4,), (5,), (6,)])
    opt = dgg.AdamW(params, lr=1e-2, alpha="auto", backend=backend)
    pairs = gradients(params, 1, conflict=2.0)
    leave_anchor(params, opt, [0.5 * r for _, r in pairs])
    hand_over(params, opt, pairs)
    with opt.replay():  # a second block would add: start anew
        pass
    opt.clear_replay()
    with opt.replay():
        params[0].grad, params[1].grad = pairs[0][1].clone(), pairs[1][1].clone()
    params[0].grad, params[2].grad = pairs[0][0].clone(), pairs[2][0].clone()
    params[1].grad = params[3].grad = None
    zero = torch.zeros(())
    h = [pairs[0][0] + pairs[0][1], pairs[1][1], pairs[2][0]]
    r = [pairs[0][1], pairs[1][1], zero.expand(5)]
    u = [p.detach() - opt.state[p]["anchor"] for p in params[:3]]
    expected = Expected(h, u, r, 1.0)
    before = params[3].detach().clone()
    opt.step()
    assert opt.guidance_stats()["scale"].item() == pytest.approx(expected.a, rel=1e-5)
    assert torch.equal(before, params[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_bends_the_pull(backend):
    params = make(F64)
    opt = dgg.AdamW(params, alpha="auto", importance=0.7, backend=backend)
    for seed in range(3):
        for p, (g, _) in zip(params, gradients(params, seed), strict=True):
            p.grad = g
        opt.step()
    pairs = gradients(params, 5, conflict=2.0)
    leave_anchor(params, opt, [0.5 * r for _, r in pairs])
    u = [
        (p.detach() - opt.state[p]["anchor"]) * (0.3 + 0.7 * opt.state[p]["importance"])
        for p in params
    ]
    expected = Expected([g + r for g, r in pairs], u, [r for _, r in pairs], 1.0)
    hand_over(params, opt, pairs)
    opt.step()
    assert expected.a > 0
    assert opt.guidance_stats()["scale"].item() == pytest.approx(expected.a, rel=1e-5)
    assert opt.guidance_stats()["distance"].item() == pytest.approx(expected.pull, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradscalers_scale_changes_nothing(backend):
    runs = []
    for scale in (1.0, 1024.0):
        params = make(F32)
        opt = dgg.AdamW(params, lr=1e-2, alpha="auto", fused=True, max_grad_norm=1.0)
        pairs = gradients(params, 1, conflict=2.0)
        leave_anchor(params, opt, [0.5 * r for _, r in pairs])
        hand_over(params, opt, pairs, scale)
        opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        opt.step()
        stats = opt.guidance_stats()
        runs.append([stats["scale"], stats["alignment"], stats["pull"], *map(torch.clone, params)])
    assert runs[0][0] > 0
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["gradient", "first_moment", "decoupled"])
def test_resumed_bit_for_bit(route, backend):
    options = dict(alpha="auto", importance=0.5, route=route, backend=backend, max_grad_norm=1.0)
    params = make(F32)
    opt = dgg.AdamW(params, **options)
    for seed in range(3):
        for p, (g, _) in zip(params, gradients(params, seed), strict=True):
            p.grad = g.to(F32)
        opt.step()
    opt.set_anchor()
    for seed in range(3, 6):
        step(params, opt, seed)
    twins = make(F32)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.detach())
    new = dgg.AdamW(twins, **options)
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert new.param_groups[0]["alpha"] == "auto"
    for each, of_each in ((params, opt), (twins, new)):
        for seed in range(6, 9):
            step(each, of_each, seed)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "element"}, "granularity='element' and scaling=True would be ignored"),
        ({"granularity": "tensor"}, "granularity='tensor'"),
        ({"scaling": False}, "scaling=False would be ignored"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dgg.AdamW(make(), alpha="auto", **options)
    with pytest.raises(ValueError, match=message):
        dgg.Guidance(torch.optim.SGD(make(), lr=0.1), alpha="auto", **options)


def test_another_word_than_auto_is_refused():
    with pytest.raises(TypeError, match="alpha='always' must be a number"):
        dgg.AdamW(make(), alpha="always")


def test_groups_that_do_not_go_together_are_refused():
    params = make(F32)
    for change, message in (
        ({"alpha": 0.3}, r"alpha=0.3 of group 1 does not go with alpha='auto' of group 0"),
        ({"maximize": True}, "some maximize and some do not"),
    ):
        opt = dgg.AdamW([{"params": params[:2]}, {"params": params[2:], **change}], alpha="auto")
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=message):
            step(params, opt, 1)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("build", ["AdamW", "Guidance"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.3}, "alpha=0.3 of group 1 does not go with"),
        ({"granularity": "element"}, "granularity='element' and scaling=True would be ignored"),
        ({"scaling": False}, "scaling=False would be ignored"),
        ({"maximize": True}, "some maximize and some do not"),
    ],
)
def test_a_saved_state_that_no_step_could_use_is_not_loaded(change, message, build):
    params = make(F32)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    if build == "AdamW":
        opt = dgg.AdamW(groups, alpha="auto")
    else:
        opt = dgg.Guidance(torch.optim.SGD(groups, lr=0.1), alpha="auto")
    state = opt.state_dict()
    if "maximize" in change and build == "Guidance":
        opt.optimizer.param_groups[1].update(change)  # it is not in the state of a guidance
    else:
        for group in state["param_groups"][1 if change.keys() & {"alpha", "maximize"} else 0 :]:
            group.update(change)
    before = [dict(group) for group in opt.param_groups]
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert [dict(group) for group in opt.param_groups] == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_maximize_of_a_guided_optimizer_is_read_at_every_step(backend):
    """It stands in the other's groups: a change turns the sign of ⟨u, r⟩, or is refused."""
    params = make()
    other = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.0)
    opt = dgg.Guidance(other, alpha="auto", backend=backend)
    pairs = gradients(params, 1, conflict=2.0)
    leave_anchor(params, opt, [0.5 * r + 0.1 for _, r in pairs])
    for maximize in (False, True, False):
        for group in other.param_groups:
            group["maximize"] = maximize
        hand_over(params, opt, pairs)
        other.step()
        assert bool(opt.guidance_stats()["injected"]) != maximize
    other.param_groups[1]["maximize"] = True
    hand_over(params, opt, pairs)
    with pytest.raises(ValueError, match="some maximize and some do not"):
        other.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_finite_pull_nothing(backend):
    params = make(F32)
    opt = dgg.Guidance(torch.optim.SGD(params, lr=0.0), alpha="auto", backend=backend)
    pairs = gradients(params, 1, conflict=2.0)
    leave_anchor(params, opt, [0.5 * r for _, r in pairs])
    pairs[0][1][0] = float("nan")
    with opt.replay():
        for p, (_, r) in zip(params, pairs, strict=True):
            p.grad = r.to(F32)
    for p, (g, _) in zip(params, pairs, strict=True):
        p.grad = g.to(F32)
    opt.optimizer.step()
    assert opt.guidance_stats()["scale"] == 0
    assert params[1].grad.isfinite().all()


# Where the pull enters


def test_routes_that_an_optimizer_does_not_have_are_refused():
    with pytest.raises(
        ValueError, match=r"route='first_moment' .*no second moment: use 'gradient'"
    ):
        dgg.SGD(make(), route="first_moment")
    with pytest.raises(ValueError, match=r"route='sideways' is not one of"):
        dgg.AdamW(make(), route="sideways")
    opt = dgg.SGD(make(F32), lr=0.1)
    for group in opt.param_groups:
        group["route"] = "first_moment"
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="no second moment"):
        opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["gradient", "first_moment", "decoupled"])
@pytest.mark.parametrize("granularity", ["step", "element"])
def test_a_routed_step_by_hand(granularity, route, backend):
    params = make(F64)
    alpha = 1.0  # of elements, too: what is drawn is tested elsewhere
    opt = dgg.AdamW(
        params, lr=1e-2, alpha=alpha, route=route, granularity=granularity, strength=0.5,
        weight_decay=0.1, backend=backend,
    )  # fmt: skip
    leave_anchor(params, opt)
    pairs = gradients(params, 1)
    u = [p.detach() - opt.state[p]["anchor"] for p in params]
    g = [g for g, _ in pairs]
    s = 0.5 * min(1.0, dot(g, g) ** 0.5 / dot(u, u) ** 0.5)
    before = [p.detach().clone() for p in params]
    for p, x in zip(params, g, strict=True):
        p.grad = x
    opt.step()
    for p, theta, x, d in zip(params, before, g, u, strict=True):
        first = x if route == "decoupled" else x + s * d
        second = x + s * d if route == "gradient" else x
        m, v = 0.1 * first / (1 - 0.9), (0.001 * second**2) / (1 - 0.999)
        expected = theta * (1 - 1e-2 * 0.1)
        if route == "decoupled":
            expected = expected - 1e-2 * s * d
        expected = expected - 1e-2 * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-11)
