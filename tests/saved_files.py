# SPDX-License-Identifier: BSD-3-Clause
"""Writes small files as users keep them, for later versions to read (see test_saved_files.py).

    python -P tests/saved_files.py tests/saved/$(git rev-parse --short HEAD)

Run it at a commit whose files are to be readable for ever, and commit what it wrote.
"""

from __future__ import annotations

import pathlib
import pickle
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dgg

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"amsgrad": True},
    "Adam": {"max_grad_norm": 0.5},
    "SGD": {"momentum": 0.9},
    "Guidance": {},
    "AdamW master": {"master_weights": True},
}


def make(name: str) -> tuple[list[Tensor], Any, Any]:
    """Returns parameters, the optimizer that steps them, and the one with the guidance."""
    generator = torch.Generator().manual_seed(7)
    dtype = torch.bfloat16 if name.endswith("master") else torch.float32
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((5,), (2, 3))
    ]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]
    options = {"alpha": 0.5, "seed": 3, "backend": "reference", **OPTIMIZERS[name]}
    if name == "Guidance":
        base = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return params, base, dgg.Guidance(base, **options)
    optimizer = getattr(dgg, name.split()[0])(groups, lr=0.05, **options)
    return params, optimizer, optimizer


def steps(params: list[Tensor], optimizer: Any, numbers: range) -> None:
    """Makes the steps of these numbers, with gradients that depend on nothing else."""
    for number in numbers:
        for place, p in enumerate(params):
            values = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
            p.grad = (((5 * values + 3 * place + 7 * number) % 11 - 5) / 8).to(p.dtype)
        optimizer.step()


def batches(buffer: dgg.ReplayBuffer) -> Iterator[list[Any]]:
    """Returns the batches of a pass over numbers, or what is left of one."""
    return buffer.batches(range(10), 4, ratio=0.25)


def write(folder: pathlib.Path) -> None:
    """Writes every file into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OPTIMIZERS:
        params, optimizer, guided = make(name)
        steps(params, optimizer, range(3))
        guided.set_anchor(task=1)
        steps(params, optimizer, range(3, 5))
        saved = {
            "params": [p.detach().clone() for p in params],
            "optimizer": optimizer.state_dict(),
            "guidance": guided.state_dict(),
        }
        # A copy: the state dict has the tensors themselves.
        saved = pickle.loads(pickle.dumps(saved))
        pickled = None if name == "Guidance" else pickle.dumps(optimizer)
        steps(params, optimizer, range(5, 9))
        saved["then"] = [p.detach() for p in params]
        torch.save(saved, folder / f"{name.replace(' ', '_')}.pt")
        if pickled is not None:
            (folder / f"{name.replace(' ', '_')}.pickle").write_bytes(pickled)
    buffer = dgg.ReplayBuffer(6, seed=2)
    buffer.add_task([{"x": torch.tensor([float(i)]), "text": str(i)} for i in range(9)])
    torch.save(buffer.state_dict(), folder / "ReplayBuffer.pt")
    # A pickle has a pass that is under way, too.
    next(batches(buffer))
    (folder / "ReplayBuffer.pickle").write_bytes(pickle.dumps(buffer))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(pathlib.Path(sys.argv[1]))
