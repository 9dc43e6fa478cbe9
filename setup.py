# SPDX-License-Identifier: BSD-3-Clause
"""Builds the optional C++ library dgg/_C*.so; everything else is in pyproject.toml.

The library uses the stable ABI of torch 2.10 and no Python API, so one file serves every later
torch and Python. Where it cannot be built the installation still succeeds: the reason goes to
dgg/_build_error.txt, and `dgg.show_config()` prints it.

Environment: DGG_CPP=0 skips the library, DGG_CPP=1 makes its failure fatal, DEBUG=1 builds it
without optimisation and with debug information.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ERROR_FILE = "_build_error.txt"
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def torch_directory() -> pathlib.Path:
    """Returns the directory of torch without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "torch is not installed where the package was built; install it first, then "
            "`pip install --no-build-isolation` this package"
        )
    return pathlib.Path(spec.origin).parent


def flags(msvc: bool) -> list[str]:
    # No fast-math: NaN must stay NaN. No contraction: with fused multiply-adds on some machines
    # only, results would differ between instruction sets.
    if msvc:
        return ["/std:c++17", "/fp:precise", *(["/Od", "/Z7"] if DEBUG else ["/O2"])]
    return [
        "-std=c++17",
        # Unswitching doubles the time to compile and gains nothing at memory speed.
        *(["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-unswitch-loops"]),
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        "-Wno-ignored-optimization-argument",
    ]


def spawn_with_reason(command: list[str], **_) -> None:
    """Runs a compiler so that what it complains about is not lost."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"no C++ compiler: {error}") from error
    sys.stderr.write(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise CompileError(f"{command[0]} failed with exit code {done.returncode}:\n{tail}")


class BuildExtension(build_ext):
    """Builds what it can and keeps the reason where it cannot."""

    def run(self):
        wanted = os.environ.get("DGG_CPP", "")
        report = pathlib.Path(self.get_ext_fullpath("dgg._C")).parent / ERROR_FILE
        reason = None
        if wanted == "0":
            reason = "not built: DGG_CPP=0 was set during installation"
        else:
            try:
                super().run()
            except Exception as error:
                if wanted == "1":
                    raise
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            # A library of an earlier build would load and be taken for this one.
            pathlib.Path(self.get_ext_fullpath("dgg._C")).unlink(missing_ok=True)
        if reason is None:
            report.unlink(missing_ok=True)
            return
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(reason + "\n", encoding="utf-8")
        print(f"dgg: continuing without the C++ backend ({reason})", file=sys.stderr)
        # Setuptools would look for the outputs of what was not built.
        self.extensions = []

    def build_extensions(self):
        torch = torch_directory()
        msvc = self.compiler.compiler_type == "msvc"
        if not msvc:
            # Setuptools before 84 runs the compiler with `spawn`, later ones with `call`.
            self.compiler.spawn = self.compiler.call = spawn_with_reason
        for extension in self.extensions:
            extension.include_dirs.append(str(torch / "include"))
            extension.library_dirs.append(str(torch / "lib"))
            extension.libraries.append("torch_cpu")
            extension.extra_compile_args.extend(flags(msvc))
        super().build_extensions()

    def get_export_symbols(self, ext):
        # Not a Python module: there is no PyInit function to export.
        return []


setup(
    ext_modules=[
        Extension(
            "dgg._C",
            sources=["csrc/ops.cpp", "csrc/cpu.cpp", "csrc/watch.cpp"],
            depends=["csrc/table.h", "csrc/update.h"],
            # Features newer than torch 2.10 are out of reach at compile time already.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
