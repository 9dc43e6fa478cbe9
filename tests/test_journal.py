# SPDX-License-Identifier: BSD-3-Clause
"""What guidance did over many steps: means, the summary, and that a step pays nothing for them."""

import math
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dgg
from dgg import backends
from dgg.step import journal, norms

MEANS = ("scale", "grad_norm", "distance", "clip", "alignment", "pull")


def usable(backend):
    reason = backends.unavailable(backend, torch.device("cpu"))
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((5, 3), (7,), (2, 2, 2))]


def gradients(params, *, scale=1.0):
    for p in params:
        p.grad = scale * torch.randn_like(p)


def replay(opt, params):
    with opt.replay():
        sum((p * torch.randn_like(p)).sum() for p in params).backward()
    # The new task's gradients go against it at times.
    return [-1.5 * r for r in opt._replay.of(params)]


def stepped(opt, optimizer, params, steps, *, replays=False):
    """Makes steps and returns the statistics of each as numbers."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        against = replay(opt, params) if replays else [torch.zeros_like(p) for p in params]
        gradients(params)
        for p, x in zip(params, against, strict=True):
            p.grad += x
        optimizer.step()
        stats = opt.guidance_stats()
        seen.append({k: None if v is None else v.double().mean().item() for k, v in stats.items()})
    return seen


def expected(seen, *, ratio=None):
    """The means of `guidance_log` from the statistics of single steps."""
    found = {"injected": sum(s["injected"] for s in seen) / len(seen)}
    for name in MEANS:
        known = [s[name] for s in seen if s[name] is not None]
        if name == "scale":
            known = [s["scale"] for s in seen if s["injected"]]
        if name == "pull" and ratio:
            known = [ratio(s) for s in seen if s["distance"] is not None and s["injected"]]
        if known:
            found[name] = sum(known) / len(known)
    return {f"guidance/{name}": value for name, value in found.items()}


def compare(log, wanted, *, task, anchored):
    assert log.pop("guidance/task") == task and log.pop("guidance/anchored") == anchored
    assert log.keys() == wanted.keys()
    for name, value in wanted.items():
        assert log[name] == pytest.approx(value, rel=1e-5), name


CASES = {
    "drawn, clipped": {"alpha": 0.4, "max_grad_norm": 1.0},
    "drawn a tensor": {"alpha": 0.4, "granularity": "tensor"},
    "drawn an element": {"alpha": 0.4, "granularity": "element"},
    "always": {"alpha": 1.0, "strength": 0.3},
    "no scaling": {"alpha": 0.5, "scaling": False},
    "auto": {"alpha": "auto", "max_grad_norm": 1.0},
}


def ratio_of(s):
    return s["scale"] * s["distance"] / (s["grad_norm"] * (1 if s["clip"] is None else s["clip"]))


@pytest.mark.parametrize("backend", [usable(b) for b in ("reference", "cpp", "triton")])
@pytest.mark.parametrize("case", CASES)
def test_means_are_those_of_single_steps(backend, case):
    params, options = parameters(), CASES[case]
    opt = dgg.AdamW(params, lr=0.05, backend=backend, **options)
    auto = options["alpha"] == "auto"
    before = stepped(opt, opt, params, 3, replays=auto)
    wanted = expected(before)
    compare(opt.guidance_log(), wanted, task=0, anchored=0)
    opt.set_anchor()
    steps = 20 if backend == "triton" else 150  # more than wait; Triton's interpreter is slow
    seen = stepped(opt, opt, params, steps, replays=auto)
    assert opt._journal._count < opt._journal._limit <= 1024
    ratio = ratio_of if options.get("granularity", "step") == "step" and not auto else None
    wanted = expected(seen, ratio=ratio)
    assert 0 < wanted["guidance/injected"]
    assert ("guidance/pull" in wanted) == (case in ("drawn, clipped", "always", "auto"))
    compare(opt.guidance_log(), wanted, task=1, anchored=3)
    # Nothing was done since, and one step later it is that step's.
    assert opt.guidance_log() == {"guidance/task": 1, "guidance/anchored": 3}
    (last,) = stepped(opt, opt, params, 1, replays=auto)
    compare(opt.guidance_log(), expected([last], ratio=ratio), task=1, anchored=3)
    # The summary is of all steps since the boundary, whoever has asked for a log in between.
    text = opt.summary()
    assert f"task 1: {steps + 1} steps since the anchor was set or loaded" in text
    share = sum(s["injected"] for s in [*seen, last]) / (steps + 1)
    assert f"{100 * share:.1f} % of the steps pulled" in text
    assert f"dgg.AdamW (backend {backend})" in text and "anchor of 3 tensors" in text
    opt.clear_anchor()
    assert "no anchor: nothing is guided" in opt.summary()
    assert "task 1: 0 steps without an anchor" in opt.summary()


def test_one_strength_a_tensor():
    params = parameters()
    opt = dgg.AdamW(params, lr=0.05, alpha=0.5, norm_scope="tensor", backend="reference")
    opt.set_anchor()
    seen = stepped(opt, opt, params, 70)
    wanted = expected(seen)
    assert "guidance/pull" not in wanted  # one ratio a tensor is no ratio of whole norms
    compare(opt.guidance_log(), wanted, task=1, anchored=3)


def test_any_optimizer():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.05)
    opt = dgg.Guidance(optimizer, alpha=0.5)
    opt.set_anchor()
    seen = stepped(opt, optimizer, params, 80)
    compare(opt.guidance_log(), expected(seen, ratio=ratio_of), task=1, anchored=3)
    assert "dgg.Guidance(SGD)" in opt.summary() and "80 steps" in opt.summary()


def test_a_step_that_evaluates_its_closure_often_is_one_step():
    """LBFGS looks several times a step; each look is guided, and the first of them counts."""
    params = parameters()
    optimizer = torch.optim.LBFGS(params, lr=0.1, max_iter=5)
    opt = dgg.Guidance(optimizer, alpha=0.5)
    opt.set_anchor()
    looks, step = [], 0

    def closure():
        if looks and looks[-1][0] == step and len(looks[-1]) == 1:
            stats = opt.guidance_stats()  # of the step's first look
            looks[-1] += (bool(stats["injected"]), float(stats["scale"]))
        optimizer.zero_grad()
        loss = sum((p.square() - 0.3 * p).cos().sum() for p in params)
        loss.backward()
        looks.append((step,))
        return loss

    for step in range(8):  # noqa: B007 - the closure reads it
        optimizer.step(closure)
    assert len(looks) > 16
    first = [look[1:] for n, look in enumerate(looks) if not n or look[0] != looks[n - 1][0]]
    assert "8 steps since the anchor" in opt.summary() and len(first) == 8
    share = sum(injected for injected, _ in first) / 8
    assert 0 < share < 1
    log = opt.guidance_log()
    assert log["guidance/injected"] == share
    scales = [scale for injected, scale in first if injected]
    assert log["guidance/scale"] == pytest.approx(sum(scales) / len(scales), rel=1e-5)


@pytest.mark.parametrize("backend", [usable(b) for b in ("reference", "cpp", "triton")])
def test_a_drawn_step_counts_also_where_its_pull_is_0(backend):
    """At the first step after a boundary θ is θ*; "auto" draws nothing and does not count it."""
    params = parameters()
    opt = dgg.AdamW(params, lr=0.05, alpha=1.0, backend=backend)
    opt.set_anchor()
    first, second = stepped(opt, opt, params, 2)
    assert (first["injected"], first["scale"], first["distance"]) == (1, 0, 0)
    assert second["injected"] == 1 and second["scale"] > 0 and second["distance"] > 0
    log = opt.guidance_log()
    assert log["guidance/injected"] == 1 and log["guidance/scale"] == second["scale"] / 2
    assert "100.0 % of the steps pulled" in opt.summary()
    auto = dgg.AdamW(params, lr=0.05, alpha="auto", backend=backend)
    auto.set_anchor()
    (first,) = stepped(auto, auto, params, 1, replays=True)
    assert (first["injected"], first["scale"]) == (0, 0)
    assert "0.0 % of the steps pulled" in auto.summary()


def test_steps_that_a_scaler_skips_pull_nothing():
    params = parameters()
    opt = dgg.AdamW(params, lr=0.05, alpha=1.0, fused=True, max_grad_norm=1.0)
    opt.set_anchor()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for step in range(6):
        gradients(params, scale=4.0)
        if step % 3 == 2:
            params[0].grad[0] = math.inf
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler.update()
        seen.append(opt.guidance_stats()["injected"].item())
    assert seen == [True, True, False] * 2
    log = opt.guidance_log()
    assert log["guidance/injected"] == pytest.approx(4 / 6)
    assert all(math.isfinite(value) for value in log.values())


def test_gradients_that_overflow_are_not_in_the_means():
    params = parameters()
    opt = dgg.AdamW(params, lr=0.0, alpha=1.0)
    opt.set_anchor()
    with torch.no_grad():
        params[1].add_(1.0)
    stepped(opt, opt, params, 2)
    gradients(params)
    params[0].grad[0, 0] = math.inf
    opt.step()
    log = opt.guidance_log()
    assert math.isfinite(log["guidance/grad_norm"]) and math.isfinite(log["guidance/pull"])


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [0.5, 1.0, "auto"])
def test_a_step_pays_nothing(alpha):
    """No operation of a step is the journal's; 64 steps together pay for a few."""
    params = parameters()
    opt = dgg.AdamW(params, lr=0.05, alpha=alpha, max_grad_norm=1.0)
    opt.set_anchor()

    def operations(steps):
        found = []
        for _ in range(steps):
            if alpha == "auto":
                replay(opt, params)
            gradients(params)
            with _Operations() as mode:
                opt.step()
            found.append(mode.count)
        return found

    operations(5)
    book = opt._journal
    without = operations(40)
    assert book._count == 45 and book._limit == 64
    assert set(operations(18)) <= set(without)
    (folded,) = set(operations(1)) - set(without)
    assert folded < 80 and book._limit == 1024 and not book._count
    # Of many parameters fewer records wait.
    many = [torch.nn.Parameter(torch.zeros(1)) for _ in range(1020)]
    other = dgg.SGD(many, lr=0.1, alpha=1.0, max_grad_norm=1.0)
    for _ in range(64):
        gradients(many)
        other.step()
    assert other._journal._limit == 64


