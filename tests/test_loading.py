# SPDX-License-Identifier: BSD-3-Clause
"""load_state_dict: what is not its own is refused by name; an error leaves all as it was."""

import copy
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import dgg
from cases import BACKENDS


def stepped(opt, steps=2):
    for step in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1.0 + step)
        opt.step()


def make(cls=dgg.AdamW, *, dtype=torch.float32, shapes=((2,), (3, 2)), **options):
    params = [Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
    opt = cls(params, lr=0.1, **options)
    stepped(opt)
    if hasattr(opt, "set_anchor"):
        opt.set_anchor()
        stepped(opt)
    return params, opt


def everything(opt):
    """Bits of all that an optimizer is, by identity where it holds objects."""
    entries = [
        (name, id(value), value.clone() if isinstance(value, torch.Tensor) else value)
        for p in opt.state
        for name, value in opt.state[p].items()
    ]
    weights = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return entries, weights, groups


def assert_same(before, after):
    assert [(n, i) for n, i, _ in before[0]] == [(n, i) for n, i, _ in after[0]]
    for (_, _, a), (_, _, b) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


def entry(name, value):
    def change(saved):
        saved["state"][0][name] = value

    return change


def group(name, value):
    def change(saved):
        saved["param_groups"][0][name] = value

    return change


def without(kind, name):
    def change(saved):
        del (saved["state"][0] if kind == "state" else saved["param_groups"][0])[name]

    return change


# name: (change, error, says)
WRONG = {
    "no step": (without("state", "step"), ValueError, "no step of parameter 0"),
    "no first moment": (without("state", "exp_avg"), ValueError, "no exp_avg of parameter 0"),
    "no second moment": (without("state", "exp_avg_sq"), ValueError, "no exp_avg_sq"),
    "no second moment but None": (entry("exp_avg_sq", None), ValueError, "no exp_avg_sq"),
    "step of text": (entry("step", "x"), ValueError, "step of parameter 0"),
    "step of two": (entry("step", torch.zeros(2)), ValueError, "step of parameter 0"),
    "step in a list": (entry("step", [1]), ValueError, "step of parameter 0"),
    "step too large": (entry("step", 10**400), ValueError, "step of parameter 0"),
    "step below 0": (entry("step", -1), ValueError, "step of parameter 0"),
    "half a step": (entry("step", 0.5), ValueError, "step of parameter 0"),
    "step is NaN": (entry("step", math.nan), ValueError, "step of parameter 0"),
    "step is True": (entry("step", True), ValueError, "step of parameter 0"),
    "step on meta": (entry("step", torch.zeros((), device="meta")), ValueError, "step"),
    "moment of text": (entry("exp_avg", "x"), TypeError, "exp_avg of parameter 0.*str"),
    "moment in a list": (entry("exp_avg", [0.0, 0.0]), TypeError, "exp_avg.*list"),
    "moment of codes": (entry("exp_avg", torch.zeros(2).byte()), TypeError, "convert_state_dict"),
    "complex moment": (entry("exp_avg", torch.zeros(2) * 1j), TypeError, "exp_avg"),
    "moment on meta": (entry("exp_avg", torch.zeros(2, device="meta")), ValueError, "meta"),
    "sparse moment": (entry("exp_avg", torch.zeros(2).to_sparse()), ValueError, "exp_avg.*sparse"),
    "moment of a shape": (entry("exp_avg_sq", torch.zeros(3)), ValueError, r"\(3,\)"),
    "anchor of text": (entry("anchor", "x"), TypeError, "anchor.*str"),
    "anchor of a shape": (
        entry("anchor", torch.zeros(3)),
        ValueError,
        "the anchor given for parameter 0 of group 0 has shape",
    ),
    "the second moment alone": (
        lambda s: (s["state"].pop(0), s["state"][1].pop("exp_avg")),
        ValueError,
        "no exp_avg of parameter 1",
    ),
    "anchor with NaN": (entry("anchor", torch.full((2,), math.nan)), ValueError, "finite"),
    "anchor on meta": (entry("anchor", torch.zeros(2, device="meta")), ValueError, "meta"),
    "lost anchor": (without("state", "anchor"), RuntimeError, "lost on the way"),
    "master unasked": (entry("master", torch.zeros(2)), ValueError, "master_weights=True"),
    "entry of text": (lambda s: s["state"].update({0: "x"}), TypeError, "parameter 0.*str"),
    "entry in a list": (lambda s: s["state"].update({0: [1]}), TypeError, "parameter 0.*list"),
    "no lr": (without("group", "lr"), ValueError, "group 0.*no lr"),
    "no betas": (without("group", "betas"), ValueError, "group 0.*no betas"),
    "no alpha": (without("group", "alpha"), ValueError, "group 0.*no alpha"),
    "lr of text": (group("lr", "x"), TypeError, "lr='x'"),
    "lr below 0": (group("lr", -1.0), ValueError, "lr=-1.0"),
    "lr of two": (group("lr", torch.ones(2)), TypeError, "lr"),
    "one beta": (group("betas", (0.9,)), ValueError, "betas"),
    "beta of 1": (group("betas", (0.9, 1.0)), ValueError, "betas"),
    "eps is None": (group("eps", None), TypeError, "eps=None"),
    "amsgrad of text": (group("amsgrad", "x"), TypeError, "amsgrad"),
    "amsgrad without its state": (group("amsgrad", True), ValueError, "max_exp_avg_sq"),
    "alpha of 3": (group("alpha", 3.0), ValueError, "alpha"),
    "alpha of text": (group("alpha", "x"), TypeError, "alpha"),
    "seed of text": (group("seed", "x"), TypeError, "seed"),
    "draw index of two": (group("draw_index", torch.zeros(2).long()), TypeError, "draw_index"),
    "draw index of floats": (group("draw_index", torch.zeros(())), TypeError, "draw_index"),
    "draw index below 0": (group("draw_index", -1), ValueError, "draw_index"),
    "draw index too large": (group("draw_index", 1 << 63), ValueError, "draw_index"),
    "draw index on meta": (
        group("draw_index", torch.zeros((), dtype=torch.int64, device="meta")),
        TypeError,
        "draw_index",
    ),
    "anchored of text": (group("anchored", "x"), TypeError, "anchored"),
    "norm_scope in a list": (group("norm_scope", ["global"]), ValueError, "norm_scope"),
    "groups in a dict": (lambda s: s.update(param_groups={}), TypeError, "param_groups"),
    "group without params": (without("group", "params"), TypeError, "group 0"),
    "group in a list": (lambda s: s.update(param_groups=[[]]), TypeError, "group 0"),
    "state in a list": (lambda s: s.update(state=[]), TypeError, "state"),
    "a parameter twice": (group("params", [0, 0]), ValueError, "twice"),
    "params in lists": (group("params", [[0], [1]]), TypeError, "params"),
    "another number": (group("params", [0]), ValueError, "hold"),
    "names too few": (group("param_names", ["a"]), ValueError, "param_names"),
    "names of numbers": (group("param_names", [1, 2]), ValueError, "param_names"),
    "state by text": (
        lambda s: s.update(state={str(k): v for k, v in s["state"].items()}),
        ValueError,
        "would be lost",
    ),
    "alpha on meta": (group("alpha", torch.tensor(0.5, device="meta")), TypeError, "alpha"),
    "sparse max_grad_norm": (
        group("max_grad_norm", torch.eye(1).to_sparse()),
        TypeError,
        "max_grad_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_and_nothing_changes(kind):
    change, error, says = WRONG[kind]
    params, opt = make()
    with opt.replay():
        params[0].grad = torch.ones(2)
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    before = everything(opt)
    with pytest.raises(error, match=says):
        opt.load_state_dict(saved)
    assert_same(before, everything(opt))
    # The next step is that of one that was never asked.
    others, other = make()
    with other.replay():
        others[0].grad = torch.ones(2)
    for o in (opt, other):
        stepped(o, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("value", ["x", [1.0], torch.zeros(2, device="meta"), torch.zeros(3)])
def test_a_wrong_master_is_named_and_nothing_changes(value):
    _, opt = make(dtype=torch.bfloat16, master_weights=True)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["master"] = value
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match="master of parameter 0"):
        opt.load_state_dict(saved)
    assert_same(before, everything(opt))
    stepped(opt, 1)


def foreign(kind):
    """A state dict of another optimizer's, over parameters like those of `make`."""
    if kind in ("adamax", "sgd", "nadam", "rmsprop", "adadelta"):
        cls = {"adamax": torch.optim.Adamax, "sgd": torch.optim.SGD, "nadam": torch.optim.NAdam,
               "rmsprop": torch.optim.RMSprop, "adadelta": torch.optim.Adadelta}[kind]  # fmt: skip
        return make(cls, **({"momentum": 0.9} if kind == "sgd" else {}))[1].state_dict()
    saved = make(torch.optim.AdamW)[1].state_dict()
    for state in saved["state"].values():
        state["step"] = 2
        state["state1"], state["state2"] = state.pop("exp_avg"), state.pop("exp_avg_sq")
        if kind == "bitsandbytes 8 bit":
            state["state1"], state["state2"] = state["state1"].byte(), state["state2"].byte()
    return saved


@pytest.mark.parametrize(
    "kind",
    ["adamax", "sgd", "rmsprop", "adadelta", "bitsandbytes", "bitsandbytes 8 bit"],
)
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_state_of_another_optimizer_is_refused(cls, kind):
    options = {"momentum": 0.9} if cls is dgg.SGD else {}
    if (cls, kind) == (dgg.SGD, "sgd"):
        pytest.skip("its own class's")
    params, opt = make(cls, **options)
    opt.clear_anchor()
    before = everything(opt)
    with pytest.raises(ValueError, match="another optimizer's.*convert_state_dict"):
        opt.load_state_dict(foreign(kind))
    assert_same(before, everything(opt))


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.SGD, dgg.Guidance])
@pytest.mark.parametrize("grouped", [False, True])
def test_names_in_another_order_are_refused(cls, grouped):
    """State goes by place: anchors and moments would land on parameters of the same shape."""

    def build(named):
        named = [{"params": [each]} for each in named] if grouped else named
        if cls is not dgg.Guidance:
            opt = cls(named, lr=0.1)
            return opt, opt
        opt = torch.optim.SGD(named, lr=0.1)
        return opt, dgg.Guidance(opt)

    named = [(name, Parameter(torch.ones(2))) for name in "abc"]
    opt, guide = build(named)
    stepped(opt)
    guide.set_anchor()
    other, loads = build([named[0], named[2], named[1]])
    place = "parameter 0 of group 1" if grouped else "parameter 1 of group 0"
    with pytest.raises(ValueError, match=f"{place} is 'b' in the state dict and 'c' in the opti"):
        loads.load_state_dict(guide.state_dict())
    assert not loads.state
    if cls is dgg.Guidance:
        return
    saved = guide.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]  # as every checkpoint was before torch had names: by place
    loads.load_state_dict(saved)
    # A model in a wrapper has other names. The optimizer keeps its own, those of its model.
    _, loads = build([(f"module.{name}", p) for name, p in named])
    loads.load_state_dict(guide.state_dict())
    loads.set_anchor({f"module.{name}": torch.full((2,), float(i)) for i, name in enumerate("abc")})
    assert [loads.state[p]["anchor"][0] for _, p in named] == [0, 1, 2]


