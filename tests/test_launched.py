# SPDX-License-Identifier: BSD-3-Clause
"""Optimizers whose step is launched, as on a GPU: the engine, with Triton's interpreter as device.

- Whole runs equal those of the CPU backend, for every rule, granularity and norm scope; weighted by
  importance or not, alpha a number or "auto", by every route.
- capturable=True decides on the device exactly what is decided on the host otherwise, with learning
  rate and alpha as tensors that change.
- Anchors that come window by window give the same bits as anchors that are there.
- GradScaler's verdict is read by the kernels, never by the host.
- Uploads happen when something changed and are never overwritten before they are read.
- A training needs few variants of kernels, the guide's warm-up has them all, and a cache that fails
  for a moment costs no step.
"""

from __future__ import annotations

import collections
import copy
import errno
import pathlib
import re
import types

import pytest
import torch

import dgg
from cases import BF16, F32, make_params, set_grads
from dgg import backends
from dgg.backends import launched as launched_rows
from dgg.backends import libraries, native, prefetch
from dgg.backends import uploads as uploads_of_rows
from dgg.backends.chunks import CHUNK, cut, cuts_of

CPU = torch.device("cpu")
MISSING = backends.unavailable("triton", CPU)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"no Triton here: {MISSING}"),
    pytest.mark.usefixtures("quick_interpreter"),
]

