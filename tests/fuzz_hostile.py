# SPDX-License-Identifier: BSD-3-Clause
"""Broken, mistyped and foreign checkpoints, anchors and replay buffers, made at random.

A valid state is taken, one or two things in it are spoilt, and it is loaded. Either it is refused
with a clear error: then everything is bit for bit what it was, and the next step is that of an
optimizer that was never asked. Or it is taken: then what was loaded is what was given, and the
next steps are those that the float64 model makes of it. Anything else is a difference.

    python -P tests/fuzz_hostile.py --seconds 600 --seed 1
    python -P tests/fuzz_hostile.py --repro "optimizer 12345"
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import pathlib
import random
import re
import struct
import sys
import tempfile
import warnings

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import dgg
import fuzz_machine as machine
import fuzz_model as model
from fuzz_machine import C64, CLEAR, F16, F32, F64, OF_BOUNDARIES, Difference, World

# -- spoiling -------------------------------------------------------------------------------------


def weird_numbers(rng):
    return rng.choice([
        "x", "3", b"3", None, [1], (1, 2), {}, {"a": 1}, set(), 10**400, -(10**400), -1, 2**70,
        2**63, 1.5, -0.5, float("nan"), float("inf"), True, False, 0, 1, 3, np.float32(0.5),
        np.float64("nan"), np.int64(3), np.ones(3), np.array(2.0), torch.tensor(3),
        torch.tensor(-1), torch.tensor(2.5), torch.tensor(float("nan")), torch.tensor([2.0]),
        torch.ones(2), torch.ones(0), torch.tensor(True), torch.tensor(1j),
        torch.tensor(1.0, device="meta"), torch.eye(1).to_sparse(), 1j, print, object(), int,
        "global", "step", "tensor", "element", "auto",
    ])  # fmt: skip


def weird_tensor(rng, like: torch.Tensor, others: list[torch.Tensor]):
    """Something in place of a tensor, of its shape or not; a word for it."""
    shape = like.shape
    number = like.numel()
    choices = {
        "a number or the like": lambda: weird_numbers(rng),
        "float64": lambda: torch.randn(shape, dtype=F64),
        "float16": lambda: torch.randn(shape).half(),
        "bfloat16": lambda: torch.randn(shape).bfloat16(),
        "bool": lambda: torch.ones(shape, dtype=torch.bool),
        "int64": lambda: torch.ones(shape, dtype=torch.int64),
        "uint8": lambda: torch.ones(shape, dtype=torch.uint8),
        "float8": lambda: torch.ones(shape).to(torch.float8_e4m3fn),
        "complex": lambda: torch.ones(shape, dtype=C64),
        "real": lambda: torch.ones(shape),
        "meta": lambda: torch.empty(shape, device="meta", dtype=like.dtype),
        "sparse": lambda: torch.ones(shape, dtype=like.dtype).to_sparse() if shape else 3,
        "expanded": lambda: torch.full((), 0.5, dtype=like.dtype).expand(shape),
        "expanded rows": lambda: (
            torch.full((*shape[:-1], 1), 0.5, dtype=like.dtype).expand(shape) if shape else 1
        ),
        "huge": lambda: torch.zeros(1).expand(10**12),
        "another shape": lambda: torch.ones(*shape, 2, dtype=like.dtype),
        "flat": lambda: torch.ones(number, dtype=like.dtype),
        "one longer": lambda: torch.ones(number + 1, dtype=like.dtype),
        "empty": lambda: torch.ones(0, dtype=like.dtype),
        "a scalar": lambda: torch.tensor(1.0),
        "inf": lambda: torch.full(shape, float("inf"), dtype=like.dtype),
        "nan": lambda: torch.full(shape, float("nan"), dtype=like.dtype),
        "negative": lambda: torch.full(shape, -1.0, dtype=like.dtype),
        "one nan": lambda: _one(rng, like, float("nan")),
        "large": lambda: torch.full(shape, 3e4, dtype=like.dtype),
        "transposed": lambda: machine.lay_out(like.clone(), "turned"),
        "gaps": lambda: machine.lay_out(like.clone(), "gaps"),
        "offset": lambda: machine.lay_out(like.clone(), "offset"),
        "negated": lambda: torch._neg_view(like.clone()),
        "negated float16": lambda: (
            torch._neg_view(like.clone().half()) if not like.is_complex() else like
        ),
        "conjugated": lambda: like.clone().conj(),
        "requires grad": lambda: like.clone().requires_grad_(like.is_floating_point()),
        "a parameter": lambda: nn.Parameter(like.clone(), requires_grad=False),
        "another's memory": lambda: rng.choice(others) if others else like,
        "a view of another's": lambda: rng.choice(others).view_as(like) if others else like,
        "an array": lambda: np.ones(tuple(shape)),
        "a list": lambda: [0.0] * number,
        "a buffer": lambda: nn.Buffer(like.clone()),
    }
    word = rng.choice(list(choices))
    try:
        return choices[word](), word
    except (RuntimeError, TypeError, ValueError):
        return weird_numbers(rng), "a number or the like"


def _one(rng, like, value):
    x = like.clone()
    if x.numel():
        x.view(-1)[rng.randrange(x.numel())] = value
    return x


def spoil_state(rng, d: dict, w: World) -> list[str]:
    """Spoils an optimizer's state dict in place (or returns another); says how."""
    said = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        said.append(_spoil_once(rng, d, w))
    return said