def test_a_state_dict_by_name_may_have_its_list_of_names_in_another_order():
    """torch's helper for distributed checkpoints puts the keys in order, and leaves the list."""
    named = [(name, Parameter(torch.full((2,), 1.0 + i))) for i, name in enumerate("ab")]
    opt = dgg.AdamW(named)
    opt.set_anchor()
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = ["b", "a"]
    saved["state"] = {"a": saved["state"][0], "b": saved["state"][1]}
    other = dgg.AdamW(named[::-1])
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["b", "a"]
    for _, p in named:
        assert torch.equal(other.state[p]["anchor"], p)


def test_sgd_with_momentum_refuses_an_entry_without_its_buffer():
    _, opt = make(dgg.SGD, momentum=0.9)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["state1"] = saved["state"][0].pop("momentum_buffer")
    with pytest.raises(ValueError, match="no momentum_buffer of parameter 0"):
        opt.load_state_dict(saved)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["momentum_buffer"]  # an anchor alone: no step yet
    opt.load_state_dict(saved)


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_what_torch_saves_is_loaded(cls):
    name = cls.__name__
    options = {"momentum": 0.9} if cls is dgg.SGD else {}
    theirs = getattr(torch.optim, name)
    params, other = make(theirs, **options)
    saved = copy.deepcopy(other.state_dict())
    mine = [Parameter(p.detach().clone()) for p in params]
    opt = cls(mine, lr=0.5, **options)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["alpha"] == 0.2 and opt.param_groups[0]["lr"] == 0.1
    for o in (other, opt):
        stepped(o, 3)
    for p, q in zip(params, mine, strict=True):
        torch.testing.assert_close(p, q)


