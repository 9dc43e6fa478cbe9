# SPDX-License-Identifier: BSD-3-Clause
"""Types of options: the texts that each of them takes, and what several signatures share."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup
else:  # a torch without torch.distributed has none
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", object)

Alpha = float | Tensor | Literal["auto"]
# One for all tasks, one for each of them in order, or by number.
_Fixed = float | Literal["auto"]
Alphas = _Fixed | Sequence[_Fixed] | Mapping[int, _Fixed]
Backend = Literal["reference", "cpp", "triton"]
Granularity = Literal["step", "tensor", "element"]
MergeRule = Literal["mean", "fisher", "rows"]
NormScope = Literal["global", "tensor"]
Route = Literal["gradient", "first_moment", "decoupled"]

# Tensors by name, or the path of a file or a directory that has them.
TensorsOrPath = Mapping[str, Tensor] | str | os.PathLike[str]
