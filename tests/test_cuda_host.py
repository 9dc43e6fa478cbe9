# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels themselves, run on the CPU, against dgg/reference.py in float64."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import pathlib
import shutil
import subprocess

import pytest
import torch

from cases import BF16, F16, F32, F64
from dgg import _device, _philox, reference

ROOT = pathlib.Path(__file__).parent.parent
UNITS = [ROOT / "csrc" / f"cuda_{name}.cu" for name in ("adam", "sgd", "guide", "norms")]
HEADERS = [ROOT / "csrc" / name for name in ("update.h", "table.h", "launch.cuh", "step.cuh")]
SHIM = [ROOT / "tests" / "cuda_on_host.h", ROOT / "tests" / "cuda_on_host.cpp"]
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="g++, which runs the CUDA kernels on the CPU, is not installed"
)

CHUNK = _device.CHUNK
DTYPES = [F32, BF16, F16, F64]  # in the order of their codes
# Around the elements of a vector, of a group of 256 threads and of a chunk; the last has more
# chunks than one thread adds up.
EDGES = [0, 1, 3, 5, 1023, 1024, 1027, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2050]
MANY = 33 * CHUNK + 7
THRESHOLD = _philox.threshold(0.3)
SEED, DRAW = 0x9E3779B97F4A7C15, 5  # the high word matters
GUARD = 64  # elements of a buffer on either side of its tensor
SENTINEL = -77.0

ADAM = dict(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1, decoupled=True,
            amsgrad=False, maximize=False, strength=0.7, threshold=THRESHOLD)  # fmt: skip
SGD = dict(lr=3e-2, momentum=0.8, dampening=0.3, weight_decay=0.1, nesterov=False,
           maximize=False, strength=0.7, threshold=THRESHOLD)  # fmt: skip
GUIDE = dict(maximize=False, strength=0.7, threshold=THRESHOLD)
ADAM_CASES = {
    "adamw": {},
    "adam": {"decoupled": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "decoupled": False},
    "far-lerp": {"beta1": 0.3},
}
SGD_CASES = {
    "momentum": {},
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "plain": {"momentum": 0.0},
    "maximize": {"maximize": True},
}
HYPER = {"adam": ADAM, "sgd": SGD, "guide": GUIDE}
RULES = {"adam": 0, "sgd": 1, "guide": 2}
INJECT, ELEMENTS, FIRST = reference.INJECT, reference.INJECT_ELEMENTS, reference.FIRST_STEP
SITUATIONS = {
    "unguided": dict(flags=0, replay=False),
    "guided": dict(flags=INJECT, replay=False),
    "elements": dict(flags=ELEMENTS, replay=False),
    "replay": dict(flags=INJECT, replay=True, replay_weight=0.6),
    "scaled": dict(flags=ELEMENTS, replay=True, replay_weight=0.6, grad_scale=8.0),
}


@pytest.fixture(scope="session")
def kernels():
    """The kernels as a library; kept in build/ as long as its sources do not change."""
    sources = [*UNITS, *HEADERS, *SHIM]
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    if "fma" in pathlib.Path("/proc/cpuinfo").read_text().split():
        options.append("-mfma")  # else std::fma is a slow function with the same result
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / f"cuda-on-host-{digest}"
    library = folder / "kernels.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for unit in (*UNITS, SHIM[1]):
            objects.append(folder / f"{unit.stem}.o")
            warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
            files = ["-include", str(SHIM[0]), "-x", "c++", "-c", str(unit), "-o", str(objects[-1])]
            command = [COMPILER, *options, *warnings, *files]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
        command = [COMPILER, "-shared", "-o", str(library) + ".new", *map(str, objects)]
        subprocess.run(command, check=True)
        pathlib.Path(str(library) + ".new").replace(library)
    handle = ctypes.CDLL(str(library))
    handle.count_vector_accesses.restype = ctypes.c_int64
    return handle


def _address(x):
    return 0 if x is None else x.data_ptr()