SHAPES = [(7, 5), (0,), (300,)]
RULES = {
    "adamw": (dgg.AdamW, {"lr": 3e-3, "weight_decay": 0.1}),
    "sgd": (dgg.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
}
GUIDANCE = {
    "step": {"alpha": 0.6, "strength": 0.7, "max_grad_norm": 3.0},
    "tensor": {"alpha": 0.6, "granularity": "tensor", "norm_scope": "tensor"},
    "element": {"alpha": 0.4, "granularity": "element", "max_grad_norm": 2.0},
    "unscaled": {"alpha": 0.7, "strength": 0.3, "scaling": False},
}


# What pulls along u of equation (3), by other routes, or as strongly as replay gradients ask for.
CHOSEN = {
    "auto": {"alpha": "auto", "max_grad_norm": 3.0},
    "auto-tensor": {"alpha": "auto", "norm_scope": "tensor", "importance": 0.7, "strength": 0.9},
    "auto-decoupled": {"alpha": "auto", "importance": 1.0, "route": "decoupled"},
    "weighted": {"alpha": 0.5, "importance": 0.7, "max_grad_norm": 3.0},
    "weighted-elements": {
        "alpha": 0.5, "importance": 0.7, "granularity": "element", "route": "first_moment",
    },
}  # fmt: skip


def capturing_now(patch):
    for module in (uploads_of_rows, launched_rows, libraries, backends):
        patch.setattr(module, "capturing", lambda device: True)


def conflict(p, anchor, sign=1.0):
    """Returns a replay gradient against ``p.grad`` that points away from the anchor."""
    g = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    away = sign * (p.detach() - anchor.to(p.dtype))
    length, wanted = away.double().norm().item(), max(g.double().norm().item(), 1.0)
    return -2 * g + away * (wanted / length if length else 0.0)


class Run:
    """An optimizer and its parameters, fed with reproducible gradients."""

    def __init__(self, rule, backend, dtype=F32, shapes=SHAPES, **options):
        cls, defaults = RULES[rule]
        self.params = make_params(shapes, dtype)
        self.optimizer = cls(self.params, backend=backend, **{**defaults, **options})
        self.steps, self.pulls, self.replays = 0, [], {}

    def step(self, missing=(), replay=False):
        generator = torch.Generator().manual_seed(self.steps)
        set_grads(self.params, generator, missing=missing)
        if replay == "conflict":
            replay = [conflict(p, self.optimizer.state[p]["anchor"]) for p in self.params]
        if isinstance(replay, list):
            self.replays[self.steps] = replay
            with self.optimizer.replay():
                for p, r in zip(self.params, replay, strict=True):
                    p.grad = r.clone()
        elif replay:
            with self.optimizer.replay():
                for p in self.params[:-1]:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        self.optimizer.step()
        self.steps += 1

    def run_with_conflicts(self, steps=6, like=None):
        """Runs with an anchor from the second step on, and replay gradients from the third on.

        Args:
            steps: Number of steps.
            like: The run whose replay gradients are taken; else they are made for this one.
        """
        for k in range(steps):
            if k in (1, 4):
                self.optimizer.set_anchor()
            replay = None
            if k > 1:
                replay = "conflict" if like is None else like.replays[k]
            self.step(missing=(0,) if k == 3 else (), replay=replay)
            stats = self.optimizer.guidance_stats()
            self.pulls.append([stats[name] for name in ("scale", "alignment", "pull", "clip")])
        return self

    def run(self, steps=6, anchor_at=1):
        for k in range(steps):
            if k == anchor_at:
                self.optimizer.set_anchor()
            self.step(missing=(0,) if k == 3 else (), replay=k == 4)
        return self


def assert_equal(run, other):
    for p, q in zip(run.params, other.params, strict=True):
        assert torch.equal(p, q)
        mine, theirs = run.optimizer.state[p], other.optimizer.state[q]
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def assert_close(run, other):
    for p, q in zip(run.params, other.params, strict=True):
        torch.testing.assert_close(p, q)
        for name, value in run.optimizer.state[p].items():
            torch.testing.assert_close(value, other.optimizer.state[q][name])


@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize("rule", RULES)
def test_runs_equal_the_cpu_backend(rule, kind):
    options = {**GUIDANCE[kind], "seed": 11}
    launched = Run(rule, "triton", **options).run()
    plain = Run(rule, "reference", **options).run()
    assert launched.optimizer._cache.launched and not plain.optimizer._cache.launched
    # Gradients and versions are taken up natively where the library can.
    assert launched.optimizer._cache._native == (native.load() is not None)
    assert_close(launched, plain)
    stats, expected = launched.optimizer.guidance_stats(), plain.optimizer.guidance_stats()
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert stats[name] is None, name
        else:
            torch.testing.assert_close(stats[name], value)


@pytest.mark.parametrize("route", ["gradient", "first_moment", "decoupled"])
@pytest.mark.parametrize("alpha", ["auto", 0.5])
@pytest.mark.parametrize("importance", [0.0, 0.7])
def test_weighted_and_guarded_runs_equal_the_cpu_backend(importance, alpha, route):
    options = {
        "importance": importance, "alpha": alpha, "route": route, "max_grad_norm": 3.0, "seed": 3,
        "replay_weight": 0.2, "strength": 0.9,
        # Of a shorter way from the anchor the weights' last bits would be a larger part.
        "lr": 0.1,
    }  # fmt: skip
    launched = Run("adamw", "triton", **options).run_with_conflicts()
    plain = Run("adamw", "reference", **options).run_with_conflicts(like=launched)
    assert_close(launched, plain)
    assert_same_pulls(launched, plain)


@pytest.mark.parametrize("kind", ["auto", "auto-tensor", "auto-decoupled"])
def test_weighted_and_guarded_runs_of_sgd_equal_the_cpu_backend(kind):
    options = {**CHOSEN[kind], "replay_weight": 0.2, "importance": 0.0}
    launched = Run("sgd", "triton", **options).run_with_conflicts()
    plain = Run("sgd", "reference", **options).run_with_conflicts(like=launched)
    assert_close(launched, plain)
    assert_same_pulls(launched, plain)


def assert_same_pulls(run, other):
    """Asserts that every step pulled as strongly, and that some did."""
    for mine, theirs in zip(run.pulls, other.pulls, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert any(bool((scale > 0).any()) for scale, *_ in run.pulls), "nothing pulled"


@pytest.mark.parametrize("alpha", ["auto", 0.5])
@pytest.mark.parametrize("kind", ["gradient", "maximize"])
def test_weighted_guidance_of_other_optimizers(kind, alpha):
    runs, replays = [], {}
    for backend in ("triton", "reference"):
        params = make_params(SHAPES, F32)
        named = [(str(i), p) for i, p in enumerate(params)]
        inner = torch.optim.SGD(named, lr=0.1, maximize=kind == "maximize")
        guidance = dgg.Guidance(
            inner, alpha=alpha, max_grad_norm=2.0, seed=4, replay_weight=0.2, importance=0.7,
            backend=backend,
        )  # fmt: skip
        run = types.SimpleNamespace(params=params, optimizer=guidance, pulls=[])
        sign = -1.0 if kind == "maximize" else 1.0
        for k in range(5):
            generator = torch.Generator().manual_seed(k)
            set_grads(params, generator)
            if k == 1:
                importance = {name: torch.rand(p.shape, generator=generator) for name, p in named}
                guidance.set_anchor(importance=importance)
            if k > 1:
                if backend == "triton":
                    replays[k] = [conflict(p, guidance.state[p]["anchor"], sign) for p in params]
                with guidance.replay():
                    for p, r in zip(params, replays[k], strict=True):
                        p.grad = r.clone()
            inner.step()
            stats = guidance.guidance_stats()
            run.pulls.append([stats[name] for name in ("scale", "alignment", "pull", "clip")])
        runs.append(run)
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        torch.testing.assert_close(p, q)
    assert_same_pulls(*runs)


@pytest.mark.parametrize("kind", CHOSEN)
def test_captured_steps_pull_the_same(kind):
    options = {**CHOSEN[kind], "seed": 5, "replay_weight": 0.2}
    captured = Run("adamw", "triton", capturable=True, **options).run_with_conflicts()
    plain = Run("adamw", "triton", **options).run_with_conflicts(like=captured)
    assert_close(captured, plain)
    assert_same_pulls(captured, plain)


@pytest.mark.parametrize("kind", GUIDANCE)
def test_captured_steps_draw_the_same(kind):
    options = {**GUIDANCE[kind], "seed": 5}
    captured = Run("adamw", "triton", capturable=True, **options).run()
    plain = Run("adamw", "triton", **options).run()
    for p, q in zip(captured.params, plain.params, strict=True):
        torch.testing.assert_close(p, q)
    draw = captured.optimizer.param_groups[0]["draw_index"]
    assert isinstance(draw, torch.Tensor) and draw.dtype == torch.int64
    assert draw.item() == plain.optimizer.param_groups[0]["draw_index"] == 6


def test_captured_steps_read_tensors_and_survive_checkpoints(tmp_path):
    def build(capturable):
        run = Run("adamw", "triton", capturable=capturable, alpha=0.5, seed=3)
        if capturable:
            for group in run.optimizer.param_groups:
                group["lr"] = torch.tensor(3e-3)
        return run

    captured, plain = build(True), build(False)
    for k in range(4):
        for run in (captured, plain):
            if k == 1:
                run.optimizer.set_anchor()
            run.step()
        rate = 3e-3 / (k + 2)
        captured.optimizer.param_groups[0]["lr"].fill_(rate)
        plain.optimizer.param_groups[0]["lr"] = float(torch.tensor(rate))
    torch.save(captured.optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    # A captured run goes on as one that is not, and the reverse.
    other = Run("adamw", "triton", alpha=0.5, seed=3)
    other.steps = 4
    for p, q in zip(other.params, captured.params, strict=True):
        p.data.copy_(q.detach())
    other.optimizer.load_state_dict(saved)
    assert other.optimizer.param_groups[0]["draw_index"] == 4
    other.optimizer.param_groups[0]["lr"] = float(captured.optimizer.param_groups[0]["lr"])
    back = Run("adamw", "triton", capturable=True, alpha=0.5, seed=3)
    back.steps = 4
    for p, q in zip(back.params, plain.params, strict=True):
        p.data.copy_(q.detach())
    back.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    for _ in range(3):
        for run in (captured, plain, other, back):
            run.step()
    for run in (plain, other, back):
        for p, q in zip(captured.params, run.params, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"backend": "cpp"}, "capturable=True needs kernels that run on a GPU"),
        ({"backend": "reference"}, "capturable=True needs kernels that run on a GPU"),
        ({"backend": "triton", "anchor_device": "cpu"}, "does not go with anchor_device='cpu'"),
    ],
)
def test_capturable_is_refused_where_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        dgg.AdamW(make_params([(3,)], F32), capturable=True, **options)


