# SPDX-License-Identifier: BSD-3-Clause
"""The small cases of the step benchmark for pytest-benchmark: ``pytest bench --benchmark-only``.

Shares workloads, variants and verification with step.py. pytest-benchmark runs one variant after
the other, not in turns, so compare versions of dgg with it and use step.py to compare dgg with
its peers.
"""

import pytest
import torch

from machine import open_device
from parameter_lists import many_tiny, one_tensor
from peers import IMPLEMENTATIONS, Unavailable
from round_robin import verify
from workload import (
    CLIPPED,
    GUIDED,
    PLAIN,
    REPLAY,
    REPLAY_CLIPPED,
    REPLAY_GUIDED,
    Verifier,
    Workload,
    sampled,
)

pytest.importorskip("pytest_benchmark")

SHAPES = {"1e4": one_tensor(10**4), "1e6": one_tensor(10**6), "448x8": many_tiny()}
RUNS = [
    ("dgg cpp", PLAIN),
    ("dgg cpp", CLIPPED),
    ("dgg cpp", GUIDED),
    ("dgg cpp", sampled(0.2)),
    ("dgg reference", GUIDED),
    ("torch fused", PLAIN),
    ("torch fused", CLIPPED),
    ("foreach + fused", GUIDED),
    ("foreach + fused, d kept", GUIDED),
    ("for-loop", GUIDED),
    ("dgg cpp", REPLAY),
    ("dgg cpp", REPLAY_GUIDED),
    ("add + torch fused", REPLAY_CLIPPED),
    ("dgg Guidance + torch fused", GUIDED),
]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("name", "setting"), RUNS, ids=lambda x: getattr(x, "name", x))
def test_step(benchmark, name, setting, size):
    """Times one verified variant; gradients are written anew before every step."""
    device = open_device("cpu")
    work = Workload(SHAPES[size], torch.float32, "adamw", device.device, replay=setting.replay)
    try:
        variant = IMPLEMENTATIONS[name](work, setting)
        benchmark.extra_info["error_in_tolerances"] = verify(variant, Verifier(work))
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"adamw float32 {size}"
    benchmark.pedantic(variant, setup=variant.ready, rounds=20, warmup_rounds=2)
    assert work.finite()
