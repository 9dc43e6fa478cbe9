# SPDX-License-Identifier: BSD-3-Clause
"""Who holds which part of the parameters: DTensor, FSDP1, ZeroRedundancyOptimizer."""

from dgg.sharding.dtensor import (
    Place,
    Shards,
    all_equal_dtensors,
    box_of,
    check,
    is_dtensor,
    keeps_values_elsewhere,
    like,
    local,
    shard_of,
)
from dgg.sharding.ownership import Lost, ProcessGroup, RankShare, Sharded
from dgg.sharding.reduction import Reduction, on_all_or_none, sum_partial_gradients

__all__ = [
    "Place", "Lost", "ProcessGroup", "RankShare", "Reduction", "Sharded", "Shards",
    "all_equal_dtensors", "box_of", "check", "is_dtensor", "keeps_values_elsewhere", "like",
    "local", "on_all_or_none", "shard_of", "sum_partial_gradients",
]  # fmt: skip
