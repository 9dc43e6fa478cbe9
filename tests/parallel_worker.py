# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_parallel.py runs: torch's own wrappers of models and optimizers.

A case trains over the ranks, each with its part of every batch, and in the same process without
any wrapper on the joined batch, and compares the two. Cases of one engine run one after the other
in one start of the processes; the first one to fail ends it.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import pickle
import traceback
import warnings
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

import dgg
import ranks
import training
from language_tasks import Killed, arguments_of, counting, killed_after, trainer_of
from language_tasks import llama as language_model
from training import assert_close, assert_same_on_all_ranks, loss_of, steps, whole

STEPS, BOUNDARIES, SAMPLES = 50, (5, 30), 24
OPTIONS = {**training.ADAM, **training.REPLAYED, "max_grad_norm": 0.5}
CPU = torch.device("cpu")


class Network(nn.Module):
    """A vector, a scalar, tied and frozen parameters; sizes that no rank count divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 7), nn.LayerNorm(7)
        self.still = nn.Linear(7, 7)
        self.second = nn.Linear(7, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 7)
        self.head.weight = self.first.weight
        self.still.requires_grad_(False)

    def forward(self, x):
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.head(self.second(hidden + self.still(hidden) * self.scale))


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return Network().to(dtype)


def untied(dtype=torch.float64) -> nn.Module:
    """Of a model on the meta device FSDP1 makes the parts of every module on its own."""
    model = network(dtype)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def within(dtype=torch.float64) -> nn.Module:
    """accelerate does not find parameters of the outermost module when it hands weights out."""
    return nn.Sequential(untied(dtype))


def adapted(dtype=torch.float64) -> nn.Module:
    """The same model, frozen, with adapters of low rank at two layers."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["still", "second"], init_lora_weights=False)
    return peft.get_peft_model(network(dtype), config)


