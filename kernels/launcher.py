# SPDX-License-Identifier: BSD-3-Clause
"""The host's side of the kernels: what a launch is compiled for, and how it is launched.

A kernel is looked up once, tried again, and compiled without spills. The names of its arguments say
on what a variant depends.
"""

import contextlib
import functools
import struct
import time
import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from dgg.kernels import layout
from dgg.kernels.chunks import BLOCK
from dgg.kernels.update import INTERPRETED
from triton.compiler import CompiledKernel

from dgg import _callers

_DTYPES = tuple(getattr(tl, name) for name in layout.DTYPE_NAMES)

# Launches do not depend on the numbers in these, nor on the alignment of the small tables.
NUMBERS = ["n", "slots", "which", "seed", "draw", "replay_weight", "max_grad_norm",
           "pull_weight", "members", "settings", "hypers", "threshold_column",
           "strength_column"]  # fmt: skip
TABLES = ["table", "rows", "chunks", "starts", "partials", "counters", "grads", "replays",
          "distances", "squares", "products", "gate", "grad_scale", "found_inf", "draw_index",
          "coefficients", "flags", "hyper", "out"]  # fmt: skip
# Those that may be None.
OPTIONAL = ["gate", "grad_scale", "found_inf", "draw_index"]

# Seconds to wait before Triton's cache is tried again.
PAUSES = (0.1, 1.0, 5.0)

# Registers a thread may have where the compiler, left alone, keeps some in local memory for the
# sake of another resident block. All variants find room in these on all targets, and of blocks of
# 128 threads a multiprocessor holds three then.
ROOM = {"maxnreg": 168}


