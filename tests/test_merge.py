# SPDX-License-Identifier: BSD-3-Clause
"""merge_anchor: each rule has the property that defines it."""

from __future__ import annotations

import pytest
import torch

import dgg
from cases import BACKENDS, BF16, F16, F32, F64

C64 = torch.complex64

SHAPES = [(4, 6), (6,), (3, 2, 2), (1,)]


def make(dtype=F64, **options):
    generator = torch.Generator().manual_seed(0)
    named = [
        (f"p{i}", torch.nn.Parameter(torch.randn(s, generator=generator, dtype=F64).to(dtype)))
        for i, s in enumerate(SHAPES)
    ]
    return named, dgg.AdamW(named, lr=0.05, **options)


def train(named, opt, seed, steps=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
        opt.step()


def weights(named):
    return [p.detach().clone() for _, p in named]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_is_the_running_mean_of_the_tasks(backend):
    named, opt = make(alpha=0.0, backend=backend)
    ends = []
    for task in range(4):
        train(named, opt, task)
        ends.append(weights(named))
        if task:
            assert opt.merge_anchor() == pytest.approx(1 / (task + 1))
        opt.set_anchor()
    for (_, p), *tasks in zip(named, *ends, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(tasks).mean(dim=0), rtol=0, atol=1e-12)


def test_fisher_is_the_least_sum_of_the_tasks_quadratics():
    named, opt = make(importance=1.0, alpha=0.0)
    fishers, ends = [], []
    for task in range(3):
        train(named, opt, task, steps=4)
        # Adam's second moment as it stands: what importance_dict() adds to the sum so far.
        mean = opt.param_groups[0]["importance_mean"]
        present = opt.importance_dict()
        held = [opt.state[p].get("importance") for _, p in named]
        fishers.append([
            present[name] - (0.0 if f is None else f * mean)
            for (name, _), f in zip(named, held, strict=True)
        ])  # fmt: skip
        ends.append(weights(named))
        if not task:
            opt.set_anchor()
            continue
        base = [opt.state[p]["anchor"].clone() for _, p in named]

        def loss(a, base=base, end=ends[-1], last=fishers[-1], former=fishers[:-1]):
            """Of the point a of the way; the former tasks have their least loss in the anchor."""
            total = 0.0
            for place, (theta, star) in enumerate(zip(end, base, strict=True)):
                point = star + a * (theta - star)
                total += (last[place] * (point - theta).square()).sum()
                for fisher in former:
                    total += (fisher[place] * (point - star).square()).sum()
            return float(total)

        share = opt.merge_anchor("fisher")
        assert 0 < share < 1
        assert loss(share) < min(loss(share - 1e-3), loss(share + 1e-3))
        for (_, p), theta, star in zip(named, ends[-1], base, strict=True):
            torch.testing.assert_close(p.detach(), star + share * (theta - star))
        opt.set_anchor()


def test_equal_fishers_give_the_running_mean():
    named, opt = make(importance=1.0, alpha=0.0)
    train(named, opt, 1)
    ones = {name: torch.ones_like(p) for name, p in named}
    opt.set_anchor(importance={name: 2 * x for name, x in ones.items()})  # two tasks before
    for _, p in named:
        with torch.no_grad():
            p.add_(1.0)
        entry = opt.state[p]
        beta2 = opt.param_groups[0]["betas"][1]
        entry["exp_avg_sq"].fill_(1 - beta2 ** float(entry["step"]))  # v̂ = 1
    opt.param_groups[0]["draw_index"] += 1  # as the step of this task that is made by hand
    assert opt.merge_anchor("fisher") == pytest.approx(1 / 3)


@pytest.mark.parametrize("keep", [0.5, 0.25, 1.0])
def test_rows_that_moved_farthest_stay(keep):
    named, opt = make(alpha=0.0)
    train(named, opt, 1)
    opt.set_anchor()
    train(named, opt, 2)
    ends = weights(named)
    assert opt.merge_anchor("rows", keep=keep) == keep
    for (_, p), theta in zip(named, ends, strict=True):
        star = opt.state[p]["anchor"]
        if p.dim() < 2:
            assert torch.equal(p, theta)
            continue
        count = max(1, round(keep * len(p)))
        lengths = (theta - star).flatten(1).norm(dim=1)
        stay = torch.zeros(len(p), dtype=torch.bool)
        stay[lengths.topk(count).indices] = True
        assert torch.equal(p.detach()[stay], theta[stay])
        assert torch.equal(p.detach()[~stay], star[~stay])


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rule", ["mean", "fisher"])
def test_16_bit_weights_are_rounded_once(rule, dtype):
    named, opt = make(dtype, importance=0.5, anchor_dtype=F32, state_dtype=F32, alpha=0.0)
    train(named, opt, 1)
    opt.set_anchor()
    train(named, opt, 2)
    for _, p in named:
        opt.state[p]["anchor"].mul_(1.003)  # not one of 16 bits
    ends = weights(named)
    share = opt.merge_anchor(rule)
    for (_, p), theta in zip(named, ends, strict=True):
        star = opt.state[p]["anchor"].double()
        assert torch.equal(p, (star + share * (theta.double() - star)).to(dtype))


@pytest.mark.parametrize("dtype", [BF16, F32, C64])
@pytest.mark.parametrize("far", [0, 1])
def test_the_farthest_row_is_found_in_full_precision(far, dtype):
    """Also where 16 bits round the difference away, or the squares overflow float32."""
    rows = {0: (1.0, 1.6), 1: (256.0, 257.0)} if dtype == BF16 else {0: (1e25, 1.0), 1: (2e25, 1.0)}
    order = [0, 1] if far else [1, 0]
    p = torch.nn.Parameter(torch.tensor([[rows[k][0]] * 3 for k in order], dtype=dtype))
    expected = p.detach().clone()
    opt = dgg.AdamW([p], anchor_dtype=F32)
    opt.set_anchor()
    opt.state[p]["anchor"].copy_(torch.tensor([[rows[k][1]] * 3 for k in order]))
    expected[1 - far] = opt.state[p]["anchor"][1 - far].to(dtype)
    opt.merge_anchor("rows", keep=0.5)
    assert torch.equal(p, expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_a_matrix_without_elements_has_no_rows_to_keep(shape):
    empty, full = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.ones(2, 2))
    opt = dgg.AdamW([("full", full), ("empty", empty)])
    opt.set_anchor()
    with torch.no_grad():
        full.copy_(torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
    assert opt.merge_anchor("rows") == 0.5
    assert full.tolist() == [[1.0, 1.0], [1.0, 4.0]]


@pytest.mark.parametrize("rule", ["mean", "rows", "fisher"])
def test_master_weights_are_merged_too(rule):
    named, opt = make(BF16, master_weights=True, importance=0.5, alpha=0.0)
    train(named, opt, 1)
    opt.set_anchor()
    train(named, opt, 2)
    ends = {name: opt.state[p]["master"].clone() for name, p in named}
    share = opt.merge_anchor(rule)
    for name, p in named:
        master, star = opt.state[p]["master"], opt.state[p]["anchor"]
        assert master.dtype == F32 and torch.equal(p, master.to(BF16))
        if rule != "rows":
            torch.testing.assert_close(master, star + share * (ends[name] - star))
    train(named, opt, 3, steps=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_step_measures_the_distance_anew(backend):
    named, opt = make(alpha=1.0, backend=backend)
    train(named, opt, 1)
    opt.set_anchor()
    train(named, opt, 2)
    opt.merge_anchor("mean")
    expected = sum(
        (p.detach() - opt.state[p]["anchor"]).square().sum() for _, p in named
    ).sqrt()  # fmt: skip
    train(named, opt, 3, steps=1)
    assert opt.guidance_stats()["distance"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_cannot_be_merged_is_refused_and_left_as_it_was():
    named, opt = make()
    train(named, opt, 1)
    before = weights(named)
    with pytest.raises(RuntimeError, match="no anchor to merge with"):
        opt.merge_anchor()
    opt.set_anchor()
    train(named, opt, 2)
    before = weights(named)
    for rule, options, error, message in (
        ("median", {}, ValueError, "merge_anchor\\(rule='median'\\) is not one of"),
        ("rows", {"keep": 0.0}, ValueError, "keep=0.0 must lie in"),
        ("rows", {"keep": "half"}, ValueError, "keep='half' must lie in"),
        ("fisher", {}, RuntimeError, "with importance > 0"),
    ):
        with pytest.raises(error, match=message):
            opt.merge_anchor(rule, **options)
        assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))


def anchored():
    named, opt = make(importance=0.5, alpha=0.0)
    for task in range(2):
        train(named, opt, task)
        opt.set_anchor()
    train(named, opt, 2)
    return named, opt


def test_a_merge_that_fails_has_changed_nothing():
    """A head has grown since the anchor was set."""
    named, opt = anchored()
    named[2][1].data = torch.ones(4, 2, 2, dtype=F64)
    before = weights(named)
    with pytest.raises(ValueError, match=r"'p2' has another shape than its anchor"):
        opt.merge_anchor("mean")
    assert all(map(torch.equal, weights(named), before))


@pytest.mark.parametrize("rule", ["mean", "fisher", "rows"])
def test_weights_that_are_not_finite_are_not_merged(rule):
    """Once "fisher" returned 1.0, as if nothing had moved."""
    named, opt = anchored()
    with torch.no_grad():
        named[0][1][0, 0] = torch.nan
    before = weights(named)
    with pytest.raises(ValueError, match=r"'p0'.* holds inf or NaN"):
        opt.merge_anchor(rule)
    assert all(map(torch.equal, weights(named)[1:], before[1:]))


@pytest.mark.parametrize("rule", ["mean", "fisher"])
def test_a_share_of_rows_for_a_rule_without_rows_is_an_error(rule):
    _, opt = anchored()
    with pytest.raises(ValueError, match="keep=0.1 is a share of the rows"):
        opt.merge_anchor(rule, keep=0.1)
