# SPDX-License-Identifier: BSD-3-Clause
"""What `load_state_dict` looks at, asked directly: every limit from both sides.

`test_loading.py` shows that a refused load changes nothing; here stands what is refused and how it
is called. ``make mutate`` holds these tests against every line of
``dgg/checkpoint/saved_state.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from dgg.checkpoint import saved_state
from dgg.checkpoint.saved_state import check_entry, check_form, check_group

CONVERT = "…torch.optim.AdamW, Adam, SGD…dgg.convert_state_dict(state_dict, optimizer)"
PASS = "…optimizer.state_dict()"
LONG = "x" * 80


def numbered(table):
    # Numbers, not texts, as names of the tests: mutmut passes names on to pytest.
    return [pytest.param(*row, id=str(place)) for place, row in enumerate(table)]


def refused(error, text, call, *arguments):
    """The parts of ``text`` must be said in their order; what stands between is free."""
    with pytest.raises(error) as raised:
        call(*arguments)
    assert type(raised.value) is error
    said = raised.value.args[0]
    for part in text.split("…"):
        _, found, said = said.partition(part)
        assert found, raised.value.args


# -- the form -------------------------------------------------------------------------------------

GROUPS = [{"params": [1, 2]}, {"params": [3]}]
SAVED = [{"params": [0, 1]}, {"params": [2]}]


@pytest.mark.parametrize(
    "saved",
    [
        {"state": {}, "param_groups": SAVED},
        {"state": {}, "param_groups": SAVED, "more": 1},
        {"state": {0: 1}, "param_groups": tuple(SAVED)},
        {"state": {}, "param_groups": [{"params": ("a", "b")}, {"params": ["c"]}]},
        {"state": {}, "param_groups": [{**SAVED[0], "param_names": ("a", "b")}, SAVED[1]]},
        {"state": {}, "param_groups": [SAVED[0], {**SAVED[1], "param_names": ["c"]}]},
        {"state": {}, "param_groups": [SAVED[0], {**SAVED[1], "param_names": None}]},
        # Nothing is known of 7, and what hooks have put there is no parameter's.
        {"state": {0: {"step": 1}, 7: {}, 8: None, "seen": 1}, "param_groups": SAVED},
    ],
)
def test_forms_that_are_right(saved):
    assert check_form(saved, GROUPS) is None


WHOLE = f", not state and param_groups{PASS}"
NAMES = f"param_names of group {{}} of…each of its {{}} parameters{PASS}"
STRANGE = f"state of {{}} and {{}} more{PASS}"
NOT_A_LIST = f"param_groups is a {{}}, not a list{PASS}"
NO_PARAMS = f"group {{}} of…params{PASS}"
SIZES = "groups hold {}, this optimizer's [2, 1]…same groups"
FORMS = [
    (
        [1],
        TypeError,
        "load_state_dict()…, not list; torch.load",
    ),
    ({}, KeyError, f"it has []{WHOLE}"),
    (
        {"param_groups": SAVED, 1: 2, "c": 0, "d": 0, "e": 0, "f": 0},
        KeyError,
        f"it has ['param_groups', '1', 'c', 'd', 'e']{WHOLE}",
    ),
    ({"state": {}}, KeyError, f"it has ['state']{WHOLE}"),
    (
        {"state": [], "param_groups": SAVED},
        TypeError,
        f"state is a list, not a dict{PASS}",
    ),
    ({"state": {}, "param_groups": {}}, TypeError, NOT_A_LIST.format("dict")),
    ({"state": {}, "param_groups": "ab"}, TypeError, NOT_A_LIST.format("str")),
    ({"state": {}, "param_groups": [SAVED[0], [2]]}, TypeError, NO_PARAMS.format(1)),
    ({"state": {}, "param_groups": [SAVED[0], {}]}, TypeError, NO_PARAMS.format(1)),
    ({"state": {}, "param_groups": [{"params": "ab"}, SAVED[1]]}, TypeError, NO_PARAMS.format(0)),
    ({"state": {}, "param_groups": [{"params": {0, 1}}]}, TypeError, NO_PARAMS.format(0)),
    ({"state": {}, "param_groups": SAVED[:1]}, ValueError, SIZES.format("[2] parameters")),
    ({"state": {}, "param_groups": SAVED[::-1]}, ValueError, SIZES.format("[1, 2] parameters")),
    (
        {"state": {}, "param_groups": [{"params": [0, [1]]}, SAVED[1]]},
        TypeError,
        f"params in…groups are no numbers or names{PASS}",
    ),
    (
        {"state": {}, "param_groups": [SAVED[0], {"params": [1]}]},
        ValueError,
        "name a parameter twice",
    ),
    *(
        (
            {"state": {}, "param_groups": [SAVED[0], {**SAVED[1], "param_names": names}]},
            ValueError,
            NAMES.format(1, 1),
        )
        for names in ("c", ["c", "d"], [], [7], {"c": 1})
    ),
    (
        {"state": {}, "param_groups": [{**SAVED[0], "param_names": ["a", 1]}, SAVED[1]]},
        ValueError,
        NAMES.format(0, 2),
    ),
    (
        {"state": {0: {"step": 1}, "0": {"step": 1}}, "param_groups": SAVED},
        ValueError,
        STRANGE.format("'0'", 0),
    ),
    (
        {"state": {5: {"step": 1}, 6: {}, 7: {"step": 1}}, "param_groups": SAVED},
        ValueError,
        STRANGE.format(5, 1),
    ),
]


@pytest.mark.parametrize(("saved", "error", "text"), numbered(FORMS))
def test_forms_that_are_wrong(saved, error, text):
    refused(error, text, check_form, saved, GROUPS)


# -- groups ---------------------------------------------------------------------------------------

ADAM = {
    "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False,
    "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
    "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
SGD = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "foreach": None, "differentiable": False, "fused": None,
}  # fmt: skip
OURS = {"alpha": 0.2, "strength": 1.0, "seed": 0, "anchored": 0}
OPTIONAL = (
    "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "decoupled_weight_decay", "nesterov",
)  # fmt: skip


def group(kind=None, /, *, without=(), ours=True, **changes):
    """Returns a saved group, and the defaults of the optimizer that is to take it."""
    theirs = SGD if kind == "sgd" else ADAM
    made = {**theirs, **(OURS if ours else {}), "params": [0], **changes}
    return {k: v for k, v in made.items() if k not in without}, {**theirs, **OURS}


def look(saved, defaults):
    return check_group(7, saved, defaults, OURS)


GOOD_GROUPS = [
    group(),
    group("sgd"),
    group(ours=False),
    group(ours=False, alpha=0.3),  # set in what torch.optim has saved
    group(ours=False, strength=0.3, alpha=0.3),
    group(without=OPTIONAL),
    *(group(without=(name,)) for name in OPTIONAL if name not in ("amsgrad", "nesterov")),
    group("sgd", without=OPTIONAL),
    group(lr=0, eps=0, weight_decay=0),
    group(lr=torch.tensor(0.1), betas=[torch.tensor(0.9), torch.tensor([0.99])]),
    group(lr=np.float32(0.1), betas=(np.float64(0.0), 0.0), eps=np.array(1e-8)),
    group(betas=(0, 0.0)),
    group(amsgrad=1, maximize=0, decoupled_weight_decay=True),
    group("sgd", nesterov=1, dampening=-0.5, momentum=0),
    group(anchored=3),
    group(more="of another release"),
]


@pytest.mark.parametrize("place", range(len(GOOD_GROUPS)))
def test_groups_that_are_right(place):
    assert look(*GOOD_GROUPS[place]) is None


MISSING = f"group 7 of the state dict has no {{}}: …it has {{}}){CONVERT}"
NO_NUMBER = f"{{}} of group 7 of…no number{PASS}"
NEGATIVE = "{} of group 7 of…negative"
NO_BETAS = "betas={} of group 7 of…[0, 1)"
NO_FLAG = "{} of group 7 of…neither True nor False"
NO_COUNT = "anchored={} of group 7 of…no number of parameters"


def missing(*names, kind=None):
    saved, defaults = group(kind, without=names)
    return (saved, defaults), ValueError, MISSING.format(", ".join(sorted(names)), sorted(saved))


BAD_GROUPS = [
    *(missing(name) for name in ("lr", "betas", "eps", "weight_decay", "alpha", "seed")),
    missing("anchored"),
    missing("lr", "seed"),
    missing("alpha", "strength", "seed"),  # anchored remains
    missing("amsgrad"),  # of an optimizer that has none: what is newer is there
    missing("nesterov", kind="sgd"),
    *((group(**{n: "x"}), TypeError, NO_NUMBER.format(f"{n}='x'")) for n in ("lr", "eps")),
    *(
        (group("sgd", **{n: None}), TypeError, NO_NUMBER.format(f"{n}=None"))
        for n in ("lr", "momentum", "dampening", "weight_decay")
    ),
    (group(lr=math.nan), TypeError, NO_NUMBER.format("lr=nan")),
    (group(lr=LONG), TypeError, NO_NUMBER.format(f"lr='{'x' * 56}...")),
    (group(lr=torch.ones(2)), TypeError, NO_NUMBER.format("lr=a tensor of shape (2,)")),
    *(
        (group("sgd", **{n: -0.5}), ValueError, NEGATIVE.format(f"{n}=-0.5"))
        for n in ("lr", "momentum", "weight_decay")
    ),
    (group(eps=-1), ValueError, NEGATIVE.format("eps=-1.0")),
    *(
        (group(betas=b), ValueError, NO_BETAS.format(b if isinstance(b, tuple) else repr(b)))
        for b in ((0.9,), (0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (0.1, "x"), "ab", 5, (0.1, 0.2, 0.3))
    ),
    *(
        (group(**{n: "x"}), TypeError, NO_FLAG.format(f"{n}='x'"))
        for n in ("amsgrad", "maximize", "decoupled_weight_decay")
    ),
    (group("sgd", nesterov=None), TypeError, NO_FLAG.format("nesterov=None")),
    (group(amsgrad=0.5), TypeError, NO_FLAG.format("amsgrad=0.5")),
    *((group(anchored=n), TypeError, NO_COUNT.format(repr(n))) for n in (-1, True, "x", 1.0)),
]


@pytest.mark.parametrize(("given", "error", "text"), numbered(BAD_GROUPS))
def test_groups_that_are_wrong(given, error, text):
    refused(error, text, look, *given)


# -- the state of a parameter ---------------------------------------------------------------------

PLAIN = Parameter(torch.ones(2, 3))
PAIR = Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)))
COMPLEX = Parameter(torch.ones(2, 3, dtype=torch.complex64))
NEEDED, KNOWN = ("step", "exp_avg"), ("step", "exp_avg", "exp_avg_sq", "master")


def entry(**changes):
    made = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3), **changes}
    return {k: v for k, v in made.items() if v != "left out"}


def consult(saved, param=PLAIN):
    return check_entry(saved, param, "parameter 5", NEEDED, KNOWN)


@pytest.mark.parametrize(
    ("saved", "param"),
    [
        (entry(), PLAIN),
        (entry(exp_avg_sq=None, unknown="x"), PLAIN),
        *((entry(step=step), PLAIN) for step in (0, 1, 2.0, 2**53, np.int64(4), np.array(4.0))),
        (entry(step=torch.tensor([3])), PLAIN),
        (entry(step=torch.tensor(0)), PLAIN),
        *(
            (entry(exp_avg=torch.zeros(2, 3, dtype=dtype)), PLAIN)
            for dtype in (torch.float64, torch.bfloat16, torch.float16)
        ),
        (entry(exp_avg=torch.zeros(2, 3, dtype=torch.complex128)), COMPLEX),
        (entry(exp_avg=TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3))), PAIR.data),
    ],
)
def test_states_that_are_right(saved, param):
    assert consult(saved, param) is None


LOST = f"no {{}} of parameter 5, but {{}}: {CONVERT}"
NO_STEP = f"step of parameter 5 is {{}}, not{PASS}"
NO_TENSOR = f"{{}} of parameter 5 is a {{}}, not a tensor{CONVERT}"
SHAPE = "{} of parameter 5 has shape {}, the parameter has (2, 3)…same architecture"
NO_FLOATS = f"exp_avg of parameter 5 is a {{}} of {{}}, not{CONVERT}"
NO_VALUES = "exp_avg of parameter 5 is {} on {}, …load the checkpoint to a device"
BAD_STATES = [
    ([], PLAIN, TypeError, f"state of parameter 5 is a list, not a dict{PASS}"),
    (entry(step="left out"), PLAIN, ValueError, LOST.format("step", ["exp_avg"])),
    (entry(exp_avg=None), PLAIN, ValueError, LOST.format("exp_avg", ["exp_avg", "step"])),
    ({7: 1, "b": 2}, PLAIN, ValueError, LOST.format("step, exp_avg", ["7", "b"])),
    *(
        (entry(step=step), PLAIN, ValueError, NO_STEP.format(repr(step)))
        for step in (-1, 0.5, 2**53 + 2, math.nan, math.inf, True, "3", [3], 10**400 // 10**350)
    ),
    (entry(step=10**400), PLAIN, ValueError, NO_STEP.format("1" + "0" * 56 + "...")),
    (entry(step=torch.zeros(2)), PLAIN, ValueError, NO_STEP.format("a tensor of shape (2,)")),
    *(
        (entry(step=step), PLAIN, ValueError, NO_STEP.format("a tensor of shape ()"))
        for step in (
            torch.tensor(True),
            torch.tensor(1 + 0j),
            torch.tensor(3.0).to_sparse(),
            torch.tensor(3.0, device="meta"),
        )
    ),
    (entry(exp_avg="x"), PLAIN, TypeError, NO_TENSOR.format("exp_avg", "str")),
    (entry(master=[1.0]), PLAIN, TypeError, NO_TENSOR.format("master", "list")),
    (entry(exp_avg_sq=torch.ones(3)), PLAIN, ValueError, SHAPE.format("exp_avg_sq", "(3,)")),
    (
        entry(exp_avg=torch.ones(2, 3).byte()),
        PLAIN,
        TypeError,
        NO_FLOATS.format("Tensor", "torch.uint8"),
    ),
    (
        entry(exp_avg=torch.ones(2, 3)),
        COMPLEX,
        TypeError,
        NO_FLOATS.format("Tensor", "torch.float32"),
    ),
    (
        entry(exp_avg=torch.ones(2, 3, dtype=torch.complex64)),
        PLAIN,
        TypeError,
        NO_FLOATS.format("Tensor", "torch.complex64"),
    ),
    (
        entry(exp_avg=TwoTensor(torch.ones(2, 3), torch.ones(2, 3))),
        PLAIN,
        TypeError,
        NO_FLOATS.format("TwoTensor", "torch.float32"),
    ),
    (
        entry(exp_avg=torch.ones(2, 3).to_sparse()),
        PLAIN,
        ValueError,
        NO_VALUES.format("torch.sparse_coo", "'cpu'"),
    ),
    (
        entry(exp_avg=torch.ones(2, 3, device="meta")),
        PLAIN,
        ValueError,
        NO_VALUES.format("torch.strided", "'meta'"),
    ),
]


@pytest.mark.parametrize(("saved", "param", "error", "text"), numbered(BAD_STATES))
def test_states_that_are_wrong(saved, param, error, text):
    refused(error, text, consult, saved, param)


def test_what_is_shown_of_a_value():
    assert saved_state._shown("x" * 58) == f"'{'x' * 58}'"  # 60 characters
    assert saved_state._shown("x" * 59) == f"'{'x' * 56}..."
    assert len(saved_state._shown("x" * 59)) == 60
    assert saved_state._shown(torch.ones(2, 3)) == "a tensor of shape (2, 3)"
    assert saved_state._shown(None) == "None"
