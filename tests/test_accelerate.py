# SPDX-License-Identifier: BSD-3-Clause
"""dgg under accelerate: wrapping, accumulation, checkpoints, GradScaler, names instead of code."""

import copy
import dataclasses
import importlib
import types

import pytest
import torch

import dgg

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

CLASSES = [dgg.AdamW, dgg.Adam, dgg.SGD]


@pytest.fixture(autouse=True)
def fresh_accelerate(one_thread):
    # accelerate keeps its settings in process-wide singletons.
    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


def tiny():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def examples(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


def settings(cls, **extra):
    moments = {"momentum": 0.9} if cls is dgg.SGD else {}
    return {"lr": 0.05, "alpha": 0.5, "seed": 3, **moments, **extra}


def train(model, opt, batches, backward=torch.Tensor.backward):
    for x in batches:
        backward(model(x).square().mean())
        opt.step()
        opt.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_alpha_is_set_in_the_groups_and_not_on_the_wrapper():
    """accelerate's wrapper keeps an attribute to itself, as docs/troubleshooting.md says."""
    opt = dgg.AdamW(tiny().parameters(), alpha=0.5)
    wrapped = accelerate.Accelerator(cpu=True).prepare(opt)
    wrapped.alpha = 0.3
    assert [group["alpha"] for group in opt.param_groups] == [0.5]
    with pytest.raises(AttributeError, match="param_groups"):
        dgg.unwrap(wrapped).alpha = 0.3
    for group in wrapped.param_groups:
        group["alpha"] = 0.3
    assert [group["alpha"] for group in dgg.unwrap(wrapped).param_groups] == [0.3]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_prepare_never_stepped(cls):
    """prepare() loads the empty state back into it: nothing may be made up or forgotten."""
    model = tiny()
    opt = cls(model.parameters(), **settings(cls, strength=0.7, granularity="element"))
    before = copy.deepcopy(opt.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, opt)
    assert type(wrapped) is AcceleratedOptimizer
    assert dgg.unwrap(wrapped) is opt and dgg.unwrap(opt) is opt
    assert opt.state_dict() == before
    assert not opt.state

    plain = tiny()
    alone = cls(plain.parameters(), **settings(cls, strength=0.7, granularity="element"))
    for m, o, backward in (
        (model, wrapped, accelerator.backward),
        (plain, alone, torch.Tensor.backward),
    ):
        train(m, o, examples(2), backward)
        dgg.unwrap(o).set_anchor()
        train(m, o, examples(4), backward)
    assert_equal(weights(model), weights(plain))
    assert alone.param_groups[0]["draw_index"] == opt.param_groups[0]["draw_index"] == 6


@pytest.mark.parametrize("names", [["_optimizer"], ["optim"], ["optimizer", "basic_optimizer"]])
def test_unwrap_sees_through_wrappers_by_where_they_keep_it(names):
    """Lightning's, Megatron's and DeepSpeed's keep the optimizer under these names."""
    opt = wrapped = dgg.AdamW(tiny().parameters())
    for name in names:
        wrapped = types.SimpleNamespace(**{name: wrapped})
    assert dgg.unwrap(wrapped) is opt


def test_unwrap_of_others_raises():
    model = tiny()
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="AcceleratedOptimizer > AdamW"):
        dgg.unwrap(wrapped)
    with pytest.raises(TypeError):
        dgg.unwrap(None)


@pytest.mark.parametrize("cls", CLASSES)
def test_prepare_with_an_anchor(cls):
    """An optimizer prepared in the middle of its work keeps anchor, dtype and draws."""
    model = tiny()
    opt = cls(model.parameters(), **settings(cls, anchor_dtype=torch.bfloat16))
    opt.set_anchor()
    train(model, opt, examples(3))
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    other = cls(twin.parameters(), **settings(cls, anchor_dtype=torch.bfloat16))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    anchors = [opt.state[p]["anchor"].clone() for p in model.parameters()]

    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, opt)
    now = [opt.state[p]["anchor"] for p in model.parameters()]
    assert all(a.dtype == torch.bfloat16 for a in now)
    assert_equal(now, anchors)
    for m, o in ((model, wrapped), (twin, other)):
        train(m, o, examples(5))
    assert_equal(weights(model), weights(twin))


