# SPDX-License-Identifier: BSD-3-Clause
"""The contract of a torch optimizer's step, and dgg's additions to it.

Plan: (1) closures, hooks, profiler, schedulers; (2) GradScaler in its three cases; (3) replay: what
is recorded, added, dropped; (4) the look-ahead distance and what makes it invalid; statistics;
(5) determinism: no global generator, repeatable, any thread count, draws beyond 2**32; (6) nothing
leaks, many small parameters.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import math
import pathlib
import types
import warnings
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

import dgg
from cases import BACKENDS, F32, GUIDANCE, OPTIMIZERS, cpp_missing, make_params, set_grads
from dgg import _philox

KINDS = ["adamw", "sgd-momentum"]
OPTIONS = {"alpha": 0.6, "strength": 0.7, "max_grad_norm": 3.0, "seed": 7}
SHAPES = [(3,), (7, 5), (300,)]


def build(kind, backend, shapes=SHAPES, **options):
    cls, hyper = OPTIMIZERS[kind]
    params = make_params(shapes, F32)
    opt = cls(params, backend=backend, **{**hyper, **OPTIONS, **options})
    opt.set_anchor()
    with torch.no_grad():
        for p in params:
            p.add_(0.1)
    return params, opt


def equal(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def grads_of(step, params):
    set_grads(params, torch.Generator().manual_seed(step))


def first_draw(hit, alpha, seed=OPTIONS["seed"]):
    """The first draw index that does (or does not) inject, by the definition of the draws."""
    limit = _philox.threshold(alpha)
    return next(k for k in range(1000) if (_philox.step_word(seed, k) < limit) == hit)


# -- (1) torch.optim's contract -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_closure(kind, backend):
    runs = []
    for closed in (True, False):
        params, opt = build(kind, backend)
        modes = []

        def closure(params=params, opt=opt, modes=modes):
            modes.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss = sum((p * (i + 2)).square().sum() for i, p in enumerate(params))
            loss.backward()
            return loss

        for _ in range(4):
            if closed:
                with torch.no_grad():  # as some trainers call it
                    assert opt.step(closure).item() > 0
            else:
                with torch.enable_grad():
                    closure()
                assert opt.step() is None
        assert modes == [True] * 4
        assert opt.param_groups[0]["draw_index"] == 4
        runs.append(params)
    equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_fire_once_per_step(backend):
    """Also on steps that inject nothing, skip, or have no gradient at all."""
    calls = []
    params, opt = build("adamw", backend)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(6):
        grads_of(step, params)
        if step == 3:
            opt.zero_grad()
        if step == 4:
            opt.found_inf, opt.grad_scale = torch.ones(()), torch.tensor(2.0)
        opt.step()
        if step == 4:
            del opt.found_inf, opt.grad_scale
    assert calls == ["pre", "post"] * 6


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_profiler_names_the_step(cls):
    p = Parameter(torch.ones(3))
    opt = cls([p], lr=0.1)
    p.grad = torch.ones(3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        opt.step()
    steps = [e for e in profile.events() if e.name == f"Optimizer.step#{cls.__name__}.step"]
    assert len(steps) == 1


def test_a_compiled_caller_does_not_trace_the_step():
    params, opt = build("adamw", None)
    mirror, other = build("adamw", None)
    compiled = torch.compile(lambda: opt.step(), backend="eager")
    for step in range(5):
        for ps in (params, mirror):
            grads_of(step, ps)
        opt.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 1e-3 * (step + 1)
        compiled()
        other.step()
    equal(params, mirror)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.7)]
    ),
}


def test_every_scheduler_is_in_the_table():
    there = {
        name
        for name, thing in vars(lr_scheduler).items()
        if inspect.isclass(thing) and issubclass(thing, lr_scheduler.LRScheduler)
    }
    assert there - set(SCHEDULERS) <= {"LRScheduler", "_LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_drive_it_as_they_drive_torch(kind, name, backend, tensor_lr):
    cls, hyper = OPTIMIZERS[kind]
    parent = {dgg.AdamW: torch.optim.AdamW, dgg.SGD: torch.optim.SGD}[cls]
    lr = torch.tensor(hyper["lr"]) if tensor_lr else hyper["lr"]
    runs = []
    for make, options in ((cls, {"backend": backend, "alpha": 0.0}), (parent, {"foreach": False})):
        params = make_params(SHAPES, F32)
        own = lr.clone() if tensor_lr else lr
        opt = make(params, **{**hyper, "lr": own}, **options)
        scheduler = SCHEDULERS[name](opt)
        seen = []
        for step in range(8):
            grads_of(step, params)
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append(float(opt.param_groups[0]["lr"]))
        assert len(set(seen)) > 1
        runs.append((params, seen))
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[0][0], runs[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_and_strength_are_schedulable_per_group(backend):
    """At alpha 0 or strength 0 a group is torch's; the other group's draws are its own still."""
    params = make_params([(4,), (4,)], F32)
    groups = [{"params": [params[0]], "alpha": 0.0}, {"params": [params[1]], "strength": 0.0}]
    opt = dgg.SGD(groups, lr=0.1, weight_decay=0.1, alpha=1.0, strength=0.5, backend=backend)
    opt.set_anchor()
    for p in params:
        p.data += 1.0
    mirror = [Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.SGD(mirror, lr=0.1, weight_decay=0.1)
    for ps in (params, mirror):
        grads_of(0, ps)
    opt.step()
    theirs.step()
    torch.testing.assert_close(params, mirror)
    assert not opt.guidance_stats()["injected"]
    opt.param_groups[0]["alpha"] = torch.tensor(1.0)  # schedules may write tensors
    pull = params[0].detach() - opt.state[params[0]]["anchor"]
    # Norms run over all parameters that have an anchor, whatever their group's alpha.
    distance = torch.cat([p.detach() - opt.state[p]["anchor"] for p in params]).norm()
    norm = torch.cat([p.grad for p in params]).norm()
    mirror[0].grad += 0.5 * torch.clamp(norm / distance, max=1.0) * pull
    opt.step()
    theirs.step()
    torch.testing.assert_close(params, mirror)


# -- (2) GradScaler -------------------------------------------------------------------------------


def scaled_loss(params, step):
    weights = torch.Generator().manual_seed(step)
    return sum((p * torch.randn(p.shape, generator=weights)).sum() for p in params)


@pytest.mark.compat("one process", "mixed precision")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unscaled", [False, True], ids=["step", "unscale_"])
def test_grad_scaler_changes_nothing_but_the_scale(kind, backend, unscaled):
    """The scale is a power of two: not one bit may differ from a run without it."""
    runs = []
    for scale in (None, 1024.0):
        params, opt = build(kind, backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(6):
            opt.zero_grad()
            scaler.scale(scaled_loss(params, step)).backward()
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            assert not opt.last_step_skipped
        assert opt.param_groups[0]["draw_index"] == 6
        runs.append(params)
    equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unscaled", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_inf_changes_nothing_but_the_draw(kind, backend, unscaled, bad):
    params, opt = build(kind, backend)
    opt._settings = dataclasses.replace(
        opt._settings, unscales=True
    )  # as fused=True does, for which the reference is no backend
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        opt.zero_grad()
        scaler.scale(scaled_loss(params, step)).backward()
        skipped = step == 1
        if skipped:
            params[1].grad[2, 3] = bad
            before = (
                [p.detach().clone() for p in params],
                [{k: v.clone() for k, v in opt.state[p].items()} for p in params],
            )
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert opt.last_step_skipped == skipped
        assert opt.param_groups[0]["draw_index"] == step + 1
        if skipped:
            equal(params, before[0])
            for p, entry in zip(params, before[1], strict=True):
                assert all(torch.equal(opt.state[p][k], v) for k, v in entry.items())
            assert not opt.guidance_stats()["injected"]
    assert scaler.get_scale() == 4.0
    # The skipped step lost no distance and made none: steps 0 and 2 alone end with the same bits.
    others, other = build(kind, backend)
    for step in (0, 2):
        other.param_groups[0]["draw_index"] = step
        other.zero_grad()
        scaled_loss(others, step).backward()
        other.step()
    equal(params, others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscaled", [False, True], ids=["step", "unscale_"])
def test_without_fused_the_scaler_unscales_and_skips_by_itself(backend, unscaled):
    """As with torch.optim: Lightning, for one, clips only if that is so."""
    params, opt = build("adamw", backend)
    assert not opt._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        opt.zero_grad()
        scaler.scale(scaled_loss(params, step)).backward()
        if step == 1:
            params[1].grad[2, 3] = math.inf
            before = [p.detach().clone() for p in params]
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step == 1:
            equal(params, before)
    assert scaler.get_scale() == 4.0
    assert opt.param_groups[0]["draw_index"] == 2  # step() was called twice
    others, other = build("adamw", backend)
    for step in (0, 2):
        other.zero_grad()
        scaled_loss(others, step).backward()
        other.step()
    equal(params, others)


@pytest.mark.skipif(cpp_missing() is not None, reason="fused=True wants a compiled backend")
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_who_unscales_is_said_as_torch_says_it(cls):
    def says(opt):
        return opt._step_supports_amp_scaling

    for fused in (None, False, True):
        params = make_params(SHAPES, F32)
        opt = cls(params, lr=0.1, fused=fused)
        theirs = getattr(torch.optim, cls.__name__)(params, lr=0.1, fused=fused)
        assert says(opt) == bool(getattr(theirs, "_step_supports_amp_scaling", False))
        grads_of(0, params)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        assert says(opt) == bool(fused) == says(copy.deepcopy(opt))
        with opt.replay():
            grads_of(1, params)
        assert says(opt)  # a scaler cannot reach these
        opt.step()
        assert says(opt) == bool(fused)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_that_is_skipped_makes_no_state(backend):
    """SGD's buffer must still begin with G, Adam's bias correction with 1."""
    for kind in KINDS:
        runs = []
        for skip in (True, False):
            cls, hyper = OPTIMIZERS[kind]
            params = make_params(SHAPES, F32)
            opt = cls(params, backend=backend, **hyper, max_grad_norm=3.0)
            grads_of(0, params)
            if skip:
                opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.ones(())
                opt.step()
                del opt.grad_scale, opt.found_inf
                assert not opt.state
            opt.step()
            opt.step()
            runs.append(params)
        equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_gradients_are_unscaled_too(backend):
    runs = []
    for scale in (None, 64.0):
        params, opt = build("adamw", backend, replay_weight=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            opt.zero_grad()
            scaler.scale(scaled_loss(params, step)).backward()
            with opt.replay():
                scaler.scale(scaled_loss(params, step + 100)).backward()
            scaler.step(opt)
            scaler.update()
        runs.append(params)
    equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_overflow_skips_and_says_what_the_scaler_cannot_know(backend):
    params, opt = build("sgd-momentum", backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(scaled_loss(params, 0)).backward()
    with opt.replay():
        scaler.scale(scaled_loss(params, 1)).backward()
        params[0].grad[0] = math.inf
    before = [p.detach().clone() for p in params]
    with pytest.warns(UserWarning, match=r"replay gradients are inf.*scaler.update\(new_scale\)"):
        scaler.step(opt)
    assert opt.last_step_skipped
    equal(params, before)


# -- (3) replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_gradient_of_the_mixed_loss(kind, backend, blocks):
    """Unguided, g + w r is all there is to it: one backward over loss + w * replay loss."""
    runs = []
    for separate in (True, False):
        params, opt = build(kind, backend, alpha=0.0, replay_weight=0.5)
        for step in range(4):
            opt.zero_grad()
            losses = [scaled_loss(params, 100 * step + i) for i in range(blocks + 1)]
            if separate:
                losses[0].backward()
                kept = [p.grad for p in params]
                for loss in losses[1:]:
                    with opt.replay():
                        loss.backward()
                # Nothing is copied and .grad is the object it was.
                assert all(p.grad is g for p, g in zip(params, kept, strict=True))
            else:
                (losses[0] + 0.5 * sum(losses[1:])).backward()
            opt.step()
        runs.append(params)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_is_no_part_of_the_guidance_norm(backend):
    """s = c |g| / |d| with the gradient of the present task alone; c with that of both."""
    params, opt = build("sgd-momentum", backend, alpha=1.0, replay_weight=0.5, max_grad_norm=2.0)
    for p in params:
        p.data += 10.0
    grads_of(0, params)
    with opt.replay():
        for p in params:
            p.grad = torch.ones_like(p)
    g = torch.cat([p.grad.flatten() for p in params])
    r = torch.ones_like(g)
    d = torch.cat([(p.detach() - opt.state[p]["anchor"]).flatten() for p in params])
    clip = 2.0 / ((g + 0.5 * r).norm() + 1e-6)
    opt.step()
    stats = opt.guidance_stats()
    torch.testing.assert_close(stats["clip"], clip)
    torch.testing.assert_close(stats["grad_norm"], g.norm())
    torch.testing.assert_close(stats["distance"], d.norm())
    torch.testing.assert_close(stats["scale"], OPTIONS["strength"] * clip * g.norm() / d.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_with_replay_gradient_only(kind, backend):
    """It is stepped with w r; its g counts as zero."""
    runs = []
    for way in ("none", "zero"):
        params, opt = build(kind, backend, alpha=1.0, replay_weight=0.5)
        for step in range(3):
            opt.zero_grad()
            scaled_loss(params[1:], step).backward()
            params[0].grad = None if way == "none" else torch.zeros(3)
            with opt.replay():
                scaled_loss(params, step + 50).backward()
            opt.step()
        runs.append(params)
    equal(*runs)


ORDERS = ["replay zero backward step", "zero replay backward step", "replay backward step zero",
          "replay model-zero backward step", "backward zero replay step",
          "zero zero replay zero backward step"]  # fmt: skip


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_replay_is_used_wherever_gradients_are_zeroed(order, set_to_none):
    """The usual orders of a loop; zero_grad() between block and step is for .grad alone."""
    model = torch.nn.Linear(3, 2)
    opt = dgg.SGD(model.parameters(), lr=0.1)
    expected = [p.detach().clone() for p in model.parameters()]

    def run():
        for act in order.split():
            if act == "replay":
                with opt.replay():
                    for p in model.parameters():
                        p.grad = torch.full_like(p, 2.0)
            elif act == "zero":
                opt.zero_grad(set_to_none)
            elif act == "model-zero":
                model.zero_grad(set_to_none)
            elif act == "backward":
                for p in model.parameters():
                    p.grad = torch.ones_like(p) + (0 if p.grad is None else p.grad)
            else:
                opt.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run()
            model.zero_grad()
            for p in expected:
                p -= 0.1 * (2.0 if order == "backward zero replay step" else 3.0)
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_replay_that_no_step_uses_is_dropped_with_a_warning_once():
    params, opt = build("sgd-momentum", None, alpha=0.0)
    mirror, other = build("sgd-momentum", None, alpha=0.0)

    def record():
        with opt.replay():
            scaled_loss(params, 1).backward()

    record()
    opt.zero_grad()
    record()  # a block more, which begins to count anew
    opt.zero_grad()
    assert opt._replay
    with pytest.warns(UserWarning, match="zero_grad.*twice.*clear_replay") as caught:
        opt.zero_grad()
    assert caught[0].filename == __file__
    record()
    opt.clear_replay()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        record()
        opt.zero_grad()
        opt.zero_grad()
    for ps, o in ((params, opt), (mirror, other)):
        grads_of(2, ps)
        o.step()
    equal(params, mirror)


def test_a_closure_that_zeroes_leaves_out_no_step():
    params, opt = build("sgd-momentum", None, alpha=0.0)
    mirror, other = build("sgd-momentum", None, alpha=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ps, o in ((params, opt), (mirror, other)):
            with o.replay():
                scaled_loss(ps, 1).backward()
            o.zero_grad()

            def closure(ps=ps, o=o, zeroes=o is opt):
                if zeroes:
                    o.zero_grad()
                grads_of(2, ps)

            o.step(closure)
    equal(params, mirror)


def test_zero_grad_within_a_block_is_about_the_replay_gradient():
    params, opt = build("sgd-momentum", None, shapes=[(3,)])
    params[0].grad = torch.ones(3)
    with opt.replay():
        params[0].grad = torch.full((3,), 5.0)
        opt.zero_grad()
        params[0].grad = torch.full((3,), 7.0)
    assert torch.equal(params[0].grad, torch.ones(3))
    assert torch.equal(opt._replay.get(params[0]), torch.full((3,), 7.0))


def test_replay_block_that_fails_gives_back_what_an_earlier_one_recorded():
    """A backward pass adds to it in place."""
    param = torch.nn.Parameter(torch.zeros(2))
    opt = dgg.SGD([param], lr=1.0)
    with opt.replay():
        param.sum().backward()
    with pytest.raises(KeyError), opt.replay():
        (param * 10).sum().backward()
        raise KeyError
    opt.step()
    assert torch.equal(param.detach(), torch.full((2,), -1.0))


def test_replay_of_a_parameter_that_has_changed_its_dtype_is_named():
    param = torch.nn.Parameter(torch.ones(2))
    opt = dgg.SGD([param], lr=1.0)
    with opt.replay():
        param.grad = torch.ones(2)
    param.data = param.data.double()
    with pytest.raises(RuntimeError, match=r"replay gradients of torch.float32.*clear_replay\(\)"):
        with opt.replay():
            pass
    opt.clear_replay()
    with opt.replay():
        param.grad = torch.ones(2, dtype=torch.float64)
    opt.step()
    assert torch.equal(param.detach(), torch.zeros(2, dtype=torch.float64))


def test_replay_of_another_dtype_on_purpose_adds_up():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad_dtype = None
    opt = dgg.SGD([param], lr=1.0)
    for _ in range(2):
        with opt.replay():
            new = torch.ones(3, dtype=torch.bfloat16)
            param.grad = new if param.grad is None else param.grad + new
    opt.step()
    assert torch.equal(param.detach(), torch.full((3,), -2.0))


def test_replay_survives_loading():
    params, opt = build("adamw", None)
    mirror, other = build("adamw", None)
    for ps, o, load in ((params, opt, True), (mirror, other, False)):
        with o.replay():
            scaled_loss(ps, 1).backward()
        if load:
            o.load_state_dict(o.state_dict())
        grads_of(2, ps)
        o.step()
    equal(params, mirror)


def test_replay_gradients_are_not_copied():
    params, opt = build("sgd-momentum", None, shapes=[(5,)])
    r = torch.ones(5)
    with opt.replay():
        params[0].grad = r
    with opt.replay():
        assert params[0].grad is r
    assert params[0].grad is None


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_that_are_views_come_back_themselves_and_with_their_values(fails):
    """Of a flat buffer that the user zeroes at once, or of a bucket that the block's pass fills."""
    params, opt = build("adamw", None, shapes=[(3, 4), (3,), (2,)])
    flat = torch.arange(18.0)
    views = flat[:12].view(3, 4), flat[12::2], flat[1:2].expand(2)
    for p, view in zip(params, views, strict=True):
        p.grad = view
    with contextlib.suppress(OverflowError), opt.replay():
        for p in params:
            p.grad = torch.ones_like(p)
        flat.fill_(7.0)
        if fails:
            raise OverflowError
    for p, view in zip(params[:2], views, strict=False):
        assert p.grad is view
    equal([p.grad for p in params[:2]], [torch.arange(12.0).view(3, 4), torch.arange(12.0, 18, 2)])
    assert params[2].grad.tolist() == [1.0, 1.0]  # nothing can be written into an expanded one
    flat.zero_()
    assert not any(p.grad.any() for p in params[:2])
    assert bool(opt._replay) != fails


