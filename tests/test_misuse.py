# SPDX-License-Identifier: BSD-3-Clause
"""Misuse: every wrong use is told what is wrong and what to do, and changes nothing.

Three tables, a row per misuse: wrong constructor calls, wrong uses of a running optimizer (two
guided steps behind it, an anchor set), wrong uses of `Guidance`. Each row has the error's type and
a pattern that must name the culprit (option or parameter) and the remedy. After a running optimizer
has refused, weights, gradients, state with moments, step and anchor, options and draw index are
compared bit for bit, and, once the cause is removed, it must go on exactly like a twin that was
never misused. Every row runs with AdamW and with SGD, on every backend that is there.
"""

from __future__ import annotations

import copy
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import dgg
from cases import BACKENDS, F32, make_params, set_grads
from dgg import backends
from dgg.backends import libraries
from dgg.step import settings

# torch warns of what dgg refuses right after.
pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with dup")

CLASSES = {
    "adamw": (dgg.AdamW, {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "sgd": (dgg.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
}
OPTIONS = {"alpha": 0.9, "strength": 0.7, "max_grad_norm": 2.0, "replay_weight": 0.5, "seed": 3}

# -- construction ---------------------------------------------------------------------------------


def two(dtype=torch.float32):
    return make_params([(3,), (2, 2)], dtype)


def expanded():
    return [Parameter(torch.ones(1).expand(3))]


# Name, arguments, error, what the message must say.
WRONG_ARGUMENTS = [
    (
        "alpha in per cent",
        {"alpha": 20},
        ValueError,
        r"alpha=20 must lie in \[0, 1\].*20 % is 0\.2",
    ),
    ("alpha above 1", {"alpha": 1.5}, ValueError, r"alpha=1\.5.*\[0, 1\].*probability"),
    ("alpha below 0", {"alpha": -0.1}, ValueError, r"alpha=-0\.1.*\[0, 1\].*probability"),
    ("alpha nan", {"alpha": float("nan")}, ValueError, r"alpha=nan.*\[0, 1\]"),
    ("alpha text", {"alpha": "0.2"}, TypeError, r"alpha='0\.2' must be a number, not str"),
    ("alpha None", {"alpha": None}, TypeError, r"alpha=None must be a number"),
    ("alpha bool", {"alpha": True}, TypeError, r"alpha=True must be a number, not bool"),
    ("alpha of two", {"alpha": torch.ones(2) / 2}, TypeError, r"alpha=.* must be a number"),
    ("alpha tensor", {"alpha": torch.tensor(1.5)}, ValueError, r"alpha=1\.5.*\[0, 1\]"),
    ("strength", {"strength": -1.0}, ValueError, r"strength=-1\.0.*\[0, inf\).*off the anchor"),
    ("strength inf", {"strength": float("inf")}, ValueError, r"strength=inf.*\[0, inf\)"),
    ("strength text", {"strength": "x"}, TypeError, r"strength='x' must be a number"),
    ("scaling", {"scaling": "yes"}, TypeError, r"scaling='yes' must be True or False"),
    ("norm_scope", {"norm_scope": "layer"}, ValueError, r"norm_scope='layer'.*'global', 'tensor'"),
    ("granularity", {"granularity": "row"}, ValueError, r"granularity='row'.*'step'.*'element'"),
    ("max_grad_norm 0", {"max_grad_norm": 0.0}, ValueError, r"max_grad_norm=0.*pass None"),
    ("max_grad_norm < 0", {"max_grad_norm": -1}, ValueError, r"max_grad_norm=-1.*pass None"),
    ("max_grad_norm text", {"max_grad_norm": "1"}, TypeError, r"max_grad_norm='1'.*number"),
    ("replay_weight", {"replay_weight": -2}, ValueError, r"replay_weight=-2.*\[0, inf\)"),
    ("seed negative", {"seed": -1}, ValueError, r"seed=-1 must lie in \[0, 2\*\*64\)"),
    ("seed large", {"seed": 1 << 64}, ValueError, r"seed=18446744073709551616.*2\*\*64"),
    ("seed float", {"seed": 1.0}, TypeError, r"seed=1\.0 must be an int"),
    ("seed None", {"seed": None}, TypeError, r"seed=None must be an int"),
    ("anchor_dtype int", {"anchor_dtype": torch.int8}, TypeError, r"anchor_dtype.*int8.*bfloat16"),
    ("anchor_dtype text", {"anchor_dtype": "bf16"}, TypeError, r"anchor_dtype='bf16'.*bfloat16"),
    (
        "anchor_dtype float8",
        {"anchor_dtype": torch.float8_e5m2},
        TypeError,
        r"anchor_dtype=torch.float8_e5m2 must be one of.*None",
    ),
    ("anchor_device", {"anchor_device": "moon"}, ValueError, r"anchor_device='moon'.*use 'cpu'"),
    ("anchor_device meta", {"anchor_device": "meta"}, ValueError, r"anchor_device='meta'.*'cpu'"),
    ("anchor_device int", {"anchor_device": 3}, TypeError, r"anchor_device=3.*use 'cpu' or None"),
    ("backend unknown", {"backend": "C++"}, ValueError, r"unknown backend 'C\+\+'.*'cpp'.*None"),
    ("process_group", {"process_group": object()}, TypeError, r"process_group=.*, or None"),
]
# Of the optimizers, not of Guidance.
WRONG_OPTIMIZERS = [
    (
        "foreach on the reference",
        {"foreach": True, "backend": "reference"},
        ValueError,
        r"foreach=True.*backend='reference'.*drop either",
    ),
    (
        "fused on the reference",
        {"fused": True, "backend": "reference"},
        ValueError,
        r"fused=True.*backend='reference'.*drop either",
    ),
    ("fused and foreach", {"fused": True, "foreach": True}, RuntimeError, r"fused.*foreach"),
    ("differentiable", {"differentiable": True}, ValueError, r"differentiable=True.*torch\.optim"),
    ("misspelt", {"alhpa": 0.2}, TypeError, r"'alhpa'"),
    ("lr", {"lr": -1.0}, ValueError, r"learning rate: -1\.0"),
    ("lr of two", {"lr": torch.ones(2)}, ValueError, r"lr must be 1-element"),
    (
        "lr text",
        {"lr": "1e-3"},
        TypeError,
        r"lr='1e-3' must be a number, not str; pass float.*YAML",
    ),
    ("lr None", {"lr": None}, TypeError, r"lr=None must be a number, not NoneType"),
    (
        "lr of a list",
        {"lr": [0.1, 0.2]},
        TypeError,
        r"lr=\[0\.1, 0\.2\] must be a number, not list",
    ),
    ("no parameters", {"params": []}, ValueError, r"empty parameter list"),
    (
        "a generator that was used",
        {"params": lambda: used(iter(two()))},
        ValueError,
        r"params is an empty parameter list\. A generator.*once: call it again",
    ),
    (
        "a model",
        {"params": lambda: torch.nn.Linear(2, 2)},
        TypeError,
        r"params has a model \(Linear\).*pass model\.parameters\(\)",
    ),
    (
        "a model of modules",
        {"params": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2))},
        TypeError,
        r"params has a model \(Sequential\).*pass model\.parameters\(\)",
    ),
    (
        "a model in a list",
        {"params": [torch.nn.Linear(2, 2)]},
        TypeError,
        r"params has a model \(Linear\).*pass model\.parameters\(\)",
    ),
    (
        "a group",
        {"params": lambda: {"params": two(), "lr": 0.1}},
        TypeError,
        r"params is a dict with the keys \['params', 'lr'\].*list of groups, \[\{'params'",
    ),
    (
        "a state dict",
        {"params": torch.nn.Linear(2, 2).state_dict()},
        TypeError,
        r"params is a dict with the keys \['weight', 'bias'\].*pass model\.parameters\(\).*copies",
    ),
    ("a tensor", {"params": torch.ones(3)}, TypeError, r"params.*iterable"),
    ("not tensors", {"params": [1.0]}, TypeError, r"can only optimize Tensors"),
    ("no leaf", {"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, r"non-leaf"),
    ("expanded", {"params": expanded}, ValueError, r"parameter 0 of group 0 overlaps.*clone it"),
    (
        "float8",
        {"params": [Parameter(torch.ones(3).to(torch.float8_e4m3fn))]},
        TypeError,
        r"parameter 0 of group 0 is torch.float8_e4m3fn.*freeze it or convert it",
    ),
    (
        "named float8",
        {"params": [("head.bias", Parameter(torch.ones(3).to(torch.float8_e4m3fn)))]},
        TypeError,
        r"parameter 'head\.bias' of group 0 is torch.float8_e4m3fn.*freeze it",
    ),
    (
        "sparse",
        {"params": [Parameter(torch.eye(3).to_sparse())]},
        TypeError,
        r"parameter 0 of group 0 is .*sparse_coo.*dense",
    ),
    (
        "twice in a group",
        {"params": lambda: [(p := two()[0]), p]},
        ValueError,
        r"parameter 1 of group 0 is in the group twice.*pass every parameter once",
    ),
    (
        "twice in two groups",
        {"params": lambda: [{"params": [(p := two()[0])]}, {"params": [p]}]},
        ValueError,
        r"more than one parameter group",
    ),
    (
        "seed per group",
        {"params": lambda: [{"params": p, "seed": i} for i, p in enumerate(two())]},
        ValueError,
        r"seed is one setting for the whole optimizer.*Per group: alpha, strength",
    ),
    *(
        (
            f"{option} per group",
            {"params": lambda n=option, v=value: [{"params": two(torch.bfloat16), n: v}]},
            ValueError,
            rf"{option} is one setting for the whole optimizer \((None|False)\), given to the",
        )
        for option, value in [
            ("state_dtype", torch.float32),
            ("anchor_dtype", torch.float32),
            ("importance_dtype", torch.float32),
            ("anchor_device", "cpu"),
            ("backend", "reference"),
            ("master_weights", True),
            ("stochastic_rounding", True),
            ("process_group", "a group"),
        ]
    ),  # fmt: skip
    (
        "max_grad_norm per group",
        {"params": lambda: [{"params": p, "max_grad_norm": 1.0 + i} for i, p in enumerate(two())]},
        ValueError,
        r"max_grad_norm is one setting.*Per group: alpha",
    ),
    (
        "alpha of one group",
        {"params": lambda: [{"params": p, "alpha": 7.0 * i} for i, p in enumerate(two())]},
        ValueError,
        r"alpha=7\.0.*\[0, 1\]",
    ),
]


def used(iterator):
    list(iterator)
    return iterator


def construct(cls, arguments):
    arguments = dict(arguments)
    params = arguments.pop("params", two)
    return cls(params() if callable(params) else params, **arguments)


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [pytest.param(*row[1:], id=row[0]) for row in WRONG_ARGUMENTS + WRONG_OPTIMIZERS],
)
def test_wrong_construction(cls, arguments, error, says):
    if "fused" in arguments and backends.unavailable("cpp", torch.device("cpu")):
        pytest.skip("without the extension fused=True is refused for that reason")
    with pytest.raises(error, match=f"(?s){says}"):
        construct(cls, arguments)


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_parameters_may_be_any_iterable(cls):
    params = two()
    for given in (params, tuple(params), iter(params), torch.nn.ParameterList(params)):
        assert cls(given).param_groups[0]["params"] == params
    named = dict(zip("ab", params, strict=True))
    assert cls(named.items()).param_groups[0]["param_names"] == ["a", "b"]


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam])
@pytest.mark.parametrize(
    ("betas", "says"),
    [
        (0.9, r"betas=0\.9 must be a pair, \(0\.9, 0\.999\)"),
        ("0.9", r"betas='0\.9' must be a pair"),
        (None, r"betas=None must be a pair"),
        ((0.9,), r"betas=\(0\.9,\) must be a pair"),
        ((0.9, 0.99, 0.999), r"betas=\(0\.9, 0\.99, 0\.999\) must be a pair"),
        ((0.9, "0.999"), r"betas\[1\]='0\.999' must be a number, not str"),
    ],
)
def test_betas_that_are_no_pair_of_numbers(cls, betas, says):
    with pytest.raises(TypeError, match=says):
        cls(two(), betas=betas)


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam])
def test_betas_swapped(cls, recwarn):
    with pytest.warns(UserWarning, match=r"swapped: betas=\(0\.9, 0\.999\)") as caught:
        cls(two(), betas=(0.999, 0.9))
    assert [w.filename for w in caught] == [__file__]
    for betas in ((0.9, 0.999), (0.95, 0.95), (0.0, 0.0), (torch.tensor(0.9), torch.tensor(0.99))):
        cls(two(), betas=betas)
    with pytest.raises(ValueError, match="beta"):
        cls(two(), betas=(1.5, 0.9))
    assert not recwarn.list


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD, dgg.Guidance])
def test_options_are_no_attributes(cls):
    """An attribute that nobody reads would be set without an error."""
    opt = torch.optim.SGD(two(), lr=0.1) if cls is dgg.Guidance else cls(two(), alpha=0.3)
    guided = cls(opt, alpha=0.3) if cls is dgg.Guidance else opt
    before = copy.deepcopy(guided.state_dict())
    for name in ("alpha", "strength", "max_grad_norm", "granularity", "importance"):
        assert not hasattr(guided, name)
        says = (
            rf"attribute '{name}' of {cls.__name__} would change no step.*group\['{name}'\] = 0\.1"
        )
        with pytest.raises(AttributeError, match=says):
            setattr(guided, name, 0.1)
    with pytest.raises(AttributeError, match=r"no attribute 'alpha'; read opt\.param_groups\[0\]"):
        guided.alpha  # noqa: B018
    for name in settings.CONSTRUCTED:
        assert not hasattr(guided, name)
        with pytest.raises(
            AttributeError, match=f"{name}.*would change no.*construct it with {name} = None"
        ):
            setattr(guided, name, None)
    with pytest.raises(AttributeError, match=r"'seed'.*group\['seed'\] = 5"):
        guided.seed = 5  # one per task, as the documentation recommends
    assert guided.state_dict() == before

    class Own(cls):
        """A subclass may have a seed and a backend of its own."""

    guided = Own(torch.optim.SGD(two(), lr=0.1) if cls is dgg.Guidance else two())
    assert not hasattr(guided, "seed")
    guided.seed, guided.backend = 5, "mine"
    assert (guided.seed, guided.backend) == (5, "mine")
    assert guided.param_groups[0]["seed"] == 0
    copy.deepcopy(opt).lr = 0.1  # torch.optim's own options are as they are there


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_an_anchor_at_every_step(foreign, steps):
    params = two()
    opt = torch.optim.SGD(params, lr=0.1) if foreign else dgg.SGD(params, lr=0.1)
    guided = dgg.Guidance(opt) if foreign else opt
    generator = torch.Generator().manual_seed(1)

    def loop(count):
        for _ in range(count):
            for _ in range(steps):
                set_grads(params, generator)
                opt.step()
            guided.set_anchor()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(9)
    with pytest.warns(
        UserWarning, match=r"set_anchor\(\) was called 10 times.*once per task"
    ) as found:
        loop(20)
    assert len(found) == 1