def test_accumulation_draws_once_per_step():
    """Eight micro-batches are two optimizer steps, two draws and two scheduler steps."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = tiny()
    opt = dgg.AdamW(model.parameters(), **settings(dgg.AdamW))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
    model, wrapped, schedule = accelerator.prepare(model, opt, schedule)
    opt.set_anchor()
    steps = []
    opt.register_step_post_hook(lambda *_: steps.append(opt.param_groups[0]["draw_index"]))
    for x in examples(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
    assert steps == [1, 2]
    assert opt.state[next(model.parameters())]["step"].item() == 2
    assert schedule.get_last_lr() == [pytest.approx(0.05 / 3)]

    # By hand: the mean over four micro-batches, then one step.
    plain = tiny()
    alone = dgg.AdamW(plain.parameters(), **settings(dgg.AdamW))
    alone.set_anchor()
    for step in range(2):
        for x in examples(8)[4 * step : 4 * step + 4]:
            (plain(x).square().mean() / 4).backward()
        alone.param_groups[0]["lr"] = 0.05 / (1 + step)
        alone.step()
        alone.zero_grad()
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_closure():
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny()
    opt = dgg.AdamW(model.parameters(), **settings(dgg.AdamW))
    model, wrapped = accelerator.prepare(model, opt)
    before, calls = weights(model), []

    def closure():
        wrapped.zero_grad()
        loss = model(examples(1)[0]).square().mean()
        accelerator.backward(loss)
        calls.append(loss)
        return loss

    wrapped.step(closure)
    assert len(calls) == 1
    assert not torch.equal(before[0], weights(model)[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_save_state_and_load_state(cls, tmp_path):
    """accelerator.save_state in the middle of a guided task; a new process goes on bit for bit."""

    def build():
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny()
        opt = cls(model.parameters(), **settings(cls))
        return accelerator, *accelerator.prepare(model, opt)

    accelerator, model, wrapped = build()
    train(model, wrapped, examples(2))
    dgg.unwrap(wrapped).set_anchor()
    train(model, wrapped, examples(3))
    accelerator.save_state(tmp_path / "state")
    train(model, wrapped, examples(5))

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator, again, rewrapped = build()
    accelerator.load_state(tmp_path / "state")
    opt = dgg.unwrap(rewrapped)
    assert opt.param_groups[0]["draw_index"] == 5
    assert opt.param_groups[0]["task_index"] == 1
    train(again, rewrapped, examples(5))
    assert_equal(weights(again), weights(model))
    old = dgg.unwrap(wrapped)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert_equal([opt.state[p]["anchor"]], [old.state[q]["anchor"]])


# -- GradScaler -----------------------------------------------------------------------------------


def scaled(cls, **extra):
    """Accelerate's wrapper with a scaler; its fp16 mode itself wants a GPU, the scaler does not."""
    model = tiny()
    opt = cls(model.parameters(), **settings(cls, **extra))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    accelerate.Accelerator(cpu=True)
    return model, opt, scaler, AcceleratedOptimizer(opt, scaler=scaler)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("unscale", [False, True])
def test_scaler_unscales_once(cls, unscale):
    """With or without unscale_(): the same steps as without a scaler (which is a power of two)."""
    model, opt, scaler, wrapped = scaled(cls)
    plain = tiny()
    alone = cls(plain.parameters(), **settings(cls))
    opt.set_anchor()
    alone.set_anchor()
    for x in examples(6):
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(opt)
        wrapped.step()
        wrapped.zero_grad()
    train(plain, alone, examples(6))
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert opt.param_groups[0]["draw_index"] == 6


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_scaler_skips_on_inf(cls, unscale, fused):
    """Nothing changes; a step that is fused is called, counts a draw and says that it skipped."""
    model, opt, scaler, wrapped = scaled(cls)
    opt._settings = dataclasses.replace(
        opt._settings, unscales=fused
    )  # as fused=True does where there is a compiled backend
    opt.set_anchor()
    x = examples(1)[0]

    def step(factor):
        scaler.scale(model(x).square().mean() * factor).backward()
        if unscale:
            scaler.unscale_(opt)
        wrapped.step()
        wrapped.zero_grad()

    step(1.0)
    assert opt.last_step_skipped is False
    before = weights(model)
    state = copy.deepcopy(opt.state_dict()["state"])
    step(float("inf"))
    assert opt.last_step_skipped is fused
    assert_equal(weights(model), before)
    after = opt.state_dict()["state"]
    for key, entry in state.items():
        for name, value in entry.items():
            assert torch.equal(after[key][name], value), name
    assert opt.param_groups[0]["draw_index"] == 1 + fused
    assert scaler.get_scale() == 2.0**7
    # accelerate only sees that step() was called; it would let the scheduler run on. When this
    # fails accelerate has learnt to ask: https://github.com/huggingface/accelerate/issues/4242
    assert wrapped.step_was_skipped is not fused
    step(1.0)
    assert opt.last_step_skipped is False
    assert not torch.equal(weights(model)[0], before[0])
    assert opt.param_groups[0]["draw_index"] == 2 + fused


# -- frameworks that know a name only -------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("module", ["dgg", "dgg.optim"])
def test_class_path(name, module):
    """The way Lightning's CLI, Hydra and torchtune make an optimizer out of a configuration."""
    spec = {"class_path": f"{module}.{name}", "init_args": {"lr": 0.01, "alpha": 0.1}}
    path, _, attribute = spec["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(path), attribute)
    assert issubclass(cls, getattr(torch.optim, name))
    model = tiny()
    opt = cls(model.parameters(), **spec["init_args"])
    train(model, opt, examples(1))
    assert opt.param_groups[0]["alpha"] == 0.1
    assert opt.param_groups[0]["draw_index"] == 1
