# SPDX-License-Identifier: BSD-3-Clause
"""The host side of a GPU's steps, on a device that is none (gpu_stand_in.py).

- Captured steps depend on nothing that later steps overwrite or free: addresses, learning rates,
  tables, workspace, state. Where an anchor is overwritten in place a graph stays valid; where it
  cannot, its memory is kept and the user is told to capture anew.
- Anchors that are kept off the device come through streams with the rules of torch 2.10.
- Tests of test_gpu.py whose host side would otherwise wait for a GPU: all that are marked
  ``real_gpu`` there, but for
  `test_parameters_on_two_devices` (the stand-in is one device),
  `test_more_than_2_to_the_31_elements` (the interpreter would take days, and a GPU's memory) and
  `test_the_two_backends_agree` (the stand-in has Triton's launches alone; test_cuda_host.py runs
  the CUDA kernels).
- The stand-in itself: what it is there to find, it finds.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import warnings

import pytest
import torch

import dgg
import test_gpu
from cases import F32, F64, make_params
from dgg import backends
from dgg.backends import libraries, prefetch
from gpu_stand_in import DEVICE, FreedMemory, StandIn

MISSING = backends.unavailable("triton", torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"no Triton here: {MISSING}"),
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning"),
]

SHAPES = [(30, 7), (17,)]


@pytest.fixture
def gpu(monkeypatch):
    with StandIn(monkeypatch) as found:
        yield found


class Training:
    """An optimizer over parameters on the device, with gradients that stay where they are."""

    def __init__(self, *, anchored=True, rate=None, shapes=SHAPES, **options):
        self.params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in make_params(shapes, F32)]
        options = {"alpha": 1.0, "max_grad_norm": 1.0, "capturable": True, **options}
        self.optimizer = dgg.AdamW(self.params, backend="triton", lr=0.1, **options)
        if rate is not None:
            self.optimizer.param_groups[0]["lr"] = torch.full((), rate, device=DEVICE)
        for p in self.params:
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        if anchored:
            self.optimizer.set_anchor()
        self.optimizer.step()
        self.grads = [p.grad for p in self.params]

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    def step(self, factor=1.0):
        """A step with other gradients than the static ones, of which the graph knows nothing."""
        for p in self.params:
            p.grad = torch.full_like(p, factor)
        self.optimizer.step()
        self.restore()

    def restore(self):
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def fill(self, value):
        for grad in self.grads:
            grad.fill_(value)

    def train(self):
        """Forward, backward and step: gradients are where a graph's memory is."""
        self.optimizer.zero_grad()
        sum((p * 2).square().sum() for p in self.params).backward()
        self.optimizer.step()

    def bits(self):
        entries = [self.optimizer.state[p] for p in self.params]
        return [
            *(p.detach().clone() for p in self.params),
            *(entry[name].clone() for entry in entries for name in sorted(entry)),
        ]


def assert_same_bits(*runs):
    for tensors in zip(*runs, strict=True):
        assert all(torch.equal(x, tensors[0]) for x in tensors)


# -- captured steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_whole_training_step_is_captured(rate, anchored, gpu):
    runs = []
    for captured in (False, True):
        run = Training(rate=rate, anchored=anchored)
        run.train()
        step = run.train
        if captured:
            run.optimizer.zero_grad()
            with gpu.graph() as graph:
                run.train()
            assert graph.copies >= 2, "gradient addresses and hyper-parameters are not sent"
            step = graph.replay
        for _ in range(3):
            step()
        runs.append(run.bits())
    assert_same_bits(*runs)