def test_what_older_releases_of_torch_have_not_saved_is_filled_in():
    params, other = make(torch.optim.AdamW)
    saved = copy.deepcopy(other.state_dict())
    for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
                 "decoupled_weight_decay"):  # fmt: skip
        del saved["param_groups"][0][name]
    for state in saved["state"].values():
        state["step"] = 2  # an int, as before torch 1.12
    opt = dgg.AdamW([Parameter(p.detach().clone()) for p in params], lr=0.1)
    opt.load_state_dict(saved)
    stepped(opt, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind",
    [
        "expanded",
        "shared",
        "negated",
        "negated float64",
        "a weight's",
        "steps shared",
        "step negated",
    ],
)
def test_moments_get_memory_of_their_own(backend, kind):
    params, opt = make(backend=backend)
    saved = copy.deepcopy(opt.state_dict())
    expected = copy.deepcopy(saved)
    first, second = saved["state"][0], saved["state"][1]
    if kind == "expanded":
        first["exp_avg"] = torch.ones(1).expand(2)
        expected["state"][0]["exp_avg"] = torch.ones(2)
    elif kind == "shared":
        first["exp_avg"] = first["exp_avg_sq"]
        expected["state"][0]["exp_avg"] = expected["state"][0]["exp_avg_sq"].clone()
    elif kind == "negated":
        first["exp_avg"] = torch._neg_view(torch.ones(2))
        expected["state"][0]["exp_avg"] = -torch.ones(2)
    elif kind == "negated float64":
        first["exp_avg"] = torch._neg_view(torch.ones(2).double())
        expected["state"][0]["exp_avg"] = -torch.ones(2)
    elif kind == "step negated":
        first["step"] = torch._neg_view(torch.tensor(-4.0))
        expected["state"][0]["step"] = torch.tensor(4.0)
    elif kind == "steps shared":
        second["step"] = first["step"]
    found = []
    for given in (saved, expected):
        fresh, opt = make(backend=backend)
        if kind == "a weight's":
            value = fresh[0].data
            given["state"][0]["exp_avg_sq"] = value if given is saved else value.clone()
        opt.load_state_dict(given)
        stepped(opt, 2)
        found.append(everything(opt))
    for (_, _, a), (_, _, b) in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_moments_that_are_shared_beside_what_is_none():
    """Entries that are no dict, and counts that are no tensors, are passed over one by one."""
    _, source = make()
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0]["anchored"] = 0
    common = torch.ones(2)
    state = {"noted": 1}
    for key, value in ((0, common), (1, torch.ones(3, 2))):
        state[key] = {"step": 2, "max_exp_avg_sq": None, "exp_avg": value, "exp_avg_sq": value}
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3, 2))]
    opt = dgg.AdamW(params, lr=0.1)
    opt.load_state_dict({**saved, "state": state})
    assert opt.state["noted"] == 1
    for p in params:
        first, second = opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    # Memory that nobody else has is taken as it is, as torch takes it: no second copy.
    assert opt.state[params[0]]["exp_avg"].data_ptr() == common.data_ptr()
    stepped(opt, 1)
    saved = copy.deepcopy(source.state_dict())
    opt.load_state_dict(saved)
    for p, given in zip(params, saved["state"].values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert opt.state[p][name].data_ptr() == given[name].data_ptr()


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_is_known_of_what_is_empty(nothing):
    """torch's helpers put empty dicts where a flattened state dict has nothing."""
    _, source = make()
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0]["anchored"] = 1
    saved["state"][0] = nothing
    saved["state"][1]["max_exp_avg_sq"] = {}
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3, 2))]
    opt = dgg.AdamW(params, lr=0.1)
    opt.load_state_dict(saved)
    assert params[0] not in opt.state
    assert set(opt.state[params[1]]) == {"step", "exp_avg", "exp_avg_sq", "anchor"}
    stepped(opt, 1)


