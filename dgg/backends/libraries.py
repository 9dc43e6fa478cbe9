# SPDX-License-Identifier: BSD-3-Clause
"""The compiled libraries, or why there are none; and where Triton's kernels are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import shlex
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from dgg import _callers, reference
from dgg.backends.uploads import capturing

# setup.py puts the libraries into the package itself, or a note that says why there are none.
FOLDER = pathlib.Path(__file__).parents[1]
# The clone that the package was imported from, if it was: `import dgg` takes the folder there.
CLONE = FOLDER.parent if all((FOLDER.parent / x).exists() for x in ("setup.py", "csrc")) else None


def _find_kernels() -> None:
    """Finds ``dgg.kernels`` where the package is a clone's folder: in kernels/ beside it.

    An editable install maps the name, perhaps to another clone.
    """
    if (FOLDER / "kernels" / "__init__.py").exists():
        return
    home = FOLDER.parent / "kernels" / "__init__.py"
    if CLONE is None or not home.exists():
        if importlib.util.find_spec("dgg.kernels") is None:
            raise ImportError(
                f"{FOLDER} is no whole package, dgg.kernels is missing; install the whole: in a "
                "clone of dgg, pip install --force-reinstall --no-deps ."
            )
        return
    spec = importlib.util.spec_from_file_location(
        "dgg.kernels", home, submodule_search_locations=[str(home.parent)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = vars(sys.modules["dgg"])["kernels"] = module
    spec.loader.exec_module(module)


# Before anything of this package asks for it.
_find_kernels()

# What a compiler said of a library that could not be built.
details: list[str] = []
# Types of devices of which a step has said that it is slow there, and why.
told: set[str] = set()


def command() -> str:
    """Returns the command that builds and installs the package again."""
    if CLONE is not None:
        return f"pip install -e {shlex.quote(str(CLONE))}"
    source, install = "", "pip install"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError, ValueError):
        found = importlib.metadata.distribution("dgg")
        # Another dgg may be installed than the one that is imported.
        if pathlib.Path(str(found.locate_file("dgg"))).resolve() == FOLDER.resolve():
            source = _origin(json.loads(found.read_text("direct_url.json") or "{}"))
            if (found.read_text("INSTALLER") or "").strip() == "uv":
                # Its isolated builds hide torch, and where it installs there need be no pip.
                install = "uv pip install --no-build-isolation"
    options = "--force-reinstall --no-deps --no-cache-dir"
    if not source:
        return f"{install} {options} . (in a clone of dgg)"
    return f"{install} {options} {shlex.quote(source)}"


def _origin(direct: dict[str, Any]) -> str:
    """Returns what pip was told to build, from its record of that, or ""."""
    url = direct.get("url", "")
    if url.endswith(".whl"):  # which would bring the same again
        return ""
    if "vcs_info" in direct:
        return f"{direct['vcs_info']['vcs']}+{url}@{direct['vcs_info']['commit_id']}"
    if url.startswith("file:"):
        import urllib.parse
        import urllib.request  # large, and seldom needed

        return urllib.request.url2pathname(urllib.parse.urlparse(url).path)
    return url


def _places() -> list[pathlib.Path]:
    """Returns where libraries and notes are looked for."""
    # `pip install .` builds in the clone and leaves its results there.
    left = [] if CLONE is None else CLONE.glob("build/lib*/dgg")
    return [FOLDER, *sorted(left, key=lambda folder: -folder.stat().st_mtime)]


def _load_library(pattern: str, note: str) -> str | None:
    """Loads compiled operators; returns None, or why they are missing, and what mends that."""
    for place in _places():
        libraries = [*sorted(place.glob(f"{pattern}.so")), *sorted(place.glob(f"{pattern}.pyd"))]
        if not libraries and (place / note).exists():
            reason, _, output = (place / note).read_text(encoding="utf-8").strip().partition("\n")
            details.extend(output.splitlines())
            return f"{reason}: {_variables(note)}{command()}"
        if not libraries:
            continue
        if place != FOLDER and CLONE is not None:
            sources = [path.stat().st_mtime for path in CLONE.glob("csrc/*")]
            if libraries[0].stat().st_mtime < max(sources):
                return f"{libraries[0]} is older than csrc/: {_variables(note)}{command()}"
        try:
            torch.ops.load_library(str(libraries[0]))
        except (OSError, RuntimeError) as error:
            # torch's error names the library; the cause of the error says what is wrong with it.
            cause = error.__cause__ or error
            return (
                f"{libraries[0].name} cannot be loaded ({cause}); reinstall dgg for this torch: "
                f"{_variables(note)}{command()}"
            )
        return None
    where = "" if CLONE is None else f" in {CLONE}, which dgg is imported from"
    return f"it was not built{where}: {_variables(note)}{command()}"


def _variables(note: str) -> str:
    return "DGG_CUDA=1 " if "cuda" in note else ""


def _load_cuda_library() -> str | None:
    if cpp_error is not None:
        return cpp_error
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} has no CUDA; install a CUDA build of torch, then dgg "
            f"again: DGG_CUDA=1 {command()}"
        )
    return _load_library("_C_cuda*", "_build_error_cuda.txt")


cpp_error = _load_library("_C.*", "_build_error.txt")
cuda_error = _load_cuda_library()
# Somebody wanted no library.
declined = cpp_error is not None and "DGG_CPP=0" in cpp_error


def warn_if_unbuilt() -> None:
    """Warns, at the import, of a clone that nothing was built in: it is not what was installed."""
    if cpp_error is None or CLONE is None or not cpp_error.startswith("it was not built"):
        return
    told.add("cpu")
    warnings.warn(
        f"dgg has no compiled library, and steps are slow: {cpp_error}",
        stacklevel=_callers.stacklevel(),
    )


# The functions of `reference` that are operators, and the operator that takes an address table.
_ON_TABLES = {
    "norms": "norms_table", "coefficients": "coefficients", "products": "products_table",
    "guard_coefficients": "guard_coefficients", "adam_": "adam_table_", "sgd_": "sgd_table_",
    "guide_": "guide_table_",
}  # fmt: skip


def _register_fakes() -> None:
    # The list operators return nothing but `norms`, whose shape is known; the mutations stand in
    # the schemas.
    @torch.library.register_fake("dgg::norms")
    def _(params, grads, replays, anchors, distances, **_kwargs):
        return distances.new_empty((3, len(params)), dtype=torch.float64)

    @torch.library.register_fake("dgg::coefficients")
    def _(squares, **_kwargs):
        return squares.new_empty((reference.SCALES + squares.shape[1],))

    @torch.library.register_fake("dgg::products")
    def _(params, grads, replays, anchors, flags, **_kwargs):
        return flags.new_empty((reference.PRODUCTS, len(params)), dtype=torch.float64)

    @torch.library.register_fake("dgg::guard_coefficients")
    def _(products, **_kwargs):
        size = reference.SCALES + products.shape[1] + reference.GUARD_EXTRAS
        return products.new_empty((size,))

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

    for name in _ON_TABLES:
        library.impl(name, refuse(name))
    return library


def _direct(name: str) -> Any:
    """Returns an operator without its Python wrapper, which costs half a microsecond per call."""
    operator = getattr(torch.ops.dgg, name).default
    return getattr(operator, "_op", operator)


# The operators on an address table, by the name of their function in `reference`.
OPERATORS: dict[str, Any] = {}
if cpp_error is None:
    _register_fakes()
    _refusals = _refuse_on_gpus()  # they last as long as this does
    OPERATORS = {function: _direct(name) for function, name in _ON_TABLES.items()}


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