def test_anchors_that_may_be_set_often():
    params = two()
    opt = dgg.SGD([("a", params[0]), ("b", params[1])], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(25):
            for _ in range(2):
                set_grads(params, generator)
                opt.step()
            opt.set_anchor()  # tasks of two steps
            opt.set_anchor({"a": torch.zeros(3), "b": torch.zeros(2, 2)})  # a moving target, say
            assert opt.param_groups[0]["task_index"] == 2 * number + 2


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: dgg.ReplayBuffer(0), ValueError, r"per_task must be positive, got 0.*make no"),
        (lambda: dgg.ReplayBuffer(-3), ValueError, r"per_task must be positive, got -3"),
        (
            lambda: dgg.metrics.AccuracyMatrix([[0.9, None], [0.8, 0.9]]),
            TypeError,
            r"tasks must be the names.*AccuracyMatrix\.from_rows\(rows\)",
        ),
        (
            lambda: dgg.metrics.AccuracyMatrix(torch.eye(2)),
            TypeError,
            r"tasks must be the names.*AccuracyMatrix\.from_rows\(rows\)",
        ),
        (
            lambda: dgg.metrics.forgetting([0.9, 0.8]),
            TypeError,
            r"row 0 of the matrix must be a list of accuracies, got 0\.9",
        ),
    ],
)
def test_wrong_use_of_memory_and_metrics(wrong, error, says):
    with pytest.raises(error, match=says):
        wrong()


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD])
def test_a_backend_that_cannot_run_here(cls, monkeypatch):
    from dgg import kernels

    monkeypatch.setattr(kernels, "unavailable", lambda device: f"no Triton for {device}")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: no Triton for cpu"):
        cls(two(), backend="triton")
    inner = torch.optim.SGD(two(), lr=0.1)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: no Triton for cpu"):
        dgg.Guidance(inner, backend="triton")


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam])
def test_capturable_is_refused(cls):
    with pytest.raises(ValueError, match=r"capturable=True.*leave it False"):
        cls(two(), capturable=True)