def test_a_state_that_does_not_say_amsgrad_is_without():
    _, source = make()
    source.clear_anchor()
    saved = copy.deepcopy(source.state_dict())
    oldest = ("params", "lr", "betas", "eps", "weight_decay")  # torch's of the year 2017
    group = saved["param_groups"][0]
    saved["param_groups"] = [{name: group[name] for name in oldest}]
    _, opt = make(amsgrad=True)
    opt.clear_anchor()
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["amsgrad"] is False


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax"])
@pytest.mark.parametrize("stepped_before", [True, False])
def test_relatives_of_adam_are_another_optimizer(name, stepped_before):
    """Their groups have what is newer than amsgrad, and no amsgrad."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    source = getattr(torch.optim, name)([param])
    if stepped_before:
        source.step()
    for cls in (dgg.AdamW, dgg.Adam):
        opt = cls([param], lr=0.1)
        with pytest.raises(ValueError, match="no amsgrad: it is another optimizer's"):
            opt.load_state_dict(source.state_dict())
        assert not opt.state and opt.param_groups[0]["lr"] == 0.1


def test_a_count_of_steps_is_no_moment():
    """bfloat16 has no 257."""
    _, source = make()
    saved = copy.deepcopy(source.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(257.0)
    _, opt = make(state_dtype=torch.bfloat16)
    opt.load_state_dict(saved)
    for p in opt.param_groups[0]["params"]:
        assert opt.state[p]["step"] == 257 and opt.state[p]["step"].dtype == torch.float32
        assert opt.state[p]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["anchor_dtype", "state_dtype"])
def test_a_dtype_that_complex_parameters_have_not_is_named(kind):
    def build(**options):
        return dgg.AdamW([Parameter(torch.ones(2, dtype=torch.complex64))], **options)

    opt = build(**{kind: torch.bfloat16})
    with pytest.raises(TypeError, match="^a parameter is complex and.*bfloat16"):
        if kind == "anchor_dtype":
            opt.prepare_for_load()
        else:
            source = build()
            stepped(source)
            opt.load_state_dict(source.state_dict())
    assert kind == "anchor_dtype" or not opt.state


def test_parameters_without_shape_or_memory_of_their_own():
    """Lazy ones, and those that a library keeps in other tensors."""
    lazy = torch.nn.LazyLinear(2)
    pair = Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    for params in (lazy.parameters(), [pair]):
        opt = dgg.AdamW(params, lr=0.1)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_state_goes_where_the_parameters_and_anchors_are():
    """The meta device stands for a GPU, and for the host beside one."""
    _, source = make()
    saved = copy.deepcopy(source.state_dict())
    far = [Parameter(torch.ones(s, device="meta")) for s in ((2,), (3, 2))]
    opt = dgg.AdamW(far, lr=0.1, state_dtype=torch.float64)
    opt.load_state_dict(saved)
    for p in far:
        assert {opt.state[p][name].device.type for name in ("exp_avg", "anchor")} == {"meta"}
    for load in (True, False):
        near = [Parameter(torch.ones(s)) for s in ((2,), (3, 2))]
        opt = dgg.AdamW(near, lr=0.1)
        opt._settings = dataclasses.replace(opt._settings, anchor_device=torch.device("meta"))
        opt.load_state_dict(saved) if load else opt.prepare_for_load()
        for p in near:
            assert opt.state[p]["anchor"].device.type == "meta"
            assert opt.state[p]["exp_avg"].device.type == "cpu"


def test_hooks_run_around_everything():
    """One before may repair the state, one behind sees all of it; a failing one leaves no trace."""
    _, opt = make()
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = str(int(state["step"]))
    seen = []

    def repair(optimizer, state_dict):
        assert optimizer is opt
        state = {k: {**v, "step": float(v["step"])} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    handle = opt.register_load_state_dict_pre_hook(repair)
    looks = opt.register_load_state_dict_pre_hook(lambda *_: None)
    opt.register_load_state_dict_post_hook(
        lambda o: seen.append(all("anchor" in o.state[p] for p in o.state))
    )
    opt.load_state_dict(saved)
    assert seen == [True] and len(opt._optimizer_load_state_dict_pre_hooks) == 2
    handle.remove()
    looks.remove()

    def fail(_):
        raise ZeroDivisionError

    opt.register_load_state_dict_post_hook(fail)
    before = everything(opt)
    with pytest.raises(ZeroDivisionError):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(before, everything(opt))
    assert len(opt._optimizer_load_state_dict_post_hooks) == 2
    stepped(opt, 1)


def test_a_load_that_torch_breaks_off_leaves_no_trace(monkeypatch):
    _, opt = make()
    before = everything(opt)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", fail)
    with pytest.raises(MemoryError):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(before, everything(opt))


def test_model_that_was_made_wide_loads_its_own_state():
    model = torch.nn.Linear(3, 2).bfloat16()
    opt = dgg.AdamW(model.parameters(), lr=0.1, master_weights=True)
    stepped(opt)
    model.float()
    opt.load_state_dict(opt.state_dict())
    assert all("master" not in opt.state[p] for p in model.parameters())
    stepped(opt)
    assert all("master" not in opt.state[p] for p in model.parameters())
    opt.load_state_dict(opt.state_dict())
    model.bfloat16()
    stepped(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(opt.state[p]["master"].dtype == torch.float32 for p in model.parameters())


# -- numbers of numpy's --------------------------------------------------------------------------

NUMPY = {
    "lr": np.float64(0.1), "betas": (np.float64(0.9), np.float32(0.875)), "eps": np.float64(1e-8),
    "weight_decay": np.float32(0.5), "alpha": np.float32(0.25), "strength": np.array(0.5),
    "max_grad_norm": np.float64(2.0), "replay_weight": np.array([0.5]), "seed": np.int64(5),
    "amsgrad": np.bool_(True), "scaling": np.bool_(True),
}  # fmt: skip


def plain(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("where", ["constructor", "group", "added group", "by hand"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_numpy_are_numbers(where, backend):
    same = {k: v.item() if k != "betas" else tuple(x.item() for x in v) for k, v in NUMPY.items()}
    runs = []
    for options in (NUMPY, same):
        params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
        own = {k: v for k, v in options.items() if k in dgg._arguments.OPTIMIZER_OPTIONS}
        others = {k: v for k, v in options.items() if k not in own}
        if where == "constructor":
            opt = dgg.AdamW(params, backend=backend, **options)
        elif where == "group":
            opt = dgg.AdamW([{"params": params, **others}], backend=backend, **own)
        elif where == "added group":
            opt = dgg.AdamW(params[:1], backend=backend, **own, **same_kind(others))
            opt.add_param_group({"params": params[1:], **others})
        else:
            opt = dgg.AdamW(params, backend=backend)
            for name, value in options.items():
                opt.param_groups[0][name] = value
        opt.set_anchor()
        for p in params:
            p.data.add_(0.5)
        stepped(opt)
        saved = plain(opt.state_dict())
        assert saved["param_groups"][0]["seed"] == 5
        opt.load_state_dict(saved)
        stepped(opt, 1)
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def same_kind(options):
    return {k: v for k, v in options.items() if k == "amsgrad"}


def test_numbers_of_numpy_in_sgd_guidance_and_tasks():
    params = [Parameter(torch.ones(2))]
    opt = dgg.SGD(
        params, lr=np.float64(0.1), momentum=np.float32(0.5), dampening=np.array(0.25),
        nesterov=np.bool_(False), weight_decay=np.float64(0.1), seed=np.uint64(2**64 - 1),
    )  # fmt: skip
    opt.set_anchor(task=np.int64(1))
    stepped(opt)
    saved = plain(opt.state_dict())
    assert type(saved["param_groups"][0]["task_index"]) is int
    assert saved["param_groups"][0]["seed"] == 2**64 - 1
    guidance = dgg.Guidance(
        torch.optim.SGD(params, lr=0.1), alpha=np.float32(1), seed=np.int32(3),
        max_grad_norm=np.array(1.0),
    )  # fmt: skip
    guidance.set_anchor(task=np.int64(1))
    stepped(guidance.optimizer)
    guidance.param_groups[0]["alpha"] = np.float64(0.5)
    saved = plain(guidance.state_dict())
    assert saved["param_groups"][0]["alpha"] == 0.5 and saved["param_groups"][0]["seed"] == 3
    guidance.load_state_dict(saved)


@pytest.mark.parametrize("value", [np.array([0.1, 0.2]), np.array("x"), np.array([])])
def test_arrays_that_are_no_number_are_refused(value):
    with pytest.raises((TypeError, ValueError), match="alpha"):
        dgg.AdamW([Parameter(torch.ones(2))], alpha=value)


@pytest.mark.parametrize("value", ["x", -1, 1 << 63, 1.5, None, torch.zeros(2).long()])
def test_a_draw_index_set_to_nonsense_is_named(value):
    params, opt = make()
    good = opt.param_groups[0]["draw_index"]
    opt.param_groups[0]["draw_index"] = value
    weights = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError), match="draw_index"):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    opt.param_groups[0]["draw_index"] = np.int64(good)
    opt.step()
    assert type(opt.param_groups[0]["draw_index"]) is int


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_that_are_tensors_must_agree_and_be_one_number(backend):
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    opt = dgg.AdamW([{"params": [p]} for p in params], lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones(2)
    opt.param_groups[1]["max_grad_norm"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match="max_grad_norm is one setting"):
        opt.step()
    opt.param_groups[0]["max_grad_norm"] = torch.tensor([0.5])
    opt.step()
    assert opt.guidance_stats()["clip"] < 1
    for wrong in (torch.ones(2), torch.tensor(1.0, device="meta"), torch.tensor(1)):
        opt.param_groups[0]["alpha"] = wrong
        with pytest.raises(TypeError, match="alpha=a tensor"):
            opt.step()


def test_an_anchor_of_a_lazily_negated_tensor_has_its_sign():
    param = Parameter(torch.ones(3))
    opt = dgg.AdamW([("p", param)])
    opt.set_anchor({"p": torch._neg_view(-torch.ones(3).half())})
    assert torch.equal(opt.state[param]["anchor"], torch.ones(3))


@pytest.mark.parametrize("cls", [dgg.SGD, dgg.AdamW])
def test_a_parameter_frozen_after_its_replay_is_stepped(cls):
    """As torch steps a frozen parameter that has a gradient."""
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opt = cls([p, q], lr=1.0)
    with opt.replay():
        p.sum().backward()
    p.requires_grad_(False)
    opt.step()
    assert not torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("anchors", ["x", 3, {True: torch.ones(2)}, {1.0: torch.ones(2)}, [1]])
def test_anchors_of_a_guidance_that_are_no_dict_by_number_are_refused(anchors):
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    guidance = dgg.Guidance(torch.optim.SGD(params, lr=0.1))
    saved = {**guidance.state_dict(), "anchors": anchors}
    with pytest.raises((TypeError, KeyError), match="guidance.state_dict"):
        guidance.load_state_dict(saved)


def test_amsgrad_switched_on_is_in_its_own_state_dict():
    _, opt = make()
    opt.param_groups[0]["amsgrad"] = True
    saved = opt.state_dict()
    assert all("max_exp_avg_sq" in entry for entry in saved["state"].values())
    opt.load_state_dict(saved)
    stepped(opt, 1)


@pytest.mark.parametrize("step", [torch.tensor(3.0), torch.tensor(3), 3])
def test_one_count_of_two_parameters_becomes_one_for_each(step):
    """Universal checkpoints give every parameter one and the same tensor, of whatever dtype."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = dgg.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(2)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    opt.load_state_dict(saved)
    counts = [opt.state[p]["step"] for p in params]
    assert counts[0] is not counts[1] and all(x.dtype == torch.float32 for x in counts)
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [4, 4]
