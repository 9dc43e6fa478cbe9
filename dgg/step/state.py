# SPDX-License-Identifier: BSD-3-Clause
"""How the state of a parameter is made: moments, step counts and master weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dgg import anchor, backends, reference, sharding


def make(opt, param: Tensor, names: Iterable[str]) -> None:
    """Makes what is missing of ``names``: moments of zeros, and the master weight."""
    state = opt.state[param]
    for name in names:
        if state.get(name) is not None:
            continue
        if name == "master":
            state[name] = param.detach().to(torch.float32, copy=True)
            continue
        dtype = anchor.storage_dtype(param, opt._settings.state_dtype, "a parameter")
        state[name] = torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )


def step_scalar(opt, param: Tensor, step: Any) -> Tensor:
    """Returns ``step`` as a float32 scalar: beside the parameter if launches write it."""
    device = param.device
    if not backends.launches(backends.choose(opt._settings.backend, device), device):
        device = torch.device("cpu")
    same = isinstance(step, Tensor) and not step.is_neg()
    if same and (step.dtype, step.dim(), step.device) == (torch.float32, 0, device):
        return step
    # Filled there: a copy of a number on the host would be waited for.
    return torch.full((), float(step), dtype=torch.float32, device=device)


def stepped_weight(opt, param: Tensor) -> Tensor:
    """Returns what a step updates for ``param``: its master weight, or the parameter."""
    if not opt._settings.has_master(param):
        return param.detach()
    master = opt.state.get(param, {}).get("master")
    if master is None:
        return param.detach().float()
    # Somebody may have written the parameter since: loaded the best checkpoint, say.
    kept, present = sharding.local(master), sharding.local(param.detach())
    if torch.equal(kept.to(present.dtype), present):
        return master
    return sharding.like(reference.adopted(kept, present), param)