def named_anchors(build=network, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Anchors other than the weights, by the names of the model without wrappers."""
    return {n: p.detach() * 0.5 + 0.1 for n, p in build(dtype).named_parameters()}


def batch(k: int, dtype=torch.float64):
    return training.inputs(k, SAMPLES, dtype)


def fit(
    model, optimizer, part, first=0, last=STEPS, *, replay=True, boundaries=BOUNDARIES,
    anchors=None, backward=torch.Tensor.backward,
):  # fmt: skip
    """Trains on reproducible data; ``part`` takes this rank's samples of a batch.

    With alpha="auto" the old examples are those of the batch, and ask for the way back.

    Returns:
        The scale of every step.
    """
    inner = dgg.unwrap(optimizer)
    dtype = next(model.parameters()).dtype
    named = {"tensors": anchors, "model": model} if anchors else {}
    scales: list = []

    def note():
        scales.append(inner.guidance_stats()["scale"])

    automatic = inner.param_groups[0]["alpha"] == "auto"
    of_old = -0.4 if automatic else 1.0
    for k in steps(range(first, last), optimizer, boundaries=boundaries, after=note, **named):
        x, old = part(batch(2 * k, dtype)), part(batch(2 * k + (not automatic), dtype))
        if replay and k % 3 == 1:  # before the real gradient, and in two parts
            with inner.replay():
                backward(loss_of(model, old[::2]) * (of_old / 2))
            with inner.replay():
                backward(loss_of(model, old[1::2]) * (of_old / 2))
        backward(loss_of(model, x))
        if replay and k % 3 == 2:  # after it
            with inner.replay():
                backward(loss_of(model, old) * of_old)
    return scales


def fit_both(model, optimizer, other, twin, *, autocast=False, gradients=None, **over):
    """Trains ``model`` over the ranks and ``other`` on the very gradients that it has.

    In low precision the same training has other gradients over other batches, and soon others
    altogether; what a step makes of them is to be the same.
    """
    backward = over.pop("backward", torch.Tensor.backward)
    dtype = next(model.parameters()).dtype
    trained = 0
    for k in steps(range(STEPS), optimizer, twin, boundaries=BOUNDARIES):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, mine(batch(k, dtype)))
        backward(loss)
        found = gradients(model) if gradients else [p.grad for p in model.parameters()]
        for p, grad in zip(other.parameters(), found, strict=True):
            p.grad = None if grad is None or not p.requires_grad else whole(grad)
            trained += p.grad is not None and bool(p.grad.any())
    assert trained > 5 * STEPS  # all but the frozen ones, nearly always


def mine(x):
    """Returns this rank's part of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def alone(steps=STEPS, dtype=torch.float64, build=network, anchors=None, **options):
    """Returns model and optimizer of the run without any wrapper."""
    replay = options.pop("replay", True)
    model = build(dtype)
    optimizer = dgg.AdamW(model.parameters(), **{**OPTIONS, **options})
    fit(model, optimizer, lambda x: x, 0, steps, replay=replay, anchors=anchors)
    return model, optimizer


def assert_guided(optimizer, draws=STEPS):
    """The run was no plain AdamW that happens to agree."""
    inner = dgg.unwrap(optimizer)
    (group,) = inner.param_groups
    assert group["draw_index"] == draws and group["task_index"] == len(BOUNDARIES)
    assert group["anchored"] > 0


# -- DistributedDataParallel ----------------------------------------------------------------------


def ddp_trajectory(dtype=torch.float64, options=None, build=network, named=False, **ddp):
    options = options or {}
    anchors = named_anchors(build, dtype) if named else None
    expected, twin = alone(dtype=dtype, build=build, anchors=anchors, **options)
    model = build(dtype)
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer = dgg.AdamW(wrapped.parameters(), **{**OPTIONS, **options})
    fit(wrapped, optimizer, mine, anchors=anchors)
    assert_guided(optimizer)
    assert_close(model.parameters(), expected.parameters(), dtype)
    assert_same_on_all_ranks(model.parameters())
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        entry = optimizer.state.get(p, {})
        assert entry.keys() == twin.state.get(q, {}).keys()
        assert_close(entry.values(), twin.state.get(q, {}).values(), dtype)


def low_precision(optimizer_of, view=False, dtype=torch.float32, **options):
    """float32 weights under autocast, or bfloat16 weights with masters."""
    model, other = network(dtype), network(dtype)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = optimizer_of(wrapped.parameters(), **options)
    twin = dgg.AdamW(other.parameters(), **{**OPTIONS, **options})
    fit_both(wrapped, optimizer, other, twin, autocast=dtype == torch.float32)
    assert_guided(optimizer)
    assert_same_on_all_ranks(model.parameters())
    inner, held = dgg.unwrap(optimizer), 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if dtype == torch.float32:
            assert_close([p], [q], dtype)
        entry, expected = inner.state.get(p, {}), twin.state.get(q, {})
        if not entry:
            continue  # frozen, or another rank's share
        held += 1
        assert entry.keys() == expected.keys()
        assert_close(entry.values(), expected.values(), torch.float32)
        if dtype == torch.bfloat16:
            assert torch.equal(p, entry["master"].to(dtype))
    assert held


def ddp_low_precision(**options):
    low_precision(lambda params, **o: dgg.AdamW(params, **{**OPTIONS, **o}), **options)


def ddp_single_bucket_of_one_tensor():
    """A bucket that is as large as its only gradient is a view all the same."""
    torch.manual_seed(3)
    model = nn.Linear(6, 5, bias=False).double()
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, twin = (dgg.AdamW(m.parameters(), **OPTIONS) for m in (wrapped, plain))
    fit(wrapped, optimizer, mine)
    fit(plain, twin, lambda x: x)
    assert_close(model.parameters(), plain.parameters())


def ddp_accumulation(**ddp):
    """Two micro-batches a step, the first without a reduction; and gradients kept, not None."""
    model, plain = network(), network()
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer, twin = (dgg.AdamW(m.parameters(), **OPTIONS) for m in (wrapped, plain))
    for k in range(20):
        x, old = batch(2 * k), batch(2 * k + 1)
        if k == 3:
            optimizer.set_anchor()
            twin.set_anchor()
        first, second = mine(x).chunk(2)
        with wrapped.no_sync():
            (loss_of(wrapped, first) / 2).backward()
        if k % 2:  # in the middle of the accumulation
            a, b = mine(old).chunk(2)
            with optimizer.replay():
                with wrapped.no_sync():
                    (loss_of(wrapped, a) / 2).backward()
                (loss_of(wrapped, b) / 2).backward()
        (loss_of(wrapped, second) / 2).backward()
        loss_of(plain, x).backward()
        if k % 2:
            with twin.replay():
                loss_of(plain, old).backward()
        for one in (optimizer, twin):
            one.step()
            one.zero_grad(set_to_none=k % 4 < 2)
    assert_close(model.parameters(), plain.parameters())
    assert_same_on_all_ranks(model.parameters())


def ddp_unused_parameters(**ddp):
    """A branch that not every step uses has no gradient and no part in any norm."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.branch = nn.Linear(6, 5), nn.Linear(5, 5)
            self.side = True

        def forward(self, x):
            x = self.trunk(x)
            return self.branch(x) if self.side else x

    torch.manual_seed(3)
    model = Branches().double()
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, **ddp)
    optimizer, twin = (dgg.AdamW(m.parameters(), **OPTIONS) for m in (wrapped, plain))
    for k in range(20):
        model.side = plain.side = k % 4 != 2
        fit(wrapped, optimizer, mine, k, k + 1, boundaries=(3,))
        fit(plain, twin, lambda x: x, k, k + 1, boundaries=(3,))
    assert_close(model.parameters(), plain.parameters())
    steps = {float(optimizer.state[p]["step"]) for p in model.parameters()}
    assert steps == {20.0, 15.0}


def ddp_resume():
    """The optimizer's state is the same on every rank and goes on bit for bit."""
    straight, again = network(), network()
    wrapped = DistributedDataParallel(straight)
    optimizer = dgg.AdamW(wrapped.parameters(), **OPTIONS)
    fit(wrapped, optimizer, mine, 0, 20)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    fit(wrapped, optimizer, mine, 20, STEPS)
    again.load_state_dict(saved[0])
    wrapped = DistributedDataParallel(again, gradient_as_bucket_view=True)
    resumed = dgg.AdamW(wrapped.parameters(), **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(saved[1]))
    fit(wrapped, resumed, mine, 20, STEPS)
    assert all(map(torch.equal, straight.parameters(), again.parameters()))
    # One process alone goes on from it as well.
    expected, _ = alone()
    lone = network()
    lone.load_state_dict(saved[0])
    optimizer = dgg.AdamW(lone.parameters(), **OPTIONS)
    optimizer.load_state_dict(saved[1])
    fit(lone, optimizer, lambda x: x, 20, STEPS)
    assert_close(lone.parameters(), expected.parameters())


# -- ZeroRedundancyOptimizer ----------------------------------------------------------------------


def zero_redundancy(params, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, **{"optimizer_class": dgg.AdamW, **OPTIONS, **options})


def share_trajectory(dtype=torch.float64, build=network, view=False, **options):
    expected, twin = alone(dtype=dtype, build=build, **options)
    model = build(dtype)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = zero_redundancy(wrapped.parameters(), parameters_as_bucket_view=view, **options)
    fit(wrapped, optimizer, mine)
    assert_guided(optimizer)
    assert_close(model.parameters(), expected.parameters(), dtype)
    assert_same_on_all_ranks(model.parameters())
    inner, names = dgg.unwrap(optimizer), dict(model.named_parameters())
    for name, q in expected.named_parameters():
        if names[name] in inner.state:
            assert_close(inner.state[names[name]].values(), twin.state[q].values(), dtype)
    assert inner.param_groups[0]["anchored"] == twin.param_groups[0]["anchored"]
    assert optimizer.param_groups[0]["anchored"] == twin.param_groups[0]["anchored"]


def share_low_precision(**options):
    low_precision(zero_redundancy, **options)


def one_tensor(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Linear(6, 5, bias=False).to(dtype)


def share_of_nothing(**options):
    """One parameter for all ranks: the others take part in the norms with nothing."""
    share_trajectory(build=one_tensor, **options)


def share_with_groups():
    """Groups of their own alpha; the schedule of the outer optimizer reaches the inner one."""
    model, plain = network(), network()

    def groups(m):
        named = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in named if p.ndim == 2], "alpha": 0.7},
            {"params": [p for n, p in named if p.ndim == 1], "weight_decay": 0.0},
        ]

    wrapped = DistributedDataParallel(model)
    optimizer = zero_redundancy(groups(wrapped), granularity="tensor")
    twin = dgg.AdamW(groups(plain), **OPTIONS, granularity="tensor")
    for k in range(30):
        for one in (optimizer, twin):
            one.param_groups[0]["lr"] = 3e-3 * (1 - k / 40)
            one.param_groups[1]["alpha"] = k / 40
        fit(wrapped, optimizer, mine, k, k + 1)
        fit(plain, twin, lambda x: x, k, k + 1)
    assert_close(model.parameters(), plain.parameters())
    assert [g["anchored"] for g in optimizer.param_groups] == [2, 5]


