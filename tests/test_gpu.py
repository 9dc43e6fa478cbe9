# SPDX-License-Identifier: BSD-3-Clause
"""What only a real GPU can show, for both of its backends.

- Every optimizer, guidance and dtype mix against the float64 reference; 100 repeats; masks.
- Importance, alpha="auto" and every route beside the reference backend.
- No synchronisation, few launches for a LoRA list, streams, CUDA graphs.
- GradScaler on the device, checkpoints from and to torch.optim's fused optimizer, anchors on the
  host, a tensor of more than 2**31 elements, two devices, odd sizes at odd addresses.

With ``DGG_GPU_TESTS_ON=cpu`` the same tests run on the CPU, under Triton's interpreter if
``TRITON_INTERPRET=1``: a test of the tests. What needs the real thing then skips and says so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os

import pytest
import torch

import dgg
from cases import (
    BF16,
    F16,
    F32,
    F64,
    GUIDANCE,
    MIXES,
    OPTIMIZERS,
    ROUNDING,
    SHAPES,
    assert_rounding,
    make_params,
)
from dgg import _philox, backends
from test_guided import Oracle, build, magnitude, warm_moments

DEVICE = torch.device(os.environ.get("DGG_GPU_TESTS_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.usefixtures("quick_interpreter")

real_gpu = pytest.mark.skipif(not ON_GPU, reason="the CPU has no streams, graphs, kernels or waits")
# A chunk is 8192 elements: below, at and above its end, an empty tensor and a scalar.
CHUNKY = [(3,), (), (0,), (8191,), (8192,), (8193,), (130, 257)]
# LLaVA-7B's LoRA of rank 16: A and B of q, k, v, o, gate, up and down in 32 layers.
LINEARS = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
LORA = [shape for n, m in LINEARS for shape in ((16, n), (m, 16))] * 32


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    reason = None
    if not ON_GPU or torch.cuda.is_available():
        reason = backends.unavailable(request.param, DEVICE)
    if reason is not None:
        if ON_GPU:
            pytest.fail(f"backend {request.param!r} cannot run on this GPU: {reason}")
        pytest.skip(reason)
    return request.param


def on_device(shapes, dtype=F32, seed=0, device=DEVICE):
    """Parameters as `make_params` has them, on the device."""
    made = make_params(shapes, dtype, seed)
    return [torch.nn.Parameter(p.detach().to(device)) for p in made]


def give(params, generator, *, dtype=None, missing=()):
    """Gives every parameter but those in ``missing`` a gradient of order one, drawn on the CPU."""
    for place, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=F64)
        if dtype not in (None, p.dtype):
            p.grad_dtype = None  # any
        p.grad = None if place in missing else grad.to(p.device, dtype or p.dtype)


def replay_into(optimizer, params, values):
    with optimizer.replay():
        for p, value in zip(params, values, strict=True):
            p.grad = None if value is None else value.to(p.device, p.dtype)


def move(params, generator):
    """Moves the parameters away from their anchors."""
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype))


def state_of(optimizer, params):
    tensors = [p.detach().clone() for p in params]
    for p in params:
        entry = optimizer.state[p]
        tensors += [entry[name].clone() for name in sorted(entry)]
    return tensors


def assert_same_bits(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


class HostOracle(Oracle):
    """`test_guided.Oracle` of parameters that are elsewhere; float64 on the CPU."""

    def __init__(self, name, params, guidance):
        super().__init__(name, [p.detach().cpu() for p in params], guidance)

    def sync(self, optimizer, params):
        for p, q in zip(params, self.params, strict=True):
            q.data.copy_(p.detach())
            q.grad = None if p.grad is None else p.grad.to("cpu", F64, copy=True)
            if p in optimizer.state:
                self.optimizer.state[q] = {
                    key: value.to("cpu", F32 if key == "step" else F64, copy=True)
                    for key, value in optimizer.state[p].items()
                }
        self.optimizer._cache = None
        for mine, theirs in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            for key in ("draw_index", "task_index", "anchored"):
                mine[key] = theirs[key]


# -- memory, first: the small case for memory checkers --------------------------------------------


@pytest.mark.parametrize("granularity", ["step", "element"])
@pytest.mark.parametrize("kind", ["adamw-amsgrad", "sgd-momentum"])
def test_nothing_is_overrun_at_odd_sizes_and_addresses(kind, granularity, backend):
    """Parameters are views into one buffer, at odd addresses, with guards between them."""
    sizes = [1, 3, 7, 65, 8191, 8193, 16385]
    guard = 5
    for dtype in (F32, BF16):
        buffer = torch.full((sum(sizes) + guard * (len(sizes) + 1),), 7.0, dtype=dtype)
        buffer = buffer.to(DEVICE)
        params, place = [], guard
        for size in sizes:
            params.append(torch.nn.Parameter(buffer[place : place + size]))
            place += size + guard
        options = {"alpha": 1.0, "granularity": granularity, "max_grad_norm": 1.0}
        cls, hyper = OPTIMIZERS[kind]
        optimizer = cls(params, backend=backend, **{**hyper, **options})
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            if step == 1:
                optimizer.set_anchor()
                optimizer.param_groups[0]["alpha"] = 0.5
            give(params, generator)
            replay_into(optimizer, params, [torch.ones(p.shape) for p in params])
            optimizer.step()
        inside = torch.zeros(len(buffer), dtype=torch.bool)
        for p in params:
            begin = p.storage_offset()
            inside[begin : begin + p.numel()] = True
        assert torch.equal(
            buffer.cpu()[~inside], torch.full((int((~inside).sum()),), 7.0).to(dtype)
        )
        assert all(bool(p.isfinite().all()) for p in params)


# -- no wait, few launches ------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting():
    """Raises if anything in the block makes the host wait for the device."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_a_step_never_waits(kind, granularity, clip, scope, backend):
    cls, hyper = OPTIMIZERS[kind]
    params = on_device([(7, 5), (300,), (0,)])
    optimizer = cls(
        params, backend=backend, alpha=0.5, granularity=granularity, max_grad_norm=clip,
        norm_scope=scope, seed=3, **hyper,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        if step == 1:
            optimizer.set_anchor()
        give(params, generator, missing=(1,) if step == 6 else ())
        # What is new is made: state at the first step, tables after an anchor.
        with contextlib.nullcontext() if step < 2 else no_waiting():
            optimizer.step()
            optimizer.guidance_stats()
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_a_step_under_a_grad_scaler_never_waits(kind, backend):
    cls, hyper = OPTIMIZERS[kind]
    params = on_device([(7, 5), (300,)])
    optimizer = cls(params, backend=backend, alpha=1.0, max_grad_norm=1.0, **hyper)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        if step == 2:
            optimizer.set_anchor()
        optimizer.zero_grad()
        noise = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in params]
        loss = sum((p * x).sum() for p, x in zip(params, noise, strict=True))
        scaler.scale(loss).backward()
        with contextlib.nullcontext() if step < 3 else no_waiting():
            scaler.step(optimizer)
        scaler.update()
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_inf_changes_nothing_but_the_draw(kind, backend):
    cls, hyper = OPTIMIZERS[kind]
    params = on_device([(7, 5), (300,)])
    optimizer = cls(params, backend=backend, alpha=1.0, max_grad_norm=1.0, seed=1, **hyper)
    # As fused=True, which this rehearsal on a CPU may not have.
    optimizer._settings = dataclasses.replace(optimizer._settings, unscales=True)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        if step == 2:
            optimizer.set_anchor()
        optimizer.zero_grad()
        noise = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in params]
        loss = sum((p * x).sum() for p, x in zip(params, noise, strict=True))
        scaler.scale(loss).backward()
        skipped = step == 3
        if skipped:
            params[1].grad[17] = float("inf")
            before = state_of(optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.last_step_skipped) == skipped
        assert optimizer.param_groups[0]["draw_index"] == step + 1
        if skipped:
            assert_same_bits(state_of(optimizer, params), before)
    assert scaler.get_scale() == 4.0


