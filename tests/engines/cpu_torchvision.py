# SPDX-License-Identifier: BSD-3-Clause
"""torchvision beside a torch for the CPU, without its operators."""

from __future__ import annotations

import sys

import torch


def import_torchvision() -> list[torch.library.Library]:
    """Imports torchvision, of which Avalanche and Mammoth need data sets and transforms.

    Its wheels on PyPI are for torch's CUDA builds. Beside a torch for the CPU its operators do not
    load, and it fails where it describes two of
    them. They are declared here and never called. The caller keeps what is returned.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return [declared]
    return []