def share_resume():
    """A consolidated state: goes on bit for bit on these ranks, and in one process alone."""
    straight, again = network(), network()
    wrapped = DistributedDataParallel(straight)
    optimizer = zero_redundancy(wrapped.parameters())
    fit(wrapped, optimizer, mine, 0, 20)
    optimizer.consolidate_state_dict(to=0)
    # On the CPU its tensors are the optimizer's own.
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    weights = copy.deepcopy(straight.state_dict())
    trained = [p for p in straight.parameters() if p.requires_grad]
    assert len(saved[0]["state"]) == len(trained)
    assert all("anchor" in entry for entry in saved[0]["state"].values())
    group = saved[0]["param_groups"][0]
    assert (group["anchored"], group["draw_index"], group["task_index"]) == (len(trained), 20, 1)
    fit(wrapped, optimizer, mine, 20, STEPS)

    again.load_state_dict(weights)
    wrapped = DistributedDataParallel(again)
    resumed = zero_redundancy(wrapped.parameters())
    resumed.load_state_dict(copy.deepcopy(saved[0]))
    fit(wrapped, resumed, mine, 20, STEPS)
    assert all(map(torch.equal, straight.parameters(), again.parameters()))

    expected, _ = alone()
    lone = network()
    lone.load_state_dict(weights)
    single = dgg.AdamW(lone.parameters(), **OPTIONS)
    single.load_state_dict(copy.deepcopy(saved[0]))
    fit(lone, single, lambda x: x, 20, STEPS)
    assert_close(lone.parameters(), expected.parameters())

    # A checkpoint whose anchors were lost is an error on the ranks that miss theirs.
    for entry in saved[0]["state"].values():
        del entry["anchor"]
    lost = zero_redundancy(again.parameters())
    lost.load_state_dict(saved[0])
    loss_of(again, batch(0)).backward()
    ranks.refused(RuntimeError, "the resume lost them", dgg.unwrap(lost).step)


def share_anchor():
    """Anchors by name, by every rank for its share; dropped again."""
    model = network()
    optimizer = zero_redundancy(model.parameters())
    inner = dgg.unwrap(optimizer)
    named = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    inner.set_anchor(named, model=model)
    names = {p: n for n, p in model.named_parameters()}
    held = [p for g in inner.param_groups for p in g["params"] if p.requires_grad]
    assert held and all(torch.equal(inner.state[p]["anchor"], named[names[p]]) for p in held)
    assert optimizer.param_groups[0]["anchored"] == sum(p.requires_grad for p in model.parameters())
    # The name of a parameter that only one rank steps.
    mine = next(names[p] for p in held)
    chosen = [mine]
    dist.broadcast_object_list(chosen, src=0)
    del named[chosen[0]]
    error = (KeyError, "no tensor for 1 of") if dist.get_rank() == 0 else (RuntimeError, "rank 0: ")
    before = [inner.state[p]["anchor"].clone() for p in held]
    ranks.refused(*error, lambda: inner.set_anchor(named, model=model))
    assert all(torch.equal(inner.state[p]["anchor"], a) for p, a in zip(held, before, strict=True))
    assert inner.param_groups[0]["task_index"] == 1
    inner.clear_anchor()
    assert optimizer.param_groups[0]["anchored"] == 0


def share_loss_scaling():
    """A step that GradScaler skips is not called, on no rank, and has no draw."""
    model, plain = network(), network()
    wrapped = DistributedDataParallel(model)
    optimizer = zero_redundancy(wrapped.parameters())
    twin = dgg.AdamW(plain.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k in range(12):
        if k == 2:
            for one in (dgg.unwrap(optimizer), twin):
                one.set_anchor()
        scaler.scale(loss_of(wrapped, mine(batch(k)))).backward()
        loss_of(plain, batch(k)).backward()
        if k == 6:
            model.scale.grad.fill_(torch.inf)
        else:
            twin.step()
        scaler.step(optimizer)
        scaler.update()
        for one in (optimizer, twin):
            one.zero_grad()
    assert optimizer.param_groups[0]["draw_index"] == 11 and scaler.get_scale() == 4.0
    assert_close(model.parameters(), plain.parameters())
    # It unscales what stands in .grad; nobody tells it of r, nor the optimizer of the scale.
    with dgg.unwrap(optimizer).replay():
        scaler.scale(loss_of(wrapped, batch(0))).backward()
    scaler.scale(loss_of(wrapped, batch(1))).backward()
    ranks.refused(RuntimeError, "cannot reach the replay", lambda: scaler.step(optimizer))
    assert_close(model.parameters(), plain.parameters())


def share_misuse():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    partial = functools.partial(dgg.AdamW, process_group=dist.group.WORLD)
    ranks.refused(
        ValueError,
        "do not go with ZeroRedundancyOptimizer",
        lambda: zero_redundancy(model.parameters(), optimizer_class=partial),
    )
    ranks.refused(
        ValueError,
        "do not go with ZeroRedundancyOptimizer",
        lambda: zero_redundancy(model.parameters(), capturable=True),
    )
    elsewhere = torch.nn.Parameter(torch.empty(3, device="meta", dtype=torch.float64))
    # torch tells kinds of devices apart itself, but not two GPUs.
    with mock.patch.object(ZeroRedundancyOptimizer, "_verify_same_dense_param_type"):
        ranks.refused(
            ValueError,
            "several devices (['cpu', 'meta']) is not supported",
            lambda: zero_redundancy([*model.parameters(), elsewhere]),
        )
    # Its overlapped mode has functional optimizers of torch's only.
    ranks.refused(
        ValueError,
        "no supported functional optimizer",
        lambda: ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=dgg.AdamW, overlap_with_ddp=True
        ),
    )
    optimizer = zero_redundancy(model.parameters())
    copied = pickle.loads(pickle.dumps(dgg.unwrap(optimizer)))
    for p in copied.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    ranks.refused(RuntimeError, "build a new ZeroRedundancyOptimizer", copied.step)
    inner = dgg.unwrap(optimizer)
    del optimizer
    loss_of(model, batch(0)).backward()
    ranks.refused(RuntimeError, "keep it, and step it", inner.step)
    # An optimizer that somebody else builds is nobody's share.
    assert dgg.AdamW(model.parameters())._ownership.has_all


# -- FullyShardedDataParallel (FSDP1) -------------------------------------------------------------


