# SPDX-License-Identifier: BSD-3-Clause
"""Random lives of an optimizer, every action of which is compared with `fuzz_model`.

A `World` has an optimizer over a few small parameters and, beside it, what it ought to hold:
weights, state, anchors, options, draw index. An action is a name and a number: the number seeds all
its choices, so that the others stay what they are when some are left out, which is how a failure
is made small. After every action all that can be seen is compared bit for bit; only a step may
differ from the model by what its precision allows, and its true results become the model's own
afterwards, so that errors do not add up and every step is looked at by itself.

    python -P tests/fuzz_machine.py --seconds 600 --seed 1
    python -P tests/fuzz_machine.py --repro "1234 train:5 set_anchor:7 train:9"

Nothing that the machine looks at goes through ``optimizer.state``, which the optimizer notices.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import itertools
import os
import pathlib
import pickle
import random
import sys
import time
import traceback
import warnings

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import dgg
import fuzz_model as model
from dgg import backends

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
C64, C128 = torch.complex64, torch.complex128
NARROW = (BF16, F16)
WIDE = ("scaling", "norm_scope", "granularity", "max_grad_norm", "replay_weight", "seed",
        "draw_index", "task_index", "route", "importance", "importance_mean",
        "importance_draw")  # fmt: skip
# State that comes at task boundaries, which torch's optimizers do not know.
OF_BOUNDARIES = ("anchor", "importance")
# zero_grad() keeps replay gradients where this is there.
KEEPS_REPLAY = hasattr(dgg.AdamW, "clear_replay")
# What a wrong use may be told with.
CLEAR = (TypeError, ValueError, KeyError, RuntimeError, FileNotFoundError)


class Difference(Exception):
    """The library and the model disagree; ``kind`` says in what, for telling faults apart."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind = kind


def kind_of_error(error: Exception) -> str:
    if isinstance(error, Difference):
        return error.kind
    return f"{type(error).__name__} in the machine"


def told_of(error: Exception) -> list[str]:
    """Returns what a reproduction says of what it ends with."""
    said = [f"!! {type(error).__name__} {error}"]
    if not isinstance(error, Difference) or error.__cause__ is not None:
        said.append("".join(traceback.format_exception(error.__cause__ or error)[-5:]))
    return said


class Planned(Exception):
    """What hooks, closures and blocks of the machine raise."""


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Returns whether dtype, shape and all values agree, NaN included."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if torch.equal(x, y):
        return True
    return np.array_equal(model.flat(x), model.flat(y), equal_nan=True)


def shown(x: torch.Tensor) -> str:
    return f"{x.dtype} {x.tolist()}"


def finite(x: torch.Tensor) -> bool:
    return bool(np.isfinite(model.flat(x)).all())


class Held:
    """What the machine knows of one parameter."""

    def __init__(self, param: torch.Tensor) -> None:
        self.theta = param.detach().clone()
        self.state: dict[str, torch.Tensor] = {}
        self.replay: torch.Tensor | None = None
        self.trained = param.requires_grad
        self.converted = False  # its dtype was another
        self.first = False  # a buffer of zeros that no step has begun
        self.stale: float | None = None


SHAPES = [(), (1,), (3,), (2, 3), (0,), (0, 3), (2, 2, 2, 2), (5,), (3, 4), (1, 4), (9,),
          (17,), (131,)]  # fmt: skip
LAYOUTS = ["plain"] * 5 + ["turned", "last", "negated", "gaps", "offset", "conjugate", "rows"]


def values(rng, gen, shape, dtype, kind="normal") -> torch.Tensor:
    wide = C128 if dtype.is_complex else F64
    x = torch.randn(shape, generator=gen, dtype=wide)
    if kind == "zero":
        x = x * 0
    elif kind == "huge":
        x = x * (2e4 if dtype == F16 else 1e25)
    elif kind == "tiny":
        x = x * (1e-7 if dtype == F16 else 1e-25)
    elif kind == "mixed" and x.numel():
        x.view(-1)[rng.randrange(x.numel())] *= 2e4 if dtype == F16 else 1e25
    elif kind == "strange" and x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([np.inf, -np.inf, np.nan])
    if dtype == F16:
        x = x if kind == "strange" or dtype.is_complex else x.clamp(-6e4, 6e4)
    return x.to(dtype)