@pytest.mark.parametrize("importance", [0.0, 0.7])
def test_a_guarded_training_step_is_captured(importance, gpu):
    """The strength of the pull is the device's own: replays follow the replay gradients."""
    runs = []
    for captured in (False, True):
        run = Training(alpha="auto", importance=importance, replay_weight=0.2)
        old = [run.optimizer.state[p]["anchor"].clone() for p in run.params]
        new = [p + 30.0 for p in old]

        def train(run=run, old=old, new=new):
            run.optimizer.zero_grad()
            with run.optimizer.replay():
                sum((p - x).square().sum() for p, x in zip(run.params, old, strict=True)).backward()
            sum((p - x).square().sum() for p, x in zip(run.params, new, strict=True)).backward()
            run.optimizer.step()

        for _ in range(5):  # to the far side of the anchor
            train()
        step = train
        if captured:
            run.optimizer.zero_grad()
            with gpu.graph() as graph:
                train()
            step = graph.replay
        pulls = []
        for _ in range(4):
            step()
            stats = run.optimizer.guidance_stats()
            pulls.append([stats[name].item() for name in ("alignment", "pull", "scale", "clip")])
        runs.append((run.bits(), pulls))
    (bits, pulls), (replayed, pulls_of_replays) = runs
    assert_same_bits(bits, replayed)
    assert pulls == pulls_of_replays
    assert all(alignment < 0 < pull for alignment, pull, *_ in pulls)
    assert len({pull for _, pull, *_ in pulls}) == 4


def interrupted(gpu, between, replays=2, **options):
    """Runs replays with ``between`` before each, and the same without a graph."""
    runs = []
    for captured in (False, True):
        run = Training(**options)
        step = run.optimizer.step
        if captured:
            with gpu.graph() as graph:
                run.optimizer.step()
            step = graph.replay
        for number in range(replays):
            between(run, number)
            gc.collect()
            run.fill(0.5 * (number + 1))
            step()
        runs.append(run.bits())
    assert_same_bits(*runs)


def test_eager_steps_between_replays_have_memory_of_their_own(gpu):
    interrupted(gpu, lambda run, number: run.step(-5.0 * (number + 1)))


def test_a_captured_learning_rate_is_not_overwritten_by_a_later_one(gpu):
    runs = []
    for captured in (False, True):
        run = Training()
        with gpu.graph() as graph:
            run.optimizer.step()
        for number in range(3):
            run.group["lr"] = 0.7
            run.step()
            # The graph was captured with this one.
            run.group["lr"] = 0.1
            graph.replay() if captured else run.optimizer.step()
            assert number < 3
        runs.append(run.bits())
    assert_same_bits(*runs)


def test_odd_gradients_between_replays(gpu):
    """Their rows are changed in the table, and their copies are gone after the step."""

    def between(run, number):
        run.params[0].grad = torch.full((7, 30), 2.0, device=DEVICE).t()
        run.params[1].grad = torch.ones(17, device=DEVICE)
        run.optimizer.step()
        run.restore()

    interrupted(gpu, between)


def test_many_kinds_of_gradients_between_replays(gpu):
    """More cuts into chunks than are kept: that of the graph stays."""
    kinds = [F64, torch.float16, torch.bfloat16]

    def between(run, number):
        for place in (0, 1):
            for kind in kinds:
                for p in run.params:
                    p.grad_dtype = None
                run.params[place].grad = torch.ones_like(run.params[place], dtype=kind)
                run.optimizer.step()
                run.restore()

    interrupted(gpu, between, replays=1)


def test_two_graphs_of_one_optimizer(gpu):
    """The second is captured without a step in between, and replayed without the first."""
    runs = []
    for captured in (False, True):
        run = Training()
        step = run.optimizer.step
        if captured:
            with gpu.graph():
                run.optimizer.step()
            with gpu.graph() as graph:
                run.optimizer.step()
            gc.collect()
            step = graph.replay
        for number in range(3):
            run.fill(number - 0.5)
            step()
            run.step()
        runs.append(run.bits())
    assert_same_bits(*runs)


def test_a_graph_of_two_steps(gpu):
    runs = []
    for captured in (False, True):
        run = Training()

        def both(run=run):
            run.optimizer.step()
            run.optimizer.step()

        step = both
        if captured:
            with gpu.graph() as graph:
                both()
            step = graph.replay
        step()
        run.step()
        step()
        runs.append(run.bits())
    assert_same_bits(*runs)


def test_a_capture_that_failed_leaves_an_optimizer_that_steps(gpu):
    runs = []
    for fails in (False, True):
        params = [torch.nn.Parameter(torch.ones(17, device=DEVICE))]
        optimizer = dgg.AdamW(params, backend="triton", capturable=True, alpha=1.0)
        params[0].grad = torch.ones_like(params[0])
        if fails:
            with pytest.raises(RuntimeError, match="run a warm-up step before"), gpu.graph():
                optimizer.step()
            assert not optimizer.state and optimizer._cache is None
        for _ in range(2):
            optimizer.step()
        runs.append([params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()])
    assert_same_bits(*runs)


