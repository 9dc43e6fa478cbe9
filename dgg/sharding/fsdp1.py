# SPDX-License-Identifier: BSD-3-Clause
"""FullyShardedDataParallel (FSDP1): which run of a parameter's elements each rank holds.

With ``use_orig_params=True`` every rank holds each parameter as a flat, possibly empty run of its
elements, a plain tensor without place and process group. FSDP1's handles have these, but no
parameter refers to its handle: the handles are searched for once per optimizer.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Run(NamedTuple):
    """The run of a parameter's elements on this rank."""

    group: Any  # over whose ranks the parameter is sharded; None if every rank has all of it
    start: int  # row-major index of the run's first element in the whole parameter


def is_one(param: Tensor) -> bool:
    """Returns whether FSDP1 has taken a parameter into one of its flat ones."""
    return getattr(param, "_fsdp_flattened", False)


def is_empty(param: Tensor) -> bool:
    """Returns whether none of the elements of a parameter of FSDP1 is on this rank."""
    return is_one(param) and param.numel() == 0


def check(param: Tensor, label: str) -> None:
    """Raises a ValueError if ``param`` is a flat parameter, of which no element has a name."""
    if getattr(param, "_is_flat_param", False):
        raise ValueError(
            f"{label} is FSDP1's flat parameter, in which tensors have no beginning and no end; "
            "build the model with FullyShardedDataParallel(..., use_orig_params=True)"
        )


def runs(params: Sequence[Tensor]) -> dict[int, Run]:
    """Returns the runs of the parameters that FSDP1 has flattened, by place in ``params``.

    Raises:
        RuntimeError: The handle of one is not to be found.
    """
    places = {id(p): place for place, p in enumerate(params) if is_one(p)}
    if not places:
        return {}
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    run_of: dict[int, Run] = {}
    for handle in [x for x in gc.get_objects() if type(x) is FlatParamHandle]:
        flat = handle.flat_param
        group = handle.process_group if handle.uses_sharded_strategy else None
        for number, param in enumerate(flat._params or ()):
            if id(param) in places:
                start = flat._shard_param_infos[number].intra_param_start_idx
                run_of[places[id(param)]] = Run(group, start or 0)
    if len(run_of) < len(places):
        raise RuntimeError(
            f"{len(places) - len(run_of)} parameters were taken by FSDP1, but their "
            "FullyShardedDataParallel modules are not to be found: were they deleted, or hidden "
            "by gc.freeze()? Call gc.unfreeze(), or use torch.distributed.fsdp.fully_shard"
        )
    return run_of