class Problem:
    """Rows of tensors between guard zones, for one call.

    Args:
        sizes: Elements of every row.
        dtypes: Of parameter, gradient, replay gradient, moments, anchor and copy, for all rows, or
            a list with a tuple for each row.
        offset: Elements by which every tensor is off a multiple of 16 bytes.
    """

    def __init__(
        self, sizes, dtypes=(F32,) * 6, *, replay=True, anchors=True, copies=False, offset=0, seed=0
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = offset
        self.buffers = []
        kinds = [dtypes] * len(sizes) if isinstance(dtypes, tuple) else dtypes
        self.kinds = kinds = [(*kind, kind[0]) if len(kind) == 5 else kind for kind in kinds]
        self.sizes = list(sizes)

        def make(place, positive=False):
            return [
                self._make(size, kind[place], positive)
                for size, kind in zip(sizes, kinds, strict=True)
            ]

        self.params, self.grads = make(0), make(1)
        self.replays = make(2) if replay else []
        self.states = [make(3, positive=place > 0) for place in range(3)]
        self.anchors = make(4) if anchors else [None] * len(sizes)
        self.copies = make(5) if copies else [None] * len(sizes)
        n = len(sizes)
        self.steps = [self._make(1, F32).fill_(3 + row % 4) for row in range(n)]
        self.distances = torch.full((n,), -1.0, dtype=F64)
        self.indices = [7 * row + 1 for row in range(n)]
        self.shards = [(0, size, size) for size in sizes]
        scales = torch.linspace(0.4, 0.9, n, dtype=F64)
        self.coefficients = torch.cat([torch.tensor([0.45, 2.0, 3.0, 4.0], dtype=F64), scales])
        self.groups = [0] * n

    def _make(self, size, dtype, positive=False):
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype)
        assert buffer.data_ptr() % 16 == 0
        start = GUARD + self.offset
        view = buffer[start : start + size]
        self.buffers.append((buffer, start, size))
        x = torch.randn(size, generator=self.generator, dtype=F64)
        return view.copy_(x.abs() if positive else x)

    def assert_guards(self):
        for buffer, start, size in self.buffers:
            assert (buffer[:start] == SENTINEL).all() and (buffer[start + size :] == SENTINEL).all()

    def tensors(self, states):
        return [*self.params, *itertools.chain(*self.states[:states])]

    def exact(self):
        """The same problem in float64, for the reference."""

        def promote(tensors):
            return [None if x is None else x.to(F64, copy=True) for x in tensors]

        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name in ("params", "grads", "replays", "anchors"):
            setattr(other, name, promote(getattr(self, name)))
        other.states = [promote(state) for state in self.states]
        other.steps = [step.clone().view(()) for step in self.steps]
        other.distances = self.distances.clone()
        return other

    def table(self):
        rows, codes = [], []
        for row, param in enumerate(self.params):
            state = [self.states[place][row] for place in range(3)]
            tensors = [param, *state, self.anchors[row], self.steps[row]]
            kinds = [param, self.grads[row], self.replays[row] if self.replays else None, *state,
                     self.anchors[row], self.copies[row]]  # fmt: skip
            codes.append(
                sum(
                    DTYPES.index((param if x is None else x).dtype) << 8 * place
                    for place, x in enumerate(kinds)
                )
            )
            rows.append(
                [*map(_address, tensors), param.numel(), self.groups[row], codes[-1],
                 self.indices[row], *self.shards[row], _address(self.copies[row])]
            )  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64), codes


def _addresses(tensors):
    # An empty tensor that is there has no address of its own.
    return torch.tensor([0 if x is None else x.data_ptr() or 1 for x in tensors]).long()


class Launches:
    """The launches of a problem, one per dtype combination, as dgg/_device.py cuts them."""

    def __init__(self, kernels, problem, order=0):
        self.kernels, self.problem = kernels, problem
        self.table, codes = problem.table()
        self.grads, self.replays = _addresses(problem.grads), _addresses(problem.replays)
        self.launches = _device.cut(problem.sizes, codes, torch.device("cpu"))
        kernels.set_block_order(order)
        kernels.count_vector_accesses()

    def leading(self, launch):
        launch.partials.fill_(float("nan"))
        return [
            self.table, launch.rows, launch.chunks, launch.starts, launch.partials, launch.counter,
            self.grads, self.replays if self.problem.replays else None, launch.chunks.shape[0],
            launch.rows.shape[0], launch.dtypes,
        ]  # fmt: skip

    def call(self, name, integers, *numbers):
        def plain(value):
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                return value.data_ptr()
            return 0 if value is None else int(value)

        values = [plain(value) for value in integers]
        array = (ctypes.c_int64 * len(values))(*(v - 2**64 if v >= 2**63 else v for v in values))
        doubles = (ctypes.c_double * max(1, len(numbers)))(*numbers)
        assert getattr(self.kernels, name)(array, doubles) == 0

    def norms(self, *, replay_weight=1.0, grad_scale=None, which=7, gate=None):
        n = len(self.problem.sizes)
        squares = torch.full((3, n), float("nan"), dtype=F64)
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        for launch in self.launches:
            integers = [
                *self.leading(launch),
                self.problem.distances,
                squares,
                gate,
                scale,
                n,
                which,
            ]
            self.call("norms", integers, replay_weight)
            assert launch.counter.item() == 0
        return squares

    def update(
        self, name, hyper, flags, *, variant=None, replay_weight=1.0, grad_scale=None,
        found_inf=None, seed=SEED, draw=DRAW, draw_index=None,
    ):  # fmt: skip
        problem = self.problem
        if not isinstance(flags, torch.Tensor):
            flags = torch.full((len(problem.sizes),), flags, dtype=torch.uint8)
        groups = hyper if isinstance(hyper, list) else [hyper]
        table = torch.tensor([[float(v) for v in group.values()] for group in groups], dtype=F64)
        if variant is None:
            variant = variant_of(groups, flags)
        scale = None if grad_scale is None else torch.tensor([grad_scale])
        found = None if found_inf is None else torch.tensor(found_inf)
        index = None if draw_index is None else torch.tensor(draw_index)
        for launch in self.launches:
            own = [problem.coefficients, flags, table, problem.distances, scale, found, index]
            integers = [*self.leading(launch), *own, seed, draw, variant, RULES[name]]
            self.call("update", integers, replay_weight)
            assert launch.counter.item() == 0


