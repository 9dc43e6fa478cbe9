# SPDX-License-Identifier: BSD-3-Clause
"""Task boundaries, asked directly: when an anchor may be set, of which parameters, from what.

`test_anchors.py` sets anchors; here stands every decision before that, each from both sides, and
that nothing is written by it. ``make mutate`` holds these tests against every line of
``dgg/anchor/boundary.py``.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.nn import Parameter, UninitializedParameter

from cases import BF16, F16, F32, F64
from dgg import _arguments, anchor
from dgg.anchor import boundary
from dgg.step.journal import Journal


def numbered(table):
    # Numbers, not texts, as names of the tests: mutmut passes names on to pytest.
    return [pytest.param(*row, id=str(place)) for place, row in enumerate(table)]


def refused(error, text, call, *arguments, **options):
    """The parts of ``text`` must be said in their order; what stands between is free."""
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    assert type(raised.value) is error
    said = raised.value.args[0]
    for part in text.split("…"):
        _, found, said = said.partition(part)
        assert found, raised.value.args


# -- tasks ----------------------------------------------------------------------------------------


def groups_of(task, *anchored):
    return [{"task_index": task, "anchored": n} for n in anchored or (0,)]


# Task to be trained, the groups, steps so far, whether tensors are given → whether it begins.
BEGINNINGS = [
    (0, groups_of(0), 0, False, False),  # nothing to protect
    (0, groups_of(0), 9, False, False),
    (0, groups_of(0), 0, True, True),  # towards something given
    (0, groups_of(0, 2), 0, True, False),  # begun already
    (1, groups_of(0), 0, False, True),
    (1, groups_of(0), 9, False, True),
    (1, groups_of(0, 2), 9, False, True),
    (1, groups_of(0), 0, True, True),
    (1, groups_of(1, 2), 9, False, False),  # resumed in its middle
    (1, groups_of(1, 0, 2), 9, True, False),
    (1, groups_of(1), 9, True, True),  # its anchor was lost, and is given
    (2, groups_of(1, 2), 9, False, True),
    (2, groups_of(1), 9, False, True),
    (2, groups_of(0), 0, False, True),  # a new process per task
    (5, groups_of(0), 0, True, True),
]
REFUSALS = [
    (1, groups_of(2), ValueError, "(task=1)…in task 2,…Resume…task 1,…end of task 0"),
    (1, groups_of(3, 2), ValueError, "(task=1)…in task 3,…Resume"),
    (0, groups_of(1), ValueError, "(task=0)…in task 1,…Start with a new"),
    (3, groups_of(3), RuntimeError, "(task=3)…in task 3 already…end_of_task_2, model=…task=3)"),
    (1, groups_of(1, 0, 0), RuntimeError, "(task=1)…in task 1 already…end_of_task_0"),
    (-1, groups_of(0), ValueError, "task_index=-1"),
    (True, groups_of(0), TypeError, "task_index=True"),
    ("1", groups_of(0), TypeError, "task_index='1'"),
]
LEFT_OUT = "(task=3)…in task 1,…task 2 would be left out…end of task 2,…start task 3 with a new"


@pytest.mark.parametrize(("task", "groups", "draws", "given", "begins"), numbered(BEGINNINGS))
def test_a_task_begins_or_goes_on(task, groups, draws, given, begins):
    assert boundary.begins_task(task, groups, draws, has_source=given) is begins


@pytest.mark.parametrize(("task", "groups", "error", "text"), numbered(REFUSALS))
def test_tasks_that_cannot_begin(task, groups, error, text):
    refused(error, text, boundary.begins_task, task, groups, 5, has_source=False)


@pytest.mark.parametrize("given", [False, True])
def test_no_task_is_left_out(given):
    for groups, draws in ((groups_of(1), 1), (groups_of(1, 0, 3), 0)):
        refused(ValueError, LEFT_OUT, boundary.begins_task, 3, groups, draws, has_source=given)
    assert boundary.begins_task(3, groups_of(1), 0, has_source=given)
    assert boundary.begins_task(3, groups_of(2, 4), 7, has_source=given)


def test_an_anchor_just_resumed_is_not_replaced():
    groups = groups_of(2, 0, 3)
    refused(
        RuntimeError, "in task 2, after 7 steps…set_anchor(task=2)…set_anchor(task=3)",
        boundary.refuse_resumed, groups, 7, 7,
    )  # fmt: skip
    refused(
        RuntimeError, "in task 1, after 7 steps", boundary.refuse_resumed, groups_of(1, 3), 7, 7
    )
    for other, draws, resumed in (
        (groups, 8, 7),  # a step was made since
        (groups, 0, 0),  # it is new
        (groups, 7, None),  # nothing was loaded
        (groups_of(2, 0, 0), 7, 7),  # without anchor
    ):
        assert boundary.refuse_resumed(other, draws, resumed) is None


def test_an_anchor_just_set_is_not_replaced_by_an_earlier_one():
    earlier = [{"task_index": 1}, {"task_index": 9}]
    refused(
        ValueError, "set_anchor(task=2) was…a state of task 1 is…then call set_anchor(task=2)",
        boundary.refuse_earlier, 2, earlier,
    )  # fmt: skip
    refused(ValueError, "state of task 0", boundary.refuse_earlier, 1, [{}])  # of torch.optim
    refused(ValueError, "state of task 0", boundary.refuse_earlier, 1, [])
    for named, saved in ((1, earlier), (0, [{}]), (0, []), (None, earlier), (None, [{}])):
        assert boundary.refuse_earlier(named, saved) is None


def test_a_boundary_is_due_or_not():
    def fresh(task, steps, anchored=0):
        return [{"task_index": task, "anchored": anchored, "draw_index": steps}]

    assert boundary.is_due(fresh(0, 5), None, None, None)
    assert boundary.is_due(fresh(0, 5), None, 1, 5)
    assert not boundary.is_due(fresh(1, 5, anchored=2), None, 1, 5)
    refused(ValueError, LEFT_OUT, boundary.is_due, fresh(1, 5), None, 3, None)
    # The anchor of task 0 is nothing to protect, but something given is.
    assert not boundary.is_due(fresh(0, 0), None, 0, None)
    assert boundary.is_due(fresh(0, 0), "path", 0, None)
    # Resumed in a task that is not named: only what is given is sure to be right.
    resumed = fresh(1, 5, anchored=2)
    refused(RuntimeError, "in task 1, after 5 steps", boundary.is_due, resumed, None, None, 5)
    assert boundary.is_due(resumed, "path", None, 5)
    assert boundary.is_due(resumed, None, None, 4)


# -- placing --------------------------------------------------------------------------------------


class Placed:
    """Two groups of parameters, and a record of what is asked of the optimizer."""

    def __init__(self):
        self.params = [Parameter(torch.full((2,), value)) for value in (1.0, 2.0, 3.0)]
        self.groups = [{"params": self.params[:2]}, {"params": self.params[2:]}]
        self.marks = [{**MARK, "anchored": 7} for _ in self.groups]
        self.state = collections.defaultdict(dict)
        self._awaits_load, self.said = True, []
        self._ownership = self._rule = self
        self._journal = Journal()

    def tensors(self, groups):
        assert groups is self.groups
        return [group["params"] for group in groups]

    def peers(self, params):
        assert [id(p) for p in params] == [id(p) for p in self.params]
        return ["the ranks"]

    def init_state(self, opt, param, group, *, first):
        assert opt is self and first is False
        assert any(param is p for p in group["params"])
        assert "anchor" not in opt.state[param] or self.overwrites
        self.said.append("state")

    def note_anchors(self, marks, *, anchored):
        assert marks is self.marks
        self.said.append(anchored)

    def _reset_caches(self):
        self.said.append("reset")

    def place(self, plan, task, overwrites=False):
        self.overwrites, self.said = overwrites, []
        boundary.place(self, self.groups, self.marks, lambda: plan, task, None)


MARK = {**dict.fromkeys(_arguments.OPTIMIZER_OPTIONS), "task_index": 4, "seed": 3}


def test_anchors_are_placed_and_noted(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def on_all_or_none(peers, settings):
        asked.append((peers, settings))
        yield

    monkeypatch.setattr(boundary.sharding, "on_all_or_none", on_all_or_none)
    opt = Placed()
    first, second, third = opt.params
    made = [torch.zeros(2) for _ in opt.params]
    written = []
    opt.place(
        [
            (first, first.detach(), made[0]),
            (second, None, made[1]),  # has its values already
            (third, written.append, made[2]),
        ],
        None,
    )
    assert asked == [(["the ranks"], MARK)]
    assert all(opt.state[p]["anchor"] is a for p, a in zip(opt.params, made, strict=True))
    assert [a.tolist() for a in made] == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert len(written) == 1 and written[0] is made[2]
    assert [(mark["anchored"], mark["task_index"]) for mark in opt.marks] == [(2, 5), (1, 5)]
    assert opt.said == ["state", "state", "state", True, "reset"] and opt._awaits_load is False
    assert opt.said[3] is True
    # Written in place, what a step has kept is valid still.
    opt.place([(first, second.detach(), made[0])], 9, overwrites=True)
    assert made[0].tolist() == [2.0, 2.0] and opt.said == ["state", True]
    assert [(mark["anchored"], mark["task_index"]) for mark in opt.marks] == [(2, 9), (1, 9)]
    # One new address is enough for it not to be.
    opt.place([(first, first.detach(), made[0]), (third, None, made[1])], 9, overwrites=True)
    assert opt.said == ["state", "state", True, "reset"] and opt.state[third]["anchor"] is made[1]
    # What is left out of the plan may have no state.
    opt = Placed()
    opt.place([(opt.params[0], None, made[2])], 1)
    assert [mark["anchored"] for mark in opt.marks] == [1, 0]


def test_what_cannot_be_planned_changes_nothing():
    opt = Placed()

    def fails():
        raise KeyError("no tensor")

    opt.peers = lambda params: []
    with pytest.raises(KeyError, match="no tensor"):
        boundary.place(opt, opt.groups, opt.marks, fails, None, None)
    assert not opt.state and opt.said == [] and opt._awaits_load
    assert [mark["anchored"] for mark in opt.marks] == [7, 7]


def test_anchors_are_cleared():
    opt = Placed()
    first, second, _ = opt.params
    opt.state[first] |= {"anchor": torch.zeros(2), "exp_avg": 1}
    opt.state[second] |= {"exp_avg": 2}
    boundary.clear(opt, opt.groups, opt.marks)
    assert dict(opt.state) == {first: {"exp_avg": 1}, second: {"exp_avg": 2}}
    assert [mark["anchored"] for mark in opt.marks] == [0, 0]
    assert [mark["task_index"] for mark in opt.marks] == [4, 4]
    assert opt.said == [False, "reset"] and opt.said[0] is False and opt._awaits_load is False


def test_anchors_that_are_known():
    p, q, r, s = (Parameter(torch.zeros(1)) for _ in range(4))
    anchor_of_q = torch.ones(1)
    state = {p: {}, q: {"anchor": anchor_of_q}, r: {"step": 1}, s: "no state of ours"}
    known = boundary.anchors_in(state)
    assert known.keys() == {q, r} and known[q] is anchor_of_q and known[r] is None


# -- which parameters, from what ------------------------------------------------------------------


@pytest.fixture
def two():
    torch.manual_seed(0)
    return [Parameter(torch.randn(2, 3)), Parameter(torch.randn(4))]


def plan(params, *, known=None, tensors=None, model=None, dtype=None, device=None, **more):
    groups = [{"params": list(params)}]
    if "names" in more:
        groups[0]["param_names"] = more.pop("names")
    return boundary.plan_anchors(groups, known or {}, tensors, model, dtype, device, **more)


def of_model():
    model = torch.nn.Linear(3, 2)
    return model, list(model.parameters())


def test_the_present_weights(two):
    planned = plan(two)
    assert [p for p, _, _ in planned] == two
    for p, source, target in planned:
        assert torch.equal(source, p) and source.data_ptr() == p.data_ptr()
        assert not source.requires_grad and not target.requires_grad
        assert (target.shape, target.dtype) == (p.shape, F32)
        assert target.data_ptr() != p.data_ptr()


def test_what_is_not_trained_gets_none(two):
    frozen, trained = two
    frozen.requires_grad_(False)
    assert [p for p, _, _ in plan(two)] == [trained]
    # What has state was trained in an earlier task.
    assert [p for p, _, _ in plan(two, known={frozen: None})] == two
    trained.requires_grad_(False)
    refused(ValueError, "no trainable parameter…requires_grad_(True)", plan, two)
    assert plan(two, none=True) == []
    assert [p for p, _, _ in plan(two, known={frozen: None}, none=True)] == [frozen]


def test_several_groups_are_one_list(two):
    groups = [{"params": [two[1]]}, {"params": []}, {"params": [two[0]]}]
    planned = boundary.plan_anchors(groups, {}, None, None, None, None)
    assert [p for p, _, _ in planned] == [two[1], two[0]]


@pytest.mark.parametrize("dtype", [None, BF16, F64])
def test_an_anchor_that_fits_is_written_again(two, dtype):
    wanted = F32 if dtype is None else dtype
    p, q = two
    fitting = torch.zeros(2, 3, dtype=wanted)
    for old in (
        torch.zeros(4, dtype=F16),  # another dtype
        torch.zeros(5, dtype=wanted),  # another shape
        None,
    ):
        planned = plan(two, known={p: fitting, q: old}, dtype=dtype)
        assert planned[0][2] is fitting
        assert planned[1][2] is not old and planned[1][2].dtype == wanted


def test_an_anchor_that_is_the_weights_is_not_written_again(two):
    p, q = two
    kept = q.detach().clone()
    masters = {p: p.detach().clone(), q: kept}
    own = torch.zeros(2, 3)
    for known in ({p: p.detach(), q: own}, {p: masters[p], q: kept}):
        planned = plan(two, known=known, weights=masters.__getitem__)
        assert planned[0][2] is not known[p] and planned[1][2] is not known[q]
        assert planned[0][1] is masters[p] and planned[1][1] is kept


def test_masters_are_what_is_anchored(two):
    half = [Parameter(p.detach().to(BF16)) for p in two]
    masters = {p: p.detach().float() for p in half}
    planned = plan(half, weights=masters.__getitem__)
    assert all(target.dtype == F32 and source is masters[p] for p, source, target in planned)
    planned = plan(half, weights=masters.__getitem__, dtype=F16)
    assert all(target.dtype == F16 for _, _, target in planned)


def test_values_are_looked_at(two):
    with torch.no_grad():
        two[1][2] = 1e30
    plan(two)
    refused(ValueError, "parameter 1 of group 0…overflow…float16", plan, two, dtype=F16)
    with torch.no_grad():
        two[1][2] = float("nan")
    refused(ValueError, "parameter 1 of group 0…not be finite", plan, two)
    refused(
        TypeError, "parameter 0 of group 0…complex…bfloat16", plan,
        [Parameter(torch.ones(2, dtype=torch.complex64))], dtype=BF16,
    )  # fmt: skip
    # What cannot be stepped is refused as such, before anything is read from it.
    refused(
        ValueError, "parameter 0 of group 0…is on the meta device…make the optimizer afterwards",
        plan, [Parameter(torch.ones(2, device="meta"))],
    )  # fmt: skip
    refused(
        ValueError, "parameter 0 of group 0…not initialised yet", plan, [UninitializedParameter()]
    )


def test_what_is_given_must_be_what_it_says(two):
    model, params = of_model()
    refused(ValueError, "model=…give both or neither", plan, params, model=model)
    refused(TypeError, "not list…state_dict", plan, params, model=model, tensors=[1])
    refused(
        ValueError, "which name…pass model=…named_parameters()", plan, two, tensors={"a": two[0]}
    )


def test_the_model_may_be_that_of_the_importance_alone():
    model, _ = of_model()
    for tensors, importance in (({}, None), ({}, {}), (None, None)):
        assert boundary.model_of_tensors(tensors, model, importance) is model
    assert boundary.model_of_tensors(None, model, {}) is None
    assert boundary.model_of_tensors({}, None, None) is None
    refused(
        TypeError, "model= must be a torch.nn.Module, not dict", boundary.model_of_tensors,
        {}, {}, None,
    )  # fmt: skip


def test_named_tensors_of_a_model():
    model, params = of_model()
    given = {"weight": torch.randn(2, 3), "bias": torch.randn(2), "more": torch.ones(7)}
    for p, source, target in plan(params, tensors=given, model=model):
        name = "weight" if p.dim() == 2 else "bias"
        assert source is given[name] and target is not source
    # A parameter that the model does not have can have no name there.
    stranger = Parameter(torch.ones(5))
    refused(
        KeyError, "parameter 2 of group 0", plan, [*params, stranger], tensors=given, model=model
    )
    given["weight"] = torch.randn(3, 3)
    refused(
        ValueError, "parameter 0 of group 0…(3, 3)…(2, 3)", plan, params, tensors=given, model=model
    )
    given["weight"] = torch.full((2, 3), 1e30)
    refused(
        ValueError, "parameter 0 of group 0…overflow", plan, params, tensors=given, model=model,
        dtype=F16,
    )  # fmt: skip


def test_named_tensors_of_named_groups(two):
    given = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    planned = plan(two, names=["a", "b"], tensors=given)
    assert [source is given[n] for n, (_, source, _) in zip("ab", planned, strict=True)] == [
        True
    ] * 2
    refused(KeyError, "parameter 'b'", plan, two, names=["a", "b"], tensors={"a": given["a"]})
    # What wrappers put before a name.
    wrapped = {f"module.{n}": x for n, x in given.items()}
    planned = plan(two, names=["a", "b"], tensors=wrapped)
    assert planned[1][1] is wrapped["module.b"]
    groups = [
        {"params": [two[0]], "param_names": ["a"]}, {"params": [two[1]], "param_names": ["b"]}
    ]  # fmt: skip
    planned = boundary.plan_anchors(groups, {}, given, None, None, None)
    assert [p for p, _, _ in planned] == two
    refused(
        ValueError, "which name", boundary.plan_anchors, [groups[0], {"params": [two[1]]}], {},
        given, None, None, None,
    )  # fmt: skip


def test_names_of_what_gets_no_anchor_are_known(two):
    """A frozen parameter's tensor may be there: it is nobody else's under another name."""
    groups = [{"params": two, "param_names": ["x.a", "a"]}]
    two[0].requires_grad_(False)
    assert boundary._names(groups, None, [two[1]]) == ([["a"]], ["x.a"])
    assert boundary._names(groups, None, two) == ([["x.a"], ["a"]], [])
    more = [*groups, {"params": [], "param_names": []}]
    assert boundary._names(more, None, []) == ([], ["x.a", "a"])
    for params in ([], two[:1]):
        with pytest.raises(ValueError):
            boundary._names([{"params": two, "param_names": ["a"]}], None, params)
    # Only "x.a" is there, and it is the frozen one's.
    refused(
        KeyError, "parameter 'a'", boundary.plan_anchors, groups, {}, {"x.a": torch.ones(4)}, None,
        None, None,
    )  # fmt: skip


def test_the_tensor_of_another_is_not_taken():
    """What wrappers put before a name is also a module's: then the tensor is its parameter's."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(3, 2, bias=False)
            self.weight = Parameter(torch.ones(2, 3))

    model = Inner()
    given = {"model.weight": torch.ones(2, 3)}
    assert plan([model.model.weight], tensors=given, model=model)[0][1] is given["model.weight"]
    refused(KeyError, "parameter 0 of group 0", plan, [model.weight], tensors=given, model=model)
    # Groups know the frozen parameter by its name.
    frozen, trained = model.model.weight.requires_grad_(False), model.weight
    names = {"names": ["model.weight", "weight"], "tensors": given}
    refused(KeyError, "parameter 'weight'", plan, [frozen, trained], **names)
    names["names"][0] = "another"
    assert plan([frozen, trained], **names)[0][1] is given["model.weight"]


