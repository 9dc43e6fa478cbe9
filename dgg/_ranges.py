# SPDX-License-Identifier: BSD-3-Clause
"""Named ranges of a step for profilers, free when nobody listens.

torch.profiler sees them while it records. Nsight Systems sees them as NVTX ranges in a process that
it has started, which an environment variable says, or where ``DGG_NVTX=1`` is set.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch.autograd import profiler

_QUIET = contextlib.nullcontext()
_listening: bool | None = None


def record(name: str) -> contextlib.AbstractContextManager:
    """Returns a context that shows as ``name`` in a profile, and does nothing without a profiler.

    Args:
        name: ``dgg.step``, ``dgg.norm``, ``dgg.allreduce``, ``dgg.update`` or ``dgg.prefetch``.
    """
    global _listening
    if profiler._is_profiler_enabled:
        return torch.profiler.record_function(name)
    if _listening is None:
        # Not at import, because it initialises CUDA.
        wanted = os.environ.get("DGG_NVTX", "NVTX_INJECTION64_PATH" in os.environ)
        _listening = wanted not in ("", "0", False) and torch.cuda.is_available()
    return torch.cuda.nvtx.range(name) if _listening else _QUIET
