# SPDX-License-Identifier: BSD-3-Clause
"""`dgg.Guidance`: the guidance of dgg's own optimizers, for anybody's optimizer.

Plan: (1) every torch optimizer, guided, equals the same optimizer after an edit of ``.grad`` that
is written out here in float64, with clipping, replay, scaling, ablation and both norms; (2) a
guided torch.optim.SGD, Adam, AdamW is dgg's; same seed, same draws; (3) closures, maximize,
GradScaler, groups added, gradients of other strides and dtypes; (4) state dicts and removal; (5)
gradients taken up natively are edited as those that are looked at one by one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import io
import pathlib
import pickle
import re
import sys
import weakref

import pytest
import torch
from torch.nn import Parameter

import dgg
import guided_optimizers
from cases import BACKENDS, BF16, F32, F64, GUIDANCE, OPTIMIZERS, make_params, set_grads
from dgg import _arguments, _philox, backends
from dgg.backends import native
from dgg.step.cache import RowCache

# No hyper-parameter at its neutral value where the optimizer has it.
FOREIGN = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD-foreach": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "foreach": True}),
    "SGD-maximize": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    "Muon": (getattr(torch.optim, "Muon", None), {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
}
SHAPES = [(4, 3), (7, 5)]  # Muon takes matrices only
SEED = 21


def foreign(name, params):
    cls, hyper = FOREIGN[name]
    if cls is None:
        pytest.skip(f"torch {torch.__version__} has no torch.optim.{name}")
    return cls(params, **hyper)


def move(params, by=0.3):
    with torch.no_grad():
        for p in params:
            p.add_(by)


def edit_by_hand(params, anchors, replays, draw, options, maximize=False):
    """Equations (1) to (5), in float64, one line each; writes ``.grad``."""
    o = {"strength": 1.0, "scaling": True, "norm_scope": "global", "granularity": "step",
         "max_grad_norm": None, "replay_weight": 1.0, **options}  # fmt: skip

    def norm(tensors):
        return sum((x.double() ** 2).sum() for x in tensors).sqrt()

    g = [p.grad.double() for p in params]
    h = [x + o["replay_weight"] * r.double() for x, r in zip(g, replays, strict=True)]
    c = 1.0
    if o["max_grad_norm"] is not None:
        c = torch.clamp(o["max_grad_norm"] / (norm(h) + 1e-6), max=1.0)
    d = [p.detach().double() - a.double() for p, a in zip(params, anchors, strict=True)]
    limit = int(o["alpha"] * 2**32)
    for j, p in enumerate(params):
        pair = ([g[j]], [d[j]]) if o["norm_scope"] == "tensor" else (g, d)
        s = torch.clamp(c * norm(pair[0]) / norm(pair[1]), max=1.0) if o["scaling"] else 1.0
        if o["granularity"] == "step":
            b = _philox.step_word(SEED, draw) < limit
        elif o["granularity"] == "tensor":
            b = int(_philox.tensor_words(SEED, draw, torch.tensor([j]))) < limit
        else:
            elements = torch.arange(p.numel()).view(p.shape)
            b = (_philox.element_words(SEED, draw, j, elements) < limit).double()
        pull = b * o["strength"] * s * d[j]
        p.grad = (c * h[j] + (-pull if maximize else pull)).to(p.grad.dtype)


def run_pair(name, backend, options, *, replay, steps=5):
    """The same run, guided and edited by hand, from the same weights and gradients."""
    params, mirror = make_params(SHAPES, F32, seed=1), make_params(SHAPES, F32, seed=1)
    opt, theirs = foreign(name, params), foreign(name, mirror)
    guidance = dgg.Guidance(opt, seed=SEED, backend=backend, **options)
    guidance.set_anchor()
    anchors = [p.detach().clone() for p in mirror]
    move(params)
    move(mirror)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        set_grads(params, generator)
        replays = [torch.randn(p.shape, generator=generator) for p in params]
        for p, q in zip(params, mirror, strict=True):
            q.grad = p.grad.clone()
        if replay:
            with guidance.replay():
                for p, r in zip(params, replays, strict=True):
                    p.grad = r.clone()
        hand = replays if replay else [torch.zeros_like(r) for r in replays]
        edit_by_hand(mirror, anchors, hand, step, options, FOREIGN[name][1].get("maximize", False))
        opt.step()
        # G itself, rounded once to float32 and computed in float32 (cancellation: absolute).
        for p, q in zip(params, mirror, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=3e-6, atol=1e-6)
            # The optimizers then get the same bits, so that a sign or a square root near zero
            # (Rprop, Adagrad's first step) cannot blow the rounding up.
            q.grad = p.grad.clone()
        theirs.step()
        for p, q in zip(params, mirror, strict=True):
            assert torch.equal(p, q)
    assert guidance.param_groups[0]["draw_index"] == steps
    return params, guidance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_equals_the_edit_by_hand(name, backend):
    options = {"alpha": 0.6, "strength": 0.7, "max_grad_norm": 3.0, "replay_weight": 0.5}
    run_pair(name, backend, options, replay=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", ["SGD", "SGD-maximize"])
def test_every_kind_of_guidance(name, guidance, replay, backend):
    run_pair(name, backend, {**GUIDANCE[guidance], "replay_weight": 0.5}, replay=replay)


# -- (2) against dgg's own ------------------------------------------------------------------------

PARENTS = {dgg.AdamW: torch.optim.AdamW, dgg.Adam: torch.optim.Adam, dgg.SGD: torch.optim.SGD}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_guided_torch_is_dgg(kind, guidance, backend):
    cls, hyper = OPTIMIZERS[kind]
    options = {**GUIDANCE[guidance], "seed": SEED, "replay_weight": 0.5, "backend": backend}
    shapes = [(3,), (7, 5), (0,), (2049,)]
    runs = []
    for ours in (True, False):
        params = make_params(shapes, F32)
        if ours:
            guide = opt = cls(params, **hyper, **options)
        else:
            opt = PARENTS[cls](params, **hyper)
            guide = dgg.Guidance(opt, **options)
        guide.set_anchor()
        move(params)
        hits = []
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            # A fifth parameter's place stays without gradient, another has a replay gradient only.
            set_grads(params, generator, missing={step % 4})
            with guide.replay():
                set_grads(params, generator, missing={1})
            opt.step()
            hits.append(bool(guide.guidance_stats()["injected"]))
        assert guide.param_groups[0]["draw_index"] == 6
        runs.append((params, hits, guide.guidance_stats()))
    assert runs[0][1] == runs[1][1]
    # Six float32 steps that round in other places; amsgrad and Adam divide by small roots.
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=2e-5, atol=2e-5)
    for name, value in runs[0][2].items():
        torch.testing.assert_close(value, runs[1][2][name], rtol=2e-5, atol=0.0)


# -- every optimizer of torch, as the guide's table has them --------------------------------------

# Those that take other arguments than lr=0.01.
SPECIAL = {"LBFGS": {"lr": 0.1, "max_iter": 3}, "ASGD": {"lr": 0.01, "t0": 2}, "SGD": {"lr": 0.01,
           "momentum": 0.9}}  # fmt: skip
OF_TORCH = sorted(
    name for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
)  # fmt: skip


@pytest.mark.parametrize("name", OF_TORCH)
def test_every_optimizer_of_torch_is_guided_and_resumes(name):
    """Two tasks: its gradients are equation (5), its steps those of any gradients, it resumes."""
    hyper = SPECIAL.get(name, {"lr": 0.01})
    make = lambda params: getattr(torch.optim, name)(params, **hyper)  # noqa: E731
    if name == "SparseAdam":  # it takes sparse gradients alone, and there the pull would be dense
        embedding = torch.nn.Embedding(3, 2, sparse=True)
        opt = make(list(embedding.parameters()))
        dgg.Guidance(opt)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match="dgg needs dense gradients"):
            opt.step()
        return
    guided_optimizers.check(make, closure=name == "LBFGS")


def test_the_table_of_optimizers_is_complete():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "guidance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| torch [^|]* \| ([^|]*) \| as by hand, resumes", page, re.M)
    named = re.findall(r"`(\w+)`", "".join(rows))
    assert sorted([*named, "SparseAdam"]) == OF_TORCH and "`SparseAdam` | no:" in page


# -- (3) what else a step can be ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keyword", [True, False])
def test_lbfgs_closure_is_guided_at_every_evaluation_with_one_draw(backend, keyword):
    target = torch.tensor([1.0, -2.0, 0.5])
    evaluations = []
    runs = []
    for guided in (True, False):
        p = Parameter(torch.tensor([0.3, 0.1, -0.4]))
        opt = torch.optim.LBFGS([p], lr=0.3, max_iter=4)
        anchor = p.detach().clone()
        if guided:
            guidance = dgg.Guidance(opt, alpha=0.5, strength=0.7, seed=SEED, backend=backend)
            guidance.set_anchor()
        move([p])
        for step in range(4):

            def closure(p=p, guided=guided, anchor=anchor, step=step):
                p.grad = None
                loss = ((p - target) ** 2 * torch.tensor([1.0, 3.0, 0.2])).sum()
                loss.backward()
                if not guided:
                    evaluations.append(step)
                    edit_by_hand(
                        [p], [anchor], [torch.zeros(3)], step, {"alpha": 0.5, "strength": 0.7}
                    )
                return loss

            assert (opt.step(closure=closure) if keyword else opt.step(closure)) is not None
            if guided:
                assert guidance.param_groups[0]["draw_index"] == step + 1
        runs.append(p)
    assert len(evaluations) > 8
    # L-BFGS divides by differences of gradients: rounding grows over its inner iterations.
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


class ThreeLooks(torch.optim.SGD):
    """Evaluates its closure three times a step, and keeps the gradients that it sees."""

    def step(self, closure):
        self.seen = []
        for _ in range(3):
            closure()
            self.seen.append(self.param_groups[0]["params"][0].grad.clone())


def looking(closure, **options):
    p = Parameter(torch.zeros(2))
    opt = ThreeLooks([p], lr=1.0)
    guidance = dgg.Guidance(opt, **options)

    def zeroed():
        opt.zero_grad()
        closure(p, guidance)

    return p, opt, guidance, functools.partial(opt.step, zeroed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, "auto"])
def test_every_look_of_a_step_has_the_replay_gradients(alpha, backend):
    """Those of the step, and those that the closure records anew."""

    def closure(p, guidance):
        (-4 * p).sum().backward()
        with guidance.replay():
            p.backward(torch.tensor([2.0, 0.0]))

    p, opt, guidance, step = looking(closure, alpha=alpha, replay_weight=0.5, backend=backend)
    guidance.set_anchor({"p": p.detach() - 1.0}, model=torch.nn.ParameterDict({"p": p}))
    for _ in range(2):
        with guidance.replay():
            p.backward(torch.tensor([0.0, 4.0]))
        opt.zero_grad()  # and the closure does so, which leaves out no step
        step()
        first, *others = opt.seen
        assert bool(guidance.guidance_stats()["injected"]) == (alpha == "auto")
        assert torch.equal(first, torch.tensor([-3.0, -2.0])) == (alpha == 0.0)
        assert all(torch.equal(grad, first) for grad in others)
        assert not guidance._replay


@pytest.mark.parametrize("look", [1, 2])
def test_a_closure_that_raises_leaves_no_replay_gradient_that_a_look_has_used(look):
    looks = []

    def closure(p, guidance):
        p.sum().backward()
        looks.append(p)
        if len(looks) == look:
            raise OverflowError

    p, opt, guidance, step = looking(closure, alpha=0.0)
    with guidance.replay():
        p.backward(torch.ones(2))
    with pytest.raises(OverflowError):
        step()
    assert bool(guidance._replay) == (look == 1)
    step()
    assert torch.equal(opt.seen[-1], torch.full((2,), 2.0 if look == 1 else 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW-fused", "SGD", "NAdam"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(name, unscaled, backend):
    """Fused ones unscale by themselves; the guidance must not be divided, nor divide again."""
    runs = []
    for scale in (None, 256.0):
        params = make_params(SHAPES, F32)
        opt = foreign(name, params)
        guidance = dgg.Guidance(
            opt, alpha=0.6, strength=0.7, max_grad_norm=2.0, seed=SEED, backend=backend
        )
        guidance.set_anchor()
        move(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(5):
            opt.zero_grad()
            weights = torch.Generator().manual_seed(step)
            loss = sum((p * torch.randn(p.shape, generator=weights)).sum() for p in params)
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            assert not hasattr(opt, "found_inf")
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)  # a power of two: no rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_skip_of_a_fused_optimizer(backend):
    params = make_params(SHAPES, F32)
    opt = foreign("AdamW-fused", params)
    guidance = dgg.Guidance(opt, alpha=1.0, backend=backend)
    guidance.set_anchor()
    move(params)
    before = [p.detach().clone() for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    params[1].grad[0, 0] = torch.inf
    scaler.step(opt)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)
    assert guidance.param_groups[0]["draw_index"] == 1  # a call of step(), as for dgg's own
    assert not guidance.guidance_stats()["injected"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_their_own_alpha_and_late_ones_join_at_the_boundary(backend):
    first, second, late = make_params([(4,), (5,), (6,)], F32)
    opt = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    guidance = dgg.Guidance(opt, alpha=1.0, strength=0.5, backend=backend)
    guidance.param_groups[1]["alpha"] = 0.0
    guidance.set_anchor()
    opt.add_param_group({"params": [late]})
    move([first, second, late], 1.0)
    for guided in ({first}, {first, late}):
        values = {p: p.detach().clone() for p in (first, second, late)}
        for p in values:
            p.grad = torch.full_like(p, 100.0)  # s = strength: the gradient is the longer one
        opt.step()
        for p, old in values.items():
            away = 1.0 if guided == {first} else 0.5
            pull = 0.5 * away * (p in guided)
            expected = old - 0.1 * (100.0 + pull)
            torch.testing.assert_close(p.detach(), expected)
        guidance.set_anchor()
        guidance.param_groups[1]["alpha"] = 0.0
        move([first, second, late], 0.5)
    assert len(guidance.param_groups) == 2 + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_odd_strides_and_dtypes(backend):
    """Expanded, transposed, channels_last and (params in bfloat16) narrow gradients."""
    shapes = [(5, 4), (9,), (2, 3, 4, 4)]
    for dtype in (F32, BF16, F64):
        runs = []
        for odd in (True, False):
            params = make_params(shapes, dtype)
            opt = torch.optim.SGD(params, lr=0.1)
            guidance = dgg.Guidance(
                opt, alpha=0.5, strength=0.7, granularity="element", seed=SEED, backend=backend
            )
            guidance.set_anchor()
            move(params)
            set_grads(params, torch.Generator().manual_seed(1))
            params[1].grad = torch.ones(1, dtype=dtype).expand(9)
            if odd:
                params[0].grad = params[0].grad.T.contiguous().T
                params[2].grad = params[2].grad.contiguous(memory_format=torch.channels_last)
            else:
                params[1].grad = params[1].grad.contiguous()
            before = [p.grad.clone() for p in params]
            opt.step()
            runs.append([p.grad for p in params])
            assert all(not torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
        for p, q in zip(*runs, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_two_parameters_share_is_edited_for_each(backend):
    """At every step, the later ones taken up natively included; each has its own pull."""
    params = [Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
    opt = torch.optim.SGD(params, lr=0.0)
    guidance = dgg.Guidance(
        opt, alpha=1.0, scaling=False, strength=0.5, max_grad_norm=0.1, backend=backend
    )
    guidance.set_anchor()
    move(params[1:])
    clipped = 0.1 / (6**0.5 + 1e-6)
    for _ in range(3):
        params[0].grad = params[1].grad = torch.ones(3)
        opt.step()
        torch.testing.assert_close(params[0].grad, torch.full((3,), clipped))
        torch.testing.assert_close(params[1].grad, torch.full((3,), clipped + 0.5 * 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_done_where_nothing_is_asked(backend):
    """No anchor, no clipping, no replay: the gradients stay the objects and bits they were."""
    params = make_params(SHAPES, F32)
    opt = torch.optim.SGD(params, lr=0.1)
    guidance = dgg.Guidance(opt, alpha=1.0, backend=backend)
    set_grads(params, torch.Generator().manual_seed(0))
    kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
    opt.step()
    for p, (grad, value, version) in zip(params, kept, strict=True):
        assert p.grad is grad and grad._version == version
        assert torch.equal(grad, value)
    assert guidance.param_groups[0]["draw_index"] == 1
    guidance.set_anchor()
    move(params)
    opt.step()
    assert all(p.grad._version > version for p, (_, _, version) in zip(params, kept, strict=True))
    assert not torch.equal(params[0].grad, kept[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_grad_of_the_other_optimizer_and_an_unused_replay(backend):
    """A replay gradient is used by one step, not by the next one as well."""
    params = make_params(SHAPES, F32)
    opt = torch.optim.SGD(params, lr=1.0)
    guidance = dgg.Guidance(opt, alpha=0.0, replay_weight=0.5, backend=backend)
    before = [p.detach().clone() for p in params]
    with guidance.replay():
        sum(p.sum() for p in params).backward()
    assert all(p.grad is None for p in params)
    opt.step()
    opt.zero_grad()
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5)


def test_replay_gradients_of_a_step_that_was_left_out_are_dropped():
    """As dgg's own optimizers drop them: at the second zero_grad(), with a warning."""
    grads = []
    for cls in (dgg.SGD, torch.optim.SGD):
        p = Parameter(torch.zeros(2))
        opt = cls([p], lr=1.0)
        guide = opt if cls is dgg.SGD else dgg.Guidance(opt, alpha=0.0)
        for steps in (False, True):
            opt.zero_grad()
            with guide.replay():
                p.backward(torch.ones(2))
            if not steps:
                with pytest.warns(UserWarning, match=r"called twice since the replay\(\) block"):
                    opt.zero_grad()  # before the second pass, whose loss is not finite: no step
                    opt.zero_grad(set_to_none=False)
        opt.zero_grad()
        p.backward(torch.zeros(2))
        opt.step()
        grads.append(-p.detach())
    assert torch.equal(*grads) and torch.equal(grads[0], torch.ones(2))


