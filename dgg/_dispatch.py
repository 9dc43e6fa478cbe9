# SPDX-License-Identifier: BSD-3-Clause
"""Choice of the backend, and the parallel lists that every backend works on.

A kernel sees plain local tensors and numbers. `Rows` holds them as parallel lists, a row per
parameter; for the C++ backend also as a table of addresses that is made once and of which only
the gradients' column is refreshed (an operator that takes 448-tensor lists costs more than the
step it does; one that takes a table costs about a microsecond).
"""

from __future__ import annotations

import array
import importlib
import os
import pathlib
import platform
import struct
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgg import _device, _gather, _prefetch, reference, sharding
from dgg.kernels.layout import (
    ADAM_HYPER,
    ANCHOR,
    ANCHOR_BIT,
    COPY,
    DTYPES,
    ELEMENTS_BIT,
    EXP_AVG,
    EXP_AVG_SQ,
    GUIDE_HYPER,
    LOOK_AHEAD_BIT,
    MAX_EXP_AVG_SQ,
    NUMEL,
    PARAM,
    SGD_HYPER,
    SLOT_BITS,
    STATE_BIT,
    STEP,
    STOCHASTIC_BIT,
)
from dgg.reference import FLOAT_DTYPES
from dgg.sharding import fsdp1

BACKENDS = ("reference", "cpp", "triton")

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}


def _load_library(pattern: str, note: str) -> str | None:
    """Loads compiled operators; returns None, or why they are missing."""
    folder = pathlib.Path(__file__).parent
    libraries = sorted(folder.glob(f"{pattern}.so")) + sorted(folder.glob(f"{pattern}.pyd"))
    if not libraries:
        report = folder / note
        reason = report.read_text().strip() if report.exists() else "it was not built"
        return (
            f"{reason}; install a C++ compiler and reinstall dgg "
            "(pip install --no-build-isolation --force-reinstall --no-deps dgg)"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        # Torch says which library it is; what is wrong with it says the error behind that.
        reason = error.__cause__ or error
        return f"{libraries[0].name} cannot be loaded ({reason}); reinstall dgg for this torch"
    return None


def _load_cuda_library() -> str | None:
    if _cpp_error is not None:
        return _cpp_error
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} has no CUDA; install a CUDA build of torch, then reinstall "
            "dgg with DGG_CUDA=1"
        )
    reason = _load_library("_C_cuda*", "_build_error_cuda.txt")
    return reason and reason.replace("a C++ compiler", "nvcc (CUDA toolkit), set DGG_CUDA=1")


_cpp_error = _load_library("_C.*", "_build_error.txt")
_cuda_error = _load_cuda_library()


def _register_fakes() -> None:
    # The list operators return nothing but `norms`, whose shape is known; the mutations stand in
    # the schemas.
    @torch.library.register_fake("dgg::norms")
    def _(params, grads, replays, anchors, distances, **_kwargs):
        return distances.new_empty((3, len(params)), dtype=torch.float64)

    @torch.library.register_fake("dgg::coefficients")
    def _(squares, **_kwargs):
        return squares.new_empty((reference.SCALES + squares.shape[1],))

    for name in ("adam_", "sgd_", "guide_"):
        torch.library.register_fake(f"dgg::{name}", lambda *_args, **_kwargs: None)


def _refuse_on_gpus() -> torch.library.Library:
    """Says what to call instead; torch would list the dispatch keys that there are."""
    library = torch.library.Library("dgg", "IMPL", "CUDA")

    def refuse(name):
        def run(*_args, **_kwargs):
            raise NotImplementedError(
                f"dgg::{name} takes tensors on the CPU. On a GPU dgg.AdamW, Adam, SGD and Guidance "
                f"launch kernels of their own; dgg.reference.{name} takes tensors of any device"
            )

        return run

    for name in ("norms", "coefficients", "adam_", "sgd_", "guide_"):
        library.impl(name, refuse(name))
    return library


if _cpp_error is None:
    _register_fakes()
    _refusals = _refuse_on_gpus()  # they last as long as this does


# By device: why the CUDA library cannot run there, or None.
_probed: dict[torch.device, str | None] = {}


def _trouble_on(device: torch.device) -> str | None:
    """Returns why the CUDA library's kernels cannot run on a device, or None; tried out once.

    It may have been built for other devices or for a newer driver, which only a launch tells.
    """
    if device in _probed or _device.capturing(device):  # a launch would become the graph's
        return _probed.get(device)
    try:
        squares = torch.zeros(3, 1, dtype=torch.float64, device=device)
        if type(squares) is not Tensor:
            return None  # a mode in which there are no devices, such as FakeTensorMode
        out = torch.empty(reference.SCALES + 1, dtype=torch.float64, device=device)
        _launchers("cpp").coefficients_launch(
            squares, out, max_grad_norm=None, scaling=False, per_tensor=False
        )
        _probed[device] = None
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        _probed[device] = f"its CUDA library cannot run there: {str(error).splitlines()[0]}"
    return _probed[device]


