# SPDX-License-Identifier: BSD-3-Clause
"""Loading, from every side, in a world of this process alone.

`test_checkpoints.py` saves and resumes on several ranks. Most of what `load_state_dict`,
`prepare_for_load` and torch's checkpoint helpers need of dgg takes no second rank to be seen, and
here no process is started: seconds for all of it. ``make mutate`` holds these tests, with those of
loading, against every line of ``dgg/checkpoint/load.py and room.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)  # fmt: skip
from torch.nn import Parameter

import checkpoint_worker as worker
import dgg
from cases import BF16, F16, F32, F64
from dgg import _imitable, sharding
from dgg.checkpoint import load as loading
from dgg.checkpoint import room
from dgg.checkpoint.source import Source

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.filterwarnings("ignore:the first step found no gradient"),
]
GUIDED = {"lr": 0.1, "alpha": 0.6, "max_grad_norm": 0.5, "seed": 5}
FULL, FLAT = {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}
# The other cases of `test_checkpoints.py` take no other way through a world of one.
RESUMED = ["adamw, two groups", "adamw, master", "adamw, no anchor yet", "sgd, no step yet"]
FROM_0 = {"full_state_dict": True, "broadcast_from_rank0": True}


@pytest.fixture(scope="module")
def world():
    # One thread for what is saved, too: the sums of a layer norm's gradients depend on it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Gloo without a network: nobody else is there.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """What the worker of `test_checkpoints.py` leaves of a training on one rank."""
    folder = tmp_path_factory.mktemp("saved")
    pathlib.Path(folder, "world").write_text("1")
    worker.save_all(0, 1, folder, RESUMED, ["nested", "flat", "full", "numbered"])
    return folder


@pytest.mark.parametrize("form", worker.FORMATS)
@pytest.mark.parametrize("case", RESUMED)
def test_cases_go_on_from_every_format(case, form, saved, tmp_path):
    worker.resume_all(0, 1, tmp_path, saved, [case], [form])


@pytest.mark.parametrize("name", ["refusals", "frozen", "helper", "torch"])
def test_as_on_several_ranks(name, tmp_path):
    getattr(worker, f"run_{name}")(0, 1, tmp_path)


# -- what is asked for by itself ------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "case", ["adamw", "adamw, two groups", "adamw, bf16", "adamw, master", "sgd"]
)
def test_a_load_that_asks_for_the_template_gets_room(case, early, tmp_path):
    model, opt = worker.build(case)
    worker.train(case, model, opt, 0, 5)
    worker.save_as("nested", f"{tmp_path}/saved", case, model, opt)
    expected = worker.snapshot(model, opt)
    model, again = worker.build(case, seed=11)
    if early:  # the state is there before it is known what will be loaded into it
        get_optimizer_state_dict(model, again, options=worker.options_of("nested", case))
    worker.load_from("stateful", f"{tmp_path}/saved", case, model, again)
    assert not worker.differences(worker.snapshot(model, again), expected)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("rows", [None, "of DeepSpeed's"])
@pytest.mark.parametrize("awaits", [False, True])
@pytest.mark.parametrize("known", ["nothing", "broadcast", "a checkpoint"])
def test_room_is_made_late_of_a_template_alone(template, rows, awaits, known, monkeypatch):
    """A state that a helper made before it was known what is to be loaded into it."""
    origin = Source(None, "here", broadcast=known == "broadcast")
    monkeypatch.setattr(loading, "of_template", lambda: None if known == "nothing" else origin)
    params, opt = guided()
    opt._template, opt._cache, opt._awaits_load = template, rows, awaits
    asked = []
    monkeypatch.setattr(room, "make_room_for", lambda _, origin: asked.append(origin))
    opt.state_dict()
    late = template and rows is None and not awaits and known == "a checkpoint"
    assert asked == ([origin] if late else [])


@pytest.fixture
def trained():
    """A guided model, what the helpers make of it, and the state before it was guided."""
    model, opt = worker.build("adamw")
    worker.train("adamw", model, opt, 0, 2)
    options = worker.options_of("full", "adamw")
    unguided = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    worker.train("adamw", model, opt, 2, 5)
    taken = {
        name: get_optimizer_state_dict(model, opt, options=worker.options_of(name, "adamw"))
        for name in ("full", "flat")
    }
    return worker.snapshot(model, opt), taken, unguided


def load(given, **settings):
    model, opt = worker.build("adamw", seed=11)
    set_optimizer_state_dict(model, opt, copy.deepcopy(given), options=StateDictOptions(**settings))
    return model, opt


@pytest.mark.parametrize(("form", "settings"), [("full", FULL), ("full", FROM_0), ("flat", FLAT)])
def test_helpers_bring_the_anchor_along(form, settings, trained, monkeypatch):
    expected, taken, _ = trained
    if settings is not FROM_0:  # other ranks may have nothing to load
        monkeypatch.setattr(room, "_make_room_together", None)
    model, opt = load(taken[form], **settings)
    found = {**worker.snapshot(model, opt), "weights": expected["weights"]}
    assert not worker.differences(found, expected)
    worker.fit(model, opt, 5, 6)


@pytest.mark.parametrize("settings", [FULL, FROM_0])
def test_without_guidance_helpers_do_as_with_torch(settings, trained):
    model, opt = load(trained[2], strict=False, **settings)
    assert all("anchor" not in entry for entry in opt.state.values())
    assert opt.param_groups[0]["draw_index"] == 2
    worker.fit(model, opt, 5, 6)
    assert opt.param_groups[0]["draw_index"] == 3


def lost(state):
    del state["state"]["0.weight"]["anchor"]


def smaller(state):
    state["state"]["0.weight"]["exp_avg"] = torch.zeros(1, 6, dtype=F64)


def another(state):
    state["state"] = {f"inner.{name}": entry for name, entry in state["state"].items()}


def part(state):
    del state["state"]["0.weight"]


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lost, RuntimeError, "they were lost on the way"),
        (smaller, ValueError, r"exp_avg of parameter 1 \(0.weight\) has shape \(1, 6\).*\(8, 6\)"),
        (another, KeyError, r"nothing of parameter 0 \(spare\)"),
        (part, KeyError, r"nothing of parameter 1 \(0.weight\)"),
    ],
)
def test_what_rank_0_can_see_to_be_wrong(spoil, error, text, trained):
    given = copy.deepcopy(trained[1]["full"])
    spoil(given)
    with pytest.raises(error, match=text):
        load(given, **FROM_0)


def test_a_rank_that_cannot_make_room_says_so(trained):
    model, opt = worker.build("adamw", seed=11)
    opt.param_groups[0]["anchored"] = 3
    with pytest.raises(RuntimeError, match="the resume lost them"):
        set_optimizer_state_dict(
            model, opt, copy.deepcopy(trained[1]["full"]), options=StateDictOptions(**FROM_0)
        )
    assert not opt._awaits_load


def test_no_room_together_for_what_has_no_anchor():
    _, opt = guided(steps=0)
    given = {"state": {"a": {"step": torch.ones(()), "exp_avg": torch.ones(2, 3)}}}
    assert room._make_room_together(opt, Source(None, None, given, broadcast=True)) is False
    assert not opt.state and not opt._awaits_load


@pytest.mark.parametrize("told", [{"a": 1}, ("another", []), ("dgg: room for a state dict",), None])
def test_what_rank_0_says_must_be_about_room(told, trained, monkeypatch):
    def broadcast(messages, src):
        assert src == 0
        messages[0] = told

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with pytest.raises(RuntimeError, match=r"prepare_for_load\(\) on all ranks or on none"):
        load(trained[1]["full"], **FROM_0)


def test_other_ranks_errors_are_told(trained, monkeypatch):
    """Of three ranks the last one cannot take it; this one, the second, knows no state dict."""
    asked = []

    def gather(everywhere, mine):
        asked.append((len(everywhere), mine))
        everywhere[:] = [None, None, "no space left"]

    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    held = [{"step": F32, "exp_avg": F64, "exp_avg_sq": F64, "anchor": F64}, {}, {}]
    monkeypatch.setattr(
        dist,
        "broadcast_object_list",
        lambda messages, src: messages.__setitem__(0, ("dgg: room for a state dict", held)),
    )
    monkeypatch.setattr(dist, "all_gather_object", gather)
    params = [Parameter(torch.ones(2, dtype=F64)) for _ in range(3)]
    opt = dgg.AdamW(params, **GUIDED)
    for p in params:
        p.grad = torch.zeros(2, dtype=F64)

    class Source:
        given, model = None, torch.nn.Module()

        def __getattr__(self, name):
            raise AssertionError(f"rank 1 has no {name}")

    with pytest.raises(RuntimeError, match="^rank 2 cannot load: no space left$"):
        room._make_room_together(opt, Source())
    assert asked == [(3, None)]
    assert opt._awaits_load and opt.state[params[0]]["anchor"].isnan().all()
    # What this rank cannot do is its own error, and the others are told.
    other = dgg.AdamW(params[:2], **GUIDED)
    with pytest.raises(ValueError, match="shorter|longer"):
        room._make_room_together(other, Source())
    assert asked[1][0] == 3 and "er than" in asked[1][1]


# -- templates ------------------------------------------------------------------------------------


@pytest.fixture
def template(monkeypatch):
    """Makes a template as torch's helper does, for what is known to be loaded into it."""

    def make(opt, source, held=None):
        monkeypatch.setattr(room, "of_template", lambda: source)
        if held is not None:
            monkeypatch.setattr(room, "_entries_in_checkpoint", lambda *_: held)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        room.make_template(opt)
        assert opt._template and opt.param_groups[0]["draw_index"] == 0

    return make


