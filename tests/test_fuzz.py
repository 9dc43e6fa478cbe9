# SPDX-License-Identifier: BSD-3-Clause
"""The short form of the fuzzing machines (docs/fuzzing.md): the same actions, a fixed seed.

Plan: (1) the model itself: known answers of its generator, its rounding, bounds, a step of torch's;
(2) random lives of an optimizer, by hypothesis, which makes a failure small, and by plain seeds;
(3) hostile states, files and buffers; (4) a planted fault is found, made small and printed.
"""

from __future__ import annotations

import contextlib
import pathlib
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dgg
import fuzz_hostile as hostile
import fuzz_machine as machine
import fuzz_model as model
from cases import F32, OPTIMIZERS, make_params, set_grads

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES, WEIGHTS = machine.names_of()
# As often as the machine takes them.
ACTION = st.sampled_from([n for n, k in zip(NAMES, WEIGHTS, strict=True) for _ in range(round(k))])


# -- (1) the model --------------------------------------------------------------------------------


def test_known_answers_of_the_generator():
    """Of Salmon et al.'s own test vectors."""
    words = [f"{x:08x}" for x in model.philox(0, 0, 0, 0, 0)]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    every = (1 << 32) - 1
    words = [f"{x:08x}" for x in model.philox((1 << 64) - 1, every, every, every, every)]
    assert words == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    # One element at a time as all at once.
    found = model.element_words(77, 5, 3, 11)
    for i in range(11):
        block = model.philox(77, i // 4, 0, 5, model.STREAM_ELEMENT + 3)
        assert found[i] == block[i % 4]


def test_bounds_hold_what_float32_makes_of_it_and_little_more():
    rng = np.random.default_rng(0)
    ops = model.Arithmetic(False, False)
    a, b, c = (rng.standard_normal(1000).astype(np.float32) for _ in range(3))
    made = (a * b + c) / np.sqrt(np.abs(a) + np.float32(0.1))
    a, b, c = (model.exact(x.astype(np.float64)) for x in (a, b, c))
    size = np.abs(a[0]), a[1]
    ball = ops.add(ops.mul(a, b), c)
    ball = ops.div(ball, ops.sqrt(ops.add(size, ops.constant(0.1))))
    assert model.within(made.astype(np.float64), ball, F32).all()
    wrong = made.astype(np.float64) + 4 * ball[1] + 1e-6 * np.abs(made)
    assert not model.within(wrong, ball, F32).any()


def test_rounding_by_words():
    values = np.array([1.0, 1.0 + 2**-9, -1.0 - 2**-9, 3.0, np.inf])
    assert model.rounded(values, torch.bfloat16, np.zeros(5, np.int64)).tolist() == [
        1.0, 1.0, -1.0, 3.0, np.inf,
    ]  # fmt: skip
    assert model.rounded(values, torch.bfloat16, np.full(5, 0xFFFF)).tolist() == [
        1.0, 1.0 + 2**-7, -1.0 - 2**-7, 3.0, np.inf,
    ]  # fmt: skip


PARENTS = {dgg.AdamW: torch.optim.AdamW, dgg.Adam: torch.optim.Adam, dgg.SGD: torch.optim.SGD}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_models_base_optimizer_is_torchs(kind):
    cls, hyper = OPTIMIZERS[kind]
    (p,) = make_params([(3, 4)], F32)
    opt = PARENTS[cls]([p], **hyper, foreach=False)
    rule = "sgd" if cls is dgg.SGD else "adam"
    group = {"decoupled": cls is dgg.AdamW, "alpha": 0.0, "strength": 0.0, **hyper}
    for step in range(4):
        set_grads([p], torch.Generator().manual_seed(step))
        state = {k: model.flat(v) for k, v in opt.state[p].items() if k != "step"}
        first = rule == "sgd" and step == 0
        row = model.Row(
            0, 0, False, model.flat(p), model.flat(p.grad), state=state, step=step, first=first
        )
        made = model.base(rule, [row], [group])
        opt.step()
        assert model.within(model.flat(p), made.rows[0]["theta"], F32).all()


# -- (2) lives of an optimizer --------------------------------------------------------------------


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    seed=st.integers(0, 1 << 16),
    actions=st.lists(st.tuples(ACTION, st.integers(0, 1 << 16)), min_size=1, max_size=30),
)
def test_lives_by_hypothesis(seed, actions):
    try:
        machine.run(seed, actions)
    except Exception:
        pytest.fail(machine.reproduction(seed, actions))


@pytest.mark.parametrize("seed", range(4))
def test_lives_by_seed(seed):
    for world in range(1000 * seed, 1000 * seed + 30):
        actions = machine.plan(world)
        kind = machine.kind_of(world, actions)
        if kind is not None:
            fewer = machine.shrink(world, actions, kind)
            pytest.fail(f"{kind}\n{machine.reproduction(world, fewer)}")


# -- (3) hostile states ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_hostile(kind, tmp_path):
    found = {}
    for seed in range(150):
        try:
            hostile.attempt(kind, seed, tmp_path)
        except Exception as error:
            found.setdefault(getattr(error, "kind", repr(error)), seed)
    texts = [hostile.reproduction(kind, seed, tmp_path) for seed in found.values()]
    assert not found, "\n\n".join(texts)


# -- (4) the machines find faults -----------------------------------------------------------------


PLANTED = {
    "draw": ("dgg._philox.step_word", lambda seed, draw: 0),
    "scale": ("fuzz_model._scale", lambda clip, grad, distance: (0.37, 0.0)),
    "threshold": ("dgg._philox.threshold", lambda alpha: 1 << 31),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_made_small(fault, monkeypatch):
    monkeypatch.setattr(*PLANTED[fault])
    for world in range(300):
        actions = machine.plan(world)
        kind = machine.kind_of(world, actions)
        if kind is not None:
            break
    assert kind is not None and re.match("step|statistics", kind), kind
    fewer = machine.shrink(world, actions, kind, limit_s=5)
    assert len(fewer) <= min(6, len(actions)), fewer
    text = machine.reproduction(world, fewer)
    assert kind in text and "--repro" in text and "backend" in text


def test_all_actions_and_wrong_uses_happen():
    """None is left out by a condition that never holds."""
    missing = {f"provoke {name}" for name in machine.PROVOKED} | {
        "by kept", "by numpy", "swap_tensors", "swapping True", "load an earlier state", "pickle",
        "deepcopy", "post raises", "found_inf=1.0", "requires_grad_(False)", "and it raises",
        "a new optimizer loads", "negated", "gaps", "exchange", "GradScaler", "in a hook",
        "torch's optimizer", "taken out", "draw_index =", "alpha becomes auto",
        "alpha becomes a number", "importance=sums) -> set", "importance=None) -> set",
        "given the sums of this one", "importance_dict(model) -> None", "importance of p",
        ": against",
        "merge_anchor('mean'", "merge_anchor('rows'", "merge_anchor('fisher'",
    }  # fmt: skip
    for world in range(400):
        notes: list[str] = []
        with contextlib.suppress(machine.Difference):
            machine.run(world, machine.plan(world), notes=notes)
        text = "\n".join(notes)
        missing = {word for word in missing if word not in text}
        if not missing:
            break
    assert not missing


def test_the_documentation_says_how():
    root = pathlib.Path(__file__).parents[1]
    text = (root / "docs" / "fuzzing.md").read_text()
    assert "make fuzz" in text and "--repro" in text
