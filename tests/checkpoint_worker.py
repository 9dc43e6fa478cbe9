# SPDX-License-Identifier: BSD-3-Clause
"""What the ranks of tests/test_checkpoints.py run.

Started as a script it imports everything once, then forks the ranks of one run after the other, as
told on stdin: importing torch anew for every rank would take most of the time. It kills a run with
SIGKILL where it is told to.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pathlib
import re
import select
import signal
import sys
import threading
import time
import traceback
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as helpers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import dgg
import ranks
import training
from ranks import refusing

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"

GUIDED = {"alpha": 0.6, "max_grad_norm": 0.5, "seed": (1 << 63) + 3}
ADAM = {"lr": 3e-2, "weight_decay": 0.1, **GUIDED}
SGD = {"lr": 3e-2, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, **GUIDED}
WIDE = {"anchor_dtype": torch.float32, "state_dtype": torch.float32}
BF16, F64 = torch.bfloat16, torch.float64

BOUNDARY, LAST = 3, 8
SECOND = 6  # another boundary, of those with importance: its sums go on
# Name → class, options, dtype of the model, step before which it is saved.
CASES = {
    "adamw": (dgg.AdamW, ADAM, F64, 5),
    "adamw, two groups": (dgg.AdamW, {**ADAM, "amsgrad": True}, F64, 5),
    "adamw, bf16": (dgg.AdamW, {**ADAM, **WIDE}, BF16, 5),
    "adamw, master": (dgg.AdamW, {**ADAM, "master_weights": True}, BF16, 5),
    "adamw, importance": (dgg.AdamW, {**ADAM, "importance": 0.5}, F64, 5),
    "adamw, importance, bf16": (
        dgg.AdamW,
        {**ADAM, **WIDE, "importance": 1.0, "importance_dtype": torch.float32},
        BF16,
        5,
    ),
    "adamw, no anchor yet": (dgg.AdamW, ADAM, F64, 2),
    "adamw, no step yet": (dgg.AdamW, ADAM, F64, 0),
    "sgd": (dgg.SGD, {**SGD, "momentum": 0, "dampening": 0}, F64, 5),
    "sgd, momentum": (dgg.SGD, SGD, F64, 5),
    "sgd, no step yet": (dgg.SGD, {**SGD, "maximize": True}, F64, 0),
    "sgd, anchor and no step yet": (dgg.SGD, SGD, F64, 0),
}
FORMATS = ("nested", "flat", "full", "broadcast", "numbered")


# -- models, training, snapshots ------------------------------------------------------------------


def build(case: str, engine: str = "FSDP2", seed: int = 7, mesh=None):
    """Returns model and optimizer of a case, sharded by an engine."""
    cls, options, dtype, _ = CASES[case]
    model = training.stack(8, seed=seed, dtype=dtype)
    # One without any gradient.
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=dtype)))
    tensor_mesh = None
    if engine not in ("one process", "FSDP2"):
        mesh, tensor_mesh = training.meshes_of(engine, dist.get_world_size())
    if tensor_mesh is not None:
        plan = {
            "0": ColwiseParallel(output_layouts=Replicate()),
            "2": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, tensor_mesh, plan)
    if engine not in ("one process", "TP"):
        training.fully_shard(*model, model, mesh=mesh)
    if case == "adamw, two groups":
        named = list(model.named_parameters())
        groups = [{"params": named[:3], "alpha": 0.9}, {"params": named[3:], "lr": 1e-2}]
        return model, cls(groups, **options)
    return model, cls(model.parameters(), **options)


def fit(model, optimizer, first: int, last: int, *, early=False) -> None:
    """Trains; the boundary is at step BOUNDARY, or was early."""
    training.fit(model, optimizer, first, last, boundary=None if early else BOUNDARY)


def train(case: str, model, optimizer, first: int, last: int) -> None:
    early = case == "sgd, anchor and no step yet"
    if early and first == last == 0:
        optimizer.set_anchor()
    if "importance" in case and first < SECOND < last:
        fit(model, optimizer, first, SECOND)
        optimizer.set_anchor()
        first = SECOND
    fit(model, optimizer, first, last, early=early)


def snapshot(model, optimizer) -> dict:
    """Returns copies of everything there is, as whole tensors, gathered without any helper."""
    named = dict(model.named_parameters())
    begun = {name: p for name, p in named.items() if p in optimizer.state}
    assert len(begun) == len(optimizer.state)
    return {
        "weights": {name: training.whole(p) for name, p in named.items()},
        "state": training.whole_state(optimizer, begun),
        "groups": [
            {
                key: list(value) if isinstance(value, tuple) else copy.copy(value)
                for key, value in group.items()
                if key != "params"
            }
            for group in optimizer.param_groups
        ],
    }


def differences(found: dict, expected: dict, tolerance: float | None = None) -> list[str]:
    """Returns what differs between two snapshots: in a single bit, or beyond a tolerance."""
    wrong = []

    def compare(label, mine, theirs):
        if mine.keys() != theirs.keys():
            wrong.append(f"{label}: {sorted(mine)} instead of {sorted(theirs)}")
            return
        for key, value in mine.items():
            if isinstance(value, dict):
                compare(f"{label} {key}", value, theirs[key])
            elif not isinstance(value, torch.Tensor):
                # The mean of the importance is a sum over ranks.
                close = tolerance is not None and key == "importance_mean"
                if not (close and math.isclose(value, theirs[key], rel_tol=tolerance)) and (
                    value != theirs[key]
                ):
                    wrong.append(f"{label} {key}: {value} instead of {theirs[key]}")
            elif value.dtype != theirs[key].dtype or value.shape != theirs[key].shape:
                wrong.append(f"{label} {key}: {value.dtype} {tuple(value.shape)}")
            elif tolerance is None and not torch.equal(value, theirs[key]):
                wrong.append(f"{label} {key}: other bits")
            elif tolerance is not None and not torch.allclose(
                value, theirs[key], rtol=tolerance, atol=tolerance
            ):
                wrong.append(f"{label} {key}: beyond the tolerance")

    for part in ("weights", "state"):
        compare(part, found[part], expected[part])
    for number, (mine, theirs) in enumerate(zip(found["groups"], expected["groups"], strict=True)):
        compare(f"group {number}", mine, theirs)
    return wrong


# -- saving and resuming --------------------------------------------------------------------------


def options_of(form: str, case: str, **more) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=form == "flat",
        full_state_dict=form in ("full", "broadcast"),
        broadcast_from_rank0=form == "broadcast",
        # A parameter that never had a gradient has no state, which torch allows only so.
        strict=case not in ("adamw, no anchor yet", "sgd"),
        **more,
    )


def save_as(form: str, path: str, case: str, model, optimizer, group=None) -> None:
    if form in ("full", "broadcast"):
        parts = get_state_dict(model, optimizer, options=options_of("full", case, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(dict(zip(("model", "optimizer"), parts, strict=True)), path)
        return
    if form == "numbered":
        parts = model.state_dict(), optimizer.state_dict()
    else:
        parts = get_state_dict(model, optimizer, options=options_of(form, case))
    saved = dict(zip(("model", "optimizer"), parts, strict=True))
    dcp.save(saved, checkpoint_id=path, process_group=group)


class Weights:
    """A ``Stateful``: dcp.load() asks it for the template, and gives it what was loaded."""

    def __init__(self, case, model, optimizer):
        self.of, self.options = (model, optimizer), options_of("nested", case)

    def state_dict(self):
        return get_model_state_dict(self.of[0], options=self.options)

    def load_state_dict(self, found):
        set_model_state_dict(self.of[0], found, options=self.options)


class State(Weights):
    def state_dict(self):
        return get_optimizer_state_dict(*self.of, options=self.options)

    def load_state_dict(self, found):
        set_optimizer_state_dict(*self.of, found, options=self.options)


def load_from(form, path, case, model, optimizer, *, prepare=True, group=None, planner=None):
    """Resumes as docs/checkpoints.md says."""
    options = options_of(form, case)
    if form == "stateful":
        of = case, model, optimizer
        dcp.load({"model": Weights(*of), "optimizer": State(*of)}, checkpoint_id=path)
        return
    if form in ("full", "broadcast"):
        empty = form == "broadcast" and dist.get_rank() > 0
        saved = {"model": {}, "optimizer": {}}
        if not empty:
            saved = torch.load(path, weights_only=True)
        # Not set_state_dict: it leaves the model out on ranks that have nothing to give.
        set_model_state_dict(model, saved["model"], options=options)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
        return
    if prepare:
        optimizer.prepare_for_load(path, model=model)
    if form == "numbered":
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(saved, checkpoint_id=path, process_group=group)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return
    weights, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path, process_group=group, planner=planner)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
        options=options,
    )  # fmt: skip


def save_all(rank, world, folder, cases, forms, engine="FSDP2"):
    """Trains every case, saves it in every format, trains on; leaves what is to be expected."""
    for case in cases:
        cut = CASES[case][3]
        model, optimizer = build(case, engine)
        train(case, model, optimizer, 0, cut)
        saved = snapshot(model, optimizer)
        for form in forms:
            if form != "broadcast":
                save_as(form, f"{folder}/{engine}, {case}, {form}", case, model, optimizer)
        if cut == 0 and case != "sgd, anchor and no step yet":
            # The helper has made the state of this optimizer, and changed nothing else.
            made = snapshot(model, optimizer)
            assert made["groups"] == saved["groups"]
            assert all(not entry.any() for x in made["state"].values() for entry in x.values())
            saved = made
        train(case, model, optimizer, cut, LAST)
        end = snapshot(model, optimizer)
        model, straight = build(case, engine)
        train(case, model, straight, 0, 0)
        train(case, model, straight, 0, LAST)
        unhelped = snapshot(model, straight)
        if cut == 0:
            # The helper makes state of what never has a gradient, too.
            unhelped["state"]["spare"] = end["state"]["spare"]
        wrong = differences(end, unhelped)
        assert not wrong, f"{case}: saving changed the training: {wrong}"
        if rank == 0:
            torch.save([saved, end], f"{folder}/{engine}, {case}")


def without_extras(found: dict, expected: dict) -> None:
    """Drops the zeros that torch's helper made for what no step had begun.

    A whole state dict that has none leaves them in place.
    """
    for name, entry in list(found["state"].items()):
        for key in entry.keys() - expected["state"].get(name, {}):
            if key != "anchor" and not entry[key].any():
                del entry[key]
        if not entry:
            del found["state"][name]


def resume_all(rank, world, folder, source, cases, forms, engine="FSDP2", saved_by="FSDP2"):
    """Resumes every case from every format into new models and optimizers."""
    saved_on = json.loads(pathlib.Path(source, "world").read_text())
    same = saved_on == world and engine == saved_by
    for case in cases:
        cut, dtype = CASES[case][3], CASES[case][2]
        expected, end = torch.load(f"{source}/{saved_by}, {case}")
        for form in forms:
            model, optimizer = build(case, engine, seed=11)
            file = "full" if form == "broadcast" else form
            load_from(form, f"{source}/{saved_by}, {case}, {file}", case, model, optimizer)
            found = snapshot(model, optimizer)
            if form in ("full", "broadcast"):
                without_extras(found, expected)
            wrong = differences(found, expected)
            assert not wrong, f"{case}, {form}: {wrong}"
            train(case, model, optimizer, cut, LAST) if cut else fit(
                model, optimizer, 0, LAST, early=case == "sgd, anchor and no step yet"
            )
            if same or dtype is F64:
                # On other ranks the sums have another order.
                found = snapshot(model, optimizer)
                without_extras(found, end)
                wrong = differences(found, end, None if same else 1e-9)
                assert not wrong, f"{case}, {form}, to the end: {wrong}"


# -- what must not be silent ----------------------------------------------------------------------


def untouched(model, optimizer):
    """Returns a function that checks that neither has changed."""
    before = snapshot(model, optimizer)

    def check():
        wrong = differences(snapshot(model, optimizer), before)
        assert not wrong, wrong

    return check


def run_refusals(rank, world, folder):
    case = "adamw"
    model, optimizer = build(case)
    train(case, model, optimizer, 0, 2)
    for form in ("nested", "flat", "full"):
        save_as(form, f"{folder}/unguided {form}", "adamw, no anchor yet", model, optimizer)
    train(case, model, optimizer, 2, 5)
    for form in ("nested", "flat", "full"):
        save_as(form, f"{folder}/guided {form}", case, model, optimizer)
    guided = snapshot(model, optimizer)

    for form in ("nested", "flat"):
        for strictness in (case, "adamw, no anchor yet"):  # strict=True, strict=False
            # The usual template of a new optimizer has no room for anchors.
            model, optimizer = build(case, seed=11)
            with refusing(RuntimeError, "call prepare_for_load(checkpoint) first"):
                load_from(
                    form, f"{folder}/guided {form}", strictness, model, optimizer, prepare=False
                )
        # The other way round: an optimizer with an anchor, a checkpoint without.
        for text, error, planner in (
            ("Missing key in checkpoint state_dict", dcp.CheckpointException, None),
            (
                "as they stood in the template of a partial load",
                ValueError,
                dcp.DefaultLoadPlanner(allow_partial_load=True),
            ),
        ):
            model, optimizer = build(case, seed=11)
            optimizer.set_anchor()
            with refusing(error, text):
                load_from(
                    form, f"{folder}/unguided {form}", "adamw, no anchor yet", model, optimizer,
                    prepare=False, planner=planner,
                )  # fmt: skip
        # Prepared, it is not told what it does not hold.
        model, optimizer = build(case, seed=11)
        optimizer.set_anchor()
        path = f"{folder}/unguided {form}"
        load_from(form, path, "adamw, no anchor yet", model, optimizer)
        assert not any("anchor" in entry for entry in optimizer.state.values())
        assert optimizer.param_groups[0]["anchored"] == 0
        fit(model, optimizer, 5, 6)

    # A whole state dict brings its anchors along.
    model, optimizer = build(case, seed=11)
    load_from("full", f"{folder}/guided full", case, model, optimizer)
    assert not differences(snapshot(model, optimizer), guided)
    # Flattened and without an anchor, where this optimizer has one.
    model, optimizer = build(case, seed=11)
    optimizer.set_anchor()
    weights, state = get_state_dict(*build_trained(2), options=options_of("flat", case))
    with refusing(ValueError, "this optimizer has an anchor and the checkpoint carries none"):
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state,
            options=options_of("flat", case),
        )  # fmt: skip
    # ... and with a part of a parameter's state only.
    model, optimizer = build_trained(2)
    weights, state = get_state_dict(model, optimizer, options=options_of("flat", case))
    del state["state.0.weight.exp_avg"]
    check = untouched(model, optimizer)
    with refusing(ValueError, "carries no exp_avg of parameter"):
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state,
            options=options_of("flat", case),
        )  # fmt: skip
    check()

    # Room is no state.
    model, optimizer = build(case, seed=11)
    optimizer.prepare_for_load(f"{folder}/guided nested", model=model)
    group = optimizer.param_groups[0]
    assert (group["draw_index"], group["task_index"]) == (0, 0)
    for given in (optimizer, copy.copy(optimizer)):
        with refusing(RuntimeError, "made room in this optimizer for a checkpoint"):
            fit(model, given, 4, 5)
    model.zero_grad()
    _, state = get_state_dict(model, optimizer)
    with refusing(RuntimeError, "they were lost on the way"):  # the template itself
        optimizer.load_state_dict(state)
    optimizer.clear_anchor()
    fit(model, optimizer, 0, 2)
    optimizer.prepare_for_load()
    optimizer.set_anchor()
    fit(model, optimizer, 4, 6)

    # No checkpoint, somebody else's, or one of more than this optimizer keeps.
    check = untouched(model, optimizer)
    with refusing(FileNotFoundError, "holds no finished distributed checkpoint"):
        optimizer.prepare_for_load(folder, model=model)
    with refusing(TypeError, "is no distributed checkpoint"):
        optimizer.prepare_for_load(3, model=model)
    with refusing(KeyError, "pass model="):
        optimizer.prepare_for_load(f"{folder}/guided nested")
    with refusing(KeyError, "pass the model the checkpoint was made with"):
        optimizer.prepare_for_load(f"{folder}/guided nested", model=nn.Sequential(model))
    master, keeping = build("adamw, master")
    train("adamw, master", master, keeping, 0, 1)
    save_as("nested", f"{folder}/master", "adamw, no anchor yet", master, keeping)
    with refusing(ValueError, "build it with master_weights=True"):
        optimizer.prepare_for_load(f"{folder}/master", model=model)
    check()
    # A StorageReader and the metadata do as well as the directory.
    reader = dcp.FileSystemReader(f"{folder}/guided nested")
    for source in (reader, reader.read_metadata()):
        optimizer.prepare_for_load(source, model=model)
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, storage_reader=reader)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        assert not differences(snapshot(model, optimizer), guided)


def run_by_itself(rank, world, folder):
    """Room is made where a load asks for it; what is wrong there is wrong on all ranks."""
    case = "adamw"
    model, optimizer = build(case)
    train(case, model, optimizer, 0, 2)
    unguided = copy.deepcopy(
        get_optimizer_state_dict(model, optimizer, options=options_of("full", case))
    )
    start = snapshot(model, optimizer)
    train(case, model, optimizer, 2, 5)
    guided = snapshot(model, optimizer)
    taken = {
        form: get_optimizer_state_dict(model, optimizer, options=options_of(form, case))
        for form in ("full", "flat")
    }
    from_0 = {"full_state_dict": True, "broadcast_from_rank0": True}
    options = {"flat": {"flatten_optimizer_state_dict": True}, "full": {"full_state_dict": True}}

    def load(given, **settings):
        model, optimizer = build(case, seed=11)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = copy.deepcopy(given)
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(**settings))
        found = snapshot(model, optimizer)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        return {**found, "weights": guided["weights"]}, model, optimizer

    def only_on_0(given):
        return given if rank == 0 else None

    for form, settings in options.items():
        found, *_ = load(taken[form], **settings)
        assert not differences(found, guided), form
    found, *_ = load(only_on_0(taken["full"]), **from_0)
    assert not differences(found, guided)
    # Without guidance all is as with torch.optim, parameters without state included.
    for settings in (options["full"], from_0):
        given = unguided if settings is not from_0 else only_on_0(unguided)
        found, *again = load(given, strict=False, **settings)
        without_extras(found, start)
        assert not differences({**found, "weights": start["weights"]}, start)
        fit(*again, 5, 6)

    # Wrong in some way that rank 0 alone can see.
    lost = copy.deepcopy(taken["full"])
    del lost["state"]["0.weight"]["anchor"]
    smaller = copy.deepcopy(taken["full"])
    smaller["state"]["0.weight"]["exp_avg"] = torch.zeros(1, 6, dtype=F64)
    another = copy.deepcopy(taken["full"])
    another["state"] = {f"inner.{name}": entry for name, entry in another["state"].items()}
    part = copy.deepcopy(taken["full"])
    del part["state"]["0.weight"]
    broken = {
        "they were lost on the way": (lost, RuntimeError),
        "exp_avg of parameter 1 (0.weight) has shape (1, 6)": (smaller, ValueError),
        "holds nothing of parameter 0 (spare)": (another, KeyError),
        "holds nothing of parameter 1 (0.weight)": (part, KeyError),
        "no optimizer's state dict": ([1], TypeError),
    }
    for text, (given, error) in broken.items():
        with refusing(error if rank == 0 or given is lost else RuntimeError, text):
            load(only_on_0(given), **from_0)
        dist.barrier()
    # A rank that cannot take it.
    model, optimizer = build(case, seed=11)
    if rank == 1:
        optimizer.param_groups[0]["anchored"] = 3
    with refusing(RuntimeError, "the resume lost them"):
        state = only_on_0(copy.deepcopy(taken["full"]))
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(**from_0))
    # Rank 0 had state already, so that what it sends is torch's own message.
    with (
        mock.patch.object(
            dist, "broadcast_object_list", lambda told, src: told.__setitem__(0, {"a": 1})
        ),
        refusing(RuntimeError, "call prepare_for_load() on all ranks or on none"),
    ):
        load(only_on_0(taken["full"]), **from_0)
    # Of no state there is no room to be made, however often torch asks for it.
    model, optimizer = build("sgd")
    fit(model, optimizer, 0, 2)
    save_as("nested", f"{folder}/no state", "sgd", model, optimizer)
    expected = snapshot(model, optimizer)
    model, optimizer = build("sgd", seed=11)
    load_from("nested", f"{folder}/no state", "sgd", model, optimizer)
    assert not differences(snapshot(model, optimizer), expected)
    fit(model, optimizer, 2, 3)
    # dcp.load() that asks for the template itself. One that calls its variables otherwise is not
    # understood, and nothing is lost.
    for other in ("adamw, two groups", "adamw, bf16", "adamw, master", "sgd", case):
        model, optimizer = build(other)
        train(other, model, optimizer, 0, 5)
        save_as("nested", f"{folder}/{other}", other, model, optimizer)
        expected = snapshot(model, optimizer)
        model, optimizer = build(other, seed=11)
        load_from("stateful", f"{folder}/{other}", other, model, optimizer)
        wrong = differences(snapshot(model, optimizer), expected)
        assert not wrong, f"{other}: {wrong}"
    held = [("torch.distributed.checkpoint.state_dict_loader", "load", "reader")]
    unknown = mock.patch.object(dgg.checkpoint.source, "_LOADERS", held)
    with unknown, refusing(RuntimeError, "lost on the way"):
        load_from("stateful", f"{folder}/{case}", case, *build(case, seed=11))
    with mock.patch.object(dgg.checkpoint.room, "of_template", lambda: None):
        state, (model, optimizer) = only_on_0(copy.deepcopy(taken["full"])), build(case, seed=11)
        lost = refusing(RuntimeError, "lost on the way") if rank else contextlib.nullcontext()
        with lost:
            set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(**from_0))
        dist.barrier()
        with refusing(RuntimeError, "lost on the way"):
            load(taken["flat"], **options["flat"])
    # A directory that is damaged: torch says so, on all ranks.
    dist.barrier()
    if rank == 0:
        pathlib.Path(folder, case, ".metadata").write_bytes(b"")
    dist.barrier()
    with refusing(dcp.CheckpointException, "metadata"):
        load_from("stateful", f"{folder}/{case}", case, *build(case, seed=11))


def build_trained(steps):
    model, optimizer = build("adamw")
    model.spare.requires_grad_(False)
    train("adamw", model, optimizer, 0, steps)
    return model, optimizer


def run_importance(rank, world, folder):
    """A checkpoint without the importance that it promises, or that this optimizer would weigh."""
    case = "adamw, importance"
    model, optimizer = build(case)
    train(case, model, optimizer, 0, 5)
    guided = snapshot(model, optimizer)
    taken = {
        form: get_optimizer_state_dict(model, optimizer, options=options_of(form, case))
        for form in ("full", "flat")
    }
    for form, given in taken.items():
        lost = copy.deepcopy(given)
        if form == "full":
            for entry in lost["state"].values():
                entry.pop("importance", None)
        else:
            lost = {key: x for key, x in lost.items() if key.rpartition(".")[2] != "importance"}
            lost |= {
                key: x for key, x in given.items() if key.startswith("param_groups.")
            }  # fmt: skip
        for prepared in (False, True):
            model, optimizer = build(case, seed=11)
            if prepared:
                optimizer.prepare_for_load()
            with refusing(RuntimeError, "carries no importance of parameter"):
                set_optimizer_state_dict(model, optimizer, lost, options=options_of(form, case))
    # Room for what is not there, in a distributed checkpoint of one that weighs nothing.
    model, plain = build("adamw")
    train("adamw", model, plain, 0, 5)
    save_as("nested", f"{folder}/without", "adamw", model, plain)
    unweighted = snapshot(model, plain)
    model, optimizer = build(case, seed=11)
    optimizer.prepare_for_load()
    with refusing(dcp.CheckpointException, "Missing key in checkpoint state_dict"):
        load_from("nested", f"{folder}/without", "adamw", model, optimizer, prepare=False)
    # Prepared for just this one, the options are the checkpoint's, as all options are. Switched on
    # again, the weight has nothing to weigh with before the next boundary.
    model, optimizer = build(case, seed=11)
    load_from("nested", f"{folder}/without", "adamw", model, optimizer)
    assert not differences(snapshot(model, optimizer), unweighted)
    for group in optimizer.param_groups:
        group["importance"] = 0.5
    with refusing(RuntimeError, "importance=0.5 weighs the pull of"):
        fit(model, optimizer, 5, 6)
    model.zero_grad()
    optimizer.set_anchor(task=2)
    fit(model, optimizer, 5, 7)
    # A Stateful, and rank 0 alone.
    model, optimizer = build(case)
    train(case, model, optimizer, 0, 5)
    save_as("nested", f"{folder}/with", case, model, optimizer)
    model, optimizer = build(case, seed=11)
    load_from("stateful", f"{folder}/with", case, model, optimizer)
    assert not differences(snapshot(model, optimizer), guided)
    optimizer = None
    for form in ("flat", "full"):
        model, optimizer = build(case, seed=11)
        set_optimizer_state_dict(
            model, optimizer, copy.deepcopy(taken[form]), options=options_of(form, case)
        )
        found = snapshot(model, optimizer)
        assert not differences({**found, "weights": guided["weights"]}, guided), form


def run_frozen(rank, world, folder):
    """Frozen after it was anchored: torch's helpers leave its state out."""
    case = "adamw"
    model, optimizer = build(case)
    train(case, model, optimizer, 0, 5)
    model[0].weight.requires_grad_(False)
    for form in ("nested", "flat", "full"):
        save_as(form, f"{folder}/{form}", case, model, optimizer)
    expected = snapshot(model, optimizer)
    for form in ("nested", "flat", "full", "broadcast"):
        file = f"{folder}/{'full' if form == 'broadcast' else form}"
        model, optimizer = build(case, seed=11)
        model[0].weight.requires_grad_(False)
        if form in ("full", "broadcast"):
            with refusing(RuntimeError, "requires_grad_(True) while it is loaded"):
                load_from(form, file, case, model, optimizer)
            model, optimizer = build(case, seed=11)
        load_from(form, file, case, model, optimizer)
        assert not differences(snapshot(model, optimizer), expected), form