def test_a_template_has_state_of_what_is_trained(template):
    params, opt = guided(steps=0)
    params[0].requires_grad_(False)
    template(opt, None)
    assert params[0] not in opt.state and set(opt.state[params[1]]) == ADAM


def test_a_template_for_a_state_dict_is_what_it_holds(template):
    params, opt = guided(steps=0)
    given = {"state": {"a": {"step": torch.ones(()), "anchor": torch.ones(2, 3, dtype=F16)}}}
    template(opt, Source(None, None, given))
    assert set(opt.state[params[0]]) == {"step", "anchor"} and params[1] not in opt.state
    assert opt.state[params[0]]["anchor"].dtype == F16


def test_a_template_for_a_checkpoint_has_the_others_too(template):
    """torch refuses a checkpoint without them itself, and names what is missing."""
    params, opt = guided(steps=0)
    template(opt, Source(None, "here"), [{"anchor": F16}, {}])
    assert set(opt.state[params[0]]) == {"anchor"} and set(opt.state[params[1]]) == ADAM


def test_a_template_in_an_engine_asks_nobody(template):
    params, opt = guided(steps=0)
    opt._ownership = sharding.RankShare(opt)
    template(opt, Source(None, None, {"state": []}))
    assert all(set(opt.state[p]) == ADAM for p in params)