@pytest.mark.parametrize("arguments", [{"backend": "cpp"}, {"fused": True}, {"foreach": True}])
def test_fused_without_the_extension(arguments, monkeypatch):
    monkeypatch.setattr(libraries, "cpp_error", "no compiler; install one and reinstall dgg")
    with pytest.raises(RuntimeError, match=f"{next(iter(arguments))}=.*install one and reinstall"):
        dgg.AdamW(two(), **arguments)
    dgg.AdamW(two())  # left open, it falls back


@pytest.mark.parametrize("arguments", [{"fused": False}, {"foreach": False}])
def test_unfused_contradicts_a_fused_backend(arguments):
    if backends.unavailable("cpp", torch.device("cpu")):
        pytest.skip("backend='cpp' is refused for another reason: the extension is missing")
    with pytest.raises(ValueError, match=r"fused=.*foreach=.*backend='cpp'.*drop either"):
        dgg.SGD(two(), backend="cpp", **arguments)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    ("arguments", "error", "says"), [pytest.param(*row[1:], id=row[0]) for row in WRONG_ARGUMENTS]
)
def test_wrong_guidance_leaves_the_optimizer_alone(cls, arguments, error, says):
    params = two()
    opt = cls(params, lr=0.1)
    with pytest.raises(error, match=f"(?s){says}"):
        dgg.Guidance(opt, **arguments)
    assert not opt._optimizer_step_pre_hooks
    before = opt.state_dict()["param_groups"]
    dgg.Guidance(opt, alpha=0.5)  # neither half guided nor taken for guided already
    assert opt.state_dict()["param_groups"] == before


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, r"takes a torch.optim.Optimizer, not Linear"),
        (lambda: None, TypeError, r"torch.optim.Optimizer, not NoneType.*optimizer inside"),
        (lambda: dgg.AdamW(two()), ValueError, r"AdamW is guided already; set its own options"),
        (lambda: dgg.Guidance(torch.optim.SGD(two())).optimizer, ValueError, r"guided already"),
    ],
    ids=["a model", "None", "a dgg optimizer", "twice"],
)
def test_guidance_of_what_cannot_be_guided(wrong, error, says):
    given = wrong()
    hooks = len(getattr(given, "_optimizer_step_pre_hooks", ()))
    with pytest.raises(error, match=says):
        dgg.Guidance(given)
    assert len(getattr(given, "_optimizer_step_pre_hooks", ())) == hooks


@pytest.mark.parametrize("wrong", [None, 3, torch.nn.Linear(1, 1), torch.optim.SGD(two())])
def test_unwrap_of_something_else(wrong):
    with pytest.raises(TypeError, match=r"no dgg optimizer inside.*dgg\.AdamW, dgg\.Adam or"):
        dgg.unwrap(wrong)


# -- a running optimizer --------------------------------------------------------------------------