def _spoil_once(rng, d: dict, w: World) -> str:
    state = d.get("state")
    groups = d.get("param_groups")
    entries = (
        [(k, e) for k, e in state.items() if isinstance(e, dict) and e]
        if isinstance(state, dict)
        else []
    )
    groups_ok = isinstance(groups, list) and groups and all(isinstance(g, dict) for g in groups)
    kind = rng.choice(
        ["leaf"] * 8
        + ["drop"] * 3
        + ["option"] * 6
        + ["entry", "entry", "keys", "group", "params", "top", "alias", "extra", "moved"]
    )
    if kind in ("leaf", "drop", "alias", "moved") and entries:
        key, entry = rng.choice(entries)
        name = rng.choice(list(entry))
        if kind == "drop":
            del entry[name]
            return f"no {name} of {key}"
        if kind == "alias":
            # Two parameters with one tensor, as somebody who fills a state by hand has it.
            other, _ = rng.choice(entries)
            if name in state[other]:
                entry[name] = state[other][name]
                return f"{name} of {key} is that of {other}"
            return "nothing"
        if kind == "moved":
            other, source = rng.choice(entries)
            entry[name] = rng.choice(list(source.values()))
            return f"{name} of {key} is another tensor of {other}"
        value = entry[name]
        if name == "step" and rng.random() < 0.7 or not isinstance(value, torch.Tensor):
            entry[name] = weird_numbers(rng)
            return f"{name} of {key} is {_shown(entry[name])}"
        tensors = [
            x
            for _, e in entries
            for x in e.values()
            if isinstance(x, torch.Tensor) and x.shape == value.shape
        ]
        tensors += [p.data for p in w.params if p.shape == value.shape]
        entry[name], word = weird_tensor(rng, value, tensors)
        kind = f"{tuple(value.shape)}, {value.dtype}"
        return f"{name} of {key} ({kind}) is {word}: {_shown(entry[name])}"
    if kind == "option" and groups_ok:
        group = rng.choice(groups)
        name = rng.choice([k for k in group if k != "params"] or ["lr"])
        if rng.random() < 0.15:
            group.pop(name, None)
            return f"no {name} in a group"
        value = weird_numbers(rng)
        everywhere = rng.random() < 0.5
        for each in groups if everywhere else [group]:
            each[name] = value
        return f"{name} is {_shown(value)} {'in all groups' if everywhere else 'in one group'}"
    if kind == "entry" and entries:
        key, entry = rng.choice(entries)
        state[key] = rng.choice(
            [
                None,
                {},
                [],
                "x",
                3,
                torch.ones(2),
                list(entry.items()),
                collections.OrderedDict(entry),
            ]
        )
        return f"the state of {key} is {_shown(state[key])}"
    if kind == "keys" and isinstance(state, dict) and state:
        way = rng.choice(["text", "shift", "turn", "extra", "none", "names"])
        keys = list(state)
        if way == "text":
            d["state"] = {str(k): v for k, v in state.items()}
        elif way == "shift":
            d["state"] = {(k + 1 if isinstance(k, int) else k): v for k, v in state.items()}
        elif way == "turn":
            d["state"] = dict(zip(keys, reversed(list(state.values())), strict=True))
        elif way == "extra":
            state[rng.choice([99, "x", None, -1])] = copy.deepcopy(state[keys[0]])
        elif way == "names":
            d["state"] = {f"p{k}": v for k, v in state.items()}
        else:
            d["state"] = rng.choice([None, [], {}, "x", list(state.values())])
        return f"keys of the state: {way}"
    if kind == "group" and groups_ok:
        way = rng.choice(["drop", "twice", "tuple", "dict", "none", "list", "turn", "text"])
        if way == "drop":
            groups.pop()
        elif way == "twice":
            groups.append(copy.deepcopy(groups[-1]))
        elif way == "tuple":
            d["param_groups"] = tuple(groups)
        elif way == "dict":
            d["param_groups"] = dict(enumerate(groups))
        elif way == "none":
            d["param_groups"] = rng.choice([None, [], 3, "x", {}])
        elif way == "list":
            groups[0] = rng.choice([list(groups[0].items()), None, "x", 3])
        elif way == "turn":
            groups.reverse()
        else:
            d["param_groups"] = json.dumps([str(g) for g in groups])
        return f"groups: {way}"
    if kind == "params" and groups_ok:
        group = rng.choice(groups)
        members = group.get("params")
        if isinstance(members, list):
            value = rng.choice([
                None, 3, "x", tuple(members), members[:-1], [*members, 99], list(reversed(members)),
                [str(m) for m in members], [m + 1 for m in members if isinstance(m, int)],
                [None] * len(members), [[m] for m in members], members[:1] * len(members),
                [99 + k for k in range(len(members))], {m: m for m in members if type(m) is int},
                [float(m) for m in members if isinstance(m, int)],
                torch.arange(len(members)),
            ])  # fmt: skip
            group["params"] = value
            return f"params of a group: {_shown(value)}"
    if kind == "top":
        name = rng.choice(["state", "param_groups"])
        if rng.random() < 0.5:
            d.pop(name, None)
            return f"no {name}"
        d[name] = weird_numbers(rng)
        return f"{name} is {_shown(d[name])}"
    if kind == "extra" and groups_ok:
        if rng.random() < 0.5 and entries:
            entries[0][1][
                rng.choice(["foo", 3, "state1", "master", "max_exp_avg_sq", "momentum_buffer"])
            ] = weird_numbers(rng)
            return "a further key in an entry"
        groups[0][
            rng.choice(["foo", "initial_lr", "swa_lr", "param_names", "capturable", "fused"])
        ] = weird_numbers(rng)
        return "a further option in a group"
    return "nothing"