def test_zero_grad_is_watched_until_the_guidance_is_removed():
    (p,) = make_params([(2,)], F32)
    opt = torch.optim.SGD([p], lr=1.0)
    assert "zero_grad" not in vars(opt)
    guidance = dgg.Guidance(opt)
    assert inspect.signature(opt.zero_grad) == inspect.signature(torch.optim.SGD([p]).zero_grad)
    for other in (copy.deepcopy(opt), copy.copy(opt), pickle.loads(pickle.dumps(opt))):
        assert "zero_grad" not in vars(other)
    guidance.remove()
    assert "zero_grad" not in vars(opt)
    # Others may do the same, before and after.
    before = opt.zero_grad = functools.partial(opt.zero_grad, set_to_none=False)
    guidance = dgg.Guidance(opt)
    guidance.remove()
    assert opt.zero_grad is before
    guidance = dgg.Guidance(opt)
    after = opt.zero_grad = functools.partial(opt.zero_grad)
    guidance.remove()
    p.grad = torch.ones(2)
    opt.zero_grad()
    assert opt.zero_grad is after and torch.equal(p.grad, torch.zeros(2))


# -- (4) state and removal ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("anchor_dtype", [None, BF16, F64])
def test_resumes_bit_for_bit(anchor_dtype, backend):
    options = {"alpha": 0.5, "strength": 0.7, "granularity": "tensor", "max_grad_norm": 3.0,
               "seed": (1 << 63) + 5, "anchor_dtype": anchor_dtype, "backend": backend}  # fmt: skip

    def make(params=None):
        params = make_params(SHAPES, F32) if params is None else params
        opt = foreign("NAdam", params)
        return params, opt, dgg.Guidance(opt, **options)

    def advance(run, steps):
        params, opt, guidance = run
        for step in steps:
            if step == 2:
                guidance.set_anchor()
            set_grads(params, torch.Generator().manual_seed(step))
            opt.step()

    straight = make()
    advance(straight, range(8))
    for cut in range(8):
        run = make()
        advance(run, range(cut))
        file = io.BytesIO()
        torch.save([run[1].state_dict(), run[2].state_dict(), [p.data for p in run[0]]], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = make([Parameter(x) for x in saved[2]])
        again[2].param_groups[0].update(seed=1, alpha=0.9)
        again[1].load_state_dict(saved[0])
        again[2].load_state_dict(saved[1])
        advance(again, range(cut, 8))
        for p, q in zip(again[0], straight[0], strict=True):
            assert torch.equal(p, q)
        assert again[2].param_groups == straight[2].param_groups
        mine, theirs = again[2].state_dict()["anchors"], straight[2].state_dict()["anchors"]
        assert mine.keys() == theirs.keys() == {0, 1}
        for i, value in mine.items():
            assert value.dtype == (anchor_dtype or F32)
            assert torch.equal(value, theirs[i])


def test_loaded_anchor_is_a_copy_and_one_anchor_is_enough():
    params = make_params(SHAPES, F32)
    guidance = dgg.Guidance(torch.optim.SGD(params, lr=0.1))
    guidance.set_anchor()
    pointers = {i: x.data_ptr() for i, x in guidance.state_dict()["anchors"].items()}
    saved = copy.deepcopy(guidance.state_dict())
    for _ in range(10):
        move(params)
        guidance.set_anchor()
    assert {i: x.data_ptr() for i, x in guidance.state_dict()["anchors"].items()} == pointers
    assert all(pointers[i] != p.data_ptr() for i, p in enumerate(params))
    assert guidance.param_groups[0]["task_index"] == 11
    kept = copy.deepcopy(saved)
    guidance.load_state_dict(saved)
    move(params)
    guidance.set_anchor()
    for i, value in saved["anchors"].items():
        assert torch.equal(value, kept["anchors"][i])


def test_named_anchors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for params, options in ((model.parameters(), {"model": model}), (model.named_parameters(), {})):
        guidance = dgg.Guidance(torch.optim.SGD(params, lr=0.1), alpha=1.0)
        guidance.set_anchor(tensors, **options)
        anchors = guidance.state_dict()["anchors"]
        for i, value in enumerate(tensors.values()):
            assert torch.equal(anchors[i], value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_removed(backend):
    params, mirror = make_params(SHAPES, F32), make_params(SHAPES, F32)
    opt, theirs = foreign("NAdam", params), foreign("NAdam", mirror)
    guidance = dgg.Guidance(opt, alpha=1.0, max_grad_norm=0.5, backend=backend)
    guidance.set_anchor()
    guidance.remove()
    move(params)
    move(mirror)
    for step in range(3):
        for ps, o in ((params, opt), (mirror, theirs)):
            set_grads(ps, torch.Generator().manual_seed(step))
            o.step()
    for p, q in zip(params, mirror, strict=True):
        assert torch.equal(p, q)
    assert guidance.param_groups[0]["draw_index"] == 0
    assert not guidance.state_dict()["anchors"]
    gone = weakref.ref(guidance)
    del guidance
    gc.collect()
    assert gone() is None, "the optimizer still holds the guidance"
    dgg.Guidance(opt, alpha=0.5)  # may be guided anew


def test_cleared():
    params = make_params(SHAPES, F32)
    opt = torch.optim.SGD(params, lr=0.5)
    guidance = dgg.Guidance(opt, alpha=1.0)
    guidance.set_anchor()
    move(params)
    guidance.clear_anchor()
    before = [p.detach().clone() for p in params]
    set_grads(params, torch.Generator().manual_seed(0))
    opt.step()
    assert not guidance.guidance_stats()["injected"]
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old - 0.5 * p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["data", "share", "shape"])
def test_moved_memory_is_noticed(how, backend):
    params = make_params(SHAPES, F32)
    opt = torch.optim.SGD(params, lr=0.1)
    guidance = dgg.Guidance(opt, alpha=1.0, strength=0.5, scaling=False, backend=backend)
    guidance.set_anchor()
    set_grads(params, torch.Generator().manual_seed(0))
    opt.step()
    if how == "data":
        params[0].data = params[0].data + 1.0
    elif how == "share":
        for x in (*params, *guidance.state_dict()["anchors"].values()):
            x.share_memory_()
    else:
        params[0].data = params[0].data[:2]
        guidance.set_anchor()
        params[0].data = params[0].data + 1.0
    set_grads(params, torch.Generator().manual_seed(1))
    anchors = guidance.state_dict()["anchors"]
    expected = [p.grad + 0.5 * (p.detach() - anchors[i]) for i, p in enumerate(params)]
    opt.step()
    torch.testing.assert_close([p.grad for p in params], expected)


def test_checkpoint_helpers_consume_no_draw():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(3)
    model = torch.nn.Linear(4, 3)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    guidance = dgg.Guidance(opt, alpha=1.0)
    guidance.set_anchor()
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, opt)  # makes the state by a step with zero gradients
    assert guidance.param_groups[0]["draw_index"] == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert guidance.param_groups[0]["draw_index"] == 1