class Running:
    """An optimizer in the middle of its second task, over two groups of named parameters."""

    names = ("a", "b", "c")

    def __init__(self, kind, backend, **options):
        cls, hyper = CLASSES[kind]
        self.params = make_params([(6, 4), (5,), (3,)], torch.float32, seed=1)
        named = list(zip(self.names, self.params, strict=True))
        groups = [{"params": named[:2]}, {"params": named[2:], "alpha": 0.8}]
        self.opt = cls(groups, backend=backend, **{**hyper, **OPTIONS, **options})
        self.generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            self.grads()
            self.opt.step()
            self.opt.set_anchor()
        self.grads()
        self.opt.step()
        self.grads()

    def grads(self):
        set_grads(self.params, self.generator)

    def tensors(self):
        return {n: p.detach() + 0.5 for n, p in zip(self.names, self.params, strict=True)}

    def snapshot(self):
        """Everything a refused call must leave as it was, copied."""

        def keep(x):
            if x.layout == torch.strided and x.device.type != "meta":
                return x.detach().clone()
            return x.shape, x.dtype

        return {
            "params": [(id(p), keep(p), p.requires_grad) for p in self.params],
            "grads": [(id(p.grad), None if p.grad is None else keep(p.grad)) for p in self.params],
            "state": [
                {k: keep(v) for k, v in self.opt.state.get(p, {}).items()} for p in self.params
            ],
            "states": len(self.opt.state),
            "groups": [
                {k: copy.deepcopy(v) for k, v in g.items() if k != "params"}
                | {"params": [id(p) for p in g["params"]]}
                for g in self.opt.param_groups
            ],
        }