def unavailable(backend: str, device: torch.device) -> str | None:
    """Returns None if ``backend`` can run on ``device``, else why not and how to get it."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device.type == "cpu":
            return None if _cpp_error is None else f"its library is missing: {_cpp_error}"
        if device.type != "cuda":
            return (
                f"it has kernels for the CPU and for CUDA, not for {device.type!r} devices; use "
                "backend='triton', 'reference' or None there"
            )
        if _cuda_error is not None:
            return f"its CUDA library is missing: {_cuda_error}"
        return _trouble_on(device)
    if backend == "triton":
        return importlib.import_module("dgg.kernels").unavailable(device)
    raise ValueError(f"unknown backend {backend!r}; choose one of {BACKENDS} or None")


def choose(backend: str | None, device: torch.device) -> str:
    """Returns the backend for ``device``: the named one, or the fastest that can run.

    Raises:
        RuntimeError: The named backend cannot run; the message says how to get it.
        ValueError: No such backend.
    """
    if backend is not None:
        reason = unavailable(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
        return backend
    # Under the interpreter Triton runs on the CPU too, but only who names it wants that.
    candidates = ("cpp",) if device.type == "cpu" else ("cpp", "triton")
    return next((name for name in candidates if unavailable(name, device) is None), "reference")


def choose_for(backend: str | None, param: Tensor) -> str:
    """Returns the backend for ``param``: the one of `choose`, if it can reach the values.

    Of what keeps its values in other tensors (float8 weights of a library) only plain torch
    operations know what to do.

    Raises:
        TypeError: The named backend cannot reach the values.
    """
    if not sharding.keeps_values_elsewhere(param):
        return choose(backend, param.device)
    if backend not in (None, "reference"):
        kind = type(sharding.local(param)).__name__
        raise TypeError(
            f"backend={backend!r} cannot step a {kind}, which keeps its values in other tensors; "
            "use backend=None or 'reference'"
        )
    return "reference"


def launches(backend: str, device: torch.device) -> bool:
    """Returns whether the backend works on ``device`` by launches that nobody waits for."""
    return backend == "triton" or (backend == "cpp" and device.type != "cpu")


def _launchers(backend: str):
    return importlib.import_module("dgg.kernels") if backend == "triton" else torch.ops.dgg


def show_config() -> str:
    """Returns, as text to print, which backends are usable here and why the others are not."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    ]
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator())
    for backend in BACKENDS:
        for device in devices:
            reason = unavailable(backend, device)
            state = "usable" if reason is None else f"not usable: {reason}"
            if backend == "cpp" and reason is None and device.type == "cpu":
                state += f" ({torch.ops.dgg.isa()})"
            lines.append(f"  {backend:<10} {device.type:<5} {state}")
    chosen = ", ".join(f"{choose(None, device)} on {device.type}" for device in devices)
    lines.append(
        f"default: {chosen}; on other devices: the first of cpp (CUDA) and triton that runs there, "
        "else reference"
    )
    for name in ("DGG_CPP", "DGG_CUDA"):
        if os.environ.get(name):
            lines.append(f"{name}={os.environ[name]} was set in this environment")
    return "\n".join(lines)


def real_view(x: Tensor) -> Tensor:
    """Returns a complex tensor as its real view, any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def is_dense(x: Tensor) -> bool:
    """Returns whether the tensor's memory has neither gaps nor overlaps."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(x: Tensor, y: Tensor) -> bool:
    """Returns whether two dense tensors of one shape store their elements in the same order."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


class Watch:
    """Tells whether tensors still have the memory, size, order and dtype of the beginning.

    Keeps state alive, so that an equal address means the same memory. Of parameters it has nothing
    but their Python objects: whoever exchanges what is inside of one (`torch.utils.swap_tensors`,
    `to_empty`) asks that nobody else has it.

    Args:
        params: Parameters.
        tensors: Other tensors.
        anchors: For each of as many of the first parameters the place of its anchor among
            ``tensors``, or -1: their versions are looked at, too.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        tensors: Sequence[Tensor],
        anchors: Sequence[int] = (),
    ) -> None:
        self._params = [sharding.local(p) for p in params]
        tensors = [sharding.local(x) for x in tensors]
        self._anchors = [(row, tensors[place]) for row, place in enumerate(anchors) if place >= 0]
        self._dicts: list[tuple[dict, dict]] | None = None
        self._handle: int | None = None
        self._library: _gather.Library | None = None
        if _cpp_error is None:
            self._handle = torch.ops.dgg.watch(tensors)
            weakref.finalize(self, torch.ops.dgg.unwatch, self._handle)
            self._library = _gather.load()
        self._tensors = [] if self._handle is not None else [(x, self._place(x)) for x in tensors]
        if self._library is not None:
            _gather.watch_params(self._library, self._handle, self._params, anchors)
        else:
            self._tensors += [(p, self._place(p)) for p in self._params]
        self._versions = [x._version for _, x in self._anchors]

    def unmoved(self) -> bool:
        """Returns whether nothing moved, changed its size, its order or its dtype."""
        if self._library is not None:
            return bool(self._library.unmoved(self._handle))
        if self._handle is not None and not torch.ops.dgg.unmoved.default(self._handle):
            return False
        return all([self._place(x) == place for x, place in self._tensors])

    def rewritten(self) -> list[int]:
        """Returns which parameters' anchors were written since the last look.

        The native look at the gradients keeps an account of its own.
        """
        now = [x._version for _, x in self._anchors]
        if now == self._versions:
            return []
        changed = [
            row
            for (row, _), old, new in zip(self._anchors, self._versions, now, strict=True)
            if old != new
        ]
        self._versions = now
        return changed

    def keep_dicts(self, dicts: Sequence[dict]) -> None:
        """Looks at dicts, too, in `same_dicts`: they, their keys and their values stay alive."""
        self._dicts = [(each, dict(each)) for each in dicts]
        if self._library is not None:
            _gather.watch_dicts(self._library, self._handle, dicts)

    def same_dicts(self) -> bool:
        """Returns whether every dict has the keys and values, by identity, of the beginning."""
        if self._library is not None:
            return bool(self._library.same_dicts(self._handle))
        return all(
            [
                len(now) == len(before)
                and all([now.get(key, self) is value for key, value in before.items()])
                for now, before in self._dicts
            ]
        )

    def gather(self, params: Sequence[Tensor], *memory: Any) -> _gather.Gather | None:
        """Returns what takes up the gradients of ``params``, or None where Python has to.

        Args:
            params: The first parameters of this watch, in its order.
            memory: What `_gather.Gather` takes after the handle.
        """
        if self._library is None or not _gather.takes(params):
            return None
        return _gather.Gather(self._library, self._handle, *memory)

    @staticmethod
    def _place(x: Tensor) -> tuple:
        order = None if x.is_contiguous() else (x.shape, x.stride())
        return id(x), x.data_ptr(), x.numel(), order, x.dtype


