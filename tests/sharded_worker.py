# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_sharding.py runs; started by torch.multiprocessing."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from itertools import pairwise

import torch
import torch.distributed as dist

import dgg
import ranks
import training
from dgg import _ranges

SHAPES = [(7, 5), (4,), (1, 8), (13, 3), (6, 6), ()]
STEPS = 50


def guidance(granularity: str, scope: str) -> dict:
    return {
        **training.REPLAYED, "max_grad_norm": 2.0, "granularity": granularity, "norm_scope": scope,
    }  # fmt: skip


def train(params, optimizer, place=lambda tensor, row: tensor, steps=STEPS, scales=None):
    """Steps with reproducible gradients; ``place`` makes a shard of a whole gradient.

    Yields before every step; leaves the scale of every step in ``scales``. For alpha="auto" the
    gradients beside replayed ones lead away from what these ask for.
    """
    against = 3.0 if optimizer.param_groups[0]["alpha"] == "auto" else 0.0
    for k in range(steps):
        generator = torch.Generator().manual_seed(k)
        for row, p in enumerate(params):
            grad = torch.randn(SHAPES[row], generator=generator, dtype=torch.float64).to(p.dtype)
            if k % 3 == 1 and row < 3:
                grad -= against * constant(row).to(p.dtype)
            # The second parameter misses every fifth gradient, the last is frozen for a while.
            absent = (row == 1 and k % 5 == 4) or (row == len(SHAPES) - 1 and 10 <= k < 15)
            p.grad = None if absent else place(grad, row)
        if k % 3 == 1:
            with optimizer.replay():
                for row, p in enumerate(params[:3]):
                    grad = torch.randn(SHAPES[row], generator=generator, dtype=torch.float64)
                    grad = constant(row) + 0.3 * grad if against else grad
                    p.grad = place(grad.to(p.dtype), row)
        if k in (5, 30):
            optimizer.set_anchor()
        yield k
        optimizer.step()
        if scales is not None:
            scales.append(optimizer.guidance_stats()["scale"])


def constant(row):
    generator = torch.Generator().manual_seed(500 + row)
    return torch.randn(SHAPES[row], generator=generator, dtype=torch.float64)


def initial(dtype):
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def whole(dtype, name, options):
    """The unsharded run: parameters, optimizer, and the scale of every step."""
    params = [torch.nn.Parameter(x) for x in initial(dtype)]
    cls, defaults = training.OPTIMIZERS[name]
    optimizer = cls(params, **defaults, **options)
    scales: list = []
    for _ in train(params, optimizer, scales=scales):
        pass
    return params, optimizer, scales


@ranks.in_group
def run_cases(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """Runs every case on DTensors; rank 0 leaves the gathered results in ``folder``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made = {"S0": Shard(0), "S1": Shard(1), "R": Replicate()}
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    results = []
    for case in cases:
        names = ("dp", "tp")[: len(case["mesh"])] if case.get("named", True) else None
        mesh = init_device_mesh("cpu", case["mesh"], mesh_dim_names=names)

        def place(tensor, row, mesh=mesh, case=case, names=names):
            wanted = case["placements"][row % len(case["placements"])]
            if not wanted:
                return tensor  # whole and plain on every rank
            if wanted[0] in (names or ()):
                mesh, wanted = mesh[wanted[0]], wanted[1:]
            # A vector has no second dimension to shard, a scalar none at all.
            placements = [
                made[x] if x == "R" or int(x[1]) < len(SHAPES[row]) else Replicate() for x in wanted
            ]
            # Every rank has made the same tensor: nothing needs to be sent.
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        dtype = getattr(torch, case["dtype"])
        params = [torch.nn.Parameter(place(x, row)) for row, x in enumerate(initial(dtype))]
        cls, defaults = training.OPTIMIZERS[case["optimizer"]]
        optimizer = cls(params, **defaults, **case["options"])
        counts, scales = [], []
        for _ in train(params, optimizer, place, scales=scales):
            counts.append(len(calls))
        counts.append(len(calls))
        results.append(
            {
                "params": list(map(training.whole, params)),
                "state": training.whole_state(optimizer, dict(enumerate(params))),
                "collectives": [b - a for a, b in zip(counts, counts[1:], strict=False)],
                "scales": scales,
                "importance_mean": optimizer.param_groups[0]["importance_mean"],
            }
        )
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


def network() -> torch.nn.Module:
    return training.stack(7)


def fit(model, optimizer, first: int, last: int) -> None:
    training.fit(model, optimizer, first, last, boundary=4)


FSDP_OPTIONS = {"lr": 3e-2, "alpha": 0.6, "max_grad_norm": 0.5, "seed": 3}


def finish_fsdp(model, optimizer, folder: str) -> None:
    """Trains on from the checkpoint's step; rank 0 leaves the gathered results in ``folder``."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    fit(model, optimizer, 8, 14)
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, os.path.join(folder, "results.pt"))