# -- (4) look-ahead and statistics ----------------------------------------------------------------


def in_place(params, opt):
    with torch.no_grad():
        params[1].mul_(1.5)


def load_weights(params, opt):
    module = torch.nn.Module()
    module.p = params[1]
    module.load_state_dict({"p": torch.full((7, 5), 2.0)})


def new_memory(params, opt):
    params[1].data = params[1].data * 1.5


def foreign_step(params, opt):
    torch.optim.SGD(params[1:2], lr=0.3).step()


def new_anchor(params, opt):
    opt.set_anchor()
    in_place(params, opt)


def edited_anchor(params, opt):
    opt.state[params[1]]["anchor"].lerp_(params[1].detach(), 0.5)


def replaced_anchor(params, opt):
    opt.state[params[1]]["anchor"] = opt.state[params[1]]["anchor"] * 0.5


def loaded_state(params, opt):
    opt.load_state_dict(opt.state_dict())
    in_place(params, opt)


def no_change(params, opt):
    pass


CHANGES = [in_place, load_weights, new_memory, foreign_step, new_anchor, replaced_anchor,
           loaded_state, no_change]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("change", [*CHANGES, edited_anchor])
def test_distance_is_measured_again_after_a_change(change, scope, backend):
    """The next step equals that of an optimizer which has never looked ahead."""
    options = {"alpha": 1.0, "norm_scope": scope, "max_grad_norm": 3.0}
    params, opt = build("adamw", backend, **options)
    for step in range(2):
        grads_of(step, params)
        opt.step()
    change(params, opt)
    grads_of(5, params)
    others = [Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    cls, hyper = OPTIMIZERS["adamw"]
    fresh = cls(others, backend=backend, **{**hyper, **OPTIONS, **options})
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))  # else torch shares the moments
    d = torch.stack([(p.detach() - opt.state[p]["anchor"]).norm() for p in params])
    opt.step()
    fresh.step()
    torch.testing.assert_close(opt.guidance_stats()["distance"], d.norm())
    assert torch.equal(opt.guidance_stats()["scale"], fresh.guidance_stats()["scale"])
    equal(params, others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_versions_tell_autograd(kind, backend):
    """A graph that saved the weights must refuse to run backward after the step."""
    params, opt = build(kind, backend)
    versions = [p._version for p in params]
    grads_of(0, params)
    params[2].grad = None
    loss = (params[0] * params[0]).sum()
    opt.step()
    assert [p._version > v for p, v in zip(params, versions, strict=True)] == [True, True, False]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend):
    params, opt = build("adamw", backend, max_grad_norm=None, alpha=0.3)
    names = {
        "injected",
        "scale",
        "grad_norm",
        "distance",
        "clip",
        "anchored",
        "guided",
        "alignment",
        "pull",
    }
    before = opt.guidance_stats()
    assert before == {**dict.fromkeys(names), "anchored": len(params)} and before.backend == ""
    seen = set()
    for step in range(30):
        grads_of(step, params)
        d = torch.cat([(p.detach() - opt.state[p]["anchor"]).flatten() for p in params]).norm()
        g = torch.cat([p.grad.flatten() for p in params]).norm()
        opt.step()
        stats = opt.guidance_stats()
        assert set(stats) == names
        assert stats["clip"] is None
        assert stats.backend == stats["backend"] == backend
        file = io.BytesIO()
        torch.save(stats, file)
        file.seek(0)
        assert set(torch.load(file, weights_only=True)) == names
        assert stats["anchored"] == len(params)
        hit = _philox.step_word(7, step) < _philox.threshold(0.3)
        assert stats["injected"].dtype == torch.bool and bool(stats["injected"]) == hit
        seen.add(hit)
        assert stats["guided"] == (len(params) if hit else 0)
        if hit:
            torch.testing.assert_close(stats["grad_norm"], g)
            torch.testing.assert_close(stats["distance"], d)
            torch.testing.assert_close(stats["scale"], 0.7 * torch.clamp(g / d, max=1.0))
        else:
            assert stats["grad_norm"] is None and stats["distance"] is None
            assert stats["scale"] == 0
    assert seen == {True, False}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_statistics_tell_what_was_guided(backend, granularity):
    """Not what was drawn: nothing is injected where nothing anchored has a gradient."""
    params, opt = build("adamw", backend, alpha=1.0, granularity=granularity)
    new = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [new]})
    for p in (*params, new):
        p.grad = None
    new.grad = torch.ones(3)
    opt.step()
    stats = opt.guidance_stats()
    assert not stats["injected"] and stats["guided"] == 0
    assert stats["anchored"] == len(params)
    params[1].grad = torch.ones_like(params[1])
    with opt.replay():
        params[0].grad = torch.ones_like(params[0])
    opt.step()
    stats = opt.guidance_stats()
    assert stats["injected"] and stats["guided"] == 2
    opt.clear_anchor()
    opt.step()
    stats = opt.guidance_stats()
    assert not stats["injected"] and stats["anchored"] == 0


