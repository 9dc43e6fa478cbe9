# SPDX-License-Identifier: BSD-3-Clause
"""Starts the ranks of a test: processes forked from a server that has imported what they need.

A process that imports torch's distributed packages anew takes five to ten seconds to begin, four
on two cores four times that; forked from a server it takes none. The server has run no thread and
holds no process group, so its children are as clean as new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

# All that the ranks of any test need: the server starts once, whatever test comes first. What is
# not installed is passed over.
_IMPORTS = [
    "dgg",
    "peft",
    "safetensors.torch",
    "torch._dynamo",  # which torch.optim imports when an optimizer is used
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
]


def server():
    """Returns a multiprocessing context whose processes begin with the imports done."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the imports come
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def run(function: Callable, world: int, *arguments) -> None:
    """Runs ``function(rank, *arguments)`` on every rank; raises what any of them raises."""
    server()
    torch.multiprocessing.start_processes(
        function, args=arguments, nprocs=world, start_method="forkserver"
    )


def join(rank: int, world: int, folder: str) -> None:
    """Makes the process group, as a launcher's process would find it; meets in ``folder``."""
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )  # fmt: skip
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def leave() -> None:
    """Ends the process group once all ranks are here, so that none still talks to another.

    A rank that failed does not come: the others must not wait for it here, so this stands behind
    the work and in no ``finally``.
    """
    dist.barrier()
    dist.destroy_process_group()


def in_group(function: Callable) -> Callable:
    """Makes of ``function(rank, world, folder, ...)`` what a rank runs: with the group around."""

    @functools.wraps(function)
    def wrapped(rank: int, world: int, folder: str, *arguments) -> None:
        join(rank, world, folder)
        function(rank, world, folder, *arguments)
        leave()

    return wrapped


@contextlib.contextmanager
def refusing(error: type[BaseException], text: str) -> Iterator[None]:
    """Asserts, on a rank, that a block raises this error with this text in its message."""
    try:
        yield
    except error as found:
        assert text in str(found), f"{text!r} is not in {found}"
    else:
        raise AssertionError(f"{text!r} was not refused")


def refused(error: type[BaseException], text: str, call: Callable) -> None:
    """Asserts, on a rank, that a call raises this error with this text in its message."""
    with refusing(error, text):
        call()