def _shown(value) -> str:
    if isinstance(value, torch.Tensor):
        text = f"tensor {value.dtype} {tuple(value.shape)}"
        if value.numel() == 1 and not value.is_meta and value.layout == torch.strided:
            # Torch reads no lazily negated number of 8 bits.
            with contextlib.suppress(NotImplementedError):
                text += f" {value.item()}"
        return text
    return repr(value)[:80]


FOREIGN = {
    "SGD": {"momentum": 0.9}, "Adamax": {}, "RMSprop": {}, "Adagrad": {}, "NAdam": {}, "RAdam": {},
    "Adam": {},
    "AdamW": {"amsgrad": True}, "Rprop": {}, "ASGD": {}, "Adadelta": {}, "LBFGS": {},
}  # fmt: skip


def foreign_state(rng, w: World):
    """The state dict of another optimizer over the same parameters."""
    name = rng.choice(list(FOREIGN))
    params = [
        nn.Parameter(h.theta.clone().float() if h.theta.is_complex() is False else h.theta.clone())
        for h in w.held
    ]
    groups = [{"params": part} for part in w.parts(params)]
    if name == "LBFGS":
        groups = params
    opt = getattr(torch.optim, name)(groups, lr=0.1, **FOREIGN[name])
    if name != "LBFGS":
        for p in params:
            p.grad = torch.ones_like(p)
        with contextlib.suppress(RuntimeError):  # Rprop and others know no complex numbers
            opt.step()
    state = copy.deepcopy(opt.state_dict())
    if rng.random() < 0.3:  # as bitsandbytes calls them
        for entry in state["state"].values():
            for old, new in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                if old in entry:
                    entry[new] = entry.pop(old)
        name += " with other names"
    return state, name


# -- loading into an optimizer --------------------------------------------------------------------