def run_helper(rank, world, folder, cases=("adamw", "sgd, momentum")):
    """The helper's step with zero gradients changes nothing, whatever the optimizer."""
    for case in cases:
        for change in ({}, {"maximize": True}, {"nesterov": True, "dampening": 0}):
            cls, options, *_ = CASES[case]
            if change and case not in ("adamw", "sgd, momentum"):
                continue
            if "nesterov" in change and not (cls is dgg.SGD and options["momentum"]):
                continue
            runs = []
            for helped in (False, True):
                model, optimizer = build(case)
                for group in optimizer.param_groups:
                    group.update(change)
                before = snapshot(model, optimizer)
                if helped:
                    get_optimizer_state_dict(model, optimizer)
                    after = snapshot(model, optimizer)
                    assert after["groups"] == before["groups"]
                    assert not differences({**after, "state": {}}, {**before, "state": {}})
                fit(model, optimizer, 0, 2)
                if helped:
                    # The state is there already: the helper does not step at all.
                    optimizer.set_anchor()
                    check = untouched(model, optimizer)
                    helpers._init_optim_state(optimizer)
                    check()
                else:
                    optimizer.set_anchor()
                fit(model, optimizer, 2, 5, early=True)
                runs.append(snapshot(model, optimizer))
            first, second = runs
            # What never had a gradient got state of zeros from the helper.
            second["state"]["spare"] = first["state"]["spare"]
            assert not differences(second, first), f"{case}, {change}"
    # An anchor that was lost is missed by the helper, too.
    model, optimizer = build("adamw")
    optimizer.set_anchor()
    optimizer.state.clear()
    with refusing(RuntimeError, "the resume lost them"):
        get_optimizer_state_dict(model, optimizer)
    # A step with a learning rate and gradients of 0 that the helper does not make is a step.
    model, optimizer = build("adamw")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["draw_index"] == 1
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