def launches(function):
    """Returns the names of the kernels that a call launches, copies and fills left out."""
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    on_host = torch.autograd.DeviceType.CPU
    host = {e.name for e in profiler.events() if e.device_type == on_host}
    names = [e.name for e in profiler.events() if e.device_type != on_host]
    # A range of the host has a shadow of its name on the device.
    return [n for n in names if n not in host and not n.startswith(("Memcpy", "Memset"))]


@real_gpu
@pytest.mark.parametrize("guided", [False, True])
def test_a_lora_step_takes_few_launches(guided, backend, bench):
    most = bench("gpu.targets").LAUNCHES if guided else 1
    params = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in LORA]
    clip = 1.0 if guided else None
    optimizer = dgg.AdamW(params, backend=backend, alpha=1.0, max_grad_norm=clip)
    if guided:
        optimizer.set_anchor()
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    found = launches(optimizer.step)
    if not found:
        pytest.skip("torch.profiler sees no kernels here (CUPTI is missing or refused)")
    assert len(found) <= most, found


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["step", "element"])
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_a_run_repeats_bit_for_bit(kind, granularity, backend):
    cls, hyper = OPTIMIZERS[kind]
    shapes = [(300, 400), (8193,), (17,), (0,)] if ON_GPU else [(65,), (3,)]
    start = on_device(shapes)
    grads = [torch.randn_like(p) for p in start]
    first = None
    for _ in range(100 if ON_GPU else 3):
        params = [torch.nn.Parameter(p.detach().clone()) for p in start]
        optimizer = cls(
            params, backend=backend, alpha=1.0 if granularity == "step" else 0.5, seed=9,
            granularity=granularity, max_grad_norm=1.0, **hyper,
        )  # fmt: skip
        for step in range(3):
            if step == 1:
                optimizer.set_anchor()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        found = state_of(optimizer, params)
        first = first or found
        assert_same_bits(found, first)


