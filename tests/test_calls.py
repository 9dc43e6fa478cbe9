# SPDX-License-Identifier: BSD-3-Clause
"""How much Python a step is: few frames down to the operator, and few calls in all."""

import pathlib
import sys

import pytest
import torch

import dgg
from dgg import backends

NO_CPP = backends.unavailable("cpp", torch.device("cpu"))
pytestmark = pytest.mark.skipif(NO_CPP is not None, reason=f"backend cpp: {NO_CPP}")

PACKAGE = str(pathlib.Path(dgg.__file__).parent)
# The most calls of our functions in a guided, clipped step of four tensors.
CALLS = {"AdamW": 85, "Adam": 85, "SGD": 85, "Guidance": 120}
# step(), run(), update_() and the operator. A Guidance's first frame is torch's wrapper of hooks.
FRAMES = 4


def make(kind):
    params = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
    options = {"alpha": 1.0, "max_grad_norm": 1.0, "backend": "cpp"}
    if kind == "Guidance":
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        guided = dgg.Guidance(optimizer, **options)
    else:
        more = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = guided = getattr(dgg, kind)(params, lr=0.1, **more, **options)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    guided.set_anchor()
    for _ in range(3):
        step()
    for p in params:
        p.grad = torch.ones_like(p)
    return optimizer, guided


def profiled(kind):
    """Returns the names of our functions that a step calls, and of the frames to its operator."""
    optimizer, guided = make(kind)
    stack, calls, chains = [], [], []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call":
            stack.append((code.co_filename, code.co_name))
            if code.co_filename.startswith(PACKAGE):
                calls.append(code.co_name)
        elif event == "return" and stack:
            stack.pop()
        elif event == "c_call" and stack and stack[-1][1] in ("update_", "guide_"):
            chains.append([name for file, name in stack if file.startswith(PACKAGE)])

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert guided.guidance_stats()["injected"]
    return calls, chains


@pytest.mark.parametrize("kind", CALLS)
def test_few_calls_in_a_step(kind):
    calls, _ = profiled(kind)
    assert len(calls) <= CALLS[kind], sorted(calls)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_four_frames_to_the_operator(kind):
    _, chains = profiled(kind)
    assert chains, "the operator was not seen"
    # The operator's own frame is the last of the four.
    assert {tuple(chain) for chain in chains} == {("step", "run", "update_")}
    assert len(chains[0]) + 1 <= FRAMES