def fsdp1(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    settings = {"use_orig_params": True, "device_id": CPU, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is on its way out, that NO_SHARD is
        return FullyShardedDataParallel(model, **settings)


def wrapped_parts(model, **options):
    """FSDP1 in FSDP1: the first layers are a unit of their own; tied weights stay in the outer."""
    model.second = fsdp1(model.second, **options)
    return fsdp1(model, **options)


def whole_of(model) -> list:
    """Returns all parameters of an FSDP1 model in full."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [p.detach().clone() for p in model.parameters()]


def run_trajectory(
    dtype=torch.float64, before=False, strategy=None, mesh=None, build=network,
    **options,
):  # fmt: skip
    from torch.distributed.fsdp import ShardingStrategy

    expected, _ = alone(dtype=dtype, build=build, **options)
    model = build(dtype)
    optimizer = dgg.AdamW(model.parameters(), **{**OPTIONS, **options}) if before else None
    engine = {}
    if strategy is not None:
        engine["sharding_strategy"] = ShardingStrategy[strategy]
    if mesh is not None:
        from torch.distributed.device_mesh import init_device_mesh

        engine["device_mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "fs"))
    wrapped = (fsdp1 if build is adapted else wrapped_parts)(model, **engine)
    if optimizer is None:
        optimizer = dgg.AdamW(wrapped.parameters(), **{**OPTIONS, **options})
    fit(wrapped, optimizer, mine)
    assert_guided(optimizer)
    if strategy in (None, "SHARD_GRAD_OP", "FULL_SHARD"):
        shapes = [p.shape for p in wrapped.parameters()]
        assert shapes != [p.shape for p in expected.parameters()], "nothing was sharded"
    assert_close(whole_of(wrapped), expected.parameters(), dtype)


def of_state_dicts(full: bool, options=None, **engine):
    """Returns model and optimizer whose state dicts have whole tensors, or shards."""
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
    )

    if full:
        kind = (
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            # Offloaded to the CPU, where they are, all would be views of one buffer.
            FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False),
        )
    else:
        kind = (
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(),
            ShardedOptimStateDictConfig(),
        )
    model = wrapped_parts(network(), **engine)
    FullyShardedDataParallel.set_state_dict_type(model, *kind)
    return model, dgg.AdamW(model.parameters(), **{**OPTIONS, **(options or {})})


def saved_at_20(full: bool):
    """Trains until step 20; returns model, optimizer and the state dicts of both."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, optimizer = of_state_dicts(full)
    fit(model, optimizer, mine, 0, 20)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    return model, optimizer, weights, saved


def run_resume(full: bool):
    """FSDP's optimizer state dicts carry the anchor; full ones go into one process as well."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, optimizer, weights, saved = saved_at_20(full)
    fit(model, optimizer, mine, 20, STEPS)

    again, resumed = of_state_dicts(full)
    again.load_state_dict(weights)
    state = FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, copy.deepcopy(saved))
    resumed.load_state_dict(state)
    group = resumed.param_groups[0]
    assert (group["draw_index"], group["task_index"]) == (20, 1)
    fit(again, resumed, mine, 20, STEPS)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    if full:
        names = dict(network().named_parameters())
        entries = saved["state"]
        assert {n for n, p in names.items() if p.requires_grad} == set(entries)
        for name, entry in entries.items():
            assert entry["anchor"].shape == names[name].shape and entry["step"] == 20


def run_low_precision():
    """MixedPrecision: bfloat16 within the model, float32 between the ranks and in the step."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrapped_parts(network(torch.float32), mixed_precision=policy)
    other = network(torch.float32)
    optimizer, twin = (dgg.AdamW(m.parameters(), **OPTIONS) for m in (model, other))

    def gradients(m):
        with FullyShardedDataParallel.summon_full_params(m, writeback=False, with_grads=True):
            return [None if p.grad is None else p.grad.clone() for p in m.parameters()]

    fit_both(model, optimizer, other, twin, gradients=gradients)
    assert_guided(optimizer)
    assert_close(whole_of(model), other.parameters(), torch.float32)


def run_meta():
    """Made on the meta device, sharded, and only then given its weights."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    expected, _ = alone(build=untied)
    with torch.device("meta"):
        model = untied()
    model = wrapped_parts(model, param_init_fn=lambda m: m.to_empty(device=CPU, recurse=False))
    optimizer = dgg.AdamW(model.parameters(), **OPTIONS)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
    model.load_state_dict(untied().state_dict())
    fit(model, optimizer, mine)
    assert_guided(optimizer)
    assert_close(whole_of(model), expected.parameters())


def run_resume_elsewhere(world):
    """Saved in full by all ranks, resumed by groups of ``world``; each has all of the data."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    _, _, weights, saved = saved_at_20(full=True)
    group, _ = dist.new_subgroups(world)
    model, optimizer = of_state_dicts(full=True, process_group=group)
    model.load_state_dict(weights)
    state = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved, group=group)
    optimizer.load_state_dict(state)
    fit(model, optimizer, lambda x: x.chunk(world)[dist.get_rank(group)], 20, STEPS)
    assert_guided(optimizer)
    assert_close(whole_of(model), alone()[0].parameters())


def run_clipping():
    """FSDP1's own clip_grad_norm_ before the step, instead of the step's."""
    dtype = torch.float32  # the only one it takes
    model, plain = wrapped_parts(network(dtype)), network(dtype)
    optimizer, twin = (
        dgg.AdamW(m.parameters(), **{**OPTIONS, "max_grad_norm": None}) for m in (model, plain)
    )
    for k in steps(range(20), optimizer, twin, boundaries=(5,)):
        x = batch(k, dtype)
        loss_of(model, mine(x)).backward()
        model.clip_grad_norm_(0.05)
        loss_of(plain, x).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    assert_close(whole_of(model), plain.parameters(), dtype)


def run_loss_scaling():
    """What one rank finds in its runs all skip: the scaler sums that over them in unscale_()."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    dtype = torch.float32
    model, plain = wrapped_parts(network(dtype)), network(dtype)
    optimizer = dgg.AdamW(model.parameters(), **OPTIONS)
    # A step that the scaler leaves out by itself would draw nothing.
    twin = dgg.AdamW(plain.parameters(), fused=True, **OPTIONS)
    scalers = [
        ShardedGradScaler(device="cpu", init_scale=8.0),
        torch.amp.GradScaler("cpu", init_scale=8.0),
    ]
    for k in range(12):
        x = batch(k, dtype)
        for scaler, one, m, part in zip(
            scalers, (optimizer, twin), (model, plain), (mine(x), x), strict=True
        ):
            if k == 2:
                one.set_anchor()
            scaler.scale(loss_of(m, part)).backward()
            if k == 6 and (m is plain or dist.get_rank() == 1):
                grads = [p.grad for p in m.parameters() if p.grad is not None and p.numel()]
                grads[0].view(-1)[0] = torch.inf
            scaler.unscale_(one)
            scaler.step(one)
            assert one.last_step_skipped == (k == 6)
            scaler.update()
            assert scaler.get_scale() == (8.0 if k < 6 else 4.0)
            one.zero_grad()
    assert optimizer.param_groups[0]["draw_index"] == 12
    assert_close(whole_of(model), plain.parameters(), dtype)
    # Otherwise every rank would have its own verdict, and its own scale from then on.
    for one in (optimizer, torch.optim.AdamW(model.parameters(), fused=True)):
        if one is not optimizer:
            dgg.Guidance(one)
        scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
        scaler.scale(loss_of(model, batch(0, dtype))).backward()
        ranks.refused(
            RuntimeError,
            "scaler.unscale_(optimizer) before scaler.step(optimizer)",
            functools.partial(scaler.step, one),
        )
        one.zero_grad()
    assert_close(whole_of(model), plain.parameters(), dtype)


def run_misuse():
    flat = fsdp1(nn.Linear(6, 7), use_orig_params=False)
    ranks.refused(ValueError, "use_orig_params=True", lambda: dgg.AdamW(flat.parameters()))
    model = wrapped_parts(network())
    optimizer = dgg.AdamW(model.parameters())
    held = next(p for p in model.parameters() if p.requires_grad and p.numel())
    kept = held.detach().clone()
    if dist.get_rank() == 1:
        held.detach().fill_(torch.inf)
    error = (ValueError, "inf or NaN") if dist.get_rank() == 1 else (RuntimeError, "rank 1: ")
    ranks.refused(*error, optimizer.set_anchor)
    assert optimizer.param_groups[0]["anchored"] == optimizer.param_groups[0]["task_index"] == 0
    held.detach().copy_(kept)
    optimizer = dgg.AdamW(model.parameters(), process_group=dist.group.WORLD)
    loss_of(model, batch(0)).backward()
    ranks.refused(ValueError, "whose own process group is used", optimizer.step)
    named = {name: torch.zeros(p.shape) for name, p in network().named_parameters()}
    optimizer = dgg.AdamW(model.parameters())
    ranks.refused(
        ValueError,
        "load the tensors into the model",
        functools.partial(optimizer.set_anchor, named, model=model),
    )
    # Somebody keeps the parameters and drops what knows of what they are parts.
    model = fsdp1(nn.Linear(6, 7))
    params = list(model.parameters())
    del model
    gc.collect()
    optimizer = dgg.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    ranks.refused(RuntimeError, "are not to be found", optimizer.step)


# -- importance, the strength without a search, merging -------------------------------------------


def nearly_frozen(dtype=torch.float64) -> nn.Module:
    """The last layer alone is trained: as one unit of FSDP1 the first rank has nothing of it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    model[0].requires_grad_(False)
    return model


def within_engine(kind, build, options):
    """Returns a model in DDP or FSDP1, and its optimizer, under ZeRO the ZeroRedundancyOptimizer.

    And a function that returns the whole weights.
    """
    model = build()
    if kind == "FSDP1":
        wrapped = wrapped_parts(model) if build is network else fsdp1(model)
        return wrapped, dgg.AdamW(wrapped.parameters(), **options), lambda: whole_of(wrapped)
    wrapped = DistributedDataParallel(model)
    if kind == "ZeRO":
        optimizer = zero_redundancy(wrapped.parameters(), **options)
    else:
        optimizer = dgg.AdamW(wrapped.parameters(), **options)
    return wrapped, optimizer, lambda: list(model.parameters())


def of_whole_parameters(kind, optimizer, wrapped, twin, plain):
    """Yields the state of a parameter on this rank, and that of the unsharded one."""
    inner = dgg.unwrap(optimizer)
    if kind != "FSDP1":  # which has runs
        for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
            if p in inner.state:
                yield inner.state[p], twin.state[q]


def other_guidance(kind, build=network, **options):
    """Weights, F, its mean and the strength of every step are those of the unsharded run."""
    options = {**OPTIONS, **options}
    wrapped, optimizer, weights = within_engine(kind, build, options)
    plain = build()
    twin = dgg.AdamW(plain.parameters(), **options)
    scales = fit(wrapped, optimizer, mine)
    expected = fit(plain, twin, lambda x: x)
    assert_guided(optimizer)
    assert any(bool(scale.any()) for scale in expected)
    assert_close(weights(), plain.parameters())
    groups = optimizer.param_groups[0], dgg.unwrap(optimizer).param_groups[0]
    mean = twin.param_groups[0]["importance_mean"]
    assert (mean > 0) == ("importance" in options)
    for group in groups:
        assert abs(group["importance_mean"] - mean) <= 1e-9 * mean, (groups, mean)
    # A rank that has nothing to guide tells of no scale.
    guides = any("anchor" in entry for entry in dgg.unwrap(optimizer).state.values())
    if options.get("norm_scope") != "tensor" and guides:
        torch.testing.assert_close(scales, expected, rtol=1e-6, atol=1e-6)
    for entry, other in of_whole_parameters(kind, optimizer, wrapped, twin, plain):
        assert entry.keys() == other.keys()
        assert_close(entry.values(), other.values())


def other_guidance_resumed(**options):
    """A ZeroRedundancyOptimizer's state has the importance, and its mean: the sums go on."""
    options = {**OPTIONS, "importance": 0.5, **options}
    straight, again = network(), network()
    wrapped = DistributedDataParallel(straight)
    optimizer = zero_redundancy(wrapped.parameters(), **options)
    fit(wrapped, optimizer, mine, 0, 20)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    weights = copy.deepcopy(straight.state_dict())
    assert all("importance" in entry for entry in saved[0]["state"].values())
    fit(wrapped, optimizer, mine, 20, STEPS)

    again.load_state_dict(weights)
    wrapped = DistributedDataParallel(again)
    resumed = zero_redundancy(wrapped.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(saved[0]))
    fit(wrapped, resumed, mine, 20, STEPS)
    if dist.get_world_size() == 2:  # DDP adds four gradients in another order after its first step
        assert all(map(torch.equal, straight.parameters(), again.parameters()))
    assert_close(straight.parameters(), again.parameters())

    expected, _ = alone(**options)
    lone = network()
    lone.load_state_dict(weights)
    single = dgg.AdamW(lone.parameters(), **options)
    single.load_state_dict(copy.deepcopy(saved[0]))
    fit(lone, single, lambda x: x, 20, STEPS)
    assert_close(lone.parameters(), expected.parameters())


def other_guidance_of_runs_resumed(full):
    """FSDP1's optimizer state dicts carry the importance."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"importance": 0.5, "alpha": "auto"}
    model, optimizer = of_state_dicts(full, options=options)
    fit(model, optimizer, mine, 0, 20)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    fit(model, optimizer, mine, 20, STEPS)
    again, resumed = of_state_dicts(full, options=options)
    again.load_state_dict(weights)
    state = FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, saved)
    resumed.load_state_dict(state)
    fit(again, resumed, mine, 20, STEPS)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert resumed.param_groups[0]["importance_mean"] > 0


def share_statistics():
    """Per tensor, what is told of all tensors is told of this rank's share."""
    model = network()
    options = {**OPTIONS, "alpha": "auto", "norm_scope": "tensor", "max_grad_norm": None}
    optimizer = zero_redundancy(model.parameters(), **options)
    inner = dgg.unwrap(optimizer)
    held = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    copies = [nn.Parameter(p.detach().clone()) for p in held]
    twin = dgg.AdamW(copies, **options)
    for one in (inner, twin):
        one.set_anchor()
    seen = 0
    for k in range(6):
        generator = training.numbers_of(k)
        grads = {
            p: training.normal(generator, *p.shape, dtype=p.dtype)
            for p in model.parameters() if p.requires_grad
        }  # fmt: skip
        for one, params in ((inner, list(grads)), (twin, copies)):
            of_one = grads if one is inner else dict(zip(copies, map(grads.get, held), strict=True))
            with one.replay():
                for p in params:
                    p.grad = of_one[p] * -0.4
            for p in params:
                p.grad = of_one[p].clone()
        optimizer.step()
        twin.step()
        for name in ("alignment", "pull", "distance", "grad_norm", "scale"):
            found, expected = inner.guidance_stats()[name], twin.guidance_stats()[name]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=name)
        seen += bool(twin.guidance_stats()["pull"] > 0)
    assert seen


