# SPDX-License-Identifier: BSD-3-Clause
"""The one table of shapes, dtypes, hyper-parameters and tolerances, with their reasons."""

from __future__ import annotations

import pytest
import torch

import dgg
from dgg import backends

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Sizes around the kernels' block edges, an empty one, a scalar, and several dimensions.
SHAPES = [(), (1,), (3,), (7, 5), (0,), (2047,), (2048,), (2049,), (33, 64)]
SMALL_SHAPES = [(), (3,), (7, 5), (0,), (65,)]

# No hyper-parameter stands at its neutral value: the wrong and the right formula agree there.
OPTIMIZERS = {
    "adamw": (dgg.AdamW, {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw-amsgrad": (
        dgg.AdamW,
        {"lr": 3e-3, "betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True},
    ),
    "adamw-maximize": (
        dgg.AdamW,
        {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True},
    ),
    "adam": (dgg.Adam, {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "sgd": (dgg.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-momentum": (
        dgg.SGD,
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "sgd-nesterov-maximize": (
        dgg.SGD,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
}

GUIDANCE = {
    "step": {"alpha": 0.6, "strength": 0.7, "max_grad_norm": 3.0},
    "tensor-draws": {"alpha": 0.6, "strength": 0.7, "granularity": "tensor"},
    "element-draws": {"alpha": 0.4, "strength": 0.7, "granularity": "element"},
    "tensor-norms": {"alpha": 0.9, "strength": 1.3, "norm_scope": "tensor", "max_grad_norm": 2.0},
    "unscaled": {"alpha": 1.0, "strength": 0.3, "scaling": False, "max_grad_norm": 5.0},
    "all-elements": {"alpha": 1.0, "strength": 0.7, "granularity": "element"},
}

# One step from the same state, against the same step in float64. The stored value is the exact
# one plus the error of the float32 arithmetic, rounded once to storage: `storage` is the unit
# roundoff of the storage dtype, relative to the value. The arithmetic makes four roundings on the
# way to G = c (g + w r) + b s d (and to its square), each relative to the largest term, which the
# caller passes as `scale`; what follows only shrinks their share. float16 is spaced 2**-24 apart
# near zero, half of which is its absolute rounding.
ROUNDING = {
    F32: {"storage": 2**-24, "arithmetic": 4 * 2**-24, "absolute": 0.0},
    BF16: {"storage": 2**-8, "arithmetic": 4 * 2**-24, "absolute": 0.0},
    F16: {"storage": 2**-11, "arithmetic": 4 * 2**-24, "absolute": 2**-25},
    F64: {"storage": 2**-53, "arithmetic": 4 * 2**-53, "absolute": 0.0},
}

# Parameter, gradient and anchor dtype as users mix them.
MIXES = [
    (F32, F32, None),
    (F64, F64, None),
    (BF16, BF16, None),
    (F16, F16, None),
    (F32, BF16, None),
    (BF16, F32, None),
    (F32, F32, BF16),
    (BF16, BF16, F32),
    (F16, F16, F64),
    (F64, F64, F32),
]


def assert_rounding(actual, exact, scale, what: str) -> None:
    """Asserts that every element of ``actual`` is ``exact`` (float64) rounded to its dtype.

    Args:
        actual: Stored values.
        exact: float64 reference.
        scale: float64, magnitude of the largest term that went into each element, at least 1.
        what: Name for the message.
    """
    rule = ROUNDING[actual.dtype]
    bound = rule["storage"] * exact.abs() + rule["arithmetic"] * scale + rule["absolute"]
    worst = ((actual.double() - exact).abs() / bound).max().item() if exact.numel() else 0.0
    assert worst <= 1.0, f"{what}: {worst:.2f} x the allowed rounding of {actual.dtype}"


def cpp_missing() -> str | None:
    """Returns why the C++ backend cannot run, or None."""
    return backends.unavailable("cpp", torch.device("cpu"))


BACKENDS = [
    "reference",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}"
        ),
    ),
]


def make_params(shapes, dtype, seed=0) -> list[torch.nn.Parameter]:
    """Returns parameters of order one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
        for shape in shapes
    ]


def set_grads(params, generator, *, dtype=None, missing=()) -> None:
    """Gives every parameter but those in ``missing`` a gradient of order one."""
    for place, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=F64)
        if p.is_complex():
            grad = torch.complex(grad, torch.randn(p.shape, generator=generator, dtype=F64))
        if dtype not in (None, p.dtype):
            p.grad_dtype = None  # any
        p.grad = None if place in missing else grad.to(dtype or p.dtype)