# -- what a graph works on is never freed ---------------------------------------------------------


def test_an_anchor_overwritten_in_place_leaves_a_graph_valid(gpu):
    seen = []

    def between(run, number):
        anchor = run.optimizer.state[run.params[0]]["anchor"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.optimizer.set_anchor()
        assert run.optimizer.state[run.params[0]]["anchor"] is anchor
        seen.append(run.optimizer._cache)

    interrupted(gpu, between, replays=3)
    assert all(rows is not None for rows in seen) and seen[0] is seen[1] is seen[2]


def clear(run):
    run.optimizer.clear_anchor()


def add_group(run):
    extra = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    run.optimizer.add_param_group({"params": [extra]})


def load(run):
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def first_anchor(run):
    run.optimizer.set_anchor()


def exchange(run):
    for p in run.params:
        run.optimizer.state[p]["exp_avg"] = run.optimizer.state[p]["exp_avg"].clone()


@pytest.mark.parametrize("change", [clear, add_group, load, first_anchor, exchange])
def test_what_moves_memory_asks_for_a_new_capture_and_frees_nothing(change, gpu):
    run = Training(anchored=change is not first_anchor)
    with gpu.graph() as graph:
        run.optimizer.step()
    graph.replay()
    with pytest.warns(UserWarning, match="capture it again") as heard:
        change(run)
        run.step()
    (told,) = [warning for warning in heard if "capture it again" in str(warning.message)]
    assert told.filename == __file__
    gc.collect()
    graph.replay()  # of no use any more, but it must touch nothing that is somebody else's
    gpu.check()
    with gpu.graph() as again:
        run.optimizer.step()
    expected = None
    for step in (again.replay, run.optimizer.step):
        twin = run.bits()
        step()
        moved = [not torch.equal(x, y) for x, y in zip(run.bits(), twin, strict=True)]
        expected = expected or moved
        assert any(moved) and moved == expected


def test_tensors_of_the_user_that_a_graph_reads_stay(gpu):
    run = Training(rate=0.1)
    with gpu.graph() as graph:
        run.optimizer.step()
    run.group["lr"] = torch.full((), 0.3, device=DEVICE)
    gc.collect()
    graph.replay()


# -- anchors elsewhere ----------------------------------------------------------------------------

MANY = [(200,), (13, 15), (190,), ()]


@pytest.mark.parametrize("importance", [0.0, 0.7])
@pytest.mark.parametrize("strict", [True, False], ids=["torch-2.10", "today"])
def test_anchors_that_come_in_windows_through_streams(strict, importance, monkeypatch):
    """Work of the side stream is done as late as it may be: a wait that is missing shows."""
    runs = []
    for away in (False, True):
        with monkeypatch.context() as patch, StandIn(patch, strict_streams=strict) as gpu:
            patch.setattr(prefetch, "WINDOW", 1024)
            device = "cpu" if away else None
            run = Training(
                capturable=False, shapes=MANY, anchored=False, anchor_device=device,
                importance=importance,
            )  # fmt: skip
            for number in range(7):
                if number in (1, 4):
                    run.optimizer.set_anchor()
                run.step(1.0 + number)
                if number == 5:
                    with torch.no_grad():
                        run.params[0].mul_(1.5)
            windows = run.optimizer._cache.all_rows[0].windows
            assert (windows is not None) == away
            gpu.drain()
            runs.append([p.tolist() for p in run.params])
    assert runs[0] == runs[1]


def test_anchors_off_the_device_are_few_blocks_of_memory_and_few_copies(gpu, tmp_path):
    """Torch rounds each block of pinned memory up to a power of two."""
    run = Training(capturable=False, shapes=[(33,)] * 40, anchor_device="cpu")
    anchors = [run.optimizer.state[p]["anchor"] for p in run.params]
    (memory,) = {x.untyped_storage().data_ptr() for x in anchors}
    assert gpu.blocks[memory].pinned and len(gpu.blocks[memory].bytes) == 39 * 256 + 33 * 4
    (rows,) = run.optimizer._cache.all_rows
    assert [len(copies) for copies in rows.windows._copies] == [1]
    # A checkpoint has the memory once, and what is loaded lies as it did.
    torch.save(run.optimizer.state_dict(), tmp_path / "saved.pt")
    twin = Training(capturable=False, shapes=[(33,)] * 40, anchor_device="cpu", anchored=False)
    twin.optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    loaded = [twin.optimizer.state[p]["anchor"] for p in twin.params]
    assert len({x.untyped_storage().data_ptr() for x in loaded}) == 1
    assert_same_bits(anchors, loaded)
    # Those of the next task take the place of the last one's.
    run.step()
    run.optimizer.set_anchor()
    assert all(
        run.optimizer.state[p]["anchor"] is x for p, x in zip(run.params, anchors, strict=True)
    )
    assert_same_bits(anchors, [p.detach().cpu() for p in run.params])


def test_guarded_steps_with_anchors_that_come_in_windows_through_streams(monkeypatch):
    runs = []
    for away in (False, True):
        with monkeypatch.context() as patch, StandIn(patch) as gpu:
            patch.setattr(prefetch, "WINDOW", 1024)
            run = Training(
                capturable=False, shapes=MANY, alpha="auto", importance=0.7, replay_weight=0.2,
                anchor_device="cpu" if away else None,
            )  # fmt: skip
            for number in range(4):
                with run.optimizer.replay():
                    for p in run.params:
                        p.grad = torch.full_like(p, -1.0)
                run.step(1.0 + number)
                assert run.optimizer.guidance_stats()["pull"].item() > 0
            assert (run.optimizer._cache.all_rows[0].windows is not None) == away
            gpu.drain()
            runs.append([p.tolist() for p in run.params])
    assert runs[0] == runs[1]


def test_importances_off_the_device_are_a_block_of_memory_and_a_copy_beside_the_anchors(gpu):
    run = Training(capturable=False, shapes=[(33,)] * 40, anchor_device="cpu", importance=0.5)
    (rows,) = run.optimizer._cache.all_rows
    for name in ("anchor", "importance"):
        kept = [run.optimizer.state[p][name] for p in run.params]
        (memory,) = {x.untyped_storage().data_ptr() for x in kept}
        assert gpu.blocks[memory].pinned and len(gpu.blocks[memory].bytes) == 39 * 256 + 33 * 4
    assert [len(copies) for copies in rows.windows._copies] == [2]


def test_anchors_dropped_while_they_are_measured(gpu):
    run = Training(capturable=False, shapes=MANY, anchor_device="cpu")
    for _ in range(3):
        run.step()
        run.optimizer.clear_anchor()
        gc.collect()
        run.optimizer.set_anchor()
        run.step()


# -- a library that cannot run there --------------------------------------------------------------


class Library:
    """Takes the place of the CUDA library; on some devices no kernel of it can be started."""

    def __init__(self, functions, monkeypatch, trouble=None):
        self._functions, self.trouble, self.calls = functions, trouble, 0
        monkeypatch.setattr(libraries, "cuda_error", None)
        monkeypatch.setattr(libraries, "probed", {})
        monkeypatch.setattr(
            libraries, "launchers", lambda backend: self if backend == "cpp" else functions
        )
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: DEVICE)

    def __getattr__(self, name):
        def launch(*args, **kwargs):
            self.calls += 1
            if self.trouble is not None:
                raise self.trouble
            return getattr(self._functions, name)(*args, **kwargs)

        return launch