def test_a_run_that_never_sets_an_anchor_is_told_so_once():
    def steps(count, **options):
        param = torch.nn.Parameter(torch.zeros(3))
        opt = dgg.SGD([param], lr=0.1, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                param.grad = torch.ones(3)
                opt.step()
        return opt, [str(w.message) for w in caught]

    assert steps(199)[1] == []
    (message,) = steps(450)[1]
    assert "200 steps" in message and "set_anchor(task=0)" in message
    assert steps(250, alpha=0.0)[1] == []
    param = torch.nn.Parameter(torch.zeros(3))
    opt = dgg.SGD([param], lr=0.1)
    opt.set_anchor(task=0)  # the first task has nothing to protect
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(250):
            param.grad = torch.ones(3)
            opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_steps_without_any_gradient_are_told_of_once(backend):
    params, opt = build("adamw", backend)
    grads_of(0, params)
    opt.step()
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            opt.step()
    with pytest.warns(UserWarning, match="no parameter has had a gradient for 100 steps"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_not_a_zero_gradient(kind, backend):
    """None: nothing happens. Zero: decay and momentum act, the guidance does not (s = 0)."""
    params, opt = build(kind, backend, alpha=1.0)
    before = [p.detach().clone() for p in params]
    opt.step()
    equal(params, before)
    assert opt.param_groups[0]["draw_index"] == 1
    assert all("momentum_buffer" not in opt.state[p] for p in params)
    assert all(opt.state[p].get("step", 0) == 0 for p in params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    cls, hyper = OPTIMIZERS[kind]
    mirror = [Parameter(x.clone()) for x in before]
    parent = {dgg.AdamW: torch.optim.AdamW, dgg.SGD: torch.optim.SGD}[cls]
    theirs = parent(mirror, **hyper)
    for p in mirror:
        p.grad = torch.zeros_like(p)
    theirs.step()
    torch.testing.assert_close(params, mirror)
    assert not torch.equal(params[0], before[0])
    assert opt.guidance_stats()["scale"] == 0


# -- (5) determinism ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_repeat_and_no_global_generator_is_touched(kind, guidance, backend):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params, opt = build(kind, backend, **GUIDANCE[guidance])
        for step in range(4):
            grads_of(step, params)
            opt.step()
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(params)
    equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_changes_no_bit(kind, backend):
    runs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params, opt = build(kind, backend, [(3,), (70_001,), (501,)], alpha=1.0)
            for step in range(3):
                grads_of(step, params)
                opt.step()
            runs.append(params)
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        equal(run, runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_draw_index_counts_modulo_2_to_the_32(granularity, backend):
    """And goes on beyond it: no overflow in a kernel's argument."""
    runs = []
    for start in (5, (1 << 32) + 5, (1 << 40) + 5):
        params, opt = build("sgd-momentum", backend, granularity=granularity, alpha=0.5)
        opt.param_groups[0]["draw_index"] = start
        for step in range(4):
            grads_of(step, params)
            opt.step()
        assert opt.param_groups[0]["draw_index"] == start + 4
        runs.append(params)
    for run in runs[1:]:
        equal(run, runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
@pytest.mark.parametrize("seed", [0, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_every_seed_draws_by_the_definition(seed, granularity, backend):
    """Which elements were pulled is read off the weights, at lr 1 and without gradient in value."""
    shapes = [(2,), (6,)]
    params = make_params(shapes, F32)
    opt = dgg.SGD(params, lr=0.25, alpha=0.5, strength=1.0, scaling=False, seed=seed,
                  granularity=granularity, backend=backend)  # fmt: skip
    opt.set_anchor()
    for draw in range(6):
        for p in params:
            p.data = opt.state[p]["anchor"] + 1.0
            p.grad = torch.zeros_like(p)
        opt.step()
        limit = 1 << 31
        for j, p in enumerate(params):
            if granularity == "step":
                hit = torch.full(p.shape, _philox.step_word(seed, draw) < limit)
            elif granularity == "tensor":
                hit = (_philox.tensor_words(seed, draw, torch.tensor([j])) < limit).expand(p.shape)
            else:
                hit = _philox.element_words(seed, draw, j, torch.arange(p.numel())) < limit
            moved = p.detach() - opt.state[p]["anchor"]
            torch.testing.assert_close(moved, torch.where(hit, 0.75, 1.0))


# -- (6) size and leaks ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_448_small_parameters(kind):
    """A LoRA model's list, some without gradient, against the reference."""
    shapes = [(8,) if i % 2 else (2, 3) for i in range(448)]
    runs = []
    for backend in ("reference", None):
        params, opt = build(kind, backend, shapes, alpha=1.0)
        for step in range(3):
            set_grads(params, torch.Generator().manual_seed(step), missing={step, 40, 447})
            opt.step()
        runs.append((params, opt.guidance_stats()))
    # float32 arithmetic in another order of operations, three steps long.
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)
    for name in ("scale", "grad_norm", "distance", "clip"):
        torch.testing.assert_close(runs[0][1][name], runs[1][1][name])


def test_no_finalizers():
    """A __del__ that fails on a half-made object hides the error that made it fail."""
    for cls in (dgg.AdamW, dgg.Adam, dgg.SGD, dgg.Guidance):
        assert not any("__del__" in vars(base) for base in cls.__mro__)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_and_its_gradients_can_be_freed(backend):
    params, opt = build("adamw", backend, alpha=1.0)
    grads_of(0, params)
    with opt.replay():
        scaled_loss(params, 1).backward()
    grads = [weakref.ref(p.grad) for p in params]
    opt.step()
    opt.zero_grad()
    assert all(ref() is None for ref in grads), "the step keeps gradients alive"
    anchors = [weakref.ref(opt.state[p]["anchor"]) for p in params]
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    assert all(ref() is None for ref in anchors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_leave_nothing_behind(backend):
    params, opt = build("adamw", backend, granularity="tensor")

    def run(steps):
        for step in range(steps):
            grads_of(step, params)
            if step % 3 == 0:
                with opt.replay():
                    scaled_loss(params, step).backward()
            params[0].grad = params[0].grad.expand(3) if step % 4 else None
            if step % 10 == 0:
                opt.set_anchor()
            opt.step()
            opt.zero_grad()
        gc.collect()
        return len(gc.get_objects())

    run(20)
    before = run(20)
    assert run(100) - before < 50


def test_a_first_step_without_any_gradient_warns():
    param = torch.nn.Parameter(torch.ones(3))
    opt = dgg.AdamW([param])
    with pytest.warns(
        UserWarning, match="no gradient in any of 1 parameters.*make the opt"
    ) as found:
        opt.step()
    assert found[0].filename == __file__
    param.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        opt.zero_grad()
        opt.step()  # later it is nothing to wonder about
        dgg.AdamW([torch.nn.Parameter(torch.ones(3), requires_grad=False)]).step()


def test_launches_go_to_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one that the tensors are on."""
    launcher = pytest.importorskip("dgg.kernels.launcher")
    launches, outside = 0, []
    for path in pathlib.Path(launcher.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        # What all launches go through, and so none of its own.
        passing = [
            node
            for kernel in ast.walk(tree)
            if isinstance(kernel, ast.ClassDef) and kernel.name == "Kernel"
            for node in ast.walk(kernel)
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Subscript) and node not in passing:
                outside.append(f"{path.name}:{node.lineno}")
            launches += isinstance(node.func, ast.Attribute) and node.func.attr == "launch"
    assert not outside
    assert launches >= 6

    inside, started = [], []

    class Module:
        @contextlib.contextmanager
        def device(device):
            inside.append(device)
            yield
            inside.pop()

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    declared = types.SimpleNamespace(
        fn=lambda: None, run=lambda *_, **__: started.append(list(inside))
    )
    kernel, there = launcher.Kernel(declared, []), torch.device("cuda", 1)
    kernel.launch(1, types.SimpleNamespace(device=there))
    kernel.launch(1, torch.ones(1))
    assert started == [[there], []] and not inside