class Rows:
    """The parallel lists of one device's parameters, a row per parameter, and their table.

    Attributes:
        holders: Parameters as the optimizer holds them: θ, or with master weights their copies.
        params: The same, of DTensors the local shards.
        reduction: What sums squares over ranks, or None.
        groups: Number of each row's parameter group.
        indices: Tensor index j of each row, counted over all groups.
        anchored: Whether any row has an anchor.
        distances: float64 [n], known ‖θ - θ*‖² of each row, or -1.
        grads: Gradient of each row in the present step or None; see `refresh`.
        places: Where each row's elements lie in the whole tensor; empty if all rows are whole.
        replays: Replay gradient of each row or None; empty when there are none at all.
        present: Not 0 if there is a gradient or replay gradient in the present step.
    """

    present = 0

    def __init__(
        self,
        backend: str,
        params: Sequence[Tensor],
        groups: Sequence[int],
        indices: Sequence[int],
        *,
        anchors: Sequence[Tensor | None],
        exp_avgs: Sequence[Tensor | None] | None = None,
        exp_avg_sqs: Sequence[Tensor | None] | None = None,
        max_exp_avg_sqs: Sequence[Tensor | None] | None = None,
        steps: Sequence[Tensor | None] | None = None,
        masters: Sequence[Tensor | None] | None = None,
        stochastic: bool = False,
        capturable: bool = False,
        process_group=None,
        reduction=None,
    ) -> None:
        absent = [None] * len(params)
        self.backend = backend
        self.stochastic = stochastic
        self.holders = list(params)
        self.params = [sharding.local(p) for p in params]
        self._sharded = any(map(sharding.is_dtensor, params))
        self._shards = sharding.Shards(params) if self._sharded else None
        self.reduction = reduction
        runs = fsdp1.runs(params)
        if self._sharded or process_group is not None or runs:
            self.reduction = sharding.Reduction(params, process_group, runs) or None
        self.places = [sharding.place_of(p) for p in params] if self._sharded or runs else []
        for row, run in runs.items():
            self.places[row] = sharding.Place(run.start, *[max(params[row].numel(), 1)] * 2)
        self.groups = list(groups)
        self.indices = list(indices)
        self.device = self.params[0].device
        self.anchored = any(anchor is not None for anchor in anchors)
        self.grads: list[Tensor | None] = []
        self.replays: list[Tensor | None] = []
        self.distances = torch.full(
            (len(self.params),), -1.0, dtype=torch.float64, device=self.device
        )
        self.hyper_groups: Sequence[dict] = ()
        self.hyper_values: list[float] = []
        self._seen: array.array | None = None
        self._versions: array.array | None = None
        self._gather: _gather.Gather | None = None
        self._gathered = False
        self._constants: dict[object, Tensor] = {}
        self._dtypes = [p.dtype for p in self.params]
        self._shapes = [p.shape for p in self.params]
        self._masters = _real_views(masters or absent)
        self.has_masters = any(master is not None for master in self._masters)
        # Kernels see complex tensors as pairs of reals.
        self._state = {
            EXP_AVG: _real_views(exp_avgs or absent),
            EXP_AVG_SQ: _real_views(exp_avg_sqs or absent),
            MAX_EXP_AVG_SQ: _real_views(max_exp_avg_sqs or absent),
            ANCHOR: _real_views(anchors),
            STEP: list(steps or absent),
        }
        self._staged = [not self._flat(row) for row in range(len(self.params))]
        # Gradients of parameters like these are taken up without a look at each row's strides.
        self._usual = [
            not staged and p.is_contiguous()
            for staged, p in zip(self._staged, self.params, strict=True)
        ]
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        self._grad_copies: list[tuple[Tensor, Tensor]] = []
        self._kept: list[Tensor] = []
        self.kernels: _device.Kernels | None = None
        if launches(backend, self.device):
            away = [
                a if _prefetch.is_away(a, p) else None
                for a, p in zip(self._state[ANCHOR], self.params, strict=True)
            ]
            windows = None
            if any(a is not None for a in away):
                windows = _prefetch.Windows(away, self.device)
            self.kernels = _device.Kernels(
                _launchers(backend),
                self.device,
                len(self.params),
                (PARAM, NUMEL, DTYPES),
                windows,
                capturable,
            )
        if backend != "reference":
            self._base_table = self._make_table()
            # Made once: a new tensor for the addresses of every step costs more than filling it.
            self._address_memory = [bytearray(max(8 * len(self.params), 1)) for _ in range(2)]
            self._address_buffers = [
                torch.frombuffer(memory, dtype=torch.int64, count=len(self.params))
                for memory in self._address_memory
            ]
            self._pack_addresses = struct.Struct(f"{len(self.params)}q").pack_into

    def _tensor(self, column: int, row: int) -> Tensor | None:
        """Returns what the kernels see of a row's tensor; parameters are looked up every time.

        A view kept from step to step would keep memory that somebody has taken from a parameter.
        """
        if column == PARAM and self._masters[row] is not None:
            return self._masters[row]
        if column == COPY and self._masters[row] is None:
            return None
        if column in (PARAM, COPY):
            return real_view(self.params[row].detach())
        return self._state[column][row]

    def tensors(self, column: int) -> list[Tensor | None]:
        """Returns what the kernels see in a column: a tensor or None of every row."""
        return [self._tensor(column, row) for row in range(len(self.params))]

    def _flat(self, row: int) -> bool:
        # An element-wise kernel may walk memory in any order that all its tensors share.
        param = self._tensor(PARAM, row)
        state = [self._tensor(column, row) for column in (*_MOMENTS, ANCHOR, COPY)]
        return is_dense(param) and all(x is None or same_order(x, param) for x in state)

    def _make_table(self) -> Tensor:
        rows = []
        for row, param in enumerate(self.tensors(PARAM)):
            state = (self._tensor(column, row) for column in (PARAM, *_MOMENTS, ANCHOR, STEP))
            addresses = [0 if x is None else x.data_ptr() for x in state]
            if self._window_of(row) >= 0:
                addresses[ANCHOR] = self.kernels.windows.addresses[row]
            copy = self._tensor(COPY, row)
            rows.append(
                [*addresses, param.numel(), self.groups[row], self._dtype_codes(row, None, None),
                 self.indices[row], *self._place(row), 0 if copy is None else copy.data_ptr()]
            )  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), -1)

    def _place(self, row: int) -> tuple[int, int, int]:
        pairs = 2 if self.params[row].is_complex() else 1  # as which kernels see complex numbers
        place = self.places[row] if self.places else None
        if place is None:
            return 0, pairs * self.params[row].numel(), pairs * self.params[row].numel()
        return tuple(pairs * x for x in place)

    def _window_of(self, row: int) -> int:
        windows = None if self.kernels is None else self.kernels.windows
        return -1 if windows is None else windows.of_row[row]

    def _dtype_codes(self, row: int, grad: Tensor | None, replay: Tensor | None) -> int:
        param = self._tensor(PARAM, row)
        state = (self._tensor(column, row) for column in (*_MOMENTS, ANCHOR, COPY))
        # Gradients have the dtype of what the model computes with.
        usual = self.params[row].dtype
        dtypes = [
            param.dtype,
            usual if grad is None else grad.dtype,
            usual if replay is None else replay.dtype,
            *(param.dtype if x is None else x.dtype for x in state),
        ]
        packed = 0
        for place, dtype in enumerate(dtypes):
            packed |= _DTYPE_CODES[dtype.to_real()] << (SLOT_BITS * place)
        return packed

    def gather_by(self, watch: Watch) -> bool:
        """Prepares `gather`; returns whether it is possible.

        Args:
            watch: Watches parameters of which the first are these, in the rows' order.
        """
        # The gradients of shards stand in the DTensors.
        if self.backend != "reference" and not self._sharded:
            noted = self.distances
            if self.kernels is not None:
                # The distances are on the device; what is dropped is noted here.
                noted = self._noted = torch.ones(
                    len(self.params), dtype=torch.float64, device="cpu"
                )
            # Those that are dense in another order, too, unless elements have a number each.
            usual = self._usual if self.stochastic else [not staged for staged in self._staged]
            self._gather = watch.gather(
                self.params, *self._address_buffers, noted, usual, self._usual
            )
        return self._gather is not None

    def gather(self, replays: Sequence[Tensor | None], *, elementwise: bool) -> bool:
        """Takes up the gradients of this step from ``.grad``, as `refresh` would, natively.

        Args:
            replays: Replay gradient of each row or None; empty if there are none at all.
            elementwise: As in `refresh`.

        Returns:
            Whether it did. If not, a watched tensor moved or a gradient is wrong, and it is for
            `refresh` to take them up or to complain.
        """
        present = self._gather.begin(self._versions is not None, replays, row_major=elementwise)
        if present < 0:
            return False
        self._gathered = True
        self._start(bool(replays))
        self.present, self._complete = present, present == len(self.params)
        odd = self._gather.odd()
        if odd or self.has_masters:
            try:
                self._take_odd({row: self.params[row].grad for row in odd}, replays, elementwise)
            except (RuntimeError, TypeError):
                self.abandon()
                return False
        if self.kernels is not None:
            if bool((self._noted < 0).any()):
                self._noted.fill_(1.0)
                self.forget()
            self.kernels.begin(self._table, self._grad_addresses, self._replay_addresses)
        return True

    def odd_gradients(self) -> list[Tensor]:
        """Returns the gradients that `gather` could not take up as they are."""
        grads = [self.params[row].grad for row in self._gather.odd()]
        return [g for g in grads if g is not None]

    def refresh(
        self, grads: list[Tensor | None], replays: list[Tensor | None], *, elementwise: bool
    ) -> None:
        """Takes up the gradients of this step.

        Args:
            grads: Gradient of each row or None; strided, of the parameter's shape.
            replays: Replay gradient of each row or None; empty if there are none at all.
            elementwise: Draws are made per element, which must then lie in row-major order.
        """
        self._gathered = False
        if self._sharded:
            grads = self._shards.of_grads(grads)
            replays = [sharding.local(r) for r in replays]
        self._start(bool(replays))
        if self.backend == "reference":
            self._complete = False
            self.grads, self.replays = _resolved(grads), _resolved(replays)
            self._grad_copies = [
                (grad.detach(), copy)
                for grad, copy in zip(grads, self.grads, strict=True)
                if grad is not None and grad.layout == torch.strided
                if grad.is_neg() or grad.is_conj()
            ]
            others = replays or [None] * len(grads)
            pairs = zip(grads, others, strict=True)
            self._present = [g is not None or r is not None for g, r in pairs]
            self.present = sum(self._present)
            self.take_up_changes()
            return
        self.grads, self.replays = grads, replays
        self._complete = not any([g is None for g in grads])
        # Of no interest but whether there are any.
        self.present = len(self.params) if self._complete else sum(
            [x is not None for x in (*grads, *replays)]
        )  # fmt: skip
        odd = self._enter(grads, 0) | (self._enter(replays, 1) if replays else set())
        self._take_odd({row: grads[row] for row in sorted(odd)}, replays, elementwise)
        if self.kernels is not None:
            self.kernels.begin(self._table, self._grad_addresses, self._replay_addresses)

    def _start(self, replayed: bool) -> None:
        self.grads, self.replays = [], []
        self._copies, self._grad_copies, self._kept = [], [], []
        self._now, self.staged_now = None, False
        if self.backend != "reference":
            self._table = self._base_table
            self._grad_addresses = self._address_buffers[0]
            self._replay_addresses = self._address_buffers[1] if replayed else _NO_ADDRESSES

    def _enter(self, grads: list[Tensor | None], slot: int) -> set[int]:
        """Enters the addresses of all gradients; returns the rows where that is not enough."""
        # 448 gradients pass here every step: comprehensions over one attribute are the fastest
        # thing Python has.
        try:
            addresses, present, rows = list(map(Tensor.data_ptr, grads)), grads, None
        except TypeError:  # some are None
            rows = [row for row, g in enumerate(grads) if g is not None]
            present = [grads[row] for row in rows]
            addresses = [0 if g is None else g.data_ptr() for g in grads]
        dtypes, shapes, usual = self._dtypes, self._shapes, self._usual
        if rows is not None:
            dtypes, shapes, usual = ([x[row] for row in rows] for x in (dtypes, shapes, usual))
        if 0 in addresses:
            addresses = [
                a or (0 if g is None else _NOWHERE) for a, g in zip(addresses, grads, strict=True)
            ]
        self._pack_addresses(self._address_memory[slot], 0, *addresses)
        found = [g.dtype for g in present], [g.shape for g in present]
        plain = [c and not n for c, n in zip(
            map(Tensor.is_contiguous, present), map(Tensor.is_neg, present), strict=True
        )]  # fmt: skip
        if any([dtype.is_complex for dtype in found[0]]):
            plain = [p and not g.is_conj() for p, g in zip(plain, present, strict=True)]
        if _NOWHERE in addresses:
            nowhere = [g.numel() > 0 and not g.data_ptr() for g in present]
            plain = [p and not n for p, n in zip(plain, nowhere, strict=True)]
        if found == (dtypes, shapes) and all(plain) and all(usual):
            return set()
        return {
            place if rows is None else rows[place]
            for place, (mine, theirs, ok, kind) in enumerate(
                zip(zip(*found, strict=True), zip(dtypes, shapes, strict=True), plain, usual,
                    strict=True)
            )
            if not (ok and kind) or mine != theirs
        }  # fmt: skip

    def _take_odd(
        self, grads: Mapping[int, Tensor | None], replays: Sequence[Tensor | None], elementwise
    ) -> None:
        """Takes up the gradients of rows that need a look at their strides or dtypes, or a copy.

        Args:
            grads: Gradient or None of these rows.
            replays: Replay gradient of each row; empty if there are none at all.
            elementwise: As in `refresh`.
        """
        pairs = {}
        for row, grad in grads.items():
            given = grad, (replays[row] if replays else None)
            pairs[row] = pair = _resolved(given)
            shape = self._tensor(PARAM, row).shape
            if any(x is not None and x.shape != shape for x in pair):
                # Only `.grad.data =` can bring this about; a kernel would read beyond its end.
                raise RuntimeError("a gradient has another shape than its parameter")
            for x in pair:
                if x is not None and x.numel() and not x.data_ptr():
                    raise RuntimeError(f"a gradient is a {type(x).__name__} without memory")
        # Before anything is copied.
        self.take_up_changes()
        if pairs:
            self._table = self._base_table.clone()
        for row, pair in pairs.items():
            param = self._tensor(PARAM, row)
            staged = (
                self._staged[row]
                or not all(x is None or (is_dense(x) and same_order(x, param)) for x in pair)
                or ((elementwise or self.stochastic) and not param.is_contiguous())
            )
            if staged:
                self._stage(row)
            for slot, x in enumerate(pair):
                address = 0
                if x is not None:
                    plain = x.contiguous() if staged else x
                    self._kept.append(plain)
                    if slot == 0 and plain.data_ptr() != grads[row].data_ptr():
                        self._grad_copies.append((grads[row].detach(), plain))
                    address = plain.data_ptr() or _NOWHERE
                if slot == 0 or replays:
                    self._address_buffers[slot][row] = address
            self._table[row, DTYPES] = self._dtype_codes(row, *pair)

    def _stage(self, row: int) -> None:
        # Tensors whose strides disagree are worked on as contiguous copies for this step.
        self.staged_now = True
        for column in (PARAM, *_MOMENTS, ANCHOR, COPY):
            tensor = self._tensor(column, row)
            if tensor is None:
                continue
            copy = tensor.to(self.device).contiguous()
            self._kept.append(copy)
            self._table[row, column] = copy.data_ptr()
            if copy.data_ptr() != tensor.data_ptr() and column != ANCHOR:
                self._copies.append((row, tensor, copy))

    @property
    def active(self) -> Tensor:
        """Whether a row had a gradient in the last step, and an anchor: bool [n] on the CPU."""
        if "anchored" not in self._constants:
            anchored = [x is not None for x in self._state[ANCHOR]]
            self._constants["anchored"] = torch.tensor(anchored, device="cpu")
        if self._complete:
            return self._constants["anchored"]
        if self.backend == "reference":
            return torch.tensor(self._present, device="cpu") & self._constants["anchored"]
        present = self._grad_addresses != 0
        if self._replay_addresses.numel():
            present = present | (self._replay_addresses != 0)
        return present & self._constants["anchored"]

    def flags(self, values: Sequence[int], name: str) -> Tensor:
        """Returns uint8 flags, one per row, on the rows' device; until the next of this name."""
        made = torch.tensor(values, dtype=torch.uint8, device="cpu")
        if self.kernels is not None:
            return self.kernels.uploads.send(name, made)
        return made.to(self.device)

    def constant_flags(self, value: int) -> Tensor:
        """Returns (cached) uint8 flags that are the same for every row; not to be modified."""
        if value not in self._constants:
            self._constants[value] = torch.full(
                (len(self.params),), value, dtype=torch.uint8, device=self.device
            )
        return self._constants[value]

    def constant_coefficients(self) -> Tensor:
        """Returns (cached) coefficients of a step that neither clips nor scales: c = s = 1."""
        if "coefficients" not in self._constants:
            ones = torch.ones(
                reference.SCALES + len(self.params), dtype=torch.float64, device=self.device
            )
            self._constants["coefficients"] = ones
        return self._constants["coefficients"]

    def take_up_changes(self) -> None:
        """Carries changes that somebody made to the parameters over into their master weights.

        An element that is still its master's rounding keeps the master; any other becomes it. What
        was written through ``.data``, which no version counts, the C++ kernels find by themselves,
        element by element; here every weight is looked at where the backend is the reference.
        """
        if not self.has_masters:
            return
        now = self._gather.versions if self._gathered else array.array("q", self._versions_now())
        every = self._seen is None or self.backend == "reference"
        if not every and now == self._seen:
            return
        for row, master in enumerate(self._masters):
            if master is not None and (every or self._seen[row] != now[row]):
                master.copy_(reference.adopted(master, self._tensor(COPY, row)))
        self._seen = now[:]

    def _versions_now(self) -> list[int]:
        if self._sharded:
            return self._shards.versions()
        return [p._version for p in self.params]

    def forget_rows(self, rows: Sequence[int]) -> None:
        """Drops the known distances of some rows, whose anchors were written."""
        if rows and self.kernels is not None:
            self.forget()  # one launch instead of one per row
        elif rows:
            self.distances[list(rows)] = -1.0

    def forget(self, *, anchors: bool = True) -> None:
        """Drops all known distances.

        Args:
            anchors: The anchors may have been written, too.
        """
        if self.kernels is not None:
            self.kernels.forget(anchors=anchors)
        self.distances.fill_(-1.0)

    def forget_changed(self) -> None:
        """Drops the known distance of every parameter that was changed since it was measured."""
        if self._versions is None or self._gathered:  # `gather` has done it
            return
        now = self._now = array.array("q", self._versions_now())
        if now != self._versions:
            changed = [row for row, old in enumerate(self._versions) if old != now[row]]
            if self.kernels is not None:
                # One launch instead of one per row; the others' distances are measured again.
                self.forget(anchors=False)
            else:
                for row in changed:
                    self.distances[row] = -1.0
            self._versions[:] = now

    def updated(self, look_ahead: bool) -> None:
        """Ends a step that wrote the parameters: copies staged ones back, bumps versions."""
        for _, target, copy in self._copies:
            target.copy_(copy)
        if self._gathered:
            self._gather.end(written=True)
            for row, _, _ in self._copies:
                self._gather.versions[row] = self.params[row]._version
            if look_ahead:
                self._versions = self._gather.versions
            if self.has_masters:
                self._seen = self._gather.versions[:]
            self._gathered = False
            self.release()
            return
        inactive: list[int] = []
        if not self._complete:
            inactive = [
                row
                for row, grad in enumerate(self.grads)
                if grad is None and not (self.replays and self.replays[row] is not None)
            ]
        if self.backend != "reference":
            # The table hides the writes from autograd, which must know of them.
            changed = self.holders
            if inactive:
                left = set(inactive)
                changed = [p for row, p in enumerate(changed) if row not in left]
            torch.autograd.graph.increment_version(changed)
        if look_ahead:
            before = self._versions
            if self._now is not None and self._complete and not self._copies:
                # Read in this step already, and bumped by one just now.
                now = [version + 1 for version in self._now]
            else:
                now = self._versions_now()
                for row in inactive if before is not None else ():
                    now[row] = before[row]
            if before is None:
                before = self._versions = (
                    array.array("q", now) if self._gather is None else self._gather.versions
                )
            before[:] = array.array("q", now)
        if self.has_masters:
            self._seen = array.array("q", self._versions_now())
        self.release()

    def abandon(self) -> None:
        """Ends a step that wrote nothing: lets go of the gradients."""
        if self._gathered:
            self._gather.end(written=False)
            self._gathered = False
        self.release()

    def release(self) -> None:
        """Lets go of the gradients and of the copies made of them."""
        self.grads, self.replays, self._kept, self._copies, self._grad_copies = [], [], [], [], []