def other_guidance_merged(kind):
    """merge_anchor() is the unsharded one, and all ranks have the merged weights at once."""
    for rule, keep in (("mean", None), ("fisher", None), ("rows", 0.3)):
        options = {**OPTIONS, "importance": 0.5}
        wrapped, optimizer, weights = within_engine(kind, network, options)
        plain = network()
        twin = dgg.AdamW(plain.parameters(), **options)
        inner = dgg.unwrap(optimizer)
        ranks.refused(RuntimeError, "no anchor to merge with", inner.merge_anchor)
        fit(wrapped, optimizer, mine, 0, 15)
        fit(plain, twin, lambda x: x, 0, 15)
        if kind == "FSDP1" and rule == "rows":
            before = weights()
            ranks.refused(
                RuntimeError, "needs whole matrices", lambda o=inner: o.merge_anchor("rows")
            )
            assert all(map(torch.equal, weights(), before))
            continue
        share, expected = inner.merge_anchor(rule, keep=keep), twin.merge_anchor(rule, keep=keep)
        assert abs(share - expected) < 1e-9 and 0 < share < 1, (rule, share, expected)
        assert_close(weights(), plain.parameters())
        assert_same_on_all_ranks(weights())
        fit(wrapped, optimizer, mine, 15, 20)
        fit(plain, twin, lambda x: x, 15, 20)
        assert_close(weights(), plain.parameters())