NO_IMAGE = RuntimeError(
    "dgg::coefficients_launch on device 0: no kernel image is available for execution on the device"
    "; build dgg again with this device in TORCH_CUDA_ARCH_LIST\nException raised from finish"
)


def test_a_library_that_cannot_run_on_a_device_is_not_taken(gpu, monkeypatch):
    library = Library(libraries.launchers("triton"), monkeypatch, NO_IMAGE)
    params = [torch.nn.Parameter(torch.ones(17, device=DEVICE))]
    optimizer = dgg.AdamW(params, alpha=1.0, max_grad_norm=1.0)
    params[0].grad = torch.ones_like(params[0])
    for _ in range(3):
        optimizer.step()
    assert optimizer.guidance_stats().backend == "triton"
    assert library.calls == 1, "it is asked once"
    with pytest.raises(RuntimeError, match="cannot run there.*TORCH_CUDA_ARCH_LIST") as error:
        dgg.AdamW(params, backend="cpp")
    assert "Exception raised" not in str(error.value)
    config = dgg.show_config()
    assert "cpp        cuda  not usable: its CUDA library cannot run there" in config
    assert "triton on cuda" in config and library.calls == 1


def test_a_library_that_runs_is_taken(gpu, monkeypatch):
    library = Library(libraries.launchers("triton"), monkeypatch)
    assert backends.choose(None, DEVICE) == "cpp" == backends.choose(None, DEVICE)
    assert library.calls == 1


