# SPDX-License-Identifier: BSD-3-Clause
"""dgg in torchtitan's Trainer: two tasks over FSDP2, resumed from its own checkpoints."""

from __future__ import annotations

import pytest

from ranks import run
from recipes import need

need("torchtitan", "torchtitan")


@pytest.mark.timeout(1200)  # it imports half of torch on every rank
def test_the_recipe_on_two_tasks(tmp_path):
    """The recipe is run by every rank, for every task: `torchtitan_worker.train`."""
    import torchtitan_worker

    run(torchtitan_worker.two_tasks, 2, 2, str(tmp_path))