def assert_same(x, y, where="optimizer"):
    if isinstance(x, torch.Tensor):
        assert x.dtype == y.dtype and x.shape == y.shape, where
        assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)), where
    elif isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for key in x:
            assert_same(x[key], y[key], f"{where}.{key}")
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y), where
        for place, (one, other) in enumerate(zip(x, y, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    else:
        assert x == y, where


MISUSES = []


def misuse(error, says, *, repair=None):
    """Registers an arrangement; it returns the call that must raise ``error`` and say ``says``.

    ``repair`` takes back what the arrangement itself has changed (gradients are set anew anyway);
    without it the optimizer is not asked to go on.
    """

    def register(arrange):
        MISUSES.append(
            pytest.param(arrange, error, says, repair, id=arrange.__name__.replace("_", " "))
        )
        return arrange

    return register


def nothing(v):
    pass


def drop(container, key):
    del container[key]


def options_of(**changes):
    # Group 0 gets wrong options; afterwards they are put right.
    def change(v):
        v.right = {name: v.opt.param_groups[0][name] for name in changes}
        v.opt.param_groups[0].update(changes)
        return v.opt.step

    return change


def right_options(v):
    v.opt.param_groups[0].update(v.right)


def change_option(name, error, says, **changes):
    arrange = options_of(**changes)
    arrange.__name__ = name
    misuse(error, says, repair=right_options)(arrange)


change_option("alpha_scheduled_above_1", ValueError, r"alpha=1\.2.*\[0, 1\].*probab", alpha=1.2)
change_option("alpha_scheduled_to_text", TypeError, r"alpha='0\.5' must be a number", alpha="0.5")
change_option("strength_scheduled_below_0", ValueError, r"strength=-0\.5.*\[0, inf", strength=-0.5)
change_option("seed_in_one_group", ValueError, r"seed.*group 1.*set it in all groups", seed=4)
change_option("norm_scope_mid_run", ValueError, r"norm_scope.*set it in all", norm_scope="tensor")
change_option("granularity_unknown", ValueError, r"granularity='row'.*'step'", granularity="row")
change_option("granularity_mid_run", ValueError, r"granularity.*in all", granularity="tensor")
change_option("max_grad_norm_mid_run", ValueError, r"max_grad_norm.*in all", max_grad_norm=9.0)
change_option("replay_weight_mid_run", ValueError, r"replay_weight.*in all", replay_weight=9.0)
change_option("lr_of_two_elements", ValueError, r"lr is a tensor of 2.*one", lr=torch.ones(2))
change_option(
    "weight_decay_of_two", ValueError, r"weight_decay is a tensor of 2", weight_decay=torch.ones(2)
)


@misuse(ValueError, r"max_grad_norm=0.*pass None for no clipping")
def max_grad_norm_zero_in_all_groups(v):
    for group in v.opt.param_groups:
        group["max_grad_norm"] = 0.0
    return v.opt.step


@misuse(ValueError, r"alpha=3\.0.*\[0, 1\].*probability", repair=right_options)
def alpha_tensor_scheduled_in_place(v):
    v.right = {"alpha": v.opt.param_groups[0]["alpha"]}
    alpha = v.opt.param_groups[0]["alpha"] = torch.tensor(0.85)  # equal to no value before
    v.opt.step()
    v.grads()
    v.extra_steps = 1
    alpha.fill_(3.0)
    return v.opt.step


@misuse(TypeError, r"gradient of parameter 'b' is a TwoTensor.*make it a plain", repair=nothing)
def gradient_without_memory(v):
    v.params[1].grad = TwoTensor(torch.ones(5), torch.ones(5))
    return v.opt.step


@misuse(TypeError, r"gradient of parameter 'a' is torch.sparse_coo.*sparse=False", repair=nothing)
def sparse_gradient(v):
    v.params[0].grad = v.params[0].grad.to_sparse()
    return v.opt.step


@misuse(
    TypeError,
    r"replay gradient of parameter 'a' is torch.sparse_coo.*False",
    repair=lambda v: v.opt.clear_replay(),
)
def sparse_replay_gradient(v):
    with v.opt.replay():
        v.params[0].grad = torch.eye(6, 4).to_sparse()
    return v.opt.step


@misuse(ValueError, r"gradient of parameter 'a' has shape \(3,\).*compute it anew", repair=nothing)
def gradient_of_another_shape(v):
    v.params[0].grad.data = torch.ones(3)
    return v.opt.step


@misuse(ZeroDivisionError, "", repair=nothing)
def closure_that_raises(v):
    return lambda: v.opt.step(lambda: 1 / 0)


@misuse(RuntimeError, r"replay\(\) blocks do not nest; leave the outer one", repair=nothing)
def nested_replay(v):
    def act():
        with v.opt.replay(), v.opt.replay():
            pass

    return act


@misuse(RuntimeError, r"step\(\) inside a replay\(\) block.*leave the block", repair=nothing)
def step_inside_replay(v):
    def act():
        with v.opt.replay():
            for p in v.params:
                p.grad = torch.ones_like(p)
            v.opt.step()

    return act


@misuse(RuntimeError, r"unscale_\(\).*replay.*set max_grad_norm on the optimizer")
def unscale_beside_replay(v):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    with v.opt.replay():
        for p in v.params:
            p.grad = torch.ones_like(p)
    scaler.unscale_(v.opt)
    return lambda: scaler.step(v.opt)


@misuse(ValueError, r"parameter 'b' has shape \(7,\), its .* \(5,\).*drop its state.*new opt")
def parameter_grown(v):
    v.params[1].data = torch.zeros(7)
    v.params[1].grad = torch.ones(7)
    return v.opt.step


@misuse(ValueError, r"parameter 'a' has shape \(2, 4\), its .* \(6, 4\).*drop its state")
def parameter_shrunk_in_its_own_memory(v):
    v.params[0].data = v.params[0].data[:2]
    v.params[0].grad = torch.ones(2, 4)
    return v.opt.step


@misuse(
    ValueError,
    r"anchor in the state of parameter 'b' is the parameter's own memory.*call set_anchor\(\)",
    repair=lambda v: v.opt.state[v.params[1]].update(anchor=v.right),
)
def anchor_that_is_the_parameter(v):
    v.right = v.opt.state[v.params[1]]["anchor"]
    v.opt.state[v.params[1]]["anchor"] = v.params[1].data
    return v.opt.step


@misuse(ValueError, r"parameter 'b' overlaps itself in memory.*clone it first")
def parameter_expanded(v):
    v.params[1].data = torch.ones(1).expand(5)
    return v.opt.step


@misuse(ValueError, r"parameter 'b' overlaps itself in memory.*clone it first")
def anchor_of_an_expanded_parameter(v):
    v.params[1].data = torch.ones(1).expand(5)
    return v.opt.set_anchor


@misuse(ValueError, r"anchor of parameter 'c' would not be finite.*take the anchor from finite")
def anchor_of_weights_with_nan(v):
    v.params[2].data[1] = float("nan")
    return v.opt.set_anchor


@misuse(ValueError, r"anchor of parameter 'c' would not be finite.*finite weights")
def anchor_of_weights_with_inf(v):
    v.params[2].data[1] = -float("inf")
    return v.opt.set_anchor


@misuse(RuntimeError, r"group 0 was anchored \(2.*1 anchors.*set_anchor.*clear_anchor\(\)")
def anchor_lost_on_the_way(v):
    del v.opt.state[v.params[0]]["anchor"]
    return v.opt.step


@misuse(RuntimeError, r"group 1 was anchored \(1.*0 anchors.*set_anchor\(tensors\).*clear_anchor")
def whole_state_lost_without_gradient(v):
    del v.opt.state[v.params[2]]
    v.params[2].grad = None
    return v.opt.step


# set_anchor(...)


def named_anchor(name, error, says, change, **options):
    def arrange(v):
        tensors = v.tensors()
        given = change(tensors)
        given = tensors if given is None else given
        return lambda: v.opt.set_anchor(given, **options)

    arrange.__name__ = f"anchor_{name}"
    misuse(error, says, repair=nothing)(arrange)


def change_b(value):
    return lambda tensors: tensors.update(b=value)


named_anchor(
    "of_another_shape", ValueError, r"parameter 'b' has shape \(4,\).*\(5,\).*same architecture",
    change_b(torch.ones(4)),
)  # fmt: skip
named_anchor("of_integers", TypeError, r"'b' is torch.int64.*float32", change_b(torch.arange(5)))
named_anchor(
    "of_complex", TypeError, r"'b' is torch.complex64.*float32",
    change_b(torch.ones(5, dtype=torch.complex64)),
)  # fmt: skip
named_anchor("sparse", TypeError, r"'b' .*sparse.*dense", change_b(torch.ones(5).to_sparse()))
named_anchor("of_lists", TypeError, r"'b' is a list, not a tensor; pass", change_b([1.0] * 5))
named_anchor(
    "of_nan", ValueError, r"'b' would not be finite", change_b(torch.full((5,), torch.nan))
)
named_anchor(
    "overflowing", ValueError, r"'b' would not be finite: torch.float64.*overflow.*anchor_dtype",
    change_b(torch.full((5,), 1e300, dtype=torch.float64)),
)  # fmt: skip
named_anchor(
    "on_meta", ValueError, r"'b' would be taken from the meta device.*materialise",
    change_b(torch.empty(5, device="meta")),
)  # fmt: skip
named_anchor(
    "incomplete", KeyError, r"no tensor for 1 of 3 .*parameter 'b'.*same model.*freeze",
    lambda tensors: drop(tensors, "b"),
)  # fmt: skip
named_anchor(
    "in_a_whole_checkpoint", KeyError, r"no tensor for 3 of 3.*start with: model\. Pass the state",
    lambda tensors: {"model": tensors},
)  # fmt: skip
named_anchor(
    "by_number", KeyError, r"no tensor for 3 of 3.*start with: 0, 1, 2\. Pass",
    lambda tensors: dict(enumerate(tensors.values())),
)  # fmt: skip
named_anchor(
    "of_an_optimizer", KeyError, r"optimizer's state dict.*load_state_dict\(\).*model\.state_dict",
    lambda tensors: {"state": {}, "param_groups": []},
)  # fmt: skip
named_anchor(
    "as_a_list", TypeError, r"mapping from names to tensors or the path.*not list; pass",
    lambda tensors: list(tensors.values()),
)  # fmt: skip
named_anchor(
    "at_no_path", FileNotFoundError, r"no anchor at 'task0/adapter'.*save_pretrained",
    lambda tensors: "task0/adapter",
)  # fmt: skip
named_anchor(
    "of_another_model", KeyError, r"no tensor for 3 of 3.*state dict of the same model", nothing,
    model=torch.nn.Linear(2, 2),
)  # fmt: skip
named_anchor("model_no_module", TypeError, r"model= must be a torch.nn.Module", nothing, model="m")


@misuse(ValueError, r"model= maps the names.*give both or neither", repair=nothing)
def anchor_from_a_model_without_tensors(v):
    return lambda: v.opt.set_anchor(model=torch.nn.Linear(2, 2))


# add_param_group(...)


def added(name, error, says, group):
    def arrange(v):
        return lambda: v.opt.add_param_group(group(v) if callable(group) else group)

    arrange.__name__ = f"added_{name}"
    misuse(error, says, repair=nothing)(arrange)


def new(**options):
    return lambda v: {"params": [("d", Parameter(torch.ones(2)))], **options}


added("group_with_alpha_above_1", ValueError, r"alpha=2.*\[0, 1\]", new(alpha=2))
added("group_with_its_own_seed", ValueError, r"seed is one setting.*Per group: alpha", new(seed=9))
added("group_with_draw_index", ValueError, r"draw_index is one setting", new(draw_index=0))
added("group_that_is_none", TypeError, r"must be a dict", [Parameter(torch.ones(2))])
added("parameter_known_already", ValueError, r"more than one parameter group",
      lambda v: {"params": [("a", v.params[0])]})  # fmt: skip
added("parameter_twice", ValueError, r"parameter 'd' of group 2 is in the group twice.*once",
      lambda v: {"params": [("d", (p := Parameter(torch.ones(2)))), ("d", p)]})  # fmt: skip
added("float8_parameter", TypeError, r"parameter 'd' of group 2 is torch.float8_e5m2.*freeze it",
      lambda v: {"params": [("d", Parameter(torch.ones(2).to(torch.float8_e5m2)))]})  # fmt: skip


# load_state_dict(...)


def loaded(name, error, says, change):
    def arrange(v):
        saved = copy.deepcopy(v.opt.state_dict())
        changed = change(saved)
        given = saved if changed is None else changed
        return lambda: v.opt.load_state_dict(given)

    arrange.__name__ = f"loaded_{name}"
    misuse(error, says, repair=nothing)(arrange)


def without_anchors(saved):
    for entry in saved["state"].values():
        del entry["anchor"]
    for group in saved["param_groups"]:
        group["anchored"] = 0


def change_entry(key, name, change):
    def arrange(saved):
        saved["state"][key][name] = change(saved["state"][key][name])

    return arrange


def first_moment(change):
    def arrange(saved):
        entry = saved["state"][0]
        name = "exp_avg" if "exp_avg" in entry else "momentum_buffer"
        entry[name] = change(entry[name])

    return arrange


loaded("list", TypeError, r"what an optimizer's state_dict\(\) returned, not list", lambda s: [])
loaded("number", TypeError, r"returned, not int; torch.load the file first", lambda s: 3)
loaded("model_weights", KeyError, r"no optimizer's state dict: it has \['w'\].*optimizer.*set_anch",
       lambda s: {"w": torch.ones(2)})  # fmt: skip
loaded("whole_checkpoint", KeyError, r"it has \['optimizer', 'epoch'\].*the optimizer's entry",
       lambda s: {"optimizer": s, "epoch": 3})  # fmt: skip
loaded("fewer_groups", ValueError, r"groups hold \[2\] parameters.*\[2, 1\].*same groups first",
       lambda s: drop(s["param_groups"], 1))  # fmt: skip
loaded("fewer_parameters", ValueError, r"groups hold \[1, 1\] parameters.*\[2, 1\].*same groups",
       lambda s: drop(s["param_groups"][0]["params"], 1))  # fmt: skip
loaded("without_anchors", ValueError, r"carries none.*Load first.*set_anchor\(\).*clear_anchor",
       without_anchors)  # fmt: skip
loaded("with_anchors_lost", RuntimeError, r"group 0 was anchored \(2.*carries 1 anchors.*save and",
       lambda s: drop(s["state"][1], "anchor"))  # fmt: skip
loaded("with_an_entry_lost", RuntimeError, r"group 1 was anchored \(1.*carries 0 anchors: they we",
       lambda s: drop(s["state"], 2))  # fmt: skip
loaded("anchor_of_another_shape", ValueError, r"parameter 1 of group 0 has shape \(4,\).*\(5,\)",
       change_entry(1, "anchor", lambda x: x[:4]))  # fmt: skip
loaded("anchor_of_integers", TypeError, r"parameter 1 of group 0 is torch.int32.*float32",
       change_entry(1, "anchor", lambda x: x.int()))  # fmt: skip
loaded("anchor_of_nan", ValueError, r"anchor of parameter 0 of group 1 would not be finite",
       change_entry(2, "anchor", lambda x: x * torch.nan))  # fmt: skip
loaded("anchor_that_is_none", TypeError, r"parameter 1 of group 0 is a str, not a tensor",
       change_entry(1, "anchor", str))  # fmt: skip
loaded("moment_of_another_shape", ValueError, r"parameter 0 of group 0 has shape \(3, 4\).*\(6, 4",
       first_moment(lambda x: x[:3]))  # fmt: skip
loaded("alpha_above_1", ValueError, r"alpha=4\.0.*\[0, 1\]",
       lambda s: s["param_groups"][1].update(alpha=4.0))  # fmt: skip
loaded("seeds_that_differ", ValueError, r"seed.*group 1.*in all groups",
       lambda s: s["param_groups"][1].update(seed=4))  # fmt: skip
loaded("draw_index_below_0", ValueError, r"draw_index=-1 must lie in",
       lambda s: [g.update(draw_index=-1) for g in s["param_groups"]] and None)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("arrange", "error", "says", "repair"), MISUSES)
def test_misuse_changes_nothing(arrange, error, says, repair, kind, backend):
    v = Running(kind, backend)
    v.extra_steps = 0
    act = arrange(v)
    before = v.snapshot()
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert re.search(f"(?s){says}", message), message
    assert_same(before, v.snapshot())
    if repair is None:
        return
    repair(v)
    v.opt.zero_grad()
    twin = Running(kind, backend)
    for _ in range(v.extra_steps):
        twin.opt.step()
        twin.grads()
    for _ in range(3):
        for each in (v, twin):
            each.grads()
            each.opt.step()
    after, expected = v.snapshot(), twin.snapshot()
    for one, other in zip(after["params"], expected["params"], strict=True):
        assert_same(one[1], other[1])
    assert_same(after["state"], expected["state"])
    assert after["groups"][0]["draw_index"] == expected["groups"][0]["draw_index"]


def test_the_tables_are_large_enough():
    assert len({row.id for row in MISUSES}) == len(MISUSES)
    distinct = len(MISUSES) + len(WRONG_ARGUMENTS) + len(WRONG_OPTIMIZERS)
    assert distinct >= 40, distinct


# -- what needs an optimizer of its own -----------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CLASSES)
def test_first_step_that_fails_makes_no_state(kind, backend):
    """SGD's first step is another one than the later ones: a failed one must not count."""
    cls, hyper = CLASSES[kind]
    runs = []
    for fails in (True, False):
        params = make_params([(6, 4), (5,)], torch.float32, seed=1)
        opt = cls(params, backend=backend, **{**hyper, **OPTIONS})
        opt.set_anchor() if kind == "sgd" else None
        set_grads(params, torch.Generator().manual_seed(0))
        if fails:
            states = {k: dict(v) for k, v in opt.state.items()}
            right, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], torch.ones(2)
            with pytest.raises(ValueError, match="lr is a tensor of 2 elements"):
                opt.step()
            assert {k: dict(v) for k, v in opt.state.items()}.keys() == states.keys()
            assert all(opt.state[k].keys() == v.keys() for k, v in states.items())
            opt.param_groups[0]["lr"] = right
        opt.step()
        opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