class Case:
    """One hostile attempt: where it comes from, and what was done."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.taken = False


def relevant(w: World) -> tuple[str, ...]:
    """The keys of the state that the optimizer knows."""
    return (*columns(w), *(("step",) if w.rule == "adam" else ()), "master", *OF_BOUNDARIES)


def prepared(seed: int, notes=None) -> World:
    """A world in the middle of its life."""
    rng = random.Random(seed ^ 0xABC)
    w = World(seed, notes=notes)
    for _ in range(rng.choice([0, 1, 2, 4])):
        name = rng.choice(["train", "train", "train", "set_anchor", "options"])
        machine.ACTIONS[name][0](w, random.Random(rng.getrandbits(24)))
        w.check("preparation")
    machine.zero(w, True)
    w.check("preparation")
    return w


def hostile_load(w: World, rng, case: Case) -> None:
    if w.foreign:
        return hostile_guidance(w, rng, case)
    d = copy.deepcopy(w.opt.state_dict())
    if rng.random() < 0.12:
        d, name = foreign_state(rng, w)
        case.said.append(f"state of {name}")
        if rng.random() < 0.3:
            case.said += spoil_state(rng, d, w)
    elif rng.random() < 0.02:
        d = rng.choice([None, 3, "x", [], {}, [d], {"optimizer": d}, w.bag.state_dict(), object()])
        case.said.append(f"{_shown(d)}")
    else:
        case.said += spoil_state(rng, d, w)
    if rng.random() < 0.25:
        # Replay gradients that wait for the next step are of no checkpoint's concern.
        machine.ACTIONS["replay"][0](w, random.Random(rng.getrandbits(24)))
    load_and_train(w, rng, case, w.opt, d, take_over)


def load_and_train(w: World, rng, case, target, d, accept) -> None:
    """Loads ``d``, which is refused with a word or taken whole, and makes two steps.

    Args:
        w: The world.
        rng: Seeds the steps.
        case: Notes whether it was taken.
        target: Who loads it: the optimizer, or what guides it.
        d: The state.
        accept: Tells the model what was taken.
    """
    given = keep_copy(d)
    try:
        target.load_state_dict(d)
    except CLEAR as error:
        check_said(error, "load")
        w.check("refused load")
    except Exception as error:
        raise Difference(f"load raises {type(error).__name__}", str(error)[:200]) from error
    else:
        case.taken = True
        accept(w, given)
    for _ in range(2):
        machine.ACTIONS["train"][0](w, random.Random(rng.getrandbits(24)))
        w.check("step after a load")


def check_said(error: Exception, where: str) -> None:
    if not str(error).strip("'\" "):
        raise Difference(f"{where}: an error without a word", type(error).__name__) from error


def keep_copy(d):
    """A deep copy that keeps what tensors share (as the optimizer will see it)."""
    try:
        return copy.deepcopy(d)
    except Exception:
        return d


def take_over(w: World, d: dict) -> None:
    """Makes the model what a taken state dict says; what it cannot mean is a difference."""
    before = w.wide["draw_index"]
    if not isinstance(d, collections.abc.Mapping):
        raise Difference("load: takes what is no dict", _shown(d))
    groups, state = d["param_groups"], d["state"]
    place = 0
    for number, (mine, saved) in enumerate(zip(w.groups, groups, strict=True)):
        if len(saved["params"]) != mine["size"]:
            raise Difference(
                "load: takes other groups", f"{len(saved['params'])} for {mine['size']}"
            )
        for name in ("lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "strength"):
            if name in mine and name in saved:
                mine[name] = group_option_of(saved[name], name)
        for name in ("maximize", "amsgrad", "nesterov"):
            if name in mine:  # older releases of torch did not save them
                mine[name] = flag_of(saved.get(name, False), name)
        if w.kind == "Adam":
            mine["decoupled"] = flag_of(saved.get("decoupled_weight_decay", False), "decoupled")
        if "betas" in mine and "betas" in saved:
            mine["betas"] = tuple(number_of(b, "betas") for b in saved["betas"])
        if number == 0:
            for name in machine.WIDE:
                if name in saved:
                    w.wide[name] = option_of(saved[name], name)
        for key in saved["params"]:
            held = w.held[place]
            entry = state.get(key) if isinstance(state, collections.abc.Mapping) else None
            held.state = {}
            held.first, held.stale = False, None
            for name, value in (entry or {}).items():
                # Torch's helpers leave empty dicts where there is nothing.
                nothing = value is None or isinstance(value, dict) and not value
                if name not in relevant(w) or nothing:
                    continue
                loaded = loaded_value(w, place, name, value)
                if loaded is not None:
                    held.state[name] = loaded
            if w.kind == "SGD" and all(
                number_of(g.get("draw_index", 1), "draw_index") == 0 for g in groups
            ):
                buffer = held.state.get("momentum_buffer")
                held.first = buffer is not None and not model.flat(buffer).any()
            place += 1
    for n, mine in enumerate(w.groups):
        # Other ranks' anchors are counted by the checkpoint, not seen here.
        mine["anchored"] = w.opt.param_groups[n]["anchored"]
    machine_counts = [g["anchored"] for g in w.groups]
    machine.count_anchored(w)
    if [g["anchored"] for g in w.groups] != machine_counts:
        raise Difference(
            "load: takes a wrong number of anchors",
            f"{machine_counts}, there are {[g['anchored'] for g in w.groups]}",
        )
    fresh = before <= 1 or before == w.resumed
    w.resumed = w.wide["draw_index"] if fresh else None
    w.task_named = None
    assert_weighed(w)
    # Keys that only others know stay where they are, as torch.optim leaves them.
    real = w.real_state
    w.real_state = lambda p: {k: v for k, v in real(p).items() if k in relevant(w)}
    w.check("taken load")


def number_of(value, name: str) -> float:
    try:
        if isinstance(value, torch.Tensor):
            value = value.item()
        if isinstance(value, (str, bytes, bool)) or isinstance(value, complex):
            raise TypeError
        if isinstance(value, int):
            return value
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Difference(f"load: takes {name} that is no number", _shown(value)) from error


def flag_of(value, name: str) -> bool:
    if isinstance(value, (bool, int)) or value is None or isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return bool(value)
    raise Difference(f"load: takes {name} that is no flag", _shown(value))


def group_option_of(value, name: str):
    """Returns what is made of an option that every group has its own of."""
    if name == "alpha" and isinstance(value, str) and value == "auto":
        return value
    return number_of(value, name)


def assert_weighed(w: World) -> None:
    """The importance that a state brings is made of squares, and none is missing."""
    for i, held in enumerate(w.held):
        weights = held.state.get("importance")
        if weights is None and w.wide["importance"] and "anchor" in held.state:
            raise Difference("load: takes anchors without importance", f"of p{i}")
        if weights is not None:
            values = model.flat(weights)
            if not np.isfinite(values).all() or (values < 0).any():
                raise Difference("load: takes an importance that no squares are", f"of p{i}")


def option_of(value, name: str):
    """Returns what is made of an option that all groups share."""
    if name in ("seed", "draw_index", "task_index"):
        return int(number_of(value, name))
    if name in ("importance", "importance_mean"):
        return number_of(value, name)
    if name in ("max_grad_norm", "replay_weight") and value is not None:
        return number_of(value, name)
    return flag_of(value, name) if name == "scaling" else value


def loaded_value(w: World, i: int, name: str, value):
    p = w.params[i]
    if name == "step":
        return torch.tensor(float(number_of(value, "step")), dtype=F32)
    if not isinstance(value, torch.Tensor):
        raise Difference(f"load: takes {name} that is no tensor", _shown(value))
    if value.is_meta or value.layout != torch.strided:
        raise Difference(f"load: takes {name} without values", _shown(value))
    if value.shape != p.shape:
        raise Difference(f"load: takes {name} of another shape", _shown(value))
    if name == "master" and (not w.has_master(i) or not p.numel()):
        return None
    x = value.detach().resolve_neg().resolve_conj()
    return machine.cast_on_load(w, i, name, x).clone()


def columns(w: World):
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if w.rule == "adam" else ("momentum_buffer",)


def hostile_guidance(w: World, rng, case: Case) -> None:
    d = copy.deepcopy(w.guide.state_dict())
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["anchor"] * 4 + ["option"] * 4 + ["top", "group", "key", "params"])
        of_which = rng.choice(["anchors", "anchors", "importances"])
        anchors, groups = d.get(of_which), d.get("param_groups")
        if kind == "anchor" and isinstance(anchors, dict) and anchors:
            key = rng.choice(list(anchors))
            if isinstance(anchors[key], torch.Tensor):
                others = [
                    x
                    for x in anchors.values()
                    if isinstance(x, torch.Tensor) and x.shape == anchors[key].shape
                ]
                others += [p.data for p in w.params if p.shape == anchors[key].shape]
                shape = tuple(anchors[key].shape)
                anchors[key], word = weird_tensor(rng, anchors[key], others)
                case.said.append(f"{of_which} {key} {shape} is {word}: {_shown(anchors[key])}")
        elif (
            kind == "option"
            and isinstance(groups, list)
            and groups
            and all(isinstance(g, dict) for g in groups)
        ):
            group = rng.choice(groups)
            name = rng.choice(list(group) or ["alpha"])
            if rng.random() < 0.2:
                group.pop(name, None)
                case.said.append(f"no {name}")
            else:
                value = weird_numbers(rng)
                for each in groups if rng.random() < 0.5 else [group]:
                    each[name] = value
                case.said.append(f"{name} is {_shown(value)}")
        elif kind == "top":
            name = rng.choice(["params", of_which, "param_groups"])
            if rng.random() < 0.4:
                d.pop(name, None)
            else:
                d[name] = weird_numbers(rng)
            case.said.append(f"{name}: {_shown(d.get(name))}")
        elif kind == "group" and isinstance(groups, list) and groups:
            way = rng.choice(["drop", "twice", "none", "text"])
            if way == "drop":
                groups.pop()
            elif way == "twice":
                groups.append(copy.deepcopy(groups[-1]))
            else:
                groups[0] = None if way == "none" else "x"
            case.said.append(f"groups: {way}")
        elif kind == "key" and isinstance(anchors, dict):
            key = rng.choice([99, -1, "0", None, 1.0, True, (0,)])
            anchors[key] = torch.ones(3)
            case.said.append(f"{of_which} of {key!r}")
    if rng.random() < 0.03:
        d = rng.choice([None, 3, "x", [], {}, w.opt.state_dict()])
        case.said.append(_shown(d))
    load_and_train(w, rng, case, w.guide, d, take_over_guidance)


def take_over_guidance(w: World, d) -> None:
    before = w.wide["draw_index"]
    for n, (mine, saved) in enumerate(zip(w.groups, d["param_groups"], strict=True)):
        for name in ("alpha", "strength"):
            mine[name] = group_option_of(saved[name], name)
        if n == 0:
            for name in machine.WIDE:
                # Earlier releases had no importance and one route.
                earlier = "gradient" if name == "route" else 0.0
                w.wide[name] = option_of(saved.get(name, earlier), name)
    for held in w.held:
        for name in OF_BOUNDARIES:
            held.state.pop(name, None)
    pairs = [("anchor", k, x) for k, x in d["anchors"].items()]
    pairs += [("importance", k, x) for k, x in (d.get("importances") or {}).items()]
    for name, key, value in pairs:
        if (
            isinstance(key, bool)
            or not isinstance(key, (int, float))
            or key not in range(len(w.params))
        ):
            raise Difference(f"load: takes an {name} of nothing", repr(key))
        if value is None:
            continue
        w.held[int(key)].state[name] = loaded_value(w, int(key), name, value)
    assert_weighed(w)
    fresh = before in (0, w.resumed)
    w.resumed = w.wide["draw_index"] if fresh else None
    w.task_named = None
    w.check("taken load")


# -- anchors in files -----------------------------------------------------------------------------

_CODES = {
    F64: "F64",
    F32: "F32",
    F16: "F16",
    torch.bfloat16: "BF16",
    C64: "C64",
    torch.complex128: "C128",
}
_WIDTH = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "C64": 8,
    "C128": 16,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


def raw_bytes(x: torch.Tensor) -> bytes:
    x = x.detach().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def written(tensors: dict[str, torch.Tensor], header=None) -> bytes:
    """A safetensors file, made by hand."""
    made, data = {}, b""
    for name, x in tensors.items():
        chunk = raw_bytes(x)
        made[name] = {
            "dtype": _CODES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + len(chunk)],
        }
        data += chunk
    if header is not None:
        header(made)
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def parsed(content: bytes) -> dict[str, torch.Tensor] | None:
    """What is in a safetensors file, read without the library; None if nobody can say."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        data = content[8 + length :]
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            dtype = {v: k for k, v in _CODES.items()}.get(entry["dtype"])
            if dtype is None:
                continue
            x = torch.frombuffer(bytearray(data[start:end]) or bytearray(1), dtype=torch.uint8)[
                : end - start
            ]
            found[name] = (
                x.clone().view(dtype).view(entry["shape"])
                if end > start
                else torch.empty(entry["shape"], dtype=dtype)
            )
        return found
    except Exception:
        return None