def variant_of(groups, flags, extra=0):
    variant = extra
    if (flags & (INJECT | ELEMENTS)).any():
        variant |= _device.ANCHOR
    if (flags & ELEMENTS).any():
        variant |= _device.ELEMENTS
    if any(group.get("amsgrad") or group.get("momentum") for group in groups):
        variant |= _device.STATE
    return variant


def _options(situation):
    return {k: v for k, v in situation.items() if k not in ("flags", "replay")}


def _reference(name, problem, hyper, flags, *, look_ahead=False, **options):
    options = {"replay_weight": 1.0, "grad_scale": 1.0, "seed": SEED, "draw": DRAW, **options}
    if not isinstance(flags, torch.Tensor):
        flags = [flags] * len(problem.params)
    rest = (problem.coefficients, flags, problem.indices)
    lists = (problem.params, problem.grads, problem.replays)
    if name == "guide":
        reference.guide_(*lists, problem.anchors, *rest, **hyper, **options)
    elif name == "adam":
        reference.adam_(
            *lists, *problem.states, problem.anchors, problem.steps, problem.distances, *rest,
            **hyper, look_ahead=look_ahead, **options,
        )  # fmt: skip
    else:
        reference.sgd_(
            *lists, problem.states[0], problem.anchors, problem.distances, *rest,
            **hyper, look_ahead=look_ahead, **options,
        )  # fmt: skip


# Half the spacing of the storage dtype, relative; float16 also has an absolute spacing near zero.
# The arithmetic before it, about ten float32 (float64) operations on terms of order one, matters
# absolutely, because terms may cancel.
_STORAGE = {F32: 2**-24, BF16: 2**-8, F16: 2**-11, F64: 2**-53}


def _assert_rounding(actual, exact, what, wide=True):
    # A float64 tensor of a row that computes in float32 is as good as float32.
    unit = 2**-53 if actual.dtype == F64 and wide else 2**-24
    bound = _STORAGE[actual.dtype] * exact.abs() + 10 * unit * exact.abs().clamp(min=1.0)
    if actual.dtype == F16:
        bound += 2**-25
    worst = ((actual.double() - exact).abs() / bound).max().item() if exact.numel() else 0.0
    assert worst <= 1.0, f"{what}: {worst:.2f} x the allowed rounding of {actual.dtype}"


def states_of(name, hyper):
    if name == "adam":
        return 3 if hyper["amsgrad"] else 2
    return 1 if name == "sgd" and hyper["momentum"] else 0


def _assert_same_step(name, problem, exact, hyper, what):
    states = states_of(name, hyper)
    ours = problem.grads if name == "guide" else problem.tensors(states)
    theirs = exact.grads if name == "guide" else exact.tensors(states)
    for place, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        kind = problem.kinds[place % len(problem.kinds)]
        what_of = f"{name}, {what}, tensor {place} of {x.numel()}, dtypes {kind}"
        _assert_rounding(x, y, what_of, wide=kind[0] == F64)
    if name == "adam":
        assert [s.item() for s in problem.steps] == [s.item() for s in exact.steps]
    problem.assert_guards()


def _bits(tensors):
    return hashlib.sha256(
        b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    ).hexdigest()


def _everything(problem):
    """Every byte that a launch could have written."""
    return _bits([*(buffer for buffer, _, _ in problem.buffers), problem.distances])


CASES = [
    *(("adam", case, {**ADAM, **change}) for case, change in ADAM_CASES.items()),
    *(("sgd", case, {**SGD, **change}) for case, change in SGD_CASES.items()),
    ("guide", "minimize", GUIDE),
    ("guide", "maximize", {**GUIDE, "maximize": True}),
]
CASE_IDS = [f"{name}-{case}" for name, case, _ in CASES]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name,case,hyper", CASES, ids=CASE_IDS)
def test_update(kernels, name, case, hyper, situation):
    how = SITUATIONS[situation]
    problem = Problem(EDGES, replay=how["replay"])
    exact = problem.exact()
    Launches(kernels, problem).update(name, hyper, how["flags"], **_options(how))
    _reference(name, exact, hyper, how["flags"], **_options(how))
    _assert_same_step(name, problem, exact, hyper, f"{case}, {situation}")
    assert (problem.distances == -1).all()