def test_a_capture_that_would_replay_nonsense_is_refused(monkeypatch):
    plain = Run("adamw", "triton").run(2)
    captured = Run("adamw", "triton", capturable=True)
    capturing_now(monkeypatch)
    before = [p.detach().clone() for p in plain.params]
    with pytest.raises(RuntimeError, match="build the optimizer with capturable=True"):
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(plain.params, before, strict=True))
    with pytest.raises(RuntimeError, match="run a warm-up step before the capture"):
        captured.step()


@pytest.fixture
def away(monkeypatch):
    """Anchors count as kept elsewhere, and a window holds few of them."""
    monkeypatch.setattr(launched_rows, "is_away", lambda anchor, param: anchor is not None)
    monkeypatch.setattr(prefetch, "WINDOW", 1024)


MANY = [(200,), (13, 15), (0,), (190,), ()]


@pytest.mark.parametrize("kind", ["step", "tensor", "unscaled"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_anchors_that_come_in_windows(dtype, kind, away, monkeypatch):
    options = {**GUIDANCE[kind], "alpha": 0.7, "anchor_dtype": F32, "shapes": MANY, "seed": 2}
    windowed = Run("adamw", "triton", dtype, **options).run()
    windows = windowed.optimizer._cache.all_rows[0].windows
    assert windows.count >= 3, "nothing would ever leave its buffer"
    assert sum(x.numel() for x in windows._buffers) <= 2 * 1024 + 256, (
        "more than the window is on the device"
    )
    monkeypatch.undo()
    there = Run("adamw", "triton", dtype, **options).run()
    assert there.optimizer._cache.all_rows[0].windows is None
    assert_equal(windowed, there)


@pytest.mark.parametrize("kind", CHOSEN)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_importances_come_in_the_windows_of_their_anchors(dtype, kind, away, monkeypatch):
    options = {
        **CHOSEN[kind], "shapes": [x for x in MANY if x], "seed": 2, "replay_weight": 0.2,
        "anchor_dtype": F32, "importance_dtype": BF16, "granularity": "step",
    }  # fmt: skip
    windowed = Run("adamw", "triton", dtype, **options).run_with_conflicts()
    windows = windowed.optimizer._cache.all_rows[0].windows
    assert windows.count >= 2 and sum(x.numel() for x in windows._buffers) <= 2 * (1024 + 512)
    weighted = bool(options.get("importance"))
    for place, p in enumerate(windowed.params):
        assert bool(windows.importance_addresses[place]) == (weighted and p.numel() > 0)
    monkeypatch.undo()
    there = Run("adamw", "triton", dtype, **options).run_with_conflicts(like=windowed)
    assert there.optimizer._cache.all_rows[0].windows is None
    assert_equal(windowed, there)
    assert_same_pulls(windowed, there)


def test_windows_notice_changed_importances(away):
    options = {"alpha": 1.0, "importance": 0.7, "shapes": MANY, "seed": 9}
    runs = [Run("adamw", backend, **options) for backend in ("triton", "reference")]
    for run in runs:
        for k in range(5):
            if k == 1:
                run.optimizer.set_anchor()
            if k == 3:
                run.optimizer.state[run.params[1]]["importance"].mul_(3.0)
            run.step()
    assert_close(*runs)


def test_windows_fetch_only_for_steps_that_inject(away, monkeypatch):
    fetched = []
    original = prefetch.AnchorWindows.fetch
    monkeypatch.setattr(
        prefetch.AnchorWindows, "fetch", lambda self, n: (fetched.append(n), original(self, n))
    )
    run = Run("adamw", "triton", alpha=0.5, shapes=MANY, seed=9)
    run.optimizer.set_anchor()
    counts, injected = [], []
    for _ in range(8):
        before = len(fetched)
        run.step()
        counts.append(len(fetched) - before)
        injected.append(bool(run.optimizer.guidance_stats()["injected"]))
    windows = run.optimizer._cache.all_rows[0].windows.count
    # Once for the pull, once at the end of the step before, for the distances.
    for k in range(1, 7):
        assert counts[k] == windows * (injected[k] + injected[k + 1])
    assert 1 < sum(injected) < 7


def test_windows_notice_changed_weights_and_anchors(away):
    run = Run("adamw", "triton", alpha=1.0, shapes=MANY, seed=9)
    twin = Run("adamw", "reference", alpha=1.0, shapes=MANY, seed=9)
    for k in range(6):
        for each in (run, twin):
            if k == 1:
                each.optimizer.set_anchor()
            if k == 3:
                with torch.no_grad():
                    each.params[1].mul_(1.5)
            if k == 4:
                each.optimizer.state[each.params[2]]["anchor"].add_(0.25)
            each.step()
    assert_close(run, twin)


@pytest.mark.parametrize("rule", RULES)
def test_grad_scaler_is_read_on_the_device(rule):
    launched = Run(rule, "triton", alpha=0.6, max_grad_norm=2.0)
    plain = Run(rule, "reference", alpha=0.6, max_grad_norm=2.0)
    for k in range(6):
        for run in (launched, plain):
            set_grads(run.params, torch.Generator().manual_seed(k))
            for p in run.params:
                p.grad.mul_(64.0)
            if k == 3:
                run.params[0].grad.view(-1)[4] = float("inf")
            if k == 1:
                run.optimizer.set_anchor()
            run.optimizer.grad_scale = torch.tensor(64.0)
            run.optimizer.found_inf = torch.tensor(float(k == 3))
            before = [p.detach().clone() for p in run.params]
            state = copy.deepcopy(dict(enumerate(run.optimizer.state.values())))
            run.optimizer.step()
            assert run.optimizer.last_step_skipped == (k == 3)
            if k == 3:
                assert all(torch.equal(p, q) for p, q in zip(run.params, before, strict=True))
                for number, entry in enumerate(run.optimizer.state.values()):
                    for name, value in entry.items():
                        assert torch.equal(value, state[number][name]), name
                assert not run.optimizer.guidance_stats()["injected"]
    assert_close(launched, plain)


def test_infinite_replay_gradients_skip_the_step():
    run = Run("adamw", "triton").run(2)
    set_grads(run.params, torch.Generator().manual_seed(1))
    with run.optimizer.replay():
        for p in run.params:
            p.grad = torch.full_like(p, float("nan"))
    run.optimizer.grad_scale = torch.tensor(2.0)
    run.optimizer.found_inf = torch.tensor(0.0)
    before = [p.detach().clone() for p in run.params]
    run.optimizer.step()
    assert run.optimizer.last_step_skipped
    assert all(torch.equal(p, q) for p, q in zip(run.params, before, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_guidance_of_other_optimizers(backend):
    params = make_params(SHAPES, F32)
    inner = torch.optim.SGD(params, lr=0.1)
    guidance = dgg.Guidance(inner, alpha=0.6, max_grad_norm=2.0, seed=4, backend=backend)
    twins = make_params(SHAPES, F32)
    twin = dgg.SGD(twins, lr=0.1, alpha=0.6, max_grad_norm=2.0, seed=4, backend="reference")
    for k in range(5):
        for every, each, anchored in ((params, inner, guidance), (twins, twin, twin)):
            set_grads(every, torch.Generator().manual_seed(k))
            if k == 1:
                anchored.set_anchor()
            each.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def test_master_weights_and_stochastic_rounding():
    shapes = [(7, 5), (0,), (301,)]
    for options in ({"master_weights": True}, {"stochastic_rounding": True}):
        runs = [
            Run("adamw", backend, BF16, shapes, state_dtype=F32, anchor_dtype=F32, alpha=0.5,
                seed=8, **options).run(4)
            for backend in ("triton", "reference")
        ]  # fmt: skip
        for p, q in zip(runs[0].params, runs[1].params, strict=True):
            # A float32 rounding apart before the last rounding, which may then fall on either side.
            differing = (p != q).sum().item()
            assert differing <= 0.01 * p.numel()
            torch.testing.assert_close(p, q)


def test_uploads_happen_when_something_changed():
    uploads = uploads_of_rows.Uploads(CPU)
    first = uploads.send("grads", torch.tensor([1, 2, 3]))
    assert uploads.send("grads", torch.tensor([1, 2, 3])) is first
    staged = uploads._sent["grads"][0]
    assert uploads.send("grads", torch.tensor([4, 5, 6])) is first
    assert first.tolist() == [4, 5, 6] and staged.tolist() == [1, 2, 3]
    longer = uploads.send("grads", torch.tensor([1, 2, 3, 4]))
    assert longer is not first and first.tolist() == [4, 5, 6]


def test_cut_separates_dtypes_and_covers_every_element():
    numels, codes = [10, 0, 8192, 8193, 30000], [0, 0, 1, 0, 1]
    launches = cut(numels, codes, CPU)
    covered = [0] * len(numels)
    for launch in launches:
        assert {codes[row] for row in launch.rows.tolist()} == {launch.dtypes}
        for position, number in launch.chunks.tolist():
            row = int(launch.rows[position])
            begin = number * CHUNK
            assert begin < max(numels[row], 1), "an empty row has a chunk"
            covered[row] += min(CHUNK, numels[row] - begin)
        counts = launch.starts.diff().tolist()
        assert counts == [-(-max(numels[row], 1) // CHUNK) for row in launch.rows.tolist()]
        assert len(launch.counters) == len(launch.rows) + 1
        assert int(launch.starts[-1]) == len(launch.chunks)
    assert covered == numels
    assert sorted(row for launch in launches for row in launch.rows.tolist()) == list(range(5))


@pytest.mark.parametrize("rank,chunks", [(16, 4928), (64, 19520), (128, 39040)])
def test_a_lora_list_is_one_launch(rank, chunks):
    """LLaVA-7B with LoRA on every linear layer: norms and update take one each, however long."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    numels = 32 * [rank * width for shape in shapes for width in shape]
    (launch,) = cut(numels, [0] * len(numels), CPU)
    assert len(numels) == len(launch.rows) == 448 and len(launch.chunks) == chunks


@pytest.fixture
def launched(monkeypatch):
    """Names of what the engine launches, in order."""
    from dgg import kernels

    names = []

    def noted(name):
        function = getattr(kernels, name)
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    functions = types.SimpleNamespace(
        **{name: noted(name) for name in kernels.__all__ if "launch" in name}
    )
    monkeypatch.setattr(libraries, "launchers", lambda backend: functions)
    return names


@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize("capturable", [False, True])
def test_launches_of_a_step(kind, capturable, launched):
    """Norms, which make the coefficients, and update; ranks sum between, and need one more."""
    options = {**GUIDANCE[kind], "alpha": 1.0, "capturable": capturable}
    run = Run("adamw", "triton", **options)
    run.run(3)
    run.step()
    drawn = ["draw_flags_launch"] * capturable
    measuring = options.get("scaling", True) or "max_grad_norm" in options
    del launched[:]
    run.step()
    assert launched == drawn + ["norms_launch"] * measuring + ["adam_launch_"]
    (rows,) = run.optimizer._cache.all_rows
    rows.reduction = Alone()
    del launched[:]
    run.step()
    summed = ["norms_launch", "coefficients_launch"] * measuring
    assert launched == [*drawn, *summed, "adam_launch_"]


@pytest.mark.parametrize("capturable", [False, True])
def test_launches_of_a_guarded_step(capturable, launched):
    """Products, which make the strength, and update; without replay gradients only what clips."""
    options = {"alpha": "auto", "max_grad_norm": 1.0, "replay_weight": 0.2, "importance": 0.5}
    run = Run("adamw", "triton", capturable=capturable, **options).run_with_conflicts(3)
    drawn = ["draw_flags_launch"] * capturable
    del launched[:]
    run.step(replay="conflict")
    assert launched == [*drawn, "products_launch", "adam_launch_"]
    del launched[:]
    run.step()
    assert launched == ["norms_launch", "adam_launch_"]
    (rows,) = run.optimizer._cache.all_rows
    rows.reduction = Alone()
    del launched[:]
    run.step(replay="conflict")
    summed = ["products_launch", "guard_coefficients_launch"]
    assert launched == [*drawn, *summed, "adam_launch_"]


@pytest.mark.parametrize("alpha", ["auto", 1.0])
def test_the_last_launch_of_several_dtypes_makes_the_strength(alpha, launched):
    runs = []
    for backend in ("triton", "reference"):
        run = Run("adamw", backend, alpha=alpha, replay_weight=0.2, importance=0.7, lr=0.01)
        run.params += make_params([(9,), (40,)], BF16)
        run.optimizer.add_param_group({"params": run.params[-2:]})
        run.run_with_conflicts(4, like=runs[0] if runs else None)
        if backend == "triton":
            measured = ["products_launch" if alpha == "auto" else "norms_launch"] * 2
            assert launched[-4:] == measured + ["adam_launch_"] * 2
        runs.append(run)
    for p, q in zip(*(run.params for run in runs), strict=True):
        torch.testing.assert_close(p, q)
    assert_same_pulls(*runs)


def test_the_last_launch_of_several_dtypes_makes_the_coefficients(launched):
    options = {"alpha": 1.0, "max_grad_norm": 1.0, "lr": 0.1}
    runs = []
    for backend in ("triton", "reference"):
        params = [*make_params(SHAPES, F32), *make_params([(9,), (40,)], BF16)]
        optimizer = dgg.AdamW(params, backend=backend, **options)
        for step in range(4):
            if step == 1:
                optimizer.set_anchor()
            set_grads(params, torch.Generator().manual_seed(step))
            del launched[:]
            optimizer.step()
        runs.append(params)
        if backend == "triton":
            assert launched == ["norms_launch"] * 2 + ["adam_launch_"] * 2
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)


def test_cuts_that_are_kept_are_few():
    """Gradients may change their dtype at every step."""
    cuts = cuts_of([5, 5], CPU)
    for turn in range(20):
        launches = cuts((turn % 7,) * 2)
        assert [launch.dtypes for launch in launches] == [turn % 7]
        assert cuts((turn % 7,) * 2) is launches
        assert cuts.cache_info().currsize <= 4


def test_uploads_inside_a_capture(monkeypatch):
    uploads = uploads_of_rows.Uploads(CPU, capturable=True)
    sent = uploads.send("grads", torch.tensor([1, 2]))
    with monkeypatch.context() as capture:
        capturing_now(capture)
        target = uploads.send("grads", torch.tensor([1, 2]))
        # Sent before, and recorded all the same: memory of the graph's own.
        assert target is not sent and target.tolist() == [1, 2]
        target.fill_(0)
        assert uploads.send("grads", torch.tensor([1, 2])) is target and target.tolist() == [1, 2]
        (kept, _) = uploads._captured["grads"]
        with pytest.raises(RuntimeError, match="its grads changed during a capture"):
            uploads.send("grads", torch.tensor([5, 6]))
    assert uploads.send("grads", torch.tensor([3, 4])) is sent and sent.tolist() == [3, 4]
    assert uploads.send("grads", torch.tensor([3, 4])) is sent
    assert target.tolist() == kept.tolist() == [1, 2], "a replay would read something else"
    # The next capture may bring others; what the first reads stays.
    with monkeypatch.context() as capture:
        capturing_now(capture)
        other = uploads.send("grads", torch.tensor([7, 8]))
    assert other is not target and other is not sent
    assert kept.tolist() == [1, 2] and any(x is kept for x, _ in uploads._kept)


@pytest.fixture(scope="module")
def operators():
    """The native launches' operators, with the Triton kernels behind them on the CPU."""
    missing = backends.unavailable("cpp", CPU)
    if missing is not None:
        pytest.skip(f"the operators are declared by the C++ library: {missing}")
    from dgg import kernels

    library = torch.library.Library("dgg", "IMPL")
    for name in kernels.__all__:
        if "launch" in name:
            library.impl(name, getattr(kernels, name), "CPU")
    yield torch.ops.dgg
    library._destroy()


@pytest.mark.parametrize("rule", RULES)
def test_the_engine_calls_native_launches_as_they_are_declared(rule, operators, monkeypatch):
    monkeypatch.setattr(libraries, "launchers", lambda backend: operators)
    options = {"alpha": 0.6, "granularity": "element", "max_grad_norm": 1.0, "seed": 2**64 - 3}
    native = Run(rule, "triton", **options).run(5)
    captured = Run(rule, "triton", capturable=True, **options).run(5)
    monkeypatch.undo()
    plain = Run(rule, "triton", **options).run(5)
    assert_equal(native, plain)
    assert_close(captured, plain)


# Compilation


class Alone:
    """Sums over ranks, of which there is one."""

    def sum_(self, squares, *, per_tensor):
        pass


@pytest.fixture
def variants(monkeypatch):
    """Collects what Triton would compile: kernel, and whatever it makes a new variant for."""
    tl = pytest.importorskip("triton.language")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run, found = interpreter.InterpretedFunction.run, set()

    def kind(value):
        # Sizes and numbers are not looked at (NUMBERS and TABLES of kernels/launcher.py).
        return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__

    def collect(self, *arguments, **options):
        of = self.fn.__annotations__
        key = [
            str(value) if of.get(name) is tl.constexpr else kind(value)
            for name, value in zip(self.arg_names, arguments, strict=True)
        ]
        found.add((self.fn.__name__, *key, options["num_warps"]))
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", collect)
    return found


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize(
    "rule,kind,most",
    [
        ("adamw", "step", 3),
        ("adamw", "element", 2),
        pytest.param("sgd", "step", 3, marks=pytest.mark.slow),
    ],
)
def test_a_training_needs_few_variants_and_the_guide_compiles_them_before(
    rule, kind, most, variants, monkeypatch
):
    cls, options = RULES[rule]
    options = {**options, **GUIDANCE[kind], "backend": "triton", "seed": 7}
    page = pathlib.Path(__file__).parents[1] / "docs" / "sharding.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    names = {}
    exec(code, names)
    params = make_params([(7, 5), (40,)], F32)
    before = [p.detach().clone() for p in params]
    names["warm_up"](params, cls, **options)
    assert all(map(torch.equal, params, before))
    warmed = set(variants)
    variants.clear()

    optimizer = cls(params, **options)
    for step in range(15):
        if step and step % 7 == 0:
            optimizer.set_anchor()
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)  # a schedule
        set_grads(params, torch.Generator().manual_seed(step))
        optimizer.step()
    assert variants <= warmed
    # Whether a step clips, injects or does both: one kernel of norms, which makes the coefficients.
    counts = collections.Counter(name for name, *_ in variants)
    assert counts.pop("norms_kernel") == 1
    assert [*counts.values()] == [most]
    # Ranks sum between the two.
    variants.clear()
    shards = cls(make_params([(7, 5), (40,)], F32), **options)
    for step in range(4):
        for group in shards.param_groups:
            set_grads(group["params"], torch.Generator().manual_seed(step))
        if shards._cache is not None:
            monkeypatch.setattr(shards._cache.all_rows[0], "reduction", Alone())
        if step == 1:
            shards.set_anchor()
        shards.step()
    assert "coefficients_kernel" in {name for name, *_ in variants} and variants <= warmed


@pytest.mark.parametrize("failures", [2, 4])
@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale"), ImportError("cannot stat")])
def test_a_cache_that_fails_for_a_moment_is_tried_again(error, failures, monkeypatch):
    launcher = pytest.importorskip("dgg.kernels.launcher")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run, left = interpreter.InterpretedFunction.run, [failures]

    def flaky(self, *arguments, **options):
        if self.fn.__name__ == "adam_kernel" and left[0]:
            left[0] -= 1
            raise error
        return run(self, *arguments, **options)

    expected = Run("adamw", "triton").run(1, anchor_at=None)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", flaky)
    monkeypatch.setattr(launcher, "PAUSES", (0.0, 0.0, 0.0))
    run_again = Run("adamw", "triton")
    before = [p.detach().clone() for p in run_again.params]
    if failures > 3:
        with (
            pytest.warns(UserWarning, match="Trying again"),
            pytest.raises(RuntimeError, match="adam_kernel.*TRITON_CACHE_DIR.*docs/sharding.md"),
        ):
            run_again.step()
        assert all(map(torch.equal, run_again.params, before))
    else:
        with pytest.warns(UserWarning, match="Trying again") as heard:
            run_again.step()
        assert len(heard) == failures
        assert_equal(run_again, expected)
    assert not left[0]
