# SPDX-License-Identifier: BSD-3-Clause
"""State: whatever way an optimizer is copied, saved or resumed, it goes on as if nothing happened.

Plan: (1) a run that is cut at any step and continued through state dict, torch.save, pickle or
deepcopy ends with the same bits (weights, moments, first-step flags, anchor, draws); (2) state
dicts travel to torch.optim and back, old and crosswise ones included; (3) anchors keep their
dtype, own their memory and there is never more than one; (4) parameters that come late, freeze,
have no gradient, are empty or tied; (5) memory that is moved under the kernels' table.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import dgg
from cases import BACKENDS, BF16, F16, F32, F64, OPTIMIZERS, make_params, set_grads
from dgg.step import options

KINDS = ["adamw", "adamw-amsgrad", "adam", "sgd", "sgd-momentum", "sgd-nesterov-maximize"]
# A seed above 2**63 must survive too. Guided at about every other step, so that some cuts lie
# between a look-ahead and the step that would have used it.
OPTIONS = {"alpha": 0.5, "strength": 0.7, "max_grad_norm": 3.0, "seed": (1 << 63) + 11}
SHAPES = [(), (3,), (7, 5), (0,), (2049,)]


def build(kind, backend, params=None, **options):
    cls, hyper = OPTIMIZERS[kind]
    params = make_params(SHAPES, F32) if params is None else params
    return params, cls(params, backend=backend, **{**hyper, **OPTIONS, **options})


def advance(params, opt, steps, *, boundary=3):
    """Steps ``steps``, whose gradients depend on the step's number only; anchor at a boundary."""
    for step in steps:
        if step == boundary:
            opt.set_anchor()
        set_grads(params, torch.Generator().manual_seed(step))
        opt.step()
        opt.zero_grad()


def same(params, opt, others, other):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        mine, theirs = opt.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), key
    for mine, theirs in zip(opt.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }


# -- (1) resumption -------------------------------------------------------------------------------


def through_state_dict(params, opt, kind, backend):
    params, fresh = build(kind, backend, [Parameter(p.detach().clone()) for p in params])
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    return params, fresh


def through_file(params, opt, kind, backend):
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], opt.state_dict()], file)
    file.seek(0)
    values, saved = torch.load(file, weights_only=True)
    params, fresh = build(kind, backend, [Parameter(x) for x in values], seed=5, alpha=0.1)
    fresh.load_state_dict(saved)
    return params, fresh


def through_pickle(params, opt, kind, backend):
    fresh = pickle.loads(pickle.dumps(opt))
    return fresh.param_groups[0]["params"], fresh


def through_deepcopy(params, opt, kind, backend):
    fresh = copy.deepcopy(opt)
    return fresh.param_groups[0]["params"], fresh


def through_copy(params, opt, kind, backend):
    return params, copy.copy(opt)  # shares everything, as torch.optim's copies do


WAYS = [
    *((kind, way) for kind in KINDS for way in (through_state_dict, through_deepcopy)),
    *((kind, way) for kind in ("adamw", "sgd-momentum") for way in (through_file, through_pickle)),
    ("sgd-momentum", through_copy),
]


@pytest.mark.compat("one process", "resume")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_goes_on_bit_for_bit_after_any_cut(kind, backend, way):
    straight, expected = build(kind, backend)
    advance(straight, expected, range(7))
    assert expected.param_groups[0]["draw_index"] == 7
    for cut in range(7):
        params, opt = build(kind, backend)
        advance(params, opt, range(cut))
        params, opt = way(params, opt, kind, backend)
        assert opt.param_groups[0]["draw_index"] == cut
        advance(params, opt, range(cut, 7))
        same(params, opt, straight, expected)


def test_copies_have_all_public_attributes():
    """As torch asks of its own optimizers."""
    params, opt = build("adamw", None)
    for _ in range(2):
        for other in (copy.deepcopy(opt), copy.copy(opt), pickle.loads(pickle.dumps(opt))):
            mine, theirs = (
                {name for name in vars(each) if not name.startswith("_")} for each in (opt, other)
            )
            assert mine == theirs
        advance(params, opt, range(5))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda opt: pickle.loads(pickle.dumps(opt))]
)
def test_copies_know_what_was_resumed_and_which_task_was_named(copied):
    """Otherwise their anchors could be replaced by accident where the original's cannot."""
    params, opt = build("adamw", None)
    advance(params, opt, range(5))
    _, resumed = build("adamw", None, params)
    resumed.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="just resumed in task 1"):
        copied(resumed).set_anchor()
    _, named = build("adamw", None, params)
    named.set_anchor(task=2)
    with pytest.raises(
        ValueError, match=r"set_anchor\(task=2\) was called before a state of task 1"
    ):
        copied(named).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_anchor_before_the_first_step_survives(kind, backend):
    """SGD's buffer is G itself at the first step: an anchor in the state must not hide that."""
    runs = []
    for way in (None, through_state_dict, through_file, through_deepcopy):
        params, opt = build(kind, backend)
        opt.set_anchor()
        for p in params:
            p.data += 0.25
        if way is not None:
            params, opt = way(params, opt, kind, backend)
        advance(params, opt, range(4), boundary=None)
        runs.append((params, opt))
    for run in runs[1:]:
        same(*run, *runs[0])
    # And the first step is the first: torch's, on the same G.
    if kind == "sgd-momentum":
        params, opt = build(kind, backend, alpha=0.0, max_grad_norm=None)
        opt.set_anchor()
        mirror = [Parameter(p.detach().clone()) for p in params]
        theirs = torch.optim.SGD(mirror, **OPTIMIZERS[kind][1])
        for _ in range(2):
            set_grads(params, torch.Generator().manual_seed(1))
            set_grads(mirror, torch.Generator().manual_seed(1))
            opt.step()
            theirs.step()
        torch.testing.assert_close(params, mirror)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_loading_its_own_empty_state_is_exact(kind, backend):
    """accelerate.prepare() does this to every optimizer it is given."""
    straight, expected = build(kind, backend)
    params, opt = build(kind, backend)
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
    advance(straight, expected, range(6))
    advance(params, opt, range(6))
    same(params, opt, straight, expected)