def test_a_copy_needs_a_guidance_of_its_own():
    """Torch copies optimizers without their hooks, and a copied guidance would guide nothing."""
    model = torch.nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    guidance = dgg.Guidance(opt, alpha=1.0, strength=0.5, scaling=False)
    guidance.set_anchor()
    with torch.no_grad():
        model.weight.add_(1.0)
    for wrong in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"neither copied nor pickled.*load_state_dict\(\)"):
            wrong(guidance)
    twin, other = copy.deepcopy((model, opt))
    again = dgg.Guidance(other)
    again.load_state_dict(guidance.state_dict())
    for m, o in ((model, opt), (twin, other)):
        m.weight.grad = torch.ones_like(m.weight)
        before = m.weight.detach().clone()
        o.step()
        torch.testing.assert_close(m.weight.detach(), before - 0.1 * (1 + 0.5 * 1.0))


def test_groups_just_added_are_in_the_state_dict():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([p], lr=1.0)
    guidance = dgg.Guidance(opt)
    opt.add_param_group({"params": [q]})
    saved = guidance.state_dict()
    assert len(saved["param_groups"]) == 2
    guidance.load_state_dict(saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_that_has_gone_is_named(backend):
    """Its options cannot be told from those of the others; the weights stay as they are."""
    params = make_params(SHAPES, F32)
    opt = torch.optim.SGD([{"params": [p]} for p in params], lr=1.0)
    guidance = dgg.Guidance(opt, alpha=1.0, backend=backend)
    guidance.set_anchor()

    def step():
        set_grads(params, torch.Generator().manual_seed(0))
        opt.step()

    step()
    group, before = opt.param_groups.pop(), [p.detach().clone() for p in params]
    for call in (step, guidance.set_anchor, guidance.state_dict, guidance.importance_dict):
        with pytest.raises(RuntimeError, match=r"SGD has 1 groups left of the 2 .*new dgg\.Guidan"):
            call()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)
    opt.param_groups.append(group)
    step()
    assert guidance.guidance_stats()["guided"] == 2
    opt.param_groups.pop()
    guidance.remove()
    dgg.Guidance(opt).set_anchor()
    step()