class Waiting(dcp.FileSystemWriter):
    """Does not begin to write before it is told."""

    def __init__(self, path):
        super().__init__(path)
        self.go = threading.Event()

    def write_data(self, plan, planner):
        assert self.go.wait(60)
        return super().write_data(plan, planner)


def run_async(rank, world, folder):
    """The checkpoint is that of the call, whatever is trained and anchored until it is written."""
    group = dist.new_group(backend="gloo")
    for case in ("adamw", "adamw, master", "sgd, momentum"):
        model, optimizer = build(case)
        train(case, model, optimizer, 0, 5)
        expected = snapshot(model, optimizer)
        weights, state = get_state_dict(model, optimizer)
        path = f"{folder}/{case}"
        writer = Waiting(path)
        future = dcp.async_save(
            {"model": weights, "optimizer": state}, storage_writer=writer, process_group=group
        )
        fit(model, optimizer, 5, 8)
        optimizer.set_anchor()
        writer.go.set()
        future.result()
        assert differences(snapshot(model, optimizer), expected)
        model, optimizer = build(case, seed=11)
        load_from("nested", path, case, model, optimizer)
        assert not differences(snapshot(model, optimizer), expected), case


def run_part_of_the_ranks(rank, world, folder):
    """Model, norms and checkpoint of ranks 0 and 1; rank 2 takes part in nothing."""
    mesh = DeviceMesh("cpu", [0, 1])
    if rank == 2:
        return
    group = mesh.get_group()
    case = "adamw"
    model, optimizer = build(case, mesh=mesh)
    train(case, model, optimizer, 0, 5)
    expected = snapshot(model, optimizer)
    for form in ("nested", "flat"):
        save_as(form, f"{folder}/{form}", case, model, optimizer, group)
        model, optimizer = build(case, seed=11, mesh=mesh)
        load_from(form, f"{folder}/{form}", case, model, optimizer, group=group)
        assert not differences(snapshot(model, optimizer), expected)
    fit(model, optimizer, 5, 8)
    end = snapshot(model, optimizer)
    if rank == 0:
        torch.save(end, f"{folder}/end")


