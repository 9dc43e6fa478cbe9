# SPDX-License-Identifier: BSD-3-Clause
"""A replay buffer: a fixed number of examples of every old task, mixed into new batches exactly.

The paper trains on T_t ∪ M, the new task together with a small memory M of old examples. This is M.

    buffer = ReplayBuffer(per_task=500, seed=0)
    for name, dataset in tasks:
        for batch in loader:
            batch = buffer.mix(batch, ratio=0.25)  # a quarter of what is seen is old, exactly
            ...
        buffer.add_task(dataset, name)

Examples can be anything. The buffer hands out copies of what was put in. It has its own generator
and touches no global one. `state_dict()` holds plain containers and the examples, so `torch.save`
and `torch.load(weights_only=True)` carry it wherever the examples allow that.
"""

from dgg.replay.buffer import ReplayBuffer
from dgg.replay.passes import _Pass as _Pass  # pickled buffers name it here

__all__ = ["ReplayBuffer"]