# -- gradients that are taken up natively ---------------------------------------------------------


def _edited(natively, monkeypatch):
    """Returns the gradients of steps with all that gradients can be, and how many had a look."""
    looked = []
    check = _arguments.check_gradient
    params = make_params([(7, 5), (0,), (3, 4), (300,), ()], F32)
    optimizer = torch.optim.SGD(params, lr=0.1)
    guide = dgg.Guidance(optimizer, alpha=0.7, seed=3, max_grad_norm=1.0, backend="cpp")
    guide.set_anchor()
    if not natively:
        monkeypatch.setattr(RowCache, "take_native_gradients", lambda *_, **__: False)
    found, looks = [], []
    with monkeypatch.context() as patch:
        patch.setattr(
            _arguments, "check_gradient", lambda *args: (looked.append(args), check(*args))
        )
        for step in range(10):
            set_grads(
                params, torch.Generator().manual_seed(step), missing=(3,) if step == 3 else ()
            )
            if step in (4, 8):
                with guide.replay():
                    for p in params[:-1]:
                        p.grad = torch.full_like(p, 0.5)
            if step == 5:
                params[0].grad = torch.ones(5, 7).t()
            if step == 6:
                params[2].grad = torch.ones(3, 1).expand(3, 4)
            if step == 8:
                params[0].grad = None
            if step == 9:
                params[0].data = params[0].detach().clone()
            del looked[:]
            before = params[2].grad._version
            optimizer.step()
            assert params[2].grad._version > before or step == 6, "autograd is not told"
            looks.append(len(looked))
            found += [None if p.grad is None else p.grad.clone() for p in params]
    return found + [p.detach() for p in params], looks