def run_engines(rank, world, folder):
    """HSDP, TP and both: saved and resumed in the same layout, and from it by FSDP2."""
    for engine in ("HSDP", "TP", "TP + FSDP2"):
        save_all(rank, world, folder, ["adamw"], ["nested"], engine)
        dist.barrier()
        pathlib.Path(folder, "world").write_text(str(world))
        dist.barrier()
        arguments = (rank, world, folder, folder, ["adamw"], ["nested"])
        resume_all(*arguments, engine, engine)
        resume_all(*arguments, "FSDP2", engine)


def run_torch(rank, world, folder):
    """A checkpoint of torch.optim.AdamW becomes one of ours, by a partial load."""
    model, optimizer = build("adamw")
    theirs = torch.optim.AdamW(model.parameters(), lr=0.02)
    fit(model, theirs, 0, 3)
    save_as("nested", f"{folder}/torch", "sgd", model, theirs)
    model, optimizer = build("adamw", seed=11)
    with refusing(dcp.CheckpointException, "Missing key in checkpoint state_dict"):
        load_from("nested", f"{folder}/torch", "sgd", model, optimizer)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    model, optimizer = build("adamw", seed=11)
    load_from("nested", f"{folder}/torch", "sgd", model, optimizer, planner=planner)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["alpha"], group["draw_index"]) == (0.02, GUIDED["alpha"], 0)
    for p in model.parameters():
        assert optimizer.state.get(p, {}).get("step", 3) == 3
    fit(model, optimizer, 3, 5)