@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_masks_are_those_of_the_cpu(granularity, backend):
    # lr 1, zero gradients, unscaled guidance of strength 1: what is drawn lands on the anchor.
    seed = 2**63 + 5
    params = on_device([(257,), (91, 93), (2,)])
    optimizer = dgg.SGD(
        params, lr=1.0, alpha=0.3, scaling=False, granularity=granularity, seed=seed,
        backend=backend,
    )  # fmt: skip
    optimizer.set_anchor()
    limit = _philox.threshold(0.3)
    for draw in range(6):
        with torch.no_grad():
            for p in params:
                p.add_(1)
                p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for j, (p, old) in enumerate(zip(params, before, strict=True)):
            moved = (p.detach() != old).cpu()
            if granularity == "step":
                drawn = torch.full_like(moved, _philox.step_word(seed, draw) < limit)
            elif granularity == "tensor":
                word = _philox.tensor_words(seed, draw, torch.tensor([j])).item()
                drawn = torch.full_like(moved, word < limit)
            else:
                elements = torch.arange(p.numel()).view(p.shape)
                drawn = _philox.element_words(seed, draw, j, elements) < limit
            assert torch.equal(moved, drawn)


def test_look_ahead_equals_a_measured_distance(backend):
    params = on_device(CHUNKY if ON_GPU else [(65,), (3,)])
    twins = copy.deepcopy(params)
    options = {"alpha": 1.0, "strength": 0.7}
    optimizer, twin = (build("adamw", p, options, backend=backend) for p in (params, twins))
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        if step == 1:
            optimizer.set_anchor()
            twin.set_anchor()
        give(params, generator, missing=(step % 2,))
        for p, q in zip(params, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        twin._cache = None  # forgets every distance: the norm pass measures anew
        twin.step()
        if step > 0:
            pair = [o.guidance_stats()["distance"] for o in (optimizer, twin)]
            assert torch.equal(*pair)
    assert_same_bits([p.detach() for p in params], [p.detach() for p in twins])


def test_anchors_on_the_host_give_the_same_bits(backend):
    runs = []
    for anchor_device in (None, "cpu"):
        params = on_device([(300, 70), (17,)] if ON_GPU else [(65,), (3,)])
        optimizer = dgg.AdamW(
            params, alpha=0.5, seed=4, max_grad_norm=1.0, anchor_device=anchor_device,
            backend=backend,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        for step in range(10):
            if step in (1, 6):
                optimizer.set_anchor()
            give(params, generator)
            with no_waiting() if step not in (0, 1, 2, 6, 7) else contextlib.nullcontext():
                optimizer.step()
        assert optimizer.state[params[0]]["anchor"].device.type == (anchor_device or DEVICE.type)
        runs.append([p.detach() for p in params])
    assert_same_bits(*runs)


@real_gpu
def test_an_anchor_dropped_while_it_is_measured_takes_nothing_along(backend):
    """With α = 1 the next distances are measured beside what follows: here, their end."""
    runs = []
    for waits in (True, False):
        params = on_device([(2048, 2048)] * 4)
        generator = torch.Generator(DEVICE).manual_seed(1)
        optimizer = dgg.AdamW(
            params, alpha=1.0, max_grad_norm=1.0, anchor_device="cpu", backend=backend
        )  # fmt: skip
        for _ in range(4):
            optimizer.set_anchor()
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator, device=DEVICE)
                optimizer.step()
            if waits:
                torch.cuda.synchronize()
            optimizer.clear_anchor()
            # No addresses: whoever still read the tables would be lost.
            junk = [torch.full((64,), -1, device=DEVICE) for _ in range(300)]
            assert all(x.dtype == torch.int64 for x in junk)
        torch.cuda.synchronize()
        runs.append([p.detach() for p in params])
    assert_same_bits(*runs)


# -- streams, graphs, devices ---------------------------------------------------------------------


@real_gpu
def test_a_side_stream_gives_the_same_bits(backend):
    runs = []
    for side in (False, True):
        params = on_device([(1000, 1000), (17,)])
        optimizer = dgg.AdamW(params, alpha=1.0, max_grad_norm=1.0, backend=backend)
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in params]
        grads = [g.to(DEVICE) for g in grads]
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(4):
                if step == 1:
                    optimizer.set_anchor()
                for p, grad in zip(params, grads, strict=True):
                    # Made late on this stream: a step on another one would read it too early.
                    torch.cuda._sleep(1_000_000)
                    p.grad = grad * (step + 1)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        runs.append(state_of(optimizer, params))
    assert_same_bits(*runs)


