# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in: where nothing guides, each class is its torch.optim namesake.

- Every configuration of torch's own table (``optim_db``) over 100 steps, for every dtype and
  backend, in three neutral settings: no anchor, alpha = 0, strength = 0; the tolerances are
  ``torch.testing.assert_close``'s defaults of the dtype. float32, float64 and complex64 against
  torch's single-tensor path; Adam in bfloat16 and float16 against torch's fused path, which
  computes in float32 as dgg does (the single-tensor path rounds every intermediate to 8 bits).
- State keys, group keys, signatures and defaults are torch's.
- Empty, scalar, strided, channels_last and complex parameters; gradients that come and go.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import dgg
from cases import BACKENDS, BF16, F16, F32, F64, make_params, set_grads

STEPS = 100
CLASSES = {torch.optim.AdamW: dgg.AdamW, torch.optim.Adam: dgg.Adam, torch.optim.SGD: dgg.SGD}

TABLE = [
    pytest.param(info.optim_cls, entry.kwargs, id=f"{info.optim_cls.__name__}-{entry.desc}")
    for info in optim_db
    if info.optim_cls in CLASSES
    for entry in info.optim_inputs_func(device="cpu")
]
NEUTRAL = {
    "no-anchor": ({}, False),
    "alpha-0": ({"alpha": 0.0}, True),
    "strength-0": ({"alpha": 1.0, "strength": 0.0}, True),
}


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def round_to(dtype, optimizer, params):
    """Rounds float32 parameters and state to a narrow dtype, as storing them there would."""
    with torch.no_grad():
        for q in params:
            for tensor in (q, *optimizer.state[q].values()):
                if tensor is not None and tensor.dim():
                    tensor.copy_(tensor.to(dtype))


def follow(
    torch_class,
    kwargs,
    params,
    ours_kwargs,
    anchor,
    *,
    torch_kwargs=None,
    steps=STEPS,
    gaps=True,
    rounded=None,
    drift=0.0,
):
    """Steps both optimizers side by side and compares parameters and state."""
    mirror = copies(params)
    if rounded is not None:
        mirror = [torch.nn.Parameter(q.detach().float()) for q in mirror]
    theirs = torch_class(mirror, **kwargs, **(torch_kwargs or {}))
    ours = CLASSES[torch_class](params, **kwargs, **ours_kwargs)
    if anchor:
        with torch.no_grad():
            for p in params:
                p.add_(1)
            ours.set_anchor()
            for p in params:
                p.sub_(1)
            for p, q in zip(params, mirror, strict=True):
                p.copy_(q)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        set_grads(params, generator, missing=(step % 7,) if gaps else ())
        for p in params:
            if p.grad is not None and drift:
                p.grad += drift
        for p, q in zip(params, mirror, strict=True):
            q.grad = None if p.grad is None else p.grad.to(q.dtype, copy=True)
        theirs.step()
        ours.step()
        if rounded is not None:
            round_to(rounded, theirs, mirror)
    for p, q in zip(params, mirror, strict=True):
        torch.testing.assert_close(p, q.to(p.dtype))
        for key, value in theirs.state[q].items():
            stored = ours.state[p][key]
            torch.testing.assert_close(stored, value.to(stored.dtype))
        assert set(ours.state[p]) - {"anchor"} == set(theirs.state[q])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize(("torch_class", "kwargs"), TABLE)
def test_follows_torch(torch_class, kwargs, neutral, backend):
    options, anchor = NEUTRAL[neutral]
    params = make_params([(8, 5), (7,), ()], F32)
    follow(torch_class, kwargs, params, {**options, "backend": backend}, anchor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, torch.complex64])
@pytest.mark.parametrize(("torch_class", "kwargs"), TABLE)
def test_follows_torch_in_other_dtypes(torch_class, kwargs, dtype, backend):
    params = make_params([(8, 5), (7,), ()], dtype)
    follow(torch_class, kwargs, params, {"backend": backend}, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("torch_class", "kwargs"), TABLE)
def test_follows_torch_in_narrow_dtypes(torch_class, kwargs, dtype, backend):
    # Adam against torch's fused path: float32 arithmetic like ours. torch's fused SGD on the CPU
    # is no measure here (one step of lr 0.01 in float16 is 20 roundings off the exact one), and
    # its single-tensor path rounds every intermediate, so SGD goes against torch.optim.SGD in
    # float32 with what it stores rounded after every step.
    # Parameters and buffers stay away from zero: two roundings that once fall apart by an ulp stay
    # apart by that amount, which is relative to the value of then.
    params = make_params([(8, 8), (32,)], dtype)
    with torch.no_grad():
        for p in params:
            p.add_(4 * p.sign())
    if torch_class is torch.optim.SGD:
        follow(torch_class, kwargs, params, {"backend": backend}, False, rounded=dtype, drift=1.0)
    else:
        fused = {"fused": True}
        follow(torch_class, kwargs, params, {"backend": backend}, False, torch_kwargs=fused)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("torch_class", CLASSES)
def test_follows_torch_on_odd_layouts(torch_class, backend):
    kwargs = {"lr": 0.01, "weight_decay": 0.1}
    if torch_class is torch.optim.SGD:
        kwargs["momentum"] = 0.9
    images = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    every_second = torch.randn(9, 8)[:, ::2]
    params = [
        torch.nn.Parameter(images),
        torch.nn.Parameter(torch.randn(6, 9).t()),
        torch.nn.Parameter(every_second),
        torch.nn.Parameter(torch.randn(3, 1, 4).transpose(0, 1)),
        torch.nn.Parameter(torch.empty(0, 4)),
        torch.nn.Parameter(torch.randn(5, 4, dtype=torch.complex64).t()),
    ]
    follow(torch_class, kwargs, params, {"backend": backend}, False, steps=20)
    follow(torch_class, kwargs, params, {"backend": backend, "alpha": 0.0}, True, steps=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_other_strides_than_the_parameter(backend):
    weight = torch.nn.Parameter(torch.randn(6, 9))
    mirror = torch.nn.Parameter(weight.detach().clone())
    ours = dgg.AdamW([weight], lr=0.01, backend=backend)
    theirs = torch.optim.AdamW([mirror], lr=0.01)
    for _ in range(5):
        weight.grad = torch.randn(9, 6).t()
        mirror.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, mirror)


@pytest.mark.parametrize(("torch_class", "ours"), CLASSES.items())
def test_signature_and_defaults_are_torchs(torch_class, ours):
    theirs = inspect.signature(torch_class).parameters
    mine = inspect.signature(ours).parameters
    for name, parameter in theirs.items():
        assert name in mine
        assert mine[name].default == parameter.default
        assert mine[name].kind == parameter.kind
    for name in mine.keys() - theirs.keys():
        assert mine[name].kind is inspect.Parameter.KEYWORD_ONLY
    p = torch.nn.Parameter(torch.zeros(1))
    group = torch_class([p]).param_groups[0]
    assert group.items() <= ours([p]).param_groups[0].items()
    assert isinstance(ours([p]), torch_class)


def test_foreach_and_fused_choose_the_backend():
    p = torch.nn.Parameter(torch.zeros(2))
    assert dgg.AdamW([p], fused=False)._settings.backend == "reference"
    assert dgg.AdamW([p], foreach=False)._settings.backend == "reference"
    assert dgg.AdamW([p])._settings.backend is None