def test_records_of_unlike_steps():
    """Sums of a made-up journal, in which the number of parameters changes."""
    book = journal.Journal()
    for step in range(200):
        hit = step % 4 == 0
        count = 2 if step < 100 else 3
        head = torch.zeros(4, dtype=torch.float64)
        head[1], head[2], head[0] = 2.0, 4.0, 1.0
        record = {
            "flags": torch.ones(count, dtype=torch.uint8) if hit else None,
            "coefficients": torch.cat([head, torch.tensor([0.5, 1.0, 0.75][:count]).double()]),
            "active": None, "device": torch.device("cpu"), "found_inf": None, "strength": 1.0,
            "per_tensor": True, "whole": False, "measured": hit, "alignment_and_pull": None,
            "clipped": False,
        }  # fmt: skip
        book.add(record)
        assert book._count < book._limit
    book.add(norms.record_skipped(torch.device("cpu")))
    steps, means = book.since_boundary()
    assert steps == 201 and means["injected"] == pytest.approx(50 / 201)
    assert means["scale"] == pytest.approx(0.75) and "clip" not in means
    reader = journal.Reader(book)
    assert reader.means() == {} and reader.totals() == {}


def test_copies_and_loads_begin_anew():
    params = parameters()
    opt = dgg.AdamW(params, lr=0.05, alpha=0.5)
    opt.set_anchor()
    stepped(opt, opt, params, 10)
    assert "0 steps since" in re.sub(r"\d+0 steps", "", pickle.loads(pickle.dumps(opt)).summary())
    assert "10 steps since the anchor was set or loaded" in opt.summary()
    opt.load_state_dict(opt.state_dict())
    assert "task 1: 0 steps since the anchor was set or loaded" in opt.summary()
    stepped(opt, opt, params, 3)
    assert "task 1: 3 steps since the anchor was set or loaded" in opt.summary()


