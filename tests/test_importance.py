# SPDX-License-Identifier: BSD-3-Clause
"""Importance: F from Adam's second moments, and a pull along ((1 - i) + i F) o (theta - theta*)."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch

import dgg
from cases import BACKENDS, BF16, F16, F32, F64

SHAPES = [(), (3,), (7, 5), (65,)]


def make(seed=0, dtype=F64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return [(f"p{i}", torch.nn.Parameter(x.to(dtype))) for i, x in enumerate(tensors)]


def train(named, opt, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
        opt.step()


def corrected(opt, p):
    entry = opt.state[p]
    beta2 = opt.param_groups[0]["betas"][1]
    return entry["exp_avg_sq"].double() / (1 - beta2 ** float(entry["step"]))


def weights(named):
    return [p.detach().clone() for _, p in named]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_importance_is_the_sum_over_boundaries_divided_by_its_mean():
    named = make()
    opt = dgg.AdamW(named, lr=1e-2, importance=0.5)
    train(named, opt, 4, 1)
    first = [corrected(opt, p) for _, p in named]
    opt.set_anchor()
    train(named, opt, 5, 2)
    sums = [v + corrected(opt, p) for v, (_, p) in zip(first, named, strict=True)]
    carried = opt.importance_dict()
    opt.set_anchor()
    mean = torch.cat([x.reshape(-1) for x in sums]).mean()
    assert opt.param_groups[0]["importance_mean"] == pytest.approx(mean.item(), rel=1e-12)
    for (name, p), total in zip(named, sums, strict=True):
        torch.testing.assert_close(opt.state[p]["importance"], total / mean)
        torch.testing.assert_close(carried[name], total, rtol=1e-12, atol=0)
    every = torch.cat([opt.state[p]["importance"].reshape(-1) for _, p in named])
    assert every.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_one_step_by_hand(weight, dtype, backend):
    named = make(dtype=dtype)
    opt = dgg.Adam(
        named, lr=1e-2, alpha=1.0, importance=weight, max_grad_norm=1.0, backend=backend,
        importance_dtype=F32, anchor_dtype=F64, state_dtype=F64, strength=0.5,
    )  # fmt: skip
    train(named, opt, 3, 1)
    opt.set_anchor()
    train(named, opt, 2, 2)  # away from the anchor
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(p.shape, generator=generator, dtype=F64) for _, p in named]
    for (_, p), g in zip(named, grads, strict=True):
        p.grad = g.to(dtype)
    before = [
        (p.detach().to(F64, copy=True), p.grad.double(), copy.deepcopy(opt.state[p]))
        for _, p in named
    ]
    opt.step()
    pulls = [
        (theta - s["anchor"].double()) * ((1 - weight) + weight * s["importance"].double())
        for theta, _, s in before
    ]
    grad_norm = torch.cat([g.reshape(-1) for _, g, _ in before]).norm()
    pull_norm = torch.cat([u.reshape(-1) for u in pulls]).norm()
    clip = min(1.0, 1.0 / (grad_norm.item() + 1e-6))
    scale = 0.5 * min(1.0, clip * grad_norm.item() / pull_norm.item())
    stats = opt.guidance_stats()
    assert stats["distance"].item() == pytest.approx(pull_norm.item(), rel=1e-5)
    assert stats["scale"].item() == pytest.approx(scale, rel=1e-5)
    for (_, p), (theta, g, s), u in zip(named, before, pulls, strict=True):
        total = clip * g + scale * u
        step = float(s["step"]) + 1
        m = 0.9 * s["exp_avg"].double() + 0.1 * total
        v = 0.999 * s["exp_avg_sq"].double() + 0.001 * total**2
        expected = theta - 1e-2 / (1 - 0.9**step) * m / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        accuracy = {F64: 1e-9, F32: 1e-6, BF16: 2**-8}[dtype]  # importance itself is float32
        torch.testing.assert_close(p.detach().double(), expected, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_scaling_it_is_ewc_and_l2sp(weight, backend):
    """strength = λ B mean, importance = 1: the gradient of λ B / 2 Σ v̂ (θ - θ*)²; 0: L2-SP."""
    named, twin = make(), make()
    opt = dgg.AdamW(
        named, lr=1e-2, alpha=1.0, importance=weight, scaling=False, strength=0.0, backend=backend
    )
    plain = torch.optim.AdamW([p for _, p in twin], lr=1e-2)
    train(named, opt, 4, 1)
    train(twin, plain, 4, 1)
    opt.set_anchor()
    anchors = [p.detach().clone() for _, p in twin]
    fisher = [corrected(plain, p) for _, p in twin]
    factor = 0.3 * 8  # λ and the examples of a batch
    for group in opt.param_groups:
        group["strength"] = factor * (group["importance_mean"] if weight else 1.0)
    train(named, opt, 3, 2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for (_, p), a, f in zip(twin, anchors, fisher, strict=True):
            penalty = factor * (f if weight else 1.0) * (p.detach() - a)
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64) + penalty
        plain.step()
    for (_, p), (_, q) in zip(named, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_option_nothing_is_stored_or_changed(backend):
    runs = []
    for more in ({}, {"importance": 0.0}):
        named = make(dtype=F32)
        opt = dgg.AdamW(named, alpha=1.0, backend=backend, **more)
        train(named, opt, 3, 1)
        opt.set_anchor()
        train(named, opt, 3, 2)
        assert all("importance" not in entry for entry in opt.state.values())
        assert opt.param_groups[0]["importance_mean"] == 0.0
        runs.append(weights(named))
    assert_equal(*runs)


@pytest.mark.parametrize("how", ["dict", "file", "safetensors"])
def test_a_new_optimizer_takes_the_sums_of_the_former(how, tmp_path):
    named = make(dtype=F32, shapes=SHAPES[1:])
    former = dgg.AdamW(named, importance=1.0)
    train(named, former, 4, 1)
    sums = former.importance_dict()
    former.set_anchor()
    if how == "file":
        torch.save(sums, tmp_path / "sums.pt")
        sums = torch.load(tmp_path / "sums.pt", weights_only=True)
    elif how == "safetensors":
        from safetensors.torch import save_file

        save_file(sums, tmp_path / "sums.safetensors")
        sums = tmp_path / "sums.safetensors"
    new = dgg.AdamW(named, importance=1.0)
    new.set_anchor(importance=sums)
    for _, p in named:
        torch.testing.assert_close(new.state[p]["importance"], former.state[p]["importance"])
    train(named, new, 3, 2)
    assert new.guidance_stats()["anchored"] == len(named)


def test_names_come_from_the_model():
    model = torch.nn.Linear(3, 2)
    opt = dgg.AdamW(model.parameters(), importance=1.0)
    train(list(model.named_parameters()), opt, 2, 1)
    with pytest.raises(ValueError, match="knows no name"):
        opt.importance_dict()
    sums = opt.importance_dict(model=model)
    assert set(sums) == {"weight", "bias"}
    new = dgg.AdamW(model.parameters(), importance=1.0)
    with pytest.raises(ValueError, match="which name belongs"):
        new.set_anchor(importance=sums)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, not dict"):
        new.set_anchor(importance=sums, model={})
    new.set_anchor(importance=sums, model=model)
    other = dgg.Guidance(torch.optim.SGD(model.parameters(), lr=0.1), importance=1.0)
    other.set_anchor(importance=sums, model=model)
    with pytest.raises(ValueError, match="give both or neither"):
        other.set_anchor(model=model)
    for p in model.parameters():
        assert torch.equal(new.state[p]["anchor"], p)
        assert torch.equal(new.state[p]["importance"], other.state[p]["importance"])


def test_a_second_moment_is_needed():
    named = make()
    opt = dgg.AdamW(named, importance=0.5)
    with pytest.raises(RuntimeError, match=r"a new optimizer has none: pass set_anchor"):
        opt.set_anchor()
    assert not any("anchor" in entry for entry in opt.state.values())
    sgd = dgg.SGD(named, importance=0.5)
    train(named, sgd, 2, 1)
    with pytest.raises(RuntimeError, match=r"SGD has none: pass set_anchor"):
        sgd.set_anchor()
    assert sgd.param_groups[0]["task_index"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sgd_takes_given_importance(backend):
    named = make(dtype=F64)
    opt = dgg.SGD(
        named, lr=0.1, importance=1.0, alpha=1.0, scaling=False, strength=0.5, backend=backend
    )
    given = {name: torch.rand_like(p) + 0.1 for name, p in named}
    opt.set_anchor(importance=given)
    anchors = weights(named)
    mean = torch.cat([x.reshape(-1) for x in given.values()]).mean()
    train(named, opt, 1, 1)
    before = weights(named)
    train(named, opt, 1, 2)
    generator = torch.Generator().manual_seed(2)
    for (name, p), a, theta in zip(named, anchors, before, strict=True):
        g = torch.randn(p.shape, generator=generator, dtype=F64)
        u = given[name] / mean * (theta - a)
        torch.testing.assert_close(p.detach(), theta - 0.1 * (g + 0.5 * u), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_in_the_middle_of_a_task_bit_for_bit(backend):
    options = dict(alpha=0.7, importance=0.5, importance_dtype=BF16, backend=backend, seed=3)
    named = make(dtype=F32)
    opt = dgg.AdamW(named, **options)
    train(named, opt, 3, 1)
    opt.set_anchor()
    train(named, opt, 3, 2)
    saved = io.BytesIO()
    torch.save({"weights": weights(named), "optimizer": opt.state_dict()}, saved)
    train(named, opt, 3, 3)
    opt.set_anchor()
    train(named, opt, 2, 4)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    again = make(dtype=F32)
    for (_, p), x in zip(again, loaded["weights"], strict=True):
        p.data.copy_(x)
    new = dgg.AdamW(again, **options)
    new.load_state_dict(loaded["optimizer"])
    assert all(new.state[p]["importance"].dtype == BF16 for _, p in again)
    train(again, new, 3, 3)
    new.set_anchor(task=2)
    train(again, new, 2, 4)
    assert_equal(weights(named), weights(again))
    assert new.param_groups[0]["importance_mean"] == opt.param_groups[0]["importance_mean"]


def test_a_copy_has_the_importance():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, alpha=1.0, importance=1.0)
    train(named, opt, 2, 1)
    opt.set_anchor()
    twins = copy.deepcopy((named, opt))
    for each in ((named, opt), twins):
        train(*each, 2, 2)
    assert_equal(weights(named), weights(twins[0]))


def test_a_checkpoint_that_lost_it_is_refused():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, importance=1.0)
    train(named, opt, 2, 1)
    opt.set_anchor()
    whole = opt.state_dict()
    new = dgg.AdamW(make(dtype=F32), importance=1.0)
    for change, message in (
        (lambda entry: entry.pop("importance"), "carries no importance of parameter 0 of group 0"),
        (lambda entry: entry.update(importance=torch.zeros(4)), "has shape"),
        (
            lambda entry: entry.update(importance=entry["importance"] * float("nan")),
            "negative, inf",
        ),
        (lambda entry: entry.update(importance=-entry["importance"] - 1), "negative, inf"),
        (lambda entry: entry.update(importance=entry["importance"].int()), "not a dense tensor"),
    ):
        broken = copy.deepcopy(whole)
        change(broken["state"][0])
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            new.load_state_dict(broken)
        assert not new.state


def test_a_state_dict_of_an_earlier_release_loads():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, alpha=1.0)
    train(named, opt, 2, 1)
    opt.set_anchor()
    old = opt.state_dict()
    for group in old["param_groups"]:
        for name in ("importance", "importance_mean", "route"):
            del group[name]
    new = dgg.AdamW(make(dtype=F32), importance=0.5, route="decoupled")
    new.load_state_dict(old)
    assert new.param_groups[0]["importance"] == 0.5  # how it was built, where nothing was saved
    assert new.param_groups[0]["route"] == "decoupled"


@pytest.mark.parametrize("build", ["AdamW", "Guidance"])
def test_groups_of_a_saved_state_that_disagree_are_refused(build):
    """One of them has lost the option, in whose place another value would come."""
    groups = [{"params": [p]} for _, p in make()]
    if build == "AdamW":
        opt = dgg.AdamW(groups, importance=0.25)
    else:
        opt = dgg.Guidance(torch.optim.AdamW(groups), importance=0.25)
    state = opt.state_dict()
    for group in state["param_groups"]:
        group["importance"] = 0.5
    del state["param_groups"][1]["importance"]
    with pytest.raises(ValueError, match="importance is one setting for the whole optimizer"):
        opt.load_state_dict(state)
    assert [group["importance"] for group in opt.param_groups] == [0.25] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_its_importance_says_so(backend):
    named = make(dtype=F32)
    opt = dgg.AdamW(named, alpha=1.0, backend=backend)
    train(named, opt, 2, 1)
    opt.set_anchor()
    train(named, opt, 1, 2)
    before = weights(named)
    for group in opt.param_groups:
        group["importance"] = 0.5
    with pytest.raises(RuntimeError, match=r"importance=0.5 weighs the pull of .*set_anchor"):
        train(named, opt, 1, 3)
    assert_equal(before, weights(named))
    opt.set_anchor()
    train(named, opt, 1, 3)


@pytest.mark.parametrize("foreach", [True, False])
def test_guidance_takes_the_second_moments_of_complex_parameters(foreach):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    q = torch.nn.Parameter(torch.ones(3))
    other = torch.optim.Adam([("p", p), ("q", q)], foreach=foreach)
    guidance = dgg.Guidance(other, importance=1.0)
    p.grad, q.grad = torch.tensor([1 + 2j, 3, 1j]), torch.ones(3)
    other.step()
    sums = guidance.importance_dict()
    torch.testing.assert_close(sums["p"], torch.tensor([1 + 4j, 9, 1j]))
    guidance.set_anchor()
    mean = (1 + 4 + 9 + 1 + 3) / 9
    assert guidance.param_groups[0]["importance_mean"] == pytest.approx(mean, rel=1e-6)
    torch.testing.assert_close(guidance.state[p]["importance"], sums["p"] / mean)


def test_lazily_conjugated_sums_are_taken():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    opt = dgg.AdamW([("p", p)], importance=1.0)
    opt.set_anchor(importance={"p": torch.tensor([1 - 2j, 3 - 0j, 0 - 3j]).conj()})
    assert opt.importance_dict()["p"].tolist() == pytest.approx([1 + 2j, 3, 3j])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_step_without_its_importance_says_so_too(backend):
    """The first step with the option on has a gradient of what is not anchored alone."""
    named = make(dtype=F32)
    late = torch.nn.Parameter(torch.ones(3))
    opt = dgg.AdamW(named, alpha=1.0, backend=backend)
    train(named, opt, 2, 1)
    opt.set_anchor()
    opt.add_param_group({"params": [("late", late)]})
    for group in opt.param_groups:
        group["importance"] = 0.5
    opt.zero_grad()
    for _ in range(2):
        late.grad = torch.ones(3)
        opt.step()
    before = weights(named)
    with pytest.raises(RuntimeError, match=r"importance=0.5 weighs the pull of parameter 'p0'"):
        train(named, opt, 1, 3)
    assert_equal(before, weights(named))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("late", [True, False])
def test_a_guidance_without_its_importance_says_so(late, backend):
    """Switched on between two boundaries, or lost: it does not pull without a weight."""
    named = make(dtype=F32)
    other = torch.optim.AdamW(named, lr=1e-2)
    guidance = dgg.Guidance(other, alpha=1.0, importance=0.0 if late else 0.5, backend=backend)
    train(named, other, 2, 1)
    guidance.set_anchor()
    train(named, other, 2, 2)
    if late:
        guidance.param_groups[0]["importance"] = 0.5
    else:
        del guidance.state[named[0][1]]["importance"]
    before = weights(named)
    with pytest.raises(RuntimeError, match=r"importance=0.5 weighs the pull of parameter 'p0'"):
        train(named, other, 1, 3)
    assert_equal(before, weights(named))
    guidance.set_anchor()
    train(named, other, 1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["in place", "option"])
def test_a_change_between_steps_is_seen(change, backend):
    """The distance that a step measured ahead is not used after F, or its weight, has changed."""
    named = make(dtype=F64)
    opt = dgg.AdamW(named, alpha=1.0, importance=0.5, backend=backend)
    train(named, opt, 3, 1)
    opt.set_anchor()
    train(named, opt, 2, 2)
    if change == "in place":
        for _, p in named:
            opt.state[p]["importance"].mul_(3.0)
    else:
        for group in opt.param_groups:
            group["importance"] = 1.0
    weight = 0.5 if change == "in place" else 1.0
    expected = sum(
        (
            ((1 - weight) + weight * opt.state[p]["importance"])
            * (p.detach() - opt.state[p]["anchor"])
        ).square().sum()
        for _, p in named
    ).sqrt()  # fmt: skip
    train(named, opt, 1, 3)
    assert opt.guidance_stats()["distance"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_over_adam_takes_its_second_moments(backend):
    named, twin = make(dtype=F64), make(dtype=F64)
    ours = dgg.AdamW(named, lr=1e-2, alpha=1.0, importance=0.7, backend=backend)
    other = torch.optim.AdamW(twin, lr=1e-2)
    guidance = dgg.Guidance(other, alpha=1.0, importance=0.7, backend=backend)
    for opt in ((named, ours), (twin, other)):
        train(*opt, 3, 1)
    ours.set_anchor()
    guidance.set_anchor()
    for opt in ((named, ours), (twin, other)):
        train(*opt, 3, 2)
    for (_, p), (_, q) in zip(named, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours.state[p]["importance"], guidance.state[q]["importance"])
    sums, theirs = ours.importance_dict(), guidance.importance_dict()
    assert all(torch.allclose(sums[name], theirs[name]) for name in sums)
    saved = guidance.state_dict()
    third = make(dtype=F64)
    loaded = dgg.Guidance(torch.optim.AdamW(third), importance=0.7, backend=backend)
    loaded.load_state_dict(saved)
    for (_, q), (_, r) in zip(twin, third, strict=True):
        assert torch.equal(guidance.state[q]["importance"], loaded.state[r]["importance"])
    del saved["importances"][0]
    with pytest.raises(KeyError, match="no anchor and importance of parameter 0"):
        loaded.load_state_dict(saved)


def test_guidance_over_an_optimizer_without_second_moments_refuses():
    named = make()
    other = torch.optim.SGD(named, lr=0.1, momentum=0.9)
    guidance = dgg.Guidance(other, importance=1.0)
    train(named, other, 2, 1)
    with pytest.raises(RuntimeError, match="the guided optimizer keeps none"):
        guidance.set_anchor()
    guidance.set_anchor(importance={name: torch.rand_like(p) for name, p in named})
    train(named, other, 1, 2)


def test_float16_importance_that_overflows_is_refused():
    p = torch.nn.Parameter(torch.zeros(100_000, dtype=F16))
    opt = dgg.AdamW([("p", p)], importance=1.0, master_weights=True, state_dtype=F32)
    grad = torch.zeros(100_000, dtype=F16)
    grad[0] = 100.0
    for _ in range(2):
        p.grad = grad.clone()
        opt.step()
    with pytest.raises(ValueError, match=r"overflows torch.float16; pass importance_dtype"):
        opt.set_anchor()
    assert "anchor" not in opt.state[p] and "importance" not in opt.state[p]
    again = dgg.AdamW([("p", p)], importance=1.0, master_weights=True, importance_dtype=F32)
    again.load_state_dict(opt.state_dict())
    again.set_anchor()
    assert again.state[p]["importance"][0] > 65504


def test_the_moments_of_a_task_without_gradients_are_refused():
    named = make()
    opt = dgg.AdamW(named, importance=1.0)
    for _, p in named:
        p.grad = torch.zeros_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="second moments of all anchored parameters are 0"):
        opt.set_anchor()
    assert opt.param_groups[0]["task_index"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": -0.1}, r"importance=-0.1 must lie in \[0, 1\]"),
        ({"importance": 1.5}, "importance=1.5 must lie in"),
        ({"importance": True}, "importance=True must be a number"),
        ({"importance": torch.tensor(0.5)}, "importance is a tensor"),
        ({"importance_dtype": torch.int8}, "importance_dtype=torch.int8 must be one of"),
    ],
)
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_wrong_options_are_named(cls, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls([torch.nn.Parameter(torch.zeros(2))], **options)


def test_wrong_sources_are_named():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, importance=1.0)
    train(named, opt, 2, 1)
    good = opt.importance_dict()
    for given, error, message in (
        (3, TypeError, "a mapping from names to tensors, or its path, not int"),
        ({**good, "p1": -good["p1"]}, ValueError, "given for parameter 'p1' has values that are"),
        (
            {**good, "p1": good["p1"] * float("inf")},
            ValueError,
            "the importance of parameter 'p1'.*holds inf or NaN",
        ),
        ({**good, "p1": torch.zeros(4)}, ValueError, "the importance given for parameter 'p1'"),
        ({k: v for k, v in good.items() if k != "p1"}, KeyError, "p1"),
    ):
        with pytest.raises(error, match=message):
            opt.set_anchor(importance=given)
        assert not any("anchor" in entry for entry in opt.state.values())
    plain = dgg.AdamW(named)
    with pytest.raises(ValueError, match="would be ignored"):
        plain.set_anchor(importance=good)


def test_clear_anchor_drops_it():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, importance=1.0)
    train(named, opt, 2, 1)
    opt.set_anchor()
    opt.clear_anchor()
    assert not any({"anchor", "importance"} & entry.keys() for entry in opt.state.values())
    assert opt.param_groups[0]["importance_mean"] == 0.0
    train(named, opt, 1, 2)


def test_turning_it_off_at_a_boundary_drops_it():
    named = make(dtype=F32)
    opt = dgg.AdamW(named, importance=1.0, alpha=1.0)
    train(named, opt, 2, 1)
    opt.set_anchor()
    for group in opt.param_groups:
        group["importance"] = 0.0
    train(named, opt, 1, 2)
    opt.set_anchor()
    assert not any("importance" in entry for entry in opt.state.values())
    train(named, opt, 1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters(backend):
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
    opt = dgg.AdamW([("p", p)], importance=1.0, alpha=1.0, backend=backend)
    for _ in range(2):
        p.grad = torch.randn(5, dtype=torch.complex64)
        opt.step()
    sums = opt.importance_dict()
    opt.set_anchor()
    assert opt.state[p]["importance"].is_complex()
    total = torch.view_as_real(sums["p"])
    expected = total / total.mean()
    torch.testing.assert_close(torch.view_as_real(opt.state[p]["importance"]), expected)
    p.grad = torch.randn(5, dtype=torch.complex64)
    opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_orders_of_memory(backend):
    runs = []
    for order in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(5)
        value = torch.randn(2, 3, 4, 4, generator=generator)
        p = torch.nn.Parameter(value.to(memory_format=order))
        opt = dgg.AdamW([("p", p)], importance=0.5, alpha=1.0, backend=backend)
        for _ in range(3):
            p.grad = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=order)
            opt.step()
        opt.set_anchor()
        for _ in range(3):
            p.grad = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=order)
            opt.step()
        runs.append(p.detach().contiguous())
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_other_places_of_the_option_agree():
    """Groups added later and set back start with the option of the whole optimizer."""
    named = make(dtype=F32)
    opt = dgg.AdamW(named[:2], importance=1.0, alpha=1.0)
    train(named[:2], opt, 2, 1)
    opt.set_anchor()
    opt.add_param_group({"params": named[2:]})
    assert opt.param_groups[1]["importance"] == 1.0
    train(named, opt, 2, 2)
    opt.set_anchor()
    assert all("importance" in opt.state[p] for _, p in named)
    for a, b in itertools.pairwise(opt.param_groups):
        assert a["importance_mean"] == b["importance_mean"] > 0


def test_a_task_counts_once_however_often_its_end_is_looked_at():
    """Sums asked for after the boundary, a second boundary, both in a resumed process."""
    named = make()
    opt = dgg.AdamW(named, lr=1e-2, importance=0.5)
    train(named, opt, 4, 1)
    before = opt.importance_dict()
    opt.set_anchor()
    assert_equal(opt.importance_dict().values(), before.values())
    opt.set_anchor()
    assert_equal(opt.importance_dict().values(), before.values())
    resumed = dgg.AdamW(named, lr=1e-2, importance=0.5)
    resumed.load_state_dict(opt.state_dict())
    assert_equal(resumed.importance_dict().values(), before.values())
    train(named, resumed, 1, 2)
    once = [before[name] + corrected(resumed, p) for name, p in named]
    for total, expected in zip(resumed.importance_dict().values(), once, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_the_moments_of_a_loaded_torch_checkpoint_count():
    """It has no draw index: 0, as that of an optimizer that has made no step."""
    named = make()
    theirs = torch.optim.AdamW(named, lr=1e-2)
    train(named, theirs, 4, 1)
    opt = dgg.AdamW(named, lr=1e-2, importance=0.5)
    opt.load_state_dict(theirs.state_dict())
    opt.set_anchor()
    for _, p in named:
        torch.testing.assert_close(
            opt.state[p]["importance"] * opt.param_groups[0]["importance_mean"], corrected(opt, p)
        )


@pytest.mark.parametrize("name", ["importance.pt", "nothing.safetensors"])
def test_an_error_about_the_importance_does_not_speak_of_the_anchor(name, tmp_path):
    named = make()
    opt = dgg.AdamW(named, lr=1e-2, importance=0.5)
    train(named, opt, 2, 1)
    torch.save(opt.importance_dict(), tmp_path / "importance.pt")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        opt.set_anchor(importance=tmp_path / name)
    text = str(caught.value).replace(str(tmp_path), "")
    assert "importance_dict" in text
    assert "anchor" not in text
