# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_anchors.py runs; started by torch.multiprocessing."""

from __future__ import annotations

import json
import pathlib

import torch
import torch.distributed as dist

import dgg
import ranks
import training
from dgg import anchor


def network(seed: int) -> torch.nn.Module:
    """Layers whose rows do not divide by the ranks, one with fewer rows than ranks."""
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(6, 8),
            "second": torch.nn.Linear(8, 7, bias=False),
            "norm": torch.nn.LayerNorm(7),
            "last": torch.nn.Linear(7, 5),
            "one": torch.nn.Linear(5, 1),
        }
    )


def save_sharded(model: torch.nn.Module, folder: pathlib.Path) -> None:
    """Writes a model as save_pretrained does if it is too large for one file."""
    from safetensors.torch import save_file

    folder.mkdir()
    files = {}
    for number, (name, param) in enumerate(model.named_parameters()):
        files[name] = f"model-{number}.safetensors"
        save_file({name: param.detach()}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def shard(model: torch.nn.Module, engine: str, world: int) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh, tensor_mesh = training.meshes_of(engine, world)
    if tensor_mesh is not None:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, tensor_mesh, plan)
    if mesh is not None:
        training.fully_shard(*model.values(), mesh=mesh)


@ranks.in_group
def run(rank: int, world: int, folder: str, engines: tuple[str, ...]) -> None:
    """Sets the anchor from every kind of path; leaves the gathered anchors in ``folder``."""
    import torch.distributed.checkpoint as dcp

    root = pathlib.Path(folder)
    count = 0
    original = anchor.sources._Safetensors.read

    def read(self, name, param):
        nonlocal count
        values = original(self, name, param)
        count += values.numel()
        return values

    anchor.sources._Safetensors.read = read
    for engine in engines:
        source = network(1)
        shard(source, engine, world)
        saved = root / engine
        dcp.save({"model": source.state_dict()}, checkpoint_id=saved)
        model = network(2)
        shard(model, engine, world)
        results = {}
        for path in ("file", "shards", "saved"):
            count = 0
            opt = dgg.AdamW(model.parameters(), alpha=1.0, max_grad_norm=1.0)
            opt.set_anchor(saved if path == "saved" else root / path, model=model, task=1)
            if path == "file":
                results["read"] = count
            results[path] = {
                name: training.whole(opt.state[p]["anchor"]) for name, p in model.named_parameters()
            }
        # What is not finite is refused by the ranks that read it, and changes nothing there.
        before = {n: opt.state[p]["anchor"].clone() for n, p in model.named_parameters()}
        mine = model["last"].bias
        shown = mine.to_local() if hasattr(mine, "to_local") else mine
        try:
            opt.set_anchor(root / "broken", model=model)
        except ValueError as error:
            assert "'last.bias'" in str(error) or "shape (5,)" in str(error), error
            assert shown.numel()
            for name, p in model.named_parameters():
                now = opt.state[p]["anchor"]
                assert torch.equal(*(getattr(x, "_local_tensor", x) for x in (now, before[name])))
            assert opt.param_groups[0]["task_index"] == 1
        else:
            assert not shown.numel()
        torch.save(results, root / f"{engine} {rank}.pt")
        dist.barrier()
