# SPDX-License-Identifier: BSD-3-Clause
"""Who calls: every warning is about the user's line, and callers are told apart by what they run.

Plan: (1) every warning of a step, by each way that a step is called, names this file; the places
that warn are read off the sources, so that none is missing here; (2) frames told by function, by
name and by object.
"""

from __future__ import annotations

import _thread
import ast
import linecache
import math
import pathlib
import queue
import re
import sys
import types
import warnings

import pytest
import torch

import dgg
from dgg import _callers, backends
from dgg.backends import libraries

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_TRITON = backends.unavailable("triton", torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("quick_interpreter")

# -- (1) warnings ----------------------------------------------------------------------------------


def directly(optimizer):
    optimizer.step()


def with_a_closure(optimizer):
    optimizer.step(lambda: None)


def beside_a_scheduler(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step()


def by_a_scaler(optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))  # which makes its tensors
    scaler.step(optimizer)


def by_a_scaler_beside_a_scheduler(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    by_a_scaler(optimizer)


def by_accelerate(optimizer):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).prepare(optimizer).step()


def by_fabric(optimizer):
    fabric = pytest.importorskip("lightning_fabric")
    wrappers = pytest.importorskip("lightning_fabric.wrappers")
    strategy = fabric.Fabric(accelerator="cpu")._strategy
    wrappers._FabricOptimizer(optimizer, strategy).step()


def inside_another_function_of_torchs(optimizer):
    torch.no_grad()(optimizer.step)()


def adamw(dtype=torch.float32, **options):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    return dgg.AdamW([param], **options), param


def without_a_gradient():
    optimizer, param = adamw()
    param.grad = None
    return optimizer


def long_without_a_gradient():
    optimizer, param = adamw()
    optimizer.step()
    param.grad = None
    for _ in range(99):
        optimizer.step()
    return optimizer


def long_without_an_anchor():
    optimizer, _ = adamw()
    for group in optimizer.param_groups:
        group["draw_index"] = 199
    return optimizer


def long_without_replay():
    optimizer, param = adamw(alpha="auto")
    optimizer.set_anchor()
    for _ in range(99):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = torch.ones_like(param)
    return optimizer


def in_16_bits():
    return adamw(dtype=torch.bfloat16)[0]


def with_infinite_replay():
    optimizer, param = adamw()
    with optimizer.replay():
        param.grad = torch.full_like(param, math.inf)
    return optimizer


def without_a_library():
    return adamw()[0]


def in_a_cache_that_fails():
    return adamw(backend="triton")[0]


WAYS = [
    directly, with_a_closure, beside_a_scheduler, by_a_scaler, by_a_scaler_beside_a_scheduler,
    by_accelerate, by_fabric, inside_another_function_of_torchs,
]  # fmt: skip
SCALED = [by_a_scaler, by_a_scaler_beside_a_scheduler]
# GradScaler steps with no optimizer that has no gradient.
UNSCALED = [way for way in WAYS if way not in SCALED]

# Where a step warns: how it is brought to, what it says, and the ways that get there.
OF_STEPS = {
    ("dgg/step/checks.py", "warn_if_idle"): (without_a_gradient, "first step found no", UNSCALED),
    ("dgg/step/checks.py", "warn_if_nothing_happens"): (
        long_without_a_gradient, "has had a gradient for 100", UNSCALED,
    ),
    ("dgg/step/checks.py", "warn_if_nothing_happens", 2): (
        long_without_an_anchor, "nothing is guided", WAYS,
    ),
    ("dgg/step/checks.py", "has_replay"): (
        long_without_replay, "100 steps had none: nothing is guided", UNSCALED,
    ),
    ("dgg/step/gradients.py", "scaler_state"): (
        with_infinite_replay, "replay gradients are inf", SCALED,
    ),
    ("dgg/_arguments.py", "warn_narrow"): (in_16_bits, "16-bit weights lose", WAYS),
    ("dgg/step/checks.py", "warn_if_slow"): (
        without_a_library, "take the slow reference.*no compiler", WAYS,
    ),
    ("kernels/launcher.py", "_find"): (in_a_cache_that_fails, "Trying again", WAYS),
}  # fmt: skip
# The others, and the test that looks at their line.
OTHERS = {
    ("dgg/backends/libraries.py", "warn_if_unbuilt"): "test_install.py",
    ("dgg/optim/stepped.py", "_reset_caches"): "test_gpu_stand_in.py",
    ("dgg/step/gradients.py", "zero_grad"): "below",
    ("dgg/deepspeed/driver.py", "_drop_orphans"): "deepspeed_worker.py",
    ("dgg/step/checks.py", "warn_if_anchor_follows"): "test_misuse.py",
    ("dgg/optim/construction.py", "_check_numbers"): "test_misuse.py",
    ("dgg/lightning.py", "on_train_start"): "test_lightning.py",
    ("dgg/hf/callback.py", "_begin"): "test_hf.py",
    ("dgg/hf/callback.py", "_begin", 2): "test_hf.py",
    ("dgg/hf/importance.py", "keep"): "test_hf.py",
    ("dgg/hf/importance.py", "keep", 2): "test_hf.py",
    ("dgg/hf/callback.py", "_resume"): "test_hf.py",
    ("dgg/hf/callback.py", "_resume", 2): "test_hf.py",
    ("dgg/hf/callback.py", "_resume", 3): "test_hf.py",
    ("dgg/hf/callback.py", "_warn_of_ignored_lr"): "test_hf.py",
    ("dgg/hf/replay_trainer.py", "_load_optimizer_and_scheduler"): "test_hf_replay.py",
    ("kernels/launcher.py", "_without_spills"): "below",
}


def places_that_warn():
    """Yields file and function of each warning, its number in there if not the first, its call."""
    for path in sorted([*(ROOT / "dgg").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("warnings.warn", "logger.warning")
            ]
            for number, call in enumerate(calls, 1):
                place = path.relative_to(ROOT).as_posix(), function.name
                yield (place if number == 1 else (*place, number)), call


def test_every_warning_is_looked_at_and_counts_no_frames_by_hand():
    found = dict(places_that_warn())
    assert found.keys() == OF_STEPS.keys() | OTHERS.keys()
    for place, call in found.items():
        level = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert level.get("stacklevel") == "_callers.stacklevel()", place


@pytest.mark.parametrize(
    ("place", "way"),
    [(place, way) for place, (*_, ways) in OF_STEPS.items() for way in ways],
    ids=lambda x: getattr(x, "__name__", None) or " ".join(map(str, x[1:])),
)
@pytest.mark.filterwarnings("default:16-bit weights lose small updates:UserWarning")
def test_a_warning_of_a_step_is_about_the_users_line(place, way, monkeypatch):
    make, text, _ = OF_STEPS[place]
    if make is in_a_cache_that_fails:
        if NO_TRITON is not None:
            pytest.skip(f"no Triton here: {NO_TRITON}")
        cache_that_fails_once(monkeypatch)
    if make is without_a_library:
        monkeypatch.setattr(libraries, "cpp_error", "no compiler")
        monkeypatch.setattr(libraries, "told", set())
        monkeypatch.setattr(libraries, "declined", False)
    optimizer = make()
    with pytest.warns(UserWarning, match=text) as heard:
        way(optimizer)
    (warning,) = [w for w in heard if re.search(text, str(w.message))]
    assert warning.filename == __file__
    assert "step" in linecache.getline(__file__, warning.lineno)


def cache_that_fails_once(monkeypatch):
    from dgg.kernels import launcher

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run, failed = interpreter.InterpretedFunction.run, []

    def flaky(self, *arguments, **options):
        if not failed:
            failed.append(True)
            raise OSError("Stale file handle")
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", flaky)
    monkeypatch.setattr(launcher, "PAUSES", (0.0,))


@pytest.mark.parametrize("wrap", [False, True], ids=["itself", "by accelerate"])
@pytest.mark.parametrize("where", ["directly", "in a closure"])
@pytest.mark.filterwarnings("ignore:the first step found no gradient:UserWarning")
def test_gradients_zeroed_twice_are_about_the_users_line(where, wrap):
    optimizer, param = adamw()
    with optimizer.replay():
        param.grad = torch.ones_like(param)
    optimizer.zero_grad()
    outer = optimizer
    if wrap:
        outer = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)
    with pytest.warns(UserWarning, match="zero_grad.. was called twice") as heard:
        if where == "directly":
            outer.zero_grad()
        else:
            adamw()[0].step(lambda: outer.zero_grad())  # a step, but of another optimizer
    (warning,) = [w for w in heard if "called twice" in str(w.message)]
    assert warning.filename == __file__


@pytest.mark.skipif(NO_TRITON is not None, reason=f"no Triton here: {NO_TRITON}")
def test_a_kernel_that_keeps_its_spills_is_about_the_users_line():
    from dgg.kernels import launcher
    from triton.compiler import CompiledKernel

    class Spilling(CompiledKernel):
        metadata = types.SimpleNamespace(target=types.SimpleNamespace(backend="cuda"))
        n_spills = 4

        def __init__(self):
            """Compiles nothing."""

        def __del__(self):
            """Has nothing to unload."""

    def run(*arguments, warmup, **options):
        if warmup:
            raise RuntimeError("out of registers")
        return Spilling()

    def function():
        pass

    declared = types.SimpleNamespace(fn=function, run=run, __name__="adam_kernel")
    with pytest.warns(UserWarning, match="adam_kernel keeps registers.*out of regis") as heard:
        launcher.Kernel(declared, []).launch(1, torch.ones(1))
    assert heard[0].filename == __file__


def as_module(name, code):
    """Returns the names of a module that is called so; of "", one without a name."""
    names = {"warnings": warnings, "_callers": _callers}
    if name:
        names["__name__"] = name
    exec(compile(code, f"<{name}>", "exec"), names)
    return names


WARN = "def warn():\n    warnings.warn('here', stacklevel=_callers.stacklevel())\n"


@pytest.mark.parametrize(
    ("between", "users"),
    [
        ("dgg.optim", False), ("dgg", False), ("torch.optim.optimizer", False),
        ("transformers.trainer", False), ("deepspeed.runtime.engine", False),
        ("torchtitan.trainer", False), ("avalanche.training.templates.base_sgd", False),
        # What only begins alike is somebody's own, and so is what has no name.
        ("dgg_experiments.train", True), ("torchish.train", True), ("__main__", True),
        ("", True),
    ],
)  # fmt: skip
def test_whose_frames_are_passed_over(between, users):
    warn = as_module("dgg.inner", WARN)["warn"]
    call = as_module(between, "def call(warn):\n    warn()\n")["call"]
    with pytest.warns(UserWarning, match="here") as heard:
        call(warn)
    assert heard[0].filename == (f"<{between}>" if users else __file__)


def test_without_any_frame_of_a_users_it_is_about_the_outermost():
    """So it is where a thread that is not Python's begins in torch."""
    ask = as_module("dgg.inner", "def ask():\n    return _callers.stacklevel()\n")["ask"]
    code = "def run(ask, answers):\n    answers.put(ask())\n"
    answers = queue.SimpleQueue()
    _thread.start_new_thread(as_module("torch.thread", code)["run"], (ask, answers))
    assert answers.get(timeout=60) == 2


# -- (2) callers -----------------------------------------------------------------------------------


class Holder:
    def step(self, ask, mine=1):
        return ask()

    def other(self, ask, mine=2):
        return ask()


def outermost(ask, mine=3):
    return ask()


def test_a_function_is_told_by_what_it_runs():
    def asked(*function):
        return lambda: _callers.called_by(__name__, *function)

    assert outermost(asked("outermost"))
    assert outermost(lambda: outermost(asked("outermost")))
    assert Holder().step(asked("Holder", "step"))
    assert not Holder().other(asked("Holder", "step"))
    assert not outermost(asked("Holder", "step"))
    assert not outermost(asked("Holder", "no such name"))
    assert not outermost(asked("WAYS"))
    assert not outermost(lambda: _callers.called_by("no.such.module", "outermost"))
    # Another one of the same name is not the one.
    other = as_module("other", "def outermost(ask):\n    return ask()\n")["outermost"]
    assert not other(asked("outermost"))
    assert other(lambda: _callers.called_by_name("another", "outermost"))
    assert not outermost(lambda: _callers.called_by_name("outer", "step"))


def test_a_wrapped_function_is_the_one_inside(monkeypatch):
    module = types.ModuleType("a_module_with_a_wrapped_function")
    module.wrapped = torch.no_grad()(outermost)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert module.wrapped(lambda: _callers.called_by(module.__name__, "wrapped"))


def test_calls_come_from_the_inside_out_with_their_local_variables():
    functions = [(__name__, "outermost"), (__name__, "Holder", "step"), ("nowhere", "outermost")]

    def ask():
        return [(function, local["mine"]) for function, local in _callers.calls_of(*functions)]

    holder = Holder()
    found = outermost(lambda: holder.other(lambda: holder.step(lambda: outermost(ask, 5), 4)))
    assert found == [(functions[0], 5), (functions[1], 4), (functions[0], 3)]
    assert Holder().other(ask) == []


def test_calls_go_on_after_who_has_begun_to_look_is_gone():
    """A generator that has ended has no frame further out."""

    def ask():
        calls = _callers.calls_of((__name__, "outermost"))
        first = next(local["mine"] for _, local in calls)
        return [first, *(local["mine"] for _, local in calls)]

    assert outermost(lambda: outermost(lambda: outermost(ask, 7), 6), 5) == [7, 6, 5]


def test_methods_come_with_their_objects():
    inner, outer = Holder(), Holder()

    def ask(*name):
        # Around them are the methods of pytest.
        found = [each for each in _callers.methods(*name) if isinstance(each[0], Holder)]
        return [(owner, local["mine"]) for owner, local in found]

    def run(*name):
        return outer.step(lambda: outermost(lambda: inner.other(lambda: ask(*name))))

    assert run() == [(inner, 2), (outer, 1)]
    assert run("step") == [(outer, 1)]
    assert run("neither") == []