def test_names_that_nobody_knows():
    params = two()
    opt = dgg.AdamW(params)
    with pytest.raises(ValueError, match=r"which name belongs to which.*model=.*named_parameters"):
        opt.set_anchor({"a": torch.ones(3)})
    assert not opt.state


def test_nothing_trainable():
    params = two()
    opt = dgg.AdamW(params)
    for p in params:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter.*requires_grad_\(True\)"):
        opt.set_anchor()
    assert not opt.state
    assert opt.param_groups[0]["task_index"] == 0


@pytest.mark.parametrize("anchor_dtype", [torch.float16, None])
def test_weights_that_overflow_the_anchor_dtype(anchor_dtype):
    p = Parameter(torch.tensor([1.0, 1e5]))
    opt = dgg.SGD([p], anchor_dtype=anchor_dtype)
    if anchor_dtype is None:
        opt.set_anchor()
        return
    with pytest.raises(ValueError, match=r"overflow torch\.float16; pass a wider anchor_dtype"):
        opt.set_anchor()
    assert "anchor" not in opt.state.get(p, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_complex_dtype_for_the_anchor(dtype):
    p = Parameter(torch.ones(2, dtype=torch.complex64))
    opt = dgg.SGD([p], anchor_dtype=dtype)
    with pytest.raises(TypeError, match=r"parameter 0.*complex.*anchor_dtype=None, torch.float32"):
        opt.set_anchor()
    assert not opt.state


def test_integer_parameters():
    """Frozen ones are nobody's business, one with a gradient is refused by name."""
    weight, table = two()[0], Parameter(torch.arange(3), requires_grad=False)
    opt = dgg.SGD([("weight", weight), ("table", table)], lr=0.5, alpha=1.0)
    opt.set_anchor()
    weight.grad = torch.ones(3)
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight, before - 0.5)
    assert torch.equal(table, torch.arange(3))
    table.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"parameter 'table' is torch.int64.*freeze it or convert"):
        opt.step()
    assert torch.equal(weight, before - 0.5)


