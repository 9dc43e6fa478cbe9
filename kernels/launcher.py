# SPDX-License-Identifier: BSD-3-Clause
"""Declaring and launching Triton kernels: looked up once, tried again, without spills.

This file does not depend on what a kernel computes, only on the names of its arguments, which say
on what a variant depends.
"""

import time
import warnings
from typing import Any

import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from dgg import _callers

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

    def __getitem__(self, grid):
        """Returns the function that launches on a grid of one dimension."""

        def launch(*arguments, **options):
            key = (
                arguments[0].device,
                *(arguments[place] for place in self._chosen),
                *(arguments[place] is None for place in self._optional),
                *options.values(),
            )
            compiled = self._compiled.get(key)
            if compiled is not None:
                compiled[(grid[0], 1, 1)](*arguments)
                return
            launched = self._find(grid, arguments, options)
            # The interpreter returns None, and compiling in the background returns a promise.
            if isinstance(launched, CompiledKernel):
                self._compiled[key] = self._without_spills(launched, grid, arguments, options)

        return launch

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
