# SPDX-License-Identifier: BSD-3-Clause
"""What is compared: dgg's backends and everything a user would write or install instead."""

from __future__ import annotations

import dgg_variants as ours
import foreign_variants as foreign
import torch_variants as eager
from variant import Variant

IMPLEMENTATIONS: dict[str, type[Variant]] = {
    kind.name: kind
    for kind in (
        ours.DggCpp, ours.DggCppBlock, ours.DggTriton, ours.DggLaunched, ours.DggReference,
        ours.GuidanceOverFused, eager.TorchFused, eager.TorchFusedForeachClip, eager.AddFused,
        eager.AddFusedForeachClip, eager.LoopGuidance, eager.ForeachGuidance, eager.ForeachGuard,
        eager.ForeachGuidanceKeptBuffer, eager.ForeachGuidanceTypical, eager.CompiledGuidance,
        foreign.DeepSpeedCpuAdam, foreign.ApexFusedAdam, foreign.DeepSpeedFusedAdam,
        foreign.BitsAndBytes, foreign.Optimi,
    )
}  # fmt: skip