@pytest.mark.parametrize(
    ("held", "made"),
    [([{"step": F32, "anchor": F16}, {}], True), ([{"step": F32}, {"exp_avg": F32}], False)],
)
def test_room_for_a_checkpoint_is_made_if_it_has_anchors(held, made, monkeypatch):
    params, opt = guided(steps=0)
    model, asked = torch.nn.Module(), []
    monkeypatch.setattr(
        room, "_entries_in_checkpoint", lambda _, *given: asked.append(given) or held
    )
    assert room.make_room_for(opt, Source(model, "here")) is made
    assert asked == [("here", model)]
    assert opt._awaits_load is made and (params[0] in opt.state) is made


def test_a_checkpoint_that_cannot_be_read_is_left_to_torch(tmp_path):
    _, opt = guided(steps=0)
    assert room.make_room_for(opt, Source(None, tmp_path)) is False
    assert not opt._awaits_load and not opt.state


def test_what_a_state_dict_holds_is_told_by_its_tensors():
    _, opt = guided(steps=0)
    entry = {
        "step": 3.0, "exp_avg": torch.ones(2, 3, dtype=F64), "exp_avg_sq": None,
        "master": torch.ones(2, 3), "anchor": torch.ones(2, 3, dtype=F16), "else": 1,
    }  # fmt: skip
    found = room._entries_in_state_dict(opt, Source(None, None, {"state": {"a": entry}}))
    dtypes = {"step": None, "exp_avg": F64, "exp_avg_sq": None, "master": F32, "anchor": F16}
    assert found == [dtypes, {}]


def test_errors_name_a_parameter_by_its_own_name():
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    opt = dgg.AdamW([("module.a", params[0]), ("b", params[1])], **GUIDED)
    given = {"state": {"a": {"exp_avg": torch.ones(5)}}}
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 \(module.a\) has"):
        room._entries_in_state_dict(opt, Source(None, None, given))
    given = {"state": {"0": {"exp_avg": torch.ones(5)}}}
    with pytest.raises(ValueError, match="exp_avg of parameter 0 has"):
        room._entries_in_state_dict(dgg.AdamW(params), Source(None, None, given))


# -- room -----------------------------------------------------------------------------------------


def guided(cls=dgg.AdamW, dtype=F32, *, steps=2, **options):
    params = [Parameter(torch.ones(2, 3, dtype=dtype)), Parameter(torch.ones(4, dtype=dtype))]
    opt = cls([("a", params[0]), ("b", params[1])], **{**GUIDED, **options})
    if steps:
        step(opt)
        opt.set_anchor()
        step(opt, steps - 1)
    return params, opt


def step(opt, steps=1):
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        opt.step()


