# SPDX-License-Identifier: BSD-3-Clause
"""ZeroRedundancyOptimizer: recognising that it is building a local optimizer.

The local optimizer holds only this rank's share of the parameters, and no argument says so. Norms
over the share alone would change the training without an error.
"""

from __future__ import annotations

import sys
from typing import Any

from dgg import _callers


def builder() -> Any | None:
    """Returns the ZeroRedundancyOptimizer that is building the caller, or None.

    Raises:
        ValueError: Its parameters are on several devices.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    for optimizer, _ in _callers.methods():
        if isinstance(optimizer, module.ZeroRedundancyOptimizer):
            # Of all ranks' parameters, so that every rank raises and none waits for the others.
            params = [p for group in optimizer.param_groups for p in group["params"]]
            devices = sorted({str(p.device) for p in params})
            if len(devices) > 1:
                raise ValueError(
                    f"ZeroRedundancyOptimizer over parameters on several devices ({devices}) is "
                    "not supported; build one per device"
                )
            return optimizer
    return None