def other_guidance_misused():
    """Sums by name go to shares, not to runs; who has flat parts gives none."""
    named = {name: torch.rand(p.shape) + 0.1 for name, p in network().named_parameters()}
    options = {**OPTIONS, "importance": 1.0}
    wrapped, optimizer, _ = within_engine("FSDP1", network, options)
    ranks.refused(
        ValueError,
        "importance by name is not cut into its runs",
        functools.partial(optimizer.set_anchor, importance=named, model=wrapped),
    )
    ranks.refused(RuntimeError, "a new optimizer has none", optimizer.set_anchor)
    assert not any("anchor" in entry for entry in optimizer.state.values())
    fit(wrapped, optimizer, mine, 0, 6)
    for model in (None, wrapped):
        give = functools.partial(optimizer.importance_dict, model=model)
        ranks.refused(RuntimeError, "importance_dict() needs whole tensors with names", give)

    wrapped, optimizer, _ = within_engine("ZeRO", network, options)
    plain = network()
    twin = dgg.AdamW(plain.parameters(), **options)
    inner = dgg.unwrap(optimizer)
    ranks.refused(RuntimeError, "", inner.set_anchor)
    assert optimizer.param_groups[0]["task_index"] == 0
    for one, model in ((inner, wrapped.module), (twin, plain)):
        one.set_anchor(importance=named, model=model)
    ranks.refused(RuntimeError, "or shares in their place", inner.importance_dict)
    fit(wrapped, optimizer, mine, 0, 8)
    fit(plain, twin, lambda x: x, 0, 8)
    assert_close(wrapped.module.parameters(), plain.parameters())
    # What one rank alone finds wrong.
    before = copy.deepcopy([inner.state[p] for p in inner.state])
    if dist.get_rank() == 1:
        named = {name: x * torch.nan for name, x in named.items()}
    error = (ValueError, "holds inf or NaN") if dist.get_rank() == 1 else (RuntimeError, "rank 1: ")
    ranks.refused(*error, lambda: inner.set_anchor(importance=named, model=wrapped.module))
    for entry, kept in zip(inner.state.values(), before, strict=True):
        assert all(torch.equal(entry[key], kept[key]) for key in kept)


# -- accelerate -----------------------------------------------------------------------------------


