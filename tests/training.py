# SPDX-License-Identifier: BSD-3-Clause
"""What the workers of several tests train with: options, data, a loop, meshes, whole results.

A worker trains small networks over several ranks and compares with the same training in one
process. The networks of one engine stand in its worker, and what several workers need stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

import dgg

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
}
# No option has its neutral value.
GUIDED = {"alpha": 0.5, "strength": 0.7, "seed": 2**63 + 9}
REPLAYED = {**GUIDED, "replay_weight": 1.5}
ADAM = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}


# -- optimizers -----------------------------------------------------------------------------------


class Foreign:
    """torch's AdamW under dgg.Guidance, with the face of a guided optimizer."""

    def __init__(self, params, *, lr, betas, weight_decay, eps, **options) -> None:
        self.inner = torch.optim.AdamW(
            params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, foreach=False
        )
        self.guidance = dgg.Guidance(self.inner, **options)
        self.step, self.zero_grad = self.inner.step, self.inner.zero_grad
        self.replay, self.set_anchor = self.guidance.replay, self.guidance.set_anchor
        self.guidance_stats = self.guidance.guidance_stats

    @property
    def param_groups(self):
        return self.guidance.param_groups

    @property
    def state(self):
        params = self.inner.param_groups[0]["params"]
        return {
            p: {**self.inner.state[p], **self.guidance.state[p]}
            for p in params
            if "anchor" in self.guidance.state.get(p, ())
        }


# Name → class and options of the update.
OPTIMIZERS = {
    "adamw": (dgg.AdamW, {**ADAM, "eps": 1e-6}),
    "foreign": (Foreign, {**ADAM, "eps": 1e-6}),
    "sgd": (dgg.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
}


# -- a network and its data -----------------------------------------------------------------------


def stack(width: int, *, seed: int = 7, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Returns layers with uneven and empty shards on 2 and 3 ranks, and a frozen parameter."""
    torch.manual_seed(seed)
    layers = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 5), nn.Linear(5, 1)
    model = nn.Sequential(*layers).to(dtype)
    model[2].bias.requires_grad_(False)
    return model


def numbers_of(k: int) -> torch.Generator:
    """Returns where the random numbers of step k come from, the same on every rank."""
    return torch.Generator().manual_seed(1000 + k)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns normal values, the same but for their rounding in every dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(k: int, samples: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Returns the batch of step k."""
    return normal(numbers_of(k), samples, 6, dtype=dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


# -- the loop -------------------------------------------------------------------------------------


def steps(
    numbers: Iterable[int], *optimizers, boundaries=(), after: Callable[[], None] | None = None,
    **anchor,
) -> Iterator[int]:  # fmt: skip
    """Yields the number of each step; whoever takes it leaves the gradients, replayed ones too.

    Args:
        numbers: The steps.
        optimizers: What is stepped, one after the other, and then has no gradients.
        boundaries: The steps before which anchors are set.
        after: Called when a step is over.
        anchor: Arguments of ``set_anchor()``.
    """
    for k in numbers:
        if k in boundaries:
            for optimizer in optimizers:
                dgg.unwrap(optimizer).set_anchor(**anchor)
        yield k
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if after is not None:
            after()


def fit(model, optimizer, first: int, last: int, *, boundary: int | None = None) -> None:
    """Trains on the same data on every rank; the anchor is set before one of the steps."""
    dtype = next(model.parameters()).dtype
    for k in steps(range(first, last), optimizer, boundaries=(boundary,)):
        loss_of(model, inputs(k, 8, dtype)).backward()


# -- sharding -------------------------------------------------------------------------------------


def meshes_of(engine: str, world: int):
    """Returns the meshes over which FSDP2 and tensor parallelism shard; None where one does not."""
    from torch.distributed.device_mesh import init_device_mesh

    if engine == "FSDP2":
        return init_device_mesh("cpu", (world,)), None
    if engine == "HSDP":
        shape, names = (2, world // 2), ("replicate", "shard")
        return init_device_mesh("cpu", shape, mesh_dim_names=names), None
    if engine == "TP":
        return None, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    assert engine == "TP + FSDP2", engine
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    return mesh["dp"], mesh["tp"]


def fully_shard(*modules: nn.Module, **options) -> None:
    """Shards modules by FSDP2, each as a unit of its own: the inner ones first."""
    from torch.distributed.fsdp import fully_shard as shard

    for module in modules:
        shard(module, **options)


# -- results and their comparison -----------------------------------------------------------------


def whole(x) -> torch.Tensor:
    """Returns a copy as a plain tensor, unsharded; also of what is a number."""
    x = x.detach() if isinstance(x, torch.Tensor) else torch.tensor(x)
    # What is replicated is its own whole: the copy is made in any case.
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


def whole_state(optimizer, named: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the whole state of named parameters."""
    state = optimizer.state
    return {
        name: {key: whole(value) for key, value in state[p].items()} for name, p in named.items()
    }


def assert_close(values, expected, dtype: torch.dtype = torch.float64) -> None:
    """Asserts that tensors agree one by one, whatever the order of their sums was."""
    for mine, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), **TOLERANCES[dtype])


def assert_same_on_all_ranks(tensors) -> None:
    """Asserts that all ranks have the same bits."""
    flat = torch.cat([x.detach().double().flatten() for x in tensors])
    everywhere = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat)
    assert all(torch.equal(x, flat) for x in everywhere)