# -- killed and resumed ---------------------------------------------------------------------------

PER_TASK, TASKS, EVERY = 8, 3, 2


def of_the_docs() -> dict:
    """Returns the functions that docs/checkpoints.md shows."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    found: dict = {}
    for block in blocks:
        if "def " in block:
            exec(block, found)
    return found


def run_trial(rank, world, folder, root, progress):
    """A training of three tasks that saves every two steps and resumes wherever it was killed."""
    shown = of_the_docs()
    tell = (lambda what: os.write(progress, what)) if rank == 0 else (lambda what: None)
    case = "sgd, momentum" if "sgd" in root else "adamw"
    place, ending, engine = root, "", "FSDP2"
    if world == 1:
        place, ending, engine = f"{root}/checkpoint.pt", "_alone", "one process"
    model, optimizer = build(case, engine)
    model.spare.requires_grad_(False)
    tell(b"t")
    step = shown[f"resume{ending}"](place, model, optimizer)
    tell(b"r%d." % step)
    for task in range(step // PER_TASK, TASKS):
        optimizer.set_anchor(task=task)
        while step < (task + 1) * PER_TASK:
            fit(model, optimizer, step, step + 1, early=True)
            step += 1
            if step % EVERY == 0:
                tell(b"s")
                shown[f"save{ending}"](place, step, model, optimizer)
                tell(b"e")
    end = snapshot(model, optimizer)
    if rank == 0:
        torch.save(end, f"{root}/end.partial")
        os.rename(f"{root}/end.partial", f"{root}/end")


# -- the script -----------------------------------------------------------------------------------

LIMIT = 150.0


def run_rank(function, rank, world, folder, arguments):
    """Runs one rank in this forked process and ends it."""
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        ranks.join(rank, world, folder)
        globals()[function](rank, world, folder, *arguments)
        # Not where another rank may still talk to one that failed.
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def kill_as_told(children, kill, progress):
    """Kills the ranks at a moment; returns what the run had told until then."""
    told, began, saving, duration = b"", None, None, 0.02
    deadline = time.monotonic() + LIMIT
    moment = None
    while time.monotonic() < (deadline if moment is None else moment):
        left = (deadline if moment is None else moment) - time.monotonic()
        if select.select([progress], [], [], max(0.0, left))[0]:
            news = os.read(progress, 4096)
            if not news:
                return told, False
            told += news
            now = time.monotonic()
            if began is None:
                began = now
                if "after" in kill:
                    moment = began + kill["after"]
            if b"s" in news:
                saving = now
            if b"e" in news and saving is not None:
                duration = now - saving
            if "save" in kill and moment is None and told.count(b"s") >= kill["save"]:
                moment = saving + kill["fraction"] * duration
    for rank in kill["order"]:
        os.kill(children[rank], signal.SIGKILL)
    return told, True


def run(request: dict) -> dict:
    """Forks the ranks of one run, kills them if told to, and returns how they ended."""
    pathlib.Path(request["folder"]).mkdir(exist_ok=True)
    reading, writing = os.pipe()
    children = []
    begin = time.monotonic()
    for rank in range(request["world"]):
        child = os.fork()
        if child == 0:
            os.close(reading)
            arguments = [writing if x == "progress" else x for x in request["arguments"]]
            run_rank(request["function"], rank, request["world"], request["folder"], arguments)
        children.append(child)
    os.close(writing)
    told, killed = b"", False
    if request.get("kill"):
        told, killed = kill_as_told(children, request["kill"], reading)
    codes, end = {}, begin + LIMIT
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:  # the others would wait for it
                    end = min(end, time.monotonic() + 1.0)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(BlockingIOError):
        os.set_blocking(reading, False)
        told += os.read(reading, 65536)
    os.close(reading)
    seconds = time.monotonic() - begin
    return {
        "codes": [codes[child] for child in children], "killed": killed, "told": told.decode(),
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