_MOMENTS = (EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ)
# Stands for the address of an empty gradient, which has none but is there: 0 means absent.
_NOWHERE = 1
_NO_ADDRESSES = torch.empty(0, dtype=torch.int64, device="cpu")


def _real_views(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        None if x is None else real_view(sharding.local(x.detach()).resolve_conj()) for x in tensors
    ]


def _resolved(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns gradients as the kernels see them: real, conjugated and negated where that is due."""
    return [
        None if x is None else real_view(sharding.local(x.detach()).resolve_conj()).resolve_neg()
        for x in grads
    ]


def _hyper_table(rows: Rows, groups: Sequence[dict], names: Sequence[str]) -> Tensor:
    if groups is rows.hyper_groups:
        return rows.hyper
    rows.hyper_groups = groups
    values = [group[name] for group in groups for name in names]
    if values != rows.hyper_values:
        numbers = array.array("d", values)
        rows.hyper = torch.frombuffer(numbers, dtype=torch.float64).view(len(groups), len(names))
        rows.hyper_values = values
    return rows.hyper


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


class Scaling(NamedTuple):
    """What a GradScaler says of this step's gradients.

    Attributes:
        divisor: Divisor of the gradients, for backends that run when they are called.
        grad_scale: The same as a float32 tensor, for launches; None is 1.
        found_inf: float32 tensor; launches change nothing where it is not 0. None is 0.
    """

    divisor: float = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Draw(NamedTuple):
    """The draw of a step.

    Attributes:
        seed: Seed in [0, 2**64).
        index: Draw index k.
        injecting: Whether any row may inject.
        elements: Whether any row may draw per element.
        index_tensor: int64 tensor of one element, the draw index that a captured step reads in
            place of ``index``.
    """

    seed: int
    index: int
    injecting: bool
    elements: bool
    index_tensor: Tensor | None = None


def norms(
    rows: Rows,
    *,
    replay_weight: float,
    scaling: Scaling,
    which: int,
    gate: Tensor | None = None,
) -> Tensor:
    """Returns the squares of `reference.norms` for these rows.

    Args:
        rows: The rows, refreshed with this step's gradients.
        replay_weight: w.
        scaling: Divisor of the gradients.
        which: Bits of `reference`.
        gate: uint8 [1]; a captured step measures for the injection only where it is not 0.
    """
    if rows.kernels is not None:
        return rows.kernels.norms(
            rows.distances,
            replay_weight=replay_weight,
            grad_scale=scaling.grad_scale,
            which=which,
            gate=gate,
        )
    if rows.backend == "cpp":
        return torch.ops.dgg.norms_table(
            rows._table,
            rows._grad_addresses,
            rows._replay_addresses,
            rows.distances,
            replay_weight=replay_weight,
            grad_scale=scaling.divisor,
            which=which,
        )
    return reference.norms(
        rows.tensors(PARAM),
        rows.grads,
        rows.replays,
        rows.tensors(ANCHOR),
        rows.distances,
        replay_weight=replay_weight,
        grad_scale=scaling.divisor,
        which=which,
    )


def coefficients(
    rows: Rows, squares: Tensor, *, max_grad_norm: float | None, scaling: bool, per_tensor: bool
) -> Tensor:
    """Returns c, the norms and s as `reference.coefficients` does."""
    function = reference.coefficients
    if rows.kernels is not None:
        function = rows.kernels.coefficients
    elif rows.backend == "cpp":
        function = torch.ops.dgg.coefficients
    return function(squares, max_grad_norm=max_grad_norm, scaling=scaling, per_tensor=per_tensor)


def measure(
    rows: Rows,
    settings: Mapping[str, Any],
    *,
    replay_weight: float,
    scaling: Scaling,
    which: int,
    gate: Tensor | None = None,
) -> Tensor:
    """Returns the `coefficients` of rows whose `norms` nobody else has a part in.

    Args:
        rows: The rows, refreshed with this step's gradients.
        settings: What `coefficients` takes besides.
        replay_weight: As in `norms`, and so the others.
        scaling: Likewise.
        which: Likewise.
        gate: Likewise.
    """
    options = {"replay_weight": replay_weight, "which": which}
    if rows.kernels is not None:
        options |= {"grad_scale": scaling.grad_scale, "gate": gate}
        return rows.kernels.measure(rows.distances, settings, **options)
    return coefficients(rows, norms(rows, scaling=scaling, **options), **settings)


class Rule(NamedTuple):
    """An update rule as the backends know it.

    Attributes:
        name: Of its function in `reference`; the operators' names begin with it.
        state: Columns of the lists that the reference takes after the gradients.
        hyper: Hyper-parameters in the order of the kernels' table.
        optional: The one that makes the rule read and write its optional state.
    """

    name: str
    state: tuple[int, ...]
    hyper: tuple[str, ...]
    optional: str


ADAM = Rule("adam_", (EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, ANCHOR, STEP), ADAM_HYPER, "amsgrad")
SGD = Rule("sgd_", (EXP_AVG, ANCHOR), SGD_HYPER, "momentum")


def draw_flags(
    rows: Rows,
    flags: Tensor,
    groups: Sequence[dict],
    names: Sequence[str],
    draw_index: Tensor,
    seed: int,
    granularity: str,
) -> Tensor:
    """Draws on the device, for a step that is captured.

    Args:
        rows: Rows whose backend launches.
        flags: uint8 [n]; INJECT and INJECT_ELEMENTS are set, FIRST_STEP is kept. In place.
        groups: Hyper-parameters of every group.
        names: Their order in the kernels' table.
        draw_index: int64, draw index k.
        seed: Seed of the draws.
        granularity: What a draw decides.

    Returns:
        uint8 [1], whether any row injects.
    """
    return rows.kernels.draw_flags(
        flags,
        rows.kernels.hyper(groups, names),
        draw_index,
        seed=_signed(seed),
        granularity=granularity,
        threshold_column=names.index("threshold"),
        strength_column=names.index("strength"),
    )


def update_(
    rule: Rule,
    rows: Rows,
    coefficients: Tensor,
    flags: Tensor,
    groups: Sequence[dict],
    draw: Draw,
    scaling: Scaling,
    *,
    look_ahead: bool,
    replay_weight: float,
) -> None:
    """Runs an update rule on these rows: all groups in one call, parameters in place.

    Args:
        rule: `ADAM` or `SGD`.
        rows: The rows, refreshed with this step's gradients.
        coefficients: float64 [4 + n].
        flags: uint8 [n].
        groups: Hyper-parameters of every group, the names in ``rule.hyper``.
        draw: The draw of the step.
        scaling: Divisor of the gradients, and whether to change anything.
        look_ahead: Also measure the distances after the update.
        replay_weight: w.
    """
    if rows.kernels is not None:
        # Anchors that are not here come again for the next step's distances, beside its forward
        # and backward pass.
        away = rows.kernels.windows is not None
        here = look_ahead and not away
        variant = ANCHOR_BIT if draw.injecting or here else 0
        variant |= ELEMENTS_BIT if draw.elements else 0
        variant |= LOOK_AHEAD_BIT if here else 0
        if any(group[rule.optional] for group in groups):
            variant |= STATE_BIT
        variant |= STOCHASTIC_BIT if rows.stochastic else 0
        rows.kernels.update_(
            rule.name,
            coefficients,
            flags,
            rows.kernels.hyper(groups, rule.hyper),
            rows.distances,
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
            draw_index=draw.index_tensor,
            replay_weight=replay_weight,
            seed=_signed(draw.seed),
            draw=draw.index,
            variant=variant,
        )
        rows.kernels.measured = False
        look_ahead = look_ahead and not (away and rows.staged_now)
        if away and look_ahead:
            rows.kernels.measure_ahead(rows.distances)
    elif rows.backend == "cpp":
        getattr(torch.ops.dgg, rule.name + "table_")(
            rows._table,
            rows._grad_addresses,
            rows._replay_addresses,
            coefficients,
            flags,
            _hyper_table(rows, groups, rule.hyper),
            rows.distances,
            replay_weight=replay_weight,
            grad_scale=scaling.divisor,
            look_ahead=look_ahead,
            stochastic=rows.stochastic,
            seed=_signed(draw.seed),
            draw=draw.index,
        )
    else:
        for number, group in enumerate(groups):
            getattr(reference, rule.name)(
                rows.tensors(PARAM),
                *_of_group(rows, number),
                *(rows.tensors(column) for column in rule.state),
                rows.distances,
                coefficients,
                flags,
                rows.indices,
                **{key: group[key] for key in rule.hyper},
                look_ahead=look_ahead,
                places=[rows._place(row) for row in range(len(rows.params))] if rows.places else (),
                copies=rows.tensors(COPY) if rows.has_masters else (),
                stochastic=rows.stochastic,
                replay_weight=replay_weight,
                grad_scale=scaling.divisor,
                seed=draw.seed,
                draw=draw.index,
            )
    rows.updated(look_ahead)


def guide_(
    rows: Rows,
    coefficients: Tensor,
    flags: Tensor,
    groups: Sequence[dict],
    draw: Draw,
    scaling: Scaling,
    *,
    replay_weight: float,
) -> None:
    """Runs `reference.guide_` on these rows: every gradient becomes G, in place.

    Args:
        rows: The rows, refreshed with this step's gradients.
        coefficients: float64 [4 + n].
        flags: uint8 [n].
        groups: Hyper-parameters of every group, the names in GUIDE_HYPER.
        draw: The draw of the step.
        scaling: Divisor of the gradients, and whether to change anything.
        replay_weight: w.
    """
    if rows.backend == "reference":
        for number, group in enumerate(groups):
            reference.guide_(
                rows.tensors(PARAM),
                *_of_group(rows, number),
                rows.tensors(ANCHOR),
                coefficients,
                flags,
                rows.indices,
                **{key: group[key] for key in GUIDE_HYPER},
                replay_weight=replay_weight,
                grad_scale=scaling.divisor,
                seed=draw.seed,
                draw=draw.index,
                places=rows.places,
            )
        _give_back(rows._grad_copies)
        rows.release()
        return
    if rows.kernels is not None:
        rows.kernels.guide_(
            coefficients,
            flags,
            rows.kernels.hyper(groups, GUIDE_HYPER),
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
            draw_index=draw.index_tensor,
            replay_weight=replay_weight,
            seed=_signed(draw.seed),
            draw=draw.index,
            variant=(ANCHOR_BIT if draw.injecting else 0) | (ELEMENTS_BIT if draw.elements else 0),
        )
    else:
        torch.ops.dgg.guide_table_(
            rows._table,
            rows._grad_addresses,
            rows._replay_addresses,
            coefficients,
            flags,
            _hyper_table(rows, groups, GUIDE_HYPER),
            replay_weight=replay_weight,
            grad_scale=scaling.divisor,
            seed=_signed(draw.seed),
            draw=draw.index,
        )
    _give_back(rows._grad_copies)
    # The table hides the writes from autograd, which must know of them.
    edited = [p.grad for p in rows.params] if rows._gathered else rows.grads
    torch.autograd.graph.increment_version([g for g in edited if g is not None])
    rows.abandon()


def _give_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes what was worked on in a copy back into the gradients."""
    for grad, copy in copies:
        value = torch.view_as_complex(copy) if grad.is_complex() else copy
        # Of the same dtype: torch's copy to a lazily negated 16-bit tensor has the wrong sign.
        grad.copy_(value.to(grad.dtype))


def _of_group(rows: Rows, number: int) -> tuple[list, list]:
    # Rows of other groups pass as rows without gradient, which the reference leaves alone.
    mine = [group == number for group in rows.groups]
    return tuple(
        [x if own else None for own, x in zip(mine, tensors, strict=True)] if tensors else []
        for tensors in (rows.grads, rows.replays)
    )