def accelerator_of(plugin=None, **settings):
    """Returns a new Accelerator; accelerate keeps its settings in process-wide singletons."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    fresh()
    if plugin is not None:
        # Over CPUs accelerate drops a plugin for FSDP without a word: it believes in GPUs here.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", **plugin
        )
        settings["fsdp_plugin"] = plugin
    made = accelerate.Accelerator(cpu=True, **settings)
    assert made.num_processes == dist.get_world_size()
    expected = DistributedType.MULTI_CPU if plugin is None else DistributedType.FSDP
    assert made.distributed_type == expected, made.distributed_type
    return made


def prepared(plugin=None, *, max_grad_norm=OPTIONS["max_grad_norm"], **settings):
    """Returns a new Accelerator, and the network and its optimizer as it hands them out."""
    accelerator = accelerator_of(plugin, **settings)
    model = network()
    optimizer = dgg.AdamW(model.parameters(), **{**OPTIONS, "max_grad_norm": max_grad_norm})
    return accelerator, *accelerator.prepare(model, optimizer)


CLIP = 0.05


def accelerated(accelerator, model, optimizer, first, last):
    """Trains with two micro-batches a step, clipped by accelerate; returns the norms it found."""
    inner, norms = dgg.unwrap(optimizer), []
    for k in range(first, last):
        if k in BOUNDARIES:
            inner.set_anchor()
        for half in mine(batch(k)).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP))
                optimizer.step()
                optimizer.zero_grad()
    return [float(whole(n)) for n in norms]


def accelerate_run(folder, plugin=None):
    """Two micro-batches a step, clipped by accelerate, saved in between and loaded again."""
    plain = network()
    twin = dgg.AdamW(plain.parameters(), **{**OPTIONS, "max_grad_norm": None})
    norms = []
    for k in steps(range(STEPS), twin, boundaries=BOUNDARIES):
        loss_of(plain, batch(k)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), CLIP)))
    assert max(norms) > CLIP

    def build():
        return prepared(plugin, max_grad_norm=None, gradient_accumulation_steps=2)

    def full(model):
        return list(map(whole, model.parameters()))

    accelerator, model, optimizer = build()
    found = accelerated(accelerator, model, optimizer, 0, 20)
    accelerator.save_state(os.path.join(folder, "state"))
    found += accelerated(accelerator, model, optimizer, 20, STEPS)
    assert_guided(optimizer)
    assert len(found) == STEPS
    torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(full(model), [p.detach() for p in plain.parameters()])
    inner = dgg.unwrap(optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if not p.requires_grad:
            continue
        anchor = inner.state[p]["anchor"]
        if plugin is not None:
            assert anchor.placements == p.placements and anchor.device_mesh == p.device_mesh
        torch.testing.assert_close(whole(anchor), twin.state[q]["anchor"])

    accelerator, again, resumed = build()
    accelerator.load_state(os.path.join(folder, "state"))
    group = dgg.unwrap(resumed).param_groups[0]
    assert (group["draw_index"], group["task_index"]) == (20, 1)
    accelerated(accelerator, again, resumed, 20, STEPS)
    assert all(map(torch.equal, full(again), full(model)))


def accelerate_trajectory(plugin=None, build=network, named=False, policy=None, **options):
    """Replay by accelerator.backward, clipped in the step."""
    anchors = named_anchors(build) if named else None
    expected, _ = alone(build=build, anchors=anchors, **options)
    if policy == "offload":
        # Pinned memory, which is torch's default, needs an accelerator.
        plugin = {**plugin, "cpu_offload": CPUOffloadPolicy(pin_memory=False)}
    accelerator = accelerator_of(plugin)
    model = build()
    if policy == "meta" and dist.get_rank() > 0:
        for p in model.parameters():
            p.detach().fill_(float("nan"))  # only rank 0 has weights to give
    options = {**OPTIONS, **options}
    model, optimizer = accelerator.prepare(model, dgg.AdamW(model.parameters(), **options))
    fit(model, optimizer, mine, anchors=anchors, backward=accelerator.backward)
    assert_guided(optimizer)
    assert_close(map(whole, model.parameters()), expected.parameters())


def accelerate_low_precision(plugin=None):
    accelerator = accelerator_of(plugin, mixed_precision="bf16")
    model, other = network(torch.float32), network(torch.float32)
    model, optimizer = accelerator.prepare(model, dgg.AdamW(model.parameters(), **OPTIONS))
    twin = dgg.AdamW(other.parameters(), **OPTIONS)
    seen = []
    inner = accelerator.unwrap_model(model)
    inner.second.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    fit_both(model, optimizer, other, twin, backward=accelerator.backward)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_guided(optimizer)
    assert_close(map(whole, model.parameters()), other.parameters(), torch.float32)


def accelerate_keep(kept, plugin=None):
    """Saves what other ranks resume; ``kept`` is a folder that outlives these."""
    accelerator, model, optimizer = prepared(plugin)
    fit(model, optimizer, mine, 0, 20, backward=accelerator.backward)
    accelerator.save_state(kept)


def accelerate_resume_elsewhere(kept, plugin=None):
    accelerator, model, optimizer = prepared(plugin)
    accelerator.load_state(kept)
    fit(model, optimizer, mine, 20, STEPS, backward=accelerator.backward)
    assert_guided(optimizer)
    assert_close(map(whole, model.parameters()), alone()[0].parameters())


def accelerate_unguided(folder, plugin):
    """What was saved before there was an anchor resumes as ever; what is broken is refused."""
    path = os.path.join(folder, "state")
    accelerator, model, optimizer = prepared(plugin)
    fit(model, optimizer, mine, 0, 4, backward=accelerator.backward)
    accelerator.save_state(path)
    fit(model, optimizer, mine, 4, 20, backward=accelerator.backward)
    accelerator, again, resumed = prepared(plugin)
    accelerator.load_state(path)
    assert dgg.unwrap(resumed).param_groups[0]["draw_index"] == 4
    fit(again, resumed, mine, 4, 20, backward=accelerator.backward)
    assert all(map(torch.equal, map(whole, again.parameters()), map(whole, model.parameters())))

    accelerator.save_state(path)
    dist.barrier()
    sharded, full = os.path.join(path, "optimizer_0"), os.path.join(path, "optimizer.bin")
    if dist.get_rank() == 0:
        if os.path.exists(full):
            saved = torch.load(full)
            del saved["state"]["first.weight"]["anchor"]
            torch.save(saved, full)
        else:
            os.truncate(os.path.join(sharded, ".metadata"), 100)
    dist.barrier()
    accelerator, model, optimizer = prepared(plugin)
    error, text = dcp.CheckpointException, "metadata"
    if os.path.exists(full):
        error, text = RuntimeError, "they were lost on the way"
    ranks.refused(error, text, functools.partial(accelerator.load_state, path))


def accelerate_anchor_before_prepare():
    """prepare() exchanges the parameters under the optimizer: an anchor set before is lost."""
    accelerator = accelerator_of({})
    model = network()
    optimizer = dgg.AdamW(model.parameters(), **OPTIONS)
    optimizer.set_anchor()
    model, wrapped = accelerator.prepare(model, optimizer)
    accelerator.backward(loss_of(model, batch(0)))
    ranks.refused(RuntimeError, "anchors are in the state", wrapped.step)


# -- the Trainer ----------------------------------------------------------------------------------

TASK_STEPS = 6
# Of gradients that are but rounding Adam with a small eps makes whole steps.
TRAINER_OPTIONS = {"lr": 1e-2, "eps": 1e-3, "alpha": 0.5, "seed": 3}


def tied_language_model():
    model = language_model(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def frozen_language_model():
    model = language_model()
    model.model.layers[0].requires_grad_(False)
    return model


def adapted_language_model():
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(language_model(), config)


def trainer_for(
    model, task, out, world, guide_first_task=False, anchor=None, options=None, memory=None, **over
):  # fmt: skip
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import dgg.hf

    settings = {
        "per_device_train_batch_size": 4 // world, "max_steps": TASK_STEPS, "logging_steps": 2,
        "gradient_accumulation_steps": 2, "save_strategy": "no", "seed": 0,
        "ddp_backend": "gloo" if world > 1 else None, **over,
    }  # fmt: skip
    arguments = arguments_of(out, **settings)
    if over.get("fsdp"):
        # As in accelerator_of.
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = dgg.hf.GuidanceCallback(task=task, guide_first_task=guide_first_task, anchor=anchor)
    options = {**TRAINER_OPTIONS, **(options or {})}
    # Three or six examples a step, in parts of two and one or of four and two.
    replay = {} if memory is None else {"replay_buffer": memory, "replay_ratio": 0.75}
    return trainer_of(model, arguments, counting(1 + 2 * task), options, callback, **replay)


def fresh():
    """Forgets what accelerate keeps for the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


SAVING = {"save_strategy": "steps", "save_steps": 3}
SHARDING = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def fsdp(**more):
    """Returns the arguments of a Trainer that shards; it writes into them."""
    return {"fsdp": True, "fsdp_config": {**SHARDING, **more}}


def memory_of(*tasks):
    """Returns a memory that is the same on all ranks."""
    memory = dgg.ReplayBuffer(9, seed=5)
    for task in tasks:
        memory.add_task(counting(1 + 2 * task), task)
    return memory


def two_tasks(out, world, over=dict, replay=False):
    """Two tasks, the second saved in its middle; returns its Trainer and the weights between."""
    model, memory = language_model(), memory_of() if replay else None
    fresh()
    first = trainer_for(model, 0, os.path.join(out, "0"), world, memory=memory, **over())
    first.train()
    if replay:
        first.remember()
    start = {n: whole(p).clone() for n, p in model.named_parameters()}
    if over is not dict:
        model = begun(start)  # accelerate finds no layers in a model that it has sharded
    fresh()
    out = os.path.join(out, "1")
    trainer = trainer_for(model, 1, out, world, memory=memory, **SAVING, **over())
    trainer.train()
    assert any("replay/loss" in entry for entry in trainer.state.log_history) == replay
    return trainer, start


def begun(start):
    model = language_model()
    model.load_state_dict(start)
    return model


def killed(out, start, world, over, memory):
    """The second task, which ends in its middle after it was saved."""
    fresh()
    trainer = trainer_for(begun(start), 1, out, world, memory=memory, **SAVING, **over())
    trainer.add_callback(killed_after(5))
    ranks.refused(Killed, "", trainer.train)