@pytest.mark.parametrize("path", [str, pathlib.Path])
def test_tensors_in_a_file(two, tmp_path, path):
    file = tmp_path / "weights.safetensors"
    given = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    save_file(given, file)
    old = torch.zeros(2, 3)
    planned = plan(two, names=["a", "b"], tensors=path(file), known={two[0]: old})
    # Read into the memory of a new anchor; where there is one it is looked at, and not written.
    (_, source, target), (_, none, made) = planned
    assert target is old and not old.any()
    assert isinstance(source, anchor.Part) and torch.equal(source.read(), given["a"])
    assert none is None and torch.equal(made, given["b"])
    narrow = plan(two, names=["a", "b"], tensors=path(file), dtype=BF16)
    assert torch.equal(narrow[1][2], given["b"].to(BF16))
    save_file({"a": given["a"], "b": torch.full((4,), 1e30)}, file)
    refused(
        ValueError, "parameter 'b'…overflow", plan, two, names=["a", "b"], tensors=path(file),
        dtype=F16,
    )  # fmt: skip
    refused(FileNotFoundError, "none", plan, two, names=["a", "b"], tensors=path(tmp_path / "none"))


# -- devices and what is sharded ------------------------------------------------------------------


def test_devices_that_do_not_go_together(two):
    assert plan(two, device=torch.device("cpu"))[0][2].device.type == "cpu"
    refused(
        ValueError, "'cuda'…parameter 0 of group 0…on 'cpu'; use 'cpu' or None", plan, two,
        device=torch.device("cuda"),
    )  # fmt: skip
    assert all(t.device.type == "cpu" for _, _, t in plan(two, device=None))