def hostile_path(w: World, rng, case: Case, folder: pathlib.Path) -> None:
    """A file, an index of files or a directory that is broken in some way."""
    for old in sorted(folder.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    tensors = {}
    for i, p in enumerate(w.params):
        dtype = (
            p.dtype if rng.random() < 0.7 else machine.stored_as(rng.choice([F32, F64]), p.dtype)
        )
        tensors[f"p{i}"] = machine.values(rng, w.gen, p.shape, dtype)
    form = rng.choice(["file", "file", "model", "adapter", "index", "trainer"])
    content: dict[str, bytes] = {}
    name = {
        "file": "x.safetensors",
        "model": "model.safetensors",
        "adapter": "adapter_model.safetensors",
        "trainer": "model.safetensors",
    }.get(form)
    way = rng.choice(
        [
            "right",
            "right",
            "truncated",
            "flipped",
            "header",
            "type",
            "shape",
            "missing",
            "values",
            "empty",
            "garbage",
            "directory",
            "none",
            "offsets",
            "length",
        ]
    )

    def header(made):
        key = rng.choice(list(made))
        if way == "type":
            made[key]["dtype"] = rng.choice(
                ["I32", "F8_E4M3", "XX", 3, None, "F16", "F32", "F64", "BOOL"]
            )
        elif way == "shape":
            made[key]["shape"] = rng.choice(
                [[5, 5], [], [-1], [10**18], "x", None, [1.5], [*made[key]["shape"], 1]]
            )
        elif way == "offsets":
            made[key]["data_offsets"] = rng.choice(
                [[0, 0], [0, 10**15], [-4, 4], [8, 4], "x", None, [0]]
            )
        elif way == "header":
            made[key] = rng.choice([None, "x", 3, [], {}, {"dtype": "F32"}])
        elif way == "missing":
            made[f"{key}_"] = made.pop(key)

    if way == "values":
        some = rng.choice(list(tensors))
        tensors[some] = machine.values(
            rng, w.gen, tensors[some].shape, tensors[some].dtype, "strange"
        )
    if form == "index":
        names = list(tensors)
        half = {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}
        parts = [written(part, header if part and k == 0 else None) for k, part in enumerate(half)]
        content = {"a.safetensors": parts[0], "b.safetensors": parts[1]}
        weights = {n: "a.safetensors" if n in half[0] else "b.safetensors" for n in names}
        index = {"metadata": {}, "weight_map": weights}
        spoilt = rng.choice(["right", "right", "name", "type", "map", "json", "path", "list"])
        if spoilt == "name":
            weights[rng.choice(names)] = rng.choice(
                ["c.safetensors", "b.safetensors", "a.safetensors", ""]
            )
        elif spoilt == "type":
            weights[rng.choice(names)] = rng.choice([3, None, [], {}, True, 1.5])
        elif spoilt == "map":
            index["weight_map"] = rng.choice([None, [], 3, "x", {}, [["p0", "a.safetensors"]]])
        elif spoilt == "path":
            weights[rng.choice(names)] = rng.choice(
                ["../nowhere.safetensors", "/etc/hostname", ".", "a.safetensors/x", "\0"]
            )
        text = json.dumps(index).encode()
        if spoilt == "json":
            text = rng.choice([text[:-3], b"", b"\xff\xfe\x00", b"[]", b"null", b"3", b'"x"'])
        elif spoilt == "list":
            text = json.dumps([index]).encode()
        content["model.safetensors.index.json"] = text
        case.said.append(f"index: {spoilt}")
    else:
        content[name] = written(tensors, header)
    target = rng.choice([n for n in content if n.endswith("safetensors")])
    whole = content[target]
    if way == "truncated":
        content[target] = whole[: rng.randrange(len(whole))]
    elif way == "flipped":
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        content[target] = bytes(changed)
    elif way == "empty":
        content[target] = b""
    elif way == "garbage":
        content[target] = bytes(rng.getrandbits(8) for _ in range(rng.choice([3, 8, 64])))
    elif way == "length":
        content[target] = struct.pack("<Q", rng.choice([0, 2**63, 2**64 - 1, 10**9, 7])) + whole[8:]
    for file, data in content.items():
        (folder / file).write_bytes(data)
    if way == "directory":
        (folder / target).unlink()
        (folder / target).mkdir()
    elif way == "none":
        (folder / target).unlink()
    if form == "trainer":
        text = rng.choice(
            [
                '{"global_step": 3, "max_steps": 3}',
                '{"global_step": 2, "max_steps": 3}',
                "{}",
                "[]",
                "x",
                "",
                '{"global_step": null, "max_steps": 3}',
                "null",
                '{"global_step": "3", "max_steps": 1e400}',
                "\xff",
            ]
        )
        (folder / "trainer_state.json").write_text(text, encoding="latin-1")
        case.said.append(f"trainer_state.json {text!r}")
    path = folder / (name if form == "file" else "")
    if form == "index" and rng.random() < 0.5:
        path = folder / "model.safetensors.index.json"
    given = path if rng.random() < 0.5 else str(path)
    case.said.append(f"{form}, {target} {way}")
    chosen = machine.chosen_for_anchor(w)
    errors, mean, balls = {None}, None, {}
    if w.wide["importance"]:
        errors, mean, balls = machine.weighed(w, chosen, {})
    try:
        w.guide.set_anchor(given, model=w.bag)
    except (*CLEAR, ImportError) as error:
        check_said(error, "set_anchor(path)")
        w.check("refused anchor")
    except Exception as error:
        raise Difference(
            f"set_anchor(path) raises {type(error).__name__}", str(error)[:200]
        ) from error
    else:
        case.taken = True
        if None not in errors:
            raise Difference("set_anchor(path): takes what has no importance")
        found: dict[str, torch.Tensor] = {}
        files = [n for n in content if n.endswith(".safetensors")]
        by_file = {n: parsed((folder / n).read_bytes()) for n in files if (folder / n).is_file()}
        if form == "index":
            for key, file in json.loads((folder / "model.safetensors.index.json").read_bytes())[
                "weight_map"
            ].items():
                part = by_file.get(file) or {}
                if key in part:
                    found[key] = part[key]
        else:
            found = by_file.get(target) or {}
        for i in chosen:
            source = found.get(f"p{i}")
            if source is None or source.shape != w.params[i].shape:
                raise Difference("set_anchor(path): takes what is not there", f"p{i}")
            held = w.held[i]
            stored = source.to(machine.anchor_storage(w, i))
            if not machine.finite(source) or not machine.finite(stored):
                raise Difference("set_anchor(path): takes inf or NaN", f"p{i}")
            if w.has_master(i) and "master" in held.state:
                held.state["master"] = w.stepped(i)
            w.make_state(i, before=True)
            held.state["anchor"] = stored.clone()
            held.stale = None
        machine.take_importance(w, chosen, mean, balls)
        machine.count_anchored(w)
        w.wide["task_index"] += 1
        w.task_named = None
        w.check("taken anchor")
    machine.ACTIONS["train"][0](w, random.Random(rng.getrandbits(24)))
    w.check("step after an anchor")


# -- replay buffers -------------------------------------------------------------------------------


def buffer_of(rng) -> dgg.ReplayBuffer:
    buffer = dgg.ReplayBuffer(rng.choice([1, 3, 5]), seed=rng.choice([0, 7]))
    for task in range(rng.choice([0, 1, 2])):
        buffer.add_task(
            [f"{task}-{k}" for k in range(rng.choice([1, 4, 9]))],
            rng.choice([None, f"t{task}", (1, task)]),
        )
    for k in range(rng.choice([0, 0, 4])):
        buffer.add(k, "stream")
    if len(buffer):
        buffer.sample(rng.randrange(5))
        buffer.share(10, rng.choice([0.0, 0.3, 0.5]))
    return buffer


def spoil(rng, x, depth=0):
    """Changes one thing somewhere in nested lists and dicts."""
    if isinstance(x, dict) and x and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(x))
        made = dict(x)
        if rng.random() < 0.15:
            del made[key]
        else:
            made[key] = spoil(rng, x[key], depth + 1)
        return made
    if isinstance(x, (list, tuple)) and len(x) and rng.random() < 0.75:
        made = list(x)
        place = rng.randrange(len(made))
        way = rng.random()
        if way < 0.15:
            del made[place]
        elif way < 0.3:
            made.append(copy.deepcopy(made[place]))
        else:
            made[place] = spoil(rng, made[place], depth + 1)
        return made
    return weird_numbers(rng)