@ranks.in_group
def run_fsdp(rank: int, world: int, folder: str, made_before: bool) -> None:
    """FSDP2 over a real model: trains, saves a distributed checkpoint in the middle."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = network()
    optimizer = None
    if made_before:
        optimizer = dgg.AdamW(model.parameters(), **FSDP_OPTIONS)
    training.fully_shard(*model, model)
    if optimizer is None:
        optimizer = dgg.AdamW(model.parameters(), **FSDP_OPTIONS)
    else:
        # What accelerate does: the parameters are exchanged under the optimizer.
        optimizer.param_groups[0]["params"][:] = list(model.parameters())
    fit(model, optimizer, 0, 8)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.path.join(folder, "saved"))
    finish_fsdp(model, optimizer, folder)


@ranks.in_group
def resume_fsdp(rank: int, world: int, folder: str, saved: str) -> None:
    """Goes on from the checkpoint of `run_fsdp`, on any number of ranks, with a fresh optimizer."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = network()
    training.fully_shard(*model, model)
    optimizer = dgg.AdamW(model.parameters(), **FSDP_OPTIONS)
    optimizer.set_anchor()  # the template has room for what the checkpoint holds
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=saved)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert optimizer.param_groups[0]["draw_index"] == 8
    finish_fsdp(model, optimizer, folder)


@ranks.in_group
def run_partitions(rank: int, world: int, folder: str) -> None:
    """Plain local partitions of one flat vector, as some engines hand them over."""
    options = {"lr": 3e-3, "alpha": 0.6, "max_grad_norm": 0.5, "seed": 3}
    for more in ({}, {"importance": 0.5}, {"importance": 1.0, "alpha": "auto"}):
        step_partitions(rank, world, {**options, **more})
    param = torch.nn.Parameter(torch.ones(3))
    for wrong in ({"granularity": "element"}, {"norm_scope": "tensor"}):
        options = {"process_group": dist.group.WORLD, **wrong}
        ranks.refused(ValueError, "flat partition", lambda o=options: dgg.AdamW([param], **o))