def test_nothing_is_tried_out_in_a_graph_or_without_memory(gpu, monkeypatch):
    library = Library(libraries.launchers("triton"), monkeypatch)
    with gpu.graph() as graph:
        assert backends.choose(None, DEVICE) == "cpp"
    assert library.calls == 0 and graph.nodes == []
    library.trouble = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        backends.choose(None, DEVICE)
    library.trouble = None
    assert backends.choose(None, DEVICE) == "cpp"


# -- tests of test_gpu.py -------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting(gpu):
    """As `test_gpu.no_waiting`."""
    before = len(gpu.waits)
    yield
    assert gpu.waits[before:] == []


@pytest.fixture
def on_stand_in(gpu, monkeypatch):
    """test_gpu.py on the stand-in, with fewer elements and tensors."""
    make = test_gpu.on_device

    def smaller(shapes, *arguments, device=DEVICE, **more):
        small = {(300, 70): (30, 7), (8193,): (1030,), (1000, 1000): (40, 10), (2048, 2048): (50,)}
        return make([small.get(s, s) for s in shapes], *arguments, device=device, **more)

    def launches(function):
        before = len(gpu.launched)
        function()
        return gpu.launched[before:]

    for name, value in {
        "DEVICE": DEVICE, "on_device": smaller, "no_waiting": lambda: no_waiting(gpu),
        "launches": launches, "LORA": [(16, 8), (8, 16)] * 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(test_gpu, name, value)

    class Generator(torch.Generator):
        """What is drawn on the device is drawn by the CPU."""

        def __new__(cls, device=None):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Generator)
    return gpu


GRANULARITIES = ["step", "tensor", "element"]
KINDS = ["adamw", "sgd-momentum"]
# Test → the arguments that it is run with, beside the backend.
RUN = {
    test_gpu.test_a_lora_step_takes_few_launches: [{"guided": x} for x in (False, True)],
    test_gpu.test_an_anchor_dropped_while_it_is_measured_takes_nothing_along: [{}],
    test_gpu.test_a_side_stream_gives_the_same_bits: [{}],
    test_gpu.test_graph_replays_equal_eager_steps: [{"granularity": x} for x in GRANULARITIES],
    test_gpu.test_a_whole_training_step_is_captured_on_the_stream_of_its_warm_up: [{}],
    test_gpu.test_a_step_that_cannot_be_replayed_is_not_captured: [{}],
    # These run on the CPU, too; what only a device has to do for them is done here.
    test_gpu.test_a_step_never_waits: [
        {"kind": kind, "granularity": granularity, "clip": clip, "scope": scope}
        for kind, clip, scope in (("adamw", 1.0, "global"), ("sgd-momentum", None, "tensor"))
        for granularity in GRANULARITIES
    ],
    test_gpu.test_a_step_under_a_grad_scaler_never_waits: [{"kind": x} for x in KINDS],
    test_gpu.test_anchors_on_the_host_give_the_same_bits: [{}],
}
CANNOT = {
    test_gpu.test_parameters_on_two_devices: "the stand-in is one device",
    test_gpu.test_more_than_2_to_the_31_elements: (
        "the interpreter would take days, and the memory of a GPU"
    ),
    test_gpu.test_the_two_backends_agree: (
        "the stand-in has Triton's launches alone; test_cuda_host.py runs the CUDA kernels"
    ),
}


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        pytest.param(
            test, arguments, id="-".join([test.__name__[5:], *map(str, arguments.values())])
        )
        for test, every in RUN.items()
        for arguments in every
    ],
)  # fmt: skip
def test_what_a_gpu_s_host_does(test, arguments, on_stand_in, bench):
    if "bench" in inspect.signature(test).parameters:
        arguments = {**arguments, "bench": bench}
    test(backend="triton", **arguments)