class Kernel:
    """A kernel of Triton's, looked up once per variant, and launched again if its cache fails.

    At every launch Triton finds out the variant from the arguments, and compares every number that
    the kernel's source names, for some 100 us on the host. `kernel` says what a variant depends on,
    so the compiled kernel is kept.

    In a cache that several nodes share, files that Triton has just written may be gone or stale for
    a moment (triton#11512), and a rank that fails leaves the others waiting. Such an error comes
    before anything is launched, so the launch is tried again a few times.

    Args:
        declared: The result of `triton.jit`.
        names: The function's parameters.
    """

    def __init__(self, declared, names) -> None:
        self.declared = declared
        annotations = declared.fn.__annotations__
        # Constants are compiled in, and so is whether an argument is None.
        self._chosen = [
            place for place, name in enumerate(names) if annotations.get(name) is tl.constexpr
        ]
        self._optional = [place for place, name in enumerate(names) if name in OPTIONAL]
        self._compiled: dict[tuple, Any] = {}

    def launch(self, programs: int, *arguments, pack: int = 4) -> None:
        """Launches programs on the device of the first argument.

        Args:
            programs: How many.
            arguments: Of the kernel.
            pack: Elements of a block that a thread takes.
        """
        device = arguments[0].device
        key = (
            device,
            pack,
            *(arguments[place] for place in self._chosen),
            *(arguments[place] is None for place in self._optional),
        )
        grid = (programs, 1, 1)
        with _on_device(device):
            compiled = self._compiled.get(key)
            if compiled is not None:
                compiled[grid](*arguments)
                return
            # There is nothing to keep in stages, and what is fused stands in update.py.
            warps = max(BLOCK // (pack * _warp_size(device)), 1)
            options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
            launched = self._find(grid, arguments, options)
            # The interpreter returns None, and compiling in the background returns a promise.
            if isinstance(launched, CompiledKernel):
                self._compiled[key] = self._without_spills(launched, grid, arguments, options)

    def _find(self, grid, arguments, options):
        """Launches with Triton's own launcher; returns the compiled kernel."""
        for pause in (*PAUSES, None):
            try:
                return self.declared.run(*arguments, grid=grid, warmup=False, **options)
            # ImportError if the launcher, a Python module, cannot be loaded.
            except (OSError, ImportError) as error:
                says = (
                    f"Triton could not compile or load {self.declared.__name__} ({error}). If its "
                    "cache is on a disk that several nodes share, set TRITON_CACHE_DIR to a "
                    "directory of this node's own (docs/sharding.md)"
                )
                if pause is None:
                    raise RuntimeError(says) from error
            warnings.warn(f"{says}. Trying again in {pause} s", stacklevel=_callers.stacklevel())
            time.sleep(pause)

    def _without_spills(self, compiled, grid, arguments, options):
        """Returns the kernel to keep: compiled once more, with more registers, if some spilled."""
        if not compiled.n_spills or compiled.metadata.target.backend != "cuda":
            return compiled
        try:
            other = self.declared.run(*arguments, grid=grid, warmup=True, **ROOM, **options)
            if not isinstance(other, CompiledKernel):
                return compiled
            other[grid]  # is loaded, and not launched
        except Exception as error:
            # The step is launched already.
            warnings.warn(
                f"{self.declared.__name__} keeps registers in local memory, since it could not be "
                f"compiled once more: {error}",
                stacklevel=_callers.stacklevel(),
            )
            return compiled
        return other if other.n_spills < compiled.n_spills else compiled


def kernel(function) -> Kernel:
    """Declares a kernel: compiled once per variant, not once per value or alignment."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return Kernel(
        triton.jit(
            function,
            do_not_specialize=[name for name in names if name in NUMBERS],
            do_not_specialize_on_alignment=[name for name in names if name in TABLES],
        ),
        names,
    )


def _on_device(device: torch.device):
    """Returns a context in which launches go to a device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.cache
def _warp_size(device: torch.device) -> int:
    if INTERPRETED:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def pack_of(*dtypes) -> int:
    """Returns how many neighbouring elements a thread takes.

    As many as make accesses of the narrowest tensor 128 bits wide.
    """
    return 8 if any(dtype.primitive_bitwidth == 16 for dtype in dtypes) else 4


@functools.cache
def dtypes_of(codes: int) -> tuple:
    """Returns the dtypes packed in ``codes``, one of each slot, and that of the arithmetic last."""
    slots = [codes >> layout.SLOT_BITS * slot & layout.SLOT_MASK for slot in range(layout.SLOTS)]
    dtypes = [_DTYPES[code] for code in slots]
    return (*dtypes, tl.float64 if dtypes[layout.PARAM_SLOT] == tl.float64 else tl.float32)


def bits(number: float) -> int:
    """Returns the bits of a float64: Triton would pass the number itself as float32."""
    return struct.unpack("q", struct.pack("d", number))[0]


def features_of(variant: int, dtypes: tuple) -> tuple[bool | int, ...]:
    """Returns what an update is compiled for.

    Args:
        variant: Bits as in layout.py.
        dtypes: From `dtypes_of`; stochastic rounding is for bfloat16 alone.

    Returns:
        Anchor, elements, look-ahead, state, rounding, copy, importance, and the route.

    Raises:
        ValueError: Something is asked for that needs an anchor, without the bit for anchors; or two
            routes.
    """
    anchor, elements, look_ahead, state, stochastic, copy, importance, first_moment, decoupled = (
        bool(variant & bit)
        for bit in (layout.ANCHOR_BIT, layout.ELEMENTS_BIT, layout.LOOK_AHEAD_BIT, layout.STATE_BIT,
                    layout.STOCHASTIC_BIT, layout.COPY_BIT, layout.IMPORTANCE_BIT,
                    layout.FIRST_MOMENT_BIT, layout.DECOUPLED_BIT)
    )  # fmt: skip
    if (elements or look_ahead or importance or first_moment or decoupled) and not anchor:
        raise ValueError(
            f"variant {variant}: ELEMENTS, LOOK_AHEAD, IMPORTANCE and the routes need ANCHOR, too"
        )
    if first_moment and decoupled:
        raise ValueError(f"variant {variant}: FIRST_MOMENT and DECOUPLED exclude each other")
    route = layout.BY_FIRST_MOMENT if first_moment else layout.BY_GRADIENT
    route = layout.BY_DECOUPLED if decoupled else route
    narrow = dtypes[layout.PARAM_SLOT] == tl.bfloat16
    narrow = narrow or (copy and dtypes[layout.COPY_SLOT] == tl.bfloat16)
    rounding = stochastic and narrow
    return anchor, elements, look_ahead, state, rounding, copy, importance, route
