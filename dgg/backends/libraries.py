# SPDX-License-Identifier: BSD-3-Clause
"""The compiled libraries, or why there are none."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg.backends.uploads import capturing

# setup.py puts the libraries into the package itself, or a note that says why there are none.
FOLDER = pathlib.Path(__file__).parents[1]


def _load_library(pattern: str, note: str) -> str | None:
    """Loads compiled operators; returns None, or why they are missing."""
    libraries = sorted(FOLDER.glob(f"{pattern}.so")) + sorted(FOLDER.glob(f"{pattern}.pyd"))
    if not libraries:
        report = FOLDER / note
        reason = report.read_text().strip() if report.exists() else "it was not built"
        return (
            f"{reason}; install a C++ compiler and reinstall dgg "
            "(pip install --no-build-isolation --force-reinstall --no-deps dgg)"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        # torch's error names the library; the cause of the error says what is wrong with it.
        reason = error.__cause__ or error
        return f"{libraries[0].name} cannot be loaded ({reason}); reinstall dgg for this torch"
    return None


def _load_cuda_library() -> str | None:
    if cpp_error is not None:
        return cpp_error
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} has no CUDA; install a CUDA build of torch, then reinstall "
            "dgg with DGG_CUDA=1"
        )
    reason = _load_library("_C_cuda*", "_build_error_cuda.txt")
    return reason and reason.replace("a C++ compiler", "nvcc (CUDA toolkit), set DGG_CUDA=1")


cpp_error = _load_library("_C.*", "_build_error.txt")
cuda_error = _load_cuda_library()


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
    """Raises errors that name the function to call; torch would list dispatch keys."""
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


if cpp_error is None:
    _register_fakes()
    _refusals = _refuse_on_gpus()  # they last as long as this does


def _direct(operator: Any) -> Any:
    """Returns an operator without its Python wrapper, which costs half a microsecond per call."""
    return getattr(operator.default, "_op", operator.default)


# The operators on an address table, by the name of their function in `reference`.
OPERATORS: dict[str, Any] = {}
if cpp_error is None:
    OPERATORS = {
        "norms": _direct(torch.ops.dgg.norms_table),
        "coefficients": _direct(torch.ops.dgg.coefficients),
        "adam_": _direct(torch.ops.dgg.adam_table_),
        "sgd_": _direct(torch.ops.dgg.sgd_table_),
        "guide_": _direct(torch.ops.dgg.guide_table_),
    }


def launchers(backend: str) -> Any:
    """Returns the namespace of a GPU backend's launches: Triton's module, or CUDA's operators."""
    return importlib.import_module("dgg.kernels") if backend == "triton" else torch.ops.dgg


# By device: why the CUDA library cannot run there, or None.
probed: dict[torch.device, str | None] = {}


def trouble_on(device: torch.device) -> str | None:
    """Returns why the CUDA library's kernels cannot run on a device, or None; tries it out once.

    Only a launch shows that the library was built for other devices or for a newer driver.
    """
    if device in probed or capturing(device):  # a launch would become part of the graph
        return probed.get(device)
    try:
        squares = torch.zeros(3, 1, dtype=torch.float64, device=device)
        if type(squares) is not Tensor:
            return None  # a mode in which there are no devices, such as FakeTensorMode
        out = torch.empty(reference.SCALES + 1, dtype=torch.float64, device=device)
        launchers("cpp").coefficients_launch(
            squares, out, max_grad_norm=None, scaling=False, per_tensor=False
        )
        probed[device] = None
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        probed[device] = f"its CUDA library cannot run there: {str(error).splitlines()[0]}"
    return probed[device]