def test_no_test_that_needs_a_gpu_is_forgotten():
    """Each runs here or is named in this file's docstring."""
    needing = {
        function
        for function in vars(test_gpu).values()
        if test_gpu.real_gpu.mark in getattr(function, "pytestmark", [])
    }
    assert needing and needing <= RUN.keys() | CANNOT.keys()
    assert CANNOT.keys() <= needing - RUN.keys()
    assert all(function.__name__ in __doc__ for function in CANNOT)


# -- the stand-in itself --------------------------------------------------------------------------


def test_it_tells_the_host_from_the_device(gpu):
    host, here = torch.ones(3), torch.ones(3, device=DEVICE)
    assert not gpu.is_here(host) and gpu.is_here(here) and gpu.is_here(here * 2)
    assert not gpu.is_here(here.to("cpu")) and gpu.is_here(host.to(DEVICE))
    with pytest.raises(RuntimeError, match="on the same device"):
        host + here
    before = len(gpu.waits)
    assert here.sum().item() == 3.0 and len(gpu.waits) == before + 1


def test_it_counts_what_a_profiler_would(gpu):
    x = torch.ones(3, device=DEVICE)
    before = len(gpu.launched)
    y = torch.empty_like(x)
    y.copy_(x)
    x.view(3, 1).t()
    assert gpu.launched[before:] == []
    (x * 2).add_(1)
    assert gpu.launched[before:] == ["aten::mul.Tensor", "aten::add_.Tensor"]


def test_it_finds_a_replay_that_works_on_freed_memory(gpu):
    x, y = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    with gpu.graph() as graph:
        y.add_(x * 2)
    assert y.tolist() == [0.0] * 3
    graph.replay()
    assert y.tolist() == [2.0] * 3
    del x
    with pytest.raises(FreedMemory, match="freed after it was captured"):
        graph.replay()


def test_it_finds_writes_into_freed_memory(gpu):
    x = torch.ones(3, device=DEVICE)
    block = gpu.block_of(x)
    del x
    assert block.freed
    block.bytes[0] = 0
    with pytest.raises(FreedMemory, match="written after they were freed"):
        gpu.check()
    block.poison()


def test_it_does_what_a_capture_cannot(gpu):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), gpu.graph():
        x.tolist()
    with pytest.raises(RuntimeError, match="cudaHostAlloc"), gpu.graph():
        torch.empty(3, pin_memory=True)
    with pytest.raises(RuntimeError, match="pageable"), gpu.graph():
        x.copy_(torch.ones(3), non_blocking=True)


def test_its_streams_run_as_late_as_they_may(gpu):
    side, x = torch.cuda.Stream(), torch.zeros(3, device=DEVICE)
    with torch.cuda.stream(side):
        x.add_(1)
        event = side.record_event()
    x.mul_(4)  # without a wait it comes first
    torch.cuda.current_stream().wait_event(event)
    assert x.tolist() == [1.0] * 3
    stream = torch.Stream(DEVICE)
    with pytest.raises(RuntimeError, match="should not be initialized"), stream, stream:
        pass


def test_its_memory_is_not_reused_before_a_stream_it_was_lent_to_is_there(gpu):
    found = []
    for lend in (True, False):
        side, x, y = (
            torch.cuda.Stream(),
            torch.ones(3, device=DEVICE),
            torch.zeros(3, device=DEVICE),
        )
        with torch.cuda.stream(side):
            y.copy_(x)
        if lend:
            x.record_stream(side)
        del x
        if lend:
            side.drain()
            found = y.tolist()
        else:
            with pytest.raises(FreedMemory):
                side.drain()
    assert found == [1.0] * 3