def lay_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """Returns the same values (of "rows": the first row's) in other memory."""
    dim = x.dim()
    if how == "turned" and dim > 1:
        order = list(range(dim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if how == "last" and dim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if how == "negated":
        return torch._neg_view(-x)
    if how == "gaps" and dim:
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        return wide[..., 1::2].copy_(x)
    if how == "offset":
        return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if how == "conjugate" and x.is_complex():
        return x.conj().resolve_conj().conj()
    if how == "rows" and dim and x.shape[0] > 1:
        return x[:1].clone().expand(x.shape)
    return x.clone(memory_format=torch.contiguous_format)


class Bag(nn.Module):
    """A module of parameters p0, p1, ..."""

    def add(self, param) -> str:
        name = f"p{len(self._parameters)}"
        self.register_parameter(name, param)
        return name


class World:
    """An optimizer, its parameters and the model of both."""

    def __init__(self, seed: int, *, without=(), notes: list[str] | None = None) -> None:
        rng = self.rng = random.Random(seed)
        self.gen = torch.Generator().manual_seed(seed)
        self.notes, self.without = notes, set(without)
        self.counts = collections.Counter()
        self.seed = seed
        cpp = backends.unavailable("cpp", torch.device("cpu")) is None
        self.backend = rng.choice(["cpp", "reference"] if cpp else ["reference"])
        self.kind = rng.choices(["AdamW", "Adam", "SGD", "Guidance"], [4, 2, 4, 2])[0]
        self.rule = "sgd" if self.kind == "SGD" else "adam"
        self.kinds = rng.choices(
            [
                (F32,),
                (F32, F32, BF16, F16, F64, C64),
                (BF16,),
                (F16,),
                (F64,),
                (C64, F32),
                (BF16, F32),
            ],
            [8, 3, 4, 2, 2, 1, 2],
        )[0]
        # Gradients of another dtype, which torch's own optimizers do not take.
        self.any_grad = rng.random() < 0.25 and self.kind != "Guidance"
        self.named = rng.random() < 0.6
        self.shapes = rng.choice([SHAPES, [(3,), (2, 3)], [(1,), ()], SHAPES])
        self.odd = rng.random() < 0.35  # parameters that are not contiguous
        # A world in which alpha may be "auto": its groups maximize, or none does.
        self.guards = rng.random() < 0.4
        self.ascends = rng.random() < 0.2
        self.foreign = self.kind == "Guidance"
        self.bag = Bag()
        self.params: list[torch.Tensor] = []
        self.held: list[Held] = []
        self.groups: list[dict] = []
        self.rng_odd = False  # whether gradients may be huge or NaN
        self.warned = False  # that replay gradients were dropped
        self.counted = 0  # zero_grad() since the last replay block
        self.resumed: int | None = None
        self.task_named: int | None = None
        self.saved: list[tuple] = []
        self.kept: dict[int, dict] = {}
        self._build()

    # -- construction ---------------------------------------------------------------------------

    def note(self, text: str) -> None:
        if self.notes is not None:
            self.notes.append(text)

    def new_param(self, rng) -> torch.Tensor:
        dtype, shape = rng.choice(self.kinds), rng.choice(self.shapes)
        x = values(rng, self.gen, shape, dtype)
        how = rng.choice(["plain", "turned", "last", "gaps", "offset"]) if self.odd else "plain"
        param = nn.Parameter(lay_out(x, how))
        if self.any_grad:
            param.grad_dtype = None
        return param

    def hyper(self, rng) -> dict:
        """Hyper-parameters of a group as the model reads them."""
        made = {
            "lr": rng.choice([1e-2, 0.1, 1e-3, 1e-2, 0.1, 1e-3, 0.0]),
            "weight_decay": rng.choice([0.0, 0.1, 0.01]),
            "maximize": rng.random() < 0.2,
        }
        if self.guards:
            made["maximize"] = self.ascends
        if self.rule == "adam":
            made["betas"] = rng.choice([(0.9, 0.999), (0.5, 0.6), (0.8, 0.95), (0.0, 0.9)])
            made["eps"] = rng.choice([1e-8, 1e-6, 1e-3])
            made["amsgrad"] = rng.random() < 0.25
        else:
            made["momentum"] = rng.choice([0.0, 0.9, 0.5])
            made["dampening"] = rng.choice([0.0, 0.0, 0.3])
            made["nesterov"] = False
            if made["momentum"] and not made["dampening"]:
                made["nesterov"] = rng.random() < 0.3
        return made

    def routes(self) -> list[str]:
        """The places where the pull may enter; the paper's the more often."""
        others = ["decoupled"] if self.kind == "SGD" else ["first_moment", "decoupled"]
        return ["gradient", "gradient", *others]

    @property
    def automatic(self) -> bool:
        """Whether the strength of the pull comes from the replay gradients."""
        return any(group["alpha"] == "auto" for group in self.groups)

    def pull(self, rng, *, automatic: bool = False) -> dict:
        alphas = ["auto", "auto", 0.0] if automatic else [0.0, 0.2, 0.5, 0.9, 1.0, 1.0]
        return {
            "alpha": rng.choice(alphas), "strength": rng.choice([0.0, 0.5, 1.0, 1.0, 2.5]),
        }  # fmt: skip

    def new_group(self, rng, count: int) -> tuple[dict, dict]:
        """Adds parameters; returns their group as the optimizer is given it, and as it will be."""
        params = [self.new_param(rng) for _ in range(count)]
        names = [self.bag.add(p) for p in params]
        given = self.hyper(rng)
        mine = {**given, **self.default_pull}
        automatic = self.automatic if self.groups else self.default_pull["alpha"] == "auto"
        other = automatic != (self.default_pull["alpha"] == "auto")
        if not self.foreign and (other or rng.random() < 0.5):
            pull = self.pull(rng, automatic=automatic)
            mine.update(pull)
            given.update(pull)
        given["params"] = list(zip(names, params, strict=True)) if self.named else params
        mine.update(size=count, anchored=0)
        self.groups.append(mine)
        self.params += params
        self.held += [Held(p) for p in params]
        return given, mine

    def _build(self) -> None:
        rng = self.rng
        wide = self.wide = {
            "scaling": rng.random() < 0.8,
            "norm_scope": rng.choice(["global", "global", "tensor"]),
            "granularity": rng.choice(["step", "step", "tensor", "element"]),
            "max_grad_norm": rng.choice([None, None, 0.5, 3.0, 1e-3]),
            "replay_weight": rng.choice([1.0, 0.5, 0.0, 2.0]),
            "seed": rng.choice([0, 3, (1 << 63) + 5, (1 << 64) - 1]),
            "route": "gradient" if self.foreign else rng.choice(self.routes()),
            "draw_index": 0,
            "task_index": 0,
            "importance": rng.choice([0.0, 0.0, 0.5, 1.0, 0.25]),
            "importance_mean": 0.0,
            "importance_draw": None,
        }
        automatic = self.guards and rng.random() < 0.8
        if automatic:
            wide.update(granularity="step", scaling=True)
        own = ("draw_index", "task_index", "importance_mean", "importance_draw")
        own += ("route",) if self.foreign else ()
        options = {k: v for k, v in wide.items() if k not in own}
        complexes = any(dtype.is_complex for dtype in self.kinds)
        choices = [None, None, F32, F64] + ([] if complexes else [BF16, F16])
        self.anchor_dtype = options["anchor_dtype"] = rng.choice(choices)
        self.importance_dtype = options["importance_dtype"] = rng.choice(choices)
        options["anchor_device"] = rng.choice([None, None, "cpu"])
        self.default_pull = self.pull(rng, automatic=automatic)
        self.options = options
        extra = dict(self.default_pull)
        self.state_dtype, self.master, self.stochastic, self.fused = None, False, False, None
        groups = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            given, mine = self.new_group(rng, rng.choice([1, 2, 3]))
            mine["decoupled"] = self.kind == "AdamW"
            groups.append(given)
        dtypes = {p.dtype for p in self.params}
        if self.foreign:
            self.inner = rng.choice(["SGD", "AdamW", "Adam"])
            self.rule = "sgd" if self.inner == "SGD" else "adam"
            for given, mine in zip(groups, self.groups, strict=True):
                hyper = self.hyper(rng)
                hyper["amsgrad"] = False
                for key in ("betas", "eps", "amsgrad", "momentum", "dampening", "nesterov"):
                    mine.pop(key, None)
                    given.pop(key, None)
                if self.rule == "sgd":
                    hyper.pop("amsgrad")
                mine.update(hyper, decoupled=self.inner == "AdamW")
                given.update(hyper)
            self.opt = getattr(torch.optim, self.inner)(groups)
            self.guide = dgg.Guidance(self.opt, backend=self.backend, **options, **extra)
        else:
            if rng.random() < 0.3:
                self.state_dtype = rng.choice([F32, F64] if complexes else [F32, BF16, F64])
            if dtypes & set(NARROW) and rng.random() < 0.5:
                self.master = True
            elif BF16 in dtypes and rng.random() < 0.6:
                self.stochastic = True
            if self.backend == "cpp" and rng.random() < 0.3:
                self.fused = True
            self.opt = getattr(dgg, self.kind)(
                groups, backend=self.backend, state_dtype=self.state_dtype, fused=self.fused,
                master_weights=self.master, stochastic_rounding=self.stochastic, **options, **extra,
            )  # fmt: skip
            self.guide = self.opt
        if self.notes is not None:
            self.note(
                f"# {self.kind}{' over ' + self.inner if self.foreign else ''}, backend "
                f"{self.backend!r}, {options}, {self.default_pull}, state_dtype={self.state_dtype},"
                f" master_weights={self.master}, stochastic_rounding={self.stochastic}, "
                f"fused={self.fused}, named={self.named}"
            )
            parts = self.parts(self.params)
            for number, (group, part) in enumerate(zip(self.groups, parts, strict=True)):
                shown = [
                    f"{str(p.dtype)[6:]}{tuple(p.shape)}/{p.stride()}{'-' if p.is_neg() else ''}"
                    for p in part
                ]
                rest = {k: v for k, v in group.items() if k not in ("size", "anchored")}
                self.note(f"#   group {number}: {', '.join(shown)}; {rest}")

    # -- looking at the library without being noticed ---------------------------------------------

    def real_state(self, param) -> dict:
        entry = self.opt.__dict__["state"].get(param, {})
        entry = {k: v for k, v in entry.items() if v is not None}
        if not param.numel() or param.dtype not in NARROW:
            # Whether one is left of a parameter that changed its dtype is nobody's concern.
            entry.pop("master", None)
        if self.foreign:
            entry.update(self.guide.state.get(param, {}))
        return entry

    def parts(self, items) -> list[list]:
        """Splits what there is one of for every parameter by the groups."""
        rest = iter(items)
        return [list(itertools.islice(rest, group["size"])) for group in self.groups]

    def group_of(self, index: int) -> int:
        for number, group in enumerate(self.groups):
            index -= group["size"]
            if index < 0:
                return number
        raise IndexError

    def has_master(self, index: int) -> bool:
        return self.master and self.params[index].dtype in NARROW

    def settled_master(self, theta: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        """What a master weight is worth: where the weight is not its rounding, the weight."""
        back = master.to(theta.dtype)
        kept = (back == theta) | (back.isnan() & theta.isnan())
        return torch.where(kept, master, theta.to(F32))

    def stepped(self, index: int) -> torch.Tensor:
        """What a step updates: the settled master weight, or the parameter."""
        held = self.held[index]
        if not self.has_master(index):
            return held.theta
        master = held.state.get("master")
        if master is None:
            return held.theta.to(F32)
        return self.settled_master(held.theta, master)

    def check(self, where: str) -> None:
        """Compares everything that can be seen with the model."""
        for i, (p, held) in enumerate(zip(self.params, self.held, strict=True)):
            if not same(p.detach(), held.theta):
                raise Difference(
                    f"{where}: weights", f"p{i} is {p.tolist()}, not {held.theta.tolist()}"
                )
            entry = self.real_state(p)
            if held.converted and "master" in entry and "master" not in held.state:
                # Kept while the weights were wider: worth what the rule for masters says.
                held.state["master"] = self.settled_master(held.theta, entry["master"])
            made = entry.get("max_exp_avg_sq")
            if made is not None and "max_exp_avg_sq" not in held.state and not made.any():
                # amsgrad was switched on; state_dict() makes what the next step would.
                held.state["max_exp_avg_sq"] = made.clone()
            if entry.keys() != held.state.keys():
                raise Difference(
                    f"{where}: keys of the state",
                    f"p{i} has {sorted(entry)}, expected {sorted(held.state)}",
                )
            for key, value in held.state.items():
                if same(entry[key], value):
                    continue
                if key == "master" and same(
                    self.settled_master(held.theta, entry[key]),
                    self.settled_master(held.theta, value),
                ):
                    held.state[key] = entry[key].clone()  # settled earlier than it has to be
                    continue
                raise Difference(
                    f"{where}: {key}",
                    f"of p{i} is {shown(entry[key])}, not {shown(value)}",
                )
            if p.requires_grad != held.trained:
                raise Difference(f"{where}: requires_grad", f"of p{i}")
        real = self.opt.param_groups
        if [len(g["params"]) for g in real] != [g["size"] for g in self.groups]:
            raise Difference(f"{where}: number of parameters")
        flatly = [p for g in real for p in g["params"]]
        if any(p is not q for p, q in zip(flatly, self.params, strict=True)):
            raise Difference(f"{where}: other parameters in the groups")
        for number, (group, mine) in enumerate(
            zip(self.guide.param_groups, self.groups, strict=False)
        ):
            for key in WIDE:
                if group[key] != self.wide[key]:
                    raise Difference(
                        f"{where}: {key}",
                        f"of group {number} is {group[key]!r}, not {self.wide[key]!r}",
                    )
            for key in ("alpha", "strength"):
                value = group[key] if isinstance(group[key], str) else float(group[key])
                if value != mine[key]:
                    raise Difference(
                        f"{where}: {key}", f"of group {number} is {group[key]!r}, not {mine[key]!r}"
                    )
            if not self.foreign and group["anchored"] != mine["anchored"]:
                raise Difference(
                    f"{where}: anchored",
                    f"of group {number} is {group['anchored']}, not {mine['anchored']}",
                )
        for number, (group, mine) in enumerate(zip(real, self.groups, strict=True)):
            if (
                float(group["lr"]) != mine["lr"]
                or float(group["weight_decay"]) != mine["weight_decay"]
            ):
                raise Difference(f"{where}: lr or weight_decay", f"of group {number}")
            if bool(group["maximize"]) != mine["maximize"]:
                raise Difference(f"{where}: maximize", f"of group {number}")
        if KEEPS_REPLAY and not self.foreign:
            scales = bool(getattr(self.opt, "_step_supports_amp_scaling", False))
            wanted = bool(self.fused) or any(h.replay is not None for h in self.held)
            if scales != wanted:
                raise Difference(f"{where}: _step_supports_amp_scaling", f"is {scales}")

    # -- the model's step -----------------------------------------------------------------------

    def make_state(self, index: int, *, before: bool = False) -> None:
        """The state that a first step (or an anchor before it) begins with."""
        held, group = self.held[index], self.groups[self.group_of(index)]
        if self.foreign:
            return
        dtype = self.moment_dtype(index)

        def zeros(*names):
            for name in names:
                if name not in held.state:
                    held.state[name] = torch.zeros_like(held.theta, dtype=dtype)

        if self.rule == "adam":
            held.state.setdefault("step", torch.zeros(()))
            zeros("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        elif group["momentum"] != 0 and not before and "momentum_buffer" not in held.state:
            zeros("momentum_buffer")
            held.first = True
        if self.has_master(index) and "master" not in held.state and held.theta.numel():
            held.state["master"] = held.theta.to(F32)

    def moment_dtype(self, index: int) -> torch.dtype:
        dtype = self.params[index].dtype
        if self.state_dtype is None:
            return dtype
        return stored_as(self.state_dtype, dtype)

    def rows(self, *, plain: bool = False) -> list[model.Row]:
        made = []
        for i, (p, held) in enumerate(zip(self.params, self.held, strict=True)):
            number = self.group_of(i)
            group = self.groups[number]
            theta = self.stepped(i)
            double = model.real_dtype(theta) == F64
            take = {F64: model.flat}.get(F64 if double else F32, single)
            replay = None if plain else held.replay
            state = {}
            if p.grad is not None or replay is not None:
                names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group.get("amsgrad"))
                names = names if self.rule == "adam" else ["momentum_buffer"]
                state = {n: take(held.state[n]) for n in names if n in held.state}
            made.append(
                model.Row(
                    i, number, double, model.flat(theta),
                    None if p.grad is None else take(p.grad),
                    None if replay is None else take(replay),
                    take(held.state["anchor"]) if "anchor" in held.state else None,
                    take(held.state["importance"]) if "importance" in held.state else None,
                    state, float(held.state.get("step", 0.0)), held.first,
                    None if self.foreign else held.stale,
                )
            )  # fmt: skip
        return made

    def assert_within(
        self, actual: torch.Tensor, ball, what: str, words=None, where: str = "step"
    ) -> None:
        found = model.flat(actual)
        good = model.within(found, ball, model.real_dtype(actual), words)
        if good.all():
            return
        place = int(np.flatnonzero(~good)[0])
        value, error = ball[0][place], np.broadcast_to(ball[1], ball[0].shape)[place]
        raise Difference(
            f"{where}: {what.split(' of ')[0]}",
            f"{what}: element {place} of {actual.dtype} is {found[place]!r}, "
            f"expected {value!r} +- {error:.3g}",
        )

    def after_step(self, rows, made: model.Stepped, grads, *, skipped=False) -> None:
        """Compares a step's results and takes them over."""
        draw = self.wide["draw_index"]
        if not skipped:
            for row in rows:
                if not row.active:
                    continue
                i, p, held = row.index, self.params[row.index], self.held[row.index]
                entry, balls = self.real_state(p), made.rows[row.index]
                for name in held.state:
                    if name not in entry:
                        raise Difference("step: a key of the state is gone", f"{name} of p{i}")
                    if (
                        entry[name].dtype != held.state[name].dtype
                        or entry[name].shape != held.state[name].shape
                    ):
                        raise Difference(
                            "step: dtype or shape of the state",
                            f"{name} of p{i}: {shown(entry[name])}, not {shown(held.state[name])}",
                        )
                words = None
                if self.stochastic and p.dtype == BF16:
                    words = model.element_words(
                        self.wide["seed"], draw, i, p.numel(), model.STREAM_ROUNDING
                    )
                if "theta" in balls:
                    if self.has_master(i) and p.numel():
                        self.assert_within(entry["master"], balls["theta"], f"master of p{i}")
                        if not same(p.detach(), entry["master"].to(p.dtype)):
                            raise Difference(
                                "step: weights are not the masters' rounding",
                                f"p{i}: {p.tolist()}, {entry['master'].tolist()}",
                            )
                    else:
                        self.assert_within(p, balls["theta"], f"weights of p{i}", words)
                for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
                    if name in balls and name in held.state:
                        used = name != "max_exp_avg_sq" or self.groups[row.group]["amsgrad"]
                        used = used and (
                            name != "momentum_buffer" or self.groups[row.group]["momentum"] != 0
                        )
                        if used:
                            self.assert_within(entry[name], balls[name], f"{name} of p{i}")
                            held.state[name] = entry[name].detach().clone()
                if self.rule == "adam" and "step" in balls and "step" in held.state:
                    held.state["step"] = held.state["step"] + 1
                if "master" in held.state:
                    held.state["master"] = entry["master"].clone()
                held.theta = p.detach().clone()
                held.first, held.stale = False, None
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            given, before = grad
            if p.grad is not given or (given is not None and not same(given, before)):
                raise Difference("step: it changed a gradient", f"of p{i}")
        self.wide["draw_index"] = draw + 1
        for held in self.held:
            held.replay = None
        self.counted = 0

    def check_stats(self, rows, made: model.Stepped, *, skipped=False) -> None:
        stats = self.guide.guidance_stats()
        if not any(row.active for row in rows):
            # Nothing to step: nothing, or that nothing was injected, is said.
            if (
                "injected" not in self.without
                and stats["injected"] is not None
                and bool(stats["injected"])
            ):
                raise Difference("statistics: injected", "is True without any gradient")
            return

        def number(name, ball):
            value = stats[name]
            if ball is None:
                if value is not None:
                    raise Difference(f"statistics: {name}", f"is {value}, not None")
                return
            if value is None:
                raise Difference(f"statistics: {name}", f"is None, not {ball[0]}")
            actual = float(value)
            # They are float32.
            error = ball[1] + 2.0**-22 * abs(ball[0]) + 1e-44
            if not np.isfinite(error):
                return
            strange = not np.isfinite(ball[0]) or abs(ball[0]) > 3e38
            good = not np.isfinite(actual) if strange else abs(actual - ball[0]) <= error
            if not good:
                raise Difference(
                    f"statistics: {name}", f"is {actual!r}, expected {ball[0]!r} +- {error:.3g}"
                )

        injected = made.injected and not skipped
        if "injected" in self.without:
            return
        unsure = made.pulls is not None and "perhaps" in made.pulls.values() and not skipped
        if unsure and "yes" not in made.pulls.values():
            injected = bool(stats["injected"])
        if bool(stats["injected"]) != injected:
            raise Difference(
                "statistics: injected", f"is {bool(stats['injected'])}, not {injected}"
            )
        number("clip", None if skipped else made.clip)
        strength = self.groups[0]["strength"]
        scale = stats["scale"]
        if injected or made.pulls is not None and not skipped:
            number("grad_norm", made.grad_norm)
            number("distance", made.distance)
        for name in ("alignment", "pull"):
            ball = None if skipped else getattr(made, name)
            if name == "pull" and ball is not None:
                ball = strength * ball[0], strength * ball[1]
            # What is not finite has no direction, and what is said of it is left open.
            if ball is None or np.isfinite(made.grad_norm[0]) and np.isfinite(made.distance[0]):
                number(name, ball)
        # What a draw measured in vain, since nothing that it hit had a gradient, is left open; so
        # is the scale where the clipping has made everything NaN.
        if not injected or made.clip is not None and not np.isfinite(made.clip[0]):
            pass
        elif isinstance(made.scale, dict):
            if scale.dim() != 1 or len(scale) < len(made.scale):
                raise Difference("statistics: scale", f"is {scale}, expected one per tensor")
        else:
            ball = made.scale
            error = strength * ball[1] + 2.0**-22 * strength * ball[0] + 1e-44
            if not abs(float(scale) - strength * ball[0]) <= error:
                raise Difference(
                    "statistics: scale",
                    f"is {float(scale)!r}, expected {strength * ball[0]!r} +- {error:.3g}",
                )
        if "guided" in stats and not skipped:
            anchored = sum("anchor" in held.state for held in self.held)
            least = list(made.pulls.values()).count("yes") if unsure else made.pulled
            counts = {"anchored": (anchored, anchored), "guided": (least, made.pulled)}
            for name, (low, high) in counts.items():
                value = stats[name]
                if value is None or not low <= int(value) <= high or value.dtype != torch.int64:
                    raise Difference(f"statistics: {name}", f"is {value}, expected {low} to {high}")
            if stats.backend != self.backend:
                raise Difference("statistics: backend", f"is {stats.backend!r}")


def single(x: torch.Tensor) -> np.ndarray:
    """The values as float32 arithmetic takes them."""
    if model.real_dtype(x) == F64:
        x = x.to(C64 if x.is_complex() else F32)
    return model.flat(x)


def stored_as(dtype: torch.dtype, of: torch.dtype) -> torch.dtype:
    return {F32: C64, F64: C128}[dtype] if of.is_complex else dtype


# -- actions --------------------------------------------------------------------------------------

ACTIONS: dict[str, tuple] = {}


def action(weight: float, *needs: str):
    def register(function):
        ACTIONS[function.__name__] = (function, weight, needs)
        return function

    return register


def set_gradient(w: World, rng, i: int, kind: str | None = None) -> None:
    p = w.params[i]
    if kind is None:
        usual = ["normal"] * 12 + ["none", "none", "zero", "tiny"]
        odd = ["huge", "mixed", "strange"] if w.rng_odd else []
        kind = rng.choice(usual + odd)
    if kind in ("huge", "mixed", "tiny") and "huge" in w.without:
        kind = "normal"
    if kind == "strange" and "strange" in w.without:
        kind = "normal"
    if kind == "none":
        p.grad = None
        return
    dtype = p.dtype
    if w.any_grad and not p.is_complex():
        dtype = rng.choice([dtype, F32, BF16, F64])
    how = rng.choice(LAYOUTS)
    if how in w.without or how == "conjugate" and w.foreign:
        how = "plain"  # torch's own optimizers take none that is lazily conjugated
    x = values(rng, w.gen, p.shape, dtype, kind)
    if kind == "against":  # the old examples ask for the contrary of what the new ones do
        x = (rng.choice([0.1, 1.0]) * x - rng.choice([1.5, 3.0]) * w.held[i].replay).to(dtype)
    p.grad = x = lay_out(x, how)
    if w.notes is not None:
        w.note(f"p{i}.grad: {kind} {how} {dtype} {x.tolist()}")


def set_gradients(w: World, rng) -> None:
    w.rng_odd = rng.random() < 0.12
    one = rng.random() < 0.1
    against = w.automatic and rng.random() < 0.6
    for i in range(len(w.params)):
        kind = "none" if one and rng.random() < 0.7 else None
        kind = "against" if against and w.held[i].replay is not None else kind
        set_gradient(w, rng, i, kind)
    if not w.foreign and len(w.params) > 1 and rng.random() < 0.03:
        # One tensor for two parameters: only who writes into gradients would mind.
        p, q = w.params[:2]
        if p.grad is not None and p.shape == q.shape and p.dtype == q.dtype:
            q.grad = p.grad
            w.note("p1.grad = p0.grad")


@action(6)
def gradients(w: World, rng) -> None:
    set_gradients(w, rng)


def run_step(w: World, rng, *, closure=None, scaler=None, call=None) -> None:
    """One step of both, compared."""
    grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in w.params]
    divisor, skipped = 1.0, False
    if scaler is not None:
        scale, found = scaler
        divisor = 1.0 if scale is None else scale
        replayed = [h.replay for h in w.held if h.replay is not None]
        skipped = bool(found) or (found is not None and not all(map(finite, replayed)))
    if w.foreign:
        run_foreign_step(w, grads, closure)
        return
    for i in range(len(w.params)):
        if (w.params[i].grad is not None or w.held[i].replay is not None) and not skipped:
            w.make_state(i)
    rows = w.rows()
    made = model.step(w.rule, rows, w.groups, w.wide, divisor)
    try:
        if call is not None:
            loss = call()
        else:
            loss = w.opt.step() if closure is None else w.opt.step(closure)
    except Exception as error:
        raise Difference(f"step raises {type(error).__name__}", str(error)[:300]) from error
    if closure is not None and loss != 1.5:
        raise Difference("step: the closure's loss is lost")
    w.after_step(rows, made, grads, skipped=skipped)
    w.check_stats(rows, made, skipped=skipped)
    if w.opt.last_step_skipped != skipped:
        raise Difference("last_step_skipped")


def run_foreign_step(w: World, grads, closure) -> None:
    rows = w.rows()
    wide = {**w.wide, "foreign": True}
    total, made = model.guide(rows, w.groups, wide)
    touched = made.injected or made.clip is not None or any(h.replay is not None for h in w.held)
    try:
        loss = w.opt.step() if closure is None else w.opt.step(closure)
    except Exception as error:
        raise Difference(f"step raises {type(error).__name__}", str(error)[:300]) from error
    if closure is not None and loss != 1.5:
        raise Difference("step: the closure's loss is lost")
    for row in rows:
        p, (_, before) = w.params[row.index], grads[row.index]
        if not row.active:
            if p.grad is not None:
                raise Difference("step: it made a gradient", f"of p{row.index}")
            continue
        if p.grad is None:
            raise Difference("step: it took a gradient away", f"of p{row.index}")
        if not touched:
            if not same(p.grad, before):
                raise Difference("step: it changed a gradient", f"of p{row.index}")
        else:
            G = total[row.index]
            if p.grad.dtype == F64 and not row.double:
                # Where nothing is to be done to it, it need not be cut to float32 either.
                G = G[0], G[1] + 2.0**-23 * np.abs(G[0])
            w.assert_within(p.grad, G, f"G of p{row.index}")
    # What the other optimizer does with it, in the precisions in which it is torch's arithmetic.
    after = w.rows(plain=True)
    base = model.base(w.rule, after, w.groups)
    for row in after:
        p, held = w.params[row.index], w.held[row.index]
        entry = w.real_state(p)
        if row.active:
            plain = p.dtype in (F32, F64) and p.grad.dtype == p.dtype
            plain = (
                plain
                and w.rule == "adam"
                or plain
                and (not w.groups[row.group]["momentum"] or "momentum_buffer" in held.state)
            )
            plain = plain and all(
                v.dtype == p.dtype
                for k, v in held.state.items()
                if k not in ("step", *OF_BOUNDARIES)
            )
            if plain:
                w.assert_within(p, base.rows[row.index]["theta"], f"weights of p{row.index}")
            held.theta = p.detach().clone()
            kept = {k: v for k, v in held.state.items() if k in OF_BOUNDARIES}
            held.state = {k: v.detach().clone() for k, v in entry.items()} | kept
        held.stale = None
        held.replay = None
    w.wide["draw_index"] += 1
    w.check_stats(rows, made)


def ask_old_examples(w: World, rng) -> None:
    """With alpha="auto": an anchor and replay gradients, without which there is no pull."""
    if w.automatic and not any("anchor" in held.state for held in w.held) and rng.random() < 0.5:
        set_anchor(w, rng)
    if w.automatic and rng.random() < 0.7:
        replay(w, rng)


@action(20)
def train(w: World, rng) -> None:
    ask_old_examples(w, rng)
    set_gradients(w, rng)
    w.note("step()")
    run_step(w, rng)
    if rng.random() < 0.7:
        zero(w, set_to_none=True)


@action(8)
def step(w: World, rng) -> None:
    w.note("step()")
    closure = None
    if rng.random() < 0.3:
        closure = lambda: 1.5  # noqa: E731
    with torch.set_grad_enabled(rng.random() < 0.7):
        run_step(w, rng, closure=closure)


@action(3)
def step_with_a_say(w: World, rng) -> None:
    """A closure that computes gradients, or a hook that changes what the step is about to use."""
    if w.foreign:
        return
    way = rng.choice(["closure", "hook", "options in a hook", "weights in a hook"])
    w.note(f"step() with a {way}")
    expected = {}

    def before(*_args, **_kwargs):
        if way == "options in a hook":
            options(w, rng)
        elif way == "weights in a hook":
            write_weights(w, rng)
        else:
            set_gradients(w, rng)
        for i in range(len(w.params)):
            if w.params[i].grad is not None or w.held[i].replay is not None:
                w.make_state(i)
        grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in w.params]
        rows = w.rows()
        expected["all"] = rows, model.step(w.rule, rows, w.groups, w.wide), grads
        return None if way != "closure" else 1.5

    try:
        if way == "closure":
            if w.opt.step(before) != 1.5:
                raise Difference("step: the closure's loss is lost")
        else:
            handle = w.opt.register_step_pre_hook(before)
            try:
                w.opt.step()
            finally:
                handle.remove()
    except Difference:
        raise
    except Exception as error:
        raise Difference(f"step raises {type(error).__name__}", str(error)[:300]) from error
    rows, made, grads = expected["all"]
    w.after_step(rows, made, grads)
    w.check_stats(rows, made)


@action(1.5)
def amp_step(w: World, rng) -> None:
    """torch's own GradScaler, which unscales itself or leaves it to the step."""
    if w.foreign or w.any_grad or any(p.dtype in (F16, F64) or p.is_complex() for p in w.params):
        return
    some = False
    for i, p in enumerate(w.params):
        kind = rng.choice(["normal"] * 12 + ["none", "zero", "strange"])
        p.grad = None
        if kind != "none" and p.numel():
            p.grad = values(rng, w.gen, p.shape, p.dtype, kind)
            some = True
            w.note(f"p{i}.grad: {kind} {p.grad.tolist()}")
    if not some:
        return
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    replayed = any(held.replay is not None for held in w.held)
    found = float(not all(finite(p.grad) for p in w.params if p.grad is not None))
    early = not replayed and rng.random() < 0.4
    w.note(f"GradScaler: {'unscale_(), ' if early else ''}step()")
    if early or not (w.fused or replayed):
        scaler.unscale_(w.opt)
        if found and not w.fused:
            scaler.step(w.opt)  # which does not call the optimizer's
            return
        run_step(w, rng, scaler=(None, found) if w.fused else None, call=lambda: scaler.step(w.opt))
        return
    run_step(w, rng, scaler=(8.0, found), call=lambda: scaler.step(w.opt))


@action(0.5)
def far_ahead(w: World, rng) -> None:
    """A draw index near where its 32 bits end: it is counted on, its words come round."""
    draw = rng.choice([(1 << 32) - 2, (1 << 32) - 1, (1 << 40) + 3, (1 << 31) - 1])
    if w.wide["draw_index"] >= 1 << 41:
        return
    for group in w.guide.param_groups:
        group["draw_index"] = draw
    w.wide["draw_index"] = draw
    w.note(f"draw_index = {draw}")


def loads(opt, state, shot: dict, error: type[Exception] | None) -> bool:
    """Loads ``state`` and returns whether it was taken; any other outcome than the model's raises.

    Args:
        opt: The optimizer.
        state: What it is to load.
        shot: The model's copy of what was saved.
        error: What the load must raise, or None.
    """
    try:
        opt.load_state_dict(state)
    except Exception as raised:
        late = isinstance(raised, ValueError) and "no max_exp_avg_sq" in str(raised)
        if shot["late"] and late:
            return False
        if error is None or not isinstance(raised, error):
            raise Difference(f"load raises {type(raised).__name__}", str(raised)[:300]) from raised
        return False
    if error is not None:
        raise Difference(f"load does not raise {error.__name__}")
    return True


@action(0.7)
def through_torch(w: World, rng) -> None:
    """torch's optimizer loads our state, and we load its."""
    if w.foreign or w.master or w.state_dtype is not None or w.kind == "Adam":
        return
    theirs = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[w.kind]
    params = [nn.Parameter(held.theta.clone()) for held in w.held]
    other = theirs([{"params": part} for part in w.parts(params)], lr=9.0)
    w.note("torch's optimizer loads the state, we load torch's")
    try:
        other.load_state_dict(copy.deepcopy(w.opt.state_dict()))
        back = copy.deepcopy(other.state_dict())
    except Exception as error:
        raise Difference(f"torch cannot load: {type(error).__name__}", str(error)[:300]) from error
    shot = snapshot(w)
    for i, state in enumerate(shot["states"]):
        # torch casts all that is floating to the parameter's dtype.
        for key in state:
            if key != "step" and w.params[i].is_floating_point():
                state[key] = state[key].to(w.params[i].dtype)
    error = expected_of_load(w, shot)
    if not loads(w.opt, back, shot, error):
        return
    loaded(w, shot)


@action(0.6)
def take_out(w: World, rng) -> None:
    """A parameter leaves its group; what is left keeps its state, the draws count anew."""
    if w.foreign or len(w.params) < 3 or w.named:
        return
    i = rng.randrange(len(w.params))
    n = w.group_of(i)
    if w.groups[n]["size"] < 2 or w.held[i].replay is not None:
        return
    p = w.params[i]
    place = next(k for k, q in enumerate(w.opt.param_groups[n]["params"]) if q is p)
    anchored = "anchor" in w.held[i].state
    w.note(f"p{i} is taken out of group {n}")
    del w.opt.param_groups[n]["params"][place]
    del w.params[i], w.held[i]
    w.groups[n]["size"] -= 1
    w.opt.state.pop(p, None)
    w.kept, w.saved = {}, []
    # The module keeps its parameters; names are by place from here on.
    w.bag = Bag()
    for q in w.params:
        w.bag.add(q)
    if anchored:
        # The state is gone with the anchor: said to be wanted, unless the step finds out itself.
        clear_anchor(w, rng)


def zero(w: World, set_to_none: bool) -> None:
    w.note(f"zero_grad({set_to_none})")
    if any(
        p.grad is not None and (p.grad.is_neg() or p.grad.is_conj() or 0 in p.grad.stride())
        for p in w.params
    ):
        set_to_none = True  # torch cannot write into an expanded, negated or conjugated one
    drops = KEEPS_REPLAY and not w.foreign and w.counted == 1
    drops = drops and any(held.replay is not None for held in w.held)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        w.opt.zero_grad(set_to_none=set_to_none)
    said = [str(each.message) for each in heard if "replay" in str(each.message)]
    if len(said) != int(drops and not w.warned):
        raise Difference("zero_grad: warnings", f"{said}, dropped {drops}, before {w.warned}")
    w.warned = w.warned or drops
    for i, p in enumerate(w.params):
        if set_to_none and p.grad is not None or p.grad is not None and model.flat(p.grad).any():
            raise Difference("zero_grad leaves a gradient", f"of p{i}")
    if w.foreign:
        return
    if any(h.replay is not None for h in w.held):
        w.counted += 1
        if not KEEPS_REPLAY or w.counted > 1:
            for held in w.held:
                held.replay = None


@action(5)
def zero_grad(w: World, rng) -> None:
    zero(w, rng.random() < 0.6)


def along(rng, way: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradients that ask for the way back to an anchor, seldom for the way off it; and noise."""
    size = way.abs().max() if way.numel() else 0
    if not 0 < size < 1e4:
        return x
    sign = -1.0 if rng.random() < 0.2 else 1.0
    return (0.3 * x + 2.0 * sign * way / size).to(x.dtype)


@action(6)
def replay(w: World, rng) -> None:
    """Gradients of a replay block, assigned or by autograd; now and then the block fails."""
    w.rng_odd = rng.random() < 0.1
    fails = rng.random() < 0.12 and "failing_replay" not in w.without
    before = [p.grad for p in w.params]
    new: dict[int, torch.Tensor] = {}
    empty = rng.random() < 0.1
    w.note(f"with replay(): {'and it raises' if fails else ''}")
    try:
        with w.guide.replay():
            for i, p in enumerate(w.params):
                if empty or rng.random() < 0.4:
                    continue
                former = w.held[i].replay
                if rng.random() < 0.3 and p.requires_grad and p.dtype in (F32, F64, BF16):
                    factor = values(rng, w.gen, p.shape, p.dtype)
                    with torch.enable_grad():
                        (p * factor).sum().backward()
                    new[i] = factor if former is None else former + factor
                    w.note(f"    backward: p{i} {factor.tolist()}")
                else:
                    kind = rng.choice(["normal"] * 6 + ["zero", "tiny"] + ["strange"] * w.rng_odd)
                    anchor = w.held[i].state.get("anchor")
                    back = anchor is not None and w.automatic and rng.random() < 0.6
                    kind = "normal" if kind == "tiny" and "huge" in w.without else kind
                    how = rng.choice(LAYOUTS)
                    how = "plain" if how in w.without else how
                    kind = "normal" if kind in w.without else kind
                    x = values(rng, w.gen, p.shape, p.dtype, kind)
                    if back:
                        x = along(rng, p.detach() - anchor, x)
                    x = lay_out(x, how)
                    with torch.no_grad():
                        p.grad = x if p.grad is None else p.grad + x
                        new[i] = x.clone() if former is None else former + x
                    w.note(f"    p{i}.grad: {x.tolist()}")
            if fails:
                raise Planned
    except Planned:
        new = {}
    except Exception as error:
        raise Difference(f"replay raises {type(error).__name__}", str(error)[:300]) from error
    for i, (p, grad) in enumerate(zip(w.params, before, strict=True)):
        # Expanded gradients come back as copies.
        if (p.grad is None) != (grad is None) or grad is not None and not same(p.grad, grad):
            raise Difference("replay: .grad is another one afterwards", f"of p{i}")
    for i, x in new.items():
        w.held[i].replay = x.detach()
    if not fails:
        w.counted = 0


@action(0.6)
def clear_replay(w: World, rng) -> None:
    if not hasattr(w.guide, "clear_replay"):
        return
    w.note("clear_replay()")
    w.guide.clear_replay()
    for held in w.held:
        held.replay = None
    w.counted = 0


@action(2)
def scaled_step(w: World, rng) -> None:
    """What a GradScaler leaves on the optimizer: a divisor and its verdict."""
    if w.foreign:
        return
    ask_old_examples(w, rng)
    set_gradients(w, rng)
    replayed = any(h.replay is not None for h in w.held)
    scale = rng.choice([None, 1.0, 8.0, 1024.0])
    found = rng.choice([0.0, 0.0, 1.0])
    if replayed and scale is None:
        return  # refused: see `provoke`
    if KEEPS_REPLAY and not (w.fused or replayed):
        return  # torch's scaler unscales by itself then
    if scale is not None:
        w.opt.grad_scale = torch.tensor(scale)
    w.opt.found_inf = torch.tensor(found)
    w.note(f"grad_scale={scale}, found_inf={found}; step()")
    try:
        run_step(w, rng, scaler=(scale, found))
    finally:
        for name in ("grad_scale", "found_inf"):
            if name in w.opt.__dict__:
                delattr(w.opt, name)


def number_as(rng, w, value: float):
    """A number in one of the forms in which schedules leave them; returns it and its value."""
    forms = ["plain", "plain", "tensor"] + ([] if "numpy" in w.without else ["float64", "float32"])
    form = rng.choice(forms)
    if form == "tensor":
        made = torch.tensor(value, dtype=rng.choice([F32, F64]))
        return made, float(made)
    made = {"plain": float, "float64": np.float64, "float32": np.float32}[form](value)
    return made, float(made)


@action(6)
def options(w: World, rng) -> None:
    """A schedule: anything in the groups."""
    n = rng.randrange(len(w.groups))
    mine, real = w.groups[n], w.opt.param_groups[n]
    what = rng.choice(
        ["alpha", "alpha", "strength", "lr", "weight_decay", "wide", "wide", "rule", "maximize"]
    )
    if w.foreign and n >= len(w.guide.param_groups):
        return
    if what in ("alpha", "strength"):
        made = w.pull(rng, automatic=w.automatic)[what]
        mine[what] = made
        if not w.automatic or what == "strength":
            made, mine[what] = number_as(rng, w, made)
        if w.automatic and not any(group["alpha"] == "auto" for group in w.groups):
            made = mine[what] = "auto"
        w.guide.param_groups[n][what] = made
    elif what in ("lr", "weight_decay"):
        made, value = number_as(rng, w, w.hyper(rng)[what])
        if isinstance(made, torch.Tensor) and (w.foreign or what == "weight_decay"):
            made = value
        if w.foreign:
            made = value
        real[what], mine[what] = made, value
    elif what == "maximize":
        made = w.ascends = not mine[what]
        for group, other in zip(w.groups, w.opt.param_groups, strict=True):
            if w.guards or other is real:
                group[what] = other[what] = made
    elif what == "rule":
        if w.foreign:
            return
        made = {
            k: v for k, v in w.hyper(rng).items() if k not in ("lr", "weight_decay", "maximize")
        }
        mine.update(made)
        real.update(made)
    else:
        name = rng.choice(
            ["norm_scope", "max_grad_norm", "replay_weight", "seed"]
            + ["scaling", "granularity"] * (not w.automatic)
            + ["route"] * (not w.foreign)
            + ["importance"] * (not w.automatic or rng.random() < 0.5)
        )
        made = {
            "importance": lambda: rng.choice(weights_of(w)),
            "scaling": lambda: rng.random() < 0.7,
            "norm_scope": lambda: rng.choice(["global", "tensor"]),
            "granularity": lambda: rng.choice(["step", "tensor", "element"]),
            "max_grad_norm": lambda: rng.choice([None, 0.5, 3.0, 1e-3, 1e6]),
            "replay_weight": lambda: rng.choice([0.0, 1.0, 0.25]),
            "seed": lambda: rng.choice([0, 1, 7, 1 << 40]),
            "route": lambda: rng.choice(w.routes()),
        }[name]()
        value = made
        if name in ("max_grad_norm", "replay_weight") and made is not None:
            made, value = number_as(rng, w, made)
        if name == "importance" and value != w.wide[name]:
            for held in w.held:
                # A distance that was measured along another u is no excuse any more.
                held.stale = None if held.stale is None else np.inf
        for group in w.guide.param_groups:
            group[name] = made
        w.wide[name] = value
        what = name
    w.note(f"group {n}: {what} = {made!r}")


def weights_of(w: World) -> list[float]:
    """Values of the option ``importance`` with which the next step can be made."""
    anchored = [held for held in w.held if "anchor" in held.state]
    lacking = any("importance" not in held.state for held in anchored)
    return [0.0] if lacking else [0.0, 0.25, 0.5, 1.0]


@action(1.5)
def switch_guard(w: World, rng) -> None:
    """From a number to "auto" in the middle of a task, or back."""
    if not w.guards or not synced(w):
        return
    automatic = not w.automatic
    w.note(f"alpha becomes {'auto' if automatic else 'a number'}")
    chosen = [w.pull(rng, automatic=automatic)["alpha"] for _ in w.groups]
    if automatic:
        chosen[rng.randrange(len(chosen))] = "auto"
        w.wide.update(granularity="step", scaling=True)
    for group, mine, alpha in zip(w.guide.param_groups, w.groups, chosen, strict=True):
        group["alpha"] = mine["alpha"] = alpha
        group.update(granularity=w.wide["granularity"], scaling=w.wide["scaling"])


@action(1)
def add_group(w: World, rng) -> None:
    if len(w.params) > 7:
        return
    if w.foreign and w.automatic != (w.default_pull["alpha"] == "auto"):
        return  # it would begin with the other kind of alpha, which the next step refuses
    given, mine = w.new_group(rng, rng.choice([1, 1, 2]))
    if w.foreign and given.pop("amsgrad", None) is not None:
        mine["amsgrad"] = False
    mine["decoupled"] = w.groups[0]["decoupled"]
    params = w.params[-mine["size"] :]
    w.note(f"add_param_group: {[(p.dtype, tuple(p.shape), p.stride()) for p in params]} {mine}")
    w.opt.add_param_group(given)


# -- anchors --------------------------------------------------------------------------------------


def chosen_for_anchor(w: World) -> list[int]:
    """Who gets an anchor: what is trained, and what has state (an empty one's is not modelled)."""

    def known(i: int, held: Held) -> bool:
        if w.foreign:
            return "anchor" in held.state
        return bool(held.state or w.opt.__dict__["state"].get(w.params[i]))

    return [i for i, held in enumerate(w.held) if held.trained or known(i, held)]


def anchor_storage(w: World, i: int) -> torch.dtype:
    theta = w.stepped(i)
    return theta.dtype if w.anchor_dtype is None else stored_as(w.anchor_dtype, theta.dtype)


def begins(w: World, task: int, given: bool):
    """The rule for ``task=``: an error's type, False (keep) or True (set)."""
    present, draws = w.wide["task_index"], w.wide["draw_index"]
    anchored = any("anchor" in held.state for held in w.held)
    if present > task:
        return ValueError
    if present == task:
        if anchored or (task == 0 and not given):
            return False
        return RuntimeError if task and not given else True
    if present < task - 1 and (draws or anchored):
        return ValueError
    return True


def positive(x: torch.Tensor) -> torch.Tensor:
    """Returns squares, of complex numbers those of both parts."""
    return torch.complex(x.real**2, x.imag**2) if x.is_complex() else x * x


def moment(w: World, i: int, given: torch.Tensor | None = None) -> model.Moment:
    """What the model knows of a parameter at a task boundary."""
    held, group = w.held[i], w.groups[w.group_of(i)]
    double = model.real_dtype(held.theta) == F64
    take = model.flat if double else single
    step = float(held.state.get("step", 0.0))
    # By the boundary, and no step since.
    counted = w.wide["importance_draw"] == w.wide["draw_index"]
    square = held.state.get("exp_avg_sq") if step >= 1 and not counted else None
    former = held.state.get("importance")
    return model.Moment(
        double, model.flat(held.theta).size, None if square is None else take(square),
        float(group["betas"][1]) if "betas" in group else 0.0, step,
        None if former is None else take(former), None if given is None else take(given),
    )  # fmt: skip


def importance_storage(w: World, i: int) -> torch.dtype:
    dtype = w.params[i].dtype
    return dtype if w.importance_dtype is None else stored_as(w.importance_dtype, dtype)


def weighed(w: World, chosen: list[int], given: dict[int, torch.Tensor]):
    """What a boundary makes of the importance: (the errors it may end in, mean, F by parameter).

    None among the errors is success; there are several where the precision cannot tell.
    """
    moments = [moment(w, i, given.get(i)) for i in chosen]
    if not any(m.known for m in moments):
        return {RuntimeError}, None, {}
    mean, made = model.importance(moments, w.wide["importance_mean"])
    balls = dict(zip(chosen, made, strict=True))
    if not np.isfinite(mean[0]):
        return {ValueError}, mean, balls
    if not np.isfinite(mean[1]):
        return {None, RuntimeError, ValueError}, mean, balls
    if mean[0] < -mean[1]:  # no squares: somebody has written them
        return {ValueError}, mean, balls
    if mean[0] <= mean[1]:
        return {RuntimeError} | ({None} if mean[0] else set()), mean, balls
    errors = {None}
    for i, (value, error) in balls.items():
        top = torch.finfo(importance_storage(w, i).to_real()).max
        if value.size and (value + error).max() > top:
            errors |= {ValueError}
            if (value - error).max() > top:
                return {ValueError}, mean, balls
    return errors, mean, balls


def named_sums(w: World, rng) -> dict[str, torch.Tensor]:
    """Sums of second moments that somebody has kept of a former optimizer."""
    wrapper, sums = rng.choice(["", "module."]), {}
    for i, p in enumerate(w.params):
        x = positive(values(rng, w.gen, p.shape, C128 if p.is_complex() else F64))
        dtype = p.dtype if p.dtype == F64 or rng.random() < 0.5 else stored_as(F32, p.dtype)
        sums[f"{wrapper}p{i}"] = lay_out(x.to(dtype), rng.choice(LAYOUTS))
    return sums


@action(6)
def set_anchor(w: World, rng) -> None:
    """θ* from the present weights or named tensors, with or without the number of the task."""
    chosen = chosen_for_anchor(w)
    by_name = rng.random() < 0.35
    task = None if rng.random() < 0.7 else rng.choice([0, 1, 2, 3, w.wide["task_index"] + 1])
    arguments, sources = {}, {}
    if by_name:
        tensors = {}
        wrapper = rng.choice(["", "module.", "_orig_mod."])
        for i in range(len(w.params)):
            p = w.params[i]
            dtype = p.dtype if rng.random() < 0.6 else stored_as(rng.choice([F32, F64]), p.dtype)
            x = lay_out(values(rng, w.gen, p.shape, dtype), rng.choice(LAYOUTS))
            sources[i] = x
            tensors[f"{wrapper}p{i}"] = x
        tensors["other"] = torch.ones(3)
        arguments["tensors"] = tensors
        if not w.named or rng.random() < 0.5:
            arguments["model"] = w.bag
    else:
        sources = {i: w.stepped(i) for i in chosen}
    sums = None
    # Without second moments there is no other way.
    often = 0.6 if w.rule == "sgd" else 0.2
    if w.wide["importance"] and rng.random() < often:
        sums = named_sums(w, rng)
        if not w.named or rng.random() < 0.5:
            arguments["model"] = w.bag
    if task is not None:
        arguments["task"] = task
    place_anchor(w, chosen, sources, sums, arguments)


def place_anchor(w: World, chosen, sources, sums, arguments) -> None:
    """Calls set_anchor() and compares what comes of it.

    Args:
        w: The world.
        chosen: The parameters that get an anchor.
        sources: Their anchors.
        sums: Named sums of second moments, or None.
        arguments: The other arguments of the call.
    """
    by_name, task = "tensors" in arguments, arguments.get("task")
    error, keep = None, False
    if task is not None:
        verdict = begins(w, task, by_name)
        error, keep = (verdict, False) if isinstance(verdict, type) else (None, not verdict)
    elif not by_name:
        anchored = any("anchor" in held.state for held in w.held)
        if w.resumed and w.resumed == w.wide["draw_index"] and anchored:
            error = RuntimeError
    if error is None and not keep:
        if not chosen:
            error = ValueError
        for i in chosen:
            stored = sources[i].to(anchor_storage(w, i))
            if not finite(sources[i]) or not finite(stored):
                error = ValueError
    errors, mean, balls = {error}, None, {}
    if error is None and not keep and w.wide["importance"]:
        of_names = {} if sums is None else {n.split(".")[-1]: x for n, x in sums.items()}
        given = {i: of_names[f"p{i}"] for i in chosen} if of_names else {}
        errors, mean, balls = weighed(w, chosen, given)
    if sums is not None:
        arguments["importance"] = sums
    told = [e.__name__ if e else "kept" if keep else "set" for e in errors]
    w.note(
        f"set_anchor({'tensors, ' if by_name else ''}task={task}, "
        f"importance={'sums' if sums else None}) -> {' or '.join(sorted(told))}"
    )
    try:
        w.guide.set_anchor(**arguments)
    except Exception as raised:
        if errors == {None}:
            raise Difference(
                f"set_anchor raises {type(raised).__name__}", str(raised)[:300]
            ) from raised
        if not isinstance(raised, tuple(e for e in errors if e)):
            raise Difference(
                f"set_anchor raises {type(raised).__name__}, not {' or '.join(told)}"
            ) from raised
        return
    if None not in errors:
        raise Difference(f"set_anchor does not raise {' or '.join(told)}")
    if keep:
        return
    for i in chosen:
        held = w.held[i]
        stored = sources[i].to(anchor_storage(w, i))
        if w.has_master(i) and "master" in held.state:
            held.state["master"] = w.stepped(i)
        w.make_state(i, before=True)
        held.state["anchor"] = stored.clone()
        held.stale = None
    take_importance(w, chosen, mean, balls)
    count_anchored(w)
    w.wide["task_index"] = w.wide["task_index"] + 1 if task is None else task
    w.task_named = task


def take_importance(w: World, chosen, mean, balls) -> None:
    """Compares the importance that a boundary has made, and takes it over."""
    if not w.wide["importance"]:
        w.wide.update(importance_mean=0.0, importance_draw=None)
        for held in w.held:
            held.state.pop("importance", None)
        return
    made = w.guide.param_groups[0]["importance_mean"]
    if np.isfinite(mean[1]) and not abs(made - mean[0]) <= mean[1]:
        raise Difference(
            "set_anchor: importance_mean", f"is {made!r}, expected {mean[0]!r} +- {mean[1]:.3g}"
        )
    w.wide.update(importance_mean=made, importance_draw=w.wide["draw_index"])
    for i in chosen:
        entry = w.real_state(w.params[i])
        if "importance" not in entry:
            raise Difference("set_anchor: no importance", f"of p{i}")
        made = entry["importance"]
        if made.dtype != importance_storage(w, i) or made.shape != w.params[i].shape:
            raise Difference("set_anchor: kind of importance", f"of p{i}: {shown(made)}")
        w.assert_within(made, balls[i], f"importance of p{i}", where="set_anchor")
        w.held[i].state["importance"] = made.clone()


def count_anchored(w: World) -> None:
    for group, members in zip(w.groups, w.parts(w.held), strict=True):
        group["anchored"] = sum("anchor" in held.state for held in members)


@action(1.5)
def importance_sums(w: World, rng) -> None:
    """The sums of all tasks by name, for another optimizer; nothing changes."""
    chosen = [i for i, h in enumerate(w.held) if h.trained or "importance" in h.state]
    moments = [moment(w, i) for i in chosen]
    mine = w.named and rng.random() < 0.5
    error = None if not chosen or any(m.known for m in moments) else RuntimeError
    w.note(f"importance_dict({'' if mine else 'model'}) -> {error}")
    try:
        sums = w.guide.importance_dict(**({} if mine else {"model": w.bag}))
    except Exception as raised:
        if error is None or not isinstance(raised, error):
            raise Difference(
                f"importance_dict raises {type(raised).__name__}", str(raised)[:300]
            ) from raised
        return
    if error is not None:
        raise Difference(f"importance_dict does not raise {error.__name__}")
    if sums.keys() != {f"p{i}" for i in chosen}:
        raise Difference("importance_dict: names", f"{sorted(sums)}, not {chosen}")
    for i, each in zip(chosen, moments, strict=True):
        total, p = sums[f"p{i}"], w.params[i]
        if total.dtype != stored_as(F64 if each.double else F32, p.dtype) or total.shape != p.shape:
            raise Difference("importance_dict: kind", f"of p{i}: {shown(total)}")
        w.assert_within(
            total, each.total(w.wide["importance_mean"]), f"sum of p{i}", where="importance_dict"
        )


@action(1)
def carry(w: World, rng) -> None:
    """The next task has an optimizer of its own, which is given the sums of the former one."""
    if w.foreign or not w.wide["importance"]:
        return
    if w.automatic != (w.default_pull["alpha"] == "auto"):
        return  # no constructor takes these options
    try:
        sums = w.opt.importance_dict(model=w.bag)
    except RuntimeError:
        return  # there are none: see `importance_sums`
    if rng.random() < 0.5:
        sums = through_file(sums)
    pairs = list(w.bag.named_parameters()) if w.named else w.params
    groups = []
    for group, part in zip(w.groups, w.parts(pairs), strict=True):
        own = {k: v for k, v in group.items() if k not in ("size", "anchored", "decoupled")}
        groups.append({"params": part, **own})
    dtypes = {p.dtype for p in w.params}
    if (w.master and not dtypes & set(NARROW)) or (w.stochastic and BF16 not in dtypes):
        return
    wide = {k: v for k, v in w.wide.items() if k not in ("draw_index", "task_index")}
    del wide["importance_mean"], wide["importance_draw"]
    w.note("a new optimizer is given the sums of this one")
    w.opt = w.guide = getattr(dgg, w.kind)(
        groups, backend=w.backend, state_dtype=w.state_dtype, anchor_dtype=w.anchor_dtype,
        importance_dtype=w.importance_dtype, fused=w.fused, master_weights=w.master,
        stochastic_rounding=w.stochastic, **w.default_pull, **wide,
    )  # fmt: skip
    drop_caches(w)
    w.saved = []
    w.wide.update(draw_index=0, task_index=0, importance_mean=0.0, importance_draw=None)
    for held in w.held:
        held.theta, held.state, held.first = held.theta, {}, False
    count_anchored(w)
    chosen = chosen_for_anchor(w)
    place_anchor(w, chosen, {i: w.stepped(i) for i in chosen}, sums, {"model": w.bag})


@action(2)
def merge(w: World, rng) -> None:
    """The weights go back a part of the way to their anchor."""
    if w.foreign:
        return
    rule = rng.choice(["mean", "fisher", "rows"] + ["fisher"] * 3 * bool(w.wide["importance"]))
    keep = rng.choice([0.5, 0.25, 0.7, 1.0, 0.01]) if rule == "rows" else None
    if not any("anchor" in held.state for held in w.held) and rng.random() < 0.7:
        set_anchor(w, rng)
        train(w, rng)
    chosen = [i for i, held in enumerate(w.held) if "anchor" in held.state]
    moments = {i: moment(w, i) for i in chosen}
    error = None if chosen else RuntimeError
    if rule == "fisher" and any("importance" not in w.held[i].state for i in chosen):
        error = RuntimeError
    if rule == "fisher" and all(m.square is None for m in moments.values()):
        error = RuntimeError
    if not all(finite(w.stepped(i)) and finite(w.held[i].state["anchor"]) for i in chosen):
        return  # what has diverged has no way back
    w.note(f"merge_anchor({rule!r}, keep={keep}) -> {error}")
    try:
        made = w.opt.merge_anchor(rule, keep=keep)
    except Exception as raised:
        if error is None or not isinstance(raised, error):
            raise Difference(
                f"merge_anchor raises {type(raised).__name__}", str(raised)[:300]
            ) from raised
        return
    if error is not None:
        raise Difference(f"merge_anchor does not raise {error.__name__}")
    thetas, anchors = {}, {}
    for i in chosen:
        double = moments[i].double
        thetas[i] = model.flat(w.stepped(i))
        anchors[i] = (model.flat if double else single)(w.held[i].state["anchor"])
    share = 1.0 / (w.wide["task_index"] + 1), 0.0
    if rule == "fisher":
        exact = {i: model.flat(w.held[i].state["anchor"]) for i in chosen}
        parts = [(moments[i], thetas[i] - exact[i]) for i in chosen]
        share = model.share_of_task(parts, w.wide["importance_mean"])
    wanted = (keep, 0.0) if rule == "rows" else share
    if not abs(made - wanted[0]) <= wanted[1] + 1e-15:
        raise Difference(f"merge_anchor: {rule}", f"returns {made!r}, not {wanted}")
    for i in chosen:
        p, held = w.params[i], w.held[i]
        target = w.real_state(p)["master"] if w.has_master(i) and p.numel() else p.detach()
        ops = model.Arithmetic(moments[i].double, False)
        if rule == "rows":
            assert_rows(w, i, target, thetas[i], anchors[i], keep)
        else:
            ball = model.merged(thetas[i], anchors[i], share, ops)
            w.assert_within(target, ball, f"merged weights of p{i}", where="merge_anchor")
        if target is not p and not same(p.detach(), target.to(p.dtype)):
            raise Difference("merge_anchor: weights are not the masters' rounding", f"p{i}")
        if "master" in held.state:
            held.state["master"] = w.opt.__dict__["state"][p]["master"].clone()
        held.theta, held.stale = p.detach().clone(), None


def assert_rows(w: World, i: int, made: torch.Tensor, theta, anchor, keep: float) -> None:
    """The rows that moved farthest are θ's, the others the anchor's; a vector is as it was."""
    found, real = model.flat(made), model.real_dtype(made)
    theta, anchor = (model.rounded(x, real) for x in (theta, anchor))
    rows = made.shape[0] if made.dim() > 1 else 0
    if not rows or not found.size:
        if not np.array_equal(found, theta):
            raise Difference("merge_anchor: rows", f"p{i} has none and changed")
        return
    found, theta, anchor = (x.reshape(rows, -1) for x in (found, theta, anchor))
    lengths = np.sqrt(((theta - anchor) ** 2).sum(axis=1))
    count = max(1, round(keep * rows))
    least = np.sort(lengths)[-count]
    wrong = (found.shape[1] + 8) * model.Arithmetic(real == F64, False).unit * lengths
    for k in range(rows):
        stays, back = np.array_equal(found[k], theta[k]), np.array_equal(found[k], anchor[k])
        if not (stays or back):
            raise Difference("merge_anchor: rows", f"row {k} of p{i} is neither's")
        if stays != back and (
            (stays and lengths[k] + 2 * wrong[k] < least)
            or (back and lengths[k] - 2 * wrong[k] > least)
        ):
            raise Difference("merge_anchor: rows", f"row {k} of p{i}, {lengths}, {count} stay")
    kept = [np.array_equal(found[k], theta[k]) for k in range(rows)]
    if sum(kept) < count or sum(kept) > count + sum((theta == anchor).all(axis=1)):
        raise Difference("merge_anchor: rows", f"of p{i}: {sum(kept)} stay, not {count}")


@action(0.8)
def clear_anchor(w: World, rng) -> None:
    w.note("clear_anchor()")
    w.guide.clear_anchor()
    for held in w.held:
        for name in OF_BOUNDARIES:
            held.state.pop(name, None)
    w.wide.update(importance_mean=0.0, importance_draw=None)
    count_anchored(w)


@action(3)
def write_anchor(w: World, rng) -> None:
    """Somebody writes into an anchor, or an importance, by the state or a reference from before."""
    anchored = [i for i, held in enumerate(w.held) if "anchor" in held.state]
    if not anchored or w.foreign:
        return
    i = rng.choice(anchored)
    held, p = w.held[i], w.params[i]
    key = "importance" if "importance" in held.state and rng.random() < 0.5 else "anchor"
    ways = ["state", "state", "exchange", "data"] + ([] if "kept" in w.without else ["kept"] * 3)
    way = rng.choice(ways)
    x = values(rng, w.gen, p.shape, held.state[key].dtype)
    x = x if key == "anchor" else positive(x)
    if way == "kept":
        kept = w.kept.get(i, {}).get(key)
        if kept is None or kept is not w.real_state(p).get(key):
            w.kept[i] = {key: w.opt.state[p][key]}
            w.note(f"keep = state[p{i}][{key!r}]")
            return
        kept.copy_(x)
    elif way == "state":
        w.opt.state[p][key].copy_(x)
    elif way == "data":
        w.opt.state[p][key].data.copy_(x)
    else:
        w.opt.state[p][key] = lay_out(x, rng.choice(["plain", "turned", "last", "offset"]))
    held.state[key] = x
    w.note(f"{key} of p{i} <- {x.tolist()} by {way}")


@action(3)
def change_state(w: World, rng) -> None:
    """Moments that somebody writes into, moves, casts, exchanges or drops."""
    if w.foreign:
        return
    with_state = [i for i, held in enumerate(w.held) if held.state]
    if not with_state:
        return
    i = rng.choice(with_state)
    held, p = w.held[i], w.params[i]
    keys = [k for k in held.state if k not in (*OF_BOUNDARIES, "master")]
    if not keys:
        return
    key = rng.choice(keys)
    way = rng.choice(
        ["clone", "write", "data", "dtype", "turn", "exchange", "drop", "keep", "kept"]
    )
    entry = w.opt.state[p]
    old = held.state[key]
    x = old
    if way == "drop":
        if "anchor" in held.state:
            return
        del w.opt.state[p]
        held.state, held.first = {}, False
        w.note(f"del state[p{i}]")
        return
    if key == "step":
        if way in ("dtype", "turn"):
            return
        x = torch.tensor(float(rng.choice([0, 1, 5, 100])))
    elif way not in ("clone", "turn", "dtype", "keep"):
        x = values(rng, w.gen, p.shape, old.dtype)
        x = x * x if key.endswith("sq") and not x.is_complex() else x
        if x.is_complex() and key.endswith("sq"):
            x = torch.complex(x.real**2, x.imag**2)
    if way == "clone":
        entry[key] = entry[key].clone()
        x = old
    elif way == "write":
        entry[key].copy_(x)
    elif way == "data":
        entry[key].data = x.clone()
    elif way == "dtype":
        x = old.to(stored_as(rng.choice([F32, F64]), old.dtype))
        entry[key] = x.clone()
    elif way == "turn":
        entry[key] = lay_out(old, rng.choice(["turned", "last", "offset", "gaps"]))
    elif way == "exchange":
        entry[key] = x.clone()
    elif way == "keep":
        w.kept[i] = dict(entry)
        w.note(f"keep = dict(state[p{i}])")
        return
    else:
        kept = w.kept.get(i, {}).get(key)
        if kept is None or kept is not w.real_state(p).get(key):
            return
        kept.copy_(x)
    held.state[key] = x.clone()
    w.note(f"{key} of p{i} <- {x.dtype} {x.tolist()} by {way}")


# -- weights --------------------------------------------------------------------------------------


def squared_distance(w: World, i: int) -> float | None:
    held = w.held[i]
    if "anchor" not in held.state:
        return None
    d = single(w.stepped(i)) - single(held.state["anchor"])
    weight = w.wide["importance"]
    if weight:
        if "importance" not in held.state:
            return np.inf
        d = d * (1 - weight + weight * single(held.state["importance"]))
    return float(np.dot(d, d))


@action(5)
def write_weights(w: World, rng) -> None:
    """In-place changes that autograd sees, and those it does not."""
    i = rng.randrange(len(w.params))
    p, held = w.params[i], w.held[i]
    ways = ["copy", "fill", "element", "detach", "add", "data", "numpy", "exchange"]
    way = rng.choice(ways)
    if way in ("data", "numpy") and "data" in w.without:
        return
    before = squared_distance(w, i)
    x = values(rng, w.gen, p.shape, p.dtype)
    if way == "numpy" and (p.dtype not in (F32, F64) or p.is_neg()):
        way = "data"
    if way == "copy":
        with torch.no_grad():
            p.copy_(x)
    elif way == "fill":
        x = torch.full_like(held.theta, 5.0)
        with torch.no_grad():
            p.fill_(5.0)
    elif way == "element":
        x = held.theta.clone()
        if not x.numel():
            return
        place = rng.randrange(x.numel())
        at = np.unravel_index(place, x.shape)
        x[at] = 2.5
        with torch.no_grad():
            p[at] = 2.5
    elif way == "detach":
        p.detach().copy_(x)
    elif way == "add":
        x = held.theta + 0.5
        with torch.no_grad():
            p.add_(0.5)
    elif way == "data":
        p.data.copy_(x)
    elif way == "numpy":
        p.detach().numpy()[...] = x.numpy()
    else:
        p.data = lay_out(x, rng.choice(["plain", "turned", "last", "offset", "gaps"]))
    if way in ("data", "numpy") and held.stale is None:
        held.stale = before
    held.theta = x.clone()
    w.note(f"p{i} <- {x.tolist()} by {way}")


@action(1.2, "swap")
def swap(w: World, rng) -> None:
    """torch.utils.swap_tensors, as modules do it that convert by swapping."""
    i = rng.randrange(len(w.params))
    p, held = w.params[i], w.held[i]
    x = values(rng, w.gen, p.shape, p.dtype)
    other = nn.Parameter(
        lay_out(x, rng.choice(["plain", "turned", "last"])), requires_grad=held.trained
    )
    if w.any_grad:
        other.grad_dtype = None
    p.grad = None
    w.note(f"swap_tensors(p{i}, {x.tolist()})")
    try:
        torch.utils.swap_tensors(p, other)
    except RuntimeError as error:
        raise Difference("swap_tensors is refused", str(error)[:200]) from error
    held.theta = x.clone()
    held.stale = None


@action(1)
def convert(w: World, rng) -> None:
    """model.half() and the like, in place or by swapping; other memory formats; loading."""
    how = rng.choice(["half", "bfloat16", "float", "double", "channels_last", "load", "load"])
    if any(held.replay is not None for held in w.held):
        return  # torch lets no gradient of another dtype stand in .grad
    if w.foreign and how not in ("channels_last", "load"):
        return  # torch's optimizers want moments of the gradients' dtype
    swapping = rng.random() < 0.4 and "swap" not in w.without
    for p in w.params:
        p.grad = None
    w.note(f"model {how}, swapping {swapping}")
    loaded = {}
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        if how == "load":
            loaded = {f"p{i}": values(rng, w.gen, p.shape, p.dtype) for i, p in enumerate(w.params)}
            w.bag.load_state_dict(loaded)
        elif how == "channels_last":
            w.bag.to(memory_format=torch.channels_last)
        else:
            getattr(w.bag, how)()
    except RuntimeError as error:
        raise Difference("module conversion is refused", str(error)[:200]) from error
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    dtype = {"half": F16, "bfloat16": BF16, "float": F32, "double": F64}.get(how)
    for i, (p, held) in enumerate(zip(w.params, w.held, strict=True)):
        if how == "load":
            held.theta = loaded[f"p{i}"]
        elif dtype is not None and not p.is_complex():
            held.converted = held.converted or held.theta.dtype != dtype
            held.theta = held.theta.to(dtype)
            if not w.has_master(i):
                held.state.pop("master", None)
        if w.any_grad:
            p.grad_dtype = None


@action(0.4)
def unguide(w: World, rng) -> None:
    """Takes the guidance off, steps as torch does, and puts a new one on."""
    if not w.foreign:
        return
    w.note("guidance.remove(), step(), a new Guidance")
    w.guide.remove()
    twin = copy.deepcopy((w.bag, w.opt))
    set_gradients(w, rng)
    for p, q in zip(w.params, (q for g in twin[1].param_groups for q in g["params"]), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    try:
        w.opt.step()
    except RuntimeError:
        # What torch does not take (a lazy view, say) is torch's affair.
        w.opt.zero_grad()
        twin = copy.deepcopy((w.bag, w.opt))
    else:
        twin[1].step()
    for i, q in enumerate(q for g in twin[1].param_groups for q in g["params"]):
        p, held = w.params[i], w.held[i]
        # Torch's own kernels round otherwise where the memory is laid out otherwise.
        if not torch.allclose(p, q, rtol=2e-2, atol=1e-3, equal_nan=True):
            raise Difference("guidance.remove(): steps otherwise than torch", f"p{i}")
        held.theta = p.detach().clone()
        state = w.opt.state.get(p, {})
        held.state = {k: v.clone() for k, v in state.items() if v is not None}
        held.replay, held.stale = None, None
    w.guide = dgg.Guidance(w.opt, backend=w.backend, **w.options, **w.default_pull)
    w.wide = {**w.wide, **{k: v for k, v in w.options.items() if k in WIDE}}
    w.wide.update(draw_index=0, task_index=0, importance_mean=0.0, importance_draw=None)
    for group in w.groups:
        group.update(w.default_pull, anchored=0)
    w.counted, w.resumed, w.task_named, w.saved = 0, None, None, []


@action(1)
def freeze(w: World, rng) -> None:
    i = rng.randrange(len(w.params))
    p, held = w.params[i], w.held[i]
    p.requires_grad_(not held.trained)
    held.trained = not held.trained
    w.note(f"p{i}.requires_grad_({held.trained})")


@action(1)
def heal(w: World, rng) -> None:
    """Finite numbers again, where inf and NaN have come."""
    for i, (p, held) in enumerate(zip(w.params, w.held, strict=True)):
        if (
            not finite(held.theta)
            or model.flat(held.theta).size
            and abs(model.flat(held.theta)).max() > 1e3
        ):
            x = values(rng, w.gen, p.shape, p.dtype)
            with torch.no_grad():
                p.copy_(x)
            held.theta = x
            w.note(f"p{i} <- {x.tolist()}")
        for key, value in held.state.items():
            if key == "master" or key == "step" or finite(value):
                continue
            holder = w.guide if w.foreign and key in OF_BOUNDARIES else w.opt
            holder.state[p][key].zero_()
            held.state[key] = torch.zeros_like(value)
            w.note(f"{key} of p{i} <- 0")


@action(1)
def read_state(w: World, rng) -> None:
    """Looks that must change nothing."""
    repr(w.opt)
    w.opt.state_dict()
    w.guide.guidance_stats()
    w.note("look at everything")


# -- copies and checkpoints -----------------------------------------------------------------------


def drop_caches(w: World) -> None:
    """What a copy does not take along."""
    for held in w.held:
        held.replay, held.stale = None, None
    w.counted, w.resumed, w.task_named = 0, None, None
    w.kept, w.warned = {}, False


@action(1)
def copied(w: World, rng) -> None:
    """Goes on with a deep or pickled copy, or finds that a guidance cannot be copied."""
    way = rng.choice(["deepcopy", "pickle"])
    w.note(f"{way}, go on with it")
    whole = (w.bag, w.guide if w.foreign else w.opt)
    try:
        made = copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    except Exception as error:
        if w.foreign and isinstance(error, TypeError):
            return
        raise Difference(f"{way} raises {type(error).__name__}", str(error)[:300]) from error
    if w.foreign:
        raise Difference("a guidance was copied")
    w.bag, w.opt = made
    w.guide = w.opt
    w.params = [p for group in w.opt.param_groups for p in group["params"]]
    if any(p is not q for p, q in zip(w.params, w.bag.parameters(), strict=True)):
        raise Difference("the copy's parameters are not the copied module's")
    for p in w.params:
        if w.any_grad:
            p.grad_dtype = None
    drop_caches(w)


def snapshot(w: World) -> dict:
    return {
        "wide": dict(w.wide),
        "groups": [dict(group) for group in w.groups],
        "states": [{k: v.clone() for k, v in held.state.items()} for held in w.held],
        "first": [held.first for held in w.held],
        "late": not w.foreign and lacks_late_state(w),
    }


def through_file(state):
    try:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except Exception as error:
        raise Difference(
            f"torch.load(weights_only) raises {type(error).__name__}", str(error)[:300]
        ) from error


@action(1.5)
def save(w: World, rng) -> None:
    if "unsynced" in w.without and not synced(w):
        return
    state = copy.deepcopy(w.opt.state_dict())
    mine = copy.deepcopy(w.guide.state_dict()) if w.foreign else None
    if rng.random() < 0.3:
        state, mine = through_file((state, mine))
    w.saved = [*w.saved[-1:], (state, mine, snapshot(w))]
    w.note("save")


def cast_on_load(w: World, i: int, key: str, value: torch.Tensor) -> torch.Tensor:
    if key in ("step", *OF_BOUNDARIES):
        return value
    if key == "master":
        return value.to(F32)
    p = w.params[i]
    if w.state_dtype is not None and not w.foreign:
        return value.to(w.moment_dtype(i))
    return value.to(p.dtype) if p.is_floating_point() else value


def lacks_late_state(w: World) -> bool:
    """Whether a switch in the groups asks for state that only the next step makes.

    Such a state dict may be refused.
    """
    return any(
        held.state.keys() & {"exp_avg"}
        and w.groups[w.group_of(i)].get("amsgrad")
        and "max_exp_avg_sq" not in held.state
        for i, held in enumerate(w.held)
    )


def expected_of_load(w: World, shot: dict):
    """Returns the type of error that loading must raise, or None."""
    sizes = [group["size"] for group in shot["groups"]]
    if sizes != [group["size"] for group in w.groups]:
        return ValueError
    if w.wide["draw_index"] <= (0 if w.foreign else 1):
        if w.task_named is not None and shot["wide"]["task_index"] < w.task_named:
            return ValueError
    saved = [state for state in shot["states"]]
    if any("anchor" in state and not finite(state["anchor"]) for state in saved):
        return ValueError
    if not w.foreign:
        mine = any("anchor" in held.state for held in w.held)
        if mine and not any("anchor" in state for state in saved):
            return ValueError
    if lacks_importance(shot):
        return KeyError if w.foreign else RuntimeError
    return None


def lacks_importance(shot: dict) -> bool:
    """Whether a state weighs its pull by an importance that it does not have."""
    states = shot["states"]
    lacking = any("anchor" in state and "importance" not in state for state in states)
    return bool(shot["wide"]["importance"]) and lacking


def synced(w: World) -> bool:
    """Whether a guidance has seen all groups that the optimizer was given."""
    return len(w.guide.param_groups) == len(w.groups)


@action(2.5)
def load(w: World, rng) -> None:
    """An earlier state, or the present one, into the optimizer or into a new one."""
    if "unsynced" in w.without and not synced(w):
        return
    if w.saved and rng.random() < 0.6:
        state, mine, shot = rng.choice(w.saved)
        state, mine = copy.deepcopy((state, mine))
        source = "an earlier state"
    else:
        state, shot = w.opt.state_dict(), snapshot(w)
        mine = w.guide.state_dict() if w.foreign else None
        source = "its own state"
        if rng.random() < 0.5:
            state, mine = copy.deepcopy((state, mine))
    error = expected_of_load(w, shot)
    w.note(f"load {source} -> {error}")
    if w.foreign:
        if error is None:
            w.opt.load_state_dict(state)
        try:
            w.guide.load_state_dict(mine)
        except Exception as raised:
            if error is None or not isinstance(raised, error):
                raise Difference(
                    f"load raises {type(raised).__name__}", str(raised)[:300]
                ) from raised
            return
        if error is not None:
            raise Difference(f"load does not raise {error.__name__}")
    elif not loads(w.opt, state, shot, error):
        return
    loaded(w, shot)


def loaded(w: World, shot: dict) -> None:
    """What a successful load makes of the model."""
    before = w.wide["draw_index"]
    w.wide = dict(shot["wide"])
    w.groups = [dict(group) for group in shot["groups"]]
    for i, (held, state) in enumerate(zip(w.held, shot["states"], strict=True)):
        held.state = {
            k: cast_on_load(w, i, k, v).clone()
            for k, v in state.items()
            if k != "master" or w.has_master(i)
        }
        held.first = shot["first"][i]
        held.stale = None
    w.task_named = None
    fresh = before in (0, w.resumed) if w.foreign else before <= 1 or before == w.resumed
    w.resumed = w.wide["draw_index"] if fresh else None


@action(1)
def resume(w: World, rng) -> None:
    """A new optimizer over new parameters of the same values takes the state over."""
    if w.foreign:
        return
    state = copy.deepcopy(w.opt.state_dict())
    if rng.random() < 0.3:
        state = through_file(state)
    bag, params = Bag(), []
    for held in w.held:
        p = nn.Parameter(held.theta.clone(), requires_grad=held.trained)
        if w.any_grad:
            p.grad_dtype = None
        bag.add(p)
        params.append(p)
    groups = [{"params": part} for part in w.parts(bag.named_parameters() if w.named else params)]
    dtypes = {p.dtype for p in params}
    if (w.master and not dtypes & set(NARROW)) or (w.stochastic and BF16 not in dtypes):
        return
    shot = snapshot(w)
    opt = getattr(dgg, w.kind)(
        groups, lr=3.0, alpha=0.123, seed=99, backend=w.backend, state_dtype=w.state_dtype,
        anchor_dtype=w.anchor_dtype, importance_dtype=w.importance_dtype, fused=w.fused,
        master_weights=w.master, stochastic_rounding=w.stochastic,
    )  # fmt: skip
    error = RuntimeError if lacks_importance(shot) else None
    if any("anchor" in h.state and not finite(h.state["anchor"]) for h in w.held):
        error = ValueError
    w.note(f"a new optimizer loads the state -> {error}")
    if not loads(opt, state, shot, error):
        return
    w.bag, w.params, w.opt, w.guide = bag, params, opt, opt
    w.default_pull = {"alpha": 0.123, "strength": 1.0}
    drop_caches(w)
    draw = w.wide["draw_index"]
    w.wide["draw_index"] = 0
    loaded(w, shot)
    assert w.wide["draw_index"] == draw


# -- what must be refused and change nothing ------------------------------------------------------


def unchanged(w: World, where: str, act, errors=CLEAR) -> None:
    """Runs what must raise one of ``errors``."""
    try:
        act()
    except errors:
        return
    except Exception as error:
        raise Difference(f"{where}: raises {type(error).__name__}", str(error)[:300]) from error
    raise Difference(f"{where}: is accepted")


@action(3)
def hook_raises(w: World, rng) -> None:
    """A hook or a closure raises: before the step nothing has changed, after it all has."""
    set_gradients(w, rng)
    if w.foreign:
        return
    place = rng.choice(["pre", "closure", "post"])
    w.note(f"step() whose {place} raises")

    def fail(*_args, **_kwargs):
        raise Planned

    if place == "closure":
        unchanged(w, "closure that raises", lambda: w.opt.step(fail), Planned)
        return
    register = getattr(w.opt, f"register_step_{place}_hook")
    handle = register(fail)
    try:
        if place == "pre":
            unchanged(w, "hook that raises", w.opt.step, Planned)
            return
        grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in w.params]
        for i in range(len(w.params)):
            if w.params[i].grad is not None or w.held[i].replay is not None:
                w.make_state(i)
        rows = w.rows()
        made = model.step(w.rule, rows, w.groups, w.wide)
        unchanged(w, "hook that raises", w.opt.step, Planned)
        w.after_step(rows, made, grads)
        w.check_stats(rows, made)
    finally:
        handle.remove()


PROVOKED: dict = {}


def provoked(function):
    PROVOKED[function.__name__] = function
    return function


@action(5)
def provoke(w: World, rng) -> None:
    """A wrong use: refused with a clear error, nothing changed, and the next step is a step."""
    name = rng.choice(list(PROVOKED))
    if name in w.without or not synced(w):
        return
    w.note(f"provoke {name}")
    PROVOKED[name](w, rng)
    w.counts["errors"] += 1


def refused_step(w: World, name: str) -> None:
    w.rng_odd = False
    grads = [
        (
            p.grad,
            None
            if p.grad is None
            else model.flat(p.grad)
            if p.grad.layout == torch.strided
            else None,
        )
        for p in w.params
    ]
    unchanged(w, f"step with {name}", w.opt.step)
    for p, (grad, kept) in zip(w.params, grads, strict=True):
        if (
            p.grad is not grad
            or kept is not None
            and not np.array_equal(model.flat(grad), kept, equal_nan=True)
        ):
            raise Difference(f"step with {name}: gradients changed")


@provoked
def sparse_gradient(w: World, rng) -> None:
    set_gradients(w, rng)
    i = rng.randrange(len(w.params))
    p = w.params[i]
    if not p.dim():
        return
    p.grad = values(rng, w.gen, p.shape, p.dtype).to_sparse()
    try:
        refused_step(w, "a sparse gradient")
    finally:
        p.grad = None


@provoked
def gradient_of_another_shape(w: World, rng) -> None:
    set_gradients(w, rng)
    i = rng.randrange(len(w.params))
    p = w.params[i]
    p.grad = values(rng, w.gen, p.shape, p.dtype)
    p.grad.data = torch.ones(rng.choice([7, 2]), dtype=p.dtype)
    try:
        refused_step(w, "a gradient of another shape")
    finally:
        p.grad = None


@provoked
def weights_of_another_shape(w: World, rng) -> None:
    """p.data = something larger: the state does not fit it any more."""
    i = rng.randrange(len(w.params))
    p, held = w.params[i], w.held[i]
    used = {"exp_avg", "anchor"}
    if w.groups[w.group_of(i)].get("momentum"):
        used.add("momentum_buffer")
    if not held.state.keys() & used:
        return
    set_gradients(w, rng)
    if w.foreign and "anchor" not in held.state:
        return
    right, p.grad = p.data, None
    w.note(f"p{i}.data = ones(7, 2)")
    p.data = torch.ones(7, 2, dtype=p.dtype)
    p.grad = torch.ones(7, 2, dtype=p.dtype)
    try:
        refused_step(w, "weights of another shape")
    finally:
        p.grad = None
        p.data = right


@provoked
def wrong_option(w: World, rng) -> None:
    set_gradients(w, rng)
    n = rng.randrange(len(w.guide.param_groups))
    group = w.guide.param_groups[n]
    name, wrong = rng.choice([
        ("alpha", 1.5), ("alpha", "x"), ("alpha", None), ("alpha", float("nan")),
        ("alpha", torch.ones(2)), ("max_grad_norm", torch.ones(2)),
        ("strength", -1.0), ("strength", float("inf")), ("granularity", "row"), ("norm_scope", 3),
        ("scaling", 2), ("seed", -1), ("seed", 1.5), ("seed", None), ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"), ("replay_weight", -1.0), ("replay_weight", float("nan")),
        ("alpha", "automatic"), ("importance", 1.5), ("importance", -0.5), ("importance", "x"),
        ("importance", None), ("importance", torch.tensor(0.3)), ("importance_mean", -1.0),
    ])  # fmt: skip
    groups = list(w.guide.param_groups)
    right = [g[name] for g in groups]
    everywhere = name not in ("alpha", "strength") and rng.random() < 0.5
    for g in groups if everywhere else [group]:
        g[name] = wrong
    try:
        refused_step(w, f"{name}={wrong!r}" + " everywhere" * everywhere)
    finally:
        for g, value in zip(groups, right, strict=True):
            g[name] = value


@provoked
def wrong_hyper(w: World, rng) -> None:
    if w.foreign:
        return
    set_gradients(w, rng)
    n = rng.randrange(len(w.groups))
    group = w.opt.param_groups[n]
    choices = [
        ("lr", torch.ones(2)),
        ("lr", "x"),
        ("lr", None),
        ("weight_decay", torch.ones(3)),
        ("weight_decay", None),
    ]
    choices += (
        [("betas", (0.9,)), ("betas", None), ("betas", ("a", "b")), ("eps", "x"), ("eps", None)]
        if w.rule == "adam"
        else [("momentum", "x"), ("momentum", None)]
    )
    name, wrong = rng.choice(choices)
    mine = [i for i in range(len(w.params)) if w.group_of(i) == n and w.params[i].numel()]
    mine = [i for i in mine if w.params[i].grad is not None]
    if name == "momentum":  # a buffer's first step does not look at it
        mine = [i for i in mine if "momentum_buffer" in w.held[i].state and not w.held[i].first]
    if not mine:
        return
    right, group[name] = group[name], wrong
    w.note(f"group {n}: {name}={wrong!r}")
    try:
        unchanged(w, f"step with {name}={wrong!r}", w.opt.step, (*CLEAR, IndexError))
    finally:
        group[name] = right


@provoked
def missing_key(w: World, rng) -> None:
    set_gradients(w, rng)
    groups = w.guide.param_groups
    group = groups[rng.randrange(len(groups))]
    name = rng.choice(["alpha", "strength", "seed", "granularity"])
    right = group.pop(name)
    try:
        refused_step(w, f"no {name} in a group")
    finally:
        group[name] = right


@provoked
def step_in_replay(w: World, rng) -> None:
    set_gradients(w, rng)

    def act():
        with w.guide.replay():
            for p in w.params:
                p.grad = torch.ones_like(p)
            w.opt.step()

    grads = [p.grad for p in w.params]
    unchanged(w, "step in a replay block", act)
    for p, g in zip(w.params, grads, strict=True):
        if (p.grad is None) != (g is None) or g is not None and not same(p.grad, g):
            raise Difference("step in a replay block: gradients are others")


@provoked
def nested_replay(w: World, rng) -> None:
    def act():
        with w.guide.replay(), w.guide.replay():
            pass

    unchanged(w, "nested replay", act)


@provoked
def bad_anchor(w: World, rng) -> None:
    tensors = {f"p{i}": values(rng, w.gen, p.shape, p.dtype) for i, p in enumerate(w.params)}
    chosen = chosen_for_anchor(w)
    if not chosen:
        return
    i = rng.choice(chosen)
    name, p = f"p{i}", w.params[i]
    what = rng.choice(
        [
            "shape",
            "strange",
            "missing",
            "int",
            "text",
            "sparse",
            "meta",
            "list",
            "path",
            "model",
            "none",
            "bool",
            "complex",
        ]
    )
    if what == "shape":
        tensors[name] = torch.ones(5, 5, dtype=p.dtype)
    elif what == "strange":
        if not p.numel():
            return
        tensors[name] = values(rng, w.gen, p.shape, p.dtype, "strange")
    elif what == "missing":
        del tensors[name]
    elif what == "int":
        tensors[name] = torch.ones(p.shape, dtype=torch.int32)
    elif what == "bool":
        tensors[name] = torch.ones(p.shape, dtype=torch.bool)
    elif what == "complex":
        tensors[name] = torch.ones(p.shape, dtype=F32 if p.is_complex() else C64)
    elif what == "text":
        tensors[name] = rng.choice(["x", None, 1.0, [1.0], np.ones(p.shape)])
    elif what == "sparse":
        if not p.dim():
            return
        tensors[name] = tensors[name].to_sparse()
    elif what == "meta":
        tensors[name] = tensors[name].to("meta")
    elif what == "none":
        tensors = {}
    elif what == "list":
        tensors = rng.choice([list(tensors.values()), 3, 1.5, w.opt])
    elif what == "path":
        tensors = rng.choice(["/nowhere/at/all", pathlib.Path("/nowhere"), ""])
    arguments = {"tensors": tensors, "model": w.bag}
    if what == "model":
        arguments["model"] = rng.choice(["x", 3, nn.Linear(1, 1)])
    # What ends in mid-task keeps the anchor without a look at what is given.
    unchanged(w, f"set_anchor with {what}", lambda: w.guide.set_anchor(**arguments))


@provoked
def bad_importance(w: World, rng) -> None:
    """Sums that no second moments can be, or that would be ignored."""
    chosen = [i for i in chosen_for_anchor(w) if w.params[i].numel()]
    if not chosen:
        return
    sums = named_sums(w, rng)
    sums = {name.split(".")[-1]: x for name, x in sums.items()}
    name = f"p{rng.choice(chosen)}"
    what = rng.choice(
        ["negative", "strange", "shape", "missing", "int", "text", "meta", "sparse", "list", "path"]
    )
    if what == "negative":
        sums[name] = lay_out(sums[name], "plain")
        sums[name].view(-1)[0] = -1e-3
    elif what == "strange":
        sums[name] = positive(values(rng, w.gen, sums[name].shape, sums[name].dtype, "strange"))
    elif what == "shape":
        sums[name] = torch.ones(5, 5, dtype=sums[name].dtype)
    elif what == "missing":
        del sums[name]
    elif what == "int":
        sums[name] = torch.ones(sums[name].shape, dtype=torch.int64)
    elif what == "text":
        sums[name] = rng.choice(["x", None, 1.0, [1.0]])
    elif what == "meta":
        sums[name] = sums[name].to("meta")
    elif what == "sparse":
        if not sums[name].dim():
            return
        sums[name] = sums[name].clone().to_sparse()
    elif what == "list":
        sums = rng.choice([list(sums.values()), 3, w.opt])
    else:
        sums = rng.choice(["/nowhere/at/all", pathlib.Path("/nowhere")])
    unchanged(
        w, f"set_anchor with importance: {what}",
        lambda: w.guide.set_anchor(importance=sums, model=w.bag),
    )  # fmt: skip


@provoked
def importance_lost(w: World, rng) -> None:
    """An anchored parameter whose importance is gone is not pulled as if it had one."""
    if not w.wide["importance"]:
        return
    with_one = [i for i, held in enumerate(w.held) if "importance" in held.state]
    if not with_one:
        return
    set_gradients(w, rng)
    i = rng.choice(with_one)
    p, state = w.params[i], w.guide.state if w.foreign else w.opt.state
    p.grad = values(rng, w.gen, p.shape, p.dtype)
    right = state[p].pop("importance")
    try:
        refused_step(w, "a lost importance")
    finally:
        state[p]["importance"] = right


@provoked
def importance_too_late(w: World, rng) -> None:
    """The option is switched on between two boundaries: perhaps unnoticed by the first step."""
    lacking = [
        i for i, h in enumerate(w.held) if "anchor" in h.state and "importance" not in h.state
    ]
    if not lacking or w.wide["importance"]:
        return
    for group in w.guide.param_groups:
        group["importance"] = 0.5
    w.wide["importance"] = 0.5
    others = [i for i, held in enumerate(w.held) if "anchor" not in held.state]
    others = [i for i in others if held_replay_only(w, i)]
    first = bool(others) and not any(w.held[i].replay is not None for i in lacking)
    if first and rng.random() < 0.7:
        for i, p in enumerate(w.params):
            p.grad = values(rng, w.gen, p.shape, p.dtype) if i in others else None
        run_step(w, rng)
    i = rng.choice(lacking)
    for p in w.params:
        p.grad = None
    w.params[i].grad = values(rng, w.gen, w.params[i].shape, w.params[i].dtype)
    try:
        refused_step(w, "an importance that no boundary has made")
    finally:
        for group in w.guide.param_groups:
            group["importance"] = 0.0
        w.wide["importance"] = 0.0


def held_replay_only(w: World, i: int) -> bool:
    """Whether a parameter can be stepped by itself."""
    return w.held[i].trained and w.params[i].numel() > 0


@provoked
def bad_guard(w: World, rng) -> None:
    """What alpha="auto" would ignore, or cannot compare."""
    groups = w.guide.param_groups
    what = rng.choice(["granularity", "scaling", "number", "maximize", "built"])
    if what == "built":
        wrong = rng.choice([{"granularity": "element"}, {"scaling": False}])
        build = dgg.Guidance if w.foreign else getattr(dgg, w.kind)
        over = torch.optim.SGD(w.params, lr=0.1) if w.foreign else w.params
        unchanged(w, f"a new one with auto and {wrong}", lambda: build(over, alpha="auto", **wrong))
        return
    if not w.automatic or len(groups) < 2 and what in ("number", "maximize"):
        return
    set_gradients(w, rng)
    if what in ("granularity", "scaling"):
        wrong, changed = {"granularity": "tensor", "scaling": False}[what], groups
    else:
        auto = [n for n, group in enumerate(w.groups) if group["alpha"] == "auto"]
        if what == "maximize":
            if len(auto) < 2:
                return
            n = rng.choice(auto)
            wrong, changed = not w.ascends, [w.opt.param_groups[n]]
        else:
            n = next(n for n in range(len(groups)) if n != auto[0])
            wrong, changed = 0.5, [groups[n]]
    name = "alpha" if what == "number" else what
    right = [group[name] for group in changed]
    for group in changed:
        group[name] = wrong
    try:
        refused_step(w, f"alpha='auto' and another {name}")
    finally:
        for group, value in zip(changed, right, strict=True):
            group[name] = value


@provoked
def bad_merge(w: World, rng) -> None:
    if w.foreign:
        return
    rule, keep = rng.choice([("median", 0.5), (None, 0.5), ("rows", 0.0), ("rows", 1.5),
                             ("rows", float("nan")), ("rows", "x"), ("mean", 0.5)])  # fmt: skip
    unchanged(w, f"merge_anchor({rule!r}, {keep!r})", lambda: w.opt.merge_anchor(rule, keep=keep))


@provoked
def bad_task(w: World, rng) -> None:
    task = rng.choice(["x", 1.5, -1, True, None])
    if task is None:
        unchanged(w, "set_anchor(model=) alone", lambda: w.guide.set_anchor(model=w.bag))
        return
    unchanged(w, f"set_anchor(task={task!r})", lambda: w.guide.set_anchor(task=task))


@provoked
def bad_group(w: World, rng) -> None:
    what = rng.choice(
        ["known", "twice", "int", "alpha", "seed", "list", "empty", "tensor", "expanded"]
    )
    if w.foreign:
        return
    p = nn.Parameter(torch.ones(2))
    wrong = {
        "known": {"params": [w.params[0]]},
        "twice": {"params": [p, p]},
        "int": {"params": [nn.Parameter(torch.ones(2).to(torch.float8_e5m2))]},
        "alpha": {"params": [p], "alpha": 1.5},
        "seed": {"params": [p], "seed": w.wide["seed"] + 1},
        "list": [p],
        "empty": {},
        "tensor": {"params": [3]},
        "expanded": {"params": [nn.Parameter(torch.ones(1).expand(3))]},
    }[what]
    if w.named and isinstance(wrong, dict) and wrong.get("params"):
        wrong["params"] = [(f"q{k}", x) for k, x in enumerate(wrong["params"])]
    unchanged(w, f"add_param_group with {what}", lambda: w.opt.add_param_group(wrong))


@provoked
def anchor_in_the_weights(w: World, rng) -> None:
    """The anchor in the state is the parameter itself."""
    anchored = [
        i for i, held in enumerate(w.held) if "anchor" in held.state and w.params[i].numel()
    ]
    if not anchored or w.foreign:
        return
    set_gradients(w, rng)
    i = rng.choice(anchored)
    p = w.params[i]
    p.grad = values(rng, w.gen, p.shape, p.dtype)
    right = w.opt.state[p]["anchor"]
    w.opt.state[p]["anchor"] = p.data
    try:
        refused_step(w, "an anchor that is the weights")
    finally:
        w.opt.state[p]["anchor"] = right


@provoked
def anchor_lost(w: World, rng) -> None:
    anchored = [i for i, held in enumerate(w.held) if "anchor" in held.state]
    if not anchored or w.foreign:
        return
    set_gradients(w, rng)
    p = w.params[rng.choice(anchored)]
    right = w.opt.state[p].pop("anchor")
    try:
        refused_step(w, "a lost anchor")
    finally:
        w.opt.state[p]["anchor"] = right


@provoked
def state_of_another_shape(w: World, rng) -> None:
    if w.foreign:
        return
    with_state = [i for i, held in enumerate(w.held) if held.state]
    if not with_state:
        return
    set_gradients(w, rng)
    i = rng.choice(with_state)
    p, held = w.params[i], w.held[i]
    group = w.groups[w.group_of(i)]
    used = (
        ["exp_avg", "exp_avg_sq"]
        if w.rule == "adam"
        else ["momentum_buffer"] * (group["momentum"] != 0)
    )
    keys = [
        k for k in held.state if k in (*used, *OF_BOUNDARIES) or k == "master" and w.has_master(i)
    ]
    if not keys:
        return
    key = rng.choice(keys)
    p.grad = values(rng, w.gen, p.shape, p.dtype)
    right = w.opt.state[p][key]
    w.opt.state[p][key] = rng.choice(
        [
            torch.ones(6, 2),
            torch.ones(4, 0),
            "x",
            3.0,
            torch.ones(p.shape, dtype=torch.int64),
            torch.ones(p.shape, device="meta"),
            torch.ones(1).expand(p.shape)
            if p.numel() > 1 and key not in OF_BOUNDARIES
            else torch.ones(6),
        ]
    )
    shown = w.opt.state[p][key]
    meta = "meta" if getattr(shown, "is_meta", False) else ""
    shown = f"{type(shown).__name__} {getattr(shown, 'dtype', '')} {meta}"
    w.note(f"state[p{i}][{key!r}] = {shown}")
    try:
        refused_step(
            w, f"a wrong {key}: {shown}" if "Tensor" in shown else f"a {key} that is a {shown}"
        )
    finally:
        w.opt.state[p][key] = right


@provoked
def negated_weights(w: World, rng) -> None:
    """p.data = a lazily negated view: what is in memory are not its values."""
    i = rng.randrange(len(w.params))
    p = w.params[i]
    if not p.numel():
        return
    set_gradients(w, rng)
    right, p.grad = p.data, None
    same_memory = rng.random() < 0.5
    p.data = torch._neg_view(right if same_memory else -right)
    if p.is_complex() and same_memory:
        p.data = right.conj()
    p.grad = values(rng, w.gen, p.shape, p.dtype)
    try:
        refused_step(w, "negated weights")
    finally:
        p.data = right


@provoked
def unscaled_replay(w: World, rng) -> None:
    if w.foreign or not any(h.replay is not None for h in w.held):
        return
    set_gradients(w, rng)
    w.opt.found_inf = torch.tensor(0.0)
    try:
        refused_step(w, "found_inf without grad_scale beside replay gradients")
    finally:
        del w.opt.found_inf


# -- running --------------------------------------------------------------------------------------


def names_of(without=()) -> tuple[list[str], list[float]]:
    names = [
        n
        for n, (_, _, needs) in ACTIONS.items()
        if n not in without and not set(needs) & set(without)
    ]
    return names, [ACTIONS[n][1] for n in names]


def run(seed: int, actions, *, without=(), notes=None, counts=None) -> None:
    """Runs a world's actions; raises a Difference where library and model disagree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = World(seed, without=without, notes=notes)
        w.check("construction")
        for number, (name, place) in enumerate(actions):
            if notes is not None:
                notes.append(f"-- {number} {name}:{place}")
            ACTIONS[name][0](w, random.Random(place))
            w.check(name)
            if counts is not None:
                counts[name] += 1
        if counts is not None:
            counts["errors provoked"] += w.counts["errors"]


def plan(seed: int, without=(), length=None):
    """Returns the actions of a world."""
    rng = random.Random(seed ^ 0x5EED)
    names, weights = names_of(without)
    length = length or rng.choice([10, 20, 40, 80])
    chosen = rng.choices(names, weights, k=length)
    return [(name, rng.getrandbits(24)) for name in chosen]


def kind_of(seed: int, actions, without=()) -> str | None:
    """Returns what goes wrong, or None."""
    try:
        run(seed, actions, without=without)
    except Exception as error:
        return kind_of_error(error)
    return None


def shrink(seed: int, actions, kind: str, without=(), limit_s=20.0):
    """Returns fewer actions that end in the same difference; ``limit_s`` of this process' time."""
    end = time.process_time() + limit_s
    size = max(1, len(actions) // 2)
    while size and time.process_time() < end:
        place, smaller = 0, False
        while place < len(actions) and time.process_time() < end:
            fewer = actions[:place] + actions[place + size :]
            if fewer != actions and kind_of(seed, fewer, without) == kind:
                actions, smaller = fewer, True
            else:
                place += size
        size = size if smaller and size > 1 else size // 2
    return actions


def reproduction(seed: int, actions, without=()) -> str:
    """Returns what happens, line by line, up to the difference."""
    notes: list[str] = []
    text = f'--repro "{seed} {" ".join(f"{name}:{place}" for name, place in actions)}"'
    if without:
        text += f" --without {','.join(without)}"
    try:
        run(seed, actions, without=without, notes=notes)
        notes.append("(no difference)")
    except Exception as error:
        notes += told_of(error)
    return "\n".join([text, *notes])


def in_child(function, *arguments):
    """Runs something that may crash in a process of its own; returns (its exit status, output)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(function(*arguments), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    return status, pickle.loads(data) if status == 0 and data else None


def stretch(look, name, seed: int, seconds: float, mark: str):
    """Looks at seeds from ``seed`` on until the time is up: (counts, differences, next seed)."""
    counts: collections.Counter[str] = collections.Counter()
    found: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pathlib.Path(mark).write_text(str(seed))
        try:
            look(seed, counts)
        except Exception as error:
            kind = kind_of_error(error)
            counts["differences"] += 1
            if kind not in found:
                found[kind] = seed
                print(f"difference: {kind} ({name(seed)})", flush=True)
        seed += 1
    return counts, found, seed


def hunt(look, name, seed: int, seconds: float):
    """Looks at one seed after the other.

    Args:
        look: ``look(seed, counts)`` counts what it does and raises what it finds.
        name: Returns what a seed is called.
        seed: The number of this hunt: each has seeds of its own.
        seconds: How long.

    Returns:
        The counts, the first seed of every kind of difference, and the seconds it took.
    """
    began = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    found: dict[str, int] = {}
    seed *= 10_000_000
    mark = f"/tmp/fuzz-{os.getpid()}"
    while (left := seconds - (time.monotonic() - began)) > 0:
        # In processes of their own, which a crash may take down.
        status, result = in_child(stretch, look, name, seed, min(left, 60.0), mark)
        if status:
            seed = int(pathlib.Path(mark).read_text())
            print(f"difference: the process dies with status {status} ({name(seed)})", flush=True)
            result = {"differences": 1}, {f"crash {status}": seed}, seed + 1
        counts.update(result[0])
        found = {**result[1], **found}
        seed = result[2]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(mark)
    return counts, found, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", default="", help="actions and wrong uses to leave out")
    parser.add_argument("--repro", help="a world and its actions, as printed")
    parser.add_argument("--most", type=int, default=12, help="differences to make small")
    arguments = parser.parse_args()
    without = tuple(x for x in arguments.without.split(",") if x)
    torch.set_num_threads(1)
    if arguments.repro:
        seed, *words = arguments.repro.split()
        actions = [(n, int(k)) for n, k in (word.split(":") for word in words)]
        text = reproduction(int(seed), actions, without)
        print(text)
        return int(not text.endswith("(no difference)"))

    def look(seed: int, counts) -> None:
        run(seed, plan(seed, without), without=without, counts=counts)
        counts["worlds"] += 1

    counts, found, took = hunt(look, "world {}".format, arguments.seed, arguments.seconds)
    extra = ("worlds", "differences", "errors provoked")
    actions = sum(n for name, n in counts.items() if name not in extra)
    for kind, where in list(found.items())[: arguments.most]:
        steps = plan(where, without)
        if kind.startswith("crash"):
            print(f'\n== {kind}\n--repro "{where} {" ".join(f"{n}:{k}" for n, k in steps)}"')
            continue
        steps = shrink(where, steps, kind, without)
        print(f"\n== {kind}\n{reproduction(where, steps, without)}", flush=True)
    loads = counts["load"] + counts["resume"] + counts["copied"]
    print(
        f"\n{actions} actions ({actions / took:.0f} a second) in {counts['worlds']} worlds, "
        f"{loads} loads and copies, {counts['errors provoked']} wrong uses, "
        f"{counts['differences']} differences of {len(found)} kinds"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