@real_gpu
@pytest.mark.parametrize("granularity", ["step", "tensor", "element"])
def test_graph_replays_equal_eager_steps(granularity, backend, bench):
    """Draw, learning rate and alpha are read on the device, so replays change with them."""
    runs = []
    for optimizer, params in bench("gpu.checks").eager_and_replayed(
        lambda: on_device([(300, 70), (17,), (8193,)]), backend, 12, granularity=granularity
    ):
        torch.cuda.synchronize()
        assert int(optimizer.param_groups[0]["draw_index"]) == 14
        runs.append(state_of(optimizer, params))
    assert_same_bits(*runs)


@real_gpu
def test_a_whole_training_step_is_captured_on_the_stream_of_its_warm_up(backend):
    """A graph's gradients lie elsewhere, so the step sends addresses while it is captured."""
    runs = []
    for captured in (False, True):
        params = on_device([(300, 70), (17,), (8193,)])
        factors = [torch.linspace(-1, 1, p.numel(), device=DEVICE).view(p.shape) for p in params]
        optimizer = dgg.AdamW(
            params, alpha=1.0, max_grad_norm=1.0, capturable=True, backend=backend
        )  # fmt: skip

        def train(params=params, factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            sum((p * x).square().sum() for p, x in zip(params, factors, strict=True)).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(4):
                if number == 1:
                    optimizer.set_anchor()
                train()
        torch.cuda.current_stream().wait_stream(side)
        step = train
        if captured:
            optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                train()
            step = graph.replay
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        assert int(optimizer.param_groups[0]["draw_index"]) == 9
        # What was freed during the capture must not be asked for in vain, here and later.
        torch.empty(1000, pin_memory=True)
        runs.append(state_of(optimizer, params))
    assert_same_bits(*runs)


@real_gpu
def test_a_step_that_cannot_be_replayed_is_not_captured(backend):
    params = on_device([(17,)])
    optimizer = dgg.AdamW(params, backend=backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(
        torch.cuda.CUDAGraph()
    ):  # fmt: skip
        optimizer.step()


@real_gpu
def test_parameters_on_two_devices(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    runs = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        params = [
            torch.nn.Parameter(p.detach().to(device))
            for p, device in zip(make_params([(300,), (65, 3)], F32), devices, strict=True)
        ]
        optimizer = dgg.AdamW(params, alpha=1.0, max_grad_norm=1.0, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            if step == 1:
                optimizer.set_anchor()
            give(params, generator)
            optimizer.step()
        runs.append([p.detach().cpu() for p in params])
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@real_gpu
def test_more_than_2_to_the_31_elements(backend):
    count = 2**31 + 9
    # θ, g, m, v and θ* in bfloat16, a bool of every element at the end, and a little to compute.
    needed = (5 * 2 + 1) * count + 2**30
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
    places = [0, 8191, 8192, 2**30, 2**31 - 1, 2**31, 2**31 + 1, count - 1]
    param = torch.nn.Parameter(torch.ones(count, dtype=BF16, device=DEVICE))
    param.grad = torch.full_like(param, 0.5)
    optimizer = dgg.AdamW(
        [param], lr=0.125, weight_decay=0.0, betas=(0.5, 0.5), alpha=1.0, backend=backend
    )
    with torch.no_grad():
        optimizer.set_anchor()
        param.add_(1)
        # Another gradient at every place that is looked at: a wrong one would show.
        for number, place in enumerate(places):
            param.grad[place] = -2.0 if number % 2 else 3.0
    optimizer.step()
    # ‖g‖ is about half of ‖d‖ = √count, so G = g + s d > 0 wherever g = 0.5 or 3, < 0 at -2; the
    # first step of Adam is lr sign(G): 2 ∓ 0.125, exact in bfloat16.
    stats = optimizer.guidance_stats()
    squares = 0.25 * (count - len(places)) + 9.0 * 4 + 4.0 * 4
    assert stats["grad_norm"].item() == pytest.approx(squares**0.5, rel=1e-6)
    assert stats["distance"].item() == pytest.approx(count**0.5, rel=1e-6)
    expected = [2.125 if number % 2 else 1.875 for number in range(len(places))]
    assert [param[place].item() for place in places] == expected
    param.data[places] = 1.875
    assert bool((param.data == 1.875).all())


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"fused": True}, {"capturable": True}], ids=str)
def test_state_dicts_are_exchanged_with_torch(flags, backend):
    if not ON_GPU and "capturable" in flags:
        pytest.skip("torch has capturable optimizers on accelerators only")
    hyper = OPTIMIZERS["adamw"][1]

    def run(optimizer, params, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            give(params, generator)
            optimizer.step()

    mine, theirs = on_device([(300,), (7, 5)]), on_device([(300,), (7, 5)])
    torch_optimizer = torch.optim.AdamW(theirs, **hyper, **flags)
    run(torch_optimizer, theirs, 3, seed=1)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    optimizer = dgg.AdamW(mine, backend=backend, **hyper)
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    run(optimizer, mine, 3, seed=2)
    run(torch_optimizer, theirs, 3, seed=2)
    torch.testing.assert_close(mine, theirs)
    back = torch.optim.AdamW(theirs, **hyper, **flags)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in back.param_groups:
        group.update(flags)
    run(back, theirs, 2, seed=3)
    run(optimizer, mine, 2, seed=3)
    torch.testing.assert_close(mine, theirs)
    assert all(back.state[q]["step"].item() == 8 for q in theirs)


# -- every element --------------------------------------------------------------------------------


def check_against_the_reference(name, guidance, mix, backend, *, shapes, steps):
    dtype, grad_dtype, anchor_dtype = mix
    params = on_device(shapes, dtype)
    options = {**GUIDANCE[guidance], "anchor_dtype": anchor_dtype}
    optimizer = build(name, params, options, backend=backend)
    oracle = HostOracle(name, params, {**options, "anchor_dtype": None})
    generator = torch.Generator().manual_seed(3)
    optimizer.set_anchor()
    move(params, generator)
    warm_moments(optimizer, params, generator)
    for step in range(steps):
        give(params, generator, dtype=grad_dtype, missing=(step % 3,))
        oracle.sync(optimizer, params)
        scales = [magnitude(optimizer, p).cpu() for p in params]
        if step % 2:
            values = [torch.randn(p.shape, generator=generator, dtype=F64) for p in params]
            values = [v.to(dtype) for v in values]
            values[1] = None
            replay_into(optimizer, params, values)
            replay_into(oracle.optimizer, oracle.params, values)
            for row, value in enumerate(values):
                scales[row] += 0.0 if value is None else 1.5 * value.double().abs()
        optimizer.step()
        oracle.optimizer.step()
        for row, (p, q) in enumerate(zip(params, oracle.params, strict=True)):
            label = f"{name} {guidance} step {step} row {row}"
            assert_rounding(p.detach().cpu(), q.detach(), scales[row], label)
            for key, value in oracle.optimizer.state[q].items():
                stored = optimizer.state[p][key].cpu()
                if key in ("step", "anchor"):
                    assert torch.equal(stored.double(), value.double()), f"{label} {key}"
                    continue
                scale = scales[row] ** 2 if key.endswith("_sq") else scales[row]
                assert_rounding(stored, value, scale, f"{label} {key}")
        hit = optimizer.guidance_stats()["injected"]
        assert bool(hit) == bool(oracle.optimizer.guidance_stats()["injected"])


@pytest.mark.parametrize("mix", [(F32, F32, None), (BF16, BF16, None)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_element_is_the_reference_rounded(name, guidance, mix, backend):
    if backend == "triton" and mix[0] is BF16 and name not in ("adamw", "sgd-momentum"):
        pytest.skip("one kernel less to compile: the math is that of the float32 test")
    shapes = CHUNKY if ON_GPU else [(3,), (), (0,), (65,)]
    check_against_the_reference(name, guidance, mix, backend, shapes=shapes, steps=3)


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m if d))
@pytest.mark.parametrize(
    ("name", "guidance"), [("adamw", "step"), ("sgd-momentum", "all-elements")]
)
def test_every_mix_of_dtypes_is_the_reference_rounded(name, guidance, mix, backend):
    shapes = SHAPES if ON_GPU else [(3,), (), (0,), (65,)]
    check_against_the_reference(name, guidance, mix, backend, shapes=shapes, steps=3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("guidance", ["step", "tensor-norms", "element-draws"])
def test_gradients_are_edited_as_the_reference_does(guidance, dtype, backend):
    """`dgg.Guidance` round an optimizer of torch's; beside it the reference, on the CPU."""
    shapes = CHUNKY if ON_GPU else [(3,), (), (0,), (65,)]
    runs = []
    for name, device in ((backend, DEVICE), ("reference", torch.device("cpu"))):
        params = on_device(shapes, dtype, device=device)
        optimizer = torch.optim.SGD(params, lr=1.0)
        guide = dgg.Guidance(optimizer, seed=5, backend=name, **GUIDANCE[guidance])
        guide.set_anchor()
        edited = []
        # lr is 0 at the step: what G was stands in the gradients.
        optimizer.param_groups[0]["lr"] = 0.0
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            move(params, generator)
            give(params, generator, missing=(step % 3,))
            if step % 2:
                values = [torch.randn(p.shape, generator=generator) for p in params]
                with guide.replay():
                    for p, value in zip(params, values, strict=True):
                        p.grad = value.to(p.device, p.dtype)
            optimizer.step()
            edited += [p.grad.cpu().clone() for p in params if p.grad is not None]
        assert guide.guidance_stats()["injected"] is not None
        runs.append(edited)
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}],
                         ids=lambda o: next(iter(o)))  # fmt: skip
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_rounding_of_bfloat16_is_that_of_the_reference(kind, options, backend):
    cls, hyper = OPTIMIZERS[kind]
    runs = []
    for name, device in ((backend, DEVICE), ("reference", torch.device("cpu"))):
        params = on_device([(300, 70), (8193,)] if ON_GPU else [(65,)], BF16, device=device)
        optimizer = cls(
            params, alpha=0.5, seed=8, max_grad_norm=1.0, state_dtype=F32, anchor_dtype=F32,
            backend=name, **hyper, **options,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(6)
        for step in range(4):
            if step == 1:
                optimizer.set_anchor()
            give(params, generator)
            optimizer.step()
        runs.append([p.detach().cpu() for p in params])
    for mine, theirs in zip(*runs, strict=True):
        # A float32 rounding apart before the last rounding, which may then fall on either side.
        assert (mine != theirs).sum().item() <= 0.01 * mine.numel()
        torch.testing.assert_close(mine, theirs)


# -- where the pull points, how strong it is, and where it enters ---------------------------------


def check_beside_the_reference(kind, backend, dtype, **options):
    """Six steps over two anchors, with replay gradients that the gradients conflict with.

    Returns the statistics of the last step, by backend.
    """
    cls, hyper = OPTIMIZERS[kind]
    shapes = CHUNKY if ON_GPU else [(3,), (), (0,), (65,)]
    found, statistics = [], []
    for name, device in ((backend, DEVICE), ("reference", torch.device("cpu"))):
        params = on_device(shapes, dtype, device=device)
        optimizer = cls(params, seed=5, max_grad_norm=2.0, backend=name, **{**hyper, **options})
        generator = torch.Generator().manual_seed(2)
        for step in range(6):
            if step % 2 == 0:
                away = [torch.randn(p.shape, generator=generator, dtype=F64) for p in params]
            if step in (2, 4):
                optimizer.set_anchor()
                with torch.no_grad():
                    for p, d in zip(params, away, strict=True):
                        p.add_(d.to(p.device, p.dtype))
            for p, d in zip(params, away, strict=True):
                noise = torch.randn(p.shape, generator=generator, dtype=F64)
                p.grad = (0.3 * noise - 2 * d).to(p.device, p.dtype)
            replay_into(optimizer, params, away)
            # What is new is made: state at the first step, tables after an anchor.
            with no_waiting() if step in (3, 5) and device == DEVICE else contextlib.nullcontext():
                optimizer.step()
        found.append([p.detach().cpu() for p in params])
        statistics.append(optimizer.guidance_stats())
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    for key in ("scale", "distance"):
        mine, theirs = (stats[key].cpu() for stats in statistics)
        tolerance = 1e-5 if dtype is F32 else 1e-2
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
        assert theirs.max() > 0  # by tensor an empty one has none
    return statistics


@pytest.mark.parametrize("granularity", ["step", "element"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
def test_a_pull_is_weighted_by_importance(dtype, granularity, backend):
    alpha = 1.0 if granularity == "step" else 0.5
    check_beside_the_reference(
        "adamw", backend, dtype, importance=0.7, alpha=alpha, granularity=granularity
    )


@pytest.mark.parametrize(("importance", "scope"), [(0.0, "tensor"), (0.7, "global")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
def test_a_strength_that_needs_no_search(dtype, importance, scope, backend):
    mine, theirs = check_beside_the_reference(
        "adamw", backend, dtype, importance=importance, alpha="auto", norm_scope=scope
    )
    for key in ("alignment", "pull"):
        torch.testing.assert_close(
            mine[key].cpu(), theirs[key], rtol=1e-5 if dtype is F32 else 1e-2, atol=0
        )
    assert theirs["alignment"] < 0 < theirs["pull"]


@pytest.mark.parametrize(
    ("kind", "route", "importance", "dtype"),
    [("adamw", "first_moment", 0.7, F32), ("adamw", "decoupled", 0.0, BF16),
     ("adam", "decoupled", 0.7, F32), ("sgd-momentum", "decoupled", 0.0, F32)],
)  # fmt: skip
def test_a_pull_enters_where_it_is_sent(kind, route, importance, dtype, backend):
    check_beside_the_reference(kind, backend, dtype, route=route, importance=importance, alpha=1.0)


@real_gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_the_two_backends_agree(kind, dtype):
    missing = {b: backends.unavailable(b, DEVICE) for b in ("cpp", "triton")}
    if any(missing.values()):
        pytest.fail(f"both are to run on a GPU: {missing}")
    results = []
    for backend in missing:
        params = on_device(CHUNKY, dtype)
        optimizer = build(kind, params, GUIDANCE["step"], backend=backend)
        generator = torch.Generator().manual_seed(1)
        optimizer.set_anchor()
        move(params, generator)
        warm_moments(optimizer, params, generator)
        give(params, generator)
        scales = [magnitude(optimizer, p) for p in params]
        optimizer.step()
        results.append([p.detach() for p in params])
    rule = ROUNDING[dtype]
    for cpp, triton, scale in zip(*results, scales, strict=True):
        wide = cpp.double()
        # Either is within one rounding of the exact value.
        bound = 2 * (
            rule["storage"] * wide.abs() * (1 + rule["storage"])
            + rule["arithmetic"] * scale
            + rule["absolute"]
        )
        assert bool(((wide - triton.double()).abs() <= bound).all())
