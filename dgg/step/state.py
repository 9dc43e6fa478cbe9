# SPDX-License-Identifier: BSD-3-Clause
"""Making the state of a parameter: moments, step counts and master weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dgg import anchor, backends, reference, sharding


def make(opt, param: Tensor, names: Iterable[str]) -> None:
    """Makes the missing ones of ``names``: moments of zeros, and the master weight."""
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
    # torch.full, not a copy of a number on the host, which would synchronise.
    return torch.full((), float(step), dtype=torch.float32, device=device)


def stepped_weight(opt, param: Tensor) -> Tensor:
    """Returns the tensor that a step updates for ``param``: its master weight, or itself."""
    if not opt._settings.has_master(param):
        return param.detach()
    master = opt.state.get(param, {}).get("master")
    if master is None:
        return param.detach().float()
    # Somebody may have written the parameter since the last step: loaded a checkpoint, say.
    master_shard, shard = sharding.local(master), sharding.local(param.detach())
    if torch.equal(master_shard.to(shard.dtype), shard):
        return master
    return sharding.like(reference.adopted(master_shard, shard), param)