ADAM = {"step", "exp_avg", "exp_avg_sq"}
KEPT = {
    "adamw": (dgg.AdamW, F32, {}, ADAM),
    "amsgrad": (dgg.Adam, F32, {"amsgrad": True}, ADAM | {"max_exp_avg_sq"}),
    "master": (dgg.AdamW, BF16, {"master_weights": True}, ADAM | {"master"}),
    "momentum": (dgg.SGD, F32, {"momentum": 0.9}, {"momentum_buffer"}),
    "sgd": (dgg.SGD, F32, {}, set()),
    "sgd, master": (dgg.SGD, F16, {"master_weights": True}, {"master"}),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("anchor_dtype", [None, BF16])
def test_room_for_all_that_a_step_keeps(kind, anchor_dtype):
    cls, dtype, options, keys = KEPT[kind]
    params, opt = guided(cls, dtype, steps=0, anchor_dtype=anchor_dtype, **options)
    opt.prepare_for_load()
    wanted = anchor_dtype or (F32 if "master" in keys else dtype)
    for p in params:
        entry = opt.state[p]
        assert set(entry) == keys | {"anchor"}
        assert entry["anchor"].dtype == wanted and entry["anchor"].isnan().all()
        assert entry["anchor"].shape == p.shape
        for name in keys - {"master"}:
            assert not entry[name].any()
            assert entry[name].shape == (() if name == "step" else p.shape)
    assert [g["anchored"] for g in opt.param_groups] == [2]
    assert [g["draw_index"] for g in opt.param_groups] == [0]
    with pytest.raises(RuntimeError, match="made room.*not loaded"):
        step(opt)
    opt.clear_anchor()
    step(opt)


def test_no_room_for_what_is_frozen_and_was_never_trained():
    params, opt = guided(steps=0)
    params[0].requires_grad_(False)
    opt.prepare_for_load()
    assert params[0] not in opt.state and "anchor" in opt.state[params[1]]
    assert opt.param_groups[0]["anchored"] == 1
    # What was trained has room, frozen or not, and keeps its count.
    params, opt = guided()
    params[0].requires_grad_(False)
    opt.prepare_for_load()
    assert opt.state[params[0]]["step"] == 2
    assert opt.state[params[0]]["anchor"].isnan().all()
    assert opt.param_groups[0]["anchored"] == 2


def test_room_is_just_what_a_checkpoint_holds():
    params, opt = guided(dgg.AdamW, amsgrad=True)
    before = opt.state[params[0]]["exp_avg"].clone()
    room.make_room(opt, [{"exp_avg": F32, "step": F32, "anchor": F16}, {}])
    entry = opt.state[params[0]]
    assert set(entry) == {"exp_avg", "step", "anchor"}
    assert entry["anchor"].dtype == F16 and entry["step"] == 2
    assert torch.equal(entry["exp_avg"], before)
    assert params[1] not in opt.state
    assert opt.param_groups[0]["anchored"] == 1
    room.make_room(opt, [{"step": F32}, {"anchor": None}])
    assert set(opt.state[params[0]]) == {"step"}
    assert opt.state[params[1]]["anchor"].dtype == F32
    for wrong in ([{}], [{}, {}, {}]):
        with pytest.raises(ValueError):
            room.make_room(opt, wrong)
    assert set(opt.state[params[0]]) == {"step"}
    assert opt.param_groups[0]["anchored"] == 1


def test_no_room_for_master_weights_that_are_not_kept(tmp_path):
    params, opt = guided(dgg.AdamW, BF16, master_weights=True)
    dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=tmp_path)
    params, other = guided(dgg.AdamW, BF16, steps=0, state_dtype=F32)
    with pytest.raises(ValueError, match="master weight of parameter 0,.*master_weights=True"):
        other.prepare_for_load(tmp_path)
    assert not other.state and not other._awaits_load
    with pytest.raises(ValueError, match="master weight of parameter 1,"):
        room.make_room(other, [{}, {"master": F32}])


def test_room_keeps_what_is_asked_of_where_it_lies():
    params, opt = guided(steps=0, anchor_device="cpu")
    opt.prepare_for_load()
    assert opt.state[params[0]]["anchor"].device.type == "cpu"


@pytest.mark.parametrize("attribute", ["share", "driver"])
def test_no_room_where_an_engine_loads(attribute, monkeypatch):
    params, opt = guided(steps=0)
    if attribute == "share":
        opt._ownership = sharding.RankShare(opt)
    else:
        monkeypatch.setattr(opt, "_deepspeed_driver", lambda: object())
    with pytest.raises(RuntimeError, match="DeepSpeed and ZeroRedundancyOptimizer load their own"):
        opt.prepare_for_load()
    assert not opt.__dict__["state"]


def test_names_that_a_checkpoint_may_have():
    model = torch.nn.Linear(3, 2)
    opt = dgg.AdamW(model.parameters())
    assert room._names(opt, None) == [[], []]
    assert [names[0] for names in room._names(opt, model)] == ["weight", "bias"]
    named = dgg.AdamW([("module.x", model.weight), ("y", model.bias)])
    assert [names[0] for names in room._names(named, None)] == ["module.x", "y"]
    assert "x" in room._names(named, None)[0]
    both = room._names(named, model)
    assert both[0][0] == "weight" and "module.x" in both[0]
    stranger = dgg.AdamW([Parameter(torch.ones(1)), model.bias])
    assert room._names(stranger, model)[0] == []


# -- loading into room ----------------------------------------------------------------------------


def room_for(saved, *, cls=dgg.AdamW, frozen=(), **options):
    """A new optimizer with room, and the template that a helper would fill from ``saved``."""
    params, opt = guided(cls, steps=0, **options)
    for place in frozen:
        params[place].requires_grad_(False)
    opt.prepare_for_load()
    template = opt.state_dict()
    for key, entry in saved["state"].items():
        for name, value in entry.items():
            if name in template["state"].get(key, {}):
                template["state"][key][name].copy_(value)
    template["param_groups"] = copy.deepcopy(saved["param_groups"])
    return params, opt, template


def test_room_that_was_filled_is_the_state():
    _, source = guided()
    saved = source.state_dict()
    params, opt, template = room_for(saved)
    opt.load_state_dict(template)
    assert not opt._awaits_load
    assert opt.param_groups[0]["anchored"] == 2
    for p, entry in zip(params, saved["state"].values(), strict=True):
        assert all(torch.equal(opt.state[p][k], v) for k, v in entry.items())
    step(opt)