def test_an_anchor_may_lie_on_the_host(monkeypatch):
    """The meta device stands for a GPU here, which needs parameters that may lie on it."""
    monkeypatch.setattr(boundary._arguments, "check_param", lambda *_, **__: None)
    far = Parameter(torch.ones(2, 3, device="meta"))
    given = {"a": torch.ones(2, 3)}
    for device, expected in ((None, "meta"), ("cpu", "cpu"), ("meta", "meta")):
        device = device and torch.device(device)
        ((_, source, target),) = plan([far], names=["a"], tensors=given, device=device)
        assert source is given["a"] and target.device.type == expected


def test_what_fsdp1_has_taken_is_not_anchored_by_name(two):
    two[1]._fsdp_flattened = True
    assert len(plan(two)) == 2
    given = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    refused(
        ValueError, "parameter 'b' is FSDP1's…load the tensors into the model", plan, two,
        names=["a", "b"], tensors=given,
    )  # fmt: skip


@pytest.fixture
def sharded():
    """A parameter and a plain one beside it, over a world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.manual_seed(0)
        yield [
            Parameter(distribute_tensor(torch.randn(2, 3), mesh, [Replicate()])),
            Parameter(torch.randn(4)),
        ]
    finally:
        dist.destroy_process_group()


def test_anchors_of_dtensors_stay_where_they_are(sharded, tmp_path):
    for device in (None, torch.device("cpu")):
        (_, _, target), _ = plan(sharded, device=device)
        assert type(target) is type(sharded[0].data)
    refused(
        ValueError, "'cuda'…DTensors…parameter 0 of group 0…'cpu'…leave it None", plan, sharded,
        device=torch.device("cuda"),
    )  # fmt: skip
    file = tmp_path / "weights.safetensors"
    given = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    save_file(given, file)
    (_, source, target), _ = plan(sharded, names=["a", "b"], tensors=file)
    assert source is None and torch.equal(target.to_local(), given["a"])