@pytest.mark.skipif(native.load() is None, reason="gradients are taken up in Python here")
def test_gradients_are_taken_up_natively_and_edited_the_same(monkeypatch):
    native, looks = _edited(True, monkeypatch)
    plain, all_looks = _edited(False, monkeypatch)
    for x, y in zip(native, plain, strict=True):
        assert x is y is None or torch.equal(x, y)
    # Each is looked at only where something is new: at first, an expanded gradient, a replay
    # gradient alone, memory exchanged.
    assert [step for step, count in enumerate(looks) if count] == [0, 6, 8, 9]
    assert all(all_looks)


@pytest.mark.skipif(native.load() is None, reason="gradients are taken up in Python here")
def test_an_error_lets_go_of_the_gradients(monkeypatch):
    params = make_params([(7, 5)], F32)
    optimizer = torch.optim.SGD(params, lr=0.1)
    guide = dgg.Guidance(optimizer, alpha=1.0, backend="cpp")
    guide.set_anchor()
    set_grads(params, torch.Generator().manual_seed(0))
    optimizer.step()
    count = sys.getrefcount(params[0].grad)
    with monkeypatch.context() as patch:
        patch.setattr(backends.Rows, "guide_", lambda *_, **__: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):  # pytest would keep the frames
            optimizer.step()
    assert not guide._cache.all_rows[0]._taken_natively
    left = sys.getrefcount(params[0].grad)  # in an assertion pytest would hold one more
    assert left == count
    optimizer.step()