def test_room_that_was_not_filled_is_no_anchor():
    _, source = guided()
    saved = source.state_dict()
    for entry in saved["state"].values():
        del entry["anchor"]
    # The checkpoint says that there are anchors.
    _, opt, template = room_for(saved)
    with pytest.raises(
        RuntimeError, match=r"group 0 was anchored \(2 parameters\).* 0 anchors.*A new"
    ):
        opt.load_state_dict(template)
    assert opt._awaits_load
    # It says that there are none: the room is given up.
    saved["param_groups"][0]["anchored"] = 0
    params, opt, template = room_for(saved)
    opt.load_state_dict(template)
    assert all("anchor" not in opt.state[p] for p in params)
    assert opt.param_groups[0]["anchored"] == 0
    step(opt)


def test_anchors_of_the_template_are_not_the_checkpoints():
    """Of an optimizer that had its own anchor when the template was made."""
    _, source = guided()
    params, opt = guided()
    state = opt.state_dict()
    state["param_groups"][0]["anchored"] = 1
    with pytest.raises(ValueError, match=r"group 0 has 1 anchored parameters.* 2 anchors came"):
        opt.load_state_dict(state)
    state["param_groups"][0]["anchored"] = 2
    opt.load_state_dict(state)
    # An anchor of a single number is one, an empty one contradicts nothing.
    for numbers in (1, 0):
        opt = dgg.AdamW([Parameter(torch.ones(numbers))], **GUIDED)
        opt.set_anchor()
        state = copy.deepcopy(opt.state_dict())
        state["param_groups"][0]["anchored"] = 0
        if numbers:
            with pytest.raises(ValueError, match="group 0 has 0 anchored parameters.* 1 anchors"):
                opt.load_state_dict(state)
        else:
            opt.load_state_dict(state)


