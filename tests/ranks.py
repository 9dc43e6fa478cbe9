# SPDX-License-Identifier: BSD-3-Clause
"""Starts the ranks of a test: processes forked from a server that has imported what they need.

A process that imports torch's distributed packages anew takes five to ten seconds to begin, four
on two cores four times that; forked from a server it takes none. The server has run no thread and
holds no process group, so its children are as clean as new ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_IMPORTS = [
    "dgg",
    "safetensors.torch",
    "torch._dynamo",  # which torch.optim imports when an optimizer is used
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing",
]


def server():
    """Returns a multiprocessing context whose processes begin with the imports done."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def run(function: Callable, world: int, *arguments) -> None:
    """Runs ``function(rank, *arguments)`` on every rank; raises what any of them raises."""
    server()
    torch.multiprocessing.start_processes(
        function, args=arguments, nprocs=world, start_method="forkserver"
    )