def step_partitions(rank: int, world: int, options: dict) -> None:
    """Compares partitions with the whole vector, step by step; and a copy, which has no group."""
    flat = torch.cat([x.flatten() for x in initial(torch.float64)])
    bounds = [0, *(len(flat) * (r + 1) // world + 3 * (r + 1 < world) for r in range(world))]

    def part(x):
        return x[bounds[rank] : bounds[rank + 1]].clone()

    param = torch.nn.Parameter(part(flat))
    optimizer = dgg.AdamW([param], **options, process_group=dist.group.WORLD)
    whole_param = torch.nn.Parameter(flat)
    twin = dgg.AdamW([whole_param], **options)
    constant = torch.randn(len(flat), generator=torch.Generator().manual_seed(500)).double()
    pulled = 0
    for k in range(20):
        grad = torch.randn(len(flat), generator=torch.Generator().manual_seed(k)).double()
        if options["alpha"] == "auto" and k % 2:
            for one, p, r in ((optimizer, param, part(constant)), (twin, whole_param, constant)):
                with one.replay():
                    p.grad = r.clone()
            grad -= 3.0 * constant
        whole_param.grad, param.grad = grad, part(grad)
        if k in (4, 12):
            optimizer.set_anchor()
            twin.set_anchor()
        optimizer.step()
        twin.step()
        scale, wanted = (one.guidance_stats()["scale"] for one in (optimizer, twin))
        torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=1e-6)
        pulled += bool(wanted > 0)
        torch.testing.assert_close(param.detach(), part(whole_param.detach()), rtol=0, atol=1e-12)
    stats, expected = optimizer.guidance_stats(), twin.guidance_stats()
    assert stats["injected"] == expected["injected"]
    torch.testing.assert_close(stats["clip"], expected["clip"])
    assert 0 < pulled < 16
    weighted = "importance" in options
    mean = twin.param_groups[0]["importance_mean"]
    assert (mean > 0) == weighted
    assert abs(optimizer.param_groups[0]["importance_mean"] - mean) <= 1e-12 * mean
    ranks.refused(RuntimeError, "needs whole matrices", lambda: optimizer.merge_anchor("rows"))
    for rule in ("mean", "fisher") if weighted else ():
        torch.testing.assert_close(
            twin.state[whole_param]["importance"].split([b - a for a, b in pairwise(bounds)])[rank],
            optimizer.state[param]["importance"], rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        share, wanted = optimizer.merge_anchor(rule), twin.merge_anchor(rule)
        assert abs(share - wanted) < 1e-12 and 0 < share < 1
        torch.testing.assert_close(param.detach(), part(whole_param.detach()), rtol=0, atol=1e-12)
    if weighted:
        ranks.refused(RuntimeError, "needs whole tensors with names", optimizer.importance_dict)

    copied = pickle.loads(pickle.dumps(optimizer))
    (p,) = copied.param_groups[0]["params"]
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    # It would step with the norms of one rank.
    ranks.refused(RuntimeError, "set optimizer.process_group", copied.step)
    assert torch.equal(p, before)
    copied.process_group = dist.group.WORLD
    copied.step()


@ranks.in_group
def run_uneven_partitions(rank: int, world: int, folder: str) -> None:
    """Ranks with other numbers of partitions draw for tensors that others do not know of."""
    count = 2 * world - rank
    for guided in (False, True):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
        options = {
            "alpha": 0.3, "granularity": "tensor", "process_group": dist.group.WORLD,
        }  # fmt: skip
        if guided:
            inner = torch.optim.SGD(params, lr=0.1)
            optimizer, step = dgg.Guidance(inner, **options), inner.step
        else:
            optimizer = dgg.SGD(params, lr=0.1, **options)
            step = optimizer.step
        injected = []
        for k in range(20):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + k)
            if k == 1:
                optimizer.set_anchor()
            step()
            stats = optimizer.guidance_stats()
            injected.append(bool(stats["injected"]))
            if injected[-1]:
                total = 4 * sum(2 * world - r for r in range(world))
                torch.testing.assert_close(stats["grad_norm"], torch.tensor(total**0.5 * (1.0 + k)))
        everywhere = [None] * world
        dist.all_gather_object(everywhere, injected)
        assert any(len({*of_ranks}) > 1 for of_ranks in zip(*everywhere, strict=True))


@ranks.in_group
def run_part_of_the_world(rank: int, world: int, folder: str) -> None:
    """A mesh of two sharding dimensions without the last rank, which takes no step."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    if rank < 4:
        param = torch.nn.Parameter(distribute_tensor(torch.ones(6, 6), mesh, [Shard(0), Shard(1)]))
        optimizer = dgg.AdamW([param], max_grad_norm=1.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
        clip = optimizer.guidance_stats()["clip"]
        torch.testing.assert_close(clip, torch.tensor(1.0 / 6.0), rtol=1e-5, atol=0.0)
    # All ranks have made as many groups: they still find each other in the next one.
    group = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        assert ones == 2


@ranks.in_group
def run_failing_ranks(rank: int, world: int, folder: str) -> None:
    """What one rank alone can see to be wrong with an anchor leaves all with what they had."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    options = {"lr": 0.1, "alpha": 1.0}
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    part = torch.nn.Parameter(torch.ones(3))
    foreign = torch.optim.SGD([sharded], lr=0.1)
    for param, optimizer, inner in (
        (sharded, dgg.AdamW([sharded], **options), None),
        (part, dgg.AdamW([part], **options, process_group=dist.group.WORLD), None),
        (sharded, dgg.Guidance(foreign, alpha=1.0), foreign),
    ):
        local = getattr(param, "_local_tensor", param).detach()
        optimizer.set_anchor()
        local.add_(1.0)
        good = local.clone()
        if rank == 1:
            local.view(-1)[0] = torch.nan
        error, text = (ValueError, "holds inf or NaN") if rank == 1 else (RuntimeError, "rank 1: ")
        for task in (None, 2):
            ranks.refused(error, text, functools.partial(optimizer.set_anchor, task=task))
        assert optimizer.param_groups[0]["task_index"] == 1
        local.copy_(good)
        param.grad = torch.ones_like(param)
        (inner or optimizer).step()
        distance = 3**0.5 * (2.0 if param is sharded else world**0.5)
        torch.testing.assert_close(optimizer.guidance_stats()["distance"], torch.tensor(distance))
        # The seeds of ranks are often their numbers.
        seeds = optimizer.param_groups[0]["seed"]
        optimizer.param_groups[0]["seed"] += rank
        ranks.refused(ValueError, "seed is [0, 1] on these ranks", optimizer.set_anchor)
        optimizer.param_groups[0]["seed"] = seeds
        optimizer.set_anchor()
        assert optimizer.param_groups[0]["task_index"] == 2


@ranks.in_group
def run_failing_importance(rank: int, world: int, folder: str) -> None:
    """What one rank alone finds wrong with the importance leaves all with what they had."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    options = {"lr": 0.1, "alpha": 1.0, "importance": 0.5}
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    part = torch.nn.Parameter(torch.ones(3))
    for param, optimizer in (
        (sharded, dgg.AdamW([("w", sharded)], **options)),
        (part, dgg.AdamW([part], **options, process_group=dist.group.WORLD)),
    ):

        def local(x):
            return getattr(x, "_local_tensor", x).detach()

        def step(param=param, optimizer=optimizer):
            param.grad = torch.ones_like(param)
            optimizer.step()

        def unchanged(call, error, text, optimizer=optimizer, param=param):
            before = {key: local(x).clone() for key, x in optimizer.state[param].items()}
            groups = [{**group, "params": None} for group in optimizer.param_groups]
            ranks.refused(error, text, call)
            assert optimizer.state[param].keys() == before.keys()
            for key, x in optimizer.state[param].items():
                torch.testing.assert_close(local(x), before[key], rtol=0, atol=0, equal_nan=True)
            assert [{**group, "params": None} for group in optimizer.param_groups] == groups

        # No rank has made a step.
        unchanged(optimizer.set_anchor, RuntimeError, "a new optimizer has none")
        step()
        moment = local(optimizer.state[param]["exp_avg_sq"])
        # A rank without a second moment of its own counts with 0.
        kept = optimizer.state[param].pop("exp_avg_sq") if rank == 0 else None
        optimizer.set_anchor()
        if rank == 0:
            optimizer.state[param]["exp_avg_sq"] = kept
            assert not local(optimizer.state[param]["importance"]).any()
        else:
            share = local(param).numel() / sum((3, 3) if param is part else (6, 6))
            assert torch.allclose(
                local(optimizer.state[param]["importance"]), 1 / moment.new_tensor(share)
            )
        step()
        for value, error, text in (
            (torch.nan, ValueError, "the mean of the second moments is nan"),
            (torch.inf, ValueError, "the mean of the second moments is inf"),
        ):
            good = moment.clone()
            moment = local(optimizer.state[param]["exp_avg_sq"])
            good = moment.clone()
            if rank == 1:
                moment.view(-1)[0] = value
            unchanged(optimizer.set_anchor, error, text)
            moment.copy_(good)
        if param is sharded:
            for wrong in (torch.nan, -1.0):
                given = {"w": torch.ones(4, 3)}
                if rank == 1:
                    given["w"][3] = wrong
                error = (ValueError, "w'") if rank == 1 else (RuntimeError, "rank 1: ")
                call = functools.partial(optimizer.set_anchor, importance=given)
                unchanged(call, *error)
        # One rank asks for another rule, or for one that there is not.
        text = "rule is ['mean', 'fisher'] on these ranks"
        for rules, error, message in (
            (("mean", "fisher"), ValueError, text),
            (
                ("mean", "median"),
                ValueError if rank == 1 else RuntimeError,
                "merge_anchor(rule='median') is not one of",
            ),
        ):
            before = local(param).clone()
            unchanged(functools.partial(optimizer.merge_anchor, rules[rank]), error, message)
            assert torch.equal(local(param), before)
        optimizer.param_groups[0]["importance"] += 0.1 * rank
        unchanged(optimizer.set_anchor, ValueError, "importance is [0.5, 0.6] on these ranks")
        optimizer.param_groups[0]["importance"] = 0.5
        step()
        optimizer.set_anchor()
        assert optimizer.param_groups[0]["task_index"] == 2
        step()


@ranks.in_group
def run_replay_on_one_rank(rank: int, world: int, folder: str) -> None:
    """A block that leaves one rank no gradient is a block there, too: all form the same sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(6.0).view(2, 3)
    shared = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    options = {"lr": 0.1, "alpha": "auto", "max_grad_norm": 1.0}
    optimizer = dgg.AdamW([shared], **options)
    twin_param = torch.nn.Parameter(whole[1:].clone())  # of the rank that has gradients
    twin = dgg.AdamW([twin_param], **options)
    scales = []
    for k in range(12):
        if k == 2:
            optimizer.set_anchor()
            twin.set_anchor()
        for one, p in ((optimizer, shared), (twin, twin_param)):
            has = one is twin or rank == 1
            with one.replay():
                p.grad = torch.full_like(p, 1.0) if has and k % 3 else None
            one.zero_grad()
            p.grad = torch.full_like(p, -3.0) if has else None
            one.step()
            one.zero_grad()
        scales.append([float(one.guidance_stats()["scale"]) for one in (optimizer, twin)])
        assert abs(scales[-1][0] - scales[-1][1]) < 1e-6, scales
    assert any(a > 0 for a, _ in scales) and any(a == 0 for a, _ in scales[3:])
    if rank == 1:
        torch.testing.assert_close(shared._local_tensor.detach(), twin_param.detach())
    with warnings.catch_warnings():  # that no step had a replay gradient would be wrong
        warnings.simplefilter("error")
        for _ in range(101):
            with optimizer.replay():
                shared.grad = torch.ones_like(shared) if rank == 1 else None
            shared.grad = torch.ones_like(shared)
            optimizer.step()
    # Dropped on all ranks alike, whether there was something or not.
    with optimizer.replay():
        shared.grad = torch.ones_like(shared) if rank == 1 else None
    optimizer.clear_replay()
    shared.grad = torch.ones_like(shared)
    optimizer.step()
    assert optimizer.guidance_stats()["scale"] == 0


@ranks.in_group
def run_merges(rank: int, world: int, folder: str) -> None:
    """merge_anchor() and importance by name over FSDP2 are those of the unsharded run."""
    options = {**FSDP_OPTIONS, "importance": 0.5}
    for rule, keep in (("mean", None), ("fisher", None), ("rows", 0.3), ("rows", 1.0)):
        model, plain = network(), network()
        training.fully_shard(*model, model)
        optimizer, twin = (dgg.AdamW(m.named_parameters(), **options) for m in (model, plain))
        pairs = (model, optimizer), (plain, twin)
        for m, one in pairs:
            training.fit(m, one, 0, 10, boundary=4)
        share, expected = (one.merge_anchor(rule, keep=keep) for one in (optimizer, twin))
        assert abs(share - expected) < 1e-12 and 0 < share <= (keep or 1)
        merged = list(map(training.whole, model.parameters()))
        training.assert_close(merged, plain.parameters())
        for m, one in pairs:
            one.set_anchor()
            training.fit(m, one, 10, 14)
        training.assert_close(map(training.whole, model.parameters()), plain.parameters())
        sums, whole_sums = optimizer.importance_dict(), twin.importance_dict()
        assert sums.keys() == whole_sums.keys()
        for name, x in sums.items():
            torch.testing.assert_close(training.whole(x), whole_sums[name], rtol=1e-9, atol=1e-12)
        # Shards, whole tensors and those of a file, for the next optimizer.
        file = os.path.join(folder, "sums.safetensors")
        if rank == 0:
            from safetensors.torch import save_file

            save_file(whole_sums, file)
        dist.barrier()
        for given in (sums, whole_sums, file):
            new = dgg.AdamW(model.named_parameters(), **options)
            new.set_anchor(importance=given)
            other = dgg.AdamW(plain.named_parameters(), **options)
            other.set_anchor(importance=whole_sums)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                if p.requires_grad:
                    found = training.whole(new.state[p]["importance"])
                    torch.testing.assert_close(found, other.state[q]["importance"])
            mean, wanted = (one.param_groups[0]["importance_mean"] for one in (new, other))
            assert abs(mean - wanted) < 1e-9 * wanted


@ranks.in_group
def run_ranges(rank: int, world: int, folder: str) -> None:
    """Every collective of a step stands in a range of its own, where somebody listens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    options = {"lr": 0.1, "alpha": 0.5, "seed": 3}

    def sharded():
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        return param, dgg.AdamW([param], **options), lambda: torch.ones_like(param)

    def summed():
        param = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
        grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        return param, dgg.AdamW([param], **options), lambda: grad

    def partitioned():
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = dgg.AdamW([param], **options, process_group=dist.group.WORLD)
        return param, optimizer, lambda: torch.ones(3)

    def shared():
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = ZeroRedundancyOptimizer([param], dgg.AdamW, **options)
        return param, optimizer, lambda: torch.ones(3)

    for make in (sharded, summed, partitioned, shared):
        param, optimizer, grad = make()
        inner = dgg.unwrap(optimizer)
        inner.set_anchor()
        counts = set()
        for _ in range(8):
            param.grad = grad()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                optimizer.step()
            names = [event.name for event in profile.events()]
            inside = names.count("dgg.allreduce")
            injected = torch.tensor([float(bool(inner.guidance_stats()["injected"]))])
            dist.all_reduce(injected, op=dist.ReduceOp.MAX)
            assert inside == (1 if make is summed else int(injected)), (make.__name__, names)
            sent = [name for name in names if name.startswith("c10d::") and "reduce" in name]
            # ZeroRedundancyOptimizer sends the weights besides.
            assert make is shared or len(sent) == inside, names
            counts.add(inside)
        assert counts == ({1} if make is summed else {0, 1})
    assert _ranges.record("dgg.allreduce") is _ranges.record("dgg.step")  # the one that is nothing


@ranks.in_group
def run_misuses(rank: int, world: int, folder: str) -> None:
    """DTensors that cannot be stepped, and gradients that do not fit them."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))

    # Each rank's part of the norms would be another's whole.
    meshes = [DeviceMesh("cpu", [place]) for place in range(world)]
    elsewhere = [
        torch.nn.Parameter(distribute_tensor(torch.ones(4), one, [Shard(0)], src_data_rank=None))
        for one in meshes
    ]
    ranks.refused(ValueError, "this rank is no part", lambda: dgg.AdamW(elsewhere))
    dgg.AdamW(elsewhere[rank : rank + 1])

    # GradScaler knows of no other partitions.
    part = torch.nn.Parameter(torch.ones(4))
    optimizer = dgg.AdamW([part], process_group=dist.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(part.sum()).backward()
    ranks.refused(RuntimeError, "unscale_(optimizer) before", lambda: scaler.step(optimizer))
    assert torch.equal(part.detach(), torch.ones(4))

    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    ranks.refused(ValueError, "partial sums are no values to step", lambda: dgg.AdamW([partial]))

    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = dgg.AdamW([param], lr=0.1)
    param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    optimizer.step()
    before = param.detach().full_tensor()
    param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    ranks.refused(ValueError, "is not sharded as the parameter is", optimizer.step)
    assert torch.equal(param.detach().full_tensor(), before)
    assert optimizer.param_groups[0]["draw_index"] == 1

    # A gradient of the same local shape whose values are parts of a sum is the sum; a parameter
    # of which every rank has its own shard cannot have one.
    copied = torch.nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    twin = torch.nn.Parameter(torch.zeros(3))
    both = [dgg.SGD([x], lr=0.1, max_grad_norm=2.0) for x in (copied, twin)]
    for step in range(4):
        twin.grad = torch.ones(3) * world
        copied.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        if step % 2:
            copied.grad = copied.grad.redistribute(mesh, [Replicate()])
        for optimizer in both:
            optimizer.step()
    assert torch.equal(copied.detach().full_tensor(), twin.detach())
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(world, 3), mesh, [Shard(0)]))
    optimizer = dgg.AdamW([sharded], lr=0.1)
    for _ in range(2):
        sharded.grad = distribute_tensor(torch.ones(world, 3), mesh, [Shard(0)])
        optimizer.step()
    before = sharded.detach().full_tensor()
    sharded.grad = DTensor.from_local(torch.ones(world, 3), mesh, [Partial()])
    ranks.refused(ValueError, "is not sharded as the parameter is", optimizer.step)
    assert torch.equal(sharded.detach().full_tensor(), before)

    ranks.refused(ValueError, "not supported for DTensors", lambda: _anchored_elsewhere(param))

    # So do anchors of dgg.Guidance, whose state goes to an equal one of another optimizer.
    inner = torch.optim.SGD([param], lr=0.1)
    guidance = dgg.Guidance(inner, alpha=1.0)
    guidance.set_anchor()
    twin = torch.nn.Parameter(param.detach().clone())
    other = dgg.Guidance(torch.optim.SGD([twin], lr=0.1), alpha=1.0)
    other.load_state_dict(guidance.state_dict())
    for _ in range(3):
        for p, optimizer in ((param, guidance.optimizer), (twin, other.optimizer)):
            p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
            optimizer.step()
    assert torch.equal(param.detach().full_tensor(), twin.detach().full_tensor())
    assert bool(other.guidance_stats()["injected"])
    guidance.remove()

    # Whole tensors, of a checkpoint say, become shards.
    named = dgg.AdamW([("weight", param)], lr=0.1)
    source = torch.arange(16.0).view(4, 4)
    named.set_anchor({"weight": source})
    assert torch.equal(named.state[param]["anchor"].full_tensor(), source)


def _anchored_elsewhere(param):
    import dataclasses
    import unittest.mock

    optimizer = dgg.AdamW([param], anchor_device="cpu")
    # There is no second device here: the parameter pretends to be on one.
    second = dataclasses.replace(optimizer._settings, anchor_device=torch.device("cpu", 1))
    with unittest.mock.patch.object(optimizer, "_settings", second):
        optimizer.set_anchor()