def grouped(sizes, *, trained=True, anchored=True, named=True, **options):
    """A guided model of four layers, in groups of so many layers each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3, bias=False) for _ in range(4)])
    layers = iter(model.named_parameters() if named else model.parameters())
    groups = [{"params": [next(layers) for _ in range(size)]} for size in sizes]
    opt = dgg.AdamW(groups, **{**GUIDED, **options})
    if trained:
        step(opt, 2)
    if trained and anchored:
        opt.set_anchor()
        step(opt)
    return model, opt


@pytest.mark.parametrize(
    ("settings", "named"),
    # With names and FULL torch's helper itself ends in a KeyError.
    [(FULL, False), (FROM_0, False), (FROM_0, True), (FLAT, False), (FLAT, True)],
)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [([2, 2], [4]), ([4], [2, 2]), ([4], [1, 2, 1]), ([1, 3], [2, 2])]
)
def test_helpers_load_into_other_groups(before, after, anchored, settings, named):
    """They go by name, so torch.optim may have other groups than its checkpoint."""
    source_model, source = grouped(before, anchored=anchored, named=named)
    options = StateDictOptions(**settings)
    given = copy.deepcopy(get_optimizer_state_dict(source_model, source, options=options))
    model, opt = grouped(after, trained=False, named=named, seed=1)
    set_optimizer_state_dict(model, opt, given, options=options)
    names = [n for group in opt.param_groups for n in group.get("param_names", ())]
    assert names == [name for name, _ in model.named_parameters() if named]
    for p, q in zip(source_model.parameters(), model.parameters(), strict=True):
        assert opt.state[q].keys() == source.state[p].keys()
        assert all(torch.equal(opt.state[q][name], x) for name, x in source.state[p].items())
        q.data.copy_(p.data)
    for group, size in zip(opt.param_groups, after, strict=True):
        assert group["anchored"] == size * anchored
        whole = ("seed", "draw_index", "task_index")
        assert [group[n] for n in whole] == [source.param_groups[0][n] for n in whole]
    for each in (source, opt):
        step(each, 2)
    for p, q in zip(source_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    copy.deepcopy(opt).load_state_dict(opt.state_dict())


@pytest.mark.parametrize(("before", "after"), [([2, 2], [4]), ([4], [2, 2]), ([2, 2], [2, 2])])
def test_anchors_that_other_groups_have_lost_are_missed(before, after):
    source_model, source = grouped(before, named=False)
    options = StateDictOptions(**FULL)
    given = get_optimizer_state_dict(source_model, source, options=options)
    del given["state"]["3.weight"]["anchor"]
    model, opt = grouped(after, trained=False, named=False, seed=1)
    with pytest.raises((RuntimeError, ValueError), match="group . (was|has).* anchor"):
        set_optimizer_state_dict(model, opt, given, options=options)


def test_own_anchors_are_not_taken_for_those_of_other_groups():
    """What a template holds and the checkpoint has not comes back with the rest."""
    source_model, source = grouped([2, 2], named=False)
    options = StateDictOptions(**FULL)
    whole, part = (
        copy.deepcopy(get_optimizer_state_dict(source_model, source, options=options))
        for _ in range(2)
    )
    del part["state"]["3.weight"]["anchor"]
    model, opt = grouped([4], named=False)
    for given in (whole, part):
        with pytest.raises(ValueError, match=r"this optimizer's, .* clear_anchor\(\) before"):
            set_optimizer_state_dict(model, opt, copy.deepcopy(given), options=options)
    opt.clear_anchor()
    with pytest.raises(ValueError, match="had other groups, build the optimizer over those"):
        set_optimizer_state_dict(model, opt, part, options=options)
    set_optimizer_state_dict(model, opt, whole, options=options)
    assert opt.param_groups[0]["anchored"] == 4


def test_anchors_beside_groups_that_torch_has_saved_are_counted():
    _, source = guided()
    saved = copy.deepcopy(source.state_dict())
    for name in (*source._guidance, "anchored"):
        del saved["param_groups"][0][name]
    params, opt = guided(steps=0)
    opt.load_state_dict(saved)
    assert all("anchor" in opt.state[p] for p in params)
    assert opt.param_groups[0]["anchored"] == 2


def test_anchors_on_other_ranks_are_not_lost(monkeypatch):
    _, opt = guided()
    saved = copy.deepcopy(opt.state_dict())
    monkeypatch.setattr(opt._ownership, "anchored_elsewhere", lambda number, group: {0: 1}[number])
    saved["param_groups"][0]["anchored"] = 3
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.param_groups[0]["anchored"] == 3
    saved["param_groups"][0]["anchored"] = 4
    with pytest.raises(RuntimeError, match=r"\(4 parameters\) but carries 2 anchors"):
        opt.load_state_dict(saved)
    # All are elsewhere.
    for entry in saved["state"].values():
        del entry["anchor"]
    saved["param_groups"][0]["anchored"] = 1
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["anchored"] == 1


def test_room_of_a_frozen_parameter_is_taken_although_helpers_leave_it_out():
    _, source = guided()
    saved = source.state_dict()
    params, opt, template = room_for(saved)
    params[0].requires_grad_(False)
    kept = template["state"].pop(0)
    opt.load_state_dict(template)
    assert torch.equal(opt.state[params[0]]["anchor"], kept["anchor"])
    assert opt.state[params[0]]["step"] == 2
    # Room that nothing was loaded into is not.
    params, opt, template = room_for(saved)
    params[0].requires_grad_(False)
    template["state"].pop(0)["anchor"].fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"1 anchors.*leave out the state of frozen parameters"):
        opt.load_state_dict(template)
    for p in params:
        p.requires_grad_(False)
    template["state"] = {}
    opt.state[params[1]]["anchor"].fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"0 anchors.*leave out the state of frozen parameters"):
        opt.load_state_dict(template)
    # What comes with the state dict goes before what stands in the room.
    params, opt, template = room_for(saved)
    params[0].requires_grad_(False)
    given = copy.deepcopy(template)
    given["state"][0]["anchor"].fill_(7)
    opt.load_state_dict(given)
    assert (opt.state[params[0]]["anchor"] == 7).all()
    # Nor is that of a parameter which is trained.
    params, opt, template = room_for(saved)
    template["state"].pop(0)
    with pytest.raises(RuntimeError, match=r"1 anchors.*A new optimizer has no room"):
        opt.load_state_dict(template)


def test_empty_anchors_are_what_their_group_says():
    """No value tells whether anything was loaded into room for none."""
    for anchored in (0, 1, None):
        empty = Parameter(torch.empty(0, 3))
        opt = dgg.AdamW([empty], **GUIDED)
        opt.prepare_for_load()
        template = opt.state_dict()
        if anchored is None:
            # As torch.optim saves it: no word of ours.
            group = template["param_groups"][0]
            for name in (*opt._guidance, "anchored"):
                del group[name]
        else:
            template["param_groups"][0]["anchored"] = anchored
        opt.load_state_dict(template)
        assert ("anchor" in opt.state[empty]) == (anchored != 0)


# -- what a load keeps and takes ------------------------------------------------------------------


def test_what_the_checkpoint_does_not_say_stays():
    """Options of ours that torch.optim does not save, flags, and who carries out the step."""
    params, opt = guided(steps=0, fused=False, alpha=0.3)
    opt.param_groups[0].update(strength=0.7, draw_index=6, task_index=2)
    theirs = torch.optim.AdamW(params, lr=0.5, foreach=True)
    step(theirs)
    opt.load_state_dict(theirs.state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["alpha"], group["strength"]) == (0.5, 0.3, 0.7)
    assert (group["draw_index"], group["task_index"], group["anchored"]) == (6, 2, 0)
    assert (group["fused"], group["foreach"], group["capturable"]) == (False, None, False)
    assert opt._settings.backend == "reference"


def test_flags_that_a_checkpoint_lacks_are_not_made_up():
    params, opt = guided(dgg.SGD, steps=0)
    state = opt.state_dict()
    for name in ("foreach", "fused", "differentiable"):
        state["param_groups"][0].pop(name)
    opt.load_state_dict(state)
    assert "capturable" not in opt.param_groups[0]


@pytest.mark.parametrize("state_dtype", [F32, F64, None])
def test_moments_keep_the_dtype_that_was_asked_for(state_dtype):
    params, source = guided(dgg.AdamW, BF16, state_dtype=F32, anchor_dtype=F32)
    for entry in source.state.values():
        for name in ("exp_avg", "anchor"):
            entry[name].fill_(1 + 2.0**-12)
    saved = copy.deepcopy(source.state_dict())
    _, opt = guided(dgg.AdamW, BF16, steps=0, state_dtype=state_dtype)
    opt.load_state_dict(saved)
    for p, entry in zip(opt.param_groups[0]["params"], saved["state"].values(), strict=True):
        mine = opt.state[p]
        assert mine["exp_avg"].dtype == (state_dtype or BF16)
        assert torch.equal(mine["exp_avg"], entry["exp_avg"].to(state_dtype or BF16))
        assert mine["anchor"].dtype == F32 and torch.equal(mine["anchor"], entry["anchor"])
        # Memory of its own: the checkpoint may be loaded into another one, too.
        for name in ("exp_avg", "exp_avg_sq", "anchor"):
            if mine[name].dtype == entry[name].dtype:
                assert mine[name].data_ptr() != entry[name].data_ptr()


@pytest.mark.parametrize("state_dtype", [None, F32])
def test_masters_are_loaded_as_they_are(state_dtype):
    params, source = guided(dgg.AdamW, BF16, master_weights=True)
    for entry in source.state.values():
        entry["master"].add_(2.0**-12)
    saved = copy.deepcopy(source.state_dict())
    saved["state"][1]["master"] = saved["state"][1]["master"].double()
    mine, opt = guided(dgg.AdamW, BF16, steps=0, master_weights=True, state_dtype=state_dtype)
    opt.load_state_dict(saved)
    for p, entry in zip(mine, saved["state"].values(), strict=True):
        assert opt.state[p]["master"].dtype == F32
        assert torch.equal(opt.state[p]["master"], entry["master"].float())
    saved["state"][0]["master"] = None
    opt.load_state_dict(saved)
    assert "master" not in opt.state[mine[0]]
    step(opt)
    assert "master" in opt.state[mine[0]]


def test_masters_of_weights_that_have_become_wide_are_left_out():
    _, source = guided(dgg.AdamW, BF16, master_weights=True)
    saved = copy.deepcopy(source.state_dict())
    for key, entry in saved["state"].items():
        # Whatever stands first.
        names = ["master", *(entry.keys() - {"master"})]
        saved["state"][key] = {name: entry[name] for name in names}
    wide, opt = guided(dgg.AdamW, BF16, steps=0, master_weights=True, state_dtype=F64)
    for p in wide:
        p.data = p.data.float()
    opt.load_state_dict(saved)
    for p, entry in zip(wide, saved["state"].values(), strict=True):
        assert "master" not in opt.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(opt.state[p][name], entry[name].double())


def test_a_count_that_a_graph_reads_stays_on_its_device():
    _, opt = guided()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["draw_index"] = torch.tensor(7)
    opt._settings = dataclasses.replace(opt._settings, capturable=True)
    opt.load_state_dict(saved)
    assert isinstance(opt.param_groups[0]["draw_index"], torch.Tensor)


def test_a_draw_index_on_a_device_comes_back_to_the_host():
    params, opt = guided()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["draw_index"] = torch.tensor(7)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["draw_index"] == 7
    assert type(opt.param_groups[0]["draw_index"]) is int
    step(opt)
    assert opt.param_groups[0]["draw_index"] == 8


def test_a_resumed_optimizer_knows_it():
    """So that `set_anchor` can refuse to take weights of mid-task for those of its beginning."""
    _, source = guided(steps=4)
    saved = copy.deepcopy(source.state_dict())
    draws = saved["param_groups"][0]["draw_index"]
    assert draws == 4
    for steps, resumed in ((0, draws), (1, draws), (2, None)):
        params, opt = guided(steps=0)
        step(opt, steps)
        opt.load_state_dict(saved)
        assert opt._resumed == resumed
    # Loaded again before any step.
    params, opt = guided(steps=0)
    opt.load_state_dict(saved)
    opt.load_state_dict(saved)
    assert opt._resumed == draws
    step(opt)
    opt.load_state_dict(saved)
    assert opt._resumed is None


def test_a_task_that_was_named_is_not_overwritten_by_an_earlier_one():
    _, source = guided()
    saved = copy.deepcopy(source.state_dict())
    assert saved["param_groups"][0]["task_index"] == 1
    for steps in (0, 1, 2):
        params, opt = guided(steps=0)
        opt.set_anchor(task=2)
        step(opt, steps)
        if steps < 2:
            with pytest.raises(ValueError, match=r"\(task=2\) was called before a state of task 1"):
                opt.load_state_dict(saved)
        else:
            opt.load_state_dict(saved)
    _, opt = guided(steps=0)
    opt.set_anchor(task=1)
    opt.load_state_dict(saved)


@pytest.mark.parametrize("mine", [True, False])
def test_an_anchor_is_not_dropped_in_silence(mine):
    params, opt = guided()
    other = torch.optim.AdamW([Parameter(p.detach().clone()) for p in params], lr=0.1)
    step(other)
    if not mine:
        opt.clear_anchor()
        opt.load_state_dict(other.state_dict())
        return
    with pytest.raises(ValueError, match="has an anchor and the checkpoint carries none"):
        opt.load_state_dict(other.state_dict())
    # Elsewhere there are some: another rank's.
    opt.state["noted"] = 1
    with pytest.raises(ValueError, match="has an anchor and the checkpoint carries none"):
        opt.load_state_dict(other.state_dict())


def test_groups_agree_on_what_is_wide():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(3))
    opt = dgg.AdamW([{"params": [p]}, {"params": [q], "alpha": 0.5}], **GUIDED)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    saved["param_groups"][1]["seed"] = 6
    with pytest.raises(ValueError, match="seed is one setting.*group 1 has 6"):
        opt.load_state_dict(saved)


# -- what is sharded, and what FSDP1 leaves -------------------------------------------------------


def test_whole_moments_are_sharded_where_their_parameter_is():
    mesh = init_device_mesh("cpu", (1,))
    plain = Parameter(torch.ones(3))
    p = Parameter(distribute_tensor(torch.ones(4, 2, dtype=BF16), mesh, [Shard(0)]))
    opt = dgg.AdamW([plain, p], master_weights=True, **GUIDED)
    opt.state["noted"] = 1
    step(opt)
    entry = opt.state[p]
    for name, dtype in (("exp_avg", F32), ("master", F64)):
        entry[name] = entry[name].to_local().to(dtype) + 1
    entry["max_exp_avg_sq"] = None
    kept = opt.state[plain]["exp_avg"], entry["exp_avg_sq"], entry["step"]
    loading._give_moments_memory(opt)
    for name, dtype in (("exp_avg", F32), ("master", F64)):
        made = entry[name]
        assert type(made) is type(p.data) and made.placements == p.placements
        assert made.dtype == dtype and (made.to_local() >= 1).all()
    # What is sharded already, and what is not to be.
    assert kept[0] is opt.state[plain]["exp_avg"]
    assert kept[1] is entry["exp_avg_sq"] and kept[2] is entry["step"]
    assert entry["max_exp_avg_sq"] is None


def test_what_is_empty_here_is_anchored_all_the_same():
    """FSDP1's checkpoints leave out what a rank has nothing of."""
    empty, full = Parameter(torch.empty(0)), Parameter(torch.ones(2))
    other, frozen = Parameter(torch.empty(0)), Parameter(torch.empty(0))
    for p in (empty, frozen):
        p._fsdp_flattened = True
    opt = dgg.AdamW([empty, full, other, frozen], **GUIDED)
    frozen.requires_grad_(False)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert empty not in opt.state  # nothing was anchored
    saved["param_groups"][0]["anchored"] = 1
    opt.load_state_dict(saved)
    assert opt.state[empty]["anchor"].shape == (0,)
    assert not opt.state[empty]["anchor"].requires_grad
    assert ADAM <= opt.state[empty].keys() and opt.state[empty]["step"] == 0
    assert all("anchor" not in opt.state.get(p, ()) for p in (full, other, frozen))
    assert opt.param_groups[0]["anchored"] == 1
    # What the checkpoint has of it stays as it is.
    saved["state"] = {0: {**opt.state[empty], "anchor": torch.empty(0, dtype=F16)}}
    opt.load_state_dict(saved)
    assert opt.state[empty]["anchor"].dtype == F16
    # SGD's buffer is begun by the first step.
    opt = dgg.SGD([empty], momentum=0.9, **GUIDED)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["anchored"] = 1
    opt.load_state_dict(saved)
    assert set(opt.state[empty]) == {"anchor"}