def told(value) -> str:
    """Returns what a value looks like: examples may be anything, arrays too.

    A bare object is handed out as a copy, of which only the address differs.
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def future(buffer: dgg.ReplayBuffer):
    """What a buffer will do, asked of a copy."""
    other = copy.deepcopy(buffer)
    made = [other.share(7, 0.3), other.share(7, 0.3)]
    if len(other):
        made += other.sample(2 * len(other) + 1)
        made += other.mix(list("abcdefgh"), 0.5)
    for k in range(6):
        other.add(100 + k, "new")
    made += list(other)
    return told(made)


def hostile_buffer(rng, case: Case) -> None:
    buffer = buffer_of(rng)
    source = buffer if rng.random() < 0.5 else dgg.ReplayBuffer(buffer.per_task, seed=3)
    if source is not buffer:
        source.add_task(range(6), "other")
        source.sample(3)
    state = source.state_dict()
    if rng.random() < 0.05:
        state = weird_numbers(rng)
    else:
        for _ in range(rng.choice([1, 1, 2])):
            state = spoil(rng, state) if isinstance(state, dict) else state
    if isinstance(state, dict) and rng.random() < 0.3:
        with contextlib.suppress(Exception):
            state = json.loads(json.dumps(state))
    case.said.append(
        repr({k: v for k, v in state.items() if k != "rng"} if isinstance(state, dict) else state)[
            :600
        ]
    )
    case.said.append(repr(state.get("rng") if isinstance(state, dict) else None)[:200])
    before, then = told(buffer.state_dict()), future(buffer)
    try:
        buffer.load_state_dict(state)
    except CLEAR as error:
        check_said(error, "buffer")
        if told(buffer.state_dict()) != before or future(buffer) != then:
            raise Difference("buffer: a refused state changed it") from error
        return
    except Exception as error:
        raise Difference(f"buffer raises {type(error).__name__}", str(error)[:200]) from error
    case.taken = True
    try:
        after = buffer.state_dict()
        future(buffer)
    except Exception as error:
        raise Difference(f"buffer: taken, then {type(error).__name__}", str(error)[:200]) from error
    for entry in after["tasks"]:
        if len(entry["examples"]) > buffer.per_task:
            raise Difference("buffer: takes more examples than it keeps")
        if not len(entry["examples"]) <= entry["seen"]:
            raise Difference(
                "buffer: takes fewer seen than kept", f"{entry['seen']} of {len(entry['examples'])}"
            )
    if not 0 <= buffer._owed < 1:
        raise Difference("buffer: takes a debt that no batch makes", str(buffer._owed)[:80])
    deck = [(str(t), k) for t, k in after["deck"]]
    if len(set(deck)) < len(deck):
        raise Difference("buffer: takes a deck that deals an example twice")
    again = dgg.ReplayBuffer(buffer.per_task)
    again.load_state_dict(after)
    if told(again.state_dict()) != told(after) or future(again) != future(buffer):
        raise Difference("buffer: its own state does not come back")


# -- running --------------------------------------------------------------------------------------

KINDS = {"optimizer": 10, "path": 3, "buffer": 3}


def attempt(kind: str, seed: int, folder: pathlib.Path, notes=None) -> Case:
    """One case; raises a Difference."""
    case = Case()
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind == "buffer":
                hostile_buffer(rng, case)
            else:
                w = prepared(rng.getrandbits(20), notes)
                if kind == "path":
                    hostile_path(w, rng, case, folder)
                else:
                    hostile_load(w, rng, case)
        except Exception as error:
            error.case = case
            raise
    return case


def choose(seed: int) -> str:
    return random.Random(seed * 7 + 1).choices(list(KINDS), list(KINDS.values()))[0]


def reproduction(kind: str, seed: int, folder: pathlib.Path) -> str:
    notes: list[str] = []
    text = f'--repro "{kind} {seed}"'
    try:
        case = attempt(kind, seed, folder, notes)
        notes += [f"hostile: {x}" for x in case.said] + ["(no difference)"]
    except Exception as error:
        notes += [f"hostile: {x}" for x in error.case.said]
        notes += machine.told_of(error)
    return "\n".join([text, *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repro", help="a kind and a number, as printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if arguments.repro:
            kind, seed = arguments.repro.split()
            text = reproduction(kind, int(seed), folder)
            print(text)
            return int(not text.endswith("(no difference)"))

        def look(seed: int, counts) -> None:
            kind = choose(seed)
            counts[kind] += 1
            counts[f"{kind} taken"] += attempt(kind, seed, folder).taken

        counts, found, took = machine.hunt(
            look, lambda seed: f"{choose(seed)} {seed}", arguments.seed, arguments.seconds
        )
        for name, where in found.items():
            kind = choose(where)
            print(f"\n== {name}")
            print(
                f'--repro "{kind} {where}"'
                if name.startswith("crash")
                else reproduction(kind, where, folder),
                flush=True,
            )
    loads = sum(counts[kind] for kind in KINDS)
    parts = ", ".join(f"{counts[k]} {k} ({counts[f'{k} taken']} taken)" for k in KINDS)
    print(
        f"\n{loads} hostile loads ({loads / took:.0f} a second): {parts}; {counts['differences']} "
        f"differences of {len(found)} kinds"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