def test_state_holds_plain_types_only():
    params, opt = build("adamw", None)
    advance(params, opt, range(5))
    saved = opt.state_dict()
    for entry in saved["state"].values():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq", "anchor"}
        assert all(type(value) is torch.Tensor for value in entry.values())
    plain = (int, float, bool, str, type(None), tuple, list)
    for group in saved["param_groups"]:
        assert all(type(value) in plain for value in group.values())
    assert saved["param_groups"][0]["draw_index"] == 5
    assert saved["param_groups"][0]["task_index"] == 1


def test_how_a_step_is_carried_out_stays_as_constructed():
    params, opt = build("adamw", "reference")
    advance(params, opt, range(5))
    saved = opt.state_dict()
    saved["param_groups"][0].update(fused=True, foreach=True, capturable=True)
    _, other = build("adamw", "reference")
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, None, False)


def test_load_hooks_run_once():
    params, opt = build("sgd-momentum", None)
    advance(params, opt, range(4))
    calls = []
    opt.register_load_state_dict_pre_hook(lambda o, s: calls.append("pre"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["pre", "post"]


# -- (2) torch.optim's state dicts ----------------------------------------------------------------

PARENTS = {dgg.AdamW: torch.optim.AdamW, dgg.Adam: torch.optim.Adam, dgg.SGD: torch.optim.SGD}


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_torch_and_back(kind, backend, flags):
    """Three steps of torch, three of ours, three of torch: as nine of torch's."""
    parent = PARENTS[OPTIMIZERS[kind][0]]
    hyper = OPTIMIZERS[kind][1]
    # Neutrality is the subject: without an anchor, and unclipped, ours is torch's.
    params, opt = build(kind, backend, max_grad_norm=None)
    mirror = [Parameter(p.detach().clone()) for p in params]
    straight = parent(mirror, **hyper, **flags)
    first = parent(params, **hyper, **flags)
    advance(mirror, straight, range(9), boundary=None)
    advance(params, first, range(3), boundary=None)
    opt.load_state_dict(first.state_dict())
    advance(params, opt, range(3, 6), boundary=None)
    last = parent(params, lr=9.0)
    last.load_state_dict(opt.state_dict())
    advance(params, last, range(6, 9), boundary=None)
    for p, q in zip(params, mirror, strict=True):
        torch.testing.assert_close(p, q)
        theirs = straight.state[q]
        # Every documented key of torch's, with torch's value.
        assert {k for k, v in theirs.items() if v is not None} == set(last.state[p])
        for key, value in last.state[p].items():
            torch.testing.assert_close(value, theirs[key])


def test_anchored_state_goes_through_torch_unharmed():
    params, opt = build("adamw", "reference")
    advance(params, opt, range(5))
    theirs = torch.optim.AdamW(params, lr=9.0)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    set_grads(params, torch.Generator().manual_seed(1))
    theirs.step()
    _, back = build("adamw", "reference", params)
    back.load_state_dict(theirs.state_dict())
    assert back.param_groups[0]["anchored"] == len(params)
    for p in params:
        assert torch.equal(back.state[p]["anchor"], opt.state[p]["anchor"])
        assert back.state[p]["step"] == 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "form",
    [
        lambda step: int(step),
        lambda step: step.double(),
        lambda step: step.reshape(1),
        lambda step: step.long(),
    ],
    ids=["int", "float64", "1-dim", "int64"],
)
def test_old_forms_of_the_step(form, backend):
    params, opt = build("adamw", backend)
    advance(params, opt, range(5))
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = form(entry["step"])
    others, other = build("adamw", backend, [Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(saved)
    for q in others:
        assert other.state[q]["step"].dim() == 0
        assert other.state[q]["step"].dtype == F32
    advance(params, opt, range(5, 8))
    advance(others, other, range(5, 8))
    same(others, other, params, opt)


def test_adam_checkpoint_does_not_turn_adamw_into_adam():
    params, opt = build("adam", "reference", max_grad_norm=None)
    advance(params, opt, range(2), boundary=None)
    _, other = build("adamw", "reference", params)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is True


# -- (3) the anchor -------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [None, F32, BF16, F16, F64])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_loading_keeps_the_anchor_bit_for_bit(dtype, anchor):
    params = make_params(SHAPES, dtype)
    _, opt = build("adamw", None, params, anchor_dtype=anchor)
    advance(params, opt, range(5))
    for p in params:
        assert opt.state[p]["anchor"].dtype == (anchor or dtype)
    for other_dtype in (None, F32, BF16):
        others = [Parameter(p.detach().clone()) for p in params]
        _, other = build("adamw", None, others, anchor_dtype=other_dtype)
        other.load_state_dict(opt.state_dict())
        for p, q in zip(params, others, strict=True):
            value = other.state[q]["anchor"]
            assert value.dtype == (anchor or dtype)
            assert torch.equal(value, opt.state[p]["anchor"])
        advance(others, other, range(5, 6))
        other.set_anchor()  # from here on its own option holds
        assert all(other.state[q]["anchor"].dtype == (other_dtype or dtype) for q in others)


def test_anchor_owns_its_memory():
    params, opt = build("sgd", None)
    given = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    opt = dgg.SGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.5, alpha=1.0)
    for tensors in (None, given):
        opt.set_anchor(tensors)
        for i, p in enumerate(params):
            anchor = opt.state[p]["anchor"]
            for other in (p, given[f"p{i}"]):
                assert p.numel() == 0 or anchor.data_ptr() != other.data_ptr()
    before = [opt.state[p]["anchor"].clone() for p in params]
    set_grads(params, torch.Generator().manual_seed(0))
    opt.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(opt.state[p]["anchor"], old)
    assert opt.guidance_stats()["distance"] == 0  # measured before the step, at the anchor
    set_grads(params, torch.Generator().manual_seed(0))
    opt.step()
    assert opt.guidance_stats()["distance"] > 0


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_boundary_replaces_an_anchor_that_is_the_weight_itself(master_weights):
    (p,) = params = make_params([(5,)], BF16 if master_weights else F32)
    opt = dgg.SGD(params, lr=0.5, alpha=1.0, master_weights=master_weights)
    opt.set_anchor()
    weight = opt.state[p]["master"] if master_weights else p.data
    opt.state[p]["anchor"] = weight
    set_grads(params, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="own memory"):
        opt.step()
    opt.set_anchor()
    assert torch.equal(opt.state[p]["anchor"], weight)
    opt.step()
    opt.step()
    assert opt.guidance_stats()["distance"] > 0


def test_a_boundary_after_loading_leaves_the_checkpoint_alone():
    """The state dict may be another running optimizer's (best-model bookkeeping, two branches)."""
    params, opt = build("adamw", None)
    advance(params, opt, range(5))
    before = {p: opt.state[p]["anchor"].clone() for p in params}
    others, other = build("adamw", None, [Parameter(p.detach() * 2) for p in params])
    other.load_state_dict(opt.state_dict())
    other.set_anchor(task=2)
    for p in params:
        assert torch.equal(opt.state[p]["anchor"], before[p])


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor made by any operator has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() not in known:
            self.numel = max(self.numel, result.numel())
        return result


def live_storages():
    """Every piece of memory that some tensor of this process has, by its address."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided:
            # torch.compile's caches keep fake tensors of whatever this process compiled before.
            with contextlib.suppress(RuntimeError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage
    return storages


@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_one_anchor_however_many_tasks(kind):
    numel = 50_000
    params = make_params([(numel,)], F32)
    _, opt = build(kind, None, params, anchor_dtype=BF16, alpha=1.0)
    before = live_storages()  # holding them, lest an address be given out twice
    moments = 2 if kind == "adamw" else 1
    seen = set()
    for task in range(10):
        with Largest() as largest:
            opt.set_anchor()
        # From the second task on nothing is made but sums of the journal; the first makes moments
        # and anchor.
        assert largest.numel <= (numel if task == 0 else 100)
        seen.add(opt.state[params[0]]["anchor"].data_ptr())
        for step in range(3):
            set_grads(params, torch.Generator().manual_seed(step))
            with Largest() as largest:
                opt.step()
            if dgg.backends.unavailable("cpp", torch.device("cpu")) is None and task + step:
                assert largest.numel < 100, "the step made a full-size temporary"
            opt.zero_grad()
    assert len(seen) == 1
    assert opt.param_groups[0]["task_index"] == 10
    more = sum(x.nbytes() for at, x in live_storages().items() if at not in before)
    full = 4 * numel * moments + 2 * numel
    assert full <= more < full + 2 * numel, "more than one anchor and the moments is held"


def test_clear_anchor_gives_the_memory_back():
    params, opt = build("adamw", None)
    advance(params, opt, range(5))
    opt.clear_anchor()
    assert all("anchor" not in opt.state[p] for p in params)
    assert opt.state_dict()["param_groups"][0]["anchored"] == 0
    straight, plain = build("adamw", None, [Parameter(p.detach().clone()) for p in params])
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    advance(params, opt, range(5, 8))
    advance(straight, plain, range(5, 8))
    same(params, opt, straight, plain)


# -- (4) parameters of all kinds ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_added_after_a_task(backend):
    """Its parameters are torch's until the next boundary, and count in no guidance norm."""
    hyper = {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}
    old, new = make_params([(6,)], F32, seed=1)[0], make_params([(4,)], F32, seed=2)[0]
    mirror = Parameter(new.detach().clone())
    opt = dgg.SGD([old], **hyper, alpha=1.0, strength=0.7, backend=backend)
    opt.set_anchor()
    old.data += 0.5
    opt.add_param_group({"params": [new], "lr": 0.02})
    theirs = torch.optim.SGD([mirror], **{**hyper, "lr": 0.02})
    for step in range(3):
        set_grads([old, new], torch.Generator().manual_seed(step))
        mirror.grad = new.grad.clone()
        opt.step()
        theirs.step()
        torch.testing.assert_close(new, mirror)
        assert "anchor" not in opt.state[new]
        torch.testing.assert_close(opt.guidance_stats()["grad_norm"], old.grad.norm())
    opt.set_anchor()
    assert opt.param_groups[1]["anchored"] == 1
    for p in (old, new):
        p.data += 0.5
    set_grads([old, new], torch.Generator().manual_seed(9))
    opt.step()
    both = torch.cat([old.grad, new.grad]).norm()
    torch.testing.assert_close(opt.guidance_stats()["grad_norm"], both)
    torch.testing.assert_close(opt.guidance_stats()["distance"], torch.tensor(10.0).sqrt() * 0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_group_taken_out_and_put_back(count):
    """As a layer is frozen for a while: its anchors have stayed, and so do draws and tasks."""
    runs = []
    for put_back in (True, False):
        params = make_params(SHAPES, F32)
        cls, hyper = OPTIMIZERS["adamw"]
        groups = [{"params": params}] if count == 1 else [{"params": params[i::2]} for i in (0, 1)]
        opt = cls(groups, **{**hyper, **OPTIONS})
        advance(params, opt, range(5))
        if put_back:
            opt.add_param_group(opt.param_groups.pop())
        advance(params, opt, range(5, 8), boundary=None)
        resumed = copy.deepcopy(opt)
        resumed.load_state_dict(opt.state_dict())
        runs.append((params, opt))
        for before, after in zip(opt.param_groups, resumed.param_groups, strict=True):
            assert before["anchored"] == after["anchored"] == len(before["params"])
    same(*runs[0], *runs[1])


def test_new_list_of_groups():
    """As accelerate's wrapper sets one: boundaries mark it, and former importance counts on."""
    runs = []
    for new in (True, False):
        params, opt = build("adamw", None, importance=0.5)
        advance(params, opt, range(5))
        if new:
            opt.param_groups = [dict(group) for group in opt.param_groups]
        assert opt.param_groups[0]["importance_mean"] > 0
        advance(params, opt, range(5, 10), boundary=7)
        assert opt.param_groups[0]["task_index"] == 2
        opt.merge_anchor("fisher")
        copy.deepcopy(opt).load_state_dict(opt.state_dict())
        runs.append((params, opt))
    same(*runs[0], *runs[1])
    assert all("anchor" in opt.state[p] for p in params)
    for _, opt in runs:
        opt.clear_anchor()
        assert opt.param_groups[0]["anchored"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_too", [False, True])
def test_parameter_taken_out_of_its_group(state_too, backend):
    """A pruned head: the others go on as if it had no gradient."""
    runs = []
    for pruned in (True, False):
        params, opt = build("adamw", backend)
        advance(params, opt, range(5))
        gone = params.pop(2)
        if pruned:
            del opt.param_groups[0]["params"][2]
            if state_too:
                del opt.state[gone]
        advance(params, opt, range(5, 10))
        runs.append((params, opt))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(p, q)
    if state_too:  # torch cannot save the state of what is in no group
        rest = make_params(SHAPES[:2] + SHAPES[3:], F32)
        _, resumed = build("adamw", backend, rest)
        resumed.load_state_dict(runs[0][1].state_dict())
        assert resumed.param_groups[0]["anchored"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_moved_to_another_group(backend):
    """It follows that group's settings, as in torch, and keeps its anchor."""
    runs = []
    for moved in (True, False):
        params = make_params([(3,), (7, 5), (5,)], F32)
        cls, hyper = OPTIMIZERS["adamw"]
        fast, slow = {"lr": hyper["lr"]}, {"lr": hyper["lr"] / 3}
        groups = [{"params": params[:2], **fast}, {"params": params[2:], **slow}]
        if not moved:
            groups = [{"params": [p], **fast} for p in params[:2]] + groups[1:]
        opt = cls(groups, backend=backend, **{**hyper, **OPTIONS})
        advance(params, opt, range(5))
        if moved:  # to the same place in the order of all
            opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
        else:
            opt.param_groups[1].update(slow)
        advance(params, opt, range(5, 10))
        runs.append(params)
        assert [g["anchored"] for g in opt.param_groups] == ([1, 2] if moved else [1, 1, 1])
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exchanged_parameter_needs_a_boundary(backend):
    """A head that was replaced would go unguided where an anchor was promised."""
    params, opt = build("adamw", backend)
    advance(params, opt, range(5))
    params[1] = opt.param_groups[0]["params"][1] = Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"only 4 anchors.*exchanged.*set_anchor\(\) after the"):
        advance(params, opt, range(5, 6))
    opt.set_anchor()
    advance(params, opt, range(5, 7))
    assert "anchor" in opt.state[params[1]]


@pytest.mark.parametrize("foreign", [False, True])
def test_boundary_in_inference_mode(foreign):
    """As after an evaluation: what is made there must be writable later."""
    runs = []
    for mode in (torch.inference_mode, torch.enable_grad):
        params = make_params(SHAPES, F32)
        if foreign:
            opt = torch.optim.SGD(params, lr=0.1)
            guide = dgg.Guidance(opt, **OPTIONS)
        else:
            guide = opt = dgg.AdamW(params, lr=0.1, **OPTIONS)
        for task in range(4):
            saved = copy.deepcopy(guide.state_dict())
            with mode():
                if task == 2:
                    guide.load_state_dict(saved)
                guide.set_anchor()
            assert not any(x.is_inference() for s in opt.state.values() for x in s.values())
            advance(params, opt, range(3 * task, 3 * task + 3), boundary=None)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_groups(backend):
    """The Trainer's group without weight decay is empty for a model without biases."""
    runs = []
    for empty in (True, False):
        params = make_params(SHAPES, F32)
        cls, hyper = OPTIMIZERS["adamw"]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
        if empty:
            groups = [{"params": []}, groups[0], {"params": []}, groups[1]]
        opt = cls(groups, backend=backend, **{**hyper, **OPTIONS})
        advance(params, opt, range(5))
        state = copy.deepcopy(opt.state_dict())
        opt = cls(groups, backend=backend, **{**hyper, **OPTIONS})
        opt.load_state_dict(state)
        advance(params, opt, range(5, 8))
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


def test_groups_are_used_again_for_the_next_optimizer():
    """A new optimizer per task over the same list: torch.optim has put its options into them."""
    p, q = make_params([(3,), (4,)], F32)
    groups = [{"params": [p], "lr": 0.1, "alpha": 0.3}, {"params": [q]}]
    first = dgg.AdamW(groups, lr=0.2, seed=1, max_grad_norm=2.0)
    first.set_anchor()
    for x in (p, q):
        x.grad = torch.ones_like(x)
    first.step()
    second = dgg.AdamW(groups, lr=0.5, seed=2)
    for group in second.param_groups:
        assert (group["seed"], group["max_grad_norm"]) == (2, None)
        assert (group["draw_index"], group["task_index"], group["anchored"]) == (0, 0, 0)
    assert [g["lr"] for g in second.param_groups] == [0.1, 0.2]  # as torch.optim leaves them
    assert [g["alpha"] for g in second.param_groups] == [0.3, 0.2]
    assert [g["draw_index"] for g in first.param_groups] == [1, 1]
    first.step()
    second.step()
    first.add_param_group({**first.param_groups[0], "params": make_params([(2,)], F32)})
    assert first.param_groups[2]["draw_index"] == 2
    assert first.param_groups[2]["seed"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_pickle_from_before_an_option_was_there(backend):
    """What its groups lack is as constructed."""
    runs = []
    for old in (True, False):
        params, opt = build("adamw", backend)
        advance(params, opt, range(2), boundary=None)
        if old:
            for name in ("alpha", "strength", "norm_scope", "max_grad_norm", "seed", "anchored"):
                del opt.param_groups[0][name]
        params, opt = pickle.loads(pickle.dumps((params, opt)))
        advance(params, opt, range(2, 8))
        runs.append((params, opt))
    same(*runs[0], *runs[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_untouched_and_in_no_norm(kind, backend):
    """As if the optimizer had the other parameter only."""
    params, opt = build(kind, backend, make_params([(5, 3), (7,)], F32), alpha=1.0)
    advance(params, opt, range(3), boundary=1)
    alone = Parameter(params[0].detach().clone())
    _, other = build(kind, backend, [alone], alpha=1.0)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(params=[0], anchored=1)
    other.load_state_dict({**saved, "state": {0: saved["state"][0]}})
    quiet = params[1].detach().clone(), copy.deepcopy(opt.state[params[1]])
    for step in range(3, 6):
        grad = torch.randn((5, 3), generator=torch.Generator().manual_seed(step))
        params[0].grad, alone.grad = grad, grad.clone()
        opt.step()
        other.step()
        for name in ("distance", "grad_norm", "clip", "scale"):
            assert torch.equal(opt.guidance_stats()[name], other.guidance_stats()[name]), name
    assert torch.equal(params[0], alone)
    assert torch.equal(params[1], quiet[0])
    for key, value in quiet[1].items():
        assert torch.equal(opt.state[params[1]][key], value)


@pytest.mark.compat("one process", "frozen parts")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum", "sgd"])
def test_frozen_and_unfrozen(kind, backend):
    params, opt = build(kind, backend, make_params([(4,), (3,)], F32), alpha=1.0)
    body, head = params
    head.requires_grad_(False)
    advance([body], opt, range(1), boundary=0)
    assert "anchor" not in opt.state.get(head, {})
    assert opt.param_groups[0]["anchored"] == 1
    head.requires_grad_(True)
    advance(params, opt, range(2), boundary=None)  # unguided until the boundary, but trained
    assert opt.state.get(head, {}).get("anchor") is None
    opt.set_anchor()
    body.requires_grad_(False)
    kept, anchor = body.detach().clone(), opt.state[body]["anchor"].clone()
    head.data += 0.5
    head.grad = torch.ones(3)
    opt.step()
    assert torch.equal(body, kept)
    assert torch.equal(opt.state[body]["anchor"], anchor)
    torch.testing.assert_close(opt.guidance_stats()["distance"], torch.tensor(3.0).sqrt() * 0.5)
    body.requires_grad_(True)
    body.data += 0.5
    before = head.detach() - opt.state[head]["anchor"]
    set_grads(params, torch.Generator().manual_seed(0))
    opt.step()
    distance = torch.cat([torch.full((4,), 0.5), before]).norm()
    torch.testing.assert_close(opt.guidance_stats()["distance"], distance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameter_with_a_gradient_left_is_stepped_as_torch_does(backend):
    for cls, parent in PARENTS.items():
        p = make_params([(5,)], F32)[0]
        q = Parameter(p.detach().clone())
        for each, opt in ((p, cls([p], lr=0.1, backend=backend)), (q, parent([q], lr=0.1))):
            each.grad = torch.ones(5)
            each.requires_grad_(False)
            opt.step()
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_empty_parameters(kind, backend):
    params, opt = build(kind, backend, make_params([(0,), (0, 4)], F32), alpha=1.0)
    advance(params, opt, range(4), boundary=1)
    assert opt.guidance_stats()["scale"] == 0
    for p in params:
        assert opt.state[p]["anchor"].shape == p.shape
        assert opt.state[p].get("step", 4) == 4


@pytest.mark.compat("one process", "tied weights", "anchor by name")
def test_tied_weights():
    """One parameter, one anchor, whichever of its names the checkpoint has."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    opt = dgg.AdamW(model.parameters(), alpha=1.0)
    assert len(opt.param_groups[0]["params"]) == 1
    for name in ("embed.weight", "head.weight"):
        given = torch.randn(5, 3)
        opt.set_anchor({name: given}, model=model)
        assert torch.equal(opt.state[model.embed.weight]["anchor"], given)
    model.head(model.embed(torch.arange(5))).sum().backward()
    opt.step()
    assert opt.state[model.embed.weight]["step"] == 1


# -- (5) memory that moves ------------------------------------------------------------------------


def share_state(params, opt):
    for entry in opt.state.values():
        for value in entry.values():
            value.share_memory_()


def share_params(params, opt):
    for p in params:
        p.share_memory_()


def move_state(params, opt):
    # The widely copied helper that moves an optimizer to a device does this.
    for entry in opt.state.values():
        for value in entry.values():
            value.data = value.data.clone()


def move_params(params, opt):
    for p in params:
        p.data = p.data.clone()


def replace_state(params, opt):
    for entry in opt.state.values():
        for key, value in entry.items():
            entry[key] = value.clone()


@pytest.mark.parametrize(
    "move", [share_state, share_params, move_state, move_params, replace_state]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["adamw-amsgrad", "sgd-momentum"])
def test_moved_memory_is_noticed(kind, backend, move):
    straight, expected = build(kind, backend)
    params, opt = build(kind, backend)
    advance(straight, expected, range(8))
    for step in range(8):
        advance(params, opt, [step])
        move(params, opt)
    same(params, opt, straight, expected)


@pytest.mark.parametrize("move", [share_state, move_state])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["adamw-amsgrad", "sgd-momentum"])
def test_memory_moved_through_entries_held_since_long_ago_is_noticed(kind, backend, move):
    """Nobody reads ``opt.state`` in between; the old addresses would corrupt the heap."""

    class Held:
        pass

    straight, expected = build(kind, backend)
    params, opt = build(kind, backend)
    advance(straight, expected, range(10))
    advance(params, opt, range(4))
    held = Held()
    held.state = dict(opt.state)
    for step in range(4, 10):
        advance(params, opt, [step])
        move(params, held)
    same(params, opt, straight, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_new_addresses_every_step(backend):
    """zero_grad() frees them: the addresses of the last step are somebody else's."""
    straight, expected = build("adamw", "reference")
    params, opt = build("adamw", backend)
    held = []
    for step in range(6):
        for ps, o in ((straight, expected), (params, opt)):
            if step == 2:
                o.set_anchor()
            set_grads(ps, torch.Generator().manual_seed(step))
            held.append([p.grad for p in ps] if step % 2 else None)
            o.step()
            o.zero_grad()
    torch.testing.assert_close(params, straight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_device_changes_nothing(backend):
    """What the kernels read on the CPU is made there, whatever torch.set_default_device says."""
    results = []
    for device in ("cpu", "meta"):
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        with torch.device(device):
            opt = dgg.AdamW(
                [{"params": params[:1]}, {"params": params[1:], "alpha": 0.5}], lr=0.1,
                alpha=0.9, granularity="tensor", max_grad_norm=1.0, backend=backend,
            )  # fmt: skip
            opt.set_anchor()
            for step in range(6):
                for p in params:
                    p.grad = torch.full_like(p, 0.3 + step)
                opt.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# -- exchanged modules, lazy ones, patched torch -------------------------------------------------


def _loaded(model, **options):
    state = {k: v.clone() + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(state, **options)


EXCHANGES = {
    "cpu": lambda m: m.cpu(),
    "double": lambda m: m.double(),
    "to_empty": lambda m: (m.to_empty(device="cpu"), [p.data.fill_(1) for p in m.parameters()]),
    "load_state_dict": _loaded,
    "assign": lambda m: _loaded(m, assign=True),
    "swap_tensors": lambda m: torch.utils.swap_tensors(
        m.weight, torch.nn.Parameter(torch.full((3, 3), 2.0))
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("kind", ["adamw", "guided", "guidance"])
def test_modules_may_be_exchanged_after_a_step(monkeypatch, kind, how, backend):
    """swap_tensors wants a parameter's tensor for itself; nothing may be kept between steps."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    monkeypatch.setattr(torch.nn.Linear, "__repr__", object.__repr__)
    try:
        model = torch.nn.Linear(3, 3)
        opt = (
            torch.optim.SGD(model.parameters(), lr=0.1)
            if kind == "guidance"
            else dgg.AdamW(model.parameters(), lr=0.1, alpha=1.0, backend=backend)
        )
        guide = dgg.Guidance(opt, alpha=1.0, backend=backend) if kind == "guidance" else opt
        if kind != "adamw":
            guide.set_anchor()
        for _ in range(3):
            model(torch.ones(2, 3, dtype=model.weight.dtype)).sum().backward()
            opt.step()
            opt.zero_grad()
        EXCHANGES[how](model)
        before = model.weight.detach().clone()
        model(torch.ones(2, 3, dtype=model.weight.dtype)).sum().backward()
        opt.step()
        assert not torch.equal(before, model.weight)
        assert (before - model.weight).abs().max() < 3  # a step from where it was put
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_modules(backend):
    def train(lib, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.LazyLinear(4), torch.nn.ReLU(), torch.nn.LazyLinear(1), torch.nn.LazyLinear(2)
        )
        opt = lib.AdamW(model.parameters(), lr=0.1, **options)
        for step in range(4):
            opt.zero_grad()
            part = model[:3] if step < 2 else model  # the last one stays lazy for two steps
            part(torch.ones(2, 3)).sum().backward()
            opt.step()
        return [p.detach() for p in model.parameters()]

    for p, q in zip(train(torch.optim), train(dgg, backend=backend, alpha=0.0), strict=True):
        torch.testing.assert_close(p, q)


def test_an_anchor_of_a_lazy_parameter_is_refused():
    model = torch.nn.LazyLinear(4)
    opt = dgg.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not initialised yet.*forward pass"):
        opt.set_anchor()
    model(torch.ones(1, 3))
    opt.set_anchor()


def test_torch_may_be_patched(monkeypatch):
    for name in ("SGD", "Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, getattr(dgg, name))
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        param = torch.nn.Parameter(torch.ones(2))
        opt = cls([param], lr=0.1)
        param.grad = torch.ones(2)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        assert not torch.equal(param, torch.ones(2))


def init_optim_state(optim):
    """As torchtitan has it: a step with zero gradients and a learning rate of 0."""
    for group in optim.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    lrs = [group["lr"] for group in optim.param_groups]
    for group in optim.param_groups:
        group["lr"] = 0.0
    optim.step()
    for group, lr in zip(optim.param_groups, lrs, strict=True):
        group["lr"] = lr
    optim.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.SGD])
def test_a_state_made_by_zero_gradients_is_no_step(cls, tmp_path):
    """torchtitan makes it before it knows what it will load; anchors find room all the same."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    class Container(dcp.stateful.Stateful):
        def __init__(self, model, opt):
            self.model, self.opt = model, opt

        def state_dict(self):
            return get_optimizer_state_dict(self.model, self.opt)

        def load_state_dict(self, state_dict):
            set_optimizer_state_dict(self.model, self.opt, state_dict)

    def make(made):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if cls is dgg.SGD else {}
        opt = cls(model.parameters(), lr=0.1, alpha=1.0, **options)
        if made:
            weights = [p.detach().clone() for p in model.parameters()]
            init_optim_state(opt)
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
            assert opt.param_groups[0]["draw_index"] == 0
            assert all(float(opt.state[p].get("step", 0)) == 0 for p in model.parameters())
            assert all(opt.state[p] for p in model.parameters())
        return model, opt

    def step(model, opt):
        opt.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        opt.step()

    for (model, opt), (twin, other) in [(make(True), make(False))]:
        for _ in range(2):
            step(model, opt)
            step(twin, other)
        assert torch.equal(model.weight, twin.weight)
        opt.set_anchor()
        other.set_anchor()
        step(model, opt)
        step(twin, other)
        dcp.save({"optim": Container(model, opt)}, checkpoint_id=tmp_path)
    resumed, new = make(True)
    resumed.load_state_dict(model.state_dict())
    dcp.load({"optim": Container(resumed, new)}, checkpoint_id=tmp_path)
    assert new.param_groups[0]["anchored"] == 2
    for _ in range(2):
        step(resumed, new)
        step(twin, other)
    assert torch.equal(resumed.weight, twin.weight)


class FlatContainer:
    """As torchtitan 0.3 has it: it makes the template without torch's helper, by flat names."""

    def __init__(self, opt):
        self.opt = opt

    def named(self):
        (group,) = self.opt.param_groups
        return group, [*zip(group["param_names"], group["params"], strict=True)]

    def state_dict(self):
        if not self.opt.state:
            init_optim_state(self.opt)
        saved, (group, named) = self.opt.state_dict(), self.named()
        flat = {}
        for number, (name, _) in enumerate(named):
            entry = saved["state"].get(number, {})
            flat.update({f"state.{name}.{key}": value for key, value in entry.items()})
            for key in group.keys() - {"params", "param_names"}:
                flat[f"param_groups.{name}.{key}"] = saved["param_groups"][0][key]
        return flat

    def load_state_dict(self, flat):
        if not self.opt.state:
            init_optim_state(self.opt)
        group, named = self.named()
        first = named[0][0]
        keys = group.keys() - {"params", "param_names"}
        options = {key: flat[f"param_groups.{first}.{key}"] for key in keys}
        state = {
            number: {key: flat[f"state.{name}.{key}"] for key in self.opt.state[p]}
            for number, (name, p) in enumerate(named)
        }
        groups = [{**options, "params": [*range(len(named))]}]
        self.opt.load_state_dict({"state": state, "param_groups": groups})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.SGD])
@pytest.mark.parametrize("made", [False, True], ids=["template made by load", "made before"])
def test_a_template_that_torch_has_not_asked_for_has_room_for_anchors(made, cls, tmp_path):
    import torch.distributed.checkpoint as dcp

    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if cls is dgg.SGD else {}
        return model, cls(model.named_parameters(), lr=0.1, alpha=0.5, **options)

    def train(model, opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            opt.step()

    whole, opt = make()
    train(whole, opt, 2)
    opt.set_anchor(task=1)
    train(whole, opt, 2)
    dcp.save({"model": whole.state_dict(), "optimizer": FlatContainer(opt)}, checkpoint_id=tmp_path)
    model, new = make()
    if made:
        init_optim_state(new)
    weights = model.state_dict()
    dcp.load({"model": weights, "optimizer": FlatContainer(new)}, checkpoint_id=tmp_path)
    new.set_anchor(task=1)  # in the middle of the task: the loaded one is kept
    assert new.param_groups[0]["anchored"] == 2
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(opt.state[p]["anchor"], new.state[q]["anchor"])
    train(whole, opt, 3)
    train(model, new, 3)
    assert torch.equal(whole.weight, model.weight)


# -- state put there by hand ---------------------------------------------------------------------

STRANGE = {
    "text": ("x", TypeError),
    "a number": (1.0, TypeError),
    "integers": (torch.ones(2, dtype=torch.int64), TypeError),
    "expanded": (torch.ones(1).expand(2), ValueError),
    "meta": (torch.ones(2, device="meta"), ValueError),
    "negated": (torch._neg_view(torch.ones(2)), ValueError),
    "complex": (torch.ones(2) * 1j, TypeError),
    "sparse": (torch.ones(2).to_sparse(), ValueError),
    "another shape": (torch.ones(3), ValueError),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["exp_avg", "anchor"])
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_state_is_named_and_nothing_is_stepped(kind, name, backend):
    value, error = STRANGE[kind]
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = dgg.AdamW(params, lr=0.1, alpha=1.0, backend=backend)
    opt.set_anchor()
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(2)
        opt.step()
    good = opt.state[params[1]][name]
    opt.state[params[1]][name] = value
    weights = [p.detach().clone() for p in params]
    with pytest.raises(
        error, match=rf"{name}.*parameter 1 of group 0|parameter 1 of group 0.*{name}"
    ):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    opt.state[params[1]][name] = good
    opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, value", [
    ("eps", None), ("eps", "x"), ("lr", "x"), ("weight_decay", None), ("amsgrad", "x"),
    ("maximize", "x"), ("betas", ("x", 0.9)),
])  # fmt: skip
def test_options_of_a_wrong_type_are_named_before_anything_changes(name, value, backend):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = dgg.AdamW([{"params": [p]}, {"params": [q]}], lr=0.1, backend=backend)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    good = opt.param_groups[1][name]
    opt.param_groups[1][name] = value
    with pytest.raises(TypeError, match=name):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(2)) and not opt.state
    opt.param_groups[1][name] = good
    opt.step()


class TestOptionsBetweenSteps:
    """Options are worked out again where a group holds another object, or one that can change."""

    @staticmethod
    def pair(**options):
        torch.manual_seed(3)
        start = torch.randn(8)
        made = []
        for cls in (dgg.AdamW, torch.optim.AdamW):
            param = torch.nn.Parameter(start.clone())
            param.grad = torch.ones(8)
            optimizer = cls([param], **options)
            optimizer.step()
            optimizer.step()
            made.append((param, optimizer))
        return made

    @pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
    def test_another_number_counts_at_once(self, name):
        made = self.pair(lr=1e-2)
        for _, optimizer in made:
            optimizer.param_groups[0][name] = 0.3
            optimizer.step()
        torch.testing.assert_close(made[0][0], made[1][0])

    def test_a_list_written_in_place_counts_at_once(self):
        made = self.pair(lr=1e-2)
        for _, optimizer in made:
            optimizer.param_groups[0]["betas"] = [0.5, 0.9]
            optimizer.step()
        for param, optimizer in made:
            optimizer.param_groups[0]["betas"][0] = 0.1
            param.grad = -torch.ones(8)
            optimizer.step()
        torch.testing.assert_close(made[0][0], made[1][0])

    def test_a_tensor_written_in_place_counts_at_once(self):
        param = torch.nn.Parameter(torch.zeros(8))
        optimizer = dgg.AdamW([param], lr=1e-2)
        param.grad = torch.ones(8)
        optimizer.set_anchor()
        optimizer.param_groups[0]["alpha"] = alpha = torch.tensor(0.0)
        optimizer.step()
        optimizer.step()
        assert not optimizer.guidance_stats()["injected"]
        alpha.fill_(1.0)
        optimizer.step()
        assert optimizer.guidance_stats()["injected"]
        alpha.fill_(2.0)
        with pytest.raises(ValueError, match="alpha"):
            optimizer.step()

    def test_an_option_taken_out_is_missed(self):
        ((_, optimizer), _) = self.pair()
        del optimizer.param_groups[0]["eps"]
        with pytest.raises(KeyError, match="eps"):
            optimizer.step()

    def test_amsgrad_turned_on_between_steps_makes_its_state(self):
        made = self.pair(lr=1e-2)
        _, optimizer = made[0]
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.step()
        assert "max_exp_avg_sq" in optimizer.state[made[0][0]]

    @pytest.mark.parametrize("name", ["lr", "eps", "betas", "maximize"])
    def test_an_option_put_back_is_looked_at_again(self, name):
        """A step that missed it has kept the others."""
        made = self.pair(lr=1e-2)
        param, optimizer = made[0]
        value = optimizer.param_groups[0].pop(name)
        with pytest.raises(KeyError, match=name):
            optimizer.step()
        optimizer.param_groups[0][name] = value
        changed = {"lr": 0.5, "eps": 0.3, "betas": (0.1, 0.2), "maximize": True}[name]
        for _, each in made:
            each.step()
            each.param_groups[0][name] = changed
            each.step()
        torch.testing.assert_close(made[0][0], made[1][0])
        del optimizer.param_groups[0][name]
        with pytest.raises(KeyError, match=name):
            optimizer.step()

    def test_groups_that_agree_about_the_draw_are_not_read_again(self, monkeypatch):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = dgg.SGD([{"params": [p]} for p in params], lr=0.1)
        for p in params:
            p.grad = torch.ones(2)
        for group in optimizer.param_groups:
            group["draw_index"] = 1000
        optimizer.step()
        monkeypatch.setattr(options.Options, "_read_draws", None)  # not to be called
        optimizer.step()
        assert [group["draw_index"] for group in optimizer.param_groups] == [1002, 1002]

    @pytest.mark.parametrize("kind", [np.float64, np.float32])
    def test_pairs_of_numpy_become_numbers_of_python(self, kind, tmp_path):
        pair = (kind(0.5), kind(0.75))
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        for optimizer in (dgg.AdamW([param], betas=pair), dgg.AdamW([param])):
            optimizer.param_groups[0]["betas"] = list(pair)
            optimizer.step()
            torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
            saved = torch.load(tmp_path / "saved.pt", weights_only=True)
            assert list(saved["param_groups"][0]["betas"]) == [0.5, 0.75]