def trainer_run(kept, sharded=None, replay=False):
    """Two tasks over the ranks; killed in the middle of the second, resumed bit for bit."""
    world, over = dist.get_world_size(), dict if sharded is None else lambda: fsdp(**sharded)
    trainer, start = two_tasks(kept, world, over, replay)
    optimizer = dgg.unwrap(trainer.optimizer)
    group = optimizer.param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, TASK_STEPS)
    for name, p in trainer.model.named_parameters():
        anchor = optimizer.state[p]["anchor"]
        if sharded is not None:
            assert anchor.placements == p.placements and anchor.device_mesh == p.device_mesh
        assert torch.equal(whole(anchor), start[name])
    assert dgg.hf.is_active(trainer)
    weights = {n: whole(p) for n, p in trainer.model.named_parameters()}
    assert_same_on_all_ranks(weights.values())

    out = os.path.join(kept, "again")
    killed(out, start, world, over, memory_of(0) if replay else None)
    assert sorted(os.listdir(out)) == ["checkpoint-3"]
    fresh()
    memory = memory_of() if replay else None
    again = trainer_for(language_model(), 1, out, world, memory=memory, **SAVING, **over())
    again.train(resume_from_checkpoint=os.path.join(out, "checkpoint-3"))
    names = dict(again.model.named_parameters())
    resumed = dgg.unwrap(again.optimizer)
    assert resumed.param_groups[0]["draw_index"] == TASK_STEPS
    for name, p in trainer.model.named_parameters():
        assert torch.equal(weights[name], whole(names[name])), name
        assert optimizer.state[p].keys() == resumed.state[names[name]].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(whole(value), whole(resumed.state[names[name]][key])), (name, key)
    if dist.get_rank() == 0:
        torch.save(weights, os.path.join(kept, "weights.pt"))


def trainer_resume_elsewhere(kept, sharded=None, replay=False):
    """On other ranks from the middle of the second task to its end."""
    world, over = dist.get_world_size(), dict if sharded is None else lambda: fsdp(**sharded)
    fresh()
    out = os.path.join(kept, f"on {world}")
    memory = memory_of() if replay else None
    trainer = trainer_for(language_model(), 1, out, world, memory=memory, **over())
    trainer.train(resume_from_checkpoint=os.path.join(kept, "1", "checkpoint-3"))
    group = dgg.unwrap(trainer.optimizer).param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, TASK_STEPS)
    expected = torch.load(os.path.join(kept, "weights.pt"))
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(whole(p), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def trainer_with_other_memories(folder):
    """Ranks that drew other numbers of examples would wait for each other for ever."""
    fresh()
    memory = memory_of(*[0] * (dist.get_rank() == 0))
    trainer = trainer_for(
        language_model(), 1, folder, dist.get_world_size(), guide_first_task=True, memory=memory
    )
    ranks.refused(RuntimeError, "the replay buffers of the ranks differ", trainer.train)
    assert trainer.state.global_step == 0


def trainer_replays_under(folder, accumulated=2, **over):
    """Options of DDP change nothing: each pass is one that it reduces, or that waits for it."""
    found, usual = [], {"gradient_accumulation_steps": accumulated}
    for place, options in enumerate((usual, {**usual, **over})):
        fresh()
        out, memory = os.path.join(folder, str(place)), memory_of(0)
        model = language_model()
        trainer = trainer_for(
            model, 1, out, dist.get_world_size(), guide_first_task=True, memory=memory, **options
        )
        trainer.train()
        if "ddp_static_graph" in options:
            assert trainer.model_wrapped.static_graph
        assert_same_on_all_ranks(model.parameters())
        found.append([p.detach() for p in model.parameters()])
    # Sums of the ranks before those of the passes are rounded otherwise.
    exact = {"rtol": 0.0, "atol": 0.0}
    close = {"rtol": 1e-5, "atol": 1e-6} if "accelerator_config" in over else exact
    torch.testing.assert_close(*found, **close)


def trainer_beside(
    folder, build=language_model, named=False, sharded=None, options=None, **over
):  # fmt: skip
    """A guided task over the ranks, and another optimizer that takes the same gradients."""
    import transformers

    fresh()
    if sharded is not None:
        over |= fsdp(**sharded)
    options = {**TRAINER_OPTIONS, **(options or {})}
    model, other = build(), build()
    anchors = {n: p.detach() + 0.1 * named for n, p in other.named_parameters()}

    class Beside(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            self.of = dict(zip(model.parameters(), other.parameters(), strict=True))
            groups = dgg.unwrap(optimizer).param_groups
            self.twin = dgg.AdamW(
                [{**g, "params": [self.of[p] for p in g["params"]]} for g in groups], **options
            )
            self.twin.clear_anchor()
            self.twin.set_anchor(anchors, model=other)

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            for group, theirs in zip(self.twin.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = theirs["lr"]
            for p, q in self.of.items():
                q.grad = None if p.grad is None else whole(p.grad).clone()
            assert any(q.grad is not None and q.grad.any() for q in other.parameters())

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.twin.step()

    trainer = trainer_for(
        model, 0, folder, dist.get_world_size(), guide_first_task=not named,
        anchor=anchors if named else None, options=options, **over,
    )  # fmt: skip
    if sharded is not None:
        plugin, meta = trainer.accelerator.state.fsdp_plugin, "cpu_ram_efficient_loading"
        assert getattr(plugin, meta) == sharded.get(meta, False)
    beside = Beside()
    trainer.add_callback(beside)
    trainer.train()
    assert dgg.hf.is_active(trainer)
    assert trainer.accelerator.mixed_precision == ("bf16" if over.get("bf16") else "no")
    assert all(hasattr(p, "full_tensor") == (sharded is not None) for p in model.parameters())
    assert_same_on_all_ranks(map(whole, model.parameters()))
    assert_close(map(whole, model.parameters()), other.parameters(), torch.float32)
    inner, names, moved = dgg.unwrap(trainer.optimizer), dict(model.named_parameters()), 0
    for name, p in names.items():
        if p.requires_grad:
            assert torch.equal(whole(inner.state[p]["anchor"]), anchors[name])
            moved += 1
        else:
            assert p not in inner.state
    assert moved and inner.param_groups[0]["draw_index"] == TASK_STEPS


# -- starting -------------------------------------------------------------------------------------


def run_cases(rank: int, world: int, folder: str, cases: dict[str, tuple]) -> None:
    """Runs cases, name → (function, arguments), and writes for each what went wrong, or nothing.

    A rank that failed does not meet the others in collectives any more: all end with it.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    ranks.join(rank, world, folder)
    environment = dict(os.environ)
    outcomes = {}
    for name, (function, arguments) in cases.items():
        # accelerate and transformers leave there what they were told, for whoever comes next.
        os.environ.clear()
        os.environ.update(environment)
        try:
            if "folder" in arguments:
                arguments = {**arguments, "folder": os.path.join(folder, str(len(outcomes)))}
            if "kept" in arguments:
                kept = os.path.join(os.path.dirname(folder), "kept", arguments["kept"])
                arguments = {**arguments, "kept": kept}
            globals()[function](**arguments)
        except BaseException:
            outcomes[name] = traceback.format_exc()
        else:
            outcomes[name] = ""
        with open(os.path.join(folder, f"rank {rank}.json"), "w") as file:
            json.dump(outcomes, file)
        if outcomes[name]:
            os._exit(1)
    ranks.leave()