def test_a_huge_gradient_hides_nothing_later():
    """Means are sums of their own steps, and no differences of longer sums."""
    params = parameters()
    opt = dgg.AdamW(params, lr=0.001, alpha=1.0)
    opt.set_anchor()
    for step in range(15):
        gradients(params, scale=1e18 if step == 7 else 1e-3)
        opt.step()
        if step % 5 == 4:
            log = opt.guidance_log()
            norm = opt.guidance_stats()["grad_norm"].item()
    assert log["guidance/grad_norm"] == pytest.approx(norm, rel=0.5)


@pytest.mark.parametrize("backend", [usable(b) for b in ("reference", "cpp", "triton")])
def test_groups_of_their_own(backend):
    """Drawn rows without a gradient pull nothing, and draws of one step stay what they were."""
    params = parameters()
    groups = [{"params": [p], "alpha": a} for p, a in zip(params, (0.1, 0.5, 0.9), strict=True)]
    opt = dgg.AdamW(groups, lr=0.05, backend=backend)
    opt.set_anchor()
    seen = []
    for step in range(12 if backend == "triton" else 40):
        params[0].grad = params[2].grad = None
        params[1].grad = torch.randn_like(params[1])
        if step == 0:
            gradients(params)
        opt.step()
        stats = opt.guidance_stats()
        seen.append({k: None if v is None else v.double().mean().item() for k, v in stats.items()})
    log = opt.guidance_log()
    share = sum(s["injected"] for s in seen) / len(seen)
    scales = [s["scale"] for s in seen if s["injected"]]
    assert 0 < share < 1 and log["guidance/injected"] == pytest.approx(share)
    assert log["guidance/scale"] == pytest.approx(sum(scales) / len(scales)) and max(scales) <= 1