def test_meta_parameters():
    """Constructing over them is usual (deferred initialisation), stepping is not possible."""
    p = Parameter(torch.empty(3, device="meta"))
    opt = dgg.AdamW([("w", p)])
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"parameter 'w' is on the meta device.*materialise"):
        opt.step()
    with pytest.raises(ValueError, match=r"parameter 'w' is on the meta device.*materialise"):
        opt.set_anchor()
    assert not opt.state
    assert opt.param_groups[0]["draw_index"] == 0
    other = torch.optim.SGD([("w", p)], lr=0.1)
    guidance = dgg.Guidance(other)
    for wrong in (guidance.set_anchor, other.step):
        with pytest.raises(ValueError, match=r"parameter 'w' is on the meta device.*materialise"):
            wrong()


@pytest.mark.parametrize("broken", ["text", "missing symbol"])
def test_a_library_that_does_not_load(broken, tmp_path):
    """As after an upgrade of torch: the reference runs, and the reason is shown."""
    root = pathlib.Path(dgg.__file__).parent
    shutil.copytree(root, tmp_path / "dgg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    kernels = pathlib.Path(importlib.util.find_spec("dgg.kernels").origin).parent
    shutil.copytree(kernels, tmp_path / "dgg" / "kernels", dirs_exist_ok=True)
    library = tmp_path / "dgg" / "_C.abi3.so"
    library.write_text("no library")
    if broken == "missing symbol":
        source = tmp_path / "broken.c"
        source.write_text("void gone_since(void); void (*needed)(void) = gone_since;")
        compiler = shutil.which("cc") or pytest.skip("needs a C compiler, there is none")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, dgg; "
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "dgg.SGD([p], lr=0.5).step(); print(p.tolist(), dgg.__file__); print(dgg.show_config())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"[0.5, 0.5, 0.5] {tmp_path}"), done.stdout
    reason = "gone_since" if broken == "missing symbol" else "_C.abi3.so"
    assert re.search(f"cpp .*cannot be loaded .*{reason}.*reinstall dgg", done.stdout), done.stdout
    assert "default: reference on cpu" in done.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_parameters(monkeypatch, device):
    """As memory estimators step them: there is nothing that a kernel could read."""

    def asked():
        raise RuntimeError(
            "CUDA error: CUDA driver version is insufficient for CUDA runtime version"
        )

    # As with a CUDA build of torch where there is no driver, be the tensors fake or not.
    monkeypatch.setattr(libraries, "cuda_error", None)
    monkeypatch.setattr(libraries, "probed", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    with FakeTensorMode():
        p = Parameter(torch.ones(3, device=device))
        p.grad = torch.ones(3, device=device)
        opt = dgg.AdamW([("w", p)])
        other = torch.optim.SGD([("w", p)], lr=0.1)
        guidance = dgg.Guidance(other)
        for wrong in (opt.step, opt.set_anchor, guidance.set_anchor, other.step):
            with pytest.raises(ValueError, match=r"'w' is a FakeTensor and holds no values"):
                wrong()
    assert not opt.state
    assert opt.param_groups[0]["draw_index"] == 0


GUIDED = {"alpha": 1.0, "strength": 0.3, "scaling": False}


@pytest.mark.parametrize("foreign", [False, True])
def test_values_kept_in_other_tensors(foreign):
    """Weights of a subclass, such as float8 ones, are stepped beside plain ones by plain torch."""
    start, plain = make_params([(5,), (5,), (3,)], F32), make_params([(5,), (5,), (3,)], F32)
    pair = Parameter(TwoTensor(start[0].detach(), start[1].detach()))

    def optimizer(params, backend):
        if not foreign:
            return dgg.SGD(params, lr=0.1, momentum=0.9, backend=backend, **GUIDED)
        opt = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)
        opt.set_anchor = dgg.Guidance(opt, backend=backend, **GUIDED).set_anchor
        return opt

    opt, twin = optimizer([pair, start[2]], None), optimizer(plain, "reference")
    for step in range(4):
        if step == 1:
            opt.set_anchor()
            twin.set_anchor()
        set_grads(plain, torch.Generator().manual_seed(step))
        pair.grad = TwoTensor(plain[0].grad.clone(), plain[1].grad.clone())
        start[2].grad = plain[2].grad.clone()
        opt.step()
        twin.step()
    for mine, expected in zip((pair.a, pair.b, start[2]), plain, strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_named_backend_refuses_what_it_cannot_reach(backend):
    pair = Parameter(TwoTensor(torch.ones(5), torch.ones(5)))
    pair.grad = TwoTensor(torch.ones(5), torch.ones(5))
    opt = dgg.AdamW([pair], backend=backend)
    with pytest.raises(TypeError, match=r"cannot step a TwoTensor.*backend=None or 'reference'"):
        opt.step()
    assert not opt.state
    assert torch.equal(pair.a, torch.ones(5))


def test_replay_of_two_optimizers_over_one_parameter():
    """One inside the other: the outer one would get nothing, silently."""
    shared, own = make_params([(4,), (3,)], F32)
    first, second = dgg.SGD([shared], lr=0.1), dgg.SGD([shared, own], lr=0.1)
    third = dgg.SGD([own], lr=0.1)
    with pytest.raises(RuntimeError, match=r"another optimizer.*own backward"):  # noqa: SIM117
        with first.replay():
            with second.replay():
                pass
    with first.replay(), third.replay():
        (shared.sum() + own.sum()).backward()
    first.step()
    third.step()
    start = make_params([(4,), (3,)], F32)
    assert torch.equal(shared, start[0] - 0.1)
    assert torch.equal(own, start[1] - 0.1)
    with second.replay():
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_block_that_raises(backend):
    """Its gradients are dropped; those in ``.grad`` and of former blocks stay."""

    def run(fails):
        params = make_params([(4,), (3,)], torch.float32)
        opt = dgg.SGD(params, lr=0.5, momentum=0.9, replay_weight=0.5, backend=backend)
        set_grads(params, torch.Generator().manual_seed(1))
        with opt.replay():
            params[0].grad = torch.full((4,), 3.0)
        if fails:
            kept = [p.grad for p in params]
            with pytest.raises(KeyError), opt.replay():
                params[1].grad = torch.full((3,), 5.0)
                raise KeyError
            assert all(p.grad is g for p, g in zip(params, kept, strict=True))
        opt.step()
        return params

    for p, q in zip(run(True), run(False), strict=True):
        assert torch.equal(p, q)


# -- Guidance -------------------------------------------------------------------------------------


def guided(backend, **options):
    params = make_params([(6, 4), (5,)], torch.float32)
    opt = torch.optim.SGD(
        [("a", params[0]), ("b", params[1])], lr=0.1, momentum=0.9, weight_decay=0.1
    )
    guidance = dgg.Guidance(opt, backend=backend, **{**OPTIONS, **options})
    generator = torch.Generator().manual_seed(2)
    guidance.set_anchor()
    for _ in range(2):
        set_grads(params, generator)
        opt.step()
    set_grads(params, generator)
    return params, opt, guidance


def load_changed(change):
    def act(params, opt, guidance):
        saved = copy.deepcopy(guidance.state_dict())
        changed = change(saved)
        guidance.load_state_dict(saved if changed is None else changed)

    return act


def sparse_step(params, opt, guidance):
    params[0].grad = params[0].grad.to_sparse()
    opt.step()


def grown_step(params, opt, guidance):
    params[1].data, params[1].grad = torch.zeros(700), torch.ones(700)
    opt.step()


def shrunk_step(params, opt, guidance):
    params[0].data, params[0].grad = params[0].data[:2], torch.ones(2, 4)
    opt.step()


def step_in_replay(params, opt, guidance):
    with guidance.replay():
        opt.step()


def nested_guidance_replay(params, opt, guidance):
    with guidance.replay(), guidance.replay():
        pass


def replay_with_scaler(params, opt, guidance):
    with guidance.replay():
        params[0].grad = torch.ones(6, 4)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    try:
        opt.step()
    finally:
        del opt.grad_scale, opt.found_inf


def replay_under_scaler(params, opt, guidance):
    """Of an optimizer that does not unscale by itself the scaler says nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with guidance.replay():
        scaler.scale(params[0].sum()).backward()
    scaler.scale(params[0].sum()).backward()
    scaler.step(opt)


def alpha_out_of_range(params, opt, guidance):
    right = guidance.param_groups[0]["alpha"]
    guidance.param_groups[0]["alpha"] = -1
    try:
        opt.step()
    finally:
        guidance.param_groups[0]["alpha"] = right


def taken_off(act):
    def run(params, opt, guidance):
        other = torch.optim.SGD(params, lr=0.1)
        removed = dgg.Guidance(other, alpha=1.0)
        saved = removed.state_dict()
        removed.remove()
        again = dgg.Guidance(other)
        removed.remove()
        assert vars(other)["_dgg_guidance"] is again
        act(removed, saved)

    return run


GUIDANCE_MISUSES = [
    *[
        (taken_off(act), RuntimeError, r"remove\(\) has taken.*SGD.*make a new dgg\.Guidance\(opt")
        for act in (
            lambda g, s: g.set_anchor(),
            lambda g, s: g.set_anchor(task=1),
            lambda g, s: g.load_state_dict(s),
            lambda g, s: g.replay(),
            lambda g, s: g._place_anchor(None, model=None, task=1, importance=None),
        )
    ],
    (sparse_step, TypeError, r"gradient of parameter 'a' is torch.sparse_coo.*sparse=False"),
    (grown_step, ValueError, r"parameter 'b' has another shape than its anchor, \(5,\).*set_anc"),
    (shrunk_step, ValueError, r"parameter 'a' has another shape than its anchor, \(6, 4\)"),
    (step_in_replay, RuntimeError, r"step\(\) inside a replay\(\) block.*leave the block"),
    (nested_guidance_replay, RuntimeError, r"replay\(\) blocks do not nest; leave the outer"),
    (replay_with_scaler, RuntimeError, r"replay\(\).*GradScaler.*use dgg\.AdamW, or bfloat16"),
    (replay_under_scaler, RuntimeError, r"replay\(\).*GradScaler.*use dgg\.AdamW, or bfloat16"),
    (alpha_out_of_range, ValueError, r"alpha=-1 must lie in \[0, 1\]"),
    (
        lambda p, o, g: g.set_anchor([p[0]]),
        TypeError,
        r"mapping from names to tensors or the path.*not list",
    ),
    (
        lambda p, o, g: g.set_anchor(g.state_dict()),
        KeyError,
        r"no tensor for 2 of 2.*start with: p",
    ),
    (lambda p, o, g: g.set_anchor(o.state_dict()), KeyError, r"an optimizer's state dict.*load_st"),
    (lambda p, o, g: g.set_anchor({"a": p[0]}), KeyError, r"no tensor for 1 of 2.*'b'.*freeze"),
    (lambda p, o, g: g.set_anchor(model=torch.nn.Linear(1, 1)), ValueError, r"give both or nei"),
    (load_changed(lambda s: [s]), TypeError, r"what state_dict\(\) returned, not list"),
    (lambda p, o, g: g.load_state_dict(o.state_dict()), KeyError, r"no state dict of a guidance"),
    (load_changed(lambda s: s.update(params=3)), ValueError, r"of 3 parameters in 1.*has 2 in 1"),
    (load_changed(lambda s: s["param_groups"].pop().clear()), ValueError, r"in 0 groups"),
    (
        load_changed(lambda s: drop(s["param_groups"][0], "seed")),
        KeyError,
        r"group 0 of the state dict lacks \['seed'\]; pass what guidance.state_dict\(\)",
    ),
    (
        load_changed(lambda s: s["param_groups"][0].update(alpha=2.0)),
        ValueError,
        r"alpha=2\.0 must lie in \[0, 1\]",
    ),
    (
        load_changed(lambda s: s["anchors"].update({1: torch.ones(4)})),
        ValueError,
        r"parameter 'b' has shape \(4,\), the parameter has \(5,\)",
    ),
    (
        load_changed(lambda s: s["anchors"].update({7: torch.ones(4)})),
        KeyError,
        r"anchor of parameter 7 of 2; pass what guidance.state_dict\(\) returned",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("act", "error", "says"), GUIDANCE_MISUSES)
def test_misuse_of_guidance_changes_nothing(act, error, says, backend):
    params, opt, guidance = guided(backend)
    before = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    mine = copy.deepcopy(guidance.state_dict())
    values = [p.data for p in params]
    with pytest.raises(error) as caught:
        act(params, opt, guidance)
    message = str(caught.value)
    assert re.search(f"(?s){says}", message), message
    for p, value in zip(params, values, strict=True):
        p.data = value
    assert_same(before, ([p.detach() for p in params], opt.state_dict()))
    assert_same(mine, guidance.state_dict())