# -- wrappers -------------------------------------------------------------------------------------


def test_who_imitates_the_class_hands_on():
    """Lightning's wrapper: a subclass of what it wraps, without its attributes."""
    params, opt = guided()

    class Wrapper(type(opt)):
        def __init__(self, inner):
            self._optimizer = inner

    wrapper = Wrapper(opt)
    saved = wrapper.state_dict()
    assert saved["param_groups"][0]["anchored"] == 2
    wrapper.load_state_dict(copy.deepcopy(saved))
    assert "_awaits_load" not in wrapper.__dict__
    outer = Wrapper(wrapper)
    outer.prepare_for_load()
    assert opt._awaits_load and "_awaits_load" not in wrapper.__dict__
    # Something else by that name is nobody to hand on to.
    opt._optimizer = "mine"
    opt.load_state_dict(saved)


def test_a_method_is_handed_on_with_all_that_it_is_given():
    class Told(_imitable.Imitable):
        def told(self, *args, **kwargs):
            """Says so."""
            return self, args, kwargs

        told = _imitable.imitable(told)

    inner, middle, outer = Told(), Told(), Told()
    outer._optimizer, middle._optimizer = middle, inner
    for asked in (outer, middle, inner):
        assert asked.told(1, 2, a=3) == (inner, (1, 2), {"a": 3})
    inner._optimizer = "mine"
    assert outer.told() == (inner, (), {})
    assert (Told.told.__name__, Told.told.__doc__) == ("told", "Says so.")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_may_become_partial_sums_between_two_steps(backend):
    """As those of a layer that is trained under sequence parallelism from some step on."""
    mesh = init_device_mesh("cpu", (1,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    opt = dgg.AdamW([param], lr=0.1, backend=backend)
    for placement in (Replicate(), Partial(), Replicate(), Partial()):
        param.grad = DTensor.from_local(torch.ones(3), mesh, [placement])
        opt.step()
    torch.testing.assert_close(opt.state[param]["step"], torch.tensor(4.0))
